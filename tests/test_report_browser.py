"""The page of analysis/report.py in a real browser: every control, by mouse, keys and fingers."""

import base64
import io
import itertools
import json
import os
import re
import shutil
import subprocess
import time
from pathlib import Path
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pandas as pd
import pytest
from conftest import ROOT
from PIL import Image
from test_report import (
    BLUE,
    GENES,
    HOSTILE,
    PINK,
    RADIUS,
    SHAPE,
    Page,
    make_maps,
    make_regions,
    write_layers,
    write_page,
    write_section,
)

from analysis import cells, report
from analysis import outlines as outline_files
from analysis import page as page_parts

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
        flags = (
            "--headless=new --no-sandbox --disable-gpu --no-first-run --remote-debugging-pipe "
            "--disable-background-networking --disable-component-update --disable-extensions "
            "--disable-sync"
        )
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
        self.ask("Emulation.setTouchEmulationEnabled", enabled=width < 500)
        features = [{"name": name.replace("_", "-"), "value": v} for name, v in media.items()]
        self.ask("Emulation.setEmulatedMedia", features=features)
        self.events.clear()
        self.ask("Page.navigate", url=path.resolve().as_uri())
        self.wait("document.documentElement?.dataset.ready")

    def mouse(self, kind: str, x: float, y: float, **more) -> None:
        self.ask("Input.dispatchMouseEvent", type=f"mouse{kind}", x=x, y=y, **more)

    def touch(self, kind: str, fingers) -> None:
        points = [{"x": x, "y": y, "id": i} for i, (x, y) in enumerate(fingers)]
        self.ask("Input.dispatchTouchEvent", type=f"touch{kind}", touchPoints=points)

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


# ----- the page in a browser -----
pytestmark = pytest.mark.skipif(
    CHROMIUM is None or os.name == "nt", reason="no Chromium is installed (apt install chromium)"
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def _section(tmp_path_factory):
    return write_section(tmp_path_factory.mktemp("report") / 'section "A" <b>&')


@pytest.fixture
def section(_section, tmp_path):
    return shutil.copytree(_section, tmp_path / _section.name)


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


@pytest.mark.parametrize("colours", ["viridis", "cividis"])
def test_colours_are_those_of_the_map_at_the_opacity_of_the_slider(opened, colours):
    choose(opened, "KRT8")
    opened.click(f"[value={colours}]")
    off(opened)
    opened.click("#fade")
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


def test_the_slider_follows_the_mouse(opened):
    box = "document.getElementById('opacity').getBoundingClientRect()"
    x, y, width, height = opened.run(f"(r => [r.x, r.y, r.width, r.height])({box})")
    opened.mouse("Pressed", x + 0.7 * width, y + height / 2, button="left", clickCount=1)
    opened.mouse("Moved", x + 0.25 * width, y + height / 2, button="left", buttons=1)
    opened.mouse("Released", x + 0.25 * width, y + height / 2, button="left", clickCount=1)
    text = opened.run("document.getElementById('opacity-text').textContent")
    assert text in ("20 %", "25 %", "30 %")


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


def test_the_page_is_used_by_keys_alone(opened):
    reached = []
    for _ in range(80):
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


def test_genes_are_found_by_typing(opened):
    opened.run("document.getElementById('search').focus()")
    for letter in "na":
        opened.press(letter, text=letter)
    shown = "[...document.querySelectorAll('#genes label')].filter(e => e.offsetParent).length"
    assert opened.run(shown) == 1
    assert (
        opened.run("document.getElementById('found').textContent")
        == "NA: rank 2 of 3, held-out r 0.64"
    )
    opened.press("Enter", text="\r")
    opened.wait("document.getElementById('view').getAttribute('aria-label').endsWith('map of NA')")
    assert "NA" in opened.run("document.querySelector('#scatter desc').textContent")


def test_of_two_genes_chosen_at_once_the_last_is_shown(opened):
    opened.run("unpack = (fast => async (text) => { const slow = !window.slow; window.slow = true; "
               "const codes = await fast(text); await new Promise(d => setTimeout(d, 300 * slow)); "
               "return codes; })(unpack)")  # fmt: skip
    name = opened.run("Promise.all([chooseGene(1), chooseGene(2)]).then(() => gene.name)")
    assert name == GENES[2]


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


def test_the_colour_bar_counts_up_to_where_colours_end(opened):
    choose(opened, "KRT8")
    top = float(np.nanpercentile(make_maps()[..., 0], 99.5))
    bar = opened.run(
        "[...document.querySelectorAll('.ticks span')].map(e => [e.textContent, e.style.left])"
    )
    assert 3 <= len(bar) <= 6
    for text, left in bar:
        assert float(left.removesuffix("%")) == pytest.approx(100 * float(text) / top, abs=0.01)
    assert f"to {top:.3g} and more" in opened.run("document.querySelector('.bar-text').textContent")


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


def test_the_page_fits_a_phone_and_a_dark_screen(browser, page):
    browser.open(page, width=390, height=844, prefers_color_scheme="dark")
    assert browser.run("document.documentElement.scrollWidth") <= 390
    colour = browser.run("getComputedStyle(document.body).backgroundColor")
    assert max(map(int, re.findall(r"\d+", colour))) < 60
    opened, view = browser, View(browser)
    opened.mouse("Moved", *view.at(20, 28))
    assert "row 20, column 28" in readout(opened)


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


# ----- colours -----
def pixels_of(browser, expression: str) -> np.ndarray:
    """RGBA (rows, columns, 4) of a canvas of the page."""
    text = browser.run(f"({expression}).toDataURL('image/png')")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text.partition(",")[2]))))


def set_value(browser, control: str, value: float) -> None:
    browser.run(
        f"(e => {{ e.value = {value}; e.dispatchEvent(new Event('input', {{bubbles: true}})); }})"
        f"(document.getElementById('{control}'))"
    )


CURVES = {
    "linear": lambda v, top: v,
    "sqrt": lambda v, top: np.sqrt(v),
    "log": lambda v, top: np.log1p(100 * v / top),
}


@pytest.mark.parametrize("scale", CURVES)
def test_range_and_scale_decide_the_colours_of_picture_and_bar(opened, scale):
    choose(opened, "KRT8")
    opened.click(f"[value={scale}]")
    opened.click("#fade")
    set_opacity(opened, 100)
    image = make_maps()[..., 0]
    top, curve = np.nanpercentile(image, 99.5), CURVES[scale]
    highest = np.nanmax(image)
    for handle, share in (("range-low", 0.1), ("range-high", 0.8)):
        set_value(opened, handle, 1000 * share)
    low, high = opened.run("gene.range")
    for value, share in ((low, 0.1), (high, 0.8)):  # handles move along the scale of the colours
        assert curve(value, top) == pytest.approx(share * curve(highest, top), rel=1e-6)
    off(opened)
    opened.run("new Promise(requestAnimationFrame)")
    picture, view = opened.picture(), View(opened)
    colours = np.array(matplotlib.colormaps["viridis"](range(256)))[:, :3] * 255
    for row, column in ((10, 9), (25, 40), (33, 20), (8, 48), (20, 27)):
        share = (curve(image[row, column], top) - curve(low, top)) / (
            curve(high, top) - curve(low, top)
        )
        expected = colours[round(255 * min(1, max(0, share)))]
        np.testing.assert_allclose(picture(*view.at(row, column)), expected, atol=6)
    ticks = opened.run(
        "[...document.querySelectorAll('.ticks span')].map(e => [e.textContent, e.style.left])"
    )
    assert len(ticks) >= 2
    for text, left in ticks:
        share = (curve(float(text), top) - curve(low, top)) / (curve(high, top) - curve(low, top))
        digits = 0.02 if text == ticks[0][0] else 0.003  # the first is the rounded end of the range
        assert float(left.removesuffix("%")) / 100 == pytest.approx(share, abs=digits)
    opened.click("#range-reset")
    assert opened.run("gene.range[1] === gene.top && gene.range[0] === 0")


def test_what_is_low_is_clear_and_the_bar_shows_how_it_looks(opened):
    choose(opened, "KRT8")
    set_opacity(opened, 60)
    off(opened)
    image, view, picture = make_maps()[..., 0], View(opened), opened.picture()
    top = np.nanpercentile(image, 99.5)
    colours = np.array(matplotlib.colormaps["viridis"](range(256)))[:, :3] * 255
    for row, column in ((10, 9), (25, 40), (33, 20), (8, 48), (31, 15)):
        level = round(255 * min(1, image[row, column] / top))
        share = 0.6 * min(1, level / 127.5)  # clear at 0, full from half of the range on
        below = np.array(PINK if column < SHAPE[1] / 2 else BLUE)
        expected = share * colours[level] + (1 - share) * below
        np.testing.assert_allclose(picture(*view.at(row, column)), expected, atol=6)
    bar = pixels_of(opened, "document.querySelector('.colour-bar canvas')")
    assert bar.shape == (2, 256, 4)
    tissue = np.array(PINK) / 2 + np.array(BLUE) / 2
    share = 0.6 * np.minimum(1, np.arange(256) / 127.5)[:, None]
    np.testing.assert_allclose(bar[0, :, :3], colours, atol=2)  # of spots
    np.testing.assert_allclose(bar[1, :, :3], share * colours + (1 - share) * tissue, atol=5)


def test_three_genes_are_mixed_from_red_green_and_blue(opened):
    opened.click("[name=mode][value=three]")
    for gene in ("NA", HOSTILE):  # KRT8 is red already
        opened.click(f"#genes label:nth-child({GENES.index(gene) + 1}) input")
        opened.wait(f"trio.some(one => one && one.index === {GENES.index(gene)})")
    opened.click("#fade")
    set_opacity(opened, 100)
    off(opened)
    maps, view, picture = make_maps(), View(opened), opened.picture()
    for row, column in ((10, 9), (25, 40), (33, 20), (8, 48)):
        expected = [
            255 * min(1, maps[row, column, i] / np.nanpercentile(maps[..., i], 99.5))
            for i in range(3)
        ]
        np.testing.assert_allclose(picture(*view.at(row, column)), expected, atol=6)
    legend = opened.run(
        "[...document.querySelectorAll('.colour-bar strong')].map(e => e.textContent)"
    )
    assert legend == ["KRT8 in red", "NA in green", f"{HOSTILE} in blue"]
    opened.mouse("Moved", *view.at(10, 9))
    assert f"NA {maps[10, 9, 1]:.3f}" in readout(opened)
    opened.click("#clear-0")
    legend = opened.run(
        "[...document.querySelectorAll('.colour-bar strong')].map(e => e.textContent)"
    )
    assert legend == ["NA in green", f"{HOSTILE} in blue"]
    opened.click("[name=slot][value='1']")  # then the next gene takes the place of NA
    opened.click("#genes label:nth-child(4) input")
    opened.wait("trio[1] && trio[1].name === 'FLAT'")
    opened.click("[name=mode][value=one]")
    assert len(opened.run("[...document.querySelectorAll('.colour-bar')]")) == 1


# ----- genes in the folder -----
@pytest.fixture(scope="module")
def small_page(_section, tmp_path_factory):
    """A page of one gene, the others beside it."""
    path = tmp_path_factory.mktemp("small") / "a #1%.html"
    options = ["--n-genes", "1", "--output", str(path)]
    assert report.run(["--directory", str(_section), *options]) == 0
    return path


def type_in(browser, text: str) -> None:
    browser.run("document.getElementById('search').focus()")
    browser.run("document.getElementById('search').select()")
    for letter in text:
        browser.press(letter, text=letter)


def found(browser) -> str:
    return browser.run("document.getElementById('found').textContent")


def test_genes_beside_the_page_are_found_and_loaded(browser, small_page):
    browser.open(small_page)
    assert found(browser).startswith("1 of 4 genes")
    type_in(browser, "fla")
    assert found(browser) == "FLAT: no held-out r is known"
    type_in(browser, "na")
    assert found(browser) == "NA: rank 2 of 3, held-out r 0.64"
    browser.press("Enter", text="\r")
    browser.wait("gene.name === 'NA'")
    image, view = make_maps()[..., 1], View(browser)
    step = float(np.nanmax(image) - np.nanmin(image)) / 254
    for row, column in ((3, 50), (20, 27), (41, 55)):
        browser.mouse("Moved", *view.at(row, column))
        shown = float(readout(browser).removeprefix("NA: ").partition(" counts")[0])
        assert shown == pytest.approx(image[row, column], abs=step)
    type_in(browser, "a")
    assert found(browser) == "3 of 4 genes"
    names = "[...document.querySelectorAll('#beside .name')].map(e => e.textContent)"
    assert browser.run(names) == ["NA", HOSTILE, "FLAT"]
    browser.click("#beside label:nth-child(3) input")
    browser.wait("gene.name === 'FLAT'")
    type_in(browser, "nowhere")
    assert found(browser) == "None of the 4 genes with a map has “nowhere” in its name."
    bad = ("Log.entryAdded", "Runtime.exceptionThrown")
    assert not [event for event in browser.events if event["method"] in bad]


def test_a_folder_that_is_missing_or_of_another_page_is_named(browser, small_page, tmp_path):
    page = tmp_path / "a #1%.html"
    shutil.copy(small_page, page)
    folder = tmp_path / "a #1%-genes"
    shutil.copytree(small_page.with_name(folder.name), folder)
    (folder / "1.js").write_bytes((folder / "2.js").read_bytes().replace(b"(2,", b"(1,"))
    (folder / "2.js").unlink()
    browser.open(page)
    for index in (1, 2):
        browser.run(f"chooseGene({index}).catch(fail)")
        assert "is in the folder a #1%-genes, which is not beside this page" in readout(browser)
    assert browser.run("gene.name") == "KRT8"
    browser.run("chooseGene(3)")  # the page goes on
    assert browser.run("gene.name") == "FLAT"


def test_a_large_section_is_read_from_the_folder_and_in_few_steps_without_it(
    browser, section, tmp_path, monkeypatch
):
    write_layers(section)
    monkeypatch.setattr(report.report_maps, "GENE_BYTES", 450)
    path = tmp_path / "with" / "page.html"
    assert report.run(["--directory", str(section), "--output", str(path)]) == 0
    (tmp_path / "alone").mkdir()
    alone = Path(shutil.copy(path, tmp_path / "alone"))
    image = make_maps()[..., 0]
    for page, levels in ((path, 255), (alone, 15)):
        browser.open(page)
        assert browser.run("gene.levels") == levels
        step, view = float(np.nanmax(image) - np.nanmin(image)) / (levels - 1), View(browser)
        for row, column in ((3, 50), (20, 27), (41, 55)):
            browser.mouse("Moved", *view.at(row, column))
            shown = readout(browser).partition("KRT8: ")[2].partition(" counts")[0]
            assert float(shown) == pytest.approx(image[row, column], abs=step)
        bar = browser.run("document.getElementById('bars').textContent")
        assert ("is in the folder page-genes, which is not beside" in bar) == (page == alone)
        gone = browser.run("document.querySelector('[name=layer][value=uncertainty]').disabled")
        assert gone == (page == alone)
    assert "folder page-genes" in browser.run("document.getElementById('scatter-text').textContent")
    browser.run("chooseGene(3)")  # whole in the page
    assert browser.run("gene.levels") == 255


@pytest.fixture(scope="module")
def coarse_page(_section, tmp_path_factory):
    """A page whose genes are coarse, with the full ones beside it; the last gene is only there."""
    directory = shutil.copytree(_section, tmp_path_factory.mktemp("coarse") / "coarse")
    write_layers(directory)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report.report_maps, "GENE_BYTES", 450)
        assert report.run(["--directory", str(directory), "--n-genes", "3"]) == 0
    return directory / "report.html"


def copy_page(page, tmp_path) -> Path:
    shutil.copytree(page.with_name("report-genes"), tmp_path / "report-genes")
    return Path(shutil.copy(page, tmp_path))


@pytest.mark.parametrize(
    ("old", "new", "why"),
    [
        (r'"codes":"....', '"codes":"', "is damaged"),
        (r'"codes":"[^"]*"', '"codes":"eJzLSM3JyQcABiwCFQ=="', "is of another section"),
        (r', "[0-9a-f]{16}"', ', "0123456789abcdef"', "of another page or run"),
        (r"takeGene.*", "takeGene(", "of another page or run"),
    ],
)
def test_a_damaged_gene_beside_the_page_costs_no_more_than_that(
    browser, coarse_page, tmp_path, old, new, why
):
    page = copy_page(coarse_page, tmp_path)
    script = tmp_path / "report-genes" / "0.js"
    script.write_text(re.sub(old, new, script.read_text("utf-8"), count=1), "utf-8")
    browser.open(page)
    assert browser.run("[gene.name, gene.levels, Boolean(gene.sd)]") == ["KRT8", 15, False]
    assert why in browser.run("document.getElementById('bars').textContent")
    browser.run("chooseGene(1)")
    assert browser.run("[gene.name, gene.levels, Boolean(gene.sd)]") == ["NA", 255, True]


def test_without_the_folder_links_to_its_genes_open_the_page_and_say_so(
    browser, coarse_page, tmp_path
):
    page = Path(shutil.copy(coarse_page, tmp_path))
    browser.open(page)
    browser.run("location.hash = '#gene=FLAT'")
    browser.wait("document.getElementById('readout').textContent.includes('FLAT')")
    assert "The map of FLAT is in the folder report-genes" in readout(browser)
    assert browser.run("gene.name") == "KRT8"
    browser.run("location.hash = '#rgb=KRT8&rgb=FLAT&rgb=NA&layer=uncertainty&range=0+0.5'")
    browser.wait("look.mixed && trio[2]")
    assert browser.run("trio.map(one => one && one.name)") == ["KRT8", None, "NA"]
    assert browser.run("gene.range[1] === gene.top")  # the range was that of another layer
    browser.run("chooseGene(3).catch(fail)")  # FLAT cannot be read: green stays free
    browser.run("chooseGene(2)")
    assert browser.run("trio.map(one => one && one.name)") == ["KRT8", HOSTILE, "NA"]


def test_sums_of_coarse_maps_are_those_of_the_maps(browser, coarse_page, tmp_path):
    page = copy_page(coarse_page, tmp_path)
    script = tmp_path / "report-genes" / "3.js"
    for name in ("0.js", "1.js", "2.js"):
        script.with_name(name).unlink()
    browser.open(page)
    browser.run("chooseGene(3)")
    script.unlink()
    browser.click("[data-for=rectangle]")
    view = View(browser)
    drag(browser, [view.at(0, 0), view.at(SHAPE[0] - 1, SHAPE[1] - 1)])
    rows = area(browser, 1)["rows"]
    maps = make_maps()
    assert [row["index"] for row in rows] == [0, 1, 2, 3]
    for row in rows:
        expected = np.nansum(maps[1:-1, 1:-1, row["index"]])  # its border counts by shares
        whole = np.nansum(maps[..., row["index"]])
        assert expected * 0.99 <= row["counts"] <= whole * 1.01
    browser.run("loaded.delete(3)")
    browser.run("chooseArea(chosenArea)")
    assert [row["index"] for row in area(browser, 1)["rows"]] == [0, 1, 2]


# ----- areas -----
def drag(browser, points) -> None:
    (x, y), *rest = points
    browser.mouse("Moved", x, y)
    browser.mouse("Pressed", x, y, button="left", clickCount=1)
    for x, y in rest:
        browser.mouse("Moved", x, y, button="left", buttons=1)
    browser.mouse("Released", x, y, button="left", clickCount=1)


def area(browser, number: int) -> dict:
    """What the page says of an area, once it is summed."""
    browser.wait(f"areas.length === {number} && chosenArea.rows && !chosenArea.waits")
    facts = "({ rows: chosenArea.rows, all: chosenArea.all, tissue: chosenArea.tissue })"
    return browser.run(facts)


def test_a_rectangle_sums_the_shares_of_its_superpixels(opened):
    opened.click("[data-for=rectangle]")
    view = View(opened)
    edges = ((10.25, 20.5), (18.75, 24.0))  # rows and columns from 0 at the upper left
    drag(opened, [view.at(row - 0.5, column - 0.5) for row, column in edges])
    found = area(opened, 1)
    (top, left), (bottom, right) = edges
    height, width = (np.arange(n) for n in SHAPE)
    down = np.clip(np.minimum(bottom, height + 1) - np.maximum(top, height), 0, 1)
    across = np.clip(np.minimum(right, width + 1) - np.maximum(left, width), 0, 1)
    weights, maps = np.outer(down, across), make_maps()
    assert found["all"] == pytest.approx(weights.sum(), rel=0.03)  # the mouse stands on whole px
    for row in found["rows"]:
        expected = np.nansum(weights * maps[..., row["index"]])
        assert row["counts"] == pytest.approx(expected, rel=0.03)
        assert row["sd"] is None  # there is no cnts-super-sd
    text = opened.run("document.getElementById('area-text').textContent")
    assert text.startswith("area 1: ")
    assert float(text.split()[2]) == pytest.approx(weights.sum() * 64e-6, rel=0.03)
    opened.click("#area-list button[aria-label='Remove area 1']")
    assert opened.run("document.getElementById('areas').hidden")


def test_an_area_is_drawn_by_keys(opened):
    opened.click("[data-for=lasso]")
    opened.run("canvas.focus()")
    for keys in (("ArrowDown",), ("ArrowRight",) * 3, ("ArrowDown",) * 2):
        for key in keys:
            opened.press(key, shift=True)
        opened.press(" ", text=" ")
    opened.press("Enter", text="\r")
    triangle = area(opened, 1)  # two sides of 20 and 30 superpixels, cut by the edges of the map
    corners = opened.run("areas[0].points")
    assert len(corners) == 3
    area_of = abs(np.linalg.det(np.diff(corners, axis=0))) / 2
    assert triangle["all"] == pytest.approx(area_of, rel=0.02)


def test_a_region_that_is_clicked_is_summed(opened):
    opened.click("[value=regions]")
    opened.click("#view")  # the middle of the map, in region 3
    found, maps = area(opened, 1), make_maps()
    inside = make_regions() == 3
    assert found["all"] == inside.sum()
    for row in found["rows"]:
        expected = np.nansum(maps[inside][:, row["index"]])
        step = np.ptp(maps[inside][:, row["index"]]) / 508
        assert row["counts"] == pytest.approx(expected, abs=step * inside.sum() + 1e-6)
    assert "region 3: " in opened.run("document.getElementById('area-text').textContent")


def saved(browser, folder, button: str):
    """What a button hands out, as a file."""
    browser.ask("Page.setDownloadBehavior", behavior="allow", downloadPath=str(folder))
    before = set(folder.iterdir())
    browser.click(button)
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        new = [f for f in set(folder.iterdir()) - before if not f.name.endswith(".crdownload")]
        if new and new[0].stat().st_size:
            return new[0]
        time.sleep(0.05)
    raise AssertionError(f"{button} gave no file")


def test_areas_are_saved_for_cells_py_and_spreadsheets(opened, tmp_path, stage):
    opened.click("[data-for=lasso]")
    view = View(opened)
    bow = [(8, 30), (30, 50), (30, 30), (8, 50)]  # crosses itself in the middle
    steps = [
        (r1 + (r2 - r1) * t / 8, c1 + (c2 - c1) * t / 8)
        for (r1, c1), (r2, c2) in itertools.pairwise(bow)
        for t in range(9)
    ]
    drag(opened, [view.at(*step) for step in steps])
    found = area(opened, 1)
    path = saved(opened, tmp_path, "#save-outlines")
    assert path.suffix == ".geojson"
    outlines = outline_files.read_outlines(stage, path, nuclei=False)
    assert [(one.id, one.of_class) for one in outlines] == [("area 1", "area 1")]
    frame = cells.PixelFrame("he", (SHAPE[0] * 16, SHAPE[1] * 16), (1.0, 1.0))
    exact = cells.cells_of_outlines(outlines, frame, SHAPE, path)
    maps = np.nan_to_num(make_maps()).reshape(-1, len(GENES))
    totals = (exact.inside @ maps)[0]
    assert found["all"] == pytest.approx(exact.area[0] / 256, rel=0.01)
    for row in found["rows"]:
        assert row["counts"] == pytest.approx(totals[row["index"]], rel=0.01)
    table = pd.read_csv(saved(opened, tmp_path, "#save-counts"), keep_default_na=False)
    assert table["gene"].tolist() == GENES
    np.testing.assert_allclose(table["counts"], totals, rtol=0.01)
    assert set(table["sd_counts"]) == {""}
    assert table["area_mm2"][0] == pytest.approx(exact.area[0] / 256 * 64e-6, rel=0.01)


def test_pictures_are_saved(opened, tmp_path):
    choose(opened, "KRT8")
    image = Image.open(saved(opened, tmp_path, "#save-picture"))
    width, height = opened.run("[canvas.clientWidth, canvas.clientHeight]")
    assert image.width == 2 * (width + 24)
    assert image.height > 2 * height
    pixels = np.asarray(image.convert("RGB"))
    assert (pixels[-1] == 255).all()  # white below the colour bar
    view = View(opened)
    picture = opened.picture()
    left, top = opened.run("(r => [r.x, r.y])(canvas.getBoundingClientRect())")
    for row, column in ((25, 40), (33, 20)):
        x, y = view.at(row, column)
        shown = pixels[round(2 * (y - top + 46)), round(2 * (x - left + 12))]
        np.testing.assert_allclose(shown, picture(x, y), atol=6)
    chart = saved(opened, tmp_path, "#scatter-save")
    svg = ElementTree.fromstring(chart.read_text(encoding="utf-8"))
    space = "{http://www.w3.org/2000/svg}"
    assert svg.tag == f"{space}svg"
    dots = next(e for e in svg.iter(f"{space}path") if e.get("class") == "dots")
    assert dots.get("stroke").startswith("rgb(")  # by itself, without the page's style


# ----- more than one picture, and the address -----
def test_pictures_side_by_side_move_together(opened):
    choose(opened, "KRT8")
    opened.click("#spots")
    opened.click("#side")
    frames = opened.run("frames()")
    assert [frame["kind"] for frame in frames] == ["image", "spots", "map"]  # there is no sd
    left, top = opened.run("(r => [r.x, r.y])(canvas.getBoundingClientRect())")

    def at(frame, row, column):
        x, y = opened.run(
            f"[({column + 0.5} - view.left) * view.scale, ({row + 0.5} - view.top) * view.scale]"
        )
        return left + frame["x"] + x, top + frame["y"] + y

    for _ in range(2):
        for frame in frames:
            opened.mouse("Moved", *at(frame, 22, 20))
            assert "row 22, column 20" in readout(opened)
        off(opened)
        picture = opened.picture()
        np.testing.assert_allclose(picture(*at(frames[0], 22, 20)), PINK, atol=4)
        assert np.abs(picture(*at(frames[2], 22, 20)) - np.array(PINK)).max() > 10
        opened.run("zoom(2)")
        opened.run("new Promise(requestAnimationFrame)")
    opened.click("[name=kind][value=image]")
    assert opened.run("kinds") == ["spots", "map"]
    opened.click("#side")
    assert opened.run("kinds") == ["overlay"]


def test_the_address_holds_the_view(browser, page):
    browser.open(page)
    browser.click("[name=mode][value=three]")
    browser.click("#genes label:nth-child(3) input")
    browser.wait("trio[1]")
    for control in ("#spots", "[value=magma]", "[value=sqrt]", "#fade", "#side"):
        browser.click(control)
    set_value(browser, "range-high", 700)
    set_value(browser, "opacity", 35)
    browser.run("zoom(3); view.left += 4; limit()")
    browser.wait("location.hash.includes('at=')")
    browser.run("new Promise(done => setTimeout(done, 400))")
    state = (
        "[describeView(), trio.map(one => one && one.name), gene.name, "
        "view.scale.toFixed(3), view.left.toFixed(2), kinds, look, gene.range[1].toFixed(4)]"
    )
    before, address = browser.run(state), browser.run("location.href")
    browser.ask("Page.navigate", url="about:blank")
    browser.ask("Page.navigate", url=address)
    browser.wait("document.documentElement?.dataset.ready && location.protocol === 'file:'")
    assert browser.run(state) == before
    assert before[1] == ["KRT8", HOSTILE, None]
    browser.run("location.hash = '#gene=NA&layer=regions'")
    browser.wait("gene.name === 'NA' && layer === 'regions'")
    assert browser.run("kinds") == ["overlay"]


# ----- layers -----
@pytest.fixture(scope="module")
def full_page(_section, tmp_path_factory):
    """With all layers: uncertainty, regions, annotation and cells."""
    directory = shutil.copytree(_section, tmp_path_factory.mktemp("full") / "full")
    write_layers(directory)
    assert report.run(["--directory", str(directory)]) == 0
    return directory / "report.html"


def test_layers_are_drawn_and_read_out(browser, full_page):
    browser.open(full_page)
    choose(browser, "KRT8")
    view, image = View(browser), make_maps()[..., 0]
    browser.mouse("Moved", *view.at(20, 27))
    sd = float(re.search(r"sd ([\d.]+)", readout(browser))[1])
    assert sd == pytest.approx(image[20, 27] / 4, abs=float(np.nanmax(image)) / 4 / 254)
    assert "stroma <b>" in readout(browser)
    browser.click("#fade")
    set_opacity(browser, 100)
    for name, expected in (
        ("annotation", [0, 0, 255]),
        ("uncertainty", expected_colour("KRT8", image[20, 27], "viridis")),
    ):
        browser.click(f"[name=layer][value={name}]")
        off(browser)
        np.testing.assert_allclose(browser.picture()(*view.at(20, 27)), expected, atol=6)
    bars = "[...document.querySelectorAll('.colour-bar strong')].map(e => e.textContent)"
    assert browser.run(bars) == ["uncertainty of KRT8"]
    for name, expected in (("none", []), ("annotation", []), ("map", ["KRT8"])):
        browser.click(f"[name=layer][value={name}]")  # no bar of what is not in the picture
        assert browser.run(bars) == expected
    browser.click("[name=layer][value=annotation]")
    browser.click("#spots")
    assert browser.run(bars) == ["KRT8"]
    browser.click("#spots")
    browser.click("[name=layer][value=uncertainty]")
    browser.click("#cells")
    browser.mouse("Moved", *view.at(5, 40))
    assert "cell of class tumour" in readout(browser)
    off(browser)
    colour = [int(page_parts.REGION_COLOURS[0][at : at + 2], 16) for at in (1, 3, 5)]
    below = expected_colour("KRT8", image[5, 40], "viridis")
    inside = browser.picture()(*view.at(5, 40))  # near by, a cell is a clear disc in a ring
    np.testing.assert_allclose(inside, 0.35 * np.array(colour) + 0.65 * below, atol=6)
    key = browser.run("document.getElementById('key').textContent")
    assert "cells: tumour" in key
    browser.click("[data-for=rectangle]")
    drag(browser, [view.at(10, 20), view.at(20, 30)])
    (row,) = (one for one in area(browser, 1)["rows"] if one["index"] == 0)
    (left, top), _, (right, bottom), _ = browser.run("areas[0].points")
    assert row["sd"] == pytest.approx(
        sd_of_rectangle(image / 4, top, left, bottom, right), rel=0.02
    )


def sd_of_rectangle(sd: np.ndarray, top: float, left: float, bottom: float, right: float) -> float:
    """Over all pairs of superpixels: half of a variance is shared with those near by."""
    height, width = (np.arange(n) for n in SHAPE)
    down = np.clip(np.minimum(bottom, height + 1) - np.maximum(top, height), 0, 1)
    across = np.clip(np.minimum(right, width + 1) - np.maximum(left, width), 0, 1)
    weights = np.outer(down, across)
    places = np.argwhere(weights > 0)
    parts = (weights * sd)[weights > 0]
    apart = np.square(places[:, None] - places[None]).sum(2)
    together = 0.5 * (apart == 0) + 0.45 * np.exp(-apart / 2) + 0.05 * np.exp(-apart / 32)
    return float(np.sqrt(parts @ together @ parts))


def test_what_is_not_there_names_its_command(opened):
    text = opened.run("document.querySelector('.missing').textContent")
    for words in ("HISTEX.py", "--uncertainty", "analysis/annotate.py", "analysis/cells.py"):
        assert words in text
    assert "segment.py" not in text
    for control in ("#cells", "[value=uncertainty]", "[value=annotation]"):
        assert opened.run(f"document.querySelector('{control}').disabled")


# ----- help, fingers, paper, accessibility -----
def test_help_opens_by_button_and_by_key(opened):
    opened.click("#help-open")
    assert opened.run("document.getElementById('help').open")
    opened.click("#help-close")
    assert not opened.run("document.getElementById('help').open")
    opened.press("?", text="?")
    assert opened.run("document.getElementById('help').open")
    opened.run("document.getElementById('help').close()")
    type_in(opened, "?")
    assert not opened.run("document.getElementById('help').open")


def test_a_finger_scrolls_the_page_and_two_zoom(browser, page):
    browser.open(page, width=390, height=844)

    def move(fingers, steps) -> None:
        """Fingers (x, y), each moved by its step (x, y), ten times."""
        browser.touch("Start", fingers)
        for n in range(1, 11):
            browser.touch(
                "Move",
                [(x + n * dx, y + n * dy) for (x, y), (dx, dy) in zip(fingers, steps, strict=True)],
            )
        browser.touch("End", [])

    x, y = View(browser).at(20, 28)
    move([(x, y)], [(0, -20)])
    browser.wait("window.scrollY > 100")
    browser.run(  # until it no longer glides
        "new Promise(done => { let y = -1; const timer = setInterval(() => { "
        "if (y === scrollY) done(clearInterval(timer)); y = scrollY; }, 200); })"
    )
    browser.run("scrollTo(0, 0)")
    scale = browser.run("view.scale")
    move([(x - 20, y), (x + 20, y)], [(-6, 0), (6, 0)])
    browser.wait(f"view.scale > 2 * {scale}")
    left, scale = browser.run("[view.left, view.scale]")
    move([(x, y)], [(-6, 0)])  # when zoomed in, a finger moves the section
    browser.wait(f"Math.abs(view.left - {left + 60 / scale}) < 0.5")
    assert browser.run("window.scrollY") == 0


def test_on_paper_there_are_no_controls_and_no_dark(browser, page):
    browser.open(page, prefers_color_scheme="dark")
    features = [{"name": "prefers-color-scheme", "value": "dark"}]
    browser.ask("Emulation.setEmulatedMedia", media="print", features=features)
    assert browser.run("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    seen = "e => document.querySelector(e).getClientRects().length > 0"
    assert browser.run(f"['.controls', '.tools', '.save-chart'].some({seen})") is False
    assert browser.run(f"['#view', '.colour-bar', '#scatter svg', 'h1'].every({seen})")
    browser.ask("Emulation.setEmulatedMedia", media="", features=[])


AXE = Path(os.environ.get("AXE", ROOT / "node_modules" / "axe-core" / "axe.min.js"))


@pytest.mark.skipif(not AXE.is_file(), reason="no axe-core (npm install axe-core, or AXE=file)")
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1400, 390])
def test_axe_finds_nothing_serious(browser, full_page, scheme, width):
    browser.open(full_page, width=width, prefers_color_scheme=scheme)
    browser.click("[value=regions]")
    browser.click("#view")
    area(browser, 1)
    browser.click("[name=mode][value=three]")
    browser.click("#side")
    browser.run("document.querySelectorAll('details').forEach(e => { e.open = true; })")
    browser.run(AXE.read_text(encoding="utf-8") + "; 0")
    for opened in (False, True):
        if opened:
            browser.run("document.getElementById('help').showModal()")
        found = browser.run("axe.run().then(all => all.violations)")
        bad = [one for one in found if one["impact"] in ("serious", "critical")]
        assert not bad, [(one["id"], one["nodes"][0]["html"]) for one in bad]
