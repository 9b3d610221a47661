"""One section as a prepare script fills it in, and the check of how its parts fit together.

A prepare script reads one vendor's files and fills a ``PreparedSection``; sample.py writes it.

Frames and units. Arrays are (row, col); x (column) and y (row) are coordinates in continuous pixels
from the left upper edge of the first pixel. ``locs`` refers to the image that is written.
Letters in shapes: N spots, G genes, h x w superpixels of he.jpg.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import itertools
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd
from PIL import Image, ImageDraw, ImageFont
from scipy import sparse

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import utils
from method.calibration import inside
from method.genes import most_variable
from method.grid import lattice_pitch
from prepare import images
from reading import plain, tables
from reading.genes import read_genes

MIN_COLOUR = 8  # levels by which tissue must differ from glass, to tell where it is
MOSTLY = 0.75  # share of the spots that lie on what is coloured most, where the axes are right
CLEARLY_MORE = 0.25  # share of the spots, by which x and y exchanged must fit the tissue better
MAX_PITCH_ERROR = 0.05  # relative, between the measured and the expected pitch
ONE_SECTION = "Give the counts and the spots of one and the same section."
DAMAGED = (ValueError, OSError, EOFError, KeyError, TypeError, zlib.error)  # by damaged tables
FLAGS = dict.fromkeys(("true", "t", "yes", "y"), 1) | dict.fromkeys(("false", "f", "no", "n"), 0)
Colour = tuple[int, int, int]
TISSUE_COLOUR, OTHER_COLOUR, WARNING_COLOUR = (0, 110, 60), (150, 150, 150), (220, 30, 30)


# -------------------------------------------------------------------------------------------------
# what a prepare script fills in
# -------------------------------------------------------------------------------------------------
@dataclass
class CountedTruth:
    """Counts per superpixel of he.jpg: sparse (h * w, G) or an array (h, w, G)."""

    counts: sparse.csr_array | np.ndarray
    tissue: np.ndarray  # bool (h, w)
    genes: list[str]


@dataclass
class PreparedSection:
    """One section, ready to be checked and written.

    ``image`` is a file, an array (rows, columns, 3), or a Region. Rows of ``counts`` are ``spots``
    (default: the spots of ``locs``, in their order), columns are ``genes``. Rows are joined to
    ``locs`` by id; spots without a location are left out.
    """

    image: Path | np.ndarray | images.Region
    pixel_size_um: float  # of the image written
    locs: pd.DataFrame  # index: spot id; x, y in px of the image written; in-tissue spots
    counts: sparse.csr_array
    genes: list[str]
    radius_um: float = utils.VISIUM_RADIUS_UM
    pitch_um: float = utils.VISIUM_PITCH_UM  # expected between neighbours
    truth: CountedTruth | None = None
    notes: list[str] = field(default_factory=list)
    spots: list[str] | None = None
    off_tissue: pd.DataFrame | None = None  # x, y of spots without tissue, to be drawn only
    array: pd.DataFrame | None = None  # x, y of all positions, to measure the pitch; default: locs
    gene_names: list[str] | None = None  # for gene-names.txt
    sources: list[Path] = field(default_factory=list)  # files read, for the record
    scales: dict[str, float] = field(default_factory=dict)  # of smaller copies of the image
    tables: dict[utils.Artifact, pd.DataFrame] = field(default_factory=dict)  # spot id as index
    facts: dict[str, Any] = field(default_factory=dict)  # numbers for the record

    def __post_init__(self) -> None:
        self.locs.index = self.locs.index.astype(str)
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
        if not len(self.locs):
            raise utils.StageError(
                "No spot is in tissue.", "See the column in_tissue, or selected, of the positions."
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
        self.counts = sparse.csr_array(self.counts)[order]
        self.spots = list(self.locs.index)
        if broken := [name for name in (*self.genes, *self.spots) if {"\n", "\r"} & set(name)]:
            raise utils.StageError(  # tables are read line by line
                f"The names {utils.some([repr(name) for name in broken])} hold the end of a line.",
                "Mend the names of genes and spots in the source files.",
            )
        values = self.counts.data
        if not len(values) or not np.isfinite(values).all() or (values < 0).any():
            raise utils.StageError(
                "The counts of the spots are all zero, negative or not numbers; expected raw "
                "counts.",
                "Give the raw counts.",
            )
        if (top := float(values.max())) > tables.MAX_COUNT:
            raise utils.StageError(
                f"The counts run up to {top:g}; expected counts of at most {tables.MAX_COUNT:g}.",
                "Give the raw counts.",
            )

    @property
    def xy(self) -> np.ndarray:
        return self.locs[["x", "y"]].to_numpy(float)

    @property
    def radius_px(self) -> float:
        return self.radius_um / self.pixel_size_um


# -------------------------------------------------------------------------------------------------
# tables and genes
# -------------------------------------------------------------------------------------------------
def unfit(path: Path, problem: str) -> utils.StageError:
    """A StageError about a file that may be whole, but is not what is read."""
    return utils.StageError(f"{path} {problem}", "Mend it, then run the same command.")


@contextlib.contextmanager
def reading_table(path: Path) -> Iterator[None]:
    """What is wrong with a table becomes a StageError; damaged bytes only are to be copied anew."""
    try:
        yield
    except utils.StageError:
        raise
    except FileNotFoundError as error:
        raise utils.StageError(
            f"{path} is missing.", "Mend the path, then run it again."
        ) from error
    except (plain.Unfit, UnicodeDecodeError, csv.Error) as error:
        raise unfit(path, f"cannot be read: {error}") from error
    except DAMAGED as error:
        if plain.of_system(error):
            raise
        raise utils.broken(path, f"is no whole table: {error}") from error


def read_numbers(
    path: Path,
    read: Callable[[Path], pd.DataFrame] = tables.read_text_table,
    columns: Sequence[str] | None = None,
    text: Sequence[str] = (),
    optional: Sequence[str] = (),
    flags: Sequence[str] = (),
) -> pd.DataFrame:
    """The ``columns`` of the table that ``read`` makes of a file, by default all of them.

    All are finite numbers (float64) but those in ``text``; the ``optional`` ones may be missing;
    ``flags`` are 1 or 0, which may be written as words, see as_flags. A file that holds something
    else is named in a StageError, with the first such cell.
    """
    with reading_table(path):
        table = read(path)
    wanted = list(table.columns) if columns is None else list(columns)
    if missing := [name for name in wanted if name not in table]:
        raise unfit(
            path,
            f"has the columns {utils.some(table.columns)}; {missing[0]} is missing; expected "
            f"{', '.join(wanted)}.",
        )
    if table.empty:
        raise unfit(path, "is empty: it has no row.")
    wanted += [name for name in optional if name in table]
    found: dict[str, Any] = {}
    for name in wanted:
        if name in text:
            found[name] = table[name]
        elif name in flags:
            found[name] = as_flags(table[name], path).astype(float)
        else:
            found[name] = as_numbers(table[name], path)
    return pd.DataFrame(found)


def as_numbers(
    column: pd.Series, path: Path, expected: str = "a number", above: int = 0
) -> np.ndarray:
    """A column of a table as finite float64 (N,); StageError with the first cell that is none.

    ``above`` are the data rows of the file before those of the column.
    """
    values = pd.to_numeric(column, errors="coerce").to_numpy(float, na_value=np.nan)
    refuse_cells(column, ~np.isfinite(values), path, expected, above)
    return values


def refuse_cells(column: pd.Series, odd: np.ndarray, path: Path, expected: str, above: int) -> None:
    """StageError with the first cell that is ``odd`` (N,), if any is."""
    for row in np.flatnonzero(odd)[:1]:
        cell = str(column.iloc[row])
        raise unfit(
            path,
            f"holds {cell!r} in column {column.name}, data row {above + row + 1}; expected "
            f"{expected}{tables.point(cell)}.",
        )


def as_flags(column: pd.Series, path: Path, above: int = 0) -> np.ndarray:
    """A column of 1 and 0, or of TRUE and FALSE, yes and no, in any case, as bool (N,)."""
    values = column.map(lambda cell: FLAGS.get(str(cell).strip().casefold(), cell))
    numbers = as_numbers(values, path, expected := "1 or 0, TRUE or FALSE", above)
    refuse_cells(column, ~np.isin(numbers, (0, 1)), path, expected, above)
    return numbers > 0


def first_of(folder: Path, names: Sequence[str], remedy: str) -> Path:
    """The file of the first of these names that a folder has."""
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise utils.StageError(f"{folder} has none of {', '.join(names)}.", remedy)


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


def read_spot_table(path: Path, columns: list[str] | None = None) -> pd.DataFrame:
    """Numbers (float64) by spot id, the first column. Of columns that share a name the second is
    called NAME.1, and so on: see repeated_note."""
    with reading_table(path):
        ids, names, values = tables.read_table(path, columns, repeats=True)
    return pd.DataFrame(
        values.toarray().astype(float), ids, columns or numbered(names), dtype=float
    )


def numbered(names: list[str]) -> list[str]:
    """Names made unique: the first of a name keeps it, the others become NAME.1, NAME.2, ..."""
    seen: set[str] = set()
    taken = set(names)
    found = []
    for name in names:
        if name in seen:
            name = next(new for k in itertools.count(1) if (new := f"{name}.{k}") not in taken)
            taken.add(name)
        seen.add(name)
        found.append(name)
    return found


def shared_spots(
    counts: pd.DataFrame, counts_path: Path, spots: pd.DataFrame, spots_path: Path
) -> list[str]:
    """Ids that both tables have, in the order of the counts."""
    if shared := [spot for spot in counts.index if spot in spots.index]:
        return shared
    raise utils.StageError(
        f"{counts_path} and {spots_path} have no spot in common: {utils.some(counts.index)}; "
        f"{utils.some(spots.index)}.",
        ONE_SECTION,
    )


def repeated_note(path: Path) -> list[str]:
    """A note if a table has columns of one name, see read_spot_table."""
    with reading_table(path):
        repeated = utils.duplicates(tables.column_names(path))
    if not repeated:
        return []
    return [
        f"{len(repeated)} gene names occur more than once ({utils.some(repeated)}): the second is "
        f"called {repeated[0]}.1, and so on"
    ]


def genes_of_option(given: str | Path | None, genes: list[str]) -> list[str] | None:
    """The genes of --genes, all of them among ``genes``; None without the option."""
    return None if given is None else read_genes(given, genes, "the counts")


def choose_truth_genes(
    listed: list[str] | None, genes: list[str], spots: sparse.csr_array, n: int
) -> np.ndarray:
    """Columns of the genes of truth.npz: the listed ones, or the n most variable; none if 0."""
    if n == 0:
        return np.empty(0, np.int64)
    if listed is not None:
        return pd.Index(genes).get_indexer(pd.Index(listed))
    return most_variable(spots, genes, n)


# -------------------------------------------------------------------------------------------------
# the check that people look at
# -------------------------------------------------------------------------------------------------
@dataclass
class SpotFit:
    """What ``check_fit`` measured, for the record and for check.png."""

    spots: int
    spots_on_image: int
    pitch_px: float
    pitch_um: float
    image_size: tuple[int, int]  # width, height
    pitch: str  # the two pitches and what was expected, in words

    def words(self) -> str:
        share, (width, height) = self.spots_on_image / self.spots, self.image_size
        return (
            f"{self.spots_on_image} of {self.spots} spots on the image ({share:.1%}); "
            f"{self.pitch}; image {width} x {height} px"
        )


def check_fit(section: PreparedSection) -> SpotFit:
    """Measure how spots, image and pixel size fit together; StageError if they do not."""
    shape, xy = images.image_shape(section.image), section.xy
    array = section.locs if section.array is None else section.array
    pitch = lattice_pitch(array[["x", "y"]].to_numpy(float))
    pitch_um = pitch * section.pixel_size_um
    found = f"{pitch:.2f} px x {section.pixel_size_um:.5g} um = {pitch_um:.1f} um apart"
    fit = SpotFit(
        spots=len(xy),
        spots_on_image=round(images.share_inside(xy, shape) * len(xy)),
        pitch_px=pitch,
        pitch_um=pitch_um,
        image_size=shape[::-1],
        pitch=f"{found} (expected {section.pitch_um:g})",
    )
    if fit.spots_on_image < images.MIN_INSIDE * fit.spots:
        (left, top), (right, bottom) = xy.min(axis=0), xy.max(axis=0)
        raise utils.StageError(
            f"Only {fit.spots_on_image} of {fit.spots} in-tissue spots "
            f"({fit.spots_on_image / fit.spots:.1%}) fall on the image, expected "
            f"{images.MIN_INSIDE:.0%}: x runs from {left:.0f} to {right:.0f} and y from {top:.0f} "
            f"to {bottom:.0f}, but the image has {shape[1]} columns and {shape[0]} rows.",
            likely_cause(xy, shape, section.scales),
        )
    error = pitch_um / section.pitch_um - 1
    if abs(error) > MAX_PITCH_ERROR:  # false for a single spot
        raise utils.StageError(
            f"The spots are {found}; expected {section.pitch_um:g} um within "
            f"{MAX_PITCH_ERROR:.0%}, found {error:+.1%}.{other_platform(pitch_um)}",
            f"The pixel size would have to be {section.pitch_um / pitch:.5g} um. Give the image to "
            f"which the coordinates refer, at full resolution, and its own pixel size.",
        )
    return fit


def without_strays(section: PreparedSection) -> PreparedSection:
    """The section without the spots off its image, and with a note on them.

    check_fit is called before: it stops where so many spots miss the image that it is another.
    """
    found = inside(section.xy, images.image_shape(section.image))
    if found.all():
        return section
    left_out = section.locs.index[~found]
    note = f"{len(left_out)} spots in tissue lie off the image and are left out"
    return dataclasses.replace(
        section,
        locs=section.locs[found],
        counts=section.counts[found],
        spots=None,
        notes=[*section.notes, f"{note}: {utils.some(left_out)}"],
    )


def other_platform(pitch_um: float) -> str:
    """A hint if the spots have the pitch of a platform, which may not be the one expected."""
    for name, pitch in (("Visium", utils.VISIUM_PITCH_UM), ("legacy ST", utils.LEGACY_PITCH_UM)):
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


def exchanged_notes(section: PreparedSection, small: np.ndarray) -> list[str]:
    """A note if the spots would lie on the tissue of the image with x and y exchanged only.

    ``small`` is a thumbnail of the image, uint8 (rows, columns, 3); tissue has more colour than the
    glass around it. Where tissue fills the image, or has the same shape either way, none can tell.
    """
    colour = small.max(axis=2) - small.min(axis=2)
    tissue = colour > cv2.threshold(colour, 0, 255, cv2.THRESH_BINARY | cv2.THRESH_OTSU)[0]
    if tissue.all() or not tissue.any():
        return []
    shape = images.image_shape(section.image)
    scale = np.array([small.shape[1] / shape[1], small.shape[0] / shape[0]])

    def on_tissue(xy: np.ndarray) -> float:
        column, row = (xy * scale).astype(int).T
        found = inside(xy * scale, tissue.shape)
        return float(tissue[row[found], column[found]].sum() / len(xy))

    as_they_are, exchanged = on_tissue(section.xy), on_tissue(section.xy[:, ::-1])
    stained = colour[tissue].mean() - colour[~tissue].mean() >= MIN_COLOUR
    if not stained or exchanged < MOSTLY or exchanged - as_they_are < CLEARLY_MORE:
        return []
    return [
        f"{as_they_are:.0%} of the spots lie on coloured tissue, but {exchanged:.0%} would with x "
        f"and y exchanged: see in check.png that they lie on the tissue; if not, exchange them"
    ]


def draw_check(section: PreparedSection, fit: SpotFit, small: np.ndarray, path: Path) -> None:
    """check.png: the spots on a thumbnail, in and off the tissue and the image, and the numbers."""
    shape = images.image_shape(section.image)
    scale = np.array([small.shape[1] / shape[1], small.shape[0] / shape[0]])
    radius = max(section.radius_px * scale.mean(), 1.5)
    font_size = max(11, round(small.shape[1] / 70))
    font, line_height = ImageFont.load_default(font_size), font_size * 1.45
    lines = check_lines(section, fit)
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


def check_lines(section: PreparedSection, fit: SpotFit) -> list[tuple[str, Colour]]:
    """The words above check.png, each line with the colour in which its spots are drawn."""
    missed = fit.spots - fit.spots_on_image
    off = 0 if section.off_tissue is None else len(section.off_tissue)
    width, height = fit.image_size
    mm = section.pixel_size_um / 1000
    black = (0, 0, 0)
    return [
        (f"{fit.spots} spots in tissue (green), {missed} of them off the image", TISSUE_COLOUR),
        (f"{off} spots off the tissue (grey), left out", OTHER_COLOUR),
        (fit.pitch, black),
        (
            f"image {width} x {height} px = {width * mm:.2f} x {height * mm:.2f} mm; "
            f"{len(section.genes)} genes, {section.counts.sum():,.0f} molecules",
            black,
        ),
        ("Do the circles cover the tissue, and nothing else? If not, stop.", WARNING_COLOUR),
    ]
