"""Arrays in .npy files: memory-mapped, never unpickled."""

from __future__ import annotations

import errno
import math
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from reading import plain
from utils import Artifact, Stage

BLOCK_BYTES = 2**23  # of a memory map read at a time: more than that leaves the processor's cache


def read_array(
    stage: Stage,
    artifact: Artifact,
    dtype: type,
    shape: tuple[int | None, ...],
    finite: bool = True,
) -> np.ndarray:
    """Memory-map an .npy of the given dtype and shape (None is any length); unpickles nothing."""
    path = stage.path(artifact)
    try:
        array = mapped(path)
    except Exception as error:  # a damaged header can raise nearly anything
        if plain.of_disk(error):
            raise
        raise stage.error(path, f"is not a whole .npy array ({error!r:.200}).") from error
    wanted = "(" + ", ".join("any" if n is None else str(n) for n in shape) + ")"
    fits = array.ndim == len(shape) and all(
        n in (None, m) for n, m in zip(shape, array.shape, strict=True)
    )
    if array.dtype != dtype or not fits or array.size == 0:
        raise stage.error(
            path,
            f"is {array.dtype} {array.shape}; expected {np.dtype(dtype)} {wanted}: "
            f"{artifact.what}.",
        )
    if finite and not all(map(_is_finite, blocks_of(array))):
        raise stage.error(path, "holds values that are not finite.")
    return array


def mapped(path: Path) -> np.ndarray:
    """An .npy as an array mapped into memory; unpickles nothing, nor opens what is no .npy."""
    return np.lib.format.open_memmap(path, mode="r")


def blocks_of(array: np.ndarray) -> Iterator[np.ndarray]:
    """All rows of a memory-mapped array, some at a time."""
    step = max(1, BLOCK_BYTES // array[:1].nbytes)
    return (some_rows(array, start, start + step) for start in range(0, len(array), step))


def _is_finite(block: np.ndarray) -> bool:
    if block.dtype != np.float16:
        return bool(np.isfinite(block).all())
    # Ten times as fast: without their signs, nan and inf are the largest numbers of 16 bits
    return bool((block.view(np.uint16) & 0x7FFF).max() < np.float16(np.inf).view(np.uint16))


def some_rows(array: np.ndarray, start: int, stop: int) -> np.ndarray:
    """Rows of a whole memory-mapped array, read from its file.

    What is read through the map counts as memory of the process for as long as the map is there.
    """
    if not isinstance(array, np.memmap) or array.filename is None:
        return array[start:stop]
    if not array.flags.c_contiguous:  # as numpy saves what was transposed
        return array[start:stop]
    shape = (min(stop, len(array)) - start, *array.shape[1:])
    offset = array.offset + start * array[:1].nbytes
    values = np.fromfile(array.filename, array.dtype, math.prod(shape), offset=offset)
    if values.size < math.prod(shape):  # a disk that fails looks like an end to numpy
        raise OSError(errno.EIO, os.strerror(errno.EIO), array.filename)
    return values.reshape(shape)
