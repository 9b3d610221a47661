"""AnnData on disk, in a group of h5py or zarr.

The format is documented and simple; anndata itself allows a few versions of pandas only.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

Group = Any  # of h5py or of zarr, which name no common type


def new_group(
    parent: Group, name: str, kind: str = "dict", encoding: str = "0.1.0", **attributes: Any
) -> Group:
    group = parent.create_group(name)
    group.attrs.update({"encoding-type": kind, "encoding-version": encoding, **attributes})
    return group


def new_array(
    parent: Group, name: str, shape: tuple[int, ...], dtype: Any, kind: str = "array", **more: Any
) -> Any:
    """An array without values; ``dtype`` str is for text."""
    if hasattr(parent, "create_array"):
        node = parent.create_array(name, shape=shape, dtype=dtype, **more)
    else:
        import h5py

        dtype = h5py.string_dtype() if dtype is str else dtype
        node = parent.create_dataset(name, shape=shape, dtype=dtype, **more)
    node.attrs.update({"encoding-type": kind, "encoding-version": "0.2.0"})
    return node


def put(parent: Group, name: str, value: Any) -> None:
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
            put(group, str(column), value[column].array)
    elif isinstance(value, pd.Categorical):
        group = new_group(parent, name, "categorical", "0.2.0", ordered=False)
        put(group, "codes", value.codes)
        put(group, "categories", value.categories.to_numpy(object))
    elif isinstance(value, str):
        new_array(parent, name, (), str, "string")[()] = value
    elif isinstance(value, float):
        new_array(parent, name, (), np.float64, "numeric-scalar")[()] = value
    else:
        value = np.asarray(value)
        kind, dtype = ("string-array", str) if value.dtype == object else ("array", value.dtype)
        new_array(parent, name, value.shape, dtype, kind)[:] = value


def put_anndata(parent: Group, parts: dict[str, Any]) -> None:
    """All parts of an AnnData but X; those not given are empty."""
    for name in ("obs", "var", "obsm", "uns", "layers", "varm", "obsp", "varp"):
        put(parent, name, parts.get(name, {}))
