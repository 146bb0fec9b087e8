"""The files that t2v.repack packs, and where their captions lie."""

from __future__ import annotations

import json
import logging
import lzma
import os
import zipfile
import zlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from t2v.data.errors import BadSample, ShardError
from t2v.data.folder import caption_of, file_of, read_table
from t2v.data.laion import IMAGES
from t2v.data.raw import RawSample
from t2v.data.shards import LocalTar
from t2v.data.webvid import VIDEOS

LOG = logging.getLogger(__name__)
MEDIA = (*VIDEOS, *IMAGES)
BROKEN_ZIP = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, RuntimeError)
"""What zipfile raises on damaged members, on encrypted ones (RuntimeError) and on those packed in ways that it does not know
(NotImplementedError, which is one)."""


@dataclass(frozen=True)
class Entry:
    """One file: `place` is a path, a member of a zip (zip, member), or a sample of a tar (tar, number). Behind the last sample of a damaged
    tar stands an entry that says so when it is read."""

    name: str
    place: Path | tuple[Path, str] | tuple[Path, int]
    fields: dict[str, Any]

    def read(self) -> RawSample:
        """Media, txt and json. Raises BadSample, ShardError."""
        if isinstance(self.place, Path):
            data = self.place.read_bytes()
        elif isinstance(self.place[1], int):
            tar = _tar(str(self.place[0]))
            if isinstance(tar, ShardError):
                raise BadSample("shard_error", str(tar))
            if self.place[1] == len(tar) and tar.error is not None:
                raise BadSample("shard_error", str(tar.error))
            return tar.read(self.place[1])
        else:
            try:
                data = _zip(str(self.place[0]), os.getpid()).read(self.place[1])
            except BROKEN_ZIP as error:
                raise BadSample("zip_damaged", str(error)) from error
        suffix = self.name.rpartition(".")[2].lower()
        return RawSample(self.name, {suffix: data, "txt": caption_of(self.fields).encode(), "json": json.dumps(self.fields).encode()})


def find(source: Path, captions: Path | None = None) -> list[Entry]:
    """The files of `source` that have captions, in a fixed order. Raises ValueError where there are none, or a name is ambiguous."""
    if not source.is_dir():
        raise ValueError(f"source={source} is not a folder")
    tars = sorted(source.glob("*.tar"))
    if tars and captions is None:
        if beside := next((path for path in sorted(source.rglob("*")) if path.suffix[1:].lower() in (*MEDIA, "zip")), None):
            LOG.warning("%s holds tars, which are packed, and other files, such as %s, which are not: move them apart", source, beside.name)
        return [entry for tar in tars for entry in _samples(tar)]
    files = _files(source)
    if captions is None:
        entries = [Entry(name, place, fields) for name, place in files.items() if (fields := _beside(place))]
        if not entries:
            raise ValueError(
                f"{source}: {len(files)} media files, but no captions: give captions=FILE (csv, jsonl, json) or a .txt beside each"
            )
        if alone := files.keys() - {entry.name for entry in entries}:
            LOG.warning("%d of the %d files in %s have no caption beside them, such as %s", len(alone), len(files), source, min(alone))
        return entries
    rows, column = read_table(str(captions))
    by_short_name: dict[str, list[str]] = {}
    for name in files:
        for short in {name.rpartition("/")[2], name.rpartition("/")[2].rpartition(".")[0]}:
            by_short_name.setdefault(short, []).append(name)
    entries, absent, top = [], [], os.path.abspath(source)
    for row in rows:
        wanted = file_of(row, column)
        near = by_short_name.get(wanted.rpartition("/")[2], [])
        names = [wanted] if wanted in files else [name for name in near if _ends(f"{top}/{name}", wanted)]
        if len(names) > 1:
            raise ValueError(f"{captions}: {wanted!r} may be {names[0]} or {names[1]}: give paths relative to {source}")
        if names:
            entries.append(Entry(names[0], files[names[0]], row | {"file": names[0]}))
        else:
            absent.append(wanted or "a row without one")
    if not entries:
        raise ValueError(
            f"none of the {len(rows)} files that {captions} names (e.g. {absent[0] if absent else ''}) is in {source}: "
            "give paths relative to it"
        )
    if absent:  # of a large table often only some archives are there
        LOG.warning("%d of the %d files that %s names are not in %s, such as %s", len(absent), len(rows), captions, source, absent[0])
    return entries


def _samples(path: Path) -> list[Entry]:
    tar = _tar(str(path))
    count = 1 if isinstance(tar, ShardError) else len(tar) + (tar.error is not None)
    return [Entry(f"{path.name}#{k}", (path, k), {}) for k in range(count)]


def _ends(path: str, wanted: str) -> bool:
    """Whether a table may mean a file by its last folders, with or without its suffix. A file of another folder is never meant."""
    end = "/" + wanted.removeprefix("./").lstrip("/")
    return path.endswith(end) or path.rpartition(".")[0].endswith(end)


def _files(source: Path) -> dict[str, Path | tuple[Path, str] | tuple[Path, int]]:
    """Media files by their path below `source`; those in zips as if each had been unpacked into a folder of its name beside it.
    Raises ValueError where a name is that of two files."""
    found: dict[str, Path | tuple[Path, str] | tuple[Path, int]] = {}
    for path in sorted(source.rglob("*")):
        if path.suffix[1:].lower() in MEDIA:
            found[path.relative_to(source).as_posix()] = path
        elif path.suffix.lower() == ".zip":
            try:
                names = _zip(str(path), os.getpid()).namelist()
            except (*BROKEN_ZIP, OSError) as error:
                raise ValueError(f"{path}: not a readable zip: {error}") from error
            folder = path.relative_to(source).with_suffix("").as_posix()
            packed = {f"{folder}/{name}": (path, name) for name in sorted(names) if name.rpartition(".")[2].lower() in MEDIA}
            if twice := packed.keys() & found.keys():
                raise ValueError(f"{source} holds {min(twice)} twice, in {path} and beside it: move one of them away")
            found |= packed
    return found


def _beside(place: Path | tuple[Path, str] | tuple[Path, int]) -> dict[str, Any]:
    """The caption in a .txt or .json of the same name."""
    if not isinstance(place, Path):
        return {}
    text, fields = place.with_suffix(".txt"), place.with_suffix(".json")
    found: dict[str, Any] = {}
    if fields.exists():
        try:
            found = json.loads(fields.read_text("utf-8", "replace"))
        except ValueError as error:
            raise ValueError(f"{fields}: not json: {error}") from error
    if text.exists():
        found["caption"] = text.read_text("utf-8", "replace")
    return found | {"file": place.name} if found else {}


@lru_cache(maxsize=16)
def _zip(path: str, process: int) -> zipfile.ZipFile:
    """Opened by each process for itself: those that a fork hands on share their position, so that processes read in each other's places."""
    return zipfile.ZipFile(path)


@lru_cache(maxsize=16)
def _tar(path: str) -> LocalTar | ShardError:
    """The tar, or why it cannot be read at all."""
    try:
        return LocalTar(path)
    except ShardError as error:
        return error
