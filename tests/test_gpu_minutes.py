"""benchmarks/gpu_minutes.py: what is counted, and how it grows to LLaMA-7B. Not proved: that a GPU takes so long."""

from __future__ import annotations

import importlib
from collections import Counter
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def gpu_minutes(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("gpu_minutes")


def test_products_and_eigenproblems_are_counted_by_stage_and_dtype(gpu_minutes):
    counting = gpu_minutes.Counting()
    with counting:
        counting.stage = "plan"
        torch.ones(3, 5, dtype=torch.bfloat16) @ torch.ones(5, 7, dtype=torch.bfloat16)
        counting.stage = "factorize"
        torch.ones(2, 63, dtype=torch.float64) @ torch.ones(63, 1, dtype=torch.float64)
        torch.linalg.eigh(torch.eye(9).expand(4, 9, 9))
    assert counting.found == {
        ("plan", "16 bits"): 2 * 3 * 5 * 7,
        ("factorize", "float64"): 2 * 2 * 63,
        ("factorize", "eigenproblems"): 4,
    }


def test_work_grows_with_parameters_factorizations_with_the_third_power(gpu_minutes):
    """16 times wider and 8 times as many layers."""
    found = gpu_minutes.predict({"plan": Counter({"16 bits": 10**9, "float64": 10**9, "eigenproblems": 4})}).loc["plan"]
    assert found["16 bits"] == pytest.approx(1e-3 * 256 * 8)
    assert found["float64"] == pytest.approx(1e-3 * 4096 * 8)
    assert found["eigenproblems"] == 32
    seconds = 2.048e12 / 400e12 + 32.768e12 / 40e12 + 32 * 9 * 4096**3 / (0.02 * 67e12)
    assert found["seconds"] == pytest.approx(seconds)
