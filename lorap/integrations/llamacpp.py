"""GGUF files for llama.cpp: the model as it is, with an FFN width per layer, and what its widths mean there."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lorap.architectures import STOCK_MULTIPLES, known_architecture
from lorap.checkpoint.gguf.architecture import choose_architecture
from lorap.checkpoint.gguf.quantizing import find_quantizer, quantize_file
from lorap.checkpoint.gguf.writing import FILE_TYPES, write_gguf
from lorap.checkpoint.reconstruct import reconstruct
from lorap.checkpoint.save import SPARE_BYTES
from lorap.integrations.stock import fill_up
from lorap.nn.linear import count_parameters
from lorap.outputs import staged_folder
from lorap.reports.model_card import CARD, stock_card
from lorap.reports.run import CompressionReport

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Other texts than the calibration's reach higher.
NEAR_OVERFLOW = torch.finfo(torch.float16).max / 2
_USE = """## Use

```bash
llama-cli -m {file} -p "The capital of France is"
```
"""


def export_gguf(
    model: PreTrainedModel,
    out: str | Path,
    *,
    tokenizer: Any,
    card: str = "",
    pad_widths: bool = False,
    quantize: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Write ``model`` and its tokenizer as one GGUF file for llama.cpp, ``NAME-F16.gguf`` and the like, into the folder
    ``out``.

    Low-rank projections become dense again; every FFN stays as narrow as it is. The file has the architecture of the family, or
    ``deci`` where FFNs differ in width or a bias has no place in it.

    Args:
        model: compressed, loaded or dense; changed in place, as by :func:`lorap.reconstruct`.
        out: a new or empty folder, as for :func:`lorap.export_stock`.
        tokenizer: of the model, a fast one.
        card: README.md of the compressed checkpoint; empty for a short one.
        pad_widths: give FFNs narrower than the widest channels of zeros, for families that ``deci`` does not compute.
        quantize: llama.cpp's name of a type, such as Q8_0 or Q4_K_M; None keeps the dtype of the model.
        overwrite: replace an existing folder.

    Raises:
        ArchitectureError: llama.cpp cannot hold the model or its tokenizer.
        CheckpointError: the folder is taken, or cannot be written; then nothing is left behind.
        ConfigError: the ``gguf`` package is not installed, or nothing here quantizes to that type.
    """
    out = Path(out)
    choose_architecture(model, one_width=pad_widths)
    program = None if quantize is None else find_quantizer(quantize)
    compressed_params = count_parameters(model)
    reconstruct(model)
    if pad_widths:
        fill_up(model)
    with staged_folder(out, overwrite=overwrite, needed_bytes=model.get_memory_footprint() + SPARE_BYTES) as stage:
        file = stage / f"{out.name}-{quantize or FILE_TYPES[model.dtype]}.gguf"
        if quantize and program:
            whole = stage / "whole.gguf"
            architecture = write_gguf(model, whole, tokenizer=tokenizer, name=out.name)
            quantize_file(program, whole, file, quantize)
            whole.unlink()
        else:
            architecture = write_gguf(model, file, tokenizer=tokenizer, name=out.name, kind=quantize)
        what = f"a file for llama.cpp, of its architecture {architecture}"
        use = _USE.format(file=file.name)
        text = stock_card(card, out.name, what, count_parameters(model), compressed_params, kind="gguf", use=use)
        (stage / CARD).write_text(text, "utf-8")
    return out


def width_cost(model: PreTrainedModel) -> str:
    """One sentence on what the FFN widths mean for quantized formats, whose blocks of 32 or 256 numbers lie along a row.

    Sources: llama.cpp's src/llama-quant.cpp (which types take over, and that rows of no whole block stay in 16 bits).
    """
    architecture = known_architecture(model, to="export")
    down = [architecture.linears(layer)["down_proj"] for layer in architecture.decoder_layers(model)]
    widths = sorted({linear.in_features for linear in down})
    large, small = STOCK_MULTIPLES
    several, said = len(widths) > 1, width_range(widths)
    for multiple in (small, large):
        odd = [linear for linear in down if linear.in_features % multiple]
        if not odd:
            continue
        numel = sum(linear.weight.numel() for linear in odd)
        what = f"{len(odd)} down projections ({numel:,} parameters)"
        if multiple == small:
            return (
                f"{said} {'are not all multiples' if several else 'is no multiple'} of {small}: quantized by llama.cpp, the "
                f"{what} stay in 16 bits, {2 * numel:,} bytes in place of {numel * 9 // 16:,} in Q4_0; --target stock, or "
                f"--width-multiple {small}, and {large} for K-quants, makes whole blocks"
            )
        return (
            f"{said} {'are multiples' if several else 'is a multiple'} of {small}, as Q4_0 and Q8_0 need, but not "
            f"{'all ' if several else ''}of {large}: K-quants store the {what} in a larger format, {numel * 11 // 16:,} bytes in "
            f"Q5_0 in place of {numel * 9 // 16:,} in Q4_K; --width-multiple {large} makes whole blocks"
        )
    return f"{said} {'are multiples' if several else 'is a multiple'} of {large}: every quantized format takes it"


def width_range(widths: Sequence[int]) -> str:
    """One width, or the smallest and the largest, in words."""
    low, high = min(widths), max(widths)
    return f"FFN width {low:,}" if low == high else f"FFN widths from {low:,} to {high:,}"


def overflow_warning(report: CompressionReport | None, dtype: torch.dtype) -> str | None:
    """One sentence where inputs seen during calibration come near the end of float16; None where they do not.

    llama.cpp rounds the inputs of F16 matrices to float16: beyond 65,504 they are infinite, and what follows is NaN.
    """
    projections = report.projections if report else []
    worst = max(projections, key=lambda projection: projection.largest_input, default=None)
    if dtype != torch.float16 or worst is None or worst.largest_input < NEAR_OVERFLOW:
        return None
    return (
        f"{worst.role} of layer {worst.layer} read activations up to {worst.largest_input:,.0f} during calibration, and float16 "
        f"ends at {torch.finfo(torch.float16).max:,.0f}: hosts that compute in it, as llama.cpp does with F16 matrices, may give "
        "NaN; use --dtype bfloat16, or quantize the file to Q8_0"
    )
