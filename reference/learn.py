"""Learn a reference from sections of known truth: what a superpixel expresses, by its look.

    python reference/learn.py --sections data/east data/south --output kidney.safetensors

In a section of Visium HD or Xenium the expression of every superpixel is known: its truth. In a
section of Visium only the sums over spots are. A reference carries over what sections of the first
kind show. HISTEX.py --reference uses it beside the spots of another section; reference/predict.py
makes maps without any spot, from the H&E alone. One section with a truth is enough; sections with
spots only may stand beside it.

All sections need tokens of the same network, seen in as many ways up (--turns). They need not have
the same genes: a gene is learned from the sections that have it. Tokens are standardised within
each section, and expression is relative to the mean of the section, so that its stain and depth
matter less. An image that clearly lies beside its truth, or beside its spots, is moved back first
(method/registration.py).

A small network is learned. It turns a token, with the means of its surroundings (24 and 72 um),
into 96 features, and these into the logarithm of every gene's counts. The loss is Poisson's. Of
every section with a truth, one block in six (256 um wide) trains nothing: the epoch that tells
these blocks best is kept. With two or more such sections, each is also left out as a whole, and the
others are asked for it. How well they tell it, gene by gene, is what to expect of a new section; it
is printed and kept in the file.

Reads   of every section: he.jpg, Histology_feature_map.npy, Histology_Extractor.json, mask.png;
        truth.npz (prepare/visium_hd.py, prepare/xenium.py); with a truth, if there are spots,
        locs.csv and cnts.csv for a comparison; without a truth, locs.csv, radius.txt,
        gene-names.txt, HRlocs.csv and HRcnts.npy (get_HR.py)
Writes  --output, a .safetensors file with its genes, sections and scores; learn.json, the record,
        beside it
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import utils
from reading import cli

SCRIPT = utils.LEARNING
ENDING = ".safetensors"


def build_parser() -> cli.Parser:
    parser = cli.Parser(__doc__)
    option = parser.add_argument
    option(
        "--sections",
        nargs="+",
        type=cli.sample_directory,
        required=True,
        metavar="DIR",
        help="Folders of the samples to learn from; at least one of them has a truth.npz.",
    )
    option("--output", type=Path, required=True, metavar=f"FILE{ENDING}", help="File to write.")
    option("--epochs", type=cli.positive, default=30, help="Passes over all sections.")
    option(
        "--seed",
        type=cli.not_negative,
        default=0,
        help="Random seed, of the network and of the blocks that are left out.",
    )
    option(
        "--leave-none-out",
        action="store_true",
        help="Do not leave out whole sections. That is quicker, but then what to expect is told by "
        "left-out blocks of the same sections, and a new section will do worse.",
    )
    option(
        "--allow-stale",
        action="store_true",
        help="Learn from tokens and masks even if the stage that made them is out of date.",
    )
    cli.add_device(parser)
    cli.add_shared(parser)
    parser.set_defaults(directory=Path())
    return parser


if __name__ == "__main__":
    cli.start(build_parser(), SCRIPT)  # what needs none of the slow imports below

import argparse
import copy
import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from analysis import inputs
from analysis.scores import rounded
from method import devices, reference
from method.network import seed_torch
from method.reference import Encoder, Reference
from reference import lessons
from reference.lessons import Lesson
from writing.progress import Bar

LEARNING_RATE, WEIGHT_DECAY = 1e-3, 0.01
WARMING = 0.1  # share of the steps in which the step size rises; then it falls as a cosine


def step_size(done: float) -> float:
    """By the share of the training that is done, 0 to 1."""
    if done < WARMING:
        return LEARNING_RATE * (0.05 + 0.95 * done / WARMING)
    return LEARNING_RATE * 0.5 * (1 + math.cos(math.pi * (done - WARMING) / (1 - WARMING)))


def columns_of(sections: list[Lesson], genes: list[str]) -> dict[Path, Tensor]:
    number = {gene: i for i, gene in enumerate(genes)}
    return {s.directory: torch.tensor([number[gene] for gene in s.genes]) for s in sections}


def score_left_out(
    encoder: Encoder, sections: list[Lesson], columns: dict[Path, Tensor], device: torch.device
) -> float:
    """Mean loss in the left-out blocks."""
    encoder.eval()
    total, n = 0.0, 0
    with torch.inference_mode():
        for lesson in sections:
            if lesson.truth is None:
                continue
            for step in lessons.truth_steps(lesson, lesson.left_out):
                size = int(step.counted.sum()) if step.counted is not None else 0
                if size:
                    total += size * float(lessons.loss_of(encoder, step, columns, device))
                    n += size
    return total / max(n, 1)


def learn(
    sections: list[Lesson],
    genes: list[str],
    args: argparse.Namespace,
    device: torch.device,
    what: str,
) -> Encoder:
    """The encoder of the epoch that tells the left-out blocks best; ``what`` is for the bar."""
    epochs, seed = args.epochs, args.seed
    seed_torch(seed)
    encoder = Encoder(sections[0].tokens.shape[-1], len(genes)).to(device)
    optimizer = torch.optim.AdamW(encoder.parameters(), weight_decay=WEIGHT_DECAY)
    columns, best, lowest = columns_of(sections, genes), {}, math.inf
    bar: Bar[None] = Bar((), f"epochs, {what}", epochs)
    for epoch in range(epochs):
        rng = np.random.default_rng([seed, epoch])
        steps = [lessons.steps_of(lesson, rng) for lesson in sections]
        n = sum(map(len, steps))
        encoder.train()
        for i, step in enumerate(lessons.batches(steps, rng)):
            for group in optimizer.param_groups:
                group["lr"] = step_size((epoch + i / n) / epochs)
            loss = lessons.loss_of(encoder, step, columns, device)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        found = score_left_out(encoder, sections, columns, device)
        bar.update(left_out=found)
        if not math.isfinite(found):
            raise utils.StageError(
                f"The learning diverges: in epoch {epoch + 1} the loss is not finite.",
                "See that the counts of every truth are counts of molecules per superpixel.",
            )
        if found < lowest:
            lowest, best = found, copy.deepcopy(encoder.state_dict())
    bar.close()
    encoder.load_state_dict(best)
    return encoder.eval()


# ------------------------------------------------------------------------------------------------
# what it tells of sections it does not know
# ------------------------------------------------------------------------------------------------
Scores = dict[str, dict[str, np.ndarray]]  # map -> size -> r (G,)


def score_section(
    encoder: Encoder, lesson: Lesson, genes: list[str], where: np.ndarray, device: torch.device,
    linear: lessons.Linear | None = None,
) -> tuple[list[str], Scores]:  # fmt: skip
    """The genes that the encoder knows of a section, and their r ``where`` (h, w) it is scored."""
    there = set(genes)
    known = [gene for gene in lesson.genes if gene in there]
    if lesson.truth is None or not known:
        return [], {}
    return known, lessons.correlations(encoder, lesson, genes, known, where, device, linear)


def medians(found: Scores, name: str) -> str:
    """r at both sizes as text, the median over genes."""
    if name not in found:
        return "none"
    return shown(found[name].values())


def shown(both: Iterable[np.ndarray]) -> str:
    """The medians of r at both sizes, as text."""
    return " / ".join(f"{median(r):.3f}" for r in both).replace("nan", "unknown")


def median(r: np.ndarray) -> float:
    """Over the genes (G,) for which it is known."""
    return float(np.median(r[np.isfinite(r)])) if np.isfinite(r).any() else math.nan


def leave_sections_out(
    sections: list[Lesson], args: argparse.Namespace, device: torch.device
) -> tuple[dict[str, dict[str, list[float]]], list[dict[str, Any]]]:
    """What the others tell of each section with truth: r by size and gene, and a row a section."""
    by_gene: dict[str, dict[str, list[float]]] = {size: {} for size in lessons.SIZES}
    rows: list[dict[str, Any]] = []
    if args.leave_none_out:
        return by_gene, rows
    for left_out in (lesson for lesson in sections if lesson.truth is not None):
        others = [lesson for lesson in sections if lesson is not left_out]
        if not any(lesson.truth is not None for lesson in others):
            continue
        genes, name = genes_of(others), left_out.directory.name
        encoder = learn(others, genes, args, device, f"without {name}")
        where, spots_ = left_out.tissue, lessons.Linear.of(left_out)
        known, found = score_section(encoder, left_out, genes, where, device, spots_)
        if not known:
            print(f"{name}: has no gene in common with the other sections")
            continue
        alone, linear = medians(found, "reference"), medians(found, "linear")
        print(
            f"{name}, told by the other sections: median r at 8 / 32 um {alone} (genes: "
            f"{len(known)}); linear interpolation of its own spots: {linear}"
        )
        row: dict[str, Any] = {"section": name, "genes": len(known)}
        for size in lessons.SIZES:
            for map_, r in found.items():
                row[f"{map_} {size}"] = rounded(median(r[size]))
            for gene, value in zip(known, found["reference"][size].tolist(), strict=True):
                by_gene[size].setdefault(gene, []).append(value)
        rows.append(row)
    return by_gene, rows


def genes_of(sections: list[Lesson]) -> list[str]:
    """All genes of some sections, each once, in the order of the first time."""
    return list(dict.fromkeys(gene for lesson in sections for gene in lesson.genes))


def read_lessons(args: argparse.Namespace) -> list[Lesson]:
    folders = [folder.resolve() for folder in args.sections]
    if repeated := utils.duplicates(map(str, folders)):
        raise utils.StageError(f"--sections names {repeated[0]} twice.", "Name each section once.")
    sections = []
    for folder in folders:
        if not folder.is_dir():
            found = "is a file" if folder.exists() else "does not exist"
            raise utils.StageError(
                f"--sections {folder} {found}; each must be the folder of one sample.",
                "Mend the path, then run the same command.",
            )
        own = argparse.Namespace(**{**vars(args), "directory": folder})
        stage = utils.Stage(SCRIPT, own, reads_only=True)
        sections.append(lessons.read_lesson(stage, args.seed, args.output.absolute().parent))
    return sections


def read_sections(args: argparse.Namespace) -> tuple[list[Lesson], dict[str, str]]:
    """All sections, and the network that made the tokens of them all."""
    sections = read_lessons(args)
    if all(lesson.truth is None for lesson in sections):
        raise utils.StageError(
            f"None of the --sections has a {inputs.TRUTH}; at least one must have: spots alone do "
            f"not teach how superpixels differ.",
            "Add a section of Visium HD or Xenium: prepare/visium_hd.py or prepare/xenium.py "
            "writes its truth.",
        )
    backbones = [reference.backbone_of(lesson.stage, lesson.tokens) for lesson in sections]
    for lesson, backbone in zip(sections, backbones, strict=True):
        if backbone != backbones[0]:
            raise utils.StageError(
                f"The tokens of {lesson.directory} are made by {reference.described(backbone)}, "
                f"those of {sections[0].directory} by {reference.described(backbones[0])}.",
                f"Run {utils.EXTRACTOR} with the same --backbone and --turns on all sections.",
            )
    return sections, backbones[0]


def expected_of(
    encoder: Encoder,
    sections: list[Lesson],
    genes: list[str],
    by_gene: dict[str, dict[str, list[float]]],
    device: torch.device,
) -> tuple[dict[str, np.ndarray], str]:
    """The r (G,) to expect of every gene on a new section, by size, and what it rests on.

    The mean over the sections that were left out as a whole; without any, over the left-out blocks.
    """
    basis = "sections left out"
    if not any(by_gene.values()):
        basis = "left-out blocks of the same sections"
        for lesson in sections:
            known, found = score_section(encoder, lesson, genes, lesson.left_out, device)
            for size in lessons.SIZES if known else ():
                for gene, r in zip(known, found["reference"][size].tolist(), strict=True):
                    by_gene[size].setdefault(gene, []).append(r)
    expected = {}
    for name, size in zip(reference.EXPECTED, lessons.SIZES, strict=True):
        finite = [[r for r in by_gene[size].get(gene, []) if math.isfinite(r)] for gene in genes]
        means = [np.mean(r) if r else np.nan for r in finite]
        expected[name] = np.array(means, np.float32)
    return expected, basis


def rates_of(sections: list[Lesson], genes: list[str]) -> np.ndarray:
    """Mean counts per superpixel (G,), over the sections that have the gene."""
    found: dict[str, list[float]] = {gene: [] for gene in genes}
    for lesson in sections:
        for gene, mean in zip(lesson.genes, lesson.mean.tolist(), strict=True):
            found[gene].append(mean)
    return np.array([np.mean(found[gene]) for gene in genes], np.float32)


def described(lesson: Lesson) -> dict[str, Any]:
    """What the reference tells of a section it was learned from."""
    facts: dict[str, Any] = {"name": lesson.directory.name, "genes": len(lesson.genes)}
    facts["image_beside"] = lesson.beside
    read = lesson.stage.inputs
    facts["tokens_sha256"] = read[utils.FEATURES.name]["sha256"]
    facts["image_sha256"] = read[lesson.stage.path(utils.HE).name]["sha256"]
    if lesson.spots is not None:
        return facts | {"spots": int(lesson.spots.usable.sum())}
    return facts | {"superpixels": int(lesson.tissue.sum()), "left_out": int(lesson.left_out.sum())}


def main(stage: utils.Stage) -> None:
    args = stage.args
    if args.output.suffix != ENDING:
        raise utils.StageError(
            f"--output {args.output} does not end in {ENDING}.", f"Name it FILE{ENDING}."
        )
    if args.output.is_dir():
        raise utils.StageError(f"--output {args.output} is a folder.", f"Name a FILE{ENDING}.")
    artifact = utils.Artifact((args.output.name,), SCRIPT, "a reference")
    stage.keeps_others = True  # the other references of this folder
    stage.guard(artifact)
    sections, backbone = read_sections(args)
    for lesson in sections:
        for name, known in lesson.stage.inputs.items():
            stage.use(lesson.directory / name, known)
    genes, device = genes_of(sections), devices.resolve_device(args.device)
    taught = [described(lesson) for lesson in sections]
    for facts in taught:
        what = "spots" if "spots" in facts else "superpixels"
        print(f"{facts['name']}: {facts[what]} {what} x {facts['genes']} genes")
    if repeated := utils.duplicates(facts["image_sha256"] for facts in taught):
        same = [facts["name"] for facts in taught if facts["image_sha256"] in repeated]
        stage.warn(
            f"{utils.some(same)} have the same image: what one tells of another is not what to "
            f"expect of a new section"
        )
    by_gene, rows = leave_sections_out(sections, args, device)
    encoder = learn(sections, genes, args, device, "all sections").cpu()
    expected, basis = expected_of(encoder, sections, genes, by_gene, torch.device("cpu"))
    print(
        f"{len(genes)} genes; median r to expect of a new section at 8 / 32 um: "
        f"{shown(expected.values())} (by {basis})"
    )
    facts = {**backbone, "sections": taught, "expected_from": basis, "left_out": rows}
    learned = Reference(encoder, genes, rates_of(sections, genes), expected, facts)
    with stage.writing(artifact) as partial:
        reference.write_reference(partial, learned)
    stage.finish(**facts, genes=len(genes))


def run(argv: list[str] | None = None) -> int:
    return cli.run_stage(main, SCRIPT, build_parser(), argv)


if __name__ == "__main__":
    sys.exit(run())
