"""References: learning from sections of known truth, and what they bring to others."""

import json
import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import GENES, run
from PIL import Image
from safetensors.torch import load_file, save_file
from skimage.color import rgb2hed

import HISTEX
import utils
from analysis import inputs
from method import reference, registration
from method.reference import FEATURES, HALO, Encoder
from reference import learn, lessons, predict

CPU = torch.device("cpu")
NEW = "ONLY_HERE"  # a gene of one section with truth that the spots do not have


def rates_by_look(tokens: np.ndarray, n_genes: int) -> np.ndarray:
    """Expected counts (h, w, G) that depend on the tokens alone, in the same way everywhere."""
    x = (tokens - tokens.mean(axis=(0, 1))) / (tokens.std(axis=(0, 1)) + 1e-6)
    directions = np.random.default_rng(7).normal(size=(x.shape[-1], n_genes)) / x.shape[-1] ** 0.5
    return np.exp(1.2 * (x @ directions))


def write_truth(directory: Path, genes: list[str], seed: int, shuffled: bool = False) -> None:
    tokens = np.load(directory / "Histology_feature_map.npy").astype(float)
    rates = rates_by_look(tokens, len(genes))
    rng = np.random.default_rng(seed)
    if shuffled:
        rates = rng.permutation(rates.reshape(-1, len(genes))).reshape(rates.shape)
    tissue = inputs.read_mask(directory, tokens.shape[:2])
    counts = rng.poisson(rates).astype(np.uint16)
    np.savez(directory / "truth.npz", counts=counts, tissue=tissue, genes=np.array(genes))


@pytest.fixture(scope="module")
def sections(finished_sample, tmp_path_factory):
    """Two sections with truth: one has seven genes of the spots and one of its own."""
    folder = tmp_path_factory.mktemp("sections")
    for name, genes in (("east", GENES), ("south", [*GENES[:7], NEW])):
        shutil.copytree(finished_sample, folder / name)
        write_truth(folder / name, genes, seed=len(name))
    return [folder / "east", folder / "south"]


@pytest.fixture(scope="module")
def learned(sections, tmp_path_factory):
    """The file of a reference that was learned from both sections."""
    path = tmp_path_factory.mktemp("reference") / "tiny.safetensors"
    names = [str(section) for section in sections]
    assert learn.run(["--sections", *names, "--output", str(path), "--epochs", "10"]) == 0
    return path


def lesson_of(directory: Path) -> lessons.Lesson:
    args = learn.build_parser().parse_args(["--sections", str(directory), "--output", "x"])
    return learn.read_lessons(args)[0]


def facts_of(path: Path) -> dict:
    return json.loads((path.parent / "learn.json").read_text())


# ------------------------------------------------------------------------------------------------
# learning
# ------------------------------------------------------------------------------------------------
def test_a_reference_tells_of_a_section_that_it_does_not_know(learned):
    for row in facts_of(learned)["left_out"]:
        assert row["genes"] == 7  # those that the other section has
        assert row["reference 8 um"] > 0.25
        assert row["reference 8 um"] > row["linear 8 um"] + 0.2  # the spots say nothing here
    found = reference.read_reference(learned, backbone(learned))
    assert found.genes == [*GENES, NEW]
    assert np.isfinite(found.expected_r["expected_r_8um"]).tolist() == [True] * 7 + [False] * 2


def backbone(learned: Path) -> dict[str, str]:
    facts = facts_of(learned)
    return {key: facts[key] for key in ("backbone", "weights_sha256", "turns", "features")}


def test_left_out_blocks_train_nothing(sections, monkeypatch):
    """Whatever the truth says there, the weights after an epoch are the same."""
    monkeypatch.setattr(lessons, "BLOCK", 8)

    def weights(changed: bool) -> list[torch.Tensor]:
        lesson = lesson_of(sections[0])
        if changed:
            lesson.truth.counts[lesson.left_out] = 999
        args = learn.build_parser().parse_args(
            ["--sections", "x", "--output", "y", "--epochs", "1"]
        )
        return [*learn.learn([lesson], lesson.genes, args, CPU, "a test").parameters()]

    assert all(map(torch.equal, weights(False), weights(True)))


def test_every_superpixel_of_tissue_trains_once_an_epoch(sections):
    lesson = lesson_of(sections[0])
    seen = np.zeros(lesson.tissue.shape, int)
    for step in lessons.steps_of(lesson, np.random.default_rng(3)):
        patch, row, col = np.nonzero(step.counted)
        inside = slice(HALO, HALO + lessons.SIDE)
        np.add.at(seen, (step.row[:, inside][patch, row], step.col[:, inside][patch, col]), 1)
    np.testing.assert_array_equal(seen, lesson.tissue & ~lesson.left_out)


def test_the_loss_is_the_deviance_of_poisson(sections):
    """Against scipy's logarithm of the probability, in differences of two predictions."""
    from scipy.stats import poisson

    lesson = lesson_of(sections[0])
    columns = {lesson.directory: torch.arange(len(lesson.genes))}
    step = lessons.steps_of(lesson, np.random.default_rng(0))[0]

    def both(bias: float) -> tuple[float, float]:
        encoder = Encoder(lesson.tokens.shape[-1], len(lesson.genes)).eval()
        torch.nn.init.constant_(encoder.head.bias, bias)
        where = np.nonzero(step.counted)
        inside = slice(HALO, HALO + lessons.SIDE)
        places = (step.row[:, inside][where[0], where[1]], step.col[:, inside][where[0], where[2]])
        logp = poisson.logpmf(lesson.truth.counts[places], lesson.mean * np.exp(bias))
        loss = lessons.loss_of(encoder, step, columns, CPU)
        return loss.item(), -(logp / np.sqrt(lesson.mean)).mean()

    (a, wanted_a), (b, wanted_b) = both(0.0), both(0.3)
    assert a - b == pytest.approx(wanted_a - wanted_b, rel=1e-3)


def test_spots_teach_by_their_sums(finished, sections, tmp_path):
    """A section without truth; its loss is that of the disc's whole expectation."""
    lesson = lesson_of(finished)
    assert lesson.truth is None
    assert lesson.genes == GENES
    section = lesson.spots
    step = lessons.steps_of(lesson, np.random.default_rng(0))[0]
    encoder = Encoder(lesson.tokens.shape[-1], len(GENES)).eval()
    found = lessons.loss_of(encoder, step, {lesson.directory: torch.arange(len(GENES))}, CPU)
    expected = section.areas[step.spots].sum(axis=1, keepdims=True) * lesson.mean
    counts = section.counts[step.spots]
    wanted = (expected - counts * np.log(expected / expected)) / np.sqrt(expected)
    assert found.item() == pytest.approx(wanted.mean(), rel=1e-4)

    names = [str(path) for path in (sections[0], finished)]
    output = tmp_path / "mixed.safetensors"
    assert learn.run(["--sections", *names, "--output", str(output), "--epochs", "1"]) == 0
    kinds = [set(row) & {"spots", "superpixels"} for row in facts_of(output)["sections"]]
    assert kinds == [{"superpixels"}, {"spots"}]


def test_spots_alone_are_refused(finished, tmp_path, capsys):
    options = ["--sections", str(finished), "--output", str(tmp_path / "x.safetensors")]
    assert learn.run(options) == 2
    assert "None of the --sections has a truth.npz" in capsys.readouterr().err


def teach(sections: list[Path], folder: Path, *options: str) -> int:
    names = [str(section) for section in sections]
    output = str(folder / "x.safetensors")
    return learn.run(["--sections", *names, "--output", output, "--epochs", "1", *options])


def remedy(capsys) -> list[str]:
    """The words of the command that the last error names."""
    line = capsys.readouterr().err.strip().splitlines()[-1]
    return shlex.split(re.split("[Rr]un: ", line)[-1])


def test_the_commands_of_messages_can_be_run(sections, tmp_path, capsys):
    """learn.py has no --directory; what it names has the sections and the output."""
    output = tmp_path / "x.safetensors"
    output.write_text("mine")
    assert teach(sections[:1], tmp_path) == 2
    command = remedy(capsys)
    assert command[:2] == ["python", "reference/learn.py"]
    args = learn.build_parser().parse_args(command[2:])
    assert args.force
    assert learn.run(command[2:]) == 0
    assert len(load_file(output)) > 3


def test_a_section_that_is_not_there_is_named(sections, tmp_path, capsys):
    for path, what in ((tmp_path / "none", "does not exist"), (sections[0] / "he.jpg", "a file")):
        assert teach([path, sections[0]], tmp_path) == 2
        error = capsys.readouterr().err
        assert f"--sections {path}" in error
        assert what in error
        assert "--directory" not in error


def test_a_folder_is_not_replaced_by_a_reference(sections, tmp_path, capsys):
    kept = tmp_path / "x.safetensors" / "mine.txt"
    kept.parent.mkdir()
    kept.write_text("mine")
    assert teach(sections[:1], tmp_path, "--force") == 2
    assert "is a folder" in capsys.readouterr().err
    assert kept.exists()


def test_an_outdated_section_is_refused_unless_that_is_allowed(sections, tmp_path, capsys):
    section = Path(shutil.copytree(sections[0], tmp_path / "own"))
    (section / "pixel-size-raw.txt").write_text("0.51")
    assert teach([section], tmp_path) == 2
    assert "or add --allow-stale" in capsys.readouterr().err
    assert teach([section], tmp_path, "--allow-stale") == 0


def test_all_that_was_read_is_noted(sections, tmp_path, capsys):
    """A truth that changes, comes or goes, and gene-names.txt where the truth leans on it."""
    section = Path(shutil.copytree(sections[0], tmp_path / "own"))
    saved = dict(np.load(section / "truth.npz"))
    np.savez(section / "truth.npz", counts=saved["counts"], tissue=saved["tissue"])

    def learns(change) -> bool:
        change()
        assert teach([section, sections[1]], tmp_path) == 0
        return "nothing to do" not in capsys.readouterr().out

    def write_genes(first: str = "OTHER") -> None:
        (section / "gene-names.txt").write_text("\n".join([first, *GENES[1:]]) + "\n")

    assert learns(lambda: None)
    assert not learns(lambda: None)
    assert learns(write_genes)
    assert learns(lambda: write_truth(section, GENES, seed=9))
    write_genes(GENES[0])
    assert not learns(lambda: None)  # the truth has its own names now
    assert learns(lambda: (section / "truth.npz").unlink())
    assert not learns(lambda: None)
    assert learns(lambda: write_truth(section, GENES, seed=9))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda saved: {"genes": np.array(["", *GENES[1:]])}, "no name of a gene"),
        (lambda saved: {"counts": saved["counts"] * 0}, "tells 0 counts a superpixel"),
        (lambda saved: {"capture": 1e14}, "counts a superpixel"),
        (lambda saved: {k: saved[k].repeat(2, axis=0) for k in ("counts", "tissue")}, "anew"),
    ],
)
def test_an_odd_truth_is_refused(sections, tmp_path, capsys, change, said):
    section = Path(shutil.copytree(sections[0], tmp_path / "own"))
    saved = dict(np.load(section / "truth.npz"))
    np.savez(section / "truth.npz", **saved | change(saved))
    assert teach([section], tmp_path) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "x.safetensors").exists()


def test_a_gene_that_one_section_cannot_score_is_told_by_the_others(sections, tmp_path):
    section = Path(shutil.copytree(sections[0], tmp_path / "own"))
    saved = dict(np.load(section / "truth.npz"))
    saved["counts"][..., 0] = 0  # r is unknown here, and known in the other one
    np.savez(section / "truth.npz", **saved)
    assert teach([section, sections[1]], tmp_path) == 0
    found = reference.read_reference(tmp_path / "x.safetensors", backbone(tmp_path / "x"))
    assert np.isfinite(found.expected_r["expected_r_8um"][:7]).all()


def test_spots_that_cannot_be_read_do_not_end_the_learning(sections, tmp_path, capsys):
    section = Path(shutil.copytree(sections[0], tmp_path / "own"))
    (section / "cnts.csv").write_text("damaged")
    assert teach([section, sections[1]], tmp_path) == 0
    assert "note: spots that are not compared with" in capsys.readouterr().out


def test_scores_do_not_depend_on_how_many_genes_fit_the_memory(sections, monkeypatch):
    lesson = lesson_of(sections[0])
    encoder = Encoder(lesson.tokens.shape[-1], len(GENES)).eval()
    torch.nn.init.normal_(encoder.head.weight, std=0.1)
    linear = lessons.Linear.of(lesson)

    def scores(n_bytes: int) -> list[np.ndarray]:
        monkeypatch.setattr(lessons, "SCORED_BYTES", n_bytes)
        found = lessons.correlations(
            encoder, lesson, GENES, GENES[2:], lesson.left_out, CPU, linear
        )
        return [r for sizes in found.values() for r in sizes.values()]

    few, all_ = scores(1), scores(10**9)
    assert len(all_) == 4
    assert all(len(r) == len(GENES) - 2 for r in all_)
    for a, b in zip(few, all_, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_sections_of_one_image_are_told(learned):
    """As those of this file are: what they tell of each other is no score."""
    (said,) = [text for text in facts_of(learned)["warnings"] if "image" in text]
    assert "east, south have the same image" in said


def test_learning_that_diverges_is_said(sections, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(learn, "score_left_out", lambda *_: float("nan"))
    assert teach(sections[:1], tmp_path) == 2
    assert "The learning diverges: in epoch 1" in capsys.readouterr().err


def test_sections_of_other_networks_are_refused(sections, tmp_path, capsys):
    other = Path(shutil.copytree(sections[1], tmp_path / "other"))
    path = other / "Histology_Extractor.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"weights_sha256": "f" * 64}))
    options = ["--sections", str(sections[0]), str(other)]
    assert learn.run([*options, "--output", str(tmp_path / "x.safetensors")]) == 2
    error = capsys.readouterr().err
    assert "ffffffffffff" in error
    assert "with the same --backbone and --turns on all sections" in error


def test_the_second_time_there_is_nothing_to_do(learned, sections, capsys):
    options = ["--sections", *map(str, sections), "--output", str(learned), "--epochs", "10"]
    assert learn.run(options) == 0
    assert "nothing to do" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------
# the file
# ------------------------------------------------------------------------------------------------
def test_a_file_comes_back_as_it_was_written(learned, tmp_path):
    found = reference.read_reference(learned, backbone(learned))
    reference.write_reference(tmp_path / "again.safetensors", found)
    again = reference.read_reference(tmp_path / "again.safetensors", backbone(learned))
    assert (again.genes, again.facts) == (found.genes, found.facts)
    np.testing.assert_array_equal(again.rates, found.rates)
    for a, b in zip(again.encoder.parameters(), found.encoder.parameters(), strict=True):
        assert torch.equal(a, b)


def damage(path: Path, kind: str) -> None:
    if kind == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    elif kind == "other":
        save_file({"a": torch.zeros(2)}, path)
    elif kind == "facts":
        with reference.safetensors.safe_open(path, "pt") as file:
            about = json.loads(file.metadata()["histex"]) | {"sections": 3}
        save_file(load_file(path), path, {"histex": json.dumps(about)})
    elif kind == "gone":
        path.unlink()


@pytest.mark.parametrize("kind", ["cut", "other", "facts", "gone"])
def test_a_damaged_reference_is_refused(finished, learned, tmp_path, capsys, kind):
    path = Path(shutil.copy(learned, tmp_path / "bad.safetensors"))
    damage(path, kind)
    assert run("HISTEX.py", finished, "--reference", str(path), "--force") == 2
    assert "Give a file that reference/learn.py wrote" in capsys.readouterr().err


def name_of(genes: list[str], name: str) -> dict:
    return {"genes": [name, *genes[1:]]}


@pytest.mark.parametrize(
    ("tensors", "facts"),
    [
        ({"rates": torch.full((9,), torch.nan)}, {}),
        ({"rates": torch.zeros(9)}, {}),  # then no depth can be told
        ({"rates": torch.full((9,), -1.0)}, {}),
        ({"rates": torch.full((9,), 1e30)}, {}),
        ({"expected_r_32um": torch.full((9,), 5.0)}, {}),  # no later script would read these
        ({"expected_r_8um": torch.zeros(8)}, {}),
        ({"head.weight": torch.full((9, FEATURES), 3e38)}, {}),  # maps would not be finite
        ({"head.bias": torch.full((9,), torch.nan)}, {}),
        ({"body.1.weight": torch.zeros(256, 0)}, {}),
        ({}, {"genes": ["A"] * 9}),
        ({}, {"genes": "ABCDEFGHI"}),
        ({}, name_of([*GENES, NEW], "")),
        ({}, name_of([*GENES, NEW], " A")),
        ({}, name_of([*GENES, NEW], "A\nB")),
        ({}, name_of([*GENES, NEW], "\ud800")),
        ({}, {"features": 3}),
    ],
)
def test_a_reference_with_odd_values_is_refused(learned, tmp_path, tensors, facts):
    path = tmp_path / "odd.safetensors"
    with reference.safetensors.safe_open(learned, "pt") as file:
        about = json.loads(file.metadata()["histex"]) | facts
    save_file(load_file(learned) | tensors, path, {"histex": json.dumps(about)})
    with pytest.raises(utils.StageError, match="damaged or no reference"):
        reference.read_reference(path, backbone(learned))


def test_numbers_of_other_formats_are_read(learned, tmp_path):
    path = tmp_path / "other.safetensors"
    with reference.safetensors.safe_open(learned, "pt") as file:
        about = file.metadata()
    kept = load_file(learned)
    kept |= {"rates": kept["rates"].bfloat16(), "head.bias": kept["head.bias"].double()}
    save_file(kept, path, about)
    rates = reference.read_reference(path, backbone(learned)).rates
    assert rates.dtype == np.float32
    np.testing.assert_allclose(rates, load_file(learned)["rates"], rtol=0.01)


@pytest.mark.parametrize(
    ("fact", "told"),
    [({"weights_sha256": "f" * 64}, "weights ffffffffffff"), ({"turns": 1}, "--turns 1)")],
)
def test_a_reference_of_other_tokens_is_refused(fact, told, finished, learned, capsys):
    path = finished / "Histology_Extractor.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fact))
    assert run("HISTEX.py", finished, "--reference", str(learned)) == 2
    error = capsys.readouterr().err
    assert "was learned from tokens of" in error
    assert told in error
    assert "--turns 4)" in error


def test_tokens_from_before_there_were_turns_are_of_one(finished, learned, tmp_path):
    """Those of a section, and of a reference."""
    path = finished / "Histology_Extractor.json"
    record = json.loads(path.read_text())
    del record["turns"]
    path.write_text(json.dumps(record))
    stage, section, _ = section_of(finished)
    found = reference.backbone_of(stage, section.tokens)
    assert found["turns"] == "1"
    old = tmp_path / "old.safetensors"
    with reference.safetensors.safe_open(learned, "pt") as file:
        about = json.loads(file.metadata()["histex"])
    del about["turns"]
    save_file(load_file(learned), old, {"histex": json.dumps(about)})
    assert reference.read_reference(old, found).genes == [*GENES, NEW]
    with pytest.raises(utils.StageError, match="--turns 1"):
        reference.read_reference(old, backbone(learned))


# ------------------------------------------------------------------------------------------------
# HISTEX.py --reference
# ------------------------------------------------------------------------------------------------
def section_of(directory: Path):
    stage = utils.Stage("HISTEX.py", args_of(directory), reads_only=True)
    stage.require(*HISTEX.INPUTS)
    section, _, genes = HISTEX.read_section(stage, 16, True)
    return stage, section, genes


def args_of(directory: Path):
    parser = HISTEX.options.parser(HISTEX.__doc__)
    return parser.parse_args(["--directory", str(directory)])


def test_features_stand_behind_the_tokens_and_predict_what_the_reference_does(finished, learned):
    stage, section, genes = section_of(finished)
    before = np.array(section.tokens)
    about = reference.join(stage, learned, section, genes, CPU)
    assert about["genes_known"] == len(GENES)
    np.testing.assert_array_equal(section.tokens[..., :-FEATURES], before)

    found = reference.read_reference(learned, backbone(learned))
    x = (before.astype(np.float32) - section.token_statistics[0][:-FEATURES]) / (
        section.token_statistics[1][:-FEATURES]
    )
    padded = np.pad(x, [(HALO, HALO), (HALO, HALO), (0, 0)], mode="edge")
    with torch.inference_mode():
        wanted = found.encoder(torch.from_numpy(padded)[None])[0].numpy()
    features = section.tokens[..., -FEATURES:].astype(np.float32)
    told = features @ section.taught.weight.T + section.taught.bias
    np.testing.assert_allclose(told, wanted[..., [found.genes.index(g) for g in genes]], atol=0.02)


def test_the_network_follows_the_reference_as_far_as_each_gene_believes(finished, learned):
    """With all else at its start, a map is the default's times exp(belief x prediction)."""
    stage, section, genes = section_of(finished)
    train = np.arange(len(section.counts))
    default = HISTEX.DefaultNetwork(section_of(finished)[1], train).eval()
    reference.join(stage, learned, section, genes, CPU)
    network = HISTEX.TaughtNetwork(section, train).eval()
    with torch.no_grad():
        network.belief.copy_(torch.linspace(0, 1, len(genes)))
    centre = np.floor(section.spots[:2]).astype(int)
    near = section.context_of_spots(train[:0], leave_out=False)[:2]
    tokens, expression, offsets = section.inputs(centre, near, network.halo, CPU)
    with torch.inference_mode():
        found = network.to_counts(network(tokens, expression, offsets))
        plain = default.to_counts(default(tokens[..., :-FEATURES], expression, offsets))
    row, col = section.patches(centre)
    h, w = section.tissue.shape
    features = section.tokens[row.clip(0, h - 1), col.clip(0, w - 1), -FEATURES:].astype(np.float32)
    told = features @ section.taught.weight.T + section.taught.bias
    wanted = plain.numpy() * np.exp(np.linspace(0, 1, len(genes)) * told)
    np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-3)


def taught_section(finished, known):
    """A section, with a reference that knows some genes."""
    section = section_of(finished)[1]
    rng, n = np.random.default_rng(0), section.counts.shape[1]
    weight, bias = rng.normal(size=(n, FEATURES)), rng.normal(size=n)
    weight[~known], bias[~known] = 0, 0
    return replace(section, taught=reference.Taught(weight.astype("f4"), bias.astype("f4")))


def test_what_known_genes_are_taught_is_passed_on_by_ridge_regression(finished):
    known = np.arange(len(GENES)) % 3 > 0
    section = taught_section(finished, known)
    train = np.arange(0, len(section.counts), 2)
    got = reference.passed_on(section, train)
    np.testing.assert_array_equal(got.weight[known], section.taught.weight[known])
    np.testing.assert_array_equal(got.bias[known], section.taught.bias[known])

    spots = train[section.usable[train]]
    roots = np.sqrt(section.counts[spots] / section.share[spots, None].clip(max=1))
    mean = roots.mean(axis=0)
    changes = 2 * (roots - mean) / np.maximum(mean, 0.2)
    a, noise = changes[:, known], 1 / np.maximum(mean[known], 0.2) ** 2
    for gene in np.flatnonzero(~known):  # gene by gene, from the normal equations
        coefficients = np.linalg.solve(a.T @ a + len(a) * np.diag(noise), a.T @ changes[:, gene])
        np.testing.assert_allclose(
            got.weight[gene], coefficients @ section.taught.weight[known], rtol=1e-3, atol=1e-5
        )
        np.testing.assert_allclose(
            got.bias[gene], coefficients @ section.taught.bias[known], rtol=1e-3, atol=1e-5
        )


def test_a_gene_that_goes_with_a_known_one_is_taught_nearly_the_same(finished):
    known = np.arange(len(GENES)) > 0
    section = taught_section(finished, known)
    rate = 400 * np.random.default_rng(0).gamma(3, size=len(section.counts))
    counts = np.random.default_rng(1).poisson(np.ones(section.counts.shape) * 400)
    counts[:, 0], counts[:, 5] = rate, np.random.default_rng(2).poisson(rate)
    section = replace(section, counts=(counts * section.share[:, None].clip(max=1)).astype("f4"))
    got = reference.passed_on(section, np.arange(len(counts)))
    wanted = section.taught.weight[5]
    assert np.corrcoef(got.weight[0], wanted)[0, 1] > 0.98
    assert 0.9 < np.linalg.norm(got.weight[0]) / np.linalg.norm(wanted) < 1.1


def test_held_out_spots_have_no_say_in_what_is_passed_on(finished):
    section = taught_section(finished, np.arange(len(GENES)) > 0)
    train = np.arange(0, len(section.counts), 2)
    counts = section.counts.copy()
    counts[1::2] = 7
    got, other = (
        reference.passed_on(some, train) for some in (section, replace(section, counts=counts))
    )
    np.testing.assert_array_equal(got.weight, other.weight)
    np.testing.assert_array_equal(got.bias, other.bias)
    assert got.weight[0].any()


@pytest.mark.parametrize("all_known", [True, False])
def test_with_all_genes_known_or_none_there_is_nothing_to_pass_on(all_known, finished):
    section = taught_section(finished, np.full(len(GENES), all_known))
    got = reference.passed_on(section, np.arange(len(section.counts)))
    np.testing.assert_array_equal(got.weight, section.taught.weight)


def test_a_reference_of_few_of_the_genes_passes_nothing_on(finished):
    section = taught_section(finished, np.arange(len(GENES)) < len(GENES) // 2 - 1)
    assert reference.passed_on(section, np.arange(len(section.counts))) is section.taught


def test_genes_that_the_reference_does_not_know_have_maps_too(finished, sections, tmp_path):
    for name in sections:
        truth = np.load(name / "truth.npz")
        part = Path(shutil.copytree(name, tmp_path / name.name))
        some = {"counts": truth["counts"][..., :3], "tissue": truth["tissue"]}
        np.savez(part / "truth.npz", genes=truth["genes"][:3], **some)
    file = tmp_path / "some.safetensors"
    names = [str(tmp_path / name.name) for name in sections]
    assert learn.run(["--sections", *names, "--output", str(file), "--epochs", "1"]) == 0
    options = ["--reference", str(file), "--epochs", "1", "--n-states", "1"]
    assert run("HISTEX.py", finished, *options) == 0
    record = json.loads((finished / "HISTEX.json").read_text())
    assert record["reference"]["genes_known"] == 3
    assert len(inputs.map_files(finished)) == len(GENES)
    assert str(file) in record["inputs"]


def test_another_reference_trains_anew_and_without_one_nothing_changes(
    finished_sample, finished, learned, tmp_path, capsys
):
    before = np.load(finished / "cnts-super" / "GENE0.pickle", allow_pickle=True)
    options = json.loads((finished / "HISTEX.json").read_text())["options"]
    assert run("HISTEX.py", finished, *options, "--reference", str(learned)) == 0
    assert "trained anew, since" in capsys.readouterr().out
    assert run("HISTEX.py", finished, *options) == 0
    after = np.load(finished / "cnts-super" / "GENE0.pickle", allow_pickle=True)
    np.testing.assert_array_equal(before, after)


def test_a_reference_that_knows_the_truth_of_a_section_is_told_apart(sections, learned, capsys):
    """No leak: such maps are marked, in the record and when they are scored."""
    options = ["--reference", str(learned), "--epochs", "1", "--n-states", "1"]
    assert run("HISTEX.py", sections[0], *options, "--force") == 0
    assert "was learned from this section" in capsys.readouterr().out
    record = json.loads((sections[0] / "HISTEX.json").read_text())
    assert record["reference"]["knows_this_section"] is True
    from analysis import evaluate

    assert evaluate.run(["--directory", str(sections[0]), "--no-plot"]) == 0
    assert "their scores say nothing" in capsys.readouterr().out


def test_a_section_is_known_by_its_image_too(finished, learned, capsys):
    """Other tokens of it, as of another graphics card, hide nothing."""
    stage, _, _ = section_of(finished)
    found = reference.read_reference(learned, backbone(learned))
    stage.inputs["Histology_feature_map.npy"]["sha256"] = "0" * 64
    assert found.about(stage, learned)["knows_this_section"] is True
    assert "held-out spots, say nothing" in capsys.readouterr().out
    stage.inputs["he.jpg"]["sha256"] = "0" * 64
    assert found.about(stage, learned)["knows_this_section"] is False


def test_the_truth_of_a_section_cannot_reach_its_maps_by_a_reference_of_others(
    sections, finished, tmp_path, capsys
):
    """The scored section's truth may say anything: reference and maps stay as they are."""
    maps = []
    for seed in (0, 1):
        write_truth(finished, GENES, seed)
        file = tmp_path / f"{seed}.safetensors"
        options = ["--sections", str(sections[0]), "--output", str(file), "--epochs", "1"]
        assert learn.run(options) == 0
        shown = ["--reference", str(file), "--epochs", "1", "--n-states", "1", "--force"]
        assert run("HISTEX.py", finished, *shown) == 0
        maps.append(np.load(finished / "cnts-super" / "GENE0.pickle", allow_pickle=True))
    np.testing.assert_array_equal(*maps)


def test_the_published_preset_takes_no_reference(finished, learned, capsys):
    options = ["--reference", str(learned), "--preset", "published"]
    assert run("HISTEX.py", finished, *options) == 2
    assert "has no network that takes a --reference" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------
# maps from the H&E alone
# ------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def _slide(_sample, tmp_path_factory):
    sample = Path(shutil.copytree(_sample, tmp_path_factory.mktemp("slide") / "slide A"))
    for name in ("locs-raw.csv", "radius-raw.txt", "cnts.csv"):
        (sample / name).unlink()
    assert run("image_calibration.py", sample, "--no-spots") == 0
    assert run("Histology_Extractor.py", sample, "--backbone", "efficientnet_lite0") == 0
    assert run("masking_non_tissue.py", sample, "--no-spots") == 0
    return sample


@pytest.fixture
def slide(_slide, tmp_path):
    """A section without any spot, after the three scripts that it needs."""
    return Path(shutil.copytree(_slide, tmp_path / "slide A"))


def test_a_map_from_the_picture_alone(slide, learned, capsys):
    assert predict.run(["--directory", str(slide), "--reference", str(learned)]) == 0
    record = json.loads((slide / "HISTEX.json").read_text())
    assert record["predicted_from"] == "histology alone"
    assert record["script"] == "reference/predict.py"
    genes = pd.read_csv(slide / "expected-r.csv")
    assert set(genes["gene"]) == {*GENES, NEW}
    known = genes["expected_r_32um"].dropna()
    assert known.is_monotonic_decreasing
    assert genes["expected_r_32um"].isna().tolist() == [False] * 7 + [True] * 2

    found = reference.read_reference(learned, backbone(learned))
    tissue = inputs.read_mask(slide, (28, 42))
    rates = dict(zip(found.genes, found.rates, strict=True))
    tokens = np.load(slide / "Histology_feature_map.npy")
    parts = [part for _, part in reference.encoded_rows(found.encoder, tokens, tissue, CPU)]
    with torch.inference_mode():
        log_ratio = found.encoder.decode(torch.cat(parts)).numpy()
    for gene, path in inputs.map_files(slide).items():
        image = inputs.read_map(path)
        np.testing.assert_array_equal(np.isfinite(image), tissue)
        wanted = rates[gene] * np.exp(log_ratio[..., found.genes.index(gene)])
        np.testing.assert_allclose(image[tissue], wanted[tissue], rtol=0.02)
    embedding = np.load(slide / "embeddings-gene.pickle", allow_pickle=True)["cls"]
    assert embedding.shape == (FEATURES, 28, 42)

    capsys.readouterr()
    assert predict.run(["--directory", str(slide), "--reference", str(learned)]) == 0
    assert "nothing to do" in capsys.readouterr().out


def test_spots_may_tell_where_the_image_lies(finished, learned, capsys, monkeypatch):
    found = registration.Offset(np.array([1.0, 0.0]), np.array([0.1, 0.1]), 1e-5, 50.0, 100.0)
    monkeypatch.setattr(registration, "find_offset", lambda section: found)
    options = ["--directory", str(finished), "--reference", str(learned), "--force"]

    def predicted(*more):
        assert predict.run([*options, *more]) == 0
        record = json.loads((finished / "HISTEX.json").read_text())
        return record, inputs.read_map(inputs.map_files(finished)["GENE0"])

    record, still = predicted()
    assert record["image_beside_spots"] is None
    assert "beside" not in capsys.readouterr().out
    record, moved = predicted("--place-by-spots")
    assert record["image_beside_spots"]["undone"]
    assert record["predicted_from"] == "histology alone"
    assert "8.0 um below" in capsys.readouterr().out
    one, other = moved[6:-7], still[7:-6]  # the token of the next row
    known = np.isfinite(one) & np.isfinite(other)
    assert np.corrcoef(one[known], other[known])[0, 1] > 0.95
    assert np.corrcoef(one[known], still[6:-7][known])[0, 1] < 0.9


def test_spots_are_needed_to_tell_where_the_image_lies(slide, learned, capsys):
    options = ["--directory", str(slide), "--reference", str(learned), "--place-by-spots"]
    assert predict.run(options) == 2
    assert "locs.csv" in capsys.readouterr().err


def test_the_depth_is_that_of_a_spot(slide, learned):
    options = ["--directory", str(slide), "--reference", str(learned), "--depth", "5000"]
    assert predict.run(options) == 0
    found = reference.read_reference(learned, backbone(learned))
    factor = 5000 / (found.rates.sum() * np.pi * (27.5 / 8) ** 2)
    image = inputs.read_map(inputs.map_files(slide)["GENE0"])
    assert predict.run([*options[:4], "--force"]) == 0
    plain = inputs.read_map(inputs.map_files(slide)["GENE0"])
    tissue = np.isfinite(plain)
    np.testing.assert_allclose(image[tissue], plain[tissue] * factor, rtol=1e-4)


def test_maps_made_with_spots_are_not_replaced(finished, learned, capsys):
    options = ["--directory", str(finished), "--reference", str(learned)]
    assert predict.run(options) == 2
    error = capsys.readouterr().err
    assert "made with the spots of this section" in error
    assert "HISTEX.py" in error
    assert predict.run([*options, "--force"]) == 0
    assert not (finished / "held-out-r.csv").exists()
    capsys.readouterr()
    assert run("HISTEX.py", finished, "--epochs", "1", "--n-states", "1") == 0
    assert not (finished / "expected-r.csv").exists()


def test_the_wings_go_on_with_maps_from_the_picture(slide, learned, capsys):
    """Genes by expected accuracy; what needs no spots works, and says what it shows."""
    from analysis import annotate, export, report, segment

    assert predict.run(["--directory", str(slide), "--reference", str(learned)]) == 0
    best = pd.read_csv(slide / "expected-r.csv")["gene"][0]
    assert report.run(["--directory", str(slide), "--n-genes", "1"]) == 0
    page = (slide / "report.html").read_text(encoding="utf-8")
    assert best in page
    assert "predicted from histology alone" in page
    assert segment.run(["--directory", str(slide), "--no-plot"]) == 2
    assert "goes without spots; analysis/segment.py needs" in capsys.readouterr().err
    markers = slide / "own-markers.csv"
    markers.write_text(f"label,gene\nA,{GENES[0]}\nB,{GENES[1]}\n")
    options = ["--directory", str(slide), "--markers", str(markers), "--no-plot"]
    assert annotate.run(options) == 0
    options = ["--directory", str(slide), "--format", "csv", "--n-genes", "2"]
    assert export.run(options) == 0
    table = pd.read_csv(slide / "histex.csv.gz")
    assert best in table


def test_nobody_is_led_in_a_circle(slide, learned, capsys):
    """What lacks spots says which scripts go on without; HISTEX.py and the wings alike."""
    from analysis import patterns, segment

    def check(code: int, script: str) -> None:
        error = capsys.readouterr().err
        assert code == 2
        assert f"The section goes without spots; {script} needs them" in error
        assert "masking_non_tissue.py with it, too, then reference/predict.py" in error

    place = ["--directory", str(slide)]
    for script in ("HISTEX.py", "get_HR.py", "masking_non_tissue.py"):
        check(run(script, slide), script)
    assert predict.run([*place, "--reference", str(learned)]) == 0
    check(patterns.run(place), "analysis/patterns.py")  # which asks for held-out-r.csv
    check(segment.run(place), "analysis/segment.py")
    (slide / "he.jpg").unlink()
    assert run("masking_non_tissue.py", slide) == 2
    assert remedy(capsys) == ["python", "image_calibration.py", *place, "--no-spots"]


def test_maps_of_spots_that_are_gone_can_be_replaced(finished, learned, capsys):
    """Nobody is sent to HISTEX.py --reference, which would ask for the spots."""
    assert run("image_calibration.py", finished, "--no-spots") == 0
    options = ["--directory", str(finished), "--reference", str(learned)]
    assert predict.run([*options, "--allow-stale"]) == 2
    error = capsys.readouterr().err
    assert "beside the spots" not in error
    assert error.strip().endswith("--force")


def test_a_depth_beyond_reason_is_refused(slide, learned, capsys):
    options = ["--directory", str(slide), "--reference", str(learned), "--depth", "1e300"]
    assert predict.run(options) == 2
    assert "--depth 1e+300 is no number of counts" in capsys.readouterr().err


def test_a_stale_reference_names_the_script_that_used_it(slide, learned, tmp_path, capsys):
    file = Path(shutil.copy(learned, tmp_path / "copy.safetensors"))
    assert predict.run(["--directory", str(slide), "--reference", str(file)]) == 0
    other = reference.read_reference(file, backbone(learned))
    other.rates[:] *= 2
    reference.write_reference(file, other)
    from analysis import export

    assert export.run(["--directory", str(slide), "--format", "csv"]) == 2
    error = capsys.readouterr().err
    assert f"python reference/predict.py --directory {slide}".split()[1] in error
    assert "--reference" in error


def test_without_spots_the_first_scripts_ask_for_none(slide):
    assert not (slide / "locs.csv").exists()
    assert json.loads((slide / "image_calibration.json").read_text())["spots"] == 0
    assert json.loads((slide / "masking_non_tissue.json").read_text())["spots_on_tissue"] is None
    assert (slide / "mask-overlay.png").exists()


def test_a_section_of_one_block_is_refused(finished, tmp_path, capsys):
    """Nothing would be left to choose the epoch by, or nothing to learn from."""
    write_truth(finished, GENES, seed=0)
    saved = dict(np.load(finished / "truth.npz"))
    saved["tissue"][:, lessons.BLOCK :] = False
    np.savez(finished / "truth.npz", **saved)
    options = ["--sections", str(finished), "--output", str(tmp_path / "x.safetensors")]
    assert learn.run(options) == 2
    assert "lies in one block of 256 um" in capsys.readouterr().err


def test_only_blocks_with_tissue_are_left_out():
    tissue = np.zeros((3 * lessons.BLOCK, 5 * lessons.BLOCK), bool)
    tissue[: lessons.BLOCK, : 4 * lessons.BLOCK - 3] = True
    for seed in range(5):
        left_out = lessons.some_blocks(tissue, seed)
        assert 0 < left_out.sum() <= lessons.BLOCK**2
        assert not (left_out & ~tissue).any()


def test_without_left_out_sections_blocks_tell_what_to_expect(sections, tmp_path):
    output = tmp_path / "quick.safetensors"
    options = ["--sections", *map(str, sections), "--output", str(output), "--epochs", "1"]
    assert learn.run([*options, "--leave-none-out"]) == 0
    facts = facts_of(output)
    assert facts["left_out"] == []
    assert facts["expected_from"] == "left-out blocks of the same sections"
    found = reference.read_reference(output, backbone(output))
    assert np.isfinite(found.expected_r["expected_r_8um"]).all()


def test_shuffled_truth_keeps_the_counts_of_a_section_but_not_their_places(sections, tmp_path):
    from benchmarks import accuracy, references

    source = Path(shutil.copytree(sections[0], tmp_path / "source"))
    sample = Path(shutil.copytree(sections[0], tmp_path / "sample"))
    (sample / "truth.npz").unlink()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(accuracy, "prepare_section", lambda *_: (sample, 0.0))
        folders = [references.teacher(None, source, tmp_path, shuffled) for shuffled in (0, 1)]
    plain, shuffled = map(inputs.read_truth, folders)
    np.testing.assert_array_equal(plain.counts, inputs.read_truth(source).counts)
    assert (plain.counts != shuffled.counts).any()
    tissue = plain.tissue
    for part in (plain, shuffled):
        order = np.lexsort(part.counts[tissue].T)
        part.counts[tissue] = part.counts[tissue][order]
    np.testing.assert_array_equal(plain.counts, shuffled.counts)


def test_a_section_is_not_scored_by_a_reference_of_its_own(sections, tmp_path):
    from benchmarks import references

    references.check_apart(sections[:1], sections[1:])
    with pytest.raises(utils.StageError, match="Name it once"):
        references.check_apart(sections, [sections[0] / ".." / sections[0].name])


def test_scores_are_by_the_genes_that_a_reference_knows(sections):
    from benchmarks import references

    truth = inputs.read_truth(sections[0])
    truth = inputs.select_genes(truth, truth.genes[:4])
    maps = truth.counts.astype(np.float32)
    maps[..., 3] = np.random.default_rng(0).normal(size=maps.shape[:2])
    found = references.score(truth, maps, {"known": GENES[:3], "none": [], "other": GENES[3:4]})
    assert found.keys() == {"known", "other"}
    assert found["known"] == pytest.approx([1, 1])
    assert abs(found["other"][0]) < 0.1


def test_another_stain_is_that_much_stronger(sections, tmp_path):
    from benchmarks import references

    image = np.full((4, 5, 3), (200, 150, 190), np.uint8)
    assert abs(references.restain(image, (1, 1)).astype(int) - image).max() <= 1
    before, after = (rgb2hed(x)[0, 0] for x in (image, references.restain(image, (0.5, 2))))
    np.testing.assert_allclose(after[:2] / before[:2], [0.5, 2], rtol=0.1)
    folder = references.other_stain(sections[0], tmp_path, (0.5, 2.0))
    assert not (folder / "truth.npz").exists()
    (path,) = folder.glob("he-raw.*")
    both = [np.asarray(Image.open(each)).astype(int) for each in (sections[0] / path.name, path)]
    assert both[0].shape == both[1].shape
    assert abs(both[0] - both[1]).mean() > 3
    assert (folder / "cnts.csv").read_bytes() == (sections[0] / "cnts.csv").read_bytes()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk_is_an_error_of_the_system(learned):
    """By safetensors' own writing, it would be an error of a kind that nobody expects."""
    found = reference.read_reference(learned, backbone(learned))
    with pytest.raises(OSError, match="No space left"):
        reference.write_reference(Path("/dev/full"), found)


@pytest.mark.parametrize("odd", ["text", [1], None])
def test_an_odd_fact_about_a_reference_ends_no_evaluation(sections, odd):
    from analysis import evaluate

    path = sections[1] / "HISTEX.json"
    before = path.read_text()
    path.write_text(json.dumps(json.loads(before) | {"reference": odd}))
    try:
        assert evaluate.run(["--directory", str(sections[1]), "--no-plot", "--force"]) == 0
    finally:
        path.write_text(before)
