"""--format istar of analysis/export.py: a folder for the scripts of iStar."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pandas as pd
from PIL import Image

import utils
from analysis import inputs
from analysis.formats.mapset import MapSet, each_map, in_mask

SMALL_MASK = "mask-small.png"
LARGE_WRITE_BYTES = 2**16  # what the pickler writes in one piece is pixels, no names


def bytes_needed(source: MapSet) -> int:
    """Of the disk."""
    copied = (source.stage.path(utils.EMBEDDINGS), source.stage.path(utils.HE))
    maps = 4 * source.tissue.size * len(source.files)
    return maps + sum(path.stat().st_size for path in copied)


def write(source: MapSet, target: Path) -> None:
    """Spots are rounded to whole pixels and radius.txt to a whole number, as iStar has them.

    A gene whose name no file can have goes by the name of its map's file, in gene-names.txt and
    cnts.tsv as well: iStar opens cnts-super/NAME.pickle.
    """
    stage = source.stage
    locs, counts = keep_whole_discs(source, *inputs.read_tables(stage, source.genes))
    names = [path.stem for path in source.files.values()]
    (target / utils.MAPS.name).mkdir(parents=True)
    for name, image in zip(names, each_map(source), strict=True):
        write_pickle(target / utils.MAPS.name / f"{name}.pickle", image)
    embedding = inputs.read_embedding(source.stage)
    write_pickle(target / utils.EMBEDDINGS.name, {"cls": embedding})
    Image.fromarray(in_mask(source).astype(np.uint8) * 255).save(target / SMALL_MASK)
    he = stage.path(utils.HE)
    shutil.copyfile(he, target / he.name)
    radius = inputs.read_radius(stage.directory) * utils.TOKEN_PX
    texts = {
        utils.GENE_NAMES: "\n".join(names),
        utils.RADIUS: str(round(radius)),
        utils.PIXEL_SIZE: str(utils.PIXEL_SIZE_UM),
    }
    for artifact, text in texts.items():
        (target / artifact.name).write_text(f"{text}\n", encoding="utf-8", newline="\n")
    counts.columns = names
    whole = counts if (counts % 1).any(axis=None) else counts.astype(np.int64)
    for name, table in {"cnts": whole, "locs": locs[["x", "y"]].round().astype(np.int64)}.items():
        table.to_csv(target / f"{name}.tsv", sep="\t", lineterminator="\n")


def keep_whole_discs(
    source: MapSet, locs: pd.DataFrame, counts: pd.DataFrame
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The spots whose discs lie on the image: iStar's plot_spots.py fails on any other.

    It rounds centres and radius to superpixels; a disc of radius 2 covers 5 x 5 of them.
    """
    radius = round(inputs.read_radius(source.stage.directory) * utils.TOKEN_PX) / utils.TOKEN_PX
    centres = (locs[["y", "x"]].to_numpy().round() / utils.TOKEN_PX).round()
    margin = np.minimum(centres, np.array(source.tissue.shape) - 1 - centres).min(axis=1)
    inside = margin >= round(radius)
    if not inside.all():
        source.stage.warn(f"{(~inside).sum()} of {len(locs)} spots reach over the image: left out")
    return locs[inside], counts[inside]


class OldNames:
    """A file for the pickler, in which numpy's parts have the names that numpy 1 knows as well."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file

    def write(self, data: bytes) -> int:
        if len(data) < LARGE_WRITE_BYTES:
            data = bytes(data).replace(b"cnumpy._core.", b"cnumpy.core.")
        return self.file.write(data)


def write_pickle(path: Path, content: Any) -> None:
    with path.open("wb") as file:
        pickle.dump(content, OldNames(file), protocol=3)  # the last with names in lines of text
