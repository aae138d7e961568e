"""Folders for other hosts to open, and what transformers 5 makes of them: python tests/hosts/make_folders.py OUT.

Run with lorap; the tests beside this file run without it, each in its host's own environment, with HOST_FOLDERS=OUT.
``expected.json`` has the tokens of a paragraph and the loss of each after the first, by folder.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import lorap
from lorap.calibration import read_source
from lorap.checkpoint.load import find_model, load_model, load_tokenizer
from lorap.nn.linear import new_linear

TEXT = read_source("default")
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
# name -> (class prefix, rotary positions): none with the base of 10000 that old hosts fall back on
KINDS = {
    "llama": ("Llama", {"rope_type": "default", "rope_theta": 250000.0}),
    "llama3": ("Llama", {"rope_type": "llama3", "rope_theta": 500000.0} | LLAMA3),
    "linear": ("Llama", {"rope_type": "linear", "rope_theta": 70000.0, "factor": 4.0}),
    "mistral": ("Mistral", {"rope_type": "default", "rope_theta": 1000.0}),
    "qwen2": ("Qwen2", {"rope_type": "default", "rope_theta": 3000.0}),
    "qwen3": ("Qwen3", {"rope_type": "default", "rope_theta": 3000.0}),
}
REAL = Path(".cache/SmolLM2-135M-Instruct")


def make_tokenizer() -> Any:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        [TEXT], trainers.BpeTrainer(vocab_size=512, special_tokens=["<eos>", "<|turn|>"], initial_alphabet=alphabet)
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<eos>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|turn|>"]})
    tokenizer.chat_template = "{% for m in messages %}<|turn|>{{ m['content'] }}{% endfor %}"
    return tokenizer


def make_model(prefix: str, rope: dict[str, Any], vocab_size: int, width: int = 160) -> Any:
    config = getattr(transformers, f"{prefix}Config")(
        vocab_size=vocab_size, hidden_size=64, intermediate_size=width, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=256, tie_word_embeddings=False, rope_parameters=rope,
        bos_token_id=None, eos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = getattr(transformers, f"{prefix}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(
                torch.randn_like(parameter) * (0.15 if parameter.ndim == 2 else 0.3) + (parameter.ndim == 1)
            )
    return model


@torch.no_grad()
def expectation(folder: Path, tokens: torch.Tensor) -> dict[str, Any]:
    return losses_of(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), tokens)


@torch.no_grad()
def losses_of(model: Any, tokens: torch.Tensor) -> dict[str, Any]:
    losses = torch.nn.functional.cross_entropy(model(tokens).logits[0, :-1], tokens[0, 1:], reduction="none")
    return {"tokens": tokens[0].tolist(), "losses": losses.tolist()}


def make_deci(out: Path, vocab_size: int, tokens: torch.Tensor) -> None:
    """A folder with a width per layer, multiples of 256 as hosts of `ffn_mult` want them, and what is expected of it."""
    model = make_model(*KINDS["llama3"], vocab_size, width=512)
    mlp = model.model.layers[1].mlp
    for role, axis in (("gate_proj", 0), ("up_proj", 0), ("down_proj", 1)):
        setattr(mlp, role, new_linear(getattr(mlp, role).weight.data.narrow(axis, 0, 256), None))
    (out / "deci.json").write_text(json.dumps(losses_of(model, tokens)), "utf-8")
    lorap.export_deci(model, out / "deci")


def make_packed(out: Path, vocab_size: int, tokens: torch.Tensor) -> None:
    """Folders in compressed-tensors' layout, and what is expected of them; a row of words has no last one that is half empty."""
    expected = {}
    for weights, sparsity in (("int4", 0.3), ("int8", 0.0)):
        config = lorap.CompressionConfig(
            sparsity=sparsity, target="stock", weights=weights, group_size=32, correction_steps=0
        )
        model = make_model(*KINDS["qwen2"], vocab_size)
        model, report = lorap.compress(model, calibration=tokens, config=config, progress=False)
        lorap.save(model, out / weights, report=report)
        expected[weights] = losses_of(model, tokens[:1])
    (out / "packed.json").write_text(json.dumps(expected), "utf-8")


def main(out: Path) -> None:
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    expected = {}
    tokenizer = make_tokenizer()
    tokens = torch.tensor(tokenizer(TEXT[:6000])["input_ids"])[: 8 * 128].view(8, 128)
    config = lorap.CompressionConfig(sparsity=0.4, recipe="lorap", num_calibration_samples=8, calibration_seq_len=128)
    for name, (prefix, rope) in KINDS.items():
        model = make_model(prefix, rope, len(tokenizer))
        model, report = lorap.compress(model, calibration=tokens, config=config, progress=False)
        if name == "llama":
            lorap.save(model, out / "compressed", report=report, tokenizer=tokenizer)
        lorap.export_stock(model, out / name, tokenizer=tokenizer)
        expected[name] = expectation(out / name, tokens[:1])
    make_deci(out, len(tokenizer), tokens[:1])
    make_packed(out, len(tokenizer), tokens)
    if any(REAL.glob("*.gguf")):
        source = find_model(REAL)
        model, tokenizer = load_model(source), load_tokenizer(source)
        lorap.export_stock(model, out / "smollm2", tokenizer=tokenizer)
        ids = torch.tensor([tokenizer(TEXT[:1000])["input_ids"][:200]])
        expected["smollm2"] = expectation(out / "smollm2", ids)
    text = "Naïve <|turn|>tokens 1234<eos>\n\n  and spaces"
    expected["text"] = {"text": text, "ids": make_tokenizer()(text)["input_ids"]}
    (out / "expected.json").write_text(json.dumps(expected), "utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
