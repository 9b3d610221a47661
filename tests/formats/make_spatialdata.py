"""Write tests/formats/spatialdata.zip: one small Visium section as spatialdata itself stores it.

    python -m pip install spatialdata==0.7.3
    python tests/formats/make_spatialdata.py

The archive holds two stores with the same content, new.zarr (zarr 3) and old.zarr (zarr 2, as
spatialdata up to 0.4 wrote it). spatialdata needs some ninety packages, older pandas among them, so
that the tests read what it wrote instead of installing it.

What is in a store: the image "he" (see image()) in two levels, whose px p lies at 0.5 p + (3, 4)
of the system "global"; circles "spots", 100 um apart at 2 um per px of the image, not in order; the
table "table", whose counts are 10 i + j for spot i and gene j in a layer, and their logarithms in
X.
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


def make(folder: Path) -> None:
    import anndata
    import spatialdata
    from spatialdata._io.format import SpatialDataContainerFormatV01
    from spatialdata.models import Image2DModel, ShapesModel, TableModel
    from spatialdata.transformations import Identity, Scale, Sequence, Translation

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
