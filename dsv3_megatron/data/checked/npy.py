"""Arrays in .npy files of others: what a header claims is compared with the file before memory is asked for."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from dsv3_megatron.run.handed import open_regular


def open_npy(path: Path, dtype: np.dtype, rows: int, *, mapped: bool = False) -> np.ndarray:
    """Return the array [rows] of a .npy file.

    Args:
        mapped: into memory, instead of read.
    Raises: OSError: it cannot be read. ValueError: it holds anything else.
    """
    with open_regular(path) as file:
        try:
            version = np.lib.format.read_magic(file)
            read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
            shape, is_fortran, found = read(file)
        except Exception as error:  # of many kinds, as NumPy evaluates a header as Python's literals
            said = f"{error}".strip().split("\n")[0]
            raise ValueError(f"is no array of NumPy's, or is damaged: {said[:80] or type(error).__name__}") from None
        if found != dtype or len(shape) != 1 or (is_fortran and rows > 1):
            raise ValueError(f"holds {str(found)[:60]} of shape {str(shape)[:60]}, not a row of {str(dtype)[:60]}")
        begins = file.tell()
        size, expected = os.fstat(file.fileno()).st_size, begins + rows * dtype.itemsize
        if shape != (rows,) or size != expected:
            raise ValueError(f"has {shape[0]} rows in {size:,} bytes, and {rows} rows are {expected:,} bytes")
        if mapped and rows:
            return np.memmap(file, dtype, "r", begins, (rows,))
        return np.frombuffer(bytearray(file.read(rows * dtype.itemsize)), dtype)
