"""--format csv of analysis/export.py: a gzipped table, a row per superpixel."""

from __future__ import annotations

import gzip
import tempfile
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.csv

from analysis.formats.mapset import MapSet, each_map
from analysis.sheets import warn_of_formulas
from writing.progress import Bar

TABLE_BYTES = 2**26  # of the rows of the table that are in memory at a time
GZIP_LEVEL = 1  # the digits of expected counts are noise: 6 saves a few hundredths in five times


def bytes_needed(source: MapSet) -> int:
    """Of the disk: the temporary file, and digits."""
    return (4 + 12) * source.n_superpixels * (len(source.files) + 2)


def write(source: MapSet, target: Path) -> None:
    """The maps go gene by gene into a temporary file, and come back from it in blocks of rows."""
    n, genes = source.n_superpixels, source.genes
    warn_of_formulas(source.stage, genes)
    places = [*source.places, *source.centres().T]
    fields = [("row", pyarrow.int64()), ("column", pyarrow.int64())]
    fields += [("x_fullres", pyarrow.float64()), ("y_fullres", pyarrow.float64())]
    schema = pyarrow.schema([*fields, *((gene, pyarrow.float32()) for gene in genes)])
    step = max(1, TABLE_BYTES // (4 * len(genes)))
    options = pyarrow.csv.WriteOptions(quoting_style="needed")
    with (
        tempfile.TemporaryFile(dir=target.parent) as values,
        target.open("wb") as raw,
        gzip.GzipFile("", "wb", GZIP_LEVEL, raw, mtime=0) as packed,
        pyarrow.csv.CSVWriter(packed, schema, write_options=options) as table,
    ):
        for image in each_map(source):
            image[source.tissue].tofile(values)
        for start in Bar(range(0, n, step), "blocks of rows"):
            rows = slice(start, min(start + step, n))
            columns = [place[rows] for place in places]
            for i in range(len(genes)):
                values.seek(4 * (i * n + start))
                columns.append(np.fromfile(values, np.float32, rows.stop - start))
            arrays = [pyarrow.array(column) for column in columns]
            table.write_batch(pyarrow.record_batch(arrays, schema=schema))
