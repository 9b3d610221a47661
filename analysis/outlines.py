"""Outlines of cells, as segmentation tools and vendors write them; every cell keeps its name.

GeoJSON: features of QuPath, Space Ranger 4 and others, a bare list of them, or the
GeometryCollection of Baysor before 0.7. Tables: cell_boundaries and nucleus_boundaries of Xenium.
What encloses nothing is left out and counted; what crosses itself is mended.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

import utils
from analysis.mending import Ring, mend, need_mending
from reading import plain

GEOJSON, TABLES = (".geojson", ".json"), (".parquet", ".csv", ".tsv")
IN_FOLDER = {  # files of outlines in the folders of Space Ranger and Xenium, by --nuclei
    False: ("cell_segmentations.geojson", "cell_boundaries.parquet", "cell_boundaries.csv.gz"),
    True: ("nucleus_segmentations.geojson", "nucleus_boundaries.parquet",
           "nucleus_boundaries.csv.gz"),
}  # fmt: skip
CELLS, NO_CELLS = {"cell", "detection"}, {"annotation", "tile"}  # QuPath's kinds of object
CELL_KEYS = ("cell_id", "cellId", "cellID", "cell", "EntityID")  # of 10x, CosMX, Baysor, Vizgen
OTHER_KEYS = ("id", "label", "name")  # may as well name a class
VERTEX = ["cell_id", "vertex_x", "vertex_y"]
BEYOND_PX = 1e7  # no image has as long a side
TINY_PX2 = 1e-6  # less than that is no area
GEOJSON_REMEDY = "Export the cells as GeoJSON (a FeatureCollection of Polygons) again."
TABLE_REMEDY = "Give the .parquet or .csv of the run, or cells as GeoJSON or as a label image."
DAMAGE = (TypeError, ValueError, KeyError, AttributeError, OverflowError, RecursionError)
Feature = dict[str, Any]


class Outline(NamedTuple):
    id: str
    of_class: str
    rings: list[Ring]


def ending(path: Path) -> str:
    """The suffix that tells the format, whether it is compressed or not."""
    name = path.name.lower()
    return Path(name.removesuffix(".gz")).suffix


def in_folder(path: Path, nuclei: bool) -> Path:
    """``path`` itself; of a folder of Space Ranger or Xenium, the outlines in it."""
    names = IN_FOLDER[nuclei]
    for place in (path, path / "segmented_outputs") if path.is_dir() else ():
        for name in names:
            if (place / name).is_file():
                return place / name
    if path.is_dir():
        raise utils.StageError(
            f"{path} is a folder without {', '.join(names)}.", "Give the file of cells by --masks."
        )
    return path


def read_outlines(stage: utils.Stage, path: Path, nuclei: bool) -> list[Outline]:
    """The cells of a file in its own frame, mended, each with an area above 0."""
    if ending(path) in GEOJSON:
        found = outlines_of(stage, path, nuclei)
    elif nuclei and "nucleus" not in path.name:
        raise utils.StageError(
            f"{path} holds one kind of outline; --nuclei is for GeoJSON.",
            "Leave out --nuclei, and give the outlines of nuclei by --masks.",
        )
    else:
        found = outlines_of_table(stage, path)
    return mended(stage, path, found)


# --------------------------------------------------------------------------------------------------
# GeoJSON
# --------------------------------------------------------------------------------------------------
def outlines_of(stage: utils.Stage, path: Path, nuclei: bool) -> list[Outline]:
    features = read_features(path)
    kinds = [str(properties_of(feature).get("objectType", "")) for feature in features]
    if CELLS & set(kinds):
        kept = [f for f, kind in zip(features, kinds, strict=True) if kind not in NO_CELLS]
        if len(kept) < len(features):
            print(f"{path.name}: {len(features) - len(kept)} annotations and tiles are left out")
        features = kept
    ids = ids_of(stage, path, features)
    outlines, left_out = [], Counter[str]()
    for number, (feature, name) in enumerate(zip(features, ids, strict=True), start=1):
        geometry = feature.get("nucleusGeometry" if nuclei else "geometry") or {}
        try:
            rings = rings_of(geometry)
        except UnusableRingError as error:
            left_out[f"have {error}"] += 1
            continue
        except DAMAGE as error:
            problem = f"{path} has a damaged outline, number {number}: {error!s:.100}."
            raise utils.StageError(problem, GEOJSON_REMEDY) from error
        if rings:
            outlines.append(Outline(name, class_of(feature), rings))
        else:
            lack = "have no nucleus" if nuclei else "are neither Polygon nor MultiPolygon"
            left_out[lack] += 1
    for lack, n in left_out.items():
        stage.warn(f"{path.name}: {n} of {len(features)} objects {lack} and are left out")
    if not outlines:
        why = "; ".join(f"{n} objects {lack}" for lack, n in left_out.items())
        remedy = f"Run: {stage.command()}"
        if nuclei:
            remedy = (
                "Only QuPath keeps nuclei beside their cells. Give a file of nuclei alone, such as "
                f"{IN_FOLDER[True][0]}, without --nuclei."
            )
        raise utils.StageError(
            f"{path} holds no outline of a cell{f' ({why})' if why else ''}.", remedy
        )
    return united(stage, path, outlines)


def read_features(path: Path) -> list[Feature]:
    try:
        content = plain.read_json(path)
    except (ValueError, RecursionError, *plain.DAMAGED) as error:
        problem = f"{path} is not GeoJSON: {error!s:.200}."
        raise utils.StageError(problem, GEOJSON_REMEDY) from error
    features = features_of(content)
    if features is None:
        found = type(content).__name__
        if isinstance(content, dict):
            found = f"an object of {utils.some([str(key)[:40] for key in content])}"
        raise utils.StageError(
            f"{path} holds no list of features, but {found}: this is no GeoJSON that is known.",
            f"{GEOJSON_REMEDY} Or save the labels of the cells as an image, .tif or .npy.",
        )
    if not all(isinstance(f, dict) for f in features):
        raise utils.StageError(f"{path} holds features that are no objects.", GEOJSON_REMEDY)
    return features


def features_of(content: Any) -> list[Feature] | None:
    """Features of whatever GeoJSON it is; of a bare geometry, what stands beside it is kept."""
    if isinstance(content, list):
        return [as_feature(one) if isinstance(one, dict) else one for one in content]
    if not isinstance(content, dict):
        return None
    if isinstance(features := content.get("features"), list):
        return features
    if isinstance(geometries := content.get("geometries"), list):
        return features_of(geometries)
    is_one = content.get("type") in ("Feature", "Polygon", "MultiPolygon")
    return [as_feature(content)] if is_one else None


def as_feature(content: Feature) -> Feature:
    if "coordinates" not in content and "geometries" not in content:
        return content
    beside = {k: v for k, v in content.items() if k not in ("type", "coordinates", "geometries")}
    return {"type": "Feature", "geometry": content, "properties": beside}


def properties_of(feature: Feature) -> Feature:
    properties = feature.get("properties")
    return properties if isinstance(properties, dict) else {}


def class_of(feature: Feature) -> str:
    """QuPath's class; of derived classes, all their names."""
    found = properties_of(feature).get("classification")
    if isinstance(found, dict):
        names = found.get("names")
        return ": ".join(map(str, names)) if isinstance(names, list) else str(found.get("name", ""))
    return "" if found is None else str(found)


def ids_of(stage: utils.Stage, path: Path, features: list[Feature]) -> list[str]:
    """What the file calls each cell; without a name it is called by its number.

    A property that names cells goes before the id of a feature, which a tool may have made up. One
    that could as well be a class is taken if each has its own.
    """
    numbers = [str(number) for number in range(1, len(features) + 1)]
    inner = [properties_of(feature) for feature in features]
    for key in CELL_KEYS:
        given = [as_id(properties.get(key)) for properties in inner]
        if key != "cell":  # which may be a flag: true for a cell
            refuse_flags(path, key, [properties.get(key) for properties in inner])
        if any(given):
            return fill_ids(stage, path, given, numbers, key)
    refuse_flags(path, "id", [feature.get("id") for feature in features])
    for key, where in (("id", features), *((key, inner) for key in OTHER_KEYS)):
        given = [as_id(one.get(key)) for one in where]
        known = [name for name in given if name]
        whole = key == "id" or len(known) == len(features)
        if known and whole and len(set(known)) == len(known):
            return fill_ids(stage, path, given, numbers, key)
        if known and key == "id":
            stage.warn(f"{path.name}: the ids of objects occur more than once and are not used")
    return numbers


def refuse_flags(path: Path, key: str, values: list[Any]) -> None:
    flags = [number for number, value in enumerate(values, start=1) if isinstance(value, bool)]
    if flags:
        raise utils.StageError(
            f"{path}: {key} is true or false in {len(flags)} of {len(values)} objects, the first "
            f"of them number {flags[0]}; expected the name of a cell, a text or a number.",
            f"Export the cells with names as {key}, or without {key}: they are numbered then.",
        )


def as_id(value: Any) -> str:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    is_name = (
        isinstance(value, (str, int, float)) and not isinstance(value, bool) and value == value
    )
    return str(value).strip() if is_name else ""


def fill_ids(
    stage: utils.Stage, path: Path, given: list[str], numbers: list[str], key: str
) -> list[str]:
    taken = set(given)
    names = [
        name or (number if number not in taken else f"object {number}")
        for name, number in zip(given, numbers, strict=True)
    ]
    if lacking := given.count(""):
        stage.warn(f"{path.name}: {lacking} of {len(given)} objects have no {key}: their number")
    return names


def united(stage: utils.Stage, path: Path, outlines: list[Outline]) -> list[Outline]:
    """One outline a cell: the parts of a cell may have been written one by one, under its id."""
    by_id: dict[str, Outline] = {}
    for outline in outlines:
        if outline.id in by_id:
            by_id[outline.id].rings.extend(outline.rings)
        else:
            by_id[outline.id] = outline._replace(rings=list(outline.rings))
    if len(by_id) < len(outlines):
        name, n = Counter(outline.id for outline in outlines).most_common(1)[0]
        stage.warn(
            f"{path.name}: {len(outlines)} outlines share the ids of {len(by_id)} cells, such as "
            f"{name!r} with {n}: taken as parts of one cell"
        )
    return list(by_id.values())


class UnusableRingError(ValueError):
    """A ring that encloses nothing; its outline is left out."""


def rings_of(geometry: Feature) -> list[Ring]:
    kind = geometry.get("type")
    if kind == "GeometryCollection":
        return [ring for part in geometry["geometries"] for ring in rings_of(part)]
    if kind not in ("Polygon", "MultiPolygon"):
        return []
    polygons = geometry["coordinates"] if kind == "MultiPolygon" else [geometry["coordinates"]]
    rings = []
    for polygon in polygons:
        for number, ring in enumerate(polygon):
            points = np.array(ring, np.float64)
            if points.ndim != 2 or points.shape[1] < 2:
                raise ValueError(f"a ring of shape {points.shape}")
            if len(points) < 3:
                raise UnusableRingError(f"a ring of shape {points.shape}")
            if not np.isfinite(points).all():
                raise UnusableRingError("coordinates that are not finite")
            if np.abs(points).max() > BEYOND_PX:
                raise UnusableRingError("coordinates beyond any image")
            rings.append((points[:, :2], number > 0))
    return rings


# --------------------------------------------------------------------------------------------------
# tables of vertices
# --------------------------------------------------------------------------------------------------
def outlines_of_table(stage: utils.Stage, path: Path) -> list[Outline]:
    """Outlines of cell_boundaries or nucleus_boundaries of Xenium, in pixels of he-raw.

    They are in um of the run. The record of prepare/xenium.py tells where he-raw lies in it.
    """
    columns, delimiter = columns_of(path)
    origin = xenium_origin(stage, path, columns)
    table = read_vertices(path, columns, delimiter)
    if nameless := int(table["cell_id"].isna().sum()):
        stage.warn(f"{path.name}: {nameless} vertices without a cell_id are left out")
        table = table.dropna(subset=["cell_id"])
    xy = table[VERTEX[1:]].to_numpy(np.float64)
    px = (xy - origin) / utils.PIXEL_SIZE_UM
    outlines, left_out = [], 0
    for name, rows in parts_of(table):
        if len(rows) >= 3 and (np.abs(px[rows]) < BEYOND_PX).all():  # false for nan as well
            outlines.append(Outline(name, "", [(px[rows], False)]))
        else:
            left_out += 1
    if left_out:
        stage.warn(f"{path.name}: {left_out} outlines have no three finite vertices: left out")
    if not outlines:
        raise utils.StageError(
            f"{path} holds no outline of a cell.", "Give the cell_boundaries of the whole run."
        )
    return united(stage, path, outlines)


def parts_of(table: pd.DataFrame) -> Iterator[tuple[str, np.ndarray]]:
    """Name of the cell and rows of each of its outlines; label_id tells them apart."""
    keys = [key for key in ("cell_id", "label_id") if key in table]
    for name, rows in table.groupby(keys, sort=False, dropna=False).indices.items():
        yield str(name[0] if isinstance(name, tuple) else name), np.asarray(rows)


def columns_of(path: Path) -> tuple[list[str], str]:
    """Names of the columns, and the delimiter if it is a text."""
    try:
        if ending(path) == ".parquet":
            from pyarrow import parquet

            return list(parquet.read_schema(path).names), ""
        with plain.open_text(path) as file:
            header = file.readline().strip()
    except plain.Unfit as error:
        raise utils.StageError(f"{path} cannot be read: {error}", TABLE_REMEDY) from error
    except Exception as error:  # damaged bytes can raise nearly anything
        if plain.of_system(error):
            raise
        raise utils.broken(path, f"cannot be read as a table ({error!r:.200}).") from error
    delimiter = max(",\t;", key=header.count)
    return [name.strip(' "') for name in header.split(delimiter)], delimiter


def read_vertices(path: Path, columns: list[str], delimiter: str) -> pd.DataFrame:
    """cell_id as text, and label_id if there is one; vertex_x and vertex_y as numbers."""
    wanted = [column for column in (*VERTEX, "label_id") if column in columns]
    try:
        if ending(path) == ".parquet":
            table = pd.read_parquet(path, columns=wanted)
            if table["cell_id"].map(lambda name: isinstance(name, bytes)).any():  # of early runs
                table["cell_id"] = table["cell_id"].str.decode("utf-8")
        else:
            with plain.open_text(path) as file:
                table = pd.read_csv(file, sep=delimiter, usecols=wanted, dtype=str)
        for column in VERTEX[1:]:
            table[column] = pd.to_numeric(table[column], errors="coerce")
        return table
    except Exception as error:  # damaged bytes can raise nearly anything
        if plain.of_system(error):
            raise
        problem = f"is no whole table of {', '.join(VERTEX)} ({error!r:.200})."
        raise utils.broken(path, problem) from error


def xenium_origin(stage: utils.Stage, path: Path, columns: list[str]) -> np.ndarray:
    """Corner (2,), x and y in um of the Xenium run, of he-raw."""
    if not set(VERTEX) <= set(columns):
        raise utils.StageError(
            f"{path} is a table of {utils.some(columns)}; of tables, only the cell_boundaries and "
            f"nucleus_boundaries of Xenium ({', '.join(VERTEX)}) are read.",
            "Save the outlines as GeoJSON in pixels of he-raw, or the labels of the cells as an "
            "image, .tif or .npy.",
        )
    record = stage.directory / utils.record_name("prepare/xenium.py")
    origin = stage.fact("prepare/xenium.py", "frame_origin_um")
    numbers = origin if isinstance(origin, list) else []
    if len(numbers) != 2 or not all(isinstance(n, (int, float)) for n in numbers):
        raise utils.StageError(
            f"{path} holds outlines in um of a Xenium run, but {record} does not tell where he-raw "
            f"lies in it: this sample was not made by prepare/xenium.py.",
            "Import the cells into QuPath on he-raw and export them as GeoJSON, or make the sample "
            "by prepare/xenium.py.",
        )
    return np.array(numbers, np.float64)


# --------------------------------------------------------------------------------------------------
# areas
# --------------------------------------------------------------------------------------------------
def area_of(rings: list[Ring]) -> float:
    """As the edges tell it, in px2."""
    total = 0.0
    for points, is_hole in rings:
        x, y = (points - points[0]).T
        area = abs(float(x @ np.roll(y, -1) - y @ np.roll(x, -1))) / 2
        total += -area if is_hole else area
    return total


def mended(stage: utils.Stage, path: Path, outlines: list[Outline]) -> list[Outline]:
    """The outlines that enclose an area, in rings that neither cross nor cover one another."""
    kept, crossing = [], 0
    flagged = need_mending([outline.rings for outline in outlines])
    for outline, is_flagged in zip(outlines, flagged, strict=True):
        before = area_of(outline.rings)
        if is_flagged:
            outline = outline._replace(rings=mend(outline.rings))
            after = area_of(outline.rings)
            crossing += abs(after - before) > TINY_PX2 * max(after, 1)
            before = after
        if before > TINY_PX2:
            kept.append(outline)
    if crossing:
        stage.warn(
            f"{path.name}: {crossing} of {len(outlines)} outlines cross themselves or cover a part "
            f"twice: what they enclose is taken, once"
        )
    if flat := len(outlines) - len(kept):
        stage.warn(f"{path.name}: {flat} of {len(outlines)} outlines have no area: left out")
    if not kept:
        raise utils.StageError(
            f"{path} holds no outline of a cell that has an area.", GEOJSON_REMEDY
        )
    return kept
