"""Write tests/formats/spatialdata.zip: one small Visium section as spatialdata itself stores it.

    python -m pip install spatialdata==0.7.3
    python tests/formats/make_spatialdata.py

In the archive two stores have the same content, new.zarr (zarr 3) and old.zarr (zarr 2, as
spatialdata up to 0.4 wrote it). spatialdata needs some ninety packages, older pandas among them, so
that the tests read what it wrote instead of installing it.

What is in a store: the image "he" (see image()) in two levels, whose px p lies at 0.5 p + (3, 4)
of the system "global"; circles "spots", 100 um apart at 2 um per px of the image, not in order; the
table "table", whose counts are 10 i + j for spot i and gene j in a layer, and their logarithms in
X.

many.zarr holds the same, with a second H&E image "hires" in the system "hires", fluorescence
"dapi", and a second table "other". In mirrored.zarr px p lies at MIRROR p of the system "global",
and in "turned" the spots lie 50 further to the right. The table of two.zarr is of two sections,
"spots" and "more", whose spots lie (5, 3) of "global" further on.
"""

import tempfile
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd

HEIGHT, WIDTH = 320, 384
SCALE, SHIFT = 0.5, np.array([3.0, 4.0])
GENES = ["ACTB", "KRT8", "NA"]


def image() -> np.ndarray:
    """uint8 (3, HEIGHT, WIDTH), steps of 8 px."""
    row, col = np.mgrid[:HEIGHT, :WIDTH] // 8
    return np.stack([row * 5, col * 4, (row + col) * 2]).astype(np.uint8)


def spots() -> np.ndarray:
    """x, y (N, 2) in px of the image: hexagonal, 50 px apart."""
    rows = [
        (40 + 50 * column + 25 * (row % 2), 40 + row * 25 * np.sqrt(3))
        for row in range(6)
        for column in range(6)
    ]
    return np.array(rows)


def counts() -> np.ndarray:
    return 10.0 * np.arange(len(spots()))[:, None] + np.arange(len(GENES))


MIRROR = np.array([[-SCALE, 0, 250.0], [0, SCALE, SHIFT[1]], [0, 0, 1]])  # px to "global"


def make(folder: Path) -> None:
    import anndata
    import spatialdata
    from spatialdata._io.format import SpatialDataContainerFormatV01
    from spatialdata.models import Image2DModel, ShapesModel, TableModel
    from spatialdata.transformations import Affine, Identity, Scale, Sequence, Translation

    xy = spots() * SCALE + SHIFT
    order = np.random.default_rng(0).permutation(len(xy))
    obs = pd.DataFrame(
        {"region": pd.Categorical(["spots"] * len(xy)), "spot_id": np.arange(len(xy))},
        index=[f"AAAC{i:02d}-1" for i in range(len(xy))],
    )
    table = anndata.AnnData(np.log1p(counts()), obs=obs, var=pd.DataFrame(index=GENES))
    table.layers["counts"] = counts()
    move = Sequence([Scale([SCALE] * 2, axes=("x", "y")), Translation(SHIFT, axes=("x", "y"))])
    data = spatialdata.SpatialData(
        images={
            "he": Image2DModel.parse(
                image(), dims=("c", "y", "x"), scale_factors=[2],
                transformations={"global": move, "other": Identity()},
            )
        },
        shapes={
            "spots": ShapesModel.parse(
                xy[order], geometry=0, radius=6.9, index=order,
                transformations={"hires": Scale([0.1, 0.1], axes=("x", "y")), "global": Identity()},
            )
        },
        tables={
            "table": TableModel.parse(
                table, region="spots", region_key="region", instance_key="spot_id"
            )
        },
    )  # fmt: skip
    data.write(folder / "new.zarr")
    data.write(folder / "old.zarr", sdata_formats=SpatialDataContainerFormatV01())
    dims = ("c", "y", "x")
    more = ShapesModel.parse(
        xy + np.array([5, 3]), geometry=0, radius=6.9, index=np.arange(len(xy)),
        transformations={"global": Identity()},
    )  # fmt: skip
    second = table.copy()
    second.obs["region"] = pd.Categorical(["more"] * len(xy))
    second.obs_names = [f"{name[:-1]}2" for name in second.obs_names]
    both = anndata.concat([table, second])
    both.obs["region"] = both.obs["region"].astype("category")
    both = TableModel.parse(
        both, region=["spots", "more"], region_key="region", instance_key="spot_id"
    )
    two = spatialdata.SpatialData(
        images=dict(data.images), shapes={**data.shapes, "more": more}, tables={"table": both}
    )
    two.write(folder / "two.zarr")
    data.images["hires"] = Image2DModel.parse(
        image()[:, ::10, ::10], dims=dims, transformations={"hires": Identity()}
    )
    data.images["dapi"] = Image2DModel.parse(image()[:1].astype(np.uint16), dims=dims)
    data.tables["other"] = table.copy()
    data.write(folder / "many.zarr")
    for name in ("hires", "dapi"):
        del data.images[name]
    del data.tables["other"]
    mirror = Affine(MIRROR, input_axes=("x", "y"), output_axes=("x", "y"))
    data.images["he"] = Image2DModel.parse(
        image(), dims=dims, transformations={"global": mirror, "turned": mirror}
    )
    mirrored = (np.column_stack([spots(), np.ones(len(xy))]) @ MIRROR.T)[:, :2]
    data.shapes["spots"] = ShapesModel.parse(
        mirrored[order], geometry=0, radius=6.9, index=order,
        transformations={"turned": Translation([50, 0], axes=("x", "y")), "global": Identity()},
    )  # fmt: skip
    data.write(folder / "mirrored.zarr")


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make(folder)
        target = Path(__file__).with_name("spatialdata.zip")
        with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as packed:
            for file in sorted(f for f in folder.rglob("*") if f.is_file()):
                packed.write(file, file.relative_to(folder).as_posix())


if __name__ == "__main__":
    main()
