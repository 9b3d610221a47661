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

import matplotlib
import numpy as np
import pytest
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
    write_page,
    write_section,
)

from analysis import page as page_parts
from analysis import report

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


@pytest.mark.parametrize("colours", ["viridis", "cividis", "magma", "inferno"])
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
