"""OpenVINO GenAI runs what lorap writes for hosts without it, and optimum-intel refuses the rest. Run by `make test-openvino`."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import openvino
import openvino_genai
import pytest
import torch
from optimum.exporters.openvino import main_export
from transformers import AutoModelForCausalLM

FOLDERS = Path(os.environ["HOST_FOLDERS"])
EXPECTED = json.loads((FOLDERS / "expected.json").read_text("utf-8"))
TEXT = EXPECTED.pop("text")
# By default OpenVINO keeps keys and values in 8 bits, which changes what a random model says.
EXACT = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32", "INFERENCE_NUM_THREADS": 1}


def exported(folder: Path, out: Path) -> Path:
    """What `optimum-cli export openvino --weight-format fp32` writes."""
    main_export(str(folder), out, task="text-generation-with-past", dtype="fp32", convert_tokenizer=True)
    return out


def losses(folder: Path, tokens: list[int]) -> torch.Tensor:
    model = openvino.Core().compile_model(str(folder / "openvino_model.xml"), "CPU", EXACT)
    ids = np.array([tokens])
    inputs = {
        "input_ids": ids,
        "attention_mask": np.ones_like(ids),
        "position_ids": np.arange(len(tokens))[None],
        "beam_idx": np.zeros(1, np.int32),
    }
    logits = torch.from_numpy(model(inputs)[0].copy())
    return torch.nn.functional.cross_entropy(logits[0, :-1], torch.tensor(tokens[1:]), reduction="none")


@pytest.mark.parametrize("name", EXPECTED)
def test_losses_tokens_and_answers_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    folder, tokens = exported(FOLDERS / name, tmp_path / name), EXPECTED[name]["tokens"]
    found, expected = losses(folder, tokens), torch.tensor(EXPECTED[name]["losses"])
    difference = (found - expected).abs().max().item()
    print(f"{name}: loss {found.mean().item():.6f}, largest difference of a token {difference:.1e}")
    assert difference < 1e-3

    pipeline = openvino_genai.LLMPipeline(folder, "CPU", **EXACT)
    if name != "smollm2":
        assert pipeline.get_tokenizer().encode(TEXT["text"]).input_ids.data[0].tolist() == TEXT["ids"]
    prompt = tokens[:20]
    greedy = openvino_genai.GenerationConfig(max_new_tokens=30, do_sample=False, ignore_eos=True)
    answer = pipeline.generate(openvino.Tensor(np.array([prompt])), greedy).tokens[0]
    model = AutoModelForCausalLM.from_pretrained(FOLDERS / name, dtype=torch.float32)
    wanted = model.generate(torch.tensor([prompt]), max_new_tokens=30, do_sample=False, eos_token_id=None)
    assert answer == wanted[0, len(prompt) :].tolist()


def test_a_compressed_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="needs_import_lorap"):
        exported(FOLDERS / "compressed", tmp_path / "compressed")
