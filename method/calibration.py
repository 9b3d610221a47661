"""The size that an image gets at 0.5 um per pixel, and the memory there is to hold one."""

from __future__ import annotations

import os

import utils

SAME_SCALE = 1e-4  # a pixel size this close to 0.5 um, relatively, is 0.5 um: do not resample


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
