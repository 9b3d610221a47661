"""prepare/slides.py: regions, levels and pixel sizes against arrays that the tests wrote."""

import errno
import functools
import struct
import zlib

import numpy as np
import pytest
import tifffile
from conftest import run_as_main
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import utils
from prepare import scans, slides

SHAPE = (1000, 1404)


def draw() -> np.ndarray:
    """Broad waves of colour with noise, so that any shift by a pixel shows."""
    rng = np.random.default_rng(0)
    row, col = np.mgrid[: SHAPE[0], : SHAPE[1]][..., None] / np.array([70, 90, 130])
    waves = 170 + 50 * np.sin(row + 1) * np.cos(col)
    return (waves + rng.integers(-20, 20, waves.shape)).astype(np.uint8)


@pytest.fixture(scope="module")
def picture():
    return draw()


def shrink(image: np.ndarray, factor: int) -> np.ndarray:
    """Means of factor x factor blocks, rounded; what does not fill a block is cut off."""
    h, w = (side // factor for side in image.shape[:2])
    blocks = image[: h * factor, : w * factor].reshape(h, factor, w, factor, 3)
    return np.round(blocks.mean((1, 3))).astype(np.uint8)


def write_pyramid(path, image, factors=(1, 2, 8), subifds=True, planar=False, ome=None, **options):
    """A TIFF of several levels; levels are not exact means but darker, to tell which was read."""
    options = {"photometric": "rgb", "tile": (256, 128), "compression": "zlib", **options}
    levels = [image if f == 1 else shrink(image, f) // 2 for f in factors]
    if planar:
        levels = [np.moveaxis(level, 2, 0) for level in levels]
        options["planarconfig"] = "separate"
    with tifffile.TiffWriter(path, bigtiff=True, ome=ome is not None) as tiff:
        if subifds:
            tiff.write(levels[0], subifds=len(levels) - 1, metadata=ome, **options)
        else:
            tiff.write(levels[0], metadata=ome, **options)
        for level in levels[1:]:
            tiff.write(level, subfiletype=1, metadata=None, **options)
    return path


def test_every_layout_of_a_tiff_gives_the_pixels_that_were_written(picture, tmp_path):
    layouts = {
        "tiled": {"tile": (256, 256), "photometric": "rgb"},
        "stripped": {"rowsperstrip": 64, "photometric": "rgb", "compression": "lzw"},
        "whole": {"photometric": "rgb"},
        "predictor": {"tile": (128, 128), "photometric": "rgb", "predictor": True},
    }
    layouts["predictor"]["compression"] = "zlib"
    for name, options in layouts.items():
        tifffile.imwrite(tmp_path / f"{name}.tif", picture, metadata=None, **options)
    planes = np.moveaxis(picture, 2, 0)
    tifffile.imwrite(
        tmp_path / "planar.tif", planes, photometric="rgb", planarconfig="separate", tile=(256, 256)
    )
    tifffile.imwrite(  # three grey pages, as older OME-TIFF of Xenium sections
        tmp_path / "pages.ome.tif", planes, photometric="minisblack", tile=(256, 256),
        metadata={"axes": "CYX"},
    )  # fmt: skip
    tifffile.imwrite(tmp_path / "big.btf.tif", picture, photometric="rgb", bigtiff=True)
    tifffile.imwrite(tmp_path / "motorola.tif", picture, photometric="rgb", byteorder=">")
    written = sorted(tmp_path.glob("*.tif"))
    assert len(written) == 8
    for path in written:
        with scans.open_slide(path) as slide:
            assert slide.size == (SHAPE[1], SHAPE[0])
            assert slide.downsamples == (1,)
            np.testing.assert_array_equal(
                slide.read_region(301, 201, 517, 433), picture[201:634, 301:818], err_msg=path.name
            )
            np.testing.assert_array_equal(slide.read_region(0, 0, *slide.size), picture)


@pytest.mark.parametrize("subifds", [True, False])
@pytest.mark.parametrize("planar", [True, False])
def test_pyramids_are_read_at_the_level_that_serves(picture, tmp_path, subifds, planar):
    path = write_pyramid(tmp_path / "p.tif", picture, subifds=subifds, planar=planar)
    with scans.open_slide(path) as slide:
        assert slide.downsamples == (1, 2, 8)
        whole = slide.read_region(0, 0, *slide.size, 1)
        np.testing.assert_array_equal(whole, picture)
        second = shrink(picture, 2) // 2
        np.testing.assert_array_equal(slide.read_region(0, 0, *slide.size, 2), second)
        part = slide.read_region(128, 64, 640, 320, 2)
        np.testing.assert_array_equal(part, second[32:192, 64:384])
        fourth = slide.read_region(0, 0, *slide.size, 4)  # from level 2, not from 1
        assert np.abs(fourth.astype(int) - shrink(second, 2)).max() <= 1
        third = slide.read_region(0, 0, *slide.size, 3)  # 2 does not divide 3: from level 1
        assert np.abs(third.astype(int) - shrink(picture, 3)).max() <= 1
        assert [slide.best_level(d) for d in (1, 2, 3, 4, 7, 8, 16, 17, 64, 65)] == [
            1, 2, 1, 2, 1, 8, 8, 2, 8, 8,
        ]  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(
    x=st.integers(-50, 1450), y=st.integers(-50, 1050), width=st.integers(1, 300),
    height=st.integers(1, 300), downsample=st.sampled_from([1, 2, 3, 5]),
)  # fmt: skip
def test_any_region_is_that_of_the_white_padded_image(x, y, width, height, downsample):
    slide, pad = whole_slide(), 400
    found = slide.read_region(x, y, width, height, downsample)
    part = slide.padded[y + pad : y + pad + height, x + pad : x + pad + width]
    expected = shrink(part, downsample)
    assert found.shape == expected.shape
    assert found.size == 0 or np.abs(found.astype(int) - expected).max() <= 1


class Kept(scans.Slide):
    """A slide in memory, of one level."""

    def __init__(self, image):
        self.image = image
        self.padded = np.pad(image, ((400, 400), (400, 400), (0, 0)), constant_values=255)
        super().__init__(None, [image.shape[1::-1]], None)

    def read_level(self, level, x, y, width, height):
        rows, columns = self.image.shape[:2]
        assert 0 <= x < x + width <= columns
        assert 0 <= y < y + height <= rows
        return self.image[y : y + height, x : x + width]


@functools.cache
def whole_slide():
    return Kept(draw())


def test_strips_join_to_the_whole_image(picture, tmp_path):
    path = write_pyramid(tmp_path / "p.tif", picture)
    with scans.open_slide(path) as slide:
        for step in (1, 2, 4):
            width, height = (side // step * step for side in slide.size)
            whole = slide.read_region(0, 0, width, height, step)
            strips = [
                slide.read_region(0, top, width, min(120, height - top), step)
                for top in range(0, height, 120)
            ]
            np.testing.assert_array_equal(np.concatenate(strips), whole)


def test_blocks_bound_the_memory_and_change_nothing(picture, tmp_path, monkeypatch):
    path = write_pyramid(tmp_path / "p.tif", picture, factors=(1,))
    with scans.open_slide(path) as slide:
        whole = slide.read_region(0, 0, *slide.size, 5)
        monkeypatch.setattr(scans, "BLOCK_PIXELS", 50_000)
        read = []
        monkeypatch.setattr(
            slide, "read_level",
            lambda *box: read.append(box[3] * box[4]) or scans.TiffSlide.read_level(slide, *box),
        )  # fmt: skip
        np.testing.assert_array_equal(slide.read_region(0, 0, *slide.size, 5), whole)
    assert len(read) > 10
    assert max(read) <= 50_000


def test_only_the_tiles_of_a_region_are_read_and_the_cache_is_bounded(
    picture, tmp_path, monkeypatch
):
    path = write_pyramid(tmp_path / "p.tif", picture)
    with scans.open_slide(path) as slide:
        decoded = []
        page = slide.pages[0][0]
        decode = page.decode
        monkeypatch.setattr(
            page,
            "decode",
            lambda data, index, **kw: decoded.append(index) or decode(data, index, **kw),
        )
        slide.read_region(130, 10, 120, 240)
        assert decoded == [1]  # the second tile of 128 columns
        slide.read_region(130, 10, 120, 240)
        assert decoded == [1]
        monkeypatch.setattr(scans, "CACHE_BYTES", 4 * 256 * 128 * 3)
        slide.read_region(0, 0, *slide.size)
        assert slide.cached == sum(s.nbytes for s in slide.cache.values()) <= scans.CACHE_BYTES


def test_thumbnail_keeps_the_proportions_and_uses_a_coarse_level(picture, tmp_path):
    path = write_pyramid(tmp_path / "p.tif", picture)
    with scans.open_slide(path) as slide:
        small = slide.thumbnail(175)
        assert small.shape == (111, 156, 3)  # shrunk 9 times
        tiny = slide.thumbnail(20)
        assert max(tiny.shape) <= 20
        assert tiny.mean() == pytest.approx(picture.mean() / 2, abs=3)  # the darker level 8
        assert slide.thumbnail(10_000).shape == picture.shape


def test_jpeg_tiles_grey_alpha_and_sparse_tiles(picture, tmp_path):
    tifffile.imwrite(
        tmp_path / "jpeg.tif", picture, photometric="rgb", tile=(256, 256),
        compression="jpeg", compressionargs={"level": 95}, subsampling=(1, 1),
    )  # fmt: skip
    grey = picture[..., 0]
    tifffile.imwrite(tmp_path / "grey.tif", grey, photometric="minisblack", tile=(256, 256))
    alpha = np.full((*SHAPE, 1), 255, np.uint8)
    alpha[:100] = 0
    alpha[100:200] = 51
    tifffile.imwrite(
        tmp_path / "alpha.tif", np.concatenate([picture, alpha], 2), photometric="rgb",
        extrasamples=["unassalpha"], tile=(256, 256),
    )  # fmt: skip
    with scans.open_slide(tmp_path / "jpeg.tif") as slide:
        error = slide.read_region(0, 0, *slide.size).astype(int) - picture
        assert np.abs(error).mean() < 4
        with Image.open(tmp_path / "jpeg.tif") as image:
            assert np.abs(error + picture - np.asarray(image.convert("RGB"))).max() <= 1
    with scans.open_slide(tmp_path / "grey.tif") as slide:
        np.testing.assert_array_equal(
            slide.read_region(5, 6, 70, 80), np.repeat(grey[6:86, 5:75, None], 3, 2)
        )
    with scans.open_slide(tmp_path / "alpha.tif") as slide:
        found = slide.read_region(0, 0, *slide.size)
        assert (found[:100] == 255).all()
        blend = picture[100:200] * 0.2 + 255 * 0.8
        assert np.abs(found[100:200] - blend).max() <= 0.51
        np.testing.assert_array_equal(found[200:], picture[200:])
        slide.pages[0][0].dataoffsets, slide.pages[0][0].databytecounts = (
            [0] * len(slide.pages[0][0].dataoffsets),
            [0] * len(slide.pages[0][0].dataoffsets),
        )
        slide.cache.clear()
        assert (slide.read_region(0, 0, 300, 300) == 255).all()  # tiles that were never written


def test_a_fourth_channel_that_is_no_alpha_is_left_out(picture, tmp_path):
    """Else all of this would be white."""
    path = tmp_path / "four.tif"
    four = np.concatenate([picture, np.zeros((*SHAPE, 1), np.uint8)], 2)
    options = {"photometric": "rgb", "tile": (256, 256), "extrasamples": ["unspecified"]}
    tifffile.imwrite(path, four, **options)
    with scans.open_slide(path) as slide:
        np.testing.assert_array_equal(slide.read_region(0, 0, *slide.size), picture)


UNITS = [("nm", 250.0), ("\u00b5m", 0.25), ("\u03bcm", 0.25), ("mm", 2.5e-4), ("cm", 2.5e-5)]
UNITS += [("m", 2.5e-7), ("\u00c5", 2500.0), ("in", 0.25 / 25_400)]


def ome_xml(unit, size, width, height, samples):
    """As Bio-Formats and QuPath write it: one channel of three samples, or three channels."""
    channels = "".join(
        f'<Channel ID="Channel:0:{i}" SamplesPerPixel="{samples}"><LightPath/></Channel>'
        for i in range(3 // samples)
    )
    data = "".join(
        f'<TiffData FirstC="{i}" FirstT="0" FirstZ="0" IFD="{i}" PlaneCount="1"/>'
        for i in range(3 // samples)
    )
    return (
        '<?xml version="1.0" encoding="UTF-8" standalone="no"?><!-- Warning: this comment is an '
        'OME-XML metadata block --><OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06" '
        'Creator="OME Bio-Formats 7.3.1"><Image ID="Image:0" Name="scan"><Pixels BigEndian="false" '
        f'DimensionOrder="XYCZT" ID="Pixels:0" Interleaved="{str(samples == 3).lower()}" '
        f'PhysicalSizeX="{size!r}" PhysicalSizeXUnit="{unit}" PhysicalSizeY="{size!r}" '
        f'PhysicalSizeYUnit="{unit}" SignificantBits="8" SizeC="3" SizeT="1" SizeX="{width}" '
        f'SizeY="{height}" SizeZ="1" Type="uint8">{channels}{data}</Pixels></Image></OME>'
    ).encode()


@pytest.mark.parametrize(("unit", "size"), UNITS)
@pytest.mark.parametrize(
    ("axes", "compression"),
    [("YXC", "jpeg2000"), ("CYX", "jpeg2000"), ("planes", "zlib"), ("YXC", "lzw")],
)
def test_ome_tiff_of_bio_formats_qupath_and_xenium_explorer(
    picture, tmp_path, unit, size, axes, compression
):
    """Samples together, on planes of one page, or a page each; a pyramid in SubIFDs."""
    path = tmp_path / "scan.ome.tif"
    levels = [picture[:512, :768], shrink(picture[:512, :768], 2)]
    options = {"tile": (256, 256), "compression": compression, "photometric": "rgb"}
    if axes != "YXC":
        levels = [np.ascontiguousarray(np.moveaxis(level, 2, 0)) for level in levels]
        options |= {"planarconfig": "separate"}
    if axes == "CYX":
        options |= {"photometric": "minisblack", "planarconfig": None}
    xml = ome_xml(unit, size, 768, 512, 1 if axes == "CYX" else 3)
    with tifffile.TiffWriter(path, bigtiff=True) as tiff:
        planes = zip(*levels, strict=True) if axes == "CYX" else [levels]
        for number, (full, half) in enumerate(planes):
            text = xml if number == 0 else None
            tiff.write(full, subifds=1, description=text, metadata=None, **options)
            tiff.write(half, subfiletype=1, metadata=None, **options)
    with scans.open_slide(path) as slide:
        assert slide.size == (768, 512)
        assert slide.downsamples == (1, 2)
        assert slide.pixel_size_um == pytest.approx(0.25)
        np.testing.assert_array_equal(slide.read_region(0, 0, 768, 512), picture[:512, :768])
        half = shrink(picture[:512, :768], 2)
        np.testing.assert_array_equal(slide.read_region(0, 0, 768, 512, 2), half)


def test_openslide_reads_the_same_pixels(picture, tmp_path):
    """A tiled TIFF under a scanner's suffix goes through OpenSlide, whose own reader is the
    reference for ours."""
    path = write_pyramid(
        tmp_path / "a.svs", picture, subifds=False, tile=(256, 256), compression="lzw",
        resolution=(1e4 / 0.25, 1e4 / 0.25), resolutionunit="CENTIMETER",
    )  # fmt: skip
    (tmp_path / "a.tif").write_bytes(path.read_bytes())
    with scans.open_slide(path) as one, scans.open_slide(tmp_path / "a.tif") as two:
        assert isinstance(one, scans.OpenSlideSlide)
        assert isinstance(two, scans.TiffSlide)
        assert one.size == two.size == SHAPE[::-1]
        assert one.downsamples == two.downsamples == (1, 2, 8)
        assert one.pixel_size_um == pytest.approx(0.25, rel=1e-3)
        assert two.pixel_size_um == pytest.approx(0.25, rel=1e-3)
        for box in ((0, 0, *SHAPE[::-1], 1), (300, 200, 512, 256, 2), (64, 64, 1024, 640, 8)):
            np.testing.assert_array_equal(one.read_region(*box), two.read_region(*box))
        np.testing.assert_array_equal(one.read_region(0, 0, *SHAPE[::-1]), picture)
        outside = one.read_region(SHAPE[1] - 10, SHAPE[0] - 10, 30, 30)
        assert (outside[10:] == 255).all()
        np.testing.assert_array_equal(outside[:10, :10], picture[-10:, -10:])


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({"PhysicalSizeX": 0.2737, "PhysicalSizeY": 0.2737}, 0.2737),
        ({"PhysicalSizeX": 0.2737, "PhysicalSizeXUnit": "µm", "PhysicalSizeY": 0.2737}, 0.2737),
        ({"PhysicalSizeX": 273.7, "PhysicalSizeXUnit": "nm"}, 0.2737),
        ({"PhysicalSizeX": 2.737e-4, "PhysicalSizeXUnit": "mm"}, 0.2737),
        ({"PhysicalSizeX": 1.0, "PhysicalSizeXUnit": "pixel"}, None),
        ({"PhysicalSizeX": 0.25, "PhysicalSizeY": 0.5}, None),
        ({}, None),
        ({"PhysicalSizeX": 25.0}, None),
    ],
)
def test_pixel_size_of_ome_tiff_with_its_unit(tmp_path, metadata, expected):
    image = np.full((300, 300, 3), 200, np.uint8)
    path = tmp_path / "a.ome.tif"
    tifffile.imwrite(path, image, photometric="rgb", metadata={"axes": "YXS", **metadata})
    with scans.open_slide(path) as slide:
        assert slide.pixel_size_um == (expected and pytest.approx(expected))


@pytest.mark.parametrize(
    ("resolution", "unit", "expected"),
    [
        ((1e4 / 0.5, 1e4 / 0.5), "CENTIMETER", 0.5),
        ((25_400 / 0.5, 25_400 / 0.5), "INCH", 0.5),
        ((72, 72), "INCH", None),
        ((96, 96), "INCH", None),
        ((1e4 / 0.5, 1e4 / 0.6), "CENTIMETER", None),
        ((2, 2), "NONE", None),
    ],
)
def test_pixel_size_of_tiff_resolution_only_if_a_microscope_could_have_it(
    tmp_path, resolution, unit, expected
):
    path = tmp_path / "a.tif"
    image = np.full((300, 300, 3), 200, np.uint8)
    tifffile.imwrite(
        path, image, photometric="rgb", resolution=resolution, resolutionunit=unit, metadata=None
    )
    with scans.open_slide(path) as slide:
        assert slide.pixel_size_um == (expected and pytest.approx(expected, rel=1e-4))


def test_pictures_are_read_as_stored(picture, tmp_path):
    Image.fromarray(picture).save(tmp_path / "a.png", compress_level=1, dpi=(96, 96))
    Image.fromarray(picture).save(tmp_path / "a.jpg", quality=90)
    with scans.open_slide(tmp_path / "a.png") as slide:
        assert slide.size == SHAPE[::-1]
        assert slide.pixel_size_um is None
        assert max(slide.thumbnail(100).shape) == 100
        np.testing.assert_array_equal(slide.read_region(7, 8, 90, 91), picture[8:99, 7:97])
    with scans.open_slide(tmp_path / "a.jpg") as slide, Image.open(tmp_path / "a.jpg") as image:
        np.testing.assert_array_equal(
            slide.read_region(0, 0, *slide.size), np.asarray(image.convert("RGB"))
        )


def turned(path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (300, 240)).save(path, exif=exif)


def turned_tiff(path):
    tag = (274, "H", 1, 3, True)
    tifffile.imwrite(path, np.zeros((300, 300, 3), np.uint8), photometric="rgb", extratags=[tag])


def large(path):
    """A PNG of 60,000 px sides by its header, with nothing in it."""
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(bytes(9))), (b"IEND", b""))
    chunks = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in parts
    ]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))


def one_piece(path):
    tifffile.imwrite(path, np.zeros((16, 16, 3), np.uint8), photometric="rgb", compression="zlib")
    with tifffile.TiffFile(path, mode="r+b") as tiff:
        for name in ("ImageWidth", "ImageLength", "RowsPerStrip"):
            tiff.pages[0].tags[name].overwrite(60_000)


def few_tiles(path):
    tifffile.imwrite(path, np.zeros((512, 512, 3), np.uint8), photometric="rgb", tile=(256, 256))
    with tifffile.TiffFile(path, mode="r+b") as tiff:
        for name in ("ImageWidth", "ImageLength"):
            tiff.pages[0].tags[name].overwrite(4_000_000_000)


def save(values, **options):
    def write(path):
        options.setdefault("photometric", "rgb")
        metadata = {"axes": "TYXS"[-values.ndim :]}
        tifffile.imwrite(path, values, metadata=metadata, ome=True, **options)

    return write


def several_files(path):
    """Xenium's morphology_focus: one OME-XML says that the channels lie in a file each."""
    paths = [path.with_name(f"{letter}.ome.tif") for letter in "abc"]
    data = "".join(
        f'<TiffData FirstC="{i}" PlaneCount="1"><UUID FileName="{p.name}">urn:uuid:{i}</UUID>'
        f"</TiffData>"
        for i, p in enumerate(paths)
    )
    for i, place in enumerate(paths):
        xml = (
            f'<?xml version="1.0"?><OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06" '
            f'UUID="urn:uuid:{i}"><Image ID="Image:0"><Pixels ID="P:0" DimensionOrder="XYCZT" '
            f'Type="uint8" SizeX="300" SizeY="300" SizeC="3" SizeZ="1" SizeT="1">{data}'
            f"</Pixels></Image></OME>"
        )
        plane = np.zeros((300, 300), np.uint8)
        tifffile.imwrite(place, plane, description=xml, metadata=None, ome=False)


STACK = np.zeros((3, 300, 300, 3), np.uint8)


def fluorescence(path):
    tifffile.imwrite(path, np.zeros((300, 300), np.uint16), tile=(256, 256))


def four_planes(path):
    """Four stains, of which the last one is no alpha."""
    tifffile.imwrite(path, np.zeros((4, 300, 300), np.uint8), photometric="minisblack")


def five_channels(path):
    tifffile.imwrite(path, np.zeros((5, 300, 300), np.uint8), photometric="minisblack")


def odd_orientation(path):
    tifffile.imwrite(path, STACK[0], photometric="rgb", extratags=[(274, "H", 1, 9, True)])


@pytest.mark.parametrize(
    ("name", "write", "words"),
    [
        ("a.jpg", turned, "EXIF orientation 6"),
        ("a.tif", turned_tiff, "EXIF orientation 3"),
        ("a.png", large, "60000 x 60000 px; JPEG and PNG"),
        ("a.tif", one_piece, "60000 x 60000 px in one piece"),
        ("a.tif", few_tiles, "tiles or strips declared, 4 there"),
        ("a.tif", fluorescence, "uint16"),
        ("a.ome.tif", save(STACK[0].astype(np.uint16)), "3 channels of uint16, RGB"),
        ("a.ome.tif", save(STACK[0].astype(np.float32)), "3 channels of float32, RGB"),
        ("a.ome.tif", save(STACK), "stack of several images"),
        ("a.ome.tif", several_files, "in several files"),
        ("b.ome.tif", several_files, "in several files"),
        ("a.tif", four_planes, "4 channels of uint8, MINISBLACK"),
        ("a.tif", five_channels, "5 channels"),
        ("a.tif", lambda path: path.write_bytes(b"II*\0" + b"\7" * 60), "no whole slide"),
        ("a.png", lambda path: path.write_bytes(b"hello"), "no whole slide"),
        ("a.svs", lambda path: path.write_bytes(b"hello"), "no whole slide"),
        ("a.jpg", lambda path: None, "is missing"),
        ("a.jpg", lambda path: Image.new("RGB", (300, 300)).save(path, "WEBP"), "is a WebP image"),
        ("a.tif", odd_orientation, "has orientation 9, which no standard knows"),
    ],
)
def test_what_is_no_histology_is_refused(tmp_path, name, write, words):
    write(tmp_path / name)
    with pytest.raises(utils.StageError, match=words) as error:
        scans.open_slide(tmp_path / name)
    assert str(tmp_path / name) in str(error.value)


def test_a_tile_that_is_damaged_or_cut_off_is_an_error_never_grey(picture, tmp_path):
    path = write_pyramid(tmp_path / "p.tif", picture, factors=(1,))
    with scans.open_slide(path) as slide:
        offsets = slide.pages[0][0].dataoffsets
    whole = path.read_bytes()
    path.write_bytes(whole[: offsets[5] + 3] + b"\xff" * 200 + whole[offsets[5] + 203 :])
    with scans.open_slide(path) as slide, pytest.raises(utils.StageError, match="cannot be dec"):
        slide.read_region(0, 0, *slide.size)
    late = max(offsets)
    if late > whole.rfind(zlib.compress(b"")[:2]):
        late = offsets[-1]
    with scans.open_slide(path) as slide:
        page = slide.pages[0][0]
        page.dataoffsets = [*offsets[:-1], len(whole) - 5]
        with pytest.raises(utils.StageError, match="is cut off"):
            slide.read_region(SHAPE[1] - 20, SHAPE[0] - 20, 20, 20)


# ---------------------------------------------------------------------------------------- command
def test_the_command_cuts_a_region_at_half_a_micrometre(picture, tmp_path, capsys):
    options = {"resolution": (1e4 / 0.25, 1e4 / 0.25), "resolutionunit": "CENTIMETER"}
    path = write_pyramid(tmp_path / "slide.tif", picture, factors=(1,), **options)
    target = tmp_path / "section A"
    region = ("--region", 100, 40, 1203, 901)
    words = ("--image", path, "--directory", target, *region)
    assert run_as_main("prepare/slides.py", *words) == 0
    assert "(x - 100) / 2, (y - 40) / 2" in capsys.readouterr().out
    assert float((target / "pixel-size-raw.txt").read_text()) == pytest.approx(0.5)
    found = tifffile.imread(target / "he-raw.tif").astype(int)
    assert np.abs(found - shrink(picture[40:941, 100:1303], 2)).max() <= 1
    there = ["he-raw.tif", "pixel-size-raw.txt", "prepare.json"]
    assert sorted(p.name for p in target.iterdir()) == there
    old = (target / "he-raw.tif").read_bytes()
    again = ["--image", str(path), "--directory", str(target)]
    (target / "he-raw.tif").rename(target / "he-raw.tiff")
    assert slides.run(again) == 2  # it may be the user's own
    assert (target / "he-raw.tiff").read_bytes() == old
    assert slides.run([*again, "--force"]) == 0
    assert sorted(p.name for p in target.iterdir()) == there
    assert tifffile.imread(target / "he-raw.tif").shape == (500, 702, 3)
    assert slides.run([*again, "--region", "0", "0", "900", "700"]) == 0  # our own is replaced
    assert tifffile.imread(target / "he-raw.tif").shape == (350, 450, 3)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((), "does not say its pixel size"),
        (("--pixel-size", "0.5", "--region", "900", "0", "600", "500"), "does not lie within"),
        (("--pixel-size", "0.5", "--region", "0", "0", "600", "200"), "less than a tile"),
        (("--pixel-size", "0.125", "--region", "0", "0", "800", "900"), "less than a tile"),
    ],
)
def test_the_command_refuses_and_writes_nothing(picture, tmp_path, capsys, options, words):
    Image.fromarray(picture).save(tmp_path / "a.png", compress_level=1)
    target = tmp_path / "sample"
    assert (
        slides.run(["--image", str(tmp_path / "a.png"), "--directory", str(target), *options]) == 2
    )
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert words in message
    assert not target.exists()


def test_a_full_disk_ends_with_2_and_leaves_nothing(picture, tmp_path, capsys, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device", str(tmp_path))

    tifffile.imwrite(tmp_path / "a.tif", picture, photometric="rgb")
    monkeypatch.setattr(scans, "write_tiff", fail)
    options = ["--image", str(tmp_path / "a.tif"), "--directory", str(tmp_path / "s")]
    assert slides.run([*options, "--pixel-size", "0.5"]) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    ("pixel_size", "factor"),
    [(0.5, 1), (0.25, 2), (0.2527, 2), (0.2628, 1), (0.125, 4), (0.0883, 5), (0.9, 1), (0.2125, 2)],
)
def test_the_factor_keeps_the_image_about_as_fine_as_half_a_micrometre(pixel_size, factor):
    assert scans.whole_factor(pixel_size) == factor


def test_levels_are_the_copies_shrunk_by_whole_factors():
    """A second copy of one size, one of another shape and an empty one are passed over."""
    sizes = [(1000, 800), (1000, 800), (500, 400), (500, 300), (249, 200), (0, 0)]
    assert scans.usable_levels(sizes) == {1: 0, 2: 2, 4: 4}


@pytest.mark.parametrize("xml", ["<OME/>", "<OME", '<OME><Pixels SizeX="5"/></OME>'])
def test_metadata_without_pixels_tell_no_pixel_size(xml):
    assert scans.ome_pixel_size(xml, 5) is None


def test_tiles_are_those_of_the_image_and_white_beyond_it():
    image = np.random.default_rng(0).integers(0, 255, (700, 530, 3), dtype=np.uint8)
    found = list(scans.tiles(image))
    assert {tile.shape for tile in found} == {(512, 512, 3)}
    whole = np.vstack([np.hstack(found[:2]), np.hstack(found[2:])])
    np.testing.assert_array_equal(whole[:700, :530], image)
    assert (whole[700:] == 255).all()
    assert (whole[:, 530:] == 255).all()


def test_an_error_of_the_disk_is_not_said_to_be_damage(monkeypatch):
    def fail(*_):
        raise OSError(errno.EIO, "of the disk")

    monkeypatch.setattr(whole_slide(), "read_level", fail)
    with pytest.raises(OSError, match="of the disk"):
        whole_slide().read_region(0, 0, 8, 8)


def test_a_slide_without_pixels_is_damaged(tmp_path):
    with pytest.raises(utils.StageError, match="has no pixels: its header tells 0 x 7"):
        scans.Slide(tmp_path / "slide.tif", [(0, 7)], None)
