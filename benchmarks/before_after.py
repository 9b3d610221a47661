"""Time and memory of the five stages: those of another checkout and ours, in turn on each section.

    python benchmarks/before_after.py --before ../before --directory data/a data/b --output B.md

Reads   another checkout of this project (--before), and the user's files of the sections, which are
        copied; the sections themselves are not touched
Writes  a table in Markdown (--output): wall seconds, CPU seconds and peak memory of each stage, and
        by which power of the size of a section each grows

Stage by stage, one checkout and then the other run as their user runs them, in a process of its own
on a copy of its own, by the same Python and with the same options; in every other repetition, the
other one begins. What the operating system counts of a process is told, the median of repetitions.
Training and prediction, of which the record of HISTEX.py knows the wall seconds, have rows of their
own.
"""

from __future__ import annotations

import argparse
import math
import shlex
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import utils
from benchmarks import measure
from benchmarks.measure import Facts
from reading import cli

# No large module is imported: the peak memory of a stage starts from that of this process.

SCRIPT = "benchmarks/before_after.py"
PARTS = ("training", "prediction")  # of HISTEX.py
KINDS = {"seconds": "wall (s)", "cpu": "CPU (s)", "gb": "peak (GB)"}
UNITS = {  # what the work of a stage grows with
    utils.CALIBRATION: "pixels of he.jpg",
    utils.HIGH_RESOLUTION: "spots x genes",
    utils.EXTRACTOR: "superpixels",
    utils.MASKING: "superpixels",
    f"{utils.HISTEX} training": "spots",
    f"{utils.HISTEX} prediction": "superpixels x genes",
}
Result = dict[str, dict[str, Facts]]  # by stage and checkout


def build_parser() -> cli.Parser:
    parser = cli.Parser(__doc__)
    option = parser.add_argument
    option("--before", type=Path, required=True, help="Checkout to compare with.")
    option("--directory", type=cli.sample_directory, nargs="+", required=True, metavar="DIR",
           help="Sections, as their user brought them or after any stage.")  # fmt: skip
    option("--extractor", default=shlex.join(measure.EXTRACTOR_OPTIONS),
           help="Options of Histology_Extractor.py, in quotes.")  # fmt: skip
    option("--histex", default="", help="Options of HISTEX.py, in quotes (default: none).")
    option("--before-histex", help="Those of the other checkout (default: the same).")
    option("--repeat", type=cli.positive, default=1, help="Runs, of which the median is told.")
    option("--folder", type=Path, help="For the copies, which are removed (default: the system's).")
    option("--output", type=Path, required=True, help="The table, in Markdown.")
    return parser


def options_of(script: str, checkout: str, args: argparse.Namespace) -> list[str]:
    text = {utils.EXTRACTOR: args.extractor, utils.HISTEX: args.histex}.get(script, "")
    if (script, checkout) == (utils.HISTEX, "before") and args.before_histex is not None:
        text = args.before_histex
    return shlex.split(text)


def amounts(folder: Path) -> dict[str, float]:
    """The size of a finished sample, in the unit of each stage."""
    calibrated, densified = (
        measure.read_record(folder, script) for script in (utils.CALIBRATION, utils.HIGH_RESOLUTION)
    )
    pixels, spots = math.prod(calibrated["size"]), calibrated["spots"]
    superpixels = pixels / utils.TOKEN_PX**2
    sizes = {
        "pixels of he.jpg": pixels,
        "spots": spots,
        "spots x genes": spots * densified["genes"],
        "superpixels": superpixels,
        "superpixels x genes": superpixels * densified["genes"],
    }
    return {stage: sizes[unit] for stage, unit in UNITS.items()}


def repetition(
    folders: dict[str, Path], roots: dict[str, Path], args: argparse.Namespace
) -> Result:
    """All stages on a copy per checkout, in the order of ``folders``."""
    found: Result = {}
    for script in utils.STAGES:
        found[script] = {}
        for name, folder in folders.items():
            options = options_of(script, name, args)
            command = measure.script_command(script, folder, *options, root=roots[name])
            facts = measure.run_measured(command, folder / "benchmark.log")
            found[script][name] = facts
            print(f"{folder} {script}: {facts['cpu']:.1f} CPU s", file=sys.stderr, flush=True)
    for part in PARTS:
        found[f"{utils.HISTEX} {part}"] = {
            name: {"seconds": measure.read_record(folder, utils.HISTEX)[f"seconds_{part}"]}
            for name, folder in folders.items()
        }
    return found


def measure_section(
    section: Path, roots: dict[str, Path], args: argparse.Namespace
) -> tuple[Result, dict[str, float]]:
    """The medians of the repetitions on one section, and its size in the unit of each stage."""
    runs: list[Result] = []
    for turn in range(args.repeat):
        with tempfile.TemporaryDirectory(prefix=f"{section.name}-", dir=args.folder) as work:
            names = [*roots] if turn % 2 == 0 else [*reversed(roots)]
            folders = {name: Path(work) / name for name in names}
            for folder in folders.values():
                measure.copy_user_files(section, folder)
            runs.append(repetition(folders, roots, args))
            sizes = amounts(folders["now"])
    medians = {
        stage: {name: measure.middle([run[stage][name] for run in runs]) for name in roots}
        for stage in runs[0]
    }
    return medians, sizes


def compared(result: dict[str, Facts], kind: str) -> list[str]:
    """What one checkout took, and the other, with their ratio; empty where it is not known."""
    if kind not in result["now"]:
        return ["", ""]
    then, now = (result[name][kind] for name in ("before", "now"))
    return [f"{then:,.2f}", f"{now:,.2f} ({now / then:.2f}x)"]


def heads(*first: str) -> list[str]:
    which = (f"{kind}: {name}" for kind in KINDS.values() for name in ("before", "now"))
    return [*first, *which]


def main_table(results: dict[str, Result]) -> list[str]:
    """A row for every section and stage."""
    rows = [
        [section, stage, *(cell for kind in KINDS for cell in compared(facts, kind))]
        for section, result in results.items()
        for stage, facts in result.items()
    ]
    return measure.table(heads("section", "stage"), rows)


def exponents(results: dict[str, Result], sizes: dict[str, dict[str, float]]) -> list[str]:
    """A row for every stage: by which power of its size the sections' figures grow."""
    rows = []
    for stage, unit in UNITS.items():
        at = [sizes[section][stage] for section in results]
        row = [stage, unit]
        for kind in KINDS:
            for name in ("before", "now"):
                figures: list[float] = [r[stage][name].get(kind, 0) for r in results.values()]
                known = all(figures) and len(set(at)) > 1
                row.append(f"{measure.exponent(at, figures):.2f}" if known else "")
        rows.append(row)
    return measure.table(heads("stage", "against"), rows)


def report(
    results: dict[str, Result], sizes: dict[str, dict[str, float]], origin: list[str]
) -> str:
    lines = [
        "# Before and after",
        "",
        "Stages of two checkouts in turn, on the same sections and machine; in brackets, times",
        "what the other took. How it is measured: the head of `benchmarks/before_after.py`.",
        "",
        *main_table(results),
        "",
    ]
    if len(results) > 1:
        said = "Growth exponents over these sections (1: in proportion to the size):"
        lines += [said, "", *exponents(results, sizes), ""]
    return "\n".join([*lines, *origin])


def main(args: argparse.Namespace) -> None:
    roots = {"before": args.before.resolve(strict=True), "now": measure.ROOT}
    results, sizes = {}, {}
    for section in args.directory:
        results[section.name], sizes[section.name] = measure_section(section, roots, args)
        text = report(results, sizes, measure.origin(args.command, args.before))
        measure.write(args.output, text)  # after every section: they may take hours
    print(f"wrote {args.output}")


def run(argv: list[str] | None = None) -> int:
    return measure.run_benchmark(main, SCRIPT, build_parser(), argv)


if __name__ == "__main__":
    sys.exit(run())
