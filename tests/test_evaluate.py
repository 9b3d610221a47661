"""analysis/evaluate.py: scores against independent references; no way for the truth to leak."""

import json
import os
import pickle
import shutil
import sys

import numpy as np
import pandas as pd
import pytest
from conftest import make_stage, run, run_alone
from PIL import Image
from scipy.interpolate import LinearNDInterpolator, NearestNDInterpolator
from scipy.ndimage import gaussian_filter
from scipy.stats import pearsonr, spearmanr
from skimage.metrics import structural_similarity

import HISTEX
import Histology_Extractor
import utils
from analysis import evaluate, holdout, inputs, scores, seams, spots, uncertainty
from method import prediction
from writing import disk

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
    weights = spots.disc_weights(centres, RADIUS, SHAPE)
    totals = weights @ np.where(tissue[..., None], mean, 0).reshape(-1, 3)
    ids = [f"{i:03d}" for i in range(len(centres))]  # ids that look like numbers
    locs = pd.DataFrame(centres[:, ::-1] * 16, index=ids, columns=["x", "y"])
    locs.to_csv(directory / "locs.csv")
    table = pd.DataFrame(totals, index=ids, columns=genes)
    table.sample(frac=1, random_state=0).to_csv(directory / "cnts.csv")
    Image.new("RGB", (56 * 16, 42 * 16)).save(directory / "he.jpg")
    Image.fromarray((tissue * 255).astype(np.uint8)).save(directory / "mask.png")
    return directory


@pytest.fixture
def section(_section, tmp_path):
    return shutil.copytree(_section, tmp_path / "section C")


def write_maps(directory, maps, genes, name="cnts-super"):
    """What HISTEX.py leaves: a file per gene and index.csv; the first is .npy, others pickles."""
    folder = directory / name
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
    a, b = rng.random(30), rng.poisson(1.0, 30).astype(float)
    assert scores.pearson(a, b) == pytest.approx(pearsonr(a, b).statistic)
    assert scores.pearson(np.full(30, 7.0), b) == 0
    assert np.isnan(scores.pearson(a, np.full(30, 2.0)))
    assert np.isnan(scores.pearson(a[:0], b[:0]))


@pytest.mark.parametrize("scale", [1e-9, 1e-4, 1.0, 1e6])
def test_pearson_does_not_depend_on_the_unit(scale):
    rng = np.random.default_rng(0)
    a, b = rng.random(140), rng.random(140)
    assert scores.pearson(a * scale, b) == pytest.approx(scores.pearson(a, b))
    assert scores.pearson(a, b * scale) == pytest.approx(scores.pearson(a, b))
    flat = scale * (1 + 1e-9 * rng.random(140))  # as a constant that went through arithmetic
    assert scores.pearson(flat, b) == 0


def target_of(counts):
    return scores.Target(counts, scores.Blocks(np.ones(counts.shape, bool), 1))


def test_spearman_is_scipys_with_ties():
    rng = np.random.default_rng(0)
    a, b = rng.poisson(2.0, (20, 10)).astype(float), rng.poisson(1.0, (20, 10)).astype(float)
    assert target_of(b).rho(a) == pytest.approx(spearmanr(a.ravel(), b.ravel()).statistic)
    assert target_of(b).rho(np.ones((20, 10))) == 0


def test_rmse_by_hand():
    assert scores.rmse(np.array([1.0, 3.0]), np.array([1.0, 0.0])) == pytest.approx(np.sqrt(4.5))


def test_binning_takes_the_mean_over_tissue_of_blocks_half_covered():
    image = np.arange(20, dtype=np.float32).reshape(4, 5)  # column 4 is cut off by 2 x 2 blocks
    image[0, 0] = np.nan
    covered = np.ones((4, 5), bool)
    covered[0, 2] = covered[2, 0] = covered[2, 1] = covered[3, 0] = False
    blocks = scores.Blocks(covered, 2)
    # (nan as 0, 1, 5, 6); (3, 7, 8); one superpixel of four: left out; (12, 13, 17, 18)
    np.testing.assert_array_equal(blocks.scored, [[True, True], [False, True]])
    np.testing.assert_allclose(blocks.mean(image), [[3.0, 6.0], [0.0, 15.0]])
    np.testing.assert_allclose(blocks.total(image), [[12.0, 18.0], [0.0, 60.0]])
    image[0, 0] = np.inf
    np.testing.assert_allclose(blocks.mean(image)[0, 0], 3.0)


def score_by_hand(image, counts, tissue, size):
    """r, rho and RMSE in blocks, by loops."""
    a, b = [], []
    for row in range(0, tissue.shape[0] - size + 1, size):
        for col in range(0, tissue.shape[1] - size + 1, size):
            places = [
                (i, j)
                for i in range(row, row + size)
                for j in range(col, col + size)
                if tissue[i, j]
            ]
            if places and len(places) >= size * size / 2:
                filled = [0 if np.isnan(image[p]) else image[p] for p in places]
                a.append(sum(filled) / len(places))
                b.append(sum(int(counts[p]) for p in places) / len(places))
    error = np.sqrt(np.mean((np.array(a) - np.array(b)) ** 2))
    return pearsonr(a, b).statistic, spearmanr(a, b).statistic, error


@pytest.mark.parametrize("size", scores.BINS)
def test_scores_are_those_of_loops(size):
    rng = np.random.default_rng(size)
    tissue = rng.random((31, 42)) < 0.6
    image = rng.random((31, 42)).astype(np.float32)
    counts = rng.poisson(2 * image).astype(np.uint16)
    image[rng.random((31, 42)) < 0.1] = np.nan
    got = scores.score_gene(counts, {"x": image}, scores.make_blocks(tissue))
    found = [got[scores.column("x", measure, size)] for measure in ("r", "rho", "rmse")]
    np.testing.assert_allclose(found, score_by_hand(image, counts, tissue, size))


def test_the_capture_changes_no_rank():
    rng = np.random.default_rng(0)
    counts, tissue = rng.poisson(0.7, (40, 40)), np.ones((40, 40), bool)
    grids, image = scores.make_blocks(tissue), rng.random((40, 40))
    whole, part = (
        scores.score_gene(counts, {"x": image}, grids, capture=c, measures=("r", "rho", "ssim"))
        for c in (1.0, 0.35)
    )
    for name in whole:
        if "ssim" not in name:
            assert part[name] == pytest.approx(whole[name], rel=1e-12), name


def test_a_gene_that_is_constant_in_the_truth_has_no_score_but_an_error():
    tissue, image = np.ones((20, 20), bool), np.random.default_rng(0).random((20, 20))
    got = scores.score_gene(np.zeros((20, 20), np.uint16), {"x": image}, scores.make_blocks(tissue))
    known = {name for name, value in got.items() if np.isfinite(value)}
    assert known == {
        scores.column(name, "rmse", size) for name in ("x", "ceiling") for size in scores.BINS
    }
    tissue[4:] = tissue[:, 1:] = False  # four superpixels: no block of 4 x 4 is half tissue
    got = scores.score_gene(np.ones((20, 20)), {"x": image}, scores.make_blocks(tissue))
    assert np.isnan([value for name, value in got.items() if name.endswith("4x")]).all()


# ----- SSIM -----
def test_ssim_of_a_map_full_of_tissue_is_skimages():
    truth, image = smooth_fields((40, 31), 1, seed=1)[..., 0], smooth_fields((40, 31), 1, seed=2)
    image = truth + 0.5 * image[..., 0]
    target = target_of(truth)
    ours = scores.ssim_map(image, truth, target.blocks.windows, np.ptp(truth))
    mean, expected = structural_similarity(image, truth, data_range=np.ptp(truth), full=True)
    inner = np.s_[3:-3, 3:-3]  # where the whole window is on the map: what skimage averages
    np.testing.assert_allclose(ours[inner], expected[inner], atol=1e-9)
    assert ours[inner].mean() == pytest.approx(mean)
    assert target.ssim(image) == pytest.approx(ours.mean())


def test_ssim_of_the_tissue_is_that_of_loops_and_does_not_see_the_background():
    truth, image = (smooth_fields((18, 20), 1, seed=seed)[..., 0] for seed in (1, 2))
    tissue = np.random.default_rng(0).random((18, 20)) < 0.7
    truth[~tissue], image[~tissue] = 50.0, -7.0
    blocks = scores.Blocks(tissue, 1)
    extent = np.ptp(truth[tissue])
    c1, c2 = (0.01 * extent) ** 2, (0.03 * extent) ** 2
    by_hand = []
    for row, col in np.argwhere(tissue):
        window = np.s_[max(row - 3, 0) : row + 4, max(col - 3, 0) : col + 4]
        a, b = image[window][tissue[window]], truth[window][tissue[window]]
        cov = np.cov(a, b)
        same = (2 * a.mean() * b.mean() + c1) * (2 * cov[0, 1] + c2)
        by_hand.append(same / ((a.mean() ** 2 + b.mean() ** 2 + c1) * (cov[0, 0] + cov[1, 1] + c2)))
    target = scores.Target(truth, blocks)
    assert target.ssim(blocks.mean(image)) == pytest.approx(np.mean(by_hand))
    assert target.ssim(target.image) == pytest.approx(1.0)
    assert np.isnan(target_of(np.ones((18, 20))).ssim(image))


def test_published_protocol_is_that_of_the_whole_map_scaled_by_itself():
    truth, image = (smooth_fields((30, 33), 1, seed=seed)[..., 0] for seed in (1, 2))
    image[:10] = np.nan
    error, similar = scores.published_protocol(image, truth)
    a, b = np.nan_to_num(image), truth
    a, b = ((x - x.min()) / (x.max() - x.min()) for x in (a, b))
    assert error == pytest.approx(np.sqrt(np.mean((a - b) ** 2)))
    assert similar == pytest.approx(structural_similarity(a, b, data_range=1.0))
    again, _ = scores.published_protocol(9 * np.nan_to_num(image) + 2, truth)
    assert again == pytest.approx(error)  # any scale will do: the fault of this protocol
    assert np.isfinite(scores.published_protocol(np.zeros_like(image), truth)).all()


# ----- ceilings -----
def test_best_r_is_that_of_random_halves():
    rng = np.random.default_rng(0)
    counts = rng.poisson(rng.gamma(2.0, 0.4, 3000))
    halves = [rng.binomial(counts, 0.5) for _ in range(300)]
    r = np.mean([pearsonr(half, counts - half).statistic for half in halves])
    assert scores.best_r_of_counts(counts) == pytest.approx(np.sqrt(2 * r / (1 + r)), abs=2e-3)
    # var(expectation) / var(counts) = (2 * 0.4^2) / (2 * 0.4^2 + 0.8), up to the counts' own noise
    assert scores.best_r_of_counts(counts) == pytest.approx(np.sqrt(0.32 / 1.12), abs=0.03)
    error = np.mean([scores.rmse(half, counts - half) for half in halves])
    target = target_of(counts.reshape(50, 60).astype(float))
    assert scores.ceiling("rmse", target) == pytest.approx(error, rel=2e-3)
    assert scores.best_r_of_counts(rng.permutation(np.arange(3000) % 2)) == 0  # less than noise
    assert np.isnan(scores.best_r_of_counts(np.full(9, 3)))
    assert np.isnan(scores.best_r_of_counts(counts * 0.5))


@pytest.mark.parametrize("capture", [1.0, 0.4])
def test_ceilings_by_halves_agree_with_the_known_mean(capture):
    mean = smooth_fields((240, 240), 4, seed=3) * [0.05, 0.3, 1.0, 5.0]
    counts = np.random.default_rng(2).poisson(mean).astype(np.uint16)
    tissue = np.add.outer(np.arange(240), np.arange(240)) > 90
    genes = ["a", "b", "c", "d"]
    known = scores.score(inputs.Truth(counts, tissue, genes, mean, capture=capture), {})
    halves = scores.score(inputs.Truth(counts, tissue, genes, capture=capture), {})
    assert list(known) == list(halves)
    for name in known:
        if "rmse" in name:
            np.testing.assert_allclose(halves[name], known[name], rtol=0.05, err_msg=name)
        else:
            poor = 0.1 if "ssim_1x" in name else 0.06
            np.testing.assert_allclose(halves[name][1:], known[name][1:], atol=0.06, err_msg=name)
            assert abs(halves[name].iloc[0] - known[name].iloc[0]) < poor, name


def test_fractions_of_superpixels_tell_no_ceiling_but_their_blocks_do():
    # molecules shared between neighbouring superpixels, as by binning squares of another grid
    rng = np.random.default_rng(0)
    mean = smooth_fields((160, 160), 1, seed=3)[..., 0]
    mean *= 0.5 / mean.mean()
    whole = rng.poisson(mean).astype(float)
    counts = (whole + np.roll(whole, 1, 0) + np.roll(whole, 1, 1) + np.roll(whole, 1, (0, 1))) / 4
    grids = scores.make_blocks(np.ones((160, 160), bool))
    table = scores.score_gene(counts, {}, grids)
    known = {name for name, value in table.items() if np.isfinite(value)}
    assert known == {"ceiling_2x", "ceiling_4x", "ceiling_rho_2x", "ceiling_rho_4x"}
    exact = scores.score_gene(whole, {}, grids, mean)
    for name in ("ceiling_4x", "ceiling_rho_4x"):
        assert table[name] == pytest.approx(exact[name], abs=0.06)


def test_a_number_that_is_not_known_is_printed_as_such():
    rows = {"histex": {"1x": 0.5, "4x": 0.75}, "ceiling": {"1x": None, "4x": 0.8}}
    table = evaluate.by_size("median r", rows, scores.METHODS)
    assert table.splitlines()[0].split()[-4:] == ["8", "um", "32", "um"]
    assert table.splitlines()[-1].split()[-2:] == ["unknown", "0.800"]


# ----- uncertainty -----
def truth_around(mean, share, side, rng):
    """Counts of superpixels whose expectation is off by one gamma factor a square of ``side``."""
    factors = rng.gamma(1 / share**2, share**2, [n // side for n in mean.shape])
    return rng.poisson(mean * np.kron(factors, np.ones((side, side))))


@pytest.mark.parametrize("level", [0.05, 1.0, 30.0])
def test_a_map_without_errors_is_covered_at_every_size(level):
    mean = level * smooth_fields((160, 160), 1)[..., 0]
    grids = uncertainty.make_grids(np.ones((160, 160), bool))
    sure = truth_around(mean, 1e-4, 1, np.random.default_rng(0))
    got = uncertainty.score_uncertainty(sure, mean, 0 * mean, grids)
    for size in uncertainty.SIZES:
        for name in ("coverage", "coverage_poisson"):
            assert got[f"{name}_{size}x"] == pytest.approx(0.9, abs=0.04)  # 400 blocks: sd 0.015
        assert np.isnan(got[f"sd_ratio_{size}x"])


def correlated_errors(shape, rng):
    """Fields with a variance of 1 and the correlation of method/errors.py."""
    total = np.sqrt(0.5) * rng.normal(size=shape)
    for share, width in ((0.45, 1.0), (0.05, 4.0)):
        # a field smoothed by a Gaussian is correlated as one that is wider by the root of two
        field = gaussian_filter(rng.normal(size=shape), width / np.sqrt(2), mode="wrap")
        total += np.sqrt(share) * field / field.std()
    return total


def test_sums_have_the_sd_that_the_rule_says():
    rng = np.random.default_rng(0)
    mean, sd = np.full((400, 400), 40.0), np.full((400, 400), 12.0)
    counts = rng.poisson((mean + sd * correlated_errors(mean.shape, rng)).clip(0))
    grids = uncertainty.make_grids(np.ones((400, 400), bool))
    got = uncertainty.score_uncertainty(counts, mean, sd, grids)
    for size in uncertainty.SIZES:
        assert got[f"sd_ratio_{size}x"] == pytest.approx(1, abs=0.06)
        assert got[f"coverage_{size}x"] == pytest.approx(0.9, abs=0.02)
        assert got[f"coverage_poisson_{size}x"] < 0.75
    half = uncertainty.score_uncertainty(counts, mean, sd / 2, grids)
    for size in uncertainty.SIZES:
        assert half[f"sd_ratio_{size}x"] == pytest.approx(2 * got[f"sd_ratio_{size}x"])


def test_a_right_sd_ranks_errors_that_the_map_does_not():
    rng = np.random.default_rng(0)
    mean = np.full((240, 240), 4.0)
    sd = 4 * np.repeat(np.repeat(rng.uniform(0.05, 1, (60, 60)), 4, axis=0), 4, axis=1)
    counts = rng.poisson((mean + sd * correlated_errors(mean.shape, rng)).clip(0))
    grids = uncertainty.make_grids(np.ones(mean.shape, bool))
    got = uncertainty.score_uncertainty(counts, mean + rng.normal(0, 1e-3, mean.shape), sd, grids)
    assert got["rank_sd"] > 0.2
    assert abs(got["rank_map"]) < 0.05
    assert got["rank_ideal"] == pytest.approx(got["rank_sd"], abs=0.06)
    poor = uncertainty.score_uncertainty(counts, mean / 100, sd / 100, grids)
    assert np.isnan(poor["rank_sd"])


def test_coverage_is_on_the_scale_of_the_molecules_and_of_what_the_map_covers():
    rng = np.random.default_rng(0)
    mean, tissue = np.full((80, 80), 5.0), np.ones((80, 80), bool)
    counts, grids = truth_around(mean, 0.3, 1, rng), uncertainty.make_grids(tissue)
    got = uncertainty.score_uncertainty(counts, 0.2 * mean, 0.2 * 0.3 * mean, grids, capture=0.2)
    assert got["coverage_1x"] == pytest.approx(0.9, abs=0.02)
    image = mean.copy()
    image[:, 37:] = np.nan
    counts[:, 37:] = 1000
    got = uncertainty.score_uncertainty(counts, image, 0.3 * image, grids)
    assert got["coverage_1x"] == pytest.approx(0.9, abs=0.02)
    assert got["coverage_4x"] > 0.9
    got = uncertainty.score_uncertainty(counts / 3, image, 0.3 * image, grids)
    assert np.isnan(got["coverage_1x"])
    assert np.isfinite(got["coverage_2x"])


# ----- interpolation -----
def test_interpolation_keeps_spots_and_planes_and_takes_the_nearest_outside():
    centres = np.array([[2.5, 2.5], [2.5, 12.5], [12.5, 2.5], [12.5, 12.5], [7.5, 7.5]])
    counts = np.column_stack([2 * centres[:, 0] + 3 * centres[:, 1], [1.0, 2, 3, 4, 5]])
    nearest, linear = spots.interpolate_spots(centres, counts, (16, 16))
    row, col = np.mgrid[:16, :16] + 0.5
    inside = (row >= 2.5) & (row <= 12.5) & (col >= 2.5) & (col <= 12.5)
    np.testing.assert_allclose(linear[inside, 0], (2 * row + 3 * col)[inside])
    distance = np.hypot(row[..., None] - centres[:, 0], col[..., None] - centres[:, 1])
    unique = np.sort(distance, axis=2)[..., 1] - distance.min(2) > 1e-9
    np.testing.assert_array_equal(nearest[unique, 1], distance.argmin(2)[unique] + 1.0)
    np.testing.assert_array_equal(linear[~inside], nearest[~inside])


def test_interpolation_is_scipys():
    rng = np.random.default_rng(0)
    centres, counts = rng.uniform(0, 30, (40, 2)), rng.poisson(5.0, (40, 3)).astype(float)
    points = rng.uniform(-5, 35, (500, 2))
    nearest, linear = spots.interpolation_weights(centres, points)
    expected = NearestNDInterpolator(centres, counts)(points)
    np.testing.assert_array_equal(nearest @ counts, expected)
    inside = LinearNDInterpolator(centres, counts)(points)
    expected = np.where(np.isnan(inside), expected, inside)
    np.testing.assert_allclose(linear @ counts, expected, atol=1e-9)


# ----- spot totals -----
def test_discs_have_their_area_and_lie_where_the_spot_is():
    centres = np.array([[10.3, 12.9], [0.2, 5.0], [10.3, 12.9]])
    weights = spots.disc_weights(centres, RADIUS, (20, 24)).toarray().reshape(3, 20, 24)
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
    weights = spots.disc_weights(np.array([[10.0, 10.0], [10.0, 30.0]]), RADIUS, (20, 40))
    image = np.full((20, 40), 2.0)
    image[:, 30:] = np.nan  # half of the second disc
    expected = np.array([2, 1]) * np.pi * RADIUS**2
    np.testing.assert_allclose(spots.sum_discs(weights, image), expected, rtol=0.01)
    np.testing.assert_array_equal(spots.on_tissue(weights, image, RADIUS), [True, True])
    image[:, 28:] = np.nan  # a twelfth of it is left
    np.testing.assert_array_equal(spots.on_tissue(weights, image, RADIUS), [True, False])
    r, ratio = spots.score_totals(np.array([1.0, 2.0, 6.0]), np.array([2.0, 4.0, 12.0]))
    assert (r, ratio) == (pytest.approx(1), 0.5)
    assert np.isnan(spots.score_totals(np.ones(3), np.zeros(3))).all()


# ----- seams -----
SEVEN = "every 7, published blocks"


def seams_of(maps):
    return seams.score_seams(seams.line_gradients(maps), RADIUS)


@pytest.mark.parametrize(
    ("radius_um", "patches", "blocks"), [(27.5, 8, 7), (50.0, 14, 13), (16.0, 4, 5), (6.0, 2, 1)]
)
def test_grids_are_those_of_the_prediction(radius_um, patches, blocks):
    radius = radius_um / 8
    periods = seams.known_periods(radius)
    assert periods[patches].startswith("patches of the default preset")
    assert periods[blocks] == "published blocks"
    assert periods[14].endswith("tiles of 224 px")
    assert seams.PATCHES_SHARE == prediction.OVERLAP
    for preset, half, period in (
        ("default", int(np.ceil(radius)), patches),
        ("published", int(radius), blocks),
    ):
        stride, _ = prediction.blending(2 * half + 1, HISTEX.PRESETS[preset].overlap)
        assert stride == period


def test_line_gradients_by_hand():
    maps = np.array([[[1.0], [3.0], [np.nan]], [[2.0], [7.0], [4.0]]])
    (down, n_down), (across, n_across) = seams.line_gradients(maps)
    np.testing.assert_array_equal(down, [[1.0 + 4.0]])  # the column of the NaN does not count
    np.testing.assert_array_equal(n_down, [2])
    np.testing.assert_array_equal(across, [[2.0 + 5.0], [3.0]])
    np.testing.assert_array_equal(n_across, [2, 1])


@pytest.mark.parametrize("period", [7, 8, 14, 15])
def test_a_planted_seam_is_found_at_its_own_grid(period):
    rng = np.random.default_rng(0)
    maps = rng.normal(10, 1, (140, 168, 4))
    block = np.add.outer(np.arange(140) // period, np.arange(168) // period) % 2
    maps[:, :, :3] += 1.0 * block[..., None]
    together, by_gene = seams_of(maps)
    name = f"every {period}, {seams.known_periods(RADIUS)[period]}"
    found = together[name]
    assert found["rank"] == 1
    assert found["z"] > 8
    # a step of 1 on a normal difference of sd sqrt(2): E|N(1, 2)| / E|N(0, 2)| - 1 = 0.2408
    assert found["excess"] == pytest.approx(0.75 * 0.2408, abs=0.03)
    if period in (7, 14):
        np.testing.assert_allclose(by_gene[f"seam_{period}"][:3], 0.2408, atol=0.05)
        assert abs(by_gene[f"seam_{period}"][3]) < 0.03
    moved, _ = seams_of(np.roll(maps, 3, axis=(0, 1)))
    assert moved[name]["rank"] > 1


def test_without_a_seam_the_rank_is_random():
    ranks = []
    for seed in range(40):
        maps = np.random.default_rng(seed).normal(10, 1, (56, 56, 1))
        ranks.append(seams_of(maps)[0][SEVEN]["rank"])
    assert 3 < np.mean(ranks) < 5  # uniform on 1..7: 4 +- 0.32
    assert len(set(ranks)) == 7


def test_tile_borders_are_those_of_the_extractor():
    vit, cnn = Histology_Extractor.VIT_TILING, Histology_Extractor.CNN_TILING
    known = [(t.tile, t.overlap, not t.blend) for t in (vit, cnn)]
    assert list(seams.TILINGS.values()) == known
    for tiling, numbers in zip((vit, cnn), known, strict=True):
        for extent in (14, 42, 98, 140, 266, 294, 1372):
            starts = np.array(tiling.starts(extent))
            lines = seams.tile_lines(extent, *numbers)
            assert len(lines) == len(starts) - 1
            assert (lines >= starts[1:] - 1).all()  # within the overlap of the two tiles
            assert (lines <= starts[:-1] + tiling.side(extent) - 1).all()
    rng = np.random.default_rng(0)
    lines = seams.tile_lines(266, *known[1])
    maps = rng.normal(10, 1, (266, 266, 2))
    maps += (np.arange(266)[:, None] > lines).sum(1)[:, None, None] * 1.0  # a step at each border
    assert seams_of(maps)[0]["CNN tiles"]["rank"] == 1


def test_maps_without_gradients_or_too_small_for_a_grid_have_no_seam():
    together, _ = seams_of(np.ones((56, 56, 2)))
    assert together[SEVEN]["excess"] is None
    together, _ = seams_of(np.random.default_rng(0).normal(size=(14, 14, 2)))
    assert together["every 14, tiles of 224 px"]["excess"] is None


# ----- the command -----
def test_perfect_maps_reach_the_ceiling_and_sum_to_the_spots(section, capsys):
    assert evaluate.run(["--directory", str(section)]) == 0
    table = read_table(section / "evaluation.csv")
    assert list(table.index) == ["A", "B", "NA"]
    for measure in scores.MEASURES:
        for size in scores.BINS:
            ours, best = (scores.column(m, measure, size) for m in ("histex", "ceiling"))
            np.testing.assert_allclose(table[ours], table[best], atol=1e-4)
            worse = table[scores.column("linear", measure, size)]
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


def test_results_go_to_another_folder_and_are_repeatable(section):
    assert evaluate.run(["--directory", str(section), "--no-plot"]) == 0
    assert not (section / "evaluation.png").exists()
    other = section.parent / "results of A"
    assert evaluate.run(["--directory", str(section), "--no-plot", "--output", str(other)]) == 0
    for name in ("evaluation.csv", "evaluation.json"):
        assert (other / name).read_bytes() == (section / name).read_bytes()


def test_a_table_of_yours_is_not_replaced_and_all_of_ours_are_known(section, capsys):
    options = ["--directory", str(section), "--no-plot"]
    (section / "evaluation.csv").write_text("mine")
    assert evaluate.run(options) == 2
    error = capsys.readouterr().err
    assert "evaluation.csv was not written by analysis/evaluate.py, which would" in error
    assert error.endswith("--no-plot --force\n")
    assert (section / "evaluation.csv").read_text() == "mine"
    assert not (section / "evaluation.json").exists()
    assert evaluate.run([*options, "--force"]) == 0
    made = (section / "evaluation.csv").read_bytes()
    assert evaluate.run(options) == 0  # now it is one of ours
    assert "kept" not in capsys.readouterr().out
    (section / "evaluation.csv").write_text("edited")
    assert evaluate.run(options) == 0
    assert "kept your evaluation.csv (--force makes a new one)" in capsys.readouterr().out
    assert (section / "evaluation.csv").read_text() == "edited"
    before = (section / "radius.txt").read_text()
    (section / "radius.txt").write_text("29.5\n")
    assert evaluate.run(options) == 2
    error = capsys.readouterr().err
    assert "evaluation.csv was edited by hand, and radius.txt has changed" in error
    assert (section / "evaluation.csv").read_text() == "edited"
    (section / "radius.txt").write_text(before)
    assert evaluate.run([*options, "--force"]) == 0
    assert (section / "evaluation.csv").read_bytes() == made
    record = json.loads((section / "evaluate.json").read_text())
    assert record["outputs"].keys() == {"evaluation.csv", "evaluation.json"}
    used = {"truth.npz", "cnts-super", "cnts.csv", "locs.csv", "radius.txt"}
    assert used <= record["inputs"].keys()
    assert {"versions", "code", "seconds"} <= record.keys()


def test_what_reads_a_sample_leaves_it_as_it_is(section, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)  # write-protected
    leftover = section / ".x.12345678.partial.csv"
    leftover.write_text("of a run that was cut off")
    os.utime(leftover, (0, 0))
    before = sorted(section.rglob("*"))
    inputs.read_truth(section)
    inputs.read_mask(section, SHAPE)
    inputs.read_spots(section, ["A"])
    assert inputs.read_radius(section) == RADIUS
    assert sorted(section.rglob("*")) == before


def test_a_gene_without_a_map_is_left_out_and_said(section, capsys):
    index = pd.read_csv(section / "cnts-super" / "index.csv", keep_default_na=False)
    index.drop(index=1).to_csv(section / "cnts-super" / "index.csv", index=False)
    assert evaluate.run(["--directory", str(section), "--no-plot"]) == 0
    assert list(read_table(section / "evaluation.csv").index) == ["A", "NA"]
    assert "of 3 genes of the truth" in capsys.readouterr().out


def test_coverage_is_told_where_the_maps_have_a_standard_deviation(section, capsys):
    assert evaluate.run(["--directory", str(section), "--no-plot"]) == 0
    assert "90 % interval" not in capsys.readouterr().out
    genes, saved = ["A", "B", "NA"], dict(np.load(section / "truth.npz"))
    maps = np.where(saved["tissue"][..., None], saved["mean"], np.nan)
    rng = np.random.default_rng(3)
    expected = saved["mean"] * rng.gamma(4, 1 / 4, saved["mean"].shape)  # sd = mean / 2
    saved["counts"] = rng.poisson(expected * saved["tissue"][..., None])
    del saved["mean"]
    np.savez(section / "truth.npz", **saved)
    write_maps(section, maps / 2, genes, "cnts-super-sd")
    assert evaluate.run(["--directory", str(section), "--no-plot"]) == 0
    table = read_table(section / "evaluation.csv")
    np.testing.assert_allclose(table["coverage_1x"], 0.9, atol=0.03)
    assert (table["coverage_poisson_1x"] < 0.8).all()
    assert "90 % interval" in capsys.readouterr().out
    facts = json.loads((section / "evaluation.json").read_text())
    assert facts["median coverage"]["coverage"]["1x"] == pytest.approx(0.9, abs=0.02)
    (section / "cnts-super-sd" / "index.csv").unlink()
    assert evaluate.run(["--directory", str(section), "--no-plot"]) == 2
    assert "cnts-super-sd" in capsys.readouterr().err


def test_scores_collapse_when_the_truth_is_shuffled(section):
    saved = dict(np.load(section / "truth.npz"))
    del saved["mean"]
    rng = np.random.default_rng(0)
    covered = saved["tissue"]
    saved["counts"][covered] = rng.permutation(saved["counts"][covered])
    np.savez(section / "truth.npz", **saved)
    assert evaluate.run(["--directory", str(section), "--no-plot"]) == 0
    table = read_table(section / "evaluation.csv")
    for method in ("histex", "linear", "nearest"):
        for measure in ("r", "rho"):
            assert table[scores.column(method, measure, 1)].abs().max() < 0.08
            assert table[scores.column(method, measure, 4)].abs().max() < 0.35  # of 140 blocks
    assert table["ceiling_1x"].min() > 0.5  # the noise is what it was


def test_truth_in_counts_of_all_molecules_is_compared_on_the_scale_of_the_spots(section):
    assert evaluate.run(["--directory", str(section), "--no-plot"]) == 0
    before = read_table(section / "evaluation.csv")
    saved = dict(np.load(section / "truth.npz"))
    np.savez(section / "truth.npz", **saved, capture=0.5)
    images = np.stack(list(inputs.read_maps(section, ["A", "B", "NA"]).values()), axis=2)
    write_maps(section, images / 2, ["A", "B", "NA"])
    assert evaluate.run(["--directory", str(section), "--no-plot"]) == 0
    after = read_table(section / "evaluation.csv")
    for method in ("histex", "ceiling"):
        for size in scores.BINS:
            for measure in ("r", "rho", "ssim"):
                name = scores.column(method, measure, size)
                np.testing.assert_allclose(after[name], before[name], atol=2e-5)
            name = scores.column(method, "rmse", size)
            np.testing.assert_allclose(after[name], before[name] / 2, atol=2e-5)
    np.testing.assert_allclose(after["totals_ratio"], 0.5, atol=1e-4)


# ----- genes_3D.pkl -----
@pytest.mark.parametrize("first", [False, True])
def test_published_truth_is_read_whichever_end_the_genes_are_at(section, first):
    saved = dict(np.load(section / "truth.npz"))
    (section / "truth.npz").unlink()
    counts = np.moveaxis(saved["counts"], 2, 0) if first else saved["counts"]
    (section / "genes_3D.pkl").write_bytes(pickle.dumps(np.ascontiguousarray(counts)))
    truth = inputs.read_truth(section)
    np.testing.assert_array_equal(truth.counts, saved["counts"])
    np.testing.assert_array_equal(truth.tissue, saved["tissue"])
    assert truth.genes == ["A", "B", "NA"]
    assert evaluate.run(["--directory", str(section), "--no-plot"]) == 0
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
        (np.full((42, 56, 3), "a"), "not a pickled numpy array"),
        ({"counts": np.zeros((42, 56, 3))}, "three axes"),
        (np.full((42, 56, 3), -1.0), "negative"),
        (np.ones((99, 99, 3)), "smaller than the truth"),
        (Canary(), "not a pickled numpy array"),
    ],
)
def test_a_published_truth_that_cannot_be_understood_is_refused(section, capsys, content, message):
    (section / "truth.npz").unlink()
    (section / "genes_3D.pkl").write_bytes(pickle.dumps(content))
    assert evaluate.run(["--directory", str(section), "--no-plot"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert not list(section.glob("evaluation*"))


# ----- bad input -----
ODD_TRUTH = {
    "text for counts": {"counts": np.full((42, 56, 3), "1")},
    "tissue in layers": {"tissue": np.ones((42, 56, 1)), "counts": np.ones((42, 56, 1, 3))},
    "genes twice": {"genes": ["A", "B", "A"]},
    "few kinds": {"kinds": ["marker", "region"]},
    "no capture": {"capture": 0.0},
}


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
    elif what in ODD_TRUTH:
        saved = {"counts": np.ones((42, 56, 3)), "tissue": np.ones((42, 56))}
        np.savez(section / "truth.npz", **(saved | ODD_TRUTH[what]))
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
        ("text for counts", ["truth.npz is not a whole", "<U1 in place of numbers"]),
        ("tissue in layers", ["truth.npz: tissue is (42, 56, 1); expected (rows, columns)"]),
        ("genes twice", ["truth.npz names the genes A more than once"]),
        ("few kinds", ["truth.npz has 2 kinds for 3 genes"]),
        ("no capture", ["truth.npz: capture is 0.0; expected a number above 0"]),
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
    assert evaluate.run(["--directory", str(section), "--force"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    for message in messages:
        assert message in error
    assert (section / "evaluation.csv").read_text() == "old"
    assert not (section / "evaluation.json").exists()


def test_without_matplotlib_the_command_says_so_before_any_work(section, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert evaluate.run(["--directory", str(section)]) == 2
    assert "pip install -r analysis/requirements.txt" in capsys.readouterr().err


def test_the_script_runs_by_itself_and_needs_no_network_library(section):
    run_alone("analysis/evaluate.py", section, "--no-plot")
    assert (section / "evaluation.json").is_file()


# ----- left-out spots -----
def test_folds_hold_every_spot_once():
    fold = holdout.choose_folds(23, 5, seed=3)
    assert sorted(np.bincount(fold)) == [4, 4, 5, 5, 5]
    np.testing.assert_array_equal(fold, holdout.choose_folds(23, 5, seed=3))
    assert (fold != holdout.choose_folds(23, 5, seed=4)).any()


def fold_files(sample, folder, kept):
    """All that the stages could read in the folder of a fold, by name."""
    folder.mkdir()
    stage = inputs.open_sample(sample)
    locs, counts = inputs.read_tables(stage, inputs.read_gene_names(sample))
    holdout.make_fold(stage, folder, locs, counts, kept)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_left_out_spot_is_in_no_file_that_its_prediction_is_made_from(finished, tmp_path):
    counts = pd.read_csv(finished / "cnts.csv", index_col=0)
    kept = holdout.choose_folds(len(counts), 3, seed=0) != 1
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


def test_a_fold_never_writes_into_the_files_of_its_sample(finished, tmp_path):
    record = finished / utils.record_name(utils.CALIBRATION)
    facts = json.loads(record.read_text())
    for name in ("cnts.csv", "gene-names.txt"):  # as if a record named what the fold writes anew
        facts["inputs"][name] = disk.fingerprint(finished / name)
    record.write_text(json.dumps(facts))
    facts["inputs"]["scale-by-hand.txt"] = disk.ABSENT  # a file that there may be, and is not
    record.write_text(json.dumps(facts))
    before = {path.name: path.read_bytes() for path in finished.iterdir() if path.is_file()}
    files = fold_files(finished, tmp_path / "fold", np.arange(22) > 5)
    assert "scale-by-hand.txt" not in files
    assert before == {path.name: path.read_bytes() for path in finished.iterdir() if path.is_file()}


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
    assert evaluate.run(["--directory", str(finished), *options]) == 0

    scores = read_table(finished / "evaluation-holdout.csv")
    assert list(scores.index) == list(table)
    assert scores["histex_spots"].median() > 0.5
    assert scores["ratio"].between(0.6, 1.4).all()
    facts = json.loads((finished / "evaluation-holdout.json").read_text())
    assert (facts["spots"], facts["spots without tissue"], facts["folds"]) == (22, 0, 2)
    assert facts["options of HISTEX.py"] == options[-1]
    made = {f"evaluation-holdout.{kind}" for kind in ("csv", "json", "png")} | {"evaluate.json"}
    assert {path.name for path in finished.iterdir()} == names | made
    assert all(path.read_bytes() == content for path, content in before.items())
    shown = capsys.readouterr().out
    assert "left-out spots" in shown
    assert "fold 2: 11 of 22 spots left out" in shown
    assert "22 of 22 spots, each predicted by maps made without it" in shown

    # nearest spot of the other fold, by brute force; of equally near ones, either will do
    fold = holdout.choose_folds(22, 2, seed=0)
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
        weights = spots.interpolation_weights(centres[known], centres[out])
        nearest, linear = (w @ table.to_numpy(float)[known] for w in weights)
        assert (nearest >= low[out]).all()
        assert (nearest <= high[out]).all()
        np.testing.assert_allclose(weights[1].sum(axis=1), 1)
        assert np.isfinite(linear).all()

    # the Gaussian mean of the other fold, spot by spot
    distance = np.linalg.norm(centres[:, None] - centres, axis=2)
    pitch = np.median(np.where(distance > 0, distance, np.inf).min(1))
    weights = np.exp(-((distance / pitch) ** 2) / 2) * (fold[:, None] != fold)
    smooth = (weights / weights.sum(1, keepdims=True)) @ table.to_numpy(float)
    for i, gene in enumerate(table):
        expected = np.corrcoef(smooth[:, i], table[gene])[0, 1]
        assert scores.loc[gene, "smooth_spots"] == pytest.approx(expected, abs=1e-4)


def test_a_stage_that_fails_is_named_with_its_message(finished):
    with pytest.raises(utils.StageError) as stop:
        holdout.run_script("get_HR.py", finished, ["--n-genes", "0"])
    assert "get_HR.py ended with 2" in str(stop.value)
    assert "is not a whole number of 1 or more" in str(stop.value)


def test_a_failing_fold_leaves_nothing_behind(finished, monkeypatch, capsys):
    names = {path.name for path in finished.iterdir()}

    def fail(script, folder, options):
        assert (folder / "cnts.csv").is_file()
        assert folder.parent == finished
        raise utils.StageError(f"{script} ended", "mend it")

    monkeypatch.setattr(holdout, "run_script", fail)
    assert evaluate.run(["--directory", str(finished), "--holdout", "2", "--no-plot"]) == 2
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
    assert evaluate.run(["--directory", str(finished), "--holdout", folds, "--no-plot"]) == 2
    assert message in capsys.readouterr().err


def test_holdout_takes_the_options_of_the_last_run(finished):
    stage = inputs.open_sample(finished)
    assert "--epochs" in holdout.recorded_options(stage)
    (finished / utils.record_name(utils.HISTEX)).unlink()
    assert holdout.recorded_options(stage) == []


@pytest.mark.parametrize("options", [None, ["--epochs", "1"]])
def test_holdout_runs_again_after_histex_or_for_other_code(finished, monkeypatch, options):
    def stop(*_):
        raise InterruptedError

    monkeypatch.setattr(holdout, "predict_folds", stop)
    stage = make_stage(finished, evaluate.SCRIPT)
    with pytest.raises(InterruptedError):
        holdout.hold_out(stage, 2, 0, options, finished)
    scripts = {str(utils.ROOT / script) for script in (utils.HIGH_RESOLUTION, utils.HISTEX)}
    assert scripts < stage.inputs.keys()
    assert (utils.record_name(utils.HISTEX) in stage.inputs) == (options is None)


def test_a_missing_truth_is_an_input_too(tmp_path):
    """When it comes, the result is out of date."""
    stage = make_stage(tmp_path, evaluate.SCRIPT)
    inputs.note_truth(stage)
    absent = {name for name, known in stage.inputs.items() if known == disk.ABSENT}
    assert absent >= {inputs.TRUTH, inputs.PUBLISHED_TRUTH}


def test_without_a_plot_the_scores_of_left_out_spots_are_written_all_the_same(
    section, monkeypatch, capsys
):
    genes = ["A", "B"]
    table = pd.DataFrame({"histex_spots": [0.5, 0.25]}, index=pd.Index(genes, name="gene"))
    monkeypatch.setattr(evaluate.holdout, "hold_out", lambda *_: (table, {"spots": 22}))
    monkeypatch.setattr(evaluate, "left_out_text", lambda facts: f"{facts['spots']} spots")
    assert evaluate.run(["--directory", str(section), "--holdout", "2", "--no-plot"]) == 0
    assert "22 spots" in capsys.readouterr().out
    found = read_table(section / "evaluation-holdout.csv")
    assert found["histex_spots"].tolist() == [0.5, 0.25]
    made = sorted(path.name for path in section.glob("evaluation*"))
    assert made == ["evaluation-holdout.csv", "evaluation-holdout.json"]


@pytest.mark.parametrize("published", [False, True])
def test_the_truth_that_is_read_is_an_input(tmp_path, published):
    stage = make_stage(tmp_path, evaluate.SCRIPT)
    (tmp_path / (inputs.PUBLISHED_TRUTH if published else inputs.TRUTH)).write_bytes(b"x")
    inputs.note_truth(stage)
    there = {name: known != disk.ABSENT for name, known in stage.inputs.items()}
    expected = {inputs.TRUTH: False, inputs.PUBLISHED_TRUTH: True}
    expected |= {"gene-names.txt": False, "mask.png": False}  # which tell its genes and tissue
    assert there == (expected if published else {inputs.TRUTH: True})


def test_an_edited_mask_is_read_as_histex_reads_it(finished):
    """Dark blue is a colour, and what is transparent is no tissue."""
    shape = np.asarray(Image.open(finished / "mask.png")).shape
    painted = np.zeros((*shape, 4), np.uint8)
    painted[..., 3] = 255
    painted[3:10, 5:20, 2] = 1
    painted[12:, :] = (255, 255, 255, 0)
    Image.fromarray(painted).save(finished / "mask.png")
    tissue = inputs.read_mask(finished, shape)
    assert tissue[3:10, 5:20].all()
    assert tissue.sum() == 7 * 15


def test_a_mask_of_ones_hand_will_do_for_holdout(finished, tmp_path):
    image = np.asarray(Image.open(finished / "mask.png")).copy()
    image[:4] = 255
    Image.fromarray(image).save(finished / "mask.png")
    kept = np.arange(len(pd.read_csv(finished / "locs.csv"))) % 3 > 0
    fold_files(finished, tmp_path / "fold", kept)
    assert run("get_HR.py", tmp_path / "fold") == 0
    stage = inputs.open_sample(tmp_path / "fold")
    stage.require(utils.HR_LOCS, utils.HR_CNTS, utils.LOCS, utils.FEATURES, utils.MASK)


def test_spots_are_told_as_histex_counts_them():
    facts = {"spots": 14, "spots without tissue": 8}
    assert evaluate.of_spots(facts) == "14 of 22 spots with tissue"
    assert evaluate.of_spots({"spots": 22, "spots without tissue": 0}) == "22 of 22 spots"
