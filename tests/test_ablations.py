"""benchmarks/ablations.py: each row is another preset, and gives other maps."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest

import HISTEX
import utils
from analysis import inputs
from benchmarks import ablations
from method import states


def test_every_row_differs_from_every_other_one():
    rows = [json.dumps(states.described(row)) for row in ablations.ROWS.values()]
    assert len(set(rows)) == len(rows)
    assert ablations.ROWS["default"] is HISTEX.PRESETS["default"]


@pytest.fixture(scope="module")
def scored(finished_sample, tmp_path_factory):
    """A function that gives the result of a variant on a small sample with a made-up truth."""
    sample = tmp_path_factory.mktemp("ablations") / "sample"
    shutil.copytree(finished_sample, sample)
    genes = (sample / utils.GENE_NAMES.name).read_text(encoding="utf-8").split()
    h, w = np.load(sample / utils.FEATURES.name, mmap_mode="r").shape[:2]
    rng = np.random.default_rng(0)
    counts = rng.poisson(1, (h, w, len(genes))).astype(np.float32)
    truth = inputs.Truth(counts=counts, tissue=np.ones((h, w), bool), genes=genes)

    def score(variant: str) -> dict:
        row = replace(ablations.ROWS[variant], patience=1)
        return ablations.run_variant(sample, truth, row, n_states=1, seed=0)

    return score


def test_a_variant_is_scored_and_the_same_again(scored):
    first, again = scored("default"), scored("default")
    assert {key: value for key, value in first.items() if key != "seconds"} == {
        key: value for key, value in again.items() if key != "seconds"
    }
    assert abs(first["r 1x"]) < 0.3  # this truth has nothing to do with the section


def test_a_variant_gives_other_maps(scored):
    assert scored("Poisson loss")["r 4x"] != scored("no anchoring")["r 4x"]


@pytest.mark.parametrize(
    ("folders", "said"), [([], "no section to work on"), (["a/x", "b/x"], "of the same name")]
)
def test_sections_are_checked_before_anything_runs(tmp_path, capsys, folders, said):
    options = ["--directory", *(str(tmp_path / folder) for folder in folders)]
    assert ablations.run([*options, "--keep", str(tmp_path / "keep")]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "keep").exists()


def test_the_table():
    result = {"r 1x": 0.1, "r 4x": 0.25, "held-out r": 0.5, "seconds": 10}
    rows = {"default": {"a": result, "b": result | {"r 4x": 0.3}}}
    assert ablations.table(rows, ["a", "b"]).splitlines() == [
        "| variant | a | b | seconds |",
        "|---|---|---|---|",
        "| default | 0.100 / 0.250 (0.500) | 0.100 / 0.300 (0.500) | 20 |",
    ]


def test_an_unknown_row_is_named(tmp_path, capsys):
    options = ["--directory", "x", "--keep", str(tmp_path / "keep"), "--variants", "droput"]
    assert ablations.run(options) == 2
    assert "there is no row droput" in capsys.readouterr().err
