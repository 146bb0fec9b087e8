"""Tensors that several processes write together into one safetensors file, each its own rows, straight to their place.

A file written by one process, by two or by eighty is the same file, byte for byte: it loads on any number of processes, in any strategy,
and needs no gathering before it is written and no merging afterwards. Nothing in it is pickled.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

TYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class Piece:
    """Rows `first`, `first` + 1, ... of a tensor of `shape`; all of it where `shape` is the rows' own."""

    rows: Tensor
    shape: tuple[int, ...]
    first: int = 0

    @staticmethod
    def whole(tensor: Tensor) -> Piece:
        return Piece(tensor, tuple(tensor.shape))


def reserve(path: Path, pieces: Mapping[str, Piece]) -> None:
    """Write the header of the file and give it its full size. One process does it, before any calls `write_pieces`."""
    header, _ = _header(pieces)
    with path.open("wb") as file:
        file.write(header)
        file.truncate(len(header) + sum(_size(piece) for piece in pieces.values()))


def write_pieces(path: Path, pieces: Mapping[str, Piece]) -> int:
    """Write this process's rows and bring them to the disk; return their bytes. Names and shapes must be the same in every process."""
    header, begins = _header(pieces)
    written = 0
    descriptor = os.open(path, os.O_WRONLY)
    try:
        for name, piece in pieces.items():
            data = memoryview(piece.rows.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
            position = len(header) + begins[name] + piece.first * _size(piece) // max(1, piece.shape[0] if piece.shape else 1)
            done = 0
            while done < len(data):
                done += os.pwrite(descriptor, data[done:], position + done)
            written += len(data)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return written


def _size(piece: Piece) -> int:
    return math.prod(piece.shape) * piece.rows.element_size()


def _header(pieces: Mapping[str, Piece]) -> tuple[bytes, dict[str, int]]:
    """What precedes the tensors (the header's length, the header as JSON), and where each of them begins after it."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    begins, end = {}, 0
    for name, piece in pieces.items():
        begins[name], end = end, end + _size(piece)
        entries[name] = {"dtype": TYPES[piece.rows.dtype], "shape": list(piece.shape), "data_offsets": [begins[name], end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, begins
