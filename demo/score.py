"""Compare super-resolved maps with the truth, beside interpolation and the best possible score.

    python demo/score.py --directory demo/section

Score: Pearson's r between a map and the counted molecules over the tissue's superpixels, per gene;
the table gives the median over genes. 1x is the 8 um superpixel; 4x is 32 um: the mean over the
tissue superpixels of each block of 4 x 4 that is at least half tissue. A superpixel of true tissue
for which the map says nothing (NaN, outside the mask) counts as zero; a constant map has r = 0.

Beside it stand two predictions without histology, the nearest spot and linear interpolation between
spots, and the ceiling. Molecules are counts, so even the exact expected expression correlates with
them imperfectly: where truth.npz holds the expectation (``mean``), the ceiling is its own r; else
the molecules are split at random into two halves with correlation r between them, the reliability
of the whole is 2 r / (1 + r) (Spearman and Brown), and the ceiling its square root.

Files in: truth.npz (counts (rows, columns, genes), tissue; genes, or else gene-names.txt),
locs.csv, cnts.csv, cnts-super/. Files out: score.csv (r per gene) and score.json (the table).
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.interpolate import LinearNDInterpolator, NearestNDInterpolator

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import utils

BINS = (1, 4)  # superpixels per side of a scored block: 8 um and 32 um
MIN_BLOCK_TISSUE = 0.5  # share of a block that must be tissue
METHODS = {
    "histex": "HISTEX",
    "linear": "linear interpolation of spots",
    "nearest": "nearest spot",
    "ceiling": "ceiling set by counting noise",
}


@dataclass
class Truth:
    """What truth.npz holds: (rows, columns, genes) counts and, if known, their expectation."""

    counts: np.ndarray
    tissue: np.ndarray
    genes: list[str]
    mean: np.ndarray | None = None
    kinds: list[str] | None = None
    capture: float = 1.0  # share of the molecules that a spot catches


def read_truth(directory: Path) -> Truth:
    path = directory / "truth.npz"
    if not path.is_file():
        raise utils.StageError(
            f"{path} is missing: only a section with known truth can be scored.",
            f'Simulate one: python demo/simulate.py --directory "{directory}"',
        )
    with np.load(path, allow_pickle=False) as saved:
        genes = saved["genes"].tolist() if "genes" in saved else None
        return Truth(
            counts=saved["counts"].astype(np.float32),
            tissue=saved["tissue"],
            genes=genes or (directory / utils.GENE_NAMES.name).read_text("utf-8").split(),
            mean=saved.get("mean"),
            kinds=saved["kinds"].tolist() if "kinds" in saved else None,
            capture=float(saved["capture"]) if "capture" in saved else 1.0,
        )


def read_maps(directory: Path, genes: list[str], shape: tuple[int, int]) -> dict[str, np.ndarray]:
    """Maps (rows, columns) of the genes that have one, cut to the truth's grid."""
    folder = directory / utils.MAPS.name
    if not (folder / "index.csv").is_file():
        raise utils.StageError(
            f"{folder / 'index.csv'} is missing: there are no maps to score.",
            f'Run: python {utils.HISTEX} --directory "{directory}"',
        )
    index = pd.read_csv(folder / "index.csv", dtype=str, keep_default_na=False)
    files = dict(zip(index["gene"], index["file"], strict=True))
    maps = {}
    for gene in genes:
        if gene in files:
            path = folder / files[gene]
            image = np.load(path) if path.suffix == ".npy" else utils.read_pickle(path)
            maps[gene] = image[: shape[0], : shape[1]]
            if maps[gene].shape != shape:
                raise utils.StageError(
                    f"{path} is {image.shape}, smaller than the truth {shape}.",
                    f"Run the five scripts again, {utils.CALIBRATION} first.",
                )
    return maps


def read_spots(directory: Path, genes: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Spot centres (N, 2) as row, column in superpixels of he.jpg, and counts (N, genes)."""
    locs = pd.read_csv(directory / utils.LOCS.name, index_col=0)
    path = next(directory / name for name in utils.CNTS.names if (directory / name).exists())
    counts = pd.read_csv(path, index_col=0, sep="\t" if ".tsv" in path.name else ",")
    return (
        locs[["y", "x"]].to_numpy() / utils.TOKEN_PX,
        counts.loc[locs.index, genes].to_numpy(np.float32),
    )


def interpolate_spots(
    centres: np.ndarray, counts: np.ndarray, shape: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Nearest and linear interpolation (rows, columns, genes); nearest outside the convex hull."""
    row, col = np.mgrid[: shape[0], : shape[1]] + 0.5  # centre of superpixel i lies at i + 0.5
    points = np.column_stack([row.ravel(), col.ravel()])
    nearest = NearestNDInterpolator(centres, counts)(points)
    linear = LinearNDInterpolator(centres, counts)(points)
    linear = np.where(np.isnan(linear), nearest, linear)
    return nearest.reshape(*shape, -1), linear.reshape(*shape, -1)


def bin_tissue(maps: np.ndarray, tissue: np.ndarray, size: int) -> np.ndarray:
    """Mean (blocks, genes) over the tissue of each size x size block; NaN counts as zero.

    Blocks that are less than half tissue, or cut by the image's edge, are left out.
    """
    rows, cols = (n // size for n in tissue.shape)
    cut = np.s_[: rows * size, : cols * size]
    filled = np.where(tissue[cut][..., None], np.nan_to_num(maps[cut]), 0)
    total = filled.reshape(rows, size, cols, size, -1).sum((1, 3), dtype=np.float64)
    area = tissue[cut].reshape(rows, size, cols, size).sum((1, 3))
    scored = area >= max(MIN_BLOCK_TISSUE * size**2, 1)
    return total[scored] / area[scored][:, None]


def pearson(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """r (genes,) of the columns of a with those of b; 0 for a constant a, NaN for a constant b."""
    a, b = a - a.mean(0), b - b.mean(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        r = (a * b).sum(0) / np.sqrt((a**2).sum(0) * (b**2).sum(0))
    constant = np.isclose((a**2).sum(0), 0)
    return np.where(np.isclose((b**2).sum(0), 0), np.nan, np.where(constant, 0.0, r))


def thinning_ceiling(
    counts: np.ndarray, tissue: np.ndarray, size: int, seed: int = 0
) -> np.ndarray:
    """Best r (genes,) that a perfect predictor could reach, from two random halves of the counts.

    Truth that was binned by area holds fractions. Single superpixels then say nothing about the
    counting noise (NaN); for blocks, fractions are rounded at random, which keeps the mean.
    """
    if size == 1 and (counts != np.floor(counts)).any():
        return np.full(counts.shape[-1], np.nan)
    rng = np.random.default_rng(seed)
    whole = np.floor(counts + rng.random(counts.shape)).astype(np.int64)
    half = rng.binomial(whole, 0.5)
    r = pearson(bin_tissue(half, tissue, size), bin_tissue(whole - half, tissue, size))
    r = np.clip(r, 0, 1)
    return np.sqrt(2 * r / (1 + r))


def score(truth: Truth, predictions: dict[str, np.ndarray]) -> pd.DataFrame:
    """r per gene (rows) of each prediction and the ceiling: columns such as histex_4x."""
    table = pd.DataFrame(index=pd.Index(truth.genes, name="gene"))
    for size in BINS:
        target = bin_tissue(truth.counts, truth.tissue, size)
        for name, maps in predictions.items():
            table[f"{name}_{size}x"] = pearson(bin_tissue(maps, truth.tissue, size), target)
        if truth.mean is None:
            ceiling = thinning_ceiling(truth.counts, truth.tissue, size)
        else:
            ceiling = pearson(bin_tissue(truth.mean, truth.tissue, size), target)
        table[f"ceiling_{size}x"] = ceiling
    return table


def select_genes(truth: Truth, genes: list[str]) -> Truth:
    keep = [truth.genes.index(gene) for gene in genes]
    return Truth(
        counts=truth.counts[:, :, keep],
        tissue=truth.tissue,
        genes=genes,
        mean=None if truth.mean is None else truth.mean[:, :, keep],
        kinds=None if truth.kinds is None else [truth.kinds[i] for i in keep],
        capture=truth.capture,
    )


def medians(table: pd.DataFrame) -> dict[str, dict[str, float]]:
    """The table of the report: method, then bin."""
    summary = {}
    for name in METHODS:
        values = {f"{size}x": float(table[f"{name}_{size}x"].median()) for size in BINS}
        summary[name] = {key: None if np.isnan(r) else round(r, 4) for key, r in values.items()}
    return summary


def report(summary: dict[str, dict[str, float]], n_genes: int) -> str:
    lines = [f"{f'median r over {n_genes} genes':34}" + "".join(f"{8 * b:>7} um" for b in BINS)]
    for name, values in summary.items():
        cells = ("unknown" if r is None else f"{r:.3f}" for r in values.values())
        lines.append(f"{METHODS[name]:34}" + "".join(f"{cell:>10}" for cell in cells))
    return "\n".join(lines)


def score_directory(directory: Path) -> None:
    truth = read_truth(directory)
    found = read_maps(directory, truth.genes, truth.tissue.shape)
    if not found:
        raise utils.StageError(
            f"{directory / utils.MAPS.name} holds no map of a gene of truth.npz.",
            "Put the genes of truth.npz into gene-names.txt and run the five scripts again.",
        )
    truth = select_genes(truth, list(found))
    centres, counts = read_spots(directory, truth.genes)
    nearest, linear = interpolate_spots(centres, counts, truth.tissue.shape)
    maps = np.stack(list(found.values()), axis=2)
    blank = np.isnan(maps[truth.tissue]).all(1).mean()
    table = score(truth, {"histex": maps, "linear": linear, "nearest": nearest})
    summary = medians(table)
    with utils.atomic(directory / "score.csv") as partial:
        table.round(4).to_csv(partial)
    with utils.atomic(directory / "score.json") as partial:
        facts = {"genes": len(found), "tissue without map": round(float(blank), 4)}
        partial.write_text(json.dumps({**facts, "median r": summary}, indent=1) + "\n")
    print(report(summary, len(found)))
    print(f"{blank:.1%} of the tissue lies outside the mask and counts as zero")


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--directory", type=utils.sample_directory, required=True, help="Sample folder."
    )
    args = parser.parse_args(argv)
    try:
        score_directory(args.directory)
    except utils.StageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
