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

from lorap.nn.linear import LowRankLinear

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SUFFIX = "_needs_import_lorap"
# config field of the activation, in all families of lorap.architectures.
ACTIVATION = "hidden_act"


def register_activations() -> None:
    """Teach transformers every guarded name of an activation that it has; safe to call twice."""
    ACT2FN.update({name + SUFFIX: found for name, found in ACT2CLS.items()})


def put_guards(model: PreTrainedModel, on: bool) -> None:
    """Give a model all guards in words, or take them away; what it computes stays."""
    unguard_config(model.config)
    if on and (name := activation_of(model.config)):
        setattr(model.config, ACTIVATION, name + SUFFIX)
    for module in model.modules():
        if isinstance(module, LowRankLinear):
            module.put_named_guard(on)


def unguard_config(config: Any) -> None:
    """Have a config name the activation as everyone knows it."""
    if name := activation_of(config):
        setattr(config, ACTIVATION, name)


def activation_of(config: Any) -> str:
    """The activation that a config names, with or without a guard; empty where it names none."""
    name = getattr(config, ACTIVATION, None)
    return name.removesuffix(SUFFIX) if isinstance(name, str) else ""
