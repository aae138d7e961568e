"""Every family does everything that docs/models.md says, in `make test` six of them."""

from __future__ import annotations

import pytest
from families import PAGE, check, page
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from lorap.architectures import ARCHITECTURES

# What differs most from Llama: norms after sublayers, multipliers, LayerNorm beside parallel sublayers, GELU and scaled
# embeddings, and vision beside the language model, with other names in files and with M-RoPE.
FIRST = ("olmo2", "granite", "cohere2", "gemma3_text", "mistral3", "qwen2_vl")
found: dict[str, dict[str, str]] = {}


@pytest.mark.parametrize(
    "model_type", [pytest.param(name, marks=() if name in FIRST else pytest.mark.slow) for name in ARCHITECTURES]
)
def test_everything_works_or_says_that_it_does_not(model_type, tokenizer, tmp_path) -> None:
    if model_type not in CONFIG_MAPPING:
        pytest.skip("unknown to this version of transformers")
    found[model_type] = check(model_type, tmp_path, tokenizer)
    for column, cell in found[model_type].items():
        assert cell == "yes" or model_type in cell, column


@pytest.mark.slow
def test_the_page_is_of_this_code() -> None:
    if not found:
        pytest.skip("nothing ran")
    told = PAGE.read_text("utf-8")
    assert (
        page(found, told).splitlines()[4:] == told.splitlines()[4:]
    )  # above are the versions that it was written with
