"""Time and memory of reading cnts.csv: this reader, that of another checkout, and pandas.read_csv.

    python benchmarks/tables.py --before ../before > benchmarks/TABLES.md

Reads   synthetic tables, which it writes into a temporary folder; with --before another checkout
Writes  a table in Markdown to the console

Every reading is a process of its own, several of
them in turn; the least CPU seconds and peak of memory count. All must give the same counts.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks import measure as measuring
from reading import cli

SCRIPT = "benchmarks/tables.py"


def build_parser() -> cli.Parser:
    parser = cli.Parser(__doc__)
    option = parser.add_argument
    option("--before", type=Path, help="Another checkout to compare with (default: none).")
    option("--times", type=cli.positive, default=3, help="Readings of each table.")
    option("--reader", help=argparse.SUPPRESS)
    option("--table", type=Path, help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    cli.start(build_parser())  # what needs none of the slow imports below

import importlib
import json
import resource
import subprocess
import tempfile
import time
from collections.abc import Iterator

import numpy as np
import pandas as pd
from scipy import sparse

KINDS = {  # rows, columns, and how a number is written
    "whole numbers": (14_000, 1_000, "{}"),
    "with fractions": (14_000, 1_000, "{}.25"),
    "all genes": (3_000, 33_000, "{}"),
}


def write_table(path: Path, rows: int, columns: int, spelling: str) -> None:
    rng = np.random.default_rng(0)
    means = rng.gamma(0.3, 2000 / columns, columns)
    with path.open("w", encoding="utf-8") as file:
        file.write(",".join(["", *(f"GENE{i}" for i in range(columns))]) + "\n")
        for row in range(rows):
            counts = map(spelling.format, rng.poisson(means).tolist())
            file.write(",".join([f"AAACAAGT{row:08d}-1", *counts]) + "\n")


def read_by_pandas(path: Path) -> sparse.csr_array:
    """The whole table at once, as one would write it."""
    return sparse.csr_array(pd.read_csv(path, index_col=0).to_numpy(np.float32))


def read_by_checkout(root: Path, path: Path) -> sparse.csr_array:
    """By the reader of that checkout: in reading/tables.py, or in utils.py as it was before."""
    sys.path[:] = [str(root), *(place for place in sys.path if place != str(measuring.ROOT))]
    for name in [n for n in sys.modules if n.split(".")[0] in ("utils", "reading")]:
        del sys.modules[name]
    theirs = importlib.import_module("utils")
    is_home = hasattr(theirs, "read_sparse_counts")
    home = theirs if is_home else importlib.import_module("reading.tables")
    args = argparse.Namespace(directory=path.parent, force=False, allow_stale=False)
    with path.open(encoding="utf-8") as file:
        spots = pd.Index([line.split(",", 1)[0] for line in file][1:])
    return home.read_sparse_counts(theirs.Stage("get_HR.py", args), path, spots)[0]


def measure(reader: str, path: Path) -> None:
    """Print seconds of the processor, peak memory in GB and sums of what was read, as JSON."""
    start = time.process_time()
    counts = read_by_pandas(path) if reader == "pandas" else read_by_checkout(Path(reader), path)
    seconds = time.process_time() - start
    sums = [counts.data @ np.arange(counts.nnz), counts.indices.sum(), counts.indptr.sum()]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * measuring.KILOBYTES / 1e9
    print(json.dumps([seconds, peak, str(sums)]))


def compare(readers: dict[str, str], path: Path, times: int) -> Iterator[str]:
    """Seconds and memory of every reader; in brackets, times the seconds of the first."""
    runs = []
    for reader in [*readers] * times:
        command = [sys.executable, __file__, "--reader", readers[reader], "--table", str(path)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        runs.append((reader, *json.loads(done.stdout.splitlines()[-1])))
    table = pd.DataFrame(runs, columns=["reader", "seconds", "memory", "sums"])
    if table["sums"].nunique() > 1:
        raise SystemExit(f"the readers disagree about {path}")
    least = table.groupby("reader").min().loc[[*readers]]
    for seconds, memory in zip(least["seconds"], least["memory"], strict=True):
        yield f"{seconds:.2f} s ({seconds / least['seconds'].iloc[0]:.2f}x), {memory:.2f} GB"


def main(args: argparse.Namespace) -> None:
    if args.reader:
        return measure(args.reader, args.table)
    readers = {"this reader": str(measuring.ROOT), "pandas.read_csv": "pandas"}
    if args.before:
        readers["before"] = str(args.before.resolve())
    rows = []
    for kind, (n_rows, columns, spell) in KINDS.items():
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "cnts.csv"
            write_table(path, n_rows, columns, spell)
            size = f"{path.stat().st_size / 1e6:,.0f}"
            rows.append([kind, f"{n_rows:,} x {columns:,}", size])
            rows[-1] += compare(readers, path, args.times)
            print(" | ".join(rows[-1]), file=sys.stderr, flush=True)
    heads = ["table", "spots x genes", "MB", *readers]
    print("# Reading cnts.csv\n\nSeconds of the processor and peak memory; in brackets, times the")
    print("seconds of this reader.\n")
    print(
        "\n".join([*measuring.table(heads, rows), "", *measuring.origin(args.command, args.before)])
    )


def run(argv: list[str] | None = None) -> int:
    return measuring.run_benchmark(main, SCRIPT, build_parser(), argv)


if __name__ == "__main__":
    sys.exit(run())
