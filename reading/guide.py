"""What to look at and what to run next: the line that ends every script."""

from __future__ import annotations

import contextlib
import os
from typing import NamedTuple

import utils


class Step(NamedTuple):
    look: str  # files, of which the first that is there is named
    then: str = ""  # script to run
    options: str = ""  # that it needs beside --directory


REPORT, FILE = "analysis/report.py", "--reference FILE"
PREPARED = Step("check.png", utils.CALIBRATION)
NEXT = {
    utils.CALIBRATION: Step("he.jpg he.png", utils.HIGH_RESOLUTION),
    utils.HIGH_RESOLUTION: Step("gene-names.txt", utils.EXTRACTOR),
    utils.EXTRACTOR: Step("", utils.MASKING),
    utils.MASKING: Step("mask-overlay.png", utils.HISTEX),
    utils.HISTEX: Step("held-out-r.csv", REPORT),
    utils.PREDICTION: Step("expected-r.csv", REPORT),
    utils.LEARNING: Step("", utils.PREDICTION, FILE),
    "analysis/annotate.py": Step("annotation.png annotation.csv", REPORT),
    "analysis/cells.py": Step("cells-counts.geojson cells.csv.gz", REPORT),
    "analysis/enrich.py": Step("enrichment.png enrichment.csv", REPORT),
    "analysis/evaluate.py": Step("evaluation.png evaluation.csv", REPORT),
    "analysis/export.py": Step(""),
    "analysis/patterns.py": Step(
        "patterns.png patterns.csv", "analysis/enrich.py", "--gene-sets FILE.gmt"
    ),
    "analysis/report.py": Step("report.html", "analysis/segment.py"),
    "analysis/segment.py": Step("segments.png segments.csv", REPORT),
    "prepare/slides.py": Step("he-raw.tif", utils.CALIBRATION),
    **{
        f"prepare/{name}.py": PREPARED
        for name in ("legacy_st", "scverse", "visium", "visium_hd", "xenium")
    },
}
WITHOUT_SPOTS = {  # where the section has none, see reference/predict.py
    utils.CALIBRATION: Step("he.jpg he.png", utils.EXTRACTOR),
    utils.EXTRACTOR: Step("", utils.MASKING, "--no-spots"),
    utils.MASKING: Step("mask-overlay.png", utils.PREDICTION, FILE),
}


def say_next(stage: utils.Stage) -> None:
    """Print the line of this script, if it has one; of several processes, only the first does."""
    step = NEXT.get(stage.script)
    if step is None or os.environ.get("RANK", "0") != "0":
        return
    if has_no_spots(stage):
        step = WITHOUT_SPOTS.get(stage.script, step)
    there = [stage.folder / name for name in step.look.split()]
    look = next((f"look at {path}, then " for path in there if path.exists()), "")
    if not step.then:
        print("next: open it by one of the programs that docs/analysis.md names")
    elif stage.script == utils.LEARNING:
        print(f"next: run: python {step.then} --directory FOLDER --reference {stage.args.output}")
    else:
        print(f"next: {look}run: {stage.command(step.then)} {step.options}".rstrip())


def has_no_spots(stage: utils.Stage) -> bool:
    """True if this script or image_calibration.py was told that the section has none."""
    record = None
    with contextlib.suppress(utils.StageError):  # this script is done, whatever others left
        record = utils.read_record(stage, utils.CALIBRATION)
    return "--no-spots" in [*stage.options, *(record or {"options": []})["options"]]
