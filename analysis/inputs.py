"""Read what analysis/evaluate.py scores: the truth, the maps and the spots of a sample."""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import utils
from reading import genes, images, pickles, plain, tables

SCRIPT = "analysis/evaluate.py"
TRUTH, PUBLISHED_TRUTH = "truth.npz", "genes_3D.pkl"


@dataclass
class Truth:
    """Counts of molecules (rows, columns, genes) and, if known, their expectation."""

    counts: np.ndarray  # whole numbers, or float32
    tissue: np.ndarray  # (rows, columns) bool
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
                counts=as_counts(saved["counts"]),
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


def as_counts(array: np.ndarray) -> np.ndarray:
    """Whole numbers as they are, for they are many; else float32, since float16 sums overflow."""
    return array if array.dtype.kind in "ui" else array.astype(np.float32)


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
    for name, values in (("counts", truth.counts), ("mean", truth.mean)):
        if values is not None and not (np.isfinite(values).all() and values.min(initial=0) >= 0):
            raise utils.StageError(
                f"{path}: {name} hold negative values, or values that are not finite.",
                "The truth must be counts of molecules: make the file anew.",
            )
    if not truth.tissue.any():
        raise utils.StageError(
            f"{path}: there is no tissue to score.", "Mark the tissue as true, or nonzero."
        )


def read_published_truth(directory: Path) -> Truth:
    """genes_3D.pkl: one pickled array whose first or last axis is the genes of gene-names.txt."""
    path = directory / PUBLISHED_TRUTH
    counts, genes = pickles.read_pickle(path), read_gene_names(directory)
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
    truth = Truth(as_counts(counts), read_mask(directory, counts.shape[:2]), genes)
    check_truth(path, truth)
    return truth


def read_gene_names(directory: Path) -> list[str]:
    stage = open_sample(directory)
    path = stage.find(utils.GENE_NAMES)
    if path is None:
        raise stage.error(directory / utils.GENE_NAMES.name, "is missing.")
    return genes.read_gene_names(stage, path)


def read_mask(directory: Path, shape: tuple[int, int]) -> np.ndarray:
    """Tissue (rows, columns) bool of mask.png, as HISTEX.py reads it, cut to ``shape``."""
    stage = open_sample(directory)
    path = directory / utils.MASK.name
    if not path.is_file():
        raise stage.error(path, "is missing.")
    tissue = images.read_mask(stage, images.grid_shape(stage))
    if any(have < want for have, want in zip(tissue.shape, shape, strict=True)):
        raise stage.error(path, f"is {tissue.shape}, smaller than the truth {shape}.")
    return tissue[: shape[0], : shape[1]]


def select_genes(truth: Truth, genes: list[str]) -> Truth:
    position = {gene: i for i, gene in enumerate(truth.genes)}
    keep = [position[gene] for gene in genes]
    return replace(
        truth,
        counts=truth.counts[:, :, keep],
        genes=genes,
        mean=None if truth.mean is None else truth.mean[:, :, keep],
        kinds=None if truth.kinds is None else [truth.kinds[i] for i in keep],
    )


def map_files(directory: Path, artifact: utils.Artifact = utils.MAPS) -> dict[str, Path]:
    """Gene -> file, by index.csv of cnts-super/ or cnts-super-sd/."""
    folder = directory / artifact.name
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
    files = map_files(directory)
    return {gene: read_map(files[gene], shape) for gene in genes if gene in files}


def read_map(path: Path, shape: tuple[int, int] | None = None) -> np.ndarray:
    """Map (rows, columns), cut to ``shape``."""
    again = f"Run the five scripts again, {utils.CALIBRATION} first."
    try:
        if path.suffix == ".npy":
            image = np.load(path, allow_pickle=False)
        else:
            image = pickles.read_pickle(path)
    except (OSError, EOFError, ValueError) as error:
        raise utils.StageError(f"{path} is not a whole map: {error}", again) from error
    if not isinstance(image, np.ndarray) or image.ndim != 2:
        raise utils.StageError(f"{path} is not a map of rows and columns.", again)
    if image.dtype == np.float16:
        image = image.astype(np.float32)  # sums of many would not fit
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
    locs = tables.read_locs(stage, stage.path(utils.LOCS))
    counts, measured = tables.read_sparse_counts(stage, stage.path(utils.CNTS), locs.index)
    if unknown := pd.Index(genes).difference(measured, sort=False).tolist():
        raise stage.error(
            stage.path(utils.CNTS),
            f"lacks {len(unknown)} of the {len(genes)} genes to score: {', '.join(unknown[:5])}.",
        )
    columns = pd.Index(measured).get_indexer(pd.Index(genes))
    return locs, pd.DataFrame(counts[:, columns].toarray(), locs.index, genes)


def read_radius(directory: Path) -> float:
    """Radius of a spot in superpixels."""
    stage = open_sample(directory)
    path = directory / utils.RADIUS.name
    if not path.is_file():
        raise stage.error(path, "is missing.")
    longest = utils.MAX_RADIUS_SUPERPIXELS * utils.TOKEN_PX
    number = plain.read_number(stage, path, utils.TOKEN_PX, longest, "px of he.jpg")
    return number / utils.TOKEN_PX
