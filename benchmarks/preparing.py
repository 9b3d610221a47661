"""What the benchmarks of prepare/ share: making sections one after another, and measuring them."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.measure import origin, run_measured, script_command, table
from reading import cli

TIMES = ("made in (s)", "prepared in (s)", "peak memory (GB)")


def add_prepare_options(parser: cli.Parser) -> None:
    parser.add_argument(
        "--truth-genes",
        type=cli.not_negative,
        default=300,
        metavar="N",
        help="Passed on to the prepare script",
    )
    parser.add_argument(
        "--folder", type=Path, help="For the temporary files (default: the system's)."
    )


def measure_prepare(
    args: argparse.Namespace,
    script: str,
    heads: Sequence[str],
    sizes: Iterable[float],
    make: Callable[[float, Path], tuple[list[str], list[str]]],
) -> None:
    """Print a table in Markdown with a row per size.

    ``make(size, work)`` writes a section into a folder, and returns the options of the prepare
    script and the cells of the row that stand under ``heads``.
    """
    print("\n".join(table([*heads, *TIMES], [])), flush=True)
    for size in sizes:
        with tempfile.TemporaryDirectory(prefix="histex-prepare-", dir=args.folder) as name:
            work, start = Path(name), time.perf_counter()
            options, cells = make(size, work)
            made = time.perf_counter() - start
            options += ["--truth-genes", str(args.truth_genes)]
            log = work / "log.txt"
            facts = run_measured(script_command(script, work / "sample", *options), log)
            row = (*cells, f"{made:.0f}", f"{facts['seconds']:.0f}", f"{facts['gb']:.2f}")
            print(table(row, [])[0], flush=True)
            print(log.read_text(encoding="utf-8"), file=sys.stderr)
    print("\n".join(["", *origin(args.command)]))
