"""Merged projections compute what each projection computed alone, and leave everything else of a model as it was."""

from __future__ import annotations

import copy
import functools
import itertools
import pickle
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from conftest import FAMILIES
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, CompileConfig, GPT2Config, GPT2LMHeadModel

import lorap
from lorap import ArchitectureError, LowRankLinear, merge_shared_inputs, optimize_for_inference
from lorap.nn import dispatch, graphs, implementations, native, ops, padding, warming
from lorap.nn.fused import GatedMLP, SharedInput
from lorap.nn.linear import Linear

Merge = Callable[[Any], Any]
MERGES: list[Merge] = [merge_shared_inputs, optimize_for_inference]
KINDS = ["dense", "compressed", "factorized-ffn"]
QKV = ("q_proj", "k_proj", "v_proj")
GATE_AND_UP = ("gate_proj", "up_proj")

needs_cpu_kernels = pytest.mark.skipif(not native.HAS_CPU, reason="lorap/_native.so is not built")
merges = pytest.mark.parametrize("merge", MERGES, ids=lambda merge: merge.__name__)
families = pytest.mark.parametrize("family", FAMILIES)
kinds = pytest.mark.parametrize("kind", KINDS)

_built: dict[tuple[str, str], Any] = {}


@pytest.fixture
def build(make_model: Any, compress_small: Any) -> Callable[..., Any]:
    """``build(family, kind)``: a model of its own, compressed once per family."""

    def make(family: str = "llama-gqa", kind: str = "compressed") -> Any:
        if (family, kind) not in _built:
            model = make_model(family)
            if kind != "dense":
                options = {"mlp_method": "factorize"} if kind == "factorized-ffn" else {}
                model, _ = compress_small(model, **options)
            _built[family, kind] = model
        return copy.deepcopy(_built[family, kind])

    return make


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def assert_same(found: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * float(expected.abs().max()))


@torch.no_grad()
def outputs(model: Any, tokens: Tensor) -> list[Tensor]:
    """Logits of a long prompt, of a short one, and of a token after each."""
    found = []
    for prompt in (tokens[:1], tokens[:3, :5]):
        first = model(prompt, use_cache=True)
        step = model(tokens[4, : len(prompt)].view(-1, 1), past_key_values=first.past_key_values, use_cache=True)
        found += [first.logits, step.logits]
    return found


def attention(model: Any, layer: int = 0) -> Any:
    return model.model.layers[layer].self_attn


def mlp(model: Any, layer: int = 0) -> Any:
    return model.model.layers[layer].mlp


def attention_input(model: Any, *shape: int) -> Tensor:
    return torch.randn(*shape, model.config.hidden_size)


# --- same results ----------------------------------------------------------------------------------------------------------


@merges
@kinds
@families
def test_logits_with_and_without_cache_are_as_before(family: str, kind: str, merge: Merge, build: Any, tokens: Tensor):
    model = build(family, kind)
    expected = outputs(model, tokens)
    assert merge(model) is model
    for found, want in zip(outputs(model, tokens), expected, strict=True):
        assert_same(found, want)


@kinds
@families
def test_greedy_generation_is_as_before(family: str, kind: str, build: Any, tokens: Tensor) -> None:
    model, options = build(family, kind), {"max_new_tokens": 10, "do_sample": False}
    expected = model.generate(tokens[:2, :6], **options)
    assert torch.equal(optimize_for_inference(model).generate(tokens[:2, :6], **options), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["dense", "compressed"])
def test_two_byte_models(kind: str, dtype: torch.dtype, build: Any, tokens: Tensor) -> None:
    """Also where the dtype changes after merging."""
    model = build("llama-gqa", kind)
    expected = outputs(model.float(), tokens)
    optimize_for_inference(model).to(dtype)
    for found, want in zip(outputs(model, tokens), expected, strict=True):
        assert found.dtype == dtype
        assert_same(found.float(), want, 0.1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_a_cast_model_is_the_one_that_loads_in_that_dtype(
    dtype: torch.dtype, make_model: Any, compress_small: Any, tokens: Tensor, tmp_path: Any
) -> None:
    """Rotary frequencies included, which ``model.to(dtype)`` would round."""
    model, report = compress_small(make_model("llama-gqa"), storage="pivoted")
    lorap.save(model, tmp_path, report=report)
    wide = outputs(model, tokens)
    loaded = optimize_for_inference(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype))
    optimize_for_inference(model, dtype=dtype)
    assert model.dtype == model.config.dtype == loaded.dtype == dtype
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert {name: tensor.dtype for name, tensor in model.state_dict().items()} == {
        name: tensor.dtype for name, tensor in loaded.state_dict().items()
    }
    for found, same, before in zip(outputs(model, tokens), outputs(loaded, tokens), wide, strict=True):
        assert torch.equal(found, same)
        assert_same(found.float(), before, 1e-4 if dtype == torch.float32 else 0.1)


def test_a_cast_to_anything_else_is_refused(build: Any) -> None:
    model = build()
    with pytest.raises(lorap.ConfigError, match=r"cannot cast a model to torch\.int8; choose from torch\.float32, "):
        optimize_for_inference(model, dtype=torch.int8)
    assert not isinstance(mlp(model), GatedMLP)


@needs_cpu_kernels
@pytest.mark.parametrize("kind", KINDS)
def test_a_decode_step_runs_one_op_for_q_k_v_and_one_for_gate_up(
    kind: str, build: Any, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = optimize_for_inference(build("llama-gqa", kind))
    calls = dict.fromkeys(ops.SCHEMAS, 0)

    def counted(name: str, run: Callable[..., Any], *arguments: Any) -> Any:
        calls[name] += 1
        return run(*arguments)

    kernels, choices = implementations.IMPLEMENTATIONS["cpu"], []
    for name in implementations.LINEAR_OPS:
        monkeypatch.setitem(kernels, name, functools.partial(counted, name, kernels[name]))
    choose = dispatch.choose
    monkeypatch.setattr(dispatch, "choose", lambda op, *rest: choices.append(op) or choose(op, *rest))
    with torch.no_grad():
        model(tokens[:1, :1])
    gated = "low_rank_silu_gated_linear" if kind == "factorized-ffn" else "silu_gated_linear"
    down_and_o = {"dense": (2, 0), "compressed": (1, 1), "factorized-ffn": (0, 2)}[kind]
    expected = {
        "low_rank_linear_group": 2,
        gated: 2,
        "linear": 2 * down_and_o[0] + 1,
        "low_rank_linear": 2 * down_and_o[1],
    }
    assert {name: count for name, count in calls.items() if count} == {name: n for name, n in expected.items() if n}
    assert len(choices) == sum(calls.values())  # each call is dispatched once


@needs_cpu_kernels
def test_long_inputs_run_each_projection_by_itself(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = merge_shared_inputs(build())
    monkeypatch.setattr(SharedInput, "_factors", lambda *_: pytest.fail("merged"))
    with torch.no_grad():
        attention(model).q_proj(attention_input(model, 33))


def pivoted_like(layer: Any, bias: bool) -> LowRankLinear:
    rank, out_features = 7, layer.out_features
    rows = torch.randperm(out_features)[:rank].sort().values
    left, right = torch.randn(out_features - rank, rank) / 3, torch.randn(rank, layer.in_features) / 8
    return LowRankLinear.from_factors(left, right, torch.randn(out_features) if bias else None, rows)


@pytest.mark.parametrize("mixture", [QKV, ("q_proj",), ("k_proj", "v_proj")], ids="+".join)
def test_pivoted_and_dense_members_mix(mixture: tuple[str, ...], build: Any, tokens: Tensor) -> None:
    torch.manual_seed(0)
    model = build("llama-gqa", "dense")
    for layer in model.model.layers:
        for name in mixture:
            setattr(layer.self_attn, name, pivoted_like(getattr(layer.self_attn, name), bias=name != "v_proj"))
        layer.mlp.gate_proj = pivoted_like(layer.mlp.gate_proj, bias=True)
    expected = outputs(model, tokens)
    for found, want in zip(outputs(optimize_for_inference(model), tokens), expected, strict=True):
        assert_same(found, want)


# --- same model ------------------------------------------------------------------------------------------------------------


@merges
@kinds
def test_parameters_and_keys_stay(kind: str, merge: Merge, build: Any) -> None:
    model = build("qwen2", kind).eval()
    state, pointers = model.state_dict(), {name: p.data_ptr() for name, p in model.named_parameters()}
    merge(model)
    assert list(model.state_dict()) == list(state)
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == pointers
    assert not any(module.training for module in model.modules())


@merges
def test_tied_embeddings_stay_tied(merge: Merge, build: Any) -> None:
    model = merge(build("llama-gqa"))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.get_output_embeddings() is model.lm_head


@merges
@pytest.mark.parametrize("kind", ["dense", "compressed"])
@pytest.mark.parametrize("family", ["llama-gqa", "qwen2"])
def test_saved_after_merging_it_loads_as_before(
    family: str, kind: str, merge: Merge, make_model: Any, compress_small: Any, tokens: Tensor, tmp_path: Any
) -> None:
    model = make_model(family)
    if kind == "compressed":
        model, report = compress_small(model)
        before = outputs(model, tokens)
        lorap.save(merge(model), tmp_path, report=report)
    else:
        before = outputs(model, tokens)
        merge(model).save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not any(isinstance(module, (GatedMLP, Linear)) for module in loaded.modules())
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in loaded.state_dict().items())
    for found, want in zip(outputs(loaded, tokens), before, strict=True):
        assert_same(found, want, 1e-5)
    loaded.save_pretrained(tmp_path / "again")
    merge(loaded).save_pretrained(tmp_path / "merged")
    again = (tmp_path / "again/model.safetensors").read_bytes()
    assert again == (tmp_path / "merged/model.safetensors").read_bytes()


@merges
@kinds
def test_training_gradients_are_as_before(kind: str, merge: Merge, build: Any, tokens: Tensor) -> None:
    plain = build("qwen2", kind).train()
    merged = merge(copy.deepcopy(plain))
    for model in (plain, merged):
        model(tokens[:2, :7], labels=tokens[:2, :7]).loss.backward()
    pairs = zip(plain.named_parameters(), merged.named_parameters(), strict=True)
    for (name, expected), (found_name, found) in pairs:
        assert found_name == name
        assert expected.grad is not None
        assert_same(found.grad, expected.grad, 1e-5)


@pytest.mark.parametrize("kind", ["dense", "compressed"])
def test_autocast_is_as_before(kind: str, build: Any, tokens: Tensor) -> None:
    model = build("llama-gqa", kind)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = model(tokens[:1, :5]).logits
        assert torch.equal(optimize_for_inference(model)(tokens[:1, :5]).logits, expected)


@pytest.mark.parametrize("merge_again", MERGES, ids=lambda merge: merge.__name__)
@merges
def test_merging_twice_changes_nothing(merge: Merge, merge_again: Merge, build: Any, tokens: Tensor) -> None:
    model = merge(build())
    expected = outputs(model, tokens)
    group, ffn = attention(model).q_proj.group, mlp(model)
    merge_again(model)
    assert attention(model).q_proj.group is group
    assert mlp(model) is ffn
    for found, want in zip(outputs(model, tokens), expected, strict=True):
        assert_same(found, want)


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
def test_copies_are_independent(duplicate: Callable[[Any], Any], build: Any, tokens: Tensor) -> None:
    model = optimize_for_inference(build())
    with torch.no_grad():
        attention(model).q_proj(attention_input(model, 1))  # leaves k and v waiting
    expected = outputs(model, tokens)
    copied = duplicate(model)
    group = attention(copied).q_proj.group
    assert group is attention(copied).k_proj.group
    assert group is not attention(model).q_proj.group
    assert all(found is getattr(attention(copied), name) for found, name in zip(group.members, QKV, strict=True))
    for found, want in zip(outputs(copied, tokens), expected, strict=True):
        assert torch.equal(found, want)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
    for found, want in zip(outputs(model, tokens), expected, strict=True):
        assert torch.equal(found, want)
    assert not any(found.any() for found in outputs(copied, tokens))


@kinds
def test_compiles_into_one_graph(kind: str, build: Any, tokens: Tensor) -> None:
    """One layer for each number of tokens: decoding, and a prompt that is too long for the merged ops."""
    model = build("llama-gqa", kind)
    model.model.layers = model.model.layers[:1]
    with torch.no_grad():
        expected = [model(tokens[:1, :length], use_cache=False).logits for length in (1, 32)]
        torch._dynamo.reset()
        compiled = torch.compile(optimize_for_inference(model), fullgraph=True, backend="aot_eager", dynamic=False)
        for length, want in zip((1, 32), expected, strict=True):
            assert_same(compiled(tokens[:1, :length], use_cache=False).logits, want)
    torch._dynamo.reset()


# --- the projections by themselves -----------------------------------------------------------------------------------------


def qkv(model: Any, x: Tensor, order: tuple[str, ...] = QKV) -> dict[str, Tensor]:
    return {name: getattr(attention(model), name)(x) for name in order}


@torch.no_grad()
@pytest.mark.parametrize("kind", ["dense", "compressed"])
@pytest.mark.parametrize(
    "order",
    [("k_proj",), ("v_proj", "q_proj"), ("v_proj", "k_proj", "q_proj"), ("q_proj", "q_proj", "k_proj", "q_proj")],
    ids="+".join,
)
def test_any_order_and_any_one_alone(order: tuple[str, ...], kind: str, build: Any) -> None:
    model = build("llama-gqa", kind)
    merged = merge_shared_inputs(copy.deepcopy(model))
    for _ in range(2):
        x = attention_input(model, 1, 3)
        for name in order:
            assert_same(getattr(attention(merged), name)(x), getattr(attention(model), name)(x), 1e-5)


@torch.no_grad()
def test_interleaved_inputs_do_not_mix(build: Any) -> None:
    model = build()
    merged = merge_shared_inputs(copy.deepcopy(model))
    inputs = [attention_input(model, 1, 3) for _ in range(3)]
    for name in ("q_proj", "k_proj", "v_proj", "k_proj"):
        for x in inputs:
            assert_same(getattr(attention(merged), name)(x), getattr(attention(model), name)(x), 1e-5)


@needs_cpu_kernels
@torch.no_grad()
def test_an_input_changed_in_place_is_computed_again(build: Any) -> None:
    model = build()
    merged = merge_shared_inputs(copy.deepcopy(model))
    x = attention_input(model, 1, 3)
    attention(merged).q_proj(x)
    x.mul_(2)
    assert_same(attention(merged).k_proj(x), attention(model).k_proj(x), 1e-5)


@torch.no_grad()
@needs_cpu_kernels
def test_nothing_waits_once_all_are_collected(build: Any) -> None:
    model = merge_shared_inputs(build())
    group, x = attention(model).q_proj.group, attention_input(model, 1)
    attention(model).q_proj(x)
    assert group._waiting is not None
    attention(model).v_proj(x)
    attention(model).k_proj(x)
    assert group._waiting is None


def test_two_threads_share_a_merged_model(build: Any, tokens: Tensor) -> None:
    model = optimize_for_inference(build())
    prompts = [tokens[i : i + 1, :9] for i in range(2)]
    with torch.no_grad():
        expected = [model(prompt).logits for prompt in prompts]
    wrong: list[int] = []

    def run(index: int) -> None:
        with torch.no_grad():
            for _ in range(40):
                if not torch.equal(model(prompts[index]).logits, expected[index]):
                    wrong.append(index)

    threads = [threading.Thread(target=run, args=[index]) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# --- hooks and adapters ----------------------------------------------------------------------------------------------------


class Adapter(nn.Module):
    """What a LoRA library puts in the place of a linear layer."""

    def __init__(self, base: Any) -> None:
        super().__init__()
        self.base_layer, self.added = base, nn.Linear(base.in_features, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.added(x)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("kind", KINDS)
def test_adapters_keep_working(kind: str, when: str, build: Any, tokens: Tensor) -> None:
    torch.manual_seed(0)
    model = build("llama-gqa", kind)
    plain = copy.deepcopy(model)
    if when == "after":
        optimize_for_inference(model)
    for name in ("q_proj", "v_proj"):
        adapter = Adapter(getattr(attention(plain), name))
        setattr(attention(plain), name, adapter)
        ours = Adapter(getattr(attention(model), name))
        ours.added = copy.deepcopy(adapter.added)
        setattr(attention(model), name, ours)
    mlp(plain).up_proj = Adapter(mlp(plain).up_proj)
    ours = Adapter(mlp(model).up_proj)
    ours.added = copy.deepcopy(mlp(plain).up_proj.added)
    mlp(model).up_proj = ours
    if when == "before":
        optimize_for_inference(model)
    for found, want in zip(outputs(model, tokens), outputs(plain, tokens), strict=True):
        assert_same(found, want)


HOOKED = [
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.o_proj",
    "mlp",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
]


@pytest.mark.parametrize(
    ("kind", "name", "when"),
    list(itertools.product(KINDS, HOOKED, ("before", "after"))),
)
def test_hooks_keep_firing(kind: str, name: str, when: str, build: Any, tokens: Tensor) -> None:
    model, seen = build("llama-gqa", kind), []

    def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        seen.append(output.shape)
        return output * 2

    plain = copy.deepcopy(model)
    plain.model.layers[0].get_submodule(name).register_forward_hook(hook)
    expected = outputs(plain, tokens)
    count = len(seen)
    if when == "after":
        optimize_for_inference(model)
    model.model.layers[0].get_submodule(name).register_forward_hook(hook)
    optimize_for_inference(model)
    for found, want in zip(outputs(model, tokens), expected, strict=True):
        assert_same(found, want)
    assert len(seen) == 2 * count


# --- what cannot be merged -------------------------------------------------------------------------------------------------


@merges
def test_an_unknown_family_is_refused(merge: Merge) -> None:
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=20))
    with pytest.raises(
        ArchitectureError, match="cannot merge the projections of model type 'gpt2'; known: llama, mistral"
    ):
        merge(model)


@merges
@pytest.mark.parametrize("named", ["hidden_act", "act_fn"])
def test_an_ffn_of_another_activation_stays_as_it_is(named: str, merge: Merge, make_model: Any, tokens: Tensor) -> None:
    """Where a config names it in another field than most do (Gemma: ``hidden_activation``), only the module knows it."""
    model = make_model("llama-gqa", **({"hidden_act": "gelu"} if named == "hidden_act" else {}))
    if named == "act_fn":
        for layer in model.model.layers:
            layer.mlp.act_fn = torch.nn.GELU(approximate="tanh")
    with torch.no_grad():
        expected = model(tokens).logits
        merge(model)
        assert not any(isinstance(module, GatedMLP) for module in model.modules())
        torch.testing.assert_close(model(tokens).logits, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
    kind = Linear if merge is optimize_for_inference else torch.nn.Linear
    assert {type(layer.mlp.get_submodule(role)) for layer in model.model.layers for role in GATE_AND_UP} == {kind}


@merges
@pytest.mark.parametrize("activation", [torch.nn.SiLU(), torch.nn.functional.silu])
def test_silu_is_known_in_every_form(activation: Any, merge: Merge, make_model: Any) -> None:
    model = make_model("llama-gqa", hidden_act="swish")
    for layer in model.model.layers:
        del layer.mlp.act_fn
        layer.mlp.act_fn = activation
    merge(model)
    assert sum(isinstance(module, GatedMLP) for module in model.modules()) == 2


# --- warming up ------------------------------------------------------------------------------------------------------------


@kinds
def test_warming_up_runs_every_op_that_a_step_runs(kind: str, build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With all their sizes, and on nothing without a GPU, for which this CPU stands in."""
    model, calls = optimize_for_inference(build("llama-gqa", kind)), []
    run = ops._run

    def recorded(op: str, x: Tensor, *rest: Any, **options: Any) -> Any:
        sizes = tuple(tuple(t.shape) for t in torch.utils._pytree.tree_leaves(rest) if isinstance(t, Tensor))
        calls.append((op, x.shape[:-1].numel(), sizes, graphs._warming.get()))
        return run(op, x, *rest, **options)

    monkeypatch.setattr(ops, "_run", recorded)
    lorap.warm_up(model, tokens=[1, 3])
    assert not calls
    monkeypatch.setattr(warming, "_compiles_on", lambda device: True)
    lorap.warm_up(model, tokens=[1, 3])
    warmed, calls[:] = {call[:3] for call in calls if call[3]}, []
    with torch.no_grad():
        model(torch.zeros(3, 1, dtype=torch.int64))
        model(torch.zeros(1, 1, dtype=torch.int64))
    assert {call[:3] for call in calls} - warmed == set()
    assert not any(call[3] for call in calls)
    assert attention(model).q_proj.group._waiting is None


def test_warming_up_never_stops_a_model(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama-gqa", "compressed")

    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("out of shared memory")

    monkeypatch.setattr(warming, "_compiles_on", lambda device: True)
    monkeypatch.setattr(ops, "_run", fail)
    warming._tell_once.cache_clear()
    with pytest.warns(
        RuntimeWarning, match="leave their work to torch, for 2 tokens: RuntimeError: out of shared memory"
    ):
        lorap.warm_up(model, tokens=2)
    with pytest.raises(lorap.ConfigError, match="cannot warm up for 0 tokens"):
        lorap.warm_up(model, tokens=[1, 0])


@needs_cpu_kernels
@pytest.mark.parametrize("weights", ["float", "int4", "tcq3"])
def test_compile_lets_generate_capture_its_steps(weights: str, build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a static cache a step compiles into one graph, which is what a GPU captures; on a CPU nothing changes."""
    model = build("llama-gqa", "dense" if weights != "float" else "compressed")
    if weights != "float":
        lorap.quantize(model, weights)
    options = {"max_new_tokens": 7, "min_new_tokens": 7, "do_sample": False, "pad_token_id": 0}
    prompts = torch.tensor([[5, 9, 2], [11, 3, 8]])
    expected = model.generate(prompts, **options)

    optimize_for_inference(model, compile=True)
    assert model.generation_config.cache_implementation is None

    monkeypatch.setattr(warming, "_compiles_on", lambda device: True)
    optimize_for_inference(model, compile=True)
    config = CompileConfig(fullgraph=True, backend="aot_eager", mode=None)
    config._compile_all_devices = True
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    assert torch.equal(model.generate(prompts, compile_config=config, **options), expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1
    torch._dynamo.reset()


def test_optimizing_warms_up(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr("lorap.nn.fused.warm_up", seen.append)
    model = optimize_for_inference(build())
    assert seen == [model]


# --- ranks that are no multiple of 16 --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["compressed", "factorized-ffn"])
def test_padded_factors_compute_the_same_and_are_saved_as_they_were(
    kind: str, build: Any, tokens: Tensor, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    """As on a GPU in 16 bits, for which this CPU stands in; until something moves the factors or wants their gradients."""
    model = build("llama-gqa", kind)
    plain, state = copy.deepcopy(model), {key: tensor.clone() for key, tensor in model.state_dict().items()}
    expected, seen = outputs(model, tokens), set()
    monkeypatch.setattr(padding, "gains", lambda weight: True)
    run = ops._run

    def recorded(op: str, x: Tensor, *rest: Any, **options: Any) -> Any:
        if "low_rank" in op:
            seen.update(len(right) % 16 for right in ([rest[0]] if isinstance(rest[0], Tensor) else rest[0]))
        return run(op, x, *rest, **options)

    optimize_for_inference(model)
    layers = [module for module in model.modules() if isinstance(module, LowRankLinear)]
    odd = [layer for layer in layers if layer.rank % 16]
    assert odd
    assert all((layer.padded is not None) == (layer in odd) for layer in layers)
    monkeypatch.setattr(ops, "_run", recorded)
    for found, want in zip(outputs(model, tokens), expected, strict=True):
        assert_same(found, want)
    assert seen == {0}
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(tensor, state[key]) for key, tensor in loaded.state_dict().items())

    model(tokens[:1, :5], labels=tokens[:1, :5]).loss.backward()
    plain(tokens[:1, :5], labels=tokens[:1, :5]).loss.backward()
    assert_same(odd[0].right.weight.grad, dict(plain.named_parameters())[name_of(model, odd[0].right.weight)].grad)
    with torch.no_grad():
        odd[0].left.weight.mul_(0)  # in place: the padded one follows
        assert not odd[0](torch.randn(3, odd[0].in_features)).any()
        odd[1].left.weight.data = torch.zeros_like(odd[1].left.weight)  # another tensor: the padded one is left behind
        assert not odd[1](torch.randn(3, odd[1].in_features)).any()
        assert copy.deepcopy(odd[2])(torch.ones(1, odd[2].in_features)).any()
        assert model.double().dtype == torch.float64
        assert odd[2](torch.ones(1, odd[2].in_features, dtype=torch.float64)).dtype == torch.float64


def name_of(model: Any, weight: Tensor) -> str:
    return next(name for name, parameter in model.named_parameters() if parameter is weight)
