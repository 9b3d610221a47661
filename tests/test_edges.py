"""Ends of ranges, odd paths and words of messages, where a changed character went unnoticed.

benchmarks/mutants.py made the changes. What is here is of utils.py, writing/, reading/ and the
first two scripts; of method/ it is in test_core.py.
"""

import argparse
import json
import os
import pickle
import re
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tifffile
from conftest import make_stage, outcome, put, run, write_record
from PIL import Image
from test_get_HR import lattice

import get_HR
import image_calibration
import utils
from method import calibration, genes
from reading import arrays, cli, images, pickles, pictures, plain, tables
from reading.genes import read_gene_names, read_genes, spoilt_by_excel
from writing import disk, progress


# ----- fingerprints and records -------------------------------------------------------------------
def test_the_fingerprint_of_an_empty_folder(tmp_path):
    known = disk.fingerprint(tmp_path)
    assert (known["bytes"], known["mtime_ns"], known["files"]) == (0, 0, {})
    assert disk.same_as(tmp_path, known)


def test_the_time_of_a_folder_is_that_of_its_newest_file(tmp_path):
    for name, seconds in (("a", 7), ("b", 9), ("c", 8)):
        (tmp_path / name).write_text(name)
        os.utime(tmp_path / name, (seconds, seconds))
    known = disk.fingerprint(tmp_path)
    assert known["mtime_ns"] == 9 * 10**9
    assert known["files"]["a"] == f"1 {7 * 10**9} {disk.sha256(tmp_path / 'a')}"


def test_what_is_added_to_a_folder_is_no_edit_of_it(tmp_path):
    (tmp_path / "old").write_text("old")
    known = disk.fingerprint(tmp_path)
    (tmp_path / "new").write_text("new")
    assert disk.changed_in(tmp_path, known) == [tmp_path / "new"]
    assert disk.is_added(tmp_path / "new", tmp_path, known)
    assert not disk.is_added(tmp_path / "old", tmp_path, known)
    assert not disk.is_added(tmp_path, tmp_path, known)
    assert disk.is_whole(tmp_path, known)
    (tmp_path / "old").unlink()
    assert not disk.is_whole(tmp_path, known)
    assert not disk.same_as(tmp_path, known)


def test_what_was_not_there_is_changed_by_its_coming_only(tmp_path):
    path = tmp_path / "radius-raw.txt"
    assert disk.changed_in(path, disk.ABSENT) == []
    assert disk.same_as(path, disk.ABSENT)
    path.write_text("9")
    assert disk.changed_in(path, disk.ABSENT) == [path]
    assert not disk.same_as(path, disk.ABSENT)


def test_a_file_of_more_than_a_mebibyte_is_hashed_only_if_its_time_differs(tmp_path, monkeypatch):
    hashed = []
    for name, size in (("small", 2**20), ("large", 2**20 + 1)):
        (tmp_path / name).write_bytes(bytes(size))
    known = {path.name: disk.fingerprint(path) for path in tmp_path.iterdir()}
    honest = disk.sha256
    monkeypatch.setattr(disk, "sha256", lambda path: hashed.append(path.name) or honest(path))
    assert all(disk.same_as(tmp_path / name, some) for name, some in known.items())
    assert hashed == ["small"]


def test_the_files_of_a_file_and_of_a_folder(tmp_path):
    for name in ("b", "a", ".DS_Store"):
        (tmp_path / name).write_text(name)
    assert disk.files_in(tmp_path / "a") == [tmp_path / "a"]
    assert disk.files_in(tmp_path) == [tmp_path / "a", tmp_path / "b"]


GOOD = {"bytes": 1, "mtime_ns": 2, "sha256": "x"}
FILE = f"1 -2 {'0' * 64}"


@pytest.mark.parametrize(
    ("known", "whole"),
    [
        (GOOD, True),
        (GOOD | {"files": {"a": FILE}}, True),
        (GOOD | {"files": {}}, True),
        (disk.ABSENT, True),
        ([GOOD], False),
        (GOOD | {"sha256": 1}, False),
        (GOOD | {"bytes": "1"}, False),
        (GOOD | {"mtime_ns": None}, False),
        ({"bytes": 1, "sha256": "x"}, False),
        (GOOD | {"files": ["a"]}, False),
        (GOOD | {"files": {"a": FILE, "b": "1 2 x"}}, False),
    ],
)
def test_a_fingerprint_is_told_from_what_is_none(known, whole):
    assert disk.is_fingerprint(known) is whole


def test_the_hash_of_sources_is_of_names_and_contents_whatever_the_line_ends(tmp_path):
    one, two = tmp_path / "a.py", tmp_path / "b.py"
    one.write_bytes(b"x\ny\n")
    two.write_bytes(b"z")
    known = disk.hash_of([one, two])
    assert re.fullmatch("[0-9a-f]{16}", known)
    assert disk.hash_of([two, one]) == known
    one.write_bytes(b"x\r\ny\r\n")
    assert disk.hash_of([one, two]) == known
    one.write_bytes(b"x\ny")
    assert disk.hash_of([one, two]) != known


def test_a_process_that_runs_is_not_dead():
    assert not disk.is_dead(os.getpid())
    assert not disk.is_dead(1)  # of root, which may be somebody else
    assert disk.is_dead(2**31 - 1)
    assert disk.is_dead(10**30)


def test_folders_of_work_are_swept_an_hour_after_the_last_write(tmp_path):
    for name, age in ((".maps.a.work", 3700), (".maps.b.work", 3500), (".maps.c.work", 3700)):
        (tmp_path / name).mkdir()
        then = time.time() - age
        os.utime(tmp_path / name, (then, then))
    disk.sweep_work(tmp_path, "maps", but=tmp_path / ".maps.c.work")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".maps.b.work", ".maps.c.work"]


def test_partial_files_are_swept_an_hour_after_the_last_write(tmp_path):
    for name, age in ((".a.0123abcd.partial.npy", 3700), (".b.0123abcd.partial.npy", 3500)):
        (tmp_path / name).write_bytes(b"half")
        then = time.time() - age
        os.utime(tmp_path / name, (then, then))
    disk.sweep(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".b.0123abcd.partial.npy"]


def test_a_folder_is_put_again_where_another_run_was_faster(tmp_path, monkeypatch):
    path, partial, honest = tmp_path / "maps", tmp_path / ".partial", Path.rename
    tries = []

    def rename(source, target):
        if source == partial and len(tries) < disk.PUT_ATTEMPTS - 1:
            tries.append(source)
            path.mkdir()
            raise OSError(39, "Directory not empty")
        return honest(source, target)

    partial.mkdir()
    (partial / "new").write_text("new")
    monkeypatch.setattr(Path, "rename", rename)
    disk.put(partial, path)
    assert (path / "new").read_text() == "new"
    assert [place.name for place in tmp_path.iterdir()] == ["maps"]


# ----- utils.py -----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("n_bytes", "words"),
    [
        (999, "999 bytes"), (1000, "1.0 kB"), (9949, "9.9 kB"), (9950, "10 kB"),
        (999_499, "999 kB"), (999_500, "1.0 MB"), (9_949_999, "9.9 MB"), (2e12, "2000 GB"),
    ],
)  # fmt: skip
def test_the_unit_of_a_size_changes_where_its_digits_do(n_bytes, words):
    assert utils.size(n_bytes) == words


@pytest.mark.parametrize(
    ("names", "words"),
    [("abcd", "a, b, c, d"), ("abcde", "a, b, c, d, e"), ("abcdef", "a, b, c, d, e, ...")],
)
def test_five_of_a_list_are_shown(names, words):
    assert utils.some(names) == words
    assert utils.duplicates([*names, "c", "a", "c"]) == ["a", "c"]


def test_the_token_is_no_part_of_what_decides():
    decisive = utils._decisive
    assert decisive(["--seed", "1"]) == ["--seed", "1"]
    assert decisive(["--login", "x", "--seed", "1"]) == ["--seed", "1"]
    assert decisive(["--seed", "1", "--login", "x"]) == ["--seed", "1"]
    assert decisive(["--a", "--b", "1", "--login", "x", "--c"]) == ["--a", "--b", "1", "--c"]


def test_the_disk_is_asked_for_what_is_needed_and_no_more(tmp_path, monkeypatch):
    usage = argparse.Namespace(free=1000)
    monkeypatch.setattr(utils.shutil, "disk_usage", lambda _: usage)
    utils.check_disk(tmp_path, 1000, "Maps")
    with pytest.raises(utils.StageError, match=r"Maps: about 1\.0 kB are needed .* only 1\.0 kB"):
        utils.check_disk(tmp_path, 1001, "Maps")


def test_a_folder_or_its_absence_is_said_before_any_work(tmp_path):
    (tmp_path / "file").write_text("x")
    for name, words in (("file", "is a file; it must be"), ("none", "does not exist; it must be")):
        with pytest.raises(utils.StageError, match=words):
            make_stage(tmp_path / name)
    known = argparse.Namespace(directory=tmp_path, force=False, allow_stale=False)
    with pytest.raises(utils.StageError, match=r"file is a file; a\.py writes into a folder"):
        utils.Stage("a.py", known, tmp_path / "file")
    utils.Stage("a.py", known, tmp_path / "file", reads_only=True)
    known.directory = tmp_path / "new"
    assert not utils.Stage("a.py", known, makes_folders=True).folder.exists()


def test_two_names_of_one_input_side_by_side_are_refused(stage):
    put(stage, "cnts.csv", "x")
    assert stage.find(utils.CNTS) == stage.directory / "cnts.csv"
    put(stage, "cnts.tsv", "x")
    with pytest.raises(utils.StageError, match=r"holds cnts\.csv, cnts\.tsv; only one may be"):
        stage.find(utils.CNTS)


def write(stage, artifact, text: str) -> None:
    with stage.writing(artifact) as partial:
        partial.write_text(text)


def test_an_unedited_output_of_another_script_may_be_replaced(tmp_path, capsys):
    """As a prepared image by another of prepare/; not if it was edited, or by nobody known."""
    (tmp_path / "he.jpg").write_text("image")
    (tmp_path / "other.txt").write_text("other")
    write_record(tmp_path, utils.CALIBRATION, [], ["he.jpg"])
    make_stage(tmp_path).guard(utils.HE)
    (tmp_path / "he.jpg").write_text("edited")
    with pytest.raises(utils.StageError, match=r"he\.jpg was not written by a_test\.py"):
        make_stage(tmp_path).guard(utils.HE)
    stage = make_stage(tmp_path, force=True)
    stage.guard(utils.HE)
    (tmp_path / "image_calibration.json").unlink()
    with pytest.raises(utils.StageError, match=r"or the record a_test\.json was lost"):
        make_stage(tmp_path).guard(utils.HE)


def test_a_run_that_writes_less_removes_what_it_retires_and_nothing_else(tmp_path, capsys):
    first = make_stage(tmp_path)
    for artifact in (utils.LOCS, utils.RADIUS, utils.PIXEL_SIZE):
        write(first, artifact, "x")
    first.finish()
    (tmp_path / "radius.txt").write_text("mine")
    second = make_stage(tmp_path)
    second.retire_rest()
    write(second, utils.LOCS, "y")
    second.finish()
    assert (tmp_path / "locs.csv").read_text() == "y"
    assert (tmp_path / "radius.txt").read_text() == "mine"
    assert not (tmp_path / "pixel-size.txt").exists()
    said = capsys.readouterr().out
    assert "removed pixel-size.txt, which belonged to an earlier run" in said
    assert "removed locs.csv" not in said
    assert "wrote locs.csv: 1 bytes" in said


def test_a_run_may_leave_the_outputs_of_earlier_ones_in_the_record(tmp_path):
    for keeps, wanted in ((False, {"locs.csv"}), (True, {"locs.csv", "radius.txt"})):
        (tmp_path / "a_test.json").unlink(missing_ok=True)
        for artifact in (utils.RADIUS, utils.LOCS):
            stage = make_stage(tmp_path, force=True)
            stage.keeps_others = keeps
            write(stage, artifact, "x")
            stage.finish()
        record = json.loads((tmp_path / "a_test.json").read_text())
        assert record["outputs"].keys() == wanted


def test_an_input_elsewhere_is_known_by_its_whole_path(tmp_path):
    (tmp_path / "sample").mkdir()
    (tmp_path / "genes.txt").write_text("A")
    (tmp_path / "sample" / "list.txt").write_text("A")
    stage = make_stage(tmp_path / "sample")
    stage.use(tmp_path / "genes.txt")
    stage.use(tmp_path / "sample" / "list.txt")
    stage.use(tmp_path / "none.txt")
    assert stage.inputs[str(tmp_path / "genes.txt")] == disk.fingerprint(tmp_path / "genes.txt")
    assert stage.inputs["list.txt"]["bytes"] == 1
    assert stage.inputs[str(tmp_path / "none.txt")] == disk.ABSENT
    first = stage.inputs["list.txt"]
    (tmp_path / "sample" / "list.txt").write_text("other")
    stage.use(tmp_path / "sample" / "list.txt")
    assert stage.inputs["list.txt"] is first  # by the first look


def test_a_fingerprint_that_only_lost_its_time_is_taken_anew(stage):
    path = put(stage, "list.txt", "A")
    known = disk.fingerprint(path)
    stage.use(path, known)
    assert stage.inputs["list.txt"] is known
    os.utime(path, (5, 5))
    stage.use(path, known)
    assert stage.inputs["list.txt"] == known | {"mtime_ns": 5 * 10**9}


def test_a_run_that_fails_takes_the_folder_that_it_made_with_it(tmp_path):
    known = argparse.Namespace(directory=tmp_path, force=False, allow_stale=False)
    stage = utils.Stage("a.py", known, tmp_path / "deep" / "out")
    write(stage, utils.LOCS, "x")
    stage.discard()
    assert not (tmp_path / "deep" / "out").exists()
    (tmp_path / "here").mkdir()
    stage = utils.Stage("a.py", known, tmp_path / "here")
    write(stage, utils.LOCS, "x")
    stage.discard()
    assert list((tmp_path / "here").iterdir()) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"finished": 1}, "is not a record of"),
        ({"options": "x"}, "is not a whole record"),
        ({"parts": [1]}, "is not a whole record"),
        ({"outputs": None}, "is not a whole record"),
        ({"inputs": None}, "is not a whole record"),
        ({"outputs": {"../x": GOOD}}, "lists outputs that lie in another folder"),
        ({"finished": False, "written": {}}, "is not a whole record"),
        ({"finished": False, "written": [{"a/b": GOOD}]}, "lists outputs that lie in another"),
    ],
)
def test_a_record_is_read_whole_or_refused(stage, change, words):
    record = {"finished": True, "inputs": {}, "outputs": {"a": GOOD}}
    put(stage, "a_test.json", json.dumps(record))
    assert utils.read_record(stage, "a_test.py")["outputs"] == {"a": GOOD}
    put(stage, "a_test.json", json.dumps(record | change))
    with pytest.raises(utils.StageError, match=words) as error:
        utils.read_record(stage, "a_test.py")
    assert str(error.value).endswith(" --force")
    put(stage, "masking_non_tissue.json", json.dumps(record | change))
    assert "--force" not in outcome(utils.read_record, stage, utils.MASKING)[1]


# ----- what is fresh, stale, edited or kept: small files in place of images -----------------------
@pytest.fixture
def folder(tmp_path):
    """What image_calibration.py and get_HR.py leave, as words, with the records of both."""
    for name in ("he-raw.png", "locs-raw.csv", "cnts.csv", "he.jpg", "locs.csv", "HRlocs.csv"):
        (tmp_path / name).write_text(name)
    (tmp_path / "gene-names.txt").write_text("A")
    write_record(
        tmp_path, utils.CALIBRATION, ["he-raw.png", "locs-raw.csv"], ["he.jpg", "locs.csv"]
    )
    outputs = ["HRlocs.csv", "gene-names.txt"]
    write_record(tmp_path, utils.HIGH_RESOLUTION, ["locs.csv", "cnts.csv"], outputs)
    return tmp_path


def require(folder: Path, *artifacts: utils.Artifact, **options) -> str | None:
    stage = make_stage(folder, utils.HISTEX, **options)
    return outcome(stage.require, *artifacts)[1]


def test_fresh_inputs_are_taken_without_a_word(folder, capsys):
    stage = make_stage(folder, utils.HISTEX)
    stage.require(utils.HE, utils.LOCS, utils.HR_LOCS, utils.GENE_NAMES)
    assert capsys.readouterr().out == ""
    assert stage.inputs["he.jpg"] == disk.fingerprint(folder / "he.jpg")
    assert stage.path(utils.HE) == folder / "he.jpg"
    assert stage.optional(utils.RADIUS_RAW) is None
    assert stage.inputs["radius-raw.txt"] == disk.ABSENT


@pytest.mark.parametrize(
    ("changed", "artifact", "script"),
    [
        ("locs-raw.csv", utils.LOCS, utils.CALIBRATION),
        ("he-raw.png", utils.LOCS, utils.CALIBRATION),
        ("locs-raw.csv", utils.HR_LOCS, utils.CALIBRATION),  # a stage before it
        ("cnts.csv", utils.HR_LOCS, utils.HIGH_RESOLUTION),
        ("locs.csv", utils.HR_LOCS, utils.HIGH_RESOLUTION),
    ],
)
def test_a_changed_input_makes_what_follows_stale(folder, changed, artifact, script, capsys):
    (folder / changed).write_text("other")
    said = require(folder, artifact)
    assert f"{artifact.name} is out of date: {folder / changed} has changed since {script}" in said
    assert f"Run: python {script} --directory" in said
    assert require(folder, artifact, allow_stale=True) is None
    said = capsys.readouterr().out
    assert f"{artifact.name}: out of date ({changed} changed), used all the same" in said


def test_an_edited_input_is_used_and_said_even_beside_a_stale_one(folder, capsys):
    (folder / "locs.csv").write_text("edited")
    assert require(folder, utils.LOCS, utils.HE) is None
    assert capsys.readouterr().out == (
        "locs.csv: edited since image_calibration.py wrote it, the edit is used\n"
    )
    (folder / "gene-names.txt").write_text("B")
    assert require(folder, utils.GENE_NAMES) is None  # of the user, though locs.csv has changed
    said = capsys.readouterr().out
    assert "gene-names.txt: your own; locs.csv has changed since, see that it still fits" in said
    (folder / "gene-names.txt").write_text("A")
    assert "gene-names.txt is out of date" in require(folder, utils.GENE_NAMES)


def test_inputs_without_a_finished_record_are_refused_unless_one_may_bring_them(folder, capsys):
    record = json.loads((folder / "get_HR.json").read_text())
    (folder / "get_HR.json").write_text(json.dumps({"finished": False, "written": []}))
    said = require(folder, utils.HR_LOCS)
    assert "HRlocs.csv is unfinished: the last run of get_HR.py was cut off." in said
    del record["outputs"]["gene-names.txt"], record["outputs"]["HRlocs.csv"]
    (folder / "get_HR.json").write_text(json.dumps(record))
    assert "is not listed in get_HR.json" in require(folder, utils.HR_LOCS)
    assert require(folder, utils.GENE_NAMES) is None
    (folder / "get_HR.json").unlink()
    assert "has no record get_HR.json; its stage did not finish" in require(folder, utils.HR_LOCS)
    assert require(folder, utils.GENE_NAMES) is None
    said = capsys.readouterr().out
    assert said == "gene-names.txt: not made by get_HR.py, taken as your own\n" * 2
    (folder / "HRlocs.csv").unlink()
    said = require(folder, utils.HR_LOCS)
    assert "HRlocs.csv is missing: HISTEX.py needs HRlocs.csv (HR points" in said
    assert "It is written by get_HR.py. Run: python get_HR.py --directory" in said
    said = require(folder, utils.RADIUS_RAW)
    assert "It is a file you provide. Add it, then run: python HISTEX.py" in said


def test_another_name_of_an_input_is_a_change(folder):
    (folder / "he-raw.png").rename(folder / "he-raw.tif")
    assert f"out of date: {folder / 'he-raw.tif'} has changed" in require(folder, utils.HE)


def guarded(folder: Path, *options: str, **arguments) -> tuple[str | None, set[str]]:
    """What guarding its outputs says for get_HR.py, and the names of those that are kept."""
    stage = make_stage(folder, utils.HIGH_RESOLUTION, options=[*options], **arguments)
    said = outcome(stage.guard, utils.HR_LOCS, utils.GENE_NAMES)[1]
    return said, {path.name for path in stage.kept}


def test_an_edited_output_is_kept_as_long_as_it_fits(folder, capsys):
    assert guarded(folder) == (None, set())
    (folder / "HRlocs.csv").write_text("edited")
    assert guarded(folder) == (None, {"HRlocs.csv"})
    assert capsys.readouterr().out == "kept your HRlocs.csv (--force makes a new one)\n"
    assert guarded(folder, force=True) == (None, set())
    said, kept = guarded(folder, "--n-genes", "5")
    assert "HRlocs.csv was edited by hand, and other options were given; get_HR.py would" in said
    assert kept == set()
    assert "--force" in said
    (folder / "cnts.csv").write_text("other")
    assert "was edited by hand, and cnts.csv has changed" in guarded(folder)[0]
    (folder / "HRlocs.csv").write_text("HRlocs.csv")
    (folder / "gene-names.txt").write_text("B")  # which one may bring: kept, then, too
    assert guarded(folder) == (None, {"gene-names.txt"})
    said = capsys.readouterr().out
    assert "kept your gene-names.txt; cnts.csv has changed, see that it still fits (--for" in said
    (folder / "get_HR.json").unlink()
    said, _ = guarded(folder)
    assert "HRlocs.csv was not written by get_HR.py, which would overwrite it, or the re" in said


def finished_folder(tmp_path: Path) -> None:
    """As a run of a_test.py leaves it: a folder of two maps, and the mask it read."""
    stage = make_stage(tmp_path)
    with stage.writing(utils.MAPS) as partial:
        partial.mkdir()
        for name in ("A.npy", "B.npy"):
            (partial / name).write_text(name)
    stage.use(tmp_path / "list.txt")
    stage.finish(parts=["list.txt"])


def rests(tmp_path: Path, *options: str, **arguments) -> bool:
    return make_stage(tmp_path, options=[*options], **arguments).up_to_date()


def test_a_run_rests_only_if_nothing_at_all_has_changed(tmp_path, capsys):
    (tmp_path / "list.txt").write_text("A")
    assert not rests(tmp_path)
    finished_folder(tmp_path)
    assert rests(tmp_path)
    assert rests(tmp_path, "--login", "x")
    assert not rests(tmp_path, "--seed", "1")
    assert not rests(tmp_path, force=True)
    capsys.readouterr()
    (tmp_path / "cnts-super" / "A.npy").write_text("edited")
    (tmp_path / "cnts-super" / "mine.txt").write_text("mine")
    assert rests(tmp_path)
    assert capsys.readouterr().out.splitlines() == [
        "kept your cnts-super/A.npy, cnts-super/mine.txt (--force makes a new one)",
        "a_test.py: up to date, nothing to do (--force runs it all the same)",
    ]
    (tmp_path / "cnts-super" / "B.npy").rename(tmp_path / "b")
    assert not rests(tmp_path)
    (tmp_path / "b").rename(tmp_path / "cnts-super" / "B.npy")
    assert rests(tmp_path)
    record = json.loads((tmp_path / "a_test.json").read_text())
    for change in ({"code": None}, {"code": {"sha256": "x"}}, {"parts": ["x"]}):
        (tmp_path / "a_test.json").write_text(json.dumps(record | change))
        assert not rests(tmp_path)
    (tmp_path / "a_test.json").write_text(json.dumps(record))
    (tmp_path / "list.txt").write_text("B")
    assert not rests(tmp_path)


def test_files_of_the_user_move_into_the_folder_that_replaces_theirs(tmp_path, capsys):
    (tmp_path / "list.txt").write_text("A")
    finished_folder(tmp_path)
    (tmp_path / "cnts-super" / "sub").mkdir()
    (tmp_path / "cnts-super" / "sub" / "mine.txt").write_text("mine")
    (tmp_path / "cnts-super" / "B.npy").write_text("edited")
    stage = make_stage(tmp_path)
    stage.guard(utils.MAPS)
    assert len(stage.kept) == 2
    with stage.writing(utils.MAPS) as partial:
        partial.mkdir()
        (partial / "A.npy").write_text("new")
        (partial / "B.npy").write_text("new")
    stage.finish()
    maps = tmp_path / "cnts-super"
    assert (maps / "A.npy").read_text() == "new"
    assert (maps / "B.npy").read_text() == "edited"
    assert (maps / "sub" / "mine.txt").read_text() == "mine"
    record = json.loads((tmp_path / "a_test.json").read_text())
    assert record["kept"] == ["cnts-super/B.npy", "cnts-super/sub/mine.txt"]
    assert (record["finished"], record["warnings"]) == (True, [])
    (maps / "A.npy").write_text("edited, too")
    stage = make_stage(tmp_path)
    stage.guard(utils.MAPS)
    stage.retire(utils.MAPS)
    stage.finish()
    assert maps.is_dir()  # what holds files of the user is not removed


def test_what_of_a_users_the_other_outputs_follow(tmp_path):
    """A mask follows into its picture, genes into the counts; and only where they are made."""
    for script, artifact, follows in (
        (utils.MASKING, utils.MASK, True),
        (utils.HIGH_RESOLUTION, utils.GENE_NAMES, True),
        (utils.MASKING, utils.MASK_OVERLAY, False),
        (utils.HISTEX, utils.MASK, False),
        ("a_test.py", utils.MASK, False),
    ):
        assert make_stage(tmp_path, script)._goes_on_with(artifact) is follows


def test_inputs_whose_origin_has_nothing_to_say(folder):
    def settled(name: str) -> bool:
        return make_stage(folder, utils.HISTEX)._is_settled(name)

    assert all(map(settled, ["locs.csv", "gene-names.txt", "cnts.csv", "unknown.txt"]))
    (folder / "cnts.csv").write_text("other")
    assert [settled(name) for name in ("locs.csv", "gene-names.txt")] == [True, False]
    (folder / "get_HR.json").unlink()
    assert [settled(name) for name in ("HRlocs.csv", "gene-names.txt")] == [False, True]
    (folder / "get_HR.json").write_text(json.dumps({"finished": False, "written": []}))
    assert [settled(name) for name in ("HRlocs.csv", "gene-names.txt")] == [False, False]


def test_a_record_tells_the_seconds_that_a_run_took(tmp_path, capsys):
    stage = make_stage(tmp_path)
    stage.started -= 90
    stage.finish()
    record = json.loads((tmp_path / "a_test.json").read_text())
    assert 90 <= record["seconds"] < 150
    assert f"a_test.py finished in {record['seconds']:.1f} s" in capsys.readouterr().out


def test_the_command_that_makes_an_output_anew(folder):
    stage = make_stage(folder, utils.HISTEX, options=["--seed", "1"])
    assert stage.command() == f"python HISTEX.py --directory {folder} --seed 1"
    remake = stage.remake(utils.CALIBRATION)
    assert remake == f"python image_calibration.py --directory {folder} --force"
    (folder / "he.jpg").write_text("edited")
    assert stage.remake(utils.CALIBRATION) == f"{remake} (this replaces your he.jpg)"
    (folder / "he.jpg").write_text("he.jpg")
    (folder / "he-raw.png").write_text("other")  # then it runs without being forced
    assert stage.remake(utils.CALIBRATION) == remake.removesuffix(" --force")
    record = json.loads((folder / "get_HR.json").read_text())
    (folder / "get_HR.json").write_text(json.dumps(record | {"options": ["--n-genes", "5"]}))
    assert stage.command(utils.HIGH_RESOLUTION).endswith(f"{folder} --n-genes 5")
    error = stage.error(folder / "he.jpg", "is odd.")
    assert str(error).endswith(f"Run: {remake.removesuffix(' --force')}")
    assert "mend it, then run: python HISTEX.py" in str(stage.error(folder / "cnts.csv", "is."))


def test_the_range_of_pixel_sizes_is_that_of_objectives():
    """A camera pixel of 10 um, behind 200x to 4x; and he.jpg is 20x."""
    assert utils.MIN_PIXEL_SIZE_UM == 10 / 200
    assert utils.MAX_PIXEL_SIZE_UM == 10 / 4
    assert utils.PIXEL_SIZE_UM == 10 / 20
    assert (utils.TOKENS_PER_TILE, utils.TILE_PX) == (14, 224)  # of a ViT/16
    assert utils.LEGACY_RADIUS_UM * 4 == utils.LEGACY_PITCH_UM == 2 * utils.VISIUM_PITCH_UM == 200
    assert utils.MAX_RADIUS_SUPERPIXELS * utils.SUPERPIXEL_UM == 512
    assert utils.MAX_HE_PIXELS == 65_500 * 65_500


# ----- the command line ---------------------------------------------------------------------------
DOC = """What it does.

    python a.py --directory FOLDER

Reads   this.
Writes  that.

Nothing for the help.
"""


def test_the_help_has_the_example_the_files_and_each_default_once():
    parser = cli.stage_parser(DOC)
    option = parser.add_argument
    option("--n", type=int, default=3, help="A number.")
    option("--m", type=int, default=4, help="Another (default: four).")
    option("--none", help="Nothing.")
    shown = " ".join(parser.format_help().split())
    for text in ("What it does.", "python a.py", "Reads this. Writes that.", "(default: 3)"):
        assert text in shown
    for text in ("Nothing for the help", "(default: 4)", "(default: None)", "(default: False)"):
        assert text not in shown
    assert "--directory FOLDER" in shown
    assert "Folder of the sample; all files live there. (default" not in shown


def test_a_misspelt_option_is_named_with_the_nearest(capsys):
    parser = cli.stage_parser(DOC)
    for given, hint in (
        ("--forse", "there is no option --forse. Did you mean --force?"),
        ("--forse=1", "there is no option --forse. Did you mean --force?"),
        ("--xyz", "there is no option --xyz. See --help for those that it has."),
    ):
        with pytest.raises(SystemExit) as ended:
            parser.parse_args([given])
        assert ended.value.code == 2
        assert hint in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parser.parse_args(["--directory", "x", "--forc"])  # no abbreviations
    assert parser.parse_args(["--directory", "-- a"]).directory == Path("-- a")


def test_an_earlier_spelling_goes_on_and_is_not_shown():
    parser = cli.stage_parser(DOC)
    parser.alias("--replace", "--force")
    assert parser.parse_args(["--directory", "x", "--replace"]).force
    assert "--replace" not in parser.format_help()


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        (cli.not_negative, {"0": 0, "3": 3}, ("-1", "0.5", "x")),
        (cli.above_0, {"0.5": 0.5, "1e-9": 1e-9}, ("0", "-1", "inf", "nan", "x")),
        (cli.from_0, {"0": 0, "0.5": 0.5}, ("-1e-9", "inf", "nan")),
        (cli.positive, {"1": 1}, ("0",)),
    ],
)
def test_numbers_of_options(kind, good, bad):
    assert {text: kind(text) for text in good} == good
    for text in bad:
        with pytest.raises(argparse.ArgumentTypeError, match=f"'{text}' is not a"):
            kind(text)


def test_a_list_of_names_or_the_file_that_is_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "genes.txt").write_text("A")
    assert cli.names_or_file("genes.txt") == Path("genes.txt")
    assert cli.names_or_file("A,B") == "A,B"
    assert cli.names_or_file("A," * 5000) == "A," * 5000


def test_options_are_told_as_they_would_be_typed_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    parser = cli.stage_parser(DOC)
    option = parser.add_argument
    option("--seed", "-s", type=int, default=0)
    option("--list", type=Path)
    option("--genes", nargs="+", default=[])
    option("--login", default=None)
    option("--amp", action="store_true")
    line = ["--directory", "x", "--force", "--allow-stale", "--amp", "-s", "2", "--list", "a.txt"]
    args = parser.parse_args([*line, "--genes", "A", "B", "--login", "hf_secret"])
    found = cli.given_options(parser, args)
    assert found == [
        "-s", "2", "--list", str(tmp_path / "a.txt"), "--genes", "A", "B", "--login", "***",
        "--amp",
    ]  # fmt: skip
    assert cli.given_options(parser, parser.parse_args(["--directory", "x"])) == []


def test_files_that_options_name_are_inputs_and_outputs_are_none(tmp_path):
    for name in ("list.txt", "out.txt"):
        (tmp_path / name).write_text("x")
    args = argparse.Namespace(
        directory=tmp_path, output=tmp_path / "out.txt", genes=tmp_path / "list.txt",
        none=tmp_path / "none.txt", text=str(tmp_path / "list.txt"),
    )  # fmt: skip
    assert cli.files_of_options(args) == [tmp_path / "list.txt"]
    assert cli.output_folder(args) == tmp_path
    args.folder = tmp_path / "folder"
    assert cli.output_folder(args) == tmp_path / "folder"
    assert cli.output_folder(argparse.Namespace(output=None)) is None
    assert cli.output_folder(argparse.Namespace()) is None


def test_a_stage_runs_once_and_rests_the_second_time(tmp_path, capsys, monkeypatch):
    ran = []
    (tmp_path / "list.txt").write_text("A")

    def main(stage):
        ran.append(stage.script)
        write(stage, utils.LOCS, "x")
        stage.finish()

    def parser():
        made = cli.stage_parser(DOC)
        made.add_argument("--list", type=Path)
        return made

    line = ["--directory", str(tmp_path), "--list", str(tmp_path / "list.txt")]
    for _ in (0, 1):
        assert cli.run_stage(main, "get_HR.py", parser(), line) == 0
    assert ran == ["get_HR.py"]
    assert "list.txt" in json.loads((tmp_path / "get_HR.json").read_text())["inputs"]
    assert "get_HR.py: up to date, nothing to do" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["get_HR.py", *line])
    handler = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(SystemExit) as ended:
            cli.start(parser(), "get_HR.py")
    finally:
        signal.signal(signal.SIGINT, handler)
    assert ended.value.code == 0
    (tmp_path / "list.txt").write_text("B")
    assert cli.run_stage(main, "get_HR.py", parser(), line) == 0
    assert len(ran) == 2


@pytest.mark.parametrize(("sign", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_work_and_its_handlers_come_back(sign, code, capsys):
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    hook = sys.unraisablehook
    try:
        signal.signal(signal.SIGINT, cli._end_at_once)  # as ``start`` leaves it
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

        def work():
            assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
            assert signal.getsignal(signal.SIGTERM) is cli._terminate
            os.kill(os.getpid(), sign)
            time.sleep(5)

        assert cli.exit_code(work, Path(), "kept") == code
        assert signal.getsignal(signal.SIGINT) is cli._end_at_once
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        assert sys.unraisablehook is hook
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert "kept" in capsys.readouterr().err


def test_only_the_usual_ctrl_c_ends_at_once_while_modules_are_imported(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["a.py", "--directory", "x"])
    before = signal.getsignal(signal.SIGINT)
    try:
        for handler, then in (
            (signal.default_int_handler, cli._end_at_once),
            (signal.SIG_IGN, signal.SIG_IGN),  # as under nohup
        ):
            signal.signal(signal.SIGINT, handler)
            cli.start(cli.stage_parser(DOC))
            assert signal.getsignal(signal.SIGINT) is then
    finally:
        signal.signal(signal.SIGINT, before)


# ----- long work ----------------------------------------------------------------------------------
def test_a_bar_shows_what_it_is_told(monkeypatch):
    monkeypatch.setattr(progress, "_bars", [])  # without those that other tests broke off
    shown = {}
    bar = progress.Bar((), "epochs", total=5)
    monkeypatch.setattr(bar.shown, "set_postfix", shown.update)
    bar.update()
    assert shown == {}
    bar.update(loss=0.25)
    assert (shown, bar.done) == ({"loss": "0.2500"}, 2)
    bar.close()
    assert progress.Bar([1, 2], "x", quiet=True).done == 0
    assert progress._bars == []
    assert progress.Bar(iter("ab"), "letters", quiet=True).words() == "letters"
    assert progress.Bar("ab", "letters", quiet=True).words() == "letters, 0 of 2"


def test_minutes_are_counted_and_nothing_is_said_behind_the_end(capsys, monkeypatch):
    monkeypatch.setattr(progress, "_bars", [])
    clock = iter([0.0, *[90.0] * 100])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(progress, "SPEAK_SECONDS", 0.02)
    with progress.spoken("a.py"):
        time.sleep(0.1)
    said = capsys.readouterr()
    assert said.err.startswith("a.py: at work (1.5 min so far)\n")
    assert said.out == ""  # where a benchmark's table goes
    time.sleep(0.06)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("terminal", "rank"), [(True, "0"), (False, "1")])
def test_a_terminal_and_the_other_processes_hear_nothing(capsys, monkeypatch, terminal, rank):
    monkeypatch.setattr(progress, "SPEAK_SECONDS", 0.01)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    monkeypatch.setenv("RANK", rank)
    with progress.spoken("a.py"):
        time.sleep(0.05)
    assert capsys.readouterr().err == ""


# ----- text ---------------------------------------------------------------------------------------
def test_a_text_beyond_any_list_is_refused(stage, monkeypatch):
    monkeypatch.setattr(plain, "WHOLE_FILE", 4_000_000)
    monkeypatch.setattr(plain, "PIECE", 1_000_000)
    path = put(stage, "gene-names.txt", "a" * 4_000_000)
    assert len(plain.read_text(path)) == 4_000_000
    path = put(stage, "gene-names.txt", "a" * 4_000_001)
    _, said = outcome(plain.read_lines, stage, path)
    assert "gene-names.txt cannot be read: it has more than 4 million characters." in said


def test_what_the_system_did_is_told_from_what_the_bytes_are():
    assert plain.of_system(MemoryError())
    assert plain.of_system(OSError(5, "x"))
    assert not plain.of_system(OSError("x"))
    assert not plain.of_system(ValueError("x"))


def test_a_number_is_shown_as_far_as_it_helps(stage):
    path = put(stage, "radius.txt", "7" * 39 + "89")
    _, said = outcome(plain.read_number, stage, path, 1, 2, "px")
    assert f"holds '{'7' * 39}8'; expected one number between 1 and 2 (px)" in said
    assert said.count("point.\n") == 1
    _, said = outcome(plain.read_number, stage, path, 1, 2, "px", "A hint.")
    assert "a decimal point. A hint." in said


def test_lines_that_are_blank_do_not_count(stage):
    path = put(stage, "gene-names.txt", "\n  \n A \n\t\nB\n")
    assert plain.lines_of(path) == plain.read_lines(stage, path) == ["A", "B"]


# ----- genes --------------------------------------------------------------------------------------
def test_only_what_looks_like_a_path_is_called_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a/b", "a\\b", "LIST.TXT", "x.csv", "x.tsv"):
        assert f"--genes {name} looks like a file" in outcome(read_genes, name, ["A"], "x")[1]
    for name in ("HLA-A", "x.1"):
        assert f"names {name}: no such gene in x" in outcome(read_genes, name, ["A"], "x")[1]
        assert "Excel" not in outcome(read_genes, name, ["A"], "x")[1]


def test_a_gene_listed_twice_is_refused_by_its_name(stage):
    path = put(stage, "gene-names.txt", "A\nB\nA\n")
    assert "names A more than once" in outcome(read_gene_names, stage, path)[1]
    path = put(stage, "gene-names.txt", "\n")
    assert "holds no gene" in outcome(read_gene_names, stage, path)[1]
    assert spoilt_by_excel(["A", "MARCH1"]) == ""
    assert spoilt_by_excel(["A", "1-Mar"]).startswith("1-Mar: a date")


# ----- tables -------------------------------------------------------------------------------------
def test_rows_of_a_small_table_are_text_and_as_many_in_each(stage):
    path = put(stage, "t.csv", "a; b\n1;2 \n")
    assert tables.read_rows(path) == [["a", "b"], ["1", "2"]]
    path = put(stage, "t.csv", "b\tc\nr1\t1\t2\nr2\t3\t4\n")  # of R: the first cell is missing
    assert tables.read_rows(path) == [["", "b", "c"], ["r1", "1", "2"], ["r2", "3", "4"]]
    assert tables.read_text_table(path).columns.tolist() == ["", "b", "c"]
    assert tables.read_text_table(path)["c"].tolist() == ["2", "4"]
    path = put(stage, "t.csv", "a,b\n1,2\n3\n")
    with pytest.raises(plain.Unfit, match="it has 1 fields in row 3; expected 2"):
        tables.read_rows(path)
    with pytest.raises(plain.Unfit, match="it is empty"):
        tables.read_rows(put(stage, "t.csv", "\n\n"))
    with pytest.raises(plain.Unfit, match="names the columns b more than once"):
        tables.read_text_table(put(stage, "t.csv", "a,b,b\n1,2,3\n"))


def test_a_table_of_one_column_is_shown_as_far_as_it_helps(stage):
    path = put(stage, "cnts.csv", "x" * 50 + "\n1\n")
    _, said = outcome(tables.read_locs, stage, path)
    assert f"one column only ('{'x' * 40}')" in said
    path = put(stage, "cnts.csv", f"id,x,y\n{'s' * 50},1\n")
    _, said = outcome(tables.read_locs, stage, path)
    assert f"it has 1 fields for spot '{'s' * 40}' (data row 1), none for column y" in said


def test_columns_of_one_name_are_let_through_on_request(stage):
    path = put(stage, "t.csv", "id,A,A\ns1,1,2\n")
    assert tables.read_table(path, repeats=True)[2].toarray().tolist() == [[1, 2]]
    with pytest.raises(plain.Unfit, match="names the columns A more than once"):
        tables.read_table(path)
    assert tables.column_names(path) == ["A", "A"]


def test_the_columns_that_are_missing_are_named(stage):
    path = put(stage, "locs.csv", "id,x,z\ns1,1,2\n")
    assert (
        "it has the columns x, z; expected a column y." in outcome(tables.read_locs, stage, path)[1]
    )


def test_the_place_of_a_spot_has_an_end_and_is_its_own(stage):
    path = put(stage, "locs.csv", "id,x,y\ns1,1e7,-1e7\ns2,1,2\n")
    assert tables.read_locs(stage, path).loc["s1"].tolist() == [1e7, -1e7]
    path = put(stage, "locs.csv", "id,x,y\ns1,1.01e7,2\ns2,1,2\n")
    assert "puts the spots s1 more than 1e+07 px" in outcome(tables.read_locs, stage, path)[1]
    path = put(stage, "locs.csv", "id,x,y\ns1,1,2\ns2,1,3\ns3,1,2\n")
    assert "gives the spots s3 the place" in outcome(tables.read_locs, stage, path)[1]


def test_counts_and_spots_that_do_not_fit_are_counted(stage, capsys):
    path = put(stage, "cnts.csv", "id,A,B\ns1,1,2\ns2,3,4\ns3,5,6\n")
    found, names = tables.read_sparse_counts(stage, path, pd.Index(["s3", "s1"]))
    assert (found.toarray().tolist(), names) == ([[5, 6], [1, 2]], ["A", "B"])
    assert "cnts.csv: 1 of 3 rows have no location and are left out" in capsys.readouterr().out
    tables.read_sparse_counts(stage, path, pd.Index(["s1", "s2", "s3"]))
    assert capsys.readouterr().out == ""
    _, said = outcome(tables.read_sparse_counts, stage, path, pd.Index(["s1", "x", "y"]))
    assert "no counts for 2 of the 3 spots that have a location: x, y; its own ids" in said
    path = put(stage, "cnts.csv", "id,A,B\ns1,0,0\n")
    assert (
        "nothing but zeros" in outcome(tables.read_sparse_counts, stage, path, pd.Index(["s1"]))[1]
    )
    path = put(stage, "cnts.csv", "id,1,2\ns1,0,3\n")
    assert (
        "header line is missing"
        in outcome(tables.read_sparse_counts, stage, path, pd.Index(["s1"]))[1]
    )


def test_fractions_are_warned_of_and_whole_numbers_are_not(stage, capsys):
    for cell, notes in (("2.0", 0), ("0.5", 1)):
        path = put(stage, "cnts.csv", f"id,A,B\ns1,{cell},1\n")
        tables.read_sparse_counts(stage, path, pd.Index(["s1"]))
        assert len(stage.notes) == notes
    assert "cnts.csv holds fractions" in stage.notes[0]
    assert "warning: cnts.csv holds fractions" in capsys.readouterr().out


def test_the_spot_and_gene_of_a_negative_or_huge_count_are_named(stage):
    for cell, words in (
        ("-3", "holds -3 for spot s2, gene C"),
        ("2e9", "2e+09 for spot s2, gene C"),
    ):
        path = put(stage, "cnts.csv", f"id,A,B,C\ns1,1,2,3\ns2,4,5,{cell}\ns3,6,7,8\n")
        _, said = outcome(tables.read_sparse_counts, stage, path, pd.Index(["s1", "s2", "s3"]))
        assert words in said


# ----- arrays and pickles -------------------------------------------------------------------------
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_half_precision_that_is_not_finite_is_refused(stage, value):
    values = np.array([[-1, 65504], [0, -65504]], np.float16)
    path = stage.directory / "Histology_feature_map.npy"
    np.save(path, values)
    found = arrays.read_array(stage, utils.FEATURES, np.float16, (2, None))
    np.testing.assert_array_equal(found, values)
    values[1, 0] = value
    np.save(path, values)
    _, said = outcome(arrays.read_array, stage, utils.FEATURES, np.float16, (2, None))
    assert "holds values that are not finite" in said


def test_an_array_of_another_type_or_shape_is_refused_with_both(stage):
    path = stage.directory / "HRcnts.npy"
    for values in (np.ones((2, 3)), np.ones((3, 2), "f4"), np.ones(6, "f4"), np.ones((2, 0), "f4")):
        np.save(path, values)
        _, said = outcome(arrays.read_array, stage, utils.HR_CNTS, np.float32, (2, None))
        if values.dtype == np.float32 and values.shape == (2, 3):
            assert said is None
        else:
            assert f"is {values.dtype} {values.shape}; expected float32 (2, any)" in said


@pytest.mark.parametrize("order", ["C", "F"])
def test_rows_of_a_file_are_those_of_the_array(tmp_path, order, monkeypatch):
    values = np.asarray(np.arange(60, dtype=np.float32).reshape(10, 2, 3), order=order)
    np.save(tmp_path / "a.npy", values)
    found = arrays.mapped(tmp_path / "a.npy")
    np.testing.assert_array_equal(arrays.some_rows(found, 2, 5), values[2:5])
    np.testing.assert_array_equal(arrays.some_rows(found, 8, 50), values[8:])
    np.testing.assert_array_equal(arrays.some_rows(values, 2, 5), values[2:5])
    monkeypatch.setattr(arrays, "BLOCK_BYTES", 3 * 24)
    sizes = [len(block) for block in arrays.blocks_of(found)]
    assert sizes == [3, 3, 3, 1]
    np.testing.assert_array_equal(np.concatenate([*arrays.blocks_of(found)]), values)


def test_containers_of_arrays_come_back_as_they_were(tmp_path):
    inner = np.arange(6.0).reshape(2, 3)
    shared = [inner, "x"]
    content = {"a": (inner.T, 1), "b": [shared, shared], "c": np.float32(2), "d": bytearray(b"yz")}
    (tmp_path / "x.pickle").write_bytes(pickle.dumps(content, protocol=5))
    found = pickles.read_pickle(tmp_path / "x.pickle")
    np.testing.assert_array_equal(found["a"][0], inner.T)
    np.testing.assert_array_equal(found["b"][1][0], inner)
    assert isinstance(found["a"], tuple)
    assert (found["b"][0][1], found["c"], found["d"]) == ("x", 2, bytearray(b"yz"))
    assert found["b"][0] is found["b"][1]


def test_what_a_pickle_would_run_is_named(tmp_path):
    (tmp_path / "x.pickle").write_bytes(pickle.dumps(os.getcwd))
    _, said = outcome(pickles.read_pickle, tmp_path / "x.pickle")
    assert "x.pickle is not a pickled numpy array" in said
    assert ".getcwd is not a numpy array" in said
    (tmp_path / "x.pickle").write_bytes(pickle.dumps(np.array(["text"])))
    assert "arrays of <U4 are not read" in outcome(pickles.read_pickle, tmp_path / "x.pickle")[1]


# ----- pictures -----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (bytes(128) + b"DICM" + bytes(9), "a DICOM image"),
        (bytes(127) + b"DICM" + bytes(9), None),
        (b"\0\0\0\x18ftypheic", "a HEIC or AVIF image, or a film"),
        (b"II*\0ftyp", "a HEIC or AVIF image, or a film"),
        (b"P6\n1 1", "a PPM, PGM or PBM image"),
        (b"P8\n1 1", None),
        (b"RDX3", "a file of R (.RData)"),
        (b" \n <SVG", "an SVG or another XML file"),
        (b"", None),
    ],
)
def test_what_is_no_picture_of_ours_is_known_by_its_first_bytes(tmp_path, content, kind):
    (tmp_path / "he-raw.png").write_bytes(content)
    assert pictures.kind_of(tmp_path / "he-raw.png") == kind


@pytest.mark.parametrize("number", range(2, 9))
def test_an_orientation_of_exif_is_called_so(number):
    assert pictures.turned(number).startswith(f"has EXIF orientation {number}, so viewers turn it")


@pytest.mark.parametrize("number", [0, 9, -1])
def test_an_orientation_of_no_standard_is_called_so(number):
    assert pictures.turned(number).startswith(f"has orientation {number}, which no standard")


def test_a_second_page_of_colours_as_large_is_no_channel(tmp_path):
    first = np.full((40, 50, 3), 9, np.uint8)
    tifffile.imwrite(tmp_path / "a.tif", np.stack([first, first]), photometric="rgb")
    image = pictures.open_picture(tmp_path / "a.tif")
    pictures.check(image, tmp_path / "a.tif")
    assert (image.width, image.height, image.bands) == (50, 40, 3)


def test_the_first_of_what_libvips_says_is_the_reason():
    error = pictures.pyvips.Error("x")
    for detail, words in (("\n  first.\nsecond\n", "first"), ("\n", "no reason given")):
        error.detail = detail
        assert pictures.reason(error) == words
    error.detail = "write error: No space left on device"
    with pytest.raises(OSError, match="No space left") as caught:
        pictures.reason(error)
    assert caught.value.errno == 28
    pictures.failures.append(OSError(5, "x"))
    with pytest.raises(OSError, match="x"):
        pictures.reason(error)
    assert pictures.failures == []


def test_a_jpeg_of_zeros_behind_its_end_is_whole(tmp_path):
    path = tmp_path / "a.jpg"
    Image.new("RGB", (40, 30), (200, 100, 50)).save(path)
    whole = path.read_bytes()
    for content, filled in (
        (whole, False),
        (whole + bytes(9), False),
        (whole[:-9] + bytes(9), True),
    ):
        path.write_bytes(content)
        assert pictures.is_filled_up(path) is filled


def test_a_side_beyond_any_slide_is_refused(tmp_path, monkeypatch):
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    monkeypatch.setattr(pictures, "MAX_SIDE_PX", 40)
    assert pictures.open_picture(tmp_path / "a.png").width == 40
    monkeypatch.setattr(pictures, "MAX_SIDE_PX", 39)
    with pytest.raises(pictures.pyvips.Error):
        pictures.open_picture(tmp_path / "a.png")


def test_a_picture_is_shrunk_to_its_longest_side_and_never_enlarged(stage):
    pixels = np.zeros((30, 60, 3), np.uint8)
    pixels[:, 30:] = 200
    Image.fromarray(pixels).save(stage.directory / "he.png")
    small = images.thumbnail(stage, stage.directory / "he.png", 20)
    assert small.shape == (10, 20, 3)
    assert small[:, :8].max() <= 2
    assert small[:, 12:].min() >= 198
    assert images.thumbnail(stage, stage.directory / "he.png", 999).shape == (30, 60, 3)


def test_rows_of_an_image_in_any_order(stage, monkeypatch):
    monkeypatch.setattr(images, "BLOCK_PX", 16)  # as libvips decodes; it goes back by no row
    pixels = np.random.default_rng(0).integers(0, 255, (60, 20, 3), np.uint8)
    Image.fromarray(pixels).save(stage.directory / "he.png")
    with images.ImageRows(stage, stage.directory / "he.png") as rows:
        assert (len(rows), rows.shape) == (60, (60, 20, 3))
        for top, bottom in ((0, 60), (5, 6), (15, 17), (31, 99), (8, 16), (9, 9), (20, 3)):
            np.testing.assert_array_equal(rows[top:bottom], pixels[top:bottom])
        with pytest.raises(IndexError):
            rows[::2]


def test_an_image_larger_than_any_of_ours_is_refused(stage, monkeypatch):
    put(stage, "he.jpg", b"")
    check = images.check_extent
    check(stage, stage.directory / "he.jpg", 65_500, 65_500)
    with pytest.raises(utils.StageError, match=r"65500 x 65501 px; expected at most 4,290 million"):
        check(stage, stage.directory / "he.jpg", 65_500, 65_501)


def test_a_mask_as_large_as_he_raw_lies_by_its_scale(stage):
    """he-raw of 24 x 48 px became one of 48 x 96; a superpixel is 8 px of he-raw."""
    record = {"finished": True, "inputs": {}, "outputs": {}, "raw_size": [24, 48]}
    put(stage, "image_calibration.json", json.dumps(record | {"scaled_size": [48, 96]}))
    rows, columns = images.mask_edges(stage, (24, 48), (14, 14))
    assert rows.tolist() == [0, 8, 16, *[24] * 12]
    assert columns.tolist() == [0, 8, 16, 24, 32, 40, *[48] * 9]
    rows, _ = images.mask_edges(stage, (28, 28), (14, 14))
    assert rows.tolist() == list(range(0, 29, 2))
    _, said = outcome(images.mask_edges, stage, (24, 47), (14, 14))
    assert "is 47 x 24 px; expected 48 x 24 px as he-raw, 224 x 224 px as he.jpg" in said
    _, said = outcome(images.mask_edges, stage, (50_000, 40_001), (14, 14))
    assert "is 40001 x 50000 px, more than 2,000 megapixels" in said
    _, said = outcome(images.mask_edges, stage, (50_000, 40_000), (14, 14))
    assert "is 40000 x 50000 px; expected 48 x 24 px as he-raw" in said


def test_what_is_no_image_has_no_grid(stage):
    put(stage, "he.jpg", b"text")
    assert "he.jpg is not an image" in outcome(images.grid_shape, stage)[1]
    Image.new("RGB", (448, 224)).save(stage.directory / "he.jpg")
    assert images.grid_shape(stage) == (14, 28)


# ----- image_calibration.py -----------------------------------------------------------------------
@pytest.mark.parametrize(
    ("size", "name"),
    [((65_500, 224), "he.jpg"), ((65_501, 224), "he.png"), ((224, 65_501), "he.png")],
)
def test_he_is_a_png_where_libjpeg_ends(size, name):
    assert image_calibration.he_name(size) == name


@pytest.mark.parametrize(
    ("pitch_um", "factor"),
    [(100, 1), (200, 1), (50, 2), (400, 2), (125, 1.25), (150, 4 / 3), (0, 1), (float("nan"), 1)],
)
def test_the_factor_between_a_pitch_and_the_nearer_one_that_is_known(pitch_um, factor):
    assert image_calibration.pitch_factor(pitch_um) == pytest.approx(factor)


def test_the_geometry_by_hand(capsys):
    found = image_calibration.tell_geometry(Path("he-raw.png"), 0.25, (600, 1000), (300, 500))
    assert found == {
        "raw_size": (600, 1000), "scaled_size": (300, 500), "size": (448, 672),
        "padding": (148, 172), "scale": 0.5,
    }  # fmt: skip
    assert capsys.readouterr().out == (
        "he-raw.png: 1000 x 600 px at 0.25 um per pixel\n"
        "scaled by 0.5 to 500 x 300 px at 0.5 um per pixel\n"
        "padded by 172 px on the right and 148 px below to 672 x 448 px\n"
    )


def test_a_radius_in_pixels_of_he(tmp_path, capsys):
    stage = make_stage(tmp_path, max_megapixels=1)
    assert image_calibration.read_radius(stage, 0.25) == 55.0  # 27.5 um
    assert "for legacy ST write 200.00 into it (50 um)" in capsys.readouterr().out
    (tmp_path / "radius-raw.txt").write_text("110\n")
    assert image_calibration.read_radius(stage, 0.25) == 55.0
    (tmp_path / "radius-raw.txt").write_text("31.9\n")
    assert (
        "between 32 and 2048 (pixels of he-raw)"
        in outcome(image_calibration.read_radius, stage, 0.25)[1]
    )


def test_a_progressive_picture_asks_for_the_memory_of_all_its_pixels(tmp_path, monkeypatch):
    stage = make_stage(tmp_path, max_megapixels=1)
    Image.new("RGB", (500, 400)).save(tmp_path / "he-raw.jpg", progressive=True)
    image = image_calibration.open_image(stage, tmp_path / "he-raw.jpg")
    for memory, fits in ((6 * 500 * 400, True), (6 * 500 * 400 - 1, False), (None, True)):
        monkeypatch.setattr(image_calibration, "machine_memory", lambda known=memory: known)
        found = outcome(image_calibration.check_size, stage, tmp_path / "x", image, (400, 500))
        assert (found[1] is None) == fits
    for shape, words in (
        ((223, 500), "at least one tile of 224 px"),
        ((1000, 1001), "larger than"),
    ):
        assert words in outcome(image_calibration.check_size, stage, Path("x"), image, shape)[1]
    assert outcome(image_calibration.check_size, stage, Path("x"), image, (1000, 1000))[1] is None


def test_sizes_by_hand():
    assert calibration.calibrated_shape((100, 301), 0.25) == (50, 150)
    assert calibration.calibrated_shape((100, 301), 1.0) == (200, 602)
    assert calibration.calibrated_shape((10**5, 301), 0.50004) == (10**5, 301)  # the same scale
    assert calibration.calibrated_shape((10**5, 301), 0.5001) == (100_020, 301)
    assert calibration.padded_shape((224, 225)) == (224, 448)
    assert calibration.padded_shape((1, 448)) == (224, 448)
    memory = calibration.machine_memory()
    assert memory is None or memory > 2**28


@pytest.mark.parametrize(("mode", "words"), [("RGB", 0), ("L", 1)])
def test_what_is_converted_is_said_and_nothing_else(sample, mode, words, capsys):
    with Image.open(sample / "he-raw.png") as image:
        image.convert(mode).save(sample / "he-raw.png")
    assert run("image_calibration.py", sample) == 0
    said = capsys.readouterr().out
    assert said.count("he-raw.png: grey, converted to RGB\n") == words
    assert said.count("he-raw.png: ") == 1 + words  # the other is its size
    record = json.loads((sample / "image_calibration.json").read_text())
    assert record["converted"] == "grey, converted to RGB" * words


def test_an_image_of_as_many_pixels_as_allowed_is_taken(tmp_path):
    stage = make_stage(tmp_path, max_megapixels=1)
    for size, words in (((1000, 1000), None), ((1001, 1000), "1001 x 1000 px")):
        Image.new("RGB", size).save(tmp_path / "he-raw.png")
        said = outcome(image_calibration.open_image, stage, tmp_path / "he-raw.png")[1]
        assert said is None if words is None else words in said


def test_how_far_spots_reach_is_told_by_the_longer_way():
    xy = lattice("hexagonal", 10, 10) - (3000.0, 700.0)  # to 1,900 in x and 1,559 in y
    for shape in ((156, 9000), (9000, 170)):
        said = image_calibration.diagnose(xy, shape, 0.5)
        reach = max(np.quantile(xy[:, 0], 0.9) / shape[1], np.quantile(xy[:, 1], 0.9) / shape[0])
        assert f"They reach {reach:.1f} times as far as the image" in said
        assert reach > 8


# ----- get_HR.py ----------------------------------------------------------------------------------
@pytest.mark.parametrize("shape", ["hexagonal", "square"])
def test_sixteen_spots_are_a_lattice_and_fifteen_are_too_few(shape):
    xy = lattice(shape, 4, 4)
    assert get_HR.fit_lattice(xy).shape == shape
    assert get_HR.fit_lattice(xy[:15]) is None


@pytest.mark.parametrize("degrees", [-29.0, -7.0, 0.0, 11.0, 29.0])
def test_a_turn_is_told_by_its_smallest_angle(degrees):
    fitted = get_HR.fit_lattice(lattice("hexagonal", 8, 8, degrees))
    assert fitted.degrees == pytest.approx(degrees, abs=1e-6)
    assert fitted.pitch == pytest.approx(200)
    assert fitted.residuals(lattice("hexagonal", 8, 8, degrees)).max() < 1e-9


@pytest.mark.parametrize(("n", "fits"), [(0, True), (5, True), (6, False)])
def test_one_spot_in_twenty_may_stray(n, fits):
    """0.4 pitches from free nodes beside the lattice: 5 of 105 are 4.8 %, 6 of 106 are 5.7 %."""
    xy, axes = lattice("square", 10, 10), 200 * np.eye(2)
    xy = np.vstack([xy, xy[9 + 10 * np.arange(n)] + (280.0, 0.0)])
    fitted = get_HR.Lattice("square", xy[0], axes, get_HR.nearest_nodes(xy, xy[0], axes))
    assert get_HR.explains(fitted, xy) == fits


@pytest.mark.parametrize(("last", "joined"), [(270, True), (290, False)])
def test_an_edge_of_a_row_is_at_most_1_4_times_the_median(last, joined):
    xy = np.array([(0, 0), (200, 0), (400, 0), (600, 0), (600 + last, 0)], float)
    wanted = [[0, 1], [1, 2], [2, 3], *[[3, 4]] * joined]
    assert get_HR.delaunay_pairs(xy).tolist() == wanted


@pytest.mark.parametrize(("longer", "fits"), [(1.15, True), (1.25, False)])
def test_a_lattice_may_be_stretched_by_a_fifth(longer, fits):
    xy = lattice("square", 12, 12) * (1.0, longer)
    assert (get_HR.fit_lattice(xy) is not None) == fits


def test_the_densest_patch_begins_in_its_middle():
    xy = np.vstack([lattice("square", 15, 15, pitch=400.0), lattice("square", 15, 15) + 20_000])
    patch = get_HR.densest_patch(xy)
    assert len(patch) == len(set(patch)) == 150
    assert (patch >= 225).all()
    middle = np.linalg.norm(xy[patch] - xy[patch[0]], axis=1)
    assert (np.diff(middle) >= -1e-9).all()
    assert len(get_HR.densest_patch(xy[:20])) == 20


def test_the_nearest_node_is_one_of_the_four_around():
    axes, origin = np.array([[2.0, 0.0], [1.0, 2.0]]), np.array([10.0, 20.0])
    nodes = np.array([(0, 0), (1, 0), (0, 1), (-3, 2), (5, -4)])
    exact = origin + nodes @ axes
    off = np.array([0.4, -0.3])
    assert get_HR.nearest_nodes(exact, origin, axes).tolist() == nodes.tolist()
    assert get_HR.nearest_nodes(exact + off, origin, axes).tolist() == nodes.tolist()


def test_spots_on_one_node_are_all_found(tmp_path):
    nodes = np.array([(0, 0), (2, 1), (0, 0), (1, 2), (2, 1)])
    assert sorted(map(sorted, get_HR.shared_nodes(nodes).tolist())) == [[0, 2], [1, 4]]
    fitted = get_HR.Lattice("square", np.zeros(2), 200 * np.eye(2), nodes)
    locs = pd.DataFrame(200.0 * nodes, list("abcde"), ["x", "y"])
    locs.loc["c", "x"] += 50
    _, said = outcome(get_HR.check_collisions, make_stage(tmp_path), fitted, locs)
    assert "puts the spots a and c on one node of the lattice, only 0.25 pitches apart" in said
    assert "and so do 1 other pairs" in said
    fitted = get_HR.Lattice("square", np.zeros(2), 200 * np.eye(2), nodes[:3])
    _, said = outcome(get_HR.check_collisions, make_stage(tmp_path), fitted, locs[:3])
    assert "other pairs" not in said


def test_what_is_said_of_a_lattice(capsys):
    xy = lattice("square", 5, 5, 10.0)
    facts = get_HR.describe(get_HR.fit_lattice(xy), xy)
    assert facts == {
        "lattice": "square", "pitch_um": 100.0, "angle_degrees": 10.0, "residual_um": 0.0,
        "largest_residual_um": 0.0, "spots": 25,
    }  # fmt: skip
    said = capsys.readouterr().out
    assert "lattice: square, pitch 100.0 um, turned by 10.0 degrees\n" in said
    assert "note:" not in said
    moved = xy + np.random.default_rng(0).normal(0, 8, xy.shape)
    facts = get_HR.describe(get_HR.fit_lattice(moved), moved)
    pitch, rms, largest = (facts[f"{n}_um"] for n in ("pitch", "residual", "largest_residual"))
    assert 2 < rms < largest < 20  # 8 px a coordinate are 5.7 um in all, less what a fit takes up
    assert capsys.readouterr().out.splitlines()[1] == (
        f"residual: {rms:.1f} um rms ({rms / pitch:.1%} of the pitch), "
        f"largest {largest:.1f} um ({largest / pitch:.1%})"
    )
    for scale, notes in ((2.0, 0), (1.09, 0), (1.11, 1), (1.5, 1)):
        get_HR.describe(get_HR.fit_lattice(xy * scale), xy * scale)
        assert capsys.readouterr().out.count("note: this pitch is neither") == notes
    assert get_HR.describe(None, xy[:15]) == {"lattice": "none", "spots": 15}
    said = capsys.readouterr().out
    assert "note: only 15 spots; do not trust maps of fewer than 16" in said
    assert "lattice: none, too few spots; neighbours are Delaunay edges up to 1.4 x median" in said
    get_HR.describe(None, xy[:16])
    said = capsys.readouterr().out
    assert "note: only" not in said
    assert "lattice: none, the spots lie on none" in said


def test_genes_are_chosen_with_a_word_on_how_many(tmp_path, capsys):
    from scipy import sparse

    (tmp_path / "cnts.csv").write_text("x")
    stage = make_stage(tmp_path, n_genes=2)
    counts = sparse.csr_array(np.array([[1, 5, 0, 9], [2, 5, 7, 1]], np.float32))
    names = list("abcd")
    assert get_HR.choose_genes(stage, counts, names, None).tolist() == [2, 3]
    assert capsys.readouterr().out == "genes: the 2 most variable of 4\n"
    stage.args.n_genes = 4
    assert get_HR.choose_genes(stage, counts, names, None).tolist() == [0, 2, 3]
    assert (
        "the 3 most variable of 4; only these vary, --n-genes asks for 4" in capsys.readouterr().out
    )
    stage.args.n_genes = 3
    get_HR.choose_genes(stage, counts, names, None)
    assert "only these" not in capsys.readouterr().out
    assert get_HR.choose_genes(stage, counts, names, ["d", "a"]).tolist() == [3, 0]
    _, said = outcome(get_HR.choose_genes, stage, counts, names, ["x", "a", *"12345"])
    assert (
        "names 6 of 7 genes that cnts.csv does not have: x, 1, 2, 3, 4; it has genes like a" in said
    )
    _, said = outcome(get_HR.choose_genes, stage, counts[:1], names, None)
    assert "has no gene that varies between the 1 spots" in said
    assert genes.most_variable(counts, names, 1).tolist() == [3]


def test_points_and_their_counts_by_hand(tmp_path, monkeypatch):
    locs = pd.DataFrame([(0.0, 2.0), (4.0, 2.0), (0.0, 8.0)], list("abc"), ["x", "y"])
    parents = get_HR.hr_parents(3, np.array([(0, 1), (0, 2)]))
    table = get_HR.hr_locations(locs, parents)
    assert table.to_numpy().tolist() == [
        [0, 2, 1, "a", ""], [4, 2, 1, "b", ""], [0, 8, 1, "c", ""],
        [2, 2, 0, "a", "b"], [0, 5, 0, "a", "c"],
    ]  # fmt: skip
    counts = np.array([[1, 2], [3, 5], [0, 8]], np.float32)
    monkeypatch.setattr(get_HR, "BLOCK_BYTES", 16)  # two rows at a time
    get_HR.write_hr_counts(counts, parents, tmp_path / "HRcnts.npy")
    found = np.load(tmp_path / "HRcnts.npy")
    assert found.dtype == np.float32
    assert found.tolist() == [[1, 2], [3, 5], [0, 8], [2, 3.5], [0.5, 5]]
