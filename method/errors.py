"""The errors of the maps: how large they are where, and in sums of superpixels.

The error of a superpixel has a variance that is proportional to the map, as that of counts, and
grows with the distance from the nearest spot, to whose counts the map is anchored: three radii away
it is four times that in the middle of a spot. Half of the variance is a superpixel's own, nearly
all of the rest is shared with those beside it; that tells the standard deviation (sd) of any sum.
What each gene's variance is, held-out spots tell (uncertainty.py).

The shape was found on sections of known truth (benchmarks/UNCERTAINTY.md).

Letters in shapes: G genes, P superpixels of a map, S sums.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.ndimage import gaussian_filter
from scipy.sparse import csr_array
from scipy.spatial import cKDTree
from scipy.stats import nbinom

CORRELATION = (  # of two errors: share, and width in superpixels of a Gaussian of their distance
    (0.45, 1.0),
    (0.05, 4.0),
)
OWN = 1 - sum(share for share, _ in CORRELATION)  # share of the variance
REACH = 12.0  # superpixels, beyond which there is no correlation: three widths
FARTHEST = 3.0  # radii of a spot, beyond which the variance grows no more
COVERAGE = 0.9  # share of the counts that a central interval should hold
MIN_SHARE = 1e-3  # of the mean that is its sd: with less, the counts are those of Poisson anyway


# --------------------------------------------------------------------------------------------------
# the shape of the errors
# --------------------------------------------------------------------------------------------------
def growth(places: np.ndarray, spots: np.ndarray, radius: float) -> np.ndarray:
    """Variance (P,) at places (P, 2) over that in the middle of a spot, 1 to 1 + FARTHEST."""
    distance = cKDTree(spots).query(places)[0]
    return (1 + np.minimum(distance / radius, FARTHEST)).astype(np.float32)


def correlation(distance2: np.ndarray) -> np.ndarray:
    """Of the errors of superpixels at these squared distances."""
    shared = (share * np.exp(-distance2 / (2 * width**2)) for share, width in CORRELATION)
    return OWN * (distance2 == 0) + sum(shared)


@dataclass(frozen=True)
class Errors:
    """What the standard deviation of a map follows from."""

    factors: np.ndarray  # (G,) in counts: variance over mean, in the middle of a spot
    grown: np.ndarray  # (P,) growth

    def sd(self, maps: np.ndarray, genes: slice) -> np.ndarray:
        """Standard deviation (G', P) of the maps (G', P) of some genes."""
        return np.sqrt(maps * self.factors[genes, None] * self.grown)


# --------------------------------------------------------------------------------------------------
# sums of superpixels
# --------------------------------------------------------------------------------------------------
def sd_of_sum(sd: np.ndarray) -> float:
    """Of one sum over superpixels, from their sd (rows, columns), 0 where one is not in it."""
    variance = OWN * np.square(sd, dtype=np.float64).sum()
    for share, width in CORRELATION:
        # scipy's Gaussian has a sum of 1; ours is 1 in the middle
        near = gaussian_filter(sd.astype(np.float64), width, mode="constant", radius=int(REACH))
        variance += share * 2 * np.pi * width**2 * (sd * near).sum()
    return float(np.sqrt(variance))


def pairs(places: np.ndarray, group: np.ndarray) -> csr_array:
    """Correlations (P, P) of the errors of superpixels (P, 2) that are in the same sum (P,)."""
    found = cKDTree(places).query_pairs(REACH, output_type="ndarray")
    one, other = found[group[found[:, 0]] == group[found[:, 1]]].T
    distance2 = np.square(places[one] - places[other], dtype=np.float64).sum(axis=1)
    shared, own = correlation(distance2), np.arange(len(places))
    values = np.concatenate([shared, shared, np.ones(len(places))])
    where = np.concatenate([one, other, own]), np.concatenate([other, one, own])
    return csr_array((values, where), shape=(len(places),) * 2)


def sd_of_sums(sd: np.ndarray, correlations: csr_array, group: np.ndarray, n: int) -> np.ndarray:
    """Of sums 0..n - 1, (n,) or (n, G), by the sd (P,) or (P, G) of superpixels.

    ``group`` (P,) tells the sum that each belongs to, and ``correlations`` are its ``pairs``.
    """
    parts = sd * (correlations @ sd)
    member = csr_array((np.ones(len(group)), (group, np.arange(len(group)))), shape=(n, len(group)))
    return np.sqrt(member @ parts)


# --------------------------------------------------------------------------------------------------
# intervals of counts
# --------------------------------------------------------------------------------------------------
def coverage(counts: np.ndarray, mean: np.ndarray, sd: np.ndarray) -> float:
    """Share of whole counts (N,) inside the central 90 % interval of mean and sd (N,).

    A count is negative binomial: counting noise around an expectation that is gamma distributed
    with this mean and sd. Counts at the ends of the interval count in part, as much of their
    probability as lies inside: an exact model has a coverage of 0.9 also where most counts are 0.
    Where the mean is 0 nothing but 0 is expected.
    """
    if not len(counts):
        return np.nan
    below, upto = np.zeros((2, len(counts)))
    some = mean > 0
    shape = 1 / np.maximum(sd[some] / mean[some], MIN_SHARE) ** 2
    chance = shape / (shape + mean[some])
    upto[some] = nbinom.cdf(counts[some], shape, chance)
    several = counts[some] > 0  # most are 0, below which there is nothing
    below[np.flatnonzero(some)[several]] = nbinom.cdf(
        counts[some][several] - 1, shape[several], chance[several]
    )
    upto[~some], below[~some] = 1, counts[~some] > 0
    tail = (1 - COVERAGE) / 2
    inside = np.minimum(upto, 1 - tail) - np.maximum(below, tail)
    share = np.clip(inside, 0, None) / np.maximum(upto - below, 1e-12)
    return float(share.mean())
