"""Rotary positions: how a GGUF file says them, and how a config does.

GGUF spreads them over keys (``rope.scaling.*``, the older ``rope.scale_linear``) and tensors: Llama 3.1's scaling is written as
the factors by which its frequencies are divided (``rope_freqs.weight``), and its four parameters are found again from those.
What keys mean is what llama.cpp does with them (src/llama-context.cpp, ggml's rope), in transformers' words
(transformers/modeling_rope_utils.py).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from lorap.errors import ArchitectureError, CheckpointError
from lorap.jsonio import shown

FREQUENCIES, LONG, SHORT = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"
ROPE_TENSORS = (FREQUENCIES, LONG, SHORT)
# Factors are stored in float32 and come from frequencies in float32.
TOLERANCE = 2e-6
# Ramp corners of YaRN: llama.cpp takes no others for these families.
BETA_FAST, BETA_SLOW = 32.0, 1.0
Values = Callable[..., Any]  # value(key, default) of one architecture


def read_rope(value: Values, factors: Mapping[str, Any], *, head_dim: int, context: int) -> dict[str, Any]:
    """The ``rope_parameters`` that a file means.

    Args:
        value: the file's value of a key, such as ``rope.freq_base``, or a default.
        factors: (head_dim / 2,) float32, by tensor name; those of ``ROPE_TENSORS`` that the file holds.
        head_dim: components of a head.
        context: tokens that the model was made for.

    Raises:
        CheckpointError: the file scales positions in a way that no config can say.
    """
    rotated = value("rope.dimension_count", head_dim)
    if rotated != head_dim:
        raise CheckpointError(
            f"rope.dimension_count is {shown(rotated)} of {head_dim} components of a head: models that rotate a part are not read"
        )
    for name, vector in factors.items():
        if vector.shape != (head_dim // 2,) or not (np.isfinite(vector).all() and (vector > 0).all()):
            raise CheckpointError(
                f"{name} has the shape {vector.shape}, or values that are no factors; {head_dim // 2} are needed"
            )
    base = {"rope_theta": _positive(value, "rope.freq_base", 10000.0)}
    kind = value("rope.scaling.type", "linear")
    factor = _positive(value, "rope.scaling.factor", 0.0) or _positive(value, "rope.scale_linear", 0.0) or 1.0
    original = value("rope.scaling.original_context_length", None) or context
    attention = _positive(value, "rope.scaling.attn_factor", 1.0)
    _check_yarn_extras(value)
    if kind not in ("none", "linear", "yarn", "longrope"):
        raise CheckpointError(f"rope.scaling.type is {shown(kind)}; none, linear, yarn and longrope are read")
    if kind == "longrope":
        return base | _longrope(factors, original, attention)
    if odd := factors.keys() - {FREQUENCIES}:
        raise CheckpointError(f"{min(odd)} scales positions, but rope.scaling.type is {shown(kind)}, not longrope")
    scaled = kind != "none" and factor != 1.0
    frequencies = factors.get(FREQUENCIES)
    if frequencies is not None and (frequencies != 1).any():
        if scaled:
            raise CheckpointError(
                f"{FREQUENCIES} and rope.scaling.factor {factor} both scale positions; no config says so"
            )
        return base | _llama3(frequencies, base["rope_theta"], original)
    if not scaled:
        return base | {"rope_type": "default"}
    if kind == "linear":
        return base | {"rope_type": "linear", "factor": factor}
    yarn = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    return base | yarn | ({"attention_factor": attention * _yarn_attention(factor)} if attention != 1 else {})


def rope_to_gguf(parameters: Mapping[str, Any], *, head_dim: int) -> tuple[dict[str, Any], np.ndarray[Any, Any] | None]:
    """The other way: values by key, and the factors of ``rope_freqs.weight``, (head_dim / 2,) float32, where there are any.

    Raises:
        ArchitectureError: llama.cpp has no such positions.
    """
    kind, base = (
        parameters.get("rope_type", "default"),
        {"rope.freq_base": float(parameters.get("rope_theta", 10000.0))},
    )
    if parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise ArchitectureError("heads that are rotated in part are not written to GGUF; use --format stock")
    if kind == "default":
        return base, None
    if kind == "linear":
        return base | {"rope.scaling.type": kind, "rope.scaling.factor": float(parameters["factor"])}, None
    if kind == "llama3":
        return base, llama3_factors(parameters, head_dim=head_dim)
    if kind == "yarn" and _is_plain_yarn(parameters):
        factor = float(parameters["factor"])
        values = {
            "rope.scaling.type": kind,
            "rope.scaling.factor": factor,
            "rope.scaling.original_context_length": int(parameters["original_max_position_embeddings"]),
        }
        if parameters.get("attention_factor") is not None:
            values["rope.scaling.attn_factor"] = float(parameters["attention_factor"]) / _yarn_attention(factor)
        return base | values, None
    options = ", ".join(f"{name} {shown(value)}" for name, value in parameters.items() if name != "rope_type")
    raise ArchitectureError(
        f"rotary positions of type {kind!r} ({options}) are not written to GGUF; use --format stock"
    )


def llama3_factors(parameters: Mapping[str, Any], *, head_dim: int) -> np.ndarray[Any, Any]:
    """What Llama 3.1's scaling divides each frequency by: (head_dim / 2,) float32, from 1 for the fastest to ``factor``."""
    factor, low, high = (float(parameters[name]) for name in ("factor", "low_freq_factor", "high_freq_factor"))
    turns = parameters["original_max_position_embeddings"] / _wavelengths(float(parameters["rope_theta"]), head_dim)
    smooth = (turns - low) / (high - low)
    between = 1 / ((1 - smooth) / factor + smooth)
    return np.where(turns > high, 1.0, np.where(turns < low, factor, between)).astype(np.float32)


def _wavelengths(base: float, head_dim: int) -> np.ndarray[Any, Any]:
    """Tokens to a full turn of each pair, (head_dim / 2,)."""
    return 2 * math.pi * base ** (np.arange(0, head_dim, 2) / head_dim)


def _llama3(frequencies: np.ndarray[Any, Any], base: float, context: int) -> dict[str, Any]:
    """Parameters that give these factors. Between its corners 1 / factor is a straight line in turns per context."""
    head_dim = 2 * len(frequencies)
    factor = _rounded(float(frequencies.max()))
    waves, inverse = _wavelengths(base, head_dim), 1 / frequencies.astype(np.float64)
    inside = (frequencies > 1) & (frequencies < frequencies.max())
    for low, high, original in _corners(waves, inverse, inside, factor, context):
        found = {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": low,
            "high_freq_factor": high,
            "original_max_position_embeddings": original,
        }
        again = llama3_factors(found | {"rope_theta": base}, head_dim=head_dim)
        if np.allclose(again, frequencies, rtol=TOLERANCE, atol=0):
            return found
    raise CheckpointError(
        f"{FREQUENCIES} holds factors from {frequencies.min():g} to {frequencies.max():g} that are not Llama 3.1's scaling; "
        "start from the model's Hugging Face folder"
    )


def _corners(waves: Any, inverse: Any, inside: Any, factor: float, context: int) -> Any:
    """Candidates for (low, high, original): the published corners first, then those of the line through the factors inside.

    Only ratios matter: (2, 6, 100) is (1, 3, 50), so the smallest whole numbers are taken that describe the line.
    """
    if factor <= 1:
        return
    smooth = (inverse - 1 / factor) / (1 - 1 / factor)
    if inside.sum() >= 2:
        slope, offset = np.polyfit(1 / waves[inside], smooth[inside], 1)
        if slope > 0 > offset:
            for low in (1.0, 2.0, 3.0, 4.0, 0.5, 1.5, 8.0):
                high = _rounded(low - low / offset)
                yield low, high, round(slope * (high - low))
        return
    if inside.sum() == 1:  # one point on the line: the corners of all published models
        wave, share = float(waves[inside][0]), float(smooth[inside][0])
        yield 1.0, 4.0, round((1.0 + 3.0 * share) * wave)
        for original in range(math.ceil(wave) + 1, math.ceil(4 * wave)):  # or any others that the neighbours allow
            yield 1.0, 1.0 + (original / wave - 1.0) / share, original
        return
    # None inside: any corners between the last factor of 1 and the first of all do.
    ones, rest = waves[inverse == 1], waves[inverse < 1]
    least = float(ones.max()) if len(ones) else 0.0
    for original in sorted({context, *(2**power for power in range(4, 24))}):
        for high in (4.0, 2.0, 1.25):
            if original / high > least and original < float(rest.min()):
                yield 1.0, high, original


def _longrope(factors: Mapping[str, Any], original: int, attention: float) -> dict[str, Any]:
    missing = [name for name in (LONG, SHORT) if name not in factors]
    if missing or FREQUENCIES in factors:
        raise CheckpointError(f"rope.scaling.type is longrope, which needs {LONG} and {SHORT}, and no {FREQUENCIES}")
    return {
        "rope_type": "longrope",
        "long_factor": factors[LONG].tolist(),
        "short_factor": factors[SHORT].tolist(),
        "original_max_position_embeddings": original,
        "attention_factor": attention,
    }


def _check_yarn_extras(value: Values) -> None:
    """Keys that llama.cpp reads for other families only: nobody can say what they mean here, unless they change nothing."""
    neutral = {"ext_factor": (1.0, -1.0), "attn_factor": (1.0,), "log_multiplier": (0.0,)}
    neutral |= {"beta_fast": (BETA_FAST,), "beta_slow": (BETA_SLOW,)}
    for name, plain in neutral.items():
        key = f"rope.scaling.yarn_{name}"
        if (found := value(key, plain[0])) not in plain:
            raise CheckpointError(f"{key} is {shown(found)}; only {plain[0]:g} is read")
    for key in ("rope.scaling.alpha", "rope.freq_base_swa", "rope.dimension_sections"):
        if value(key, None):
            raise CheckpointError(f"{key} is {shown(value(key, None))}, which is not read for this architecture")
    value("rope.scaling.finetuned", None)  # says how the model came about, not what it computes


def _is_plain_yarn(parameters: Mapping[str, Any]) -> bool:
    odd = parameters.get("mscale") or parameters.get("mscale_all_dim") or parameters.get("truncate", True) is not True
    betas = (parameters.get("beta_fast") or BETA_FAST, parameters.get("beta_slow") or BETA_SLOW)
    return not odd and betas == (BETA_FAST, BETA_SLOW)


def _yarn_attention(factor: float) -> float:
    """By how much YaRN lengthens queries and keys."""
    return 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0


def _positive(value: Values, key: str, default: float) -> float:
    found = value(key, default)
    if isinstance(found, bool) or not isinstance(found, (int, float)) or not 0 <= found < math.inf:
        raise CheckpointError(f"{key} is {shown(found)}, which is no positive number")
    return float(found)


def _rounded(number: float) -> float:
    """To the shortest decimal that float32 cannot tell apart: what was in a config."""
    candidates = (float(f"{number:.{digits}g}") for digits in itertools.count(1))
    return next(short for short in candidates if math.isclose(short, number, rel_tol=1e-5))
