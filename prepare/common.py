"""What the prepare scripts share: 10x matrices, spot lattices, grids, and the sample they write.

A prepare script reads one vendor's files and fills a ``Section``; ``write_sample`` checks it and
writes the user's files of a sample directory: he-raw.*, pixel-size-raw.txt, locs-raw.csv,
cnts.csv.gz, radius-raw.txt; gene-names.txt if genes were listed; truth.npz if there is truth;
check.png to look at; and prepare.json, the record, last.

Frames and units. Arrays are (row, col); x (column) and y (row) are coordinates in continuous pixels
from the left upper edge of the first pixel. ``locs`` refers to the image that is written.
Letters in shapes: N spots, G genes, h x w superpixels of he.jpg.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import errno
import gzip
import io
import json
import shutil
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image, ImageDraw, ImageFont
from scipy import sparse
from scipy.io import mmread
from scipy.spatial import cKDTree

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import utils
from image_calibration import calibrated_shape, padded_shape

RECORD = "prepare.json"
TRUTH, CHECK = "truth.npz", "check.png"
COPIED = (".jpg", ".jpeg", ".png")  # image_calibration.py reads them as they are
KEPT_TYPE = "Gene Expression"  # of 10x feature types; the others are controls and antibodies

VISIUM_PITCH_UM, VISIUM_RADIUS_UM = 100.0, 27.5  # centre to centre; printed spots of 55 um
LEGACY_PITCH_UM, LEGACY_RADIUS_UM = 200.0, 50.0
MIN_INSIDE = 0.95  # share of the in-tissue spots that must fall on the image
MAX_PITCH_ERROR = 0.05  # relative, between the measured and the expected pitch
MAX_PIXEL_SIZE_ERROR = 0.05  # relative, between the metadata of an image and the spots
STRIP_PX = 512  # side of a tile of he-raw.tif; so many rows are in memory while it is written
CHUNK = 2_000_000  # molecules accumulated at a time
THUMBNAIL_PX = 1200  # longer side of check.png
TISSUE_COLOUR, OTHER_COLOUR, OUTSIDE_COLOUR = (0, 110, 60), (150, 150, 150), (220, 30, 30)


# -------------------------------------------------------------------------------------------------
# what a prepare script fills in
# -------------------------------------------------------------------------------------------------
@dataclass
class Region:
    """A rectangle of a slide; x, y and sides in px of its full resolution.

    ``slide`` is what slides.open_slide gives: ``read_region(x, y, width, height, downsample)``
    takes px of full resolution and returns uint8 (height // downsample, width // downsample, 3).
    """

    slide: Any
    x: int
    y: int
    width: int
    height: int
    downsample: int = 1

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the image that is written."""
        return self.height // self.downsample, self.width // self.downsample

    def read(self, top: int, bottom: int, shrink: int = 1) -> np.ndarray:
        """Rows top to bottom of the image written, shrunk by a further whole factor."""
        step = self.downsample
        height, width = ((side // shrink) * shrink for side in (bottom - top, self.shape[1]))
        return self.slide.read_region(
            self.x, self.y + top * step, width * step, height * step, step * shrink
        )


@dataclass
class Truth:
    """Counts per superpixel of he.jpg: sparse (h * w, G) or an array (h, w, G)."""

    counts: sparse.csr_array | np.ndarray
    tissue: np.ndarray  # bool (h, w)
    genes: list[str]


@dataclass
class Section:
    """One section, ready to be checked and written.

    ``image`` is a file, an array (rows, columns, 3), or a Region. ``counts`` is a table with spot
    ids as index and genes as columns, or sparse (N, G) whose rows are ``spots`` (by default the
    spots of ``locs``, in their order) and whose columns are ``genes``. Rows are joined to ``locs``
    by id; spots without a location are left out.
    """

    image: Path | np.ndarray | Region
    pixel_size_um: float  # of the image written
    locs: pd.DataFrame  # index: spot id; x, y in px of the image written; in-tissue spots
    counts: sparse.csr_array | pd.DataFrame
    genes: list[str]
    radius_px: float
    pitch_um: float  # expected: 100 for Visium, 200 for legacy ST
    truth: Truth | None = None
    notes: list[str] = field(default_factory=list)
    spots: list[str] | None = None
    off_tissue: pd.DataFrame | None = None  # x, y of spots without tissue, to be drawn only
    array: pd.DataFrame | None = None  # x, y of all positions, to measure the pitch; default: locs
    gene_names: list[str] | None = None  # for gene-names.txt
    sources: list[Path] = field(default_factory=list)  # files read, for the record
    scales: dict[str, float] = field(default_factory=dict)  # of smaller copies of the image
    facts: dict[str, Any] = field(default_factory=dict)  # numbers for the record

    def __post_init__(self) -> None:
        self.locs.index = self.locs.index.astype(str)
        if isinstance(self.counts, pd.DataFrame):
            self.spots = [str(spot) for spot in self.counts.index]
            self.counts = self.counts[self.genes].to_numpy()
        matrix = sparse.csr_array(self.counts)
        rows = pd.Index(self.locs.index if self.spots is None else self.spots)
        for name, values in (
            ("spots", rows),
            ("locations", self.locs.index),
            ("genes", self.genes),
        ):
            if repeated := utils._repeated(values):
                raise utils.StageError(
                    f"The {name} {utils._some(repeated)} occur more than once.",
                    "Mend the source files: ids must be unique.",
                )
        order = rows.get_indexer(self.locs.index)
        if (order < 0).any():
            raise utils.StageError(
                f"{(order < 0).sum()} of {len(order)} spots that have a location have no counts: "
                f"{utils._some(self.locs.index[order < 0])}; the counts are of "
                f"{utils._some(rows)}.",
                "Give the counts and the positions of one and the same section.",
            )
        if len(rows) > len(order):
            self.notes.append(f"{len(rows) - len(order)} spots without a location are left out")
        self.counts, self.spots = matrix[order], list(self.locs.index)
        values = self.counts.data
        if not len(values) or not np.isfinite(values).all() or (values < 0).any():
            raise utils.StageError(
                "The counts of the spots are all zero, negative or not numbers; expected raw "
                "counts.",
                "Give the raw counts.",
            )

    @property
    def xy(self) -> np.ndarray:
        return self.locs[["x", "y"]].to_numpy(float)


# -------------------------------------------------------------------------------------------------
# images
# -------------------------------------------------------------------------------------------------
def open_image(path: Path) -> Any:
    """The slide or image at a path, opened but not loaded: see slides.open_slide.

    ``size`` (width, height), ``pixel_size_um`` (None if unknown), ``downsamples``,
    ``read_region(x, y, width, height, downsample)``, ``thumbnail(max_side)``.
    """
    if not path.is_file():
        raise utils.StageError(
            f"{path} is missing or no file; expected the H&E image at full resolution.",
            "Give it by --image FILE.",
        )
    from prepare import slides

    return slides.open_slide(path)


def image_shape(image: Path | np.ndarray | Region) -> tuple[int, int]:
    """Rows and columns of the image that is written."""
    if isinstance(image, Path):
        return image_size(image)[::-1]
    return image.shape[:2]


def image_size(path: Path) -> tuple[int, int]:
    """Width and height of a slide or image at full resolution."""
    with open_image(path) as slide:
        return slide.size


def place_image(
    path: Path,
    locs: pd.DataFrame,
    pixel_size_um: float,
    margin_um: float | None = None,
    downsample: int | None = None,
) -> tuple[Path | Region, pd.DataFrame, float]:
    """(image, locs, pixel size) as they are written: the whole file, or a part of a slide.

    With ``margin_um`` the image is cut to the spots and a margin. ``downsample`` is a whole factor,
    by default the one that brings the image near to 0.5 um per px. JPEG and PNG files that are
    taken whole are copied as they are.
    """
    from prepare import slides

    if margin_um is None and downsample in (None, 1) and path.suffix.lower() in COPIED:
        return path, locs, pixel_size_um
    slide = open_image(path)  # stays open: write_sample reads it
    width, height = slide.size
    left = top = 0
    downsample = downsample or slides.whole_factor(pixel_size_um)
    if margin_um is not None:
        margin = margin_um / pixel_size_um
        xy = locs[["x", "y"]].to_numpy()
        left, top = np.clip(np.floor(xy.min(0) - margin), 0, (width - 1, height - 1)).astype(int)
        right, bottom = np.clip(np.ceil(xy.max(0) + margin), (left, top), (width, height))
        width, height = int(right - left), int(bottom - top)
    width, height = (side // downsample * downsample for side in (width, height))
    region = Region(slide, int(left), int(top), width, height, downsample)
    return region, move(locs, region), pixel_size_um * downsample


def move(locs: pd.DataFrame, image: Path | Region) -> pd.DataFrame:
    """x, y in px of the image written, from x, y in px of the whole file."""
    if isinstance(image, Path):
        return locs
    return locs.assign(
        x=(locs.x - image.x) / image.downsample, y=(locs.y - image.y) / image.downsample
    )


def metadata_note(path: Path, pixel_size_um: float) -> list[str]:
    """A note if the pixel size in the image's metadata is not that of the spots."""
    with open_image(path) as slide:
        said = slide.pixel_size_um
    if said is None or abs(said / pixel_size_um - 1) <= MAX_PIXEL_SIZE_ERROR:
        return []
    return [
        f"{path.name} says {said:.4g} um per pixel, the spots say {pixel_size_um:.4g}: a factor of "
        f"{pixel_size_um / said:.3g}. The spots are believed"
    ]


def add_image_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--crop-um",
        type=float,
        metavar="MARGIN",
        help="Cut the image to the spots and a margin of so many um; default: the whole image.",
    )
    parser.add_argument(
        "--downsample",
        type=utils.positive,
        help="Shrink the image by this whole factor; default: JPEG and PNG are copied as they are, "
        "slides and TIFF shrunk to about 0.5 um per px.",
    )


def write_image(image: Path | np.ndarray | Region, partial: Path) -> None:
    """he-raw: a copy of the file, or a lossless TIFF, written a row of tiles at a time."""
    if isinstance(image, Path):
        shutil.copyfile(image, partial)
        return
    import tifffile

    shape = image_shape(image)
    with tifffile.TiffWriter(partial, bigtiff=3 * shape[0] * shape[1] > 2**31) as tiff:
        tiff.write(
            tiles(image), shape=(*shape, 3), dtype=np.uint8, photometric="rgb",
            tile=(STRIP_PX, STRIP_PX), compression="zlib", metadata=None,
        )  # fmt: skip


def tiles(image: np.ndarray | Region) -> Iterator[np.ndarray]:
    """Tiles of STRIP_PX square, row by row, those at the edges filled up with white."""
    rows, columns = image_shape(image)
    for top in range(0, rows, STRIP_PX):
        bottom = min(top + STRIP_PX, rows)
        strip = image.read(top, bottom) if isinstance(image, Region) else image[top:bottom]
        for left in range(0, columns, STRIP_PX):
            tile = np.full((STRIP_PX, STRIP_PX, 3), 255, np.uint8)
            part = strip[:, left : left + STRIP_PX]
            tile[: part.shape[0], : part.shape[1]] = part
            yield tile


def thumbnail(image: Path | np.ndarray | Region) -> np.ndarray:
    """The image written, its longer side at most THUMBNAIL_PX: uint8 (rows, columns, 3)."""
    if isinstance(image, Path):
        with open_image(image) as slide:
            small = slide.thumbnail(THUMBNAIL_PX)
    elif isinstance(image, Region):
        shrink = max(1, max(image.shape) // THUMBNAIL_PX)
        small = image.read(0, image.shape[0], shrink)
    else:
        step = max(1, max(image.shape) // THUMBNAIL_PX)
        small = image[::step, ::step]
    picture = Image.fromarray(np.ascontiguousarray(small)).convert("RGB")
    picture.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
    return np.asarray(picture)


# -------------------------------------------------------------------------------------------------
# 10x matrices
# -------------------------------------------------------------------------------------------------
def broken(path: Path, problem: str) -> utils.StageError:
    return utils.StageError(
        f"{path} {problem}", "Copy or download it again, then run the same command."
    )


def read_10x_h5(path: Path) -> tuple[sparse.csr_array, list[str], pd.DataFrame]:
    """Counts (barcodes, genes), barcodes, and features (id, name, type) of a 10x .h5 matrix.

    Space Ranger 1 to 4, Xenium, and Cell Ranger 2 (a group per genome). Features other than genes
    are dropped; ``features.attrs["dropped"]`` counts them: type -> (features, molecules).
    """
    with open_h5(path) as group:
        shape = tuple(int(n) for n in group["shape"][:])
        parts = (group[key][:] for key in ("data", "indices", "indptr"))
        data, indices, indptr = (np.asarray(part) for part in parts)
        check_columns(path, data, indices, indptr, shape)
        counts = sparse.csr_array((data, indices, indptr), shape=shape[::-1])
        barcodes = decode(group["barcodes"][:])
        features = read_h5_features(group)
    return keep_genes(counts, barcodes, features, path)


@contextlib.contextmanager
def open_h5(path: Path) -> Iterator[Any]:
    """The group of a 10x .h5 file that holds the matrix."""
    import h5py

    if not path.is_file():
        raise utils.StageError(f"{path} is missing.", "Give the folder that Space Ranger wrote.")
    try:
        with h5py.File(path) as file:
            groups = [g for g in file.values() if isinstance(g, h5py.Group) and "indptr" in g]
            if len(groups) != 1:
                raise broken(path, f"holds {len(groups)} 10x matrices; expected one.")
            yield groups[0]
    except (OSError, KeyError, RuntimeError) as error:
        raise broken(path, f"is no whole 10x matrix in HDF5: {error}") from error


def read_h5_features(group: Any) -> pd.DataFrame:
    if "features" in group:
        names = {"id": "id", "name": "name", "type": "feature_type"}
        return pd.DataFrame({key: decode(group["features"][n][:]) for key, n in names.items()})
    table = pd.DataFrame({"id": decode(group["genes"][:]), "name": decode(group["gene_names"][:])})
    return table.assign(type=KEPT_TYPE)


def decode(values: np.ndarray) -> list[str]:
    return [v.decode("utf-8") if isinstance(v, bytes) else str(v) for v in values.tolist()]


def check_columns(
    path: Path, data: np.ndarray, indices: np.ndarray, indptr: np.ndarray, shape: tuple[int, ...]
) -> None:
    """Check a compressed matrix of (features, barcodes) before anything trusts its indices."""
    whole = (
        len(indptr) == shape[1] + 1
        and indptr[0] == 0
        and (np.diff(indptr) >= 0).all()
        and indptr[-1] == len(data) == len(indices)
        and (len(indices) == 0 or (indices.min() >= 0 and indices.max() < shape[0]))
    )
    if not whole:
        raise broken(path, f"is damaged: its indices do not fit a matrix of {shape}.")


def read_10x_mtx(folder: Path) -> tuple[sparse.csr_array, list[str], pd.DataFrame]:
    """The same from a folder of matrix.mtx, barcodes.tsv and features.tsv (or genes.tsv), .gz or
    not."""
    matrix = find_one(folder, "matrix.mtx")
    barcodes_path = find_one(folder, "barcodes.tsv")
    features_path = find_one(folder, "features.tsv", "genes.tsv")
    try:
        counts = sparse.csr_array(mmread(matrix).T)
        barcodes = read_tsv(barcodes_path)[0].tolist()
        table = read_tsv(features_path)
    except (ValueError, OSError, EOFError, StopIteration) as error:
        raise broken(folder, f"is no whole 10x matrix: {error}") from error
    if table.shape[1] == 1:
        raise broken(features_path, "has one column only; expected gene id, symbol and type.")
    types = table[2] if table.shape[1] > 2 else KEPT_TYPE
    features = pd.DataFrame({"id": table[0], "name": table[1]}).assign(type=types)
    return keep_genes(counts, barcodes, features, matrix)


def find_one(folder: Path, *names: str) -> Path:
    """The file of one of these names, plain or gzipped."""
    for name in names:
        for path in (folder / f"{name}.gz", folder / name):
            if path.is_file():
                return path
    raise utils.StageError(
        f"{folder} has no {' or '.join(names)} (plain or .gz).",
        "Give the folder as Space Ranger wrote it.",
    )


def read_tsv(path: Path) -> pd.DataFrame:
    return pd.read_csv(
        path, sep="\t", header=None, dtype=str, keep_default_na=False, quoting=csv.QUOTE_NONE
    )


def keep_genes(
    counts: sparse.csr_array, barcodes: list[str], features: pd.DataFrame, path: Path
) -> tuple[sparse.csr_array, list[str], pd.DataFrame]:
    """Leave out controls and antibodies, and count them in ``features.attrs["dropped"]``."""
    if counts.shape != (len(barcodes), len(features)):
        raise broken(
            path,
            f"has {counts.shape[0]} columns and {counts.shape[1]} rows for {len(barcodes)} "
            f"barcodes and {len(features)} features.",
        )
    keep = (features["type"] == KEPT_TYPE).to_numpy()
    if not keep.any():
        raise broken(path, f"has no {KEPT_TYPE} but {utils._some(features['type'].unique())}.")
    molecules = np.asarray(counts.sum(axis=0)).ravel()
    dropped = {
        kind: (
            (features["type"] == kind).sum().item(),
            float(molecules[features["type"] == kind].sum()),
        )
        for kind in features["type"][~keep].unique()
    }
    kept = features[keep].reset_index(drop=True)
    kept.attrs["dropped"] = dropped
    return counts[:, np.flatnonzero(keep)], barcodes, kept


def dropped_notes(features: pd.DataFrame) -> list[str]:
    return [
        f"{n} features of type {kind} with {molecules:,.0f} molecules are left out"
        for kind, (n, molecules) in features.attrs.get("dropped", {}).items()
    ]


def unique_symbols(symbols: list[str], ids: list[str]) -> list[str]:
    """Gene symbols made unique, in their order: no counts are merged.

    The first gene of a symbol keeps it; every later one becomes ``SYMBOL.ID`` with its own gene id
    (TBCE, then TBCE.ENSG00000285053). A gene without a symbol is called by its id.
    """
    names: list[str] = []
    taken: set[str] = set()
    for symbol, gene in zip(symbols, ids, strict=True):
        name = symbol.strip() or gene
        if name in taken:
            name = f"{name}.{gene}"
        names.append(name)
        taken.add(name)
    if repeated := utils._repeated(names):
        raise utils.StageError(
            f"The gene ids {utils._some(repeated)} occur more than once.",
            "Mend the features of the matrix: gene ids must be unique.",
        )
    return names


def read_gene_list(path: Path | None, genes: list[str]) -> list[str] | None:
    """The genes of --genes FILE, one a line, all of them among ``genes``; None without a file."""
    if path is None:
        return None
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise utils.StageError(f"{path} cannot be read: {error}", "Give a text file.") from error
    names = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
    unknown = [name for name in names if name not in set(genes)]
    if unknown or not names:
        found = (
            f"names {utils._some(unknown)}, which the counts do not have" if names else "is empty"
        )
        raise utils.StageError(
            f"{path} {found}; their genes are like {utils._some(genes)}.",
            "Mend the list, one gene a line, then run the same command.",
        )
    return names


# -------------------------------------------------------------------------------------------------
# lattices, discs, grids
# -------------------------------------------------------------------------------------------------
def fit_affine(lattice_um: np.ndarray, xy: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Least squares: xy = origin + lattice_um @ axes. Returns origin (2,) and axes (2, 2).

    ``axes`` holds px per um: row 0 is the step along the first lattice axis.
    """
    design = np.column_stack([np.ones(len(xy)), lattice_um])
    solution, _, rank, _ = np.linalg.lstsq(design, xy, rcond=None)
    if rank < 3:
        raise utils.StageError(
            f"The {len(xy)} positions lie on one line, so no lattice can be fitted to them.",
            "Give the positions of the whole array.",
        )
    return solution[0], solution[1:]


def pixel_size_of(axes: np.ndarray) -> float:
    """um per px of a fitted lattice, by area: any rotation and flip gives the same."""
    return float(1 / np.sqrt(abs(np.linalg.det(axes))))


def hexagonal_lattice(box: tuple[float, float, float, float], pitch: float) -> np.ndarray:
    """Centres (N, 2), x and y, of Visium's lattice within (left, top, right, bottom), inclusive.

    Rows are pitch * sqrt(3) / 2 apart and every other row is shifted by half a pitch; the first
    spot lies at (left, top).
    """
    left, top, right, bottom = box
    rows = np.arange(0, np.floor((bottom - top) / (pitch * np.sqrt(3) / 2) + 1e-9) + 1)
    points = []
    for row in rows:
        x = np.arange(left + (row % 2) * pitch / 2, right + 1e-9 * pitch, pitch)
        points.append(np.column_stack([x, np.full(len(x), top + row * pitch * np.sqrt(3) / 2)]))
    return np.concatenate(points) if points else np.empty((0, 2))


def disc_of(xy: np.ndarray, centres: np.ndarray, radius: float) -> np.ndarray:
    """Index (M,) of the disc in which a point (M, 2) lies, edge included; -1 for none.

    Discs do not overlap on Visium's lattice, so that every point has one disc at most.
    """
    distance, index = cKDTree(centres).query(xy, k=1, distance_upper_bound=radius * (1 + 1e-12))
    return np.where(np.isfinite(distance), index, -1)


def pseudo_spots(
    xy: np.ndarray,
    gene: np.ndarray,
    centres: np.ndarray,
    radius: float,
    n_genes: int,
    weight: np.ndarray | None = None,
) -> sparse.csr_array:
    """Counts (discs, genes) of molecules at ``xy`` (M, 2) with gene index ``gene`` (M,)."""
    disc = disc_of(xy, centres, radius)
    caught = disc >= 0
    weight = np.ones(len(gene)) if weight is None else weight
    entries = (weight[caught], (disc[caught], gene[caught]))
    return sparse.csr_array(sparse.coo_array(entries, shape=(len(centres), n_genes)))


def sum_rows(target: np.ndarray, matrix: sparse.csr_array, n: int) -> sparse.csr_array:
    """Rows of a matrix (M, G) added up into (n, G) by their target (M,); -1 goes nowhere."""
    used = np.flatnonzero(target >= 0)
    entries = (np.ones(len(used)), (target[used], used))
    return sparse.csr_array(entries, shape=(n, matrix.shape[0])) @ matrix


def superpixel_grid(
    raw_shape: tuple[int, int], pixel_size_um: float
) -> tuple[tuple[int, int], np.ndarray]:
    """((h, w), factor): superpixels of he.jpg, and superpixels per px of he-raw along x and y.

    These are the sizes and the exact ratios that image_calibration.py uses.
    """
    shape = calibrated_shape(raw_shape, pixel_size_um)
    rows, columns = padded_shape(shape)
    factor = np.array([shape[1] / raw_shape[1], shape[0] / raw_shape[0]]) / utils.TOKEN_PX
    return (rows // utils.TOKEN_PX, columns // utils.TOKEN_PX), factor


def accumulate(
    row: np.ndarray,
    col: np.ndarray,
    gene: np.ndarray,
    weight: np.ndarray | None,
    shape: tuple[int, int, int],
) -> tuple[sparse.csr_array, float]:
    """Counts (h * w, G) of molecules at continuous (row, col) in superpixels, and those outside.

    A molecule belongs to superpixel floor(row), floor(col); molecules that share one add up. Each
    is in the counts exactly once, or its weight is in the sum outside.
    """
    h, w, n_genes = shape
    total, outside = sparse.csr_array((h * w, n_genes)), 0.0
    for start in range(0, len(row), CHUNK):
        part = slice(start, start + CHUNK)
        amount = np.ones(len(row[part])) if weight is None else np.asarray(weight[part], float)
        r, c = np.floor(row[part]), np.floor(col[part])
        inside = (r >= 0) & (r < h) & (c >= 0) & (c < w)  # false for NaN as well
        outside += float(amount[~inside].sum())
        cell = r[inside].astype(np.int64) * w + c[inside].astype(np.int64)
        entries = (amount[inside], (cell, np.asarray(gene[part])[inside]))
        total = total + sparse.csr_array(sparse.coo_array(entries, shape=total.shape))
    return total, outside


# -------------------------------------------------------------------------------------------------
# the check that people look at
# -------------------------------------------------------------------------------------------------
@dataclass
class Report:
    """What ``check`` measured, for the record and for check.png."""

    spots: int
    spots_on_image: int
    pitch_px: float
    pitch_um: float
    expected_pitch_um: float
    pixel_size_um: float
    image_size: tuple[int, int]  # width, height

    def words(self) -> str:
        share = self.spots_on_image / self.spots
        width, height = self.image_size
        return (
            f"{self.spots_on_image} of {self.spots} spots on the image ({share:.1%}); "
            f"{self.pitch_px:.2f} px x {self.pixel_size_um:.5g} um = {self.pitch_um:.1f} um apart "
            f"(expected {self.expected_pitch_um:g}); image {width} x {height} px"
        )


def spot_pitch(xy: np.ndarray) -> float:
    """Median distance of the spots (N, 2) to their nearest neighbours; nan for a single spot."""
    if len(xy) < 2:
        return float("nan")
    return float(np.median(cKDTree(xy).query(xy, k=2)[0][:, 1]))


def share_inside(xy: np.ndarray, shape: tuple[int, int]) -> float:
    return float(((xy >= 0) & (xy < shape[::-1])).all(axis=1).mean())


def check(section: Section) -> Report:
    """Measure how spots, image and pixel size fit together; StageError if they do not."""
    shape, xy = image_shape(section.image), section.xy
    array = section.locs if section.array is None else section.array
    pitch = spot_pitch(array[["x", "y"]].to_numpy(float))
    report = Report(
        spots=len(xy),
        spots_on_image=round(share_inside(xy, shape) * len(xy)),
        pitch_px=pitch,
        pitch_um=pitch * section.pixel_size_um,
        expected_pitch_um=section.pitch_um,
        pixel_size_um=section.pixel_size_um,
        image_size=shape[::-1],
    )
    if report.spots_on_image < MIN_INSIDE * report.spots:
        (left, top), (right, bottom) = xy.min(axis=0), xy.max(axis=0)
        raise utils.StageError(
            f"Only {report.spots_on_image} of {report.spots} in-tissue spots "
            f"({report.spots_on_image / report.spots:.1%}) fall on the image, expected "
            f"{MIN_INSIDE:.0%}: x runs from {left:.0f} to {right:.0f} and y from {top:.0f} to "
            f"{bottom:.0f}, but the image has {shape[1]} columns and {shape[0]} rows.",
            likely_cause(xy, shape, section.scales),
        )
    error = report.pitch_um / section.pitch_um - 1
    if abs(error) > MAX_PITCH_ERROR:  # false for a single spot
        raise utils.StageError(
            f"The spots are {pitch:.2f} px x {section.pixel_size_um:.5g} um = "
            f"{report.pitch_um:.1f} um apart; expected {section.pitch_um:g} um within "
            f"{MAX_PITCH_ERROR:.0%}, found {error:+.1%}.",
            f"The pixel size would have to be {section.pitch_um / pitch:.5g} um. Give the image to "
            f"which the coordinates refer, at full resolution, and its own pixel size.",
        )
    return report


def likely_cause(xy: np.ndarray, shape: tuple[int, int], scales: dict[str, float]) -> str:
    """Why spots miss the image, found by trying: a smaller copy, x and y swapped, another image."""
    for name, scale in scales.items():
        if scale < 1 and share_inside(xy * scale, shape) >= MIN_INSIDE:
            reach = (xy * scale).max(axis=0)
            return (
                f"Times {name} = {scale:.5g} they do fit (x to {reach[0]:.0f}, y to "
                f"{reach[1]:.0f}), so this is that smaller copy. Give the full-resolution image."
            )
    if share_inside(xy[:, ::-1], shape) >= MIN_INSIDE:
        return (
            "With x and y swapped they do fit: the image is turned or mirrored, or the columns of "
            "the positions are exchanged. Give the image as it was given to the vendor's software."
        )
    factor = float((xy.max(axis=0) / shape[::-1]).max())
    if factor > 1.05:
        return (
            f"They reach {factor:.2f} times as far as the image: it is a smaller copy (a scale of "
            f"{1 / factor:.3g} or less would fit) or a part. Give the full-resolution image."
        )
    return "They belong to another image, or this one was cropped. Give the original image."


def draw_check(section: Section, report: Report, path: Path) -> None:
    """check.png: the spots on a thumbnail, in and off the tissue and the image, and the numbers."""
    small = thumbnail(section.image)
    shape = image_shape(section.image)
    scale = np.array([small.shape[1] / shape[1], small.shape[0] / shape[0]])
    radius = max(section.radius_px * scale.mean(), 1.5)
    font = ImageFont.load_default(max(11, round(small.shape[1] / 70)))
    lines = check_lines(section, report)
    line_height = font.size * 1.45
    header = round(line_height * (len(lines) + 0.7))
    picture = Image.new("RGB", (small.shape[1], small.shape[0] + header), "white")
    picture.paste(Image.fromarray(small), (0, header))
    draw = ImageDraw.Draw(picture)
    groups = [(section.xy, TISSUE_COLOUR)]
    if section.off_tissue is not None:
        groups.insert(0, (section.off_tissue[["x", "y"]].to_numpy(float), OTHER_COLOUR))
    for xy, colour in groups:
        for x, y in xy * scale + (0, header):
            box = (x - radius, y - radius, x + radius, y + radius)
            draw.ellipse(box, outline=colour, width=2 if radius > 8 else 1)
    draw.rectangle((0, 0, picture.width, header), fill="white")
    for i, (text, colour) in enumerate(lines):
        draw.text((line_height / 2, line_height * (i + 0.35)), text, fill=colour, font=font)
    picture.save(path)


def check_lines(section: Section, report: Report) -> list[tuple[str, tuple[int, int, int]]]:
    """The words above check.png, each line with the colour in which its spots are drawn."""
    missed = report.spots - report.spots_on_image
    off = 0 if section.off_tissue is None else len(section.off_tissue)
    black = (0, 0, 0)
    lines = [
        (f"{report.spots} spots in tissue (green), {missed} of them off the image", TISSUE_COLOUR),
        (f"{off} spots off the tissue (grey), left out", OTHER_COLOUR),
        (
            f"pitch {report.pitch_px:.2f} px x {report.pixel_size_um:.5g} um per pixel = "
            f"{report.pitch_um:.1f} um, expected {report.expected_pitch_um:g} um",
            black,
        ),
        (
            f"image {report.image_size[0]} x {report.image_size[1]} px = "
            f"{report.image_size[0] * report.pixel_size_um / 1000:.2f} x "
            f"{report.image_size[1] * report.pixel_size_um / 1000:.2f} mm; "
            f"{len(section.genes)} genes, {section.counts.sum():,.0f} molecules",
            black,
        ),
        ("Do the circles cover the tissue, and nothing else? If not, stop.", OUTSIDE_COLOUR),
    ]  # fmt: skip
    return lines


# -------------------------------------------------------------------------------------------------
# the sample directory
# -------------------------------------------------------------------------------------------------
WRITTEN = (utils.HE_RAW, utils.PIXEL_SIZE_RAW, utils.LOCS_RAW, utils.CNTS, utils.RADIUS_RAW)


def read_own_record(directory: Path) -> dict[str, list[dict[str, Any]]]:
    """Fingerprints by name of the files that runs here wrote.

    A run that was cut off while it put its files in place left some old ones and some new ones.
    """
    path = directory / RECORD
    if not path.exists():
        return {}
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        known = {name: list(files) for name, files in record.get("previous", {}).items()}
        for name, file in record["outputs"].items():
            known.setdefault(name, []).append(file)
        if not all(utils._is_fingerprint(file) for files in known.values() for file in files):
            raise TypeError("a file without fingerprint")
    except (ValueError, OSError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise utils.StageError(
            f"{path} is no readable record: {error!r:.200}",
            "Remove it, then run the same command with --force.",
        ) from error
    return known


def is_mine(path: Path, own: dict[str, list[dict[str, Any]]]) -> bool:
    """True if a file is there as a run here wrote it."""
    return path.exists() and any(utils.same_as(path, file) for file in own.get(path.name, []))


def guard(directory: Path, force: bool = False, gene_names: bool = False) -> None:
    """Refuse to replace files that were not written here or were edited since, unless ``force``.

    Call it before the first expensive step; write_sample calls it again.
    """
    if directory.exists() and not directory.is_dir():
        raise utils.StageError(
            f"--directory {directory} is a file; it must be a folder.", "Choose another name."
        )
    own = read_own_record(directory)
    names = [name for artifact in WRITTEN for name in artifact.names]
    names += [TRUTH, CHECK, *([utils.GENE_NAMES.name] if gene_names else [])]
    for name in names:
        path = directory / name
        if path.exists() and not is_mine(path, own) and not force:
            state = "was edited since it was prepared" if name in own else "was not made here"
            raise utils.StageError(
                f"{path} {state}; it would be overwritten.",
                "Choose another --directory, or replace it: run the same command with --force.",
            )


def write_sample(
    directory: Path,
    section: Section,
    force: bool = False,
    arguments: dict[str, Any] | None = None,
) -> Report:
    """Check the section, then write all files of the sample: all of them, or none."""
    report = check(section)
    directory.mkdir(parents=True, exist_ok=True)
    guard(directory, force, section.gene_names is not None)
    before = read_own_record(directory)
    suffix = section.image.suffix.lower() if isinstance(section.image, Path) else ".tif"
    writers: dict[str, Callable[[Path], None]] = {
        f"he-raw{suffix}": lambda path: write_image(section.image, path),
        utils.PIXEL_SIZE_RAW.name: lambda path: write_text(path, f"{section.pixel_size_um:.8g}\n"),
        utils.RADIUS_RAW.name: lambda path: write_text(path, f"{section.radius_px:.6g}\n"),
        utils.LOCS_RAW.name: lambda path: write_locs(section.locs, path),
        "cnts.csv.gz": lambda path: write_counts(section, path),
        CHECK: lambda path: draw_check(section, report, path),
    }
    if section.gene_names is not None:
        text = "".join(f"{gene}\n" for gene in section.gene_names)
        writers[utils.GENE_NAMES.name] = lambda path: write_text(path, text)
    if section.truth is not None:
        writers[TRUTH] = lambda path: write_truth(section.truth, path)
    with contextlib.ExitStack() as stack:
        outputs = {}
        for name, write in writers.items():
            partial = stack.enter_context(utils.atomic(directory / name))
            write(partial)
            outputs[name] = utils.fingerprint(partial)
        unfinished = {"finished": False, "outputs": outputs, "previous": before}
        write_json(directory / RECORD, unfinished)  # what a run cut off right here has written
    if isinstance(section.image, Region):
        section.image.slide.close()
    remove_superseded(directory, writers.keys(), before)
    for name in writers:
        print(f"wrote {name}: {outputs[name]['bytes'] / 1e6:,.2f} MB")
    record = {
        "finished": True,
        "script": Path(sys.argv[0]).name,
        "arguments": {key: str(value) for key, value in (arguments or {}).items()},
        "ended": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "sources": {str(path): utils.fingerprint(path) for path in section.sources},
        "spots": report.spots,
        "spots_on_image": report.spots_on_image,
        "spots_off_tissue": 0 if section.off_tissue is None else len(section.off_tissue),
        "genes": len(section.genes),
        "molecules": float(section.counts.sum()),
        "pixel_size_um": section.pixel_size_um,
        "radius_px": section.radius_px,
        "pitch_um": report.pitch_um,
        **section.facts,
        "notes": section.notes,
        "outputs": outputs,
    }
    write_json(directory / RECORD, record)
    print(report.words())
    for note in section.notes:
        print(f"note: {note}")
    print(
        f"Look at {directory / CHECK}, then run: python {utils.CALIBRATION} --directory {directory}"
    )
    return report


def remove_superseded(directory: Path, written: Any, own: dict[str, list[dict[str, Any]]]) -> None:
    """Remove he-raw and cnts under their other names, and what an earlier run alone wrote."""
    for artifact in WRITTEN:
        for name in set(artifact.names) - set(written):
            (directory / name).unlink(missing_ok=True)
    for name in {TRUTH, utils.GENE_NAMES.name} - set(written):
        if is_mine(directory / name, own):
            (directory / name).unlink()


def write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="\n")


def write_json(path: Path, content: dict[str, Any]) -> None:
    with utils.atomic(path) as partial:
        write_text(partial, json.dumps(content, indent=1) + "\n")


def write_locs(locs: pd.DataFrame, path: Path) -> None:
    locs[["x", "y"]].to_csv(path, float_format="%.3f", index_label="", lineterminator="\n")


def write_counts(section: Section, path: Path) -> None:
    """cnts.csv.gz, a row at a time: the table is mostly zeros, and never whole in memory."""
    counts = sparse.csr_array(section.counts)
    whole = bool((counts.data == np.floor(counts.data)).all())
    with (
        path.open("wb") as raw,
        gzip.GzipFile("", "wb", 6, raw, mtime=0) as packed,  # same counts, same bytes
        io.TextIOWrapper(packed, encoding="utf-8", newline="") as file,
    ):
        line = csv.writer(file, lineterminator="\n")
        line.writerow(["", *section.genes])
        for i, spot in enumerate(section.locs.index):
            part = slice(counts.indptr[i], counts.indptr[i + 1])
            row = np.zeros(counts.shape[1])
            np.add.at(row, counts.indices[part], counts.data[part])
            cells = ["0"] * len(row)
            for j in np.flatnonzero(row):
                cells[j] = str(int(row[j])) if whole else f"{row[j]:.7g}"
            line.writerow([spot, *cells])


def write_truth(truth: Truth, path: Path) -> None:
    """truth.npz: counts (h, w, G), tissue (h, w), genes (G,); written a row at a time.

    Whole counts become uint16 or uint32, fractions float32.
    """
    h, w = truth.tissue.shape
    n_genes = len(truth.genes)
    is_sparse = sparse.issparse(truth.counts)
    values = [sparse.csr_array(truth.counts).data] if is_sparse else truth.counts
    whole = all((part == np.floor(part)).all() for part in values)
    top = max((part.max(initial=0) for part in values), default=0)
    dtype = np.dtype(np.float32 if not whole else np.uint16 if top < 2**16 else np.uint32)
    header = {"descr": dtype.str, "fortran_order": False, "shape": (h, w, n_genes)}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=4) as archive:
        with archive.open("counts.npy", "w", force_zip64=True) as file:
            np.lib.format.write_array_header_1_0(file, header)
            for row in range(h):
                part = np.s_[row * w : (row + 1) * w]
                block = truth.counts[part].toarray() if is_sparse else truth.counts[row]
                file.write(np.ascontiguousarray(block, dtype).tobytes())
        for name, array in (("tissue", truth.tissue), ("genes", np.array(truth.genes))):
            with archive.open(f"{name}.npy", "w") as file:
                np.lib.format.write_array(file, array, allow_pickle=False)


# -------------------------------------------------------------------------------------------------
# arguments and entry point
# -------------------------------------------------------------------------------------------------
def build_parser(doc: str) -> argparse.ArgumentParser:
    """Parser with what all prepare scripts share, described by the first paragraph of ``doc``."""
    parser = argparse.ArgumentParser(description=doc.split("\n\n")[0])
    parser.add_argument(
        "--directory",
        type=utils.sample_directory,
        required=True,
        help="Sample folder to write; made if it does not exist.",
    )
    parser.add_argument(
        "--genes",
        type=Path,
        metavar="FILE",
        help="Genes to predict, one a line; becomes gene-names.txt.",
    )
    parser.add_argument(
        "--force", action="store_true", help="Replace files that were not prepared here or edited."
    )
    return parser


def run(
    prepare: Callable[[argparse.Namespace], Section],
    parser: argparse.ArgumentParser,
    argv: list[str] | None = None,
) -> int:
    """Parse, read the section by ``prepare(args)``, check and write it; 2 if a user can mend it."""
    args = parser.parse_args(argv)
    Image.MAX_IMAGE_PIXELS = utils.MAX_HE_PIXELS
    try:
        guard(args.directory, args.force, args.genes is not None)
        write_sample(args.directory, prepare(args), args.force, vars(args))
    except utils.StageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EDQUOT):
            raise
        print(
            f"error: {error.filename2 or error.filename or args.directory}: {error.strerror}.\n"
            f"Make room or give access to it, then run the same command.",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted; the sample is as it was", file=sys.stderr)
        return 130
    return 0
