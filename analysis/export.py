"""Export the maps for other tools: AnnData, SpatialData, OME-TIFF, iStar's layout, tables.

    python analysis/export.py --directory data/section --format h5ad
    python analysis/export.py --directory data/section --format ometiff --genes KRT8,CD3E

h5ad         AnnData for scanpy and squidpy: a row per superpixel in which the maps have a value.
             obsm["spatial"] is its centre, x and y in pixels of he-raw; obsm["X_histex"] the latent
             maps; uns["histex"] the records of the five scripts, as JSON; uns["spatial"] a reduced
             H&E.
spatialdata  SpatialData .zarr (zarr 3): the images "expression" (a channel per gene, NaN outside
             the tissue) and "he", the labels "tissue" and "regions" (of segments.npy), the circles
             "spots" and the table "counts" with what they measured. All lead into the coordinate
             system "global", which is pixels of he-raw.
ometiff      tiled pyramid for QuPath and napari: a channel per gene, 8 um per pixel, 0 outside the
             tissue. A pixel of a smaller level is the mean of those of the four below it that lie
             in the tissue.
istar        folder for the scripts of iStar: cnts-super/, mask-small.png, embeddings-gene.pickle,
             he.jpg, gene-names.txt, and what the spots measured (cnts.tsv, locs.tsv, radius.txt)
             where their discs lie on the image as a whole.
             Its numpy is of 2023: the arrays are pickled in a form that it reads, too.
csv          a gzipped table: a row per superpixel with its row, column, x_fullres and y_fullres
             (pixels of he-raw), then a column per gene.
spots        back to spots: the sums of the maps over the discs of the spots that lie on the tissue,
             laid out as cnts.csv.

Values are expected counts per superpixel of 8 um. The maps are read one at a time, or in blocks of
genes, so that memory hardly grows with their number. Files in: cnts-super/, he.jpg and
image_calibration.json; by format locs.csv, radius.txt, cnts.csv, embeddings-gene.pickle; where they
are there, mask.png, held-out-r.csv, segments.npy, annotation.npy, and the column "name" of the
tables beside those two. Files out: the export, and export.json, which tells an export of this
script from a file of yours.
"""

from __future__ import annotations

import argparse
import gzip
import importlib
import json
import pickle
import shutil
import struct
import sys
import time
import uuid
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import cv2
import numpy as np
import pandas as pd
from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import utils
from analysis.inputs import map_files, read_map, read_radius
from analysis.page import SCRIPTS
from analysis.report import choose_genes, read_held_out
from analysis.spots import disc_weights, on_tissue, sum_discs
from reading import images, pickles, tables

SCRIPT = "analysis/export.py"
RECORD = "export.json"
OUTPUTS = {  # format -> name of the export, whose ending any --output must have
    "h5ad": "histex.h5ad",
    "spatialdata": "histex.zarr",
    "ometiff": "histex.ome.tif",
    "istar": "histex-istar",
    "csv": "histex.csv.gz",
    "spots": "histex-spots.csv",
}
FOLDERS = ("spatialdata", "istar")
INPUTS = {  # beyond the maps and he.jpg
    "h5ad": (utils.EMBEDDINGS,),
    "spatialdata": (utils.LOCS, utils.RADIUS, utils.CNTS),
    "ometiff": (),
    "istar": (utils.EMBEDDINGS, utils.LOCS, utils.RADIUS, utils.CNTS),
    "csv": (),
    "spots": (utils.LOCS, utils.RADIUS),
}
NEEDED = {  # packages beyond those of the five scripts
    "h5ad": ("h5py",),
    "spatialdata": ("zarr", "pyarrow.parquet"),
    "ometiff": ("tifffile",),
    "csv": ("pyarrow.csv",),
}
SMALL_MASK = "mask-small.png"  # of iStar
LABELS = {"region": "segments", "annotation": "annotation"}  # column of obs -> file stem
NUMBER_COLUMNS = ("region", "label")  # of the tables beside them
MOST_LABELS = 2**16 - 1
GENES_AT_ONCE = 32  # columns of a chunk of X, written as a whole: one gene costs 32 to read
ROWS_PER_CHUNK = 4096  # 0.5 MB with the above
TABLE_BYTES = 2**26  # of the rows of a table that are in memory at a time
RASTER_CHUNK_PX = 1024
HE_BAND_PX = 896  # rows of he.jpg at a time: four tiles, which can be halved seven times
HIRES_PX, LOWRES_PX = 2000, 600  # longest sides of the reduced H&E, as Space Ranger has them
SMALLEST_LEVEL_PX = 1000  # of the H&E's pyramid
TIFF_TILE_PX = 256  # and no level of the OME-TIFF is smaller
GZIP_LEVEL = 1  # the digits of expected counts are noise: 6 saves a few hundredths in five times
WHITE = 255
OBS_BYTES = 128  # of a row of obs and its place
SPOT_SUPERPIXELS = 100  # of Visium, there is less than one spot in so many
BIG_TIFF_BYTES = 2**32 - 2**25  # what 32-bit offsets reach, less the tags
LARGE_WRITE_BYTES = 2**16  # what the pickler writes in one piece is pixels, no names
POINT = struct.Struct("<BIdd")  # WKB: little endian, type 1, x, y


@dataclass
class Sample:
    """What every format needs; ``tissue`` is where the maps have values."""

    stage: utils.Stage
    files: dict[str, Path]  # of the maps to export, by gene
    tissue: np.ndarray  # bool (rows, columns)
    raw_size: tuple[int, int]  # rows, columns of he-raw
    scaled_size: tuple[int, int]  # of he.jpg without its padding

    @property
    def genes(self) -> list[str]:
        return list(self.files)

    @property
    def places(self) -> tuple[np.ndarray, np.ndarray]:
        """Row and column of the superpixels of the tissue."""
        return np.nonzero(self.tissue)

    def to_raw(self, xy: np.ndarray) -> np.ndarray:
        """(N, 2) x and y from pixels of he.jpg to pixels of he-raw, both from the image's edges."""
        return xy * np.divide(self.raw_size, self.scaled_size)[::-1]

    @property
    def raw_px(self) -> float:
        """Pixels of he-raw per pixel of he.jpg; its sides may differ by rounding."""
        return float(np.sqrt(np.prod(self.raw_size) / np.prod(self.scaled_size)))

    def centres(self) -> np.ndarray:
        """(superpixels, 2) x and y of the superpixels of the tissue, pixels of he-raw."""
        row, column = self.places
        return self.to_raw((np.column_stack([column, row]) + 0.5) * utils.TOKEN_PX)


# --------------------------------------------------------------------------------------------------
# reading
# --------------------------------------------------------------------------------------------------
def read_sample(stage: utils.Stage) -> Sample:
    args, directory = stage.args, stage.directory
    stage.require(utils.HE, utils.MAPS, *INPUTS[args.format])
    files = map_files(directory)
    if args.n_genes:
        stage.require(utils.HELD_OUT)
    held_out = read_held_out(stage) if args.n_genes else None
    genes = choose_genes(
        list(files), held_out, listed_genes(args.genes), args.n_genes or len(files)
    )
    shape, first = images.grid_shape(stage), files[genes[0]]
    tissue = np.isfinite(read_map(first))
    if tissue.shape != shape or not tissue.any():
        raise stage.error(
            directory / utils.MAPS.name,
            f"holds {first.name} {tissue.shape} with {tissue.sum()} values; expected {shape}, the "
            f"grid of he.jpg.",
        )
    record = utils.read_record(stage, utils.CALIBRATION) or {}
    sizes = [record.get(key) for key in ("raw_size", "scaled_size")]
    if not all(isinstance(size, list) and len(size) == 2 and min(size) > 0 for size in sizes):
        raise stage.error(
            directory / utils.record_name(utils.CALIBRATION),
            "does not tell raw_size and scaled_size, the scale between he-raw and he.jpg.",
            f"Run: {stage.command(utils.CALIBRATION)}",
        )
    return Sample(stage, {gene: files[gene] for gene in genes}, tissue, *map(tuple, sizes))


def listed_genes(text: str | None) -> list[str] | None:
    """Genes with commas between them, or those of a file, one a line."""
    if text is None:
        return None
    path = Path(text)
    lines = path.read_text(encoding="utf-8-sig").splitlines() if path.is_file() else text.split(",")
    genes = [line.strip() for line in lines if line.strip()]
    if not genes:
        raise utils.StageError(f"--genes {text} names no gene.", "Name some: --genes KRT8,CD3E")
    return genes


def maps(sample: Sample, desc: str = "genes") -> Iterator[np.ndarray]:
    """The maps float32 (rows, columns), one at a time; all must have the same tissue."""
    for path in tqdm(sample.files.values(), desc=desc, disable=None):
        image = read_map(path)
        if image.shape != sample.tissue.shape or (np.isfinite(image) != sample.tissue).any():
            raise utils.StageError(
                f"{path} has no values where other maps have some, or the reverse.",
                f"The maps were changed. Run: {sample.stage.command(utils.HISTEX)}",
            )
        yield image.astype(np.float32, copy=False)


def gene_blocks(sample: Sample) -> Iterator[tuple[slice, np.ndarray]]:
    """Some genes at a time, and float32 (superpixels of the tissue, those genes)."""
    every, n = maps(sample), len(sample.files)
    for start in range(0, n, GENES_AT_ONCE):
        genes = slice(start, min(start + GENES_AT_ONCE, n))
        block = np.empty((int(sample.tissue.sum()), genes.stop - start), np.float32)
        for i in range(block.shape[1]):
            block[:, i] = next(every)[sample.tissue]
        yield genes, block
    next(every, None)  # lets the progress bar end


def read_embedding(sample: Sample) -> np.ndarray:
    """Latent maps float32 (dims, rows, columns)."""
    path = sample.stage.path(utils.EMBEDDINGS)
    content = pickles.read_pickle(path)
    found = content.get("cls") if isinstance(content, dict) else None
    if not isinstance(found, np.ndarray) or found.shape[1:] != sample.tissue.shape:
        raise sample.stage.error(path, f"does not hold {utils.EMBEDDINGS.what}.")
    return found.astype(np.float32, copy=False)


def read_labels(sample: Sample, stem: str) -> tuple[np.ndarray, list[str]] | None:
    """Labels (rows, columns), 0 for none, and the names of 1, 2, ...; None if there are none.

    A file that does not fit the maps is left out with a warning. Names are those of the column
    ``name`` of the table beside it, if that has a row per label in their order, else the numbers.
    A label of the table may have no superpixel.
    """
    path = sample.stage.directory / f"{stem}.npy"
    if not path.is_file():
        return None
    try:
        labels = np.load(path, allow_pickle=False)
    except (OSError, EOFError, ValueError) as error:
        sample.stage.warn(f"{path.name} is left out: it is not a whole .npy array ({error})")
        return None
    fits = labels.shape == sample.tissue.shape and labels.dtype.kind in "iu"
    if not fits or labels.min() < 0 or labels.max() > MOST_LABELS:
        sample.stage.warn(
            f"{path.name} is left out: it is {labels.dtype} {labels.shape}; expected whole numbers "
            f"from 0 to {MOST_LABELS} {sample.tissue.shape}"
        )
        return None
    n = int(labels.max())
    names = label_names(sample.stage, path.with_suffix(".csv"), n)
    return labels, names or [str(i) for i in range(1, n + 1)]


def label_names(stage: utils.Stage, path: Path, n: int) -> list[str] | None:
    """The column ``name`` of a table with a row for each of at least n labels; None without one."""
    if not path.is_file():
        return None
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False)
    except (OSError, ValueError) as error:
        stage.warn(f"{path.name} is left out: it is not a table ({error})")
        return None
    if "name" not in table:
        return None
    names = table["name"].tolist()
    numbers = [str(i) for i in range(1, len(names) + 1)]
    ordered = all(table[c].tolist() == numbers for c in NUMBER_COLUMNS if c in table)
    if len(names) < n or len(set(names)) != len(names) or not ordered:
        stage.warn(f"{path.name} is left out: it does not name the labels 1 to {n}")
        return None
    return names


def in_mask(sample: Sample) -> np.ndarray:
    """Which superpixels (rows, columns) are tissue by mask.png: fewer than have values, after
    HISTEX.py --keep-background."""
    if sample.stage.optional(utils.MASK) is None:
        return sample.tissue
    return sample.tissue & images.read_mask(sample.stage, sample.tissue.shape)


def records_of(sample: Sample) -> dict[str, str]:
    """Records of the five scripts as JSON text, those that are there."""
    paths = {Path(s).stem: sample.stage.directory / utils.record_name(s) for s in SCRIPTS}
    return {
        stem: path.read_text(encoding="utf-8") for stem, path in paths.items() if path.is_file()
    }


def halve(image: np.ndarray) -> np.ndarray:
    """uint8 (rows, columns, 3) at half the size; odd sides grow by a white pixel, as padding is."""
    down, right = image.shape[0] % 2, image.shape[1] % 2
    image = np.pad(image, ((0, down), (0, right), (0, 0)), constant_values=WHITE)
    size = (image.shape[1] // 2, image.shape[0] // 2)
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA)


def halvings(side: int, longest: int) -> int:
    """How often ``side`` is halved until it is no longer than ``longest``."""
    n = 0
    while side > longest:
        side, n = -(-side // 2), n + 1
    return n


def he_bands(sample: Sample) -> Iterator[np.ndarray]:
    """he.jpg from top to bottom, uint8 (n, columns, 3)."""
    with images.ImageRows(sample.stage, sample.stage.path(utils.HE)) as image:
        for top in tqdm(range(0, len(image), HE_BAND_PX), desc="H&E", disable=None):
            yield image[top : top + HE_BAND_PX]


def reduced_he(sample: Sample) -> dict[str, tuple[np.ndarray, float]]:
    """hires and lowres: uint8 (rows, columns, 3) without the padding; its pixels per px of he-raw.

    The sizes are halved as often as needed, so that the scale is exact.
    """
    longest = max(side * utils.TOKEN_PX for side in sample.tissue.shape)
    n, bands = halvings(longest, HIRES_PX), []
    for band in he_bands(sample):
        for _ in range(n):
            band = halve(band)
        bands.append(band)
    image, copies = np.concatenate(bands), {}
    for name, limit in (("hires", HIRES_PX), ("lowres", LOWRES_PX)):
        for _ in range(halvings(longest, limit) - n):
            image, n = halve(image), n + 1
        rows, columns = (-(-side // 2**n) for side in sample.scaled_size)
        copies[name] = (image[:rows, :columns], 1 / (sample.raw_px * 2**n))
    return copies


# --------------------------------------------------------------------------------------------------
# AnnData on disk, in a group of h5py or zarr: the format is documented and simple, and anndata
# itself allows a few versions of pandas only
# --------------------------------------------------------------------------------------------------
def new_group(
    parent: Any, name: str, kind: str = "dict", encoding: str = "0.1.0", **attributes
) -> Any:
    group = parent.create_group(name)
    group.attrs.update({"encoding-type": kind, "encoding-version": encoding, **attributes})
    return group


def new_array(parent: Any, name: str, shape: tuple, dtype: Any, kind="array", **options) -> Any:
    """An array without values; ``dtype`` str is for text."""
    if hasattr(parent, "create_array"):
        node = parent.create_array(name, shape=shape, dtype=dtype, **options)
    else:
        import h5py

        dtype = h5py.string_dtype() if dtype is str else dtype
        node = parent.create_dataset(name, shape=shape, dtype=dtype, **options)
    node.attrs.update({"encoding-type": kind, "encoding-version": "0.2.0"})
    return node


def put(parent: Any, name: str, value: Any) -> None:
    """Store a dict, a table, a category, text, a number or an array as anndata does."""
    if isinstance(value, dict):
        group = new_group(parent, name)
        for key, item in value.items():
            put(group, key, item)
    elif isinstance(value, pd.DataFrame):
        order = {"_index": "_index", "column-order": list(value)}
        group = new_group(parent, name, "dataframe", "0.2.0", **order)
        put(group, "_index", value.index.to_numpy(object))
        for column in value:
            put(group, column, value[column].array)
    elif isinstance(value, pd.Categorical):
        group = new_group(parent, name, "categorical", "0.2.0", ordered=False)
        put(group, "codes", value.codes)
        put(group, "categories", value.categories.to_numpy(object))
    elif isinstance(value, (str, float)):
        text = isinstance(value, str)
        kind = "string" if text else "numeric-scalar"
        new_array(parent, name, (), str if text else np.float64, kind)[()] = value
    else:
        value = np.asarray(value)
        text = value.dtype == object
        kind = "string-array" if text else "array"
        new_array(parent, name, value.shape, str if text else value.dtype, kind)[:] = value


def put_anndata(parent: Any, parts: dict[str, Any]) -> None:
    """All parts of an AnnData but X; those not given are empty."""
    for name in ("obs", "var", "obsm", "uns", "layers", "varm", "obsp", "varp"):
        put(parent, name, parts.get(name, {}))


# --------------------------------------------------------------------------------------------------
# h5ad
# --------------------------------------------------------------------------------------------------
def write_h5ad(sample: Sample, target: Path) -> None:
    """X is dense: softplus-like outputs leave few zeros, and CSR would need twice the space.

    Its chunks hold some rows of some genes, so that a gene or a part of the tissue can be read
    from an object opened as backed; gzip is the compression that every HDF5 has.
    """
    import h5py

    n = int(sample.tissue.sum())
    obs, var = superpixel_table(sample), gene_table(sample)
    total, mean = np.zeros(n), np.zeros(len(sample.files))
    with h5py.File(target, "w") as file:
        file.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
        packed = {"compression": "gzip", "compression_opts": GZIP_LEVEL, "shuffle": True}
        chunks = (min(ROWS_PER_CHUNK, n), min(GENES_AT_ONCE, len(sample.files)))
        x = new_array(file, "X", (n, len(sample.files)), np.float32, chunks=chunks, **packed)
        for genes, block in gene_blocks(sample):
            x[:, genes] = block
            total += block.sum(1, dtype=np.float64)
            mean[genes] = block.mean(0, dtype=np.float64)
        parts = {
            "obs": obs.assign(total_counts=total),
            "var": var.assign(mean_counts=mean),
            "obsm": {"spatial": sample.centres()},
            "uns": {"histex": records_of(sample), "spatial": {library(sample): he_of(sample)}},
        }
        put_anndata(file, parts)
        embedding = read_embedding(sample)
        dims, where = len(embedding), np.flatnonzero(sample.tissue)
        flat, chunks = embedding.reshape(dims, -1), (chunks[0], dims)
        latent = new_array(file["obsm"], "X_histex", (n, dims), np.float32, chunks=chunks, **packed)
        for start in range(0, n, ROWS_PER_CHUNK):
            latent[start : start + ROWS_PER_CHUNK] = flat[
                :, where[start : start + ROWS_PER_CHUNK]
            ].T


def superpixel_table(sample: Sample) -> pd.DataFrame:
    """obs: a row per superpixel, named by its row and column."""
    row, column = sample.places
    names = [f"r{r}c{c}" for r, c in zip(row.tolist(), column.tolist(), strict=True)]
    table = pd.DataFrame(
        {
            "in_tissue": in_mask(sample)[row, column].astype(np.int64),
            "array_row": row,
            "array_col": column,
        },
        index=pd.Index(names, dtype=object),
    )
    for name, stem in LABELS.items():
        if found := read_labels(sample, stem):
            codes = found[0][row, column].astype(np.int64) - 1  # -1: none
            table[name] = pd.Categorical.from_codes(codes, np.array(found[1], object))
    return table


def gene_table(sample: Sample) -> pd.DataFrame:
    """var: the correlation in held-out spots, if known."""
    table = pd.DataFrame(index=pd.Index(sample.genes, dtype=object))
    held_out = read_held_out(sample.stage)
    if held_out is not None:
        table["held_out_r"] = held_out.reindex(sample.genes).to_numpy(np.float64)
    return table


def library(sample: Sample) -> str:
    return sample.stage.directory.resolve().name or "section"


def he_of(sample: Sample) -> dict[str, Any]:
    """What scanpy and squidpy look for in uns["spatial"][library]."""
    copies = reduced_he(sample)
    images = {name: copy for name, (copy, _) in copies.items()}
    factors = {f"tissue_{name}_scalef": scale for name, (_, scale) in copies.items()}
    factors["spot_diameter_fullres"] = utils.TOKEN_PX * sample.raw_px
    return {"images": images, "scalefactors": factors}


# --------------------------------------------------------------------------------------------------
# SpatialData
# --------------------------------------------------------------------------------------------------
def write_spatialdata(sample: Sample, target: Path) -> None:
    import zarr

    spots, counts = read_spots(sample)
    root = zarr.create_group(target, zarr_format=3)
    root.attrs["spatialdata_attrs"] = {"version": "0.2", "spatialdata_software_version": "0.7.3"}
    root.attrs["histex"] = records_of(sample)
    kinds = {kind: root.create_group(kind) for kind in ("images", "labels", "shapes", "tables")}
    superpixel = np.divide(sample.raw_size, sample.scaled_size) * utils.TOKEN_PX

    expression = raster(
        kinds["images"], "expression", [sample.tissue.shape], np.float32, superpixel, sample.genes
    )[0]
    for i, image in enumerate(maps(sample)):
        expression[i] = image
    write_he(sample, kinds["images"])
    labels = {"tissue": in_mask(sample).astype(np.uint8)}
    if found := read_labels(sample, LABELS["region"]):
        labels["regions"] = found[0].astype(np.uint16)
    for name, image in labels.items():
        raster(kinds["labels"], name, [image.shape], image.dtype, superpixel)[0][:] = image
    kinds["labels"].attrs["ome"] = {"labels": list(labels)}
    write_circles(kinds["shapes"], target, spots)
    write_counts(kinds["tables"], spots, counts)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that other programs may not know of it
        zarr.consolidate_metadata(root.store)


def read_tables(sample: Sample) -> tuple[pd.DataFrame, pd.DataFrame]:
    """x and y of the spots in pixels of he.jpg, and their counts of the exported genes."""
    stage = sample.stage
    locs = tables.read_locs(stage, stage.path(utils.LOCS))
    counts, genes = tables.read_sparse_counts(stage, stage.path(utils.CNTS), locs.index)
    columns = pd.Index(genes).get_indexer(sample.genes)
    if (columns < 0).any():
        unknown = [gene for gene, i in zip(sample.genes, columns, strict=True) if i < 0]
        raise stage.error(
            stage.path(utils.CNTS),
            f"lacks {len(unknown)} of the {len(sample.genes)} genes to export: "
            f"{utils.some(unknown)}.",
        )
    wanted = counts[:, columns].toarray()
    return locs, pd.DataFrame(wanted, locs.index, sample.genes, copy=False)


def read_spots(sample: Sample) -> tuple[pd.DataFrame, pd.DataFrame]:
    """x, y and radius of the spots in pixels of he-raw; their counts of the exported genes."""
    locs, counts = read_tables(sample)
    locs[["x", "y"]] = sample.to_raw(locs[["x", "y"]].to_numpy())
    radius = read_radius(sample.stage.directory) * utils.TOKEN_PX * sample.raw_px
    return locs[["x", "y"]].assign(radius=radius), counts


def axes_of(names: str, unit: bool = False) -> list[dict[str, str]]:
    axes = [{"name": name, "type": "channel" if name == "c" else "space"} for name in names]
    return [a | {"unit": "unit"} if unit and a["type"] == "space" else a for a in axes]


def to_global(names: str, kind: dict[str, Any]) -> list[dict[str, Any]]:
    """The transformation into pixels of he-raw."""
    axes = axes_of(names, unit=True)
    system = {"input": {"name": names, "axes": axes}, "output": {"name": "global", "axes": axes}}
    return [kind | system]


def raster(
    parent: Any, name: str, sizes: list[tuple], dtype: Any, scale: np.ndarray, channels=None
) -> list[Any]:
    """An image (c, y, x) or labels (y, x) of one or more levels, as yet without pixels.

    ``scale`` are pixels of he-raw per pixel of the first level, down and across.
    """
    names, group = "yx" if channels is None else "cyx", parent.create_group(name)
    first = () if channels is None else (len(channels),)
    depth = () if channels is None else (3 if dtype == np.uint8 else 1,)
    ones, arrays, datasets = [1.0] * len(first), [], []
    for level, size in enumerate(sizes):
        chunks = tuple(min(side, limit) for side, limit in zip(size, band_of(level), strict=True))
        arrays.append(
            group.create_array(
                f"s{level}", shape=(*first, *size), dtype=dtype, chunks=(*depth, *chunks),
                dimension_names=list(names),
            )
        )  # fmt: skip
        steps = {"type": "scale", "scale": [*ones, *[float(2**level)] * 2]}
        datasets.append({"path": f"s{level}", "coordinateTransformations": [steps]})
    whole = {"type": "scale", "scale": [*ones, *scale.tolist()]}
    multiscale = {
        "name": name,
        "axes": axes_of(names),
        "datasets": datasets,
        "coordinateTransformations": to_global(names, whole),
    }
    ome = {"version": "0.5-dev-spatialdata", "multiscales": [multiscale]}
    if channels is None:
        ome["image-label"] = {"version": "0.5"}
    else:
        ome["omero"] = {"channels": [{"label": channel} for channel in channels]}
    group.attrs.update({"ome": ome, "spatialdata_attrs": {"version": "0.3"}})
    return arrays


def band_of(level: int) -> tuple[int, int]:
    """Rows and columns of a chunk: a band of he.jpg, halved, is whole chunks at every level."""
    return HE_BAND_PX >> level, RASTER_CHUNK_PX


def write_he(sample: Sample, images: Any) -> None:
    """The whole of he.jpg with its padding, halved until it is small."""
    size = tuple(side * utils.TOKEN_PX for side in sample.tissue.shape)
    sizes = [size]
    while max(sizes[-1]) > SMALLEST_LEVEL_PX and len(sizes) <= 5:  # 224 can be halved five times
        sizes.append((sizes[-1][0] // 2, sizes[-1][1] // 2))
    scale = np.divide(sample.raw_size, sample.scaled_size)
    levels = raster(images, "he", sizes, np.uint8, scale, ["r", "g", "b"])
    for number, band in enumerate(he_bands(sample)):
        for level, array in enumerate(levels):
            top = number * (HE_BAND_PX >> level)
            array[:, top : top + len(band)] = np.moveaxis(band, 2, 0)
            band = halve(band)


def write_circles(shapes: Any, target: Path, spots: pd.DataFrame) -> None:
    """GeoParquet of the points, with a radius."""
    import pyarrow
    import pyarrow.parquet

    group = shapes.create_group("spots")
    group.attrs.update(
        {
            "encoding-type": "ngff:shapes",
            "axes": ["x", "y"],
            "coordinateTransformations": to_global("xy", {"type": "identity"}),
            "spatialdata_attrs": {"version": "0.3"},
        }
    )
    xy = spots[["x", "y"]].to_numpy()
    points = pd.DataFrame(
        {"geometry": [POINT.pack(1, 1, *p) for p in xy], "radius": spots["radius"].to_numpy()},
        index=spots.index.astype(object),
    )
    column = {
        "encoding": "WKB",
        "crs": None,
        "geometry_types": ["Point"],
        "bbox": [*xy.min(0), *xy.max(0)],
    }
    geo = {"version": "1.1.0", "primary_column": "geometry", "columns": {"geometry": column}}
    table = pyarrow.Table.from_pandas(points)
    table = table.replace_schema_metadata(table.schema.metadata | {"geo": json.dumps(geo)})
    pyarrow.parquet.write_table(table, target / "shapes" / "spots" / "shapes.parquet")


def write_counts(tables: Any, spots: pd.DataFrame, counts: pd.DataFrame) -> None:
    """The table of what the spots measured, which annotates their circles."""
    ids = spots.index.to_numpy(object)
    keys = {"region": "spots", "region_key": "region", "instance_key": "spot_id"}
    extra = {"spatialdata-encoding-type": "ngff:regions_table", "version": "0.2", **keys}
    group = new_group(tables, "counts", "anndata", **extra)
    region = pd.Categorical.from_codes(np.zeros(len(ids), int), np.array(["spots"], object))
    put(group, "X", counts.to_numpy(np.float32))
    obs = pd.DataFrame({"region": region, "spot_id": ids}, index=pd.Index(ids, dtype=object))
    var = pd.DataFrame(
        {"mean_counts": counts.mean().to_numpy(np.float64)},
        index=pd.Index(list(counts), dtype=object),
    )
    parts = {
        "obs": obs,
        "var": var,
        "obsm": {"spatial": spots[["x", "y"]].to_numpy()},
        "uns": {"spatialdata_attrs": keys},
    }
    put_anndata(group, parts)


# --------------------------------------------------------------------------------------------------
# OME-TIFF
# --------------------------------------------------------------------------------------------------
def write_ometiff(sample: Sample, target: Path) -> None:
    """All genes of the first level, then of the next: each reads the maps again, which is fast."""
    import tifffile

    sizes = [sample.tissue.shape]
    while max(sizes[-1]) > TIFF_TILE_PX:
        sizes.append(tuple(-(-side // 2) for side in sizes[-1]))
    text = (
        "Expected counts per superpixel of 8 um by HISTEX; 0 outside the tissue. Records of its "
        f"scripts: {json.dumps(records_of(sample))}"
    )
    known = json.dumps([sample.stage.inputs[utils.MAPS.name]["sha256"], sample.genes])
    metadata = {
        "axes": "CYX",
        "UUID": str(uuid.uuid5(uuid.NAMESPACE_URL, known)),  # the same for the same export
        "Name": library(sample),
        "Description": text,
        "Channel": {"Name": sample.genes},
        "PhysicalSizeX": utils.SUPERPIXEL_UM,
        "PhysicalSizeXUnit": "µm",
        "PhysicalSizeY": utils.SUPERPIXEL_UM,
        "PhysicalSizeYUnit": "µm",
    }
    pixels = sum(rows * columns for rows, columns in sizes) * len(sample.files)
    big = 4 * pixels > BIG_TIFF_BYTES
    options = {
        "tile": (TIFF_TILE_PX, TIFF_TILE_PX),
        "compression": "zlib",  # the one that every reader of TIFF has
        "compressionargs": {"level": GZIP_LEVEL},
        "photometric": "minisblack",
        "dtype": np.float32,
        "resolutionunit": "CENTIMETER",
        "maxworkers": 1,
    }
    with tifffile.TiffWriter(target, bigtiff=big, ome=True) as file:
        for level, size in enumerate(sizes):
            per_cm = 1e4 / utils.SUPERPIXEL_UM / 2**level
            first = {"subifds": len(sizes) - 1, "metadata": metadata}
            file.write(
                (tile for image in level_of(sample, level) for tile in tiles(image)),
                shape=(len(sample.files), *size),
                resolution=(per_cm, per_cm),
                **(first if level == 0 else {"subfiletype": 1, "metadata": None}),
                **options,
            )


def level_of(sample: Sample, level: int) -> Iterator[np.ndarray]:
    """The maps at 1 / 2**level of their size, 0 outside the tissue."""
    for image in maps(sample, f"level {level}"):
        for _ in range(level):
            image = halve_map(image)
        yield np.nan_to_num(image, nan=0.0)


def tiles(image: np.ndarray) -> Iterator[np.ndarray]:
    """Squares of a map from left to right, then from top to bottom; the last ones are smaller."""
    for top in range(0, image.shape[0], TIFF_TILE_PX):
        for left in range(0, image.shape[1], TIFF_TILE_PX):
            yield image[top : top + TIFF_TILE_PX, left : left + TIFF_TILE_PX]


def halve_map(image: np.ndarray) -> np.ndarray:
    """Means of two by two pixels without those that are NaN; NaN where all are."""
    padded = np.pad(image, [(0, side % 2) for side in image.shape], constant_values=np.nan)
    rows, columns = padded.shape
    four = padded.reshape(rows // 2, 2, columns // 2, 2).swapaxes(1, 2)
    there = np.isfinite(four)
    n = there.sum((2, 3))
    total = np.where(there, four, 0).sum((2, 3), dtype=np.float64)
    return np.where(n > 0, total / np.maximum(n, 1), np.nan).astype(np.float32)


# --------------------------------------------------------------------------------------------------
# iStar
# --------------------------------------------------------------------------------------------------
def write_istar(sample: Sample, target: Path) -> None:
    """Spots are rounded to whole pixels and radius.txt to a whole number, as iStar has them.

    A gene whose name no file can have goes by the name of its map's file, in gene-names.txt and
    cnts.tsv as well: iStar opens cnts-super/NAME.pickle.
    """
    stage = sample.stage
    locs, counts = whole_discs(sample, *read_tables(sample))
    names = [path.stem for path in sample.files.values()]
    (target / utils.MAPS.name).mkdir(parents=True)
    for name, image in zip(names, maps(sample), strict=True):
        write_pickle(target / utils.MAPS.name / f"{name}.pickle", image)
    write_pickle(target / utils.EMBEDDINGS.name, {"cls": read_embedding(sample)})
    Image.fromarray(in_mask(sample).astype(np.uint8) * 255).save(target / SMALL_MASK)
    he = stage.path(utils.HE)
    shutil.copyfile(he, target / he.name)
    radius = read_radius(stage.directory) * utils.TOKEN_PX
    texts = {
        utils.GENE_NAMES.name: "\n".join(names),
        utils.RADIUS.name: str(round(radius)),
        utils.PIXEL_SIZE.name: str(utils.PIXEL_SIZE_UM),
    }
    for name, text in texts.items():
        (target / name).write_text(f"{text}\n", encoding="utf-8", newline="\n")
    counts.columns = names
    whole = counts if (counts % 1).any(axis=None) else counts.astype(np.int64)
    for name, table in {"cnts": whole, "locs": locs[["x", "y"]].round().astype(np.int64)}.items():
        table.to_csv(target / f"{name}.tsv", sep="\t", lineterminator="\n")


def whole_discs(
    sample: Sample, locs: pd.DataFrame, counts: pd.DataFrame
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The spots whose discs lie on the image: iStar's plot_spots.py fails on any other.

    It rounds centres and radius to superpixels; a disc of radius 2 covers 5 x 5 of them.
    """
    radius = round(read_radius(sample.stage.directory) * utils.TOKEN_PX) / utils.TOKEN_PX
    row, column = (locs[["y", "x"]].to_numpy().round() / utils.TOKEN_PX).round().T
    down, right = sample.tissue.shape[0] - 1 - row, sample.tissue.shape[1] - 1 - column
    inside = np.minimum.reduce([row, column, down, right]) >= round(radius)
    if not inside.all():
        sample.stage.warn(f"{(~inside).sum()} of {len(locs)} spots reach over the image: left out")
    return locs[inside], counts[inside]


class OldNames:
    """A file for the pickler, in which numpy's parts have the names that numpy 1 knows as well."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file

    def write(self, data) -> int:
        if len(data) < LARGE_WRITE_BYTES:
            data = bytes(data).replace(b"cnumpy._core.", b"cnumpy.core.")
        return self.file.write(data)


def write_pickle(path: Path, content: Any) -> None:
    with path.open("wb") as file:
        pickle.dump(content, OldNames(file), protocol=3)  # the last with names in lines of text


# --------------------------------------------------------------------------------------------------
# tables
# --------------------------------------------------------------------------------------------------
def write_csv(sample: Sample, target: Path) -> None:
    """The maps go gene by gene into a temporary file, and come back from it in blocks of rows."""
    import pyarrow
    import pyarrow.csv

    n, genes = int(sample.tissue.sum()), sample.genes
    row, column = sample.places
    x, y = sample.centres().T
    places = {"row": row, "column": column, "x_fullres": x, "y_fullres": y}
    fields = [("row", pyarrow.int64()), ("column", pyarrow.int64())]
    fields += [("x_fullres", pyarrow.float64()), ("y_fullres", pyarrow.float64())]
    schema = pyarrow.schema([*fields, *((gene, pyarrow.float32()) for gene in genes)])
    step = max(1, TABLE_BYTES // (4 * len(genes)))
    values = utils.partial_name(target.with_suffix(".values"))
    try:
        with values.open("wb") as file:
            for image in maps(sample):
                image[sample.tissue].tofile(file)
        with target.open("wb") as raw, gzip.GzipFile("", "wb", GZIP_LEVEL, raw, mtime=0) as packed:
            options = pyarrow.csv.WriteOptions(quoting_style="needed")
            with pyarrow.csv.CSVWriter(packed, schema, write_options=options) as table:
                for start in tqdm(range(0, n, step), desc="rows", disable=None):
                    rows = slice(start, min(start + step, n))
                    columns = [places[name][rows] for name in places]
                    for i in range(len(genes)):
                        offset = 4 * (i * n + start)
                        columns.append(
                            np.fromfile(values, np.float32, rows.stop - start, offset=offset)
                        )
                    arrays = [pyarrow.array(c) for c in columns]
                    table.write_batch(pyarrow.record_batch(arrays, schema=schema))
    finally:
        values.unlink(missing_ok=True)


def write_spots(sample: Sample, target: Path) -> None:
    stage = sample.stage
    locs = tables.read_locs(stage, stage.path(utils.LOCS))
    radius = read_radius(stage.directory)
    discs = disc_weights(locs[["y", "x"]].to_numpy() / utils.TOKEN_PX, radius, sample.tissue.shape)
    kept = on_tissue(discs, np.where(sample.tissue, 0.0, np.nan), radius)
    if not kept.any():
        raise stage.error(stage.path(utils.LOCS), "has no spot on the tissue of the maps.")
    print(f"{kept.sum()} of {len(locs)} spots lie on the tissue")
    totals = np.column_stack([sum_discs(discs[kept], image) for image in maps(sample)])
    table = pd.DataFrame(totals, locs.index[kept], sample.genes)
    table.to_csv(target, lineterminator="\n", float_format="%.7g")


# --------------------------------------------------------------------------------------------------
# the command
# --------------------------------------------------------------------------------------------------
WRITERS = {
    "h5ad": write_h5ad,
    "spatialdata": write_spatialdata,
    "ometiff": write_ometiff,
    "istar": write_istar,
    "csv": write_csv,
    "spots": write_spots,
}


def bytes_needed(sample: Sample, kind: str) -> int:
    """Of the disk, before compression."""
    grid, genes, inside = sample.tissue.size, len(sample.files), int(sample.tissue.sum())
    latent = 0
    if kind in ("h5ad", "istar"):
        latent = sample.stage.path(utils.EMBEDDINGS).stat().st_size
    pixels = grid * utils.TOKEN_PX**2 * 3 * 4 // 3  # of the H&E in all its sizes
    return {
        "h5ad": 4 * inside * genes + latent + 3 * (HIRES_PX**2 + LOWRES_PX**2) + OBS_BYTES * inside,
        "spatialdata": 4 * grid * genes + pixels,
        "ometiff": 4 * grid * genes * 4 // 3,
        "istar": 4 * grid * genes + latent + sample.stage.path(utils.HE).stat().st_size,
        "csv": (4 + 12) * inside * (genes + 2),  # the temporary file, and digits
        "spots": 12 * genes * inside // SPOT_SUPERPIXELS,
    }[kind]


def output_of(args: argparse.Namespace) -> Path:
    default = OUTPUTS[args.format]
    path = args.output or args.directory / default
    ending = "".join(Path(default).suffixes)
    if not path.name.lower().endswith(ending):
        raise utils.StageError(
            f"--output {path} does not end in {ending}, as files of --format {args.format} do.",
            f"Name it {path.name}{ending}, or leave --output out for {default} in the sample.",
        )
    return path


def check_packages(kind: str) -> None:
    """Before any work, not after it."""
    try:
        for name in NEEDED.get(kind, ()):
            importlib.import_module(name)
    except ImportError as error:
        raise utils.StageError(
            f"--format {kind} needs a package that is not installed: {error}",
            "Run: pip install -r analysis/requirements.txt",
        ) from error


def read_exports(stage: utils.Stage) -> dict[str, Any]:
    """export.json: by output, what it was when this script had written it."""
    path = stage.directory / RECORD
    if not path.is_file():
        return {}
    try:
        known = json.loads(path.read_text(encoding="utf-8"))["outputs"]
        if not all(utils.is_fingerprint(export["output"]) for export in known.values()):
            raise ValueError("an output has no fingerprint")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise stage.error(path, f"is no record of exports: {error!r}", "Move it away.") from error
    return known


def name_in_record(stage: utils.Stage, path: Path) -> str:
    """Relative to the sample, so that a sample may be moved, or else the whole path."""
    whole, directory = path.resolve(), stage.directory.resolve()
    return (whole.relative_to(directory) if directory in whole.parents else whole).as_posix()


def guard(stage: utils.Stage, path: Path, known: dict[str, Any]) -> None:
    """Refuse to replace what this script did not write, unless --force; other folders even so."""
    if path.resolve().parent == stage.directory.resolve() and path.name in utils.MADE_BY:
        raise utils.StageError(
            f"{path} is the name of a file of the five scripts.", "Name another --output."
        )
    if not path.exists():
        return
    export = known.get(name_in_record(stage, path), {})
    if any(
        utils.same_as(path, was) for was in (export.get("output"), export.get("previous")) if was
    ):
        return
    if path.is_dir() and not may_be_replaced(path, stage.args.format):
        raise utils.StageError(
            f"{path} is a folder of other things than --format {stage.args.format} writes.",
            "Name another --output.",
        )
    if not stage.args.force:
        raise utils.StageError(
            f"{path} was not written by {SCRIPT}, or was changed since; it would be replaced.",
            f"Move it away, name another --output, or run: {stage.command(SCRIPT)} --force",
        )


def may_be_replaced(folder: Path, kind: str) -> bool:
    """Whether a folder is empty or looks like an export, and not like a sample or anything else."""
    if kind not in FOLDERS:
        return False
    if not any(folder.iterdir()):
        return True
    if kind == "spatialdata":
        about = folder / "zarr.json"
        return about.is_file() and "histex" in about.read_text(encoding="utf-8")
    sample_files = (utils.record_name(utils.HISTEX), *utils.HE_RAW.names)
    is_sample = any((folder / name).exists() for name in sample_files)
    return kind == "istar" and (folder / SMALL_MASK).is_file() and not is_sample


def export(stage: utils.Stage) -> None:
    args = stage.args
    target = output_of(args)
    check_packages(args.format)
    guard(stage, target, read_exports(stage))
    sample = read_sample(stage)
    need = bytes_needed(sample, args.format)
    rows, columns = sample.tissue.shape
    print(
        f"{len(sample.files)} genes, {rows} x {columns} superpixels, {sample.tissue.sum()} of them "
        f"with values: at most about {need / 1e9:.2f} GB in {target}"
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    utils.check_disk(target.parent, need, f"--format {args.format}")
    with utils.atomic(target) as partial:
        WRITERS[args.format](sample, partial)
        output = utils.fingerprint(partial)
        write_record(sample, target, output)
    print(f"wrote {target}: {output['bytes'] / 1e6:,.1f} MB")


def write_record(sample: Sample, target: Path, output: dict[str, Any]) -> None:
    """Before the export takes its name: a run cut off in between must know the one before, too."""
    stage = sample.stage
    exports, name = read_exports(stage), name_in_record(stage, target)
    previous = exports.get(name, {}).get("output")
    exports[name] = {
        "options": stage.options,
        "genes": len(sample.files),
        "superpixels": int(sample.tissue.sum()),
        "seconds": round(time.time() - stage.started, 2),
        "ended": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "warnings": stage.notes,
        "inputs": stage.inputs,
        "output": output,
        **({"previous": previous} if previous else {}),
    }
    with utils.atomic(stage.directory / RECORD) as partial:
        text = json.dumps({"script": SCRIPT, "outputs": exports}, indent=1)
        partial.write_text(text + "\n", encoding="utf-8")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    option = parser.add_argument
    option("--directory", type=utils.sample_directory, required=True, help="Folder of the sample.")
    option("--format", choices=list(OUTPUTS), required=True, help="What to write; see above.")
    genes = parser.add_mutually_exclusive_group()
    genes.add_argument(
        "--genes",
        metavar="FILE|A,B,C",
        help="Genes to export, in this order: a file with one a line, or names with commas between "
        "them; default all.",
    )
    genes.add_argument(
        "--n-genes",
        type=utils.positive,
        metavar="N",
        help="Export the N genes with the highest held-out r.",
    )
    option(
        "--output",
        type=Path,
        help="File or folder to write; without it, one of the sample: "
        f"{', '.join(OUTPUTS.values())}.",
    )
    option(
        "--force",
        action="store_true",
        help="Replace an output that this script did not write, or that was changed since.",
    )
    option(
        "--allow-stale",
        action="store_true",
        help="Use inputs even if the stage that made them is out of date.",
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    return utils.run_stage(export, SCRIPT, build_parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
