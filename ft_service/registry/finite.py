"""Whether the tensors of a safetensors file are finite, from their bits: without torch, and a part at a time."""

import json
from pathlib import Path
from typing import Any

import numpy as np

_EXPONENTS = {
    "F64": (np.uint64, 0x7FF0_0000_0000_0000),
    "F32": (np.uint32, 0x7F80_0000),
    "BF16": (np.uint16, 0x7F80),
    "F16": (np.uint16, 0x7C00),
}
"""Bits of the exponent of each type. All of them are set in NaN and infinity, and in no other number."""
_PART_BYTES = 64 * 1024 * 1024


def nonfinite_tensor(file: Path) -> str | None:
    """Name of the first tensor with NaN or infinity; None if all are finite. A file of another format has none."""
    data_start, entries = _header(file)
    with file.open("rb") as stream:
        for name, entry in entries.items():
            if entry["dtype"] not in _EXPONENTS:
                continue  # integers and 8-bit numbers
            kind, exponent = _EXPONENTS[entry["dtype"]]
            begin, end = entry["data_offsets"]
            stream.seek(data_start + begin)
            for start in range(begin, end, _PART_BYTES):
                bits = np.frombuffer(stream.read(min(_PART_BYTES, end - start)), kind)
                if ((bits & kind(exponent)) == kind(exponent)).any():
                    return str(name)
    return None


def _header(file: Path) -> tuple[int, dict[str, Any]]:
    """Where the data begins, and the entry of each tensor."""
    size_of_file = file.stat().st_size
    with file.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        if not 2 <= size <= size_of_file - 8:
            return 0, {}
        try:
            header = json.loads(stream.read(size))
            entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
            is_whole = all(8 + size + entry["data_offsets"][1] <= size_of_file for entry in entries.values())
        except (ValueError, AttributeError, KeyError, TypeError):
            return 0, {}
    return 8 + size, entries if is_whole else {}
