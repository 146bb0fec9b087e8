"""CRC-32C (Castagnoli), by which TensorFlow's checkpoints name the content of each tensor."""

from __future__ import annotations

import numpy as np

WIDTH = 4096  # bytes of one strip


def crc32c(data: bytes) -> int:
    """Bytes are taken as many equal strips in parallel, whose sums are then joined: one table lookup per column, not per byte."""
    width = WIDTH
    strips = len(data) // width
    if strips < 2:
        return _serial(data, 0xFFFFFFFF) ^ 0xFFFFFFFF
    body = np.frombuffer(data, np.uint8, strips * width).reshape(strips, width)
    registers = np.zeros(strips, np.uint32)
    registers[0] = 0xFFFFFFFF
    for column in range(width):
        registers = _TABLE[(registers ^ body[:, column]) & 0xFF] ^ (registers >> np.uint32(8))
    joined = registers[0]
    for register in registers[1:]:
        joined = _advance(joined) ^ register
    return _serial(data[strips * width :], int(joined)) ^ 0xFFFFFFFF


def _crc_table() -> np.ndarray:
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = np.where(table & 1, (table >> np.uint32(1)) ^ np.uint32(0x82F63B78), table >> np.uint32(1)).astype(np.uint32)
    return table


_TABLE = _crc_table()


def _serial(data: bytes, register: int) -> int:
    for byte in data:
        register = int(_TABLE[(register ^ byte) & 0xFF]) ^ (register >> 8)
    return register


def _advance_tables() -> np.ndarray:
    """The register after WIDTH zero bytes is linear in the register: one table per byte of it."""
    columns = np.array([1 << bit for bit in range(32)], np.uint32)
    for _ in range(WIDTH):
        columns = _TABLE[columns & 0xFF] ^ (columns >> np.uint32(8))
    values = np.arange(256)
    tables = np.zeros((4, 256), np.uint32)
    for byte in range(4):
        for bit in range(8):
            tables[byte] ^= np.where(values >> bit & 1, columns[8 * byte + bit], 0).astype(np.uint32)
    return tables


_ADVANCE = _advance_tables()


def _advance(register: np.uint32) -> np.uint32:
    r = int(register)
    return _ADVANCE[0, r & 255] ^ _ADVANCE[1, r >> 8 & 255] ^ _ADVANCE[2, r >> 16 & 255] ^ _ADVANCE[3, r >> 24]
