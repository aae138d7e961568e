"""llama.cpp computes with exported GGUF files what transformers computes. Run by `make test-llamacpp`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import xllamacpp

FOLDERS = Path(os.environ["HOST_FOLDERS"])
EXPECTED = json.loads((FOLDERS / "expected.json").read_text("utf-8"))
TEXT = EXPECTED.pop("text")
# Lengths of the prompts after which the next token is looked at: past the place where scaled rotary positions differ.
LENGTHS = (1, 2, 5, 11, 31, 63, 90, 120)


def server(name: str) -> Any:
    params = xllamacpp.CommonParams()
    (file,) = (FOLDERS / f"{name}-gguf").glob("*.gguf")
    params.model.path = str(file)
    params.n_ctx, params.n_parallel, params.warmup = 256, 1, False
    params.cpuparams.n_threads = 1
    return xllamacpp.Server(params)


def logprob(host: Any, prompt: list[int], token: int, number: int, letter: int) -> float:
    """Of ``token`` after ``prompt``."""
    # The server is made to answer ``letter``: probabilities come with whole characters only, not with the end or half of a
    # character. They are those before the bias.
    request = {"prompt": prompt, "n_predict": 1, "n_probs": number, "logit_bias": [[letter, 1000.0]]}
    answer = host.handle_completions(request)["choices"][0]
    assert answer["text"] == "a"
    top = answer["logprobs"]["content"][0]["top_logprobs"]
    found = {entry["id"]: entry["logprob"] for entry in top}
    return found[token]


@pytest.mark.parametrize("name", [name for name in EXPECTED if (FOLDERS / f"{name}-gguf").is_dir()])
def test_losses_are_those_of_transformers_5(name: str) -> None:
    host, tokens, losses = server(name), EXPECTED[name]["tokens"], EXPECTED[name]["losses"]
    number = 50_000 if name == "smollm2" else 512
    letter = json.loads((FOLDERS / name / "tokenizer.json").read_text("utf-8"))["model"]["vocab"]["a"]
    found = [-logprob(host, tokens[:length], tokens[length], number, letter) for length in LENGTHS]
    differences = [abs(one - losses[length - 1]) for one, length in zip(found, LENGTHS, strict=True)]
    print(f"{name}: loss {sum(found) / len(found):.6f}, largest difference of a token {max(differences):.1e}")
    assert max(differences) < (0.05 if name == "smollm2" else 0.02)
