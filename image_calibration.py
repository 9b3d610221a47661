"""Turn an H&E image and its spot coordinates into their calibrated form: 0.5 um per pixel.

    python image_calibration.py --directory FOLDER

Reads   he-raw.{jpg,png,tif,tiff}  8 or 16 bit; RGB, grey, palette or CMYK; a TIFF may be tiled,
                                   BigTIFF or a pyramid (first page)
        pixel-size-raw.txt         um per pixel of he-raw
        locs-raw.csv               spot id, x (column), y (row), pixels of he-raw; with
                                   --no-spots, none
        radius-raw.txt             optional: spot radius, pixels of he-raw; 27.5 um without it
Writes  he.jpg                     RGB, padded on the right and below with white to multiples of
                                   224 px; he.png instead where a side is too long for a JPEG
        locs.csv, radius.txt       the same spots, pixels of he.jpg
        pixel-size.txt             um per pixel of he.jpg: 0.5

Departures from the published method, with the reason:
* libvips decodes, resizes and encodes band by band, so that a slide of any size fits the memory
  (a progressive JPEG and an interlaced PNG are decoded whole); a float64 copy of the whole image,
  as scikit-image makes, takes a hundred times as much;
* images are shrunk by a Catmull-Rom spline stretched over the old pixels, enlarged by the same
  spline. Of libvips' kernels it comes closest to averaging areas, as a scanner with larger pixels
  would: on an H&E, the rms difference is 0.9 to 1.7 levels (linear 1.4 to 2.7, Lanczos 1.4 to 3);
* coordinates are scaled by the exact ratio of the image sides, so that spots stay on their tissue
  even where the sides were rounded to whole pixels;
* nothing is cropped; up to 5 % of the spots may lie off the image and are left out with a note,
  while coordinates that cannot belong to the image stop the run with the likely mistake.

Arrays are (row, col), x and y are CSV columns; coordinates start at the left or upper edge of a
pixel.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

import utils
from reading import cli

SCRIPT = utils.CALIBRATION


def build_parser() -> cli.Parser:
    parser = cli.stage_parser(__doc__)
    parser.add_argument(
        "--max-megapixels",
        type=cli.positive,
        default=utils.MAX_MEGAPIXELS,
        metavar="N",
        help="Refuse images of more than N million pixels, before or after calibration.",
    )
    cli.add_no_spots(parser)
    return parser


if __name__ == "__main__":
    cli.start(build_parser(), SCRIPT)  # what needs none of the slow imports below

import numpy as np
import pandas as pd
import pyvips

from method.calibration import (
    MAX_OUTSIDE,
    calibrated_shape,
    inside,
    machine_memory,
    padded_shape,
)
from method.grid import neighbour_distance
from reading import pictures, plain, tables
from utils import LEGACY_PITCH_UM, LEGACY_RADIUS_UM, VISIUM_PITCH_UM, VISIUM_RADIUS_UM

JPEG_MAX_SIDE_PX = 65_500  # libjpeg's limit (JPEG_MAX_DIMENSION)
JPEG_QUALITY = 95  # with 4:4:4 subsampling; all features come from this re-encoded file
PNG_LEVEL = 1  # fast; only images of gigapixels become PNG
DECODED_BYTES = 6  # of a pixel, in an image that has to be decoded whole

PITCH_TOLERANCE = 1.25  # factor; above any jitter, below the half-way point between the two pitches
RADIUS_RANGE_UM = (utils.SUPERPIXEL_UM, utils.MAX_RADIUS_SUPERPIXELS * utils.SUPERPIXEL_UM)
PIXEL_SIZE_RANGE_UM = (utils.MIN_PIXEL_SIZE_UM, utils.MAX_PIXEL_SIZE_UM)
FULL_RESOLUTION = (
    "The image at full resolution is needed; Space Ranger's hires and lowres copies are too coarse."
)


# -------------------------------------------------------------------------------------------------
# he-raw: checks before its pixels are decoded
# -------------------------------------------------------------------------------------------------
@contextlib.contextmanager
def decoding(stage: utils.Stage, path: Path) -> Iterator[None]:
    """What libvips says of a damaged image is an error about it; one of the system stays one."""
    try:
        yield
    except pyvips.Error as error:
        raise stage.error(
            path,
            f"is truncated, corrupt or no readable JPEG, PNG or TIFF image: "
            f"{pictures.reason(error)}.",
            f"Copy it again from its source, then run: {stage.command(SCRIPT)} . A TIFF of a rarer "
            f"kind (JPEG 2000, Zstandard, tiles of separate channels) is rewritten by: python "
            f"prepare/slides.py --image {path.name} --directory FOLDER",
        ) from error


def open_image(stage: utils.Stage, path: Path) -> pyvips.Image:
    """he-raw, not decoded yet, after every check that its header allows."""
    try:
        with decoding(stage, path):
            image = pictures.open_picture(path)
            if image.width * image.height > stage.args.max_megapixels * 10**6:
                raise too_large(stage, path, f"{image.width} x {image.height} px")
            pictures.check(image, path)
    except pictures.Misfit as misfit:
        remedy = f"{misfit.remedy} Then run: {stage.command(SCRIPT)}"
        raise stage.error(path, misfit.problem, remedy) from misfit
    return image


def check_size(stage: utils.Stage, path: Path, image: pyvips.Image, shape: tuple[int, int]) -> None:
    """Stop if the calibrated image is less than a tile, or more than limit, RAM or disk hold."""
    (rows, columns), memory = shape, machine_memory()
    sizes = f"{image.width} x {image.height} px, {columns} x {rows} px once it is calibrated"
    if min(shape) < utils.TILE_PX:
        raise stage.error(path, f"is {sizes}; expected at least one tile of {utils.TILE_PX} px.")
    if rows * columns > stage.args.max_megapixels * 10**6:
        raise too_large(stage, path, sizes)
    need = DECODED_BYTES * image.width * image.height if image.get_typeof("interlaced") else 0
    if memory is not None and need > memory:
        raise stage.error(
            path,
            f"({sizes}) is progressive or interlaced, so it needs {need / 1e9:.1f} GB of memory; "
            f"there are {memory / 1e9:.1f} GB.",
            f"Save it without, or on a machine with more memory, run: {stage.command(SCRIPT)}",
        )
    utils.check_disk(stage.directory, 3 * rows * columns, "The calibrated image")


def too_large(stage: utils.Stage, path: Path, found: str) -> utils.StageError:
    return stage.error(
        path,
        f"is larger than --max-megapixels {stage.args.max_megapixels}: {found}.",
        f"If it really is that large, run: {stage.command(SCRIPT)} --max-megapixels N",
    )


# -------------------------------------------------------------------------------------------------
# spots
# -------------------------------------------------------------------------------------------------
def read_radius(stage: utils.Stage, pixel_size: float) -> float:
    """Spot radius in pixels of he.jpg."""
    path = stage.find(utils.RADIUS_RAW)
    if path is None:
        print(
            f"{utils.RADIUS_RAW.name}: none, {VISIUM_RADIUS_UM:g} um taken (Visium); "
            f"for legacy ST write {LEGACY_RADIUS_UM / pixel_size:.2f} into it "
            f"({LEGACY_RADIUS_UM:g} um)"
        )
        return VISIUM_RADIUS_UM / utils.PIXEL_SIZE_UM
    low, high = RADIUS_RANGE_UM
    hint = f"At {pixel_size:g} um per pixel that is {low:g} to {high:g} um."
    radius = plain.read_number(
        stage, path, low / pixel_size, high / pixel_size, "pixels of he-raw", hint
    )
    return radius * pixel_size / utils.PIXEL_SIZE_UM


def pitch_factor(pitch_um: float) -> float:
    """Factor (above 1) between a pitch and the nearer of the known ones; 1 if the pitch is nan."""
    known = (VISIUM_PITCH_UM, LEGACY_PITCH_UM)
    return min((max(pitch_um / um, um / pitch_um) for um in known if pitch_um > 0), default=1.0)


def diagnose(xy: np.ndarray, shape: tuple[int, int], pixel_size: float) -> str:
    """The likely mistake behind coordinates that do not fit, found by trying; "" if they fit.

    xy (N, 2) in pixels of an image of (rows, columns) with ``pixel_size`` um per pixel.
    """
    pitch = neighbour_distance(xy)
    factor = pitch_factor(pitch * pixel_size)
    usual = factor <= PITCH_TOLERANCE
    reach = float((np.quantile(xy, 0.9, axis=0) / shape[::-1]).max())  # 1 is the edge; no strays
    apart = f"The spots are {pitch * pixel_size:.1f} um apart ({pitch:.1f} px x {pixel_size:g} um)"
    odd = (
        f"{apart}; Visium has {VISIUM_PITCH_UM:g} um, legacy ST {LEGACY_PITCH_UM:g} um: a factor "
        f"of {factor:.1f}. They would be right with a pixel size of {VISIUM_PITCH_UM / pitch:.4g} "
        f"um (Visium) or {LEGACY_PITCH_UM / pitch:.4g} um (legacy ST)."
    )
    if inside(xy, shape).mean() >= 1 - MAX_OUTSIDE:
        if usual:
            return ""
        if pitch * pixel_size < VISIUM_PITCH_UM and reach < 0.5:
            odd += (
                f" They fill only the upper left {reach:.0%} of the image, as coordinates of a "
                f"hires or lowres copy would: x and y must be pixels of he-raw itself."
            )
        return odd
    swapped = inside(xy[:, ::-1], shape).mean()
    if swapped >= 1 - MAX_OUTSIDE:
        return f"With x and y swapped {swapped:.1%} lie inside: x must be the column, y the row."
    if reach < PITCH_TOLERANCE:
        return "They belong to another image, or he-raw was cropped or shifted."
    known = f"{apart}, as they should be, so the pixel size is that of the full resolution."
    return (
        f"They reach {reach:.1f} times as far as the image, so it is probably a hires or lowres "
        f"copy. {FULL_RESOLUTION} {known if usual else odd}"
    )


def check_spots(
    stage: utils.Stage, locs: pd.DataFrame, shape: tuple[int, int], pixel_size: float
) -> pd.DataFrame:
    """The spots inside he-raw. Too many outside are an error, an odd pitch is a warning."""
    xy = locs.to_numpy()
    found = inside(xy, shape)
    n, n_inside = len(xy), int(found.sum())
    hint = diagnose(xy, shape, pixel_size)
    if found.mean() < 1 - MAX_OUTSIDE:
        (left, top), (right, bottom) = xy.min(axis=0), xy.max(axis=0)
        raise stage.error(
            stage.path(utils.LOCS_RAW),
            f"puts {n - n_inside} of {n} spots outside he-raw: x runs from {left:g} to {right:g}, "
            f"y from {top:g} to {bottom:g}; the image has {shape[1]} columns and {shape[0]} rows. "
            f"{hint}",
        )
    apart = f"{neighbour_distance(xy) * pixel_size:.1f} um apart"
    print(f"spots inside the image: {n_inside} of {n} ({n_inside / n:.1%}), {apart}")
    if n_inside < n:
        left_out = utils.some(locs.index[~found])
        print(f"note: {n - n_inside} spots off the image are left out: {left_out}")
    if hint:
        print(f"warning: {hint} On a platform with another pitch, go on.")
    return locs[found]


def scale_locs(locs: pd.DataFrame, raw: tuple[int, int], shape: tuple[int, int]) -> pd.DataFrame:
    """Spot centres of an image of ``raw`` (rows, columns) after it became one of ``shape``."""
    return locs.assign(x=locs.x * (shape[1] / raw[1]), y=locs.y * (shape[0] / raw[0]))


# -------------------------------------------------------------------------------------------------
# geometry
# -------------------------------------------------------------------------------------------------
def tell_geometry(
    path: Path, pixel_size: float, raw: tuple[int, int], shape: tuple[int, int]
) -> dict[str, object]:
    """Print the geometry, and return it for the record; all pairs are (rows, columns)."""
    scale, padded = pixel_size / utils.PIXEL_SIZE_UM, padded_shape(shape)
    below, right = padded[0] - shape[0], padded[1] - shape[1]
    print(f"{path.name}: {raw[1]} x {raw[0]} px at {pixel_size:g} um per pixel")
    print(
        f"scaled by {scale:.4g} to {shape[1]} x {shape[0]} px at {utils.PIXEL_SIZE_UM} um per pixel"
    )
    print(f"padded by {right} px on the right and {below} px below to {padded[1]} x {padded[0]} px")
    sizes = {"raw_size": raw, "scaled_size": shape, "size": padded}
    return {**sizes, "padding": (below, right), "scale": scale}


def he_name(size: tuple[int, int]) -> str:
    """he.jpg, or he.png where a side is longer than a JPEG can be."""
    jpg, png = utils.HE.names
    return jpg if max(size) <= JPEG_MAX_SIDE_PX else png


# -------------------------------------------------------------------------------------------------
# pixels
# -------------------------------------------------------------------------------------------------
def resize(image: pyvips.Image, shape: tuple[int, int]) -> pyvips.Image:
    """An image brought to (rows, columns), its edges to the edges.

    libvips' own resize puts edges to edges when shrinking. When enlarging it is half a new pixel
    off, so there the affine map is given: new centres p + 0.5 and old ones q + 0.5 correspond.
    """
    rows, columns = shape
    across, down = columns / image.width, rows / image.height
    if max(across, down) <= 1:
        return image.resize(across, vscale=down, kernel="cubic")
    return image.affine(
        [across, 0, 0, down],
        interpolate=pyvips.Interpolate.new("bicubic"),
        idx=0.5, idy=0.5, odx=-0.5, ody=-0.5,
        oarea=[0, 0, columns, rows],
        extend="copy",
    )  # fmt: skip


def pad(image: pyvips.Image) -> pyvips.Image:
    """The image padded with white to whole tiles, on the right and below."""
    rows, columns = padded_shape((image.height, image.width))
    return image.embed(0, 0, columns, rows, extend="white")


def write_image(image: pyvips.Image, path: Path) -> None:
    """Here all is decoded, resized and encoded, a band of rows at a time."""
    if path.suffix == ".png":
        image.pngsave(str(path), compression=PNG_LEVEL, filter="sub", keep="none")
    else:
        image.jpegsave(str(path), Q=JPEG_QUALITY, subsample_mode="off", keep="none")


def main(stage: utils.Stage) -> None:
    stage.require(utils.HE_RAW, utils.PIXEL_SIZE_RAW)
    if not stage.args.no_spots:
        stage.require(utils.LOCS_RAW)
        stage.optional(utils.RADIUS_RAW)
    stage.guard(utils.HE, utils.LOCS, utils.RADIUS, utils.PIXEL_SIZE)

    path = stage.path(utils.HE_RAW)
    given = stage.path(utils.PIXEL_SIZE_RAW)
    pixel_size = plain.read_number(
        stage, given, *PIXEL_SIZE_RANGE_UM, "um per pixel", FULL_RESOLUTION
    )
    image = open_image(stage, path)
    raw = image.height, image.width
    shape = calibrated_shape(raw, pixel_size)
    check_size(stage, path, image, shape)
    if not stage.args.no_spots:
        radius = read_radius(stage, pixel_size)
        locs = tables.read_locs(stage, stage.path(utils.LOCS_RAW))
        spots = check_spots(stage, locs, raw, pixel_size)
    geometry = tell_geometry(path, pixel_size, raw, shape)

    stage.retire(utils.HE)  # of the other kind, if he.jpg gives way to he.png
    with stage.writing(utils.HE, he_name(padded_shape(shape))) as partial, decoding(stage, path):
        rgb, converted = pictures.to_rgb(image, path)
        if converted:
            print(f"{path.name}: {converted}")
        write_image(pad(resize(rgb, shape)), partial)
    with stage.writing(utils.PIXEL_SIZE) as partial:
        partial.write_text(f"{utils.PIXEL_SIZE_UM}\n", encoding="utf-8")
    if stage.args.no_spots:
        stage.retire(utils.LOCS)
        stage.retire(utils.RADIUS)
        stage.finish(**geometry, converted=converted, spots=0, spots_inside=0)
        return
    with stage.writing(utils.LOCS) as partial:
        scale_locs(spots, raw, shape).to_csv(partial, float_format="%.4f", lineterminator="\n")
    with stage.writing(utils.RADIUS) as partial:
        partial.write_text(f"{radius:.4f}\n", encoding="utf-8")
    stage.finish(**geometry, converted=converted, spots=len(locs), spots_inside=len(spots))


def run(argv: list[str] | None = None) -> int:
    return cli.run_stage(main, SCRIPT, build_parser(), argv)


if __name__ == "__main__":
    sys.exit(run())
