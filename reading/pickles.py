"""Pickled numpy arrays, read without running code."""

from __future__ import annotations

import pickle
import struct
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, Literal

import numpy as np

from reading import plain
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


class _ArraysOnly(pickle._Unpickler):
    """Builds numpy arrays of numbers in plain containers; refuses all that could run code.

    It is the unpickler in Python: the one in C makes room for whatever place in its memo a damaged
    file names. Of the few objects in our files, none takes longer.
    """

    dispatch: ClassVar = dict(pickle._Unpickler.dispatch)

    def __init__(self, file: BinaryIO, size: int) -> None:
        super().__init__(file)
        self.size = size

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in STAND_INS:
            raise pickle.UnpicklingError(f"{module}.{name} is not a numpy array")
        return STAND_INS[module, name]

    def load_bytearray8(self) -> None:
        (length,) = struct.unpack("<Q", self.read(8))  # type: ignore[attr-defined]
        if length > self.size:
            raise pickle.UnpicklingError(f"{length} bytes are named, the file has {self.size}")
        self.append(bytearray(self.read(length)))  # type: ignore[attr-defined]

    dispatch[pickle.BYTEARRAY8[0]] = load_bytearray8  # type: ignore[assignment]


def _plain(content: Any, known: dict[int, Any] | None = None) -> Any:
    """Arrays in place of their stand-ins, also inside of dicts, lists and tuples.

    ``known`` is what was made of a container that occurs again: doubled lists of doubled lists
    would take for ever.
    """
    known = {} if known is None else known
    if isinstance(content, _Array):
        return content.array
    if not isinstance(content, (dict, list, tuple)):
        return content
    if id(content) not in known:
        if isinstance(content, dict):
            made: Any = {key: _plain(value, known) for key, value in content.items()}
        else:
            made = type(content)(_plain(value, known) for value in content)
        known[id(content)] = made
    return known[id(content)]


def read_pickle(path: Path) -> Any:
    """What a .pickle file holds, if that is numpy arrays in plain containers; else StageError."""
    try:
        with path.open("rb") as file:
            return _plain(_ArraysOnly(file, path.stat().st_size).load())
    except Exception as error:  # damaged bytes can raise nearly anything
        if plain.of_disk(error):
            raise
        raise StageError(
            f"{path} is not a pickled numpy array ({error!r:.200}).",
            "Do not open it with other tools unless you trust it.",
        ) from error
