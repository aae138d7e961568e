"""stderr of a command that succeeds holds its progress bars and nothing else; with ``--quiet`` it is empty.

Texts here are plain: of any other file one line more says how it was read (test_places.py).
Libraries and kernels written in C++ write to the file descriptor, so that is what is read. Every command runs, in one fresh
process, in which libraries are imported as for a user.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import typer

from lorap.cli import app
from lorap.evaluation.profiling import _without_marks

# Warnings come once per place in a process; leaving catch_warnings makes Python forget which it has shown.
EVERY_COMMAND = """
import json, os, sys, tempfile, warnings

from lorap.evaluation.comparison import cells
from lorap.evaluation.comparison import worker
from lorap.cli import app

# Compared models are measured in this process: what theirs write is not passed on.
cells.run_worker = lambda request: worker.main(json.dumps(request))

def run(command):
    files = [tempfile.TemporaryFile(), tempfile.TemporaryFile()]
    before = [os.dup(1), os.dup(2)]
    for number, file in enumerate(files, 1):
        os.dup2(file.fileno(), number)
    try:
        with warnings.catch_warnings():
            app(command)
    except SystemExit as end:
        code = end.code
    sys.stdout.flush(), sys.stderr.flush()
    for number, descriptor in enumerate(before, 1):
        os.dup2(descriptor, number)
        os.close(descriptor)
    for file in files:
        file.seek(0)
    return [code, *(file.read().decode() for file in files)]

print(json.dumps([run(command) for command in json.loads(sys.argv[1])]))
"""
# As tqdm draws it, also where nothing is known of the end.
BAR = re.compile(r"(.+: +)?(\d+%\||\d+\S* \[).*\]")
WITH_BARS = {"plan", "compress", "eval", "compare", "recover", "inspect"}


def commands(model: Path, text: Path, folder: Path) -> list[list[Any]]:
    """One of each, in an order in which later ones find what they need."""
    small, calibration = folder / "small", ["--num-calibration-samples", 8, "--calibration-seq-len", 32]
    texts = ["--seq-len", 32, "--max-tokens", 320, "--text", text]
    return [
        ["plan", model, "--calibration", text, "--eval-text", text, "--out", folder, *calibration],
        ["compress", model, small, "--sparsity", 0.4, "--calibration", text, "--eval-text", text, *calibration],
        ["eval", small, *texts, "--baseline", model],
        ["compare", model, small, *texts, "--prompt-tokens", 5, "--new-tokens", 2, "--rounds", 1],
        ["generate", small, "--prompt", "The", "--max-new-tokens", 3],
        ["recover", small, folder / "new", "--steps", 2, "--text", text, "--eval-text", text, "--seq-len", 32],
        ["export", small, folder / "plain", "--pad-widths"],
        ["report", small],
        ["inspect", model, folder / "look", "--calibration", text, *calibration, "--no-plots"],
        ["info", small],
        ["env"],
        ["profile", small, "--tokens", 5, "--new-tokens", 2],
    ]


def test_stderr_holds_progress_bars_and_nothing_else(model_folder, small_text, tmp_path):
    known = typer.main.get_command(app).commands
    has_quiet = {name for name, command in known.items() if any(one.name == "quiet" for one in command.params)}
    loud = commands(model_folder, small_text, tmp_path / "loud")
    assert {command[0] for command in loud} == set(known)
    quiet = [[*one, "--quiet"] for one in commands(model_folder, small_text, tmp_path / "quiet") if one[0] in has_quiet]
    (tmp_path / "loud").mkdir()
    (tmp_path / "quiet").mkdir()
    told = json.dumps([[str(part) for part in command] for command in loud + quiet])
    # The warnings that a user sees, not those that a developer asked for.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONWARNINGS"}
    done = subprocess.run(
        [sys.executable, "-c", EVERY_COMMAND, told], capture_output=True, text=True, env=environment, timeout=600
    )
    assert (done.returncode, done.stderr) == (0, "")
    for command, (code, stdout, stderr) in zip(loud + quiet, json.loads(done.stdout), strict=True):
        assert (code, bool(stdout)) == (0, True), (command, stdout, stderr)
        lines = [line for line in re.split(r"[\r\n]+", stderr) if line.strip()]
        bars = [line for line in lines if BAR.fullmatch(line.strip())]
        assert lines == bars, command
        assert command[-1] != "--quiet" or not bars, command
        assert command in quiet or command[0] not in WITH_BARS or bars, command


def test_what_the_profiler_has_to_say_is_passed_on(capfd):
    with _without_marks():
        os.write(2, b"USDT:2026-11-29 SyncActivityProfilerHandler.cpp:52] profiler_start\nERROR: no counters\n")
    os.write(2, b"afterwards\n")
    assert capfd.readouterr().err == "ERROR: no counters\nafterwards\n"
