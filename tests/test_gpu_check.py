"""benchmarks/gpu_check.sh without a GPU: its steps run small on the CPU, and its report hides nothing.

Proved here: the predictions are the published arithmetic; a wrong value, an unwritten element and an exception all show; a
step that is cut off, fails or never starts is named; what did not run says why. Not proved: anything about a GPU.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")


@pytest.fixture
def module(monkeypatch):
    """``module(name)`` of the benchmarks folder."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if name in ("gpu_check", "gpu_report", "gpu_timings", "gpu_values", "table"):
            del sys.modules[name]


def rows_of(check: Any, step: str) -> list[dict[str, Any]]:
    return [check.run(what, find) for what, find in check.STEPS[step](CPU, check.SCALE)]


def shell(*options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(ROOT / "benchmarks/gpu_check.sh"), *options]
    settings = os.environ | {"OMP_NUM_THREADS": "1", "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""} | environment
    return subprocess.run(command, capture_output=True, text=True, cwd="/", env=settings, check=False, timeout=300)


@pytest.mark.parametrize(
    ("tokens", "sizes", "dense", "two", "one"),
    [
        (1, (4096, 1024, 4096), 12.5, 8.2, 6.9),
        (1, (4096, 512, 4096), 12.5, 5.4, 4.1),
        (8, (4096, 1536, 4096), 12.5, 11.05, 9.7),
        (64, (4096, 1492, 11008), 32.0, 18.4, 17.0),
        (2048, (4096, 1024, 4096), 87.4, 45.7, 44.4),
        (2048, (4096, 1492, 11008), 232.7, 118.3, 117.0),
    ],
)
def test_predictions(module, tokens, sizes, dense, two, one):
    predicted = module("gpu_timings").predicted
    found = [1e6 * predicted(kind, tokens, *sizes) for kind in ("dense", "two GEMMs", "cuda")]
    assert found == pytest.approx([dense, two, one], abs=0.06)
    assert predicted("triton", tokens, *sizes) == predicted("two GEMMs", tokens, *sizes)
    assert predicted("compiled dense", tokens, *sizes) == predicted("dense", tokens, *sizes)


def test_reference_passes_every_case(module):
    check = module("gpu_check")
    rows = rows_of(check, "values")
    reference = [row for row in rows if row["backend"] == "reference"]
    assert len(reference) == 3 * (10 * 7 + 6)  # dtypes, (sizes x kinds of case, and sums of squares)
    assert all(row["ok"] for row in reference)
    others = {row["backend"] for row in rows} - {"reference"}
    assert others == {"triton", "triton pdl", "triton one launch"}
    assert {row["not_run"] for row in rows if row["backend"] in others} == {"no GPU"}


@pytest.mark.parametrize("step", ["self-check", "self-check-cuda", "values-cuda", "graphs", "graphs-cuda", "sanitizer"])
def test_nothing_is_claimed_without_a_gpu(module, step):
    rows = rows_of(module("gpu_check"), step)
    assert rows
    assert {row.get("not_run") for row in rows} == {"no GPU"}
    assert not any("ok" in row for row in rows)


@pytest.mark.parametrize("step", ["timings", "merged", "squares", "launches"])
def test_timings_run_small(module, step):
    for row in rows_of(module("gpu_check"), step):
        needs_gpu = any(word in row["kind"] for word in ("triton", "cuda", "one-launch"))
        assert row.get("not_run") == ("no GPU" if needs_gpu else None)
        assert ("us" in row) != needs_gpu


def test_factorizations_run_small(module):
    rows = rows_of(module("gpu_check"), "factorization")
    assert len(rows) == 5 + 3 * 5
    assert all(row["seconds"] > 0 for row in rows)
    ours = [row for row in rows if row["kind"].startswith("factorize")]
    assert {row["solved by"] for row in ours} == {"eigh", "mixed", "subspace"}
    assert all(0.999 < row["error_over_eigh"] < 1.0002 for row in ours)
    assert rows[1] == {"kind": "eigh of 128x128, float64", "predicted_seconds": 0.8, "seconds": rows[1]["seconds"]}


def test_wrong_values_and_unwritten_elements_show(module):
    values = module("gpu_values")
    exact = torch.ones(4, dtype=torch.float64)
    assert values.relative_error(torch.ones(4), exact) == 0
    assert values.relative_error(torch.tensor([1.0, 1, 1, 1.2]), exact) == pytest.approx(0.1)
    assert values.relative_error(torch.tensor([1.0, 1, 1, torch.nan]), exact) == float("inf")


def test_exception_becomes_a_reason(module):
    def fail() -> dict[str, Any]:
        raise ValueError("no such kernel")

    assert module("gpu_check").run({"kind": "x"}, fail) == {"kind": "x", "not_run": "ValueError: no such kernel"}


def test_kernels_that_failed_their_check_are_not_timed(module, tmp_path):
    check, timings = module("gpu_check"), module("gpu_timings")
    rows = [
        {"op": "low_rank_linear", "backend": "triton", "dtype": "bfloat16", "error": 1e-3, "ok": True},
        {"op": "low_rank_linear", "backend": "cuda", "dtype": "bfloat16", "error": 1.0, "ok": False},
    ]
    (tmp_path / "self-check.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert check.passed(tmp_path) == {("low_rank_linear", "triton")}
    assert check.passed(tmp_path / "other") is None
    timings.allowed = check.passed(tmp_path)
    gpu = torch.device("cuda")
    assert timings.why_not("triton", 1, 64, 64, gpu) is None
    assert timings.why_not("cuda", 1, 64, 64, gpu) == "did not pass its self-check"
    assert timings.why_not("cuda", 9, 64, 64, gpu) == "for at most 8 tokens"
    assert timings.why_not("cuda", 1, 64, 1492, gpu) == "K and R must be multiples of 8"
    assert timings.why_not("dense", 9, 64, 1492, gpu) is None


def test_report_names_what_is_missing(module, tmp_path):
    work = module("gpu_report")
    wrong = {"op": "linear", "backend": "triton", "dtype": "float16", "case": "M=3", "error": 0.5, "ok": False}
    layer = {"shape": "q, k", "K": 1, "R": 2, "N": 3, "tokens": 8, "predicted_us": 5.45}
    rows = {
        "environment": [{"what": "GPU", "found": "Some GPU"}, {"what": "nvcc", "not_run": "not there"}],
        "values": [wrong, wrong | {"ok": True, "error": 1e-4}],
        "timings": [layer | {"kind": "triton", "us": 6.0}],
        "timings-cuda": [layer | {"kind": "cuda", "not_run": "did not pass its self-check"}],
    }
    for step, found in rows.items():
        (tmp_path / f"{step}.jsonl").write_text("\n".join(map(json.dumps, found)) + "\n")
    ended = [("build", 1, 30), ("environment", 0, 2), ("values", 124, 70), ("timings", 0, 9), ("compiled", -1, 0)]
    (tmp_path / "steps.tsv").write_text("".join(f"{name}\t{code}\t{spent}\t70\n" for name, code, spent in ended))
    text = work.report(work.read(tmp_path), dry_run=False)
    assert "DRY RUN" not in text
    assert "== build: failed with exit code 1, 30 s" in text
    assert "== values: cut off at its limit, 70 s" in text
    assert "== factorization: never started" in text
    assert "1 of 2 right, largest relative error 0.5" in text
    assert f"WRONG: {json.dumps(wrong)}" in text
    assert "6.0 (5.5)" in text or "6.0 (5.4)" in text
    assert "cuda: 1 not run: did not pass its self-check" in text
    assert "nvcc  NOT RUN: not there" in text
    *_, counts, unfinished = text.splitlines()
    assert counts == "1 checks right, 1 WRONG, 2 rows not run"
    assert "compiled (not started: no time was left)" in unfinished


def test_script_keeps_its_time_and_says_so(tmp_path):
    out = tmp_path / "check.json"
    result = shell("--dry-run", "--out", str(out), LORAP_CHECK_SECONDS="12")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("DRY RUN on a CPU with tiny sizes: no number below means anything.")
    assert "steps that did not finish: build (not part of a dry run); " in result.stdout
    assert "compiled (not started: no time was left)" in result.stdout
    found = json.loads(out.read_text())
    assert found["dry_run"]
    assert found["gpu"] is None
    assert found["steps"]["environment"]["rows"][1] == {"what": "torch", "found": torch.__version__}
    assert found["steps"]["compiled"]["rows"] == []


def test_script_without_a_gpu_refuses():
    result = shell()
    assert result.returncode == 2
    assert "torch sees no GPU here; --dry-run tests this program without one" in result.stderr
    assert result.stdout == ""


def test_script_explains_itself():
    result = shell("--help")
    assert result.returncode == 0
    assert "in under nine minutes" in result.stdout
    assert "set -u" not in result.stdout
    assert "unknown option --fast" in shell("--fast").stderr


def test_ops_load_without_transformers():
    code = "import sys; sys.modules['transformers'] = None; import gpu_values; ops = gpu_values.load_lorap(); "
    code += "import importlib.resources as r; path = r.files('lorap.kernels') / 'reference.py'; "
    code += "print(path.is_file(), len(ops.SCHEMAS))"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT / "benchmarks", capture_output=True, text=True, check=False
    )
    assert run.stdout.split() == ["True", "7"], run.stderr


def test_table_of_make_bench(module, tmp_path):
    """Ratios to lorap, and the time of one call where a CUDA graph holds several."""

    def one(kind: str, median: float, **extra: Any) -> dict[str, Any]:
        stats = {"median": median, "rounds": 9}
        return {"group": "q", "name": kind, "params": {"kind": kind}, "stats": stats, "extra_info": extra}

    table = module("table")
    moved = {"bytes": 2e6, "bandwidth": 4e9, "flops": 1e6, "threads": 2}
    run = {
        "machine_info": {"cpu": {"brand_raw": "Some CPU (R) @ 2 GHz", "count": 2}, "machine": "x86_64"},
        "datetime": "2026-01-31T12:00:00",
        "benchmarks": [one("dense", 3e-3, **moved), one("lorap", 2e-2, calls=20, **moved)],
    }
    groups = table.read(run)
    assert groups["q"]["lorap"]["seconds"] == pytest.approx(1e-3)
    assert groups["q"]["dense"]["ratio"] == pytest.approx(3)
    assert groups["q"]["lorap"]["share_of_bandwidth"] == pytest.approx(0.5)
    assert table.table(groups).splitlines()[2].split() == ["dense", "3", "ms", "3.00", "0.7", "17%", "0.3"]
    found = table.machine(run) | {"machine": "Some CPU (R) @ 2 GHz"}
    path = table.write(tmp_path, found, groups)
    assert path.name == "some-cpu-r-2-ghz.json"
    assert table.write(tmp_path, found, groups).name == "some-cpu-r-2-ghz-2.json"  # the first stays as it was
    assert table.write(tmp_path, found, groups, force=True) == path
    saved = json.loads(path.read_text())
    assert saved["machine"]["threads"] == 2
    assert saved["groups"]["q"]["dense"] == {"seconds": 0.003, "ratio": 3.0}
