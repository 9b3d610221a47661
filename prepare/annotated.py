"""AnnData as it lies on disk, an .h5ad file or a group of a .zarr store; its raw counts and genes.

The format is simple and documented; anndata itself, which allows a few versions of pandas only, is
not needed for it.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import h5py
import numpy as np
import pandas as pd
from scipy import sparse

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import utils
from prepare.section import unique_symbols
from prepare.tenx import KEPT_TYPE, decode

LAYERS = ("counts", "raw_counts", "raw", "count", "umi")  # names of raw counts, looked at first
SYMBOLS = ("gene_symbols", "gene_symbol", "feature_name", "gene_name", "symbol", "SYMBOL")  # in var
GENE_IDS = ("gene_ids", "gene_id", "ensembl_id")
MAX_LOGARITHM = 20.0  # no logarithm of a count is above; counts per 10,000 are


@dataclass
class Annotated:
    """AnnData on disk: groups of h5py or zarr, of which only what is needed is read."""

    path: Path
    root: Any

    @property
    def ids(self) -> list[str]:
        return self.names("obs")

    def names(self, table: str) -> list[str]:
        """Row names of obs, var or raw/var."""
        group = self.root[table]
        return decode(read_array(group[group.attrs.get("_index", "_index")]))

    def columns(self, table: str, wanted: tuple[str, ...]) -> pd.DataFrame:
        """Those of the wanted columns that obs, var or raw/var has, as text."""
        group = self.root[table]
        found = {name: decode(read_column(group, name)) for name in wanted if name in group}
        return pd.DataFrame(found, index=self.names(table), dtype=object)

    def matrices(self) -> dict[str, tuple[str, str]]:
        """What may hold counts: name -> (path of the matrix, path of its var)."""
        layers = keys_of(self.root, "layers")
        layers = [n for n in LAYERS if n in layers] + [n for n in layers if n not in LAYERS]
        found = {"X": ("X", "var")} if "X" in self.root else {}
        found |= {f"layer {name!r}": (f"layers/{name}", "var") for name in layers}
        if "X" in keys_of(self.root, "raw"):
            found["raw"] = ("raw/X", "raw/var")
        return found


def keys_of(group: Any, name: str) -> list[str]:
    """Names in a subgroup; none if there is no such group."""
    node = group.get(name)
    return sorted(node.keys()) if hasattr(node, "keys") else []


def read_array(node: Any) -> Any:
    """A matrix (sparse or not) or a column, whichever way it is encoded."""
    if not hasattr(node, "keys"):
        return np.asarray(node[()])
    kind = str(node.attrs.get("encoding-type", node.attrs.get("h5sparse_format", "")))
    if kind.startswith(("csr", "csc")):
        shape = tuple(int(n) for n in node.attrs.get("shape", node.attrs.get("h5sparse_shape")))
        parts = tuple(np.asarray(node[name][()]) for name in ("data", "indices", "indptr"))
        matrix = (sparse.csr_array if kind.startswith("csr") else sparse.csc_array)(parts, shape)
        matrix.check_format(full_check=True)
        return matrix
    if kind == "categorical":
        categories = np.array([*decode(read_array(node["categories"])), ""], object)
        return categories[np.asarray(node["codes"][()])]  # code -1: no value
    if kind.startswith("nullable"):
        values = np.asarray(node["values"][()]).astype(object)
        values[np.asarray(node["mask"][()])] = ""
        return values
    raise ValueError(f"an element encoded as {kind!r}")


def read_column(group: Any, name: str) -> Any:
    """A column of obs or var; anndata 0.7 kept the categories of all columns in a group beside."""
    if name not in keys_of(group, "__categories"):
        return read_array(group[name])
    categories = np.array([*decode(read_array(group["__categories"][name])), ""], object)
    return categories[np.asarray(group[name][()])]  # code -1: no value


def import_zarr() -> ModuleType:
    try:
        import zarr
    except ImportError as error:
        raise utils.StageError(
            f"zarr is needed to read SpatialData, but is not there: {error}",
            "Run: python -m pip install -r prepare/requirements.txt",
        ) from error
    return zarr


@contextlib.contextmanager
def open_anndata(path: Path) -> Iterator[Annotated]:
    """An .h5ad file or a zarr group; whatever cannot be read in it is a StageError."""
    if not path.exists():
        raise utils.StageError(f"{path} does not exist.", "Mend the path, then run it again.")
    try:
        with contextlib.ExitStack() as stack:
            if path.is_dir():
                root = import_zarr().open_group(path, mode="r")
            else:
                root = stack.enter_context(h5py.File(path))
            if not {"obs", "var"} <= set(root):
                raise utils.broken(path, "holds no obs and var: it is no AnnData.")
            if not hasattr(root["obs"], "keys"):
                raise utils.StageError(
                    f"{path} was written by anndata before 0.7, of 2020, in another layout.",
                    "Read it and write it again with a current anndata: "
                    "anndata.read_h5ad(old).write_h5ad(new).",
                )
            yield Annotated(path, root)
    except (OSError, KeyError, ValueError, TypeError, RuntimeError, IndexError) as error:
        if isinstance(error, utils.StageError):
            raise
        raise utils.broken(path, f"is no whole AnnData: {error!r:.300}") from error


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


def find_counts(data: Annotated, layer: str | None) -> tuple[sparse.csr_array, str, str]:
    """(raw counts (spots, genes), path of the var of their genes, where they were found)."""
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
    seen = ""
    for name, (matrix, var) in places.items():
        values = read_array(data.root[matrix])
        if whole_counts(values):
            return sparse.csr_array(values), var, name
        seen = seen or describe(values, name)
    raise utils.StageError(
        f"{data.path} holds no raw counts: {utils.some(places)} hold fractions or negative "
        f"numbers, or nothing{seen}.",
        "Give the object before it was normalised, or keep its counts in layers['counts'].",
    )


def describe(values: Any, name: str) -> str:
    """What was done to counts, by the looks of them."""
    data = values.data if sparse.issparse(values) else values
    if data.dtype.kind != "f" or data.size == 0 or not data.any():
        return ""
    if data.min() < 0:
        return f" ({name} runs from {data.min():.3g} to {data.max():.3g}: scaled, or residuals)"
    logged = "log-transformed" if data.max() < MAX_LOGARITHM else "normalised"
    return f" ({name} runs up to {data.max():.3g}: {logged})"


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
        if not keep.all():
            notes.append(f"{(~keep).sum()} features that are no genes are left out")
    kept = np.flatnonzero(keep)
    return unique_symbols([names[i] for i in kept], [ids[i] for i in kept]), kept, notes
