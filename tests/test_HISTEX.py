"""HISTEX.py: the networks against plain numpy, what is held out, training, prediction, files."""

import argparse
import copy
import functools
import io
import itertools
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import tempfile
import types
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import PIPELINE, ROOT, run
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.ndimage import uniform_filter
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import HISTEX
import utils
from method import (
    anchoring,
    attention,
    devices,
    layers,
    maps,
    prediction,
    progress,
    states,
)
from method import section as sections
from method.network import Network, Spots, run_batch
from method.section import Section
from reading import arrays, images, pickles
from writing import disk

F, G = 6, 5  # token features, genes
SHAPE = (40, 46)  # superpixels
RADIUS = 55 / 16  # superpixels: Visium
PRIOR = HISTEX.PRESETS["default"].anchor_prior


def make_section(by_area: bool = True, seed: int = 0, shape=SHAPE, **changes) -> Section:
    """16 spots on a 4 x 4 square lattice with midpoints, random tokens and Poisson counts."""
    rng = np.random.default_rng(seed)
    spots = np.array([(r, c) for r in (6.2, 15.4, 24.6, 33.8) for c in (7.1, 17.3, 27.6, 38.2)])
    near = [(i, i + 1) for i in range(16) if i % 4 < 3] + [(i, i + 4) for i in range(12)]
    parents = np.array([(i, i) for i in range(16)] + near)
    counts = rng.poisson(rng.uniform(2, 30, (16, G))).astype(np.float32)
    arrays = {
        "tokens": rng.normal(size=(*shape, F)).astype(np.float16),
        "tissue": np.ones(shape, bool),
        "spots": spots,
        "counts": counts,
        "points": spots[parents].mean(axis=1),
        "expression": counts[parents].mean(axis=1),
        "parents": parents,
        "radius": RADIUS,
        "context": HISTEX.PRESETS["default" if by_area else "published"].context,
        "by_area": by_area,
    }
    return Section(**(arrays | changes))


CPU = torch.device("cpu")


def predict(networks, section, device=CPU, preset="default", background=False):
    """Maps (G, h, w) and the embedding (D, h, w)."""
    row = HISTEX.PRESETS[preset]
    shown = np.ones_like(section.tissue) if background else section.tissue
    with tempfile.TemporaryFile() as file:
        prediction.embed_section(networks, section, shown, row.overlap, file, device)
        decoder = prediction.Decoder(networks, section, shown, row.anchor_prior, [file], device)
        maps = np.full((G, *section.tissue.shape), np.nan, np.float32)
        for genes in decoder.blocks():
            maps[genes, shown] = decoder.maps(genes)
        embedding = prediction.read_embedding(file, networks, shown)
    return maps, embedding


def randomise(network: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Give every weight a random value, also those that start at zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in network.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.1)
    return network.eval()


def default_network(section: Section, seed: int = 0) -> torch.nn.Module:
    return randomise(HISTEX.DefaultNetwork(section, np.arange(16)), seed)


# ----- the networks -----
def numpy_attention(weights: dict, prefix: str, queries, keys, scale: float) -> np.ndarray:
    """Multi-head attention as in a textbook, one batch item and one head at a time."""

    def linear(name: str, x: np.ndarray) -> np.ndarray:
        return x @ weights[f"{prefix}.{name}.weight"].T + weights[f"{prefix}.{name}.bias"]

    q, k, v = linear("query", queries), linear("key", keys), linear("value", keys)
    mixed = np.zeros_like(q)
    size = HISTEX.WIDTH // HISTEX.HEADS
    for b, head in itertools.product(range(len(q)), range(HISTEX.HEADS)):
        part = slice(head * size, (head + 1) * size)
        logits = q[b, :, part] @ k[b, :, part].T * scale
        share = np.exp(logits - logits.max(axis=1, keepdims=True))
        mixed[b, :, part] = share / share.sum(axis=1, keepdims=True) @ v[b, :, part]
    return linear("out", mixed)


def test_published_network_is_the_published_arithmetic():
    section = make_section(by_area=False)
    network = randomise(HISTEX.PublishedNetwork(section, np.arange(16)))
    network.double()
    w = {name: value.numpy() for name, value in network.state_dict().items()}
    rng = np.random.default_rng(1)
    tokens = rng.normal(size=(3, 49, F))
    expression = rng.poisson(9, (3, 5, G)).astype(np.float64)

    scale = 8**-0.5  # sic: the number of heads, not their width
    span = section.expression.max(axis=0) - section.expression.min(axis=0)
    e = (expression - section.expression.min(axis=0)) / span

    def block(name: str, a: np.ndarray) -> np.ndarray:
        c = numpy_attention(w, f"{name}.token_to_expression", a, e, scale)
        d = numpy_attention(w, f"{name}.expression_to_token", e, a, scale)
        return numpy_attention(w, f"{name}.fuse", c, d, scale)

    def affine(name: str, a: np.ndarray) -> np.ndarray:
        return a @ w[f"{name}.weight"] + 0.01

    x = block("block1", tokens)
    x = affine("affine1", x) + x
    x = block("block2", x)
    x = affine("affine2", x) + x
    y = np.concatenate([x, tokens], axis=-1)
    for layer in range(4):
        y = affine(f"head.{layer}", y)
    y = y @ w["out.weight"]
    y = np.where(y > 0, y, 0.01 * (np.exp(y) - 1)) + 0.01

    patches = torch.from_numpy(tokens.reshape(3, 7, 7, F))
    got = network(patches, torch.from_numpy(expression), torch.zeros(3, 49, 5, 2))
    np.testing.assert_allclose(got.detach().numpy(), y, atol=1e-5)
    context = network.embed_expression(torch.from_numpy(expression))
    latent = network.fuse(torch.from_numpy(tokens), context, torch.zeros(3, 5, 2))
    np.testing.assert_allclose(latent[..., : HISTEX.WIDTH].detach().numpy(), x, atol=1e-5)

    # the loss is the squared error of the mean over 37 of 49 superpixels, in scaled counts
    counts = section.counts[:3]
    low, high = section.counts.min(axis=0), section.counts.max(axis=0)
    disc = [(r, c) for r in range(-3, 4) for c in range(-3, 4) if r * r + c * c <= RADIUS**2]
    assert len(disc) == 37
    cells = [(r + 3) * 7 + c + 3 for r, c in disc]
    wanted = (y[:, cells].mean(axis=1) - (counts - low) / (high - low)) ** 2
    areas = torch.from_numpy(section.areas[:3]).double()
    loss = network.loss(got, areas, torch.from_numpy(counts)).detach().numpy()
    np.testing.assert_allclose(loss, wanted, atol=1e-5)
    # and counts per superpixel are y (max - min) / 37 + min / 37
    wanted = y * (high - low) / 37 + low / 37
    np.testing.assert_allclose(network.to_counts(got).detach().numpy(), wanted, rtol=1e-5)


@pytest.mark.parametrize("n_out", [1024, 512, G])
def test_published_weights_start_within_one_over_root_of_their_outputs(n_out):
    weight = HISTEX.PublishedAffine(300, n_out).weight
    bound = n_out**-0.5
    assert weight.abs().max() <= bound
    assert weight.abs().max() > 0.9 * bound


def test_cross_attention_equals_torch_multihead_attention():
    torch.manual_seed(0)
    ours = attention.CrossAttention(7, 11, (HISTEX.WIDTH // HISTEX.HEADS) ** -0.5).double()
    torchs = torch.nn.MultiheadAttention(
        HISTEX.WIDTH, HISTEX.HEADS, batch_first=True, dtype=torch.float64
    )
    queries, keys = torch.randn(2, 9, 7).double(), torch.randn(2, 4, 11).double()
    torchs.in_proj_weight.data = torch.eye(HISTEX.WIDTH).double().repeat(3, 1)
    torchs.in_proj_bias.data.zero_()
    torchs.out_proj.weight.data, torchs.out_proj.bias.data = ours.out.weight, ours.out.bias
    wanted, _ = torchs(ours.query(queries), ours.key(keys), ours.value(keys))
    torch.testing.assert_close(ours(queries, keys), wanted)


@pytest.mark.parametrize("trust", [-2.0, 0.0, 30.0])
def test_default_network_starts_between_the_section_and_the_hr_points_around(trust):
    section = make_section()
    network = HISTEX.DefaultNetwork(section, np.arange(16)).eval()
    assert (network.trust == 0).all()
    nn.init.constant_(network.trust, trust)
    near = section.context_of_spots(np.array([], int), leave_out=False)
    centres = np.floor(section.spots).astype(int)
    output = network(*section.inputs(centres, near, network.halo, CPU))
    maps = network.to_counts(output).detach().numpy()
    row, col = section.patches(centres)
    for spot, cell in [(0, 0), (5, 40), (15, 80)]:
        place = np.array([row[spot, cell], col[spot, cell]]) + 0.5
        squares = ((section.points[near[spot]] - place) ** 2).sum(axis=1)
        share = (squares + 1) ** -1.5
        around = share @ section.expression[near[spot]] / share.sum() / (np.pi * RADIUS**2)
        mean = section.counts.mean(axis=0) / (np.pi * RADIUS**2)
        a = 1 / (1 + np.exp(-trust))
        wanted = ((around + 0.05 * mean) / 1.05) ** a * mean ** (1 - a)
        np.testing.assert_allclose(maps[spot, cell], wanted, rtol=1e-4)


def test_a_gene_without_a_count_in_training_has_finite_maps():
    section = make_section()
    section.counts[:12, 2] = 0
    network = HISTEX.DefaultNetwork(section, np.arange(12))
    split = sections.split_spots(section, True, 0, 0)
    output, areas, counts = run_batch(network, section, split, np.arange(16), CPU)
    assert (network.to_counts(output)[..., 2] > 0).all()
    network.loss(output, areas, counts).mean().backward()
    assert all(p.grad.isfinite().all() for p in network.parameters() if p.grad is not None)


def test_quick_parameters_learn_faster_and_do_not_decay():
    network = HISTEX.DefaultNetwork(make_section(), np.arange(16))
    slow, quick = (
        HISTEX.Training(HISTEX.PRESETS["default"]).start(network, 9).optimizer.param_groups
    )
    assert [id(p) for p in quick["params"]] == [id(network.trust)]
    assert (quick["lr"], quick["weight_decay"]) == (10 * slow["lr"], 0)
    assert slow["weight_decay"] > 0
    assert len(slow["params"]) + 1 == len(list(network.parameters()))


def test_constant_expression_gives_discs_that_sum_to_it():
    counts = np.full((16, G), 12, np.float32)
    parents = make_section().parents
    section = make_section(counts=counts, expression=counts[parents].mean(axis=1))
    network = HISTEX.DefaultNetwork(section, np.arange(16))
    split = sections.split_spots(section, True, 0, 0)
    output, areas, _ = run_batch(network, section, split, np.arange(16), CPU)
    total = torch.einsum("btg,bt->bg", network.to_counts(output), areas)
    np.testing.assert_allclose(total.detach(), 12, rtol=0.01)  # discs are sampled 8 x 8
    counts = torch.from_numpy(counts)
    assert network.loss(output, areas, counts).max() < 1e-3


def test_tokens_are_seen_at_three_scales():
    section = make_section()
    network = HISTEX.DefaultNetwork(section, np.arange(16))
    centre = np.array([[20, 21]])
    tokens, _, _ = section.inputs(centre, np.array([[0]]), network.halo, CPU)
    got = network.views(tokens)[0].numpy()
    z = (section.tokens - network.token_mean.numpy()) / network.token_std.numpy()
    rows = slice(20 - section.half, 20 + section.half + 1)
    cols = slice(21 - section.half, 21 + section.half + 1)
    wanted = [z] + [uniform_filter(z, (size, size, 1)) for size in HISTEX.DefaultNetwork.scales]
    wanted = np.concatenate([x[rows, cols] for x in wanted], axis=-1)
    np.testing.assert_allclose(got, wanted, atol=1e-5)


# ----- the section -----
def test_superpixels_off_the_map_or_off_tissue_have_no_area():
    tissue = np.ones(SHAPE, bool)
    tissue[:, :7] = False
    section = make_section(tissue=tissue, spots=make_section().spots - np.array([4.2, 0]))
    row, col = section.patches(np.floor(section.spots).astype(int))
    off = (row < 0) | (col < 7)
    assert off.any()
    assert (section.areas[off] == 0).all()
    assert section.areas[0].sum() < np.pi * RADIUS**2 / 2  # cut off above and on the left
    assert section.areas[5].sum() == pytest.approx(np.pi * RADIUS**2, rel=0.02)
    # a spot on half tissue has the expression of a full disc with the same density
    assert section.usable[4]
    share = section.areas[4].sum() / (np.pi * RADIUS**2)
    np.testing.assert_allclose(section.expression[4] * share, section.counts[4], rtol=1e-5)


def test_spots_with_hardly_any_tissue_say_nothing_about_it():
    """Squeezed into a few superpixels, their counts would make the edge of the mask bright."""
    tissue = np.ones(SHAPE, bool)
    tissue[:13] = False  # the first row of spots is off, the second keeps almost all of its discs
    tissue[:, 36:] = False  # of the last column, less than a quarter is left
    counts = np.full((16, G), 120, np.float32)
    parents = make_section().parents
    expression = counts[parents].mean(axis=1)
    section = make_section(tissue=tissue, counts=counts, expression=expression)
    share = section.areas.sum(axis=1) / (np.pi * RADIUS**2)
    assert list(section.usable) == list(share >= sections.MIN_TISSUE_SHARE)
    assert 4 <= section.usable.sum() < 12
    unusable = set(np.flatnonzero(~section.usable))
    assert not unusable & set(section.parents.ravel())
    split = sections.split_spots(section, True, 0, 0)
    assert not unusable & {*split.train, *split.held_out}
    assert section.expression.max() < 120 / 0.25


@pytest.mark.parametrize("held_out", [[], [5], [0, 3, 9]])
def test_context_is_the_nearest_points_without_the_spot_and_the_held_out(held_out):
    section = make_section()
    held_out = np.array(held_out, int)
    near = section.context_of_spots(held_out, leave_out=True)
    for spot, place in enumerate(section.spots):
        banned = {spot, *held_out.tolist()}
        allowed = [p for p, pair in enumerate(section.parents) if not banned & set(pair.tolist())]
        distance = np.linalg.norm(section.points - place, axis=1)
        wanted = np.sort(distance[allowed])[: near.shape[1]]
        np.testing.assert_allclose(distance[near[spot]], wanted)
        assert set(near[spot]) <= set(allowed)
    if len(held_out) < 2:
        assert near.shape[1] == section.context


def test_published_context_is_the_five_nearest_points():
    section = make_section(by_area=False)
    near = section.context_of_spots(np.array([], int), leave_out=False)
    distance = np.linalg.norm(section.points[None] - section.spots[:, None], axis=2)
    wanted = np.sort(distance, axis=1)[:, :5]
    np.testing.assert_allclose(np.take_along_axis(distance, near, axis=1), wanted)


def test_token_statistics_are_those_of_the_tissue():
    section = make_section()
    tissue = np.random.default_rng(0).random(SHAPE) < 0.5
    tissue[3] = False
    mean, std = sections.token_statistics(section.tokens, tissue)
    np.testing.assert_allclose(mean, section.tokens[tissue].astype(float).mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(std, section.tokens[tissue].astype(float).std(axis=0), rtol=1e-5)


# ----- training -----
def key_named(name: str = "k") -> states.Key:
    return states.Key(training={"name": name}, inputs={}, code={}, machine={})


def train(section, folder: Path, key: str = "k", index: int = 0, preset="default", **changes):
    """Network, held-out spots and their predicted counts of a state that was trained."""
    row, device = changes.pop("row", HISTEX.PRESETS[preset]), changes.pop("device", CPU)
    training = HISTEX.Training(row, **({"epochs": 3} | changes))
    state = HISTEX.train_state(section, folder, training, key_named(key), index, device)
    return state.network, state.split.held_out, state.predicted


def test_states_hold_out_disjoint_spots_and_train_on_the_others():
    section = make_section()
    splits = [sections.split_spots(section, True, 7, i) for i in range(sections.FOLDS)]
    held_out = np.concatenate([split.held_out for split in splits])
    assert sorted(held_out) == list(range(16))
    for split in splits:
        assert sorted([*split.train, *split.held_out]) == list(range(16))


def test_counts_of_held_out_spots_cannot_reach_their_prediction(tmp_path):
    """Replace the counts of held-out spots, in the table and the HR points: nothing changes."""
    section = make_section()
    held_out = sections.split_spots(section, True, 0, 0).held_out
    other = section.counts.copy()
    other[held_out] = 1000
    changed = make_section(counts=other, expression=other[section.parents].mean(axis=1))
    assert (changed.expression != section.expression).any()
    # one epoch: which epoch is kept is the choice of held-out spots, see the next test
    _, spots, predicted = train(section, tmp_path / "a", epochs=1)
    _, _, again = train(changed, tmp_path / "b", epochs=1)
    assert list(spots) == list(held_out)
    assert (predicted == again).all()


def test_a_held_out_spot_has_no_say_in_the_epoch_of_its_own_score():
    losses = {1: [9, 1, 9, 1], 2: [1, 9, 1, 9], 3: [5, 5, 5, 5]}
    selection = progress.Selection()
    network = torch.nn.Linear(1, 1)
    for epoch, loss in losses.items():
        predicted = np.full((4, 2), epoch, np.float32)
        selection.consider(epoch, np.array(loss, float), predicted, network)
    # even spots are best at epoch 2 and odd ones at 1, so that each is scored at the other's epoch
    np.testing.assert_array_equal(selection.predicted()[:, 0], [1, 2, 1, 2])
    assert selection.epoch == 1  # all are 5 on average, the first stays


def cut_off_in_the_third_epoch(monkeypatch) -> list:
    """Ctrl-C there, once, with a checkpoint after every epoch; returns what grows with epochs."""
    monkeypatch.setattr(HISTEX, "CHECKPOINT_SECONDS", -1.0)
    original, calls = HISTEX.train_epoch, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(HISTEX, "train_epoch", interrupted)
    return calls


@pytest.mark.parametrize("preset", ["default", "published"])
def test_training_resumes_to_the_same_bits(tmp_path, monkeypatch, preset):
    section = make_section(by_area=preset == "default")
    whole, _, _ = train(section, tmp_path / "whole", preset=preset, epochs=4)
    calls = cut_off_in_the_third_epoch(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        train(section, tmp_path / "cut", preset=preset, epochs=4)
    assert (tmp_path / "cut" / "checkpoint.pt").exists()
    resumed, _, _ = train(section, tmp_path / "cut", preset=preset, epochs=4)
    assert len(calls) == 5  # two before the cut, the one that was cut, two after it
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    for name in ("model.safetensors", "history.csv", "held-out.npy", "model.json"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not (tmp_path / "cut" / "checkpoint.pt").exists()


def test_a_finished_state_is_reused_only_with_the_same_key(tmp_path, capsys):
    section = make_section()
    first, _, predicted = train(section, tmp_path)
    again, _, reused = train(section, tmp_path)
    assert "taken from" in capsys.readouterr().out
    assert all(torch.equal(a, b) for a, b in zip(*map(weights, (first, again)), strict=True))
    assert (predicted == reused).all()
    train(section, tmp_path, key="other")
    assert "taken from" not in capsys.readouterr().out


def test_a_damaged_state_is_trained_from_its_start(tmp_path, capsys):
    section = make_section()
    first, _, _ = train(section, tmp_path)
    np.save(tmp_path / "held-out.npy", np.zeros((1, 1), np.float32))
    again, _, _ = train(section, tmp_path)
    assert "trained anew" in capsys.readouterr().out
    assert all(torch.equal(a, b) for a, b in zip(*map(weights, (first, again)), strict=True))


def weights(network: torch.nn.Module) -> list[torch.Tensor]:
    return list(network.state_dict().values())


def test_a_damaged_checkpoint_is_not_used(tmp_path, capsys):
    section = make_section()
    (tmp_path / "checkpoint.pt").write_bytes(b"not a checkpoint")
    train(section, tmp_path, epochs=1)
    assert "not readable" in capsys.readouterr().out


def test_training_stops_at_a_plateau_and_keeps_the_best_epoch(tmp_path, monkeypatch):
    row = replace(HISTEX.PRESETS["default"], patience=2)
    network, *_ = train(make_section(), tmp_path, row=row, epochs=60, learning_rate=0.03)
    history = pd.read_csv(tmp_path / "history.csv")
    best = history["held_out_loss"].idxmin()
    assert len(history) < 60
    assert len(history) == best + 1 + 2
    split = sections.split_spots(make_section(), True, 0, 0)
    spots = Spots(network, make_section(), split, CPU)
    losses, _ = HISTEX.score_held_out(network, spots)
    assert losses.mean() == pytest.approx(history["held_out_loss"][best], rel=1e-5)


@pytest.mark.parametrize(("n_spots", "epochs", "wanted"), [
    (160, 500, (14, 20)), (80, 500, (20, 10)), (7, 500, (200, 1)), (160, 5, (5, 20)),
])  # fmt: skip
def test_a_training_is_as_long_as_its_steps_need(n_spots, epochs, wanted):
    row = replace(HISTEX.PRESETS["default"], batch_size=8)
    assert HISTEX.Training(row, epochs).length(n_spots) == wanted
    steady = replace(row, annealing=None)
    assert HISTEX.Training(steady, epochs).length(n_spots) == (epochs, wanted[1])


def test_training_sees_the_superpixels_of_the_disc_only():
    section = make_section()
    assert section.chosen.shape[1] < section.areas.shape[1]
    for areas, chosen in zip(section.areas, section.chosen, strict=True):
        assert set(np.flatnonzero(areas)) <= set(chosen)
    network = randomise(HISTEX.DefaultNetwork(section, np.arange(16)).eval())
    split, some = sections.split_spots(section, True, 0, 0), np.array([3, 7])
    output, areas, _ = run_batch(network, section, split, some, CPU)
    assert output.shape[1] == areas.shape[1] == section.chosen.shape[1]
    np.testing.assert_array_equal(areas.sum(dim=1), section.areas[some].sum(axis=1))
    centres = np.floor(section.spots[some]).astype(int)
    inputs = section.inputs(centres, split.near[some], network.halo, CPU)
    every = torch.arange(section.areas.shape[1]).repeat(2, 1)
    torch.testing.assert_close(network(*inputs, every), network(*inputs))
    last = every[:, -20:].flip(1)  # in the order in which they are chosen
    alone = network(*inputs, last)
    torch.testing.assert_close(network(*inputs, last.flip(1)), alone.flip(1))
    assert not torch.allclose(alone, network(*inputs)[:, -20:].flip(1))  # fewer tokens are seen


class Counted:
    """A token map that counts how often it is asked for tokens, which must not be for ever."""

    def __init__(self, tokens: np.ndarray) -> None:
        self.tokens, self.shape, self.dtype, self.asked = tokens, tokens.shape, tokens.dtype, 0

    def __getitem__(self, where) -> np.ndarray:
        self.asked += 1
        return self.tokens[where]


def test_spots_that_fit_the_memory_are_read_once_and_train_the_same(tmp_path, monkeypatch):
    trained, asked, original = {}, {}, HISTEX.train_epoch
    for name, spare in (("kept", 10**9), ("not kept", 0)):
        section, counts = make_section(), []
        _ = section.token_statistics
        section.tokens = Counted(section.tokens)

        def counted(*args, counts=counts, tokens=section.tokens):
            counts.append(tokens.asked)
            return original(*args)

        monkeypatch.setattr(HISTEX, "train_epoch", counted)
        monkeypatch.setattr(devices, "spare_bytes", lambda device, spare=spare: spare)
        trained[name] = train(section, tmp_path / name, epochs=2)
        asked[name] = [*counts, section.tokens.asked]
    assert len(set(asked["kept"])) == 1  # nothing is read in the epochs
    assert len(set(asked["not kept"])) == 3
    for kept, not_kept in zip(*(weights(network) for network, *_ in trained.values()), strict=True):
        assert torch.equal(kept, not_kept)
    np.testing.assert_array_equal(trained["kept"][2], trained["not kept"][2])


def test_spots_are_kept_if_they_and_the_hr_points_fit(monkeypatch):
    section, asked = make_section(), []
    network, split = default_network(section), sections.split_spots(section, True, 0, 0)
    monkeypatch.setattr(devices, "spare_bytes", lambda device: asked.append(device) or 10**9)
    kept = Spots(network, section, split, CPU).kept
    need = sum(part.nbytes for part in kept) + section.expression.nbytes
    for spare, fits in ((need, True), (need - 1, False)):
        monkeypatch.setattr(devices, "spare_bytes", lambda device, spare=spare: spare)
        assert (Spots(network, section, split, CPU).kept is not None) == fits
    assert asked == [CPU]


def test_a_step_of_training_does_not_ask_the_device_for_values(monkeypatch):
    """On a card each of these would be a wait; once an epoch is no harm."""
    section = make_section()
    split = sections.split_spots(section, True, 0, 0)
    network = HISTEX.DefaultNetwork(section, split.train)
    spots = Spots(network, section, split, CPU)
    training = HISTEX.Training(HISTEX.PRESETS["default"])
    done = training.start(network, 9)
    HISTEX.train_epoch(done, spots.batches(split.train, 3), CPU)  # makes what a first step makes
    batches, asked = list(spots.batches(split.train, 7)), []

    class Asking(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            name = function.overloadpacket.__name__
            if name in {"_local_scalar_dense", "is_nonzero", "nonzero", "_to_copy", "equal"}:
                asked.append(name)
            return function(*args, **(kwargs or {}))

    with Asking():
        HISTEX.train_epoch(done, batches, CPU)
    counting = ["_local_scalar_dense"] * len(batches)  # of the average's steps, on the CPU
    assert asked == [*counting, "_local_scalar_dense"]


def test_a_loss_that_is_not_finite_stops_the_training(tmp_path, monkeypatch):
    monkeypatch.setattr(HISTEX, "train_epoch", lambda *args: float("nan"))
    with pytest.raises(utils.StageError, match="state 0 diverges: in epoch 1"):
        train(make_section(), tmp_path)
    assert not (tmp_path / "checkpoint.pt").exists()
    assert not (tmp_path / "model.json").exists()


def test_published_maps_scale_with_the_counts(tmp_path):
    """A gene counted twice as often has a map twice as high: its rows are scaled to 0..1."""
    section = make_section(by_area=False)
    factor = np.array([1, 2, 4, 1, 8], np.float32)
    scaled = make_section(
        by_area=False, counts=section.counts * factor, expression=section.expression * factor
    )
    maps = []
    for number, one in enumerate((section, scaled)):
        network, *_ = train(one, tmp_path / str(number), preset="published")
        maps.append(predict([network], one, preset="published")[0])
    np.testing.assert_allclose(maps[1], maps[0] * factor[:, None, None], rtol=2e-3, atol=1e-5)


# ----- what decides a state, and what a change of it does -----
@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"code": {"HISTEX.py": "2", "network.py": "1"}}, "the code has changed (HISTEX.py)"),
        ({"inputs": {"mask.png": "2"}}, "inputs have changed (mask.png)"),
        ({"training": {"epochs": 4}}, "options or the preset have changed (epochs)"),
        ({"machine": {"torch": "9"}}, "the device or torch has changed (torch)"),
    ],
)
def test_a_state_that_is_trained_anew_says_why(tmp_path, change, said):
    parts = {
        "training": {"epochs": 3}, "inputs": {"mask.png": "1"}, "machine": {"torch": "8"},
        "code": {"HISTEX.py": "1", "network.py": "1"},
    }  # fmt: skip
    network = torch.nn.Linear(1, 1)
    before, after = states.Key(**parts), states.Key(**(parts | change))
    assert after.change_since(tmp_path) is None  # there is no state yet
    states.write_state(tmp_path, network, [], np.zeros(1), before, 1)
    assert states.Key(**parts).change_since(tmp_path) is None
    assert states.Key(**parts).hash == before.hash != after.hash
    assert after.change_since(tmp_path) == said
    (tmp_path / "model.json").write_text('{"key": "of an earlier version"}')
    assert "earlier version" in after.change_since(tmp_path)


def test_every_field_of_a_training_and_every_source_file_is_in_its_key():
    default = HISTEX.Training(HISTEX.PRESETS["default"])
    files = [Path(HISTEX.__file__)]
    first = states.key_of(default, files, {}, CPU)
    rows = [
        replace(default.preset, **change) for change in (
            {"network": HISTEX.PublishedNetwork}, {"with_reference": None}, {"context": 3},
            {"by_area": False}, {"holds_out": False}, {"overlap": False}, {"anchor_prior": None},
            {"registers": False}, {"linear_share": 0.5}, {"weighs_scales": False},
            {"optimizer": torch.optim.SGD}, {"weight_decay": 0.5}, {"learning_rate": 1.0},
            {"batch_size": 3}, {"min_steps": 9}, {"averaging": 0.5}, {"patience": 1},
            {"annealing": 5},
        )
    ]  # fmt: skip
    assert len(rows) == len(fields(HISTEX.Preset))
    changes = [{"epochs": 3}, {"seed": 1}, {"batch_size": 2}, {"learning_rate": 0.1}]
    assert len(changes) == len(fields(HISTEX.Training)) - 1
    changes += [{"preset": row} for row in rows]
    keys = [states.key_of(replace(default, **change), files, {}, CPU) for change in changes]
    assert len({key.hash for key in [first, *keys]}) == len(changes) + 1
    assert first.code.keys() == {"HISTEX.py", "network.py"}  # the latter has the base class
    ours = HISTEX.Training(replace(default.preset, network=Constant))
    other = states.key_of(ours, files, {}, CPU)
    assert other.code.keys() == {"HISTEX.py", "network.py", "test_HISTEX.py"}


def test_an_optimizer_of_ones_own_is_in_the_key_with_its_options_and_its_source():
    def mine(weights, lr):
        return torch.optim.SGD(weights, lr)

    preset = HISTEX.PRESETS["default"]
    partial = functools.partial
    rows = [mine, partial(mine, lr=1), partial(mine, lr=2), partial(torch.optim.SGD, momentum=0.5)]
    trainings = [HISTEX.Training(replace(preset, optimizer=row)) for row in rows]
    files = [Path(HISTEX.__file__)]
    keys = [states.key_of(training, files, {}, CPU) for training in trainings]
    assert len({key.hash for key in keys}) == 4
    ours = ["test_HISTEX.py" in key.code for key in keys]
    assert ours == [True, True, True, False]  # the code of libraries goes by the version of torch


def test_two_source_files_of_one_name_are_both_in_the_key(tmp_path):
    files = [tmp_path / folder / "network.py" for folder in ("a", "b")]
    for file in files:
        file.parent.mkdir()
        file.write_text("width = 1")
    training = HISTEX.Training(HISTEX.PRESETS["default"])
    seen = [states.key_of(training, files, {}, CPU).hash]
    for file in files:
        file.write_text("width = 2")
        seen.append(states.key_of(training, files, {}, CPU).hash)
    assert len(set(seen)) == 3


class Constant(Network):
    """A network of our own: every superpixel has the expression of its context, scaled."""

    latent_size = Network.embedding_size

    def __init__(self, section, train):
        super().__init__(section, train)
        self.scale = torch.nn.Parameter(torch.ones(section.counts.shape[1]) / 30)

    def fuse(self, histology, context, offsets):
        mean = context.mean(dim=(1, 2)).view(-1, 1, 1)
        return mean.expand(-1, histology.shape[1], self.latent_size)

    def decode(self, latent, interpolated, genes=slice(None)):
        return latent[..., :1] * self.scale[genes]

    def loss(self, output, areas, counts):
        return (torch.einsum("btg,bt->bg", output, areas) - counts).square()


def test_a_network_of_ones_own_is_a_class_and_a_row(finished, monkeypatch):
    monkeypatch.setitem(HISTEX.PRESETS, "constant", HISTEX.Preset(Constant, learning_rate=0.01))
    options = ("--preset", "constant", "--epochs", "2", "--n-states", "2", "--device", "cpu")
    assert run(utils.HISTEX, finished, *options) == 0
    tissue = np.asarray(Image.open(finished / "mask.png")) > 0
    for gene in ("GENE0", "GENE7"):
        values = pickles.read_pickle(finished / "cnts-super" / f"{gene}.pickle")
        assert (np.isnan(values) == ~tissue).all()
        assert values[tissue].min() > 0
    model = json.loads((finished / "states" / "01" / "model.json").read_text())
    assert model["network"] == "Constant"


def test_an_unknown_preset_is_named_with_those_that_there_are(finished, capsys):
    assert run(utils.HISTEX, finished, "--preset", "defualt") == 2
    assert "Choose one of default, published" in capsys.readouterr().err


EDITED = """
import contextlib, io, json, pathlib, sys
import HISTEX
edits, *options = sys.argv[1:]
for file, old, new in json.loads(edits):
    text = pathlib.Path(file).read_text(encoding="utf-8")
    assert text.count(old) == 1 or not old
    pathlib.Path(file).write_text(text.replace(old, new) if old else text, encoding="utf-8")
    with contextlib.redirect_stdout(io.StringIO()) as said:
        assert HISTEX.run(options) == 0
    record = json.loads(pathlib.Path(options[1], "HISTEX.json").read_text(encoding="utf-8"))
    print(json.dumps([said.getvalue(), record["code"]["sha256"]]))
"""


def test_a_change_of_the_code_trains_anew_and_is_said(finished, tmp_path):
    """A copy of the scripts whose source is edited; files that do not train leave states alone.

    The files are read for every run, so that one process will do, which imports them once.
    """
    code = tmp_path / "code"
    code.mkdir()
    for name in ("method", "reading", "writing"):
        shutil.copytree(ROOT / name, code / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("HISTEX.py", "utils.py"):
        shutil.copy(ROOT / name, code / name)
    edits = [
        ("HISTEX.py", "", ""),  # the copy has the same code
        ("HISTEX.py", "dropout = 0.5 ", "dropout = 0.1 "),
        ("HISTEX.py", "weight_decay: float = 1.0", "weight_decay: float = 0.0"),
        ("method/section.py", "MIN_TISSUE_SHARE = 0.25", "MIN_TISSUE_SHARE = 0.3"),
        ("method/progress.py", "(1 + n) / (10", "(2 + n) / (10"),
        ("method/maps.py", "PLOT_PX, PLOT_MARGIN_PX", "PLOT_PX , PLOT_MARGIN_PX"),
    ]
    command = [sys.executable, "-c", EDITED, json.dumps(edits), "--directory", str(finished)]
    command += trained_options(finished)
    done = subprocess.run(command, cwd=code, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said, hashes = zip(*map(json.loads, done.stdout.splitlines()), strict=True)
    assert "up to date, nothing to do" in said[0]
    assert "state 0: trained anew, since the code has changed (HISTEX.py)" in said[1]
    assert hashes[0] != hashes[1]
    for text, changed in zip(said[2:5], ("HISTEX.py", "section.py", "progress.py"), strict=True):
        assert f"the code has changed ({changed})" in text
    assert "nothing it was trained on has changed" in said[5]


# ----- prediction -----
class Numbered(Network):
    """A network that gives every superpixel its gene's number."""

    latent_size = HISTEX.WIDTH + 1

    def __init__(self):
        super().__init__(None, None)

    def fuse(self, histology, context, offsets):
        return torch.ones(*histology.shape[:2], self.latent_size)

    def decode(self, latent, interpolated, genes):
        return latent[..., -1:] * torch.arange(1.0, G + 1)[genes]


@pytest.mark.parametrize("preset", ["default", "published"])
@pytest.mark.parametrize("shape", [(40, 46), (21, 28), (11, 12)])
def test_patches_cover_all_tissue_and_their_weights_cancel(preset, shape, monkeypatch):
    monkeypatch.setattr(prediction, "find_anchors", lambda *_: None)
    rng = np.random.default_rng(0)
    tissue = rng.random(shape) < 0.5
    section = make_section(by_area=preset == "default", shape=shape, tissue=tissue)
    maps, embedding = predict([Numbered()], section, preset=preset)
    assert (np.isnan(maps) == ~tissue).all()
    for gene in range(G):
        np.testing.assert_allclose(maps[gene, tissue], gene + 1, rtol=1e-5)
    assert embedding.shape == (HISTEX.WIDTH, *shape)
    assert (np.isnan(embedding) == ~tissue).all()
    np.testing.assert_allclose(embedding[:, tissue], 1, rtol=1e-5)
    maps, _ = predict([Numbered()], section, preset=preset, background=True)
    np.testing.assert_allclose(maps[2], 3, rtol=1e-5)


def unanchored(network, section: Section, monkeypatch) -> np.ndarray:
    """Maps (G, h, w) of the default network, patch by patch and superpixel by superpixel."""
    h, w = section.tissue.shape
    stride, hill = prediction.blending(2 * section.half + 1, True)
    latent, weight = np.zeros((h, w, network.latent_size)), np.zeros((h, w, 1))
    middles = (range(section.half, extent + stride - 1, stride) for extent in (h, w))
    for r, c in itertools.product(*middles):
        distance = np.linalg.norm(section.points - (r + 0.5, c + 0.5), axis=1)
        near = np.argsort(distance, kind="stable")[None, : section.context]
        tokens, expression, offsets = section.inputs(np.array([[r, c]]), near, network.halo, CPU)
        histology = network.embed_histology(network.views(tokens)).flatten(1, 2)
        context = network.embed_expression(expression)
        values = network.fuse(histology, context, offsets.mean(dim=1))[0].numpy()
        row, col = section.patches(np.array([[r, c]]))
        for i, (y, x) in enumerate(zip(row[0], col[0], strict=True)):
            if 0 <= y < h and 0 <= x < w:
                latent[y, x] += hill[i] * values[i]
                weight[y, x] += hill[i]
    latent = torch.from_numpy(latent / weight).float()
    maps = np.empty((G, h, w), np.float32)
    for y, x in np.ndindex(h, w):
        squares = ((section.points - (y + 0.5, x + 0.5)) ** 2).sum(axis=1)
        near = np.argsort(squares, kind="stable")[: section.context]
        shares = network.interpolation(torch.from_numpy(squares[near]).float())
        interpolated = shares @ torch.from_numpy(section.expression[near])
        maps[:, y, x] = network.to_counts(network.decode(latent[y, x], interpolated)).numpy()
    return maps


@torch.inference_mode()
def test_maps_are_blended_patches_decoded_superpixel_by_superpixel(monkeypatch):
    monkeypatch.setattr(prediction, "find_anchors", lambda *_: None)
    section = make_section(shape=(23, 31))
    network = default_network(section)
    maps, _ = predict([network], section)
    np.testing.assert_allclose(maps, unanchored(network, section, monkeypatch), rtol=1e-3)


def test_prediction_does_not_depend_on_blocks_and_batches(monkeypatch):
    tissue = np.ones(SHAPE, bool)
    tissue[12:33] = False  # rows of patches without any tissue between two pieces
    tissue[:, :3] = False
    section = make_section(tissue=tissue)
    networks = [default_network(section, seed) for seed in (1, 2, 3)]
    maps = []
    for genes_bytes, batch, counts in [(10**9, 64, 10**6), (1, 64, 50), (10**4, 7, 999)]:
        monkeypatch.setattr(prediction, "GENES_BYTES", genes_bytes)
        monkeypatch.setattr(prediction, "PREDICT_BATCH", batch)
        monkeypatch.setattr(prediction, "COUNTS_AT_ONCE", counts)
        monkeypatch.setattr(anchoring, "COUNTS_AT_ONCE", counts)
        maps.append(predict(networks, section)[0])
    assert (np.isnan(maps[0]) == ~tissue).all()
    np.testing.assert_allclose(maps[1], maps[0], rtol=1e-4)
    np.testing.assert_allclose(maps[2], maps[0], rtol=1e-4)


def test_latent_values_are_read_once_for_a_block_of_genes(monkeypatch):
    section = make_section()
    networks = [default_network(section, seed) for seed in (1, 2)]
    places, read = int(section.tissue.sum()), []

    class Counted(io.BytesIO):
        def readinto(self, buffer):
            read.append(super().readinto(buffer))
            return read[-1]

    file = Counted()
    prediction.embed_section(networks, section, section.tissue, True, file, CPU)
    assert len(file.getvalue()) == 4 * places * 2 * networks[0].latent_size
    for room in (G, 2):  # genes
        monkeypatch.setattr(prediction, "GENES_BYTES", room * 4 * places)
        decoder = prediction.Decoder(networks, section, section.tissue, PRIOR, [file], CPU)
        for genes in decoder.blocks():
            decoder.maps(genes)
        assert sum(read) == -(-G // room) * len(file.getvalue())
        read.clear()


def test_a_slide_of_11_mm_is_decoded_in_a_few_blocks():
    decoder = prediction.Decoder.__new__(prediction.Decoder)
    decoder.places = np.empty((1_300_000, 0))
    decoder.section = types.SimpleNamespace(counts=np.empty((0, 1_000)))
    assert [(x.start, x.stop) for x in decoder.blocks()][:2] == [(0, 144), (144, 288)]
    assert len(decoder.blocks()) == 7


@pytest.mark.parametrize("room", [1, 2, 15, 16, 17, 31, 33, 100])
@pytest.mark.parametrize("n_genes", [1, 15, 16, 40, 229, 1_000])
def test_blocks_of_genes_fit_the_memory_and_follow_each_other(n_genes, room, monkeypatch):
    monkeypatch.setattr(prediction, "GENES_BYTES", room * 4 * 500)
    decoder = prediction.Decoder.__new__(prediction.Decoder)
    decoder.places = np.empty((500, 0))
    decoder.section = types.SimpleNamespace(counts=np.empty((0, n_genes)))
    blocks = decoder.blocks()
    assert [gene for block in blocks for gene in range(n_genes)[block]] == [*range(n_genes)]
    assert all(block.stop - block.start <= room for block in blocks)
    if room >= 16:
        assert all(block.start % 16 == 0 for block in blocks)


@pytest.mark.parametrize("n_states", [1, 2, 3, 4, 5, 6, 7, 8])
def test_the_median_of_the_states_is_the_median_of_numpy(n_states):
    rng = np.random.default_rng(0)
    shape = (n_states, 3, 400)
    for values in (rng.normal(size=shape), rng.integers(3, size=shape)):  # with ties
        maps = values.astype(np.float32)
        states = list(torch.from_numpy(maps.copy()))
        got = prediction.median_of(states).numpy()
        np.testing.assert_allclose(got, np.median(maps, axis=0), rtol=1e-6)
        np.testing.assert_array_equal(torch.stack(states), maps)


@pytest.mark.parametrize(("first", "middles"), [(10, (12, 28)), (25, (28, 36))])
def test_rows_without_tissue_are_not_computed(first, middles, monkeypatch):
    tissue = np.zeros(SHAPE, bool)
    tissue[first : middles[1]] = True
    section = make_section(tissue=tissue)
    network = default_network(section)
    original, embedded, read = HISTEX.DefaultNetwork.embed_histology, [], []

    def embed(self, x):
        embedded.append(x.shape[1])
        return original(self, x)

    monkeypatch.setattr(HISTEX.DefaultNetwork, "embed_histology", embed)
    some_rows = arrays.some_rows
    monkeypatch.setattr(
        arrays, "some_rows", lambda x, a, b: read.extend(range(a, b)) or some_rows(x, a, b)
    )
    predict([network], section)
    # patches are 9 x 9, 8 apart, with middles at 4, 12, ...: these rows of patches reach the tissue
    top, bottom = middles[0] - 4, middles[1] + 4
    assert sum(embedded) == (bottom - top + 1) * (44 + 4 + 1)
    assert min(read) == max(top - network.halo, 0)
    assert max(read) == min(bottom + network.halo, SHAPE[0] - 1)


def test_maps_are_the_median_of_the_states(monkeypatch):
    monkeypatch.setattr(prediction, "find_anchors", lambda *_: None)
    section = make_section()
    networks = [default_network(section, seed) for seed in (1, 2, 3, 4)]
    single = [predict([network], section)[0] for network in networks]
    together, embedding = predict(networks, section)
    np.testing.assert_allclose(together, np.median(single, axis=0), rtol=1e-4)
    np.testing.assert_allclose(embedding, predict(networks[:1], section)[1], rtol=1e-4, atol=1e-5)


def test_published_blocks_are_predicted_whole_and_once():
    """Every 7 x 7 block by itself, with the five HR points nearest to its centre."""
    section = make_section(by_area=False, shape=(21, 28))
    network = randomise(HISTEX.PublishedNetwork(section, np.arange(16)))
    out, _ = predict([network], section, preset="published")
    for r, c in itertools.product(range(0, 21, 7), range(0, 28, 7)):
        distance = np.linalg.norm(section.points - (r + 3.5, c + 3.5), axis=1)
        near = np.argsort(distance, kind="stable")[:5]
        tokens = section.tokens[r : r + 7, c : c + 7][None].astype(np.float32)
        expression = torch.from_numpy(section.expression[near][None])
        with torch.inference_mode():
            y = network.to_counts(
                network(torch.from_numpy(tokens), expression, torch.zeros(1, 49, 5, 2))
            )
        wanted = y[0].numpy().reshape(7, 7, G).transpose(2, 0, 1)
        np.testing.assert_allclose(out[:, r : r + 7, c : c + 7], wanted, rtol=1e-3, atol=1e-5)


def test_memory_running_out_halves_the_batch(monkeypatch):
    section = make_section()
    network = default_network(section)
    wanted, _ = predict([network], section)
    fuse, decode, sizes = HISTEX.DefaultNetwork.fuse, HISTEX.DefaultNetwork.decode, []

    def fuse_few(self, histology, *others):
        sizes.append(len(histology))
        if len(histology) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return fuse(self, histology, *others)

    def decode_few(self, latent, *others):
        if len(latent) > 100:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return decode(self, latent, *others)

    monkeypatch.setattr(HISTEX.DefaultNetwork, "fuse", fuse_few)
    monkeypatch.setattr(HISTEX.DefaultNetwork, "decode", decode_few)
    monkeypatch.setattr(prediction, "PREDICT_BATCH", 10)
    got, _ = predict([network], section)
    assert sizes[:4] == [6, 5, 2, 2]  # there are 6 patches in a row
    np.testing.assert_allclose(got, wanted, rtol=1e-4)
    monkeypatch.setattr(prediction, "PREDICT_BATCH", 1)

    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(HISTEX.DefaultNetwork, "fuse", fail)
    with pytest.raises(torch.OutOfMemoryError):
        predict([network], section)


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("preset", ["default", "published"])
def test_a_card_that_replays_its_steps_learns_the_same(preset, tmp_path, monkeypatch):
    section = make_section(by_area=preset == "default")
    options = {"preset": preset, "device": torch.device("cuda"), "epochs": 4}
    replayed = train(section, tmp_path / "replayed", **options)
    monkeypatch.setattr(HISTEX.Network, "repeats", False)
    told = train(section, tmp_path / "told", **options)
    start = HISTEX.PRESETS[preset].network(section, np.arange(16)).state_dict()
    for name, value in told[0].state_dict().items():
        moved = float((value.cpu() - start[name]).abs().max()) + 1e-3
        assert float((value - replayed[0].state_dict()[name]).abs().max()) < 0.01 * moved, name
    np.testing.assert_allclose(replayed[2], told[2], rtol=1e-2)


@pytest.mark.gpu
@needs_cuda
def test_training_on_a_card_goes_on_as_if_it_had_not_been_cut_off(tmp_path, monkeypatch):
    section, options = make_section(), {"device": torch.device("cuda"), "epochs": 4}
    whole = train(section, tmp_path / "whole", **options)
    calls = cut_off_in_the_third_epoch(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        train(section, tmp_path / "cut", **options)
    resumed = train(section, tmp_path / "cut", **options)
    assert len(calls) == 5
    np.testing.assert_allclose(resumed[2], whole[2], rtol=1e-3)


@pytest.mark.gpu
@needs_cuda
def test_cuda_and_cpu_agree():
    section = make_section()
    network = default_network(section)
    maps = []
    for device in map(torch.device, ("cpu", "cuda")):
        maps.append(predict([copy.deepcopy(network).to(device)], section, device)[0])
    np.testing.assert_allclose(maps[1], maps[0], rtol=1e-3)


# ----- files -----
@given(st.lists(st.text(min_size=1, max_size=12), unique=True, min_size=1, max_size=20))
@settings(max_examples=200, deadline=None)
def test_file_names_are_distinct_on_every_file_system_and_stay_in_the_folder(genes):
    names = maps.file_names(genes, ".pickle")
    assert list(names) == genes
    assert len({name.lower() for name in names.values()}) == len(genes)
    for name in names.values():
        assert Path(name).name == name
        assert not set(name) & set('/\\:*?"<>|\0')
        assert not name.startswith(".")
        assert name.split(".")[0].lower() not in {"con", "nul", "com1", "lpt9"}


def test_usual_gene_names_are_their_own_file_names():
    genes = ["ACTB", "HLA-DRB1", "MARCH1", "H2-K1", "RP11-34P13.7", "NA", "mt-Co1"]
    assert maps.file_names(genes, ".npy") == {gene: f"{gene}.npy" for gene in genes}
    names = maps.file_names(["Nrg1", "NRG1", "../x", "CON", ".a"], ".npy")
    assert list(names.values()) == ["Nrg1.npy", "NRG1~2.npy", "%2E./x.npy".replace("/", "%2F"),
                                    "%43ON.npy", "%2Ea.npy"]  # fmt: skip


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_maps_are_written_as_plain_arrays(tmp_path, dtype):
    values = np.random.default_rng(0).random((4, 3)).astype(dtype)
    for kind in ("pickle", "npy"):
        path = tmp_path / f"a.{kind}"
        maps.write_map(path, values.astype(np.float32), np.dtype(dtype).name)
        got = pickles.read_pickle(path) if kind == "pickle" else np.load(path)
        assert got.dtype == dtype
        np.testing.assert_array_equal(got, values)
    with (tmp_path / "a.pickle").open("rb") as file:
        np.testing.assert_array_equal(pickle.load(file), values)


def test_correlations_are_those_of_numpy():
    rng = np.random.default_rng(0)
    a, b = rng.random((30, 4)), rng.random((30, 4))
    a[:, 3] = 2.0
    got = states.correlations(a, b)
    wanted = [np.corrcoef(a[:, g], b[:, g])[0, 1] for g in range(3)]
    np.testing.assert_allclose(got[:3], wanted)
    assert np.isnan(got[3])
    assert np.isnan(states.correlations(a[:2], b[:2])).all()


@pytest.mark.parametrize("mode", ["L", "1", "RGB", "RGBA", "P", "LA", "zero-one", "large"])
def test_a_mask_edited_in_any_program_is_read(sample, mode):
    tissue = np.zeros((28, 42), bool)
    tissue[3:20, 5:30] = True
    grey = Image.fromarray(tissue.astype(np.uint8) * (1 if mode == "zero-one" else 255))
    if mode == "RGB":  # painted red
        grey = Image.fromarray(tissue[..., None] * np.array([255, 0, 0], np.uint8))
    elif mode == "large":
        grey = grey.resize((42 * 16, 28 * 16), Image.Resampling.NEAREST)
    elif mode not in ("L", "zero-one"):
        grey = grey.convert(mode)
    grey.save(sample / "mask.png")
    args = argparse.Namespace(directory=sample, force=False, allow_stale=False)
    stage = utils.Stage(HISTEX.SCRIPT, args)
    np.testing.assert_array_equal(images.read_mask(stage, (28, 42)), tissue)


def test_the_picture_of_a_map_shows_its_values():
    values = np.full((20, 30), np.nan, np.float32)
    values[5:15, 10:20] = 0.0
    values[8:12, 12:16] = 3.0
    values[5, 10] = np.nan
    picture = maps.draw_map(values, "gene")
    times = maps.PLOT_PX // 10  # only the 10 x 10 superpixels of tissue are drawn
    at = {
        name: picture[maps.PLOT_MARGIN_PX + int((r - 4.5) * times), int((c - 9.5) * times)]
        for name, (r, c) in {"outside": (5, 10), "low": (6, 11), "high": (9, 13)}.items()
    }
    assert (at["outside"] == 255).all()
    np.testing.assert_allclose(at["low"], [68, 1, 84], atol=3)  # the ends of viridis
    np.testing.assert_allclose(at["high"], [253, 231, 37], atol=3)


def anchor(maps: np.ndarray, section: Section) -> np.ndarray:
    """Maps (G, h, w), NaN where there is nothing to anchor, anchored."""
    shown = ~np.isnan(maps[0])
    values = maps[:, shown]
    anchors = anchoring.find_anchors(section, np.argwhere(shown))
    anchoring.anchor_to_spots(values, section.counts[section.usable], anchors, PRIOR)
    anchored = maps.copy()
    anchored[:, shown] = values
    return anchored


def disc_sums(maps: np.ndarray, section: Section) -> np.ndarray:
    row, col = section.patches(np.floor(section.spots).astype(int))
    return np.einsum("gnt,nt->ng", np.nan_to_num(maps[:, row, col]), section.areas)


def test_anchored_maps_sum_to_the_counts_of_the_spots(monkeypatch):
    monkeypatch.setattr(anchoring, "COUNTS_AT_ONCE", 500)
    section = make_section()
    before = np.full((G, *SHAPE), 0.2, np.float32)
    before[:, :3] = np.nan
    maps = anchor(before, section)
    assert (np.isnan(maps) == np.isnan(before)).all()

    def missed(maps: np.ndarray) -> np.ndarray:
        prior = PRIOR
        return np.log((disc_sums(maps, section) + prior) / (section.counts + prior))

    sums = disc_sums(maps, section).sum(axis=0)
    np.testing.assert_allclose(sums, section.counts.sum(axis=0), rtol=1e-4)
    assert np.abs(missed(maps)).mean() < 0.35 * np.abs(missed(before)).mean()
    # with one round, at the middle of a spot, its own ratio: 25 counts where 7.4 were predicted
    section.counts[:, 0] = 0.2 * section.areas.sum(axis=1)
    section.counts[5, 0] = 25
    monkeypatch.setattr(anchoring, "ROUNDS", 1)
    one = anchor(np.full((G, *SHAPE), 0.2, np.float32), section)
    predicted = 0.2 * section.areas[5].sum()
    ratio = (25 + PRIOR) / (predicted + PRIOR)
    assert one[0, 15, 17] / one[0, 33, 38] == pytest.approx(ratio, rel=0.1)


def test_anchoring_is_an_interpolation_by_inverse_squared_distance():
    section = make_section()
    before = np.random.default_rng(3).uniform(0.1, 0.4, (G, *SHAPE)).astype(np.float32)
    wanted = before.copy()
    for _ in range(2):  # the second takes up what the first has left
        missed = np.log((section.counts + PRIOR) / (disc_sums(wanted, section) + PRIOR))
        for y, x in np.ndindex(SHAPE):
            squares = ((section.spots - (y + 0.5, x + 0.5)) ** 2).sum(axis=1)
            near = np.argsort(squares)[: anchoring.ANCHORS]
            share = 1 / (squares[near] + 1)
            wanted[:, y, x] *= np.exp(share @ missed[near] / share.sum())
    scale = section.counts.sum(axis=0) / disc_sums(wanted, section).sum(axis=0)
    np.testing.assert_allclose(anchor(before, section), wanted * scale[:, None, None], rtol=1e-4)


def test_anchoring_leaves_a_map_that_fits_as_it_is():
    parents = make_section().parents
    flat = np.full((16, G), 0.5 * np.pi * RADIUS**2, np.float32)
    section = make_section(counts=flat, expression=flat[parents].mean(axis=1))
    section.counts = 0.5 * section.areas.sum(axis=1, keepdims=True).repeat(G, axis=1)
    maps = anchor(np.full((G, *SHAPE), 0.5, np.float32), section)
    np.testing.assert_allclose(maps, 0.5, rtol=1e-5)


def test_a_gene_of_less_than_one_count_in_all_is_scaled_to_it_as_well():
    section = make_section()
    section.counts[:, 2] = 0
    section.counts[0, 2] = 0.5
    maps = anchor(np.full((G, *SHAPE), 0.001, np.float32), section)
    assert disc_sums(maps, section).sum(axis=0)[2] == pytest.approx(0.5, rel=1e-3)


def test_a_gene_that_no_spot_has_stays_without_counts():
    section = make_section()
    section.counts[:, 2] = 0
    maps = anchor(np.full((G, *SHAPE), 0.5, np.float32), section)
    assert (maps[2] == 0).all()
    maps[1] = 0
    assert (anchor(maps, section)[1] == 0).all()  # nothing to scale


# ----- against learning by heart -----
def test_a_patch_hides_the_same_features_in_all_its_superpixels():
    hide = layers.FeatureDropout(0.5)
    x = torch.ones(200, 7, 40)
    torch.manual_seed(0)
    seen = hide(x)
    assert set(seen.unique().tolist()) == {0.0, 2.0}  # what is kept makes up for what is hidden
    assert (seen == seen[:, :1]).all()
    assert (seen[0] != seen[1]).any()
    grid = hide(torch.ones(3, 4, 5, 40))
    assert (grid == grid[:, :1, :1]).all()
    assert float(seen.mean()) == pytest.approx(1, abs=0.03)
    assert torch.equal(hide.eval()(x), x)


def test_averaged_weights_are_the_moving_average():
    network = torch.nn.Linear(2, 1)
    average = progress.Average(network, 0.3)
    wanted, steps = None, [float(i) for i in (1, 5, -2, 4)]
    for n, value in enumerate(steps):
        torch.nn.init.constant_(network.weight, value)
        average.update_parameters(network)
        share = 1 - min(0.3, (1 + n) / (10 + n))
        wanted = value if n == 0 else wanted + share * (value - wanted)
        assert average.module.weight[0, 0].item() == pytest.approx(wanted)


def test_the_state_that_is_kept_has_the_averaged_weights(tmp_path):
    section = make_section()
    averaged, _, _ = train(section, tmp_path / "a", epochs=2)
    without = replace(HISTEX.PRESETS["default"], averaging=None)
    last, _, _ = train(section, tmp_path / "b", row=without, epochs=2)
    moved = [(a - b).abs().max() for a, b in zip(weights(averaged), weights(last), strict=True)]
    assert max(moved) > 0


# ----- uncertainty -----
def test_uncertainty_on_request(finished_sample, finished, capsys):
    """Maps stay as they are; their standard deviation comes, and goes with the next run without."""
    before = disk.sha256(finished / "cnts-super" / "index.csv")
    maps = {path.name: path.read_bytes() for path in (finished / "cnts-super").iterdir()}
    options = trained_options(finished)
    assert run(utils.HISTEX, finished, *options, "--uncertainty") == 0
    assert disk.sha256(finished / "cnts-super" / "index.csv") == before
    index = pd.read_csv(finished / "cnts-super-sd" / "index.csv")
    tissue = np.asarray(Image.open(finished / "mask.png")) > 0
    for file in index["file"]:
        assert (finished / "cnts-super" / file).read_bytes() == maps[file]
        sd = pickles.read_pickle(finished / "cnts-super-sd" / file)
        assert (np.isnan(sd) == ~tissue).all()
        assert (sd[tissue] >= 0).all()
    assert sd[tissue].max() > 0
    assert run(utils.HISTEX, finished, *options) == 0
    assert not (finished / "cnts-super-sd").exists()
    assert "removed cnts-super-sd" in capsys.readouterr().out


def trained_options(directory: Path) -> list[str]:
    """The options that the sample's states were trained with."""
    return json.loads((directory / "HISTEX.json").read_text(encoding="utf-8"))["options"]


def test_what_is_outdated_goes_with_the_end_of_a_run_and_as_a_whole(tmp_path, monkeypatch):
    folder = tmp_path / "cnts-super-sd"
    folder.mkdir()
    for name in ("a.npy", "b.npy"):
        (folder / name).write_bytes(b"old")
    stage = utils.Stage(utils.HISTEX, argparse.Namespace(directory=tmp_path))
    stage.retire(utils.SPREAD)
    stage.discard()  # a run that failed
    assert len(list(folder.iterdir())) == 2

    def cut_off(path, **_):
        (path / "a.npy").unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(utils.shutil, "rmtree", cut_off)
    with pytest.raises(KeyboardInterrupt):
        stage.finish()
    assert not folder.exists()  # half of it would be taken for the user's own


def test_an_edited_standard_deviation_is_not_replaced(finished, capsys):
    (finished / "cnts-super-sd").mkdir()
    (finished / "cnts-super-sd" / "notes.txt").write_text("mine", encoding="utf-8")
    assert run(utils.HISTEX, finished, *trained_options(finished), "--seed", "3") == 2
    assert "cnts-super-sd was not written by HISTEX.py" in capsys.readouterr().err
    assert (finished / "cnts-super-sd" / "notes.txt").exists()


def test_the_published_preset_has_no_uncertainty(finished, capsys):
    assert run(utils.HISTEX, finished, "--preset", "published", "--uncertainty") == 2
    assert "published preset has none" in capsys.readouterr().err


# ----- runs that are cut off, and several processes -----
def test_finished_genes_are_not_predicted_again(finished, monkeypatch):
    monkeypatch.setattr(prediction, "GENES_BYTES", 1)  # gene by gene
    original, asked = prediction.Decoder.maps, []
    assert run(utils.HISTEX, finished, *trained_options(finished), "--force") == 0
    wanted = {
        path: path.read_bytes()
        for name in ("cnts-super", "cnts-super-plots")
        for path in (finished / name).iterdir()
    }

    def maps(self, genes):
        if len(asked) == 3:
            raise KeyboardInterrupt
        asked.append(genes.start)
        return original(self, genes)

    options = [*trained_options(finished), "--force"]
    with monkeypatch.context() as cut_off:
        cut_off.setattr(prediction.Decoder, "maps", maps)
        assert run(utils.HISTEX, finished, *options) == 130
    assert not list(finished.glob(".cnts-super*partial*"))
    (work,) = finished.glob(".cnts-super.*.work")
    done = sorted((work / "cnts-super").iterdir())
    assert [path.name for path in done] == ["GENE0.pickle", "GENE1.pickle", "GENE2.pickle"]

    asked.clear()
    asked.extend([-1] * 3)
    monkeypatch.setattr(
        prediction.Decoder, "maps", lambda self, g: asked.append(g.start) or original(self, g)
    )
    assert run(utils.HISTEX, finished, *options) == 0
    assert asked[3:] == [3, 4, 5, 6, 7]
    assert not list(finished.glob(".cnts-super.*.work"))
    assert {path: path.read_bytes() for path in wanted} == wanted
    # other options: nothing of what was left counts
    (finished / work.name / "cnts-super").mkdir(parents=True)
    (finished / work.name / "cnts-super" / "GENE0.npy").write_bytes(b"no map")
    assert run(utils.HISTEX, finished, *options, "--map-format", "npy") == 0
    assert np.load(finished / "cnts-super" / "GENE0.npy").shape == (28, 42)


@pytest.mark.parametrize("links", [True, False])
def test_two_runs_at_once_both_write_whole_maps(finished_sample, finished, monkeypatch, links):
    """The other run ends, and takes what both share, while this one is amid its genes."""
    monkeypatch.setattr(prediction, "GENES_BYTES", 1)
    if not links:  # as on a disk that knows no second names
        monkeypatch.setattr(
            os, "link", lambda *_: (_ for _ in ()).throw(PermissionError("no links"))
        )
    original, calls = prediction.Decoder.maps, []
    options = trained_options(finished)

    def maps(self, genes):
        calls.append(genes.start)
        if len(calls) == 3:  # by now, two genes wait in the folder that the other run finds
            assert run(utils.HISTEX, finished, *options, "--force") == 0
            assert calls == [0, 1, 2, 2, 3, 4, 5, 6, 7]
        return original(self, genes)

    monkeypatch.setattr(prediction.Decoder, "maps", maps)
    assert run(utils.HISTEX, finished, *options, "--force") == 0
    assert calls[9:] == [3, 4, 5, 6, 7]
    index = pd.read_csv(finished / "cnts-super" / "index.csv")
    assert len(index) == 8
    for file in index["file"]:
        got, wanted = (
            pickles.read_pickle(d / "cnts-super" / file) for d in (finished, finished_sample)
        )
        np.testing.assert_allclose(got, wanted, rtol=1e-3)
    assert not list(finished.glob(".cnts-super*"))


def test_maps_of_half_the_size_on_request(finished_sample, finished, capsys):
    assert run(utils.HISTEX, finished, *trained_options(finished), "--dtype", "float16") == 0
    assert "8 genes, 28 x 42, float16" in capsys.readouterr().out
    for path in (finished_sample / "cnts-super").glob("*.pickle"):
        got = pickles.read_pickle(finished / "cnts-super" / path.name)
        wanted = pickles.read_pickle(path)
        assert got.dtype == np.float16
        np.testing.assert_array_equal(got, wanted.astype(np.float16))


def test_a_disk_that_cannot_take_the_maps_is_named_before_any_work(finished, monkeypatch, capsys):
    usage = shutil.disk_usage(finished)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10**5))
    assert run(utils.HISTEX, finished, *trained_options(finished), "--seed", "7") == 2
    captured = capsys.readouterr()
    assert "but only 100 kB are free" in captured.err
    assert "state 0" not in captured.out


def test_the_published_preset_runs_whole(finished):
    options = ("--preset", "published", "--epochs", "2", "--n-states", "2", "--n-plots", "1")
    assert run(utils.HISTEX, finished, *options) == 0
    values = pickles.read_pickle(finished / "cnts-super" / "GENE0.pickle")
    tissue = np.asarray(Image.open(finished / "mask.png")) > 0
    assert (np.isnan(values) == ~tissue).all()
    assert pd.read_csv(finished / "held-out-r.csv")["held_out_r"].isna().all()


THREE_GENES_AT_ONCE = """
import sys
sys.path.insert(0, {root!r})
import HISTEX
from method import prediction
genuine = prediction.Decoder.maps
prediction.GENES_BYTES = 3 * 4 * 28 * 42
def maps(self, genes):
    sys.stderr.write(f"decoded {{genes.start}} {{genes.stop}}\\n")  # in one piece
    return genuine(self, genes)
prediction.Decoder.maps = maps
sys.exit(HISTEX.run(sys.argv[1:]))
"""


@pytest.mark.parametrize("n_processes", [2, 4])
def test_processes_share_states_and_genes(n_processes, finished_sample, tmp_path, monkeypatch):
    """By torchrun, to the same bytes as one process with as many threads each."""
    options = [*PIPELINE[-1][1:], "--n-states", "3"]
    one, more = (Path(shutil.copytree(finished_sample, tmp_path / name)) for name in ("1", "more"))
    for directory in (one, more):
        shutil.rmtree(directory / "states")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(prediction, "GENES_BYTES", 3 * 4 * 28 * 42)
    assert run(utils.HISTEX, one, *options) == 0
    torch.set_num_threads(threads)
    script = tmp_path / "three.py"
    script.write_text(THREE_GENES_AT_ONCE.format(root=str(ROOT)), encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={n_processes}", str(script), "--directory", str(more), *options]
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    together = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert together.returncode == 0, together.stderr
    assert together.stdout.count("wrote cnts-super:") == 1
    assert sorted(re.findall(r"decoded (\d \d)", together.stderr)) == ["0 3", "3 6", "6 8"]
    names = ["held-out-r.csv", *(f"states/{i:02d}/model.safetensors" for i in range(3))]
    names += [f"cnts-super/{path.name}" for path in (one / "cnts-super").iterdir()]
    for name in [*names, "embeddings-gene.pickle"]:
        assert (one / name).read_bytes() == (more / name).read_bytes(), name
    assert sorted(p.name for p in one.iterdir()) == sorted(p.name for p in more.iterdir())
