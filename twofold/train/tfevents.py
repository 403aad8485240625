"""TensorBoard's event files, written by hand: TFRecord framing around three small protobuf messages.

record   length u64 | masked crc32c(length) u32 | Event | masked crc32c(Event) u32, all little-endian
Event    1 wall_time double · 2 step varint · 3 file_version string · 5 Summary
Summary  1 Value (repeated)
Value    1 tag string · 2 simple_value float
"""

from __future__ import annotations

import struct
from collections.abc import Mapping

_POLYNOMIAL = 0x82F63B78
_CRC_TABLE: list[int] = []


def crc32c(data: bytes) -> int:
    """The Castagnoli checksum (RFC 3720, appendix B.4) that TFRecord uses."""
    if not _CRC_TABLE:
        for byte in range(256):
            value = byte
            for _ in range(8):
                value = (value >> 1) ^ (_POLYNOMIAL if value & 1 else 0)
            _CRC_TABLE.append(value)
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _CRC_TABLE[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    return crc ^ 0xFFFFFFFF


def record(event: bytes) -> bytes:
    """One framed record."""
    length = struct.pack("<Q", len(event))
    return length + struct.pack("<I", _masked(length)) + event + struct.pack("<I", _masked(event))


def version_event(wall_time: float) -> bytes:
    """The first event of every file."""
    return struct.pack("<Bd", 0x09, wall_time) + _bytes(3, b"brain.Event:2")


def scalar_event(wall_time: float, step: int, values: Mapping[str, float]) -> bytes:
    """One step's numbers by tag."""
    summary = b"".join(
        _bytes(1, _bytes(1, tag.encode()) + struct.pack("<Bf", 0x15, value)) for tag, value in values.items()
    )
    return struct.pack("<Bd", 0x09, wall_time) + b"\x10" + _varint(step) + _bytes(5, summary)


def _masked(data: bytes) -> int:
    crc = crc32c(data)
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _bytes(field: int, data: bytes) -> bytes:
    return bytes([field << 3 | 2]) + _varint(len(data)) + data
