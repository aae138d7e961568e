"""Images through models whose language model is compressed: tiny random models of the real classes.

Proved here: with nothing to take away the logits behind an image are those of the dense model; compressed, they are the same
after a reload and after optimize_for_inference, and so is what is generated. Not proved: anything about how well a
compressed model sees.
"""

from __future__ import annotations

import copy

import families
import pytest
import torch
from transformers import AutoModelForImageTextToText

import lorap
from lorap.checkpoint.validate import model_class

IMAGE = 497  # the placeholder, within the vocabulary of the tiny models
PATCHES = {"internvl": 1, "smolvlm": 1, "idefics3": 1}  # tokens of one image of 2 x 2 patches; 4 elsewhere


def image_of(model_type, config, generator):
    """What the model gets besides tokens."""
    if model_type.startswith("qwen"):
        vision = config.vision_config
        channels = getattr(vision, "in_channels", None) or getattr(vision, "in_chans", 3)
        numbers = channels * vision.temporal_patch_size * vision.patch_size**2
        return {
            "pixel_values": torch.randn(16, numbers, generator=generator),
            "image_grid_thw": torch.tensor([[1, 4, 4]]),
        }
    several = (1, 1) if model_type in ("smolvlm", "idefics3") else (1,)
    return {"pixel_values": torch.randn(*several, 3, 28, 28, generator=generator)}


@pytest.fixture
def seeing(request):
    """(dense model, its inputs with an image among 24 tokens)."""
    config = families.tiny_config(request.param)
    for name in ("image_token_id", "image_token_index"):
        if hasattr(config, name):
            setattr(config, name, IMAGE)
    if request.param == "gemma3":
        config.mm_tokens_per_image = 4
    model = families.random_model(lambda: model_class(config).from_config(config))
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(2, 400, (1, 24), generator=generator)
    ids[0, 5 : 5 + PATCHES.get(request.param, 4)] = IMAGE
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)} | image_of(request.param, config, generator)
    if request.param.startswith("qwen"):
        inputs["mm_token_type_ids"] = (ids == IMAGE).int()
    if request.param == "gemma3":
        inputs["token_type_ids"] = (ids == IMAGE).int()
    return model, inputs


@pytest.mark.parametrize(
    "seeing",
    [
        *("llava", "qwen3_vl"),
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("gemma3", "idefics3", "internvl", "qwen2_vl", "qwen2_5_vl", "qwen3_5", "smolvlm")
        ),
    ],
    indirect=True,
)
@torch.inference_mode()
def test_images_are_seen_as_before(seeing, tmp_path):
    dense, inputs = seeing
    expected = dense(**inputs).logits
    darker = inputs | {"pixel_values": inputs["pixel_values"] / 2}
    assert (dense(**darker).logits - expected).abs().max() > 1e-3, "the image has to matter"
    whole, _ = lorap.compress(
        copy.deepcopy(dense), calibration=[families.windows()], config=families.config(sparsity=0.0), progress=False
    )
    families.assert_close(whole(**inputs).logits, expected)

    small, report = lorap.compress(
        dense, calibration=[families.windows()], config=families.config(sparsity=0.5), progress=False
    )
    found = small(**inputs).logits
    assert (found - expected).abs().max() > 0.1
    lorap.save(small, tmp_path / "small", report=report)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "small").eval()
    families.assert_close(loaded(**inputs).logits, found)
    written = loaded.generate(**inputs, max_new_tokens=6, do_sample=False)
    optimized = lorap.optimize_for_inference(loaded)
    families.assert_close(optimized(**inputs).logits, found)
    assert torch.equal(optimized.generate(**inputs, max_new_tokens=6, do_sample=False), written)
