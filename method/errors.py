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
REACH = 12  # superpixels, beyond which there is no correlation: three widths
MANY = 100  # superpixels of a sum, above which a filter is faster than all pairs
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


def correlations(places: np.ndarray) -> np.ndarray:
    """Of the errors of all pairs of superpixels (P, 2), row and column: (P, P)."""
    return correlation(np.square(places[:, None] - places[None]).sum(axis=-1))


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
        near = gaussian_filter(sd.astype(np.float64), width, mode="constant", radius=REACH)
        variance += share * 2 * np.pi * width**2 * (sd * near).sum()
    return float(np.sqrt(variance))


class Sums:
    """Sums of superpixels, such as cells and regions, by the shares (S, P) that each takes of them.

    ``places`` (P, 2) are rows and columns. Few superpixels are taken pair by pair, many are
    filtered.
    """

    def __init__(self, shares: csr_array, places: np.ndarray) -> None:
        self.shares, self.places = csr_array(shares), places
        n = np.diff(self.shares.indptr)
        self.large = np.flatnonzero(n > MANY)
        small = np.flatnonzero(n <= MANY)
        n_pairs = n[small] ** 2
        self.sum = np.repeat(small, n_pairs)
        rank = np.arange(n_pairs.sum()) - np.repeat(np.cumsum(n_pairs) - n_pairs, n_pairs)
        start, each = self.shares.indptr[self.sum], n[self.sum]
        one, other = start + rank // np.maximum(each, 1), start + rank % np.maximum(each, 1)
        self.one, self.other = self.shares.indices[one], self.shares.indices[other]
        apart = np.square(places[self.one] - places[self.other], dtype=np.float64).sum(axis=1)
        self.weight = self.shares.data[one] * self.shares.data[other] * correlation(apart)

    def sd(self, sd: np.ndarray) -> np.ndarray:
        """Of all sums (S,), from the sd of superpixels (P,)."""
        parts = self.weight * sd[self.one] * sd[self.other]
        found = np.sqrt(np.bincount(self.sum, parts, self.shares.shape[0]))
        for number in self.large:
            part = slice(*self.shares.indptr[number : number + 2])
            where = self.shares.indices[part]
            row, col = (self.places[where] - self.places[where].min(axis=0)).T
            image = np.zeros((row.max() + 1, col.max() + 1))
            image[row, col] = self.shares.data[part] * sd[where]
            found[number] = sd_of_sum(image)
        return found


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
