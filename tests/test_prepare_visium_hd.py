"""visium_hd.py: bins of a small section with a known answer, counted once more by brute force."""

import gzip
import json
import shutil

import h5py
import numpy as np
import pandas as pd
import pytest
from conftest import REAL_DATA, run
from PIL import Image
from test_prepare_common import write_h5

import utils
from method.grid import lattice_pitch
from prepare import visium, visium_hd

REAL = REAL_DATA / "formats" / "visium_hd_positions" / "tissue_positions.parquet"
UM = 0.4  # um per px of the full-resolution image
SIZE = (1300, 1200)  # width, height
SIDE_UM = 320.0  # of the capture area
HIRES_SCALE = 0.25
IDS, SYMBOLS = ["ENSG1", "ENSG2", "ENSG3", "ENSG4"], ["EPCAM", "TBCE", "TBCE", "NA"]
UNIQUE = ["EPCAM", "TBCE", "TBCE.ENSG3", "NA"]
ROWS_UM = 100 * np.sqrt(3) / 2


def make_axes(degrees, flip):
    """px per um along array_col and array_row."""
    turn = np.radians(degrees)
    axes = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]]) / UM
    axes[1] *= -1 if flip else 1
    return axes


def write_outs(tmp_path, size=8, degrees=0.0, flip=False, missing=0.0, origin=None):
    """binned_outputs of one bin size; returns (outs, bins in tissue, counts by bin, axes).

    Tissue is a disc of 140 um about the middle. The bins of the matrix are in another order than
    the positions, and hold one bin that is not in tissue.
    """
    rng = np.random.default_rng(5)
    n = round(SIDE_UM / size)
    row, col = (i.ravel() for i in np.mgrid[:n, :n])
    axes = make_axes(degrees, flip)
    um = np.column_stack([col + 0.5, row + 0.5]) * size
    middle = np.array(SIZE) / 2 if origin is None else origin + np.full(2, SIDE_UM / 2) @ axes
    xy = middle + (um - SIDE_UM / 2) @ axes
    in_tissue = np.hypot(*(um - SIDE_UM / 2).T) < 140
    there = rng.random(n * n) >= missing
    barcodes = np.array(
        [f"s_{size:03d}um_{r:05d}_{c:05d}-1" for r, c in zip(row, col, strict=True)]
    )
    table = pd.DataFrame(
        {
            "barcode": barcodes, "in_tissue": in_tissue.astype(np.uint8),
            "array_row": row.astype(np.uint32), "array_col": col.astype(np.uint32),
            "pxl_row_in_fullres": xy[:, 1], "pxl_col_in_fullres": xy[:, 0],
        }
    )[there]  # fmt: skip
    folder = tmp_path / "outs" / "binned_outputs" / f"square_{size:03d}um"
    (folder / "spatial").mkdir(parents=True)
    table.to_parquet(folder / "spatial" / "tissue_positions.parquet", row_group_size=777)
    factors = {
        "tissue_hires_scalef": HIRES_SCALE, "bin_size_um": float(size), "microns_per_pixel": UM,
        "spot_diameter_fullres": size / UM,
    }  # fmt: skip
    (folder / "spatial" / "scalefactors_json.json").write_text(json.dumps(factors))
    Image.new("RGB", [round(s * HIRES_SCALE) for s in SIZE]).save(
        folder / "spatial" / "tissue_hires_image.png"
    )
    if not (tmp_path / "scan.png").exists():
        gradient = np.add.outer(np.arange(SIZE[1]), np.arange(SIZE[0])) // 10 % 256
        Image.fromarray(np.stack([gradient] * 3, 2).astype(np.uint8)).save(tmp_path / "scan.png")
    listed = np.flatnonzero(there & in_tissue)
    stray = np.flatnonzero(there & ~in_tissue)[:1]
    order = rng.permutation(np.concatenate([listed, stray]))
    counts = rng.poisson((0.3 * size / 2, 0.5, 0.2, 0.05), (len(order), len(IDS)))
    write_h5(folder / "filtered_feature_bc_matrix.h5", counts, barcodes[order], IDS, SYMBOLS)
    known = pd.DataFrame(counts, barcodes[order], UNIQUE)
    bins = pd.DataFrame(xy, barcodes, ["x", "y"])[there & in_tissue]
    return tmp_path / "outs", bins, known, axes


def prepare(tmp_path, outs, *options):
    return visium_hd.run(
        [
            "--outs", str(outs), "--image", str(tmp_path / "scan.png"),
            "--directory", str(tmp_path / "sample"), *options,
        ]
    )  # fmt: skip


def read_counts(directory):
    with gzip.open(directory / "cnts.csv.gz", "rt") as file:
        return pd.read_csv(file, index_col=0, keep_default_na=False)


def read_truth(directory):
    with np.load(directory / "truth.npz") as saved:
        return saved["counts"].astype(float), saved["tissue"], saved["genes"].tolist()


def brute_force_spots(bins, known, locs, radius):
    """Counts of each spot, bin by bin."""
    expected = pd.DataFrame(0, locs.index, UNIQUE)
    for spot, (x, y) in zip(locs.index, locs.to_numpy(), strict=True):
        inside = bins.index[np.hypot(bins["x"] - x, bins["y"] - y) <= radius]
        expected.loc[spot] = known.loc[inside].sum()
    return expected


TURNS = [(0, False), (3, False), (90, False), (0, True), (-87, True)]


@pytest.mark.parametrize(("degrees", "flip"), TURNS)
@pytest.mark.parametrize("missing", [0.0, 0.1])
def test_spots_equal_a_brute_force_count_and_nothing_is_lost(tmp_path, degrees, flip, missing):
    outs, bins, known, axes = write_outs(tmp_path, 8, degrees, flip, missing)
    assert prepare(tmp_path, outs) == 0
    directory = tmp_path / "sample"
    locs = pd.read_csv(directory / "locs-raw.csv", index_col=0)
    # centres are rounded to 0.001 px in the file: no bin may be that close to an edge
    pd.testing.assert_frame_equal(
        read_counts(directory), brute_force_spots(bins, known, locs, 27.5 / UM), check_dtype=False,
        check_names=False,
    )  # fmt: skip
    on_array = (locs.to_numpy() - np.array(SIZE) / 2) @ np.linalg.inv(axes) + SIDE_UM / 2 - 27.5
    row = on_array[:, 1] / ROWS_UM
    np.testing.assert_allclose(row, np.rint(row), atol=1e-3)
    col = on_array[:, 0] / 100 - np.rint(row) % 2 / 2
    np.testing.assert_allclose(col, np.rint(col), atol=1e-3)
    counts, tissue, genes = read_truth(directory)
    in_tissue = known.loc[bins.index]
    assert genes == UNIQUE
    np.testing.assert_allclose(counts.sum((0, 1)), in_tissue.sum(), rtol=1e-9)
    record = json.loads((directory / "prepare.json").read_text())
    where = record["molecules_of_truth_genes"]
    assert where["all"] == known.to_numpy().sum() == record["molecules_of_source"]
    assert where["bins not in tissue"] == known.to_numpy().sum() - in_tissue.to_numpy().sum()
    assert where["off the image"] == 0
    assert where["in truth"] == in_tissue.to_numpy().sum()
    assert record["full_resolution_um_per_px"] == pytest.approx(UM, rel=1e-9)
    share = 1 - missing
    assert tissue.sum() * 64 == pytest.approx(np.pi * 140**2, rel=0.05 if share == 1 else 0.15)


def overlaps(low, high, n, step):
    """Share of each interval [low, high] in each of n cells of a width: (intervals, n)."""
    edges = np.arange(n + 1) * step
    common_part = np.minimum(high[:, None], edges[1:]) - np.maximum(low[:, None], edges[:-1])
    return common_part.clip(0) / (high - low)[:, None]


@pytest.mark.parametrize("size", [2, 8])
@pytest.mark.parametrize(("degrees", "flip"), [(0, False), (90, True)])
def test_truth_is_exact_where_bins_end_at_pixels(tmp_path, size, degrees, flip):
    """Upright bins whose squares of 0.5 um lie on the px of he.jpg: exact areas, as rectangles."""
    origin = np.array([130.0, 145.0]) / UM + (make_axes(degrees, flip) < -1).any(0) * SIDE_UM / UM
    outs, bins, known, _ = write_outs(tmp_path, size, degrees, flip, origin=origin)
    assert prepare(tmp_path, outs) == 0
    counts, tissue, _ = read_truth(tmp_path / "sample")
    centre, half = bins.to_numpy() * UM, size / 2
    rows = overlaps(centre[:, 1] - half, centre[:, 1] + half, counts.shape[0], 8.0)
    cols = overlaps(centre[:, 0] - half, centre[:, 0] + half, counts.shape[1], 8.0)
    values = known.loc[bins.index].to_numpy()
    expected = np.einsum("br,bc,bg->rcg", rows, cols, values, optimize=True)
    np.testing.assert_allclose(counts, expected, atol=1e-5)
    area = np.einsum("br,bc->rc", rows, cols) * size**2 / 64
    clear = np.abs(area - 0.5) > 1e-6
    np.testing.assert_array_equal(tissue[clear], (area >= 0.5)[clear])


@pytest.mark.parametrize(("degrees", "flip"), [(3, False), (31, True)])
def test_truth_is_area_weighted_at_any_turn(tmp_path, degrees, flip):
    """Against the areas of the turned bins, from 64 x 64 points in each."""
    outs, bins, known, axes = write_outs(tmp_path, 8, degrees, flip)
    assert prepare(tmp_path, outs) == 0
    counts, *_ = read_truth(tmp_path / "sample")
    steps = ((np.arange(64) + 0.5) / 64 - 0.5) * 8
    inside = np.column_stack([i.ravel() for i in np.meshgrid(steps, steps)]) @ axes
    col, row = np.floor((bins.to_numpy()[:, None] + inside) * UM / 8).astype(int).T
    cells = row.T * counts.shape[1] + col.T
    for g, gene in enumerate(UNIQUE):
        weight = np.repeat(known.loc[bins.index, gene].to_numpy() / 64**2, 64**2)
        expected = np.bincount(cells.ravel(), weight, minlength=counts[..., g].size)
        difference = np.abs(expected.reshape(counts.shape[:2]) - counts[..., g])
        assert difference.sum() < 0.02 * expected.sum()
        assert difference.max() < 0.03 * known[gene].max()


def test_truth_grid_is_that_of_image_calibration(tmp_path):
    """A single bright spot in the image and a single bin with counts meet in one superpixel."""
    outs, bins, known, _ = write_outs(tmp_path, 8)
    folder = outs / "binned_outputs" / "square_008um"
    bright = bins.index[len(bins) // 3]
    counts = (known.index == bright)[:, None] * np.array([[4000, 0, 0, 0]]) + (known * 0).to_numpy()
    spread = bins.index[::7]
    counts[known.index.isin(spread), 1] = 1
    (folder / "filtered_feature_bc_matrix.h5").unlink()
    write_h5(folder / "filtered_feature_bc_matrix.h5", counts, known.index, IDS, SYMBOLS)
    picture = np.full((SIZE[1], SIZE[0], 3), 255, np.uint8)
    x, y = np.rint(bins.loc[bright]).astype(int)
    picture[y - 8 : y + 8, x - 8 : x + 8] = 0
    Image.fromarray(picture).save(tmp_path / "scan.png")
    assert prepare(tmp_path, outs, "--genes", "EPCAM,TBCE") == 0  # one is in no spot
    directory = tmp_path / "sample"
    assert run("image_calibration.py", directory) == 0
    with Image.open(directory / "he.jpg") as image:
        grey = 255 - np.asarray(image.convert("L")).astype(float)
    truth, tissue, _ = read_truth(directory)
    assert grey.shape == (truth.shape[0] * 16, truth.shape[1] * 16)
    dark = grey.reshape(truth.shape[0], 16, truth.shape[1], 16).mean((1, 3))
    dark /= dark.sum()
    np.testing.assert_allclose(truth[..., 0] / truth[..., 0].sum(), dark, atol=0.03)
    assert tissue.shape == truth.shape[:2]


def test_the_next_stages_take_the_sample(tmp_path, monkeypatch):
    monkeypatch.setattr(utils, "VISIUM_PITCH_UM", 60.0)  # so that a small section has 16 spots
    monkeypatch.setattr(visium_hd, "MIN_COVER", 0.2)
    outs, *_ = write_outs(tmp_path, 8, 3)
    genes = tmp_path / "genes.txt"
    genes.write_text("TBCE.ENSG3\nEPCAM\n")
    assert prepare(tmp_path, outs, "--genes", str(genes)) == 0
    directory = tmp_path / "sample"
    assert read_truth(directory)[2] == ["TBCE.ENSG3", "EPCAM"]
    assert run("image_calibration.py", directory) == 0
    assert run("get_HR.py", directory) == 0
    hr = pd.read_csv(directory / "HRlocs.csv")
    measured = hr[hr["measured"] == 1]
    counts = read_counts(directory).loc[measured["parent_1"], ["TBCE.ENSG3", "EPCAM"]]
    np.testing.assert_array_equal(np.load(directory / "HRcnts.npy")[: len(measured)], counts)


def test_blocks_make_no_difference(tmp_path, monkeypatch):
    outs, *_ = write_outs(tmp_path, 8, 3)
    assert prepare(tmp_path, outs) == 0
    once = {f.name: f.read_bytes() for f in (tmp_path / "sample").iterdir()}
    monkeypatch.setattr(visium_hd, "BINS_PER_BLOCK", 100)
    monkeypatch.setattr(visium_hd, "VALUES_PER_BLOCK", 90)
    assert prepare(tmp_path, outs) == 0
    for name in set(once) - {"prepare.json"}:
        assert (tmp_path / "sample" / name).read_bytes() == once[name], name


def test_the_finest_bins_are_taken_unless_told(tmp_path):
    outs, *_ = write_outs(tmp_path, 16)
    write_outs(tmp_path, 8)
    for options, size in (((), 8), (("--bin", "016"), 16)):
        assert prepare(tmp_path, outs, *options) == 0
        record = json.loads((tmp_path / "sample" / "prepare.json").read_text())
        assert record["bin_um"] == size
        assert any("coarser" in note for note in record["notes"])
    assert prepare(tmp_path, outs.parent / "outs" / "binned_outputs" / "square_008um") == 0


def test_a_cut_moves_truth_and_spots_together(tmp_path):
    outs, *_ = write_outs(tmp_path, 8, 3)
    assert prepare(tmp_path, outs) == 0
    whole, _, _ = read_truth(tmp_path / "sample")
    spots = pd.read_csv(tmp_path / "sample" / "locs-raw.csv", index_col=0)
    assert prepare(tmp_path, outs, "--crop-um", "120", "--downsample", "1") == 0
    cut, _, _ = read_truth(tmp_path / "sample")
    shift = spots - pd.read_csv(tmp_path / "sample" / "locs-raw.csv", index_col=0)
    assert np.ptp(shift.to_numpy(), axis=0).max() < 2e-3
    np.testing.assert_allclose(cut.sum((0, 1)), whole.sum((0, 1)))
    row, col = (np.mgrid[: s.shape[0], : s.shape[1]] for s in (whole, cut))
    for axis, name in ((0, "y"), (1, "x")):  # centres of mass, in px of the full image
        before = (whole.sum(2) * row[axis]).sum() / whole.sum() * 8 / UM
        after = (cut.sum(2) * col[axis]).sum() / cut.sum() * 8 / UM
        assert before - after == pytest.approx(shift[name].mean(), abs=0.5)


def test_bins_off_the_image_are_reported(tmp_path):
    outs, bins, known, _ = write_outs(tmp_path, 8, origin=np.array([-150.0, 100.0]))
    (outs / "binned_outputs" / "square_008um" / "spatial" / "tissue_hires_image.png").unlink()
    folder = tmp_path / "sample"
    section = visium_hd.prepare(
        visium_hd.build_parser().parse_args(
            ["--outs", str(outs), "--image", str(tmp_path / "scan.png"), "--directory", str(folder)]
        )
    )
    where = section.facts["molecules_of_truth_genes"]
    left = bins["x"] * UM
    share = ((left + 4).clip(0, 8) / 8).where(left > -4, 0).clip(0, 1)
    expected = ((1 - share) * known.loc[bins.index].sum(axis=1)).sum()
    assert expected > 100
    assert where["off the image"] == pytest.approx(expected, rel=0.01)
    assert where["in truth"] + where["off the image"] + where["bins not in tissue"] == where["all"]


def test_truth_that_does_not_fit_into_memory_is_refused(tmp_path, capsys, monkeypatch):
    outs, *_ = write_outs(tmp_path, 8)
    monkeypatch.setattr(visium_hd, "machine_memory", lambda: 78_000)
    assert prepare(tmp_path, outs) == 2
    assert "70 x 70 superpixels and 4 genes needs" in capsys.readouterr().err
    assert prepare(tmp_path, outs, "--truth-genes", "3") == 0


def test_no_truth_when_not_asked_for(tmp_path):
    outs, *_ = write_outs(tmp_path, 8)
    assert prepare(tmp_path, outs, "--truth-genes", "0") == 0
    assert not (tmp_path / "sample" / "truth.npz").exists()
    assert prepare(tmp_path, outs, "--truth-genes", "2") == 0
    variance = read_counts(tmp_path / "sample").to_numpy().var(0)
    chosen = [UNIQUE[i] for i in sorted(np.argsort(-variance)[:2])]
    assert read_truth(tmp_path / "sample")[2] == chosen


# ----- damaged or mixed-up folders -----
def positions(outs):
    return outs / "binned_outputs" / "square_008um" / "spatial" / "tissue_positions.parquet"


def edit(outs, **columns):
    table = pd.read_parquet(positions(outs))
    table.assign(**{name: change(table) for name, change in columns.items()}).to_parquet(
        positions(outs)
    )


def rename_barcodes(outs, new):
    path = positions(outs).parent.parent / "filtered_feature_bc_matrix.h5"
    with h5py.File(path, "r+") as file:
        old = file["matrix/barcodes"][:]
        del file["matrix/barcodes"]
        file["matrix/barcodes"] = np.array([new] * len(old), "S")


def scale_factors(outs, **factors):
    (positions(outs).parent / "scalefactors_json.json").write_text(json.dumps(factors))


def wrong_indptr(outs):
    path = positions(outs).parent.parent / "filtered_feature_bc_matrix.h5"
    with h5py.File(path, "r+") as file:
        file["matrix/indptr"][-1] += 5


def tables_in_place_of_h5(outs):
    path = positions(outs).parent.parent / "filtered_feature_bc_matrix.h5"
    path.unlink()
    path.with_suffix("").mkdir()


def few_bins(outs):
    table = pd.read_parquet(positions(outs))
    near = (table["array_row"] < 6) & (table["array_col"] < 6)
    table[near].assign(in_tissue=1).to_parquet(positions(outs))


def same_place(table):
    """The number of the first row in tissue for the second one, too."""
    there = np.flatnonzero(table["in_tissue"])
    column = table["array_col"].to_numpy().copy()
    column[there[1]] = column[there[0]]
    return column


BAD = {
    "twice": (lambda o: edit(o, array_col=same_place), "lists bins more than once"),
    "letters": (lambda o: rename_barcodes(o, "s_008um_0000A_00002-1"), "'s_008um_0000A_00002-1'"),
    "tables": (tables_in_place_of_h5, "bins of HD are read from filtered_feature_bc_matrix.h5."),
    "few bins": (few_bins, "The bins reach over 48 x 48 um only, less than one spot"),
    "little tissue": (
        lambda o: edit(o, in_tissue=lambda t: (t.index == t.index[0]).astype(int)),
        "No pseudo-spot is in tissue",
    ),
    "no tissue": (lambda o: edit(o, in_tissue=lambda t: t["in_tissue"] * 0), "none of its"),
    "no column": (
        lambda o: pd.read_parquet(positions(o)).drop(columns="array_row").to_parquet(positions(o)),
        "has no column array_row",
    ),
    "not parquet": (lambda o: positions(o).write_bytes(b"barcode,in_tissue"), "no whole table"),
    "cut": (lambda o: positions(o).write_bytes(positions(o).read_bytes()[:-99]), "no whole table"),
    "empty cells": (
        lambda o: edit(o, pxl_row_in_fullres=lambda t: t["array_row"].where(t.index < 999)),
        "holds 'nan' in column pxl_row_in_fullres, data row 1000; expected a number",
    ),
    "repeated": (lambda o: edit(o, array_row=lambda t: t["array_row"] * 0), "one line"),
    "skewed": (
        lambda o: edit(o, pxl_row_in_fullres=lambda t: t["pxl_row_in_fullres"] * 1.2),
        "no square lattice",
    ),
    "other bins": (lambda o: rename_barcodes(o, "s_002um_00001_00002-1"), "expected 8 um bins"),
    "no bins": (lambda o: rename_barcodes(o, "ACGTACGTACGTACGT-1"), "expected 8 um bins"),
    "short": (lambda o: rename_barcodes(o, "A-1"), "expected 8 um bins"),
    "indptr": (wrong_indptr, "is damaged"),
    "scale": (lambda o: scale_factors(o, microns_per_pixel=0.1), "microns_per_pixel"),
    "no positions": (lambda o: positions(o).unlink(), "is missing"),
    "no folder": (lambda o: positions(o).parent.parent.rename(o / "x"), "no binned_outputs"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_folders_are_explained(tmp_path, capsys, name):
    outs, *_ = write_outs(tmp_path, 8)
    damage, words = BAD[name]
    damage(outs)
    assert prepare(tmp_path, outs) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "sample").exists()


def test_hires_image_is_refused_or_scaled(tmp_path, capsys):
    outs, *_ = write_outs(tmp_path, 8)
    hires = positions(outs).parent / "tissue_hires_image.png"
    assert prepare(tmp_path, outs, "--image", str(hires)) == 2
    assert "It is the copy of tissue_hires_scalef = 0.25" in capsys.readouterr().err
    assert prepare(tmp_path, outs) == 0
    full, *_ = read_truth(tmp_path / "sample")
    assert prepare(tmp_path, outs, "--image", str(hires), "--image-is", "hires") == 0
    um = float((tmp_path / "sample" / "pixel-size-raw.txt").read_text())
    assert um == pytest.approx(UM / HIRES_SCALE)
    np.testing.assert_allclose(read_truth(tmp_path / "sample")[0], full, atol=1e-3)


def test_folders_of_cells_are_refused_by_name(tmp_path, capsys):
    """Space Ranger 4 writes segmented_outputs beside binned_outputs, which is read."""
    outs, *_ = write_outs(tmp_path, size=16)
    cells = outs / "segmented_outputs"
    (cells / "spatial").mkdir(parents=True)
    (cells / "cell_segmentations.geojson").write_text("{}")
    assert prepare(tmp_path, outs, "--truth-genes", "0") == 0
    capsys.readouterr()
    assert prepare(tmp_path, cells) == 2
    assert "holds the cells that Space Ranger segmented" in capsys.readouterr().err
    shutil.rmtree(outs / "binned_outputs")
    assert prepare(tmp_path, outs) == 2
    assert "has segmented_outputs (cells) but no binned_outputs" in capsys.readouterr().err


@pytest.mark.parametrize("words", [(True, False), ("TRUE", "FALSE"), ("yes", "no"), (1.0, 0.0)])
def test_in_tissue_may_be_logical_or_words(tmp_path, words):
    outs, known, *_ = write_outs(tmp_path, size=16)
    path = outs / "binned_outputs" / "square_016um" / "spatial" / "tissue_positions.parquet"
    table = pd.read_parquet(path)
    table["in_tissue"] = table["in_tissue"].map({1: words[0], 0: words[1]})
    table.to_parquet(path)
    assert len(visium_hd.read_bins(path, 16.0).xy) == len(known)


def test_bins_given_to_the_script_of_visium_are_named(tmp_path, capsys):
    outs, *_ = write_outs(tmp_path, size=16)
    for folder in (outs, outs / "binned_outputs" / "square_016um"):
        options = ["--outs", str(folder), "--directory", str(tmp_path / "sample")]
        assert visium.run(options) == 2
        assert f"visium_hd.py --outs {folder} " in capsys.readouterr().err


@pytest.mark.parametrize("flip", [True, False])
def test_bins_that_lie_as_no_cytassist_puts_them_are_noted(tmp_path, flip):
    """The arrays of HD are mirrored in the image; with x and y exchanged they are not."""
    outs, *_ = write_outs(tmp_path, size=16, flip=flip)
    assert prepare(tmp_path, outs, "--truth-genes", "0") == 0
    record = json.loads((tmp_path / "sample" / "prepare.json").read_text())
    assert record["array_mirrored"] is flip
    assert any("x and y of the positions" in note for note in record["notes"]) is not flip


@pytest.mark.skipif(not REAL.is_file(), reason="files in the vendors' formats are not at hand")
def test_real_positions_of_16_um_bins():
    """A section mirrored in its image; 10x's scale factors for it say 0.27397 um per px."""
    bins = visium_hd.read_bins(REAL, 16.0)
    assert (bins.n_all, len(bins.xy)) == (175_561, 137_051)
    assert bins.extent_um == (6704.0, 6704.0)
    assert np.linalg.det(bins.array.axes) < 0  # mirrored
    assert bins.array.pixel_size_um == pytest.approx(0.27397, rel=2e-4)
    assert bins.array.residual_um < 2
    visium_hd.check_lattice(bins, REAL, 0.27397)
    table = pd.read_parquet(REAL).query("in_tissue == 1")
    row, col = visium_hd.bin_places(table["barcode"].to_numpy().astype("S"), 16.0, REAL)
    np.testing.assert_array_equal(row, table["array_row"])
    number = visium_hd.numbers(bins.index, row, col)
    np.testing.assert_array_equal(
        bins.xy[number], table[["pxl_col_in_fullres", "pxl_row_in_fullres"]]
    )
    centres = visium_hd.lattice_of_spots(bins)
    disc = visium_hd.discs_of_bins(bins, centres)
    assert lattice_pitch(centres) * bins.array.pixel_size_um == pytest.approx(100, rel=1e-3)
    per_spot = np.bincount(disc[disc >= 0])
    assert np.median(per_spot[per_spot > 0]) == pytest.approx(np.pi * 27.5**2 / 256, rel=0.1)
