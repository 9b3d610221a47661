"""Kill every stage at random moments, run it again, and compare its files with undisturbed ones.

    python benchmarks/kills.py --kills 50 --keep FOLDER

Reads   a section (--directory), or one that benchmarks/simulate_sections.py makes.
Writes  a table in Markdown, on the screen and into --output; sections and logs into --keep.

The section goes once through all five stages, undisturbed: one thread, the CPU, the embedded
backbone, a few epochs of two networks. Then every stage is run again and again from the state
before it. SIGKILL ends it and its children at a random moment of its work, that is, after its
imports; a run that ended before its moment is tried again with an earlier one. Every third time the
next run is killed as well. The same command is repeated until it ends by itself. Then all files of
the folder must have the bytes of the undisturbed run, but for what the records hold of time, and
nothing may be left of the killed runs but hidden partial files, which a later run sweeps away.
Exits with 1 if anything differs.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import utils
from benchmarks import measure
from benchmarks.measure import Facts
from reading import cli
from writing import disk

SCRIPT = "benchmarks/kills.py"
STAGES = (
    *measure.FIRST_STAGES,
    (utils.HISTEX, "--epochs", "8", "--n-states", "2", "--device", "cpu", "--n-plots", "2"),
)
RESUMED = ("goes on after epoch", "taken from")  # what a run says that found finished work
AGAIN = 3  # every so many kills, the next run is killed too
TRIES = 10  # to kill a run before it ends
RECORDS = {utils.record_name(script) for script, *_ in STAGES}
TIMES = ("seconds", "ended", "mtime_ns", "seconds_training", "seconds_prediction", "commit")
COLUMNS = {  # what is counted, and its name in the table
    "kills": "killed",
    "before": "before anything was written",
    "amid": "amid the work",
    "after the end": "after the end",
    "resumed": "reruns that found finished work",
    "trials": "trials",
    "identical": "identical",
}


def build_parser() -> cli.Parser:
    parser = cli.Parser(__doc__)
    option = parser.add_argument
    option("--directory", type=cli.sample_directory,
           help="Section to use (default: one is simulated).")  # fmt: skip
    measure.add_keep(parser)
    option("--kills", type=cli.positive, default=50, help="Trials, spread over the stages.")
    option("--seed", type=cli.not_negative, default=0, help="Seed of the moments.")
    option("--output", type=Path,
           help="Markdown file for the table (default: it is only printed).")  # fmt: skip
    return parser


# --------------------------------------------------------------------------------------------------
# what a folder holds
# --------------------------------------------------------------------------------------------------
def without_times(content: Any) -> Any:
    """A record without what differs between two equal runs."""
    if isinstance(content, dict):
        kept = {key: value for key, value in content.items() if key not in TIMES}
        return {key: without_times(value) for key, value in kept.items() if key != "directory"}
    return content


def contents(directory: Path) -> dict[str, str]:
    """Path -> hash of every file that a user sees, or record without its times."""
    found = {}
    for path in disk.files_in(directory):
        name = path.relative_to(directory).as_posix()
        if any(part.startswith(".") for part in Path(name).parts):
            continue
        if name in RECORDS:
            found[name] = json.dumps(without_times(json.loads(path.read_text(encoding="utf-8"))))
        else:
            found[name] = disk.sha256(path)
    return found


def differences(got: dict[str, str], wanted: dict[str, str]) -> list[str]:
    return sorted(name for name in got.keys() | wanted.keys() if got.get(name) != wanted.get(name))


def leftovers(directory: Path) -> list[str]:
    """Hidden files and folders other than partial ones."""
    return [path.name for path in directory.glob(".*") if ".partial" not in path.name]


# --------------------------------------------------------------------------------------------------
# running and killing
# --------------------------------------------------------------------------------------------------
def attempt(stage: tuple[str, ...], directory: Path, log: Path, after: float = math.inf) -> Facts:
    """What a run took; it is killed if it has not ended ``after`` seconds."""
    log.unlink(missing_ok=True)
    script, *options = stage
    command, moment = measure.script_command(script, directory, *options), time.monotonic() + after
    return measure.run_measured(command, log, lambda: time.monotonic() >= moment)


def moment(directory: Path, before: dict[str, str], script: str) -> str:
    """Where in the work of a stage it was cut off, by what lies in the folder."""
    record = directory / utils.record_name(script)
    if record.is_file() and json.loads(record.read_text(encoding="utf-8"))["finished"]:
        return "after the end"
    hidden = any(path.name.startswith(".") for path in directory.rglob("*"))
    return "amid" if hidden or contents(directory) != before else "before"


def try_stage(
    stage: tuple[str, ...],
    before: Path,
    after: Path,
    begin: float,
    end: float,
    args: argparse.Namespace,
    draw: random.Random,
) -> Counter[str]:
    """Kill one stage ``args.kills`` / 5 times, ``begin`` to ``end`` seconds after its start.

    Counts what happened, by the names of COLUMNS.
    """
    counts: Counter[str] = Counter()
    log, directory = args.keep / "kills.log", args.keep / "killed"
    wanted, untouched = contents(after), contents(before)
    for number in range(args.kills // len(STAGES)):
        seconds = end
        for _ in range(TRIES):
            shutil.rmtree(directory, ignore_errors=True)
            shutil.copytree(before, directory)  # keeps times, so that the records stay valid
            seconds = draw.uniform(begin, seconds)
            if attempt(stage, directory, log, seconds)["killed"]:
                break
        else:
            raise utils.StageError(
                f"{stage[0]} ended {TRIES} times before it could be killed.",
                "Run the same command on a machine that has less other work.",
            )
        counts.update(["kills", moment(directory, untouched, stage[0])])
        again = number % AGAIN == AGAIN - 1
        if again and attempt(stage, directory, log, draw.uniform(begin, end))["killed"]:
            counts.update(["kills", moment(directory, untouched, stage[0])])
        work = any(path.is_file() for path in directory.glob(".*.work/**/*"))
        attempt(stage, directory, log)
        said = log.read_text(encoding="utf-8")
        counts["resumed"] += work or any(words in said for words in RESUMED)
        wrong = differences(contents(directory), wanted) + leftovers(directory)
        counts["identical"] += not wrong
        counts["trials"] += 1
        if wrong:
            print(f"{stage[0]}, trial {number}: {', '.join(wrong[:5])} differ", file=sys.stderr)
    return counts


# --------------------------------------------------------------------------------------------------
# the command
# --------------------------------------------------------------------------------------------------
def undisturbed(raw: Path, keep: Path) -> tuple[list[Path], list[float]]:
    """Folders before the first stage and after each one, and the seconds of every stage."""
    folders, seconds = [raw], []
    for number, stage in enumerate(STAGES):
        folder = keep / f"after-{number}"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(folders[-1], folder)
        seconds.append(attempt(stage, folder, keep / "undisturbed.log")["seconds"])
        folders.append(folder)
    return folders, seconds


def report(counts: dict[str, Counter[str]], command: str) -> str:
    rows = {**counts, "all": sum(counts.values(), Counter[str]())}
    lines = [
        "# Killed and run again",
        "",
        "Every stage, killed by SIGKILL at random moments and run again; identical: all files then",
        "had the bytes of an undisturbed run. How it is done: the head of `benchmarks/kills.py`.",
        "",
        *measure.table(
            ["stage", *COLUMNS.values()],
            ([script, *(count[column] for column in COLUMNS)] for script, count in rows.items()),
        ),
        "",
        *measure.origin(command),
    ]
    return "\n".join(lines)


def main(args: argparse.Namespace) -> None:
    args.keep.mkdir(parents=True, exist_ok=True)
    os.environ["OMP_NUM_THREADS"] = "1"
    raw = args.directory
    if raw is None:
        raw = args.keep / "raw"
        shutil.rmtree(raw, ignore_errors=True)
        made = measure.script_command(
            "benchmarks/simulate_sections.py", raw, "--seed", str(args.seed)
        )
        subprocess.run(made, check=True)
    draw = random.Random(args.seed)
    folders, seconds = undisturbed(raw, args.keep)
    counts = {}
    for stage, before, after, end in zip(STAGES, folders, folders[1:], seconds, strict=False):
        begin = min(measure.start_up(stage[0], args.keep / "imports.log"), end)
        counts[stage[0]] = try_stage(stage, before, after, begin, end, args, draw)
        print(f"{stage[0]}: {dict(counts[stage[0]])}", file=sys.stderr, flush=True)
    text = report(counts, args.command)
    print(text)
    if args.output:
        measure.write(args.output, text)
    if any(count["identical"] != count["trials"] for count in counts.values()):
        raise SystemExit(1)


def run(argv: list[str] | None = None) -> int:
    return measure.run_benchmark(main, SCRIPT, build_parser(), argv)


if __name__ == "__main__":
    sys.exit(run())
