"""The parts of analysis/report.py's page as HTML.

Every text from outside goes through escape() or script_json(): a gene may have any name.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import sparse

import utils
from analysis.charts import LINE_STYLES, draw_histogram, draw_lines
from analysis.inputs import read_map
from analysis.scores import number_text, rounded

REGION_COLOURS = (  # Okabe and Ito's, which the colour-blind tell apart
    "#e69f00", "#56b4e9", "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7", "#999999",
)  # fmt: skip
TINTS = ((0, 0.0), (255, 0.45), (0, 0.4))  # grey and its share, for the regions beyond eight
BIN = 0.05  # width of the histogram's bars, in r
MOST_SHOWN = 12  # values of a list in a record
KNOWN_FACTS = (
    "finished", "script", "arguments", "options", "seconds", "ended", "versions", "warnings",
    "inputs", "outputs",
)  # fmt: skip


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
class PageContent:
    """What the page shows: all but the maps, which are read one at a time."""

    shape: tuple[int, int]
    files: dict[str, Path]  # of the maps, by gene
    genes: list[str]  # in the page
    held_out: pd.Series | None  # r by gene
    spots: SpotCounts | None
    regions: np.ndarray | None  # uint8 (rows, columns)
    region_genes: list[str]  # markers of each region; or empty
    histories: dict[str, pd.DataFrame]  # by state
    records: dict[str, dict[str, Any]]  # by script


def script_json(content: Any) -> str:
    """JSON that cannot end the <script> it stands in."""
    text = json.dumps(content, allow_nan=False, ensure_ascii=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def html_table(caption: str, header: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    """A table whose first column names the rows."""
    head = "".join(f'<th scope="col">{escape(str(cell))}</th>' for cell in header)
    body = []
    for first, *rest in rows:
        cells = "".join(f"<td>{escape(str(cell))}</td>" for cell in rest)
        body.append(f'<tr><th scope="row">{escape(str(first))}</th>{cells}</tr>')
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption)}"><table>'
        f"<caption>{escape(caption)}</caption><thead><tr>{head}</tr></thead>"
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def html_details(summary: str, content: str) -> str:
    return f"<details><summary>{escape(summary)}</summary>{content}</details>"


def html_list(pairs: Iterable[tuple[str, Any]]) -> str:
    items = "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(str(v))}</dd></div>" for k, v in pairs)
    return f"<dl>{items}</dl>"


def absent(what: str, remedy: str) -> str:
    return f'<p class="absent"><strong>{escape(what)}</strong> {escape(remedy)}</p>'


def words(name: str) -> str:
    return name.replace("_", " ")


def shown_value(value: Any) -> str:
    """A fact of a record; of a long list, its length and its beginning."""
    if isinstance(value, list):
        text = ", ".join(map(str, value[:MOST_SHOWN]))
        return text if len(value) <= MOST_SHOWN else f"{len(value)} values: {text}, ..."
    return json.dumps(value) if isinstance(value, dict) else str(value)


def html_parts(template: str, stage: utils.Stage, content: PageContent) -> dict[str, Any]:
    """What fills the names in the template that need no other file."""
    return {
        "policy": policy(template),
        "sample": escape(stage.directory.resolve().name),
        "facts": html_facts(content),
        "warnings": html_warnings(stage, content),
        "genes": html_genes(content),
        "training": html_training(content.histories),
        "regions": html_regions(content.regions, content.region_genes),
        "records": html_records(content.records),
    }


def html_facts(content: PageContent) -> str:
    tissue = int(np.isfinite(read_map(content.files[content.genes[0]])).sum())
    side_mm = utils.SUPERPIXEL_UM / 1000
    facts = [("genes here", f"{len(content.genes)} of {len(content.files)}")]
    if content.spots is not None:
        facts.append(("spots", f"{len(content.spots.ids):,}"))
    facts.append(
        ("grid", f"{content.shape[0]} by {content.shape[1]} of {utils.SUPERPIXEL_UM:g} µm")
    )
    facts.append(("tissue", f"{tissue * side_mm**2:.2f} mm²"))
    if content.held_out is not None:
        facts.append(("median held-out r", number_text(content.held_out.median())))
    if utils.HISTEX in content.records:
        facts.append(("maps made", str(content.records[utils.HISTEX].get("ended"))[:10]))
    return html_list(facts)


def html_warnings(stage: utils.Stage, content: PageContent) -> str:
    # Where the folder lies on the disk is nobody's business whom the page is sent to.
    place, name = str(stage.directory), stage.directory.resolve().name
    found = [("this report", note.replace(place, name)) for note in stage.notes]
    for script, record in content.records.items():
        found += [(script, note) for note in record.get("warnings", [])]
    if not found:
        return "<p>None.</p>"
    items = "".join(
        f"<li><strong>{escape(who)}:</strong> {escape(str(note))}</li>" for who, note in found
    )
    return f'<ul class="warnings">{items}</ul>'


def html_genes(content: PageContent) -> str:
    """The genes to choose from, a radio button each, with a bar for r."""
    labels = []
    for i, gene in enumerate(content.genes):
        r = rounded(content.held_out.get(gene)) if content.held_out is not None else None
        score = ""
        if r is not None:
            score = (
                f'<svg viewBox="0 0 40 6" aria-hidden="true"><rect class="rail" width="40" '
                f'height="6" rx="3"/><rect width="{40 * max(r, 0):.1f}" height="6" rx="3"/></svg>'
                f'<span class="unseen">held-out r </span><span class="r">{r:.2f}</span>'
            )
        labels.append(
            f'<label><input type="radio" name="gene" value="{i}"{" checked" if i == 0 else ""}>'
            f'<span class="name">{escape(gene)}</span>{score}</label>'
        )
    return "".join(labels)


def html_held_out(content: PageContent) -> tuple[str, list[float | None]]:
    """Histogram and table of r; where in the histogram each gene of the page stands."""
    unknown: list[float | None] = [None] * len(content.genes)
    if content.held_out is None:
        name = utils.HELD_OUT.name
        return absent(f"{name} is missing.", f"{utils.HISTEX} writes it."), unknown
    known = content.held_out.dropna()
    if known.empty:
        return absent("No gene has a held-out r.", "No spots were held out, or too few."), unknown
    low, middle, high = known.quantile([0.1, 0.5, 0.9])
    text = f"{len(known)} genes: median {middle:.2f}, 10 to 90 % from {low:.2f} to {high:.2f}."
    chart, axes = draw_histogram(
        "held-out", "Held-out correlation of all genes", text, known.to_numpy(), BIN,
        ("held-out r", "genes"),
    )  # fmt: skip
    rows = [(gene, number_text(r, ".3f")) for gene, r in known.sort_values(ascending=False).items()]
    rows += [(gene, "unknown") for gene in content.held_out.index[content.held_out.isna()]]
    table = html_table("Held-out r of all genes", ("gene", "r"), rows)
    places = [rounded(axes.x(content.held_out.get(gene, np.nan))) for gene in content.genes]
    return f"<p>{text}</p>{chart}{html_details('All genes as a table', table)}", places


def html_training(histories: dict[str, pd.DataFrame]) -> str:
    if not histories:
        return absent(
            "There is no states/*/history.csv.", f"{utils.HISTEX} writes one for every network."
        )
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
            charts.append(f"<figure>{chart}<figcaption>{title}</figcaption></figure>")
    for state, table in histories.items():
        losses = table.get("held_out_loss", pd.Series(dtype=float)).dropna()
        lowest = number_text(losses.min(), ".4g") if len(losses) else "unknown"
        epoch = f"{table['epoch'][losses.idxmin()]:.0f}" if len(losses) else "unknown"
        rows.append((state, len(table), f"{table['train_loss'].iloc[-1]:.4g}", lowest, epoch))
    header = ("state", "epochs", "last training loss", "lowest held-out loss", "in epoch")
    keys = "".join(
        f'<li><svg viewBox="0 0 24 8" aria-hidden="true"><path class="line line{i % LINE_STYLES}" '
        f'd="M1 4H23"/></svg>state {escape(state)}</li>'
        for i, state in enumerate(histories)
    )
    return (
        f'<div class="pair">{"".join(charts)}</div><ul class="key">{keys}</ul>'
        f"{html_table('Training of every network', header, rows)}"
    )


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


def html_regions(regions: np.ndarray | None, genes: list[str]) -> str:
    """A key; ``genes`` names the markers of each region, or is empty."""
    if regions is None:
        return absent(
            "There is no segments.npy.", "With a segmentation of the sample, regions are shown too."
        )
    sizes = np.bincount(regions.ravel())
    area_mm2, total = (utils.SUPERPIXEL_UM / 1000) ** 2, max(1, sizes[1:].sum())
    colours = region_colours(len(sizes) - 1)
    genes = genes or [""] * len(colours)
    keys = [
        f'<li><svg viewBox="0 0 12 12" aria-hidden="true"><rect width="12" height="12" rx="2" '
        f'fill="{colour}"/></svg>region {i}: {sizes[i] * area_mm2:.3g} mm², '
        f"{sizes[i] / total:.1%}{f' ({escape(name)})' if name else ''}</li>"
        for i, (colour, name) in enumerate(zip(colours, genes, strict=True), start=1)
        if sizes[i]
    ]
    return f'<ul class="key">{"".join(keys)}</ul>'


def html_records(records: dict[str, dict[str, Any]]) -> str:
    rows, parts = [], []
    for script in utils.STAGES:
        record = records.get(script)
        if record is None:
            rows.append((script, "no finished run", "", "", ""))
            continue
        options = " ".join(map(str, record.get("options", [])))
        seconds = number_text(record.get("seconds"), ",.1f")
        n_warnings = len(record.get("warnings", []))
        ended = str(record.get("ended", "")).replace("T", " ")
        rows.append((script, ended, seconds, options or "defaults", n_warnings))
        given = [(k, v) for k, v in record.get("arguments", {}).items() if k != "directory"]
        facts = [(words(k), shown_value(v)) for k, v in record.items() if k not in KNOWN_FACTS]
        files = [
            (f"{kind}: {name}", f"{known['bytes']:,}", str(known["sha256"])[:12])
            for kind in ("inputs", "outputs")
            for name, known in record[kind].items()
        ]
        details = (
            f"<h4>Results</h4>{html_list(facts)}"
            f"<h4>Arguments</h4>{html_list([(words(k), shown_value(v)) for k, v in given])}"
            f"<h4>Versions</h4>{html_list(record.get('versions', {}).items())}"
            + html_table(f"Files of {script}", ("file", "bytes", "sha256, its start"), files)
        )
        parts.append(html_details(f"{script} in full", details))
    header = ("script", "ended", "seconds", "options", "warnings")
    return html_table("Runs of the five scripts", header, rows) + "".join(parts)


def policy(template: str) -> str:
    """The page may run its own script and style, show pictures it holds, and nothing else."""
    hashes = {}
    for tag in ("script", "style"):
        (text,) = re.findall(f"<{tag}>(.*?)</{tag}>", template, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        hashes[tag] = f"{tag}-src 'sha256-{digest}'"
    return (
        f"default-src 'none'; img-src data:; {hashes['script']}; {hashes['style']}; "
        f"base-uri 'none'; form-action 'none'"
    )


def fill(template: str, parts: dict[str, str | Iterator[str]]) -> Iterator[str]:
    """The template with its {{names}} replaced; what is filled in is not searched again."""
    for i, piece in enumerate(re.split(r"\{\{(\w+)\}\}", template)):
        if i % 2 == 0 or isinstance(parts[piece], str):
            yield piece if i % 2 == 0 else parts[piece]
        else:
            yield from parts[piece]
