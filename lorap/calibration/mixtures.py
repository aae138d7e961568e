"""Several sources with weights, and how many windows each of them gives.

A mixture is a list of sources, each alone (weight 1) or as a pair (source, weight). ``default`` stands for the texts that ship
with lorap, in equal parts, and as many windows again that the model writes itself.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from fractions import Fraction
from numbers import Real
from pathlib import Path
from typing import Any, Union

from torch import Tensor

from lorap.calibration.sources import (
    DEFAULT_CALIBRATION,
    OWN_SAMPLES,
    Source,
    check_source,
    shipped_texts,
    source_name,
)
from lorap.errors import CalibrationError

# One source, or a list of sources and of pairs (source, weight).
Sources = Union[Source, Sequence[Union[Source, tuple[Source, float]]]]


def parse_source(text: str) -> Source | tuple[Source, float]:
    """``NAME=WEIGHT``, as it is written on a command line, as a pair; ``NAME``, and any file that exists, as it is."""
    name, _, weight = text.rpartition("=")
    if not name or os.path.exists(text):
        return text
    try:
        return name, float(weight)
    except ValueError:
        return text


def check_sources(*mixtures: Sources) -> None:
    """Make sure that every source can be opened, before a model is; pipes are read now, and kept.

    Raises:
        CalibrationError: a file or text is not there or of a kind that lorap does not read, or a weight is not above 0.
    """
    for sources in mixtures:
        for source, _ in _pairs(sources):
            check_source(source)


def mixture_name(sources: Sources) -> str:
    """The names of the sources as they were given, for reports."""
    return ", ".join(source_name(source) for source, _ in _pairs(sources))


def weighted_sources(sources: Sources, *, own_samples: bool = False) -> list[tuple[Source, float]]:
    """Each source once, with its weight: ``default`` becomes its parts, and a name given twice adds up.

    Half of ``default`` is ``self`` where ``own_samples`` says that a model is there to write it; else the texts are all.

    A text in two parts of a mixture would be drawn from twice, and would be judged on itself where statistics of some
    sources are judged on others.

    Raises:
        CalibrationError: there is no source, something is no source, or a weight is not a number above 0.
    """
    weights: dict[Any, float] = {}
    found: dict[Any, Source] = {}
    for source, weight in _pairs(sources):
        parts: list[Source] = [source]
        if isinstance(source, (str, Path)) and str(source) == DEFAULT_CALIBRATION:
            texts = list(shipped_texts())
            # As often as there are texts: half of the weight.
            parts = [*texts, *[OWN_SAMPLES] * (len(texts) if own_samples else 0)]
        for part in parts:
            key = str(part) if isinstance(part, (str, Path)) else id(part)
            found.setdefault(key, part)
            weights[key] = weights.get(key, 0.0) + weight / len(parts)
    return [(found[key], weights[key]) for key in found]


def split_by_weight(total: int, weights: Sequence[float]) -> list[int]:
    """``total`` windows over sources, by largest remainders; each gets at least one where ``total`` allows.

    Whoever's share is below one window gets one, and the others divide the rest by their weights. Fewer windows than sources
    go to the heaviest, one each. Earlier sources win ties.
    """
    exact = [Fraction(float(weight)) for weight in weights]
    heaviest_first = sorted(range(len(exact)), key=lambda index: (-exact[index], index))
    if total <= len(exact):
        return [int(index in heaviest_first[:total]) for index in range(len(exact))]
    sharing = list(range(len(exact)))
    while True:
        rest = total - (len(exact) - len(sharing))
        weight = sum(exact[index] for index in sharing)
        quotas = {index: rest * exact[index] / weight for index in sharing}
        large = [index for index in sharing if quotas[index] >= 1]
        if len(large) == len(sharing):
            break
        sharing = large
    shares = [math.floor(quotas.get(index, 1)) for index in range(len(exact))]
    by_remainder = sorted(sharing, key=lambda index: (shares[index] - quotas[index], index))
    for index in by_remainder[: total - sum(shares)]:
        shares[index] += 1
    return shares


def _pairs(sources: Sources) -> list[tuple[Source, float]]:
    entries: Sequence[Any] = sources if isinstance(sources, (list, tuple)) else [sources]
    if not entries:
        raise CalibrationError(
            "the list of calibration sources is empty; give one, or leave it out for the default texts"
        )
    pairs = [entry if isinstance(entry, tuple) and len(entry) == 2 else (entry, 1.0) for entry in entries]
    for source, weight in pairs:
        if not isinstance(source, (str, Path, Tensor, Mapping)):
            raise CalibrationError(
                f"{source!r} is no calibration source; give a name, a path, tokens, or a list of them and of pairs "
                '(source, weight), such as [("wiki.txt", 2.0), "novel.txt"]'
            )
        number = isinstance(weight, Real) and not isinstance(weight, bool)
        if not number or not math.isfinite(weight) or weight <= 0:
            raise CalibrationError(
                f"the weight of {source_name(source)} is {weight!r}; it must be a number above 0 (instead of 0, leave it out)"
            )
    return [(source, float(weight)) for source, weight in pairs]
