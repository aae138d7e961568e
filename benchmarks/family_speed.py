"""The speed of every family after ``lorap.optimize_for_inference``, beside its own class: benchmarks/results/family_speed.md.

    python benchmarks/family_speed.py [MODEL_TYPE ...]

Each is a dense random model of 2 layers and a hidden size of 1024 that reads one token behind a cache of 16. Both
models are timed in turns, in processor time of one thread, so that what else the machine does counts as little as it can; the
ratio is that of medians, above 1 lorap is faster.
Rows of families that did not run stay as they were.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from families import EYES, tiny_config

import lorap
from lorap.architectures import ARCHITECTURES, cache_argument
from lorap.checkpoint.validate import model_class

PAGE = Path(__file__).resolve().parent / "results" / "family_speed.md"
SIZES: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
}
# Rotary sections of the tiny models fit heads of 16.
SECTIONS = {"num_attention_heads": 64, "num_key_value_heads": 16, "head_dim": 16}
TURNS, PAST = 15, 16
HEAD = """# Families

Milliseconds of processor time of one token in a model of 2 layers and hidden size 1024, one thread, behind a cache of 16 tokens:
the median of {turns} turns. Above a ratio of 1 `lorap.optimize_for_inference` is faster than the model's own class. Written by
`python benchmarks/family_speed.py` with torch {torch}{busy}.

| `model_type` | float32: eager | optimized | ratio | bfloat16: eager | optimized | ratio |
|---|---|---|---|---|---|---|
"""


@torch.inference_mode()
def milliseconds(model_type: str, dtype: torch.dtype) -> tuple[float, float]:
    """Of one token: of the model's own class, and optimized."""
    config = tiny_config(
        model_type, **SIZES | (SECTIONS if model_type.startswith("qwen") and model_type in EYES else {})
    )
    torch.manual_seed(0)
    eager = model_class(config).from_config(config, dtype=dtype).eval()
    optimized = lorap.optimize_for_inference(copy.deepcopy(eager))
    ids = torch.arange(2, PAST + 3)[None]
    name, found = cache_argument(eager), {}
    caches = {model: getattr(model(ids[:, :PAST], use_cache=True), name) for model in (eager, optimized)}
    for turn in range(TURNS + 2):
        for model in (eager, optimized):
            cache = copy.deepcopy(caches[model])
            start = time.process_time()
            model(ids[:, PAST:], use_cache=True, **{name: cache})
            if turn > 1:
                found.setdefault(model, []).append(time.process_time() - start)
    return tuple(1e3 * statistics.median(found[model]) for model in (eager, optimized))  # type: ignore[return-value]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", metavar="MODEL_TYPE", help="all, if none is given")
    chosen = parser.parse_args().families or list(ARCHITECTURES)
    if unknown := set(chosen) - set(ARCHITECTURES):
        parser.error(f"lorap has no row for {', '.join(sorted(unknown))}")
    torch.set_num_threads(1)
    before = PAGE.read_text("utf-8").splitlines() if PAGE.exists() else []
    rows = {
        line.split("|")[1].strip(" `"): line for line in before if line.startswith("| `") and "`model_type`" not in line
    }
    busy = os.getloadavg()[0] > os.cpu_count() if os.cpu_count() else False
    for model_type in chosen:
        times = [milliseconds(model_type, dtype) for dtype in (torch.float32, torch.bfloat16)]
        cells = [f"{eager:.2f} | {optimized:.2f} | {eager / optimized:.2f}" for eager, optimized in times]
        rows[model_type] = f"| `{model_type}` | {' | '.join(cells)} |"
        print(rows[model_type], flush=True)
        told = HEAD.format(
            turns=TURNS, torch=torch.__version__.partition("+")[0], busy=", on a busy machine" if busy else ""
        )
        PAGE.write_text(told + "\n".join(rows[name] for name in ARCHITECTURES if name in rows) + "\n", "utf-8")


if __name__ == "__main__":
    main()
