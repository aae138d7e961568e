"""lorap: compress LLaMA-family language models with LoRAP, and run them afterwards.

Importing it teaches transformers to open compressed checkpoints.
"""

import lorap.integrations.preparation  # noqa: F401 (first of all)

# isort: split
from lorap.algorithms.factorization import Factorization, factorize, factorize_batch
from lorap.checkpoint.hf_quantizer import register as _register
from lorap.checkpoint.quantize import quantize_int8
from lorap.checkpoint.reconstruct import reconstruct
from lorap.checkpoint.save import save
from lorap.compression.pipeline import compress
from lorap.compression.runs.run import RunOptions, compress_to_folder
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
from lorap.evaluation.inspection.inspect import inspect_model
from lorap.evaluation.perplexity import evaluate
from lorap.integrations.stock import export_gguf, export_stock
from lorap.nn.fused import merge_shared_inputs, optimize_for_inference
from lorap.nn.linear import LowRankLinear
from lorap.recovery.recover import Recovery, recover
from lorap.recovery.training import TuningConfig
from lorap.reports.records import Evaluation
from lorap.reports.run import CompressionReport
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
