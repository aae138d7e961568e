"""Where the time of a model goes: stages and kernels of a prefill and of decoding.

Ranges are put around the forward of every decoder layer, its attention and its FFN, and around the output head, inside one
range for the prefill and one for each decode step::

    prefill | decode > layer.3 > layer.3.attention, layer.3.mlp
                     > head

The work runs twice. First it is timed by the ranges themselves, with no profiler to slow it down, on the clock of the device
that works: on a GPU by events in its queue, so that waiting for launches counts. Then torch.profiler finds the kernels and
writes the trace, which shows the same ranges. On a GPU they are NVTX ranges too; Nsight and torch.profiler cannot both listen
to one process, hence :func:`run_ranges`, which only marks.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from lorap.architectures import ARCHITECTURES
from lorap.errors import ArchitectureError
from lorap.report import format_table

PHASES = ("prefill", "decode")
PARTS = ("attention", "mlp")


@dataclass(frozen=True)
class KernelTime:
    """One operator or GPU kernel: seconds in itself, not in what it called, and its share of all of them."""

    name: str
    seconds: float
    share: float
    calls: int


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
class Profile:
    """What :func:`profile_model` found.

    Args:
        device: that did the work, ``cpu`` or ``cuda``.
        tokens: of the prefill.
        new_tokens: decode steps.
        phases: ``prefill`` and ``decode``.
        kernels: operators of a CPU or kernels of a GPU, over the prefill and all decode steps, the longest first.
    """

    device: str
    tokens: int
    new_tokens: int
    phases: dict[str, PhaseTime]
    kernels: list[KernelTime]

    @property
    def busy(self) -> float:
        """Time in kernels over time that passed; low on a GPU that waits for launches."""
        passed = self.phases["prefill"].total + self.new_tokens * self.phases["decode"].total
        return sum(kernel.seconds for kernel in self.kernels) / passed

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    def table(self, *, top: int = 15) -> str:
        """The stages, then the ``top`` kernels, as text."""
        return f"{self._stage_table()}\n\n{self._kernel_table(top)}"

    def _stage_table(self) -> str:
        columns = {phase: _stage_seconds(times) for phase, times in self.phases.items()}
        rows = []
        for stage in next(iter(columns.values())):
            row = [stage]
            for stages in columns.values():
                row += [f"{1e3 * stages[stage]:,.3f}", f"{stages[stage] / stages['whole forward']:.1%}"]
            rows.append(row)
        header = ["stage", f"prefill of {self.tokens}, ms", "share", "decode 1 token, ms", "share"]
        lines = [format_table(header, rows)]
        decode = self.phases["decode"]
        slowest = max(range(len(decode.layers)), key=decode.layers.__getitem__)
        median = sorted(decode.layers)[len(decode.layers) // 2]
        lines.append(
            f"slowest layer in decoding: {slowest}, {decode.layers[slowest] / (median or 1):.2f} times the median"
        )
        if self.device == "cuda":
            lines.append(f"the GPU computes {self.busy:.0%} of the time; the rest is waiting, mostly for launches")
        return "\n".join(lines)

    def _kernel_table(self, top: int) -> str:
        rows = [
            [kernel.name[:70], f"{1e3 * kernel.seconds:,.3f}", f"{kernel.share:.1%}", f"{kernel.calls:,}"]
            for kernel in self.kernels[:top]
        ]
        title = "GPU kernel" if self.device == "cuda" else "operator"
        return format_table([title, "self, ms", "share", "calls"], rows)


def profile_model(model: Any, *, tokens: int = 128, new_tokens: int = 16, trace: Path | None = None) -> Profile:
    """Profile a prefill of ``tokens`` and ``new_tokens`` decode steps, after a warm-up; ``trace`` is a Chrome trace to write.

    Raises:
        ArchitectureError: the model's family is unknown, so its layers cannot be found.
    """
    phases = run_ranges(model, tokens=tokens, new_tokens=new_tokens)
    device = model.device.type
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    with torch.inference_mode(), _Ranges(model) as ranges, profile(activities=activities) as profiler:
        _run(model, tokens, new_tokens, ranges)
    if trace is not None:
        profiler.export_chrome_trace(str(trace))
    return Profile(device, tokens, new_tokens, phases, _kernels(profiler.events(), device))


def run_ranges(model: Any, *, tokens: int = 128, new_tokens: int = 16) -> dict[str, PhaseTime]:
    """The times of the stages, without torch.profiler; what to run under ``nsys`` or ``ncu``."""
    ranges = _Ranges(model)
    with torch.inference_mode():
        _run(model, tokens, 2, None)
        with ranges:
            _run(model, tokens, new_tokens, ranges)
    return ranges.phases(len(_decoder_layers(model)))


def deeper(command: Sequence[str]) -> str:
    """How to go on with NVIDIA's profilers, as commands to copy; ``command`` is the lorap command to look at."""
    line = shlex.join([*command, "--ranges-only"])
    return (
        "To go deeper on a GPU, where the ranges above are NVTX ranges:\n"
        f"  nsys profile --trace=cuda,nvtx,cublas --force-overwrite=true --output=lorap {line}\n"
        f"  ncu --nvtx --nvtx-include decode/ --launch-count 50 --set full --force-overwrite --export lorap {line}"
    )


def _run(model: Any, tokens: int, new_tokens: int, ranges: _Ranges | None) -> None:
    """Prefill and greedy decoding. The time does not depend on which tokens, so they are drawn."""
    vocab_size = model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0)).to(model.device)
    cache = None
    for step in range(1 + new_tokens):
        with ranges.phase(PHASES[step > 0]) if ranges else nullcontext():
            output = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            ids, cache = output.logits[:, -1:].argmax(-1), output.past_key_values
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)


class _Ranges:
    """Marks and times the stages by hooks, which are there inside the ``with`` block only."""

    def __init__(self, model: Any) -> None:
        self.device = model.device
        self._current = ""
        self._found: list[tuple[str, str, Any, Any]] = []  # phase, stage, start, end
        self._hooks = ExitStack()
        self._modules: dict[str, nn.Module] = {"head": model.get_output_embeddings()}
        layers: Any = _decoder_layers(model)
        for index, layer in enumerate(layers):
            self._modules |= {f"layer.{index}": layer}
            self._modules |= {f"layer.{index}.attention": layer.self_attn, f"layer.{index}.mlp": layer.mlp}

    def __enter__(self) -> _Ranges:
        for name, module in self._modules.items():
            self._mark_calls(name, module)
        return self

    def __exit__(self, *_: object) -> None:
        self._hooks.close()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """A prefill or one decode step, with the stages inside."""
        self._current = name
        with self._range(name):
            yield

    @contextmanager
    def _range(self, name: str) -> Iterator[None]:
        nvtx: Any = torch.cuda.nvtx.range(name) if self.device.type == "cuda" else nullcontext()
        with record_function(name), nvtx:
            start = self._now()
            yield
            self._found.append((self._current, name, start, self._now()))

    def _mark_calls(self, name: str, module: Any) -> None:
        opened: list[Any] = []

        def before(_module: nn.Module, _inputs: Any) -> None:
            opened.append(self._range(name))
            opened[-1].__enter__()

        def after(_module: nn.Module, _inputs: Any, _output: Any) -> None:
            opened.pop().__exit__(None, None, None)

        self._hooks.callback(module.register_forward_pre_hook(before).remove)
        self._hooks.callback(module.register_forward_hook(after).remove)

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def phases(self, num_layers: int) -> dict[str, PhaseTime]:
        """Mean seconds of each stage in a prefill and in a decode step."""
        seconds: dict[tuple[str, str], float] = {}
        for phase, stage, start, end in self._found:
            passed = end - start if self.device.type != "cuda" else start.elapsed_time(end) / 1e3
            seconds[phase, stage] = seconds.get((phase, stage), 0.0) + passed

        def times(phase: str) -> PhaseTime:
            steps = sum(found[:2] == (phase, phase) for found in self._found)

            def mean(stage: str) -> float:
                return seconds[phase, stage] / steps

            def each(suffix: str) -> list[float]:
                return [mean(f"layer.{index}{suffix}") for index in range(num_layers)]

            return PhaseTime(mean(phase), each(""), each(".attention"), each(".mlp"), mean("head"))

        return {phase: times(phase) for phase in PHASES}


def _decoder_layers(model: Any) -> nn.ModuleList:
    architecture = ARCHITECTURES.get(getattr(model.config, "model_type", ""))
    if architecture is None:
        known = ", ".join(ARCHITECTURES)
        raise ArchitectureError(f"cannot find the layers of model type {model.config.model_type!r}; known: {known}")
    return architecture.decoder_layers(model)


def _kernels(events: Any, device: str) -> list[KernelTime]:
    """Operators by the time in themselves on a CPU, kernels on a GPU; the ranges are neither."""
    seconds, calls = dict[str, float](), dict[str, int]()
    for event in events:
        on_gpu = event.device_type != torch.autograd.DeviceType.CPU
        if on_gpu != (device == "cuda") or event.name in (*PHASES, "head") or event.name.startswith("layer."):
            continue
        passed = event.time_range.elapsed_us() if on_gpu else event.self_cpu_time_total
        seconds[event.name] = seconds.get(event.name, 0.0) + passed / 1e6
        calls[event.name] = calls.get(event.name, 0) + 1
    total = sum(seconds.values()) or 1.0
    names = sorted(seconds, key=lambda name: -seconds[name])
    return [KernelTime(name, seconds[name], seconds[name] / total, calls[name]) for name in names]


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
