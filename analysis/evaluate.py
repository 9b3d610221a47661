"""Score super-resolved maps against the truth, or, without one, on spots that were left out.

    python analysis/evaluate.py --directory demo/section
    python analysis/evaluate.py --directory data/section --holdout 5 --histex "--epochs 500"

Against the truth, of the tissue alone, per gene; tables give the median over genes. 1x is the
superpixel of 8 um; 2x and 4x are 16 and 32 um: the mean over the tissue superpixels of each block
that is at least half tissue. A superpixel of true tissue for which the map says nothing (NaN,
outside the mask) counts as zero; a constant map has r = 0.

* Pearson's and Spearman's r.
* SSIM (windows of 7 x 7, the constants of scikit-image). Local means and variances are those of the
  tissue in the window, and the tissue's SSIM is averaged: background has no say. Truth and map
  stay in counts; the one data range of both is that of the truth.
* RMSE in counts per superpixel, on the one scale of what spots catch: the truth is multiplied by
  ``capture``, where truth.npz has it.

Beside HISTEX stand two predictions without histology, the nearest spot and linear interpolation
between spots, and the ceiling. Molecules are counts, so even the exact expected expression
correlates with them imperfectly: where truth.npz holds the expectation (``mean``), the ceiling is
its own score; else the molecules are split at random into two halves with correlation r between
them, the reliability of the whole is 2 r / (1 + r) (Spearman and Brown), and the ceiling its square
root. The best RMSE is that of the difference of the halves, whose variance is that of the noise. Of
SSIM the halves give the local variance of the expectation, as their covariance.

Spot totals: r between the measured counts and the sum of the map over each spot's disc, weighted by
area; what the map leaves out (NaN) adds nothing, and spots with less than a quarter of their disc
on the map's tissue are left out. ``ratio`` is all predicted over all measured counts.

Seams: the mean difference of neighbouring superpixels across the lines of a grid, relative to all
other offsets of the same grid: ``excess`` (0 is none), ``rank`` among the offsets (1 is the
strongest) and ``z``. Genes weigh alike. Without a seam, the rank is random and z about -2 to 2.

Published protocol, for comparison with published figures only: RMSE and SSIM of the whole map with
its background, truth and map each scaled to 0..1 by its own extremes. Background alone lifts it.

With ``--holdout K`` the spots are split into K folds. For each, a folder is made in which the
left-out spots have neither place nor counts; get_HR.py and HISTEX.py run there, and the new maps
are summed over the left-out discs. Image, features and mask are taken over: they hold no
expression. gene-names.txt is too; if its genes were selected by their variance, that choice saw
all spots, though no prediction did. The ceiling is by halves of the spots' counts.

Files in: cnts-super/, locs.csv, radius.txt, cnts.csv, and the truth: truth.npz (counts (rows,
columns, genes), tissue; genes, or else gene-names.txt), or genes_3D.pkl (the pickled array alone;
genes of gene-names.txt, tissue of mask.png). Files out: evaluation.csv (a row per gene; histex_4x
is Pearson's r), evaluation.json (the tables) and evaluation.png; evaluation-holdout.* of the
left-out spots.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image
from scipy.interpolate import LinearNDInterpolator, NearestNDInterpolator
from scipy.ndimage import uniform_filter
from scipy.sparse import csr_array
from scipy.stats import rankdata
from skimage.metrics import structural_similarity

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import utils

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = "analysis/evaluate.py"
TRUTH, PUBLISHED_TRUTH = "truth.npz", "genes_3D.pkl"
BINS = (1, 2, 4)  # superpixels per side of a scored block: 8, 16 and 32 um
MIN_BLOCK_TISSUE = 0.5  # share of a block that must be tissue
METHODS = {
    "histex": "HISTEX",
    "linear": "linear interpolation of spots",
    "nearest": "nearest spot",
    "ceiling": "ceiling set by counting noise",
}
MEASURES = {"r": "Pearson r", "rho": "Spearman r", "ssim": "SSIM", "rmse": "RMSE (counts)"}
WINDOW, K1, K2 = 7, 0.01, 0.03  # of SSIM, as in scikit-image
VALUES_AT_A_TIME = 4_000_000  # of a stack of maps in memory: 32 MB as float64
MIN_DISC_TISSUE = 0.25  # as HISTEX.py: from less tissue, a spot's counts tell too little
SUBSAMPLES = 16  # per superpixel and axis, for the area of a disc in it

# Grids whose lines are looked at, all of whole superpixels and beginning at the map's corner.
PERIODS = {5: "patches of the default preset", 7: "published blocks", 14: "tiles of 224 px",
           8: "control", 16: "control"}  # fmt: skip
GENE_PERIODS = (7, 14)  # for which each gene has a column
# Tiles as Histology_Extractor.py lays them out: side and least overlap, in tokens.
TILINGS = {"ViT tiles": (14, 2), "CNN tiles": (42, 10)}


# --------------------------------------------------------------------------------------------------
# reading
# --------------------------------------------------------------------------------------------------
@dataclass
class Truth:
    """(rows, columns, genes) counts and, if known, their expectation."""

    counts: np.ndarray
    tissue: np.ndarray
    genes: list[str]
    mean: np.ndarray | None = None
    kinds: list[str] | None = None
    capture: float = 1.0  # share of the molecules that a spot catches


def open_sample(directory: Path) -> utils.Stage:
    """What the checked readers of utils ask for; nothing is recorded."""
    return utils.Stage(SCRIPT, argparse.Namespace(directory=directory, allow_stale=False))


def read_truth(directory: Path) -> Truth:
    path = directory / TRUTH
    if not path.is_file() and (directory / PUBLISHED_TRUTH).is_file():
        return read_published_truth(directory)
    if not path.is_file():
        raise utils.StageError(
            f"{path} is missing, and so is {PUBLISHED_TRUTH}: only a section with known truth can "
            f"be scored.",
            f'Simulate one: python demo/simulate.py --directory "{directory}"\n'
            f'or leave out spots: python {SCRIPT} --directory "{directory}" --holdout 5',
        )
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as saved:
            genes = saved["genes"].tolist() if "genes" in saved else None
            truth = Truth(
                counts=saved["counts"].astype(np.float32),
                tissue=saved["tissue"].astype(bool),
                genes=genes or read_gene_names(directory),
                mean=saved.get("mean"),
                kinds=saved["kinds"].tolist() if "kinds" in saved else None,
                capture=float(saved["capture"]) if "capture" in saved else 1.0,
            )
    except utils.StageError:
        raise
    except Exception as error:  # damaged bytes can raise nearly anything
        raise utils.StageError(
            f"{path} is not a whole truth.npz ({error!r:.200}).",
            "It must hold counts (rows, columns, genes) and tissue (rows, columns).",
        ) from error
    check_truth(path, truth)
    return truth


def check_truth(path: Path, truth: Truth) -> None:
    expected = (*truth.tissue.shape, len(truth.genes))
    if truth.counts.shape != expected:
        raise utils.StageError(
            f"{path}: counts are {truth.counts.shape}; expected {expected}, the shape of tissue "
            f"and the number of genes.",
            "Make the file anew.",
        )
    if truth.mean is not None and truth.mean.shape != expected:
        raise utils.StageError(
            f"{path}: mean is {truth.mean.shape}; expected {expected}.", "Make the file anew."
        )
    if not (np.isfinite(truth.counts).all() and truth.counts.min(initial=0) >= 0):
        raise utils.StageError(
            f"{path}: counts hold negative values, or values that are not finite.",
            "The truth must be counts of molecules: make the file anew.",
        )
    if not truth.tissue.any():
        raise utils.StageError(
            f"{path}: there is no tissue to score.", "Mark the tissue as true, or nonzero."
        )


def read_published_truth(directory: Path) -> Truth:
    """genes_3D.pkl: one pickled array whose first or last axis is the genes of gene-names.txt."""
    path = directory / PUBLISHED_TRUTH
    counts, genes = utils.read_pickle(path), read_gene_names(directory)
    remedy = f"It must be the array that {utils.GENE_NAMES.name} names the genes of."
    if not isinstance(counts, np.ndarray) or counts.ndim != 3:
        found = getattr(counts, "shape", type(counts).__name__)
        raise utils.StageError(f"{path} holds {found}; expected an array of three axes.", remedy)
    first, last = (counts.shape[axis] == len(genes) for axis in (0, 2))
    if first == last:
        problem = "both its first and its last axis fit" if first else "neither end of it fits"
        raise utils.StageError(
            f"{path} is {counts.shape} for {len(genes)} genes: {problem}, so that the axis of the "
            f"genes is unknown.",
            remedy if last is False else f"Save the counts as {TRUTH}, genes last.",
        )
    if first:
        counts = np.moveaxis(counts, 0, 2)
    truth = Truth(counts.astype(np.float32), read_mask(directory, counts.shape[:2]), genes)
    check_truth(path, truth)
    return truth


def read_gene_names(directory: Path) -> list[str]:
    stage = open_sample(directory)
    path = stage.find(utils.GENE_NAMES)
    if path is None:
        raise stage.error(directory / utils.GENE_NAMES.name, "is missing.")
    return utils.read_gene_names(stage, path)


def read_mask(directory: Path, shape: tuple[int, int]) -> np.ndarray:
    """Tissue (rows, columns) bool of mask.png, one pixel a superpixel or a whole multiple."""
    stage = open_sample(directory)
    path, (rows, cols) = directory / utils.MASK.name, utils.grid_shape(stage)
    try:
        with Image.open(path) as image:
            painted = np.asarray(image.convert("L")) > 0
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise stage.error(path, f"is missing or not an image: {error}") from error
    times = max(1, painted.shape[0] // rows)
    if painted.shape != (rows * times, cols * times):
        raise stage.error(path, f"has the shape {painted.shape}; expected {(rows, cols)}.")
    tissue = painted.reshape(rows, times, cols, times).mean((1, 3)) >= 0.5
    if any(have < want for have, want in zip(tissue.shape, shape, strict=True)):
        raise stage.error(path, f"is {tissue.shape}, smaller than the truth {shape}.")
    return tissue[: shape[0], : shape[1]]


def map_files(directory: Path) -> dict[str, Path]:
    """Gene -> file, by cnts-super/index.csv."""
    folder = directory / utils.MAPS.name
    if not (folder / "index.csv").is_file():
        raise utils.StageError(
            f"{folder / 'index.csv'} is missing: there are no maps to score.",
            f'Run: python {utils.HISTEX} --directory "{directory}"',
        )
    index = pd.read_csv(folder / "index.csv", dtype=str, keep_default_na=False)
    return {
        gene: folder / Path(name).name
        for gene, name in zip(index["gene"], index["file"], strict=True)
    }


def read_maps(
    directory: Path, genes: list[str], shape: tuple[int, int] | None = None
) -> dict[str, np.ndarray]:
    """Maps (rows, columns) of the genes that have one, cut to ``shape``: the truth's grid."""
    files, maps = map_files(directory), {}
    for gene in genes:
        if gene in files:
            maps[gene] = read_map(files[gene], shape)
            if maps[gene].shape != next(iter(maps.values())).shape:
                raise utils.StageError(
                    f"{files[gene]} is {maps[gene].shape}, other maps are not.",
                    f"Run {utils.HISTEX} again.",
                )
    return maps


def read_map(path: Path, shape: tuple[int, int] | None) -> np.ndarray:
    again = f"Run the five scripts again, {utils.CALIBRATION} first."
    try:
        if path.suffix == ".npy":
            image = np.load(path, allow_pickle=False)
        else:
            image = utils.read_pickle(path)
    except (OSError, EOFError, ValueError) as error:
        raise utils.StageError(f"{path} is not a whole map: {error}", again) from error
    if not isinstance(image, np.ndarray) or image.ndim != 2:
        raise utils.StageError(f"{path} is not a map of rows and columns.", again)
    if shape is None:
        return image
    if image.shape[0] < shape[0] or image.shape[1] < shape[1]:
        raise utils.StageError(f"{path} is {image.shape}, smaller than the truth {shape}.", again)
    return image[: shape[0], : shape[1]]


def read_spots(directory: Path, genes: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Spot centres (N, 2) as row, column in superpixels of he.jpg, and counts (N, genes)."""
    locs, counts = read_tables(open_sample(directory), genes)
    return locs[["y", "x"]].to_numpy() / utils.TOKEN_PX, counts.to_numpy(np.float32)


def read_tables(stage: utils.Stage, genes: list[str]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """locs.csv and the counts of ``genes``, both by spot id."""
    for artifact in (utils.LOCS, utils.CNTS):
        if stage.find(artifact) is None:
            raise stage.error(stage.directory / artifact.name, "is missing.")
    locs = utils.read_locs(stage, stage.path(utils.LOCS))
    counts = utils.read_counts(stage, stage.path(utils.CNTS), locs.index)
    unknown = [gene for gene in genes if gene not in counts.columns]
    if unknown:
        raise stage.error(
            stage.path(utils.CNTS),
            f"lacks {len(unknown)} of the {len(genes)} genes to score: {', '.join(unknown[:5])}.",
        )
    return locs, counts[genes]


def read_radius(directory: Path) -> float:
    """Radius of a spot in superpixels."""
    stage = open_sample(directory)
    path = directory / utils.RADIUS.name
    if not path.is_file():
        raise stage.error(path, "is missing.")
    longest = utils.MAX_RADIUS_SUPERPIXELS * utils.TOKEN_PX
    number = utils.read_number(stage, path, utils.TOKEN_PX, longest, "px of he.jpg")
    return number / utils.TOKEN_PX


# --------------------------------------------------------------------------------------------------
# predictions without histology
# --------------------------------------------------------------------------------------------------
def interpolate_at(
    centres: np.ndarray, counts: np.ndarray, points: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Nearest and linear interpolation (points, genes); nearest outside the convex hull."""
    nearest = NearestNDInterpolator(centres, counts)(points)
    linear = LinearNDInterpolator(centres, counts)(points)
    return nearest, np.where(np.isnan(linear), nearest, linear)


def interpolate_spots(
    centres: np.ndarray, counts: np.ndarray, shape: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Nearest and linear interpolation (rows, columns, genes) of all superpixels."""
    row, col = np.mgrid[: shape[0], : shape[1]] + 0.5  # centre of superpixel i lies at i + 0.5
    points = np.column_stack([row.ravel(), col.ravel()])
    nearest, linear = interpolate_at(centres, counts, points)
    return nearest.reshape(*shape, -1), linear.reshape(*shape, -1)


# --------------------------------------------------------------------------------------------------
# measures
# --------------------------------------------------------------------------------------------------
def bin_maps(maps: np.ndarray, tissue: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean (R, C, genes) over the tissue of each size x size block; whether it is scored (R, C).

    NaN counts as zero. Blocks that are less than half tissue are not scored and 0; those cut by the
    image's edge are left out.
    """
    rows, cols = (n // size for n in tissue.shape)
    cut = np.s_[: rows * size, : cols * size]
    filled = np.where(tissue[cut][..., None], np.nan_to_num(maps[cut]), 0)
    total = filled.reshape(rows, size, cols, size, -1).sum((1, 3), dtype=np.float64)
    area = tissue[cut].reshape(rows, size, cols, size).sum((1, 3))
    scored = area >= max(MIN_BLOCK_TISSUE * size**2, 1)
    return np.where(scored[..., None], total / np.maximum(area, 1)[..., None], 0), scored


def bin_tissue(maps: np.ndarray, tissue: np.ndarray, size: int) -> np.ndarray:
    """Mean (blocks, genes) over the tissue of each scored block of ``bin_maps``."""
    values, scored = bin_maps(maps, tissue, size)
    return values[scored]


def pearson(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """r (genes,) of the columns of a with those of b; 0 for a constant a, NaN for a constant b."""
    a, b = a - a.mean(0), b - b.mean(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        r = (a * b).sum(0) / np.sqrt((a**2).sum(0) * (b**2).sum(0))
    constant = np.isclose((a**2).sum(0), 0)
    return np.where(np.isclose((b**2).sum(0), 0), np.nan, np.where(constant, 0.0, r))


def spearman(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return pearson(rankdata(a, axis=0), rankdata(b, axis=0))


def rmse(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.sqrt(((a - b) ** 2).mean(0))


class Windows:
    """Local moments (rows, columns, genes) over the tissue of each SSIM window."""

    def __init__(self, tissue: np.ndarray) -> None:
        self.tissue = tissue
        share = self._filter(tissue[..., None].astype(float))
        self.share = np.maximum(share, 0.5 / WINDOW**2)  # no 0 / 0 where there is no tissue
        n = share * WINDOW**2
        self.unbiased = n / np.maximum(n - 1, 1)  # sample variance, as in scikit-image

    def _filter(self, x: np.ndarray) -> np.ndarray:
        return uniform_filter(x, (WINDOW, WINDOW, 1), mode="constant")

    def mean(self, x: np.ndarray) -> np.ndarray:
        return self._filter(np.where(self.tissue[..., None], x, 0)) / self.share

    def covariance(self, x, mean_x, y, mean_y) -> np.ndarray:
        return (self.mean(x * y) - mean_x * mean_y) * self.unbiased


def ssim_maps(a: np.ndarray, b: np.ndarray, tissue: np.ndarray, extent: np.ndarray) -> np.ndarray:
    """SSIM (rows, columns, genes) of two stacks on the tissue, with the data range ``extent``."""
    windows = Windows(tissue)
    c1, c2 = (K1 * extent) ** 2, (K2 * extent) ** 2
    ma, mb = windows.mean(a), windows.mean(b)
    va, vb = windows.covariance(a, ma, a, ma), windows.covariance(b, mb, b, mb)
    same = (2 * ma * mb + c1) * (2 * windows.covariance(a, ma, b, mb) + c2)
    with np.errstate(invalid="ignore", divide="ignore"):  # a constant truth has the extent 0
        return same / ((ma**2 + mb**2 + c1) * (va + vb + c2))


def ssim(a: np.ndarray, b: np.ndarray, tissue: np.ndarray) -> np.ndarray:
    """Mean SSIM (genes,) of prediction a and truth b over the tissue; NaN for a constant b."""
    extent = np.ptp(b[tissue], axis=0)
    mean = ssim_maps(a, b, tissue, extent)[tissue].mean(0)
    return np.where(extent > 0, mean, np.nan)


def published_protocol(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """RMSE and SSIM (genes,) of whole maps, each scaled to 0..1 by itself; NaN counts as zero."""
    a, b = np.nan_to_num(a).astype(np.float64), np.nan_to_num(b).astype(np.float64)
    a, b = (x - x.min((0, 1)) for x in (a, b))
    a, b = (x / np.where(x.max((0, 1)) > 0, x.max((0, 1)), 1) for x in (a, b))
    pairs = zip(np.moveaxis(a, 2, 0), np.moveaxis(b, 2, 0), strict=True)
    similar = [structural_similarity(x, y, data_range=1.0) for x, y in pairs]
    return np.sqrt(((a - b) ** 2).mean((0, 1))), np.array(similar)


# --------------------------------------------------------------------------------------------------
# ceilings
# --------------------------------------------------------------------------------------------------
def thin(counts: np.ndarray, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Two random halves of the counts (..., genes), by binomial thinning.

    Each gene is drawn by itself, so that it does not matter which others are scored. Fractions are
    rounded at random, which keeps the mean.
    """
    half = np.empty(counts.shape, np.float32)
    whole = np.array(counts, np.float32)
    for gene in range(counts.shape[-1]):
        rng = np.random.default_rng(seed)
        drawn = whole[..., gene]
        if (drawn != np.floor(drawn)).any():
            drawn = whole[..., gene] = np.floor(drawn + rng.random(drawn.shape))
        half[..., gene] = rng.binomial(drawn.astype(np.int64), 0.5)
    return half, whole - half


def has_fractions(counts: np.ndarray) -> bool:
    return bool((counts != np.floor(counts)).any())


def reliability(r: np.ndarray) -> np.ndarray:
    """Best r a predictor of the expectation can reach, from that of two halves."""
    r = np.clip(r, 0, 1)
    return np.sqrt(2 * r / (1 + r))


def thinning_ceiling(
    counts: np.ndarray, tissue: np.ndarray, size: int, seed: int = 0
) -> np.ndarray:
    """Best r (genes,) that a perfect predictor could reach, from two random halves of the counts.

    Truth that was binned by area holds fractions. Single superpixels then say nothing about the
    counting noise (NaN).
    """
    if size == 1 and has_fractions(counts):
        return np.full(counts.shape[-1], np.nan)
    halves = (bin_tissue(half, tissue, size) for half in thin(counts, seed))
    return reliability(pearson(*halves))


def ceiling_by_halves(measure: str, halves, tissue: np.ndarray) -> np.ndarray:
    """The best score (genes,), from two binned halves (rows, columns, genes) of the truth."""
    first, second = halves
    if measure == "r":
        return reliability(pearson(first[tissue], second[tissue]))
    if measure == "rho":
        return reliability(spearman(first[tissue], second[tissue]))
    if measure == "rmse":
        return rmse(first[tissue], second[tissue])
    return ssim_ceiling(first, second, tissue)


def ssim_ceiling(first: np.ndarray, second: np.ndarray, tissue: np.ndarray) -> np.ndarray:
    """SSIM (genes,) of the expectation with the counts: the halves' covariance is its variance."""
    windows, counts = Windows(tissue), first + second
    extent = np.ptp(counts[tissue], axis=0)
    mean, m1, m2 = (windows.mean(x) for x in (counts, first, second))
    signal = (4 * windows.covariance(first, m1, second, m2)).clip(min=0)
    noisy = np.maximum(windows.covariance(counts, mean, counts, mean), signal)
    c2 = (K2 * extent) ** 2
    with np.errstate(invalid="ignore", divide="ignore"):
        best = ((2 * signal + c2) / (signal + noisy + c2))[tissue].mean(0)
    return np.where(extent > 0, best, np.nan)


# --------------------------------------------------------------------------------------------------
# scores against the truth
# --------------------------------------------------------------------------------------------------
def column(method: str, measure: str, size: int) -> str:
    """histex_4x is Pearson's r, histex_ssim_4x the SSIM."""
    return f"{method}_{size}x" if measure == "r" else f"{method}_{measure}_{size}x"


def measure_binned(measure: str, a: np.ndarray, b: np.ndarray, tissue: np.ndarray) -> np.ndarray:
    """One score (genes,) of a prediction a with the truth b, both (rows, columns, genes)."""
    if measure == "ssim":
        return ssim(a, b, tissue)
    return {"r": pearson, "rho": spearman, "rmse": rmse}[measure](a[tissue], b[tissue])


def score(
    truth: Truth, predictions: dict[str, np.ndarray], measures=tuple(MEASURES)
) -> pd.DataFrame:
    """Scores per gene (rows) of each prediction and the ceiling: columns such as histex_4x."""
    table = pd.DataFrame(index=pd.Index(truth.genes, name="gene"))
    halves = thin(truth.counts) if truth.mean is None else ()
    fractions = has_fractions(truth.counts)
    for size in BINS:
        target, scored = bin_maps(truth.counts * truth.capture, truth.tissue, size)
        binned = {name: bin_maps(m, truth.tissue, size)[0] for name, m in predictions.items()}
        if truth.mean is not None:
            binned["ceiling"] = bin_maps(truth.mean * truth.capture, truth.tissue, size)[0]
        split = [bin_maps(half * truth.capture, truth.tissue, size)[0] for half in halves]
        for measure in measures:
            for name, maps in binned.items():
                table[column(name, measure, size)] = measure_binned(measure, maps, target, scored)
            if split:
                # The noise of fractions is unknown in superpixels, and only its share in blocks.
                hidden = fractions and (size == 1 or measure in ("rmse", "ssim"))
                best = np.nan if hidden else ceiling_by_halves(measure, split, scored)
                table[column("ceiling", measure, size)] = best
    return table.copy()  # in one piece


def select_genes(truth: Truth, genes: list[str]) -> Truth:
    position = {gene: i for i, gene in enumerate(truth.genes)}
    keep = [position[gene] for gene in genes]
    return Truth(
        counts=truth.counts[:, :, keep],
        tissue=truth.tissue,
        genes=genes,
        mean=None if truth.mean is None else truth.mean[:, :, keep],
        kinds=None if truth.kinds is None else [truth.kinds[i] for i in keep],
        capture=truth.capture,
    )


# --------------------------------------------------------------------------------------------------
# spot totals
# --------------------------------------------------------------------------------------------------
def disc_weights(centres: np.ndarray, radius: float, shape: tuple[int, int]) -> csr_array:
    """Area (spots, rows * columns) of each spot's disc in each superpixel of the map."""
    reach = int(np.ceil(radius)) + 1
    steps = np.arange(-reach, reach + 1)
    middles = (np.arange(SUBSAMPLES) + 0.5) / SUBSAMPLES
    spot, cell, area = [], [], []
    for i, (y, x) in enumerate(centres):
        rows, cols = int(np.floor(y)) + steps, int(np.floor(x)) + steps
        down = (rows[:, None] + middles - y) ** 2  # (steps, subsamples)
        across = (cols[:, None] + middles - x) ** 2
        share = (down[:, None, :, None] + across[None, :, None, :] <= radius**2).mean((2, 3))
        on_map = ((rows >= 0) & (rows < shape[0]))[:, None] & (cols >= 0) & (cols < shape[1])
        row, col = np.nonzero((share > 0) & on_map)
        spot.append(np.full(len(row), i))
        cell.append(rows[row] * shape[1] + cols[col])
        area.append(share[row, col])
    where = (np.concatenate(spot), np.concatenate(cell))
    return csr_array((np.concatenate(area), where), (len(centres), shape[0] * shape[1]))


def sum_discs(weights: csr_array, maps: np.ndarray) -> np.ndarray:
    """Totals (spots, genes) of maps (rows, columns, genes) over the discs; NaN adds nothing."""
    return weights @ np.nan_to_num(maps.reshape(-1, maps.shape[2])).astype(np.float64)


def on_tissue(weights: csr_array, image: np.ndarray, radius: float) -> np.ndarray:
    """Whether enough of each disc (spots,) lies on the tissue of a map (rows, columns)."""
    return weights @ np.isfinite(image).ravel() >= MIN_DISC_TISSUE * np.pi * radius**2


def score_totals(predicted: np.ndarray, measured: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """r and ratio of sums (genes,) of totals (spots, genes)."""
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio = predicted.sum(0) / measured.sum(0)
    return pearson(predicted, measured), np.where(np.isfinite(ratio), ratio, np.nan)


# --------------------------------------------------------------------------------------------------
# seams
# --------------------------------------------------------------------------------------------------
def line_gradients(maps: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Of rows, then columns: summed differences (lines, genes) across each line, pairs (lines,).

    Line i lies between superpixels i and i + 1. Pairs with a NaN do not count.
    """
    result = []
    for axis in (0, 1):
        step = np.abs(np.diff(np.moveaxis(maps, axis, 0).astype(np.float64), axis=0))
        inside = np.isfinite(step).all(2)
        result.append((np.where(inside[..., None], step, 0).sum(1), inside.sum(1)))
    return result


def grid_lines(extent: int, period: int) -> np.ndarray:
    """Lines (as in ``line_gradients``) between blocks of ``period`` superpixels from the corner."""
    return np.arange(period, extent, period) - 1


def tile_lines(extent: int, tile: int, overlap: int) -> np.ndarray:
    """Lines in the middle of the overlaps of tiles that are spread evenly over the extent."""
    reach = max(extent - tile, 0)
    steps = -(-reach // (tile - overlap))
    starts = np.array([round(i * reach / max(steps, 1)) for i in range(steps + 1)])
    return (starts[1:] + starts[:-1] + tile) // 2 - 1


def offset_gradients(gradients, lines: list[np.ndarray], offsets: int) -> np.ndarray:
    """Mean difference (offsets, genes) across a grid's lines, moved by 0, 1, ... superpixels.

    NaN where no line is left on the map.
    """
    profile = []
    for offset in range(offsets):
        total, pairs = 0.0, 0
        for (sums, counts), own in zip(gradients, lines, strict=True):
            moved = own[own + offset < len(counts)] + offset
            total, pairs = total + sums[moved].sum(0), pairs + counts[moved].sum()
        profile.append(total / pairs if pairs else np.full(gradients[0][0].shape[1], np.nan))
    return np.array(profile)


def describe_seam(profile: np.ndarray) -> dict[str, float | int | None]:
    """Excess, rank and z of the first of the offsets (offsets,) against the others."""
    own, others = profile[0], profile[1:]
    if not np.isfinite(profile).all() or others.mean() == 0:
        return {"excess": None, "rank": None, "offsets": len(profile), "z": None}
    spread = others.std(ddof=1)
    return {
        "excess": round(float(own / others.mean() - 1), 5),
        "rank": int((others >= own).sum()) + 1,
        "offsets": len(profile),
        "z": round(float((own - others.mean()) / spread), 2) if spread > 0 else None,
    }


def score_seams(
    gradients: list[tuple[np.ndarray, np.ndarray]],
) -> tuple[dict[str, dict], dict[str, np.ndarray]]:
    """Seams of all genes together, by grid; and the excess of each gene (genes,) by column name."""
    shape = [len(pairs) + 1 for _, pairs in gradients]
    mean = sum(sums.sum(0) for sums, _ in gradients)
    varies = mean > 0
    grids = {
        f"every {period}, {what}": ([grid_lines(n, period) for n in shape], period)
        for period, what in PERIODS.items()
    }
    for what, (tile, overlap) in TILINGS.items():
        lines = [tile_lines(n, tile, overlap) for n in shape]
        grids[f"{what} of {tile}"] = (lines, tile - overlap)
    together, by_gene = {}, {}
    for name, (lines, offsets) in grids.items():
        profile = offset_gradients(gradients, lines, offsets)
        relative = profile[:, varies] / mean[varies]
        together[name] = describe_seam(relative.mean(1) if varies.any() else profile[:, 0])
        with np.errstate(invalid="ignore", divide="ignore"):
            by_gene[name] = profile[0] / profile[1:].mean(0) - 1
    columns = {f"seam_{p}": by_gene[f"every {p}, {PERIODS[p]}"] for p in GENE_PERIODS}
    return together, columns


# --------------------------------------------------------------------------------------------------
# left-out spots
# --------------------------------------------------------------------------------------------------
def choose_folds(n_spots: int, n_folds: int, seed: int) -> np.ndarray:
    """Fold (spots,) of every spot; the folds differ by one spot at most."""
    return np.random.default_rng(seed).permutation(n_spots) % n_folds


def link(source: Path, target: Path) -> None:
    """The same file under a second name where the disk can do that, else a copy of it."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def make_fold(
    stage: utils.Stage, folder: Path, locs: pd.DataFrame, counts: pd.DataFrame, kept: np.ndarray
) -> None:
    """A sample directory in which only the spots ``kept`` (spots,) have a place and counts.

    It looks as after image_calibration.py, Histology_Extractor.py and masking_non_tissue.py, with a
    hand-edited locs.csv: their records are there, so that the next scripts check what they always
    check. (Of locs-raw.csv, these see only that it is unchanged; no script reads it again.) The
    mask's record would name the full locs.csv, so the mask comes as one of the user's own.
    """
    names = {utils.MASK.name}
    for script in (utils.CALIBRATION, utils.EXTRACTOR):
        record = utils.read_record(stage, script)
        names |= {utils.record_name(script), *record["inputs"], *record["outputs"]}
    for name in sorted(names - {utils.LOCS.name}):
        if (stage.directory / name).exists():
            link(stage.directory / name, folder / name)
    locs[kept].to_csv(folder / utils.LOCS.name, lineterminator="\n")
    counts[kept].to_csv(folder / utils.CNTS.name, lineterminator="\n")
    lines = "".join(f"{gene}\n" for gene in counts.columns)
    (folder / utils.GENE_NAMES.name).write_text(lines, encoding="utf-8", newline="\n")


def run_script(script: str, folder: Path, options: list[str]) -> None:
    command = [sys.executable, str(ROOT / script), "--directory", str(folder), *options]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode:
        raise utils.StageError(
            f"{script} ended with {done.returncode} on a copy without the left-out spots:\n"
            f"{done.stderr.strip()[-2000:]}",
            "See that the sample itself runs with these options, then run the same command.",
        )


def recorded_options(stage: utils.Stage) -> list[str]:
    """The options that HISTEX.py was last run with here; none, its defaults, without a record."""
    record = utils.read_record(stage, utils.HISTEX) or {}
    return [str(option) for option in record.get("options", [])]


def predict_left_out(folder: Path, genes: list[str], centres: np.ndarray, radius: float):
    """Totals (spots, genes) of the maps in ``folder`` over discs, and which spots are on tissue."""
    files, totals = map_files(folder), []
    for gene in genes:
        image = read_map(files[gene], None)
        if not totals:
            weights = disc_weights(centres, radius, image.shape)
            usable = on_tissue(weights, image, radius)
        totals.append(sum_discs(weights, image[..., None])[:, 0])
    return np.column_stack(totals), usable


def hold_out(stage: utils.Stage, n_folds: int, seed: int, options: list[str], place: Path):
    """Scores per gene on the left-out spots, and the facts of the summary."""
    stage.require(
        utils.HE, utils.LOCS, utils.RADIUS, utils.CNTS, utils.GENE_NAMES, utils.FEATURES, utils.MASK
    )
    genes, radius = read_gene_names(stage.directory), read_radius(stage.directory)
    locs, counts = read_tables(stage, genes)
    if not 2 <= n_folds <= len(locs):
        raise utils.StageError(
            f"--holdout is {n_folds}; expected 2 to {len(locs)}, the number of spots.",
            f"Run: {stage.command()}",
        )
    centres, measured = locs[["y", "x"]].to_numpy() / utils.TOKEN_PX, counts.to_numpy(np.float64)
    fold = choose_folds(len(locs), n_folds, seed)
    predicted = {name: np.empty(measured.shape) for name in ("histex", "linear", "nearest")}
    usable = np.zeros(len(locs), bool)
    for i in range(n_folds):
        start, out = time.time(), fold == i
        with tempfile.TemporaryDirectory(prefix="evaluation-fold-", dir=place) as name:
            make_fold(stage, Path(name), locs, counts, ~out)
            run_script(utils.HIGH_RESOLUTION, Path(name), [])
            run_script(utils.HISTEX, Path(name), [*options, "--n-plots", "0"])
            found = predict_left_out(Path(name), genes, centres[out], radius)
        predicted["histex"][out], usable[out] = found
        nearest, linear = interpolate_at(centres[~out], measured[~out], centres[out])
        predicted["nearest"][out], predicted["linear"][out] = nearest, linear
        seconds = time.time() - start
        print(f"fold {i + 1} of {n_folds}: {out.sum()} spots left out, {seconds:.0f} s", flush=True)
    table = score_left_out(measured[usable], {k: v[usable] for k, v in predicted.items()}, genes)
    facts = {
        "folds": n_folds,
        "seed": seed,
        "options of HISTEX.py": shlex.join(options),
        "genes": len(genes),
        "spots": int(usable.sum()),
        "spots without tissue": int((~usable).sum()),
        "median r": {name: {"spots": rounded(table[f"{name}_spots"].median())} for name in METHODS},
        "median ratio": rounded(table["ratio"].median()),
    }
    return table, facts


def score_left_out(
    measured: np.ndarray, predicted: dict[str, np.ndarray], genes: list[str]
) -> pd.DataFrame:
    """r per gene (rows) of predicted with measured totals (spots, genes), and the ceiling."""
    table = pd.DataFrame(index=pd.Index(genes, name="gene"))
    table["mean_count"] = measured.mean(0)
    for name, totals in predicted.items():
        table[f"{name}_spots"] = pearson(totals, measured)
    line = measured[:, None].astype(np.float32)
    table["ceiling_spots"] = thinning_ceiling(line, np.ones(line.shape[:2], bool), 1)
    table["ratio"] = score_totals(predicted["histex"], measured)[1]
    return table


# --------------------------------------------------------------------------------------------------
# tables
# --------------------------------------------------------------------------------------------------
def rounded(value: float, digits: int = 4) -> float | None:
    """For JSON, which knows no NaN."""
    return round(float(value), digits) if np.isfinite(value) else None


def medians(table: pd.DataFrame, measure: str = "r") -> dict[str, dict[str, float | None]]:
    """Median over genes: method, then bin."""
    return {
        name: {f"{size}x": rounded(table[column(name, measure, size)].median()) for size in BINS}
        for name in METHODS
    }


def report(summary: dict[str, dict[str, float | None]], n_genes: int, what: str = "r") -> str:
    """A table of medians: a row a method, a column a size of block."""
    sizes = [int(key[:-1]) for key in next(iter(summary.values()))]
    first = f"median {what} over {n_genes} genes"
    lines = [f"{first:40}" + "".join(f"{utils.SUPERPIXEL_UM * b:>7.0f} um" for b in sizes)]
    for name, values in summary.items():
        cells = ("unknown" if r is None else f"{r:.3f}" for r in values.values())
        lines.append(f"{METHODS[name]:40}" + "".join(f"{cell:>10}" for cell in cells))
    return "\n".join(lines)


def report_all(facts: dict) -> str:
    """The printed summary of evaluation.json."""
    parts = [report(facts[f"median {m}"], facts["genes"], what) for m, what in MEASURES.items()]
    published = facts["published protocol"]
    lines = [f"{'published protocol (see --help)':40}{'RMSE':>10}{'SSIM':>10}"]
    lines += [
        f"{METHODS[name]:40}{values['rmse']:>10.3f}{values['ssim']:>10.3f}"
        for name, values in published.items()
    ]
    lines += ["", f"{'seams':40}{'excess':>10}{'rank':>10}{'z':>10}"]
    for name, seam in facts["seams"].items():
        if seam["excess"] is not None:
            rank = f"{seam['rank']} of {seam['offsets']}"
            z = "unknown" if seam["z"] is None else f"{seam['z']:.1f}"
            lines.append(f"{name:40}{seam['excess']:>+10.2%}{rank:>10}{z:>10}")
    totals = facts["spot totals"]
    parts.append("\n".join(lines))
    parts.append(
        f"spot totals: median r {totals['median r']} over {totals['spots']} spots; the maps hold "
        f"{totals['median ratio']:.1%} of the measured counts\n"
        f"{facts['tissue without map']:.1%} of the tissue lies outside the mask and counts as zero"
    )
    return "\n\n".join(parts)


def report_left_out(facts: dict) -> str:
    """The printed summary of evaluation-holdout.json."""
    lines = [f"{'median r over ' + str(facts['genes']) + ' genes':40}{'left-out spots':>16}"]
    for name, values in facts["median r"].items():
        r = values["spots"]
        lines.append(f"{METHODS[name]:40}{'unknown' if r is None else f'{r:.3f}':>16}")
    lines.append(f"{facts['spots']} spots, each predicted by maps made without it")
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------------
# picture
# --------------------------------------------------------------------------------------------------
COLOURS = {"histex": "#b5306b", "linear": "#4c78a8", "nearest": "#999999", "ceiling": "#333333"}
SHOWN = {"well predicted": 0.9, "median": 0.5, "badly predicted": 0.1}  # quantiles of r
SATURATED = 99.0  # percentile at which the colours end
SHOWN_BIN = 2  # superpixels: in single ones, truth is mostly counting noise


def draw_scores(axes, table: pd.DataFrame, key: str, where: str) -> None:
    """Three panels of r per gene: against interpolation, against the ceiling, by abundance."""
    versus_linear, versus_ceiling, by_count = axes
    for ax, name in ((versus_linear, "linear"), (versus_ceiling, "ceiling")):
        x, y = table[f"{name}_{key}"], table[f"histex_{key}"]
        low = min(0.0, np.nanmin([x.min(), y.min(), 0])) - 0.02
        ax.plot([low, 1], [low, 1], color="0.7", lw=1, zorder=0)
        ax.scatter(x, y, s=14, color=COLOURS["histex"], alpha=0.65, linewidths=0)
        ax.set(xlim=(low, 1), ylim=(low, 1), aspect="equal", xlabel=METHODS[name])
        ax.set_ylabel(f"HISTEX, {where}")
        if x.notna().any():
            better = (y > x).sum() / x.notna().sum()
            text = f"median {y.median():.2f} against {x.median():.2f}; {better:.0%} above the line"
            ax.set_title(text, fontsize=10)
    for name in ("ceiling", "linear", "histex"):
        by_count.scatter(
            table["mean_count"], table[f"{name}_{key}"], s=10, color=COLOURS[name], alpha=0.6,
            linewidths=0, label=METHODS[name],
        )  # fmt: skip
    by_count.set(xscale="log", ylabel="Pearson r", xlabel="mean count")
    by_count.set_title(f"{len(table)} genes, a dot each", fontsize=10)
    by_count.legend(fontsize=8, frameon=False, markerscale=2)
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)


def choose_shown(table: pd.DataFrame) -> dict[str, str]:
    """Gene -> why it is shown: those nearest to three quantiles of r at the largest bin."""
    r = table[f"histex_{BINS[-1]}x"].dropna()
    return {(r - r.quantile(q)).abs().idxmin(): why for why, q in SHOWN.items()} if len(r) else {}


def draw_maps(axes, truth: Truth, predictions: dict[str, np.ndarray], table, why: str) -> None:
    """One gene in a row: the truth and the predictions, all on the truth's scale."""
    side = SHOWN_BIN * utils.SUPERPIXEL_UM
    shown = {f"truth, {side:.0f} um": truth.counts * truth.capture}
    shown |= {METHODS[name]: maps for name, maps in predictions.items()}
    binned = {}
    for name, maps in shown.items():
        values, scored = bin_maps(maps, truth.tissue, SHOWN_BIN)
        binned[name] = np.where(scored, values[..., 0], np.nan)
    top = max(float(np.nanpercentile(next(iter(binned.values())), SATURATED)), 1e-6)
    gene = truth.genes[0]
    for ax, (name, values) in zip(axes, binned.items(), strict=True):
        image = ax.imshow(values, cmap="magma", vmin=0, vmax=top, interpolation="nearest")
        ax.set(xticks=[], yticks=[])
        ax.spines[:].set_visible(False)
        method = next((key for key, text in METHODS.items() if text == name), None)
        r = "" if method is None else f", r = {table.loc[gene, f'{method}_{SHOWN_BIN}x']:.2f}"
        ax.set_title(name + r, fontsize=10)
    axes[0].set_ylabel(f"{gene}\n{why}", fontsize=11)
    bar = axes[0].figure.colorbar(image, ax=list(axes), extend="max", pad=0.01, aspect=25)
    bar.set_label("counts per superpixel", fontsize=9)
    bar.outline.set_visible(False)


def draw(table: pd.DataFrame, truth: Truth, directory: Path):
    """The picture of a section with truth: scores, then a row of maps per shown gene."""
    from matplotlib.figure import Figure

    genes = choose_shown(table)
    heights = [4.9, *[3.8] * len(genes)]  # inches
    figure = Figure(figsize=(13, sum(heights)), layout="constrained", dpi=100)
    parts = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    side = f"{BINS[-1] * utils.SUPERPIXEL_UM:.0f} um"
    draw_scores(parts[0].subplots(1, 3), table, f"{BINS[-1]}x", f"r at {side}")
    area = disc_area(directory)
    for part, (gene, why) in zip(parts[1:], genes.items(), strict=True):
        known = select_genes(truth, [gene])
        centres, counts = read_spots(directory, [gene])
        _, linear = interpolate_spots(centres, counts / area, truth.tissue.shape)
        image = read_maps(directory, [gene], truth.tissue.shape)[gene][..., None]
        predictions = {"histex": image, "linear": linear}
        draw_maps(part.subplots(1, 3), known, predictions, table, why)
    return figure


def draw_left_out(table: pd.DataFrame):
    """The picture of the left-out spots."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.9), layout="constrained", dpi=100)
    draw_scores(figure.subplots(1, 3), table, "spots", "r in left-out spots")
    return figure


# --------------------------------------------------------------------------------------------------
# the command
# --------------------------------------------------------------------------------------------------
def disc_area(directory: Path) -> float:
    """Area of a spot in superpixels."""
    return float(np.pi * read_radius(directory) ** 2)


def score_part(truth: Truth, maps: np.ndarray, centres, counts, area: float) -> pd.DataFrame:
    """All scores against the truth of the genes of ``truth``: maps (rows, columns, genes) uncut."""
    rows, cols = truth.tissue.shape
    nearest, linear = interpolate_spots(centres, counts / area, (rows, cols))
    predictions = {"histex": maps[:rows, :cols], "linear": linear, "nearest": nearest}
    table = score(truth, predictions)
    table.insert(0, "mean_count", truth.counts[truth.tissue].mean(0) * truth.capture)
    for name, image in predictions.items():
        error, similar = published_protocol(image, truth.counts)
        table[f"{name}_published_rmse"], table[f"{name}_published_ssim"] = error, similar
    return table


def evaluate(directory: Path, truth: Truth) -> tuple[pd.DataFrame, dict]:
    """Scores per gene and the facts of the summary, a few genes at a time."""
    files = map_files(directory)
    genes = [gene for gene in truth.genes if gene in files]
    if not genes:
        raise utils.StageError(
            f"{directory / utils.MAPS.name} holds no map of a gene of the truth.",
            "Put the genes of the truth into gene-names.txt and run the five scripts again.",
        )
    centres, counts = read_spots(directory, genes)
    radius, tissue = read_radius(directory), truth.tissue
    shape = read_map(files[genes[0]], None).shape
    read_map(files[genes[0]], tissue.shape)  # refuses maps smaller than the truth
    weights = disc_weights(centres, radius, shape)
    usable = on_tissue(weights, read_map(files[genes[0]], None), radius)
    step = max(1, VALUES_AT_A_TIME // (shape[0] * shape[1]))
    tables, gradients, blank = [], [], np.ones(int(tissue.sum()), bool)
    for start in range(0, len(genes), step):
        part = genes[start : start + step]
        maps = np.stack(list(read_maps(directory, part).values()), axis=2)
        known, measured = select_genes(truth, part), counts[:, start : start + step]
        table = score_part(known, maps, centres, measured, np.pi * radius**2)
        totals = score_totals(sum_discs(weights, maps)[usable], measured[usable])
        table["totals_r"], table["totals_ratio"] = totals
        tables.append(table)
        gradients.append(line_gradients(maps))
        blank &= np.isnan(maps[: tissue.shape[0], : tissue.shape[1]][tissue]).all(1)
    table = pd.concat(tables)
    joined = [
        (np.concatenate([sums for sums, _ in axis], axis=1), axis[0][1])
        for axis in zip(*gradients, strict=True)
    ]
    seams, by_gene = score_seams(joined)
    table = table.assign(**by_gene)
    facts = summarise(table, seams, int(usable.sum()), float(blank.mean()))
    return table, facts


def summarise(table: pd.DataFrame, seams: dict, n_spots: int, blank: float) -> dict:
    """What evaluation.json holds: medians over genes."""
    middle = table.median()
    return {
        "genes": len(table),
        "tissue without map": round(blank, 4),
        **{f"median {measure}": medians(table, measure) for measure in MEASURES},
        "published protocol": {
            name: {m: rounded(middle[f"{name}_published_{m}"]) for m in ("rmse", "ssim")}
            for name in METHODS
            if name != "ceiling"
        },
        "spot totals": {
            "spots": n_spots,
            "median r": rounded(middle["totals_r"]),
            "median ratio": rounded(middle["totals_ratio"]),
        },
        "seams": seams,
    }


def write(folder: Path, stem: str, table: pd.DataFrame, facts: dict, figure) -> None:
    """The table, the summary and, unless it is None, the picture."""
    with utils.atomic(folder / f"{stem}.csv") as partial:
        table.round(5).to_csv(partial, lineterminator="\n")
    with utils.atomic(folder / f"{stem}.json") as partial:
        partial.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    if figure is not None:
        with utils.atomic(folder / f"{stem}.png") as partial:
            figure.savefig(partial)
    print(f"wrote {stem}.csv, .json{'' if figure is None else ', .png'} in {folder}")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    option = parser.add_argument
    option("--directory", type=utils.sample_directory, required=True, help="Folder of the sample.")
    option("--output", type=Path, help="Folder for the results; without it, the sample's own.")
    option(
        "--holdout",
        type=utils.positive,
        metavar="K",
        help="Leave out the spots in K folds and predict them, in place of a truth.",
    )
    option(
        "--histex",
        type=shlex.split,
        metavar="OPTIONS",
        help="With --holdout: options of HISTEX.py, in quotes. Without it, those of its last run.",
    )
    option("--seed", type=utils.not_negative, default=0, help="With --holdout: of the folds.")
    option("--no-plot", action="store_true", help="No picture, which needs matplotlib.")
    parser.set_defaults(allow_stale=False)
    return parser


def check_matplotlib() -> None:
    """Before any work, not after it."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise utils.StageError(
            "The picture needs matplotlib, which is not installed.",
            "Run: pip install -r analysis/requirements.txt, or add --no-plot",
        ) from error


def run_evaluation(stage: utils.Stage) -> None:
    args = stage.args
    output = args.output or args.directory
    output.mkdir(parents=True, exist_ok=True)
    if not args.no_plot:
        check_matplotlib()
    if args.holdout:
        options = recorded_options(stage) if args.histex is None else args.histex
        table, facts = hold_out(stage, args.holdout, args.seed, options, output)
        print("\n" + report_left_out(facts) + "\n")
        figure = None if args.no_plot else draw_left_out(table)
        write(output, "evaluation-holdout", table, facts, figure)
        return
    truth = read_truth(args.directory)
    table, facts = evaluate(args.directory, truth)
    print(report_all(facts) + "\n")
    figure = None if args.no_plot else draw(table, truth, args.directory)
    write(output, "evaluation", table, facts, figure)


def main(argv: list[str] | None = None) -> int:
    return utils.run_stage(run_evaluation, SCRIPT, build_parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
