"""Ways in which a rerun once missed a change, replaced a file of the user's, or led in a circle."""

import argparse
import json
import os
import shutil

import numpy as np
import pandas as pd
import pytest
from conftest import PIPELINE, outcome, run, write_sample
from PIL import Image
from test_chain import follow
from test_prepare_legacy_st import prepare, write_tables

import utils
from analysis import export, report
from prepare import libraries, section

CALIBRATION, HR, EXTRACTOR, MASKING, MODEL = (script for script, *_ in PIPELINE)
OPTIONS = {script: options for script, *options in PIPELINE}
UP_TO_DATE = "up to date, nothing to do"


# ----- what options name is an input --------------------------------------------------------------
def listed(directory) -> list[str]:
    return (directory / "gene-names.txt").read_text().split()


def test_a_list_of_genes_that_was_edited_is_read_again(tmp_path, capsys):
    tables, target, genes = tmp_path / "tables", tmp_path / "s", tmp_path / "genes.txt"
    write_tables(tables)
    for names in (["NA", "ACTB"], ["ERBB2"]):
        genes.write_text("\n".join(names))
        assert prepare(tables, target, "--genes", str(genes)) == 0
        assert listed(target) == names
    assert UP_TO_DATE not in capsys.readouterr().out
    assert prepare(tables, target, "--genes", str(genes)) == 0
    assert UP_TO_DATE in capsys.readouterr().out


def test_genes_that_are_asked_for_replace_those_that_a_stage_selected(tmp_path, capsys):
    tables, target = tmp_path / "tables", tmp_path / "s"
    write_tables(tables)
    assert prepare(tables, target) == 0
    for script in (CALIBRATION, HR):
        assert run(script, target) == 0
    assert len(listed(target)) == 4
    assert prepare(tables, target, "--genes", "NA,ACTB") == 0
    assert listed(target) == ["NA", "ACTB"]
    (target / "gene-names.txt").write_text("ERBB2\n")  # from now on the user's
    assert prepare(tables, target, "--genes", "MARCH1") == 2  # the user's, or those of the option?
    assert "gene-names.txt was edited by hand, and other options" in capsys.readouterr().err
    assert listed(target) == ["ERBB2"]


def test_the_same_words_in_another_folder_name_other_files(tmp_path, monkeypatch):
    """As where every section has its own folder, and a script is run in one after the other."""
    for seed in (0, 1):
        write_tables(tmp_path / str(seed) / "tables", seed=seed)
    found = []
    for seed in (0, 1):
        monkeypatch.chdir(tmp_path / str(seed))
        assert prepare(utils.Path("tables"), tmp_path / "s") == 0
        found.append((tmp_path / "s" / "cnts.csv.gz").read_bytes())
    assert found[0] != found[1]


def test_a_printed_command_names_files_by_their_whole_path(tmp_path, monkeypatch, capsys):
    from reading import cli

    monkeypatch.chdir(tmp_path)
    parser = cli.Parser("Does it.")
    parser.add_argument("--weights", type=utils.Path)
    parser.add_argument("--genes", type=cli.names_or_file)
    (tmp_path / "genes.txt").write_text("A")
    args = parser.parse_args(["--weights", "w.pth", "--genes", "genes.txt"])
    options = ["--weights", f"{tmp_path}/w.pth", "--genes", f"{tmp_path}/genes.txt"]
    assert cli.given_options(parser, args) == options
    assert cli.given_options(parser, parser.parse_args(["--genes", "A,B"])) == ["--genes", "A,B"]


def test_other_weights_of_the_same_name_make_other_features(finished, tmp_path, capsys):
    import timm
    import torch

    weights = tmp_path / "weights.pth"
    options = ["--backbone", "resnet10t", "--weights", str(weights), "--device", "cpu"]
    features = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        torch.save(timm.create_model("resnet10t").state_dict(), weights)
        assert run(EXTRACTOR, finished, *options) == 0
        features.append(np.load(finished / "Histology_feature_map.npy"))
    assert not np.array_equal(*features)
    assert UP_TO_DATE not in capsys.readouterr().out
    assert run(EXTRACTOR, finished, *options) == 0
    assert UP_TO_DATE in capsys.readouterr().out


# ----- what comes later than the results that show it ---------------------------------------------
@pytest.mark.parametrize(
    ("script", "options"), [(report, []), (export, ["--format", "h5ad"])], ids=["report", "export"]
)
def test_regions_that_come_later_are_taken_up(finished, capsys, script, options):
    place = ["--directory", str(finished), *options]
    assert script.run(place) == 0
    tissue = np.array(Image.open(finished / "mask.png")) > 0
    np.save(finished / "segments.npy", tissue.astype(np.uint8))
    for done in (True, False):
        capsys.readouterr()
        assert script.run(place) == 0
        assert (UP_TO_DATE not in capsys.readouterr().out) is done


def test_what_is_not_there_is_noted(stage):
    stage.use(stage.directory / "patterns.csv")
    assert stage.inputs == {"patterns.csv": {"bytes": 0, "mtime_ns": 0, "sha256": "absent"}}


# ----- no circles ---------------------------------------------------------------------------------
@pytest.mark.parametrize("lost", ["its record", "nothing, but he.jpg was edited"])
@pytest.mark.parametrize("size", [(28, 42), (77, 77)])
def test_a_mask_of_no_use_is_replaced_by_the_command_that_is_printed(finished, lost, size):
    white = 255 * (size == (77, 77))  # all black, or of a size that fits nothing
    Image.fromarray(np.full(size, white, np.uint8)).save(finished / "mask.png")
    if lost == "its record":
        (finished / "masking_non_tissue.json").unlink()
    else:
        image = np.array(Image.open(finished / "he.jpg"))
        image[:30] = 0
        Image.fromarray(image).save(finished / "he.jpg")
        assert run(EXTRACTOR, finished, *OPTIONS[EXTRACTOR]) == 0
    run_so_far = follow(MODEL, finished, OPTIONS[MODEL])
    assert f"{MASKING} --force" in run_so_far


def test_the_command_after_a_run_that_was_cut_off_has_its_options(finished, monkeypatch, capsys):
    def cut(source, target):
        if not str(target).endswith(".json"):
            raise KeyboardInterrupt
        replace(source, target)

    replace = os.replace
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", cut)
        assert run(CALIBRATION, finished, "--max-megapixels", "900") == 130
    assert json.loads((finished / "image_calibration.json").read_text())["finished"] is False
    assert run(EXTRACTOR, finished, *OPTIONS[EXTRACTOR]) == 2
    assert capsys.readouterr().err.endswith("--max-megapixels 900\n")


# ----- nothing lost -------------------------------------------------------------------------------
def test_files_of_these_names_in_a_new_folder_are_the_users(tmp_path, capsys):
    """The tools of this family call theirs he.jpg and locs.csv, too."""
    directory = write_sample(tmp_path / "s")
    shutil.copy(directory / "he-raw.png", directory / "he.jpg")
    mine = (directory / "he.jpg").read_bytes()
    assert run(CALIBRATION, directory) == 2
    message = capsys.readouterr().err
    assert "he.jpg was not written by image_calibration.py" in message
    assert (directory / "he.jpg").read_bytes() == mine
    assert run(CALIBRATION, directory, "--force") == 0


@pytest.mark.parametrize(
    ("script", "name"),
    [(CALIBRATION, "locs.csv"), (HR, "HRlocs.csv"), (EXTRACTOR, "Histology_rgb.npy"),
     (MODEL, "cnts-super/GENE1.pickle")],
)  # fmt: skip
def test_without_its_record_a_stage_replaces_nothing(finished, capsys, script, name):
    """Nobody can tell any more which of its outputs were edited."""
    (finished / utils.record_name(script)).unlink()
    path = finished / name
    path.write_bytes(mine := path.read_bytes() + b"\n")
    assert run(script, finished, *OPTIONS[script]) == 2
    said = capsys.readouterr().err
    assert f"was not written by {script}, which would overwrite it, or the record" in said
    assert said.rstrip().endswith(" --force")
    assert path.read_bytes() == mine
    assert run(script, finished, *OPTIONS[script], "--force") == 0
    assert path.read_bytes() != mine


def test_a_record_that_is_moved_away_as_told_costs_no_edit_of_the_mask(finished, capsys):
    mask = np.array(Image.open(finished / "mask.png"))
    mask[8:15, 20:31] = 0
    Image.fromarray(mask).save(finished / "mask.png")
    record = finished / "masking_non_tissue.json"
    record.write_text("garbage")
    assert run(MASKING, finished) == 2
    remedy = capsys.readouterr().err.splitlines()[-1]
    assert remedy.startswith(f"Move it away and run: python {MASKING} ")
    assert "--force" not in remedy
    record.unlink()
    assert run(MASKING, finished) == 0
    np.testing.assert_array_equal(np.array(Image.open(finished / "mask.png")), mask)


def test_a_file_added_to_a_folder_of_maps_stays_beside_new_maps(finished, capsys):
    added = finished / "cnts-super" / "notes.txt"
    added.write_text("mine")
    mask = np.array(Image.open(finished / "mask.png"))
    mask[8:15, 20:31] = 0
    Image.fromarray(mask).save(finished / "mask.png")
    assert run(MODEL, finished, *OPTIONS[MODEL]) == 0
    assert "kept your cnts-super/notes.txt; mask.png has changed" in capsys.readouterr().out
    assert added.read_text() == "mine"
    gene = finished / "cnts-super" / "GENE1.pickle"  # one of ours is still the user's choice
    gene.write_bytes(b"mine")
    pd.Series(dtype=float).to_csv(finished / "cnts-super" / "A.csv")
    Image.fromarray(mask[::-1]).save(finished / "mask.png")
    assert run(MODEL, finished, *OPTIONS[MODEL]) == 2
    assert f"{gene} was edited by hand, and mask.png has changed" in capsys.readouterr().err


def test_weights_of_a_state_that_were_removed_are_trained_again(finished, capsys):
    weights = finished / "states" / "00" / "model.safetensors"
    weights.unlink()
    assert run(MODEL, finished, *OPTIONS[MODEL]) == 0
    assert UP_TO_DATE not in capsys.readouterr().out
    assert weights.is_file()


# ----- what is no flag ----------------------------------------------------------------------------
@pytest.mark.parametrize("cell", ["2", "-1", "0.5"])
def test_a_column_of_other_numbers_is_not_taken_for_yes_and_no(cell):
    """As of clusters, whose 0 would be no tissue and all others tissue."""
    column = pd.Series(["1", "1.0", cell], name="in_tissue")
    _, message = outcome(section.as_flags, column, utils.Path("positions.csv"))
    assert f"holds '{cell}' in column in_tissue, data row 3; expected 1 or 0" in message
    assert section.as_flags(column[:2], utils.Path("positions.csv")).tolist() == [True, True]


@pytest.mark.parametrize("words", [("Y", "n"), ("1.0", "0.0"), (" TRUE", "F"), ("1", "0")])
def test_the_tissue_of_anndata_is_told_in_the_same_words(tmp_path, words):
    data = argparse.Namespace(path=tmp_path / "a.h5ad")
    obs = pd.DataFrame({"in_tissue": [words[0], words[1], ""]})
    found, notes = libraries.tissue_of(data, obs)
    assert found.tolist() == [True, False, False]
    assert notes == ["1 spots without a value in in_tissue are left out"]
    _, message = outcome(libraries.tissue_of, data, obs.replace(words[0], "2"))
    assert "obs['in_tissue'] holds 2; expected 1 and 0" in message
