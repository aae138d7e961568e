"""The report page without a browser: its numbers, what it may not load, and that nothing in a report can break it.

Its charts are in test_page_charts.py; how it looks is proved in test_page_browser.py.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from commands import run
from made_reports import HOSTILE, INNER, made_report
from page_reader import Page, page_of

from lorap.architectures import PROJECTIONS
from lorap.errors import LoRAPError
from lorap.reports.html.page import compression_page
from lorap.reports.run import CompressionReport

# ----------------------------------------------------------------------------------------------------------------------
# Numbers


def test_headline_tells_the_numbers_to_know_first():
    report = made_report()
    page = page_of(report)
    assert [one["text"] for one in page.all("h1")] == ["SmolLM2-135M"]
    names, values = ([one["text"] for one in page.all(tag)] for tag in ("dt", "dd"))
    tiles = dict(zip(names, values, strict=True))
    before, after = (
        sum(getattr(one, name) for one in report.projections) for name in ("params_before", "params_after")
    )
    assert tiles["Recipe"] == "best"
    assert tiles["Sparsity asked for"] == "0.2of self_attn and mlp"
    assert tiles["Kept of these"] == f"{after / before:.4f}{before:,} \u2192 {after:,}"
    whole_before, whole = before + 28_346_688, after + 28_346_688
    assert tiles["Kept of the whole model"] == (
        f"{whole / whole_before:.4f}{whole_before:,} \u2192 {whole:,}, about {whole * 4 / 1e6:,.1f} MB in float32"
    )
    assert tiles["Perplexity, wiki.txt"] == "178.3280.46 \u2192 178.32, +0.974 nats"


def test_tables_hold_the_numbers_of_the_report():
    report = made_report(7)
    page = page_of(report)
    assert page.rows("Perplexity")["heldout"] == ["heldout", "29.96", "79.32", "+0.974", "4,096"]
    kinds = page.rows("Parameters by kind")
    assert kinds["header"][1:4] == ["before", "after", "kept"]
    assert list(kinds.values())[1:] == report.kind_rows()
    assert page.rows("Time and memory") == {
        "header": ["stage", "seconds", "share"],
        "load": ["load", "1.2", "0.8 %"],
        "calibrate": ["calibrate", "152.4", "93.1 %"],
        "factorize": ["factorize", "10.1", "6.1 %"],
        "prune": ["prune", "0.0", "0.0 %"],
        "all": ["all", "163.7", ""],
        "peak memory": ["peak memory", "2.04 GB", ""],
    }
    assert page.rows("Calibration sources")["chats & more.jsonl"] == ["chats & more.jsonl", "0.5", "28"]
    assert page.rows("Environment")["torch"] == ["torch", "2.13.0"]
    assert [one["text"] for one in page.all("pre")] == [report.command]


def test_layer_tables_hold_every_projection():
    report = made_report(6)
    page = page_of(report)
    ranks, errors = page.rows("Ranks and widths as a table"), page.rows("Errors as a table")
    added = page.rows("What storing the factors added, as a table")
    spectra = page.rows("Singular values as a table")
    for one in report.projections:
        column = 1 + PROJECTIONS.index(one.role)
        assert ranks[str(one.layer)][column] == ("dense" if one.rank is None else str(one.rank))
        assert errors[str(one.layer)][column] == f"{one.error:.4f}"
        assert added[str(one.layer)][column] == f"{one.storage_error:.2g}"
        row = spectra.get(f"{one.layer} {one.role}")
        assert (row is not None) == (one.spectrum is not None)
        if row:
            told = dict(zip(spectra["header"][2:-1], row[2:-1], strict=True))
            for index, value in zip(one.spectrum.indices[:-1], one.spectrum.values, strict=False):
                assert float(told[f"{index:,}"]) == value
            assert row[1] == str(one.rank)
            assert row[-1] == f"{one.spectrum.values[-1]:.4g} (number {one.spectrum.count})"
    assert ranks["3"][-1] == str(INNER // 2 - 8 * 10)
    assert "Factors: 22 by eigh after subspace; errors proved to be within 3e-07 of the least possible." in [
        one["text"] for one in page.all("p")
    ]


def test_options_tell_what_was_changed_from_what_the_recipe_says():
    page = page_of(made_report(2, recipe="lorap", sparsity=0.35, repair=True, sublayers=("mlp", "self_attn")))
    rows = page.rows("Options")
    assert rows["sparsity"] == ["sparsity", "0.35", "changed; default: 0.2"]
    assert rows["repair"] == ["repair", "true", "changed; recipe lorap: false"]
    assert rows["sublayers"] == ["sublayers", "mlp, self_attn", "changed; recipe lorap: self_attn, mlp"]
    assert rows["vo_to_qk_ratio"] == ["vo_to_qk_ratio", "3.0", "recipe lorap"]
    assert rows["seed"] == ["seed", "0", "default"]
    assert len(rows) == 1 + len(made_report(1).config.to_dict())
    assert len(page.all("tr", _class="changed")) == 3
    assert page_of(made_report(2, recipe="flap")).rows("Options")["recipe"] == ["recipe", "flap", "default"]


# ----------------------------------------------------------------------------------------------------------------------
# Safety


def test_the_page_loads_nothing_and_runs_nothing(drawings):
    text = compression_page(made_report(2, model=HOSTILE, texts=(HOSTILE,)))
    page = Page(text)
    assert not [
        one for one in page.elements if one["tag"] in ("script", "img", "link", "iframe", "object", "embed", "b")
    ]
    for element in page.elements:
        for name, value in element["attrs"].items():
            assert not name.startswith("on"), (element["tag"], name)
            assert name not in ("src", "srcset", "data", "action", "poster")
            assert name != "xlink:href" or value.startswith("#")
            if name == "href":
                assert element["tag"] == "a"
                assert value.startswith("https://arxiv.org/abs/")
    assert text.count("url(") == text.count("url(#")
    assert "@import" not in text
    (policy,) = [one["attrs"]["content"] for one in page.all("meta") if "http-equiv" in one["attrs"]]
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"


def test_names_are_told_as_they_are():
    report = made_report(
        2,
        model=HOSTILE,
        texts=(HOSTILE,),
        environment={HOSTILE: HOSTILE},
        seconds={HOSTILE: 1.0},
        command=f"lorap '{HOSTILE}'",
    )
    report.calibration["name"] = HOSTILE
    report.calibration["sources"][0]["name"] = HOSTILE
    report.calibration["sha256"] = HOSTILE
    report.projections[0] = dataclasses.replace(report.projections[0], solver=HOSTILE)
    page = page_of(report)
    assert [one["text"] for one in page.all("h1")] == [HOSTILE]
    assert [one["text"] for one in page.all("title") if "head" in [above["tag"] for above in one["inside"]]] == [
        f"{HOSTILE}, compressed by lorap"
    ]
    assert page.rows("Perplexity")[HOSTILE][0] == HOSTILE
    assert page.rows("Environment")[HOSTILE] == [HOSTILE, HOSTILE]
    assert HOSTILE in page.rows("Calibration sources")
    assert page.all("pre")[0]["text"] == f"lorap '{HOSTILE}'"


def test_equal_reports_make_equal_pages(drawings):
    first = compression_page(made_report(2, seconds={"load": 1.23456}))
    again = CompressionReport.from_dict(json.loads(json.dumps(made_report(2, seconds={"load": 1.23456}).to_dict())))
    assert compression_page(again) == first
    assert compression_page(made_report(2, sparsity=0.3, seconds={"load": 1.23456})) != first


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, entry in items:
        yield from leaves(entry, (*path, key))


EVIL = [None, True, -1, 0, 10**400, 2**63 - 1, 1e308, math.nan, math.inf, -math.inf, "", "<x", [], {}, [[]], {"a": 1}]


def test_whatever_a_report_says_there_is_a_page_or_an_error():
    """Every entry of a report, replaced by each of many things, and left out; drawings are tried in test_page_charts.py."""
    report = made_report(1, texts=("heldout",))
    report.projections = [report.by_role("q_proj")[0], report.by_role("gate_proj")[0]]
    values = json.loads(json.dumps(report.to_dict()))
    pages, refusals = 0, []
    for path in leaves(values):
        for evil in [*EVIL, "left out"]:
            broken = copy.deepcopy(values)
            parent = broken
            for key in path[:-1]:
                parent = parent[key]
            if not path:
                broken = evil if isinstance(evil, dict) else {}
            elif evil == "left out":
                del parent[path[-1]]
            else:
                parent[path[-1]] = evil
            try:
                Page(compression_page(CompressionReport.from_dict(broken)))
                pages += 1
            except LoRAPError as error:
                refusals.append(str(error))
    assert pages > 100
    assert len(refusals) > 500
    assert all(refusal.startswith("report") for refusal in refusals)


# ----------------------------------------------------------------------------------------------------------------------
# Files and the command


def test_compress_leaves_a_page_and_report_writes_it_anew(model_folder: Path, tmp_path: Path):
    out = tmp_path / "small"
    options = ["--sparsity", 0.5, "--eval-text", "none", "--quiet", "--device", "cpu"]
    options += ["--num-calibration-samples", 8, "--calibration-seq-len", 32]
    result = run("compress", model_folder, out, *options)
    assert result.exit_code == 0, result.output
    first = (out / "report.html").read_text("utf-8")
    page = Page(first)
    assert [one["text"] for one in page.all("h1")] == ["model"]
    values = json.loads((out / "lorap_report.json").read_text("utf-8"))
    assert f"{values['params_before']:,} \u2192 {values['params_after']:,}" in page.all("dl")[0]["text"]
    assert "[report.html](report.html)" in (out / "README.md").read_text("utf-8")
    assert values["projections"][0]["spectrum"]["values"][0] == 1.0
    others = {path.name: path.read_bytes() for path in out.iterdir() if path.name != "report.html"}
    (out / "report.html").write_text("old", "utf-8")
    result = run("report", str(out), "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == {
        "page": str(out / "report.html"),
        "bytes": len(first.encode()),
    }
    assert (out / "report.html").read_text("utf-8") == first
    assert {path.name: path.read_bytes() for path in out.iterdir() if path.name != "report.html"} == others


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "has no lorap_report.json; give a folder that"),
        ("{", "is not valid JSON"),
        ("[]", "is not valid JSON: it is not a JSON object"),
        ("{}", "report has no entry model; another version of lorap may have written it"),
        ('{"model": 3, "config": {}, "calibration": {}}', "report.model should be a valid string and is 3"),
    ],
    ids=["missing", "cut", "list", "empty", "wrong"],
)
def test_report_refuses_what_is_no_report(content, message, tmp_path):
    if content is not None:
        (tmp_path / "lorap_report.json").write_text(content, "utf-8")
    result = run("report", str(tmp_path))
    assert result.exit_code == 2
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "report.html").exists()


def test_report_says_when_it_cannot_write(tmp_path):
    (tmp_path / "lorap_report.json").write_text(json.dumps(made_report(1).to_dict()), "utf-8")
    (tmp_path / "report.html").mkdir()
    result = run("report", str(tmp_path))
    assert result.exit_code == 2
    assert f"cannot write into {tmp_path}: " in result.stderr


def test_a_large_model_has_a_small_report(drawings):
    report = made_report(80, hidden=8192)
    assert len(json.dumps(report.to_dict(), indent=2)) < 1_000_000
    assert len(compression_page(report)) < 1_000_000
