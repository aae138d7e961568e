"""benchmarks/quality/rivals: SliceGPT and MoDeGPT as the papers have them, on tiny random models in float64.

Proved here: a rotation with nothing left out changes nothing, and with components left out the model is the dense one whose
hidden states are projected; what MoDeGPT keeps and refits is what its formulas say, against sums of real activations; both say
how many parameters their own shapes hold. Not proved: that the papers' tables come out.
"""

from __future__ import annotations

import copy
import importlib
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lorap.calibration.context import DecoderContext
from lorap.calibration.stream import CalibrationStream
from lorap.calibration.windows import TokenWindows
from lorap.errors import ConfigError

QUALITY = Path(__file__).resolve().parent.parent / "benchmarks" / "quality"
CPU = torch.device("cpu")
IDS = torch.randint(3, 400, (8, 40), generator=torch.Generator().manual_seed(3))
WINDOWS = TokenWindows(IDS, "ids", "")


@pytest.fixture(autouse=True)
def rivals(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(QUALITY))
    return importlib.import_module("rivals")


def context_of(model: Any) -> DecoderContext:
    return DecoderContext.of(model, device=CPU)


def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        return model(ids).logits


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(shape[0]), dtype=torch.float64)


def decoder_params(model: Any) -> int:
    context = context_of(model)
    return sum(o * i for layer in context.layers for o, i in context.architecture.shapes(layer).values())


# ----------------------------------------------------------------------------------------------------------------------
# SliceGPT


@pytest.mark.parametrize("tied", [True, False])
def test_a_rotation_changes_nothing(make_model: Any, rivals: Any, *, tied: bool) -> None:
    model = make_model("llama-gqa", tie_word_embeddings=tied).double()
    expected = logits(model)
    rivals.RIVALS["slicegpt"](sparsity=0.0, kept=64).compress(context_of(model), WINDOWS)
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5)


def projected_logits(model: Any, kept: int) -> Tensor:
    """The dense model, whose hidden states are projected, before every norm, onto the principal directions of what it gives.

    In the coordinates of the dense model that is all that SliceGPT does; means of squares stay over all components.
    """
    stream = CalibrationStream.from_windows(context_of(model), WINDOWS)
    eps = model.config.rms_norm_eps

    def normed(x: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + eps).sqrt()

    def projection(hidden: list[Tensor]) -> Tensor:
        x = torch.cat([normed(one).flatten(0, 1) for one in hidden])
        directions = torch.linalg.svd(x, full_matrices=False).Vh[:kept]
        return directions.T @ directions

    hidden = [batch.hidden for batch in stream.batches]
    p = projection(hidden)
    hidden = [x @ p for x in hidden]
    for index, layer in enumerate(model.model.layers):
        given = [batch.layer_kwargs[index] for batch in stream.batches]
        for step in ("attention", "mlp"):
            if step == "attention":
                hidden = [
                    x + layer.self_attn(hidden_states=layer.input_layernorm(x), **kw)[0]
                    for x, kw in zip(hidden, given, strict=True)
                ]
            else:
                hidden = [x + layer.mlp(layer.post_attention_layernorm(x)) for x in hidden]
            p = projection(hidden)
            hidden = [x @ p for x in hidden]
    return torch.cat([model.lm_head(model.model.norm(x)) for x in hidden])


@pytest.mark.parametrize("kept", [63, 31])
def test_slicing_is_projecting_the_hidden_states(make_model: Any, rivals: Any, kept: int) -> None:
    dense = make_model("llama-gqa").double()
    with torch.no_grad():
        expected = projected_logits(copy.deepcopy(dense), kept)
    rivals.RIVALS["slicegpt"](sparsity=0.0, kept=kept).compress(context_of(dense), WINDOWS)
    torch.testing.assert_close(logits(dense), expected, rtol=0, atol=1e-5)
    assert float((expected - logits(make_model("llama-gqa").double())).abs().max()) > 0.1


@pytest.mark.parametrize("sparsity", [0.2, 0.5])
def test_slices_are_as_wide_as_the_sparsity_allows(make_model: Any, rivals: Any, sparsity: float) -> None:
    model = make_model("llama-gqa")
    total, dense = sum(one.numel() for one in model.parameters()), decoder_params(model)
    norms = sum(one.numel() for one in model.parameters() if one.ndim == 1)
    after = rivals.RIVALS["slicegpt"](sparsity=sparsity).compress(context_of(model), WINDOWS)
    assert sum(one.numel() for one in model.parameters()) == total - norms - dense + after
    width = model.model.layers[0].self_attn.q_proj.in_features
    wider = make_model("llama-gqa")
    more = rivals.RIVALS["slicegpt"](sparsity=sparsity, kept=width + 1).compress(context_of(wider), WINDOWS)
    assert after <= (1 - sparsity) * dense < more


def test_biases_are_no_part_of_what_slices_save(make_model: Any, rivals: Any) -> None:
    after = [
        rivals.RIVALS["slicegpt"](sparsity=0.3).compress(context_of(make_model("llama-gqa", **biases)), WINDOWS)
        for biases in ({}, {"attention_bias": True, "mlp_bias": True})
    ]
    assert after[0] == after[1]


@pytest.mark.parametrize(("rival", "message"), [("slicegpt", "less than one component"), ("modegpt", "0.8 that every")])
def test_more_than_a_method_can_give_is_refused(make_model: Any, rivals: Any, rival: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        rivals.RIVALS[rival](sparsity=0.99).compress(context_of(make_model("llama-gqa")), WINDOWS)


def test_a_model_that_is_not_built_as_llama_is_refused(make_model: Any, rivals: Any, tmp_path: Path) -> None:
    cells = importlib.import_module("cells")
    make_model("qwen3").save_pretrained(tmp_path)
    specification = {"model": str(tmp_path), "calibration": "default"}
    with pytest.raises(ConfigError, match="is a qwen3 model, and modegpt is written for llama and mistral"):
        cells._by_rival(cells.Cell(recipe="modegpt", sparsity=0.2), specification)


# ----------------------------------------------------------------------------------------------------------------------
# MoDeGPT


def test_nothing_removed_is_the_dense_model(make_model: Any, rivals: Any) -> None:
    model = make_model("llama-gqa").double()
    expected, params = logits(model), decoder_params(model)
    assert rivals.RIVALS["modegpt"](sparsity=0.0).compress(context_of(model), WINDOWS) == params
    torch.testing.assert_close(logits(model), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("epsilon", [0.0, 0.1])
@pytest.mark.parametrize("sparsity", [0.2, 0.5])
def test_the_parameters_are_those_of_its_shapes(make_model: Any, rivals: Any, sparsity: float, epsilon: float) -> None:
    model = make_model("llama-gqa").double()
    dense, hidden = decoder_params(model), model.config.hidden_size
    after = rivals.RIVALS["modegpt"](sparsity=sparsity, epsilon=epsilon).compress(context_of(model), WINDOWS)
    assert (1 - sparsity) * dense - 3 * hidden * len(model.model.layers) - 1 <= after <= (1 - sparsity) * dense
    rows = 0
    for layer in model.model.layers:
        heads = layer.self_attn
        rows += sum(int(w.weight.any(1).sum()) for w in (heads.q_proj, heads.k_proj, heads.v_proj))
        rows += int(heads.o_proj.weight.any(0).sum()) + 3 * layer.mlp.down_proj.in_features
    assert after == rows * hidden


def test_rotary_pairs_of_highest_energies_stay(rivals: Any) -> None:
    """By the activations themselves, rotated at random, for two keys of three heads each."""
    size, keys, group, hidden, pairs = 10, 2, 3, 14, 3
    query, key = (nn.Linear(hidden, n * size, bias=False).double() for n in (keys * group, keys))
    query.weight.data, key.weight.data = normal(keys * group * size, hidden), normal(keys * size, hidden)
    x = normal(300, hidden) * torch.linspace(0.1, 2, hidden, dtype=torch.float64)
    old_q, old_k = query.weight.data.clone(), key.weight.data.clone()
    q, k = ((x @ w.T).view(300, -1, 2, size // 2) for w in (old_q, old_k))
    angle = torch.arange(300, dtype=torch.float64)[:, None] * torch.linspace(0.01, 1, size // 2, dtype=torch.float64)
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]

    def energies(z: Tensor) -> Tensor:
        turned = torch.stack((z[:, :, 0] * cos - z[:, :, 1] * sin, z[:, :, 1] * cos + z[:, :, 0] * sin), 2)
        return turned.square().sum((0, 2))

    scores = torch.stack([energies(k)[j] * sum(energies(q)[j * group + h] for h in range(group)) for j in range(keys)])
    rivals.modegpt.keep_pairs(query, key, x.T @ x, size, pairs)
    for head in range(keys):
        kept = set(scores[head].topk(pairs).indices.tolist())
        stays = torch.tensor([i % (size // 2) in kept for i in range(size)])
        for new, old, at in [(key, old_k, [head]), (query, old_q, range(head * group, (head + 1) * group))]:
            for one in at:
                rows = slice(one * size, (one + 1) * size)
                assert torch.equal(new.weight.data[rows], old[rows] * stays[:, None])


@pytest.mark.parametrize(("group", "rank"), [(1, 4), (3, 7)])
def test_values_and_outputs_are_the_best_of_their_rank(rivals: Any, group: int, rank: int) -> None:
    size, values, hidden = 9, 2, 21
    value = nn.Linear(hidden, values * size, bias=False).double()
    output = nn.Linear(values * group * size, hidden, bias=False).double()
    value.weight.data, output.weight.data = normal(values * size, hidden), normal(hidden, values * group * size)
    x = normal(200, hidden) * torch.linspace(0.1, 3, hidden, dtype=torch.float64)

    def products(head: int) -> Tensor:
        """(hidden, group hidden): V^T O^T of the heads that read one value, side by side."""
        v = value.weight.data[head * size : (head + 1) * size]
        columns = [slice((head * group + h) * size, (head * group + h + 1) * size) for h in range(group)]
        return torch.cat([v.T @ output.weight.data[:, at].T for at in columns], 1)

    dense = [products(head) for head in range(values)]
    rivals.modegpt.share_values(value, output, x.T @ x, size, rank)
    root = torch.linalg.cholesky(x.T @ x).T
    for head in range(values):
        u, s, vh = torch.linalg.svd(root @ dense[head], full_matrices=False)
        best = torch.linalg.solve(root, u[:, :rank] * s[:rank] @ vh[:rank])
        torch.testing.assert_close(products(head), best, rtol=1e-8, atol=1e-8)
        assert not value.weight.data[head * size + rank : (head + 1) * size].any()
    assert not output.weight.data.view(hidden, -1, size)[..., rank:].any()


def test_an_ffn_keeps_leverage_and_refits(rivals: Any) -> None:
    mlp = nn.Module()
    mlp.gate_proj, mlp.up_proj = nn.Linear(7, 33, bias=False).double(), nn.Linear(7, 33, bias=False).double()
    mlp.down_proj = nn.Linear(33, 7, bias=False).double()
    old = {name: module.weight.data.clone() for name, module in mlp.named_children()}
    inner = normal(500, 12) @ normal(12, 33) + 0.3 * normal(500, 33) * torch.linspace(0.1, 2, 33, dtype=torch.float64)
    c = inner.T @ inner
    rivals.modegpt.prune_ffn(mlp, c, 20, 1.0)
    leverage = torch.diag(c @ torch.linalg.inv(c + torch.eye(33, dtype=torch.float64)))
    kept = leverage.topk(20).indices.sort().values
    assert torch.equal(mlp.gate_proj.weight.data, old["gate_proj"][kept])
    assert torch.equal(mlp.up_proj.weight.data, old["up_proj"][kept])
    expected = torch.linalg.lstsq(inner[:, kept], inner @ old["down_proj"].T).solution.T
    torch.testing.assert_close(mlp.down_proj.weight.data, expected, rtol=1e-5, atol=1e-6)


def test_layers_share_by_their_influence(rivals: Any) -> None:
    found = rivals.modegpt.shared_out([0.1, 0.3, 0.2], 0.3, 0.1)
    weights = np.exp([-1.0, -3.0, -2.0])
    assert found == pytest.approx(list(0.9 * weights / weights.sum()))
    capped = rivals.modegpt.shared_out([0.1, 0.3, 0.2], 0.5, 0.1)
    assert capped == pytest.approx([0.8, 0.7 * np.exp(-3) / (np.exp(-3) + np.exp(-2)), 0.7 / (1 + np.exp(-1))])


def test_influence_is_how_far_a_layer_turns_hidden_states(make_model: Any, rivals: Any) -> None:
    model = make_model("llama-gqa").double()
    with torch.no_grad():
        hidden = model(IDS, output_hidden_states=True).hidden_states
        last = model.model.layers[-1](
            hidden[-2], **CalibrationStream.from_windows(context_of(model), WINDOWS).batches[0].layer_kwargs[-1]
        )
    expected = [1 - float(torch.cosine_similarity(a, b, dim=-1).mean()) for a, b in itertools.pairwise(hidden[:-1])]
    expected.append(1 - float(torch.cosine_similarity(hidden[-2], last, dim=-1).mean()))
    found = rivals.modegpt.block_influences(
        context_of(model), CalibrationStream.from_windows(context_of(model), WINDOWS)
    )
    assert found == pytest.approx(expected, rel=1e-5)  # norms are computed in float32
