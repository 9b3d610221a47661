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
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import utils
from benchmarks import measure
from reading import cli

SCRIPT = "benchmarks/calibration.py"
SIDES = (5_000, 12_000, 20_000)


def build_parser() -> cli.Parser:
    parser = cli.Parser(__doc__)
    option = parser.add_argument
    option("--before", type=Path, help="Checkout to compare with (default: no comparison).")
    option("--sides", type=cli.positive, nargs="+", default=SIDES, help="Sides of the images, px.")
    return parser


if __name__ == "__main__":
    cli.start(build_parser())  # what needs none of the slow imports below

import multiprocessing
import shutil
import subprocess
import tempfile
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import numpy as np
import pyvips

FORMATS: dict[str, dict[str, Any]] = {
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


def calibration(root: Path, folder: Path) -> list[str]:
    return [
        sys.executable, str(root / utils.CALIBRATION), "--directory", str(folder),
        "--force", "--max-megapixels", "5000",
    ]  # fmt: skip


def cells(command: list[str], log: Path) -> list[str]:
    """Wall seconds, CPU seconds and peak memory of a command."""
    facts = measure.run_measured(command, log)
    return [f"{facts[name]:.{digits}f}" for name, digits in (("seconds", 1), ("cpu", 1), ("gb", 2))]


def main(args: argparse.Namespace) -> None:
    programs = {"now": measure.ROOT}
    if args.before:
        programs = {"before": args.before, **programs}
    vips = shutil.which("vips")
    names = [*programs, "vips" if vips else "vips (not installed)"]
    rows = []
    for side in args.sides:
        for kind in FORMATS:
            with tempfile.TemporaryDirectory(prefix="calibration-") as work:
                folder, log = Path(work) / "sample", Path(work) / "log"
                with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as drawing:
                    drawing.submit(write_sample, folder, kind, side).result()
                row = [f"{side:,} px {kind}"]
                for root in programs.values():
                    row += cells(calibration(root, folder), log)
                if vips:
                    target = Path(work) / "he.jpg[Q=95,subsample_mode=off,strip]"
                    scale = str(PIXEL_SIZE_UM / utils.PIXEL_SIZE_UM)
                    source = folder / f"he-raw.{kind}"
                    command = [vips, "resize", str(source), str(target), scale, "--kernel", "cubic"]
                    row += cells(command, log)
                rows.append(row if vips else [*row, "", "", ""])
                print(" | ".join(rows[-1]), file=sys.stderr, flush=True)
    heads = ["image", *(f"{name}: {what}" for name in names for what in ("wall s", "CPU s", "GB"))]
    said = [vips, "--version"] if vips else ["echo", "no vips on the command line"]
    version = subprocess.run(said, capture_output=True, text=True, check=True).stdout.strip()
    print("# image_calibration.py on large images\n")
    print("\n".join([*measure.table(heads, rows), "", *measure.origin(args.command)]))
    print(f"* libvips {'.'.join(str(pyvips.version(i)) for i in range(3))} in Python; {version}")


def run(argv: list[str] | None = None) -> int:
    return measure.run_benchmark(main, SCRIPT, build_parser(), argv)


if __name__ == "__main__":
    sys.exit(run())
