"""What a checkpoint holds of a low-rank layer: one description, and all who read or write it agree with the layer itself."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from lorap.architectures import ARCHITECTURES, PROJECTIONS
from lorap.checkpoint.build import check_stored, put_layers
from lorap.checkpoint.format import LoRAPConfig
from lorap.checkpoint.headers import read_header
from lorap.checkpoint.paging import OffloadedTensors
from lorap.checkpoint.stored_tensors import Stamp, StoredTensor
from lorap.checkpoint.write import write_tensors
from lorap.compression.runs.steps import put_projections
from lorap.errors import CheckpointError
from lorap.integrations.vllm_projection import Projection, Share
from lorap.nn.linear import LowRankLinear
from lorap.nn.low_rank_tensors import LEFT, PIVOT_ROWS, RIGHT, LowRankTensors

SIZES = [(1, 63, 1), (63, 1, 1), (63, 100, 62), (100, 63, 37)]  # out, in, rank
CASES = [
    LowRankTensors(*sizes, bias, pivoted, guarded)
    for sizes, bias, pivoted, guarded in itertools.product(SIZES, *[(False, True)] * 3)
]
ARCHITECTURE = ARCHITECTURES["llama"]


def layer_of(tensors: LowRankTensors) -> LowRankLinear:
    layer = LowRankLinear(
        tensors.in_features, tensors.out_features, tensors.rank, tensors.bias, pivoted=tensors.pivoted
    )
    layer.put_named_guard(tensors.guarded)
    return layer


def shapes_of(state: dict[str, Tensor]) -> list[tuple[str, tuple[int, ...]]]:
    return [(name, tuple(tensor.shape)) for name, tensor in state.items()]


def model(*, bias: bool) -> LlamaForCausalLM:
    """q is (102, 63), k and v (34, 63), o (63, 102), gate and up (33, 63), down (63, 33)."""
    sizes = {"hidden_size": 63, "intermediate_size": 33, "num_attention_heads": 3, "num_key_value_heads": 1}
    biases = {"attention_bias": bias, "mlp_bias": bias}
    return LlamaForCausalLM(LlamaConfig(vocab_size=7, num_hidden_layers=1, head_dim=34, **sizes, **biases))


def compressed(*, bias: bool, pivoted: bool, version: int = 4) -> tuple[LlamaForCausalLM, LoRAPConfig]:
    """All seven projections at a rank of their own."""
    ranks = {ARCHITECTURE.module_name(0, role): 11 + index for index, role in enumerate(PROJECTIONS)}
    config = LoRAPConfig(ranks=ranks, storage="pivoted" if pivoted else "factors", format_version=version)
    built = model(bias=bias)
    put_layers(built, config)
    return built, config


def store(state: dict[str, Tensor], path: Path) -> dict[str, StoredTensor]:
    write_tensors(path, state)
    return {name: StoredTensor(path, name, info, Stamp.of(path)) for name, info in read_header(path).items()}


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("tensors", CASES, ids=str)
def test_the_description_is_that_of_the_layer(tensors):
    layer = layer_of(tensors)
    state = layer.state_dict()
    assert list(tensors.shapes().items()) == shapes_of(state)
    assert tensors.names() == list(state)
    assert LowRankTensors.of_stored(tensors.shapes(), "q") == tensors
    assert tensors.factor_params == layer.left.weight.numel() + layer.right.weight.numel()
    assert tensors.index_bytes == sum(t.nbytes for name, t in state.items() if name == PIVOT_ROWS)
    assert {name for name, t in state.items() if t.dtype == torch.int64} == state.keys() & {PIVOT_ROWS}
    assert set(tensors.guards) == {name for name, t in layer.named_buffers() if t.is_floating_point()}
    empty = LowRankLinear.empty(tensors, device="meta", dtype=torch.bfloat16)
    assert shapes_of(empty.state_dict()) == shapes_of(state)
    assert {t.dtype for name, t in empty.state_dict().items() if name != PIVOT_ROWS} == {torch.bfloat16}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("pivoted", "version"), [(False, 1), (False, 4), (True, 3), (True, 4)])
def test_every_role_is_built_stored_and_kept_alike(tmp_path, bias, pivoted, version):
    built, config = compressed(bias=bias, pivoted=pivoted, version=version)
    wanted = put_layers(model(bias=bias), config)
    layers = {name: built.get_submodule(name) for name in config.ranks}
    expected = {f"{name}.{key}": t for name, layer in layers.items() for key, t in layer.state_dict().items()}
    assert list(wanted.items()) == shapes_of(expected)
    # transformers' and lorap's own check of the files.
    decoder = built.model.layers[0]
    file = tmp_path / "model.safetensors"
    store(built.state_dict(), file)
    check_stored(built, [str(file)], wanted)
    with pytest.raises(CheckpointError, match="names no such layer"):
        check_stored(built, [str(file)], {})
    # A run that is resumed.
    again = model(bias=bias).model.layers[0]
    stored = store(decoder.state_dict(), tmp_path / "layer.safetensors")
    put_projections(again, stored, ARCHITECTURE)
    OffloadedTensors(stored, torch.device("cpu")).load(again, torch.device("cpu"))
    assert list(again.state_dict()) == list(decoder.state_dict())
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in decoder.state_dict().items())


@pytest.mark.parametrize("tensors", CASES[-16:], ids=str)
def test_a_host_without_tensor_parallelism_loads_what_is_stored(tensors):
    torch.manual_seed(0)
    layer = layer_of(tensors).requires_grad_(False)
    for parameter in layer.parameters():
        parameter.normal_()
    whole = [Share.of(size, 0, 1) for size in (tensors.out_features, tensors.in_features)]
    part = Projection("q", tensors.rank, tensors.pivoted, *whole, tensors.bias, torch.float32)
    for name, tensor in layer.state_dict().items():
        part.load(name, tensor)
    part.finish()
    x = torch.randn(3, tensors.in_features)
    y = part(x) if part.bias is None else part(x) + part.bias
    torch.testing.assert_close(y, layer(x))


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        ({RIGHT: (5, 63)}, ["m.q.right.weight", "m.q.left.weight", "copy it again"]),
        ({RIGHT: (5, 63), LEFT: (100,)}, ["m.q.left.weight", "(5, 63)", "(100,)"]),
        ({RIGHT: (5, 63, 1), LEFT: (100, 5)}, ["m.q.right.weight", "(5, 63, 1)"]),
    ],
)
def test_half_a_layer_is_refused(shapes, words):
    with pytest.raises(CheckpointError) as error:
        LowRankTensors.of_stored(shapes, "m.q")
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize(("sizes", "fits"), [((100, 63, 62), True), ((100, 63, 63), False), ((1, 63, 1), False)])
def test_a_rank_is_smaller_than_both_sides(sizes, fits):
    tensors = LowRankTensors(*sizes)
    if fits:
        tensors.check_rank("m.q")
        return
    with pytest.raises(CheckpointError, match=rf"rank {sizes[2]} of m\.q .*\({sizes[0]}, {sizes[1]}\)"):
        tensors.check_rank("m.q")
