"""What the benchmarks share: measured processes, kept results, tables in Markdown, the machine.

Nothing slow is imported here, for the command line of every benchmark needs this file.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import platform
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import utils
from reading import cli
from utils import ROOT
from writing import disk

BROUGHT = (
    utils.HE_RAW, utils.PIXEL_SIZE_RAW, utils.LOCS_RAW, utils.CNTS, utils.RADIUS_RAW,
    utils.GENE_NAMES,
)  # fmt: skip
TRUTH_FILE = "truth.npz"
EXTRACTOR_OPTIONS = ("--backbone", "efficientnet_lite0")  # the network that needs no download
FIRST_STAGES: tuple[tuple[str, ...], ...] = (
    (utils.CALIBRATION,),
    (utils.HIGH_RESOLUTION,),
    (utils.EXTRACTOR, *EXTRACTOR_OPTIONS),
    (utils.MASKING,),
)
KILOBYTES = 1 if sys.platform == "darwin" else 1024  # ru_maxrss counts bytes on macOS
POLL_SECONDS = 0.02
Facts = dict[str, Any]  # a measurement or a result, as it is kept in JSON


# --------------------------------------------------------------------------------------------------
# samples and processes
# --------------------------------------------------------------------------------------------------
def user_files(directory: Path) -> list[Path]:
    """The files of a sample that its user brought, without the truth."""
    paths = [directory / name for artifact in BROUGHT for name in artifact.names]
    return [path for path in paths if path.is_file()]


def copy_user_files(source: Path, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    for path in user_files(source):
        shutil.copyfile(path, target / path.name)


@contextlib.contextmanager
def kept_or_temporary(keep: Path | None) -> Iterator[Path]:
    """A folder that the user named, or one that is removed at the end."""
    with tempfile.TemporaryDirectory(prefix="histex-") as temporary:
        folder = keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        yield folder


def script_command(
    script: str, directory: Path, *options: str, root: Path | str = ROOT
) -> list[str]:
    return [sys.executable, str(Path(root) / script), "--directory", str(directory), *options]


def run_measured(command: list[str], log: Path, until: Callable[[], bool] | None = None) -> Facts:
    """Seconds, CPU seconds (cpu) and peak memory (gb) of a command; its output goes to ``log``.

    All are those that the operating system counts; mapped pages of files are memory, and that of a
    process starts from the peak of the one that starts it, which must be small. The command is
    killed with its children as soon as ``until()`` is true; then the seconds are those up to there.
    """
    start, reached = time.perf_counter(), False
    with log.open("ab") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)
    try:
        while True:
            waits = until is None or reached
            ended, status, usage = os.wait4(process.pid, 0 if waits else os.WNOHANG)
            if not reached:
                seconds = time.perf_counter() - start
            if ended:
                break
            if until is not None and until():
                reached = True
                os.killpg(process.pid, signal.SIGKILL)
            else:
                time.sleep(POLL_SECONDS)
    except BaseException:  # Ctrl-C does not reach a session of its own
        os.killpg(process.pid, signal.SIGKILL)
        raise
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode and not reached:
        print(log.read_text(encoding="utf-8", errors="replace")[-2000:], file=sys.stderr)
        raise utils.StageError(
            f"{shlex.join(command)} ended with {process.returncode}.",
            f"Fix the error that {log} tells, then run the same command.",
        )
    gb = usage.ru_maxrss * KILOBYTES / 1e9
    cpu = usage.ru_utime + usage.ru_stime
    return {"seconds": seconds, "cpu": cpu, "gb": gb, "killed": reached}


def start_up(script: str, log: Path) -> float:
    """Seconds until a script begins with its work: those of importing all that it needs."""
    words = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import {Path(script).stem}"
    return float(run_measured([sys.executable, "-c", words], log)["seconds"])


def read_record(folder: Path, script: str) -> Facts:
    record: Facts = json.loads((folder / utils.record_name(script)).read_text(encoding="utf-8"))
    return record


# --------------------------------------------------------------------------------------------------
# figures of several runs or sizes
# --------------------------------------------------------------------------------------------------
def middle(runs: list[Facts]) -> Facts:
    """Of every number the median over runs, of everything else the first."""
    return {
        key: statistics.median(run[key] for run in runs) if isinstance(value, float) else value
        for key, value in runs[0].items()
    }


def exponent(amounts: Sequence[float], measured: Sequence[float]) -> float:
    """Slope of the line through log(measured) against log(amounts); nan if there is none."""
    known = [(a, m) for a, m in zip(amounts, measured, strict=True) if m > 0]
    if len({a for a, _ in known}) < 2:
        return math.nan
    x, y = ([math.log(value) for value in column] for column in zip(*known, strict=True))
    return statistics.linear_regression(x, y).slope


# --------------------------------------------------------------------------------------------------
# results, tables, and what a table says about its origin
# --------------------------------------------------------------------------------------------------
def cached(path: Path, make: Callable[[], Facts]) -> Facts:
    """The result in a file, made and written first if it is not there."""
    if not path.exists():
        result = make()
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path, json.dumps(result, indent=1))
    found: Facts = json.loads(path.read_text(encoding="utf-8"))
    return found


def write(path: Path, text: str) -> None:
    with disk.atomic(path) as partial:
        partial.write_text(text + "\n", encoding="utf-8")


def table(heads: Iterable[str], rows: Iterable[Iterable[object]]) -> list[str]:
    """Lines of a table in Markdown."""
    lines = [f"| {' | '.join(map(str, row))} |" for row in (heads, *rows)]
    return [lines[0], "|" + "---|" * len(list(heads)), *lines[1:]]


def processor() -> str:
    """Name of the processor, where the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def memory_bytes() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def machine() -> str:
    return (
        f"{processor()}, {os.cpu_count()} cores, {memory_bytes() / 1e9:.0f} GB, "
        f"{platform.system()}, Python {platform.python_version()}; "
        f"OMP_NUM_THREADS {os.environ.get('OMP_NUM_THREADS', 'not set')}"
    )


def commit(root: Path = ROOT) -> str:
    """Commit of a checkout, and whether its files differ from it."""

    def git(*words: str) -> str:
        command = ["git", *words]
        run = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
        return run.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", "*.py")
        return git("rev-parse", "--short", "HEAD") + (" with local changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown (not a git checkout)"


def origin(command: str, before: Path | None = None) -> list[str]:
    """The lines below every table: when, by which code, where and how it was made.

    ``before`` is another checkout, which the table compares with.
    """
    other = f"; before: {commit(before)}" if before else ""
    return [
        f"* date: {time.strftime('%Y-%m-%d')}",
        f"* commit: {commit()}{other}",
        f"* machine: {machine()}",
        f"* command: `{command}`",
    ]


# --------------------------------------------------------------------------------------------------
# the command line
# --------------------------------------------------------------------------------------------------
def add_keep(parser: cli.Parser) -> None:
    parser.add_argument(
        "--keep",
        type=Path,
        required=True,
        help="Folder for samples and results, by which a later run goes on.",
    )


def add_sections(parser: cli.Parser) -> None:
    """Options that say which sections a benchmark runs on."""
    option = parser.add_argument
    option("--directory", type=cli.sample_directory, nargs="*", default=[], metavar="DIR",
           help="Samples with a truth.npz; nothing is written there (default: none).")  # fmt: skip
    option("--simulated", type=cli.not_negative, default=0, help="Sections to simulate.")


def run_benchmark(
    main: Callable[[argparse.Namespace], None],
    script: str,
    parser: cli.Parser,
    argv: list[str] | None = None,
) -> int:
    """Run ``main(args)`` and return the exit code; ``args.command`` is what was typed."""
    args = parser.parse_args(argv)
    args.command = shlex.join(["python", script, *(sys.argv[1:] if argv is None else argv)])
    return cli.exit_code(lambda: main(args), Path.cwd(), "results that are kept stay")
