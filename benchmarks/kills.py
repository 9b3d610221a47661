"""Kill every stage at random moments, run it again, and compare its files with undisturbed ones.

    python benchmarks/kills.py --kills 50 --keep FOLDER

A small simulated section goes once through all five stages, undisturbed: one thread, the CPU, the
embedded backbone, a few epochs of two networks. Then every stage is run again and again from the
state before it. SIGKILL ends it and its children at a random moment of its work, that is, after its
imports; a run that ended before its moment is tried again with an earlier one. Every third time the
next run is killed as well. The same command is repeated until it ends by itself. Then all files of
the folder must have the bytes of the undisturbed run, but for what the records hold of time, and
nothing may be left of the killed runs but hidden partial files, which a later run sweeps away.
Prints a table in Markdown; exits with 1 if anything differs.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import utils
from benchmarks.stages import ROOT, processor

STAGES = (
    (utils.CALIBRATION,),
    (utils.HIGH_RESOLUTION,),
    (utils.EXTRACTOR, "--backbone", "efficientnet_lite0", "--device", "cpu"),
    (utils.MASKING,),
    (utils.HISTEX, "--epochs", "8", "--n-states", "2", "--device", "cpu", "--n-plots", "2"),
)
RESUMED = ("goes on after epoch", "taken from")  # what a run says that found finished work
AGAIN = 3  # every so many kills, the next run is killed too
TRIES = 10  # to kill a run before it ends
RECORDS = {utils.record_name(script) for script, *_ in STAGES}
TIMES = ("seconds", "ended", "mtime_ns", "seconds_training", "seconds_prediction")


# --------------------------------------------------------------------------------------------------
# what a folder holds
# --------------------------------------------------------------------------------------------------
def without_times(content):
    """A record without what differs between two equal runs."""
    if isinstance(content, dict):
        kept = {key: value for key, value in content.items() if key not in TIMES}
        return {key: without_times(value) for key, value in kept.items() if key != "directory"}
    return content


def contents(directory: Path) -> dict[str, str]:
    """Path -> hash of every file that a user sees, or record without its times."""
    found = {}
    for path in utils.files_in(directory):
        name = path.relative_to(directory).as_posix()
        if any(part.startswith(".") for part in Path(name).parts):
            continue
        if name in RECORDS:
            found[name] = json.dumps(without_times(json.loads(path.read_text(encoding="utf-8"))))
        else:
            found[name] = utils.sha256(path)
    return found


def differences(got: dict[str, str], wanted: dict[str, str]) -> list[str]:
    return sorted(name for name in got.keys() | wanted.keys() if got.get(name) != wanted.get(name))


def leftovers(directory: Path) -> list[str]:
    """Hidden files and folders other than partial ones."""
    return [path.name for path in directory.glob(".*") if ".partial" not in path.name]


# --------------------------------------------------------------------------------------------------
# running and killing
# --------------------------------------------------------------------------------------------------
def start(stage: tuple[str, ...], directory: Path, log: Path) -> subprocess.Popen:
    script, *options = stage
    command = [sys.executable, str(ROOT / script), "--directory", str(directory), *options]
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    with log.open("wb") as output:
        return subprocess.Popen(
            command, stdout=output, stderr=output, env=environment, start_new_session=True
        )


def run(stage: tuple[str, ...], directory: Path, log: Path) -> float:
    """Seconds of a run that nothing disturbs."""
    begun = time.monotonic()
    if code := start(stage, directory, log).wait():
        raise SystemExit(f"{stage[0]} ended with {code}: {log.read_text(encoding='utf-8')[-2000:]}")
    return time.monotonic() - begun


def run_killed(stage: tuple[str, ...], directory: Path, log: Path, after: float) -> bool:
    """Whether the run was killed ``after`` seconds; False if it had ended by itself."""
    process = start(stage, directory, log)
    try:
        process.wait(after)
    except subprocess.TimeoutExpired:
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
        else:  # Windows
            process.kill()
        process.wait()
        return True
    return False


def moment(directory: Path, before: dict[str, str], script: str) -> str:
    """Where in the work of a stage it was cut off, by what lies in the folder."""
    record = directory / utils.record_name(script)
    if record.is_file() and json.loads(record.read_text(encoding="utf-8"))["finished"]:
        return "after the end"
    hidden = any(path.name.startswith(".") for path in directory.rglob("*"))
    return "amid" if hidden or contents(directory) != before else "before"


def try_stage(
    stage: tuple[str, ...], before: Path, after: Path, begin: float, end: float, args, draw
) -> Counter:
    """Kill one stage ``args.kills`` / 5 times; count what happened."""
    counts: Counter = Counter()
    log, directory = args.keep / "kills.log", args.keep / "killed"
    wanted, untouched = contents(after), contents(before)
    for number in range(args.kills // len(STAGES)):
        seconds = end
        for _ in range(TRIES):
            shutil.rmtree(directory, ignore_errors=True)
            shutil.copytree(before, directory)  # keeps times, so that the records stay valid
            seconds = draw.uniform(begin, seconds)
            if run_killed(stage, directory, log, seconds):
                break
        else:
            raise SystemExit(f"{stage[0]} ended {TRIES} times before it could be killed")
        counts["kills"] += 1
        counts[moment(directory, untouched, stage[0])] += 1
        if number % AGAIN == AGAIN - 1 and run_killed(
            stage, directory, log, draw.uniform(begin, end)
        ):
            counts["kills"] += 1
            counts[moment(directory, untouched, stage[0])] += 1
        work = any(path.is_file() for path in directory.glob(".*.work/**/*"))
        run(stage, directory, log)
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
        seconds.append(run(stage, folder, keep / "undisturbed.log"))
        folders.append(folder)
    return folders, seconds


def imports(script: str, log: Path) -> float:
    """Seconds until a script begins with its work: those of asking it for help."""
    begun = time.monotonic()
    with log.open("wb") as output:
        subprocess.run([sys.executable, str(ROOT / script), "--help"], stdout=output, check=True)
    return time.monotonic() - begun


def table(counts: dict[str, Counter]) -> str:
    columns = ("kills", "before", "amid", "after the end", "resumed", "trials", "identical")
    heads = ("killed", "before anything was written", "amid the work", "after the end",
             "reruns that found finished work", "trials", "identical")  # fmt: skip
    lines = ["| stage | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    for script, count in counts.items():
        lines.append(f"| {script} | {' | '.join(str(count[column]) for column in columns)} |")
    total = sum(counts.values(), Counter())
    lines.append(f"| all | {' | '.join(str(total[column]) for column in columns)} |")
    return "\n".join(lines)


def report(counts: dict[str, Counter], command: str) -> str:
    from benchmarks.accuracy import commit

    lines = [
        "# Killed and run again",
        "",
        "Every stage, killed by SIGKILL at random moments and run again; identical: all files then",
        "had the bytes of an undisturbed run. How it is done: the head of `benchmarks/kills.py`.",
        "",
        table(counts),
        "",
        f"* date: {time.strftime('%Y-%m-%d')}",
        f"* commit: {commit()}",
        f"* machine: {processor()}, {os.cpu_count()} cores; one thread",
        f"* command: `{command}`",
    ]
    return "\n".join(lines) + "\n"


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    option = parser.add_argument
    option("--kills", type=utils.positive, default=50, help="Trials, spread over the stages.")
    option("--output", type=Path, help="Markdown file for the table; without it, only printed.")
    option("--keep", type=Path, required=True, help="Folder for the sections.")
    option("--seed", type=utils.not_negative, default=0, help="Seed of the moments.")
    option("--directory", type=Path, help="Section to use; without it, one is simulated.")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    args.keep.mkdir(parents=True, exist_ok=True)
    raw = args.directory
    if raw is None:
        raw = args.keep / "raw"
        shutil.rmtree(raw, ignore_errors=True)
        from benchmarks import simulate_sections

        simulate_sections.main(["--directory", str(raw), "--seed", str(args.seed)])
    draw = random.Random(args.seed)
    folders, seconds = undisturbed(raw, args.keep)
    counts = {}
    for stage, before, after, end in zip(STAGES, folders, folders[1:], seconds, strict=False):
        begin = min(imports(stage[0], args.keep / "help.log"), end)
        counts[stage[0]] = try_stage(stage, before, after, begin, end, args, draw)
        print(f"{stage[0]}: {dict(counts[stage[0]])}", file=sys.stderr, flush=True)
    text = report(counts, shlex.join(["python", "benchmarks/kills.py", *(argv or sys.argv[1:])]))
    print(text)
    if args.output:
        with utils.atomic(args.output) as partial:
            partial.write_text(text, encoding="utf-8")
    return int(any(count["identical"] != count["trials"] for count in counts.values()))


if __name__ == "__main__":
    sys.exit(main())
