"""Let the n-th call of every script to the file system fail, or a signal come just before it.

    python benchmarks/faults.py --faults 1000 --kills 500 --output benchmarks/FAULTS.md

Reads   nothing; tiny inputs of all scripts are made, see trials.py.
Writes  tables in Markdown, on the screen and into --output; what went wrong, on stderr.

Every script runs once undisturbed, and its events are counted: opens, reads, writes, renames,
unlinks, new folders, fsyncs and memory maps below the folder of the trial, and large arrays of
numpy. faults.c, loaded before the C library, sees those of Python, torch, libvips, HDF5 and Arrow
alike. Then the script runs again and again. Each time one event fails, or SIGINT, SIGTERM or
SIGKILL comes just before it. Every third run starts from finished outputs, with --force.

A fault is survived if the run ends with exit code 2 and one message, or goes on and writes what an
undisturbed run does. A signal must end the run: SIGINT with 130. After either, no file under a real
name is other than before or as an undisturbed run leaves it, and a finished record tells what is
there; and the same command, run again, gives the bytes of an undisturbed run (records without
their times) and leaves no hidden file behind. The same is asked of a full disk (a small tmpfs), a
folder that may not be written to, a second run in the middle of the first, and a folder that is
removed under the run. Exits with 1 if anything else happened. Needs Linux and a C compiler.

--fsync, alone, tells what it costs that the system is asked to write every file to the disk.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from reading import cli

SCRIPT = "benchmarks/faults.py"


def build_parser() -> cli.Parser:
    parser = cli.Parser(__doc__)
    option = parser.add_argument
    option("--faults", type=cli.not_negative, default=1000, help="Over all scripts.")
    option("--kills", type=cli.not_negative, default=500, help="Signals, over all scripts.")
    option("--only", metavar="PATTERN", default="", help="Scripts in whose name it is found.")
    option("--quick", action="store_true", help="Few of each: --faults 60 --kills 30.")
    option("--seed", type=cli.not_negative, default=0, help="Seed of the events and errors.")
    option("--fsync", action="store_true", help="Measure the cost of fsync, and nothing else.")
    option("--planted", action="store_true", help="A plain error in every run: see it caught.")
    option("--keep", type=Path, metavar="FOLDER",
           help="For the trials (default: a temporary folder).")  # fmt: skip
    option("--output", type=Path,
           help="Markdown file for the tables (default: they are only printed).")  # fmt: skip
    return parser


def preload() -> None:
    """Start this command again with faults.c loaded before the C library, unless it is."""
    if hasattr(ctypes.CDLL(None), "histex_arm"):
        return
    library = Path(tempfile.mkdtemp(prefix="histex-faults-")) / "faults.so"
    source = Path(__file__).with_suffix(".c")
    command = ["cc", "-O1", "-shared", "-fPIC", "-o", str(library), str(source), "-ldl"]
    try:
        subprocess.run(command, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"error: {source} cannot be compiled: {error}\nInstall gcc.", file=sys.stderr)
        sys.exit(2)
    settings = {"LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}
    os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | settings)


if __name__ == "__main__":
    cli.start(build_parser())  # what needs none of the slow imports below
    preload()

import errno
import itertools
import json
import random
import re
import shutil
import signal
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

import utils
from benchmarks import measure, trials
from benchmarks.trials import Ended, Script
from writing import disk

KINDS = ("open", "read", "write", "rename", "unlink", "mkdir", "fsync", "mmap", "alloc")
ALL_KINDS = 2 ** len(KINDS) - 1
ERRORS = (
    errno.ENOSPC, errno.EIO, errno.EACCES, errno.EPERM, errno.EROFS, errno.ESTALE, errno.EBUSY,
    errno.ENOENT,
)  # fmt: skip
FOR_GOOD = (errno.ENOSPC, errno.EROFS)  # all later writes fail as well
EXPECTED = {  # exit codes, by signal
    -signal.SIGINT: {130},
    -signal.SIGTERM: {-signal.SIGTERM, 128 + signal.SIGTERM, 130},
    -signal.SIGKILL: {-signal.SIGKILL},
}
UNFINISHED = "checkpoint.pt"  # a file that only runs that were cut off leave
SHOWN = 1500  # characters of what a failed run said
SECONDS = 120  # a run takes less
NOBODY = 65534
TITLES = ("Faults", "Signals", "Mishaps, one of each a script")
REPEATS = 3  # of the scripts with and without fsync
COUNTER = """
import atexit, os, time
seconds, fsync = [], os.fsync
def counted(handle):
    start = time.perf_counter()
    if os.environ["HISTEX_FSYNC"] == "1":
        fsync(handle)
    seconds.append(time.perf_counter() - start)
os.fsync = counted
atexit.register(lambda: print(f"\\n{len(seconds)} {sum(seconds)}"))
"""  # sitecustomize.py, which Python runs first
PAGE = 4096  # bytes that a file takes at most, beside its own
SPARE_BYTES = (0, 20_000, 200_000)  # on the full disk, beside the inputs
GOOD = ("refused", "went on", "ended")
BAD = ("traceback", "hang", "died", "wrong exit", "half file", "wrong record", "lost or changed",
       "rerun fails", "rerun differs", "left behind")  # fmt: skip


class Fault(NamedTuple):
    """Event number ``at`` fails with an errno (0: none does), or, below 0, a signal comes."""

    at: int
    number: int

    def __str__(self) -> str:
        names = errno.errorcode if self.number > 0 else {0: "no fault"}
        return names.get(self.number) or signal.Signals(-self.number).name


class Trial(NamedTuple):
    """One run that was disturbed: where, by what, how it ended, what was wrong besides."""

    label: str
    event: str  # kind and path
    fault: Fault
    kind: str  # one of GOOD or BAD
    ended: Ended
    wrong: list[str]  # each begins with one of BAD

    def failures(self) -> list[str]:
        """A line for each, without what differs from run to run."""
        ended = [f"{self.kind}: exit {self.ended.code}, {self.ended.last_line}"]
        lines = [*(ended if self.kind in BAD else []), *self.wrong]
        return [
            re.sub(
                r"\b[0-9a-f]{8,16}\b", "*", f"{self.label} | {self.event} | {self.fault} | {line}"
            )
            for line in lines
        ]


# --------------------------------------------------------------------------------------------------
# one script under trial
# --------------------------------------------------------------------------------------------------
class Bench:
    """A script, the trial it starts from, and what an undisturbed run made of it."""

    def __init__(self, script: Script, start: Path, work: Path, planted: bool) -> None:
        self.script, self.start, self.planted = script, start, planted
        self.work, self.trial, self.done = work, work / "trial", work / "done"
        self.before = trials.contents(start)
        reset(self.trial, start)
        ended = self.run(Fault(0, 0))
        if ended.code:
            raise utils.StageError(f"{script.label} fails undisturbed.", ended.said[-2000:])
        self.events = [event.split()[0] for event in self.happened()]
        self.wanted = trials.contents(self.trial)
        changed = [name for name, now in self.wanted.items() if self.before.get(name) != now]
        self.outputs = set(changed) | (self.before.keys() - self.wanted.keys())
        reset(self.done, self.trial)

    def happened(self) -> list[str]:
        """Kind and path of all events, or of the one that was disturbed."""
        return (self.work / "events.log").read_text(encoding="utf-8").splitlines()

    def run(
        self,
        fault: Fault | None = None,
        force: bool = False,
        user: int | None = None,
        meanwhile: Callable[[], object] | None = None,
    ) -> Ended:
        """Run the script in the trial; ``meanwhile()`` is called when it has stopped."""

        def before() -> None:
            if user is not None:
                os.setuid(user)
            if fault is not None:
                self.arm(fault)
                if self.planted and fault.at:
                    raise RuntimeError("planted")

        options = (*self.script.options, *(["--force"] if force else []))
        script = self.script._replace(options=options)
        log = self.work / f"run-{time.monotonic_ns()}.log"  # a run may go on within another
        return trials.forked(script, self.trial, log, SECONDS, before, meanwhile)

    def arm(self, fault: Fault) -> None:
        """Tell faults.c, in the child."""
        log = os.open(self.work / "events.log", os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
        where, at = str(self.trial).encode(), ctypes.c_long(fault.at)
        for_good = fault.number in FOR_GOOD
        ctypes.CDLL(None).histex_arm(where, ALL_KINDS, at, fault.number, for_good, log)

    # ----- the invariant -----
    def wrong_after(self) -> Iterator[str]:
        """What is wrong with the files that a disturbed run left."""
        found = trials.contents(self.trial)
        for name in found.keys() | self.before.keys():
            if name not in found:
                if name not in self.outputs:
                    yield f"lost or changed: {name} is gone"
            elif found[name] in (self.before.get(name), self.wanted.get(name)):
                continue
            elif name not in self.outputs and name in self.before:
                yield f"lost or changed: {name}"
            elif not (name.endswith(UNFINISHED) or self.is_unfinished(name)):
                yield f"half file: {name}"
        yield from self.wrong_record(found)

    def is_unfinished(self, name: str) -> bool:
        path = self.trial / name
        return path.suffix == ".json" and '"finished": false' in path.read_text(encoding="utf-8")

    def wrong_record(self, found: dict[str, str]) -> Iterator[str]:
        """A finished record must tell what is there."""
        path = self.trial / trials.SECTION / utils.record_name(self.script.name)
        name = path.relative_to(self.trial).as_posix()
        if name not in found or found[name] == self.before.get(name) or self.is_unfinished(name):
            return
        for output, known in json.loads(path.read_text(encoding="utf-8"))["outputs"].items():
            if not disk.same_as(path.parent / output, known):
                yield f"wrong record: {output}"

    def judge(self, event: str, fault: Fault, ended: Ended) -> Trial:
        """How the run ended, one of GOOD or BAD, and what is wrong with the files and a rerun."""
        wrong = list(self.wrong_after())
        messages = len(re.findall(r"^error: ", ended.said, re.MULTILINE))
        as_wanted = not trials.differences(trials.contents(self.trial), self.wanted)
        if ended.traceback:
            kind = "traceback"
        elif ended.code == -signal.SIGALRM:
            kind = "hang"
        elif fault.number in EXPECTED:
            kind = "ended" if ended.code in EXPECTED[fault.number] else "wrong exit"
        elif ended.code < 0:
            kind = "died"
        elif ended.code == 2 and messages == 1:
            kind = "refused"
        else:
            kind = "went on" if ended.code == 0 and as_wanted else "wrong exit"
        for path in (*self.trial.rglob(".*.partial*"), *self.trial.rglob(".*.work")):
            os.utime(path, (0, 0))  # as if hours had passed: until then another run may be at it
        if sizes(self.trial) in (sizes(self.start), sizes(self.done)) and not wrong:
            pass  # nothing has changed: the same command does what it did
        elif (again := self.run()).code:
            wrong.append(f"rerun fails: {again.code} {again.last_line}")
        elif different := trials.differences(trials.contents(self.trial), self.wanted):
            wrong.append(f"rerun differs: {utils.some(different)}")
        if left := trials.leftovers(self.trial):
            wrong.append(f"left behind: {utils.some(left)}")
        return Trial(self.script.label, event, fault, kind, ended, wrong)

    def attempt(self, fault: Fault, over_again: bool) -> Trial | None:
        """None if the run came to no such event."""
        reset(self.trial, self.done if over_again else self.start)
        ended = self.run(fault, over_again)
        happened = ["planted"] if self.planted else self.happened()
        return self.judge(happened[0], fault, ended) if happened else None


def reset(trial: Path, start: Path) -> None:
    shutil.rmtree(trial, ignore_errors=True)
    shutil.copytree(start, trial)  # keeps times, so that the records stay valid


def sizes(trial: Path) -> dict[str, tuple[int, int]]:
    """Bytes and mtime of all files, hidden ones as well; of folders only that they are there."""
    found = {}
    for path in trial.rglob("*"):
        stat, name = path.stat(), str(path.relative_to(trial))
        found[name] = (stat.st_size, stat.st_mtime_ns) if path.is_file() else (0, 0)
    return found


def choose(events: list[str], n: int, draw: random.Random, calm: tuple[str, ...]) -> list[int]:
    """Numbers of ``n`` events, of all kinds but the ``calm`` in turn; all once before any twice."""
    by_kind: dict[str, list[int]] = defaultdict(list)
    for number, kind in enumerate(events, 1):
        if kind not in calm:
            by_kind[kind].append(number)
    for numbers in by_kind.values():
        draw.shuffle(numbers)
    in_turn = itertools.zip_longest(*by_kind.values())
    order = [number for numbers in in_turn for number in numbers if number is not None]
    return list(itertools.islice(itertools.cycle(order), n))


def faults_of(bench: Bench, n: int, draw: random.Random) -> Iterator[Fault]:
    for at in choose(bench.events, n, draw, ()):
        yield Fault(at, errno.ENOMEM if bench.events[at - 1] == "alloc" else draw.choice(ERRORS))


def kills_of(bench: Bench, n: int, draw: random.Random) -> Iterator[Fault]:
    for i, at in enumerate(choose(bench.events, n, draw, ("alloc", "read"))):
        yield Fault(at, list(EXPECTED)[i % len(EXPECTED)])


# --------------------------------------------------------------------------------------------------
# what befalls the whole folder
# --------------------------------------------------------------------------------------------------
def full_disk(bench: Bench, draw: random.Random) -> Trial | None:
    """The trial on a tmpfs with little room; None where it cannot be mounted."""
    size = sum(path.stat().st_size + PAGE for path in disk.files_in(bench.start))
    shutil.rmtree(bench.trial, ignore_errors=True)
    bench.trial.mkdir()
    size += draw.choice(SPARE_BYTES)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(bench.trial)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        return None
    try:
        shutil.copytree(bench.start, bench.trial, dirs_exist_ok=True)
        ended = bench.run()
        subprocess.run(["mount", "-o", "remount,size=1g", str(bench.trial)], check=True)
        return bench.judge("full disk", Fault(1, errno.ENOSPC), ended)
    finally:
        subprocess.run(["umount", str(bench.trial)], check=True)


def read_only(bench: Bench, draw: random.Random) -> Trial | None:
    """The sample write-protected, for a user who is not root; None for whom is not root here."""
    if os.getuid():
        return None
    reset(bench.trial, bench.start)
    section = bench.trial / trials.SECTION
    section.mkdir(exist_ok=True)
    section.chmod(0o555)
    ended = bench.run(user=NOBODY)
    section.chmod(0o755)
    return bench.judge("read-only folder", Fault(1, errno.EACCES), ended)


def two_runs(bench: Bench, draw: random.Random) -> Trial:
    """The first stops before an event, the second runs to its end, the first goes on."""
    reset(bench.trial, bench.start)
    seconds: list[Ended] = []
    fault = Fault(draw.randint(1, len(bench.events)), -signal.SIGSTOP)
    ended = bench.run(fault, meanwhile=lambda: seconds.append(bench.run()))
    trial = bench.judge(f"two runs at {' '.join(bench.happened()[:1])}", fault, ended)
    wrong = [f"wrong exit: of the second, {e.code} {e.last_line}" for e in seconds if e.code]
    return trial._replace(wrong=trial.wrong + wrong)


def removed(bench: Bench, draw: random.Random) -> Trial:
    """The folder of the sample is removed when the run has stopped before an event.

    The last file that a run moves to its name is its record: what is removed later was finished.
    """
    reset(bench.trial, bench.start)
    n_events = len(bench.events) - bench.events[::-1].index("rename")
    fault = Fault(draw.randint(1, n_events), -signal.SIGSTOP)
    ended = bench.run(fault, meanwhile=lambda: shutil.rmtree(bench.trial))
    at = " ".join(bench.happened()[:1])
    found = trials.contents(bench.trial)  # prepare/ makes a folder that is not there
    files = [name for name in bench.outputs if not name.endswith(".json")]  # records tell of inputs
    whole = all(found.get(name) == bench.wanted.get(name) for name in files)
    reset(bench.trial, bench.start)
    trial = bench.judge(f"folder removed at {at}", fault, ended)
    return trial._replace(kind="went on") if whole and ended.code == 0 else trial


MISHAPS = {
    "full disk": full_disk,
    "read-only folder": read_only,
    "two runs": two_runs,
    "folder removed": removed,
}


# --------------------------------------------------------------------------------------------------
# tables
# --------------------------------------------------------------------------------------------------
def count(tries: list[Trial]) -> Counter[str]:
    """Trials by how they ended, and by what else was wrong."""
    counts = Counter(trial.kind for trial in tries)
    for trial in tries:
        counts.update({line.split(":")[0] for line in trial.wrong})
    counts["all"] = len(tries)
    counts["sound"] = sum(not trial.failures() for trial in tries)
    return counts


def rows_of(groups: dict[str, list[Trial]], columns: tuple[str, ...]) -> list[list[object]]:
    whole = [trial for tries in groups.values() for trial in tries]
    return [
        [name, *(count(tries)[column] for column in columns)]
        for name, tries in {**groups, "all": whole}.items()
        if tries
    ]


def cost_of_fsync(work: Path) -> list[str]:
    """A table of the five scripts, each run as its user does: seconds with fsync and without."""
    trials.make(work / "starts", work / "make.log", {"0"})
    (work / "site").mkdir()
    (work / "site" / "sitecustomize.py").write_text(COUNTER, encoding="utf-8")
    found: dict[tuple[str, int], list[list[float]]] = defaultdict(list)
    for turn in range(2 * REPEATS):
        reset(work / "trial", work / "starts" / "0")
        setting = {"HISTEX_FSYNC": str(turn % 2), "PYTHONPATH": str(work / "site")}
        for script in trials.CHAIN[: len(utils.STAGES)]:
            options = [option.format(work / "trial") for option in script.options]
            start = time.monotonic()
            done = subprocess.run(
                [sys.executable, utils.ROOT / script.name, *options], capture_output=True,
                text=True, env=os.environ | setting | {"LD_PRELOAD": ""}, check=True,
            )  # fmt: skip
            calls, within = map(float, done.stdout.split()[-2:])
            found[script.name, turn % 2].append([time.monotonic() - start, within, calls])
    rows: list[list[object]] = []
    for name in (*utils.STAGES, "all"):
        runs = [
            np.sum([found[n, on] for n in utils.STAGES if name in (n, "all")], axis=0)
            for on in (0, 1)
        ]
        without, (seconds, within, calls) = np.median(runs[0][:, 0]), np.median(runs[1], axis=0)
        rows.append([name, f"{without:.2f}", f"{seconds:.2f}", f"{within:.3f}", f"{calls:.0f}"])
    columns = ["script", "s without fsync", "s with fsync", "s within fsync", "calls"]
    return measure.table(columns, rows)


def report(tables: dict[str, dict[str, list[Trial]]], command: str) -> str:
    """Tables of faults, of signals and of mishaps, a row for each script or mishap."""
    lines = [
        "# Faults injected and runs killed",
        "",
        "How it is done, and what sound means: the head of `benchmarks/faults.py`.",
    ]
    for title, groups in tables.items():
        kinds = [kind for tries in groups.values() for trial in tries for kind in count([trial])]
        columns = ("all", "sound", *(kind for kind in (*GOOD, *BAD) if kind in kinds))
        lines += ["", f"## {title}", ""]
        lines += measure.table(["script", *columns], rows_of(groups, columns))
    return "\n".join([*lines, "", *measure.origin(command)])


def say(trial: Trial | None) -> list[Trial]:
    """The trial in a list, if there is one; what went wrong, and what the run said, to stderr."""
    for i, line in enumerate(trial.failures() if trial else []):
        said = trial.ended.said.rstrip()[-SHOWN:] if trial and not i else ""
        print(
            f"FAILED {line}",
            *(f"    {word}" for word in said.splitlines()),
            sep="\n",
            file=sys.stderr,
        )
    return [trial] if trial else []


def try_script(
    bench: Bench, faults: int, kills: int, draw: random.Random
) -> dict[str, dict[str, list[Trial]]]:
    """Trials of one script: title of a table -> name of a row -> trials."""
    disturbed = [
        [trial for i, fault in enumerate(some) for trial in say(bench.attempt(fault, i % 3 == 2))]
        for some in (faults_of(bench, faults, draw), kills_of(bench, kills, draw))
    ]
    by_title = {
        title: {bench.script.label: some} for title, some in zip(TITLES, disturbed, strict=False)
    }
    return by_title | {
        TITLES[2]: {name: say(suffer(bench, draw)) for name, suffer in MISHAPS.items()}
    }


def main(args: argparse.Namespace) -> None:
    if args.fsync:
        with measure.kept_or_temporary(args.keep) as work:
            print(*cost_of_fsync(work), "", *measure.origin(args.command), sep="\n")
        return
    if args.quick:
        args.faults, args.kills = 60, 30
    scripts = [script for script in trials.SCRIPTS if re.search(args.only, script.label)]
    if not scripts:
        raise utils.StageError(f"{args.only!r} is in the name of no script.", "Leave out --only.")
    trials.warm_up(scripts)
    draw = random.Random(args.seed)
    tables: dict[str, dict[str, list[Trial]]] = {title: defaultdict(list) for title in TITLES}
    with measure.kept_or_temporary(args.keep) as work:
        work.chmod(0o755)  # for the run of another user
        shutil.rmtree(work / "starts", ignore_errors=True)
        trials.make(work / "starts", work / "make.log", {script.start for script in scripts})
        for i, script in enumerate(scripts):
            bench = Bench(script, work / "starts" / script.start, work, args.planted)
            faults, kills = (trials.share(n, i, len(scripts)) for n in (args.faults, args.kills))
            told = [f"{len(bench.events)} events"]
            for title, rows in try_script(bench, faults, kills, draw).items():
                for name, some in rows.items():
                    tables[title][name] += some
                    told.append(f"{count(some)['sound']} of {len(some)}")
            print(f"{script.label}: {', '.join(told)} sound", file=sys.stderr, flush=True)
    text = report(tables, args.command)
    print(text)
    if args.output:
        measure.write(args.output, text)
    if any(t.failures() for rows in tables.values() for some in rows.values() for t in some):
        raise SystemExit(1)


def run(argv: list[str] | None = None) -> int:
    return measure.run_benchmark(main, SCRIPT, build_parser(), argv)


if __name__ == "__main__":
    sys.exit(run())
