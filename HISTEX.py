"""Train HISTEX on the spots of one section and write a super-resolved map of every gene.

    python HISTEX.py --directory data/section --epochs 500 --n-states 5
    torchrun --nproc-per-node 2 HISTEX.py --directory data/section     # states on two cards at once

Reads   HRlocs.csv, HRcnts.npy, gene-names.txt (get_HR.py), Histology_feature_map.npy
        (Histology_Extractor.py), mask.png (masking_non_tissue.py, or your own), and he.jpg,
        locs.csv, radius.txt (image_calibration.py)
Writes  states/NN/               the trained networks, each with its training history
        cnts-super/              a map a gene, float32 (rows, columns), counts per superpixel of
                                 8 um, NaN outside the tissue; index.csv tells the file of a gene
        embeddings-gene.pickle   dict(cls=float32 (D, rows, columns)): latent maps of one state
        cnts-super-sd/           with --uncertainty: the standard deviation of every map
        held-out-r.csv           how well each gene was predicted in spots the network never saw
        cnts-super-plots/        pictures of the genes with the highest held-out correlation

The network gives each superpixel an expression from two sources: the histology around it (tokens of
a foundation model) and the expression measured around it (HR points). The two inform each other by
bidirectional cross-attention. Only sums are observed: the counts of a spot are the sum over the
superpixels of its disc (multiple-instance learning). ``--n-states`` networks are trained, each from
another start and without another tenth of the spots; the map is made from their median.

A preset is a row of PRESETS below: a network, what it sees, and how it is trained. To add one,
write a subclass of method.network.Network and a row. ``published`` is the published method, for
comparison; ``default`` departs from it:

* A spot's own measurement is left out of its context in training, as are the spots that the state
  holds out; else the network learns to copy and to ignore the histology.
* The output is a factor on the expression interpolated between HR points, so that a map stays tied
  to the spots. Each gene learns how far to trust its neighbourhood and how far to begin at the mean
  of the section. Tokens are standardised and seen at three scales; layers have norms and non-linear
  functions; attention is scaled by the width of a head.
* The loss compares square roots, whose counting noise is the same for rich and poor genes.
* Against overfitting to a few hundred spots, tokens and context are hidden in part (dropout),
  weights decay, and what is kept is the moving average of the weights over the last steps.
* Discs are weighted by area and tissue, and training sees their superpixels only. The step size
  falls to zero within a few epochs; training stops before when held-out spots stop improving.
* An image that clearly lies beside the spots, as these tell, is moved back before training.
* Patches overlap and are blended in prediction, so that no seam shows.
* Three tenths of the map, in logarithms, are those of a linear model (method/linear.py). It errs in
  other ways than the networks, and tells them how much single tokens and their means weigh.
* At the end the maps are anchored: scaled so that the discs of the spots sum to about what was
  measured.

Both pair a spot with the HR points around its own place (the published code mixes up indices),
shuffle the spots, and show the tissue only.

Letters in shapes: B spots or patches, T superpixels of a patch, K HR points of its context,
G genes, F token features, D width, L latent values, N spots, M held-out spots, P HR points.
"""

from __future__ import annotations

import sys

import utils
from method import options
from reading import cli

SCRIPT = utils.HISTEX

if __name__ == "__main__":
    cli.start(options.parser(__doc__), SCRIPT)  # what needs none of the slow imports below

import argparse
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from method import (  # isort: skip
    devices, linear, maps, prediction, reference, registration, resume, states, uncertainty,
)  # fmt: skip
from method.attention import HEADS, WIDTH, BidirectionalAttention
from method.errors import Errors, growth
from method.layers import FeatureDropout, neighbourhoods
from method.network import ALL, Inputs, Network, Spots, disc_sums, seed_torch
from method.progress import Progress
from method.section import Section, read_section, split_spots
from writing.progress import Bar


# ------------------------------------------------------------------------------------------------
# the networks
# ------------------------------------------------------------------------------------------------
class DefaultNetwork(Network):
    """Counts per superpixel: the interpolated expression times a factor that the network learns."""

    scales: tuple[int, ...] = linear.SCALES  # superpixels, of the neighbourhoods that are seen
    halo = linear.HALO  # superpixels, half of the largest scale
    latent_size = 2 * WIDTH
    interpolates = counts_alike = True
    dropout = 0.5  # of token features, and of the features that the last layer reads
    context_dropout = 0.3  # of the genes of an HR point
    quick: ClassVar[tuple[str, ...]] = ("trust",)
    floor = 0.05  # of the section's mean, added to the interpolated counts: a zero has no logarithm
    max_log_factor = 4.0  # the network may change the base 55-fold, not more
    anscombe = 0.375  # sqrt(count + 3/8) has a variance of 1/4 whatever the count (Anscombe 1948)

    token_mean: Tensor  # (F,)
    token_std: Tensor  # (F,)
    view_weights: Tensor  # (3 F,)
    root_scale: Tensor  # (G,)
    mean: Tensor  # (G,) counts per superpixel
    disc_area: Tensor  # of a spot, in superpixels
    spacing: Tensor  # of the HR points, in superpixels

    def __init__(self, section: Section, train: np.ndarray) -> None:
        super().__init__(section, train)
        n_features, n_genes = section.tokens.shape[-1], section.counts.shape[1]
        scale = (WIDTH // HEADS) ** -0.5
        self.embed_tokens = nn.Sequential(
            FeatureDropout(self.dropout),
            nn.Linear(n_features * (1 + len(self.scales)), WIDTH),
            nn.LeakyReLU(0.1),
            nn.LayerNorm(WIDTH),
        )
        self.embed_roots = nn.Sequential(
            nn.Dropout(self.context_dropout), nn.Linear(n_genes, WIDTH)
        )
        self.embed_place = nn.Sequential(nn.Linear(3, 32), nn.LeakyReLU(0.1), nn.Linear(32, WIDTH))
        self.blocks = nn.ModuleList(BidirectionalAttention(WIDTH, WIDTH, scale) for _ in range(2))
        self.token_norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.expression_norm = nn.LayerNorm(WIDTH)
        self.from_histology = nn.Sequential(
            nn.Linear(WIDTH, WIDTH), nn.LeakyReLU(0.1), nn.Dropout(self.dropout)
        )
        self.log_factor = nn.Linear(DefaultNetwork.latent_size, n_genes)
        nn.init.zeros_(self.log_factor.weight)  # start from the base
        nn.init.zeros_(self.log_factor.bias)
        self.trust = nn.Parameter(torch.zeros(n_genes))  # before the sigmoid: starts at one half
        self.log_power = nn.Parameter(torch.tensor(math.log(1.5)))  # of the inverse distance
        for name, values in zip(("token_mean", "token_std"), section.token_statistics, strict=True):
            self.register_buffer(name, torch.from_numpy(values))
        steps = torch.linspace(1, -1, 1 + len(self.scales)).repeat_interleave(n_features)
        self.register_buffer("view_weights", torch.exp(section.fineness * steps))
        rate = section.counts[train].mean(axis=0)
        disc_area = math.pi * section.radius**2
        mean = rate.clip(min=0.5 / len(train)) / disc_area  # of a gene without a count: half a one
        self.register_buffer("root_scale", torch.from_numpy(1 / np.sqrt(rate + 1)))
        self.register_buffer("mean", torch.from_numpy(mean))
        self.register_buffer("disc_area", torch.tensor(disc_area))
        self.register_buffer("spacing", torch.tensor(section.spacing))

    def views(self, tokens: Tensor) -> Tensor:
        """Standardised tokens and the means of their neighbourhoods: (B, rows, columns, 3 F).

        Without the halo, that is, with 2 * halo rows and columns less than ``tokens``.
        """
        x = (tokens - self.token_mean).div_(self.token_std)
        return neighbourhoods(x, self.scales, self.halo)

    def embed_histology(self, views: Tensor) -> Tensor:
        """(..., 3 F) -> (..., D)."""
        return self.embed_tokens(views * self.view_weights)

    def embed_expression(self, expression: Tensor) -> Tensor:
        """(..., G) -> (..., D)."""
        return self.embed_roots(expression.sqrt() * self.root_scale)

    def fuse(self, histology: Tensor, context: Tensor, offsets: Tensor) -> Tensor:
        """Latent values (B, T, L), of which the first D are the embedding of the maps.

        From histology (B, T, D), the embedded expression of the context (B, K, D), and offsets
        (B, K, 2) from its HR points to the middle of the patch.
        """
        offsets = offsets / self.spacing
        place = torch.cat([offsets, offsets.norm(dim=-1, keepdim=True)], dim=-1)
        context = self.expression_norm(context + self.embed_place(place))
        x = histology
        for norm, block in zip(self.token_norms, self.blocks, strict=True):
            x = x + block(norm(x), context)
        return torch.cat([nnf.leaky_relu(x, 0.1), self.from_histology(histology)], dim=-1)

    def interpolation(self, distance2: Tensor) -> Tensor:
        """Shares (..., K) of a superpixel in the counts of HR points at these squared distances.

        By inverse distance, softened by one superpixel. It has no scale, so that it works alike
        between dense HR points and across the hole of a left-out spot.
        """
        logits = -self.log_power.exp() * torch.log(distance2 + 1)
        return logits.softmax(dim=-1) / self.disc_area

    def decode(self, latent: Tensor, interpolated: Tensor, genes: slice = ALL) -> Tensor:
        """Logarithm of the counts per superpixel (..., G): that of a factor on the base.

        The base is mean^(1 - a) interpolated^a, with an a between 0 and 1 that each gene learns.
        """
        factor = nnf.linear(latent, self.log_factor.weight[genes], self.log_factor.bias[genes])
        factor.clamp_(-self.max_log_factor, self.max_log_factor)
        mean, trust = self.mean[genes], self.trust[genes].sigmoid()
        log_mean = (mean * (1 + self.floor)).log()  # of what is at the mean, floor and all
        log_base = (interpolated + self.floor * mean).log_()
        return factor.add_(mean.log() - trust * log_mean).addcmul_(trust, log_base)

    def to_counts(self, output: Tensor, genes: slice = ALL) -> Tensor:
        return output.exp()

    def loss(self, output: Tensor, areas: Tensor, counts: Tensor) -> Tensor:
        """Squared error of the square roots of the disc's sum and the counts, (B, G)."""
        total = disc_sums(self.to_counts(output), areas)
        return ((total + self.anscombe).sqrt() - (counts + self.anscombe).sqrt()).square()


class TaughtNetwork(DefaultNetwork):
    """The default with a reference, whose features are the last of every token.

    The network takes them in like the others. Beyond that, the reference predicts the genes that it
    knows, and by these the others; each gene learns how far to follow it.
    """

    quick: ClassVar[tuple[str, ...]] = ("trust", "belief")
    latent_size = DefaultNetwork.latent_size + reference.FEATURES
    taught_weight: Tensor  # (G, R)
    taught_bias: Tensor  # (G,)

    def __init__(self, section: Section, train: np.ndarray) -> None:
        super().__init__(section, train)
        taught = reference.passed_on(section, train)
        self.belief = nn.Parameter(torch.zeros(section.counts.shape[1]))
        self.register_buffer("taught_weight", torch.from_numpy(taught.weight))
        self.register_buffer("taught_bias", torch.from_numpy(taught.bias))

    def embed_histology(self, views: Tensor) -> Tensor:
        """(..., 3 (F + R)) -> (..., D + R): the reference's features as they are."""
        last = slice(len(self.token_mean) - reference.FEATURES, len(self.token_mean))
        features = views[..., last] * self.token_std[last] + self.token_mean[last]
        return torch.cat([super().embed_histology(views), features], dim=-1)

    def fuse(self, histology: Tensor, context: Tensor, offsets: Tensor) -> Tensor:
        latent = super().fuse(histology[..., :WIDTH], context, offsets)
        return torch.cat([latent, histology[..., WIDTH:]], dim=-1)

    def decode(self, latent: Tensor, interpolated: Tensor, genes: slice = ALL) -> Tensor:
        own, features = latent.split([DefaultNetwork.latent_size, reference.FEATURES], dim=-1)
        told = nnf.linear(features, self.taught_weight[genes], self.taught_bias[genes])
        told = told.clamp(-reference.MOST_LOG, reference.MOST_LOG)
        return super().decode(own, interpolated, genes).addcmul_(self.belief[genes], told)


class PublishedAffine(nn.Module):
    """x W + 0.01: no bias, no non-linearity; W is (in, out) and starts in +-1 / sqrt(out)."""

    beta = 0.01  # added after every affine layer

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        bound = n_out**-0.5
        self.weight = nn.Parameter(torch.empty(n_in, n_out).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.beta


class PublishedNetwork(Network):
    """The published arithmetic: tokens and HR counts (B, K, G) to scaled counts (B, T, G).

    Its attention divides by the square root of the number of heads, and its head is one affine map.
    Beside the pairing, order and mask (above), the run departs from the published code in this:
    places of spots, HR points and blocks are not rounded, the border's tokens are repeated (there:
    zeros), no colour and position channels come with the tokens, embeddings are those of one state
    (there: the median), and batches are of about equal size (there: the last is what is left).
    """

    sizes = (1024, 512, 512, 512)  # of the head
    latent_size = WIDTH + sizes[-1]
    alpha = 0.01  # of the last ELU
    spot_min: Tensor  # (G,), and so are the next three
    spot_range: Tensor
    hr_min: Tensor
    hr_range: Tensor
    disc_size: Tensor  # superpixels in the disc of a spot

    def __init__(self, section: Section, train: np.ndarray) -> None:
        super().__init__(section, train)
        n_features, n_genes = section.tokens.shape[-1], section.counts.shape[1]
        scale = HEADS**-0.5
        self.block1 = BidirectionalAttention(n_features, n_genes, scale)
        self.affine1 = PublishedAffine(WIDTH, WIDTH)
        self.block2 = BidirectionalAttention(WIDTH, n_genes, scale)
        self.affine2 = PublishedAffine(WIDTH, WIDTH)
        sizes = (WIDTH + n_features, *self.sizes)
        self.head = nn.Sequential(*map(PublishedAffine, sizes[:-1], sizes[1:]))
        self.out = PublishedAffine(sizes[-1], n_genes)
        for name, counts in (("spot", section.counts[train]), ("hr", section.expression)):
            low, high = counts.min(axis=0), counts.max(axis=0)
            self.register_buffer(f"{name}_min", torch.from_numpy(low))
            self.register_buffer(f"{name}_range", torch.from_numpy(high - low))
        self.register_buffer("disc_size", torch.tensor(section.areas[0].sum()))

    def embed_expression(self, expression: Tensor) -> Tensor:
        return (expression - self.hr_min) / torch.where(self.hr_range > 0, self.hr_range, 1)

    def fuse(self, histology: Tensor, context: Tensor, offsets: Tensor) -> Tensor:
        x = self.block1(histology, context)
        x = self.affine1(x) + x
        x = self.block2(x, context)
        x = self.affine2(x) + x
        return torch.cat([x, self.head(torch.cat([x, histology], dim=-1))], dim=-1)

    def decode(self, latent: Tensor, interpolated: Tensor, genes: slice = ALL) -> Tensor:
        hidden = latent[..., WIDTH:] @ self.out.weight[:, genes]
        return nnf.elu(hidden, alpha=self.alpha) + PublishedAffine.beta

    def loss(self, output: Tensor, areas: Tensor, counts: Tensor) -> Tensor:
        """Squared error of the mean over the disc against the scaled counts, (B, G)."""
        mean = disc_sums(output, areas) / areas.sum(dim=1, keepdim=True)
        span = torch.where(self.spot_range > 0, self.spot_range, 1)
        return (mean - (counts - self.spot_min) / span).square()

    def to_counts(self, output: Tensor, genes: slice = ALL) -> Tensor:
        low, span = self.spot_min[genes], self.spot_range[genes]
        return output * (span / self.disc_size) + low / self.disc_size


# ------------------------------------------------------------------------------------------------
# the presets
# ------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Preset:
    """A network, what it is given, and how it is trained and used."""

    network: type[Network]
    with_reference: type[Network] | None = None  # the network that takes one; None: there is none
    context: int = 16  # HR points a patch sees; 12 ring the hole of a spot on a hexagonal lattice
    by_area: bool = True  # discs weighted by area and tissue; else counted in whole superpixels
    holds_out: bool = True  # each state leaves out a tenth of the spots, and a spot's own context
    overlap: bool = True  # patches overlap in prediction and are blended; else side by side
    anchor_prior: float | None = 5.0  # counts; None: maps are not anchored to the spots
    linear_share: float = 0.3  # of the linear model in the maps; 0: they are those of the networks
    registers: bool = True  # an image that clearly lies beside the spots is moved back
    weighs_scales: bool = True  # single tokens and their means, as the spots tell; else alike
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW
    weight_decay: float = 1.0
    learning_rate: float = 2e-3
    batch_size: int = 8  # spots a training step, at most
    min_steps: int = 1  # of an epoch: batches of few spots are smaller
    averaging: float | None = 0.99  # a step, decay of the moving average of weights; None: none
    annealing: int | None = 14  # epochs over which the step size falls to 0; None: it stays
    patience: int = 5  # epochs without gain on held-out spots after which training stops


PRESETS = {
    "default": Preset(DefaultNetwork, TaughtNetwork),
    "published": Preset(
        PublishedNetwork,
        context=5,
        by_area=False,
        holds_out=False,
        overlap=False,
        anchor_prior=None,
        linear_share=0.0,
        registers=False,
        weighs_scales=False,
        optimizer=torch.optim.Adam,
        weight_decay=0.0,
        learning_rate=1e-4,
        batch_size=32,
        min_steps=16,
        averaging=None,
        annealing=None,
    ),
}


# ------------------------------------------------------------------------------------------------
# training a state
# ------------------------------------------------------------------------------------------------
CHECKPOINT_SECONDS = 30.0
FEWEST_STEPS = 200  # over which the step size falls, also where an epoch has a few steps only
QUICK = 10.0  # step size of a network's quick parameters, in those of the others
SCORED_AT_ONCE = 16  # held-out spots
MOST_THREADS = 8  # of a CPU: training takes longer with more (docs/hardware.md)


@dataclass(frozen=True)
class Training:
    """All that decides the weights of a state, beside its inputs, its number and the code."""

    preset: Preset
    epochs: int = 500  # at most
    seed: int = 0  # state i is trained with seed + i
    batch_size: int | None = None  # None: the preset's
    learning_rate: float | None = None  # None: the preset's

    def start(self, network: Network, n_steps: int) -> Progress:
        preset, rate = self.preset, self.learning_rate or self.preset.learning_rate
        slow: dict[str, Any] = {"params": [], "weight_decay": preset.weight_decay, "lr": rate}
        quick: dict[str, Any] = {"params": [], "weight_decay": 0.0, "lr": QUICK * rate}
        for name, parameter in network.named_parameters():
            (quick if name in network.quick else slow)["params"].append(parameter)
        groups, options = [slow, quick] if quick["params"] else [slow], {"fused": True}
        if slow["params"][0].is_cuda and network.repeats:
            options["capturable"] = True
            for group in groups:  # a recording would keep a number as it is
                group["lr"] = torch.tensor(group["lr"], device=slow["params"][0].device)
        optimizer = preset.optimizer(groups, **options)
        return Progress(network, optimizer, preset.averaging, n_steps if preset.annealing else None)

    def length(self, n_spots: int) -> tuple[int, int]:
        """Epochs at most, and the steps of each."""
        most = min(self.preset.batch_size, n_spots // self.preset.min_steps)
        n_steps = max(1, round(n_spots / (self.batch_size or max(1, most))))
        wanted = max(self.preset.annealing or self.epochs, math.ceil(FEWEST_STEPS / n_steps))
        return min(self.epochs, wanted), n_steps


def train_epoch(progress: Progress, batches: Iterable[Inputs], device: torch.device) -> float:
    """One pass over batches of training spots; returns the mean loss."""
    total, n_spots = torch.zeros((), device=device), 0
    progress.network.train()
    for inputs in batches:
        loss = progress.learn(inputs)
        n_spots += len(inputs.counts)
        total += loss * len(inputs.counts)  # read once an epoch: a card need not wait
    return float(total) / n_spots


def score_held_out(network: Network, spots: Spots) -> tuple[np.ndarray, np.ndarray]:
    """Loss (M,) and predicted counts (M, G) of the held-out spots."""
    network.eval()
    losses, predicted, held_out = [], [], spots.split.held_out
    with torch.inference_mode():
        for inputs in spots.batches(held_out, math.ceil(len(held_out) / SCORED_AT_ONCE)):
            output = network.see(*inputs[:4])
            losses.append(network.loss(output, inputs.areas, inputs.counts).mean(dim=1))
            predicted.append(disc_sums(network.to_counts(output), inputs.areas))
    return torch.cat(losses).cpu().numpy(), torch.cat(predicted).cpu().numpy()


def one_epoch(progress: Progress, spots: Spots, training: Training, index: int) -> dict[str, float]:
    """Train and score one epoch of state ``index``; returns its row of the history."""
    epoch = len(progress.history) + 1
    # Seeded by the epoch, not by what came before: a resumed run draws the same numbers.
    seed_torch(training.seed + index, epoch)
    order = np.random.default_rng([training.seed + index, epoch]).permutation(spots.split.train)
    rate = float(progress.optimizer.param_groups[0]["lr"])
    batches = spots.batches(order, training.length(len(order))[1])
    loss = train_epoch(progress, batches, spots.device)
    row = {"epoch": epoch, "train_loss": loss, "learning_rate": rate}
    if len(spots.split.held_out):
        losses, predicted = score_held_out(progress.kept, spots)
        row["held_out_loss"] = float(losses.mean())
        progress.selection.consider(epoch, losses, predicted, progress.kept)
    weights = nn.utils.parameters_to_vector(progress.kept.parameters())
    if not all(map(math.isfinite, (*row.values(), weights.sum().item()))):
        raise utils.StageError(
            f"The training of state {index} diverges: in epoch {epoch}, with the learning rate "
            f"{rate:g}, its loss is not finite.",
            "Run the same command with a smaller one: --learning-rate NUMBER",
        )
    progress.history.append(row)
    return row


def train_state(
    section: Section,
    folder: Path,
    training: Training,
    key: states.Key,
    index: int,
    device: torch.device,
) -> states.State:
    """Train state ``index``, go on where a run with the same key was cut off, or reuse its result.

    ``folder`` receives history.csv, held-out.npy, model.safetensors and, as the last, model.json.
    """
    checkpoint = states.Checkpoint(folder, key)
    split = split_spots(section, training.preset.holds_out, training.seed, index)
    torch.manual_seed(training.seed + index)
    network = training.preset.network(section, split.train).to(device)
    shape = (len(split.held_out), section.counts.shape[1])
    if (predicted := states.read_state(folder, key, network, shape)) is not None:
        print(f"state {index}: taken from {folder.name}, nothing it was trained on has changed")
        checkpoint.remove()  # of a run that was cut off just before it did
        return states.State(network, split, predicted)

    n_epochs, n_steps = training.length(len(split.train))
    spots = Spots(network, section, split, device)
    progress = training.start(network, n_epochs * n_steps)
    if (saved := checkpoint.read()) is not None:
        progress.restore(saved)
        print(f"state {index}: goes on after epoch {len(progress.history)}")
    elif changed := key.change_since(folder):
        print(f"state {index}: trained anew, since {changed}")

    saved_at, n_done = 0.0, len(progress.history)
    bar: Bar[None] = Bar((), f"epochs of state {index}", n_epochs, n_done)
    while n_done < n_epochs and not (
        len(split.held_out) and n_done - progress.selection.epoch >= training.preset.patience
    ):
        try:
            row = one_epoch(progress, spots, training, index)
        except utils.StageError:
            checkpoint.remove()
            raise
        n_done += 1
        bar.update(**{name: value for name, value in row.items() if "loss" in name})
        if time.monotonic() - saved_at > CHECKPOINT_SECONDS:
            checkpoint.write(progress.content())
            saved_at = time.monotonic()
    bar.close()

    predicted = np.empty(shape, np.float32)
    if len(split.held_out):
        network.load_state_dict(progress.selection.weights)
        predicted = progress.selection.predicted()
    epoch = progress.selection.epoch or n_done
    states.write_state(folder, network, progress.history, predicted, key, epoch)
    checkpoint.remove()
    return states.State(network, split, predicted)


def train_states(
    section: Section,
    folder: Path,
    training: Training,
    key: states.Key,
    n_states: int,
    ranks: devices.Ranks,
    device: torch.device,
) -> list[states.State]:
    """All states. Of several processes, each trains its share; those of the others it reads."""

    def train(index: int) -> states.State:
        return train_state(section, folder / f"{index:02d}", training, key, index, device)

    trained = {index: train(index) for index in ranks.share(range(n_states))}
    ranks.barrier()
    return [trained[index] if index in trained else train(index) for index in range(n_states)]


# ------------------------------------------------------------------------------------------------
# the story of a run
# ------------------------------------------------------------------------------------------------
INPUTS = (
    utils.HE, utils.LOCS, utils.RADIUS, utils.GENE_NAMES, utils.HR_LOCS, utils.HR_CNTS,
    utils.FEATURES, utils.MASK,
)  # fmt: skip
OUTPUTS = (
    utils.MAPS, utils.SPREAD, utils.EMBEDDINGS, utils.PLOTS, utils.HELD_OUT, utils.EXPECTED,
)  # fmt: skip
TRAINS = ("HISTEX.py", *(f"method/{name}.py" for name in (
    "attention", "grid", "layers", "linear", "network", "progress", "reference", "registration",
    "section",
)))  # fmt: skip
STATE_CODE = [utils.ROOT / file for file in TRAINS]  # a change in these trains states anew


def find_preset(args: argparse.Namespace) -> Preset:
    name = args.preset
    if name not in PRESETS:
        raise utils.StageError(
            f"--preset {name}: there is no such preset.", f"Choose one of {', '.join(PRESETS)}."
        )
    if args.uncertainty and not PRESETS[name].holds_out:
        raise utils.StageError(
            f"--uncertainty is calibrated on held-out spots, and the {name} preset has none.",
            f"Leave out --uncertainty or --preset {name}.",
        )
    preset = PRESETS[name]
    if args.no_registration:
        preset = replace(preset, registers=False)
    if args.reference is None:
        return preset
    if preset.with_reference is None:
        raise utils.StageError(
            f"The {name} preset has no network that takes a --reference.",
            f"Leave out --reference or --preset {name}.",
        )
    return replace(preset, network=preset.with_reference)


def check_space(
    directory: Path, section: Section, network: type[Network], args: argparse.Namespace
) -> None:
    """Say how much is going to be written, and stop if the disk cannot take it."""
    n_genes, (h, w) = section.counts.shape[1], section.tissue.shape
    written = (1 + args.uncertainty) * n_genes * h * w * np.dtype(args.dtype).itemsize
    embedding = 4 * network.embedding_size * h * w
    shown = h * w if args.keep_background else int(section.tissue.sum())
    latent = 4 * shown * args.n_states * network.latent_size
    kept = states.bytes_of(network(section, np.arange(len(section.counts))), args.n_states)
    print(
        f"to be written: {utils.size(written)} of maps ({n_genes} genes, {h} x {w}, {args.dtype}), "
        f"{utils.size(embedding)} of embeddings, {utils.size(kept)} of states, and for a while "
        f"{utils.size(latent)} more"
    )
    utils.check_disk(directory, written + embedding + latent + kept, "the maps and states")


def predict_and_write(
    stage: utils.Stage,
    section: Section,
    genes: list[str],
    trained: list[states.State],
    training: Training,
    key: states.Key,
    ranks: devices.Ranks,
    device: torch.device,
) -> dict[str, Any]:
    """Everything that is as large as the map, and how well held-out spots are predicted.

    Of several processes, each goes over the section with its share of the states, and decodes its
    share of the genes.
    """
    args, errors = stage.args, None
    files = maps.MapFiles(args.map_format, args.dtype, args.n_plots, args.uncertainty)
    held_out, predicted = states.held_out(trained)
    measured = section.counts[held_out]
    facts: dict[str, Any] = {"held_out": held_out, "r": states.correlations(predicted, measured)}
    shown = np.ones_like(section.tissue) if args.keep_background else section.tissue
    if args.uncertainty:
        variance = uncertainty.held_out_variance(trained, section, held_out, device)
        disc = math.pi * section.radius**2
        factors, facts["coverage"] = uncertainty.calibrate(measured, predicted, variance, disc)
        spots, places = section.spots[section.usable], np.argwhere(shown) + 0.5
        errors = Errors(factors, growth(places, spots, section.radius))
    shares = [ranks.share(trained, rank) for rank in range(ranks.world)]
    networks = [[state.network for state in share] for share in shares]
    every = [network for share in networks for network in share]
    decisive = [key.hash, utils.code_hash(SCRIPT), asdict(files)]
    decisive += [args.n_states, args.keep_background]
    work = resume.work_folder(stage.directory, utils.MAPS.name, decisive)
    folders = maps.new_folders(stage, files)
    prior, share = training.preset.anchor_prior, training.preset.linear_share
    with prediction.latent_files(stage.directory, work, ranks) as latent:
        mine, there = networks[ranks.rank], latent[ranks.rank]
        prediction.embed_section(mine, section, shown, training.preset.overlap, there, device)
        ranks.barrier()
        decoder = prediction.Decoder(every, section, shown, prior, latent, device, share)
        maps.write_genes(folders, work, genes, decoder, facts["r"], files, errors, ranks)
        if ranks.rank > 0:
            return facts
        del decoder  # and its memory, for the embedding takes as much
        embedding = prediction.read_embedding(there, mine, shown)
    stage.retire(utils.EXPECTED)  # of maps by reference/predict.py
    if not args.uncertainty:
        stage.retire(utils.SPREAD)
    maps.write_embedding(stage, embedding)
    with stage.writing(utils.HELD_OUT) as partial:
        table = pd.DataFrame({"gene": genes, "held_out_r": facts["r"]})
        table.to_csv(partial, index=False, encoding="utf-8", lineterminator="\n")
    return facts


def main(stage: utils.Stage) -> None:
    args = stage.args
    stage.require(*INPUTS)
    stage.guard(*OUTPUTS)
    preset = find_preset(args)
    training = Training(preset, args.epochs, args.seed, args.batch_size, args.learning_rate)
    with devices.ranks() as ranks:
        device = devices.resolve_device(args.device)
        devices.limit_threads(device, MOST_THREADS)
        if device.type == "cuda":
            torch.set_float32_matmul_precision("high")  # matrix products in TF32
        section, spots, genes = read_section(stage, preset.context, preset.by_area)
        about = args.reference and reference.join(stage, args.reference, section, genes, device)
        beside = registration.register(section, stage.directory) if preset.registers else None
        check_space(stage.directory, section, preset.network, args)
        print(f"{len(spots)} spots, {len(section.points)} HR points, {len(genes)} genes")
        size = " x ".join(map(str, section.tissue.shape))
        print(f"{size} superpixels, preset {args.preset}, states: {args.n_states}, on {device}")

        started = time.monotonic()
        linear.join(section, preset.linear_share > 0, preset.weighs_scales)
        with devices.memory_explained(device):
            key = states.key_of(training, STATE_CODE, stage.inputs, device)
            folder = stage.directory / utils.STATES.name
            trained = train_states(section, folder, training, key, args.n_states, ranks, device)
            seconds = {"seconds_training": round(time.monotonic() - started, 2)}
            found = predict_and_write(stage, section, genes, trained, training, key, ranks, device)
        if ranks.rank > 0:
            return
    predicting = time.monotonic() - started - seconds["seconds_training"]
    seconds["seconds_prediction"] = round(predicting, 2)
    facts = states.summarise(spots, int(section.usable.sum()), genes, found["held_out"], found["r"])
    if args.uncertainty:
        facts["coverage_of_90"] = uncertainty.report_coverage(stage, found["coverage"])
    facts["parts"] = states.files_of(args.n_states)
    facts |= {"reference": about, "image_beside_spots": beside, "fineness": section.fineness}
    stage.finish(seed=args.seed, device=str(device), **facts, **seconds)


def run(argv: list[str] | None = None) -> int:
    return cli.run_stage(main, SCRIPT, options.parser(__doc__), argv)


if __name__ == "__main__":
    sys.exit(run())
