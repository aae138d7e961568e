"""Where the projections live in each model family: one table, no per-family classes.

All families below have the seven linear layers of LLaMA's decoder layer: attention with separate q, k, v and o, and a gated FFN
with separate gate, up and down. What else a layer does needs no entry here, because nothing but the seven is touched: norms
before, between or after its parts, norms of heads, biases, sliding windows, scaled embeddings, residuals and logits, rotary
positions of any kind. What the seven are to each other is a contract, which is in :mod:`lorap.calibration.contract` and is
verified on the weights before anything is compressed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from lorap.architectures.experts import Experts, PackedExperts, check_experts
from lorap.architectures.splitting import GATE_UP, QKV, Fused, split
from lorap.errors import ArchitectureError

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


def _llama_projections(mlp: str = "mlp") -> Mapping[str, str]:
    attention = {name: f"self_attn.{name}" for name in ATTENTION}
    return MappingProxyType(attention | {name: f"{mlp}.{name}" for name in MLP})


@dataclass(frozen=True)
class Architecture:
    """Names inside one model family.

    Args:
        families: what people call the models, for messages.
        layers: path from the model to its list of decoder layers.
        attention: path from a decoder layer to its attention.
        mlp: path from a decoder layer to its FFN.
        activation: path from the FFN to the function between gate and up; configs name it in several fields, or none.
        projections: path from a decoder layer to each of the seven linear layers.
        other_attention: path to what some layers have in place of attention, and which stays as it is; empty where none has.
        fused: what the family stores as one matrix, and lorap splits (:mod:`lorap.architectures.splitting`).
        packed: where the experts are, in a family whose FFNs are mixtures (:mod:`lorap.architectures.experts`).
    """

    families: str
    layers: str = "model.layers"
    attention: str = "self_attn"
    mlp: str = "mlp"
    activation: str = "act_fn"
    projections: Mapping[str, str] = field(default_factory=_llama_projections)
    other_attention: str = ""
    fused: Fused = field(default_factory=lambda: MappingProxyType({}))
    packed: PackedExperts | None = None

    def decoder_layers(self, model: nn.Module) -> nn.ModuleList:
        """The decoder layers of ``model``, in order."""
        return model.get_submodule(self.layers)  # type: ignore[return-value]

    def roles(self, layer: nn.Module) -> tuple[str, ...]:
        """The projections of a decoder layer that are linear layers.

        All seven; those of the FFN where its attention is of another kind, those of attention where the FFN is several experts.
        """
        attention = () if self.other_attention and self.other_attention in layer._modules else ATTENTION
        return attention + (MLP if self.experts(layer) is None else ())

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
        found: Any = layer.get_submodule(self.mlp)
        for part in self.activation.split("."):
            found = getattr(found, part)
        return found  # type: ignore[no-any-return]

    @property
    def width_field(self) -> str:
        """What configs call the width of an FFN, or of an expert."""
        return self.packed.width_field if self.packed else "intermediate_size"

    def ffn_name(self, index: int) -> str:
        """Full name of what has the width of a layer's FFN: the FFN, or its experts."""
        return f"{self.layers}.{index}.{self.packed.path if self.packed else self.mlp}"

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


def _mixture(families: str, **packed: Any) -> Architecture:
    """A family with Llama's attention and experts in place of its FFN."""
    found = PackedExperts(**packed)
    return Architecture(families, activation="experts.act_fn", projections=_llama_projections(found.path), packed=found)


# config.model_type -> names
ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType(
    {
        "llama": Architecture("Llama 1/2/3, Vicuna, SmolLM, SmolLM2"),
        "mistral": Architecture("Mistral"),
        "qwen2": Architecture("Qwen2, Qwen2.5"),
        "qwen3": Architecture("Qwen3"),
        "smollm3": Architecture("SmolLM3"),
        "phi3": Architecture("Phi-3, Phi-4", activation="activation_fn", fused={"self_attn": QKV, "mlp": GATE_UP}),
        "glm": Architecture("GLM-4 of 2024", activation="activation_fn", fused={"mlp": GATE_UP}),
        "glm4": Architecture("GLM-4 of 2025", activation="activation_fn", fused={"mlp": GATE_UP}),
        "cohere": Architecture("Command R"),
        "cohere2": Architecture("Command R7B, Command A"),
        "cwm": Architecture("Code World Model"),
        "diffllama": Architecture("DiffLlama"),
        "doge": Architecture("Doge"),
        "ernie4_5": Architecture("ERNIE 4.5, dense"),
        "exaone4": Architecture("EXAONE 4"),
        "gemma": Architecture("Gemma"),
        "gemma2": Architecture("Gemma 2"),
        "gemma3_text": Architecture("Gemma 3, text alone"),
        "granite": Architecture("Granite 3, dense"),
        "granite_swa": Architecture("Granite with sliding windows"),
        "helium": Architecture("Helium"),
        "hunyuan_v1_dense": Architecture("Hunyuan, dense"),
        "hyperclovax": Architecture("HyperCLOVA X SEED"),
        "internlm3": Architecture("InternLM3"),
        "iquestcoder": Architecture("IQuest-Coder"),
        "ministral": Architecture("Ministral"),
        "ministral3": Architecture("Ministral 3"),
        "olmo": Architecture("OLMo"),
        "olmo2": Architecture("OLMo 2"),
        "olmo3": Architecture("OLMo 3"),
        "qwen3_5_text": Architecture("Qwen3.5, Qwen3.6, text alone", other_attention="linear_attn"),
        "seed_oss": Architecture("Seed-OSS"),
        "stablelm": Architecture("StableLM"),
        "vaultgemma": Architecture("VaultGemma"),
        "mixtral": _mixture(
            "Mixtral",
            stored="block_sparse_moe.experts",
            parts=("w1", "w3", "w2"),
            width_field="intermediate_size",
        ),
        "olmoe": _mixture("OLMoE", width_field="intermediate_size"),
        "qwen3_moe": _mixture("Qwen3, mixtures of experts"),
        # Vision and language: the language model is compressed, the rest stays as it is.
        "gemma3": Architecture("Gemma 3 with vision", layers="model.language_model.layers"),
        "idefics3": Architecture("Idefics 3, SmolVLM", layers="model.text_model.layers"),
        "internvl": Architecture("InternVL 3", layers="model.language_model.layers"),
        "llava": Architecture("LLaVA", layers="model.language_model.layers"),
        "mistral3": Architecture("Mistral Small 3.x", layers="model.language_model.layers"),
        "qwen2_vl": Architecture("Qwen2-VL", layers="model.language_model.layers"),
        "qwen2_5_vl": Architecture("Qwen2.5-VL", layers="model.language_model.layers"),
        "qwen3_5": Architecture(
            "Qwen3.5, Qwen3.6", layers="model.language_model.layers", other_attention="linear_attn"
        ),
        "qwen3_vl": Architecture("Qwen3-VL", layers="model.language_model.layers"),
        "smolvlm": Architecture("SmolVLM 2", layers="model.text_model.layers"),
    }
)


_EXPERTS = "its FFNs are mixtures of experts"
_NO_GATE = "its FFN has no gate"
# config.model_type -> why a family that people bring is none of them
REFUSED: Mapping[str, str] = MappingProxyType(
    {
        "bitnet": "its FFN has a norm between gate * up and down",
        "gemma4": "its layers share keys and values, or have no values of their own",
        "gemma4_text": "its layers share keys and values, or have no values of their own",
        **dict.fromkeys(("deepseek_v2", "deepseek_v3", "gpt_oss"), _EXPERTS),
        **dict.fromkeys(("gpt2", "gpt_neox", "nemotron", "phi", "starcoder2"), _NO_GATE),
    }
)


def known_architecture(model: nn.Module, *, to: str, experts: bool = False) -> Architecture:
    """The table entry for a model, dense or compressed.

    Args:
        model: of transformers; what its family stores as one matrix is split.
        to: what it is wanted for, for the message.
        experts: whether that can be done to mixtures of experts.

    Raises:
        ArchitectureError: the family is unknown.
    """
    model_type = getattr(model.config, "model_type", "")
    if model_type not in ARCHITECTURES:
        raise ArchitectureError(f"cannot {to} model type {model_type!r}; known: {', '.join(ARCHITECTURES)}")
    if ARCHITECTURES[model_type].packed and not experts:
        raise ArchitectureError(
            f"cannot {to} a model of type {model_type}, whose FFNs are mixtures of experts: lorap compresses, evaluates and runs "
            "those in floating point, and nothing else so far"
        )
    return split_model(model)


def split_model(model: Any) -> Architecture:
    """Split what the family of ``model``, one of ``ARCHITECTURES``, stores as one matrix; the model computes the same."""
    architecture = ARCHITECTURES[model.config.model_type]
    if architecture.fused:
        split(architecture.decoder_layers(model), architecture.fused)
    return architecture


def find_architecture(model: nn.Module) -> Architecture:
    """The table entry for a model, after checking that its layers really look like that; splits as :func:`known_architecture`.

    Raises:
        ArchitectureError: the family is unknown, or a projection is missing, fused, quantized or already compressed.
    """
    config = model.config
    model_type = getattr(config, "model_type", type(model).__name__)
    if model_type not in ARCHITECTURES:
        why = f": {REFUSED[model_type]}" if model_type in REFUSED else ""
        known = ", ".join(ARCHITECTURES)
        raise ArchitectureError(
            f"cannot compress model type {model_type!r} ({type(model).__name__}){why}; supported: {known}"
        )
    if (getattr(config, "quantization_config", None) or {}) and _quant_method(config) == "lorap":
        raise ArchitectureError(
            "this model was compressed by lorap already; start from the dense model and ask for a higher sparsity instead"
        )
    architecture = split_model(model)
    if architecture.packed:
        _check_mixtures(architecture, model)
    for index, layer in enumerate(architecture.decoder_layers(model)):
        for role in architecture.roles(layer):
            _check_linear(layer, architecture.projections[role], architecture.module_name(index, role))
    return architecture


def text_config(config: Any) -> Any:
    """The part of a model's config that describes its language model: of a model for texts alone the whole."""
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def cache_argument(model: nn.Module) -> str:
    """What the model's forward and its outputs call keys and values: ``cache``, or in older transformers ``past_key_values``."""
    return "cache" if "cache" in inspect.signature(type(model).forward).parameters else "past_key_values"


def _quant_method(config: object) -> str:
    quantization = config.quantization_config  # type: ignore[attr-defined]
    method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization.quant_method
    return str(getattr(method, "value", method))


def _check_mixtures(architecture: Architecture, model: Any) -> None:
    """Every layer has experts, packed as lorap knows them."""
    for index, layer in enumerate(architecture.decoder_layers(model)):
        if (experts := architecture.experts(layer)) is None:
            raise ArchitectureError(
                f"layer {index} of this {model.config.model_type} model has one FFN in place of experts; lorap compresses "
                "models of this type where every layer has experts"
            )
        check_experts(experts.module, architecture.ffn_name(index))


def _check_linear(layer: nn.Module, path: str, name: str) -> None:
    from torch import nn  # there is a model, so it is imported already

    try:
        module = layer.get_submodule(path)
    except AttributeError:
        raise ArchitectureError(
            f"{name} does not exist: the projections of this model are fused or named otherwise; "
            "lorap needs separate q, k, v, o, gate, up and down"
        ) from None
    if type(module) is not nn.Linear:
        raise ArchitectureError(
            f"{name} is a {type(module).__name__}, not a plain torch.nn.Linear; load the model without quantization or adapters"
        )
