"""Measure every stage at four sizes, beside a plain way to do the same and the machine's limit.

    python benchmarks/scaling.py --keep FOLDER                   up to a slide of 11 mm, for hours
    python benchmarks/scaling.py --keep FOLDER --sizes small --output small.md         for minutes
    python benchmarks/scaling.py --keep FOLDER --stages Histology_Extractor --sizes 21952
    python benchmarks/scaling.py --keep FOLDER --sizes middle --before CHECKOUT     before and after
    python benchmarks/scaling.py --keep FOLDER --section-mm 11   only write the files of a section

Reads   the results of earlier runs in --keep; inputs are made up, and removed after use.
Writes  a result for each (stage, size) into --keep, the table (--output) and a plot beside it.

Inputs are those of benchmarks/synthetic.py. Each stage runs as its user runs it, in a process of
its own, whose wall seconds, CPU seconds and largest resident memory (mapped pages of files
included) are those of the operating system. HISTEX.py is measured twice: its training until the
states are on the disk, where the process is killed, and another run, which finds the states.

In the same run, right after the stage: the plain way and the limit of the machine, both named in
the table (benchmarks/limits.py), in processes of their own that are timed without their imports. A
limit that the stage beats is none: it is marked, and the run fails. A growth exponent is the
slope of a line through log time against log size, by least squares; of the seconds as they are,
and of what they exceed the start-up of the script by, that is, the time of its imports.

--before names another checkout of this repository, such as a worktree of an earlier commit, whose
scripts then run on the same inputs right after ours, for a table of its own.

A run that was cut off goes on by the results in --keep; a result holds as long as the script,
utils.py, method/ and reading/ stay as they are. The table shows all that hold.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import utils
from benchmarks import measure
from reading import cli
from utils import ROOT

SCRIPT = "benchmarks/scaling.py"
STAGES = (
    "image_calibration", "get_HR", "Histology_Extractor", "masking_non_tissue", "HISTEX-train",
    "HISTEX-predict",
)  # fmt: skip


def size(text: str) -> str:
    """argparse type: small, middle, full or a whole number."""
    if text not in ("small", "middle", "full"):
        cli.positive(text)
    return text


def build_parser() -> cli.Parser:
    parser = cli.Parser(__doc__)
    measure.add_keep(parser)
    option = parser.add_argument
    option("--stages", nargs="+", choices=STAGES, default=list(STAGES),
           help="What to measure (default: all).")  # fmt: skip
    option("--sizes", nargs="+", type=size, default=["full"], help="small, full, middle (last "
           "but one of full) or numbers (default: full).")  # fmt: skip
    option("--repeat", type=cli.positive, default=1, help="Runs, of which the median is kept.")
    option("--epochs", type=cli.positive, default=2, help="Epochs of HISTEX.py.")
    option("--n-states", type=cli.positive, default=1, help="States of HISTEX.py.")
    parser.alias("--states", "--n-states")
    option("--output", type=Path, default=ROOT / "benchmarks" / "SCALING.md",
           help="The table, in Markdown; the plot is put beside it "
           "(default: benchmarks/SCALING.md).")  # fmt: skip
    option("--before", type=Path, metavar="CHECKOUT",
           help="Another checkout, whose scripts are measured too (default: none).")  # fmt: skip
    option("--section-mm", type=float, metavar="MM", help="Only write the user's files of a "
           "section so wide into --keep (default: measure).")  # fmt: skip
    return parser


if __name__ == "__main__":
    cli.start(build_parser())  # what needs none of the slow imports below


import functools
import importlib
import itertools
import json
import multiprocessing
import re
import shutil
import statistics
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

from benchmarks.measure import Facts, exponent, middle, read_record, run_measured, script_command

# Larger modules are imported in processes of their own (``in_child``): the peak memory of a process
# starts from that of the process that started it, so this one must stay small.

VERSION = 4  # raise it when inputs or measurements change: earlier results then do not count
NOISE = 0.03  # by which a stage may be faster than its limit: they are measured one after the other
MEMORY_SHARE = 0.6  # of the machine's; a plain way that needs more is not run
COUNTED = ("--n-plots", "0", "--force")  # a second run predicts again; states are kept
PRODUCTS_SIDE = 266  # superpixels: a map on which the matrix products of HISTEX.py are counted
SEVERAL_STATES = 5  # as many as HISTEX.py has by default
COLOURS = {"stage": "#b5306b", "plain": "#4c78a8", "limit": "#777777"}
Results = dict[str, list[Facts]]  # by label, in the order of size


# --------------------------------------------------------------------------------------------------
# running a stage
# --------------------------------------------------------------------------------------------------
def in_child(module: str, function: str, *arguments: Any) -> Any:
    """What a function of benchmarks/ returns, in a fresh process, whose memory ends with it."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as pool:
        return pool.submit(_call, module, function, *arguments).result()


def _call(module: str, function: str, *arguments: Any) -> Any:
    return getattr(importlib.import_module(f"benchmarks.{module}"), function)(*arguments)


def run_script(case: Case, folder: Path, log: Path, options: Facts) -> Facts:
    command = script_command(case.script, folder, *case.options, root=options["root"])
    return run_measured(command, log)


def run_extractor(case: Case, folder: Path, log: Path, options: Facts) -> Facts:
    """Beside the usual: the tiles run through the network, and the seconds of the loop over them,
    which the script prints."""
    facts = run_script(case, folder, log, options)
    said = re.findall(r"(\d+) tiles in ([\d.]+) s", log.read_text(encoding="utf-8"))
    record = read_record(folder, case.script)
    more = {"batch": record["batch_size"], "turns": record["turns"]}
    more |= {"grid": record["feature_shape"][:2]}
    return {**facts, **more, "tiles": int(said[-1][0]), "loop": float(said[-1][1])}


def histex_command(folder: Path, options: Facts) -> list[str]:
    return script_command(
        utils.HISTEX, folder, "--epochs", str(options["epochs"]), "--n-states",
        str(options["states"]), "--preset", options["preset"], "--device", "cpu",
        root=options["root"],
    )  # fmt: skip


def run_training(case: Case, folder: Path, log: Path, options: Facts) -> Facts:
    """Until the last file of every state is there; the prediction that would follow is cut off."""
    states = folder / utils.STATES.name
    shutil.rmtree(states, ignore_errors=True)
    done = [states / f"{i:02d}" / "model.json" for i in range(options["states"])]
    command = histex_command(folder, options)
    facts = run_measured(command, log, lambda: all(path.exists() for path in done))
    if not facts["killed"]:
        raise RuntimeError(f"{case.script} ended before {done[-1]} was seen; see {log}")
    return {**facts, **options}


def run_prediction(case: Case, folder: Path, log: Path, options: Facts) -> Facts:
    """With states that lie on the disk, trained here first."""
    run_training(case, folder, log, options)
    facts = run_measured(histex_command(folder, options), log)
    if read_record(folder, case.script)["seconds_training"] > facts["seconds"] / 2:
        raise RuntimeError(f"{case.script} trained the states again; see {log}")
    return {**facts, **options}


# --------------------------------------------------------------------------------------------------
# cases: rows of the table
# --------------------------------------------------------------------------------------------------
class Budget(NamedTuple):
    """What a measurement may be at most, or at least, from a size on."""

    size: int
    text: str
    key: str  # of ``values``
    bound: float
    at_least: bool = False


@dataclass(frozen=True)
class Case:
    """One stage, or one half of HISTEX.py, with its inputs and what it is compared to."""

    script: str
    unit: str  # of the sizes
    small: tuple[int, ...]
    full: tuple[int, ...]
    make: str  # function of synthetic.py
    run: Callable[[Case, Path, Path, Facts], Facts]
    limit: tuple[str, str]  # what it is, function of limits.py
    plain: tuple[str, str]  # the same; a function "published" is another preset of HISTEX.py
    plain_bytes: float = 0.0  # of memory that the plain way takes, per unit of ``counted``
    plain_power: int = 1
    options: tuple[str, ...] = ()
    budgets: tuple[Budget, ...] = ()

    @property
    def counted(self) -> str:
        """What the exponent is about."""
        return self.unit.removesuffix(" side")

    def amount(self, size: int) -> int:
        return size if self.unit == "spots" else size**2


CASES = dict(zip(STAGES, (
    Case(
        utils.CALIBRATION, "pixels side", (600, 1_000, 1_600, 2_500),
        (2_500, 5_000, 10_000, 20_000), "make_scan", run_script,
        ("libvips alone, in bands", "by_libvips"), ("OpenCV, the whole image", "by_opencv"), 5,
        budgets=(Budget(20_000, "1.5 GB at most", "gb", 1.5),
                 Budget(20_000, "2 x the limit at most", "times", 2)),
    ),
    Case(
        utils.HIGH_RESOLUTION, "spots", (100, 250, 500, 1_000),
        (1_000, 2_500, 5_000, 14_000), "make_spots", run_script,
        ("pandas.read_csv of the counts alone", "table_alone"),
        ("a table of the distances of all pairs of spots", "all_pairs"), 16, 2,
        budgets=(Budget(5_000, "1 GB at most", "gb", 1), Budget(5_000, "3 s at most", "seconds", 3),
                 Budget(14_000, "9 s at most", "seconds", 9)),
    ),
    Case(
        utils.EXTRACTOR, "pixels side", (448, 672, 896, 1_344),
        (1_120, 2_240, 4_480, 8_960), "make_image", run_extractor,
        ("the bare network on as many tiles, same malloc", "network_alone"),
        ("the network on one tile of 224 px after the other", "tile_by_tile"),
        options=(*measure.EXTRACTOR_OPTIONS, "--device", "cpu"),
        budgets=(Budget(0, "90 % of the bare network's tiles/s", "throughput", 0.9, True),
                 Budget(0, "120 % of the tokens computed at most", "computed", 1.2)),
    ),
    Case(
        utils.MASKING, "superpixels side", (84, 112, 168, 252),
        (336, 686, 1_036, 1_372), "make_features", run_script,
        ("reading the tokens alone", "reading_alone"),
        ("k-means in two of all tokens in float32, 10 rounds", "cluster_in_two"), 6_200,
        budgets=(Budget(1_372, "1.5 GB at most", "gb", 1.5),
                 Budget(1_372, "20 s at most", "seconds", 20)),
    ),
    Case(
        utils.HISTEX, "spots", (50, 100, 200, 400),
        (600, 1_250, 2_500, 5_000), "make_training", run_training,
        ("its matrix products at the speed of a plain one", "training_products"),
        ("the same network and patches, a plain loop of torch", "training_loop"),
        budgets=(Budget(5_000, "4 GB at most", "gb", 4),),
    ),
    Case(
        utils.HISTEX, "superpixels side", (56, 84, 112, 168),
        (336, 686, 1_036, 1_372), "make_map", run_prediction,
        ("its matrix products at the speed of a plain one", "prediction_products"),
        ("the published preset", "published"),
        budgets=(Budget(1_372, "4 GB at most", "gb", 4),
                 Budget(1_372, "70 % of the time in plain products (5 states)", "products", 0.7,
                        True)),
    ),
), strict=True))  # fmt: skip


# --------------------------------------------------------------------------------------------------
# results
# --------------------------------------------------------------------------------------------------
@functools.cache
def digest(script: str) -> str:
    """Short hash of the code that a result depends on, as it is at first."""
    return f"{VERSION}-{utils.code_hash(script)[:12]}"


def count_products(keep: Path, options: Facts) -> Facts:
    """What limits.py counts of HISTEX.py on a small section, made and removed here."""
    with tempfile.TemporaryDirectory(prefix="products-", dir=keep) as name:
        folder = Path(name)
        in_child("synthetic", "make_map", folder, PRODUCTS_SIDE)
        one, several = (
            [*histex_command(folder, {**options, "epochs": 1, "states": n}), *COUNTED]
            for n in (1, SEVERAL_STATES)
        )
        counted: Facts = in_child("limits", "count_products", folder, keep / "p.log", one, several)
        return counted


def measure_case(name: str, size: int, args: argparse.Namespace) -> Facts:
    """Everything about one stage at one size."""
    case, log = CASES[name], args.keep / f"{name}-{size}.log"
    options = {"preset": "default", "epochs": args.epochs, "states": args.n_states}
    ours = {**options, "root": str(ROOT)}
    once: Facts = {}
    if case.script == utils.HISTEX:
        path = args.keep / "results" / f"products-{digest(case.script)}.json"
        once = measure.cached(path, lambda: count_products(args.keep, ours))

    def plain(folder: Path, stage: Facts) -> Facts:
        need = case.plain_bytes * case.amount(size) ** case.plain_power
        if need > MEMORY_SHARE * measure.memory_bytes():
            return {"needs": need / 1e9}
        if case.plain[1] == "published":
            return case.run(case, folder, log, {**ours, "preset": "published"})
        facts: Facts = in_child("limits", "timed", case.plain[1], folder, size, stage)
        return facts

    with tempfile.TemporaryDirectory(prefix=f"{name}-{size}-", dir=args.keep) as work:
        folder = Path(work)
        in_child("synthetic", case.make, folder, size)
        runs: dict[str, list[Facts]] = {"stage": [], "limit": [], "plain": [], "before": []}
        for _ in range(args.repeat):
            stage = case.run(case, folder, log, ours)
            facts = {**stage, **once}
            runs["stage"].append(stage)
            runs["limit"].append(in_child("limits", "timed", case.limit[1], folder, size, facts))
            runs["plain"].append(plain(folder, stage))
        for _ in range(args.repeat if args.before else 0):
            other = {**options, "root": str(args.before.resolve(strict=True))}
            runs["before"].append(case.run(case, folder, log, other))
    states = f", {args.n_states} state{'s' * (args.n_states > 1)}"
    return {
        "name": name,
        "label": name + states * (case.script == utils.HISTEX),
        "size": size,
        "amount": case.amount(size),
        "start_up": measure.start_up(case.script, log),
        **{kind: middle(found) if found else None for kind, found in runs.items()},
    }


def result_path(name: str, size: int, args: argparse.Namespace) -> Path:
    variant = f"{args.n_states}x{args.epochs}-" if CASES[name].script == utils.HISTEX else ""
    variant += "before-" if args.before else ""
    code = digest(CASES[name].script)
    return Path(args.keep) / "results" / f"{name}-{size}-{variant}{args.repeat}-{code}.json"


def read_results(keep: Path, before: bool = False) -> Results:
    """All results that hold; ``before`` chooses those with another checkout beside ours."""
    found: Results = {}
    for name, case in CASES.items():
        paths = (keep / "results").glob(f"{name}-*-{digest(case.script)}.json")
        results = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
        for result in sorted(results, key=lambda result: (result["label"], result["size"])):
            if bool(result["before"]) == before:
                found.setdefault(result["label"], []).append(result)
    return found


def values(result: Facts) -> Facts:
    """All that a budget can be about."""
    stage, limit = result["stage"], result["limit"]
    more = {"throughput": limit["seconds"] / stage["loop"]} if "loop" in stage else {}
    return {**limit, **stage, **more, "times": stage["seconds"] / limit["seconds"]}


# --------------------------------------------------------------------------------------------------
# table and plot
# --------------------------------------------------------------------------------------------------
def compared(other: Facts, stage: Facts) -> str:
    """Seconds of the plain way or the limit, and how often those of the stage fit into them."""
    if "needs" in other:
        return f"needs {other['needs']:,.0f} GB"
    about = "about " if "sample" in other else ""
    memory = f", {other['gb']:.2f} GB" if other.get("gb") and not about else ""
    return f"{about}{other['seconds']:,.2f} ({other['seconds'] / stage['seconds']:.2g}x){memory}"


def verdict(result: Facts) -> str:
    """Of budgets for the same, the one for the largest size holds."""
    holding = (b for b in CASES[result["name"]].budgets if result["size"] >= b.size)
    cells = []
    for budget in {b.key: b for b in holding}.values():
        value = values(result)[budget.key]
        met = value >= budget.bound if budget.at_least else value <= budget.bound
        cells.append(f"{budget.text}: {value:.3g}, {'met' if met else '**missed**'}")
    return "<br>".join(cells)


def is_beaten(result: Facts) -> bool:
    """Whether the stage, or that part of it which the limit is about, was faster than its limit."""
    stage = result["stage"]
    fastest = result["limit"]["seconds"] / (1 + NOISE)
    return bool(fastest > stage.get("loop", stage["seconds"]))


def check_limits(results: Results) -> None:
    """Fail if a limit was beaten: it is none, and whoever is compared with it is flattered."""
    beaten = [
        f"{row['label']} at {row['size']:,} {CASES[row['name']].unit}"
        for row in itertools.chain(*results.values())
        if is_beaten(row)
    ]
    if beaten:
        raise utils.StageError(
            f"Faster than their limits were: {'; '.join(beaten)}. So these are no limits.",
            "If the machine had other work, remove these results from --keep and run the same "
            "command. Else correct the limits in benchmarks/limits.py.",
        )


def main_table(results: Results) -> list[str]:
    rows = []
    for row in itertools.chain(*results.values()):
        stage, limit = row["stage"], {**row["limit"], "gb": None}
        beaten = " **beaten**" if is_beaten(row) else ""
        rows.append([
            row["label"], f"{row['size']:,} {CASES[row['name']].unit}", f"{stage['seconds']:,.2f}",
            f"{stage['cpu']:,.2f}", f"{stage['gb']:.2f}", compared(row["plain"], stage),
            compared(limit, stage) + beaten, verdict(row),
        ])  # fmt: skip
    heads = ("stage", "size", "seconds", "CPU seconds", "peak GB", "plain way", "limit", "budget")
    return measure.table(heads, rows)


def before_and_after(results: Results) -> list[str]:
    """A table of what another checkout took for the same; nothing if none was measured."""
    rows = []
    for row in itertools.chain(*results.values()):
        cells = [row["label"], f"{row['size']:,} {CASES[row['name']].unit}"]
        for key in ("seconds", "cpu", "gb"):
            then, now = row["before"][key], row["stage"][key]
            cells += [f"{then:,.2f}", f"{now:,.2f} ({now / then:.2g}x)"]
        rows.append(cells)
    kinds = ("seconds", "CPU seconds", "peak GB")
    heads = ["stage", "size", *(word for kind in kinds for word in (f"{kind} before", "now"))]
    said = "Before (the checkout that the command names) and now, on the same inputs, in one run:"
    return ["", said, "", *measure.table(heads, rows)] if rows else []


def exponents(results: Results) -> list[str]:
    """Growth exponents of each stage; and what its plain way and its limit are."""
    lines = []
    for label, rows in results.items():
        case, last = CASES[rows[0]["name"]], rows[-1]
        amounts = [row["amount"] for row in rows]
        start_up = statistics.median(row["start_up"] for row in rows)
        seconds = [row["stage"]["seconds"] for row in rows]
        beyond, gb = [s - start_up for s in seconds], [row["stage"]["gb"] for row in rows]
        slopes = [f"{exponent(amounts, column):.2f}" for column in (seconds, beyond, gb)]
        sample = f" ({last['plain']['sample']} measured)" if "sample" in last["plain"] else ""
        speed = f" ({last['limit']['speed']})" if "speed" in last["limit"] else ""
        ways = [case.plain[0] + sample, case.limit[0] + speed]
        lines.append([label, case.counted, *slopes, f"{start_up:.1f}", *ways])
    heads = ("stage", "against", "seconds", "seconds beyond start-up", "peak memory",
             "start-up (s)", "plain way", "limit")  # fmt: skip
    return measure.table(heads, lines)


def report(results: Results, changed: Results, origin: list[str], picture: str) -> str:
    lines = [
        "# Time and memory",
        "",
        "Every stage as a process of its own, on synthetic inputs. In brackets: times the seconds",
        "of the stage. How it is measured: the head of `benchmarks/scaling.py`.",
        "",
        *main_table(results),
        "",
        f"![Seconds and peak memory against size]({picture})" if results else "",
        "",
        "Growth exponents (1: in proportion to the size), plain ways and limits:",
        "",
        *exponents(results),
        *before_and_after(changed),
        "",
        "Run:",
        "",
        *origin,
    ]
    return "\n".join(lines)


def draw(results: Results, path: Path) -> None:
    """Seconds, and below them peak memory, against size, both axes logarithmic."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, LogLocator, NullLocator, StrMethodFormatter

    figure = Figure(figsize=(3 * len(results), 5.4), layout="constrained", dpi=80)
    axes = figure.subplots(2, len(results), squeeze=False)
    for column, (label, rows) in zip(axes.T, results.items(), strict=True):
        for key, unit, ax in zip(("seconds", "gb"), ("seconds", "peak GB"), column, strict=True):
            for series, colour in COLOURS.items():
                points = [(row["amount"], row[series].get(key)) for row in rows]
                points = [(x, y) for x, y in points if y]
                if points and (series, key) != ("limit", "gb"):  # of no interest
                    ax.loglog(*zip(*points, strict=True), "o-", color=colour, ms=4, label=series)
            ax.set(xlabel=CASES[rows[0]["name"]].counted, ylabel=unit)
            ax.xaxis.set_major_formatter(EngFormatter(sep=""))
            ax.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            for axis in (ax.xaxis, ax.yaxis):
                axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                axis.set_minor_locator(NullLocator())
            ax.grid(color="0.9")
            ax.spines[["top", "right"]].set_visible(False)
        slope = exponent([r["amount"] for r in rows], [r["stage"]["seconds"] for r in rows])
        column[0].set_title(f"{label}\nexponent {slope:.2f}", fontsize=10)
        column[0].legend(fontsize=8, frameon=False)
    figure.savefig(path, metadata={"Software": None})


# --------------------------------------------------------------------------------------------------
# the command
# --------------------------------------------------------------------------------------------------
def sizes_of(case: Case, words: list[str]) -> tuple[int, ...]:
    if words == ["middle"]:
        return case.full[-2:-1]
    if words in (["small"], ["full"]):
        return case.small if words == ["small"] else case.full
    return tuple(map(int, words))


def main(args: argparse.Namespace) -> None:
    args.keep.mkdir(parents=True, exist_ok=True)
    if args.section_mm:
        in_child("synthetic", "write_whole_section", args.keep, args.section_mm)
        print(f"wrote the files of a section of {args.section_mm:g} mm into {args.keep}")
        return
    for name in args.stages:
        for number in sizes_of(CASES[name], args.sizes):
            make = functools.partial(measure_case, name, number, args)
            result = measure.cached(result_path(name, number, args), make)
            print(main_table({result["label"]: [result]})[-1], flush=True)
    results, changed = read_results(args.keep), read_results(args.keep, before=True)
    picture = args.output.with_name(f"{args.output.stem.lower()}.png")
    if results:
        draw(results, picture)
    origin = measure.origin(args.command, args.before)
    measure.write(args.output, report(results, changed, origin, picture.name))
    print(f"wrote {args.output}" + (f" and {picture.name}" if results else ""))
    check_limits(results)


def run(argv: list[str] | None = None) -> int:
    return measure.run_benchmark(main, SCRIPT, build_parser(), argv)


if __name__ == "__main__":
    sys.exit(run())
