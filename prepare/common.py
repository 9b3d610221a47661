"""What the prepare scripts share: the section they fill in, images, genes, lattices, the check.

A prepare script reads one vendor's files and fills a ``Section``; sample.py checks and writes it.

Frames and units. Arrays are (row, col); x (column) and y (row) are coordinates in continuous pixels
from the left upper edge of the first pixel. ``locs`` refers to the image that is written.
Letters in shapes: N spots, G genes, h x w superpixels of he.jpg.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image, ImageDraw, ImageFont
from scipy import sparse
from scipy.spatial import cKDTree

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import utils
from image_calibration import calibrated_shape, padded_shape
from method.genes import most_variable
from prepare import images

VISIUM_PITCH_UM, VISIUM_RADIUS_UM = 100.0, 27.5  # centre to centre; printed spots of 55 um
LEGACY_PITCH_UM, LEGACY_RADIUS_UM = 200.0, 50.0
MAX_PITCH_ERROR = 0.05  # relative, between the measured and the expected pitch
N_TRUTH_GENES = 300  # 812 x 812 superpixels of 300 genes are 0.8 GB when they are scored
CHUNK = 2_000_000  # molecules accumulated at a time
TISSUE_COLOUR, OTHER_COLOUR, OUTSIDE_COLOUR = (0, 110, 60), (150, 150, 150), (220, 30, 30)


# -------------------------------------------------------------------------------------------------
# what a prepare script fills in
# -------------------------------------------------------------------------------------------------
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

    image: Path | np.ndarray | images.Region
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
    tables: dict[str, pd.DataFrame] = field(default_factory=dict)  # by file name, spot id as index
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
            if repeated := utils.duplicates(values):
                raise utils.StageError(
                    f"The {name} {utils.some(repeated)} occur more than once.",
                    "Mend the source files: ids must be unique.",
                )
        order = rows.get_indexer(self.locs.index)
        if (order < 0).any():
            raise utils.StageError(
                f"{(order < 0).sum()} of {len(order)} spots that have a location have no counts: "
                f"{utils.some(self.locs.index[order < 0])}; the counts are of "
                f"{utils.some(rows)}.",
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


def broken(path: Path, problem: str) -> utils.StageError:
    return utils.StageError(
        f"{path} {problem}", "Copy or download it again, then run the same command."
    )


# -------------------------------------------------------------------------------------------------
# genes
# -------------------------------------------------------------------------------------------------
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
    if repeated := utils.duplicates(names):
        raise utils.StageError(
            f"The gene ids {utils.some(repeated)} occur more than once.",
            "Mend the features of the matrix: gene ids must be unique.",
        )
    return names


def repeated_note(path: Path, separator: str) -> list[str]:
    """A note if the header of a table has names more than once, to which pandas adds .1, .2, ..."""
    header = pd.read_csv(
        path, sep=separator, header=None, nrows=1, dtype=str, keep_default_na=False,
        encoding="utf-8-sig",
    )  # fmt: skip
    repeated = utils.duplicates(header.iloc[0])
    if not repeated:
        return []
    return [
        f"{len(repeated)} gene names occur more than once ({utils.some(repeated)}): the second is "
        f"called {repeated[0]}.1, and so on"
    ]


def choose_truth_genes(
    listed: list[str] | None, genes: list[str], spots: sparse.csr_array, n: int
) -> np.ndarray:
    """Positions of the genes of truth.npz: the listed ones, or the n most variable; none if 0."""
    if n == 0:
        return np.empty(0, np.int64)
    if listed is not None:
        place = {gene: i for i, gene in enumerate(genes)}
        return np.array([place[gene] for gene in listed])
    return most_variable(spots, genes, n)


def add_truth_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--truth-genes",
        type=utils.not_negative,
        default=N_TRUTH_GENES,
        help=f"Genes in truth.npz: so many of the most variable (default {N_TRUTH_GENES}), or all "
        "of --genes; 0 for no truth.npz.",
    )


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
            f"names {utils.some(unknown)}, which the counts do not have" if names else "is empty"
        )
        raise utils.StageError(
            f"{path} {found}; their genes are like {utils.some(genes)}.",
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
    """Median distance of the spots (N, 2) to their second nearest neighbours; nan for one spot.

    On a lattice the nearest is no nearer; where spots are off it by some um, as in legacy ST, the
    nearest would be nearer than the pitch by several per cent.
    """
    if len(xy) < 2:
        return float("nan")
    return float(np.median(cKDTree(xy).query(xy, k=min(3, len(xy)))[0][:, -1]))


def check(section: Section) -> Report:
    """Measure how spots, image and pixel size fit together; StageError if they do not."""
    shape, xy = images.image_shape(section.image), section.xy
    array = section.locs if section.array is None else section.array
    pitch = spot_pitch(array[["x", "y"]].to_numpy(float))
    report = Report(
        spots=len(xy),
        spots_on_image=round(images.share_inside(xy, shape) * len(xy)),
        pitch_px=pitch,
        pitch_um=pitch * section.pixel_size_um,
        expected_pitch_um=section.pitch_um,
        pixel_size_um=section.pixel_size_um,
        image_size=shape[::-1],
    )
    if report.spots_on_image < images.MIN_INSIDE * report.spots:
        (left, top), (right, bottom) = xy.min(axis=0), xy.max(axis=0)
        raise utils.StageError(
            f"Only {report.spots_on_image} of {report.spots} in-tissue spots "
            f"({report.spots_on_image / report.spots:.1%}) fall on the image, expected "
            f"{images.MIN_INSIDE:.0%}: x runs from {left:.0f} to {right:.0f} and y from {top:.0f} "
            f"to {bottom:.0f}, but the image has {shape[1]} columns and {shape[0]} rows.",
            likely_cause(xy, shape, section.scales),
        )
    error = report.pitch_um / section.pitch_um - 1
    if abs(error) > MAX_PITCH_ERROR:  # false for a single spot
        raise utils.StageError(
            f"The spots are {pitch:.2f} px x {section.pixel_size_um:.5g} um = "
            f"{report.pitch_um:.1f} um apart; expected {section.pitch_um:g} um within "
            f"{MAX_PITCH_ERROR:.0%}, found {error:+.1%}.{other_platform(report.pitch_um)}",
            f"The pixel size would have to be {section.pitch_um / pitch:.5g} um. Give the image to "
            f"which the coordinates refer, at full resolution, and its own pixel size.",
        )
    return report


def other_platform(pitch_um: float) -> str:
    """A hint if the spots have the pitch of a platform, which may not be the one expected."""
    for name, pitch in (("Visium", VISIUM_PITCH_UM), ("legacy ST", LEGACY_PITCH_UM)):
        if abs(pitch_um / pitch - 1) <= MAX_PITCH_ERROR:
            return f" It is the pitch of {name}: is it that platform?"
    return ""


def likely_cause(xy: np.ndarray, shape: tuple[int, int], scales: dict[str, float]) -> str:
    """Why spots miss the image, found by trying: a smaller copy, x and y swapped, another image."""
    # First, for a small scale fits on any image
    if images.share_inside(xy[:, ::-1], shape) >= images.MIN_INSIDE:
        return (
            "With x and y swapped they do fit: the image is turned or mirrored, or the columns of "
            "the positions are exchanged. Give the image as it was given to the vendor's software."
        )
    for name, scale in sorted(scales.items(), key=lambda item: -item[1]):
        if scale < 1 and images.share_inside(xy * scale, shape) >= images.MIN_INSIDE:
            reach = (xy * scale).max(axis=0)
            return (
                f"Times {name} = {scale:.5g} they do fit (x to {reach[0]:.0f}, y to "
                f"{reach[1]:.0f}), so this is that smaller copy. Give the full-resolution image."
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
    small = images.thumbnail(section.image)
    shape = images.image_shape(section.image)
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
