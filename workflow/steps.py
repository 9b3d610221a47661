"""The steps of a sample: which script does each, on what it waits, which memory it needs."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import utils
from workflow import table
from workflow.table import Options, Sample

Record = dict[str, Any]
FORMATS = ("h5ad", "spatialdata", "ometiff", "istar", "csv", "spots")  # of analysis/export.py


@dataclass(frozen=True)
class Step:
    """One rule. It is done when its marker is there and newer than those it waits for."""

    name: str
    after: tuple[str, ...]
    on_card: bool = False  # computes on a graphics card where there is one
    is_last: bool = False  # nothing waits for it


PREPARE = Step("prepare", ())
STEPS = (
    PREPARE,
    Step("calibrate", ("prepare",)),
    Step("densify", ("calibrate",)),
    Step("extract", ("calibrate",), on_card=True),
    Step("mask", ("calibrate", "extract")),
    Step("maps", ("densify", "mask"), on_card=True),
    Step("report", ("maps",), is_last=True),
)
SCRIPTS = {
    "calibrate": utils.CALIBRATION,
    "densify": utils.HIGH_RESOLUTION,
    "extract": utils.EXTRACTOR,
    "mask": utils.MASKING,
    "maps": utils.HISTEX,
    "report": table.REPORT,
}


def steps_with(formats: list[str]) -> tuple[Step, ...]:
    """All steps; each format of the maps is exported by one of its own."""
    for name in formats:
        if name not in FORMATS:
            raise utils.StageError(
                f"--config export={','.join(formats)}: found {name!r}, expected some of "
                f"{', '.join(FORMATS)}, with commas between them.",
                "Mend it, then run the same command.",
            )
    return (
        *STEPS,
        *(Step(f"export_{name}", ("maps",), is_last=True) for name in formats),
    )


def marker(output: Path, sample: str, step: str) -> Path:
    """What Snakemake takes for the result of a step: an empty file. Its time says when it ended."""
    return output / ".markers" / sample / step


def log(output: Path, sample: str, step: str) -> Path:
    return output / "logs" / sample / f"{step}.log"


def script_of(sample: Sample, step: Step) -> str | None:
    """The script of a step; None if this sample goes without it."""
    if step.name == "prepare":
        return sample.prepared_by
    if not sample.has_spots:
        if step.name == "densify":
            return None
        if step.name == "maps":
            return utils.PREDICTION
    return SCRIPTS.get(step.name, table.EXPORT)


def options_of(sample: Sample, script: str, shared: Options) -> list[str]:
    """Those of all samples, then its own, which win."""
    return [*shared.get(script, []), *sample.options.get(script, [])]


def command(sample: Sample, step: Step, shared: Options, reference: Path | None) -> list[str]:
    """The words of a step, but for Python; ``shared`` are options for all samples."""
    script = script_of(sample, step) or ""
    words = [str(utils.ROOT / script), "--directory", str(sample.directory)]
    if step.name == "prepare":
        words += sample.paths
    if step.name in ("calibrate", "mask") and not sample.has_spots:
        words += ["--no-spots"]
    if step.name == "maps" and reference:
        words += ["--reference", str(reference)]
    if step.name.startswith("export_"):
        words += ["--format", step.name.removeprefix("export_")]
    return words + options_of(sample, script, shared)


def teachers(samples: Iterable[Sample], reference: str) -> list[Sample]:
    return [sample for sample in samples if sample.teaches == reference]


def learning(samples: Iterable[Sample], reference: str, file: Path, shared: Options) -> list[str]:
    """The words that have the reference learned, but for Python."""
    folders = [str(sample.directory) for sample in teachers(samples, reference)]
    words = [str(utils.ROOT / utils.LEARNING), "--sections", *folders, "--output", str(file)]
    return words + shared.get(utils.LEARNING, [])


# ------------------------------------------------------------------------------------------------
# what a step reads
# ------------------------------------------------------------------------------------------------
def read_record(path: Path) -> Record:
    """The record at a path, or nothing: what it is needed for then goes without."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}


EDITED = (*utils.MASK.names, *utils.GENE_NAMES.names)


def files_read(sample: Sample, step: Step) -> list[str]:
    """The files by whose time a step is due again: what its last run read, as its record says, and
    what the user may have edited or brought in place of its results, such as mask.png.

    Without a record there is none: the step runs in any case. Whether there is something to do is
    then decided by the script, which knows the content of what it read.
    """
    script = script_of(sample, step)
    if script is None:
        return []
    record = read_record(sample.directory / utils.record_name(script))
    try:
        names = [*record["inputs"]]
        mine = [name for name in record["outputs"] if name in EDITED]
    except (KeyError, TypeError):
        return []
    paths = [sample.directory / name for name in [*names, *mine] if not name.endswith(".json")]
    return [str(path) for path in paths if path.is_file()]


# ------------------------------------------------------------------------------------------------
# memory
# ------------------------------------------------------------------------------------------------
LARGEST = 22_400, 10_000  # side of he.jpg in px and number of spots of a slide of 11 mm
ENGINE_GB = 0.5  # on a cluster, two processes of Snakemake stand around each script
MARGIN = 1.3  # for what the benchmark does not have: more genes, other libraries
EMBEDDED = "efficientnet_lite0"  # the backbone that the benchmark measures
LEARNING_MB = 4000
VIT_GB = 4.0  # weights of UNI, twice while they are read, and a batch of tiles


def extent(sample: Sample) -> tuple[int, int]:
    """Side of he.jpg in px, and number of spots; those of a slide of 11 mm until they are known."""
    record = read_record(sample.directory / utils.record_name(utils.CALIBRATION))
    try:
        return math.ceil(math.sqrt(math.prod(record["size"]))), int(record["spots"])
    except (ValueError, KeyError, TypeError):
        return LARGEST


def memory_mb(sample: Sample, step: Step, shared: Options) -> int:
    """What a step needs, by the peaks of benchmarks/SCALING.md and a margin."""
    side, spots = extent(sample)
    is_vit = EMBEDDED not in options_of(sample, utils.EXTRACTOR, shared)
    thousands = side / 1000
    gb = {
        "prepare": 2.0,  # counts, and strips of the slide
        "calibrate": 0.25 + 0.025 * thousands,
        "densify": 0.22 + 0.024 * spots / 1000,
        "extract": 1.4 + 0.45 * math.sqrt(thousands) + VIT_GB * is_vit,
        "mask": 0.9,
        "maps": max(1.1 + 0.31 * spots / 1000, 0.8 + 0.125 * thousands),
        "report": 0.5 + 0.015 * thousands,
    }.get(step.name, 0.6 + 0.04 * thousands)
    return math.ceil(1000 * (MARGIN * gb + ENGINE_GB))
