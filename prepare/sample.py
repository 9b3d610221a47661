"""The sample directory that every prepare script writes, its record, and their common entry point.

A script reads one vendor's files into a common.Section; ``write_sample`` checks it and writes the
user's files: he-raw.*, pixel-size-raw.txt, locs-raw.csv, cnts.csv.gz, radius-raw.txt;
gene-names.txt if genes were listed; truth.npz if there is truth; further tables; check.png to look
at; and prepare.json, the record, last.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import gzip
import io
import json
import sys
import time
import zipfile
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image
from scipy import sparse

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import utils
from prepare import common, images
from prepare.common import Report, Section, Truth
from prepare.images import Region

RECORD = "prepare.json"
TRUTH, CHECK = "truth.npz", "check.png"
WRITTEN = (utils.HE_RAW, utils.PIXEL_SIZE_RAW, utils.LOCS_RAW, utils.CNTS, utils.RADIUS_RAW)


def read_own_record(directory: Path) -> dict[str, list[dict[str, Any]]]:
    """Fingerprints by name of the files that runs here wrote.

    A run that was cut off while it put its files in place left some old ones and some new ones.
    """
    path = directory / RECORD
    if not path.exists():
        return {}
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        known = {name: list(files) for name, files in record.get("previous", {}).items()}
        for name, file in record["outputs"].items():
            known.setdefault(name, []).append(file)
        if not all(utils.is_fingerprint(file) for files in known.values() for file in files):
            raise TypeError("a file without fingerprint")
    except (ValueError, OSError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise utils.StageError(
            f"{path} is no readable record: {error!r:.200}",
            "Remove it, then run the same command with --force.",
        ) from error
    return known


def is_mine(path: Path, own: dict[str, list[dict[str, Any]]]) -> bool:
    """True if a file is there as a run here wrote it."""
    return path.exists() and any(utils.same_as(path, file) for file in own.get(path.name, []))


def guard(directory: Path, force: bool = False, more: Iterable[str] = ()) -> None:
    """Refuse to replace files that were not written here or were edited since, unless ``force``.

    ``more`` names files that only some samples have. Call it before the first expensive step;
    write_sample calls it again.
    """
    if directory.exists() and not directory.is_dir():
        raise utils.StageError(
            f"--directory {directory} is a file; it must be a folder.", "Choose another name."
        )
    own = read_own_record(directory)
    names = [name for artifact in WRITTEN for name in artifact.names]
    names += [TRUTH, CHECK, *more]
    for name in names:
        path = directory / name
        if path.exists() and not is_mine(path, own) and not force:
            state = "was edited since it was prepared" if name in own else "was not made here"
            raise utils.StageError(
                f"{path} {state}; it would be overwritten.",
                "Choose another --directory, or replace it: run the same command with --force.",
            )


def write_sample(
    directory: Path,
    section: Section,
    force: bool = False,
    arguments: dict[str, Any] | None = None,
) -> Report:
    """Check the section, then write all files of the sample: all of them, or none."""
    report = common.check(section)
    writers = plan(section, report)
    guard(directory, force, writers)
    directory.mkdir(parents=True, exist_ok=True)
    before = read_own_record(directory)
    with contextlib.ExitStack() as stack:
        outputs = {}
        for name, write in writers.items():
            path = stack.enter_context(utils.atomic(directory / name))
            write(path)
            outputs[name] = utils.fingerprint(path)
        unfinished = {"finished": False, "outputs": outputs, "previous": before}
        write_json(directory / RECORD, unfinished)  # what a run cut off right here has written
    if isinstance(section.image, Region):
        section.image.slide.close()
    remove_superseded(directory, writers.keys(), before)
    for name in writers:
        print(f"wrote {name}: {outputs[name]['bytes'] / 1e6:,.2f} MB")
    record = {
        "finished": True,
        "script": Path(sys.argv[0]).name,
        "arguments": {key: str(value) for key, value in (arguments or {}).items()},
        "ended": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "sources": {str(path): utils.fingerprint(path) for path in section.sources},
        "spots": report.spots,
        "spots_on_image": report.spots_on_image,
        "spots_off_tissue": 0 if section.off_tissue is None else len(section.off_tissue),
        "genes": len(section.genes),
        "molecules": float(section.counts.sum()),
        "pixel_size_um": section.pixel_size_um,
        "radius_px": section.radius_px,
        "pitch_um": report.pitch_um,
        **section.facts,
        "notes": section.notes,
        "outputs": outputs,
    }
    write_json(directory / RECORD, record)
    print(report.words())
    for note in section.notes:
        print(f"note: {note}")
    print(
        f"Look at {directory / CHECK}, then run: python {utils.CALIBRATION} --directory {directory}"
    )
    return report


def plan(section: Section, report: Report) -> dict[str, Callable[[Path], None]]:
    """File name -> what writes it to a path, of all files of the sample but the record."""
    suffix = section.image.suffix.lower() if isinstance(section.image, Path) else ".tif"
    writers: dict[str, Callable[[Path], None]] = {
        f"he-raw{suffix}": lambda path: images.write_image(section.image, path),
        utils.PIXEL_SIZE_RAW.name: lambda path: write_text(path, f"{section.pixel_size_um:.8g}\n"),
        utils.RADIUS_RAW.name: lambda path: write_text(path, f"{section.radius_px:.6g}\n"),
        utils.LOCS_RAW.name: lambda path: write_locs(section.locs, path),
        "cnts.csv.gz": lambda path: write_counts(section, path),
        CHECK: lambda path: common.draw_check(section, report, path),
    }
    if section.gene_names is not None:
        text = "".join(f"{gene}\n" for gene in section.gene_names)
        writers[utils.GENE_NAMES.name] = lambda path: write_text(path, text)
    if section.truth is not None:
        writers[TRUTH] = lambda path: write_truth(section.truth, path)
    for name, table in section.tables.items():
        writers[name] = partial(table.to_csv, index_label="", lineterminator="\n")
    return writers


def remove_superseded(
    directory: Path, written: Iterable[str], own: dict[str, list[dict[str, Any]]]
) -> None:
    """Remove he-raw and cnts under their other names, and what an earlier run alone wrote."""
    for artifact in WRITTEN:
        for name in set(artifact.names) - set(written):
            (directory / name).unlink(missing_ok=True)
    for name in set(own) - set(written):
        if is_mine(directory / name, own):
            (directory / name).unlink()


def write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="\n")


def write_json(path: Path, content: dict[str, Any]) -> None:
    with utils.atomic(path) as partial:
        write_text(partial, json.dumps(content, indent=1) + "\n")


def write_locs(locs: pd.DataFrame, path: Path) -> None:
    locs[["x", "y"]].to_csv(path, float_format="%.3f", index_label="", lineterminator="\n")


def write_counts(section: Section, path: Path) -> None:
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


def write_truth(truth: Truth, path: Path) -> None:
    """truth.npz: counts (h, w, G), tissue (h, w), genes (G,); written a row at a time.

    Whole counts become uint16 or uint32, fractions float32.
    """
    h, w = truth.tissue.shape
    n_genes = len(truth.genes)
    is_sparse = sparse.issparse(truth.counts)
    values = [sparse.csr_array(truth.counts).data] if is_sparse else truth.counts
    whole = all((part == np.floor(part)).all() for part in values)
    top = max((part.max(initial=0) for part in values), default=0)
    dtype = np.dtype(np.float32 if not whole else np.uint16 if top < 2**16 else np.uint32)
    header = {"descr": dtype.str, "fortran_order": False, "shape": (h, w, n_genes)}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=4) as archive:
        with archive.open("counts.npy", "w", force_zip64=True) as file:
            np.lib.format.write_array_header_1_0(file, header)
            for row in range(h):
                part = np.s_[row * w : (row + 1) * w]
                block = truth.counts[part].toarray() if is_sparse else truth.counts[row]
                file.write(np.ascontiguousarray(block, dtype).tobytes())
        for name, array in (("tissue", truth.tissue), ("genes", np.array(truth.genes))):
            with archive.open(f"{name}.npy", "w") as file:
                np.lib.format.write_array(file, array, allow_pickle=False)


# -------------------------------------------------------------------------------------------------
# arguments and entry point
# -------------------------------------------------------------------------------------------------
def build_parser(doc: str) -> argparse.ArgumentParser:
    """Parser with what all prepare scripts share, described by the first paragraph of ``doc``."""
    parser = argparse.ArgumentParser(description=doc.split("\n\n")[0])
    parser.add_argument(
        "--directory",
        type=utils.sample_directory,
        required=True,
        help="Sample folder to write; made if it does not exist.",
    )
    parser.add_argument(
        "--genes",
        type=Path,
        metavar="FILE",
        help="Genes to predict, one a line; becomes gene-names.txt.",
    )
    parser.add_argument(
        "--force", action="store_true", help="Replace files that were not prepared here or edited."
    )
    return parser


def run(
    prepare: Callable[[argparse.Namespace], Section],
    parser: argparse.ArgumentParser,
    argv: list[str] | None = None,
) -> int:
    """Parse, read the section by ``prepare(args)``, check and write it."""

    def work(args: argparse.Namespace) -> None:
        guard(args.directory, args.force, [utils.GENE_NAMES.name] if args.genes else [])
        write_sample(args.directory, prepare(args), args.force, vars(args))

    return exit_code(work, parser.parse_args(argv))


def exit_code(work: Callable[[argparse.Namespace], None], args: argparse.Namespace) -> int:
    """The exit code of ``work(args)``, see utils.exit_code."""
    Image.MAX_IMAGE_PIXELS = utils.MAX_HE_PIXELS
    return utils.exit_code(lambda: work(args), args.directory, "the sample is as it was")
