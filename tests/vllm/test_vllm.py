"""vLLM serves compressed checkpoints: the greedy tokens of transformers, a server, and loud failures.

The checkpoints are real (SmolLM2-135M at sparsity 0.5, by two recipes) and made by hand: small models of each family with ranks,
dense projections and FFN widths that differ between layers.
"""

from __future__ import annotations

import copy
import json
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from vllm_host import ENVIRONMENT, HERE, ROOT, SMALL, SMOLLM, WHOLE, WIKI, check_greedy, run_vllm, shrink, vllm_says

import lorap
from lorap.checkpoint.load import find_model, load_model, load_tokenizer
from lorap.integrations.vllm_projection import Projection, Share

httpx = pytest.importorskip("httpx")  # comes with vLLM


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints


@pytest.fixture(scope="module")
def small(make_model, tmp_path_factory) -> dict[str, Path]:
    """Small models of every family, by name."""
    folder = tmp_path_factory.mktemp("small")
    return {
        "llama": shrink(make_model("llama-biases", **SMALL), folder / "llama", storage="pivoted"),
        "mistral": shrink(make_model("mistral", **SMALL), folder / "mistral", storage="pivoted", biases=True),
        "qwen2": shrink(make_model("qwen2", **{k: v for k, v in SMALL.items() if k != "head_dim"}), folder / "qwen2"),
        "qwen3": shrink(make_model("qwen3", **SMALL), folder / "qwen3", storage="pivoted"),
        "smollm3": shrink(make_model("smollm3", **SMALL), folder / "smollm3"),
    }


@pytest.fixture(scope="module")
def small_prompts(tokens) -> list[list[int]]:
    """Seven real texts in the tokens of the small models."""
    return [row[: 5 + 3 * index].tolist() for index, row in enumerate(tokens[:7])]


@pytest.fixture(scope="module")
def real(tmp_path_factory) -> dict[str, Path]:
    """SmolLM2-135M at sparsity 0.5: by the paper, and pivoted, in the norm of `best`, on few windows."""
    subprocess.run([sys.executable, str(ROOT / "benchmarks" / "assets.py")], check=True, stdout=subprocess.DEVNULL)
    quick = {"allocation": "paper", "output_weighting": "none", "token_weighting": "none", "repair": False}
    recipes = {"paper": {"recipe": "lorap"}, "best": {"recipe": "best", "sequential": "layer"} | quick}
    dense, tokenizer = load_model(find_model(str(SMOLLM))), load_tokenizer(find_model(str(SMOLLM)))
    tokens = torch.tensor(tokenizer(WIKI.read_text("utf-8")[:10_000])["input_ids"][: 16 * 64]).view(16, 64)
    folder, found = tmp_path_factory.mktemp("real"), {}
    for name, choices in recipes.items():
        config = lorap.CompressionConfig(sparsity=0.5, num_calibration_samples=16, calibration_seq_len=64, **choices)
        model, report = lorap.compress(copy.deepcopy(dense), calibration=tokens, config=config, progress=False)
        found[name] = lorap.save(model, folder / name, report=report, tokenizer=tokenizer)
    return found


@pytest.fixture(scope="module")
def real_prompts(real) -> list[list[int]]:
    """Twenty passages of an encyclopedia, 8 to 65 tokens."""
    tokenizer = AutoTokenizer.from_pretrained(real["paper"])
    text = WIKI.read_text("utf-8")
    return [
        tokenizer(text[start : start + 400])["input_ids"][: 8 + 3 * n] for n, start in enumerate(range(0, 60_000, 3000))
    ]


# ----------------------------------------------------------------------------------------------------------------------
# The same tokens


def test_real_model_says_what_transformers_says(real, real_prompts):
    assert len(real_prompts) == 20
    settings = json.loads((real["best"] / "config.json").read_text())["quantization_config"]
    assert settings["storage"] == "pivoted"
    answers = vllm_says([{"folder": folder, "prompts": real_prompts} for folder in real.values()])
    for folder, answer in zip(real.values(), answers, strict=True):
        check_greedy(folder, real_prompts, answer)


def test_every_family_with_layers_of_their_own_shapes(small, small_prompts):
    answers = vllm_says([{"folder": folder, "prompts": small_prompts} for folder in small.values()])
    for folder, answer in zip(small.values(), answers, strict=True):
        check_greedy(folder, small_prompts, answer)


def test_compiled_and_with_two_tensor_parallel_workers(small, small_prompts):
    compiled = {"enforce_eager": False}
    shared = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
    jobs = [{"folder": small["qwen3"], "prompts": small_prompts, "options": compiled}]
    jobs += [{"folder": small[name], "prompts": small_prompts, "options": shared} for name in ("llama", "mistral")]
    answers = vllm_says(jobs, VLLM_CPU_OMP_THREADS_BIND="0|1")
    for job, answer in zip(jobs, answers, strict=True):
        check_greedy(job["folder"], small_prompts, answer)


# ----------------------------------------------------------------------------------------------------------------------
# The server


@pytest.fixture
def server(real, tmp_path) -> Iterator[str]:
    """Address of `vllm serve`, as a user starts it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(HERE / "serve.py"), "serve", str(real["best"]), "--port", str(port)]
    command += ["--dtype", "float32", "--enforce-eager", "--max-model-len", "256", "--gpu-memory-utilization", "0.2"]
    log = tmp_path / "log"
    with log.open("w") as file:
        process = subprocess.Popen(command, env=ENVIRONMENT, stdout=file, stderr=subprocess.STDOUT)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(1200):  # it takes seconds, and minutes beside other work
            time.sleep(1)
            assert process.poll() is None, log.read_text()[-5000:]
            try:
                if httpx.get(f"{address}/health").status_code == 200:
                    break
            except httpx.TransportError:
                continue
        else:
            raise AssertionError(log.read_text()[-5000:])
        yield address
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:  # it is busy starting
            process.kill()
            process.wait()


def stream(address: str, folder: Path, prompt: list[int], times: list[float]) -> str:
    """One streamed completion; when each piece came is added to ``times``."""
    request = {"model": str(folder), "prompt": prompt, "max_tokens": 24, "temperature": 0, "stream": True}
    pieces = []
    with httpx.stream("POST", f"{address}/v1/completions", json=request, timeout=300) as response:
        assert response.status_code == 200, response.read()
        for line in response.iter_lines():
            if line.startswith("data: {"):
                times.append(time.monotonic())
                pieces.append(json.loads(line.removeprefix("data: "))["choices"][0]["text"])
    return "".join(pieces)


def test_server_streams_to_eight_clients_at_once(server, real, real_prompts):
    prompts, clients = real_prompts[:8], []
    texts, times = [""] * 8, [[] for _ in range(8)]
    together = threading.Barrier(8)

    def client(index: int) -> None:
        together.wait()
        texts[index] = stream(server, real["best"], prompts[index], times[index])

    for index in range(8):
        clients.append(threading.Thread(target=client, args=(index,)))
        clients[-1].start()
    for thread in clients:
        thread.join()
    tokenizer = AutoTokenizer.from_pretrained(real["best"])
    model = AutoModelForCausalLM.from_pretrained(real["best"], dtype=torch.float32)
    for prompt, text in zip(prompts, texts, strict=True):
        ids = torch.tensor([prompt])
        said = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False, pad_token_id=0
        )
        assert text == tokenizer.decode(said[0, len(prompt) :], skip_special_tokens=True)
    assert all(len(found) > 12 for found in times), "not streamed"
    open_streams = [sum(other[0] <= found[0] <= other[-1] for other in times) for found in times]
    assert max(open_streams) >= 4, "one after the other"


# ----------------------------------------------------------------------------------------------------------------------
# Failures


def damaged(folder: Path, copy_to: Path, drop: str = "", reshape: str = "", **settings: Any) -> Path:
    """A copy with other fields in quantization_config, without one tensor, or with one cut short."""
    shutil.copytree(folder, copy_to)
    config = json.loads((copy_to / "config.json").read_text())
    config["quantization_config"] |= settings
    (copy_to / "config.json").write_text(json.dumps(config))
    tensors = load_file(copy_to / "model.safetensors")
    if drop:
        del tensors[drop]
    if reshape:
        tensors[reshape] = tensors[reshape][:-1].clone()
    save_file(tensors, copy_to / "model.safetensors", metadata={"format": "pt"})
    return copy_to


def test_a_checkpoint_that_cannot_be_served_is_refused(small, small_prompts, tmp_path):
    q_proj = "model.layers.0.self_attn.q_proj"
    good, int8 = small["qwen2"], {"format_version": 3, "weights": "int8"}
    cases = [
        (damaged(good, tmp_path / "newer", format_version=99), "has format version 99"),
        (damaged(good, tmp_path / "int8", **int8), "has the shape (41, 128), but config.json makes it (1,)"),
        (damaged(good, tmp_path / "field", surprise=1), "quantization_config.surprise is an unknown entry"),
        (damaged(good, tmp_path / "left", drop=f"{q_proj}.left.weight"), f"first {q_proj}.left.weight"),
        (damaged(good, tmp_path / "norm", drop="model.norm.weight"), "first model.norm.weight"),
        (damaged(good, tmp_path / "rank", reshape=f"{q_proj}.right.weight"), "has the shape (40, 128)"),
        (good, None),
    ]
    answers = vllm_says([{"folder": folder, "prompts": small_prompts} for folder, _ in cases])
    for (folder, message), answer in zip(cases, answers, strict=True):
        if message is None:
            check_greedy(folder, small_prompts, answer)
        else:
            assert message in answer["error"], answer


def test_without_the_plugin_only_exported_folders_open(real, real_prompts, small, small_prompts, tmp_path):
    stock = lorap.export_stock(AutoModelForCausalLM.from_pretrained(real["paper"]), tmp_path / "stock")
    jobs = [{"folder": small["qwen2"], "prompts": small_prompts}, {"folder": stock, "prompts": real_prompts[:5]}]
    refused, answers = vllm_says(jobs, VLLM_PLUGINS="")
    assert "Unknown quantization method: lorap" in refused["error"]
    check_greedy(stock, real_prompts[:5], answers)


def test_a_width_per_layer_needs_no_plugin(small, small_prompts, make_model, tmp_path):
    """Folders of DeciLMForCausalLM, with a config class that vLLM runs if it may."""
    windowless = make_model("mistral", **SMALL | {"sliding_window": None})
    sources = {
        "llama": small["llama"],
        "qwen2": small["qwen2"],
        "mistral": shrink(windowless, tmp_path / "small", biases=True),
        # Widths that are multiples of 256 have another field.
        "whole": shrink(
            make_model("llama-gqa", **SMALL | {"intermediate_size": 512}), tmp_path / "whole", shapes=WHOLE
        ),
    }
    trusted, jobs = {"trust_remote_code": True}, []
    for name, source in sources.items():
        folder = lorap.export_deci(AutoModelForCausalLM.from_pretrained(source), tmp_path / f"deci-{name}")
        jobs.append({"folder": folder, "prompts": small_prompts, "options": trusted})
    blocks = [json.loads((job["folder"] / "config.json").read_text())["block_configs"] for job in jobs]
    assert [block["ffn"].get("intermediate_size") for block in blocks[0]] == [67, 100, 90]
    assert all("ffn_mult" in block["ffn"] for block in blocks[-1])
    *answers, refused = vllm_says([*jobs, jobs[0] | {"options": {}}], VLLM_PLUGINS="")
    assert "trust_remote_code" in refused["error"]
    for source, answer in zip(sources.values(), answers, strict=True):
        check_greedy(source, small_prompts, answer)


def test_a_width_that_the_workers_do_not_divide_is_refused(make_model, small_prompts, tmp_path):
    model = make_model("qwen3", **SMALL, intermediate_size=67)
    folder = shrink(model, tmp_path / "odd", shapes=[({"q_proj": 41}, None)])
    options = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
    jobs = [{"folder": folder, "prompts": small_prompts, "options": options}]
    (answer,), log = run_vllm(jobs, VLLM_CPU_OMP_THREADS_BIND="0|1")
    assert "error" in answer
    assert "intermediate_size in config.json is 67, which vLLM cannot share out among 2 tensor-parallel workers" in log


# ----------------------------------------------------------------------------------------------------------------------
# One projection on several workers


def tensors_of(pivoted: bool | None) -> dict[str, torch.Tensor]:
    """A projection of 9 inputs and 7 outputs as the checkpoint holds it: dense where ``pivoted`` is None, else of rank 3."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *size: torch.randn(*size, generator=generator)  # noqa: E731
    if pivoted is None:
        return {"weight": draw(7, 9), "bias": draw(7)}
    if pivoted:
        rows = torch.tensor([1, 2, 5])
        return {"right.weight": draw(3, 9), "left.weight": draw(4, 3), "pivot_rows": rows, "output_bias": draw(7)}
    return {"right.weight": draw(3, 9), "left.weight": draw(7, 3), "left.bias": draw(7), "weight": torch.ones(1)}


def projection(pivoted: bool | None, rows: Any, columns: Any, tensors: dict[str, torch.Tensor]) -> Any:
    rank = None if pivoted is None else 3
    part = Projection("q", rank, bool(pivoted), rows, columns, True, torch.float32)
    for key, tensor in tensors.items():
        part.load(key, tensor)
    part.finish()
    return part


@pytest.mark.parametrize("pivoted", [None, False, True])
def test_workers_together_are_the_whole_projection(pivoted):
    tensors, x = tensors_of(pivoted), torch.randn(5, 9)
    all_rows, all_columns = Share.of(7, 0, 1), Share.of(9, 0, 1)
    whole = projection(pivoted, all_rows, all_columns, tensors)
    shares = [Share.of(7, part, 3) for part in range(3)]
    assert [share.length for share in shares] == [2, 2, 3]
    by_rows = [projection(pivoted, share, all_columns, tensors) for share in shares]
    torch.testing.assert_close(torch.cat([part(x) + part.bias for part in by_rows], 1), whole(x) + whole.bias)
    shares = [Share.of(9, part, 2) for part in range(2)]
    by_columns = [projection(pivoted, all_rows, share, tensors) for share in shares]
    summed = sum(part(x[:, share.start : share.stop]) for part, share in zip(by_columns, shares, strict=True))
    torch.testing.assert_close(summed, whole(x))


@pytest.mark.parametrize("pivoted", [None, False, True])
def test_what_is_missing_or_unannounced_stops_the_load(pivoted):
    tensors, whole = tensors_of(pivoted), (Share.of(7, 0, 1), Share.of(9, 0, 1))
    for key in tensors.keys() - ({"weight"} if pivoted is False else set()):
        with pytest.raises(lorap.CheckpointError, match=f"q.{key} is missing"):
            projection(pivoted, *whole, {name: tensor for name, tensor in tensors.items() if name != key})
        with pytest.raises(lorap.CheckpointError, match=f"q.{key} has shape"):
            projection(pivoted, *whole, tensors | {key: tensors[key][:-1]})
    with pytest.raises(lorap.CheckpointError, match="does not announce"):
        projection(pivoted, *whole, tensors | {"lora_A": torch.ones(1)})
