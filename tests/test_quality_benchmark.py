"""benchmarks/quality on hand-made cells and tiny random models: the arithmetic of its tables, resuming, and tasks.

Proved here: increases, ratios and means are what they say; what is missing stays missing; a cell is made again exactly when
what it was made from has changed. Not proved: anything about a recipe; how tasks are scored (test_tasks.py).
"""

from __future__ import annotations

import gzip
import importlib
import itertools
import json
import math
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from quality_modules import quality_modules

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def q(monkeypatch):
    with quality_modules(monkeypatch) as modules:
        yield modules


DENSE_NATS = {"wiki": 3.0, "web": 4.0, "novels": 3.5}


def a_cell(recipe, calibration, losses, sparsity=0.2, **overrides):
    """A record with increases ``losses`` by text; texts at (20000, 1024) lose half of it."""
    texts = []
    for main, tokens, seq_len, scale in ((True, 8000, 128, 1.0), (False, 20_000, 1024, 0.5)):
        for text, loss in losses.items():
            dense = DENSE_NATS[text]
            entry = {"text": text, "kind": "any", "origin": "here", "main": main, "sha256": text, "tokens": tokens}
            nats = {"nats": dense + scale * loss, "dense_nats": dense}
            texts.append(entry | nats | {"tokens_asked": tokens, "seq_len": seq_len})
    return {
        "name": f"{recipe}-{calibration}",
        "key": "k",
        "cell": {
            "recipe": recipe,
            "sparsity": sparsity,
            "calibration": calibration,
            "overrides": overrides,
            "windows": 128,
        },
        "param_ratio": 0.7998,
        "params_saved": 84,
        "params_total_before": 100,
        "seconds": {"load": 5.0, "calibrate": 50.0, "factorize": 2.5, "evaluate": 1000.0},
        "peak_memory_bytes": 1_500_000_000,
        "environment": {"threads": 2},
        "code_sha256": "c",
        "texts": texts,
    }


@pytest.fixture
def cells(q):
    return q.table.Cells(
        [
            a_cell("dense", "default", dict.fromkeys(DENSE_NATS, 0.0), sparsity=0.0),
            a_cell("lorap", "default", {"wiki": 0.5, "web": 0.8, "novels": 0.4}),
            a_cell("best", "default", {"wiki": 0.25, "web": 0.4, "novels": 0.3}),
            a_cell("lorap", "wiki", {"wiki": 0.4, "web": 1.0, "novels": 0.8}),
            a_cell("best", "wiki", {"wiki": 0.3, "web": 0.9, "novels": 0.4}),
            a_cell("lorap", "web", {"wiki": 0.4, "web": 0.5, "novels": 0.8}),
        ]
    )


def test_no_ratio_where_the_baseline_loses_nothing(q):
    cells = q.table.Cells([a_cell(name, "default", {"wiki": -0.01}) for name in ("lorap", "best")])
    assert math.isnan(cells.ratio("best", 0.2)["wiki"])


def test_summary_of_a_full_matrix_and_of_one_with_holes(q, cells):
    full = q.table.Cells([record for record in cells.records if record["cell"]["calibration"] != "web"])
    row = q.table.summary(full, 0.2).splitlines()[2]
    # Same kind: 0.75. Others: (0.9 + 0.5) / 2. Default: (0.5 + 0.5 + 0.75) / 3.
    assert row == "| best | 0.750 | 0.700 | 0.583 | 0.900 (wiki -> web) | 6 of 6 |"
    row = q.table.summary(cells, 0.2).splitlines()[2]
    assert row == "| best | - | - | 0.583 | 0.900 (wiki -> web) | 6 of 9 |"


def test_loss_without_a_dense_one_is_missing(q):
    record = a_cell("lorap", "default", {"wiki": 0.5, "web": 0.3})
    cells = q.table.Cells([record])
    assert dict(cells.increase("lorap", 0.2)) == pytest.approx({"wiki": 0.5, "web": 0.3})
    assert cells.increase("lorap", 0.2, size=(20_000, 1024))["wiki"] == pytest.approx(0.25)
    record["texts"][0]["dense_nats"] = None
    found = q.table.Cells([record]).increase("lorap", 0.2)
    assert math.isnan(found["wiki"])
    assert found["web"] == pytest.approx(0.3)
    assert math.isnan(q.table.mean(found)), "a mean over other texts is another number"


def test_document_and_picture_are_written(q, cells, tmp_path):
    for index, record in enumerate(cells.records):
        q.records.write_json(tmp_path / "cells" / f"{index}.json", record)
    text = q.table.write(tmp_path).read_text()
    assert "## Sparsity 0.2" in text
    assert "states of the library" not in text
    assert "</svg>" in (tmp_path / "quality.svg").read_text()
    assert "</svg>" in (tmp_path / "sizes.svg").read_text()
    q.records.write_json(tmp_path / "cells" / "0.json", cells.records[1] | {"code_sha256": "other"})
    assert "made by 2 states of the library" in q.table.write(tmp_path).read_text()


def test_what_was_not_measured_has_no_number_in_the_picture(q, cells, monkeypatch):
    written = []

    def keep(figure, _picture):
        written.extend(text.get_text() for axis in figure.axes for text in axis.texts if text.get_text())

    monkeypatch.setattr(q.plot, "save", keep)
    more = a_cell("flap", "default", {"wiki": 0.6}, sparsity=0.2)
    q.plot.draw(q.table.Cells([*cells.records, more]), Path("unused.svg"))
    assert sorted(written) == sorted(["0.50", "0.80", "0.40", "0.25", "0.40", "0.30", "0.60"])


def test_sizes_begin_at_the_dense_model(q, cells):
    """Means of all texts at the parameters of the whole model; a recipe that lacks a text, or has options, has no point."""
    more = a_cell("flap", "default", {"wiki": 0.5, "web": 0.8}, sparsity=0.2)
    changed = a_cell("best", "default", dict.fromkeys(DENSE_NATS, 1.0), repair=False)
    found = q.plot.sizes(q.table.Cells([*cells.records, more, changed]))
    assert list(found) == ["lorap", "best"]
    assert found["lorap"] == [(100e-6, 0.0), (84e-6, pytest.approx(1.7 / 3))]
    assert found["best"] == [(100e-6, 0.0), (84e-6, pytest.approx(0.95 / 3))]


def test_tables_of_nothing_and_without_the_default_mixture(q, tmp_path):
    (tmp_path / "cells").mkdir()
    assert q.table.write(tmp_path).exists()
    q.records.write_json(tmp_path / "cells" / "one.json", a_cell("flap", "wiki", {"wiki": 0.5}))
    text = q.table.write(tmp_path).read_text()
    assert "| wiki | **- / - (-)** |" in text
    assert "No recipe was measured beside the baseline." in text


# Cells: made once, made again when something they were made from changes.


@pytest.fixture
def material(q, model_folder, tokenizer, small_text, tmp_path):
    ids = np.array(tokenizer(small_text.read_text())["input_ids"])
    found = {}
    for name, part in (("wiki", ids[:3000]), ("web", ids[3000:6000]), ("calibration", ids[6000:12_000])):
        np.save(tmp_path / f"{name}.npy", part)
        found[name] = q.texts.Tokens(tmp_path / f"{name}.npy", f"sha of {name}", len(part))
    tests = {name: found[name] for name in ("wiki", "web")}
    return q.texts.Material(model_folder, "sha of model", tests, {"wiki": found["calibration"]})


def arguments(q, out, *options):
    return q.matrix.parse(["--out", str(out), "--threads", "1", *options])


@pytest.fixture
def jobs_run(q, monkeypatch):
    """The jobs of each call, made in this process."""
    calls = []

    def run(jobs, **_):
        calls.append([job.name for job in jobs])
        for job in jobs:
            q.cells.main(job.command[2:])
        return []

    monkeypatch.setattr(q.matrix, "run", run)
    return calls


def test_cells_resume(q, material, jobs_run, tmp_path):
    given = arguments(q, tmp_path)
    cell = q.cells.Cell(recipe="lorap", sparsity=0.5, calibration="wiki", windows=8)
    for _ in range(2):
        assert q.matrix.make_cells([cell], material, given, count=1000) == []
    assert jobs_run == [["dense", "lorap-0.5-wiki"], []]

    changed = q.cells.Cell(recipe="lorap", sparsity=0.5, calibration="wiki", windows=9)
    q.matrix.make_cells([changed], material, given, count=1000)
    assert jobs_run[-1] == ["lorap-0.5-wiki"]

    q.matrix.make_cells([changed], material, given, count=900)
    assert jobs_run[-1] == ["dense", "lorap-0.5-wiki"]

    fewer = q.texts.Material(material.model, "sha of model", {"web": material.tests["web"]}, material.calibrations)
    q.matrix.make_cells([changed], fewer, given, count=900)
    assert jobs_run[-1] == [], "a cell that has more texts than asked for is enough"

    (tmp_path / "cells" / "lorap-0.5-wiki.json").unlink()
    for wanted in (fewer, material):
        q.matrix.make_cells([changed], wanted, given, count=900)
        assert jobs_run[-1] == ["lorap-0.5-wiki"], "a cell that has only some of the texts is not enough"

    other = q.texts.Material(material.model, "sha of another model", material.tests, material.calibrations)
    q.matrix.make_cells([changed], other, given, count=900)
    assert jobs_run[-1] == ["dense", "lorap-0.5-wiki"]

    q.matrix.make_cells([changed], other, arguments(q, tmp_path, "--force"), count=900)
    assert jobs_run[-1] == ["lorap-0.5-wiki"]


def test_a_cell_says_what_was_measured(q, material, jobs_run, tmp_path):
    import lorap
    from lorap.checkpoint.load import find_model, load_model
    from lorap.evaluation.perplexity import evaluate

    cell = q.cells.Cell(recipe="lorap", sparsity=0.5, calibration="wiki", windows=8)
    q.matrix.make_cells([cell], material, arguments(q, tmp_path), count=1000)
    record = q.records.read_json(tmp_path / "cells" / "lorap-0.5-wiki.json")
    assert [(entry["text"], entry["tokens"], entry["seq_len"]) for entry in record["texts"]] == [
        ("wiki", 896, 128),
        ("web", 896, 128),
    ]
    model = load_model(find_model(material.model))
    ids = torch.from_numpy(np.load(material.tests["web"].path)[:896]).view(7, 128)
    windows = lorap.calibration.TokenWindows(ids, "web", "")
    assert record["texts"][1]["dense_nats"] == pytest.approx(evaluate(model, windows).nats)
    calibration = torch.from_numpy(np.load(material.calibrations["wiki"].path))
    small, report = lorap.compress(model, calibration=calibration, config=cell.config(), progress=False)
    assert record["texts"][1]["nats"] == pytest.approx(evaluate(small, windows).nats, rel=1e-5)
    assert record["params_saved"] == report.params_saved
    assert record["calibration"]["sha256"] == report.calibration["sha256"]
    assert record["calibration"]["windows"] == 8


@pytest.mark.parametrize("rival", ["modegpt", "slicegpt"])
def test_cells_of_other_methods(q, material, jobs_run, tmp_path, rival):
    """They calibrate on the windows that recipes have, save no more, and are made again when options or windows change."""
    given = arguments(q, tmp_path)
    cell = q.cells.Cell(recipe=rival, sparsity=0.5, calibration="wiki", windows=8)
    recipe = q.cells.Cell(recipe="lorap", sparsity=0.5, calibration="wiki", windows=8)
    q.matrix.make_cells([cell, recipe], material, given, count=1000)
    found, theirs = (q.records.read_json(tmp_path / "cells" / f"{name}-0.5-wiki.json") for name in (rival, "lorap"))
    assert found["calibration"]["sha256"] == theirs["calibration"]["sha256"]
    assert found["params_total_before"] == theirs["params_total_before"]
    assert 0.4 < found["param_ratio"] <= 0.5
    for record in (found, theirs):
        for entry in record["texts"]:
            assert 0 < entry["divergence"] < 5
            assert 0 <= entry["same_token"] <= 1
            assert entry["compared"] == 7 * 127
    q.matrix.make_cells([cell], material, given, count=1000)
    other = q.cells.Cell(recipe=rival, sparsity=0.5, calibration="wiki", windows=9)
    q.matrix.make_cells([other], material, given, count=1000)
    assert jobs_run == [["dense", f"{rival}-0.5-wiki", "lorap-0.5-wiki"], [], [f"{rival}-0.5-wiki"]]


def test_tables_tell_how_close_predictions_are(q):
    records = [a_cell("dense", "default", {"wiki": 0.0, "web": 0.0}, sparsity=0.0)]
    records += [a_cell(name, "default", {"wiki": 0.5, "web": 0.8}) for name in ("lorap", "modegpt")]
    for entry, divergence, same in zip(records[2]["texts"], (0.25, 0.5), (0.75, 0.5), strict=False):
        entry |= {"divergence": divergence, "same_token": same, "compared": 100}
    rows = [line.split(" | ") for line in q.table.recipe_table(q.table.Cells(records), 0.2).splitlines()]
    columns = [rows[0].index(name) for name in ("divergence", "same token")]
    assert [[row[column] for column in columns] for row in rows[2:]] == [["-", "-"], ["0.375", "0.625"]]


def test_a_cell_that_was_ready_before_the_dense_one_learns_of_it(q, tmp_path):
    early = a_cell("lorap", "default", {"wiki": 0.5})
    early["texts"][0]["dense_nats"] = None
    early["texts"][1]["sha256"] = "another text"
    q.records.write_json(tmp_path / "lorap-default.json", early)
    dense = a_cell("dense", "default", {"wiki": 0.0}) | {"name": "dense"}
    q.records.write_json(tmp_path / "dense.json", dense)
    q.records.add_dense(tmp_path)
    found = q.records.read_json(tmp_path / "lorap-default.json")["texts"]
    assert [entry["dense_nats"] for entry in found] == [3.0, None]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense.json", "lorap-default.json"]


def test_default_mixture_and_dense_model_are_judged_on_longer_text(q, material):
    def probes(count, **options):
        found = q.cells.specification(q.cells.Cell(**options), material, count=count)["probes"]
        return [(probe["tokens"], probe["seq_len"], probe["main"]) for probe in found if probe["text"] == "web"]

    long = [(8000, 128, True), (20_000, 128, False), (20_000, 1024, False)]
    assert probes(8000, recipe="dense") == long
    assert probes(8000, recipe="lorap", sparsity=0.2) == long
    assert probes(8000, recipe="lorap", sparsity=0.2, calibration="wiki") == long[:1]
    assert probes(8000, recipe="lorap", sparsity=0.2, overrides={"seed": 1}) == long[:1]
    assert probes(2000, recipe="dense") == [(2000, 128, True)]


def test_halves_do_not_meet(q, monkeypatch):
    text = "\n".join(f"line {index}" for index in range(101))
    monkeypatch.setitem(q.texts.SOURCES, "wiki", q.texts.Text("encyclopedia", lambda: text, True, "here"))
    monkeypatch.setitem(q.texts.SOURCES, "wells", q.texts.Text("fiction", lambda: text, False, "here"))
    first, second = (q.texts.half("wiki", part) for part in ("test", "calibration"))
    assert f"{first}\n{second}" == text
    assert abs(len(first) - len(second)) < 20
    assert q.texts.half("wells", "test") == text
    with pytest.raises(ValueError, match="only for judging"):
        q.texts.half("wells", "calibration")


def test_prose_of_a_reference(q):
    kept = "* If the *target* list is a single target with no trailing comma,\n  the object is assigned to that target."
    assert q.texts.prose(kept) == (
        "If the target list is a single target with no trailing comma, the object is assigned to that target."
    )
    assert q.texts.prose("Assignment statements\n*********************") == ""
    assert (
        q.texts.prose('   target ::= identifier | "(" [target_list] ")" and so on until the twelve words are full.')
        == ""
    )


def test_recipes_of_the_command_line(q):
    assert q.matrix.parse_recipe("lorap") == ("lorap", {})
    assert q.matrix.parse_recipe("lorap+mlp_method=factorize+vo_to_qk_ratio=1.5") == (
        "lorap",
        {"mlp_method": "factorize", "vo_to_qk_ratio": 1.5},
    )
    with pytest.raises(SystemExit, match="RECIPE"):
        q.matrix.parse_recipe("lorap+svd")
    quick = q.matrix.parse(["--quick", "--sparsities", "0.3"])
    assert (quick.tokens, quick.windows, quick.sparsities, quick.calibrations) == (2000, 32, [0.3], ("default", "wiki"))
    assert len(q.matrix.all_cells(quick)) == 2 * len(quick.recipes)


def test_jobs_fail_alone(q, capsys, tmp_path):
    write = "import os, pathlib; pathlib.Path(r'{}').write_text(os.environ['OMP_NUM_THREADS'])"
    last = tmp_path / "last"
    commands = {"good": "pass", "bad": "raise SystemExit('the reason')", "last": write.format(last)}
    jobs = [q.jobs.Job(name, [sys.executable, "-c", code]) for name, code in commands.items()]
    assert q.jobs.run(jobs, processes=2, threads=1) == ["bad"]
    assert last.read_text() == "1"
    assert "the reason" in capsys.readouterr().err


def test_ablation_in_one_command(q, material, jobs_run, monkeypatch, tmp_path):
    label, overrides = q.ablation.ABLATIONS[0]
    document = tmp_path / "results.md"
    document.write_text("<!-- ablation: begin -->\n<!-- ablation: end -->\n")
    monkeypatch.setattr(q.ablation, "ABLATIONS", [(label, overrides)])
    monkeypatch.setattr(q.ablation, "gather", lambda *_: material)
    monkeypatch.setattr(
        sys, "argv", ["ablation.py", "--out", str(tmp_path), "--document", str(document), "--sparsities", "0.5"]
    )
    for _ in range(2):
        assert q.ablation.main() == []
        rows = [line.split(" | ") for line in document.read_text().splitlines() if line.startswith("|")]
        assert rows[0] == ["| sparsity 0.5", "wiki", "web", "mean", "kept |"]
        assert [row[0] for row in rows[2:]] == [f"| `{q.ablation.RECIPE}`", f"| {label}"]
        assert "-" not in itertools.chain(*rows[2:]), "every cell was made"
    assert [len(names) for names in jobs_run] == [3, 0]


def test_tables_are_written_between_their_markers(q):
    begin, end = "<!-- ablation: begin -->", "<!-- ablation: end -->"
    once = q.documents.between(f"before\n{begin}\nold\n{end}\nafter\n", "ablation", "new")
    assert once == f"before\n{begin}\n\nnew\n\n{end}\nafter\n"
    assert q.documents.between(once, "ablation", "new") == once
    with pytest.raises(ValueError, match="ablation: end"):
        q.documents.between(f"{end} {begin}", "ablation", "new")


def test_one_command_makes_the_tables_that_are_in_the_document(q, monkeypatch, tmp_path):
    """From the cells that are in the repository; pictures and the files beside the cells are not written here."""
    document = tmp_path / "results.md"
    tables = re.compile(r"(<!-- [\w ]+: begin -->\n).*?(\n<!-- [\w ]+: end -->)", re.DOTALL)
    whole = q.results.RESULTS.read_text("utf-8")
    document.write_text(tables.sub(r"\1\2", whole))
    written = {}
    monkeypatch.setattr(q.table.plot, "draw", lambda *_: None)
    monkeypatch.setattr(q.table.plot, "draw_sizes", lambda *_: None)
    monkeypatch.setattr(q.budgets_report, "draw", lambda *_: None)
    write = Path.write_text
    keep = lambda path, text, *rest: write(path, text, *rest) if path == document else written.update({path: text})  # noqa: E731
    monkeypatch.setattr(Path, "write_text", keep)
    q.results.write(document)
    assert document.read_text("utf-8") == whole
    assert len(tables.findall(whole)) == 8
    assert [path.name for path in written] == ["table.md", "table.md", "tasks.md"]
    for path, text in written.items():
        assert path.read_text("utf-8") == text


# The paper's studies.


def paper_arguments(q, out, *options):
    return q.paper.parse(["--out", str(out), "--threads", "1", *options])


def test_studies_change_one_choice_of_the_paper(q, tmp_path):
    arguments = paper_arguments(q, tmp_path)
    cells = q.paper.study_cells(arguments)
    usual = q.cells.Cell(recipe="lorap", sparsity=0.2, calibration="web").config().to_dict()

    def changed(study):
        found = {}
        for label, cell in cells[study].items():
            config = cell.config().to_dict()
            found[label] = {name: value for name, value in config.items() if value != usual[name]}
        return found

    assert changed("attention") == {"svd": {"attention_method": "svd"}, "afm": {"attention_method": "afm"}, "awsvd": {}}
    assert [one.get("vo_to_qk_ratio", 3.0) for one in changed("ratio").values()] == [1, 2, 3, 4]
    assert [cell.config().vo_to_qk_ratio for cell in cells["ratio-50"].values()] == [1, 2, 3, 4]
    assert {cell.sparsity for cell in cells["ratio-50"].values()} == {0.5}
    assert cells["ratio-50"]["3"] == cells["sparsity"]["50 %"]
    assert [one.get("least_important_kept", 0.01) for one in changed("least").values()] == [0, 0.005, 0.01, 0.02]
    assert changed("ffn") == {"pruned": {}, "factorized": {"mlp_method": "factorize"}}
    assert [cell.sparsity for cell in cells["sparsity"].values()] == [0.2, 0.3, 0.5]
    assert [cell.calibration for cell in cells["calibration"].values()] == ["web", "novels", "wiki", "default"]
    assert [one.get("num_calibration_samples", 128) for one in changed("size").values()] == [32, 128, 256]
    assert changed("windows")["8 x 2048"] == {"num_calibration_samples": 8, "calibration_seq_len": 2048}
    for name, study in q.paper.STUDIES.items():
        assert study.chosen in ("", *study.variants)
        assert not study.chosen or cells[name][study.chosen].overrides == {}, "the paper's choice is its recipe"


def test_cells_of_several_studies_are_made_once(q, tmp_path):
    found = q.paper.wanted(paper_arguments(q, tmp_path, "--studies", "attention", "ffn", "windows"))
    assert {name: lengths for name, (_, lengths) in found.items()} == {
        "dense": (128, 2048),
        "lorap+attention_method=svd-0.2-web": (128,),
        "lorap+attention_method=afm-0.2-web": (128,),
        "lorap-0.2-web": (128, 2048),
        "lorap+mlp_method=factorize-0.2-web": (128,),
        "lorap+calibration_seq_len=2048+num_calibration_samples=8-0.2-web": (128, 2048),
    }
    short = q.paper.wanted(paper_arguments(q, tmp_path, "--studies", "windows", "--no-long"))
    assert {lengths for _, lengths in short.values()} == {(128,)}
    other = q.paper.wanted(paper_arguments(q, tmp_path, "--studies", "ffn", "--sparsity", "0.5"))
    assert list(other) == ["dense", "lorap-0.5-web", "lorap+mlp_method=factorize-0.5-web"]


@pytest.fixture
def paper_run(q, material, monkeypatch, tmp_path):
    """``paper_run(*options)``: the command in this process; returns the names of the measurements it made."""
    document = tmp_path / "paper.md"
    document.write_text("<!-- paper: begin -->\nold\n<!-- paper: end -->\n")
    usual = [
        "--out",
        tmp_path / "out",
        "--tokens",
        600,
        "--windows",
        8,
        "--texts",
        "wiki",
        "web",
        "--document",
        document,
    ]
    wiki = q.texts.Material(
        material.model, material.model_sha256, material.tests, {"web": material.calibrations["wiki"]}
    )
    monkeypatch.setattr(q.paper, "gather", lambda *_: wiki)
    made = []

    def run(jobs, **_):
        made.extend(job.name for job in jobs)
        for job in jobs:
            module = importlib.import_module(Path(job.command[1]).stem)
            module.make_one(job.command[3]) if module is q.paper else module.write_json(
                Path(json.loads(job.command[3])["out"]), module.score(json.loads(job.command[3]))
            )
        return []

    def call(*options):
        made.clear()
        monkeypatch.setattr(sys, "argv", ["paper.py", *map(str, [*usual, *options])])
        assert q.paper.main() == []
        return list(made)

    monkeypatch.setattr(q.paper, "run", run)
    return call


def test_studies_in_one_command_and_again(q, paper_run, tmp_path):
    ffn = ["dense", "lorap-0.2-web", "lorap+mlp_method=factorize-0.2-web"]
    assert paper_run("--studies", "ffn") == ffn
    assert "old" in (tmp_path / "paper.md").read_text()
    assert paper_run("--studies", "ffn", "--write-docs") == []
    text = (tmp_path / "out" / "paper.md").read_text()
    assert text.split("\n\n", 1)[1].strip() in (tmp_path / "paper.md").read_text()
    assert (tmp_path / "out" / "paper.svg").read_text().count("FFN: pruned or factorized") == 1
    records = {name: q.records.read_json(tmp_path / "out" / "cells" / f"{name}.json") for name in ffn}
    web = {name: record["texts"][1] for name, record in records.items()}
    assert [(one["text"], one["tokens"], one["seq_len"]) for one in web.values()] == [("web", 512, 128)] * 3
    nats, dense = (web[name]["nats"] for name in ("lorap-0.2-web", "dense"))
    assert f"{math.exp(nats):.2f} ({nats - dense:+.3f}) |" in text
    assert paper_run("--studies", "ffn", "attention") == [
        f"lorap+attention_method={name}-0.2-web" for name in ("svd", "afm")
    ]
    (tmp_path / "out" / "cells" / "lorap-0.2-web.json").unlink()
    assert paper_run("--studies", "ffn", "--tables") == []
    assert "| **pruned** | - (-) |" in (tmp_path / "out" / "paper.md").read_text()
    assert paper_run("--studies", "ffn") == ["lorap-0.2-web"]
    assert paper_run("--studies", "ffn", "--force") == ffn[1:]


def test_studies_with_tasks(q, paper_run, monkeypatch, tmp_path):
    requests(tmp_path / "boolq.jsonl.gz", 9)
    monkeypatch.setattr(q.tasks, "TASK_FILES", tmp_path)
    monkeypatch.setattr(q.assets, "fetch", lambda *_: None)
    names = ["dense", "lorap-0.2-web", "lorap+mlp_method=factorize-0.2-web"]
    options = ["--studies", "ffn", "--tasks", "boolq", "--limit", 6]
    assert paper_run(*options) == [one for name in names for one in (name, f"{name}, tasks")]
    assert paper_run(*options) == []
    record, dense = (q.records.read_json(tmp_path / "out" / "tasks" / f"{name}.json") for name in names[1::-1])
    row = next(
        line for line in (tmp_path / "out" / "paper.md").read_text().splitlines() if line.startswith("| **pruned")
    )
    right = q.tasks.answers(record, "boolq")
    assert f"| {100 * sum(right) / 6:.1f} ± " in row
    assert f"| {100 * (sum(right) - sum(q.tasks.answers(dense, 'boolq'))) / 6:+.1f} ± " in row


def study_results(q, losses, **more):
    """Results of the study of attention from hand-made cells of 8,000 tokens; what has no loss was not made."""
    cells = q.paper.STUDIES["attention"].cells({"sparsity": 0.2, "calibration": "web"}, windows=128)
    records = {"dense": a_cell("dense", "default", dict.fromkeys(DENSE_NATS, 0.0)) | {"name": "dense"}}
    for label, (wiki, web) in losses.items():
        records[cells[label].name] = a_cell("lorap", "web", {"wiki": wiki, "web": web}, **cells[label].overrides)
    usual = {"tasks": {}, "texts": ("wiki", "web"), "tokens": 8000, "published": {}}
    return cells, q.paper_report.Results(records=records, **(usual | more))


def test_one_command_makes_the_studies_that_are_in_the_document(q, monkeypatch, tmp_path):
    shutil.copytree(ROOT / "benchmarks" / "results" / "paper", tmp_path / "paper")
    (tmp_path / "paper" / "paper.md").unlink()
    told = ["--tables", "--tasks", "piqa", "hellaswag", "arc_easy", "--limit", "100", "--out", str(tmp_path / "paper")]
    monkeypatch.setattr(q.paper_report, "draw", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["paper.py", *told])
    assert q.paper.main() == []
    found = (tmp_path / "paper" / "paper.md").read_text("utf-8")
    assert found == (q.paper.OUT / "paper.md").read_text("utf-8")
    assert found.split("\n\n", 1)[1].strip() in q.paper.DOCUMENT.read_text("utf-8")


@pytest.mark.parametrize(
    ("losses", "told"),
    [
        ({"svd": (0.5, 0.7), "afm": (0.1, 0.5), "awsvd": (0.2, 0.5)}, "**The paper's choice does not hold here**"),
        ({"svd": (0.5, 0.7), "awsvd": (0.2, 0.5)}, "Not all variants were measured"),
    ],
)
def test_what_becomes_of_the_paper_s_choice(q, losses, told):
    cells, results = study_results(q, losses)
    found = q.paper_report.verdict(q.paper.STUDIES["attention"], cells, results)
    assert found.startswith(told)
    assert "measured" in told or "svd, +0.600." in found or ("awsvd loses +0.350" in found and "afm, +0." in found)


def test_published_rows_stand_beside_the_model_they_are_of(q, tmp_path):
    study = q.paper.STUDIES["sparsity"]
    cells = study.cells({"sparsity": 0.2, "calibration": "web"}, windows=128)
    results = q.paper_report.Results({}, {}, ("wikitext2", "wiki"), 8000, q.paper.PUBLISHED)
    lines = q.paper_report.study_table(study, cells, results).splitlines()
    # ln(15.69 / 12.62) = 0.218
    assert lines[4] == "| 20 %, published | 15.69 (+0.218) | - |  |  |"
    assert [line.split(" | ")[0] for line in lines[3:]] == [
        "| 20 %",
        "| 20 %, published",
        "| 30 %",
        "| 50 %",
        "| 50 %, published",
    ]
    known = [
        name
        for name in ("huggyllama/llama-7b", "llama-7b-hf", "meta-llama/Llama-2-7b-hf", "my-llama-7b")
        if q.paper.PUBLISHED_MODEL.search(name)
    ]
    assert known == ["huggyllama/llama-7b", "llama-7b-hf"]


def test_texts_of_the_command_line(q, small_text):
    assert q.paper.add_texts(["wiki", f"ptb={small_text}"]) == ["wiki", "ptb"]
    assert q.texts.half("ptb", "test") == small_text.read_text()
    with pytest.raises(SystemExit, match="no text ptb2"):
        q.paper.add_texts(["ptb2"])


def test_quick_studies(q):
    quick = q.paper.parse(["--quick", "--tokens", "512"])
    assert (quick.tokens, quick.windows, quick.studies) == (512, 16, ["attention", "ffn", "sparsity"])
    assert len(q.paper.wanted(quick)) == 7


# Tasks.


def requests(path, count):
    """Requests of ``count`` documents in mixed order, with an unconditional one after each."""
    rows = []
    for number in reversed(range(count)):
        for index in (1, 0):
            request = {"context": f"Question {number}", "continuation": f" answer {index}"}
            rows.append({"doc_id": number, "idx": index, "label": number % 2, "request": request})
            rows.append({"doc_id": 1_000_000 + number, "idx": index, "label": 0, "request": request})
    path.write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))


def a_result(name, **correct):
    tasks = {task: {"correct": right, "sha256": "s"} for task, right in correct.items()}
    return {"name": name, "limit": 4, "tasks": tasks}


def test_differences_are_paired(q):
    ours, theirs = a_result("lorap", boolq="1100", piqa="1111"), a_result("dense", boolq="1010", piqa="111")
    found = q.tasks.difference(ours, theirs, "boolq")
    # Differences 0, 1, -1, 0: mean 0, variance 2 / 3 over 4 documents.
    assert found == (pytest.approx(0.0), pytest.approx(math.sqrt(2 / 3 / 4)))
    assert q.tasks.difference(ours, theirs, "piqa") is None, "not the same documents"
    assert q.tasks.difference(ours, theirs, "arc_easy") is None


def test_a_model_is_scored_from_request_to_record(q, material, monkeypatch, tmp_path):
    requests(tmp_path / "boolq.jsonl.gz", 9)
    requests(tmp_path / "piqa.jsonl.gz", 9)
    monkeypatch.setattr(q.tasks, "TASK_FILES", tmp_path)
    cell = q.cells.Cell(recipe="dense")
    given = q.tasks.request(cell, material, limit=6, tasks=["boolq", "piqa"]) | {"name": "dense"}
    record = q.tasks.score(given)
    assert record["tasks"]["boolq"]["documents"] == 6
    assert record["tasks"]["boolq"]["metric"] == "acc"
    assert record["tasks"]["piqa"]["metric"] == "acc_per_char"
    assert record["tasks"]["boolq"]["acc"] == q.tasks.answers(record, "boolq").count(1) / 6
    other = q.tasks.request(cell, material, limit=7, tasks=["boolq", "piqa"])
    assert other["key"] != given["key"]
