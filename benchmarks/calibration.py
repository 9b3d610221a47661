"""Time and memory of image_calibration.py on large images, beside another commit and bare libvips.

    python benchmarks/calibration.py --before ../before > benchmarks/CALIBRATION.md

Reads   another checkout of this project (--before), and the command line of libvips for the limit
        (apt-get install libvips-tools); without them, their columns stay empty
Writes  a table in Markdown to the console: wall seconds, CPU seconds and peak memory per image

An image of each size and format is drawn, calibrated from 0.2737 to 0.5 um per pixel by each
program in turn, and removed. A process of its own draws it: what this one has held would count as
memory of the programs that it starts. The limit is ``vips resize``: the same decoding, the same
kernel and the same encoding, without spots, padding, checks or a record.
"""

from __future__ import annotations

import argparse
import multiprocessing
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pyvips

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import utils
from benchmarks.stages import processor, run_measured

SIDES = (5_000, 12_000, 20_000)
FORMATS: dict[str, dict[str, int | str | bool]] = {
    "jpg": {"Q": 90},
    "png": {"compression": 1, "filter": "sub"},
    "tif": {"tile": True, "compression": "jpeg", "Q": 90, "tile_width": 256, "tile_height": 256},
}
PIXEL_SIZE_UM = 0.2737  # of a common scanner at 40x: no whole factor of 0.5
PATCH_PX = 2_500  # drawn once and repeated


def draw(path: Path, side: int) -> None:
    """Blurred cells in pink and violet under camera noise, so that nothing packs too well."""
    rng = np.random.default_rng(0)
    coarse = rng.normal((205, 150, 190), (25, 35, 22), (PATCH_PX // 10, PATCH_PX // 10, 3))
    smooth = pyvips.Image.new_from_array(coarse.astype(np.float32)).resize(10)
    noise = rng.normal(0, 4, (PATCH_PX, PATCH_PX, 3))
    patch = (smooth.numpy() + noise).clip(0, 255).astype(np.uint8)
    image = pyvips.Image.new_from_array(patch, interpretation="srgb")
    times = -(-side // PATCH_PX)
    whole = image.replicate(times, times).crop(0, 0, side, side)
    whole.write_to_file(str(path), keep="none", **FORMATS[path.suffix[1:]])


def write_sample(folder: Path, kind: str, side: int) -> None:
    folder.mkdir()
    draw(folder / f"he-raw.{kind}", side)
    pitch = utils.VISIUM_PITCH_UM / PIXEL_SIZE_UM
    along = np.arange(pitch, min(side, 20 * pitch), pitch)
    lines = [f"s{x:.0f}x{y:.0f},{x:.1f},{y:.1f}" for y in along for x in along]
    (folder / "locs-raw.csv").write_text("\n".join([",x,y", *lines]) + "\n", encoding="utf-8")
    (folder / "pixel-size-raw.txt").write_text(f"{PIXEL_SIZE_UM}\n", encoding="utf-8")


def measure(command: list[str], log: Path) -> str:
    """Wall seconds, CPU seconds and peak memory of a command, as cells of the table."""

    def cpu() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    before = cpu()
    seconds, memory = run_measured(command, log)
    return f"{seconds:.1f} | {cpu() - before:.1f} | {memory:.2f}"


def calibration(root: Path, folder: Path) -> list[str]:
    return [
        sys.executable, str(root / utils.CALIBRATION), "--directory", str(folder),
        "--force", "--max-megapixels", "5000",
    ]  # fmt: skip


def build_parser() -> utils.Parser:
    parser = utils.Parser(__doc__)
    parser.add_argument(
        "--before", type=Path, help="Checkout to compare with (default: no comparison)."
    )
    parser.add_argument(
        "--sides", type=utils.positive, nargs="+", default=SIDES, help="Sides of the images, px."
    )
    return parser


def said(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def commit(root: Path) -> str:
    return said("git", "-C", str(root), "rev-parse", "--short", "HEAD")


def main(args: argparse.Namespace) -> None:
    programs = {"this commit": ROOT}
    if args.before:
        programs = {"before": args.before, **programs}
    vips = shutil.which("vips")
    names = [f"{name} ({commit(root)})" for name, root in programs.items()]
    names.append("vips" if vips else "vips: not installed")
    print("# image_calibration.py on large images\n")
    print(f"{processor()}, {platform.system()}; Python {platform.python_version()}.", end=" ")
    print(f"libvips {'.'.join(str(pyvips.version(i)) for i in range(3))} in Python", end=", ")
    shell = said(vips, "--version") if vips else "none"
    print(f"{shell} in the shell.\n")
    print(f"Command: python benchmarks/calibration.py {' '.join(sys.argv[1:])}\n")
    print("Each cell: wall seconds, CPU seconds, peak memory in GB.\n")
    print(f"| image | {' | '.join(f'{name}: wall s | CPU s | GB' for name in names)} |")
    print("|---" * (1 + 3 * len(names)) + "|")
    for side in args.sides:
        for kind in FORMATS:
            with tempfile.TemporaryDirectory(prefix="calibration-") as work:
                folder, log = Path(work) / "sample", Path(work) / "log"
                with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as drawing:
                    drawing.submit(write_sample, folder, kind, side).result()
                cells = [measure(calibration(root, folder), log) for root in programs.values()]
                if vips:
                    source, scale = folder / f"he-raw.{kind}", PIXEL_SIZE_UM / utils.PIXEL_SIZE_UM
                    target = f"{work}/he.jpg[Q=95,subsample_mode=off,strip]"
                    command = [vips, "resize", str(source), target, str(scale)]
                    command += ["--kernel", "cubic"]
                    cells.append(measure(command, log))
                else:
                    cells.append(" | | ")
                print(f"| {side:,} px {kind} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main(build_parser().parse_args())
