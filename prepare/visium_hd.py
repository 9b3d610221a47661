"""Turn the binned outputs of Space Ranger (Visium HD) into a sample of pseudo-Visium spots, with
the bins themselves as truth.

    python prepare/visium_hd.py --outs OUTS --image FULLRES --directory DIR

Reads   OUTS/binned_outputs/square_002um/ (or 008um, 016um: the finest there, or --bin)
            filtered_feature_bc_matrix.h5, spatial/tissue_positions.parquet
        FULLRES   the microscope image that Space Ranger was given
Writes  he-raw.*, pixel-size-raw.txt, locs-raw.csv, cnts.csv.gz, radius-raw.txt; check.png;
        truth.npz for analysis/evaluate.py.

Pseudo-spots. Visium's lattice, 100 um apart in rows of 86.6 um, lies along the axes of the bins as
a slide's does, however the section is turned or mirrored in the image. A spot is the sum of the
bins in tissue whose centre lies within 27.5 um of its own; it is in tissue if they fill at least
half of its disc.

Truth. Counts per superpixel of he.jpg. A bin is cut into squares of at most 0.5 um, one px of
he.jpg; each passes its share of the counts to the superpixel that its centre lies in. The shares
of a bin add up to one, so every molecule in tissue is in the truth once, or is reported as outside
of the image. A superpixel is tissue if bins in tissue cover at least half of it.

Memory. A section has about 11 million bins of 2 um. The matrix is read in blocks of bins, twice;
what stays in memory is the position of a bin and the sums.

Letters in shapes: B bins in tissue, S spots, G genes, k squares along the side of a bin.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import utils
from prepare import options
from reading import cli

SCRIPT = "prepare/visium_hd.py"


def build_parser() -> cli.Parser:
    parser = options.prepare_parser(__doc__)
    options.add_space_ranger_options(parser)
    parser.add_argument(
        "--bin", choices=("002", "008", "016"),
        help="Bins to read, in um (default: the finest that are there).",
    )  # fmt: skip
    options.add_truth_genes(parser)
    return parser


if __name__ == "__main__":
    cli.start(build_parser(), SCRIPT)  # what needs none of the slow imports below

import numpy as np
import pandas as pd
import pyarrow
import pyarrow.parquet
from scipy import sparse

from method.calibration import machine_memory
from prepare import images, lattice, sample, section, tenx
from reading import plain

BIN_FOLDERS = ("square_002um", "square_008um", "square_016um")
POSITIONS = "tissue_positions.parquet"
COLUMNS = list(tenx.COLUMNS[1:])
BARCODE = "s_000um_00000_00000-"  # size, array_row, array_col
SQUARE_UM = utils.PIXEL_SIZE_UM  # side of the squares into which a bin is cut: one px of he.jpg
MIN_COVER = 0.5  # share of a spot or superpixel that bins in tissue must cover
FITTED_BINS = 250_000  # enough to fit the lattice to
BINS_PER_BLOCK, VALUES_PER_BLOCK = 200_000, 4_000_000  # read at a time, whichever comes first


@dataclass
class Bins:
    """The bins in tissue; ``index`` (array rows, array columns) gives their number or -1."""

    size_um: float
    xy: np.ndarray  # (B, 2) centres, px of full resolution
    index: np.ndarray
    array: lattice.FittedArray  # um along array_col and array_row from the corner of the array
    n_all: int  # with those off the tissue
    extent_um: tuple[float, float]  # width and height of the array


# -------------------------------------------------------------------------------------------------
# bins
# -------------------------------------------------------------------------------------------------
def find_bins(outs: Path, wanted: str | None) -> Path:
    """The folder of the bins: the one wanted, or the finest there."""
    if outs.name in BIN_FOLDERS and (outs / "spatial").is_dir():
        return outs
    for folder in (outs, outs / "outs"):
        tenx.refuse_other_outputs(folder, bins=True)
    folders = [outs / "binned_outputs", outs / "outs" / "binned_outputs", outs]
    names = BIN_FOLDERS if wanted is None else (f"square_{wanted}um",)
    for name in names:
        for folder in folders:
            if (folder / name).is_dir():
                return folder / name
    raise utils.StageError(
        f"{outs} has no binned_outputs with {' or '.join(names)}.",
        "Give the folder outs of Space Ranger 3 or later. Downloads hold binned_outputs as a "
        ".tar.gz: unpack it there. For Visium without HD, run: python prepare/visium.py",
    )


def read_bins(path: Path, size_um: float) -> Bins:
    """Positions of all bins, a batch at a time; kept are those in tissue."""
    if not path.is_file():
        raise utils.StageError(f"{path} is missing.", tenx.SPACE_RANGER)
    kept: list[np.ndarray] = []  # array_row, array_col
    xy: list[np.ndarray] = []
    to_fit: list[np.ndarray] = []
    n_all, last = 0, np.zeros(2)
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            missing = sorted({"barcode", *COLUMNS} - set(file.schema_arrow.names))
            if missing:
                raise utils.broken(path, f"has no column {', '.join(missing)}.")
            step = max(1, file.metadata.num_rows // FITTED_BINS)
            for batch in file.iter_batches(columns=COLUMNS):
                table = read_batch(batch, path, n_all)
                to_fit.append(table[(-n_all) % step :: step])
                in_tissue = table[:, 0] > 0
                kept.append(table[in_tissue, 1:3].astype(np.int32))
                xy.append(table[in_tissue][:, [4, 3]])
                n_all += len(table)
                last = np.maximum(last, table[:, 1:3].max(axis=0, initial=0))
    except (pyarrow.ArrowException, OSError, ValueError, TypeError) as error:
        if isinstance(error, utils.StageError) or plain.of_system(error):
            raise
        raise utils.broken(path, f"is no whole table of positions: {error}") from error
    places = np.concatenate([np.empty((0, 2), np.int32), *kept])
    if len(places) == 0:
        raise utils.StageError(
            f"{path}: none of its {n_all} bins is in tissue.", "See that Space Ranger found tissue."
        )
    _, row, col, y, x = np.concatenate(to_fit).T
    places_um = np.column_stack([col + 0.5, row + 0.5]) * size_um
    array = lattice.fit_array(places_um, np.column_stack([x, y]), path)
    index = np.full(places.max(0) + 1, -1, np.int32)
    index[tuple(places.T)] = np.arange(len(places), dtype=np.int32)
    if (index >= 0).sum() != len(places):
        raise utils.broken(path, "lists bins more than once.")
    return Bins(
        size_um=size_um,
        xy=np.concatenate(xy),
        index=index,
        array=array,
        n_all=n_all,
        extent_um=(float(last[1] + 1) * size_um, float(last[0] + 1) * size_um),
    )


def read_batch(batch: pyarrow.RecordBatch, path: Path, above: int) -> np.ndarray:
    """float64 (n, len(COLUMNS)); in_tissue may be numbers, logical, or words."""
    columns = [pd.Series(batch[name].to_numpy(False), name=name) for name in COLUMNS]
    if columns[0].dtype.kind not in "iufb":
        columns[0] = pd.Series(section.as_flags(columns[0], path, above))
    numbers = [section.as_numbers(column, path, above=above) for column in columns]
    return np.column_stack(numbers)


def check_lattice(bins: Bins, path: Path, said_um: float | None) -> None:
    """Stop if the bins are not a square lattice, or not of the size that the file says."""
    array, pixel_size = bins.array, bins.array.pixel_size_um
    along, across = array.px_per_um * bins.size_um
    if array.skew > tenx.MAX_SKEW or array.residual_um > tenx.MAX_RESIDUAL_UM:
        raise utils.StageError(
            f"{path} holds no square lattice of bins: they are {along:.3f} px apart along "
            f"array_col and {across:.3f} px along array_row, off by {array.residual_um:.1f} um.",
            f"See that its columns are {', '.join(COLUMNS)}, row before column.",
        )
    if said_um and abs(pixel_size / said_um - 1) > images.MAX_PIXEL_SIZE_ERROR:
        raise utils.StageError(
            f"{path}: bins of {bins.size_um:g} um are {along:.3f} px apart, so a pixel is "
            f"{bins.size_um:g} / {along:.3f} = {pixel_size:.4g} um; microns_per_pixel of "
            f"{tenx.SCALE_FACTORS} says {said_um:.4g}.",
            "Positions and scale factors are of two bin sizes or sections; give those of one.",
        )


def bin_places(barcodes: np.ndarray, size_um: float, path: Path) -> tuple[np.ndarray, np.ndarray]:
    """(array_row, array_col) of barcodes such as s_002um_00012_00345-1, bytes (n,)."""
    text = np.ascontiguousarray(barcodes.astype("S"))
    letters = text.view(np.uint8).reshape(len(text), text.dtype.itemsize)
    pattern = np.frombuffer(BARCODE.encode(), np.uint8)
    fixed = pattern != ord("0")
    if letters.shape[1] >= len(pattern):
        head = letters[:, : len(pattern)]
        digits = head[:, ~fixed] - np.uint8(ord("0"))  # wraps round, so that letters are above 9
        if (digits <= 9).all() and (head[:, fixed] == pattern[fixed]).all():
            powers = 10 ** np.arange(5)[::-1]
            row, col = digits[:, 3:8] @ powers, digits[:, 8:] @ powers
            if (digits[:, :3] @ powers[2:] == size_um).all():
                return row, col
    raise utils.broken(
        path,
        f"has barcodes such as {tenx.decode(text[:1])[0]!r}; expected {size_um:g} um bins like "
        f"s_{size_um:03.0f}um_00012_00345-1.",
    )


# -------------------------------------------------------------------------------------------------
# the matrix, a block of bins at a time
# -------------------------------------------------------------------------------------------------
@dataclass
class BinMatrix:
    """The file of counts, opened again for every pass; only ``features`` is in memory."""

    path: Path
    keep: np.ndarray  # rows of the file that are genes
    features: pd.DataFrame  # of those genes

    def blocks(self, bins: Bins) -> Iterator[tuple[np.ndarray, sparse.csr_array]]:
        """(number in ``bins`` or -1 (n,), counts (n, genes)) of every bin of the file, once."""
        with tenx.open_h5(self.path) as group:
            n_features, n_bins = (int(n) for n in group["shape"][:])
            indptr = group["indptr"][:].astype(np.int64)
            start = 0
            while start < n_bins:
                by_values = np.searchsorted(indptr, indptr[start] + VALUES_PER_BLOCK) - 1
                stop = int(np.clip(by_values, start + 1, min(start + BINS_PER_BLOCK, n_bins)))
                first, last = indptr[start], indptr[stop]
                data, indices = group["data"][first:last], group["indices"][first:last]
                pointers = (indptr[start : stop + 1] - first).astype(np.int32)
                shape = (stop - start, n_features)
                block = sparse.csr_array(
                    (data.astype(np.float64), indices.astype(np.int32), pointers), shape=shape
                )
                block.check_format(full_check=True)
                places = bin_places(group["barcodes"][start:stop], bins.size_um, self.path)
                yield numbers(bins.index, *places), block[:, self.keep]
                start = stop


def numbers(index: np.ndarray, row: np.ndarray, col: np.ndarray) -> np.ndarray:
    """Number of the bin at (row, col); -1 if it is not in tissue."""
    known = (row < index.shape[0]) & (col < index.shape[1])
    return np.where(known, index[np.where(known, row, 0), np.where(known, col, 0)], -1)


def open_matrix(path: Path) -> BinMatrix:
    if path.is_dir():
        raise utils.StageError(
            f"{path} is a folder of tables; bins of HD are read from {path.name}.h5.",
            "Put that file beside it: Space Ranger writes both.",
        )
    with tenx.open_h5(path) as group:
        shape = tuple(int(n) for n in group["shape"][:])
        features = tenx.read_h5_features(group)
        indptr = group["indptr"]
        whole = len(indptr) == shape[1] + 1 and indptr[-1] == len(group["data"])
        if not whole or len(features) != shape[0] or len(group["barcodes"]) != shape[1]:
            raise utils.broken(path, f"is damaged: its parts do not fit a matrix of {shape}.")
    kinds = tenx.kinds_of(features)
    keep = np.flatnonzero(kinds == tenx.KEPT_TYPE)
    kept = features.iloc[keep].reset_index(drop=True)
    kept.attrs["dropped"] = kinds.drop(keep).value_counts().to_dict()
    return BinMatrix(path, keep, kept)


# -------------------------------------------------------------------------------------------------
# pseudo-spots
# -------------------------------------------------------------------------------------------------
def lattice_of_spots(bins: Bins) -> np.ndarray:
    """Centres (S, 2), px of full resolution, of all whole discs on the array of bins."""
    width, height = bins.extent_um
    centres_um = lattice.visium_spots(width, height)
    if len(centres_um) == 0:
        raise utils.StageError(
            f"The bins reach over {width:g} x {height:g} um only, less than one spot.",
            "Give a whole section.",
        )
    return bins.array.place(centres_um)


def discs_of_bins(bins: Bins, centres: np.ndarray) -> np.ndarray:
    """Number of the spot whose disc holds the centre of a bin, int32 (B,); -1 for none."""
    disc = np.empty(len(bins.xy), np.int32)
    radius = utils.VISIUM_RADIUS_UM / bins.array.pixel_size_um
    for start in range(0, len(disc), BINS_PER_BLOCK):
        part = slice(start, start + BINS_PER_BLOCK)
        disc[part] = lattice.disc_of(bins.xy[part], centres, radius)
    return disc


def spots_in_tissue(bins: Bins, disc: np.ndarray, n_spots: int) -> np.ndarray:
    """Which spots are filled by bins in tissue to at least MIN_COVER: bool (S,)."""
    per_disc = np.pi * utils.VISIUM_RADIUS_UM**2 / bins.size_um**2
    return np.bincount(disc[disc >= 0], minlength=n_spots) >= MIN_COVER * per_disc


def sum_spots(
    matrix: BinMatrix, bins: Bins, disc: np.ndarray, n_spots: int
) -> tuple[sparse.csr_array, float]:
    """Counts (S, G) of the spots, and the molecules of the whole file."""
    total, molecules = sparse.csr_array((n_spots, len(matrix.keep))), 0.0
    for number, block in matrix.blocks(bins):
        target = np.where(number >= 0, disc[number], -1)
        total = total + lattice.sum_rows(target, block, n_spots)
        molecules += float(block.sum())
    return total, molecules


# -------------------------------------------------------------------------------------------------
# truth
# -------------------------------------------------------------------------------------------------
@dataclass
class TruthGrid:
    """Superpixels of he.jpg in the frame of the bins, and the squares of a bin."""

    shape: tuple[int, int]  # h, w
    left_top: np.ndarray  # (2,) px of full resolution
    factor: np.ndarray  # (2,) superpixels per px of full resolution, along x and y
    offsets: np.ndarray  # (k * k, 2) px of full resolution, from the centre of a bin

    def cells(self, xy: np.ndarray) -> np.ndarray:
        """Superpixel (n, k * k) of each square of the bins at ``xy`` (n, 2); -1 off the map."""
        at = (xy[:, None] + self.offsets - self.left_top) * self.factor
        return lattice.superpixel_of(at, self.shape)


def make_grid(bins: Bins, written: tenx.WrittenImage) -> TruthGrid:
    shape, factor = lattice.superpixel_grid(
        images.image_shape(written.image), written.pixel_size_um
    )
    k = int(np.ceil(bins.size_um / SQUARE_UM))
    steps = ((np.arange(k) + 0.5) / k - 0.5) * bins.size_um
    along, across = np.meshgrid(steps, steps)
    offsets = np.column_stack([along.ravel(), across.ravel()]) @ bins.array.axes
    return TruthGrid(shape, np.array(written.left_top), factor * written.scale, offsets)


def cover(bins: Bins, grid: TruthGrid) -> np.ndarray:
    """Share (h, w) of each superpixel that bins in tissue cover."""
    h, w = grid.shape
    squares = np.zeros(h * w + 1, np.int64)  # the last one counts those off the map
    for start in range(0, len(bins.xy), BINS_PER_BLOCK):
        cells = grid.cells(bins.xy[start : start + BINS_PER_BLOCK])
        squares += np.bincount(np.where(cells < 0, h * w, cells).ravel(), minlength=h * w + 1)
    area = bins.size_um**2 / len(grid.offsets) / utils.SUPERPIXEL_UM**2
    return squares[:-1].reshape(h, w) * area


def sum_superpixels(
    matrix: BinMatrix, bins: Bins, grid: TruthGrid, genes: np.ndarray
) -> tuple[np.ndarray, dict[str, float]]:
    """Counts (h, w, genes) by area, float32, and where all molecules of these genes are."""
    n_cells, share = grid.shape[0] * grid.shape[1], 1 / len(grid.offsets)
    total = np.zeros((n_cells, len(genes)), np.float32)
    molecules = {"all": 0.0, "in truth": 0.0, "bins not in tissue": 0.0, "off the image": 0.0}
    for number, block in matrix.blocks(bins):
        used = number >= 0
        block = block[:, genes]
        per_bin = np.asarray(block.sum(axis=1)).ravel()
        cells = grid.cells(bins.xy[number[used]])
        owner = np.repeat(np.arange(len(cells)), cells.shape[1])
        shares = lattice.tally(cells.ravel(), owner, (n_cells, len(cells))) * share
        part = shares @ block[np.flatnonzero(used)]
        total[np.repeat(np.arange(n_cells), np.diff(part.indptr)), part.indices] += part.data
        lost = 1 - np.asarray(shares.sum(axis=0)).ravel()
        molecules["all"] += float(per_bin.sum())
        molecules["bins not in tissue"] += float(per_bin[~used].sum())
        molecules["off the image"] += float(lost @ per_bin[used])
    molecules["in truth"] = float(total.sum(dtype=np.float64))
    return total.reshape(*grid.shape, len(genes)), molecules


def check_memory(grid: TruthGrid, n_genes: int) -> None:
    need, there = 4 * grid.shape[0] * grid.shape[1] * n_genes, machine_memory()
    if there is not None and need > there:
        raise utils.StageError(
            f"The truth of {grid.shape[0]} x {grid.shape[1]} superpixels and {n_genes} genes needs "
            f"{need / 1e9:.1f} GB of memory; there are {there / 1e9:.1f} GB.",
            "Name fewer genes, by --truth-genes N or --genes, or leave it out: --truth-genes 0.",
        )


def make_truth(
    matrix: BinMatrix, bins: Bins, written: tenx.WrittenImage, chosen: np.ndarray, genes: list[str]
) -> tuple[section.CountedTruth | None, dict[str, float]]:
    """Truth of the chosen genes, and where their molecules are; none if no gene is chosen."""
    if not len(chosen):
        return None, {}
    grid = make_grid(bins, written)
    check_memory(grid, len(chosen))
    counts, where = sum_superpixels(matrix, bins, grid, chosen)
    tissue = cover(bins, grid) >= MIN_COVER
    return section.CountedTruth(counts, tissue, [genes[i] for i in chosen]), where


# -------------------------------------------------------------------------------------------------
# the section
# -------------------------------------------------------------------------------------------------
def prepare(args: argparse.Namespace) -> section.PreparedSection:
    folder = find_bins(args.outs, args.bin)
    size_um = float(folder.name[len("square_") : -len("um")])
    spatial = tenx.read_spatial(folder / "spatial")
    positions_path = folder / "spatial" / POSITIONS
    matrix = open_matrix(tenx.find_matrix(folder))
    bins = read_bins(positions_path, size_um)
    check_lattice(bins, positions_path, spatial.microns_per_pixel)

    centres = lattice_of_spots(bins)
    disc = discs_of_bins(bins, centres)
    in_tissue = spots_in_tissue(bins, disc, len(centres))
    places = lattice.named_spots(centres)
    if not in_tissue.any():
        raise utils.StageError("No pseudo-spot is in tissue.", "Give a section with more tissue.")
    pixel_size = bins.array.pixel_size_um
    written, notes = tenx.choose_image(args, places[in_tissue], pixel_size, spatial)
    spots, molecules = sum_spots(matrix, bins, disc, len(centres))
    genes = tenx.gene_names(matrix.features)
    listed = section.genes_of_option(args.genes, genes)
    in_spots = spots[np.flatnonzero(in_tissue)]
    chosen = section.choose_truth_genes(listed, genes, in_spots, args.truth_genes)
    truth, where = make_truth(matrix, bins, written, chosen, genes)
    if truth is not None:
        notes.append(
            f"truth.npz holds {len(chosen)} of {len(genes)} genes: {where['in truth']:,.0f} of "
            f"{where['all']:,.0f} molecules; {where['bins not in tissue']:,.0f} are of bins off "
            f"the tissue, {where['off the image']:,.0f} off the image"
        )
    notes += lattice.mirror_notes(bins.array, from_the_back=True)  # HD is CytAssist always
    if size_um > 2:
        notes.append(f"bins of {size_um:g} um: pseudo-spots are coarser than from {BIN_FOLDERS[0]}")
    dropped = matrix.features.attrs["dropped"]
    notes += [f"{n} features of type {kind} are left out" for kind, n in dropped.items()]
    return section.PreparedSection(
        image=written.image,
        pixel_size_um=written.pixel_size_um,
        locs=written.move(places[in_tissue]),
        counts=in_spots,
        genes=genes,
        gene_names=listed,
        pitch_um=utils.VISIUM_PITCH_UM,
        truth=truth,
        off_tissue=written.move(places[~in_tissue]),
        array=written.move(places),
        scales=spatial.scales,
        sources=[args.image, matrix.path, positions_path, *spatial.files()],
        facts={
            "bin_um": size_um,
            "bins": bins.n_all,
            "bins_in_tissue": len(bins.xy),
            "array_mirrored": bins.array.mirrored,
            "full_resolution_um_per_px": pixel_size,
            "lattice_residual_um": bins.array.residual_um,
            "molecules_of_source": molecules,
            "molecules_of_truth_genes": where,
        },
        notes=notes,
    )


def run(argv: list[str] | None = None) -> int:
    return sample.run(prepare, SCRIPT, build_parser(), argv)


if __name__ == "__main__":
    sys.exit(run())
