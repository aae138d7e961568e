"""Throughput and memory in vLLM, dense and compressed, all in one run.

    .venv-vllm/bin/python benchmarks/inference_vllm.py             both models, minutes on two cores (make test-vllm sets it up)
    .venv-vllm/bin/python benchmarks/inference_vllm.py --weights bf16 int4   also with the decoder's weights in few bits
    .venv-vllm/bin/python benchmarks/inference_vllm.py --quick     a tiny model: to see that it works
    .venv-vllm/bin/python benchmarks/inference_vllm.py --out DIR   where the table and the JSON go

bfloat16 between the layers, greedy, eager, without prefix cache; OMP_NUM_THREADS threads, by default one per core. Every
contender is an engine in a process of its own, so that its peak memory is its own. Those of one model and one storage of weights
are up at the same time, beside the dense model in bfloat16, and every round asks each once, one after the other, so that a
machine that slows down slows all of them. Ratios to that dense model are medians over rounds of the ratio within a round. Weights
are random, of the sizes that the paper's recipe gives: speed does not depend on the values. What --out holds of other models and
storages stays.

Decoding is the time of 33 tokens less that of 1, for 1 and for 8 sequences at once; prefill is that of one token behind 512.
"""

from __future__ import annotations

import argparse
import itertools
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

from lorap.jsonio import read_json, write_json
from lorap.nn import native

RESULTS = Path(__file__).resolve().parent / "results"
SPARSITIES = (0.0, 0.2, 0.5)
WEIGHTS = ("bf16", "int8", "int4", "tcq4", "tcq3")
Contender = tuple[float, str]  # sparsity, and what the weights are stored in
DENSE: Contender = (0.0, "bf16")
PROMPT_TOKENS, NEW_TOKENS, LONG_PROMPT = 16, 32, 512
KV_CACHE_GB = 1


# ----------------------------------------------------------------------------------------------------------------------
# The process of one contender


def save_model(size: Size, sparsity: float, weights: str, folder: Path) -> dict[str, Any]:
    """A checkpoint as ``lorap compress`` would write it, or a dense one; its parameters and bytes."""
    import torch
    from random_models import bytes_of, pack_randomly, random_model

    import lorap
    from lorap.checkpoint.format import LoRAPConfig
    from lorap.checkpoint.hf_quantizer import attach_quantization_config
    from lorap.weights import KINDS

    options = {"layers": size.layers, "vocab_size": size.vocab_size, "tie": size.tie}
    model = random_model(size.shapes, sparsity, torch.bfloat16, **options)
    random_model.cache_clear()
    model.config.max_position_embeddings = 2048
    params = sum(p.numel() for p in model.parameters())
    settings: dict[str, Any] = {}
    if ranks := {
        name: module.rank for name, module in model.named_modules() if isinstance(module, lorap.LowRankLinear)
    }:
        settings["ranks"] = ranks
    if weights in KINDS:
        pack_randomly(model, weights)
        settings |= {"weights": weights, "group_size": KINDS[weights][0].group_size}
    weight_bytes = bytes_of(model)
    if settings:
        attach_quantization_config(model, LoRAPConfig(**settings))
    model.save_pretrained(folder)
    return {"params": params, "weight_bytes": weight_bytes}


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


def saved(label: str, sparsity: float, weights: str, folder: Path) -> dict[str, Any]:
    """:func:`save_model` in a process of its own, which takes its memory along."""
    command = [sys.executable, __file__, "--save", label, str(sparsity), weights, str(folder)]
    found: dict[str, Any] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    return found


def measure(label: str, size: Size, weights: str, rounds: int, scratch: Path) -> list[dict[str, Any]]:
    """One row per sparsity, after one round to warm up."""
    own = [(sparsity, weights) for sparsity in SPARSITIES]
    sizes, processes = {}, {}
    for contender in dict.fromkeys((DENSE, *own)):
        folder = scratch / f"{size.shapes}-{contender[0]}-{contender[1]}"
        sizes[contender] = saved(label, *contender, folder)
        processes[contender] = start(folder)
    found: dict[Contender, list[dict[str, float]]] = {contender: [] for contender in processes}
    for turn in range(rounds + 1):
        print(f"{label}, {weights}: round {turn} of {rounds}", file=sys.stderr, flush=True)
        for contender, process in processes.items():
            answer = ask(process)
            if turn:
                found[contender].append(answer)
    for process in processes.values():
        process.communicate()
    what = {"model": label, "weights": weights, "kernels": native.quantized_cpu_isa()}
    return [what | {"sparsity": one[0], **sizes[one], **summary(found[one], found[DENSE])} for one in own]


def summary(own: list[dict[str, float]], dense: list[dict[str, float]]) -> dict[str, Any]:
    """What a row says of the rounds of a contender and of the dense model in bfloat16."""
    kinds = [kind for kind in own[0] if kind != "peak_bytes"]
    return {
        "tokens_per_second": {kind: statistics.median(one[kind] for one in own) for kind in kinds},
        "against_dense": {
            kind: statistics.median(a[kind] / b[kind] for a, b in zip(own, dense, strict=True)) for kind in kinds
        },
        "peak_bytes": max(one["peak_bytes"] for one in own),
        "rounds": own,
        "rounds_of_dense": dense,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown; in brackets how many times as fast as the dense model in bfloat16."""
    kinds = {"decode_1": "decoding, 1 sequence", "decode_8": "decoding, 8", "prefill_512": "prefill, 512"}
    head = ["model", "weights", "sparsity", "parameters", "MB", *kinds.values(), "peak memory"]
    lines = []
    for row in rows:
        speed = [f"{row['tokens_per_second'][kind]:.1f} ({row['against_dense'][kind]:.2f} x)" for kind in kinds]
        name = "dense" if row["sparsity"] == 0 else str(row["sparsity"])
        memory = [f"{row['params'] / 1e6:,.0f} M", f"{row['weight_bytes'] / 1e6:,.0f}"]
        lines.append([row["model"], row["weights"], name, *memory, *speed, f"{row['peak_bytes'] / 1e6:,.0f} MB"])
    return markdown(head, lines)


def key(row: dict[str, Any]) -> tuple[int, int]:
    """Rows of one model and storage are measured together; tables have them in this order."""
    return [*QUICK, *MODELS].index(row["model"]), WEIGHTS.index(row["weights"])


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
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--weights", nargs="+", choices=WEIGHTS, default=["bf16"], help="of the decoder's layers")
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds, after one to warm up")
    parser.add_argument("--quick", action="store_true", help="a tiny model only")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for inference-vllm.md and .json")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--save", nargs=4, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    options = arguments()
    if options.serve:
        serve(options.serve)
    if options.save:
        label, sparsity, weights, folder = options.save
        print(json.dumps(save_model((MODELS | QUICK)[label], float(sparsity), weights, Path(folder))))
        return
    if not options.quick:
        from common import measured

        print(f"measuring {measured()}", file=sys.stderr)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "inference-vllm.json"
    rows = read_json(path)["rows"] if path.exists() else []
    for label, weights in itertools.product(QUICK if options.quick else options.models, options.weights):
        with tempfile.TemporaryDirectory() as scratch:
            made = measure(label, (MODELS | QUICK)[label], weights, options.rounds, Path(scratch))
        rows = sorted([row for row in rows if key(row) != key(made[0])] + made, key=key)
        write_json(path, {"environment": environment(options.rounds), "rows": rows})
        (options.out / "inference-vllm.md").write_text(table(rows) + "\n", "utf-8")
    print(table(rows))


if __name__ == "__main__":
    main()
