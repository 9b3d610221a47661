"""Write cohort.html: one page that lists all samples of a table, how far each is, and its figures.

    python workflow/cohort.py --samples samples.tsv --output results

The figures are those of the records. A sample that failed is shown with the message of the script
that failed, and one that is not finished with the step at which it stands. The page links the
reports, and needs no internet. Snakemake writes it at the end of every run.

Reads   --samples; of every sample, the records of the scripts; below --output, .markers/ and logs/
Writes  cohort.html in --output, and cohort.json, the record
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import utils
from reading import cli

SCRIPT = utils.COHORT
PAGE = utils.Artifact(("cohort.html",), SCRIPT, "all samples of a table on one page", True)


def build_parser() -> cli.Parser:
    parser = cli.Parser(__doc__)
    option = parser.add_argument
    option("--samples", type=Path, default=Path("samples.tsv"), metavar="FILE",
           help="The table of samples.")  # fmt: skip
    option("--output", dest="folder", type=Path, default=Path("results"), metavar="FOLDER",
           help="Folder of the results, as Snakemake was told it.")  # fmt: skip
    cli.add_shared(parser)
    parser.set_defaults(directory=Path(), allow_stale=False)
    return parser


if __name__ == "__main__":
    cli.start(build_parser())  # what needs none of the slow imports below

import os
import re
from dataclasses import dataclass
from typing import Any

import jinja2

from workflow import steps, table
from workflow.steps import Record, Step
from workflow.table import Sample

TEMPLATE = Path(__file__).with_name("cohort.html")
ERROR = re.compile(r"^(?:[\w./]+: )?error: ", re.MULTILINE)  # as scripts and their parsers say it
NOTHING = "-"
TAIL = 4000  # characters of a log in which its error stands
DONE, FAILED, UNFINISHED = "done", "failed", "unfinished"


@dataclass
class Row:
    """What the page says of one sample."""

    name: str
    state: str
    says: str  # the error, or the step at which the sample stands
    figures: list[str]
    warnings: list[str]
    report: str | None  # link


HEADS = (
    "spots", "genes", "tissue (%)", "held-out r", "reference", "seconds", "commit",
)  # fmt: skip


def error_of(log: Path) -> str:
    """The message with which a script ended, or nothing if it said none."""
    text = log.read_text(encoding="utf-8", errors="replace")[-TAIL:].strip()
    if found := [*ERROR.finditer(text)]:
        return text[found[-1].start() :]
    if "Traceback (most recent call last)" in text:
        return f"a bug: {text.splitlines()[-1]}"
    return ""


def state_of(sample: Sample, step: Step, output: Path, record: Record) -> tuple[str, str]:
    """Of one step of a sample: its state and what there is to say."""
    log, marker = (
        steps.log(output, sample.name, step.name),
        steps.marker(output, sample.name, step.name),
    )
    if marker.is_file() or (record and not log.is_file()):
        return DONE, ""
    if not log.is_file():
        lesson, learned = (
            f(output, "references", sample.reference) for f in (steps.log, steps.marker)
        )
        waits = step.name == "maps" and lesson.is_file() and not learned.is_file()
        if waits and (error := error_of(lesson)):
            return FAILED, f"learn, the reference {sample.reference}: {error}"
        return UNFINISHED, f"{step.name}: not begun"
    if error := error_of(log):
        return FAILED, f"{step.name}: {error}"
    return UNFINISHED, f"{step.name}: running, or cut off"


def number(value: object, digits: int = 0) -> str:
    """For a cell of the table; what a record does not have is a dash."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return NOTHING
    return f"{value:,.{digits}f}"


def row_of(sample: Sample, output: Path, stage: utils.Stage) -> Row:
    """A sample on the page; all that is read is noted in ``stage``."""
    state, says, records = DONE, "", {}
    for place in (steps.log, steps.marker):
        stage.use(place(output, "references", sample.reference or "none"))
    for step in steps.STEPS:
        script = steps.script_of(sample, step)
        if script is None:
            continue
        path = sample.directory / utils.record_name(script)
        for file in (path, *(f(output, sample.name, step.name) for f in (steps.log, steps.marker))):
            stage.use(file)
        record = steps.read_record(path)
        records[step.name] = record = record if record.get("finished") is True else {}
        if state == DONE:
            state, says = state_of(sample, step, output, record)

    def fact(step: str, key: str) -> Any:
        return records.get(step, {}).get(key)

    tissue = fact("mask", "tissue_share")
    commits = {
        str(r["code"].get("commit", "unknown"))[:8] for r in records.values() if r.get("code")
    }
    by_look = fact("maps", "predicted_from") is not None
    report = sample.directory / "report.html"
    return Row(
        sample.name,
        state,
        says,
        [
            number(fact("calibrate", "spots")),
            number(fact("maps", "genes") or fact("densify", "genes")),
            number(100 * tissue if isinstance(tissue, int | float) else None),
            "from H&E alone" if by_look else number(fact("maps", "held_out_r_median"), 3),
            sample.reference or NOTHING,
            number(sum(r.get("seconds", 0) for r in records.values()) or None),
            ", ".join(sorted(commits)) or NOTHING,
        ],
        [f"{name}: {text}" for name, r in records.items() for text in r.get("warnings", [])],
        Path(os.path.relpath(report, output)).as_posix() if report.is_file() else None,
    )


def main(stage: utils.Stage) -> None:
    args, output = stage.args, stage.folder
    samples = table.read_table(args.samples, output)
    stage.guard(PAGE)
    rows = [row_of(sample, output, stage) for sample in samples.values()]
    counts = {
        state: sum(row.state == state for row in rows) for state in (DONE, FAILED, UNFINISHED)
    }
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    page = template.render(table=args.samples.name, rows=rows, heads=HEADS, counts=counts)
    with stage.writing(PAGE) as partial:
        partial.write_text(page, encoding="utf-8")
    shown = ", ".join(f"{n} {state}" for state, n in counts.items())
    print(f"{len(rows)} samples: {shown}")
    stage.finish(samples=len(rows), **counts)


def run(argv: list[str] | None = None) -> int:
    return cli.run_stage(main, SCRIPT, build_parser(), argv)


if __name__ == "__main__":
    sys.exit(run())
