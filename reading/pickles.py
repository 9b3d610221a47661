"""Pickled numpy arrays, read without running code."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any, Literal

import numpy as np

from utils import StageError


class _Dtype:
    """Stands in for numpy.dtype, for numbers only: flags set in the real one could crash Python."""

    def __init__(self, code: str, *_: Any) -> None:
        self.dtype = np.dtype(str(code))
        if self.dtype.kind not in "biuf":
            raise pickle.UnpicklingError(f"arrays of {self.dtype} are not read")

    def __setstate__(self, state: tuple) -> None:
        self.dtype = self.dtype.newbyteorder(state[1])


class _Array:
    """Stands in for numpy's _reconstruct; its state is (version, shape, dtype, Fortran?, bytes)."""

    def __init__(self, *_: Any) -> None:
        self.array = np.empty(0)

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, is_fortran, content = state
        self.array = _from_bytes(content, dtype, shape, "F" if is_fortran else "C")


def _from_bytes(
    content: bytes, dtype: _Dtype, shape: tuple, order: Literal["C", "F"], axes: tuple | None = None
) -> np.ndarray:
    """``axes`` of a transposed array, which numpy 2.4 and later pickle as they lie in memory."""
    array = np.frombuffer(content, dtype.dtype)
    if axes is not None:
        return array.reshape(shape).transpose(axes).copy(order="K")
    return array.reshape(shape, order=order).copy(order=order)[()]


STAND_INS: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): None,  # only ever an argument of _reconstruct
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): lambda text, _: text.encode("latin-1"),  # bytes in protocol 2
}
for _core in ("numpy.core", "numpy._core"):
    STAND_INS[f"{_core}.multiarray", "_reconstruct"] = _Array
    STAND_INS[f"{_core}.multiarray", "scalar"] = lambda dtype, raw: _from_bytes(raw, dtype, (), "C")
    STAND_INS[f"{_core}.numeric", "_frombuffer"] = _from_bytes


class _ArraysOnly(pickle.Unpickler):
    """Builds numpy arrays of numbers in plain containers; refuses all that could run code."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in STAND_INS:
            raise pickle.UnpicklingError(f"{module}.{name} is not a numpy array")
        return STAND_INS[module, name]


def _plain(content: Any) -> Any:
    """Arrays in place of their stand-ins, also inside of dicts, lists and tuples."""
    if isinstance(content, _Array):
        return content.array
    if isinstance(content, dict):
        return {key: _plain(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return type(content)(map(_plain, content))
    return content


def read_pickle(path: Path) -> Any:
    """What a .pickle file holds, if that is numpy arrays in plain containers; else StageError."""
    try:
        with path.open("rb") as file:
            return _plain(_ArraysOnly(file).load())
    except Exception as error:  # damaged bytes can raise nearly anything
        raise StageError(
            f"{path} is not a pickled numpy array ({error!r:.200}).",
            "Do not open it with other tools unless you trust it.",
        ) from error
