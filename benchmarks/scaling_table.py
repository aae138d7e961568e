"""What `lorap compress` would take for models of 7, 70 and 405 billion parameters: the tables of docs/scaling.md.

    python benchmarks/scaling_table.py                          prints them
    python benchmarks/scaling_table.py --write docs/scaling.md  replaces the text between the markers there

Rates of this machine are measured while it runs (some seconds), with as many processes as leave no core idle; those of an H100
are published figures. All seconds and bytes follow from these by the formulas of `lorap plan`: none of the large models was ever
here. Use an idle machine; the load that was found is reported.
"""

from __future__ import annotations

import argparse
import os
import platform
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lorap.checkpoint.folders import TensorInfo
from lorap.compression.estimate import Estimate, Machine, ModelShape, estimate, find_gpu, this_machine
from lorap.compression.estimate.cost_terms import duration, quantity
from lorap.config import CompressionConfig

BEGIN, END = "<!-- begin: benchmarks/scaling_table.py -->", "<!-- end: benchmarks/scaling_table.py -->"
SPARSITY = 0.2
RECIPES = ("lorap", "best")
MODELS: Mapping[str, Mapping[str, int]] = {
    "LLaMA-2-7B": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 32000,
    },
    "Llama-3-70B": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    "Llama-3.1-405B": {
        "hidden_size": 16384,
        "intermediate_size": 53248,
        "num_hidden_layers": 126,
        "num_attention_heads": 128,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
}


def tensors_of(sizes: Mapping[str, int]) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
    """Config and headers of an untied bfloat16 checkpoint, from a model without weights."""
    config = LlamaConfig(**sizes, tie_word_embeddings=False)
    with torch.device("meta"):
        state = LlamaForCausalLM(config).state_dict()
    infos = {
        name: TensorInfo(dtype="BF16", shape=tuple(tensor.shape), nbytes=2 * tensor.numel(), offset=0)
        for name, tensor in state.items()
    }
    return {"model_type": "llama", "dtype": "bfloat16", "tie_word_embeddings": False, **sizes}, infos


def shape_of(name: str) -> ModelShape:
    return ModelShape.from_tensors(name, *tensors_of(MODELS[name]))


def machines(folder: Path) -> dict[str, tuple[Machine, int]]:
    """By heading: rates, and how many processes share the work."""
    here = this_machine(folder, dtype="bfloat16")
    return {
        "one H100": (find_gpu("h100"), 1),
        "eight H100": (find_gpu("h100", processes=8), 8),
        "this machine": (here, here.parallel),
    }


def model_table(name: str, places: Mapping[str, tuple[Machine, int]]) -> str:
    """Stages of all recipes on all machines."""
    shape = shape_of(name)
    found: dict[tuple[str, str], Estimate] = {}
    for recipe in RECIPES:
        config = CompressionConfig(recipe=recipe, sparsity=SPARSITY)
        for place, (machine, processes) in places.items():
            found[recipe, place] = estimate(shape, config, machine, processes=processes)
    names = list(dict.fromkeys(stage.name for one in found.values() for stage in one.stages))
    seconds = {key: {stage.name: stage.seconds for stage in one.stages} for key, one in found.items()}
    order = {stage.name: place for place, stage in enumerate(found[RECIPES[-1], next(iter(places))].stages)}
    rows = [
        [stage, *(duration(own[stage]) if stage in own else "" for own in seconds.values())]
        for stage in sorted(names, key=lambda stage: order.get(stage, 0))
    ]
    rows.append(["**together**", *(f"**{duration(one.seconds)}**" for one in found.values())])
    rows.append(["peak memory of a process", *(memory(one) for one in found.values())])
    rows.append(["disk", *(quantity(one.disk_bytes, "B") for one in found.values())])
    header = ["", *(f"`{recipe}`, {place}" for recipe, place in found)]
    size = quantity(sum(shape.params.values()), "")
    return f"**{name}**: {size} parameters, {quantity(shape.computed_bytes, 'B')}\n\n{markdown(header, rows)}"


def memory(one: Estimate) -> str:
    """Marked where the machine has less."""
    fits = one.memory_bytes * (1 if one.machine.link else one.processes) <= one.machine.memory_bytes
    return quantity(one.memory_bytes, "B") + ("" if fits else " (too much)")


def rates_table(machine: Machine) -> str:
    """What this machine was seen to do."""
    rows = [[f"matrix products, {dtype}", quantity(rate, "FLOP/s")] for dtype, rate in machine.products.items()]
    rows += [[f"Cholesky, {dtype}", quantity(rate, "FLOP/s")] for dtype, rate in machine.cholesky.items()]
    for wanted, known in machine.eigen.items():
        told = "float64, eigenvalues alone" if wanted == "values" else wanted
        rows += [[f"eigenproblem of {size:,}, {told}", duration(known[size])] for size in list(known)[1:]]
    rows += [
        ["memory, read and written", quantity(machine.moved, "B/s")],
        ["disk, written", quantity(machine.disk_write, "B/s")],
        ["disk, read", quantity(machine.disk_read, "B/s")],
        ["files in memory, read", quantity(machine.cached_read, "B/s")],
        ["sha256", quantity(machine.hashed, "B/s")],
        ["random numbers", quantity(machine.drawn, "/s")],
        ["call of a decoder layer", duration(machine.layer_call)],
        ["process before a model is open", quantity(machine.base_bytes, "B")],
    ]
    return markdown(["this machine, one process", "measured"], rows)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in [header, ["---"] * len(header), *rows]]
    return "\n".join(lines) + "\n"


def conditions(machine: Machine, load: float) -> str:
    """On what, and how busy it was before."""
    cores = len(os.sched_getaffinity(0))
    told = (
        f"{platform.machine()}, {cores} cores, {torch.get_num_threads()} threads a process, torch {torch.__version__}"
    )
    if load > 0.5:
        told += f"; the machine was busy with other work (load {load:.1f} before), so its rates are too low"
    return f"{machine.name}: {told}."


def text(folder: Path) -> str:
    load = os.getloadavg()[0]  # before we add to it
    places = machines(folder)
    here = places["this machine"][0]
    assumed = "\n".join(f"- {sentence}" for sentence in places["one H100"][0].assumptions)
    return "\n".join(
        [
            f"Measured on {conditions(here, load)}\n",
            rates_table(here),
            "Assumed of an H100 besides the published figures:\n",
            assumed + "\n",
            f"Sparsity {SPARSITY}, bfloat16, default calibration and evaluation. All numbers below are extrapolated.\n",
            *(model_table(name, places) for name in MODELS),
        ]
    )


def write_between(document: Path, begin: str, end: str, replacement: str) -> None:
    """Replace what is between two markers of a document."""
    before, _, rest = document.read_text("utf-8").partition(begin)
    _, _, after = rest.partition(end)
    document.write_text(f"{before}{begin}\n{replacement}{end}{after}", "utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, metavar="FILE", help="replace the text between the markers in FILE")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="whose disk is tried")
    options = parser.parse_args()
    found = text(options.folder)
    if options.write is None:
        print(found)
    else:
        write_between(options.write, BEGIN, END, found)


if __name__ == "__main__":
    main()
