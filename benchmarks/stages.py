"""Run the five stages on a copy of a sample and print the wall time and peak memory of each.

    python benchmarks/stages.py --directory data/section
    python benchmarks/stages.py --directory data/section --histex "--epochs 500 --n-states 5"

Copies the user's files (he-raw, locs-raw, cnts, ...) into a temporary folder, or into one given by
--keep, runs each script there as a process of its own, and prints a table in Markdown. The sample
itself is not touched. If it holds a truth.npz, analysis/evaluate.py scores the maps at the end.
"""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
USER_FILES = ("he-raw.*", "locs-raw.csv", "pixel-size-raw.txt", "radius-raw.txt", "cnts.*")
USER_FILES += ("gene-names.txt", "truth.npz")
KILOBYTES = 1 if sys.platform == "darwin" else 1024  # ru_maxrss counts bytes on macOS


def run_measured(command: list[str], log: Path) -> tuple[float, float]:
    """Seconds and peak memory in GB of a command; its output goes to ``log``."""
    start = time.perf_counter()
    with log.open("ab") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        print(log.read_text(encoding="utf-8", errors="replace")[-2000:], file=sys.stderr)
        raise SystemExit(f"{shlex.join(command)} ended with {process.returncode}; see {log}")
    return time.perf_counter() - start, usage.ru_maxrss * KILOBYTES / 1e9


def processor() -> str:
    """Name of the processor, where the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--directory", type=Path, required=True, help="Sample directory.")
    parser.add_argument(
        "--extractor",
        default="--backbone efficientnet_lite0",
        help="Options of Histology_Extractor.py.",
    )
    parser.add_argument("--histex", default="", help="Options of HISTEX.py.")
    parser.add_argument("--keep", type=Path, help="Folder for the results, which then stay.")
    return parser


def main(args: argparse.Namespace) -> None:
    work = args.keep or Path(tempfile.mkdtemp(prefix="histex-"))
    work.mkdir(parents=True, exist_ok=True)
    for pattern in USER_FILES:
        for file in args.directory.glob(pattern):
            shutil.copyfile(file, work / file.name)
    stages = {
        "image_calibration.py": "",
        "get_HR.py": "",
        "Histology_Extractor.py": args.extractor,
        "masking_non_tissue.py": "",
        "HISTEX.py": args.histex,
    }
    log = work / "benchmark.log"
    print(f"{args.directory.name}: {processor()}, {os.cpu_count()} cores, {platform.system()}\n")
    print("| stage | wall time (s) | peak memory (GB) |\n|---|---|---|")
    for script, options in stages.items():
        command = [sys.executable, str(ROOT / script), "--directory", str(work)]
        seconds, memory = run_measured([*command, *shlex.split(options)], log)
        print(
            f"| {' '.join([script, options]).strip()} | {seconds:.1f} | {memory:.2f} |", flush=True
        )
    if (work / "truth.npz").is_file():
        print(flush=True)
        command = [sys.executable, str(ROOT / "analysis" / "evaluate.py"), "--no-plot"]
        subprocess.run([*command, "--directory", str(work)], check=True)
    if args.keep is None:
        shutil.rmtree(work)


if __name__ == "__main__":
    main(build_parser().parse_args())
