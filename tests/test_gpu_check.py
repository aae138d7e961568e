"""benchmarks/gpu_check.sh without a GPU: its steps run small on the CPU, and its report hides nothing.

Proved here: the predictions are the published arithmetic; a wrong value, an unwritten element and an exception all show; a
step that is cut off, fails or never starts is named; what did not run says why. Not proved: anything about a GPU.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import time
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
        if name.startswith("gpu_") or name in ("table", "fake_gpu", "random_models"):
            del sys.modules[name]


def rows_of(check: Any, step: str) -> list[dict[str, Any]]:
    return [check.run(what, find) for what, find in check.STEPS[step](CPU, check.SCALE)]


def shell(*options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(ROOT / "benchmarks/gpu_check.sh"), *options]
    settings = os.environ | {"OMP_NUM_THREADS": "1", "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""} | environment
    return subprocess.run(command, capture_output=True, text=True, cwd="/", env=settings, check=False, timeout=300)


# Times of the review of these kernels for 4096 x 4096 at ranks 512, 1024 and 1632, from the same arithmetic done by hand.
MODELLED = {  # tokens: dense, then two GEMMs and the one-launch kernel for each rank
    1: (10, {512: (6.5, 4.3), 1024: (9, 6.5), 1632: (11.8, 8.5)}),
    16: (10.5, {512: (7.5, None), 1024: (9.5, 7.5), 1632: (12, 10)}),
    2048: (93, {512: (27, None), 1024: (50, None), 1632: (76, None)}),
}


@pytest.mark.parametrize("tokens", MODELLED)
def test_predictions(module, tokens):
    predicted, (dense, by_rank) = module("gpu_timings").predicted, MODELLED[tokens]
    assert 1e6 * predicted("dense", tokens, 4096, 512, 4096) == pytest.approx(dense, rel=0.08)
    for rank, (two, one) in by_rank.items():
        sizes = (tokens, 4096, rank, 4096)
        assert 1e6 * predicted("two GEMMs", *sizes) == pytest.approx(two, rel=0.14)
        if one is not None:
            assert 1e6 * predicted("cuda", *sizes) == pytest.approx(one, rel=0.08)
        if tokens == 1:
            assert predicted("triton", *sizes) <= 1.15 * predicted("cuda", *sizes)
            assert predicted("triton", *sizes) < predicted("triton, no pdl", *sizes)


def test_reference_passes_every_case(module):
    check = module("gpu_check")
    rows = rows_of(check, "values")
    reference = [row for row in rows if row["backend"] == "reference"]
    assert len(reference) == (2 * (9 + 2) + 2) * 12 + 3 * 6  # numbers of tokens x kinds of case, and sums of squares
    assert all(row["ok"] for row in reference)
    others = {row["backend"] for row in rows} - {"reference"}
    assert others == {"triton", "triton, no pdl", "triton one launch"}
    models = {row["case"].split()[0] for row in rows if "K=64" in row["case"]}
    assert models == {f"M={m}" for m in (1, 2, 3, 4, 6, 8, 16, 17, 32)}
    assert {row["not_run"] for row in rows if row["backend"] in others} == {"no GPU"}


@pytest.mark.parametrize(
    "step", ["self-check", "self-check-cuda", "values-cuda", "graphs", "graphs-cuda", "merged-cuda", "quantized-cuda"]
)
def test_nothing_is_claimed_without_a_gpu(module, step):
    rows = rows_of(module("gpu_check"), step)
    assert rows
    assert {row.get("not_run") for row in rows} == {"no GPU"}
    assert not any("ok" in row for row in rows)


@pytest.mark.parametrize("step", ["timings", "merged", "quantized", "trellis", "squares", "launches"])
def test_timings_run_small(module, step):
    for row in rows_of(module("gpu_check"), step):
        needs_gpu = any(word in row["kind"] for word in ("triton", "cuda", "one-launch"))
        assert row.get("not_run") == ("no GPU" if needs_gpu else None)
        assert ("us" in row) != needs_gpu
        if step == "timings" and not needs_gpu:
            assert row["error"] < 1e-2  # a time of a wrong result says nothing


def test_factorizations_run_small(module):
    rows = rows_of(module("gpu_check"), "factorization")
    assert len(rows) == 4 + 3 * 5
    assert all(row["seconds"] > 0 for row in rows)
    ours = [row for row in rows if row["kind"].startswith("factorize")]
    assert {row["solved by"] for row in ours} == {"eigh", "mixed", "subspace"}
    assert all(0.999 < row["error_over_eigh"] < 1.0002 for row in ours)
    assert rows[: len(ours)] == ours  # first, so that torch's slow drivers cost nothing of them
    eigh = rows[len(ours) + 1]
    assert eigh == {"kind": "eigh of 128x128, float64", "predicted_seconds": 0.8, "seconds": eigh["seconds"]}


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


def test_kernels_that_failed_their_check_are_not_timed_and_those_not_reached_are(module, tmp_path):
    check, timings = module("gpu_check"), module("gpu_timings")
    rows = [
        {"op": "low_rank_linear", "backend": "triton", "dtype": "bfloat16", "error": 1e-3, "ok": True},
        {"op": "low_rank_linear", "backend": "cuda", "dtype": "bfloat16", "error": 1.0, "ok": False},
    ]
    assert check.verdicts(tmp_path) is None
    (tmp_path / "self-check.jsonl").write_text("\n".join(map(json.dumps, rows)))
    timings.verdicts = check.verdicts(tmp_path)
    gpu = torch.device("cuda")
    assert timings.why_not("triton", 1, 64, 64, gpu) is None
    assert timings.why_not("cuda", 1, 64, 64, gpu) == "did not pass its self-check"
    assert (
        timings.why_not("triton, no pdl", 1, 64, 64, gpu) is None
    )  # the check was cut short: not checked is not failed
    assert timings.why_not("cuda", 17, 64, 64, gpu) == "for at most 16 tokens"
    assert timings.why_not("cuda", 1, 64, 1492, gpu) == "K and R must be multiples of 8"
    assert timings.why_not("dense", 9, 64, 1492, gpu) is None


def test_shards_share_the_rows_and_no_kernel_is_compiled_twice(module):
    check = module("gpu_check")
    rows = [what for what, _ in check.STEPS["values"](CPU, check.SCALE)]
    groups = [check.shard_of(row) for row in rows]
    assert len(set(groups)) >= 24
    assert max(groups.count(group) for group in set(groups)) <= 25
    linear = [
        group for row, group in zip(rows, groups, strict=True) if (row["op"], row["dtype"]) == ("linear", "float16")
    ]
    assert len(set(linear)) == len({row["backend"] for row in rows if row["op"] == "linear"})


def test_report_names_what_is_missing(module, tmp_path, capsys):
    work = module("gpu_report")
    wrong = {"op": "linear", "backend": "triton", "dtype": "float16", "case": "M=3", "error": 0.5, "ok": False}
    layer = {"shape": "q, k", "K": 1, "R": 2, "N": 3, "tokens": 8, "predicted_us": 5.45}
    rows = {
        "environment": [{"what": "GPU", "found": "Some GPU"}, {"what": "nvcc", "not_run": "not there"}],
        "program": [{"case": f"M={m}", "error": 1e-3, "ok": True} for m in range(200)],
        "values": [wrong, wrong | {"ok": True, "error": 1e-4}],
        "timings": [layer | {"kind": "triton", "us": 6.0, "error": 2e-3}],
        "timings-cuda": [layer | {"kind": "cuda", "not_run": "did not pass its self-check"}],
        "models": [{"model": f"{i}", "batch": 1, "ms": 3.0} for i in range(120)],
    }
    for step, found in rows.items():
        (tmp_path / f"{step}.jsonl").write_text("\n".join(map(json.dumps, found)) + "\n")
    ended = [
        ("environment", 0, 2),
        ("build", 1, 30),
        ("program", 0, 1),
        ("values", 124, 70),
        ("timings", 0, 9),
        ("layer", -1, 0),
    ]
    (tmp_path / "steps.tsv").write_text("".join(f"{name}\t{code}\t{spent}\t70\n" for name, code, spent in ended))
    assert work.finish(tmp_path, dry_run=False)
    printed, text = capsys.readouterr().out.splitlines(), (tmp_path / "report.txt").read_text()
    assert len(printed) <= 100
    assert printed[0] == "201 checks right, 1 WRONG, 2 rows not run"
    assert f"WRONG: {json.dumps(wrong)}" in printed[1]
    assert "lines more in the report" in printed[-2]
    assert "steps that are not started: no time was left: layer" in text
    assert "== build: failed with exit code 1, 30 s" in text
    assert "== values: cut off at its limit, 70 s" in text
    assert "1 of 2 right, largest relative error 0.5" in text
    assert "6.0 (5.5)" in text or "6.0 (5.4)" in text
    assert "2.0e-03" in text
    assert "cuda: 1 not run: did not pass its self-check" in text
    assert "nvcc  NOT RUN: not there" in text
    assert json.loads((tmp_path / "report.json").read_text())["steps"]["values"]["rows"][0] == wrong


@pytest.mark.slow
def test_script_keeps_its_time_and_says_so(tmp_path):
    result = shell("check", "--dry-run", "--out", str(tmp_path), "--seconds", "16")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("DRY RUN on a CPU with tiny sizes: no number below means anything.")
    assert "steps that are not part of a dry run: build, program, sanitizer\n" in result.stdout
    assert re.search(r"steps that are not started: no time was left: .*factorization\n", result.stdout)
    assert len(result.stdout.splitlines()) <= 100
    found = json.loads((tmp_path / "check/report.json").read_text())
    assert found["dry_run"]
    assert found["gpu"] is None
    environment = found["steps"]["environment"]
    if environment["state"] == "finished":  # a machine that is busy may need the whole time for it
        assert environment["rows"][1] == {"what": "torch", "found": torch.__version__}
    assert found["steps"]["factorization"]["rows"] == []


def test_script_without_a_gpu_refuses(tmp_path):
    result = shell("tune", "--out", str(tmp_path))
    assert result.returncode == 2
    assert "torch sees no GPU here; --dry-run tests this program without one" in result.stderr


def test_script_explains_itself():
    result = shell("--help")
    assert result.returncode == 0
    assert "two commands of less than six minutes each" in result.stdout
    assert "invalid choice: 'fast'" in shell("fast").stderr


def test_a_step_that_hangs_is_ended_with_all_that_it_started(module, monkeypatch, tmp_path):
    runner = module("gpu_run")
    child = tmp_path / "child"
    script = f"import subprocess; p = subprocess.Popen(['sleep', '60']); open({str(child)!r}, 'w').write(str(p.pid)); p.wait()"
    monkeypatch.setattr(runner, "ROOT", tmp_path)
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks/gpu_check.py").write_text(script)
    assert runner.run(runner.Step("values", 60), tmp_path, 5, dry_run=False) == 124
    state = Path(f"/proc/{child.read_text()}/stat")
    for _ in range(1500):
        if not state.exists() or state.read_text().split()[2] == "Z":
            return
        time.sleep(0.02)
    pytest.fail("still running")


@pytest.mark.slow
def test_whatever_the_commands_launch_compiles_fits_and_is_done_in_time():
    """Triton's own compiler, for sm_90: every launch of both commands. 12 processes share the work there."""
    pytest.importorskip("triton")
    run = subprocess.run(
        [sys.executable, "fake_gpu.py"], cwd=ROOT / "benchmarks", capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    steps = {row["step"]: row for row in map(json.loads, run.stdout.splitlines())}
    assert set(steps) == {"self-check", "values", "timings", "merged", "sweep"}
    for row in steps.values():
        assert row["kernels"] > 0
        assert row["failed"] == []
        assert row["shared"] <= 227 * 1024
    # A kernel takes 0.6 seconds of a core, and 45 (values), 30 (compile) and 40 (sweep-compile) seconds of 12 cores are there.
    assert 0.6 * steps["values"]["kernels"] / 12 <= 45
    assert 0.6 * (steps["timings"]["kernels"] + steps["self-check"]["kernels"]) / 12 <= 60
    assert 0.6 * steps["sweep"]["kernels"] / 12 <= 40


def test_models_and_a_layer_run_small(module):
    rows = rows_of(module("gpu_check"), "models")
    assert [row for row in rows if "not_run" in row] == []
    decoded = [row for row in rows if "ms" in row]
    assert len(decoded) == 2 * len(rows) / 3
    assert {row["host_syncs"] for row in decoded} == {0}  # what waits for a GPU cannot be captured
    assert max(row["difference"] for row in decoded) < 0.05
    assert all(row["generate_per_s"] > 0 for row in rows if "prefill_ms" in row)
    moment, factors = rows_of(module("gpu_check"), "layer")
    assert moment["error"] < 1e-9
    assert factors["seconds"] > 0


def test_ops_load_without_transformers():
    code = "import sys; sys.modules['transformers'] = None; import gpu_values; ops = gpu_values.load_lorap(); "
    code += "import importlib.resources as r; path = r.files('lorap.kernels') / 'reference.py'; "
    code += "print(path.is_file(), len(ops.SCHEMAS))"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT / "benchmarks", capture_output=True, text=True, check=False
    )
    assert run.stdout.split() == ["True", "12"], run.stderr


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
    (row,) = (line.split() for line in table.table(groups).splitlines() if line.split()[:1] == ["dense"])
    assert row == ["dense", "3", "ms", "3.00", "0.7", "17%", "0.3"]
    found = table.machine(run) | {"machine": "Some CPU (R) @ 2 GHz"}
    path = table.write(tmp_path, found, groups)
    assert path.name == "some-cpu-r-2-ghz.json"
    assert table.write(tmp_path, found, groups).name == "some-cpu-r-2-ghz-2.json"  # the first stays as it was
    assert table.write(tmp_path, found, groups, force=True) == path
    saved = json.loads(path.read_text())
    assert saved["machine"]["threads"] == 2
    assert saved["groups"]["q"]["dense"] == {"seconds": 0.003, "ratio": 3.0}
