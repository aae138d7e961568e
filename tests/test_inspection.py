"""Spectra and channel importances of a model: numbers, pictures, command.

Proved here: energy ranks, effective rank and curves of matrices whose spectra are known; that weighted spectra are those of
W diag(s) with s from the model's own activations; that the random reference is what random matrices do; that pictures hold a
line per layer; and that mistakes end in one sentence.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from commands import assert_refused, run
from torch import Tensor, nn

import lorap.cli.inspect
import lorap.evaluation.inspection.inspect
from lorap import ArchitectureError, CalibrationError, CheckpointError, ConfigError
from lorap.algorithms.factorization import spectrum
from lorap.algorithms.pruning import channel_importance
from lorap.cli.inspect import parse_layers
from lorap.evaluation.inspection.inspect import inspect_model
from lorap.evaluation.inspection.report import GROUPS
from lorap.evaluation.inspection.values import (
    LEVELS,
    POINTS,
    Importance,
    SingularValues,
    least_count,
    random_matrix,
    sample_points,
)

ROLES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
QUICK = {"num_calibration_samples": 5, "calibration_seq_len": 24, "progress": False}
QUICK_OPTIONS = ["--num-calibration-samples", "9", "--calibration-seq-len", "24", "--device", "cpu", "--quiet"]


def values_of(weight: Tensor, metric: Tensor | None = None) -> SingularValues:
    return SingularValues.of(spectrum(weight, metric), tuple(weight.shape))


def orthogonal(size: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=generator)).Q


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# ----------------------------------------------------------------------------------------------------------------------
# Numbers of one matrix


def test_a_diagonal_weight():
    # Energies 64, 16, 9, 9, 2 of 100: 80 % after two, 89 after three, 98 after four.
    weight = torch.zeros(7, 5, dtype=torch.float64)
    weight[range(5), range(5)] = torch.tensor([3.0, math.sqrt(2), 8.0, -4.0, 3.0], dtype=torch.float64)
    found = values_of(weight)
    assert found.ranks == (4, 4, 5)
    assert found.full_rank == 5
    assert found.rank_shares == (0.8, 0.8, 1.0)
    assert found.parameter_shares == pytest.approx((4 * 12 / 35, 4 * 12 / 35, 5 * 12 / 35))
    assert found.largest == pytest.approx(8)
    assert found.values == pytest.approx((1, 0.5, 0.375, 0.375, math.sqrt(2) / 8), rel=1e-3)
    shares = [0.64, 0.16, 0.09, 0.09, 0.02]
    assert found.effective_rank == pytest.approx(math.exp(-sum(share * math.log(share) for share in shares)))


@pytest.mark.parametrize("rank", [1, 2, 7, 10])
def test_effective_rank_counts_equal_singular_values(rank):
    left, right = orthogonal(13, 1)[:, :rank], orthogonal(17, 2)[:rank]
    found = values_of(2.5 * left @ right)
    assert found.effective_rank == pytest.approx(rank, rel=1e-9)
    assert found.largest == pytest.approx(2.5)
    # Equal parts: whether nine of ten are 90 % must not hang on rounding.
    assert found.ranks == tuple(math.ceil(level * rank - 1e-9) for level in LEVELS)


def test_nothing_depends_on_rotations_or_scale():
    weight = gaussian(19, 31)
    turned = values_of(orthogonal(19, 3) @ weight @ orthogonal(31, 4))
    plain, scaled, flipped = values_of(weight), values_of(1e-3 * weight), values_of(weight.T)
    for other in (turned, scaled, flipped):
        assert other.ranks == plain.ranks
        assert other.effective_rank == pytest.approx(plain.effective_rank, rel=1e-9)
        assert other.values == pytest.approx(plain.values, rel=2e-3)
    assert scaled.largest == pytest.approx(1e-3 * plain.largest)


@pytest.mark.parametrize("shape", [(5, 5), (33, 7), (7, 33), (1, 9), (301, 277)])
@pytest.mark.parametrize("decay", [0.0, 0.5, 2.0])
def test_energy_ranks_are_those_of_numpy(shape, decay):
    weight = gaussian(*shape, seed=sum(shape)).numpy() * (1.0 + np.arange(shape[1])) ** -decay
    found = values_of(torch.from_numpy(weight))
    singular = np.linalg.svd(weight, compute_uv=False)
    energy = singular**2 / (singular**2).sum()
    assert found.ranks == tuple(int(np.searchsorted(np.cumsum(energy), level) + 1) for level in LEVELS)
    assert found.effective_rank == pytest.approx(math.exp(-(energy * np.log(energy)).sum()), rel=1e-6)
    points = np.array(sample_points(min(shape))) - 1
    np.testing.assert_allclose(found.values, (singular / singular[0])[points], rtol=1e-3, atol=1e-6)


def test_zeros_have_no_rank():
    found = values_of(torch.zeros(6, 4))
    assert (found.effective_rank, found.ranks, found.largest, found.values) == (0, (0, 0, 0), 0, (0, 0, 0, 0))


@pytest.mark.parametrize("size", [1, 255, 256, 257, 576, 11008])
def test_sample_points(size):
    points = sample_points(size)
    assert (points[0], points[-1]) == (1, size)
    assert len(points) <= POINTS
    assert list(points) == sorted(set(points))
    assert max(np.diff(points), default=0) <= max(1, math.ceil(size * math.pi / 2 / (POINTS - 1)))
    assert [size + 1 - point for point in reversed(points)] == list(points)
    assert len(points) == size or (len(points) > 200 and points[1] <= 3)


@pytest.mark.parametrize("shape", [(300, 300), (100, 300), (240, 200)])
def test_random_reference_is_what_random_matrices_do(shape):
    expected, found = random_matrix(shape), values_of(gaussian(*shape))
    assert expected.rank_shares == pytest.approx(found.rank_shares, abs=0.015)
    assert expected.effective_share == pytest.approx(found.effective_share, abs=0.01)
    assert expected.largest == pytest.approx(found.largest, rel=0.03)
    # Page's entropy: ln n - n / (2 m) for n <= m, up to terms that vanish with the size.
    small, large = sorted(shape)
    assert expected.effective_share == pytest.approx(math.exp(-small / large / 2), rel=0.01)


def test_importance_of_known_channels():
    found = Importance.of(torch.tensor([6.0, 1.0, 2.0, 1.0]))
    assert found.channels == 4
    assert found.values == pytest.approx((0.4, 0.4, 0.8, 2.4))
    assert found.cumulative == pytest.approx((0.1, 0.2, 0.4, 1.0))
    assert found.least_share == pytest.approx(0.1)  # at least one channel
    assert found.counts == (3, 4, 4)
    many = Importance.of(torch.arange(1.0, 301.0))
    assert many.least_share == pytest.approx((1 + 2 + 3) / (300 * 301 / 2))


def test_least_count_takes_the_first():
    parts = torch.tensor([4.0, 3.0, 2.0, 1.0])
    assert [least_count(parts, level) for level in (0.4, 0.41, 0.7, 0.9, 1.0)] == [1, 2, 2, 3, 4]
    nearly_equal = torch.ones(10, dtype=torch.float64)
    nearly_equal[9] += 1e-14
    assert least_count(nearly_equal, 0.9) == 9


# ----------------------------------------------------------------------------------------------------------------------
# A model


def inputs_of(model: Any, tokens: Tensor) -> dict[tuple[int, str], Tensor]:
    """Root mean square of every input channel of every projection, from an ordinary forward pass."""
    found: dict[tuple[int, str], Tensor] = {}

    def note(layer: int, role: str) -> Any:
        return lambda _module, args: found.__setitem__((layer, role), args[0].double().square().mean((0, 1)).sqrt())

    for name, module in model.named_modules():
        parts = name.split(".")
        if isinstance(module, nn.Linear) and parts[-1] in ROLES:
            module.register_forward_pre_hook(note(int(parts[2]), parts[-1]))
    with torch.no_grad():
        model(input_ids=tokens)
    return found


@pytest.mark.parametrize("family", ["llama-mha", "llama-gqa", "llama-wide-heads", "qwen3", "mistral"])
def test_weighted_spectra_are_those_of_the_weight_times_its_inputs(family, make_model, tokens):
    model = make_model(family)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    found = inspect_model(model, calibration=tokens, progress=False)
    scales = inputs_of(model, tokens)
    assert [(entry.layer, entry.role) for entry in found.projections] == [
        (layer, role) for layer in range(2) for role in ROLES
    ]
    for entry in found.projections:
        name = "self_attn" if entry.role in ROLES[:4] else "mlp"
        weight = model.get_submodule(f"model.layers.{entry.layer}.{name}.{entry.role}").weight.data.double()
        for kind, matrix in {"plain": weight, "weighted": weight * scales[entry.layer, entry.role]}.items():
            singular = torch.linalg.svdvals(matrix)
            one = entry.spectra[kind]
            assert one.shape == tuple(weight.shape)
            assert one.largest == pytest.approx(float(singular[0]), rel=1e-5)
            assert one.values == pytest.approx((singular / singular[0]).tolist(), rel=2e-3, abs=1e-5)
            energy = singular.square().cumsum(0) / singular.square().sum()
            assert one.ranks == tuple(int((energy < level).sum()) + 1 for level in LEVELS)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_channel_importance_of_a_model(make_model, tokens):
    model = make_model("llama-gqa")
    found = inspect_model(model, calibration=tokens, layers=[1], progress=False)
    scales = inputs_of(model, tokens)
    mlp = model.model.layers[1].mlp
    weights = [linear.weight.data for linear in (mlp.gate_proj, mlp.up_proj, mlp.down_proj)]
    ones = [torch.ones(64), torch.ones(100)]
    seen = [scales[1, "gate_proj"].square(), scales[1, "down_proj"].square()]
    assert set(found.channels) == {1}
    for kind, norms in {"plain": ones, "weighted": seen}.items():
        importance = channel_importance(*weights, *norms).sort().values
        assert found.channels[1][kind].values == pytest.approx((importance / importance.mean()).tolist(), rel=1e-3)
        assert found.channels[1][kind].least_share == pytest.approx(float(importance[0] / importance.sum()), rel=1e-4)


def test_some_layers_see_what_all_layers_see(make_model, tokens):
    model = make_model("smollm3")
    every = inspect_model(model, calibration=tokens, progress=False)
    some = inspect_model(model, calibration=tokens, layers=[2, 0, 2], progress=False)
    assert some.layers == (0, 2)
    assert some.num_layers == 3
    assert some.projections == tuple(entry for entry in every.projections if entry.layer != 1)


def test_without_calibration_the_model_does_not_run(make_model, monkeypatch):
    model = make_model("llama-biases")
    for layer in model.model.layers:
        monkeypatch.setattr(layer, "forward", None)
    found = inspect_model(model, calibration=None, progress=False)
    assert found.kinds == ("plain",)
    assert found.calibration is None
    assert {kind for entry in found.projections for kind in entry.spectra} == {"plain"}
    assert {kind for kinds in found.channels.values() for kind in kinds} == {"plain"}
    assert "weighted" not in found.table()


def test_padding_does_not_count(make_model, tokens):
    model = make_model("llama-gqa")
    short = {"input_ids": tokens[:, :20], "attention_mask": torch.ones(8, 20)}
    padded = torch.full_like(tokens, 7)
    padded[:, :20] = tokens[:, :20]
    mask = (torch.arange(tokens.shape[1]) < 20).expand_as(tokens)
    one = inspect_model(model, calibration=short, progress=False)
    two = inspect_model(model, calibration={"input_ids": padded, "attention_mask": mask}, progress=False)
    for mine, other in zip(one.find("weighted"), two.find("weighted"), strict=True):
        assert mine.largest == pytest.approx(other.largest, rel=1e-4)
        assert mine.effective_rank == pytest.approx(other.effective_rank, rel=1e-4)


def test_low_rank_attention_is_found(make_model, tokens):
    """Attention of rank 3 beside a full FFN: what the paper says, made true by hand."""
    model = make_model("llama-gqa")
    for layer in model.model.layers:
        for role in ROLES[:4]:
            weight = getattr(layer.self_attn, role).weight.data
            u, s, v = torch.linalg.svd(weight, full_matrices=False)
            weight.copy_((u[:, :3] * s[:3]) @ v[:3])
    found = inspect_model(model, calibration=tokens, progress=False)
    for kind in found.kinds:
        attention, ffn = (found.shares(kind, group) for group in GROUPS)
        assert max(attention) <= (3 / 64 + 3 / 32) / 2  # q and o have rank 64, k and v 32
        assert min(ffn) > 0.4
    summary = found.summary("plain")
    assert f"takes {found.shares('plain', 'attention')[0]:.0%} of full rank in attention" in summary
    assert f"shapes take {found.random_shares('attention')[0]:.0%} and {found.random_shares('FFN')[0]:.0%}" in summary


@pytest.mark.parametrize("calibrated", [True, False])
def test_one_layer_in_memory_is_enough(calibrated, make_model, tokens, monkeypatch):
    """Weights are touched inside on_device only: outside of it they are on the meta device here."""
    model = make_model("smollm3")
    calibration = tokens if calibrated else None
    expected = inspect_model(model, calibration=calibration, progress=False)
    stored = {
        layer: {name: tensor.clone() for name, tensor in layer.state_dict().items()} for layer in model.model.layers
    }
    opened = []

    @contextmanager
    def paged(layer: nn.Module, _device: torch.device) -> Iterator[None]:
        assert all(parameter.is_meta for other in model.model.layers for parameter in other.parameters())
        layer.load_state_dict(stored[layer], assign=True)
        opened.append(layer)
        yield
        layer.to("meta")

    model.model.layers.to("meta")
    monkeypatch.setattr(lorap.calibration.context, "on_device", paged)
    assert inspect_model(model, calibration=calibration, progress=False) == expected
    assert opened == list(model.model.layers)


def test_shares_are_means_of_projections(make_model):
    found = inspect_model(make_model("llama-gqa"), calibration=None, progress=False)
    by_hand = [
        np.mean([entry.spectra["plain"].ranks[level] / min(entry.spectra["plain"].shape) for entry in chosen])
        for chosen in [[entry for entry in found.projections if entry.role in ROLES[:4] and entry.layer == 1]]
        for level in range(3)
    ]
    assert found.shares("plain", "attention", layer=1) == pytest.approx(by_hand)
    assert found.random_shares("FFN") == pytest.approx(random_matrix((100, 64)).rank_shares)


@pytest.mark.parametrize("layers", [[2], [0, -1], []])
def test_layers_out_of_range(layers, make_model):
    with pytest.raises(ConfigError, match="this model has layers 0 to 1"):
        inspect_model(make_model("llama-gqa"), calibration=None, layers=layers, progress=False)


def test_what_is_not_finite_is_named(make_model, tokens):
    model = make_model("llama-gqa")
    model.model.layers[1].input_layernorm.weight.data.fill_(1e30)
    with pytest.raises(
        CalibrationError, match=r"activations in layer 1 are not finite \(input of q_proj, k_proj, v_proj\)"
    ):
        inspect_model(model, calibration=tokens, progress=False)
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = torch.inf
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj\.weight contains 1 values"):
        inspect_model(model, calibration=None, progress=False)


def test_a_compressed_model_is_refused(make_model, compress_small):
    small, _ = compress_small(make_model("llama-gqa"))
    with pytest.raises(ArchitectureError, match="compressed by lorap already"):
        inspect_model(small, calibration=None, progress=False)


# ----------------------------------------------------------------------------------------------------------------------
# Pictures


@pytest.fixture(scope="module")
def inspections(make_model, tokens) -> list[Any]:
    """With calibration, without, and of one layer."""
    model = make_model("smollm3")  # three layers
    options = ({"calibration": tokens}, {"calibration": None}, {"calibration": tokens, "layers": [1]})
    return [inspect_model(model, name="tiny", progress=False, **one) for one in options]


@pytest.fixture(params=range(3), ids=["calibrated", "plain", "one-layer"])
def inspection(request, inspections) -> Any:
    return inspections[request.param]


def panels(draw: str, inspection: Any) -> list[Any]:
    """Axes with something in them, without the colour bar."""
    plots = pytest.importorskip("lorap.evaluation.inspection.plots")
    return [axis for axis in plots.FIGURES[draw](inspection).axes if axis.axison and axis.get_lines()]


def test_spectra_have_a_line_a_layer(inspection):
    found = panels("spectra", inspection)
    wanted = [(kind, role) for kind in inspection.kinds for role in ROLES]
    for axis, (kind, role) in zip(found, wanted, strict=True):
        lines = axis.get_lines()
        assert len(lines) == len(inspection.layers) + (kind == "plain")  # and the random matrix
        for line, one in zip(lines, inspection.find(kind, roles=[role]), strict=False):
            np.testing.assert_allclose(line.get_ydata(), one.values)
        assert len({line.get_color() for line in lines[: len(inspection.layers)]}) == len(inspection.layers)


def test_energy_ranks_set_attention_against_ffn(inspection):
    for number, axis in enumerate(panels("energy_ranks", inspection)):
        kind, level = inspection.kinds[number // 3], number % 3
        lines = {line.get_label(): line for line in axis.get_lines()}
        for group in GROUPS:
            expected = [inspection.shares(kind, group, layer=layer)[level] for layer in inspection.layers]
            assert list(lines[group].get_xdata()) == list(inspection.layers)
            assert list(lines[group].get_ydata()) == pytest.approx(expected)
    assert number + 1 == 3 * len(inspection.kinds)


def test_effective_ranks_have_a_line_a_projection(inspection):
    for kind, axis in zip(inspection.kinds, panels("effective_ranks", inspection), strict=True):
        lines = {line.get_label(): line for line in axis.get_lines()}
        assert list(lines) == list(ROLES)
        for role, line in lines.items():
            expected = [one.effective_rank / min(one.shape) for one in inspection.find(kind, roles=[role])]
            assert list(line.get_ydata()) == pytest.approx(expected)
        assert len({(line.get_color(), line.get_marker()) for line in lines.values()}) == 7


def test_channel_curves_mark_the_least_important(inspection):
    found = panels("channels", inspection)
    for kind, single, together in zip(inspection.kinds, found[::2], found[1::2], strict=True):
        for axis, extra in ((single, 1), (together, 2)):  # the mark; the diagonal
            assert len(axis.get_lines()) == len(inspection.layers) + extra
            assert [0.01, 0.01] in [list(line.get_xdata()) for line in axis.get_lines()]
        first = next(iter(inspection.channels.values()))[kind]
        np.testing.assert_allclose(single.get_lines()[0].get_ydata(), first.values)
        np.testing.assert_allclose(together.get_lines()[0].get_ydata(), first.cumulative)


@pytest.mark.slow
def test_pictures_are_the_same_twice(inspections, tmp_path):
    plots = pytest.importorskip("lorap.evaluation.inspection.plots")
    files = []
    for folder in (tmp_path / "one", tmp_path / "two"):
        folder.mkdir()
        written = plots.write_plots(inspections[1], folder)
        assert sorted(written) == sorted(folder.iterdir())
        files.append({path.name: path.read_bytes() for path in written})
    assert files[0] == files[1]
    assert sorted(files[0]) == sorted(f"{name}.{suffix}" for name in plots.FIGURES for suffix in ("png", "svg"))
    for name, data in files[0].items():
        assert data.startswith(b"\x89PNG" if name.endswith("png") else b"<?xml")


# ----------------------------------------------------------------------------------------------------------------------
# The command


def test_the_command_writes_numbers_and_pictures(model_folder, tmp_path):
    pytest.importorskip("matplotlib")
    out = tmp_path / "look"
    result = run("inspect", model_folder, out, *QUICK_OPTIONS, "--json")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    stored = json.loads((out / "inspection.json").read_text("utf-8"))
    assert told["files"] == sorted(path.name for path in out.iterdir())
    assert len(told["files"]) == 9
    assert stored["calibration"]["tokens"] == 9 * 24
    assert stored["calibration"]["name"] == "default"
    assert len(stored["projections"]) == 14
    for brief, full in zip(told["projections"], stored["projections"], strict=True):
        for kind in ("plain", "weighted"):
            values = full[kind].pop("values")
            assert len(values) == len(stored["sample_points"][str(min(full["shape"]))]) <= 256
            assert values[0] == 1
            assert values == sorted(values, reverse=True)
        assert brief == full
    assert [one["shape"] for one in stored["random"]] == [[32, 64], [64, 64], [64, 100], [100, 64]]
    assert [one["layer"] for one in stored["channels"]] == [0, 1]
    assert stored["channels"][0]["weighted"]["cumulative"][-1] == 1
    q_proj = [one for one in told["projections"] if one["role"] == "q_proj"]
    ranks = " / ".join(f"{np.median([one['plain']['ranks'][level] for one in q_proj]):.0f}" for level in range(3))
    assert f"q_proj 64 x 64 {ranks}" in " ".join(result.stderr.split())
    assert "plain: 90% of the energy takes" in result.stderr


def test_the_command_gives_what_the_function_gives(model_folder, make_model, tokenizer, tmp_path):
    result = run("inspect", model_folder, tmp_path / "look", "--no-plots", "--layers", "1", *QUICK_OPTIONS)
    assert result.exit_code == 0, result.output
    options = QUICK | {"num_calibration_samples": 9}
    found = inspect_model(make_model("llama-gqa"), tokenizer=tokenizer, layers=[1], name="model", **options)
    assert json.loads((tmp_path / "look" / "inspection.json").read_text()) == json.loads(json.dumps(found.to_dict()))
    assert [path.name for path in (tmp_path / "look").iterdir()] == ["inspection.json"]


def test_calibration_none_needs_no_tokenizer(model_folder, tmp_path):
    for path in model_folder.glob("tokenizer*"):
        path.unlink()
    options = ["--no-plots", *QUICK_OPTIONS]
    assert_refused(run("inspect", model_folder, tmp_path / "look", *options), "the model has no tokenizer")
    result = run("inspect", model_folder, tmp_path / "look", "--calibration", "none", *options, "--json")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert told["calibration"] is None
    assert "weighted" not in told["projections"][0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--layers", "0,2"], "there is no layer 2; this model has layers 0 to 1"),
        (["--layers", "0-7"], "there is no layer 2; this model has layers 0 to 1"),
        (["--layers", "first"], "--layers first: 'first' is no layer and no range; write 0,5-10"),
        (["--layers", "1-0"], "--layers 1-0: the range 1-0 is empty; write the smaller number first"),
        (["--calibration", "none", "--calibration", "heldout"], "--calibration none means that there is no text"),
        (["--calibration", "self=2"], "give another --calibration than self"),
        (["--calibration", "nowhere.txt=0"], "the weight of nowhere.txt is 0.0"),
        (["--device", "gpu"], "device 'gpu' cannot be used"),
    ],
)
def test_mistakes_end_in_one_sentence(options, message, model_folder, tmp_path):
    out = tmp_path / "look"
    assert_refused(run("inspect", model_folder, out, "--no-plots", *QUICK_OPTIONS, *options), message)
    assert not out.exists()


def test_output_that_is_there_already(model_folder, tmp_path):
    (tmp_path / "note.txt").write_text("keep me")
    options = ["--calibration", "none", "--no-plots", *QUICK_OPTIONS]
    assert_refused(run("inspect", model_folder, tmp_path, *options), "overlaps the source model")
    out = tmp_path / "look"
    out.mkdir()
    (out / "note.txt").write_text("old")
    assert_refused(run("inspect", model_folder, out, *options), "is not empty; choose a new folder or pass --overwrite")
    assert run("inspect", model_folder, out, "--overwrite", *options).exit_code == 0
    assert [path.name for path in out.iterdir()] == ["inspection.json"]


def test_without_matplotlib_the_extra_is_named(model_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(lorap.cli.inspect, "find_spec", lambda name: None)
    assert_refused(
        run("inspect", model_folder, tmp_path / "look", *QUICK_OPTIONS), "pip install 'lorap[plot]', or pass --no-plots"
    )


def test_layers_are_parsed():
    assert parse_layers("0, 5-7,3") == [0, 5, 6, 7, 3]
    for wrong in ("", "1,,2", "-1", "1-", "a-b", "3.5"):
        with pytest.raises(ConfigError, match=r"write 0,5-10"):
            parse_layers(wrong)
