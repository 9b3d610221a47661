"""The files of a Xenium run of any version: its folder or archive, molecules, cells and outlines.

Xenium Onboard Analysis writes each of them in several forms; the first one there is read. Letters
in shapes: M molecules, C cells, V vertices of outlines, G genes.
"""

from __future__ import annotations

import contextlib
import shutil
import sys
import tarfile
import tempfile
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, TextIO

import numpy as np
import pandas as pd
import pyarrow
import pyarrow.compute
from pyarrow import parquet
from scipy import sparse

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import utils
from prepare import tenx
from prepare.annotated import as_text, import_zarr, read_whole
from prepare.readable import Refused, readable
from reading import plain
from writing import disk

EXPERIMENT = "experiment.xenium"
ZARR_CELLS, ZARR_MOLECULES = "cells.zarr.zip", "transcripts.zarr.zip"  # of Xenium Explorer
MOLECULES = ("transcripts.parquet", "transcripts.csv.gz", "transcripts.csv", ZARR_MOLECULES)
CELLS = ("cells.parquet", "cells.csv.gz", "cells.csv", ZARR_CELLS)
OUTLINES = (
    "cell_boundaries.parquet", "cell_boundaries.csv.gz", "cell_boundaries.csv", ZARR_CELLS,
)  # fmt: skip
MATRIX, MTX_FOLDER = "cell_feature_matrix.h5", "cell_feature_matrix"
WANTED = {EXPERIMENT, MATRIX, *MOLECULES, *CELLS, *OUTLINES}  # of an archive, nothing else is read
PACKED = (b"PK", b"\x1f\x8b", b"BZh", b"\xfd7zXZ")  # how packed files begin, but a plain .tar
GENE = "gene"  # the kind of what counts; the other kinds are those of codeword_category:
GENE_CATEGORIES = {"predesigned_gene", "custom_gene"}
CONTROL_PREFIXES = {  # of feature names, where no column tells -> kind
    "NegControlProbe": "negative_control_probe",
    "NegControlCodeword": "negative_control_codeword",
    "NegControl": "negative_control",
    "antisense_": "negative_control_probe",
    "BLANK_": "blank_codeword",
    "Blank-": "blank_codeword",
    "UnassignedCodeword": "unassigned_codeword",
    "DeprecatedCodeword": "deprecated_codeword",
    "DEPRECATED_": "deprecated_codeword",
    "Intergenic_Region": "genomic_control_probe",
    "GenomicControl": "genomic_control_probe",
}
NAMELESS, STRANGE, KINDLESS = "no feature_name", "not in the cell matrix", "no codeword_category"
NO_GENE_BY_FLAG = "no gene by is_gene"
PLACELESS = "no place"  # of genes, but without x or y
NO_GENE = 65535  # gene_identity of a molecule of none, in zarr
BATCH = 1_000_000  # molecules in memory at a time
OUTS_HELP = "Give --outs the output folder of a Xenium run, or the .zip or .tar.gz of it."
ONE_RUN = "Give the files of one and the same run, as it wrote them."


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
    with archive.open("rb") as file:
        start = file.read(262)
    if not start.startswith(PACKED) and start[257:] != b"ustar":
        raise utils.StageError(f"{archive} is neither a folder nor an archive.", OUTS_HELP)
    with readable(archive, ".zip or .tar archive", OUTS_HELP):
        try:
            if zipfile.is_zipfile(archive):
                with zipfile.ZipFile(archive) as packed:
                    if any(m.flag_bits & 1 for m in packed.infolist()):
                        raise Refused("is packed with a password.", f"Unpack it. {OUTS_HELP}")
                    members = [(m.filename, m.file_size, not m.is_dir()) for m in packed.infolist()]
                    copy_members(archive, folder, members, packed.open)
            else:
                with tarfile.open(archive) as packed:
                    members = [(m.name, m.size, m.isreg()) for m in packed if not m.isdir()]
                    copy_members(archive, folder, members, packed.extractfile)
        except tarfile.TarError as error:
            raise utils.broken(archive, f"is no whole .zip or .tar archive: {error}") from error


def copy_members(
    archive: Path,
    folder: Path,
    members: list[tuple[str, int, bool]],
    opened: Callable[[str], Any],
) -> None:
    """Copy the wanted ones of the members (name, bytes, is a plain file) of an archive."""
    chosen: dict[str, str] = {}
    unpack_it = f"Unpack it by hand and look at what it is. {OUTS_HELP}"
    for name, _, is_plain in members:
        parts = PurePosixPath(name.replace("\\", "/")).parts
        if not parts or parts[0] == "/" or ".." in parts or ":" in parts[0]:
            raise Refused(f"holds the path {name!r}, which leads out of a folder.", unpack_it)
        wanted = parts[-1] in WANTED and len(parts) <= 3  # OUTS/, NAME/outs/
        if wanted and not is_plain:
            raise Refused(f"holds {name!r} as a link or device, not as a file.", unpack_it)
        if wanted and parts[-1] in chosen:
            raise Refused(
                f"holds {parts[-1]} twice: {chosen[parts[-1]]}, {name}.",
                "Unpack it, and give --outs the folder of one run.",
            )
        if wanted:
            chosen[parts[-1]] = name
    if not chosen:
        raise Refused(f"has none of {', '.join(sorted(WANTED))}.", OUTS_HELP)
    need = sum(size for name, size, _ in members if name in chosen.values())
    utils.check_disk(folder, need, f"Unpacking {archive.name}")
    for plain_name, name in chosen.items():
        with opened(name) as source, (folder / plain_name).open("wb") as target:
            shutil.copyfileobj(source, target)


def run_pixel_size(outs: Path) -> float:
    """um per pixel of the run's own images, to which the alignment refers."""
    path = outs / EXPERIMENT
    copy = "Copy experiment.xenium from the run, as Xenium wrote it."
    if not path.is_file():
        raise utils.StageError(f"{path} is missing; it holds the pixel size.", copy)
    with readable(path, "experiment.xenium", copy):
        content = plain.read_json(path)
        if not isinstance(content, dict) or "pixel_size" not in content:
            raise Refused("does not say a pixel_size.", copy)
        size = float(content["pixel_size"])
        if not utils.MIN_PIXEL_SIZE_UM <= size <= utils.MAX_PIXEL_SIZE_UM:
            raise Refused(f"says a pixel_size of {size:g} um.", copy)
    return size


def files_read(outs: Path, kind: str) -> list[Path]:
    """The files of which counts of a kind (--counts-of) are made, for the record."""
    groups = {
        "transcripts": [MOLECULES], "cells": [CELLS], "polygons": [CELLS, OUTLINES],
    }[kind]  # fmt: skip
    found = [outs / EXPERIMENT, *(need_one(outs, names, kind) for names in groups)]
    matrix = find_matrix(outs)
    found += [] if matrix is None else disk.files_in(matrix)
    return [path for path in dict.fromkeys(found) if path.is_file()]


def need_one(outs: Path, names: tuple[str, ...], what: str, otherwise: str = "") -> Path:
    """The first file of these names, all of which hold the same."""
    for name in names:
        if (outs / name).is_file():
            return outs / name
    raise utils.StageError(
        f"{outs} has none of {', '.join(names)}, which hold the {what}.",
        f"Copy one of them from the run into that folder{otherwise}.",
    )


# -------------------------------------------------------------------------------------------------
# cells
# -------------------------------------------------------------------------------------------------
def read_matrix(outs: Path) -> tuple[sparse.csr_array, list[str], pd.DataFrame]:
    """Counts (C, G), cells and features of the cell matrix, see tenx.read_10x_h5."""
    if (path := find_matrix(outs)) is not None:
        return tenx.read_10x(path)
    others = [n for n in (f"{MTX_FOLDER}.zarr.zip", f"{MTX_FOLDER}.tar.gz") if (outs / n).exists()]
    found = f"; {', '.join(others)} is not read" if others else ""
    raise utils.StageError(
        f"{outs} has no {MATRIX} and no folder {MTX_FOLDER}, which hold the counts of the "
        f"cells{found}.",
        f"Copy {MATRIX} from the run into that folder.",
    )


def find_matrix(outs: Path) -> Path | None:
    if (outs / MATRIX).is_file():
        return outs / MATRIX
    return outs / MTX_FOLDER if (outs / MTX_FOLDER).is_dir() else None


def read_centroids(outs: Path) -> tuple[Path, pd.DataFrame]:
    """The file, and x, y of the centroids in um; index: cell."""
    path = need_one(outs, CELLS, "places of the cells")
    if path.name == ZARR_CELLS:
        table = zarr_centroids(path)
    else:
        table = read_cell_table(path, ["x_centroid", "y_centroid"]).set_index("cell_id")
    if repeated := utils.duplicates(table.index):
        raise utils.StageError(
            f"{path} lists the cells {utils.some(repeated)} more than once.", ONE_RUN
        )
    return path, table


def read_outlines(outs: Path) -> pd.DataFrame:
    """cell_id (text), vertex_x, vertex_y (um) of the vertices (V,) of all cells."""
    path = need_one(outs, OUTLINES, "outlines of the cells", "; or take --counts-of cells")
    if path.name == ZARR_CELLS:
        return zarr_outlines(path)
    return read_cell_table(path, ["vertex_x", "vertex_y"])


def read_cell_table(path: Path, columns: list[str]) -> pd.DataFrame:
    """cell_id (text) and columns of numbers, NaN for none, of .parquet or .csv(.gz); rows without
    a cell_id are of no cell."""
    wanted = ["cell_id", *columns]
    with readable(path, "table of cells", ONE_RUN):
        if path.suffix == ".parquet":
            with open_parquet(path) as file:
                check_columns(file.schema_arrow.names, wanted)
                table = file.read(wanted).to_pandas()
        else:
            names = check_columns(csv_columns(path), wanted)
            with plain.open_text(path) as file:
                table = read_csv(file, names).rename(columns=str.strip)
        numbers = {name: pd.to_numeric(table[name]).astype(float) for name in columns}
        found = pd.DataFrame({"cell_id": as_text(table["cell_id"]), **numbers})
    return found[found["cell_id"] != ""]


def check_columns(there: list[str], needed: Iterable[str], more: Iterable[str] = ()) -> list[str]:
    """The columns to read: those needed, and more if they are there."""
    if missing := [name for name in needed if name not in there]:
        raise Refused(f"has no column {', '.join(missing)}, but {utils.some(there)}.", ONE_RUN)
    return [*needed, *(name for name in more if name in there)]


@contextlib.contextmanager
def open_parquet(path: Path) -> Iterator[parquet.ParquetFile]:
    try:
        with parquet.ParquetFile(path) as file:
            yield file
    except pyarrow.ArrowException as error:
        raise utils.broken(path, f"is no whole Parquet file: {error}") from error


def csv_columns(path: Path) -> list[str]:
    with plain.open_text(path) as file:
        return [name.strip() for name in pd.read_csv(file, nrows=0).columns]


def read_csv(file: TextIO, names: list[str], **options: Any) -> Any:
    """The columns of these names as text, None for an empty cell; see pandas for options."""

    def bare(name: str) -> str:
        return name.strip()

    return pd.read_csv(
        file, usecols=lambda name: bare(name) in names, dtype=str, keep_default_na=False,
        na_values=[""], **options,
    )  # fmt: skip


@contextlib.contextmanager
def open_zarr(path: Path) -> Iterator[Any]:
    """The root group of a .zarr.zip of Xenium Explorer."""
    zarr = import_zarr()
    with readable(path, "store of Xenium Explorer", f"Copy {path.name} from the run again."):
        store = zarr.storage.ZipStore(path, mode="r")
        try:
            yield zarr.open_group(store, mode="r")
        finally:
            store.close()


def cell_names(ids: np.ndarray) -> list[str]:
    """Cell ids as the tables have them, from those of zarr: numbers (C,), or (C, 2) prefix and
    suffix, of which the prefix is written in 8 digits a to p instead of 0 to f: aaaaaaab-1."""
    if ids.ndim == 1 or ids.shape[1] == 1:
        return [str(int(cell)) for cell in ids.ravel()]
    letters = str.maketrans("0123456789abcdef", "abcdefghijklmnop")
    return [f"{int(prefix):08x}".translate(letters) + f"-{suffix}" for prefix, suffix in ids]


def zarr_centroids(path: Path) -> pd.DataFrame:
    with open_zarr(path) as root:
        summary = root["cell_summary"]
        names = as_text(summary.attrs.get("column_names", ("cell_centroid_x", "cell_centroid_y")))
        columns = [names.index(f"cell_centroid_{axis}") for axis in "xy"]
        xy = read_whole(summary)[:, columns].astype(float)
        cells = cell_names(read_whole(root["cell_id"]))
        return pd.DataFrame(xy, index=cells, columns=["x_centroid", "y_centroid"])


def zarr_outlines(path: Path) -> pd.DataFrame:
    """Of the set of polygons called cell: (C, 2 * most vertices), x and y in turn; of XOA 1 the
    second of two in one array."""
    with open_zarr(path) as root:
        cells = np.array(cell_names(read_whole(root["cell_id"])), object)
        if "polygon_sets" in root:
            names = as_text(root.attrs.get("polygon_set_names", ("nucleus", "cell")))
            found = root["polygon_sets"][str(names.index("cell"))]
            of = read_whole(found["cell_index"])
            n, xy = read_whole(found["num_vertices"]), read_whole(found["vertices"])
        else:
            n, xy = (read_whole(root[f"polygon_{k}"])[1] for k in ("num_vertices", "vertices"))
            of = np.arange(len(cells))
        xy = xy.reshape(len(n), -1, 2).astype(float)
        used = np.arange(xy.shape[1]) < n[:, None]
        return pd.DataFrame(xy[used], columns=["vertex_x", "vertex_y"]).assign(
            cell_id=np.repeat(cells[of], used.sum(axis=1))
        )


# -------------------------------------------------------------------------------------------------
# molecules
# -------------------------------------------------------------------------------------------------
@dataclass
class Batch:
    """Some molecules (M), in the order of the file."""

    features: np.ndarray  # names, text
    feature: np.ndarray  # (M,) index of features; -1: none
    xy: np.ndarray  # (M, 2) um; NaN: no place
    quality: np.ndarray  # (M,) NaN: none
    is_gene: np.ndarray | None = None  # bool (M,)
    categories: np.ndarray | None = None  # text; of codeword_category
    category: np.ndarray | None = None  # (M,) index of categories; -1: none


def kind_by_name(name: str, panel: set[str] | None) -> str:
    for prefix, kind in CONTROL_PREFIXES.items():
        if name.startswith(prefix):
            return kind
    return GENE if panel is None or name in panel else STRANGE


@dataclass
class Molecules:
    """The file of molecules, read again for every pass.

    A molecule counts if it is of a gene, has a place, and is of the quality wanted.
    """

    path: Path
    quality: float
    kinds: list[str] = field(default_factory=lambda: [GENE])  # the first of them is what counts

    @cached_property
    def panel(self) -> set[str] | None:
        """Genes, read where no column of the molecules tells them; None: all but known controls."""
        outs = self.path.parent
        return None if find_matrix(outs) is None else set(read_matrix(outs)[2]["name"])

    def codes_of(self, kinds: list[str]) -> np.ndarray:
        """Index of each kind; new ones are added."""
        self.kinds += [kind for kind in dict.fromkeys(kinds) if kind not in self.kinds]
        return np.array([self.kinds.index(kind) for kind in kinds])

    def kind_of(self, batch: Batch) -> np.ndarray:
        """Index of the kind (M,) of every molecule."""
        told = batch.is_gene is not None or batch.categories is not None
        names = [kind_by_name(n, None if told else self.panel) for n in batch.features]
        kind = self.codes_of([*names, NAMELESS])[batch.feature]
        nameless, strange, placeless = self.codes_of([NAMELESS, NO_GENE_BY_FLAG, PLACELESS])
        if batch.categories is not None:
            said = [GENE if c in GENE_CATEGORIES else c for c in batch.categories]
            kind = self.codes_of([*said, KINDLESS])[batch.category]
        if batch.is_gene is not None:
            kind = np.where(batch.is_gene, 0, np.where(kind == 0, strange, kind))
        kind = np.where(batch.feature < 0, nameless, kind)
        return np.where((kind == 0) & ~np.isfinite(batch.xy).all(axis=1), placeless, kind)

    def counted(self) -> Iterator[tuple[Batch, np.ndarray, np.ndarray]]:
        """Batches; which molecules (M,) count, and of which kind (M,) all of them are."""
        for batch in batches(self.path):
            kind = self.kind_of(batch)
            yield batch, (kind == 0) & (batch.quality >= self.quality), kind


@dataclass
class Survey:
    """What a first pass over the molecules finds."""

    genes: list[str] = field(default_factory=list)
    low: np.ndarray = field(default_factory=lambda: np.full(2, np.inf))  # x, y in um
    high: np.ndarray = field(default_factory=lambda: np.full(2, -np.inf))
    controls: set[str] = field(default_factory=set)  # features of which molecules are left out
    kinds: Counter[str] = field(default_factory=Counter)  # kind -> molecules left out
    read: int = 0
    poor: int = 0  # below the quality wanted, or without any

    def notes(self, quality: float) -> list[str]:
        by_kind = ", ".join(f"{n:,} {kind}" for kind, n in sorted(self.kinds.items()))
        return [
            f"{self.poor} of {self.read} molecules are below quality {quality:g}",
            f"{self.kinds.total()} molecules of {len(self.controls)} controls are left out"
            + (f": {by_kind}" if by_kind else ""),
        ]


def survey(molecules: Molecules) -> Survey:
    found, genes = Survey(), set[str]()
    total = np.zeros(0, np.int64)
    for batch, counts, kind in molecules.counted():
        good = batch.quality >= molecules.quality
        found.read += len(good)
        found.poor += int((~good).sum())
        genes.update(batch.features[np.unique(batch.feature[counts])])
        others = batch.feature[good & ~counts & (batch.feature >= 0)]
        found.controls.update(batch.features[np.unique(others)])
        seen = np.bincount(kind[good], minlength=len(molecules.kinds))
        total = seen + np.pad(total, (0, len(seen) - len(total)))
        if counts.any():
            found.low = np.minimum(found.low, batch.xy[counts].min(0))
            found.high = np.maximum(found.high, batch.xy[counts].max(0))
    found.kinds = Counter(
        {k: int(n) for k, n in zip(molecules.kinds[1:], total[1:], strict=True) if n}
    )
    if not genes:
        left_out = ", ".join(f"{n:,} {kind}" for kind, n in sorted(found.kinds.items()))
        raise utils.StageError(
            f"{molecules.path} holds no molecule of a gene with quality {molecules.quality:g} or "
            f"more, of {found.read} in all{f' ({left_out})' if left_out else ''}.",
            "Give the molecules of the run, unfiltered; see --min-quality, too.",
        )
    found.genes = sorted(genes)
    return found


def batches(path: Path) -> Iterator[Batch]:
    """All molecules, a few at a time, from any of the forms in which a run has them."""
    if path.suffix == ".parquet":
        return parquet_batches(path)
    return zarr_batches(path) if path.name == ZARR_MOLECULES else csv_batches(path)


PLACES = ("x_location", "y_location", "qv")
NEEDED, TELLING = ("feature_name", *PLACES), ("is_gene", "codeword_category")


def parquet_batches(path: Path) -> Iterator[Batch]:
    with readable(path, "table of molecules", ONE_RUN), open_parquet(path) as file:
        wanted = check_columns(file.schema_arrow.names, NEEDED, TELLING)
        for part in file.iter_batches(BATCH, columns=wanted):
            try:
                batch = arrow_batch(part)
            except pyarrow.ArrowException as error:  # whole, but of other types
                raise ValueError(str(error)) from error
            yield batch


def arrow_batch(part: pyarrow.RecordBatch) -> Batch:
    columns = {name: part.column(name) for name in part.schema.names}
    features, feature = encoded(columns["feature_name"])
    numbers = [numbers_of(columns[name]) for name in PLACES]
    batch = Batch(features, feature, np.column_stack(numbers[:2]), numbers[2])
    if "is_gene" in columns:
        yes = columns["is_gene"].cast(pyarrow.bool_())
        batch.is_gene = yes.fill_null(False).to_numpy(zero_copy_only=False)
    if "codeword_category" in columns:
        batch.categories, batch.category = encoded(columns["codeword_category"])
    return batch


def numbers_of(column: pyarrow.Array) -> np.ndarray:
    """A column as float64; NaN for null."""
    return np.asarray(column.cast(pyarrow.float64()).to_numpy(zero_copy_only=False))


def encoded(column: pyarrow.Array) -> tuple[np.ndarray, np.ndarray]:
    """Different values of a column (text), and the index of each (M,); -1 for null."""
    if not pyarrow.types.is_dictionary(column.type):
        column = column.dictionary_encode()
    names = np.array(as_text(column.dictionary.to_pylist()), object)
    codes = column.indices.cast(pyarrow.int64()).fill_null(-1).to_numpy(zero_copy_only=False)
    return names, np.where((codes >= 0) & (np.append(names, "")[codes] == ""), -1, codes)


def csv_batches(path: Path) -> Iterator[Batch]:
    with readable(path, "table of molecules", ONE_RUN), plain.open_text(path) as file:
        wanted = check_columns(csv_columns(path), NEEDED, TELLING)
        for part in read_csv(file, wanted, chunksize=BATCH):
            table = part.rename(columns=str.strip)
            feature, features = pd.factorize(table["feature_name"])
            x, y, quality = (pd.to_numeric(table[name]).to_numpy(float) for name in PLACES)
            batch = Batch(np.asarray(features, object), feature, np.column_stack([x, y]), quality)
            if "is_gene" in table:
                batch.is_gene = table["is_gene"].str.lower().isin({"true", "1"}).to_numpy()
            if "codeword_category" in table:
                codes, names = pd.factorize(table["codeword_category"])
                batch.category, batch.categories = codes, np.asarray(names, object)
            yield batch


def zarr_batches(path: Path) -> Iterator[Batch]:
    """Of the finest level of the grid; every tile of it holds the molecules of one square."""
    with open_zarr(path) as root:
        features = np.array(as_text(root.attrs["gene_names"]), object)
        level = root["grids"]["0"]
        for tile in sorted(level.group_keys()):
            group = level[tile]
            xy = read_whole(group["location"])[:, :2].astype(float)
            gene = read_whole(group["gene_identity"]).reshape(len(xy), -1)[:, 0].astype(np.int64)
            gene = np.where(gene == NO_GENE, -1, gene)
            if len(gene) and gene.max() >= len(features):
                raise ValueError(f"gene {gene.max()} of {len(features)} in tile {tile}")
            quality = read_whole(group["quality_score"]).reshape(len(xy), -1)[:, 0].astype(float)
            yield Batch(features, gene, xy, quality)
