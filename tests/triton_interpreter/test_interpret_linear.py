"""The dense decode kernels against float64, in Triton's interpreter."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F

from lorap.kernels import configs
from lorap.kernels import linear as module
from lorap.kernels.linear import heuristic, linear

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
DTYPES = list(TOLERANCE)
pytestmark = pytest.mark.usefixtures("poison")


def check(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
    y = linear(x, weight, bias)
    expected = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    assert y.dtype == x.dtype
    assert y.shape == expected.shape
    limit = TOLERANCE[x.dtype] * expected.abs().max().item() if expected.numel() else 0.0
    torch.testing.assert_close(y.double(), expected, rtol=0.0, atol=limit)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k"), [(1, 1), (63, 100), (100, 63), (130, 300)])
@pytest.mark.parametrize("m", [1, 2, 7, 32, 65])
def test_values(m, n, k, dtype):
    x, weight = torch.randn(m, k, dtype=dtype), torch.randn(n, k, dtype=dtype)
    check(x, weight)
    check(x, weight, torch.randn(n, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [1, 3, 40])
@pytest.mark.parametrize("split", [2, 4])
def test_programs_that_share_k(m, split, dtype, monkeypatch):
    """K = 300 in blocks of 64 is 5 blocks, so one of 4 programs has none; the bias must be added once."""
    options = {"BLOCK_N": 16, "BLOCK_K": 64, "num_warps": 4, "num_stages": 2}
    monkeypatch.setattr(module, "_config", lambda *args: (split, options))
    x, weight = torch.randn(m, 300, dtype=dtype), torch.randn(70, 300, dtype=dtype)
    check(x, weight)
    check(x, weight, torch.randn(70, dtype=dtype))


@pytest.fixture
def settings_folder(tmp_path, monkeypatch):
    """A folder to write files of launch settings in; nothing is remembered from it."""
    monkeypatch.setattr(configs, "_folder", lambda: tmp_path)
    configs._read.cache_clear()
    module._config.cache_clear()
    yield tmp_path
    configs._read.cache_clear()
    module._config.cache_clear()


def test_tuned_settings_come_first(settings_folder):
    config = {"BLOCK_N": 32, "BLOCK_K": 16, "SPLIT_K": 3, "num_warps": 2, "num_stages": 1}
    entries = [{"dtype": "float32", "max_m": 8, "n": 40, "config": config}]
    (settings_folder / "cpu.json").write_text(json.dumps({"kernels": {"linear": entries}}))
    assert module._config(5, 40, 30, torch.float32, torch.device("cpu"))[0] == 3
    assert module._config(9, 40, 30, torch.float32, torch.device("cpu"))[0] == 1
    assert module._config(5, 41, 30, torch.float32, torch.device("cpu"))[0] == 1
    check(torch.randn(5, 30), torch.randn(40, 30), torch.randn(40))


def test_lookup_takes_the_smallest_max_m_that_fits(settings_folder):
    entries = [{"max_m": m, "config": {"m": m}} for m in (32, 1, 8)] + [{"dtype": "float16", "config": {"m": 0}}]
    (settings_folder / "NVIDIA_X_80GB.json").write_text(json.dumps({"kernels": {"shrink": entries}}))
    found = {m: configs.lookup("shrink", "NVIDIA X 80GB", m=m, k=7, dtype="float16") for m in (1, 2, 8, 9, 33)}
    assert found == {1: {"m": 1}, 2: {"m": 8}, 8: {"m": 8}, 9: {"m": 32}, 33: {"m": 0}}
    assert configs.lookup("shrink", "NVIDIA X 80GB", m=33, dtype="bfloat16") is None
    assert configs.lookup("expand", "NVIDIA X 80GB", m=1) is None
    assert configs.lookup("shrink", "NVIDIA Y", m=1) is None


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"kernels": {"linear": 3}}', '{"kernels": {"linear": [{}]}}'])
def test_a_bad_file_is_named(settings_folder, text):
    (settings_folder / "GPU.json").write_text(text)
    with pytest.raises(ValueError, match=r"GPU\.json"):
        configs.lookup("linear", "GPU", m=1)


def test_leading_shapes_and_views():
    weight = torch.randn(40, 30)
    check(torch.randn(2, 3, 30), weight)
    check(torch.randn(30), weight)
    check(torch.randn(3, 60)[:, ::2], weight)
    check(torch.randn(30, 3).T, weight)
    check(torch.randn(3, 30), torch.randn(30, 40).T)
    check(torch.randn(3, 30), weight, torch.randn(40, 2)[:, 0])


@pytest.mark.parametrize(("m", "n", "k"), [(0, 5, 8), (3, 0, 8), (3, 5, 0), (1, 5, 0)])
def test_empty(m, n, k):
    check(torch.randn(m, k), torch.randn(n, k))
    check(torch.randn(m, k), torch.randn(n, k), torch.randn(n))


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="do not fit"):
        linear(torch.randn(2, 8), torch.randn(4, 9))
    with pytest.raises(ValueError, match="do not fit"):
        linear(torch.randn(2, 8), torch.randn(4, 8), torch.randn(3))
    with pytest.raises(TypeError, match="float16"):
        linear(torch.randn(2, 8).half(), torch.randn(4, 8))


@pytest.mark.parametrize(
    ("m", "n", "k"), [(m, n, k) for m in (1, 2, 32) for n in (64, 1024, 4096) for k in (512, 4096)]
)
def test_programs_outnumber_multiprocessors_where_k_allows(m, n, k):
    options = heuristic(m, n, k, 2)
    programs = -(-n // options["BLOCK_N"]) * options["SPLIT_K"]
    assert programs > module.MULTIPROCESSORS or k < 8 * options["SPLIT_K"] * options["BLOCK_K"]
    assert k >= options["SPLIT_K"] * options["BLOCK_K"] or options["SPLIT_K"] == 1
