"""analysis/: one reader of tables and of maps for all scripts; what is damaged is named."""

import contextlib
import errno
import gzip
import json
import os
import pickle
import shlex
import struct
import time

import numpy as np
import pandas as pd
import pytest
from conftest import write_record
from test_regions import add_to_record

import utils
from analysis import (
    annotate,
    cells,
    enrich,
    evaluate,
    export,
    files,
    inputs,
    patterns,
    report,
    segment,
    sheets,
)
from reading import arrays, pickles


class Refused(Exception):
    """What a reader says is wrong with a table."""


def read(path, content, columns=("gene",)):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return sheets.read_sheet(path, columns, Refused)


# ----- tables -----
@pytest.mark.parametrize(
    "text",
    [
        "gene,file\nA,1.npy\nNA,2.npy\n",
        "\ufeffgene,file\r\nA,1.npy\r\nNA,2.npy",
        "gene;file\nA;1.npy\n\n NA ; 2.npy \n",
        'gene\tfile\n"A"\t1.npy\nNA\t2.npy\n',
        "gene,file\rA,1.npy\rNA,2.npy\r",
    ],
)
def test_a_table_however_it_was_saved(tmp_path, text):
    table = read(tmp_path / "t.csv", text, ("gene", "file"))
    assert table.to_numpy().tolist() == [["A", "1.npy"], ["NA", "2.npy"]]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-8-sig"])
@pytest.mark.parametrize("packed", [False, True])
def test_a_table_in_any_unicode_is_read(tmp_path, encoding, packed):
    """As Excel saves "Unicode text", or as a download is packed."""
    mark = "\ufeff" if encoding == "utf-16-be" else ""
    content = f"{mark}gene\tfile\n\u03b2\t1.npy\n".encode(encoding)
    table = read(tmp_path / "t.csv", gzip.compress(content) if packed else content)
    assert table.to_numpy().tolist() == [["\u03b2", "1.npy"]]


def test_gene_sets_in_utf_16_are_read(tmp_path):
    path = tmp_path / "sets.gmt"
    path.write_text("one\tof mine\tA\tB\r\ntwo\t\tC\r\n", encoding="utf-16")
    assert enrich.read_gmt(path) == {"one": ["A", "B"], "two": ["C"]}


def test_an_error_of_the_disk_is_not_a_bad_table(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    (tmp_path / "t.csv").write_text("gene\nA\n")
    monkeypatch.setattr(sheets.plain, "open_text", fail)
    with pytest.raises(OSError, match="Input/output"):
        read(tmp_path / "t.csv", "gene\nA\n")


def test_names_are_kept_as_they_are(tmp_path):
    names = [
        "NA",
        "1e5",
        "=1+1",
        "@x",
        "-x",
        "+y",
        "a\x85b",
        "a\u2028b",
        "a\x1cb",
        "007",
        "B,1",
        "é",
    ]
    path = tmp_path / "t.csv"
    pd.DataFrame({"gene": names, "n": 1}).to_csv(path, index=False)
    assert sheets.read_sheet(path, ["gene"], Refused)["gene"].tolist() == names


def test_a_table_of_r_has_a_column_without_a_name(tmp_path):
    table = read(tmp_path / "t.csv", "gene,n\nr1,A,2\n")
    assert table.to_dict("list") == {"": ["r1"], "gene": ["A"], "n": ["2"]}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "no row"),
        ("\n\n", "no row"),
        ("name,file\nA,b\n", "has the columns name, file. It lacks gene"),
        ("gene,gene\nA,b\n", "names the columns gene more than once"),
        ("gene,file\nA,b,c\nA,b\n", "2 fields in line 3"),
        ("gene,file\nA\n", "1 fields in line 2; its header has 2"),
        ('gene,file\n"A,b\n', "is not a table: line 2"),
        (b"\xff\xfe\x00\x01\x02", "cannot be read as text"),  # UTF-16 that was cut
        ("gene\nA\0\n", "cannot be read as text: it holds zero bytes"),
        (b"PK\x03\x04", "cannot be read as text: it is an Excel workbook"),
        (gzip.compress(b"gene\nA\n", mtime=0)[:-9], "cannot be read as text"),
    ],
)
def test_bad_tables(tmp_path, content, words):
    with pytest.raises(Refused, match=words.replace(".", r"\.")):
        read(tmp_path / "t.csv", content)


def test_numbers_of_a_table(tmp_path):
    table = read(tmp_path / "t.csv", "gene,r\nA,0.5\nB,\nC,nan\nD,-1e3\n")
    found = sheets.numbers_in(table, "r", Refused)
    np.testing.assert_array_equal(found, [0.5, np.nan, np.nan, -1000])
    with pytest.raises(Refused, match=r"'-1e3' for r in line 5"):
        sheets.numbers_in(table, "r", Refused, largest=1)
    for cell in ("x", "inf", "-inf", "0,5", "1e999"):
        table = read(tmp_path / "t.csv", f"gene;r\nA;{cell}\n")
        with pytest.raises(Refused, match="for r in line 2"):
            sheets.numbers_in(table, "r", Refused)


# ----- maps -----
INDEX = "cnts-super/index.csv"


def bad_indices():
    return {
        "empty": (b"", "no row"),
        "zeros": (b"\x00" * 300, "holds zero bytes"),
        "bytes": (b"\xff\xd8\xff\xe0", "cannot be read as text"),
        "no gene": (b"gene,file\n", "names no gene"),
        "other columns": (b"name,path\nA,0.npy\n", "It lacks gene and file"),
        "twice": (b"gene,file\nA,0.npy\nA,1.pickle\n", "names the gene A more than once"),
        "one file": (b"gene,file\nA,0.npy\nB,0.npy\n", "names the file 0.npy more than once"),
        "outside": (b"gene,file\nA,../../0.npy\n", "no file of it"),
        "folder": (b"gene,file\nA,..\n", "no file of it"),
        "no file": (b"gene,file\nA,\n", "no file of it"),
        "ragged": (b"gene,file\nA,0.npy,1\nB,0.npy\n", "2 fields in line 3"),
    }


@pytest.mark.parametrize("case", bad_indices())
def test_a_damaged_index_of_maps(labelled, case, capsys):
    content, words = bad_indices()[case]
    (labelled / INDEX).write_bytes(content)
    with pytest.raises(utils.StageError, match=words) as error:
        inputs.map_files(labelled)
    assert "python HISTEX.py --directory" in str(error.value)
    assert "--force" in str(error.value)
    assert "move it away first" in str(error.value)


def test_an_index_saved_by_a_spreadsheet_is_read(labelled):
    before = inputs.map_files(labelled)
    table = pd.read_csv(labelled / INDEX, dtype=str, keep_default_na=False)
    table.to_csv(
        labelled / INDEX, index=False, sep=";", encoding="utf-8-sig", lineterminator="\r\n"
    )
    assert inputs.map_files(labelled) == before


def odd_maps():
    image = np.ones((3, 4), np.float32)
    bad = np.full((3, 4), np.nan)
    bad[1, 1] = np.inf
    return {
        "text": np.full((3, 4), "a"),
        "complex": image * 1j,
        "dates": np.zeros((3, 4), "M8[s]"),
        "bool": image > 0,
        "records": np.zeros((3, 4), [("a", "f4")]),
        "empty": image[:0],
        "deep": image[None],
        "infinite": bad,
        "huge": np.full((3, 4), 1e300),
    }


@pytest.mark.parametrize("case", odd_maps())
def test_odd_maps_are_refused(tmp_path, case):
    path = tmp_path / "cnts-super" / "A.npy"
    path.parent.mkdir()
    np.save(path, odd_maps()[case])
    with pytest.raises(utils.StageError, match=r"A\.npy (is not a map|holds (inf|1e\+300))"):
        inputs.read_map(path)


@pytest.mark.parametrize("dtype", ["<f2", "<f4", ">f4", "<f8", ">f8", "u1", "<i4", ">i8"])
@pytest.mark.parametrize("suffix", [".npy", ".pickle"])
def test_maps_of_any_numbers_are_floats(tmp_path, dtype, suffix):
    image = np.arange(12).reshape(3, 4).astype(dtype)
    path = tmp_path / "cnts-super" / f"A{suffix}"
    path.parent.mkdir()
    np.save(path, image) if suffix == ".npy" else path.write_bytes(pickle.dumps(image))
    found = inputs.read_map(path)
    assert found.dtype in (np.float32, np.float64)
    assert found.tolist() == image.tolist()


def test_a_header_that_promises_more_than_the_file_holds(tmp_path):
    path = tmp_path / "cnts-super" / "A.npy"
    path.parent.mkdir()
    np.save(path, np.ones((3, 4), np.float32))
    path.write_bytes(path.read_bytes().replace(b"(3, 4)", b"(90000, 90000)"))
    with pytest.raises(utils.StageError, match="is not a whole map"):
        inputs.read_map(path)


def test_a_missing_map_is_named_only_if_it_is_needed(labelled, capsys):
    """Exporting a gene needs its map alone, and neither the image nor the latent maps."""
    maps = inputs.map_files(labelled)
    genes = list(maps)
    assert genes[:2] == ["NA", "A"]
    maps["A"].unlink()
    record = json.loads((labelled / "image_calibration.json").read_text())
    size = [16 * n for n in inputs.read_map(maps[genes[0]]).shape]
    sizes = dict.fromkeys(("raw_size", "scaled_size", "size"), size)
    (labelled / "image_calibration.json").write_text(json.dumps(record | sizes))
    (labelled / "embeddings-gene.pickle").unlink()
    for kind in ("h5ad", "csv", "ometiff", "spots"):
        argv = ["--directory", str(labelled), "--format", kind, "--genes"]
        assert export.run([*argv, "NA"]) == 0, capsys.readouterr().err
        assert export.run([*argv, "NA,A"]) == 2
        error = capsys.readouterr().err
        assert f"{maps['A'].name} is missing" in error
        assert "python HISTEX.py --directory" in error


# ----- arrays -----
@pytest.mark.parametrize("order", ["C", "F"])
def test_rows_of_an_array_are_its_rows_however_it_was_saved(tmp_path, order):
    array = np.arange(5 * 4 * 3, dtype=np.float16).reshape(5, 4, 3)
    np.save(tmp_path / "a.npy", np.asarray(array, order=order))
    mapped = np.load(tmp_path / "a.npy", mmap_mode="r")
    for start, stop in ((0, 2), (1, 4), (4, 9)):
        assert arrays.some_rows(mapped, start, stop).tolist() == array[start:stop].tolist()


# ----- pickles -----
def test_a_pickle_of_doubled_lists_takes_no_time(tmp_path):
    content = [np.ones(3)]
    for _ in range(60):
        content = [content, content]
    (tmp_path / "x.pickle").write_bytes(pickle.dumps(content))
    start = time.time()
    found = pickles.read_pickle(tmp_path / "x.pickle")
    assert found[0] is found[1]
    assert time.time() - start < 5


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x05]r\xff\xff\xff\x7f.",  # its memo would take 32 GB
        b"\x80\x05\x96" + struct.pack("<Q", 2**36) + b"abc.",
        b"\x80\x05\x8e" + struct.pack("<Q", 2**60) + b"abc.",
    ],
)
def test_a_pickle_that_names_huge_sizes_takes_no_memory(tmp_path, content):
    import resource

    (tmp_path / "x.pickle").write_bytes(content)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with contextlib.suppress(utils.StageError):
        pickles.read_pickle(tmp_path / "x.pickle")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200e3  # kB


# ----- what the scripts read -----
def test_latent_maps_that_are_damaged(labelled, capsys):
    path = labelled / "embeddings-gene.pickle"
    content = pickle.loads(path.read_bytes())["cls"]
    for value in (np.nan, np.inf, 1e20):
        odd = content.copy()
        row, column = np.argwhere(np.isfinite(content[0]))[5]
        odd[2, row, column] = value
        path.write_bytes(pickle.dumps({"cls": odd}))
        assert segment.run(["--directory", str(labelled), "--no-plot"]) == 2
        assert "holds values that are not finite beside finite ones" in capsys.readouterr().err


@pytest.mark.parametrize("r", ["1e308", "2", "inf", "x"])
def test_correlations_that_are_none(labelled, r, capsys):
    genes = list(inputs.map_files(labelled))
    table = pd.DataFrame({"gene": genes, "held_out_r": [r] * len(genes)})
    table.to_csv(labelled / "held-out-r.csv", index=False)
    assert report.run(["--directory", str(labelled)]) == 2
    assert f"holds '{r}' for held_out_r in line 2" in capsys.readouterr().err


@pytest.mark.parametrize("loss", ["1e308", "inf", "x", "1e31"])
def test_histories_that_are_none(labelled, loss, capsys):
    (labelled / "states" / "00").mkdir(parents=True)
    path = labelled / "states" / "00" / "history.csv"
    path.write_text(f"epoch,train_loss\n1,2\n2,{loss}\n")
    assert report.run(["--directory", str(labelled)]) == 2
    assert f"holds '{loss}' for train_loss in line 3" in capsys.readouterr().err


ODD_FACTS = {
    "seconds": "soon", "ended": 3, "options": "--x", "arguments": ["x"], "warnings": {"a": 1},
    "versions": None,
}  # fmt: skip


@pytest.mark.parametrize("name", ODD_FACTS)
def test_odd_facts_in_a_record_are_named(labelled, name, capsys):
    add_to_record(labelled, **{name: ODD_FACTS[name]})
    assert report.run(["--directory", str(labelled)]) == 2
    error = capsys.readouterr().err
    if name == "options":  # which utils reads, too: no command may come of what they are not
        assert "HISTEX.json is not a whole record of HISTEX.py." in error
        assert error.endswith(
            f"run: python HISTEX.py --directory {shlex.quote(str(labelled))} --force\n"
        )
    else:
        assert f"is no whole record of HISTEX.py: {name} is" in error


@pytest.mark.parametrize("size", [None, [1], ["a", "b"], [0, 5], [1e9, 1e9], [True, True], 7])
def test_odd_sizes_in_the_record(labelled, size, capsys):
    record = json.loads((labelled / "image_calibration.json").read_text())
    sizes = dict.fromkeys(("raw_size", "scaled_size", "size"), size)
    (labelled / "image_calibration.json").write_text(json.dumps(record | sizes))
    assert export.run(["--directory", str(labelled), "--format", "csv"]) == 2
    assert "does not tell the sizes of the images" in capsys.readouterr().err


@pytest.mark.parametrize("states", ["2", 2, "all", None, [1]])
def test_any_number_of_states_in_the_record(labelled, states):
    (labelled / "states" / "00").mkdir(parents=True)
    (labelled / "states" / "00" / "history.csv").write_text("epoch,train_loss\n1,2\n")
    add_to_record(labelled, arguments={"n_states": states})
    assert report.run(["--directory", str(labelled)]) == 0


# ----- odd names -----
def rename_genes(directory, genes):
    index = pd.read_csv(directory / INDEX, dtype=str, keep_default_na=False)
    index["gene"] = genes[: len(index)]
    index.to_csv(directory / INDEX, index=False)
    counts = pd.read_csv(directory / "cnts.csv", index_col=0, dtype={0: str})
    counts.columns = genes[: len(index)]
    counts.to_csv(directory / "cnts.csv")
    r = pd.read_csv(directory / "held-out-r.csv", dtype=str, keep_default_na=False)
    r.assign(gene=genes[: len(index)]).to_csv(directory / "held-out-r.csv", index=False)
    outputs = ["cnts-super", "embeddings-gene.pickle", "held-out-r.csv"]
    write_record(directory, utils.HISTEX, ["cnts.csv"], outputs)
    return genes[: len(index)]


def test_names_are_drawn_letter_by_letter(labelled, capsys):
    """matplotlib takes what stands between two $ for a formula, and fails if it is none."""
    genes = rename_genes(labelled, ["$^$", "$\\frac{$", "a$b$c", "_x", "%s{}", "a\u2028b"])
    (labelled / "m.csv").write_text("gene,label\n$^$,$_{$\n$\\frac{$,$x^$\na$b$c,_z\n")
    (labelled / "s.gmt").write_text("$^_$\tx\t" + "\t".join(genes) + "\n")
    argv = ["--directory", str(labelled)]
    assert segment.run([*argv, "--n-halves", "1"]) == 0
    assert annotate.run([*argv, "--markers", str(labelled / "m.csv"), "--chance-share", "1"]) == 0
    options = ["--gene-sets", str(labelled / "s.gmt"), "--min-size", "1", "--max-q"]
    for max_q in ("1", "0"):
        assert enrich.run([*argv, *options, max_q]) == 0
    for name in ("segments.png", "annotation.png", "annotation-scores.png", "enrichment.png"):
        assert (labelled / name).stat().st_size > 1000


def test_names_that_xml_cannot_hold(labelled):
    import xml.etree.ElementTree as ET

    import tifffile

    genes = rename_genes(labelled, ["a\x0bb", "<&>", "\ufffe", "\U0001f600", 'é"q', "a\x1fb"])
    record = json.loads((labelled / "image_calibration.json").read_text())
    size = [16 * n for n in np.load(labelled / "cnts-super" / "0.npy").shape]
    sizes = dict.fromkeys(("raw_size", "scaled_size", "size"), size)
    (labelled / "image_calibration.json").write_text(json.dumps(record | sizes))
    assert export.run(["--directory", str(labelled), "--format", "ometiff"]) == 0
    with tifffile.TiffFile(labelled / "histex.ome.tif") as tiff:
        root = ET.fromstring(tiff.ome_metadata)
    names = [one.get("Name") for one in root.iter() if one.tag.endswith("Channel")]
    assert names == ["a?b", "<&>", "?", "\U0001f600", 'é"q', "a?b"][: len(genes)]


def test_names_like_formulas_are_written_as_they_are_and_told(labelled, tmp_path, capsys):
    genes = ["=cmd|x", "@SUM", "-A1", "+B", "1e5", "NA"]
    n = len(inputs.map_files(labelled))
    genes = genes[:n]
    index = pd.read_csv(labelled / INDEX, dtype=str, keep_default_na=False)
    index["gene"] = genes
    index.to_csv(labelled / INDEX, index=False)
    counts = pd.read_csv(labelled / "cnts.csv", index_col=0, dtype={0: str})
    counts.columns = genes
    counts.index = ["=s" + str(spot) for spot in counts.index]
    counts.to_csv(labelled / "cnts.csv")
    locs = pd.read_csv(labelled / "locs.csv", index_col=0, dtype={0: str})
    locs.index = ["=s" + str(spot) for spot in locs.index]
    locs.to_csv(labelled / "locs.csv")
    write_record(labelled, utils.HISTEX, ["cnts.csv"], ["cnts-super", "embeddings-gene.pickle"])
    assert segment.run(["--directory", str(labelled), "--no-plot", "--n-halves", "1"]) == 0
    assert "a spreadsheet takes the names" in capsys.readouterr().out
    markers = sheets.read_sheet(labelled / "segment-markers.csv", ["gene"], Refused)
    assert set(markers["gene"]) == set(genes)
    (tmp_path / "sets.gmt").write_text("S\tx\t" + "\t".join(genes) + "\n")
    argv = ["--directory", str(labelled), "--gene-sets", str(tmp_path / "sets.gmt")]
    assert enrich.run([*argv, "--min-size", "1", "--no-plot"]) == 0
    record = json.loads((labelled / "segment.json").read_text())
    assert any("=cmd|x" in warning for warning in record["warnings"])


# ----- files of the user -----
def arguments_of(script, directory):
    """Options by which a script would run on the labelled section."""
    (directory / "m.csv").write_text("gene,label\nA,a\n")
    (directory / "s.gmt").write_text("S\tx\tA\n")
    np.save(directory / "c.npy", np.zeros((4, 4), np.uint8))
    return {
        "segment": (segment, []),
        "annotate": (annotate, ["--markers", str(directory / "m.csv")]),
        "patterns": (patterns, []),
        "enrich": (enrich, ["--gene-sets", str(directory / "s.gmt")]),
        "cells": (cells, ["--masks", str(directory / "c.npy")]),
        "report": (report, []),
        "evaluate": (evaluate, []),
    }[script]


OUTPUTS = [
    (script.removeprefix("analysis/").removesuffix(".py"), artifact.name)
    for script, artifacts in files.WRITTEN_BY.items()
    for artifact in artifacts
]


@pytest.mark.parametrize(("script", "name"), OUTPUTS, ids=lambda part: str(part))
def test_no_file_of_yours_is_replaced_without_force(labelled, script, name, capsys):
    module, options = arguments_of(script, labelled)
    if "holdout" in name:
        options = [*options, "--holdout", "2"]
    if name in ("annotation-spots.csv", "annotation-truth.csv"):
        options += ["--truth"] if "truth" in name else ["--spot-labels", str(labelled / "m.csv")]
    (labelled / name).write_bytes(b"mine")
    before = sorted(path.name for path in labelled.iterdir())
    assert module.run(["--directory", str(labelled), *options]) == 2
    assert (labelled / name).read_bytes() == b"mine"
    assert sorted(path.name for path in labelled.iterdir()) == before
    error = capsys.readouterr().err
    if name != "venn.png":  # which is drawn of two lists of genes, and there are none here
        assert f"{labelled / name} was not written by analysis/{script}.py, which would" in error
        assert error.endswith("--force\n")


@pytest.mark.parametrize("name", ["segments.npy", "segments.csv", "held-out-r.csv"])
@pytest.mark.parametrize(("module", "options"), [(report, []), (export, ["--format", "h5ad"])])
def test_what_comes_later_is_something_to_do(labelled, module, options, name, capsys):
    """A file that may be missing is an input also where it is."""
    shape = np.load(labelled / "cnts-super" / "0.npy").shape
    record = json.loads((labelled / "image_calibration.json").read_text())
    sizes = {key: [16 * n for n in shape] for key in ("raw_size", "scaled_size", "size")}
    (labelled / "image_calibration.json").write_text(json.dumps(record | sizes))
    np.save(labelled / "segments.npy", np.ones(shape, np.uint8))
    (labelled / "segments.csv").write_text("region,genes,name\n1,A,one\n")
    (labelled / name).rename(labelled / "away")
    said = []
    for _ in range(2):
        assert module.run(["--directory", str(labelled), *options]) == 0
        said.append("up to date, nothing to do" in capsys.readouterr().out)
    (labelled / "away").rename(labelled / name)
    for _ in range(2):
        assert module.run(["--directory", str(labelled), *options]) == 0
        said.append("up to date, nothing to do" in capsys.readouterr().out)
    assert said == [False, True, False, True]


@pytest.mark.parametrize("script", sorted({script for script, _ in OUTPUTS}))
@pytest.mark.parametrize("content", [b"[1, 2]", b'{"type": "FeatureCollection"}', b"mine"])
def test_no_file_of_yours_is_replaced_by_a_record(labelled, script, content, capsys):
    module, options = arguments_of(script, labelled)
    name = f"{script}.json"
    (labelled / name).write_bytes(content)
    assert module.run(["--directory", str(labelled), *options]) == 2
    assert (labelled / name).read_bytes() == content
    assert name in capsys.readouterr().err
