"""What this machine offers lorap: versions, devices, instruction sets, and which implementation serves which op."""

from __future__ import annotations

import importlib.metadata
import platform
from typing import Any

import torch

from lorap.nn import dispatch, native
from lorap.version import __version__

PACKAGES = ("transformers", "triton", "safetensors", "gguf")


def describe_environment() -> dict[str, Any]:
    """Everything a bug report needs, and the dispatch table as it stands here."""
    return {
        "lorap": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        **{name: _version(name) for name in PACKAGES},
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] or ["cpu"],
        "threads": torch.get_num_threads(),
        "native_missing": native.MISSING,
        "native_cuda": native.HAS_CUDA,
        "cpu_instructions": {
            str(dtype).removeprefix("torch."): native.cpu_isa(dtype)
            for dtype in (torch.float32, torch.bfloat16, torch.float16)
        }
        | {"int4, int8": native.quantized_cpu_isa()},
        "backend": dispatch.current(),
        "kernels": [
            {
                "device": rule.device,
                "backend": rule.backend,
                "ops": list(rule.ops),
                "dtypes": [str(dtype).removeprefix("torch.") for dtype in rule.dtypes],
                "max_tokens": rule.max_tokens,
                "missing": dispatch.missing(rule.backend),
                "reason": rule.reason,
            }
            for rule in dispatch.RULES
        ],
    }


def format_environment(found: dict[str, Any]) -> str:
    """The same for people."""
    instructions = ", ".join(f"{isa} for {dtype}" for dtype, isa in found["cpu_instructions"].items())
    facts = [
        f"lorap {found['lorap']}, Python {found['python']}, {found['platform']}",
        "torch " + ", ".join([found["torch"], *(f"{name} {found[name] or 'missing'}" for name in PACKAGES)]),
        f"devices: {', '.join(found['devices'])}; {found['threads']} CPU threads",
        f"C++ kernels: {found['native_missing'] or instructions}",
        f"CUDA kernels: {'built' if found['native_cuda'] else 'not built'}",
        f"LORAP_BACKEND: {found['backend']}",
    ]
    lines = ["which kernels run what; the first row that fits wins, and torch does everything else"]
    for row in found["kernels"]:
        tokens = "any number of tokens" if row["max_tokens"] is None else f"up to {row['max_tokens']} tokens"
        lines.append(
            f"  {row['backend']} on {row['device']}, {', '.join(row['dtypes'])}, {tokens}: {', '.join(row['ops'])}"
        )
        lines.append(f"    {'missing: ' + row['missing'] if row['missing'] else row['reason']}")
    return "\n".join([*facts, "", *lines])


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
