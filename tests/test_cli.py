"""The command line: commands that work, and mistakes that end in one sentence and exit code 2.

Proved here: ``--json`` output is one parseable last line whose numbers agree with the files; mistakes name their cause
without a traceback and leave no output folder; an interrupted or killed run exits with 130 or 143 and leaves nothing behind.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import transformers
import typer
from commands import assert_refused, last_json, run
from safetensors.torch import load_file, save_file

import lorap
from lorap.checkpoint.folders import WEIGHTS, read_tensors
from lorap.cli import app
from lorap.cli.common import as_options, be_quiet, listen
from lorap.cli.compress import chosen_config
from lorap.config import CHOICES, RECIPES

SMALL = ["--num-calibration-samples", "8", "--calibration-seq-len", "32", "--device", "cpu", "--quiet"]
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def compressed_params(folder: Path) -> int:
    tensors = read_tensors(folder)
    return sum(
        info.numel for name, info in tensors.items() if info.is_parameter and set(name.split(".")) & set(PROJECTIONS)
    )


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


@pytest.fixture
def small_folder(model_folder: Path, tmp_path: Path) -> Path:
    """``model_folder``, compressed to half by the command itself, by the paper's recipe."""
    out = tmp_path / "small"
    result = run("compress", model_folder, out, "--recipe", "lorap", "--sparsity", 0.5, "--eval-text", "none", *SMALL)
    assert result.exit_code == 0, result.output
    return out


# ----------------------------------------------------------------------------------------------------------------------
# What works


def test_compress_reports_what_it_wrote(model_folder, small_text, tmp_path):
    out = tmp_path / "out"
    options = ["--sparsity", 0.5, "--calibration", small_text, "--eval-text", small_text, "--json"]
    report = last_json(run("compress", model_folder, out, *options, *SMALL))
    assert report["out"] == str(out)
    assert report["params_after"] == compressed_params(out)
    assert report["params_before"] == compressed_params(model_folder)
    assert report["param_ratio"] == pytest.approx(compressed_params(out) / compressed_params(model_folder))
    assert report["param_ratio"] == pytest.approx(0.5, abs=0.03)
    saved = sum(info.numel for info in read_tensors(out).values() if info.is_parameter)
    assert report["params_saved"] == saved
    (evaluation,) = report["evaluations"]
    assert evaluation["text"] == "text.txt"
    assert evaluation["after"]["nats"] != evaluation["before"]["nats"]
    assert (out / "tokenizer.json").is_file()


def test_compress_with_weighted_sources(model_folder, small_text, tmp_path):
    options = ["--calibration", f"{small_text}=2", "--calibration", "default/news", "--eval-text", "none", "--json"]
    found = last_json(run("compress", model_folder, tmp_path / "out", *options, *SMALL))["calibration"]
    assert (found["name"], found["windows"]) == ("text.txt, default/news", 8)
    assert found["sources"] == [
        {"name": "text.txt", "weight": 2.0, "windows": 5},
        {"name": "default/news", "weight": 1.0, "windows": 3},
    ]
    card = (tmp_path / "out" / "README.md").read_text("utf-8")
    assert "- `text.txt`: 5 windows, weight 2\n- `default/news`: 3 windows, weight 1\n" in card


def test_one_source_is_not_listed_in_the_model_card(model_folder, small_text, tmp_path):
    options = ["--calibration", small_text, "--eval-text", "none", "--json"]
    found = last_json(run("compress", model_folder, tmp_path / "out", *options, *SMALL))["calibration"]
    assert found["sources"] == [{"name": "text.txt", "weight": 1.0, "windows": 8}]
    assert "weight 1" not in (tmp_path / "out" / "README.md").read_text("utf-8")


def test_every_field_of_the_config_is_an_option():
    parameters = {parameter.name for parameter in typer.main.get_command(app).commands["compress"].params}
    assert {field.name for field in fields(lorap.CompressionConfig)} <= parameters


def test_options_reach_the_config(model_folder, tmp_path):
    """Each by its name, whatever it is: numbers, names, and a list with spaces; the rest is the recipe's."""
    options = [
        "--sublayers",
        "mlp, self_attn",
        "--least-important-kept",
        0.25,
        "--attention-method",
        "svd",
        "--seed",
        7,
    ]
    report = last_json(
        run("compress", model_folder, tmp_path / "out", "--eval-text", "none", "--json", *options, *SMALL)
    )
    wanted = {"sublayers": ["mlp", "self_attn"], "least_important_kept": 0.25, "attention_method": "svd", "seed": 7}
    wanted |= {"num_calibration_samples": 8, "calibration_seq_len": 32, "sparsity": 0.2, "recipe": "best"}
    for name, value in RECIPES["best"].items():
        wanted.setdefault(name, value)
    assert report["config"] == wanted


def parsed(*options: Any) -> dict[str, Any]:
    """What click makes of a command line; nothing is run."""
    command = typer.main.get_command(app).commands["compress"]
    return command.make_context("compress", ["model", "out", *map(str, options)]).params


def test_without_options_the_config_is_the_default():
    assert chosen_config(parsed()) == lorap.CompressionConfig()


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_alone(recipe):
    assert chosen_config(parsed("--recipe", recipe)) == lorap.CompressionConfig(recipe=recipe)


# A value for each option that differs from that of the recipe it is given with.
WRITTEN: list[tuple[str, list[Any], Any]] = [
    ("sublayers", ["--sublayers", " mlp"], ("mlp",)),
    ("allocation", ["--allocation", "even"], "even"),
    ("vo_to_qk_ratio", ["--vo-to-qk-ratio", "1.5"], 1.5),
    ("shapes", ["--shapes", "uniform"], "uniform"),
    ("rank_multiple", ["--rank-multiple", "24"], 24),
    ("width_multiple", ["--width-multiple", "7"], 7),
    ("attention_method", ["--attention-method", "afm"], "afm"),
    ("metric_shrinkage", ["--metric-shrinkage", ".25"], 0.25),
    ("output_weighting", ["--output-weighting", "none"], "none"),
    ("anchor", ["--anchor", "dense"], "dense"),
    ("token_weighting", ["--token-weighting", "residual"], "residual"),
    ("mlp_method", ["--mlp-method", "factorize", "--allocation", "even"], "factorize"),
    ("channel_score", ["--channel-score", "fluctuation"], "fluctuation"),
    ("least_important_kept", ["--least-important-kept", "0.1"], 0.1),
    ("repair", ["--no-repair"], False),
    ("repair_ridge", ["--repair-ridge", "1e-3"], 0.001),
    ("bias_compensation", ["--bias-compensation"], True),
    ("sequential", ["--sequential", "sublayer"], "sublayer"),
    ("storage", ["--storage", "factors"], "factors"),
    ("correction_steps", ["--correction-steps", "3"], 3),
    ("scale_steps", ["--scale-steps", "3"], 3),
    ("weights", ["--weights", "int4"], "int4"),
    ("group_size", ["--group-size", "128"], 128),
    ("target", ["--target", "stock"], "stock"),
]


@pytest.mark.parametrize(("name", "options", "value"), WRITTEN, ids=[name for name, _, _ in WRITTEN])
def test_each_option_replaces_one_choice_of_best(name, options, value):
    extra = {"allocation": "even"} if name == "mlp_method" else {}
    assert value != RECIPES["best"][name]
    found = chosen_config(parsed(*options))
    assert found == lorap.CompressionConfig(**{name: value}, **extra)
    assert type(getattr(found, name)) is type(value)


def test_written_options_are_all_choices_of_a_recipe():
    assert {name for name, _, _ in WRITTEN} == set(RECIPES["best"])


def test_auto_and_yes_where_the_recipe_says_otherwise():
    options = ["--rank-multiple", "auto", "--width-multiple", "auto", "--metric-shrinkage", "auto"]
    options += ["--repair-ridge", "auto", "--repair", "--no-bias-compensation"]
    found = chosen_config(parsed("--recipe", "lorap", *options))
    assert (found.rank_multiple, found.width_multiple) == ("auto", "auto")
    assert (found.metric_shrinkage, found.repair_ridge) == ("auto", "auto")
    assert (found.repair, found.bias_compensation) == (True, False)
    assert found.attention_method == "awsvd"


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--rank-multiple", "eight", "--rank-multiple should be a valid integer or 'auto' and is 'eight'"),
        ("--rank-multiple", "8.0", "--rank-multiple should be a valid integer or 'auto' and is 8.0"),
        ("--metric-shrinkage", "nan", "--metric-shrinkage should be less than or equal to 1 or 'auto' and is nan"),
        ("--repair-ridge", "-0.1", "--repair-ridge should be greater than or equal to 0 or 'auto' and is -0.1"),
        ("--shapes", "square", "--shapes should be 'free' or 'uniform' and is 'square'"),
        ("--mlp-method", "factorize", "--allocation loss decides on FFN widths, but --mlp-method is factorize"),
    ],
)
def test_values_that_are_no_choice(option, value, message, model_folder, tmp_path):
    assert_refused(run("compress", model_folder, tmp_path / "out", option, value, *SMALL), message)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("lower it, or target lorap; width_multiple (32).", "lower it, or --target lorap; --width-multiple (32)."),
        ("learning_rate is 2; use shapes free", "--learning-rate is 2; use --shapes free"),
        ("our target is small, the target stocky", "our target is small, the target stocky"),
        (
            "no folder /a/seq_len/b, nor seq_len.txt: 'batch_size'",
            "no folder /a/seq_len/b, nor seq_len.txt: 'batch_size'",
        ),
    ],
)
def test_fields_are_told_as_options(said, shown):
    assert as_options(said) == shown


@pytest.fixture
def library(monkeypatch) -> Iterator[logging.Logger]:
    """The logger of the library, as it was before, afterwards."""
    logger = logging.getLogger("lorap")
    before = logger.handlers, logger.level
    yield logging.getLogger("lorap.some.module")
    logger.handlers, level = before
    logger.setLevel(level)


def test_what_the_library_logs_is_told_once_and_by_level(library, capsys):
    for verbosity, level in ((0, "info"), (1, "debug")):
        listen(verbosity)
        library.debug("kept")
        library.info("read %d records", 7)
        time.sleep(0.002)  # with -v a line begins with the time, in milliseconds
        library.info("read %d records", 7)
        library.warning("begun anew")
        told = capsys.readouterr()
        lines = told.err.splitlines()
        assert told.out == ""
        assert len(lines) == (3 if level == "debug" else 2)
        assert lines[-2].endswith("read 7 records")
        assert lines[-1].startswith("lorap: ")
        assert ("some.module: kept" in lines[0]) == (level == "debug")
    be_quiet(True)
    library.info("read another")
    assert capsys.readouterr().err == ""


def test_libraries_log_as_loudly_as_asked_and_quiet_silences_their_bars(library, monkeypatch):
    modules = [transformers.utils.logging, huggingface_hub.utils.logging]
    before = [module.get_verbosity() for module in modules]
    try:
        listen(2)
        assert [module.get_verbosity() for module in modules] == [logging.INFO, logging.INFO]
        be_quiet(True)
        assert huggingface_hub.utils.are_progress_bars_disabled()
        assert not transformers.utils.logging.is_progress_bar_enabled()
    finally:
        for module, level in zip(modules, before, strict=True):
            module.set_verbosity(level)
        huggingface_hub.utils.enable_progress_bars()
        transformers.utils.logging.enable_progress_bar()


def test_every_command_takes_verbose(model_folder):
    for name, command in typer.main.get_command(app).commands.items():
        assert "--verbose" in command.get_help(typer.Context(command, info_name=name)), name
    result = run("info", model_folder, "-vv")
    assert result.exit_code == 0, result.output


def test_help_says_what_each_recipe_and_option_is():
    help_text = run("compress", "--help").stdout
    for recipe in RECIPES:
        assert any(line.strip().startswith(f"{recipe} ") for line in help_text.splitlines()), recipe
    for name in RECIPES["best"]:
        assert f"--{name.replace('_', '-')} " in help_text, name
    words = " ".join(help_text.split())
    for name, ways in CHOICES.items():
        assert f"--{name.replace('_', '-')} {'|'.join(ways)} " in words, name
    assert "--repair / --no-repair" in help_text
    assert "--metric-shrinkage NUMBER|auto" in help_text


def test_help_names_every_kind_of_calibration():
    words = " ".join(run("compress", "--help").stdout.split())
    start = words.index("--calibration FILE|NAME|NAME=WEIGHT ")
    told = words[start : words.index("--eval-text", start)]
    for kind in ("self (", "default (", "default/NAME", "NAME=WEIGHT.", "`datasets`", "JSONL", ".npy", ".safetensors"):
        assert kind in told, kind
    assert told.strip().endswith("[default: default]")


def test_eval_against_a_baseline_and_the_report(small_folder, model_folder, small_text, tmp_path):
    """The difference is that of two runs of the command, and what the compression measured is measured again, or told apart."""
    report = json.loads((small_folder / "lorap_report.json").read_text())
    entry = {"tokens": 640, "seq_len": 32, "perplexity": 7.125, "nats": 1.9636, "text": small_text.name, "seconds": 1.0}
    report["evaluations"] = [{"text": small_text.name, "before": None, "after": entry, "increase_nats": None}]
    (small_folder / "lorap_report.json").write_text(json.dumps(report))
    options = ["--text", small_text, "--seq-len", 32, "--max-tokens", 960, "--quiet", "--device", "cpu"]
    told = run("eval", small_folder, "--baseline", model_folder, *options, "--json")
    (result,) = last_json(told)["results"]
    (alone,) = last_json(run("eval", model_folder, *options, "--json"))["results"]
    assert result["baseline"]["nats"] == alone["nats"]
    difference = result["difference"]
    assert difference["nats"] == pytest.approx(result["nats"] - alone["nats"], rel=1e-9)
    assert difference["windows"] == 30
    assert 0 < difference["error"] < 0.05
    assert difference["high"] - difference["nats"] == pytest.approx(1.96 * difference["error"], rel=1e-3)
    assert f"{difference['nats']:+.4f} ± {difference['error']:.4f} nats" in told.stderr
    assert "perplexity 7.125" in told.stderr
    assert "--max-tokens 640 --seq-len 32" in told.stderr
    same = run("eval", small_folder, "--text", small_text, "--seq-len", 32, "--max-tokens", 640, "--device", "cpu")
    assert "7.125" not in same.output


def test_compress_and_eval_say_the_same_number(model_folder, small_text, tmp_path):
    made = run("compress", model_folder, tmp_path / "out", "--eval-text", small_text, "--json", *SMALL)
    (entry,) = last_json(made)["evaluations"]
    sizes = ["--max-tokens", entry["after"]["tokens"], "--seq-len", entry["after"]["seq_len"]]
    for folder, when in ((model_folder, "before"), (tmp_path / "out", "after")):
        options = ["--text", small_text, *sizes, "--device", "cpu", "--quiet", "--json"]
        (result,) = last_json(run("eval", folder, *options))["results"]
        assert result["nats"] == pytest.approx(entry[when]["nats"], rel=1e-6)


def test_generate_is_greedy_and_agrees_with_transformers(small_folder, tokenizer):
    prompt = "The capital of"
    options = ["--prompt", prompt, "--max-new-tokens", 6, "--device", "cpu", "--json"]
    (result,) = last_json(run("generate", small_folder, *options))["results"]
    model = transformers.AutoModelForCausalLM.from_pretrained(small_folder)
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    new = model.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :]
    assert result["continuation"] == tokenizer.decode(new, skip_special_tokens=True)
    assert result["new_tokens"] == len(new)


def test_info_of_dense_and_compressed(model_folder, small_folder):
    dense, small = (last_json(run("info", folder, "--json")) for folder in (model_folder, small_folder))
    assert not dense["compressed_by_lorap"]
    assert dense["param_ratio"] == 1.0
    assert small["compressed_by_lorap"]
    assert small["param_ratio"] == pytest.approx(compressed_params(small_folder) / compressed_params(model_folder))
    assert small["params_before"] == dense["params"]
    assert small["intermediate_size"] == [50]
    assert small["dense_intermediate_size"] == 100
    assert set(small["ranks"]) == set(PROJECTIONS[:4])


def test_a_finished_compression_says_what_can_be_done_next(model_folder, tmp_path):
    loud = [option for option in SMALL if option != "--quiet"]
    for extra, told in (((), True), (("--quiet",), False), (("--json",), False)):
        out = tmp_path / f"out {len(extra)}{told}{extra[:1]}"
        result = run("compress", model_folder, out, "--recipe", "lorap", "--eval-text", "none", *loud, *extra)
        assert result.exit_code == 0, result.output
        assert (f"lorap eval '{out}' --baseline {model_folder}" in result.output.replace('"', "'")) == told
        assert ("next:" in result.output) == told


def test_json_is_alone_whatever_a_library_prints(model_folder, monkeypatch):
    """Also numbers that JSON has no words for."""
    monkeypatch.setattr("lorap.cli.info.format_info", lambda _: print("from elsewhere") or "a table")
    monkeypatch.setattr("lorap.cli.info.describe_model", lambda _: {"a": float("inf"), "b": [float("nan"), 1.5]})
    result = run("info", model_folder, "--json")
    assert result.stdout == '{"a": null, "b": [null, 1.5]}\n'
    assert result.stderr == "from elsewhere\na table\n"
    assert run("info", model_folder).stdout == "from elsewhere\na table\n"


@pytest.mark.parametrize("command", typer.main.get_command(app).commands)
def test_help_shows_an_example(command):
    result = run(command, "--help")
    assert result.exit_code == 0
    assert f"Example:\n    lorap {command}" in result.stdout


# ----------------------------------------------------------------------------------------------------------------------
# Mistakes: each function breaks the model folder or returns other options


def nothing_broken(_folder: Path) -> None:
    pass


def missing(folder: Path) -> None:
    folder.rename(folder.with_name("elsewhere"))


def huge_norm(folder: Path) -> None:
    edit_weights(folder, lambda tensors: tensors["model.layers.1.input_layernorm.weight"].fill_(1e30))


def no_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()


@pytest.mark.parametrize(
    ("damage", "options", "message"),
    [
        pytest.param(nothing_broken, ["--sparsity", 1.0], "sparsity should be less than 1 and is 1.0", id="sparsity-1"),
        pytest.param(nothing_broken, ["--recipe", "lorap", "--sparsity", 0.99], "leaves rank 0 for", id="rank-0"),
        pytest.param(
            nothing_broken, ["--sparsity", 0.99], "lower the sparsity, or choose a smaller --rank-multiple", id="budget"
        ),
        pytest.param(
            nothing_broken,
            ["--recipe", "magic"],
            f"unknown recipe 'magic'; known: {', '.join(RECIPES)}",
            id="recipe",
        ),
        pytest.param(nothing_broken, ["--device", "gpu"], "device 'gpu' cannot be used", id="device"),
        pytest.param(missing, [], "no model folder", id="missing-folder"),
        pytest.param(
            huge_norm,
            ["--recipe", "lorap", "--calibration", "default/news"],
            "the activations in layer 1 are not finite",
            id="inf-activations",
        ),
        pytest.param(
            huge_norm,
            ["--calibration", "default/news"],
            "the gradients at model.layers.1.self_attn.q_proj are not finite in torch.float32",
            id="inf-gradients",
        ),
        pytest.param(no_tokenizer, [], "the model has no tokenizer", id="no-tokenizer"),
    ],
)
def test_mistakes_end_in_one_sentence(damage, options, message, model_folder, tmp_path):
    damage(model_folder)
    result = run("compress", model_folder, tmp_path / "out", "--eval-text", "none", *SMALL, *options)
    assert_refused(result, message)
    assert not (tmp_path / "out").exists()


def test_tokenizer_of_another_model(make_model, tokenizer, tmp_path):
    folder = tmp_path / "model"
    make_model("llama-gqa", vocab_size=400).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    assert_refused(
        run("compress", folder, tmp_path / "out", *SMALL), "the tokenizer has 500 tokens, but the model has 400"
    )


def test_too_short_a_text(model_folder, tmp_path):
    text = tmp_path / "short.txt"
    text.write_text("Once upon a time.")
    result = run("compress", model_folder, tmp_path / "out", "--calibration", text, *SMALL)
    assert_refused(result, "which is 0 windows of 32; 8 were asked for. Give a longer text or shorter windows")


@pytest.mark.parametrize("weight", ["0", "-2", "nan"])
def test_weights_must_be_positive(weight, model_folder, tmp_path):
    result = run("compress", model_folder, tmp_path / "out", "--calibration", f"heldout={weight}", *SMALL)
    assert_refused(result, f"the weight of heldout is {float(weight)}; it must be a number above 0")


def test_output_on_top_of_the_model(model_folder):
    before = (model_folder / WEIGHTS).read_bytes()
    assert_refused(run("compress", model_folder, model_folder, "--overwrite", *SMALL), "overlaps the source model")
    assert (model_folder / WEIGHTS).read_bytes() == before


def test_compressed_model_is_not_compressed_again(small_folder, tmp_path):
    result = run("compress", small_folder, tmp_path / "again", *SMALL)
    assert_refused(
        result, "compressed by lorap already; start from the dense model and ask for a higher sparsity or fewer bits"
    )


def test_experts_are_refused_with_what_works(tokenizer, tmp_path):
    config = transformers.GptOssConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        head_dim=16,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_local_experts=2,
        num_experts_per_tok=1,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=1,
    )
    transformers.GptOssForCausalLM(config).save_pretrained(tmp_path / "mixture")
    tokenizer.save_pretrained(tmp_path / "mixture")
    result = run("compress", tmp_path / "mixture", tmp_path / "out", *SMALL)
    assert_refused(
        result,
        "model type 'gpt_oss' (GptOssForCausalLM): its FFNs are mixtures of experts that have biases; supported: llama,",
    )


def test_debug_raises_the_exception_itself(model_folder, tmp_path):
    result = run("compress", model_folder, tmp_path / "out", "--sparsity", 1.0, "--debug")
    assert isinstance(result.exception, lorap.ConfigError)


# ----------------------------------------------------------------------------------------------------------------------
# Interrupted


def test_ctrl_c_during_the_imports_says_nothing(tmp_path):
    """Of the command; a program that imports lorap gets its KeyboardInterrupt."""
    (tmp_path / "torch.py").write_text("import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(9)\n")
    (tmp_path / "lorap").write_text("from lorap.cli import main\nmain()\n")
    root = str(Path(lorap.__file__).parents[1])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), root])}

    def started(*arguments: str) -> Any:
        return subprocess.run(
            [sys.executable, *arguments],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )

    for command in (["-m", "lorap", "env"], [str(tmp_path / "lorap"), "env"]):
        ended = started(*command)
        assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", ""), command
    assert "KeyboardInterrupt" in started("-c", "import lorap; lorap.compress").stderr


@pytest.mark.parametrize(
    "sent", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)], ids=["ctrl-c", "kill"]
)
def test_interrupted_run_keeps_what_is_finished(sent, make_model, tokenizer, tmp_path):
    model, outputs = tmp_path / "model", tmp_path / "outputs"
    make_model("llama-gqa", num_hidden_layers=24).save_pretrained(model)
    tokenizer.save_pretrained(model)
    outputs.mkdir()
    command = [sys.executable, "-m", "lorap", "compress", model, outputs / "out", "--eval-text", "none"]
    command += ["--calibration", "default/novel"]  # text that the model would write takes longer than the rest
    command += ["--num-calibration-samples", "450", "--calibration-seq-len", "64", "--device", "cpu"]
    process = subprocess.Popen(
        [str(part) for part in command],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        # A background job of a shell inherits an ignored SIGINT.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    seen = b""
    while b"Compressing" not in seen:
        piece = os.read(process.stderr.fileno(), 4096)
        assert piece, seen.decode()
        seen += piece
    process.send_signal(sent)
    _, rest = process.communicate(timeout=60)
    assert process.returncode == 128 + sent, rest.decode()
    kept = outputs / ".out.lorap"
    told = f"lorap: interrupted; what is finished is kept in {kept}; run the same command again to go on"
    assert rest.decode().splitlines()[-1] == told
    assert "Traceback" not in rest.decode()
    assert list(outputs.iterdir()) == [kept]
    assert (kept / "plan.json").is_file()
    assert not list(kept.glob("*.draft"))


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_a_seed_that_no_generator_takes_is_refused_by_its_name(seed, model_folder, tmp_path) -> None:
    commands = [("generate", model_folder, "--prompt", "a"), ("inspect", model_folder, tmp_path / "out")]
    commands += [("compress", model_folder, tmp_path / "out"), ("recover", model_folder, tmp_path / "out")]
    for command in commands:
        result = run(*command, "--seed", seed)
        assert result.exit_code == 2, command[0]
        assert "--seed" in result.stderr, (command[0], result.stderr)
