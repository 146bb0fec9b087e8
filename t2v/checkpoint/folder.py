"""The checkpoint folder: written whole or not at all, checked, found, pruned.

<run>/checkpoints/step-00001000/
    unet.safetensors   the network's weights
    ema.safetensors    their moving average, which generate and evaluate use
    model.json         what these weights are (card.py)
    train/             optimizer, schedule, callbacks, loops: only the trainer reads it
    data/              where each virtual reader stands, of all ranks: only the trainer reads it
    complete           the marker, written last: the size of every file, and a hash of each small one
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from safetensors import SafetensorError

from t2v.checkpoint.card import AutoencoderCard, ModelCard
from t2v.weights import folder_of

UNET, EMA, CARD, MARKER = "unet.safetensors", "ema.safetensors", "model.json", "complete"
TRAIN, DATA = "train/", "data/"
HASHED_UP_TO = 1 << 20  # bytes; larger files are known by their size, and safetensors checks its own layout
STEP_FOLDER = re.compile(r"step-(\d+)")
TORCH_WRITE_ERRORS = ("PytorchStreamWriter", "inline_container.cc", "iostream error")

PartWriter = Callable[[Path], None]


class CheckpointError(ValueError):
    """One line: which checkpoint, what is wrong, what to do."""


class CheckpointWriteError(CheckpointError, OSError):
    """The disk refused; earlier checkpoints are as they were."""


def step_folder(run: Path | str, step: int) -> Path:
    """Where a run keeps the checkpoint of an optimizer step."""
    return Path(run) / "checkpoints" / f"step-{step:08d}"


def write(folder: Path | str, parts: Mapping[str, PartWriter], model: Mapping[str, Any] | ModelCard | AutoencoderCard) -> Path:
    """Write a checkpoint from one process. `parts`: relative name -> function that writes that path; a name that ends in "/" is a folder.

    Until it is complete it lives under a temporary name beside `folder`. Raises CheckpointError in one line where the disk is full or not
    writable; whatever was there before stays as it was, and the half-written rest is removed.
    """
    folder = Path(folder)
    card = _card(model)
    staging = begin(folder)
    try:
        for name, write_part in parts.items():
            path = staging / name
            (path if name.endswith("/") else path.parent).mkdir(parents=True, exist_ok=True)
            write_part(path)
        return commit(staging, folder, card)
    except BaseException as error:
        shutil.rmtree(staging, ignore_errors=True)
        if readable := write_error(error, folder):
            raise readable from error
        raise


def begin(folder: Path | str) -> Path:
    """The first half of `write`, where several ranks write their own files: rank 0 calls this and then `commit`, a barrier around each.

    Returns the temporary folder, whose name every rank can also compute by `staging_folder`.
    """
    folder = Path(folder)
    if is_complete(folder):
        raise CheckpointError(f"{folder} is a complete checkpoint already: remove it first, or write to another folder")
    staging = staging_folder(folder)
    try:
        for leftover in (staging, folder):  # of a process that was killed while it wrote, or damaged since
            if leftover.exists():
                if leftover == folder and not (_looks_unfinished(folder) or (folder / MARKER).is_file()):
                    raise CheckpointError(f"{folder} exists and is not a checkpoint: choose another folder")
                shutil.rmtree(leftover)
        staging.mkdir(parents=True)
    except OSError as error:
        raise write_error(error, folder) or error from error
    return staging


def commit(staging: Path, folder: Path | str, model: Mapping[str, Any] | ModelCard | AutoencoderCard) -> Path:
    """The second half of `write`: model.json, everything to the disk, the final name, the marker last."""
    folder = Path(folder)
    card = _card(model)
    try:
        (staging / CARD).write_text(card.to_json(), "utf-8")
        files = sorted(path for path in staging.rglob("*") if path.is_file())
        record = {
            "format": 1,
            "files": {path.relative_to(staging).as_posix(): path.stat().st_size for path in files},
            "sha256": {path.relative_to(staging).as_posix(): _sha256(path) for path in files if path.stat().st_size <= HASHED_UP_TO},
        }
        for path in files:
            path.chmod((staging / CARD).stat().st_mode)  # safetensors creates files that only their owner may read
            _fsync(path)
        for path in {staging, *(path for path in staging.rglob("*") if path.is_dir())}:
            _fsync(path)
        os.rename(staging, folder)
        _fsync(folder.parent)
        marker = folder / f".{MARKER}"
        marker.write_text(json.dumps(record, indent=1) + "\n", "utf-8")
        _fsync(marker)
        os.rename(marker, folder / MARKER)
        _fsync(folder)
    except OSError as error:
        if not staging.exists():
            shutil.rmtree(folder, ignore_errors=True)
        raise write_error(error, folder) or error from error
    return folder


def _card(model: Mapping[str, Any] | ModelCard | AutoencoderCard) -> ModelCard | AutoencoderCard:
    """Passed through the checks of reading, so that nothing is written that cannot be read."""
    if isinstance(model, AutoencoderCard):
        return AutoencoderCard.from_dict(model.to_dict())
    return ModelCard.from_dict(model.to_dict() if isinstance(model, ModelCard) else dict(model))


def staging_folder(folder: Path | str) -> Path:
    return Path(folder).with_name(f".{Path(folder).name}.writing")


def write_error(error: BaseException, folder: Path | str) -> CheckpointWriteError | None:
    """What a failed write means to the user; None if it is no matter of disks. torch and safetensors hide the system's error in a text."""
    if isinstance(error, CheckpointWriteError):
        return error
    if isinstance(error, OSError):
        reason = error.strerror or str(error)
    elif isinstance(error, SafetensorError):
        reason = str(error)
    elif isinstance(error, RuntimeError) and any(sign in str(error) for sign in TORCH_WRITE_ERRORS):
        reason = "the disk took only a part of a file"  # torch does not say why
    else:
        return None
    place = next((path for path in (Path(folder), *Path(folder).parents) if path.is_dir()), Path("/"))
    free = shutil.disk_usage(place).free / 2**30
    return CheckpointWriteError(
        f"could not write the checkpoint {folder}: {reason} ({free:.1f} GiB free there). Earlier checkpoints are untouched"
    )


def require_writable(folder: Path | str, bytes_needed: int = 0) -> None:
    """Create `folder` and prove that a file can be written there and that `bytes_needed` are free; CheckpointError if not."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".writable.{os.getpid()}"
        try:
            with probe.open("wb") as file:
                file.write(b"\0" * 4096)
                file.flush()
                os.fsync(file.fileno())
        finally:
            probe.unlink(missing_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise CheckpointWriteError(f"cannot write to {folder}: a file is where a folder is needed; choose another folder") from error
    except OSError as error:
        raise CheckpointWriteError(
            f"cannot write to {folder}: {error.strerror or error}; free some space or choose another folder"
        ) from error
    free = shutil.disk_usage(folder).free
    if free < bytes_needed:
        raise CheckpointWriteError(
            f"{folder} has {free / 2**30:.2f} GiB free, {bytes_needed / 2**30:.2f} are needed; free some space or choose another folder"
        )


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _looks_unfinished(folder: Path) -> bool:
    return folder.is_dir() and not (folder / MARKER).exists() and ((folder / CARD).exists() or not any(folder.iterdir()))


def check(folder: Path | str) -> None:
    """Raise CheckpointError unless `folder` is a checkpoint that was written to its end and has not changed since."""
    folder = Path(folder)
    if not folder.exists():
        raise CheckpointError(f"there is no checkpoint at {folder}")
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is a file; a checkpoint is a folder with {CARD}, {UNET} and '{MARKER}'")
    if (folder / "model_index.json").exists() or (folder / "unet" / "config.json").exists():
        raise CheckpointError(f"{folder} is a diffusers folder, not a checkpoint: use weights=diffusers:{folder}")
    if (folder / "text2video_pytorch_model.pth").exists():
        raise CheckpointError(f"{folder} is a ModelScope folder, not a checkpoint: use weights=modelscope:{folder}")
    if not (folder / MARKER).is_file():
        if not (folder / CARD).exists() and not (folder / UNET).exists():
            raise CheckpointError(f"{folder} is not a checkpoint: it has neither {CARD} nor '{MARKER}'")
        raise CheckpointError(f"{folder} was not written to its end (no '{MARKER}' in it): use an earlier checkpoint")
    record = _read_marker(folder)
    for name, size in record["files"].items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{folder} lacks {name}: copy the checkpoint again, or use another one")
        if path.stat().st_size != size:
            raise CheckpointError(
                f"{path} has {path.stat().st_size} bytes instead of {size}: copy the checkpoint again, or use another one"
            )
    for name, digest in record["sha256"].items():
        if _sha256(folder / name) != digest:
            raise CheckpointError(f"{folder / name} was changed after the checkpoint was written: copy it again, or use another one")


def _read_marker(folder: Path) -> dict[str, dict[str, Any]]:
    broken = CheckpointError(f"{folder / MARKER} is damaged or not from this version of t2v: copy the checkpoint again, or use another one")
    try:
        record = json.loads((folder / MARKER).read_text("utf-8"))
        files, hashes = record["files"], record["sha256"]
        well_formed = (
            record["format"] == 1
            and all(
                type(size) is int and not {"..", ""} & set(PurePosixPath(name).parts) and name[0] != "/" for name, size in files.items()
            )
            and all(files.get(name, HASHED_UP_TO + 1) <= HASHED_UP_TO for name in hashes)
            and CARD in files
            and any(name.endswith(".safetensors") for name in files)
        )
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as error:
        raise broken from error
    if not well_formed:
        raise broken
    return record


def is_complete(folder: Path | str) -> bool:
    try:
        check(folder)
    except CheckpointError:
        return False
    return True


def _folder_of_steps(run: Path | str) -> Path:
    """A run's `checkpoints` folder, from the run's folder or from itself."""
    run = Path(run)
    return run if run.name == "checkpoints" else run / "checkpoints"


def _by_step(run: Path | str) -> Iterator[Path]:
    """Folders named like checkpoints, newest first, complete or not."""
    try:
        folders = [path for path in _folder_of_steps(run).iterdir() if STEP_FOLDER.fullmatch(path.name) and path.is_dir()]
    except (FileNotFoundError, NotADirectoryError):
        return
    yield from sorted(folders, key=lambda path: int(path.name.removeprefix("step-")), reverse=True)


def latest(run: Path | str) -> Path | None:
    """The newest whole checkpoint of a run (its folder, or the `checkpoints` in it); None if there is none.

    Those cut in the middle of writing are passed over.
    """
    return next((folder for folder in _by_step(run) if is_complete(folder)), None)


def find(path: Path | str) -> Path:
    """A checkpoint from what a user typed: its folder, `package:NAME`, or a run (its newest checkpoint). Raises CheckpointError."""
    path = folder_of(path)
    if _folder_of_steps(path).is_dir():
        newest = latest(path)
        if newest is None:
            raise CheckpointError(f"the run {path} has no complete checkpoint yet")
        return newest
    check(path)
    return path


def remove(folder: Path | str) -> None:
    """Delete a checkpoint, in one step out of sight first: a kill leaves no folder that lost half its files."""
    trash = Path(folder).with_name(f".{Path(folder).name}.deleting")
    shutil.rmtree(trash, ignore_errors=True)
    os.rename(folder, trash)
    shutil.rmtree(trash, ignore_errors=True)


def prune(run: Path | str, keep: int) -> list[Path]:
    """Delete all but the `keep` newest whole checkpoints, and what killed processes left behind; return what was deleted.

    Only the run's own writer may call it, and not while it writes.
    """
    if keep < 1:
        raise ValueError(f"keep is {keep}; at least the newest checkpoint must stay")
    folders = list(_by_step(run))
    whole = [folder for folder in folders if is_complete(folder)]
    doomed = [folder for folder in folders if folder not in whole[:keep]]
    for folder in doomed:
        remove(folder)
    for pattern in (".step-*.deleting", ".step-*.writing"):
        for leftover in _folder_of_steps(run).glob(pattern):
            shutil.rmtree(leftover, ignore_errors=True)
    return doomed
