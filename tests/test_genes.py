"""Genes that are listed (reading/genes.py) and genes that are chosen (method/genes.py)."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

import utils
from method import genes
from reading.genes import read_genes

KNOWN = ["KRT8", "NA", "CD3E", "B,1", "TRAV14/DV4", "1"]


# ----- listed -----
@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("CD3E,KRT8", ["CD3E", "KRT8"]),
        (" NA, ,1,,NA ", ["NA", "1"]),
        ("TRAV14/DV4", ["TRAV14/DV4"]),
    ],
)
def test_names_with_commas(text, wanted, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert read_genes(text, KNOWN, "cnts.csv") == wanted


def test_a_file_keeps_its_order_and_drops_repeats(tmp_path):
    path = tmp_path / "my genes"
    path.write_bytes("\ufeffNA\r\n\r\n CD3E\r\nNA\r\nB,1\r\n".encode())
    assert read_genes(str(path), KNOWN, "cnts.csv") == ["NA", "CD3E", "B,1"]


def test_the_remedy_is_for_the_way_in_which_the_names_were_given(tmp_path):
    for text, remedy in (("KRT9", "Name some, --genes"), (tmp_path / "list", "Mend the list")):
        (tmp_path / "list").write_text("KRT9\n")
        with pytest.raises(utils.StageError, match=remedy):
            read_genes(str(text), KNOWN, "cnts.csv")


def test_a_file_called_like_a_gene_is_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "KRT8").write_text("CD3E\n")
    assert read_genes("KRT8", KNOWN, "cnts.csv") == ["CD3E"]
    assert read_genes("KRT8,NA", KNOWN, "cnts.csv") == ["KRT8", "NA"]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("KRT8,KRT9", r"--genes KRT8,KRT9 names KRT9: no such gene in cnts\.csv.*KRT8, NA, CD3E"),
        (",,", "--genes ,, names no gene"),
        ("", "names no gene"),
        ("none.txt", r"--genes none\.txt looks like a file, but there is no such file"),
        ("KRT8,lists/none", "--genes lists/none looks like a file"),
        (r"C:\lists\none", "looks like a file"),
        (",".join(f"G{i}" for i in range(2000)), "names G0, G1, G2, G3, G4, ...: no such gene"),
    ],
)
def test_bad_names_are_named(given, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(utils.StageError, match=words):
        read_genes(given, KNOWN, "cnts.csv")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "names no gene"),
        (b"KRT8\nXYZ\nKRT8,NA\n", "names XYZ, KRT8,NA: no such gene in cnts"),
        (b"KRT8\n\xff\n", "cannot be read"),
    ],
)
def test_bad_files_are_named(content, words, tmp_path):
    path = tmp_path / "list.txt"
    path.write_bytes(content)
    with pytest.raises(utils.StageError, match=words) as error:
        read_genes(str(path), KNOWN, "cnts.csv")
    assert str(error.value).startswith(str(path))


# ----- chosen by the counts -----
def most_variable(counts: np.ndarray, names: list[str], n: int) -> np.ndarray:
    return genes.most_variable(sparse.csr_array(counts), names, n)


def test_most_variable_by_hand():
    #                 b: var 1  a: var 1  c: 0   d: var 25  e: var 1
    counts = np.array([(1, 0, 7, 10, 2), (3, 2, 7, 0, 4)], np.float32)
    names = list("bacde")
    assert most_variable(counts, names, 1).tolist() == [3]
    assert most_variable(counts, names, 2).tolist() == [1, 3]  # a before b before e
    assert most_variable(counts, names, 3).tolist() == [0, 1, 3]
    assert most_variable(counts, names, 100).tolist() == [0, 1, 3, 4]  # c never
    assert most_variable(counts[:1], names, 3).tolist() == []


@settings(max_examples=40, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**31), n=st.integers(1, 30))
def test_most_variable_is_numpys_variance_whatever_the_order(seed, n):
    rng = np.random.default_rng(seed)
    counts = rng.poisson(rng.gamma(0.5, 3, 30), (12, 30)).astype(np.float32)
    names = [f"G{i:02d}" for i in range(30)]
    chosen = most_variable(counts, names, n)
    variance = counts.var(axis=0, dtype=np.float64)
    assert len(chosen) == min(n, (variance > 0).sum())
    left_out = np.setdiff1d(np.arange(30), chosen)
    if len(chosen) and len(left_out):
        assert variance[chosen].min() >= variance[left_out].max() - 1e-9
    again = most_variable(rng.permutation(counts), names, n)
    assert again.tolist() == chosen.tolist()
    columns = rng.permutation(30)
    other = most_variable(counts[:, columns], [names[c] for c in columns], n)
    assert sorted(columns[other]) == chosen.tolist()
