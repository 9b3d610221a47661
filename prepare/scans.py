"""Slides and images of any kind, opened alike: a part is read without decoding the whole.

.svs, .ndpi, .mrxs and kin are read through OpenSlide; TIFF, BigTIFF, OME-TIFF and their pyramids
through tifffile; JPEG and PNG through libvips. A region is read from its own tiles, at the coarsest
level that serves the factor asked for. JPEG and PNG are decoded once, from 100 MB into a temporary
file.

Frames. x, y, width, height are pixels of full resolution, x to the right, y down; what lies off the
slide, or was not scanned, is white.
"""

from __future__ import annotations

import contextlib
import re
import sys
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any
from xml.etree import ElementTree

import cv2
import numpy as np
import pyvips

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import utils
from reading import pictures, plain, tiffs

OPENSLIDE_SUFFIXES = (
    ".svs", ".ndpi", ".mrxs", ".scn", ".bif", ".vms", ".vmu", ".svslide", ".czi", ".dcm",
)  # fmt: skip
TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # little and big endian, classic and BigTIFF
CACHE_BYTES = 256 * 2**20  # decoded tiles kept: a row of tiles is read by two strips in turn
BLOCK_PIXELS = 32 * 10**6  # of a level, held at a time while a region is shrunk
MAX_SEGMENT_BYTES = 4 * 10**9  # one tile or strip that decodes to more is an image without tiles
FINE_LEVEL = 8  # a level this much finer than asked for need not divide the factor: see best_level
MICROMETRES = {  # by the units of OME-XML
    "pm": 1e-6,
    "\u00c5": 1e-4,
    "\u212b": 1e-4,
    "nm": 1e-3,
    "um": 1.0,
    "\u00b5m": 1.0,
    "\u03bcm": 1.0,
    "mm": 1e3,
    "cm": 1e4,
    "dm": 1e5,
    "m": 1e6,
    "in": 25_400.0,
}
COLOURS, GREYS = {"RGB", "YCBCR"}, {"MINISBLACK"}  # of TIFF; grey pages may be red, green and blue
ALPHA = {1, 2}  # kinds of extra samples in TIFF
ONE_IMAGE = "Give the H&E image, not the fluorescence one, or save it as 8-bit RGB in one file."
RESOLUTION_UNITS = {2: 25_400.0, 3: 10_000.0}  # TIFF: um per inch and per centimetre
MAX_ANISOTROPY = 0.01  # relative difference of the pixel's width and height
FINEST_SHARE = 0.05  # he-raw may be this much coarser than 0.5 um per pixel
WHITE = 255
STRIP_PX = 512  # side of a tile of he-raw.tif; so many rows are in memory while it is written


# -------------------------------------------------------------------------------------------------
# slides
# -------------------------------------------------------------------------------------------------
class Slide:
    """What all backends share. They give ``read_level``; the rest follows from it."""

    def __init__(self, path: Path, sizes: list[tuple[int, int]], pixel_size_um: float | None):
        if min(sizes[0]) < 1:
            raise utils.broken(path, "has no pixels: its header tells {} x {}.".format(*sizes[0]))
        self.path = path
        self.size = sizes[0]  # width, height at full resolution
        self.pixel_size_um = pixel_size_um  # None if the metadata do not tell
        self.levels = usable_levels(sizes)  # factor -> number of the level in the file
        self.level_sizes = sizes

    @property
    def downsamples(self) -> tuple[int, ...]:
        """Factors of the levels that the file holds, finest first."""
        return tuple(self.levels)

    def read_level(self, level: int, x: int, y: int, width: int, height: int) -> np.ndarray:
        """uint8 (height, width, 3) of a rectangle that lies within a level, in px of the level."""
        raise NotImplementedError

    def read_region(
        self, x: int, y: int, width: int, height: int, downsample: int = 1
    ) -> np.ndarray:
        """uint8 (height // downsample, width // downsample, 3), areas averaged."""
        rows, columns = height // downsample, width // downsample
        if rows < 1 or columns < 1:
            return np.empty((max(rows, 0), max(columns, 0), 3), np.uint8)
        factor = self.best_level(downsample)
        if factor == downsample:
            return self._read_padded(factor, round(x / factor), round(y / factor), columns, rows)
        result = np.empty((rows, columns, 3), np.uint8)
        left, wide = round(x / factor), round(columns * downsample / factor)
        step = max(1, BLOCK_PIXELS // max(1, round(wide * downsample / factor)))
        for top in range(0, rows, step):
            bottom = min(top + step, rows)
            first = round((y + top * downsample) / factor)
            last = max(first + 1, round((y + bottom * downsample) / factor))
            block = self._read_padded(factor, left, first, wide, last - first)
            shape = (columns, bottom - top)
            result[top:bottom] = cv2.resize(block, shape, interpolation=cv2.INTER_AREA)
        return result

    def best_level(self, downsample: int) -> int:
        """The coarsest factor among the levels from which a downsample can be averaged.

        It divides the downsample, so that the pixels of both begin together; or it is so much finer
        that half a pixel of it does not show, as in a thumbnail.
        """
        return max(
            factor
            for factor in self.levels
            if downsample % factor == 0 or factor * FINE_LEVEL <= downsample
        )

    def thumbnail(self, max_side: int) -> np.ndarray:
        """The whole slide, its longer side at most ``max_side``: uint8 (height, width, 3)."""
        width, height = self.size
        shrink = max(1, -(-max(self.size) // max_side))
        return self.read_region(0, 0, max(width, shrink), max(height, shrink), shrink)

    def _read_padded(self, factor: int, x: int, y: int, width: int, height: int) -> np.ndarray:
        """A rectangle in px of a level, white where it lies off the level."""
        level = self.levels[factor]
        level_width, level_height = self.level_sizes[level]
        left, right = max(x, 0), min(x + width, level_width)
        top, bottom = max(y, 0), min(y + height, level_height)
        if (left, top, right, bottom) == (x, y, x + width, y + height) and width and height:
            return self._checked(level, x, y, width, height)
        region = np.full((height, width, 3), WHITE, np.uint8)
        if left < right and top < bottom:
            inner = self._checked(level, left, top, right - left, bottom - top)
            region[top - y : bottom - y, left - x : right - x] = inner
        return region

    def _checked(self, level: int, x: int, y: int, width: int, height: int) -> np.ndarray:
        try:
            return self.read_level(level, x, y, width, height)
        except utils.StageError:
            raise
        except Exception as error:  # damaged tiles raise whatever their decoder raises
            if plain.of_system(error):
                raise
            raise utils.broken(
                self.path, f"cannot be decoded at x {x}, y {y} of level {level}: {error!r:.200}"
            ) from error

    def close(self) -> None:
        pass

    def __del__(self) -> None:  # for those who look at one number of a slide and forget it
        with contextlib.suppress(Exception):  # never opened, or closed before
            self.close()

    def __enter__(self) -> Slide:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def usable_levels(sizes: list[tuple[int, int]]) -> dict[int, int]:
    """Whole factor -> level, of the levels that are copies of level 0 shrunk by a whole factor.

    Their sides may be rounded up or down to whole pixels or to whole pixels of the level before.
    """
    width, height = sizes[0]
    levels: dict[int, int] = {}
    for level, (w, h) in enumerate(sizes):
        factor = round(max(width, height) / max(w, h, 1)) if max(w, h) else 0
        if factor < 1 or factor in levels:
            continue
        if abs(width - factor * w) <= 2 * factor and abs(height - factor * h) <= 2 * factor:
            levels[factor] = level
    return dict(sorted(levels.items()))


class TiffSlide(Slide):
    """TIFF of any size, read tile by tile; RGB, with its samples together or on planes of their
    own."""

    def __init__(self, path: Path) -> None:
        import tifffile

        self.cache: OrderedDict[tuple[int, int, int], np.ndarray] = OrderedDict()
        self.cached = 0
        self.file = path.open("rb")
        self.tiff = tifffile.TiffFile(self.file, name=path.name)
        tiffs.check_chain(self.tiff)
        self.pages = tiff_levels(self.tiff)  # per level: one page, or one for each of R, G, B
        for pages in self.pages:
            check_tiff_page(pages)
        sizes = [(pages[0].imagewidth, pages[0].imagelength) for pages in self.pages]
        super().__init__(path, sizes, tiff_pixel_size(self.tiff, self.pages[0][0]))

    def read_level(self, level: int, x: int, y: int, width: int, height: int) -> np.ndarray:
        pages = self.pages[level]
        samples = max(len(pages), pages[0].samplesperpixel)
        region = np.full((height, width, samples), WHITE, np.uint8)
        for number, page in enumerate(pages):
            rows, columns = segment_shape(page)
            across = -(-page.imagewidth // columns)
            down = -(-page.imagelength // rows)
            planes = samples if page.planarconfig == 2 and len(pages) == 1 else 1
            for plane in range(planes):
                for row in range(y // rows, -(-(y + height) // rows)):
                    for column in range(x // columns, -(-(x + width) // columns)):
                        index = (plane * down + row) * across + column
                        segment = self.segment(level, number, index)
                        if segment is None:
                            continue
                        channel = number if len(pages) > 1 else plane if planes > 1 else None
                        put(region, segment, (row * rows - y, column * columns - x), channel)
        if samples == 4 and not has_alpha(pages[0]):
            region = region[..., :3]
        return opaque_rgb(region)

    def segment(self, level: int, number: int, index: int) -> np.ndarray | None:
        """A decoded tile or strip (rows, columns, samples); None if it was never written."""
        key = (level, number, index)
        if key in self.cache:
            self.cache.move_to_end(key)
            return self.cache[key]
        page = self.pages[level][number]
        offset, n_bytes = page.dataoffsets[index], page.databytecounts[index]
        if n_bytes == 0:
            return None
        self.tiff.filehandle.seek(offset)
        data = self.tiff.filehandle.read(n_bytes)
        if len(data) != n_bytes:
            raise utils.broken(self.path, f"is cut off: {n_bytes - len(data)} bytes are missing.")
        decoded = page.decode(data, index, jpegtables=page.jpegtables)[0]
        segment = np.asarray(decoded).reshape(decoded.shape[-3:])
        self.cache[key] = segment
        self.cached += segment.nbytes
        while self.cached > CACHE_BYTES and len(self.cache) > 1:
            self.cached -= self.cache.popitem(last=False)[1].nbytes
        return segment

    def close(self) -> None:
        self.cache.clear()
        self.file.close()


class OpenSlideSlide(Slide):
    """The scanners' own formats."""

    def __init__(self, path: Path) -> None:
        openslide = import_openslide()
        self.slide = openslide.OpenSlide(str(path))
        properties = self.slide.properties
        sides = [properties.get(f"openslide.mpp-{axis}") for axis in "xy"]
        size = sane_pixel_size(*(float(side) if side else None for side in sides))
        super().__init__(path, list(self.slide.level_dimensions), size)

    def read_level(self, level: int, x: int, y: int, width: int, height: int) -> np.ndarray:
        step = self.slide.level_downsamples[level]  # OpenSlide takes the corner in px of level 0
        corner = (round(x * step), round(y * step))
        return opaque_rgb(np.asarray(self.slide.read_region(corner, level, (width, height))))

    def close(self) -> None:
        self.slide.close()


class PictureSlide(Slide):
    """JPEG or PNG: one level, decoded once, when its first rows are read."""

    def __init__(self, path: Path) -> None:
        image = pictures.open_picture(path, access="random")
        if image.width * image.height > utils.MAX_MEGAPIXELS * 10**6:
            raise pictures.Misfit(
                f"has {image.width} x {image.height} px; JPEG and PNG, which are decoded whole, "
                f"are read up to {utils.MAX_MEGAPIXELS} million pixels.",
                "Save it as a tiled TIFF, of which any size is read.",
            )
        pictures.check(image, path)
        self.image, _ = pictures.to_rgb(image, path)
        super().__init__(path, [(image.width, image.height)], None)

    def read_level(self, level: int, x: int, y: int, width: int, height: int) -> np.ndarray:
        return self.image.crop(x, y, width, height).numpy()

    def thumbnail(self, max_side: int) -> np.ndarray:
        """As of any slide, but a JPEG is decoded at a fraction of its size."""
        try:
            return pictures.shrunk(self.path, max_side)
        except pyvips.Error as error:
            raise utils.broken(self.path, f"cannot be decoded: {pictures.reason(error)}") from error


def open_slide(path: Path) -> Slide:
    """The slide or image at ``path``, opened, not loaded. StageError if it cannot be read."""
    path = Path(path)
    try:
        with path.open("rb") as file:
            start = file.read(4)
        if path.suffix.lower() in OPENSLIDE_SUFFIXES:
            return OpenSlideSlide(path)
        if start in TIFF_STARTS:
            return TiffSlide(path)
        return PictureSlide(path)
    except (utils.StageError, ImportError):
        raise
    except pictures.Misfit as misfit:
        remedy = f"{misfit.remedy} Then run the same command."
        raise utils.StageError(f"{path} {misfit.problem}", remedy) from misfit
    except FileNotFoundError as error:
        raise utils.StageError(f"{path} is missing.", "Give the H&E image by --image.") from error
    except Exception as error:  # damaged headers raise nearly anything
        if plain.of_system(error):
            raise
        raise utils.broken(path, f"is no whole slide or image: {error!r:.300}") from error


def import_openslide() -> ModuleType:
    try:
        import openslide
    except (ImportError, OSError) as error:
        raise utils.StageError(
            f"OpenSlide is needed for the scanners' own formats, but is not there: {error}",
            "Run: python -m pip install openslide-python openslide-bin",
        ) from error
    return openslide


# -------------------------------------------------------------------------------------------------
# TIFF
# -------------------------------------------------------------------------------------------------
def tiff_levels(tiff: Any) -> list[list[Any]]:
    """Pages of each level of the largest image in a TIFF, full resolution first.

    Pyramids are kept in SubIFDs (OME-TIFF, QuPath, Xenium), or as pages one after the other.
    """
    if any(page is None for series in tiff.series for level in series.levels for page in level):
        raise pictures.Misfit("keeps its channels in several files.", ONE_IMAGE)
    largest = max(tiff.series, key=lambda s: s.pages[0].imagewidth * s.pages[0].imagelength)
    levels = [list(level.pages) for level in largest.levels]
    if not tiff.is_ome:  # which may hold the levels of other images, too
        levels += [list(s.pages) for s in tiff.series if s is not largest and s.pages[0].is_reduced]
    levels = [[page.aspage() for page in pages] for pages in levels]
    kinds = [(len(pages), pages[0].samplesperpixel, pages[0].dtype) for pages in levels]
    same = [pages for pages, kind in zip(levels, kinds, strict=True) if kind == kinds[0]]
    return sorted(same, key=lambda pages: -pages[0].imagewidth)


def check_tiff_page(pages: list[Any]) -> None:
    """Raise Misfit unless a level is an H&E image that is read tile by tile, as it is stored."""
    page, n = pages[0], len(pages)
    pictures.check_orientation(int(page.tags.valueof("Orientation", 1)))
    if page.imagedepth > 1 or (n > 1 and page.samplesperpixel > 1):
        raise pictures.Misfit("is a stack of several images of one size.", "Save one of them.")
    samples = n if n > 1 else page.samplesperpixel
    photometric = getattr(page.photometric, "name", str(page.photometric))
    known = {1: GREYS, 3: COLOURS | GREYS, 4: COLOURS if n == 1 else set()}
    if photometric not in known.get(samples, ()) or page.dtype != np.uint8:
        raise pictures.Misfit(
            f"holds {samples} channels of {page.dtype}, {photometric}; expected an H&E image with "
            f"three channels (RGB) of 8 bits.",
            ONE_IMAGE,
        )
    rows, columns = segment_shape(page)
    planes = page.samplesperpixel if page.planarconfig == 2 else 1
    segments = -(-page.imagelength // rows) * -(-page.imagewidth // columns) * planes
    if any(len(other.dataoffsets) < segments for other in pages):
        raise ValueError(f"{segments} tiles or strips declared, {len(page.dataoffsets)} there")
    if rows * columns * page.samplesperpixel > MAX_SEGMENT_BYTES:
        raise pictures.Misfit(
            f"keeps {columns} x {rows} px in one piece, which is decoded whole.",
            "Save it as a tiled TIFF.",
        )


def has_alpha(page: Any) -> bool:
    """True if a TIFF says that its fourth channel is alpha; else it has no meaning."""
    return any(int(kind) in ALPHA for kind in page.extrasamples)


def segment_shape(page: Any) -> tuple[int, int]:
    """Rows and columns of a tile or strip."""
    if page.is_tiled:
        return page.tilelength, page.tilewidth
    return min(page.rowsperstrip, page.imagelength), page.imagewidth


def put(
    region: np.ndarray, segment: np.ndarray, corner: tuple[int, int], channel: int | None
) -> None:
    """Copy what of a segment lies in the region; ``corner`` is its (row, col) in the region."""
    (row, column), (height, width) = corner, region.shape[:2]
    top, left = max(row, 0), max(column, 0)
    bottom = min(row + segment.shape[0], height)
    right = min(column + segment.shape[1], width)
    if top >= bottom or left >= right:
        return
    part = segment[top - row : bottom - row, left - column : right - column]
    if channel is None:
        region[top:bottom, left:right] = part
    else:
        region[top:bottom, left:right, channel] = part[..., 0]


def opaque_rgb(pixels: np.ndarray) -> np.ndarray:
    """uint8 (rows, columns, 1, 3 or 4) as RGB; what is transparent is laid on white."""
    if pixels.shape[2] == 1:
        return np.repeat(pixels, 3, axis=2)
    if pixels.shape[2] == 3:
        return pixels
    alpha = pixels[..., 3]
    rgb = np.ascontiguousarray(pixels[..., :3])
    clear = alpha < WHITE
    if clear.any():
        share = alpha[clear][:, None] / WHITE
        rgb[clear] = np.round(rgb[clear] * share + WHITE * (1 - share)).astype(np.uint8)
    return rgb


def tiff_pixel_size(tiff: Any, page: Any) -> float | None:
    """um per pixel from OME-XML, or else from the resolution of the first page if it is sane."""
    if tiff.is_ome and tiff.ome_metadata:
        size = ome_pixel_size(tiff.ome_metadata, page.imagewidth)
        if size is not None:
            return size
    try:
        unit = RESOLUTION_UNITS.get(int(page.tags["ResolutionUnit"].value))
        sides = [unit / (n / d) for n, d in (page.tags[f"{axis}Resolution"].value for axis in "XY")]
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return None
    return sane_pixel_size(*sides)


def ome_pixel_size(xml: str, width: int) -> float | None:
    """PhysicalSizeX and Y in um of the image of ``width`` px; of the first if none has it."""
    try:
        root = ElementTree.fromstring(xml)  # expat bounds what entities become  # nosec B314
    except ElementTree.ParseError:
        return None
    pixels = [node for node in root.iter() if re.sub(r"^\{.*\}", "", node.tag) == "Pixels"]
    pixels.sort(key=lambda node: node.get("SizeX") != str(width))
    if not pixels:
        return None

    def side(axis: str) -> float | None:
        unit = MICROMETRES.get(pixels[0].get(f"PhysicalSize{axis}Unit", "um"))
        value = pixels[0].get(f"PhysicalSize{axis}", "")
        return float(value) * unit if unit and plain.is_number(value) else None

    return sane_pixel_size(side("X"), side("Y"))


def sane_pixel_size(x: float | None, y: float | None) -> float | None:
    """um per pixel if both sides agree and a microscope could have made it; else None.

    Many programs write 72 or 96 per inch, which is no more than a habit of theirs.
    """
    x = y if x is None else x
    y = x if y is None else y
    if x is None or y is None or not utils.MIN_PIXEL_SIZE_UM <= x <= utils.MAX_PIXEL_SIZE_UM:
        return None
    return x if abs(x / y - 1) <= MAX_ANISOTROPY else None


# -------------------------------------------------------------------------------------------------
# he-raw.tif
# -------------------------------------------------------------------------------------------------
@dataclass
class Region:
    """A rectangle of a slide; x, y and sides in px of its full resolution."""

    slide: Slide
    x: int
    y: int
    width: int
    height: int
    downsample: int = 1

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the image that is written."""
        return self.height // self.downsample, self.width // self.downsample

    def read(self, top: int, bottom: int, shrink: int = 1) -> np.ndarray:
        """Rows top to bottom of the image written, shrunk by a further whole factor."""
        step = self.downsample
        height, width = ((side // shrink) * shrink for side in (bottom - top, self.shape[1]))
        return self.slide.read_region(
            self.x, self.y + top * step, width * step, height * step, step * shrink
        )


def write_tiff(image: np.ndarray | Region, path: Path) -> None:
    """A lossless tiled TIFF, written a row of tiles at a time."""
    import tifffile

    shape = image.shape[:2]
    with tifffile.TiffWriter(path, bigtiff=3 * shape[0] * shape[1] > 2**31) as tiff:
        tiff.write(
            tiles(image), shape=(*shape, 3), dtype=np.uint8, photometric="rgb",
            tile=(STRIP_PX, STRIP_PX), compression="zlib", metadata=None,
        )  # fmt: skip


def tiles(image: np.ndarray | Region) -> Iterator[np.ndarray]:
    """Tiles of STRIP_PX square, row by row, those at the edges filled up with white."""
    rows, columns = image.shape[:2]
    for top in range(0, rows, STRIP_PX):
        bottom = min(top + STRIP_PX, rows)
        strip = image.read(top, bottom) if isinstance(image, Region) else image[top:bottom]
        for left in range(0, columns, STRIP_PX):
            tile = np.full((STRIP_PX, STRIP_PX, 3), 255, np.uint8)
            part = strip[:, left : left + STRIP_PX]
            tile[: part.shape[0], : part.shape[1]] = part
            yield tile


def whole_factor(pixel_size_um: float) -> int:
    """By which he-raw is shrunk: as far as it stays about as fine as 0.5 um per pixel."""
    return max(1, int(utils.PIXEL_SIZE_UM / pixel_size_um + FINEST_SHARE))
