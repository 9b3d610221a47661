"""benchmarks/bootstrap.py: r from moments, and intervals of differences."""

import numpy as np
import pytest

from analysis import inputs, scores
from benchmarks import bootstrap


def made(rng, shape=(96, 128), genes=12):
    field = rng.gamma(2, 1, (*shape, genes))
    tissue = np.ones(shape, bool)
    tissue[:20, :30] = False
    counts = rng.poisson(3 * field).astype(np.float32)
    names = [f"G{i}" for i in range(genes)]
    return inputs.Truth(counts, tissue, names, None, 1.0), field


@pytest.mark.parametrize("size", [1, 4])
def test_r_of_all_squares_is_that_of_the_scores(size):
    truth, field = made(np.random.default_rng(0))
    field[..., 3] = 1.0
    truth.counts[..., 4] = 0
    found = bootstrap.moments(truth, field, size)
    r = bootstrap.pearson(found, np.ones(len(found.n)))
    blocks = scores.Blocks(truth.tissue, size)
    for gene in range(len(truth.genes)):
        x, y = (blocks.mean(a[..., gene])[blocks.scored] for a in (field, truth.counts))
        assert r[gene] == pytest.approx(scores.pearson(x, y), abs=1e-9, nan_ok=True)
    assert (len(found.n), found.n.sum()) == (12, blocks.scored.sum())


def test_r_of_some_squares_is_that_of_their_superpixels():
    truth, field = made(np.random.default_rng(1))
    found = bootstrap.moments(truth, field, 1)
    taken = np.zeros(len(found.n))
    taken[[5, 7]] = 1, 2  # rows 32 to 63, columns 32 to 63 and, twice, 96 to 127
    pieces = [(slice(32, 64), slice(32, 64)), *[(slice(32, 64), slice(96, 128))] * 2]
    x = np.concatenate([field[piece].reshape(-1, 12) for piece in pieces])
    y = np.concatenate([truth.counts[piece].reshape(-1, 12) for piece in pieces])
    wanted = [np.corrcoef(x[:, i], y[:, i])[0, 1] for i in range(12)]
    np.testing.assert_allclose(bootstrap.pearson(found, taken), wanted, atol=1e-9)


def test_the_interval_holds_a_clear_difference_and_none_where_there_is_none():
    rng = np.random.default_rng(2)
    truth, field = made(rng)
    noisy = field + rng.normal(0, 2, field.shape)
    again = field + rng.normal(0, 2, field.shape)
    exact, one, other = ([bootstrap.moments(truth, maps, 1)] for maps in (field, noisy, again))
    middle, low, high = bootstrap.difference(exact, one)
    assert 0 < low < middle < high
    medians = [np.nanmedian(bootstrap.pearson(part[0], np.ones(12))) for part in (exact, one)]
    assert middle == pytest.approx(medians[0] - medians[1])
    _, low, high = bootstrap.difference(one, other)
    assert low < 0 < high
    assert bootstrap.difference(exact, exact) == (0, 0, 0)
    both = bootstrap.difference(one + exact, exact)[0]
    assert both == pytest.approx(-middle / 2)
