"""Families besides those of test_vllm.py, as tiny random models: vLLM says what transformers says, or refuses in a sentence."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny
from vllm_host import SMALL, check_greedy, check_scores, shrink, vllm_says

import lorap
from lorap.architectures import ARCHITECTURES, split_model

# What sets a family apart in vLLM; its class there always ties the head of Gemma.
WINDOWS = ["sliding_attention", "full_attention", "sliding_attention"]
FAMILIES: dict[str, dict[str, Any]] = {
    "phi3": {},
    "glm4": {},
    "granite": {},
    "gemma": {"tie_word_embeddings": True},
    "gemma3_text": {"tie_word_embeddings": True, "layer_types": WINDOWS},
    "exaone4": {},
    "ernie4_5": {},
    "ministral3": {},
    "olmo2": {},
    "olmo3": {},
    "seed_oss": {},
}
# Of one whose parts are stored as one matrix, and of one whose activation is not SiLU.
IN_4_BITS = ("phi3", "gemma3_text")
# Of a class in vLLM whose numbers are others, of one that knows no parts of a matrix, and of one of experts.
REFUSED = ("cohere2", "glm", "mixtral")


def small(model_type: str, folder: Path, *, bits: bool = False) -> Path:
    """Pivoted, with ranks and widths that differ by layer; or whole, in 4 bits."""
    model = split(tiny(model_type, **SMALL, **FAMILIES[model_type]))
    if not bits:
        return shrink(model, folder, storage="pivoted")
    lorap.quantize(model, "int4", group_size=32).save_pretrained(folder)
    return folder


def split(model: Any) -> Any:
    split_model(model)
    return model


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(2, 500, (length,), generator=generator).tolist() for length in (5, 17, 40)]


@pytest.fixture(scope="module")
def served(prompts, tmp_path_factory) -> dict[str, tuple[Path, Any]]:
    """Folder and answer of each family, and of some in 4 bits; all in one process, whose start takes longest."""
    place = tmp_path_factory.mktemp("families")
    folders = {name: small(name, place / name) for name in FAMILIES}
    folders |= {f"{name} in 4 bits": small(name, place / f"{name}-int4", bits=True) for name in IN_4_BITS}
    answers = vllm_says([{"folder": folder, "prompts": prompts, "score": True} for folder in folders.values()])
    return {name: (folder, answer) for (name, folder), answer in zip(folders.items(), answers, strict=True)}


@pytest.mark.parametrize("name", [*FAMILIES, *(f"{name} in 4 bits" for name in IN_4_BITS)])
def test_a_family_says_what_transformers_says(name, served, prompts) -> None:
    folder, answer = served[name]
    check_greedy(folder, prompts, answer)
    check_scores(folder, prompts, answer)


def test_other_families_are_refused_by_name(prompts, make_model, tmp_path) -> None:
    """A folder of Llama that says it is another family: nothing else is looked at."""
    folder = shrink(make_model("llama-gqa", **SMALL), tmp_path / "llama")
    config = json.loads((folder / "config.json").read_text())
    for name in REFUSED:
        assert name in ARCHITECTURES
        shutil.copytree(folder, tmp_path / name)
        (tmp_path / name / "config.json").write_text(json.dumps(config | {"model_type": name}))
    answers = vllm_says([{"folder": tmp_path / name, "prompts": prompts} for name in REFUSED])
    for name, answer in zip(REFUSED, answers, strict=True):
        assert f"this is a {name} model" in answer["error"], answer
