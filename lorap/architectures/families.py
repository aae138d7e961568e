"""The table: where the projections are in each model family, and families that have none of it."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from lorap.architectures.architecture import ATTENTION, Architecture, SharedKeys
from lorap.architectures.experts import PackedExperts
from lorap.architectures.splitting import GATE_UP, QKV


def _mixture(
    families: str,
    *,
    other_attention: str = "",
    stored_apart: Mapping[str, tuple[str, ...]] = MappingProxyType({}),
    stored_together: Mapping[str, tuple[str, ...]] = MappingProxyType({}),
    **packed: Any,
) -> Architecture:
    """A family with Llama's attention and experts in place of FFNs; an expert that all tokens read stays as it is."""
    return Architecture(
        families,
        other_attention=other_attention,
        stored_apart=stored_apart,
        stored_together=stored_together,
        packed=PackedExperts(**packed),
    )


def _latent(families: str, **options: Any) -> Architecture:
    """A mixture with multi-head latent attention, which stays as it is: its projections are low-rank products already."""
    return _mixture(families, other_attention="self_attn", shares_width=True, **options)


def _gemma4(families: str, **paths: Any) -> Architecture:
    """Some layers have no values, which are the keys then, or neither, and attend to those of an earlier layer."""
    return Architecture(
        families,
        optional=("k_proj", "v_proj"),
        shared_keys=SharedKeys("shared_kv_states", "store_full_length_kv"),
        layer_fields=("head_dim", "num_key_value_heads"),
        own_inputs="hidden_size_per_layer_input",
        refused=MappingProxyType(
            {"enable_moe_block": "its layers have experts beside their FFN, which lorap does not know"}
        ),
        **paths,
    )


def _convolutions(attention: str, *, stored: str = "") -> Mapping[str, tuple[str, ...]]:
    """Those of q, k and v, which are one in the model; files may call attention otherwise, as ``stored``."""
    return {f"{attention}.conv1d.weight": tuple(f"{stored or attention}.{part}_conv1d.weight" for part in "qkv")}


# How files of some mixtures name experts and their matrices.
_BLOCK_SPARSE: Mapping[str, Any] = MappingProxyType(
    {"stored": "block_sparse_moe.experts", "parts": ("w1", "w3", "w2"), "width_field": "intermediate_size"}
)


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
        "exaone": Architecture("EXAONE 3"),
        "exaone4": Architecture("EXAONE 4"),
        "gemma": Architecture("Gemma"),
        "gemma2": Architecture("Gemma 2"),
        "gemma3_text": Architecture("Gemma 3, text alone"),
        "gemma4_text": _gemma4("Gemma 4, text alone"),
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
        "olmo_hybrid": Architecture(
            "OLMo Hybrid",
            other_attention="linear_attn",
            stored_apart=_convolutions("linear_attn"),
        ),
        "qwen3_5_text": Architecture("Qwen3.5, Qwen3.6, text alone", other_attention="linear_attn"),
        "seed_oss": Architecture("Seed-OSS"),
        "stablelm": Architecture("StableLM"),
        "vaultgemma": Architecture("VaultGemma"),
        "afmoe": _mixture("AFMoE, Trinity", shares_width=True),
        "bailing_hybrid": _latent("Ling 3", stored_apart=_convolutions("self_attn", stored="attention")),
        "beam": _mixture("Beam"),
        "cohere2_moe": _mixture("Command A, mixtures of experts", width_field="intermediate_size", shares_width=True),
        "deepseek_v2": _latent("DeepSeek-V2"),
        "deepseek_v32": _latent("DeepSeek-V3.2"),
        "deepseek_v3": _latent("DeepSeek-V3, R1, Kimi K2, Moonlight"),
        "dots1": _mixture("dots.llm1", shares_width=True),
        "ernie4_5_moe": _mixture("ERNIE 4.5, mixtures of experts", shares_width=True),
        "exaone_moe": _mixture("EXAONE, mixtures of experts", shares_width=True),
        "flex_olmo": _mixture("FlexOlmo", width_field="intermediate_size"),
        "flint": _mixture("Flint"),
        "glm4_moe": _mixture("GLM-4.5 and later, mixtures of experts", shares_width=True),
        "glm4_moe_lite": _latent("GLM-4.7-Flash"),
        "hunyuan_v1_moe": _mixture("Hunyuan, mixtures of experts", width_field="intermediate_size", shares_width=True),
        "hy_v3": _mixture("Hunyuan 3", shares_width=True),
        "kimi_linear": _latent(
            "Kimi Linear",
            stored="block_sparse_moe.experts",
            parts=("w1", "w3", "w2"),
            stored_apart=_convolutions("self_attn"),
        ),
        "kolibri1": _mixture("Kolibri 1"),
        "laguna": _mixture("Laguna"),
        "mellum": _mixture("Mellum, mixtures of experts"),
        "mimo_v2_flash": _mixture("MiMo-V2-Flash"),
        "minimax_m2": _mixture("MiniMax-M2", **_BLOCK_SPARSE),
        "mixtral": _mixture("Mixtral", **_BLOCK_SPARSE),
        "olmoe": _mixture("OLMoE", width_field="intermediate_size"),
        "phimoe": _mixture("Phi-3.5, mixtures of experts", **_BLOCK_SPARSE),
        "qwen2_moe": _mixture("Qwen1.5, Qwen2, mixtures of experts"),
        "qwen3_moe": _mixture("Qwen3, mixtures of experts"),
        "qwen3_next": _mixture("Qwen3-Next", other_attention="linear_attn"),
        "sarvam_mla": _latent("Sarvam, mixtures of experts with latent attention"),
        "sarvam_moe": _mixture(
            "Sarvam, mixtures of experts",
            shares_width=True,
            stored_together={"attention.query_key_value": tuple(f"self_attn.{name}" for name in ATTENTION[:3])},
        ),
        "solar_open": _mixture("Solar Open", shares_width=True),
        "qwen3_5_moe_text": _mixture(
            "Qwen3.5, Qwen3.6, mixtures of experts, text alone", other_attention="linear_attn"
        ),
        # Vision and language: the language model is compressed, the rest stays as it is.
        "gemma3": Architecture("Gemma 3 with vision", layers="model.language_model.layers"),
        "gemma4": _gemma4("Gemma 4", layers="model.language_model.layers", embeds_at_head=True),
        "got_ocr2": Architecture("GOT-OCR 2", layers="model.language_model.layers"),
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


_NO_GATE = "its FFN has no gate"
_NORM_INSIDE = "its FFN has a norm between gate * up and down"
_SCALED_TOKENS = "its experts read what the router has scaled, through matrices that are packed the other way round"
_SHARED_LAYERS = "one attention layer stands in several places of the model"
# config.model_type -> why a family that people bring is none of them
REFUSED: Mapping[str, str] = MappingProxyType(
    {
        "bitnet": _NORM_INSIDE,
        "dory": _NORM_INSIDE,
        "gpt_oss": "its FFNs are mixtures of experts that have biases",
        **dict.fromkeys(("llama4", "llama4_text"), _SCALED_TOKENS),
        **dict.fromkeys(("aria", "aria_text"), "the matrices of its experts are packed the other way round"),
        **dict.fromkeys(
            ("minimax_m3_vl", "minimax_m3_vl_text"), "its FFNs clamp gate and up, and multiply by up + 1, not by up"
        ),
        "falcon_h1": "its FFN scales gate before the activation, and what down gives",
        "glm_moe_dsa": "its layers hand to later ones which tokens their attention has chosen",
        "hrm_text": "its layers run several times for each token",
        **dict.fromkeys(("zamba", "zamba2"), _SHARED_LAYERS),
        **dict.fromkeys(("mllama", "mllama_text_model"), "some of its layers attend to images alone"),
        "blt": "it reads bytes in patches, through three stacks of layers",
        "phi4_multimodal": "its vision and speech are adapters on top of the projections",
        **dict.fromkeys(
            ("apertus", "arcee", "gpt2", "gpt_neox", "jais2", "nemotron", "nemotron_h", "phi", "starcoder2"), _NO_GATE
        ),
    }
)
