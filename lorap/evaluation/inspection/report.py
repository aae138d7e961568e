"""What an inspection found, as data and as a table for people."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lorap.architectures import ATTENTION, MLP
from lorap.evaluation.inspection.values import LEVELS, Importance, SingularValues, random_matrix, sample_points
from lorap.reports.run import format_table

GROUPS: Mapping[str, tuple[str, ...]] = {"attention": ATTENTION, "FFN": MLP}
KINDS = ("plain", "weighted")


@dataclass(frozen=True)
class ProjectionSpectra:
    """One projection; ``spectra`` by kind, without ``weighted`` where there was no calibration."""

    layer: int
    role: str
    spectra: Mapping[str, SingularValues]


@dataclass(frozen=True)
class Inspection:
    """What :func:`inspect_model` found.

    Args:
        model: its name.
        calibration: the texts, windows and tokens that the inputs came from; None for plain spectra only.
        layers: indices of the decoder layers that were looked at, ascending.
        num_layers: how many the model has.
        projections: seven for each of ``layers``, or those that it has; those of all experts together where there are several.
        channels: of the FFN of each of ``layers``, by kind; plain ones are norms of weights alone.
    """

    model: str
    calibration: dict[str, Any] | None
    layers: tuple[int, ...]
    num_layers: int
    projections: tuple[ProjectionSpectra, ...]
    channels: Mapping[int, Mapping[str, Importance]]

    @property
    def kinds(self) -> tuple[str, ...]:
        """``plain``, and ``weighted`` where there was a calibration."""
        return KINDS if self.calibration else KINDS[:1]

    def find(
        self, kind: str, *, layer: int | None = None, roles: Sequence[str] = ATTENTION + MLP
    ) -> list[SingularValues]:
        """The spectra of some projections, in the order of layers and roles.

        Args:
            kind: ``plain`` or ``weighted``.
            layer: index of a decoder layer; None for all.
            roles: of the projections.
        """
        return [
            entry.spectra[kind] for entry in self.projections if entry.role in roles and layer in (None, entry.layer)
        ]

    def layers_with(self, role: str) -> list[int]:
        """Those of ``layers`` that have a projection of this role."""
        return [entry.layer for entry in self.projections if entry.role == role]

    def to_dict(self, *, curves: bool = True) -> dict[str, Any]:
        """Plain values for JSON; without ``curves`` no spectra and no sorted importances."""

        def each(found: Mapping[str, Any]) -> dict[str, Any]:
            return {kind: one.to_dict(curves=curves) for kind, one in found.items()}

        projections = [
            {"layer": entry.layer, "role": entry.role, "shape": entry.spectra["plain"].shape, **each(entry.spectra)}
            for entry in self.projections
        ]
        shapes = sorted({one.shape for one in self.find("plain")})
        sizes = {min(shape) for shape in shapes} | {one["plain"].channels for one in self.channels.values()}
        return {
            "model": self.model,
            "calibration": self.calibration,
            "num_layers": self.num_layers,
            "levels": LEVELS,
            "projections": projections,
            "random": [{"shape": shape, **random_matrix(shape).to_dict(curves=curves)} for shape in shapes],
            "channels": [
                {"layer": layer, "channels": found["plain"].channels, **each(found)}
                for layer, found in self.channels.items()
            ],
        } | ({"sample_points": {str(size): sample_points(size) for size in sorted(sizes)}} if curves else {})

    def shares(self, kind: str, group: str, *, layer: int | None = None) -> tuple[float, ...]:
        """For each of ``LEVELS`` the share of full rank that keeps it, mean over the projections of a group and the layers.

        Args:
            kind: ``plain`` or ``weighted``.
            group: one of ``GROUPS``.
            layer: index of a decoder layer; None for all.
        """
        return _columns(
            statistics.fmean, [one.rank_shares for one in self.find(kind, layer=layer, roles=GROUPS[group])]
        )

    def random_shares(self, group: str) -> tuple[float, ...]:
        """The same for random matrices of the shapes of a group, in all layers."""
        shapes = [one.shape for one in self.find("plain", roles=GROUPS[group])]
        return _columns(statistics.fmean, [random_matrix(shape).rank_shares for shape in shapes])

    def table(self) -> str:
        """By projection, then attention against FFN by layer, as text."""
        title = f"{self.model}, {len(self.layers)} of {self.num_layers} layers"
        if self.calibration:
            title += f", weighted by {self.calibration['tokens']:,} tokens of {self.calibration['name']}"
        levels = _percents(LEVELS)
        blocks = [
            f"{title}\nRanks that keep {levels} % of the energy, medians over layers. Random: a Gaussian matrix of that shape.",
            *(self._role_table(kind) for kind in self.kinds),
            f"Rank that keeps {levels} % of the energy, in % of full rank, mean of the projections\n{self._layer_table()}",
            "\n".join(self.summary(kind) for kind in self.kinds),
        ]
        return "\n\n".join(blocks)

    def summary(self, kind: str) -> str:
        """Attention against FFN, in a sentence."""
        attention, ffn = (f"{self.shares(kind, group)[0]:.0%}" for group in GROUPS)
        sentence = (
            f"{kind}: {LEVELS[0]:.0%} of the energy takes {attention} of full rank in attention and {ffn} in the FFN"
        )
        if kind == "plain":
            attention, ffn = (f"{self.random_shares(group)[0]:.0%}" for group in GROUPS)
            sentence += f"; random matrices of these shapes take {attention} and {ffn}"
        return sentence

    def _role_table(self, kind: str) -> str:
        header = [kind, "shape", "rank", "% of full", "% of parameters", "effective rank", "% of full"]
        beside = ["random, % of full", "random, effective"] if kind == "plain" else []
        rows = []
        for role in filter(self.layers_with, ATTENTION + MLP):
            found = self.find(kind, roles=[role])
            random = [random_matrix(one.shape) for one in found]
            row = [
                role,
                ", ".join("{} x {}".format(*shape) for shape in dict.fromkeys(one.shape for one in found)),
                " / ".join(f"{rank:.0f}" for rank in _columns(statistics.median, [one.ranks for one in found])),
                _percents(_columns(statistics.median, [one.rank_shares for one in found])),
                _percents(_columns(statistics.median, [one.parameter_shares for one in found])),
                f"{statistics.median(one.effective_rank for one in found):.0f}",
                _percents([statistics.median(one.effective_share for one in found)]),
            ]
            shares = _columns(statistics.median, [one.rank_shares for one in random])
            effective = statistics.median(one.effective_share for one in random)
            rows.append(row + [_percents(shares), _percents([effective])][: len(beside)])
        return format_table(header + beside, rows)

    def _layer_table(self) -> str:
        columns = [(kind, group) for kind in self.kinds for group in GROUPS]
        rows = [
            [str(layer), *(_percents(self.shares(kind, group, layer=layer)) for kind, group in columns)]
            for layer in self.layers
        ]
        return format_table(["layer", *(f"{group}, {kind}" for kind, group in columns)], rows)


def _columns(middle: Callable[[Sequence[float]], float], rows: Sequence[Sequence[float]]) -> tuple[float, ...]:
    """Mean or median of every column."""
    return tuple(middle(column) for column in zip(*rows, strict=True))


def _percents(shares: Sequence[float]) -> str:
    """``52 / 61 / 77`` for 0.52, 0.61, 0.77."""
    return " / ".join(f"{100 * share:.0f}" for share in shares)
