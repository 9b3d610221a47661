"""The section: the arrays of one sample that networks are trained on, and how they are read.

Letters in shapes: B patches, T superpixels of a patch, K HR points of its context, G genes,
F token features, N spots, P HR points. Places are (row, col) in superpixels, continuous.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from scipy.spatial import cKDTree
from torch import Tensor

import utils
from method import grid
from method.devices import to_device
from reading import arrays, images, plain, tables
from reading.genes import read_gene_names

MIN_TISSUE_SHARE = 0.25  # of a disc; from less tissue its counts tell too little, it is left out
FOLDS = 10  # every state holds out another tenth of the spots
MIN_SPOTS = 4
STRIP_BYTES = 64_000_000  # of standardised tokens and their means, made at a time


@dataclass(frozen=True)
class Taught:
    """What a reference predicts from its R features, which are the last of a token.

    The logarithm of a gene's counts over its mean in the section is ``weight`` @ features + bias.
    """

    weight: np.ndarray  # (G, R) float32, 0 for a gene that the reference does not know
    bias: np.ndarray  # (G,) float32, likewise


@dataclass(frozen=True)
class Fitted:
    """The linear model of the spots: roots of the counts of a disc full of like superpixels.

    Q spots taught it; C components are those of tokens and of their means (method/linear.py).
    """

    middle: np.ndarray  # (3 F,) of the views of spots
    axes: np.ndarray  # (3 F, C) float32; (view - middle) @ axes are its components
    weights: np.ndarray  # (C, G) float32
    spots: np.ndarray  # (Q, 2) places of the spots it learned from
    of_spots: np.ndarray  # (Q, G) float32, of the covariance over the place
    mean: np.ndarray  # (G,) float32, the root where tokens and place tell nothing
    lowest: np.ndarray  # (G,) float32, of the roots, as is the next
    highest: np.ndarray  # (G,) float32
    level: np.ndarray  # (G,) float32, log of the mean of counts over the square of the mean root:
    # about what squares of roots lack; anchoring does the rest
    pitch: float  # superpixels
    fineness: float  # half the logarithm of what single tokens explain over what means explain


@dataclass
class Section:
    """All arrays of one sample; places are (row, col) in superpixels."""

    tokens: np.ndarray  # (h, w, F) float16, memory-mapped
    tissue: np.ndarray  # (h, w) bool
    spots: np.ndarray  # (N, 2) places
    counts: np.ndarray  # (N, G) float32
    points: np.ndarray  # (P, 2) places
    expression: np.ndarray  # (P, G) float32, counts of a disc full of tissue
    parents: np.ndarray  # (P, 2) indices of spots; of a measured spot, twice its own
    radius: float  # of a spot, in superpixels
    context: int  # K
    by_area: bool  # discs weighted by area and tissue (default), or counted in whole superpixels
    taught: Taught | None = None  # by a reference
    linear: Fitted | None = None  # the linear model of its spots
    fineness: float = 0.0  # log of the weight of single tokens; widest means weigh its inverse

    def __post_init__(self) -> None:
        self.half = math.ceil(self.radius) if self.by_area else math.floor(self.radius)
        row, col = self.patches(np.floor(self.spots).astype(int))
        if self.by_area:
            self.areas = grid.disc_areas(self.spots, row, col, self.radius) * self.on_tissue(
                row, col
            )
            self.share = self.areas.sum(axis=1) / (math.pi * self.radius**2)  # of a disc, on tissue
            self.usable = self.share >= MIN_TISSUE_SHARE
            self.chosen = largest(self.areas)
            keep = self.usable[self.parents].all(axis=1)
            self.points, self.parents = self.points[keep], self.parents[keep]
            share = self.share.clip(max=1)[self.parents].mean(axis=1, keepdims=True)
            self.expression = self.expression[keep]  # a copy, also of a memory map
            self.expression /= share.astype(np.float32)
        else:
            steps = np.arange(-self.half, self.half + 1)
            disc = steps[:, None] ** 2 + steps**2 <= self.radius**2  # 37 superpixels on Visium
            self.areas = np.tile(disc.ravel().astype(np.float32), (len(row), 1))
            self.chosen = np.tile(np.arange(self.areas.shape[1]), (len(row), 1))
            self.share, self.usable = np.ones(len(row)), np.ones(len(row), bool)
            self.expression = np.array(self.expression)  # also of a memory map

    @functools.cached_property
    def spacing(self) -> float:
        """Median distance of the HR points from their nearest one, in superpixels."""
        return grid.neighbour_distance(self.points)

    @functools.cached_property
    def token_statistics(self) -> tuple[np.ndarray, np.ndarray]:
        return token_statistics(self.tokens, self.tissue)

    def patches(self, centres: np.ndarray, halo: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Rows and columns, each (B, T'), of the superpixels around ``centres`` (B, 2) int.

        They may lie beyond the border of the map.
        """
        steps = np.arange(-self.half - halo, self.half + halo + 1)
        row, col = np.meshgrid(steps, steps, indexing="ij")
        return centres[:, :1] + row.reshape(1, -1), centres[:, 1:] + col.reshape(1, -1)

    def on_tissue(self, row: np.ndarray, col: np.ndarray) -> np.ndarray:
        """Whether the superpixels (row, col) are on the map and tissue, bool in their shape."""
        h, w = self.tissue.shape
        return on_map(row, col, h, w) & self.tissue[row.clip(0, h - 1), col.clip(0, w - 1)]

    def squares(self, centres: np.ndarray, halo: int) -> np.ndarray:
        """Tokens (B, side, side, F) of the patches at ``centres`` (B, 2) int with their halo.

        Beyond the border of the map they are those of the border.
        """
        (h, w), (row, col) = self.tissue.shape, self.patches(centres, halo)
        tokens = self.tokens[row.clip(0, h - 1), col.clip(0, w - 1)]
        side = math.isqrt(tokens.shape[1])
        return tokens.reshape(len(tokens), side, side, -1)

    def drawn_spots(self, most: int) -> np.ndarray:
        """Indices of the usable spots; of more than ``most``, so many, always the same ones."""
        spots = np.flatnonzero(self.usable)
        if len(spots) > most:
            spots = np.sort(np.random.default_rng(0).choice(spots, most, replace=False))
        return spots

    def full_counts(self, spots: np.ndarray) -> np.ndarray:
        """Counts (M, G) float32 of spots (indices), as if their discs were full of tissue."""
        return self.counts[spots] / self.share[spots, None].clip(max=1).astype(np.float32)

    def inputs(
        self, centres: np.ndarray, near: np.ndarray, halo: int, device: torch.device
    ) -> list[Tensor]:
        """What a network takes: tokens (B, side, side, F) of the patch and its halo, expression
        (B, K, G), offsets (B, T, K, 2).

        For patches at ``centres`` (B, 2) int that see the HR points ``near`` (B, K).
        """
        middles = np.stack(self.patches(centres), axis=-1) + 0.5  # (B, T, 2)
        offsets = middles[:, :, None] - self.points[near][:, None]
        taken = (self.squares(centres, halo), self.expression[near], offsets.astype(np.float32))
        return [to_device(array, device).float() for array in taken]

    def context_of_spots(self, held_out: np.ndarray, leave_out: bool) -> np.ndarray:
        """Indices (N, K) of the HR points nearest to every spot.

        With ``leave_out``, none that contains the spot itself or a spot of ``held_out``: what is
        scored or trained on cannot reach its own prediction, nor held-out counts the training.
        """
        allowed, own = np.arange(len(self.points)), 0
        if leave_out:
            allowed = allowed[~np.isin(self.parents, held_out).any(axis=1)]
            first, second = self.parents[allowed].T
            contained = np.concatenate([first, second[second != first]])
            own = np.bincount(contained).max()  # HR points that contain one and the same spot
        k = min(self.context, len(allowed) - own)
        near = nearest(self.points[allowed], self.spots, k + own)
        near = allowed[near]  # (N, K + own), nearest first
        if leave_out:
            spot = np.arange(len(self.spots))[:, None, None]
            is_own = (self.parents[near] == spot).any(axis=-1)
            order = np.argsort(is_own, axis=1, kind="stable")  # its own last, the others as before
            near = np.take_along_axis(near, order, axis=1)
        return near[:, :k]


@dataclass(frozen=True)
class Split:
    """The spots of one state: which train, which are held out, and the context of each."""

    train: np.ndarray  # indices of spots
    held_out: np.ndarray  # indices of spots, (M,); empty if the preset holds out none
    near: np.ndarray  # (N, K) indices of HR points


def split_spots(section: Section, holds_out: bool, seed: int, index: int) -> Split:
    """State ``index`` holds out another fold of the spots; spots without tissue are not used."""
    usable = np.flatnonzero(section.usable)
    if not holds_out:
        return Split(usable, usable[:0], section.context_of_spots(usable[:0], leave_out=False))
    n_folds = min(FOLDS, len(usable))
    fold = np.random.default_rng(seed).permutation(len(usable)) % n_folds
    held_out = usable[fold == index % n_folds]
    near = section.context_of_spots(held_out, leave_out=True)
    return Split(np.setdiff1d(usable, held_out), held_out, near)


def largest(areas: np.ndarray) -> np.ndarray:
    """Indices (N, C), ascending, of all superpixels of a patch that have an area (N, T).

    C is that of the spot with most of them; the others get some without area in addition.
    """
    n_chosen = (areas > 0).sum(axis=1).max()
    return np.sort(np.argsort(-areas, axis=1, kind="stable")[:, :n_chosen], axis=1)


def on_map(row: np.ndarray, col: np.ndarray, h: int, w: int) -> np.ndarray:
    return (row >= 0) & (row < h) & (col >= 0) & (col < w)


def nearest(points: np.ndarray, places: np.ndarray, k: int) -> np.ndarray:
    """Indices (B, k) of the points nearest to every place, nearest first."""
    return cKDTree(points).query(places, k=np.arange(1, k + 1))[1]


def token_statistics(tokens: np.ndarray, tissue: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation (F,) of the tokens of the tissue, read row by row."""
    total, squares = 0.0, 0.0
    for row, inside in enumerate(tissue):
        x = arrays.some_rows(tokens, row, row + 1)[0, inside].astype(np.float64)
        total, squares = total + x.sum(axis=0), squares + (x * x).sum(axis=0)
    mean = total / tissue.sum()
    std = np.sqrt(np.maximum(squares / tissue.sum() - mean**2, 0))
    return mean.astype(np.float32), np.where(std > 1e-6, std, 1).astype(np.float32)


def standardised_rows(
    tokens: np.ndarray,
    statistics: tuple[np.ndarray, np.ndarray],
    halo: int,
    n_scales: int,
    device: torch.device,
) -> Iterator[tuple[slice, Tensor]]:
    """Go down the map and yield (rows, their tokens (1, rows + 2 halo, w + 2 halo, F)).

    Tokens (h, w, F) are standardised by their mean and standard deviation (F,); beyond the border
    are those of the border. It and its means at ``n_scales`` fit the memory.
    """
    (h, w), (mean, std) = tokens.shape[:2], (to_device(values, device) for values in statistics)
    columns = np.arange(-halo, w + halo).clip(0, w - 1)
    step = max(1, STRIP_BYTES // (4 * len(columns) * tokens.shape[-1] * (2 + n_scales)))
    for top in range(0, h, step):
        bottom = min(top + step, h)
        rows = np.arange(top - halo, bottom + halo).clip(0, h - 1)
        block = arrays.some_rows(tokens, rows[0], rows[-1] + 1)
        x = to_device(block[np.ix_(rows - rows[0], columns)], device).float()[None]
        yield slice(top, bottom), (x - mean).div_(std)


# ------------------------------------------------------------------------------------------------
# reading
# ------------------------------------------------------------------------------------------------
def read_hr_points(stage: utils.Stage, spots: pd.Index) -> tuple[np.ndarray, np.ndarray]:
    """Places (P, 2) as (row, col) in px of he.jpg, and parents (P, 2) as indices of ``spots``."""
    path = stage.path(utils.HR_LOCS)
    text = {"parent_1": str, "parent_2": str}
    try:
        table = pd.read_csv(path, index_col=0, dtype=text, keep_default_na=False, encoding="utf-8")
        xy = table[["x", "y"]].astype(np.float64).to_numpy()
        second = table["parent_2"].where(table["measured"] == 0, table["parent_1"])
        parents = np.stack(
            [spots.get_indexer(pd.Index(ids)) for ids in (table["parent_1"], second)], axis=1
        )
    except (ValueError, KeyError, OverflowError) as error:
        raise stage.error(path, f"is not a table of HR points: {error}") from error
    if len(xy) == 0 or not np.isfinite(xy).all() or (parents < 0).any():
        raise stage.error(
            path,
            f"does not fit {utils.LOCS.name}: of its {len(xy)} points, "
            f"{(parents < 0).any(axis=1).sum()} have a parent that is no spot and "
            f"{(~np.isfinite(xy)).any(axis=1).sum()} have no place.",
        )
    return xy[:, ::-1], parents


def read_expression(stage: utils.Stage, shape: tuple[int, int]) -> np.ndarray:
    """Counts (P, G) of the HR points, memory-mapped: none is negative or beyond reason."""
    expression = arrays.read_array(stage, utils.HR_CNTS, np.float32, shape)
    path = stage.path(utils.HR_CNTS)
    for block in arrays.blocks_of(expression):
        if (lowest := block.min()) < 0:
            raise stage.error(path, f"holds {lowest:g}; counts cannot be negative.")
        if (highest := block.max()) > tables.MAX_COUNT:
            raise stage.error(path, f"holds {highest:g}; counts are {tables.MAX_COUNT:g} at most.")
    return expression


def read_section(
    stage: utils.Stage, context: int, by_area: bool
) -> tuple[Section, pd.Index, list[str]]:
    """All inputs, checked against each other; the ids of the spots and the names of the genes."""
    shape = images.grid_shape(stage)
    tissue = images.read_mask(stage, shape)
    longest = utils.MAX_RADIUS_SUPERPIXELS * utils.TOKEN_PX
    radius = plain.read_number(
        stage, stage.path(utils.RADIUS), utils.TOKEN_PX, longest, "px of he.jpg"
    )
    locs = tables.read_locs(stage, stage.path(utils.LOCS))
    genes = read_gene_names(stage, stage.path(utils.GENE_NAMES))
    if len(locs) < MIN_SPOTS:
        raise stage.error(
            stage.path(utils.LOCS), f"lists {len(locs)} spots; at least {MIN_SPOTS} are needed."
        )
    points, parents = read_hr_points(stage, locs.index)
    expression = read_expression(stage, (len(points), len(genes)))
    measured = np.flatnonzero(parents[:, 0] == parents[:, 1])
    if sorted(parents[measured, 0]) != list(range(len(locs))):
        raise stage.error(
            stage.path(utils.HR_LOCS),
            f"measures {len(measured)} spots; expected each of the {len(locs)} spots once.",
        )
    counts = np.empty((len(locs), len(genes)), np.float32)
    counts[parents[measured, 0]] = expression[measured]
    section = Section(
        tokens=arrays.read_array(stage, utils.FEATURES, np.float16, (*shape, None)),
        tissue=tissue,
        spots=locs[["y", "x"]].to_numpy() / utils.TOKEN_PX,
        counts=counts,
        points=points / utils.TOKEN_PX,
        expression=expression,
        parents=parents,
        radius=radius / utils.TOKEN_PX,
        context=context,
        by_area=by_area,
    )
    usable = int(section.usable.sum())
    if usable < len(locs):
        print(
            f"{len(locs) - usable} of {len(locs)} spots have less than {MIN_TISSUE_SHARE:.0%} of "
            f"their disc on tissue and are left out"
        )
    if usable < MIN_SPOTS:
        raise stage.error(
            stage.path(utils.MASK),
            f"leaves {usable} of {len(locs)} spots on tissue; at least {MIN_SPOTS} are needed.",
        )
    if len(points) < section.context:
        print(f"only {len(points)} HR points: the context is all of them, not {section.context}")
    return section, locs.index, genes
