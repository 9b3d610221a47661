"""The files of a prepared sample, which every prepare script writes.

he-raw.*, pixel-size-raw.txt, locs-raw.csv, cnts.csv.gz and radius-raw.txt; gene-names.txt if genes
were listed; truth.npz if there is truth; further tables; check.png to look at; and prepare.json,
the record, last. All of them are written, or none.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import io
import os
import sys
import zipfile
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import sparse

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import utils
from prepare import images
from prepare.section import (
    CountedTruth,
    PreparedSection,
    SpotFit,
    check_fit,
    draw_check,
    exchanged_notes,
    without_strays,
)
from reading import cli
from reading.genes import spoilt_by_excel
from writing import disk

RAW = (utils.HE_RAW, utils.PIXEL_SIZE_RAW, utils.LOCS_RAW, utils.CNTS, utils.RADIUS_RAW)
TRUTH = utils.Artifact(
    ("truth.npz",), None, "counts (rows, columns, genes) per superpixel, tissue, genes"
)
CHECK = utils.Artifact(("check.png",), None, "picture: the spots on the image, and the numbers")
CNTS_NAME = "cnts.csv.gz"


def run(
    prepare: Callable[[argparse.Namespace], PreparedSection],
    script: str,
    parser: cli.Parser,
    argv: list[str] | None,
) -> int:
    """Run a prepare script: read the section by ``prepare(args)``, check and write it."""

    def main(stage: utils.Stage) -> None:
        guard_sample(stage)  # before the first expensive step
        before = {file: disk.stamp(file) for file in files_named(stage.args)}
        section = prepare(stage.args)
        for file in read_of(section, before):
            if disk.stamp(file) != before[file]:
                raise stage.disturbed(file)
        write_sample(stage, section)

    return cli.run_stage(main, script, parser, argv, makes_folders=True)


def files_named(args: argparse.Namespace) -> Iterator[Path]:
    """All files in the folders, and after the prefixes, that options name."""
    for name, value in vars(args).items():
        if name == "directory" or not isinstance(value, Path):
            continue
        if value.is_dir():  # what cannot be listed is told by what has to read it
            for place, _, names in os.walk(value):
                yield from (Path(place, name) for name in names)
        elif value.parent.is_dir():
            yield from (p for p in value.parent.iterdir() if p.name.startswith(value.name))


def read_of(section: PreparedSection, files: Iterable[Path]) -> Iterator[Path]:
    """Those of the files that the section was read from, also as parts of a folder."""
    sources = {*section.sources}
    return (file for file in files if sources & {file, *file.parents})


def guard_sample(stage: utils.Stage) -> None:
    """Refuse to replace files that were not prepared here or were edited since, unless --force.

    A truth.npz of the user's own stays beside a section that comes without one.
    """
    earlier = utils.read_record(stage, stage.script) or {}
    has_truth = getattr(stage.args, "truth_genes", 0) or TRUTH.name in earlier.get("outputs", {})
    written = [TRUTH] * bool(has_truth) + [utils.GENE_NAMES] * bool(stage.args.genes)
    stage.guard(*RAW, CHECK, *written)


def write_sample(stage: utils.Stage, section: PreparedSection) -> SpotFit:
    """Check the section, then write all files of the sample: all of them, or none."""
    fit = check_fit(section)
    section, small = without_strays(section), images.thumbnail(section.image)
    section.notes += exchanged_notes(section, small)
    if spoilt := spoilt_by_excel(section.genes):
        stage.warn(f"the counts name {spoilt}")
    writers = plan_files(section, fit, small)
    stage.guard(*writers)
    for path in section.sources:
        stage.use(path)
    suffix = section.image.suffix.lower() if isinstance(section.image, Path) else ".tif"
    names = {utils.HE_RAW: f"he-raw{suffix}", utils.CNTS: CNTS_NAME}
    for artifact, write in writers.items():
        with stage.writing(artifact, names.get(artifact)) as path:
            write(path)
    if isinstance(section.image, images.Region):
        section.image.slide.close()
    for artifact in RAW:  # under its other names
        stage.retire(artifact)
    stage.retire_rest()
    print(fit.words())
    for note in section.notes:
        print(f"note: {note}")
    stage.finish(
        spots=fit.spots,
        spots_on_image=fit.spots_on_image,
        spots_off_tissue=0 if section.off_tissue is None else len(section.off_tissue),
        genes=len(section.genes),
        molecules=float(section.counts.sum()),
        pixel_size_um=section.pixel_size_um,
        radius_px=section.radius_px,
        pitch_um=fit.pitch_um,
        **section.facts,
        notes=section.notes,
    )
    return fit


def plan_files(
    section: PreparedSection, fit: SpotFit, small: np.ndarray
) -> dict[utils.Artifact, Callable[[Path], object]]:
    """What writes each file of the sample to a path; ``small`` is a thumbnail of the image."""
    writers: dict[utils.Artifact, Callable[[Path], object]] = {
        utils.HE_RAW: partial(images.write_image, section.image),
        utils.PIXEL_SIZE_RAW: partial(write_text, f"{section.pixel_size_um:.8g}\n"),
        utils.RADIUS_RAW: partial(write_text, f"{section.radius_px:.6g}\n"),
        utils.LOCS_RAW: partial(write_table, section.locs[["x", "y"]], float_format="%.3f"),
        utils.CNTS: partial(write_counts, section),
        CHECK: partial(draw_check, section, fit, small),
    }
    if section.gene_names is not None:
        text = "".join(f"{gene}\n" for gene in section.gene_names)
        writers[utils.GENE_NAMES] = partial(write_text, text)
    if section.truth is not None:
        writers[TRUTH] = partial(write_truth, section.truth)
    for artifact, table in section.tables.items():
        writers[artifact] = partial(write_table, table)
    return writers


def write_text(text: str, path: Path) -> None:
    path.write_text(text, encoding="utf-8", newline="\n")


def write_table(table: pd.DataFrame, path: Path, float_format: str | None = None) -> None:
    table.to_csv(path, float_format=float_format, index_label="", lineterminator="\n")


def write_counts(section: PreparedSection, path: Path) -> None:
    """cnts.csv.gz, a row at a time: the table is mostly zeros, and never whole in memory."""
    counts = sparse.csr_array(section.counts)
    whole = bool((counts.data == np.floor(counts.data)).all())
    with (
        path.open("wb") as raw,
        gzip.GzipFile("", "wb", 6, raw, mtime=0) as packed,  # same counts, same bytes
        io.TextIOWrapper(packed, encoding="utf-8", newline="") as file,
    ):
        line = csv.writer(file, lineterminator="\n")
        line.writerow(["", *section.genes])
        for i, spot in enumerate(section.locs.index):
            part = slice(counts.indptr[i], counts.indptr[i + 1])
            row = np.zeros(counts.shape[1])
            np.add.at(row, counts.indices[part], counts.data[part])
            cells = ["0"] * len(row)
            for j in np.flatnonzero(row):
                cells[j] = str(int(row[j])) if whole else f"{row[j]:.7g}"
            line.writerow([spot, *cells])


def write_truth(truth: CountedTruth, path: Path) -> None:
    """truth.npz: counts (h, w, G), tissue (h, w), genes (G,); written a row at a time.

    Whole counts become uint16 or uint32, fractions float32.
    """
    (h, w), n_genes = truth.tissue.shape, len(truth.genes)
    values: Iterable[np.ndarray]
    rows: Iterable[np.ndarray]
    if isinstance(truth.counts, np.ndarray):
        values = rows = truth.counts
    else:
        matrix = sparse.csr_array(truth.counts)
        values = [matrix.data]
        rows = (matrix[row * w : (row + 1) * w].toarray() for row in range(h))
    whole = all((part == np.floor(part)).all() for part in values)
    top = max((part.max(initial=0) for part in values), default=0)
    dtype = np.dtype(np.float32 if not whole else np.uint16 if top < 2**16 else np.uint32)
    header = {"descr": dtype.str, "fortran_order": False, "shape": (h, w, n_genes)}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=4) as archive:
        with archive.open("counts.npy", "w", force_zip64=True) as file:
            np.lib.format.write_array_header_1_0(file, header)
            for block in rows:
                file.write(np.ascontiguousarray(block, dtype).tobytes())
        for name, array in (("tissue", truth.tissue), ("genes", np.array(truth.genes))):
            with archive.open(f"{name}.npy", "w") as file:
                np.lib.format.write_array(file, array, allow_pickle=False)
