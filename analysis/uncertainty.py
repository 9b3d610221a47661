"""How often the truth lies where the maps' standard deviations say: for analysis/evaluate.py.

The truth is a count, the map an expectation which itself is uncertain, and cnts-super-sd/ its
standard deviation. The count is then taken for negative binomial: counting noise around an
expectation that is gamma distributed with this mean and standard deviation.
"""

from __future__ import annotations

import numpy as np
from scipy.stats import nbinom

from analysis.scores import Blocks, whole_counts

COVERAGE = 0.9  # share of the counts that the central interval should hold
MIN_SHARE = 1e-3  # of the mean that is its sd: with less, the counts are those of Poisson anyway


def coverage(counts: np.ndarray, mean: np.ndarray, sd: np.ndarray) -> float:
    """Share of whole counts (N,) inside the central 90 % interval of mean and sd (N,).

    Counts at the ends of the interval count in part, as much of their probability as lies inside:
    an exact model has a coverage of 0.9 also where most counts are 0. Where the mean is 0 nothing
    but 0 is expected.
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


def score_coverage(
    counts: np.ndarray, image: np.ndarray, sd: np.ndarray, grids: list[Blocks], capture: float = 1.0
) -> dict[str, float]:
    """Coverage in blocks of a gene's counts (rows, columns), by its map and sd; NaN if unknown.

    Columns coverage_1x, ... and, as if the map were certain, coverage_poisson_1x, ... What lies
    outside of the map is left out. The errors in a block are taken for fully correlated: the sd of
    its sum is the sum of the sd. If they were independent, it would be the root of the summed
    squares, so the intervals of 2x and 4x are rather too wide.
    """
    known = np.isfinite(image) & np.isfinite(sd)
    scores: dict[str, float] = {}
    molecules = whole_counts(counts)
    for blocks in grids:
        names = [f"coverage{kind}_{blocks.size}x" for kind in ("", "_poisson")]
        if blocks.size == 1 and molecules is not counts:
            scores |= dict.fromkeys(names, np.nan)
            continue
        chosen = blocks.scored & (blocks.total(known) > 0)
        true = blocks.total(np.where(known, molecules, 0))[chosen]
        mean, spread = (blocks.total(x)[chosen] / capture for x in (image, sd))
        for name, width in zip(names, (spread, 0 * spread), strict=True):
            scores[name] = coverage(true, mean, width)
    return scores
