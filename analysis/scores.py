"""Compare a map with the truth: the measures of analysis/evaluate.py, on arrays of one gene.

Only tissue counts, and what is not finite in a map counts as zero. A measure is NaN if the truth is
constant (but RMSE); a constant map has r = 0.
"""

from __future__ import annotations

import functools
from collections.abc import Collection
from numbers import Real
from typing import Any

import cv2
import numpy as np
import pandas as pd
from scipy.stats import rankdata

from analysis.inputs import Truth

BINS = (1, 2, 4)  # superpixels per side of a scored block: 8, 16 and 32 um
MIN_BLOCK_TISSUE = 0.5  # share of a block that must be tissue
MEASURES = {"r": "Pearson r", "rho": "Spearman r", "ssim": "SSIM", "rmse": "RMSE (counts)"}
WINDOW, K1, K2 = 7, 0.01, 0.03  # of SSIM, as in scikit-image
CEILING = "ceiling"
LARGEST = 1e15  # number that is shown
METHODS = {
    "histex": "HISTEX",
    "linear": "linear interpolation of spots",
    "nearest": "nearest spot",
    "ceiling": "ceiling set by counting noise",
}


# --------------------------------------------------------------------------------------------------
# blocks and windows
# --------------------------------------------------------------------------------------------------
class Windows:
    """Moments of the tissue in the window around each place of an image (rows, columns)."""

    def __init__(self, tissue: np.ndarray) -> None:
        self.tissue = tissue
        self.n = np.maximum(self._sum(tissue.astype(np.float64)), 1)
        self.unbiased = self.n / np.maximum(self.n - 1, 1)  # sample variance, as in scikit-image

    def _sum(self, image: np.ndarray) -> np.ndarray:
        side = (WINDOW, WINDOW)
        return cv2.boxFilter(image, -1, side, normalize=False, borderType=cv2.BORDER_CONSTANT)

    def mean(self, image: np.ndarray) -> np.ndarray:
        return self._sum(np.where(self.tissue, image, 0.0)) / self.n

    def covariance(
        self, a: np.ndarray, mean_a: np.ndarray, b: np.ndarray, mean_b: np.ndarray
    ) -> np.ndarray:
        return (self.mean(a * b) - mean_a * mean_b) * self.unbiased


class Blocks:
    """Blocks of size x size superpixels, those cut by the image's edge left out.

    ``scored`` (R, C) are those at least half tissue, ``area`` (R, C) is their tissue.
    """

    def __init__(self, tissue: np.ndarray, size: int) -> None:
        self.size = size
        self.rows, self.cols = (n // size for n in tissue.shape)
        self.tissue = tissue[: self.rows * size, : self.cols * size]
        area = self._add(self.tissue)
        self.scored = area >= max(MIN_BLOCK_TISSUE * size**2, 1)
        self.area = np.where(self.scored, area, 1)
        self.windows = Windows(self.scored)

    def _add(self, image: np.ndarray) -> np.ndarray:
        shape = (self.rows, self.size, self.cols, self.size)
        return image if self.size == 1 else image.reshape(shape).sum((1, 3))

    def total(self, image: np.ndarray) -> np.ndarray:
        """Sum (R, C) over the tissue of each block; 0 where it is not scored."""
        image = image[: self.rows * self.size, : self.cols * self.size].astype(np.float64)
        filled = np.where(self.tissue & np.isfinite(image), image, 0)
        return np.where(self.scored, self._add(filled), 0)

    def mean(self, image: np.ndarray) -> np.ndarray:
        """Mean (R, C) over the tissue of each block; 0 where it is not scored."""
        return self.total(image) / self.area


def make_blocks(tissue: np.ndarray) -> list[Blocks]:
    return [Blocks(tissue, size) for size in BINS]


# --------------------------------------------------------------------------------------------------
# measures
# --------------------------------------------------------------------------------------------------
def is_constant(x: np.ndarray) -> bool:
    """Whether values differ by no more than the rounding of float32."""
    return x.size == 0 or bool(np.ptp(x) <= np.finfo(np.float32).eps * np.abs(x).max())


def pearson(a: np.ndarray, b: np.ndarray) -> float:
    """r of the vector a with the truth b; 0 for a constant a, NaN for a constant b."""
    if is_constant(b):
        return np.nan
    if is_constant(a):
        return 0.0
    a, b = a - a.mean(), b - b.mean()
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


def rmse(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.sqrt(np.square(a - b).mean())) if len(b) else np.nan


def ssim_map(a: np.ndarray, b: np.ndarray, windows: Windows, extent: float) -> np.ndarray:
    """SSIM (rows, columns) of two images, with the data range ``extent``."""
    c1, c2 = (K1 * extent) ** 2, (K2 * extent) ** 2
    ma, mb = windows.mean(a), windows.mean(b)
    both = windows.covariance(a, ma, b, mb)
    va, vb = windows.covariance(a, ma, a, ma), windows.covariance(b, mb, b, mb)
    return (2 * ma * mb + c1) * (2 * both + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2))


def published_protocol(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """RMSE and SSIM of whole maps (rows, columns), each scaled to 0..1 by its own extremes."""
    a, b = (stretch(np.nan_to_num(image.astype(np.float64))) for image in (a, b))
    edge = WINDOW // 2  # as scikit-image, the mean is over windows that are whole
    similar = ssim_map(a, b, Windows(np.ones(a.shape, bool)), 1.0)[edge:-edge, edge:-edge]
    return rmse(a.ravel(), b.ravel()), float(similar.mean())


def stretch(image: np.ndarray) -> np.ndarray:
    image = image - image.min()
    return image / (image.max() or 1)


class Target:
    """The true image (R, C) of a gene in blocks; each measure compares another image with it.

    It is made from the molecules (rows, columns), of which a spot catches the share ``capture``.
    """

    def __init__(self, counts: np.ndarray, blocks: Blocks, capture: float = 1.0) -> None:
        self.blocks, self.totals = blocks, blocks.total(counts)
        self.image = self.totals / blocks.area * capture
        self.noise = self.image * capture / blocks.area  # variance by counting, as of Poisson
        self.values = self.image[blocks.scored]
        self.extent = float(np.ptp(self.values)) if self.values.size else 0.0

    @functools.cached_property
    def ranks(self) -> np.ndarray:
        return rankdata(self.values)

    def r(self, image: np.ndarray) -> float:
        return pearson(image[self.blocks.scored], self.values)

    def rho(self, image: np.ndarray) -> float:
        return pearson(rankdata(image[self.blocks.scored]), self.ranks)

    def rmse(self, image: np.ndarray) -> float:
        return rmse(image[self.blocks.scored], self.values)

    def ssim(self, image: np.ndarray) -> float:
        """Mean over the tissue; the data range is that of the truth."""
        if not self.extent:
            return np.nan
        similar = ssim_map(image, self.image, self.blocks.windows, self.extent)
        return float(similar[self.blocks.scored].mean())


# --------------------------------------------------------------------------------------------------
# ceilings
# --------------------------------------------------------------------------------------------------
def reliability(r: float) -> float:
    """Of the whole, from the correlation of two halves (Spearman and Brown)."""
    r = float(np.clip(r, 0, 1))
    return 2 * r / (1 + r)


def best_r(values: np.ndarray, noise: np.ndarray) -> float:
    """r of the expectation with values (N,) whose counting noise has the variances ``noise``.

    It is the square root of the share of the variance that is not noise. Of counts, whose noise is
    as large as their mean, that share is what ``reliability`` gives on average over all splits of
    the molecules into random halves.
    """
    if is_constant(values):
        return np.nan
    return float(np.sqrt(np.clip(1 - noise.mean() / values.var(ddof=1), 0, 1)))


def best_r_of_counts(counts: np.ndarray) -> float:
    """The same for whole counts (N,); unknown (NaN) for fractions."""
    return np.nan if has_fractions(counts) else best_r(counts, counts)


def best_rho(target: Target, seed: int = 0) -> float:
    """Spearman's r of the expectation with the truth, by one split into halves."""
    if is_constant(target.values):
        return np.nan
    totals, area = (image[target.blocks.scored] for image in (target.totals, target.blocks.area))
    half = np.random.default_rng(seed).binomial(totals.astype(np.int64), 0.5)
    r = pearson(rankdata(half / area), rankdata((totals - half) / area))
    return float(np.sqrt(reliability(np.nan_to_num(r))))


def best_ssim(target: Target) -> float:
    """SSIM of the expectation with the truth.

    In a window, the variance of the expectation is that of the truth less the noise, and the two
    means differ by the noise of a mean. Where counts are poor, noise that looks like structure is
    taken for it.
    """
    if not target.extent:
        return np.nan
    windows, c1, c2 = target.blocks.windows, *((k * target.extent) ** 2 for k in (K1, K2))
    mean, noise = windows.mean(target.image), windows.mean(target.noise)
    variance = windows.covariance(target.image, mean, target.image, mean)
    signal = (variance - noise).clip(0)
    off = noise / windows.n  # mean square difference of the two local means
    alike = 1 - off / (np.maximum(2 * mean**2 - off, mean**2) + c1)
    best = alike * (2 * signal + c2) / (signal + np.maximum(variance, signal) + c2)
    return float(best[target.blocks.scored].mean())


def has_fractions(counts: np.ndarray) -> bool:
    return bool((counts != np.floor(counts)).any())


def whole_counts(counts: np.ndarray, seed: int = 0) -> np.ndarray:
    """Counts in which each molecule lies in one superpixel; of no use for single superpixels.

    Truth that was binned by area shares molecules between neighbours, which hides their noise.
    Rounding fractions up or down at random keeps the mean and gives them noise like that of counts.
    """
    if not has_fractions(counts):
        return counts
    return np.floor(counts + np.random.default_rng(seed).random(counts.shape))


def ceiling(measure: str, target: Target) -> float:
    noise = target.noise[target.blocks.scored]
    if measure == "r":
        return best_r(target.values, noise)
    if measure == "rmse":
        return float(np.sqrt(noise.mean())) if len(noise) else np.nan
    return best_rho(target) if measure == "rho" else best_ssim(target)


# --------------------------------------------------------------------------------------------------
# all scores of a gene
# --------------------------------------------------------------------------------------------------
def column(method: str, measure: str, size: int) -> str:
    """histex_4x is Pearson's r, histex_ssim_4x the SSIM."""
    return f"{method}_{size}x" if measure == "r" else f"{method}_{measure}_{size}x"


def score_gene(
    counts: np.ndarray,
    maps: dict[str, np.ndarray],
    grids: list[Blocks],
    mean: np.ndarray | None = None,
    capture: float = 1.0,
    measures: Collection[str] = tuple(MEASURES),
) -> dict[str, float]:
    """Scores of each map (rows, columns) and the ceiling, by names such as histex_4x."""
    molecules, scores = whole_counts(counts), {}
    fractions = molecules is not counts
    for blocks in grids:
        target = Target(counts, blocks, capture)
        whole = Target(molecules, blocks, capture) if fractions else target
        shown = {name: blocks.mean(image) for name, image in maps.items()}
        if mean is not None:
            shown[CEILING] = blocks.mean(mean) * capture
        for measure in measures:
            for name, image in shown.items():
                scores[column(name, measure, blocks.size)] = getattr(target, measure)(image)
            if mean is None:
                # The noise of rounded fractions is about right in blocks, for correlations.
                known = not fractions or (blocks.size > 1 and measure in ("r", "rho"))
                best = ceiling(measure, whole) if known else np.nan
                scores[column(CEILING, measure, blocks.size)] = best
    return scores


def score(
    truth: Truth, maps: dict[str, np.ndarray], measures: Collection[str] = tuple(MEASURES)
) -> pd.DataFrame:
    """A row of ``score_gene`` per gene; maps are (rows, columns, genes)."""
    grids = make_blocks(truth.tissue)
    rows = []
    for i in range(len(truth.genes)):
        mean = None if truth.mean is None else truth.mean[..., i]
        own = {name: stack[..., i] for name, stack in maps.items()}
        rows.append(score_gene(truth.counts[..., i], own, grids, mean, truth.capture, measures))
    return pd.DataFrame(rows, index=pd.Index(truth.genes, name="gene"))


def rounded(value: float | None, digits: int = 4) -> float | None:
    """For JSON, which knows no NaN."""
    return None if value is None or not np.isfinite(value) else round(float(value), digits)


def number_text(value: Any, form: str = ".2f") -> str:
    """A number in words: "unknown" for what is none, as a record may hold it."""
    is_number = isinstance(value, Real) and abs(value) < LARGEST  # type: ignore[operator]
    return f"{value:{form}}" if is_number else "unknown"
