"""Plain ways, what one would write first, and limits of the machine, for benchmarks/scaling.py.

Each gets the folder of a section, its size and the facts of the stage just measured. What is
imported at the head of this file is not timed.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import math
import os
import re
import resource
import runpy
import shutil
import sys
import time
import timeit
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd
import pyvips
from scipy.cluster.vq import kmeans2
from scipy.spatial.distance import cdist

import utils
from benchmarks import synthetic
from benchmarks.measure import KILOBYTES, Facts, run_measured

JPEG_QUALITY = 95  # of he.jpg
BARE_SECONDS = 5.0  # for which a network is timed, at least
KMEANS_ROUNDS = 10
PRODUCTS = re.compile(r"::(addmm|mm|bmm|baddbmm)$")
ATTENTION = re.compile(r"::_scaled_dot_product.*$")  # its products and its softmax
MATMUL_SIDE, MATMUL_ROUNDS = 2048, 8
WRITTEN_BLOCKS = 60  # of 16 MiB, by which the speed of the disk is measured


def timed(way: str, folder: Path, size: int, stage: Facts) -> Facts:
    """Seconds and peak memory of a function of this file, unless it tells its own."""
    start = time.perf_counter()
    facts: Facts | None = globals()[way](folder, size, stage)
    seconds = time.perf_counter() - start
    gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * KILOBYTES / 1e9
    return {"seconds": seconds, "gb": gb, **(facts or {})}


def padded(side: int) -> int:
    """Side of he.jpg for a scan at half its pixel size."""
    return math.ceil(side / 2 / utils.TILE_PX) * utils.TILE_PX


def by_opencv(folder: Path, side: int, stage: Facts) -> None:
    raw = np.asarray(cv2.imread(str(folder / "he-raw.tif")))
    half = cv2.resize(raw, None, None, 0.5, 0.5, cv2.INTER_AREA)
    more = padded(side) - len(half)
    image = cv2.copyMakeBorder(half, 0, more, 0, more, cv2.BORDER_CONSTANT, None, [255] * 3)
    cv2.imwrite(str(folder / "plain.jpg"), image, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])


def by_libvips(folder: Path, side: int, stage: Facts) -> None:
    raw = pyvips.Image.new_from_file(str(folder / "he-raw.tif"), access="sequential")
    image = raw.shrink(2, 2).embed(0, 0, padded(side), padded(side), extend="white")
    image.jpegsave(str(folder / "limit.jpg"), Q=JPEG_QUALITY, subsample_mode="off")


def all_pairs(folder: Path, spots: int, stage: Facts) -> None:
    locs = pd.read_csv(folder / utils.LOCS.name, index_col=0)
    counts = pd.read_csv(folder / utils.CNTS.name, index_col=0).loc[locs.index]
    distance = cdist(locs, locs)
    np.fill_diagonal(distance, np.inf)
    near = distance < 1.2 * np.median(distance.min(axis=1))
    first, second = np.nonzero(np.triu(near))
    for name, values in (("counts", counts), ("places", locs)):
        array = values.to_numpy(np.float32)
        between = (array[first] + array[second]) / 2
        np.save(folder / f"plain-{name}.npy", np.concatenate([array, between]))


def table_alone(folder: Path, spots: int, stage: Facts) -> None:
    pd.read_csv(folder / utils.CNTS.name, index_col=0)


def tile_by_tile(folder: Path, side: int, stage: Facts) -> Facts:
    tile = (utils.TOKENS_PER_TILE, utils.TOKENS_PER_TILE)
    return network(tile, 1, stage["turns"] * math.ceil(side / utils.TILE_PX) ** 2)


def network_alone(folder: Path, side: int, stage: Facts) -> Facts:
    """As many tiles as the stage ran, as large, in as many ways up."""
    import Histology_Extractor as extractor

    rows, columns = (extractor.CNN_TILING.side(extent) for extent in stage["grid"])
    computed = stage["tiles"] * rows * columns / math.prod(stage["grid"])
    facts = network((rows, columns), stage["batch"], stage["tiles"])
    return {"seconds": stage["turns"] * facts["seconds"], "computed": computed}


def network(tile: tuple[int, int], batch: int, tiles: int) -> Facts:
    """Seconds of the embedded network for so many tiles (rows, columns in tokens) of noise.

    By one batch over and over, for BARE_SECONDS at least. The C library keeps freed memory, as in
    the script: without that the network is up to twice as slow, and no limit to the script.
    """
    import torch

    import Histology_Extractor as extractor

    extractor.keep_freed_memory()
    model = extractor.load_backbone(extractor.LITE, None, None).model
    pixels = np.random.default_rng(0).random((batch, 3, *tile), np.float32) * 2 - 1
    x = torch.nn.functional.interpolate(torch.from_numpy(pixels), scale_factor=utils.TOKEN_PX)
    done, seconds = 0, 0.0
    with torch.inference_mode():
        extractor.tile_tokens(model, x)
        start = time.perf_counter()
        while seconds < BARE_SECONDS:
            extractor.tile_tokens(model, x)
            done, seconds = done + batch, time.perf_counter() - start
    sample = {"sample": f"{done:,} of {tiles:,} tiles"} if done < tiles else {}
    return {"seconds": seconds * tiles / done, **sample}


def cluster_in_two(folder: Path, side: int, stage: Facts) -> None:
    tokens = np.load(folder / utils.FEATURES.name).astype(np.float32)
    tokens = tokens.reshape(-1, tokens.shape[2])
    kmeans2(tokens, 2, iter=KMEANS_ROUNDS, minit="points", rng=0)


def reading_alone(folder: Path, side: int, stage: Facts) -> None:
    with (folder / utils.FEATURES.name).open("rb") as file, Path(os.devnull).open("wb") as null:
        shutil.copyfileobj(file, null, 1 << 24)


def training_loop(folder: Path, spots: int, stage: Facts) -> Facts:
    """The default network on the same patches, by a data loader and an optimizer as torch has them.

    Every patch is read when its turn comes, all its superpixels are computed, and that is all:
    nothing is scored, averaged, kept or written. So many steps as fit into BARE_SECONDS count.
    """
    import torch
    from torch.utils.data import DataLoader

    import HISTEX
    from method.section import read_section, split_spots

    args = argparse.Namespace(directory=folder, force=False, allow_stale=False)
    preset, cpu = HISTEX.PRESETS["default"], torch.device("cpu")
    with contextlib.redirect_stdout(io.StringIO()):
        sample = utils.Stage(utils.HISTEX, args)
        section = read_section(sample, preset.context, preset.by_area)[0]
    split = split_spots(section, preset.holds_out, seed=0, index=0)
    network = preset.network(section, split.train).train()
    optimizer = torch.optim.AdamW(network.parameters(), preset.learning_rate)

    class Patches(torch.utils.data.Dataset[list[torch.Tensor]]):
        def __len__(self) -> int:
            return len(split.train)

        def __getitem__(self, number: int) -> list[torch.Tensor]:
            spot = split.train[[number]]
            centre = np.floor(section.spots[spot]).astype(int)
            inputs = section.inputs(centre, split.near[spot], network.halo, cpu)
            arrays = (section.areas[spot], section.counts[spot])
            return [tensor[0] for tensor in (*inputs, *map(torch.from_numpy, arrays))]

    batches = DataLoader(Patches(), preset.batch_size, shuffle=True)
    steps, done, start = len(batches) * stage["epochs"] * stage["states"], 0, time.perf_counter()
    for *inputs, areas, counts in itertools.chain.from_iterable(itertools.repeat(batches)):
        optimizer.zero_grad()
        network.loss(network(*inputs), areas, counts).mean().backward()
        optimizer.step()
        done, seconds = done + 1, time.perf_counter() - start
        if done == steps or seconds > BARE_SECONDS:
            break
    less = {"sample": f"{done:,} of {steps:,} steps"} if done < steps else {}
    return {"seconds": seconds * steps / done, **less}


def training_products(folder: Path, spots: int, stage: Facts) -> Facts:
    speed = matmul_speed()
    seconds = stage["of_spot"] * spots * stage["epochs"] * stage["states"] / speed
    return {"seconds": seconds, "speed": f"{speed / 1e9:,.0f} GFLOP/s"}


def prediction_products(folder: Path, side: int, stage: Facts) -> Facts:
    speed, disk = matmul_speed(), write_speed(folder)
    return {
        "seconds": stage["of_superpixel"] * side**2 * stage["states"] / speed,
        "products": stage["products"],
        "speed": f"{speed / 1e9:,.0f} GFLOP/s; of the seconds of a small map with several states, "
        f"{stage['products']:.0%} are in plain products and {stage['attention']:.0%} in attention, "
        f"whose products cannot be told from its softmax; "
        f"writing the maps alone, synced at {disk / 1e9:.2f} GB/s, takes "
        f"{4 * side**2 * synthetic.GENES / disk:,.0f} s at the largest size",
    }


def matmul_speed() -> float:
    """Floating point operations per second of a plain product of float32 matrices."""
    import torch

    a, b = torch.rand(2, MATMUL_SIDE, MATMUL_SIDE)
    return 2 * MATMUL_SIDE**3 / min(timeit.repeat(lambda: a @ b, number=1, repeat=MATMUL_ROUNDS))


def write_speed(folder: Path) -> float:
    """Bytes per second of writing to the disk itself."""
    block, start = os.urandom(1 << 24), time.perf_counter()
    with (folder / "limit.bin").open("wb") as file:
        file.writelines([block] * WRITTEN_BLOCKS)
        file.flush()
        os.fsync(file.fileno())
    return WRITTEN_BLOCKS * len(block) / (time.perf_counter() - start)


def watched(command: list[str], watch: contextlib.AbstractContextManager[Any]) -> Any:
    """Run a script in this process, within a context that watches torch; returns the context."""
    sys.argv = command[1:]
    with watch as seen, contextlib.redirect_stdout(io.StringIO()):
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as end:
            if end.code:
                raise RuntimeError(f"{command} ended with {end.code}") from end
    return seen


def count_products(folder: Path, log: Path, one: list[str], several: list[str]) -> Facts:
    """What a small section tells of HISTEX.py, run there by two commands: one state, and several.

    Floating point operations of one state in matrix products: of a spot in an epoch of training,
    and of a superpixel in prediction. And the share of the seconds of prediction inside of plain
    products and of attention, with several states.
    """
    from torch.profiler import ProfilerActivity, profile
    from torch.utils.flop_counter import FlopCounterMode

    whole, prediction = (
        watched(one, FlopCounterMode(display=False)).get_total_flops() for _ in range(2)
    )
    if not 0 < prediction < whole:
        raise RuntimeError(f"a run was idle: {whole:,} operations, {prediction:,} without training")
    run_measured(several, log)  # trains the others; these seconds are without the profiler
    record = (folder / utils.record_name(utils.HISTEX)).read_text(encoding="utf-8")
    microseconds = 1e6 * json.loads(record)["seconds_prediction"]
    events = watched(several, profile(activities=[ProfilerActivity.CPU])).key_averages()
    products, attention = (
        sum(e.self_cpu_time_total for e in events if names.search(e.key)) / microseconds
        for names in (PRODUCTS, ATTENTION)
    )
    return {
        "of_spot": (whole - prediction) / len(pd.read_csv(folder / utils.LOCS.name)),
        "of_superpixel": prediction / np.load(folder / utils.RGB.name).shape[0] ** 2,
        "products": products,
        "attention": attention,
    }
