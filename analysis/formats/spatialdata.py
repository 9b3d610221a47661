"""--format spatialdata of analysis/export.py: a SpatialData .zarr (zarr 3)."""

from __future__ import annotations

import errno
import json
import os
import struct
import warnings
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd
import pyarrow
import pyarrow.parquet
import zarr

import utils
from analysis import inputs
from analysis.formats.mapset import MapSet, each_map, in_mask, read_labels, records_of
from analysis.formats.nodes import new_group, put, put_anndata
from reading import images
from writing import disk
from writing.progress import Bar

CHUNK_PX = 1024  # columns of a chunk of an image
HE_BAND_PX = 896  # rows of he.jpg at a time: four tiles, which can be halved seven times
SMALLEST_LEVEL_PX = 1000  # of the H&E's pyramid
MOST_HALVINGS = 5  # of the sides of he.jpg, which are multiples of 224
POINT = struct.Struct("<BIdd")  # WKB: little endian, type 1, x, y


def bytes_needed(source: MapSet) -> int:
    """Of the disk, before compression."""
    he = source.tissue.size * utils.TOKEN_PX**2 * 3 * 4 // 3  # in all its sizes
    return 4 * source.tissue.size * len(source.files) + he


def write(source: MapSet, target: Path) -> None:
    spots, counts = read_circles(source)
    root = zarr.create_group(target, zarr_format=3)
    root.attrs["spatialdata_attrs"] = {"version": "0.2", "spatialdata_software_version": "0.7.3"}
    root.attrs["histex"] = records_of(source)
    kinds = {kind: root.create_group(kind) for kind in ("images", "labels", "shapes", "tables")}
    shape, superpixel = source.tissue.shape, source.scale * utils.TOKEN_PX

    expression = add_raster(
        kinds["images"], "expression", [shape], np.float32, superpixel, source.genes
    )[0]
    for i, image in enumerate(each_map(source)):
        expression[i] = image
    write_he(source, kinds["images"])
    labels = {"tissue": in_mask(source).astype(np.uint8)}
    if found := read_labels(source, "region"):
        labels["regions"] = found[0].astype(np.uint16)
    for name, image in labels.items():
        add_raster(kinds["labels"], name, [shape], image.dtype, superpixel)[0][:] = image
    kinds["labels"].attrs["ome"] = {"labels": list(labels)}
    write_circles(kinds["shapes"], target, spots)
    write_counts(kinds["tables"], spots, counts)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that other programs may not know of it
        zarr.consolidate_metadata(root.store)
    rasters = {"images/expression", *(f"labels/{name}" for name in labels)}
    check_whole(target, {*kinds, *rasters, "shapes/spots", "tables/counts"})


def check_whole(target: Path, elements: set[str]) -> None:
    """Raise an OSError if an element, or a part of one, is missing in the store or in its list.

    To zarr, what cannot be opened is not there: it leaves it out of the list that readers go by.
    A folder that was removed it makes again, with what is still to be written.
    """
    about = json.loads((target / "zarr.json").read_text(encoding="utf-8"))
    listed = {*about["consolidated_metadata"]["metadata"]}
    files = [path for path in disk.files_in(target) if path.name == "zarr.json"]
    there = {path.parent.relative_to(target).as_posix() for path in files} - {"."}
    for node in sorted((listed ^ there) | (elements - there)):
        path = target / node / "zarr.json"
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))


def read_circles(source: MapSet) -> tuple[pd.DataFrame, pd.DataFrame]:
    """x, y and radius of the spots in pixels of he-raw; their counts of the exported genes."""
    locs, counts = inputs.read_tables(source.stage, source.genes)
    x, y = source.to_raw(locs[["x", "y"]].to_numpy()).T
    radius = inputs.read_radius(source.stage.directory) * utils.TOKEN_PX * source.raw_px
    return pd.DataFrame({"x": x, "y": y, "radius": radius}, locs.index), counts


def axes_of(names: str, unit: bool = False) -> list[dict[str, str]]:
    axes = [{"name": name, "type": "channel" if name == "c" else "space"} for name in names]
    return [a | {"unit": "unit"} if unit and a["type"] == "space" else a for a in axes]


def to_global(names: str, kind: dict[str, Any]) -> list[dict[str, Any]]:
    """The transformation into pixels of he-raw."""
    axes = axes_of(names, unit=True)
    system = {"input": {"name": names, "axes": axes}, "output": {"name": "global", "axes": axes}}
    return [kind | system]


def add_raster(
    parent: zarr.Group,
    name: str,
    sizes: list[tuple[int, int]],
    dtype: Any,
    scale: np.ndarray,
    channels: list[str] | None = None,
) -> list[zarr.Array]:
    """An image (c, y, x) or labels (y, x) of one or more levels, as yet without pixels.

    ``scale`` are pixels of he-raw per pixel of the first level, down and across. A band of he.jpg,
    halved, is whole chunks at every level.
    """
    names, group = "yx" if channels is None else "cyx", parent.create_group(name)
    first = () if channels is None else (len(channels),)
    depth = () if channels is None else (3 if dtype == np.uint8 else 1,)
    ones, arrays, datasets = [1.0] * len(first), [], []
    for level, (rows, columns) in enumerate(sizes):
        chunks = (*depth, min(rows, HE_BAND_PX >> level), min(columns, CHUNK_PX))
        array = group.create_array(
            f"s{level}", shape=(*first, rows, columns), dtype=dtype, chunks=chunks,
            dimension_names=list(names),
        )  # fmt: skip
        arrays.append(array)
        steps = {"type": "scale", "scale": [*ones, *[float(2**level)] * 2]}
        datasets.append({"path": f"s{level}", "coordinateTransformations": [steps]})
    whole = {"type": "scale", "scale": [*ones, *scale.tolist()]}
    multiscale = {
        "name": name,
        "axes": axes_of(names),
        "datasets": datasets,
        "coordinateTransformations": to_global(names, whole),
    }
    ome: dict[str, Any] = {"version": "0.5-dev-spatialdata", "multiscales": [multiscale]}
    if channels is None:
        ome["image-label"] = {"version": "0.5"}
    else:
        ome["omero"] = {"channels": [{"label": channel} for channel in channels]}
    group.attrs.update({"ome": ome, "spatialdata_attrs": {"version": "0.3"}})
    return arrays


def write_he(source: MapSet, parent: zarr.Group) -> None:
    """The whole of he.jpg with its padding, halved until it is small."""
    rows, columns = (side * utils.TOKEN_PX for side in source.tissue.shape)
    sizes = [
        (rows >> n, columns >> n)
        for n in range(MOST_HALVINGS + 1)
        if n == 0 or max(rows, columns) >> (n - 1) > SMALLEST_LEVEL_PX
    ]
    levels = add_raster(parent, "he", sizes, np.uint8, source.scale, ["r", "g", "b"])
    with images.ImageRows(source.stage, source.stage.path(utils.HE)) as image:
        for top in Bar(range(0, rows, HE_BAND_PX), "H&E"):
            band = image[top : top + HE_BAND_PX]
            for level, array in enumerate(levels):
                if level:
                    band = cv2.resize(band, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)
                start = top >> level
                array[:, start : start + len(band)] = np.moveaxis(band, 2, 0)


def write_circles(shapes: zarr.Group, target: Path, spots: pd.DataFrame) -> None:
    """GeoParquet of the points, with a radius."""
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


def write_counts(tables: zarr.Group, spots: pd.DataFrame, counts: pd.DataFrame) -> None:
    """The table of what the spots measured, which annotates their circles."""
    ids, genes = spots.index.to_numpy(object), pd.Index(list(counts), dtype=object)
    keys = {"region": "spots", "region_key": "region", "instance_key": "spot_id"}
    extra = {"spatialdata-encoding-type": "ngff:regions_table", "version": "0.2", **keys}
    group = new_group(tables, "counts", "anndata", **extra)
    region = pd.Categorical.from_codes(np.zeros(len(ids), int), pd.Index(["spots"], dtype=object))
    put(group, "X", counts.to_numpy(np.float32))
    parts = {
        "obs": pd.DataFrame({"region": region, "spot_id": ids}, pd.Index(ids, dtype=object)),
        "var": pd.DataFrame({"mean_counts": counts.mean().to_numpy(np.float64)}, genes),
        "obsm": {"spatial": spots[["x", "y"]].to_numpy()},
        "uns": {"spatialdata_attrs": keys},
    }
    put_anndata(group, parts)
