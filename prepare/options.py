"""The options that scripts of prepare/ share, and the types of their values.

Nothing slow is imported here, so that --help answers at once.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import utils
from reading import cli, genes

N_TRUTH_GENES = 300  # 812 x 812 superpixels of 300 genes are 0.8 GB when they are scored


def prepare_parser(doc: str) -> cli.Parser:
    """Parser with what all scripts have that prepare a whole sample; ``doc`` as in cli.Parser."""
    parser = cli.Parser(doc)
    option = parser.add_argument
    option("--directory", type=cli.sample_directory, required=True,
           help="Folder of the sample to write; it is made if it does not exist.")  # fmt: skip
    option("--genes", type=cli.names_or_file,
           help=f"Genes to predict: {genes.HELP}. They become gene-names.txt (default: get_HR.py "
                "chooses the genes).")  # fmt: skip
    cli.add_shared(parser)
    return parser


def add_image_options(parser: argparse.ArgumentParser) -> None:
    option = parser.add_argument
    option("--crop-um", type=cli.above_0, metavar="MARGIN",
           help="Cut the image to the spots and a margin of so many um (default: the whole "
                "image).")  # fmt: skip
    option("--downsample", type=cli.positive, metavar="FACTOR",
           help="Shrink the image by this whole factor (default: JPEG and PNG are copied as they "
                "are, slides and TIFF are shrunk to about 0.5 um per pixel).")  # fmt: skip


def add_pixel_size(parser: argparse.ArgumentParser, otherwise: str) -> None:
    """``otherwise`` says where the pixel size comes from without the option."""
    low, high = utils.MIN_PIXEL_SIZE_UM, utils.MAX_PIXEL_SIZE_UM
    size = cli.number(float, lambda um: low <= um <= high, f"between {low} and {high} um")
    parser.add_argument(
        "--pixel-size", type=size, metavar="UM",
        help=f"um per pixel of the image at full resolution (default: {otherwise}).",
    )  # fmt: skip


def add_truth_genes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--truth-genes", type=cli.not_negative, default=N_TRUTH_GENES, metavar="N",
        help="Number of genes in truth.npz: so many of the most variable ones, or all of --genes "
             "if that is given. 0 writes no truth.npz",
    )  # fmt: skip


def add_space_ranger_options(parser: argparse.ArgumentParser) -> None:
    """The folder of Space Ranger and the image that it was given."""
    option = parser.add_argument
    option("--outs", type=Path, required=True, help="Folder outs of Space Ranger.")
    option("--image", type=Path, help="The full-resolution image that Space Ranger was given.")
    option("--image-is", choices=("fullres", "hires"),
           help="hires: --image is Space Ranger's tissue_hires_image.png, much coarser. fullres: "
                "take the image even if its size is not that of the hires copy (default: the sizes "
                "decide).")  # fmt: skip
    add_image_options(parser)
