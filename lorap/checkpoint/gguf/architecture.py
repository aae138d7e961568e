"""Which of llama.cpp's architectures holds a model: that of its family, or `deci`.

`deci` (DeciLM, Llama-Nemotron) is Llama's graph with an FFN width per layer, and a bias wherever there is one. Source of what
each can hold: llama.cpp's src/models/llama.cpp, deci.cpp, qwen2.cpp and qwen3.cpp; what they do not ask for is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lorap.architectures import ATTENTION, PROJECTIONS, known_architecture
from lorap.checkpoint.gguf.names import WRITTEN
from lorap.checkpoint.gguf.rope import rope_to_gguf
from lorap.checkpoint.guards import activation_of
from lorap.errors import ArchitectureError, ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Room:
    """What one of llama.cpp's architectures can hold.

    Args:
        biases: the projections that may have one.
        own_heads: heads need not divide the hidden size among them.
        factors: it reads ``rope_freqs.weight``, Llama 3.1's scaling.
        own_widths: each layer may have an FFN width of its own.
    """

    biases: tuple[str, ...] = ATTENTION[:3]
    own_heads: bool = True
    factors: bool = False
    own_widths: bool = False


DECI = "deci"
ROOMS: Mapping[str, Room] = {
    "llama": Room(biases=PROJECTIONS, factors=True),
    "qwen2": Room(own_heads=False),
    "qwen3": Room(),
    DECI: Room(biases=PROJECTIONS, factors=True, own_widths=True),
}
_STOCK = "use --format stock"
# Families that `deci` computes as their own class does; it has no norms of q and k.
IN_DECI = ("llama", "mistral", "qwen2")


def choose_architecture(model: PreTrainedModel, *, one_width: bool = False) -> str:
    """llama.cpp's name of the architecture that ``model`` is written as; its family's own where that can hold it.

    Args:
        model: dense, compressed or reconstructed.
        one_width: FFNs will be filled up to the widest.

    Raises:
        ArchitectureError: none can hold it; with the way out.
        ConfigError: the ``gguf`` package is not installed.
    """
    config = model.config
    if config.model_type not in WRITTEN:
        raise ArchitectureError(f"no GGUF for model type {config.model_type!r}; possible: {', '.join(WRITTEN)}")
    check_llama_graph(config, host="llama.cpp")
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise ConfigError("GGUF needs the package gguf: pip install 'lorap[eval]'") from None
    own = WRITTEN[config.model_type]
    missing = dict(_too_much(model, ROOMS[own], one_width=one_width))
    if not missing:
        return own
    if config.model_type in IN_DECI:
        return DECI
    what, way_out = next(iter(missing.items()))
    raise ArchitectureError(
        f"{what}, which llama.cpp's {own} architecture cannot hold, and {DECI}, which can, has no norms of q and k: {way_out}"
    )


def check_llama_graph(config: Any, *, host: str) -> None:
    """Refuse what no graph of Llama's kind computes: other activations, windows of attention, partly rotated heads.

    Args:
        config: of the model.
        host: who would compute it, for the message.

    Raises:
        ArchitectureError: naming the field, its value and the way out.
    """
    if (activation := activation_of(config)) not in ("silu", "swish"):
        raise ArchitectureError(
            f"{host} computes FFNs of this family with silu, and this model's hidden_act is {activation!r}; "
            "use --format stock"
        )
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    if window is not None and window < config.max_position_embeddings:
        raise ArchitectureError(
            f"the attention window of {window:,} tokens has no place in the architecture that {host} would take for this model; "
            "use --format stock"
        )


def head_dim(config: Any) -> int:
    """Components of an attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def rope_of(config: Any) -> tuple[dict[str, Any], Any]:
    """Rotary positions as GGUF says them; errors as :func:`lorap.checkpoint.gguf.rope.rope_to_gguf`."""
    return rope_to_gguf(getattr(config, "rope_parameters", None) or {}, head_dim=head_dim(config))


def _too_much(model: PreTrainedModel, room: Room, *, one_width: bool) -> Iterator[tuple[str, str]]:
    """What ``room`` cannot hold, and what can be done about it."""
    config, architecture = model.config, known_architecture(model, to="export")
    widths, factors = architecture.ffn_widths(model), rope_of(config)[1]
    low, high = min(widths), max(widths)
    if low < high and not room.own_widths and not one_width:
        zeros = architecture.zeros_to_pad(model)
        yield (
            f"FFN widths run from {low:,} to {high:,}",
            f"fill up the narrower ones (--pad-widths: {zeros:,} more parameters, all zero), or compress again with --shapes "
            "uniform or --target stock",
        )
    homeless = [role for role in PROJECTIONS if role in architecture.roles_with_bias(model) - set(room.biases)]
    if homeless:
        yield f"{', '.join(homeless)} have biases", "compress again with --no-bias-compensation"
    if not room.own_heads and config.num_attention_heads * head_dim(config) != config.hidden_size:
        yield f"{config.num_attention_heads} heads of {head_dim(config)} components are not the hidden size", _STOCK
    if not room.factors and factors is not None:
        yield "rotary positions are scaled as Llama 3.1's", _STOCK
