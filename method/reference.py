"""A reference: what sections of known truth taught about the look of superpixels.

It is a small network from tokens to the expression of superpixels, learned where the expression of
every superpixel is known (reference/learn.py). On another section it gives each superpixel
FEATURES values that tell what such tissue expresses, and a prediction from histology alone.

Genes that it does not know get a prediction, too: the spots of the section tell which of the known
genes they go with (``passed_on``).

Letters in shapes: B patches, F token features, G genes, K genes that the reference knows, N spots,
R features of the reference.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

import utils
from method.layers import neighbourhoods
from method.network import ALL
from method.section import Section, Taught, standardised_rows, token_statistics
from reading import arrays, plain

FORMAT = "HISTEX reference 1"
NO_TEXT = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")  # control characters, halves of pairs
FEATURES = 96  # R
HIDDEN = 256
SCALES, HALO = (3, 9), 4  # superpixels: a superpixel, and its surroundings of 24 and 72 um
DROPOUT = 0.2
MOST_WEIGHT = 1e3  # then features stay within float16
MOST_RATE = 1e9  # counts per superpixel
MOST_LOG = 6.0  # of the ratio of a superpixel to its section's mean, 400-fold
MOST_SPOTS = 2500  # that tell which genes go together
LEAST_KNOWN = 0.5  # share of a section's genes; by fewer, a reference of another tissue did harm
LEAST_ROOT = 0.2  # of a gene's mean root at the spots, by which its changes are divided
EXPECTED = ("expected_r_8um", "expected_r_32um")


class Encoder(nn.Module):
    """Standardised tokens to features of superpixels, and these to expression.

    Expression is the logarithm of counts relative to the mean of the section, so that the depth of
    a section and the platform play no part.
    """

    def __init__(self, n_tokens: int, n_genes: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Dropout(DROPOUT),
            nn.Linear(n_tokens * (1 + len(SCALES)), HIDDEN),
            nn.LeakyReLU(0.1),
            nn.LayerNorm(HIDDEN),
            nn.Dropout(DROPOUT),
            nn.Linear(HIDDEN, FEATURES),
            nn.LeakyReLU(0.1),
            nn.LayerNorm(FEATURES),
        )
        self.drop = nn.Dropout(DROPOUT)
        self.head = nn.Linear(FEATURES, n_genes)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def features(self, tokens: Tensor) -> Tensor:
        """Standardised tokens (B, rows, columns, F) with the halo to (B, ..., R) without it."""
        return self.body(neighbourhoods(tokens, SCALES, HALO))

    def decode(self, features: Tensor, genes: Tensor | slice = ALL) -> Tensor:
        """Logarithms (..., G) of counts over the mean of their gene, of features (..., R)."""
        weight, bias = self.head.weight[genes], self.head.bias[genes]
        return nnf.linear(self.drop(features), weight, bias).clamp(-MOST_LOG, MOST_LOG)

    def forward(self, tokens: Tensor, genes: Tensor | slice = ALL) -> Tensor:
        """Logarithms (B, rows, columns, G) of tokens with the halo."""
        return self.decode(self.features(tokens), genes)


@dataclass(frozen=True)
class Reference:
    """A file of reference/learn.py."""

    encoder: Encoder
    genes: list[str]
    rates: np.ndarray  # (G,) mean counts per superpixel of its sections
    expected_r: dict[str, np.ndarray]  # (G,) where it was scored, at 8 and at 32 um; NaN: unknown
    facts: dict[str, Any]  # backbone, weights_sha256, sections, scores

    def taught(self, genes: list[str]) -> Taught:
        """Its prediction of the genes of a section; of those it does not know, nothing."""
        weight = np.zeros((len(genes), FEATURES), np.float32)
        bias = np.zeros(len(genes), np.float32)
        number = {gene: i for i, gene in enumerate(self.genes)}
        here = [i for i, gene in enumerate(genes) if gene in number]
        there = [number[genes[i]] for i in here]
        weight[here] = self.encoder.head.weight.detach().numpy()[there]
        bias[here] = self.encoder.head.bias.detach().numpy()[there]
        return Taught(weight, bias)

    def about(self, stage: utils.Stage, path: Path) -> dict[str, Any]:
        """For the record of a section; says if the reference was learned from this very one."""
        sections = self.facts["sections"]
        names = [section["name"] for section in sections]
        here = (utils.FEATURES.name, stage.path(utils.HE).name)
        keys = ("tokens_sha256", "image_sha256")
        own = any(
            stage.inputs[name]["sha256"] == section.get(key)
            for section in sections
            for name, key in zip(here, keys, strict=True)
        )
        if own:
            stage.warn(
                f"{path.name} was learned from this section, too: scores of its maps, against a "
                "truth or held-out spots, say nothing"
            )
        return {"file": path.name, "sections": names, "knows_this_section": own}


# ------------------------------------------------------------------------------------------------
# the file
# ------------------------------------------------------------------------------------------------
def backbone_of(stage: utils.Stage, tokens: np.ndarray) -> dict[str, str]:
    """Which network made the tokens (h, w, F) of a sample, in how many ways up, and F."""
    known = {key: stage.fact(utils.EXTRACTOR, key) for key in ("backbone", "weights_sha256")}
    if not all(isinstance(value, str) for value in known.values()):
        raise stage.error(
            stage.directory / utils.record_name(utils.EXTRACTOR),
            "does not tell which network made the tokens.",
            f"Run: {stage.command(utils.EXTRACTOR)} --force",
        )
    known |= {"turns": stage.fact(utils.EXTRACTOR, "turns") or 1, "features": tokens.shape[-1]}
    return {key: str(value) for key, value in known.items()}


def write_reference(path: Path, reference: Reference) -> None:
    tensors = dict(reference.encoder.state_dict())
    tensors |= {"rates": torch.from_numpy(reference.rates)}
    tensors |= {name: torch.from_numpy(r) for name, r in reference.expected_r.items()}
    about = json.dumps({"format": FORMAT, "genes": reference.genes, **reference.facts})
    # Not by save_file, which hides the errors of a disk in one of its own kind
    path.write_bytes(safetensors.torch.save(tensors, {"histex": about}))


def read_reference(path: Path, backbone: dict[str, str]) -> Reference:
    """The reference in a file, for tokens of this backbone."""
    remedy = "Give a file that reference/learn.py wrote: --reference FILE"
    if not path.is_file():
        raise utils.StageError(f"--reference {path} is not a file.", remedy)
    try:
        with safetensors.safe_open(path, "pt") as file:
            facts = json.loads((file.metadata() or {})["histex"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if facts.pop("format") != FORMAT:
            raise ValueError("of another format")
        genes = facts.pop("genes")
        check_genes(genes)
        n_tokens = tensors["body.1.weight"].shape[1] // (1 + len(SCALES))
        encoder = Encoder(n_tokens, len(genes))
        kept = {name: tensors.pop(name).float() for name in ("rates", *EXPECTED)}
        if any(tensor.shape != (len(genes),) for tensor in kept.values()):
            raise ValueError("genes and values differ in number")
        encoder.load_state_dict(tensors)
        facts = {**facts, "expected_from": str(facts["expected_from"])}
        facts["sections"] = [
            {**section, "name": str(section["name"])} for section in facts["sections"]
        ]
        if str(n_tokens) != facts["features"]:
            raise ValueError("weights for another number of features than it says")
        if not all((tensor.abs() <= MOST_WEIGHT).all() for tensor in encoder.state_dict().values()):
            raise ValueError("weights that are not finite, or too large")
        rates = kept["rates"]
        if not ((rates >= 0) & (rates <= MOST_RATE)).all() or not rates.any():
            raise ValueError("rates that are no counts")
        if any((kept[name].abs() > 1 + 1e-6).any() for name in EXPECTED):
            raise ValueError("correlations above 1")
    except Exception as error:  # damaged bytes can raise nearly anything
        if plain.of_system(error):
            raise
        raise utils.StageError(
            f"--reference {path} is damaged or no reference ({error!r:.200}).", remedy
        ) from error
    theirs = {key: str(facts.get(key, 1)) for key in backbone}  # before there were turns: 1
    if theirs != backbone:
        raise utils.StageError(
            f"--reference {path} was learned from tokens of {described(theirs)}; the tokens here "
            f"are of {described(backbone)}.",
            f"Run {utils.EXTRACTOR} with its --backbone and --turns, or learn a reference from "
            "sections with tokens like these: python reference/learn.py --sections DIR ... "
            "--output FILE",
        )
    expected = {name: kept[name].numpy() for name in EXPECTED}
    return Reference(encoder.eval(), genes, rates.numpy(), expected, facts)


def check_genes(genes: Any) -> None:
    """A ValueError unless they are names that can stand in a table, each once."""
    if not isinstance(genes, list) or not genes or not all(isinstance(g, str) for g in genes):
        raise ValueError("no list of genes")
    if repeated := utils.duplicates(genes):
        raise ValueError(f"the gene {repeated[0]!r:.80} twice")
    if odd := [gene for gene in genes if gene.strip() != gene or not gene or NO_TEXT.search(gene)]:
        raise ValueError(f"{odd[0]!r:.80}, which is no name of a gene")


def described(backbone: dict[str, str]) -> str:
    weights, n, turns = (backbone[key] for key in ("weights_sha256", "features", "turns"))
    return f"{backbone['backbone']} ({n} features, weights {weights[:12]}, --turns {turns})"


# ------------------------------------------------------------------------------------------------
# its features of a section
# ------------------------------------------------------------------------------------------------
def tissue_features(
    encoder: Encoder, tokens: np.ndarray, tissue: np.ndarray, device: torch.device
) -> np.ndarray:
    """Its features (M, R) float16 of the superpixels that are tissue."""
    rows = encoded_rows(encoder, tokens, tissue, device)
    return np.concatenate([part.cpu().numpy().astype(np.float16)[tissue[at]] for at, part in rows])


def encoded_rows(
    encoder: Encoder, tokens: np.ndarray, tissue: np.ndarray, device: torch.device
) -> Iterator[tuple[slice, Tensor]]:
    """Go down the map and yield (rows, features (rows, w, R)) of tokens (h, w, F)."""
    statistics, encoder = token_statistics(tokens, tissue), encoder.to(device).eval()
    with torch.inference_mode():
        for rows, x in standardised_rows(tokens, statistics, HALO, len(SCALES), device):
            yield rows, encoder.features(x)[0]


def passed_on(section: Section, train: np.ndarray) -> Taught:
    """What the reference of a section teaches, passed on to the genes that it does not know.

    Across the training spots (indices), the relative changes of such a gene are a linear function
    of those of the known genes, by ridge regression: what is taught of these, with the same
    coefficients, is taught of it. Changes A (N, K) are those of the roots of counts, twice, over
    their mean. Counting noise gives them a variance of about 1 / mean^2 = D (K,), so that
    coefficients are (A'A + N D)^-1 A' (changes of the gene). Solved as a matrix of spots.

    Nothing is passed on by a reference that knows less than LEAST_KNOWN of the genes.
    """
    if section.taught is None:
        raise ValueError("a section without a reference")
    table = np.column_stack([section.taught.weight, section.taught.bias])
    known = table.any(axis=1)
    if known.mean() < LEAST_KNOWN:
        return section.taught
    spots = np.intersect1d(train, section.drawn_spots(MOST_SPOTS))
    roots = np.sqrt(section.full_counts(spots), dtype=np.float64)
    mean = roots.mean(axis=0)
    least = np.maximum(mean, LEAST_ROOT)
    changes = 2 * (roots - mean) / least
    ours, others = changes[:, known], changes[:, ~known]
    scaled = ours * (least[known] ** 2 / len(spots))  # A D^-1 / N
    table[~known] = others.T @ np.linalg.solve(
        scaled @ ours.T + np.eye(len(spots)), scaled @ table[known]
    )
    return Taught(*(x.astype(np.float32) for x in (table[:, :-1], table[:, -1])))


def join(
    stage: utils.Stage, path: Path, section: Section, genes: list[str], device: torch.device
) -> dict[str, Any]:
    """Put the features of the reference in a file behind those of the section's tokens.

    Both lie in a file without a name, which is gone when the process ends. Returns what the record
    tells of the reference.
    """
    reference = read_reference(path, backbone_of(stage, section.tokens))
    known = len(set(genes) & set(reference.genes))
    print(
        f"{path.name}: sections it was learned from: {len(reference.facts['sections'])}; it knows "
        f"{known} of the {len(genes)} genes"
    )
    tokens, n = section.tokens, section.tokens.shape[-1]
    need = tokens.nbytes // n * (n + FEATURES)
    utils.check_disk(stage.directory, need, "the tokens with the features of the reference")
    with tempfile.TemporaryFile(dir=stage.directory) as file:
        both = np.memmap(file, np.float16, "w+", shape=(*section.tissue.shape, n + FEATURES))
    for rows, features in encoded_rows(reference.encoder, tokens, section.tissue, device):
        both[rows, :, :n] = arrays.some_rows(tokens, rows.start, rows.stop)
        both[rows, :, n:] = features.cpu().numpy()
    section.tokens = both
    section.taught = reference.taught(genes)
    return reference.about(stage, path) | {"genes_known": known}
