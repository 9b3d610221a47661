"""Prediction: trained networks go over the section, and maps of genes are decoded.

Letters in shapes: B patches, T superpixels of a patch, D width, G genes, K HR points, L latent
values, M superpixels that are shown, P HR points, S states.
"""

from __future__ import annotations

import contextlib
import io
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from io import BufferedRandom
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor

from method import devices
from method.anchoring import (
    COUNTS_AT_ONCE,
    anchor_to_spots,
    find_anchors,
    nearest_points,
    weighted_sums,
)
from method.devices import to_device
from method.linear import Linear
from method.network import Network
from method.section import Section, nearest, on_map
from reading import arrays
from writing.progress import Bar

GENES_BYTES = 800_000_000  # memory for the maps of the genes that are decoded at a time
GENES_ALIGNED = 16  # products of 144 genes take half the time of products of 143
OVERLAP = 1  # superpixels that neighbouring patches share; more changes no score (ABLATIONS.md)
PREDICT_BATCH = 64  # patches
STRIP = 64  # columns embedded at a time; small enough for memory that is free already
POINTS_BYTES = 16_384_000  # of HR points embedded at a time: 4096 of 1,000 genes
NOTHING = torch.empty(0)


def blending(side: int, overlap: bool) -> tuple[int, np.ndarray]:
    """Stride of the patches, and weights (T,) of the superpixels in a patch of ``side``.

    Side by side, or with ``overlap`` such that a patch fades where the next one begins.
    """
    shared = min(OVERLAP, (side - 1) // 2) if overlap else 0
    place = np.arange(1, side + 1)
    fade = np.minimum(np.minimum(place, place[::-1]), shared + 1).astype(np.float32)
    return side - shared, np.outer(fade, fade).ravel()


def patch_middles(half: int, stride: int, extent: int) -> np.ndarray:
    """Middles of the patches along one side of the map."""
    first = half if stride > half + 1 else 0  # blocks begin in the corner
    return np.arange(first, extent + stride - 1, stride)


def patch_centres(section: Section, stride: int, shown: np.ndarray) -> np.ndarray:
    """Centres (B, 2), row by row, of the patches that cover what is shown of the map (h, w)."""
    h, w = shown.shape
    rows, cols = (patch_middles(section.half, stride, extent) for extent in (h, w))
    centres = np.stack(np.meshgrid(rows, cols, indexing="ij"), axis=-1).reshape(-1, 2)
    row, col = section.patches(centres)
    reached = on_map(row, col, h, w) & shown[row.clip(0, h - 1), col.clip(0, w - 1)]
    return centres[reached.any(axis=1)]


class Batches:
    """Goes through n items in batches that fit the memory of the device."""

    def __init__(self, size: int) -> None:
        self.size = size

    def over(self, n: int, compute: Callable[[slice], Any]) -> Iterator[tuple[slice, Any]]:
        """Yield every part of 0..n with ``compute(part)``; halves the batch if memory runs out."""
        done = 0
        while done < n:
            part = slice(done, min(done + self.size, n))
            try:
                result = compute(part)
            except RuntimeError as error:
                if not devices.is_out_of_memory(error) or self.size == 1:
                    raise
                self.size //= 2  # the maps do not depend on it
                continue
            yield part, result
            done = part.stop


class HistologyRows:
    """Histology of the rows that a row of patches covers, embedded by each of S networks.

    Rows that the next row of patches covers too are kept, so that each is embedded once. On the
    left and on the right is a margin, as wide as a patch may reach out of the map; there, the
    border's tokens are repeated.
    """

    def __init__(
        self, networks: list[Network], section: Section, centres: np.ndarray, device: torch.device
    ) -> None:
        self.networks, self.section, self.device = networks, section, device
        self.margin = margin = 2 * section.half
        self.top, self.rows = -2 * margin - 2, [torch.empty(0)] * len(networks)  # none yet
        self.reached = np.pad(np.zeros_like(section.tissue), margin)  # by any patch
        for row, col in zip(*(x.T for x in section.patches(centres)), strict=True):
            self.reached[row + margin, col + margin] = True

    def at(self, top: int) -> list[Tensor]:
        """The rows from ``top`` on, (2 half + 1, w + 2 margins, D) of each network."""
        side = 2 * self.section.half + 1
        kept = max(self.top + side - top, 0)
        fresh = zip(*self.strips(top + kept, top + side), strict=True)
        for number, strips in enumerate(fresh):
            rows = torch.cat(strips, dim=1)
            self.rows[number] = torch.cat([self.rows[number][-kept:], rows]) if kept else rows
        self.top = top
        return self.rows

    def strips(self, top: int, bottom: int) -> Iterator[list[Tensor]]:
        """The rows top..bottom from left to right in strips, (rows, columns, D) of each network."""
        h, w = self.section.tissue.shape
        network, margin = self.networks[0], self.margin
        halo, width = network.halo, w + 2 * margin
        inside = to_device(self.reached[top + margin : bottom + margin], self.device)
        rows = np.arange(top - halo, bottom + halo).clip(0, h - 1)
        block = arrays.some_rows(self.section.tokens, rows[0], rows[-1] + 1)
        for left in range(0, width, STRIP):
            right = min(left + STRIP, width)
            columns = np.arange(left - halo, right + halo) - margin
            tokens = block[np.ix_(rows - rows[0], columns.clip(0, w - 1))]
            # All networks see alike, for tokens are standardised by the section
            views = network.views(to_device(tokens, self.device).float()[None])[0]
            yield self.embed(views, inside[:, left:right])

    def embed(self, views: Tensor, inside: Tensor) -> list[Tensor]:
        """Embed the views (rows, columns, 3 F) that are inside; 0 elsewhere."""
        if inside.all():
            return [network.embed_histology(views[None])[0] for network in self.networks]
        views, strips = views[inside][None], []
        for network in self.networks:
            embedded = network.embed_histology(views)[0]
            strip = embedded.new_zeros(*inside.shape, embedded.shape[-1])
            strip[inside] = embedded
            strips.append(strip)
        return strips


def embed_points(networks: list[Network], section: Section, device: torch.device) -> list[Tensor]:
    """The embedded expression of all HR points, (P, D), by each network."""
    contexts: list[list[Tensor]] = [[] for _ in networks]
    step = max(1, POINTS_BYTES // section.expression[:1].nbytes)
    for start in range(0, len(section.points), step):
        expression = to_device(section.expression[start : start + step], device)
        for context, network in zip(contexts, networks, strict=True):
            context.append(network.embed_expression(expression))
    return [torch.cat(parts) for parts in contexts]


class OpenRows:
    """Sums over overlapping patches of the rows that the present row of patches covers.

    There are as many as a patch has rows; each lies where its number modulo the side tells.
    """

    def __init__(self, n: int, hill: np.ndarray, width: int, size: int, device: torch.device):
        self.side, self.hill = math.isqrt(len(hill)), to_device(hill[:, None], device)
        self.width, self.steps = width, torch.arange(self.side, device=device)
        self.total = torch.zeros(n, self.side, width, size, device=device)
        self.weight = torch.zeros(self.side, width, 1, device=device)

    def lines(self, top: int) -> Tensor:
        return (top + self.steps) % self.side

    def add(self, top: int, left: Tensor, fused: list[Tensor]) -> None:
        """Add latent values (B, T, L), by each network, of patches from ``top``, ``left`` on."""
        columns = left[:, None, None] + self.steps
        where = (self.lines(top)[:, None] * self.width + columns).flatten()
        self.weight.view(-1, 1).index_add_(0, where, self.hill.repeat(len(left), 1))
        for sums, values in zip(self.total, fused, strict=True):
            rows = sums.view(-1, sums.shape[-1])
            rows.index_add_(0, where, (values * self.hill).flatten(0, 1))

    def mean(self, row: int, columns: slice) -> Tensor:
        """Weighted means (S, columns, L) of a row."""
        line = row % self.side
        return self.total[:, line, columns] / self.weight[line, columns]

    def free(self, top: int, stop: int) -> None:
        """Rows top..stop are done."""
        lines = self.lines(top)[: stop - top]
        for sums in (*self.total, self.weight):
            sums[lines] = 0


def latent_rows(
    networks: list[Network],
    section: Section,
    shown: np.ndarray,
    overlap: bool,
    device: torch.device,
) -> Iterator[tuple[int, Tensor]]:
    """Go down the map and yield (row, latent values (S, w, L)) of S networks.

    Patches overlap and are blended by their weights. What no patch reaches is NaN.
    """
    half, (h, w) = section.half, section.tissue.shape
    side = 2 * half + 1
    stride, hill = blending(side, overlap)
    centres = patch_centres(section, stride, shown)
    near = nearest(section.points, centres + 0.5, min(section.context, len(section.points)))
    strips = HistologyRows(networks, section, centres, device)
    expression = embed_points(networks, section, device)
    margin = strips.margin
    size = networks[0].latent_size
    blended = OpenRows(len(networks), hill, w + 2 * margin, size, device)

    def fuse(patches: np.ndarray, rows: list[Tensor], part: slice) -> list[Tensor]:
        """Latent values (B, T, L) of a part of a row's patches (indices), by each network."""
        centre, points = centres[patches[part]], near[patches[part]]
        offsets = (centre[:, None] + 0.5 - section.points[points]).astype(np.float32)
        offsets_there, points_there = to_device(offsets, device), to_device(points, device)
        left = to_device(centre[:, 1] - half + margin, device)
        fused = []
        for network, embedded, context in zip(networks, rows, expression, strict=True):
            histology = embedded.unfold(1, side, 1)[:, left]  # (side, B, D, side)
            histology = histology.permute(1, 0, 3, 2).flatten(1, 2)
            fused.append(network.fuse(histology, context[points_there], offsets_there))
        return fused

    batches = Batches(PREDICT_BATCH)
    middles = patch_middles(half, stride, h)
    for row in Bar(middles, "histology"):
        here, top = np.flatnonzero(centres[:, 0] == row), row - half
        rows = strips.at(top) if len(here) else []
        for part, fused in batches.over(len(here), partial(fuse, here, rows)):
            left = to_device(centres[here[part], 1] - half + margin, device)
            blended.add(top, left, fused)
        stop = top + stride if row != middles[-1] else h
        for done in range(max(top, 0), min(stop, h)):
            yield done, blended.mean(done, slice(margin, margin + w))
        blended.free(top, stop)


@contextlib.contextmanager
def latent_files(
    directory: Path, work: Path, ranks: devices.Ranks
) -> Iterator[list[BufferedRandom]]:
    """A file for the latent values of every process, each of which may read all of them.

    That of a process which is alone has no name and ends with it. Those of several lie in the
    folder ``work``, and go with it. Runs beside each other write the same bytes into them.
    """
    with contextlib.ExitStack() as files:
        if ranks.world == 1:
            yield [files.enter_context(tempfile.TemporaryFile(dir=directory))]
            return
        work.mkdir(exist_ok=True)
        paths = [work / f"latent-{rank}" for rank in range(ranks.world)]
        for path in paths:
            path.touch()
        yield [files.enter_context(path.open("r+b")) for path in paths]


def embed_section(
    networks: list[Network],
    section: Section,
    shown: np.ndarray,
    overlap: bool,
    file: BufferedRandom,
    device: torch.device,
) -> None:
    """Write the latent values of the M superpixels that are shown, float32 (M, S, L), to a file.

    Nothing is written without networks. ``shown`` is (h, w) bool.
    """
    if not networks:
        return
    for network in networks:
        network.eval()
    with torch.inference_mode():
        for row, latent in latent_rows(networks, section, shown, overlap, device):
            values = latent.transpose(0, 1).cpu()[torch.from_numpy(shown[row])]
            file.write(values.contiguous().numpy().data)
    file.flush()


def read_latent(file: BufferedRandom, n: int, width: int) -> np.ndarray:
    """The next ``n`` superpixels of a file, float32 (n, width)."""
    values = np.empty((n, width), np.float32)
    file.readinto(values.data)
    return values


def read_embedding(file: BufferedRandom, networks: list[Network], shown: np.ndarray) -> np.ndarray:
    """The embedding (D, h, w) of the first network of a file; NaN where nothing is shown (h, w).

    It is a part of the latent values. At 11 mm it takes 1 GB: read it when the decoder is gone.
    """
    size, width = networks[0].embedding_size, len(networks) * networks[0].latent_size
    embedding = np.full((size, *shown.shape), np.nan, np.float32)
    file.seek(0)
    for row, there in enumerate(shown):
        embedding[:, row, there] = read_latent(file, int(there.sum()), width)[:, :size].T
    return embedding


class Decoder:
    """Maps of genes from the latent values in files, some genes at a time.

    Each of the files holds those of some networks, which follow each other in ``networks``.

    So neither grows the memory with the number of genes, nor does a run that was cut off lose more
    than the genes it was at. ``anchor_prior`` None leaves the maps without
    anchoring. ``linear_share`` is the share of the linear model in the logarithm of the counts.
    """

    def __init__(
        self,
        networks: list[Network],
        section: Section,
        shown: np.ndarray,
        anchor_prior: float | None,
        files: Sequence[BufferedRandom],
        device: torch.device,
        linear_share: float = 0.0,
    ) -> None:
        self.networks, self.section, self.files, self.device = networks, section, files, device
        self.shown, self.places = shown, np.argwhere(shown)
        self.size = networks[0].latent_size
        if networks[0].interpolates:
            self.near, self.distance2 = nearest_points(section.points, self.places, section.context)
        self.prior = anchor_prior
        self.anchors = None if anchor_prior is None else find_anchors(section, self.places)
        self.linear_share = linear_share
        self.linear = None
        if section.linear is not None and linear_share > 0:
            self.linear = Linear(section.linear, section, shown, device)
        n_genes = max(part.stop - part.start for part in self.blocks())
        self.memory = np.empty((n_genes, len(self.places)), np.float32)  # anew takes long

    def blocks(self) -> list[slice]:
        """The genes in parts whose maps fit the memory, about equal and quick to multiply."""
        n_genes = self.section.counts.shape[1]
        most = max(1, GENES_BYTES // (4 * len(self.places)))
        size = -(-n_genes // -(-n_genes // most))
        if most >= GENES_ALIGNED:
            size = min(size + -size % GENES_ALIGNED, most - most % GENES_ALIGNED)
        return [slice(i, min(i + size, n_genes)) for i in range(0, n_genes, size)]

    def maps(self, genes: slice) -> np.ndarray:
        """Median of the networks, with the linear model's share, anchored: (G', M).

        It is there until the next call, which uses its memory again.
        """
        n, n_genes = len(self.places), genes.stop - genes.start
        maps = self.memory[:n_genes]
        columns = np.ascontiguousarray(self.section.expression[:, genes])
        expression = to_device(columns, self.device)
        told = None
        if self.linear is not None:
            told = partial(self.linear.log_counts, genes=self.linear.of_genes(genes))
        batches = Batches(max(1, COUNTS_AT_ONCE // n_genes))
        decode = partial(self.decode, genes=genes, expression=expression, told=told)
        with torch.inference_mode():
            for part, medians in batches.over(n, decode):
                maps[:, part] = cv2.transpose(medians.cpu().numpy()).reshape(n_genes, -1)
        if self.anchors is not None and self.prior is not None:
            measured = self.section.counts[self.section.usable, genes]
            anchor_to_spots(maps, measured, self.anchors, self.prior)
        return maps

    def latent(self, part: slice) -> np.ndarray:
        """Latent values (M', S, L) of some superpixels."""
        parts = []
        for file in self.files:
            bytes_each = file.seek(0, io.SEEK_END) // len(self.places)
            file.seek(part.start * bytes_each)
            parts.append(read_latent(file, part.stop - part.start, bytes_each // 4))
        values = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)
        return values.reshape(len(values), -1, self.size)

    def decode(
        self,
        part: slice,
        genes: slice,
        expression: Tensor,
        told: Callable[[slice], Tensor] | None,
    ) -> Tensor:
        """Median (M', G') of some superpixels and genes, mixed with what the linear model told."""
        latent, outputs = to_device(self.latent(part), self.device), []
        for number, network in enumerate(self.networks):
            interpolated = NOTHING
            if network.interpolates:
                near = to_device(self.near[part], self.device)
                shares = network.interpolation(to_device(self.distance2[part], self.device))
                interpolated = weighted_sums(near, shares, expression)
            outputs.append(network.decode(latent[:, number], interpolated, genes))
        if self.networks[0].counts_alike:  # one or two conversions in place of one for each state
            maps = mean_of([network.to_counts(x, genes) for x in middle_of(outputs)])
        else:
            to_counts = [network.to_counts for network in self.networks]
            maps = median_of([f(x, genes) for f, x in zip(to_counts, outputs, strict=True)])
        if told is None:
            return maps
        return maps.pow(1 - self.linear_share).mul_(told(part).mul_(self.linear_share).exp_())


def median_of(maps: Sequence[Tensor]) -> Tensor:
    """Median of tensors, as numpy's: the mean of the two middle ones of an even number."""
    return mean_of(middle_of(maps))


def mean_of(maps: Sequence[Tensor]) -> Tensor:
    return maps[0] if len(maps) == 1 else sum(maps[1:], maps[0]) / len(maps)


def middle_of(maps: Sequence[Tensor]) -> list[Tensor]:
    """The tensor in the middle, everywhere by itself; two if their number is even.

    Take more than half of the values: neither the smallest nor the largest is in the middle. Leave
    these two out, take one more value, and go on until all have been taken. With few states that is
    ten times as fast as np.median, and torch.median takes the lower of the two.
    """
    first = len(maps) // 2 + 2
    kept, rest = list(maps[:first]), list(maps[first:])
    while len(kept) > 2:
        for inner, outer in ((torch.maximum, torch.minimum), (torch.minimum, torch.maximum)):
            kept = without_outermost(kept, inner, outer)
        kept += rest[:1]
        del rest[:1]
    return kept


def without_outermost(
    maps: Sequence[Tensor], inner: Callable[..., Tensor], outer: Callable[..., Tensor]
) -> list[Tensor]:
    """All but the outermost value, by a pass that carries it along: minimum or maximum."""
    carried, last, kept = maps[0], len(maps) - 1, []
    for i, values in enumerate(maps[1:], 1):
        kept.append(inner(carried, values))
        if i < last:
            carried = outer(carried, values)
    return kept
