"""Time and memory of reading cnts.csv: this reader, that of another checkout, and pandas.read_csv.

    python benchmarks/tables.py --before ../before > benchmarks/TABLES.md

Writes synthetic tables into a temporary folder. Every reading is a process of its own, several of
them in turn; the least CPU seconds count, and the peak of memory. All must give the same counts,
which is checked by a hash of them as a sparse matrix.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
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
    "whole numbers": (14_000, 1_000, str),
    "the same with .0": (14_000, 1_000, "{}.0".format),
    "with fractions": (14_000, 1_000, "{}.25".format),
    "all genes": (3_000, 33_000, str),
}
SPOT = "AAACAAGT{:08d}-1"


def write_table(path: Path, rows: int, columns: int, spell: Callable[[int], str]) -> None:
    rng = np.random.default_rng(0)
    means = rng.gamma(0.3, 2000 / columns, columns)
    with path.open("w", encoding="utf-8") as file:
        file.write(",".join(["", *(f"GENE{i}" for i in range(columns))]) + "\n")
        for row in range(rows):
            counts = map(spell, rng.poisson(means).tolist())
            file.write(",".join([SPOT.format(row), *counts]) + "\n")


def read_by_pandas(path: Path) -> sparse.csr_array:
    """As one would write it: the whole table, types told beforehand."""
    header = path.open(encoding="utf-8").readline().rstrip("\n").split(",")[1:]
    types = dict.fromkeys(header, np.float32)
    return sparse.csr_array(pd.read_csv(path, index_col=0, dtype=types).to_numpy(np.float32))


def read_by_checkout(root: Path, path: Path) -> sparse.csr_array:
    """By the reader of that checkout: in reading/tables.py, or in utils.py as it was before."""
    sys.path[:] = [str(root), *(place for place in sys.path if place != str(ROOT))]
    sys.modules.pop("utils", None)
    theirs = importlib.import_module("utils")
    is_room = (root / "reading" / "tables.py").is_file()
    home = importlib.import_module("reading.tables") if is_room else theirs
    args = argparse.Namespace(directory=path.parent, force=False, allow_stale=False)
    with path.open(encoding="utf-8") as file:
        spots = pd.Index([line.split(",", 1)[0] for line in file][1:])
    counts, _ = home.read_sparse_counts(theirs.Stage("get_HR.py", args), path, spots)
    return counts


def measure(reader: str, path: Path) -> None:
    """Print seconds of the processor, peak memory in GB and a hash of the counts, as JSON."""
    start = time.process_time()
    counts = read_by_pandas(path) if reader == "pandas" else read_by_checkout(Path(reader), path)
    seconds = time.process_time() - start
    counts.sort_indices()
    parts = (counts.data, counts.indices.astype(np.int64), counts.indptr.astype(np.int64))
    found = hashlib.sha256(b"".join(part.tobytes() for part in parts)).hexdigest()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * KILOBYTES / 1e9
    print(json.dumps([seconds, peak, found]))


def compare(readers: dict[str, str], path: Path, times: int) -> Iterator[str]:
    """Seconds and memory of every reader; in brackets, times the seconds of the first."""
    results: dict[str, list[list]] = {reader: [] for reader in readers}
    for _ in range(times):
        for reader, where in readers.items():
            command = [sys.executable, __file__, "--reader", where, "--table", str(path)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            results[reader].append(json.loads(done.stdout.splitlines()[-1]))
    if len({run[2] for runs in results.values() for run in runs}) > 1:
        raise SystemExit(f"the readers disagree about {path}")
    first = min(run[0] for run in results["this reader"])
    for runs in results.values():
        seconds, memory = min(run[0] for run in runs), min(run[1] for run in runs)
        yield f"{seconds:.2f} s ({seconds / first:.2f}x), {memory:.2f} GB"


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--before", type=Path, help="Another checkout, whose reader runs as well.")
    parser.add_argument("--times", type=cli.positive, default=3, help="Readings of each table.")
    parser.add_argument("--reader", help=argparse.SUPPRESS)
    parser.add_argument("--table", type=Path, help=argparse.SUPPRESS)
    return parser


def main(args: argparse.Namespace) -> None:
    if args.reader:
        measure(args.reader, args.table)
        return
    readers = {"this reader": str(ROOT), "pandas.read_csv": "pandas"}
    if args.before:
        readers["before"] = str(args.before.resolve())
    code = utils.code_of("benchmarks/tables.py").get("commit", "unknown")[:12]
    print("# Reading cnts.csv\n\nSeconds of the processor and peak memory; in brackets, times the")
    print(f"seconds of this reader. Commit {code}, pandas {pd.__version__}, {processor()}.\n")
    print("    python benchmarks/tables.py --before ../before > benchmarks/TABLES.md\n")
    print(f"| table | spots x genes | MB | {' | '.join(readers)} |")
    print(f"|---|---|---|{'---|' * len(readers)}")
    for kind, (rows, columns, spell) in KINDS.items():
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "cnts.csv"
            write_table(path, rows, columns, spell)
            cells = " | ".join(compare(readers, path, args.times))
            size = path.stat().st_size / 1e6
            print(f"| {kind} | {rows:,} x {columns:,} | {size:,.0f} | {cells} |", flush=True)


if __name__ == "__main__":
    main(build_parser().parse_args())
