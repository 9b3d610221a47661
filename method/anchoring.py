"""Anchoring: maps are scaled so that the discs of the spots sum to about what was measured.

Letters in shapes: G genes, K neighbours, M superpixels, N spots, P HR points.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as nnf
from scipy.sparse import csr_array
from scipy.spatial import cKDTree
from torch import Tensor

from method.section import Section

ROUNDS = 2  # a third would fit the spots more closely and the truth less (ABLATIONS.md)
ANCHORS = 8  # spots around a superpixel that its map is anchored to
COUNTS_AT_ONCE = 500_000  # superpixels times genes; they stay in a CPU's cache
GENES_AT_ONCE = 16
PLACES_AT_ONCE = 200_000  # superpixels looked up


def nearest_points(points: np.ndarray, places: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The points nearest to the superpixels (M, 2): indices int32 (M, K), squared distances."""
    k = min(k, len(points))
    near, distance2 = (np.empty((len(places), k), dtype) for dtype in (np.int32, np.float32))
    tree = cKDTree(points)
    for start in range(0, len(places), PLACES_AT_ONCE):
        part = slice(start, start + PLACES_AT_ONCE)
        distance, near[part] = tree.query(places[part] + 0.5, np.arange(1, k + 1), workers=-1)
        distance2[part] = distance**2
    return near, distance2


def weighted_sums(rows: Tensor, weights: Tensor, table: Tensor) -> Tensor:
    """Sums (M, G) of some rows (M, K) of a table (P, G), with weights (M, K)."""
    return nnf.embedding_bag(rows, table, mode="sum", per_sample_weights=weights)


@dataclass(frozen=True)
class Anchors:
    """How M superpixels hang together with the N spots that have tissue."""

    discs: csr_array  # (N, M), area of the spot's disc in a superpixel
    near: Tensor  # int32 (M, K), spots around a superpixel
    shares: Tensor  # float32 (M, K), by inverse squared distance

    def predicted(self, maps: np.ndarray) -> np.ndarray:
        """Sums (N, G) of maps (G, M) over the discs."""
        out = np.empty((self.discs.shape[0], len(maps)), np.float32)
        for start in range(0, len(maps), GENES_AT_ONCE):  # scipy copies what it multiplies
            genes = slice(start, start + GENES_AT_ONCE)
            out[:, genes] = self.discs @ maps[genes].T
        return out


def find_anchors(section: Section, places: np.ndarray) -> Anchors:
    """How the superpixels (M, 2), row and column, hang together with the spots on tissue."""
    spots, areas = section.spots[section.usable], section.areas[section.usable]
    h, w = section.tissue.shape
    number = np.full((h, w), -1, np.int32)  # of the superpixel, if it is one of the places
    number[tuple(places.T)] = np.arange(len(places))
    row, col = section.patches(np.floor(spots).astype(int))
    number = np.where(areas > 0, number[row.clip(0, h - 1), col.clip(0, w - 1)], -1)
    first = np.concatenate([[0], (number >= 0).sum(axis=1).cumsum()])
    discs = csr_array((areas[number >= 0], number[number >= 0], first), (len(spots), len(places)))
    near, distance2 = map(torch.from_numpy, nearest_points(spots, places, ANCHORS))
    shares = 1 / (distance2 + 1)
    return Anchors(discs, near, shares / shares.sum(dim=1, keepdim=True))


def anchor_to_spots(maps: np.ndarray, measured: np.ndarray, anchors: Anchors, prior: float) -> None:
    """Scale maps (G, M) in place, so that discs sum to what the spots measured, (N, G).

    At every spot the logarithm of measured over predicted counts tells what the network missed; it
    is interpolated between the spots by inverse squared distance. The prior, in counts, keeps the
    ratio of few counts near 1, for they are mostly chance. A second round takes up what the first,
    which mixes a spot's ratio with those of its neighbours, has left. Last, the whole map is scaled
    to the total of the spots: what is fitted on square roots comes out some percent too low on
    average.
    """
    for _ in range(ROUNDS):
        missed = np.log((measured + prior) / (anchors.predicted(maps) + prior))
        ratios, step = torch.from_numpy(missed), max(1, COUNTS_AT_ONCE // len(maps))
        for start in range(0, maps.shape[1], step):
            part = slice(start, start + step)
            factors = weighted_sums(anchors.near[part], anchors.shares[part], ratios).exp_()
            maps[:, part] *= factors.numpy().T
    total, wanted = anchors.predicted(maps).sum(axis=0), measured.sum(axis=0)
    maps *= np.divide(wanted, total, out=np.ones_like(wanted), where=total > 0)[:, None]
