"""What analysis/report.html, the template of the page, is filled with.

Its style and its script are the files in report_files/.

The template escapes every text, for a gene may have any name; what is Markup was escaped here.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pandas as pd
from markupsafe import Markup
from scipy import sparse

import utils
from analysis.charts import LINE_STYLES, draw_histogram, draw_lines
from analysis.inputs import read_map
from analysis.scores import number_text, rounded
from analysis.spots import on_tissue

PARTS = Path(__file__).with_name("report_files")  # style and script of the page
STYLE = "style.css"
CODE = (  # in this order; later files use what earlier ones define
    "data.js", "colours.js", "view.js", "draw.js", "charts.js", "areas.js", "save.js", "genes.js",
    "controls.js", "start.js",
)  # fmt: skip
REGION_COLOURS = (  # Okabe and Ito's, which the colour-blind tell apart
    "#e69f00", "#56b4e9", "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7", "#999999",
)  # fmt: skip
TINTS = ((0, 0.0), (255, 0.45), (0, 0.4))  # grey and its share, for the regions beyond eight
SUPERPIXEL_MM2 = (utils.SUPERPIXEL_UM / 1000) ** 2
BIN = 0.05  # width of the histogram's bars, in r
MOST_SHOWN = 12  # values of a list in a record
KNOWN_FACTS = (
    "finished", "script", "arguments", "options", "seconds", "ended", "versions", "warnings",
    "inputs", "outputs",
)  # fmt: skip

KINDS: dict[str, tuple[tuple[type, ...], str]] = {  # of facts in a record, and their words
    "options": ((list,), "a list"),
    "warnings": ((list,), "a list"),
    "arguments": ((dict,), "an object"),
    "versions": ((dict,), "an object"),
    "seconds": ((float, int), "a number"),
    "ended": ((str,), "text"),
}


@dataclass
class SpotCounts:
    """Spots of locs.csv and what they measured."""

    ids: list[str]
    centres: np.ndarray  # (N, 2) row, column in superpixels
    radius: float  # superpixels
    discs: sparse.csr_array  # (N, rows * columns), area
    counts: sparse.csc_array  # (N, genes of cnts.csv)
    column: dict[str, int]  # of a gene in counts


@dataclass
class Labels:
    """A label a superpixel: regions, or an annotation."""

    codes: np.ndarray  # uint8 (rows, columns), 0 for none
    texts: list[str]  # of each label from 1 on: marker genes of a region, or a name; may be empty
    colours: list[str]


@dataclass
class Cells:
    """Cells of cells.csv.gz, or some of them where there are very many."""

    xy: np.ndarray  # (N, 2) in superpixels
    radius: np.ndarray  # (N,) of a circle of the cell's area, in superpixels
    classes: np.ndarray  # uint8 (N,), 0 for none
    names: list[str]  # of the classes from 1 on
    total: int  # cells in the file


@dataclass
class PageContent:
    """What the page shows: all but the maps, which are read one at a time."""

    shape: tuple[int, int]
    files: dict[str, Path]  # of the maps, by gene
    spreads: dict[str, Path]  # of their standard deviations, if there are any
    genes: list[str]  # in the page
    others: list[str]  # in the folder beside it
    held_out: pd.Series | None  # r by gene
    spots: SpotCounts | None
    regions: Labels | None
    annotation: Labels | None
    cells: Cells | None
    frame: tuple[str, list[float]]  # image of saved outlines, its pixels (x, y) in a superpixel
    histories: dict[str, pd.DataFrame]  # by state
    records: dict[str, dict[str, Any]]  # by script


def script_json(content: Any) -> Markup:
    """JSON that cannot end the <script> it stands in."""
    text = json.dumps(content, allow_nan=False, ensure_ascii=False, separators=(",", ":"))
    text = text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
    return Markup(text)  # nothing in it can end the element or begin another  # nosec B704


def shown_value(value: Any) -> str:
    """A fact of a record; of a long list, its length and its beginning."""
    if isinstance(value, list):
        text = ", ".join(map(str, value[:MOST_SHOWN]))
        return text if len(value) <= MOST_SHOWN else f"{len(value)} values: {text}, ..."
    return json.dumps(value) if isinstance(value, dict) else str(value)


def render(
    template: Path, stage: utils.Stage, content: PageContent, with_folder: bool, **more: Any
) -> Iterator[str]:
    """The page in pieces; ``more`` is what the template asks for beside the parts made here."""
    page = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    ).from_string(template.read_text(encoding="utf-8"))
    style, code = read_parts(STYLE), read_parts(*CODE)
    return page.generate(
        policy=policy(style, code, with_folder),
        style=style,
        code=code,
        here=len(content.genes),
        n_genes=len(content.files),
        sample=stage.directory.resolve().name,
        facts=facts_of(content),
        warnings=warnings_of(stage, content),
        genes=[(gene, r_of(content, gene)) for gene in content.genes],
        training=describe_training(content.histories),
        regions=describe_regions(content.regions),
        runs=[describe_run(script, content.records.get(script)) for script in utils.STAGES],
        **more,
    )


def facts_of(content: PageContent) -> list[tuple[str, str]]:
    images = (read_map(content.files[gene]) for gene in content.genes)
    image = next((image for image in images if np.isfinite(image).any()), None)
    if image is None:
        image = np.full(content.shape, np.nan)
    tissue = int(np.isfinite(image).sum())
    rows, columns = content.shape
    facts = [("genes", f"{len(content.files):,}")]
    if content.spots is not None:
        facts.append(("spots", count_spots(content.spots, image)))
    facts.append(("grid", f"{rows} by {columns} of {utils.SUPERPIXEL_UM:g} µm"))
    facts.append(("tissue", f"{tissue * SUPERPIXEL_MM2:.2f} mm²"))
    if content.held_out is not None:
        facts.append((f"median {content.held_out.name}", number_text(content.held_out.median())))
    if utils.HISTEX in content.records:
        facts.append(("maps made", str(content.records[utils.HISTEX].get("ended"))[:10]))
    return facts


def count_spots(spots: SpotCounts, image: np.ndarray) -> str:
    """How many there are; where some lack tissue, which HISTEX.py leaves out, how many it used."""
    n, used = len(spots.ids), int(on_tissue(spots.discs, image, spots.radius).sum())
    return f"{n:,}" if used == n else f"{used:,} of {n:,} with tissue"


def warnings_of(stage: utils.Stage, content: PageContent) -> list[tuple[str, str]]:
    """Who warns, and of what."""
    # Where the folder lies on the disk is nobody's business whom the page is sent to.
    place, name = str(stage.directory), stage.directory.resolve().name
    found = [("this report", note.replace(place, name)) for note in stage.notes]
    for script, record in content.records.items():
        found += [(script, str(note)) for note in record.get("warnings", [])]
    return found


def r_of(content: PageContent, gene: str) -> float | None:
    """Held-out r of a gene, if it is known."""
    return None if content.held_out is None else rounded(content.held_out.get(gene))


def ranks_of(content: PageContent, genes: list[str]) -> list[int | None]:
    """1 for the gene with the highest held-out r of all genes; None where no r is known."""
    if content.held_out is None:
        return [None] * len(genes)
    ranks = content.held_out.rank(ascending=False, method="min").dropna().astype(int)
    return [int(ranks[gene]) if gene in ranks else None for gene in genes]


def describe_held_out(content: PageContent) -> tuple[dict[str, Any], list[float | None]]:
    """Histogram and table of r; where in the histogram each gene with a map stands."""
    genes = [*content.genes, *content.others]
    unknown: list[float | None] = [None] * len(genes)
    if content.held_out is None:
        return {"lacks": f"{utils.HELD_OUT.name} is missing."}, unknown
    known = content.held_out.dropna()
    if known.empty:
        return {"lacks": "No gene has a held-out r."}, unknown
    low, middle, high = known.quantile([0.1, 0.5, 0.9])
    text = f"{len(known)} genes: median {middle:.2f}, 10 to 90 % from {low:.2f} to {high:.2f}."
    chart, axes = draw_histogram(
        "held-out", f"{str(known.name)[:-2].capitalize()} correlation of all genes", text,
        known.to_numpy(), BIN,
        (str(known.name), "genes"),
    )  # fmt: skip
    rows = [(gene, number_text(r, ".3f")) for gene, r in known.sort_values(ascending=False).items()]
    rows += [(gene, "unknown") for gene in content.held_out.index[content.held_out.isna()]]
    places = axes.x(content.held_out.reindex(genes))
    drawn = Markup(chart)  # analysis/charts.py escapes the text in it  # nosec B704
    shown = [None if np.isnan(x) else round(float(x), 1) for x in places]
    return {"lacks": "", "text": text, "chart": drawn, "rows": rows}, shown


def describe_training(histories: dict[str, pd.DataFrame]) -> dict[str, Any]:
    """Charts of the losses, and a row per network."""
    charts, rows = [], []
    for column, what in (("train_loss", "training loss"), ("held_out_loss", "held-out loss")):
        known = [table.dropna(subset=column) for table in histories.values() if column in table]
        series = [
            (table["epoch"].to_numpy(), table[column].to_numpy()) for table in known if len(table)
        ]
        if series:
            ends = ", ".join(f"{y[0]:.3g} to {y[-1]:.3g}" for _, y in series)
            text = f"{len(series)} networks; from the first to the last epoch: {ends}."
            title = f"{what.capitalize()} by epoch"
            chart = draw_lines(column, title, text, series, ("epoch", what))
            charts.append((title, Markup(chart)))  # as above  # nosec B704
    for state, table in histories.items():
        losses = table.get("held_out_loss", pd.Series(dtype=float)).dropna()
        lowest, epoch = "unknown", "unknown"
        if len(losses):
            lowest, at = f"{losses.min():.4g}", losses.index[int(losses.argmin())]
            epoch = f"{table['epoch'][at]:.0f}"
        rows.append((state, len(table), f"{table['train_loss'].iloc[-1]:.4g}", lowest, epoch))
    return {"charts": charts, "rows": rows, "line_styles": LINE_STYLES}


def region_colours(n: int) -> list[str]:
    """Colours of regions 1..n: eight, then lighter, then darker ones, and so on."""
    colours = []
    for i in range(n):
        base = REGION_COLOURS[i % len(REGION_COLOURS)]
        grey, share = TINTS[i // len(REGION_COLOURS) % len(TINTS)]
        rgb = (int(base[at : at + 2], 16) for at in (1, 3, 5))
        mixed = (round(value + (grey - value) * share) for value in rgb)
        colours.append("#" + "".join(f"{value:02x}" for value in mixed))
    return colours


def describe_regions(regions: Labels | None) -> list[tuple[Any, ...]] | None:
    """Number, colour, area, share and genes of each region."""
    if regions is None:
        return None
    sizes = np.bincount(regions.codes.ravel())
    total = max(1, sizes[1:].sum())
    return [
        (i, colour, f"{sizes[i] * SUPERPIXEL_MM2:.3g} mm²", f"{sizes[i] / total:.1%}", text)
        for i, (colour, text) in enumerate(zip(regions.colours, regions.texts, strict=True), 1)
        if sizes[i]
    ]


def describe_run(script: str, record: dict[str, Any] | None) -> dict[str, Any]:
    """The last run of a script: its row in the table, and all that its record tells."""
    if record is None:
        return {"script": script, "row": (script, "no finished run", "", "", ""), "known": False}
    options = " ".join(map(str, record.get("options", []))) or "defaults"
    ended = str(record.get("ended", "")).replace("T", " ")
    seconds, notes = number_text(record.get("seconds"), ",.1f"), record.get("warnings", [])
    arguments = {k: v for k, v in record.get("arguments", {}).items() if k != "directory"}
    results = {k: v for k, v in record.items() if k not in KNOWN_FACTS}
    lists = {"Results": results, "Arguments": arguments}
    files = [
        (f"{kind}: {name}", number_text(known["bytes"], ",.0f"), str(known["sha256"])[:12])
        for kind in ("inputs", "outputs")
        for name, known in record[kind].items()
    ]
    return {
        "script": script,
        "row": (script, ended, seconds, options, len(notes)),
        "known": True,
        "lists": {
            title: [(key.replace("_", " "), shown_value(value)) for key, value in facts.items()]
            for title, facts in lists.items()
        }
        | {"Versions": record.get("versions", {}).items()},
        "files": files,
    }


def read_parts(*names: str) -> Markup:
    """Files of our own, one after the other, as they stand in the page."""
    texts = [(PARTS / name).read_text(encoding="utf-8") for name in names]
    return Markup("\n" + "\n".join(texts))  # nothing of a user's is in them  # nosec B704


def policy(style: str, code: str, with_folder: bool) -> Markup:
    """The page may run its own script and style, show pictures it holds, and nothing else.

    With a folder of further maps, it may also run the scripts that lie on the same disk or server.
    """
    hashes = {}
    for tag, text in (("script", code), ("style", style)):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        hashes[tag] = f"{tag}-src 'sha256-{digest}'"
    beside = " 'self' file:" if with_folder else ""
    return Markup(  # hashes of our own files  # nosec B704
        f"default-src 'none'; img-src data:; {hashes['script']}{beside}; {hashes['style']}; "
        f"base-uri 'none'; form-action 'none'"
    )
