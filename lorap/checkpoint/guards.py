"""What makes a host without lorap fail on a compressed checkpoint, and says why.

Three things, each where such a host cannot help but look:

- the activation that config.json names, ``silu_needs_import_lorap``: unknown until lorap is imported, so no layer can be built;
- ``q_proj.weight`` of shape (1,), which cannot be the weight that the host looks for (lorap/nn/low_rank_tensors.py);
- a tensor ``q_proj.needs_import_lorap`` beside it, for whoever lists what was not expected.

transformers lets go of the second when told ``ignore_mismatched_sizes=True``, which its own message suggests; not of the first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers.activations import ACT2CLS, ACT2FN

from lorap.architectures import text_config
from lorap.nn.linear import LowRankLinear

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SUFFIX = "_needs_import_lorap"
# config fields of the activation, in the families of lorap.architectures; Gemma's classes pass over the second.
ACTIVATIONS = ("hidden_activation", "hidden_act")


def register_activations() -> None:
    """Teach transformers every guarded name of an activation that it has; safe to call twice."""
    ACT2FN.update({name + SUFFIX: found for name, found in ACT2CLS.items()})


def put_guards(model: PreTrainedModel, on: bool) -> None:
    """Give a model all guards in words, or take them away; what it computes stays."""
    unguard_config(model.config)
    if on:
        _name_activation(model.config, SUFFIX)
    for module in model.modules():
        if isinstance(module, LowRankLinear):
            module.put_named_guard(on)


def unguard_config(config: Any) -> None:
    """Have a config name the activation as everyone knows it."""
    _name_activation(config, "")


def activation_of(config: Any) -> str:
    """The activation that a config names, with or without a guard; empty where it names none."""
    names = (getattr(text_config(config), field, None) for field in ACTIVATIONS)
    return next((name.removesuffix(SUFFIX) for name in names if isinstance(name, str)), "")


def _name_activation(config: Any, suffix: str) -> None:
    text = text_config(config)
    field = next((field for field in ACTIVATIONS if isinstance(getattr(text, field, None), str)), None)
    if field is not None:
        setattr(text, field, activation_of(config) + suffix)
