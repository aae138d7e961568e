"""lorap: compress LLaMA-family language models with LoRAP, and run them afterwards.

Importing it teaches transformers to open compressed checkpoints. It imports neither torch nor transformers: a public name is
imported from where it lives when it is first asked for.
"""

import lorap.integrations.preparation  # noqa: F401 (first of all)

# isort: split
import importlib
import importlib.util
import logging
from typing import TYPE_CHECKING, Any

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
from lorap.version import __version__

if TYPE_CHECKING:
    from lorap.algorithms.factorization import Factorization, factorize, factorize_batch
    from lorap.checkpoint.reconstruct import reconstruct
    from lorap.checkpoint.save import save
    from lorap.compression.pipeline import compress
    from lorap.compression.quantization import quantize, quantize_int8
    from lorap.compression.runs.run import RunOptions, compress_to_folder
    from lorap.config import CompressionConfig
    from lorap.evaluation.inspection.inspect import inspect_model
    from lorap.evaluation.perplexity import evaluate
    from lorap.integrations.deci import export_deci
    from lorap.integrations.llamacpp import export_gguf
    from lorap.integrations.stock import export_stock
    from lorap.nn.fused import merge_shared_inputs, optimize_for_inference
    from lorap.nn.linear import LowRankLinear
    from lorap.nn.warming import warm_up
    from lorap.recovery.config import TuningConfig
    from lorap.recovery.recover import Recovery, recover
    from lorap.reports.records import Evaluation
    from lorap.reports.run import CompressionReport

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
    "export_deci",
    "export_gguf",
    "export_stock",
    "factorize",
    "factorize_batch",
    "inspect_model",
    "merge_shared_inputs",
    "optimize_for_inference",
    "quantize",
    "quantize_int8",
    "reconstruct",
    "recover",
    "save",
    "warm_up",
]

# Where the names above live; the same as under TYPE_CHECKING, which is for those who read types.
_HOMES = {
    "lorap.algorithms.factorization": ("Factorization", "factorize", "factorize_batch"),
    "lorap.checkpoint.reconstruct": ("reconstruct",),
    "lorap.checkpoint.save": ("save",),
    "lorap.compression.pipeline": ("compress",),
    "lorap.compression.quantization": ("quantize", "quantize_int8"),
    "lorap.compression.runs.run": ("RunOptions", "compress_to_folder"),
    "lorap.config": ("CompressionConfig",),
    "lorap.evaluation.inspection.inspect": ("inspect_model",),
    "lorap.evaluation.perplexity": ("evaluate",),
    "lorap.integrations.deci": ("export_deci",),
    "lorap.integrations.llamacpp": ("export_gguf",),
    "lorap.integrations.stock": ("export_stock",),
    "lorap.nn.fused": ("merge_shared_inputs", "optimize_for_inference"),
    "lorap.nn.linear": ("LowRankLinear",),
    "lorap.nn.warming": ("warm_up",),
    "lorap.recovery.recover": ("Recovery", "recover"),
    "lorap.recovery.config": ("TuningConfig",),
    "lorap.reports.records": ("Evaluation",),
    "lorap.reports.run": ("CompressionReport",),
}
_MODULES = {name: module for module, names in _HOMES.items() for name in names}

# What lorap has to say goes to the loggers of its modules, and nowhere until a program, such as the command, listens.
logging.getLogger("lorap").addHandler(logging.NullHandler())


def __getattr__(name: str) -> Any:
    """A public name or a module of lorap, when it is first asked for (PEP 562)."""
    if name in _MODULES:
        value = getattr(importlib.import_module(_MODULES[name]), name)
    elif not name.startswith("_") and importlib.util.find_spec(f"lorap.{name}") is not None:
        value = importlib.import_module(f"lorap.{name}")
    else:
        raise AttributeError(f"module 'lorap' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
