"""What ``lorap profile`` found: times of stages and kernels, rates, and their tables."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from lorap.reports.run import format_table

PHASES = ("prefill", "decode")
# How the table calls steps in one call.
STEPS = {"layer": "one layer in one call", "dense_layer": "  the same, dense"}


@dataclass(frozen=True)
class KernelTime:
    """One operator or GPU kernel in a prefill, or in one decode step on average.

    Args:
        name: as the profiler has it.
        seconds: in itself, not in what it called.
        share: of the seconds of all kernels in that phase.
        calls: how many.
    """

    name: str
    seconds: float
    share: float
    calls: float


@dataclass(frozen=True)
class PhaseTime:
    """Seconds of one prefill, or of one decode step on average.

    Args:
        total: of the whole forward.
        layers: of each decoder layer.
        attention: of each layer's attention, part of ``layers``.
        mlp: of each layer's FFN, part of ``layers``.
        head: of the output head.
    """

    total: float
    layers: list[float]
    attention: list[float]
    mlp: list[float]
    head: float


@dataclass(frozen=True)
class StepTime:
    """A decoder layer's step for one token in one call, on average over layers.

    Args:
        seconds: that it takes.
        weight_bytes: that it reads.
    """

    seconds: float
    weight_bytes: float


@dataclass(frozen=True)
class Profile:
    """What :func:`profile_model` found.

    Args:
        device: that did the work, ``cpu`` or ``cuda``.
        tokens: of the prefill.
        new_tokens: decode steps.
        phases: ``prefill`` and ``decode``.
        kernels: of each phase, operators of a CPU or kernels of a GPU, the longest first.
        weight_bytes: of the weights that one forward reads: ``layers``, of them ``attention`` and ``mlp``, and ``head``.
        steps: in one call, of a ``layer`` and of a ``dense_layer``; empty where layers have none (:mod:`lorap.nn.decoder_layer`).
    """

    device: str
    tokens: int
    new_tokens: int
    phases: dict[str, PhaseTime]
    kernels: dict[str, list[KernelTime]]
    weight_bytes: dict[str, int]
    steps: dict[str, StepTime] = field(default_factory=dict)

    def busy(self, phase: str) -> float:
        """Time in kernels over time that passed; low on a GPU that waits for launches."""
        return sum(kernel.seconds for kernel in self.kernels[phase]) / self.phases[phase].total

    def bandwidth(self, phase: str) -> float:
        """Bytes of weights that one forward reads, over the seconds that it takes; reading them once is the least work."""
        return (self.weight_bytes["layers"] + self.weight_bytes["head"]) / self.phases[phase].total

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; ``bytes_per_second`` is :meth:`bandwidth`."""
        return asdict(self) | {"bytes_per_second": {phase: self.bandwidth(phase) for phase in self.phases}}

    def table(self, *, top: int = 15) -> str:
        """The stages, then the ``top`` kernels of each phase, as text."""
        return "\n\n".join([self._stage_table(), *(self._kernel_table(phase, top) for phase in self.phases)])

    def _stage_table(self) -> str:
        columns = {phase: _stage_seconds(times) for phase, times in self.phases.items()}
        read = {
            "decoder layers": self.weight_bytes["layers"],
            "  attention": self.weight_bytes["attention"],
            "  mlp": self.weight_bytes["mlp"],
            "head": self.weight_bytes["head"],
            "whole forward": self.weight_bytes["layers"] + self.weight_bytes["head"],
        }
        rows = []
        for stage in next(iter(columns.values())):
            row = [stage, f"{read[stage] / 1e6:,.1f}" if stage in read else ""]
            for stages in columns.values():
                row += [f"{1e3 * stages[stage]:,.3f}", f"{stages[stage] / stages['whole forward']:.1%}"]
                row.append(f"{read[stage] / stages[stage] / 1e9:,.2f}" if stage in read else "")
            rows.append(row)
        for name, step in self.steps.items():
            rate = step.weight_bytes / step.seconds / 1e9
            row = [STEPS[name], f"{step.weight_bytes / 1e6:,.1f}", *("",) * 3]
            rows.append([*row, f"{1e3 * step.seconds:,.3f}", "", f"{rate:,.2f}"])
        phases = (f"prefill of {self.tokens}, ms", "decode 1 token, ms")
        header = ["stage", "weights, MB", *(name for phase in phases for name in (phase, "share", "GB/s"))]
        lines = [format_table(header, rows)]
        decode = self.phases["decode"]
        slowest = max(range(len(decode.layers)), key=decode.layers.__getitem__)
        median = sorted(decode.layers)[len(decode.layers) // 2]
        lines.append(
            f"slowest layer in decoding: {slowest}, {decode.layers[slowest] / (median or 1):.2f} times the median"
        )
        if self.device == "cuda":
            busy = " and ".join(f"{self.busy(phase):.0%} of {phase}" for phase in self.phases)
            lines.append(f"the GPU computes {busy}; the rest is waiting, mostly for launches")
        return "\n".join(lines)

    def _kernel_table(self, phase: str, top: int) -> str:
        rows = [
            [kernel.name[:70], f"{1e3 * kernel.seconds:,.3f}", f"{kernel.share:.1%}", f"{kernel.calls:,g}"]
            for kernel in self.kernels[phase][:top]
        ]
        title = "GPU kernel" if self.device == "cuda" else "operator"
        of = f"a prefill of {self.tokens} tokens" if phase == "prefill" else "one decode step"
        rate = f"{self.bandwidth(phase) / 1e9:,.2f} GB/s of weights"
        return f"{of}: {rate}\n" + format_table([title, "self, ms", "share", "calls"], rows)


def _stage_seconds(times: PhaseTime) -> dict[str, float]:
    layers, attention, mlp = sum(times.layers), sum(times.attention), sum(times.mlp)
    return {
        "decoder layers": layers,
        "  attention": attention,
        "  mlp": mlp,
        "  norms, residuals": layers - attention - mlp,
        "head": times.head,
        "embedding, rotary, cache": times.total - layers - times.head,
        "whole forward": times.total,
    }
