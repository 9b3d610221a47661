"""The files that the scripts of analysis/ write, and who writes which.

A user may bring files of these names as well; none is replaced without --force.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from utils import Artifact


def made_by(stem: str, name: str, what: str) -> Artifact:
    return Artifact((name,), f"analysis/{stem}.py", what, user_may_bring=True)


SEGMENTS = made_by("segment", "segments.npy", "uint8 or uint16 (rows, columns), 0 for no region")
SEGMENT_TABLE = made_by("segment", "segments.csv", "area, colour and first markers of every region")
SEGMENT_MARKERS = made_by("segment", "segment-markers.csv", "genes that differ between regions")
SEGMENT_PICTURE = made_by("segment", "segments.png", "picture of the regions")
ANNOTATION = made_by("annotate", "annotation.npy", "uint8 (rows, columns), 0 for no tissue")
ANNOTATION_TABLE = made_by("annotate", "annotation.csv", "label, area and colour of every number")
PATTERN_TABLE = made_by("patterns", "patterns.csv", "how far each gene has a spatial pattern")
CELLS = made_by("cells", "cells.csv.gz", "a row per cell: place, area, counts of every gene")
REPORT = made_by("report", "report.html", "one page to look at the sample")
EVALUATION = made_by("evaluate", "evaluation.csv", "scores against the truth, a row per gene")
EVALUATION_FACTS = made_by("evaluate", "evaluation.json", "their medians, by kind of score")
EVALUATION_PICTURE = made_by("evaluate", "evaluation.png", "picture of scores and of three genes")
LEFT_OUT = made_by("evaluate", "evaluation-holdout.csv", "scores on left-out spots, a row per gene")
LEFT_OUT_FACTS = made_by("evaluate", "evaluation-holdout.json", "their medians")
LEFT_OUT_PICTURE = made_by("evaluate", "evaluation-holdout.png", "picture of these scores")
