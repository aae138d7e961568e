"""The speed table: every contender is measured in every round, and ratios are taken within a round."""

from __future__ import annotations

import importlib
import itertools
import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from lorap.checkpoint.hf_quantizer import weights_of
from lorap.checkpoint.validate import check_folder

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def inference(monkeypatch):
    """benchmarks/inference.py as a module."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    yield importlib.import_module("inference")
    for name in ("inference", "random_models", "common"):
        sys.modules.pop(name, None)


@pytest.fixture
def tiny(inference):
    return inference.QUICK["tiny"]


@pytest.fixture
def rows(inference, tiny, monkeypatch):
    """Rates of three rounds after the warm-up; the machine is half as fast in the second."""
    turn = itertools.count()
    fast = [1, 2, 2, 3, 3, 6]

    def rate(_model, _new_tokens):
        count, contender = divmod(next(turn), len(fast))
        return fast[contender] * (0.5 if count == 2 else 1.0)

    monkeypatch.setattr(inference, "decode_rate", rate)
    monkeypatch.setattr(
        inference, "peak_memory", lambda _size, name, _new: 1000 * (1 + list(inference.CONTENDERS).index(name))
    )
    return inference.measure(tiny, rounds=3, new_tokens=4, label="tiny")


def test_ratios_are_those_within_a_round(rows, inference):
    assert [row["contender"] for row in rows] == list(inference.CONTENDERS)
    assert [row["against_torch"] for row in rows] == [1, 2, 2, 3, 3, 6]
    assert [row["against_dense_lorap"] for row in rows] == [0.5, 1, 1, 1.5, 1.5, 3]
    assert rows[-1]["rounds"] == [6, 3, 6]
    assert [row["tokens_per_second"] for row in rows] == [1, 2, 2, 3, 3, 6]
    assert [row["peak_bytes"] for row in rows] == [1000 * count for count in range(1, 7)]


def test_contenders_of_one_sparsity_have_the_parameters_that_it_leaves(rows, inference, tiny):
    params = [row["params"] for row in rows]
    assert params[0] == params[1] > params[2] == params[3] > params[4] == params[5]
    dense, half = (inference.build(tiny, name) for name in (inference.PLAIN, "sparsity 0.5, as loaded"))
    projections = [sum(p.numel() for name, p in model.named_parameters() if "_proj" in name) for model in (dense, half)]
    assert projections[1] / projections[0] == pytest.approx(0.5, abs=0.02)


def test_a_rate_counts_tokens_after_the_first(inference, tiny, monkeypatch):
    times = itertools.count(step=0.25)
    monkeypatch.setattr(inference.time, "perf_counter", lambda: next(times))
    model = inference.build(tiny, inference.OURS)
    assert inference.decode_rate(model, 5) == 4.0
    ticks = itertools.count(step=0.5)
    assert inference.decode_rate(model, 4, sequences=3, prompt=2, now=lambda: next(ticks)) == 6.0
    assert model.dtype == torch.bfloat16


def test_table_and_json(rows, inference, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(inference, "measure", lambda *_arguments, **_options: rows)
    monkeypatch.setattr(sys, "argv", ["inference.py", "--quick", "--rounds", "3", "--out", str(tmp_path / "out")])
    inference.main()
    lines = (tmp_path / "out/inference-transformers.md").read_text("utf-8").splitlines()
    assert lines == capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 6
    assert lines[-1].startswith("| tiny | sparsity 0.5, optimized | ")
    assert " 6.0 | 6.00 | 3.00 | 0 MB |" in lines[-1]
    found = json.loads((tmp_path / "out/inference-transformers.json").read_text("utf-8"))
    assert found["rows"] == rows
    assert (found["environment"]["host"], found["environment"]["rounds"]) == ("transformers", 3)


def test_a_table_of_steps_compares_within_a_round(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    step = pytest.importorskip("inference_step", reason="llama.cpp is not installed", exc_type=ImportError)
    of_all = {"model": "tiny", "type": "int4", "sequences": 8, "weight_bytes": 2e6, "against_llama_cpp": 2.0}
    rates = {step.PEER: [1.0, 2.0, 4.0], "lorap, dense": [1.0, 4.0, 12.0]}
    rows = [of_all | {"contender": name, "tokens_per_second": 4.0, "rounds": own} for name, own in rates.items()]
    peer, ours = step.table(rows).splitlines()[2:]
    assert peer == "| tiny | 8 | Q4_0 | llama.cpp, dense | 2 | 4.0 | 2.00 |"
    assert ours == "| tiny | 8 | int4 | lorap, dense | 2 | 4.0 | 2.00 (1.50 to 2.50) |"


@pytest.fixture
def vllm_benchmark(monkeypatch):
    """benchmarks/inference_vllm.py, whose engines are never started: the 1 + sparsity of each is its rate, times its bits."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    module = importlib.import_module("inference_vllm")
    speeds = {"bf16": 1.0, "int4": 4.0}
    turns = itertools.count()

    class Engine:
        def __init__(self, folder: Path) -> None:
            _, sparsity, weights = folder.name.rsplit("-", 2)
            self.rate, self.config = (
                speeds[weights] * (1 + float(sparsity)),
                json.loads((folder / "config.json").read_text()),
            )

        def communicate(self) -> None:
            """As of a process that ends."""

    def ask(engine: Engine) -> dict[str, float]:
        rate = engine.rate * (0.5 if next(turns) // 4 == 2 else 1.0)  # the machine is half as fast in the second round
        return {"prefill_512": rate, "decode_1": rate, "decode_8": 10 * rate, "peak_bytes": 1e6 * engine.rate}

    monkeypatch.setattr(
        module,
        "saved",
        lambda label, sparsity, weights, folder: module.save_model(module.QUICK[label], sparsity, weights, folder),
    )
    monkeypatch.setattr(module, "version", lambda name: "1")
    monkeypatch.setattr(module, "start", Engine)
    monkeypatch.setattr(module, "ask", ask)
    yield module
    for name in ("inference_vllm", "random_models"):
        sys.modules.pop(name, None)


def test_vllm_in_few_bits_is_compared_with_the_dense_model_in_bfloat16(vllm_benchmark, tmp_path):
    rows = vllm_benchmark.measure("tiny", vllm_benchmark.QUICK["tiny"], "int4", 3, tmp_path)
    assert [(row["weights"], row["sparsity"]) for row in rows] == [("int4", 0.0), ("int4", 0.2), ("int4", 0.5)]
    assert [row["against_dense"]["decode_8"] for row in rows] == pytest.approx([4.0, 4.8, 6.0])
    assert [row["tokens_per_second"]["decode_8"] for row in rows] == pytest.approx([40, 48, 60])
    assert [one["decode_1"] for one in rows[2]["rounds"]] == pytest.approx([6, 3, 6])
    assert rows[0]["params"] > rows[1]["params"] > rows[2]["params"]
    last = vllm_benchmark.table(rows).splitlines()[-1]
    assert last.startswith("| tiny | int4 | 0.5 | 0 M | 0 | 6.0 (6.00 x) | 60.0 (6.00 x) | 6.0 (6.00 x) | 6 MB |")


@pytest.mark.parametrize(("weights", "bits"), [("bf16", 16), ("int8", 8), ("int4", 4), ("tcq4", 4), ("tcq3", 3)])
def test_models_for_vllm_open_and_have_so_many_bits(vllm_benchmark, tmp_path, weights, bits):
    size = vllm_benchmark.QUICK["tiny"]
    made = vllm_benchmark.save_model(size, 0.5, weights, tmp_path)
    check_folder(tmp_path)  # as the plug-in does
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert weights_of(model) == weights.replace("bf16", "float")
    assert bool(torch.isfinite(model(torch.arange(63)[None]).logits).all())
    embedding = size.vocab_size * 128  # in 16 bits
    stored_in = 8 * (made["weight_bytes"] - 2 * embedding) / (made["params"] - embedding)
    assert bits <= stored_in < 1.2 * bits + 0.6  # scales, ends of rows and of tiles
    assert model.config.num_hidden_layers == size.layers


def test_vllm_rows_of_other_storages_stay(vllm_benchmark, monkeypatch, tmp_path):
    for weights in ("int4", "bf16", "int4"):
        monkeypatch.setattr(
            sys, "argv", ["inference_vllm.py", "--quick", "--weights", weights, "--rounds", "1", "--out", str(tmp_path)]
        )
        vllm_benchmark.main()
    found = json.loads((tmp_path / "inference-vllm.json").read_text("utf-8"))
    assert [(row["weights"], row["sparsity"]) for row in found["rows"]] == [
        (weights, sparsity) for weights in ("bf16", "int4") for sparsity in (0.0, 0.2, 0.5)
    ]
    assert len((tmp_path / "inference-vllm.md").read_text("utf-8").splitlines()) == 2 + 6
    assert found["environment"]["rounds"] == 1


@pytest.mark.slow
def test_peak_memory_is_that_of_a_process_of_its_own(inference, tiny):
    ballast = torch.ones(2**28)  # 1 GB here must not count there
    found = inference.peak_memory(tiny, inference.OURS, 3)
    assert 100e6 < found < 1e9 < inference.peak_memory_bytes()
    assert ballast[0] == 1


def test_what_is_measured_is_said_and_a_fallback_is_not_measured(inference, monkeypatch):
    common = inference.common
    monkeypatch.setattr(common, "DEVICE", torch.device("cpu"))
    monkeypatch.setattr(common.native, "MISSING", None)
    assert str(ROOT / "lorap") in common.measured()
    monkeypatch.setattr(common.native, "MISSING", "not built; do this")
    with pytest.raises(common.BackendError, match=r"nothing to measure.*not built; do this"):
        common.measured()
    with common.dispatch.use("reference"):
        assert "torch alone" in common.measured()
