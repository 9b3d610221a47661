"""Pictures of any kind through libvips: opened, checked, brought to 8-bit sRGB, a band at a time.

libvips decodes a JPEG, a PNG or the first page of a TIFF from the top down, as far as rows are
asked for, so that a slide of any size fits the memory. It reads 8 and 16 bits a channel; grey,
palette, RGB and CMYK; alpha; tiles, strips and BigTIFF. What would mislead is refused by ``check``,
what is converted is told by ``to_rgb``, and a truncated or corrupt file is an error (pyvips.Error),
at the latest when its rows are decoded: never grey rows.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import mmap
import os
import re
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pyvips
from PIL import ExifTags, Image

from reading import cli, plain

logging.getLogger("pyvips").setLevel(logging.CRITICAL)  # its warnings come back as errors
pyvips.cache_set_max(0)  # it would answer for a file that was replaced since
MAX_THREADS = 8  # each holds bands of its own; the decoder of one file cannot serve more
pyvips.concurrency_set(min(pyvips.concurrency_get(), MAX_THREADS))
pyvips.operation_block_set("VipsForeignLoad", True)  # no other decoder ever sees the bytes
for _kind in ("Jpeg", "Png", "Tiff"):
    pyvips.operation_block_set(f"VipsForeignLoad{_kind}", False)

COLOURS = {"srgb": 3, "rgb16": 3, "b-w": 1, "grey16": 1, "cmyk": 4}  # channels without alpha
DARK = 2**13  # of 65535: 12-bit cameras write values below it
SRGB_TOLERANCE = 2  # levels: profiles that call themselves sRGB differ by as much
JPEG_END = b"\xff\xd9"
TAIL_BYTES = 2**16  # of a PNG, where a writer may put what it did not know before the pixels
AS_STORED = (
    "If the spots fit the pixels as stored, strip the tag (exiftool -Orientation= FILE); "
    "else save the picture turned."
)
AS_RGB = "Save it as 8-bit RGB."
AS_KNOWN = "Open it in an image program and save it, in its full size, as PNG or TIFF."
START_BYTES = 132
KINDS = {  # how files begin that libvips is not to read, and what they are
    rb"RIFF....WEBP": "a WebP image",
    rb"BM....\0\0\0\0": "a BMP image",
    rb"GIF8": "a GIF image",
    rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51": "a JPEG 2000 image",
    rb"\0\0\0\x0cJXL |\xff\x0a": "a JPEG XL image",
    rb"....ftyp": "a HEIC or AVIF image, or a film",
    rb"P[1-7]\s": "a PPM, PGM or PBM image",
    rb"8BPS": "a Photoshop document",
    rb"%PDF": "a PDF document",
    rb"\0\0\x01\0": "an icon",
    rb"ZISRAWFILE": "a Zeiss slide (.czi)",
    rb".{128}DICM": "a DICOM image",
    rb"(?i:\s*<(\?xml|svg))": "an SVG or another XML file",
    **{re.escape(sign): kind for sign, kind in plain.OTHER_KINDS.items()},
}


class Misfit(ValueError):
    """Why an undamaged picture is not taken, as the rest of a sentence, and what to do."""

    def __init__(self, problem: str, remedy: str = AS_RGB) -> None:
        super().__init__(problem)
        self.problem, self.remedy = problem, remedy


def open_picture(path: Path, access: str = "sequential") -> pyvips.Image:
    """The header; pixels are decoded later. Misfit if it is of a kind that is not read.

    By ``access`` "random", rows may be asked for in any order: the picture is then decoded once,
    into memory or, from 100 MB, a temporary file.
    """
    options = {"access": access, "fail_on": "warning"}
    try:
        image = pyvips.Image.new_from_file(str(path), **options)
    except pyvips.Error as error:
        if kind := kind_of(path):
            problem = f"is {kind}, whatever its name says; expected JPEG, PNG or TIFF."
            raise Misfit(problem, AS_KNOWN) from error
        raise
    if max(image.width, image.height) > MAX_SIDE_PX:
        raise pyvips.Error(
            f"its header says {image.width} x {image.height} px; no slide has a side of more than "
            f"{MAX_SIDE_PX:,} px"
        )
    kind = image.get("vips-loader")
    if kind.startswith("tiff"):
        check_orientation(tiff_header(path)[0])
        # unlimited: a strip may be as large as the image
        return pyvips.Image.tiffload(str(path), unlimited=True, **options)
    if kind.startswith("jpeg"):
        if is_filled_up(path):
            raise pyvips.Error("the end of the JPEG is missing: it is filled up with zeros")
        return pyvips.Image.new_from_source(in_pieces(path), "", **options)
    return image


def kind_of(path: Path) -> str | None:
    """What a file that is no JPEG, PNG or TIFF is by its first bytes; None if it is not known."""
    with path.open("rb") as file:
        start = file.read(START_BYTES)
    known = (kind for sign, kind in KINDS.items() if re.match(sign, start, re.DOTALL))
    return next(known, None)


MAX_SIDE_PX = 1_000_000  # 25 cm at 40x; a row or column of one tile takes memory by it
SYSTEM_ERRORS = (
    errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EACCES, errno.EPERM, errno.EROFS, errno.EBUSY,
    getattr(errno, "ESTALE", errno.EIO), errno.ENOENT,
)  # fmt: skip
failures: list[OSError] = []  # of reading a file for libvips: nothing is raised through C


def in_pieces(path: Path) -> pyvips.Source:
    """A file that is read as it is decoded: libvips maps a JPEG, which takes memory for all of it.

    The file is closed when the last image that comes of it goes.
    """
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))

    def read(n: int) -> bytes:
        try:
            return os.read(descriptor, n)
        except KeyboardInterrupt as error:
            cli.send_again(type(error))
            return os.read(descriptor, n)
        except OSError as error:
            failures.append(error)
            return b""  # libvips takes it for the end of the file, and asks why: see reason

    source = pyvips.SourceCustom()
    source.on_read(read)
    source.on_seek(lambda offset, whence: os.lseek(descriptor, offset, whence))
    weakref.finalize(source, os.close, descriptor)
    return source


def is_filled_up(path: Path) -> bool:
    """True if a JPEG goes over into zeros before its end, as broken copies do: those decode."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return data[-1] == 0 and data[data.rfind(JPEG_END) + 2 :].strip(b"\0") != b""


def reason(error: pyvips.Error) -> str:
    """The first thing that libvips says about a failure; it may say it a hundred times.

    Raises the error of the system that was behind it, a full disk say, if one was.
    """
    if failures:
        first = failures[0]
        failures.clear()  # libvips asks more than once; the next picture may have another trouble
        raise first from error
    for code in SYSTEM_ERRORS:
        if os.strerror(code) in (error.detail or ""):
            raise OSError(code, os.strerror(code)) from error
    lines = [line.strip() for line in (error.detail or error.message).splitlines()]
    return next((line for line in lines if line), "no reason given").rstrip(".")


def fact(image: pyvips.Image, name: str, default: Any) -> Any:
    return image.get(name) if image.get_typeof(name) else default


def orientation(image: pyvips.Image, path: Path) -> int:
    """By EXIF: 1 if the picture is to be shown as it is stored. A PNG may keep it at its end."""
    known = fact(image, "orientation", None)
    if known is None and image.get("vips-loader").startswith("png"):
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - TAIL_BYTES))
            _, found, content = file.read().rpartition(b"eXIf")
        exif = Image.Exif()
        if found:
            with contextlib.suppress(Exception):  # chance bytes of the pixels, no EXIF
                exif.load(content)
        known = exif.get(ExifTags.Base.Orientation)
    return known or 1


def tiff_header(path: Path) -> tuple[int, str]:
    """Orientation as it is written, even where it is none of TIFF's, and Pillow's word for the
    kind of pixels: of both, libvips tells less. 1 and "" of a header that Pillow cannot read."""
    from PIL.TiffImagePlugin import TiffImageFile  # reads the header of any size, as open does not

    try:
        with TiffImageFile(path) as header:
            value = header.tag_v2.get(ExifTags.Base.Orientation)
            return value if isinstance(value, int) else 1, header.mode
    except Exception as error:  # damaged bytes can raise nearly anything; libvips will tell
        if plain.of_system(error):
            raise
        return 1, ""


def turned(known: int) -> str:
    """Why an orientation other than 1 is not taken, as the rest of a sentence."""
    if known in range(2, 9):
        return f"has EXIF orientation {known}, so viewers turn it; expected 1 or none"
    return f"has orientation {known}, which no standard knows (1 to 8); expected 1 or none"


def check_orientation(known: int) -> None:
    """Raise Misfit if a picture of any format is to be shown in another way than it is stored."""
    if known != 1:
        problem = f"{turned(known)}: spots refer to the pixels as stored."
        raise Misfit(problem, AS_STORED)


def check(image: pyvips.Image, path: Path) -> None:
    """Raise Misfit if the pixels would mislead, by the header and, of 16 bits, by the values."""
    check_orientation(orientation(image, path))
    if fact(image, "bits-per-sample", 8) == 1 and not fact(image, "palette", 0):
        raise Misfit("has 1 bit a pixel; expected RGB of 8 or 16 bits a channel.")
    if image.format not in ("uchar", "ushort"):
        raise Misfit(f"has pixels of kind {image.format}; expected RGB of 8 or 16 bits a channel.")
    if image.bands - image.hasalpha() != COLOURS.get(image.interpretation):
        raise Misfit(
            f"has {image.bands} channels of kind {image.interpretation}; expected RGB, grey or "
            f"CMYK, each with or without alpha."
        )
    if image.format == "ushort" and (top := open_picture(path).max()) < DARK:
        raise Misfit(
            f"has 16 bits a channel, but no value above {top:.0f}: it would come out nearly black.",
            "Save it so that white is 65535, or as 8-bit RGB.",
        )
    for number in range(1, fact(image, "n-pages", 1)):
        page = pyvips.Image.tiffload(str(path), page=number, unlimited=True)
        if page.width * page.height > image.width * image.height:
            raise Misfit(
                f"starts with a page of {image.width} x {image.height} px, but page {number + 1} "
                f"is larger ({page.width} x {page.height} px).",
                "Save the full-resolution page alone.",
            )
        if page.bands == 1 and (page.width, page.height) == (image.width, image.height):
            raise Misfit(
                "keeps its channels on separate grey pages.", "Save it as one page of 8-bit RGB."
            )


def to_rgb(image: pyvips.Image, path: Path) -> tuple[pyvips.Image, str]:
    """The picture in 8-bit sRGB, and what was converted, in words; "" if nothing was.

    16 bits are cut to the upper 8. Alpha is laid on white. A colour profile is applied, unless it
    says no more than sRGB; CMYK without one is taken for a common kind of print.
    """
    kind, wide = image.interpretation, image.format == "ushort"
    said = ["palette"] if fact(image, "palette", 0) else []
    said += ["16 bit"] if wide else []
    said += {1: ["grey"], 4: ["CMYK"]}.get(COLOURS[kind], [])
    ground = ""
    if image.hasalpha():
        if fourth_has_no_meaning(image, path):
            said.append("a channel without meaning, left out")
            image = image[: image.bands - 1]
        else:
            said.append("alpha")
            ground = " on white"
            white = 0 if kind == "cmyk" else 65535 if wide else 255
            image = image.flatten(background=white)
    profile = fact(image, "icc-profile-data", None)
    if kind == "cmyk" or (profile is not None and not is_srgb(image)):
        said.append("colour profile" if profile is not None else "no colour profile")
        image = from_profile(image)
    elif kind != "srgb":
        image = image.colourspace("srgb")
    return image, f"{', '.join(said)}, converted to RGB{ground}" if said else ""


def fourth_has_no_meaning(image: pyvips.Image, path: Path) -> bool:
    """True if a TIFF does not say of its fourth channel that it is alpha; libvips would take it."""
    return image.get("vips-loader").startswith("tiff") and tiff_header(path)[1] in ("RGB", "RGBX")


def from_profile(image: pyvips.Image) -> pyvips.Image:
    fallback = "cmyk" if image.interpretation == "cmyk" else "srgb"
    return image.icc_transform("srgb", embedded=True, input_profile=fallback)


def is_srgb(image: pyvips.Image) -> bool:
    """True if the profile of a grey or RGB image changes no colour, or cannot be used at all."""
    channels = COLOURS[image.interpretation]
    levels = np.arange(0, 256, 51 if channels == 3 else 1, dtype=np.uint8)
    colours = np.stack(np.meshgrid(*[levels] * channels), axis=-1).reshape(1, -1, channels)
    sample = pyvips.Image.new_from_array(colours, interpretation="srgb" if channels == 3 else "b-w")
    sample = sample.copy()
    sample.set_type(pyvips.GValue.blob_type, "icc-profile-data", image.get("icc-profile-data"))
    try:
        seen = from_profile(sample).numpy().astype(int)
    except pyvips.Error:
        return True
    return bool(np.abs(seen - colours).max() <= SRGB_TOLERANCE)


def some_rows(image: pyvips.Image, top: int, bottom: int) -> np.ndarray:
    """Rows top..bottom - 1 of an RGB image, uint8 (n, columns, 3)."""
    return image.crop(0, top, image.width, bottom - top).numpy()


def shrunk(path: Path, longest_px: int) -> np.ndarray:
    """A picture with sides of at most ``longest_px``, uint8 (rows, columns, 3); not enlarged."""
    open_picture(path)  # for its checks
    image = pyvips.Image.thumbnail(
        str(path), longest_px, height=longest_px, size="down", no_rotate=True, fail_on="warning"
    )
    return to_rgb(image, path)[0].numpy()
