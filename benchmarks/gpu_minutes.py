"""What a compression of LLaMA-7B should take on one H200: work counted here, rates from elsewhere, nothing measured on a GPU.

    python benchmarks/gpu_minutes.py [--sparsity 0.2] [--recipe best] [--write docs/scaling.md]

A small random model with the proportions of LLaMA-7B (FFN, head, as many windows) is compressed on the CPU while every matrix
product and eigenproblem is counted by stage and by dtype. Products with weights and sums over tokens grow with a layer's
parameters, factorizations with the third power of its width; both then grow with the number of layers. What the model writes
itself and reading weights are added by formula.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from documents import insert, markdown
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from transformers import LlamaConfig, LlamaForCausalLM

import lorap
from lorap.system import Stopwatch

WIDTH, FFN, LAYERS, VOCABULARY = 4096, 11008, 32, 32_000  # LLaMA-7B
SMALL = 16  # times narrower is the model that is counted
SMALL_LAYERS, WINDOWS, SEQ_LEN = 4, 128, 128
WRITTEN = 64  # windows that the model writes itself, all at once
# Per second. Tensor cores reach 989e12 on paper in 16 bits, and other units 67e12 in float32 and float64.
RATES = {"16 bits": 400e12, "float32": 40e12, "float64": 40e12}
# An eigenproblem of size n takes about 9 n^3; cuSOLVER reaches less than 3 % of an H100 there (arXiv 2410.02170).
EIGH_RATE = 0.02 * 67e12
FROM_HOST = 20e9  # bytes per second of a layer that comes from the host's memory or the page cache
STEP_OVERHEAD = 30e-3  # seconds of Python and launches for a token of all windows


class Counting(TorchDispatchMode):
    """Counts floating-point operations of matrix products by dtype, and eigenproblems, under the stage that runs."""

    def __init__(self) -> None:
        super().__init__()
        self.stage = ""
        self.found: Counter[tuple[str, str]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        if packet is torch.ops.aten._linalg_eigh:
            self.found[self.stage, "eigenproblems"] += args[0].shape[:-2].numel()
        elif packet in flop_registry:
            dtype = str(out.dtype).removeprefix("torch.").replace("bfloat16", "16 bits")
            self.found[self.stage, dtype] += flop_registry[packet](*args, **(kwargs or {}), out_val=out)
        return out


def count(recipe: str, sparsity: float) -> dict[str, Counter[str]]:
    """Operations and eigenproblems of each stage, of the small model in 16 bits."""
    width = WIDTH // SMALL
    torch.manual_seed(0)
    layer = 4 * WIDTH**2 + 3 * WIDTH * FFN
    head = VOCABULARY * WIDTH / (LAYERS * layer)  # a share of the decoder, as in the large model
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=FFN // SMALL,
        num_hidden_layers=SMALL_LAYERS,
        num_attention_heads=width // 64,
        vocab_size=round(head * SMALL_LAYERS * layer / SMALL**2 / width),
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).eval().bfloat16()
    ids = torch.randint(0, config.vocab_size, (WINDOWS + 24, SEQ_LEN))  # some are left to judge the steps by
    options = lorap.CompressionConfig(
        recipe=recipe, sparsity=sparsity, num_calibration_samples=WINDOWS, calibration_seq_len=SEQ_LEN
    )
    counting = Counting()
    with following(counting), counting:
        lorap.compress(model, calibration=[ids], config=options, progress=False)
    stages: dict[str, Counter[str]] = {}
    for (stage, kind), number in counting.found.items():
        stages.setdefault(stage, Counter())[kind] += number
    return stages


@contextmanager
def following(counting: Counting) -> Iterator[None]:
    """While active, ``counting`` knows the stage of the stopwatch."""
    own = Stopwatch.__call__

    @contextmanager
    def call(self: Stopwatch, stage: str) -> Iterator[None]:
        before, counting.stage = counting.stage, stage
        try:
            with own(self, stage):
                yield
        finally:
            counting.stage = before

    Stopwatch.__call__ = call  # type: ignore[method-assign]
    try:
        yield
    finally:
        Stopwatch.__call__ = own  # type: ignore[method-assign]


def predict(stages: dict[str, Counter[str]]) -> pd.DataFrame:
    """Work and seconds of each stage for LLaMA-7B."""
    layers = LAYERS / SMALL_LAYERS
    rows = {}
    for stage, found in stages.items():
        work = {
            "16 bits": found["16 bits"] * SMALL**2 * layers,
            "float32": found["float32"] * SMALL**2 * layers,
            "float64": found["float64"] * SMALL**3 * layers,
        }
        eigen = found["eigenproblems"] * layers
        seconds = sum(work[kind] / RATES[kind] for kind in RATES) + eigen * 9 * WIDTH**3 / EIGH_RATE
        rows[stage] = {
            **{kind: number / 1e12 for kind, number in work.items()},
            "eigenproblems": eigen,
            "seconds": seconds,
        }
    decoder = LAYERS * (4 * WIDTH**2 + 3 * WIDTH * FFN)
    weights = 2 * (decoder + 2 * VOCABULARY * WIDTH)
    rows["write text"] = {"16 bits": 2 * decoder * WRITTEN * SEQ_LEN / 1e12, "seconds": SEQ_LEN * STEP_OVERHEAD}
    # Forward and backward for the plan, dense losses, the layers themselves, eight steps forward and backward, judging, saving.
    rows["read weights"] = {"seconds": (2 + 1 + 1 + 2 * 8 + 1 + 1) * weights / FROM_HOST}
    return pd.DataFrame.from_dict(rows, orient="index").fillna(0.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="best")
    parser.add_argument("--sparsity", type=float, default=0.2)
    parser.add_argument(
        "--write", type=Path, metavar="DOCUMENT", help="put the table there, in place of the one it has"
    )
    chosen = parser.parse_args()
    found = predict(count(chosen.recipe, chosen.sparsity))
    found = found[found["seconds"] > 0.05]
    found.loc["all"] = found.sum()
    rows = [[stage, *(f"{row[name]:.0f}" for name in found.columns)] for stage, row in found.iterrows()]
    units = ["stage", *(f"{kind}, 10^12" for kind in RATES), "eigenproblems of 4,096", "seconds, predicted"]
    table = markdown(units, rows)
    print(table)
    if chosen.write:
        insert(chosen.write, "gpu minutes", table)


if __name__ == "__main__":
    main()
