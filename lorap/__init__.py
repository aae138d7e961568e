"""lorap: compress LLaMA-family language models with LoRAP, and run them afterwards.

Importing it teaches transformers to open compressed checkpoints.
"""

import lorap.integrations.preparation  # noqa: F401 (first of all)

# isort: split
from lorap.checkpoint import save
from lorap.config import CompressionConfig
from lorap.errors import (
    ArchitectureError,
    BackendError,
    CalibrationError,
    CheckpointError,
    ConfigError,
    FactorizationError,
    JournalError,
    LoRAPError,
    ProcessError,
    ShapeError,
    TaskError,
)
from lorap.evaluation import Evaluation, evaluate
from lorap.export import export_gguf, export_stock
from lorap.factorization import Factorization, factorize, factorize_batch
from lorap.inspection import inspect_model
from lorap.integrations.transformers import register as _register
from lorap.merging import merge_shared_inputs, optimize_for_inference
from lorap.modules import LowRankLinear
from lorap.pipeline import compress
from lorap.quantization import quantize_int8
from lorap.reconstruction import reconstruct
from lorap.recovery import Recovery, recover
from lorap.report import CompressionReport
from lorap.runs import RunOptions, compress_to_folder
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
    "JournalError",
    "LoRAPError",
    "LowRankLinear",
    "ProcessError",
    "Recovery",
    "RunOptions",
    "ShapeError",
    "TaskError",
    "TuningConfig",
    "__version__",
    "compress",
    "compress_to_folder",
    "evaluate",
    "export_gguf",
    "export_stock",
    "factorize",
    "factorize_batch",
    "inspect_model",
    "merge_shared_inputs",
    "optimize_for_inference",
    "quantize_int8",
    "reconstruct",
    "recover",
    "save",
]
