"""transformers 4 opens what lorap writes for hosts without it, and refuses the rest. Run by `make test-transformers4`."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, __version__

FOLDERS = Path(os.environ["HOST_FOLDERS"])
EXPECTED = json.loads((FOLDERS / "expected.json").read_text("utf-8"))
TEXT = EXPECTED.pop("text")


def test_this_is_transformers_4() -> None:
    assert __version__.startswith("4.")


@pytest.mark.parametrize("name", EXPECTED)
def test_losses_are_those_of_transformers_5(name: str) -> None:
    model, info = AutoModelForCausalLM.from_pretrained(FOLDERS / name, output_loading_info=True)
    assert model.dtype == torch.float32  # `dtype` in config.json
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokens = torch.tensor([EXPECTED[name]["tokens"]])
    with torch.no_grad():
        logits = model.eval()(tokens).logits
    found = torch.nn.functional.cross_entropy(logits[0, :-1], tokens[0, 1:], reduction="none")
    difference = (found - torch.tensor(EXPECTED[name]["losses"])).abs()
    print(f"{name}: loss {found.mean():.6f}, largest difference of a token {difference.max():.1e}")
    assert difference.max() < 1e-4


@pytest.mark.parametrize("name", [name for name in EXPECTED if name != "smollm2"])
def test_text_becomes_the_same_tokens(name: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(FOLDERS / name)
    assert tokenizer(TEXT["text"])["input_ids"] == TEXT["ids"]
    assert tokenizer.additional_special_tokens == ["<|turn|>"]
    shown = tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)
    assert shown == "<|turn|>x"


@pytest.mark.parametrize("loader", [AutoModelForCausalLM, AutoModel, LlamaForCausalLM])
def test_a_compressed_folder_is_refused_whatever_the_option(loader) -> None:
    for options in ({}, {"ignore_mismatched_sizes": True}, {"device_map": "cpu"}, {"low_cpu_mem_usage": False}):
        with pytest.raises(KeyError, match="silu_needs_import_lorap"):
            loader.from_pretrained(FOLDERS / "compressed", **options)
    with pytest.raises(RuntimeError, match="size mismatch"):
        loader.from_pretrained(FOLDERS / "compressed", hidden_act="silu")
