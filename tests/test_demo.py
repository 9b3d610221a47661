"""The demo: a section whose truth is exact, and scores that agree with independent references."""

import hashlib
import pickle
import platform
import shutil
import subprocess

import cv2
import numpy as np
import pandas as pd
import pytest
from conftest import ROOT
from PIL import Image
from scipy.stats import norm, pearsonr

from analysis import evaluate, inputs
from demo import simulate, tissue

SIZE_UM = 400.0


@pytest.fixture(scope="module")
def section(tmp_path_factory):
    directory = tmp_path_factory.mktemp("demo") / "section B"
    assert simulate.run(["--directory", str(directory), "--size-um", str(SIZE_UM)]) == 0
    return directory


@pytest.fixture(scope="module")
def truth(section):
    return dict(np.load(section / "truth.npz"))


# ----- simulate.py -----
def digest(directory):
    """Of all files but the record, which tells when they were made."""
    files = [file for file in directory.iterdir() if file.name != "simulate.json"]
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def test_same_seed_same_bytes_other_seed_other_section(section, tmp_path):
    for folder, seed in (("same", "1"), ("other", "2")):
        simulate.run(
            ["--directory", str(tmp_path / folder), "--size-um", str(SIZE_UM), "--seed", seed]
        )
    first, same, other = digest(section), digest(tmp_path / "same"), digest(tmp_path / "other")
    assert first == same
    for name in ("he-raw.jpg", "cnts.csv", "truth.npz"):
        assert first[name] != other[name]


def test_a_sample_of_yours_is_not_replaced(tmp_path, capsys):
    (tmp_path / "cnts.csv").write_text("mine")
    options = ["--directory", str(tmp_path), "--size-um", str(SIZE_UM)]
    assert simulate.run(options) == 2
    error = capsys.readouterr().err
    assert "cnts.csv was not written by demo/simulate.py, which would overwrite it" in error
    assert {path.name for path in tmp_path.iterdir()} == {"cnts.csv"}
    assert (tmp_path / "cnts.csv").read_text() == "mine"
    assert simulate.run([*options, "--force"]) == 0
    assert simulate.run(options) == 0  # now it is one of ours
    assert "up to date, nothing to do" in capsys.readouterr().out
    (tmp_path / "cnts.csv").write_text("edited")
    assert simulate.run(options) == 0
    assert "kept your cnts.csv (--force makes a new one)" in capsys.readouterr().out
    before = digest(tmp_path)
    assert simulate.run([*options, "--seed", "2"]) == 2
    error = capsys.readouterr().err
    assert "cnts.csv was edited by hand, and other options were given" in error
    assert digest(tmp_path) == before
    assert (tmp_path / "cnts.csv").read_text() == "edited"
    assert simulate.run([*options, "--seed", "2", "--force"]) == 0
    assert (tmp_path / "cnts.csv").read_text() != "edited"


def test_files_agree_with_each_other(section, truth):
    locs = pd.read_csv(section / "locs-raw.csv", index_col=0)
    counts = pd.read_csv(section / "cnts.csv", index_col=0)
    pixel = float((section / "pixel-size-raw.txt").read_text())
    radius_um = float((section / "radius-raw.txt").read_text()) * pixel
    with Image.open(section / "he-raw.jpg") as image:
        assert image.size == (SIZE_UM / pixel, SIZE_UM / pixel)
    grid = int(SIZE_UM / 8)
    assert truth["counts"].shape == (grid, grid, counts.shape[1])
    assert truth["counts"].dtype == np.uint16
    assert truth["mean"].dtype == np.float32
    assert truth["tissue"].shape == (grid, grid)
    assert list(locs.index) == list(counts.index)
    assert list(truth["genes"]) == list(counts.columns)
    assert len(locs) >= 5
    assert radius_um == pytest.approx(27.5)
    between = np.hypot(*(locs.to_numpy()[:, None] - locs.to_numpy()[None]).T) * pixel
    between = between[between > 0]
    assert between.min() == pytest.approx(100, abs=0.02)
    # a spot has about capture x the molecules under it
    row, col = np.mgrid[:grid, :grid] * 8 + 4
    under = sum(
        truth["counts"][np.hypot(col - x, row - y) <= 27.5].sum()
        for x, y in locs.to_numpy() * pixel
    )
    assert counts.to_numpy().sum() / under == pytest.approx(truth["capture"], rel=0.12)


@pytest.fixture(scope="module")
def toy():
    """Cells on a layout without glass, and molecules that stay close to them."""
    rng = np.random.default_rng(3)
    layout = tissue.Layout(np.full((160, 160), tissue.STROMA, np.uint8), {})
    cells = pd.DataFrame(
        {
            "nx": rng.uniform(40, 120, 50),
            "ny": rng.uniform(40, 120, 50),
            "type": rng.choice(["tumour", "fibroblast", "tcell"], 50),
        }
    )
    return layout, cells, rng.gamma(2, 3, (50, 4)), rng.uniform(20, 60, 4)


def test_molecules_are_conserved_and_binned_like_a_brute_force_loop(toy):
    layout, cells, rates, ambient = toy
    xy, gene = simulate.scatter_molecules(layout, cells, rates, ambient, np.random.default_rng(1))
    drawn = np.random.default_rng(1).poisson(rates)  # the first draw of the same generator
    free = np.bincount(gene, minlength=4) - drawn.sum(0)
    assert (free > 0).all()
    assert (np.abs(free - ambient) < 5 * np.sqrt(ambient)).all()
    counts = simulate.bin_molecules(xy, gene, 20, 4)
    brute = np.zeros((20, 20, 4), int)
    for (x, y), g in zip(xy, gene, strict=True):
        brute[int(np.floor(y / 8)), int(np.floor(x / 8)), g] += 1
    np.testing.assert_array_equal(counts, brute)
    assert counts.sum() == len(xy)


def test_expected_counts_are_integrals_of_each_cells_cloud(toy):
    _, cells, rates, ambient = toy
    share = np.zeros((20, 20))
    share[:, :10] = 1.0
    mean = simulate.expected_counts(cells, rates, ambient, share, 20)
    edges = np.arange(21) * 8.0
    brute = np.zeros((20, 20, 4))
    for i, cell in cells.iterrows():
        sd = tissue.CELL_TYPES.scatter[cell.type]
        along_y, along_x = (np.diff(norm.cdf(edges, p, sd)) for p in (cell.ny, cell.nx))
        brute += np.outer(along_y, along_x)[..., None] * rates[i]
    brute[:, :10] += ambient / 200
    np.testing.assert_allclose(mean, brute, rtol=1e-3, atol=1e-4)
    assert mean.sum() == pytest.approx(rates.sum() + ambient.sum(), rel=1e-5)


def test_truth_counts_are_poisson_about_their_mean(truth):
    counts, mean = truth["counts"].astype(float), truth["mean"].astype(float)
    assert counts.sum() == pytest.approx(mean.sum(), rel=0.01)
    assert ((counts - mean) ** 2).sum() == pytest.approx(mean.sum(), rel=0.03)


def test_spot_counts_are_the_kept_molecules_under_the_disc():
    rng = np.random.default_rng(5)
    xy, gene = rng.uniform(0, 300, (4000, 2)), rng.integers(0, 3, 4000)
    spots = np.array([[60.0, 60.0], [160.0, 60.0], [110.0, 146.6]])
    efficiency = np.array([1.0, 0.5, 0.0])
    counts = simulate.catch(xy, gene, spots, efficiency, 3, np.random.default_rng(9))
    luck = np.random.default_rng(9).random(4000)
    brute = np.zeros((3, 3), int)
    for i, molecule in enumerate(xy):
        for s, spot in enumerate(spots):
            if np.hypot(*(molecule - spot)) <= 27.5 and luck[i] < efficiency[s]:
                brute[s, gene[i]] += 1
    np.testing.assert_array_equal(counts, brute)
    assert counts[0].sum() > counts[1].sum() > counts[2].sum() == 0


def test_spots_lie_on_tissue_only():
    compartment = np.full((500, 500), tissue.STROMA, np.uint8)
    compartment[:, 250:] = tissue.GLASS
    spots = simulate.spot_lattice(tissue.Layout(compartment, {}))
    y, x = np.mgrid[:500, :500] + 0.5
    share = [(compartment[np.hypot(x - a, y - b) <= 27.5] != 0).mean() for a, b in spots]
    assert len(spots) >= 10
    assert min(share) > simulate.MIN_SPOT_TISSUE - 0.05


def test_image_shows_nuclei_where_cells_are(section, truth):
    """Where there is much RNA the image is dark with nuclei; the glass is white."""
    image = np.asarray(Image.open(section / "he-raw.jpg").convert("L"), float)
    grid = truth["tissue"].shape
    grey = cv2.resize(image, grid[::-1], interpolation=cv2.INTER_AREA)
    assert grey[~truth["tissue"]].mean() > 230
    total = truth["mean"].sum(2)[truth["tissue"]]
    assert pearsonr(grey[truth["tissue"]], total).statistic < -0.3


@pytest.mark.parametrize("size", ["150", "401", "0", "nan"])
def test_size_must_be_whole_superpixels(size, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        simulate.run(["--directory", str(tmp_path / "x"), "--size-um", size])
    assert stop.value.code == 2
    assert "multiple of 8 um" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


# ----- scores and picture -----
def write_maps(section, maps, genes, padding=3):
    """What HISTEX.py leaves: a pickle per gene on the padded grid, NaN outside, and index.csv."""
    folder = section / "cnts-super"
    folder.mkdir()
    for i in range(len(genes)):
        padded = np.pad(maps[:, :, i], (0, padding), constant_values=np.nan).astype(np.float32)
        (folder / f"{i}.pickle").write_bytes(pickle.dumps(padded))
    index = pd.DataFrame({"gene": genes, "file": [f"{i}.pickle" for i in range(len(genes))]})
    index.to_csv(folder / "index.csv", index=False)
    locs = pd.read_csv(section / "locs-raw.csv", index_col=0) * simulate.PIXEL_UM / 0.5
    locs.to_csv(section / "locs.csv")
    (section / "radius.txt").write_text("55.0\n")
    with Image.open(section / "he-raw.jpg") as image:
        side = round(image.width * simulate.PIXEL_UM / 0.5)
        image.resize((side, side)).save(section / "he.jpg")


def test_score_of_perfect_maps_is_the_ceiling(section, truth, tmp_path, capsys):
    copy = shutil.copytree(section, tmp_path / "copy")
    write_maps(copy, np.where(truth["tissue"][..., None], truth["mean"], np.nan), truth["genes"])
    assert evaluate.run(["--directory", str(copy)]) == 0
    table = pd.read_csv(copy / "evaluation.csv", index_col=0)
    assert list(table.index) == list(truth["genes"])
    np.testing.assert_allclose(table["histex_1x"], table["ceiling_1x"], atol=1e-3)
    np.testing.assert_allclose(table["histex_4x"], table["ceiling_4x"], atol=1e-3)
    covered = truth["tissue"]
    expected = pearsonr(truth["mean"][covered][:, 0], truth["counts"][covered][:, 0]).statistic
    assert table["histex_1x"].iloc[0] == pytest.approx(expected, abs=1e-3)
    assert table["linear_4x"].median() < table["ceiling_4x"].median()
    assert "ceiling" in capsys.readouterr().out


def test_picture_is_drawn_for_genes_chosen_by_rule(section, truth, tmp_path):
    figure = pytest.importorskip("demo.figure")
    copy = shutil.copytree(section, tmp_path / "copy")
    write_maps(copy, truth["mean"], truth["genes"])
    evaluate.run(["--directory", str(copy), "--no-plot"])
    known = inputs.read_truth(copy)
    chosen = figure.choose_genes(known, pd.read_csv(copy / "evaluation.csv", index_col=0))
    assert len(chosen) == 4
    total = truth["counts"].sum((0, 1))
    markers = truth["kinds"] == "marker"
    assert next(iter(chosen)) == truth["genes"][markers][total[markers].argmax()]
    assert figure.run(["--directory", str(copy)]) == 0
    assert np.asarray(Image.open(copy / "demo.png")).std() > 20


def test_without_kinds_of_genes_the_most_abundant_are_drawn():
    figure = pytest.importorskip("demo.figure")
    counts = np.arange(6)[[2, 0, 4, 1, 5, 3]] * np.ones((3, 3, 1), int)
    known = inputs.Truth(counts, np.ones((3, 3), bool), list("ABCDEF"), None, None, 1.0)
    assert list(figure.choose_genes(known, pd.DataFrame())) == ["E", "C", "F", "A"]


def test_the_picture_of_the_readme_shows_the_r_of_the_maps(section, truth, tmp_path):
    figure = pytest.importorskip("docs.figure")
    copy = shutil.copytree(section, tmp_path / "copy")
    write_maps(copy, truth["mean"], truth["genes"])
    r = figure.score(copy, inputs.read_truth(copy))
    covered, gene = truth["tissue"], truth["genes"][3]
    expected = pearsonr(truth["mean"][covered][:, 3], truth["counts"][covered][:, 3]).statistic
    assert r.loc[gene, 1] == pytest.approx(expected, abs=1e-3)
    labels = [ax.get_ylabel() for ax in figure.draw(copy).axes]
    for gene, text in figure.choose_genes(r[1]).items():
        told = f"r = {r.loc[gene, 1]:.2f} at 8 µm, {r.loc[gene, 4]:.2f} at 32 µm"
        assert f"{gene}, {text}\n{told}" in labels
    assert figure.run(["--directory", str(copy), "--output", str(tmp_path / "p.jpg")]) == 0
    with Image.open(tmp_path / "p.jpg") as picture:
        assert picture.format == "JPEG"
        assert np.asarray(picture).std() > 20


# ----- run.sh -----
def test_run_sh_is_valid_bash_and_refuses_an_old_python(tmp_path):
    script = ROOT / "demo" / "run.sh"
    assert subprocess.run(["bash", "-n", script], check=False).returncode == 0
    old = tmp_path / "python3.8"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 3.8.1 && exit 0\nexit 1\n')
    old.chmod(0o755)
    env = {"PATH": "/usr/bin:/bin", "PYTHON": str(old)}
    done = subprocess.run(
        ["bash", script, tmp_path / "new section"],
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "3.11" in done.stderr
    assert "Python 3.8.1" in done.stderr


@pytest.fixture
def stub(tmp_path):
    """A Python that has no torch, whose pip says what it is given and takes a second."""
    script = tmp_path / "python"
    script.write_text(
        '#!/bin/sh\ncase "$*" in\n'
        "  *torch*is\\ None*) exit 1;;\n  *purelib*) echo /where/packages/go;;\n"
        '  *"pip install"*) echo "pip: $*"; sleep 1.3;;\nesac\n'
    )
    script.chmod(0o755)
    return script


def install(stub, **more):
    command = f'cd "{ROOT}"; . demo/environment.sh; use_environment -r requirements.txt'
    env = {"PATH": "/usr/bin:/bin", "PYTHON": str(stub), "VIRTUAL_ENV": "x", **more}
    command = ["bash", "-euo", "pipefail", "-c", command, "demo/run.sh"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [line for line in done.stdout.splitlines() if line]


def test_what_is_installed_is_told_before_and_while_it_is(stub):
    lines = install(stub, SPEAK_SECONDS="0.4")
    assert lines[0].endswith("the other packages in requirements.txt into /where/packages/go")
    pip = next(i for i, line in enumerate(lines) if line.startswith("pip: "))
    assert any(" GB of the disk" in line for line in lines[:pip])
    assert sum(line.startswith("still installing (") for line in lines[pip:]) >= 2
    if platform.system() == "Linux":
        assert "TORCH=cpu bash demo/run.sh" in lines[2]


def test_the_smaller_torch_is_taken_on_demand(stub):
    lines = install(stub, TORCH="cpu")
    first, second = (line for line in lines if line.startswith("pip: "))
    assert "torch>=" in first
    assert first.endswith("--index-url https://download.pytorch.org/whl/cpu")
    assert second.endswith("-r requirements.txt")
    assert not any("6 GB" in line for line in lines)


def test_the_environment_of_windows_is_found(tmp_path):
    copy = tmp_path / "copy"
    (copy / "demo").mkdir(parents=True)
    shutil.copy(ROOT / "demo" / "environment.sh", copy / "demo")
    (copy / ".venv" / "Scripts").mkdir(parents=True)
    own = copy / ".venv" / "Scripts" / "python.exe"
    own.write_text("#!/bin/sh\nexit 0\n")
    own.chmod(0o755)
    command = f'cd "{copy}"; . demo/environment.sh; use_environment x; echo "$python"'
    env = {"PATH": "/usr/bin:/bin"}
    done = subprocess.run(["bash", "-c", command], env=env, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == str(own)
