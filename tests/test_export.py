"""analysis/export.py: the values of every format against the maps, read by h5py, zarr and the like.

tests/test_export_tools.py opens the exports with the tools that they are for.
"""

import csv
import errno
import gc
import gzip
import json
import os
import pickle
import pickletools
import shutil
import struct
import sys
import tracemalloc
from functools import partial
from pathlib import Path
from xml.etree import ElementTree

import h5py
import numpy as np
import pandas as pd
import pyarrow.parquet
import pytest
import tifffile
import zarr
from conftest import ROOT, hexagonal_spots, write_record, write_sample
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

import image_calibration
import utils
from analysis import export, inputs
from analysis.formats import csv as csv_format
from analysis.formats import h5ad, istar, ometiff, spatialdata
from writing import disk

FILES = {  # gene -> file without its suffix, as HISTEX.py names them
    "KRT8": "KRT8",
    "HLA-A/B": "HLA-A%2FB",
    "CON": "%43ON",
    "krt8": "krt8~2",
    "a,b": "a,b",
    'say "x"': "say %22x%22",
    "NA": "NA",
    "β2.m": "%CE%B22.m",
    "<&>": "%3C%26%3E",
}
GENES = list(FILES)
GRID = (28, 42)  # superpixels
RAW_SIZE, SCALED_SIZE = (537, 811), (430, 660)  # scales of rows and of columns that differ
RADIUS_PX = 24.3
FORMATS = list(export.FORMATS)
OUTPUTS = {kind: row.output for kind, row in export.FORMATS.items()}
OME = "{http://www.openmicroscopy.org/Schemas/OME/2016-06}"


# ------------------------------------------------------------------------------------------------
# a finished section, without the five scripts
# ------------------------------------------------------------------------------------------------
class Section:
    """A sample directory, and what is in it."""

    def __init__(
        self, directory, grid=GRID, files=FILES, dims=5, pitch=70.0, suffix=".pickle", dtype="<f4"
    ):
        self.directory, self.grid, self.genes = directory, grid, list(files)
        rng = np.random.default_rng(3)
        row, column = np.mgrid[: grid[0], : grid[1]]
        inside = ((row + 0.5) / grid[0] - 0.5) ** 2 + ((column + 0.5) / grid[1] - 0.5) ** 2 < 0.2
        self.tissue = inside & (rng.random(grid) > 0.05)  # holes as well
        shape = (len(files), *grid)
        self.maps = np.where(self.tissue, rng.gamma(0.7, 2.0, shape), np.nan).astype(dtype)
        self.embedding = np.where(self.tissue, rng.normal(size=(dims, *grid)), np.nan)
        self.embedding = self.embedding.astype(np.float32)
        self.places = np.argwhere(self.tissue)  # row by row
        self.write(files, suffix, pitch, rng)

    @property
    def values(self) -> np.ndarray:
        """(superpixels, genes)"""
        return np.array([self.maps[:, r, c] for r, c in self.places]).astype(np.float32)

    def write(self, files, suffix, pitch, rng) -> None:
        directory, (rows, columns) = self.directory, self.grid
        (directory / "cnts-super").mkdir(parents=True)
        for name, image in zip(files.values(), self.maps, strict=True):
            with (directory / "cnts-super" / f"{name}{suffix}").open("wb") as file:
                np.save(file, image) if suffix == ".npy" else pickle.dump(image, file, protocol=4)
        index = pd.DataFrame({"gene": self.genes, "file": [f + suffix for f in files.values()]})
        index.to_csv(directory / "cnts-super" / "index.csv", index=False)
        with (directory / "embeddings-gene.pickle").open("wb") as file:
            pickle.dump({"cls": self.embedding}, file, protocol=5)
        self.held_out = pd.Series(rng.permutation(len(files)) / len(files), self.genes)
        held_out = pd.DataFrame({"gene": self.genes, "held_out_r": self.held_out.to_numpy()})
        held_out.to_csv(directory / "held-out-r.csv", index=False)
        coarse = rng.integers(60, 255, (rows // 2, columns // 2, 3), dtype=np.uint8)
        picture = Image.fromarray(coarse).resize(
            (columns * 16, rows * 16), Image.Resampling.BICUBIC
        )
        picture.save(directory / "he.jpg", quality=95)
        xy = hexagonal_spots((rows * 16, columns * 16), pitch, margin=48.0)
        self.locs = pd.DataFrame(xy, [f"s{i}" for i in range(len(xy))], ["x", "y"])
        self.locs.to_csv(directory / "locs.csv")
        counts = rng.poisson(3, (len(xy), 1 + len(files)))
        names = ["unmapped", *reversed(self.genes)]
        self.counts = pd.DataFrame(counts, self.locs.index, names)
        self.counts.sample(frac=1, random_state=0).to_csv(directory / "cnts.csv")
        (directory / "radius.txt").write_text(f"{RADIUS_PX}\n")
        self.mask = self.tissue & (rng.random(self.grid) > 0.03)  # as after --keep-background
        Image.fromarray(self.mask.astype(np.uint8) * 255).save(directory / "mask.png")
        self.calibrate(RAW_SIZE, SCALED_SIZE)
        write_record(directory, utils.HISTEX, ["he.jpg"], list(OUTPUTS_OF_HISTEX))

    def calibrate(self, raw_size, scaled_size) -> None:
        """The record of image_calibration.py, with the sizes; that of he.jpg is of the grid."""
        write_record(self.directory, utils.CALIBRATION, [], ["he.jpg", "locs.csv", "radius.txt"])
        path = self.directory / utils.record_name(utils.CALIBRATION)
        record = json.loads(path.read_text())
        sizes = {"raw_size": raw_size, "scaled_size": scaled_size}
        sizes["size"] = [16 * side for side in self.grid]
        path.write_text(json.dumps(record | sizes))

    def centres(self) -> np.ndarray:
        """x and y in pixels of he-raw, one superpixel at a time."""
        down, across = RAW_SIZE[0] / SCALED_SIZE[0], RAW_SIZE[1] / SCALED_SIZE[1]
        return np.array([((16 * c + 8) * across, (16 * r + 8) * down) for r, c in self.places])

    def copy(self, folder: Path) -> "Section":
        other = object.__new__(Section)
        other.__dict__.update(self.__dict__)
        other.directory = Path(shutil.copytree(self.directory, folder))
        return other


OUTPUTS_OF_HISTEX = ("cnts-super", "embeddings-gene.pickle", "held-out-r.csv")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return Section(tmp_path_factory.mktemp("made") / "section A")


@pytest.fixture
def section(made, tmp_path):
    """A copy that a test may change."""
    return made.copy(tmp_path / "section A")


def run(section: Section, kind: str, *options: str) -> int:
    return export.run(["--directory", str(section.directory), "--format", kind, *options])


def exported(section: Section, kind: str, *options: str) -> Path:
    assert run(section, kind, *options) == 0
    return section.directory / OUTPUTS[kind]


def refused(section: Section, capsys, kind: str, *options: str) -> str:
    """The error; nothing half done may stay behind."""
    before = sorted(section.directory.rglob("*"))
    assert run(section, kind, *options) == 2
    assert sorted(section.directory.rglob("*")) == before
    return capsys.readouterr().err


def change(section: Section, name: str, content) -> None:
    """Change an output of HISTEX.py, as if it had written it so."""
    path = section.directory / name
    if isinstance(content, np.ndarray | dict):
        with path.open("wb") as file:
            pickle.dump(content, file)
    else:
        path.write_text(content, encoding="utf-8")
    write_record(section.directory, utils.HISTEX, ["he.jpg"], list(OUTPUTS_OF_HISTEX))


# ------------------------------------------------------------------------------------------------
# h5ad
# ------------------------------------------------------------------------------------------------
def text(array) -> list[str]:
    return array.asstr()[:].tolist()


def test_h5ad_values_places_and_provenance(section):
    with h5py.File(exported(section, "h5ad")) as file:
        assert dict(file.attrs) == {"encoding-type": "anndata", "encoding-version": "0.1.0"}
        np.testing.assert_array_equal(file["X"][:], section.values)
        assert file["X"].dtype == np.float32
        assert file["X"].compression == "gzip"
        assert text(file["var/_index"]) == GENES
        np.testing.assert_array_equal(file["var/held_out_r"][:], section.held_out.to_numpy())
        np.testing.assert_allclose(file["var/mean_counts"][:], section.values.mean(0), rtol=1e-5)
        row, column = section.places.T
        names = [f"r{r}c{c}" for r, c in section.places]
        assert text(file["obs/_index"]) == names
        np.testing.assert_array_equal(file["obs/array_row"][:], row)
        np.testing.assert_array_equal(file["obs/array_col"][:], column)
        np.testing.assert_array_equal(file["obs/in_tissue"][:], section.mask[row, column])
        np.testing.assert_allclose(file["obs/total_counts"][:], section.values.sum(1), rtol=1e-5)
        np.testing.assert_allclose(file["obsm/spatial"][:], section.centres(), rtol=1e-12)
        np.testing.assert_array_equal(file["obsm/X_histex"][:], section.embedding[:, row, column].T)
        for script in (utils.CALIBRATION, utils.HISTEX):
            record = section.directory / utils.record_name(script)
            kept = file["uns/histex"][Path(script).stem].asstr()[()]
            assert json.loads(kept) == json.loads(record.read_text())


def test_the_reduced_image_lies_under_the_places(section):
    """A superpixel's mean colour in he.jpg is that of its square in the pictures."""
    he = np.asarray(Image.open(section.directory / "he.jpg"), float)
    with h5py.File(exported(section, "h5ad")) as file:
        spatial, place = file["uns/spatial/section A"], file["obsm/spatial"][:]
        factors = {name: value[()] for name, value in spatial["scalefactors"].items()}
        pictures = {name: value[:] for name, value in spatial["images"].items()}
    assert pictures["hires"].shape == (*SCALED_SIZE, 3)  # without the padding
    assert pictures["lowres"].shape == (SCALED_SIZE[0] // 2, SCALED_SIZE[1] // 2, 3)
    assert pictures["hires"].dtype == np.uint8
    np.testing.assert_array_equal(pictures["hires"], he[: SCALED_SIZE[0], : SCALED_SIZE[1]])
    mean = np.sqrt(RAW_SIZE[0] * RAW_SIZE[1] / SCALED_SIZE[0] / SCALED_SIZE[1])
    assert factors["spot_diameter_fullres"] == pytest.approx(16 * mean)
    assert factors["tissue_lowres_scalef"] == pytest.approx(factors["tissue_hires_scalef"] / 2)
    picture, scale = pictures["lowres"].astype(float), factors["tissue_lowres_scalef"]
    for (r, c), (x, y) in zip(section.places[::37], place[::37], strict=True):
        assert abs(x * scale - (8 * c + 4)) < 4  # the sides' scales differ by 1.6 % here
        assert abs(y * scale - (8 * r + 4)) < 4
        square = picture[8 * r : 8 * r + 8, 8 * c : 8 * c + 8].mean((0, 1))
        expected = he[16 * r : 16 * r + 16, 16 * c : 16 * c + 16].mean((0, 1))
        np.testing.assert_allclose(square, expected, atol=1.0)


def test_a_large_image_is_halved_band_by_band(tmp_path, monkeypatch):
    """1120 x 1344 px in two bands, halved twice and four times: means of 4 x 4 and 16 x 16 px."""
    monkeypatch.setattr(h5ad, "HIRES_PX", 400)
    monkeypatch.setattr(h5ad, "LOWRES_PX", 100)
    section = Section(tmp_path / "large", (70, 84), {"A": "A"})
    section.calibrate([1100, 1300], [1100, 1300])
    he = np.asarray(Image.open(section.directory / "he.jpg"), float)
    with h5py.File(exported(section, "h5ad")) as file:
        spatial = file["uns/spatial/large"]
        for name, times in (("hires", 4), ("lowres", 16)):
            picture = spatial["images"][name][:]
            mean = he.reshape(1120 // times, times, 1344 // times, times, 3).mean((1, 3))
            assert picture.shape == (-(-1100 // times), -(-1300 // times), 3)
            assert np.abs(picture - mean[: picture.shape[0], : picture.shape[1]]).max() < 2
            assert spatial["scalefactors"][f"tissue_{name}_scalef"][()] == pytest.approx(1 / times)


def test_h5ad_of_more_rows_and_genes_than_a_chunk_holds(section, monkeypatch):
    monkeypatch.setattr(h5ad, "GENES_AT_ONCE", 2)
    monkeypatch.setattr(h5ad, "ROWS_PER_CHUNK", 100)
    with h5py.File(exported(section, "h5ad")) as file:
        assert file["X"].chunks == (100, 2)
        np.testing.assert_array_equal(file["X"][:], section.values)
        row, column = section.places.T
        expected = section.embedding[:, row, column].T
        np.testing.assert_array_equal(file["obsm/X_histex"][:], expected)


def test_a_full_disk_ends_the_h5ad_before_the_other_genes_are_read(section, monkeypatch, capsys):
    full, honest, read = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), inputs.read_map, []

    def write(self, data, /):
        self.failed = self.failed or full
        return memoryview(data).nbytes

    def read_map(path):
        read.append(path.name)
        return honest(path)

    monkeypatch.setattr(disk._Patient, "write", write)
    monkeypatch.setattr(inputs, "read_map", read_map)
    monkeypatch.setattr(h5ad, "GENES_AT_ONCE", 2)
    monkeypatch.setattr(h5ad.h5py, "File", partial(h5py.File, rdcc_nbytes=0))  # written at once
    assert "No space left on device" in refused(section, capsys, "h5ad")
    assert len(read) == 1 + 2  # the first tells the tissue


def test_segments_and_annotations_are_categories(section):
    row, column = section.places.T
    segments = np.where(section.tissue, 1 + np.arange(GRID[1]) % 3, 0).astype(np.uint8)
    segments[row[0], column[0]] = 0
    np.save(section.directory / "segments.npy", segments)
    np.save(section.directory / "annotation.npy", segments.astype(np.int32))
    table = pd.DataFrame({"region": [1, 2, 3], "name": ["tumour", "NA", "fat"]})
    table.to_csv(section.directory / "annotation.csv", index=False)
    with h5py.File(exported(section, "h5ad")) as file:
        for name, categories in (("region", list("123")), ("annotation", ["tumour", "NA", "fat"])):
            column_of = file["obs"][name]
            assert column_of.attrs["encoding-type"] == "categorical"
            assert text(column_of["categories"]) == categories
            codes = segments[row, column].astype(int) - 1
            assert codes[0] == -1  # no label
            np.testing.assert_array_equal(column_of["codes"][:], codes)
        assert list(file["obs"].attrs["column-order"])[-3:] == [
            "region",
            "annotation",
            "total_counts",
        ]


@pytest.mark.parametrize(
    ("labels", "reason"),
    [
        (np.zeros((3, 4), np.uint8), "uint8 (3, 4)"),
        (np.zeros(GRID), "float64"),
        (np.full(GRID, -1), "whole numbers from 0"),
        (np.full(GRID, 2**16), "to 65535"),
    ],
)
def test_labels_that_do_not_fit_are_left_out_with_a_warning(section, capsys, labels, reason):
    np.save(section.directory / "segments.npy", labels)
    with h5py.File(exported(section, "h5ad", "--genes", "KRT8")) as file:
        assert "region" not in file["obs"]
    said = capsys.readouterr().out
    assert "warning: segments.npy is left out" in said
    assert reason in said
    record = json.loads((section.directory / "export.json").read_text())
    assert "segments.npy" in record["warnings"][0]


@pytest.mark.parametrize(
    ("table", "warned"),
    [
        ("region,name\n2,b\n1,a\n", True),  # in another order
        ("name\na\na\n", True),
        ("name\na\n", True),
        ("", True),
        ("region,colour\n1,red\n2,blue\n", False),  # has no names
    ],
)
def test_names_that_do_not_fit_the_labels_leave_their_numbers(section, capsys, table, warned):
    np.save(section.directory / "segments.npy", 1 + np.arange(GRID[0] * GRID[1]).reshape(GRID) % 2)
    (section.directory / "segments.csv").write_text(table)
    with h5py.File(exported(section, "h5ad", "--genes", "KRT8")) as file:
        assert text(file["obs/region/categories"]) == ["1", "2"]
    assert ("warning: segments.csv is left out" in capsys.readouterr().out) == warned


def test_a_label_of_the_table_may_have_no_superpixel(section):
    """As that of the unclassified, where everything is classified."""
    np.save(section.directory / "annotation.npy", np.ones(GRID, np.uint8))
    (section.directory / "annotation.csv").write_text("label,name\n1,fat\n2,unclassified\n")
    with h5py.File(exported(section, "h5ad", "--genes", "KRT8")) as file:
        assert text(file["obs/annotation/categories"]) == ["fat", "unclassified"]
        assert (file["obs/annotation/codes"][:] == 0).all()


def test_a_damaged_label_file_is_left_out(section, capsys):
    (section.directory / "segments.npy").write_bytes(b"\x93NUMPY")
    exported(section, "h5ad", "--genes", "KRT8")
    assert "segments.npy is left out: it is not a whole .npy array" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------
# SpatialData
# ------------------------------------------------------------------------------------------------
def scale_of(attributes: dict) -> list[float]:
    """Of an image or labels, into the system "global"."""
    (step,) = attributes["ome"]["multiscales"][0]["coordinateTransformations"]
    assert step["type"] == "scale"
    assert step["output"]["name"] == "global"
    return step["scale"]


def test_spatialdata_values_and_transformations(section):
    segments = np.where(section.tissue, 300, 0).astype(np.uint16)
    np.save(section.directory / "segments.npy", segments)
    store = zarr.open_group(exported(section, "spatialdata"), mode="r")
    expression = store["images/expression"]
    np.testing.assert_array_equal(expression["s0"][:], section.maps)
    channels = [channel["label"] for channel in expression.attrs["ome"]["omero"]["channels"]]
    assert channels == GENES
    scale = np.divide(RAW_SIZE, SCALED_SIZE)
    np.testing.assert_allclose(scale_of(expression.attrs), [1, *16 * scale])
    pixel = scale_of(expression.attrs)[1:]
    xy = (section.places[:, ::-1] + 0.5) * pixel[::-1]
    np.testing.assert_allclose(xy, section.centres(), rtol=1e-12)

    he = np.moveaxis(np.asarray(Image.open(section.directory / "he.jpg")), 2, 0)
    np.testing.assert_array_equal(store["images/he/s0"][:], he)
    np.testing.assert_allclose(scale_of(store["images/he"].attrs), [1, *scale])
    np.testing.assert_array_equal(store["labels/tissue/s0"][:], section.mask)
    np.testing.assert_array_equal(store["labels/regions/s0"][:], segments)
    np.testing.assert_allclose(scale_of(store["labels/tissue"].attrs), 16 * scale)

    path = section.directory / "histex.zarr/shapes/spots/shapes.parquet"
    circles = pyarrow.parquet.read_table(path).to_pandas()
    points = np.array([struct.unpack("<BIdd", point)[2:] for point in circles["geometry"]])
    np.testing.assert_allclose(points, section.locs.to_numpy() * scale[::-1])
    np.testing.assert_allclose(circles["radius"], RADIUS_PX * np.sqrt(scale[0] * scale[1]))
    assert list(circles.index) == list(section.locs.index)

    table = store["tables/counts"]
    known = {"encoding-type": "anndata", "encoding-version": "0.1.0", "version": "0.2"}
    assert known.items() <= dict(table.attrs).items()
    np.testing.assert_array_equal(table["X"][:], section.counts[GENES])
    assert table["obs/spot_id"][:].tolist() == list(section.locs.index)
    assert table["var/_index"][:].tolist() == GENES
    np.testing.assert_allclose(table["obsm/spatial"][:], points)
    records = store.attrs["histex"]
    assert json.loads(records["HISTEX"])["script"] == utils.HISTEX


@pytest.mark.parametrize("node", ["labels/tissue/s0", "tables/counts/obs", "shapes/spots"])
def test_a_node_that_cannot_be_opened_is_not_left_out_of_the_store(
    section, capsys, monkeypatch, node
):
    """zarr takes it for absent when it lists the nodes, and says nothing."""
    honest = zarr.storage.LocalStore.get

    async def get(self, key, *args, **options):
        return None if key == f"{node}/zarr.json" else await honest(self, key, *args, **options)

    monkeypatch.setattr(zarr.storage.LocalStore, "get", get)
    error = refused(section, capsys, "spatialdata")
    assert f"{node}/zarr.json: No such file or directory" in error
    assert "Something removed it while the script ran" in error


def test_the_image_pyramid_over_several_bands(tmp_path):
    """1120 x 1344 px: two bands of rows, the second of 224, and two levels."""
    section = Section(tmp_path / "section", (70, 84), {"A": "A"})
    store = zarr.open_group(exported(section, "spatialdata"), mode="r")
    he = store["images/he"]
    assert list(he) == ["s0", "s1"] or sorted(he) == ["s0", "s1"]
    whole = np.moveaxis(np.asarray(Image.open(section.directory / "he.jpg")), 2, 0)
    np.testing.assert_array_equal(he["s0"][:], whole)
    half = whole.reshape(3, 560, 2, 672, 2).mean((2, 4))
    assert he["s1"].shape == half.shape
    assert np.abs(he["s1"][:] - half).max() <= 0.5
    datasets = he.attrs["ome"]["multiscales"][0]["datasets"]
    steps = [d["coordinateTransformations"][0]["scale"] for d in datasets]
    assert steps == [[1, 1, 1], [1, 2, 2]]


# ------------------------------------------------------------------------------------------------
# OME-TIFF
# ------------------------------------------------------------------------------------------------
def by_hand(image: np.ndarray) -> np.ndarray:
    """Half the size: means of what is finite in two by two pixels."""
    small = np.full([-(-side // 2) for side in image.shape], np.nan)
    for r, c in np.ndindex(*small.shape):
        four = image[2 * r : 2 * r + 2, 2 * c : 2 * c + 2]
        if np.isfinite(four).any():
            small[r, c] = four[np.isfinite(four)].astype(float).mean()
    return small


@given(arrays(np.float32, st.tuples(st.integers(1, 7), st.integers(1, 7)),
              elements=st.sampled_from([0.0, 1.0, 2.5, 1e6, np.nan])))  # fmt: skip
def test_halves_are_means_of_the_tissue_alone(image):
    np.testing.assert_allclose(ometiff.halve_map(image), by_hand(image), rtol=1e-6)


def test_ometiff_values_of_every_level_and_odd_sizes(section, monkeypatch):
    monkeypatch.setattr(ometiff, "TILE_PX", 16)  # 28 x 42, 14 x 21, 7 x 11
    with tifffile.TiffFile(exported(section, "ometiff")) as file:
        (series,) = file.series
        assert (file.is_ome, series.axes, file.is_bigtiff) == (True, "CYX", False)
        assert [level.shape[1:] for level in series.levels] == [(28, 42), (14, 21), (7, 11)]
        expected = section.maps
        for number, level in enumerate(series.levels):
            found = level.asarray()
            np.testing.assert_allclose(found, np.nan_to_num(expected), rtol=1e-5)
            page = level.pages[0]
            assert page.is_tiled
            assert page.tile == (16, 16)
            size_um = 1e4 * page.resolution[0] ** -1
            assert size_um == pytest.approx(8 * 2**number, rel=1e-3)
            assert page.resolutionunit == tifffile.RESUNIT.CENTIMETER
            expected = np.array([by_hand(image) for image in expected])
        np.testing.assert_array_equal(series.asarray(), np.nan_to_num(section.maps))


def test_ometiff_larger_than_a_tile(tmp_path):
    """Nothing is patched here: 280 x 308 superpixels are two by two tiles of 256."""
    section = Section(tmp_path / "section", (280, 308), {"A": "A", "B": "B"}, dims=1)
    with tifffile.TiffFile(exported(section, "ometiff")) as file:
        assert [level.shape for level in file.series[0].levels] == [(2, 280, 308), (2, 140, 154)]
        np.testing.assert_array_equal(file.series[0].asarray(), np.nan_to_num(section.maps))


def test_ome_xml_names_the_genes_and_the_size_of_a_pixel(section):
    with tifffile.TiffFile(exported(section, "ometiff")) as file:
        image = ElementTree.fromstring(file.ome_metadata).find(f"{OME}Image")
    pixels = image.find(f"{OME}Pixels")
    found = {name: pixels.get(name) for name in ("SizeX", "SizeY", "SizeC", "Type")}
    assert found == {"SizeX": "42", "SizeY": "28", "SizeC": str(len(GENES)), "Type": "float"}
    for axis in "XY":
        assert float(pixels.get(f"PhysicalSize{axis}")) == 8.0
        assert pixels.get(f"PhysicalSize{axis}Unit") == "µm"
    channels = pixels.findall(f"{OME}Channel")
    assert [channel.get("Name") for channel in channels] == GENES
    assert {channel.get("SamplesPerPixel") for channel in channels} == {"1"}
    assert image.get("Name") == "section A"
    described = image.find(f"{OME}Description").text
    assert json.loads(described[described.index("{") :])["HISTEX"]


def test_a_large_ometiff_has_offsets_of_64_bits(section, monkeypatch):
    monkeypatch.setattr(ometiff, "BIG_TIFF_BYTES", 1000)
    with tifffile.TiffFile(exported(section, "ometiff")) as file:
        assert file.is_bigtiff
        np.testing.assert_array_equal(file.series[0].asarray(), np.nan_to_num(section.maps))


# ------------------------------------------------------------------------------------------------
# iStar
# ------------------------------------------------------------------------------------------------
def test_istar_reads_plain_arrays_tables_and_a_mask(section):
    folder = exported(section, "istar")
    stems = (folder / "gene-names.txt").read_text().splitlines()
    assert stems == list(FILES.values())
    for stem, expected in zip(stems, section.maps, strict=True):
        image = pickle.loads((folder / "cnts-super" / f"{stem}.pickle").read_bytes())
        np.testing.assert_array_equal(image, expected)
        assert image.dtype == np.float32
        assert image.flags.writeable
    latent = pickle.loads((folder / "embeddings-gene.pickle").read_bytes())
    np.testing.assert_array_equal(latent["cls"], section.embedding)
    mask = np.asarray(Image.open(folder / "mask-small.png"))
    np.testing.assert_array_equal(mask > 0, section.mask)
    assert (folder / "he.jpg").read_bytes() == (section.directory / "he.jpg").read_bytes()
    options = {"sep": "\t", "index_col": 0, "keep_default_na": False}
    counts, locs = (pd.read_csv(folder / f"{name}.tsv", **options) for name in ("cnts", "locs"))
    assert list(counts.index) == list(locs.index) == list(section.locs.index)
    assert list(counts) == stems
    np.testing.assert_array_equal(counts, section.counts[GENES])
    assert {*counts.dtypes, *locs.dtypes} == {np.dtype(np.int64)}
    np.testing.assert_array_equal(locs[["x", "y"]], section.locs.round())
    assert (folder / "radius.txt").read_text() == "24\n"
    assert (folder / "pixel-size.txt").read_text() == "0.5\n"


def test_istar_pickles_know_names_of_numpy_1_only(section):
    folder = exported(section, "istar")
    paths = [folder / "embeddings-gene.pickle", folder / "cnts-super/KRT8.pickle"]
    for path in paths:
        names = {a for op, a, _ in pickletools.genops(path.read_bytes()) if op.name == "GLOBAL"}
        modules = {name.split()[0] for name in names}
        assert "numpy.core.multiarray" in modules
        assert modules <= {"numpy", "numpy.core.multiarray", "_codecs"}


def test_pixels_that_spell_a_name_of_numpy_stay_as_they_are(tmp_path):
    spelled = np.frombuffer(b"cnumpy._core." * 8192, np.uint8)  # more than a write at once
    istar.write_pickle(tmp_path / "x.pickle", spelled)
    np.testing.assert_array_equal(pickle.loads((tmp_path / "x.pickle").read_bytes()), spelled)


def test_spots_that_reach_over_the_image_are_left_out_for_istar(section, capsys):
    locs = section.locs.copy()
    locs.loc["s0"] = (10.0, 200.0)
    locs.loc["s1"] = (300.0, GRID[0] * 16 - 20.0)
    locs.to_csv(section.directory / "locs.csv")
    section.calibrate(RAW_SIZE, SCALED_SIZE)
    folder = exported(section, "istar")
    for name in ("cnts", "locs"):
        index = pd.read_csv(folder / f"{name}.tsv", sep="\t", index_col=0).index
        assert list(index) == list(locs.index[2:])
    assert f"2 of {len(locs)} spots reach over the image: left out" in capsys.readouterr().out


def test_fractions_among_the_counts_stay(section):
    counts = section.counts.astype(float)
    counts.iloc[0, :] = 0.5
    counts.to_csv(section.directory / "cnts.csv")
    found = pd.read_csv(exported(section, "istar") / "cnts.tsv", sep="\t", index_col=0)
    assert found.iloc[0].tolist() == [0.5] * len(GENES)


# ------------------------------------------------------------------------------------------------
# tables
# ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("table_bytes", [csv_format.TABLE_BYTES, 4 * len(GENES) * 7])
def test_csv_has_every_digit(section, monkeypatch, table_bytes):
    monkeypatch.setattr(csv_format, "TABLE_BYTES", table_bytes)  # the second: seven rows at a time
    with gzip.open(exported(section, "csv"), "rt", encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["row", "column", "x_fullres", "y_fullres", *GENES]
    numbers = np.array(rows, float)
    np.testing.assert_array_equal(numbers[:, :2], section.places)
    np.testing.assert_allclose(numbers[:, 2:4], section.centres(), rtol=1e-12)
    np.testing.assert_array_equal(numbers[:, 4:].astype(np.float32), section.values)


def test_back_to_spots(section):
    """Sums over discs by the distances of a fine grid, and spots that are mostly off the tissue."""
    table = pd.read_csv(exported(section, "spots"), index_col=0)
    assert list(table) == GENES
    fine = 32  # per superpixel and side
    y, x = (np.mgrid[: GRID[0] * fine, : GRID[1] * fine] + 0.5) / fine * 16
    covered = np.kron(section.tissue, np.ones((fine, fine)))
    area = np.pi * (RADIUS_PX / 16) ** 2
    shares = {}
    for spot, (px, py) in section.locs.iterrows():
        disc = (x - px) ** 2 + (y - py) ** 2 <= RADIUS_PX**2
        shares[spot] = (disc * covered).sum() / fine**2 / area
        if spot not in table.index:
            continue
        weights = disc.reshape(GRID[0], fine, GRID[1], fine).mean((1, 3))
        expected = np.nansum(weights * section.maps, axis=(1, 2))
        np.testing.assert_allclose(table.loc[spot], expected, rtol=0.02, atol=0.05)
    left_out = [spot for spot in section.locs.index if spot not in table.index]
    assert left_out
    assert all(shares[spot] < 0.26 for spot in left_out)
    assert all(shares[spot] > 0.24 for spot in table.index)


def test_no_spot_on_the_tissue(section, capsys):
    locs = pd.DataFrame({"x": [5.0], "y": [5.0]}, ["s0"])
    locs.to_csv(section.directory / "locs.csv")
    section.calibrate(RAW_SIZE, SCALED_SIZE)
    assert "has no spot on the tissue of the maps" in refused(section, capsys, "spots")


# ------------------------------------------------------------------------------------------------
# geometry and kinds of maps
# ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("pixel_size", [0.5, 0.43, 0.731])
def test_spots_come_back_to_their_places_in_the_raw_image(tmp_path, pixel_size):
    """Through image_calibration.py, which rounds the sides and pads: as in locs-raw.csv."""
    directory = write_sample(tmp_path / "raw", (441, 663))
    (directory / "pixel-size-raw.txt").write_text(f"{pixel_size}\n")
    (directory / "radius-raw.txt").write_text("40\n")
    assert image_calibration.run(["--directory", str(directory)]) == 0
    record = json.loads((directory / "image_calibration.json").read_text())
    section = Section(tmp_path / "made", tuple(side // 16 for side in record["size"]), {"A": "A"})
    shutil.copytree(directory, section.directory, dirs_exist_ok=True)
    locs = pd.read_csv(directory / "locs-raw.csv", index_col=0)
    pd.DataFrame({"A": 1}, locs.index).to_csv(section.directory / "cnts.csv")
    write_record(section.directory, utils.HISTEX, ["he.jpg"], list(OUTPUTS_OF_HISTEX))
    path = exported(section, "spatialdata") / "shapes/spots/shapes.parquet"
    circles = pyarrow.parquet.read_table(path).to_pandas()
    points = np.array([struct.unpack("<BIdd", point)[2:] for point in circles["geometry"]])
    np.testing.assert_allclose(points, locs[["x", "y"]], atol=2e-4)
    np.testing.assert_allclose(circles["radius"], 40, rtol=2e-3)


@pytest.mark.parametrize(
    ("suffix", "dtype"), [(".npy", "<f4"), (".npy", "<f2"), (".pickle", "<f2"), (".pickle", "<f8")]
)
@pytest.mark.parametrize("kind", FORMATS)
def test_other_kinds_of_maps(tmp_path, kind, suffix, dtype):
    section = Section(
        tmp_path / "section", (14, 28), {"A": "A", "B": "B"}, suffix=suffix, dtype=dtype
    )
    path, maps = exported(section, kind), section.maps.astype(np.float32)
    if kind == "h5ad":
        with h5py.File(path) as file:
            np.testing.assert_array_equal(file["X"][:], section.values)
    elif kind == "spatialdata":
        np.testing.assert_array_equal(zarr.open_array(path / "images/expression/s0")[:], maps)
    elif kind == "ometiff":
        np.testing.assert_array_equal(tifffile.imread(path), np.nan_to_num(maps))
    elif kind == "istar":
        found = pickle.loads((path / "cnts-super/B.pickle").read_bytes())
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, maps[1])
    elif kind == "csv":
        found = pd.read_csv(path, dtype={"A": np.float32, "B": np.float32})
        np.testing.assert_array_equal(found[["A", "B"]], section.values)
    else:
        plain = Section(tmp_path / "plain", (14, 28), {"A": "A", "B": "B"})
        expected = pd.read_csv(exported(plain, kind), index_col=0)
        tolerance = 1e-2 if dtype == "<f2" else 1e-6
        found = pd.read_csv(path, index_col=0)
        pd.testing.assert_frame_equal(found, expected, rtol=tolerance)


# ------------------------------------------------------------------------------------------------
# genes
# ------------------------------------------------------------------------------------------------
def genes_of(section: Section, *options: str) -> list[str]:
    path = exported(section, "csv", *options)
    table = pd.read_csv(path, keep_default_na=False)
    for gene in table.columns[4:]:
        expected = section.values[:, GENES.index(gene)]
        np.testing.assert_array_equal(table[gene].astype(np.float32), expected)
    return list(table.columns[4:])


def test_genes_of_a_list_in_its_order(section):
    assert genes_of(section, "--genes", "krt8, CON,KRT8,CON") == ["krt8", "CON", "KRT8"]


def test_genes_of_a_file(section, tmp_path):
    listed = tmp_path / "genes.txt"
    listed.write_text("\ufeffNA\r\n\r\n  a,b \r\n", encoding="utf-8")
    assert genes_of(section, "--genes", str(listed)) == ["NA", "a,b"]


def test_the_genes_with_the_highest_held_out_r(section):
    best = section.held_out.sort_values(ascending=False).index[:3].tolist()
    assert genes_of(section, "--n-genes", "3") == best


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_takes_some_genes(section, kind):
    genes, two = ["krt8", "HLA-A/B"], section.maps[[3, 1]]
    path = exported(section, kind, "--genes", ",".join(genes))
    if kind == "h5ad":
        with h5py.File(path) as file:
            assert text(file["var/_index"]) == genes
            np.testing.assert_array_equal(file["X"][:], section.values[:, [3, 1]])
    elif kind == "spatialdata":
        store = zarr.open_group(path, mode="r")
        np.testing.assert_array_equal(store["images/expression/s0"][:], two)
        np.testing.assert_array_equal(store["tables/counts/X"][:], section.counts[genes])
    elif kind == "ometiff":
        np.testing.assert_array_equal(tifffile.imread(path), np.nan_to_num(two))
    elif kind == "istar":
        names = {file.stem for file in (path / "cnts-super").iterdir()}
        assert names == {"krt8~2", "HLA-A%2FB"}
    else:
        assert list(pd.read_csv(path))[-2:] == genes


def test_n_genes_needs_held_out_r(section, capsys):
    (section.directory / "held-out-r.csv").unlink()
    error = refused(section, capsys, "csv", "--n-genes", "2")
    assert "held-out-r.csv is missing" in error
    assert "python HISTEX.py" in error
    with h5py.File(exported(section, "h5ad")) as file:  # which does without
        assert "held_out_r" not in file["var"]


def test_genes_and_n_genes_exclude_each_other(section, capsys):
    with pytest.raises(SystemExit, match="2"):
        run(section, "csv", "--genes", "NA", "--n-genes", "1")
    assert "not allowed with" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("genes", "message"),
    [
        ("KRT8,NOGENE", "names NOGENE: no such gene in cnts-super"),
        (",,", "--genes ,, names no gene"),
    ],
)
def test_genes_that_cannot_be(section, capsys, genes, message):
    assert message in refused(section, capsys, "h5ad", "--genes", genes)


# ------------------------------------------------------------------------------------------------
# what may be replaced
# ------------------------------------------------------------------------------------------------
def touch_up(path: Path) -> None:
    """A hand's change to an export."""
    if path.is_dir():
        (path / "note.txt").write_text("mine")
    else:
        path.write_bytes(path.read_bytes() + b"mine")


@pytest.mark.parametrize("kind", FORMATS)
def test_own_exports_are_replaced_and_changed_ones_are_not(section, capsys, kind):
    path = exported(section, kind, "--genes", "KRT8")
    first = disk.fingerprint(path)["sha256"]
    exported(section, kind, "--genes", "NA")
    assert disk.fingerprint(path)["sha256"] != first
    assert exported(section, kind, "--genes", "KRT8") == path
    assert disk.fingerprint(path)["sha256"] == first  # to the byte
    touch_up(path)
    changed = disk.fingerprint(path)["sha256"]
    edit = path / "note.txt" if path.is_dir() else path
    name = edit.relative_to(section.directory).as_posix()
    capsys.readouterr()
    exported(section, kind, "--genes", "KRT8")
    assert f"kept your {name} (--force makes a new one)" in capsys.readouterr().out
    assert disk.fingerprint(path)["sha256"] == changed
    if path.is_dir():  # what was added to a folder goes along
        exported(section, kind, "--genes", "NA")
        assert f"kept your {name}; other options were given" in capsys.readouterr().out
        assert edit.read_text() == "mine"
        assert disk.fingerprint(path)["sha256"] != changed
    else:
        error = refused(section, capsys, kind, "--genes", "NA")
        assert f"{edit} was edited by hand, and other options were given" in error
        assert f"--format {kind} --genes NA --force" in error
        assert disk.fingerprint(path)["sha256"] == changed
    exported(section, kind, "--genes", "KRT8", "--force")
    assert disk.fingerprint(path)["sha256"] == first


def test_a_file_of_yours_is_not_replaced(section, tmp_path, capsys):
    mine = tmp_path / "elsewhere" / "mine.csv.gz"
    mine.parent.mkdir()
    mine.write_text("mine")
    error = refused(section, capsys, "csv", "--output", str(mine))
    assert f"{mine} was not written by analysis/export.py, which would overwrite it" in error
    assert mine.read_text() == "mine"
    assert run(section, "csv", "--output", str(mine), "--force") == 0
    assert len(pd.read_csv(mine)) == len(section.places)
    assert run(section, "csv", "--output", str(mine), "--genes", "KRT8") == 0  # now it is an export


@pytest.mark.parametrize("kind", ["spatialdata", "istar"])
def test_a_folder_of_yours_is_not_replaced_even_by_force(section, tmp_path, capsys, kind):
    mine = tmp_path / Path(OUTPUTS[kind]).name
    mine.mkdir()
    (mine / "thesis.txt").write_text("mine")
    error = refused(section, capsys, kind, "--output", str(mine), "--force")
    assert "is a folder of other things" in error
    assert (mine / "thesis.txt").read_text() == "mine"


def test_an_empty_folder_of_yours_is_filled_when_asked_for(section, tmp_path):
    (tmp_path / "mine").mkdir()
    assert run(section, "istar", "--output", str(tmp_path / "mine"), "--force") == 0
    assert (tmp_path / "mine" / "gene-names.txt").is_file()


def test_the_sample_itself_is_not_replaced_by_an_istar_folder(section, capsys):
    (section.directory / "mask-small.png").write_bytes(b"")
    error = refused(section, capsys, "istar", "--output", str(section.directory), "--force")
    assert "is a folder of other things" in error


def test_a_folder_in_the_place_of_a_file(section, capsys):
    (section.directory / "histex.h5ad").mkdir()
    error = refused(section, capsys, "h5ad", "--force")
    assert "is a folder of other things" in error


def test_names_of_other_files_of_a_sample_are_refused(section, capsys):
    names = (("spots", "locs.csv"), ("csv", "cells.csv.gz"), ("istar", "states"))
    for kind, name in (*names, ("csv", "cnts.csv.gz"), ("spots", "segments.csv")):
        output = str(section.directory / name)
        error = refused(section, capsys, kind, "--output", output, "--force")
        assert "is the name of another file of a sample" in error


def test_a_run_that_was_cut_off_before_the_last_step_is_no_hand_edit(section, monkeypatch):
    """The record is written, the export has not yet taken its name: the old one is still known."""
    path = exported(section, "csv", "--genes", "KRT8")
    old = path.read_bytes()

    def cut_off(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(disk, "put", lambda partial, target: (
            cut_off() if target.name == path.name else partial.replace(target)
        ))  # fmt: skip
        assert run(section, "csv", "--genes", "NA") == 130
    assert path.read_bytes() == old
    assert run(section, "csv", "--genes", "NA") == 0
    assert "NA" in gzip.decompress(path.read_bytes()).decode().split("\n")[0]


@pytest.mark.parametrize("kind", [kind for kind in FORMATS if "." in OUTPUTS[kind]])
def test_an_output_keeps_the_ending_of_its_format(section, tmp_path, capsys, kind):
    error = refused(section, capsys, kind, "--output", str(tmp_path / "x.txt"))
    ending = OUTPUTS[kind].split(".", 1)[1]
    assert f"does not end in .{ending}" in error
    assert f"Name it x.txt.{ending}" in error


def test_the_record_tells_what_was_exported(section, tmp_path):
    elsewhere = tmp_path / "x.csv.gz"
    exported(section, "h5ad", "--n-genes", "2")
    assert run(section, "csv", "--output", str(elsewhere)) == 0
    record = json.loads((section.directory / "export.json").read_text())
    assert record["options"] == ["--format", "h5ad", "--n-genes", "2"]
    assert (record["genes"], record["superpixels"]) == (2, len(section.places))
    known = {"histex.h5ad": disk.fingerprint(section.directory / "histex.h5ad")}
    assert record["outputs"] == known
    assert {"cnts-super", "he.jpg", "held-out-r.csv"} <= set(record["inputs"])
    assert {"versions", "code", "seconds"} <= set(record)
    exported(section, "csv")
    outputs = json.loads((section.directory / "export.json").read_text())["outputs"]
    assert outputs == known | {
        "histex.csv.gz": disk.fingerprint(section.directory / "histex.csv.gz")
    }
    beside = json.loads((tmp_path / "export.json").read_text())
    assert beside["outputs"] == {"x.csv.gz": disk.fingerprint(elsewhere)}


def test_only_leftovers_of_ours_are_removed_from_a_folder_of_yours(section, tmp_path):
    """And what lies deeper in it is not looked at."""
    deep = tmp_path / "photos" / "2020"
    deep.mkdir(parents=True)
    ours = tmp_path / "photos" / ".histex.csv.0123abcd.partial.gz"
    yours = [tmp_path / "photos" / ".film.partial.mkv", deep / ".x.0123abcd.partial.csv"]
    for path in (ours, *yours):
        path.write_text("x")
        os.utime(path, (0, 0))
    assert run(section, "csv", "--output", str(tmp_path / "photos" / "x.csv.gz")) == 0
    assert not ours.exists()
    assert all(path.exists() for path in yours)


def test_a_sample_that_was_moved_still_knows_its_exports(section, tmp_path):
    exported(section, "csv")
    section.directory = section.directory.rename(tmp_path / "moved")
    exported(section, "csv")


OLD_RECORD = """{"script": "analysis/export.py", "outputs": {"histex.csv.gz": {"output": {}}}}"""


@pytest.mark.parametrize("content", ["{", "{}", '{"outputs": {"x": {}}}', OLD_RECORD])
def test_a_record_that_is_damaged_or_of_an_earlier_version(section, capsys, content):
    (section.directory / "histex.csv.gz").write_text("old")
    (section.directory / "export.json").write_text(content)
    error = refused(section, capsys, "csv")
    assert "export.json is not a" in error
    assert "Move it away and run: python analysis/export.py --directory" in error
    assert (section.directory / "histex.csv.gz").read_text() == "old"


# ------------------------------------------------------------------------------------------------
# bad inputs
# ------------------------------------------------------------------------------------------------
BAD = {
    "another grid": ("cnts-super/KRT8.pickle", np.ones((3, 4), np.float32), "grid of he.jpg"),
    "no value": ("cnts-super/KRT8.pickle", np.full(GRID, np.nan), "with 0 values"),
    "another tissue": ("cnts-super/NA.pickle", np.ones(GRID), "has no values where other maps"),
    "another size": ("cnts-super/NA.pickle", np.ones((2, 2)), "has no values where other maps"),
    "no array": ("cnts-super/NA.pickle", {"a": 1}, "is not a map of rows and columns"),
    "no pickle": ("cnts-super/NA.pickle", "text", "is not a pickled numpy array"),
    "no latent maps": ("embeddings-gene.pickle", {"sub": np.ones(3)}, "does not hold dict(cls="),
    "another latent grid": ("embeddings-gene.pickle", {"cls": np.ones((2, 3, 4))}, "holds maps of"),
    "no held-out r": (
        "held-out-r.csv",
        "gene,r\nKRT8,1\n",
        "is no table of gene and held_out_r",
    ),
}


@pytest.mark.parametrize(("name", "content", "message"), BAD.values(), ids=list(BAD))
def test_bad_results(section, capsys, name, content, message):
    change(section, name, content)
    assert message in refused(section, capsys, "h5ad")


def test_a_gene_without_counts(section, capsys):
    section.counts.drop(columns=["krt8", "NA"]).to_csv(section.directory / "cnts.csv")
    for kind in ("istar", "spatialdata"):
        error = refused(section, capsys, kind)
        assert f"lacks 2 of the {len(GENES)} genes of the maps: krt8, NA" in error


@pytest.mark.parametrize("size", [None, [5], [0, 5], "5 x 5"])
def test_a_calibration_record_without_sizes(section, capsys, size):
    section.calibrate(size, list(SCALED_SIZE))
    error = refused(section, capsys, "csv")
    assert "does not tell the sizes of the images, raw_size and scaled_size" in error
    assert "python image_calibration.py" in error


@pytest.mark.parametrize(
    ("name", "kinds"),
    {
        "cnts-super": FORMATS,
        "he.jpg": ["h5ad", "spatialdata", "istar"],
        "embeddings-gene.pickle": ["istar"],
        "locs.csv": ["spatialdata", "istar", "spots"],
        "radius.txt": ["spatialdata", "istar", "spots"],
        "cnts.csv": ["spatialdata", "istar"],
    }.items(),
)
def test_missing_files(section, capsys, name, kinds):
    path = section.directory / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    for kind in FORMATS:
        if kind in kinds:
            assert f"{name} is missing" in refused(section, capsys, kind)
        else:  # of he.jpg, the maps are out of date where it is taken for changed
            assert run(section, kind, *["--allow-stale"] * (name == "he.jpg")) == 0


def test_without_a_mask_the_maps_tell_the_tissue(section):
    (section.directory / "mask.png").unlink()
    with h5py.File(exported(section, "h5ad")) as file:
        assert file["obs/in_tissue"][:].all()


def test_maps_that_are_out_of_date(section, capsys):
    Image.new("RGB", (GRID[1] * 16, GRID[0] * 16)).save(section.directory / "he.jpg")
    section.calibrate(RAW_SIZE, SCALED_SIZE)
    assert "is out of date" in refused(section, capsys, "csv")
    assert run(section, "csv", "--allow-stale") == 0


def test_a_missing_package_is_told_before_any_work(section, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    monkeypatch.delitem(sys.modules, "analysis.formats.h5ad")
    error = refused(section, capsys, "h5ad")
    assert "needs a package that is not installed" in error
    assert "pip install -r analysis/requirements.txt" in error


def test_a_disk_that_is_too_small(section, capsys, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 10))
    assert "are needed in" in refused(section, capsys, "h5ad")


@pytest.mark.parametrize("kind", FORMATS)
def test_the_space_that_is_asked_for_is_enough(made, tmp_path, kind):
    section = made.copy(tmp_path / "section")
    needed = []
    writer = export.load_writer(kind)
    true = writer.bytes_needed
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer, "bytes_needed", lambda *a: needed.append(true(*a)) or needed[0])
        size = disk.fingerprint(exported(section, kind))["bytes"]
    assert size < needed[0] + 200_000  # tags, tables and headers, which do not grow with the genes


# ------------------------------------------------------------------------------------------------
# memory
# ------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """160 genes of 84 x 112: 28 kB each as a map in float32, 6 MB in all."""
    files = {f"G{i}": f"G{i}" for i in range(160)}
    return Section(tmp_path_factory.mktemp("many") / "many", (84, 112), files, pitch=200.0)


@pytest.mark.parametrize("kind", FORMATS)
def test_memory_does_not_grow_with_the_genes(many, tmp_path, monkeypatch, kind):
    monkeypatch.setattr(csv_format, "TABLE_BYTES", 2**16)
    monkeypatch.setattr(h5ad, "picture_of", lambda _: {})  # the image needs the same for any genes
    monkeypatch.setattr(spatialdata, "write_he", lambda *_: None)
    ending = "".join(Path(OUTPUTS[kind]).suffixes)
    for n in (4, 160):  # the first to import and warm up
        output = str(tmp_path / f"{n}{ending}")
        gc.collect()
        tracemalloc.start()
        assert run(many, kind, "--n-genes", str(n), "--output", output) == 0
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < many.maps.nbytes / 2  # a block of 32 genes is a fifth


# ------------------------------------------------------------------------------------------------
# properties
# ------------------------------------------------------------------------------------------------
@settings(deadline=None)
@given(st.integers(1, 70000), st.integers(1, 3000))
def test_halvings_reach_the_limit_and_no_further(side, longest):
    n = h5ad.halvings(side, longest)
    assert -(-side // 2**n) <= longest
    assert n == 0 or -(-side // 2 ** (n - 1)) > longest


@given(st.integers(1, 40), st.integers(1, 40))
def test_tiles_cover_a_map_once(rows, columns):
    image = np.arange(rows * columns).reshape(rows, columns)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ometiff, "TILE_PX", 16)
        pieces = list(ometiff.tiles(image))
    across = -(-columns // 16)
    bands = [np.hstack(pieces[i : i + across]) for i in range(0, len(pieces), across)]
    np.testing.assert_array_equal(np.vstack(bands), image)


def test_help_tells_of_every_format(capsys):
    with pytest.raises(SystemExit, match="0"):
        export.run(["--help"])
    said = capsys.readouterr().out
    for kind in FORMATS:
        assert f"\n    {kind} " in said
    assert (ROOT / export.SCRIPT).is_file()
