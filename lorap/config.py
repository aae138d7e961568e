"""What to do to a model, as one frozen object.

A recipe is nothing but a named set of defaults for :class:`CompressionConfig`, so every choice that a recipe makes can be
read in one place and replaced by hand.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from types import MappingProxyType
from typing import Any

from lorap.errors import ConfigError

SUBLAYERS = ("self_attn", "mlp")
ATTENTION_METHODS = ("awsvd", "svd", "afm")
MLP_METHODS = ("prune", "factorize")

# The paper, exactly (arXiv 2404.09695, sections 3 and 4).
RECIPES: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "lorap": MappingProxyType(
            {
                "sublayers": SUBLAYERS,
                "attention_method": "awsvd",
                "mlp_method": "prune",
                "vo_to_qk_ratio": 3.0,
                "least_important_kept": 0.01,
            }
        ),
    }
)


@dataclass(frozen=True, kw_only=True)
class CompressionConfig:
    """Options of one compression run.

    Args:
        recipe: name of the recipe these options started from; kept for the record.
        sparsity: fraction of the parameters of the compressed sub-layers to remove, in [0, 1).
        sublayers: which of ``self_attn`` and ``mlp`` to compress.
        attention_method: ``awsvd`` weights the SVD with the norms of the input channels (the paper), ``svd`` is the plain
            truncated SVD, ``afm`` projects onto the principal components of the outputs.
        mlp_method: ``prune`` removes whole FFN channels (the paper), ``factorize`` makes the three FFN matrices low-rank.
        vo_to_qk_ratio: parameters given to {v, o} for each one given to {q, k}; the paper uses 3.
        least_important_kept: fraction of FFN channels, those of least importance, that stay; the paper keeps 1 %.
        num_calibration_samples: how many token windows the statistics come from.
        calibration_seq_len: tokens in each window.
        seed: which windows are drawn.

    Raises:
        ConfigError: a value is out of range.
    """

    recipe: str = "lorap"
    sparsity: float = 0.2
    sublayers: tuple[str, ...] = SUBLAYERS
    attention_method: str = "awsvd"
    mlp_method: str = "prune"
    vo_to_qk_ratio: float = 3.0
    least_important_kept: float = 0.01
    num_calibration_samples: int = 128
    calibration_seq_len: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        names = self.sublayers
        object.__setattr__(self, "sublayers", (names,) if isinstance(names, str) else tuple(names))
        _check(self.recipe in RECIPES, f"unknown recipe {self.recipe!r}; known: {', '.join(RECIPES)}")
        _check(
            _is_number(self.sparsity) and 0 <= self.sparsity < 1,
            f"sparsity is {self.sparsity}; it is the fraction of parameters to remove and must lie in [0, 1), "
            "so 0.2 removes 20 %",
        )
        unknown = [name for name in self.sublayers if name not in SUBLAYERS]
        _check(not unknown, f"unknown sub-layer {unknown}; choose from {', '.join(SUBLAYERS)}")
        _check(bool(self.sublayers), f"no sub-layer to compress; choose from {', '.join(SUBLAYERS)}")
        _check(
            self.attention_method in ATTENTION_METHODS,
            f"unknown attention method {self.attention_method!r}; choose from {', '.join(ATTENTION_METHODS)}",
        )
        _check(
            self.mlp_method in MLP_METHODS,
            f"unknown mlp method {self.mlp_method!r}; choose from {', '.join(MLP_METHODS)}",
        )
        _check(
            _is_number(self.vo_to_qk_ratio) and self.vo_to_qk_ratio > 0,
            f"vo_to_qk_ratio is {self.vo_to_qk_ratio}; it must be above 0 (the paper uses 3)",
        )
        _check(
            _is_number(self.least_important_kept) and 0 <= self.least_important_kept < 1,
            f"least_important_kept is {self.least_important_kept}; it must lie in [0, 1) (the paper uses 0.01)",
        )
        for name, least in (("num_calibration_samples", 1), ("calibration_seq_len", 2)):
            value = getattr(self, name)
            _check(type(value) is int and value >= least, f"{name} is {value}; it must be a whole number >= {least}")
        _check(
            type(self.seed) is int and 0 <= self.seed < 2**63, f"seed is {self.seed}; it must be a whole number >= 0"
        )

    @classmethod
    def from_recipe(cls, recipe: str, **overrides: Any) -> CompressionConfig:
        """The named recipe, with single options replaced. Options that are None keep the recipe's value."""
        _check(recipe in RECIPES, f"unknown recipe {recipe!r}; known: {', '.join(RECIPES)}")
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(overrides) - known)
        _check(not unknown, f"unknown option {', '.join(unknown)}; known: {', '.join(sorted(known))}")
        chosen = {name: value for name, value in overrides.items() if value is not None}
        return cls(recipe=recipe, **{**RECIPES[recipe], **chosen})

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), "sublayers": list(self.sublayers)}


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
