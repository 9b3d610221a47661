"""What goes wrong in practice, one row a fault: the message helps, and nothing on disk is lost.

Every row spoils a copy of a finished sample and runs one stage on it. The number at the start of a
row's name groups the rows: 1-9 image and directory, 10-16 tables, 17-23 settings and mask, 24-30
machine, 31-38 the chain of stages.
"""

import errno
import gzip
import os
import pickle
import re
import shlex
import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import PIPELINE, ROOT, run, run_process
from PIL import Image

import HISTEX
import image_calibration
import utils
from reading import pickles
from writing import disk

CALIBRATION, HR, EXTRACTOR, MASKING, MODEL = (script for script, *_ in PIPELINE)
OPTIONS = {script: options for script, *options in PIPELINE}


@pytest.fixture(autouse=True)
def pixel_limit(monkeypatch):
    """Stages set Pillow's limit for their process; put it back for the tests that follow."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)


def contents(directory: Path) -> dict[str, str]:
    """Hash of every file of a directory."""
    return {
        path.relative_to(directory).as_posix(): disk.sha256(path)
        for path in directory.rglob("*")
        if path.is_file()
    }


def run_stage(script: str, directory: Path, *options: str) -> int:
    return run(script, directory, *OPTIONS[script], *options)


# ----- ways to spoil a sample ---------------------------------------------------------------------
def text(name: str, content: str | bytes):
    content = content.encode() if isinstance(content, str) else content
    return lambda directory: (directory / name).write_bytes(content) and None


def more(name: str, content: str):
    """The file with something added at its end."""

    def spoil(directory):
        with (directory / name).open("a") as file:
            file.write(content)

    return spoil


def gone(*names: str):
    def spoil(directory):
        for name in names:
            (directory / name).unlink()

    return spoil


def packed(directory):
    path = directory / "cnts.csv"
    path.with_name("cnts.csv.gz").write_bytes(gzip.compress(path.read_bytes()))
    path.unlink()


def cut(name: str, keep: int):
    def spoil(directory):
        path = directory / name
        path.write_bytes(path.read_bytes()[:keep])

    return spoil


def table(name: str, change):
    """The table, changed by ``change``, with everything read and written as text."""

    def spoil(directory):
        old = pd.read_csv(directory / name, dtype=str, keep_default_na=False, index_col=0)
        change(old).to_csv(directory / name)

    return spoil


def cell(name: str, row: int, column: str, value: str):
    def change(frame):
        frame.iloc[row, frame.columns.get_loc(column)] = value
        return frame

    return table(name, change)


def rename_row(frame: pd.DataFrame, old: str, new: str) -> pd.DataFrame:
    return frame.rename(index={old: new})


def array(name: str, change):
    return lambda directory: np.save(directory / name, change(np.load(directory / name)))


def with_nan(values: np.ndarray) -> np.ndarray:
    values = values.copy()
    values.flat[7] = np.nan
    return values


class Canary:
    """Pickled, it creates a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def object_array(name: str):
    def spoil(directory):
        values = np.empty((2, 2), object)
        values[:] = Canary(directory / "canary")
        np.save(directory / name, values, allow_pickle=True)

    return spoil


def raw(name: str, image: Image.Image, **options):
    """Another he-raw."""

    def spoil(directory):
        (directory / "he-raw.png").unlink()
        image.save(directory / name, **options)

    return spoil


def converted(mode: str):
    """he-raw in another mode of Pillow."""

    def spoil(directory):
        path = directory / "he-raw.png"
        image = Image.open(path).convert(mode)
        image.save(path)

    return spoil


def picture(mode: str = "RGB", size: tuple[int, int] = (660, 440)) -> Image.Image:
    return Image.new(mode, size)


def png_header(columns: int, rows: int) -> bytes:
    """A tiny PNG whose header claims any size."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        checksum = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)

    header = struct.pack(">IIBBBBB", columns, rows, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        [chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(bytes(99))), chunk(b"IEND", b"")]
    )


def turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


def mask(values: np.ndarray, mode: str | None = None, **options):
    """Another mask.png."""

    def spoil(directory):
        image = Image.fromarray(values)
        (image.convert(mode) if mode else image).save(directory / "mask.png", **options)

    return spoil


def tissue_block(shape=(28, 42), value: int = 255) -> np.ndarray:
    values = np.zeros(shape, np.uint8)
    values[: shape[0] // 2] = value
    return values


def two_on_a_node(directory):
    more("locs.csv", "twin,161.5,61.0\n")(directory)
    more("cnts.csv", "twin" + ",3" * 8 + "\n")(directory)


def first_spots(n: int):
    """Only n spots, the ones that touch each other in the upper left corner."""

    def spoil(directory):
        frame = pd.read_csv(directory / "locs.csv", index_col=0)
        frame.loc[["spot000", "spot001", "spot006", "spot007", "spot002", "spot012"][:n]].to_csv(
            directory / "locs.csv"
        )

    return spoil


def new_section(directory):
    """Another he-raw of the same size, calibrated."""
    image = Image.open(directory / "he-raw.png")
    image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(directory / "he-raw.png")
    assert run(CALIBRATION, directory) == 0


def many(*spoils):
    def spoil(directory):
        for one in spoils:
            one(directory)

    return spoil


STALE = ("--allow-stale",)
FULL = "full resolution"
NPY_FAULTS = [
    ("cut", lambda name: cut(name, 200), ["not a whole .npy"]),
    ("cut in the header", lambda name: cut(name, 20), ["not a whole .npy"]),
    ("empty", lambda name: text(name, b""), ["not a whole .npy"]),
    ("no array", lambda name: text(name, b"hello, world " * 99), ["not a whole .npy"]),
    ("objects", object_array, ["not a whole .npy"]),
    ("float64", lambda name: array(name, lambda a: a.astype(float)), ["is float64", "expected"]),
    ("rows", lambda name: array(name, lambda a: a[:-1]), ["expected"]),
    ("axes", lambda name: array(name, lambda a: a[0]), ["expected"]),
    ("none", lambda name: array(name, lambda a: a[:0]), ["expected"]),
]
NPY_FILES = [
    ("Histology_feature_map.npy", MASKING, EXTRACTOR),
    ("Histology_rgb.npy", MASKING, EXTRACTOR),
    ("Histology_feature_map.npy", MODEL, EXTRACTOR),
    ("HRcnts.npy", MODEL, HR),
]
# (name, spoil, script, options, parts of the message, part of its last line)
BAD = [
    # directory
    ("1 missing", lambda d: d / "nowhere", HR, (), ["nowhere", "does not exist"], "Run: "),
    ("1 file", lambda d: d / "cnts.csv", HR, (), ["cnts.csv", "is a file"],
     "Run: python get_HR.py"),
    # he-raw
    ("2 two images", lambda d: picture().save(d / "he-raw.jpg"), CALIBRATION, (),
     ["holds he-raw.jpg, he-raw.png", "one"], f"run: python {CALIBRATION}"),
    ("2 two tables", lambda d: shutil.copy(d / "cnts.csv", d / "cnts.tsv") and None, HR, (),
     ["holds cnts.csv, cnts.tsv", "one"], f"run: python {HR}"),
    ("2 no image", gone("he-raw.png"), CALIBRATION, (),
     ["missing", "he-raw.jpg or he-raw.jpeg or he-raw.png or he-raw.tif"],
     f"run: python {CALIBRATION}"),
    ("3 png cut", cut("he-raw.png", 60_000), CALIBRATION, (), ["he-raw.png", "truncated"],
     CALIBRATION),
    ("3 no image", text("he-raw.png", "no image"), CALIBRATION, (), ["he-raw.png"], CALIBRATION),
    ("3 empty", text("he-raw.png", b""), CALIBRATION, (), ["he-raw.png"], CALIBRATION),
    ("3 he.jpg cut", cut("he.jpg", 60_000), EXTRACTOR, (), ["he.jpg", "truncated"],
     f"Run: python {CALIBRATION}"),
    ("3 he.jpg cut for the overlay", cut("he.jpg", 60_000), MASKING, STALE, ["he.jpg", "truncated"],
     f"Run: python {CALIBRATION}"),
    ("3 he.jpg empty", text("he.jpg", b""), MODEL, STALE, ["he.jpg", "is not an image"],
     f"Run: python {CALIBRATION}"),
    ("3 he.jpg of another size", lambda d: picture().save(d / "he.jpg"), MODEL, STALE,
     ["he.jpg", "660 x 440", "multiples of 224"], f"Run: python {CALIBRATION}"),
    ("3 he.jpg of another size", lambda d: picture().save(d / "he.jpg"), EXTRACTOR, (),
     ["he.jpg", "660 x 440", "multiples of 224"], f"Run: python {CALIBRATION}"),
    ("4 1 bit", raw("he-raw.png", picture("1")), CALIBRATION, (), ["1 bit", "expected RGB"],
     CALIBRATION),
    ("4 float", raw("he-raw.tif", picture("F")), CALIBRATION, (), ["float", "expected RGB"],
     CALIBRATION),
    ("5 bomb", text("he-raw.png", png_header(60_000, 60_000)), CALIBRATION, (),
     ["he-raw.png", "--max-megapixels 2000"], "--max-megapixels N"),
    ("7 turned", raw("he-raw.jpg", picture(), exif=turned()), CALIBRATION, (),
     ["EXIF orientation 6", "expected 1"], f"run: python {CALIBRATION}"),
    ("8 small", raw("he-raw.png", picture(size=(200, 660))), CALIBRATION, (),
     ["200 x 660 px", "expected at least one tile of 224"], CALIBRATION),
    *(("9 " + repr(value), text("pixel-size-raw.txt", value), CALIBRATION, (),
       ["pixel-size-raw.txt", f"holds {value.strip()!r}",
       "expected one number between 0.05 and 2.5", FULL],
       f"run: python {CALIBRATION}")
      for value in ("", "0.5 0.5", "0,5", "0", "-0.5", "nan", "inf", "3.72", "55", "0.5 um",
      "1_0")),
    ("9 not text", text("pixel-size-raw.txt", b"\xe90\x00"), CALIBRATION, (), ["UTF-8"],
     CALIBRATION),
    # locs-raw
    ("10 no column y", table("locs-raw.csv", lambda t: t.rename(columns={"y": "row"})),
     CALIBRATION, (),
     ["locs-raw.csv", "has the columns x, row", "expected a column", "y"], CALIBRATION),
    ("10 nothing", cell("locs-raw.csv", 3, "x", ""), CALIBRATION, (),
     ["holds ''", "column x", "row 4", "expected a number"], CALIBRATION),
    ("10 NaN", cell("locs-raw.csv", 3, "x", "nan"), CALIBRATION, (), ["nan", "column x", "row 4"],
     CALIBRATION),
    ("10 infinite", cell("locs-raw.csv", 5, "y", "inf"), CALIBRATION, (),
     ["inf", "spot005", "column y", "row 6"], CALIBRATION),
    ("10 words", cell("locs-raw.csv", 0, "y", "left"), CALIBRATION, (), ["'left'", "row 1"],
     CALIBRATION),
    ("10 one id twice", table("locs-raw.csv", lambda t: rename_row(t, "spot004", "spot009")),
     CALIBRATION,
     (), ["locs-raw.csv", "spot009", "more than once"], CALIBRATION),
    ("10 one place twice", many(cell("locs-raw.csv", 1, "x", "60.0"), cell("locs-raw.csv", 1, "y",
     "60.0")),
     CALIBRATION, (), ["spot001", "place of another"], CALIBRATION),
    ("10 one column", text("locs-raw.csv", "x\n1\n2\n"), CALIBRATION, (), ["one column only"],
     CALIBRATION),
    ("10 no header", text("locs-raw.csv", "spot0,100,200\nspot1,200,200\n"), CALIBRATION, (),
     ["has the columns 100, 200", "expected a column"], CALIBRATION),
    ("11 swapped", table("locs-raw.csv", lambda t: t.rename(columns={"x": "y", "y": "x"})),
     CALIBRATION, (),
     ["of 22 spots outside", "660 columns and 440 rows", "With x and y swapped 100.0%"],
     CALIBRATION),
    ("11 hires image", table("locs-raw.csv", lambda t: t.astype(float) * 12), CALIBRATION, (),
     ["outside he-raw", "hires or lowres"], CALIBRATION),
    ("11 negative", many(*[cell("locs-raw.csv", i, "x", "-3") for i in (0, 7)]), CALIBRATION, (),
     ["2 of 22 spots outside"], CALIBRATION),
    # cnts
    ("12 a spot without counts", table("cnts.csv", lambda t: t.drop("spot007")), HR, (),
     ["cnts.csv", "no counts for 1 of", "22", "spot007"], f"run: python {HR}"),
    ("12 other ids", table("cnts.csv", lambda t: t.set_axis(range(len(t)))), HR, (),
     ["no counts for 22 of", "spot000", "0, 1, 2"], HR),
    ("12 ids that a spreadsheet made numbers", many(
        table("locs.csv", lambda t: t.set_axis(range(len(t)))),
        table("cnts.csv", lambda t: t.set_axis([f"{i}.0" for i in range(len(t))]))), HR, (),
     ["no counts for 22 of", "0, 1, 2", "its own ids look like 0.0, 1.0, 2.0"], HR),
    ("13 one column", text("cnts.csv", "gene\n1\n2\n"), HR, (), ["one column only", "comma"], HR),
    ("13 empty", text("cnts.csv", ""), HR, (), ["cnts.csv", "one column only"], HR),
    ("13 only a header", text("cnts.csv", "id,A,B\n"), HR, (), ["no spot"], HR),
    ("13 not text", text("cnts.csv", b"\x80\x81,\xff\n\x00"), HR, (), ["cnts.csv",
     "cannot be read"], HR),
    ("13 gz cut", many(packed, cut("cnts.csv.gz", 99)), HR, (), ["cnts.csv.gz", "cannot be read"],
     HR),
    ("14 negative", cell("cnts.csv", 2, "GENE3", "-1"), HR, (),
     ["holds -1", "spot002", "GENE3", "cannot be negative"], HR),
    ("14 nothing", cell("cnts.csv", 2, "GENE3", ""), HR, (), ["holds ''", "GENE3", "data row 3"],
     HR),
    ("14 NaN", cell("cnts.csv", 2, "GENE3", "NaN"), HR, (), ["NaN", "GENE3", "data row 3"], HR),
    ("14 words", cell("cnts.csv", 2, "GENE3", "many"), HR, (), ["'many'", "GENE3", "data row 3"],
     HR),
    ("14 infinite", cell("cnts.csv", 2, "GENE3", "1e99"), HR, (), ["inf", "GENE3", "row 3"], HR),
    ("14 zeros", table("cnts.csv", lambda t: t.assign(**dict.fromkeys(t, "0"))), HR, (),
     ["nothing but zeros", "expected raw counts"], HR),
    ("14 no header", lambda d: text("cnts.csv", (d / "cnts.csv").read_bytes().split(b"\n",
     1)[1])(d), HR,
     (), ["cnts.csv"], HR),
    ("14 a short row", more("cnts.csv", "spot099,1,2\n"), HR, (),
     ["cnts.csv", "GENE2", "data row 23"], HR),
    ("15 one gene twice", table("cnts.csv", lambda t: t.rename(columns={"GENE1": "GENE2"})), HR, (),
     ["cnts.csv", "GENE2", "more than once"], HR),
    ("15 a zero byte in a name", text("cnts.csv", b"id,A\0B\nspot000,1\n"), HR, (),
     ["cnts.csv", "zero bytes"], HR),
    # gene-names
    ("17 a zero byte in a name", text("gene-names.txt", b"GENE1\nGE\0NE3\n"), HR, (),
     ["gene-names.txt", "zero bytes"], HR),
    ("17 missing", gone("gene-names.txt"), MODEL, (), ["gene-names.txt is missing"],
     f"Run: python {HR}"),
    ("17 blank", text("gene-names.txt", "\n \r\n"), HR, (), ["gene-names.txt", "holds no gene"],
     HR),
    ("17 unknown gene", text("gene-names.txt", "GENE1\nNOVEL\n"), HR, (),
     ["names 1 of 2 genes", "cnts.csv does not have", "NOVEL", "GENE0"], HR),
    ("17 one gene twice", text("gene-names.txt", "GENE1\nGENE1\n"), HR, (), ["GENE1",
     "more than once"],
     HR),
    ("17 other genes than HRcnts", text("gene-names.txt", "GENE1\nGENE2\n"), MODEL, (),
     ["gene-names.txt has changed"], f"Run: python {HR}"),
    ("17 other genes than HRcnts, used", text("gene-names.txt", "GENE1\nGENE2\n"), MODEL, STALE,
     ["HRcnts.npy", "is float32 (70, 8)", "expected float32 (70, 2)"], f"Run: python {HR}"),
    # spots
    ("18 no spots", text("locs-raw.csv", "id,x,y\n"), CALIBRATION, (), ["locs-raw.csv", "no spot"],
     CALIBRATION),
    ("19 two on a node", two_on_a_node, HR, (), ["locs.csv", "spot001", "twin", "one node"],
     CALIBRATION),
    ("20 no spot on the tissue", mask(tissue_block((28, 42))[::-1] * (np.arange(28) > 25)[:,
     None]), MODEL,
     (), ["mask.png", "leaves 0 of 22 spots", "at least 4"], MASKING),
    ("21 missing", gone("radius.txt"), MODEL, (), ["radius.txt is missing"],
     f"Run: python {CALIBRATION}"),
    *((f"21 {value}", text("radius.txt", value), MODEL, (),
       ["radius.txt", f"holds {value!r}", "expected one number between 16 and 1024",
       "px of he.jpg"],
       f"Run: python {CALIBRATION}") for value in ("0", "1e9", "wide", "nan", "15.9")),
    *((f"21 raw {value}", text("radius-raw.txt", value), CALIBRATION, (),
       ["radius-raw.txt", f"holds {value!r}", "expected one number between 16 and 1024"],
       CALIBRATION)
      for value in ("0", "-27.5", "5000", "27,5")),
    # mask
    ("22 other size", mask(tissue_block((28, 41))), MODEL, (), ["mask.png", "41 x 28 px",
     "or 42 x 28 px, one a superpixel"],
     MASKING),
    ("22 multiple in one direction", mask(tissue_block((56, 42))), MODEL, (), ["42 x 56 px"],
     MASKING),
    ("22 all black", mask(tissue_block(value=0)), MODEL, (), ["mask.png", "all black"], MASKING),
    ("22 no image", text("mask.png", "tissue"), MODEL, (), ["mask.png", "not a readable image"],
     MASKING),
    ("22 empty", text("mask.png", b""), MODEL, (), ["mask.png", "not a readable image"], MASKING),
    ("22 cut", many(mask(np.random.default_rng(0).integers(0, 2, (28, 42), np.uint8) * 255),
                    cut("mask.png", 150)), MODEL, (), ["mask.png"], MASKING),
    ("22 bomb", text("mask.png", png_header(100_000, 100_000)), MODEL, (), ["mask.png",
     "more than 2,000 megapixels"], MASKING),
    ("45 a multiple that is too large", text("mask.png", png_header(63_000, 42_000)), MODEL, (),
     ["63000 x 42000 px, more than 2,000 megapixels", "42 x 28, is enough"], MASKING),
    ("23 a blank slide", array("Histology_rgb.npy", lambda a: np.full_like(a, 250)), MASKING, (),
     ["he.jpg", "shows no tissue", "42 x 28 px"], "HISTEX.py"),
    # the machine
    ("25 no such file", lambda d: None, EXTRACTOR,
     ("--backbone", "tf_efficientnet_lite0", "--weights", "none.bin"), ["none.bin",
      "is not a file"], "--weights FILE"),
    ("25 not for lite0", lambda d: None, EXTRACTOR, ("--weights", "none.bin"), ["brings its own"],
     "Leave --weights out"),
    ("26 no such device", lambda d: None, EXTRACTOR, ("--device", "abacus"), ["--device abacus"],
     "--device cpu"),
    ("26 no such device", lambda d: None, MODEL, ("--device", "abacus"), ["--device abacus"],
     "--device cpu"),
    ("26 bad index", lambda d: None, MODEL, ("--device", "cuda:99"), ["--device cuda:99"],
     "--device cpu"),
    # the chain
    *((f"31 {name} without its record", gone(utils.record_name(producer)), script, (),
       [name, f"no record {utils.record_name(producer)}"],
       f"Run: python {producer}")
      for name, producer, script in (
          ("locs.csv", CALIBRATION, HR), ("he.jpg", CALIBRATION, EXTRACTOR),
          ("Histology_feature_map.npy", EXTRACTOR, MASKING), ("HRlocs.csv", HR, MODEL),
          ("Histology_feature_map.npy", EXTRACTOR, MODEL), ("he.jpg", CALIBRATION, MODEL))),
    *((f"33 {name} {fault} for {script}", spoil(name), script, STALE, [name, *parts],
       f"Run: python {producer}")
      for name, script, producer in NPY_FILES for fault, spoil, parts in NPY_FAULTS),
    ("33 features NaN", array("Histology_feature_map.npy", with_nan), MASKING, (), ["not finite"],
     f"Run: python {EXTRACTOR}"),
    ("33 HRcnts NaN", array("HRcnts.npy", with_nan), MODEL, (), ["HRcnts.npy", "not finite"],
     f"Run: python {HR}"),
    ("33 HRcnts negative", array("HRcnts.npy", lambda a: a - 1000), MODEL, (), ["HRcnts.npy",
     "negative"],
     f"Run: python {HR}"),
    ("33 HRlocs not text", text("HRlocs.csv", b"\xff\xfe\x00"), MODEL, (), ["HRlocs.csv"],
     f"Run: python {HR}"),
    ("33 HRlocs empty", text("HRlocs.csv", ""), MODEL, (), ["HRlocs.csv"], f"Run: python {HR}"),
    ("33 HRlocs without places", table("HRlocs.csv", lambda t: t.drop(columns="x")), MODEL, (),
     ["HRlocs.csv", "x"], f"Run: python {HR}"),
    ("33 HRlocs NaN", cell("HRlocs.csv", 4, "y", "nan"), MODEL, (), ["HRlocs.csv"],
     f"Run: python {HR}"),
    ("33 HRlocs words", cell("HRlocs.csv", 4, "y", "here"), MODEL, (), ["HRlocs.csv"],
     f"Run: python {HR}"),
    ("33 HRlocs that measures one twice", cell("HRlocs.csv", 4, "parent_1", "spot003"), MODEL, (),
     ["HRlocs.csv", "measures 22 spots; expected each of the 22 spots once"], f"Run: python {HR}"),
    ("33 HRlocs of other spots", cell("HRlocs.csv", 4, "parent_1", "spot999"), MODEL, (),
     ["HRlocs.csv", "of its 70 points, 1 have a parent that is no spot"], f"Run: python {HR}"),
    ("34 new section, old features", new_section, MASKING, (),
     ["Histology_feature_map.npy is out of date", "he.jpg has changed"],
     f"Run: python {EXTRACTOR}"),
    ("34 new section, old features", new_section, MODEL, (), ["is out of date",
     "he.jpg has changed"],
     f"Run: python {EXTRACTOR}"),
    ("34 new section, not calibrated", lambda d: picture().save(d / "he-raw.png"), MODEL, (),
     ["he.jpg is out of date", "he-raw.png has changed"], f"Run: python {CALIBRATION}"),
    *((f"35 {producer} left out", gone(name, *records), script, (),
       [f"{name} is missing", f"{script} needs {name}", f"written by {producer}"],
       f"Run: python {producer}")
      for name, producer, script, *records in (
          ("locs.csv", CALIBRATION, HR, "image_calibration.json"),
          ("he.jpg", CALIBRATION, EXTRACTOR, "image_calibration.json"),
          ("Histology_feature_map.npy", EXTRACTOR, MASKING, "Histology_Extractor.json"),
          ("Histology_rgb.npy", EXTRACTOR, MASKING), ("HRcnts.npy", HR, MODEL),
          ("HRlocs.csv", HR, MODEL, "get_HR.json"),
          ("Histology_feature_map.npy", EXTRACTOR, MODEL, "Histology_Extractor.json"),
          ("mask.png", MASKING, MODEL, "masking_non_tissue.json"))),
]  # fmt: skip

EDITS = [  # name, what the user does to it, the script that made it, an option that changes all
    ("he.jpg", lambda d: picture(size=(672, 448)).save(d / "he.jpg"), CALIBRATION,
     ("--max-megapixels", "99")),
    ("locs.csv", cell("locs.csv", 0, "x", "61"), CALIBRATION, ("--max-megapixels", "99")),
    ("radius.txt", text("radius.txt", "30"), CALIBRATION, ("--max-megapixels", "99")),
    ("HRlocs.csv", cell("HRlocs.csv", 0, "x", "61"), HR, ("--n-genes", "5")),
    ("HRcnts.npy", array("HRcnts.npy", lambda a: a * 2), HR, ("--n-genes", "5")),
    ("Histology_feature_map.npy", array("Histology_feature_map.npy", lambda a: a * 2), EXTRACTOR,
     ("--overlap", "3")),
    ("Histology_rgb.npy", array("Histology_rgb.npy", lambda a: a // 2), EXTRACTOR,
     ("--overlap", "3")),
    ("cnts-super/GENE0.pickle", text("cnts-super/GENE0.pickle", b"mine"), MODEL, ("--seed", "3")),
    ("embeddings-gene.pickle", text("embeddings-gene.pickle", b"mine"), MODEL, ("--seed", "3")),
]  # fmt: skip


@pytest.mark.parametrize(("name", "spoil", "script", "other"), EDITS, ids=[e[0] for e in EDITS])
def test_37_an_edit_is_kept_or_asked_about(finished, capfd, name, spoil, script, other):
    spoil(finished)
    mine = (finished / name).read_bytes()
    before = contents(finished)
    assert run_stage(script, finished) == 0
    assert f"kept your {name} (--force makes a new one)" in capfd.readouterr().out
    assert contents(finished) == before
    assert run_stage(script, finished, *other) == 2  # would it be made anew, or kept?
    message = capfd.readouterr().err
    assert f"{finished / name} was edited by hand, and other options were given" in message
    assert "move it to another folder" in message
    assert message.rstrip().endswith("--force")
    assert contents(finished) == before
    assert run_stage(script, finished, "--force") == 0
    assert (finished / name).read_bytes() != mine


def rows(table: list[tuple]) -> list:
    return [
        pytest.param(
            *row[1:],
            id=row[0].replace(".py", ""),
        )
        for row in table
    ]


@pytest.mark.parametrize(("spoil", "script", "options", "parts", "remedy"), rows(BAD))
def test_refused(finished, capfd, spoil, script, options, parts, remedy):
    if "cuda:99" in options and torch.cuda.device_count() > 99:
        pytest.skip("this machine has a hundred GPUs")
    directory = spoil(finished) or finished
    capfd.readouterr()
    before = contents(finished)
    code = run_stage(script, directory, *options)
    message = capfd.readouterr().err.strip()
    assert code == 2, message
    assert message.startswith("error: ")
    assert "Traceback" not in message
    for part in parts:
        assert part in message
    assert remedy in message.splitlines()[-1]
    assert contents(finished) == before  # nothing lost, nothing half done, no canary


# ----- unusual, but welcome -----------------------------------------------------------------------
def tissue_of_maps(directory: Path) -> np.ndarray:
    """Where every map has a value, (rows, columns)."""
    index = pd.read_csv(directory / "cnts-super" / "index.csv", keep_default_na=False)
    maps = [pickles.read_pickle(directory / "cnts-super" / name) for name in index["file"]]
    finite = np.isfinite(maps)
    assert (finite == finite[0]).all()
    return finite[0]


def rewritten(name: str, change, **how):
    """The table written in another way."""

    def spoil(directory):
        frame = pd.read_csv(directory / name, dtype=str, keep_default_na=False, index_col=0)
        content = change(frame).to_csv(**{"lineterminator": "\n", **how})
        (directory / name).write_bytes(content.encode(how.get("encoding", "utf-8")))

    return spoil


def same(frame):
    return frame


def gzipped(directory):
    content = (directory / "cnts.csv").read_bytes()
    (directory / "cnts.csv.gz").write_bytes(gzip.compress(content))
    (directory / "cnts.csv").unlink()


def own_genes(directory):
    (directory / "gene-names.txt").write_text("GENE1\nGENE3\n")


def half_tissue(directory):
    return tissue_block().astype(bool)


SAME_HR = "HRcnts.npy"  # the file must come out as it was
# (name, spoil, script, options, part of what is printed, check of the directory)
GOOD = [
    ("4 grey", converted("L"), CALIBRATION, (), "grey, converted to RGB", None),
    ("4 RGBA", converted("RGBA"), CALIBRATION, (), "alpha, converted to RGB on white", None),
    ("4 CMYK", raw("he-raw.jpg", picture("CMYK")), CALIBRATION, (),
     "CMYK, no colour profile, converted to RGB", None),
    ("4 16 bit", raw("he-raw.png", Image.new("I;16", (660, 440), 40_000)), CALIBRATION, (),
     "16 bit, grey, converted to RGB", None),
    ("4 palette", converted("P"), CALIBRATION, (), "palette, converted to RGB", None),
    ("8 no whole tiles", lambda d: None, CALIBRATION, ("--force",),
     "padded by 12 px on the right and 8 px below",
     None),
    ("9 blank and BOM", text("pixel-size-raw.txt", "\ufeff \r\n0.5\r\n"), CALIBRATION, (),
     "at 0.5 um", "he.jpg"),
    ("12 another order", table("cnts.csv", lambda t: t.iloc[::-1]), HR, (), "", SAME_HR),
    ("12 extra rows", table("cnts.csv", lambda t: pd.concat([t.rename(lambda i: "not-" + i), t])),
     HR, (),
     "22 of 44 rows have no location", SAME_HR),
    ("13 tabs", rewritten("cnts.csv", same, sep="\t"), HR, (), "", SAME_HR),
    ("13 semicolons", rewritten("cnts.csv", same, sep=";"), HR, (), "", SAME_HR),
    ("13 BOM", rewritten("cnts.csv", same, encoding="utf-8-sig"), HR, (), "", SAME_HR),
    ("13 CRLF", rewritten("cnts.csv", same, lineterminator="\r\n"), HR, (), "", SAME_HR),
    ("13 gz", gzipped, HR, (), "", SAME_HR),
    ("14 not whole numbers", cell("cnts.csv", 3, "GENE2", "1.5"), HR, (),
     "raw counts are expected", None),
    ("17 fewer genes", text("gene-names.txt", "\r\nGENE5\r\n\r\nGENE2\r\n"), HR, (),
     "your 2 genes", None),
    ("17 fewer than asked", lambda d: None, HR, ("--n-genes", "500"), "only these vary", SAME_HR),
    ("18 one spot", many(first_spots(1), own_genes), HR, (), "only 1 spots", None),
    ("18 two spots", many(first_spots(2), own_genes), HR, (), "only 2 spots", None),
    ("22 0 and 1", mask(tissue_block(value=1)), MODEL, (), "edited since", half_tissue),
    ("22 colour", mask(tissue_block(), "RGB"), MODEL, (), "edited since", half_tissue),
    ("22 palette", mask(tissue_block(), "P"), MODEL, (), "edited since", half_tissue),
    ("22 1 bit", mask(tissue_block(), "1"), MODEL, (), "edited since", half_tissue),
    ("22 16 bit", mask(tissue_block().astype(np.uint16) * 200), MODEL, (), "edited since",
     half_tissue),
    ("22 16 bit, dark", mask(tissue_block(value=1).astype(np.uint16)), MODEL, (), "edited since",
     half_tissue),
    ("22 transparent", mask(np.dstack([np.full((28, 42, 3), 255, np.uint8), tissue_block()])),
     MODEL, (),
     "edited since", half_tissue),
    ("22 twice as large", mask(tissue_block((56, 84))), MODEL, (), "edited since", half_tissue),
    ("22 full size, a JPEG by its content",
     lambda d: Image.fromarray(tissue_block((448, 672))).save(d / "mask.png", format="JPEG"),
     MODEL, (),
     "edited since", half_tissue),
    ("22 all white", mask(np.full((28, 42), 255, np.uint8)), MODEL, ("--force",),
     "whole image is tissue",
     None),
    ("35 the user's own mask", gone("masking_non_tissue.json"), MODEL, ("--force",),
     "taken as your own",
     None),
    ("37 unedited", lambda d: None, MASKING, (), "up to date", "mask.png"),
    ("37 forced", mask(tissue_block()), MASKING, ("--force",), "finished", "mask.png"),
]  # fmt: skip


@pytest.mark.parametrize(("spoil", "script", "options", "part", "check"), rows(GOOD))
def test_accepted(finished_sample, finished, capfd, spoil, script, options, part, check):
    spoil(finished)
    assert run_stage(script, finished, *options) == 0
    printed = capfd.readouterr()
    assert part in printed.out
    assert "Traceback" not in printed.err
    if isinstance(check, str):
        assert (finished / check).read_bytes() == (finished_sample / check).read_bytes()
    elif check is not None:
        np.testing.assert_array_equal(tissue_of_maps(finished), check(finished))
    assert not list(finished.glob(".*"))


def test_6_an_image_too_long_for_a_jpeg_becomes_a_png(finished, monkeypatch):
    monkeypatch.setattr(image_calibration, "JPEG_MAX_SIDE_PX", 600)
    assert run_stage(CALIBRATION, finished, "--force") == 0
    assert [path.name for path in finished.glob("he.*")] == ["he.png"]
    assert run_stage(EXTRACTOR, finished) == 0


@pytest.mark.parametrize("ending", ["", "/", "//", "\\"])
@pytest.mark.parametrize("name", ["plain", "two words", "Gewebe \u00e4\u00f6\u00fc \u7d44\u7e54"])
def test_1_39_names_of_directories(finished_sample, tmp_path, name, ending, capsys):
    directory = shutil.copytree(finished_sample, tmp_path / name)
    assert run(HR, f"{directory}{ending}") == 0
    (directory / "locs.csv").unlink()
    capsys.readouterr()
    assert run(HR, f"{directory}{ending}") == 2
    quoted = shlex.quote(str(directory))
    assert capsys.readouterr().err.endswith(f"Run: python {CALIBRATION} --directory {quoted}\n")


def test_39_a_console_without_unicode(finished):
    genes = ["\u03b21-Tubulin", "GENE2"]
    table("cnts.csv", lambda t: t.rename(columns={"GENE1": genes[0]}))(finished)
    (finished / "gene-names.txt").write_text("\n".join(genes), encoding="utf-8")
    plain = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = run_process(HR, finished, env=plain)
    assert (done.returncode, done.stderr) == (0, "")
    (finished / "gene-names.txt").write_text("\u03b22", encoding="utf-8")
    done = run_process(HR, finished, env=plain)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "names 1 of 1 genes" in done.stderr


HARD_NAMES = [
    "../../outside", "a/b", "a\\b", "CON", "nul.txt", ".hidden", "Nrg1", "NRG1", "nrg1~2", "NA",
    "nan",
    "MARCH1", "%41", "\u03b2 3", "x" * 80, "-", "a:b", "7", "1e5", "true",
    "U\u2028V", "W\x85X", "Y\x1cZ",  # which Unicode, but no table, takes for the ends of lines
]  # fmt: skip


def test_14_fractions_are_a_warning_in_the_record(finished):
    cell("cnts.csv", 3, "GENE2", "1.5")(finished)
    assert run_stage(HR, finished) == 0
    record = utils.json.loads((finished / utils.record_name(HR)).read_text())
    (warning,) = record["warnings"]
    assert warning.startswith("cnts.csv holds fractions; raw counts are expected")


def test_15_38_hard_gene_names(finished):
    """Every gene finds its map again, in the folder, also where upper and lower case are one."""
    rng = np.random.default_rng(0)
    spots = pd.read_csv(finished / "locs.csv", index_col=0).index
    counts = pd.DataFrame(rng.poisson(5, (22, len(HARD_NAMES))), index=spots, columns=HARD_NAMES)
    counts.to_csv(finished / "cnts.csv")
    (finished / "gene-names.txt").unlink()
    outside = contents(finished.parent.parent)
    assert run_stage(HR, finished) == 0
    assert (finished / "gene-names.txt").read_text(encoding="utf-8").split("\n") == [
        *HARD_NAMES,
        "",
    ]
    assert run_stage(MODEL, finished, "--n-plots", "30") == 0
    index = pd.read_csv(finished / "cnts-super" / "index.csv", dtype=str, keep_default_na=False)
    assert list(index["gene"]) == HARD_NAMES
    files = [path.name for path in (finished / "cnts-super").iterdir()]
    assert sorted(files) == sorted([*index["file"], "index.csv"])
    assert len({name.lower() for name in files}) == len(files)
    assert len(list((finished / "cnts-super-plots").iterdir())) == len(HARD_NAMES)
    inside = f"{finished.parent.name}/{finished.name}/"
    now = contents(finished.parent.parent)
    assert {k: v for k, v in now.items() if not k.startswith(inside)} == {
        k: v for k, v in outside.items() if not k.startswith(inside)
    }


def test_16_a_constant_gene_stays_constant(finished):
    table("cnts.csv", lambda t: t.assign(GENE4="9"))(finished)
    assert run_stage(HR, finished, "--force") == 0
    (finished / "gene-names.txt").write_text("GENE4\nGENE1\n")
    assert run_stage(HR, finished) == 0
    assert run_stage(MODEL, finished, "--preset", "published") == 0
    values = pickles.read_pickle(finished / "cnts-super" / "GENE4.pickle")
    radius = 27.5 / 16
    steps = np.arange(-1, 2)
    in_disc = (steps[:, None] ** 2 + steps[None] ** 2 <= radius**2).sum()
    np.testing.assert_allclose(values, 9 / in_disc, rtol=1e-6)
    assert run_stage(MODEL, finished) == 0
    values = pickles.read_pickle(finished / "cnts-super" / "GENE4.pickle")
    np.testing.assert_allclose(values, 9 / (np.pi * radius**2), rtol=0.5)  # before it has learnt


@pytest.mark.parametrize("n", [4, 5, 6])
@pytest.mark.parametrize("preset", ["default", "published"])
def test_18_a_handful_of_spots(finished, n, preset):
    first_spots(n)(finished)
    assert run_stage(HR, finished) == run_stage(MASKING, finished) == 0
    states = str(n + 1)  # more than there are spots to leave out
    assert run_stage(MODEL, finished, "--preset", preset, "--n-states", states) == 0
    assert tissue_of_maps(finished).all()


def test_18_too_few_spots(finished, capsys):
    first_spots(3)(finished)
    assert run_stage(HR, finished) == run_stage(MASKING, finished) == 0
    before = contents(finished)
    capsys.readouterr()
    assert run_stage(MODEL, finished) == 2
    assert "at least 4" in capsys.readouterr().err
    assert contents(finished) == before


def test_20_spots_beyond_the_border_are_dropped_with_a_count(finished, capsys):
    many(cell("locs.csv", 0, "x", "-400"), cell("locs.csv", 5, "y", "5000"))(finished)
    assert run_stage(HR, finished) == run_stage(MASKING, finished) == 0
    capsys.readouterr()
    assert run_stage(MODEL, finished) == 0
    assert "2 of 22 spots" in capsys.readouterr().out


def test_23_fewer_than_half_of_the_spots_on_tissue_is_said(finished, capsys):
    table("locs.csv", lambda t: t.assign(x=[str(9000 + i) for i in range(len(t))]))(finished)
    assert run_stage(MASKING, finished) == 0
    assert "Fewer than half of the spots" in capsys.readouterr().out


# ----- the machine --------------------------------------------------------------------------------
def test_24_no_token_and_no_network(finished, monkeypatch, tmp_path, capfd):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "no cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    before = contents(finished)
    assert run(EXTRACTOR, finished, "--login", "hf_secret2") == 2
    message = capfd.readouterr()
    assert "MahmoodLab/UNI" in message.err
    assert "HF_HUB_OFFLINE" in message.err
    assert "--weights FILE" in message.err
    assert "hf_secret" not in message.err + message.out
    assert contents(finished) == before


@pytest.mark.parametrize("kind", ["evil", "evil object", "cut", "other network", "no tensors"])
def test_25_weights_that_are_none(finished, tmp_path, capfd, kind):
    canary, path = tmp_path / "canary", tmp_path / "weights.pth"
    if kind == "evil":
        path.write_bytes(pickle.dumps(Canary(canary)))
    elif kind == "evil object":
        torch.save({"a": torch.zeros(2), "b": Canary(canary)}, path)
    elif kind == "cut":
        torch.save({"a": torch.zeros(200)}, path)
        path.write_bytes(path.read_bytes()[:500])
    elif kind == "other network":
        torch.save({"a": torch.zeros(200)}, path)
    else:
        torch.save([1, 2, 3], path)
    before = contents(finished)
    options = ("--backbone", "tf_efficientnet_lite0", "--weights", str(path))
    assert run(EXTRACTOR, finished, *options) == 2
    message = capfd.readouterr().err
    assert message.startswith("error: ")
    assert "weights.pth" in message
    assert "--weights" in message.splitlines()[-1]
    assert not canary.exists()
    assert contents(finished) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
@pytest.mark.parametrize("script", [EXTRACTOR, MODEL])
def test_26_cuda_where_there_is_none(finished, capfd, script):
    before = contents(finished)
    assert run_stage(script, finished, "--device", "cuda") == 2
    assert "--device cuda cannot be used" in capfd.readouterr().err
    assert contents(finished) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
@pytest.mark.skipif(torch.backends.mps.is_available(), reason="this machine has MPS")
def test_26_auto_says_what_it_takes(finished, capfd):
    assert run_stage(MODEL, finished, "--force", "--device", "auto") == 0
    assert re.search(r"states: 1, on cpu\n", capfd.readouterr().out)


def test_28_a_loss_that_is_not_finite_stops_at_once(finished, monkeypatch, capfd):
    epochs = []
    honest = HISTEX.DefaultNetwork.loss

    def loss(self, *args):
        value = honest(self, *args)
        if self.training:
            epochs.append(1)
        return value * (float("nan") if len(epochs) > 4 else 1.0)

    monkeypatch.setattr(HISTEX.DefaultNetwork, "loss", loss)
    shutil.rmtree(finished / "states")
    before = contents(finished)
    assert run_stage(MODEL, finished, "--epochs", "50") == 2
    message = capfd.readouterr().err
    assert any(f"state 0 diverges: in epoch {n}" in message for n in range(2, 10))
    assert "smaller one: --learning-rate" in message
    assert len(epochs) < 10
    left = contents(finished)
    assert not [name for name in left if name.endswith((".pt", ".safetensors"))]
    assert {k: v for k, v in left.items() if not k.startswith("states/")} == before
    assert not list(finished.glob(".*"))


def failing(monkeypatch, at: int, error: BaseException) -> list:
    """Let the move number ``at`` of a finished file to its real name fail; returns the moves."""
    moves = []
    replace, rename = os.replace, Path.rename

    def count(move):
        def wrapped(source, target):
            moves.append(Path(target))
            if len(moves) - 1 == at:
                raise error
            return move(source, target)

        return wrapped

    monkeypatch.setattr(os, "replace", count(replace))
    monkeypatch.setattr(Path, "rename", count(rename))
    return moves


FAULTS = {
    "killed": (KeyboardInterrupt(), 130),
    "broken disk": (OSError(errno.EIO, os.strerror(errno.EIO)), 2),
    "full disk": (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), 2),
}


@pytest.mark.parametrize(
    ("script", "fault"),
    [(script, "full disk") for script, *_ in PIPELINE] + [(HR, "killed"), (HR, "broken disk")],
)
def test_29_30_a_fault_at_any_write(finished_sample, tmp_path, monkeypatch, capfd, script, fault):
    """Whatever write fails, outputs are old or new or absent, never half, and a rerun mends it."""
    # With another seed there is something to train.
    options = ("--seed", "1", "--force") if script == MODEL else ("--force",)
    error, expected = FAULTS[fault]
    old, at, moves = contents(finished_sample), 0, []
    while at == 0 or at <= len(moves):
        directory = shutil.copytree(finished_sample, tmp_path / f"{at}")
        with monkeypatch.context() as patch:
            moves = failing(patch, at, error)
            code = run_stage(script, directory, *options)
        if at >= len(moves):
            break
        assert code == expected, moves[at]
        now = contents(directory)
        if script != MODEL:  # these write the same again, so a whole file is as it was
            now = {name: digest for name, digest in now.items() if ".work/" not in name}
            changed = {name for name in now if now[name] != old.get(name)}
            assert changed <= {utils.record_name(script)}, moves[at]
            record = directory / utils.record_name(script)
            if changed:
                assert not utils.json.loads(record.read_text())["finished"]
        shutil.rmtree(directory)
        at += 1
    assert code == 0
    assert at >= 4
    printed = capfd.readouterr().err
    assert printed.count("error: ") == (0 if fault == "killed" else at)


@pytest.mark.parametrize("script", [script for script, *_ in PIPELINE])
def test_29_an_unfinished_stage_is_named_and_mended(
    finished_sample, finished, monkeypatch, capfd, script
):
    """The last write, of the record, fails."""
    record = finished / utils.record_name(script)
    honest = os.replace

    def replace(source, target):
        if Path(target) == record and b'"finished": true' in Path(source).read_bytes():
            raise KeyboardInterrupt
        honest(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        assert run_stage(script, finished, "--force") == 130
    capfd.readouterr()
    if script != MODEL:
        assert run_stage(MODEL, finished) == 2
        message = capfd.readouterr().err
        assert "unfinished" in message
        assert f"Run: python {script}" in message
    assert run_stage(script, finished) == 0
    assert run_stage(MODEL, finished) == 0
    for name in ("he.jpg", "HRcnts.npy", "Histology_feature_map.npy", "mask.png", "held-out-r.csv"):
        assert (finished / name).read_bytes() == (finished_sample / name).read_bytes()


@pytest.mark.skipif(os.name == "nt", reason="Windows limits no size of files")
def test_43_a_checkpoint_that_the_disk_does_not_take(finished, capfd):
    """The system refuses to let a file grow; torch's own writer would hide what it said."""
    import resource

    shutil.rmtree(finished / "states")
    before = contents(finished)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        code = run_stage(MODEL, finished)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    message = capfd.readouterr().err
    assert code == 2, message
    assert re.match(r"error: .*checkpoint.*: File too large\.\n", message)
    assert contents(finished) == before


def test_43_states_and_checkpoints_are_counted_before_the_work(finished, monkeypatch, capfd):
    """There is room for maps and latent maps (2 MB), but not for a state and its checkpoints."""
    usage = shutil.disk_usage(finished)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=20 * 10**6))
    before = contents(finished)
    assert run_stage(MODEL, finished, "--force") == 2
    message = capfd.readouterr().err
    assert re.search(r"the maps and states: about 2\d MB are needed in .*, but only 20 MB", message)
    assert contents(finished) == before


@pytest.mark.parametrize("script", [CALIBRATION, HR, EXTRACTOR, MODEL])
def test_30_a_disk_that_is_too_full_is_found_before_the_work(finished, monkeypatch, capfd, script):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 900))
    before = contents(finished)
    assert run_stage(script, finished, "--force") == 2
    message = capfd.readouterr().err
    assert re.search(r"about [\d.]+ [kM]B are needed in .*, but only 900 bytes are free", message)
    assert message.splitlines()[-1].startswith("Free some space")
    assert contents(finished) == before


def test_30_a_folder_that_cannot_be_written(finished, monkeypatch, capfd):
    honest = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK and honest(path, mode))
    for script, *_ in PIPELINE:
        assert run_stage(script, finished) == 2
        message = capfd.readouterr().err
        assert "cannot be written to" in message
        assert f"python {script}" in message.splitlines()[-1]


def test_36_two_runs_of_one_stage_at_once(finished_sample, finished):
    command = [sys.executable, str(ROOT / HR), "--directory", str(finished), "--force"]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    runs = [subprocess.Popen(command, **options) for _ in range(2)]
    ended = [(*process.communicate(), process.returncode) for process in runs]
    assert [(err, code) for _, err, code in ended] == [("", 0), ("", 0)]
    for name in ("HRlocs.csv", "HRcnts.npy", "gene-names.txt"):
        assert (finished / name).read_bytes() == (finished_sample / name).read_bytes()
    assert not list(finished.glob(".*"))
    assert run_stage(MODEL, finished) == 0


def test_36_two_writers_of_one_folder(tmp_path, monkeypatch):
    """Another run puts its folder in place after this one has moved the old one aside."""
    path, honest, theirs = tmp_path / "maps", Path.rename, []

    def rename(source, target):
        if target == path and not path.exists() and not theirs:
            path.mkdir()
            (path / "map").write_text("theirs")
            theirs.append(path)
        return honest(source, target)

    path.mkdir()
    (path / "map").write_text("old")
    with disk.atomic(path) as partial:
        partial.mkdir()
        (partial / "map").write_text("ours")
        monkeypatch.setattr(Path, "rename", rename)
    assert (path / "map").read_text() == "ours"
    assert [file.name for file in tmp_path.iterdir()] == ["maps"]


# ----- files of the stage itself that are damaged -------------------------------------------------
@pytest.mark.parametrize(
    "name",
    [
        "model.json",
        "model.safetensors",
        "held-out.npy",
    ],
)
@pytest.mark.parametrize(
    "content", [b"", b"garbage \x00\xff", None], ids=["empty", "garbage", "gone"]
)
def test_33_a_damaged_state_is_trained_again(finished_sample, finished, name, content):
    path = finished / "states" / "00" / name
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    assert run_stage(MODEL, finished, "--force") == 0
    for known in ("cnts-super/GENE0.pickle", "held-out-r.csv"):
        assert (finished / known).read_bytes() == (finished_sample / known).read_bytes()


@pytest.mark.parametrize(
    "kind",
    [
        "empty",
        "garbage",
        "evil",
        "other content",
    ],
)
def test_33_a_damaged_checkpoint_is_not_used(finished_sample, finished, tmp_path, kind):
    canary, path = tmp_path / "canary", finished / "states" / "00" / "checkpoint.pt"
    shutil.rmtree(finished / "states")
    path.parent.mkdir(parents=True)
    if kind == "other content":
        torch.save([1, 2], path)
    else:
        evil = pickle.dumps(Canary(canary), protocol=2)  # as torch itself writes
        path.write_bytes({"empty": b"", "garbage": b"\x00\xff" * 99, "evil": evil}[kind])
    assert run_stage(MODEL, finished) == 0
    assert not canary.exists()
    for known in ("cnts-super/GENE0.pickle", "held-out-r.csv"):
        assert (finished / known).read_bytes() == (finished_sample / known).read_bytes()
