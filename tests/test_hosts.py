"""What people do with a model in transformers works with a compressed one, and gives what its dense twin gives.

The twin is the reconstructed model: ordinary layers, no op of ours. Each test runs the model as it was loaded and as
``lorap.optimize_for_inference`` leaves it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig, StaticCache, pipeline

import lorap

# Small random models say one token over and over; without repeating, the whole ranking of the logits has to agree.
VARIED = {"no_repeat_ngram_size": 1, "suppress_tokens": [0, 1]}  # <eos> and <pad>
GREEDY = {"max_new_tokens": 10, "do_sample": False, **VARIED}
GROUPED = ["llama-gqa", "qwen2"]


@pytest.fixture(scope="module")
def folders(make_model, tokens, tmp_path_factory) -> dict[str, Any]:
    """Compressed folders by family, pivoted and with layers of different widths where the recipe is free to choose."""
    found = {}
    for family in GROUPED:
        config = lorap.CompressionConfig(sparsity=0.4, num_calibration_samples=8, calibration_seq_len=32)
        model, report = lorap.compress(make_model(family), calibration=tokens, config=config, progress=False)
        assert len({layer.mlp.down_proj.in_features for layer in model.model.layers}) == 2
        found[family] = lorap.save(model, tmp_path_factory.mktemp("hosts") / family, report=report)
    return found


@pytest.fixture(params=["loaded", "optimized"])
def state(request) -> str:
    return request.param


@pytest.fixture(params=GROUPED)
def pair(request, state, folders) -> tuple[Any, Any]:
    """(model, its dense twin)."""
    model = AutoModelForCausalLM.from_pretrained(folders[request.param])
    twin = lorap.reconstruct(copy.deepcopy(model))
    return (lorap.optimize_for_inference(model) if state == "optimized" else model), twin


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def assert_close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * float(expected.abs().max()))


# --- generate --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"do_sample": False}, id="greedy"),
        pytest.param({"do_sample": False, "cache_implementation": "static"}, id="static-cache"),
        pytest.param({"do_sample": False, "use_cache": False}, id="no-cache"),
        pytest.param({"do_sample": True, "temperature": 0.8, "top_p": 0.9, "top_k": 40}, id="sampling"),
        pytest.param({"do_sample": True, "num_return_sequences": 3}, id="three-samples"),
        pytest.param({"do_sample": False, "num_beams": 4, "length_penalty": 0.7}, id="beams"),
        pytest.param({"do_sample": True, "num_beams": 3, "num_return_sequences": 2}, id="sampled-beams"),
        pytest.param({"do_sample": False, "prompt_lookup_num_tokens": 3}, id="prompt-lookup"),
    ],
)
def test_generates_what_the_dense_twin_generates(options, pair, tokens) -> None:
    found, expected = (_generate(model, tokens[:1, :9], options) for model in pair)
    assert torch.equal(found, expected)
    assert found.shape[1] == 9 + 10
    assert len(set(found[0, 9:].tolist())) == 10


def test_a_draft_model_writes_what_the_large_one_would(pair, folders, make_model, tokens) -> None:
    """Assisted decoding: greedy tokens are those of the large model, whatever the draft proposes."""
    large = make_model("llama-gqa")
    expected = large.generate(tokens[:1, :9], **GREEDY)
    assert torch.equal(large.generate(tokens[:1, :9], assistant_model=pair[0], **GREEDY), expected)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_a_left_padded_batch_is_each_prompt_alone(cache, pair, tokens, tokenizer) -> None:
    model, _ = pair
    lengths = (3, 11, 7, 16)
    prompts = [tokens[row, :length] for row, length in enumerate(lengths)]
    alone = [model.generate(prompt[None], **GREEDY)[0, len(prompt) :] for prompt in prompts]
    longest = max(lengths)
    ids = torch.full((4, longest), tokenizer.pad_token_id)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = prompt
        mask[row, longest - len(prompt) :] = 1
    together = model.generate(ids, attention_mask=mask, cache_implementation=cache, **GREEDY)[:, longest:]
    assert torch.equal(together, torch.stack(alone))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_implementations(attention, state, folders, tokens) -> None:
    model = AutoModelForCausalLM.from_pretrained(folders["llama-gqa"], attn_implementation=attention)
    twin = lorap.reconstruct(copy.deepcopy(model))
    if state == "optimized":
        lorap.optimize_for_inference(model)
    assert model.config._attn_implementation == attention
    with torch.no_grad():
        assert_close(model(tokens).logits, twin(tokens).logits)


def test_pipeline_on_a_batch_of_texts(pair, tokenizer, tokens) -> None:
    model, twin = pair
    texts = [tokenizer.decode(tokens[row, :length]) for row, length in ((0, 5), (1, 12), (2, 8))]
    left = copy.deepcopy(tokenizer)
    left.padding_side = "left"
    found, expected = (
        pipeline("text-generation", model=one, tokenizer=left, device="cpu", batch_size=3)(texts, **GREEDY)
        for one in (model, twin)
    )
    assert found == expected
    assert all(len(result[0]["generated_text"]) > len(text) for result, text in zip(found, texts, strict=True))


def test_device_map_auto(state, folders, tokens) -> None:
    model = AutoModelForCausalLM.from_pretrained(folders["llama-gqa"], device_map="auto")
    twin = lorap.reconstruct(AutoModelForCausalLM.from_pretrained(folders["llama-gqa"])).to(model.device)
    if state == "optimized":
        lorap.optimize_for_inference(model)
    prompt = tokens[:2, :9].to(model.device)
    assert torch.equal(model.generate(prompt, **GREEDY), twin.generate(prompt, **GREEDY))


# --- torch.compile ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow  # tests/test_merging.py compiles a smaller one
@pytest.mark.usefixtures("fresh_compiler")
def test_a_decode_step_compiles_into_one_graph(state, folders, tokens) -> None:
    """The whole model, with a static cache as `generate` uses it; a graph break anywhere would raise."""
    model = AutoModelForCausalLM.from_pretrained(folders["llama-gqa"])
    with torch.no_grad():
        expected = model(tokens[:1, :14]).logits
        if state == "optimized":
            lorap.optimize_for_inference(model)
        cache = StaticCache(config=model.config, max_cache_len=32)
        step = torch.compile(model.forward, fullgraph=True, mode="reduce-overhead")
        model(tokens[:1, :9], past_key_values=cache)
        for index in range(9, 14):
            position = torch.tensor([[index]])
            found = step(tokens[:1, index : index + 1], past_key_values=cache, position_ids=position).logits
            assert_close(found, expected[:, index : index + 1])


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("length", [1, 40], ids=["decode", "prefill"])
def test_our_modules_compile_without_graph_breaks(length, state, folders) -> None:
    model = AutoModelForCausalLM.from_pretrained(folders["qwen2"])
    layer = (lorap.optimize_for_inference(model) if state == "optimized" else model).model.layers[0]
    x = torch.randn(1, length, 64, generator=torch.Generator().manual_seed(0))
    modules = [layer.mlp, layer.self_attn.q_proj, layer.self_attn.o_proj]
    assert isinstance(modules[1], lorap.LowRankLinear)
    with torch.no_grad():
        for module in modules:
            explained = torch._dynamo.explain(module)(x)
            assert explained.graph_break_count == 0, explained.break_reasons
            assert_close(torch.compile(module, fullgraph=True)(x), module(x))


# --- edits -----------------------------------------------------------------------------------------------------------------


def test_saved_after_edits_it_loads_with_them(pair, tokens, tokenizer, tmp_path) -> None:
    """More tokens, other weights, another dtype, other generation settings."""
    model, _ = pair
    model.resize_token_embeddings(len(tokenizer) + 3)
    projection = model.model.layers[1].self_attn.q_proj
    with torch.no_grad():
        projection.left.weight.mul_(1.5)
        model.model.layers[0].mlp.down_proj.weight.neg_()
    model.generation_config = GenerationConfig(max_new_tokens=7, do_sample=True, temperature=0.6)
    lorap.optimize_for_inference(model, dtype=torch.bfloat16).save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.dtype == torch.bfloat16
    assert again.get_input_embeddings().weight.shape[0] == len(tokenizer) + 3
    assert (again.generation_config.max_new_tokens, again.generation_config.temperature) == (7, 0.6)
    state = model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in again.state_dict().items())
    with torch.no_grad():
        assert_close(again(tokens).logits.float(), model(tokens).logits.float(), 0.05)


def test_a_removed_layer_is_missed(folders, tmp_path) -> None:
    """Edits that the marks in the config do not follow are refused by name when the model is opened again."""
    model = AutoModelForCausalLM.from_pretrained(folders["llama-gqa"])
    model.model.layers = model.model.layers[:1]
    model.config.num_hidden_layers = 1
    model.save_pretrained(tmp_path)
    with pytest.raises(lorap.CheckpointError, match=r"names model\.layers\.1\..*, but the model has no such layer"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def _generate(model: Any, prompt: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
    torch.manual_seed(0)
    return model.generate(prompt, max_new_tokens=10, **VARIED, **options)
