"""How well the maps' standard deviations tell their errors: for analysis/evaluate.py.

The truth is a count, the map an expectation which itself is uncertain, and cnts-super-sd/ its
standard deviation (sd). Blocks are sums of superpixels, whose sd follows from the correlation of
their errors (method/errors.py).
"""

from __future__ import annotations

import numpy as np
from scipy.stats import rankdata

from analysis.scores import Blocks, pearson, whole_counts
from method.errors import correlations, coverage

SIZES = (1, 2, 4, 8)  # superpixels per side of a block: 8, 16, 32 and 64 um
RANKED = 4  # size of the blocks whose errors are ranked
FEWEST = 3.0  # counts in the mean such block; poorer genes rank by whether there is a count
TENTHS = 10


def make_grids(tissue: np.ndarray) -> list[Blocks]:
    return [Blocks(tissue, size) for size in SIZES]


def sd_of_blocks(sd: np.ndarray, blocks: Blocks) -> np.ndarray:
    """Of the sums (R, C) over the tissue of each block, from the sd (rows, columns)."""
    size, (rows, cols) = blocks.size, (blocks.rows, blocks.cols)
    image = sd[: rows * size, : cols * size]
    image = np.where(blocks.tissue & np.isfinite(image), image, 0).astype(np.float64)
    each = image.reshape(rows, size, cols, size).swapaxes(1, 2).reshape(rows, cols, size * size)
    places = np.argwhere(np.ones((size, size)))
    return np.sqrt((each @ correlations(places) * each).sum(axis=-1))


def rank_in_tenths(errors: np.ndarray, guess: np.ndarray, tenths: np.ndarray) -> float:
    """Mean over the tenths of Spearman's r between errors and a guess at their size, (N,)."""
    parts = [np.flatnonzero(tenths == tenth) for tenth in range(TENTHS)]
    return float(
        np.mean([pearson(rankdata(guess[part]), rankdata(errors[part])) for part in parts])
    )


def score_ranks(counts: np.ndarray, mean: np.ndarray, sd: np.ndarray) -> dict[str, float]:
    """How well the sd ranks the errors of counts (N,) among blocks of about the same mean.

    Beside what the mean itself ranks, and what the sd would if errors were drawn from it.
    """
    names = [f"rank_{name}" for name in ("sd", "map", "ideal")]
    if len(counts) < TENTHS**2 or mean.mean() < FEWEST:
        return dict.fromkeys(names, np.nan)
    tenths = (rankdata(mean, method="ordinal") - 1) * TENTHS // len(mean)
    rng, shape = np.random.default_rng(0), np.square(mean / np.maximum(sd, 1e-3 * mean))
    drawn = rng.poisson(rng.gamma(shape) * mean / shape)
    total = np.sqrt(mean + np.square(sd))
    pairs = ((abs(counts - mean), total), (abs(counts - mean), mean), (abs(drawn - mean), total))
    found = (rank_in_tenths(errors, guess, tenths) for errors, guess in pairs)
    return dict(zip(names, found, strict=True))


def score_uncertainty(
    counts: np.ndarray, image: np.ndarray, sd: np.ndarray, grids: list[Blocks], capture: float = 1.0
) -> dict[str, float]:
    """Scores of a gene's map and sd (rows, columns) by its true counts; NaN if unknown.

    For blocks of 2 x 2, by names such as coverage_2x: the share of counts in their 90 % interval;
    coverage_poisson_2x, as if the map were certain; and sd_ratio_2x, the sd that the errors show
    beyond counting noise over the one that is said. Then ``score_ranks``. What lies outside of the
    map is left out.
    """
    known = np.isfinite(image) & np.isfinite(sd)
    scores: dict[str, float] = {}
    molecules = whole_counts(counts)
    for blocks in grids:
        names = [f"{name}_{blocks.size}x" for name in ("coverage", "coverage_poisson", "sd_ratio")]
        if blocks.size == 1 and molecules is not counts:
            scores |= dict.fromkeys(names, np.nan)
            continue
        chosen = blocks.scored & (blocks.total(known) > 0)
        true = blocks.total(np.where(known, molecules, 0))[chosen]
        mean = blocks.total(image)[chosen] / capture
        spread = sd_of_blocks(np.where(known, sd, 0), blocks)[chosen] / capture
        excess, said = (np.square(true - mean) - mean).sum(), np.square(spread).sum()
        ratio = float(np.sqrt(max(excess, 0) / said)) if said > 0 else np.nan
        covered = [coverage(true, mean, width) for width in (spread, 0 * spread)]
        scores |= dict(zip(names, (*covered, ratio), strict=True))
        if blocks.size == RANKED:
            scores |= score_ranks(true, mean, spread)
    return scores
