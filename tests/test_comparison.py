"""``lorap compare``: every number is that of its model, rounds alternate, what fails fails alone, what is there is kept.

Proved here: losses, sizes and answers agree with the commands that measure one model; ratios are taken within a round; a cell is
measured again exactly when what it depends on has changed; tables and pictures show hand-made numbers. Not proved: that a rate
is right on a busy machine.
"""

from __future__ import annotations

import copy
import gzip
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from commands import last_json, run
from safetensors.torch import load_file, save_file

import lorap
from lorap.checkpoint.folders import WEIGHTS, stored_parameters
from lorap.checkpoint.load import ModelSource
from lorap.cli.compare import render
from lorap.evaluation.comparison import cells, worker
from lorap.evaluation.comparison.compare import ComparisonOptions, compare
from lorap.evaluation.comparison.contender import DECODE, PREFILL, Contender
from lorap.evaluation.comparison.plot import draw
from lorap.evaluation.tasks import TaskResult

SIZES = ["--seq-len", "32", "--max-tokens", "640", "--prompt-tokens", "9", "--new-tokens", "3", "--device", "cpu"]
TASKS_HEADER = ["boolq", "over dense"]


@pytest.fixture
def small_folder(model_folder, make_model, tokenizer, compress_small, tmp_path) -> Path:
    """``model_folder``, compressed to half."""
    model, report = compress_small(make_model("llama-gqa"))
    return lorap.save(model, tmp_path / "small", report=report, tokenizer=tokenizer)


apart = cells.run_worker


@pytest.fixture
def measured(monkeypatch) -> list[str]:
    """What was measured, as ``folder part``; in this process, which is quicker than one for each."""
    calls: list[str] = []

    def in_this_process(request: dict[str, Any]) -> str | None:
        calls.append(f"{Path(request['model']).name} {request['part']}")
        worker.main(json.dumps(request))
        return None

    monkeypatch.setattr(cells, "run_worker", in_this_process)
    return calls


# ----------------------------------------------------------------------------------------------------------------------
# What is measured


def test_numbers_are_those_of_the_commands_for_one_model(model_folder, small_folder, small_text, measured, tmp_path):
    request = [*SIZES, "--text", small_text, "--text", "default/news", "--rounds", 2, "--json", "--quiet"]
    result = run("compare", model_folder, small_folder, *request)
    assert result.exit_code == 0, result.output
    found = last_json(result)["models"]
    assert [one["label"] for one in found] == ["model", "small"]
    for one, folder in zip(found, (model_folder, small_folder), strict=True):
        options = ["--seq-len", 32, "--max-tokens", 640, "--device", "cpu", "--json", "--quiet"]
        alone = last_json(run("eval", folder, "--text", small_text, "--text", "default/news", *options))["results"]
        assert [text["text"] for text in one["texts"]] == ["text.txt", "default/news"]
        assert [text["nats"] for text in one["texts"]] == pytest.approx([text["nats"] for text in alone])
        assert one["params"] == stored_parameters(folder)
        assert one["bytes"] == last_json(run("info", folder, "--json"))["bytes"]
        assert len(one["speeds"]) == 2
        assert one["errors"] == {}
    assert found[1]["params"] < 0.8 * found[0]["params"]
    speed = [f"{name} speed" for name in ("model", "small")]
    assert measured == ["model texts", "small texts", *speed, *speed], "each model once in every round"


def test_gguf_and_int8_beside_the_folder_they_came_from(make_model, tokenizer, measured, tmp_path):
    pytest.importorskip("gguf")
    tokenizer = copy.deepcopy(tokenizer)
    model = make_model("llama-mha", vocab_size=len(tokenizer))
    gguf = lorap.export_gguf(model, tmp_path / "gguf", tokenizer=tokenizer)
    dense, int8 = tmp_path / "dense", tmp_path / "int8"
    for folder, one in ((dense, model), (int8, lorap.quantize(copy.deepcopy(model), "int8"))):
        one.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    found = compare([str(dense), str(gguf), str(int8)], options=_options(rounds=1), work=tmp_path)
    assert [one.errors for one in found] == [{}, {}, {}]
    assert found[1].nats() == pytest.approx(found[0].nats(), abs=1e-5)
    assert 0 < abs(found[2].nats() - found[0].nats()) < 0.1
    assert found[1].params == found[0].params
    assert found[2].bytes < 0.7 * found[0].bytes


def _options(**changes: Any) -> ComparisonOptions:
    usual = {"seq_len": 32, "max_tokens": 320, "prompt_tokens": 9, "new_tokens": 3, "device": "cpu"}
    return ComparisonOptions(**(usual | changes))


def test_tasks_are_paired_with_the_first_model(model_folder, small_folder, measured, tmp_path):
    rows = [
        {
            "doc_id": number,
            "idx": index,
            "label": number % 2,
            "request": {"context": f"Question {number}", "continuation": f" {index}"},
        }
        for number in range(9)
        for index in (0, 1)
    ]
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks/boolq.jsonl.gz").write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    asked = ["--tasks", "boolq", "--limit", 7, "--task-data", tmp_path / "tasks", "--json", "--quiet"]
    result = run("compare", model_folder, small_folder, *SIZES, "--rounds", 1, *asked)
    assert result.exit_code == 0, result.output
    alone = last_json(run("eval", small_folder, *asked, "--baseline", model_folder, "--device", "cpu"))["tasks"][
        "boolq"
    ]
    found = last_json(result)["models"][1]["tasks"]["boolq"]
    assert found["correct"] == alone["correct"]
    difference = alone["difference"]
    assert f"| {100 * difference['mean']:+.1f} ± {100 * difference['stderr']:.1f} |" in result.stderr
    assert "7 questions, evenly spread" in result.stderr


@pytest.mark.parametrize(("option", "called"), [((), True), (("--no-optimize",), False)])
def test_models_are_prepared_as_generate_prepares_them(option, called, model_folder, measured, monkeypatch):
    prepared = []
    monkeypatch.setattr(worker, "optimize_for_inference", prepared.append)
    assert run("compare", model_folder, *SIZES, "--rounds", 1, "--quiet", *option).exit_code == 0
    assert bool(prepared) == called


def test_prefill_and_decoding_are_timed_apart(make_model, monkeypatch):
    model, seen = make_model("llama-gqa"), []
    # The n-th forward pass takes 2 n - 1 seconds.
    monkeypatch.setattr(worker.time, "perf_counter", lambda: len(seen) ** 2)
    model.register_forward_pre_hook(lambda _, __, options: seen.append(options["input_ids"].shape[1]), with_kwargs=True)
    assert worker.time_generation(model, prompt_tokens=11, new_tokens=4) == (1, 24)
    assert seen == [11, 1, 1, 1, 1]


# ----------------------------------------------------------------------------------------------------------------------
# Cells


def test_an_interrupted_comparison_goes_on(model_folder, small_folder, measured, tmp_path):
    (tmp_path / "work").mkdir()
    models = [str(model_folder), str(small_folder)]

    def again(**options: Any) -> list[str]:
        measured.clear()
        compare(models, options=_options(**({"rounds": 2} | options)), work=tmp_path / "work")
        return list(measured)

    both = ["model speed", "small speed"]
    assert again() == ["model texts", "small texts", *both, *both]
    assert again() == []
    next((tmp_path / "work").glob("small-speed2-*.json")).unlink()
    assert again() == both, "a round is one whole"
    assert again(rounds=3) == both
    assert again(new_tokens=4) == [*both, *both]
    assert again(max_tokens=352) == ["model texts", "small texts"]
    assert again(dtype="fp32", rounds=1) == ["model texts", "small texts", *both]
    assert again(dtype="float32", rounds=1) == [], "two spellings of one dtype"
    tensors = load_file(small_folder / WEIGHTS)
    save_file(
        {name: tensor.clone() for name, tensor in tensors.items()}, small_folder / WEIGHTS, metadata={"format": "pt"}
    )
    assert again() == ["small texts", *both, *both], "other files under the same name"


@pytest.mark.slow
def test_what_fails_fails_alone(model_folder, measured, monkeypatch, tmp_path):
    """One model's weights are too large for their dtype; its parts run in processes of their own, as for a user."""
    here = cells.run_worker
    monkeypatch.setattr(cells, "run_worker", lambda request: (apart if "bad" in request["model"] else here)(request))
    bad = tmp_path / "bad"
    bad.mkdir()
    for path in model_folder.iterdir():
        (bad / path.name).write_bytes(path.read_bytes())
    tensors = load_file(bad / WEIGHTS)
    tensors["model.norm.weight"] = torch.full_like(tensors["model.norm.weight"], 3e38)
    save_file(tensors, bad / WEIGHTS, metadata={"format": "pt"})
    ballast = torch.ones(2**28)  # 1 GB here is not the models' memory
    result = run("compare", bad, model_folder, *SIZES, "--rounds", 1, "--quiet", "--json")
    assert result.exit_code == 1
    assert re.search(r"^bad, texts: the loss on heldout is nan: .* overflow$", result.stderr, re.MULTILINE)
    broken, whole = json.loads(result.stdout.splitlines()[-1])["models"]
    assert (broken["texts"], list(broken["errors"])) == ([], ["texts"])
    assert (len(whole["texts"]), whole["errors"]) == (1, {})
    row = next(line for line in result.stderr.splitlines() if line.startswith("| bad"))
    assert re.search(r"float32 \| +- \|", row), "no loss; the other numbers are there"
    assert measured == ["model texts", "model speed"]
    assert 50e6 < broken["peak_bytes"] < 1e9
    assert whole["peak_bytes"] > 50e6
    assert ballast[0] == 1


@pytest.mark.parametrize(
    ("script", "told"),
    [
        ("kill -9 $$", "its process was ended by signal 9, as happens when memory runs out"),
        ("echo first >&2; echo the reason >&2; exit 3", "the reason"),
        ("exit 3", "its process ended with exit code 3"),
        ("exit 0", None),
    ],
)
def test_how_a_process_ended(script, told, monkeypatch, tmp_path):
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)
    monkeypatch.setattr(cells, "sys", SimpleNamespace(executable=str(python)))
    assert cells.run_worker({}) == told


def test_interruption_keeps_what_was_measured(model_folder, monkeypatch, tmp_path):
    def interrupted(_request: dict[str, Any]) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cells, "run_worker", interrupted)
    result = run("compare", model_folder, *SIZES, "--work", tmp_path / "work")
    assert result.exit_code == 130
    assert f"goes on from what is in {tmp_path / 'work'}" in result.stderr
    assert "nothing was written" in run("compare", model_folder, *SIZES).stderr


# ----------------------------------------------------------------------------------------------------------------------
# Mistakes


def test_models_of_other_tokens_are_refused(model_folder, measured, tokenizer, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    for path in model_folder.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    plain = json.loads((other / "tokenizer.json").read_text())
    plain["model"]["merges"] = plain["model"]["merges"][:-50]
    (other / "tokenizer.json").write_text(json.dumps(plain))
    result = run("compare", model_folder, other, *SIZES)
    assert result.exit_code == 2
    assert "other splits heldout into other tokens than model does" in result.stderr
    assert measured == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--limit", "5"], "belong to --tasks"),
        (["--tasks", "chess"], "chess"),
        (["--plot", "picture.pdf"], r"must end with .png or .svg"),
        (["--plot", "nowhere/picture.svg"], "there is no folder nowhere"),
        (["--device", "abacus"], "abacus"),
        (["--text", "nowhere.txt"], "nowhere.txt"),
    ],
)
def test_mistakes_are_told_before_any_work(options, message, model_folder, measured):
    result = run("compare", model_folder, *SIZES, *options)
    assert result.exit_code == 2
    assert re.search(message, result.stderr)
    assert measured == []


def test_a_model_that_is_not_there_or_there_twice(model_folder, measured, tmp_path):
    result = run("compare", model_folder, tmp_path / "nothing")
    assert (result.exit_code, "no model folder" in result.stderr) == (2, True)
    result = run("compare", model_folder, model_folder)
    assert (result.exit_code, "is given twice" in result.stderr) == (2, True)


def test_without_matplotlib_the_extra_is_named(model_folder, measured, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = run("compare", model_folder, "--plot", tmp_path / "picture.svg")
    assert (result.exit_code, "pip install 'lorap[plot]'" in result.stderr) == (2, True)


# ----------------------------------------------------------------------------------------------------------------------
# Tables and pictures


def a_contender(label: str, nats: float, megabytes: int, rates: list[float | None], **more: Any) -> Contender:
    speeds = [
        rate and {DECODE: rate, PREFILL: 10 * rate, "peak_bytes": 7_000_000, "peak_device_bytes": None}
        for rate in rates
    ]
    text = {"text": "wiki", "nats": nats, "perplexity": 2.0, "tokens": 640, "seq_len": 32}
    about = {"dtype": "float32", "device": "cpu", "threads": 2, "torch": "2"}
    source = ModelSource(label, label)
    return Contender(
        label, label, source, 1234, megabytes * 10**6, texts=[text], speeds=speeds, environment=about, **more
    )


@pytest.fixture
def contenders() -> list[Contender]:
    """The machine is half as fast in the second round, in which ``failed`` has no rate."""

    def boolq(answers: str) -> dict[str, TaskResult]:
        right = tuple(answer == "1" for answer in answers)
        return {"boolq": TaskResult("boolq", "acc", {"acc": right}, "prompts", "same")}

    failed = a_contender("failed", 3.5, 50, [50.0, None, 50.0], errors={"tasks": "a reason", "speed": "another"})
    return [
        a_contender("dense", 3.0, 100, [20.0, 10.0, 20.0], tasks=boolq("1100")),
        a_contender("small", 3.25, 80, [30.0, 20.0, 40.0], tasks=boolq("1010")),
        failed,
    ]


def test_rates_are_medians_and_ratios_those_within_a_round(contenders):
    dense, small, failed = contenders
    assert (small.rate(DECODE), small.rate(PREFILL)) == (30, 300)
    assert small.rate_over(dense, DECODE) == 2
    assert small.ratios(dense, DECODE) == [1.5, 2, 2]
    assert small.rate_range(PREFILL) == (200, 400)
    assert failed.rate_over(dense, DECODE) == 2.5
    assert failed.rate_over(a_contender("never", 3, 1, [None] * 3), DECODE) is None
    small.speeds[0] = small.speeds[0] | {"peak_bytes": 9_000_000}
    assert small.peak_bytes() == 9_000_000
    small.speeds[0] = small.speeds[0] | {"peak_device_bytes": 11_000_000}
    assert small.peak_bytes() == 11_000_000


def test_table(contenders):
    lines = render(contenders).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[:5]]
    assert cells[0][:5] == ["model", "parameters", "on disk", "dtype", "wiki: nats (perplexity)"]
    assert cells[0][5:7] == TASKS_HEADER
    assert cells[2] == [
        "dense",
        "1,234",
        "100.0 MB",
        "float32",
        "3.0000 (2.00)",
        "50.0 ± 28.9",
        "-",
        "20.0 (1.00 x)",
        "200.0 (1.00 x)",
        "7.0 MB",
    ]
    assert cells[3][5:8] == ["50.0 ± 28.9", "+0.0 ± 40.8", "30.0 (2.00 x)"]
    assert cells[4][4:8] == ["3.5000 (2.00)", "-", "-", "50.0 (2.50 x)"]
    assert lines[-2:] == ["failed, tasks: a reason", "failed, speed: another"]
    assert "wiki: 640 tokens in windows of 32" in lines
    told = [line for line in lines if "the machine is busy" in line]
    assert [line.split(",")[0] for line in told] == ["speed: small decodes 1.50 to 2.00 x as fast as dense"]


def test_table_of_nothing(contenders):
    bare = [Contender("dense", "dense", ModelSource("dense", "dense"), speeds=[None], errors={"texts": "a reason"})]
    assert "| dense |          - |       - |     - |" in render(bare)


@pytest.mark.parametrize(("name", "begins"), [("picture.svg", b"<?xml"), ("picture.png", b"\x89PNG")])
def test_picture(name, begins, contenders, tmp_path):
    pytest.importorskip("matplotlib")
    contenders[2].texts = []
    assert draw(contenders, tmp_path / name) == ["failed"]
    raw = (tmp_path / name).read_bytes()
    assert raw.startswith(begins)
    if name.endswith("svg"):
        text = raw.decode()
        assert [len(re.findall(f'<g id="{label}"', text)) for label in ("dense", "small", "failed")] == [2, 2, 0]
        assert draw(contenders, tmp_path / "again.svg") == ["failed"]
        assert (tmp_path / "again.svg").read_bytes() == raw, "the same bytes each time"


def test_points_lie_where_their_numbers_say(contenders, monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    from matplotlib.axes import Axes

    points = []
    plot = Axes.plot
    monkeypatch.setattr(
        Axes, "plot", lambda axis, x, y, **style: (points.append((style["gid"], x, y)), plot(axis, x, y, **style))[1]
    )
    draw(contenders[:2], tmp_path / "picture.png")
    assert points == [("dense", 100, 3.0), ("small", 80, 3.25), ("dense", 20, 3.0), ("small", 30, 3.25)]
