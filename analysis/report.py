"""Write report.html: one page to look at a sample, self-contained, for any browser, offline.

    python analysis/report.py --directory data/section
    python analysis/report.py --directory data/section --genes KRT8,CD3E --output figures/krt8.html

The page shows the H&E with zoom and pan; over it the map of any of its genes, with an opacity
slider, or the regions of a segmentation; the spots on the scale of the map, and both against each
other; the held-out correlation of all genes; the training curves; the records of the five scripts;
and what there is to warn of. It asks for nothing over the network, and forbids itself to.

A map is stored in 255 even steps from its lowest to its highest value, and 0 where it has none:
what the page shows in numbers is the map to half a step, 1/508 of its range. Its colours go from 0
to the 99.5th percentile of the map. All are counts per superpixel of 8 um. Spots are coloured by
their counts divided by the superpixels that their disc covers.

Reads   cnts-super/ and he.jpg; where they are there, locs.csv, radius.txt and cnts.csv,
        held-out-r.csv, states/*/history.csv, the records, and segments.npy (whole numbers (rows,
        columns): number of the region, 0 for none) with segments.csv. What is missing, the page
        says.
Writes  report.html, and report.json, the record of all pages in its folder.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import utils
from analysis import files
from reading import cli
from reading import genes as gene_lists

SCRIPT = "analysis/report.py"


def html_file(text: str) -> Path:
    if not text.lower().endswith((".html", ".htm")):
        raise argparse.ArgumentTypeError(f"{text} does not end in .html")
    return Path(text)


def build_parser() -> cli.Parser:
    parser = cli.Parser(__doc__)
    option = parser.add_argument
    option(
        "--directory",
        type=cli.sample_directory,
        required=True,
        help="Folder of the sample.",
    )
    genes_help = f"Genes of the page: {gene_lists.HELP} (default: see --n-genes)."
    option("--genes", type=cli.names_or_file, help=genes_help)
    option(
        "--n-genes",
        type=cli.positive,
        default=50,
        help="Without --genes: how many genes, the highest held-out r first.",
    )
    option(
        "--image-px",
        type=cli.positive,
        default=4000,
        help="Longest side of the H&E in the page, in pixels.",
    )
    option(
        "--output",
        type=html_file,
        metavar="FILE",
        help=f"The page, a file (default: {files.REPORT.name} in the folder of the sample).",
    )
    cli.add_shared(parser)
    parser.set_defaults(allow_stale=False)  # a stale sample is shown, with a warning in the page
    return parser


if __name__ == "__main__":
    cli.start(build_parser(), SCRIPT)  # what needs none of the slow imports below

import base64
import zlib
from collections.abc import Iterator
from typing import Any

import cv2
import numpy as np
import pandas as pd
import pyvips

from analysis import inputs, page, sheets
from analysis.page import PageContent, SpotCounts
from analysis.regions import read_measured_spots
from analysis.scores import rounded
from analysis.spots import disc_weights, on_tissue, score_totals, sum_discs
from reading import images
from writing.progress import Bar

TEMPLATE = Path(__file__).with_name("report.html")
LARGEST_LOSS = 1e30
LEVELS = 255  # values that a byte holds beside 0, which is no tissue
SATURATED = 99.5  # percentile at which the colours end, as in cnts-super-plots/
COLOUR_MAPS = {"viridis": cv2.COLORMAP_VIRIDIS, "cividis": cv2.COLORMAP_CIVIDIS}
JPEG_QUALITY = 80


# --------------------------------------------------------------------------------------------------
# reading
# --------------------------------------------------------------------------------------------------
def read_content(stage: utils.Stage, given: str | Path | None, n_genes: int) -> PageContent:
    for artifact in (utils.HE, utils.MAPS):
        inputs.path_of(stage, artifact)
    shape, files_of_maps = images.grid_shape(stage), inputs.map_files(stage.directory)
    records, held_out = read_records(stage), inputs.read_held_out(stage)
    inputs.note_inputs(stage, utils.HE, utils.MAPS, utils.LOCS, utils.RADIUS, utils.CNTS)
    if utils.HISTEX in records:
        warn_of_changes(stage, records[utils.HISTEX])
    regions = read_regions(stage, shape)
    return PageContent(
        shape=shape,
        files=files_of_maps,
        genes=inputs.choose_genes(list(files_of_maps), held_out, given, n_genes),
        held_out=held_out,
        spots=read_spot_counts(stage, shape),
        regions=regions,
        region_genes=read_region_genes(stage, regions),
        histories=read_histories(stage, records.get(utils.HISTEX)),
        records=records,
    )


def warn_of_changes(stage: utils.Stage, record: dict[str, Any]) -> None:
    """A sample with outdated or edited maps is shown all the same."""
    name = utils.MAPS.name
    try:
        stage.require(utils.MAPS)
    except utils.StageError as error:
        stage.warn(str(error))
        return
    if stage.inputs[name]["sha256"] != record["outputs"][name]["sha256"]:
        stage.warn(f"{name} was edited after {utils.HISTEX} wrote it")


def read_spot_counts(stage: utils.Stage, shape: tuple[int, int]) -> SpotCounts | None:
    if any(stage.find(artifact) is None for artifact in (utils.LOCS, utils.RADIUS, utils.CNTS)):
        return None
    ids, centres, counts, genes = read_measured_spots(stage)
    radius = inputs.read_radius(stage.directory)
    return SpotCounts(
        ids=list(ids),
        centres=centres,
        radius=radius,
        discs=disc_weights(centres, radius, shape),
        counts=counts.tocsc(),
        column={gene: i for i, gene in enumerate(genes)},
    )


def read_regions(stage: utils.Stage, shape: tuple[int, int]) -> np.ndarray | None:
    path = stage.directory / files.SEGMENTS.name
    inputs.note_inputs(stage, files.SEGMENTS, files.SEGMENT_TABLE)  # also that there are none
    if not path.is_file():
        return None
    try:
        regions = inputs.load_labels(path, shape, LEVELS)
    except ValueError as error:
        raise stage.error(path, f"{error}.", "Make it anew, or move it away.") from error
    return regions.astype(np.uint8)


def read_region_genes(stage: utils.Stage, regions: np.ndarray | None) -> list[str]:
    """Marker genes of the regions 1, 2, ..., as segment.py names them; empty if it did not."""
    n = 0 if regions is None else int(regions.max())
    genes = None
    if n:
        genes = inputs.read_label_texts(stage, files.SEGMENT_TABLE, "genes", n, needed=True)
    return (genes or [])[:n]


def read_histories(stage: utils.Stage, record: dict[str, Any] | None) -> dict[str, pd.DataFrame]:
    """By state; those of an earlier run with more states are there, but not in the maps."""
    paths = sorted(stage.directory.glob(f"{utils.STATES.name}/*/history.csv"))
    n_states = str((record or {}).get("arguments", {}).get("n_states", ""))
    histories = {}
    for path in paths[: int(n_states) if n_states.isdecimal() else None]:

        def refuse(problem: str, path: Path = path) -> utils.StageError:
            problem = f"is not a table of losses: it {problem}"
            return stage.error(path, problem, inputs.anew(stage, utils.HISTEX))

        stage.use(path)
        table = sheets.read_sheet(path, ["epoch", "train_loss"], refuse)
        table = pd.DataFrame(
            {name: sheets.numbers_in(table, name, refuse, LARGEST_LOSS) for name in map(str, table)}
        )
        table = table.dropna(subset=["epoch", "train_loss"])
        if len(table):
            histories[path.parent.name] = table
    return histories


def checked(stage: utils.Stage, script: str, record: dict[str, Any]) -> dict[str, Any]:
    """The record, if those of its facts that the page reads are of their kinds."""
    for name, (kind, what) in page.KINDS.items():
        value = record.get(name, kind[0]())
        if not isinstance(value, kind) or isinstance(value, bool):
            raise stage.error(
                stage.directory / utils.record_name(script),
                f"is no whole record of {script}: {name} is {str(value)[:40]!r}, not {what}.",
                inputs.new_record(stage, script),
            )
    return record


def read_records(stage: utils.Stage) -> dict[str, dict[str, Any]]:
    """Records of the scripts that have one; their warnings are the page's."""
    records = {}
    for script in utils.STAGES:
        path = stage.directory / utils.record_name(script)
        stage.use(path)
        record = utils.read_record(stage, script)
        if record is not None and record["finished"]:
            records[script] = checked(stage, script, record)
        else:
            state = "has no record" if record is None else "was cut off while it wrote its results"
            stage.warn(f"{script} {state} here; what it made is shown as it is")
    return records


# --------------------------------------------------------------------------------------------------
# what the page's script draws
# --------------------------------------------------------------------------------------------------
def shrink(stage: utils.Stage, longest_px: int) -> bytes:
    """he.jpg as a JPEG with sides of at most ``longest_px``."""
    path = stage.path(utils.HE)
    try:
        # revalidate: he.jpg may have changed since this process read it last
        image = pyvips.Image.thumbnail(
            f"{path}[revalidate]",
            longest_px,
            height=longest_px,
            size="down",
            no_rotate=True,
            fail_on="error",
        )
        return image.jpegsave_buffer(Q=JPEG_QUALITY, keep="none")
    except pyvips.Error as error:
        raise stage.error(path, f"is not a whole image: {error}") from error


def encode(values: np.ndarray) -> str:
    """Bytes of an array, deflated, as text."""
    return base64.b64encode(zlib.compress(values.tobytes())).decode()


def quantise(image: np.ndarray) -> tuple[np.ndarray, float, float]:
    """A map (rows, columns) as uint8, 0 where it has no value; its lowest and highest value."""
    there = np.isfinite(image)
    codes = np.zeros(image.shape, np.uint8)
    if not there.any():
        return codes, 0.0, 0.0
    values = image[there].astype(np.float64)
    low, high = float(values.min()), float(values.max())
    codes[there] = 1 + np.rint((values - low) / (high - low or 1) * (LEVELS - 1))
    return codes, low, high


def describe_gene(content: PageContent, gene: str) -> dict[str, Any]:
    """What the page needs to show a gene."""
    image = inputs.read_map(content.files[gene])
    if image.shape != content.shape:
        raise utils.StageError(
            f"{content.files[gene]} is {image.shape}; the image has {content.shape} superpixels.",
            f"Run the five scripts again, {utils.CALIBRATION} first.",
        )
    codes, low, high = quantise(image)
    shown = image[np.isfinite(image)]
    top = float(np.percentile(shown, SATURATED)) if len(shown) else 0.0
    facts = {"codes": encode(codes), "low": low, "high": high, "top": top if top > 0 else 1.0}
    if content.spots is not None and gene in content.spots.column:
        facts["spots"] = compare_spots(content.spots, gene, image)
    return facts


def compare_spots(spots: SpotCounts, gene: str, image: np.ndarray) -> dict[str, Any]:
    """Counts of the spots beside sums of the map over their discs; None off the map's tissue."""
    measured = spots.counts[:, [spots.column[gene]]].toarray().ravel()
    summed, usable = sum_discs(spots.discs, image), on_tissue(spots.discs, image, spots.radius)
    r, ratio = score_totals(summed[usable], measured[usable])
    return {
        "measured": [float(f"{value:.6g}") for value in measured],
        "summed": [float(f"{s:.4g}") if u else None for s, u in zip(summed, usable, strict=True)],
        "r": rounded(r),
        "ratio": rounded(ratio),
    }


def describe_page(content: PageContent, markers: list[float | None]) -> dict[str, Any]:
    """What the page's script needs at once; a gene's own comes when it is chosen."""
    ramp = np.arange(256, dtype=np.uint8)[:, None]
    colours = {
        name: cv2.applyColorMap(ramp, code)[:, 0, ::-1].tobytes().hex()  # cv2 draws in BGR
        for name, code in COLOUR_MAPS.items()
    }
    facts = {
        "shape": content.shape,
        "um": utils.SUPERPIXEL_UM,
        "genes": content.genes,
        "markers": markers,
        "colours": colours,
    }
    if (spots := content.spots) is not None:
        rows, columns = np.round(spots.centres.T, 3).tolist()
        facts["spots"] = {"ids": spots.ids, "rows": rows, "columns": columns}
        facts["radius"] = spots.radius
    if content.regions is not None:
        names = page.region_colours(int(content.regions.max()))
        facts["regions"] = {"codes": encode(content.regions), "colours": names}
    return facts


def each_gene(content: PageContent) -> Iterator[str]:
    """A data block for each gene; only one map is in memory at a time."""
    for gene in Bar(content.genes, "maps"):
        yield page.script_json(describe_gene(content, gene))


def main(stage: utils.Stage) -> None:
    args, stage.keeps_others = stage.args, True  # the other pages of this folder
    name = args.output.name if args.output else files.REPORT.name
    artifact = utils.Artifact((name,), SCRIPT, files.REPORT.what, user_may_bring=True)
    stage.guard(artifact)
    content = read_content(stage, args.genes, args.n_genes)
    held_out, markers = page.describe_held_out(content)
    pieces = page.render(
        TEMPLATE,
        stage,
        content,
        held_out=held_out,
        data=page.script_json(describe_page(content, markers)),
        image=base64.b64encode(shrink(stage, args.image_px)).decode(),
        maps=each_gene(content),
    )
    with (
        stage.writing(artifact) as partial,
        partial.open("w", encoding="utf-8", newline="\n") as file,
    ):
        file.writelines(pieces)
    stage.finish(genes=len(content.genes))


def run(argv: list[str] | None = None) -> int:
    return cli.run_stage(main, SCRIPT, build_parser(), argv)


if __name__ == "__main__":
    sys.exit(run())
