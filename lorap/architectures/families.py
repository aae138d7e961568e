"""The table: where the projections are in each model family, and families that have none of it."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from lorap.architectures.architecture import Architecture, SharedKeys
from lorap.architectures.experts import PackedExperts
from lorap.architectures.splitting import GATE_UP, QKV


def _mixture(families: str, *, other_attention: str = "", **packed: Any) -> Architecture:
    """A family with Llama's attention and experts in place of FFNs; an expert that all tokens read stays as it is."""
    return Architecture(families, other_attention=other_attention, packed=PackedExperts(**packed))


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
            stored_apart=MappingProxyType(
                {"linear_attn.conv1d.weight": tuple(f"linear_attn.{part}_conv1d.weight" for part in "qkv")}
            ),
        ),
        "qwen3_5_text": Architecture("Qwen3.5, Qwen3.6, text alone", other_attention="linear_attn"),
        "seed_oss": Architecture("Seed-OSS"),
        "stablelm": Architecture("StableLM"),
        "vaultgemma": Architecture("VaultGemma"),
        "afmoe": _mixture("AFMoE, Trinity", shares_width=True),
        "cohere2_moe": _mixture("Command A, mixtures of experts", width_field="intermediate_size", shares_width=True),
        "dots1": _mixture("dots.llm1", shares_width=True),
        "ernie4_5_moe": _mixture("ERNIE 4.5, mixtures of experts", shares_width=True),
        "exaone_moe": _mixture("EXAONE, mixtures of experts", shares_width=True),
        "flex_olmo": _mixture("FlexOlmo", width_field="intermediate_size"),
        "glm4_moe": _mixture("GLM-4.5 and later, mixtures of experts", shares_width=True),
        "hunyuan_v1_moe": _mixture("Hunyuan, mixtures of experts", width_field="intermediate_size", shares_width=True),
        "mellum": _mixture("Mellum, mixtures of experts"),
        "minimax_m2": _mixture("MiniMax-M2", **_BLOCK_SPARSE),
        "mixtral": _mixture("Mixtral", **_BLOCK_SPARSE),
        "olmoe": _mixture("OLMoE", width_field="intermediate_size"),
        "phimoe": _mixture("Phi-3.5, mixtures of experts", **_BLOCK_SPARSE),
        "qwen2_moe": _mixture("Qwen1.5, Qwen2, mixtures of experts"),
        "qwen3_moe": _mixture("Qwen3, mixtures of experts"),
        "qwen3_next": _mixture("Qwen3-Next", other_attention="linear_attn"),
        "solar_open": _mixture("Solar Open", shares_width=True),
        "qwen3_5_moe_text": _mixture(
            "Qwen3.5, Qwen3.6, mixtures of experts, text alone", other_attention="linear_attn"
        ),
        # Vision and language: the language model is compressed, the rest stays as it is.
        "gemma3": Architecture("Gemma 3 with vision", layers="model.language_model.layers"),
        "gemma4": _gemma4("Gemma 4", layers="model.language_model.layers", embeds_at_head=True),
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
        **dict.fromkeys(("deepseek_v2", "deepseek_v3", "gpt_oss"), _EXPERTS),
        **dict.fromkeys(("gpt2", "gpt_neox", "nemotron", "phi", "starcoder2"), _NO_GATE),
    }
)
