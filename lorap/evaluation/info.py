"""What a model folder holds, from its config and file headers alone: parameters by kind, kept share, ranks, widths, bytes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lorap.architectures import PROJECTIONS
from lorap.checkpoint.folders import TensorInfo
from lorap.checkpoint.gguf import read_gguf
from lorap.checkpoint.load import ModelSource
from lorap.errors import CheckpointError
from lorap.jsonio import named
from lorap.reports.run import RECOVERY_REPORT, format_table

# llama.cpp's names for what Hugging Face calls otherwise.
GGUF_KINDS = {
    "attn_q": "q_proj",
    "attn_k": "k_proj",
    "attn_v": "v_proj",
    "attn_output": "o_proj",
    "ffn_gate": "gate_proj",
    "ffn_up": "up_proj",
    "ffn_down": "down_proj",
    "token_embd": "embed_tokens",
    "output": "lm_head",
}
# How int8 checkpoints call a weight (lorap/nn/int8.py) and the scales of its rows, ours and those of others.
INT8_WEIGHT = "_weight_qdata"
SCALES = ("_weight_scale", "weight_scale", "SCB")
KINDS = (*PROJECTIONS, "embed_tokens", "lm_head", "other")


def describe_model(source: ModelSource) -> dict[str, Any]:
    """Sizes of a local model, dense or compressed, without loading a weight.

    Raises:
        CheckpointError: the model is not local, or its files are damaged.
    """
    if source.folder is None:
        raise CheckpointError(f"no model folder {source.location}; `info` reads local folders and .gguf files only")
    checked = source.checked
    tensors = checked.headers if checked else gguf_tensors(source.folder / str(source.gguf_file))
    config: Mapping[str, Any] = checked.settings if checked else {}
    settings = checked.compression if checked else None
    width = settings.dense_intermediate_size if settings else None
    parameters, scale_bytes = _parameters(tensors)
    before, after = _count(parameters, width, added_biases=settings.biases if settings else ())
    index_bytes = sum(tensor.nbytes for tensor in tensors.values() if tensor.is_index)
    linear_before, linear_after = (sum(counts[role] for role in PROJECTIONS) for counts in (before, after))
    ranks: dict[str, list[int]] = defaultdict(list)
    for name, rank in settings.ranks.items() if settings else ():
        ranks[name.rsplit(".", 1)[-1]].append(rank)
    return {
        "model": source.name,
        "model_type": named(config.get("model_type", "gguf")),
        "tuned": (source.folder / RECOVERY_REPORT).is_file(),
        "compressed_by_lorap": settings is not None,
        "recipe": settings.recipe if settings else None,
        "sparsity": settings.sparsity if settings else None,
        "params": sum(after.values()),
        "params_before": sum(before.values()),
        "param_ratio": linear_after / linear_before if linear_before else 1.0,
        "bytes": sum(tensor.nbytes for tensor in tensors.values()),
        "index_bytes": index_bytes,
        "scale_bytes": scale_bytes,
        "dtypes": sorted({tensor.dtype for tensor in tensors.values() if not tensor.is_index}),
        "storage": settings.storage if settings and ranks else None,
        "kinds": {kind: {"params": after[kind], "params_before": before[kind]} for kind in KINDS if after[kind]},
        "ranks": {role: sorted(set(found)) for role, found in ranks.items()},
        "intermediate_size": sorted({*settings.intermediate_sizes.values()})
        if settings and settings.intermediate_sizes
        else [config["intermediate_size"]]
        if isinstance(config.get("intermediate_size"), int)
        else [],
        "dense_intermediate_size": width,
    }


def format_info(info: Mapping[str, Any]) -> str:
    """The same for people."""
    rows = []
    for kind, counts in info["kinds"].items():
        kept = counts["params"] / counts["params_before"] if counts["params_before"] else 1.0
        ranks = info["ranks"].get(kind, [])
        rows.append(
            [
                kind,
                f"{counts['params']:,}",
                f"{kept:.4f}",
                f"{ranks[0]}-{ranks[-1]}" if ranks[1:] else "".join(map(str, ranks)),
            ]
        )
    size = f"{info['bytes'] / 1e6:,.1f} MB ({', '.join(info['dtypes'])})"
    head = f"{info['model']}: {info['model_type']}, {info['params']:,} parameters, {size}"
    if info["compressed_by_lorap"]:
        width = "-".join(map(str, info["intermediate_size"]))
        head += (
            f"\ncompressed by lorap, recipe {info['recipe']}, sparsity {info['sparsity']}: {info['param_ratio']:.4f} of the "
            f"attention and FFN parameters kept, FFN width {width} of {info['dense_intermediate_size']}"
        )
        if info["storage"] == "pivoted":
            head += f"\nlow-rank layers are pivoted; their row index takes {info['index_bytes'] / 1e3:,.1f} kB"
    if info["tuned"]:
        head += f"\ntuned after compression, see {RECOVERY_REPORT}"
    if info["scale_bytes"]:
        head += f"\nweights are int8; their scales take {info['scale_bytes'] / 1e3:,.1f} kB and are not counted as parameters"
    return head + "\n\n" + format_table(["", "parameters", "kept", "rank"], rows)


def _parameters(tensors: Mapping[str, TensorInfo]) -> tuple[dict[str, TensorInfo], int]:
    """What was trained, and the row index of pivoted layers, under the names of a float checkpoint; and the bytes of scales."""
    parameters: dict[str, TensorInfo] = {}
    scale_bytes = 0
    for name, tensor in tensors.items():
        layer, _, leaf = name.rpartition(".")
        if leaf in SCALES and _is_int8(tensors, layer):
            scale_bytes += tensor.nbytes
        elif leaf == INT8_WEIGHT:
            parameters[f"{layer}.weight"] = tensor
        elif tensor.is_parameter or tensor.is_index:
            parameters[name] = tensor
    return parameters, scale_bytes


def _is_int8(tensors: Mapping[str, TensorInfo], layer: str) -> bool:
    names = (f"{layer}.{INT8_WEIGHT}", f"{layer}.weight")
    return any(name in tensors and tensors[name].dtype == "I8" for name in names)


def _count(
    tensors: Mapping[str, TensorInfo], dense_width: int | None, *, added_biases: Sequence[str] = ()
) -> tuple[dict[str, int], dict[str, int]]:
    """Parameters by kind, in the dense model and now. A low-rank layer was as large as its outer shape says."""
    before: dict[str, int] = defaultdict(int)
    after: dict[str, int] = defaultdict(int)
    for name, tensor in tensors.items():
        if tensor.is_index:
            continue
        kind = kind_of(name)
        after[kind] += tensor.numel
        if name.endswith(".right.weight"):
            layer = name.removesuffix("right.weight")
            pivots = tensor.shape[0] if layer + "pivot_rows" in tensors else 0
            left = tensors.get(layer + "left.weight")
            if left is None:
                raise CheckpointError(f"the model is damaged: it has {name} but no {layer}left.weight; copy it again")
            if not len(left.shape) == len(tensor.shape) == 2:
                raise CheckpointError(
                    f"the model is damaged: {name} has shape {tensor.shape}, {layer}left.weight {left.shape}"
                )
            before[kind] += (left.shape[0] + pivots) * tensor.shape[1]
        elif name.endswith(".left.weight"):
            pass  # counted with its right factor
        elif name.endswith("bias") and name.rpartition(".")[0] in added_biases:
            pass  # it was not there before
        elif dense_width and kind in ("gate_proj", "up_proj") and tensor.numel:
            before[kind] += tensor.numel // max(tensor.shape[:1], default=1) * dense_width
        elif dense_width and kind == "down_proj" and len(tensor.shape) == 2:
            before[kind] += tensor.shape[0] * dense_width
        else:
            before[kind] += tensor.numel
    return before, after


def kind_of(name: str) -> str:
    """The kind of a tensor, one of ``KINDS``, by its name."""
    return next((part for part in name.split(".") if part in KINDS), "other")


def gguf_tensors(path: Path) -> dict[str, TensorInfo]:
    """Every tensor of a GGUF file by its name, with Hugging Face's names for the kinds."""
    return {
        ".".join(GGUF_KINDS.get(part, part) for part in name.split(".")): info
        for name, info in read_gguf(path).tensors.items()
    }
