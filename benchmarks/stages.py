"""Run the five stages on a copy of a sample; print the wall time and peak memory of each.

    python benchmarks/stages.py --directory data/section
    python benchmarks/stages.py --directory data/section --histex "--epochs 500 --n-states 5"

Reads   the user's files of --directory (he-raw, locs-raw, cnts, ...), which are copied into a
        temporary folder or into --keep; the sample itself is not touched.
Writes  the files of all stages, into that folder, and a table in Markdown on the screen. If the
        sample holds a truth.npz, analysis/evaluate.py scores the maps at the end.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import utils
from benchmarks import measure
from reading import cli

SCRIPT = "benchmarks/stages.py"


def build_parser() -> cli.Parser:
    parser = cli.Parser(__doc__)
    option = parser.add_argument
    option("--directory", type=cli.sample_directory, required=True, help="Sample to copy.")
    option("--extractor", default=shlex.join(measure.EXTRACTOR_OPTIONS),
           help="Options of Histology_Extractor.py, in quotes.")  # fmt: skip
    option("--histex", default="",
           help="Options of HISTEX.py, in quotes (default: none).")  # fmt: skip
    option("--keep", type=Path,
           help="Folder for the results (default: one that is removed).")  # fmt: skip
    return parser


def main(args: argparse.Namespace) -> None:
    options = dict.fromkeys(utils.STAGES, "")
    options |= {utils.EXTRACTOR: args.extractor, utils.HISTEX: args.histex}
    rows, truth = [], args.directory / measure.TRUTH_FILE
    with measure.kept_or_temporary(args.keep) as work:
        measure.copy_user_files(args.directory, work)
        for script, text in options.items():
            command = measure.script_command(script, work, *shlex.split(text))
            facts = measure.run_measured(command, work / "benchmark.log")
            stage = " ".join([script, text]).strip()
            rows.append((stage, f"{facts['seconds']:.1f}", f"{facts['gb']:.2f}"))
            print(f"{stage}: {rows[-1][1]} s", file=sys.stderr, flush=True)
        table = measure.table(("stage", "wall time (s)", "peak memory (GB)"), rows)
        print("\n".join([*table, "", *measure.origin(args.command), ""]), flush=True)
        if truth.is_file():
            shutil.copyfile(truth, work / truth.name)
            command = measure.script_command("analysis/evaluate.py", work, "--no-plot")
            subprocess.run(command, check=True)


def run(argv: list[str] | None = None) -> int:
    return measure.run_benchmark(main, SCRIPT, build_parser(), argv)


if __name__ == "__main__":
    sys.exit(run())
