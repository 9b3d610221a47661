"""Stores of SpatialData (.zarr folders): tables, circles, images, the transforms between them."""

from __future__ import annotations

import argparse
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import utils
from prepare import scans
from prepare.annotated import (
    Annotated,
    check_kind,
    import_zarr,
    open_anndata,
    read_array,
    text_of,
)
from prepare.libraries import SourceSpots, Spots, array_of, spots_of
from prepare.readable import Refused, readable

WHOLE_IMAGE = "Give the full-resolution image by --image."
KINDS = ("tables", "table", "shapes", "points", "images", "labels")  # folders of a store
REWRITE = (
    "Read the store with spatialdata and write it again: spatialdata.read_zarr(OLD).write(NEW). If "
    "spatialdata cannot read it either, copy or download it again."
)
POINT = 1  # type of a geometry in WKB
CHUNK = 4e9  # values of a chunk, which is decoded whole
SAME_PX = 0.5  # systems that place all spots this near to each other are the same


# -------------------------------------------------------------------------------------------------
# elements of a store
# -------------------------------------------------------------------------------------------------
def check_store(store: Path) -> None:
    check_kind(store)
    if store.is_dir() and any((store / kind).is_dir() for kind in KINDS):
        return
    anndata = not store.is_dir() or (store / "obs").is_dir()
    raise utils.StageError(
        f"{store} is no SpatialData store: it has none of the folders {', '.join(KINDS)}.",
        f"Run: python prepare/scverse.py --h5ad {store} --image FULLRES --directory DIR"
        if anndata
        else "Give the .zarr folder that spatialdata wrote.",
    )


def elements(store: Path, kind: str) -> list[str]:
    folder = store / kind
    if not folder.is_dir():
        return []
    return sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


def choose_element(store: Path, kind: str, name: str | None, option: str) -> Path:
    """The element of that name, or the only one of its kind."""
    there = elements(store, kind)
    if name is None and len(there) == 1:
        return store / kind / there[0]
    if name in there:
        return store / kind / name
    found = f"has no {kind}" if not there else f"has the {kind} {', '.join(there)}"
    raise utils.StageError(
        f"{store} {found}; wanted {'one' if name is None else repr(name)}.",
        f"Choose by {option} NAME." if there else "Give the store of a Visium section.",
    )


def attributes_of(path: Path) -> dict[str, Any]:
    return dict(import_zarr().open_group(path, mode="r").attrs.asdict())


# -------------------------------------------------------------------------------------------------
# images
# -------------------------------------------------------------------------------------------------
class ZarrSlide(scans.Slide):
    """A multiscale raster (c, y, x) of a SpatialData store."""

    def __init__(self, path: Path) -> None:
        with readable(path, "image of SpatialData", REWRITE):
            group = import_zarr().open_group(path, mode="r")
            self.attributes = image_attributes(group.attrs.asdict())
            self.datasets = self.attributes["datasets"]
            axes = "".join(axis["name"] for axis in self.attributes["axes"])
            self.arrays = [group[level["path"]] for level in self.datasets]
            first = self.arrays[0]
            if axes != "cyx" or first.shape[0] not in (3, 4) or first.dtype != np.uint8:
                raise Refused(
                    f"holds {first.dtype} {first.shape} ({axes}); expected an H&E image, uint8, 3 "
                    f"channels (cyx).",
                    WHOLE_IMAGE,
                )
            sizes = [array.shape[:0:-1] for array in self.arrays]
            if any(len(size) != 2 or min(size) < 1 for size in sizes):
                raise ValueError(f"levels of {sizes} px")
            if (large := max(np.prod(array.chunks, dtype=float) for array in self.arrays)) > CHUNK:
                raise Refused(f"declares chunks of {large:,.0f} values.", WHOLE_IMAGE)
        super().__init__(path, sizes, None)

    def read_level(self, level: int, x: int, y: int, width: int, height: int) -> np.ndarray:
        with readable(self.path, "image of SpatialData", REWRITE):
            part = np.asarray(self.arrays[level][:, y : y + height, x : x + width])
        return scans.opaque_rgb(np.ascontiguousarray(np.moveaxis(part, 0, 2)))

    def systems(self) -> dict[str, np.ndarray]:
        """Coordinate system -> 3 x 3 that leads from px of the finest level into it."""
        with readable(self.path, "image of SpatialData", REWRITE):
            listed = self.attributes.get("coordinateTransformations", [])
            return {n: m @ self.own_scale() for n, m in transforms(listed).items()}

    def own_scale(self) -> np.ndarray:
        """3 x 3 from px of the finest level to the image's own coordinates."""
        matrix = np.eye(3)
        ends = {key: {"axes": self.attributes["axes"]} for key in ("input", "output")}
        for step in self.datasets[0].get("coordinateTransformations", []):
            matrix = matrix_of({**ends, **step}) @ matrix
        return matrix


def image_attributes(attributes: dict[str, Any]) -> dict[str, Any]:
    """The first multiscale of an image group, of either version of the format."""
    try:
        return dict(attributes.get("ome", attributes)["multiscales"][0])
    except (KeyError, IndexError, TypeError) as error:
        raise Refused("is no multiscale image.", REWRITE) from error


def choose_slide(args: argparse.Namespace, into: dict[str, np.ndarray]) -> ZarrSlide:
    """The image of --image-element, or the only one, or the only one that shares a coordinate
    system with the spots (``into``)."""
    store, name = args.spatialdata, args.image_element
    there = elements(store, "images")
    if name is not None or len(there) < 2:
        return ZarrSlide(choose_element(store, "images", name, "--image-element"))
    sizes = {}
    for element in there:
        path = store / "images" / element
        try:
            slide = ZarrSlide(path)
        except utils.StageError:  # of another kind: fluorescence, labels
            continue
        if set(slide.systems()) & set(into):
            sizes[element] = slide.size
    if len(sizes) == 1:
        return ZarrSlide(store / "images" / next(iter(sizes)))
    fit = ", ".join(f"{n} ({w} x {h} px)" for n, (w, h) in sizes.items()) or "none"
    raise utils.StageError(
        f"{store} has the images {', '.join(there)}. H&E images in a coordinate system of the "
        f"spots: {fit}.",
        "Choose the one of full resolution: --image-element NAME; or give it by --image FILE.",
    )


# -------------------------------------------------------------------------------------------------
# transforms
# -------------------------------------------------------------------------------------------------
def matrix_of(transform: dict[str, Any]) -> np.ndarray:
    """3 x 3 in x, y of one of the format's transforms, whose own axes may be in any order."""
    kind = transform.get("type")
    source, target = ([a["name"] for a in transform[k]["axes"]] for k in ("input", "output"))
    matrix = np.eye(3)
    if kind == "identity":
        return matrix
    if kind == "sequence":
        for step in transform["transformations"]:
            matrix = matrix_of({**{k: transform[k] for k in ("input", "output")}, **step}) @ matrix
        return matrix
    if kind in ("scale", "translation"):
        for i, axis in enumerate("xy"):
            value = transform[kind][source.index(axis)]
            matrix[(i, i) if kind == "scale" else (i, 2)] = value
        return matrix
    if kind == "affine":
        affine = np.array(transform["affine"], float)
        columns = [source.index("x"), source.index("y"), -1]
        matrix[:2] = affine[[target.index("x"), target.index("y")]][:, columns]
        return matrix
    raise Refused(
        f"has a transform of type {kind!r}; understood are scale, translation, affine, sequence.",
        "Transform the elements to the full-resolution pixels with spatialdata, write them again.",
    )


def transforms(listed: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    """Coordinate system -> 3 x 3 that leads into it, in x, y."""
    found = {t["output"]["name"]: matrix_of(t) for t in listed}
    for name, matrix in found.items():
        if not np.isfinite(matrix).all() or abs(np.linalg.det(matrix)) < 1e-12:
            raise Refused(
                f"has a transform into {name!r} that cannot be undone: {matrix.tolist()}.",
                "Set it right with spatialdata.transformations.set_transformation, write it again.",
            )
    return found


def choose_system(
    xy: np.ndarray, into: dict[str, np.ndarray], slide: ZarrSlide, wanted: str | None
) -> np.ndarray:
    """3 x 3 from the shapes of the spots (N, 2) to px of an image, by a coordinate system of both:
    the ``wanted`` one, or whichever if all of them say the same."""
    out = slide.systems()
    both = [name for name in out if name in into and wanted in (None, name)]
    if not both:
        named = "" if wanted is None else f" that is called {wanted!r}"
        raise utils.StageError(
            f"{slide.path} is in {utils.some(out)}, the spots are in {utils.some(into)}: no "
            f"coordinate system in common{named}.",
            WHOLE_IMAGE if wanted is None else "Name one of both by --coordinate-system NAME.",
        )
    ways = {name: np.linalg.inv(out[name]) @ into[name] for name in both}
    places = {name: moved(xy, matrix) for name, matrix in ways.items()}
    first = next(iter(places.values()))
    if max(np.abs(first - other).max(initial=0) for other in places.values()) > SAME_PX:
        middle = {name: np.median(place, axis=0).round() for name, place in places.items()}
        said = "; ".join(f"{name}: x {x:g}, y {y:g}" for name, (x, y) in middle.items())
        raise utils.StageError(
            f"{slide.path} and the spots have several coordinate systems in common, which place "
            f"the spots differently on the image ({said}, in the middle).",
            "Choose one: --coordinate-system NAME.",
        )
    return next(iter(ways.values()))


def moved(xy: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    return xy @ matrix[:2, :2].T + matrix[:2, 2]


# -------------------------------------------------------------------------------------------------
# shapes
# -------------------------------------------------------------------------------------------------
def read_circles(path: Path) -> tuple[pd.DataFrame, dict[str, np.ndarray]]:
    """Centres (index: instance; x, y) of a shapes element, and its transforms."""
    with readable(path, "shapes of SpatialData", REWRITE):
        table = path / "shapes.parquet"
        if not table.is_file():
            raise Refused(
                f"has no {table.name}; shapes are read as spatialdata 0.1 and later write them.",
                REWRITE,
            )
        attributes = attributes_of(path)
        shapes = pd.read_parquet(table)
        centres = [read_point(shape) for shape in shapes["geometry"]]
        frame = pd.DataFrame(
            centres, index=[text_of(name) for name in shapes.index], columns=["x", "y"], dtype=float
        )
        if repeated := utils.duplicates(frame.index):
            raise ValueError(f"the shapes {utils.some(repeated)} are there more than once")
        return frame, transforms(attributes.get("coordinateTransformations", []))


def read_point(geometry: Any) -> tuple[float, float]:
    """x, y of a point in well-known binary."""
    if not isinstance(geometry, bytes):
        raise Refused(
            f"holds shapes as {type(geometry).__name__}, not in well-known binary.", REWRITE
        )
    try:
        order = "<" if geometry[0] == 1 else ">"
        (kind,) = struct.unpack(f"{order}I", geometry[1:5])
        if kind % 1000 != POINT:
            raise Refused(
                f"holds shapes of type {kind} (1: point, 3: polygon); expected no circles but "
                f"points with a radius.",
                "Choose the circles of the spots: --shapes NAME. Squares of Visium HD are read by "
                "prepare/visium_hd.py from the outs of Space Ranger.",
            )
        x, y = struct.unpack(f"{order}dd", geometry[5:21])
    except struct.error as error:
        raise ValueError(f"a shape of {len(geometry)} bytes") from error
    return x, y


# -------------------------------------------------------------------------------------------------
# the spots of a store
# -------------------------------------------------------------------------------------------------
def read_spatialdata(args: argparse.Namespace) -> SourceSpots:
    """Spots in px of the image of the store, or of that of --image."""
    store = args.spatialdata
    check_store(store)
    table_path = choose_element(store, "tables", args.table, "--table")
    with open_anndata(table_path) as data:
        return read_store(args, data)


def linked_shapes(args: argparse.Namespace, data: Annotated) -> tuple[Path, pd.Series]:
    """The shapes that a table is of, and the instance of each of its rows of them; index: row."""
    link = data.root.get("uns/spatialdata_attrs")
    if link is None:
        raise utils.StageError(
            f"{data.path} does not say which shapes it is of: no uns['spatialdata_attrs'].",
            "Choose a table that annotates shapes by --table NAME, or link it: "
            "spatialdata.models.TableModel.parse(table, region=..., region_key=..., ...).",
        )
    keys = [text_of(np.asarray(read_array(link[n])).item()) for n in ("region_key", "instance_key")]
    obs = data.columns("obs", tuple(keys))
    regions, instances = (obs[key].reset_index(drop=True) for key in keys)
    chosen, store = args.shapes, args.spatialdata
    if chosen is None:
        there = [r for r in elements(store, "shapes") if r in set(regions)]
        if len(there) != 1:
            raise utils.StageError(
                f"{data.path} is of {', '.join(sorted(set(regions) - {''})) or 'no shapes'}; "
                f"{store} has the shapes {', '.join(elements(store, 'shapes')) or '(none)'}.",
                "Choose one by --shapes NAME, or another table by --table NAME.",
            )
        chosen = there[0]
    path = choose_element(store, "shapes", chosen, "--shapes")
    wanted = instances[regions == path.name]
    if not len(wanted):
        raise utils.StageError(
            f"{data.path} annotates {', '.join(sorted(set(regions) - {''}))}, not {path.name}.",
            "Choose one of them by --shapes NAME, or another table by --table NAME.",
        )
    return path, wanted


def read_store(args: argparse.Namespace, data: Annotated) -> SourceSpots:
    path, wanted = linked_shapes(args, data)
    circles, into = read_circles(path)
    notes = []
    if empty := int((wanted == "").sum()):
        notes.append(f"{empty} rows of the table without an instance are left out")
        wanted = wanted[wanted != ""]
    if missing := [i for i in wanted if i not in circles.index]:
        raise utils.StageError(
            f"{path} lacks {len(missing)} of {len(wanted)} spots of the table: "
            f"{utils.some(missing)}.",
            "Write table and shapes together with spatialdata, or drop these rows of the table.",
        )
    xy = circles.loc[wanted].to_numpy(float)
    rows = wanted.index.to_numpy()
    array = array_of(data)
    section = Spots(np.array(data.ids, object)[rows], xy, None if array is None else array[rows])
    if why := section.several():
        if args.shapes is None or section.repeated():
            raise utils.StageError(
                f"{path} seems to hold the spots of several sections: {why}.",
                "Keep the circles of each section as shapes of their own."
                + ("" if section.repeated() else f" If it is one, say --shapes {path.name}."),
            )
        notes.append(f"by --shapes {path.name} these spots are taken for one section, but {why}")
    slide = None
    if args.image is None:
        slide = choose_slide(args, into)
        xy = moved(xy, choose_system(xy, into, slide, args.coordinate_system))
    elif args.coordinate_system is not None:
        if args.coordinate_system not in into:
            raise utils.StageError(
                f"{path} is not in {args.coordinate_system!r}, but in {utils.some(into)}.",
                "Name one of these by --coordinate-system.",
            )
        xy = moved(xy, into[args.coordinate_system])
    spots = spots_of(data, rows, xy, args.layer)
    spots.notes += notes
    spots.image, spots.files = slide, [data.path, path]
    return spots
