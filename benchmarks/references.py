"""What a reference brings to a section that it was not learned from, with spots and without.

    python benchmarks/references.py --teachers data/east data/south --directory data/kidney \\
        --keep results

Reads   samples with a truth.npz, of --teachers to learn from and of --directory to score
Writes  a table in Markdown to stdout; samples and maps in --keep, by which a later run goes on

Rows: linear interpolation of the section's own spots; HISTEX.py without a reference, with it, and
with one whose truth was shuffled among the superpixels of the tissue, which must do no harm; both
again on the same section in another stain (--stain); maps from the H&E alone by
reference/predict.py. Columns: the genes that the reference knows, those that
it does not, and all: median over genes of Pearson's r with the truth at 8 and at 32 um. Teachers
and the scored section must be different regions: the truth of --directory is used for the score
only.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import utils
from benchmarks import measure
from reading import cli

SCRIPT = "benchmarks/references.py"
ROWS = {  # --rows -> as the table calls it
    "none": "HISTEX without a reference",
    "with": "with the reference",
    "shuffled": "with one of shuffled truth",
    "restained": "in another stain, without",
    "restained-with": "in another stain, with the reference",
    "alone": "from the H&E alone",
}


def build_parser() -> cli.Parser:
    parser = cli.Parser(__doc__)
    option = parser.add_argument
    for name, what in (("teachers", "to learn from"), ("directory", "to score")):
        option(
            f"--{name}",
            type=cli.sample_directory,
            nargs="+",
            required=True,
            metavar="DIR",
            help=f"Samples with a truth.npz {what}; nothing is written there.",
        )
    option("--n-states", type=cli.positive, default=5, help="Networks of a map.")
    option("--n-seeds", type=cli.positive, default=1, help="Maps of HISTEX.py a row, averaged.")
    option(
        "--stain",
        type=cli.above_0,
        nargs=2,
        default=(0.75, 1.4),
        metavar=("HAEMATOXYLIN", "EOSIN"),
        help="Strength of the two stains in the section of another stain, as shares of the real.",
    )
    option("--rows", nargs="+", choices=ROWS, default=list(ROWS),
           help="Maps to make and score, beside linear interpolation (default: all).")  # fmt: skip
    measure.add_keep(parser)
    return parser


if __name__ == "__main__":
    cli.start(build_parser())  # what needs none of the slow imports below

import json
import shutil

import numpy as np
import safetensors
from PIL import Image
from skimage.color import hed2rgb, rgb2hed

from analysis import inputs, spots
from benchmarks import accuracy
from writing import disk

SIZES = ("r 1x", "r 4x")
SHUFFLED = "shuffled"


def run_script(work: Path, script: str, *words: str) -> None:
    measure.run_measured([sys.executable, str(utils.ROOT / script), *words], work / "log.txt")


def teacher(code: accuracy.Code, source: Path, work: Path, shuffled: bool) -> Path:
    """The sample after four stages with its truth, as it is or shuffled on the tissue."""
    work.mkdir(parents=True, exist_ok=True)
    sample, _ = accuracy.prepare_section(code, source, work)
    folder = sample.with_name(f"{sample.name}-{SHUFFLED}") if shuffled else sample
    if not (folder / inputs.TRUTH).exists():
        if shuffled:
            shutil.copytree(sample, folder, dirs_exist_ok=True)
        truth = inputs.read_truth(source)
        if shuffled:
            known = truth.counts[truth.tissue]
            truth.counts[truth.tissue] = np.random.default_rng(0).permutation(known)
        with disk.atomic(folder / inputs.TRUTH) as partial, partial.open("wb") as file:
            np.savez(file, counts=truth.counts, tissue=truth.tissue, genes=np.array(truth.genes))
    return folder


def learned(code: accuracy.Code, args: argparse.Namespace, work: Path, shuffled: bool) -> Path:
    """The file of the reference."""
    file = work / f"{SHUFFLED if shuffled else 'reference'}.safetensors"
    samples = [
        teacher(code, source, work / f"teacher-{source.resolve().name}", shuffled)
        for source in args.teachers
    ]
    options = ["--sections", *map(str, samples), "--output", str(file), "--leave-none-out"]
    run_script(work, "reference/learn.py", *options)
    return file


def maps_of(
    sample: Path, work: Path, name: str, script: str, options: list[str], genes: list[str],
    shape: tuple[int, int],
) -> np.ndarray:  # fmt: skip
    """Maps (rows, columns, genes) by a script, in a copy of the sample."""
    folder = work / name
    if not folder.exists():
        with disk.atomic(folder) as partial:
            shutil.copytree(sample, partial)
    run_script(work, script, "--directory", str(folder), *options, "--n-plots", "0")
    return accuracy.read_stack(folder, genes, shape)


def restain(image: np.ndarray, strength: tuple[float, float]) -> np.ndarray:
    """An H&E image uint8 (rows, columns, 3) with more or less of its two stains."""
    shares = rgb2hed(image)
    shares[..., :2] *= strength
    return (hed2rgb(shares) * 255).round().astype(np.uint8)


def other_stain(source: Path, work: Path, strength: tuple[float, float]) -> Path:
    """A folder with the files of a sample, whose image is in another stain."""
    folder = work / "restained-{:g}-{:g}".format(*strength)
    if not folder.exists():
        with disk.atomic(folder) as partial:
            measure.copy_user_files(source, partial)
            (path,) = partial.glob("he-raw.*")
            with Image.open(path) as image:
                changed = Image.fromarray(restain(np.asarray(image.convert("RGB")), strength))
            changed.save(path, quality=95)
    return folder


def score(truth: inputs.Truth, maps: np.ndarray, parts: dict[str, list[str]]) -> dict[str, list]:
    """r at both sizes of the genes of every part that the maps have."""
    scores = {}
    for part, genes in parts.items():
        if genes:
            chosen = maps[..., [truth.genes.index(gene) for gene in genes]]
            found = accuracy.score_maps(inputs.select_genes(truth, genes), chosen)
            scores[part] = [found[size] for size in SIZES]
    return scores


def rows_of(
    code: accuracy.Code, source: Path, args: argparse.Namespace, files: dict[str, Path], work: Path
) -> dict[str, dict[str, list]]:
    """Scores by row and part of the genes, of one section."""
    work.mkdir(parents=True, exist_ok=True)
    sample, _ = accuracy.prepare_section(code, source, work)
    truth, shape = inputs.read_truth(source), inputs.read_truth(source).tissue.shape
    known = set(known_genes(files["with"]))
    parts = {
        "genes of the reference": [gene for gene in truth.genes if gene in known],
        "other genes": [gene for gene in truth.genes if gene not in known],
        "all": truth.genes,
    }
    places, counts = inputs.read_spots(sample, truth.genes)
    linear = spots.interpolate_spots(places, counts, shape)[1]
    rows = {"linear interpolation of its spots": score(truth, linear, parts)}
    known_by = files["with"]
    references = {**files, "restained-with": known_by}  # the other rows have none
    for name in [name for name in args.rows if name != "alone"]:
        file, start = references.get(name), sample
        if restained := name.startswith("restained"):
            stained = other_stain(source, work, tuple(args.stain))
            (work / "restained").mkdir(exist_ok=True)
            start, _ = accuracy.prepare_section(code, stained, work / "restained")
        runs = []
        for seed in range(args.n_seeds):
            options = ["--n-states", str(args.n_states), "--seed", str(seed * args.n_states)]
            options += [] if file is None else ["--reference", str(file)]
            made = f"{'none' if file is None else file.stem}-{seed}"
            made += "-restained" if restained else ""
            maps = maps_of(start, work, made, utils.HISTEX, options, truth.genes, shape)
            runs.append(score(truth, maps, parts))
        rows[ROWS[name]] = {part: np.mean([run[part] for run in runs], axis=0) for part in runs[0]}
    alone = parts["genes of the reference"]
    if alone and "alone" in args.rows:
        options = ["--reference", str(known_by), "--force"]
        maps = maps_of(sample, work, "alone", utils.PREDICTION, options, alone, shape)
        told = inputs.select_genes(truth, alone)
        rows[ROWS["alone"]] = score(told, maps, {"genes of the reference": alone})
    return rows


def known_genes(file: Path) -> list[str]:
    with safetensors.safe_open(file, "np") as content:
        genes: list[str] = json.loads(content.metadata()["histex"])["genes"]
    return genes


def check_apart(teachers: list[Path], scored: list[Path]) -> None:
    """A reference that was learned from a section says nothing of it."""
    if both := {path.resolve() for path in teachers} & {path.resolve() for path in scored}:
        raise utils.StageError(
            f"{min(both)} is given to --teachers and to --directory: its own truth would make its "
            f"maps.",
            "Name it once.",
        )


def main(args: argparse.Namespace) -> None:
    check_apart(args.teachers, args.directory)
    args.keep.mkdir(parents=True, exist_ok=True)
    code = accuracy.copy_code(args.keep)
    files = {"with": learned(code, args, args.keep, False)}  # tells which genes are known
    if "shuffled" in args.rows:
        files["shuffled"] = learned(code, args, args.keep, True)
    for source in args.directory:
        name = source.resolve().name
        rows = rows_of(code, source, args, files, args.keep / f"scored-{name}")
        heads = list(next(iter(rows.values())))
        shown = [
            [row, *(" / ".join(f"{r:.3f}" for r in found[h]) if h in found else "" for h in heads)]
            for row, found in rows.items()
        ]
        print("\n".join(["", *measure.table([name, *heads], shown)]))
    print("\n".join(["", *measure.origin(args.command)]))


def run(argv: list[str] | None = None) -> int:
    return measure.run_benchmark(main, SCRIPT, build_parser(), argv)


if __name__ == "__main__":
    sys.exit(run())
