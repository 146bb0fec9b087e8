"""A plain folder of videos or images with a csv or jsonl of captions, read as it is: rows of the table are samples, runs of rows shards.

For more than some ten thousand files `python -m t2v.repack` makes tars, which disks read far faster.
"""

from __future__ import annotations

import csv
import json
import os
from functools import lru_cache
from typing import Any

from t2v.data.errors import ShardError, refuse_full_process
from t2v.data.raw import RawSample

ROWS = 256  # at most, per pretended shard
FILE_COLUMNS = ("file", "path", "file_name", "filename", "video", "image", "video_path", "vid", "video_id", "videoid", "id")
TEXT_COLUMNS = ("caption", "text", "title", "name", "sentence")


def table_shards(path: str) -> list[str]:
    """`path#begin:end` for the rows of a table. Raises ValueError where it is unreadable or names no files."""
    rows, _ = read_table(path)
    if not rows:
        raise ValueError(f"{path}: it has no rows")
    shards = -(-len(rows) // ROWS)
    ends = [len(rows) * (k + 1) // shards for k in range(shards)]  # of equal size, so that readers stay in step
    return [f"{path}#{begin}:{end}" for begin, end in zip([0, *ends], ends)]


@lru_cache(maxsize=4)
def read_table(path: str) -> tuple[list[dict[str, Any]], str]:
    """The rows of a .csv (with a header), .jsonl or .json (a list of objects, or file -> caption), and the column that names the files."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            if path.endswith(".csv"):
                rows = [_whole(row) for row in csv.DictReader(file)]
            elif path.endswith(".jsonl"):
                rows = [json.loads(line) for line in file if line.strip()]
            else:
                content = json.load(file)
                rows = [{"file": name, "caption": text} for name, text in content.items()] if isinstance(content, dict) else content
        if not all(isinstance(row, dict) for row in rows):
            raise ValueError("its rows are not objects")
    except (OSError, ValueError, csv.Error) as error:
        refuse_full_process(error)
        raise ValueError(f"{path}: unreadable: {error}") from error
    columns = list(rows[0]) if rows else []
    column = next((name for name in FILE_COLUMNS if name in columns), None)
    if rows and column is None:
        raise ValueError(f"{path}: no column names the files: expected one of {', '.join(FILE_COLUMNS)}, found {', '.join(columns)}")
    return rows, column or ""


def _whole(row: dict[Any, Any]) -> dict[str, Any]:
    """A row of a csv. Raises ValueError where it has more values than columns: a caption would be cut at its first comma."""
    if any(row.pop(None, ())):
        raise ValueError(f"the row of {next(iter(row.values()))} has more values than columns: put captions that hold commas in quotes")
    return row


def caption_of(row: dict[str, Any]) -> str:
    text = next((row[column] for column in TEXT_COLUMNS if row.get(column)), "")
    return text if isinstance(text, str) else ""


def file_of(row: dict[str, Any], column: str) -> str:
    """The file that a row names; nothing where it has no such column."""
    name = row.get(column)
    return "" if name is None else str(name)


class FolderRows:
    """Rows begin, ..., end - 1 of a table, as a shard. A file that is missing or cannot be read is a sample without media."""

    error: ShardError | None = None

    def __init__(self, url: str) -> None:
        self.path, _, span = url.rpartition("#")
        begin, _, end = span.partition(":")
        try:
            rows, self.column = read_table(self.path)
        except ValueError as error:
            raise ShardError(str(error)) from error
        self.begin = int(begin)
        self.rows = rows[self.begin : int(end)]

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, index: int) -> RawSample:
        row = self.rows[index]
        name = file_of(row, self.column)
        key, suffix = os.path.splitext(name or f"row {self.begin + index}")
        members = {"json": json.dumps(row).encode()}
        text = caption_of(row)
        if text:
            members["txt"] = text.encode()
        try:
            with open(os.path.join(os.path.dirname(self.path), name), "rb") as file:
                members[suffix[1:].lower()] = file.read()
        except (OSError, ValueError) as error:  # a folder, a name with a zero byte: one row is no reason to leave out the others
            refuse_full_process(error)  # else it is counted as missing_member
        return RawSample(key, members)
