"""Train HISTEX on the spots of one section and write a super-resolved map of every gene.

    python HISTEX.py --directory data/section --epochs 500 --n-states 5
    torchrun --nproc-per-node 2 HISTEX.py --directory data/section     # states on two cards at once

In    HRlocs.csv, HRcnts.npy, gene-names.txt (get_HR.py), Histology_feature_map.npy
      (Histology_Extractor.py), mask.png (masking_non_tissue.py, or your own), and he.jpg, locs.csv,
      radius.txt (image_calibration.py)
Out   states/NN/               the trained networks, each with its training history
      cnts-super/              a map a gene, float32 (rows, columns), counts per superpixel of 8 um,
                               NaN outside the tissue; index.csv tells which file is which gene
      embeddings-gene.pickle   dict(cls=float32 (D, rows, columns)): latent maps of the first state
      cnts-super-sd/           with --uncertainty: the standard deviation of every map
      held-out-r.csv           how well every gene was predicted in spots the network never saw
      cnts-super-plots/        pictures of the genes with the highest held-out correlation

The network gives every superpixel an expression from two sources: the histology around it (tokens
of a foundation model) and the expression measured around it (HR points). The two inform each other
by bidirectional cross-attention. Only sums are observed: the counts of a spot are the sum over the
superpixels of its disc (multiple-instance learning). ``--n-states`` networks are trained, each from
another start and without another tenth of the spots; the map is their median.

Two presets. ``published`` has the network, loss and block-wise prediction of the published method,
for comparison; ``default`` departs from it:

* A spot's own measurement is left out of its context in training, as are the spots that the state
  holds out; else the network learns to copy and to ignore the histology.
* The output is a factor on the expression interpolated between HR points, so that a map stays tied
  to the spots. Tokens are standardised and seen at three scales; layers have norms and non-linear
  functions; attention is scaled by the width of a head.
* The loss compares square roots, whose counting noise is the same for rich and poor genes.
* Few spots must not be learned by heart: tokens and context are hidden in part (dropout), weights
  decay, and what is kept is the moving average of the weights over the last steps.
* Discs are weighted by area and tissue. Training stops when held-out spots stop improving.
* Patches overlap and are blended in prediction (the logarithms of the factor), so that no seam
  shows. Afterwards the maps are anchored: scaled so that the discs of the spots sum to about what
  was measured.

Both pair a spot with the HR points around its own place (the published code mixes up indices),
shuffle the spots, and show the tissue only.

Letters in shapes: B spots or patches, T superpixels of a patch, K HR points of its context,
G genes, F token features, D width, N spots, P HR points. Places are (row, col) in superpixels,
continuous.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import hashlib
import itertools
import json
import math
import pickle
import shutil
import sys
import tempfile
import time
import urllib.parse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import cv2
import numpy as np
import pandas as pd
import safetensors.torch
import torch
import torch.nn.functional as nnf
from PIL import Image
from scipy.sparse import csr_array
from scipy.spatial import cKDTree
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

import utils
from method import devices, resume
from reading import arrays, images, plain, tables

SCRIPT = utils.HISTEX
INPUTS = (
    utils.HE, utils.LOCS, utils.RADIUS, utils.GENE_NAMES, utils.HR_LOCS, utils.HR_CNTS,
    utils.FEATURES, utils.MASK,
)  # fmt: skip

ALL = slice(None)  # genes
WIDTH = 128  # D, as published
HEADS = 8  # as published
PUBLISHED_CONTEXT = 5  # HR points a patch sees
DEFAULT_CONTEXT = 16  # a hole of one left-out spot is ringed by 12 HR points on a hexagonal lattice
PUBLISHED_HEAD = (1024, 512, 512, 512)
PUBLISHED_BETA, PUBLISHED_ALPHA = 0.01, 0.01  # added after every affine layer; of the last ELU
SCALES = (3, 9)  # superpixels: token neighbourhoods of 24 and 72 um beside the token itself
DROPOUT = 0.5  # of token features, and of the features that the last layer reads
CONTEXT_DROPOUT = 0.3  # of the genes of an HR point
MAX_LOG_FACTOR = 4.0  # the network may change the interpolated expression 55-fold, not more
ANSCOMBE = 0.375  # sqrt(count + 3/8) has a variance of 1/4 whatever the count (Anscombe 1948)
MIN_TISSUE_SHARE = 0.25  # of a disc; from less tissue its counts tell too little, it is left out
SUBSAMPLES = 8  # per superpixel and axis, for the area of a disc in it

BATCH = 16
PUBLISHED_BATCH = 32  # at most; a sixteenth of the spots if that is fewer
LEARNING_RATE = {"default": 1e-3, "published": 1e-4}
WEIGHT_DECAY = 1.0
AVERAGING_DECAY = 0.99  # a step; of the moving average of the weights, which is what is kept
PLATEAU_EPOCHS, PLATEAU_FACTOR = 6, 0.5  # learning rate: halved after so many epochs without gain
PATIENCE_EPOCHS = 12  # stop after so many
FOLDS = 10  # every state holds out another tenth of the spots
MIN_SPOTS = 4
CHECKPOINT_SECONDS = 30.0
GENES_BYTES = 400_000_000  # memory for the maps of the genes that are decoded at a time
PREDICT_BATCH = 64  # patches
STRIP = 64  # columns embedded at a time; small enough for memory that is free already
DECODE_COUNTS = 500_000  # superpixels times genes decoded at a time; they stay in a CPU's cache
POINTS_AT_A_TIME, PLACES_AT_A_TIME = 4096, 200_000  # HR points embedded; superpixels looked up
DROPOUT_PASSES = 4  # of each state, for the uncertainty of the maps
HELD_OUT_PASSES = 32  # more in the held-out spots, which only one state has not seen
COVERAGE, COVERED_SD = 0.9, 1.645  # share of the counts in an interval; its half width
GENE_FACTOR = 3.0  # a gene's own scaling lies within a third and three times the middle one's
MIN_CALIBRATION_COUNTS = 50
ANCHORS = 8  # spots around a superpixel that its map is anchored to
ANCHOR_PRIOR = 2.0  # counts
PLOT_PX, PLOT_MARGIN_PX, COLOUR_BAR_PX = 900, 36, 90
CODE_VERSION = 3  # raise it when the same input gives other results; saved ones then do not count
WINDOWS_DEVICES = ["con", "prn", "aux", "nul"]  # with com1..9 and lpt1..9: no file can be called so
WINDOWS_DEVICES += [f"{port}{i}" for port in ("com", "lpt") for i in range(1, 10)]


# ------------------------------------------------------------------------------------------------
# the networks
# ------------------------------------------------------------------------------------------------
class CrossAttention(nn.Module):
    """Queries (B, Q, .) attend to keys (B, M, .) in several heads and come back as (B, Q, D)."""

    def __init__(self, query_dim: int, key_dim: int, scale: float) -> None:
        super().__init__()
        self.query = nn.Linear(query_dim, WIDTH)
        self.key = nn.Linear(key_dim, WIDTH)
        self.value = nn.Linear(key_dim, WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.scale = scale

    def forward(self, queries: Tensor, keys: Tensor) -> Tensor:
        def heads(x: Tensor) -> Tensor:  # (B, M, D) -> (B, heads, M, D / heads)
            return x.unflatten(-1, (HEADS, WIDTH // HEADS)).transpose(1, 2)

        q, k, v = heads(self.query(queries)), heads(self.key(keys)), heads(self.value(keys))
        mixed = nnf.scaled_dot_product_attention(q, k, v, scale=self.scale)
        return self.out(mixed.transpose(1, 2).flatten(2))


class BidirectionalAttention(nn.Module):
    """Tokens look at expression, expression at tokens, then the first at the second: (B, T, D)."""

    def __init__(self, token_dim: int, expression_dim: int, scale: float) -> None:
        super().__init__()
        self.token_to_expression = CrossAttention(token_dim, expression_dim, scale)
        self.expression_to_token = CrossAttention(expression_dim, token_dim, scale)
        self.fuse = CrossAttention(WIDTH, WIDTH, scale)

    def forward(self, tokens: Tensor, expression: Tensor) -> Tensor:
        informed_tokens = self.token_to_expression(tokens, expression)  # (B, T, D)
        informed_expression = self.expression_to_token(expression, tokens)  # (B, K, D)
        return self.fuse(informed_tokens, informed_expression)


class PublishedAffine(nn.Module):
    """x W + 0.01: no bias, no non-linearity; W is (in, out) and starts in +-1 / sqrt(out)."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        bound = n_out**-0.5
        self.weight = nn.Parameter(torch.empty(n_in, n_out).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + PUBLISHED_BETA


class PublishedNetwork(nn.Module):
    """The published arithmetic: tokens and HR counts (B, K, G) to scaled counts (B, T, G).

    In the steps of ``Network``, of which the first does nothing. Its attention divides by the
    square root of the number of heads, and its head is one affine map.
    """

    halo = 0  # superpixels around the patch that it looks at
    latent_size = WIDTH + PUBLISHED_HEAD[-1]
    interpolates = False

    def __init__(self, section: Section, train: np.ndarray) -> None:
        super().__init__()
        n_features, n_genes = section.tokens.shape[-1], section.counts.shape[1]
        scale = HEADS**-0.5
        self.block1 = BidirectionalAttention(n_features, n_genes, scale)
        self.affine1 = PublishedAffine(WIDTH, WIDTH)
        self.block2 = BidirectionalAttention(WIDTH, n_genes, scale)
        self.affine2 = PublishedAffine(WIDTH, WIDTH)
        sizes = (WIDTH + n_features, *PUBLISHED_HEAD)
        self.head = nn.Sequential(*map(PublishedAffine, sizes[:-1], sizes[1:]))
        self.out = PublishedAffine(sizes[-1], n_genes)
        for name, counts in (("spot", section.counts[train]), ("hr", section.expression)):
            low, high = counts.min(axis=0), counts.max(axis=0)
            self.register_buffer(f"{name}_min", torch.from_numpy(low))
            self.register_buffer(f"{name}_range", torch.from_numpy(high - low))
        self.register_buffer("disc_size", torch.tensor(section.areas[0].sum()))

    def forward(self, tokens: Tensor, expression: Tensor, offsets: Tensor) -> Tensor:
        context = self.embed_expression(expression)
        return self.decode(self.fuse(tokens.flatten(1, 2), context, None), None)

    def see(self, tokens: Tensor) -> Tensor:
        return tokens

    def embed(self, views: Tensor) -> Tensor:
        return views

    def embed_expression(self, expression: Tensor) -> Tensor:
        return (expression - self.hr_min) / torch.where(self.hr_range > 0, self.hr_range, 1)

    def fuse(self, tokens: Tensor, context: Tensor, offsets: Tensor | None) -> Tensor:
        x = self.block1(tokens, context)
        x = self.affine1(x) + x
        x = self.block2(x, context)
        x = self.affine2(x) + x
        return torch.cat([x, self.head(torch.cat([x, tokens], dim=-1))], dim=-1)

    def decode(self, latent: Tensor, interpolated: None, genes: slice = ALL) -> Tensor:
        hidden = latent[..., WIDTH:] @ self.out.weight[:, genes]
        return nnf.elu(hidden, alpha=PUBLISHED_ALPHA) + PUBLISHED_BETA

    def loss(self, scaled: Tensor, areas: Tensor, counts: Tensor) -> Tensor:
        """Squared error of the mean over the disc against the scaled counts, (B, G)."""
        mean = torch.einsum("btg,bt->bg", scaled, areas) / areas.sum(dim=1, keepdim=True)
        span = torch.where(self.spot_range > 0, self.spot_range, 1)
        return (mean - (counts - self.spot_min) / span).square()

    def to_counts(self, scaled: Tensor, genes: slice = ALL) -> Tensor:
        low, span = self.spot_min[genes], self.spot_range[genes]
        return scaled * (span / self.disc_size) + low / self.disc_size


class FeatureDropout(nn.Module):
    """Hides a share of the features of a patch (B, ..., F), the same in all superpixels of it."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        shape = (len(x), *[1] * (x.ndim - 2), x.shape[-1])
        kept = torch.rand(shape, device=x.device) >= self.share
        return x * (kept / (1 - self.share))


def sliding_mean(x: Tensor, size: int, dim: int) -> Tensor:
    """Means of every ``size`` neighbours along an axis. Twice as fast as torch's pooling here."""
    n = x.shape[dim] - size + 1
    total = x.narrow(dim, 0, n)
    for start in range(1, size):
        following = x.narrow(dim, start, n)
        total = total + following if start == 1 else total.add_(following)
    return total if size == 1 else total.div_(size)


class Network(nn.Module):
    """The default network: tokens and HR expression around a patch to counts per superpixel.

    ``forward`` takes tokens (B, rows, columns, F) of the patch with its halo, HR counts of a full
    disc (B, K, G), and offsets (B, T, K, 2) from HR points to superpixels; it returns counts per
    superpixel (B, T, G). It goes in steps, which the prediction of a map takes one by one: ``see``
    and ``embed`` the histology and ``embed_expression``, for which patches do not matter; ``fuse``
    a patch with its context into latent values of its superpixels; ``decode`` these into genes.
    """

    halo = max(SCALES) // 2
    latent_size = 2 * WIDTH  # L
    interpolates = True

    def __init__(self, section: Section, train: np.ndarray) -> None:
        super().__init__()
        n_features, n_genes = section.tokens.shape[-1], section.counts.shape[1]
        scale = (WIDTH // HEADS) ** -0.5
        self.embed_tokens = nn.Sequential(
            FeatureDropout(DROPOUT),
            nn.Linear(n_features * (1 + len(SCALES)), WIDTH),
            nn.LeakyReLU(0.1),
            nn.LayerNorm(WIDTH),
        )
        self.embed_roots = nn.Sequential(nn.Dropout(CONTEXT_DROPOUT), nn.Linear(n_genes, WIDTH))
        self.embed_place = nn.Sequential(nn.Linear(3, 32), nn.LeakyReLU(0.1), nn.Linear(32, WIDTH))
        self.blocks = nn.ModuleList(BidirectionalAttention(WIDTH, WIDTH, scale) for _ in range(2))
        self.token_norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.expression_norm = nn.LayerNorm(WIDTH)
        self.from_histology = nn.Sequential(
            nn.Linear(WIDTH, WIDTH), nn.LeakyReLU(0.1), nn.Dropout(DROPOUT)
        )
        self.log_factor = nn.Linear(self.latent_size, n_genes)
        nn.init.zeros_(self.log_factor.weight)  # start from interpolation
        nn.init.zeros_(self.log_factor.bias)
        self.log_power = nn.Parameter(torch.tensor(math.log(1.5)))  # of the inverse distance
        for name, values in zip(("token_mean", "token_std"), section.token_statistics, strict=True):
            self.register_buffer(name, torch.from_numpy(values))
        rate = section.counts[train].mean(axis=0)
        self.register_buffer("root_scale", torch.from_numpy(1 / np.sqrt(rate + 1)))
        self.register_buffer("disc_area", torch.tensor(math.pi * section.radius**2))
        self.register_buffer("spacing", torch.tensor(section.spacing))

    def forward(self, tokens: Tensor, expression: Tensor, offsets: Tensor) -> Tensor:
        histology = self.embed(self.see(tokens)).flatten(1, 2)
        latent = self.fuse(histology, self.embed_expression(expression), offsets.mean(dim=1))
        shares = self.interpolation(offsets.square().sum(dim=-1))  # (B, T, K)
        return self.decode(latent, shares @ expression)

    def see(self, tokens: Tensor) -> Tensor:
        """Standardised tokens and the means of their neighbourhoods: (B, rows, columns, 3 F).

        Without the halo, that is, with 2 * halo rows and columns less than ``tokens``.
        """
        x = (tokens - self.token_mean).div_(self.token_std)
        views = []
        for size in (1, *SCALES):
            cut = self.halo - size // 2  # so that all scales end up on the same superpixels
            part = x[:, cut : x.shape[1] - cut, cut : x.shape[2] - cut]
            views.append(sliding_mean(sliding_mean(part, size, 1), size, 2))
        return torch.cat(views, dim=-1)

    def embed(self, views: Tensor) -> Tensor:
        """(..., 3 F) -> (..., D)."""
        return self.embed_tokens(views)

    def embed_expression(self, expression: Tensor) -> Tensor:
        """(..., G) -> (..., D)."""
        return self.embed_roots(expression.sqrt() * self.root_scale)

    def fuse(self, histology: Tensor, context: Tensor, offsets: Tensor) -> Tensor:
        """Latent values (B, T, L), of which the first D are the embedding of the maps.

        From histology (B, T, D), the embedded expression of the context (B, K, D), and offsets
        (B, K, 2) from its HR points to the middle of the patch.
        """
        offsets = offsets / self.spacing
        place = torch.cat([offsets, offsets.norm(dim=-1, keepdim=True)], dim=-1)
        context = self.expression_norm(context + self.embed_place(place))
        x = histology
        for norm, block in zip(self.token_norms, self.blocks, strict=True):
            x = x + block(norm(x), context)
        return torch.cat([nnf.leaky_relu(x, 0.1), self.from_histology(histology)], dim=-1)

    def interpolation(self, distance2: Tensor) -> Tensor:
        """Shares (..., K) of a superpixel in the counts of HR points at these squared distances.

        By inverse distance, softened by one superpixel. It has no scale, so that it works alike
        between dense HR points and across the hole of a left-out spot.
        """
        logits = -self.log_power.exp() * torch.log(distance2 + 1)
        return logits.softmax(dim=-1) / self.disc_area

    def decode(self, latent: Tensor, interpolated: Tensor, genes: slice = ALL) -> Tensor:
        """Counts per superpixel (..., G): a factor on the interpolated ones."""
        factor = nnf.linear(latent, self.log_factor.weight[genes], self.log_factor.bias[genes])
        return interpolated * factor.clamp(-MAX_LOG_FACTOR, MAX_LOG_FACTOR).exp()

    def loss(self, maps: Tensor, areas: Tensor, counts: Tensor) -> Tensor:
        """Squared error of the square roots of the disc's sum and the counts, (B, G)."""
        total = torch.einsum("btg,bt->bg", maps, areas)
        return ((total + ANSCOMBE).sqrt() - (counts + ANSCOMBE).sqrt()).square()

    def to_counts(self, maps: Tensor, genes: slice = ALL) -> Tensor:
        return maps


NETWORKS = {"default": Network, "published": PublishedNetwork}


# ------------------------------------------------------------------------------------------------
# the section: what the networks are given
# ------------------------------------------------------------------------------------------------
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

    def __post_init__(self) -> None:
        self.half = math.ceil(self.radius) if self.by_area else math.floor(self.radius)
        row, col = self.patches(np.floor(self.spots).astype(int))
        if self.by_area:
            self.areas = disc_areas(self.spots, row, col, self.radius) * self.on_tissue(row, col)
            share = self.areas.sum(axis=1) / (math.pi * self.radius**2)
            self.usable = share >= MIN_TISSUE_SHARE
            keep = self.usable[self.parents].all(axis=1)
            self.points, self.parents = self.points[keep], self.parents[keep]
            share = share.clip(max=1)[self.parents].mean(axis=1, keepdims=True)
            self.expression = self.expression[keep] / share.astype(np.float32)
        else:
            steps = np.arange(-self.half, self.half + 1)
            disc = steps[:, None] ** 2 + steps**2 <= self.radius**2  # 37 superpixels on Visium
            self.areas = np.tile(disc.ravel().astype(np.float32), (len(row), 1))
            self.usable = np.ones(len(row), bool)

    @functools.cached_property
    def spacing(self) -> float:
        """Median distance of the HR points from their nearest one, in superpixels."""
        return float(np.median(cKDTree(self.points).query(self.points, k=[2])[0]))

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

    def inputs(self, centres: np.ndarray, near: np.ndarray, halo: int, device) -> list[Tensor]:
        """What a network takes: tokens (B, side, side, F) of the patch and its halo, expression
        (B, K, G), offsets (B, T, K, 2).

        For patches at ``centres`` (B, 2) int that see the HR points ``near`` (B, K).
        """
        h, w = self.tissue.shape
        row, col = self.patches(centres, halo)
        tokens = self.tokens[row.clip(0, h - 1), col.clip(0, w - 1)]  # the border's, beyond it
        side = math.isqrt(tokens.shape[1])
        tokens = tokens.reshape(len(tokens), side, side, -1)
        middles = np.stack(self.patches(centres), axis=-1) + 0.5  # (B, T, 2)
        offsets = middles[:, :, None] - self.points[near][:, None]
        arrays = (tokens, self.expression[near], offsets.astype(np.float32))
        return [to_device(array, device).float() for array in arrays]

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


def to_device(array: np.ndarray, device) -> Tensor:
    """The array as a tensor there; a graphics card gets it while the CPU goes on."""
    tensor = torch.from_numpy(array)
    if torch.device(device).type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def on_map(row: np.ndarray, col: np.ndarray, h: int, w: int) -> np.ndarray:
    return (row >= 0) & (row < h) & (col >= 0) & (col < w)


def nearest(points: np.ndarray, places: np.ndarray, k: int) -> np.ndarray:
    """Indices (B, k) of the points nearest to every place, nearest first."""
    return cKDTree(points).query(places, k=np.arange(1, k + 1))[1]


def disc_areas(places: np.ndarray, row: np.ndarray, col: np.ndarray, radius: float) -> np.ndarray:
    """Area (B, T) of the disc around each place (B, 2) in the superpixels row, col (B, T)."""
    middles = (np.arange(SUBSAMPLES) + 0.5) / SUBSAMPLES
    areas = np.empty(row.shape, np.float32)
    for i, (y, x) in enumerate(places):
        down = (row[i, :, None, None] + middles[:, None] - y) ** 2  # (T, subsamples, 1)
        across = (col[i, :, None, None] + middles - x) ** 2  # (T, 1, subsamples)
        areas[i] = (down + across <= radius**2).mean(axis=(1, 2))
    return areas


def token_statistics(tokens: np.ndarray, tissue: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation (F,) of the tokens of the tissue, read row by row."""
    total, squares = 0.0, 0.0
    for row, inside in enumerate(tissue):
        x = arrays.some_rows(tokens, row, row + 1)[0, inside].astype(np.float64)
        total, squares = total + x.sum(axis=0), squares + (x * x).sum(axis=0)
    mean = total / tissue.sum()
    std = np.sqrt(np.maximum(squares / tissue.sum() - mean**2, 0))
    return mean.astype(np.float32), np.where(std > 1e-6, std, 1).astype(np.float32)


# ------------------------------------------------------------------------------------------------
# training one state
# ------------------------------------------------------------------------------------------------
@dataclass
class Split:
    """The spots of one state: which train, which are held out, and the context of each."""

    train: np.ndarray  # indices of spots
    held_out: np.ndarray  # indices of spots, (M,); empty in the published preset
    near: np.ndarray  # (N, K) indices of HR points


def split_spots(section: Section, preset: str, seed: int, index: int) -> Split:
    """State ``index`` holds out another fold of the spots; spots without tissue are not used."""
    usable = np.flatnonzero(section.usable)
    if preset == "published":
        return Split(usable, usable[:0], section.context_of_spots(usable[:0], leave_out=False))
    n_folds = min(FOLDS, len(usable))
    fold = np.random.default_rng(seed).permutation(len(usable)) % n_folds
    held_out = usable[fold == index % n_folds]
    near = section.context_of_spots(held_out, leave_out=True)
    return Split(np.setdiff1d(usable, held_out), held_out, near)


def run_batch(network, section: Section, split: Split, batch: np.ndarray, device):
    """Output (B, T, G), areas (B, T) and counts (B, G) of a batch of spots."""
    centres = np.floor(section.spots[batch]).astype(int)
    output = network(*section.inputs(centres, split.near[batch], network.halo, device))
    areas = to_device(section.areas[batch], device)
    counts = to_device(section.counts[batch], device)
    return output, areas, counts


def seed_torch(*numbers: int) -> None:
    torch.manual_seed(int(np.random.default_rng(numbers).integers(2**63)))


def make_average(network: nn.Module) -> AveragedModel:
    """The moving average of the weights; over the last tenth of the steps while these are few."""

    def blend(averages: list[Tensor], current: list[Tensor], steps: Tensor) -> None:
        decay = min(AVERAGING_DECAY, float((1 + steps) / (10 + steps)))
        for average, weights in zip(averages, current, strict=True):
            average.lerp_(weights, 1 - decay)

    return AveragedModel(network, multi_avg_fn=blend)


def train_epoch(
    network, average, optimizer, section, split, order, batch_size: int, device
) -> float:
    """One pass over the training spots in the given order; returns the mean loss."""
    network.train()
    total = 0.0
    for batch in np.array_split(order, max(1, round(len(order) / batch_size))):
        loss = network.loss(*run_batch(network, section, split, batch, device)).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if average is not None:
            average.update_parameters(network)
        total += float(loss.detach()) * len(batch)
    return total / len(order)


def score_held_out(network, section, split, device) -> tuple[np.ndarray, np.ndarray]:
    """Loss (M,) and predicted counts (M, G) of the held-out spots."""
    network.eval()
    losses, predicted = [], []
    with torch.inference_mode():
        for batch in np.array_split(split.held_out, -(-len(split.held_out) // BATCH)):
            output, areas, counts = run_batch(network, section, split, batch, device)
            losses.append(network.loss(output, areas, counts).mean(dim=1))
            predicted.append(torch.einsum("btg,bt->bg", network.to_counts(output), areas))
    return torch.cat(losses).cpu().numpy(), torch.cat(predicted).cpu().numpy()


class Selection:
    """The epoch to keep: the one at which held-out spots are predicted best.

    For their score they are split in two halves (even, odd), and each half is scored at the epoch
    that the other one chose: the choice of the epoch then does not flatter the score.
    """

    def __init__(self) -> None:
        self.epoch = 0
        self.loss = math.inf
        self.weights: dict[str, Tensor] = {}
        self.half_loss = [math.inf, math.inf]
        self.half_predicted = [torch.empty(0), torch.empty(0)]

    def see(
        self, epoch: int, losses: np.ndarray, predicted: np.ndarray, network: nn.Module
    ) -> None:
        if losses.mean() < self.loss:
            self.epoch, self.loss = epoch, float(losses.mean())
            self.weights = copy.deepcopy(network.state_dict())
        for half in (0, 1):
            chooses = losses[half::2] if len(losses) > 1 else losses
            if chooses.mean() < self.half_loss[half]:
                self.half_loss[half] = float(chooses.mean())
                self.half_predicted[1 - half] = torch.from_numpy(predicted[1 - half :: 2].copy())

    def predicted(self) -> np.ndarray:
        """Counts (M, G) predicted for the held-out spots."""
        even, odd = (half.numpy() for half in self.half_predicted)
        out = np.empty((len(even) + len(odd), even.shape[1]), np.float32)
        out[0::2], out[1::2] = even, odd
        return out


def train_state(
    section: Section, folder: Path, args: argparse.Namespace, key: str, index: int, device
):
    """Train state ``index``, go on where a run with the same key was cut off, or reuse its result.

    Returns the network, the held-out spots (M,) and their predicted counts (M, G). ``folder``
    receives history.csv, held-out.npy, model.safetensors and, as the last, model.json.
    """
    folder.mkdir(parents=True, exist_ok=True)
    split = split_spots(section, args.preset, args.seed, index)
    torch.manual_seed(args.seed + index)
    network = NETWORKS[args.preset](section, split.train).to(device)
    shape = (len(split.held_out), section.counts.shape[1])
    if (predicted := read_state(folder, key, network, shape)) is not None:
        print(f"state {index}: taken from {folder.name}, nothing it was trained on has changed")
        return network, split.held_out, predicted

    optimizer = make_optimizer(network, args)
    average = make_average(network) if args.preset == "default" else None
    kept = network if average is None else average.module
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer, factor=PLATEAU_FACTOR, patience=PLATEAU_EPOCHS
    )
    selection, history = Selection(), []
    checkpoint = folder / "checkpoint.pt"
    if (saved := read_checkpoint(checkpoint, key)) is not None:
        network.load_state_dict(saved["network"])
        if average is not None:
            average.load_state_dict(saved["average"])
        optimizer.load_state_dict(saved["optimizer"])
        schedule.load_state_dict(saved["schedule"])
        vars(selection).update(saved["selection"])
        history = saved["history"]
        print(f"state {index}: goes on after epoch {len(history)}")

    batch_size = batch_size_of(args, len(split.train))
    saved_at = 0.0
    bar = tqdm(total=args.epochs, initial=len(history), desc=f"state {index}", disable=None)
    while len(history) < args.epochs and not should_stop(selection, len(history), split):
        epoch = len(history) + 1
        # Seeded by the epoch, not by what came before: a resumed run draws the same numbers.
        seed_torch(args.seed + index, epoch)
        order = np.random.default_rng([args.seed + index, epoch]).permutation(split.train)
        rate = optimizer.param_groups[0]["lr"]
        loss = train_epoch(network, average, optimizer, section, split, order, batch_size, device)
        row = {"epoch": epoch, "train_loss": loss, "learning_rate": rate}
        if len(split.held_out):
            losses, predicted = score_held_out(kept, section, split, device)
            row["held_out_loss"] = float(losses.mean())
            selection.see(epoch, losses, predicted, kept)
            schedule.step(row["held_out_loss"])
        if not all(map(math.isfinite, row.values())):
            checkpoint.unlink(missing_ok=True)
            raise FloatingPointError(f"the loss of state {index} is not finite in epoch {epoch}")
        history.append(row)
        bar.update()
        bar.set_postfix({k: f"{v:.4f}" for k, v in row.items() if "loss" in k})
        if time.monotonic() - saved_at > CHECKPOINT_SECONDS:
            content = {
                "key": key,
                "network": network.state_dict(),
                "average": None if average is None else average.state_dict(),
                "optimizer": optimizer.state_dict(),
                "schedule": schedule.state_dict(),
                "selection": vars(selection),
                "history": history,
            }
            with utils.atomic(checkpoint) as partial:
                torch.save(content, partial)
            saved_at = time.monotonic()
    bar.close()

    if len(split.held_out):
        network.load_state_dict(selection.weights)
        predicted = selection.predicted()
    else:
        predicted = np.empty(shape, np.float32)
    write_state(folder, network, history, predicted, key, selection.epoch or len(history))
    checkpoint.unlink(missing_ok=True)
    return network, split.held_out, predicted


def train_states(stage: utils.Stage, section: Section, ranks: devices.Ranks, device):
    """All states: their networks, the held-out spots (M,), and predicted counts of these (M, G).

    Of several processes, each trains its share; the first gets those of the others from the disk,
    and the others get nothing. A spot that two states hold out, as happens with more states than
    folds, is scored by the first.
    """
    key, states = training_key(stage, device), range(stage.args.n_states)

    def train(index: int):
        folder = stage.directory / utils.STATES.name / f"{index:02d}"
        return train_state(section, folder, stage.args, key, index, device)

    trained = {index: train(index) for index in ranks.share(states)}
    ranks.barrier()
    if ranks.rank > 0:
        return None
    networks, held_out, predicted = zip(
        *(trained[index] if index in trained else train(index) for index in states), strict=True
    )
    held_out, first = np.unique(np.concatenate(held_out), return_index=True)
    return networks, held_out, np.concatenate(predicted)[first]


def make_optimizer(network: nn.Module, args: argparse.Namespace) -> torch.optim.Optimizer:
    rate = args.learning_rate or LEARNING_RATE[args.preset]
    if args.preset == "published":
        return torch.optim.Adam(network.parameters(), rate)
    return torch.optim.AdamW(network.parameters(), rate, weight_decay=WEIGHT_DECAY)


def batch_size_of(args: argparse.Namespace, n_train: int) -> int:
    if args.batch_size:
        return args.batch_size
    return max(1, min(PUBLISHED_BATCH, n_train // 16)) if args.preset == "published" else BATCH


def should_stop(selection: Selection, epochs: int, split: Split) -> bool:
    return len(split.held_out) > 0 and epochs - selection.epoch >= PATIENCE_EPOCHS


# ------------------------------------------------------------------------------------------------
# states on disk
# ------------------------------------------------------------------------------------------------
def training_key(stage: utils.Stage, device) -> str:
    """Hash of all that decides the weights. States with another key are trained anew."""
    args = stage.args
    inputs = {name: known["sha256"] for name, known in stage.inputs.items()}
    names = ("preset", "epochs", "seed", "batch_size", "learning_rate")
    settings = {name: getattr(args, name) for name in names}
    content = [CODE_VERSION, inputs, settings, torch.device(device).type, torch.__version__]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_key(path: Path) -> str | None:
    """The key in model.json, or None if there is no such file or it is not readable."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))["key"]
    except (OSError, ValueError, KeyError, TypeError):
        return None  # not a finished state: it is trained


def read_checkpoint(path: Path, key: str) -> dict | None:
    """What a run with the same key saved; on the CPU, from where it is copied to the device."""
    if not path.is_file():
        return None
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001 - damaged bytes can raise nearly anything
        print(f"{path.name} is not readable ({error!r:.100}); the state is trained from its start")
        return None
    return saved if isinstance(saved, dict) and saved.get("key") == key else None


def read_state(folder: Path, key: str, network: nn.Module, shape: tuple[int, int]):
    """Load the weights of a finished state with the same key; return its held-out predictions.

    None if there is no such state, or if its files are damaged; then it is trained anew.
    """
    if read_key(folder / "model.json") != key:
        return None
    try:
        weights = safetensors.torch.load_file(folder / "model.safetensors")
        predicted = np.load(folder / "held-out.npy", allow_pickle=False)
        if predicted.shape != shape or weights.keys() != network.state_dict().keys():
            raise ValueError(f"tensors, or the shape {predicted.shape}, not of this network")
        network.load_state_dict(weights)  # last: training anew must start from the fresh network
    except Exception as error:  # noqa: BLE001 - damaged bytes can raise nearly anything
        print(f"the files in {folder.name} are damaged ({error!r:.100}); it is trained anew")
        return None
    return predicted


def write_state(
    folder: Path, network, history: list[dict], predicted: np.ndarray, key: str, epoch: int
):
    (folder / "model.json").unlink(missing_ok=True)  # it vouches for the other files
    with utils.atomic(folder / "history.csv") as partial:
        pd.DataFrame(history).to_csv(partial, index=False, lineterminator="\n")
    with utils.atomic(folder / "held-out.npy") as partial:
        np.save(partial, predicted)
    with utils.atomic(folder / "model.safetensors") as partial:
        weights = {name: value.cpu() for name, value in network.state_dict().items()}
        partial.write_bytes(safetensors.torch.save(weights))  # save_file makes it private
    with utils.atomic(folder / "model.json") as partial:
        info = {"key": key, "network": type(network).__name__, "epoch": epoch}
        partial.write_text(json.dumps(info, indent=1) + "\n", encoding="utf-8")


# ------------------------------------------------------------------------------------------------
# prediction
# ------------------------------------------------------------------------------------------------
def blending(side: int, preset: str) -> tuple[int, np.ndarray]:
    """Stride of the patches, and weights (T,) of the superpixels in a patch of ``side``.

    Published: side by side. Default: half a patch apart, each weighted by a smooth hill.
    """
    if preset == "published":
        return side, np.ones(side * side, np.float32)
    hill = np.hanning(side + 2)[1:-1]
    return (side + 1) // 2, np.outer(hill, hill).ravel().astype(np.float32)


def patch_middles(half: int, stride: int, extent: int) -> np.ndarray:
    """Middles of the patches along one side of the map."""
    first = half if stride > half + 1 else 0  # blocks begin in the corner
    return np.arange(first, extent + stride - 1, stride)


def patch_centres(section: Section, stride: int, shown: np.ndarray) -> np.ndarray:
    """Centres (B, 2), row by row, of the patches that cover what is shown of the map (h, w)."""
    h, w = shown.shape
    rows, cols = (patch_middles(section.half, stride, extent) for extent in (h, w))
    centres = np.stack(np.meshgrid(rows, cols, indexing="ij"), axis=-1).reshape(-1, 2)
    row, col = section.patches(centres)
    reached = on_map(row, col, h, w) & shown[row.clip(0, h - 1), col.clip(0, w - 1)]
    return centres[reached.any(axis=1)]


class Batches:
    """Goes through n items in batches that fit the memory of the device."""

    def __init__(self, size: int) -> None:
        self.size = size

    def over(self, n: int, compute: Callable[[slice], Any]) -> Iterator[tuple[slice, Any]]:
        """Yield every part of 0..n with ``compute(part)``; halves the batch if memory runs out."""
        done = 0
        while done < n:
            part = slice(done, min(done + self.size, n))
            try:
                result = compute(part)
            except RuntimeError as error:
                if not devices.is_out_of_memory(error) or self.size == 1:
                    raise
                self.size //= 2  # the maps do not depend on it
                continue
            yield part, result
            done = part.stop


@dataclass
class Run:
    """A network as it is, or (from 1 on) with one of several random dropouts."""

    network: nn.Module
    dropout: int = 0

    def enter(self, *seed: int) -> nn.Module:
        self.network.train(self.dropout > 0)
        if self.dropout:
            seed_torch(self.dropout, *seed)
        return self.network


class HistologyRows:
    """Histology of the rows that a row of patches covers, embedded by each of R runs.

    Rows that the next row of patches covers too are kept, so that each is embedded once. On the
    left and on the right is a margin, as wide as a patch may reach out of the map; there, the
    border's tokens are repeated.
    """

    def __init__(self, runs: list[Run], section: Section, centres: np.ndarray, device) -> None:
        self.runs, self.section, self.device = runs, section, device
        self.margin = margin = 2 * section.half
        self.top, self.rows = -2 * margin - 2, [torch.empty(0)] * len(runs)  # none yet
        self.reached = np.pad(np.zeros_like(section.tissue), margin)  # by any patch
        for row, col in zip(*(x.T for x in section.patches(centres)), strict=True):
            self.reached[row + margin, col + margin] = True

    def at(self, top: int, seed: int) -> list[Tensor]:
        """The rows from ``top`` on, (2 half + 1, w + 2 margins, D) of each run."""
        side = 2 * self.section.half + 1
        kept = max(self.top + side - top, 0)
        fresh = zip(*self.strips(top + kept, top + side, seed), strict=True)
        for number, strips in enumerate(fresh):
            rows = torch.cat(strips, dim=1)
            self.rows[number] = torch.cat([self.rows[number][-kept:], rows]) if kept else rows
        self.top = top
        return self.rows

    def strips(self, top: int, bottom: int, seed: int) -> Iterator[list[Tensor]]:
        """The rows top..bottom from left to right in strips, (rows, columns, D) of each run."""
        h, w = self.section.tissue.shape
        network, margin = self.runs[0].network, self.margin
        halo, width = network.halo, w + 2 * margin
        inside = to_device(self.reached[top + margin : bottom + margin], self.device)
        rows = np.arange(top - halo, bottom + halo).clip(0, h - 1)
        block = arrays.some_rows(self.section.tokens, rows[0], rows[-1] + 1)
        for left in range(0, width, STRIP):
            right = min(left + STRIP, width)
            columns = np.arange(left - halo, right + halo) - margin
            tokens = block[np.ix_(rows - rows[0], columns.clip(0, w - 1))]
            # All networks see alike, for tokens are standardised by the section
            views = network.see(to_device(tokens, self.device).float()[None])[0]
            yield self.embed(views, inside[:, left:right], seed)

    def embed(self, views: Tensor, inside: Tensor, seed: int) -> list[Tensor]:
        """Embed the views (rows, columns, 3 F) that are inside; 0 elsewhere."""
        if inside.all():
            return [run.enter(seed, n).embed(views[None])[0] for n, run in enumerate(self.runs)]
        views, strips = views[inside][None], []
        for number, run in enumerate(self.runs):
            embedded = run.enter(seed, number).embed(views)[0]
            strip = embedded.new_zeros(*inside.shape, embedded.shape[-1])
            strip[inside] = embedded
            strips.append(strip)
        return strips


def embed_points(runs: list[Run], section: Section, seed: int, device) -> list[Tensor]:
    """The embedded expression of all HR points, (P, D), by each run."""
    contexts: list[list[Tensor]] = [[] for _ in runs]
    for start in range(0, len(section.points), POINTS_AT_A_TIME):
        expression = to_device(section.expression[start : start + POINTS_AT_A_TIME], device)
        for number, run in enumerate(runs):
            embedded = run.enter(seed, number, start).embed_expression(expression)
            contexts[number].append(embedded)
    return [torch.cat(parts) for parts in contexts]


def latent_rows(runs: list[Run], section: Section, shown: np.ndarray, args, device):
    """Go down the map and yield (rows, latent values (R, rows, w, L)); R runs.

    Patches overlap and are blended by their weights. Memory holds only the open rows: those that
    the present row of patches covers. What no patch reaches is NaN.
    """
    half, (h, w) = section.half, section.tissue.shape
    side = 2 * half + 1
    stride, hill = blending(side, args.preset)
    hill = to_device(hill[:, None], device)
    centres = patch_centres(section, stride, shown)
    near = nearest(section.points, centres + 0.5, min(section.context, len(section.points)))
    histology = HistologyRows(runs, section, centres, device)
    expression = embed_points(runs, section, args.seed, device)
    size = runs[0].network.latent_size
    margin, width = histology.margin, w + 2 * histology.margin
    # The open rows, each where its number modulo the side tells
    total = torch.zeros(len(runs), side, width, size, device=device)
    weight = torch.zeros(side, width, 1, device=device)
    steps = torch.arange(side, device=device)

    batches = Batches(PREDICT_BATCH)
    middles = patch_middles(half, stride, h)
    for row in tqdm(middles, desc="histology", disable=None):
        top, lines = row - half, (row - half + steps) % side
        here = np.flatnonzero(centres[:, 0] == row)
        left = to_device(centres[here, 1] - half + margin, device)
        rows = histology.at(top, args.seed) if len(here) else []

        def fuse(part: slice, here=here, left=left, rows=rows, row=row) -> list[Tensor]:
            points = near[here[part]]
            offsets = centres[here[part]][:, None] + 0.5 - section.points[points]
            offsets = to_device(offsets.astype(np.float32), device)
            points, fused = to_device(points, device), []
            for number, run in enumerate(runs):
                patches = rows[number].unfold(1, side, 1)[:, left[part]]  # (side, B, D, side)
                patches = patches.permute(1, 0, 3, 2).flatten(1, 2)
                network = run.enter(args.seed, number, row, part.start)
                fused.append(network.fuse(patches, expression[number][points], offsets))
            return fused

        for part, fused in batches.over(len(here), fuse):
            where = (lines[:, None] * width + left[part, None, None] + steps).flatten()
            weight.view(-1, 1).index_add_(0, where, hill.repeat(len(fused[0]), 1))
            for sums, values in zip(total, fused, strict=True):
                sums.view(-1, size).index_add_(0, where, (values * hill).flatten(0, 1))
        finished = slice(top, top + stride) if row != middles[-1] else slice(top, h)
        done = slice(max(finished.start, 0), min(finished.stop, h))
        if done.start < done.stop:
            part = lines[done.start - top : done.stop - top], slice(margin, margin + w)
            yield done, total[:, *part] / weight[part]
        for sums in (*total, weight):
            sums[lines[: finished.stop - top]] = 0


class Prediction:
    """Maps of all genes for the M superpixels that are shown.

    First come the latent values of all superpixels, which wait in ``file``; from them the maps are
    decoded some genes at a time. So neither grows the memory with the number of genes, nor does a
    run that was cut off lose more than the genes it was at.
    """

    def __init__(self, networks, section: Section, args, file: BinaryIO, device) -> None:
        shown = np.ones_like(section.tissue) if args.keep_background else section.tissue
        passes = range(1 + DROPOUT_PASSES * args.uncertainty)
        self.runs = [Run(network, dropout) for dropout in passes for network in networks]
        self.section, self.file, self.device = section, file, device
        self.size = networks[0].latent_size
        self.embedding = np.full((WIDTH, *shown.shape), np.nan, np.float32)  # of the first state
        with torch.inference_mode():
            for rows, values in latent_rows(self.runs, section, shown, args, device):
                values = values.cpu()[:, torch.from_numpy(shown[rows])]
                self.embedding[:, rows][:, shown[rows]] = values[0, :, :WIDTH].T
                file.write(values.transpose(0, 1).contiguous().numpy())  # float32 (M, R, L)
        self.shown, self.places = shown, np.argwhere(shown)
        if networks[0].interpolates:
            self.near, self.distance2 = nearest_points(section.points, self.places, section.context)
        self.anchors = find_anchors(section, self.places) if args.preset == "default" else None
        # Maps and then spread, as decoded and turned: to get it anew for each part takes long
        n_genes = max(part.stop - part.start for part in self.blocks())
        n_arrays = 4 if self.runs[-1].dropout else 2
        self.memory = np.empty((n_arrays, n_genes * len(self.places)), np.float32)

    def blocks(self) -> list[slice]:
        """The genes in parts whose maps fit the memory, all about equal."""
        n_genes = self.section.counts.shape[1]
        bytes_a_gene = 4 * len(self.places) * (2 if self.runs[-1].dropout else 1)
        n_blocks = -(-n_genes // max(1, GENES_BYTES // bytes_a_gene))
        edges = np.linspace(0, n_genes, n_blocks + 1).astype(int).tolist()
        return [slice(*pair) for pair in itertools.pairwise(edges)]

    def maps(self, genes: slice) -> tuple[np.ndarray, np.ndarray | None]:
        """Median of the networks, anchored, (G', M), and its relative spread (G', M) or None.

        They are there until the next call, which uses their memory again.
        """
        n, n_genes = len(self.places), genes.stop - genes.start
        memory = [row[: n * n_genes] for row in self.memory]
        maps = memory[0].reshape(n, n_genes)
        spread = memory[2].reshape(n, n_genes) if len(memory) > 2 else None
        expression = np.ascontiguousarray(self.section.expression[:, genes])
        expression = to_device(expression, self.device)
        batches = Batches(max(1, DECODE_COUNTS // n_genes))
        with torch.inference_mode():
            for part, (middles, shares) in batches.over(
                n, lambda part: self.decode(part, genes, expression)
            ):
                maps[part] = middles.cpu()
                if shares is not None:
                    spread[part] = shares.cpu()
        if self.anchors is not None:
            anchor_to_spots(maps, self.section.counts[self.section.usable, genes], self.anchors)
        turned = cv2.transpose(maps, memory[1].reshape(n_genes, n))
        if spread is None:
            return turned, None
        return turned, cv2.transpose(spread, memory[3].reshape(n_genes, n))

    def decode(self, part: slice, genes: slice, expression: Tensor):
        """Median (M', G') and relative spread of some superpixels and genes."""
        latent = np.empty((part.stop - part.start, len(self.runs), self.size), np.float32)
        self.file.seek(part.start * latent[:1].nbytes)
        self.file.readinto(latent)
        latent = to_device(latent, self.device)
        maps, spread, interpolated = [], Spread(), {}
        for number, run in enumerate(self.runs):
            network = run.network
            if network.interpolates and network not in interpolated:
                near = to_device(self.near[part], self.device)
                shares = network.interpolation(to_device(self.distance2[part], self.device))
                interpolated[network] = weighted_sums(near, shares, expression)
            counts = network.decode(latent[:, number], interpolated.get(network), genes)
            counts = network.to_counts(counts, genes)
            if run.dropout:
                spread.see(counts)
            else:
                maps.append(counts)
        return middle(maps), spread.relative() if spread.n else None


def nearest_points(points: np.ndarray, places: np.ndarray, k: int):
    """The HR points nearest to the superpixels (M, 2): indices int32 (M, K), squared distances."""
    k = min(k, len(points))
    near, distance2 = (np.empty((len(places), k), dtype) for dtype in (np.int32, np.float32))
    tree = cKDTree(points)
    for start in range(0, len(places), PLACES_AT_A_TIME):
        part = slice(start, start + PLACES_AT_A_TIME)
        distance, near[part] = tree.query(places[part] + 0.5, np.arange(1, k + 1), workers=-1)
        distance2[part] = distance**2
    return near, distance2


def weighted_sums(rows: Tensor, weights: Tensor, table: Tensor) -> Tensor:
    """Sums (M, G) of some rows (M, K) of a table (P, G), with weights (M, K)."""
    return nnf.embedding_bag(rows, table, mode="sum", per_sample_weights=weights)


def middle(maps: list[Tensor]) -> Tensor:
    """Median of tensors, as numpy's: the mean of the two middle ones of an even number.

    Sorts by exchanging neighbours, all superpixels at once; for few states that is five times as
    fast as np.median, and torch.median takes the lower of the two.
    """
    states = list(maps)
    if len(states) == 1:
        return states[0]
    for i in range(len(states)):
        for j in range(i % 2, len(states) - 1, 2):
            a, b = states[j], states[j + 1]
            states[j], states[j + 1] = torch.minimum(a, b), torch.maximum(a, b)
    return (states[(len(states) - 1) // 2] + states[len(states) // 2]) / 2


# ------------------------------------------------------------------------------------------------
# uncertainty
# ------------------------------------------------------------------------------------------------
class Spread:
    """Running mean and variance of equally shaped samples (Welford 1962)."""

    def __init__(self) -> None:
        self.n = 0

    def see(self, sample: Tensor) -> None:
        self.n += 1
        if self.n == 1:
            self.mean, self.squares = sample.clone(), torch.zeros_like(sample)
            return
        step = sample - self.mean
        self.mean += step / self.n
        self.squares += step * (sample - self.mean)

    def relative(self) -> Tensor:
        """Standard deviation as a share of the mean; 0 where all samples are 0."""
        sd = (self.squares / max(self.n - 1, 1)).sqrt()
        return torch.where(self.mean > 0, sd / self.mean, 0)


def held_out_spread(networks, section, args: argparse.Namespace, held_out: np.ndarray, device):
    """Relative spread (M, G) of the counts predicted in the held-out spots (M,).

    Over dropouts only: of the networks, just one has not been trained on a spot.
    """
    out = np.empty((len(held_out), section.counts.shape[1]), np.float32)
    for index in reversed(range(len(networks))):  # the first state that holds a spot out scores it
        split, spread = split_spots(section, args.preset, args.seed, index), Spread()
        batches = np.array_split(split.held_out, -(-len(split.held_out) // BATCH))
        with torch.inference_mode():
            for dropout in range(1, 1 + HELD_OUT_PASSES):
                network = Run(networks[index], dropout).enter(args.seed, index)
                parts = (run_batch(network, section, split, batch, device)[:2] for batch in batches)
                spread.see(torch.cat([torch.einsum("btg,bt->bg", *part) for part in parts]))
        out[np.searchsorted(held_out, split.held_out)] = spread.relative().cpu().numpy()
    return out


def needed_scale(measured, predicted, sd) -> np.ndarray:
    """Smallest factor on ``sd`` by which each count lies in the 90 % interval of its expectation.

    On the scale of square roots, where counting noise has a variance of 1/4 and an expectation with
    a standard deviation adds sd^2 / (4 predicted) (Anscombe 1948). 0 where the noise is enough.
    """
    missed = 2 * (np.sqrt(measured + ANSCOMBE) - np.sqrt(predicted + ANSCOMBE)) / COVERED_SD
    with np.errstate(divide="ignore"):
        return np.sqrt((missed**2 - 1).clip(min=0) * (predicted + ANSCOMBE)) / sd


def fit_spread(measured, predicted, spread) -> np.ndarray:
    """Factors (G,) that turn a relative spread into a relative standard deviation.

    By held-out spots, all (M, G): the mean square of a gene's errors becomes what it should be, and
    90 % of the counts of all genes lie in their intervals. Poor counts may do so by their noise
    alone, which does not make the maps certain: the second step divides by GENE_FACTOR at most.
    Only counts of which at least 1 is expected teach anything.
    """
    seen = (predicted >= 1) & (spread > 0)
    if seen.sum() < MIN_CALIBRATION_COUNTS:
        return np.ones(measured.shape[1], np.float32)
    noise = predicted + ANSCOMBE
    missed = 4 * (np.sqrt(measured + ANSCOMBE) - np.sqrt(noise)) ** 2 - 1
    excess = (missed * noise * seen).sum(axis=0)
    ours = ((spread * predicted) ** 2 * seen).sum(axis=0)
    known = (excess > 0) & (ours > 0)
    factor = np.sqrt(excess[known] / ours[known])
    middle = np.median(factor) if known.any() else 1.0
    factors = np.full(measured.shape[1], middle)
    factors[known] = factor.clip(middle / GENE_FACTOR, middle * GENE_FACTOR)
    needed = needed_scale(measured[seen], predicted[seen], (factors * spread * predicted)[seen])
    scale = max(np.quantile(needed, COVERAGE), 1 / GENE_FACTOR)
    return (factors * scale).astype(np.float32)


def calibrate_spread(measured, predicted, spread) -> tuple[np.ndarray, float | None]:
    """The factors of ``fit_spread``, and how many counts lie in intervals fitted without them.

    Each half of the held-out spots is judged by the factors of the other half.
    """
    halves, inside = (slice(0, None, 2), slice(1, None, 2)), []
    for learn, judge in (halves, halves[::-1]):
        factors = fit_spread(measured[learn], predicted[learn], spread[learn])
        m, p, sd = measured[judge], predicted[judge], (factors * spread * predicted)[judge]
        seen = (p >= 1) & (sd > 0)
        inside.append(needed_scale(m[seen], p[seen], sd[seen]) <= 1)
    inside = np.concatenate(inside)
    covered = round(float(inside.mean()), 4) if len(inside) else None
    return fit_spread(measured, predicted, spread), covered


@dataclass
class Anchors:
    """How M superpixels hang together with the N spots that have tissue."""

    discs: csr_array  # (N, M), area of the spot's disc in a superpixel
    near: Tensor  # int32 (M, K), spots around a superpixel
    shares: Tensor  # float32 (M, K), by inverse squared distance


def find_anchors(section: Section, places: np.ndarray) -> Anchors:
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


def anchor_to_spots(maps: np.ndarray, measured: np.ndarray, anchors: Anchors) -> None:
    """Scale maps (M, G) in place, so that discs sum to what the spots measured, (N, G).

    At every spot the logarithm of measured over predicted counts tells what the network missed; it
    is interpolated between the spots by inverse squared distance. The prior keeps the ratio of few
    counts near 1, for they are mostly chance. Last, the whole map is scaled to the total of the
    spots: what is fitted on square roots comes out some percent too low on average.
    """
    missed = np.log((measured + ANCHOR_PRIOR) / (anchors.discs @ maps + ANCHOR_PRIOR))
    missed, values = torch.from_numpy(missed), torch.from_numpy(maps)
    step = max(1, DECODE_COUNTS // maps.shape[1])
    for start in range(0, len(maps), step):
        part = slice(start, start + step)
        values[part] *= weighted_sums(anchors.near[part], anchors.shares[part], missed).exp_()
    total, wanted = ((anchors.discs @ maps).sum(axis=0), measured.sum(axis=0))
    maps *= np.divide(wanted, total, out=np.ones_like(wanted), where=total > 0)


def correlations(predicted: np.ndarray, measured: np.ndarray) -> np.ndarray:
    """Pearson r of every gene (G,) over the spots (M, G); NaN where it is not defined."""
    if len(predicted) < 3:
        return np.full(measured.shape[1], np.nan)
    a, b = (x.astype(np.float64) - x.mean(axis=0) for x in (predicted, measured))
    with np.errstate(invalid="ignore", divide="ignore"):
        return (a * b).sum(axis=0) / np.sqrt((a * a).sum(axis=0) * (b * b).sum(axis=0))


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
        parents = np.stack([spots.get_indexer(ids) for ids in (table["parent_1"], second)], axis=1)
    except (ValueError, KeyError, OSError) as error:
        raise stage.error(path, f"is not a table of HR points: {error}") from error
    if len(xy) == 0 or not np.isfinite(xy).all() or (parents < 0).any():
        raise stage.error(
            path,
            f"does not fit {utils.LOCS.name}: of its {len(xy)} points, "
            f"{(parents < 0).any(axis=1).sum()} have a parent that is no spot and "
            f"{(~np.isfinite(xy)).any(axis=1).sum()} have no place.",
        )
    return xy[:, ::-1], parents


def read_section(stage: utils.Stage) -> tuple[Section, pd.Index, list[str]]:
    """All inputs, checked against each other; the ids of the spots and the names of the genes."""
    default = stage.args.preset == "default"
    grid = images.grid_shape(stage)
    tissue = images.read_mask(stage, grid)
    longest = utils.MAX_RADIUS_SUPERPIXELS * utils.TOKEN_PX
    radius = plain.read_number(
        stage, stage.path(utils.RADIUS), utils.TOKEN_PX, longest, "px of he.jpg"
    )
    locs = tables.read_locs(stage, stage.path(utils.LOCS))
    genes = plain.read_gene_names(stage, stage.path(utils.GENE_NAMES))
    if len(locs) < MIN_SPOTS:
        raise stage.error(
            stage.path(utils.LOCS), f"lists {len(locs)} spots; at least {MIN_SPOTS} are needed."
        )
    points, parents = read_hr_points(stage, locs.index)
    expression = arrays.read_array(stage, utils.HR_CNTS, np.float32, (len(points), len(genes)))
    if (lowest := expression.min()) < 0:
        raise stage.error(
            stage.path(utils.HR_CNTS), f"holds {lowest:g}; counts cannot be negative."
        )
    measured = np.flatnonzero(parents[:, 0] == parents[:, 1])
    if sorted(parents[measured, 0]) != list(range(len(locs))):
        raise stage.error(
            stage.path(utils.HR_LOCS),
            f"measures {len(measured)} spots; expected each of the {len(locs)} spots once.",
        )
    counts = np.empty((len(locs), len(genes)), np.float32)
    counts[parents[measured, 0]] = expression[measured]
    section = Section(
        tokens=arrays.read_array(stage, utils.FEATURES, np.float16, (*grid, None)),
        tissue=tissue,
        spots=locs[["y", "x"]].to_numpy() / utils.TOKEN_PX,
        counts=counts,
        points=points / utils.TOKEN_PX,
        expression=np.array(expression),
        parents=parents,
        radius=radius / utils.TOKEN_PX,
        context=DEFAULT_CONTEXT if default else PUBLISHED_CONTEXT,
        by_area=default,
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


# ------------------------------------------------------------------------------------------------
# writing
# ------------------------------------------------------------------------------------------------
def file_names(genes: list[str], suffix: str) -> dict[str, str]:
    """Gene -> file name: the gene itself where every file system takes it, else percent-encoded.

    Names stay inside the folder and differ also where upper and lower case do not.
    """
    names, taken = {}, set()
    for gene in genes:
        stem = urllib.parse.quote(gene, safe="()+,;=@ ").replace("~", "%7E")
        if stem[0] in ". " or stem.split(".")[0].lower() in WINDOWS_DEVICES:
            stem = f"%{ord(stem[0]):02X}{stem[1:]}"
        name, count = stem, 1
        while name.lower() in taken:
            count += 1
            name = f"{stem}~{count}"
        taken.add(name.lower())
        names[gene] = name + suffix
    return names


def write_map(path: Path, values: np.ndarray) -> None:
    with path.open("wb") as file:
        if path.suffix == ".pickle":  # a plain array, as the tools of this family read it
            pickle.dump(values, file, protocol=4)
        else:
            np.save(file, values)


def write_index(folder: Path, names: dict[str, str]) -> None:
    index = pd.DataFrame(names.items(), columns=["gene", "file"])
    index.to_csv(folder / "index.csv", index=False, encoding="utf-8", lineterminator="\n")


def draw_map(values: np.ndarray, title: str) -> np.ndarray:
    """Picture (rows, columns, 3) of the tissue in a map (h, w), with a colour and a scale bar."""
    shown = np.argwhere(~np.isnan(values))
    (top, left), (bottom, right) = shown.min(axis=0), shown.max(axis=0)
    values = values[top : bottom + 1, left : right + 1]
    highest = max(float(np.nanpercentile(values, 99.5)), 1e-6)
    levels = (np.nan_to_num(values / highest).clip(0, 1) * 255).astype(np.uint8)
    picture = cv2.applyColorMap(levels, cv2.COLORMAP_VIRIDIS)
    picture[np.isnan(values)] = 255
    times = max(1, PLOT_PX // max(values.shape))
    picture = cv2.resize(picture, None, fx=times, fy=times, interpolation=cv2.INTER_NEAREST)
    height, width = picture.shape[:2]
    canvas = np.full((height + 2 * PLOT_MARGIN_PX, width + COLOUR_BAR_PX, 3), 255, np.uint8)
    rows = slice(PLOT_MARGIN_PX, PLOT_MARGIN_PX + height)
    canvas[rows, :width] = picture
    ramp = np.linspace(255, 0, height).astype(np.uint8)[:, None].repeat(20, axis=1)
    canvas[rows, width + 12 : width + 32] = cv2.applyColorMap(ramp, cv2.COLORMAP_VIRIDIS)

    def write(text: str, x: int, y: int) -> None:
        cv2.putText(canvas, text, (x, y), cv2.FONT_HERSHEY_SIMPLEX, 0.5, (0, 0, 0), 1, cv2.LINE_AA)

    write(f"{title}, counts per superpixel of 8 um", 4, PLOT_MARGIN_PX - 14)
    write(f"{highest:.3g}", width + 36, rows.start + 10)
    write("0", width + 36, rows.stop)
    half_um = values.shape[1] * utils.SUPERPIXEL_UM / 2
    length_um = 10.0 ** math.floor(math.log10(half_um))
    length_px = round(length_um / utils.SUPERPIXEL_UM * times)
    cv2.line(canvas, (4, rows.stop + 16), (4 + length_px, rows.stop + 16), (0, 0, 0), 2)
    write(f"{length_um:g} um", 12 + length_px, rows.stop + 21)
    return canvas[..., ::-1]  # cv2 draws in BGR


def write_genes(stage, genes: list[str], prediction: Prediction, r, factors) -> None:
    """Write the maps, their standard deviations and pictures, some genes at a time.

    What is finished also gets a name in a hidden folder, from which a run that was cut off goes on.
    """
    args = stage.args
    options = ("n_states", "keep_background", "map_format", "dtype", "uncertainty", "n_plots")
    decisive = [training_key(stage, prediction.device), *(getattr(args, name) for name in options)]
    work = resume.work_folder(stage.directory, utils.MAPS.name, decisive)
    names = file_names(genes, f".{args.map_format}")
    best = np.argsort(-np.nan_to_num(r, nan=-2), kind="stable")[: args.n_plots].tolist()
    pictures = file_names([genes[i] for i in best], ".png")
    folders = {}
    for artifact in (utils.MAPS, utils.PLOTS, *[utils.SPREAD] * args.uncertainty):
        with stage.writing(artifact) as folders[artifact]:
            folders[artifact].mkdir()
    for block in tqdm(prediction.blocks(), desc="genes", disable=None):
        numbers = range(len(genes))[block]
        files = [(utils.PLOTS, pictures[genes[i]]) for i in numbers if i in best]
        for artifact in folders.keys() - {utils.PLOTS}:
            files += [(artifact, names[genes[i]]) for i in numbers]
        if resume.take_finished(work, folders, files):
            continue
        maps, spread = prediction.maps(block)
        for row, i in enumerate(numbers):
            values = np.full(prediction.shown.shape, np.nan, np.float32)
            if spread is not None:
                values[prediction.shown] = maps[row] * spread[row] * factors[i]
                write_map(folders[utils.SPREAD] / names[genes[i]], values.astype(args.dtype))
            values[prediction.shown] = maps[row]
            write_map(folders[utils.MAPS] / names[genes[i]], values.astype(args.dtype))
            if i in best:
                title = genes[i] if np.isnan(r[i]) else f"{genes[i]} (held-out r {r[i]:.2f})"
                picture = Image.fromarray(draw_map(values, title))
                picture.save(folders[utils.PLOTS] / pictures[genes[i]])
        resume.keep_finished(work, folders, files)
    for artifact in folders.keys() - {utils.PLOTS}:
        write_index(folders[artifact], names)
    if not args.uncertainty:
        stage.retire(utils.SPREAD)
    shutil.rmtree(work, ignore_errors=True)  # a run beside this one may be at it


def summarise(
    spots: pd.Index, genes: list[str], held_out: np.ndarray, held_out_r: np.ndarray, **spread
) -> dict:
    """Print the closing table; return what the record keeps of it."""
    r = held_out_r
    facts = {"spots": len(spots), "genes": len(genes), "held_out_r_median": None, **spread}
    score = "none, the published preset trains on all spots"
    if len(held_out):
        score = f"{len(held_out)} spots, too few or too constant for a correlation"
    if not np.isnan(r).all():
        low, middle, high = (float(q) for q in np.nanpercentile(r, [10, 50, 90]))
        facts["held_out_r_median"] = round(middle, 4)
        score = (
            f"{len(held_out)} spots, median r {middle:.3f} (10 to 90 %: {low:.3f} to {high:.3f})"
        )
    print(f"  spots     {len(spots)}\n  genes     {len(genes)}\n  held out  {score}")
    print(f"  maps      {utils.MAPS.name}/, pictures in {utils.PLOTS.name}/")
    if spread.get("coverage_of_90") is not None:
        covered = spread["coverage_of_90"]
        print(
            f"  intervals {covered:.0%} of held-out counts lie in the 90 % interval of others' fit"
        )
    return facts | {"held_out_spots": [str(spots[i]) for i in held_out]}


# ------------------------------------------------------------------------------------------------
# the stage
# ------------------------------------------------------------------------------------------------
def positive_float(text: str) -> float:
    number = float(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return number


def build_parser() -> argparse.ArgumentParser:
    parser = utils.stage_parser(__doc__)
    utils.add_device(parser)
    option = parser.add_argument
    option("--epochs", type=utils.positive, default=500, help="Largest number of epochs a state.")
    option("--n-states", type=utils.positive, default=5, help="Networks; a map is their median.")
    option(
        "--preset",
        choices=sorted(NETWORKS),
        default="default",
        help="The network of this project, or the arithmetic of the published method.",
    )
    option(
        "--seed",
        type=utils.not_negative,
        default=0,
        help="Random seed; state i is trained with seed + i.",
    )
    option("--batch-size", type=utils.positive, help="Spots a training step; None: the preset's.")
    option(
        "--learning-rate",
        type=positive_float,
        help="Step size of the training; None: the preset's.",
    )
    option("--map-format", choices=("pickle", "npy"), default="pickle", help="Kind of map files.")
    option(
        "--dtype",
        choices=("float32", "float16"),
        default="float32",
        help="Numbers of the maps; float16 halves the space they take and keeps three digits.",
    )
    option(
        "--uncertainty",
        action="store_true",
        help="Also write the standard deviation of every map, over states and dropouts, calibrated "
        "on held-out spots. Prediction then takes about five times as long.",
    )
    option("--keep-background", action="store_true", help="Predict outside the tissue as well.")
    option("--n-plots", type=utils.not_negative, default=12, help="Number of genes to draw.")
    return parser


def write_results(stage, section, genes, networks, held_out, predicted, device) -> dict:
    """Predict and write everything that is as large as the map; facts for the record."""
    args, factors, facts = stage.args, None, {}
    r = correlations(predicted, section.counts[held_out])
    if args.uncertainty:
        share = held_out_spread(networks, section, args, held_out, device)
        factors, covered = calibrate_spread(section.counts[held_out], predicted, share)
        facts["coverage_of_90"] = covered
        if covered is None:
            stage.warn(
                f"{utils.SPREAD.name} is not calibrated: in held-out spots hardly any gene is "
                f"expected to have a count"
            )
    # A file without a name, which is gone with the run
    with tempfile.TemporaryFile(dir=stage.directory) as file:
        prediction = Prediction(networks, section, args, file, device)
        write_genes(stage, genes, prediction, r, factors)
    with stage.writing(utils.EMBEDDINGS) as partial, partial.open("wb") as file:
        pickle.dump({"cls": prediction.embedding}, file, protocol=5)
    with stage.writing(utils.HELD_OUT) as partial:
        table = pd.DataFrame({"gene": genes, "held_out_r": r})
        table.to_csv(partial, index=False, encoding="utf-8", lineterminator="\n")
    return facts | {"held_out_r": r}


def check_space(stage: utils.Stage, section: Section, n_genes: int) -> None:
    """Say how much is going to be written, and stop if the disk cannot take it."""
    args, (h, w) = stage.args, section.tissue.shape
    maps = (1 + args.uncertainty) * n_genes * h * w * np.dtype(args.dtype).itemsize
    embedding = 4 * WIDTH * h * w
    shown = h * w if args.keep_background else int(section.tissue.sum())
    runs = args.n_states * (1 + DROPOUT_PASSES * args.uncertainty)
    latent = 4 * shown * runs * NETWORKS[args.preset].latent_size
    print(
        f"to be written: {maps / 1e9:.2f} GB of maps ({n_genes} genes, {h} x {w}, {args.dtype}), "
        f"{embedding / 1e9:.2f} GB of embeddings, and for a while {latent / 1e9:.2f} GB more"
    )
    utils.check_disk(stage.directory, maps + embedding + latent, "the maps")


def main(stage: utils.Stage) -> None:
    args = stage.args
    stage.require(*INPUTS)
    stage.guard(utils.MAPS, utils.SPREAD, utils.EMBEDDINGS, utils.PLOTS, utils.HELD_OUT)
    if args.uncertainty and args.preset == "published":
        raise utils.StageError(
            "--uncertainty is calibrated on held-out spots, and the published preset has none.",
            "Leave out --uncertainty or --preset published.",
        )
    with devices.ranks() as ranks:
        device = devices.resolve_device(args.device)
        if device.type == "cuda":
            torch.set_float32_matmul_precision("high")  # matrix products in TF32
        section, spots, genes = read_section(stage)
        h, w = section.tissue.shape
        check_space(stage, section, len(genes))
        print(f"{len(spots)} spots, {len(section.points)} HR points, {len(genes)} genes")
        print(f"{h} x {w} superpixels, preset {args.preset}, {args.n_states} states on {device}")

        started = time.monotonic()
        with explained(device):
            trained = train_states(stage, section, ranks, device)
            if trained is None:
                return
            training = time.monotonic() - started
            results = write_results(stage, section, genes, *trained, device)
    facts = summarise(spots, genes, trained[1], **results)
    facts["seconds_training"] = round(training, 2)
    facts["seconds_prediction"] = round(time.monotonic() - started - training, 2)
    stage.finish(seed=args.seed, device=str(device), **facts)


@contextlib.contextmanager
def explained(device) -> Iterator[None]:
    """Turn the failure to get memory into a StageError."""
    try:
        yield
    except RuntimeError as error:
        if not devices.is_out_of_memory(error):
            raise
        raise utils.StageError(
            f"The memory of {device} does not suffice: {str(error).splitlines()[0]:.200}",
            "Run the same command with a smaller --batch-size, such as 4, or with --device cpu.",
        ) from error


def run(argv: list[str] | None = None) -> int:
    return utils.run_stage(main, SCRIPT, build_parser(), argv)


if __name__ == "__main__":
    sys.exit(run())
