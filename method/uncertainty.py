"""The uncertainty of the maps: how far the truth may lie from them, by held-out spots.

The error of a superpixel has a variance that is proportional to the map, as that of counts, and
grows with the distance from the nearest spot, to whose counts the map is anchored: three radii away
it is four times that in the middle of a spot. How large it is, each gene learns from held-out
spots. These are sums over discs, so that it has to be known how errors of neighbours go together:
half of the variance is a superpixel's own, nearly all of the rest is shared with those beside it.
The same correlation tells the standard deviation of any sum of superpixels, ``sd_of_sums``.

The shape of all this was found on sections of known truth (benchmarks/UNCERTAINTY.md), on which
single genes, sections and sizes of sums agree within a factor of about two in variance.

Letters in shapes: B spots, C superpixels of a disc, G genes, M held-out spots, P superpixels of a
map, S sums.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy.ndimage import gaussian_filter
from scipy.sparse import csr_array
from scipy.spatial import cKDTree
from scipy.stats import nbinom

import utils
from method.network import Network, run_batch
from method.section import Section, Split
from method.states import State

CORRELATION = (  # of two errors: share, and width in superpixels of a Gaussian of their distance
    (0.45, 1.0),
    (0.05, 4.0),
)
OWN = 1 - sum(share for share, _ in CORRELATION)  # share of the variance
REACH = 12.0  # superpixels, beyond which there is no correlation: three widths
FARTHEST = 3.0  # radii of a spot, beyond which the variance grows no more
TYPICAL = 2.0  # variance in the middle of a spot over the gene's squared mean, of the median gene
GENE_FACTOR = 3.0  # a gene's own lies within a third and three times that of the median gene
MIN_CALIBRATION_COUNTS = 50  # held-out counts of which 1 is expected; with fewer: TYPICAL
COVERAGE = 0.9  # share of the counts that a central interval should hold
MIN_SHARE = 1e-3  # of the mean that is its sd: with less, the counts are those of Poisson anyway
SCORED_AT_ONCE = 16  # held-out spots
MANY = 2000  # superpixels of a sum, from which on a filter is faster than pairs


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
# held-out spots
# --------------------------------------------------------------------------------------------------
def of_disc(
    network: Network, section: Section, split: Split, batch: np.ndarray, device: torch.device
) -> np.ndarray:
    """Variance (B, G) of the predicted counts of held-out spots, for genes of factor 1."""
    output, areas, _ = run_batch(network, section, split, batch, device)
    maps, chosen = network.to_counts(output).cpu().numpy(), section.chosen[batch]
    row, col = section.patches(np.floor(section.spots[batch]).astype(int))
    places = np.stack([np.take_along_axis(x, chosen, axis=1) for x in (row, col)], axis=-1)
    out = np.empty((len(batch), maps.shape[-1]), np.float32)
    for i, (place, area) in enumerate(zip(places, areas.cpu().numpy(), strict=True)):
        apart = np.square(place[:, None] - place[None]).sum(axis=-1)
        grown = growth(place + 0.5, section.spots[split.train], section.radius)
        sd = area[:, None] * np.sqrt(grown[:, None] * maps[i])
        out[i] = (sd * (correlation(apart) @ sd)).sum(axis=0)
    return out


def held_out_variance(
    states: list[State], section: Section, held_out: np.ndarray, device: torch.device
) -> np.ndarray:
    """Variance (M, G) of the counts predicted in the held-out spots (M,), for genes of factor 1."""
    out = np.empty((len(held_out), section.counts.shape[1]), np.float32)
    for state in reversed(states):  # the first that holds a spot out scores it
        spots = state.split.held_out
        state.network.eval()
        with torch.inference_mode():
            parts = [
                of_disc(state.network, section, state.split, batch, device)
                for batch in np.array_split(spots, -(-len(spots) // SCORED_AT_ONCE))
            ]
        out[np.searchsorted(held_out, spots)] = np.concatenate(parts)
    return out


def fit_factors(
    measured: np.ndarray, predicted: np.ndarray, variance: np.ndarray, disc: float
) -> np.ndarray:
    """Factors (G,), in counts, that turn the variances (M, G) into those of the held-out counts.

    What the squared errors of a gene are above the noise of counts is shared out over its spots.
    Genes differ in this by their means per superpixel, of which there are ``disc`` in a spot; what
    is left lies within GENE_FACTOR of the median gene, for a few spots tell it badly.
    """
    mean = np.maximum(predicted.mean(axis=0), 1e-6) / disc
    if (predicted >= 1).sum() < MIN_CALIBRATION_COUNTS:
        return (TYPICAL * mean).astype(np.float32)
    excess = (np.square(measured - predicted) - predicted).sum(axis=0)
    said = np.maximum(variance.sum(axis=0) * mean, 1e-12)
    own = np.where(predicted.sum(axis=0) > 0, excess / said, 0)
    middle = np.median(own[own > 0]) if (own > 0).any() else TYPICAL
    return (mean * own.clip(middle / GENE_FACTOR, middle * GENE_FACTOR)).astype(np.float32)


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


def calibrate(
    measured: np.ndarray, predicted: np.ndarray, variance: np.ndarray, disc: float
) -> tuple[np.ndarray, float | None]:
    """The factors of ``fit_factors``, and the coverage of counts by intervals fitted without them.

    Each half of the held-out spots is judged by the factors of the other half.
    """
    halves, counts, means, sds = (slice(0, None, 2), slice(1, None, 2)), [], [], []
    for learn, judge in (halves, halves[::-1]):
        if not len(measured[learn]):
            continue
        factors = fit_factors(measured[learn], predicted[learn], variance[learn], disc)
        seen = predicted[judge] >= 1
        counts.append(np.rint(measured[judge][seen]))
        means.append(predicted[judge][seen])
        sds.append(np.sqrt(factors * variance[judge])[seen])
    known = sum(map(len, counts)) >= MIN_CALIBRATION_COUNTS
    covered = coverage(*map(np.concatenate, (counts, means, sds))) if known else None
    factors = fit_factors(measured, predicted, variance, disc)
    return factors, None if covered is None else round(covered, 4)


def report_coverage(stage: utils.Stage, covered: float | None) -> float | None:
    """Say how many held-out counts lie in their intervals."""
    if covered is None:
        stage.warn(
            f"{utils.SPREAD.name} is not calibrated: in held-out spots hardly any gene is "
            f"expected to have a count"
        )
    else:
        print(
            f"  intervals {covered:.0%} of held-out counts lie in a 90 % interval that was "
            f"calibrated on other held-out spots"
        )
    return covered
