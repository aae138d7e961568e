"""The main job on a real model, from the command line: look, speak, compress, judge, load, speak again.

    python benchmarks/demo.py        (or: make demo)

Every line that starts with $ is a command that you can type yourself. The model is calibrated on the text that ships with
lorap and judged on encyclopedia articles, which are not in it.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
import time

import assets

OUT = assets.CACHE.parent / "demo_output" / "SmolLM2-135M-lorap-0.2"
PROMPTS = (
    "The capital of France is",
    "Water boils when",
    "The most important thing about a good story is",
)


def lorap(*arguments: str) -> None:
    """Run one lorap command, showing it first."""
    print(f"\n$ lorap {shlex.join(arguments)}", flush=True)
    subprocess.run([sys.executable, "-m", "lorap", *arguments], check=True, cwd=assets.CACHE.parent)


def generate(model: str) -> None:
    """Three samples."""
    prompts = [part for prompt in PROMPTS for part in ("--prompt", prompt)]
    lorap("generate", model, *prompts, "--max-new-tokens", "32")


def main() -> None:
    assets.fetch()
    start = time.perf_counter()
    root = assets.CACHE.parent
    model, text, out = (str(path.relative_to(root)) for path in (assets.MODEL, assets.WIKI, OUT))
    generate(model)
    lorap("compress", model, out, "--sparsity", "0.2", "--eval-text", text, "--overwrite")
    lorap("info", out)
    lorap("eval", out, "--text", text, "--max-tokens", "4096")
    generate(out)
    print(f"done in {time.perf_counter() - start:.0f} s; the compressed model is in {out}")


if __name__ == "__main__":
    main()
