"""Damaged and odd variants of files, for fuzz.py: by their bytes, or by what they hold."""

from __future__ import annotations

import binascii
import contextlib
import gzip
import io
import json
import pickle
import random
import struct
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd

CANARY = Path(tempfile.gettempdir()) / "histex-fuzz-canary"  # a pickle that runs code makes it
WORDS = (  # cells, names and numbers that readers may stumble over
    "", " ", "nan", "NA", "inf", "-inf", "-1", "0", "1e308", "1e400", "3e38", "1,5", "0x10",
    "1_000", "\u0661", "=1+1", "@x", '"', "'", '"a\nb"', "\ufeff", "\u2028", "\x1c", "\x85", "\0",
    "a\tb", ";", "../../x", "/etc/passwd", "CON", "x" * 300, "\ud7ff", "\U0001f600", "1-Mar",
    "spot0000", "null", "999999999999999999999", "9" * 400, "1.0", "-0", "1e-320", "01",
)  # fmt: skip
NUMBERS = (
    0,
    1,
    -1,
    2,
    127,
    255,
    256,
    32767,
    65535,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**63 - 1,
    -(2**63),
)
NODES: tuple[Any, ...] = (
    None, True, 0, -1, 1e308, 2**70, "", "x", "nan", [], {}, [[]], [None], {"a": 1}, float("nan"),
    float("inf"), [1, 2], ["a", "b"], [0.5, "x"], "\u2028",
)  # fmt: skip
TYPES = ("f4", "f8", "f2", "i4", "u1", "b1", "S3", "U3", "c16", ">f4", "u8", "M8[s]", "O", "i4,f4")
SHAPES = ((), (0,), (1,), (3, 0), (2, 3), (56, 56), (56, 57), (2, 3, 4), (1, 1, 1, 1), (53, 6))


def mutate(content: bytes, suffix: str, draw: random.Random) -> bytes:
    """A variant of a file: half of them by bytes, half by structure, where that is known."""
    structured = STRUCTURED.get(suffix)
    if structured is not None and draw.random() < 0.5:
        with contextlib.suppress(Exception):  # content that has no such variant stays as it is
            content = structured(content, draw)
        if draw.random() < 0.8:
            return content
    for _ in range(draw.choice((1, 1, 2, 4, 16))):
        content = by_bytes(content, draw)
    return mended(content) if draw.random() < 0.5 else content


# --------------------------------------------------------------------------------------------------
# by bytes
# --------------------------------------------------------------------------------------------------
def by_bytes(content: bytes, draw: random.Random) -> bytes:
    size = len(content)
    # headers lie at the start, indices at the end
    place = draw.choice((draw.randrange(size + 1), min(size, draw.randrange(256)),
                         max(0, size - draw.randrange(256))))  # fmt: skip
    length = draw.choice((1, 1, 2, 4, 8, 64, 1024))
    head, tail = content[:place], content[place:]
    match draw.randrange(8):
        case 0:  # other bytes
            return head + draw.randbytes(length) + tail[length:]
        case 1:  # one bit
            flipped = bytes([tail[0] ^ (1 << draw.randrange(8))]) if tail else b""
            return head + flipped + tail[1:]
        case 2:  # cut off
            return head
        case 3:  # a gap
            return head + tail[length:]
        case 4:  # twice
            return head + tail[:length] * draw.choice((2, 3, 50)) + tail[length:]
        case 5:  # an odd word
            return head + draw.choice(WORDS).encode("utf-8", "replace") + tail
        case 6:  # an odd number
            code = draw.choice(("<B", ">H", "<H", "<I", ">I", "<Q", ">Q"))
            number = draw.choice(NUMBERS) % (1 << (8 * struct.calcsize(code)))
            return head + struct.pack(code, number) + tail[struct.calcsize(code) :]
        case _:  # a piece of another place
            other = draw.randrange(size + 1)
            return head + content[other : other + length] + tail[length:]


def mended(content: bytes) -> bytes:
    """A PNG with the checksums of its chunks made right, so that decoders go on to what it says."""
    if not content.startswith(b"\x89PNG\r\n\x1a\n"):
        return content
    whole, place = bytearray(content), 8
    while place + 12 <= len(whole):
        (length,) = struct.unpack_from(">I", whole, place)
        end = place + 8 + length
        if end + 4 > len(whole):
            break
        struct.pack_into(">I", whole, end, binascii.crc32(whole[place + 4 : end]))
        place = end + 4
    return bytes(whole)


# --------------------------------------------------------------------------------------------------
# by structure
# --------------------------------------------------------------------------------------------------
def of_table(content: bytes, draw: random.Random) -> bytes:
    """Cells, columns, rows, delimiters, line ends and encodings of a text table."""
    text = content.decode("utf-8")
    delimiter = max(",\t;", key=text.split("\n")[0].count)
    rows = [line.split(delimiter) for line in text.split("\n")]
    row, column = draw.randrange(len(rows)), draw.randrange(len(rows[0]))
    match draw.randrange(12):
        case 0 | 1 | 2:
            rows[row][column] = draw.choice(WORDS)
        case 3:
            rows[0][column] = draw.choice((*WORDS, *rows[0]))
        case 4:
            rows = [cells[:column] + cells[column + 1 :] for cells in rows]
        case 5:
            rows.insert(row, rows[draw.randrange(len(rows))])
        case 6:
            rows = rows[:row] + rows[row + 1 :]
        case 7:
            rows = [cells[::-1] for cells in rows] if draw.random() < 0.5 else rows[:1]
        case 8:
            word = draw.choice(WORDS)
            rows = [rows[0], *([*c[:column], word, *c[column + 1 :]] for c in rows[1:])]
        case 9:
            text = text.replace(delimiter, draw.choice(",\t; |"))
        case 10:
            return text.replace("\n", draw.choice(("\r\n", "\r", "\n\n", " \n"))).encode()
        case _:
            return text.encode(draw.choice(("utf-8-sig", "utf-16", "utf-32")))
    return "\n".join(delimiter.join(cells) for cells in rows).encode("utf-8", "replace")


def of_packed(content: bytes, draw: random.Random) -> bytes:
    return gzip.compress(of_table(gzip.decompress(content), draw))


def of_json(content: bytes, draw: random.Random) -> bytes:
    """One node of a tree replaced, removed or doubled."""
    tree = json.loads(content)
    nodes: list[tuple[Any, Any]] = []
    open_: list[Any] = [tree]
    while open_:
        node = open_.pop()
        items = list(node.items()) if isinstance(node, dict) else list(enumerate(node))
        nodes += [(node, key) for key, _ in items]
        open_ += [child for _, child in items if isinstance(child, (dict, list))]
    if not nodes or draw.random() < 0.05:
        return json.dumps(draw.choice(NODES)).encode()
    node, key = draw.choice(nodes)
    if draw.random() < 0.2:
        del node[key]
    elif draw.random() < 0.1:
        node[key] = [node[key]] * 3
    else:
        node[key] = draw.choice(NODES)
    return json.dumps(tree).encode()


def odd_array(array: np.ndarray, draw: random.Random) -> np.ndarray:
    """Another type, shape, order or value."""
    match draw.randrange(5):
        case 0:
            return array.astype(draw.choice(TYPES))
        case 1:
            return np.zeros(draw.choice(SHAPES), array.dtype)
        case 2:
            return np.asfortranarray(array) if draw.random() < 0.5 else array[..., None]
        case 3:
            return array[: draw.randrange(len(array) + 1)]
    array = array.copy()
    values = (np.nan, np.inf, -1, 1e30, 0, 255)
    array.flat[draw.randrange(array.size)] = np.asarray(draw.choice(values)).astype(array.dtype)
    return array


def of_npy(content: bytes, draw: random.Random) -> bytes:
    array, file = np.load(io.BytesIO(content)), io.BytesIO()
    np.save(file, odd_array(array, draw), allow_pickle=True)
    saved = file.getvalue()
    if draw.random() < 0.3:  # a header that promises more, or less
        old = str(array.shape[:1])[1:-2].encode()
        saved = saved.replace(old, draw.choice((b"9" * len(old), b"-1", b"0", b"10**9")), 1)
    return saved


def of_npz(content: bytes, draw: random.Random) -> bytes:
    target = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as packed, zipfile.ZipFile(target, "w") as new:
        chosen = draw.choice(packed.namelist())
        for name in packed.namelist():
            inner = packed.read(name)
            if name == chosen:
                if draw.random() < 0.2:
                    continue
                inner = of_npy(inner, draw) if draw.random() < 0.8 else by_bytes(inner, draw)
            new.writestr(name, inner)
    return target.getvalue()


class Runs:
    """Pickled, it makes the canary when it is read with the plain unpickler."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (CANARY,))


def of_pickle(content: bytes, draw: random.Random) -> bytes:
    inner = np.random.default_rng(draw.randrange(9)).random((2, 3, 4)).astype("f4")
    odd = draw.choice(
        (Runs(), odd_array(inner, draw), draw.choice(NODES), np.float32(1), {1, 2}, b"x")
    )
    wrapped = draw.choice((odd, {"cls": odd}, [odd, inner], {"cls": inner, "x": odd}, (odd,)))
    return pickle.dumps(wrapped, protocol=draw.randrange(6))


def of_h5(content: bytes, draw: random.Random) -> bytes:
    """A dataset or attribute replaced or removed."""
    file = io.BytesIO(content)
    with h5py.File(file, "r+") as root:
        names: list[str] = []
        root.visit(names.append)
        name = draw.choice(names)
        node = root[name]
        if node.attrs and draw.random() < 0.3:
            attribute = draw.choice(list(node.attrs))
            node.attrs[attribute] = draw.choice(
                (0, "x", [1, 2], 2**40, "csr_matrix", "categorical")
            )
        elif isinstance(node, h5py.Dataset) and draw.random() < 0.8:
            values = odd_array(np.atleast_1d(node[()]), draw)
            del root[name]
            root[name] = values
        else:
            del root[name]
    return file.getvalue()


def of_parquet(content: bytes, draw: random.Random) -> bytes:
    table = pd.read_parquet(io.BytesIO(content))
    name = draw.choice(list(table))
    match draw.randrange(5):
        case 0:
            table = table.drop(columns=name)
        case 1:
            table[name] = table[name].astype(draw.choice(("str", "f8", "category", "bool", "f4")))
        case 2:
            table[name] = table[name].where(np.arange(len(table)) % 3 > 0)
        case 3:
            table = table[: draw.choice((0, 1, 2))]
        case _:
            table[name] = draw.choice((np.nan, np.inf, -1, 2**40, "x", b"x", None))
    return table.to_parquet()


STRUCTURED: dict[str, Callable[[bytes, random.Random], bytes]] = {
    ".csv": of_table, ".tsv": of_table, ".txt": of_table, ".gz": of_packed, ".gmt": of_table,
    ".json": of_json, ".geojson": of_json, ".xenium": of_json, ".npy": of_npy, ".npz": of_npz,
    ".pickle": of_pickle, ".h5": of_h5, ".h5ad": of_h5, ".parquet": of_parquet,
}  # fmt: skip
