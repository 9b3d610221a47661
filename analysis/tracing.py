"""Outlines of cells with their counts, as GeoJSON for QuPath."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from scipy import ndimage
from skimage.measure import find_contours

from analysis.mending import Ring

WINDOW = 512  # rows of labels at a time; a cell that reaches below waits
TOLERANCE = 0.4  # px that an outline may be off: it then has a quarter of the points


class Tracer:
    """Follows bands of labels from top to bottom; ``rings`` are the outlines of each label, in px.

    A pixel (row, column) covers row to row + 1 and column to column + 1.
    """

    def __init__(self) -> None:
        self.rings: dict[int, list[Ring]] = {}

    def watch(self, bands: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
        """Yield the bands as they are."""
        waiting, first = np.zeros((0, 0), np.int32), 0
        for band in bands:
            yield band
            waiting = np.concatenate([waiting, band]) if len(waiting) else np.array(band)
            if len(waiting) >= WINDOW:
                done = self.trace(waiting, first, set(np.unique(waiting[-1]).tolist()))
                waiting, first = waiting[done:], first + done
        if len(waiting):
            self.trace(waiting, first, set())

    def trace(self, labels: np.ndarray, first: int, unfinished: set[int]) -> int:
        """Trace all labels but the unfinished, and take them away; the row where these begin."""
        numbers, places = np.unique(labels, return_inverse=True)
        places = places.reshape(labels.shape)  # small numbers, however large the labels are
        begin = len(labels)
        for at, box in enumerate(ndimage.find_objects(places), start=1):
            if box is None or (label := int(numbers[at])) == 0:
                continue
            if label in unfinished:
                begin = min(begin, box[0].start)
                continue
            corner = np.array([box[1].start, box[0].start + first])
            inside = places[box] == at
            self.rings.setdefault(label, []).extend(outlines_in(inside, corner))
            labels[box][inside] = 0
        return begin


def outlines_in(inside: np.ndarray, corner: np.ndarray) -> Iterator[Ring]:
    """Rings of what is true in a box (rows, columns), whose corner is at x, y; outer ones first."""
    found = []
    for points in find_contours(np.pad(inside, 1).astype(np.float32), 0.5):
        x, y = points[:-1, 1], points[:-1, 0]
        signed = x @ np.roll(y, -1) - y @ np.roll(x, -1)
        xy = np.column_stack([x, y]).astype(np.float32)
        fewer = cv2.approxPolyDP(xy[:, None], TOLERANCE, True)[:, 0]
        ring = fewer if len(fewer) >= 3 else xy
        found.append((ring - 0.5 + corner, bool(signed < 0)))
    return iter(sorted(found, key=lambda ring: ring[1]))


def polygons_of(rings: list[Ring]) -> list[list[np.ndarray]]:
    """A polygon per outer ring, with its holes: those within its bounds."""
    polygons = [[points] for points, is_hole in rings if not is_hole]
    for points, is_hole in rings:
        if is_hole:
            low, high = points.min(0), points.max(0)
            around = (
                p for p in polygons if (p[0].min(0) <= low).all() and (p[0].max(0) >= high).all()
            )
            next(around, polygons[0]).append(points)
    return polygons


def feature(
    name: Any, of_class: str, rings: list[Ring], scale: np.ndarray, measurements: dict[str, float]
) -> str:
    """A detection of QuPath, as JSON; rings times ``scale`` (x, y) are in pixels of he-raw."""
    coordinates = [
        [np.round(np.concatenate([ring, ring[:1]]) * scale, 1).tolist() for ring in polygon]
        for polygon in polygons_of(rings)
    ]
    one = len(coordinates) == 1
    geometry = {
        "type": "Polygon" if one else "MultiPolygon",
        "coordinates": coordinates[0] if one else coordinates,
    }
    properties: dict[str, Any] = {"objectType": "detection", "name": str(name), "cell_id": name}
    if of_class:
        properties["classification"] = {"name": of_class, "color": [0, 114, 178]}
    properties["measurements"] = measurements
    whole = {"type": "Feature", "geometry": geometry, "properties": properties}
    return json.dumps(whole, separators=(",", ":"), ensure_ascii=False)


def write_features(path: Path, features: Iterator[str]) -> None:
    """A FeatureCollection with a feature a line."""
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.write('{"type":"FeatureCollection","features":[')
        for number, text in enumerate(features):
            file.write(",\n" if number else "\n")
            file.write(text)
        file.write("\n]}\n")
