"""A decoder layer's step in one op computes what the layer computes by itself, and steps aside where it would not."""

from __future__ import annotations

import copy
import os
import pickle
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama import modeling_llama

import lorap
from lorap import LowRankLinear
from lorap.architectures import ATTENTION, MLP
from lorap.nn import decoder_layer, native
from lorap.nn.trellis import layer_of
from lorap.weights import INTEGERS, TRELLIS, Coding

pytestmark = pytest.mark.skipif(not native.HAS_CPU, reason="lorap/_native.so is not built")
STEPS, LAYERS = 14, 2
SIZES = {"vocab_size": 61, "hidden_size": 72, "intermediate_size": 88, "num_hidden_layers": LAYERS}
SIZES |= {"num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 256, "head_dim": 12}
FAMILIES: dict[str, Any] = {
    "llama": LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "mistral": MistralConfig(**SIZES, sliding_window=None),
    "qwen2": Qwen2Config(**(SIZES | {"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 24})),
    "qwen3": Qwen3Config(**SIZES),
}
PROMPTS = torch.arange(1, 28).view(3, 9) * 7 % 61
PADDED = torch.ones_like(PROMPTS)
PADDED[0, :4], PADDED[1, :1] = 0, 0


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*C\\+\\+ step is not used.*")
        yield
    torch.set_num_threads(threads)


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The length of the cache at each call of the op; caches get room for 4 more positions at a time, and half."""
    lengths: list[int] = []
    op = decoder_layer._op

    def count(*arguments: Any) -> Tensor:
        lengths.append(arguments[6])
        y: Tensor = op(*arguments)
        return y

    monkeypatch.setattr(decoder_layer, "_op", count)
    monkeypatch.setattr(decoder_layer, "GROWTH", 4)
    return lengths


def make(family: str = "llama", dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A model whose weights, biases and norms all matter."""
    torch.manual_seed(0)
    config = copy.deepcopy(FAMILIES[family])
    for name, value in changes.items():
        setattr(config, name, value)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.2)
    return model


def both(model: Any) -> tuple[Any, Any]:
    """``model`` itself, and what comes of it."""
    return model, lorap.optimize_for_inference(copy.deepcopy(model))


def continued(model: Any, prompts: Tensor = PROMPTS, mask: Tensor | None = None, **options: Any) -> Any:
    mask = torch.ones_like(prompts) if mask is None else mask
    length = {"max_new_tokens": STEPS, "min_new_tokens": STEPS, "do_sample": False, "pad_token_id": 0}
    output = {"return_dict_in_generate": True, "output_logits": True}
    return model.generate(prompts, attention_mask=mask, **(length | output | options))


def assert_same(found: Any, expected: Any, tolerance: float = 1e-4) -> None:
    assert found.sequences.tolist() == expected.sequences.tolist()
    for ours, theirs in zip(found.logits, expected.logits, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance * float(theirs.abs().max()))


ALL_STEPS = [9 + step for step in range(STEPS - 1) for _ in range(LAYERS)]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_steps_are_those_of_the_model(family: str, attention: str, ran: list[int]) -> None:
    plain, ours = both(make(family, _attn_implementation=attention))
    assert_same(continued(ours, mask=PADDED), continued(plain, mask=PADDED))
    assert ran == ALL_STEPS  # past the first room of the cache, and the second
    assert_same(continued(ours, PROMPTS[:1]), continued(plain, PROMPTS[:1]))
    assert ran == 2 * ALL_STEPS
    torch.manual_seed(3)
    found = continued(ours, do_sample=True, temperature=0.7)
    torch.manual_seed(3)
    assert_same(found, continued(plain, do_sample=True, temperature=0.7))


def low_rank(model: Any, roles: tuple[str, ...], *, pivoted: bool = False) -> Any:
    for layer in model.model.layers:
        for role in roles:
            parent = layer.self_attn if role in ATTENTION else layer.mlp
            setattr(parent, role, LowRankLinear.from_linear(getattr(parent, role), 11, pivoted=pivoted).eval())
    return model


def in_few_bits(layer: Any, role: str, coding: Coding, bits: int) -> None:
    """Random numbers, or codes, in groups of 32 in the place of a projection, or of both factors of a pair."""
    path = ("self_attn." if role in ATTENTION else "mlp.") + role
    projection = layer.get_submodule(path)
    pair = isinstance(projection, LowRankLinear)
    for name in (f"{path}.left", f"{path}.right") if pair else (path,):
        old = layer.get_submodule(name)
        new = layer_of(coding).empty_like(old, bits=bits, group_size=32)
        new.weight_packed.random_(-(2**31), 2**31)
        torch.nn.init.uniform_(new.weight_scale, 0.1, 0.3).div_(2 ** (bits - 2) if coding is INTEGERS else 1)
        layer.set_submodule(name, new)


def mixed(model: Any) -> Any:
    """Codes of several bits beside whole numbers and 16 bits, in pairs and dense, in another order in each layer."""
    low_rank(model, ("k_proj", "o_proj", "gate_proj", "up_proj"))
    kinds = [(TRELLIS, 3), (INTEGERS, 4), (TRELLIS, 2), None, (TRELLIS, 4), (TRELLIS, 3), (INTEGERS, 8)]
    for index, layer in enumerate(model.model.layers):
        for place, role in enumerate((*ATTENTION, *MLP)):
            if kind := kinds[(place + 4 * index) % len(kinds)]:
                in_few_bits(layer, role, *kind)
    return model


FORMS = {
    "factors": lambda model: low_rank(model, (*ATTENTION, *MLP)),
    "pivoted": lambda model: low_rank(model, (*ATTENTION, "up_proj"), pivoted=True),
    "some": lambda model: low_rank(low_rank(model, ("k_proj",), pivoted=True), ("q_proj", "down_proj")),
    "int8": lambda model: lorap.quantize(low_rank(model, ("q_proj", "v_proj", "o_proj")), "int8", group_size=32),
    "int4": lambda model: lorap.quantize(low_rank(model, (*ATTENTION, "gate_proj")), "int4", group_size=32),
    "tcq3": lambda model: lorap.quantize(low_rank(model, ("q_proj", "o_proj", "up_proj")), "tcq3", group_size=32),
    "mixed": mixed,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_projection(form: str, dtype: torch.dtype, ran: list[int]) -> None:
    """One step, beside the same layers by themselves: in 16 bits tokens would part at some time, for rounding."""
    ours = lorap.optimize_for_inference(FORMS[form](make(dtype=dtype)))
    plain = copy.deepcopy(ours)
    for layer in plain.model.layers:
        layer.__class__ = modeling_llama.LlamaDecoderLayer
    with torch.no_grad():
        for prompts in (PROMPTS, PROMPTS[:1]):
            found, expected = (model(prompts, use_cache=True) for model in (ours, plain))
            for tokens in (PROMPTS[: len(prompts), :1], PROMPTS[: len(prompts), 1:2]):
                name = "cache" if "cache" in found else "past_key_values"
                found, expected = (
                    model(tokens, **{name: before[name]}, use_cache=True)
                    for model, before in ((ours, found), (plain, expected))
                )
                error = (found.logits - expected.logits).float().norm() / expected.logits.float().norm()
                assert error <= (1e-5 if dtype == torch.float32 else 0.03 if dtype == torch.bfloat16 else 4e-3)
    assert len(ran) == 4 * LAYERS


@pytest.mark.parametrize(
    ("dtype", "steps", "tolerance"), [(torch.float32, 5, 1e-5), (torch.bfloat16, 1, 0.03)], ids=str
)
def test_tokens_with_codes_are_those_of_the_layers_by_themselves(
    dtype: torch.dtype, steps: int, tolerance: float, ran: list[int]
) -> None:
    """Of sixteen sequences at once; in 16 bits tokens would part at some time, for rounding."""
    ours = lorap.optimize_for_inference(mixed(make("qwen2", dtype)))
    plain = copy.deepcopy(ours)
    for layer in plain.model.layers:
        layer.__class__ = type(layer).layer_class
    prompts = torch.arange(16 * 5).view(16, 5) * 11 % 61
    length = {"max_new_tokens": steps + 1, "min_new_tokens": steps + 1}
    assert_same(continued(ours, prompts, **length), continued(plain, prompts, **length), tolerance)
    assert len(ran) == steps * LAYERS


def test_other_ways_to_generate(ran: list[int]) -> None:
    plain, ours = both(make())
    assert_same(continued(ours, mask=PADDED, num_beams=3), continued(plain, mask=PADDED, num_beams=3))
    drafts = make("qwen2")
    for options in ({"assistant_model": drafts}, {"prompt_lookup_num_tokens": 3}, {"cache_implementation": "static"}):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found, expected = (continued(model, PROMPTS[:1], output_logits=False, **options) for model in (ours, plain))
        assert found.sequences.tolist() == expected.sequences.tolist()
    found = continued(ours, output_attentions=True, output_hidden_states=True, mask=PADDED)
    expected = continued(plain, output_attentions=True, output_hidden_states=True, mask=PADDED)
    for name in ("attentions", "hidden_states"):
        for our, their in zip(getattr(found, name), getattr(expected, name), strict=True):
            assert len(our) == len(their)
            for one, other in zip(our, their, strict=True):
                torch.testing.assert_close(one, other, atol=1e-3, rtol=0)


def test_a_window_is_left_to_the_model(ran: list[int]) -> None:
    plain, ours = both(make("mistral", sliding_window=5))
    assert_same(continued(ours, mask=PADDED), continued(plain, mask=PADDED))
    assert not ran


@torch.no_grad()
def test_a_cache_that_somebody_changes(ran: list[int]) -> None:
    """Cut, copied and put back: the room that the op writes to belongs to one cache alone."""
    plain, ours = both(make())
    results = []
    for model in (plain, ours):
        caches = [DynamicCache()]
        name = "cache" if "cache" in model(PROMPTS[:1], use_cache=True) else "past_key_values"

        def step(cache: Any, token: int, model: Any = model, name: str = name) -> Tensor:
            logits: Tensor = model(torch.tensor([[token]]), **{name: cache}, use_cache=True).logits
            return logits

        model(PROMPTS[:1], **{name: caches[0]}, use_cache=True)
        logits = [step(caches[0], token) for token in (3, 4, 5)]
        twin = copy.copy(caches[0])
        twin.layers = [copy.copy(layer) for layer in twin.layers]
        kept = [layer.keys.clone() for layer in twin.layers]
        logits += [step(caches[0], 6), step(twin, 7), step(caches[0], 8)]
        caches[0].crop(-2)
        logits += [step(caches[0], 9), step(twin, 10), step(copy.deepcopy(twin), 11), step(twin, 12)]
        for layer, keys in zip(twin.layers, kept, strict=True):
            assert torch.equal(layer.keys[:, :, : keys.shape[2]], keys)
        results.append(torch.cat(logits))
    torch.testing.assert_close(results[1], results[0], atol=1e-4, rtol=1e-4)
    assert len(ran) == 10 * LAYERS


def test_whatever_is_done_to_a_layer_counts(ran: list[int]) -> None:
    plain, ours = both(make())
    continued(ours)
    for model in (plain, ours):
        with torch.no_grad():
            model.model.layers[0].mlp.down_proj.weight = torch.nn.Parameter(
                model.model.layers[0].mlp.up_proj.weight.T.clone()
            )
            model.model.layers[1].self_attn.o_proj.bias.add_(0.5)
    ran.clear()
    assert_same(continued(ours), continued(plain))
    assert ran == ALL_STEPS
    handles = [
        model.model.layers[0].self_attn.v_proj.register_forward_hook(lambda *call: call[2] * 2)
        for model in (plain, ours)
    ]
    assert_same(continued(ours), continued(plain))
    assert ran == ALL_STEPS + ALL_STEPS[::LAYERS]
    for handle in handles:
        handle.remove()
    for model in (plain, ours):
        low_rank(model, ("q_proj",))
    ran.clear()
    assert_same(continued(ours), continued(plain))
    assert ran == ALL_STEPS
    plain, ours = both(make())
    ran.clear()
    assert_same(continued(ours.double()), continued(plain.double()))
    assert not ran
    assert continued(ours.bfloat16()).sequences.shape == (3, 9 + STEPS)
    assert ran == ALL_STEPS


class Louder(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * 1.3


class DoubleLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class HalfAttention(modeling_llama.LlamaAttention):
    def forward(self, hidden_states: Tensor, *rest: Any, **arguments: Any) -> Any:
        y, scores = super().forward(hidden_states, *rest, **arguments)
        return y / 2, scores


def half_attention(layer: Any) -> None:
    old = layer.self_attn
    layer.self_attn = HalfAttention(old.config, old.layer_idx).eval()
    layer.self_attn._modules = old._modules


def another_norm(layer: Any) -> None:
    layer.input_layernorm = GemmaRMSNorm(72)
    layer.input_layernorm.variance_epsilon = layer.post_attention_layernorm.variance_epsilon


# What may happen to a layer after its first step, without a hook or another weight.
CHANGES: dict[str, Any] = {
    "parametrized": lambda layer: parametrize.register_parametrization(layer.self_attn.k_proj, "weight", Louder()),
    "parametrized bias": lambda layer: parametrize.register_parametrization(layer.self_attn.o_proj, "bias", Louder()),
    "parametrized norm": lambda layer: parametrize.register_parametrization(layer.input_layernorm, "weight", Louder()),
    "masked": lambda layer: prune.l1_unstructured(layer.mlp.down_proj, "weight", 0.5),
    "class of a projection": lambda layer: setattr(layer.self_attn.o_proj, "__class__", DoubleLinear),
    "class of attention": half_attention,
    "another norm": another_norm,
    "epsilon": lambda layer: setattr(layer.post_attention_layernorm, "variance_epsilon", 3.0),
    "dropout": lambda layer: layer.self_attn.train(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_layer_is_left_alone_once_it_computes_something_else(change: str, ran: list[int]) -> None:
    plain, ours = both(make(attention_dropout=0.5, rms_norm_eps=1e-6))
    before = continued(ours, max_new_tokens=3, min_new_tokens=3)
    ran.clear()
    found = []
    decoder_layer._tell_once.cache_clear()
    for model in (plain, ours):
        CHANGES[change](model.model.layers[0])
        torch.manual_seed(3)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found.append(continued(model, max_new_tokens=5, min_new_tokens=5))
    assert_same(found[1], found[0])
    assert not torch.equal(found[1].logits[1], before.logits[1])
    # The other layer goes on, and this one was tried again at most once.
    assert len(ran) - 4 in ((1,) if change in ("another norm", "class of attention") else (0,))


def test_hooks_of_all_modules_are_called(ran: list[int]) -> None:
    plain, ours = both(make())
    continued(ours)
    ran.clear()

    def widen(module: nn.Module, _args: Any, output: Any) -> Any:
        return output * 1.5 if isinstance(module, nn.Linear) and module.out_features in (24, 88) else None

    handle = nn.modules.module.register_module_forward_hook(widen)
    try:
        assert_same(continued(ours), continued(plain))
    finally:
        handle.remove()
    assert not ran


def test_gradients_and_training_go_through_the_model() -> None:
    plain, ours = both(make())
    for model in (plain, ours):
        model.train()
        cache = DynamicCache()
        with torch.no_grad():
            name = "cache" if "cache" in model(PROMPTS, use_cache=True) else "past_key_values"
            model(PROMPTS, **{name: cache}, use_cache=True)
        model(PROMPTS[:, :1], **{name: cache}, use_cache=True).logits.sum().backward()
    for (_, ours_p), (_, plain_p) in zip(ours.named_parameters(), plain.named_parameters(), strict=True):
        torch.testing.assert_close(ours_p.grad, plain_p.grad, atol=1e-3, rtol=1e-3)


def test_a_layer_that_computes_something_else_is_left_alone(ran: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """As if a later transformers changed what its class computes."""
    own = modeling_llama.LlamaRMSNorm.forward
    monkeypatch.setattr(modeling_llama.LlamaRMSNorm, "forward", lambda self, x: own(self, x) * 1.1)
    decoder_layer._tell_once.cache_clear()
    plain, ours = both(make())
    with pytest.warns(RuntimeWarning, match="LlamaDecoderLayer"):
        found = continued(ours, mask=PADDED)
    assert_same(found, continued(plain, mask=PADDED))
    assert ran == [9] * LAYERS
    decoder_layer._tell_once.cache_clear()


@pytest.mark.parametrize("built", ["before", "after"])
def test_a_library_built_before_its_sources_changed_is_the_reason(
    built: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """One that refuses what it is given now."""
    library = tmp_path / "_native.so"
    for index, name in enumerate(("decode.h", "ops.cpp", "_native.so")):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (100 + index, 100 + index))
    if built == "before":
        os.utime(library, (100.5, 100.5))
    monkeypatch.setattr(native, "LIBRARY", library)
    monkeypatch.setattr(native, "SOURCES", tmp_path)

    def refuses(*_: Any) -> None:
        raise RuntimeError("lorap_cpu: unknown form 7")

    monkeypatch.setattr(decoder_layer, "_op", refuses)
    decoder_layer._tell_once.cache_clear()
    with pytest.warns(RuntimeWarning, match=r"unknown form 7.*; its own forward runs") as told:
        continued(both(make())[1])
    said = str(told[0].message)
    assert (native.REBUILD in said and "ops.cpp" in said) == (built == "before")
    assert ("computes something else" in said) == (built == "after")
    decoder_layer._tell_once.cache_clear()


def test_the_layer_keeps_its_name_copies_and_pickles(tmp_path: Any, ran: list[int]) -> None:
    plain, ours = both(make())
    layer = ours.model.layers[0]
    assert isinstance(layer, modeling_llama.LlamaDecoderLayer)
    assert type(layer).__name__ == "LlamaDecoderLayer"
    assert lorap.optimize_for_inference(ours).model.layers[0] is layer
    expected = continued(plain)
    for again in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        ran.clear()
        assert_same(continued(again), expected)
        assert ran == ALL_STEPS
    ours.save_pretrained(tmp_path)
    assert_same(continued(AutoModelForCausalLM.from_pretrained(tmp_path).eval()), expected)


def test_the_op_names_what_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []
    op = decoder_layer._op
    monkeypatch.setattr(decoder_layer, "_op", lambda *arguments: calls.append(arguments) or op(*arguments))
    continued(lorap.optimize_for_inference(make()), PROMPTS[:2])
    good = list(calls[-1])
    rotation, keys, tensors = good[1], good[4], good[7]
    wrong = {
        "rotations": {1: rotation[:1].expand(3, -1, -1), 2: rotation[:1].expand(3, -1, -1)},
        "length of cos": {1: rotation[..., :-2]},
        "no room at position": {6: keys.shape[2]},
        "number of sequences": {4: keys[:1]},
        "too few": {7: tensors[:-1]},
        "weights for a layer": {7: [*tensors, tensors[-1]]},
        "q_proj": {7: [*tensors[:4], tensors[4][:, :-1], *tensors[5:]]},
        "output of k_proj": {7: [*tensors[:6], tensors[6][:-1], tensors[7][:-1], *tensors[8:]]},
        "dtype": {7: [tensors[0].half(), *tensors[1:]]},
        "mask": {3: torch.zeros(2, 3)},
    }
    for text, changes in wrong.items():
        with pytest.raises(RuntimeError, match=text):
            op(*(changes.get(index, argument) for index, argument in enumerate(good)))
