"""README.md of a compressed checkpoint, in the form that the Hugging Face hub reads."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lorap.algorithms.step_schedule import schedule
from lorap.config import CompressionConfig
from lorap.reports.run import (
    KIND_HEADER,
    PAGE,
    CompressionReport,
    CorrectionReport,
    correction_lines,
    evaluation_lines,
    expert_lines,
    markdown_table,
)
from lorap.requirements import has_anchor, roles_with_output_metric
from lorap.weights import TRELLIS, coding_of

CARD = "README.md"
# What the choices of a config do to a model, as parts of sentences for the model card.
_NORMS = {
    "awsvd": "weighted by the norms of their input channels ({2404.09695})",
    "svd": "by the plain truncated SVD",
    "afm": "along the principal components of their outputs",
    "second_moment": "weighted by the second moment of their inputs ({2403.07378})",
}
_SCORES = {
    "lorap": "those of largest activation-weighted norms stayed ({2404.09695})",
    "output": "those that add most to the output stayed",
    "fluctuation": "those whose output varies most stayed ({2312.11983})",
}
_SIZES = {
    "paper": "Every layer kept the same share, v and o counting {ratio:g} times as much as q and k ({{2404.09695}}).",
    "even": "Every matrix kept the same share.",
    "loss": "Ranks and widths of all layers shared one budget, priced by the gradients of the loss.",
    "stock": "Attention stayed dense, and one width for all FFNs gave all of the sparsity, so that any host can open the model.",
    "flap": "Attention stayed dense, and one threshold cut the FFNs of all layers ({{2312.11983}}).",
}

_USE = """## Use

```python
{note}from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("this folder")
```
"""
# An exported folder has no such page.
_PAGE_LINK = f"All of it, layer by layer, with charts: [{PAGE}]({PAGE}).\n"
# Of models for texts, and of those that see.
_OPENED = {
    "AutoModelForCausalLM": "AutoModelForImageTextToText",
    "pipeline_tag: text-generation": "pipeline_tag: image-text-to-text",
}
_PLUG_IN = "import lorap  # teaches transformers to open this checkpoint\n"


def read_card(folder: Path) -> str:
    """The card in a model folder, which anybody may have edited: what is no UTF-8 in it is marked; empty where there is none."""
    card = folder / CARD
    return card.read_text("utf-8", errors="replace") if card.is_file() else ""


def method_text(
    config: CompressionConfig, correction: CorrectionReport | None = None, rescaling: CorrectionReport | None = None
) -> str:
    """What was done, in sentences with links to papers, by the choices of ``config`` and not by the name of its recipe.

    Without ``correction`` and ``rescaling`` the steps are those that the config's windows are enough for.
    """
    rounded = " ".join(filter(None, (_rounding(config), _rescaling(config, rescaling))))
    if config.sparsity == 0:
        return _with_links(rounded) or "Nothing was to be removed, and nothing was changed."
    dense_attention = config.allocation == "flap" or config.target == "stock"
    factorized = ["Attention"] if "self_attn" in config.sublayers and not dense_attention else []
    pruned = "mlp" in config.sublayers and config.mlp_method == "prune"
    if "mlp" in config.sublayers and not pruned:
        factorized.append("FFN")
    sentences = []
    if factorized:
        stored = ", stored as rows and coefficients ({2501.19090})" if config.storage == "pivoted" else ""
        norm = _NORMS[config.attention_method]
        sentences.append(f"{' and '.join(factorized)} projections became low-rank factor pairs, {norm}{stored}.")
        if has_anchor(config):
            sentences.append(
                "They were fitted to the outputs that the original model has in their place ({2604.02119})."
            )
    if pruned:
        sentences.append(f"FFN channels were pruned: {_SCORES[config.channel_score]}.")
        if config.repair:
            sentences.append("The down projections were refitted by least squares to the output of all channels.")
        if config.bias_compensation:
            sentences.append("The mean output of the channels that went is now a bias ({2312.11983}).")
    # The ratio is between projections of attention; where attention is left alone, `paper` is `even`.
    sizes: str = "even" if config.allocation == "paper" and "self_attn" not in config.sublayers else config.allocation
    sizes = "stock" if config.target == "stock" else sizes
    sentences.append(_SIZES[sizes].format(ratio=config.vo_to_qk_ratio))
    if roles_with_output_metric(config):
        sentences.append("Errors of outputs were weighted by the gradients of the loss.")
    sentences.append(_training(config, correction))
    sentences.append(rounded)
    return _with_links(" ".join(filter(None, sentences)))


def _with_links(text: str) -> str:
    return re.sub(r"\{([\d.]+)\}", r"[arXiv \1](https://arxiv.org/abs/\1)", text)


def said_as_tuned(text: str) -> str:
    """The text about a compression, once its weights were trained: it says so where it said that nothing was trained."""
    text = re.sub(r"Nothing( else)? was trained\.", "Afterwards it was tuned.", text)
    return re.sub(r"nothing( else)? was trained\.", "afterwards it was tuned.", text)


def _rounding(config: CompressionConfig) -> str:
    if config.bits is None:
        return ""
    coding, kinds = coding_of(config.weights), str(config.weights)
    if config.is_mixed and coding is not None:
        fewest, *_, most = map(coding.kind, coding.bits)
        several = len(coding.bits) > 2
        what = f"{fewest} to {most}, more" if several else most
        kinds = f"{what} where that helps most for its bytes{'' if several else f' and else {fewest}'},"
    stored = f"{kinds} with a scale for each {config.group_size}"
    if coding is TRELLIS:
        stored += ", codes on a trellis ({2406.11235})"
    return (
        f"Weights of the decoder layers are {stored}, rounded such that the outputs change least on the calibration text "
        "({2210.17323})."
        + (
            " They are stored as compressed-tensors has them: hosts need its package."
            if config.target == "stock"
            else ""
        )
    )


def _training(config: CompressionConfig, correction: CorrectionReport | None) -> str:
    if not config.corrects:
        return "" if config.rescales else "Nothing was trained."
    took = _took(config, correction, config.correction_steps)
    if not took:
        return f"None of the {config.correction_steps} correction steps was taken, and nothing was trained."
    return f"These weights then took {took}{'' if config.rescales else '; nothing else was trained'}."


def _rescaling(config: CompressionConfig, rescaling: CorrectionReport | None) -> str:
    if not config.rescales:
        return ""
    took = _took(config, rescaling, config.scale_steps)
    if not took:
        return f"None of the {config.scale_steps} steps of the scales was taken, and nothing else was trained."
    return f"The scales then took {took}; nothing else was trained."


def _took(config: CompressionConfig, report: CorrectionReport | None, asked: int) -> str:
    """How many steps were taken of those that were asked for, and where to; empty where none was."""
    steps = report.taken if report else _steps(config, asked)
    if not steps:
        return ""
    took = f"{steps} small {'step' if steps == 1 else 'steps'}" + ("" if steps == asked else f" of {asked}")
    return f"{took} towards what the original model predicts on the calibration text"


def _tags(config: CompressionConfig) -> str:
    done = [] if config.sparsity == 0 else ["low-rank", "pruned"]
    done += [] if config.bits is None else ["quantized"]
    return "".join(f"- {tag}\n" for tag in done)


def _steps(config: CompressionConfig, asked: int) -> int:
    return schedule(config.num_calibration_samples, config.calibration_seq_len, asked).steps


def model_card(report: CompressionReport) -> str:
    """README.md of a compressed checkpoint, in the form that the Hugging Face hub reads."""
    config = report.config
    base = f"base_model: {report.model}\nbase_model_relation: quantized\n" if "/" in report.model else ""
    measured = "\n".join(f"- {line}" for line in evaluation_lines(report.evaluations))
    lines = correction_lines(report.correction) + correction_lines(report.rescaling, "scale") + expert_lines(report)
    corrected = "".join(f"\n- {line}" for line in lines)
    corrected += "\n" if corrected else ""
    options = "\n".join(f"| {name} | {value} |" for name, value in config.to_dict().items())
    calibration = report.calibration
    asked = f"that follows from {config.budget_text}" if config.has_byte_budget else "asked for"
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags:
- lorap
{_tags(config)}{base}---

# {report.model}, compressed by lorap

Base model: **{report.model}**. Recipe: **{config.recipe}**. Sparsity {asked}: **{config.sparsity:.6g}** of
{" and ".join(config.sublayers)}; kept share of these parameters: **{report.param_ratio:.4f}**
({report.params_before:,} -> {report.params_after:,}; the whole model {report.params_total_before:,} -> {report.params_saved:,}).

{method_text(config, report.correction, report.rescaling)}

{_USE.format(note="" if config.target == "stock" else _PLUG_IN)}
## Quality

{measured or "Perplexity was not measured. Measure it with `lorap eval FOLDER --text FILE`."}
{corrected}
## Parameters by kind

{markdown_table(KIND_HEADER, report.kind_rows())}

{_PAGE_LINK}
## Calibration

{calibration["windows"]} windows of {calibration["seq_len"]} tokens from `{calibration["name"]}`
({calibration["tokens"]:,} tokens, sha256 of the ids {calibration["sha256"][:16]}).{_source_lines(calibration.get("sources", ()))}

## Options

| option | value |
|---|---|
{options}
"""


def _source_lines(sources: Sequence[dict[str, Any]]) -> str:
    """What each source of a mixture gave, as a list of its own; nothing for a single source."""
    if len(sources) < 2:
        return ""
    rows = [f"- `{source['name']}`: {source['windows']} windows, weight {source['weight']:g}" for source in sources]
    return "\n\n" + "\n".join(rows)


def opened_as(card: str, class_name: str) -> str:
    """The card of a model of this class: it says with which function of transformers such models are opened."""
    sees = class_name.endswith("ForConditionalGeneration")
    for text, both in _OPENED.items():
        card = card.replace(both, text)
        card = card.replace(text, both) if sees else card
    return card


def stock_card(
    card: str,
    name: str,
    what: str,
    params: int,
    compressed_params: int,
    *,
    kind: str = "stock",
    use: str = _USE.format(note=""),
) -> str:
    """README.md of an exported checkpoint, from that of the compressed one; a short one where ``card`` is empty.

    Args:
        card: of the compressed checkpoint.
        name: of the exported one, where there is no card to take it from.
        what: it is, such as "an ordinary LlamaForCausalLM that opens without lorap".
        params: of the exported model.
        compressed_params: of the compressed model.
        kind: the format that ``lorap export`` was given.
        use: how it is opened, in Markdown with a heading.
    """
    card = opened_as(card, "").replace(f"{_PAGE_LINK}\n", "")
    grown = f", in place of {compressed_params:,} in the compressed checkpoint" if compressed_params != params else ""
    about = f"""## Exported

Written by `lorap export --format {kind}`: {what}.
Low-rank projections are dense again, so the model has {params:,} parameters{grown}.
"""
    for old in (_USE.format(note=_PLUG_IN), _USE.format(note="")):
        if old in card:
            return card.replace(old, use + "\n" + about)
    tags = "library_name: transformers\npipeline_tag: text-generation\ntags:\n- lorap"
    return f"---\n{tags}\n---\n\n# {name}\n\n{use}\n{about}"
