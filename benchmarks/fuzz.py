"""Give damaged and odd files to every reader, and to whole scripts.

    python benchmarks/fuzz.py --executions 1000000 --runs 3000 --output benchmarks/FUZZ.md

Reads   nothing; tiny inputs of all scripts are made, see trials.py.
Writes  tables in Markdown, on the screen and into --output; inputs that failed, into --keep.

Variants of sound files are made by their bytes (flipped, cut, doubled, odd words and numbers) and
by what they hold (cells, columns, JSON nodes, types and shapes of arrays, HDF5 datasets, pickles
that would run code): see mutations.py. A reader must return what it promises or raise StageError,
within 10 s and 2 GB; a pickle must run no code. A script must end with exit code 0, or with 2 and
one message, within a minute and 2 GB. Each kind of failure is printed once with the command that
repeats it. Exits with 1 if there is any.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from reading import cli

SCRIPT = "benchmarks/fuzz.py"


def build_parser() -> cli.Parser:
    parser = cli.Parser(__doc__)
    option = parser.add_argument
    option("--executions", type=cli.not_negative, default=1_000_000, help="Over all readers.")
    option("--runs", type=cli.not_negative, default=3000, help="Over all scripts.")
    option("--only", metavar="PATTERN", default="",
           help="Readers and scripts in whose name it is found.")  # fmt: skip
    option("--seed", type=cli.not_negative, default=0, help="Another seed makes other variants.")
    option("--keep", type=Path, metavar="FOLDER",
           help="For inputs that failed (default: a temporary folder).")  # fmt: skip
    option("--repeat", type=Path, metavar="FILE", help="Read a kept file of a reader again.")
    option("--output", type=Path,
           help="Markdown file for the tables (default: they are only printed).")  # fmt: skip
    return parser


if __name__ == "__main__":
    cli.start(build_parser())  # what needs none of the slow imports below
    os.environ |= {"OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}

import contextlib
import functools
import gzip
import io
import json
import logging
import random
import re
import resource
import shlex
import shutil
import signal
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from types import FrameType
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import safetensors.torch
import torch

import utils
from analysis import annotate, enrich, inputs, outlines, regions, report
from analysis import labels as cell_labels
from benchmarks import measure, mutations, trials
from method import section as training
from method import states, weights
from prepare import aligned, legacy_st, scans, scverse, tenx, visium, visium_hd, xenium_files
from prepare import section as prepared
from reading import arrays, genes, images, pickles, pictures, plain, tables
from writing import disk

BATCH = 2000  # executions of one process
BATCH_SECONDS = 900  # more is a hang that no signal ends
SECONDS, RUN_SECONDS = 10, 60  # within which a reader and a script must end
MAX_GB = 2.0
GRID = (56, 56)  # of the tiny section
SHAPE_GENES = 6
SOUND = {"accepted", "refused"}
PER_KIND = 2  # inputs kept of one kind of failure


class Reader(NamedTuple):
    """What reads a file of the sample ``name``, and what its result must be."""

    name: str
    read: Callable[[utils.Stage, Path], object]
    sound: Callable[[Any], bool] = lambda _: True
    raises: tuple[type[Exception], ...] = (utils.StageError,)


class Failure(NamedTuple):
    kind: str  # exception and place, or how a run ended
    command: str  # that repeats it


class TooSlow(BaseException):
    """Not caught by readers that catch every Exception."""


# --------------------------------------------------------------------------------------------------
# readers
# --------------------------------------------------------------------------------------------------
def decoded(stage: utils.Stage, path: Path) -> np.ndarray:
    with images.ImageRows(stage, path) as rows:
        return rows[0 : len(rows)]


def checked(stage: utils.Stage, path: Path) -> object:
    """As image_calibration.py looks at he-raw."""
    with images.checked(stage, path):
        image = pictures.open_picture(path)
        pictures.check(image, path)
        return pictures.shrunk(path, 64)


def slide(path: Path) -> np.ndarray:
    with scans.open_slide(path) as opened:
        return opened.thumbnail(64)


def labels(path: Path) -> int:
    return sum(band.size for band in cell_labels.open_labels(path)[2])


def spots(directory: Path) -> pd.Index:
    return tables.read_locs(inputs.open_sample(directory), directory / utils.LOCS.name).index


def h5ad(path: Path) -> object:
    args = argparse.Namespace(h5ad=path, library=None, layer=None, radius_um=None, pixel_size=None)
    return scverse.read_h5ad(args)


def finite(values: Any) -> bool:
    return bool(np.isfinite(np.asarray(values, float)).all())


def names(values: list[str]) -> bool:
    return len(set(values)) == len(values) > 0 and all(isinstance(v, str) for v in values)


READERS = (
    Reader("locs.csv", lambda s, p: tables.read_locs(s, p), finite),
    Reader("cnts.csv", lambda s, p: tables.read_sparse_counts(s, p, spots(p.parent)),
           lambda r: r[0].shape[0] == 17 and r[0].data.min() >= 0),
    Reader("packed/cnts.csv.gz", lambda s, p: tables.read_sparse_counts(s, p, spots(s.directory))),
    Reader("pixel-size.txt", lambda s, p: plain.read_number(s, p, 0.05, 2.5, "um"),
           lambda r: 0.05 <= r <= 2.5),
    Reader("gene-names.txt", genes.read_gene_names, names),
    Reader("listed.txt", lambda s, p: genes.read_genes(str(p), ["A", "B", "C"], "x"), names),
    Reader("HRcnts.npy",
           lambda s, p: arrays.read_array(s, utils.HR_CNTS, np.float32, (None, SHAPE_GENES)),
           finite),
    Reader("HRlocs.csv", lambda s, p: training.read_hr_points(s, spots(p.parent)),
           lambda r: finite(r[0])),
    Reader("mask.png", lambda s, p: images.read_mask(s, GRID), lambda r: r.shape == GRID),
    Reader("he.jpg", lambda s, p: images.grid_shape(s)),
    Reader("small/he.jpg", decoded, lambda r: r.dtype == np.uint8 and r.ndim == 3),
    Reader("small/he.png", decoded, lambda r: r.dtype == np.uint8 and r.ndim == 3),
    Reader("small/he-raw.jpg", checked, raises=(utils.StageError, pictures.Misfit)),
    Reader("small/he-raw.png", checked, raises=(utils.StageError, pictures.Misfit)),
    Reader("small/he-raw.tif", checked, raises=(utils.StageError, pictures.Misfit)),
    Reader("small/slide.tif", lambda s, p: slide(p)),
    Reader("small/slide.png", lambda s, p: slide(p)),
    Reader("image_calibration.json", lambda s, p: utils.read_record(s, utils.CALIBRATION),
           lambda r: isinstance(r["finished"], bool)),
    Reader("HISTEX.json", lambda s, p: report.read_records(s)),
    Reader("small/map.pickle", lambda s, p: pickles.read_pickle(p)),
    Reader("small/map.npy", lambda s, p: inputs.read_map(p), lambda r: r.ndim == 2),
    Reader("embeddings-gene.pickle", lambda s, p: inputs.read_embedding(s), lambda r: r.ndim == 3),
    Reader("cnts-super/index.csv", lambda s, p: inputs.map_files(s.directory),
           lambda r: all(isinstance(gene, str) for gene in r)),
    Reader("held-out-r.csv", lambda s, p: inputs.read_held_out(s)),
    Reader("truth.npz", lambda s, p: inputs.read_truth(p.parent), lambda r: finite(r.counts)),
    Reader("regions/truth.npz", lambda s, p: regions.read_true_regions(
        inputs.open_sample(p.parent), GRID)),
    Reader("segments.npy", lambda s, p: inputs.load_labels(p, GRID, 255),
           lambda r: r.shape == GRID, (ValueError,)),
    Reader("states/00/history.csv", lambda s, p: report.read_histories(s, None)),
    Reader("states/00/model.json", lambda s, p: states.read_key(p)),
    Reader("small/weights.safetensors", lambda s, p: weights.read_weights(p)),
    Reader("small/weights.pt", lambda s, p: weights.read_weights(p)),
    Reader("raw/markers.csv", lambda s, p: annotate.read_markers(p)),
    Reader("raw/labels.csv", lambda s, p: annotate.read_spot_labels(p, spots(s.directory))),
    Reader("raw/sets.gmt", lambda s, p: enrich.read_gmt(p)),
    Reader("raw/cells.geojson", lambda s, p: outlines.read_outlines(s, p, nuclei=False)),
    Reader("raw/cells.tif", lambda s, p: labels(p)),
    Reader("raw/matrix.h5", lambda s, p: tenx.read_10x_h5(p)),
    Reader("raw/bins.h5", lambda s, p: visium_hd.open_matrix(p)),
    Reader("raw/tissue_positions.csv", lambda s, p: visium.read_positions(p)),
    Reader("raw/tissue_positions.parquet", lambda s, p: visium_hd.read_bins(p, 2.0)),
    Reader("raw/scalefactors_json.json", lambda s, p: tenx.read_spatial(p.parent)),
    Reader("raw/experiment.xenium", lambda s, p: xenium_files.run_pixel_size(p.parent)),
    Reader("raw/alignment.csv", lambda s, p: aligned.read_alignment(p), finite),
    Reader("raw/spots.tsv", lambda s, p: legacy_st.read_selection(p)),
    Reader("raw/counts.tsv", lambda s, p: legacy_st.read_count_table(p)),
    Reader("raw/locs-raw.csv", lambda s, p: prepared.read_spot_table(p, ["x", "y"]), finite),
    Reader("raw/raw.h5ad", lambda s, p: h5ad(p)),
)  # fmt: skip


def make_sample(starts: Path, sample: Path) -> None:
    """A finished section with a sound file for every reader."""
    shutil.copytree(starts / "6" / trials.SECTION, sample)
    raw, small = sample / "raw", sample / "small"
    shutil.copytree(starts / "6" / trials.RAW, raw)
    for name in ("packed", "small", "regions"):
        (sample / name).mkdir()
    bins = "outs/binned_outputs/square_002um"
    for source, target in (
        ("visium/raw/outs/filtered_feature_bc_matrix.h5", "matrix.h5"),
        (f"hd/raw/{bins}/filtered_feature_bc_matrix.h5", "bins.h5"),
        (f"hd/raw/{bins}/spatial/tissue_positions.parquet", "tissue_positions.parquet"),
        ("visium/raw/outs/spatial/tissue_positions.csv", "tissue_positions.csv"),
        ("visium/raw/outs/spatial/scalefactors_json.json", "scalefactors_json.json"),
        ("xenium/raw/outs/experiment.xenium", "experiment.xenium"),
        ("xenium/raw/alignment.csv", "alignment.csv"), ("st/raw/spots.tsv", "spots.tsv"),
        ("st/raw/counts.tsv", "counts.tsv"), ("tables/raw/locs-raw.csv", "locs-raw.csv"),
        ("h5ad/raw/raw.h5ad", "raw.h5ad"),
    ):  # fmt: skip
        shutil.copyfile(starts / source, raw / target)
    packed = gzip.compress((sample / "cnts.csv").read_bytes())
    (sample / "packed" / "cnts.csv.gz").write_bytes(packed)
    (sample / "listed.txt").write_text("A\nB\n", encoding="utf-8")
    labelled = "\n".join(f"{spot},label {i % 3}" for i, spot in enumerate(spots(sample)))
    (raw / "labels.csv").write_text(f"spot,label\n{labelled}\n", encoding="utf-8")
    values = np.random.default_rng(0).random((8, 9), np.float32)
    np.save(small / "map.npy", values)
    values.dump(small / "map.pickle")
    np.savez(sample / "regions" / "truth.npz", regions=np.ones((5, 6), np.uint8),
             region_names=["", "a"])  # fmt: skip
    write_small_truth(sample)
    tensors = {"a": torch.from_numpy(values)}
    torch.save(tensors, small / "weights.pt")
    safetensors.torch.save_file(tensors, small / "weights.safetensors")
    pixels = np.random.default_rng(1).integers(0, 256, (48, 40, 3), np.uint8)
    picture = pictures.pyvips.Image.new_from_array(pixels, interpretation="srgb")
    for name in ("he.jpg", "he.png", "he-raw.jpg", "he-raw.png", "he-raw.tif", "slide.png"):
        picture.write_to_file(str(small / name))
    picture.tiffsave(str(small / "slide.tif"), tile=True, tile_width=16, tile_height=16)


def write_small_truth(sample: Path) -> None:
    """The first superpixels, and only the genes that have maps."""
    listed = (sample / utils.GENE_NAMES.name).read_text(encoding="utf-8").split()
    with np.load(sample / inputs.TRUTH) as truth:
        keep = [truth["genes"].tolist().index(gene) for gene in listed]
        counts, tissue = truth["counts"][:6, :7, keep], truth["tissue"][:6, :7]
    np.savez(sample / inputs.TRUTH, counts=counts, tissue=tissue | True, genes=np.array(listed))


# --------------------------------------------------------------------------------------------------
# executions of readers
# --------------------------------------------------------------------------------------------------
def too_slow(number: int, frame: FrameType | None) -> None:
    raise TooSlow


def attempt(reader: Reader, sample: Path) -> str:
    """ "accepted", "refused", or the kind of the failure."""
    path = sample / reader.name
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        result = reader.read(stage_of(reader, sample), path)
        return "accepted" if reader.sound(result) else "breaks its promise"
    except reader.raises:
        return "refused"
    except TooSlow:
        return "too slow"
    except Exception as error:  # noqa: BLE001  (which is what is looked for)
        frames = traceback.extract_tb(error.__traceback__)
        ours = [f for f in frames if str(utils.ROOT) in f.filename and "fuzz" not in f.filename]
        place = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else "?"
        return f"{type(error).__name__} at {place}: {error!s:.120}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def stage_of(reader: Reader, sample: Path) -> utils.Stage:
    directory = sample / "small" if reader.name.startswith("small/") else sample
    args = argparse.Namespace(directory=directory, force=False, allow_stale=False)
    return utils.Stage("analysis/evaluate.py", args, reads_only=True)


def limit_memory(gb: float) -> None:
    """So much more than now; beyond it, allocations fail."""
    text = Path("/proc/self/status").read_text(encoding="utf-8")
    now = int(re.findall(r"VmData:\s+(\d+)", text)[0]) * 1024
    resource.setrlimit(resource.RLIMIT_DATA, (now + int(gb * 1e9),) * 2)


def batch(reader: Reader, sample: Path, keep: Path, n: int, seed: str, counts_file: Path) -> None:
    """In a child: ``n`` executions; what came of them goes into ``counts_file``, as JSON."""
    path = sample / reader.name
    sound, draw, counts = path.read_bytes(), random.Random(seed), Counter[str]()
    warnings.simplefilter("ignore")
    logging.disable()
    signal.signal(signal.SIGALRM, too_slow)
    if (kind := attempt(reader, sample)) != "accepted":
        raise RuntimeError(f"the sound {reader.name}: {kind}")
    limit_memory(MAX_GB)
    with contextlib.redirect_stdout(io.StringIO()) as said:
        for _ in range(n):
            path.write_bytes(mutations.mutate(sound, path.suffix, draw))
            kind = attempt(reader, sample)
            if mutations.CANARY.exists():
                mutations.CANARY.unlink()
                kind = "code was run"
            counts[kind] += 1
            if kind not in SOUND and counts[kind] <= PER_KIND:
                keep_input(reader, path, keep)
            said.seek(0), said.truncate()
    counts_file.write_text(json.dumps(counts), encoding="utf-8")


def keep_input(reader: Reader, path: Path, keep: Path) -> None:
    folder = keep / "readers" / reader.name.replace("/", "-")
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(path, folder / f"{len(list(folder.iterdir())):03d}{path.suffix}")


def fuzz_reader(reader: Reader, sample: Path, keep: Path, n: int, seed: str) -> Counter[str]:
    """What came of ``n`` executions, in processes of their own: a crash ends one of them."""
    path, counts_file, counts = sample / reader.name, keep / "counts.json", Counter[str]()
    sound = path.read_bytes()
    for start in range(0, n, BATCH):
        counts_file.unlink(missing_ok=True)
        size, name = min(BATCH, n - start), f"{seed}-{reader.name}-{start}"
        work = functools.partial(batch, reader, sample, keep, size, name, counts_file)
        if code := trials.apart(work, BATCH_SECONDS):
            counts[f"crash: {code}"] += 1
            keep_input(reader, path, keep)
        else:
            counts.update(json.loads(counts_file.read_text(encoding="utf-8")))
        path.write_bytes(sound)
    return counts


def fuzz_readers(
    readers: list[Reader], sample: Path, keep: Path, n: int, seed: str
) -> dict[str, Counter[str]]:
    """A tenth of all executions is shared equally, the others so that all readers take as long."""
    counts, speed, first = {}, {}, n // 10 // max(1, len(readers))
    for reader in readers:
        start = time.perf_counter()
        counts[reader.name] = fuzz_reader(reader, sample, keep, first, f"{seed}-first")
        speed[reader.name] = (first + 1) / (time.perf_counter() - start)
    for reader in readers:
        more = int(speed[reader.name] / sum(speed.values()) * (n - first * len(readers)))
        counts[reader.name] += fuzz_reader(reader, sample, keep, more, seed)
        tell(reader.name, counts[reader.name], [])
    return counts


# --------------------------------------------------------------------------------------------------
# runs of scripts
# --------------------------------------------------------------------------------------------------
def inputs_of(script: trials.Script, start: Path, trial: Path) -> list[str]:
    """What the script reads of its start, by the record of a run, and records of other scripts."""
    record = trial / trials.SECTION / utils.record_name(script.name)
    text = record.read_text(encoding="utf-8").partition('"inputs"')[2]
    found = []
    for path in disk.files_in(start):
        name = path.relative_to(start)
        known = any(f'{part}"' in text for part in name.parts[1:])
        if known or name.parts[0] == trials.RAW or path.suffix == ".json":
            found.append(name.as_posix())
    return found


def how_it_ended(ended: trials.Ended) -> str:
    """ "accepted", "refused", or the kind of the failure."""
    if ended.traceback:
        places = re.findall(rf'File "{utils.ROOT}/(\S+)", line (\d+)', ended.said)
        place = ":".join(places[-1]) if places else "?"
        return f"traceback at {place}: {re.sub('/.*/', '', ended.last_line):.120}"
    if ended.code == -signal.SIGALRM:
        return "too slow"
    if ended.gb > MAX_GB:
        return f"too much memory: {ended.gb:.1f} GB"
    messages = len(re.findall(r"^error: ", ended.said, re.MULTILINE))
    if ended.code == 0 or (ended.code == 2 and messages == 1):
        return "refused" if ended.code else "accepted"
    return f"exit {ended.code}, {messages} messages: {ended.last_line:.120}"


class Bench:
    """A script, and a trial in which its inputs are damaged."""

    def __init__(self, script: trials.Script, start: Path, work: Path) -> None:
        self.script, self.start, self.work = script, start, work
        if (kind := self.attempt(work / "trial", [], random.Random())) != "accepted":
            raise utils.StageError(f"{script.label} fails on sound inputs: {kind}", "Mend it.")
        self.inputs = inputs_of(script, start, work / "trial")

    def attempt(self, trial: Path, damaged: list[str], draw: random.Random) -> str:
        """What came of a run on variants of the ``damaged`` inputs."""
        shutil.rmtree(trial, ignore_errors=True)
        shutil.copytree(self.start, trial)  # keeps times, so that the records stay valid
        for path in (trial / name for name in damaged):
            path.write_bytes(mutations.mutate(path.read_bytes(), path.suffix, draw))
        limit = functools.partial(limit_memory, 2 * MAX_GB)
        log = self.work / "run.log"
        return how_it_ended(trials.forked(self.script, trial, log, RUN_SECONDS, limit))

    def fuzz(self, keep: Path, n: int, seed: str) -> tuple[Counter[str], list[Failure]]:
        """What came of ``n`` runs; a failure of each kind, with its inputs kept."""
        counts, failures, draw = Counter[str](), [], random.Random(seed + self.script.label)
        for number in range(n):
            some = draw.sample(self.inputs, min(len(self.inputs), draw.choice((1, 1, 1, 2))))
            variant = f"{seed}-{self.script.label}-{number}"
            kind = self.attempt(self.work / "trial", some, random.Random(variant))
            counts[kind] += 1
            if kind not in SOUND and counts[kind] == 1:
                kept = keep / "scripts" / f"{Path(self.script.name).stem}-{number}"
                self.attempt(kept, some, random.Random(variant))
                options = [option.format(kept) for option in self.script.options]
                command = shlex.join(["python", self.script.name, *options])
                failures.append(Failure(f"{kind} ({', '.join(some)})", command))
        return counts, failures


# --------------------------------------------------------------------------------------------------
# the command
# --------------------------------------------------------------------------------------------------
def table_of(what: str, counts: dict[str, Counter[str]]) -> list[str]:
    rows = {**counts, "all": sum(counts.values(), Counter[str]())}
    cells_ = [
        [name, n := count.total(), r := count["refused"], a := count["accepted"], n - r - a]
        for name, count in rows.items()
    ]
    return measure.table([what, "executions", "refused", "accepted", "failures"], cells_)


def repeat(path: Path, sample: Path) -> None:
    """Read one kept file again, without catching anything."""
    (reader,) = (r for r in READERS if r.name.replace("/", "-") == path.parent.name)
    shutil.copyfile(path, sample / reader.name)
    print(reader.read(stage_of(reader, sample), sample / reader.name))


def main(args: argparse.Namespace) -> None:
    readers = [r for r in READERS if args.executions and re.search(args.only, r.name)]
    scripts = [s for s in trials.SCRIPTS if args.runs and re.search(args.only, s.label)]
    of_all = trials.SCRIPTS if readers else scripts
    trials.warm_up(of_all)
    of_scripts: dict[str, Counter[str]] = {}
    with measure.kept_or_temporary(args.keep) as keep, tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        trials.make(work / "starts", work / "make.log", {script.start for script in of_all})
        # apart, for libvips starts threads, which do not survive a fork
        if readers and trials.apart(
            lambda: make_sample(work / "starts", work / "sample"), RUN_SECONDS
        ):
            raise SystemExit(1)
        if args.repeat:
            repeat(args.repeat, work / "sample")
            return
        of_readers = fuzz_readers(readers, work / "sample", keep, args.executions, str(args.seed))
        for i, script in enumerate(scripts):
            bench = Bench(script, work / "starts" / script.start, work)
            found, failures = bench.fuzz(
                keep, trials.share(args.runs, i, len(scripts)), str(args.seed)
            )
            of_scripts[script.label] = found
            tell(script.label, found, failures)
    lines = [
        "# Damaged and odd inputs",
        "",
        "How it is done: the head of `benchmarks/fuzz.py`.",
        "",
    ]
    lines += [*table_of("reader", of_readers), "", *table_of("script", of_scripts), ""]
    text = "\n".join([*lines, *measure.origin(args.command)])
    print(text)
    if args.output:
        measure.write(args.output, text)
    if any(count.keys() - SOUND for count in (*of_readers.values(), *of_scripts.values())):
        raise SystemExit(1)


def tell(name: str, counts: Counter[str], failures: list[Failure]) -> None:
    """Progress, and every kind of failure once, on stderr."""
    print(f"{name}: {counts['refused']} refused, {counts['accepted']} accepted", file=sys.stderr)
    for kind in counts.keys() - SOUND:
        print(f"FAILED {name} | {counts[kind]} times | {kind}", file=sys.stderr)
    for failure in failures:
        print(f"    {failure.kind}\n    {failure.command}", file=sys.stderr)
    sys.stderr.flush()


def run(argv: list[str] | None = None) -> int:
    return measure.run_benchmark(main, SCRIPT, build_parser(), argv)


if __name__ == "__main__":
    sys.exit(run())
