"""visium.py: outs folders of Space Ranger 1 to 4 with a known answer, and the traps in them."""

import functools
import gzip
import json
import shutil

import h5py
import numpy as np
import pandas as pd
import pytest
import tifffile
from conftest import REAL_DATA, run, run_as_main
from PIL import Image
from test_prepare_common import write_h5, write_mtx

from prepare import tenx, visium

REAL = REAL_DATA / "formats" / "visium_spaceranger1"
UM = 0.8  # um per px of the full-resolution image: 125 px from spot to spot
ARRAY_ROWS, ARRAY_COLS = 8, 14  # array_col counts half pitches
SIZE = (1000, 1100)  # width, height
HIRES_SCALE = 0.2
HEADER = "barcode,in_tissue,array_row,array_col,pxl_row_in_fullres,pxl_col_in_fullres\n"
IDS = [f"ENSG{i:011d}" for i in range(6)]
SYMBOLS = ["ACTB", "TBCE", "MARCH1", "TBCE", "NA", "EPCAM"]
UNIQUE = ["ACTB", "TBCE", "MARCH1", f"TBCE.{IDS[3]}", "NA", "EPCAM"]


@functools.cache
def picture(size):
    """Checks of 20 px in changing colours: quick to draw and to pack."""
    row, col = np.mgrid[: size[1], : size[0]] // 20
    return np.stack([row * 5 % 256, col * 7 % 256, (row + col) % 2 * 99], axis=2).astype(np.uint8)


def array_positions(degrees=0.0, flip=False, centre=(SIZE[0] / 2, SIZE[1] / 2)):
    """Positions of the whole array: DataFrame barcode, in_tissue, array_row, array_col, x, y."""
    row, col = np.mgrid[:ARRAY_ROWS, :ARRAY_COLS]
    keep = (row + col) % 2 == 0
    row, col = row[keep], col[keep]
    um = np.column_stack([col * 50.0, row * 100 * np.sqrt(3) / 2])
    um -= um.mean(0)
    if flip:
        um[:, 0] *= -1
    turn = np.radians(degrees)
    xy = um / UM @ np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]]) + centre
    barcodes = [f"ACGT{i:012d}-1" for i in range(len(row))]
    in_tissue = (np.arange(len(row)) % 5 != 0).astype(int)
    return pd.DataFrame(
        {"barcode": barcodes, "in_tissue": in_tissue, "array_row": row, "array_col": col,
         "x": xy[:, 0], "y": xy[:, 1]}
    )  # fmt: skip


def write_positions(folder, table, layout):
    """tissue_positions as Space Ranger names and writes it: row (y) before column (x)."""
    columns = ["barcode", "in_tissue", "array_row", "array_col", "y", "x"]
    rounded = table.assign(x=table["x"].round(), y=table["y"].round())[columns]
    text = rounded.astype({"x": int, "y": int}).to_csv(index=False, header=False)
    named = table[columns].set_axis(list(tenx.COLUMNS), axis=1)
    match layout:
        case "list":  # Space Ranger 1
            (folder / "tissue_positions_list.csv").write_text(text)
        case "list with header":  # as some repositories hold it
            (folder / "tissue_positions_list.csv").write_text(HEADER + text)
        case "header":  # Space Ranger 2 to 4
            (folder / "tissue_positions.csv").write_text(HEADER + text)
        case "no header":
            (folder / "tissue_positions.csv").write_text(text)
        case "gz":
            (folder / "tissue_positions.csv.gz").write_bytes(
                gzip.compress((HEADER + text).encode())
            )
        case "bom, crlf":
            content = (HEADER + text).replace("\n", "\r\n").encode("utf-8-sig")
            (folder / "tissue_positions.csv").write_bytes(content)
        case "columns exchanged":  # by name, not by place
            named[[*tenx.COLUMNS[:4], tenx.COLUMNS[5], tenx.COLUMNS[4]]].to_csv(
                folder / "tissue_positions.csv", index=False
            )
        case "parquet":
            named.to_parquet(folder / "tissue_positions.parquet", index=False)


def write_outs(tmp_path, layout="header", matrix="h5", cytassist=False, **array):
    """A complete small outs folder, its full-resolution image, and the known counts by barcode."""
    outs = tmp_path / "run" / "outs"
    spatial = outs / "spatial"
    spatial.mkdir(parents=True)
    table = array_positions(**array)
    write_positions(spatial, table, layout)
    barcodes = table["barcode"][table["in_tissue"] == 1].sample(frac=1, random_state=3).tolist()
    counts = np.random.default_rng(4).poisson(2, (len(barcodes), len(IDS) + 1))
    ids, symbols = [*IDS, "CD3"], [*SYMBOLS, "CD3_TotalSeq"]
    types = [*["Gene Expression"] * len(IDS), "Antibody Capture"]
    if matrix == "h5":
        write_h5(outs / "filtered_feature_bc_matrix.h5", counts, barcodes, ids, symbols, types)
    elif matrix == "named h5":
        name = "V1_Breast_Cancer_filtered_feature_bc_matrix.h5"
        write_h5(outs / name, counts, barcodes, ids, symbols, types)
    else:
        folder = outs / "filtered_feature_bc_matrix"
        write_mtx(folder, counts, barcodes, ids, symbols, types, packed=matrix == "mtx.gz")
    factors = {
        "tissue_hires_scalef": HIRES_SCALE, "tissue_lowres_scalef": HIRES_SCALE / 4,
        "spot_diameter_fullres": 65 / UM, "fiducial_diameter_fullres": 105 / UM,
    }  # fmt: skip
    (spatial / "scalefactors_json.json").write_text(json.dumps(factors))
    full = Image.fromarray(picture(SIZE))
    full.save(tmp_path / "scan.png")
    full.resize([round(n * HIRES_SCALE) for n in SIZE]).save(spatial / "tissue_hires_image.png")
    if cytassist:
        full.resize((700, 700)).save(spatial / "cytassist_image.tiff")
    known = pd.DataFrame(counts[:, : len(IDS)], barcodes, UNIQUE)
    return outs, table.set_index("barcode"), known


def prepare(tmp_path, outs, *options, image="scan.png"):
    given = [] if image is None else ["--image", str(tmp_path / image)]
    return visium.run(
        ["--outs", str(outs), *given, "--directory", str(tmp_path / "sample"), *options]
    )


def read_sample(directory):
    locs = pd.read_csv(directory / "locs-raw.csv", index_col=0)
    with gzip.open(directory / "cnts.csv.gz", "rt") as file:
        counts = pd.read_csv(file, index_col=0, keep_default_na=False)
    return locs, counts, float((directory / "pixel-size-raw.txt").read_text())


def assert_sample(directory, table, known):
    """The sample holds the in-tissue spots, each with its own place and counts."""
    locs, counts, um = read_sample(directory)
    tissue = table[table["in_tissue"] == 1]
    assert set(locs.index) == set(tissue.index)
    np.testing.assert_allclose(locs, tissue.loc[locs.index, ["x", "y"]], atol=0.501)
    pd.testing.assert_frame_equal(counts.loc[known.index], known, check_names=False)
    assert um == pytest.approx(UM, rel=2e-3)  # Space Ranger rounds positions to whole px
    radius = float((directory / "radius-raw.txt").read_text())
    assert radius * um == pytest.approx(27.5, rel=1e-5)


LAYOUTS = (
    ("list", "h5"), ("list", "mtx"), ("list with header", "mtx.gz"), ("header", "named h5"),
    ("no header", "h5"), ("gz", "mtx.gz"), ("bom, crlf", "h5"), ("columns exchanged", "h5"),
    ("parquet", "h5"),
)  # fmt: skip


@pytest.mark.parametrize(("layout", "matrix"), LAYOUTS)
def test_each_layout_gives_the_known_sample(tmp_path, layout, matrix):
    outs, table, known = write_outs(tmp_path, layout, matrix)
    assert prepare(tmp_path, outs) == 0
    assert_sample(tmp_path / "sample", table, known)
    record = json.loads((tmp_path / "sample" / "prepare.json").read_text())
    assert any("Antibody Capture" in note for note in record["notes"])
    assert record["spots_off_tissue"] == (table["in_tissue"] == 0).sum()


@pytest.mark.parametrize("degrees", [3, 90, -177])
@pytest.mark.parametrize("flip", [False, True])
def test_pixel_size_holds_at_any_rotation_and_flip(tmp_path, degrees, flip):
    outs, table, known = write_outs(tmp_path, "parquet", degrees=degrees, flip=flip)
    assert prepare(tmp_path, outs) == 0
    assert_sample(tmp_path / "sample", table, known)
    assert read_sample(tmp_path / "sample")[2] == pytest.approx(UM, rel=1e-6)  # unrounded positions


XY_EXCHANGED = {"x": "y", "y": "x"}
BOTH_WAYS = [(True, False), (True, True), (False, False), (False, True)]


@pytest.mark.parametrize(("flip", "cytassist"), BOTH_WAYS)
def test_a_mirrored_array_is_noted_where_it_is_not_the_rule(tmp_path, flip, cytassist):
    """x and y exchanged look like a mirrored image, and may fall on a square one."""
    outs, _, _ = write_outs(tmp_path, flip=flip, cytassist=cytassist)
    assert prepare(tmp_path, outs) == 0
    record = json.loads((tmp_path / "sample" / "prepare.json").read_text())
    assert record["array_mirrored"] is flip
    notes = [note for note in record["notes"] if "will be transposed" in note]
    assert len(notes) == (flip is not cytassist)
    if notes:
        assert notes[0].startswith(f"the array is {'' if flip else 'not '}mirrored in the image")


def test_x_and_y_exchanged_on_a_square_image_are_noted(tmp_path):
    """All spots fall on the image, and the pitch is right: only the array tells."""
    square = (1100, 1100)
    outs, table, _ = write_outs(tmp_path, centre=(550, 550))
    write_positions(outs / "spatial", table.reset_index().rename(columns=XY_EXCHANGED), "header")
    scan = Image.fromarray(picture(square))
    scan.save(tmp_path / "scan.png")
    scan.resize((220, 220)).save(outs / "spatial" / "tissue_hires_image.png")
    assert prepare(tmp_path, outs) == 0
    notes = json.loads((tmp_path / "sample" / "prepare.json").read_text())["notes"]
    assert sum("x and y of the positions are exchanged" in note for note in notes) == 1


def test_without_the_hires_copy_the_metadata_must_agree(tmp_path, capsys):
    """An image of twice the size: the spots fall on its left upper quarter."""
    outs, _, _ = write_outs(tmp_path)
    (outs / "spatial" / "tissue_hires_image.png").unlink()
    large = picture(SIZE).repeat(2, 0).repeat(2, 1)
    metadata = {"axes": "YXS", "PhysicalSizeX": UM / 2, "PhysicalSizeY": UM / 2}
    tifffile.imwrite(tmp_path / "scan.ome.tif", large, photometric="rgb", metadata=metadata)
    assert prepare(tmp_path, outs, image="scan.ome.tif") == 2
    message = capsys.readouterr().err
    assert "has 0.4 um per pixel, but by the spots it has 0.7999, a factor of 2" in message
    assert "--image-is fullres" in message
    assert not (tmp_path / "sample").exists()
    assert prepare(tmp_path, outs, "--image-is", "fullres", image="scan.ome.tif") == 0


def test_the_folder_of_the_run_will_do(tmp_path):
    outs, table, known = write_outs(tmp_path)
    assert prepare(tmp_path, outs.parent) == 0
    assert_sample(tmp_path / "sample", table, known)


def test_the_next_stages_take_the_sample(tmp_path):
    outs, table, known = write_outs(tmp_path, degrees=3)
    genes = tmp_path / "genes.txt"
    genes.write_text("NA\nACTB\n")
    assert prepare(tmp_path, outs, "--genes", str(genes)) == 0
    directory = tmp_path / "sample"
    assert run("image_calibration.py", directory) == 0
    assert run("get_HR.py", directory) == 0
    hr = pd.read_csv(directory / "HRlocs.csv", keep_default_na=False)
    counts = np.load(directory / "HRcnts.npy")
    measured = hr[hr["measured"] == 1]
    np.testing.assert_array_equal(
        counts[: len(measured)], known.loc[measured["parent_1"], ["NA", "ACTB"]]
    )
    expected = table.loc[measured["parent_1"], ["x", "y"]] * UM / 0.5
    np.testing.assert_allclose(measured[["x", "y"]], expected, atol=2)


def test_a_tiff_is_shrunk_towards_half_a_micrometre(tmp_path):
    """At 0.2 um per px a TIFF is written at 0.4 um per px; a cut moves the spots along."""
    outs, table, _ = write_outs(tmp_path)
    factor = 4
    positions = table.reset_index().assign(
        x=table["x"].values * factor, y=table["y"].values * factor
    )
    write_positions(outs / "spatial", positions, "header")
    Image.fromarray(np.repeat(np.repeat(picture(SIZE), factor, 0), factor, 1)).save(
        tmp_path / "scan.tif", compression="tiff_deflate"
    )
    scale = {"tissue_hires_scalef": HIRES_SCALE / factor}
    (outs / "spatial" / "scalefactors_json.json").write_text(json.dumps(scale))
    assert prepare(tmp_path, outs, "--crop-um", "60", image="scan.tif") == 0
    locs, _, um = read_sample(tmp_path / "sample")
    assert um == pytest.approx(UM / 2, rel=1e-3)
    places = table.loc[locs.index, ["x", "y"]] * 2
    shift = places.to_numpy() - locs.to_numpy()
    assert np.abs(shift - shift[0]).max() < 0.51
    with Image.open(tmp_path / "sample" / "he-raw.tif") as image:
        cut = np.asarray(image)
    left, top = np.rint(shift[0]).astype(int)
    assert cut.shape[1] * um == pytest.approx(np.ptp(places["x"]) * um + 120, abs=2 * um)
    original = np.repeat(np.repeat(picture(SIZE), 2, 0), 2, 1)
    part = original[top : top + cut.shape[0], left : left + cut.shape[1]].astype(int)
    assert np.median(np.abs(part - cut)) == 0


# ----- the wrong image -----
def error_of(tmp_path, capsys, outs, *options, image="scan.png"):
    assert prepare(tmp_path, outs, *options, image=image) == 2
    assert not (tmp_path / "sample").exists()
    return capsys.readouterr().err


def test_hires_image_is_refused_with_the_arithmetic(tmp_path, capsys):
    outs, *_ = write_outs(tmp_path)
    shutil.copy(outs / "spatial" / "tissue_hires_image.png", tmp_path / "hires.png")
    error = error_of(tmp_path, capsys, outs, image="hires.png")
    assert "hires.png is 200 x 220 px" in error
    assert "about 1000 x 1100 px" in error
    assert "(200 / 0.2 = 1000)" in error
    assert "It is the copy of tissue_hires_scalef = 0.2" in error
    assert "--image-is hires" in error


def test_hires_image_without_its_copy_is_recognised_by_the_spots(tmp_path, capsys):
    outs, *_ = write_outs(tmp_path)
    shutil.move(outs / "spatial" / "tissue_hires_image.png", tmp_path / "hires.png")
    error = error_of(tmp_path, capsys, outs, image="hires.png")
    assert "in-tissue spots" in error
    assert "tissue_hires_scalef = 0.2 they do fit" in error


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda image: image.resize((500, 550)), "scaled by 0.5"),
        (lambda image: image.transpose(Image.Transpose.ROTATE_90), "Turned by 90 degrees"),
        (lambda image: image.crop((0, 0, 1000, 900)), "It has another shape"),
        (lambda image: image.resize((50, 55)), "the copy of tissue_lowres_scalef = 0.05"),
    ],
)
def test_another_image_is_refused(tmp_path, capsys, change, words):
    outs, *_ = write_outs(tmp_path)
    change(Image.fromarray(picture(SIZE))).save(tmp_path / "other.png")
    assert words in error_of(tmp_path, capsys, outs, image="other.png")


def test_cytassist_image_is_refused_by_name(tmp_path, capsys):
    outs, *_ = write_outs(tmp_path, cytassist=True)
    shutil.copy(outs / "spatial" / "cytassist_image.tiff", tmp_path / "c.tiff")
    assert "as large as cytassist_image.tiff" in error_of(tmp_path, capsys, outs, image="c.tiff")
    assert prepare(tmp_path, outs) == 0
    assert "CytAssist" in (tmp_path / "sample" / "prepare.json").read_text()


def test_an_image_of_another_size_is_taken_when_the_user_insists(tmp_path):
    outs, table, known = write_outs(tmp_path)
    Image.fromarray(picture(SIZE)).crop((0, 0, 1000, 1060)).save(tmp_path / "cut.png")
    assert prepare(tmp_path, outs, "--image-is", "fullres", image="cut.png") == 0
    assert_sample(tmp_path / "sample", table, known)
    assert "taken all the same" in (tmp_path / "sample" / "prepare.json").read_text()


def test_without_an_image_the_message_says_which_one(tmp_path, capsys):
    outs, *_ = write_outs(tmp_path)
    error = error_of(tmp_path, capsys, outs, image=None)
    assert "full-resolution image of about 1000 x 1100 px (0.7999 um" in error
    assert "web_summary.html" in error


def test_hires_image_is_scaled_and_enlarged_when_asked_for(tmp_path, capsys):
    outs, table, known = write_outs(tmp_path, "parquet")
    hires = outs / "spatial" / "tissue_hires_image.png"
    shutil.copy(hires, tmp_path / "hires.png")
    assert prepare(tmp_path, outs, "--image-is", "hires", image="hires.png") == 0
    locs, counts, um = read_sample(tmp_path / "sample")
    assert um == pytest.approx(UM / HIRES_SCALE / 2)  # 4 um per px, enlarged twice
    np.testing.assert_allclose(locs, table.loc[locs.index, ["x", "y"]] * HIRES_SCALE * 2, atol=1e-3)
    pd.testing.assert_frame_equal(counts.loc[known.index], known, check_names=False)
    with Image.open(tmp_path / "sample" / "he-raw.tif") as image:
        assert image.size == (400, 440)
    assert "enlarged 2 times to 2 um" in capsys.readouterr().out
    assert prepare(tmp_path, outs, "--image-is", "hires", "--force") == 2  # the full resolution
    assert (
        "expects Space Ranger's tissue_hires_image.png of 200 x 220 px" in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--crop-um", "100"), "--crop-um and --downsample cannot go with --image-is hires"),
        (("--downsample", "2"), "--crop-um and --downsample cannot go with --image-is hires"),
        ((), "scalefactors_json.json has no tissue_hires_scalef, which --image-is hires needs"),
    ],
)
def test_a_hires_image_is_whole_and_of_a_known_scale(tmp_path, capsys, options, words):
    outs, *_ = write_outs(tmp_path)
    if not options:
        (outs / "spatial" / "scalefactors_json.json").write_text('{"tissue_lowres_scalef": 0.05}')
    assert words in error_of(tmp_path, capsys, outs, "--image-is", "hires", *options)


# ----- damaged or mixed-up folders -----
def exchange_array(outs):
    path = outs / "spatial" / "tissue_positions.csv"
    path.write_text(path.read_text().replace("array_row,array_col", "array_col,array_row"))


def other_barcodes(outs):
    path = outs / "spatial" / "tissue_positions.csv"
    path.write_text(path.read_text().replace("-1,", "-2,"))


def repeat_spot(outs):
    path = outs / "spatial" / "tissue_positions.csv"
    path.write_text(path.read_text() + path.read_text().splitlines()[-1] + "\n")


def empty_cell(outs):
    path = outs / "spatial" / "tissue_positions.csv"
    path.write_text(path.read_text()[: path.read_text().rindex(",") + 1] + "\n")


def foreign_header(outs):
    path = outs / "spatial" / "tissue_positions.csv"
    path.write_text(path.read_text().replace(HEADER, "id,tissue,row,col,y,x\n"))


def lost_column(outs):
    path = outs / "spatial" / "tissue_positions.csv"
    path.write_text(path.read_text().replace("pxl_row_in_fullres", "pxl_row"))


def no_positions(outs):
    (outs / "spatial" / "tissue_positions.csv").unlink()


def no_matrix(outs):
    (outs / "filtered_feature_bc_matrix.h5").unlink()


def two_matrices(outs):
    path = outs / "filtered_feature_bc_matrix.h5"
    shutil.copy(path, outs / "B_filtered_feature_bc_matrix.h5")


def cut_matrix(outs):
    path = outs / "filtered_feature_bc_matrix.h5"
    path.write_bytes(path.read_bytes()[:1000])


def bad_factors(outs):
    (outs / "spatial" / "scalefactors_json.json").write_text("{")


def no_spatial(outs):
    shutil.rmtree(outs / "spatial")


def high_definition(outs):
    shutil.rmtree(outs / "spatial")
    (outs / "binned_outputs").mkdir()


def bins_of_hd(outs):
    """The outs of HD have a folder spatial, too."""
    (outs / "binned_outputs").mkdir()


def segmented(outs):
    """Space Ranger 4 on HD: cells, with a folder spatial of their own."""
    shutil.copy(outs / "filtered_feature_bc_matrix.h5", outs / "filtered_feature_cell_matrix.h5")
    (outs / "cell_segmentations.geojson").write_text("{}")


def only_cells(outs):
    (outs / "segmented_outputs").mkdir()


def xenium_run(outs):
    (outs / "experiment.xenium").write_text("{}")


def blank(name):
    def damage(outs):
        path = outs / "spatial" / "tissue_positions.csv"
        table = pd.read_csv(path, dtype=str)
        table.loc[1, name] = ""
        table.to_csv(path, index=False)

    damage.__name__ = f"blank {name}"
    return damage


def replaced(name, change):
    """Another array in the matrix."""

    def damage(outs):
        with h5py.File(outs / "filtered_feature_bc_matrix.h5", "r+") as file:
            values = change(file["matrix"][name][:])
            del file["matrix"][name]
            file["matrix"][name] = values

    damage.__name__ = f"{name} {change(np.arange(2)).dtype}"
    return damage


BAD = (
    (replaced("data", lambda x: x.astype("S3")), "its data is |S3"),
    (replaced("indices", lambda x: x.astype("S3")), "its indices is |S3"),
    (replaced("indptr", lambda x: x[:, None]), "its indptr is int64"),
    (replaced("shape", lambda x: x[:1]), "expected a list of two numbers"),
    (bins_of_hd, "visium_hd.py"),
    (segmented, "holds the cells that Space Ranger segmented"),
    (only_cells, "no binned_outputs"),
    (xenium_run, "prepare/xenium.py"),
    *((blank(name), f"holds '' in column {name}, data row 2") for name in tenx.COLUMNS[1:]),
    (exchange_array, "does not hold Visium's array"),
    (other_barcodes, "are not in tissue"),
    (repeat_spot, "more than once"),
    (empty_cell, "tissue_positions.csv"),
    (foreign_header, "its first line is 'id,tissue"),
    (lost_column, "expected barcode, in_tissue"),
    (no_positions, "has none of tissue_positions.csv"),
    (no_matrix, "no filtered_feature_bc_matrix.h5"),
    (two_matrices, "has 2 matrices"),
    (cut_matrix, "is no whole 10x matrix"),
    (bad_factors, "scalefactors_json.json holds no scale factors"),
    (no_spatial, "has no folder spatial"),
    (high_definition, "prepare/visium_hd.py"),
)


def test_counts_as_numbers_of_16_bits_are_read(tmp_path):
    outs, *_ = write_outs(tmp_path)
    path = outs / "filtered_feature_bc_matrix.h5"
    wanted = tenx.read_10x_h5(path)[0].toarray()
    replaced("data", lambda x: x.astype(np.float16))(outs)
    np.testing.assert_array_equal(tenx.read_10x_h5(path)[0].toarray(), wanted)


@pytest.mark.parametrize(("damage", "words"), BAD, ids=[damage.__name__ for damage, _ in BAD])
def test_bad_folders_are_explained(tmp_path, capsys, damage, words):
    outs, *_ = write_outs(tmp_path)
    damage(outs)
    assert words in error_of(tmp_path, capsys, outs)


def test_spots_without_counts_are_left_out_with_a_note(tmp_path):
    outs, table, known = write_outs(tmp_path)
    spare = table.index[table["in_tissue"] == 0][0]
    path = outs / "spatial" / "tissue_positions.csv"
    path.write_text(path.read_text().replace(f"{spare},0", f"{spare},1"))
    assert prepare(tmp_path, outs) == 0
    assert_sample(tmp_path / "sample", table, known)
    assert "1 spots in tissue have no counts" in (tmp_path / "sample" / "prepare.json").read_text()


def test_a_sample_of_others_is_not_replaced(tmp_path, capsys):
    outs, *_ = write_outs(tmp_path)
    (tmp_path / "sample").mkdir()
    (tmp_path / "sample" / "cnts.csv").write_text("mine")
    assert prepare(tmp_path, outs) == 2
    assert "cnts.csv was not written by prepare/visium.py" in capsys.readouterr().err
    assert [f.name for f in (tmp_path / "sample").iterdir()] == ["cnts.csv"]


def test_as_a_user(tmp_path, capsys):
    outs, table, known = write_outs(tmp_path)
    script, sample = "prepare/visium.py", tmp_path / "sample"
    options = ["--directory", sample, "--outs", outs, "--image", tmp_path / "scan.png"]
    assert run_as_main(script, *options) == 0
    assert_sample(sample, table, known)
    assert " px x 0.79993 um = 100.0 um apart" in capsys.readouterr().out
    assert run_as_main(script, "--directory", tmp_path / "other", "--outs", tmp_path) == 2
    assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.parametrize("words", [("TRUE", "FALSE"), ("True", "False"), ("yes", "no")])
@pytest.mark.parametrize("layout", ["header", "no header"])
def test_in_tissue_may_be_written_in_words(tmp_path, words, layout):
    outs, table, known = write_outs(tmp_path, layout)
    path = outs / "spatial" / "tissue_positions.csv"
    text = path.read_text().replace("-1,1,", f"-1,{words[0]},").replace("-1,0,", f"-1,{words[1]},")
    assert text.count(words[1]) == (table["in_tissue"] == 0).sum()
    path.write_text(text)
    assert prepare(tmp_path, outs) == 0
    assert_sample(tmp_path / "sample", table, known)


def test_cytassist_of_11_mm_is_read_whole(tmp_path):
    """14,336 spots in 128 rows of 112, probes and antibodies, as Space Ranger 3 and 4 have it."""
    um, turn = 4.0, np.radians(2)
    row, col = (i.ravel() for i in np.mgrid[:128, :224])
    row, col = row[(row + col) % 2 == 0], col[(row + col) % 2 == 0]
    place = np.column_stack([col * -50.0, row * 100 * np.sqrt(3) / 2]) / um  # mirrored
    xy = place @ [[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]]
    xy += 20 - xy.min(0)
    spatial = tmp_path / "outs" / "spatial"
    spatial.mkdir(parents=True)
    barcodes = [f"{i:016d}-1" for i in range(len(row))]
    in_tissue = np.hypot(row - 64, (col - 112) / 2) < 50
    table = pd.DataFrame(
        {"barcode": barcodes, "in_tissue": in_tissue.astype(int), "array_row": row,
         "array_col": col, "x": xy[:, 0], "y": xy[:, 1]}
    )  # fmt: skip
    assert len(table) == 14_336
    write_positions(spatial, table, "header")
    kept = np.flatnonzero(in_tissue)
    types = ["Gene Expression", "Gene Expression", "Antibody Capture"]
    names = ["ACTB", "DEPRECATED_X", "CD3"]
    counts = np.column_stack([kept % 7 + 1, kept % 3, kept % 5])
    write_h5(tmp_path / "outs" / "filtered_feature_bc_matrix.h5", counts,
             [barcodes[i] for i in kept], ["ENSG1", "ENSG2", "CD3"], names, types)  # fmt: skip
    size = tuple(np.ceil(xy.max(0) + 20).astype(int).tolist())
    Image.new("RGB", size, "white").save(tmp_path / "scan.png")
    Image.new("RGB", (300, 300)).save(spatial / "cytassist_image.tiff")
    assert prepare(tmp_path, tmp_path / "outs") == 0
    locs, found, pixel_um = read_sample(tmp_path / "sample")
    assert pixel_um == pytest.approx(um, rel=1e-4)
    assert len(locs) == in_tissue.sum()
    wanted = pd.Series(counts[:, 0], [barcodes[i] for i in kept])
    assert found.columns.tolist() == ["ACTB"]
    pd.testing.assert_series_equal(found["ACTB"], wanted[found.index], check_names=False)
    notes = json.loads((tmp_path / "sample" / "prepare.json").read_text())["notes"]
    assert not any("transposed" in note for note in notes)
    assert sum("type DEPRECATED" in n or "type Antibody Capture" in n for n in notes) == 2


@pytest.mark.skipif(not REAL.is_dir(), reason="files in the vendors' formats are not at hand")
def test_real_files_of_space_ranger_1(tmp_path):
    """Scanpy's excerpt: 100 of 4,235 spots in tissue, a hires image of 2,000 px."""
    image = REAL / "spatial" / "tissue_hires_image.png"
    options = ["--outs", str(REAL), "--image", str(image), "--image-is", "hires"]
    assert visium.run([*options, "--directory", str(tmp_path / "sample")]) == 0
    locs, counts, um = read_sample(tmp_path / "sample")
    raw = pd.read_csv(REAL / "spatial" / "tissue_positions_list.csv", header=None, index_col=0)
    assert len(raw) == 4992  # no spot is taken for a header
    assert counts.shape == (100, 100)
    with h5py.File(REAL / "filtered_feature_bc_matrix.h5") as file:
        group = file["matrix"]
        barcodes, names = group["barcodes"][:].astype(str), group["features/name"][:].astype(str)
        assert counts.to_numpy().sum() == group["data"][:].sum() == 932
        for i in range(0, 100, 7):
            part = slice(group["indptr"][i], group["indptr"][i + 1])
            row = counts.loc[barcodes[i]]
            assert row[row > 0].to_dict() == dict(
                zip(
                    names[np.sort(group["indices"][part])],
                    group["data"][part][np.argsort(group["indices"][part])],
                    strict=True,
                )
            )
    full_um = um * 2 * 0.150015
    assert full_um == pytest.approx(100 / 137.9, rel=3e-3)  # 2779 to 3261 over seven half pitches
    np.testing.assert_allclose(
        locs, raw.loc[locs.index, [5, 4]] * 0.150015 * 2, atol=1e-3
    )  # column, then row
    report = json.loads((tmp_path / "sample" / "prepare.json").read_text())
    assert report["spots_on_image"] == 100
