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

Files in: cnts-super/ and he.jpg; where they are there, locs.csv, radius.txt and cnts.csv,
held-out-r.csv, states/*/history.csv, the records, and segments.npy (uint8 or uint16 (rows,
columns): number of the region, 0 for none). What is missing, the page says. Files out: report.html.
"""

from __future__ import annotations

import argparse
import base64
import io
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd
from PIL import Image
from scipy import sparse
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import utils
from analysis.inputs import map_files, read_map, read_radius
from analysis.page import (
    SCRIPTS,
    fill,
    finite,
    html_facts,
    html_genes,
    html_held_out,
    html_records,
    html_regions,
    html_training,
    html_warnings,
    policy,
    region_colours,
    script_json,
)
from analysis.spots import disc_weights, on_tissue, score_totals, sum_discs
from reading import images, tables

SCRIPT = "analysis/report.py"
TEMPLATE = Path(__file__).with_name("report.html")
SEGMENTS, SEGMENTS_TABLE = "segments.npy", "segments.csv"
LEVELS = 255  # values that a byte holds beside 0, which is no tissue
SATURATED = 99.5  # percentile at which the colours end, as in cnts-super-plots/
COLOUR_MAPS = {"viridis": cv2.COLORMAP_VIRIDIS, "cividis": cv2.COLORMAP_CIVIDIS}
MOST_REGIONS = LEVELS
JPEG_QUALITY = 80


# --------------------------------------------------------------------------------------------------
# what the page shows
# --------------------------------------------------------------------------------------------------
@dataclass
class Spots:
    """Spots of locs.csv and what they measured."""

    ids: list[str]
    centres: np.ndarray  # (N, 2) row, column in superpixels
    radius: float  # superpixels
    discs: sparse.csr_array  # (N, rows * columns), area
    counts: sparse.csc_array  # (N, genes of cnts.csv)
    column: dict[str, int]  # of a gene in counts


@dataclass
class Sample:
    """All but the maps, which are read one at a time."""

    shape: tuple[int, int]
    files: dict[str, Path]  # of the maps, by gene
    genes: list[str]  # in the page
    held_out: pd.Series | None  # r by gene
    spots: Spots | None
    regions: np.ndarray | None  # uint8 (rows, columns)
    region_genes: list[str]  # markers of each region; or empty
    histories: dict[str, pd.DataFrame]  # by state
    records: dict[str, dict[str, Any]]  # by script


def read_sample(stage: utils.Stage, wanted: list[str] | None, n_genes: int) -> Sample:
    for artifact in (utils.HE, utils.MAPS):
        if stage.find(artifact) is None:
            raise stage.error(stage.directory / artifact.name, "is missing.")
    shape, files = images.grid_shape(stage), map_files(stage.directory)
    records, held_out = read_records(stage), read_held_out(stage)
    if utils.HISTEX in records:
        warn_of_changes(stage, records[utils.HISTEX])
    return Sample(
        shape,
        files,
        choose_genes(list(files), held_out, wanted, n_genes),
        held_out,
        read_spots(stage, shape),
        regions := read_regions(stage, shape),
        read_region_genes(stage, 0 if regions is None else int(regions.max())),
        read_histories(stage, records.get(utils.HISTEX)),
        records,
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


def read_held_out(stage: utils.Stage) -> pd.Series | None:
    path = stage.find(utils.HELD_OUT)
    if path is None:
        return None
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False)  # a gene may be called NA
        if repeated := utils.duplicates(table["gene"]):
            raise ValueError(f"{utils.some(repeated)} more than once")
        return table.set_index("gene")["held_out_r"].replace("", "nan").astype(float)
    except (ValueError, KeyError) as error:
        raise stage.error(path, f"is not a table of gene and held_out_r: {error}") from error


def choose_genes(
    mapped: list[str], held_out: pd.Series | None, wanted: list[str] | None, n_genes: int
) -> list[str]:
    """The genes asked for, or those with the highest held-out r; the rest follows as mapped."""
    if not mapped:
        raise utils.StageError(f"{utils.MAPS.name} holds no map.", f"Run {utils.HISTEX} again.")
    unknown = [gene for gene in wanted or [] if gene not in mapped]
    if unknown:
        raise utils.StageError(
            f"{utils.MAPS.name} holds no map of {utils.some(unknown)}.",
            f"Take genes of {utils.MAPS.name}/index.csv, such as {utils.some(mapped)}.",
        )
    if wanted:
        return list(dict.fromkeys(wanted))
    if held_out is not None:
        mapped = sorted(mapped, key=lambda gene: -np.nan_to_num(held_out.get(gene, -2.0), nan=-2.0))
    return mapped[:n_genes]


def read_spots(stage: utils.Stage, shape: tuple[int, int]) -> Spots | None:
    if any(stage.find(artifact) is None for artifact in (utils.LOCS, utils.RADIUS, utils.CNTS)):
        return None
    locs = tables.read_locs(stage, stage.path(utils.LOCS))
    counts, genes = tables.read_sparse_counts(stage, stage.path(utils.CNTS), locs.index)
    centres, radius = locs[["y", "x"]].to_numpy() / utils.TOKEN_PX, read_radius(stage.directory)
    return Spots(
        list(locs.index),
        centres,
        radius,
        disc_weights(centres, radius, shape),
        counts.tocsc(),
        {gene: i for i, gene in enumerate(genes)},
    )


def read_regions(stage: utils.Stage, shape: tuple[int, int]) -> np.ndarray | None:
    path = stage.directory / SEGMENTS
    if not path.is_file():
        return None
    try:
        regions = np.load(path, allow_pickle=False)
    except (OSError, EOFError, ValueError) as error:
        raise stage.error(path, f"is not a whole .npy array: {error}", "Make it anew.") from error
    if regions.dtype.kind != "u" or regions.shape != shape or regions.max() > MOST_REGIONS:
        raise stage.error(
            path,
            f"is {regions.dtype} {regions.shape}, highest number "
            f"{regions.max(initial=0)}; expected uint8 or uint16 {shape}, up to {MOST_REGIONS}.",
            "Make it anew, or move it away.",
        )
    return regions.astype(np.uint8)


def read_region_genes(stage: utils.Stage, n: int) -> list[str]:
    """Marker genes of the regions 1 to n, as segment.py names them; empty if it did not."""
    path = stage.directory / SEGMENTS_TABLE
    if n == 0 or not path.is_file():
        return []
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False)
        regions, genes = table["region"].tolist(), table["genes"].tolist()
    except (OSError, ValueError, KeyError) as error:
        stage.warn(f"{path.name} is left out: it has no regions with genes ({error!r:.100})")
        return []
    if regions != [str(i) for i in range(1, n + 1)]:
        stage.warn(f"{path.name} is left out: it does not list the regions 1 to {n}")
        return []
    return genes


def read_histories(stage: utils.Stage, record: dict[str, Any] | None) -> dict[str, pd.DataFrame]:
    """By state; those of an earlier run with more states are there, but not in the maps."""
    paths = sorted(stage.directory.glob(f"{utils.STATES.name}/*/history.csv"))
    n_states = (record or {}).get("arguments", {}).get("n_states", len(paths))
    histories = {}
    for path in paths[: int(n_states)]:
        try:
            table = pd.read_csv(path, dtype=float)
            table = table.dropna(subset=["epoch", "train_loss"])
        except (ValueError, KeyError) as error:
            remedy = f"Run: {stage.command(utils.HISTEX)}"
            raise stage.error(path, f"is not a table of losses: {error}", remedy) from error
        if len(table):
            histories[path.parent.name] = table
    return histories


def read_records(stage: utils.Stage) -> dict[str, dict[str, Any]]:
    """Records of the scripts that have one; their warnings are the page's."""
    records = {}
    for script in SCRIPTS:
        record = utils.read_record(stage, script)
        if record is not None and record["finished"]:
            records[script] = record
        else:
            state = "has no record" if record is None else "was cut off while it wrote its results"
            stage.warn(f"{script} {state} here; what it made is shown as it is")
    return records


def shrink(stage: utils.Stage, longest_px: int) -> bytes:
    """he.jpg as a JPEG with sides of at most ``longest_px``."""
    path = stage.path(utils.HE)
    try:
        with Image.open(path) as image:
            image.draft("RGB", (longest_px, longest_px))  # decodes a JPEG at 1/2, 1/4 or 1/8
            image = image.convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:
        raise stage.error(path, f"is not a whole image: {error}") from error
    times = min(1.0, longest_px / max(image.size))
    width, height = (max(1, round(side * times)) for side in image.size)
    small = image.resize((width, height), Image.Resampling.LANCZOS, reducing_gap=2.0)
    content = io.BytesIO()
    small.save(content, "JPEG", quality=JPEG_QUALITY)
    return content.getvalue()


def encode(values: np.ndarray) -> str:
    """Bytes of an array, deflated, as text."""
    return base64.b64encode(zlib.compress(values.tobytes())).decode()


def quantise(image: np.ndarray) -> tuple[np.ndarray, float, float]:
    """A map (rows, columns) as uint8, 0 where it has no value; its lowest and highest value."""
    there = np.isfinite(image)
    if not there.any():
        return np.zeros(image.shape, np.uint8), 0.0, 0.0
    low, high = float(image[there].min()), float(image[there].max())
    steps = (image[there].astype(np.float64) - low) / (high - low or 1) * (LEVELS - 1)
    codes = np.zeros(image.shape, np.uint8)
    codes[there] = 1 + np.rint(steps)
    return codes, low, high


def describe_gene(sample: Sample, gene: str) -> dict[str, Any]:
    """What the page needs to show a gene."""
    image = read_map(sample.files[gene])
    if image.shape != sample.shape:
        raise utils.StageError(
            f"{sample.files[gene]} is {image.shape}; the image has {sample.shape} superpixels.",
            f"Run the five scripts again, {utils.CALIBRATION} first.",
        )
    codes, low, high = quantise(image)
    shown = image[np.isfinite(image)]
    top = float(np.percentile(shown, SATURATED)) if len(shown) else 0.0
    content = {"codes": encode(codes), "low": low, "high": high, "top": top if top > 0 else 1.0}
    if sample.spots is not None and gene in sample.spots.column:
        content["spots"] = compare_spots(sample.spots, gene, image)
    return content


def compare_spots(spots: Spots, gene: str, image: np.ndarray) -> dict[str, Any]:
    """Counts of the spots beside sums of the map over their discs; None off the map's tissue."""
    measured = spots.counts[:, [spots.column[gene]]].toarray().ravel()
    summed, usable = sum_discs(spots.discs, image), on_tissue(spots.discs, image, spots.radius)
    r, ratio = score_totals(summed[usable], measured[usable])
    return {
        "measured": [float(f"{value:.6g}") for value in measured],
        "summed": [float(f"{s:.4g}") if u else None for s, u in zip(summed, usable, strict=True)],
        "r": finite(r),
        "ratio": finite(ratio),
    }


def describe_page(sample: Sample, markers: list[float | None]) -> dict[str, Any]:
    """What the page's script needs at once; a gene's own comes when it is chosen."""
    ramp = np.arange(256, dtype=np.uint8)[:, None]
    colours = {
        name: cv2.applyColorMap(ramp, code)[:, 0, ::-1].tobytes().hex()  # cv2 draws in BGR
        for name, code in COLOUR_MAPS.items()
    }
    content = {
        "shape": sample.shape,
        "um": utils.SUPERPIXEL_UM,
        "genes": sample.genes,
        "markers": markers,
        "colours": colours,
    }
    if (spots := sample.spots) is not None:
        rows, columns = np.round(spots.centres.T, 3).tolist()
        content["spots"] = {"ids": spots.ids, "rows": rows, "columns": columns}
        content["radius"] = spots.radius
    if sample.regions is not None:
        content["regions"] = {
            "codes": encode(sample.regions),
            "colours": region_colours(int(sample.regions.max())),
        }
    return content


def gene_scripts(sample: Sample) -> Iterator[str]:
    """A data block for each gene; only one map is in memory at a time."""
    for i, gene in enumerate(tqdm(sample.genes, desc="maps", disable=None)):
        content = script_json(describe_gene(sample, gene))
        yield f'<script type="application/json" id="gene-{i}">{content}</script>\n'


# --------------------------------------------------------------------------------------------------
# the command
# --------------------------------------------------------------------------------------------------
def gene_list(text: str | None) -> list[str] | None:
    if text is None:
        return None
    genes = [gene.strip() for gene in text.split(",") if gene.strip()]
    if not genes:
        raise utils.StageError(f"--genes {text} names no gene.", "Name some: --genes KRT8,CD3E")
    return genes


def html_file(text: str) -> Path:
    if not text.lower().endswith((".html", ".htm")):
        raise argparse.ArgumentTypeError(f"{text} does not end in .html")
    return Path(text)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    option = parser.add_argument
    option("--directory", type=utils.sample_directory, required=True, help="Folder of the sample.")
    option("--output", type=html_file, help="The page; without it, report.html in the sample.")
    option("--genes", help="Genes of the page, with commas between them.")
    option(
        "--n-genes",
        type=utils.positive,
        default=50,
        help="Without --genes: how many, the highest held-out r first; default 50.",
    )
    option(
        "--image-px",
        type=utils.positive,
        default=4000,
        help="Longest side of the H&E in the page, in pixels; default 4000.",
    )
    parser.set_defaults(allow_stale=False)
    return parser


def write_report(stage: utils.Stage) -> None:
    args = stage.args
    output = args.output or args.directory / "report.html"
    sample = read_sample(stage, gene_list(args.genes), args.n_genes)
    template = TEMPLATE.read_text(encoding="utf-8")
    held_out, markers = html_held_out(sample)
    parts = {
        "policy": policy(template),
        "sample": escape(args.directory.resolve().name),
        "facts": html_facts(sample),
        "warnings": html_warnings(stage, sample),
        "genes": html_genes(sample),
        "held_out": held_out,
        "training": html_training(sample.histories),
        "regions": html_regions(sample.regions, sample.region_genes),
        "records": html_records(sample.records),
        "data": script_json(describe_page(sample, markers)),
        "image": base64.b64encode(shrink(stage, args.image_px)).decode(),
        "maps": gene_scripts(sample),
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    with utils.atomic(output) as partial:
        with partial.open("w", encoding="utf-8", newline="\n") as file:
            file.writelines(fill(template, parts))
        size = partial.stat().st_size
    print(f"wrote {output}: {size / 1e6:,.1f} MB, {len(sample.genes)} genes")


def main(argv: list[str] | None = None) -> int:
    return utils.run_stage(write_report, SCRIPT, build_parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
