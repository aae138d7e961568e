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

import os
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from lorap.architectures import Architecture, cache_argument, known_architecture
from lorap.evaluation.layer_steps import time_steps, weight_bytes
from lorap.evaluation.profile_results import PHASES, KernelTime, PhaseTime, Profile
from lorap.nn.linear import embedding_weight

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def profile_model(
    model: PreTrainedModel, *, tokens: int = 128, new_tokens: int = 16, trace: Path | None = None
) -> Profile:
    """Profile a prefill and the decode steps after it, after a warm-up.

    Args:
        model: of a family that lorap knows.
        tokens: of the prompt.
        new_tokens: decoded one by one.
        trace: file for a Chrome trace; None for none.

    Raises:
        ArchitectureError: the model's family is unknown, so its layers cannot be found.
    """
    phases = run_ranges(model, tokens=tokens, new_tokens=new_tokens)
    device = model.device.type
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    profiler = profile(activities=activities)
    with torch.inference_mode(), _Ranges(model) as ranges:
        with _without_marks():
            profiler.start()
        _run(model, tokens, new_tokens, ranges)
        with _without_marks():
            profiler.stop()
    if trace is not None:
        profiler.export_chrome_trace(str(trace))
    kernels = _kernels(profiler.events(), device, new_tokens)
    steps = time_steps(model, _architecture(model), tokens=tokens, new_tokens=new_tokens)
    return Profile(device, tokens, new_tokens, phases, kernels, _weight_bytes(model), steps)


def run_ranges(model: PreTrainedModel, *, tokens: int = 128, new_tokens: int = 16) -> dict[str, PhaseTime]:
    """The times of the stages, without torch.profiler; what to run under ``nsys`` or ``ncu``.

    Args:
        model: of a family that lorap knows.
        tokens: of the prompt.
        new_tokens: decoded one by one.

    Raises:
        ArchitectureError: the model's family is unknown, so its layers cannot be found.
    """
    ranges = _Ranges(model)
    with torch.inference_mode():
        _run(model, tokens, 2, None)
        with ranges:
            _run(model, tokens, new_tokens, ranges)
    return ranges.phases(len(_architecture(model).decoder_layers(model)))


def deeper(command: Sequence[str]) -> str:
    """How to go on with NVIDIA's profilers, as commands to copy; ``command`` is the lorap command to look at."""
    line = shlex.join([*command, "--ranges-only"])
    return (
        "To go deeper on a GPU, where the ranges above are NVTX ranges:\n"
        f"  nsys profile --trace=cuda,nvtx,cublas --force-overwrite=true --output=lorap {line}\n"
        f"  ncu --nvtx --nvtx-include decode/ --launch-count 50 --set full --force-overwrite --export lorap {line}"
    )


def _run(model: PreTrainedModel, tokens: int, new_tokens: int, ranges: _Ranges | None) -> None:
    """Prefill and greedy decoding. The time does not depend on which tokens, so they are drawn."""
    vocab_size = len(embedding_weight(model))
    ids = torch.randint(vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0)).to(model.device)
    cache, name = None, cache_argument(model)
    for step in range(1 + new_tokens):
        if step == 1 and model.device.type == "cuda":
            torch.cuda.synchronize(model.device)  # what the prefill launched ends before decoding begins
        with ranges.phase(PHASES[step > 0]) if ranges else nullcontext():
            output = model(input_ids=ids, use_cache=True, logits_to_keep=1, **{name: cache})
            ids, cache = output.logits[:, -1:].argmax(-1), output[name]
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)


@contextmanager
def _without_marks() -> Iterator[None]:
    """Drop the lines with "USDT:" that torch's profiler writes to file descriptor 2 at its start and end; all others come later.

    KINETO_LOG_LEVEL would drop errors with them, and is read before anything of lorap runs.
    """
    if sys.stderr is None:  # file descriptor 2 is closed, or no terminal was there at all
        yield
        return
    sys.stderr.flush()
    with tempfile.TemporaryFile() as said:
        stderr = os.dup(2)
        os.dup2(said.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
            said.seek(0)
            for line in said:
                if b"USDT:" not in line:
                    os.write(2, line)


class _Ranges:
    """Marks and times the stages by hooks, which are there inside the ``with`` block only."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.device = model.device
        self._current = ""
        self._found: list[tuple[str, str, Any, Any]] = []  # phase, stage, start, end
        self._hooks = ExitStack()
        self._modules: dict[str, nn.Module] = {"head": model.get_output_embeddings()}
        architecture = _architecture(model)
        for index, layer in enumerate(architecture.decoder_layers(model)):
            self._modules |= {
                f"layer.{index}": layer,
                f"layer.{index}.attention": architecture.attention_of(layer),
                f"layer.{index}.mlp": layer.get_submodule(architecture.mlp),
            }

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


def _architecture(model: PreTrainedModel) -> Architecture:
    return known_architecture(model, to="find the layers of", experts=True)


def _kernels(events: Any, device: str, new_tokens: int) -> dict[str, list[KernelTime]]:
    """Operators by the time in themselves on a CPU, kernels on a GPU, by phase; the ranges are neither.

    Decoding begins where its first range does on the CPU, which has waited for the GPU there.
    """
    cpu = torch.autograd.DeviceType.CPU
    begins = min(event.time_range.start for event in events if event.name == "decode" and event.device_type == cpu)
    found: dict[str, dict[str, list[float]]] = {phase: {} for phase in PHASES}
    for event in events:
        on_gpu = event.device_type != cpu
        if on_gpu != (device == "cuda") or event.name in (*PHASES, "head") or event.name.startswith("layer."):
            continue
        passed = event.time_range.elapsed_us() if on_gpu else event.self_cpu_time_total
        found[PHASES[event.time_range.start >= begins]].setdefault(event.name, []).append(passed / 1e6)
    return {phase: _by_time(found[phase], 1 if phase == "prefill" else new_tokens) for phase in PHASES}


def _by_time(passed: dict[str, list[float]], forwards: int) -> list[KernelTime]:
    """Seconds of each call become means over ``forwards``, the longest first."""
    total = sum(map(sum, passed.values())) or 1.0
    kernels = [
        KernelTime(name, sum(each) / forwards, sum(each) / total, len(each) / forwards) for name, each in passed.items()
    ]
    return sorted(kernels, key=lambda kernel: -kernel.seconds)


def _weight_bytes(model: PreTrainedModel) -> dict[str, int]:
    """Bytes of the tensors that each stage reads."""
    architecture = _architecture(model)
    layers = architecture.decoder_layers(model)
    return {
        "layers": weight_bytes(*layers),
        "attention": weight_bytes(*map(architecture.attention_of, layers)),
        "mlp": weight_bytes(*(layer.get_submodule(architecture.mlp) for layer in layers)),
        "head": weight_bytes(model.get_output_embeddings()),
    }
