"""llama.cpp computes with exported GGUF files what transformers computes, in every family and with every pattern of widths."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from commands import run as command
from transformers import AutoTokenizer

import lorap
from lorap.architectures import known_architecture
from lorap.calibration import read_source
from lorap.checkpoint.gguf.header import read_gguf
from lorap.checkpoint.gguf.keys import read_numbers
from lorap.checkpoint.gguf.quantizing import find_quantizer
from lorap.checkpoint.load import find_model, load_model
from lorap.nn.linear import new_linear

pytest.importorskip("xllamacpp")
pytest.importorskip("gguf")

from llamacpp_host import Host

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
ROPE = {"rope_type": "llama3", "rope_theta": 10000.0} | LLAMA3
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 16}
ONE, TWO, ODD = (100, 100), (64, 96), (1, 37)
BIAS = ("down_proj",)
# family, what sets the config apart, widths of the layers, projections with a bias of their own -> architecture in the file
CASES = [
    ("llama-mha", {}, ONE, (), "llama"),
    ("llama-gqa", {}, TWO, (), "deci"),
    ("llama-gqa", {}, ODD, (), "deci"),
    ("llama-gqa", {"rope_parameters": ROPE}, ONE, (), "llama"),
    ("llama-gqa", {"rope_parameters": ROPE}, ODD, (), "deci"),
    ("llama-gqa", {"rope_parameters": YARN}, ODD, (), "deci"),
    ("llama-biases", {}, ODD, (), "deci"),
    ("llama-biases", {}, ONE, (), "llama"),
    ("llama-wide-heads", {}, ODD, (), "deci"),
    ("mistral", {"sliding_window": None}, ODD, (), "deci"),
    ("mistral", {"sliding_window": None}, ONE, BIAS, "llama"),
    ("qwen2", {}, ONE, (), "qwen2"),
    ("qwen2", {}, ODD, (), "deci"),
    ("qwen2", {}, ONE, BIAS, "deci"),
    ("qwen2", {"head_dim": 24}, ONE, (), "deci"),
    ("qwen2", {"rope_parameters": ROPE}, ONE, (), "deci"),
    ("qwen3", {}, ONE, (), "qwen3"),
    ("qwen3", {}, ONE, ("q_proj", "v_proj"), "qwen3"),
]


def cut(model: Any, widths: tuple[int, ...], biases: tuple[str, ...]) -> Any:
    """The model with its FFNs at these widths, and random biases."""
    architecture = known_architecture(model, to="cut")
    for index, (layer, width) in enumerate(zip(architecture.decoder_layers(model), widths, strict=True)):
        for role, linear in architecture.linears(layer).items():
            if role in ("gate_proj", "up_proj", "down_proj"):
                axis = int(role == "down_proj")
                bias = linear.bias
                if bias is not None and not axis:
                    bias = bias.data[:width]
                linear = new_linear(linear.weight.data.narrow(axis, 0, width), bias)
            if role in biases:
                linear.bias = torch.nn.Parameter(torch.randn(linear.out_features))
            model.set_submodule(architecture.module_name(index, role), linear)
    return model


@torch.no_grad()
def expected(model: Any, prompt: list[int]) -> torch.Tensor:
    return model(torch.tensor([prompt])).logits[0, -1].float().log_softmax(-1)


def name_of(case: Any) -> str:
    family, options, widths, biases, _ = case
    return "-".join([family, *options, *map(str, widths), *biases])


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_probabilities_are_those_of_transformers(case, make_model, tokenizer, tokens, tmp_path) -> None:
    family, options, widths, biases, architecture = case
    model = cut(make_model(family, **options), widths, biases)
    file = lorap.export_gguf(model, tmp_path / "small", tokenizer=tokenizer) / "small-F32.gguf"
    assert read_gguf(file).architecture == architecture
    host = Host(file, letter=tokenizer.convert_tokens_to_ids("a"))
    ids = tokens.flatten().tolist()
    for length in (1, 7, 60):  # scaled positions differ from others after 16 tokens
        wanted = expected(model, ids[:length])
        torch.testing.assert_close(host.logprobs(ids[:length], len(wanted)), wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "widths", "biases", "words"),
    [
        (
            {},
            ODD,
            (),
            ["widths run from 1 to 37", "no norms of q and k", f"--pad-widths: {3 * 64 * 36:,} more parameters"],
        ),
        ({}, ONE, ("o_proj",), ["o_proj have biases", "qwen3", "--no-bias-compensation"]),
        ({"rope_parameters": ROPE}, ONE, (), ["scaled as Llama 3.1's", "qwen3", "--format stock"]),
    ],
)
def test_what_no_architecture_holds_is_refused_with_the_way_out(
    options, widths, biases, words, make_model, tokenizer, tmp_path
) -> None:
    model = cut(make_model("qwen3", **options), widths, biases)
    with pytest.raises(lorap.ArchitectureError) as error:
        lorap.export_gguf(model, tmp_path / "small", tokenizer=tokenizer)
    assert all(word in str(error.value) for word in words), error.value
    assert not (tmp_path / "small").exists()


def test_padded_widths_compute_the_same(make_model, tokenizer, tokens, tmp_path) -> None:
    model = cut(make_model("qwen3"), ODD, ())
    ids = tokens[0].tolist()
    wanted = expected(model, ids)
    file = lorap.export_gguf(model, tmp_path / "small", tokenizer=tokenizer, pad_widths=True) / "small-F32.gguf"
    assert read_gguf(file).values["qwen3.feed_forward_length"] == 37
    found = Host(file, letter=tokenizer.convert_tokens_to_ids("a")).logprobs(ids, len(wanted))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)


def test_the_file_is_as_large_as_its_tensors(make_model, tokenizer, tmp_path) -> None:
    """No zeros for widths that differ: a header, and each tensor to the next multiple of 32 bytes."""
    model = cut(make_model("llama-gqa"), ODD, ())
    file = lorap.export_gguf(model, tmp_path / "small", tokenizer=tokenizer) / "small-F32.gguf"
    header = read_gguf(file)
    assert header.values["deci.feed_forward_length"] == list(ODD)
    assert sum(info.numel for info in header.tensors.values()) == sum(p.numel() for p in model.parameters())
    start = min(info.offset for info in header.tensors.values())
    assert file.stat().st_size == start + sum(-(-info.nbytes // 32) * 32 for info in header.tensors.values())


# An assistant's turn at the end would be taken as the beginning of the answer.
TURNS = [("user", "Add 1234 and 56 .\n\n  Then  stop"), ("assistant", "1290"), ("user", "Go on")]
TURNS = [{"role": role, "content": content} for role, content in TURNS]


def test_from_compressing_to_an_answer(model_folder, small_text, tokenizer, tmp_path) -> None:
    """All commands; then text and chats become the same tokens, and the same tokens follow."""
    chat = AutoTokenizer.from_pretrained(model_folder)
    chat.chat_template = "{% for turn in messages %}<pad>{{ turn.role }}\n{{ turn.content }}<eos>{% endfor %}"
    chat.save_pretrained(model_folder)
    options = ["--recipe", "best", "--sparsity", 0.4, "--calibration", small_text, "--eval-text", "none", "--quiet"]
    options += ["--num-calibration-samples", 8, "--calibration-seq-len", 32, "--device", "cpu"]
    run("compress", model_folder, tmp_path / "small", *options)
    told = json.loads(run("export", tmp_path / "small", tmp_path / "file", "--format", "gguf", "--quiet", "--json"))
    assert told["architecture"] == "deci"
    assert len(set(told["intermediate_sizes"])) == 2
    file = tmp_path / "file" / told["file"]
    assert told["bytes"] == file.stat().st_size
    host = Host(file, letter=chat.convert_tokens_to_ids("a"))
    text = read_source("default/news")[:2000] + " naïve café 12345 <eos> x\n\n  y\t."
    assert host.tokens(text) == chat(text)["input_ids"]
    turns = host.ask("apply-template", messages=TURNS)["prompt"]
    ids = chat.apply_chat_template(TURNS, return_dict=True)["input_ids"]
    assert host.tokens(turns) == ids
    model = load_model(find_model(tmp_path / "small"))
    for prompt in (ids, chat(text)["input_ids"][:50]):
        answer = model.generate(torch.tensor([prompt]), max_new_tokens=12, min_new_tokens=12, do_sample=False)
        assert host.greedy(prompt, 12) == answer[0, len(prompt) :].tolist()


def run(*arguments: Any) -> str:
    result = command(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


# --- fewer bits ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "near"), [("Q8_0", 0.05), ("Q4_0", 1.0)])
def test_quantized_files_answer(kind, near, make_model, tokenizer, tokens, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    model = cut(make_model("llama-gqa", tie_word_embeddings=False), (96, 37), ())
    file = lorap.export_gguf(model, tmp_path / "small", tokenizer=tokenizer, quantize=kind) / f"small-{kind}.gguf"
    types = {name: info.dtype for name, info in read_gguf(file).tensors.items()}
    assert (types["token_embd.weight"], types["output.weight"]) == ("Q8_0", "Q8_0")
    assert (types["blk.0.ffn_down.weight"], types["blk.1.ffn_down.weight"]) == (kind, "F16")
    assert types["blk.1.attn_norm.weight"] == "F32"
    ids = tokens[0].tolist()
    wanted = expected(model, ids)
    host = Host(file, letter=tokenizer.convert_tokens_to_ids("a"))
    difference = (host.logprobs(ids, len(wanted)) - wanted).abs().mean()
    assert 1e-4 < difference < near


def test_float64_is_rounded_once(make_model, tokenizer, tmp_path) -> None:
    model = cut(make_model("llama-gqa").double(), ODD, ())
    weight = model.model.layers[1].mlp.up_proj.weight.detach().clone()
    file = lorap.export_gguf(model, tmp_path / "small", tokenizer=tokenizer) / "small-F32.gguf"
    header = read_gguf(file)
    assert {info.dtype for info in header.tensors.values()} == {"F32"}
    assert torch.equal(torch.from_numpy(read_numbers(header, "blk.1.ffn_up.weight")), weight.float())


def test_types_that_nothing_here_makes(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_quantizer("Q8_0") is None
    assert find_quantizer("Q4_0") is None
    with pytest.raises(
        lorap.ConfigError, match=r"Q4_K_M needs llama\.cpp's llama-quantize.*Q8_0.*llama-quantize FILE\.gguf"
    ):
        find_quantizer("Q4_K_M")
    with pytest.raises(lorap.ConfigError, match=r"unknown type 'Q9'.*Q4_K_M"):
        find_quantizer("Q9")


def test_llama_quantize_makes_the_others(make_model, tokenizer, tmp_path, monkeypatch) -> None:
    """A program of that name is given the whole file; what it says is told where it fails."""
    program = tmp_path / "llama-quantize"
    program.write_text('#!/bin/sh\n[ "$3" = Q4_K_M ] || { echo "no type $3" >&2; exit 3; }\nexec /bin/cp "$1" "$2"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin")
    model = make_model("llama-gqa")
    out = lorap.export_gguf(model, tmp_path / "small", tokenizer=tokenizer, quantize="Q4_K_M")
    assert sorted(path.name for path in out.iterdir()) == ["README.md", "small-Q4_K_M.gguf"]
    assert read_gguf(out / "small-Q4_K_M.gguf").tensors["blk.0.ffn_up.weight"].dtype == "F32"
    with pytest.raises(lorap.CheckpointError, match="Q5_K_M ended with 3, saying: no type Q5_K_M"):
        lorap.export_gguf(model, tmp_path / "other", tokenizer=tokenizer, quantize="Q5_K_M")
    assert not (tmp_path / "other").exists()
