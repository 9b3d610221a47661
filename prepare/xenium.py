"""Turn the output of a Xenium run and its H&E image into a sample with known truth.

    python prepare/xenium.py --outs OUTS --image HE.ome.tif --alignment CSV --directory DIR

Reads   OUTS, a folder or the .zip or .tar.gz of it:
          experiment.xenium                   pixel size of the run's own images, 0.2125 um
          transcripts.parquet, .csv.gz or .zarr.zip    molecules: feature, place and quality
          cell_feature_matrix.h5 or folder, cells.parquet, .csv.gz or .zarr.zip
                                              instead of molecules: --counts-of cells
          cell_boundaries.parquet or .csv.gz, or cells.zarr.zip
                                              the same by area: --counts-of polygons
        HE.ome.tif      H&E of the same section, or any slide that slides.py reads
        CSV             3 x 3 matrix from pixels of the H&E to pixels of the run (Xenium Explorer);
                        --aligned instead of it: the image lies in the frame of the run already
Writes  he-raw.*, pixel-size-raw.txt, locs-raw.csv, cnts.csv.gz, radius-raw.txt, truth.npz; and
        check.png: look at it before you go on.

The image is warped into the frame of the run, tile by tile, at 0.5 um per pixel, so that all
molecules keep their places. Pseudo-Visium spots, discs of 55 um on the hexagonal lattice of 100 um,
add up what lies in them; truth.npz counts what lies in each superpixel of 8 um:
* transcripts: every molecule of quality 20 or more, where it is (the default);
* cells: all molecules of a cell at its centroid;
* polygons: the molecules of a cell over the superpixels in proportion to the area that its outline
  shares with them; a spot then adds up the superpixels whose centres it covers.
Controls, blank, unassigned and deprecated codewords, and what has no name or place are left out,
and counted by kind in prepare.json. Of several forms of a file the first one there is read. Of a
large panel truth.npz holds the genes that vary most between spots (--truth-genes), counted in a
pass of their own: the grid in memory grows with them, not with the panel.

Frames. "um" is the frame of the run, from its upper left corner; "px" the image that is written.
Letters in shapes: M molecules, C cells, N spots, G genes, h x w superpixels.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import utils
from prepare import options
from reading import cli

SCRIPT = "prepare/xenium.py"
MIN_QUALITY = 20.0  # Phred-scaled; what the vendor's own cell matrix counts


def build_parser() -> cli.Parser:
    parser = options.prepare_parser(__doc__)
    finite = cli.number(float, lambda x: abs(x) < 1e9, "a number")
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
        "--min-quality", type=finite, default=MIN_QUALITY, metavar="Q",
        help="Ignore molecules with a quality below this",
    )  # fmt: skip
    options.add_truth_genes(parser)
    parser.add_argument(
        "--region-um", type=finite, nargs=4, metavar=("X", "Y", "WIDTH", "HEIGHT"),
        help="Part of the section, um of the run (default: all molecules and a margin).",
    )  # fmt: skip
    parser.alias("--region", "--region-um")
    return parser


if __name__ == "__main__":
    cli.start(build_parser(), SCRIPT)  # what needs none of the slow imports below

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import sparse
from scipy.ndimage import uniform_filter

from method import grid
from prepare import images, lattice, sample, scans, section, tenx
from prepare import xenium_files as files
from prepare.aligned import Aligned, check_alignment, check_pixel_size, project, read_placing

SPOT_RADIUS_PX = utils.VISIUM_RADIUS_UM / utils.PIXEL_SIZE_UM
MAX_CELL_UM = 2000.0  # side of the box around an outline
FAR_UM = 1e6  # no section is a metre wide
MARGIN_UM = 50.0  # around the molecules
TISSUE_WINDOW = 5  # superpixels, 40 um: local density
TISSUE_SHARE = 0.1  # of the median density; diffused molecules off the tissue are far below


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
    if not (size.min() >= utils.TILE_PX and size.prod() <= utils.MAX_MEGAPIXELS * 1e6):
        raise utils.StageError(
            f"The section would be {size[0]:.0f} x {size[1]:.0f} px at {utils.PIXEL_SIZE_UM} um; "
            f"expected at least {utils.TILE_PX} px a side, and {utils.MAX_MEGAPIXELS} megapixels.",
            f"Choose a {'larger' if size.min() < utils.TILE_PX else 'smaller'} part of the run: "
            f"--region-um X Y WIDTH HEIGHT.",
        )
    return RunFrame(origin, (int(size[0]), int(size[1])))


# -------------------------------------------------------------------------------------------------
# molecules
# -------------------------------------------------------------------------------------------------
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
class CountedMolecules:
    """The molecules in the frame of the image."""

    molecules: files.Molecules
    genes: list[str]
    frame: RunFrame

    def on_image(self) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, int]]:
        """px (M, 2), superpixel (M,) and gene (M,) of those that count and lie on the image, and
        how many lie off it, a batch at a time."""
        index = pd.Index(self.genes)
        for batch, counts, *_ in self.molecules.counted():
            gene = index.get_indexer(pd.Index(batch.features))[batch.feature[counts]]
            px = self.frame.to_px(batch.xy[counts])
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
    counts, barcodes, features = files.read_matrix(outs)
    path, table = files.read_centroids(outs)
    missing = [cell for cell in barcodes if cell not in table.index]
    if missing:
        raise utils.StageError(
            f"{path} has no place for {len(missing)} of {len(barcodes)} cells: "
            f"{utils.some(missing)}; its own are like {utils.some(table.index)}.",
            files.ONE_RUN,
        )
    xy, notes = table.loc[barcodes].to_numpy(float), tenx.dropped_notes(features)
    placed = np.isfinite(xy).all(axis=1)
    if lost := int((~placed).sum()):
        molecules = counts[np.flatnonzero(~placed)].sum()
        notes.append(f"{lost} cells without a place, {molecules:,.0f} molecules, are left out")
    if not placed.any():
        raise utils.StageError(f"{path} has no place for any cell.", files.ONE_RUN)
    return RunCells(
        counts[np.flatnonzero(placed)], tenx.gene_names(features), xy[placed],
        pd.Index(barcodes)[placed], notes,
    )  # fmt: skip


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


def too_large(cell: np.ndarray, xy: np.ndarray) -> np.ndarray:
    """Which vertices (V,) belong to an outline larger than any cell: one vertex far away would
    have it cover the whole plane. xy (V, 2) in um; cell -1 is none."""
    low, high = (np.full((cell.max(initial=-1) + 1, 2), fill) for fill in (np.inf, -np.inf))
    known = cell >= 0
    np.minimum.at(low, cell[known], xy[known])
    np.maximum.at(high, cell[known], xy[known])
    large = ~((high - low <= MAX_CELL_UM) & (np.abs(low) < FAR_UM)).all(axis=1)
    return known & np.append(large, False)[cell]


def count_by_area(
    cells: RunCells, outs: Path, frame: RunFrame, xy: np.ndarray
) -> tuple[Counts, int]:
    """Molecules of a cell spread over its outline; also how many have none: by centroid."""
    table = files.read_outlines(outs)
    cell = cells.ids.get_indexer(pd.Index(table["cell_id"]))
    cell[too_large(cell, table[["vertex_x", "vertex_y"]].to_numpy())] = -1
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
    there = any((outs / name).is_file() for name in files.MOLECULES)
    kind = args.counts_of or ("transcripts" if there else "cells")
    if kind == "transcripts":
        path = files.need_one(outs, files.MOLECULES, "molecules", "; or take --counts-of cells")
        molecules = files.Molecules(path, args.min_quality)
        found = files.survey(molecules)
        frame = make_frame(found.low, found.high, args.region_um)
        xy = spot_centres(frame)
        counts = CountedMolecules(molecules, found.genes, frame).count(xy)
        facts = {
            "counts_of": kind, "molecules_read": found.read, "below_quality": found.poor,
            "of_controls": found.kinds.total(), "controls": len(found.controls),
            "left_out": dict(sorted(found.kinds.items())),
        }  # fmt: skip
        return counts, frame, xy, found.notes(args.min_quality), facts
    cells = read_cells(outs)
    frame = make_frame(cells.xy.min(0), cells.xy.max(0), args.region_um)
    xy, notes = spot_centres(frame), cells.notes
    facts = {"counts_of": kind, "cells": len(cells.ids)}
    if args.counts_of is None:
        notes.append(f"none of {', '.join(files.MOLECULES)} is there: cells are counted")
    if kind == "cells":
        return count_at_centroids(cells, frame, xy), frame, xy, notes, facts
    counts, bare = count_by_area(cells, outs, frame, xy)
    if bare:
        notes.append(f"{bare} cells without a sound outline are counted at their centroids")
    return counts, frame, xy, notes, facts


def prepare(args: argparse.Namespace) -> section.PreparedSection:
    with files.open_outs(args.outs) as outs:
        slide = images.open_image(args.image)
        run_um = files.run_pixel_size(outs) if args.alignment else utils.PIXEL_SIZE_UM
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
                "Choose a larger --region-um." if args.region_um else "Give a whole section.",
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
    if np.linalg.det(placing.to_slide[:2, :2]) < 0:
        notes.append("the alignment mirrors the H&E: see in check.png that the section fits")
    if args.alignment is None:
        notes.append("by --aligned, the image is taken to lie in the frame of the run")
    packed = args.outs.is_file()
    read = [args.outs] if packed else files.files_read(outs, facts["counts_of"])
    sources = [path for path in (args.image, args.alignment, *read) if path]
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
