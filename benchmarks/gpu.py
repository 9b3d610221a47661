"""Time the heavy stages on a graphics card: UNI's network, and training and maps of a section.

    python benchmarks/gpu.py --device cuda                       # under eight minutes on a card
    python benchmarks/gpu.py --device cpu --mm 1 --genes 50 --small --seconds 1

Reads   nothing: weights, pixels, tokens and counts are random, which takes the same time
Writes  a table in Markdown to the console: seconds, peak memory, and the share of the time in which
        the device computes

Needs torch, timm, numpy and OpenCV, and what these bring. Of pandas, scipy and pyvips, which only
reading and writing need, the absent ones are replaced by names that raise an error when used.

Every stage is warmed up and timed for --seconds; the seconds of a whole section are that part times
what is left out, and are marked by ~. The section is a square of --mm with --spots spots on
Visium's lattice around its middle, and tissue around these. What is timed:

* the extractor's rows of tiles, from pixels in memory to tokens in memory, with no tile blank, so
  that a real section, which is partly blank, takes less. Reading he.jpg and saving rows go on
  beside it.
* the training of a state, as HISTEX.py does it, for as many epochs as its step size has.
* of prediction, the arithmetic of the networks for strips of superpixels: views, embedding, fusion,
  decoding of all genes and the median, to maps in memory. Blending patches, anchoring and files
  come in addition.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import importlib.machinery
import itertools
import math
import sys
import time
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks import measure
from reading import cli

SCRIPT = "benchmarks/gpu.py"


def build_parser() -> cli.Parser:
    parser = cli.Parser(__doc__)
    option = parser.add_argument
    cli.add_device(parser)
    option("--mm", type=cli.above_0, default=11.0, help="Side of the section.")
    option("--spots", type=cli.positive, default=4000, help="Spots, at most.")
    option("--genes", type=cli.positive, default=1000, help="Genes.")
    option("--states", type=cli.positive, default=5, help="Networks.")
    option("--batch-size", type=cli.positive, help="Tiles at once (default: the extractor's).")
    option("--seconds", type=cli.above_0, default=15.0, help="For which each stage is timed.")
    option("--small", action="store_true",
           help="Two narrow blocks in place of UNI's network, to try the script.")  # fmt: skip
    return parser


if __name__ == "__main__":
    cli.start(build_parser())  # what needs none of the slow imports below

import numpy as np
import timm
import torch
from torch.profiler import ProfilerActivity, profile


class Placeholders:
    """Lets modules be imported without packages that what is timed here does not use."""

    names = ("pandas", "scipy", "pyvips")

    def __init__(self) -> None:
        self.absent = []
        for name in self.names:
            try:
                importlib.import_module(name)
            except ImportError:
                self.absent.append(name)

    def find_spec(
        self, name: str, path: object = None, target: object = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name.split(".")[0] not in self.absent:
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)  # type: ignore[arg-type]

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> Placeholder:
        return Placeholder(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


class Placeholder(types.ModuleType):
    def __getattr__(self, name: str) -> Placeholder:
        if name.startswith("__"):
            raise AttributeError(name)
        return Placeholder(f"{self.__name__}.{name}")

    def __call__(self, *args: object, **options: object) -> int:
        if PLACEHOLDERS in sys.meta_path:  # modules are being imported: a setting
            return 0
        raise ImportError(f"{self.__name__} is not installed, and was thought not to be needed")


PLACEHOLDERS = Placeholders()
sys.meta_path.insert(0, PLACEHOLDERS)
import HISTEX
import Histology_Extractor as extractor
from method import devices
from method.network import Network, Spots
from method.section import Section, Split
from utils import TILE_PX, TOKEN_PX

sys.meta_path.remove(PLACEHOLDERS)

UM = 8.0  # of a superpixel
PITCH, RADIUS = 100 / UM, 27.5 / UM  # of Visium's spots, superpixels
STRIP = 64  # patches predicted at a time, as in prediction


# --------------------------------------------------------------------------------------------------
# measuring
# --------------------------------------------------------------------------------------------------
def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def busy_share(step: Callable[[], object], device: torch.device) -> float:
    """Share of the time in which kernels run on the card or, on a CPU, operators."""
    on_card = device.type == "cuda"
    activity = ProfilerActivity.CUDA if on_card else ProfilerActivity.CPU
    with profile(activities=[activity], acc_events=True) as found:
        start = time.perf_counter()
        step()
        wait(device)
        seconds = time.perf_counter() - start
    name = "self_device_time_total" if on_card else "self_cpu_time_total"
    return sum(getattr(event, name) for event in found.key_averages()) / 1e6 / seconds


def timed(step: Callable[[], object], seconds: float, device: torch.device) -> dict[str, float]:
    """Seconds of a step, which is repeated; peak memory in GB; the busy share."""
    step()  # chooses algorithms and gets memory
    wait(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    start, n = time.perf_counter(), 0
    while n == 0 or time.perf_counter() - start < seconds:
        step()
        n += 1
    wait(device)
    each = (time.perf_counter() - start) / n
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    return {"seconds": each, "gb": peak / 1e9, "busy": busy_share(step, device)}


def row(what: str, unit: str, found: dict[str, float], n_units: float) -> tuple[str, ...]:
    """A row of the table, for a whole section of ``n_units``."""
    seconds = found["seconds"] * n_units
    gb = f"{found['gb']:.2f}" if found["gb"] else "-"
    each = f"{1000 * found['seconds']:.3g} ms a {unit}"
    return what, each, f"~{seconds:.3g}", gb, f"{found['busy']:.0%}"


# --------------------------------------------------------------------------------------------------
# extraction
# --------------------------------------------------------------------------------------------------
def extraction(args: argparse.Namespace, device: torch.device) -> Iterator[tuple[str, ...]]:
    architecture = extractor.UNI_ARCHITECTURE | {"init_values": 1.0}
    if args.small:
        architecture |= {"embed_dim": 64, "depth": 2, "num_heads": 2}
    model = timm.create_model(**architecture).eval()
    statistics = extractor.IMAGENET_MEAN_STD
    backbone = extractor.Backbone(model, statistics, "", extractor.VIT_TILING, 32)
    side = math.ceil(args.mm * 1000 / UM * TOKEN_PX / TILE_PX) * TILE_PX  # px
    pixels = np.random.default_rng(0).integers(0, 200, (TILE_PX, side, 3), np.uint8)
    for precision in ("float32", "tf32", "bfloat16"):
        if precision == "tf32" and device.type != "cuda":
            continue
        options = argparse.Namespace(
            precision=precision, overlap=None, batch_size=args.batch_size, turns=extractor.TURNS[-1]
        )
        n = side // TOKEN_PX
        encoder = extractor.Encoder(backbone, device, options, n, n)
        found = timed(functools.partial(encoder.row, pixels), args.seconds, device)
        n_rows = len(encoder.tiling.starts(n))
        tiles = len(encoder.starts) / found["seconds"]
        yield row(f"extraction, {precision}: {tiles:.0f} tiles/s", "row of tiles", found, n_rows)
    model.cpu()


# --------------------------------------------------------------------------------------------------
# a section
# --------------------------------------------------------------------------------------------------
def lattice(side: int, most: int) -> np.ndarray:
    """Places (N, 2) of the spots nearest to the middle of a square of so many superpixels."""
    rows = np.arange(RADIUS, side - RADIUS, PITCH * math.sqrt(3) / 2)
    columns = np.arange(RADIUS, side - RADIUS - PITCH / 2, PITCH)
    places = [(r, c + PITCH / 2 * (i % 2)) for i, r in enumerate(rows) for c in columns]
    spots = np.array(places)
    return spots[np.argsort(((spots - side / 2) ** 2).sum(axis=1), kind="stable")[:most]]


def nearest(points: np.ndarray, places: np.ndarray, k: int) -> np.ndarray:
    """Indices (B, k) of the points nearest to each place: all distances, some places at a time."""
    there = torch.from_numpy(points)
    parts = np.array_split(places, math.ceil(len(places) / 500))
    found = [torch.cdist(torch.from_numpy(part), there).topk(k, largest=False)[1] for part in parts]
    return torch.cat(found).numpy()


def make_section(args: argparse.Namespace) -> tuple[Section, Split]:
    """Random tokens and counts; every row of the token map is the same, which takes no memory."""
    rng, side = np.random.default_rng(0), math.ceil(args.mm * 1000 / UM / 14) * 14
    spots = lattice(side, args.spots)
    counts = rng.integers(0, 9, (len(spots), args.genes)).astype(np.float32)
    around = nearest(spots, spots, min(7, len(spots)))[:, 1:]
    pairs = np.stack([np.arange(len(spots)).repeat(around.shape[1]), around.ravel()], axis=1)
    pairs = pairs[pairs[:, 0] < pairs[:, 1]]
    pairs = pairs[np.linalg.norm(spots[pairs[:, 0]] - spots[pairs[:, 1]], axis=1) < 1.1 * PITCH]
    parents = np.concatenate([np.arange(len(spots))[:, None].repeat(2, axis=1), pairs])
    n_features = 64 if args.small else 1024
    tokens = rng.normal(size=(1, side, n_features)).astype(np.float16)
    middles = np.moveaxis(np.indices((side, side)), 0, -1) + 0.5 - side / 2
    reach = np.linalg.norm(spots - side / 2, axis=1).max() + PITCH / 2
    preset = HISTEX.PRESETS["default"]
    section = Section(
        tokens=np.broadcast_to(tokens, (side, side, n_features)),
        tissue=np.linalg.norm(middles, axis=-1) < reach,
        spots=spots,
        counts=counts,
        points=spots[parents].mean(axis=1),
        expression=counts[parents].mean(axis=1),
        parents=parents,
        radius=RADIUS,
        context=preset.context,
        by_area=preset.by_area,
    )
    section.spacing = PITCH / 2
    section.token_statistics = (np.zeros(n_features, np.float32), np.ones(n_features, np.float32))
    order = rng.permutation(len(spots))
    n_train = round(0.9 * len(order))
    near = nearest(section.points, spots, min(section.context, len(section.points)))
    return section, Split(order[:n_train], np.sort(order[n_train:]), near)


# --------------------------------------------------------------------------------------------------
# training and prediction
# --------------------------------------------------------------------------------------------------
def training(
    args: argparse.Namespace, section: Section, split: Split, device: torch.device
) -> Iterator[tuple[str, ...]]:
    rule = HISTEX.Training(HISTEX.PRESETS["default"])
    n_epochs, n_steps = rule.length(len(split.train))
    network = HISTEX.DefaultNetwork(section, split.train).to(device)
    start = time.perf_counter()
    spots = Spots(network, section, split, device)
    wait(device)
    kept = "kept on the device" if spots.kept else "too large to be kept on the device"
    seconds = time.perf_counter() - start
    yield "training, spots", kept, f"{seconds:.3g}", "-", "-"
    progress = rule.start(network, n_epochs * n_steps)
    order = itertools.cycle(spots.split.train)
    size, n_some = math.ceil(len(split.train) / n_steps), min(10, n_steps)

    def some_steps() -> None:
        some = np.array(list(itertools.islice(order, n_some * size)))
        HISTEX.train_epoch(progress, spots.batches(some, n_some), device)

    found = timed(some_steps, args.seconds, device)
    found["seconds"] /= n_some
    what = f"training, one state: {n_epochs} epochs of {n_steps} steps of {size} spots"
    yield row(what, "step", found, n_epochs * n_steps)
    yield row(f"training, {args.states} states", "step", found, args.states * n_epochs * n_steps)


def strip_of_maps(networks: Sequence[Network], section: Section, expression: torch.Tensor) -> int:
    """All genes of a strip of superpixels, as wide as STRIP patches; how many superpixels.

    ``expression`` is that of the HR points (P, G), which is on the device.
    """
    device = expression.device
    halo, side = networks[0].halo, 2 * section.half + 1
    stride = (side + 1) // 2
    columns = min(STRIP * stride, section.tokens.shape[1] - 2 * halo) // stride * stride
    block = section.tokens[: stride + 2 * halo, : columns + 2 * halo]
    views = networks[0].views(devices.to_device(np.ascontiguousarray(block), device).float()[None])
    n = columns // stride
    near = torch.arange(section.context, device=device).repeat(n, 1) % len(expression)
    offsets = torch.ones(n, near.shape[1], 2, device=device)
    patches = torch.arange(n * side * side, device=device).view(n, -1) % (stride * columns)
    maps = []
    for network in networks:
        histology = network.embed_histology(views).flatten(0, 2)[patches]
        context = network.embed_expression(expression[near])
        latent = network.fuse(histology, context, offsets).flatten(0, 1)[: stride * columns]
        shares = network.interpolation(torch.ones(len(latent), near.shape[1], device=device))
        around = expression[near.repeat_interleave(stride * stride, dim=0)]
        interpolated = (shares[:, None] @ around)[:, 0]
        maps.append(network.to_counts(network.decode(latent, interpolated)))
    torch.stack(maps).median(dim=0)[0].to("cpu")
    return stride * columns


def prediction(
    args: argparse.Namespace, section: Section, split: Split, device: torch.device
) -> tuple[str, ...]:
    networks: list[Network] = [
        HISTEX.DefaultNetwork(section, split.train).to(device).eval() for _ in range(args.states)
    ]
    with torch.inference_mode():
        expression = devices.to_device(section.expression, device)
        n = strip_of_maps(networks, section, expression)
        found = timed(lambda: strip_of_maps(networks, section, expression), args.seconds, device)
    n_shown = int(section.tissue.sum())
    what = f"prediction, networks alone: {n_shown:,} superpixels, {args.states} states"
    return row(what, f"strip of {n} superpixels", found, n_shown / n)


def main(args: argparse.Namespace) -> None:
    device = devices.resolve_device(args.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else measure.processor()
    start = time.perf_counter()
    rows = list(extraction(args, device))
    devices.set_precision("auto", device)
    section, split = make_section(args)
    rows += training(args, section, split, device)
    rows.append(prediction(args, section, split, device))
    heads = ("stage", "measured", "seconds of a section", "peak memory (GB)", "busy")
    size = f"{args.mm:g} mm, {len(section.spots):,} spots, {args.genes:,} genes"
    lines = [*measure.table(heads, rows), "", f"* section: {size}, {args.states} states"]
    lines += [f"* device: {name}, torch {torch.__version__}, timm {timm.__version__}"]
    lines += [f"* the whole took {time.perf_counter() - start:.0f} s"]
    print("\n".join([*lines, *measure.origin(args.command)]), flush=True)


def run(argv: list[str] | None = None) -> int:
    return measure.run_benchmark(main, SCRIPT, build_parser(), argv)


if __name__ == "__main__":
    sys.exit(run())
