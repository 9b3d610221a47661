"""What all formats of analysis/export.py are made from: the maps, and what lies beside them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import utils
from analysis import files, inputs
from reading import images
from writing.progress import Bar

LABELS = {  # column of a table of superpixels -> the labels, and the table of their names
    "region": (files.SEGMENTS, files.SEGMENT_TABLE),
    "annotation": (files.ANNOTATION, files.ANNOTATION_TABLE),
}
MOST_LABELS = 2**16 - 1


@dataclass
class MapSet:
    """The maps to export; ``tissue`` is where they have values."""

    stage: utils.Stage
    files: dict[str, Path]  # of the maps, by gene
    tissue: np.ndarray  # bool (rows, columns)
    raw_size: tuple[int, int]  # rows, columns of he-raw
    scaled_size: tuple[int, int]  # of he.jpg without its padding

    @property
    def name(self) -> str:
        return self.stage.directory.resolve().name or "section"

    @property
    def genes(self) -> list[str]:
        return list(self.files)

    @property
    def n_superpixels(self) -> int:
        """Of the tissue."""
        return int(self.tissue.sum())

    @property
    def places(self) -> tuple[np.ndarray, np.ndarray]:
        """Row and column of the superpixels of the tissue."""
        row, column = np.nonzero(self.tissue)
        return row, column

    @property
    def scale(self) -> np.ndarray:
        """(2,) pixels of he-raw per pixel of he.jpg, down and across: they differ by rounding."""
        return np.divide(self.raw_size, self.scaled_size)

    @property
    def raw_px(self) -> float:
        """The same as one number."""
        return float(np.sqrt(np.prod(self.raw_size) / np.prod(self.scaled_size)))

    def to_raw(self, xy: np.ndarray) -> np.ndarray:
        """(N, 2) x and y from pixels of he.jpg to pixels of he-raw, both from the image's edges."""
        return xy * self.scale[::-1]

    def centres(self) -> np.ndarray:
        """(superpixels, 2) x and y of the superpixels of the tissue, pixels of he-raw."""
        row, column = self.places
        return self.to_raw((np.column_stack([column, row]) + 0.5) * utils.TOKEN_PX)


def each_map(source: MapSet, desc: str = "genes") -> Iterator[np.ndarray]:
    """The maps float32 (rows, columns), one at a time; all must have the same tissue."""
    for path in Bar(source.files.values(), desc):
        image = inputs.read_map(path)
        if image.shape != source.tissue.shape or (np.isfinite(image) != source.tissue).any():
            raise utils.StageError(
                f"{path} has no values where other maps have some, or the reverse.",
                f"The maps were changed. Run: {source.stage.command(utils.HISTEX)}",
            )
        yield image.astype(np.float32, copy=False)


def read_labels(source: MapSet, column: str) -> tuple[np.ndarray, list[str]] | None:
    """Labels (rows, columns), 0 for none, and the names of 1, 2, ...; None if there are none.

    A file that does not fit the maps is left out with a warning. Names are those of the column
    ``name`` of the table beside it, if that has a row per label in their order, else the numbers.
    A label of the table may have no superpixel.
    """
    stage, (artifact, table) = source.stage, LABELS[column]
    path = stage.directory / artifact.name
    inputs.note_inputs(stage, artifact, table)
    if not path.is_file():
        return None
    try:
        labels = inputs.load_labels(path, source.tissue.shape, MOST_LABELS)
    except ValueError as error:
        stage.warn(f"{path.name} is left out: it {error}")
        return None
    n = int(labels.max())
    names = inputs.read_label_texts(stage, table, "name", n)
    if names is not None and len(set(names)) < len(names):
        stage.warn(f"{table.name} is left out: it gives several labels one name")
        names = None
    return labels, names or [str(i) for i in range(1, n + 1)]


def in_mask(source: MapSet) -> np.ndarray:
    """Which superpixels (rows, columns) are tissue by mask.png: fewer than have values, after
    HISTEX.py --keep-background."""
    if source.stage.optional(utils.MASK) is None:
        return source.tissue
    return source.tissue & images.read_mask(source.stage, source.tissue.shape)


def records_of(source: MapSet) -> dict[str, str]:
    """Records of the five scripts as JSON text, those that are there and can be read."""
    found = {}
    for script in utils.STAGES:
        path = source.stage.directory / utils.record_name(script)
        try:
            found[Path(script).stem] = path.read_bytes().decode("utf-8").replace("\0", "")
        except FileNotFoundError:
            continue
        except (OSError, UnicodeDecodeError) as error:
            source.stage.warn(f"{path.name} is left out: it cannot be read as text ({error})")
    return found
