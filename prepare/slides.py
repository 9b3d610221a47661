"""Cut he-raw.tif out of a whole-slide image, at about 0.5 um per pixel.

    python prepare/slides.py --image SLIDE --directory DIR
    python prepare/slides.py --image SLIDE --directory DIR --region X Y WIDTH HEIGHT

Reads   .svs, .ndpi, .mrxs and kin through OpenSlide; TIFF, BigTIFF, OME-TIFF and their pyramids
        through tifffile; JPEG and PNG through libvips
Writes  he-raw.tif           the slide or a region of it, shrunk by a whole factor
        pixel-size-raw.txt   um per pixel, from the metadata or --pixel-size

A slide is never in memory as a whole. x, y, width and height are pixels of full resolution, x to
the right, y down; what was not scanned is white.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import utils
from prepare import options
from reading import cli

SCRIPT = "prepare/slides.py"


def build_parser() -> cli.Parser:
    parser = cli.Parser(__doc__)
    parser.add_argument("--image", type=Path, required=True, help="Slide or image.")
    parser.add_argument(
        "--directory",
        type=cli.sample_directory,
        required=True,
        help="Sample folder to write into; made if it does not exist.",
    )
    parser.add_argument(
        "--region",
        type=cli.not_negative,
        nargs=4,
        metavar=("X", "Y", "WIDTH", "HEIGHT"),
        help="Rectangle in pixels of full resolution (default: the whole slide).",
    )
    options.add_pixel_size(parser, "what the metadata say")
    cli.add_shared(parser)
    return parser


if __name__ == "__main__":
    cli.start(build_parser(), SCRIPT)  # what needs none of the slow imports below

from prepare import scans


def cut_region(slide: scans.Slide, region: list[int] | None, pixel_size_um: float) -> scans.Region:
    """The region (x, y, width, height), or the whole slide, shrunk to about 0.5 um per pixel."""
    x, y, width, height = region or (0, 0, *slide.size)
    if (
        min(x, y) < 0
        or min(width, height) < 1
        or x + width > slide.size[0]
        or y + height > slide.size[1]
    ):
        raise utils.StageError(
            f"--region {x} {y} {width} {height} does not lie within {slide.path}, which has "
            f"{slide.size[0]} columns and {slide.size[1]} rows.",
            "Give X Y WIDTH HEIGHT in pixels of full resolution.",
        )
    step = scans.whole_factor(pixel_size_um)
    if min(width, height) < step * utils.TILE_PX:
        raise utils.StageError(
            f"The region is {width} x {height} px, less than a tile of {utils.TILE_PX} px once it "
            f"is shrunk {step} times.",
            "Give a larger --region.",
        )
    return scans.Region(slide, x, y, width // step * step, height // step * step, step)


def main(stage: utils.Stage) -> None:
    args = stage.args
    stage.guard(utils.HE_RAW, utils.PIXEL_SIZE_RAW)
    with scans.open_slide(args.image) as slide:
        stage.use(args.image)
        pixel_size = args.pixel_size or slide.pixel_size_um
        if pixel_size is None:
            raise utils.StageError(
                f"{args.image} does not say its pixel size.",
                "Run the same command with --pixel-size UM, um per pixel of full resolution.",
            )
        region = cut_region(slide, args.region, pixel_size)
        stage.retire(utils.HE_RAW)  # one of another name
        with stage.writing(utils.HE_RAW, "he-raw.tif") as partial:
            scans.write_tiff(region, partial)
        with stage.writing(utils.PIXEL_SIZE_RAW) as partial:
            partial.write_text(f"{pixel_size * region.downsample:.8g}\n", encoding="utf-8")
        rows, columns = region.shape
        print(
            f"he-raw.tif: {columns} x {rows} px at {pixel_size * region.downsample:.5g} um per "
            f"pixel\nx, y of the slide become (x - {region.x}) / {region.downsample}, "
            f"(y - {region.y}) / {region.downsample} in locs-raw.csv"
        )
        stage.finish(region=[region.x, region.y, region.width, region.height])


def run(argv: list[str] | None = None) -> int:
    return cli.run_stage(main, SCRIPT, build_parser(), argv, makes_folders=True)


if __name__ == "__main__":
    sys.exit(run())
