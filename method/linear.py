"""The linear model: what the tokens and the place of a superpixel tell of its expression.

It errs in other ways than the networks, so that a map gains by a share of it. The square root of
a gene's counts at the spots is taken as the sum of a mean, a linear function of the tokens, a
smooth function of where the spot lies, and noise. That is a Gaussian process (Rasmussen and
Williams 2006, chapters 2 and 5): ridge regression and kriging at once. Two spots with the tokens
t and t', d apart, have the covariance

    1 + a t.t' + (1 - a) (1 + x) exp(-x),   x = sqrt(3) d / (LENGTH pitches).

Here t holds principal components, either of the tokens of single superpixels or of their means over
24 and 72 um, both averaged over the disc.

Genes learn from each other: it is not they that are fitted, but patterns, the principal components
of the roots of all genes at the spots. What many genes share lies in the first ones, almost free
of noise, and most of the others turn out to be noise. A gene is the sum of the patterns, each times
its loading. How far a pattern follows tokens (a) and which of the two, and how much of it is noise,
its values tell: the model is fitted with each of SHARES and NOISES, and the mean of all fits is
taken, each weighted by the likelihood of the values (its evidence). Sums over discs can hardly tell
what single superpixels add, so that single tokens have odds of SINGLE_ODDS before any count.

The networks weigh single tokens and their means by the variance that each of them explains of the
genes, one by one (``fineness``). A gene that is all noise has no say in it.

The logarithms of the networks and of this model are averaged, each with its share; then the map is
anchored to the spots.

Letters in shapes: N spots, M superpixels, F token features, C components of tokens and of their
means together, G genes, K patterns, Q nodes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from scipy.spatial.distance import cdist
from torch import Tensor

from method import grid
from method.anchoring import weighted_sums
from method.devices import to_device
from method.layers import neighbourhoods
from method.section import STRIP_BYTES, Fitted, Section, standardised_rows
from writing.progress import Bar

SCALES, HALO = (3, 9), 4  # superpixels: a token, and the means of 24 and 72 um around it
COMPONENTS = 128  # principal components of the tokens of spots, and as many of their means, at most
FEWEST_SPOTS, MOST_SPOTS = 50, 2500  # fewer tell too little; of more, some are drawn
LENGTH = 2.0  # pitches; that of the covariance over the place
SHARES = (0.2, 0.5, 0.8, 1.0)  # a: how far expression follows the tokens, if it follows them
SINGLE_ODDS = 50.0  # of single tokens against their means, before any count
NOISES = 10.0 ** np.arange(-1, 2.6, 0.5)  # variance of the noise, where tokens and place have 1
NODE = 0.5  # pitches between the nodes, between which the smooth function is linear
MOST_NODES = 60_000  # of a map; where spots lie closer, the nodes lie farther apart
LOWEST = 0.15  # of a gene's mean root: roots of counts are not negative
HIGHEST = 2.0  # of a gene's largest root at a spot, within whose disc a superpixel may stand out
LARGEST = 6e4  # of a component: below the largest number of float16
SMALLEST = 1e-9  # of the largest variance of a pattern: less is rounding
TINY = 1e-6
SPOTS_AT_ONCE, NODES_AT_ONCE, GENES_AT_ONCE = 64, 4096, 1000  # of patterns, too


@dataclass(frozen=True)
class Fit:
    """A share (3,) of single tokens, of their means and of the place, and its covariance."""

    shares: tuple[float, float, float]
    odds: float  # before any count
    values: np.ndarray  # (N, 1), eigenvalues of the covariance
    vectors: np.ndarray  # (N, N), its eigenvectors


class Posterior(NamedTuple):
    """What the mean of all fits predicts values (N, K) from."""

    weights: np.ndarray  # (3, N, K) of the spots, in what single tokens, means, and the place tell
    constant: np.ndarray  # (K,)


def covariance(places: np.ndarray, others: np.ndarray, pitch: float) -> np.ndarray:
    """Covariance (M, N) over the place: Matern's of order 3/2."""
    x = math.sqrt(3) / (LENGTH * pitch) * cdist(places, others)
    return (1 + x) * np.exp(-x)


def disc_views(section: Section, spots: np.ndarray) -> np.ndarray:
    """Means (N, 3 F) over the discs of spots (indices) of the standardised tokens at all scales."""
    (mean, std), out = section.token_statistics, []
    side = 2 * (section.half + HALO) + 1
    bytes_each = 4 * side**2 * len(mean) * (2 + len(SCALES))
    step = min(max(1, STRIP_BYTES // bytes_each), SPOTS_AT_ONCE)
    for start in range(0, len(spots), step):
        some = spots[start : start + step]
        squares = section.squares(np.floor(section.spots[some]).astype(int), HALO)
        tokens = torch.from_numpy(((squares - mean) / std).astype(np.float32))
        views = neighbourhoods(tokens, SCALES, HALO).flatten(1, 2)
        areas = section.areas[some] / section.areas[some].sum(axis=1, keepdims=True)
        out.append(np.einsum("nt,ntf->nf", areas, views.numpy()))
    return np.concatenate(out)


def unit(x: np.ndarray) -> float:
    """What makes the mean of |x|^2 over the rows of x (N, F) one; 0 if none differs from 0."""
    size = math.sqrt((x**2).sum() / len(x))
    return 1 / size if size > TINY else 0.0


def component_axes(views: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Axes (3 F, C1) of single tokens and (3 F, C2) of their means, from views (N, 3 F) about 0.

    Components along either vary by one in sum; the means over both squares count alike.
    """
    scales = np.split(views, 1 + len(SCALES), axis=1)
    n_features = scales[0].shape[1]
    factors = np.repeat([unit(part) for part in scales], n_features)
    out = []
    for columns in (slice(0, n_features), slice(n_features, None)):
        part = views[:, columns] * factors[columns]
        axes = np.linalg.svd(part, full_matrices=False)[2][:COMPONENTS].T
        out.append(np.zeros((views.shape[1], axes.shape[1])))
        out[-1][columns] = unit(part @ axes) * factors[columns, None] * axes
    return out[0], out[1]


def fit(section: Section) -> Fitted | None:
    """The model of the section's spots; None if there are too few."""
    spots = section.drawn_spots(MOST_SPOTS)
    if len(spots) < FEWEST_SPOTS:
        print(f"no linear model: it takes {FEWEST_SPOTS} spots, and {len(spots)} are on tissue")
        return None
    views, places = disc_views(section, spots).astype(np.float64), section.spots[spots]
    middle = views.mean(axis=0)
    axes = component_axes(views - middle)
    tokens = [(views - middle) @ x for x in axes]
    counts = section.full_counts(spots)
    roots, mean_count = np.sqrt(counts), counts.mean(axis=0, dtype=np.float64)
    mean = roots.mean(axis=0, dtype=np.float64)
    sd = np.maximum(roots.std(axis=0, dtype=np.float64), TINY)
    pitch = max(grid.neighbour_distance(places), 1.0)
    fits = fits_of([*(x @ x.T for x in tokens), covariance(places, places, pitch)])
    varies = sd > TINY
    blocks = [slice(i, i + GENES_AT_ONCE) for i in range(0, len(sd), GENES_AT_ONCE)]

    def standardised(genes: slice) -> np.ndarray:
        return (roots[:, genes] - mean[genes]) / sd[genes]

    shared = patterns(standardised(genes) for genes in blocks)
    some = np.array_split(shared, 1 + shared.shape[1] // GENES_AT_ONCE, axis=1)
    each = zip(*(posterior(fits, y) for y in some), strict=True)
    found = Posterior(*(np.concatenate(parts, axis=-1) for parts in each))
    *by_tokens, by_place = found.weights.astype(np.float32)
    by_components = np.concatenate(
        [x.T.astype(np.float32) @ by for x, by in zip(tokens, by_tokens, strict=True)]
    )
    weights, of_spots, constant, by_views = [], [], [], np.zeros(2)
    for genes in blocks:
        values = standardised(genes)
        loadings = shared.T @ values / len(values) * sd[genes]
        constant.append(found.constant @ loadings)
        loadings = loadings.astype(np.float32)
        weights.append(by_components @ loadings)
        of_spots.append(by_place @ loadings)
        by_views += explained(fits, values)[:, varies[genes]].sum(axis=1)
    return Fitted(
        middle=middle,
        axes=np.hstack(axes).astype(np.float32),
        weights=np.hstack(weights),
        spots=places,
        of_spots=np.hstack(of_spots),
        mean=(mean + np.concatenate(constant)).astype(np.float32),
        lowest=np.maximum(LOWEST * mean, TINY).astype(np.float32),
        highest=np.maximum(HIGHEST * roots.max(axis=0), TINY).astype(np.float32),
        level=np.log((mean_count + TINY**2) / (mean**2 + TINY**2)).astype(np.float32),
        pitch=pitch,
        fineness=fineness(*by_views),
    )


def patterns(blocks: Iterable[np.ndarray]) -> np.ndarray:
    """Principal components (N, K) of values (N, G), which come in blocks of genes.

    Each is scaled to a mean square of 1, and those along which nothing varies are left out.
    """
    products = sum(values @ values.T for values in blocks)
    variances, vectors = np.linalg.eigh(products)
    varies = variances > max(SMALLEST * variances[-1], TINY)
    return vectors[:, varies] * math.sqrt(len(vectors))


def join(section: Section, shares_in_maps: bool, weighs_scales: bool) -> None:
    """Fit the section's model, if there is use for it, and have it weigh the scales of tokens."""
    section.linear = fit(section) if shares_in_maps or weighs_scales else None
    section.fineness = 0.0
    if weighs_scales and section.linear is not None:
        section.fineness = section.linear.fineness
        single, means = math.exp(section.fineness), math.exp(-section.fineness)
        print(f"weights, as the spots tell: single tokens {single:.2f}, their means {means:.2f}")


def fineness(by_single: float, by_means: float) -> float:
    """Half the logarithm of what single tokens explain over what their means explain.

    It is bounded by what it is before any count.
    """
    most = math.log(SINGLE_ODDS) / 2
    found = math.log((by_single + TINY * SINGLE_ODDS) / (by_means + TINY)) / 2
    return min(max(found, -most), most)


def fits_of(kernels: Sequence[np.ndarray]) -> list[Fit]:
    """With each share, of covariances (N, N) of single tokens, of their means and of the place."""
    each = [((a, 0.0, 1 - a), SINGLE_ODDS) for a in SHARES]
    each += [((0.0, a, 1 - a), 1.0) for a in SHARES]
    each += [((0.0, 0.0, 1.0), SINGLE_ODDS + 1)]
    fits = []
    for shares, odds in Bar(each, "linear model"):
        total = sum((s * x for s, x in zip(shares, kernels, strict=True) if s), np.ones(1))
        values, vectors = np.linalg.eigh(total)
        fits.append(Fit(shares, odds, values.clip(0)[:, None], vectors))
    return fits


def along_axes(fits: Sequence[Fit], y: np.ndarray) -> list[np.ndarray]:
    """Values y (N, K) along the eigenvectors of each fit."""
    return [fit.vectors.T @ y for fit in fits]


def chances(fits: Sequence[Fit], along: Sequence[np.ndarray]) -> np.ndarray:
    """Chance (fits, NOISES, K) of each fit with each noise, by the evidence of values along axes.

    The scale of each covariance is the likeliest.
    """
    evidence = np.empty((len(fits), len(NOISES), along[0].shape[1]))
    for i, (fit, x) in enumerate(zip(fits, along, strict=True)):
        for j, noise in enumerate(NOISES):
            scale = np.maximum((x**2 / (fit.values + noise)).mean(axis=0), TINY)
            determinant = np.log(fit.values + noise).sum()
            evidence[i, j] = math.log(fit.odds) - (len(x) * np.log(scale) + determinant) / 2
    chance = np.exp(evidence - evidence.max(axis=(0, 1)))
    return chance / chance.sum(axis=(0, 1))


def posterior(fits: Sequence[Fit], y: np.ndarray) -> Posterior:
    """The mean over the fits, each with NOISES, of values y (N, K), by their evidence."""
    along = along_axes(fits, y)
    weights, constant = np.zeros((3, *y.shape)), np.zeros(y.shape[1])
    for fit, x, by_noise in zip(fits, along, chances(fits, along), strict=True):
        shrunk = sum(p / (fit.values + noise) for p, noise in zip(by_noise, NOISES, strict=True))
        told = fit.vectors @ (x * shrunk)
        for i, share in enumerate(fit.shares):
            if share > 0:
                weights[i] += share * told
        constant += told.sum(axis=0)
    return Posterior(weights, constant)


def explained(fits: Sequence[Fit], y: np.ndarray) -> np.ndarray:
    """Share (2, G) of the variance of values y (N, G) by single tokens and by their means."""
    by_fit = chances(fits, along_axes(fits, y)).transpose(0, 2, 1) @ (1 / (1 + NOISES))
    return np.array([fit.shares[:2] for fit in fits]).T @ by_fit


class OfGenes(NamedTuple):
    """What a fitted model holds of some genes, on the device."""

    weights: Tensor  # (C, G)
    smooth: Tensor  # (Q, G)
    mean: Tensor  # (G,), and so are the others
    lowest: Tensor
    highest: Tensor
    level: Tensor


class Linear:
    """The model on the M superpixels that are shown (h, w)."""

    def __init__(
        self, fitted: Fitted, section: Section, shown: np.ndarray, device: torch.device
    ) -> None:
        self.fitted, self.device = fitted, device
        self.log_area = math.log(math.pi * section.radius**2)
        self.components = components(fitted, section, shown, device)
        step = max(NODE * fitted.pitch, math.sqrt(shown.size / MOST_NODES))
        columns = math.ceil((shown.shape[1] - 1) / step) + 2
        near, self.shares = between(np.argwhere(shown) / step, columns)
        used, near = np.unique(near, return_inverse=True)
        self.near = near.reshape(-1, 4).astype(np.int32)
        self.nodes = step * np.stack(np.divmod(used, columns), axis=1) + 0.5

    def of_genes(self, genes: slice) -> OfGenes:
        fitted = self.fitted
        values = (fitted.mean, fitted.lowest, fitted.highest, fitted.level)
        tables = (fitted.weights[:, genes], smooth(fitted, self.nodes, genes))
        parts = (*tables, *(value[genes] for value in values))
        return OfGenes(*(to_device(np.ascontiguousarray(x), self.device) for x in parts))

    def log_counts(self, part: slice, genes: OfGenes) -> Tensor:
        """Logarithm of the counts per superpixel (M', G') of some superpixels and genes."""
        arrays = (self.components[part], self.near[part], self.shares[part])
        components, near, shares = (to_device(array, self.device) for array in arrays)
        roots = weighted_sums(near, shares, genes.smooth).addmm_(components.float(), genes.weights)
        roots = (roots + genes.mean).clamp(genes.lowest, genes.highest)
        return 2 * roots.log() + (genes.level - self.log_area)


def between(places: np.ndarray, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """The four nodes around places (M, 2), in steps of the nodes: indices int32, shares (M, 4)."""
    whole = np.floor(places).astype(np.int32)
    (y, x), first = (places - whole).T, whole[:, 0] * columns + whole[:, 1]
    near = first[:, None] + np.array([0, 1, columns, columns + 1], np.int32)
    shares = np.stack([(1 - y) * (1 - x), (1 - y) * x, y * (1 - x), y * x], axis=1)
    return near, shares.astype(np.float32)


def components(
    fitted: Fitted, section: Section, shown: np.ndarray, device: torch.device
) -> np.ndarray:
    """Components (M, C) float16 of the tokens of the superpixels that are shown."""
    middle = (fitted.middle @ fitted.axes).astype(np.float32)
    axes, middle = (to_device(x, device) for x in (fitted.axes, middle))
    out, done = np.empty((int(shown.sum()), fitted.axes.shape[1]), np.float16), 0
    statistics = section.token_statistics
    for rows, x in standardised_rows(section.tokens, statistics, HALO, len(SCALES), device):
        there = (neighbourhoods(x, SCALES, HALO)[0] @ axes - middle).cpu().numpy()[shown[rows]]
        out[done : done + len(there)] = there.clip(-LARGEST, LARGEST)
        done += len(there)
    return out


def smooth(fitted: Fitted, nodes: np.ndarray, genes: slice) -> np.ndarray:
    """What the place alone tells (Q, G') float32 at the nodes (Q, 2) of some genes."""
    parts = np.split(nodes, range(NODES_AT_ONCE, len(nodes), NODES_AT_ONCE))
    of_spots = np.ascontiguousarray(fitted.of_spots[:, genes])
    of_place = (covariance(part, fitted.spots, fitted.pitch).astype(np.float32) for part in parts)
    return np.concatenate([some @ of_spots for some in of_place])
