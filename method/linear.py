"""The linear model: what the tokens and the place of a superpixel tell of its expression.

It errs in other ways than the networks, so that a map gains by a share of it. The square root of
a gene's counts at the spots is taken as the sum of a mean, a linear function of the tokens, a
smooth function of where the spot lies, and noise. That is a Gaussian process (Rasmussen and
Williams 2006, chapters 2 and 5): ridge regression and kriging at once. Two spots with the tokens
t and t', d apart, have the covariance

    1 + a t.t' + (1 - a) (1 + x) exp(-x),   x = sqrt(3) d / (LENGTH pitches).

Here t holds the principal components of the tokens in the disc: their means, at three scales. How
far a gene follows the tokens (a), and how much of it is noise, its own counts tell: the model is
fitted with each of SHARES and NOISES, and the mean of all fits is taken, each weighted by the
likelihood of the counts (its evidence).

The logarithms of the networks and of this model are averaged, each with its share; then the map is
anchored to the spots.

Letters in shapes: N spots, M superpixels, F token features, C components of the tokens, G genes,
Q nodes.
"""

from __future__ import annotations

import math
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
from method.section import STRIP_BYTES, Section, standardised_rows
from writing.progress import Bar

SCALES, HALO = (3, 9), 4  # superpixels: a token, and the means of 24 and 72 um around it
WEIGHTS = (1.0, 1.5, 2.0)  # of these: means vary less than tokens, which is half made up for
COMPONENTS = 128  # principal components of the tokens of spots, at most
FEWEST_SPOTS, MOST_SPOTS = 50, 3000  # fewer tell too little; of more, some are drawn
LENGTH = 2.0  # pitches; that of the covariance over the place
SHARES = (0.0, 0.2, 0.5, 0.8, 1.0)  # a: how far expression follows the tokens, not the place
NOISES = 10.0 ** np.arange(-1, 2.6, 0.5)  # variance of the noise, where tokens and place have 1
NODE = 0.5  # pitches between the nodes, between which the smooth function is linear
MOST_NODES = 60_000  # of a map; where spots lie closer, the nodes lie farther apart
LOWEST = 0.15  # of a gene's mean root: roots of counts are not negative
HIGHEST = 2.0  # of a gene's largest root at a spot, within whose disc a superpixel may stand out
LARGEST = 6e4  # of a component: below the largest number of float16
TINY = 1e-6
SPOTS_AT_ONCE, NODES_AT_ONCE, GENES_AT_ONCE = 64, 4096, 1000


@dataclass(frozen=True)
class Fitted:
    """What the spots have taught: the root of the counts of a disc full of such superpixels."""

    middle: np.ndarray  # (3 F,) of the views of spots
    axes: np.ndarray  # (3 F, C) float32; (view - middle) @ axes are its components
    weights: np.ndarray  # (C, G) float32
    spots: np.ndarray  # (N, 2) places of the spots it learned from
    of_spots: np.ndarray  # (N, G) float32, of the covariance over the place
    mean: np.ndarray  # (G,) float32, the root where tokens and place tell nothing
    lowest: np.ndarray  # (G,) float32, of the roots, as is the next
    highest: np.ndarray  # (G,) float32
    level: np.ndarray  # (G,) float32, log of the mean of counts over the square of the mean root:
    # about what squares of roots lack; anchoring does the rest
    pitch: float  # superpixels


def covariance(places: np.ndarray, others: np.ndarray, pitch: float) -> np.ndarray:
    """Covariance (M, N) over the place: Matern's of order 3/2."""
    x = math.sqrt(3) / (LENGTH * pitch) * cdist(places, others)
    return (1 + x) * np.exp(-x)


def weighted_views(tokens: Tensor) -> Tensor:
    """Standardised tokens and their means (B, rows, columns, 3 F), of tokens with the halo."""
    views = neighbourhoods(tokens, SCALES, HALO)
    for view, weight in zip(views.chunk(len(WEIGHTS), dim=-1), WEIGHTS, strict=True):
        view *= weight
    return views


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
        views = weighted_views(tokens).flatten(1, 2)
        areas = section.areas[some] / section.areas[some].sum(axis=1, keepdims=True)
        out.append(np.einsum("nt,ntf->nf", areas, views.numpy()))
    return np.concatenate(out)


def fit(section: Section) -> Fitted | None:
    """The model of the section's spots; None if there are too few."""
    spots = section.drawn_spots(MOST_SPOTS)
    if len(spots) < FEWEST_SPOTS:
        print(f"no linear model: it takes {FEWEST_SPOTS} spots, and {len(spots)} are on tissue")
        return None
    views, places = disc_views(section, spots), section.spots[spots]
    middle = views.mean(axis=0)
    axes = np.linalg.svd(views - middle, full_matrices=False)[2][:COMPONENTS].T
    tokens = (views - middle) @ axes
    size = math.sqrt((tokens**2).sum() / len(tokens))
    tokens, axes = (x / size if size > TINY else 0 * x for x in (tokens, axes))
    share = section.share[spots, None].clip(max=1).astype(np.float32)
    counts = section.counts[spots] / share
    roots, mean_count = np.sqrt(counts), counts.mean(axis=0, dtype=np.float64)
    mean = roots.mean(axis=0, dtype=np.float64)
    sd = np.maximum(roots.std(axis=0, dtype=np.float64), TINY)
    pitch = max(grid.neighbour_distance(places), 1.0)
    parts = tokens @ tokens.T, covariance(places, places, pitch)
    by_tokens, by_place, constant = posterior(*parts, (roots - mean) / sd)
    return Fitted(
        middle=middle,
        axes=axes.astype(np.float32),
        weights=(tokens.T @ by_tokens * sd).astype(np.float32),
        spots=places,
        of_spots=(by_place * sd).astype(np.float32),
        mean=(mean + constant * sd).astype(np.float32),
        lowest=np.maximum(LOWEST * mean, TINY).astype(np.float32),
        highest=np.maximum(HIGHEST * roots.max(axis=0), TINY).astype(np.float32),
        level=np.log((mean_count + TINY**2) / (mean**2 + TINY**2)).astype(np.float32),
        pitch=pitch,
    )


def posterior(
    of_tokens: np.ndarray, of_place: np.ndarray, y: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Weights (N, G) of the spots in what is told by tokens and by place, and a constant (G,).

    Of values y (N, G) whose covariances (N, N) are those of tokens and of place; the mean over
    SHARES and NOISES, by their evidence, where the scale of the whole is the likeliest.
    """
    parts = []
    for share in Bar(SHARES, "linear model"):
        values, vectors = np.linalg.eigh(1 + share * of_tokens + (1 - share) * of_place)
        parts.append((share, values.clip(0)[:, None], vectors))
    genes = range(0, y.shape[1], GENES_AT_ONCE)
    blocks = [weights_of(parts, y[:, i : i + GENES_AT_ONCE].astype(np.float64)) for i in genes]
    by_tokens, by_place, constant = zip(*blocks, strict=True)
    return np.hstack(by_tokens), np.hstack(by_place), np.concatenate(constant)


def weights_of(
    parts: list[tuple[float, np.ndarray, np.ndarray]], y: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The weights of ``posterior``, from a share and the eigenvalues and -vectors of each."""
    along = [vectors.T @ y for _, _, vectors in parts]
    evidence = np.empty((len(SHARES), len(NOISES), y.shape[1]))
    for i, (_, values, _) in enumerate(parts):
        for j, noise in enumerate(NOISES):
            scale = np.maximum((along[i] ** 2 / (values + noise)).mean(axis=0), TINY)
            evidence[i, j] = -(len(y) * np.log(scale) + np.log(values + noise).sum()) / 2
    chance = np.exp(evidence - evidence.max(axis=(0, 1)))
    chance /= chance.sum(axis=(0, 1))
    by_tokens, by_place, constant = np.zeros_like(y), np.zeros_like(y), np.zeros(y.shape[1])
    for (share, values, vectors), x, weights in zip(parts, along, chance, strict=True):
        shrunk = sum(w / (values + noise) for w, noise in zip(weights, NOISES, strict=True))
        told = vectors @ (x * shrunk)
        by_tokens += share * told
        by_place += (1 - share) * told
        constant += told.sum(axis=0)
    return by_tokens, by_place, constant


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
        there = (weighted_views(x)[0] @ axes - middle).cpu().numpy()[shown[rows]]
        out[done : done + len(there)] = there.clip(-LARGEST, LARGEST)
        done += len(there)
    return out


def smooth(fitted: Fitted, nodes: np.ndarray, genes: slice) -> np.ndarray:
    """What the place alone tells (Q, G') float32 at the nodes (Q, 2) of some genes."""
    parts = np.split(nodes, range(NODES_AT_ONCE, len(nodes), NODES_AT_ONCE))
    of_spots = np.ascontiguousarray(fitted.of_spots[:, genes])
    of_place = (covariance(part, fitted.spots, fitted.pitch).astype(np.float32) for part in parts)
    return np.concatenate([some @ of_spots for some in of_place])


def of_section(section: Section, shown: np.ndarray, device: torch.device) -> Linear | None:
    fitted = fit(section)
    return None if fitted is None else Linear(fitted, section, shown, device)
