"""Compress models of LLaMA-7B's shapes that are larger than the memory they get: peak memory, and where the time goes.

    python benchmarks/streaming.py                      4 and 12 layers, recipe best: memory must not grow with the layers
    python benchmarks/streaming.py --layers 12 --max-memory 3GB
    python benchmarks/streaming.py --make FOLDER --layers 12     only write the model, 0.41 GB a layer and 0.52 GB besides

The weights are random, in bfloat16; the result is of no use, the work is that of a real model.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lorap.checkpoint.write import write_tensors
from lorap.reports.run import format_table

RESULTS = Path(__file__).parent / "results" / "streaming.json"
STAGES = ("check", "plan", "calibrate", "factorize", "prune", "correct", "save")


# Hidden size, FFN width, heads, key-value heads, vocabulary, and whether the head is the embedding.
SHAPES = {
    "LLaMA-2-7B": (4096, 11008, 32, 32, 32000, False),
    "Llama-3.2-1B": (2048, 8192, 32, 8, 128256, True),
}


def llama(name: str, layers: int) -> LlamaConfig:
    """A model of ``SHAPES`` but for its number of layers."""
    hidden, width, heads, pairs, vocabulary, tied = SHAPES[name]
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=pairs,
        vocab_size=vocabulary,
        max_position_embeddings=4096,
        tie_word_embeddings=tied,
        dtype="bfloat16",
    )


def make_model(folder: Path, config: LlamaConfig) -> None:
    """Random weights, one file for each decoder layer and one for the rest, never more than one file in memory."""
    folder.mkdir(parents=True, exist_ok=True)
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    files: dict[str, dict[str, torch.Size]] = {}
    for name, tensor in model.state_dict().items():
        part = f"layer-{int(name.split('.')[2]):03}" if ".layers." in name else "rest"
        files.setdefault(f"model-{part}.safetensors", {})[name] = tensor.shape
    generator = torch.Generator().manual_seed(0)
    for file, shapes in files.items():
        tensors = {}
        for name, shape in shapes.items():
            scale = 0.02 if len(shape) == 2 else 0.0
            tensors[name] = (torch.randn(shape, generator=generator) * scale + (scale == 0)).to(torch.bfloat16)
        write_tensors(folder / file, tensors)
    weight_map = {name: file for file, shapes in files.items() for name in shapes}
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), "utf-8")


def measure(folder: Path, layers: int, options: list[str]) -> dict[str, object]:
    """Compress in a process of its own."""
    source, out, tokens = folder / f"dense-{layers}", folder / f"small-{layers}", folder / "tokens.npy"
    if not source.exists():
        make_model(source, llama("LLaMA-2-7B", layers))
    np.save(tokens, np.random.default_rng(0).integers(0, 32000, (8, 128)))
    command = ["compress", str(source), str(out), "--calibration", str(tokens), "--eval-text", "none", "--overwrite"]
    command += ["--num-calibration-samples", "8", "--calibration-seq-len", "128", "--json", "--quiet", *options]
    start = time.perf_counter()
    run = subprocess.run([sys.executable, "-m", "lorap", *command], stdout=subprocess.PIPE, text=True, check=True)
    report = json.loads(run.stdout.splitlines()[-1])
    size = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    shutil.rmtree(out)
    return {
        "layers": layers,
        "options": options,
        "model_bytes": size,
        "peak_bytes": report["peak_memory_bytes"],
        "seconds": time.perf_counter() - start,
        "seconds_by_stage": report["seconds"],
        "threads": report["environment"]["threads"],
    }


def table(rows: list[dict]) -> str:
    header = ["layers", "options", "model", "peak memory", "seconds a layer", *STAGES]
    cells = []
    for row in rows:
        by_stage = [f"{row['seconds_by_stage'].get(stage, 0) / row['layers']:.1f}" for stage in STAGES]
        cells.append(
            [
                str(row["layers"]),
                " ".join(row["options"]) or "-",
                f"{row['model_bytes'] / 1e9:.2f} GB",
                f"{row['peak_bytes'] / 1e9:.2f} GB",
                f"{row['seconds'] / row['layers']:.1f}",
                *by_stage,
            ]
        )
    return format_table(header, cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 12])
    parser.add_argument("--folder", type=Path, help="where models lie; 11 GB; a temporary one by default")
    parser.add_argument("--make", type=Path, metavar="FOLDER", help="only write the model")
    known, options = parser.parse_known_args()
    if known.make:
        make_model(known.make, llama("LLaMA-2-7B", known.layers[0]))
        return
    folder = known.folder or Path(tempfile.mkdtemp(prefix="lorap-streaming-"))
    rows = []
    for layers in known.layers:
        rows.append(measure(folder, layers, options))
        print(table(rows[-1:]), flush=True)
    kept = json.loads(RESULTS.read_text("utf-8")) if RESULTS.exists() else []
    fresh = [
        row for row in kept if all((row["layers"], row["options"]) != (new["layers"], new["options"]) for new in rows)
    ]
    RESULTS.write_text(json.dumps(fresh + rows, indent=1) + "\n", "utf-8")
    print(table(fresh + rows))
    if not known.folder:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
