"""The rules themselves, run by Snakemake; a stand-in for Python writes down what would be run.

For an environment that has Snakemake: pip install -r workflow/requirements.txt
"""

import json
import multiprocessing
import os
import sys
from pathlib import Path

import pytest
from conftest import ROOT

cli = pytest.importorskip("snakemake.cli")

STAND_IN = """#!/bin/bash
case " $* " in *" --help "*) exit 0;; esac
script="$(basename "$1")"
echo "$script" >> ran.txt
if [[ "$*" == *"$BROKEN"* ]]; then echo "error: $script is broken"; exit 2; fi
"""


def call(words: list[str], output: Path) -> None:
    """Snakemake in a process that finds its modules imported, which takes most of a short run."""
    sys.argv[:] = ["snakemake", *words]
    with output.open("w", buffering=1) as file:
        for number in (1, 2):  # of what it starts, too
            os.dup2(file.fileno(), number)
        sys.stdout = sys.stderr = file
        cli.main(words)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run the rules on two samples in this folder; what was run, by script and in any order."""
    stand_in = tmp_path / "python"
    stand_in.write_text(STAND_IN)
    stand_in.chmod(0o755)
    rows = ["sample\tplatform\tpaths\tteaches\treference"]
    for name, about in (("a", "\tkidney\t"), ("b", "\t\tkidney")):
        (tmp_path / name).mkdir()
        for file in ("locs-raw.csv", "truth.npz"):
            (tmp_path / name / file).write_text("")
        rows.append(f"{name}\tsample\t{name}{about}")
    (tmp_path / "samples.tsv").write_text("\n".join(rows) + "\n")

    monkeypatch.chdir(tmp_path)

    def run(*options: str, broken: str = "nothing") -> tuple[list[str], str, int]:
        log, output = tmp_path / "ran.txt", tmp_path / "said.txt"
        log.unlink(missing_ok=True)
        words = [
            "--snakefile", str(ROOT / "workflow" / "Snakefile"), "--cores", "2",
            "--config", f"python={stand_in}", *options,
        ]  # fmt: skip
        monkeypatch.setenv("BROKEN", broken)
        engine = multiprocessing.get_context("fork").Process(target=call, args=(words, output))
        engine.start()
        engine.join()
        ran = sorted(log.read_text().split()) if log.exists() else []
        return ran, output.read_text(), engine.exitcode

    return run


def test_every_step_runs_once_and_an_edit_brings_what_comes_after_it(run, tmp_path):
    ran, said, code = run()
    stages = [
        "HISTEX.py", "Histology_Extractor.py", "export.py", "get_HR.py", "image_calibration.py",
        "masking_non_tissue.py", "report.py",
    ]  # fmt: skip
    assert code == 0, said
    assert ran == sorted([*stages, *stages, "cohort.py", "learn.py"])
    assert "Nothing to be done" in run()[1]

    mask = tmp_path / "b" / "mask.png"
    mask.write_text("painted by hand")
    for script, read in (("masking_non_tissue", "he.jpg"), ("HISTEX", "mask.png")):
        record = {"inputs": {read: {}}, "outputs": {"mask.png": {}}}
        (tmp_path / "b" / f"{script}.json").write_text(json.dumps(record))
    after = ["HISTEX.py", "cohort.py", "export.py", "masking_non_tissue.py", "report.py"]
    assert run()[0] == after
    assert "Nothing to be done" in run()[1]
    ran = run("-R", "mask", "--", "results/.markers/b/maps")[0]  # b waits for what a teaches
    masking = "masking_non_tissue.py"
    assert ran == ["HISTEX.py", "cohort.py", "learn.py", masking, masking]
    assert mask.read_text() == "painted by hand"


def test_a_sample_that_fails_does_not_stop_the_other_and_its_steps_are_due(run):
    ran, said, code = run(broken="get_HR.py --directory a ")
    assert code == 1
    assert "error: get_HR.py is broken" in said
    assert ran.count("get_HR.py") == 2
    assert ran.count("HISTEX.py") == ran.count("report.py") == 1
    assert "cohort.py" in ran
    again, _, code = run()
    assert code == 0
    assert again == ["HISTEX.py", "cohort.py", "export.py", "get_HR.py", "report.py"]


def test_what_is_wrong_with_the_table_is_said_before_any_work(run, tmp_path):
    with (tmp_path / "samples.tsv").open("a") as file:
        file.write("c\tvisum\tb\n")
    ran, said, code = run()
    assert (ran, code) == ([], 1)
    assert "samples.tsv, row 4, column platform: found 'visum', expected one of visium" in said


@pytest.mark.parametrize("profile", ["local", "slurm", "kubernetes"])
def test_a_profile_is_taken(run, profile):
    if profile != "local":
        pytest.importorskip(f"snakemake_executor_plugin_{profile}")
    folder = ROOT / "workflow" / "profiles" / profile
    _, said, code = run("gpus=1", "--profile", str(folder), "--dry-run")
    assert code == 0, said
    assert said.count("gpu=1") == 5  # extraction and maps of two samples, and the reference
