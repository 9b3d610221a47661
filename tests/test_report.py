"""analysis/report.py: what the page holds, and how it behaves in a real browser."""

import base64
import hashlib
import io
import json
import math
import os
import pickle
import re
import shutil
import zlib
from html.parser import HTMLParser
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pandas as pd
import pytest
from conftest import run_alone, write_record
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image
from skimage.color import rgb2lab

import utils
from analysis import charts, inputs, report, report_maps
from analysis import page as page_parts
from analysis.spots import disc_weights
from writing import disk

# ----- a section whose page is known -----
SHAPE = (42, 56)  # superpixels
RADIUS = 3.4375  # superpixels: Visium
HOSTILE = """</script ><img src=x onerror="pwned=1">'&{{data}}{% x %}"""
GENES = ["KRT8", "NA", HOSTILE, "FLAT"]
PINK, BLUE = (230, 150, 190), (90, 80, 160)  # the left and the right half of the image


def make_maps() -> np.ndarray:
    """Maps (rows, columns, genes) that differ between all superpixels; a corner has no tissue."""
    row, col = np.mgrid[: SHAPE[0], : SHAPE[1]] / 10
    maps = np.stack(
        [
            9 * np.exp(np.sin(1.3 * row) + np.cos(0.7 * col)),
            0.01 * (row + col**2),
            5 + np.sin(row * col),
            np.full(SHAPE, 2.5),
        ],
        axis=2,
    ).astype(np.float32)
    maps[(row + col) * 10 < 18] = np.nan
    return maps


def make_regions() -> np.ndarray:
    regions = np.zeros(SHAPE, np.uint16)
    regions[20:, :28], regions[20:, 28:] = 1, 3
    return regions


def write_section(directory):
    (directory / "cnts-super").mkdir(parents=True)
    maps, rng = make_maps(), np.random.default_rng(0)
    for i in range(len(GENES)):
        np.save(directory / "cnts-super" / f"{i}.npy", maps[..., i])
    index = pd.DataFrame({"gene": GENES, "file": [f"{i}.npy" for i in range(len(GENES))]})
    index.to_csv(directory / "cnts-super" / "index.csv", index=False)
    image = np.full((SHAPE[0] * 16, SHAPE[1] * 16, 3), PINK, np.uint8)
    image[:, SHAPE[1] * 8 :] = BLUE
    Image.fromarray(image).save(directory / "he.jpg", quality=100)
    row, col = np.mgrid[6 : SHAPE[0] - 4 : 12, 6 : SHAPE[1] - 4 : 12] + 0.25
    centres = np.column_stack([row.ravel(), col.ravel()])
    ids = [f"{i:03d}" for i in range(len(centres))]
    locs = pd.DataFrame(centres[:, ::-1] * 16, index=ids, columns=["x", "y"])
    locs.to_csv(directory / "locs.csv")
    (directory / "radius.txt").write_text(f"{RADIUS * 16}\n")
    sums = disc_weights(centres, RADIUS, SHAPE) @ np.nan_to_num(maps).reshape(-1, len(GENES))
    pd.DataFrame(rng.poisson(sums), index=ids, columns=GENES).to_csv(directory / "cnts.csv")
    held_out = pd.DataFrame({"gene": GENES, "held_out_r": [0.71, 0.64, -0.2, np.nan]})
    held_out.to_csv(directory / "held-out-r.csv", index=False)
    for state in ("00", "01"):
        (directory / "states" / state).mkdir(parents=True)
        (directory / "states" / state / "history.csv").write_text(
            "epoch,train_loss,learning_rate,held_out_loss\n1,0.9,0.1,0.8\n2,0.5,0.1,0.55\n"
            f"3,0.4{state},0.1,0.6\n"
        )
    np.save(directory / "segments.npy", make_regions())
    return directory


def write_layers(directory):
    """A standard deviation of a quarter of each map, an annotation, and three cells."""
    (directory / "cnts-super-sd").mkdir()
    shutil.copy(directory / "cnts-super" / "index.csv", directory / "cnts-super-sd")
    for i, image in enumerate(np.moveaxis(make_maps(), 2, 0)):
        np.save(directory / "cnts-super-sd" / f"{i}.npy", image / 4)
    annotation = np.full(SHAPE, 2, np.uint8)
    annotation[:, :10] = 1
    np.save(directory / "annotation.npy", annotation)
    (directory / "annotation.csv").write_text(
        "label,name,colour\n1,tumour,#ff0000\n2,stroma <b>,#0000ff\n3,unclassified,#bdbdbd\n"
    )
    size = [SHAPE[0] * 16, SHAPE[1] * 16]
    sizes = {"raw_size": [side * 2 for side in size], "scaled_size": size, "size": size}
    write_record(directory, utils.CALIBRATION, [], ["he.jpg", "locs.csv", "radius.txt"], **sizes)
    rows = [(40.5, 5.5, 300, "tumour"), (8, 8, 64, "tumour"), (20, 20, 64, "")]  # superpixels
    table = [(i, x * 32, y * 32, area, 1, kind, 0) for i, (x, y, area, kind) in enumerate(rows)]
    columns = ["cell", "x", "y", "area_um2", "share_on_tissue", "class", "KRT8"]
    pd.DataFrame(table, columns=columns).to_csv(directory / "cells.csv.gz", index=False)


@pytest.fixture(scope="module")
def _section(tmp_path_factory):
    return write_section(tmp_path_factory.mktemp("report") / 'section "A" <b>&')


@pytest.fixture
def section(_section, tmp_path):
    return shutil.copytree(_section, tmp_path / _section.name)


def write_page(directory, *options) -> str:

    assert report.run(["--directory", str(directory), *options]) == 0
    return (directory / "report.html").read_text(encoding="utf-8")


class Page(HTMLParser):
    """The tags of a page, its visible text, and what its <script> elements hold, by id."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags, self.scripts, self.text, self.inside = [], {}, "", None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.inside = tag
        if tag == "script":
            self.script = dict(attributes).get("id", "code")
            self.scripts[self.script] = ""

    def handle_endtag(self, tag):
        self.inside = None

    def handle_data(self, text):
        if self.inside == "script":
            self.scripts[self.script] += text
        elif self.inside != "style":
            self.text += f" {text}"

    def map_of(self, i: int) -> np.ndarray:
        """The map that the page holds, by the formula it gives."""
        gene = json.loads(self.scripts[f"gene-{i}"])
        return map_in(gene)


def map_in(gene: dict) -> np.ndarray:
    """The map (rows, columns) of a gene's facts: each byte adds the mean of two neighbours."""
    steps = np.frombuffer(zlib.decompress(base64.b64decode(gene["codes"])), np.uint8)
    steps = steps.reshape(SHAPE).astype(int)
    codes = np.zeros((SHAPE[0] + 1, SHAPE[1] + 1), int)
    for row, column in np.ndindex(SHAPE):
        neighbours = (codes[row + 1, column] + codes[row, column + 1]) // 2
        codes[row + 1, column + 1] = (steps[row, column] + neighbours) % 256
    codes = codes[1:, 1:]
    values = gene["low"] + (codes - 1) / (gene["levels"] - 1) * (gene["high"] - gene["low"])
    return np.where(codes == 0, np.nan, values)


# ----- numbers -----
@given(arrays(np.float32, (3, 4), elements=st.floats(-10, 1e6, width=32) | st.just(np.nan)))
def test_a_map_is_stored_to_half_a_step_of_255(image):
    codes, low, high = report_maps.quantise(image)
    np.testing.assert_array_equal(codes == 0, np.isnan(image))
    decoded = low + (codes.astype(float) - 1) / 254 * (high - low)
    there = codes > 0
    assert np.abs(decoded - image)[there].max(initial=0) <= (high - low) / 508 * 1.0001


def test_a_map_without_any_value_or_with_infinities_is_stored_without_them():
    codes, low, high = report_maps.quantise(np.full((2, 2), np.nan, np.float32))
    assert (codes.max(), low, high) == (0, 0, 0)
    codes, low, high = report_maps.quantise(np.array([[np.inf, 1], [3, -np.inf]], np.float32))
    np.testing.assert_array_equal(codes, [[0, 1], [255, 0]])
    assert (low, high) == (1, 3)


def test_genes_are_those_asked_for_or_the_best_held_out_ones():
    r = pd.Series({"A": 0.1, "B": np.nan, "C": 0.9, "D": -0.5})
    mapped = ["A", "B", "C", "D", "E"]
    assert inputs.choose_genes(mapped, r, None, 10) == ["C", "A", "D", "B", "E"]
    assert inputs.choose_genes(mapped, r, None, 2) == ["C", "A"]
    assert inputs.choose_genes(mapped, None, None, 2) == ["A", "B"]
    assert inputs.choose_genes(mapped, r, "E,B,E", 1) == ["E", "B"]
    with pytest.raises(utils.StageError, match=r"cnts-super holds no map.\nRun HISTEX.py again"):
        inputs.choose_genes([], r, None, 2)


@given(arrays(np.uint8, (3, 4)))
def test_bytes_are_found_again_from_their_differences(codes):
    found = np.zeros((4, 5), int)
    for (row, column), step in np.ndenumerate(report_maps.differences(codes)):
        mean = (found[row + 1, column] + found[row, column + 1]) // 2
        found[row + 1, column + 1] = (int(step) + mean) % 256
    np.testing.assert_array_equal(found[1:, 1:], codes)


def test_a_map_that_is_too_large_is_stored_in_fewer_steps():
    noise = np.random.default_rng(0).random((60, 60), np.float32)
    sizes = [
        len(report_maps.encode(report_maps.differences(report_maps.quantise(noise, levels)[0])))
        for levels in (255, 127, 63, 31, 15, 7)
    ]
    assert sizes == sorted(sizes, reverse=True)
    budgets = {math.inf: 255, sizes[0]: 255, sizes[1]: 127, sizes[1] - 1: 63, sizes[5]: 7, 10: 7}
    found = {n: report_maps.pack(noise, most_bytes=n)["levels"] for n in budgets}
    assert found == budgets


@given(
    arrays(np.float32, (9, 11), elements=st.floats(0, 1e5, width=32) | st.just(np.nan)),
    st.sampled_from([math.inf, 1]),
)
def test_sums_of_a_map_in_few_steps_are_those_of_the_map(image, most_bytes):
    packed = report_maps.pack(image, most_bytes=most_bytes)
    codes = report_maps.quantise(image, packed["levels"])[0]
    means = np.array([0, *packed["means"]])
    np.testing.assert_allclose(means[codes].sum(), np.nansum(image, dtype=float), rtol=1e-5)
    there = codes > 0
    step = (packed["high"] - packed["low"]) / (packed["levels"] - 1)
    apart = np.abs(means[codes] - image)[there].max(initial=0)
    assert apart <= step * 1.001 + 1e-5 * packed["high"]


def test_palettes_are_even_in_lightness_and_the_printed_one_begins_white():
    for name, text in report_maps.palettes().items():
        rgb = np.frombuffer(bytes.fromhex(text), np.uint8).reshape(1, 256, 3)
        lightness = rgb2lab(rgb)[0, :, 0]
        steps = np.diff(lightness) * (-1 if name == "ink" else 1)
        assert steps.min() > -0.7, name  # 8 bits a channel round by about a quarter
        assert np.convolve(steps, np.ones(16) / 16, "valid").std() < 0.1, name
        assert np.ptp(lightness) > 65, name
        if name != "ink":
            known = matplotlib.colormaps[name](range(256))[:, :3] * 255
            np.testing.assert_allclose(rgb[0], known, atol=1)
    assert (rgb[0, 0] > 240).all()


@given(st.floats(-1e4, 1e4), st.floats(1e-4, 1e4))
def test_ticks_are_round_numbers_within_the_axis(low, width):
    ticks = charts.nice_ticks(low, low + width)
    assert 2 <= len(ticks) <= 6
    assert (ticks >= low - width * 1e-5).all()
    assert (ticks <= low + width * (1 + 1e-5)).all()
    step = ticks[1] - ticks[0]
    assert round(step / 10 ** np.floor(np.log10(step) + 1e-6), 3) in (1, 2, 5)
    np.testing.assert_allclose(ticks / step, np.round(ticks / step), atol=1e-3)


def test_lines_stand_where_their_values_are():
    epochs, losses = np.array([1.0, 2, 5]), np.array([3.0, 1, 2])
    chart = charts.draw_lines(
        "c", "T <", 'D "', [(epochs, losses), (epochs[:1], losses[:1])], ("epoch", "<loss>")
    )
    svg = ElementTree.fromstring(chart)
    assert (svg.get("aria-labelledby"), svg.get("aria-describedby")) == ("c-title", "c-description")
    assert [svg.find("title").text, svg.find("desc").text] == ["T <", 'D "']
    line, dot = ([p.split(",") for p in e.get("points").split()] for e in svg.iter("polyline"))
    x, y = np.array(line, float).T
    np.testing.assert_allclose(x, [60, 60 + 388 / 4, 448], atol=0.05)  # epochs 1 to 5
    np.testing.assert_allclose(y, [216 - 204 / 22 * (v - 0.9) * 10 for v in losses], atol=0.05)
    assert dot == [line[0], line[0]]


def test_bars_count_all_values():
    values = np.array([-0.2, 0.0, 0.049, 0.05, 0.31, 0.999, 1.0])
    chart, axes = charts.draw_histogram("c", "T", "D", values, 0.05, ("r", "genes"))
    bars = list(ElementTree.fromstring(chart).iter("rect"))
    heights = np.array([float(bar.get("height")) for bar in bars])
    np.testing.assert_allclose(heights.sum() / heights.max() * 2, len(values), atol=0.02)
    left = np.array([float(bar.get("x")) for bar in bars])[heights > 0]
    assert len(left) == 6
    np.testing.assert_allclose(left - 0.5, axes.x([-0.2, 0, 0.05, 0.3, 0.95, 1.0]), atol=0.06)


def test_colours_of_regions_differ():
    assert len(set(page_parts.region_colours(24))) == 24


# ----- the page as text -----
def test_the_page_holds_the_maps_and_nothing_from_outside_can_act_in_it(section):
    text = write_page(section)
    page, maps = Page(text), make_maps()
    for i, image in enumerate(np.moveaxis(maps, 2, 0)):
        step = np.nanmax(image) - np.nanmin(image)
        np.testing.assert_allclose(page.map_of(i), image, atol=step / 508 * 1.001)
    assert list(page.scripts) == ["data", *(f"gene-{i}" for i in range(len(GENES))), "code"]
    assert json.loads(page.scripts["data"])["genes"] == GENES
    assert HOSTILE in page.text
    assert 'section "A" <b>&' in page.text
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"b", "iframe", "object", "embed", "base", "form"}
    for tag, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on") or name == "style"]
        for name in ("src", "href", "action", "data", "srcset"):
            assert attributes.get(name, "data:").startswith(("data:", "#")), (tag, attributes)
    assert [t for t, _ in page.tags].count("img") == 1
    assert "@import" not in text
    assert "url(" not in text


def test_the_policy_allows_the_pages_own_script_and_style_and_no_network(section):
    text = write_page(section)
    meta = next(a for tag, a in Page(text).tags if a.get("http-equiv"))
    rules = dict(rule.split(maxsplit=1) for rule in meta["content"].split("; "))
    assert rules["default-src"] == "'none'"
    assert rules["img-src"] == "data:"
    for tag in ("script", "style"):
        own = re.findall(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        assert len(own) == 1
        digest = base64.b64encode(hashlib.sha256(own[0].encode()).digest()).decode()
        assert rules[f"{tag}-src"] == f"'sha256-{digest}'"


def facts_of(text: str, script: str = "data") -> dict:
    return json.loads(Page(text).scripts[script])


def genes_of(text: str) -> list[dict]:
    return [facts_of(text, f"gene-{i}") for i in range(len(GENES))]


def maps_of(section) -> list[np.ndarray]:
    return [np.load(section / "cnts-super" / f"{i}.npy") for i in range(len(GENES))]


def test_genes_that_are_not_in_the_page_lie_beside_it(section):
    text = write_page(section, "--n-genes", "2")
    facts = facts_of(text)
    assert (facts["genes"], facts["here"]) == (GENES, 2)
    assert facts["ranks"] == [1, 2, 3, None]
    assert sorted(f.name for f in (section / "report-genes").iterdir()) == ["2.js", "3.js"]
    script = (section / "report-genes" / "2.js").read_text(encoding="utf-8")
    gene, stamp = json.loads(f"[{re.fullmatch(r'takeGene.2, (.*).;[^;]', script)[1]}]")
    assert stamp == facts["stamp"]
    image = make_maps()[..., 2]
    assert gene["name"] == HOSTILE
    assert "<" not in script
    np.testing.assert_allclose(map_in(gene), image, atol=np.ptp(image[image > 0]) / 508 * 1.001)
    assert "spots" in gene
    meta = next(a for tag, a in Page(text).tags if a.get("http-equiv"))
    assert re.search(r"script-src 'sha256-[^']+' 'self' file:;", meta["content"])
    record = json.loads((section / "report.json").read_text())
    assert set(record["outputs"]) == {"report.html", "report-genes"}
    assert facts_of(write_page(section, "--n-genes", "2", "--one-file"))["genes"] == GENES[:2]
    assert not (section / "report-genes").exists()  # it belonged to the page before


def test_a_large_section_has_maps_in_few_steps_in_the_page_and_whole_ones_beside_it(
    section, monkeypatch
):
    write_layers(section)
    monkeypatch.setattr(report_maps, "GENE_BYTES", 800)
    text = write_page(section)
    assert facts_of(text)["genes"] == GENES
    small = genes_of(text)
    finer = [i for i, gene in enumerate(small) if "beside" in gene]
    assert finer == [0, 1, 2, 3]
    assert {len(small[i]["codes"]) <= 800 for i in finer} == {True}
    for i in finer:
        assert small[i]["beside"][-2:] == ["spots", "uncertainty"]
        assert not {"spots", "sd"} & set(small[i])
        script = (section / "report-genes" / f"{i}.js").read_text(encoding="utf-8")
        gene, _ = json.loads(f"[{re.fullmatch(rf'takeGene.{i}, (.*).;[^;]', script)[1]}]")
        image = make_maps()[..., i]
        step = np.nanmax(image) - np.nanmin(image)
        np.testing.assert_allclose(map_in(gene), image, atol=step / 508 * 1.001)
        coarse = step / (small[i]["levels"] - 1) / 2
        np.testing.assert_allclose(map_in(small[i]), image, atol=coarse * 1.001)
        np.testing.assert_allclose(map_in(gene["sd"]), image / 4, atol=step / 4 / 508 * 1.5)
        assert "spots" in gene
    assert len(list((section / "report-genes").iterdir())) == len(finer)
    assert "it holds a smaller copy" in text
    shutil.rmtree(section / "cnts-super-sd")
    (section / "cnts.csv").unlink()
    codes = max(len(gene["codes"]) for gene in (report_maps.pack(m) for m in maps_of(section)))
    monkeypatch.setattr(report_maps, "GENE_BYTES", codes)  # nothing is left out but a few words
    assert not [gene for gene in genes_of(write_page(section)) if "beside" in gene]


def test_a_page_alone_has_all_in_fewer_steps(section, monkeypatch):
    write_layers(section)
    monkeypatch.setattr(report_maps, "GENE_BYTES", 800)
    alone = write_page(section, "--one-file")
    assert not (section / "report-genes").exists()
    gene = facts_of(alone, "gene-0")
    assert "spots" in gene
    assert max(gene["levels"], gene["sd"]["levels"]) < 255
    assert max(len(gene["codes"]), len(gene["sd"]["codes"])) <= 800


def test_a_folder_of_yours_is_not_replaced(section, capsys):
    (section / "report-genes").mkdir()
    (section / "report-genes" / "notes.txt").write_text("mine")
    assert report.run(["--directory", str(section), "--n-genes", "1"]) == 2
    assert "report-genes was not written by analysis/report.py" in capsys.readouterr().err
    assert (section / "report-genes" / "notes.txt").read_text() == "mine"


def test_layers_are_in_the_page_and_missing_ones_name_their_command(section):
    missing = Page(write_page(section)).text
    assert "python HISTEX.py --directory 'section \"A\" <b>&' --uncertainty" in missing
    assert "analysis/annotate.py --directory" in missing
    assert "analysis/segment.py --directory" not in missing
    write_layers(section)
    page = Page(write_page(section))
    facts = json.loads(page.scripts["data"])
    assert facts["annotation"]["texts"] == ["tumour", "stroma <b>"]
    assert facts["annotation"]["colours"] == ["#ff0000", "#0000ff"]
    assert facts["frame"] == {"name": "he-raw", "px": [32, 32]}
    cells = facts["cells"]
    places = np.frombuffer(zlib.decompress(base64.b64decode(cells["places"])), "<u2")
    x, y = places.reshape(2, 3) / 65_535 * np.array(SHAPE[::-1])[:, None]
    np.testing.assert_allclose(x, [40.5, 8, 20], atol=0.001)
    np.testing.assert_allclose(y, [5.5, 8, 20], atol=0.001)
    radii = np.frombuffer(zlib.decompress(base64.b64decode(cells["radii"])), np.uint8) / 32
    np.testing.assert_allclose(np.pi * radii**2 * 64, [300, 64, 64], rtol=0.1)
    assert cells["names"] == ["tumour"]
    sd = json.loads(page.scripts["gene-0"])["sd"]
    image = make_maps()[..., 0] / 4
    np.testing.assert_allclose(map_in(sd), image, atol=float(np.nanmax(image)) / 508 * 1.001)


def test_cells_that_cannot_be_read_are_left_out_with_a_warning(section):
    write_layers(section)
    (section / "cells.csv.gz").write_bytes(b"\x1f\x8b\x08")
    text = write_page(section)
    assert "cells.csv.gz is left out" in text
    assert "cells" not in facts_of(text)
    (section / "image_calibration.json").unlink()
    text = write_page(section)
    assert "does not tell how its places" in text
    assert facts_of(text)["frame"] == {"name": "he", "px": [16, 16]}


def test_maps_by_a_reference_are_marked(section):
    write_record(section, utils.HISTEX, [], ["cnts-super"], predicted_from="histology alone")
    text = write_page(section)
    assert facts_of(text)["alone"] == [0, 1, 2, 3]
    assert "These maps are predicted from the H&amp;E alone" in text
    assert "maps from the H&amp;E alone have none" in text  # no uncertainty, and no command
    counts = pd.read_csv(section / "cnts.csv", index_col=0, dtype={0: str})
    counts.drop(columns="NA").to_csv(section / "cnts.csv")
    write_record(section, utils.HISTEX, [], ["cnts-super"], reference={"name": "kidney"})
    text = write_page(section)
    assert facts_of(text)["alone"] == [1]
    assert "1 of the 4 maps are of genes without measured counts" in text


def test_a_page_tells_of_an_image_beside_the_spots(section):
    def told(beside):
        write_record(section, utils.HISTEX, [], ["cnts-super"], image_beside_spots=beside)
        return write_page(section)

    undone = {"down_um": 5.5, "right_um": -7.0, "undone": True}
    assert "by +5.5 um down and -7.0 um right" in told(undone)
    assert "by unknown um down" in told(undone | {"down_um": "far"})
    for still in (undone | {"undone": False}, None, 3, {}):
        assert "beside the spots" not in told(still)


def test_spots_are_compared_with_the_sums_of_the_map(section):
    gene = json.loads(Page(write_page(section)).scripts["gene-0"])["spots"]
    locs = pd.read_csv(section / "locs.csv", index_col=0)
    counts = pd.read_csv(section / "cnts.csv", index_col=0)["KRT8"].to_numpy()
    np.testing.assert_array_equal(gene["measured"], counts)
    row, col = np.mgrid[: SHAPE[0], : SHAPE[1]] + 0.5
    image, usable = make_maps()[..., 0], []
    for (x, y), total in zip(locs.to_numpy() / 16, gene["summed"], strict=True):
        disc = (row - y) ** 2 + (col - x) ** 2 <= RADIUS**2
        usable.append(np.isfinite(image[disc]).mean() >= 0.25)
        assert (total is not None) == usable[-1]
        if total is not None:
            assert total == pytest.approx(np.nansum(image[disc]), rel=0.1)
    assert not all(usable)
    known = np.array(gene["summed"], float)[usable]
    assert gene["r"] == pytest.approx(np.corrcoef(known, counts[usable])[0, 1], abs=1e-3)
    assert gene["ratio"] == pytest.approx(known.sum() / counts[usable].sum(), abs=1e-3)


def test_the_same_sample_gives_the_same_bytes_in_place_of_the_old_page(section):
    first = write_page(section, "--genes", "NA,KRT8")
    facts = json.loads(Page(first).scripts["data"])
    assert facts["genes"][: facts["here"]] == ["NA", "KRT8"]
    assert write_page(section, "--genes", "NA,KRT8", "--force") == first
    assert write_page(section, "--n-genes", "1") != first
    assert not list(section.glob(".*"))


def test_the_page_goes_where_it_is_told_to(section, tmp_path):
    output = tmp_path / "new" / "a.html"
    assert report.run(["--directory", str(section), "--output", str(output)]) == 0
    assert output.is_file()
    assert not (section / "report.html").exists()


def test_a_page_of_yours_is_not_replaced(section, tmp_path, capsys):
    mine = tmp_path / "figures" / "mine.html"
    mine.parent.mkdir()
    for path, options in ((section / "report.html", []), (mine, ["--output", str(mine)])):
        path.write_text("mine")
        assert report.run(["--directory", str(section), *options]) == 2
        said = capsys.readouterr().err
        assert f"{path} was not written by analysis/report.py, which would overwrite it" in said
        assert "python analysis/report.py --directory" in said
        assert path.read_text() == "mine"
        assert report.run(["--directory", str(section), *options, "--force"]) == 0
        made = path.read_text()
        assert report.run(["--directory", str(section), *options]) == 0  # now it is a page of ours
        assert "kept" not in capsys.readouterr().out
        path.write_text(made + "<!-- mine -->")
        assert report.run(["--directory", str(section), *options]) == 0
        kept = f"kept your {path.name} (--force makes a new one)"
        assert kept in capsys.readouterr().out
        assert report.run(["--directory", str(section), *options, "--n-genes", "1"]) == 2
        said = capsys.readouterr().err
        assert f"{path} was edited by hand, and other options were given" in said
        assert path.read_text() == made + "<!-- mine -->"
        assert report.run(["--directory", str(section), *options, "--force"]) == 0
        assert "<!-- mine -->" not in path.read_text()


def test_all_pages_of_a_folder_are_known_by_its_record(section):
    for name in ("a.html", "b.html", "a.html"):
        assert report.run(["--directory", str(section), "--output", str(section / name)]) == 0
    record = json.loads((section / "report.json").read_text())
    pages = {name: disk.fingerprint(section / name) for name in ("a.html", "b.html")}
    assert record["outputs"] == pages
    assert {"versions", "code", "seconds"} <= record.keys()
    used = {"he.jpg", "cnts-super", "cnts.csv", "locs.csv", "radius.txt", "segments.npy"}
    assert used <= record["inputs"].keys()


def test_a_sample_that_is_write_protected_can_be_looked_at(section, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK or path != section)
    page = tmp_path / "page.html"
    before = sorted(section.rglob("*"))
    assert report.run(["--directory", str(section), "--output", str(page)]) == 0
    assert page.is_file()
    assert report.run(["--directory", str(section)]) == 2
    assert sorted(section.rglob("*")) == before


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("held-out-r.csv", "held-out-r.csv is missing."),
        ("states", "There is no states/*/history.csv."),
        ("segments.npy", "There is no segments.npy."),
        ("cnts.csv", None),
        ("radius.txt", None),
        ("locs.csv", None),
    ],
)
def test_what_is_missing_is_said_and_the_rest_is_shown(section, name, says):
    path = section / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    page = Page(write_page(section))
    assert says is None or says in page.text
    assert ("spots" in json.loads(page.scripts["gene-0"])) == (says is not None)
    assert np.isfinite(page.map_of(0)).any()


def test_without_a_held_out_r_or_an_epoch_the_page_says_so(section):
    """As of a state that had no time for an epoch, and of genes with a constant count."""
    table = pd.DataFrame({"gene": GENES, "held_out_r": np.nan})
    table.to_csv(section / "held-out-r.csv", index=False)
    (section / "states" / "01" / "history.csv").write_text("epoch,train_loss\n")
    page = Page(write_page(section))
    assert "No gene has a held-out r." in page.text
    assert "state 00" in page.text
    assert "state 01" not in page.text


def test_half_precision_and_genes_without_counts_are_shown(section):
    maps = section / "cnts-super"
    image = make_maps()[..., 0].astype(np.float16)
    np.save(maps / "0.npy", image)
    counts = pd.read_csv(section / "cnts.csv", index_col=0, dtype={0: str})
    counts.drop(columns="KRT8").to_csv(section / "cnts.csv")
    page = Page(write_page(section))
    step = float(np.nanmax(image)) / 254
    np.testing.assert_allclose(page.map_of(0), image.astype(float), atol=step)
    assert "spots" not in json.loads(page.scripts["gene-0"])
    assert "spots" in json.loads(page.scripts["gene-1"])


def test_a_large_image_is_shrunk(section):
    text = write_page(section, "--image-px", "300")
    source = next(a["src"] for tag, a in Page(text).tags if tag == "img")
    image = Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2])))
    assert image.size == (300, 225)
    assert np.abs(np.asarray(image)[100, 60].astype(int) - PINK).max() < 6
    assert np.abs(np.asarray(image)[100, 240].astype(int) - BLUE).max() < 6


def damage(section, what):
    if what == "no maps":
        shutil.rmtree(section / "cnts-super")
    elif what == "no index":
        (section / "cnts-super" / "index.csv").unlink()
    elif what == "empty index":
        (section / "cnts-super" / "index.csv").write_text("gene,file\n")
    elif what == "no image":
        (section / "he.jpg").unlink()
    elif what == "cut image":
        path = section / "he.jpg"
        path.write_bytes(path.read_bytes()[:3000])
    elif what == "cut map":
        (section / "cnts-super" / "1.npy").write_bytes(b"\x93NUMPY")
    elif what == "odd map":
        np.save(section / "cnts-super" / "1.npy", np.ones((50, 70), np.float32))
    elif what == "odd table":
        (section / "held-out-r.csv").write_text("gene,held_out_r\nKRT8,high\n")
    elif what == "repeated gene":
        (section / "held-out-r.csv").write_text("gene,held_out_r\nNA,0.1\nNA,0.2\n")
    elif what == "odd history":
        (section / "states" / "01" / "history.csv").write_text("epoch,loss\n1,0.5\n")
    elif what == "odd regions":
        np.save(section / "segments.npy", np.ones((3, 3), np.uint8))
    elif what == "too many regions":
        np.save(section / "segments.npy", np.full(SHAPE, 256, np.uint16))
    elif what == "pickled regions":
        np.save(section / "segments.npy", np.array([{}], object), allow_pickle=True)
    elif what == "broken record":
        (section / "HISTEX.json").write_text("{")


@pytest.mark.parametrize(
    ("what", "messages"),
    [
        ("no maps", ["cnts-super is missing", "python HISTEX.py --directory"]),
        ("no index", ["index.csv is missing", "HISTEX.py"]),
        ("empty index", ["holds no map", "HISTEX.py"]),
        ("no image", ["he.jpg is missing", "python image_calibration.py --directory"]),
        ("cut image", ["he.jpg", "not a whole image", "image_calibration.py"]),
        ("cut map", ["1.npy is not a whole map"]),
        ("odd map", ["1.npy", "(50, 70)", "(42, 56)"]),
        ("odd table", ["held-out-r.csv", "high", "HISTEX.py"]),
        ("repeated gene", ["held-out-r.csv", "NA", "HISTEX.py"]),
        ("odd history", ["history.csv", "train_loss", "HISTEX.py"]),
        ("odd regions", ["segments.npy", "(3, 3)", "(42, 56)"]),
        ("too many regions", ["segments.npy", "256", "255"]),
        ("pickled regions", ["segments.npy", "not a whole .npy"]),
        ("broken record", ["HISTEX.json is not a readable record", "HISTEX.py"]),
    ],
)
def test_bad_input_is_named_and_the_old_page_stays(section, capsys, what, messages):
    (section / "report.html").write_text("old")
    damage(section, what)
    assert report.run(["--directory", str(section), "--force"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    for message in messages:
        assert message in error
    assert (section / "report.html").read_text() == "old"
    assert not list(section.glob(".*"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--genes", "KRT8,KRT9"], "names KRT9: no such gene in cnts-super"),
        (["--genes", ","], "names no gene"),
        (["--output", "he.jpg"], "does not end in .html"),
    ],
)
def test_options_that_cannot_be_followed_are_refused(section, capsys, options, message):
    try:
        code = report.run(["--directory", str(section), *options])
    except SystemExit as error:
        code = error.code
    assert code == 2
    assert message in capsys.readouterr().err


# ----- records -----
def test_records_and_their_warnings_are_shown_and_changes_are_warned_of(finished):
    record = json.loads((finished / "get_HR.json").read_text())
    record["warnings"] = ["two <spots> & a half"]
    (finished / "get_HR.json").write_text(json.dumps(record))
    page = Page(write_page(finished))
    for text in (*utils.STAGES, "two <spots> & a half", "--backbone efficientnet_lite0",
                 record["versions"]["pandas"], record["ended"].replace("T", " ")):  # fmt: skip
        assert text in page.text
    assert record["arguments"]["directory"] not in page.text  # whose computer it was is not told
    assert "edited after" not in page.text
    first = pd.read_csv(finished / "cnts-super" / "index.csv")["file"][0]
    path = finished / "cnts-super" / first
    path.write_bytes(pickle.dumps(inputs.read_map(path) * 2))
    assert "cnts-super was edited after HISTEX.py wrote it" in Page(write_page(finished)).text
    (finished / "cnts.csv").write_text((finished / "cnts.csv").read_text().replace(",9", ",8"))
    page = Page(write_page(finished))
    assert "is out of date" in page.text
    assert "cnts.csv has changed" in page.text
    assert str(finished.parent) not in page.text
    (finished / "masking_non_tissue.json").unlink()
    assert "masking_non_tissue.py has no record here" in Page(write_page(finished)).text


def test_the_script_runs_by_itself_and_needs_no_network_library(section):
    run_alone("analysis/report.py", section)
    assert (section / "report.html").is_file()


def test_regions_are_named_by_their_genes(section, capsys):
    """Region 2 has no superpixel, and is not shown."""
    (section / "segments.csv").write_text('region,genes\n1,"A, <B>"\n2,C\n3,\n')
    page = write_page(section)
    assert "(A, &lt;B&gt;)</li>" in page
    assert "(C)" not in page
    assert page.count("%</li>") == 1  # region 3 has no genes
    for text in ("region,genes\n1,A\n3,B\n2,C\n", "region\n1\n2\n3\n", "region,genes\n1,A\n"):
        (section / "segments.csv").write_text(text)
        assert write_page(section).count("%</li>") == 2
        assert "segments.csv is left out" in capsys.readouterr().out


def test_states_that_are_not_in_the_maps_are_not_shown(finished):
    shutil.copytree(finished / "states" / "00", finished / "states" / "01")
    page = write_page(finished)
    assert "state 00" in page
    assert "state 01" not in page


def test_spots_without_tissue_are_told_apart(section):
    """One of the twelve lies in the corner that is off the tissue."""
    text = " ".join(Page(write_page(section)).text.split())
    assert " spots 11 of 12 with tissue grid " in text
    for file in (section / "cnts-super").glob("*.npy"):
        np.save(file, np.nan_to_num(np.load(file), nan=1))
    text = " ".join(Page(write_page(section, "--force")).text.split())
    assert " spots 12 grid " in text
