"""What a model folder holds, from its config and file headers alone: parameters by kind, kept share, ranks, widths, bytes."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lorap.architectures import ARCHITECTURES, MLP, PROJECTIONS, Architecture
from lorap.architectures.experts import DOWN, GATE_UP
from lorap.checkpoint.find import ModelSource
from lorap.checkpoint.folders import packed_shapes, read_files
from lorap.checkpoint.gguf.header import read_gguf
from lorap.checkpoint.headers import TensorInfo
from lorap.checkpoint.quantization_fields import QuantizationFields
from lorap.errors import CheckpointError
from lorap.jsonio import named, read_json
from lorap.nn.low_rank_tensors import (
    INT8_DATA,
    INT8_SCALE,
    LEFT,
    LOW_RANK_ONLY,
    RIGHT,
    WEIGHT_PACKED,
    WEIGHT_SHAPE,
    LowRankTensors,
)
from lorap.reports.run import RECOVERY_REPORT, REPORT, CompressionReport, format_table

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
# Parts of models that see or hear, whose layers may be named as those of the language model are.
SIGHT = ("visual", "vision_tower", "vision_model", "audio_tower", "multi_modal_projector", "connector")
# What :func:`counted_name` says for attention that is none of q, k, v and o.
OTHER_ATTENTION = "other_attention"
# FFNs that all tokens read beside experts, and what some layers have in place of attention, which lorap leaves as they are.
SHARED = ("shared_expert", "shared_experts", "shared_mlp", "linear_attn", OTHER_ATTENTION)
# How int8 checkpoints call the scales of a weight's rows, ours and those of others.
SCALES = (INT8_SCALE, "weight_scale", "SCB")
KINDS = (*PROJECTIONS, "embed_tokens", "lm_head", "other")


def describe_model(source: ModelSource) -> dict[str, Any]:
    """Sizes of a local model, dense or compressed, without loading a weight.

    A folder of ``--target stock`` is an ordinary one; what it was made from is in its report. Where that does not fit the files,
    ``params_before`` and ``param_ratio`` are None.

    Raises:
        CheckpointError: the model is not local, or its files are damaged.
    """
    if source.folder is None:
        raise CheckpointError(f"no model folder {source.location}; `info` reads local folders and .gguf files only")
    checked = source.checked or source.contents
    config: Mapping[str, Any] = checked.settings if checked else {}
    family = ARCHITECTURES.get(str(config.get("model_type")))
    tensors = single_projections(checked.headers) if checked else gguf_tensors(source.folder / str(source.gguf_file))
    tensors = {counted_name(name, family): tensor for name, tensor in tensors.items()}
    settings = checked.compression if checked else None
    packed = packed_shapes(read_files(source.folder)) if settings and settings.group_size else {}
    parameters, scale_bytes = _parameters(tensors, packed)
    origin, after = _origin(source, settings, parameters, getattr(checked, "widths", ()))
    before, width = origin.params, origin.width
    text = config.get("text_config", config)
    dense_field = family.width_field if family else "intermediate_size"
    index_bytes = sum(t.nbytes for name, t in tensors.items() if t.is_index and not name.endswith(f".{WEIGHT_SHAPE}"))
    ranks: dict[str, list[int]] = defaultdict(list)
    for name, rank in settings.ranks.items() if settings else ():
        ranks[name.rsplit(".", 1)[-1]].append(rank)
    return {
        "model": source.name,
        "model_type": named(config.get("model_type", "gguf")),
        "tuned": (source.folder / RECOVERY_REPORT).is_file(),
        "compressed_by_lorap": origin.compressed,
        "recipe": origin.recipe,
        "sparsity": origin.sparsity,
        "params": sum(after.values()),
        "params_before": None if before is None else sum(before.values()),
        "param_ratio": _kept(before, after),
        "bytes": sum(tensor.nbytes for tensor in tensors.values()),
        "index_bytes": index_bytes,
        "scale_bytes": scale_bytes,
        "weights": settings.weights if settings else None,
        "other_bits": Counter(settings.other_kinds.values()) if settings else {},
        "group_size": settings.group_size if settings else None,
        "bits_per_weight": _bits_per_weight(tensors, after),
        "bits_per_dense_weight": None if before is None else _bits_per_weight(tensors, before),
        "dtypes": sorted({tensor.dtype for tensor in tensors.values() if not tensor.is_index}),
        "storage": settings.storage if settings and ranks else None,
        "kinds": {
            kind: {"params": after[kind], "params_before": None if before is None else before[kind]}
            for kind in KINDS
            if after[kind]
        },
        "ranks": {role: sorted(set(found)) for role, found in ranks.items()},
        "intermediate_size": sorted({*settings.intermediate_sizes.values()})
        if settings and settings.intermediate_sizes
        else [text[dense_field]]
        if isinstance(text.get(dense_field), int)
        else [],
        "dense_intermediate_size": width,
    }


def report_beside(source: ModelSource) -> CompressionReport | None:
    """The report of the compression; None where there is no report, or none that can be read."""
    if source.folder is None or not (source.folder / REPORT).is_file():
        return None
    try:
        return CompressionReport.from_dict(read_json(source.folder / REPORT))
    except CheckpointError:
        return None


@dataclass(frozen=True)
class _Origin:
    """The dense model and what was done to it.

    Args:
        compressed: whether lorap has compressed it.
        params: of the dense model, by kind; None where a report is there and not of this model.
        width: FFN width of the dense model; None where layers differ.
        recipe: of the compression.
        sparsity: of the compression.
    """

    compressed: bool
    params: Mapping[str, int] | None
    width: int | None = None
    recipe: str | None = None
    sparsity: float | None = None


def _origin(
    source: ModelSource,
    settings: QuantizationFields | None,
    tensors: Mapping[str, TensorInfo],
    config_widths: Sequence[int],
) -> tuple[_Origin, Mapping[str, int]]:
    """Where a model comes from, by its marks, or where these say nothing of sizes by its report; and parameters by kind now.

    Where the layers of the dense model have FFNs of several widths, its config still says them.
    """
    width = settings.dense_intermediate_size if settings else None
    own = config_widths if settings and settings.intermediate_sizes and width is None else ()
    before, after = _count(tensors, own or width, added_biases=settings.biases if settings else ())
    if settings is not None and (own or width is not None):
        return _Origin(True, before, width, settings.recipe, settings.sparsity), after
    if source.folder is None or not (source.folder / REPORT).is_file():
        return _Origin(settings is not None, before), after
    report = report_beside(source)
    dense = _dense_counts(report, after)
    if report is None or dense is None:
        return _Origin(settings is not None, None), after
    width = report.by_role("down_proj")[0].shape_before[1]
    return _Origin(True, dense, width, report.config.recipe, report.config.sparsity), after


def _dense_counts(report: CompressionReport | None, now: Mapping[str, int]) -> dict[str, int] | None:
    """Parameters of the dense model by kind, from a report; None if that is not of the very model that the files hold.

    Args:
        report: from beside the files.
        now: parameters by kind in the files.
    """
    if report is None:
        return None
    before, after = (
        {role: sum(getattr(one, field) for one in report.by_role(role)) for role in PROJECTIONS}
        for field in ("params_before", "params_after")
    )
    dense = {kind: before.get(kind) or count for kind, count in now.items()}
    fits = all(count in (0, now.get(role)) for role, count in after.items()) and after["down_proj"] > 0
    return dense if fits and sum(dense.values()) == report.params_total_before else None


def _bits_per_weight(tensors: Mapping[str, TensorInfo], params: Mapping[str, int]) -> float | None:
    """Bits on disk for each parameter of the decoder layers' projections: scales, row numbers and guards go with the weights.

    Args:
        tensors: on disk.
        params: by kind; of this model, or of the dense one.
    """
    count = sum(params.get(role, 0) for role in PROJECTIONS)
    stored = sum(tensor.nbytes for name, tensor in tensors.items() if kind_of(name) in PROJECTIONS)
    return 8 * stored / count if count else None


def _kept(before: Mapping[str, int] | None, after: Mapping[str, int]) -> float | None:
    """Share of the parameters of the decoder layers' projections."""
    if before is None:
        return None
    dense, now = (sum(counts.get(role, 0) for role in PROJECTIONS) for counts in (before, after))
    return now / dense if dense else 1.0


def size_text(info: Mapping[str, Any]) -> str:
    """How large a model is on disk, and in which dtypes, of what :func:`describe_model` tells."""
    return f"{info['bytes'] / 1e6:,.1f} MB ({', '.join(info['dtypes'])})"


def format_info(info: Mapping[str, Any]) -> str:
    """The same for people."""
    rows = []
    for kind, counts in info["kinds"].items():
        before = counts["params_before"]
        kept = "unknown" if before is None else f"{counts['params'] / before:.4f}" if before else "1.0000"
        ranks = info["ranks"].get(kind, [])
        rows.append(
            [
                kind,
                f"{counts['params']:,}",
                kept,
                f"{ranks[0]}-{ranks[-1]}" if ranks[1:] else "".join(map(str, ranks)),
            ]
        )
    head = f"{info['model']}: {info['model_type']}, {info['params']:,} parameters, {size_text(info)}"
    if info["params_before"] and (info["dense_intermediate_size"] or info["ranks"] or info["sparsity"]):
        width = "-".join(map(str, info["intermediate_size"]))
        sparsity = "unknown" if info["sparsity"] is None else f"{info['sparsity']:.4g}"
        dense = f" of {info['dense_intermediate_size']}" if info["dense_intermediate_size"] else ""
        head += (
            f"\ncompressed by lorap, recipe {info['recipe']}, sparsity {sparsity}: {info['param_ratio']:.4f} of the "
            f"attention and FFN parameters kept, FFN width {width}{dense}"
        )
        if info["storage"] == "pivoted":
            head += f"\nlow-rank layers are pivoted; their row index takes {info['index_bytes'] / 1e3:,.1f} kB"
    if info["params_before"] is None:
        head += f"\n{REPORT} beside it is damaged or of another model, so how much was kept is unknown"
    if info["tuned"]:
        head += f"\ntuned after compression, see {RECOVERY_REPORT}"
    if info["scale_bytes"]:
        stored = info["weights"] or "int8"
        # In a mixture the kind of the folder may be that of a few.
        others = [f"{kind} in {count:,} projections" for kind, count in sorted(info["other_bits"].items())]
        stored = f"{', '.join(others)} and {stored} in all others," if others else stored
        stored += f" in groups of {info['group_size']}" if info["group_size"] else ""
        head += (
            f"\nweights are {stored}, {info['bits_per_weight']:.2f} bits for each in the decoder layers; their scales take "
            f"{info['scale_bytes'] / 1e3:,.1f} kB and are not counted as parameters"
        )
    if info["compressed_by_lorap"] and info["bits_per_dense_weight"]:
        head += f"\n{info['bits_per_dense_weight']:.2f} bits on disk for each weight that the dense decoder layers have"
    return head + "\n\n" + format_table(["", "parameters", "kept", "rank"], rows)


def _parameters(
    tensors: Mapping[str, TensorInfo], packed: Mapping[str, tuple[int, int]]
) -> tuple[dict[str, TensorInfo], int]:
    """What was trained, and the row index of pivoted layers, under the names of a float checkpoint; and the bytes of scales."""
    parameters: dict[str, TensorInfo] = {}
    scale_bytes = 0
    for name, tensor in tensors.items():
        layer, _, leaf = name.rpartition(".")
        if leaf in SCALES and (layer in packed or _is_int8(tensors, layer)):
            scale_bytes += tensor.nbytes
        elif leaf == WEIGHT_PACKED and layer in packed:
            parameters[f"{layer}.weight"] = replace(tensor, shape=packed[layer])
        elif leaf == INT8_DATA:
            parameters[f"{layer}.weight"] = tensor
        elif tensor.is_parameter or tensor.is_index:
            parameters[name] = tensor
    return parameters, scale_bytes


def _is_int8(tensors: Mapping[str, TensorInfo], layer: str) -> bool:
    names = (f"{layer}.{INT8_DATA}", f"{layer}.weight")
    return any(name in tensors and tensors[name].dtype == "I8" for name in names)


def _count(
    tensors: Mapping[str, TensorInfo], dense_widths: int | Sequence[int] | None, *, added_biases: Sequence[str] = ()
) -> tuple[dict[str, int], dict[str, int]]:
    """Parameters by kind, in the dense model and now. A low-rank layer was as large as its outer shape says.

    Args:
        tensors: now, by name.
        dense_widths: of FFNs in the dense model, one for all or one for each layer; None where they are as they were.
        added_biases: of linear layers that had none.
    """
    before: dict[str, int] = defaultdict(int)
    after: dict[str, int] = defaultdict(int)
    for name, tensor in tensors.items():
        if tensor.is_index:
            continue
        kind = kind_of(name)
        after[kind] += tensor.numel
        if name.endswith(f".{RIGHT}"):
            layer = name.removesuffix(f".{RIGHT}")
            inner = {key: tensors[f"{layer}.{key}"].shape for key in LOW_RANK_ONLY if f"{layer}.{key}" in tensors}
            low_rank = LowRankTensors.of_stored(inner, layer)
            before[kind] += low_rank.out_features * low_rank.in_features
        elif name.endswith(f".{LEFT}"):
            pass  # counted with its right factor
        elif name.endswith("bias") and name.rpartition(".")[0] in added_biases:
            pass  # it was not there before
        elif dense_widths and kind in ("gate_proj", "up_proj") and tensor.numel:
            before[kind] += tensor.numel // max(tensor.shape[:1], default=1) * _width_at(name, dense_widths)
        elif dense_widths and kind == "down_proj" and len(tensor.shape) == 2:
            before[kind] += tensor.shape[0] * _width_at(name, dense_widths)
        else:
            before[kind] += tensor.numel
    return before, after


def _width_at(name: str, widths: int | Sequence[int]) -> int:
    """That of the layer which a projection is of: the first number in its name."""
    if isinstance(widths, int):
        return widths
    return widths[next(int(part) for part in name.split(".") if part.isdecimal())]


def single_projections(tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """Tensors of packed experts as gate, up and down, the experts of a layer beside each other; others as they are."""
    found: dict[str, TensorInfo] = {}
    for name, tensor in tensors.items():
        owner, _, leaf = name.rpartition(".")
        if len(tensor.shape) != 3 or leaf not in (GATE_UP, DOWN):
            found[name] = tensor
            continue
        experts, rows, columns = tensor.shape
        if leaf == DOWN:
            found[f"{name}.weight"] = replace(tensor, shape=(experts * rows, columns))
            continue
        for role in MLP[:2]:
            half = replace(tensor, shape=(rows // 2, experts * columns), nbytes=tensor.nbytes // 2)
            found[f"{owner}.{role}.weight"] = half
    return found


def counted_name(name: str, family: Architecture | None) -> str:
    """``name``, changed for a tensor of attention that is none of q, k, v and o: :func:`kind_of` must not take it for one.

    Args:
        name: in the model.
        family: of the model; None where lorap does not know it.
    """
    if family is None or family.other_attention != family.attention:
        return name
    return name.replace(f".{family.attention}.", f".{OTHER_ATTENTION}.")


def kind_of(name: str) -> str:
    """The kind of a tensor, one of ``KINDS``, by its name."""
    parts = name.split(".")
    found = next((part for part in parts if part in KINDS), "other")
    # The attention of some families has a gate of its own, which is called as that of an FFN is.
    elsewhere = {*parts} & {*SIGHT, *SHARED} or (found in MLP and "self_attn" in parts)
    return "other" if elsewhere else found


def kinds_of(name: str) -> tuple[str, ...]:
    """The same; of gate and up of packed experts both kinds, which have half of the tensor each."""
    return MLP[:2] if name.endswith(f".{GATE_UP}") else (kind_of(name),)


def gguf_tensors(path: Path) -> dict[str, TensorInfo]:
    """Every tensor of a GGUF file by its name, with Hugging Face's names for the kinds."""
    return {
        ".".join(GGUF_KINDS.get(part, part) for part in name.split(".")): info
        for name, info in read_gguf(path).tensors.items()
    }
