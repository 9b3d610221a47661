"""AnnData as it lies on disk, an .h5ad file or a group of a .zarr store; its raw counts and genes.

The format is simple and documented; anndata itself, which allows a few versions of pandas only, is
not needed for it. What has no value (a code of -1, a masked element, NaN) is read as "".
"""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

import h5py
import numpy as np
import pandas as pd
from scipy import sparse

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import utils
from method.calibration import machine_memory
from prepare.readable import Refused, readable
from prepare.section import unique_symbols
from prepare.tenx import KEPT_TYPE

LAYERS = ("counts", "raw_counts", "raw", "count", "umi")  # names of raw counts, looked at first
SYMBOLS = ("gene_symbols", "gene_symbol", "feature_name", "gene_name", "symbol", "SYMBOL")  # in var
GENE_IDS = ("gene_ids", "gene_id", "ensembl_id")
MAX_LOGARITHM = 20.0  # no logarithm of a count is above; counts per 10,000 are
MAX_NAMES = 2_000_000  # rows or columns of an object; 8 um bins of Visium HD are 700,000
MAX_VALUES = 2_000_000_000  # spots x genes of one section; 14,336 spots x 40,000 genes are 0.6e9
MAX_BYTES = 64 * 2**30  # of an array read at once, whatever the machine has
TEXT_BYTES = 64  # of a text in memory
HDF5 = b"\x89HDF\r\n\x1a\n"
OTHERS = {  # what other files of this kind hold -> what they are, and the way out
    "matrix": ("a matrix of Cell Ranger or Space Ranger", "Give its outs to prepare/visium.py."),
    "mod": ("MuData", "Write its RNA alone: mudata.read_h5mu(FILE)['rna'].write_h5ad(NEW)."),
    "row_attrs": ("a .loom file", "Write it as .h5ad: anndata.io.read_loom(FILE).write_h5ad(NEW)."),
    "assays": ("an h5Seurat file", "Convert it in R: SeuratDisk::Convert(FILE, dest = 'h5ad')."),
    "tables": ("a SpatialData store", "Give it by --spatialdata instead of --h5ad."),
}
REWRITE = (
    "Read it with anndata and write it again: anndata.read_h5ad(FILE).write_h5ad(NEW). If anndata "
    "cannot read it either, copy or download it again."
)


@dataclass
class Annotated:
    """AnnData on disk: groups of h5py or zarr, of which only what is needed is read."""

    path: Path
    root: Any

    @cached_property
    def ids(self) -> list[str]:
        return self.names("obs")

    def index(self, table: str) -> Any:
        group = self.root[table]
        return group[as_text([group.attrs.get("_index", "_index")])[0]]

    def size(self, table: str) -> int:
        """Rows of obs, var or raw/var, by the header."""
        (n,) = shape_of(self.index(table))
        if n > MAX_NAMES:
            raise utils.StageError(
                f"{self.path} declares {n:,} rows of {table}; expected at most {MAX_NAMES:,}.",
                "Give the object of one section, with its genes alone.",
            )
        return n

    def names(self, table: str) -> list[str]:
        """Row names of obs, var or raw/var."""
        self.size(table)
        return as_text(read_array(self.index(table)))

    def columns(self, table: str, wanted: tuple[str, ...]) -> pd.DataFrame:
        """Those of the wanted columns that obs, var or raw/var has, as text."""
        group, names = self.root[table], self.names(table)
        found = {name: as_text(read_column(group, name)) for name in wanted if name in group}
        for name, values in found.items():
            if len(values) != len(names):
                raise ValueError(f"{table}[{name!r}] has {len(values)} of {len(names)} values")
        return pd.DataFrame(found, index=names, dtype=object)

    def text_columns(self) -> list[str]:
        """Columns of obs that hold text or categories, in the order of the object."""
        obs = self.root["obs"]
        names = as_text(np.atleast_1d(np.asarray(obs.attrs.get("column-order", ()))).tolist())
        names += [name for name in sorted(obs.keys()) if name not in names]
        own = as_text([obs.attrs.get("_index", "_index")])
        return [n for n in names if n in obs and n not in own and is_text(obs, n)]

    def matrices(self) -> dict[str, tuple[str, str]]:
        """What may hold counts: name -> (path of the matrix, path of its var)."""
        layers = keys_of(self.root, "layers")
        layers = [n for n in LAYERS if n in layers] + [n for n in layers if n not in LAYERS]
        found = {"X": ("X", "var")} if "X" in self.root else {}
        found |= {f"layer {name!r}": (f"layers/{name}", "var") for name in layers}
        if "X" in keys_of(self.root, "raw"):
            found["raw"] = ("raw/X", "raw/var")
        return {name: at for name, at in found.items() if kind_of(self.root[at[0]]) != "null"}

    def read_matrix(self, place: tuple[str, str]) -> Any:
        """A matrix (spots, genes), sparse or not, of the shape that obs and its var say."""
        matrix, var = place
        node, expected = self.root[matrix], (self.size("obs"), self.size(var))
        if (shape := shape_of(node)) != expected:
            raise ValueError(f"{matrix} is {shape} for {expected[0]} obs and {expected[1]} {var}")
        return read_array(node)


# -------------------------------------------------------------------------------------------------
# elements
# -------------------------------------------------------------------------------------------------
def keys_of(group: Any, name: str) -> list[str]:
    """Names in a subgroup; none if there is no such group."""
    node = group.get(name)
    return sorted(node.keys()) if hasattr(node, "keys") else []


def as_text(values: Any) -> list[str]:
    """Values as text: whole numbers without a point, "" for what has no value."""
    return [text_of(value) for value in values]


def text_of(value: Any) -> str:
    if isinstance(value, bytes):
        return value.decode("utf-8")
    if value is None or value is pd.NA or value is pd.NaT:
        return ""
    if isinstance(value, float | np.floating):
        if np.isnan(value):
            return ""
        return str(int(value)) if float(value).is_integer() else str(float(value))
    return str(value)


def kind_of(node: Any) -> str:
    """The encoding of an element, as anndata names it."""
    found = node.attrs.get("encoding-type", node.attrs.get("h5sparse_format", ""))
    return as_text([found])[0]


def is_text(group: Any, name: str) -> bool:
    node = group[name]
    if hasattr(node, "keys"):
        return kind_of(node) in ("categorical", "nullable-string-array")
    return name in keys_of(group, "__categories") or node.dtype.kind in "OSUT"


def shape_of(node: Any) -> tuple[int, ...]:
    """The shape of a matrix or column, by its header."""
    if hasattr(node, "keys"):
        if (shape := node.attrs.get("shape", node.attrs.get("h5sparse_shape"))) is None:
            node = node["codes" if kind_of(node) == "categorical" else "values"]
            shape = node.shape
    else:
        shape = node.shape
    return tuple(int(n) for n in shape)


def read_whole(node: Any) -> np.ndarray:
    """An array on disk, unless its header declares more than the machine can hold."""
    size = TEXT_BYTES if node.dtype.kind in "OT" else node.dtype.itemsize
    need = size * float(np.prod(np.array(node.shape, float)))
    room = min(MAX_BYTES, machine_memory() or MAX_BYTES)
    if need > room:
        raise Refused(
            f"declares {tuple(node.shape)} values in {node.name}, which take {need / 1e9:,.1f} GB; "
            f"at most {room / 1e9:,.1f} GB can be read here.",
            "Give the object of one section; keep large matrices sparse.",
        )
    return np.asarray(node[()])


def read_array(node: Any) -> Any:
    """A matrix (sparse or not), a table or a column, whichever way it is encoded."""
    kind = kind_of(node)
    if not hasattr(node, "keys"):
        return read_whole(node)
    if kind.startswith(("csr", "csc")):
        parts = tuple(read_whole(node[name]) for name in ("data", "indices", "indptr"))
        matrix = (sparse.csr_array if kind.startswith("csr") else sparse.csc_array)(
            parts, shape_of(node)
        )
        matrix.check_format(full_check=True)
        return matrix
    if kind == "categorical":
        return categories_of(read_array(node["categories"]), read_whole(node["codes"]))
    if kind.startswith("nullable"):
        values, mask = read_whole(node["values"]), read_whole(node["mask"])
        found = values.astype(object)
        found[mask.astype(bool)] = None
        return found
    raise Refused(
        f"holds {node.name} encoded as {kind or 'nothing known'!r}, which is not read here.",
        "Write it as a plain or sparse array or a column of text, or drop it if it is not needed.",
    )


def categories_of(categories: Any, codes: np.ndarray) -> np.ndarray:
    """The category of every code; "" for -1, which stands for no value."""
    names = np.array([*as_text(categories), ""], object)
    codes = codes.astype(np.int64)
    if codes.size and not -1 <= codes.min() <= codes.max() < len(names) - 1:
        raise ValueError(
            f"codes from {codes.min()} to {codes.max()} of {len(names) - 1} categories"
        )
    return names[codes]


def read_column(group: Any, name: str) -> Any:
    """A column of obs or var; anndata 0.7 kept the categories of all columns in a group beside."""
    if name not in keys_of(group, "__categories"):
        return read_array(group[name])
    return categories_of(read_array(group["__categories"][name]), read_whole(group[name]))


def read_frame(node: Any) -> pd.DataFrame:
    """A table such as one of obsm, its columns in their order, as text."""
    names = as_text(np.atleast_1d(np.asarray(node.attrs["column-order"])).tolist())
    return pd.DataFrame({name: as_text(read_column(node, name)) for name in names})


# -------------------------------------------------------------------------------------------------
# files and stores
# -------------------------------------------------------------------------------------------------
def import_zarr() -> ModuleType:
    try:
        import zarr
    except ImportError as error:
        raise utils.StageError(
            f"zarr is needed to read SpatialData, but is not there: {error}",
            "Run: python -m pip install -r prepare/requirements.txt",
        ) from error
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # what fails in zarr is raised as well
    return zarr


def check_kind(path: Path) -> None:
    """Stop at what is neither HDF5 nor a folder, by its name and first bytes."""
    if not path.exists():
        raise utils.StageError(f"{path} does not exist.", "Mend the path, then run it again.")
    if path.is_dir():
        return
    with path.open("rb") as file:
        start = file.read(8)
    if start == HDF5:
        return
    if start.startswith(b"PK"):
        raise utils.StageError(
            f"{path} is a .zip archive.", f"Unpack it, then give the .zarr folder: unzip {path}"
        )
    if path.suffix.lower() in (".rds", ".rda", ".rdata", ".qs"):
        raise utils.StageError(
            f"{path} is an object of R, which is not read here.",
            "Write it as .h5ad in R, with anndataR or zellkonverter.",
        )
    if start.startswith(b"\x1f\x8b"):
        raise utils.StageError(f"{path} is packed by gzip.", f"Unpack it: gunzip {path}")
    raise utils.broken(path, "is no HDF5 file, as .h5ad files are.")


def check_content(path: Path, root: Any) -> None:
    keys = set(root.keys())
    if {"obs", "var"} <= keys:
        if not hasattr(root["obs"], "keys"):
            raise utils.StageError(
                f"{path} was written by anndata before 0.7, of 2020, in another layout.",
                "Read it and write it again with a current anndata: "
                "anndata.read_h5ad(old).write_h5ad(new).",
            )
        return
    found = next((OTHERS[name] for name in OTHERS if name in keys), None)
    if found is None:
        raise utils.StageError(
            f"{path} holds {utils.some(sorted(keys)) or 'nothing'}, no obs and var: it is no "
            f"AnnData.",
            "Give the .h5ad file or the .zarr folder that anndata wrote.",
        )
    raise utils.StageError(f"{path} is no AnnData but {found[0]}.", found[1])


@contextlib.contextmanager
def open_anndata(path: Path) -> Iterator[Annotated]:
    """An .h5ad file or a zarr group; whatever cannot be read in it is a StageError."""
    check_kind(path)
    with contextlib.ExitStack() as stack:
        stack.enter_context(readable(path, "AnnData", REWRITE))
        if path.is_dir():
            root = import_zarr().open_group(path, mode="r")
        else:
            root = stack.enter_context(h5py.File(path))
        check_content(path, root)
        data = Annotated(path, root)
        for table in ("obs", "var"):
            data.size(table)
        yield data


# -------------------------------------------------------------------------------------------------
# counts and genes
# -------------------------------------------------------------------------------------------------
def whole_counts(values: Any) -> bool:
    """True if a matrix, sparse or not, holds counts: whole, none negative, not all zero."""
    data = values.data if sparse.issparse(values) else np.asarray(values)
    if data.dtype.kind not in "biuf" or data.size == 0:
        return False
    return bool(
        np.isfinite(data).all()
        and data.min() >= 0
        and data.any()
        and (data == np.floor(data)).all()
    )


def find_counts(
    data: Annotated, layer: str | None, rows: np.ndarray
) -> tuple[sparse.csr_array, str, list[str]]:
    """(raw counts (rows, genes), path of the var of their genes, notes on where they were)."""
    places = data.matrices()
    if layer is not None:
        name = f"layer {layer!r}"
        if name not in places:
            known = utils.some(keys_of(data.root, "layers")) or "none"
            raise utils.StageError(
                f"{data.path} has no layer {layer!r}, but {known}.",
                "Name one of its layers by --layer.",
            )
        places = {name: places[name]}
    if not places:
        raise utils.StageError(
            f"{data.path} has no matrix: no X, no layers, no raw.",
            "Give the object with its raw counts.",
        )
    seen: list[str] = []
    for name, place in places.items():
        if (n := len(rows) * data.size(place[1])) > MAX_VALUES:
            raise utils.StageError(
                f"{data.path} declares {len(rows):,} spots x {data.size(place[1]):,} genes in "
                f"{name}; expected at most {MAX_VALUES:,} values of a section, not {n:,}.",
                "Give the object of one section of Visium, with its genes alone.",
            )
        values = data.read_matrix(place)
        if whole_counts(values):
            notes = [f"the counts are those of {name}"]
            notes += [f"{words}, so that it is passed over" for words in seen]
            return sparse.csr_array(values)[rows], place[1], notes
        seen += describe(values, name)
    raise utils.StageError(
        f"{data.path} holds no raw counts: {utils.some(places)} hold fractions or "
        f"negative numbers, or nothing{f' ({seen[0]})' if seen else ''}.",
        "Give the object before it was normalised, or keep its counts in layers['counts'].",
    )


def describe(values: Any, name: str) -> list[str]:
    """What was done to counts, by the looks of them; nothing if nothing can be told."""
    data = values.data if sparse.issparse(values) else values
    if data.dtype.kind != "f" or data.size == 0 or not data.any():
        return []
    if data.min() < 0:
        return [f"{name} runs from {data.min():.3g} to {data.max():.3g}: scaled, or residuals"]
    logged = "log-transformed" if data.max() < MAX_LOGARITHM else "normalised"
    return [f"{name} runs up to {data.max():.3g}: {logged}"]


def gene_names(data: Annotated, var: str) -> tuple[list[str], np.ndarray, list[str]]:
    """(unique symbols, which columns they are of, notes): symbols in place of Ensembl ids, and
    without what is no gene by feature_types."""
    names = data.names(var)
    table = data.columns(var, (*GENE_IDS, *SYMBOLS, "feature_types"))
    ids = next((table[c].tolist() for c in GENE_IDS if c in table), names)
    if names and np.mean([name.startswith("ENS") for name in names]) > 0.5:
        ids = names
        names = next((table[c].tolist() for c in SYMBOLS if c in table), names)
    if utils.duplicates(ids):  # then ids tell no more than their places
        ids = [str(i + 1) for i in range(len(names))]
    keep = np.ones(len(names), bool)
    notes = []
    if "feature_types" in table and (table["feature_types"] == KEPT_TYPE).any():
        keep = (table["feature_types"] == KEPT_TYPE).to_numpy()
        kinds = table["feature_types"][~keep].replace("", "no type").value_counts()
        notes += [f"{n} features of type {kind} are left out" for kind, n in kinds.items()]
    kept = np.flatnonzero(keep)
    return unique_symbols([names[i] for i in kept], [ids[i] for i in kept]), kept, notes
