"""The exports of analysis/export.py, opened by the tools that they are for.

These need some hundred packages, and an older pandas than the five scripts take:

    python3.11 -m venv tools && tools/bin/pip install -r tests/tools-requirements.txt
    MPLBACKEND=Agg tools/bin/python -m pytest tests/test_export_tools.py
"""

import json
import pickle
import warnings

import numpy as np
import pandas as pd
import pytest
import tifffile
import zarr
from PIL import Image
from scipy.sparse import csr_matrix
from test_export import GENES, GRID, RADIUS_PX, RAW_SIZE, SCALED_SIZE, Section, exported

WHY = "opens the exports by the packages of tests/tools-requirements.txt"
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what these packages say of each other when imported
    anndata = pytest.importorskip("anndata", reason=WHY)
    scanpy = pytest.importorskip("scanpy", reason=WHY)
    squidpy = pytest.importorskip("squidpy", reason=WHY)
    pytest.importorskip("spatialdata", reason=WHY)
    ome_types = pytest.importorskip("ome_types", reason=WHY)
    models = pytest.importorskip("spatialdata.models", reason=WHY)
    transformations = pytest.importorskip("spatialdata.transformations", reason=WHY)
    pytest.importorskip("xmlschema", reason=WHY)
    plt = pytest.importorskip("matplotlib.pyplot", reason=WHY)
    from spatialdata import bounding_box_query, join_spatialelement_table, read_zarr

# squidpy 1.8 uses what matplotlib is going to drop
pytestmark = pytest.mark.filterwarnings(
    "ignore:The set_bad function will be deprecated:PendingDeprecationWarning"
)

SCALE = np.divide(RAW_SIZE, SCALED_SIZE)  # px of he-raw per px of he.jpg, down and across
GENE = "HLA-A/B"


@pytest.fixture(scope="module")
def section(tmp_path_factory):
    """With segments, so that categories are among the exports. Do not change it."""
    made = Section(tmp_path_factory.mktemp("tools") / "section A")
    made.segments = np.where(made.tissue, 1 + np.arange(GRID[1]) % 3, 0).astype(np.uint8)
    np.save(made.directory / "segments.npy", made.segments)
    return made


@pytest.fixture(scope="module")
def h5ad(section):
    return exported(section, "h5ad")


@pytest.fixture
def adata(h5ad):
    return anndata.read_h5ad(h5ad)


@pytest.fixture(scope="module")
def store(section):
    return exported(section, "spatialdata")


@pytest.fixture
def sdata(store):
    return read_zarr(store)


@pytest.fixture(scope="module")
def tiff(section):
    return exported(section, "ometiff")


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


# ------------------------------------------------------------------------------------------------
# anndata, scanpy, squidpy
# ------------------------------------------------------------------------------------------------
def test_anndata_has_values_places_and_provenance(section, adata):
    np.testing.assert_array_equal(adata.X, section.values)
    assert list(adata.var_names) == GENES
    row, column = section.places.T
    np.testing.assert_array_equal(adata.obs[["array_row", "array_col"]], section.places)
    np.testing.assert_allclose(adata.obsm["spatial"], section.centres())
    np.testing.assert_array_equal(adata.obsm["X_histex"], section.embedding[:, row, column].T)
    np.testing.assert_array_equal(adata.var["held_out_r"], section.held_out)
    regions = adata.obs["region"]
    assert list(regions.cat.categories) == ["1", "2", "3"]
    np.testing.assert_array_equal(regions.astype(int), section.segments[row, column])
    record = (section.directory / "HISTEX.json").read_text()
    assert json.loads(adata.uns["histex"]["HISTEX"]) == json.loads(record)


def test_anndata_reads_parts_of_a_backed_file(section, h5ad):
    adata = anndata.read_h5ad(h5ad, backed="r")
    assert adata.isbacked
    np.testing.assert_array_equal(adata[:, GENE].X.ravel(), section.values[:, GENES.index(GENE)])
    some = adata[adata.obs["array_row"] == 9, ["NA", "KRT8"]].to_memory()
    expected = section.values[section.places[:, 0] == 9][:, [GENES.index("NA"), 0]]
    np.testing.assert_array_equal(some.X, expected)
    adata.file.close()


def test_anndata_writes_it_again_as_it_is(adata, tmp_path):
    adata.write_h5ad(tmp_path / "again.h5ad")
    again = anndata.read_h5ad(tmp_path / "again.h5ad")
    np.testing.assert_array_equal(again.X, adata.X)
    pd.testing.assert_frame_equal(again.obs, adata.obs)
    pd.testing.assert_frame_equal(again.var, adata.var)
    for name, picture in adata.uns["spatial"]["section A"]["images"].items():
        np.testing.assert_array_equal(again.uns["spatial"]["section A"]["images"][name], picture)


def test_scanpy_computes_on_it(section, adata):
    del adata.obs["total_counts"]
    scanpy.pp.calculate_qc_metrics(adata, percent_top=None, inplace=True)
    np.testing.assert_allclose(adata.obs["total_counts"], section.values.sum(1), rtol=1e-5)


def test_squidpy_finds_the_neighbours_on_the_grid(section, adata):
    squidpy.gr.spatial_neighbors_grid(adata, n_neighs=4)
    place = {tuple(p): i for i, p in enumerate(section.places.tolist())}
    pairs = [
        (i, place[r + down, c + right])
        for (r, c), i in place.items()
        for down, right in ((0, 1), (0, -1), (1, 0), (-1, 0))
        if (r + down, c + right) in place
    ]
    ones, where = np.ones(len(pairs)), np.array(pairs).T
    expected = csr_matrix((ones, where), (len(place), len(place)))
    assert (adata.obsp["spatial_connectivities"] != expected).nnz == 0


def test_squidpy_finds_genes_with_a_pattern(section, adata):
    """Moran's I of a gene that is a gradient, against its formula."""
    adata.X[:, 0] = section.places[:, 1]
    squidpy.gr.spatial_neighbors_grid(adata, n_neighs=4)
    squidpy.gr.spatial_autocorr(adata, mode="moran", genes=["KRT8", "NA"], n_perms=None)
    weights = adata.obsp["spatial_connectivities"]
    for gene, found in adata.uns["moranI"]["I"].items():
        x = adata[:, gene].X.ravel().astype(float)
        x = x - x.mean()
        expected = len(x) / weights.sum() * (x @ (weights @ x)) / (x @ x)
        assert found == pytest.approx(expected, rel=0.15)  # squidpy weighs rows by their sums
    assert adata.uns["moranI"].loc["KRT8", "I"] > 0.8


@pytest.mark.parametrize(("res", "times"), [("hires", 1), ("lowres", 2)])
def test_squidpy_draws_values_at_their_places_over_the_image(section, adata, res, times):
    ax = squidpy.pl.spatial_scatter(adata, color=GENE, img_res_key=res, return_ax=True)
    (picture,) = ax.images
    small = [-(-side // times) for side in SCALED_SIZE]
    assert picture.get_array().shape[:2] == tuple(small)
    (dots,) = (c for c in ax.collections if c.get_array() is not None and len(c.get_array()) > 2)
    np.testing.assert_allclose(dots.get_array(), section.values[:, GENES.index(GENE)])
    middles = np.array([path.get_extents().get_points().mean(0) for path in dots.get_paths()])
    width = np.ptp([path.get_extents().get_points()[:, 0] for path in dots.get_paths()], axis=1)
    expected = (section.places[:, ::-1] + 0.5) * 16 / times
    np.testing.assert_allclose(middles, expected, rtol=0.011)  # one scale for both axes
    np.testing.assert_allclose(width, 16 / times, rtol=1e-3)
    ax.figure.canvas.draw()


def test_squidpy_draws_categories(section, adata):
    squidpy.pl.spatial_scatter(adata, color="region", shape="square", size=1.0)
    assert len(adata.uns["region_colors"]) == 3


# ------------------------------------------------------------------------------------------------
# spatialdata
# ------------------------------------------------------------------------------------------------
def into_global(element) -> np.ndarray:
    """Affine matrix of x, y, 1 into pixels of he-raw."""
    transformation = transformations.get_transformation(element, "global")
    return transformation.to_affine_matrix(("x", "y"), ("x", "y"))


def centres_of(image) -> np.ndarray:
    """x and y of all pixels (rows, columns, 2) in pixels of he-raw."""
    y, x = np.mgrid[: image.sizes["y"], : image.sizes["x"]] + 0.5
    return np.stack([x, y, np.ones_like(x)], -1) @ into_global(image)[:2].T


def test_spatialdata_finds_every_element_valid(sdata):
    assert set(sdata.images) == {"expression", "he"}
    assert set(sdata.labels) == {"tissue", "regions"}
    assert (set(sdata.shapes), set(sdata.tables)) == ({"spots"}, {"counts"})
    assert sdata.coordinate_systems == ["global"]
    models.Image2DModel().validate(sdata["expression"])
    models.Image2DModel().validate(sdata["he"])
    models.Labels2DModel().validate(sdata["tissue"])
    models.ShapesModel().validate(sdata["spots"])
    models.TableModel().validate(sdata["counts"])
    assert "HISTEX" in sdata.attrs["histex"]


def test_pixels_of_spatialdata_lie_where_rows_of_anndata_do(section, sdata, adata):
    expression = sdata["expression"]
    np.testing.assert_array_equal(expression.to_numpy(), section.maps)
    assert expression.coords["c"].to_numpy().tolist() == GENES
    centres = centres_of(expression)[section.tissue]
    np.testing.assert_allclose(centres, adata.obsm["spatial"], rtol=1e-12)
    np.testing.assert_array_equal(sdata["tissue"].to_numpy(), section.mask)
    np.testing.assert_array_equal(sdata["regions"].to_numpy(), section.segments)
    for labels in ("tissue", "regions"):
        np.testing.assert_allclose(centres_of(sdata[labels]), centres_of(expression))


def test_every_level_of_the_image_lies_in_its_place(tmp_path):
    large = Section(tmp_path / "large", (84, 98), {"A": "A"})
    sdata = read_zarr(exported(large, "spatialdata"))
    he = np.asarray(Image.open(large.directory / "he.jpg"))
    levels = [sdata["he"][f"scale{i}"]["image"] for i in range(2)]
    np.testing.assert_array_equal(levels[0].to_numpy(), np.moveaxis(he, 2, 0))
    for level, image in enumerate(levels):
        rows, columns = image.shape[1:]
        assert (rows, columns) == (84 * 16 >> level, 98 * 16 >> level)
        place = (np.mgrid[:rows, :columns] + 0.5) * 2**level * SCALE[:, None, None]
        np.testing.assert_allclose(centres_of(image), np.moveaxis(place[::-1], 0, 2))


def test_circles_are_the_spots_and_the_table_is_theirs(section, sdata):
    spots, table = sdata["spots"], sdata["counts"]
    xy = np.column_stack([spots.geometry.x, spots.geometry.y])
    np.testing.assert_allclose(xy, section.locs.to_numpy() * SCALE[::-1])
    np.testing.assert_allclose(spots["radius"], RADIUS_PX * np.sqrt(SCALE.prod()))
    assert models.get_table_keys(table) == ("spots", "region", "spot_id")
    np.testing.assert_array_equal(table.X, section.counts[GENES])
    elements, joined = join_spatialelement_table(
        sdata=sdata, spatial_element_names="spots", table_name="counts", how="inner"
    )
    assert list(elements["spots"].index) == list(joined.obs["spot_id"]) == list(section.locs.index)
    np.testing.assert_allclose(table.obsm["spatial"], xy)


def test_a_box_cuts_the_superpixels_within(section, sdata):
    low, high = np.array([5, 3]), np.array([20, 17])  # column and row
    corners = {"min_coordinate": low * 16 * SCALE[::-1], "max_coordinate": high * 16 * SCALE[::-1]}
    cut = bounding_box_query(
        sdata["expression"], axes=("x", "y"), target_coordinate_system="global", **corners
    )
    np.testing.assert_array_equal(cut.to_numpy(), section.maps[:, 3:17, 5:20])


@pytest.mark.filterwarnings("ignore:zarr v3 autosharding will be the default:UserWarning")
def test_spatialdata_writes_it_again_as_it_is(section, sdata, tmp_path):
    sdata.write(tmp_path / "again.zarr")
    again = read_zarr(tmp_path / "again.zarr")
    np.testing.assert_array_equal(again["expression"].to_numpy(), section.maps)
    np.testing.assert_array_equal(
        into_global(again["expression"]), into_global(sdata["expression"])
    )
    pd.testing.assert_frame_equal(pd.DataFrame(again["spots"]), pd.DataFrame(sdata["spots"]))
    np.testing.assert_array_equal(again["counts"].X, sdata["counts"].X)


# ------------------------------------------------------------------------------------------------
# OME-TIFF
# ------------------------------------------------------------------------------------------------
def test_ome_xml_is_valid_by_the_schema(tiff):
    ome = ome_types.from_tiff(tiff, validate=True)
    (image,) = ome.images
    assert (image.pixels.physical_size_x, image.pixels.physical_size_y) == (8.0, 8.0)
    assert image.pixels.physical_size_x_unit.value == "µm"
    assert [channel.name for channel in image.pixels.channels] == GENES
    sizes = (image.pixels.size_c, image.pixels.size_y, image.pixels.size_x)
    assert sizes == (len(GENES), *GRID)


def test_the_schema_refuses_what_is_not_valid(tiff):
    text = tifffile.tiffcomment(tiff)
    broken = text.replace('Type="float"', 'Type="real"')
    assert broken != text
    with pytest.raises(ValueError, match="attribute Type='real'"):
        ome_types.from_xml(broken, validate=True)


def test_levels_open_lazily_as_napari_opens_them(tmp_path):
    large = Section(tmp_path / "large", (280, 266), {"A": "A", "B": "B"}, dims=1)
    with tifffile.imread(exported(large, "ometiff"), aszarr=True) as lazy:
        levels = zarr.open(lazy, mode="r")
        np.testing.assert_array_equal(levels["0"][:], np.nan_to_num(large.maps))
        assert levels["1"].shape == (2, 140, 133)


# ------------------------------------------------------------------------------------------------
# iStar: what its scripts do first with each file
# ------------------------------------------------------------------------------------------------
def test_istar_opens_its_folder(section):
    folder = exported(section, "istar")
    names = (folder / "gene-names.txt").read_text(encoding="utf-8").splitlines()
    mask = np.array(Image.open(folder / "mask-small.png")) > 0
    for name, expected in zip(names, section.maps, strict=True):
        with (folder / "cnts-super" / f"{name}.pickle").open("rb") as file:
            image = pickle.load(file)
        image[~mask] = np.nan
        np.testing.assert_array_equal(image, np.where(section.mask, expected, np.nan))
    with (folder / "embeddings-gene.pickle").open("rb") as file:
        latent = np.array(pickle.load(file)["cls"])
    latent[:, ~mask] = np.nan
    assert (np.isfinite(latent).all(0) == section.mask).all()
    counts = pd.read_csv(folder / "cnts.tsv", sep="\t", header=0, index_col=0)
    locs = pd.read_csv(folder / "locs.tsv", sep="\t", header=0, index_col=0)
    assert (counts.index == locs.index).all()
    np.testing.assert_array_equal(counts[names].to_numpy(), section.counts[GENES])
    he = np.array(Image.open(folder / "he.jpg"))
    assert he.shape == (GRID[0] * 16, GRID[1] * 16, 3)
    centres = (locs[["y", "x"]].to_numpy() / 16).round().astype(int)
    radius = round(int((folder / "radius.txt").read_text().split()[0]) / 16)
    assert ((centres >= radius) & (centres + radius < GRID)).all()
