"""Label images of cells: one whole number a pixel, 0 for no cell, read in bands of rows.

The header is read first, so that an image of another size is refused before it is decoded.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image

import utils
from analysis.outlines import ending
from reading import arrays, pictures, plain, tiffs

BAND_ROWS = 64  # of a label image at a time
LARGEST_LABEL = 2**31 - 1
SAVE_AS = "Save it as a TIFF without compression or with deflate, as PNG or as .npy."
PNG_MODES = {"L": np.uint8, "P": np.uint8, "I;16": np.uint16, "I": np.int32, "1": np.bool_}
LOSSY = {6: "JPEG", 7: "JPEG", 33007: "JPEG", 34892: "JPEG", 50001: "WebP"}  # ways of TIFF
OF_NUMPY = "python -c \"import numpy as np; np.save('cells.npy', {})\""
OUTLINES = "Give the outlines as GeoJSON in pixels of he-raw, or a label image, .tif or .npy."
REFUSED = {  # formats that are no label image, and the way out
    ".npz": ("an archive of several arrays", OF_NUMPY.format("np.load('{name}')['NAME']")),
    ".mat": (
        "a file of MATLAB (as HoVer-Net writes it)",
        "python -c \"import numpy as np, scipy.io as s; np.save('cells.npy', "
        "s.loadmat('{name}')['inst_map'])\"",
    ),
    ".pkl": ("a pickle, which is not opened", "Save the labels by np.save('cells.npy', labels)."),
    ".jpg": ("a JPEG, which changes labels", "Save the labels as TIFF, PNG or .npy."),
    ".h5": (
        "HDF5, such as a matrix of counts",
        "Of Space Ranger, give cell_segmentations.geojson of the same folder. " + OUTLINES,
    ),
    ".zip": (
        "an archive",
        "Of Xenium's cells.zarr.zip, give cell_boundaries.parquet of the same folder. Of ImageJ's "
        "regions, save a label image.",
    ),
    ".zarr": ("a zarr store", OUTLINES),
    ".roi": ("regions of ImageJ", "Save a label image from ImageJ, .tif or .png."),
    ".xml": ("a file of annotations in XML", "Import it into QuPath, and export GeoJSON."),
}
for _alias, _suffix in (
    (".pickle", ".pkl"), (".jpeg", ".jpg"), (".hdf5", ".h5"), (".h5ad", ".h5"), (".mtx", ".h5"),
):  # fmt: skip
    REFUSED[_alias] = REFUSED[_suffix]


def wrong(path: Path, problem: str, remedy: str) -> utils.StageError:
    return utils.StageError(f"{path} {problem}", remedy)


@contextlib.contextmanager
def readable(path: Path) -> Iterator[None]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # its size is checked
            yield
    except utils.StageError:
        raise
    except Exception as error:  # damaged bytes can raise nearly anything
        if plain.of_disk(error):
            raise
        raise wrong(path, f"is not a readable label image ({error!r:.200}).", SAVE_AS) from error


def open_labels(path: Path) -> tuple[tuple[int, ...], np.dtype, Iterator[np.ndarray]]:
    """Shape and type of a label image, and its bands of rows (n, columns) from top to bottom.

    Nothing is decoded before the first band is asked for.
    """
    suffix = ending(path)
    if suffix in REFUSED:
        what, remedy = REFUSED[suffix]
        raise wrong(path, f"is {what}, no label image.", remedy.replace("{name}", path.name))
    reader: Callable[[Path], Any] = {".npy": open_npy, ".png": open_png}.get(suffix, open_tiff)
    with readable(path):
        shape, dtype, bands = reader(path)
    if 0 in shape:
        raise wrong(path, f"has no pixels: {' x '.join(map(str, shape))}.", SAVE_AS)
    return shape, dtype, bands


def open_npy(path: Path) -> tuple[tuple[int, ...], np.dtype, Iterator[np.ndarray]]:
    with path.open("rb") as file:
        version = np.lib.format.read_magic(file)
        read = {(1, 0): np.lib.format.read_array_header_1_0}
        _, _, dtype = read.get(version, np.lib.format.read_array_header_2_0)(file)
    if dtype.hasobject:
        cellpose = path.name.endswith("_seg.npy")
        what = "the _seg.npy of Cellpose, a pickled dict" if cellpose else "a pickle of objects"
        raise wrong(
            path,
            f"is not a readable label image: it is {what}, and pickles are not opened.",
            "Save its masks alone: in Cellpose by File > Save masks, or cellpose --save_tif; or, "
            "if you trust the file: "
            + OF_NUMPY.format(f"np.load('{path.name}', allow_pickle=True).item()['masks']"),
        )
    array = arrays.mapped(path)
    return array.shape, array.dtype, bands_of(array)


def open_png(path: Path) -> tuple[tuple[int, ...], np.dtype, Iterator[np.ndarray]]:
    with Image.open(path, formats=("PNG",)) as image:
        shape, mode = image.size[::-1], image.mode
    dtype = PNG_MODES.get(mode)
    if dtype is None:
        return (*shape, len(mode)), np.dtype(np.uint8), iter(())
    return shape, np.dtype(dtype), bands_of_png(path)


def bands_of_png(path: Path) -> Iterator[np.ndarray]:
    with readable(path), Image.open(path, formats=("PNG",)) as image:
        array = np.asarray(image)
        check_turn(path, image.getexif().get(ExifTags.Base.Orientation, 1))
    yield from bands_of(array)


def check_turn(path: Path, orientation: int) -> None:
    if orientation != 1:
        raise wrong(
            path,
            f"{pictures.turned(orientation)}.",
            "Save it without the tag, as its pixels are stored: as they lie in the H&E.",
        )


def bands_of(array: np.ndarray) -> Iterator[np.ndarray]:
    for top in range(0, len(array), BAND_ROWS):
        yield arrays.some_rows(array, top, top + BAND_ROWS)


def open_tiff(path: Path) -> tuple[tuple[int, ...], np.dtype, Iterator[np.ndarray]]:
    import tifffile  # other kinds of masks do without

    logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # what is wrong becomes our message
    with tifffile.TiffFile(path) as tiff:
        tiffs.check_chain(tiff)
        page, pages = tiff.pages.first, len(tiff.series[0].pages)
        shape = page.shape if pages == 1 else (pages, *page.shape)
        if page.dtype is None:
            raise wrong(
                path,
                f"has pixels of {page.bitspersample} bits of a kind that is not known.",
                "Save the labels as whole numbers of 8, 16 or 32 bits.",
            )
        if int(page.compression) in LOSSY:
            problem = f"is compressed as {LOSSY[int(page.compression)]}, which changes labels."
            raise wrong(path, problem, "Save it without compression or with deflate.")
        tag = page.tags.get("Orientation")
        check_turn(path, 1 if tag is None else int(tag.value))
        in_place = page.is_memmappable
    dtype = np.dtype(page.dtype)
    if in_place:
        return shape, dtype, bands_of(tifffile.memmap(path, page=0, mode="r"))
    return shape, dtype, decoded_bands(path)


def decoded_bands(path: Path) -> Iterator[np.ndarray]:
    """Rows of strips or tiles, each decoded once."""
    import tifffile
    import zarr

    with readable(path), tifffile.imread(path, aszarr=True, key=0, maxworkers=1) as store:
        image = zarr.open_array(store, mode="r")
        for top in range(0, image.shape[0], image.chunks[0]):
            yield from bands_of(np.asarray(image[top : top + image.chunks[0]]))
