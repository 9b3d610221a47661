"""The matrices of 10x: .h5 files and folders of matrix.mtx, as Cell Ranger, Space Ranger and Xenium
write them; used by the prepare scripts.
"""

from __future__ import annotations

import contextlib
import csv
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import sparse
from scipy.io import mmread

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import utils
from prepare.common import broken

KEPT_TYPE = "Gene Expression"  # of 10x feature types; the others are controls and antibodies


def read_10x_h5(path: Path) -> tuple[sparse.csr_array, list[str], pd.DataFrame]:
    """Counts (barcodes, genes), barcodes, and features (id, name, type) of a 10x .h5 matrix.

    Space Ranger 1 to 4, Xenium, and Cell Ranger 2 (a group per genome). Features other than genes
    are dropped; ``features.attrs["dropped"]`` counts them: type -> (features, molecules).
    """
    with open_h5(path) as group:
        shape = tuple(int(n) for n in group["shape"][:])
        parts = (group[key][:] for key in ("data", "indices", "indptr"))
        data, indices, indptr = (np.asarray(part) for part in parts)
        check_columns(path, data, indices, indptr, shape)
        counts = sparse.csr_array((data, indices, indptr), shape=shape[::-1])
        barcodes = decode(group["barcodes"][:])
        features = read_h5_features(group)
    return keep_genes(counts, barcodes, features, path)


@contextlib.contextmanager
def open_h5(path: Path) -> Iterator[Any]:
    """The group of a 10x .h5 file that holds the matrix."""
    import h5py

    if not path.is_file():
        raise utils.StageError(f"{path} is missing.", "Give the folder that Space Ranger wrote.")
    try:
        with h5py.File(path) as file:
            groups = [g for g in file.values() if isinstance(g, h5py.Group) and "indptr" in g]
            if len(groups) != 1:
                raise broken(path, f"holds {len(groups)} 10x matrices; expected one.")
            yield groups[0]
    except utils.StageError:
        raise
    except (OSError, KeyError, RuntimeError, ValueError, TypeError) as error:
        raise broken(path, f"is no whole 10x matrix in HDF5: {error}") from error


def read_h5_features(group: Any) -> pd.DataFrame:
    if "features" in group:
        names = {"id": "id", "name": "name", "type": "feature_type"}
        return pd.DataFrame({key: decode(group["features"][n][:]) for key, n in names.items()})
    table = pd.DataFrame({"id": decode(group["genes"][:]), "name": decode(group["gene_names"][:])})
    return table.assign(type=KEPT_TYPE)


def decode(values: np.ndarray) -> list[str]:
    return [v.decode("utf-8") if isinstance(v, bytes) else str(v) for v in values.tolist()]


def check_columns(
    path: Path, data: np.ndarray, indices: np.ndarray, indptr: np.ndarray, shape: tuple[int, ...]
) -> None:
    """Check a compressed matrix of (features, barcodes) before anything trusts its indices."""
    whole = (
        len(indptr) == shape[1] + 1
        and indptr[0] == 0
        and (np.diff(indptr) >= 0).all()
        and indptr[-1] == len(data) == len(indices)
        and (len(indices) == 0 or (indices.min() >= 0 and indices.max() < shape[0]))
    )
    if not whole:
        raise broken(path, f"is damaged: its indices do not fit a matrix of {shape}.")


def read_10x_mtx(folder: Path) -> tuple[sparse.csr_array, list[str], pd.DataFrame]:
    """The same from a folder of matrix.mtx, barcodes.tsv and features.tsv (or genes.tsv), .gz or
    not."""
    matrix = find_one(folder, "matrix.mtx")
    barcodes_path = find_one(folder, "barcodes.tsv")
    features_path = find_one(folder, "features.tsv", "genes.tsv")
    try:
        counts = sparse.csr_array(mmread(matrix).T)
        barcodes = read_tsv(barcodes_path)[0].tolist()
        table = read_tsv(features_path)
    except (ValueError, OSError, EOFError, StopIteration) as error:
        raise broken(folder, f"is no whole 10x matrix: {error}") from error
    if table.shape[1] == 1:
        raise broken(features_path, "has one column only; expected gene id, symbol and type.")
    types = table[2] if table.shape[1] > 2 else KEPT_TYPE
    features = pd.DataFrame({"id": table[0], "name": table[1]}).assign(type=types)
    return keep_genes(counts, barcodes, features, matrix)


def find_one(folder: Path, *names: str) -> Path:
    """The file of one of these names, plain or gzipped."""
    for name in names:
        for path in (folder / f"{name}.gz", folder / name):
            if path.is_file():
                return path
    raise utils.StageError(
        f"{folder} has no {' or '.join(names)} (plain or .gz).",
        "Give the folder as Space Ranger wrote it.",
    )


def read_tsv(path: Path) -> pd.DataFrame:
    return pd.read_csv(
        path, sep="\t", header=None, dtype=str, keep_default_na=False, quoting=csv.QUOTE_NONE
    )


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
    keep = (features["type"] == KEPT_TYPE).to_numpy()
    if not keep.any():
        raise broken(path, f"has no {KEPT_TYPE} but {utils.some(features['type'].unique())}.")
    molecules = np.asarray(counts.sum(axis=0)).ravel()
    dropped = {
        kind: (
            (features["type"] == kind).sum().item(),
            float(molecules[features["type"] == kind].sum()),
        )
        for kind in features["type"][~keep].unique()
    }
    kept = features[keep].reset_index(drop=True)
    kept.attrs["dropped"] = dropped
    return counts[:, np.flatnonzero(keep)], barcodes, kept


def dropped_notes(features: pd.DataFrame) -> list[str]:
    return [
        f"{n} features of type {kind} with {molecules:,.0f} molecules are left out"
        for kind, (n, molecules) in features.attrs.get("dropped", {}).items()
    ]
