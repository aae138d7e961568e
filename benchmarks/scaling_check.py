"""`lorap plan` beside `lorap compress` on models that are small enough to try: seconds by stage and peak memory.

    python benchmarks/scaling_check.py                          a table of ratios, measured / planned
    python benchmarks/scaling_check.py --write docs/scaling.md  and writes all that is kept between its markers
    python benchmarks/scaling_check.py --models random --recipes lorap
    python benchmarks/scaling_check.py --models --write docs/scaling.md     measures nothing

What was measured last of each model and recipe is kept in results/scaling.json.

The models are SmolLM2-135M (a GGUF file, float32, in memory as a whole), a random LLaMA of 4 layers, hidden size 512, in float32,
whose weights stay in their files, and two random layers of LLaMA-7B's shapes in bfloat16 with 1,024 tokens. Each command is a
process of its own. The rates are measured before and after each run, and the mean of both estimates counts: other work on the
machine changes them. With --processor-time all seconds, those of the rates too, are those that the process has been given.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import assets
import numpy as np
import torch
from scaling_table import markdown, write_between
from streaming import llama_7b, make_model
from transformers import LlamaConfig, LlamaForCausalLM

from lorap.checkpoint.load import find_model, load_tokenizer
from lorap.compression.estimate.cost_terms import duration, quantity

BEGIN, END = "<!-- begin: benchmarks/scaling_check.py -->", "<!-- end: benchmarks/scaling_check.py -->"
RESULTS = Path(__file__).resolve().parent / "results" / "scaling.json"
MODELS = ("smollm2", "random", "layers")
# Stages of the plan, and those of the report that are the same; keeping finished layers is in no stage of a report.
STAGES: Mapping[tuple[str, ...], tuple[str, ...]] = {
    ("read and check",): ("load", "check", "tokenize"),
    ("sample",): ("sample",),
    ("evaluate before", "evaluate after"): ("evaluate",),
    ("plan",): ("plan",),
    ("calibrate",): ("calibrate",),
    ("factorize",): ("factorize",),
    ("prune and repair",): ("prune",),
    ("correct",): ("correct",),
    ("write",): ("save",),
}


def random_model(folder: Path) -> Path:
    """Four layers with SmolLM2's tokenizer, which has to be there."""
    tokenizer = load_tokenizer(find_model(assets.MODEL))
    assert tokenizer is not None
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def prepared(model: str, folder: Path) -> tuple[Path, list[object]]:
    """Where the model is, and options that go with it."""
    if model == "smollm2":
        return assets.MODEL, []
    if model == "random":
        return random_model(folder / "hidden-512"), []
    path, tokens = folder / "llama-7b-layers", folder / "tokens.npy"
    make_model(path, llama_7b(2))
    np.save(tokens, np.random.default_rng(0).integers(0, 32000, (8, 128)))
    return path, ["--calibration", tokens, "--eval-text", "none", "--num-calibration-samples", 8]


def lorap(*arguments: object, clock: str) -> dict[str, Any]:
    """The last line of a command whose seconds are those of the given clock."""
    program = f"import time; time.perf_counter = time.{clock}; from lorap.cli import main; main()"
    command = [sys.executable, "-c", program, *map(str, arguments), "--json"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(model: Path, recipe: str, folder: Path, options: list[object], clock: str) -> dict[str, Any]:
    """Plan, run, plan."""
    options = ["--recipe", recipe, "--sparsity", 0.5, *options]
    plans = [lorap("plan", model, *options, "--out", folder, clock=clock)]
    run = lorap("compress", model, folder / recipe, *options, "--quiet", "--overwrite", clock=clock)
    plans.append(lorap("plan", model, *options, "--out", folder, clock=clock))
    planned: dict[str, float] = {}
    for plan in plans:
        for stage in plan["stages"]:
            planned[stage["name"]] = planned.get(stage["name"], 0.0) + stage["seconds"] / len(plans)
    stages = {}
    for names, measured in STAGES.items():
        estimate = sum(planned.get(name, 0.0) for name in names)
        seconds = sum(run["seconds"].get(name, 0.0) for name in measured)
        if estimate:
            stages[" and ".join(names)] = (estimate, seconds)
    totals = [sum(column) for column in zip(*stages.values(), strict=True)]
    stages["together"] = (totals[0], totals[1])
    return {
        "model": model.name,
        "recipe": recipe,
        "threads": torch.get_num_threads(),
        "clock": "processor time" if clock == "process_time" else "wall time",
        "load": round(os.getloadavg()[0], 1),
        "stages": {name: [round(each, 3) for each in pair] for name, pair in stages.items()},
        "memory": [plans[0]["memory_bytes"], run["peak_memory_bytes"]],
    }


def rows(found: Mapping[str, Any]) -> list[list[str]]:
    lines = []
    for stage, (planned, measured) in found["stages"].items():
        lines.append([stage, duration(planned), duration(measured), f"{measured / planned:.2f}"])
    planned, measured = found["memory"]
    lines.append(["peak memory", quantity(planned, "B"), quantity(measured, "B"), f"{measured / planned:.2f}"])
    return lines


def table(found: Mapping[str, Any]) -> str:
    told = f"**{found['model']}**, recipe `{found['recipe']}`: {found['clock']} with {found['threads']} threads"
    columns = ["", "planned", "measured", "measured / planned"]
    return f"{told}, load {found['load']}\n\n{markdown(columns, rows(found))}"


def keep(found: dict[str, Any]) -> None:
    """In place of an earlier measurement of the same model and recipe."""
    kept = json.loads(RESULTS.read_text("utf-8")) if RESULTS.exists() else []
    others = [one for one in kept if (one["model"], one["recipe"]) != (found["model"], found["recipe"])]
    everything = sorted([*others, found], key=lambda one: (one["model"], one["recipe"]))
    RESULTS.write_text(json.dumps(everything, indent=1) + "\n", "utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", choices=MODELS, default=MODELS)
    parser.add_argument("--recipes", nargs="+", default=["lorap", "best"])
    parser.add_argument("--processor-time", action="store_true", help="on a busy machine; with one thread")
    parser.add_argument("--write", type=Path, metavar="FILE", help="replace the text between the markers in FILE")
    options = parser.parse_args()
    assets.fetch()
    with tempfile.TemporaryDirectory() as name:
        for model in options.models:
            path, more = prepared(model, Path(name))
            for recipe in options.recipes:
                clock = "process_time" if options.processor_time else "perf_counter"
                found = measure(path, recipe, Path(name), more, clock)
                keep(found)
                print(table(found), flush=True)
    if options.write is not None:
        kept = json.loads(RESULTS.read_text("utf-8"))
        write_between(options.write, BEGIN, END, "\n".join(map(table, kept)))


if __name__ == "__main__":
    main()
