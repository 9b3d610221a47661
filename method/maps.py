"""Maps on disk: their names, files and pictures."""

from __future__ import annotations

import math
import pickle
import shutil
import urllib.parse
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import cv2
import numpy as np
import pandas as pd
from PIL import Image

import utils
from method import devices, resume
from method.errors import Errors
from writing.progress import Bar

PLOT_PX, PLOT_MARGIN_PX, COLOUR_BAR_PX = 900, 36, 90
LONGEST_STEM = 100  # of a file name; the strictest file systems take 143 bytes in all
WINDOWS_DEVICES = ["con", "prn", "aux", "nul"]  # with com1..9 and lpt1..9: no file can be called so
WINDOWS_DEVICES += [f"{port}{i}" for port in ("com", "lpt") for i in range(1, 10)]


@dataclass(frozen=True)
class MapFiles:
    """How maps are written."""

    format: str  # pickle or npy
    dtype: str
    n_plots: int
    with_sd: bool
    score: str = "held-out r"  # by which genes are chosen for pictures, as these call it

    @property
    def folders(self) -> list[utils.Artifact]:
        return [utils.MAPS, utils.PLOTS, *[utils.SPREAD] * self.with_sd]


class Source(Protocol):
    """Where maps come from, some genes at a time; ``shown`` (h, w) bool has the M superpixels."""

    shown: np.ndarray

    def blocks(self) -> list[slice]:
        """All genes in parts."""

    def maps(self, genes: slice) -> np.ndarray:
        """Counts (G', M) of a part."""


def file_names(genes: list[str], suffix: str) -> dict[str, str]:
    """Gene -> file name: the gene itself where every file system takes it, else percent-encoded.

    Names stay inside the folder and differ also where upper and lower case do not. Long ones are
    cut; which gene a file is of, index.csv tells.
    """
    names, taken = {}, set()
    for gene in genes:
        stem = urllib.parse.quote(gene, safe="()+,;=@ ").replace("~", "%7E")
        if stem[0] in ". " or stem.split(".")[0].lower() in WINDOWS_DEVICES:
            stem = f"%{ord(stem[0]):02X}{stem[1:]}"
        name, count = (stem := stem[:LONGEST_STEM]), 1
        while name.lower() in taken:
            count += 1
            name = f"{stem}~{count}"
        taken.add(name.lower())
        names[gene] = name + suffix
    return names


def write_map(path: Path, values: np.ndarray, dtype: str) -> None:
    """Write a map (h, w), NaN outside; in float32 if float16 has no numbers that large."""
    highest = np.nanmax(values)
    if not np.isfinite(highest):
        raise utils.StageError(
            f"The map {path.stem} holds values that are not finite: the training has diverged.",
            "Run the same command with another --learning-rate, smaller than before.",
        )
    values = values.astype(dtype if highest <= np.finfo(dtype).max else np.float32)
    with path.open("wb") as file:
        if path.suffix == ".pickle":  # a plain array, as the tools of this family read it
            pickle.dump(values, file, protocol=4)
        else:
            np.save(file, values)


def write_index(folder: Path, names: dict[str, str]) -> None:
    index = pd.DataFrame(names.items(), columns=["gene", "file"])
    index.to_csv(folder / "index.csv", index=False, encoding="utf-8", lineterminator="\n")


def draw_map(values: np.ndarray, title: str) -> np.ndarray:
    """Picture (rows, columns, 3) of the tissue in a map (h, w), with a colour and a scale bar."""
    shown = np.argwhere(~np.isnan(values))
    (top, left), (bottom, right) = shown.min(axis=0), shown.max(axis=0)
    values = values[top : bottom + 1, left : right + 1]
    highest = max(float(np.nanpercentile(values, 99.5)), 1e-6)
    levels = (np.nan_to_num(values / highest).clip(0, 1) * 255).astype(np.uint8)
    picture = cv2.applyColorMap(levels, cv2.COLORMAP_VIRIDIS)
    picture[np.isnan(values)] = 255
    times = max(1, PLOT_PX // max(values.shape))
    picture = cv2.resize(picture, None, fx=times, fy=times, interpolation=cv2.INTER_NEAREST)
    height, width = picture.shape[:2]
    canvas = np.full((height + 2 * PLOT_MARGIN_PX, width + COLOUR_BAR_PX, 3), 255, np.uint8)
    rows = slice(PLOT_MARGIN_PX, PLOT_MARGIN_PX + height)
    canvas[rows, :width] = picture
    ramp = np.linspace(255, 0, height).astype(np.uint8)[:, None].repeat(20, axis=1)
    canvas[rows, width + 12 : width + 32] = cv2.applyColorMap(ramp, cv2.COLORMAP_VIRIDIS)

    def write(text: str, x: int, y: int) -> None:
        cv2.putText(canvas, text, (x, y), cv2.FONT_HERSHEY_SIMPLEX, 0.5, (0, 0, 0), 1, cv2.LINE_AA)

    write(f"{title}, counts per superpixel of 8 um", 4, PLOT_MARGIN_PX - 14)
    write(f"{highest:.3g}", width + 36, rows.start + 10)
    write("0", width + 36, rows.stop)
    half_um = values.shape[1] * utils.SUPERPIXEL_UM / 2
    length_um = 10.0 ** math.floor(math.log10(half_um))
    length_px = round(length_um / utils.SUPERPIXEL_UM * times)
    cv2.line(canvas, (4, rows.stop + 16), (4 + length_px, rows.stop + 16), (0, 0, 0), 2)
    write(f"{length_um:g} um", 12 + length_px, rows.stop + 21)
    return canvas[..., ::-1]  # cv2 draws in BGR


def new_folders(stage: utils.Stage, files: MapFiles) -> dict[utils.Artifact, Path]:
    """Where the maps go until the stage finishes; ``write_genes`` makes them."""
    folders = {}
    for artifact in files.folders:
        with stage.writing(artifact) as folders[artifact]:
            pass
    return folders


def write_embedding(stage: utils.Stage, embedding: np.ndarray) -> None:
    """Latent maps (D, h, w), as the tools of this family read them."""
    with stage.writing(utils.EMBEDDINGS) as partial, partial.open("wb") as file:
        pickle.dump({"cls": embedding}, file, protocol=5)


def write_genes(
    folders: dict[utils.Artifact, Path],
    work: Path,
    genes: list[str],
    source: Source,
    r: np.ndarray,
    files: MapFiles,
    errors: Errors | None = None,
    ranks: devices.Ranks = devices.ALONE,
) -> None:
    """Write the maps, their standard deviations and pictures, some genes at a time.

    By ``r`` (G,), the held-out correlation or another score, genes are chosen for pictures. Without
    ``errors`` there are no standard deviations. What is finished also gets a name in the folder
    ``work``, from which a run that was cut off goes on, and by which the first of several processes
    gets what the others have written.
    """
    names = file_names(genes, f".{files.format}")
    best = np.argsort(-np.nan_to_num(r, nan=-2), kind="stable")[: files.n_plots].tolist()
    pictures = file_names([genes[i] for i in best], ".png")
    for folder in folders.values():
        folder.mkdir()

    def write(block: slice) -> None:
        numbers = range(len(genes))[block]
        finished = [(utils.PLOTS, pictures[genes[i]]) for i in numbers if i in best]
        for artifact in folders.keys() - {utils.PLOTS}:
            finished += [(artifact, names[genes[i]]) for i in numbers]
        if resume.take_finished(work, folders, finished):
            return
        maps = source.maps(block)
        for row, i in enumerate(numbers):
            values = np.full(source.shown.shape, np.nan, np.float32)
            if errors is not None:
                values[source.shown] = errors.sd(maps[row : row + 1], slice(i, i + 1))[0]
                write_map(folders[utils.SPREAD] / names[genes[i]], values, files.dtype)
            values[source.shown] = maps[row]
            write_map(folders[utils.MAPS] / names[genes[i]], values, files.dtype)
            if i in best:
                title = genes[i] if np.isnan(r[i]) else f"{genes[i]} ({files.score} {r[i]:.2f})"
                picture = Image.fromarray(draw_map(values, title))
                picture.save(folders[utils.PLOTS] / pictures[genes[i]])
        resume.keep_finished(work, folders, finished)

    blocks = source.blocks()
    for block in Bar(ranks.share(blocks), "blocks of genes"):
        write(block)
    ranks.barrier()
    if ranks.rank > 0:
        return
    for block in blocks if ranks.world > 1 else []:
        write(block)
    for artifact in folders.keys() - {utils.PLOTS}:
        write_index(folders[artifact], names)
        n_bytes = 4 * source.shown.size  # of a map in float32, without its header
        paths = [folders[artifact] / name for name in names.values()]
        wide = sum(path.stat().st_size >= n_bytes for path in paths)
        if wide and files.dtype != "float32":
            print(f"note: {wide} maps in {artifact.name} are float32: float16 ends at 65,504")
    shutil.rmtree(work, ignore_errors=True)  # a run beside this one may be at it
