"""he.jpg and mask.png."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import Image

from utils import HE, MASK, MASKING, MAX_HE_PIXELS, TILE_PX, TOKEN_PX, Stage

Image.MAX_IMAGE_PIXELS = MAX_HE_PIXELS  # Pillow's own limit is below the size of a slide


BLOCK_PX = 8  # side of a JPEG's blocks where the colours have full resolution
RESTART, END = 0xD0, 0xD9  # second bytes of JPEG markers; restarts count from 0xD0 to 0xD7
LONGEST_HEADER = 2**16  # bytes; what image_calibration.py writes has 600
SEARCHED_AT_ONCE = 2**24  # bytes, for markers
BAD_IMAGE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


class JpegHeader(NamedTuple):
    """Of a JPEG whose rows of blocks can be decoded one by one."""

    rows: int  # of pixels
    columns: int
    rows_at: int  # byte at which the header says how many rows there are, in two bytes
    length: int  # bytes before the pixels


def jpeg_header(data: bytes) -> JpegHeader | None:
    """The header, if each row of blocks stands alone, as image_calibration.py writes them.

    That is: one pass (baseline), colours at full resolution, a restart marker after every row.
    None for any other JPEG, and for what is no JPEG.
    """
    content: dict[int, int] = {}  # first byte of what a segment holds, by the segment's marker
    at = 2
    while 0xDA not in content and data[at : at + 1] == b"\xff" and at + 4 <= len(data):
        content[data[at + 1]] = at + 4
        at += 2 + int.from_bytes(data[at + 2 : at + 4])
    if data[:2] != b"\xff\xd8" or not content.keys() >= {0xC0, 0xDD, 0xDA} or at > len(data):
        return None
    frame, scan = data[content[0xC0] :][:15], data[content[0xDA] :][:1]
    rows, columns = int.from_bytes(frame[1:3]), int.from_bytes(frame[3:5])
    interval = int.from_bytes(data[content[0xDD] :][:2])
    bits, colours, sampling = frame[:1], frame[5:6], frame[7::3]
    if (bits, colours, sampling, scan) != (b"\x08", b"\x03", b"\x11\x11\x11", b"\x03"):
        return None
    if rows * columns == 0 or interval != -(-columns // BLOCK_PX):
        return None
    return JpegHeader(rows, columns, content[0xC0] + 1, at)


def rows_of_blocks(file: BinaryIO, header: JpegHeader) -> list[int]:
    """Byte at which each row of blocks starts, and that at which the last one ends."""
    n = -(-header.rows // BLOCK_PX)
    expected = bytes(RESTART + row % 8 for row in range(n - 1)) + bytes([END])
    found, starts, tail = b"", [header.length], b""
    at = file.seek(header.length)
    while len(found) < n and (chunk := tail + file.read(SEARCHED_AT_ONCE)) != tail:
        for match in re.finditer(rb"\xff([^\x00])", chunk):  # 255 in a pixel is followed by 0
            found += match[1]
            starts.append(at + match.end())
        tail = b"\xff" if chunk.endswith(b"\xff") else b""
        at += len(chunk) - len(tail)
    for row in range(n):
        if found[row : row + 1] != expected[row : row + 1]:
            raise OSError(f"truncated or damaged near row {row * BLOCK_PX} of {header.rows}")
    return starts[: n + 1]


class ImageRows:
    """An RGB image that is decoded where it is sliced: image[top:bottom] is uint8 (n, columns, 3).

    Of he.jpg as image_calibration.py writes it, only the rows asked for are in memory. Any other
    image is decoded when it is opened, and kept at 4 bytes a pixel. A truncated or damaged file is
    an error, never grey rows. One thread may slice at a time.
    """

    def __init__(self, stage: Stage, path: Path) -> None:
        self.stage, self.path = stage, path
        with self.checked(), contextlib.ExitStack() as opened:
            self.file = opened.enter_context(path.open("rb"))
            head = self.file.read(LONGEST_HEADER)
            self.header = jpeg_header(head)
            if self.header is None:
                with Image.open(path) as self.picture:
                    self.picture.load()
                rows, columns = self.picture.height, self.picture.width
            else:
                self.head = head[: self.header.length]
                self.starts = rows_of_blocks(self.file, self.header)
                rows, columns = self.header[:2]
            self.shape = (rows, columns, 3)
            opened.pop_all()

    def __enter__(self) -> ImageRows:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> np.ndarray:
        top, bottom, step = rows.indices(len(self))
        if step != 1:
            raise IndexError("an image is sliced as image[top:bottom]")
        if bottom <= top:
            return np.empty((0, *self.shape[1:]), np.uint8)
        with self.checked():
            if self.header is None:
                box = (0, top, self.shape[1], bottom)
                return np.asarray(self.picture.crop(box).convert("RGB"))
            first = top // BLOCK_PX
            decoded = self.decode(self.header, first, -(-bottom // BLOCK_PX))
        return decoded[top - first * BLOCK_PX : bottom - first * BLOCK_PX]

    def decode(self, header: JpegHeader, first: int, last: int) -> np.ndarray:
        """Rows of blocks first..last - 1, as a JPEG of its own with markers that count anew."""
        start, end = self.starts[first], self.starts[last]
        self.file.seek(start)
        jpeg = bytearray(self.head + self.file.read(end - start))
        rows = min(last * BLOCK_PX, header.rows) - first * BLOCK_PX
        jpeg[header.rows_at : header.rows_at + 2] = rows.to_bytes(2)
        for row in range(first, last):
            marker = self.starts[row + 1] - 1 - start + header.length
            jpeg[marker] = END if row == last - 1 else RESTART + (row - first) % 8
        with Image.open(io.BytesIO(jpeg), formats=("JPEG",)) as image:
            return np.asarray(image)

    @contextlib.contextmanager
    def checked(self) -> Iterator[None]:
        try:
            yield
        except BAD_IMAGE as error:
            raise self.stage.error(self.path, f"is not a whole image: {error}") from error


def read_rgb(stage: Stage, path: Path) -> np.ndarray:
    """An RGB image as uint8 (rows, columns, 3); a truncated file is an error, never grey rows."""
    with ImageRows(stage, path) as image:
        rgb = np.empty(image.shape, np.uint8)
        for top in range(0, len(image), TILE_PX):  # a whole copy at a time would be three
            rgb[top : top + TILE_PX] = image[top : top + TILE_PX]
        return rgb


def grid_shape(stage: Stage) -> tuple[int, int]:
    """Rows and columns of superpixels of he.jpg, from its header alone."""
    path = stage.path(HE)
    try:
        with Image.open(path) as image:
            width, height = image.size
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise stage.error(path, f"is not an image: {error}") from error
    if width % TILE_PX or height % TILE_PX:
        raise stage.error(
            path, f"is {width} x {height} px; both sides must be multiples of {TILE_PX} px."
        )
    return height // TOKEN_PX, width // TOKEN_PX


def read_mask(stage: Stage, shape: tuple[int, int]) -> np.ndarray:
    """Tissue (h, w) bool from mask.png: whatever is not black or transparent, in any image mode.

    The picture has a pixel a superpixel, or a whole multiple of that.
    """
    path = stage.path(MASK)
    try:
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGBA"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise stage.error(path, f"is not a readable image: {error}") from error
    painted = (pixels[..., :3] > 0).any(axis=-1) & (pixels[..., 3] > 0)
    times = max(1, painted.shape[0] // shape[0])
    if painted.shape != (shape[0] * times, shape[1] * times):
        raise stage.error(
            path,
            f"is {painted.shape[1]} x {painted.shape[0]} px; expected {shape[1]} x {shape[0]} px, "
            f"one a superpixel (or a whole multiple of that).",
        )
    tissue = painted.reshape(shape[0], times, shape[1], times).mean(axis=(1, 3)) >= 0.5
    if not tissue.any():
        raise stage.error(
            path,
            "is all black, which leaves no tissue.",
            f"Paint the tissue white, or remove the file and run: {stage.command(MASKING)}",
        )
    if tissue.all():
        print(f"warning: by {path.name} the whole image is tissue")
    return tissue
