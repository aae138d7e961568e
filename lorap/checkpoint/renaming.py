"""Stored tensors under the names that the model has for them: transformers keeps some families in files under older names.

``save_pretrained`` writes the older names, and ``from_pretrained`` knows both. lorap writes the model's own and reads both.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, TypeVar

from lorap.errors import CheckpointError
from lorap.jsonio import named

if TYPE_CHECKING:
    from transformers import PreTrainedModel

T = TypeVar("T")


def model_names(model: PreTrainedModel, stored: Iterable[str]) -> dict[str, str]:
    """The name in ``model`` of each stored tensor; where it has none, or the tensor itself would be converted, the stored one.

    Args:
        model: with or without weights.
        stored: names in its files.
    """
    own, stored = model.state_dict().keys(), list(stored)
    if all(name in own for name in stored):
        return {name: name for name in stored}
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    renamings = [one for one in get_model_conversion_mapping(model) if isinstance(one, WeightRenaming)]
    found = {}
    for name in stored:
        renamed = name
        for renaming in renamings if name not in own else ():
            renamed = renaming.rename_source_key(renamed)[0]
        found[name] = renamed if renamed in own else name
    return found


def renamed(model: PreTrainedModel, stored: Mapping[str, T]) -> dict[str, T]:
    """``stored`` by :func:`model_names`.

    Raises:
        CheckpointError: one tensor is stored under two names.
    """
    names, found = model_names(model, stored), {}
    for old, value in stored.items():
        if names[old] in found:
            first = next(name for name in names if names[name] == names[old])
            raise CheckpointError(f"{named(first)} and {named(old)} are two names of one tensor; remove one of them")
        found[names[old]] = value
    return found
