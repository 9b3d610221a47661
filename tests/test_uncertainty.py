"""method/errors.py and method/uncertainty.py: errors, sums of superpixels, held-out spots."""

import argparse

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.sparse import csr_array
from scipy.stats import nbinom
from test_HISTEX import CPU, G, default_network, make_section

import utils
from method import errors, states, uncertainty
from method import section as sections
from method.network import Network


# ----- the shape of the errors --------------------------------------------------------------------
def test_the_variance_grows_with_the_distance_from_the_nearest_spot():
    spots = np.array([[0.0, 0.0], [0.0, 40.0]])
    places = np.array([[0.0, 0.0], [0.0, 2.0], [0.0, 37.0], [0.0, 12.0], [0.0, 20.0]])
    grown = errors.growth(places, spots, radius=4.0)
    np.testing.assert_allclose(grown, [1, 1.5, 1.75, 4, 4])
    assert grown.dtype == np.float32


def test_the_standard_deviation_is_that_of_counts_times_a_factor():
    ours = errors.Errors(np.array([9.0, 0.25, 1.0]), np.array([1.0, 4.0]))
    found = ours.sd(np.array([[1.0, 1.0], [4.0, 0.0]]), slice(1, 3))
    np.testing.assert_allclose(found, [[0.5, 1.0], [2.0, 0.0]])


def correlation_by_hand(a: np.ndarray, b: np.ndarray) -> float:
    apart = float(((a - b) ** 2).sum())
    return 0.5 * (apart == 0) + 0.45 * np.exp(-apart / 2) + 0.05 * np.exp(-apart / 32)


def test_errors_of_neighbours_go_together():
    assert errors.correlation(np.array([0.0])) == pytest.approx(1)
    values = errors.correlation(np.arange(0, 200.0))
    assert (np.diff(values) < 0).all()
    for apart in (1, 5, 25):
        by_hand = correlation_by_hand(np.zeros(2), np.array([np.sqrt(apart), 0]))
        assert errors.correlation(np.array([float(apart)]))[0] == pytest.approx(by_hand)


# ----- sums of superpixels ------------------------------------------------------------------------
def brute_force(places: np.ndarray, sd: np.ndarray) -> float:
    pairs = ((i, j) for i in range(len(sd)) for j in range(len(sd)))
    return np.sqrt(sum(sd[i] * sd[j] * correlation_by_hand(places[i], places[j]) for i, j in pairs))


def test_the_sd_of_one_sum_is_that_of_all_pairs():
    rng = np.random.default_rng(0)
    sd = rng.uniform(0, 2, (9, 14)) * (rng.random((9, 14)) < 0.6)
    places = np.argwhere(sd > 0)
    wanted = brute_force(places, sd[sd > 0])
    assert errors.sd_of_sum(np.pad(sd, 12)) == pytest.approx(wanted, rel=1e-3)
    assert errors.sd_of_sum(sd) == pytest.approx(wanted, rel=1e-3)  # at the map's edge, too
    assert errors.sd_of_sum(np.zeros((3, 3))) == 0


@pytest.mark.parametrize("many", [0, 12, 100])
@given(n=st.integers(1, 4), seed=st.integers(0, 2**32 - 1))
def test_the_sd_of_many_sums_is_that_of_each(many, n, seed):
    rng = np.random.default_rng(seed)
    places = np.argwhere(rng.random((8, 30)) < 0.3)
    shares = rng.random((n, len(places))) * (rng.random((n, len(places))) < 0.4)
    shares[0] = 0
    sd = rng.uniform(0, 2, len(places))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(errors, "MANY", many)
        found = errors.Sums(csr_array(shares), places).sd(sd)
    assert found[0] == 0
    for k in range(n):
        inside = shares[k] > 0
        wanted = brute_force(places[inside], shares[k, inside] * sd[inside])
        assert found[k] == pytest.approx(wanted, rel=2e-2, abs=1e-9)  # beyond REACH is nothing


def test_a_sum_is_less_certain_than_if_errors_were_its_own_and_more_than_if_all_were_one():
    sd = np.ones((4, 4))
    assert 4 < errors.sd_of_sum(sd) < 16


# ----- held-out spots -----------------------------------------------------------------------------
class Flat(Network):
    """Two counts per superpixel of every gene."""

    latent_size = 128

    def fuse(self, histology, context, offsets):
        return torch.ones(*histology.shape[:2], 1)

    def decode(self, latent, interpolated, genes=slice(None)):
        return 2 * latent.expand(*latent.shape[:-1], G)


def test_the_variance_of_a_disc_is_that_of_all_its_pairs():
    section = make_section()
    split = sections.split_spots(section, True, 0, 0)
    spots = split.held_out
    state = states.State(Flat(section, split.train), split, np.zeros((len(spots), G), np.float32))
    found = uncertainty.held_out_variance([state], section, spots, CPU)
    row, col = section.patches(np.floor(section.spots[spots]).astype(int))
    for i, spot in enumerate(spots):
        inside = section.areas[spot] > 0
        places = np.stack([row[i], col[i]], axis=1)[inside]
        apart = np.linalg.norm(places[:, None] + 0.5 - section.spots[split.train], axis=-1)
        grown = 1 + np.minimum(apart.min(axis=1) / section.radius, 3)
        sd = section.areas[spot][inside] * np.sqrt(2 * grown)
        np.testing.assert_allclose(found[i], brute_force(places, sd) ** 2, rtol=1e-4)


def test_a_spot_that_two_states_hold_out_gets_the_variance_of_the_first():
    section = make_section()
    split = sections.split_spots(section, True, 0, 0)
    nothing = np.zeros((len(split.held_out), G), np.float32)
    networks = [default_network(section, seed) for seed in (1, 2)]
    both = [states.State(network, split, nothing) for network in networks]
    found = uncertainty.held_out_variance(both, section, split.held_out, CPU)
    first = uncertainty.held_out_variance(both[:1], section, split.held_out, CPU)
    np.testing.assert_array_equal(found, first)


def drawn(n: int, mean: np.ndarray, variance: np.ndarray, seed: int = 0) -> np.ndarray:
    """Counts (n, G) around expectations of this mean and variance."""
    shape = mean**2 / variance
    rng = np.random.default_rng(seed)
    return rng.poisson(rng.gamma(shape, mean / shape, (n, *mean.shape))).astype(np.float32)


def test_the_factors_of_genes_come_back():
    mean, factors = np.array([20.0, 40, 80, 40]), np.array([1.0, 2, 4, 3])
    measured = drawn(4000, mean, factors * 30)
    predicted = np.tile(mean, (4000, 1))
    variance = np.full(predicted.shape, 30.0)
    found, covered = uncertainty.calibrate(measured, predicted, variance, disc=40.0)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, factors, rtol=0.1)
    assert covered == pytest.approx(0.9, abs=0.01)


def test_a_gene_lies_within_three_times_the_median_one():
    """For the means: a factor is that of the median gene, by 1/3 to 3, times the gene's mean."""
    predicted = np.tile([20.0, 20, 20, 20, 40], (100, 1))
    wanted = np.array([5.0, 5, 500, 0, 10])  # excess of the squared error over the count's noise
    measured = predicted + np.sqrt(predicted + wanted)
    found = uncertainty.fit_factors(measured, predicted, np.ones_like(predicted), disc=20.0)
    np.testing.assert_allclose(found, [5, 5, 15, 5 / 3, 10], rtol=1e-5)


def test_too_few_counts_leave_the_typical_factor():
    predicted = np.full((7, 7), 1.0)  # 49 counts
    found, covered = uncertainty.calibrate(5 * predicted, predicted, predicted, disc=4.0)
    np.testing.assert_allclose(found, 2.0 * 0.25)
    assert covered is None
    found, covered = uncertainty.calibrate(*np.full((3, 1, 7), 9.0), disc=4.0)  # one spot
    assert covered is None
    np.testing.assert_allclose(found, 2.0 * 9 / 4)


def test_a_gene_without_counts_is_as_certain_as_may_be():
    predicted = np.tile([20.0, 0.0], (60, 1))
    measured = predicted + np.array([10.0, 0.0])
    found = uncertainty.fit_factors(measured, predicted, predicted, disc=10.0)
    assert np.isfinite(found).all()
    assert found[0] == pytest.approx(80 / 20, rel=1e-5)
    assert 0 <= found[1] < 1e-5


# ----- intervals ----------------------------------------------------------------------------------
def test_the_coverage_of_an_exact_model_is_nine_tenths():
    mean, sd = np.array([0.3, 3.0, 50.0]), np.array([0.4, 2.0, 20.0])
    counts = drawn(20000, mean, sd**2)
    for i in range(3):
        n = len(counts)
        covered = errors.coverage(counts[:, i], np.full(n, mean[i]), np.full(n, sd[i]))
        assert covered == pytest.approx(0.9, abs=0.01)


def test_coverage_by_hand():
    mean, sd = np.array([4.0]), np.array([2.0])
    chance = [nbinom.cdf(k, 4, 0.5) for k in range(40)]
    inside = next(k for k in range(40) if chance[k] > 0.5)
    assert errors.coverage(np.array([inside]), mean, sd) == 1
    assert errors.coverage(np.array([39]), mean, sd) == 0
    last = next(k for k in range(40) if chance[k] > 0.95)  # a part of its probability is inside
    part = (0.95 - chance[last - 1]) / (chance[last] - chance[last - 1])
    assert errors.coverage(np.array([last]), mean, sd) == pytest.approx(part)
    zero = np.zeros(2)
    assert errors.coverage(np.array([0, 1]), zero, zero) == pytest.approx(0.45)
    assert np.isnan(errors.coverage(np.array([]), np.array([]), np.array([])))


def test_coverage_of_single_counts_by_hand():
    # Poisson of mean 1: 0.368 of 0, 0.368 of 1, 0.184 of 2, 0.0613 of 3, 0.0153 of 4
    def cover(count, mean=1.0, sd=0.0):
        return errors.coverage(*(np.array([x], float) for x in (count, mean, sd)))

    assert cover(0) == pytest.approx((0.36788 - 0.05) / 0.36788, abs=1e-3)
    assert cover(1) == pytest.approx(1)
    assert cover(3) == pytest.approx((0.95 - 0.91970) / 0.06131, abs=1e-2)
    assert cover(4) == 0
    # an expectation of mean 1 and sd 1 is exponential: counts are geometric, 2^-(n + 1)
    assert cover(0, sd=1) == pytest.approx(0.9, abs=1e-3)
    assert cover(4, sd=1) == pytest.approx((0.95 - 0.9375) / 2**-5, abs=1e-3)
    assert cover(5, sd=1) == 0
    assert cover(0, mean=0) == pytest.approx(0.9)
    assert cover(1, mean=0) == 0


def test_intervals_that_no_count_could_calibrate_are_a_warning(tmp_path, capsys):
    stage = utils.Stage(utils.HISTEX, argparse.Namespace(directory=tmp_path))
    assert uncertainty.report_coverage(stage, None) is None
    assert "cnts-super-sd is not calibrated" in capsys.readouterr().out
    assert any("is not calibrated" in note for note in stage.notes)
    assert uncertainty.report_coverage(stage, 0.9) == 0.9
    assert "intervals 90% of held-out counts" in capsys.readouterr().out
    assert len(stage.notes) == 1
