"""analysis/ on sections with little in them, or with huge counts: results or a message, no noise.

A warning is an error here, as in all tests: no script may divide by nothing.
"""

import json
import math

import numpy as np
import pandas as pd
import pytest
from conftest import write_record
from test_evaluate import write_maps
from test_regions import GENES, NAMES, RADIUS, RATES, add_to_record, true_labels, write_section

import utils
from analysis import annotate, cells, enrich, evaluate, export, patterns, report, segment
from analysis.spots import disc_weights

LABELS = true_labels()
ONE, ROW = np.zeros_like(LABELS), np.zeros_like(LABELS)
ONE[20, 30] = 1
ROW[20, 5:30] = 1


def gene_of(j, counts=0.0, maps=0.0):
    """The gene j is the same everywhere, in the counts and in its map."""

    def edit(m, c):
        m[..., j], c[:, j] = maps, counts

    return edit


def only_the_first(m, c):
    c[:, 1:] = 0


def all_maps_zero(m, c):
    m[:] = 0


def huge(m, c):
    m *= 1e6
    c *= 1e6


def one_more(m, c):
    c += 1


SECTIONS = {
    "a gene of zeros": {"edit": gene_of(0)},
    "a constant gene": {"edit": gene_of(1, 50, 3)},
    "all maps zero": {"edit": all_maps_zero},
    "counts of one gene": {"edit": only_the_first},
    "counts of 1e7": {"edit": huge},
    "one superpixel": {"labels": ONE, "edit": one_more},
    "a row of superpixels": {"labels": ROW, "edit": one_more},
    "one gene": {"genes": GENES[:1]},
    "four spots": {"spots": 4, "edit": one_more},
    "three spots": {"spots": 3, "edit": one_more},
    "one spot": {"spots": 1, "edit": one_more},
}


def make_section(directory, labels=LABELS, edit=None, genes=GENES, spots=None):
    from test_regions import lattice

    rng, n = np.random.default_rng(0), len(genes)
    maps = (np.vstack([np.zeros(len(GENES)), RATES])[labels] / (np.pi * RADIUS**2))[..., :n]
    discs = disc_weights(lattice(labels.shape), RADIUS, labels.shape)
    counts = rng.poisson(discs @ maps.reshape(-1, n)).astype(float)
    if edit:
        edit(maps, counts)
    write_section(directory, labels, rng, maps=maps, counts=counts, genes=genes)
    write_maps(
        directory, np.where((labels > 0)[..., None], maps / 10, np.nan), genes, "cnts-super-sd"
    )
    np.savez(
        directory / "truth.npz", regions=labels.astype(np.uint8), region_names=NAMES, genes=genes,
        counts=rng.poisson(maps).astype(np.uint32), tissue=labels > 0, mean=maps,
    )  # fmt: skip
    if spots:
        for name in ("locs.csv", "cnts.csv"):
            table = pd.read_csv(directory / name, index_col=0, dtype={0: str}).sort_index()
            table.iloc[:: len(table) // spots].iloc[:spots].to_csv(directory / name)
        kept = pd.read_csv(directory / "locs.csv", dtype=str).iloc[:, 0].tolist()
        outputs = ["cnts-super", "embeddings-gene.pickle", "held-out-r.csv"]
        write_record(directory, utils.HISTEX, ["cnts.csv"], outputs)
        add_to_record(directory, held_out_spots=kept[::2])
        write_record(directory, utils.CALIBRATION, [], ["he.jpg", "locs.csv", "radius.txt"])
    record = json.loads((directory / "image_calibration.json").read_text())
    size = [16 * side for side in labels.shape]
    sizes = dict.fromkeys(("raw_size", "scaled_size", "size"), size)
    (directory / "image_calibration.json").write_text(json.dumps(record | sizes))
    (directory / "states" / "00").mkdir(parents=True)
    (directory / "states" / "00" / "history.csv").write_text("epoch,train_loss\n1,0\n")
    labels_of = ["disc" if i % 2 else "left" for i in range(max(1, n - 2))]
    table = pd.DataFrame({"gene": genes[: len(labels_of)], "label": labels_of})
    table.to_csv(directory / "markers.csv", index=False)
    (directory / "sets.gmt").write_text("S1\tx\t" + "\t".join(genes[:4]) + "\n")
    masks = np.zeros(size, np.uint16)
    masks[320:360, 480:520], masks[:9, :9] = 3, 9
    np.save(directory / "cells.npy", masks)
    return directory


def runs(directory):
    return [
        (segment, ["--n-regions", "1", "--no-plot"]),
        (segment, ["--n-regions", "1", "--method", "hierarchical", "--truth", "--force"]),
        (patterns, ["--permutations", "9", "--no-plot"]),
        (annotate, ["--markers", str(directory / "markers.csv"), "--truth", "--no-plot"]),
        (enrich, ["--gene-sets", str(directory / "sets.gmt"), "--min-size", "1", "--no-plot"]),
        (report, []),
        (evaluate, []),
        (cells, ["--masks", str(directory / "cells.npy"), "--share", "cells"]),
        *((export, ["--format", kind]) for kind in ("h5ad", "spots")),
    ]


@pytest.mark.parametrize("case", SECTIONS)
def test_every_script_on_a_section_with_little_in_it(tmp_path, case, capsys):
    directory = make_section(tmp_path / "section S", **SECTIONS[case])
    codes = []
    for module, options in runs(directory):
        codes.append(module.run(["--directory", str(directory), *options]))
        error = capsys.readouterr().err
        assert codes[-1] in (0, 2)
        assert (codes[-1] == 2) == ("error: " in error)
        if "locs.csv" in error:  # no other script would find more spots
            assert "image_calibration.py" not in error
    assert codes.count(0) >= 5
    for path in directory.glob("*.json"):

        def refuse(text, path=path):
            raise AssertionError(f"{path.name} holds {text}")

        json.loads(path.read_text(), parse_constant=refuse)
    for name in ("evaluation.csv", "patterns.csv", "segment-markers.csv"):
        if (directory / name).is_file():
            table = pd.read_csv(directory / name, index_col=0)
            assert not np.isinf(table.select_dtypes("number")).any(axis=None), name


def test_huge_counts_come_through(tmp_path):
    directory = make_section(tmp_path / "section S", edit=huge)
    argv = ["--directory", str(directory), "--format", "spots"]
    assert export.run(argv) == 0
    found = pd.read_csv(directory / "histex-spots.csv", index_col=0, keep_default_na=False)
    measured = pd.read_csv(directory / "cnts.csv", index_col=0, keep_default_na=False)
    ratio = found.to_numpy(float).sum() / measured.to_numpy(float).sum()
    assert math.isclose(ratio, 1, abs_tol=0.2)
    assert found.to_numpy(float).max() > 1e6
