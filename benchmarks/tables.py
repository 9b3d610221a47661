"""Time and memory of reading cnts.csv: this reader, that of another checkout, and pandas.read_csv.

    python benchmarks/tables.py --before ../before > benchmarks/TABLES.md

Writes synthetic tables into a temporary folder. Every reading is a process of its own, several of
them in turn; the least CPU seconds and peak of memory count. All must give the same counts.
"""

from __future__ import annotations

import argparse
import importlib
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import sparse

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import utils
from benchmarks.stages import KILOBYTES, processor
from reading import cli

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
    sys.path[:] = [str(root), *(place for place in sys.path if place != str(ROOT))]
    sys.modules.pop("utils", None)
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
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * KILOBYTES / 1e9
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


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--before", type=Path, help="Another checkout, whose reader runs as well.")
    parser.add_argument("--times", type=cli.positive, default=3, help="Readings of each table.")
    parser.add_argument("--reader", help=argparse.SUPPRESS)
    parser.add_argument("--table", type=Path, help=argparse.SUPPRESS)
    return parser


def main(args: argparse.Namespace) -> None:
    if args.reader:
        return measure(args.reader, args.table)
    readers = {"this reader": str(ROOT), "pandas.read_csv": "pandas"}
    readers |= {"before": str(args.before.resolve())} if args.before else {}
    code = utils.code_of("benchmarks/tables.py").get("commit", "unknown")[:12]
    print(f"# Reading cnts.csv\n\n{processor()}, commit {code}, pandas {pd.__version__}.")
    print("CPU seconds, in brackets times those of this reader, and peak memory.\n")
    print("    python benchmarks/tables.py --before ../before > benchmarks/TABLES.md\n")
    print(f"| table | spots x genes | MB | {' | '.join(readers)} |")
    print(f"|---|---|---|{'---|' * len(readers)}")
    for kind, (rows, columns, spelling) in KINDS.items():
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "cnts.csv"
            write_table(path, rows, columns, spelling)
            cells = [kind, f"{rows:,} x {columns:,}", f"{path.stat().st_size / 1e6:.0f}"]
            print("|", " | ".join([*cells, *compare(readers, path, args.times)]), "|", flush=True)


if __name__ == "__main__":
    main(build_parser().parse_args())
