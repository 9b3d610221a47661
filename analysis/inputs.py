"""Read what the scripts of analysis/ go on with: maps, spots, truth and labels of a sample.

What reads a folder writes nothing into it: it may be write-protected.
"""

from __future__ import annotations

import argparse
import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

import utils
from analysis import sheets
from reading import arrays, images, pickles, plain, tables
from reading import genes as gene_lists
from writing import disk

SCRIPT = "analysis/evaluate.py"
TRUTH, PUBLISHED_TRUTH = "truth.npz", "genes_3D.pkl"
INDEX, MAP_SUFFIXES = "index.csv", (".pickle", ".npy")  # in the folders of maps
MOST_COUNTS = 1e15  # of a superpixel: their squares fit into float32
LONGEST_SIDE = 10**7  # of an image, px
LARGEST = 1e15  # of a latent map, likewise
LARGEST_R = 1 + 1e-9
FARTHEST_UM = 1000.0  # that an image lies beside its spots
NUMBER_COLUMNS = ("region", "label")  # of the tables beside labels


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
    """What the checked readers ask for; nothing is recorded."""
    args = argparse.Namespace(directory=directory, allow_stale=False)
    return utils.Stage(SCRIPT, args, reads_only=True)


def anew(stage: utils.Stage, script: str) -> str:
    """The remedy for an output that is damaged: without --force, what was edited would be kept."""
    return (
        f"Run: {stage.command(script)} --force\n"
        f"This replaces what {script} wrote, and edits of it; to keep a file, move it away first."
    )


def new_record(stage: utils.Stage, script: str) -> str:
    """The remedy for a record with odd facts, by which the script would find itself up to date."""
    return f"Move it away, then run: {stage.command(script)} --force"


def path_of(stage: utils.Stage, artifact: utils.Artifact) -> Path:
    """Where a file is that must be there, whoever made it and when."""
    path = stage.find(artifact)
    if path is None:
        raise stage.error(stage.directory / artifact.name, "is missing.")
    return path


def note_inputs(stage: utils.Stage, *artifacts: utils.Artifact) -> None:
    """Record what is read as it is, whoever made it, and whether it is out of date or not."""
    for artifact in artifacts:
        if (path := stage.find(artifact)) is None:
            stage.inputs[artifact.name] = disk.ABSENT
            continue
        made = artifact.made_by if artifact.made_by in utils.STAGES else None
        record = (made and utils.read_record(stage, made)) or {}
        known = record.get("outputs", {}).get(path.name)
        is_known = known is not None and disk.same_as(path, known)  # then its hash is, too
        stage.inputs[path.name] = known if is_known else disk.fingerprint(path)


def note_truth(stage: utils.Stage) -> None:
    """The same for the file that ``read_truth`` reads."""
    stage.use(stage.directory / TRUTH)
    if not (stage.directory / TRUTH).is_file():
        stage.use(stage.directory / PUBLISHED_TRUTH)
        note_inputs(stage, utils.GENE_NAMES, utils.MASK)
        for key in ("raw_size", "scaled_size"):  # a mask may have the size of he-raw
            stage.fact(utils.CALIBRATION, key)


def is_size(size: object) -> bool:
    if not isinstance(size, list) or len(size) != 2:
        return False
    return all(type(n) is int and 0 < n <= LONGEST_SIDE for n in size)


def read_sizes(stage: utils.Stage, *keys: str) -> list[tuple[int, int]]:
    """Rows and columns of images, by the record of image_calibration.py.

    raw_size is that of he-raw, size that of he.jpg, scaled_size that of he.jpg without its padding.
    """
    sizes = [stage.fact(utils.CALIBRATION, key) for key in keys]
    if not all(map(is_size, sizes)):
        raise stage.error(
            stage.directory / utils.record_name(utils.CALIBRATION),
            f"does not tell the sizes of the images, {' and '.join(keys)}.",
            new_record(stage, utils.CALIBRATION),
        )
    return [(size[0], size[1]) for size in sizes if size]


def read_move(stage: utils.Stage) -> np.ndarray:
    """By how many superpixels, down and right, HISTEX.py found the image beside the spots.

    The maps lie where the spots do: what the image shows at p is in the maps at p less this. It is
    0, 0 if nothing was undone.
    """
    found = stage.fact(utils.HISTEX, "image_beside_spots")
    if found is None or (isinstance(found, dict) and found.get("undone") is False):
        return np.zeros(2)
    told = found if isinstance(found, dict) else {}
    um: list[Any] = [told.get("down_um"), told.get("right_um")]
    if not all(type(x) in (int, float) and abs(x) <= FARTHEST_UM for x in um):
        raise stage.error(
            stage.directory / utils.record_name(utils.HISTEX),
            "does not tell how far the image was moved.",
            new_record(stage, utils.HISTEX),
        )
    return np.array(um, float) / utils.SUPERPIXEL_UM


# --------------------------------------------------------------------------------------------------
# the truth
# --------------------------------------------------------------------------------------------------
def read_truth(directory: Path) -> Truth:
    path = directory / TRUTH
    if not path.is_file() and (directory / PUBLISHED_TRUTH).is_file():
        return read_published_truth(directory)
    if not path.is_file():
        place = shlex.quote(str(directory))
        raise utils.StageError(
            f"{path} is missing, and so is {PUBLISHED_TRUTH}: only a section with known truth can "
            f"be scored.",
            f"Simulate one: python demo/simulate.py --directory {place}\n"
            f"or leave out spots: python {SCRIPT} --directory {place} --holdout 5",
        )
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as saved:
            genes = [*map(str, saved["genes"].tolist())] if "genes" in saved else None
            truth = Truth(
                counts=as_counts(saved["counts"]),
                tissue=saved["tissue"].astype(bool),
                genes=genes or read_gene_names(directory),
                mean=as_numbers(saved["mean"]) if "mean" in saved else None,
                kinds=[*map(str, saved["kinds"].tolist())] if "kinds" in saved else None,
                capture=float(saved["capture"]) if "capture" in saved else 1.0,
            )
    except utils.StageError:
        raise
    except Exception as error:  # damaged bytes can raise nearly anything
        if plain.of_disk(error):
            raise
        raise utils.StageError(
            f"{path} is not a whole truth.npz ({error!r:.200}).",
            "It must hold counts (rows, columns, genes) and tissue (rows, columns).",
        ) from error
    check_truth(path, truth)
    return truth


def as_counts(array: np.ndarray) -> np.ndarray:
    """Whole numbers as they are, for they are many; else float32, since float16 sums overflow."""
    return array if array.dtype.kind in "ui" else as_numbers(array).astype(np.float32)


def as_numbers(array: np.ndarray) -> np.ndarray:
    if array.dtype.kind not in "uif":
        raise ValueError(f"{array.dtype} in place of numbers")
    return array


def check_truth(path: Path, truth: Truth) -> None:
    expected = (*truth.tissue.shape, len(truth.genes))
    if truth.tissue.ndim != 2:
        problem = f"{path}: tissue is {truth.tissue.shape}; expected (rows, columns)."
        raise utils.StageError(problem, "Make the file anew.")
    if repeated := utils.duplicates(truth.genes):
        problem = f"{path} names the genes {utils.some(repeated)} more than once."
        raise utils.StageError(problem, "Make the file anew.")
    if truth.kinds is not None and len(truth.kinds) != len(truth.genes):
        problem = f"{path} has {len(truth.kinds)} kinds for {len(truth.genes)} genes."
        raise utils.StageError(problem, "Make the file anew.")
    if not 0 < truth.capture < MOST_COUNTS:
        problem = f"{path}: capture is {truth.capture}; expected a number above 0."
        raise utils.StageError(problem, "Make the file anew.")
    for name, values in (("counts", truth.counts), ("mean", truth.mean)):
        if values is not None and values.shape != expected:
            raise utils.StageError(
                f"{path}: {name} are {values.shape}; expected {expected}, the shape of tissue and "
                f"the number of genes.",
                "Make the file anew.",
            )
        if values is not None and not ((values >= 0) & (values <= MOST_COUNTS)).all():
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
    return gene_lists.read_gene_names(stage, path_of(stage, utils.GENE_NAMES))


def read_mask(directory: Path, shape: tuple[int, int]) -> np.ndarray:
    """Tissue (rows, columns) bool of mask.png, as HISTEX.py reads it, cut to ``shape``."""
    stage = open_sample(directory)
    path = path_of(stage, utils.MASK)
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


# --------------------------------------------------------------------------------------------------
# maps and genes
# --------------------------------------------------------------------------------------------------
def map_files(directory: Path, artifact: utils.Artifact = utils.MAPS) -> dict[str, Path]:
    """Gene -> file, by index.csv of cnts-super/ or cnts-super-sd/; there is one at least."""
    stage = open_sample(directory)
    again = f"Run: {stage.command(utils.HISTEX)}"
    folder = directory / artifact.name
    path = folder / INDEX
    if not path.is_file():
        raise utils.StageError(f"{path} is missing: it tells the map of every gene.", again)

    def refuse(problem: str) -> utils.StageError:
        return utils.StageError(f"{path} {problem}", anew(stage, utils.HISTEX))

    table = sheets.read_sheet(path, ["gene", "file"], refuse)
    if table.empty:
        raise refuse(f"names no gene: {folder.name} holds no map.")
    for column in ("gene", "file"):
        if repeated := utils.duplicates(table[column]):
            raise refuse(f"names the {column} {utils.some(repeated)} more than once.")
    for line, gene, name in table[["gene", "file"]].itertuples():
        if not gene or name != Path(name).name or Path(name).suffix not in MAP_SUFFIXES:
            raise refuse(f"has {name[:80]!r} for the gene {gene!r} in line {line}, no file of it.")
    return {gene: folder / name for gene, name in zip(table["gene"], table["file"], strict=True)}


def read_maps(
    directory: Path, genes: list[str], shape: tuple[int, int] | None = None
) -> dict[str, np.ndarray]:
    """Maps (rows, columns) of the genes that have one, cut to ``shape``: the truth's grid."""
    files = map_files(directory)
    return {gene: read_map(files[gene], shape) for gene in genes if gene in files}


def read_map(path: Path, shape: tuple[int, int] | None = None) -> np.ndarray:
    """Map (rows, columns) of float32 or float64, NaN where there is none, cut to ``shape``."""
    again = anew(open_sample(path.parent.parent), utils.HISTEX)
    if not path.is_file():
        raise utils.StageError(f"{path} is missing.", again)
    try:
        if path.suffix == ".npy":  # mapped first, which compares the header with the file's size
            image = np.array(arrays.mapped(path))
        else:
            image = pickles.read_pickle(path)
    except Exception as error:  # damaged bytes can raise nearly anything
        if plain.of_disk(error):
            raise
        raise utils.StageError(f"{path} is not a whole map ({error!r:.200}).", again) from error
    numbers = isinstance(image, np.ndarray) and image.dtype.kind in "fiu" and image.size > 0
    if not numbers or image.ndim != 2:
        raise utils.StageError(f"{path} is not a map of rows and columns.", again)
    if image.dtype not in (np.float32, np.float64):  # or in the other order of bytes
        image = image.astype(np.float32 if image.dtype.itemsize <= 4 else np.float64)
    odd = np.abs(image) > MOST_COUNTS
    if odd.any():
        raise utils.StageError(f"{path} holds {image[odd][0]:g}, which is no count.", again)
    if shape is None:
        return image
    if image.shape[0] < shape[0] or image.shape[1] < shape[1]:
        again = f"Run the five scripts again, {utils.CALIBRATION} first."
        raise utils.StageError(f"{path} is {image.shape}, smaller than the truth {shape}.", again)
    return image[: shape[0], : shape[1]]


def grid_of(stage: utils.Stage) -> tuple[int, int]:
    """Rows and columns of superpixels of he.jpg, by its record."""
    ((rows, columns),) = read_sizes(stage, "size")
    return rows // utils.TOKEN_PX, columns // utils.TOKEN_PX


def read_first_map(
    stage: utils.Stage, files: dict[str, Path]
) -> tuple[np.ndarray, tuple[int, int]]:
    """The first of the maps, and its shape (rows, columns): the grid of he.jpg."""
    shape, path = grid_of(stage), next(iter(files.values()))
    image = read_map(path)
    if image.shape != shape or not np.isfinite(image).any():
        raise stage.error(
            stage.path(utils.MAPS),
            f"holds {path.name} {image.shape} with {np.isfinite(image).sum()} values; expected "
            f"{shape}, the grid of {utils.HE.name}.",
        )
    return image, shape


def read_embedding(stage: utils.Stage) -> np.ndarray:
    """Latent maps float32 (dims, rows, columns) on the grid of he.jpg, NaN outside the tissue."""
    path, shape = stage.path(utils.EMBEDDINGS), grid_of(stage)
    content = pickles.read_pickle(path)
    found = content.get("cls") if isinstance(content, dict) else None
    if (
        not isinstance(found, np.ndarray) or found.ndim != 3 or found.dtype.kind != "f"
        or found.size == 0
    ):  # fmt: skip
        raise stage.error(path, f"does not hold {utils.EMBEDDINGS.what}.")
    if found.shape[1:] != shape:
        raise stage.error(
            path, f"holds maps of {found.shape[1:]}; expected {shape}, the grid of {utils.HE.name}."
        )
    known = np.isfinite(found[0])
    for image in found:
        if (np.isfinite(image) != known).any() or np.abs(image[known]).max(initial=0) > LARGEST:
            raise stage.error(
                path,
                "holds values that are not finite beside finite ones, or too large.",
                anew(stage, utils.HISTEX),
            )
    return found.astype(np.float32, copy=False)


def scores_of(stage: utils.Stage) -> utils.Artifact:
    """The table that tells how good each map is: of maps from histology alone, what to expect."""
    alone = stage.find(utils.HELD_OUT) is None and stage.find(utils.EXPECTED) is not None
    return utils.EXPECTED if alone else utils.HELD_OUT


def read_held_out(stage: utils.Stage) -> pd.Series | None:
    """Correlation with held-out spots by gene, if it is known; its name says what it is.

    Of maps from histology alone, the correlation to expect at 32 um.
    """
    artifact = scores_of(stage)
    column, name = ("held_out_r", "held-out r")
    if artifact is utils.EXPECTED:
        column, name = ("expected_r_32um", "expected r")
    path = stage.find(artifact)
    note_inputs(stage, artifact)
    if path is None:
        return None

    def refuse(problem: str) -> utils.StageError:
        return stage.error(path, f"is no table of gene and {column}: it {problem}")

    table = sheets.read_sheet(path, ["gene", column], refuse)
    if repeated := utils.duplicates(table["gene"]):
        raise refuse(f"names {utils.some(repeated)} more than once.")
    r = sheets.numbers_in(table, column, refuse, LARGEST_R)
    return r.set_axis(pd.Index(table["gene"])).rename(name)


def choose_genes(
    mapped: list[str], held_out: pd.Series | None, given: str | Path | None, n_genes: int
) -> list[str]:
    """Those ``given`` by --genes, or the ``n_genes`` with the highest held-out r, if known."""
    if not mapped:
        raise utils.StageError(f"{utils.MAPS.name} holds no map.", f"Run {utils.HISTEX} again.")
    if given is not None:
        return gene_lists.read_genes(given, mapped, utils.MAPS.name)
    if held_out is not None:
        mapped = sorted(mapped, key=lambda gene: -np.nan_to_num(held_out.get(gene, -2.0), nan=-2.0))
    return mapped[:n_genes]


# --------------------------------------------------------------------------------------------------
# spots and labels
# --------------------------------------------------------------------------------------------------
def read_spots(directory: Path, genes: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Spot centres (N, 2) as row, column in superpixels of he.jpg, and counts (N, genes)."""
    locs, counts = read_tables(open_sample(directory), genes)
    return locs[["y", "x"]].to_numpy() / utils.TOKEN_PX, counts.to_numpy()


def read_tables(stage: utils.Stage, genes: list[str]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """x and y of locs.csv, pixels of he.jpg, and the counts (float32) of ``genes``, by spot id."""
    locs, path = tables.read_locs(stage, path_of(stage, utils.LOCS)), path_of(stage, utils.CNTS)
    counts, measured = tables.read_sparse_counts(stage, path, locs.index)
    columns = pd.Index(measured).get_indexer(pd.Index(genes))
    if unknown := [gene for gene, i in zip(genes, columns, strict=True) if i < 0]:
        n, names = len(unknown), utils.some(unknown)
        raise stage.error(path, f"lacks {n} of the {len(genes)} genes of the maps: {names}.")
    return locs, pd.DataFrame(counts[:, columns].toarray(), locs.index, genes, copy=False)


def read_radius(directory: Path) -> float:
    """Radius of a spot in superpixels."""
    stage = open_sample(directory)
    path, longest = path_of(stage, utils.RADIUS), utils.MAX_RADIUS_SUPERPIXELS * utils.TOKEN_PX
    return plain.read_number(stage, path, utils.TOKEN_PX, longest, "px of he.jpg") / utils.TOKEN_PX


def load_labels(path: Path, shape: tuple[int, int], most: int) -> np.ndarray:
    """Labels ``shape`` of an .npy, whole numbers from 0 (none) to ``most``.

    A ValueError says what is wrong with it; what follows from that is up to the caller.
    """
    try:
        labels = np.array(arrays.mapped(path))
    except Exception as error:  # damaged bytes can raise nearly anything
        if plain.of_system(error):
            raise
        raise ValueError(f"is not a whole .npy array: {error!r:.200}") from error
    whole = labels.dtype.kind in "iu" and labels.size > 0
    if labels.shape != shape or not whole or labels.min() < 0 or labels.max() > most:
        numbers = f", {labels.min()} to {labels.max()}" if whole else ""
        raise ValueError(
            f"is {labels.dtype} {labels.shape}{numbers}; expected whole numbers from 0 to {most}, "
            f"{shape}"
        )
    return labels


def read_label_texts(
    stage: utils.Stage, artifact: utils.Artifact, column: str, n: int, needed: bool = False
) -> list[str] | None:
    """A column of the table beside labels, which has a row for each of at least n, in their order.

    Else None: with a warning if the table is of other labels, or lacks a column that is needed.
    """
    path = stage.directory / artifact.name
    if not path.is_file():
        return None
    try:
        table = sheets.read_sheet(path, [], lambda problem: utils.StageError(problem, ""))
    except utils.StageError as error:
        stage.warn(f"{path.name} is left out: it {str(error).strip()}")
        return None
    numbers = [str(i) for i in range(1, len(table) + 1)]
    ordered = all(table[c].tolist() == numbers for c in NUMBER_COLUMNS if c in table)
    if needed and column not in table:
        stage.warn(f"{path.name} is left out: it has no column {column}")
    elif len(table) < n or not ordered:
        stage.warn(f"{path.name} is left out: it does not list the labels 1 to {n}")
    elif column in table:
        return table[column].tolist()
    return None
