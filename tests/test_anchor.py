"""Factor pairs that are fitted to what the dense model has in their place: the objective of AA-SVD (arXiv 2604.02119).

Proved here: the factors are the published closed form, in float64, and no others lose less; in a model each part of each layer
reads what the parts before it became, and is fitted to what it reads in the dense model, without padding; a run that was
interrupted goes on with the same dense stream. Not proved: what that is worth (docs/results.md).
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import lorap
from lorap.algorithms.anchoring import carried_over
from lorap.algorithms.factorization import factorize
from lorap.architectures import PROJECTIONS, SHARED_INPUTS, find_architecture
from lorap.calibration.context import DecoderContext
from lorap.calibration.stream import CalibrationStream
from lorap.calibration.windows import TokenWindows
from lorap.compression.runs.journal import Journal
from lorap.compression.runs.run import RunOptions, compress_to_folder
from lorap.config import CompressionConfig
from lorap.errors import ConfigError
from lorap.nn.linear import LowRankLinear
from lorap.requirements import has_anchor

CPU = torch.device("cpu")


def closed_form(weight: Tensor, x: Tensor, now: Tensor, rank: int) -> Tensor:
    """[W X X'^T L^-T]_r L^-1 with L L^T = X' X'^T, for tokens in rows."""
    factor = torch.linalg.cholesky(now.T @ now)
    inverse = torch.linalg.inv(factor)
    u, s, vh = torch.linalg.svd(weight @ x.T @ now @ inverse.T, full_matrices=False)
    return u[:, :rank] * s[:rank] @ vh[:rank] @ inverse


def best_output(weight: Tensor, x: Tensor, now: Tensor, rank: int) -> Tensor:
    """W' X' of the same W', also where X' X'^T is singular, as it is behind a low-rank v_proj."""
    u, s, vh = torch.linalg.svd(now.T, full_matrices=False)
    seen = vh[s > 1e-9 * s[0]]
    u, s, vh = torch.linalg.svd(weight @ x.T @ seen.T, full_matrices=False)
    return u[:, :rank] * s[:rank] @ vh[:rank] @ seen


def shifted(out_features: int, in_features: int, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """A weight, correlated inputs, and others that are near them."""
    make = torch.Generator().manual_seed(out_features)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=make, dtype=torch.float64)

    x = normal(tokens, in_features) @ normal(in_features, in_features)
    return (
        normal(out_features, in_features),
        x,
        0.8 * x + 0.5 * normal(tokens, in_features) @ normal(in_features, in_features),
    )


@pytest.mark.parametrize(
    ("out_features", "in_features", "rank"), [(1, 3, 1), (63, 100, 17), (100, 63, 30), (40, 40, 40)]
)
def test_factors_are_the_published_closed_form(out_features: int, in_features: int, rank: int) -> None:
    weight, x, now = shifted(out_features, in_features, 400)
    carried = weight @ carried_over(x.T @ now / len(x), now.T @ now / len(x))
    found = factorize(carried, rank, now.T @ now / len(x))
    product = found.left @ found.right
    expected = closed_form(weight, x, now, rank)
    assert float((product - expected).norm() / expected.norm()) < 1e-4

    def loss(w: Tensor) -> float:
        return float((x @ weight.T - now @ w.T).square().sum())

    assert loss(product) == pytest.approx(loss(expected), rel=1e-6)
    # Blind to what the inputs were, or blind to what they became: more is lost.
    for metric in (now.T @ now, x.T @ x):
        other = factorize(weight, rank, metric)
        assert loss(product) < 0.99 * loss(other.left @ other.right)


def test_inputs_that_did_not_change_change_nothing() -> None:
    """Also where there are fewer tokens than channels, so that the rest of a matrix was never seen."""
    _, x, _ = shifted(5, 63, 20)
    moment = x.T @ x / len(x)
    torch.testing.assert_close(carried_over(moment, moment), torch.eye(63, dtype=torch.float64), rtol=0, atol=1e-6)


def test_dead_channels_and_sums_that_are_not_positive_definite() -> None:
    """As sums of float32 products may be: what is known is still carried over, and what is not stays."""
    _, x, now = shifted(5, 20, 400)
    x[:, 3] = now[:, 3] = 0
    now[:, 7] = now[:, 8]
    cross, moment = x.T @ now / 400, now.T @ now / 400
    moment[7, 7] -= 1e-5 * moment[7, 7]
    carried = carried_over(cross, moment)
    assert float((x - now @ carried.T).square().mean()) < 1.05 * float(
        (x - now @ (torch.linalg.pinv(now) @ x)).square().mean()
    )
    assert carried[3, 3] == 1


def stream_of(model: Any, windows: TokenWindows) -> CalibrationStream:
    return CalibrationStream.from_windows(DecoderContext.of(model, device=CPU), windows)


def reads(layer: Any, path: str, stream: CalibrationStream, index: int) -> Tensor:
    """(real tokens, K): the input of a linear layer, by a hook of our own."""
    seen: list[Tensor] = []
    handle = layer.get_submodule(path).register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    with torch.no_grad():
        for batch in stream.batches:
            layer(batch.hidden, **batch.layer_kwargs[index])
    handle.remove()
    masks = [batch.mask for batch in stream.batches]
    return torch.cat([x[mask] if mask is not None else x.flatten(0, 1) for x, mask in zip(seen, masks, strict=True)])


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("sequential", ["sublayer", "layer"])
def test_each_part_is_fitted_to_the_dense_model(make_model: Any, sequential: Any, *, padded: bool) -> None:
    dense = make_model("llama-gqa").double()
    ids = torch.randint(3, 400, (16, 24), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    if padded:
        mask[::3, 17:] = 0
    given = {"input_ids": ids, "attention_mask": mask} if padded else ids
    config = CompressionConfig(
        recipe="aa-svd", sparsity=0.4, sequential=sequential, num_calibration_samples=16, calibration_seq_len=24
    )
    model, report = lorap.compress(copy.deepcopy(dense), calibration=given, config=config, progress=False)
    ranks = {(one.layer, one.role): one.rank for one in report.projections}

    windows = TokenWindows(ids, "ids", "", attention_mask=mask if padded else None)
    originals, stream = stream_of(dense, windows), stream_of(dense, windows)
    paths, checked = find_architecture(dense).projections, 0
    for index, (before, after) in enumerate(zip(dense.model.layers, model.model.layers, strict=True)):
        growing = copy.deepcopy(before)
        for readers in SHARED_INPUTS.values():
            x = reads(before, paths[readers[0]], originals, index)
            now = reads(growing, paths[readers[0]], stream, index)
            for role in readers:
                found = after.get_submodule(paths[role])
                if not isinstance(found, LowRankLinear):
                    continue
                weight = before.get_submodule(paths[role]).weight.data
                expected = best_output(weight, x, now, found.rank)
                output = found.reconstruct(dtype=torch.float64).detach() @ now.T
                assert float((output - expected).norm() / expected.norm()) < 1e-2, (index, role)
                checked += 1
            if sequential == "sublayer":
                for role in readers:
                    growing.set_submodule(paths[role], after.get_submodule(paths[role]))
        originals.advance(index, before)
        stream.advance(index, after)
    assert checked == sum(rank is not None for rank in ranks.values()) == 2 * len(PROJECTIONS)


def test_an_interrupted_run_goes_on_with_the_same_dense_stream(
    make_model: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    model, text = make_model("llama-gqa", num_hidden_layers=3), tmp_path / "tokens.npy"
    model.save_pretrained(tmp_path / "dense")
    np.save(text, np.random.default_rng(0).integers(3, 400, (12, 24)))
    config = CompressionConfig(recipe="aa-svd", sparsity=0.4, num_calibration_samples=12, calibration_seq_len=24)
    options = RunOptions(calibration=str(text), evaluation=(), progress=False, device="cpu")
    keep = Journal.keep_alone

    def stops(self: Journal, name: str, *args: Any, **kwargs: Any) -> None:
        keep(self, name, *args, **kwargs)
        if name == "layer-00001":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "keep_alone", stops)
        with pytest.raises(KeyboardInterrupt):
            compress_to_folder(tmp_path / "dense", tmp_path / "out", config, options)
    compress_to_folder(tmp_path / "dense", tmp_path / "out", config, options)
    whole, _ = lorap.compress(tmp_path / "dense", calibration=str(text), config=config, progress=False, device="cpu")
    for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items():
        assert torch.equal(tensor, whole.state_dict()[name]), name


def test_choices_that_exclude_it_are_refused() -> None:
    with pytest.raises(ConfigError, match="attention_method is awsvd; use second_moment, or anchor none"):
        CompressionConfig(recipe="lorap", anchor="dense")
    with pytest.raises(ConfigError, match="token_weighting is residual; use none, or anchor none"):
        CompressionConfig(anchor="dense", token_weighting="residual")


@pytest.mark.parametrize(
    ("anchored", "options"),
    [
        (True, {}),
        (False, {"anchor": "none"}),
        (False, {"sparsity": 0.0}),
        (False, {"recipe": "best"}),
        (True, {"recipe": "best", "anchor": "dense"}),
        (False, {"recipe": "best", "anchor": "dense", "target": "stock"}),
        (False, {"recipe": "flap", "anchor": "dense", "attention_method": "second_moment"}),
    ],
)
def test_a_second_stream_goes_along_only_where_it_is_used(options: dict[str, Any], *, anchored: bool) -> None:
    assert has_anchor(CompressionConfig(**({"recipe": "aa-svd"} | options))) == anchored
