"""image_calibration.py: he-raw and its spots become he.jpg at 0.5 um per pixel and spots on it."""

import io
import json
import os
import shlex
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
import pyvips
import tifffile
from conftest import (
    REAL_DATA,
    ROOT,
    draw_section,
    hexagonal_spots,
    run,
    run_as_main,
    write_record,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, ImageFilter, JpegImagePlugin

import image_calibration as calibration
import utils
from reading import images, pictures, tables
from writing import disk

OUTPUTS = ("he.jpg", "locs.csv", "radius.txt", "pixel-size.txt")


def make_stage(directory, *options) -> utils.Stage:
    args = calibration.build_parser().parse_args(["--directory", str(directory), *options])
    return utils.Stage(calibration.SCRIPT, args)


def calibrate(directory, *options) -> int:
    return run("image_calibration.py", directory, *options)


def texture(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    """Smooth random colours, uint8 (rows, columns, 3)."""
    coarse = np.random.default_rng(seed).integers(0, 256, (rows // 6 + 2, columns // 6 + 2, 3))
    return cv2.resize(coarse.astype(np.uint8), (columns, rows), interpolation=cv2.INTER_LINEAR)


def replace_raw(directory, name: str, content: bytes) -> None:
    (directory / "he-raw.png").unlink()
    (directory / name).write_bytes(content)


def encode(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def tiff(array: np.ndarray, **options) -> bytes:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, array, **options)
    return buffer.getvalue()


def jpeg_tiles(array: np.ndarray, side: int = 256) -> bytes:
    """A BigTIFF of whole JPEG tiles, written by hand as slide scanners do (YCbCr, 4:4:4)."""
    rows, columns = array.shape[:2]
    down, across = -(-rows // side), -(-columns // side)
    full = np.full((down * side, across * side, 3), 255, np.uint8)
    full[:rows, :columns] = array
    tiles = [
        encode(
            Image.fromarray(full[r * side : (r + 1) * side, c * side : (c + 1) * side]),
            "JPEG",
            quality=98,
            subsampling=0,
        )
        for r in range(down)
        for c in range(across)
    ]
    n, body, offsets = len(tiles), b"", []
    for tile in tiles:
        offsets.append(16 + len(body))
        body += tile
    at = 16 + len(body)  # of the two arrays of 8-byte numbers
    body += struct.pack(f"<{n}Q{n}Q", *offsets, *map(len, tiles))
    tags = [  # tag, type (3 short, 16 long8), count, value
        (256, 3, 1, columns), (257, 3, 1, rows), (258, 3, 3, 8 | 8 << 16 | 8 << 32), (259, 3, 1, 7),
        (262, 3, 1, 6), (277, 3, 1, 3), (322, 3, 1, side), (323, 3, 1, side), (324, 16, n, at),
        (325, 16, n, at + 8 * n), (530, 3, 2, 1 | 1 << 16),
    ]  # fmt: skip
    ifd = struct.pack("<Q", len(tags))
    ifd += b"".join(struct.pack("<HHQQ", *tag) for tag in tags) + bytes(8)
    return struct.pack("<2sHHHQ", b"II", 43, 8, 0, 16 + len(body)) + body + ifd


def png_header(columns: int, rows: int) -> bytes:
    """A tiny PNG whose header claims any size."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        checksum = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)

    header = struct.pack(">IIBBBBB", columns, rows, 8, 2, 0, 0, 0)
    data = zlib.compress(bytes(100))
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    )


# ----- geometry -----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("raw", "pixel_size", "shape", "padded"),
    [
        ((1000, 2000), 0.25, (500, 1000), (672, 1120)),
        ((448, 672), 0.5, (448, 672), (448, 672)),
        ((449, 672), 0.5, (449, 672), (672, 672)),
        ((9911, 9274), 0.69, (13677, 12798), (13888, 12992)),
        ((20000, 20000), 0.50004, (20000, 20000), (20160, 20160)),  # 0.5 within what is known
        ((20000, 20000), 0.500075, (20003, 20003), (20160, 20160)),
        ((20000, 20000), 0.501, (20040, 20040), (20160, 20160)),
    ],
)
def test_shapes(raw, pixel_size, shape, padded):
    assert calibration.calibrated_shape(raw, pixel_size) == shape
    assert calibration.padded_shape(shape) == padded


def resize(array: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Resized and padded as a run does it."""
    image = pyvips.Image.new_from_array(array, interpretation="srgb")
    return calibration.pad(calibration.resize(image, shape)).numpy()


@settings(max_examples=60, deadline=None)
@given(raw=st.tuples(st.integers(24, 999), st.integers(24, 999)), scale=st.floats(0.1, 5))
def test_the_result_has_the_shape_asked_for(raw, scale):
    shape = max(1, round(raw[0] * scale)), max(1, round(raw[1] * scale))
    image = calibration.resize(pyvips.Image.black(raw[1], raw[0]), shape)
    assert (image.height, image.width) == shape


def covered(old: int, new: int) -> np.ndarray:
    """(new, old): share of every new pixel that lies on each old pixel."""
    edges = np.arange(new + 1) * old / new
    left = np.maximum(edges[:-1, None], np.arange(old))
    right = np.minimum(edges[1:, None], np.arange(old) + 1)
    return np.clip(right - left, 0, None) * new / old


@pytest.mark.parametrize("shape", [(280, 390), (230, 307), (150, 200), (83, 111)])
def test_shrinking_is_close_to_averages_of_areas(shape):
    """No sharper than the sampling allows, nothing shifted: on drawn tissue, 3 levels rms of 40."""
    array = cv2.GaussianBlur(draw_section((300, 401)), (3, 3), 0)
    rows, columns = covered(300, shape[0]), covered(401, shape[1])
    expected = np.stack([rows @ array[..., c] @ columns.T for c in range(3)], axis=2)
    found = resize(array, shape)[: shape[0], : shape[1]]
    assert np.sqrt(np.mean((found - expected) ** 2)) < 3
    moved = np.sqrt(np.mean((found[:, 1:] - expected[:, :-1]) ** 2))
    assert moved > 6


@pytest.mark.parametrize("shape", [(280, 390), (150, 200), (310, 402), (433, 777), (1200, 1604)])
def test_a_ramp_keeps_its_place(shape):
    """A colour that grows with the place tells to which old place a new pixel belongs: centres
    map by the exact ratio of the sides, edges to edges, so that there is no half-pixel shift."""
    old = (300, 401)
    row, col = np.mgrid[: old[0], : old[1]] + 0.5
    for place, axis in ((row, 0), (col, 1)):
        image = pyvips.Image.new_from_array(place.astype(np.float32))
        found = calibration.resize(image, shape).numpy()
        centres = (np.arange(shape[axis]) + 0.5) * old[axis] / shape[axis]
        expected = centres[:, None] if axis == 0 else centres[None]
        inner = (slice(8, -8), slice(8, -8))
        assert np.abs(found - expected)[inner].max() < 0.05
        assert abs((found - expected)[inner].mean()) < 0.002


@pytest.mark.parametrize("shape", [(433, 777), (1200, 1604)])
def test_enlarging_is_cubic(shape):
    """Against Pillow's bicubic, whose spline has a slope of -0.5 as that of libvips."""
    array = texture(300, 401)
    expected = np.asarray(Image.fromarray(array).resize(shape[::-1], Image.Resampling.BICUBIC))
    found = resize(array, shape)[: shape[0], : shape[1]]
    assert np.abs(found.astype(int) - expected).max() <= 2


def test_the_same_size_keeps_every_byte_and_pads_with_white():
    array = texture(230, 460)
    result = resize(array, (230, 460))
    assert result.shape == (448, 672, 3)
    np.testing.assert_array_equal(result[:230, :460], array)
    assert (result[230:] == 255).all()
    assert (result[:, 460:] == 255).all()


@pytest.mark.parametrize(("shape", "new"), [((8, 60000), (9, 66000)), ((8, 60000), (5, 39000))])
@pytest.mark.parametrize("turned", [False, True])
def test_sides_beyond_32767(shape, new, turned):
    ramp = np.linspace(0, 255, shape[1])
    array = np.repeat(np.repeat(ramp[None, :, None], shape[0], 0), 3, 2).round().astype(np.uint8)
    if turned:
        array, new = array.transpose(1, 0, 2), new[::-1]
    found = resize(array, new)[: new[0], : new[1], 0]
    found = found.T if turned else found
    expected = np.linspace(0, 255, max(new))
    assert np.abs(found - expected).max() <= 1.5


@settings(max_examples=20, deadline=None)
@given(
    x=st.floats(40, 320),
    y=st.floats(40, 220),
    pixel_size=st.floats(0.25, 1.6),
)
def test_a_spot_stays_on_its_tissue(x, y, pixel_size):
    """A dark blob at a spot is found, as its centre of mass, at the calibrated spot."""
    raw = (260, 361)
    row, col = np.mgrid[: raw[0], : raw[1]] + 0.5  # centres of the pixels
    blob = np.exp(-((row - y) ** 2 + (col - x) ** 2) / (2 * 6.0**2))
    image = np.repeat((255 * (1 - blob))[..., None], 3, 2).round().astype(np.uint8)
    shape = calibration.calibrated_shape(raw, pixel_size)
    dark = 255.0 - resize(image, shape)[..., 0]
    row, col = np.mgrid[: dark.shape[0], : dark.shape[1]] + 0.5
    spot = calibration.scale_locs(pd.DataFrame({"x": [x], "y": [y]}), raw, shape)
    assert abs((dark * col).sum() / dark.sum() - spot.x[0]) < 0.15
    assert abs((dark * row).sum() / dark.sum() - spot.y[0]) < 0.15


# ----- whole runs ---------------------------------------------------------------------------------
def test_run(sample, capsys):
    assert calibrate(sample) == 0
    raw = np.asarray(Image.open(sample / "he-raw.png"))
    with Image.open(sample / "he.jpg") as image:
        assert image.size == (672, 448)
        assert JpegImagePlugin.get_sampling(image) == 0  # 4:4:4
        reference = Image.open(io.BytesIO(encode(Image.new("RGB", (8, 8)), "JPEG", quality=95)))
        assert image.quantization == reference.quantization
        he = np.asarray(image)
    assert np.abs(he[:440, :660].astype(int) - raw).mean() < 3
    assert he[440:].min() > 240
    assert he[:, 660:].min() > 240
    locs = pd.read_csv(sample / "locs.csv", index_col=0)
    expected = pd.read_csv(sample / "locs-raw.csv", index_col=0)
    pd.testing.assert_frame_equal(locs, expected, atol=1e-4)
    assert float((sample / "radius.txt").read_text()) == 27.5
    assert float((sample / "pixel-size.txt").read_text()) == 0.5
    record = json.loads((sample / "image_calibration.json").read_text())
    assert record["raw_size"] == [440, 660]
    assert record["size"] == [448, 672]
    assert record["padding"] == [8, 12]
    assert record["scale"] == 1
    assert record["spots"] == record["spots_inside"] == len(locs)
    assert set(record["outputs"]) == set(OUTPUTS)
    assert set(record["inputs"]) == {
        "he-raw.png", "pixel-size-raw.txt", "locs-raw.csv", "radius-raw.txt",
    }  # fmt: skip
    printed = capsys.readouterr().out
    assert f"spots inside the image: {len(locs)} of {len(locs)} (100.0%)" in printed
    assert "padded by 12 px on the right and 8 px below" in printed


def test_run_scales_image_spots_and_radius_together(sample):
    (sample / "pixel-size-raw.txt").write_text("0.777")
    (sample / "radius-raw.txt").write_text("20")
    assert calibrate(sample) == 0
    columns, rows = round(660 * 1.554), round(440 * 1.554)
    record = json.loads((sample / "image_calibration.json").read_text())
    assert record["scaled_size"] == [rows, columns]
    raw = tables.read_locs(make_stage(sample), sample / "locs-raw.csv")
    locs = tables.read_locs(make_stage(sample), sample / "locs.csv")
    np.testing.assert_allclose(locs.x, raw.x * columns / 660, atol=1e-4)
    np.testing.assert_allclose(locs.y, raw.y * rows / 440, atol=1e-4)
    assert list(locs.index) == list(raw.index)
    assert float((sample / "radius.txt").read_text()) == pytest.approx(31.08)


def test_without_a_radius_visium_is_taken(sample, capsys):
    (sample / "radius-raw.txt").unlink()
    assert calibrate(sample) == 0
    assert float((sample / "radius.txt").read_text()) == 55
    assert "for legacy ST write 100.00 into it" in capsys.readouterr().out


def test_two_runs_give_the_same_bytes(sample):
    assert calibrate(sample) == 0
    first = {name: (sample / name).read_bytes() for name in OUTPUTS}
    assert calibrate(sample) == 0
    assert {name: (sample / name).read_bytes() for name in OUTPUTS} == first


def test_as_a_user(sample, capfd):
    assert run_as_main("image_calibration.py", "--directory", sample) == 0
    assert capfd.readouterr().err == ""
    (sample / "he-raw.png").write_bytes((sample / "he-raw.png").read_bytes()[:9000])
    assert run_as_main("image_calibration.py", "--directory", sample) == 2
    said = capfd.readouterr().err
    assert "truncated" in said
    assert "Traceback" not in said


def test_png_takes_over_from_jpeg_and_back(sample, monkeypatch):
    assert calibrate(sample) == 0
    monkeypatch.setattr(calibration, "JPEG_MAX_SIDE_PX", 600)
    assert calibrate(sample, "--force") == 0
    assert not (sample / "he.jpg").exists()
    with Image.open(sample / "he.png") as image:
        np.testing.assert_array_equal(
            np.asarray(image)[:440, :660], np.asarray(Image.open(sample / "he-raw.png"))
        )
    monkeypatch.setattr(calibration, "JPEG_MAX_SIDE_PX", 65_500)
    assert calibrate(sample, "--force") == 0
    assert not (sample / "he.png").exists()
    assert (sample / "he.jpg").exists()


def test_a_crash_while_jpeg_gives_way_to_png_is_mended_by_a_rerun(sample, monkeypatch):
    assert calibrate(sample) == 0
    put = disk.put
    monkeypatch.setattr(calibration, "JPEG_MAX_SIDE_PX", 600)
    with monkeypatch.context() as patch:
        patch.setattr(disk, "put", lambda _, to: 1 / 0 if to.suffix == ".png" else put(_, to))
        with pytest.raises(ZeroDivisionError):
            calibrate(sample, "--force")
    assert not list(sample.glob("he.*"))
    assert not list(sample.glob(".*partial*"))
    assert calibrate(sample) == 0
    assert [path.name for path in sample.glob("he.*")] == ["he.png"]


def test_a_failure_before_the_end_keeps_the_old_image(sample, monkeypatch):
    assert calibrate(sample) == 0
    before = (sample / "he.jpg").read_bytes()
    monkeypatch.setattr(calibration, "JPEG_MAX_SIDE_PX", 600)
    monkeypatch.setattr(calibration, "scale_locs", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        calibrate(sample, "--force")
    assert (sample / "he.jpg").read_bytes() == before
    assert not list(sample.glob(".*partial*"))


# ----- formats ------------------------------------------------------------------------------------
SECTION = draw_section((300, 500))
RGB = Image.fromarray(SECTION)
PLANES = np.moveaxis(SECTION, 2, 0).copy()
TILES = {"photometric": "rgb", "tile": (128, 128)}
LOSSLESS = {
    "png": lambda: encode(RGB, "PNG"),
    "tiff": lambda: tiff(SECTION, photometric="rgb"),
    "tiff tiled": lambda: tiff(SECTION, **TILES),
    "tiff big tiled": lambda: tiff(SECTION, **TILES, bigtiff=True),
    "tiff deflate": lambda: tiff(SECTION, **TILES, compression="zlib", predictor=True),
    "tiff big deflate": lambda: tiff(SECTION, **TILES, compression="zlib", bigtiff=True),
    "tiff planar": lambda: tiff(PLANES, photometric="rgb", planarconfig="separate"),
    "tiff lzw": lambda: encode(RGB, "TIFF", compression="tiff_lzw"),
    "tiff big lzw": lambda: encode(RGB, "TIFF", compression="tiff_lzw", big_tiff=True),
    "tiff packbits": lambda: encode(RGB, "TIFF", compression="packbits"),
}
LOSSY = {
    "jpg": lambda: encode(RGB, "JPEG", quality=98, subsampling=0),
    "jpg progressive": lambda: encode(RGB, "JPEG", quality=98, subsampling=0, progressive=True),
    "tiff jpeg": lambda: encode(RGB, "TIFF", compression="jpeg", quality=98),
    "tiff big jpeg tiled": lambda: jpeg_tiles(SECTION),
}


def read(directory, name, content) -> tuple[np.ndarray, str]:
    """The pixels as RGB, and what was said of their conversion."""
    path = directory / name
    path.write_bytes(content)
    image = calibration.open_image(make_stage(directory), path)
    rgb, said = pictures.to_rgb(image, path)
    array = rgb.numpy()
    assert array.shape == (image.height, image.width, 3)
    assert array.dtype == np.uint8
    return array, said


@pytest.mark.parametrize("kind", LOSSLESS)
def test_lossless_formats(kind, tmp_path):
    found, said = read(tmp_path, f"he-raw.{kind[:3]}", LOSSLESS[kind]())
    np.testing.assert_array_equal(found, SECTION)
    assert said == ""


@pytest.mark.parametrize("kind", LOSSY)
def test_lossy_formats(kind, tmp_path):
    found, said = read(tmp_path, f"he-raw.{kind[:3]}", LOSSY[kind]())
    assert np.abs(found.astype(int) - SECTION).mean() < 2
    assert said == ""


GREY, BLACK_AND_COLOURS = SECTION[..., 0], np.random.default_rng(0).integers(0, 65535, (3, 256))
SOFT = {"photometric": "ycbcr", "compression": "jpeg", "compressionargs": {"level": 90}}
WIDE = SECTION.astype(np.uint16) * 257
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
LIKE_PILLOW = {  # what to write -> what is said; Pillow is an independent reader of all of these
    "strips": (lambda: tiff(SECTION, photometric="rgb", rowsperstrip=20), ""),
    "one strip": (lambda: tiff(SECTION, photometric="rgb", rowsperstrip=300), ""),
    "one strip of zlib": (
        lambda: tiff(SECTION, photometric="rgb", rowsperstrip=300, compression="zlib"), ""),
    "big-endian": (lambda: tiff(SECTION, **TILES, byteorder=">"), ""),
    "lzw with predictor": (lambda: tiff(SECTION, **TILES, compression="lzw", predictor=True), ""),
    "jpeg tables, 4:2:0": (lambda: tiff(SECTION, tile=(64, 64), subsampling=(2, 2), **SOFT), ""),
    "jpeg strips": (lambda: tiff(SECTION, rowsperstrip=32, subsampling=(1, 1), **SOFT), ""),
    "planar strips": (
        lambda: tiff(PLANES, photometric="rgb", planarconfig="separate", rowsperstrip=32), ""),
    "jpeg 4:2:0": (lambda: encode(RGB, "JPEG", quality=90), ""),
    "grey jpeg": (lambda: encode(RGB.convert("L"), "JPEG"), "grey, converted to RGB"),
    "grey png": (lambda: encode(RGB.convert("L"), "PNG"), "grey, converted to RGB"),
    "grey": (lambda: tiff(GREY, photometric="minisblack", tile=(64, 64)), "grey, converted to RGB"),
    "white is zero": (
        lambda: tiff(GREY, photometric="miniswhite", rowsperstrip=7), "grey, converted to RGB"),
    "palette png": (lambda: encode(RGB.convert("P"), "PNG"), "palette, converted to RGB"),
    "palette of two": (
        lambda: encode(RGB.quantize(2), "PNG", bits=1), "palette, converted to RGB"),
    "palette": (
        lambda: tiff(GREY, photometric="palette", colormap=BLACK_AND_COLOURS.astype(np.uint16)),
        ""),
    "without meaning": (
        lambda: tiff(np.asarray(halves_transparent()), extrasamples=["unspecified"], **TILES),
        "a channel without meaning, left out, converted to RGB"),
    "big": (lambda: tiff(SECTION, **TILES, bigtiff=True, compression="zlib"), ""),
    "sRGB": (lambda: encode(RGB, "PNG", icc_profile=SRGB.tobytes()), ""),
    "no usable profile": (lambda: encode(RGB, "PNG", icc_profile=b"junk" * 50), ""),
}  # fmt: skip


@pytest.mark.parametrize("kind", LIKE_PILLOW)
def test_the_pixels_are_those_of_pillow(kind, tmp_path):
    write, words = LIKE_PILLOW[kind]
    content = write()
    expected = np.asarray(Image.open(io.BytesIO(content)).convert("RGB")).astype(int)
    found, said = read(tmp_path, "he-raw.tif", content)
    assert np.abs(found - expected).max() <= (2 if "jpeg" in kind else 0)
    assert said == words


@pytest.mark.parametrize("colours", [3, 1])
@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize("alpha", [False, True])
def test_16_bits(colours, suffix, alpha, tmp_path):
    """Against hand-computed values: the upper 8 bits, what is transparent laid on white."""
    values = np.random.default_rng(0).integers(0, 65536, (230, 240, colours)).astype(np.uint16)
    share = np.ones((230, 240, 1))
    if alpha:
        share = np.random.default_rng(1).integers(0, 65536, (230, 240, 1)) / 65535
    stored = np.concatenate([values, (share * 65535).round().astype(np.uint16)], 2)
    stored = stored if alpha else values
    if suffix == "tif":
        extra = {"extrasamples": ["unassalpha"]} if alpha else {}
        kind = "rgb" if colours == 3 else "minisblack"
        layout = {"planarconfig": "contig"} if stored.shape[2] > 1 else {}
        content = tiff(stored.squeeze(), photometric=kind, **layout, **extra)
    else:
        if stored.shape[2] == 2:
            pytest.skip("OpenCV does not write it")
        order = [2, 1, 0, 3][: stored.shape[2]] if colours == 3 else [0]
        content = cv2.imencode(".png", stored[..., order])[1].tobytes()
    found, said = read(tmp_path, f"he-raw.{suffix}", content)
    expected = (values * share + 65535 * (1 - share)) / 257
    assert np.abs(found - expected).max() <= 1.01
    words = ["16 bit"] + ["grey"] * (colours == 1) + ["alpha"] * alpha
    assert said == f"{', '.join(words)}, converted to RGB{' on white' * alpha}"


@pytest.mark.parametrize("kind", ["unassalpha", "assocalpha"])
def test_alpha_of_a_tiff_is_laid_on_white(kind, tmp_path):
    share = np.linspace(0, 255, 500).round().astype(np.uint8)[None, :, None].repeat(300, 0)
    colours = SECTION
    if kind == "assocalpha":  # the colours are stored multiplied by their share
        colours = (SECTION * (share / 255)).round().astype(np.uint8)
    content = tiff(np.concatenate([colours, share], 2), extrasamples=[kind], **TILES)
    found, said = read(tmp_path, "he-raw.tif", content)
    expected = SECTION * (share / 255) + 255 * (1 - share / 255)
    assert np.abs(found - expected).max() <= 2
    assert said == "alpha, converted to RGB on white"


def test_a_colour_profile_is_applied(tmp_path):
    """Against Pillow's own use of littleCMS, on the wide space that comes with libvips."""
    profile = bytes(pyvips.Image.profile_load("p3"))
    there = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    expected = ImageCms.profileToProfile(RGB, there, SRGB, ImageCms.Intent.RELATIVE_COLORIMETRIC)
    assert np.abs(np.asarray(expected).astype(int) - SECTION).max() > 10
    for suffix, kind in (("png", "PNG"), ("tif", "TIFF")):
        content = encode(RGB, kind, icc_profile=profile)
        found, said = read(tmp_path, f"he-raw.{suffix}", content)
        assert np.abs(found.astype(int) - np.asarray(expected)).max() <= 2
        assert said == "colour profile, converted to RGB"


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_cmyk_becomes_rgb(kind, tmp_path):
    """By its profile as in Pillow; without one its colours are near to those that were meant."""
    profile = bytes(pyvips.Image.profile_load("cmyk"))
    there = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    intent = ImageCms.Intent.RELATIVE_COLORIMETRIC
    print_ = ImageCms.profileToProfile(RGB, SRGB, there, intent, outputMode="CMYK")
    options = {"quality": 98, "subsampling": 0} if kind == "JPEG" else {}
    for embedded in (profile, None):
        content = encode(print_, kind, icc_profile=embedded, **options)
        stored = Image.open(io.BytesIO(content))
        expected = ImageCms.profileToProfile(stored, there, SRGB, intent, outputMode="RGB")
        found, said = read(tmp_path, "he-raw.tif", content)
        assert np.abs(found.astype(int) - np.asarray(expected)).max() <= 3
        no = "" if embedded else "no "
        assert said == f"CMYK, {no}colour profile, converted to RGB"


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 560),
    columns=st.integers(1, 70),
    png=st.booleans(),
    asked=st.lists(st.tuples(st.integers(0, 560), st.integers(0, 560)), min_size=1, max_size=5),
)
def test_he_jpg_is_read_by_any_of_its_rows(rows, columns, png, asked, tmp_path_factory):
    """Rows asked for in any order are those of Pillow, which decodes the whole."""
    path = tmp_path_factory.getbasetemp() / ("he.png" if png else "he.jpg")
    array = texture(rows, columns)
    calibration.write_image(pyvips.Image.new_from_array(array, interpretation="srgb"), path)
    whole = np.asarray(Image.open(path))
    if png:
        np.testing.assert_array_equal(whole, array)
    with images.ImageRows(make_stage(path.parent), path) as image:
        assert image.shape == whole.shape
        for part in asked:
            np.testing.assert_array_equal(image[slice(*part)], whole[slice(*part)])
        np.testing.assert_array_equal(image[:], whole)


@pytest.mark.parametrize("share", [0.3, 0.7, 0.999])
def test_rows_of_a_damaged_he_jpg_are_an_error(share, tmp_path):
    path, array = tmp_path / "he.jpg", texture(448, 448)
    calibration.write_image(pyvips.Image.new_from_array(array, interpretation="srgb"), path)
    content, stage = path.read_bytes(), make_stage(tmp_path)
    for damaged in (content[: int(len(content) * share)], zero_tail(content, share)):
        path.write_bytes(damaged)
        with pytest.raises(utils.StageError, match="not a whole image"):
            images.ImageRows(stage, path)[:]
        with pytest.raises(utils.StageError, match="not a whole image"):
            images.thumbnail(stage, path, 100)


def test_the_number_of_threads_changes_no_byte(tmp_path):
    array, there = texture(3000, 2500), pyvips.concurrency_get()
    image = pyvips.Image.new_from_array(array, interpretation="srgb")
    contents = set()
    for threads in (1, 2, 5):
        pyvips.concurrency_set(threads)
        for shape in ((1111, 926), (3300, 2750)):
            path = tmp_path / "he.jpg"
            calibration.write_image(calibration.pad(calibration.resize(image, shape)), path)
            contents.add(path.read_bytes())
    pyvips.concurrency_set(there)
    assert len(contents) == 2


def test_the_first_page_of_a_pyramid_is_taken(tmp_path):
    buffer = io.BytesIO()
    with tifffile.TiffWriter(buffer) as writer:
        writer.write(SECTION, photometric="rgb", tile=(128, 128))
        writer.write(SECTION[::2, ::2].copy(), photometric="rgb", subfiletype=1)
    np.testing.assert_array_equal(read(tmp_path, "he-raw.tif", buffer.getvalue())[0], SECTION)


def halves_transparent() -> Image.Image:
    alpha = np.full((*SECTION.shape[:2], 1), 255, np.uint8)
    alpha[:, :250] = 0
    return Image.fromarray(np.concatenate([SECTION, alpha], 2))


# ----- bad input ----------------------------------------------------------------------------------
def refused(directory, capsys, *words, options=()) -> None:
    """The run ends with exit code 2 and says all of ``words``; what was there stays as it was."""
    for name in OUTPUTS:
        (directory / name).write_bytes(b"from an earlier run")
    write_record(directory, utils.CALIBRATION, [], [*OUTPUTS])
    before = {path.name: path.read_bytes() for path in directory.iterdir()}
    assert calibrate(directory, *options) == 2
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == before
    message = capsys.readouterr().err
    quoted = shlex.quote(str(directory))
    for word in (*words, f"python image_calibration.py --directory {quoted}"):
        assert word in message, message


def zero_tail(content: bytes, share: float) -> bytes:
    cut = int(len(content) * share)
    return content[:cut] + bytes(len(content) - cut)


def flip(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 0x10]) + content[at + 1 :]


def stack() -> bytes:
    return tiff(PLANES, photometric="minisblack", metadata={"axes": "CYX"})


def upside_down_pyramid() -> bytes:
    buffer = io.BytesIO()
    with tifffile.TiffWriter(buffer) as writer:
        writer.write(SECTION[::2, ::2].copy(), photometric="rgb")
        writer.write(SECTION, photometric="rgb")
    return buffer.getvalue()


def turned(kind: str) -> bytes:
    exif = Image.Exif()
    exif[274] = 6
    return encode(RGB, kind, exif=exif)


def oriented(number: int) -> bytes:
    return tiff(SECTION, photometric="rgb", extratags=[(274, "H", 1, number, True)])


def turned_at_the_end() -> bytes:
    """A PNG whose EXIF stands behind its pixels, as the format allows."""
    png = turned("PNG")
    start = png.index(b"eXIf") - 4
    length = 12 + int.from_bytes(png[start : start + 4])
    exif, rest = png[start : start + length], png[:start] + png[start + length :]
    end = rest.index(b"IEND") - 4
    return rest[:end] + exif + rest[end:]


def five_channels() -> bytes:
    return tiff(np.concatenate([SECTION] * 2, 2)[..., :5], photometric="rgb", planarconfig="contig")


SVG = b'<svg xmlns="http://www.w3.org/2000/svg" width="500" height="300"></svg>'
JPG = encode(RGB, "JPEG", quality=95)
PNG = encode(RGB, "PNG")
BAD_IMAGES = {
    "jpg cut in half": ("jpg", lambda: JPG[: len(JPG) // 2], "truncated"),
    "jpg without its last bytes": ("jpg", lambda: JPG[:-2], "truncated"),
    "jpg filled up with zeros": ("jpg", lambda: zero_tail(JPG, 0.999), "truncated"),
    "progressive jpg cut": ("jpg", lambda: LOSSY["jpg progressive"]()[:-3000], "truncated"),
    "png cut": ("png", lambda: PNG[: len(PNG) // 2], "truncated"),
    "png header only": ("png", lambda: PNG[:40], "truncated"),
    "png with a flipped bit": ("png", lambda: flip(PNG, len(PNG) * 9 // 10), "corrupt"),
    "tiff cut": ("tif", lambda: LOSSLESS["tiff"]()[:200_000], "truncated"),
    "tiff deflate cut": ("tif", lambda: LOSSLESS["tiff deflate"]()[:100_000], "truncated"),
    "tiff lzw cut": ("tif", lambda: LOSSLESS["tiff lzw"]()[:100_000], "truncated"),
    "tiff jpeg tiles damaged": ("tif", lambda: flip(jpeg_tiles(SECTION), 17), "corrupt"),
    "empty": ("jpg", lambda: b"", "no readable JPEG"),
    "text": ("png", lambda: b"spot,x,y\n", "no readable JPEG"),
    "gif inside": ("png", lambda: encode(RGB, "GIF"), "is a GIF image, whatever its name"),
    "svg inside": ("png", lambda: SVG, "is an SVG or another XML file"),
    "webp inside": ("jpg", lambda: encode(RGB, "WEBP"), "is a WebP image, whatever its name"),
    "bmp inside": ("jpg", lambda: encode(RGB, "BMP"), "is a BMP image, whatever its name"),
    "jpeg 2000 inside": ("tif", lambda: encode(RGB, "JPEG2000"), "is a JPEG 2000 image"),
    "ppm inside": ("png", lambda: encode(RGB, "PPM"), "is a PPM, PGM or PBM image"),
    "pdf inside": ("png", lambda: encode(RGB, "PDF"), "is a PDF document"),
    "an archive inside": ("png", lambda: b"PK\3\4" + bytes(60), "or another zip archive"),
    "one bit": ("png", lambda: encode(RGB.convert("1"), "PNG"), "1 bit"),
    "one bit tiff": ("tif", lambda: encode(RGB.convert("1"), "TIFF"), "1 bit"),
    "float": ("tif", lambda: tiff(SECTION.astype(np.float32), photometric="rgb"), "kind float"),
    "half": ("tif", lambda: tiff(SECTION.astype(np.float16), photometric="rgb"), "kind float"),
    "32 bit": ("tif", lambda: tiff(SECTION.astype(np.uint32), photometric="rgb"), "kind uint"),
    "signed": ("tif", lambda: tiff(SECTION.astype(np.int16), photometric="rgb"), "kind short"),
    "12 bit in 16": ("tif", lambda: tiff(WIDE // 16, photometric="rgb"), "no value above 40"),
    "five channels": ("tif", five_channels, "5 channels"),
    "planar tiles": (
        "tif",
        lambda: tiff(PLANES, planarconfig="separate", **TILES),
        "python prepare/slides.py",
    ),
    "channels on pages": ("tif", stack, "separate grey pages"),
    "largest page last": ("tif", upside_down_pyramid, "page 2 is larger (500 x 300 px)"),
    "turned jpg": ("jpg", lambda: turned("JPEG"), "EXIF orientation 6"),
    "turned png": ("png", lambda: turned("PNG"), "exiftool -Orientation="),
    "turned png, told at its end": ("png", turned_at_the_end, "EXIF orientation 6"),
    "turned tiff": ("tif", lambda: turned("TIFF"), "EXIF orientation 6"),
    "tiff of orientation 0": ("tif", lambda: oriented(0), "has orientation 0, which no standard"),
    "tiff of orientation 9": ("tif", lambda: oriented(9), "strip the tag (exiftool -Orientation="),
    "bomb": ("png", lambda: png_header(60_000, 60_000), "60000 x 60000 px"),
    "just over the limit": ("png", lambda: png_header(50_000, 40_001), "--max-megapixels 2000"),
    "less than a tile": ("png", lambda: encode(RGB.crop((0, 0, 500, 223)), "PNG"), "224 px"),
}


@pytest.mark.parametrize("case", BAD_IMAGES)
def test_bad_images(case, sample, capsys):
    suffix, content, words = BAD_IMAGES[case]
    replace_raw(sample, f"he-raw.{suffix}", content())
    xy = hexagonal_spots((220, 480), 60.0, 40.0)  # inside even the smallest image
    spots = pd.DataFrame(xy, columns=["x", "y"]).rename(index="s{}".format)
    spots.to_csv(sample / "locs-raw.csv")
    refused(sample, capsys, f"he-raw.{suffix}", words)


def test_limit_holds_after_calibration(sample, capsys):
    (sample / "pixel-size-raw.txt").write_text("2")  # 2640 x 1760 px, 4.6 megapixels
    (sample / "radius-raw.txt").unlink()
    words = ("he-raw.png", "--max-megapixels 4", "2640 x 1760 px")
    refused(sample, capsys, *words, options=("--max-megapixels", "4"))
    assert calibrate(sample, "--max-megapixels", "5") == 0


def test_a_system_that_does_not_tell_its_memory(monkeypatch):
    assert calibration.machine_memory() > 10**8
    monkeypatch.setattr(os, "sysconf_names", {})
    assert calibration.machine_memory() is None


def test_more_memory_than_the_machine_has(sample, capsys, monkeypatch):
    monkeypatch.setattr(calibration, "machine_memory", lambda: 10**6)
    assert calibrate(sample) == 0  # in bands
    replace_raw(sample, "he-raw.jpg", encode(RGB.resize((660, 440)), "JPEG", progressive=True))
    said = ("he-raw.jpg", "660 x 440 px", "progressive", "there are 0.0 GB")
    refused(sample, capsys, *said, options=("--force",))
    monkeypatch.setattr(calibration, "machine_memory", lambda: None)
    assert calibrate(sample, "--force") == 0


def test_more_disk_than_is_free(sample, capsys, monkeypatch):
    usage = utils.shutil.disk_usage(sample)
    monkeypatch.setattr(utils.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    for name in OUTPUTS:
        (sample / name).write_text("old")
    write_record(sample, utils.CALIBRATION, [], [*OUTPUTS])
    assert calibrate(sample) == 2
    assert "about 871 kB are needed" in capsys.readouterr().err
    assert (sample / "he.jpg").read_text() == "old"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no full disk at hand")
@pytest.mark.parametrize("shape", [(40, 60), (2000, 3000)])
def test_a_disk_that_fills_up_is_told_from_a_damaged_image(shape, sample, monkeypatch, capsys):
    write, image = calibration.write_image, pyvips.Image.new_from_array(texture(*shape))
    monkeypatch.setattr(calibration, "write_image", lambda *_: write(image, Path("/dev/full")))
    before = {path.name: path.read_bytes() for path in sample.iterdir()}
    assert calibrate(sample) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in sample.iterdir()} == before


def test_two_raw_images(sample, capsys):
    (sample / "he-raw.tif").write_bytes(LOSSLESS["tiff"]())
    refused(sample, capsys, "he-raw.png, he-raw.tif", "only one")


@pytest.mark.parametrize("name", ["he-raw.png", "pixel-size-raw.txt", "locs-raw.csv"])
def test_missing_inputs(name, sample, capsys):
    (sample / name).unlink()
    refused(sample, capsys, name.split(".")[0], "is missing")


@pytest.mark.parametrize(
    "text",
    ["", "0.5 0.5", "0,5", "0", "-0.5", "nan", "inf", "0.049", "3.72", "55", "half", "0_5"],
)
def test_bad_pixel_sizes(text, sample, capsys):
    (sample / "pixel-size-raw.txt").write_text(text)
    refused(sample, capsys, "pixel-size-raw.txt", repr(text), "0.05 and 2.5", "full resolution")


@pytest.mark.parametrize("text", ["", "0", "-3", "nan", "15.9", "1025", "27,5"])
def test_bad_radii(text, sample, capsys):
    (sample / "radius-raw.txt").write_text(text)
    refused(sample, capsys, "radius-raw.txt", repr(text), "16 and 1024", "8 to 512 um")


@pytest.mark.parametrize(
    ("table", "words"),
    [
        (",col,row\na,1,2\n", "expected a column x and y"),
        (",x,y\na,1,nan\nb,3,4\n", "data row 1"),
        (",x,y\na,1,2\nb,inf,4\n", "data row 2"),
        (",x,y\na,1,2\nb,far,4\n", "'far' for spot b, column x (data row 2)"),
        (",x,y\na,1,2\na,3,4\n", "lists the spots a more than once"),
        (",x,y\na,1,2\nb,1,2\n", "the place of another spot"),
        (",x,y\n", "no spot"),
    ],
)
def test_bad_spots(table, words, sample, capsys):
    (sample / "locs-raw.csv").write_text(table)
    refused(sample, capsys, "locs-raw.csv", words)


def test_a_hand_edited_output_is_kept(sample, capsys):
    assert calibrate(sample) == 0
    (sample / "locs.csv").write_text(",x,y\na,1,2\n")
    assert calibrate(sample) == 0
    assert "kept your locs.csv (--force makes a new one)" in capsys.readouterr().out
    assert calibrate(sample, "--max-megapixels", "100") == 2
    assert "locs.csv was edited by hand, and other options" in capsys.readouterr().err
    assert (sample / "locs.csv").read_text() == ",x,y\na,1,2\n"
    assert calibrate(sample, "--force") == 0


SMALL = Image.fromarray(texture(40, 60))
SEEDS = [
    encode(SMALL, "JPEG"), encode(SMALL, "PNG"), encode(SMALL, "TIFF", compression="tiff_lzw"),
    tiff(texture(40, 60), photometric="rgb", tile=(16, 16)), jpeg_tiles(texture(40, 60), 16),
]  # fmt: skip


@settings(max_examples=250, deadline=None)
@given(data=st.data())
def test_damaged_bytes_give_an_image_or_a_clear_error(data, tmp_path_factory):
    content = bytearray(data.draw(st.sampled_from(SEEDS)))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    directory = tmp_path_factory.getbasetemp()
    path = directory / "he-raw.tif"
    path.write_bytes(content[: data.draw(st.integers(1, len(content)))])
    stage = make_stage(directory, "--max-megapixels", "1")
    try:
        with calibration.decoding(stage, path):
            image = calibration.open_image(stage, path)
            array = pictures.to_rgb(image, path)[0].numpy()
    except utils.StageError as error:
        message, fits = str(error), True
    else:
        fits = array.shape == (image.height, image.width, 3) and array.dtype == np.uint8
        message = "he-raw.tif"
    assert fits
    assert "he-raw.tif" in message


# ----- spots and image ----------------------------------------------------------------------------
SHAPE = (2000, 3000)
SPOTS = hexagonal_spots(SHAPE, 200.0, 150.0)  # 100 um apart at 0.5 um per pixel


def test_right_coordinates_need_no_diagnosis():
    assert calibration.diagnose(SPOTS, SHAPE, 0.5) == ""
    assert calibration.diagnose(SPOTS, SHAPE, 1.0) == ""  # legacy ST
    assert calibration.diagnose(SPOTS[:1], SHAPE, 0.5) == ""
    jittered = SPOTS + np.random.default_rng(0).normal(0, 5, SPOTS.shape)
    assert calibration.diagnose(jittered, SHAPE, 0.5) == ""


def test_swapped_columns():
    text = calibration.diagnose(SPOTS[:, ::-1], SHAPE, 0.5)
    assert "With x and y swapped 100.0% lie inside" in text


def test_hires_image_with_coordinates_of_the_full_one():
    text = calibration.diagnose(SPOTS, (200, 300), 0.5)
    assert "8.5 times as far as the image" in text  # 90 % lie left of column 2550: 2550 / 300
    assert "hires" in text
    assert "100.0 um apart (200.0 px x 0.5 um), as they should be" in text


def test_hires_image_with_its_own_pixel_size():
    text = calibration.diagnose(SPOTS, (500, 750), 2.0)
    assert "hires" in text
    assert "400.0 um apart" in text
    assert "a factor of 2.0" in text
    assert "pixel size of 0.5 um (Visium) or 1 um (legacy ST)" in text


def test_another_image():
    text = calibration.diagnose(SPOTS - 300, SHAPE, 0.5)
    assert "another image, or he-raw was cropped or shifted" in text


def test_hires_coordinates_on_the_full_image():
    text = calibration.diagnose(SPOTS * 0.1, SHAPE, 0.5)
    assert "10.0 um apart (20.0 px x 0.5 um)" in text
    assert "a factor of 10.0" in text
    assert "pixel size of 5 um (Visium)" in text
    assert "only the upper left 8% of the image" in text


def test_wrong_pixel_size():
    text = calibration.diagnose(SPOTS, SHAPE, 2.2)
    assert "440.0 um apart" in text
    assert "a factor of 2.2" in text
    assert "upper left" not in text


@settings(max_examples=30, deadline=None)
@given(factor=st.floats(0.02, 50), pixel_size=st.floats(0.05, 2.5))
def test_the_suggested_pixel_size_is_right(factor, pixel_size):
    xy, shape = SPOTS * factor, (round(2000 * factor) + 1, round(3000 * factor) + 1)
    text = calibration.diagnose(xy, shape, pixel_size)
    pitch = 200 * factor * pixel_size
    usual = any(1 / 1.25 < pitch / known < 1.25 for known in (100, 200))
    assert (text == "") == usual
    if text:
        suggestion = float(text.split("pixel size of ")[1].split()[0])
        assert suggestion * 200 * factor == pytest.approx(100, rel=1e-3)
        assert calibration.diagnose(xy, shape, suggestion) == ""


def test_spots_at_the_edges():
    xy = np.array([[0, 0], [2999.9, 1999.9], [3000, 5], [5, 2000], [-0.1, 5], [5, -0.1]])
    assert calibration.inside(xy, SHAPE).tolist() == [True, True, False, False, False, False]


def test_a_pitch_of_another_platform_is_a_warning(sample, capsys):
    assert calibrate(sample) == 0  # the tiny sample has spots 50 um apart
    printed = capsys.readouterr().out
    assert "warning: The spots are 50.0 um apart" in printed
    assert "a factor of 2.0" in printed


def test_up_to_five_percent_may_be_outside_and_are_left_out(sample, capsys):
    """As prepare/ has it: what that accepts must not be refused here."""
    xy = hexagonal_spots((440, 660), 30.0, 20.0)[:200]
    xy[:10] += 5000
    table = pd.DataFrame(xy, columns=["x", "y"]).rename(index="s{}".format)
    table.to_csv(sample / "locs-raw.csv")
    assert calibrate(sample) == 0
    printed = capsys.readouterr().out
    assert "190 of 200 (95.0%)" in printed
    assert "note: 10 spots off the image are left out: s0, s1, s2, s3, s4, ..." in printed
    assert pd.read_csv(sample / "locs.csv", index_col=0).index.tolist() == table.index[10:].tolist()
    record = json.loads((sample / "image_calibration.json").read_text())
    assert (record["spots"], record["spots_inside"]) == (200, 190)
    table.iloc[10] += 5000
    table.to_csv(sample / "locs-raw.csv")
    words = ("puts 11 of 200 spots outside", "660 columns and 440 rows", "another image")
    refused(sample, capsys, "locs-raw.csv", *words)


def test_a_large_tiff_of_four_channels_is_no_bomb_to_pillow(tmp_path):
    """20,000 px of sides by its header: Pillow, asked what the fourth one is, must not stop."""
    path = tmp_path / "four.tif"
    tifffile.imwrite(path, np.zeros((16, 16, 4), np.uint8), photometric="rgb", extrasamples=[0])
    with tifffile.TiffFile(path, mode="r+b") as tiff:
        for name in ("ImageWidth", "ImageLength"):
            tiff.pages[0].tags[name].overwrite(20_000)
    code = "import sys, pathlib; from reading import pictures; path = pathlib.Path(sys.argv[1])\n"
    code += "print(pictures.fourth_has_no_meaning(pictures.pyvips.Image.tiffload(path), path))"
    command = [sys.executable, "-W", "error", "-c", code, str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("True\n", "")


def test_swapped_columns_stop_the_run(sample, capsys):
    table = pd.read_csv(sample / "locs-raw.csv", index_col=0)
    table.rename(columns={"x": "y", "y": "x"}).to_csv(sample / "locs-raw.csv")
    refused(sample, capsys, "locs-raw.csv", "With x and y swapped 100.0% lie inside")


# ----- real data ----------------------------------------------------------------------------------
@pytest.mark.skipif(not (REAL_DATA / "dev_kidney").is_dir(), reason="real sections are not at hand")
def test_kidney(tmp_path):
    """Enlarged four times: blurred and shrunk back, the image is the one that came in."""
    for name in ("he-raw.jpg", "pixel-size-raw.txt", "locs-raw.csv", "radius-raw.txt"):
        (tmp_path / name).write_bytes((REAL_DATA / "dev_kidney" / name).read_bytes())
    assert calibrate(tmp_path) == 0
    with Image.open(tmp_path / "he.jpg") as he, Image.open(tmp_path / "he-raw.jpg") as raw:
        assert he.size == (4704, 4704)
        back = he.crop((0, 0, 4492, 4492)).filter(ImageFilter.BoxBlur(1)).resize(raw.size)
        difference = np.abs(np.asarray(back).astype(int) - np.asarray(raw.convert("RGB")))
    assert difference.mean() < 4
    assert float((tmp_path / "radius.txt").read_text()) == pytest.approx(55, abs=0.01)
