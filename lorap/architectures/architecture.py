"""What a row of the table says, and what follows from it for the layers of a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from lorap.architectures.experts import Experts, PackedExperts
from lorap.architectures.splitting import Fused

if TYPE_CHECKING:  # names and shapes alone take no torch
    from torch import Tensor, nn

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
PROJECTIONS = ATTENTION + MLP
# Blocks of quantized formats: 256 for llama.cpp's K-quants, 32 for its others, MLX and NNCF.
STOCK_MULTIPLES = (256, 32)

# Projections that read the same activations, so that their statistics are gathered once.
SHARED_INPUTS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "attention_input": ("q_proj", "k_proj", "v_proj"),
        "attention_output": ("o_proj",),
        "mlp_input": ("gate_proj", "up_proj"),
        "mlp_inner": ("down_proj",),
    }
)


def llama_projections() -> Mapping[str, str]:
    attention = {name: f"self_attn.{name}" for name in ATTENTION}
    return MappingProxyType(attention | {name: f"mlp.{name}" for name in MLP})


@dataclass(frozen=True)
class SharedKeys:
    """Some layers have no keys and values of their own and attend to those of an earlier layer.

    Args:
        argument: of a decoder layer, the mapping that keys and values travel in.
        giver: attribute of an attention, whether it puts its own there.
    """

    argument: str
    giver: str


@dataclass(frozen=True)
class Architecture:
    """Names inside one model family.

    Args:
        families: what people call the models, for messages.
        layers: path from the model to its list of decoder layers.
        attention: path from a decoder layer to its attention.
        mlp: path from a decoder layer to its FFN.
        activation: path from the FFN to the function between gate and up; configs name it in several fields, or none.
        projections: path from a decoder layer to each of the seven linear layers, where it has them.
        other_attention: path to what some layers have in place of attention, and which stays as it is; empty where none has.
            That of attention itself where all layers have another kind.
        fused: what the family stores as one matrix, and lorap splits (:mod:`lorap.architectures.splitting`).
        packed: where the experts are, in a family whose FFNs, or some of them, are mixtures
            (:mod:`lorap.architectures.experts`).
        optional: projections that some layers do without: values that are the keys, or both those of an earlier layer.
        stored_apart: tensors of a decoder layer that files hold in parts, one below the other, with the names of these.
        stored_together: projections that files hold as one matrix, one below the other, by the name that this has in a layer.
        shared_keys: how layers hand keys and values over, where some have none of their own.
        own_inputs: field of the config, the width of what each layer reads besides hidden states, as its part of
            ``per_layer_inputs``.
        embeds_at_head: the model's forward pass looks up tokens even where it is given embeddings.
        layer_fields: what ``per_layer_config`` may say of single layers.
        refused: fields of the config that ask for what lorap does not know, and what that is.
    """

    families: str
    layers: str = "model.layers"
    attention: str = "self_attn"
    mlp: str = "mlp"
    activation: str = "act_fn"
    projections: Mapping[str, str] = field(default_factory=llama_projections)
    other_attention: str = ""
    fused: Fused = field(default_factory=lambda: MappingProxyType({}))
    packed: PackedExperts | None = None
    optional: tuple[str, ...] = ()
    stored_apart: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: MappingProxyType({}))
    stored_together: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: MappingProxyType({}))
    shared_keys: SharedKeys | None = None
    own_inputs: str = ""
    embeds_at_head: bool = False
    layer_fields: tuple[str, ...] = ()
    refused: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))

    def decoder_layers(self, model: nn.Module) -> nn.ModuleList:
        """The decoder layers of ``model``, in order."""
        return model.get_submodule(self.layers)  # type: ignore[return-value]

    def roles(self, layer: nn.Module) -> tuple[str, ...]:
        """The projections of a decoder layer that are linear layers.

        All seven; those of the FFN where its attention is of another kind, those of attention where the FFN is several experts;
        without those of ``optional`` that it does not have.
        """
        if self.other_attention and self.other_attention in layer._modules:
            attention: tuple[str, ...] = ()
        else:
            attention = tuple(role for role in ATTENTION if role not in self.optional or self._has(layer, role))
        return attention + (MLP if self.experts(layer) is None else ())

    def _has(self, layer: nn.Module, role: str) -> bool:
        path, _, leaf = self.projections[role].rpartition(".")
        return layer.get_submodule(path)._modules.get(leaf) is not None

    def gives_keys(self, layer: nn.Module) -> bool:
        """Whether later layers may attend to keys and values of this one."""
        giver = self.shared_keys.giver if self.shared_keys else ""
        return bool(getattr(layer.get_submodule(self.attention), giver)) if giver else False

    def reads_keys(self, layer: nn.Module) -> bool:
        """Whether it attends to keys and values of an earlier layer."""
        return self.shared_keys is not None and not self._has(layer, "k_proj")

    def head_inputs(self, text: Any, hidden: Tensor) -> dict[str, Tensor]:
        """What a model needs beside embeddings (windows, seq_len, hidden_size) to give logits while its layers are bypassed.

        Args:
            text: the config of the language model.
            hidden: given as embeddings.
        """
        width = getattr(text, self.own_inputs) if self.own_inputs else 0
        if not width:
            return {}
        return {"per_layer_inputs": hidden.new_zeros(()).expand(*hidden.shape[:2], text.num_hidden_layers, width)}

    def linears(self, layer: nn.Module) -> dict[str, nn.Linear]:
        """The linear layers of one dense decoder layer that lorap works on, by role."""
        return {role: layer.get_submodule(self.projections[role]) for role in self.roles(layer)}  # type: ignore[misc]

    def experts(self, layer: nn.Module) -> Experts | None:
        """The experts of one decoder layer; None where its FFN is none of several."""
        if self.packed is None or not hasattr(layer.get_submodule(self.mlp), self.packed.path.rpartition(".")[2]):
            return None
        return Experts(layer.get_submodule(self.packed.path))

    def shapes(self, layer: nn.Module) -> dict[str, tuple[int, int]]:
        """(out_features, in_features) of the projections of one dense decoder layer, by role; of each expert alike."""
        linears, experts = self.linears(layer), self.experts(layer)
        found = {role: (linear.out_features, linear.in_features) for role, linear in linears.items()}
        return found | (experts.shapes if experts else {})

    def attention_of(self, layer: nn.Module) -> nn.Module:
        """The attention of one decoder layer, of whatever kind."""
        ours = ATTENTION[0] in self.roles(layer)
        return layer.get_submodule(self.attention if ours else self.other_attention)

    def activation_of(self, layer: nn.Module) -> Callable[[Tensor], Tensor]:
        """The function between gate and up of one decoder layer."""
        if (experts := self.experts(layer)) is not None:
            return experts.activation
        found: Any = layer.get_submodule(self.mlp)
        for part in self.activation.split("."):
            found = getattr(found, part)
        return found  # type: ignore[no-any-return]

    @property
    def width_field(self) -> str:
        """What configs call the width of an FFN, or of an expert in a family of mixtures."""
        return self.packed.width_field if self.packed else "intermediate_size"

    def ffn_name(self, index: int, layer: nn.Module) -> str:
        """Full name of what has the width of a layer's FFN: the FFN, or its experts."""
        path = self.packed.path if self.packed and self.experts(layer) else self.mlp
        return f"{self.layers}.{index}.{path}"

    def ffn_widths(self, model: nn.Module) -> list[int]:
        """Channels of each layer's FFN."""
        return [self.shapes(layer)["down_proj"][1] for layer in self.decoder_layers(model)]

    def zeros_to_pad(self, model: nn.Module) -> int:
        """Parameters that fill up every FFN to the widest."""
        widths = self.ffn_widths(model)
        hidden = self.linears(self.decoder_layers(model)[0])["down_proj"].out_features
        return 3 * hidden * sum(max(widths) - width for width in widths)

    def roles_with_bias(self, model: nn.Module) -> set[str]:
        """Projections that have a bias in some layer."""
        layers = self.decoder_layers(model)
        return {role for layer in layers for role, linear in self.linears(layer).items() if linear.bias is not None}

    def module_name(self, index: int, role: str) -> str:
        """Full name of a projection, as in the checkpoint."""
        return f"{self.layers}.{index}.{self.projections[role]}"
