"""analysis/report.py: what the page holds, and how it behaves in a real browser."""

import base64
import hashlib
import io
import itertools
import json
import os
import pickle
import re
import shutil
import subprocess
import time
import zlib
from html.parser import HTMLParser
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pandas as pd
import pytest
from conftest import run_alone
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

import utils
from analysis import charts, inputs, report
from analysis import page as page_parts
from analysis.spots import disc_weights
from writing import disk

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
PATIENCE = 60  # seconds for the browser to answer


class Browser:
    """A headless Chromium, driven through the pipe of its DevTools protocol: real keys and mouse.

    Messages are JSON, each ended by a zero byte; Chromium reads them from descriptor 3 and writes
    to 4.
    """

    def __init__(self, profile) -> None:
        to_read, self.writing = os.pipe()
        self.reading, to_write = os.pipe()
        flags = "--headless=new --no-sandbox --disable-gpu --no-first-run --remote-debugging-pipe"
        command = f'exec "{CHROMIUM}" {flags} --user-data-dir="{profile}" about:blank'
        self.process = subprocess.Popen(
            ["bash", "-c", f"{command} 3<&{to_read} 4>&{to_write}"],
            pass_fds=(to_read, to_write),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_read)
        os.close(to_write)
        os.set_blocking(self.reading, False)
        self.numbers, self.rest, self.session, self.events = itertools.count(1), b"", None, []
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        attached = self.ask("Target.attachToTarget", targetId=target, flatten=True)
        self.session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log", "Accessibility"):
            self.ask(f"{domain}.enable")

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.writing)
        os.close(self.reading)

    def ask(self, method: str, **params):
        number = next(self.numbers)
        message = {"id": number, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.writing, json.dumps(message).encode() + b"\0")
        while True:
            answer = self.next_message(method)
            if answer.get("id") == number:
                assert "error" not in answer, (method, answer)
                return answer["result"]
            self.events.append(answer)

    def next_message(self, waiting_for: str):
        end = time.monotonic() + PATIENCE
        while b"\0" not in self.rest:
            try:
                chunk = os.read(self.reading, 2**20)
            except BlockingIOError:
                assert time.monotonic() < end, f"no answer to {waiting_for}"
                time.sleep(0.005)
                continue
            assert chunk, f"the browser ended before it answered {waiting_for}"
            self.rest += chunk
        message, _, self.rest = self.rest.partition(b"\0")
        return json.loads(message)

    def run(self, code: str):
        """The value of a JavaScript expression."""
        done = self.ask("Runtime.evaluate", expression=code, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in done, done["exceptionDetails"]
        return done["result"].get("value")

    def wait(self, code: str):
        end = time.monotonic() + PATIENCE
        while not (value := self.run(code)):
            assert time.monotonic() < end, f"never true: {code}"
            time.sleep(0.02)
        return value

    def open(self, path, width=1400, height=900, **media) -> None:
        self.ask(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 500,
        )
        features = [{"name": name.replace("_", "-"), "value": v} for name, v in media.items()]
        self.ask("Emulation.setEmulatedMedia", features=features)
        self.events.clear()
        self.ask("Page.navigate", url=path.resolve().as_uri())
        self.wait("document.documentElement?.dataset.ready")

    def mouse(self, kind: str, x: float, y: float, **more) -> None:
        self.ask("Input.dispatchMouseEvent", type=f"mouse{kind}", x=x, y=y, **more)

    def click(self, selector: str) -> None:
        x, y = self.run(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)}); "
            "e.scrollIntoView({block: 'nearest'}); const r = e.getBoundingClientRect(); "
            "return [r.x + r.width / 2, r.y + r.height / 2]; })()"
        )
        self.mouse("Moved", x, y)
        self.mouse("Pressed", x, y, button="left", clickCount=1)
        self.mouse("Released", x, y, button="left", clickCount=1)

    def press(self, key: str, text: str | None = None, shift: bool = False) -> None:
        codes = {"ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40, "Tab": 9}
        common = {"key": key, "modifiers": 8 * shift}
        if key in codes:
            common["windowsVirtualKeyCode"] = codes[key]
        down = {"type": "keyDown", "text": text} if text else {"type": "rawKeyDown"}
        self.ask("Input.dispatchKeyEvent", **down, **common)
        self.ask("Input.dispatchKeyEvent", type="keyUp", **common)

    def picture(self):
        """The colour (3,) of the screen at x, y."""
        shot = self.ask("Page.captureScreenshot", format="png")["data"]
        pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(shot))).convert("RGB"))
        return lambda x, y: pixels[int(y), int(x)]


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


@pytest.fixture(scope="module")
def _section(tmp_path_factory):
    directory = tmp_path_factory.mktemp("report") / 'section "A" <b>&'
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
        codes = np.frombuffer(zlib.decompress(base64.b64decode(gene["codes"])), np.uint8)
        codes = codes.reshape(SHAPE).astype(float)
        values = gene["low"] + (codes - 1) / 254 * (gene["high"] - gene["low"])
        return np.where(codes == 0, np.nan, values)


# ----- numbers -----
@given(arrays(np.float32, (3, 4), elements=st.floats(-10, 1e6, width=32) | st.just(np.nan)))
def test_a_map_is_stored_to_half_a_step_of_255(image):
    codes, low, high = report.quantise(image)
    np.testing.assert_array_equal(codes == 0, np.isnan(image))
    decoded = low + (codes.astype(float) - 1) / 254 * (high - low)
    there = codes > 0
    assert np.abs(decoded - image)[there].max(initial=0) <= (high - low) / 508 * 1.0001


def test_a_map_without_any_value_or_with_infinities_is_stored_without_them():
    codes, low, high = report.quantise(np.full((2, 2), np.nan, np.float32))
    assert (codes.max(), low, high) == (0, 0, 0)
    codes, low, high = report.quantise(np.array([[np.inf, 1], [3, -np.inf]], np.float32))
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
    assert json.loads(Page(first).scripts["data"])["genes"] == ["NA", "KRT8"]
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


# ----- the page in a browser -----
needs_browser = pytest.mark.skipif(
    CHROMIUM is None or os.name == "nt", reason="no Chromium is installed (apt install chromium)"
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def page(_section, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "report.html"
    assert report.run(["--directory", str(_section), "--output", str(path)]) == 0
    return path


@pytest.fixture
def opened(browser, page):
    browser.open(page)
    return browser


class View:
    """Where superpixels are on the screen while the whole section is shown."""

    def __init__(self, browser) -> None:
        box = "document.getElementById('view').getBoundingClientRect()"
        self.x, self.y, width, height = browser.run(f"(r => [r.x, r.y, r.width, r.height])({box})")
        self.scale = min(width / SHAPE[1], height / SHAPE[0])
        self.x += (width - SHAPE[1] * self.scale) / 2
        self.y += (height - SHAPE[0] * self.scale) / 2

    def at(self, row: float, column: float) -> tuple[float, float]:
        """The middle of a superpixel."""
        return self.x + (column + 0.5) * self.scale, self.y + (row + 0.5) * self.scale


def readout(browser) -> str:
    return browser.run("document.getElementById('readout').textContent")


def choose(browser, gene: str) -> None:
    browser.click(f"#genes label:nth-child({GENES.index(gene) + 1}) input")
    name = f"H&E with the map of {gene}"
    browser.wait(
        f"document.getElementById('view').getAttribute('aria-label') === {json.dumps(name)}"
    )


def set_opacity(browser, percent: int) -> None:
    browser.run("document.getElementById('opacity').focus()")
    browser.press("Home")
    for _ in range(percent // 5):
        browser.press("ArrowRight")


def off(browser) -> None:
    """Move the mark away from where colours are looked at."""
    browser.mouse("Moved", *View(browser).at(41, 0))


def expected_colour(gene: str, value: float, colours: str) -> np.ndarray:
    image = make_maps()[..., GENES.index(gene)]
    level = min(1, value / np.nanpercentile(image, 99.5))
    return np.array(matplotlib.colormaps[colours](round(255 * level))[:3]) * 255


@needs_browser
def test_opening_the_page_asks_nothing_of_the_network_and_logs_no_error(opened, page):
    asked = [
        event["params"]["request"]["url"]
        for event in opened.events
        if event["method"] == "Network.requestWillBeSent"
    ]
    assert {url.partition(":")[0] for url in asked} <= {"file", "data"}
    assert sum(url.startswith("file:") for url in asked) == 1
    bad = ("Log.entryAdded", "Runtime.exceptionThrown", "Runtime.consoleAPICalled")
    assert not [event for event in opened.events if event["method"] in bad]
    assert opened.run("document.title") == 'section "A" <b>&: HISTEX report'
    assert (
        opened.run("fetch('https://example.org').then(() => 'sent', () => 'refused')") == "refused"
    )


@needs_browser
@pytest.mark.parametrize("gene", GENES)
def test_the_value_under_the_pointer_is_that_of_the_array(opened, gene):
    choose(opened, gene)
    image, view = make_maps()[..., GENES.index(gene)], View(opened)
    step = float(np.nanmax(image) - np.nanmin(image)) / 254
    for row, column in ((0, 0), (3, 50), (20, 27), (20, 28), (41, 55), (41, 0), (12, 7)):
        opened.mouse("Moved", *view.at(row, column))
        text = readout(opened)
        assert text.startswith(f"{gene}: ")
        assert f"row {row}, column {column}" in text
        assert f"x {column * 8 + 4} µm, y {row * 8 + 4} µm" in text
        value = text.removeprefix(f"{gene}: ").partition("row")[0]
        if np.isnan(image[row, column]):
            assert value == "no tissue"
        else:
            shown = float(value.removesuffix(" counts"))
            assert shown == pytest.approx(image[row, column], abs=max(step, 1e-6))
    assert opened.run("typeof pwned") == "undefined"


@needs_browser
@pytest.mark.parametrize("colours", ["viridis", "cividis"])
def test_colours_are_those_of_the_map_at_the_opacity_of_the_slider(opened, colours):
    choose(opened, "KRT8")
    opened.click(f"[value={colours}]")
    off(opened)
    image, view = make_maps()[..., 0], View(opened)
    for opacity in (100, 0, 40):
        set_opacity(opened, opacity)
        assert opened.run("document.getElementById('opacity-text').textContent") == f"{opacity} %"
        picture = opened.picture()
        for row, column in ((10, 9), (25, 40), (33, 20), (8, 48)):
            below = np.array(PINK if column < SHAPE[1] / 2 else BLUE)
            above = expected_colour("KRT8", image[row, column], colours)
            share = opacity / 100
            expected = share * above + (1 - share) * below
            np.testing.assert_allclose(picture(*view.at(row, column)), expected, atol=6)
        np.testing.assert_allclose(picture(*view.at(8, 2)), PINK, atol=4)  # no tissue


@needs_browser
def test_the_slider_follows_the_mouse(opened):
    box = "document.getElementById('opacity').getBoundingClientRect()"
    x, y, width, height = opened.run(f"(r => [r.x, r.y, r.width, r.height])({box})")
    opened.mouse("Pressed", x + 0.7 * width, y + height / 2, button="left", clickCount=1)
    opened.mouse("Moved", x + 0.25 * width, y + height / 2, button="left", buttons=1)
    opened.mouse("Released", x + 0.25 * width, y + height / 2, button="left", clickCount=1)
    text = opened.run("document.getElementById('opacity-text').textContent")
    assert text in ("20 %", "25 %", "30 %")


@needs_browser
def test_spots_have_the_colour_of_their_counts_and_are_read_out(opened, page):
    choose(opened, "KRT8")
    opened.click("#spots")
    off(opened)
    gene = json.loads(Page(page.read_text(encoding="utf-8")).scripts["gene-0"])["spots"]
    picture, view = opened.picture(), View(opened)
    spots = [(r, c) for r in range(6, SHAPE[0] - 4, 12) for c in range(6, SHAPE[1] - 4, 12)]
    for (row, column), count in zip(spots, gene["measured"], strict=True):
        value = count / (np.pi * RADIUS**2)
        expected = expected_colour("KRT8", value, "viridis")
        np.testing.assert_allclose(picture(*view.at(row, column)), expected, atol=6)
    opened.mouse("Moved", *view.at(*spots[5]))
    assert "spot 005 · " in readout(opened)
    assert f"{gene['measured'][5]:.0f} counted" in readout(opened)
    total = float(re.search(r"([\d.]+) in the map", readout(opened))[1])
    assert total == pytest.approx(gene["summed"][5], rel=0.01)
    assert opened.run("document.getElementById('dot').getAttribute('visibility')") == "visible"
    opened.mouse("Moved", *view.at(12, 12))  # between spots
    assert "spot" not in readout(opened)
    assert opened.run("document.getElementById('dot').getAttribute('visibility')") == "hidden"


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


@needs_browser
def test_regions_are_shown_and_read_out(opened):
    opened.click("[value=regions]")
    set_opacity(opened, 100)
    off(opened)
    picture, view, colours = opened.picture(), View(opened), page_parts.region_colours(3)
    for row, column, region in ((30, 10, 1), (30, 50, 3), (20, 28, 3)):
        expected = [int(colours[region - 1][at : at + 2], 16) for at in (1, 3, 5)]
        np.testing.assert_allclose(picture(*view.at(row, column)), expected, atol=4)
        opened.mouse("Moved", *view.at(row, column))
        assert f"region {region}" in readout(opened)
    np.testing.assert_allclose(picture(*view.at(10, 10)), PINK, atol=4)
    opened.mouse("Moved", *view.at(10, 10))
    assert "region" not in readout(opened)


@needs_browser
def test_the_page_is_used_by_keys_alone(opened):
    reached = []
    for _ in range(40):
        opened.press("Tab")
        focused = opened.run(
            "(e => [e.id || e.name || e.tagName, getComputedStyle(e).outlineStyle])"
            "(document.activeElement)"
        )
        if focused[0] == "BODY":
            break
        reached.append(focused[0])
        assert focused[1] not in ("none", None), focused
        if focused[0] == "view":
            opened.press("ArrowRight")  # the mark starts in the middle
            opened.press("ArrowDown", shift=True)
            assert "row 31, column 29" in readout(opened)
            opened.wait("document.getElementById('announced').textContent.includes('row 31')")
            opened.press("+", text="+")
            assert opened.run("view.scale") == pytest.approx(1.5 * View(opened).scale)
            for _ in range(5):
                opened.press("+", text="+")
            for _ in range(4):
                opened.press("ArrowUp", shift=True)
            assert "row 0, column 29" in readout(opened)
            assert opened.run("view.top") == 0  # the view has gone along
            opened.press("-", text="-")
            opened.press("0", text="0")
            assert opened.run("view.scale") == pytest.approx(View(opened).scale)
            for _ in range(9):
                opened.press("ArrowLeft", shift=True)
            assert "row 0, column 0" in readout(opened)
    for control in ("view", "in", "out", "whole", "search", "gene", "layer", "spots", "opacity"):
        assert control in reached


@needs_browser
def test_genes_are_found_by_typing(opened):
    opened.run("document.getElementById('search').focus()")
    for letter in "na":
        opened.press(letter, text=letter)
    shown = "[...document.querySelectorAll('#genes label')].filter(e => e.offsetParent).length"
    assert opened.run(shown) == 1
    assert opened.run("document.getElementById('found').textContent") == "1 of 4 genes"
    opened.press("Enter", text="\r")
    opened.wait("document.getElementById('view').getAttribute('aria-label').endsWith('map of NA')")
    assert "NA" in opened.run("document.querySelector('#scatter desc').textContent")


@needs_browser
def test_of_two_genes_chosen_at_once_the_last_is_shown(opened):
    opened.run("unpack = (fast => async (text) => { const slow = !window.slow; window.slow = true; "
               "const codes = await fast(text); await new Promise(d => setTimeout(d, 300 * slow)); "
               "return codes; })(unpack)")  # fmt: skip
    name = opened.run("Promise.all([chooseGene(0), chooseGene(1)]).then(() => gene.name)")
    assert name == GENES[1]


@needs_browser
def test_wheel_and_drag_move_the_section_under_the_pointer(opened):
    view = View(opened)
    x, y = view.at(12, 40)
    opened.mouse("Moved", x, y)
    before = readout(opened)
    for _ in range(3):
        opened.mouse("Wheel", x, y, deltaX=0, deltaY=-120)
    opened.wait("view.scale > 1.5 * Math.min(canvas.clientWidth / 56, canvas.clientHeight / 42)")
    opened.mouse("Moved", x + 1, y)
    assert readout(opened) == before  # what was under the pointer has stayed there
    scale = opened.run("view.scale")
    opened.mouse("Pressed", x, y, button="left", clickCount=1)
    opened.mouse("Moved", x - 5 * scale, y + 3 * scale, button="left", buttons=1)
    opened.mouse("Released", x - 5 * scale, y + 3 * scale, button="left", clickCount=1)
    opened.mouse("Moved", x, y)
    assert "row 9, column 45" in readout(opened)
    bar = opened.run("document.getElementById('scale-bar').getBoundingClientRect().width")
    text = opened.run("document.getElementById('scale-text').textContent")
    assert bar / scale * 8 == pytest.approx(float(text.removesuffix(" µm")), rel=0.01)
    opened.click("#whole")
    assert opened.run("view.scale") == pytest.approx(View(opened).scale)


@needs_browser
def test_the_colour_bar_counts_up_to_where_colours_end(opened):
    choose(opened, "KRT8")
    top = float(np.nanpercentile(make_maps()[..., 0], 99.5))
    bar = opened.run(
        "[...document.querySelectorAll('#ticks span')].map(e => [e.textContent, e.style.left])"
    )
    assert 3 <= len(bar) <= 6
    for text, left in bar:
        assert float(left.removesuffix("%")) == pytest.approx(100 * float(text) / top, abs=0.01)
    assert f"{top:.3g}" in opened.run("document.getElementById('bar-text').textContent")


@needs_browser
def test_a_screen_reader_finds_a_name_on_everything_that_it_can_use(opened):
    tree = opened.ask("Accessibility.getFullAXTree")["nodes"]
    named = {}
    for node in tree:
        role, name = (node.get(key, {}).get("value", "") for key in ("role", "name"))
        focusable = any(
            p["name"] == "focusable" and p["value"].get("value") for p in node.get("properties", [])
        )
        if not node["ignored"] and role != "RootWebArea" and (focusable or role == "image"):
            assert name, node
            named.setdefault(role, []).append(name)
    assert f"{GENES[0]} held-out r 0.71" in named["radio"]
    assert "Opacity" in named["slider"]
    assert "Held-out correlation of all genes" in named["image"]
    assert "Held-out loss by epoch" in named["image"]
    assert any("counts per superpixel" in name for name in named["image"])


@needs_browser
def test_the_page_fits_a_phone_and_a_dark_screen(browser, page):
    browser.open(page, width=390, height=844, prefers_color_scheme="dark")
    assert browser.run("document.documentElement.scrollWidth") <= 390
    colour = browser.run("getComputedStyle(document.body).backgroundColor")
    assert max(map(int, re.findall(r"\d+", colour))) < 60
    opened, view = browser, View(browser)
    opened.mouse("Moved", *view.at(20, 28))
    assert "row 20, column 28" in readout(opened)


@needs_browser
def test_a_page_of_little_more_than_maps_works(browser, section):
    for name in ("held-out-r.csv", "cnts.csv", "segments.npy"):
        (section / name).unlink()
    shutil.rmtree(section / "states")
    write_page(section)
    browser.open(section / "report.html")
    choose(browser, HOSTILE)
    browser.mouse("Moved", *View(browser).at(20, 28))
    assert readout(browser).startswith(f"{HOSTILE}: ")
    for control in ("spots", "[value=regions]"):
        selector = control if control[0] == "[" else f"#{control}"
        assert browser.run(f"document.querySelector('{selector}').disabled")
    assert "nothing to compare" in browser.run(
        "document.getElementById('scatter-text').textContent"
    )
    assert not [e for e in browser.events if e["method"] == "Runtime.exceptionThrown"]
