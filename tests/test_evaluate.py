"""analysis/evaluate.py: scores against independent references; no way for the truth to leak."""

import json
import pickle
import shutil
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT, run
from PIL import Image
from scipy.stats import pearsonr, spearmanr
from skimage.metrics import structural_similarity

import Histology_Extractor
import utils
from analysis import evaluate

RADIUS = 3.4375  # superpixels: Visium
SHAPE = (42, 56)


def lattice(shape, pitch=8.0):
    row, col = np.mgrid[5 : shape[0] - 4 : pitch, 5 : shape[1] - 4 : pitch]
    return np.column_stack([row.ravel(), col.ravel()]) + 0.25


def smooth_fields(shape, n, seed=0):
    """Positive maps (rows, columns, n) with structure at 3 to 10 superpixels."""
    rng = np.random.default_rng(seed)
    row, col = np.mgrid[: shape[0], : shape[1]]
    fields = []
    for _ in range(n):
        waves = sum(
            np.cos(a * row / 4 + b * col / 4 + c) for a, b, c in rng.uniform(0, 2 * np.pi, (3, 3))
        )
        fields.append(np.exp(waves / 2))
    return np.stack(fields, axis=2)


@pytest.fixture(scope="module")
def _section(tmp_path_factory):
    """A folder with a perfect map of three genes, half of a corner without tissue."""
    directory = tmp_path_factory.mktemp("evaluate") / "section C"
    directory.mkdir()
    mean = 6 * smooth_fields(SHAPE, 3)
    tissue = np.add.outer(np.arange(SHAPE[0]), np.arange(SHAPE[1])) > 12
    counts = np.random.default_rng(1).poisson(mean * tissue[..., None]).astype(np.uint16)
    genes = ["A", "B", "NA"]
    np.savez(directory / "truth.npz", counts=counts, tissue=tissue, mean=mean, genes=genes)
    (directory / "gene-names.txt").write_text("\n".join(genes))
    (directory / "radius.txt").write_text(f"{RADIUS * 16}\n")
    write_maps(directory, np.where(tissue[..., None], mean, np.nan), genes)
    centres = lattice(SHAPE)
    weights = evaluate.disc_weights(centres, RADIUS, SHAPE)
    totals = weights @ np.where(tissue[..., None], mean, 0).reshape(-1, 3)
    spots = [f"{i:03d}" for i in range(len(centres))]  # ids that look like numbers
    locs = pd.DataFrame(centres[:, ::-1] * 16, index=spots, columns=["x", "y"])
    locs.to_csv(directory / "locs.csv")
    table = pd.DataFrame(totals, index=spots, columns=genes)
    table.sample(frac=1, random_state=0).to_csv(directory / "cnts.csv")
    Image.new("RGB", (56 * 16, 42 * 16)).save(directory / "he.jpg")
    Image.fromarray((tissue * 255).astype(np.uint8)).save(directory / "mask.png")
    return directory


@pytest.fixture
def section(_section, tmp_path):
    return shutil.copytree(_section, tmp_path / "section C")


def write_maps(directory, maps, genes):
    """What HISTEX.py leaves: a file per gene and index.csv; the first is .npy, others pickles."""
    folder = directory / "cnts-super"
    folder.mkdir(exist_ok=True)
    files = []
    for i in range(len(genes)):
        image = maps[:, :, i].astype(np.float32)
        files.append(f"{i}.npy" if i == 0 else f"{i}.pickle")
        if i == 0:
            np.save(folder / files[-1], image)
        else:
            (folder / files[-1]).write_bytes(pickle.dumps(image))
    pd.DataFrame({"gene": genes, "file": files}).to_csv(folder / "index.csv", index=False)


def read_table(path):
    return pd.read_csv(path, index_col=0, keep_default_na=False, na_values=[""])


# ----- correlations and errors -----
def test_pearson_is_scipys_with_stated_edge_cases():
    rng = np.random.default_rng(0)
    a, b = rng.random((30, 5)), rng.poisson(1.0, (30, 5)).astype(float)
    a[:, 3], b[:, 4] = 7.0, 2.0
    r = evaluate.pearson(a, b)
    for i in range(3):
        assert r[i] == pytest.approx(pearsonr(a[:, i], b[:, i]).statistic)
    assert r[3] == 0
    assert np.isnan(r[4])


def test_spearman_is_scipys_with_ties():
    rng = np.random.default_rng(0)
    a, b = rng.poisson(2.0, (200, 4)).astype(float), rng.poisson(1.0, (200, 4)).astype(float)
    a[:, 3] = 1.0
    rho = evaluate.spearman(a, b)
    for i in range(3):
        assert rho[i] == pytest.approx(spearmanr(a[:, i], b[:, i]).statistic)
    assert rho[3] == 0


def test_rmse_by_hand():
    a, b = np.array([[1.0, 2.0], [3.0, 2.0]]), np.array([[1.0, 0.0], [0.0, 1.0]])
    np.testing.assert_allclose(evaluate.rmse(a, b), [np.sqrt(4.5), np.sqrt(2.5)])


def test_binning_takes_the_mean_over_tissue_of_blocks_half_covered():
    maps = np.arange(20, dtype=float).reshape(4, 5, 1)  # column 4 is cut off by 2 x 2 blocks
    maps[0, 0] = np.nan
    covered = np.ones((4, 5), bool)
    covered[0, 2] = covered[2, 0] = covered[2, 1] = covered[3, 0] = False
    got = evaluate.bin_tissue(maps, covered, 2)
    # (nan as 0, 1, 5, 6); (3, 7, 8); one superpixel of four: left out; (12, 13, 17, 18)
    np.testing.assert_allclose(got[:, 0], [3.0, 6.0, 15.0])
    values, scored = evaluate.bin_maps(maps, covered, 2)
    np.testing.assert_array_equal(scored, [[True, True], [False, True]])
    np.testing.assert_allclose(values[..., 0], [[3.0, 6.0], [0.0, 15.0]])


# ----- SSIM -----
def test_ssim_of_a_map_full_of_tissue_is_skimages():
    truth, maps = smooth_fields((40, 31), 2, seed=1), smooth_fields((40, 31), 2, seed=2)
    maps = truth + 0.5 * maps
    full = np.ones((40, 31), bool)
    extent = np.ptp(truth, axis=(0, 1))
    ours = evaluate.ssim_maps(maps, truth, full, extent)
    for i in range(2):
        mean, expected = structural_similarity(
            maps[..., i], truth[..., i], data_range=extent[i], full=True
        )
        inner = np.s_[3:-3, 3:-3]  # where the whole window is on the map: what skimage averages
        np.testing.assert_allclose(ours[..., i][inner], expected[inner], atol=1e-9)
        assert ours[..., i][inner].mean() == pytest.approx(mean)
        assert evaluate.ssim(maps, truth, full)[i] == pytest.approx(ours[..., i].mean())


def test_ssim_of_the_tissue_does_not_see_the_background():
    truth, maps = smooth_fields((30, 30), 1, seed=1), smooth_fields((30, 30), 1, seed=2)
    tissue = np.zeros((30, 30), bool)
    tissue[5:22, 8:] = True
    clean = evaluate.ssim(maps, truth, tissue)
    truth[~tissue], maps[~tissue] = 50.0, -7.0
    np.testing.assert_allclose(evaluate.ssim(maps, truth, tissue), clean)
    assert evaluate.ssim(truth, truth, tissue) == pytest.approx(1.0)
    # by hand, one superpixel: its window is cut by the tissue to rows 5..8, columns 8..11
    extent = np.ptp(truth[tissue], axis=0)
    a, b = maps[5:9, 8:12, 0].ravel(), truth[5:9, 8:12, 0].ravel()
    cov = np.cov(a, b)
    c1, c2 = (0.01 * extent[0]) ** 2, (0.03 * extent[0]) ** 2
    expected = (2 * a.mean() * b.mean() + c1) * (2 * cov[0, 1] + c2)
    expected /= (a.mean() ** 2 + b.mean() ** 2 + c1) * (cov[0, 0] + cov[1, 1] + c2)
    assert evaluate.ssim_maps(maps, truth, tissue, extent)[5, 8, 0] == pytest.approx(expected)
    assert np.isnan(evaluate.ssim(maps, np.ones_like(truth), tissue)).all()


def test_published_protocol_is_that_of_the_whole_map_scaled_by_itself():
    truth, maps = smooth_fields((30, 30), 1, seed=1), smooth_fields((30, 30), 1, seed=2)
    maps[:10] = np.nan
    error, similar = evaluate.published_protocol(maps, truth)
    a, b = np.nan_to_num(maps[..., 0]), truth[..., 0]
    a, b = ((x - x.min()) / (x.max() - x.min()) for x in (a, b))
    assert error[0] == pytest.approx(np.sqrt(np.mean((a - b) ** 2)))
    assert similar[0] == pytest.approx(structural_similarity(a, b, data_range=1.0))
    again, _ = evaluate.published_protocol(9 * np.nan_to_num(maps) + 2, truth)
    assert again[0] == pytest.approx(error[0])  # any scale will do: the fault of this protocol
    assert np.isfinite(evaluate.published_protocol(np.zeros_like(maps), truth)).all()


# ----- ceilings -----
@pytest.fixture(scope="module")
def noisy():
    mean = smooth_fields((120, 120), 3, seed=3) * [0.3, 1.0, 5.0]
    counts = np.random.default_rng(2).poisson(mean).astype(np.float32)
    return evaluate.Truth(counts, np.ones((120, 120), bool), ["a", "b", "c"], mean=mean)


def test_ceilings_by_halves_agree_with_the_known_mean(noisy):
    known = evaluate.score(noisy, {})
    halves = evaluate.score(evaluate.Truth(noisy.counts, noisy.tissue, noisy.genes), {})
    assert list(known) == list(halves)
    for name in known:
        tolerance = {"rel": 0.05} if "rmse" in name else {"abs": 0.06}
        np.testing.assert_allclose(
            halves[name], known[name], rtol=tolerance.get("rel", 0), atol=tolerance.get("abs", 0),
            err_msg=name,
        )  # fmt: skip
    for size in evaluate.BINS:
        alone = evaluate.thinning_ceiling(noisy.counts, noisy.tissue, size)
        np.testing.assert_allclose(alone, halves[f"ceiling_{size}x"])


def test_halves_are_whole_counts_and_do_not_depend_on_the_other_genes(noisy):
    first, second = evaluate.thin(noisy.counts)
    np.testing.assert_array_equal(first + second, noisy.counts)
    assert abs(first.sum() / noisy.counts.sum() - 0.5) < 0.01
    np.testing.assert_array_equal(evaluate.thin(noisy.counts[..., 1:2])[0], first[..., 1:2])


def test_fractions_of_superpixels_tell_no_ceiling():
    counts = np.random.default_rng(0).poisson(3.0, (12, 12, 2)) * 0.5
    tissue = np.ones((12, 12), bool)
    assert np.isnan(evaluate.thinning_ceiling(counts, tissue, 1)).all()
    assert np.isfinite(evaluate.thinning_ceiling(counts, tissue, 4)).all()
    table = evaluate.score(evaluate.Truth(counts, tissue, ["a", "b"]), {})
    known = {name for name in table if table[name].notna().any()}
    assert known == {"ceiling_2x", "ceiling_4x", "ceiling_rho_2x", "ceiling_rho_4x"}
    summary = {"histex": {"1x": 0.5, "4x": 0.75}, "ceiling": {"1x": None, "4x": 0.8}}
    assert evaluate.report(summary, 2).splitlines()[-1].split()[-2:] == ["unknown", "0.800"]


# ----- interpolation -----
def test_interpolation_keeps_spots_and_planes_and_takes_the_nearest_outside():
    centres = np.array([[2.5, 2.5], [2.5, 12.5], [12.5, 2.5], [12.5, 12.5], [7.5, 7.5]])
    counts = np.column_stack([2 * centres[:, 0] + 3 * centres[:, 1], [1.0, 2, 3, 4, 5]])
    nearest, linear = evaluate.interpolate_spots(centres, counts, (16, 16))
    row, col = np.mgrid[:16, :16] + 0.5
    inside = (row >= 2.5) & (row <= 12.5) & (col >= 2.5) & (col <= 12.5)
    np.testing.assert_allclose(linear[inside, 0], (2 * row + 3 * col)[inside])
    distance = np.hypot(row[..., None] - centres[:, 0], col[..., None] - centres[:, 1])
    unique = np.sort(distance, axis=2)[..., 1] - distance.min(2) > 1e-9
    np.testing.assert_array_equal(nearest[unique, 1], distance.argmin(2)[unique] + 1.0)
    np.testing.assert_array_equal(linear[~inside], nearest[~inside])


# ----- spot totals -----
def test_discs_have_their_area_and_lie_where_the_spot_is():
    centres = np.array([[10.3, 12.9], [0.2, 5.0], [10.3, 12.9]])
    weights = evaluate.disc_weights(centres, RADIUS, (20, 24)).toarray().reshape(3, 20, 24)
    area = np.pi * RADIUS**2
    assert weights[0].sum() == pytest.approx(area, rel=0.005)
    assert weights[1].sum() == pytest.approx(area / 2, rel=0.08)  # half of it is beyond the edge
    row, col = np.mgrid[:20, :24] + 0.5
    assert (weights[0] * row).sum() / weights[0].sum() == pytest.approx(10.3, abs=0.01)
    assert (weights[0] * col).sum() / weights[0].sum() == pytest.approx(12.9, abs=0.01)
    assert weights[0, 10, 12] == 1
    fine = (np.mgrid[:2000, :2400] + 0.5) / 100
    inside = np.hypot(fine[0] - 10.3, fine[1] - 12.9) <= RADIUS
    exact = inside.reshape(20, 100, 24, 100).mean((1, 3))
    np.testing.assert_allclose(weights[0], exact, atol=0.06)


def test_totals_of_a_map_with_a_hole():
    weights = evaluate.disc_weights(np.array([[10.0, 10.0], [10.0, 30.0]]), RADIUS, (20, 40))
    maps = np.full((20, 40, 2), 2.0)
    maps[:, 30:] = np.nan  # half of the second disc
    maps[..., 1] *= 3
    area = np.pi * RADIUS**2
    expected = np.array([[2, 6], [1, 3]]) * area
    np.testing.assert_allclose(evaluate.sum_discs(weights, maps), expected, rtol=0.01)
    np.testing.assert_array_equal(evaluate.on_tissue(weights, maps[..., 0], RADIUS), [True, True])
    maps[:, 28:] = np.nan  # a twelfth of it is left
    np.testing.assert_array_equal(evaluate.on_tissue(weights, maps[..., 0], RADIUS), [True, False])


# ----- seams -----
def seams_of(maps):
    return evaluate.score_seams(evaluate.line_gradients(maps))


def test_line_gradients_by_hand():
    maps = np.array([[[1.0], [3.0], [np.nan]], [[2.0], [7.0], [4.0]]])
    (down, n_down), (across, n_across) = evaluate.line_gradients(maps)
    np.testing.assert_array_equal(down, [[1.0 + 4.0]])  # the column of the NaN does not count
    np.testing.assert_array_equal(n_down, [2])
    np.testing.assert_array_equal(across, [[2.0 + 5.0], [3.0]])
    np.testing.assert_array_equal(n_across, [2, 1])


@pytest.mark.parametrize("period", [5, 7, 8, 14, 16])
def test_a_planted_seam_is_found_at_its_own_grid(period):
    rng = np.random.default_rng(0)
    maps = rng.normal(10, 1, (140, 168, 4))
    block = np.add.outer(np.arange(140) // period, np.arange(168) // period) % 2
    maps[:, :, :3] += 1.0 * block[..., None]
    together, by_gene = seams_of(maps)
    found = together[f"every {period}, {evaluate.PERIODS[period]}"]
    assert found["rank"] == 1
    assert found["z"] > 8
    # a step of 1 on a normal difference of sd sqrt(2): E|N(1, 2)| / E|N(0, 2)| - 1 = 0.2408
    assert found["excess"] == pytest.approx(0.75 * 0.2408, abs=0.03)
    if period in (7, 14):
        np.testing.assert_allclose(by_gene[f"seam_{period}"][:3], 0.2408, atol=0.05)
        assert abs(by_gene[f"seam_{period}"][3]) < 0.03
    moved, _ = seams_of(np.roll(maps, 3, axis=(0, 1)))
    assert moved[f"every {period}, {evaluate.PERIODS[period]}"]["rank"] > 1


def test_without_a_seam_the_rank_is_random():
    ranks = []
    for seed in range(40):
        maps = np.random.default_rng(seed).normal(10, 1, (56, 56, 1))
        ranks.append(seams_of(maps)[0]["every 7, published blocks"]["rank"])
    assert 3 < np.mean(ranks) < 5  # uniform on 1..7: 4 +- 0.32
    assert len(set(ranks)) == 7


def test_tile_borders_are_those_of_the_extractor():
    vit, cnn = Histology_Extractor.VIT_TILING, Histology_Extractor.CNN_TILING
    assert list(evaluate.TILINGS.values()) == [(t.tile, t.overlap) for t in (vit, cnn)]
    for tiling in (vit, cnn):
        for extent in (14, 42, 98, 266, 294):
            starts = np.array(tiling.starts(extent))
            lines = evaluate.tile_lines(extent, tiling.tile, tiling.overlap)
            assert len(lines) == len(starts) - 1
            assert (lines >= starts[1:] - 1).all()  # within the overlap of the two tiles
            assert (lines <= starts[:-1] + tiling.tile - 1).all()
    rng = np.random.default_rng(0)
    lines = evaluate.tile_lines(266, 42, 10)
    maps = rng.normal(10, 1, (266, 266, 2))
    maps += (np.arange(266)[:, None] > lines).sum(1)[:, None, None] * 1.0  # a step at each border
    assert seams_of(maps)[0]["CNN tiles of 42"]["rank"] == 1


def test_maps_without_gradients_or_too_small_for_a_grid_have_no_seam():
    together, _ = seams_of(np.ones((56, 56, 2)))
    assert together["every 7, published blocks"]["excess"] is None
    together, _ = seams_of(np.random.default_rng(0).normal(size=(14, 14, 2)))
    assert together["every 14, tiles of 224 px"]["excess"] is None


# ----- the command -----
def test_perfect_maps_reach_the_ceiling_and_sum_to_the_spots(section, capsys):
    assert evaluate.main(["--directory", str(section)]) == 0
    table = read_table(section / "evaluation.csv")
    assert list(table.index) == ["A", "B", "NA"]
    for measure in evaluate.MEASURES:
        for size in evaluate.BINS:
            ours, best = (evaluate.column(m, measure, size) for m in ("histex", "ceiling"))
            np.testing.assert_allclose(table[ours], table[best], atol=1e-4)
            worse = table[evaluate.column("linear", measure, size)]
            assert ((worse > table[best]) if measure == "rmse" else (worse < table[best])).all()
    saved = np.load(section / "truth.npz")
    covered = saved["tissue"]
    a, b = saved["mean"][covered][:, 0], saved["counts"][covered][:, 0]
    assert table["histex_1x"].iloc[0] == pytest.approx(pearsonr(a, b).statistic, abs=1e-4)
    rmse = np.sqrt(np.mean((a - b) ** 2))
    assert table["histex_rmse_1x"].iloc[0] == pytest.approx(rmse, abs=1e-4)
    np.testing.assert_allclose(table["totals_r"], 1, atol=1e-4)
    np.testing.assert_allclose(table["totals_ratio"], 1, atol=1e-4)
    np.testing.assert_allclose(table["mean_count"], saved["counts"][covered].mean(0), atol=1e-4)
    facts = json.loads((section / "evaluation.json").read_text())
    assert facts["genes"] == 3
    assert facts["tissue without map"] == 0
    assert facts["median r"]["histex"]["4x"] == pytest.approx(table["histex_4x"].median(), abs=1e-4)
    assert facts["spot totals"]["median r"] == 1
    printed = capsys.readouterr().out
    for word in ("Pearson", "Spearman", "SSIM", "RMSE", "ceiling", "published", "seams", "100.0%"):
        assert word in printed
    picture = np.asarray(Image.open(section / "evaluation.png"))
    assert picture.std() > 20


def test_scores_do_not_depend_on_how_many_genes_are_read_at_a_time(section, monkeypatch):
    assert evaluate.main(["--directory", str(section), "--no-plot"]) == 0
    assert not (section / "evaluation.png").exists()
    whole = (section / "evaluation.csv").read_bytes()
    monkeypatch.setattr(evaluate, "VALUES_AT_A_TIME", 1)
    other = section.parent / "results of A"
    assert evaluate.main(["--directory", str(section), "--no-plot", "--output", str(other)]) == 0
    assert (other / "evaluation.csv").read_bytes() == whole


def test_scores_collapse_when_the_truth_is_shuffled(section):
    saved = dict(np.load(section / "truth.npz"))
    del saved["mean"]
    rng = np.random.default_rng(0)
    covered = saved["tissue"]
    saved["counts"][covered] = rng.permutation(saved["counts"][covered])
    np.savez(section / "truth.npz", **saved)
    assert evaluate.main(["--directory", str(section), "--no-plot"]) == 0
    table = read_table(section / "evaluation.csv")
    for method in ("histex", "linear", "nearest"):
        for measure in ("r", "rho"):
            assert table[evaluate.column(method, measure, 1)].abs().max() < 0.08
            assert table[evaluate.column(method, measure, 4)].abs().max() < 0.35  # of 140 blocks
    assert table["ceiling_1x"].min() > 0.5  # the noise is what it was


def test_truth_in_counts_of_all_molecules_is_compared_on_the_scale_of_the_spots(section):
    assert evaluate.main(["--directory", str(section), "--no-plot"]) == 0
    before = read_table(section / "evaluation.csv")
    saved = dict(np.load(section / "truth.npz"))
    np.savez(section / "truth.npz", **saved, capture=0.5)
    images = np.stack(list(evaluate.read_maps(section, ["A", "B", "NA"]).values()), axis=2)
    write_maps(section, images / 2, ["A", "B", "NA"])
    assert evaluate.main(["--directory", str(section), "--no-plot"]) == 0
    after = read_table(section / "evaluation.csv")
    for method in ("histex", "ceiling"):
        for size in evaluate.BINS:
            for measure in ("r", "rho", "ssim"):
                name = evaluate.column(method, measure, size)
                np.testing.assert_allclose(after[name], before[name], atol=2e-5)
            name = evaluate.column(method, "rmse", size)
            np.testing.assert_allclose(after[name], before[name] / 2, atol=2e-5)
    np.testing.assert_allclose(after["totals_ratio"], 0.5, atol=1e-4)


# ----- genes_3D.pkl -----
@pytest.mark.parametrize("first", [False, True])
def test_published_truth_is_read_whichever_end_the_genes_are_at(section, first):
    saved = dict(np.load(section / "truth.npz"))
    (section / "truth.npz").unlink()
    counts = np.moveaxis(saved["counts"], 2, 0) if first else saved["counts"]
    (section / "genes_3D.pkl").write_bytes(pickle.dumps(np.ascontiguousarray(counts)))
    truth = evaluate.read_truth(section)
    np.testing.assert_array_equal(truth.counts, saved["counts"])
    np.testing.assert_array_equal(truth.tissue, saved["tissue"])
    assert truth.genes == ["A", "B", "NA"]
    assert evaluate.main(["--directory", str(section), "--no-plot"]) == 0
    table = read_table(section / "evaluation.csv")
    assert table["histex_4x"].min() > 0.7
    assert (table["histex_1x"] < table["ceiling_1x"] + 0.05).all()


class Canary:
    def __reduce__(self):
        return (sys.exit, ("code ran",))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (np.zeros((3, 20, 3)), "both its first and its last axis fit"),
        (np.zeros((42, 56, 5)), "neither end"),
        (np.zeros((42, 3, 56)), "neither end"),
        (np.zeros((42, 56)), "three axes"),
        ({"counts": np.zeros((42, 56, 3))}, "three axes"),
        (np.full((42, 56, 3), -1.0), "negative"),
        (np.ones((99, 99, 3)), "smaller than the truth"),
        (Canary(), "not a pickled numpy array"),
    ],
)
def test_a_published_truth_that_cannot_be_understood_is_refused(section, capsys, content, message):
    (section / "truth.npz").unlink()
    (section / "genes_3D.pkl").write_bytes(pickle.dumps(content))
    assert evaluate.main(["--directory", str(section), "--no-plot"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert not list(section.glob("evaluation*"))


# ----- bad input -----
def damage(section, what):
    if what == "no truth":
        (section / "truth.npz").unlink()
    elif what == "cut truth":
        path = section / "truth.npz"
        path.write_bytes(path.read_bytes()[:3000])
    elif what == "wrong shape":
        np.savez(section / "truth.npz", counts=np.ones((42, 56, 2)), tissue=np.ones((42, 56)))
    elif what == "no tissue":
        np.savez(section / "truth.npz", counts=np.ones((42, 56, 3)), tissue=np.zeros((42, 56)))
    elif what == "other genes":
        saved = {"counts": np.ones((42, 56, 1)), "tissue": np.ones((42, 56)), "genes": ["X"]}
        np.savez(section / "truth.npz", **saved)
    elif what == "larger truth":
        saved = {"counts": np.ones((60, 56, 3)), "tissue": np.ones((60, 56))}
        np.savez(section / "truth.npz", **saved)
    elif what == "no maps":
        shutil.rmtree(section / "cnts-super")
    elif what == "odd map":
        np.save(section / "cnts-super" / "0.npy", np.ones((50, 70), np.float32))
    elif what == "cut map":
        (section / "cnts-super" / "0.npy").write_bytes(b"\x93NUMPY")
    elif what == "no radius":
        (section / "radius.txt").unlink()
    elif what == "no counts":
        (section / "cnts.csv").unlink()
    elif what == "gene without counts":
        path = section / "cnts.csv"
        pd.read_csv(path, index_col=0, dtype={0: str}).drop(columns="B").to_csv(path)


@pytest.mark.parametrize(
    ("what", "messages"),
    [
        ("no truth", ["truth.npz is missing", "demo/simulate.py", "--holdout"]),
        ("cut truth", ["truth.npz is not a whole"]),
        ("wrong shape", ["truth.npz", "(42, 56, 2)", "(42, 56, 3)"]),
        ("no tissue", ["truth.npz", "no tissue"]),
        ("other genes", ["cnts-super", "no map of a gene"]),
        ("larger truth", ["0.npy", "smaller than the truth", "image_calibration.py"]),
        ("no maps", ["index.csv is missing", "HISTEX.py"]),
        ("odd map", ["1.pickle", "(42, 56)", "other maps are not"]),
        ("cut map", ["0.npy", "not a whole map"]),
        ("no radius", ["radius.txt", "missing", "image_calibration.py"]),
        ("no counts", ["cnts.csv", "missing"]),
        ("gene without counts", ["cnts.csv", "lacks 1 of the 3 genes", "B"]),
    ],
)
def test_bad_input_is_named_and_old_results_stay(section, capsys, what, messages):
    (section / "evaluation.csv").write_text("old")
    damage(section, what)
    assert evaluate.main(["--directory", str(section)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    for message in messages:
        assert message in error
    assert (section / "evaluation.csv").read_text() == "old"
    assert not (section / "evaluation.json").exists()


def test_without_matplotlib_the_command_says_so_before_any_work(section, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert evaluate.main(["--directory", str(section)]) == 2
    assert "pip install -r analysis/requirements.txt" in capsys.readouterr().err


def test_the_script_runs_by_itself_and_needs_no_network_library(section):
    code = (
        "import sys, runpy; sys.argv = ['evaluate.py', '--directory', sys.argv[1], '--no-plot']\n"
        f"try: runpy.run_path({str(ROOT / 'analysis' / 'evaluate.py')!r}, run_name='__main__')\n"
        "except SystemExit as done: assert done.code == 0, done.code\n"
        "assert not {'torch', 'matplotlib'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(section)],
        capture_output=True,
        text=True,
        cwd=section,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (section / "evaluation.json").is_file()


# ----- left-out spots -----
def test_folds_hold_every_spot_once():
    fold = evaluate.choose_folds(23, 5, seed=3)
    assert sorted(np.bincount(fold)) == [4, 4, 5, 5, 5]
    np.testing.assert_array_equal(fold, evaluate.choose_folds(23, 5, seed=3))
    assert (fold != evaluate.choose_folds(23, 5, seed=4)).any()


def fold_files(sample, folder, kept):
    """All that the stages could read in the folder of a fold, by name."""
    folder.mkdir()
    stage = evaluate.open_sample(sample)
    locs, counts = evaluate.read_tables(stage, evaluate.read_gene_names(sample))
    evaluate.make_fold(stage, folder, locs, counts, kept)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_left_out_spot_is_in_no_file_that_its_prediction_is_made_from(finished, tmp_path):
    counts = pd.read_csv(finished / "cnts.csv", index_col=0)
    kept = evaluate.choose_folds(len(counts), 3, seed=0) != 1
    before = fold_files(finished, tmp_path / "one", kept)
    counts[~kept] = 9999  # locs.csv and cnts.csv of this sample are in one order
    counts.to_csv(finished / "cnts.csv")
    after = fold_files(finished, tmp_path / "two", kept)
    assert before == after  # not one bit of any file depends on the left-out counts
    names = {"cnts.csv", "locs.csv", "gene-names.txt", "Histology_feature_map.npy", "mask.png"}
    assert names < before.keys()
    results = ("HRcnts.npy", "HRlocs.csv", "states", "cnts-super", "held-out-r.csv", "get_HR.json")
    assert not set(results) & before.keys()
    left_out = counts.index[~kept]
    for name in ("locs.csv", "cnts.csv"):
        table = pd.read_csv(tmp_path / "one" / name, index_col=0)
        assert list(table.index) == list(counts.index[kept])
        assert not any(spot.encode() in before[name] for spot in left_out)


@pytest.mark.slow
def test_holdout_predicts_every_spot_from_maps_made_without_it(finished, capsys):
    table = pd.read_csv(finished / "cnts.csv", index_col=0)
    locs = pd.read_csv(finished / "locs.csv", index_col=0).loc[table.index]
    table[:] = np.random.default_rng(0).poisson(locs[["x"]].to_numpy() / 20 + 10 * np.ones((1, 8)))
    table.to_csv(finished / "cnts.csv")
    (finished / "get_HR.json").unlink()  # with it, gene-names.txt would be out of date
    names = {path.name for path in finished.iterdir()}
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    options = ["--holdout", "2", "--histex", "--epochs 1 --n-states 1 --map-format npy"]
    assert evaluate.main(["--directory", str(finished), *options]) == 0

    scores = read_table(finished / "evaluation-holdout.csv")
    assert list(scores.index) == list(table)
    assert scores["histex_spots"].median() > 0.5
    assert scores["ratio"].between(0.6, 1.4).all()
    facts = json.loads((finished / "evaluation-holdout.json").read_text())
    assert (facts["spots"], facts["spots without tissue"], facts["folds"]) == (22, 0, 2)
    assert facts["options of HISTEX.py"] == options[-1]
    made = {f"evaluation-holdout.{kind}" for kind in ("csv", "json", "png")}
    assert {path.name for path in finished.iterdir()} == names | made
    assert all(path.read_bytes() == content for path, content in before.items())
    assert "left-out spots" in capsys.readouterr().out

    # nearest spot of the other fold, by brute force; of equally near ones, either will do
    fold = evaluate.choose_folds(22, 2, seed=0)
    distance = np.linalg.norm(locs.to_numpy()[:, None] - locs.to_numpy(), axis=2)
    distance[fold[:, None] == fold] = np.inf
    allowed = distance <= distance.min(1, keepdims=True) + 1e-6
    low, high = (
        pick(np.where(allowed[..., None], table.to_numpy(float), fill), axis=1)
        for pick, fill in ((np.min, np.inf), (np.max, -np.inf))
    )
    centres = locs[["y", "x"]].to_numpy()
    for i in range(2):
        known, out = fold != i, fold == i
        nearest, linear = evaluate.interpolate_at(
            centres[known], table.to_numpy(float)[known], centres[out]
        )
        assert (nearest >= low[out]).all()
        assert (nearest <= high[out]).all()
        assert np.isfinite(linear).all()


def test_a_stage_that_fails_is_named_with_its_message(finished):
    with pytest.raises(utils.StageError) as stop:
        evaluate.run_script("get_HR.py", finished, ["--n-genes", "0"])
    assert "get_HR.py ended with 2" in str(stop.value)
    assert "must be 1 or more" in str(stop.value)


def test_a_failing_fold_leaves_nothing_behind(finished, monkeypatch, capsys):
    names = {path.name for path in finished.iterdir()}

    def fail(script, folder, options):
        assert (folder / "cnts.csv").is_file()
        assert folder.parent == finished
        raise utils.StageError(f"{script} ended", "mend it")

    monkeypatch.setattr(evaluate, "run_script", fail)
    assert evaluate.main(["--directory", str(finished), "--holdout", "2", "--no-plot"]) == 2
    assert "get_HR.py ended" in capsys.readouterr().err
    assert {path.name for path in finished.iterdir()} == names


@pytest.mark.parametrize(
    ("what", "message"),
    [("1", "expected 2 to"), ("999", "expected 2 to"), ("stale", "out of date")],
)
def test_holdout_checks_its_sample_first(finished, capsys, what, message):
    if what == "stale":
        (finished / "pixel-size-raw.txt").write_text("0.51\n")
    folds = "2" if what == "stale" else what
    assert evaluate.main(["--directory", str(finished), "--holdout", folds, "--no-plot"]) == 2
    assert message in capsys.readouterr().err


def test_holdout_takes_the_options_of_the_last_run(finished):
    stage = evaluate.open_sample(finished)
    assert "--epochs" in evaluate.recorded_options(stage)
    (finished / utils.record_name(utils.HISTEX)).unlink()
    assert evaluate.recorded_options(stage) == []


def test_a_mask_of_ones_hand_will_do_for_holdout(finished, tmp_path):
    image = np.asarray(Image.open(finished / "mask.png")).copy()
    image[:4] = 255
    Image.fromarray(image).save(finished / "mask.png")
    kept = np.arange(len(pd.read_csv(finished / "locs.csv"))) % 3 > 0
    fold_files(finished, tmp_path / "fold", kept)
    assert run("get_HR.py", tmp_path / "fold") == 0
    stage = evaluate.open_sample(tmp_path / "fold")
    stage.require(utils.HR_LOCS, utils.HR_CNTS, utils.LOCS, utils.FEATURES, utils.MASK)
