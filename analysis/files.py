"""The files that the scripts of analysis/ write, who writes which, and the options for them.

A user may bring files of these names as well; none is replaced without --force. This module imports
no library, so that --help answers at once.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import utils
from utils import Artifact

WRITTEN_BY: dict[str, list[Artifact]] = {}  # script -> all that it can write


def made_by(stem: str, name: str, what: str) -> Artifact:
    artifact = Artifact((name,), f"analysis/{stem}.py", what, user_may_bring=True)
    WRITTEN_BY.setdefault(f"analysis/{stem}.py", []).append(artifact)
    return artifact


def add_output(parser: argparse.ArgumentParser, pictures: bool = True) -> None:
    """``args.folder`` and, if there are ``pictures``, ``args.no_plot``."""
    option = parser.add_argument
    folder_help = "Folder for the results (default: the folder of the sample)."
    option("--output", dest="folder", metavar="FOLDER", type=Path, help=folder_help)
    no_plot_help = "Draw no picture; matplotlib is not needed then."
    if pictures:
        option("--no-plot", action="store_true", help=no_plot_help)


def check_matplotlib(stage: utils.Stage) -> None:
    """Before any work: pictures can be drawn, if any are."""
    if not stage.args.no_plot and importlib.util.find_spec("matplotlib") is None:
        raise utils.StageError(
            "The picture needs matplotlib, which is not installed.",
            "Run: pip install -r analysis/requirements.txt, or add --no-plot",
        )


def guard_outputs(stage: utils.Stage, *unwritten: Artifact) -> None:
    """Before any work: nothing of the user is in the way of what this run writes.

    That is all that its script can write but ``unwritten``, and pictures with --no-plot. What an
    earlier run wrote of these is out of date: it is removed when the other outputs appear.
    """
    check_matplotlib(stage)
    for artifact in WRITTEN_BY[stage.script]:
        picture = artifact.name.endswith(".png")
        if artifact not in unwritten and not (picture and stage.args.no_plot):
            stage.guard(artifact)
        elif stage.is_mine(artifact):
            stage.retire(artifact)


SEGMENTS = made_by("segment", "segments.npy", "uint8 or uint16 (rows, columns), 0 for no region")
SEGMENT_TABLE = made_by("segment", "segments.csv", "area, colour and first markers of every region")
SEGMENT_MARKERS = made_by("segment", "segment-markers.csv", "genes that differ between regions")
SEGMENT_PICTURE = made_by("segment", "segments.png", "picture of the regions")
ANNOTATION = made_by("annotate", "annotation.npy", "uint8 (rows, columns), 0 for no tissue")
ANNOTATION_TABLE = made_by("annotate", "annotation.csv", "label, area and colour of every number")
ANNOTATION_PICTURE = made_by("annotate", "annotation.png", "picture of the labels")
ANNOTATION_SCORES = made_by("annotate", "annotation-scores.npy", "float16 (labels, rows, columns)")
ANNOTATION_SCORES_PICTURE = made_by("annotate", "annotation-scores.png", "picture of the scores")
ANNOTATION_CONFIDENCE = made_by("annotate", "annotation-confidence.npy", "float16 (rows, columns)")
ANNOTATION_SPOTS = made_by("annotate", "annotation-spots.csv", "spots of every pair of labels")
ANNOTATION_TRUTH = made_by("annotate", "annotation-truth.csv", "superpixels of every such pair")
PATTERN_PICTURE = made_by("patterns", "patterns.png", "picture of the genes, before and after")
ENRICHMENT_TABLE = made_by("enrich", "enrichment.csv", "tests of every gene set and list of genes")
ENRICHMENT_PICTURE = made_by("enrich", "enrichment.png", "picture of the best gene sets")
VENN = made_by("enrich", "venn.png", "genes and gene sets found by spots and by maps")
PATTERN_TABLE = made_by("patterns", "patterns.csv", "how far each gene has a spatial pattern")
CELLS = made_by("cells", "cells.csv.gz", "a row per cell: place, area, counts of every gene")
CELLS_SD = made_by("cells", "cells-sd.csv.gz", "the same with the standard deviation of counts")
CELLS_GEOJSON = made_by("cells", "cells-counts.geojson", "their outlines and counts, for QuPath")
REPORT = made_by("report", "report.html", "one page to look at the sample")
EVALUATION = made_by("evaluate", "evaluation.csv", "scores against the truth, a row per gene")
EVALUATION_FACTS = made_by("evaluate", "evaluation.json", "their medians, by kind of score")
EVALUATION_PICTURE = made_by("evaluate", "evaluation.png", "picture of scores and of three genes")
LEFT_OUT = made_by("evaluate", "evaluation-holdout.csv", "scores on left-out spots, a row per gene")
LEFT_OUT_FACTS = made_by("evaluate", "evaluation-holdout.json", "their medians")
LEFT_OUT_PICTURE = made_by("evaluate", "evaluation-holdout.png", "picture of these scores")
