"""A record lists all that its script read: only then may a second run say that nothing changed."""

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import PIPELINE
from PIL import Image

import utils
from analysis import annotate, cells, export, patterns, report, segment
from writing import disk

_opened: list[str] | None = None  # what is opened for reading, while a test looks


def _look(event: str, arguments: tuple) -> None:
    if event == "open" and _opened is not None:
        path, mode, _ = arguments
        if isinstance(path, str | bytes | Path) and "w" not in (mode or "r"):
            _opened.append(str(path if not isinstance(path, bytes) else path.decode()))


sys.addaudithook(_look)


def read_by(run, directory: Path) -> set[str]:
    """Files of the sample that were opened for reading, without records and partial files."""
    global _opened
    _opened = []
    try:
        assert run() == 0
    finally:
        opened, _opened = _opened, None
    found = set()
    for name in opened:
        path = Path(name).resolve()
        if path.is_relative_to(directory.resolve()) and path.is_file():
            name = path.relative_to(directory.resolve()).parts[0]
            if not name.startswith(".") and not name.endswith(".json"):
                found.add(name)
    return found


def recorded(directory: Path, script: str) -> tuple[set[str], set[str]]:
    record = json.loads((directory / utils.record_name(script)).read_text())
    return {Path(name).parts[0] for name in record["inputs"]}, set(record["outputs"])


@pytest.fixture(autouse=True)
def _hashing_is_no_reading(monkeypatch):
    honest = disk.sha256

    def sha256(path: Path) -> str:
        global _opened
        kept, _opened = _opened, None
        try:
            return honest(path)
        finally:
            _opened = kept

    monkeypatch.setattr(disk, "sha256", sha256)


@pytest.mark.parametrize("script", [script for script, *_ in PIPELINE])
def test_a_stage_records_all_that_it_reads(finished, script):
    module = importlib.import_module(script.removesuffix(".py"))
    options = next(rest for name, *rest in PIPELINE if name == script)
    arguments = ["--directory", str(finished), *options, "--force"]
    read = read_by(lambda: module.run(arguments), finished)
    inputs, outputs = recorded(finished, script)
    assert read - inputs - outputs <= {"states"}
    assert read  # something was looked at


COMMANDS = {
    "report": (report, []),
    "segment": (segment, ["--no-plot", "--truth"]),
    "annotate": (annotate, ["--markers", "{d}/mine.csv", "--no-plot", "--truth"]),
    "patterns": (patterns, ["--no-plot"]),
    "cells": (cells, ["--masks", "{d}/labels.npy"]),
    "h5ad": (export, ["--format", "h5ad"]),
    "csv": (export, ["--format", "csv"]),
    "spots": (export, ["--format", "spots"]),
    "istar": (export, ["--format", "istar"]),
    "ometiff": (export, ["--format", "ometiff"]),
}


def test_a_file_that_an_option_names_is_an_input(finished, tmp_path, capsys):
    genes = tmp_path / "my genes.txt"
    genes.write_text("GENE1\nGENE2\n")
    arguments = ["--directory", str(finished), "--format", "csv", "--genes", str(genes)]
    for text, rests in (("GENE1\nGENE2\n", False), ("GENE1\nGENE2\n", True), ("GENE3\n", False)):
        genes.write_text(text)
        assert export.run(arguments) == 0
        assert ("up to date" in capsys.readouterr().out) == rests
    assert str(genes) in json.loads((finished / "export.json").read_text())["inputs"]
    assert export.run([*arguments[:-1], "GENE1,GENE4"]) == 0


def change_record(directory: Path, script: str, change) -> None:
    path = directory / utils.record_name(script)
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))


def test_a_fact_of_another_record_that_changes_makes_a_script_run_again(finished, capsys):
    arguments = ["--directory", str(finished), "--format", "csv"]
    assert export.run(arguments) == 0
    places = pd.read_csv(finished / "histex.csv.gz")["x_fullres"]
    for change, rests in (
        (lambda record: record.update(ended="later", note="of no meaning"), True),
        (lambda record: record.update(raw_size=[2 * n for n in record["raw_size"]]), False),
    ):
        change_record(finished, utils.CALIBRATION, change)
        capsys.readouterr()
        assert export.run(arguments) == 0
        assert ("up to date" in capsys.readouterr().out) == rests
    now = pd.read_csv(finished / "histex.csv.gz")["x_fullres"]
    np.testing.assert_allclose(now, 2 * places)


def test_patterns_follow_the_held_out_spots_of_the_record(labelled, capsys):
    arguments = ["--directory", str(labelled), "--no-plot", "--permutations", "19"]
    assert patterns.run(arguments) == 0
    change_record(labelled, utils.HISTEX, lambda record: record["held_out_spots"].pop())
    capsys.readouterr()
    assert patterns.run(arguments) == 0
    assert "up to date" not in capsys.readouterr().out


NEED_REGIONS = (segment, annotate, patterns)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_script_of_analysis_records_all_that_it_reads_and_rests(request, name, capsys):
    module, options = COMMANDS[name]
    directory = request.getfixturevalue("labelled" if module in NEED_REGIONS else "finished")
    index = directory / "cnts-super" / "index.csv"
    genes = pd.read_csv(index, keep_default_na=False)["gene"]
    table = pd.DataFrame(
        {"gene": genes, "label": [("left", "right")[i % 2] for i in range(len(genes))]}
    )
    table.to_csv(directory / "mine.csv", index=False)
    with Image.open(directory / "he.jpg") as he:
        rows, columns = np.indices((he.height, he.width)) // 32
    np.save(directory / "labels.npy", (1 + rows * 100 + columns).astype(np.uint16))
    arguments = ["--directory", str(directory), *(o.format(d=directory) for o in options)]
    read = read_by(lambda: module.run(arguments), directory)
    inputs, outputs = recorded(directory, module.SCRIPT)
    assert read - inputs - outputs == set()
    assert read  # something was looked at
    capsys.readouterr()
    assert module.run(arguments) == 0
    assert "up to date, nothing to do" in capsys.readouterr().out
