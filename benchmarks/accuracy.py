"""Compare HISTEX with simpler predictors on sections of known truth; write one table in Markdown.

    python benchmarks/accuracy.py --directory data/pancreas data/kidney --simulated 3 --keep bench

Reads   sections: folders with a truth.npz, and sections simulated by simulate_sections.py. Of each,
        the first four stages run once, in a copy.
Writes  the table (--output), and in --keep a result for each (section, method, seed).

Rows of the table: nearest spot, linear interpolation; ridge on the histology of the spots' discs,
the same with its residual interpolated, or smoothed as leave-one-out errors say; an MLP on tokens
in the manner of iStar (all in baselines.py); HISTEX.py --preset published and default, each run as
its user runs it.

Protocol. Every method sees the user's files alone: spots, image and what the stages made of them;
truth.npz is not in the folder where the stages run, and is read only to score. What has a seed runs
with several; the table gives the mean and standard deviation over them. State i of a run is drawn
from seed + i, so seeds are 1000 apart. Scores are those of analysis/evaluate.py, tissue only, the
median over genes: Pearson's r in superpixels of 8 um and blocks of 16 and 32 um; SSIM in
superpixels; RMSE in blocks of 32 um, in counts. The ceiling is that of a perfect predictor. What
the default preset is ahead of each other method has an interval, by bootstrap.py.

A run that was cut off goes on where it was if --keep names the same folder: a result holds as long
as the files of the sample, the options and the code it depends on stay the same. The scripts run
from a copy there, so that edits meanwhile do no harm. Seconds are wall time of prediction without
scoring, of HISTEX the whole stage; they depend on what else the machine does.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import shlex
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import utils
from benchmarks import measure
from benchmarks.measure import ROOT, TRUTH_FILE, Facts, add_sections, cached
from reading import cli
from writing import disk

SCRIPT = "benchmarks/accuracy.py"
METHODS = {  # in the order of the table
    "nearest": "nearest spot",
    "linear": "linear interpolation",
    "ridge": "ridge on histology",
    "ridge+residual": "ridge + interpolated residual",
    "ridge+smoothed": "ridge + smoothed residual",
    "mlp": "MLP on tokens (iStar-style)",
    "published": "HISTEX, published preset",
    "default": "**HISTEX, default preset**",
}
PRESETS = ("published", "default")
# Code that decides the other predictors' maps, and the scores; HISTEX's is in ``copy_code``.
COMPARING = ("benchmarks/baselines.py", "analysis/spots.py", "method/grid.py")
SCORING = ("analysis/inputs.py", "analysis/scores.py", "benchmarks/bootstrap.py", "reading/*.py")
SEED_STRIDE = 1000
SCORES = {  # name in the results: measure and bin of analysis/scores.py
    "r 1x": ("r", 1), "r 2x": ("r", 2), "r 4x": ("r", 4),
    "SSIM 1x": ("ssim", 1), "RMSE 4x": ("rmse", 4),
}  # fmt: skip
COMPARED = (1, 4)  # superpixels per side of the blocks in which methods are compared


def build_parser() -> cli.Parser:
    parser = cli.Parser(__doc__)
    add_sections(parser)
    option = parser.add_argument
    option("--n-seeds", type=cli.positive, default=3,
           help="Runs of each method that has a seed.")  # fmt: skip
    parser.alias("--seeds", "--n-seeds")
    option("--methods", nargs="+", choices=list(METHODS), default=list(METHODS),
           help="Rows of the table (default: all).")  # fmt: skip
    option("--histex-options", default="",
           help="Options of HISTEX.py for both presets, in quotes (default: none).")  # fmt: skip
    option("--published-epochs", type=cli.positive, default=500,
           help="Epochs of the published preset; it has no early stopping.")  # fmt: skip
    option("--published-states", type=cli.positive, default=5,
           help="States of the published preset.")  # fmt: skip
    option("--keep", type=Path, help="Folder for all results, by which a later run goes on "
           "(default: one that is removed).")  # fmt: skip
    option("--output", type=Path, default=ROOT / "benchmarks" / "RESULTS.md",
           help="The table, in Markdown (default: benchmarks/RESULTS.md).")  # fmt: skip
    return parser


if __name__ == "__main__":
    cli.start(build_parser())  # what needs none of the slow imports below

import numpy as np

from analysis import inputs, scores
from benchmarks import baselines, bootstrap, simulate_sections


@dataclass(frozen=True)
class Task:
    """One cell of the table and one seed."""

    method: str
    seed: int
    options: tuple[str, ...] = ()  # of HISTEX.py


# --------------------------------------------------------------------------------------------------
# what a result depends on
# --------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Code:
    """A copy of the five scripts, and hashes of all code that a result depends on."""

    folder: Path
    first: str  # of the first four stages
    histex: str
    comparing: str  # the baselines
    scoring: str


def digest(*parts: object) -> str:
    """Short sha256 of files (by content) and of other things (by their text)."""
    whole = hashlib.sha256()
    for part in parts:
        text = disk.sha256(part) if isinstance(part, Path) else str(part)
        whole.update(text.encode() + b"\0")
    return whole.hexdigest()[:12]


def copy_code(work: Path) -> Code:
    """All code that results depend on, as it is now; the scripts in a folder named by its hash."""
    folders = [ROOT, *(ROOT / room for room in ("method", "reading", "writing"))]
    scripts = [file for folder in folders for file in sorted(folder.glob("*.py"))]
    folder = work / f"code-{disk.hash_of(scripts)}"
    if not folder.exists():
        with disk.atomic(folder) as partial:
            for path in scripts:
                copy = partial / path.relative_to(ROOT)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, copy)
    return Code(
        folder,
        first=disk.hash_of(path for path in scripts if path.name != utils.HISTEX),
        histex=disk.hash_of(scripts),
        comparing=disk.hash_of(path for name in COMPARING for path in utils.ROOT.glob(name)),
        scoring=disk.hash_of(path for name in SCORING for path in utils.ROOT.glob(name)),
    )


def section_key(code: Code, directory: Path) -> str:
    """Of the files after the first four stages."""
    files = measure.user_files(directory)
    return digest(code.first, *files, *(file.name for file in files), measure.FIRST_STAGES)


def maps_key(code: Code, section: str, task: Task) -> str:
    made_by = code.histex if task.method in PRESETS else code.comparing
    return digest(made_by, section, task.method, task.seed, task.options)


def score_key(code: Code, maps: str, truth: Path) -> str:
    return digest(code.scoring, maps, truth, SCORES)


# --------------------------------------------------------------------------------------------------
# sections
# --------------------------------------------------------------------------------------------------
def run_script(code: Path, command: tuple[str, ...], directory: Path, log: Path) -> float:
    """Seconds that a script took on a directory."""
    script, *options = command
    seconds = measure.run_measured(
        measure.script_command(script, directory, *options, root=code), log
    )["seconds"]
    return float(seconds)


def prepare_section(code: Code, source: Path, work: Path) -> tuple[Path, float]:
    """Copy the user's files and run the first four stages, unless that is done: folder, seconds."""
    folder = work / f"sample-{section_key(code, source)}"

    def make() -> Facts:
        if not folder.exists():
            with disk.atomic(folder) as partial:
                measure.copy_user_files(source, partial)
        log = work / "stages.log"
        seconds = sum(
            run_script(code.folder, command, folder, log) for command in measure.FIRST_STAGES
        )
        return {"seconds": round(seconds, 1)}

    return folder, cached(folder / "prepared.json", make)["seconds"]


def simulated_section(seed: int, work: Path) -> Path:
    """Folder of a simulated section, made once for each version of the simulation."""
    sources = [Path(simulate_sections.__file__), *(ROOT / "demo").glob("[st]*.py")]
    folder = work / f"simulated-{seed}" / f"raw-{disk.hash_of(sources)}"
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with disk.atomic(folder) as partial:
            simulate_sections.run(["--directory", str(partial), "--seed", str(seed)])
    return folder


def sections_of(args: argparse.Namespace, work: Path) -> dict[str, Path]:
    """Folder of each section by its name; simulated ones are made in ``work``."""
    named = {directory.resolve().name: directory for directory in args.directory}
    return named | {
        f"simulated-{seed}": simulated_section(seed, work) for seed in range(args.simulated)
    }


def check(args: argparse.Namespace) -> None:
    """Refuse what could only fail later."""
    if not args.directory and not args.simulated:
        raise utils.StageError(
            "There is no section to work on.", "Add --directory FOLDER or --simulated 3."
        )
    names = [directory.resolve().name for directory in args.directory]
    if utils.duplicates(names):
        raise utils.StageError(
            f"--directory has folders of the same name: {', '.join(names)}.", "Rename one."
        )
    for directory in args.directory:
        if not (directory / TRUTH_FILE).is_file():
            raise utils.StageError(
                f"{directory / TRUTH_FILE} is missing: only a section with known truth can be "
                f"scored.",
                f"Simulate one: python benchmarks/simulate_sections.py --directory {directory}",
            )


# --------------------------------------------------------------------------------------------------
# maps and scores
# --------------------------------------------------------------------------------------------------
def run_histex(
    code: Path, sample: Path, work: Path, key: str, task: Task
) -> tuple[Path, float, bool]:
    """Folder with the maps of one run, its seconds, and whether it was cut off in between."""
    folder = work / f"{task.method}-{task.seed}-{key}"

    def make() -> Facts:
        resumed = folder.exists()
        if not resumed:
            with disk.atomic(folder) as partial:
                shutil.copytree(sample, partial)  # keeps times, so that the records stay valid
        options = ("--preset", task.method, "--seed", str(task.seed), "--n-plots", "0")
        command = (utils.HISTEX, *options, *task.options)
        seconds = run_script(code, command, folder, work / "stages.log")
        for path in folder.iterdir():  # the maps stay, in case that the scoring changes
            if path.name not in (utils.MAPS.name, utils.record_name(utils.HISTEX)):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        return {"seconds": round(seconds, 1), "resumed": resumed}

    facts = cached(folder / "done.json", make)
    return folder, facts["seconds"], facts["resumed"]


def read_stack(directory: Path, genes: list[str], shape: tuple[int, int]) -> np.ndarray:
    """Maps (rows, columns, genes); a gene without one would make the comparison unfair."""
    maps = inputs.read_maps(directory, genes, shape)
    if missing := [gene for gene in genes if gene not in maps]:
        raise utils.StageError(
            f"{directory / utils.MAPS.name} lacks {len(missing)} genes of the truth, such as "
            f"{missing[0]}.",
            "Put them into gene-names.txt of the sample.",
        )
    return np.dstack([maps[gene] for gene in genes])


def score_maps(truth: inputs.Truth, maps: np.ndarray | None) -> dict[str, float | None]:
    """Medians over genes, in the order of SCORES; of the ceiling, if there are no maps."""
    rows, cols = truth.tissue.shape
    shown = {} if maps is None else {"map": maps[:rows, :cols]}
    measures = tuple(dict.fromkeys(measure for measure, _ in SCORES.values()))
    middle = scores.score(truth, shown, measures).median()
    method = "map" if shown else scores.CEILING
    found = {name: middle[scores.column(method, *which)] for name, which in SCORES.items()}
    return {name: scores.rounded(value, 5) for name, value in found.items()}


def moments_of(truth: inputs.Truth, maps: np.ndarray) -> dict[str, np.ndarray]:
    """What bootstrap.py needs of a map, for each of COMPARED."""
    found: dict[str, np.ndarray] = {}
    rows, cols = truth.tissue.shape
    for size in COMPARED:
        own = bootstrap.moments(truth, np.nan_to_num(maps[:rows, :cols]), size)
        found |= {f"n{size}": own.n, f"sums{size}": own.sums}
    return found


def ahead(ours: list[Facts], theirs: list[Facts]) -> str:
    """What ours is ahead by in r, with its interval, at each size of COMPARED."""

    def read(runs: list[Facts], size: int) -> list[bootstrap.Moments]:
        kept = [np.load(run["moments"]) for run in runs]
        return [bootstrap.Moments(each[f"n{size}"], each[f"sums{size}"]) for each in kept]

    parts = []
    for size in COMPARED:
        middle, low, high = bootstrap.difference(read(ours, size), read(theirs, size))
        parts.append(f"{middle:+.3f} ({low:+.3f} to {high:+.3f})")
    return " / ".join(parts)


def tasks_of(args: argparse.Namespace) -> list[Task]:
    tasks = []
    for method in args.methods:
        seeds = args.n_seeds if method in (*PRESETS, *baselines.SEEDED) else 1
        options: tuple[str, ...] = ()
        if method == "published":
            options = ("--epochs", str(args.published_epochs))
            options += ("--n-states", str(args.published_states))
        if method in PRESETS:
            options += tuple(shlex.split(args.histex_options))
        tasks += [Task(method, i * SEED_STRIDE, options) for i in range(seeds)]
    return tasks


def run_section(code: Code, source: Path, work: Path, args: argparse.Namespace) -> Facts:
    """All results of one section: a dict a run, the ceiling, seconds of the first stages."""
    work.mkdir(parents=True, exist_ok=True)
    truth = inputs.read_truth(source)
    sample, stage_seconds = prepare_section(code, source, work)
    chosen = set(inputs.read_gene_names(sample))
    truth = inputs.select_genes(truth, [gene for gene in truth.genes if gene in chosen])
    section = functools.cache(lambda: baselines.read_spot_section(sample, truth.genes))
    key, results, runs = section_key(code, source), work / "results", []

    def predict_and_score(task: Task, made: str, kept: Path) -> Facts:
        if task.method in PRESETS:
            folder, seconds, resumed = run_histex(code.folder, sample, work, made, task)
            maps = read_stack(folder, truth.genes, truth.tissue.shape)
        else:
            seen, start, resumed = section(), time.perf_counter(), False
            maps = baselines.PREDICTORS[task.method](seen, task.seed)
            seconds = round(time.perf_counter() - start, 2)
        with disk.atomic(kept) as partial, partial.open("wb") as file:
            np.savez(file, **moments_of(truth, maps))  # type: ignore[arg-type]
        return {"scores": score_maps(truth, maps), "seconds": seconds, "resumed": resumed}

    for task in tasks_of(args):
        made = maps_key(code, key, task)
        scored = score_key(code, made, source / inputs.TRUTH)
        file = results / f"{task.method}-{task.seed}-{scored}.json"
        kept = file.with_suffix(".npz")
        results.mkdir(exist_ok=True)
        result = cached(file, functools.partial(predict_and_score, task, made, kept))
        runs.append({"method": task.method, "seed": task.seed, "moments": kept, **result})
        r = cell([result], [name for name in SCORES if name.startswith("r ")])
        print(f"{work.name}, {task.method}, seed {task.seed}: r {r}", flush=True)
    scored = score_key(code, key, source / inputs.TRUTH)
    ceiling = cached(results / f"{scores.CEILING}-{scored}.json", lambda: score_maps(truth, None))
    return {
        "name": work.name,
        "runs": runs,
        scores.CEILING: ceiling,
        "stages": stage_seconds,
        "spots": len(inputs.read_spots(sample, truth.genes)[0]),
        "genes": len(truth.genes),
    }


# --------------------------------------------------------------------------------------------------
# the table
# --------------------------------------------------------------------------------------------------
def cell(runs: list[Facts], names: list[str]) -> str:
    """Mean of each score over the runs, and with several the standard deviation below."""
    found = np.array([[run["scores"][name] for name in names] for run in runs], float)
    lines = [found.mean(0)] + ([found.std(0, ddof=1)] if len(runs) > 1 else [])
    shown = [["unknown" if np.isnan(v) else f"{v:.3f}" for v in line] for line in lines]
    return "<br>± ".join(" / ".join(line) for line in shown)


def table(results: list[Facts], methods: list[str], names: list[str], timed: bool) -> list[str]:
    """Rows of methods and the ceiling, columns of sections, in Markdown."""
    heads = [result["name"] for result in results] + ["seconds"] * timed
    rows = []
    for method in methods:
        runs = [[r for r in result["runs"] if r["method"] == method] for result in results]
        cells = [cell(own, names) for own in runs]
        if timed:
            every = [run for own in runs for run in own]
            more = "> " if any(run["resumed"] for run in every) else ""
            cells.append(f"{more}{np.mean([run['seconds'] for run in every]):,.1f}")
        rows.append([METHODS[method], *cells])
    best = [cell([{"scores": result[scores.CEILING]}], names) for result in results]
    rows.append(["ceiling", *best, *[""] * timed])
    return measure.table(["method", *heads], rows)


def differences(results: list[Facts], methods: list[str]) -> list[str]:
    """Lines on what the default preset is ahead of each other method."""
    others = [method for method in methods if method != "default"]
    if len(others) in (0, len(methods)):
        return []
    rows = []
    for method in others:
        runs = [
            [[r for r in result["runs"] if r["method"] == m] for m in ("default", method)]
            for result in results
        ]
        rows.append([METHODS[method], *(ahead(*both) for both in runs)])
    return [
        "What the default preset is ahead by in r, at 8 / 32 um, with an interval of 95 % by a",
        "bootstrap over genes and squares of 256 um:",
        "",
        *measure.table(["over", *(result["name"] for result in results)], rows),
        "",
    ]


def report(results: list[Facts], args: argparse.Namespace) -> str:
    r, others = ["r 1x", "r 2x", "r 4x"], ["SSIM 1x", "RMSE 4x"]
    published = f"{args.published_epochs} epochs, {args.published_states} states"
    sections = [
        f"* {s['name']}: {s['spots']} spots, {s['genes']} genes; the four stages before "
        f"{utils.HISTEX} took {s['stages']:.0f} s"
        for s in results
    ]
    lines = [
        "# Accuracy",
        "",
        "Pearson's r with the truth at 8 / 16 / 32 um, tissue only, median over genes; mean and",
        f"standard deviation over {args.n_seeds} seeds of what has one. Seconds: mean over "
        "sections and seeds.",
        f"Protocol: the head of `benchmarks/accuracy.py`. Published preset: {published}.",
        "",
        *table(results, args.methods, r, timed=True),
        "",
        "SSIM at 8 um (1 is best) / RMSE at 32 um (counts per superpixel, 0 is best):",
        "",
        *table(results, args.methods, others, timed=False),
        "",
        *differences(results, args.methods),
        "Sections:",
        "",
        *sections,
        "",
        *measure.origin(args.command),
    ]
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------------
# the command
# --------------------------------------------------------------------------------------------------
def main(args: argparse.Namespace) -> None:
    check(args)
    args.methods = [method for method in METHODS if method in args.methods]
    with measure.kept_or_temporary(args.keep) as work:
        code, sections = copy_code(work), sections_of(args, work).items()
        results = [run_section(code, source, work / name, args) for name, source in sections]
    measure.write(args.output, report(results, args))
    print(f"wrote {args.output}")


def run(argv: list[str] | None = None) -> int:
    return measure.run_benchmark(main, SCRIPT, build_parser(), argv)


if __name__ == "__main__":
    sys.exit(run())
