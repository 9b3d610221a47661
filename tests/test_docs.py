"""README, docs/ and the door: links lead somewhere, commands parse, Python in them runs."""

import json
import re
import runpy
import shlex
import shutil
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from conftest import ROOT, run

import HISTEX
from analysis import inputs
from docs import figure
from reading import cli
from writing import origin

PAGES = sorted(
    path.relative_to(ROOT)
    for path in (
        ROOT / "README.md",
        ROOT / "CHANGELOG.md",
        ROOT / ".github/CONTRIBUTING.md",
        *(ROOT / "docs").glob("*.md"),
    )
)
SCRIPTS = sorted(
    path.relative_to(ROOT).as_posix()
    for room in (".", "analysis", "benchmarks", "demo", "docs", "prepare", "reference", "workflow")
    for path in (ROOT / room).glob("*.py")
    if 'if __name__ == "__main__":' in path.read_text(encoding="utf-8")
)
OF_OTHERS = {  # options of git, pip, pytest, torchrun and others
    "--cov", "--cov-report", "--index-url", "--nproc-per-node",
}  # fmt: skip


def text_of(page: Path) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.M | re.S)


def prose(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)


# ----- shape and links -----
def test_the_readme_is_short():
    assert len(text_of(Path("README.md")).splitlines()) <= 160


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_lines_fit_100_columns(page):
    """Rows of tables, images and addresses cannot be broken."""
    for line in prose(text_of(page)).splitlines():
        assert len(line) <= 100 or line.startswith(("|", "![")) or "http" in line, line


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", prose(text_of(page)), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in headings}


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(text_of(page))):
        if re.match(r"https://|mailto:", target):
            continue
        name, _, anchor = target.partition("#")
        there = (ROOT / page).parent / name if name else ROOT / page
        assert there.exists(), f"{page}: {target}"
        if anchor:
            assert anchor in anchors(there.resolve().relative_to(ROOT)), f"{page}: {target}"


def test_every_page_is_reached_from_the_readme():
    seen, open_ = set(), [Path("README.md")]
    while open_:
        page = open_.pop()
        seen.add(page)
        for name in re.findall(r"\]\(([^)\s#]+\.md)", text_of(page)):
            if not name.startswith("https://"):
                there = ((ROOT / page).parent / name).resolve().relative_to(ROOT)
                open_ += {there} - seen
    assert set(PAGES) <= seen


# ----- commands -----
@cache
def parser_of(script: str) -> cli.Parser:
    """The parser by which a script reads its command line, before any slow import."""
    found = []

    def take(parser, *_):
        found.append(parser)
        raise SystemExit

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli.Parser, "parse_args", take)
        patch.setattr(sys, "path", [str((ROOT / script).parent), *sys.path])
        with pytest.raises(SystemExit):
            runpy.run_path(str(ROOT / script), run_name="__main__")
    return found[0]


def script_named(name: str) -> str:
    """Its path; prose may leave out the room if only one room has the name."""
    matches = [s for s in SCRIPTS if s == name or s.endswith("/" + name)]
    assert len(matches) == 1, f"{name}: {matches}"
    return matches[0]


def commands(page: Path) -> list[list[str]]:
    """Commands of the bash blocks, split into words; lines of a loop lose its keywords."""
    found = []
    for block in blocks(text_of(page), "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            for part in re.split(r"\s(?:&&|;)\s", line):
                if words := shlex.split(part.replace("<your fork>", "FORK"), comments=True):
                    found.append(words)
    return found


def check_python(words: list[str]) -> None:
    position = next(i for i, word in enumerate(words) if word.endswith(".py"))
    parser, given = parser_of(words[position]), words[position + 1 :]
    try:
        parser.parse_args(given)
    except SystemExit:
        pytest.fail(f"does not parse: {shlex.join(words)}")


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_commands_are_those_of_the_scripts(page):
    for words in commands(page):
        if words[0] in ("python", "torchrun") and "-m" not in words:
            check_python(words)
        elif words[0] == "bash":
            assert (ROOT / words[1]).is_file(), words
        elif words[:2] == ["pip", "install"] and "-r" in words:
            assert (ROOT / words[words.index("-r") + 1]).is_file(), words


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_options_in_the_text_are_those_of_the_scripts(page):
    known = {o for script in SCRIPTS for o in parser_of(script)._option_string_actions}
    for code in re.findall(r"`([^`]+)`", prose(text_of(page))):
        named = re.match(r"(?:python )?([\w/]+\.py) .*--", code)
        has = parser_of(script_named(named[1]))._option_string_actions if named else known
        for option in re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", code):
            assert option in has or option in OF_OTHERS, f"{page}: {code}"


def test_prose_names_only_scripts_and_modules_that_are_there():
    for page in PAGES:
        for name in re.findall(r"`((?:\w+/)+\w+\.py)`", text_of(page)):
            assert (ROOT / name).is_file(), f"{page}: {name}"


# ----- Python -----
def test_the_readme_reads_a_map(finished_sample, monkeypatch, capsys):
    (code,) = blocks(text_of(Path("README.md")), "python")
    gene = pd.read_csv(finished_sample / "cnts-super" / "index.csv")["gene"][0]
    folder = finished_sample.parent / "for the README"
    shutil.copytree(finished_sample, folder / "dataset", dirs_exist_ok=True)
    monkeypatch.chdir(folder)
    exec(code.replace("KRT8", gene).replace("[100, 200]", "[14, 21]"), {})
    shown = capsys.readouterr().out.split(")")
    assert shown[0] == "(28, 42"
    image = inputs.read_map(inputs.map_files(finished_sample)[gene])
    assert float(shown[1]) == pytest.approx(float(image[14, 21]), rel=1e-4)


@pytest.mark.parametrize("number", range(3))
def test_networks_of_the_worked_example_run(number, finished, monkeypatch, capsys):
    code = blocks(text_of(Path("docs/adding-a-network.md")), "python")[number]
    monkeypatch.setattr(HISTEX, "PRESETS", dict(HISTEX.PRESETS))
    before = set(HISTEX.PRESETS)
    exec(code, dict(vars(HISTEX)))
    (name,) = set(HISTEX.PRESETS) - before
    options = ("--epochs", "1", "--n-states", "1", "--n-plots", "0", "--device", "cpu")
    assert run("HISTEX.py", finished, "--preset", name, *options) == 0
    assert f"preset {name}" in capsys.readouterr().out
    assert json.loads((finished / "HISTEX.json").read_text())["arguments"]["preset"] == name


def test_the_tutorial_runs(tmp_path, monkeypatch):
    """Its cells in their order, with small settings in place of its own."""
    pytest.importorskip("matplotlib").use("Agg")
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "path", list(sys.path))
    small = f"section_folder, size_um = {str(tmp_path / 'section')!r}, 400\nn_states = epochs = 1"
    names: dict = {}
    cells = json.loads(text_of(Path("docs/tutorial.ipynb")))["cells"]
    for cell in cells:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            tags = cell["metadata"].get("tags", ())
            exec(small if "parameters" in tags else "".join(cell["source"]), names)
    names["plt"].close("all")
    assert names["image"].shape == names["sd"].shape
    assert len(names["held_out"]) == names["counts"].shape[1]
    assert 0 < names["regions"].max() <= 5
    assert names["scores"]["ceiling_4x"].median() > names["scores"]["linear_4x"].median()
    for target in re.findall(r"\]\(([^)]+)\)", str(cells)):
        assert (ROOT / "docs" / target).exists(), target


# ----- the picture -----
def test_genes_of_the_picture_are_those_at_the_percentiles():
    r = pd.Series(np.linspace(0, 1, 101), [f"G{i}" for i in range(101)])
    r["never seen"] = np.nan
    shown = figure.choose_genes(r.sample(frac=1, random_state=0))
    assert list(shown) == ["G90", "G50", "G10"]


# ----- the door -----
def test_workflows_run_the_commands_of_the_readme():
    used = [words for words in commands(Path("README.md")) if words[0] == "bash"]
    assert len(used) == 2
    jobs = yaml.safe_load(text_of(Path(".github/workflows/tests.yml")))["jobs"]
    steps = [step.get("run", "") for job in jobs.values() for step in job["steps"]]
    for words in used:
        assert shlex.join(words) in steps
    systems = {"ubuntu-latest", "macos-latest", "windows-latest"}
    assert all(set(job["strategy"]["matrix"]["os"]) == systems for job in jobs.values())


@pytest.mark.parametrize("form", ["bug.yml", "maps.yml"])
def test_forms_ask_for_the_record(form):
    body = yaml.safe_load(text_of(Path(".github/ISSUE_TEMPLATE") / form))["body"]
    (record,) = (field for field in body if field.get("id") == "record")
    assert record["validations"]["required"]
    assert ".json" in record["attributes"]["label"] + record["attributes"]["description"]


def test_the_paper_is_cited_by_its_title():
    cited = yaml.safe_load(text_of(Path("CITATION.cff")))
    title = " ".join(cited["preferred-citation"]["title"].split())
    assert title in " ".join(text_of(Path("README.md")).split())
    assert cited["license"] == "MIT"
    assert text_of(Path("LICENSE")).startswith("MIT License")


def test_the_version_is_the_same_everywhere():
    cited = yaml.safe_load(text_of(Path("CITATION.cff")))
    headings = re.findall(r"^## \[(.*?)\](?: - (.*))?$", text_of(Path("CHANGELOG.md")), flags=re.M)
    assert headings[0] == ("Unreleased", "")
    assert headings[1] == (origin.VERSION, str(cited["date-released"]))
    assert cited["version"] == origin.VERSION
    assert origin.versions()["histex"] == origin.VERSION


def test_hooks_check_with_the_ruff_of_the_tests():
    hooks = yaml.safe_load(text_of(Path(".pre-commit-config.yaml")))["repos"]
    (ruff,) = (repo for repo in hooks if repo["repo"].endswith("ruff-pre-commit"))
    assert f"ruff=={ruff['rev'].removeprefix('v')}" in text_of(Path("tests/requirements.txt"))
