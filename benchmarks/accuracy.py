"""Compare HISTEX with simpler predictors on sections of known truth; write one table in Markdown.

    python benchmarks/accuracy.py --directory data/pancreas data/kidney --simulated 3 --keep bench

Sections: folders with a truth.npz, and sections simulated by simulate_sections.py. Of each, the
first four stages run once, in a copy. Rows of the table:

    nearest spot, linear interpolation; ridge on the histology of the spots' discs, the same with
    its residual interpolated; an MLP on tokens in the manner of iStar (all in baselines.py);
    HISTEX.py --preset published and default, each run as its user runs it

Protocol. Every method sees the user's files alone: spots, image and what the stages made of them;
truth.npz is not in the folder where the stages run, and is read only to score. What has a seed runs
with several; the table gives the mean and standard deviation over them. State i of a run is drawn
from seed + i, so seeds are 1000 apart. Scores are those of analysis/evaluate.py, tissue only, the
median over genes: Pearson's r in superpixels of 8 um and blocks of 16 and 32 um; SSIM in
superpixels; RMSE in blocks of 32 um, in counts. The ceiling is that of a perfect predictor.

A run that was cut off goes on where it was if --keep names the same folder: each (section, method,
seed) leaves a result, valid as long as the files of the sample, the options and the code it depends
on stay the same. The scripts run from a copy there, so that edits meanwhile do no harm. Seconds are
wall time of prediction without scoring, of HISTEX the whole stage; they depend on what else the
machine does.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import utils
from analysis import inputs, scores, spots
from benchmarks import baselines, simulate_sections
from benchmarks.stages import ROOT, USER_FILES, processor, run_measured

FIRST_STAGES = (
    (utils.CALIBRATION,),
    (utils.HIGH_RESOLUTION,),
    (utils.EXTRACTOR, "--backbone", "efficientnet_lite0"),
    (utils.MASKING,),
)
METHODS = {  # in the order of the table
    "nearest": "nearest spot",
    "linear": "linear interpolation",
    "ridge": "ridge on histology",
    "ridge+residual": "ridge + interpolated residual",
    "mlp": "MLP on tokens (iStar-style)",
    "published": "HISTEX, published preset",
    "default": "**HISTEX, default preset**",
}
PRESETS = ("published", "default")
SEED_STRIDE = 1000
SCORES = {  # name in the results: measure and bin of analysis/scores.py
    "r 1x": ("r", 1), "r 2x": ("r", 2), "r 4x": ("r", 4),
    "SSIM 1x": ("ssim", 1), "RMSE 4x": ("rmse", 4),
}  # fmt: skip
# Code that results depend on, beside the five scripts: what scores, and what compares.
SCORING = [Path(module.__file__) for module in (inputs, scores)]
COMPARING = [Path(module.__file__) for module in (baselines, spots)]


@dataclass(frozen=True)
class Task:
    """One cell of the table and one seed."""

    method: str
    seed: int
    options: tuple[str, ...] = ()  # of HISTEX.py


# --------------------------------------------------------------------------------------------------
# what a result depends on
# --------------------------------------------------------------------------------------------------
def digest(*parts: object) -> str:
    """Short sha256 of files (by content) and of other things (by their text)."""
    whole = hashlib.sha256()
    for part in parts:
        text = utils.sha256(part) if isinstance(part, Path) else str(part)
        whole.update(text.encode() + b"\0")
    return whole.hexdigest()[:12]


def copy_code(work: Path) -> Path:
    """All code that results depend on, as it is now, in a folder named by its content.

    The five scripts run from there; of what scores and compares, it is there to be told by.
    """
    sources = [*sorted(ROOT.glob("*.py")), *SCORING, *COMPARING]
    folder = work / f"code-{digest(*sources)}"
    if not folder.exists():
        work.mkdir(parents=True, exist_ok=True)
        with utils.atomic(folder) as partial:
            partial.mkdir()
            for source in sources:
                shutil.copyfile(source, partial / source.name)
    return folder


def user_files(directory: Path) -> list[Path]:
    """The files of a sample that its user brought, without the truth."""
    found = {path for pattern in USER_FILES for path in directory.glob(pattern)}
    return sorted(path for path in found if path.name != inputs.TRUTH)


def section_key(code: Path, directory: Path) -> str:
    """Of the files after the first four stages: all scripts but those that come later count."""
    later = [utils.HISTEX, *(path.name for path in (*SCORING, *COMPARING))]
    scripts = sorted(path for path in code.glob("*.py") if path.name not in later)
    files = user_files(directory)
    return digest(*scripts, *files, *(file.name for file in files), FIRST_STAGES)


def maps_key(code: Path, section: str, task: Task) -> str:
    names = [utils.HISTEX] if task.method in PRESETS else [path.name for path in COMPARING]
    files = [code / name for name in names]
    return digest(*files, section, task.method, task.seed, task.options)


def score_key(code: Path, maps: str, truth: Path) -> str:
    return digest(*(code / path.name for path in SCORING), maps, truth, SCORES)


# --------------------------------------------------------------------------------------------------
# sections
# --------------------------------------------------------------------------------------------------
def run_script(code: Path, command: tuple[str, ...], directory: Path, log: Path) -> float:
    """Seconds that a script took on a directory."""
    script, *options = command
    line = [sys.executable, str(code / script), "--directory", str(directory), *options]
    try:
        seconds, _ = run_measured(line, log)
    except SystemExit as error:
        raise utils.StageError(
            str(error), f"Mend what {log} tells, then run the same command."
        ) from error
    return seconds


def prepare_section(code: Path, source: Path, work: Path) -> tuple[Path, float]:
    """Copy the user's files and run the first four stages, unless that is done: folder, seconds."""
    folder = work / f"sample-{section_key(code, source)}"
    facts = folder / "prepared.json"
    if not facts.exists():
        with utils.atomic(folder) as partial:
            partial.mkdir(parents=True)
            for file in user_files(source):
                shutil.copyfile(file, partial / file.name)
        log = work / "stages.log"
        seconds = sum(run_script(code, command, folder, log) for command in FIRST_STAGES)
        facts.write_text(json.dumps({"seconds": round(seconds, 1)}) + "\n")
    return folder, json.loads(facts.read_text())["seconds"]


def simulated_section(seed: int, work: Path) -> Path:
    """Folder of a simulated section, made once for each version of the simulation."""
    sources = [Path(simulate_sections.__file__), *sorted((ROOT / "demo").glob("[st]*.py"))]
    folder = work / f"simulated-{seed}" / f"raw-{digest(*sources)}"
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with utils.atomic(folder) as partial:
            simulate_sections.main(["--directory", str(partial), "--seed", str(seed)])
    return folder


# --------------------------------------------------------------------------------------------------
# maps and scores
# --------------------------------------------------------------------------------------------------
def run_histex(
    code: Path, sample: Path, work: Path, key: str, task: Task
) -> tuple[Path, float, bool]:
    """Folder with the maps of one run, its seconds, and whether it was cut off in between."""
    folder = work / f"{task.method}-{task.seed}-{key}"
    done = folder / "done.json"
    if not done.exists():
        resumed = folder.exists()
        if not resumed:
            with utils.atomic(folder) as partial:
                shutil.copytree(sample, partial)  # keeps times, so that the records stay valid
        command = (utils.HISTEX, "--preset", task.method, "--seed", str(task.seed), "--n-plots")
        command = (*command, "0", *task.options)
        seconds = run_script(code, command, folder, work / "stages.log")
        for path in folder.iterdir():  # the maps stay, in case that the scoring changes
            if path.name not in (utils.MAPS.name, utils.record_name(utils.HISTEX)):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        done.write_text(json.dumps({"seconds": round(seconds, 1), "resumed": resumed}) + "\n")
    facts = json.loads(done.read_text())
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


def cached(path: Path, make: Callable[[], dict]) -> dict:
    """The result in a file, made and written first if it is not there."""
    if not path.exists():
        result = make()
        path.parent.mkdir(parents=True, exist_ok=True)
        with utils.atomic(path) as partial:
            partial.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return json.loads(path.read_text(encoding="utf-8"))


def tasks_of(args: argparse.Namespace) -> list[Task]:
    tasks = []
    for method in args.methods:
        seeds = args.seeds if method in (*PRESETS, *baselines.SEEDED) else 1
        options: tuple[str, ...] = ()
        if method == "published":
            options = ("--epochs", str(args.published_epochs))
            options += ("--n-states", str(args.published_states))
        if method in PRESETS:
            options += tuple(shlex.split(args.histex_options))
        tasks += [Task(method, i * SEED_STRIDE, options) for i in range(seeds)]
    return tasks


def run_section(code: Path, source: Path, work: Path, args: argparse.Namespace) -> dict:
    """All results of one section: a dict a run, the ceiling, seconds of the first stages."""
    work.mkdir(parents=True, exist_ok=True)
    truth = inputs.read_truth(source)
    sample, stage_seconds = prepare_section(code, source, work)
    chosen = set(inputs.read_gene_names(sample))
    truth = inputs.select_genes(truth, [gene for gene in truth.genes if gene in chosen])
    section = functools.cache(lambda: baselines.read_section(sample, truth.genes))
    key, results, runs = section_key(code, source), work / "results", []

    def predict_and_score(task: Task, made: str) -> dict:
        if task.method in PRESETS:
            folder, seconds, resumed = run_histex(code, sample, work, made, task)
            maps = read_stack(folder, truth.genes, truth.tissue.shape)
        else:
            seen, start, resumed = section(), time.perf_counter(), False
            maps = baselines.PREDICTORS[task.method](seen, task.seed)
            seconds = round(time.perf_counter() - start, 2)
        return {"scores": score_maps(truth, maps), "seconds": seconds, "resumed": resumed}

    for task in tasks_of(args):
        made = maps_key(code, key, task)
        scored = score_key(code, made, source / inputs.TRUTH)
        make = functools.partial(predict_and_score, task, made)
        result = cached(results / f"{task.method}-{task.seed}-{scored}.json", make)
        runs.append({"method": task.method, "seed": task.seed, **result})
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
def text(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.3f}"


def cell(runs: list[dict], names: list[str]) -> str:
    """Mean of each score over the runs, and with several the standard deviation below."""
    columns = [[run["scores"][name] for run in runs] for name in names]
    means = [None if None in column else float(np.mean(column)) for column in columns]
    line = " / ".join(text(mean) for mean in means)
    if len(runs) > 1:
        spread = [None if None in c else float(np.std(c, ddof=1)) for c in columns]
        line += "<br>± " + " / ".join(text(s) for s in spread)
    return line


def table(results: list[dict], methods: list[str], names: list[str], timed: bool) -> list[str]:
    """Rows of methods and the ceiling, columns of sections, in Markdown."""
    heads = [result["name"] for result in results] + ["seconds"] * timed
    lines = ["| " + " | ".join(["method", *heads]) + " |", "|---" * (len(heads) + 1) + "|"]
    for method in methods:
        runs = [[r for r in result["runs"] if r["method"] == method] for result in results]
        cells = [cell(own, names) for own in runs]
        if timed:
            every = [run for own in runs for run in own]
            more = "> " if any(run["resumed"] for run in every) else ""
            cells.append(f"{more}{np.mean([run['seconds'] for run in every]):,.1f}")
        lines.append("| " + " | ".join([METHODS[method], *cells]) + " |")
    best = [cell([{"scores": result[scores.CEILING]}], names) for result in results]
    lines.append("| " + " | ".join(["ceiling", *best, *[""] * timed]) + " |")
    return lines


def commit() -> str:
    """Commit of the checkout, and whether the files differ from it."""

    def git(*words: str) -> str:
        run = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True)
        return run.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", "*.py")
        return git("rev-parse", "--short", "HEAD") + (" with local changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown (not a git checkout)"


def report(results: list[dict], args: argparse.Namespace, command: str) -> str:
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
        f"standard deviation over {args.seeds} seeds of what has one. Seconds: mean over sections "
        "and seeds.",
        f"Protocol: the head of `benchmarks/accuracy.py`. Published preset: {published}.",
        "",
        *table(results, args.methods, r, timed=True),
        "",
        "SSIM at 8 um (1 is best) / RMSE at 32 um (counts per superpixel, 0 is best):",
        "",
        *table(results, args.methods, others, timed=False),
        "",
        "Sections:",
        "",
        *sections,
        "",
        f"* date: {time.strftime('%Y-%m-%d')}",
        f"* commit: {commit()}",
        f"* machine: {processor()}, {os.cpu_count()} cores, {platform.system()}, "
        f"Python {platform.python_version()}",
        f"* command: `{command}`",
    ]
    return "\n".join(lines) + "\n"


# --------------------------------------------------------------------------------------------------
# the command
# --------------------------------------------------------------------------------------------------
def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_sections(parser)
    option = parser.add_argument
    option("--seeds", type=utils.positive, default=3, help="Runs of each method that has a seed.")
    option("--methods", nargs="+", choices=list(METHODS), default=list(METHODS),
           help="Rows of the table.")  # fmt: skip
    option("--histex-options", default="", help="Options of HISTEX.py, for both presets.")
    option("--published-epochs", type=utils.positive, default=500,
           help="Epochs of the published preset; it has no early stopping.")  # fmt: skip
    option("--published-states", type=utils.positive, default=5,
           help="States of the published preset.")  # fmt: skip
    option("--keep", type=Path, help="Folder for all results, by which a later run goes on.")
    option("--output", type=Path, default=ROOT / "benchmarks" / "RESULTS.md",
           help="The table, in Markdown.")  # fmt: skip
    return parser


def add_sections(parser: argparse.ArgumentParser) -> None:
    """Options that say which sections a benchmark runs on."""
    option = parser.add_argument
    option("--directory", type=utils.sample_directory, nargs="*", default=[], metavar="DIR",
           help="Samples with a truth.npz; nothing is written there.")  # fmt: skip
    option("--simulated", type=utils.not_negative, default=0, help="Sections to simulate.")


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
    if len(set(names)) < len(names):
        raise utils.StageError(
            f"--directory has folders of the same name: {', '.join(names)}.", "Rename one."
        )
    for directory in args.directory:
        if not (directory / inputs.TRUTH).is_file():
            raise utils.StageError(
                f"{directory / inputs.TRUTH} is missing: only a section with known truth can be "
                f"scored.",
                f"Simulate one: python benchmarks/simulate_sections.py --directory {directory}",
            )


def benchmark(args: argparse.Namespace, work: Path, command: str) -> None:
    args.methods = [method for method in METHODS if method in args.methods]
    code = copy_code(work)
    sources = sections_of(args, work)
    results = [run_section(code, source, work / name, args) for name, source in sources.items()]
    with utils.atomic(args.output) as partial:
        partial.write_text(report(results, args, command), encoding="utf-8")
    print(f"wrote {args.output}")


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    typed = sys.argv[1:] if argv is None else argv
    command = shlex.join(["python", "benchmarks/accuracy.py", *typed])
    try:
        check(args)
        if args.keep is not None:
            benchmark(args, args.keep, command)
        else:
            with tempfile.TemporaryDirectory(prefix="histex-") as work:
                benchmark(args, Path(work), command)
    except utils.StageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
