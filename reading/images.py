"""he.jpg and mask.png."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyvips
from PIL import Image

from reading import pictures
from utils import (
    CALIBRATION,
    HE,
    MASK,
    MASKING,
    MAX_HE_PIXELS,
    MAX_MEGAPIXELS,
    TILE_PX,
    TOKEN_PX,
    Stage,
)

Image.MAX_IMAGE_PIXELS = MAX_HE_PIXELS  # Pillow's own limit is below the size of a slide
JPEG_BLACK = 127  # beside white, black comes back from a JPEG as values of up to 80 or more
BLOCK_PX = TILE_PX  # whole rows of blocks of a JPEG, which libvips does not decode twice


@contextlib.contextmanager
def checked(stage: Stage, path: Path) -> Iterator[None]:
    """What libvips says of a truncated or damaged file becomes an error about the file."""
    try:
        yield
    except pictures.Misfit as misfit:  # saved by the user in place of ours
        raise stage.error(path, misfit.problem) from misfit
    except pyvips.Error as error:
        raise stage.error(
            path, f"is not a whole image (truncated or corrupt): {pictures.reason(error)}."
        ) from error


class ImageRows:
    """An RGB image that is decoded where it is sliced: image[top:bottom] is uint8 (n, columns, 3).

    Rows are decoded from the top down, BLOCK_PX at a time, and only the last block is kept. Slices
    may come in any order, but to go back to an earlier block, all is decoded from the top again. A
    truncated or damaged file is an error when its rows are reached. One thread may slice at a time.
    """

    def __init__(self, stage: Stage, path: Path) -> None:
        self.stage, self.path = stage, path
        self.open()
        self.shape = (self.image.height, self.image.width, 3)

    def open(self) -> None:
        with checked(self.stage, self.path):
            image = pictures.open_picture(self.path)
            check_extent(self.stage, self.path, image.width, image.height)
            self.image, _ = pictures.to_rgb(image, self.path)
        self.number, self.kept = -1, np.empty(0, np.uint8)  # of the last block, and its pixels

    def __enter__(self) -> ImageRows:
        return self

    def __exit__(self, *_: object) -> None:
        del self.image, self.kept  # closes the file

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> np.ndarray:
        top, bottom, step = rows.indices(len(self))
        if step != 1:
            raise IndexError("an image is sliced as image[top:bottom]")
        found = np.empty((max(0, bottom - top), *self.shape[1:]), np.uint8)
        while top < bottom:
            number, start = divmod(top, BLOCK_PX)
            part = self.block(number)[start : start + bottom - top]
            found[len(found) + top - bottom :][: len(part)] = part
            top += len(part)
        return found

    def block(self, number: int) -> np.ndarray:
        if number < self.number:
            self.open()
        if number != self.number:
            top, bottom = number * BLOCK_PX, min((number + 1) * BLOCK_PX, len(self))
            with checked(self.stage, self.path):
                self.kept = pictures.some_rows(self.image, top, bottom)
            self.number = number
        return self.kept


def thumbnail(stage: Stage, path: Path, longest_px: int) -> np.ndarray:
    """The image with sides of at most ``longest_px``, uint8 (rows, columns, 3); not enlarged."""
    with checked(stage, path):
        image = pictures.open_picture(path)
        check_extent(stage, path, image.width, image.height)
        return pictures.shrunk(path, longest_px)


def check_extent(stage: Stage, path: Path, width: int, height: int) -> None:
    """Stop before an image is decoded that is larger than any that these scripts write."""
    if width * height > MAX_HE_PIXELS:
        limit = f"{MAX_HE_PIXELS / 1e6:,.0f} million pixels"
        raise stage.error(path, f"is {width} x {height} px; expected at most {limit}.")


def grid_shape(stage: Stage) -> tuple[int, int]:
    """Rows and columns of superpixels of he.jpg, from its header alone."""
    path = stage.path(HE)
    try:
        with Image.open(path) as image:
            width, height = image.size
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise stage.error(path, f"is not an image: {error}") from error
    check_extent(stage, path, width, height)
    if width % TILE_PX or height % TILE_PX:
        raise stage.error(
            path, f"is {width} x {height} px; both sides must be multiples of {TILE_PX} px."
        )
    return height // TOKEN_PX, width // TOKEN_PX


def read_mask(stage: Stage, shape: tuple[int, int]) -> np.ndarray:
    """Tissue (h, w) bool from mask.png: superpixels of which at least half is painted.

    Painted is whatever is not black or transparent, in any image mode; a JPEG keeps black only
    nearly. The picture may have the size of he-raw, or a pixel a superpixel, or a whole multiple of
    that, as he.jpg has.
    """
    path = stage.path(MASK)
    try:
        image = pyvips.Image.new_from_file(str(path), access="random", fail_on="truncated")
        rows, columns = mask_edges(stage, (image.height, image.width), shape)
        colours = image[: image.bands - 1] if image.hasalpha() else image
        black = 0
        if image.get("vips-loader").startswith("jpeg"):
            black = JPEG_BLACK
            stage.warn(
                f"{path.name} is a JPEG, whose black is not all black: up to {black} is no tissue"
            )
        painted = (colours > black).bandor()
        if image.hasalpha():
            painted &= image[image.bands - 1] > 0
        share = np.stack(list(shares(painted, rows, columns)))
    except pyvips.Error as error:
        raise stage.error(path, f"is not a readable image: {pictures.reason(error)}.") from error
    tissue = share >= 0.5
    if not tissue.any():
        raise stage.error(
            path,
            "is all black, which leaves no tissue.",
            f"Paint the tissue white, or have it made. Run: {stage.remake(MASKING)}",
        )
    if tissue.all():
        print(f"warning: by {path.name} the whole image is tissue")
    return tissue


def mask_edges(
    stage: Stage, size: tuple[int, int], shape: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Where the superpixels begin and the last one ends, in rows and columns of a mask of ``size``.

    Superpixels of the white that pads he.jpg lie beyond the edge of a mask as large as he-raw.
    """
    raw, scaled = (stage.fact(CALIBRATION, key) or (0, 0) for key in ("raw_size", "scaled_size"))
    times = max(1, size[0] // shape[0])
    if size[0] * size[1] > MAX_MEGAPIXELS * 10**6:
        raise stage.error(
            stage.path(MASK),
            f"is {size[1]} x {size[0]} px, more than {MAX_MEGAPIXELS:,} megapixels; a pixel per "
            f"superpixel, {shape[1]} x {shape[0]}, is enough.",
            f"Shrink it, or have it made. Run: {stage.remake(MASKING)}",
        )
    if size == tuple(raw) != (0, 0):
        scales = [TOKEN_PX * a / b for a, b in zip(raw, scaled, strict=True)]
    elif size == (shape[0] * times, shape[1] * times):
        scales = [times, times]
    else:
        like_raw = f"{raw[1]} x {raw[0]} px as he-raw, " if any(raw) else ""
        he = f"{shape[1] * TOKEN_PX} x {shape[0] * TOKEN_PX} px as {stage.path(HE).name}"
        raise stage.error(
            stage.path(MASK),
            f"is {size[1]} x {size[0]} px; expected {like_raw}{he}, or {shape[1]} x {shape[0]} px, "
            f"one a superpixel (or a whole multiple of that).",
            f"Bring it to one of these sizes, or have it made. Run: {stage.remake(MASKING)}",
        )
    edges = [np.rint(np.arange(n + 1) * scale) for n, scale in zip(shape, scales, strict=True)]
    rows, columns = (e.clip(max=end).astype(int) for e, end in zip(edges, size, strict=True))
    return rows, columns


def shares(painted: pyvips.Image, rows: np.ndarray, columns: np.ndarray) -> Iterator[np.ndarray]:
    """Painted share (w,) of the superpixels of every row."""
    for top, bottom in itertools.pairwise(rows):
        share = np.zeros(painted.width)
        if bottom > top:
            band = painted.crop(0, top, painted.width, bottom - top).numpy()
            share = (band > 0).reshape(bottom - top, -1).mean(axis=0)
        sums = np.concatenate([[0.0], np.cumsum(share)])[columns]
        yield np.diff(sums) / np.diff(columns).clip(min=1)
