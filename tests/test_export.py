"""Exported folders open where lorap is not, and compute what the compressed model computed.

The host without lorap is a process of its own, in which importing lorap fails.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from commands import run
from conftest import FAMILIES
from transformers import AutoModelForCausalLM, AutoTokenizer

import lorap
from lorap.checkpoint import write
from lorap.checkpoint.folders import read_tensors
from lorap.checkpoint.format import LoRAPConfig
from lorap.checkpoint.hf_quantizer import attach_quantization_config
from lorap.checkpoint.load import find_model
from lorap.cli.export import savings
from lorap.evaluation.info import describe_model, format_info
from lorap.integrations.llamacpp import overflow_warning, width_cost
from lorap.integrations.stock import make_stock
from lorap.nn.linear import new_linear

# One process for all tests: starting it takes longer than they do. It is given a folder a line, and says what it made of it.
STOCK_HOST = """
import sys
sys.modules["lorap"] = None  # importing it raises from here on
import torch
from transformers import AutoModelForCausalLM
tokens = torch.load("tokens.pt")
for line in sys.stdin:
    folder = line.strip()
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    with torch.no_grad():
        torch.save(model.eval()(tokens).logits, "logits.pt")
    try:
        import lorap
    except ImportError:
        print(type(model).__name__, "without lorap", flush=True)
"""


@pytest.fixture(scope="module")
def stock_host(tokens, tmp_path_factory):
    """``stock_host(folder)``: class and logits of what a process without lorap makes of the folder."""
    place = tmp_path_factory.mktemp("host")
    torch.save(tokens, place / "tokens.pt")
    errors = (place / "errors").open("w+")
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": errors}
    with subprocess.Popen([sys.executable, "-c", STOCK_HOST], cwd=place, text=True, **pipes) as process:

        def run(folder: Path) -> tuple[str, torch.Tensor]:
            process.stdin.write(f"{folder}\n")
            process.stdin.flush()
            answer = process.stdout.readline().split(maxsplit=1)
            assert answer[1:] == ["without lorap\n"], (place / "errors").read_text()
            assert "quantization" not in (place / "errors").read_text()
            return answer[0], torch.load(place / "logits.pt")

        yield run
        process.stdin.close()
    errors.close()


@torch.no_grad()
def logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    return model(tokens).logits


def assert_close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * float(expected.abs().max()))


@pytest.mark.parametrize("storage", ["factors", "pivoted"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_host_without_lorap_gets_the_same_logits(
    family: str, storage: str, make_model, compress_small, tokenizer, tokens, stock_host, tmp_path
) -> None:
    model, _ = compress_small(make_model(family), storage=storage)
    expected = logits(model, tokens)
    out = lorap.export_stock(model, tmp_path / "plain", tokenizer=tokenizer)
    config = json.loads((out / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["intermediate_size"] == 50
    assert not [name for name in read_tensors(out) if "left" in name or "right" in name or "pivot" in name]
    name, found = stock_host(out)
    assert name == type(model).__name__ == config["architectures"][0]
    assert_close(found, expected)


# --- per-layer widths ------------------------------------------------------------------------------------------------------


@pytest.fixture
def free(make_model, compress_small):
    """A model whose two FFNs have different widths, with low-rank attention."""
    model, _ = compress_small(make_model("llama-biases"), recipe="best", sparsity=0.4)
    widths = [layer.mlp.down_proj.in_features for layer in model.model.layers]
    assert widths[0] != widths[1]
    return model, widths


def test_widths_of_their_own_are_refused_with_the_ways_out(free, tmp_path) -> None:
    model, widths = free
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(lorap.ArchitectureError) as error:
        lorap.export_stock(model, tmp_path / "plain")
    low, high = sorted(widths)
    assert f"FFN widths run from {low} to {high}, and a stock LlamaForCausalLM has one for all layers" in str(
        error.value
    )
    assert f"--pad-widths: {3 * 64 * (high - low):,} more parameters" in str(error.value)
    assert "--target stock" in str(error.value)
    assert not (tmp_path / "plain").exists()
    assert model.state_dict().keys() == before.keys()


def test_padded_widths_compute_the_same(free, tokens, stock_host, tmp_path) -> None:
    """Biases too: silu(0) * 0 is 0 for a channel of zeros."""
    model, widths = free
    expected = logits(model, tokens)
    out = lorap.export_stock(model, tmp_path / "plain", pad_widths=True)
    shapes = {name: info.shape for name, info in read_tensors(out).items()}
    for layer in (0, 1):
        assert shapes[f"model.layers.{layer}.mlp.down_proj.weight"] == (64, max(widths))
        assert shapes[f"model.layers.{layer}.mlp.gate_proj.bias"] == (max(widths),)
    narrow = model.model.layers[widths.index(min(widths))].mlp
    assert not narrow.up_proj.weight[min(widths) :].any()
    assert not narrow.down_proj.weight[:, min(widths) :].any()
    assert narrow.gate_proj.weight[: min(widths)].any(dim=1).all()
    assert narrow.intermediate_size == max(widths)
    assert_close(stock_host(out)[1], expected)


# --- added biases ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama-gqa", "smollm3"])
def test_added_biases_become_those_of_the_class(
    family, make_model, compress_small, tokens, stock_host, tmp_path
) -> None:
    options = {"sublayers": ("mlp",), "allocation": "even", "bias_compensation": True}
    model, _ = compress_small(make_model(family), **options)
    bias = model.model.layers[0].mlp.down_proj.bias.detach().clone()
    assert bias.abs().max() > 0
    expected = logits(model, tokens)
    out = lorap.export_stock(model, tmp_path / "plain")
    config = json.loads((out / "config.json").read_text())
    assert (config["mlp_bias"], config["attention_bias"]) == (True, False)
    mlp = model.model.layers[0].mlp
    assert torch.equal(mlp.down_proj.bias, bias)
    assert not mlp.gate_proj.bias.any()
    assert not mlp.up_proj.bias.any()
    assert_close(stock_host(out)[1], expected)


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3"])
def test_added_biases_without_a_place_are_refused(family, make_model, compress_small, tmp_path) -> None:
    options = {"sublayers": ("mlp",), "allocation": "even", "bias_compensation": True}
    model, _ = compress_small(make_model(family), **options)
    with pytest.raises(lorap.ArchitectureError) as error:
        lorap.export_stock(model, tmp_path / "plain")
    assert f"down_proj have gained biases, and a stock {type(model).__name__} has no place for them" in str(error.value)
    assert "--no-bias-compensation" in str(error.value)
    assert not (tmp_path / "plain").exists()


def test_flap_s_widths_and_biases_together(make_model, compress_small, tokens, stock_host, tmp_path) -> None:
    model, _ = compress_small(make_model("llama-mha"), recipe="flap", sparsity=0.3)
    expected = logits(model, tokens)
    assert_close(stock_host(lorap.export_stock(model, tmp_path / "plain", pad_widths=True))[1], expected)


def test_what_the_class_cannot_hold_is_named(make_model, tmp_path) -> None:
    model = make_model("llama-gqa")
    model.model.layers[1].self_attn.extra = torch.nn.Linear(3, 5, bias=False)
    message = (
        r"a stock LlamaForCausalLM cannot hold this model: 1 tensors differ, first model\.layers\.1\.self_attn\.extra"
    )
    with pytest.raises(lorap.ArchitectureError, match=message):
        make_stock(model)
    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=11))
    with pytest.raises(lorap.ArchitectureError, match="cannot export model type 'gpt2'; known: llama, mistral"):
        make_stock(gpt2)


# --- the command -----------------------------------------------------------------------------------------------------------

CALIBRATION = ["--num-calibration-samples", 8, "--calibration-seq-len", 32, "--eval-text", "none"]
QUIET = ["--device", "cpu", "--quiet"]


@pytest.fixture
def small_folder(model_folder, small_text, tmp_path) -> Path:
    out = tmp_path / "small"
    options = ["--recipe", "lorap", "--sparsity", 0.5, "--calibration", small_text]
    result = run("compress", model_folder, out, *options, *CALIBRATION, *QUIET)
    assert result.exit_code == 0, result.output
    return out


def test_command(small_folder, tokens, stock_host, tmp_path) -> None:
    """Tokenizer, generation config and model card go along, in the dtype that was asked for."""
    (small_folder / "generation_config.json").write_text('{"temperature": 0.7, "do_sample": true, "eos_token_id": 0}')
    plain = tmp_path / "plain"
    result = run("export", small_folder, plain, "--format", "stock", "--dtype", "bfloat16", "--quiet", "--json")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    saved = read_tensors(plain)
    assert told["params"] == sum(info.numel for info in saved.values())
    compressed = read_tensors(small_folder)
    assert told["params_compressed"] == sum(info.numel for info in compressed.values() if info.is_parameter)
    assert (told["class"], told["intermediate_size"], told["out"]) == ("LlamaForCausalLM", 50, str(plain))
    assert {info.dtype for info in saved.values()} == {"BF16"}
    assert AutoTokenizer.from_pretrained(plain)("The capital")["input_ids"]
    assert transformers.GenerationConfig.from_pretrained(plain).temperature == 0.7
    card = (plain / "README.md").read_text("utf-8")
    assert "import lorap" not in card
    assert f"the model has {told['params']:,} parameters, in place of {told['params_compressed']:,} in the" in card
    assert "Recipe: **lorap**" in card
    expected = logits(AutoModelForCausalLM.from_pretrained(small_folder, dtype=torch.bfloat16), tokens).float()
    assert_close(stock_host(plain)[1].float(), expected, 0.1)


@pytest.mark.parametrize("format", ["stock", "gguf", "deci"])
def test_a_card_in_another_encoding_is_no_obstacle(format, small_folder, tmp_path) -> None:
    (small_folder / "README.md").write_bytes(b"# caf\xe9\n")
    result = run("export", small_folder, tmp_path / "out", "--format", format, "--quiet", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["class"] == ("DeciLMForCausalLM" if format == "deci" else "LlamaForCausalLM")
    assert (tmp_path / "out" / "README.md").read_text("utf-8")


def test_a_failed_export_leaves_nothing(small_folder, tmp_path, monkeypatch) -> None:
    def fail(*_arguments: Any, **_options: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(write, "write_tensors", fail)
    result = run("export", small_folder, tmp_path / "plain", "--quiet")
    assert result.exit_code == 2
    assert "the disk is full or a quota is reached" in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "small", "text.txt"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["plain", "--format", "onnx"], "unknown format 'onnx'; choose from stock, gguf, deci"),
        (["plain", "--format", "gguf", "--quantize", ""], "unknown type '' to quantize to; llama.cpp has Q4_0"),
        (["plain", "--quantize", ""], "add --format gguf"),
        (["small"], "overlaps the source model"),
        (["small/inside"], "overlaps the source model"),
        (["model"], "is not empty; choose a new folder or pass --overwrite"),
    ],
)
def test_mistakes_end_in_one_sentence(options, message, small_folder, tmp_path) -> None:
    result = run("export", small_folder, tmp_path / options[0], *options[1:], "--quiet")
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.output


# --- compress --target stock -----------------------------------------------------------------------------------------------


def test_an_export_says_first_what_it_saves(make_model, compress_small, tokenizer, tmp_path) -> None:
    make_model("llama-gqa").save_pretrained(tmp_path / "dense")
    dense = sum(info.numel for info in read_tensors(tmp_path / "dense").values())
    model, report = compress_small(make_model("llama-gqa"))
    lorap.save(model, tmp_path / "small", report=report, tokenizer=tokenizer)
    small = sum(info.numel for info in read_tensors(tmp_path / "small").values() if info.is_parameter)
    result = run("export", tmp_path / "small", tmp_path / "plain")
    saved = sum(info.numel for info in read_tensors(tmp_path / "plain").values())
    first = result.stdout.splitlines()[0]
    assert first.startswith(f"{dense:,} parameters dense, {small:,} compressed, {saved:,} exported")
    assert f"{1 - saved / dense:.1%} less" in first
    assert "next:" in result.stdout
    for more, words in ((0, "as large as the dense model"), (64, "larger than the dense model")):
        line = savings(dense, small, dense + more)
        assert words in line
        assert "--target stock" in line
    assert "--target stock" not in savings(dense, small, small)
    assert "nothing in this folder says what it was compressed from" in savings(dense, dense, dense)
    assert f"{small:,} parameters compressed" in savings(None, small, small)
    told = json.loads(run("export", tmp_path / "small", tmp_path / "again", "--json").stdout)
    assert (told["params_dense"], told["params_compressed"], told["params"]) == (dense, small, saved)


def test_padding_that_gives_all_back(make_model, tokenizer, tmp_path) -> None:
    model = make_model("llama-gqa")
    model.save_pretrained(tmp_path / "dense")
    dense = sum(info.numel for info in read_tensors(tmp_path / "dense").values())
    narrow = model.model.layers[1].mlp
    for role, axis in (("gate_proj", 0), ("up_proj", 0), ("down_proj", 1)):
        weight = getattr(narrow, role).weight.data.narrow(axis, 0, 37)
        setattr(narrow, role, new_linear(weight, None))
    sizes = {"model.layers.0.mlp": 100, "model.layers.1.mlp": 37}
    attach_quantization_config(model, LoRAPConfig(intermediate_sizes=sizes, dense_intermediate_size=100))
    model.save_pretrained(tmp_path / "small")
    tokenizer.save_pretrained(tmp_path / "small")
    result = run("export", tmp_path / "small", tmp_path / "plain", "--pad-widths", "--quiet")
    assert result.exit_code == 0, result.output
    first = result.stdout.splitlines()[0]
    assert first.startswith(f"{dense:,} parameters dense, {dense - 3 * 64 * 63:,} compressed, {dense:,} exported")
    assert "as large as the dense model" in first
    assert "--target stock" in first
    assert "next:" not in result.stdout


@pytest.mark.parametrize("recipe", ["best", "lorap"])
def test_target_stock_needs_no_export(recipe, model_folder, small_text, tokens, stock_host, tmp_path) -> None:
    """All of the reported saving is in the files that a host without lorap reads."""
    out = tmp_path / "out"
    options = ["--target", "stock", "--recipe", recipe, "--sparsity", 0.3, "--calibration", small_text, "--json"]
    result = run("compress", model_folder, out, *options, *CALIBRATION, *QUIET)
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    config = json.loads((out / "config.json").read_text())
    assert "quantization_config" not in config
    saved, dense = read_tensors(out), read_tensors(model_folder)
    assert saved.keys() == dense.keys()
    assert saved["model.layers.1.mlp.down_proj.weight"].shape == (64, config["intermediate_size"])
    sizes = [sum(info.numel for name, info in files.items() if "_proj" in name) for files in (saved, dense)]
    assert report["param_ratio"] == sizes[0] / sizes[1]
    assert 0.68 < report["param_ratio"] <= 0.7
    for name in ("q_proj", "o_proj"):
        key = f"model.layers.0.self_attn.{name}.weight"
        assert saved[key].shape == dense[key].shape
    assert "import lorap" not in (out / "README.md").read_text("utf-8")
    expected = logits(AutoModelForCausalLM.from_pretrained(out), tokens)
    assert torch.equal(stock_host(out)[1], expected)
    again = json.loads(run("export", out, tmp_path / "again", "--quiet", "--json").stdout)
    assert again["params"] == again["params_compressed"] == report["params_saved"]
    assert again["params_dense"] == report["params_total_before"]


def edited_report(folder: Path, change: Any) -> None:
    path = folder / "lorap_report.json"
    report = json.loads(path.read_text())
    change(report)
    path.write_text(json.dumps(report))


# What may have become of a report -> how.
OTHER_REPORTS = {
    "no JSON": lambda folder: (folder / "lorap_report.json").write_text("{"),
    "a list": lambda folder: (folder / "lorap_report.json").write_text("[]"),
    "a text for a number": lambda folder: edited_report(folder, lambda r: r.update(params_total_before="many")),
    "a larger model": lambda folder: edited_report(folder, lambda r: r.update(params_total_before=10**9)),
    "another width": lambda folder: edited_report(
        folder,
        lambda r: (r["projections"][-1].update(params_after=7), [r.pop(k) for k in ("params_after", "param_ratio")]),
    ),
}


@pytest.mark.parametrize("weights", ["float", "int8"])
def test_a_stock_folder_knows_from_its_report_what_was_kept(
    weights, make_model, compress_small, tokenizer, tmp_path
) -> None:
    dense = make_model("llama-gqa")
    numel = {role: sum(p.numel() for n, p in dense.named_parameters() if role in n) for role in ("up_proj", "q_proj")}
    model, report = compress_small(dense, target="stock", sparsity=0.3)
    out = lorap.save(model, tmp_path / "out", report=report, tokenizer=tokenizer)
    if weights == "int8":
        lorap.quantize(model, "int8").save_pretrained(out)
    found = describe_model(find_model(out))
    assert found["compressed_by_lorap"]
    assert (found["recipe"], found["sparsity"], found["dense_intermediate_size"]) == ("lorap", 0.3, 100)
    assert (found["params"], found["params_before"]) == (report.params_saved, report.params_total_before)
    assert found["param_ratio"] == pytest.approx(report.param_ratio)
    assert 0.6 < found["param_ratio"] <= 0.7
    width = report.by_role("up_proj")[0].shape_after[0]
    assert found["kinds"]["up_proj"] == {"params": 2 * 64 * width, "params_before": numel["up_proj"]}
    assert found["kinds"]["q_proj"] == {"params": numel["q_proj"], "params_before": numel["q_proj"]}
    assert f"FFN width {width} of 100" in format_info(found)


@pytest.mark.parametrize("kind", OTHER_REPORTS)
def test_a_report_of_another_model_says_nothing(kind, make_model, compress_small, tokenizer, tmp_path) -> None:
    model, report = compress_small(make_model("llama-gqa"), target="stock", sparsity=0.3)
    out = lorap.save(model, tmp_path / "out", report=report, tokenizer=tokenizer)
    OTHER_REPORTS[kind](out)
    found = describe_model(find_model(out))
    assert (found["params"], found["params_before"], found["param_ratio"]) == (report.params_saved, None, None)
    assert "lorap_report.json beside it is damaged or of another model" in format_info(found)
    assert not any("1.0000" in line for line in format_info(found).splitlines())
    result = run("export", out, tmp_path / "again", "--quiet", "--dtype", "float16")
    assert result.exit_code == 0, result.output
    assert "how many the dense model has is unknown" in result.stdout
    assert json.loads(run("info", out, "--json").stdout)["param_ratio"] is None


def test_target_stock_beyond_the_ffns_is_refused_before_any_work(model_folder, small_text, tmp_path) -> None:
    options = ["--target", "stock", "--sparsity", 0.9, "--calibration", small_text]
    result = run("compress", model_folder, tmp_path / "out", *options, *CALIBRATION, *QUIET)
    assert result.exit_code == 2
    assert "sparsity 0.9 cannot come from the FFNs alone" in result.stderr
    assert not (tmp_path / "out").exists()


# --- what other hosts make of it ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("width", "words"),
    [
        (90, ["90", "no multiple of 32", "2 down projections (11,520 parameters)", "23,040 bytes", "6,480 in Q4_0"]),
        (
            96,
            [
                "multiple of 32",
                "not of 256",
                "(12,288 parameters)",
                "8,448 bytes in Q5_0",
                "6,912 in Q4_K",
                "--width-multiple 256",
            ],
        ),
        (256, ["FFN width 256 is a multiple of 256"]),
    ],
)
def test_what_a_width_costs(width, words, make_model) -> None:
    found = width_cost(make_model("llama-gqa", intermediate_size=width))
    assert all(word in found for word in words), found


def test_what_widths_of_their_own_cost(make_model) -> None:
    """Counted over the layers that pay."""
    model = make_model("llama-gqa", intermediate_size=256)
    for width, words in (
        (96, ["from 96 to 256", "not all of 256", "1 down projections (6,144 parameters)"]),
        (37, ["not all", "2,368"]),
    ):
        down = model.model.layers[1].mlp.down_proj
        model.model.layers[1].mlp.down_proj = new_linear(down.weight.data[:, :width], None)
        found = width_cost(model)
        assert all(word in found for word in words), found


def test_activations_near_the_end_of_float16_are_told(make_model, tokens, tmp_path) -> None:
    """Exact numbers: what down_proj reads is recorded by a hook of our own."""
    model = make_model("llama-gqa")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight *= 12000
    seen: list[float] = []
    hook = model.model.layers[1].mlp.down_proj.register_forward_pre_hook(
        lambda _, inputs: seen.append(float(inputs[0].abs().max()))
    )
    with torch.no_grad():
        for window in tokens:
            model(window.unsqueeze(0))
    hook.remove()
    assert max(seen) > 40_000
    config = lorap.CompressionConfig(
        recipe="lorap", target="stock", sparsity=0.2, num_calibration_samples=8, calibration_seq_len=32
    )
    _, report = lorap.compress(model, calibration=tokens, config=config, progress=False)
    (down,) = [one for one in report.by_role("down_proj") if one.layer == 1]
    assert down.largest_input == pytest.approx(max(seen), rel=0.2)  # the layer before has been narrowed
    assert lorap.CompressionReport.from_dict(json.loads(json.dumps(report.to_dict()))).projections == report.projections
    warning = overflow_warning(report, torch.float16)
    assert f"down_proj of layer 1 read activations up to {down.largest_input:,.0f}" in warning
    assert "65,504" in warning
    assert "--dtype bfloat16" in warning
    assert overflow_warning(report, torch.bfloat16) is None
    assert overflow_warning(None, torch.float16) is None
    quiet = dataclasses.replace(report, projections=[dataclasses.replace(down, largest_input=30_000.0)])
    assert overflow_warning(quiet, torch.float16) is None


def test_the_command_tells_both(make_model, tokenizer, small_text, tmp_path) -> None:
    model = make_model("llama-gqa", intermediate_size=160)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight *= 12000
    model.save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    options = ["--target", "stock", "--recipe", "lorap", "--sparsity", 0.2, "--calibration", small_text, "--quiet"]
    options += ["--eval-text", "none", "--num-calibration-samples", 8, "--calibration-seq-len", 32, "--device", "cpu"]
    told = run("compress", tmp_path / "dense", tmp_path / "small", *options)
    assert told.exit_code == 0, told.output
    assert "sparsity 0.2 was asked for and 0.2" in told.stdout  # 160 channels less 43.7 are 116, and 96 in blocks
    assert "FFN width 96" in told.stdout
    for number, format in enumerate(("stock", "gguf")):
        out = tmp_path / str(number)
        told = run("export", tmp_path / "small", out, "--format", format, "--dtype", "float16", "--quiet")
        assert told.exit_code == 0, told.output
        assert "FFN width 96 is a multiple of 32" in told.stdout
        assert "float16 ends at 65,504" in " ".join(told.stderr.split())
