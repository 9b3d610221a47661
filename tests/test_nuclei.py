"""analysis/cells.py without masks: nuclei drawn by hand are found; outlines are those of labels."""

import json

import numpy as np
import pandas as pd
import pytest
from conftest import make_stage
from PIL import Image
from test_cells import GENES, GRID, SIZE, _section, run_cells, section, values  # noqa: F401

from analysis import cells, nuclei, tracing
from analysis import outlines as outline_files
from reading import images

PINK, PURPLE = (226, 150, 190), (92, 62, 140)
RADIUS = 6  # px, 28 um2


def nuclei_at(places, shape=SIZE):
    """H&E uint8 (rows, columns, 3) with a disc at each place (row, column)."""
    rng = np.random.default_rng(0)
    image = np.full((*shape, 3), PINK, float) + rng.normal(0, 4, (*shape, 3))
    row, col = np.mgrid[: shape[0], : shape[1]]
    for r, c in places:
        image[np.hypot(row - r, col - c) <= RADIUS] = PURPLE
    return image.clip(0, 255).astype(np.uint8)


def lattice():
    """Places that lie apart, off the borders; of every fifth, a second one touches it."""
    alone = [(r, c) for r in range(20, 210, 32) for c in range(60, 430, 29)]
    return alone + [(r, c + 11) for r, c in alone[::5]]


def find(image, tissue, directory):
    Image.fromarray(image).save(directory / "he.png")
    with images.ImageRows(make_stage(directory), directory / "he.png") as rows:
        threshold = nuclei.choose_threshold(rows, tissue)
        return np.concatenate([*nuclei.find(rows, tissue, threshold)])


def test_nuclei_that_were_drawn_are_found_one_by_one(tmp_path):
    places = np.array(lattice())
    labels = find(nuclei_at(places), np.ones(GRID, bool), tmp_path)
    assert labels.shape == SIZE
    numbers, size = np.unique(labels[labels > 0], return_counts=True)
    assert len(numbers) == len(places)
    centres = np.array([np.argwhere(labels == n).mean(0) for n in numbers])
    apart = np.hypot(*(centres[:, None] - places).T)
    assert apart.min(0).max() < 1.5  # each nucleus is hit by one place, and each place by one
    assert apart.min(1).max() < 1.5
    assert np.median(size) == pytest.approx(np.pi * RADIUS**2, rel=0.15)


def test_blocks_find_what_the_whole_image_shows(tmp_path, monkeypatch):
    image, tissue = nuclei_at(lattice()), np.ones(GRID, bool)
    tissue[:, 25:] = False
    monkeypatch.setattr(nuclei, "choose_threshold", lambda *_: 0.036)
    whole = find(image, tissue, tmp_path)
    monkeypatch.setattr(nuclei, "BLOCK", 64)
    parts = find(image, tissue, tmp_path)
    np.testing.assert_array_equal(parts > 0, whole > 0)
    pairs = np.unique(np.column_stack([parts[parts > 0], whole[parts > 0]]), axis=0)
    assert len(pairs) == whole.max() == parts.max()  # the same nuclei, numbered in another order
    assert not whole[:, 25 * 16 :].any()


def test_one_colour_has_no_nuclei(tmp_path):
    image = np.full((*SIZE, 3), 255, np.uint8)
    assert find(image, np.ones(GRID, bool), tmp_path).max() == 0


# ----- outlines of labels -----
def traced(labels, band):
    tracer = tracing.Tracer()
    bands = (labels[top : top + band] for top in range(0, len(labels), band))
    seen = np.concatenate([*tracer.watch(bands)])
    np.testing.assert_array_equal(seen, labels)
    return tracer.rings


def test_outlines_enclose_the_pixels_of_their_label(monkeypatch):
    monkeypatch.setattr(tracing, "WINDOW", 16)
    labels = np.zeros((90, 60), np.int32)
    labels[2:50, 5:15] = 7  # across windows
    labels[20:30, 20:40] = 2**31 - 1
    labels[24:26, 25:35] = 0  # a hole
    labels[60:64, 50:58] = labels[80:84, 50:58] = 3  # two parts
    before = labels.copy()
    rings = traced(labels, 5)
    np.testing.assert_array_equal(labels, before)
    assert set(rings) == {3, 7, 2**31 - 1}
    for label, of_label in rings.items():
        area = (before == label).sum()
        assert outline_files.area_of(of_label) == pytest.approx(area, abs=1.5)
    points = rings[7][0][0]
    assert (points.min(0) == [5, 2]).all()
    assert (points.max(0) == [15, 50]).all()
    assert [len(polygon) for polygon in tracing.polygons_of(rings[2**31 - 1])] == [2]
    assert [len(polygon) for polygon in tracing.polygons_of(rings[3])] == [1, 1]


# ----- the script -----
def test_without_masks_the_cells_are_nuclei_of_the_he(section, capsys):  # noqa: F811
    places = lattice()
    Image.fromarray(nuclei_at(places)).save(section / "he.jpg", quality=95)
    held_out = pd.DataFrame({"gene": GENES, "held_out_r": [0.1, 0.9, np.nan]})
    held_out.to_csv(section / "held-out-r.csv", index=False)
    assert cells.run(["--directory", str(section), "--geojson-genes", "1", "--allow-stale"]) == 0
    shown = capsys.readouterr().out
    assert "the cells are nuclei found in the H&E by a simple method" in shown
    table = pd.read_csv(section / "cells.csv.gz", keep_default_na=False)
    on_tissue = [c for _, c in places if c > 3 * 16 + RADIUS]
    assert len(table) == len(on_tissue)
    assert set(table["class"]) == {"nucleus found in the H&E"}
    record = json.loads((section / "cells.json").read_text())
    assert record["cells are"].startswith("nuclei found in the H&E")
    content = json.loads((section / "cells-counts.geojson").read_text())
    assert content["type"] == "FeatureCollection"
    for one, row in zip(content["features"], table.to_dict("records"), strict=True):
        told = one["properties"]
        assert told["classification"]["name"] == "nucleus found in the H&E"
        assert set(told["measurements"]) == {"area_um2", "share_on_tissue", "B,1"}
        assert told["measurements"]["B,1"] == pytest.approx(float(row["B,1"]), rel=1e-3)
        xy = np.array(one["geometry"]["coordinates"][0])  # pixels of he-raw
        assert xy[0].tolist() == xy[-1].tolist()
        assert xy.mean(0) == pytest.approx([row["x"], row["y"]], abs=1.5)
    for option in (["--nuclei"], ["--frame", "he"]):
        assert cells.run(["--directory", str(section), *option]) == 2
        assert "about --masks" in capsys.readouterr().err


def test_the_geojson_read_again_gives_the_same_counts(section, tmp_path):  # noqa: F811
    labels = np.zeros(SIZE, np.int32)
    for i in range(12):
        labels[20 + 10 * i : 60 + 10 * i, 80 + 25 * i : 104 + 25 * i] = i + 1
    np.save(tmp_path / "cells.npy", labels)
    _, first = run_cells(section, tmp_path / "cells.npy")
    (section / "cells-counts.geojson").rename(tmp_path / "again.geojson")
    _, second = run_cells(section, tmp_path / "again.geojson", "--geojson-genes", "0")
    assert list(second.index) == list(first.index)
    np.testing.assert_allclose(values(second), values(first), rtol=0.01)
    assert not (section / "cells-counts.geojson").exists()
