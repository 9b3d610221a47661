"""reading/: numbers, tables, arrays and pickles of any bytes are read rightly or refused."""

import codecs
import errno
import faulthandler
import gc
import gzip
import io
import os
import pickle
import pickletools
import re
import string
import struct
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tifffile
from conftest import ONE_FOLDER, outcome, put
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

import utils
from analysis import labels
from prepare import scans
from reading import arrays, images, pickles, pictures, plain, tables
from reading.genes import read_gene_names, read_genes


# ----- numbers and lists --------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("text", "number"),
    [("0.5", 0.5), (" 0.5 \r\n", 0.5), ("\ufeff0.5\n", 0.5), ("5e-1", 0.5), ("1", 1), (".5", 0.5)],
)
def test_read_number(stage, text, number):
    assert (
        plain.read_number(stage, put(stage, "pixel-size-raw.txt", text), 0.05, 2.5, "um") == number
    )


@given(st.text(max_size=12))
@ONE_FOLDER
def test_read_number_gives_a_number_in_range_or_refuses(stage, text):
    path = put(stage, "pixel-size-raw.txt", text.encode("utf-8", "surrogatepass"))
    value, message = outcome(plain.read_number, stage, path, 0.05, 2.5, "um")
    if message:
        assert "pixel-size-raw.txt" in message
    else:
        assert 0.05 <= value <= 2.5
        assert value == float(text.removeprefix("\ufeff"))


@pytest.mark.parametrize("order", ["le", "be"])
def test_text_of_windows_is_read(stage, order):
    """PowerShell's ``echo 0.5 > pixel-size-raw.txt`` writes UTF-16."""
    path = put(stage, "pixel-size-raw.txt", utf_16("0.5\r\n", order))
    assert plain.read_number(stage, path, 0.05, 2.5, "um") == 0.5
    path = put(stage, "gene-names.txt", utf_16("\u03b2-Cat\r\nKRT8\r\n", order))
    assert read_gene_names(stage, path) == ["\u03b2-Cat", "KRT8"]


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\x85", "\x1c", "\x1d", "\x0b", "\x0c"])
def test_46_only_line_ends_end_a_line(stage, mark):
    """A gene that get_HR.py reads in cnts.csv is the same gene in gene-names.txt."""
    gene = f"A{mark}B"
    path = put(stage, "cnts.csv", f"id,{gene},C\r\ns1,1,2\r\n")
    assert tables.read_sparse_counts(stage, path, pd.Index(["s1"]))[1] == [gene, "C"]
    for end in ("\n", "\r\n", "\r"):
        path = put(stage, "gene-names.txt", f"{gene}{end}C{end}{end}")
        assert read_gene_names(stage, path) == [gene, "C"]
        assert read_genes(str(path), [gene, "C"], "cnts.csv") == [gene, "C"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"PK\x03\x04" + bytes(60), "Excel workbook (.xlsx)"),
        (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "Excel workbook (.xls)"),
        (b"\x89HDF\r\n\x1a\n", "HDF5"),
        (gzip.compress(b"PAR1" + bytes(60), mtime=0), "Parquet"),
        (codecs.BOM_UTF16_LE + b"0", "not UTF-8 text|cannot be read"),
        ("0.5".encode("utf-16-le"), "zero bytes"),
        (b"", "holds ''"),
    ],
)
def test_what_is_no_text_is_named(stage, content, words):
    path = put(stage, "pixel-size-raw.txt", content)
    with pytest.raises(utils.StageError, match=re.escape(words).replace(r"\|", "|")) as error:
        plain.read_number(stage, path, 0.05, 2.5, "um")
    assert "ownload" not in str(error.value)
    if content:
        with pytest.raises(utils.StageError, match=r"cnts\.csv cannot be read"):
            tables.read_sparse_counts(stage, put(stage, "cnts.csv", content), pd.Index(["s1"]))


def test_55_a_count_beyond_reason_is_refused_with_the_number(stage):
    content = "id,A,B\ns1,1,2\ns2,3,{}\n"
    path = put(stage, "cnts.csv", content.format("1e9"))
    assert tables.read_sparse_counts(stage, path, pd.Index(["s1", "s2"]))[0].max() == 1e9
    path = put(stage, "cnts.csv", content.format("3e36"))
    with pytest.raises(utils.StageError, match=r"3e\+36 for spot s2, gene B; .* at most 1e\+09"):
        tables.read_sparse_counts(stage, path, pd.Index(["s1", "s2"]))


def test_a_decimal_comma_is_named(stage):
    path = put(stage, "locs.csv", "id;x;y\ns1;1,5;2\n")
    with pytest.raises(utils.StageError, match=r"'1,5' for spot s1, column x .* decimal point"):
        tables.read_locs(stage, path)


EXCELS = ["1-Mar", "01-Mar-22", "2-Sep", "Sep-02", "Mar-01", "01. Mrz", "2.31E+13", "2001-03-01"]


@pytest.mark.parametrize("gene", EXCELS)
def test_names_that_excel_makes_of_genes_are_said(stage, gene):
    path = put(stage, "cnts.csv", f"id,{gene},KRT8\ns1,1,2\n")
    tables.read_sparse_counts(stage, path, pd.Index(["s1"]))
    read_gene_names(stage, put(stage, "gene-names.txt", f"KRT8\n{gene}\n"))
    (counts, listed) = stage.notes
    assert counts.startswith(f"cnts.csv names {gene}: a date or a number that Excel makes")
    assert listed.startswith(f"gene-names.txt names {gene}: a date")
    with pytest.raises(utils.StageError, match=r"It names .* that Excel makes of a gene name"):
        read_genes(f"KRT8,{gene}", ["KRT8", "MARCHF1"], "cnts.csv")


def test_names_of_genes_are_no_damage(stage):
    names = ["MARCH1", "MARCHF1", "SEPT2", "DEC1", "1", "1e5", "NOV", "HLA-DRA", "A-1", "7SK"]
    read_gene_names(stage, put(stage, "gene-names.txt", "\n".join(names)))
    assert stage.notes == []


def test_read_gene_names(stage):
    path = put(stage, "gene-names.txt", "\ufeffMARCH1\r\n\r\n  NA \nnan\n\u03b2-Cat\n1")
    assert read_gene_names(stage, path) == ["MARCH1", "NA", "nan", "\u03b2-Cat", "1"]


# ----- tables -------------------------------------------------------------------------------------
IDS = ["NA", "1", "001", "a,b", 'c"d', "sp 1", "\u00e4", "nan", "1e5", "-"]
GENES = ["ACTB", "NA", "MARCH1", "\u03b2-Cat", "true", "2", "A,B"]
COUNTS = pd.DataFrame(
    np.random.default_rng(0).poisson(4, (len(IDS), len(GENES))), index=IDS, columns=GENES
)


def with_all_quoted(frame: pd.DataFrame) -> str:
    return frame.to_csv(quoting=1)


def r_style(frame: pd.DataFrame) -> str:
    """As R's write.table writes it: the header has no cell for the ids."""
    header, rest = frame.to_csv(sep="\t").split("\n", 1)
    return header.removeprefix("\t") + "\n" + rest


def utf_16(text: str, order: str = "le") -> bytes:
    """As Windows saves "Unicode text": with a byte order mark."""
    return f"\ufeff{text}".encode(f"utf-16-{order}")


VARIANTS = {
    "UTF-16": lambda frame: utf_16(frame.to_csv(sep="\t", lineterminator="\r\n")),
    "UTF-16, big endian": lambda frame: utf_16(frame.to_csv(), "be"),
    "CR": lambda frame: frame.to_csv(lineterminator="\r"),
    "comma": lambda frame: frame.to_csv(),
    "tab": lambda frame: frame.to_csv(sep="\t"),
    "semicolon": lambda frame: frame.to_csv(sep=";"),
    "BOM": lambda frame: "\ufeff" + frame.to_csv(),
    "CRLF": lambda frame: frame.to_csv(lineterminator="\r\n"),
    "quoted": with_all_quoted,
    "R": r_style,
    "sep=": lambda frame: '"sep=;"\n' + frame.to_csv(sep=";"),
    "named ids": lambda frame: frame.to_csv(index_label="barcode"),
    "no last newline": lambda frame: frame.to_csv().rstrip("\n"),
    "decimals": lambda frame: frame.astype(float).to_csv(),
    "blank lines at the end": lambda frame: frame.to_csv() + "\n\n",
}


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_read_counts(stage, variant, zipped):
    content = VARIANTS[variant](COUNTS)
    content = content.encode() if isinstance(content, str) else content
    path = (
        put(stage, "cnts.csv.gz", gzip.compress(content))
        if zipped
        else put(stage, "cnts.csv", content)
    )
    found, genes = tables.read_sparse_counts(stage, path, pd.Index(IDS))
    assert genes == GENES
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found.toarray(), COUNTS.to_numpy())


@given(order=st.permutations(range(len(IDS))), n=st.integers(1, len(IDS)))
@ONE_FOLDER
def test_the_order_of_rows_does_not_matter(stage, order, n):
    """P4: counts come in the order of the locations, whatever the order of the table."""
    path = put(stage, "cnts.csv", COUNTS.iloc[order].to_csv())
    found, _ = tables.read_sparse_counts(stage, path, pd.Index(IDS[:n]))
    np.testing.assert_array_equal(found.toarray(), COUNTS[:n].to_numpy())


def test_read_locs(stage):
    xy = pd.DataFrame({"in_tissue": 1, "y": range(10), "x": np.arange(10) / 3, "note": "a,b"}, IDS)
    for variant in ("comma", "tab", "semicolon", "BOM", "CRLF", "R", "quoted"):
        found = tables.read_locs(stage, put(stage, "locs-raw.csv", VARIANTS[variant](xy)))
        assert list(found.columns) == ["x", "y"]
        assert list(found.index) == IDS
        np.testing.assert_array_equal(found.to_numpy(), xy[["x", "y"]].to_numpy(float))


def test_small_tables_are_read_as_people_save_them(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("x,y\ns1,1,2\ns2,3,4\n")  # R leaves out the name of the first column
    assert tables.read_rows(path) == [["", "x", "y"], ["s1", "1", "2"], ["s2", "3", "4"]]
    assert tables.read_text_table(path).to_dict("list") == {
        "": ["s1", "s2"], "x": ["1", "3"], "y": ["2", "4"],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "it is empty."),
        ("x,y,x\n1,2,3\n", "it names the columns x more than once."),
        ("x,y\n1,2\n1\n", "it has 1 fields in row 3; expected 2."),
    ],
)
def test_small_tables_that_are_refused(tmp_path, text, words):
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(plain.Unfit) as error:
        tables.read_text_table(tmp_path / "a.csv")
    assert str(error.value) == words


BAD_TABLES = {
    "longer row": "id,A,B\ns1,1,2\ns2,3,4,5\n",
    "shorter row": "id,A,B\ns1,1,2\ns2,3\n",
    "longer row, text": "id,A,B\ns1,1,2\ns2,3,4,x\n",
    "longer first row by two": "id,A,B\ns1,1,2,9,9\ns2,3,4\n",
    "no ids": "A,B\n1,2\n3,4\n",
    "decimal commas": "id;A;B\ns1;1,5;2\ns2;3;4\n",
    "thousands": 'id,A,B\ns1,"1,000",2\ns2,3,4\n',
    "hexadecimal": "id,A,B\ns1,0x10,2\ns2,3,4\n",
    "true": "id,A,B\ns1,True,2\ns2,3,4\n",
}


@pytest.mark.parametrize(
    "kind",
    BAD_TABLES,
)
def test_tables_that_are_refused(stage, kind):
    path = put(stage, "cnts.csv", BAD_TABLES[kind])
    with pytest.raises(utils.StageError, match=r"cnts\.csv"):
        tables.read_sparse_counts(stage, path, pd.Index(["s1", "s2"]))


@given(
    st.one_of(
        st.binary(max_size=60),
        st.text(st.sampled_from('id,xy\t;\n\r"1.-e \0\ufeff'), max_size=60).map(str.encode),
        st.text(st.sampled_from('id,xy\t;\n\r"1.-e '), max_size=40).map(
            lambda text: b"id,x,y\ns1,1,2\n" + text.encode()
        ),
    ),
    st.booleans(),
)
@settings(parent=ONE_FOLDER, max_examples=400)
def test_read_locs_reads_or_refuses(stage, content, zipped):
    """P6: whatever the bytes, the result is a table of finite places, or a StageError."""
    path = put(stage, "locs.csv", content)
    if zipped:
        path = put(stage, "cnts.csv.gz", gzip.compress(content))
    locs, message = outcome(tables.read_locs, stage, path)
    if message:
        assert path.name in message
    else:
        assert locs.shape[1] == 2
        assert len(locs) > 0
        assert np.isfinite(locs.to_numpy()).all()
        assert locs.index.is_unique


def test_a_damaged_gz_is_refused(stage):
    whole = gzip.compress(COUNTS.to_csv().encode(), mtime=0)
    for at in range(10, len(whole)):  # behind the header, whose bytes have little meaning
        damaged = bytearray(whole)
        damaged[at] ^= 0x55
        path = put(stage, "cnts.csv.gz", bytes(damaged))
        with pytest.raises(utils.StageError, match=r"cnts\.csv\.gz"):
            tables.read_sparse_counts(stage, path, pd.Index(IDS))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("id,A,B\ns1,1,2\n\ns2,3,\n", ["holds ''", "spot s2, column B (data row 2)"]),
        ('id,A,B\n"s1",1,2\n"s2",3,""\n', ["holds ''", "spot s2, column B (data row 2)"]),
        ("id,A,B\ns1,,2\ns2,3,4\n", ["holds ''", "spot s1, column A (data row 1)"]),
        ("id,A,B\ns1,1,2\ns2,1e39,4\n", ["'1e39', read as inf", "spot s2, column A"]),
        ("id,A,B\ns1,1,2\ns2,-inf,4\n", ["'-inf', read as -inf", "data row 2"]),
        ("id,A,B\ns1,1,2\ns2,1_000,4\n", ["'1_000'", "spot s2, column A"]),
        ("id;A;B\ns1;1;2\ns2;3;1,5\n", ["'1,5'", "spot s2, column B"]),
        ('id,A,B\ns1,1,2\ns2,"1,000",4\n', ["'1,000'", "spot s2, column A"]),
        ("id,A,B\ns1,1,2\ns2,3,4,5\n", ["has 3 fields", "'s2' (data row 2)", "expected 2"]),
        ("id,A,B\ns1,1,2\ns2\n", ["has 0 fields", "'s2' (data row 2)", "none for column A"]),
        ("id,A,B\ns1,1,2\ns2,3\x00,4\n", ["zero bytes"]),
        (b"id,A,B\ns1,1,2\ns\xe9,3,4\n", ["cannot be read", "utf-8"]),
        ("id,A,B\n\n\n", ["no spot"]),
        ("id,A,,\ns1,1,,\n", ["names the columns '' (no name) more than once"]),
        ("id,A,A\ns1,1,2\n", ["names the columns A more than once"]),
        ("id,A,B\ns1,1,2\ns1,1,2\n", ["lists the spots s1 more than once"]),
        ("id,A,B\ns1,1,2\ns2,3,-4.5\n", ["holds -4.5 for spot s2, gene B"]),
    ],
)
@pytest.mark.parametrize("size", [2**22, 8])  # of a block
def test_the_message_names_the_cell(stage, content, words, size, monkeypatch):
    monkeypatch.setattr(tables, "BLOCK_CHARACTERS", size)
    path = put(stage, "cnts.csv", content)
    with pytest.raises(utils.StageError, match=r"cnts\.csv") as error:
        tables.read_sparse_counts(stage, path, pd.Index(["s1", "s2"]))
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("quoting", [0, 1])
@pytest.mark.parametrize("width", [1, 3000])
def test_blocks_of_narrow_and_wide_tables_hold_the_numbers_of_python(
    stage, width, quoting, monkeypatch
):
    """Against float(), number by number: whole ones, decimals, exponents and spaces."""
    monkeypatch.setattr(tables, "BLOCK_CHARACTERS", 1000)
    rng = np.random.default_rng(0)
    kinds = ["{:d}", "{:d}.0", "{:d}e2", " {:d} ", "+{:d}", "{:d}.{:d}", "1{:09d}{:d}", "{:d}e-3"]
    cells = [
        [rng.choice(kinds).format(*rng.integers(0, 999, 2)) for _ in range(width)] for _ in range(9)
    ]
    spots = pd.Index([f"s{i}" for i in range(9)])
    frame = pd.DataFrame(cells, spots, [f"G{i}" for i in range(width)])
    path = put(stage, "cnts.csv", frame.to_csv(quoting=quoting))
    _, _, found = tables.read_table(path)  # some are beyond what is taken for a count
    wanted = np.array([[float(cell) for cell in row] for row in cells], np.float32)
    np.testing.assert_array_equal(found.toarray(), wanted)


def test_a_large_table_is_never_held_whole(stage, monkeypatch):
    """Dense, the numbers take 8 MB; the text of the table takes 4 MB."""
    monkeypatch.setattr(tables, "BLOCK_CHARACTERS", 2**16)
    row = "," + ",".join("7" if i % 100 == 0 else "0" for i in range(1000)) + "\n"
    spots = pd.Index([f"s{i}" for i in range(2000)])
    header = "id," + ",".join(f"G{i}" for i in range(1000)) + "\n"
    path = put(stage, "cnts.csv", header + "".join(spot + row for spot in spots))
    tracemalloc.start()
    try:
        found, _ = tables.read_sparse_counts(stage, path, spots)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (found.nnz, found.sum()) == (20_000, 140_000)
    assert peak < 3e6


def test_a_field_beyond_the_limit_of_csv_is_refused(stage):
    path = put(stage, "locs.csv", "id,x,y\n" + "s" * 200_000 + ",1,2\n")
    with pytest.raises(utils.StageError, match=r"locs\.csv"):
        tables.read_locs(stage, path)


# ----- arrays -------------------------------------------------------------------------------------
def npy(values: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values)
    return buffer.getvalue()


def read_rgb_array(stage):
    return arrays.read_array(stage, utils.RGB, np.uint8, (2, None, 3))


def test_read_array(stage):
    values = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    put(stage, "Histology_rgb.npy", npy(values))
    found = read_rgb_array(stage)
    np.testing.assert_array_equal(found, values)
    assert isinstance(found, np.memmap)
    assert not found.flags.writeable


def test_read_array_refuses_every_truncation(stage):
    whole = npy(np.arange(24, dtype=np.uint8).reshape(2, 4, 3))
    for size in range(len(whole)):
        put(stage, "Histology_rgb.npy", whole[:size])
        with pytest.raises(
            utils.StageError, match=r"Histology_rgb\.npy.*(?s:.*)Histology_Extractor"
        ):
            read_rgb_array(stage)


def test_read_array_refuses_an_archive_under_its_name(stage):
    """np.load would open it as an .npz, and leave the file open."""
    put(stage, "Histology_rgb.npy", b"PK\x03\x04 and what follows")
    with pytest.raises(utils.StageError, match=r"Histology_rgb\.npy"):
        read_rgb_array(stage)
    gc.collect()


def test_rows_that_the_disk_does_not_give_are_an_error_of_the_system(stage):
    path = put(stage, "Histology_rgb.npy", npy(np.zeros((2, 4, 3), np.uint8)))
    found = read_rgb_array(stage)
    with path.open("r+b") as file:
        file.truncate(140)
    with pytest.raises(OSError, match=r"Histology_rgb\.npy") as caught:
        arrays.some_rows(found, 0, 2)
    assert caught.value.errno == errno.EIO


@given(
    st.one_of(
        st.binary(max_size=200),
        st.binary(max_size=100).map(lambda junk: b"\x93NUMPY\x01\x00" + junk),
        hnp.arrays(
            st.sampled_from([np.uint8, np.int8, np.float16, np.float64, np.dtype("U2"), bool]),
            hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=3),
        ).map(npy),
        st.builds(
            lambda header: b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header,
            st.sampled_from(
                [
                    b"{'descr': '|u1', 'fortran_order': False, 'shape': (2, 4, 3)}\n",
                    b"{'descr': '|u1', 'fortran_order': False, 'shape': (2, -4, 3)}\n",
                    b"{'descr': '|u1', 'fortran_order': False, 'shape': (2, 10**99, 3)}\n",
                    b"{'descr': '|u1', 'fortran_order': False, 'shape': (2, 99999999999999, 3)}\n",
                    b"{'descr': '|u1', 'fortran_order': 2, 'shape': (2, 4, 3)}\n",
                    b"{'descr': '|O', 'fortran_order': False, 'shape': (2, 4, 3)}\n",
                    b"{'descr': [('a', '|u1')], 'fortran_order': False, 'shape': (2, 4, 3)}\n",
                    b"{'descr': '|u1'}\n",
                ]
            ),
        ),
    )
)
@settings(parent=ONE_FOLDER, max_examples=400)
def test_read_array_reads_or_refuses(stage, content):
    """P6, for an array: the contract's shape and type, or a StageError."""
    put(stage, "Histology_rgb.npy", content)
    values, message = outcome(read_rgb_array, stage)
    if message:
        assert "Histology_rgb.npy" in message
    else:
        assert values.dtype == np.uint8
        assert values.ndim == 3
        assert values.shape[::2] == (2, 3)


@pytest.mark.parametrize(
    "header",
    [
        pytest.param(b"(" * 400 + b"\n", id="400 brackets"),
        pytest.param(b"{" * 9 + b"\n", id="9 braces"),
        pytest.param(b"-" * 9000 + b"1\n", id="9000 signs"),
        pytest.param(b"\n", id="nothing"),
    ],
)
def test_read_array_refuses_a_hostile_header(stage, header):
    put(
        stage,
        "Histology_rgb.npy",
        b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header,
    )
    with pytest.raises(utils.StageError, match=r"Histology_rgb\.npy"):
        read_rgb_array(stage)


@pytest.mark.parametrize("block", [2**23, 16, 1])  # all rows at a time, or a single one
@pytest.mark.parametrize("place", [(0, 0), (1, 2), (2, 3)])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_read_array_refuses_what_is_not_finite(stage, value, place, block, monkeypatch):
    monkeypatch.setattr(arrays, "BLOCK_BYTES", block)
    values = np.ones((3, 4), np.float32)
    values[place] = value
    put(stage, "HRcnts.npy", npy(values))
    with pytest.raises(utils.StageError, match="not finite"):
        arrays.read_array(stage, utils.HR_CNTS, np.float32, (3, 4))
    found = arrays.read_array(stage, utils.HR_CNTS, np.float32, (3, 4), finite=False)
    np.testing.assert_array_equal(found, values)


# ----- pickles ------------------------------------------------------------------------------------
class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch '{self.path}'",)


def evil_contents(canary: Path) -> dict[str, bytes]:
    objects = np.empty(2, object)
    objects[:] = Evil(canary)
    system = f"c{os.system.__module__}\nsystem\n(S\"touch '{canary}'\"\ntR.".encode()
    return {
        "bare": pickle.dumps(Evil(canary)),
        "in a dict": pickle.dumps({"cls": [np.zeros(2), Evil(canary)]}),
        "in an object array": pickle.dumps(objects),
        "by hand": system,
        "eval": f"cbuiltins\neval\n(S'open({str(canary)!r}, \"w\")'\ntR.".encode(),
        "getattr": b"cbuiltins\ngetattr\n(cnumpy\nndarray\nS'tofile'\ntR.",
        "import": b"cimportlib\nimport_module\n(S'this'\ntR.",
        "a dotted name": b"\x80\x04\x8c\x05numpy\x8c\x0bndarray.tofile\x93.",
        "numpy's own exec": b"cnumpy.testing._private.utils\nruncode\n(S'1'\ntR.",
        "numpy's own load": b"cnumpy\nload\n(S'x'\ntR.",
    }


@pytest.mark.parametrize("kind", evil_contents(Path()))
def test_a_pickle_that_would_run_code_is_refused(tmp_path, kind):
    canary, path = tmp_path / "canary", tmp_path / "x.pickle"
    path.write_bytes(evil_contents(canary)[kind])
    with pytest.raises(utils.StageError, match=r"x\.pickle"):
        pickles.read_pickle(path)
    assert not canary.exists()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("spelling", ["core", "_core"])  # of numpy 1 and 2
@pytest.mark.filterwarnings("ignore:numpy.core:DeprecationWarning")
def test_read_pickle_reads_arrays(tmp_path, protocol, spelling):
    path = tmp_path / "x.pickle"
    written = {
        "cls": np.arange(6, dtype=np.float32).reshape(2, 3),
        "more": [
            np.float64(2.5),
            np.arange(3)[::-1],
            np.asfortranarray(np.eye(3)),
            np.arange(24).reshape(2, 3, 4).transpose(1, 0, 2),
            "text",
            1,
            None,
        ],
    }
    path.write_bytes(respelt(written, protocol, spelling))
    assert f"numpy.{spelling}.".encode() in path.read_bytes()
    found = pickles.read_pickle(path)
    np.testing.assert_array_equal(found["cls"], written["cls"])
    assert found["cls"].dtype == np.float32
    for mine, theirs in zip(found["more"], written["more"], strict=True):
        np.testing.assert_array_equal(mine, theirs)


def respelt(content, protocol: int, spelling: str) -> bytes:
    """The content pickled by a numpy that calls its core ``numpy.<spelling>``."""

    class Pickler(pickle._Pickler):
        def save_global(self, obj, name=None):
            module = getattr(obj, "__module__", "") or ""
            room, _, rest = module.partition(".")
            core, _, rest = rest.partition(".")
            if room != "numpy" or core not in ("core", "_core"):
                return super().save_global(obj, name)
            module = f"numpy.{spelling}.{rest}"
            name = name or obj.__name__
            if self.proto >= 4:
                self.save(module)
                self.save(name)
                self.write(pickle.STACK_GLOBAL)
            else:
                self.write(pickle.GLOBAL + f"{module}\n{name}\n".encode())
            self.memoize(obj)

    functions = dict.fromkeys((type(codecs.encode), type(respelt)), Pickler.save_global)
    Pickler.dispatch = {**pickle._Pickler.dispatch, **functions}
    buffer = io.BytesIO()
    Pickler(buffer, protocol).dump(content)
    return buffer.getvalue()


LENGTHS = b"\x8d\x8e\x95\x96"  # opcodes with a length of 8 bytes, see the next test


@given(
    st.one_of(
        st.binary(max_size=80),
        st.text(string.printable, max_size=40).map(str.encode),
    )
)
@settings(parent=ONE_FOLDER, max_examples=300)
def test_read_pickle_reads_or_refuses(tmp_path, content):
    path = tmp_path / "x.pickle"
    path.write_bytes(content)
    _, message = outcome(pickles.read_pickle, path)
    assert message is None or "x.pickle" in message


@pytest.mark.parametrize("opcode", LENGTHS)
@pytest.mark.parametrize("length", [1 << 60, 1 << 63], ids=["long", "longer"])
def test_read_pickle_refuses_impossible_lengths(tmp_path, opcode, length):
    path = tmp_path / "x.pickle"
    path.write_bytes(bytes([opcode]) + length.to_bytes(8, "little"))
    with pytest.raises(utils.StageError, match=r"x\.pickle"):
        pickles.read_pickle(path)


def test_read_pickle_takes_no_flags_of_a_dtype(tmp_path):
    """A dtype float32 with the flag of objects: numpy itself then takes its bytes for addresses."""
    path = tmp_path / "x.pickle"
    content = pickletools.optimize(pickle.dumps(np.full(4, 1.5, np.float32), protocol=2))
    state = b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK"
    assert content.count(state + b"\x00") == 1
    path.write_bytes(content.replace(state + b"\x00", state + b"\x3f"))
    code = (
        f"import sys; sys.path.insert(0, {str(Path(utils.__file__).parent)!r})\n"
        "from pathlib import Path\nfrom reading import pickles\n"
        f"print(pickles.read_pickle(Path({str(path)!r})).tolist())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "[1.5, 1.5, 1.5, 1.5]\n")


# ----- mask.png and the grid of he.jpg -----
def save_mask(stage, pixels) -> None:
    Image.fromarray(np.array(pixels, np.uint8)).save(stage.directory / "mask.png")


def test_a_mask_is_whatever_is_neither_black_nor_transparent(stage):
    black, blue, grey = (0, 0, 0, 255), (0, 0, 9, 255), (1, 1, 1, 255)
    hidden = (255, 255, 255, 0)
    save_mask(stage, [[black, blue, grey], [hidden, black, (255, 0, 0, 1)]])
    found = images.read_mask(stage, (2, 3))
    assert found.tolist() == [[False, True, True], [False, False, True]]


@pytest.mark.parametrize("quality", [50, 75, 95])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_the_noise_of_a_jpeg_is_no_tissue(stage, mode, quality):
    """With a pixel per superpixel, the black around the tissue is not all black any more."""
    row, column = np.mgrid[:112, :168]
    tissue = ((row - 56) / 40) ** 2 + ((column - 84) / 60) ** 2 < 1
    path = stage.directory / "mask.png"
    Image.fromarray(tissue).convert(mode).save(path, "JPEG", quality=quality)
    assert ((np.asarray(Image.open(path).convert("L")) > 0) != tissue).sum() > 300
    np.testing.assert_array_equal(images.read_mask(stage, tissue.shape), tissue)
    assert stage.notes == [
        "mask.png is a JPEG, whose black is not all black: up to 127 is no tissue"
    ]


def test_a_mask_in_whole_multiples_goes_by_the_half_of_a_superpixel(stage):
    save_mask(stage, np.kron([[0, 255], [255, 0]], np.ones((3, 3))))
    assert images.read_mask(stage, (2, 2)).tolist() == [[False, True], [True, False]]
    save_mask(stage, [[255, 255, 255, 0], [0, 0, 0, 0]])  # two of four pixels, one of four
    assert images.read_mask(stage, (1, 2)).tolist() == [[True, False]]


@pytest.mark.parametrize("shape", [(2, 6), (4, 3), (1, 3), (3, 3), (2, 4)])
def test_a_mask_of_another_size_is_refused_with_both_sizes(stage, shape):
    save_mask(stage, np.full(shape, 255))
    _, said = outcome(images.read_mask, stage, (2, 3))
    assert f"mask.png is {shape[1]} x {shape[0]} px" in said
    assert "3 x 2 px" in said


def test_a_mask_of_all_tissue_is_said_and_none_is_refused(stage, capsys):
    save_mask(stage, [[0, 255]])
    images.read_mask(stage, (1, 2))
    assert capsys.readouterr().out == ""
    save_mask(stage, [[255, 255]])
    assert images.read_mask(stage, (1, 2)).all()
    assert "whole image is tissue" in capsys.readouterr().out
    save_mask(stage, [[0, 0]])
    assert "is all black" in outcome(images.read_mask, stage, (1, 2))[1]


def test_an_image_of_ours_that_was_saved_as_another_kind_is_named(stage):
    put(stage, "he.jpg", b"")
    Image.new("RGB", (224, 224)).save(stage.directory / "he.jpg", "WEBP")
    for read in (images.ImageRows, lambda *where: images.thumbnail(*where, 50)):
        _, message = outcome(read, stage, stage.directory / "he.jpg")
        assert "is a WebP image, whatever its name says; expected JPEG, PNG or TIFF." in message


def test_the_grid_of_an_image(stage):
    Image.new("RGB", (672, 448)).save(stage.directory / "he.jpg")
    assert images.grid_shape(stage) == (28, 42)
    assert all(isinstance(side, int) for side in images.grid_shape(stage))
    for size in ((670, 448), (672, 450)):
        Image.new("RGB", size).save(stage.directory / "he.jpg")
        _, said = outcome(images.grid_shape, stage)
        assert f"is {size[0]} x {size[1]} px; both sides must be multiples of 224 px" in said


def test_an_image_larger_than_any_of_ours_is_refused_by_its_header(stage, monkeypatch):
    Image.new("RGB", (448, 224)).save(stage.directory / "he.jpg")
    monkeypatch.setattr(images, "MAX_HE_PIXELS", 448 * 224 - 1)
    where = stage, stage.directory / "he.jpg"
    for read, args in ((images.grid_shape, (stage,)), (images.ImageRows, where)):
        assert "he.jpg is 448 x 224 px; expected at most 0" in outcome(read, *args)[1]


def test_rows_of_an_image_are_taken_one_after_the_other(stage):
    Image.new("RGB", (224, 224)).save(stage.directory / "he.jpg")
    image = images.ImageRows(stage, stage.directory / "he.jpg")
    with image, pytest.raises(IndexError, match=r"as image\[top:bottom\]"):
        image[0:10:2]


def test_an_error_of_the_disk_is_not_said_to_be_a_damaged_image(stage, monkeypatch):
    noise = np.random.default_rng(0).integers(0, 255, (224, 224, 3), dtype=np.uint8)
    Image.fromarray(noise).save(stage.directory / "he.jpg", quality=95)
    Image.fromarray(noise).save(stage.directory / "he.tif")

    def fail(*_):
        raise OSError(errno.EIO, "of the disk")

    with monkeypatch.context() as broken:
        broken.setattr("PIL.TiffImagePlugin.TiffImageFile", fail)
        with pytest.raises(OSError, match="of the disk"):
            pictures.tiff_header(stage.directory / "he.tif")
    with monkeypatch.context() as broken:
        broken.setattr(os, "read", fail)
        with pytest.raises(OSError, match="of the disk"):
            images.ImageRows(stage, stage.directory / "he.jpg")
    assert pictures.failures == []
    assert (images.ImageRows(stage, stage.directory / "he.jpg")[:].std() > 20).all()


def test_a_text_that_is_too_large_to_be_small_is_refused(stage, monkeypatch):
    monkeypatch.setattr(plain, "PIECE", 10)
    monkeypatch.setattr(plain, "WHOLE_FILE", 20)
    assert plain.read_lines(stage, put(stage, "gene-names.txt", "A\n" * 10)) == ["A"] * 10
    _, said = outcome(plain.read_lines, stage, put(stage, "gene-names.txt", "A\n" * 10 + "B"))
    assert "it has more than 0 million characters" in said


def test_both_ends_of_a_range_belong_to_it(stage):
    for text in ("0.05", "2.5"):
        path = put(stage, "pixel-size-raw.txt", text)
        assert plain.read_number(stage, path, 0.05, 2.5, "um") == float(text)
    for text in ("0.0499", "2.501"):
        path = put(stage, "pixel-size-raw.txt", text)
        assert "between 0.05 and 2.5" in outcome(plain.read_number, stage, path, 0.05, 2.5, "um")[1]


# ----- TIFF -----
def round_tiff(path: Path, pages: int, back_to: int) -> Path:
    """A TIFF whose last page names an earlier one as the next."""
    with tifffile.TiffWriter(path) as tiff:
        for number in range(pages):
            pixels = np.full((32, 48, 3), number % 255, np.uint8)
            tiff.write(pixels, photometric="rgb", contiguous=False, metadata=None)
    with tifffile.TiffFile(path) as tiff:
        target, last = tiff.pages[back_to].offset, tiff.pages[-1].offset
    content = bytearray(path.read_bytes())
    (tags,) = struct.unpack_from("<H", content, last)
    struct.pack_into("<I", content, last + 2 + 12 * tags, target)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("read", [labels.open_labels, scans.open_slide])
@pytest.mark.parametrize(("pages", "back_to"), [(1, 0), (3, 1), (150, 0)])
def test_pages_that_go_round_are_refused(read, pages, back_to, tmp_path):
    path = round_tiff(tmp_path / "cells.tif", pages, back_to)
    faulthandler.dump_traceback_later(30, exit=True)  # a reader that hangs ends the tests
    try:
        with pytest.raises(utils.StageError, match=f"is page {back_to + 1} again: they never end"):
            read(path)
    finally:
        faulthandler.cancel_dump_traceback_later()
