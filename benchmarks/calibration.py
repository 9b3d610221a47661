"""Time and memory of image_calibration.py on large images, beside another commit and plain ways.

    python benchmarks/calibration.py --before ../before > benchmarks/CALIBRATION.md

Reads   another checkout of this project (--before); without it, its columns are left out
Writes  a table in Markdown to the console: wall seconds, CPU seconds and peak memory per image

An image of each size and format is drawn, calibrated from 0.2737 to 0.5 um per pixel by each
program in turn, and removed. A process of its own draws it: what this one has held would count as
memory of the programs that it starts. The plain ways are a few lines of libvips, with the same
kernel, and of OpenCV, which holds the whole image, and averages areas: decoded, resized and encoded
as a JPEG of the same quality, without spots, padding, checks or a record.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import utils
from benchmarks import measure
from reading import cli

SCRIPT = "benchmarks/calibration.py"
SIDES = (5_000, 12_000, 20_000)
FORMATS: dict[str, dict[str, Any]] = {
    "jpg": {"Q": 90},
    "png": {"compression": 1, "filter": "sub"},
    "tif": {"tile": True, "compression": "jpeg", "Q": 90, "tile_width": 256, "tile_height": 256},
}


def build_parser() -> cli.Parser:
    parser = cli.Parser(__doc__)
    option = parser.add_argument
    option("--before", type=Path, help="Checkout to compare with (default: no comparison).")
    option("--formats", choices=FORMATS, nargs="+", default=[*FORMATS], help="Of the images.")
    option("--sides", type=cli.positive, nargs="+", default=SIDES, help="Sides of the images, px.")
    return parser


if __name__ == "__main__":
    cli.start(build_parser())  # what needs none of the slow imports below

import multiprocessing
import tempfile
from concurrent.futures import ProcessPoolExecutor

import cv2
import numpy as np
import pyvips

PLAIN = {  # programs, called with the image, its scale and the JPEG to write
    "libvips": """
import sys, pyvips
source, scale, target = sys.argv[1:]
image = pyvips.Image.new_from_file(source, access="sequential").resize(float(scale), kernel="cubic")
image.jpegsave(target, Q=95, subsample_mode="off", keep="none")
""",
    "OpenCV": """
import sys, cv2
source, scale, target = sys.argv[1:]
image = cv2.resize(cv2.imread(source), None, None, float(scale), float(scale), cv2.INTER_AREA)
full = [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444]
cv2.imwrite(target, image, [cv2.IMWRITE_JPEG_QUALITY, 95, *full])
""",
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
    return [f"{facts[name]:.2f}" for name in ("seconds", "cpu", "gb")]


def measure_image(side: int, kind: str, programs: dict[str, Path]) -> list[str]:
    """A row: what each of our ``programs``, by their checkouts, and each plain way takes."""
    with tempfile.TemporaryDirectory(prefix="calibration-") as work:
        folder, log = Path(work) / "sample", Path(work) / "log"
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as drawing:
            drawing.submit(write_sample, folder, kind, side).result()
        row = [f"{side:,} px {kind}"]
        for root in programs.values():
            row += cells(calibration(root, folder), log)
        words = [str(folder / f"he-raw.{kind}"), str(PIXEL_SIZE_UM / utils.PIXEL_SIZE_UM)]
        for name, program in PLAIN.items():
            target = str(Path(work) / f"{name}.jpg")
            row += cells([sys.executable, "-c", program, *words, target], log)
    return row


def main(args: argparse.Namespace) -> None:
    programs = {"before": args.before} if args.before else {}
    programs["now"] = measure.ROOT
    rows = []
    for side in args.sides:
        for kind in args.formats:
            rows.append(measure_image(side, kind, programs))
            print(" | ".join(rows[-1]), file=sys.stderr, flush=True)
    names = (*programs, *PLAIN)
    heads = ["image", *(f"{name}: {what}" for name in names for what in ("wall s", "CPU s", "GB"))]
    print("# image_calibration.py on large images\n")
    print("\n".join([*measure.table(heads, rows), "", *measure.origin(args.command, args.before)]))
    print(
        f"* libvips {'.'.join(str(pyvips.version(i)) for i in range(3))}, OpenCV {cv2.__version__}"
    )


def run(argv: list[str] | None = None) -> int:
    return measure.run_benchmark(main, SCRIPT, build_parser(), argv)


if __name__ == "__main__":
    sys.exit(run())
