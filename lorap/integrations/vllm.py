"""vLLM: ``vllm serve OUT`` and ``LLM("OUT")`` open compressed checkpoints.

vLLM finds :func:`register` by the entry point ``vllm.general_plugins`` and calls it in each of its processes. It makes
``quant_method = "lorap"`` known; vLLM then builds its own model, and asks :class:`LoRAPQuantizationConfig` what to put into
each linear layer. Attention, scheduling, sampling and the server stay vLLM's.

A linear layer is in :mod:`lorap.integrations.vllm_linear`, what it holds in :mod:`lorap.integrations.vllm_projection`.
"""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.models.utils import WeightsMapper

from lorap.architectures import SHARED_INPUTS
from lorap.checkpoint.format import QUANT_METHOD, LoRAPConfig
from lorap.checkpoint.guards import unguard_config
from lorap.checkpoint.validate import check_folder
from lorap.errors import BackendError, CheckpointError
from lorap.integrations.vllm_linear import LoRAPLinearMethod, PackedLinearMethod
from lorap.nn.implementations import FLOATS

# Families whose models in vLLM were run with the plug-in (tests/vllm): which linear layers a model of vLLM has, and under which
# names their weights come, is its own affair.
SERVED = (
    *("llama", "mistral", "qwen2", "qwen3", "smollm3"),
    *("phi3", "glm4", "gemma", "gemma3_text", "granite", "exaone4", "ernie4_5", "ministral3"),
    *("olmo2", "olmo3", "seed_oss"),
)
# vLLM's fused layers, in the names of a compressed folder: Phi's model says that its own are stored as one matrix, too.
FUSED = {"qkv_proj": SHARED_INPUTS["attention_input"], "gate_up_proj": SHARED_INPUTS["mlp_input"]}


def register() -> None:
    """Make ``quant_method = "lorap"`` known to vLLM; safe to call twice."""
    if QUANT_METHOD not in QUANTIZATION_METHODS:
        register_quantization_config(QUANT_METHOD)(LoRAPQuantizationConfig)


class LoRAPQuantizationConfig(QuantizationConfig):
    """What vLLM asks about a compressed checkpoint.

    Args:
        checkpoint: ``quantization_config`` of config.json, already checked.
    """

    def __init__(self, checkpoint: LoRAPConfig) -> None:
        super().__init__()
        self.checkpoint = checkpoint
        self.intermediate_size: int | None = None

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> LoRAPQuantizationConfig:
        """Read ``quantization_config``.

        Raises:
            CheckpointError: as :class:`LoRAPConfig`: a newer format, an unknown field, an impossible size.
            BackendError: this vLLM loads fused layers in an older way.
        """
        if "orig_to_new_stacked" not in {field.name for field in fields(WeightsMapper)}:
            raise BackendError(
                "lorap needs vLLM 0.32 or newer, which lets a fused layer load its own weights; upgrade vllm"
            )
        return cls(LoRAPConfig(**config))

    def get_name(self) -> str:
        """The name in ``quant_method``."""
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """What the ops of lorap compute in."""
        return list(FLOATS)

    @classmethod
    def get_min_capability(cls) -> int:
        """Any GPU: where no kernel of lorap fits, torch does the work."""
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        """None besides config.json."""
        return []

    def maybe_update_config(self, model_name: str, hf_config: Any = None, **_: Any) -> None:
        """Called before the model is built, by the process that the user started: refuse a folder that cannot be served.

        Raises:
            BackendError: the family was never run in vLLM.
            CheckpointError: as :func:`lorap.checkpoint.validate.check_folder`, such as a tensor that is missing.
        """
        if (model_type := getattr(hf_config, "model_type", None)) not in SERVED:
            raise BackendError(
                f"lorap's plug-in for vLLM serves {', '.join(SERVED)}, and this is a {model_type} model: open it in "
                "transformers, or make it an ordinary one with `lorap export`, which vLLM serves by itself (mixtures of experts "
                "cannot be exported)"
            )
        self.intermediate_size = getattr(hf_config, "intermediate_size", None)
        unguard_config(hf_config)  # vLLM's FFNs want to read "silu"
        folder = Path(model_name)
        if folder.is_dir() and any(folder.glob("*.safetensors")):
            # vLLM does not miss tensors of quantized models and starts with whatever is in memory.
            hf_config.tie_word_embeddings = check_folder(folder).config.tie_word_embeddings

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> LoRAPLinearMethod | None:
        """The projections of the checkpoint that vLLM's layer ``prefix`` holds, or None for what is not a linear layer.

        Raises:
            CheckpointError: the FFN, or weights in few bits, cannot be shared out among the workers of tensor parallelism.
        """
        if not isinstance(layer, LinearBase):
            return None
        workers = get_tensor_model_parallel_world_size()
        if self.intermediate_size is not None and self.intermediate_size % workers:
            raise CheckpointError(
                f"intermediate_size in config.json is {self.intermediate_size}, which vLLM cannot share out among {workers} "
                "tensor-parallel workers; serve with fewer, or compress with a --width-multiple that they divide"
            )
        is_packed = self.checkpoint.weights != "float"
        if is_packed and workers > 1:
            raise CheckpointError(
                f"{self.checkpoint.weights_text} weights are not shared out among {workers} tensor-parallel workers; serve them "
                "with one, or serve the checkpoint that they were rounded from"
            )
        parent, _, last = prefix.rpartition(".")
        names = (self.packed_modules_mapping | FUSED).get(last, [last])
        method = PackedLinearMethod if is_packed else LoRAPLinearMethod
        return method(self.checkpoint, [f"{parent}.{name}" if parent else name for name in names])
