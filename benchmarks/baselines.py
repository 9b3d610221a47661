"""Simpler predictors of the same maps from the same spots, for benchmarks/accuracy.py.

Each takes a SpotSection, which holds what the first four stages made of the user's files, and
returns maps (rows, columns, genes) in counts per superpixel, tissue or not. The truth is unknown to
it.

Those that look at the histology see every token at three scales: itself, and its means over 3 x 3
and 9 x 9 superpixels, each standardised over the tissue. The ridge gains by it: with its residual,
r at 1x / 4x is 0.21 / 0.54 by single tokens and 0.26 / 0.55 by three scales (a Visium HD kidney).

Letters in shapes: N spots, T superpixels of a disc, B spots of a batch, F features, G genes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy.ndimage import uniform_filter
from scipy.sparse import csr_array
from scipy.spatial.distance import cdist
from torch import Tensor, nn

import utils
from analysis.inputs import read_mask, read_radius, read_spots
from analysis.spots import MIN_DISC_TISSUE, disc_weights, interpolate_spots

SCALES = (3, 9)  # superpixels: token neighbourhoods of 24 and 72 um, as wide as a spot
WIDTHS = np.array([0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0])  # of a residual's mean, in pitches
PENALTIES = 10.0 ** np.arange(0, 6.1, 0.25)  # of the ridge, in units of standardised features

# The MLP: of the sizes, rates, losses and penalties tried, the best on a simulated section (cords):
# r at 1x and 4x 0.29 / 0.50 by two states; three layers of 256 with less dropout 0.26 / 0.47.
WIDTH, LAYERS = 256, 2
LEAK = 0.1  # slope of the activation below zero
DROPOUT = 0.5
LEARNING_RATE, WEIGHT_DECAY = 1e-3, 0.1
BATCH = 32  # spots
MAX_EPOCHS, PATIENCE_EPOCHS = 300, 15
N_STATES, FOLDS = 5, 10  # networks; each holds out another tenth of the spots


@dataclass
class SpotSection:
    """What may be learned from; places are (row, col) in superpixels."""

    tokens: np.ndarray  # (h, w, F) float32, three scales, mean 0 and sd 1 over the tissue
    tissue: np.ndarray  # (h, w) bool
    centres: np.ndarray  # (N, 2)
    counts: np.ndarray  # (N, G) float32
    radius: float

    def __post_init__(self) -> None:
        self.disc_area = np.pi * self.radius**2
        areas = disc_weights(self.centres, self.radius, self.tissue.shape)
        self.areas = (areas * self.tissue.ravel()).tocsr()  # (N, h * w), of the disc on tissue
        self.usable = self.areas.sum(axis=1) >= MIN_DISC_TISSUE * self.disc_area


def read_spot_section(directory: Path, genes: list[str]) -> SpotSection:
    """Spots, tokens and mask of a sample after the first four stages."""
    tokens = np.load(directory / utils.FEATURES.name, allow_pickle=False).astype(np.float32)
    tissue = read_mask(directory, tokens.shape[:2])
    centres, counts = read_spots(directory, genes)
    tokens = standardise(add_neighbourhoods(tokens), tissue)
    return SpotSection(tokens, tissue, centres, counts, read_radius(directory))


def add_neighbourhoods(tokens: np.ndarray) -> np.ndarray:
    """The tokens (h, w, F) and their means over windows of each of SCALES: (h, w, 3 F)."""
    means = [uniform_filter(tokens, (side, side, 1), mode="reflect") for side in SCALES]
    return np.concatenate([tokens, *means], axis=2)


def standardise(tokens: np.ndarray, tissue: np.ndarray) -> np.ndarray:
    """Mean 0 and sd 1 over the tissue; a constant feature becomes 0."""
    mean, std = tokens[tissue].mean(0), tokens[tissue].std(0)
    return (tokens - mean) / np.where(std > 1e-6, std, np.inf)


# --------------------------------------------------------------------------------------------------
# without histology
# --------------------------------------------------------------------------------------------------
def nearest_spot(section: SpotSection, seed: int) -> np.ndarray:
    maps, _ = interpolate_spots(section.centres, section.counts, section.tissue.shape)
    return maps / section.disc_area


def linear_interpolation(section: SpotSection, seed: int) -> np.ndarray:
    _, maps = interpolate_spots(section.centres, section.counts, section.tissue.shape)
    return maps / section.disc_area


# --------------------------------------------------------------------------------------------------
# ridge regression
# --------------------------------------------------------------------------------------------------
def disc_means(section: SpotSection) -> np.ndarray:
    """Mean token (N', F) of each usable spot's disc, weighted by its area on tissue."""
    areas = section.areas[np.flatnonzero(section.usable)]
    tokens = section.tokens.reshape(-1, section.tokens.shape[2])
    return (areas @ tokens) / areas.sum(axis=1)[:, None]


def full_disc_counts(section: SpotSection) -> np.ndarray:
    """Counts (N', G) that the usable spots would have if all of their disc were tissue."""
    share = section.areas.sum(axis=1)[section.usable] / section.disc_area
    return section.counts[section.usable] / share[:, None]


@dataclass
class Ridge:
    """A penalised linear model of all genes; the intercept is not penalised."""

    x_mean: np.ndarray  # (F,)
    y_mean: np.ndarray  # (G,)
    weights: np.ndarray  # (F, G)
    penalty: float
    errors: np.ndarray  # (penalties,) leave-one-out, in units of each gene's variance

    def predict(self, x: np.ndarray) -> np.ndarray:
        return (x - self.x_mean) @ self.weights + self.y_mean


def leave_one_out(u: np.ndarray, s: np.ndarray, y: np.ndarray, penalty: float) -> np.ndarray:
    """Errors (N, G) at each spot of the ridge without this spot, from one decomposition.

    x = u s v' and y are centred. The residual of the fit to all spots, divided by one minus the
    spot's leverage, is exact; 1 / N is the leverage of the intercept.
    """
    shrink = s**2 / (s**2 + penalty)
    fitted = u @ (shrink[:, None] * (u.T @ y))
    leverage = u**2 @ shrink + 1 / len(y)
    return (y - fitted) / (1 - leverage)[:, None]


def fit_ridge(x: np.ndarray, y: np.ndarray, penalties: np.ndarray = PENALTIES) -> Ridge:
    """Ridge of y (N, G) on x (N, F), with the one penalty of least leave-one-out error."""
    x, y = x.astype(np.float64), y.astype(np.float64)
    x_mean, y_mean = x.mean(0), y.mean(0)
    u, s, vt = np.linalg.svd(x - x_mean, full_matrices=False)
    variance = np.maximum(y.var(0), 1e-12)
    errors = np.array(
        [(leave_one_out(u, s, y - y_mean, p) ** 2 / variance).mean() for p in penalties]
    )
    penalty = float(penalties[errors.argmin()])
    weights = vt.T @ ((s / (s**2 + penalty))[:, None] * (u.T @ (y - y_mean)))
    return Ridge(x_mean, y_mean, weights, penalty, errors)


def interpolated(centres: np.ndarray, residual: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """The residual (N', G) of spots, linear between them: (h, w, G)."""
    return interpolate_spots(centres, residual, shape)[1]


def smoothed(centres: np.ndarray, residual: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """The residual (N', G) of spots as a Gaussian mean of them, in part: (h, w, G).

    Each gene has the width and the share of least leave-one-out error.
    """
    apart = cdist(centres, centres)
    pitch = np.median(np.sort(apart, axis=1)[:, 1])
    places = np.argwhere(np.ones(shape, bool)) + 0.5
    best, out = np.full(residual.shape[1], np.inf), np.zeros((len(places), residual.shape[1]))
    for width in WIDTHS * pitch:
        near = np.exp(-(apart**2) / (2 * width**2)) * (apart > 0)
        told = near @ residual / near.sum(axis=1, keepdims=True)
        share = ((told * residual).sum(0) / np.maximum((told**2).sum(0), 1e-12)).clip(0, 1)
        error = ((residual - share * told) ** 2).sum(axis=0)
        better = error < best
        best[better] = error[better]
        weights = np.exp(-cdist(places, centres, "sqeuclidean") / (2 * width**2))
        mean = weights @ residual[:, better] / (weights.sum(axis=1, keepdims=True) + 1e-300)
        out[:, better] = share[better] * mean
    return out.reshape(*shape, -1)


def ridge_on_spots(section: SpotSection, spread: Callable[..., np.ndarray] | None) -> np.ndarray:
    """Ridge of square-root counts, whose noise is the same for rich and poor genes.

    The residual at the spots is spread over the section, on the same scale.
    """
    x, y = disc_means(section), np.sqrt(full_disc_counts(section))
    ridge = fit_ridge(x, y)
    maps = ridge.predict(section.tokens)
    if spread is not None:
        residual = y - ridge.predict(x)
        maps += spread(section.centres[section.usable], residual, section.tissue.shape)
    return maps.clip(0) ** 2 / section.disc_area


def ridge(section: SpotSection, seed: int) -> np.ndarray:
    return ridge_on_spots(section, None)


def ridge_residual(section: SpotSection, seed: int) -> np.ndarray:
    return ridge_on_spots(section, interpolated)


def ridge_smoothed(section: SpotSection, seed: int) -> np.ndarray:
    return ridge_on_spots(section, smoothed)


# --------------------------------------------------------------------------------------------------
# a network on tokens, trained by the sums over discs
# --------------------------------------------------------------------------------------------------
def make_mlp(n_features: int, n_genes: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for i in range(LAYERS):
        layers += [nn.Linear(WIDTH if i else n_features, WIDTH), nn.LeakyReLU(LEAK)]
        layers += [nn.Dropout(DROPOUT)]
    return nn.Sequential(*layers, nn.Linear(WIDTH, n_genes), nn.Softplus())


def pad_discs(areas: csr_array) -> tuple[np.ndarray, np.ndarray]:
    """Superpixels (N, T) of each disc and their share (N, T) of it; the rest has the share 0."""
    sizes = np.diff(areas.indptr)
    where, share = (np.zeros((len(sizes), sizes.max()), kind) for kind in (np.int64, np.float32))
    filled = np.arange(sizes.max()) < sizes[:, None]
    where[filled], share[filled] = areas.indices, areas.data
    return where, share / share.sum(axis=1, keepdims=True)


def train_mlp(
    tokens: Tensor, discs: tuple[Tensor, Tensor], target: Tensor, held: np.ndarray, seed: int
) -> nn.Module:
    """One network, as it was when it predicted the spots ``held`` best.

    The mean over the disc is compared with the target (N, G) by its square error. tokens are
    (h * w, F); discs are those of ``pad_discs``.
    """
    where, share = discs
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    network = make_mlp(tokens.shape[1], target.shape[1])
    optimizer = torch.optim.AdamW(network.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    train = np.setdiff1d(np.arange(len(target)), held)

    def loss(spots: np.ndarray) -> Tensor:
        predicted = network(tokens[where[spots]])  # (B, T, G)
        return ((predicted * share[spots][..., None]).sum(1) - target[spots]).square().mean()

    best, best_loss, since = copy.deepcopy(network.state_dict()), np.inf, 0
    for _ in range(MAX_EPOCHS):
        network.train()
        for batch in np.array_split(rng.permutation(train), -(-len(train) // BATCH)):
            optimizer.zero_grad()
            loss(batch).backward()
            optimizer.step()
        network.eval()
        with torch.inference_mode():
            now = float(loss(held))
        since += 1
        if now < best_loss:
            best, best_loss, since = copy.deepcopy(network.state_dict()), now, 0
        if since >= PATIENCE_EPOCHS:
            break
    network.load_state_dict(best)
    return network


def mlp(section: SpotSection, seed: int, n_states: int = N_STATES) -> np.ndarray:
    """Median of ``n_states`` networks that give a superpixel's expression by its token alone.

    The idea of iStar in an own form. Spots are scaled to 0..1 by each gene's extremes.
    """
    counts = full_disc_counts(section)
    low, high = counts.min(0), counts.max(0)
    extent = np.where(high > low, high - low, 1)
    where, share = pad_discs(section.areas[np.flatnonzero(section.usable)])
    h, w, f = section.tokens.shape
    tokens = torch.from_numpy(section.tokens.reshape(-1, f))
    target = torch.from_numpy((counts - low) / extent)
    discs = torch.from_numpy(where), torch.from_numpy(share)
    folds = np.random.default_rng(seed).permutation(len(counts)) % min(FOLDS, len(counts))
    states = []
    for i in range(n_states):
        held = np.flatnonzero(folds == i % (folds.max() + 1))
        network = train_mlp(tokens, discs, target, held, seed + i)
        with torch.inference_mode():
            parts = [network(part) for part in tokens.split(4096)]
        states.append(torch.cat(parts).numpy())
    maps = np.median(np.stack(states), axis=0) * extent + low
    return maps.reshape(h, w, -1) / section.disc_area


PREDICTORS: dict[str, Callable[[SpotSection, int], np.ndarray]] = {
    "nearest": nearest_spot,
    "linear": linear_interpolation,
    "ridge": ridge,
    "ridge+residual": ridge_residual,
    "ridge+smoothed": ridge_smoothed,
    "mlp": mlp,
}
SEEDED = ("mlp",)  # the others give one and the same map
