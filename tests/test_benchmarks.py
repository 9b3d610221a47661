"""The benchmarks: what they compute, and short runs of measured stages."""

import json
import math
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile
from conftest import ROOT
from PIL import Image

import utils
from analysis import annotate, enrich
from benchmarks import (
    analyses,
    before_after,
    calibration,
    faults,
    fuzz,
    limits,
    measure,
    mutants,
    mutations,
    scaling,
    stages,
    trials,
)

SLOW = (
    "import time\n\nwhile time.process_time() < 2.5:\n    pass"  # of the processor: it may be busy
)


# ----- scaling -----
def test_growth_exponents():
    assert measure.exponent([1, 10, 100], [3, 30, 300]) == pytest.approx(1)
    assert measure.exponent([1, 10, 100], [2, 200, 20_000]) == pytest.approx(2)
    assert math.isnan(measure.exponent([5], [1]))
    assert measure.exponent([1, 2, 4], [-1, 1, 2]) == pytest.approx(1)  # less than start-up: left


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


def test_a_limit_that_the_stage_beats_is_marked_and_fails_the_run():
    for seconds, mark in ((4.04, "(0.99x) |"), (3.9, "(1x) |"), (3.8, "(1.1x) **beaten** |")):
        assert mark in scaling.main_table({"": [result(seconds, 1)]})[-1]
    scaling.check_limits({"": [result(3.9, 1)]})  # within the noise
    loop = {**result(4.04, 1), "stage": {"seconds": 4.04, "loop": 3.8, "cpu": 4.0, "gb": 1.0}}
    for row in (result(3.8, 1), loop):  # what the limit is about is the loop
        with pytest.raises(utils.StageError, match="image_calibration at 20,000 pixels side"):
            scaling.check_limits({"": [result(9, 1), row]})


def test_a_run_with_a_beaten_limit_ends_with_an_error(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(scaling, "measure_case", lambda name, size, args: result(3.8, 1))
    command = ["--keep", str(tmp_path), "--stages", "image_calibration", "--sizes", "20000"]
    assert scaling.run([*command, "--output", str(tmp_path / "S.md")]) == 2
    assert "correct the limits in benchmarks/limits.py" in capsys.readouterr().err
    assert "**beaten**" in (tmp_path / "S.md").read_text(encoding="utf-8")


def test_the_plain_training_takes_all_steps_or_says_how_many(finished, monkeypatch):
    stage = {"epochs": 1, "states": 1}
    monkeypatch.setattr(limits, "BARE_SECONDS", math.inf)
    facts = limits.training_loop(finished, 0, stage)
    assert facts["seconds"] > 0
    assert "sample" not in facts
    monkeypatch.setattr(limits, "BARE_SECONDS", 1e-9)  # one step, whatever it takes
    spots = len((finished / "locs.csv").read_text().splitlines()) - 1
    held_out = -(-spots // 10)
    n_steps = math.ceil((spots - held_out) / 8)
    assert limits.training_loop(finished, 0, stage)["sample"] == f"1 of {n_steps} steps"


def test_attention_is_no_plain_product(tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "matmul_speed", lambda: 2e9)
    monkeypatch.setattr(limits, "write_speed", lambda folder: 1e9)
    counted = {"of_superpixel": 1e6, "states": 1, "products": 0.31, "attention": 0.35}
    facts = limits.prediction_products(tmp_path, 1_372, counted)
    assert facts["seconds"] == pytest.approx(1372**2 / 2000)
    assert "31% are in plain products and 35% in attention" in facts["speed"]
    row = {**result(5000, 3, size=1_372), "name": "HISTEX-predict", "limit": facts}
    assert "plain products (5 states): 0.31, **missed**" in scaling.verdict(row)
    names = ("aten::mm", "aten::addmm", "aten::bmm", "aten::_scaled_dot_product_attention_math")
    assert [bool(limits.PRODUCTS.search(name)) for name in names] == [True, True, True, False]
    assert [bool(limits.ATTENTION.search(name)) for name in names] == [False, False, False, True]


def test_the_bare_network_has_the_memory_settings_of_the_script(monkeypatch):
    import Histology_Extractor as extractor

    kept = []
    monkeypatch.setattr(extractor, "keep_freed_memory", lambda: kept.append(len(kept)))
    monkeypatch.setattr(limits, "BARE_SECONDS", 1e-9)
    stage = {"grid": (2, 2), "tiles": 1, "batch": 1, "turns": 1}
    assert limits.network_alone(Path(), 28, stage)["seconds"] > 0
    limits.tile_by_tile(Path(), 28, stage)
    assert kept == [0, 1]


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
    for room in ("method", "reading", "writing"):
        shutil.copytree(ROOT / room, other / room)
    # one that takes two seconds longer
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
    assert found["before"]["cpu"] > found["stage"]["cpu"] + 1
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


def test_every_table_says_by_which_code_where_and_how_it_was_made():
    pages = {path.name: path for path in (ROOT / "benchmarks").glob("*.md")}
    del pages["ABLATIONS.md"]  # a history of trials, each with what it was made by
    for name, page in pages.items():
        text = page.read_text(encoding="utf-8")
        for what in ("commit", "machine"):
            assert f"\n* {what}" in text, f"{name} does not tell the {what}"
        assert re.search(r"`?(python|bash) (benchmarks|analysis)/\w+|snakemake --profile", text), (
            name
        )
        assert re.search(r"\b[0-9a-f]{7}\b", text), f"{name} names no commit"


# ----- before and after -----
def test_two_checkouts_run_in_turn_on_copies_of_each_section(tmp_path, monkeypatch):
    sides, ran = {"small": 448, "large": 896}, []
    for name in sides:
        (tmp_path / name).mkdir()
        (tmp_path / name / "cnts.csv").write_text("")

    def run_measured(command, log):
        script, folder = Path(command[1]), Path(command[3])
        is_now = script.parent == ROOT
        ran.append((script.name, folder.name, command[4:]))
        assert (folder / "cnts.csv").is_file()
        side = sides[folder.parent.name.split("-")[0]]
        record = {"size": [side, side], "spots": side, "genes": 3, "seconds_training": side / 7}
        record["seconds_prediction"] = side**2 / 10**4
        (folder / f"{script.stem}.json").write_text(json.dumps(record))
        taken = side**2 / 10**4 / (4 if is_now else 1)  # in proportion to the pixels
        return {"seconds": taken + len(ran), "cpu": taken, "gb": 1 + is_now / 2, "killed": False}

    monkeypatch.setattr(measure, "run_measured", run_measured)
    folders, output = [str(tmp_path / name) for name in sides], tmp_path / "B.md"
    command = ["--before", str(tmp_path), "--directory", *folders, "--histex", "--epochs 3"]
    command += ["--before-histex", "--epochs 9", "--repeat", "2", "--output", str(output)]
    assert before_after.run([*command, "--folder", str(tmp_path)]) == 0
    assert [name for _, name, _ in ran[:4]] == ["before", "now"] * 2
    assert [name for _, name, _ in ran[10:14]] == ["now", "before"] * 2  # the second repetition
    assert ran[8:10] == [("HISTEX.py", "before", ["--epochs", "9"]),
                         ("HISTEX.py", "now", ["--epochs", "3"])]  # fmt: skip
    text = output.read_text()
    assert "| small | get_HR.py | " in text
    assert " | 20.07 | 5.02 (0.25x) | 1.00 | 1.50 (1.50x) |" in text
    assert "| large | HISTEX.py training | 128.00 | 128.00 (1.00x) |  |  |  |  |" in text
    (masking,) = (line for line in text.splitlines() if line.startswith("| masking_non_tissue"))
    assert masking.split(" | ")[4:6] == ["1.00", "1.00"]
    assert "| HISTEX.py training | spots | 1.00 | 1.00 |" in text
    assert f"{tmp_path.name}" in text
    assert not (tmp_path / "small" / "HISTEX.json").exists()


# ----- calibration -----
def test_calibration_is_measured_beside_libvips_and_opencv(capsys):
    assert calibration.run(["--sides", "600", "--formats", "tif"]) == 0
    head, _, row = capsys.readouterr().out.splitlines()[2:5]
    assert [cell.split(":")[0] for cell in head.split(" | ")[1::3]] == ["now", "libvips", "OpenCV"]
    assert row.startswith("| 600 px tif | ")
    figures = [float(cell) for cell in row.strip("| ").split(" | ")[1:]]
    assert len(figures) == 9
    assert min(figures) > 0


@pytest.mark.parametrize("name", calibration.PLAIN)
def test_a_plain_way_calibrates(name, tmp_path, monkeypatch):
    calibration.write_sample(tmp_path / "s", "png", 300)
    words = [str(tmp_path / "s" / "he-raw.png"), "0.5", str(tmp_path / "he.jpg")]
    monkeypatch.setattr(sys, "argv", [name, *words])
    exec(calibration.PLAIN[name])  # as the process does whose time is taken
    assert np.asarray(Image.open(tmp_path / "he.jpg")).shape == (150, 150, 3)


# ----- faults -----
COMPILER = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("cc") is None, reason="needs Linux and a C compiler"
)


def harness(name: str, *options: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "benchmarks" / f"{name}.py"), *options]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def row_of(table: str, name: str) -> dict[str, int]:
    """Numbers of the first row of that name, by the heads of its table."""
    lines = [line.strip("| ").split(" | ") for line in table.splitlines()]
    at = next(i for i, cells in enumerate(lines) if cells[0] == name)
    heads = next(cells for cells in reversed(lines[:at]) if cells[0] == "script")
    return dict(zip(heads[1:], map(int, lines[at][1:]), strict=True))


@COMPILER
def test_faults_and_signals_are_survived(tmp_path):
    """Of the lattice stage, at a sample of its events."""
    options = ("--only", "get_HR", "--faults", "12", "--kills", "9", "--keep", str(tmp_path / "k"))
    done = harness("faults", *options, "--output", str(tmp_path / "F.md"))
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "F.md").read_text(encoding="utf-8")
    faults = row_of(text[text.index("## Faults") :], "get_HR.py")
    assert faults["all"] == faults["sound"] == 12
    signals = row_of(text[text.index("## Signals") :], "get_HR.py")
    assert signals["all"] == signals["ended"] == signals["sound"] == 9


@COMPILER
def test_a_planted_error_is_counted_as_a_traceback(tmp_path):
    options = ("--planted", "--only", "get_HR", "--faults", "2", "--kills", "0")
    done = harness("faults", *options, "--output", str(tmp_path / "F.md"))
    assert done.returncode == 1
    assert "RuntimeError: planted" in done.stderr
    text = (tmp_path / "F.md").read_text(encoding="utf-8")
    faults = row_of(text[text.index("## Faults") :], "get_HR.py")
    assert faults == {"all": 2, "sound": 0, "traceback": 2}


def test_records_are_compared_without_their_times(tmp_path):
    files = {"b": f"7 1700000000 {64 * 'f'}"}
    inputs = {"/x/a": {"mtime_ns": 5, "sha256": "x", "files": files}}
    text = trials.of_record({"seconds": 3.1, "spots": 4, "inputs": inputs}, Path("/x"))
    left = {"{}/a": {"sha256": "x", "files": {"b": f"7 {64 * 'f'}"}}}
    assert json.loads(text) == {"spots": 4, "inputs": left}


def test_differences_and_leftovers_are_found(finished, tmp_path):
    trial = tmp_path / "trial"
    shutil.copytree(finished, trial / trials.SECTION)
    wanted = trials.contents(trial)
    assert {"section/he.jpg", "section/cnts-super/GENE0.pickle"} <= wanted.keys()
    section = trial / trials.SECTION
    (section / ".he.0123.partial.jpg").write_bytes(b"half")
    assert trials.differences(trials.contents(trial), wanted) == []
    assert trials.leftovers(trial) == [".he.0123.partial.jpg"]
    (section / "cnts-super" / "GENE0.pickle").write_bytes(b"other")
    (section / "mask.png").unlink()
    found = trials.differences(trials.contents(trial), wanted)
    assert found == ["section/cnts-super/GENE0.pickle", "section/mask.png"]


def test_every_kind_of_event_has_its_turn():
    events = ["read"] * 9 + ["rename", "open", "open"]
    numbers = faults.choose(events, 5, random.Random(0), ())
    assert {events[number - 1] for number in numbers[:3]} == {"read", "rename", "open"}
    assert len(set(numbers)) == 5
    assert 10 not in faults.choose(events, 12, random.Random(0), ("rename",))


# ----- fuzz -----
@pytest.mark.parametrize("suffix", mutations.STRUCTURED)
def test_variants_differ_and_come_again(suffix, finished):
    sound = {".npy": finished / "HRcnts.npy", ".json": finished / "get_HR.json"}
    content = sound.get(suffix, finished / "cnts.csv").read_bytes()
    first, again = (mutations.mutate(content, suffix, random.Random(3)) for _ in range(2))
    assert first == again
    assert len({mutations.mutate(content, suffix, random.Random(i)) for i in range(20)}) > 10


def test_a_pickle_that_would_run_code_is_among_the_variants(tmp_path):
    variants = (mutations.of_pickle(b"", random.Random(i)) for i in range(40))
    assert any(b"touch" in variant for variant in variants)
    assert not mutations.CANARY.exists()


def test_what_a_reader_raises_is_told_apart(tmp_path):
    (tmp_path / "x.txt").write_text("5", encoding="utf-8")

    def outcome(read):
        reader = fuzz.Reader("x.txt", read, lambda found: found == 5)
        return fuzz.attempt(reader, tmp_path)

    def refuse(stage, path):
        raise utils.StageError("x", "y")

    assert outcome(lambda s, p: int(p.read_text())) == "accepted"
    assert outcome(lambda s, p: 6) == "breaks its promise"
    assert outcome(refuse) == "refused"
    assert outcome(lambda s, p: p.read_text()[7]).startswith("IndexError")


def test_a_reader_survives_some_variants(sample):
    (reader,) = (reader for reader in fuzz.READERS if reader.name == "cnts.csv")
    shutil.copyfile(sample / "locs-raw.csv", sample / "locs.csv")
    sound, draw = (sample / "cnts.csv").read_bytes(), random.Random(0)
    outcomes = set()
    for _ in range(100):
        (sample / "cnts.csv").write_bytes(mutations.mutate(sound, ".csv", draw))
        outcomes.add(fuzz.attempt(reader._replace(sound=bool), sample))
    assert outcomes == fuzz.SOUND


def test_a_script_survives_some_variants():
    options = ("--executions", "0", "--runs", "6", "--only", "get_HR", "--seed", "0")
    done = harness("fuzz", *options)
    assert done.returncode == 0, done.stderr
    row = row_of(done.stdout, "get_HR.py")
    assert row["executions"] == row["refused"] + row["accepted"] == 6


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


# ----- mutants -----
SOURCE = """LIMIT = 5
PIECE = 7


def capped(values, more=True):
    if more and len(values) > LIMIT:
        raise ValueError(
            f"more than {LIMIT + 1}"
        )
    return [a for a, b in zip(values, values, strict=True)]
"""


def test_what_is_changed_and_the_lines_that_run_it(tmp_path, monkeypatch):
    (tmp_path / "a.py").write_text(SOURCE)
    monkeypatch.setattr(mutants, "ROOT", tmp_path)
    found = {mutant.change: mutant for mutant in mutants.mutants_of("a.py")}
    assert {change: {*mutant.reached_by} for change, mutant in found.items()} == {
        "5 -> (10)": {6, 8},  # where LIMIT is read
        "5 -> (6)": {6, 8},
        "True -> (False)": {6, 10},  # a default runs with the body
        "more and len(values) > LIMIT -> (more or len(values) > LIMIT)": {6},
        "len(values) > LIMIT -> (len(values) >= LIMIT)": {6},
        "len(values) > LIMIT -> (len(values) <= LIMIT)": {6},
        'raise ValueError( f"more than {LIMIT + 1}" -> pass': {7},
        "LIMIT + 1 -> (LIMIT - 1)": {7, 8},
        "1 -> (2)": {7, 8},
        "return [a for a, b in zip(values, values, strict=True)] -> return None": {10},
    }
    changed = found["len(values) > LIMIT -> (len(values) >= LIMIT)"].text
    assert changed == SOURCE.replace("len(values) > LIMIT", "(len(values) >= LIMIT)")
    assert found["1 -> (2)"].line == 8


def test_the_shortest_tests_that_run_a_change_come_first():
    def learnt(seconds: dict[str, float], lines: dict[str, list[str]]) -> mutants.Learnt:
        return mutants.Learnt("", {"a.py": lines}, seconds)

    some = learnt({"t1": 3.0, "t2": 1.0, "t3": 9.0}, {"6": ["t1", "t2"], "9": ["t3"], "1": [""]})
    other = learnt({"u": 2.0}, {"6": ["u", "v"]})  # of v, no time is known
    mutant = mutants.Mutant("a.py", 7, (7, 6), "", "")
    assert [*mutants.tests_of(mutant, [some, other], 9)] == ["t2", "u", "t1"]
    assert [*mutants.tests_of(mutant, [some, other], 3)] == ["t2", "u"]
    everywhere = mutants.Mutant("a.py", 1, (1,), "", "")
    assert [*mutants.tests_of(everywhere, [some, other], 99)] == ["t2", "t1", "t3"]
