"""--format h5ad of analysis/export.py: AnnData for scanpy and squidpy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
import pyvips

import utils
from analysis import inputs
from analysis.formats import mapset
from analysis.formats.mapset import MapSet
from analysis.formats.nodes import new_array, put_anndata
from writing import disk

GENES_AT_ONCE = 32  # columns of a chunk of X, written as a whole: one gene costs 32 to read
ROWS_PER_CHUNK = 4096  # 0.5 MB with the above
GZIP_LEVEL = 1  # the digits of expected counts are noise: 6 saves a few hundredths in five times
HIRES_PX, LOWRES_PX = 2000, 600  # longest sides of the reduced H&E, as Space Ranger has them
OBS_BYTES = 128  # of a row of obs and its place


def bytes_needed(source: MapSet) -> int:
    """Of the disk, before compression."""
    path = source.stage.find(utils.EMBEDDINGS)
    latent = 0 if path is None else path.stat().st_size
    per_superpixel = 4 * len(source.files) + OBS_BYTES
    return per_superpixel * source.n_superpixels + latent + 3 * (HIRES_PX**2 + LOWRES_PX**2)


def write(source: MapSet, target: Path) -> None:
    """X is dense: softplus-like outputs leave few zeros, and CSR would need twice the space.

    Its chunks hold some rows of some genes, so that a gene or a part of the tissue can be read
    from an object opened as backed; gzip is the compression that every HDF5 has.
    """
    n, genes = source.n_superpixels, source.genes
    obs, var = superpixel_table(source), gene_table(source)
    total, mean = np.zeros(n), np.zeros(len(genes))
    with disk.late_errors(target) as opened, h5py.File(opened, "w") as file:
        file.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
        packed: dict[str, Any] = {
            "compression": "gzip",
            "compression_opts": GZIP_LEVEL,
            "shuffle": True,
        }
        chunks = (min(ROWS_PER_CHUNK, n), min(GENES_AT_ONCE, len(genes)))
        x = new_array(file, "X", (n, len(genes)), np.float32, chunks=chunks, **packed)
        every = mapset.each_map(source)
        for start in range(0, len(genes), GENES_AT_ONCE):
            some = slice(start, min(start + GENES_AT_ONCE, len(genes)))
            block = np.empty((n, some.stop - start), np.float32)
            for i in range(block.shape[1]):
                block[:, i] = next(every)[source.tissue]
            x[:, some] = block
            opened.check()  # a disk that is full now will not hold the other genes either
            total += block.sum(1, dtype=np.float64)
            mean[some] = block.mean(0, dtype=np.float64)
        next(every, None)  # lets the progress bar end
        parts = {
            "obs": obs.assign(total_counts=total),
            "var": var.assign(mean_counts=mean),
            "obsm": {"spatial": source.centres()},
            "uns": {
                "histex": mapset.records_of(source),
                "spatial": {source.name: picture_of(source)},
            },
        }
        put_anndata(file, parts)
        if source.stage.optional(utils.EMBEDDINGS) is None:
            source.stage.warn(f"without {utils.EMBEDDINGS.name} there is no obsm X_histex")
            return
        embedding = inputs.read_embedding(source.stage)
        dims, where = len(embedding), np.flatnonzero(source.tissue)
        flat, chunks = embedding.reshape(dims, -1), (chunks[0], dims)
        latent = new_array(file["obsm"], "X_histex", (n, dims), np.float32, chunks=chunks, **packed)
        for start in range(0, n, ROWS_PER_CHUNK):
            rows = slice(start, start + ROWS_PER_CHUNK)
            latent[rows] = flat[:, where[rows]].T
            opened.check()


def superpixel_table(source: MapSet) -> pd.DataFrame:
    """obs: a row per superpixel, named by its row and column."""
    row, column = source.places
    names = [f"r{r}c{c}" for r, c in zip(row.tolist(), column.tolist(), strict=True)]
    places = {
        "in_tissue": mapset.in_mask(source)[row, column].astype(np.int64),
        "array_row": row,
        "array_col": column,
    }
    table = pd.DataFrame(places, index=pd.Index(names, dtype=object))
    for name in mapset.LABELS:
        if found := mapset.read_labels(source, name):
            codes = found[0][row, column].astype(np.int64) - 1  # -1: none
            table[name] = pd.Categorical.from_codes(codes, pd.Index(found[1], dtype=object))
    return table


def gene_table(source: MapSet) -> pd.DataFrame:
    """var: the correlation in held-out spots, if known."""
    table = pd.DataFrame(index=pd.Index(source.genes, dtype=object))
    held_out = inputs.read_held_out(source.stage)
    if held_out is not None:
        column = str(held_out.name).replace("-", "_").replace(" ", "_")
        table[column] = held_out.reindex(source.genes).to_numpy(np.float64)
    return table


def picture_of(source: MapSet) -> dict[str, Any]:
    """What scanpy and squidpy look for in uns["spatial"][library].

    The pictures show the H&E without its padding. Their sizes are halved as often as needed, so
    that the scale is exact.
    """
    path, longest = source.stage.path(utils.HE), max(source.tissue.shape) * utils.TOKEN_PX
    pictures, factors = {}, {"spot_diameter_fullres": utils.TOKEN_PX * source.raw_px}
    for name, limit in (("hires", HIRES_PX), ("lowres", LOWRES_PX)):
        times = 2 ** halvings(longest, limit)
        rows, columns = (-(-side // times) for side in source.scaled_size)
        try:
            # revalidate: he.jpg may have changed since this process read it last
            image = pyvips.Image.new_from_file(
                str(path), access="sequential", fail_on="error", revalidate=True
            )
            pictures[name] = image.shrink(times, times, ceil=True).numpy()[:rows, :columns]
        except pyvips.Error as error:
            raise source.stage.error(path, f"is not a whole image: {error}") from error
        factors[f"tissue_{name}_scalef"] = 1 / (source.raw_px * times)
    return {"images": pictures, "scalefactors": factors}


def halvings(side: int, longest: int) -> int:
    """How often ``side`` is halved until it is no longer than ``longest``."""
    n = 0
    while side > longest:
        side, n = -(-side // 2), n + 1
    return n
