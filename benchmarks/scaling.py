"""Measure every stage at four sizes, beside a plain way to do the same and the machine's limit.

    python benchmarks/scaling.py --keep FOLDER                   up to a slide of 11 mm, for hours
    python benchmarks/scaling.py --keep FOLDER --sizes small --output small.md         for minutes
    python benchmarks/scaling.py --keep FOLDER --stages Histology_Extractor --sizes 21952
    python benchmarks/scaling.py --keep FOLDER --sizes middle --before CHECKOUT     before and after
    python benchmarks/scaling.py --keep FOLDER --section-mm 11   only write the files of a section

Inputs are synthesised: H&E with nuclei, fibres and noise, which costs a codec what a scan costs it;
Poisson counts on Visium's lattice; random tokens. What earlier stages would have written gets their
record. Each stage then runs as its user runs it, in a process of its own, whose wall seconds, CPU
seconds and largest resident memory (mapped pages of files included) are those of the operating
system. HISTEX.py is measured twice: its training until the states are on the disk, where the
process is killed, and another run, which finds the states and predicts.

In the same run, right after the stage: the plain way and the limit of the machine, both named in
the table, in processes of their own that are timed without their imports. A growth exponent is the
slope of a line through log time against log size, by least squares; of the seconds as they are,
and of what they exceed the start-up of the script (--help) by.

--before names another checkout of this repository, such as a worktree of an earlier commit, whose
scripts then run on the same inputs right after ours, for a table of its own.

Every (stage, size) leaves a result in --keep, by which a run that was cut off goes on; it holds as
long as the script and utils.py stay as they are. The table shows all that hold. Inputs are removed
after use. Writes the table (--output) and a plot beside it.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import io
import json
import math
import multiprocessing
import os
import platform
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import utils
from benchmarks.stages import KILOBYTES, ROOT, processor, run_measured

# Modules larger than utils are imported where they are used, in processes of their own: the peak
# memory of a process starts from that of the process that started it, so this one must stay small.

VERSION = 1  # raise it when inputs or measurements change: earlier results then do not count
GENES, FEATURES = 1_000, 1_024  # as many as HISTEX.py predicts by default, and as UNI has
RAW_PIXEL_UM = 0.25  # a scan at 40x
RADIUS_UM, PITCH_UM = 27.5, 100.0  # Visium
RAW_TILE_PX, RAW_QUALITY = 512, 90  # of the JPEG tiles of a scan
TEXTURE_PX = 1024  # side of the texture that H&E is made of
EOSIN, HAEMATOXYLIN = (0.06, 0.55, 0.22), (0.65, 0.70, 0.29)  # optical density in R, G, B
GLASS = (243, 241, 244)
TISSUE_RADIUS = 0.47  # of the section's side, where glass surrounds it
TOKEN_POOL = 16_384  # different tokens of each kind
# What image_calibration.py writes: the next stages read it in bands
JPEG = {"quality": 95, "subsampling": "4:4:4", "restart_marker_rows": 1}
MEMORY_SHARE = 0.6  # of the machine's; a plain way that needs more is not run
SAMPLED_TILES, SAMPLED_BLOCKS = 128, 256  # of the plain ways that take the same time per piece
BARE_SECONDS = 5.0  # for which the bare network is timed, at least
KMEANS_ROUNDS = 10
BLOCK = 7  # superpixels: side of the blocks of the published prediction
PRODUCTS_SIDE = 266  # superpixels: a map on which the matrix products of HISTEX.py are counted
PRODUCTS = re.compile(r"::(addmm|mm|bmm|baddbmm|_scaled_dot_product.*|_embedding_bag.*)$")
MATMUL_SIDE, MATMUL_ROUNDS = 2048, 8
WRITTEN_BYTES = 1_000_000_000  # by which the speed of the disk is measured
POLL_SECONDS = 0.02
COLOURS = {"stage": "#b5306b", "plain": "#4c78a8", "limit": "#777777"}
Facts = dict[str, Any]


# --------------------------------------------------------------------------------------------------
# synthetic inputs
# --------------------------------------------------------------------------------------------------
def textures(pixel_um: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Tissue and bare glass, uint8 (TEXTURE_PX, TEXTURE_PX, 3), which repeat without a seam."""
    from scipy.ndimage import gaussian_filter

    def field(scale_um: float) -> np.ndarray:
        noise = rng.standard_normal((TEXTURE_PX, TEXTURE_PX), np.float32)
        smooth = gaussian_filter(noise, scale_um / pixel_um, mode="wrap")
        return (smooth / smooth.std())[..., None]

    nuclei = 1 / (1 + np.exp(-8 * (field(2.2) - 1.1)))
    eosin = np.exp(0.35 * field(0.8) + 0.25 * field(12))
    density = eosin * EOSIN + nuclei * (1 + 0.2 * field(0.5)) * HAEMATOXYLIN
    grain = rng.normal(0, 1.5, (TEXTURE_PX, TEXTURE_PX, 3))
    tissue = 245 * np.exp(-density) + 2 * grain
    return tuple(image.clip(0, 255).astype(np.uint8) for image in (tissue, GLASS + grain))


def he_tiles(
    side: int, tile: int, pixel_um: float, glass: bool
) -> Iterator[tuple[int, int, np.ndarray]]:
    """Row, column and pixels, uint8 (tile, tile, 3), of all tiles of a square H&E image."""
    rng = np.random.default_rng(0)
    tissue, bare = textures(pixel_um, rng)
    steps = np.arange(tile)
    for top in range(0, side, tile):
        for left in range(0, side, tile):
            rows, cols = (
                (steps + start) % TEXTURE_PX for start in rng.integers(TEXTURE_PX, size=2)
            )
            pixels = tissue[rows][:, cols]
            if glass:
                inside = in_tissue(*np.ix_(top + steps + 0.5, left + steps + 0.5), side)
                pixels = np.where(inside[..., None], pixels, bare[rows][:, cols])
            yield top, left, pixels


def in_tissue(row: np.ndarray, col: np.ndarray, side: float) -> np.ndarray:
    return np.hypot(row - side / 2, col - side / 2) < TISSUE_RADIUS * side


def write_scan(path: Path, side: int, glass: bool = False) -> None:
    """A tiled TIFF with JPEG inside, as scanners write it."""
    import tifffile

    tiles = he_tiles(side, RAW_TILE_PX, RAW_PIXEL_UM, glass)
    tifffile.imwrite(
        path, (pixels for _, _, pixels in tiles), shape=(side, side, 3), dtype=np.uint8,
        tile=(RAW_TILE_PX, RAW_TILE_PX), photometric="rgb", compression="jpeg",
        compressionargs={"level": RAW_QUALITY},
    )  # fmt: skip


def lattice(side_um: float) -> np.ndarray:
    """Places (N, 2), x and y in um, of the spots on a square section."""
    from prepare.common import hexagonal_lattice

    last = side_um - PITCH_UM / 2
    return hexagonal_lattice((PITCH_UM / 2, PITCH_UM / 2, last, last), PITCH_UM)


def side_for(spots: int) -> float:
    """Side in um of a square section that has room for so many spots."""
    return math.sqrt(spots * PITCH_UM**2 * math.sqrt(3) / 2) + 2 * PITCH_UM


def write_table(path: Path, values: np.ndarray, columns: list[str]) -> None:
    """A table of spots in the form of locs.csv and cnts.csv."""
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.write(",".join(["", *columns]) + "\n")
        for i, row in enumerate(values.tolist()):
            file.write(f"spot{i:05d},{','.join(map(str, row))}\n")


def write_counts(path: Path, spots: int, genes: int) -> None:
    rng = np.random.default_rng(1)
    rates = rng.gamma(1.0, 3.0, genes)
    counts = rng.poisson(rates, (spots, genes))
    write_table(path, counts, [f"GENE{i}" for i in range(genes)])


def write_scanned(folder: Path, side: int, glass: bool = False) -> int:
    """What image_calibration.py reads, of an image of ``side`` px; returns the number of spots."""
    write_scan(folder / "he-raw.tif", side, glass)
    (folder / utils.PIXEL_SIZE_RAW.name).write_text(f"{RAW_PIXEL_UM}\n")
    (folder / utils.RADIUS_RAW.name).write_text(f"{RADIUS_UM / RAW_PIXEL_UM}\n")
    xy = lattice(side * RAW_PIXEL_UM) / RAW_PIXEL_UM
    xy = xy[in_tissue(*xy.T, side)] if glass else xy
    write_table(folder / utils.LOCS_RAW.name, xy, ["x", "y"])
    return len(xy)


def write_section(folder: Path, mm: float, genes: int = GENES) -> None:
    """All that a user brings, of a square section of so many mm, with glass around the tissue."""
    folder.mkdir(parents=True, exist_ok=True)
    spots = write_scanned(folder, round(mm * 1000 / RAW_PIXEL_UM), glass=True)
    write_counts(folder / utils.CNTS.name, spots, genes)


@contextlib.contextmanager
def finished_stage(folder: Path, script: str) -> Iterator[utils.Stage]:
    """What is written in the block gets the record by which later stages accept it."""
    stage = utils.Stage(
        script, argparse.Namespace(directory=folder, force=False, allow_stale=False)
    )
    yield stage
    with contextlib.redirect_stdout(io.StringIO()):
        stage.finish()


def write_calibrated(folder: Path, side: int, xy: np.ndarray, textured: bool) -> None:
    """What image_calibration.py leaves, of ``side`` px, with spots at xy (N, 2) px.

    A picture that nobody decodes need not be ``textured``.
    """
    with finished_stage(folder, utils.CALIBRATION) as stage:
        with stage.writing(utils.HE) as path:
            image = Image.new("RGB", (side, side), GLASS)
            if textured:
                for top, left, pixels in he_tiles(
                    side, utils.TILE_PX, utils.PIXEL_SIZE_UM, glass=False
                ):
                    image.paste(Image.fromarray(pixels), (left, top))
            image.save(path, **JPEG)
        with stage.writing(utils.LOCS) as path:
            write_table(path, xy, ["x", "y"])
        with stage.writing(utils.RADIUS) as path:
            path.write_text(f"{RADIUS_UM / utils.PIXEL_SIZE_UM}\n")
        with stage.writing(utils.PIXEL_SIZE) as path:
            path.write_text(f"{utils.PIXEL_SIZE_UM}\n")


def write_extracted(folder: Path, side: int, tissue: np.ndarray) -> None:
    """What Histology_Extractor.py leaves; tokens and colours tell ``tissue`` (side, side) apart."""
    rng = np.random.default_rng(2)
    pool = rng.standard_normal((2 * TOKEN_POOL, FEATURES), np.float32)
    pool[TOKEN_POOL:] += rng.standard_normal(FEATURES, np.float32)  # those of tissue
    pool = pool.astype(np.float16)
    shape = (side, side, FEATURES)
    with finished_stage(folder, utils.EXTRACTOR) as stage:
        with stage.writing(utils.FEATURES) as path:
            tokens = np.lib.format.open_memmap(path, "w+", np.float16, shape)
            for row, inside in enumerate(tissue):
                tokens[row] = pool[rng.integers(TOKEN_POOL, size=side) + TOKEN_POOL * inside]
            tokens.flush()
        with stage.writing(utils.RGB) as path:
            noise = rng.standard_normal((*tissue.shape, 3), np.float32)
            colours = np.where(tissue[..., None], (205, 140, 180) + 14 * noise, GLASS + noise)
            np.save(path, colours.clip(0, 255).astype(np.uint8))


def make_scan(folder: Path, side: int) -> None:
    write_scanned(folder, side)


def make_spots(folder: Path, spots: int) -> None:
    xy = lattice(side_for(spots))[:spots] / utils.PIXEL_SIZE_UM
    with (
        finished_stage(folder, utils.CALIBRATION) as stage,
        stage.writing(utils.LOCS) as path,
    ):
        write_table(path, xy, ["x", "y"])
    write_counts(folder / utils.CNTS.name, spots, GENES)


def make_image(folder: Path, side: int) -> None:
    write_calibrated(folder, side, lattice(side * utils.PIXEL_SIZE_UM), textured=True)


def make_features(folder: Path, side: int) -> None:
    xy = lattice(side * utils.SUPERPIXEL_UM) / utils.PIXEL_SIZE_UM
    write_calibrated(folder, side * utils.TOKEN_PX, xy, textured=True)
    steps = np.arange(side) + 0.5
    write_extracted(folder, side, in_tissue(*np.ix_(steps, steps), side))


def make_section(folder: Path, spots: int, side: int | None = None) -> None:
    """All inputs of HISTEX.py, everything tissue; as many superpixels as the spots need."""
    tiles = math.ceil(side_for(spots) / utils.SUPERPIXEL_UM / utils.TOKENS_PER_TILE)
    side = side or tiles * utils.TOKENS_PER_TILE
    xy = lattice(side * utils.SUPERPIXEL_UM)[:spots] / utils.PIXEL_SIZE_UM
    write_calibrated(folder, side * utils.TOKEN_PX, xy, textured=False)
    write_extracted(folder, side, np.ones((side, side), bool))
    Image.new("L", (side, side), 255).save(folder / utils.MASK.name)  # the user's own
    write_counts(folder / utils.CNTS.name, len(xy), GENES)
    command = [sys.executable, str(ROOT / utils.HIGH_RESOLUTION), "--directory", str(folder)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def make_map(folder: Path, side: int) -> None:
    make_section(folder, len(lattice(side * utils.SUPERPIXEL_UM)), side)


# --------------------------------------------------------------------------------------------------
# measuring
# --------------------------------------------------------------------------------------------------
class Clock:
    """Seconds and CPU seconds of this process since the start, and its peak memory in GB."""

    def __init__(self) -> None:
        self.start, self.cpu = time.perf_counter(), time.process_time()

    def read(self) -> Facts:
        import resource  # not on Windows, where sections can be written all the same

        return {
            "seconds": time.perf_counter() - self.start,
            "cpu": time.process_time() - self.cpu,
            "gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * KILOBYTES / 1e9,
        }


def in_child(work: Callable, *arguments: Any) -> Any:
    """What ``work`` returns, in a fresh process, whose memory ends with it."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as pool:
        return pool.submit(work, *arguments).result()


def script_command(root: Path | str, script: str, folder: Path, *options: str) -> list[str]:
    return [sys.executable, str(Path(root) / script), "--directory", str(folder), *options]


def run_process(command: list[str], log: Path) -> Facts:
    """Seconds, CPU seconds and peak memory of a command."""
    before = os.times()
    seconds, gb = run_measured(command, log)
    after = os.times()
    cpu = after.children_user + after.children_system
    cpu -= before.children_user + before.children_system
    return {"seconds": seconds, "cpu": cpu, "gb": gb}


def run_script(case: Case, folder: Path, log: Path, options: Facts) -> Facts:
    return run_process(script_command(options["root"], case.script, folder, *case.options), log)


def run_extractor(case: Case, folder: Path, log: Path, options: Facts) -> Facts:
    """Beside the usual: the tiles run through the network, and the seconds of the loop over them,
    which the script prints."""
    facts = run_script(case, folder, log, options)
    if options["root"] != str(ROOT):
        return facts
    said = re.findall(r"(\d+) tiles in ([\d.]+) s", log.read_text(encoding="utf-8"))
    if not said:
        raise SystemExit(f"{log} does not tell the number of tiles; see {case.script}")
    tiles, loop = said[-1]
    record = json.loads((folder / utils.record_name(case.script)).read_text(encoding="utf-8"))
    batch, grid = record["batch_size"], record["feature_shape"][:2]
    return {**facts, "tiles": int(tiles), "loop": float(loop), "batch": batch, "grid": grid}


def histex_command(folder: Path, options: Facts) -> list[str]:
    epochs, states = str(options["epochs"]), str(options["states"])
    return script_command(
        options["root"], utils.HISTEX, folder,
        "--epochs", epochs, "--n-states", states, "--device", "cpu",
    )  # fmt: skip


def state_files(folder: Path, options: Facts) -> list[Path]:
    """The last file of every state: once it is there, the state is trained."""
    return [
        folder / utils.STATES.name / f"{i:02d}" / "model.json" for i in range(options["states"])
    ]


def run_training(case: Case, folder: Path, log: Path, options: Facts) -> Facts:
    """Until all states are on the disk; the prediction that would follow is cut off."""
    shutil.rmtree(folder / utils.STATES.name, ignore_errors=True)
    done, command = state_files(folder, options), histex_command(folder, options)
    start = time.time()
    with log.open("ab") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
    ended = 0
    while not ended and not all(path.exists() for path in done):
        time.sleep(POLL_SECONDS)
        ended, status, usage = os.wait4(process.pid, os.WNOHANG)
    if not ended:
        os.kill(process.pid, signal.SIGKILL)
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if not all(path.exists() for path in done):
        raise SystemExit(f"{shlex.join(command)} ended with {process.returncode}; see {log}")
    seconds = max(path.stat().st_mtime for path in done) - start
    cpu, gb = usage.ru_utime + usage.ru_stime, usage.ru_maxrss * KILOBYTES / 1e9
    return {"seconds": seconds, "cpu": cpu, "gb": gb, **options}


def run_prediction(case: Case, folder: Path, log: Path, options: Facts) -> Facts:
    """With states that lie on the disk, trained here first if need be."""
    done = state_files(folder, options)
    if options["root"] != str(ROOT) or not all(path.exists() for path in done):
        run_training(case, folder, log, options)
    before = [path.stat().st_mtime_ns for path in done]
    facts = run_process(histex_command(folder, options), log)
    if [path.stat().st_mtime_ns for path in done] != before:
        raise SystemExit(f"{case.script} trained the states again; see {log}")
    return {**facts, **options}


# --------------------------------------------------------------------------------------------------
# plain ways: what one would write first
# --------------------------------------------------------------------------------------------------
def open_image(path: Path) -> Image.Image:
    Image.MAX_IMAGE_PIXELS = utils.MAX_HE_PIXELS
    return Image.open(path)


def rescale_in_float(folder: Path, side: int, stage: Facts) -> Facts:
    from skimage.transform import rescale

    clock = Clock()
    scale = RAW_PIXEL_UM / utils.PIXEL_SIZE_UM
    raw = np.asarray(open_image(folder / "he-raw.tif"))
    scaled = rescale(raw, (scale, scale, 1), preserve_range=True)
    Image.fromarray(scaled.round().clip(0, 255).astype(np.uint8)).save(folder / "plain.jpg", **JPEG)
    return clock.read()


def all_pairs(folder: Path, spots: int, stage: Facts) -> Facts:
    import pandas as pd
    from scipy.spatial.distance import cdist

    clock = Clock()
    locs = pd.read_csv(folder / utils.LOCS.name, index_col=0)
    counts = pd.read_csv(folder / utils.CNTS.name, index_col=0).loc[locs.index]
    counts = counts.to_numpy(np.float32)
    distance = cdist(locs, locs)
    np.fill_diagonal(distance, np.inf)
    near = distance < 1.2 * np.median(distance.min(axis=1))
    first, second = np.nonzero(np.triu(near))
    np.save(folder / "plain.npy", np.concatenate([counts, (counts[first] + counts[second]) / 2]))
    xy = locs.to_numpy()
    places = pd.DataFrame(np.concatenate([xy, (xy[first] + xy[second]) / 2]), columns=["x", "y"])
    places.to_csv(folder / "plain.csv")
    return clock.read()


def tile_by_tile(folder: Path, side: int, stage: Facts) -> Facts:
    import torch

    import Histology_Extractor as extractor

    backbone = extractor.load_backbone(extractor.LITE, None, None)
    mean, std = (torch.tensor(values)[:, None, None] for values in backbone.mean_std)
    clock = Clock()
    image = np.asarray(open_image(folder / utils.HE.name))
    opened = clock.read()["seconds"]
    starts = range(0, side, utils.TILE_PX)
    tiles = [(top, left) for top in starts for left in starts]
    chosen = tiles[:: math.ceil(len(tiles) / SAMPLED_TILES)]
    tokens = []
    with torch.inference_mode():
        for top, left in chosen:
            tile = image[top : top + utils.TILE_PX, left : left + utils.TILE_PX]
            x = (torch.from_numpy(tile.copy()).permute(2, 0, 1) / 255 - mean) / std
            tokens.append(extractor.tile_tokens(backbone.model, x[None])[0].numpy())
    return extrapolated(clock.read(), opened, len(tiles), len(chosen))


def extrapolated(facts: Facts, fixed: float, pieces: int, done: int) -> Facts:
    """Seconds of all pieces by those of some; ``fixed`` seconds come but once."""
    if done == pieces:
        return facts
    seconds = fixed + (facts["seconds"] - fixed) * pieces / done
    cpu = facts["cpu"] * seconds / facts["seconds"]
    return {"seconds": seconds, "cpu": cpu, "gb": None, "sample": f"{done:,} of {pieces:,}"}


def cluster_in_two(folder: Path, side: int, stage: Facts) -> Facts:
    from scipy.cluster.vq import kmeans2

    clock = Clock()
    tokens = np.load(folder / utils.FEATURES.name).astype(np.float32).reshape(-1, FEATURES)
    kmeans2(tokens, 2, iter=KMEANS_ROUNDS, minit="points", rng=0)
    return clock.read()


def block_by_block(folder: Path, side: int, stage: Facts) -> Facts:
    """The default network, one block at a time, as the published code goes over the map."""
    import torch
    from scipy.spatial import cKDTree

    import HISTEX

    options = HISTEX.build_parser().parse_args(["--directory", str(folder)])
    with contextlib.redirect_stdout(io.StringIO()):
        section, _, _ = HISTEX.read_section(utils.Stage(HISTEX.SCRIPT, options))
    network = HISTEX.NETWORKS["default"](section, np.arange(len(section.spots))).eval()
    section.half = BLOCK // 2
    rng, blocks = np.random.default_rng(0), math.ceil(side / BLOCK) ** 2
    chosen = rng.integers(side // BLOCK, size=(min(blocks, SAMPLED_BLOCKS), 2)) * BLOCK + BLOCK // 2
    clock, maps, tree = Clock(), [], cKDTree(section.points)
    with torch.inference_mode():
        for centre in chosen:
            near = tree.query(centre + 0.5, k=section.context)[1]
            inputs = section.inputs(centre[None], near[None], network.halo, "cpu")
            maps.append(network(*inputs)[0].numpy())
    return extrapolated(clock.read(), 0.0, blocks * stage["states"], len(chosen))


# --------------------------------------------------------------------------------------------------
# limits of the machine
# --------------------------------------------------------------------------------------------------
def codec_alone(folder: Path, side: int, stage: Facts) -> Facts:
    made = open_image(folder / utils.HE.name).convert("RGB")
    clock = Clock()
    open_image(folder / "he-raw.tif").load()
    made.save(folder / "limit.jpg", **JPEG)
    return clock.read()


def table_alone(folder: Path, spots: int, stage: Facts) -> Facts:
    import pandas as pd

    clock = Clock()
    pd.read_csv(folder / utils.CNTS.name, index_col=0)
    return clock.read()


def network_alone(folder: Path, side: int, stage: Facts) -> Facts:
    """The network on as many tiles as the stage ran it on, all of them one batch over and over."""
    import torch

    import Histology_Extractor as extractor

    backbone = extractor.load_backbone(extractor.LITE, None, None)
    sides = [backbone.tiling.side(extent) for extent in stage["grid"]]
    rows, columns = (side * utils.TOKEN_PX for side in sides)
    pixels = np.asarray(open_image(folder / utils.HE.name).crop((0, 0, columns, rows)))
    x = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].repeat(stage["batch"], 1, 1, 1)
    x, rounds = x / 127.5 - 1, 0
    with torch.inference_mode():
        extractor.tile_tokens(backbone.model, x)
        clock = Clock()
        while clock.read()["seconds"] < BARE_SECONDS:
            extractor.tile_tokens(backbone.model, x)
            rounds += 1
        facts = clock.read()
    times = stage["tiles"] / (rounds * stage["batch"])
    seconds = facts["seconds"] * times
    return {
        "seconds": seconds,
        "cpu": facts["cpu"] * times,
        "gb": facts["gb"],
        "throughput": seconds / stage["loop"],
        "computed": stage["tiles"] * math.prod(sides) / math.prod(stage["grid"]),
    }


def reading_alone(folder: Path, side: int, stage: Facts) -> Facts:
    clock, buffer = Clock(), bytearray(1 << 24)
    with (folder / utils.FEATURES.name).open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass
    return clock.read()


def count_products(folder: Path) -> Facts:
    """What a small section tells of HISTEX.py.

    Floating point operations of one state in matrix products: of a spot in an epoch of training,
    and of a superpixel in prediction. And the share of the seconds of prediction inside of such
    products, with as many states as without --n-states.
    """
    from torch.profiler import ProfilerActivity, profile
    from torch.utils.flop_counter import FlopCounterMode

    import HISTEX

    folder.mkdir(parents=True)
    make_map(folder, PRODUCTS_SIDE)
    default = HISTEX.build_parser().get_default("n_states")

    def run(states: int = 1) -> None:
        options = {"root": str(ROOT), "epochs": 1, "states": states}
        argv = [*histex_command(folder, options)[2:], "--n-plots", "0"]
        with contextlib.redirect_stdout(io.StringIO()):
            if HISTEX.run(argv) != 0:
                raise SystemExit(f"{shlex.join(argv)} failed")

    counted = []
    for _ in ("training and prediction", "prediction"):
        with FlopCounterMode(display=False) as counter:
            run()
        counted.append(counter.get_total_flops())
    run(default)  # trains the others; its seconds are without the profiler, which takes some too
    record = (folder / utils.record_name(utils.HISTEX)).read_text(encoding="utf-8")
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        run(default)
    inside = sum(e.self_cpu_time_total for e in seen.key_averages() if PRODUCTS.search(e.key))
    whole, prediction = counted
    spots = len(lattice(PRODUCTS_SIDE * utils.SUPERPIXEL_UM))
    return {
        "of_spot": (whole - prediction) / spots,
        "of_superpixel": prediction / PRODUCTS_SIDE**2,
        "inside": inside / 1e6 / json.loads(record)["seconds_prediction"],
    }


def matmul_speed() -> float:
    """Floating point operations per second of a plain product of float32 matrices."""
    import torch

    a, b, best = *torch.rand(2, MATMUL_SIDE, MATMUL_SIDE), math.inf
    for _ in range(MATMUL_ROUNDS):
        start = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - start)
    return 2 * MATMUL_SIDE**3 / best


def write_speed(folder: Path) -> float:
    """Bytes per second of writing to the disk itself."""
    path, block = folder / "limit.bin", os.urandom(1 << 24)
    start = time.perf_counter()
    with path.open("wb") as file:
        for _ in range(WRITTEN_BYTES // len(block)):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    return WRITTEN_BYTES / (time.perf_counter() - start)


def training_products(folder: Path, spots: int, stage: Facts) -> Facts:
    speed = matmul_speed()
    seconds = stage["of_spot"] * spots * stage["epochs"] * stage["states"] / speed
    return {"seconds": seconds, "gflops": speed / 1e9}


def prediction_products(folder: Path, side: int, stage: Facts) -> Facts:
    speed, disk = matmul_speed(), write_speed(folder)
    seconds = stage["of_superpixel"] * side**2 * stage["states"] / speed
    return {
        "seconds": seconds,
        "products": stage["inside"],
        "gflops": speed / 1e9,
        "writing": 4 * side**2 * GENES / disk,
        "disk": disk / 1e9,
    }


# --------------------------------------------------------------------------------------------------
# cases: rows of the table
# --------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Budget:
    """What a measurement may be at most, or at least."""

    text: str
    key: str  # of ``values``
    bound: float
    at_least: bool = False

    def met(self, value: float) -> bool:
        return value >= self.bound if self.at_least else value <= self.bound


@dataclass(frozen=True)
class Case:
    """One stage, or one half of HISTEX.py, with its inputs and what it is compared to."""

    script: str
    unit: str  # of the sizes
    counted: str  # what the exponent is about
    small: tuple[int, ...]
    full: tuple[int, ...]
    make: Callable[[Path, int], None]
    run: Callable[[Case, Path, Path, Facts], Facts]
    limit: tuple[str, Callable[[Path, int, Facts], Facts]]
    plain: tuple[str, Callable[[Path, int, Facts], Facts]] | None = None
    plain_bytes: float = 0.0  # of memory that the plain way takes, per unit of ``counted``
    plain_power: int = 1
    options: tuple[str, ...] = ()
    once: Callable[[Path], Facts] | None = None  # facts for the limit that no size changes
    budgets: tuple[tuple[int, Budget], ...] = ()  # with the size from which on they hold

    def amount(self, size: int) -> int:
        return size if self.unit == "spots" else size**2


CASES = {
    "image_calibration": Case(
        utils.CALIBRATION, "px side", "pixels", (600, 1_000, 1_600, 2_500),
        (2_500, 5_000, 10_000, 20_000), make_scan, run_script,
        ("Pillow's decoding and encoding alone", codec_alone),
        ("skimage.transform.rescale of the whole image in float", rescale_in_float), 80,
        budgets=((20_000, Budget("1.5 GB at most", "gb", 1.5)),
                 (20_000, Budget("2 x the limit at most", "times", 2))),
    ),
    "get_HR": Case(
        utils.HIGH_RESOLUTION, "spots", "spots", (100, 250, 500, 1_000),
        (1_000, 2_500, 5_000, 14_000), make_spots, run_script,
        ("pandas.read_csv of the counts alone", table_alone),
        ("a table of the distances of all pairs of spots", all_pairs), 16, 2,
        budgets=((5_000, Budget("1 GB at most", "gb", 1)),
                 (5_000, Budget("3 s at most", "seconds", 3)),
                 (14_000, Budget("9 s at most", "seconds", 9))),
    ),
    "Histology_Extractor": Case(
        utils.EXTRACTOR, "px side", "pixels", (448, 672, 896, 1_344),
        (1_120, 2_240, 4_480, 8_960), make_image, run_extractor,
        ("the bare network on as many tiles", network_alone),
        ("a loop over tiles of 224 px, each a forward of its own", tile_by_tile), 6,
        options=("--backbone", "efficientnet_lite0", "--device", "cpu"),
        budgets=((0, Budget("90 % of the bare network's tiles/s", "throughput", 0.9, True)),
                 (0, Budget("120 % of the tokens computed at most", "computed", 1.2))),
    ),
    "masking_non_tissue": Case(
        utils.MASKING, "superpixels side", "superpixels", (84, 112, 168, 252),
        (336, 686, 1_036, 1_372), make_features, run_script,
        ("reading the tokens alone", reading_alone),
        (f"k-means in two of all tokens in float32, {KMEANS_ROUNDS} rounds", cluster_in_two), 6_200,
        budgets=((1_372, Budget("1.5 GB at most", "gb", 1.5)),
                 (1_372, Budget("20 s at most", "seconds", 20))),
    ),
    "HISTEX-train": Case(
        utils.HISTEX, "spots", "spots", (50, 100, 200, 400),
        (600, 1_250, 2_500, 5_000), make_section, run_training,
        ("its matrix products at the speed of a plain one", training_products),
        once=count_products,
        budgets=((5_000, Budget("4 GB at most", "gb", 4)),),
    ),
    "HISTEX-predict": Case(
        utils.HISTEX, "superpixels side", "superpixels", (56, 84, 112, 168),
        (336, 686, 1_036, 1_372), make_map, run_prediction,
        ("its matrix products at the speed of a plain one", prediction_products),
        (f"one block of {BLOCK} x {BLOCK} superpixels at a time", block_by_block), 0,
        once=count_products,
        budgets=((1_372, Budget("4 GB at most", "gb", 4)),
                 (1_372, Budget("70 % of the time in matrix products (5 states)",
                                "products", 0.7, True))),
    ),
}  # fmt: skip


# --------------------------------------------------------------------------------------------------
# results
# --------------------------------------------------------------------------------------------------
@functools.cache
def digest(script: str) -> str:
    """Short sha256 of the code that a result depends on, as it is at first."""
    parts = [utils.sha256(ROOT / name) for name in (script, "utils.py")]
    return hashlib.sha256(f"{VERSION} {parts}".encode()).hexdigest()[:12]


def kept(path: Path, make: Callable[[], Facts]) -> Facts:
    """The result in a file, made and written first if it is not there."""
    if not path.exists():
        result = make()
        path.parent.mkdir(parents=True, exist_ok=True)
        with utils.atomic(path) as partial:
            partial.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return json.loads(path.read_text(encoding="utf-8"))


def middle(runs: list[Facts]) -> Facts:
    """Of every number the median over runs, of everything else the first."""
    return {
        key: statistics.median(run[key] for run in runs) if isinstance(value, float) else value
        for key, value in runs[0].items()
    }


@contextlib.contextmanager
def working_folder(path: Path) -> Iterator[Path]:
    """An empty folder that is gone afterwards, as is what a killed run left there."""
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    try:
        yield path
    finally:
        shutil.rmtree(path)


def run_plain(case: Case, folder: Path, size: int, stage: Facts) -> Facts | None:
    if case.plain is None:
        return None
    need = case.plain_bytes * case.amount(size) ** case.plain_power
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if need > MEMORY_SHARE * memory:
        return {"needs": need / 1e9}
    return in_child(case.plain[1], folder, size, stage)


def measure(name: str, size: int, options: Facts, repeat: int, keep: Path) -> Facts:
    """Everything about one stage at one size."""
    case, log = CASES[name], keep / f"{name}-{size}.log"
    runs: list[list[Facts | None]] = []
    start_up = run_process([sys.executable, str(ROOT / case.script), "--help"], log)["seconds"]
    once: Facts = {}
    if case.once:
        with working_folder(keep / f"{name}-once") as folder:
            path = keep / "results" / f"once-{case.once.__name__}-{digest(case.script)}.json"
            once = kept(path, lambda: in_child(case.once, folder / "section"))
    ours, other = {**options, "root": str(ROOT)}, {**options, "root": options["before"]}
    with working_folder(keep / f"{name}-{size}") as folder:
        in_child(case.make, folder, size)
        for _ in range(repeat):
            stage = case.run(case, folder, log, ours)
            limit = in_child(case.limit[1], folder, size, {**stage, **once})
            runs.append([stage, limit, run_plain(case, folder, size, stage)])
        before = [case.run(case, folder, log, other) for _ in range(repeat) if options["before"]]
    stages, limits, plains = zip(*runs, strict=True)
    states = "" if "states" not in stages[0] else f", {options['states']} state"
    return {
        "name": name,
        "label": name + states + ("s" if options["states"] > 1 and states else ""),
        "size": size,
        "amount": case.amount(size),
        "start_up": start_up,
        "stage": middle(stages),
        "limit": middle(limits),
        "plain": plains[0] and middle(plains),
        "before": before and middle(before),
    }


def result_path(name: str, size: int, args: argparse.Namespace) -> Path:
    variant = f"{args.states}x{args.epochs}-" if CASES[name].script == utils.HISTEX else ""
    variant += "before-" if args.before else ""
    code = digest(CASES[name].script)
    return args.keep / "results" / f"{name}-{size}-{variant}{args.repeat}-{code}.json"


def read_results(keep: Path, before: bool = False) -> dict[str, list[Facts]]:
    """All results that hold, by label, in the order of the cases and of size.

    ``before`` chooses those with another checkout beside ours, else those without.
    """
    found: dict[str, list[Facts]] = {}
    for name, case in CASES.items():
        paths = (keep / "results").glob(f"{name}-*-{digest(case.script)}.json")
        results = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
        results = [result for result in results if bool(result.get("before")) == before]
        for result in sorted(results, key=lambda result: (result["label"], result["size"])):
            found.setdefault(result["label"], []).append(result)
    return found


def values(result: Facts) -> Facts:
    """All that a budget can be about."""
    times = result["stage"]["seconds"] / result["limit"]["seconds"]
    return {**result["limit"], **result["stage"], "times": times}


def exponent(amounts: list[float], measured: list[float]) -> float:
    """Slope of the line through log(measured) against log(amounts); nan if there is none."""
    known = [(a, m) for a, m in zip(amounts, measured, strict=True) if m > 0]
    if len({a for a, _ in known}) < 2:
        return math.nan
    x, y = np.log(np.array(known)).T
    return float(np.polyfit(x, y, 1)[0])


# --------------------------------------------------------------------------------------------------
# table and plot
# --------------------------------------------------------------------------------------------------
def compared(other: Facts | None, stage: Facts) -> str:
    """Seconds of the plain way or the limit, and how often those of the stage fit into them."""
    if other is None:
        return ""
    if "needs" in other:
        return f"needs {other['needs']:,.0f} GB"
    about = "about " if "sample" in other else ""
    memory = f", {other['gb']:.2f} GB" if other.get("gb") else ""
    return f"{about}{other['seconds']:,.2f} ({other['seconds'] / stage['seconds']:.2g}x){memory}"


def verdict(result: Facts) -> str:
    """Of budgets for the same, the one for the largest size holds."""
    budgets = {b.key: b for least, b in CASES[result["name"]].budgets if result["size"] >= least}
    cells = []
    for key, budget in budgets.items():
        value = values(result)[key]
        met = "met" if budget.met(value) else "**missed**"
        cells.append(f"{budget.text}: {value:.3g}, {met}")
    return "<br>".join(cells)


def table(results: dict[str, list[Facts]]) -> list[str]:
    lines = [
        "| stage | size | seconds | CPU seconds | peak GB | plain way | limit | budget |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for label, rows in results.items():
        for row in rows:
            stage, case = row["stage"], CASES[row["name"]]
            limit = {**row["limit"], "gb": None}
            cells = [
                label, f"{row['size']:,} {case.unit}", f"{stage['seconds']:,.2f}",
                f"{stage['cpu']:,.2f}", f"{stage['gb']:.2f}", compared(row["plain"], stage),
                compared(limit, stage), verdict(row),
            ]  # fmt: skip
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def before_and_after(results: dict[str, list[Facts]]) -> list[str]:
    """A table of what another checkout took for the same; nothing if none was measured."""
    if not results:
        return []
    lines = [
        "", "Before (the checkout that the command names) and now, on the same inputs, in the same "
        "run:", "",
        "| stage | size | seconds before | now | CPU seconds before | now | peak GB before | now |",
        "|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for label, rows in results.items():
        for row in rows:
            cells = [label, f"{row['size']:,} {CASES[row['name']].unit}"]
            for key in ("seconds", "cpu", "gb"):
                then, now = row["before"][key], row["stage"][key]
                cells += [f"{then:,.2f}", f"{now:,.2f} ({now / then:.2g}x)"]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def exponents(results: dict[str, list[Facts]]) -> list[str]:
    lines = [
        "| stage | against | seconds | seconds beyond start-up | peak memory | start-up (s) |",
        "|---|---|---|---|---|---|",
    ]
    for label, rows in results.items():
        amounts = [row["amount"] for row in rows]
        start_up = statistics.median(row["start_up"] for row in rows)
        seconds = [row["stage"]["seconds"] for row in rows]
        measured = (
            seconds,
            [value - start_up for value in seconds],
            [row["stage"]["gb"] for row in rows],
        )
        slopes = [f"{exponent(amounts, column):.2f}" for column in measured]
        counted = CASES[rows[0]["name"]].counted
        lines.append(f"| {label} | {counted} | {' | '.join(slopes)} | {start_up:.1f} |")
    return lines


def legend(results: dict[str, list[Facts]]) -> list[str]:
    lines = []
    for label, rows in results.items():
        case, last = CASES[rows[0]["name"]], rows[-1]
        plain = f"plain way: {case.plain[0]}; " if case.plain else ""
        sample = (last["plain"] or {}).get("sample")
        plain += f"about: by a sample ({sample} at the largest size); " if sample else ""
        speeds = []
        if "gflops" in last["limit"]:
            speeds.append(f"{last['limit']['gflops']:,.0f} GFLOP/s")
        if "disk" in last["limit"]:
            speeds.append(
                f"writing the maps alone, synced at {last['limit']['disk']:.2f} GB/s, takes "
                f"{last['limit']['writing']:,.0f} s at the largest size"
            )
        more = f" ({'; '.join(speeds)})" if speeds else ""
        lines.append(f"* {label}: {plain}limit: {case.limit[0]}{more}")
    return lines


def report(
    results: dict[str, list[Facts]],
    changed: dict[str, list[Facts]],
    commands: list[str],
    picture: str,
) -> str:
    from benchmarks.accuracy import commit

    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9
    threads = os.environ.get("OMP_NUM_THREADS", "not set")
    lines = [
        "# Time and memory",
        "",
        "Every stage as a process of its own, on synthetic inputs. In brackets: times the seconds "
        "of the",
        "stage. How it is measured: the head of `benchmarks/scaling.py`.",
        "",
        *table(results),
        "",
        f"![Seconds and peak memory against size]({picture})" if results else "",
        "",
        "Growth exponents (1: in proportion to the size):",
        "",
        *exponents(results),
        "",
        "Plain ways and limits:",
        "",
        *legend(results),
        *before_and_after(changed),
        "",
        "Run:",
        "",
        f"* date: {time.strftime('%Y-%m-%d')}",
        f"* commit: {commit()}",
        f"* machine: {processor()}, {os.cpu_count()} cores, {memory:.0f} GB, {platform.system()}, "
        f"Python {platform.python_version()}; OMP_NUM_THREADS {threads}",
        *(f"* command: `{command}`" for command in commands),
    ]
    return "\n".join(lines) + "\n"


def draw(results: dict[str, list[Facts]], path: Path) -> None:
    """Seconds, and below them peak memory, against size, both axes logarithmic."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    def short(value: float, _: int) -> str:
        for power, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k"), (1, "")):
            if value >= power:
                return f"{value / power:g}{letter}"
        return f"{value:g}"

    figure = Figure(figsize=(3 * len(results), 5.4), layout="constrained", dpi=80)
    axes = figure.subplots(2, len(results), squeeze=False)
    for column, (label, rows) in zip(axes.T, results.items(), strict=True):
        for key, unit, ax in zip(("seconds", "gb"), ("seconds", "peak GB"), column, strict=True):
            for series, colour in COLOURS.items():
                if key == "gb" and series == "limit":
                    continue  # of no interest
                points = [(row["amount"], (row[series] or {}).get(key)) for row in rows]
                known = [(x, y) for x, y in points if y]
                if known:
                    ax.loglog(*zip(*known, strict=True), "o-", color=colour, ms=4, label=series)
            ax.set(xlabel=CASES[rows[0]["name"]].counted, ylabel=unit)
            for axis in (ax.xaxis, ax.yaxis):
                low, high = axis.get_view_interval()
                axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 150 * low else (1,)))
                axis.set_minor_locator(NullLocator())
                axis.set_major_formatter(FuncFormatter(short))
            ax.grid(color="0.9")
            ax.spines[["top", "right"]].set_visible(False)
        slope = exponent([r["amount"] for r in rows], [r["stage"]["seconds"] for r in rows])
        column[0].set_title(f"{label}\nexponent {slope:.2f}", fontsize=10)
        column[0].legend(fontsize=8, frameon=False)
    figure.savefig(path, metadata={"Software": None})


# --------------------------------------------------------------------------------------------------
# the command
# --------------------------------------------------------------------------------------------------
def sizes_of(case: Case, words: list[str]) -> tuple[int, ...]:
    if words == ["middle"]:
        return case.full[-2:-1]
    if words in (["small"], ["full"]):
        return getattr(case, words[0])
    return tuple(map(int, words))


def size(text: str) -> str:
    """argparse type: small, middle, full or a whole number."""
    if text not in ("small", "middle", "full"):
        utils.positive(text)
    return text


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    option = parser.add_argument
    option("--keep", type=Path, required=True,
           help="Folder for results, by which a later run goes on, and for inputs.")  # fmt: skip
    option("--stages", nargs="+", choices=list(CASES), default=list(CASES), help="What to measure.")
    option("--sizes", nargs="+", type=size, default=["full"],
           help="small, full, middle (last but one of full), or numbers.")  # fmt: skip
    option("--repeat", type=utils.positive, default=1, help="Runs, of which the median is kept.")
    option("--epochs", type=utils.positive, default=2, help="Epochs of HISTEX.py.")
    option("--states", type=utils.positive, default=1, help="States of HISTEX.py.")
    option("--output", type=Path, default=ROOT / "benchmarks" / "SCALING.md",
           help="The table, in Markdown; the plot is put beside it.")  # fmt: skip
    option("--before", type=Path, metavar="CHECKOUT",
           help="Another checkout, whose scripts are measured as well.")  # fmt: skip
    option("--section-mm", type=float, metavar="MM",
           help="Only write the user's files of a section so wide into --keep.")  # fmt: skip
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    args.keep.mkdir(parents=True, exist_ok=True)
    if args.section_mm:
        in_child(write_section, args.keep, args.section_mm)
        print(f"wrote the files of a section of {args.section_mm:g} mm into {args.keep}")
        return 0
    options = {"epochs": args.epochs, "states": args.states, "before": None}
    if args.before:
        options["before"] = str(args.before.resolve(strict=True))
    for name in args.stages:
        for number in sizes_of(CASES[name], args.sizes):
            result = kept(
                result_path(name, number, args),
                lambda name=name, number=number: measure(
                    name, number, options, args.repeat, args.keep
                ),
            )
            stage = result["stage"]
            print(
                f"{result['label']}, {number:,} {CASES[name].unit}: {stage['seconds']:.2f} s, "
                f"{stage['cpu']:.2f} CPU s, {stage['gb']:.2f} GB; limit "
                f"{compared(result['limit'], stage)}; plain {compared(result['plain'], stage)}",
                flush=True,
            )
    typed = sys.argv[1:] if argv is None else argv
    results, changed = read_results(args.keep), read_results(args.keep, before=True)
    picture = args.output.with_name(f"{args.output.stem.lower()}.png")
    if results:
        draw(results, picture)
    with utils.atomic(args.output) as partial:
        command = shlex.join(["python", "benchmarks/scaling.py", *typed])
        text = report(results, changed, [command], picture.name)
        partial.write_text(text, encoding="utf-8")
    print(f"wrote {args.output}" + (f" and {picture.name}" if results else ""))
    return 0


if __name__ == "__main__":
    sys.exit(main())
