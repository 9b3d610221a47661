"""The benchmarks: what they compute, and short runs of measured stages."""

import json
import math
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import tifffile
from conftest import PIPELINE, ROOT, run

import utils
from analysis import annotate, enrich
from benchmarks import analyses, kills, measure, scaling, stages

SLOW = "import time\n\ntime.sleep(2)"


# ----- scaling -----
def test_growth_exponents():
    assert scaling.exponent([1, 10, 100], [3, 30, 300]) == pytest.approx(1)
    assert scaling.exponent([1, 10, 100], [2, 200, 20_000]) == pytest.approx(2)
    assert math.isnan(scaling.exponent([5], [1]))
    assert scaling.exponent([1, 2, 4], [-1, 1, 2]) == pytest.approx(1)  # less than start-up: left


def result(seconds: float, gb: float, size: int = 20_000) -> dict:
    limit = {"seconds": 4.0, "cpu": 4.0, "gb": 1.0}
    stage = {"seconds": seconds, "cpu": seconds, "gb": gb}
    return {
        "name": "image_calibration", "label": "image_calibration", "size": size,
        "amount": size**2, "start_up": 0.5, "stage": stage, "limit": limit,
        "plain": {"needs": 32.0}, "before": None,
    }  # fmt: skip


def test_budgets_are_judged_from_their_size_on():
    assert scaling.verdict(result(100, 9, size=10_000)) == ""
    assert scaling.verdict(result(7, 1)).count(", met") == 2
    assert "**missed**" in scaling.verdict(result(9, 1))
    assert scaling.verdict(result(9, 2)).count("**missed**") == 2
    lattice = {**result(8, 0.5, size=14_000), "name": "get_HR"}
    assert "9 s at most: 8, met" in scaling.verdict(lattice)
    assert "3 s" not in scaling.verdict(lattice)


def test_the_table_tells_seconds_and_ratios():
    rows = {"image_calibration": [result(2, 0.5, 5_000), result(8, 0.9)]}
    text = "\n".join(scaling.main_table(rows))
    assert "| 8.00 | 8.00 | 0.90 | needs 32 GB | " in text
    assert "4.00 (0.5x)" in text
    # pixels grow 16-fold, seconds 4-fold, and beyond the start-up 5-fold
    slopes = scaling.exponents(rows)[-1]
    assert f"| 0.50 | {math.log(5) / math.log(16):.2f} |" in slopes


def test_a_limit_that_the_stage_beats_is_marked():
    assert "(0.99x)" in scaling.main_table({"": [result(4.04, 1)]})[-1]
    assert "**beaten**" not in scaling.main_table({"": [result(4.04, 1)]})[-1]
    assert "(1x) **beaten**" in scaling.main_table({"": [result(3.99, 1)]})[-1]


def test_before_and_after_are_told_apart():
    row = {**result(2, 0.5), "before": {"seconds": 8.0, "cpu": 4.0, "gb": 1.0}}
    lines = scaling.before_and_after({"image_calibration": [row]})
    assert "| 8.00 | 2.00 (0.25x) | 4.00 | 2.00 (0.5x) | 1.00 | 0.50 (0.5x) |" in lines[-1]
    assert scaling.before_and_after({}) == []


def test_another_checkout_is_measured_on_the_same_inputs(tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    for name in ("get_HR.py", "utils.py"):
        shutil.copy(ROOT / name, other / name)
    for room in ("method", "reading"):
        shutil.copytree(ROOT / room, other / room)
    # one that takes a second longer
    (other / "get_HR.py").write_text(
        (ROOT / "get_HR.py")
        .read_text(encoding="utf-8")
        .replace(
            "from __future__ import annotations", "from __future__ import annotations\n" + SLOW, 1
        ),
        encoding="utf-8",
    )
    command = ["--keep", str(tmp_path), "--stages", "get_HR", "--sizes", "40"]
    command += ["--output", str(tmp_path / "S.md")]
    assert scaling.run([*command, "--before", str(other)]) == 0
    found = scaling.read_results(tmp_path, before=True)["get_HR"][0]
    assert found["before"]["seconds"] > found["stage"]["seconds"] + 1
    assert scaling.read_results(tmp_path) == {}
    assert "| seconds before | now |" in (tmp_path / "S.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["get_HR", "masking_non_tissue"])
def test_a_stage_is_measured_and_kept(name, tmp_path, capsys):
    small = {"get_HR": "40", "masking_non_tissue": "28"}[name]
    command = ["--keep", str(tmp_path), "--stages", name, "--sizes", small]
    command += ["--output", str(tmp_path / "S.md")]
    assert scaling.run(command) == 0
    (path,) = (tmp_path / "results").glob(f"{name}-{small}-*.json")
    found = json.loads(path.read_text(encoding="utf-8"))
    assert found["stage"]["seconds"] > 0
    assert 0.05 < found["stage"]["gb"] < 3
    assert found["plain"]["seconds"] > 0
    assert found["limit"]["seconds"] > 0
    assert f"| {name} | {small} " in (tmp_path / "S.md").read_text(encoding="utf-8")
    assert (tmp_path / "s.png").stat().st_size > 1000
    path.write_text(json.dumps({**found, "start_up": 1234.0}), encoding="utf-8")
    assert scaling.run(command) == 0  # taken as it was kept
    assert "| 1234.0 |" in (tmp_path / "S.md").read_text(encoding="utf-8")


# ----- kills -----
def test_records_are_compared_without_their_times():
    record = {"seconds": 3.1, "spots": 4, "inputs": {"a": {"mtime_ns": 5, "sha256": "x"}}}
    assert kills.without_times(record) == {"spots": 4, "inputs": {"a": {"sha256": "x"}}}


def test_differences_and_leftovers_are_found(finished, tmp_path):
    wanted = kills.contents(finished)
    assert {"he.jpg", "cnts-super/GENE0.pickle", "get_HR.json"} <= wanted.keys()
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    (copy / ".he.0123.partial.jpg").write_bytes(b"half")
    assert kills.differences(kills.contents(copy), wanted) == []
    assert kills.leftovers(copy) == []
    (copy / ".cnts-super.0123.work").mkdir()
    (copy / "cnts-super" / "GENE0.pickle").write_bytes(b"other")
    (copy / "mask.png").unlink()
    (copy / "new.txt").write_text("new", encoding="utf-8")
    found = kills.differences(kills.contents(copy), wanted)
    assert found == ["cnts-super/GENE0.pickle", "mask.png", "new.txt"]
    assert kills.leftovers(copy) == [".cnts-super.0123.work"]


def test_a_killed_stage_is_tried_again(sample, tmp_path, monkeypatch):
    """Of real processes: killed in their imports, and once let go on to the end."""
    (script, *_), stage = PIPELINE[0], kills.STAGES[1]
    assert run(script, sample) == 0
    after = tmp_path / "after"
    shutil.copytree(sample, after)
    kills.attempt(stage, after, tmp_path / "log")
    moments = iter([0.05, 60.0, 0.05, 0.05, 0.05])
    draw = SimpleNamespace(uniform=lambda *_: next(moments))
    args = SimpleNamespace(kills=3 * len(kills.STAGES), keep=tmp_path)
    counts = kills.try_stage(stage, sample, after, 0, 1, args, draw)
    assert counts["kills"] == counts["before"] == 4
    assert counts["trials"] == counts["identical"] == 3
    np.save(after / utils.HR_CNTS.name, np.zeros(3))  # as if an undisturbed run wrote this
    moments = iter([0.05])
    args.kills = len(kills.STAGES)
    counts = kills.try_stage(stage, sample, after, 0, 1, args, draw)
    assert counts["trials"] == 1
    assert counts["identical"] == 0


# ----- analyses -----
def test_made_up_cells_are_discs_of_their_own(tmp_path):
    analyses.write_cells(tmp_path / "cells.tif", (9, 12))
    cells = tifffile.imread(tmp_path / "cells.tif")
    assert cells.shape == (9 * 16, 12 * 16)
    areas = np.bincount(cells.ravel())[1:]
    assert (areas > 0).sum() == 6 * 8  # a cell every 24 px
    assert areas[areas > 0].max() == pytest.approx(np.pi * 10**2, rel=0.05)


def test_made_up_tables_are_what_the_scripts_read(tmp_path):
    genes, rng = [f"G{i}" for i in range(40)], np.random.default_rng(0)
    analyses.write_markers(tmp_path / "made-up.csv", genes, rng)
    analyses.write_sets(tmp_path / "made-up.gmt", genes, rng)
    markers = annotate.read_markers(tmp_path / "made-up.csv")
    assert len(markers) == analyses.LABELS * analyses.MARKERS
    sets = enrich.read_gmt(tmp_path / "made-up.gmt")
    assert len(sets) == analyses.SETS


def test_every_analysis_is_measured(finished, monkeypatch, capsys):
    every, paths = analyses.commands(finished), (ROOT / "analysis").glob("*.py")
    scripts = {path.name for path in paths if "run_stage" in path.read_text(encoding="utf-8")}
    assert {script for script, *_ in every} == scripts - {"evaluate.py"}
    report = [command for command in every if command[0] == "report.py"]
    monkeypatch.setattr(analyses, "commands", lambda made: report)
    assert analyses.run(["--directory", str(finished)]) == 0
    said = capsys.readouterr().out
    assert said.startswith("28 x 42 superpixels, 8 genes")
    assert "| report.py | " in said
    assert f"* command: `python benchmarks/analyses.py --directory '{finished}'`" in said


# ----- stages -----
def test_options_of_a_script_are_given_in_quotes(sample, capsys):
    words = ["--directory", str(sample), "--histex", "--epochs 5 --n-states=2"]
    assert stages.build_parser().parse_args(words).histex == "--epochs 5 --n-states=2"
    with pytest.raises(SystemExit):
        stages.build_parser().parse_args([*words, "--hist=x"])
    assert "Did you mean --histex?" in capsys.readouterr().err


# ----- measure -----
def test_a_process_is_measured_and_killed_in_time(tmp_path):
    log, words = tmp_path / "log", "import time; x = b'1' * 300_000_000; print('made', flush=True)"
    facts = scaling.in_child("measure", "run_measured", [sys.executable, "-c", words], log)
    assert 0.3 < facts["gb"] < 0.4
    assert not facts["killed"]
    endless = [sys.executable, "-c", f"{words}; time.sleep(60)"]
    facts = measure.run_measured(endless, log, lambda: log.read_text().count("made") == 2)
    assert facts["killed"]
    assert facts["seconds"] < 30
    with pytest.raises(utils.StageError, match="ended with 3"):
        measure.run_measured([sys.executable, "-c", "raise SystemExit(3)"], log)


def test_what_is_kept_is_not_made_again(tmp_path):
    path, made = tmp_path / "results" / "a.json", []
    for _ in range(2):
        found = measure.cached(path, lambda: made.append(1) or {"r": 0.5})
        assert found == {"r": 0.5}
    assert made == [1]


def test_tables_are_markdown():
    assert measure.table(["a", "b"], [[1, "x"]]) == ["| a | b |", "|---|---|", "| 1 | x |"]
