"""Fewer bits in a GGUF file: types that the ``gguf`` package makes by itself, and all others by llama.cpp's ``llama-quantize``.

Rows are stored in blocks, of 32 numbers in the types made here. llama.cpp's own rule for rows that are no whole blocks is
``tensor_type_fallback`` in src/llama-quant.cpp: they stay in 16 bits.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import torch
from torch import Tensor

from lorap.errors import CheckpointError, ConfigError

COMMAND = "llama-quantize"
BEST = "Q8_0"
# The gguf package rounds to these as ggml does; it has no code for K-quants.
OWN = (BEST, "Q5_1", "Q5_0", "Q4_1", "Q4_0")
# What the file looks up tokens in and ends with: llama.cpp gives them more bits than the rest, and so does this.
_ENDS = ("token_embd.weight", "output.weight")


def find_quantizer(kind: str) -> Path | None:
    """Who makes files of type ``kind``: the path of llama.cpp's program, or None where the ``gguf`` package does.

    ``Q8_0`` is the same either way, and made by the package; the program is asked for the others where it is on the PATH.

    Raises:
        ConfigError: there is no such type, or nothing here makes it; with the command that would.
    """
    from gguf import LlamaFileType

    known = [member.name.removeprefix("MOSTLY_") for member in LlamaFileType if member.name.startswith("MOSTLY_Q")]
    if not any(member.name == f"MOSTLY_{kind}" for member in LlamaFileType) or kind in ("F16", "BF16"):
        raise ConfigError(f"unknown type {kind!r} to quantize to; llama.cpp has {', '.join(known)}, and others")
    program = None if kind == BEST else shutil.which(COMMAND)
    if program is None and kind not in OWN:
        raise ConfigError(
            f"{kind} needs llama.cpp's {COMMAND}, which is not on the PATH; without it {', '.join(OWN)} are possible, or export "
            f"without --quantize and run {COMMAND} FILE.gguf SMALLER.gguf {kind} where llama.cpp is"
        )
    return Path(program) if program else None


def quantized_type(name: str, tensor: Tensor, kind: str) -> str:
    """ggml's name of the type in which one matrix of a file of type ``kind`` is stored."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    kind = BEST if name in _ENDS else kind
    block = GGML_QUANT_SIZES[GGMLQuantizationType[kind]][0]
    if tensor.shape[-1] % block == 0:
        return kind
    return "BF16" if tensor.dtype == torch.bfloat16 else "F16"


def quantize_file(program: Path, source: Path, target: Path, kind: str) -> None:
    """Have llama.cpp's program make ``target`` of ``source``.

    Raises:
        CheckpointError: it failed; with the last that it said.
    """
    done = subprocess.run(
        [program, source, target, kind], capture_output=True, text=True, errors="replace", check=False
    )
    if done.returncode or not target.is_file():
        said = (done.stderr or done.stdout).strip().splitlines() or ["nothing"]
        raise CheckpointError(
            f"{program} {source.name} {target.name} {kind} ended with {done.returncode}, saying: {said[-1]}"
        )
