"""The size that an image gets at 0.5 um per pixel, the spots that lie on it, and the memory to hold
one."""

from __future__ import annotations

import os

import numpy as np

import utils

SAME_SCALE = 1e-4  # a pixel size this close to 0.5 um, relatively, is 0.5 um: do not resample

MAX_OUTSIDE = 0.05  # share of the spots in tissue that may miss the image, as strays at an edge do:
# they are left out. With more, image and spots do not belong together


def inside(xy: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Which of the centres (N, 2), x and y, lie in an image of (rows, columns): bool (N,)."""
    return np.all((xy >= 0) & (xy < shape[::-1]), axis=1)


def calibrated_shape(raw: tuple[int, int], pixel_size: float) -> tuple[int, int]:
    """(rows, columns) of an image brought to 0.5 um per pixel, before padding."""
    scale = pixel_size / utils.PIXEL_SIZE_UM
    if abs(scale - 1) < SAME_SCALE:
        return raw
    return round(raw[0] * scale), round(raw[1] * scale)


def padded_shape(shape: tuple[int, int]) -> tuple[int, int]:
    rows, columns = (-(-side // utils.TILE_PX) * utils.TILE_PX for side in shape)
    return rows, columns


def machine_memory() -> int | None:
    """Bytes of RAM, or None where the system does not tell. What is free right now would mislead:
    systems fill it with cached files."""
    if "SC_PHYS_PAGES" not in getattr(os, "sysconf_names", {}):
        return None
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
