"""analysis/patterns.py: statistics against sums over pairs, null cases, and bad inputs."""

import json
import shlex
import shutil
import sys

import numpy as np
import pandas as pd
import pytest
from conftest import run_as_main
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats
from scipy.interpolate import LinearNDInterpolator, NearestNDInterpolator
from scipy.ndimage import gaussian_filter
from scipy.sparse import csc_array, csr_array
from test_regions import (
    GENES,
    GRID,
    NAMES,
    PITCH,
    RADIUS,
    add_to_record,
    lattice,
    snapshot,
    true_labels,
    write_section,
)

import utils
from analysis import inputs, patterns
from analysis.scores import pearson
from analysis.spots import disc_weights, interpolation_weights, superpixel_centres
from method.grid import neighbour_distance

OUTPUTS = ["patterns.csv", "patterns.json", "patterns.png"]
AREA = np.pi * RADIUS**2


@pytest.fixture(scope="module")
def _labelled(tmp_path_factory):
    directory = tmp_path_factory.mktemp("patterns") / "section P"
    write_section(directory, true_labels(), np.random.default_rng(0))
    mean = read_maps(directory, GENES)
    save_truth(directory, np.nan_to_num(mean), GENES, kinds=["a", "a", "a", "flat", "flat", "flat"])
    return directory


@pytest.fixture
def labelled(_labelled, tmp_path):
    """A fresh copy of a finished section: three genes of regions, three that are the same."""
    return shutil.copytree(_labelled, tmp_path / "section P")


def read_maps(directory, genes):
    files = patterns.map_files(directory)
    return np.stack([inputs.read_map(files[gene]) for gene in genes], axis=2)


def save_truth(directory, mean, genes, **more):
    tissue = true_labels() > 0
    np.savez(directory / "truth.npz", mean=mean, counts=np.zeros(mean.shape, int), tissue=tissue,
             genes=genes, regions=true_labels(), region_names=NAMES, **more)  # fmt: skip


def run_patterns(directory, *options):
    return patterns.run(["--directory", str(directory), "--no-plot", *options])


def result(directory):
    table = pd.read_csv(directory / "patterns.csv", keep_default_na=False, dtype={"gene": str},
                        na_values={c: [""] for c in patterns.COLUMNS[1:]})  # fmt: skip
    return table.set_index("gene"), json.loads((directory / "patterns.json").read_text())


# ----- Moran's I -----
def double_sum(x, w):
    """The formula: n / sum of w * sum of w_ij z_i z_j / sum of z_i squared."""
    z, n = x - x.mean(), len(x)
    total = 0.0
    for i in range(n):
        for j in range(n):
            total += w[i, j] * z[i] * z[j]
    return n / w.sum() * total / (z**2).sum()


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 9999), n=st.integers(2, 12))
def test_morans_i_is_the_double_sum(seed, n):
    rng = np.random.default_rng(seed)
    w = np.triu(rng.random((n, n)) < 0.5, 1).astype(float)
    w[0, 1] = 1
    w += w.T
    x = rng.normal(size=(n, 3))
    expected = [double_sum(x[:, k], w) for k in range(3)]
    np.testing.assert_allclose(patterns.morans_i(x, csr_array(w)), expected, rtol=1e-9)


def test_morans_i_by_hand():
    """Four spots in a row: 0 0 1 1 has z = -1/2, -1/2, 1/2, 1/2 and products 1/4, -1/4, 1/4."""
    row = csr_array(np.eye(4, k=1) + np.eye(4, k=-1))
    x = np.array([[0, 0, 1, 1], [0, 1, 0, 1], [3, 3, 3, 3]], float).T
    np.testing.assert_allclose(patterns.morans_i(x, row), [1 / 3, -1, np.nan])


@settings(max_examples=60, deadline=None)
@given(
    tissue=arrays(bool, st.tuples(st.integers(2, 6), st.integers(2, 6))), seed=st.integers(0, 99)
)
def test_statistics_of_a_map_are_the_double_sum(tissue, seed):
    x = np.random.default_rng(seed).normal(2, 1, tissue.shape)
    places = np.argwhere(tissue)
    w = (np.abs(places[:, None] - places).sum(2) == 1).astype(float)
    if not w.any():
        return
    found = patterns.map_statistics(np.where(tissue, x, np.nan), tissue)
    np.testing.assert_allclose(found, (double_sum(x[tissue], w), x[tissue].std()), rtol=1e-9)


def test_a_map_by_hand():
    board = np.indices((4, 6)).sum(0) % 2
    every = np.ones((4, 6), bool)
    assert patterns.map_statistics(board, every) == pytest.approx((-1, 0.5))
    halves = np.where(np.arange(6) < 3, 0, 1)[None].repeat(4, 0)
    inside = (4 * 5 + 3 * 6 - 2 * 4) / (4 * 5 + 3 * 6)  # 4 of 38 pairs differ
    assert patterns.map_statistics(halves, every)[0] == pytest.approx(inside)
    constant = patterns.map_statistics(np.full((4, 6), 0.1), every)
    assert np.isnan(constant[0])
    assert constant[1] == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("lattice_of", ["hexagonal", "square"])
def test_spots_have_the_neighbours_of_their_lattice(lattice_of):
    if lattice_of == "hexagonal":
        centres, most = lattice(), 6
    else:
        centres, most = np.stack(np.indices((8, 9)), -1).reshape(-1, 2) * 7.0, 4
    centres = centres + np.random.default_rng(0).normal(0, 0.05, centres.shape)
    pitch = PITCH if most == 6 else 7
    distance = np.linalg.norm(centres[:, None] - centres, axis=2)
    expected = (distance < 1.2 * pitch) & (distance > 0)
    found = patterns.spot_neighbours(centres)
    assert (found.toarray() == expected).all()
    assert found.sum(axis=0).max() == most
    assert neighbour_distance(centres) == pytest.approx(pitch, rel=0.05)


# ----- interpolation -----
def interpolated(centres, values, places):
    """scipy's linear interpolation, the nearest spot beyond the hull."""
    found = LinearNDInterpolator(centres, values)(places)
    beyond = np.isnan(found)
    found[beyond] = NearestNDInterpolator(centres, values)(places[beyond])
    return found


def test_statistics_of_interpolations_are_those_of_their_maps():
    rng = np.random.default_rng(0)
    tissue = true_labels() > 0
    centres = lattice() + rng.normal(0, 0.3, lattice().shape)
    discs = disc_weights(centres, RADIUS, tissue.shape)
    keep = discs @ tissue.ravel() > 0.3 * AREA
    centres, discs = centres[keep], discs[keep]
    x = rng.gamma(1, 2, (len(centres), 3))
    linear = interpolation_weights(centres, superpixel_centres(GRID))[1]
    between = patterns.Interpolation(linear, tissue, discs)
    i, sd = between.statistics(x)
    places = np.stack(np.indices(tissue.shape), -1).reshape(-1, 2) + 0.5
    for k in range(3):
        image = interpolated(centres, x[:, k], places).reshape(tissue.shape)
        np.testing.assert_allclose((i[k], sd[k]), patterns.map_statistics(image, tissue), rtol=1e-6)
        found = between.image(x[:, k], tissue.shape)
        np.testing.assert_allclose(found, np.where(tissue, image, np.nan), rtol=1e-9)
        inside = np.where(tissue, image, 0).ravel()
        expected = (discs @ inside) / (discs @ tissue.ravel())
        np.testing.assert_allclose(between.discs @ x[:, k], expected)
    constant = between.statistics(np.full((len(centres), 1), 0.1))
    assert np.isnan(constant[0]).all()


def test_guesses_of_left_out_spots_are_those_of_a_loop():
    rng = np.random.default_rng(0)
    centres = lattice() + rng.normal(0, 0.3, lattice().shape)
    counts = rng.poisson(4, (len(centres), 3)).astype(float)
    held_out = np.sort(rng.choice(len(centres), len(centres) * 3 // 10, replace=False))
    found = patterns.guess_left_out(centres, csc_array(counts), held_out, 5)
    part = np.random.default_rng(5).permutation(len(held_out)) % 3  # three times a tenth
    pitch = np.median(np.sort(np.linalg.norm(centres[:, None] - centres, axis=2))[:, 1])
    for i, spot in enumerate(held_out):
        hidden = held_out[part == part[i]]
        assert spot in hidden
        assert len(hidden) == pytest.approx(len(centres) / 10, abs=1)
        seen = np.array([j for j in range(len(centres)) if j not in hidden])
        for gene in range(3):
            linear = interpolated(centres[seen], counts[seen, gene], centres[[spot]])
            assert found[0, i, gene] == pytest.approx(linear[0])
            for j, sigma in enumerate((0.5, 1, 2), start=1):
                squares = ((centres[seen] - centres[spot]) ** 2).sum(1) / (sigma * pitch) ** 2
                mean = np.average(counts[seen, gene], weights=np.exp(-squares / 2))
                assert found[j, i, gene] == pytest.approx(mean)
    around = patterns.correlate_left_out(centres, csc_array(counts), held_out, 5)
    for gene in range(3):
        r = [np.corrcoef(guess[:, gene], counts[held_out, gene])[0, 1] for guess in found]
        assert around[0][gene] == pytest.approx(r[0])
        assert around[1][gene] == pytest.approx(max(r[1:]))


def test_a_far_spot_has_its_nearest_for_a_mean():
    centres, places = np.array([[0.0, 0], [1, 0]]), np.array([[0.0, 9000]])
    for sigma in patterns.MEANS_WITHIN:
        found = patterns.gaussian_weights(centres, places, sigma)
        assert found.sum() == pytest.approx(1)
        assert found[0, 0] > found[0, 1]


# ----- tests of patterns -----
def test_p_by_permutation_by_hand():
    null = np.array([0.1, 0.2, 0.3, 0.4])
    assert patterns.permutation_p(0.3, null) == 3 / 5  # itself, 0.3 and 0.4
    assert patterns.permutation_p(0.5, null) == 1 / 5
    assert patterns.permutation_p(0.3 + 1e-12, null) == 3 / 5  # rounding is no difference
    assert patterns.permutation_p(np.nan, null) == 1


@pytest.mark.parametrize("n", [12, 60])
def test_permuted_counts_have_pitmans_moments(n):
    """Whatever the counts and the map: mean 0, variance 1 / (n - 1)."""
    rng = np.random.default_rng(n)
    counts, predicted = rng.poisson(rng.gamma(0.3, 5, n)), rng.gamma(1, 1, n)
    orders = patterns.orders_of(n, 20_000, rng)
    r = [np.corrcoef(predicted, counts[order])[0, 1] for part in orders for order in part.T]
    assert len(r) == 20_000
    assert abs(np.mean(r)) < 0.01
    assert np.var(r) == pytest.approx(1 / (n - 1), rel=0.05)
    for level in (0.5, 0.1, 0.01):
        high = float(np.quantile(r, 1 - level))
        found = patterns.correlation_p(high, predicted, counts, orders)
        assert found == pytest.approx(level, rel=0.1)
        shuffled = rng.permutation(predicted)
        found = patterns.correlation_p(high, shuffled, counts, orders)
        assert found == pytest.approx(level, rel=0.3)


def test_p_of_a_correlation_by_hand():
    predicted, counts = np.array([1.0, 2, 3]), np.array([0.0, 0, 5])
    orders = [np.array([[0, 1, 2], [0, 2, 1]]).T, np.array([[2, 0, 1], [2, 1, 0], [1, 2, 0]]).T]
    # the 5 stands third, second, second, first, first: r = 0.866, 0, 0, -0.866, -0.866
    assert patterns.correlation_p(0.8, predicted, counts, orders) == 2 / 6
    assert patterns.correlation_p(0.9, predicted, counts, orders) == 1 / 6
    assert patterns.correlation_p(0.0, predicted, counts, orders) == 4 / 6
    assert patterns.correlation_p(np.nan, predicted, counts, orders) == 1
    assert patterns.correlation_p(0.9, predicted, np.full(3, 0.1), orders) == 1
    assert patterns.correlation_p(0.9, np.full(3, 0.1), counts, orders) == 1
    assert patterns.correlation_p(1.0, predicted[:2], counts[1:], [np.array([[0], [1]])]) == 1


def test_one_spot_with_all_the_counts_proves_nothing():
    """By Student's t, one count in the one bright spot of 60 would have a p below 1e-9."""
    rng = np.random.default_rng(0)
    predicted, counts = np.append(rng.uniform(0, 0.1, 59), 5), np.append(np.zeros(59), 1)
    r = pearson(predicted, counts)
    assert stats.t.sf(r * np.sqrt(58 / (1 - r**2)), 58) < 1e-9
    found = patterns.correlation_p(r, predicted, counts, patterns.orders_of(60, 9999, rng))
    assert found == pytest.approx(1 / 60, rel=0.2)


def test_p_of_many_counts_is_nearly_students():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 25))
    a += 0.3 * b
    expected = stats.pearsonr(a, b, alternative="greater")
    found = patterns.correlation_p(expected.statistic, a, b, patterns.orders_of(25, 20_000, rng))
    assert found == pytest.approx(expected.pvalue, rel=0.15)


def test_orders_are_all_as_frequent():
    orders = np.concatenate(patterns.orders_of(3, 6000, np.random.default_rng(0)), axis=1)
    _, times = np.unique(orders, axis=1, return_counts=True)
    assert len(times) == 6
    assert stats.chisquare(times).pvalue > 0.01


def small_table(**columns):
    n = len(next(iter(columns.values())))
    base = {"gene": [f"g{i}" for i in range(n)], "counts": np.full(n, 9.0)}
    base |= dict.fromkeys(patterns.MEASURED[2:], np.zeros(n))
    return pd.DataFrame(base | {k: np.asarray(v, float) for k, v in columns.items()})


def test_verdicts_by_hand():
    table = small_table(
        spots_p=[0.001, 0.02, 0.2, 0.001, 0.5], maps_spot_I=[0.5, 0.5, 0.5, 0.1, 0.5],
        null_spot_I=[0.2, 0.2, 0.2, 0.2, np.nan], held_out_r=[0.8, 0.6, 0.7, 0.9, np.nan],
        held_out_p=[0.001, 0.01, 0.02, 0.001, 1],
    )  # fmt: skip
    linear_r, smooth_r = np.array([0.9, 0.3, 0.3, 0, 0]), np.array([0, 0.65, 0.5, 0, 0])
    found = patterns.add_verdicts(table, linear_r, smooth_r)
    # q of spots: 0.001 * 5 / 2, 0.02 * 5 / 3, 0.2 * 5 / 4, as the first, 0.5
    np.testing.assert_allclose(found["spots_q"], [0.0025, 0.1 / 3, 0.25, 0.0025, 0.5])
    assert found["found_by_spots"].tolist() == [True, True, False, True, False]
    assert found["found_by_maps"].tolist() == [True, True, True, False, False]  # above the null
    assert found["enhanced"].tolist() == [False, False, True, False, False]  # of both ways
    expected = [0.0025, 0.05 / 3, 0.025, 0.0025, 1]  # 0.001 * 5 / 2, 0.01 * 5 / 3, 0.02 * 5 / 4
    np.testing.assert_allclose(found["held_out_q"], expected)


def test_null_genes_are_not_found():
    """Constant genes and maps as smooth as any: no more are found than by chance.

    Each gene's map is a smooth field of its own that has nothing to do with the counts.
    """
    rng = np.random.default_rng(0)
    tissue, genes = true_labels() > 0, 150
    centres = lattice()
    discs = disc_weights(centres, RADIUS, GRID)
    keep = np.flatnonzero(discs @ tissue.ravel() > 0.3 * AREA)
    centres, discs = centres[keep], discs[keep]
    counts = rng.poisson(rng.gamma(1, 6, genes), (len(keep), genes)).astype(float)
    fields = gaussian_filter(rng.normal(size=(genes, *GRID)), (0, 6, 6)) * 40
    maps = np.exp(fields) / AREA
    held_out = np.sort(rng.choice(len(keep), len(keep) // 2, replace=False))
    totals = np.array([discs @ image.ravel() for image in maps]).T
    r = np.array(
        [pearson(*pair) for pair in zip(totals[held_out].T, counts[held_out].T, strict=True)]
    )
    section = FakeSection(tissue, centres, discs, counts, maps)
    table = patterns.measure_genes(section, held_out, r, 499, 0)
    around = patterns.correlate_left_out(centres, csc_array(counts), held_out, 0)
    table = patterns.add_verdicts(table, *around)
    assert (table["maps_spot_I"] > table["null_spot_I"]).mean() > 0.95  # this alone finds them all
    assert (table["maps_spot_I"] > table["spots_I"]).mean() > 0.95
    assert table["null_I"].median() > 0.9
    for name in ("spots_p", "held_out_p"):
        assert stats.kstest(table[name], "uniform").pvalue > 0.01, name
    for name in patterns.VERDICTS:
        assert table[name].sum() <= 1, name
    assert abs(table["spots_I"].mean() + 1 / (len(keep) - 1)) < 0.01


class FakeSection(patterns.SpotsAndMaps):
    """A section that is in memory."""

    def __init__(self, tissue, centres, discs, counts, maps):
        self.stage = None  # of files, which are not read
        self.tissue, self.centres, self.discs, self.maps = tissue, centres, discs, maps
        self.counts, self.genes = csc_array(counts), [*range(len(maps))]
        self.spots, self.radius, self.area = np.arange(len(centres)), RADIUS, AREA
        self.scale, self.map_scale = np.ones(len(centres)), np.ones(tissue.shape)

    def map(self, gene):
        return self.maps[gene]


def test_smoothing_is_no_improvement():
    """Maps that are the spots, smoothed: patterned, with a higher I than the spots, not enhanced.

    The counts are few, so that a mean over many spots tells more than interpolation does.
    """
    rng = np.random.default_rng(1)
    tissue, genes = np.ones(GRID, bool), 40
    centres = lattice()
    discs = disc_weights(centres, RADIUS, GRID)
    fields = gaussian_filter(rng.normal(size=(genes, *GRID)), (0, 8, 8))
    mean = np.exp(fields / fields.std((1, 2), keepdims=True))
    counts = rng.poisson((discs @ mean.reshape(genes, -1).T) * 0.7 / AREA).astype(float)
    held_out = np.sort(rng.choice(len(centres), len(centres) // 2, replace=False))
    part = rng.permutation(len(held_out)) % 5
    places = np.stack(np.indices(GRID), -1).reshape(-1, 2) + 0.5

    def smoothed(at, seen):
        squares = ((at[:, None] - centres[seen]) ** 2).sum(2)
        weights = np.exp(-squares / (2 * (0.75 * PITCH) ** 2))
        return weights @ counts[seen] / weights.sum(1, keepdims=True)

    guess = np.empty((len(held_out), genes))
    for i in range(5):
        hidden = held_out[part == i]
        guess[part == i] = smoothed(centres[hidden], np.setdiff1d(np.arange(len(centres)), hidden))
    r = np.array([pearson(*pair) for pair in zip(guess.T, counts[held_out].T, strict=True)])
    maps = smoothed(places, np.arange(len(centres))).T.reshape(genes, *GRID) / AREA
    section = FakeSection(tissue, centres, discs, counts, maps)
    table = patterns.measure_genes(section, held_out, r, 199, 0)
    around = patterns.correlate_left_out(centres, csc_array(counts), held_out, 0)
    table = patterns.add_verdicts(table, *around)
    assert (table["maps_spot_I"] > table["spots_I"]).all()
    assert table["found_by_maps"].mean() > 0.8
    assert (table["held_out_r"] > table["linear_r"]).mean() > 0.8  # that alone would be enough
    assert table["enhanced"].mean() < 0.4
    gain = table["held_out_r"] - patterns.best_around(table)
    assert gain.median() < 0
    assert gain.max() < 0.1


def test_statistics_do_not_depend_on_how_many_at_once(monkeypatch):
    rng = np.random.default_rng(0)
    tissue, centres = np.ones(GRID, bool), lattice()
    discs = disc_weights(centres, RADIUS, GRID)
    counts, maps = rng.poisson(3, (len(centres), 2)), rng.gamma(1, 1, (2, *GRID))
    section = FakeSection(tissue, centres, discs, counts.astype(float), maps)
    tables = []
    for size in (7, 1000):
        monkeypatch.setattr(patterns, "AT_ONCE", size)
        r = np.array([0.1, 0.2])
        tables.append(patterns.measure_genes(section, np.arange(0, 40, 2), r, 50, 3))
    pd.testing.assert_frame_equal(*tables, rtol=1e-9)
    w = patterns.spot_neighbours(centres)
    for gene in range(2):
        x = np.sqrt(counts[:, gene])
        own = np.hstack(patterns.orders_of(len(x), 50, np.random.default_rng(3))).T
        null = [double_sum(x[order], w.toarray()) for order in own[:5]]
        every = [float(patterns.morans_i(x[order][:, None], w)[0]) for order in own]
        np.testing.assert_allclose(every[:5], null)
        expected = (1 + sum(i >= tables[0]["spots_I"][gene] - 1e-9 for i in every)) / 51
        assert tables[0]["spots_p"][gene] == pytest.approx(expected)


# ----- the command -----
def test_genes_of_regions_are_found_and_others_are_not(labelled, capsys):
    add = pd.DataFrame({"gene": GENES, "held_out_r": [0.99, 0.98, 0.97, 0.1, -0.2, ""]})
    add.to_csv(labelled / "held-out-r.csv", index=False)
    assert run_patterns(labelled, "--truth") == 0
    table, record = result(labelled)
    assert table.index.tolist() == GENES
    assert list(table.reset_index()) == [
        *patterns.COLUMNS,
        "true_I",
        "true_sd",
        "true_spot_I",
        "kind",
    ]
    regional = [True, True, True, False, False, False]
    assert table["found_by_spots"].tolist() == regional
    assert table["found_by_maps"].tolist() == regional
    assert table["enhanced"].tolist() == regional
    assert np.isnan(table["held_out_r"]["1e5"])
    assert table["held_out_p"]["1e5"] == 1
    counts = pd.read_csv(labelled / "cnts.csv", index_col=0, keep_default_na=False).sort_index()
    of_truth, of_maps = ["true_I", "true_sd", "true_spot_I"], ["maps_I", "maps_sd", "maps_spot_I"]
    found = table[of_truth].apply(pd.to_numeric)  # constant genes have no I
    np.testing.assert_allclose(found, table[of_maps], rtol=1e-4, atol=1e-9)
    assert np.isnan(table["maps_I"][GENES[3:]]).all()
    kept = record["spots"]
    assert 80 < kept < len(counts)
    assert (table["counts"] <= counts.sum()[table.index]).all()
    assert record["kinds"] == {
        "a": {"genes": 3, "found_by_spots": 3, "found_by_maps": 3, "enhanced": 3},
        "flat": {"genes": 3, "found_by_spots": 0, "found_by_maps": 0, "enhanced": 0},
    }
    assert (record["genes"], record["found by maps"], record["enhanced"]) == (6, 3, 3)
    assert record["held-out spots"] == len(
        json.loads((labelled / "HISTEX.json").read_text())["held_out_spots"]
    )
    out = capsys.readouterr().out
    assert "found by spots: 3\nfound by maps: 3\nenhanced: 3\nfound by maps, not by spots: 0" in out
    assert "  flat: genes 3, found_by_spots 0, found_by_maps 0, enhanced 0" in out
    assert {*record["inputs"]} == {
        "cnts-super", "held-out-r.csv", "locs.csv", "radius.txt", "cnts.csv", "mask.png",
        "truth.npz",
    }  # fmt: skip


def test_numbers_of_a_gene_are_those_of_its_map(labelled):
    """Of square roots of counts per spot, by loops over the definitions."""
    assert run_patterns(labelled, "--permutations", "20") == 0
    table, _ = result(labelled)
    tissue, centres = true_labels() > 0, lattice()
    discs = disc_weights(centres, RADIUS, GRID)
    keep = discs @ tissue.ravel() >= 0.25 * AREA
    w = patterns.spot_neighbours(centres[keep]).toarray()
    counts = pd.read_csv(labelled / "cnts.csv", index_col=0, keep_default_na=False).sort_index()
    for i, gene in enumerate(GENES[:3]):
        image = np.nan_to_num(read_maps(labelled, GENES)[..., i].astype(float))
        x = np.sqrt(counts[gene].to_numpy()[keep])
        assert table["spots_I"][gene] == pytest.approx(double_sum(x, w), rel=1e-3)
        assert table["spots_sd"][gene] == pytest.approx(x.std(), rel=1e-3)
        of_map = patterns.map_statistics(np.sqrt(image * AREA), tissue)
        assert (table["maps_I"][gene], table["maps_sd"][gene]) == pytest.approx(of_map, rel=1e-3)
        totals = np.sqrt(discs[keep] @ image.ravel())
        assert table["maps_spot_I"][gene] == pytest.approx(double_sum(totals, w), rel=1e-3)


def test_normalising_takes_the_depth_away(tmp_path, capsys):
    """All genes follow the depth; divided by their sum, none has a pattern, in spots and maps."""
    rng, labels = np.random.default_rng(0), true_labels()
    depth = np.array([0, 4, 20, 60])[labels]
    maps = depth[..., None] * np.linspace(0.5, 2, 6) / AREA
    directory = write_section(tmp_path / "section D", labels, rng, maps)
    assert run_patterns(directory, "--permutations", "99") == 0
    table, _ = result(directory)
    assert (table["spots_I"] > 0.5).all()
    assert (table["maps_I"] > 0.5).all()
    assert run_patterns(directory, "--permutations", "99", "--normalise") == 0
    table, record = result(directory)
    assert record["options"] == ["--no-plot", "--permutations", "99", "--normalise"]
    assert table["spots_I"].mean() < 0.1
    assert (table["maps_sd"] < 1e-3).all()


def results_of(directory):
    """Bytes of all files but the record, which holds the time of the run."""
    return {name: kept for name, kept in snapshot(directory).items() if name != "patterns.json"}


def test_a_rerun_overwrites_and_is_the_same(labelled, tmp_path, capsys):
    options = ["--directory", str(labelled), "--permutations", "19"]
    assert patterns.run(options) == 0
    out = capsys.readouterr().out
    assert "wrote patterns.csv" in out
    assert "wrote patterns.png" in out
    first = results_of(labelled)
    assert patterns.run([*options, "--force"]) == 0
    assert results_of(labelled) == first
    assert first["patterns.png"][:4] == b"\x89PNG"
    assert patterns.run([*options, "--seed", "1", "--output", str(tmp_path / "new")]) == 0
    assert results_of(labelled) == first
    assert sorted(snapshot(tmp_path / "new")) == OUTPUTS
    assert snapshot(tmp_path / "new")["patterns.csv"] != first["patterns.csv"]


@pytest.mark.parametrize("name", ["patterns.csv", "patterns.png"])
def test_files_of_the_user_are_kept(labelled, name, capsys):
    options = ["--directory", str(labelled), "--permutations", "1"]
    (labelled / name).write_text("mine")
    before = snapshot(labelled)
    assert patterns.run(options) == 2
    error = capsys.readouterr().err
    assert f"{labelled / name} was not written by analysis/patterns.py, which would" in error
    assert f"--directory {shlex.quote(str(labelled))} --permutations 1 --force" in error
    assert snapshot(labelled) == before
    assert patterns.run([*options, "--force"]) == 0
    made = results_of(labelled)
    with (labelled / name).open("a") as file:
        file.write("edited")
    edited = snapshot(labelled)
    capsys.readouterr()
    assert patterns.run(options) == 0
    assert f"kept your {name} (--force makes a new one)" in capsys.readouterr().out
    assert snapshot(labelled) == edited
    assert patterns.run([*options, "--seed", "1"]) == 2
    error = capsys.readouterr().err
    assert f"{labelled / name} was edited by hand, and other options were given" in error
    assert error.endswith("--permutations 1 --seed 1 --force\n")
    assert snapshot(labelled) == edited
    assert patterns.run([*options, "--force"]) == 0
    assert results_of(labelled) == made


def test_results_of_before_are_refused_with_commands_that_work(labelled, capsys):
    """The record had the same name, but no outputs."""
    (labelled / "patterns.json").write_text('{"script": "analysis/patterns.py", "inputs": {}}')
    (labelled / "patterns.csv").write_text("gene\n")
    assert run_patterns(labelled, "--permutations", "1") == 2
    error = capsys.readouterr().err
    assert "patterns.json is not a record of analysis/patterns.py" in error
    assert "Move it away and run: python analysis/patterns.py" in error
    assert error.endswith("--permutations 1 --force\n")
    (labelled / "patterns.json").unlink()
    assert run_patterns(labelled, "--permutations", "1", "--force") == 0
    assert run_patterns(labelled, "--permutations", "1") == 0


def test_as_a_user(labelled):
    (labelled / "embeddings-gene.pickle").unlink()  # not needed
    options = ("--directory", labelled, "--permutations", 9)
    assert run_as_main("analysis/patterns.py", *options) == 0
    assert sorted(p.name for p in labelled.glob("patterns*")) == OUTPUTS


@pytest.mark.parametrize("n", [0, 2])
def test_without_held_out_spots_nothing_is_found_by_maps(labelled, n, capsys):
    """As after --preset published, which holds none out."""
    record = json.loads((labelled / "HISTEX.json").read_text())
    add_to_record(labelled, held_out_spots=record["held_out_spots"][:n])
    assert patterns.run(["--directory", str(labelled), "--permutations", "99"]) == 0
    assert f"{n} held-out spots: the maps' patterns cannot be tested" in capsys.readouterr().out
    table, record = result(labelled)
    assert table["found_by_spots"].sum() == 3
    assert not table["found_by_maps"].any()
    assert not table["enhanced"].any()
    assert table[["linear_r", "smooth_r"]].isna().all(axis=None)
    assert record["medians"]["linear_r"] is None
    assert len(record["warnings"]) == 1


def test_the_picture_shows_what_the_table_says(labelled, capsys):
    stage = utils.Stage(
        "analysis/patterns.py",
        patterns.build_parser().parse_args(["--directory", str(labelled)]),
    )
    section = patterns.SpotsAndMaps(stage)
    assert run_patterns(labelled, "--permutations", "99") == 0
    table = result(labelled)[0].reset_index()
    table["enhanced"] = [True, False, True, False, False, False]
    figure = patterns.draw(table, section)
    axes = [ax for part in figure.subfigs for ax in part.axes]
    assert len(figure.subfigs) == 3  # all genes, and two that are enhanced
    legend = [text.get_text() for text in axes[0].get_legend().texts]
    assert "enhanced: 2" in legend
    assert sum(int(text.rsplit(" ", 1)[1]) for text in legend) == 6
    assert "B,1" in axes[2].get_title() or "NA" in axes[2].get_title()
    shown = {ax.get_title().split(":")[0] for ax in axes if ": spots" in ax.get_title()}
    assert shown == {"NA", "B,1"}
    points = np.concatenate([c.get_offsets() for c in axes[1].collections])
    expected = np.column_stack([table[["linear_r", "smooth_r"]].max(axis=1), table["held_out_r"]])
    assert {*map(tuple, np.round(points, 6))} == {*map(tuple, np.round(expected, 6))}
    table["enhanced"] = False
    assert len(patterns.draw(table, section).subfigs) == 1


# ----- bad inputs -----
def drop_column(directory):
    table = pd.read_csv(directory / "cnts.csv", index_col=0, dtype={0: str}, keep_default_na=False)
    table.drop(columns="C").to_csv(directory / "cnts.csv")


def on_a_line(directory):
    locs = pd.read_csv(directory / "locs.csv", index_col=0, dtype={0: str})
    locs["y"], locs["x"] = 450.0, 40.0 + 8 * np.arange(len(locs))
    locs.to_csv(directory / "locs.csv")
    add_to_record(directory, held_out_spots=[])


def few(directory):
    for name in ("locs.csv", "cnts.csv"):
        table = pd.read_csv(directory / name, index_col=0, dtype={0: str}, keep_default_na=False)
        table.sort_index().iloc[70:75].to_csv(directory / name)


def set_map(directory, image):
    np.save(directory / "cnts-super" / "0.npy", np.asarray(image, np.float32))


def with_a(value):
    image = np.ones(GRID)
    image[28, 35] = value
    return image


BAD_INPUTS = {
    "no maps": (lambda d: shutil.rmtree(d / "cnts-super"), "cnts-super is missing"),
    "no index": (lambda d: (d / "cnts-super" / "index.csv").unlink(), "index.csv is missing"),
    "no gene": (lambda d: (d / "cnts-super" / "index.csv").write_text("gene,file\n"),
                "index.csv names no gene"),
    "no record": (lambda d: (d / "HISTEX.json").unlink(), "has no record HISTEX.json"),
    "a map that is none": (lambda d: (d / "cnts-super" / "3.pickle").write_text("x"),
                           "is not a whole map"),
    "a map of another size": (lambda d: (d / "cnts-super" / "3.pickle").write_bytes(
        (np.ones((5, 5))).dumps()), "expected (56, 70)"),
    "a map with a hole": (lambda d: (d / "cnts-super" / "3.pickle").write_bytes(
        with_a(np.nan).dumps()), "with a count of 0 or more for"),
    "a negative map": (lambda d: (d / "cnts-super" / "3.pickle").write_bytes(
        with_a(-1).dumps()), "with a count of 0 or more for"),
    "empty maps": (lambda d: set_map(d, np.full(GRID, np.nan)), "with 0 values; expected (56, 70)"),
    "maps of another grid": (lambda d: set_map(d, np.ones((9, 70))),
                             "(9, 70) with 630 values; expected (56, 70), the grid of he.jpg"),
    "no held-out": (lambda d: (d / "held-out-r.csv").unlink(), "held-out-r.csv is missing"),
    "another table": (lambda d: (d / "held-out-r.csv").write_text("a,b\n1,2\n"),
                      "is no table of gene and held_out_r"),
    "text for r": (lambda d: (d / "held-out-r.csv").write_text("gene,held_out_r\nA,high\n"),
                   "is no table of gene and held_out_r"),
    "a gene twice": (lambda d: (d / "held-out-r.csv").write_text("gene,held_out_r\nA,1\nA,0\n"),
                     "is no table of gene and held_out_r"),
    "r beyond 1": (lambda d: (d / "held-out-r.csv").write_text("gene,held_out_r\nA,7\n"),
                   "is no table of gene and held_out_r"),
    "bytes": (lambda d: (d / "held-out-r.csv").write_bytes(b"gene,held_out_r\n\xff,1\n"),
              "is no table of gene and held_out_r"),
    "unknown spots": (lambda d: add_to_record(d, held_out_spots=["zzz", "001"]),
                      "HISTEX.json names 1 held-out spots that locs.csv lacks"),
    "no spots": (lambda d: add_to_record(d, held_out_spots=7), "does not list held_out_spots"),
    "a gene without counts": (drop_column, "lacks genes of maps: C"),
    "few spots": (few, "spots on the tissue; expected 10 at least"),
    "on a line": (on_a_line, "lie on a line"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_INPUTS)
def test_bad_inputs(labelled, case, capsys):
    change, message = BAD_INPUTS[case]
    assert run_patterns(labelled, "--permutations", "1") == 0
    change(labelled)
    before = snapshot(labelled)
    capsys.readouterr()
    stale = ["--allow-stale"] * (case in ("a gene without counts", "few spots", "on a line"))
    # HISTEX.py writes other spots into its record only with other maps; here the maps stay
    stale += ["--force"] * (case in ("unknown spots", "no spots"))
    assert run_patterns(labelled, "--permutations", "1", *stale) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "un" in error.split("\n", 1)[1]  # what to do
    assert snapshot(labelled) == before


def test_stale_maps_are_refused(labelled, capsys):
    drop_column(labelled)
    assert run_patterns(labelled) == 2
    assert "is out of date" in capsys.readouterr().err


def test_held_out_spots_that_the_mask_has_lost(labelled, capsys):
    """A spot that is no longer on the tissue is left out, and said so."""
    gone = json.loads((labelled / "HISTEX.json").read_text())["held_out_spots"]
    off = "000"  # in the upper left corner
    assert off not in gone
    add_to_record(labelled, held_out_spots=[off, *gone])
    assert run_patterns(labelled, "--permutations", "1") == 0
    record = result(labelled)[1]
    assert record["held-out spots"] == len(gone)
    assert "1 held-out spots are not on the tissue" in capsys.readouterr().out


BAD_TRUTH = {
    "none": (None, "truth.npz is missing"),
    "no mean": ({"mean": None}, "does not hold the true mean of all 6 genes"),
    "other genes": ({"genes": ["x", *GENES[1:]]}, "does not hold the true mean of all 6 genes"),
    "damaged": (b"PK", "is not a whole truth.npz"),
}


@pytest.mark.parametrize("case", BAD_TRUTH)
def test_bad_truth(labelled, case, capsys):
    content, message = BAD_TRUTH[case]
    with np.load(labelled / "truth.npz") as saved:
        whole = dict(saved)
    (labelled / "truth.npz").unlink()
    if isinstance(content, bytes):
        (labelled / "truth.npz").write_bytes(content)
    elif content:
        whole |= content
        np.savez(labelled / "truth.npz", **{k: v for k, v in whole.items() if v is not None})
    assert run_patterns(labelled, "--truth", "--permutations", "1") == 2
    assert message in capsys.readouterr().err
    assert not (labelled / "patterns.csv").exists()


def test_output_and_matplotlib_are_checked_first(labelled, capsys, monkeypatch):
    before = snapshot(labelled)
    assert run_patterns(labelled, "--output", str(labelled / "cnts.csv")) == 2
    assert (
        "cnts.csv is a file; analysis/patterns.py writes into a folder" in capsys.readouterr().err
    )
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert patterns.run(["--directory", str(labelled)]) == 2
    assert "The picture needs matplotlib" in capsys.readouterr().err
    assert snapshot(labelled) == before


@pytest.mark.parametrize("option", [("--permutations", "0"), ("--seed", "-1")])
def test_options_out_of_range(labelled, option, capsys):
    with pytest.raises(SystemExit):
        run_patterns(labelled, *option)
    assert f"argument {option[0]}" in capsys.readouterr().err
