"""The options of HISTEX.py, apart from it so that --help need not wait for torch."""

from __future__ import annotations

from pathlib import Path

from reading import cli


def parser(doc: str) -> cli.Parser:
    parser = cli.stage_parser(doc)
    cli.add_device(parser)
    option = parser.add_argument
    option(
        "--epochs",
        type=cli.positive,
        default=500,
        help="The most epochs (passes over the spots) per state; training mostly ends before.",
    )
    option(
        "--n-states",
        type=cli.positive,
        default=5,
        help="Number of networks that are trained; a map is made from their median.",
    )
    option(
        "--preset",
        default="default",
        help="Row of PRESETS in HISTEX.py: the network and how it is trained. 'published' is the "
        "published method.",
    )
    option(
        "--reference",
        type=Path,
        metavar="FILE",
        help="A reference, made by reference/learn.py from sections whose truth is known. The "
        "network sees its features beside the tokens.",
    )
    option(
        "--no-registration",
        action="store_true",
        help="Leave the image where it lies, also where the spots show clearly that it lies "
        "beside them.",
    )
    option(
        "--seed",
        type=cli.not_negative,
        default=0,
        help="Random seed; state i is trained with seed + i.",
    )
    option(
        "--batch-size",
        type=cli.positive,
        help="Spots per training step (default: the preset's).",
    )
    option(
        "--learning-rate",
        type=cli.above_0,
        help="Step size of the training (default: the preset's).",
    )
    option(
        "--uncertainty",
        action="store_true",
        help="Also write the standard deviation of every map, calibrated on held-out spots.",
    )
    option("--keep-background", action="store_true", help="Predict outside the tissue as well.")
    add_maps(parser)
    return parser


def add_maps(parser: cli.Parser) -> None:
    """How maps are written."""
    option = parser.add_argument
    option(
        "--map-format", choices=("pickle", "npy"), default="pickle", help="File format of the maps."
    )
    option(
        "--dtype",
        choices=("float32", "float16"),
        default="float32",
        help="Number format of the maps; float16 needs half the space and keeps three digits.",
    )
    option("--n-plots", type=cli.not_negative, default=12, help="Number of genes to draw.")
