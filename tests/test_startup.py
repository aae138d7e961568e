"""What is imported when: neither torch nor transformers before they are needed, and compressed checkpoints open all the same."""

from __future__ import annotations

import ast
import copy
import importlib
import importlib.util
import json
import pickle
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer

import lorap
from lorap.cli import COMMANDS, app
from lorap.integrations.after_import import after_import

ROOT = Path(lorap.__file__).parent
# Runs each snippet in a child of its own, into which nothing is imported but torch and what transformers takes of others.
IN_CHILDREN = """
import contextlib, json, logging, os, pickle, sys
import torch
logging.disable(logging.WARNING)
for name in ("accelerate", "sklearn.metrics", "torchao"):
    with contextlib.suppress(ImportError):
        __import__(name)
logging.disable(logging.NOTSET)
assert not {"lorap", "transformers"} & set(sys.modules)
folder, config, snippets = json.loads(sys.argv[1])
for code in snippets:
    sys.stdout.flush()
    if (child := os.fork()) == 0:
        try:
            exec(code)
            from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as known
            assert known["lorap"].__name__ == "LoRAPHfQuantizer"
            assert not [one for one in sys.meta_path if type(one).__module__.startswith("lorap")], "the finder is still there"
            os._exit(0)
        except BaseException:
            sys.excepthook(*sys.exc_info())
            sys.stderr.flush()
            os._exit(1)
    if os.waitpid(child, 0)[1]:
        print("failed:", code)
"""
OPEN = "AutoModelForCausalLM.from_pretrained(folder).model.layers[0].self_attn.q_proj.right"
ORDERS = (
    f"import lorap; from transformers import AutoModelForCausalLM; {OPEN}",
    "import transformers; import lorap; transformers.AutoConfig.from_pretrained(folder); "
    "transformers.AutoModel.from_pretrained(folder).layers[0].self_attn.q_proj.right",
    f"config = pickle.loads(bytes.fromhex(config)); from transformers import AutoModelForCausalLM; {OPEN}",
)
NAMES = """
import sys, lorap
lorap.CheckpointError, lorap.CompressionConfig(), lorap.config.RECIPES, dir(lorap), lorap.__version__
assert not hasattr(lorap, "nothing")
assert not {"torch", "transformers", "numpy"} & set(sys.modules)
# What hf_quantizer.py imports: if one of them imported transformers' quantizers, it would be half imported in its turn.
import lorap.checkpoint.format, lorap.checkpoint.guards, lorap.checkpoint.folders, lorap.nn.quantized, lorap.nn.linear
assert "transformers.quantizers.auto" not in sys.modules
import lorap.checkpoint.hf_quantizer
assert "lorap" in sys.modules["transformers.quantizers.auto"].AUTO_QUANTIZER_MAPPING
assert callable(lorap.compress) and callable(lorap.evaluate) and callable(lorap.recover)
assert lorap.compression.pipeline.compress is lorap.compress
names = {}
exec("from lorap import *", names)
assert set(lorap.__all__) <= set(names)
import pydoc
assert "class LowRankLinear" in pydoc.plain(pydoc.render_doc(lorap))
"""


def python(code: str, *arguments: str) -> str:
    """What a fresh interpreter prints; nothing but progress bars goes to stderr."""
    run = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert not [line for line in run.stderr.splitlines() if line and "Loading weights" not in line]
    return run.stdout


# ----------------------------------------------------------------------------------------------------------------------
# transformers knows compressed checkpoints


def test_compressed_checkpoints_open_whatever_is_imported_first(make_model, compress_small, tmp_path):
    model, report = compress_small(make_model("llama-gqa"))
    folder = lorap.save(model, tmp_path / "small", report=report)
    config = pickle.dumps(model.config).hex()
    assert python(IN_CHILDREN, json.dumps([str(folder), config, ORDERS])) == ""


@pytest.fixture
def watched(tmp_path, monkeypatch):
    """The name of a module that nobody has imported."""
    (tmp_path / "watched_one.py").write_text("done = ['code']\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield "watched_one"
    sys.modules.pop("watched_one", None)
    sys.meta_path[:] = [one for one in sys.meta_path if getattr(one, "name", "") != "watched_one"]


def test_an_action_waits_for_its_module_and_leaves_no_trace(watched):
    before = list(sys.meta_path)
    after_import(watched, lambda: sys.modules[watched].done.append("action"))
    spec = importlib.util.find_spec(watched)
    assert spec.loader.get_source(watched) == "done = ['code']\n"
    module = importlib.import_module(watched)
    assert module.done == ["code", "action"]
    assert sys.meta_path == before
    assert type(module.__loader__).__name__ == type(module.__spec__.loader).__name__ == "SourceFileLoader"
    after_import(watched, lambda: module.done.append("now"))
    assert module.done == ["code", "action", "now"]


def test_two_may_wait_for_one_module(watched):
    before, done = list(sys.meta_path), []
    for number in (1, 2):
        after_import(watched, lambda number=number: done.append(number))
    module = importlib.import_module(watched)
    assert done == [1, 2]
    assert sys.meta_path == before
    assert type(module.__loader__).__name__ == type(module.__spec__.loader).__name__ == "SourceFileLoader"


def test_an_import_that_fails_can_be_tried_again(watched, tmp_path):
    path, done = tmp_path / f"{watched}.py", []
    path.write_text("raise ImportError('not today, nor tomorrow')\n")
    after_import(watched, lambda: done.append(1))
    with pytest.raises(ImportError, match="not today"):
        importlib.import_module(watched)
    assert done == []
    path.write_text("x = 1\n")
    importlib.invalidate_caches()
    assert importlib.import_module(watched).x == 1
    assert done == [1]


# ----------------------------------------------------------------------------------------------------------------------
# Public names


def test_every_public_name_is_where_types_say_and_none_is_a_module():
    block = next(one for one in ast.parse((ROOT / "__init__.py").read_text("utf-8")).body if isinstance(one, ast.If))
    typed = {name.name: one.module for one in block.body for name in one.names}
    assert typed == lorap._MODULES
    assert set(lorap.__all__) <= set(dir(lorap))
    for name in lorap.__all__:
        value = getattr(lorap, name)
        if name in typed and isinstance(value, type):
            assert pickle.loads(pickle.dumps(value)) is copy.deepcopy(value) is value
    assert not {one.name for one in pkgutil.iter_modules(lorap.__path__)} & set(lorap.__all__)
    with pytest.raises(AttributeError, match="'lorap' has no attribute 'nothing'"):
        lorap.nothing  # noqa: B018


def test_torch_is_imported_for_a_name_that_needs_it_and_the_plug_in_registers_itself():
    assert python(NAMES) == ""


# ----------------------------------------------------------------------------------------------------------------------
# Commands

# Runs the command line in this process, and tells what it imported; stderr is for what nobody expects.
IMPORTED = """
import io, sys
from contextlib import redirect_stderr
from lorap.cli import app
for words, code, part in {runs!r}:
    said = io.StringIO()
    try:
        with redirect_stderr(said):
            app(words)
    except SystemExit as end:
        assert (end.code or 0) == code, (words, end.code)
    assert part in said.getvalue(), (words, said.getvalue())
heavy = sorted({{"torch", "transformers"}} & set(sys.modules))
assert not heavy, heavy
"""


# Mistakes that a command tells by its words alone.
MISTAKES = (
    (["compress", "model", "out", "--sparsity", "2"], "--sparsity"),
    (["plan", "model", "--gpu", "h100"], "plan has no --gpu any more"),
    (["export", "model", "dest", "--format", "onnx"], "unknown format 'onnx'"),
    (["eval", "model", "--limit", "5"], "--limit and --task-data belong to --tasks"),
    (["inspect", "model", "out", "--layers", "x"], "--layers x"),
)


def test_what_needs_no_model_imports_neither_torch_nor_transformers():
    runs = [(words, 0, "") for words in (["--help"], ["--version"], ["-h"])]
    runs += [([name, "--help"], 0, "") for name in COMMANDS]
    runs += [([name, "--nothing"], 2, "No such option: --nothing") for name in COMMANDS]
    runs += [(words, 2, message) for words, message in MISTAKES]
    said = python(IMPORTED.format(runs=runs))
    assert said.count("Commands:") == 2
    for name in COMMANDS:
        assert f"\n  {name} " in said
        assert f"Usage: -c {name} " in said


def test_help_says_of_each_command_what_the_command_says():
    commands = typer.main.get_command(app).commands
    assert {name: summary for name, (_, summary) in COMMANDS.items()} == {
        name: command.help.split("\n\n")[0] for name, command in commands.items()
    }
