"""analysis/cells.py: areas against loops over pixels, conservation, frames, and bad inputs."""

import gzip
import json
import pickle
import shutil
import struct
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tifffile
from conftest import write_record
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image
from scipy.sparse import csr_array
from test_evaluate import write_maps
from test_regions import snapshot

import utils
from analysis import cells, mending, outlines
from analysis.cells import PixelFrame
from analysis.outlines import Outline
from method import errors
from writing import disk

RAW, SCALED, SIZE = (150, 300), (208, 416), (224, 448)  # he-raw, he.jpg without and with padding
GRID = (14, 28)
SCALE = (SCALED[0] / RAW[0], SCALED[1] / RAW[1])
GENES = ["A", "B,1", "NA"]
HERE = Path("cells.tif")


@pytest.fixture(scope="module")
def _section(tmp_path_factory):
    """A finished sample whose first three columns of superpixels are off the tissue."""
    directory = tmp_path_factory.mktemp("cells") / "section C"
    directory.mkdir()
    Image.new("RGB", SIZE[::-1]).save(directory / "he.jpg")
    maps = np.random.default_rng(0).gamma(0.5, 1, (*GRID, len(GENES)))
    maps[:, :3] = np.nan
    write_maps(directory, maps, GENES)
    write_record(directory, utils.CALIBRATION, [], ["he.jpg"])
    record = json.loads((directory / "image_calibration.json").read_text())
    record |= {"raw_size": RAW, "scaled_size": SCALED, "size": SIZE}
    (directory / "image_calibration.json").write_text(json.dumps(record))
    write_record(directory, utils.HISTEX, ["he.jpg"], ["cnts-super"])
    return directory


@pytest.fixture
def section(_section, tmp_path):
    return shutil.copytree(_section, tmp_path / "section C")


def read_maps(directory):
    files = cells.map_files(directory)
    return np.stack([cells.read_map(files[gene]) for gene in GENES], axis=2).astype(float)


def run_cells(directory, masks, *options):
    code = cells.run(["--directory", str(directory), "--masks", str(masks), *options])
    if code:
        return code, None
    table = pd.read_csv(directory / "cells.csv.gz", keep_default_na=False, na_values={})
    return code, table.set_index("cell")


def values(table):
    return table[GENES].apply(pd.to_numeric, errors="coerce").to_numpy()


def areas_by_pixel(labels, scale, grid):
    """Label -> (rows, columns), px of he.jpg: every pixel's overlap with every superpixel."""
    found = {}
    for row in range(labels.shape[0]):
        for col in range(labels.shape[1]):
            if labels[row, col] == 0:
                continue
            area = found.setdefault(int(labels[row, col]), np.zeros(grid))
            top, bottom = row * scale[0], (row + 1) * scale[0]
            left, right = col * scale[1], (col + 1) * scale[1]
            for i in range(int(top // 16), min(int(bottom // 16), grid[0] - 1) + 1):
                for j in range(int(left // 16), min(int(right // 16), grid[1] - 1) + 1):
                    high = max(0, min(bottom, 16 * i + 16) - max(top, 16 * i))
                    wide = max(0, min(right, 16 * j + 16) - max(left, 16 * j))
                    area[i, j] += high * wide
    return found


def cells_of(labels, scale, grid, band=cells.BAND_ROWS):
    parts = (labels[top : top + band] for top in range(0, len(labels), band))
    return cells.cells_of_labels(parts, PixelFrame("he-raw", labels.shape, scale), grid, HERE)


# ----- label images -----
@settings(max_examples=60, deadline=None)
@given(
    labels=arrays(np.uint16, st.tuples(st.integers(1, 40), st.integers(1, 40)),
                  elements=st.integers(0, 3)),
    scale=st.tuples(st.floats(0.3, 3), st.floats(0.3, 3)),
    band=st.integers(1, 50),
)  # fmt: skip
def test_areas_of_labels_are_those_of_their_pixels(labels, scale, band):
    grid = tuple(int(n * f // 16) + 1 for n, f in zip(labels.shape, scale, strict=True))
    expected = areas_by_pixel(labels, scale, grid)
    found = cells_of(labels, scale, grid, band)
    assert found.ids == sorted(expected)
    for i, label in enumerate(found.ids):
        area = found.inside[[i]].toarray().reshape(grid) * 256
        np.testing.assert_allclose(area, expected[label], atol=1e-6)
        assert found.area[i] == pytest.approx(expected[label].sum())
        rows, columns = np.nonzero(labels == label)
        middle = np.mean(columns + 0.5) * scale[1], np.mean(rows + 0.5) * scale[0]
        assert found.centroids[i] == pytest.approx(middle)


def test_a_label_by_hand():
    labels = np.zeros((32, 48), np.uint8)
    labels[0:16, 8:24] = 7  # half of two superpixels
    labels[20:22, 40:44] = 200
    found = cells_of(labels, (1.0, 1.0), (2, 3))
    assert found.ids == [7, 200]
    assert found.inside.toarray().tolist() == [[0.5, 0.5, 0, 0, 0, 0], [0] * 5 + [8 / 256]]
    assert found.centroids.tolist() == [[16, 8], [42, 21]]
    assert found.area.tolist() == [256, 8]


def test_large_labels_do_not_cost_memory():
    labels = np.zeros((64, 64), np.int64)
    labels[10:20, 30:40] = cells.LARGEST_LABEL
    tracemalloc.start()
    found = cells_of(labels, (1.0, 1.0), (4, 4))
    assert tracemalloc.get_traced_memory()[1] < 5e6
    tracemalloc.stop()
    assert found.ids == [cells.LARGEST_LABEL]


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.uint32])
@pytest.mark.parametrize(
    "kind",
    ["strips", "deflate", "one strip", "tiles", "deflated tiles", "big endian", "npy", "fortran",
     "png"],
)  # fmt: skip
def test_all_kinds_of_label_image_read_the_same(tmp_path, kind, dtype):
    if kind == "png" and dtype in (np.int32, np.uint32):
        return  # PNG has 16 bits at most
    labels = np.random.default_rng(0).integers(0, 200, (150, 300)).astype(dtype)
    labels[:70, :70] = 0
    path = tmp_path / ("cells.npy" if kind in ("npy", "fortran") else "cells.tif")
    options = {
        "strips": {"rowsperstrip": 40},
        "deflate": {"rowsperstrip": 40, "compression": "zlib"},
        "one strip": {"rowsperstrip": 150, "compression": "zlib", "predictor": True},
        "tiles": {"tile": (64, 32)},
        "deflated tiles": {"tile": (32, 64), "compression": "zlib"},
        "big endian": {"byteorder": ">"},
    }
    if kind in options:
        tifffile.imwrite(path, labels, **options[kind])
    elif kind == "png":
        path = tmp_path / "cells.PNG"
        Image.fromarray(labels).save(path, "PNG")
    else:
        np.save(path, np.asfortranarray(labels) if kind == "fortran" else labels)
    shape, found, bands = cells.open_labels(path)
    bands = list(bands)
    assert shape == labels.shape
    assert found.kind in "ui"
    assert max(map(len, bands)) <= cells.BAND_ROWS
    assert (np.concatenate(bands) == labels).all()


@pytest.mark.parametrize("shape", [(0, 8), (2**32 - 1, 0)])
def test_labels_without_pixels_are_refused(tmp_path, shape):
    path = tmp_path / "cells.npy"
    with path.open("wb") as file:
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        file.write(b"0")
    with pytest.raises(utils.StageError, match=r"cells\.npy"):
        cells.open_labels(path)


def test_a_pyramid_is_read_at_full_size(tmp_path):
    labels = np.random.default_rng(0).integers(0, 9, (150, 300)).astype(np.uint16)
    with tifffile.TiffWriter(tmp_path / "cells.tif") as tiff:
        tiff.write(labels, tile=(64, 64), subifds=1)
        tiff.write(labels[::2, ::2], tile=(64, 64), subfiletype=1)
    _, _, bands = cells.open_labels(tmp_path / "cells.tif")
    assert (np.concatenate(list(bands)) == labels).all()


# ----- outlines -----
def feature(rings, kind="Polygon", **more):
    return {"type": "Feature", "geometry": {"type": kind, "coordinates": rings}, **more}


def box(left, top, right, bottom):
    return [[left, top], [right, top], [right, bottom], [left, bottom], [left, top]]


def write_geojson(path, features):
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    return path


def test_outlines_of_pixels_are_label_images(section, tmp_path):
    """Boxes, a hole, and a cell of two parts: the same numbers by either way, in both frames."""
    labels = np.zeros(RAW, np.uint16)
    labels[10:30, 20:45] = 1
    labels[15:20, 25:40] = 0
    labels[60:75, 100:130] = 2
    labels[80:95, 110:115] = 2
    labels[140:150, 280:300] = 3
    features = [
        feature([box(20, 10, 45, 30), box(25, 15, 40, 20)]),
        feature([[box(100, 60, 130, 75)], [box(110, 80, 115, 95)]], "MultiPolygon"),
        feature([box(280, 140, 300, 150)]),
    ]
    tifffile.imwrite(tmp_path / "cells.tif", labels)
    _, of_labels = run_cells(section, tmp_path / "cells.tif")
    _, of_outlines = run_cells(section, write_geojson(tmp_path / "cells.geojson", features))
    numbers = ["x", "y", "area_um2", "share_on_tissue"]
    np.testing.assert_allclose(of_labels[numbers].astype(float), of_outlines[numbers].astype(float))
    np.testing.assert_allclose(values(of_labels), values(of_outlines), rtol=1e-3)
    assert float(of_labels.loc[3, "area_um2"]) == pytest.approx(
        200 * SCALE[0] * SCALE[1] / 4, abs=0.01
    )

    scaled = [
        feature([[[x * SCALE[1], y * SCALE[0]] for x, y in ring] for ring in part])
        for part in (features[0]["geometry"]["coordinates"], features[2]["geometry"]["coordinates"])
    ]
    write_geojson(tmp_path / "he.json", scaled)
    _, in_he = run_cells(section, tmp_path / "he.json", "--frame", "he")
    np.testing.assert_allclose(values(in_he), values(of_outlines)[[0, 2]], rtol=1e-3)
    np.testing.assert_allclose(
        in_he[numbers].astype(float), of_outlines.iloc[[0, 2]][numbers].astype(float)
    )


def test_a_label_image_of_he_has_its_own_frame(section, tmp_path, capsys):
    labels = np.zeros(SIZE, np.int32)
    labels[32:48, 160:176] = 9
    np.save(tmp_path / "cells.npy", labels)
    code, table = run_cells(section, tmp_path / "cells.npy")
    assert code == 0
    assert "pixels of he\n" in capsys.readouterr().out
    assert float(table.loc[9, "x"]) == pytest.approx(168 / SCALE[1], abs=0.01)
    np.testing.assert_allclose(values(table)[0], read_maps(section)[2, 10], rtol=1e-3)
    assert run_cells(section, tmp_path / "cells.npy", "--frame", "he-raw")[0] == 2
    assert "expected 300 x 150 px (he-raw)" in capsys.readouterr().err


# ----- an image beside the spots -----
def test_moved_cells_by_hand():
    """One superpixel at (2, 3), moved by (0.25, -0.5): to rows 1 and 2, columns 3 and 4."""
    inside = csr_array(([0.8], ([0], [2 * 6 + 3])), (2, 30))
    moved = cells.moved_back(inside, (5, 6), np.array([0.25, -0.5])).toarray().reshape(2, 5, 6)
    assert moved[1].sum() == 0
    wanted = {(1, 3): 0.1, (1, 4): 0.1, (2, 3): 0.3, (2, 4): 0.3}
    assert {tuple(map(int, at)): moved[0][*at] for at in np.argwhere(moved[0])} == {
        at: pytest.approx(value) for at, value in wanted.items()
    }
    up = cells.moved_back(inside, (5, 6), np.array([2.0, 0.0]))
    assert up.nonzero()[1].tolist() == [3]
    assert cells.moved_back(inside, (5, 6), np.array([3.0, 0.0])).nnz == 0  # off the map


def tell_move(section, told):
    path = section / "HISTEX.json"
    record = json.loads(path.read_text()) | {"image_beside_spots": told}
    path.write_text(json.dumps(record))


def test_cells_follow_an_image_that_lies_beside_the_spots(section, tmp_path, capsys):
    labels = np.zeros(SIZE, np.int32)
    labels[32:48, 160:176] = 9
    np.save(tmp_path / "cells.npy", labels)
    told = {"down_um": 8.0, "right_um": -16.0, "undone": True}
    tell_move(section, told)
    code, table = run_cells(section, tmp_path / "cells.npy")
    assert code == 0
    assert "+8.0 um down and -16.0 um right of the spots" in capsys.readouterr().out
    np.testing.assert_allclose(values(table)[0], read_maps(section)[1, 12], rtol=1e-3)
    assert float(table.loc[9, "x"]) == pytest.approx(168 / SCALE[1], abs=0.01)
    assert json.loads((section / "cells.json").read_text())["moved back by um"] == [8, -16]
    for still, options in ((told, ["--by-molecules"]), (told | {"undone": False}, []), (None, [])):
        tell_move(section, still)
        _, table = run_cells(section, tmp_path / "cells.npy", *options)
        np.testing.assert_allclose(values(table)[0], read_maps(section)[2, 10], rtol=1e-3)


@pytest.mark.parametrize(
    "told", [3, [], {}, {"undone": True}, {"undone": True, "down_um": "a", "right_um": 0.0},
             {"undone": True, "down_um": float("nan"), "right_um": 0.0},
             {"undone": True, "down_um": 1e9, "right_um": 0.0}],
)  # fmt: skip
def test_a_move_that_cannot_be_is_named(section, tmp_path, told, capsys):
    np.save(tmp_path / "cells.npy", np.ones(SIZE, np.int32))
    tell_move(section, told)
    assert run_cells(section, tmp_path / "cells.npy")[0] == 2
    assert "does not tell how far the image was moved" in capsys.readouterr().err


def test_boundaries_of_xenium_lie_as_its_molecules(tmp_path):
    parse = cells.build_parser().parse_args
    for name, stay in (("b.parquet", True), ("b.csv.gz", True), ("b.geojson", False)):
        assert cells.lie_as_molecules(parse(["--directory", "x", "--masks", name])) is stay
    assert not cells.lie_as_molecules(parse(["--directory", "x"]))
    assert cells.lie_as_molecules(parse(["--directory", "x", "--by-molecules"]))


# ----- sums -----
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(1, 40))
def test_cells_that_cover_all_hold_all(seed, n):
    """By area, cells over the whole image have the map's sum; by cells, wherever there is one."""
    rng = np.random.default_rng(seed)
    seeds = rng.uniform(0, 1, (n, 2)) * RAW
    row, col = np.mgrid[: RAW[0], : RAW[1]]
    labels = 1 + ((row[..., None] - seeds[:, 0]) ** 2 + (col[..., None] - seeds[:, 1]) ** 2).argmin(
        -1
    )
    scale = SIZE[0] / RAW[0], SIZE[1] / RAW[1]
    image = rng.gamma(1, 1, GRID)
    found = cells_of(labels, scale, GRID)
    np.testing.assert_allclose(found.inside.sum(axis=0), 1, atol=1e-9)
    assert (found.inside @ image.ravel()).sum() == pytest.approx(image.sum())
    labels[rng.uniform(size=RAW) < 0.3] = 0
    holes = cells_of(labels, scale, GRID)
    shared = cells.share_out(holes.inside)
    some = holes.inside.sum(axis=0) > 0
    np.testing.assert_allclose(shared.sum(axis=0), some, atol=1e-9)
    assert (shared @ image.ravel()).sum() == pytest.approx(image.ravel()[some].sum())


def test_values_are_those_of_loops_over_pixels(section, tmp_path):
    labels = np.random.default_rng(3).integers(0, 30, (15, 30)).astype(np.uint8)
    labels = np.kron(labels, np.ones((10, 10), np.uint8))
    tifffile.imwrite(tmp_path / "cells.tif", labels)
    maps, areas = read_maps(section), areas_by_pixel(labels, SCALE, GRID)
    tissue = np.isfinite(maps[..., 0])
    _, table = run_cells(section, tmp_path / "cells.tif")
    assert table.index.tolist() == sorted(areas)
    for label, area in areas.items():
        expected = (np.nan_to_num(maps) * area[..., None] / 256).sum((0, 1))
        np.testing.assert_allclose(table.loc[label, GENES].astype(float), expected, rtol=1e-3)
        on_tissue = area[tissue].sum() / area.sum()
        assert float(table.loc[label, "share_on_tissue"]) == pytest.approx(on_tissue, abs=6e-4)
    _, table = run_cells(section, tmp_path / "cells.tif", "--share", "cells")
    whole = sum(areas.values())
    for label, area in areas.items():
        part = np.divide(area, whole, out=np.zeros(GRID), where=whole > 0)
        expected = (np.nan_to_num(maps) * part[..., None]).sum((0, 1))
        np.testing.assert_allclose(table.loc[label, GENES].astype(float), expected, rtol=1e-3)
    record = json.loads((section / "cells.json").read_text())
    assert record["share"] == "cells"
    assert record["cells"] == len(areas)
    covered = (whole > 0) & tissue
    assert record["counts within cells"] == pytest.approx(
        maps[covered].sum() / maps[tissue].sum(), abs=1e-4
    )
    assert record["inputs"][str(tmp_path / "cells.tif")]["sha256"] == disk.sha256(
        tmp_path / "cells.tif"
    )


def test_cells_off_the_tissue_have_no_counts(section, tmp_path, capsys):
    labels = np.zeros(SIZE, np.uint8)
    labels[16:32, 0:32] = 1  # off
    labels[16:32, 40:56] = 2  # half
    labels[16:32, 64:80] = 3  # on
    np.save(tmp_path / "cells.npy", labels)
    code, table = run_cells(section, tmp_path / "cells.npy")
    assert code == 0
    assert "1 of 3 cells are not on the tissue" in capsys.readouterr().out
    assert table.loc[1, GENES].tolist() == ["", "", ""]
    assert table["share_on_tissue"].astype(float).tolist() == [0, 0.5, 1]
    maps = read_maps(section)
    np.testing.assert_allclose(values(table)[1], maps[1, 3] / 2, rtol=1e-3)
    Image.fromarray(np.pad(np.full((14, 24), 255, np.uint8), ((0, 0), (4, 0)))).save(
        section / "mask.png"
    )
    _, table = run_cells(section, tmp_path / "cells.npy")
    assert table["share_on_tissue"].astype(float).tolist() == [0, 0, 1]


# ----- QuPath -----
def test_qupath_cells_nuclei_and_classes(section, tmp_path, capsys):
    body, nucleus = box(100, 60, 130, 90), box(110, 70, 120, 80)
    some = {"objectType": "cell", "classification": {"name": "Tumor", "color": [1, 2, 3]}}
    derived = {"objectType": "cell", "classification": {"names": ["Tumor", "Positive"]}}
    features = [
        feature([box(0, 0, 300, 150)], properties={"objectType": "annotation"}),
        feature([body], id="uuid-1", properties=some,
                nucleusGeometry={"type": "Polygon", "coordinates": [nucleus]}),
        feature([box(200, 60, 230, 90)], id="uuid,2", properties=derived),
        feature([box(250, 60, 260, 90)], properties={"objectType": "detection"}),
    ]  # fmt: skip
    path = write_geojson(tmp_path / "q.geojson", features)
    _, table = run_cells(section, path)
    assert "1 annotations and tiles are left out" in capsys.readouterr().out
    assert table.index.tolist() == ["uuid-1", "uuid,2", "3"]
    assert table["class"].tolist() == ["Tumor", "Tumor: Positive", ""]
    assert float(table.iloc[0]["area_um2"]) == pytest.approx(
        900 * SCALE[0] * SCALE[1] / 4, abs=0.01
    )
    _, table = run_cells(section, path, "--nuclei")
    assert "2 of 3 objects have no nucleus" in capsys.readouterr().out
    assert table.index.tolist() == ["uuid-1"]
    assert float(table.iloc[0]["area_um2"]) == pytest.approx(
        100 * SCALE[0] * SCALE[1] / 4, abs=0.01
    )
    assert float(table.iloc[0]["x"]) == pytest.approx(115)


def test_a_bare_list_and_other_shapes(section, tmp_path, capsys):
    line = {"type": "LineString", "coordinates": [[0, 0], [1, 1]]}
    features = [feature([box(100, 60, 130, 90)]), {"type": "Feature", "geometry": line},
                {"type": "Feature", "geometry": None, "properties": None}]  # fmt: skip
    (tmp_path / "q.json").write_text(json.dumps(features))
    code, table = run_cells(section, tmp_path / "q.json")
    assert (code, len(table)) == (0, 1)
    assert "2 of 3 objects are neither Polygon nor MultiPolygon" in capsys.readouterr().out


def test_many_outlines_are_those_of_few(monkeypatch):
    rng = np.random.default_rng(0)
    outlines = [
        Outline(str(i), "", [(rng.uniform(0, 40, 2) + rng.uniform(0, 9, (3, 2)), False)])
        for i in range(25)
    ]
    frame = PixelFrame("he", SIZE, (1.0, 1.0))
    whole = cells.cells_of_outlines(outlines, frame, GRID, HERE)
    monkeypatch.setattr(cells.grid, "MAX_SQUARES", 300)
    parts = cells.cells_of_outlines(outlines, frame, GRID, HERE)
    np.testing.assert_allclose(whole.inside.toarray(), parts.inside.toarray(), atol=1e-9)
    np.testing.assert_allclose(whole.centroids, parts.centroids)
    np.testing.assert_allclose(whole.inside.sum(axis=1) * 256, whole.area, atol=1e-6)


def test_what_lies_off_the_map_is_cut_off():
    outlines = [Outline("1", "", [(np.array(box(-32, -32, 32, 16), float), False)])]
    found = cells.cells_of_outlines(outlines, PixelFrame("he", SIZE, (1.0, 1.0)), GRID, HERE)
    assert found.area[0] == 64 * 48
    assert found.inside.toarray().reshape(GRID)[0, :2].tolist() == [1, 1]
    assert found.inside.sum() == 2


# ----- files and messages -----
def test_the_same_cells_give_the_same_bytes(section, tmp_path):
    labels = np.zeros(RAW, np.uint8)
    labels[50:60, 100:160] = 1
    tifffile.imwrite(tmp_path / "cells.tif", labels)
    run_cells(section, tmp_path / "cells.tif")
    first = (section / "cells.csv.gz").read_bytes()
    run_cells(section, tmp_path / "cells.tif", "--force")
    assert (section / "cells.csv.gz").read_bytes() == first
    text = gzip.decompress(first).decode()
    assert text.splitlines()[0] == 'cell,x,y,area_um2,share_on_tissue,class,A,"B,1",NA'


def test_a_table_of_yours_is_not_replaced(section, tmp_path, capsys):
    labels = np.zeros(RAW, np.uint8)
    labels[50:60, 100:160] = 1
    tifffile.imwrite(tmp_path / "cells.tif", labels)
    (section / "cells.csv.gz").write_bytes(b"mine")
    before = snapshot(section)
    assert run_cells(section, tmp_path / "cells.tif")[0] == 2
    error = capsys.readouterr().err
    assert "cells.csv.gz was not written by analysis/cells.py, which would overwrite it" in error
    assert f"--masks {tmp_path / 'cells.tif'} --force" in error
    assert snapshot(section) == before
    other = tmp_path / "other"
    assert cells.run(["--directory", str(section), "--masks", str(tmp_path / "cells.tif"),
                      "--output", str(other)]) == 0  # fmt: skip
    written = {"cells.csv.gz", "cells-counts.geojson", "cells.json"}
    assert {path.name for path in other.iterdir()} == written
    assert run_cells(section, tmp_path / "cells.tif", "--force")[0] == 0
    record = json.loads((section / "cells.json").read_text())
    assert {"versions", "code", "seconds", "outputs"} <= record.keys()
    made = (section / "cells.csv.gz").read_bytes()
    (section / "cells.csv.gz").write_bytes(gzip.compress(gzip.decompress(made) + b"edited\n"))
    edited = snapshot(section)
    capsys.readouterr()
    assert run_cells(section, tmp_path / "cells.tif")[0] == 0
    assert "kept your cells.csv.gz (--force makes a new one)" in capsys.readouterr().out
    assert snapshot(section) == edited
    labels[60:70] = 2
    tifffile.imwrite(tmp_path / "cells.tif", labels)
    assert run_cells(section, tmp_path / "cells.tif")[0] == 2
    error = capsys.readouterr().err
    assert f"was edited by hand, and {tmp_path / 'cells.tif'} has changed" in error
    assert snapshot(section) == edited
    assert run_cells(section, tmp_path / "cells.tif", "--force")[0] == 0
    assert b"edited" not in gzip.decompress((section / "cells.csv.gz").read_bytes())


BAD_LABELS = {
    "size": (np.ones((100, 300), np.uint8), "300 x 100 px; expected 300 x 150 px (he-raw) or"),
    "negative": (np.full(RAW, -1, np.int16), "holds the label -1"),
    "huge": (np.full(RAW, 2**40, np.int64), f"holds the label {2**40}"),
    "fractions": (np.ones(RAW, np.float32), "is float32 (150, 300); expected one whole number"),
    "yes or no": (np.ones(RAW, bool), "is bool (150, 300); expected one whole number"),
    "colours": (np.ones((*RAW, 3), np.uint8), "(150, 300, 3); expected one whole number"),
    "nothing": (np.zeros(RAW, np.uint8), "holds no cell"),
    "off the tissue": (np.eye(*RAW, k=0, dtype=np.uint8) * (np.arange(300) < 20).astype(np.uint8),
                       "none of them on the tissue"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_LABELS)
def test_bad_labels(section, tmp_path, case, capsys):
    labels, message = BAD_LABELS[case]
    np.save(tmp_path / "cells.npy", labels)
    assert run_cells(section, tmp_path / "cells.npy")[0] == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not (section / "cells.csv.gz").exists()


@pytest.mark.parametrize("suffix", [".tif", ".png", ".npy"])
def test_damaged_labels(section, tmp_path, suffix, capsys):
    path = tmp_path / f"cells{suffix}"
    path.write_bytes(b"\x89PNG\r\n not an image" * 40)
    assert run_cells(section, path)[0] == 2
    assert "is not a readable label image" in capsys.readouterr().err


def test_a_cut_off_tiff(section, tmp_path, capsys):
    labels = np.random.default_rng(0).integers(0, 2000, RAW).astype(np.uint16)
    path = tmp_path / "cells.tif"
    tifffile.imwrite(path, labels, compression="zlib", rowsperstrip=16)
    path.write_bytes(path.read_bytes()[:-30000])
    assert run_cells(section, path)[0] == 2
    assert "is not a readable label image" in capsys.readouterr().err


def test_pickles_are_not_opened(section, tmp_path, capsys):
    np.save(tmp_path / "cells_seg.npy", {"masks": np.ones(RAW, int)}, allow_pickle=True)
    assert run_cells(section, tmp_path / "cells_seg.npy")[0] == 2
    assert "is not a readable label image" in capsys.readouterr().err


BAD_OUTLINES = {
    "no json": ("{", "is not GeoJSON"),
    "no features": ('{"type": "FeatureCollection"}', "holds no list of features"),
    "a number": ("3", "holds no list of features"),
    "numbers": ("[1, 2]", "holds features that are no objects"),
    "empty": ('{"features": []}', "holds no outline of a cell"),
    "no coordinates": ('[{"geometry": {"type": "Polygon"}}]', "damaged outline, number 1"),
    "text": (json.dumps([feature([[["a", 1], [2, 3], [4, 5]]])]), "damaged outline, number 1"),
    "two points": (json.dumps([feature([[[1, 1], [2, 3]]])]), "a ring of shape (2, 2)"),
    "ragged": (json.dumps([feature([[[1, 1], [2, 3], [4]]])]), "damaged outline, number 1"),
    "not finite": (json.dumps([feature([[[1, 1], [2, 3], [float("nan"), 1]]])]), "not finite"),
    "flat": (json.dumps([feature([1, 2])]), "damaged outline, number 1"),
    "a geometry that is text": ('[{"geometry": "x"}]', "damaged outline, number 1"),
    "another image": (json.dumps([feature([box(5000, 10, 5010, 20)])]), "far outside of the image"),
    "off": (json.dumps([feature([box(1, 1, 3, 3)])]), "none of them on the tissue"),
    "lines": (json.dumps([feature([[[1, 1], [9, 9], [5, 5]]])]), "no outline of a cell that has"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_OUTLINES)
def test_bad_outlines(section, tmp_path, case, capsys):
    text, message = BAD_OUTLINES[case]
    (tmp_path / "cells.geojson").write_text(text)
    assert run_cells(section, tmp_path / "cells.geojson")[0] == 2
    assert message in capsys.readouterr().err


def test_bands_that_end_early_are_a_damaged_image():
    bands = iter([np.zeros((3, 8), np.uint8)])
    with pytest.raises(utils.StageError, match=r"cells\.tif ends after 3 of 5 rows"):
        cells.cells_of_labels(bands, PixelFrame("he-raw", (5, 8), (1, 1)), (1, 1), HERE)


@pytest.mark.parametrize("image", [np.full(GRID, np.nan), np.ones((GRID[0], GRID[1] - 1))])
def test_a_map_without_a_count_on_the_tissue_is_refused(section, tmp_path, capsys, image):
    np.save(tmp_path / "cells.npy", np.ones(RAW, np.uint8))
    last = cells.map_files(section)[GENES[-1]]
    last.write_bytes(pickle.dumps(image.astype(np.float32)))
    assert run_cells(section, tmp_path / "cells.npy")[0] == 2
    error = capsys.readouterr().err
    assert f"{last} is {image.shape}; expected {GRID}, with a count for every" in error
    assert "Run: python HISTEX.py" in error


@pytest.mark.parametrize(("mode", "shape"), [("RGB", "(150, 300, 3)"), ("LA", "(150, 300, 2)")])
def test_a_png_of_colours_is_no_label_image(section, tmp_path, capsys, mode, shape):
    Image.new(mode, RAW[::-1]).save(tmp_path / "cells.png")
    assert run_cells(section, tmp_path / "cells.png")[0] == 2
    assert f"is uint8 {shape}; expected one whole number" in capsys.readouterr().err


def test_other_errors(section, tmp_path, capsys):
    assert run_cells(section, tmp_path / "none.tif")[0] == 2
    assert "is missing" in capsys.readouterr().err
    np.save(tmp_path / "cells.npy", np.ones(RAW, int))
    assert run_cells(section, tmp_path / "cells.npy", "--nuclei")[0] == 2
    assert "--nuclei is for GeoJSON" in capsys.readouterr().err
    record = json.loads((section / "image_calibration.json").read_text())
    del record["raw_size"]
    (section / "image_calibration.json").write_text(json.dumps(record))
    assert run_cells(section, tmp_path / "cells.npy")[0] == 2
    assert "does not tell the sizes" in capsys.readouterr().err


def test_no_plot_is_taken_as_before():
    given = ["--directory", "a", "--masks", "b.tif", "--no-plot"]
    assert cells.build_parser().parse_args(given).no_plot


# ----- what tools and vendors write -----
def run_features(section, path, features, *options):
    return run_cells(section, write_geojson(path, features), *options)[1]


def some_boxes(n):
    return [[box(100 + 30 * i, 60, 120 + 30 * i, 80)] for i in range(n)]


@pytest.mark.parametrize(
    ("more", "names"),
    [
        ([{"properties": {"cell_id": i}} for i in (7, 12, 40)], ["7", "12", "40"]),
        ([{"properties": {"cell_id": i}} for i in (7.0, "x", 40)], ["7", "x", "40"]),
        ([{"properties": {"cell_id": i}, "id": "0"} for i in (7, 12, 40)], ["7", "12", "40"]),
        ([{"properties": {"cell_id": 2}}, {}, {"properties": {"cell_id": None}}],
         ["2", "object 2", "3"]),
        ([{"id": i, "properties": {"label": "tumour"}} for i in "abc"], ["a", "b", "c"]),
        ([{"properties": {"label": i}} for i in (5, 3, 1)], ["5", "3", "1"]),
        ([{"properties": {"label": "tumour"}} for _ in range(3)], ["1", "2", "3"]),
        ([{"properties": {"name": i, "label": "tumour"}} for i in "abc"], ["a", "b", "c"]),
        ([{"id": "a"}, {"id": "a"}, {"id": "b"}], ["1", "2", "3"]),
        ([{"properties": {"cell_id": i}} for i in ([1], {}, float("nan"))], ["1", "2", "3"]),
        ([{"properties": {"cell": True}, "id": i} for i in "abc"], ["a", "b", "c"]),
    ],
)  # fmt: skip
def test_cells_keep_the_names_of_their_file(section, tmp_path, more, names):
    features = [feature(rings, **m) for rings, m in zip(some_boxes(3), more, strict=True)]
    table = run_features(section, tmp_path / "c.geojson", features)
    assert table.index.astype(str).tolist() == names


@pytest.mark.parametrize("more", [{"id": True}, {"properties": {"cell_id": False}}])
def test_ids_that_are_true_or_false_are_refused(section, tmp_path, more, capsys):
    path = write_geojson(tmp_path / "c.geojson", [feature(some_boxes(1)[0], **more)])
    assert run_cells(section, path)[0] == 2
    assert "id is true or false in 1 of 1 objects, the first" in capsys.readouterr().err


def test_outlines_that_share_an_id_are_parts_of_one_cell_and_counted(section, tmp_path):
    features = [feature(rings, properties={"cell_id": "a"}) for rings in some_boxes(3)]
    features[2]["properties"]["cell_id"] = "b"
    table = run_features(section, tmp_path / "c.geojson", features)
    assert table.index.tolist() == ["a", "b"]
    both, one = map(float, table["area_um2"])
    assert both == pytest.approx(2 * one, abs=0.02)  # two decimals are written
    (note,) = json.loads((section / "cells.json").read_text())["warnings"]
    assert note.startswith("c.geojson: 3 outlines share the ids of 2 cells, such as 'a' with 2")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be"])
def test_geojson_is_read_in_any_unicode(section, tmp_path, encoding):
    path = tmp_path / "c.geojson"
    text = json.dumps({"features": [feature(some_boxes(1)[0], id="\u03b2-1")]}, ensure_ascii=False)
    path.write_text(text, encoding=encoding)
    assert run_cells(section, path)[1].index.tolist() == ["\u03b2-1"]


@pytest.mark.parametrize("place", ["id", "class", "bytes"])
def test_half_of_a_character_in_geojson_is_named(section, tmp_path, capsys, place):
    """Programs whose text is UTF-16 cut a name between the halves; no text file can hold one."""
    path, name = tmp_path / "c.geojson", "cell \ud83d"
    key = {"class": {"classification": {"name": name}}}.get(place, {"cell_id": name})
    whole = [feature(some_boxes(1)[0], properties={"cell_id": "\U0001f600"})]
    write_geojson(path, whole)
    assert run_cells(section, path)[1].index.tolist() == ["\U0001f600"]
    content = {"features": [feature(some_boxes(1)[0], properties=key)]}
    text = json.dumps(content, ensure_ascii=place != "bytes")
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    assert run_cells(section, path, "--force")[0] == 2
    error = capsys.readouterr().err
    assert "c.geojson is not GeoJSON: it holds half of a character" in error
    assert "cell \\ud83d" in error


def test_labels_keep_their_numbers(section, tmp_path):
    labels = np.zeros(RAW, np.uint16)
    labels[60:80, 100:120], labels[60:80, 130:150] = 40, 7
    np.save(tmp_path / "cells.npy", labels)
    assert run_cells(section, tmp_path / "cells.npy")[1].index.astype(str).tolist() == ["7", "40"]


def test_baysor_and_other_geojson_are_read_alike(section, tmp_path):
    """Baysor before 0.7: a GeometryCollection; a cell may have several parts, some no ring."""
    polygons = [{"type": "Polygon", "coordinates": rings} for rings in some_boxes(2)]
    flat = {"type": "Polygon", "coordinates": [[[1, 1], [1, 1]]], "cell": 9}
    geometries = [polygons[0] | {"cell": 5}, polygons[1] | {"cell": 3}, flat]
    baysor = {"type": "GeometryCollection", "geometries": geometries}
    contents = {
        "baysor.json": baysor,
        "bom.geojson": "\ufeff" + json.dumps(baysor),
        "list.json": baysor["geometries"],
        "features.json": {"features": [feature(p["coordinates"], properties={"cell_id": i})
                                       for p, i in zip(polygons, (5, 3), strict=True)]},
        "collections.json": [{"geometry": {"type": "GeometryCollection", "geometries": [p]},
                              "properties": {"cell_id": i, "objectType": "cell"}}
                             for p, i in zip(polygons, (5, 3), strict=True)],
    }  # fmt: skip
    tables = []
    for name, content in contents.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (tmp_path / name).write_text(text, encoding="utf-8")
        tables.append(run_cells(section, tmp_path / name)[1])
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(text.encode()))
        tables.append(run_cells(section, tmp_path / f"{name}.gz")[1])
    assert tables[0].index.astype(str).tolist() == ["5", "3"]
    for table in tables[1:]:
        pd.testing.assert_frame_equal(table, tables[0])
    twice = {"type": "GeometryCollection", "geometries": [p | {"cell": 5} for p in polygons]}
    (tmp_path / "parts.json").write_text(json.dumps(twice))
    _, table = run_cells(section, tmp_path / "parts.json")
    area = sum(tables[0]["area_um2"].astype(float))
    assert table.index.astype(str).tolist() == ["5"]
    assert float(table["area_um2"].iloc[0]) == pytest.approx(area, abs=0.02)


BOW = [[32, 32], [96, 96], [96, 32], [32, 96], [32, 32]]  # two triangles of 32 x 64 / 2 px
CROSSING = {  # rings, kind, area in px of he.jpg
    "bow": ([BOW], "Polygon", 2048),
    "bow with its crossing": (
        [[[32, 32], [64, 64], [96, 96], [96, 32], [64, 64], [32, 96]]], "Polygon", 2048),
    "uneven bow": ([[[0, 0], [90, 90], [90, 0], [0, 30]]], "Polygon", 337.5 + 45 * 67.5),
    "around twice": ([[*box(32, 32, 64, 64)[:4], *box(32, 32, 64, 64)]], "Polygon", 1024),
    "duplicate vertices": ([[p for p in box(32, 32, 64, 64) for _ in range(3)]], "Polygon", 1024),
    "a spike": ([[[32, 32], [64, 32], [64, 64], [90, 90], [64, 64], [32, 64]]], "Polygon", 1024),
    "a hole": ([box(32, 32, 64, 64), box(40, 40, 48, 48)], "Polygon", 1024 - 64),
    "a hole that leaves": ([box(32, 32, 64, 64), box(48, 48, 80, 80)], "Polygon", 1024 - 256),
    "a hole outside": ([box(32, 32, 64, 64), box(80, 80, 96, 96)], "Polygon", 1024),
    "holes that overlap": (
        [box(32, 32, 64, 64), box(40, 40, 48, 48), box(44, 40, 52, 48)], "Polygon", 1024 - 96),
    "parts that overlap": ([[box(32, 32, 64, 64)], [box(48, 48, 80, 80)]], "MultiPolygon", 1792),
    "a part in another": ([[box(32, 32, 64, 64)], [box(40, 40, 48, 48)]], "MultiPolygon", 1024),
    "an island in a hole": (
        [[box(32, 32, 64, 64), box(36, 36, 60, 60)], [box(40, 40, 48, 48)]], "MultiPolygon",
        1024 - 576 + 64),
}  # fmt: skip


@pytest.fixture
def even(section):
    """A section of he.jpg alone whose maps are 1 everywhere."""
    write_maps(section, np.ones((*GRID, len(GENES))), GENES)
    write_record(section, utils.HISTEX, ["he.jpg"], ["cnts-super"])
    return section


@pytest.mark.parametrize("case", CROSSING)
def test_what_an_outline_encloses_counts_once(even, tmp_path, case, capsys):
    rings, kind, area = CROSSING[case]
    features = [feature(rings, kind, id="it"), feature([box(128, 32, 160, 64)], id="ok")]
    table = run_features(even, tmp_path / "c.geojson", features, "--frame", "he")
    assert table["area_um2"].astype(float).tolist() == pytest.approx([area / 4, 256], abs=0.01)
    np.testing.assert_allclose(values(table)[:, 0], [area / 256, 4], rtol=1e-3)
    assert table["share_on_tissue"].astype(float).tolist() == [1, 1]
    warned = "cross themselves or cover a part twice" in capsys.readouterr().out
    assert warned == (
        case not in {"duplicate vertices", "a spike", "a hole", "an island in a hole"}
    )


def test_the_centre_of_a_mended_outline(even, tmp_path):
    rings = [feature([BOW]), feature([box(32, 32, 96, 96)])]
    table = run_features(even, tmp_path / "c.geojson", rings, "--frame", "he")
    assert table[["x", "y"]].nunique().tolist() == [1, 1]


@settings(max_examples=40, deadline=None)
@given(points=st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), min_size=3, max_size=9))
def test_mended_outlines_are_what_they_wind_around(points):
    """Against the winding number of the centre of every square of a finer grid."""
    ring, fine = np.array(points, float), 12
    centre = (np.arange(12 * fine) + 0.5) / fine
    x, y = np.meshgrid(centre + 1e-7, centre + 1e-7)
    winding = np.zeros(x.shape, int)
    for a, b in zip(ring, np.roll(ring, -1, axis=0), strict=True):
        left = (b[0] - a[0]) * (y - a[1]) - (x - a[0]) * (b[1] - a[1]) > 0
        winding += ((a[1] <= y) & (b[1] > y) & left).astype(int)
        winding -= ((a[1] > y) & (b[1] <= y) & ~left).astype(int)
    expected = (winding != 0).sum() / fine**2
    pieces = mending.mend([(ring, False)])
    length = np.abs(np.diff(np.vstack([ring, ring[:1]]), axis=0)).sum()
    assert outlines.area_of(pieces) == pytest.approx(expected, abs=0.75 * length / fine + 1e-9)
    if not mending.need_mending([[(ring, False)]])[0]:
        assert outlines.area_of(pieces) == pytest.approx(outlines.area_of([(ring, False)]))


def test_a_point_has_no_edges_that_could_cross():
    point = [(np.full((4, 2), 3.0), False)]
    assert mending.need_mending([point]).tolist() == [False]
    assert outlines.area_of(mending.mend(point)) == 0


def test_outlines_without_area_are_left_out_and_counted(section, tmp_path, capsys):
    features = [
        feature([box(100, 60, 120, 80)], id="ok"),
        feature([[[1, 1], [9, 9], [5, 5]]], id="a line"),
        feature([[[3, 3]] * 4], id="a point"),
        feature([[[1, 1], [2, 3]]], id="two points"),
        feature([[[1, 1], [2, 3], [float("nan"), 1]]], id="no number"),
        feature([[[1, 1], [2, 3], [1e300, 1]]], id="beyond"),
        feature([], id="nothing"),
    ]
    code, table = run_cells(section, write_geojson(tmp_path / "c.geojson", features))
    assert code == 0
    assert table.index.astype(str).tolist() == ["ok"]
    record = json.loads((section / "cells.json").read_text())
    text = capsys.readouterr().out
    for said in (
        "2 of 3 outlines have no area", "1 of 7 objects have a ring of shape (2, 2)",
        "1 of 7 objects have coordinates that are not finite",
        "1 of 7 objects have coordinates beyond any image",
    ):  # fmt: skip
        assert said in text
        assert any(said in warning for warning in record["warnings"])


def test_a_few_cells_far_away_are_left_out(section, tmp_path, capsys):
    features = [feature([box(100, 60, 120, 80)]) for _ in range(150)]
    features.append(feature([box(9000, 60, 9020, 80)]))
    code, table = run_cells(section, write_geojson(tmp_path / "c.geojson", features))
    assert (code, len(table)) == (0, 150)
    assert "1 cells lie far outside of the image: left out" in capsys.readouterr().out
    write_geojson(tmp_path / "c.geojson", [*features, *features[-1:] * 3])
    assert run_cells(section, tmp_path / "c.geojson")[0] == 2
    assert "4 of 154 cells far outside" in capsys.readouterr().err


def test_the_folder_of_space_ranger(section, tmp_path, capsys):
    outs = tmp_path / "outs" / "segmented_outputs"
    outs.mkdir(parents=True)
    for name, ids in (("cell", (7, 40)), ("nucleus", (40,))):
        features = [feature(some_boxes(3)[i % 3], properties={"cell_id": i}) for i in ids]
        write_geojson(outs / f"{name}_segmentations.geojson", features)
    assert run_cells(section, outs)[1].index.astype(str).tolist() == ["7", "40"]
    assert run_cells(section, outs.parent)[1].index.astype(str).tolist() == ["7", "40"]
    (outs / "filtered_feature_cell_matrix.h5").write_bytes(b"")
    assert run_cells(section, outs / "filtered_feature_cell_matrix.h5")[0] == 2
    assert "cell_segmentations.geojson of the same folder" in capsys.readouterr().err
    assert run_cells(section, outs / "cell_segmentations.geojson", "--nuclei")[0] == 2
    assert "nucleus_segmentations.geojson, without --nuclei" in capsys.readouterr().err
    assert run_cells(section, tmp_path)[0] == 2
    assert "is a folder without cell_segmentations.geojson" in capsys.readouterr().err


def test_tables_of_the_first_runs_of_xenium_and_tables_without_cells(section, tmp_path, capsys):
    write_record(section, "prepare/xenium.py", [], [])
    record = json.loads((section / "prepare.json").read_text())
    (section / "prepare.json").write_text(json.dumps(record | {"frame_origin_um": [0, 0]}))
    rows = [(b"aa-1", x, y) for x, y in box(50, 30, 60, 40)]
    table = pd.DataFrame(rows, columns=["cell_id", "vertex_x", "vertex_y"])
    path = tmp_path / "boundaries.parquet"
    pd.concat([table, table[:2].assign(cell_id=None)]).to_parquet(path)
    assert run_cells(section, path)[1].index.tolist() == ["aa-1"]
    assert "2 vertices without a cell_id are left out" in capsys.readouterr().out
    assert run_cells(section, path, "--nuclei")[0] == 2
    assert "holds one kind of outline; --nuclei is for GeoJSON" in capsys.readouterr().err
    for rest, said in ((table[:0], ""), (table[:2], "1 outlines have no three finite vertices")):
        rest.to_parquet(path)
        assert run_cells(section, path)[0] == 2
        captured = capsys.readouterr()
        assert said in captured.out
        assert f"{path} holds no outline of a cell.\nGive the cell_boundaries" in captured.err


@pytest.mark.parametrize(
    "name", ["boundaries.parquet", "boundaries.csv.gz", "boundaries.csv", "utf-16.csv"]
)
def test_boundaries_of_xenium_lie_in_the_frame_of_the_sample(section, tmp_path, name, capsys):
    """In um of the run; he-raw starts at its frame_origin_um and has 0.5 um per px."""
    rows = [("aa-1", 1, x, y) for x, y in box(1050, 2030, 1060, 2040)]
    rows += [("bb-1", 1, x, y) for x, y in box(1070, 2030, 1075, 2040)]
    rows += [("bb-1", 2, x, y) for x, y in box(1080, 2030, 1085, 2040)]
    rows += [("cc-1", 1, 1.0, float("nan"))] * 4
    table = pd.DataFrame(rows, columns=["cell_id", "label_id", "vertex_x", "vertex_y"])
    path = tmp_path / name
    if name.endswith("parquet"):
        table.to_parquet(path)
    else:
        table.to_csv(path, index=False, encoding="utf-16" if name == "utf-16.csv" else "utf-8")
    assert run_cells(section, path)[0] == 2
    error = capsys.readouterr().err
    assert "um of a Xenium run" in error
    assert "QuPath" in error
    write_record(section, "prepare/xenium.py", [], [])
    record = json.loads((section / "prepare.json").read_text())
    (section / "prepare.json").write_text(json.dumps(record | {"frame_origin_um": [1000, 2000]}))
    assert run_cells(section, path, "--frame", "he")[0] == 2
    assert "Leave out --frame" in capsys.readouterr().err
    code, found = run_cells(section, path)
    assert code == 0
    assert "1 outlines have no three finite vertices" in capsys.readouterr().out
    assert found.index.astype(str).tolist() == ["aa-1", "bb-1"]
    assert found[["x", "y"]].astype(float).to_numpy().tolist() == [[110, 70], [155, 70]]
    table.columns = ["cell", "part", "x", "y"]
    table.to_csv(tmp_path / "other.csv", index=False)
    assert run_cells(section, tmp_path / "other.csv")[0] == 2
    assert "is a table of cell, part, x, y; of tables, only the" in capsys.readouterr().err


def test_a_workbook_named_csv_is_named(section, tmp_path, capsys):
    (tmp_path / "c.csv").write_bytes(b"PK\x03\x04")
    assert run_cells(section, tmp_path / "c.csv")[0] == 2
    error = capsys.readouterr().err
    assert "it is an Excel workbook (.xlsx) or another zip archive" in error
    assert "download" not in error


def test_formats_that_are_not_read_are_named(section, tmp_path, capsys):
    labels = np.ones(RAW, np.uint16)
    np.savez(tmp_path / "c.npz", labels)
    np.save(tmp_path / "he_seg.npy", {"masks": labels})
    np.save(tmp_path / "object.npy", np.array([{"a": 1}]))
    Image.fromarray(labels.astype(np.uint8)).save(tmp_path / "c.jpg")
    for name in ("c.mat", "c.h5ad", "cells.zarr.zip", "c.pickle", "c.xml"):
        (tmp_path / name).write_bytes(b"\x00")
    (tmp_path / "c.json").write_text(json.dumps({"images": [], "annotations": []}))
    said = {
        "c.npz": "np.load('c.npz')['NAME']", "he_seg.npy": "the _seg.npy of Cellpose",
        "object.npy": "a pickle of objects", "c.jpg": "a JPEG, which changes labels",
        "c.mat": "inst_map", "c.h5ad": "HDF5", "cells.zarr.zip": "cell_boundaries.parquet",
        "c.pickle": "a pickle, which is not opened", "c.xml": "QuPath",
        "c.json": "but an object of images, annotations",
    }  # fmt: skip
    for name, words in said.items():
        assert run_cells(section, tmp_path / name)[0] == 2, name
        error = capsys.readouterr().err
        assert words in error
        assert "ownload" not in error
    assert "np.load('he_seg.npy', allow_pickle=True).item()['masks']" in (
        run_cells(section, tmp_path / "he_seg.npy") and capsys.readouterr().err
    )


# ----- headers that promise too much -----
def huge_png(side):
    """A grey PNG of side x side px by its header, with no pixels."""

    def chunk(kind, content):
        return (struct.pack(">I", len(content)) + kind + content
                + struct.pack(">I", zlib.crc32(kind + content)))  # fmt: skip

    head = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    pixels = zlib.compress(bytes(1000))
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("side", [60_000, 80_000])
def test_a_huge_label_image_is_refused_by_its_header(section, tmp_path, side, capsys):
    (tmp_path / "c.png").write_bytes(huge_png(side))
    np.save(tmp_path / "c.npy", np.zeros(RAW, np.uint8))
    content = (tmp_path / "c.npy").read_bytes().replace(b"(150, 300)", f"({side}, 9)".encode())
    (tmp_path / "c.npy").write_bytes(content)
    tifffile.imwrite(tmp_path / "c.tif", np.zeros((16, 16), np.uint8), compression="zlib")
    with tifffile.TiffFile(tmp_path / "c.tif", mode="r+b") as tiff:
        for tag in ("ImageWidth", "ImageLength", "RowsPerStrip"):
            tiff.pages[0].tags[tag].overwrite(side)
    tracemalloc.start()
    for name in ("c.png", "c.npy", "c.tif"):
        assert run_cells(section, tmp_path / name)[0] == 2
        error = capsys.readouterr().err
        assert "expected 300 x 150 px" in error or "not a readable label image" in error
    assert tracemalloc.get_traced_memory()[1] < 50e6
    tracemalloc.stop()


def test_odd_label_tiffs(section, tmp_path, capsys):
    labels = np.ones(RAW, np.uint16)
    turned, odd, bits = (tmp_path / f"{name}.tif" for name in ("turned", "odd", "bits"))
    tifffile.imwrite(turned, labels, extratags=[(274, "H", 1, 3, True)])
    tifffile.imwrite(odd, labels, extratags=[(274, "H", 1, 9, True)])
    tifffile.imwrite(bits, labels)
    with tifffile.TiffFile(bits, mode="r+b") as tiff:
        tiff.pages[0].tags["BitsPerSample"].overwrite(65)
    lossy = tmp_path / "lossy.tif"
    tifffile.imwrite(lossy, labels.astype(np.uint8), compression="jpeg")
    for path, words in (
        (lossy, "is compressed as JPEG, which changes labels"),
        (turned, "has EXIF orientation 3, so viewers turn it"),
        (odd, "has orientation 9, which no standard knows"),
        (bits, "of a kind that is not known"),
    ):
        assert run_cells(section, path)[0] == 2
        assert words in capsys.readouterr().err


def test_counts_have_a_standard_deviation_if_the_maps_have_one(section, capsys):
    """By all pairs of superpixels, each in two cells by other shares; it goes with that of maps."""
    sd = np.random.default_rng(1).uniform(0, 2, (*GRID, len(GENES)))
    sd[:, :3] = np.nan
    both, record = ["cnts-super", "cnts-super-sd"], (section, utils.HISTEX, ["he.jpg"])
    write_maps(section, sd, GENES, "cnts-super-sd")
    write_record(*record, both)
    labels = np.zeros(SIZE, np.int32)
    labels[30:78, 70:150], labels[90:100, 8:40] = 5, 9  # the second is beside the tissue
    labels[100:200, 100:400] = 7
    Image.fromarray(labels).save(section / HERE)
    assert run_cells(section, section / HERE)[0] == 0
    table = pd.read_csv(section / "cells-sd.csv.gz", index_col="cell")
    assert list(table.columns) == list(pd.read_csv(section / "cells.csv.gz", index_col=0).columns)
    assert table.loc[9, GENES].isna().all()
    for cell in (5, 7):
        shares = (labels == cell).reshape(GRID[0], 16, GRID[1], 16).mean(axis=(1, 3))
        places = np.argwhere(shares > 0)
        apart = ((places[:, None] - places[None]) ** 2).sum(axis=-1)
        for i, gene in enumerate(GENES):
            one = (shares * np.nan_to_num(sd[..., i]))[shares > 0]
            wanted = np.sqrt(one @ errors.correlation(apart) @ one)
            assert table.loc[cell, gene] == pytest.approx(wanted, rel=2e-3)
    shutil.rmtree(section / "cnts-super-sd")
    write_record(*record, both[:1])
    assert run_cells(section, section / HERE)[0] == 0
    assert not (section / "cells-sd.csv.gz").exists()
    write_maps(section, sd[..., :2], GENES[:2], "cnts-super-sd")
    write_record(*record, both)
    assert run_cells(section, section / HERE)[0] == 2
    assert "lacks 1 of 3 genes, such as NA" in capsys.readouterr().err
