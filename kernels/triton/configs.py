"""Launch settings that were tuned for one GPU, read from ``configs/<GPU name>.json``.

A kernel asks here first and falls back on its own rule of thumb. A file holds, with spaces in the name of the GPU
written as underscores::

    {"device": "NVIDIA H100 80GB HBM3",
     "source": "measured on ... with torch ..., triton ...",
     "kernels": {"shrink": [{"dtype": "bfloat16", "max_m": 1, "k": 4096, "n": 1024,
                             "config": {"BLOCK_N": 8, "BLOCK_K": 1024, "num_warps": 4, "num_stages": 3}}]}}

An entry fits when everything it states is equal to what is asked for; what it leaves out fits anything. Of those that
fit, the smallest ``max_m`` that is at least m counts.
"""

from __future__ import annotations

import json
import math
from functools import cache
from importlib import resources
from typing import Any


def lookup(kernel: str, device_name: str, **sizes: Any) -> dict[str, Any] | None:
    """The tuned settings of ``kernel`` for ``sizes``, e.g. ``m=1, k=4096, n=1024, dtype="bfloat16"``, or None."""
    m = sizes.pop("m", 0)
    fitting = [
        entry
        for entry in _read(device_name.replace(" ", "_").replace("/", "_")).get(kernel, ())
        if m <= entry.get("max_m", math.inf)
        and all(entry[name] == sizes.get(name) for name in entry.keys() - {"max_m", "config"})
    ]
    if not fitting:
        return None
    return dict(min(fitting, key=lambda entry: entry.get("max_m", math.inf))["config"])


@cache
def _read(name: str) -> dict[str, list[dict[str, Any]]]:
    """Kernel name to entries; empty where nothing was shipped for this GPU."""
    file = _folder().joinpath(f"{name}.json")
    if not file.is_file():
        return {}
    try:
        kernels = json.loads(file.read_text("utf-8"))["kernels"]
        for kernel, entries in kernels.items():
            for entry in entries:
                if not isinstance(entry["config"], dict):
                    raise TypeError(f"{kernel}: config is no object")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is not a file of launch settings: {error!r}") from error
    return kernels


def _folder() -> Any:
    return resources.files(__package__).joinpath("configs")
