"""Write report.html: one page to look at a sample, for any browser, without the internet.

    python analysis/report.py --directory data/section
    python analysis/report.py --directory data/section --genes KRT8,CD3E --output figures/krt8.html

The page shows the H&E with zoom and pan; over it the map of a gene, clear where little is
expressed, or of three genes in red, green and blue; the uncertainty of the map, the regions of
segment.py, the labels of annotate.py, the cells of cells.py and the spots, over each other or side
by side. A layer that is not there names the command that makes it. Areas are drawn by rectangle or
lasso, or a region is clicked: the page adds up the counts in it, saves them as CSV, and the
outlines as GeoJSON for QuPath and cells.py. Below stand the spots against the map, the held-out
correlation of all genes, the training curves, the records of the five scripts, and what there is
to warn of. The page asks for nothing over the network, and forbids itself to.

The genes with the highest held-out r are in report.html. The others are in the folder
report-genes/, from which the page loads them when they are chosen: keep the two together. With
--one-file there is no such folder.

A map is stored in 255 even steps from its lowest to its highest value, and 0 where it has none:
what the page shows in numbers is the map to half a step, 1/508 of its range. On large sections,
report.html itself holds maps in fewer steps, 155 kB a gene, without spots and uncertainty. The page
then takes its own genes, too, from the folder, where they are whole. With --one-file, maps and
uncertainty in fewer steps are all there is.
Colours go from 0 to the 99.5th percentile of the map at first. All are counts per superpixel of
8 um. Spots are coloured by their counts divided by the superpixels that their disc covers.

Reads   cnts-super/ and he.jpg; where they are there, cnts-super-sd/, locs.csv, radius.txt and
        cnts.csv, held-out-r.csv, states/*/history.csv, the records, cells.csv.gz, and segments.npy
        and annotation.npy (whole numbers (rows, columns): number of the label, 0 for none) with
        segments.csv and annotation.csv. What is missing, the page says.
Writes  report.html, report-genes/, and report.json, the record of all pages in its folder. With
        --output NAME.html, they are NAME.html and NAME-genes/.
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
        "--one-file",
        action="store_true",
        help="Leave out the folder of the other genes; the page then has the best ones only.",
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
import hashlib
from typing import Any

import numpy as np
import pandas as pd

from analysis import inputs, page, report_layers, report_maps, sheets
from analysis.page import PageContent, SpotCounts
from analysis.regions import read_measured_spots
from analysis.spots import disc_weights
from method.errors import CORRELATION
from reading import images
from writing.progress import Bar

TEMPLATE = Path(__file__).with_name("report.html")
LARGEST_LOSS = 1e30


# --------------------------------------------------------------------------------------------------
# reading
# --------------------------------------------------------------------------------------------------
def read_content(stage: utils.Stage, args: argparse.Namespace) -> PageContent:
    for artifact in (utils.HE, utils.MAPS):
        inputs.path_of(stage, artifact)
    shape, files_of_maps = images.grid_shape(stage), inputs.map_files(stage.directory)
    records, held_out = read_records(stage), inputs.read_held_out(stage)
    inputs.note_inputs(
        stage, utils.HE, utils.MAPS, utils.SPREAD, utils.LOCS, utils.RADIUS, utils.CNTS
    )
    if utils.HISTEX in records:
        warn_of_changes(stage, records[utils.HISTEX])
    mapped = list(files_of_maps)
    genes = inputs.choose_genes(mapped, held_out, args.genes, args.n_genes)
    best = [] if args.one_file else inputs.choose_genes(mapped, held_out, None, len(mapped))
    frame = report_layers.frame_of(stage)
    regions, annotation = (
        report_layers.read_labels(stage, shape, *names)
        for names in (
            (files.SEGMENTS, files.SEGMENT_TABLE, "genes"),
            (files.ANNOTATION, files.ANNOTATION_TABLE, "name"),
        )
    )
    return PageContent(
        shape=shape,
        files=files_of_maps,
        spreads=read_spreads(stage),
        genes=genes,
        others=[gene for gene in best if gene not in set(genes)],
        held_out=held_out,
        spots=read_spot_counts(stage, shape),
        regions=regions,
        annotation=annotation,
        cells=report_layers.read_cells(stage, shape, frame),
        frame=frame,
        histories=read_histories(stage, records.get(utils.HISTEX)),
        records=records,
    )


def read_spreads(stage: utils.Stage) -> dict[str, Path]:
    """Files of the maps' standard deviations, by gene; there are none without --uncertainty."""
    there = stage.find(utils.SPREAD) is not None
    return inputs.map_files(stage.directory, utils.SPREAD) if there else {}


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
def describe_page(
    stage: utils.Stage, content: PageContent, folder: str, markers: list[float | None]
) -> dict[str, Any]:
    """What the page's script needs at once; a gene's own comes when it is chosen."""
    genes = [*content.genes, *content.others]
    facts = {
        "sample": stage.directory.resolve().name,
        "shape": content.shape,
        "um": utils.SUPERPIXEL_UM,
        "genes": genes,
        "here": len(content.genes),
        "folder": folder,
        "score": None if content.held_out is None else content.held_out.name,
        "r": [page.r_of(content, gene) for gene in genes],
        "ranks": page.ranks_of(content, genes),
        "ranked": 0 if content.held_out is None else int(content.held_out.notna().sum()),
        "markers": markers,
        "alone": report_layers.by_reference(content, genes),
        "palettes": report_maps.palettes(),
        "frame": {"name": content.frame[0], "px": content.frame[1]},
        "correlation": CORRELATION,
    }
    if (spots := content.spots) is not None:
        rows, columns = np.round(spots.centres.T, 3).tolist()
        facts["spots"] = {"ids": spots.ids, "rows": rows, "columns": columns}
        facts["radius"] = spots.radius
    for name, labels in (("regions", content.regions), ("annotation", content.annotation)):
        if labels is not None:
            facts[name] = report_layers.describe_labels(labels)
    if content.cells is not None:
        facts["cells"] = report_layers.describe_cells(content.cells, content.shape)
    return facts


def genes_in_page(content: PageContent, beside: bool) -> list[dict[str, Any]]:
    """What stands in the page of each gene; what is too large may lie ``beside`` it, too."""
    found = []
    for gene in Bar(content.genes, "maps"):
        facts = report_maps.describe_gene(content, gene)
        found.append(report_maps.fit_into_page(content, facts, beside))
    return found


def stamp_of(stage: utils.Stage, facts: dict[str, Any]) -> str:
    """What tells a page's own folder from that of another page or run."""
    known = {name: seen.get("sha256") for name, seen in stage.inputs.items()}
    return hashlib.sha256(page.script_json([facts, known]).encode()).hexdigest()[:16]


def write_beside(folder: Path, content: PageContent, numbers: list[int], stamp: str) -> None:
    """A script for each of these genes, which hands its map to the page that loads it."""
    folder.mkdir()
    genes = [*content.genes, *content.others]
    for i in Bar(numbers, "maps beside the page"):
        facts = report_maps.describe_gene(content, genes[i], report_maps.FAST)
        text = f'takeGene({i}, {page.script_json(facts)}, "{stamp}");\n'
        (folder / f"{i}.js").write_text(text, "utf-8", newline="\n")


def main(stage: utils.Stage) -> None:
    args, stage.keeps_others = stage.args, True  # the other pages of this folder
    name = args.output.name if args.output else files.REPORT.name
    artifact = utils.Artifact((name,), SCRIPT, files.REPORT.what, user_may_bring=True)
    beside = f"{Path(name).stem}-genes"
    folder = utils.Artifact((beside,), SCRIPT, "maps that the page loads", user_may_bring=True)
    stage.guard(artifact, folder)
    content = read_content(stage, args)
    held_out, markers = page.describe_held_out(content)
    image, tissue_colour = report_maps.shrink(stage, args.image_px)
    facts, genes = describe_page(stage, content, beside, markers), len(content.genes)
    facts["stamp"] = stamp_of(stage, facts)
    maps = genes_in_page(content, beside=not args.one_file)
    finer = [i for i, known in enumerate(maps) if known.get("beside")]
    numbers = [*finer, *range(genes, genes + len(content.others))]
    pieces = page.render(
        TEMPLATE,
        stage,
        content,
        held_out=held_out,
        missing=report_layers.missing_layers(stage, content),
        score=facts["score"] or "",
        palettes=facts["palettes"],
        frame=content.frame[0],
        folder=beside,
        with_folder=bool(numbers),
        others=len(content.others),
        coarse=sum("finer steps" in maps[i]["beside"] for i in finer),
        less=bool(finer),
        beside=report_layers.beside_text(content),
        alone=report_layers.alone_text(
            content, report_layers.by_reference(content, list(content.files))
        ),
        data=page.script_json(facts | {"tissue": tissue_colour}),
        image=base64.b64encode(image).decode(),
        maps=map(page.script_json, maps),
    )
    with (
        stage.writing(artifact) as partial,
        partial.open("w", encoding="utf-8", newline="\n") as file,
    ):
        file.writelines(pieces)
    if numbers:
        with stage.writing(folder) as partial:
            write_beside(partial, content, numbers, facts["stamp"])
    elif any(path.name == beside for path, _ in stage.made()):
        stage.retire(folder)
    stage.finish(genes=genes, genes_beside=len(content.others), finer_beside=len(finer))


def run(argv: list[str] | None = None) -> int:
    return cli.run_stage(main, SCRIPT, build_parser(), argv)


if __name__ == "__main__":
    sys.exit(run())
