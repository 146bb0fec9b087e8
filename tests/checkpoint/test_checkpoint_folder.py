import errno
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_model import tiny_card

from t2v import checkpoint
from t2v.checkpoint import CheckpointError, CheckpointWriteError

Parts = dict[str, Callable[[Path], None]]


def parts(value: float = 1.0) -> Parts:
    weights = {"a": torch.full((300,), value)}
    return {
        "unet.safetensors": lambda path: save_file(weights, path),
        "ema.safetensors": lambda path: save_file(weights, path),
        "train/state.pt": lambda path: torch.save({"step": value}, path),
        "data/": lambda path: (path / "rank0.json").write_text("{}") and None,
    }


def test_a_checkpoint_has_all_its_parts(tmp_path: Path) -> None:
    target = checkpoint.step_folder(tmp_path, 7)
    assert checkpoint.write(target, parts(), tiny_card()) == target
    names = {path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file()}
    assert names == {"unet.safetensors", "ema.safetensors", "train/state.pt", "data/rank0.json", "model.json", "complete"}
    assert [path.name for path in target.parent.iterdir()] == ["step-00000007"]  # nothing temporary is left
    checkpoint.check(target)
    assert checkpoint.read_card(target) == tiny_card()
    record = json.loads((target / "complete").read_text())
    assert record["files"]["unet.safetensors"] == (target / "unet.safetensors").stat().st_size
    modes = {path.stat().st_mode & 0o777 for path in target.rglob("*") if path.is_file()}
    (tmp_path / "plain").touch()
    assert modes == {(tmp_path / "plain").stat().st_mode & 0o777}
    assert checkpoint.find(tmp_path) == checkpoint.find(target) == target


def test_an_existing_checkpoint_is_never_overwritten(tmp_path: Path) -> None:
    target = checkpoint.write(tmp_path / "step-1", parts(), tiny_card())
    with pytest.raises(CheckpointError, match="complete checkpoint already"):
        checkpoint.write(target, parts(2.0), tiny_card())
    checkpoint.check(target)
    mine = tmp_path / "thesis"
    mine.mkdir()
    (mine / "chapter.txt").write_text("years of work")
    with pytest.raises(CheckpointError, match="is not a checkpoint"):
        checkpoint.write(mine, parts(), tiny_card())
    assert (mine / "chapter.txt").read_text() == "years of work"


def test_latest_skips_what_is_not_whole(tmp_path: Path) -> None:
    assert checkpoint.latest(tmp_path) is None
    for step in (5, 10, 20, 100):
        checkpoint.write(checkpoint.step_folder(tmp_path, step), parts(), tiny_card(step=step))
    names = lambda found: found and found.name  # noqa: E731
    assert names(checkpoint.latest(tmp_path)) == "step-00000100"
    assert names(checkpoint.latest(tmp_path / "checkpoints")) == "step-00000100"
    (checkpoint.step_folder(tmp_path, 100) / "complete").unlink()
    assert names(checkpoint.latest(tmp_path)) == "step-00000020"
    os.truncate(checkpoint.step_folder(tmp_path, 20) / "train/state.pt", 100)
    assert names(checkpoint.latest(tmp_path)) == "step-00000010"
    shutil.rmtree(checkpoint.step_folder(tmp_path, 10) / "data")
    assert names(checkpoint.latest(tmp_path)) == "step-00000005"
    (checkpoint.step_folder(tmp_path, 5) / "model.json").write_text("{}")
    assert checkpoint.latest(tmp_path) is None
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        checkpoint.find(tmp_path)
    checkpoint.write(checkpoint.step_folder(tmp_path, 100), parts(), tiny_card(step=100))  # over the unfinished one
    assert names(checkpoint.latest(tmp_path)) == "step-00000100"


def test_prune_keeps_the_newest_whole_ones(tmp_path: Path) -> None:
    for step in (1, 2, 3, 9, 10):
        checkpoint.write(checkpoint.step_folder(tmp_path, step), parts(), tiny_card(step=step))
    (checkpoint.step_folder(tmp_path, 9) / "complete").unlink()
    (tmp_path / "checkpoints" / ".step-00000011.writing").mkdir()
    (tmp_path / "checkpoints" / "notes").mkdir()
    deleted = checkpoint.prune(tmp_path, keep=2)
    assert sorted(path.name for path in deleted) == ["step-00000001", "step-00000002", "step-00000009"]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["notes", "step-00000003", "step-00000010"]
    assert checkpoint.prune(tmp_path, keep=2) == []
    with pytest.raises(ValueError, match="at least the newest"):
        checkpoint.prune(tmp_path, keep=0)


def damage_marker(path: Path, change: Callable[[dict], None]) -> None:
    record = json.loads((path / "complete").read_text())
    change(record)
    (path / "complete").write_text(json.dumps(record))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: (path / "complete").unlink(), "not written to its end"),
        (lambda path: os.truncate(path / "unet.safetensors", 100), "unet.safetensors has 100 bytes instead of 12"),
        (lambda path: (path / "ema.safetensors").unlink(), "lacks ema.safetensors"),
        (lambda path: (path / "model.json").write_text((path / "model.json").read_text().replace('"step": 7', '"step": 8')), "was changed"),
        (lambda path: (path / "complete").write_bytes(b"\x80\x04."), "is damaged"),
        (lambda path: (path / "complete").write_text('{"files": 3}'), "is damaged"),
        (lambda path: (path / "complete").write_text("[" * 100_000), "is damaged"),
        (lambda path: damage_marker(path, lambda record: record["files"].update({"../../secret": 3})), "is damaged"),
        (lambda path: damage_marker(path, lambda record: record["files"].update({"/etc/passwd": 3})), "is damaged"),
        (lambda path: damage_marker(path, lambda record: record["sha256"].update({"/etc/passwd": "0"})), "is damaged"),
        (lambda path: damage_marker(path, lambda record: record["files"].pop("unet.safetensors")), "is damaged"),
        (lambda path: shutil.rmtree(path), "there is no checkpoint at"),
        (lambda path: [shutil.rmtree(path), path.write_bytes(b"x")], "is a file"),
        (lambda path: [shutil.rmtree(path), path.mkdir()], "is not a checkpoint"),
        (lambda path: [shutil.rmtree(path), path.mkdir(), (path / "model_index.json").touch()], "use weights=diffusers:"),
        (lambda path: [shutil.rmtree(path), path.mkdir(), (path / "text2video_pytorch_model.pth").touch()], "use weights=modelscope:"),
    ],
)
def test_each_damage_has_its_line(tmp_path: Path, damage: Callable[[Path], object], message: str) -> None:
    target = checkpoint.write(tmp_path / "step-7", parts(), tiny_card())
    damage(target)
    with pytest.raises(CheckpointError, match=re.escape(message)) as caught:
        checkpoint.check(target)
    assert "\n" not in str(caught.value)
    assert str(target) in str(caught.value)
    assert not checkpoint.is_complete(target)


def full_disk(path: Path) -> None:
    path.write_bytes(b"half of it")
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    old = checkpoint.write(checkpoint.step_folder(tmp_path, 1), parts(), tiny_card())
    with pytest.raises(CheckpointWriteError, match=r"No space left on device.*Earlier checkpoints are untouched") as caught:
        checkpoint.write(checkpoint.step_folder(tmp_path, 2), {**parts(), "train/state.pt": full_disk}, tiny_card())
    assert isinstance(caught.value, OSError)
    assert isinstance(caught.value, ValueError)
    assert "\n" not in str(caught.value)
    assert [path.name for path in old.parent.iterdir()] == ["step-00000001"]
    assert checkpoint.latest(tmp_path) == old


@pytest.mark.parametrize("library", ["safetensors", "torch"])
def test_the_libraries_own_write_errors_are_understood(tmp_path: Path, library: str) -> None:
    """A limit on the size of files makes the kernel refuse, in the middle of a write, as a full disk does."""

    def work() -> None:
        import resource

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        big = torch.zeros(100_000)
        save = {"safetensors": lambda path: save_file({"a": big}, path), "torch": lambda path: torch.save(big, path)}[library]
        try:
            checkpoint.write(tmp_path / "step-2", {**parts(), "big": save}, tiny_card())
        except CheckpointWriteError as error:
            (tmp_path / "error").write_text(str(error))

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join(60)
    assert process.exitcode == 0
    assert "could not write the checkpoint" in (tmp_path / "error").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["error"]


def test_a_failed_marker_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename = os.rename

    def failing(source: Path, target: Path) -> None:
        if Path(target).name == "complete":
            raise OSError(errno.EDQUOT, "Disk quota exceeded")
        rename(source, target)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(CheckpointWriteError, match="quota"):
        checkpoint.write(tmp_path / "step-1", parts(), tiny_card())
    assert list(tmp_path.iterdir()) == []


def test_other_errors_pass_through_and_clean_up(tmp_path: Path) -> None:
    def bug(path: Path) -> None:
        raise KeyError("a bug")

    with pytest.raises(KeyError):
        checkpoint.write(tmp_path / "step-1", {**parts(), "x": bug}, tiny_card())
    with pytest.raises(ValueError, match="step is -1"):
        checkpoint.write(tmp_path / "step-1", parts(), tiny_card(step=-1))
    assert list(tmp_path.iterdir()) == []


def test_no_permission_is_one_line(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir()
    closed.chmod(0o500)
    (tmp_path / "file").touch()
    places = [tmp_path / "file" / "step-1"] + ([closed / "step-1"] if os.getuid() else [Path("/proc/step-1")])
    for place in places:
        with pytest.raises(CheckpointWriteError, match="could not write the checkpoint"):
            checkpoint.write(place, parts(), tiny_card())
        with pytest.raises(CheckpointWriteError, match="cannot write to"):
            checkpoint.require_writable(place)
    checkpoint.require_writable(tmp_path / "new" / "folder", bytes_needed=1000)
    assert list((tmp_path / "new" / "folder").iterdir()) == []
    with pytest.raises(CheckpointWriteError, match="are needed"):
        checkpoint.require_writable(tmp_path / "new", bytes_needed=1 << 60)


def test_a_kill_at_any_moment_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    """SIGKILL before each system call that matters in turn; then a new process writes the same step again."""
    first = checkpoint.write(checkpoint.step_folder(tmp_path, 1), parts(1.0), tiny_card(step=1))
    calls = ("fsync", "rename", "mkdir", "open", "rmdir", "unlink", "write")

    def write_second(kill_at: int) -> None:
        seen = 0
        for name in calls:
            original = getattr(os, name)

            def counted(*args, _original=original, **kwargs):  # type: ignore[no-untyped-def]
                nonlocal seen
                seen += 1
                if seen == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)
                return _original(*args, **kwargs)

            setattr(os, name, counted)
        checkpoint.write(checkpoint.step_folder(tmp_path, 2), parts(2.0), tiny_card(step=2))
        checkpoint.prune(tmp_path, keep=1)

    outcomes = []
    for kill_at in range(1, 100):
        process = multiprocessing.get_context("fork").Process(target=write_second, args=(kill_at,))
        process.start()
        process.join(60)
        newest = checkpoint.latest(tmp_path)
        assert newest is not None, f"killed at call {kill_at}: nothing is left"
        checkpoint.check(newest)
        outcomes.append((process.exitcode, newest.name))
        if process.exitcode == 0:
            break
        if newest != first:  # it was killed after the marker: start over from the first
            shutil.rmtree(newest)
            if not checkpoint.is_complete(first):
                checkpoint.write(first, parts(1.0), tiny_card(step=1))
    assert outcomes[-1] == (0, "step-00000002")
    killed = [name for code, name in outcomes if code == -signal.SIGKILL]
    assert len(killed) == len(outcomes) - 1 >= 12
    assert {"step-00000001", "step-00000002"} == set(killed)
    assert [path.name for path in first.parent.iterdir()] == ["step-00000002"]


def test_a_kill_while_a_part_is_written(tmp_path: Path) -> None:
    first = checkpoint.write(checkpoint.step_folder(tmp_path, 1), parts(), tiny_card(step=1))

    def die(path: Path) -> None:
        path.write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)

    def work() -> None:
        checkpoint.write(checkpoint.step_folder(tmp_path, 2), {**parts(), "train/state.pt": die}, tiny_card(step=2))

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert checkpoint.latest(tmp_path) == first
    assert (first.parent / ".step-00000002.writing").exists()
    checkpoint.prune(tmp_path, keep=1)
    assert [path.name for path in first.parent.iterdir()] == ["step-00000001"]


def test_several_ranks_write_one_checkpoint(tmp_path: Path) -> None:
    target = checkpoint.step_folder(tmp_path, 3)
    staging = checkpoint.begin(target)
    assert staging == checkpoint.staging_folder(target)
    for name, write in parts().items():
        (staging / name).parent.mkdir(exist_ok=True)
        if name.endswith("/"):
            (staging / name).mkdir()
        write(staging / name)
    assert checkpoint.latest(tmp_path) is None
    checkpoint.commit(staging, target, tiny_card(step=3).to_dict())
    assert checkpoint.latest(tmp_path) == target


def test_no_network_is_imported_to_find_checkpoints() -> None:
    code = "import sys, t2v.checkpoint; print([name for name in sys.modules if name.startswith(('t2v.models', 'diffusers', 'open_clip'))])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
