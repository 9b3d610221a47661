"""How exactly method/registration.py finds an image that was moved on purpose, and what it brings.

    python benchmarks/registration.py --directory data/section --moves 0,0 16,-8 --keep results
    python benchmarks/registration.py --simulated 2 --moves 12,12 --n-states 0 --keep results

Reads   samples with a truth.npz, as benchmarks/accuracy.py does, and simulated ones
Writes  a table in Markdown to stdout, a row for each section and move; samples in --keep

A move is um down and right. The tokens are moved over the spots by as much, which stands for an
image that lies beside them; spots, counts and truth stay. The table has the place that is found,
with its standard deviation, less that found without a move, as a section may be off by itself. Then
--n-states networks are trained twice, with and without registration, and the maps of both are
scored: median over genes of r with the truth at 8 and 32 um. --shuffles times the spots' counts are
shuffled among them, so that the image tells nothing: how often is a place clear that cannot be?
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import utils
from benchmarks.measure import add_sections
from reading import cli


def move(text: str) -> tuple[float, float]:
    down, right = map(float, text.split(","))
    return down, right


def build_parser() -> cli.Parser:
    parser = cli.Parser(__doc__)
    add_sections(parser)
    option = parser.add_argument
    option("--moves", nargs="+", type=move, default=[(0.0, 0.0)], metavar="DOWN,RIGHT",
           help="Moves of the image, um; one upwards is given as --moves=-8,0.")  # fmt: skip
    option("--n-states", type=cli.not_negative, default=1, help="Networks trained; 0: none.")
    parser.alias("--states", "--n-states")
    option("--shuffles", type=cli.not_negative, default=0, help="Shuffles of the counts.")
    option("--keep", type=Path, required=True, help="Folder for samples.")
    return parser


if __name__ == "__main__":
    cli.start(build_parser())  # what needs none of the slow imports below

import contextlib
import io
import shutil

import numpy as np

import HISTEX
from benchmarks import ablations, accuracy
from method import registration
from method.registration import Offset
from method.section import Section, read_section

DEFAULT = HISTEX.PRESETS["default"]


def read(sample: Path) -> Section:
    stage = utils.Stage(HISTEX.SCRIPT, argparse.Namespace(directory=sample, allow_stale=False))
    with contextlib.redirect_stdout(io.StringIO()):
        return read_section(stage, DEFAULT.context, DEFAULT.by_area)[0]


def find(sample: Path) -> Offset:
    found = registration.find_offset(read(sample))
    if found is None:
        raise utils.StageError(f"{sample} has too few spots to tell.", "Leave it out.")
    return found


def moved_sample(sample: Path, um: tuple[float, float]) -> Path:
    """A copy of the sample whose tokens lie ``um`` down and right of where they are."""
    copy = sample.with_name(f"{sample.name}-{um[0]:g}-{um[1]:g}")
    if not copy.exists():
        partial = copy.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(sample, partial)
        path = partial / utils.FEATURES.name
        tokens = np.load(path, allow_pickle=False)
        everywhere = np.ones(tokens.shape[:2], bool)
        place = -np.array(um) / utils.SUPERPIXEL_UM
        np.save(path, registration.move(tokens, everywhere, place, np.empty_like(tokens)))
        partial.rename(copy)
    return copy


def words(found: Offset, start: np.ndarray) -> str:
    """Place and standard deviation in um, and whether it is undone."""
    down, right = (found.place - start) * utils.SUPERPIXEL_UM
    sd_down, sd_right = found.sd * utils.SUPERPIXEL_UM
    undone = "yes" if found.undone else "no"
    return f"{down:.1f} ± {sd_down:.1f}, {right:.1f} ± {sd_right:.1f} | {undone}"


def shuffled(section: Section, n: int) -> str:
    """How many of n shuffles of the counts among the spots are clear."""
    counts, rng = section.counts, np.random.default_rng(0)
    found = []
    for _ in range(n):
        section.counts = counts[rng.permutation(len(counts))]
        found.append(registration.find_offset(section))
    clear = sum(offset is not None and offset.clear for offset in found)
    gain, told = (max(getattr(x, of) for x in found if x) for of in ("gain", "told"))
    return (
        f"{clear} of {n} shuffles are clear; of log likelihood, the best move gains {gain:.1f} at "
        f"most over the place, the image {told:.1f} over none"
    )


def main(args: argparse.Namespace) -> None:
    accuracy.check(args)
    code = accuracy.copy_code(args.keep)
    print("| section | moved by, um | found, um | undone | r without | r with |")
    print("|---" * 6 + "|")
    for name, source in accuracy.sections_of(args, args.keep).items():
        sample, truth = ablations.prepared(code, source, args.keep / name)
        itself = find(sample)
        for um in args.moves:
            copy = moved_sample(sample, um)
            found = find(copy)
            start = itself.place if any(um) else np.zeros(2)
            cells = []
            for row in (ablations.ROWS["no registration"], DEFAULT):
                if args.n_states:
                    scores = ablations.run_variant(copy, truth, row, args.n_states, 0)
                    cells.append(" / ".join(f"{scores[key]:.3f}" for key in ablations.BINS))
            line = f"| {name} | {um[0]:g}, {um[1]:g} | {words(found, start)} |"
            print(line, " | ".join(cells or ["", ""]), "|", flush=True)
        if args.shuffles:
            print(f"{name}: {shuffled(read(sample), args.shuffles)}", file=sys.stderr, flush=True)


def run(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    return cli.exit_code(lambda: main(args), args.keep, "samples that are finished are kept")


if __name__ == "__main__":
    sys.exit(run())
