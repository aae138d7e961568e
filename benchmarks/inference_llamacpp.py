"""Decode and prefill speed in llama.cpp of what `lorap export --format gguf` writes, all in one run.

    python benchmarks/inference_llamacpp.py                 both models, minutes on two cores
    python benchmarks/inference_llamacpp.py --quick         a tiny model, seconds: to see that it works
    python benchmarks/inference_llamacpp.py --out FOLDER    where the table and the JSON go

Contenders, each in F16 and in Q8_0: the dense model; an export whose layers keep half of their FFN channels in the mean,
each its own multiple of 256, as `best` gives them; a stock model of one width and as many parameters. Weights are random:
speed does not depend on the values. All of one model are loaded at the same time, and every round asks each once, so that a
machine that slows down slows all of them; ratios are medians over rounds of the ratio within a round. Seconds are
llama.cpp's own: decoding is 32 tokens behind 16, prefill 512 tokens.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from inference_models import MODELS, QUICK, Size
from random_models import random_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import lorap
from lorap.jsonio import write_json
from lorap.nn.linear import new_linear

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from llamacpp_host import Host

RESULTS = Path(__file__).resolve().parent / "results"
KINDS = (None, "Q8_0")
MULTIPLE, DECODED, PROMPT, LONG_PROMPT = 256, 32, 16, 512
# What layers keep in turn, in halves of their channels.
SHARES = (0.6, 1.0, 1.4, 1.0)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, and one merge, without which llama.cpp opens no file."""
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "ab"]
    bpe = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, [("a", "b")]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=bpe)


def widths_of(dense: int, layers: int) -> dict[str, list[int]]:
    """FFN widths by contender; the stock one has as many channels as the layers of the export together."""
    multiple = MULTIPLE if dense >= 4 * MULTIPLE else 32
    own = [max(1, round(dense / 2 * SHARES[index % len(SHARES)] / multiple)) * multiple for index in range(layers)]
    return {"dense": [dense] * layers, "a width per layer": own, "stock": [round(sum(own) / layers / 32) * 32] * layers}


def narrow(model: Any, widths: list[int]) -> Any:
    for layer, width in zip(model.model.layers, widths, strict=True):
        for role, axis in (("gate_proj", 0), ("up_proj", 0), ("down_proj", 1)):
            weight = getattr(layer.mlp, role).weight.data.narrow(axis, 0, width)
            setattr(layer.mlp, role, new_linear(weight.clone(), None))
    return model


def export(size: Size, scratch: Path) -> dict[tuple[str, str | None], Path]:
    """The files of all contenders."""
    files: dict[tuple[str, str | None], Path] = {}
    options = {"layers": size.layers, "vocab_size": size.vocab_size, "tie": size.tie}
    dense = random_model(size.shapes, 0.0, torch.float16, **options).config.intermediate_size
    for name, widths in widths_of(dense, size.layers).items():
        random_model.cache_clear()
        model = narrow(random_model(size.shapes, 0.0, torch.float16, **options), widths)
        model.config.max_position_embeddings = 2048
        for kind in KINDS:
            out = lorap.export_gguf(model, scratch / f"{name}-{kind}", tokenizer=byte_tokenizer(), quantize=kind)
            files[name, kind] = next(out.glob("*.gguf"))
    random_model.cache_clear()
    return files


def measure(label: str, size: Size, rounds: int, threads: int, scratch: Path) -> list[dict[str, Any]]:
    """One row per contender, after one round to warm up."""
    files = export(size, scratch)
    hosts = {key: Host(file, context=LONG_PROMPT + 64, threads=threads) for key, file in files.items()}
    found: dict[Any, list[dict[str, float]]] = {key: [] for key in hosts}
    for turn in range(rounds + 1):
        print(f"{label}: round {turn} of {rounds}", file=sys.stderr, flush=True)
        for key, host in hosts.items():
            answer = (
                host.speed(PROMPT, DECODED)["predicted_per_second"],
                host.speed(LONG_PROMPT, 1)["prompt_per_second"],
            )
            if turn:
                found[key].append(dict(zip(("decode", "prefill"), answer, strict=True)))
    rows = []
    for (name, kind), own in found.items():
        row: dict[str, Any] = {"model": label, "contender": name, "type": kind or "F16", "rounds": own}
        row["bytes"] = files[name, kind].stat().st_size
        for what in own[0]:
            ratios = [one[what] / base[what] for one, base in zip(own, found["dense", kind], strict=True)]
            row[what], row[f"{what}_against_dense"] = (
                statistics.median(one[what] for one in own),
                statistics.median(ratios),
            )
        rows.append(row)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown; in brackets how many times as fast as the dense model of the same type."""
    head = ["model", "type", "contender", "file", "decoding", "prefill, 512"]
    lines = [head, ["---"] * 3 + ["---:"] * 3]
    for row in sorted(rows, key=lambda row: (row["model"], row["type"])):
        speed = [f"{row[what]:.1f} ({row[f'{what}_against_dense']:.2f} x)" for what in ("decode", "prefill")]
        lines.append([row["model"], row["type"], row["contender"], f"{row['bytes'] / 1e6:,.0f} MB", *speed])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="measured rounds, after one to warm up")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of llama.cpp")
    parser.add_argument("--quick", action="store_true", help="a tiny model only")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for inference-llamacpp.md and .json")
    options = parser.parse_args()
    rows = []
    for label, size in (QUICK if options.quick else MODELS).items():
        with tempfile.TemporaryDirectory() as scratch:
            rows += measure(label, size, options.rounds, options.threads, Path(scratch))
    environment = {"xllamacpp": version("xllamacpp"), "lorap": version("lorap"), "python": platform.python_version()}
    found = {"environment": environment | {"threads": options.threads, "rounds": options.rounds}, "rows": rows}
    options.out.mkdir(parents=True, exist_ok=True)
    write_json(options.out / "inference-llamacpp.json", found)
    (options.out / "inference-llamacpp.md").write_text(table(rows) + "\n", "utf-8")
    print(table(rows))


if __name__ == "__main__":
    main()
