"""Turn an H&E image and its spot coordinates into their calibrated form: 0.5 um per pixel.

    python image_calibration.py --directory FOLDER

Reads   he-raw.{jpg,png,tif,tiff}  8 bit; a TIFF may be tiled, BigTIFF or a pyramid (first page)
        pixel-size-raw.txt         um per pixel of he-raw
        locs-raw.csv               spot id, x (column), y (row), pixels of he-raw
        radius-raw.txt             optional: spot radius, pixels of he-raw; 27.5 um without it
Writes  he.jpg                     RGB, padded on the right and below with white to multiples of
                                   224 px; he.png instead where a side is too long for a JPEG
        locs.csv, radius.txt       the same spots, pixels of he.jpg
        pixel-size.txt             um per pixel of he.jpg: 0.5

Departures from the published method, with the reason:
* areas are averaged when shrinking and cubic splines used when enlarging, on bytes and in bands of
  rows; a float64 copy of the whole image, as scikit-image makes, takes eight times the memory;
* a TIFF is decoded, resized and encoded band by band, so that a slide of any size fits the memory
  (a JPEG, a PNG and a TIFF in one piece are decoded whole, at 4 bytes a pixel), and every row of
  blocks of he.jpg stands alone, so that the next stages need not decode the whole;
* coordinates are scaled by the exact ratio of the image sides, so that spots stay on their tissue
  even where the sides were rounded to whole pixels;
* nothing is cropped, and coordinates that cannot belong to the image stop the run with the likely
  mistake.

Arrays are (row, col), x and y are CSV columns; coordinates start at the left or upper edge of a
pixel.
"""

from __future__ import annotations

import argparse
import io
import mmap
import struct
import sys
import warnings
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import cv2
import numpy as np
import pandas as pd
from PIL import ExifTags, Image
from scipy.spatial import cKDTree

import utils
from method.calibration import calibrated_shape, machine_memory, padded_shape
from reading import images, plain, tables

SCRIPT = utils.CALIBRATION

FORMATS = ("JPEG", "PNG", "TIFF")  # no other decoder ever sees the bytes of he-raw
Tag = ExifTags.Base  # the names of a TIFF's tags
CONVERTED = {"L": "grey", "LA": "grey + alpha", "P": "palette", "RGBA": "RGBA", "RGBX": "RGB + 1"}
DECODER_ERRORS = (  # all that Pillow raises on damaged files
    OSError, SyntaxError, ValueError, TypeError, LookupError, EOFError, ArithmeticError,
    RuntimeError, struct.error,
)  # fmt: skip
DECODING_TAGS = (  # of a TIFF, beside those that say where its strips or tiles lie
    Tag.ImageWidth, Tag.BitsPerSample, Tag.Compression, Tag.PhotometricInterpretation,
    Tag.FillOrder, Tag.SamplesPerPixel, Tag.PlanarConfiguration, Tag.Predictor, Tag.ColorMap,
    Tag.TileWidth, Tag.TileLength, Tag.ExtraSamples, Tag.SampleFormat, Tag.JPEGTables,
    Tag.YCbCrSubSampling,
)  # fmt: skip
UNCOMPRESSED, JPEG, YCBCR, SEPARATE = 1, 7, 6, 2  # of Compression, Photometric..., PlanarConf...
HEADER_BYTES = 8  # of a TIFF
JPEG_RESTART, JPEG_END = b"\xff\xd7", b"\xff\xd9"  # the eighth restart marker; the end marker
WHITE = (255, 255, 255)
BAND_PX = 448  # rows at a time: whole tiles, and 8 k rows of blocks as restarts count up to 8
BAND_BYTES = 24  # most that all steps together hold of a pixel of a band
VALUES_AT_ONCE = 2**16  # summed at a time; more would not stay in the cache
SLIVER = 1e-3  # share of a pixel that does not count when areas are averaged, as in OpenCV
CUBIC = -0.75  # slope of the cubic splines at 1, as in OpenCV
JPEG_MAX_SIDE_PX = 65_500  # libjpeg's limit (JPEG_MAX_DIMENSION)
JPEG_QUALITY = 95  # with 4:4:4 subsampling; all features come from this re-encoded file
PNG_LEVEL = 1  # fast; only images of gigapixels become PNG

VISIUM_RADIUS_UM, LEGACY_RADIUS_UM = 27.5, 50.0  # 10x Visium, and its predecessor, legacy ST
VISIUM_PITCH_UM, LEGACY_PITCH_UM = 100.0, 200.0  # centre to centre
PITCH_TOLERANCE = 1.25  # factor; above any jitter, below the half-way point between the two pitches
MAX_OUTSIDE = 0.01  # share of spot centres that may miss the image, as strays at an edge do
RADIUS_RANGE_UM = (utils.SUPERPIXEL_UM, 64 * utils.SUPERPIXEL_UM)  # no platform's spots are beyond
PIXEL_SIZE_RANGE_UM = (utils.MIN_PIXEL_SIZE_UM, utils.MAX_PIXEL_SIZE_UM)
FULL_RESOLUTION = (
    "The image at full resolution is needed; Space Ranger's hires and lowres copies are too coarse."
)


# -------------------------------------------------------------------------------------------------
# he-raw: checks before its pixels are decoded
# -------------------------------------------------------------------------------------------------
class Pieces(NamedTuple):
    """Where the strips or tiles (pieces, here) of a TIFF lie, so that it can be read in bands."""

    height: int  # rows of pixels: of the image,
    rows: int  # and of a piece
    step: int  # rows of pieces to decode at once
    offsets: np.ndarray  # bytes, int64 (planes, rows of pieces, pieces across)
    counts: np.ndarray
    places: tuple[int, int]  # the tags of offsets and counts
    tags: dict[int, Any]  # the others that the decoder needs: bytes or tuples of whole numbers
    prefix: bytes  # the order of bytes

    @property
    def down(self) -> int:
        return self.offsets.shape[1]


def find_pieces(image: Image.Image, file_bytes: int) -> Pieces | None:
    """The strips or tiles of a TIFF; None where it has to be decoded whole, as other images have.

    An uncompressed strip is cut into rows, so that even a single one can be read in bands.
    """
    if image.format != "TIFF":
        return None
    tags, (width, height) = image.tag_v2, image.size
    compression, samples = tags.get(Tag.Compression, 1), tags.get(Tag.SamplesPerPixel, 1)
    planes = samples if tags.get(Tag.PlanarConfiguration, 1) == SEPARATE else 1
    tiled = Tag.TileOffsets in tags
    if set(tags.get(Tag.BitsPerSample, ())) != {8} or tiled == (Tag.StripOffsets in tags):
        return None
    if tags.get(Tag.PhotometricInterpretation) == YCBCR and compression != JPEG:
        return None
    if tiled:
        places, piece_width = (Tag.TileOffsets, Tag.TileByteCounts), tags[Tag.TileWidth]
        rows = tags[Tag.TileLength]
    else:
        places, piece_width = (Tag.StripOffsets, Tag.StripByteCounts), width
        rows = min(tags.get(Tag.RowsPerStrip, height), height)
    grid = (planes, -(-height // rows), -(-width // piece_width))
    offsets = np.array(tags[places[0]], np.int64)
    if offsets.size != np.prod(grid):
        return None
    offsets = offsets.reshape(grid)
    if compression == UNCOMPRESSED:
        row_bytes = piece_width * samples // planes
        if not tiled:
            row = np.arange(height)
            offsets = offsets[:, row // rows] + (row % rows * row_bytes)[:, None]
            rows = 1
        counts = np.full_like(offsets, rows * row_bytes)
    else:
        counts = np.array(tags[places[1]], np.int64).reshape(grid)
    if (offsets < 0).any() or (counts < 0).any() or (offsets > file_bytes - counts).any():
        raise OSError("image file is truncated")
    step = max(1, BAND_PX // rows)
    if step >= offsets.shape[1]:
        return None
    others = {tag: tags[tag] for tag in DECODING_TAGS if tag in tags}
    others = {t: v if isinstance(v, (bytes, tuple)) else (v,) for t, v in others.items()}
    if not tiled:
        others[Tag.RowsPerStrip] = (rows,)
    return Pieces(height, rows, step, offsets, counts, places, others, tags.prefix)


def check_image(stage: utils.Stage, path: Path) -> tuple[tuple[int, int], Pieces | None]:
    """(rows, columns) of he-raw and the pieces to read it by, after every check that its header
    and checksums allow."""
    Image.MAX_IMAGE_PIXELS = stage.args.max_megapixels * 10**6  # Pillow compares the header with it
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd metadata does no harm
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=FORMATS) as image:
                shape, kind = (image.height, image.width), image.format
                # a PNG may keep it behind the pixels: there load looks
                turned = 1 if kind == "PNG" else image.getexif().get(Tag.Orientation, 1)
                pieces = find_pieces(image, path.stat().st_size)
                problem = misfit(image)
                image.verify()  # the checksums of a PNG
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise too_large(stage, path, str(error)) from error
    except DECODER_ERRORS as error:
        raise broken(stage, path, error) from error
    if problem:
        raise stage.error(path, problem)
    check_turned(stage, path, turned)
    if kind not in ("PNG", "TIFF") and not has_jpeg_end(path):
        raise broken(stage, path, "the end of the JPEG is missing")
    return shape, pieces


def check_turned(stage: utils.Stage, path: Path, turned: int) -> None:
    if turned != 1:
        raise stage.error(
            path,
            f"has EXIF orientation {turned}, so viewers turn it; expected 1 or none: spots refer "
            f"to the pixels as stored.",
            f'If they fit those, strip the tag: exiftool -Orientation= "{path}"; else save the '
            f"picture turned. Then run: {stage.command(SCRIPT)}",
        )


def misfit(image: Image.Image) -> str | None:
    """Why an undamaged image is still not the 8-bit colour image that is needed."""
    bits = getattr(image, "tag_v2", {}).get(Tag.BitsPerSample, (8,))
    if max(bits) > 8 or (image.format == "PNG" and "16" in str(image.tile[0].args)):
        return "has more than 8 bits per channel (Pillow would cut them off); save it as 8-bit RGB."
    if image.mode != "RGB" and image.mode not in CONVERTED:
        return f"has pixels of kind {image.mode}; expected RGB. Save it as 8-bit RGB."
    size = image.size
    for page in range(1, image.n_frames if image.format == "TIFF" else 1):
        image.seek(page)
        if image.width * image.height > size[0] * size[1]:
            return (
                f"starts with a page of {size[0]} x {size[1]} px, but page {page + 1} is larger "
                f"({image.width} x {image.height} px); save the full-resolution page alone."
            )
        if image.size == size and image.mode == "L":
            return "keeps its channels on separate grey pages; save it as one page of 8-bit RGB."
    return None


def has_jpeg_end(path: Path) -> bool:
    """True if the end marker follows the last start of scan; neither can occur within pixel data.

    A file cut off at its very end, or filled up with zeros by a broken copy, can still decode.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return data.rfind(b"\xff\xd9") > data.rfind(b"\xff\xda")


def check_size(
    stage: utils.Stage,
    path: Path,
    raw: tuple[int, int],
    shape: tuple[int, int],
    pieces: Pieces | None,
) -> None:
    """Stop if the calibrated image is less than a tile, or more than limit, RAM or disk hold."""
    (rows, columns), memory = shape, machine_memory()
    sizes = f"{raw[1]} x {raw[0]} px, {columns} x {rows} px at {utils.PIXEL_SIZE_UM} um per pixel"
    if min(shape) < utils.TILE_PX:
        raise stage.error(path, f"is {sizes}; expected at least one tile of {utils.TILE_PX} px.")
    if rows * columns > stage.args.max_megapixels * 10**6:
        raise too_large(stage, path, sizes)
    decoded_rows = pieces.step * pieces.rows if pieces else raw[0]
    need = 4 * decoded_rows * raw[1]  # Pillow holds RGB in 4 bytes a pixel
    need += BAND_BYTES * BAND_PX * max(raw[1], columns)
    if memory is not None and need > memory:
        raise stage.error(
            path,
            f"({sizes}) needs {need / 1e9:.1f} GB of memory; there are {memory / 1e9:.1f} GB.",
            f"On a machine with more memory, run: {stage.command(SCRIPT)}",
        )
    utils.check_disk(stage.directory, 3 * rows * columns, "The calibrated image")


def broken(stage: utils.Stage, path: Path, reason: object) -> utils.StageError:
    return stage.error(
        path,
        f"is truncated, corrupt or no readable JPEG, PNG or TIFF image: {reason}.",
        f"Copy it again from its source (or save a TIFF with JPEG 2000 or WebP inside as LZW, "
        f"deflate or JPEG), then run: {stage.command(SCRIPT)}",
    )


def too_large(stage: utils.Stage, path: Path, found: str) -> utils.StageError:
    return stage.error(
        path,
        f"is larger than --max-megapixels {stage.args.max_megapixels}: {found.rstrip('.')}.",
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


def inside(xy: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Which of the centres (N, 2), x and y, lie in an image of (rows, columns): bool (N,)."""
    return ((xy >= 0) & (xy < shape[::-1])).all(axis=1)


def spot_pitch(xy: np.ndarray) -> float:
    """Median distance of the spots (N, 2) to their nearest neighbours; nan for a single spot."""
    if len(xy) < 2:
        return float("nan")
    return float(np.median(cKDTree(xy).query(xy, k=2)[0][:, 1]))


def pitch_factor(pitch_um: float) -> float:
    """Factor (above 1) between a pitch and the nearer of the known ones; 1 if the pitch is nan."""
    known = (VISIUM_PITCH_UM, LEGACY_PITCH_UM)
    return min((max(pitch_um / um, um / pitch_um) for um in known if pitch_um > 0), default=1.0)


def diagnose(xy: np.ndarray, shape: tuple[int, int], pixel_size: float) -> str:
    """The likely mistake behind coordinates that do not fit, found by trying; "" if they fit.

    xy (N, 2) in pixels of an image of (rows, columns) with ``pixel_size`` um per pixel.
    """
    pitch = spot_pitch(xy)
    factor = pitch_factor(pitch * pixel_size)
    usual = factor <= PITCH_TOLERANCE
    reach = float((np.quantile(xy, 0.95, axis=0) / shape[::-1]).max())  # 1 is the edge; no strays
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
    stage: utils.Stage, xy: np.ndarray, shape: tuple[int, int], pixel_size: float
) -> int:
    """Number of spots inside he-raw. Too many outside are an error, an odd pitch is a warning."""
    n, n_inside = len(xy), int(inside(xy, shape).sum())
    hint = diagnose(xy, shape, pixel_size)
    if n - n_inside > MAX_OUTSIDE * n:
        (left, top), (right, bottom) = xy.min(axis=0), xy.max(axis=0)
        raise stage.error(
            stage.path(utils.LOCS_RAW),
            f"puts {n - n_inside} of {n} spots outside he-raw: x runs from {left:g} to {right:g}, "
            f"y from {top:g} to {bottom:g}; the image has {shape[1]} columns and {shape[0]} rows. "
            f"{hint}",
        )
    pitch_um = spot_pitch(xy) * pixel_size
    print(
        f"spots inside the image: {n_inside} of {n} ({n_inside / n:.1%}), {pitch_um:.1f} um apart"
    )
    if hint:
        print(f"warning: {hint} On a platform with another pitch, go on.")
    return n_inside


def scale_locs(locs: pd.DataFrame, raw: tuple[int, int], shape: tuple[int, int]) -> pd.DataFrame:
    """Spot centres of an image of ``raw`` (rows, columns) after it became one of ``shape``."""
    return locs.assign(x=locs.x * (shape[1] / raw[1]), y=locs.y * (shape[0] / raw[0]))


# -------------------------------------------------------------------------------------------------
# geometry
# -------------------------------------------------------------------------------------------------
def report(
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
    return {
        "raw_size": raw,
        "scaled_size": shape,
        "size": padded,
        "padding": (below, right),
        "scale": scale,
    }


def he_name(size: tuple[int, int]) -> str:
    """he.jpg, or he.png where a side is longer than a JPEG can be."""
    jpg, png = utils.HE.names
    return jpg if max(size) <= JPEG_MAX_SIDE_PX else png


# -------------------------------------------------------------------------------------------------
# pixels: bands of rows, from top to bottom, are decoded, resized and encoded
# -------------------------------------------------------------------------------------------------
def read_bands(stage: utils.Stage, path: Path, pieces: Pieces | None) -> Iterator[np.ndarray]:
    """he-raw as RGB, uint8 (n, columns, 3). A file that ends early is an error, never grey rows."""
    for number, image in enumerate(pictures(stage, path, pieces)):
        if number == 0 and image.mode != "RGB":
            ground = " on white" if image.has_transparency_data else ""
            print(f"{path.name}: {CONVERTED[image.mode]}, converted to RGB{ground}")
        for top in range(0, image.height, BAND_PX):
            box = (0, top, image.width, min(top + BAND_PX, image.height))
            yield np.asarray(to_rgb(image.crop(box)))


def ahead(bands: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    """The same bands; a second thread makes the next one while one is in use."""
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, bands, None)
        while (band := coming.result()) is not None:
            coming = thread.submit(next, bands, None)
            yield band


def pictures(stage: utils.Stage, path: Path, pieces: Pieces | None) -> Iterator[Image.Image]:
    """he-raw in one picture, or the bands of a TIFF."""
    if pieces is None:
        yield load(stage, path, path)
        return
    with path.open("rb") as file:
        for top in range(0, pieces.down, pieces.step):
            yield load(stage, path, tiff_band(file, pieces, top, top + pieces.step))


def load(stage: utils.Stage, path: Path, source: Path | io.BytesIO) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(source, formats=FORMATS) as image:
                turned = image.getexif().get(Tag.Orientation, 1)
                image.load()
    except DECODER_ERRORS as error:
        raise broken(stage, path, error) from error
    check_turned(stage, path, turned)
    return image


def tiff_band(file: BinaryIO, pieces: Pieces, top: int, bottom: int) -> io.BytesIO:
    """A TIFF of its own that holds the rows of pieces top..bottom - 1.

    So one decoder reads all kinds of TIFF, whole or in bands, and its pixels are the same.
    """
    offsets, counts = pieces.offsets[:, top:bottom].ravel(), pieces.counts[:, top:bottom].ravel()
    starts = HEADER_BYTES + np.cumsum(counts) - counts
    tags = {
        **pieces.tags,
        Tag.ImageLength: [min(bottom * pieces.rows, pieces.height) - top * pieces.rows],
        pieces.places[0]: starts.tolist(),
        pieces.places[1]: counts.tolist(),
    }
    order = "<" if pieces.prefix == b"II" else ">"
    directory = HEADER_BYTES + int(counts.sum())
    behind = directory + struct.calcsize("=H") + len(tags) * struct.calcsize("=HHLL") + 4
    entries, values = struct.pack(order + "H", len(tags)), b""
    for tag, value in sorted(tags.items()):
        is_bytes = isinstance(value, bytes)
        content = value if is_bytes else struct.pack(f"{order}{len(value)}L", *value)
        entries += struct.pack(order + "HHL", tag, 7 if is_bytes else 4, len(value))
        if len(content) <= 4:
            entries += content.ljust(4, b"\0")
        else:
            entries += struct.pack(order + "L", behind + len(values))
            values += content
    band = io.BytesIO()
    band.write(pieces.prefix + struct.pack(order + "HL", 42, directory))
    for offset, count in zip(offsets.tolist(), counts.tolist(), strict=True):
        file.seek(offset)
        band.write(file.read(count))
    band.write(entries + bytes(4) + values)
    return band


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB of an 8-bit image of any kind, what is transparent laid on white."""
    if not image.has_transparency_data:
        return image if image.mode == "RGB" else image.convert("RGB")
    opaque = Image.new("RGB", image.size, WHITE)
    opaque.paste(image.convert("RGB"), mask=image.convert("RGBA").getchannel("A"))
    return opaque


def resize(
    bands: Iterator[np.ndarray], raw: tuple[int, int], shape: tuple[int, int]
) -> Iterator[np.ndarray]:
    """Bands of an image of ``raw`` (rows, columns) become bands of one of ``shape``.

    Columns first, then rows, rounded to bytes each time: so a band needs no more than a few rows
    of its neighbours, and the result does not depend on where the bands begin.
    """
    if raw[1] != shape[1]:
        bands = resize_columns(bands, *mixture(raw[1], shape[1]))
    if raw[0] != shape[0]:
        bands = resize_rows(bands, *mixture(raw[0], shape[0]))
    return bands


def mixture(old: int, new: int) -> tuple[np.ndarray, np.ndarray]:
    """Which of the old lines make each new one, int (new, K), and with what weights, float32.

    As in OpenCV: averages of areas when shrinking, cubic splines when enlarging.
    """
    scale = old / new
    if new < old:
        start = np.arange(new)[:, None] * scale
        lines = np.floor(start).astype(int) + np.arange(np.ceil(scale) + 1, dtype=int)
        share = np.minimum(start + scale, lines + 1) - np.maximum(start, lines)
        weights = np.where(share > SLIVER, share, 0) / scale
    else:
        centre = (np.arange(new)[:, None] + 0.5) * scale - 0.5
        lines = np.floor(centre).astype(int) + np.arange(-1, 3)
        d = np.abs(lines - centre)
        near = ((CUBIC + 2) * d - (CUBIC + 3)) * d * d + 1
        far = ((CUBIC * d - 5 * CUBIC) * d + 8 * CUBIC) * d - 4 * CUBIC
        weights = np.where(d < 1, near, far)
    used = weights.any(axis=0)
    return lines.clip(0, old - 1)[:, used], weights[:, used].astype(np.float32)


def resize_columns(
    bands: Iterator[np.ndarray], lines: np.ndarray, weights: np.ndarray
) -> Iterator[np.ndarray]:
    for band in bands:
        yield cv2.transpose(mix(cv2.transpose(band), lines, weights))


def resize_rows(
    bands: Iterator[np.ndarray], lines: np.ndarray, weights: np.ndarray
) -> Iterator[np.ndarray]:
    done, first, held = 0, 0, None  # new rows; the old row that ``held`` starts with
    for band in bands:
        held = band if held is None else np.concatenate([held, band])
        ready = int(np.searchsorted(lines[:, -1], first + len(held)))
        for top in range(done, ready, BAND_PX):
            part = slice(top, min(top + BAND_PX, ready))
            yield mix(held, lines[part] - first, weights[part])
        done = ready
        needed = lines[done, 0] if done < len(lines) else first + len(held)
        held, first = held[needed - first :], needed


def mix(array: np.ndarray, lines: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Weighted sums of lines: uint8 (any, m, 3) -> uint8 (new, m, 3).

    In float32 and always in the same order, so that all machines give the same bytes.
    """
    result = np.empty((len(lines), *array.shape[1:]), np.uint8)
    step = max(1, VALUES_AT_ONCE // array[0].size)
    for top in range(0, len(lines), step):
        part = slice(top, top + step)
        shares = weights[part].T[..., None, None]
        total = array[lines[part, 0]] * shares[0]
        for line, share in zip(lines[part].T[1:], shares[1:], strict=True):
            total += array[line] * share
        result[part] = np.rint(total, out=total).clip(0, 255, out=total)
    return result


def pad(bands: Iterator[np.ndarray], shape: tuple[int, int]) -> Iterator[np.ndarray]:
    """Bands of an image of (rows, columns), padded with white to whole tiles."""
    rows, columns = padded_shape(shape)
    for band in bands:
        yield np.pad(band, ((0, 0), (0, columns - shape[1]), (0, 0)), constant_values=255)
    yield np.full((rows - shape[0], columns, 3), 255, np.uint8)


def regroup(bands: Iterator[np.ndarray], rows: int) -> Iterator[np.ndarray]:
    """The same image in bands of exactly ``rows``, but for the last."""
    held = None
    for band in bands:
        held = band if held is None else np.concatenate([held, band])
        while len(held) >= rows:
            yield held[:rows]
            held = held[rows:]
    if held is not None and len(held):
        yield held


def write_image(path: Path, shape: tuple[int, int], bands: Iterator[np.ndarray]) -> None:
    """Bands of BAND_PX rows (the last may have less) as one image of (rows, columns)."""
    write = write_png if path.suffix == ".png" else write_jpeg
    with path.open("wb") as file:
        write(file, shape, bands)


def write_jpeg(file: BinaryIO, shape: tuple[int, int], bands: Iterator[np.ndarray]) -> None:
    """Every band is a JPEG of its own, and their pixels follow each other behind one header.

    A restart marker after each row of blocks makes that possible: there the encoder starts anew.
    """
    for number, band in enumerate(bands):
        encoded = io.BytesIO()
        Image.fromarray(band).save(
            encoded, "JPEG", quality=JPEG_QUALITY, subsampling="4:4:4", restart_marker_rows=1
        )
        jpeg = encoded.getvalue()
        header = images.jpeg_header(jpeg)
        if number == 0:
            at = header.rows_at
            file.write(jpeg[:at] + struct.pack(">H", shape[0]) + jpeg[at + 2 : header.length])
        else:
            file.write(JPEG_RESTART)
        file.write(jpeg[header.length : -len(JPEG_END)])
    file.write(JPEG_END)


def write_png(file: BinaryIO, shape: tuple[int, int], bands: Iterator[np.ndarray]) -> None:
    def chunk(kind: bytes, content: bytes) -> None:
        file.write(struct.pack(">I", len(content)) + kind + content)
        file.write(struct.pack(">I", zlib.crc32(kind + content)))

    file.write(b"\x89PNG\r\n\x1a\n")
    chunk(b"IHDR", struct.pack(">IIBBBBB", shape[1], shape[0], 8, 2, 0, 0, 0))  # 8 bits, RGB
    packer = zlib.compressobj(PNG_LEVEL)
    for band in bands:
        rows = np.empty((len(band), 1 + 3 * shape[1]), np.uint8)
        rows[:, 0] = 1  # what follows are differences to the pixel on the left
        rows[:, 1:4] = band[:, 0]
        rows[:, 4:] = (band[:, 1:] - band[:, :-1]).reshape(len(band), -1)
        chunk(b"IDAT", packer.compress(rows.tobytes()))
    chunk(b"IDAT", packer.flush())
    chunk(b"IEND", b"")


def remove_other(stage: utils.Stage, name: str) -> None:
    """Remove the he.png of an earlier run when he.jpg comes, or the reverse.

    Two side by side are an error for all stages. So the old one goes last of all, but before the
    new one gets its name: a crash in between leaves none, which a rerun mends; two would need the
    user.
    """
    for other in set(utils.HE.names) - {name}:
        (stage.directory / other).unlink(missing_ok=True)


# -------------------------------------------------------------------------------------------------
# command line
# -------------------------------------------------------------------------------------------------
def build_parser() -> argparse.ArgumentParser:
    parser = utils.stage_parser(__doc__)
    parser.add_argument(
        "--max-megapixels",
        type=utils.positive,
        default=utils.MAX_MEGAPIXELS,
        metavar="N",
        help="Refuse images of more than N million pixels, before or after calibration.",
    )
    return parser


def main(stage: utils.Stage) -> None:
    stage.require(utils.HE_RAW, utils.PIXEL_SIZE_RAW, utils.LOCS_RAW)
    stage.optional(utils.RADIUS_RAW)
    stage.guard(utils.HE, utils.LOCS, utils.RADIUS, utils.PIXEL_SIZE)

    path = stage.path(utils.HE_RAW)
    pixel_size = plain.read_number(
        stage,
        stage.path(utils.PIXEL_SIZE_RAW),
        *PIXEL_SIZE_RANGE_UM,
        "um per pixel",
        FULL_RESOLUTION,
    )
    raw, pieces = check_image(stage, path)
    shape = calibrated_shape(raw, pixel_size)
    check_size(stage, path, raw, shape, pieces)
    radius = read_radius(stage, pixel_size)
    locs = tables.read_locs(stage, stage.path(utils.LOCS_RAW))
    n_inside = check_spots(stage, locs.to_numpy(), raw, pixel_size)
    geometry = report(path, pixel_size, raw, shape)

    bands = ahead(resize(ahead(read_bands(stage, path, pieces)), raw, shape))
    bands = pad(bands, shape)
    name = he_name(padded_shape(shape))
    with stage.writing(utils.HE, name) as partial:
        write_image(partial, padded_shape(shape), regroup(bands, BAND_PX))
    with stage.writing(utils.LOCS) as partial:
        scale_locs(locs, raw, shape).to_csv(partial, float_format="%.4f", lineterminator="\n")
    with stage.writing(utils.RADIUS) as partial:
        partial.write_text(f"{radius:.4f}\n", encoding="utf-8")
    with stage.writing(utils.PIXEL_SIZE) as partial:
        partial.write_text(f"{utils.PIXEL_SIZE_UM}\n", encoding="utf-8")
    remove_other(stage, name)
    stage.finish(**geometry, spots=len(locs), spots_inside=n_inside)


def run(argv=None) -> int:
    return utils.run_stage(main, SCRIPT, build_parser(), argv)


if __name__ == "__main__":
    sys.exit(run())
