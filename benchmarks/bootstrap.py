"""Bootstrap intervals of a difference in r between two predictors, over genes and over places.

Both a set of genes and a section are samples: other genes or another piece of tissue would give
another figure. A draw takes as many genes and as many squares of tissue as there are, with
replacement; genes and squares are the same for both predictors, and the difference of their
medians of r is taken. Squares are wider than what neighbours have in common.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from analysis import inputs, scores

SQUARE = 32  # superpixels: 256 um
DRAWS = 1000
INTERVAL = (2.5, 97.5)  # percentiles


class Moments(NamedTuple):
    """Of truth x and map y in every square: what r of any set of squares follows from."""

    n: np.ndarray  # (squares,) blocks of a square
    sums: np.ndarray  # (5, squares, genes): of x, y, x^2, y^2, x y


def moments(truth: inputs.Truth, maps: np.ndarray, size: int) -> Moments:
    """In blocks of ``size`` superpixels, of maps (rows, columns, genes)."""
    blocks = scores.Blocks(truth.tissue, size)
    row, col = np.nonzero(blocks.scored)
    square = (row * size // SQUARE) * (truth.tissue.shape[1] // SQUARE + 1) + col * size // SQUARE
    names, square = np.unique(square, return_inverse=True)
    sums = np.empty((5, len(names), len(truth.genes)))
    for gene in range(len(truth.genes)):
        x, y = (blocks.mean(image[..., gene])[blocks.scored] for image in (truth.counts, maps))
        for number, values in enumerate((x, y, x * x, y * y, x * y)):
            sums[number, :, gene] = np.bincount(square, values, len(names))
    return Moments(np.bincount(square, minlength=len(names)), sums)


def pearson(found: Moments, taken: np.ndarray) -> np.ndarray:
    """r (genes,) of squares that are taken so many times (squares,); NaN for a constant truth."""
    n = taken @ found.n
    x, y, xx, yy, xy = np.einsum("s,ksg->kg", taken, found.sums) / n
    spread = np.maximum(xx - x * x, 0) * np.maximum(yy - y * y, 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        r = (xy - x * y) / np.sqrt(spread)
    constant = (yy - y * y) <= 1e-12 * np.maximum(yy, 1e-300)
    return np.where(constant & (xx - x * x > 0), 0.0, r)


def difference(ours: list[Moments], theirs: list[Moments], seed: int = 0) -> tuple[float, ...]:
    """Median r of ours less theirs, each a mean over runs, and its 95 % interval."""
    rng = np.random.default_rng(seed)
    _, n_squares, n_genes = ours[0].sums.shape

    def median(runs: list[Moments], taken: np.ndarray, genes: np.ndarray) -> float:
        return float(np.mean([np.nanmedian(pearson(run, taken)[genes]) for run in runs]))

    def one(taken: np.ndarray, genes: np.ndarray) -> float:
        return median(ours, taken, genes) - median(theirs, taken, genes)

    drawn = []
    for _ in range(DRAWS):
        squares = rng.integers(0, n_squares, n_squares)
        taken = np.bincount(squares, minlength=n_squares).astype(float)
        drawn.append(one(taken, rng.integers(0, n_genes, size=(n_genes,))))
    whole = one(np.ones(n_squares), np.arange(n_genes))
    return whole, *(float(edge) for edge in np.percentile(drawn, INTERVAL))
