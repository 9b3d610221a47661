"""Text files: how their bytes become text and lines; and small ones: one number, names, JSON.

Text is UTF-8, or UTF-16 with a byte order mark, as Windows saves it; it may be packed with gzip,
which its bytes tell and not its name. A line ends with \\n, \\r\\n or \\r, and with nothing else:
other characters that Unicode takes for line ends (U+0085, U+2028) may stand in a gene name.
"""

from __future__ import annotations

import codecs
import errno
import gzip
import io
import itertools
import json
import re
import zlib
from functools import partial
from pathlib import Path
from typing import Any, TextIO, cast

import utils

WHOLE_FILE = 2**26  # characters of a small text file at most: no list of genes is as long
PIECE = 2**16  # characters that are read at once: Python sets aside room for all that it is asked
GZIP = b"\x1f\x8b"
OTHER_KINDS = {  # how files begin that are no text, and what they are
    b"PK\x03\x04": "an Excel workbook (.xlsx) or another zip archive",
    b"\xd0\xcf\x11\xe0": "an Excel workbook (.xls)",
    b"\x89HDF": "an HDF5 file (.h5, .h5ad)",
    b"PAR1": "a Parquet file",
    b"RDX": "a file of R (.RData)",
    b"BZh": "packed with bzip2",
    b"\xfd7zXZ": "packed with xz",
    b"\x28\xb5\x2f\xfd": "packed with Zstandard",
}
HALF = re.compile("[\ud800-\udfff]")  # of a character of UTF-16: no UTF-8 can hold it
MAYBE_HALF = re.compile(HALF.pattern + r"|\\u[dD][89a-fA-F]")  # the second as JSON writes it
SHOWN = 20  # characters around it, for a message
DAMAGED = (EOFError, zlib.error, gzip.BadGzipFile)  # what packed bytes that are not whole raise


class Unfit(ValueError):
    """Why a file is not read, though its bytes may be whole; and what would be read."""


def of_disk(error: BaseException) -> bool:
    """True if a disk, a drive or the rights to it failed. What damaged bytes can ask for, such as a
    place before the beginning of a file, is invalid to the system (EINVAL)."""
    return getattr(error, "errno", None) not in (None, 0, errno.EINVAL)


def of_system(error: BaseException) -> bool:
    """True if the system failed (disk, rights, memory), so that the file's bytes may be whole."""
    return isinstance(error, MemoryError) or of_disk(error)


def _open_bytes(path: Path) -> gzip.GzipFile | io.BufferedReader:
    with path.open("rb") as file:
        packed = file.read(2) == GZIP
    return gzip.GzipFile(path) if packed else path.open("rb")


def open_text(path: Path) -> TextIO:
    """A text file, opened; every line that is read of it ends with \\n. Unfit if it is no text."""
    content = _open_bytes(path)
    try:
        start = cast(io.BufferedReader, content).peek(8)
        for sign, kind in OTHER_KINDS.items():
            if start.startswith(sign):
                raise Unfit(f"it is {kind}; expected text.")
        wide = start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        return io.TextIOWrapper(content, encoding="utf-16" if wide else "utf-8-sig")
    except BaseException:
        content.close()
        raise


def read_text(path: Path) -> str:
    """The whole of a small text file, its line ends as \\n. Unfit if it is no text."""
    with open_text(path) as file:
        pieces = iter(partial(file.read, PIECE), "")
        text = "".join(itertools.islice(pieces, WHOLE_FILE // PIECE))
        if file.read(1):
            raise Unfit(f"it has more than {WHOLE_FILE / 1e6:.0f} million characters.")
    if "\0" in text:
        raise Unfit("it holds zero bytes, as no text does.")
    return text


def lines_of(path: Path) -> list[str]:
    """The lines of a small text file that are not blank, stripped. Unfit if it is no text."""
    return [line.strip() for line in read_text(path).split("\n") if line.strip()]


def read_json(path: Path) -> Any:
    """What a JSON file holds. A ValueError says why it is not read, one of DAMAGED likewise."""
    with _open_bytes(path) as file:
        content = file.read()
    text = content.decode(json.detect_encoding(content), "surrogatepass")
    found = json.loads(text)
    if MAYBE_HALF.search(text):
        told = json.dumps(found, ensure_ascii=False)
        if half := HALF.search(told):
            part = told[max(0, half.start() - SHOWN) : half.end() + SHOWN]
            raise Unfit(f"it holds half of a character, as in a name that was cut: {part!r}.")
    return found


def read_number(
    stage: utils.Stage, path: Path, low: float, high: float, unit: str, hint: str = ""
) -> float:
    """The one number in a text file, between ``low`` and ``high``."""
    text = _text_of(stage, path).strip()
    try:
        value = float(text) if "_" not in text else float("nan")
    except ValueError:
        value = float("nan")
    if not low <= value <= high:  # false for nan as well
        raise stage.error(
            path,
            f"holds {text[:40]!r}; expected one number between {low:g} and {high:g} ({unit}), "
            f"written with a decimal point.{' ' + hint if hint else ''}",
        )
    return value


def read_lines(stage: utils.Stage, path: Path) -> list[str]:
    """The lines of a text file that are not blank, stripped."""
    return [line.strip() for line in _text_of(stage, path).split("\n") if line.strip()]


def _text_of(stage: utils.Stage, path: Path) -> str:
    try:
        return read_text(path)
    except UnicodeDecodeError as error:
        raise stage.error(
            path, f"is not UTF-8 text: {error.reason} at byte {error.start}."
        ) from error
    except (Unfit, *DAMAGED) as error:
        raise stage.error(path, f"cannot be read: {error}") from error


def is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
