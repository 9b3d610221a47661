"""What the programs of 10x write: matrices (.h5 files, folders of matrix.mtx) of Cell Ranger, Space
Ranger and Xenium; Space Ranger's folder spatial, and the image that it belongs to.
"""

from __future__ import annotations

import argparse
import contextlib
import shlex
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image
from scipy import sparse
from scipy.io import mmread

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import utils
from prepare import images, lattice
from prepare.section import first_of, reading_table, unfit, unique_symbols
from reading import plain
from utils import broken

KEPT_TYPE = "Gene Expression"  # of 10x feature types; the others are controls and antibodies
WITHDRAWN = "DEPRECATED_"  # how ids and names of probes begin that 10x counts no more
HDF5_PACKING = 1100  # times that its gzip can make values smaller, at most
MATRICES = "Give filtered_feature_bc_matrix.h5, which Space Ranger writes into outs."
OTHER_H5 = {  # what else an .h5 file may be, by what lies in it
    "obs": "AnnData (for that, run: python prepare/scverse.py --h5ad FILE)",
    "barcode_idx": "single molecules (molecule_info.h5)",
    "feature_slices": "pictures of the genes (feature_slice.h5)",
}
MATRIX = "filtered_feature_bc_matrix"  # an .h5 file, or a folder of these:
MTX, BARCODES = ("matrix.mtx.gz", "matrix.mtx"), ("barcodes.tsv.gz", "barcodes.tsv")
FEATURES = ("features.tsv.gz", "features.tsv", "genes.tsv.gz", "genes.tsv")
COLUMNS = (  # of tissue_positions
    "barcode", "in_tissue", "array_row", "array_col", "pxl_row_in_fullres", "pxl_col_in_fullres",
)  # fmt: skip
HIRES_IMAGE, SCALE_FACTORS = "tissue_hires_image.png", "scalefactors_json.json"
CYTASSIST_IMAGE = "cytassist_image.tiff"
HIRES_SCALE, MICRONS = "tissue_hires_scalef", "microns_per_pixel"
SCALES = (HIRES_SCALE, "tissue_lowres_scalef")
SIZE_TOLERANCE_PX = 1.5  # of the hires image, whose sides Space Ranger rounds
SAME_SHAPE = 0.003  # relative difference of the sides' ratio, of a copy at another scale
COLUMN_UM = utils.VISIUM_PITCH_UM / 2  # array_col counts half pitches: neighbours are 2 apart
ROW_UM = utils.VISIUM_PITCH_UM * np.sqrt(3) / 2
MAX_SKEW = 0.05  # of a fitted array of spots or bins, see FittedArray
MAX_RESIDUAL_UM = 20.0  # of a position from the fitted array, root mean square
SPACE_RANGER = "Give --outs the outs folder that Space Ranger wrote (with its folder spatial)."


# -------------------------------------------------------------------------------------------------
# matrices
# -------------------------------------------------------------------------------------------------
def read_10x(path: Path) -> tuple[sparse.csr_array, list[str], pd.DataFrame]:
    """A matrix from a file or a folder, see read_10x_h5 and read_10x_mtx."""
    return read_10x_mtx(path) if path.is_dir() else read_10x_h5(path)


def read_10x_h5(path: Path) -> tuple[sparse.csr_array, list[str], pd.DataFrame]:
    """Counts (barcodes, genes), barcodes, and features (id, name, type) of a 10x .h5 matrix.

    Space Ranger 1 to 4, Xenium, and Cell Ranger 2, whose genomes (a group each) are put side by
    side. Features other than genes are dropped; ``features.attrs["dropped"]`` counts them: type ->
    (features, molecules).
    """
    with open_groups(path) as groups:
        read = {name: read_group(group) for name, group in groups.items()}
    counts, barcodes, features = join_genomes(read)
    counts, barcodes, features = keep_genes(counts, barcodes, features, path)
    features.attrs["genomes"] = list(read) if len(read) > 1 else []
    return counts, barcodes, features


def read_group(group: Any) -> tuple[sparse.csr_array, list[str], pd.DataFrame]:
    shape = tuple(int(n) for n in group["shape"][:])
    parts = (group[key][:] for key in ("data", "indices", "indptr"))
    data, indices, indptr = (np.asarray(part) for part in parts)
    if data.dtype.kind == "f":  # scipy's sums know no numbers of 16 bits
        data = data.astype(np.float64)
    counts = sparse.csr_array((data, indices, indptr), shape=shape[::-1])
    counts.check_format(full_check=True)
    return counts, decode(group["barcodes"][:]), read_h5_features(group)


def join_genomes(
    read: dict[str, tuple[sparse.csr_array, list[str], pd.DataFrame]],
) -> tuple[sparse.csr_array, list[str], pd.DataFrame]:
    """One matrix of those of several genomes, joined by barcode; genes that share an id with one of
    another genome have the genome's name before their own."""
    if len(read) == 1:
        return next(iter(read.values()))
    barcodes = list(dict.fromkeys(name for _, names, _ in read.values() for name in names))
    place = pd.Index(barcodes)
    counts = [
        lattice.sum_rows(place.get_indexer(pd.Index(names)), part, len(barcodes))
        for part, names, _ in read.values()
    ]
    features = pd.concat([table.assign(genome=name) for name, (*_, table) in read.items()])
    shared = features["id"].duplicated(keep=False)
    for column in ("id", "name"):
        named = features["genome"] + "_" + features[column]
        features[column] = features[column].mask(shared, named)
    kept = features.drop(columns="genome").reset_index(drop=True)
    return sparse.hstack(counts, format="csr"), barcodes, kept


@contextlib.contextmanager
def open_groups(path: Path) -> Iterator[dict[str, Any]]:
    """The groups of a 10x .h5 file that hold a matrix: one, or with Cell Ranger 2 one a genome."""
    import h5py

    if not path.is_file():
        raise utils.StageError(f"{path} is missing.", "Give the folder that Space Ranger wrote.")
    try:
        with h5py.File(path) as file:
            groups = {
                name: group
                for name, group in file.items()
                if isinstance(group, h5py.Group) and "indptr" in group
            }
            if not groups or "obs" in file:
                other = [what for name, what in OTHER_H5.items() if name in file]
                found = other[0] if other else f"the groups {utils.some(file) or 'none'}"
                raise utils.StageError(f"{path} holds {found}; expected a 10x matrix.", MATRICES)
            check_declared(path, groups)
            for group in groups.values():
                check_matrix(path, group)
            yield groups
    except utils.StageError:
        raise
    except (OSError, KeyError, RuntimeError, ValueError, TypeError) as error:
        if plain.of_system(error):
            raise
        raise broken(path, f"is no whole 10x matrix in HDF5: {error}") from error


def check_declared(path: Path, groups: dict[str, Any]) -> None:
    """Stop if a file declares more values than its bytes can hold, before memory is taken."""
    sizes: list[int] = []
    for group in groups.values():
        group.visititems(lambda _, node: sizes.append(getattr(node, "nbytes", 0)))
    if sum(sizes) > HDF5_PACKING * path.stat().st_size:
        raise broken(
            path,
            f"declares {sum(sizes) / 1e9:,.1f} GB of values, which its {path.stat().st_size:,} "
            f"bytes cannot hold.",
        )


def check_matrix(path: Path, group: Any) -> None:
    """Stop if the arrays of a sparse matrix are not lists of numbers."""
    for name in ("data", "indices", "indptr", "shape"):
        array = group[name]
        sound = array.ndim == 1 and array.dtype.kind in "iuf"  # places as float64 occur, too
        if not sound or (name == "shape" and array.size != 2):
            raise broken(
                path,
                f"is damaged: its {name} is {array.dtype} {array.shape}; expected a list of "
                f"{'two numbers' if name == 'shape' else 'numbers'}.",
            )


@contextlib.contextmanager
def open_h5(path: Path) -> Iterator[Any]:
    """The group of a 10x .h5 file that holds its only matrix."""
    with open_groups(path) as groups:
        if len(groups) > 1:
            raise utils.StageError(
                f"{path} holds the genomes {utils.some(groups)} in matrices of their own, as Cell "
                f"Ranger 2 wrote them.",
                "Give the matrix of Space Ranger, which has all genomes in one.",
            )
        yield next(iter(groups.values()))


def read_h5_features(group: Any) -> pd.DataFrame:
    if "features" in group:
        names = {"id": "id", "name": "name", "type": "feature_type"}
        return pd.DataFrame({key: decode(group["features"][n][:]) for key, n in names.items()})
    table = pd.DataFrame({"id": decode(group["genes"][:]), "name": decode(group["gene_names"][:])})
    return table.assign(type=KEPT_TYPE)


def decode(values: Iterable[Any]) -> list[str]:
    """Text of values that may be bytes."""
    return [v.decode("utf-8") if isinstance(v, bytes) else str(v) for v in values]


def read_10x_mtx(folder: Path) -> tuple[sparse.csr_array, list[str], pd.DataFrame]:
    """The same from a folder of matrix.mtx, barcodes.tsv and features.tsv (or genes.tsv), .gz or
    not."""
    matrix = first_of(folder, MTX, SPACE_RANGER)
    barcodes_path = first_of(folder, BARCODES, SPACE_RANGER)
    features_path = first_of(folder, FEATURES, SPACE_RANGER)
    try:
        counts = sparse.csr_array(mmread(matrix).T)
    except (ValueError, OSError, EOFError, StopIteration) as error:
        if plain.of_system(error):
            raise
        raise broken(matrix, f"is no whole 10x matrix: {error}") from error
    barcodes = [row[0] for row in read_tsv(barcodes_path)]
    rows = read_tsv(features_path)
    if {len(row) for row in rows} - {len(rows[0])} or len(rows[0]) == 1:
        raise unfit(
            features_path,
            "has one column only, or not as many in all rows; expected gene id, symbol and type.",
        )
    features = pd.DataFrame([row[:2] for row in rows], columns=["id", "name"], dtype=object)
    types = [row[2] for row in rows] if len(rows[0]) > 2 else KEPT_TYPE
    return keep_genes(counts, barcodes, features.assign(type=types), matrix)


def read_tsv(path: Path) -> list[list[str]]:
    """Rows of a table of 10x: tabs, no header, no quotes."""
    with reading_table(path):
        rows = [line.split("\t") for line in plain.lines_of(path)]
    if not rows:
        raise broken(path, "is empty.")
    return rows


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
    kinds = kinds_of(features)
    keep = (kinds == KEPT_TYPE).to_numpy()
    if not keep.any():
        raise utils.StageError(
            f"{path} has no {KEPT_TYPE} but {utils.some(kinds.unique())}.", MATRICES
        )
    molecules = np.asarray(counts.sum(axis=0)).ravel()
    dropped = {}
    for kind in kinds[~keep].unique():
        chosen = (kinds == kind).to_numpy()
        dropped[kind] = (int(chosen.sum()), float(molecules[chosen].sum()))
    kept = features[keep].reset_index(drop=True)
    kept.attrs["dropped"] = dropped
    return counts[:, np.flatnonzero(keep)], barcodes, kept


def kinds_of(features: pd.DataFrame) -> pd.Series:
    """What each feature is: KEPT_TYPE for a gene, another type of 10x, or a probe that 10x
    retired (DEPRECATED_ENSG...), which its matrices still list."""
    named = [features[column].str.upper().str.startswith(WITHDRAWN) for column in ("id", "name")]
    return features["type"].mask(named[0] | named[1], "DEPRECATED")


def gene_names(features: pd.DataFrame) -> list[str]:
    """Unique symbols of the features of a matrix."""
    return unique_symbols(features["name"].tolist(), features["id"].tolist())


def dropped_notes(features: pd.DataFrame) -> list[str]:
    """Notes on what was left out of a matrix, and on the genomes that were joined."""
    notes = [
        f"{n} features of type {kind} with {molecules:,.0f} molecules are left out"
        for kind, (n, molecules) in features.attrs.get("dropped", {}).items()
    ]
    if genomes := features.attrs.get("genomes"):
        notes.append(f"the matrices of the genomes {', '.join(genomes)} are joined by barcode")
    return notes


# -------------------------------------------------------------------------------------------------
# the folder spatial
# -------------------------------------------------------------------------------------------------
@dataclass
class SmallerCopies:
    """What is known of the copies that Space Ranger makes of the full-resolution image."""

    scales: dict[str, float]  # tissue_hires_scalef, ...: px of the copy per px of full resolution
    hires_size: tuple[int, int] | None  # width, height of the hires copy

    @property
    def full_size(self) -> tuple[float, float] | None:
        """Width and height of the full-resolution image, by its hires copy."""
        scale = self.scales.get(HIRES_SCALE)
        if self.hires_size is None or not scale:
            return None
        return self.hires_size[0] / scale, self.hires_size[1] / scale

    def check_size(self, path: Path, trusted: str | None, remedy: str) -> list[str]:
        """Stop unless the image has the size that its hires copy says.

        ``trusted`` says why the image is taken all the same: then there is a note instead.
        """
        if self.full_size is None or self.hires_size is None:
            return []
        size, (width, height), full = images.image_size(path), self.hires_size, self.full_size
        scale = self.scales[HIRES_SCALE]
        if max(abs(size[0] * scale - width), abs(size[1] * scale - height)) <= SIZE_TOLERANCE_PX:
            return []
        problem = (
            f"{path} is {size[0]} x {size[1]} px, but the coordinates refer to an image of about "
            f"{full[0]:.0f} x {full[1]:.0f} px: its hires copy has {width} x {height} px at "
            f"{HIRES_SCALE} {scale:.6g} ({width} / {scale:.6g} = {full[0]:.0f})"
        )
        if trusted:
            return [f"{problem}; it is taken all the same, since {trusted}"]
        raise utils.StageError(f"{problem}. {self.likely_image(size, full)}", remedy)

    def likely_image(self, size: tuple[int, int], full_size: tuple[float, float]) -> str:
        """What the wrong image probably is, from its size."""
        for name, scale in self.scales.items():
            if max(abs(n * scale - m) for n, m in zip(full_size, size, strict=True)) <= 2:
                return f"It is the copy of {name} = {scale:.6g}."
        ratios = np.array(size) / full_size
        if abs(ratios[0] / ratios[1] - 1) < SAME_SHAPE:
            return f"It is the same shape, scaled by {ratios[0]:.4g}: a smaller or larger export."
        turned = np.array(size)[::-1] / full_size
        if abs(turned[0] / turned[1] - 1) < SAME_SHAPE:
            return f"Turned by 90 degrees it has the same shape, scaled by {turned[0]:.4g}."
        return "It has another shape: a cropped or another image."


@dataclass
class SpatialFolder(SmallerCopies):
    """The folder spatial: what says how positions and image fit together."""

    folder: Path
    microns_per_pixel: float | None  # of full resolution; Visium HD only

    def files(self) -> list[Path]:
        files = [self.folder / SCALE_FACTORS, self.folder / HIRES_IMAGE]
        return [path for path in files if path.is_file()]

    def likely_image(self, size: tuple[int, int], full_size: tuple[float, float]) -> str:
        cytassist = self.folder / CYTASSIST_IMAGE
        if cytassist.is_file() and images.image_size(cytassist) == tuple(size):
            return f"It is as large as {CYTASSIST_IMAGE}, to which the coordinates do not refer."
        return super().likely_image(size, full_size)


def refuse_other_outputs(folder: Path, bins: bool = False) -> None:
    """Stop if a folder is of another product of 10x than Visium, or than Visium HD's ``bins``."""
    hd = "python prepare/visium_hd.py --outs OUTS --image FULLRES --directory DIR"
    if any(folder.glob("*cell_segmentations.geojson")) or any(folder.glob("*feature_cell_matrix*")):
        raise utils.StageError(
            f"{folder} holds the cells that Space Ranger segmented; expected spots or bins.",
            f"Give the outs folder, in which binned_outputs lies beside it: {hd} . The outlines of "
            f"the cells are read by analysis/cells.py, once there are maps.",
        )
    if (folder / "experiment.xenium").is_file():
        raise utils.StageError(
            f"{folder} is the output of a Xenium run.",
            "Run: python prepare/xenium.py --outs OUTS --image HE --directory DIR",
        )
    if (folder / "segmented_outputs").is_dir() and not (folder / "binned_outputs").is_dir():
        raise utils.StageError(
            f"{folder} has segmented_outputs (cells) but no binned_outputs, which is read.",
            "Put binned_outputs of the same run beside it; downloads hold it as a .tar.gz.",
        )
    if not bins and ((folder / "binned_outputs").is_dir() or folder.name.startswith("square_")):
        raise utils.StageError(
            f"{folder} holds bins: it is of Visium HD.",
            f"Run: {hd.replace('OUTS', shlex.quote(str(folder)))}",
        )


def find_matrix(outs: Path) -> Path:
    """The filtered matrix, .h5 or folder; downloads have the sample's name in front of it."""
    found = sorted(
        [*outs.glob(f"*{MATRIX}.h5"), *(f for f in outs.glob(f"*{MATRIX}") if f.is_dir())]
    )
    if not found:
        raise utils.StageError(f"{outs} has no {MATRIX}.h5 and no folder {MATRIX}.", SPACE_RANGER)
    plain = [path for path in found if path.suffix == ".h5"] or found
    if len(plain) > 1:
        raise utils.StageError(
            f"{outs} has {len(plain)} matrices: {utils.some([p.name for p in plain])}.",
            "Leave the one of this section there.",
        )
    return plain[0]


def read_spatial(folder: Path) -> SpatialFolder:
    path = folder / SCALE_FACTORS
    try:
        factors = plain.read_json(path)
        said = {name: float(factors[name]) for name in (*SCALES, MICRONS) if name in factors}
    except FileNotFoundError:
        said = {}
    except (ValueError, TypeError, RecursionError) as error:
        raise unfit(path, f"holds no scale factors: {error}") from error
    if wrong := [name for name, value in said.items() if not 0 < value < np.inf]:
        raise unfit(path, f"says {wrong[0]} {said[wrong[0]]:g}; expected a number above 0.")
    hires = folder / HIRES_IMAGE
    size = images.image_size(hires) if hires.is_file() else None
    scales = {name: said[name] for name in SCALES if name in said}
    return SpatialFolder(scales, size, folder, said.get(MICRONS))


def fit_visium_array(positions: pd.DataFrame, path: Path) -> lattice.FittedArray:
    """Visium's array, fitted to its positions (array_row, array_col, x, y); StageError if it is
    none."""
    lattice_um = positions[["array_col", "array_row"]].to_numpy() * (COLUMN_UM, ROW_UM)
    fitted = lattice.fit_array(lattice_um, positions[["x", "y"]].to_numpy(), path)
    if fitted.skew > MAX_SKEW or fitted.residual_um > MAX_RESIDUAL_UM:
        pitches = fitted.px_per_um * utils.VISIUM_PITCH_UM
        raise utils.StageError(
            f"{path} does not hold Visium's array: 100 um are {pitches[0]:.2f} px along its rows "
            f"and {pitches[1]:.2f} px across (expected the same), at "
            f"{np.degrees(np.arccos(fitted.cosine)):.1f} degrees (expected 90), and positions are "
            f"off by {fitted.residual_um:.1f} um.",
            f"See that its columns are {', '.join(COLUMNS)} (row before column), and that it "
            f"is of Visium with 100 um pitch.",
        )
    return fitted


# -------------------------------------------------------------------------------------------------
# the image that Space Ranger was given
# -------------------------------------------------------------------------------------------------
def full_resolution_advice(spatial: SpatialFolder) -> str:
    return (
        "Give by --image the very file that Space Ranger had as --image (web_summary.html and "
        "_cmdline name it). If it is lost, take the coarse copy: --image "
        f"{spatial.folder / HIRES_IMAGE} --image-is hires"
    )


@dataclass
class WrittenImage:
    """The image as it is written, and how px of the full resolution become px of it."""

    image: Path | np.ndarray | images.Region
    pixel_size_um: float
    scale: float = 1.0
    left_top: tuple[int, int] = (0, 0)

    def move(self, xy: pd.DataFrame) -> pd.DataFrame:
        return (xy - np.array(self.left_top)) * self.scale


def choose_image(
    args: argparse.Namespace, spots: pd.DataFrame, pixel_size: float, spatial: SpatialFolder
) -> tuple[WrittenImage, list[str]]:
    """The image of --image, after every check that its size allows, and notes."""
    if args.image is None:
        raise utils.StageError(missing_image(spatial, pixel_size), full_resolution_advice(spatial))
    if args.image_is == "hires":
        if args.crop_um is not None or args.downsample:
            raise utils.StageError(
                "--crop-um and --downsample cannot go with --image-is hires.", "Leave them out."
            )
        return place_hires(args.image, pixel_size, spatial)
    trusted = "--image-is says fullres" if args.image_is == "fullres" else None
    remedy = (
        f"{full_resolution_advice(spatial)}. If you know that the coordinates refer to your image, "
        f"add --image-is fullres."
    )
    notes = spatial.check_size(args.image, trusted, remedy)
    compared = spatial.full_size is not None
    if not compared:
        notes.append(f"no {HIRES_IMAGE} or scale factor: the image's size could not be compared")
    notes += images.check_metadata(
        args.image, pixel_size, bool(trusted or compared), "--image-is fullres"
    )
    image, _, written_um = images.place_image(
        args.image, spots, pixel_size, args.crop_um, args.downsample
    )
    if isinstance(image, Path):
        return WrittenImage(image, written_um), notes
    return WrittenImage(image, written_um, 1 / image.downsample, (image.x, image.y)), notes


def place_hires(
    path: Path, pixel_size: float, spatial: SpatialFolder
) -> tuple[WrittenImage, list[str]]:
    """Space Ranger's hires copy; enlarged by a whole factor where it is beyond 2.5 um."""
    scale = spatial.scales.get(HIRES_SCALE)
    if not scale:
        raise utils.StageError(
            f"{spatial.folder / SCALE_FACTORS} has no {HIRES_SCALE}, which --image-is hires needs.",
            full_resolution_advice(spatial),
        )
    size = images.image_size(path)
    if spatial.hires_size is not None and size != spatial.hires_size:
        raise utils.StageError(
            f"{path} is {size[0]} x {size[1]} px; --image-is hires expects Space Ranger's "
            f"{HIRES_IMAGE} of {spatial.hires_size[0]} x {spatial.hires_size[1]} px.",
            "Give that file, or the full-resolution image without --image-is.",
        )
    coarse = pixel_size / scale
    notes = [
        f"the hires copy is used: {pixel_size:.4g} / {scale:.6g} = {coarse:.4g} um per pixel, far "
        f"from the {utils.PIXEL_SIZE_UM} um of the method; its maps cannot show cells"
    ]
    factor = int(np.ceil(coarse / utils.MAX_PIXEL_SIZE_UM))
    if factor == 1:
        return WrittenImage(path, coarse, scale), notes
    notes.append(
        f"enlarged {factor} times to {coarse / factor:.4g} um per pixel, since "
        f"{utils.CALIBRATION} takes up to {utils.MAX_PIXEL_SIZE_UM}; that adds no detail"
    )
    with images.open_image(path) as slide:
        rgb = Image.fromarray(slide.read_region(0, 0, *size))
    large = rgb.resize((size[0] * factor, size[1] * factor), Image.Resampling.BICUBIC)
    return WrittenImage(np.asarray(large), coarse / factor, scale * factor), notes


def missing_image(spatial: SpatialFolder, pixel_size: float) -> str:
    known = spatial.full_size
    size = "" if known is None else f" of about {known[0]:.0f} x {known[1]:.0f} px"
    return (
        f"--image is missing: the coordinates refer to the full-resolution image{size} "
        f"({pixel_size:.4g} um per pixel) that Space Ranger was given; outs does not hold it."
    )
