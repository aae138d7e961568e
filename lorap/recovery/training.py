"""What is trained: low-rank adapters (LoRA, arXiv 2106.09685) that PEFT puts on linear layers of a model that stays as it is."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from lorap.errors import ConfigError


def add_adapters(model: nn.Module, names: Sequence[str], *, rank: int, seed: int) -> Any:
    """A LoRA adapter on each of some linear layers, all else frozen; the model computes the same at first.

    Args:
        model: compressed.
        names: full names of linear layers.
        rank: of the adapters.
        seed: of their first values.

    Returns:
        A ``peft.PeftModel`` around ``model``.

    Raises:
        ConfigError: the package ``peft`` is not installed.
    """
    require_libraries()
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(names))
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())), warnings.catch_warnings():
        # peft 0.21 asks transformers 5.24 for it by the old name.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        torch.manual_seed(seed)
        return get_peft_model(model, config)  # type: ignore[arg-type]


def hold_weights(model: nn.Module, names: Sequence[str], dtype: torch.dtype) -> None:
    """Keep the frozen weights of some linear layers in what autocast multiplies them in.

    Results are the same, without a conversion of every weight at every step: with AMX 0.78 of the processor time.

    Args:
        model: with or without adapters.
        names: full names of linear layers.
        dtype: that autocast multiplies in.
    """
    for name in names:
        layer: Any = model.get_submodule(name)
        weight = getattr(layer, "base_layer", layer).weight
        weight.data = weight.data.to(dtype)


def require_libraries() -> None:
    """Refuse to start work that would end in an ImportError.

    Raises:
        ConfigError: the package ``peft`` or ``accelerate`` is not installed.
    """
    for name in ("peft", "accelerate"):
        try:
            __import__(name)
        except ImportError as error:
            raise ConfigError(f"tuning needs the package `{name}` ({error}): pip install 'lorap[recover]'") from None


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """What matmuls run in under autocast; None for the model's own dtype.

    ``auto`` is bfloat16 where the hardware multiplies it: with AMX 1.3 times as many tokens in the same processor time.
    """
    if precision == "float32":
        return None
    if precision == "bfloat16":
        return torch.bfloat16
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else None
    return torch.bfloat16 if device.type == "cpu" and _cpu_multiplies_bfloat16() else None


def _cpu_multiplies_bfloat16() -> bool:
    checks = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return any(bool(getattr(torch.cpu, check, bool)()) for check in checks)
