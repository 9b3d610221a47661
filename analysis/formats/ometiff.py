"""--format ometiff of analysis/export.py: a tiled pyramid for QuPath and napari."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tifffile
from skimage.measure import block_reduce

import utils
from analysis.formats.mapset import MapSet, each_map, records_of

NOT_IN_XML = "\ufffe\uffff"  # and control characters
TILE_PX = 256  # and no level is smaller
COMPRESSION_LEVEL = 1  # the digits of expected counts are noise: more saves little
BIG_TIFF_BYTES = 2**32 - 2**25  # what 32-bit offsets reach, less the tags


def bytes_needed(source: MapSet) -> int:
    """Of the disk, before compression."""
    return 4 * source.tissue.size * len(source.files) * 4 // 3


def write(source: MapSet, target: Path) -> None:
    """All genes of the first level, then of the next: each reads the maps again, which is fast."""
    sizes = [source.tissue.shape]
    while max(sizes[-1]) > TILE_PX:
        sizes.append(tuple(-(-side // 2) for side in sizes[-1]))
    text = (
        "Expected counts per superpixel of 8 um by HISTEX; 0 outside the tissue. Records of its "
        f"scripts: {json.dumps(records_of(source))}"
    )
    known = json.dumps([source.stage.inputs[utils.MAPS.name]["sha256"], source.genes])
    metadata = {
        "axes": "CYX",
        "UUID": str(uuid.uuid5(uuid.NAMESPACE_URL, known)),  # the same for the same export
        "Name": in_xml(source.name),
        "Description": text,
        "Channel": {"Name": [in_xml(gene) for gene in source.genes]},
        "PhysicalSizeX": utils.SUPERPIXEL_UM,
        "PhysicalSizeXUnit": "µm",
        "PhysicalSizeY": utils.SUPERPIXEL_UM,
        "PhysicalSizeYUnit": "µm",
    }
    big = 4 * len(source.files) * sum(rows * columns for rows, columns in sizes) > BIG_TIFF_BYTES
    with tifffile.TiffWriter(target, bigtiff=big, ome=True) as file:
        for level, size in enumerate(sizes):
            per_cm = 1e4 / utils.SUPERPIXEL_UM / 2**level
            file.write(
                (tile for image in each_level(source, level) for tile in tiles(image)),
                shape=(len(source.files), *size),
                dtype=np.float32,
                tile=(TILE_PX, TILE_PX),
                compression="zlib",  # the one that every reader of TIFF has
                compressionargs={"level": COMPRESSION_LEVEL},
                photometric="minisblack",
                resolution=(per_cm, per_cm),
                resolutionunit="CENTIMETER",
                maxworkers=1,
                subifds=0 if level else len(sizes) - 1,
                subfiletype=1 if level else None,
                metadata=None if level else metadata,
            )


def in_xml(text: str) -> str:
    """The text without the characters that XML cannot hold."""
    return "".join(c if c >= " " and c not in NOT_IN_XML else "?" for c in text)


def each_level(source: MapSet, level: int) -> Iterator[np.ndarray]:
    """The maps at 1 / 2**level of their size, 0 outside the tissue."""
    for image in each_map(source, f"level {level}"):
        for _ in range(level):
            image = halve_map(image)
        yield np.nan_to_num(image, nan=0.0)


def tiles(image: np.ndarray) -> Iterator[np.ndarray]:
    """Squares of a map from left to right, then from top to bottom; the last ones are smaller."""
    for top in range(0, image.shape[0], TILE_PX):
        for left in range(0, image.shape[1], TILE_PX):
            yield image[top : top + TILE_PX, left : left + TILE_PX]


def halve_map(image: np.ndarray) -> np.ndarray:
    """Means of two by two pixels without those that are NaN; NaN where all are."""
    there = np.isfinite(image)
    n = block_reduce(there, 2, np.sum)
    total = block_reduce(np.where(there, image, 0).astype(np.float64), 2, np.sum)
    return np.where(n > 0, total / np.maximum(n, 1), np.nan).astype(np.float32)
