"""What analysis/report.py shows over the maps: regions, annotation, cells, and what is missing."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from typing import Any

import numpy as np
import pandas as pd

import utils
from analysis import files, inputs
from analysis.page import Cells, Labels, PageContent, region_colours
from analysis.report_maps import LEVELS, encode
from analysis.scores import number_text
from reading import plain

MOST_CELLS = 200_000  # in the page; of more, every second or third and so on
MOST_CLASSES = 254
CELL_COLUMNS = ["x", "y", "area_um2", "class"]
PLACES = 65_535  # steps of a cell's place along a side
RADIUS_STEPS = 32  # a superpixel
COLOUR = re.compile("#[0-9a-f]{6}")


# --------------------------------------------------------------------------------------------------
# labels of superpixels
# --------------------------------------------------------------------------------------------------
def read_labels(
    stage: utils.Stage,
    shape: tuple[int, int],
    labels: utils.Artifact,
    table: utils.Artifact,
    column: str,
) -> Labels | None:
    """Regions or annotation; the ``column`` of the table beside them says what each is."""
    path = stage.directory / labels.name
    inputs.note_inputs(stage, labels, table)  # also that there are none
    if not path.is_file():
        return None
    try:
        codes = inputs.load_labels(path, shape, LEVELS)
    except ValueError as error:
        raise stage.error(path, f"{error}.", "Make it anew, or move it away.") from error
    n = int(codes.max())
    texts = inputs.read_label_texts(stage, table, column, n, needed=True) if n else None
    colours = inputs.read_label_texts(stage, table, "colour", n) if texts else None
    if colours is None or not all(map(COLOUR.fullmatch, colours)):
        colours = region_colours(n)
    return Labels(codes.astype(np.uint8), (texts or [""] * n)[:n], colours[:n])


def describe_labels(labels: Labels) -> dict[str, Any]:
    return {"codes": encode(labels.codes), "colours": labels.colours, "texts": labels.texts}


# --------------------------------------------------------------------------------------------------
# cells
# --------------------------------------------------------------------------------------------------
def frame_of(stage: utils.Stage) -> tuple[str, list[float]]:
    """The image in whose pixels outlines are saved, and pixels of it (x, y) in a superpixel.

    he-raw, which cells.py and QuPath expect; without the record of the calibration, he.jpg.
    """
    if stage.fact(utils.CALIBRATION, "raw_size") is None:
        return "he", [float(utils.TOKEN_PX)] * 2
    raw, scaled = inputs.read_sizes(stage, "raw_size", "scaled_size")
    return "he-raw", [utils.TOKEN_PX * raw[axis] / scaled[axis] for axis in (1, 0)]


def read_cells(
    stage: utils.Stage, shape: tuple[int, int], frame: tuple[str, list[float]]
) -> Cells | None:
    """Cells of cells.csv.gz; what cannot be read is left out with a warning."""
    path = stage.directory / files.CELLS.name
    inputs.note_inputs(stage, files.CELLS)
    if not path.is_file():
        return None
    if frame[0] != "he-raw":
        stage.warn(
            f"{path.name} is left out: {utils.record_name(utils.CALIBRATION)} does not tell how "
            f"its places, in pixels of he-raw, lie in he.jpg"
        )
        return None
    try:
        table = pd.read_csv(path, usecols=CELL_COLUMNS, keep_default_na=False)
        places = table[CELL_COLUMNS[:3]].apply(pd.to_numeric, errors="coerce").to_numpy(np.float64)
    except Exception as error:  # damaged bytes can raise nearly anything
        if plain.of_system(error):
            raise
        stage.warn(f"{path.name} is left out: it is no table of cells ({error!r:.120})")
        return None
    xy, area = places[:, :2] / frame[1], places[:, 2]
    inside = (xy >= 0).all(1) & (xy <= shape[::-1]).all(1) & (area >= 0)  # false for nan as well
    kept = np.flatnonzero(inside)
    kept = kept[:: max(1, -(-len(kept) // MOST_CELLS))]
    classes = table["class"].astype(str)
    names = [name for name in classes.value_counts().index if name][:MOST_CLASSES]
    number = {name: i + 1 for i, name in enumerate(names)}  # 0: no class
    return Cells(
        xy=xy[kept],
        radius=np.sqrt(area[kept] / np.pi) / utils.SUPERPIXEL_UM,
        classes=np.array([number.get(name, 0) for name in classes.iloc[kept]], np.uint8),
        names=names,
        total=len(table),
    )


def describe_cells(cells: Cells, shape: tuple[int, int]) -> dict[str, Any]:
    places = np.rint(cells.xy / shape[::-1] * PLACES).astype("<u2")
    radius = np.rint(cells.radius * RADIUS_STEPS).clip(1, 255).astype(np.uint8)
    return {
        "places": encode(places.T),
        "radii": encode(radius),
        "classes": encode(cells.classes),
        "names": cells.names,
        "colours": region_colours(len(cells.names)),
        "total": cells.total,
    }


# --------------------------------------------------------------------------------------------------
# what is missing, and what was not measured
# --------------------------------------------------------------------------------------------------
def command(stage: utils.Stage, script: str, *options: str) -> str:
    """A command on this sample, without telling where it lies: the page may be sent to others."""
    words = ["python", script, "--directory", stage.directory.resolve().name, *options]
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)


def missing_layers(stage: utils.Stage, content: PageContent) -> dict[str, str]:
    """What is not there -> the command that makes it, or why there is none."""
    found = {}
    if not content.spreads:
        record = content.records.get(utils.HISTEX, {})
        if record.get("predicted_from"):
            found["uncertainty"] = "maps from the H&E alone have none"
        else:
            options = [o for o in map(str, record.get("options", [])) if o != "--force"]
            found["uncertainty"] = command(stage, utils.HISTEX, *options, "--uncertainty")
    if content.regions is None:
        found["regions"] = command(stage, "analysis/segment.py")
    if content.annotation is None:
        found["annotation"] = command(stage, "analysis/annotate.py", "--tissue", "TISSUE")
    if content.cells is None:
        found["cells"] = command(stage, "analysis/cells.py")
    if content.spots is None:
        found["spots"] = "needs locs.csv, radius.txt and cnts.csv"
    return found


def by_reference(content: PageContent, genes: list[str]) -> list[int]:
    """Numbers of the genes whose maps a reference predicted, without any measured count."""
    record = content.records.get(utils.HISTEX, {})
    if record.get("predicted_from"):
        return list(range(len(genes)))
    if content.spots is None or not record.get("reference"):
        return []
    return [i for i, gene in enumerate(genes) if gene not in content.spots.column]


def beside_text(content: PageContent) -> str:
    """What stands at the head of a page if HISTEX.py found the image beside the spots."""
    told = content.records.get(utils.HISTEX, {}).get("image_beside_spots")
    if not isinstance(told, dict) or told.get("undone") is not True:
        return ""
    down, right = (number_text(told.get(key), "+.1f") for key in ("down_um", "right_um"))
    return (
        f"HISTEX.py found the image beside the spots, by {down} um down and {right} um right. The "
        f"maps lie where the spots do, so over the H&E they are off by as much."
    )


def alone_text(content: PageContent, numbers: list[int]) -> str:
    """What stands at the head of a page with maps that a reference predicted alone."""
    if not numbers:
        return ""
    if len(numbers) == len(content.files):
        return (
            "These maps are predicted from the H&E alone, by a reference: no spot of this section "
            f"was measured. {utils.EXPECTED.name} tells which genes to believe."
        )
    return (
        f"{len(numbers)} of the {len(content.files)} maps are of genes without measured counts: a "
        f"reference predicted them from the H&E. They are marked."
    )
