"""Turn the output of a Xenium run and its H&E image into a sample with known truth.

    python prepare/xenium.py --outs OUTS --image HE.ome.tif --alignment CSV --directory DIR

Reads   OUTS, a folder or the .zip or .tar.gz of it:
          experiment.xenium                   pixel size of the run's own images, 0.2125 um
          transcripts.parquet                 molecules: feature_name, x_location, y_location, qv
          cell_feature_matrix.h5, cells.parquet or .csv.gz   instead of molecules: --counts-of cells
          cell_boundaries.parquet or .csv.gz                 the same by area: --counts-of polygons
        HE.ome.tif      H&E of the same section, or any slide that slides.py reads
        CSV             3 x 3 matrix from pixels of the H&E to pixels of the run (Xenium Explorer);
                        --aligned instead of it: the image lies in the frame of the run already
Writes  the files of a sample, see sample.py, and truth.npz; look at check.png before you go on.

The image is warped into the frame of the run, tile by tile, at 0.5 um per pixel, so that all
molecules keep their places. Pseudo-Visium spots, discs of 55 um on the hexagonal lattice of 100 um,
add up what lies in them; truth.npz counts what lies in each superpixel of 8 um:
* transcripts: every molecule of quality 20 or more, where it is (the default);
* cells: all molecules of a cell at its centroid;
* polygons: the molecules of a cell over the superpixels in proportion to the area that its outline
  shares with them; a spot then adds up the superpixels whose centres it covers.
Negative controls, blank and unassigned codewords are left out, and counted in prepare.json. Of a
large panel truth.npz holds the genes that vary most between spots (--truth-genes), counted in a
pass of their own: the grid in memory grows with them, not with the panel.

Frames. "um" is the frame of the run, from its upper left corner; "px" the image that is written.
Letters in shapes: M molecules, C cells, N spots, G genes, h x w superpixels.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path, PurePosixPath

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import utils
from prepare import options
from reading import cli

SCRIPT = "prepare/xenium.py"
MIN_QUALITY = 20.0  # Phred-scaled; what the vendor's own cell matrix counts


def build_parser() -> cli.Parser:
    parser = options.prepare_parser(__doc__)
    parser.add_argument("--outs", type=Path, required=True, help="Folder, .zip or .tar.gz.")
    parser.add_argument("--image", type=Path, required=True, help="H&E image of the section.")
    alignment = parser.add_mutually_exclusive_group(required=True)
    alignment.add_argument(
        "--alignment", type=Path, metavar="CSV",
        help="3 x 3 matrix from pixels of the H&E to pixels of the run.",
    )  # fmt: skip
    alignment.add_argument(
        "--aligned", action="store_true",
        help="The image lies in the frame of the run already, corner on corner. An H&E as it "
             "comes from the microscope does not.",
    )  # fmt: skip
    options.add_pixel_size(parser, "what its metadata say")
    parser.add_argument(
        "--counts-of", choices=["transcripts", "cells", "polygons"],
        help="What is counted (default: transcripts if they are there, else cells).",
    )  # fmt: skip
    parser.alias("--counts", "--counts-of")
    parser.add_argument(
        "--min-quality", type=float, default=MIN_QUALITY, metavar="Q",
        help="Least quality of a molecule that counts",
    )  # fmt: skip
    options.add_truth_genes(parser)
    parser.add_argument(
        "--region-um", type=float, nargs=4, metavar=("X", "Y", "WIDTH", "HEIGHT"),
        help="Part of the section, um of the run (default: all molecules and a margin).",
    )  # fmt: skip
    parser.alias("--region", "--region-um")
    return parser


if __name__ == "__main__":
    cli.start(build_parser(), SCRIPT)  # what needs none of the slow imports below

import contextlib
import json
import shutil
import tarfile
import tempfile
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import pyarrow
from pyarrow import parquet
from scipy import sparse
from scipy.ndimage import uniform_filter

from method import grid
from prepare import images, lattice, sample, scans, section, tenx
from prepare.aligned import Aligned, check_alignment, check_pixel_size, project, read_placing

EXPERIMENT, MOLECULES, MATRIX = "experiment.xenium", "transcripts.parquet", "cell_feature_matrix.h5"
CELLS = ("cells.parquet", "cells.csv.gz", "cells.csv")
OUTLINES = ("cell_boundaries.parquet", "cell_boundaries.csv.gz", "cell_boundaries.csv")
WANTED = {EXPERIMENT, MOLECULES, MATRIX, *CELLS, *OUTLINES}  # of an archive, nothing else is read
GENE_CATEGORIES = {"predesigned_gene", "custom_gene"}  # of codeword_category
CONTROL_PREFIXES = (  # of feature names, where no column tells
    "NegControl", "antisense_", "BLANK_", "Blank-", "UnassignedCodeword", "DeprecatedCodeword",
    "Intergenic_Region",
)  # fmt: skip
BATCH = 1_000_000  # molecules in memory at a time

SPOT_RADIUS_PX = utils.VISIUM_RADIUS_UM / utils.PIXEL_SIZE_UM
MARGIN_UM = 50.0  # around the molecules
TISSUE_WINDOW = 5  # superpixels, 40 um: local density
TISSUE_SHARE = 0.1  # of the median density; diffused molecules off the tissue are far below
OUTS_HELP = "Give --outs the output folder of a Xenium run, or the .zip or .tar.gz of it."


# -------------------------------------------------------------------------------------------------
# the output folder
# -------------------------------------------------------------------------------------------------
@contextlib.contextmanager
def open_outs(path: Path) -> Iterator[Path]:
    """The output folder itself, or a temporary one with what is needed of an archive."""
    if path.is_dir():
        for folder in (path, path / "outs"):
            if any((folder / name).is_file() for name in WANTED):
                yield folder
                return
        raise utils.StageError(f"{path} has none of {', '.join(sorted(WANTED))}.", OUTS_HELP)
    if not path.is_file():
        raise utils.StageError(f"{path} does not exist.", OUTS_HELP)
    with tempfile.TemporaryDirectory(prefix="xenium-") as unpacked:
        unpack(path, Path(unpacked))
        yield Path(unpacked)


def unpack(archive: Path, folder: Path) -> None:
    """Copy the wanted files of a .zip or .tar(.gz) into ``folder``, under their plain names.

    No path of the archive is ever used to write. An archive with absolute paths, .. or with links
    under a wanted name was not made by a Xenium run, and is refused as a whole.
    """
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as packed:
                members = [(m.filename, m.file_size, not m.is_dir()) for m in packed.infolist()]
                copy_members(archive, folder, members, packed.open)
        else:
            with tarfile.open(archive) as packed:
                members = [(m.name, m.size, m.isreg()) for m in packed if not m.isdir()]
                copy_members(archive, folder, members, packed.extractfile)
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, OSError) as error:
        raise utils.broken(archive, f"is no whole .zip or .tar archive: {error}") from error


def copy_members(
    archive: Path,
    folder: Path,
    members: list[tuple[str, int, bool]],
    opened: Callable[[str], Any],
) -> None:
    """Copy the wanted ones of the members (name, bytes, is a plain file) of an archive."""
    chosen: dict[str, str] = {}
    for name, _, plain in members:
        parts = PurePosixPath(name.replace("\\", "/")).parts
        if not parts or parts[0] == "/" or ".." in parts or ":" in parts[0]:
            raise utils.broken(archive, f"holds the path {name!r}, which leads out of a folder.")
        wanted = parts[-1] in WANTED and len(parts) <= 3  # OUTS/, NAME/outs/
        if wanted and not plain:
            raise utils.broken(archive, f"holds {name!r} as a link or device, not as a file.")
        if wanted and parts[-1] in chosen:
            raise utils.broken(archive, f"holds {parts[-1]} twice: {chosen[parts[-1]]}, {name}.")
        if wanted:
            chosen[parts[-1]] = name
    if not chosen:
        raise utils.StageError(f"{archive} has none of {', '.join(sorted(WANTED))}.", OUTS_HELP)
    need = sum(size for name, size, _ in members if name in chosen.values())
    utils.check_disk(folder, need, f"Unpacking {archive.name}")
    for plain_name, name in chosen.items():
        with opened(name) as source, (folder / plain_name).open("wb") as target:
            shutil.copyfileobj(source, target)


def run_pixel_size(outs: Path) -> float:
    """um per pixel of the run's own images, to which the alignment refers."""
    path = outs / EXPERIMENT
    if not path.is_file():
        raise utils.StageError(f"{path} is missing; it holds the pixel size.", OUTS_HELP)
    try:
        size = float(json.loads(path.read_text(encoding="utf-8"))["pixel_size"])
    except (ValueError, KeyError, TypeError) as error:
        raise utils.broken(path, f"does not say a pixel_size: {error!r}") from error
    if not utils.MIN_PIXEL_SIZE_UM <= size <= utils.MAX_PIXEL_SIZE_UM:
        raise utils.broken(path, f"says a pixel_size of {size} um.")
    return size


def read_cell_table(outs: Path, names: tuple[str, ...], columns: list[str]) -> pd.DataFrame:
    """cell_id (text) and columns of numbers of the first table there, .parquet or .csv(.gz)."""

    def read(path: Path) -> pd.DataFrame:
        wanted = ["cell_id", *columns]
        if path.suffix == ".parquet":
            return pd.read_parquet(path, columns=wanted)
        return pd.read_csv(path, usecols=wanted, dtype={"cell_id": str})

    table = section.read_numbers(
        section.first_of(outs, names, OUTS_HELP), read, ["cell_id", *columns], text=["cell_id"]
    )
    return table.assign(cell_id=tenx.decode(table["cell_id"]))


# -------------------------------------------------------------------------------------------------
# the aligned image
# -------------------------------------------------------------------------------------------------
@dataclass
class RunFrame:
    """Where the image written lies in the run: px = (um - origin) / 0.5."""

    origin: np.ndarray  # x, y in um
    size: tuple[int, int]  # width, height in px

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of superpixels of he.jpg, which image_calibration.py pads."""
        return lattice.superpixel_grid(self.size[::-1], utils.PIXEL_SIZE_UM)[0]

    def superpixel_of(self, px: np.ndarray) -> np.ndarray:
        """Index row * w + col (M,) of the superpixel of places (M, 2) in px; -1 off the image, of
        which the padding of he.jpg is no part."""
        on_image = ((px >= 0) & (px < self.size)).all(axis=1)
        return np.where(on_image, lattice.superpixel_of(px / utils.TOKEN_PX, self.grid), -1)

    def to_px(self, um: np.ndarray) -> np.ndarray:
        return (um - self.origin) / utils.PIXEL_SIZE_UM

    @property
    def to_um(self) -> np.ndarray:
        """3 x 3, from px."""
        (x, y), size = self.origin, utils.PIXEL_SIZE_UM
        return np.array([[size, 0, x], [0, size, y], [0, 0, 1.0]])


def make_frame(low: np.ndarray, high: np.ndarray, region: list[float] | None) -> RunFrame:
    """The frame of --region-um (x, y, width, height in um), or of all molecules and a margin."""
    if region is None:
        origin = np.maximum(np.floor(low - MARGIN_UM), 0)
        size = np.ceil((high + MARGIN_UM - origin) / utils.PIXEL_SIZE_UM)
    else:
        origin, size = np.array(region[:2]), np.ceil(np.array(region[2:]) / utils.PIXEL_SIZE_UM)
    if size.min() < utils.TILE_PX or size.prod() > utils.MAX_MEGAPIXELS * 1e6:
        raise utils.StageError(
            f"The section would be {size[0]:.0f} x {size[1]:.0f} px at {utils.PIXEL_SIZE_UM} um; "
            f"expected at least {utils.TILE_PX} px a side, and {utils.MAX_MEGAPIXELS} megapixels.",
            "Choose a part of it: --region-um X Y WIDTH HEIGHT.",
        )
    return RunFrame(origin, (int(size[0]), int(size[1])))


# -------------------------------------------------------------------------------------------------
# molecules
# -------------------------------------------------------------------------------------------------
@dataclass
class Survey:
    """What a first pass over the molecules finds."""

    genes: list[str] = field(default_factory=list)
    low: np.ndarray = field(default_factory=lambda: np.full(2, np.inf))  # x, y in um
    high: np.ndarray = field(default_factory=lambda: np.full(2, -np.inf))
    controls: Counter = field(default_factory=Counter)  # feature -> molecules left out
    read: int = 0
    poor: int = 0  # below the quality wanted


def batches(path: Path) -> Iterator[pd.DataFrame]:
    """Molecules, a few at a time: feature (category), x, y (um), qv, and what tells of genes."""
    try:
        with parquet.ParquetFile(path, read_dictionary=["feature_name"]) as file:
            needed = ["feature_name", "x_location", "y_location", "qv"]
            if missing := [name for name in needed if name not in file.schema_arrow.names]:
                raise utils.broken(path, f"has no column {', '.join(missing)}.")
            tells = [n for n in ("is_gene", "codeword_category") if n in file.schema_arrow.names]
            for batch in file.iter_batches(BATCH, columns=needed + tells[:1]):
                table = batch.to_pandas()
                feature = table["feature_name"].cat
                yield table.assign(
                    feature_name=feature.rename_categories(tenx.decode(feature.categories))
                )
    except (OSError, pyarrow.ArrowException) as error:
        raise utils.broken(path, f"is no whole Parquet file: {error}") from error


def genes_of(table: pd.DataFrame, panel: set[str] | None) -> np.ndarray:
    """Which molecules (M,) are of genes, not of controls: bool."""
    if "is_gene" in table:
        return table["is_gene"].to_numpy(bool)
    if "codeword_category" in table:
        category = table["codeword_category"].astype("category").cat
        kinds = tenx.decode(category.categories)
        return np.isin(category.codes, np.flatnonzero(pd.Index(kinds).isin(GENE_CATEGORIES)))
    feature = table["feature_name"].cat
    names = feature.categories
    good = ~names.str.startswith(CONTROL_PREFIXES) if panel is None else names.isin(panel)
    return np.isin(feature.codes, np.flatnonzero(good))


def read_panel(outs: Path) -> set[str] | None:
    """Gene symbols of the cell matrix, if there is one."""
    if not (outs / MATRIX).is_file():
        return None
    return set(tenx.read_10x_h5(outs / MATRIX)[2]["name"])


def survey(path: Path, panel: set[str] | None, quality: float) -> Survey:
    found, genes = Survey(), set()
    for table in batches(path):
        found.read += len(table)
        good = (table["qv"] >= quality).to_numpy()
        found.poor += int((~good).sum())
        is_gene = genes_of(table, panel)
        kept = table[good & is_gene]
        genes.update(kept["feature_name"].unique())
        found.controls.update(table["feature_name"][good & ~is_gene].value_counts().to_dict())
        if len(kept):
            xy = kept[["x_location", "y_location"]].to_numpy(float)
            found.low = np.minimum(found.low, xy.min(0))
            found.high = np.maximum(found.high, xy.max(0))
    if not genes:
        raise utils.StageError(
            f"{path} holds no molecule of a gene with quality {quality:g} or more.",
            "Give the transcripts.parquet of the run, unfiltered.",
        )
    found.controls = Counter({name: n for name, n in found.controls.items() if n})
    found.genes = sorted(genes)
    return found


class Total:
    """A running sum of sparse matrices, of equals first, so that adding stays linear in time."""

    def __init__(self) -> None:
        self.parts: list[sparse.csr_array] = []

    def add(self, matrix: sparse.csr_array) -> None:
        self.parts.append(matrix)
        while len(self.parts) > 1 and self.parts[-2].nnz <= 2 * self.parts[-1].nnz:
            self.parts.append(self.parts.pop() + self.parts.pop())

    def sum(self) -> sparse.csr_array:
        total = self.parts.pop()
        while self.parts:
            total = total + self.parts.pop()
        return total


@dataclass
class Counts:
    """Counts in the frame of the image."""

    molecules: np.ndarray  # of all genes, per superpixel (h, w)
    spots: sparse.csr_array  # (N, G)
    genes: list[str]
    outside: float  # molecules off the image
    grid_of: Callable[[np.ndarray], sparse.csr_array]  # some genes per superpixel (h * w, genes)


@dataclass
class Molecules:
    """The file of molecules, read again for every pass."""

    path: Path
    panel: set[str] | None
    quality: float
    genes: list[str]
    frame: RunFrame

    def on_image(self) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, int]]:
        """px (M, 2), superpixel (M,) and gene (M,) of those that count and lie on the image, and
        how many lie off it, a batch at a time."""
        index = pd.Index(self.genes)
        for table in batches(self.path):
            table = table[(table["qv"] >= self.quality).to_numpy() & genes_of(table, self.panel)]
            codes = index.get_indexer(table["feature_name"].cat.categories)
            gene = codes[table["feature_name"].cat.codes]
            px = self.frame.to_px(table[["x_location", "y_location"]].to_numpy(float))
            superpixel = self.frame.superpixel_of(px)
            inside = superpixel >= 0
            yield px[inside], superpixel[inside], gene[inside], int((~inside).sum())

    def grid_of(self, chosen: np.ndarray) -> sparse.csr_array:
        """Counts (h * w, chosen genes): every molecule in its superpixel."""
        place = np.full(len(self.genes), -1)
        place[chosen] = np.arange(len(chosen))
        total, shape = Total(), (int(np.prod(self.frame.grid)), len(chosen))
        for _, superpixel, gene, _ in self.on_image():
            total.add(lattice.tally(superpixel, place[gene], shape).astype(np.int32))
        return total.sum()

    def count(self, xy: np.ndarray) -> Counts:
        """Every molecule in its superpixel and, if one covers it, in its spot; xy (N, 2) in px."""
        spots, outside = Total(), 0.0
        molecules = np.zeros(np.prod(self.frame.grid), np.int64)
        for px, superpixel, gene, off in self.on_image():
            molecules += np.bincount(superpixel, minlength=len(molecules))
            disc = lattice.disc_of(px, xy, SPOT_RADIUS_PX)
            spots.add(lattice.tally(disc, gene, (len(xy), len(self.genes))))
            outside += off
        molecules = molecules.reshape(self.frame.grid)
        return Counts(molecules, spots.sum(), self.genes, outside, self.grid_of)


# -------------------------------------------------------------------------------------------------
# cells
# -------------------------------------------------------------------------------------------------
@dataclass
class RunCells:
    counts: sparse.csr_array  # (C, G)
    genes: list[str]
    xy: np.ndarray  # (C, 2) centroids, um
    ids: pd.Index
    notes: list[str]


def read_cells(outs: Path) -> RunCells:
    """Cells of the matrix, joined with their centroids on cell_id, never by position."""
    counts, barcodes, features = tenx.read_10x_h5(outs / MATRIX)
    path = section.first_of(outs, CELLS, OUTS_HELP)
    table = read_cell_table(outs, CELLS, ["x_centroid", "y_centroid"]).set_index("cell_id")
    if repeated := utils.duplicates(table.index):
        raise utils.broken(path, f"lists the cells {utils.some(repeated)} more than once.")
    missing = [cell for cell in barcodes if cell not in table.index]
    if missing:
        raise utils.broken(
            path,
            f"has no place for {len(missing)} of {len(barcodes)} cells: {utils.some(missing)}.",
        )
    xy = table.loc[barcodes].to_numpy()
    notes = tenx.dropped_notes(features)
    return RunCells(counts, tenx.gene_names(features), xy, pd.Index(barcodes), notes)


def count_at_centroids(cells: RunCells, frame: RunFrame, xy: np.ndarray) -> Counts:
    """All molecules of a cell at its centroid; xy (N, 2) spot centres in px."""
    px = frame.to_px(cells.xy)
    place = frame.superpixel_of(px)
    spread = lattice.tally(place, np.arange(len(px)), (int(np.prod(frame.grid)), len(px)))
    disc = np.where(place >= 0, lattice.disc_of(px, xy, SPOT_RADIUS_PX), -1)
    return spread_cells(cells, spread, lattice.sum_rows(disc, cells.counts, len(xy)), frame)


def spread_cells(
    cells: RunCells, spread: sparse.csr_array, spots: sparse.csr_array, frame: RunFrame
) -> Counts:
    """Counts by the shares (h * w, C) of the cells in superpixels."""
    molecules = spread @ cells.counts.sum(axis=1)
    outside = max(float(cells.counts.sum() - molecules.sum()), 0.0)
    return Counts(
        molecules.reshape(frame.grid), spots, cells.genes, outside,
        lambda chosen: spread @ cells.counts[:, chosen],
    )  # fmt: skip


def outline_shares(cell: np.ndarray, xy: np.ndarray, n: int) -> tuple[grid.Covered, np.ndarray]:
    """Shares of each cell's area in the superpixels of its outline, adding up to 1 for every cell.

    cell (V,) ascending, xy (V, 2) vertices in superpixels. Also the cells without any area.
    """
    names, size = np.unique(cell, return_counts=True)
    found = grid.polygon_areas(grid.Rings(names, size, np.zeros(len(names), bool), xy))
    total = np.bincount(found.polygon, found.area, n)
    return found._replace(area=found.area / total[found.polygon]), np.flatnonzero(total == 0)


def count_by_area(
    cells: RunCells, outs: Path, frame: RunFrame, xy: np.ndarray
) -> tuple[Counts, int]:
    """Molecules of a cell spread over its outline; also how many have none: by centroid."""
    table = read_cell_table(outs, OUTLINES, ["vertex_x", "vertex_y"])
    cell = cells.ids.get_indexer(pd.Index(table["cell_id"]))
    order = np.flatnonzero(cell >= 0)
    order = order[np.argsort(cell[order], kind="stable")]
    px = frame.to_px(table[["vertex_x", "vertex_y"]].to_numpy()[order])
    shares, bare = outline_shares(cell[order], px / utils.TOKEN_PX, len(cells.ids))
    centroid = np.floor(frame.to_px(cells.xy[bare]) / utils.TOKEN_PX)
    corner = np.concatenate([np.column_stack([shares.col, shares.row]), centroid]) * utils.TOKEN_PX
    owner, weight = np.append(shares.polygon, bare), np.append(shares.area, np.ones(len(bare)))
    h, w = frame.grid
    shape = (h * w, len(cells.ids))
    spread = lattice.tally(frame.superpixel_of(corner), owner, shape, weight)
    centre = superpixel_centres(np.ones(frame.grid, bool))
    disc = lattice.disc_of(centre, xy, SPOT_RADIUS_PX)
    spots = lattice.sum_rows(disc, spread, len(xy)) @ cells.counts
    return spread_cells(cells, spread, spots, frame), len(bare)


# -------------------------------------------------------------------------------------------------
# spots and tissue
# -------------------------------------------------------------------------------------------------
def spot_centres(frame: RunFrame) -> np.ndarray:
    """Spot centres (N, 2) in px, their discs within the image."""
    return lattice.visium_spots(*np.array(frame.size) * utils.PIXEL_SIZE_UM) / utils.PIXEL_SIZE_UM


def find_tissue(counts: Counts, frame: RunFrame) -> np.ndarray:
    """Superpixels (h, w) around which molecules are not far rarer than in most of the section."""
    h, w = frame.grid
    density = uniform_filter(counts.molecules.astype(float), TISSUE_WINDOW, mode="constant")
    dense = density > TISSUE_SHARE * np.median(density[counts.molecules > 0])
    centre = (np.arange(max(h, w)) + 0.5) * utils.TOKEN_PX
    dense[centre[:h] > frame.size[1]] = False  # of the padding of he.jpg
    dense[:, centre[:w] > frame.size[0]] = False
    return dense


def superpixel_centres(chosen: np.ndarray) -> np.ndarray:
    """Centres (K, 2), x and y in px, of the chosen superpixels (h, w)."""
    return (np.argwhere(chosen)[:, ::-1] + 0.5) * utils.TOKEN_PX


def on_slide(chosen: np.ndarray, slide: scans.Slide, to_slide_px: np.ndarray) -> np.ndarray:
    """Which of the chosen superpixels (h, w) have their centre on the slide."""
    xy = project(to_slide_px, superpixel_centres(chosen))
    there = np.zeros_like(chosen)
    there[chosen] = ((xy >= 0) & (xy < slide.size)).all(1)
    return there


# -------------------------------------------------------------------------------------------------
# the section
# -------------------------------------------------------------------------------------------------
def count(
    args: argparse.Namespace, outs: Path
) -> tuple[Counts, RunFrame, np.ndarray, list[str], dict]:
    """Counts, frame, spot centres (N, 2) in px, notes and facts, by whatever --counts says."""
    kind = args.counts_of or ("transcripts" if (outs / MOLECULES).is_file() else "cells")
    if kind == "transcripts":
        path = section.first_of(outs, (MOLECULES,), OUTS_HELP)
        panel = read_panel(outs)
        found = survey(path, panel, args.min_quality)
        frame = make_frame(found.low, found.high, args.region_um)
        xy = spot_centres(frame)
        counts = Molecules(path, panel, args.min_quality, found.genes, frame).count(xy)
        controls = sum(found.controls.values())
        facts = {
            "counts_of": kind, "molecules_read": found.read, "below_quality": found.poor,
            "of_controls": controls, "controls": len(found.controls),
        }  # fmt: skip
        notes = [
            f"{found.poor} of {found.read} molecules are below quality {args.min_quality:g}",
            f"{controls} molecules of {len(found.controls)} controls are left out",
        ]
        return counts, frame, xy, notes, facts
    cells = read_cells(outs)
    frame = make_frame(cells.xy.min(0), cells.xy.max(0), args.region_um)
    xy, notes = spot_centres(frame), cells.notes
    facts = {"counts_of": kind, "cells": len(cells.ids)}
    if kind == "cells":
        return count_at_centroids(cells, frame, xy), frame, xy, notes, facts
    counts, bare = count_by_area(cells, outs, frame, xy)
    if bare:
        notes.append(f"{bare} cells without an outline are counted at their centroids")
    return counts, frame, xy, notes, facts


def prepare(args: argparse.Namespace) -> section.PreparedSection:
    with open_outs(args.outs) as outs:
        slide = images.open_image(args.image)
        run_um = run_pixel_size(outs) if args.alignment else utils.PIXEL_SIZE_UM
        placing = read_placing(args.alignment, run_um, slide, args.pixel_size)
        check_pixel_size(placing, slide, args.pixel_size)
        counts, frame, xy, notes, facts = count(args, outs)
        listed = section.genes_of_option(args.genes, counts.genes)
        to_slide_px = placing.to_slide @ frame.to_um
        dense = find_tissue(counts, frame)
        check_alignment(project(frame.to_um, superpixel_centres(dense)), slide, placing)
        tissue = on_slide(dense, slide, to_slide_px)
        column, row = np.floor(xy / utils.TOKEN_PX).astype(int).T
        in_tissue = tissue[row, column] & (np.asarray(counts.spots.sum(axis=1)).ravel() > 0)
        if not in_tissue.any():
            raise utils.StageError(
                f"None of the {len(xy)} pseudo-spots lies in tissue.",
                "Choose a larger --region-um.",
            )
        spots = counts.spots[np.flatnonzero(in_tissue)]
        chosen = section.choose_truth_genes(listed, counts.genes, spots, args.truth_genes)
        truth = None
        if len(chosen):
            names = [counts.genes[i] for i in chosen]
            truth = section.CountedTruth(counts.grid_of(chosen), tissue, names)
    inside, in_truth = float(counts.molecules.sum()), 0.0 if truth is None else truth.counts.sum()
    facts |= {
        "molecules_in_grid": round(inside, 3),
        "molecules_outside": round(counts.outside, 3),
        "molecules_in_truth": round(float(in_truth), 3),
        "frame_origin_um": frame.origin.tolist(),
        "tissue_superpixels": int(tissue.sum()),
    }
    notes.append(f"{inside:,.0f} molecules lie on the image, {counts.outside:,.0f} off it")
    if truth is not None:
        notes.append(
            f"truth.npz holds {len(truth.genes)} of {len(counts.genes)} genes: {in_truth:,.0f} "
            f"molecules"
        )
    if args.alignment is None:
        notes.append("by --aligned, the image is taken to lie in the frame of the run")
    read = [outs / name for name in sorted(WANTED)] if args.outs.is_dir() else [args.outs]
    sources = [path for path in (args.image, args.alignment, *read) if path and path.is_file()]
    locs = lattice.named_spots(xy)
    return section.PreparedSection(
        image=Aligned(slide, 0, 0, *frame.size, to_slide=to_slide_px),
        pixel_size_um=utils.PIXEL_SIZE_UM,
        locs=locs[in_tissue],
        off_tissue=locs[~in_tissue],
        counts=spots,
        genes=counts.genes,
        truth=truth,
        gene_names=listed,
        notes=notes,
        facts=facts,
        sources=sources,
    )


def run(argv: list[str] | None = None) -> int:
    return sample.run(prepare, SCRIPT, build_parser(), argv)


if __name__ == "__main__":
    sys.exit(run())
