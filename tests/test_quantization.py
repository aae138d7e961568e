"""int8 under its older name, which needs nothing installed; versions of the format; refusals, and commands that are suggested."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import lorap
from lorap.checkpoint.format import LoRAPConfig
from lorap.checkpoint.load import find_model
from lorap.cli.compress import next_steps
from lorap.evaluation.info import describe_model


@torch.no_grad()
def logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    return model(tokens).logits


@pytest.fixture
def small(make_model, compress_small) -> Any:
    return compress_small(make_model("llama-biases"), storage="pivoted")[0]


def test_the_older_name_is_quantize(small, tmp_path) -> None:
    lorap.quantize(copy.deepcopy(small), "int8").save_pretrained(tmp_path / "new")
    assert lorap.quantize_int8(small) is small
    small.save_pretrained(tmp_path / "old")
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "old" / file).read_bytes() == (tmp_path / "new" / file).read_bytes()


@pytest.mark.parametrize("first", ["quantize", "optimize"])
def test_with_optimize_for_inference(first, small, tokens) -> None:
    expected = logits(lorap.quantize_int8(copy.deepcopy(small)), tokens)
    steps = [lorap.quantize_int8, lorap.optimize_for_inference]
    for step in steps if first == "quantize" else steps[::-1]:
        step(small)
    torch.testing.assert_close(logits(small, tokens), expected, rtol=1e-4, atol=1e-4)
    options = {"max_new_tokens": 5, "do_sample": False}
    assert small.generate(tokens[:1, :7], **options).shape == (1, 12)


# Opens each folder, in an interpreter without lorap.
REFUSED = """
import sys, transformers
for folder in sys.argv[1:]:
    try:
        transformers.AutoModelForCausalLM.from_pretrained(folder)
    except Exception as refused:
        print("needs_import_lorap" in str(refused))
"""


def test_opened_without_lorap_it_is_refused(make_model, compress_small, tmp_path) -> None:
    """Also where no layer is low-rank: the int8 layers have guards of their own."""
    targets = ("lorap", "stock")
    for target in targets:
        model, _ = compress_small(make_model("llama-gqa"), sparsity=0.2, target=target)
        lorap.quantize_int8(model).save_pretrained(tmp_path / target)
    command = [sys.executable, "-c", REFUSED, *targets]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert run.stdout.split() == ["True", "True"], run.stdout + run.stderr


def test_what_is_int8_already_is_refused(small) -> None:
    lorap.quantize_int8(small)
    with pytest.raises(lorap.ArchitectureError, match="the weights of this model are int8 already"):
        lorap.quantize_int8(small)


def test_info_of_a_dense_model_with_int8_weights(make_model, tmp_path) -> None:
    model = make_model("llama-biases")
    model.save_pretrained(tmp_path / "float")
    lorap.quantize_int8(model).save_pretrained(tmp_path / "int8")
    floats, int8 = (describe_model(find_model(tmp_path / name)) for name in ("float", "int8"))
    assert (int8["params"], int8["param_ratio"], int8["kinds"]) == (floats["params"], 1.0, floats["kinds"])


def test_versions_of_int8() -> None:
    assert LoRAPConfig(weights="int8").format_version == 4
    assert "weights" not in LoRAPConfig().to_dict()
    again = LoRAPConfig(**LoRAPConfig(weights="int8", storage="pivoted").to_dict())
    assert (again.weights, again.storage, again.format_version) == ("int8", "pivoted", 4)
    with pytest.raises(lorap.CheckpointError, match="int8 weights and format version 2, which has none; it must be 3"):
        LoRAPConfig(weights="int8", format_version=2)
    with pytest.raises(
        lorap.CheckpointError,
        match=r"quantization_config\.weights should be 'float', 'int8', 'int4', 'tcq2', .* or 'tcq6' and is 'int2'",
    ):
        LoRAPConfig(weights="int2")


@pytest.mark.parametrize("weights", ["float", "int4"])
def test_no_command_is_suggested_that_refuses_the_folder(weights: str, make_model, compress_small) -> None:
    _, report = compress_small(make_model("llama-gqa"), recipe="lorap", weights=weights)
    commands = {command.split()[1] for command, _ in next_steps("dense", Path("out"), report)}
    assert {"eval", "generate"} <= commands
    assert ({"recover", "export"} <= commands) == (weights == "float")
