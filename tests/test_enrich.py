"""analysis/enrich.py: tests against scipy, enumeration and hand; files good and bad; pictures."""

import json
import shlex
import shutil
from itertools import combinations
from math import comb

import numpy as np
import pandas as pd
import pytest
from conftest import run_as_main, write_record
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from matplotlib.patches import Circle
from PIL import Image
from scipy import stats
from test_regions import snapshot

import utils
from analysis import enrich
from analysis.enrich import GeneList

GENES = [f"G{i:02d}" for i in range(40)] + ["NA", "HLA-A"]
SETS = {
    "FIRST": ["G00", "G01", "G02", "G03", "G04", "G05"],
    "SECOND": ["G10", "G11", "G12", "G13", "G14", "NA", "NOTHERE"],
    "MIXED": ["G00", "G10", "G20", "G30", "HLA-A"],
    "SMALL": ["G00", "G01", "OTHER", "ANOTHER", "THIRD"],
    "ALL": GENES,
}


def write_gmt(path, sets):
    lines = ["\t".join([name, "http://x", *genes]) for name, genes in sets.items()]
    path.write_text("\n".join(lines) + "\n")
    return path


def markers_table():
    """Region 1 has the genes of FIRST, region 2 those of SECOND."""
    rows = []
    for region, own in ((1, SETS["FIRST"]), (2, SETS["SECOND"])):
        for i, gene in enumerate(GENES):
            high = gene in own
            auc = 0.9 if high else 0.5 - i / 200
            rows.append(
                (region, gene, 2.0 if high else -0.1, auc, auc, 1e-4 if high else 0.5, high)
            )
    columns = ["region", "gene", "log2_fold", "auc", "auc_counts", "q", "higher"]
    return pd.DataFrame(rows, columns=columns)


def patterns_table():
    """Of the first 30 genes; spots find FIRST alone, maps SECOND as well."""
    genes = GENES[:30]
    by_spots = [gene in SETS["FIRST"] for gene in genes]
    by_maps = [gene in SETS["FIRST"][1:] + SETS["SECOND"] for gene in genes]
    return pd.DataFrame(
        {
            "gene": genes,
            "spots_I": [0.8 - i / 100 if a else 0.1 for i, a in enumerate(by_spots)],
            "held_out_r": [0.9 if a else np.nan for a in by_maps],
            "found_by_spots": by_spots,
            "found_by_maps": by_maps,
        }
    )


@pytest.fixture(scope="module")
def _section(tmp_path_factory):
    directory = tmp_path_factory.mktemp("enrich") / "section E"
    directory.mkdir()
    ids = [f"s{i}" for i in range(5)]
    locs = pd.DataFrame({"x": np.arange(5) * 100.0, "y": np.arange(5) * 70.0}, index=ids)
    locs.to_csv(directory / "locs.csv")
    pd.DataFrame(np.ones((5, len(GENES)), int), ids, GENES).to_csv(directory / "cnts.csv")
    write_record(directory, utils.CALIBRATION, [], ["locs.csv"])
    markers_table().to_csv(directory / "segment-markers.csv", index=False)
    patterns_table().to_csv(directory / "patterns.csv", index=False)
    write_record(directory, "analysis/segment.py", ["cnts.csv"], ["segment-markers.csv"])
    write_record(directory, "analysis/patterns.py", ["cnts.csv"], ["patterns.csv"])
    write_gmt(directory / "sets.gmt", SETS)
    return directory


@pytest.fixture
def section(_section, tmp_path):
    return shutil.copytree(_section, tmp_path / "section E")


def run(directory, *options):
    gmt = directory / "sets.gmt"
    return enrich.run(["--directory", str(directory), "--gene-sets", str(gmt), *options])


def read(directory, name="enrichment.csv"):
    table = pd.read_csv(directory / name, keep_default_na=False)
    return table.set_index(["list", "set"])


def random_sets(rng, n_sets, n_genes, low=3, high=12):
    genes = pd.Index([f"G{i}" for i in range(n_genes)])
    sets = {
        f"S{i}": list(rng.choice(genes, rng.integers(low, high), replace=False))
        for i in range(n_sets)
    }
    return genes, sets


# ----- over-representation -----
@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(5, 60), share=st.floats(0, 1))
def test_over_representation_is_fishers_exact_test(seed, n, share):
    rng = np.random.default_rng(seed)
    genes, sets = random_sets(rng, 4, n, 1, 5)
    found = rng.random(n) < share
    names, member = enrich.membership(sets, genes, 1, n)
    hits, expected, p = enrich.over_representation(member, found)
    for i, name in enumerate(names):
        inside = np.isin(genes, sets[name])
        table = [
            [(inside & found).sum(), (inside & ~found).sum()],
            [(~inside & found).sum(), (~inside & ~found).sum()],
        ]
        assert p[i] == pytest.approx(stats.fisher_exact(table, "greater").pvalue, rel=1e-9)
        assert hits[i] == table[0][0]
        assert expected[i] == pytest.approx(inside.sum() * found.sum() / n)


def test_over_representation_by_enumeration():
    """Of all 56 ways to draw 3 of 8 genes, count those with as many of the set."""
    genes = pd.Index(list("abcdefgh"))
    found = np.isin(genes, ["a", "b", "g"])
    _, member = enrich.membership({"S": ["a", "b", "c", "d"]}, genes, 1, 8)
    draws = [len({"a", "b", "c", "d"} & set(draw)) >= 2 for draw in combinations(genes, 3)]
    assert len(draws) == comb(8, 3)
    assert enrich.over_representation(member, found)[2][0] == pytest.approx(np.mean(draws))


def benjamini_hochberg(p):
    """By its definition: the least level at which a hypothesis is rejected."""
    ordered = sorted(p)
    q = []
    for value in p:
        at_least = [len(p) * x / (i + 1) for i, x in enumerate(ordered) if x >= value]
        q.append(min(1.0, *at_least, 1.0))
    return q


def test_q_is_that_of_benjamini_and_hochberg():
    assert benjamini_hochberg([0.01, 0.04, 0.03, 0.5]) == pytest.approx(
        [0.04, 0.16 / 3, 0.16 / 3, 0.5]
    )
    rng = np.random.default_rng(0)
    genes, sets = random_sets(rng, 25, 80)
    found = pd.Series(rng.random(80) < 0.3, genes)
    table = enrich.examine(GeneList("x", "y", found, pd.Series(rng.random(80), genes)), sets, 3, 99)
    assert len(table) == 25
    np.testing.assert_allclose(table["q"], benjamini_hochberg(table["p"].tolist()))
    np.testing.assert_allclose(table["rank_q"], benjamini_hochberg(table["rank_p"].tolist()))
    assert table["p"].is_monotonic_increasing


# ----- ranks -----
@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(8, 60), ties=st.booleans())
def test_without_correlation_the_rank_test_is_scipys(seed, n, ties):
    rng = np.random.default_rng(seed)
    genes, sets = random_sets(rng, 3, n, 2, 6)
    statistic = rng.integers(0, 5, n).astype(float) if ties else rng.normal(size=n)
    assume(len(np.unique(statistic)) > 1)
    names, member = enrich.membership(sets, genes, 1, n)
    auc, p = enrich.rank_test(member, statistic, correlation=0.0)
    for i, name in enumerate(names):
        inside = np.isin(genes, sets[name])
        expected = stats.mannwhitneyu(
            statistic[inside], statistic[~inside], alternative="greater", method="asymptotic"
        )
        assert auc[i] == pytest.approx(expected.statistic / (inside.sum() * (~inside).sum()))
        assert p[i] == pytest.approx(expected.pvalue, rel=1e-6)


def test_the_variance_of_correlated_ranks_is_that_of_draws():
    """U of 10 genes that are correlated by 0.3, among 25 that are not."""
    rng, rho = np.random.default_rng(1), 0.3
    common = rng.normal(size=(40_000, 1))
    x = np.hstack([
        np.sqrt(rho) * common + np.sqrt(1 - rho) * rng.normal(size=(40_000, 10)),
        rng.normal(size=(40_000, 25)),
    ])  # fmt: skip
    u = (x[:, :10, None] > x[:, None, 10:]).sum((1, 2))
    genes = pd.Index([f"G{i}" for i in range(35)])
    _, member = enrich.membership({"S": list(genes[:10])}, genes, 1, 35)
    auc, p = enrich.rank_test(member, x[0], rho)
    z = stats.norm.isf(p[0])
    assert (auc[0] * 250 - 125 - 0.5) / z == pytest.approx(u.std(), rel=0.02)
    assert u.std() > 2 * np.sqrt(250 * 36 / 12) / 1.5  # wider than without correlation


def test_sets_of_no_meaning_have_uniform_p():
    rng = np.random.default_rng(2)
    genes, sets = random_sets(rng, 3000, 2000, 10, 60)
    found = pd.Series(rng.random(2000) < 0.15, genes)
    lists = GeneList("x", "y", found, pd.Series(rng.normal(size=2000), genes))
    table = enrich.examine(lists, sets, 5, 500)
    assert len(table) == 3000
    _, member = enrich.membership(sets, genes, 5, 500)
    plain = enrich.rank_test(member, lists.statistic.to_numpy(), correlation=0.0)[1]
    assert stats.kstest(plain, "uniform").pvalue > 0.01
    for level in (0.05, 0.2):
        assert (table["p"] < level).mean() < level * 1.15  # discrete, so no more than uniform
        assert (table["rank_p"] < level).mean() < level  # widened for correlation
    assert (table["p"] < 0.2).mean() > 0.1
    own = enrich.rank_test(member, lists.statistic.to_numpy())[1]
    assert (own > plain)[plain < 0.4].all()
    assert (table[["q", "rank_q"]] > 0.05).all(axis=None)


def test_a_set_of_high_ranks_is_found_without_a_list():
    genes = pd.Index([f"G{i}" for i in range(200)])
    statistic = pd.Series(np.arange(200.0), genes)
    sets = {"HIGH": list(genes[170:190]), "LOW": list(genes[:20]), "WIDE": list(genes[::10])}
    table = enrich.examine(
        GeneList("x", "y", pd.Series(False, genes), statistic), sets, 5, 500
    ).set_index("set")  # fmt: skip
    assert table.loc["HIGH", "rank_auc"] == pytest.approx((170 * 20) / (180 * 20))
    assert table.loc["HIGH", "rank_q"] < 1e-3
    assert table.loc["LOW", "rank_p"] > 0.999
    assert 0.2 < table.loc["WIDE", "rank_p"] < 0.8
    assert (table["p"] == 1).all()
    assert table["ratio"].isna().all()


def test_genes_that_are_all_alike_have_no_ranks():
    genes = pd.Index(list("abcdef"))
    _, member = enrich.membership({"S": ["a", "b"], "ALL": list("abcdef")}, genes, 1, 9)
    auc, p = enrich.rank_test(member, np.ones(6))
    assert auc.tolist() == [0.5, 0.5]
    assert p.tolist() == [1, 1]


# ----- gene sets -----
def test_sizes_are_those_in_the_background():
    genes = pd.Index(GENES)
    assert enrich.membership(SETS, genes, 5, 30)[0] == ["FIRST", "SECOND", "MIXED"]
    assert enrich.membership(SETS, genes, 6, 42)[0] == ["FIRST", "SECOND", "ALL"]
    assert enrich.membership(SETS, genes, 2, 2)[0] == ["SMALL"]
    names, member = enrich.membership(SETS, genes, 43, 99)
    assert names == []
    assert member.shape == (0, len(GENES))


def test_gmt_is_read_as_msigdb_writes_it(tmp_path):
    path = tmp_path / "x.gmt"
    path.write_bytes("﻿A set\thttp://x\tKRT8\tNA\t KRT8 \t\t\r\n\r\nB\t\tCD3E\r\n".encode())
    assert enrich.read_gmt(path) == {"A set": ["KRT8", "NA"], "B": ["CD3E"]}


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "holds no set."),
        ("\n \n", "holds no set."),
        ("A\tx\tg\nB x g\n", "has no tab in line 2: 'B x g'."),
        ("A\tx\tg\n\n\tx\tg\n", "names no set in line 3."),
        ("A\tx\tg\nB\tx\n", "has no gene in line 2, set B."),
        ("A\tx\tg\nB\tx\t \t\n", "has no gene in line 2, set B."),
        ("A\tx\tg\nB\tx\tg\nA\tx\th\n", "has the set A in lines 1 and 3."),
    ],
)
def test_bad_gmt(tmp_path, text, problem):
    path = tmp_path / "x.gmt"
    path.write_text(text)
    with pytest.raises(utils.StageError) as error:
        enrich.read_gmt(path)
    assert str(error.value).splitlines()[0] == f"{path} {problem}"
    assert "tabs between them" in str(error.value)


def test_bytes_and_no_file_are_no_gmt(tmp_path):
    (tmp_path / "x.gmt").write_bytes(b"A\tx\t\xff\n")
    for name in ("x.gmt", "none.gmt"):
        with pytest.raises(utils.StageError, match="cannot be read as text"):
            enrich.read_gmt(tmp_path / name)


# ----- the command -----
def test_sets_that_are_not_tested_are_named_with_the_reason(section, capsys):
    odd = {"UNKNOWN": ["X1", "X2", "X3", "X4", "X5"], "TINY": GENES[:2], "HUGE": GENES}
    write_gmt(section / "sets.gmt", {**SETS, **odd})
    assert run(section, "--min-size", "3", "--max-size", "20", "--no-plot") == 0
    shown = capsys.readouterr().out
    n = len(SETS) + 3
    assert (
        f"1 of {n} gene sets are not tested, since they have no gene that was measured: U" in shown
    )
    assert f"2 of {n} gene sets are not tested, since they have fewer than 3 measured gen" in shown
    assert "since they have more than 20 measured genes (--max-size): ALL, HUGE" in shown
    dropped = json.loads((section / "enrich.json").read_text())["dropped"]
    assert sorted(map(tuple, dropped.values())) == [
        ("ALL", "HUGE"), ("SMALL", "TINY"), ("UNKNOWN",)
    ]  # fmt: skip
    assert not {*odd} & {*pd.read_csv(section / "enrichment.csv")["set"]}


def test_a_known_section(section, capsys):
    assert run(section) == 0
    table = read(section)
    row = table.loc["region 1", "FIRST"]
    assert (row["source"], row["size"], row["found"]) == ("markers", 6, 6)
    assert row["expected"] == pytest.approx(6 * 6 / 42, rel=1e-3)
    assert row["ratio"] == pytest.approx(7, rel=1e-3)
    assert row["p"] == pytest.approx(1 / comb(42, 6), rel=1e-3)
    assert row["genes"] == "G00;G01;G02;G03;G04;G05"
    assert row["rank_auc"] == 1
    row = table.loc["region 2", "SECOND"]
    assert (row["size"], row["found"], row["genes"]) == (6, 6, "G10;G11;G12;G13;G14;NA")
    spots, maps = table.loc["spots", "FIRST"], table.loc["maps", "FIRST"]
    assert (spots["size"], spots["found"], maps["found"]) == (6, 6, 5)
    expected = stats.hypergeom.sf(4, 30, 6, 10)  # 10 of the 30 genes with a map are found
    assert maps["p"] == pytest.approx(expected, rel=1e-3)
    assert maps["rank_auc"] > 0.7  # genes without a correlation have the lowest rank
    assert table.loc["maps", "SECOND"]["size"] == 5  # NA has no map
    assert ("spots", "MIXED") not in table.index  # three of its genes have a map
    assert ("region 1", "SMALL") not in table.index
    facts = json.loads((section / "enrich.json").read_text())
    assert facts["lists"]["region 1"] == {
        "genes": 6, "background": 42, "sets tested": 4, "enriched": 1, "enriched by ranks": 1,
    }  # fmt: skip
    assert facts["found by"]["genes"] == {"spots only": 1, "both": 5, "maps only": 5}
    assert facts["found by"]["sets"]["both"] == 1
    assert {"sets.gmt", "segment-markers.csv", "patterns.csv", "cnts.csv"} <= set(facts["inputs"])
    assert "region 1" in capsys.readouterr().out
    for name in ("enrichment.png", "venn.png"):
        with Image.open(section / name) as picture:
            assert min(picture.size) > 200


def test_lists_obey_their_thresholds(section):
    table = markers_table()
    table.loc[0, "log2_fold"], table.loc[1, "q"] = 0.5, 0.05  # neither above nor below
    table.to_csv(section / "segment-markers.csv", index=False)
    assert run(section, "--no-plot") == 0
    assert read(section).loc["region 1", "FIRST"]["found"] == 4
    assert run(section, "--no-plot", "--max-q", "0.1", "--log2-fold", "0.4") == 0
    assert read(section).loc["region 1", "FIRST"]["found"] == 6


def test_genes_that_only_make_up_more_of_few_counts_are_no_list(section):
    """As in fat: all genes of FIRST have a high share there, but not more counts."""
    table = markers_table()
    mine = (table["region"] == 1) & table["gene"].isin(SETS["FIRST"])
    table.loc[mine, ["auc_counts", "higher"]] = 0.05, False
    table.to_csv(section / "segment-markers.csv", index=False)
    assert run(section, "--no-plot") == 0
    row = read(section).loc["region 1", "FIRST"]
    assert (row["found"], row["rank_auc"]) == (0, 0)


def test_the_background_of_patterns(section):
    assert run(section, "--no-plot", "--background", "measured") == 0
    row = read(section).loc["maps", "FIRST"]
    assert row["p"] == pytest.approx(stats.hypergeom.sf(4, 42, 6, 10), rel=1e-3)
    assert read(section).loc["maps", "SECOND"]["size"] == 6


def test_genes_without_counts_are_no_background(section):
    counts = pd.read_csv(section / "cnts.csv", index_col=0, keep_default_na=False)
    counts[GENES[35:40]] = 0
    counts.to_csv(section / "cnts.csv")
    assert run(section, "--no-plot", "--allow-stale") == 0
    row = read(section).loc["region 1", "FIRST"]
    assert row["p"] == pytest.approx(1 / comb(37, 6), rel=1e-3)


@pytest.mark.parametrize("lost", ["segment-markers.csv", "patterns.csv"])
def test_one_of_the_tables_is_enough(section, capsys, lost):
    (section / lost).rename(section / "away")
    assert run(section) == 0
    left = {"segment-markers.csv": ["spots", "maps"], "patterns.csv": ["region 1", "region 2"]}[
        lost
    ]
    assert list(dict.fromkeys(read(section).index.get_level_values(0))) == left
    assert (section / "venn.png").exists() == (lost == "segment-markers.csv")
    assert f"without {lost}: run analysis/" in capsys.readouterr().out
    (section / "away").rename(section / lost)
    assert run(section) == 0
    assert "up to date" not in capsys.readouterr().out
    assert len(set(read(section).index.get_level_values(0))) == 4


def test_tables_of_another_folder(section, tmp_path):
    (tmp_path / "t").mkdir()
    for name in ("segment-markers.csv", "patterns.csv", "segment.json", "patterns.json"):
        (section / name).rename(tmp_path / "t" / name)
    assert run(section, "--no-plot") == 2
    assert run(section, "--no-plot", "--tables", str(tmp_path / "t"),
               "--output", str(tmp_path / "o")) == 0  # fmt: skip
    assert sorted(p.name for p in (tmp_path / "o").iterdir()) == [
        "enrich.json", "enrichment.csv",
    ]  # fmt: skip


def test_the_same_run_gives_the_same_bytes_and_an_error_changes_nothing(section):
    names = ["enrichment.csv", "enrichment.png", "venn.png"]
    assert run(section) == 0
    first = {name: (section / name).read_bytes() for name in names}
    assert run(section, "--force") == 0
    assert {name: (section / name).read_bytes() for name in names} == first
    (section / "sets.gmt").write_text("A\n")
    assert run(section) == 2
    assert {name: (section / name).read_bytes() for name in names} == first
    assert not list(section.glob(".*partial*"))


def test_as_a_user(section, capsys):
    options = ("--directory", section, "--gene-sets")
    assert run_as_main("analysis/enrich.py", *options, section / "sets.gmt") == 0
    assert capsys.readouterr().err == ""
    assert run_as_main("analysis/enrich.py", *options, "nowhere.gmt") == 2
    assert capsys.readouterr().err.startswith("error: nowhere.gmt cannot be read as text")


def test_nothing_found_is_no_error(section, capsys):
    markers, patterns = markers_table(), patterns_table()
    markers["q"] = 1.0
    patterns[["found_by_spots", "found_by_maps"]] = False
    markers.to_csv(section / "segment-markers.csv", index=False)
    patterns.to_csv(section / "patterns.csv", index=False)
    assert run(section) == 0
    assert "warning: region 1: 0 genes, 4 sets to test" in capsys.readouterr().out
    assert (read(section)["p"] == 1).all()
    assert (section / "venn.png").exists()


# ----- what is wrong -----
def breaks(section, name, change):
    table = pd.read_csv(section / name, keep_default_na=False)
    change(table).to_csv(section / name, index=False)


@pytest.mark.parametrize(
    ("name", "change", "problem"),
    [
        (
            "segment-markers.csv",
            lambda t: t.drop(columns="auc"),
            "is not a table of region, gene, ",
        ),
        ("segment-markers.csv", lambda t: t.assign(q="high"), "is not a table of region, gene, "),
        (
            "segment-markers.csv",
            lambda t: t.replace("G03", "X"),
            "genes that cnts.csv lacks: X, X.",
        ),
        ("segment-markers.csv", lambda t: pd.concat([t, t[:1]]), "has 1 G00 more than once."),
        ("segment-markers.csv", lambda t: t.assign(region=""), "a row has no region."),
        ("patterns.csv", lambda t: t.assign(found_by_maps="maybe"), "found_by_maps is not True"),
        ("patterns.csv", lambda t: pd.concat([t, t[3:4]]), "has G03 more than once."),
        ("patterns.csv", lambda t: t.replace("G03", "X"), "genes that cnts.csv lacks: X."),
    ],
)
def test_bad_tables(section, capsys, name, change, problem):
    breaks(section, name, change)
    assert run(section) == 2
    error = capsys.readouterr().err
    assert problem in error
    assert str(section / name) in error
    script = {"segment-markers.csv": "segment.py", "patterns.csv": "patterns.py"}[name]
    assert f"Run: python analysis/{script} --directory" in error
    assert not (section / "enrichment.csv").exists()


def test_markers_without_a_gene_are_passed_over(section, capsys):
    """segment.py writes such a table where spots are few; to run it again would not help."""
    breaks(section, "segment-markers.csv", lambda t: t.iloc[:0])
    assert run(section, "--no-plot") == 0
    assert "segment-markers.csv holds no gene" in capsys.readouterr().out
    assert set(read(section).reset_index()["list"]) == {"spots", "maps"}
    (section / "patterns.csv").unlink()
    assert run(section, "--force") == 2
    assert "or they are missing" in capsys.readouterr().err


def test_without_any_table(section, capsys):
    (section / "segment-markers.csv").unlink()
    (section / "patterns.csv").unlink()
    assert run(section) == 2
    error = capsys.readouterr().err
    assert "Neither segment-markers.csv nor patterns.csv in" in error
    assert "segment.py" in error
    assert "patterns.py" in error


def test_tables_out_of_date(section, capsys):
    with (section / "cnts.csv").open("a") as file:
        file.write("\n")
    assert run(section, "--no-plot") == 2
    error = capsys.readouterr().err
    assert "cnts.csv has changed since analysis/segment.py read it" in error
    assert run(section, "--no-plot", "--allow-stale") == 0
    (section / "segment.json").unlink()
    capsys.readouterr()
    assert run(section, "--no-plot", "--allow-stale") == 0
    taken = "segment-markers.csv: not made by analysis/segment.py, taken as your own"
    assert taken in capsys.readouterr().out
    (section / "patterns.json").write_text("[1]")
    assert run(section, "--no-plot") == 2
    error = capsys.readouterr().err
    assert "patterns.json is not a record of analysis/patterns.py" in error
    assert "Move it away and run: python analysis/patterns.py" in error


def test_markers_of_an_earlier_segment_are_not_read(section, capsys):
    (section / "segment-markers.csv").rename(section / "markers.csv")
    assert run(section, "--no-plot") == 2
    error = capsys.readouterr().err
    assert f"{section / 'markers.csv'} was written by an earlier analysis/segment.py" in error
    place = shlex.quote(str(section))
    assert f"Run: python analysis/segment.py --directory {place} --force (or move" in error
    (section / "markers.csv").write_text("gene,label\nG00,mine\n")  # a table of the user's own
    assert run(section, "--no-plot") == 0
    assert (section / "markers.csv").read_text() == "gene,label\nG00,mine\n"


def test_a_record_of_before_is_refused_with_what_to_run(section, capsys):
    (section / "patterns.json").write_text('{"script": "analysis/patterns.py", "inputs": {}}')
    assert run(section, "--no-plot") == 2
    error = capsys.readouterr().err
    assert "patterns.json is not a record of analysis/patterns.py" in error
    place = shlex.quote(str(section))
    assert f"Move it away and run: python analysis/patterns.py --directory {place} --force" in error


@pytest.mark.parametrize("name", ["enrichment.csv", "enrichment.png", "venn.png"])
def test_files_of_the_user_are_kept(section, name, capsys):
    (section / name).write_text("mine")
    before = snapshot(section)
    assert run(section) == 2
    error = capsys.readouterr().err
    assert f"{section / name} was not written by analysis/enrich.py, which would" in error
    assert error.endswith("sets.gmt' --force\n")
    assert snapshot(section) == before
    assert run(section, "--force") == 0
    made = (section / name).read_bytes()
    capsys.readouterr()
    assert run(section) == 0
    assert "up to date, nothing to do" in capsys.readouterr().out
    with (section / name).open("a") as file:
        file.write("edited")
    edited = snapshot(section)
    assert run(section) == 0
    assert f"kept your {name} (--force makes a new one)" in capsys.readouterr().out
    assert snapshot(section) == edited
    assert run(section, "--max-q", "0.2") == 2
    error = capsys.readouterr().err
    assert f"{section / name} was edited by hand, and other options were given" in error
    assert snapshot(section) == edited
    (section / "sets.gmt").write_text((section / "sets.gmt").read_text() + "NEW\tx\tG00\tG01\n")
    edited = snapshot(section)
    assert run(section) == 2
    assert "was edited by hand, and sets.gmt has changed" in capsys.readouterr().err
    assert snapshot(section) == edited
    assert run(section, "--force") == 0
    assert (section / name).read_bytes().startswith(made[:4])
    assert not (section / name).read_bytes().endswith(b"edited")


def test_the_old_name_of_an_option_works(section):
    assert run(section, "--no-plot", "--level", "0.1") == 0
    assert json.loads((section / "enrich.json").read_text())["options"][-2:] == ["--max-q", "0.1"]


def test_pictures_of_an_earlier_run_go_with_it(section):
    assert run(section) == 0
    assert run(section, "--no-plot") == 0
    assert not (section / "enrichment.png").exists()
    assert not (section / "venn.png").exists()
    assert run(section) == 0


@pytest.mark.parametrize(
    ("sets", "hint"),
    [
        ({"A": [gene.lower() for gene in GENES]}, "42 but for capitals (human genes are written"),
        ({"A": ["ENSG1", "ENSG2"]}, "0 of its 2 genes are among the measured ones, which are wr"),
        ({"A": GENES[:4]}, "no set has 5 to 500 measured genes; 4 of its 4 genes"),
    ],
)
def test_sets_of_other_genes(section, capsys, sets, hint):
    write_gmt(section / "sets.gmt", sets)
    assert run(section, "--no-plot") == 2
    assert hint in capsys.readouterr().err


def test_sizes_that_contradict(section, capsys):
    assert run(section, "--min-size", "9", "--max-size", "8") == 2
    assert "--min-size 9 is above --max-size 8." in capsys.readouterr().err


# ----- pictures -----
@settings(max_examples=100, deadline=None)
@given(st.integers(0, 300), st.integers(0, 300), st.integers(0, 300))
def test_circles_have_areas_in_proportion(first, second, both):
    a, b, distance = enrich.place_circles(first + both, second + both, both)
    assert np.pi * a**2 == pytest.approx(first + both)
    assert np.pi * b**2 == pytest.approx(second + both)
    assert enrich.overlap_area(distance, a, b) == pytest.approx(both, abs=1e-5 * (1 + both))


def test_the_area_that_circles_share_by_counting_points():
    a, b, distance = 2.0, 1.5, 2.2
    y, x = np.mgrid[-2:2:2000j, -2:4:3000j]
    inside = (x**2 + y**2 < a**2) & ((x - distance) ** 2 + y**2 < b**2)
    assert enrich.overlap_area(distance, a, b) == pytest.approx(inside.mean() * 24, rel=1e-3)


@pytest.mark.parametrize(
    ("only_spots", "both", "only_maps"),
    [(10, 5, 20), (0, 5, 20), (20, 5, 0), (30, 0, 4), (1, 200, 1), (0, 0, 5), (5, 0, 0), (0, 7, 0)],
)
def test_every_count_of_the_venn_is_written_where_it_belongs(only_spots, both, only_maps):
    spots, maps = (
        set(range(only_spots + both)),
        set(range(only_spots, only_spots + both + only_maps)),
    )
    ax = enrich.draw_venn([("title", spots, maps)]).axes[0]
    circles = [patch for patch in ax.patches if isinstance(patch, Circle) and patch.get_fill()]
    assert len(circles) == (only_spots + both > 0) + (only_maps + both > 0)
    texts = {text.get_text() for text in ax.texts}
    assert {f"by spots: {only_spots + both}", f"by maps: {only_maps + both}"} <= texts
    written = [t for t in ax.texts if t.get_text().isdigit()]
    counts = [n for n in (only_spots, both, only_maps) if n]
    assert [int(t.get_text()) for t in sorted(written, key=lambda t: t.get_position()[0])] == counts
    if len(circles) < 2:
        return
    for text in written:  # within the circles it is of; a thin part has it beside them
        x, y = text.get_position()
        within = [np.hypot(x - c.center[0], y - c.center[1]) < c.radius for c in circles]
        if text.get_ha() == "center":
            n = int(text.get_text())
            assert within in {
                only_spots: [[True, False]], both: [[True, True]], only_maps: [[False, True]],
            }[n]  # fmt: skip


def test_an_empty_venn_says_so():
    assert enrich.draw_venn([("title", set(), set())]).axes[0].texts[0].get_text() == "none"


def test_the_best_sets_of_every_list_are_shown():
    rows = [(name, f"{name}{i}") for name in "abc" for i in range(6)] + [("b", "a0")]
    table = pd.DataFrame(rows, columns=["list", "set"])
    assert enrich.best_sets(table, ["a", "b", "c"])[:5] == ["a0", "a1", "a2", "a3", "b0"]
    assert len(enrich.best_sets(table, ["a", "b", "c"])) == 12
    rows = [(str(name), f"{name}_{i}") for name in range(30) for i in range(6)]
    many = enrich.best_sets(
        pd.DataFrame(rows, columns=["list", "set"]), [str(i) for i in range(30)]
    )
    assert len(many) == 30
    names = [str(i) for i in range(enrich.MOST_ROWS + 9)]
    table = pd.DataFrame([(name, f"{name}_0") for name in names], columns=["list", "set"])
    most = enrich.best_sets(table, names)
    assert most == [f"{name}_0" for name in range(enrich.MOST_ROWS)]
    assert enrich.shortened("A_" * 40).endswith("…")
