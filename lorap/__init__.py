"""lorap: compress LLaMA-family language models with LoRAP, and run them afterwards.

Importing it teaches transformers to open compressed checkpoints.
"""

from lorap.checkpoint import save
from lorap.config import CompressionConfig
from lorap.errors import (
    ArchitectureError,
    BackendError,
    CalibrationError,
    CheckpointError,
    ConfigError,
    FactorizationError,
    LoRAPError,
    ShapeError,
    TaskError,
)
from lorap.evaluation import Evaluation, evaluate
from lorap.export import export_gguf, export_stock
from lorap.factorization import Factorization, factorize, factorize_batch
from lorap.integrations.transformers import register as _register
from lorap.merging import merge_shared_inputs, optimize_for_inference
from lorap.modules import LowRankLinear
from lorap.pipeline import compress
from lorap.quantization import quantize_int8
from lorap.reconstruction import reconstruct
from lorap.recovery import Recovery, recover
from lorap.report import CompressionReport
from lorap.tuning import TuningConfig
from lorap.version import __version__

_register()

__all__ = [
    "ArchitectureError",
    "BackendError",
    "CalibrationError",
    "CheckpointError",
    "CompressionConfig",
    "CompressionReport",
    "ConfigError",
    "Evaluation",
    "Factorization",
    "FactorizationError",
    "LoRAPError",
    "LowRankLinear",
    "Recovery",
    "ShapeError",
    "TaskError",
    "TuningConfig",
    "__version__",
    "compress",
    "evaluate",
    "export_gguf",
    "export_stock",
    "factorize",
    "factorize_batch",
    "merge_shared_inputs",
    "optimize_for_inference",
    "quantize_int8",
    "reconstruct",
    "recover",
    "save",
]
