"""The image of a prepared sample: a file taken as it is, an array, or a part of a slide.

Frames. x (column) and y (row) are continuous pixels from the left upper edge of the first pixel.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import utils
from method.calibration import MAX_OUTSIDE, inside
from prepare import scans
from prepare.scans import Region, Slide

COPIED = (".jpg", ".jpeg", ".png")  # image_calibration.py reads them as they are
MIN_INSIDE = 1 - MAX_OUTSIDE  # share of the in-tissue spots that must fall on the image
MAX_PIXEL_SIZE_ERROR = 0.05  # relative, between the metadata of an image and the spots
THUMBNAIL_PX = 1200  # longer side of check.png


def share_inside(xy: np.ndarray, shape: tuple[int, int]) -> float:
    return float(inside(xy, shape).mean())


def open_image(path: Path) -> Slide:
    """The slide or image at a path, opened but not loaded."""
    if not path.is_file():
        raise utils.StageError(
            f"{path} is missing or no file; expected the H&E image at full resolution.",
            "Give it by --image FILE.",
        )
    return scans.open_slide(path)


def image_shape(image: Path | np.ndarray | Region) -> tuple[int, int]:
    """Rows and columns of the image that is written."""
    if isinstance(image, Path):
        return image_size(image)[::-1]
    return image.shape[:2]


def image_size(path: Path) -> tuple[int, int]:
    """Width and height of a slide or image at full resolution."""
    with open_image(path) as slide:
        return slide.size


def place_image(
    path: Path,
    locs: pd.DataFrame,
    pixel_size_um: float,
    margin_um: float | None = None,
    downsample: int | None = None,
) -> tuple[Path | Region, pd.DataFrame, float]:
    """(image, locs, pixel size) as they are written: the whole file, or a part of a slide.

    JPEG and PNG files that are taken whole are copied as they are; else see place_slide.
    """
    if margin_um is None and downsample in (None, 1) and path.suffix.lower() in COPIED:
        return path, locs, pixel_size_um
    slide = open_image(path)  # stays open: write_sample reads it
    region = place_slide(slide, locs, pixel_size_um, margin_um, downsample)
    return region, move(locs, region), pixel_size_um * region.downsample


def place_slide(
    slide: Slide,
    locs: pd.DataFrame,
    pixel_size_um: float,
    margin_um: float | None = None,
    downsample: int | None = None,
) -> Region:
    """The part of an open slide that is written.

    With ``margin_um`` it is cut to the spots and a margin, unless the spots miss the image: then
    ``check`` is to see the whole of it. ``downsample`` is a whole factor, by default the one that
    brings the image near to 0.5 um per px.
    """
    step = downsample or scans.whole_factor(pixel_size_um)
    low, high = np.zeros(2, int), np.array(slide.size)
    xy = locs[["x", "y"]].to_numpy()
    if margin_um is not None and share_inside(xy, slide.size[::-1]) >= MIN_INSIDE:
        margin = margin_um / pixel_size_um
        low = np.clip(np.floor(xy.min(0) - margin), 0, high - 1).astype(int)
        high = np.clip(np.ceil(xy.max(0) + margin), low, high).astype(int)
    (x, y), (width, height) = low.tolist(), ((high - low) // step * step).tolist()
    return Region(slide, x, y, width, height, step)


def move(locs: pd.DataFrame, image: Path | Region) -> pd.DataFrame:
    """x, y in px of the image written, from x, y in px of the whole file."""
    if isinstance(image, Path):
        return locs
    return locs.assign(
        x=(locs.x - image.x) / image.downsample, y=(locs.y - image.y) / image.downsample
    )


def check_metadata(path: Path, pixel_size_um: float, trusted: bool, option: str) -> list[str]:
    """Stop if the image's own metadata say another pixel size than the spots' pitch.

    Spots of a smaller copy all fall on a larger one: then nothing else tells. A ``trusted`` image
    only gets a note; ``option`` is how the user says so.
    """
    with open_image(path) as slide:
        said = slide.pixel_size_um
    if said is None or abs(said / pixel_size_um - 1) <= MAX_PIXEL_SIZE_ERROR:
        return []
    problem = (
        f"{path} says in its metadata that it has {said:.4g} um per pixel, but by the spots it has "
        f"{pixel_size_um:.4g}, a factor of {pixel_size_um / said:.3g}"
    )
    if trusted:
        return [f"{problem}. The spots are believed"]
    raise utils.StageError(
        f"{problem}: the coordinates may refer to a smaller or larger copy of it.",
        f"Give the image to which they refer. If its metadata err, add {option}.",
    )


def write_image(image: Path | np.ndarray | Region, partial: Path) -> None:
    """he-raw: a copy of the file, or a lossless TIFF, written a row of tiles at a time."""
    if isinstance(image, Path):
        shutil.copyfile(image, partial)
    else:
        scans.write_tiff(image, partial)


def thumbnail(image: Path | np.ndarray | Region) -> np.ndarray:
    """The image written, its longer side at most THUMBNAIL_PX: uint8 (rows, columns, 3)."""
    if isinstance(image, Path):
        with open_image(image) as slide:
            small = slide.thumbnail(THUMBNAIL_PX)
    elif isinstance(image, Region):
        shrink = max(1, max(image.shape) // THUMBNAIL_PX)
        small = image.read(0, image.shape[0], shrink)
    else:
        step = max(1, max(image.shape) // THUMBNAIL_PX)
        small = image[::step, ::step]
    picture = Image.fromarray(np.ascontiguousarray(small)).convert("RGB")
    picture.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
    return np.asarray(picture)
