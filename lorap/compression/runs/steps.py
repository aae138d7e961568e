"""The steps of a run as they are written into its journal, and brought back from there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lorap.architectures import Architecture
from lorap.architectures.experts import DOWN
from lorap.calibration.windows import TokenWindows
from lorap.checkpoint.paging import is_in_memory, offloaded_tensors, put_tensor
from lorap.checkpoint.stored_tensors import StoredTensor
from lorap.compression.allocation import LayerPlan
from lorap.compression.planning import Key, Plan
from lorap.compression.runs.journal import Journal
from lorap.compression.store import Finished, RunStore
from lorap.compression.windows import RunWindows
from lorap.nn.linear import LowRankLinear
from lorap.nn.low_rank_tensors import RIGHT, LowRankTensors
from lorap.nn.quantized import projection_linears, put_empty
from lorap.nn.trellis import layer_of
from lorap.reports.records import Evaluation, Share
from lorap.reports.run import CorrectionReport, ProjectionReport
from lorap.weights import Coding

WINDOWS, LOSSES, PLAN = "windows", "before", "plan"


@dataclass(frozen=True)
class WindowsRecord:
    """What is not a tensor of a :class:`TokenWindows`."""

    name: str
    sha256: str
    group_names: tuple[str, ...]
    shares: tuple[Share, ...]


class JournalStore(RunStore):
    """Finished steps in the files of a journal.

    Args:
        journal: of the run.
        architecture: of its model.
    """

    def __init__(self, journal: Journal, architecture: Architecture) -> None:
        super().__init__()
        self.journal, self.architecture = journal, architecture

    def load_windows(self) -> Finished[RunWindows] | None:
        """Windows to calibrate on, and those to judge by; None where they are not drawn yet."""
        found = self.journal.finished(tuple[list[WindowsRecord], bool], WINDOWS)
        if found is None:
            return None
        ((records, judges), seconds), stored = found, self.journal.tensors(WINDOWS)

        def tensor(index: int, name: str) -> Any:
            one = stored.get(f"{index}.{name}")
            return None if one is None else one.read()

        windows = [
            TokenWindows(
                tensor(index, "input_ids"),
                each.name,
                each.sha256,
                tensor(index, "attention_mask"),
                tensor(index, "groups"),
                each.group_names,
                each.shares,
            )
            for index, each in enumerate(records)
        ]
        return RunWindows(windows[0], windows[1] if judges else None, windows[1 + judges :]), seconds

    def save_windows(self, windows: RunWindows, seconds: Mapping[str, float]) -> None:
        """The tensors of all windows in one file, the rest as JSON."""
        tensors, described = {}, []
        judges = [windows.judges] if windows.judges else []
        for index, each in enumerate([windows.calibration, *judges, *windows.texts]):
            for name in ("input_ids", "attention_mask", "groups"):
                if (tensor := getattr(each, name)) is not None:
                    tensors[f"{index}.{name}"] = tensor
            described.append(WindowsRecord(each.name, each.sha256, each.group_names, each.shares))
        self.journal.keep_finished(WINDOWS, (described, bool(judges)), seconds, tensors)

    def load_losses(self) -> Finished[list[Evaluation]] | None:
        """Of the dense model; None where they are not measured yet."""
        return self.journal.finished(list[Evaluation], LOSSES)

    def save_losses(self, losses: Sequence[Evaluation], seconds: Mapping[str, float]) -> None:
        """As JSON."""
        self.journal.keep_finished(LOSSES, losses, seconds)

    def output_metrics(self) -> MutableMapping[Key, Tensor]:
        """Metrics of the outputs, each in a file of its own."""
        return _StoredMetrics(self.journal)

    def load_plan(self, metrics: MutableMapping[Key, Tensor]) -> Finished[Plan] | None:
        """The plan; None where there is none yet. ``metrics`` finds its files again."""
        found = self.journal.finished(tuple[list[LayerPlan], list[Key]], PLAN)
        if found is None:
            return None
        (layers, keys), seconds = found
        assert isinstance(metrics, _StoredMetrics)
        metrics.restore(keys)
        return Plan(layers, metrics), seconds

    def save_plan(self, plan: Plan, seconds: Mapping[str, float]) -> None:
        """As JSON; the metrics are in their files already."""
        self.journal.keep_finished(PLAN, (plan.layers, list(plan.output_metrics)), seconds)

    def load_layer(self, index: int, layer: nn.Module) -> Finished[list[ProjectionReport]] | None:
        """Put the compressed projections into a dense ``layer``; None where it is not compressed yet."""
        name = _layer(index)
        found = self.journal.finished(list[ProjectionReport], name)
        if found is None:
            return None
        source_device = next(layer.parameters()).device
        put_projections(layer, self.journal.tensors(name), self.architecture)
        self._reload(name, layer, source_device)
        return found

    def save_layer(
        self, index: int, layer: nn.Module, projections: Sequence[ProjectionReport], seconds: Mapping[str, float]
    ) -> None:
        """The weights of a layer in one file, the rest as JSON.

        Args:
            index: of the decoder layer.
            layer: compressed; where it is offloaded, its weights come from the journal from now on.
            projections: what its projections became.
            seconds: of each stage.
        """
        self.journal.keep_finished(_layer(index), projections, seconds, layer.state_dict())
        self._offload_from(_layer(index), layer)

    def is_over(self, stage: str) -> bool:
        """Whether the steps of a stage are over, taken or not."""
        return self.journal.has(stage)

    def load_correction(self, layers: Sequence[nn.Module], stage: str) -> Finished[CorrectionReport] | None:
        """Give the layers the weights that the steps made of them; None where the steps are not over."""
        found = self.journal.finished(CorrectionReport, stage)
        for index, layer in enumerate(layers if found is not None and found[0].taken else ()):
            self._reload(_corrected(index, stage), layer)
        return found

    def save_correction(self, correction: CorrectionReport, seconds: Mapping[str, float], stage: str) -> None:
        """As JSON; where the steps were undone, their weights go."""
        self.journal.keep_finished(stage, correction, seconds)
        if not correction.taken:
            for name in self.journal.tensor_steps(f"{stage}-"):
                self.journal.forget_tensors(name)

    def save_corrected(self, index: int, layer: nn.Module, *, stage: str, is_last_step: bool) -> None:
        """The weights of a layer after a step.

        Args:
            index: of the decoder layer.
            layer: after the step.
            stage: whose step it is.
            is_last_step: a layer that is in memory is written after the last step only.
        """
        if offloaded_tensors(layer) is not None or is_last_step:
            self.journal.keep_tensors(_corrected(index, stage), layer.state_dict())
            self.journal.processes.barrier()
            self._offload_from(_corrected(index, stage), layer)

    def load_rounded(
        self, index: int, layer: nn.Module, *, bits: Mapping[str, int], coding: Coding, group_size: int
    ) -> Mapping[str, float] | None:
        """Give a compressed layer its rounded weights; None where it is not rounded yet."""
        found = self.journal.finished(None, _rounded(index))
        if found is None:
            return None
        device = next(layer.parameters()).device
        linears = projection_linears(layer, self.architecture)
        put_empty(layer, {name: bits[role] for role, name, _ in linears}, kind=layer_of(coding), group_size=group_size)
        self._reload(_rounded(index), layer, device)
        return found[1]  # type: ignore[no-any-return]

    def save_rounded(self, index: int, layer: nn.Module, seconds: Mapping[str, float]) -> None:
        """The weights of a layer in one file; an offloaded one comes from there from now on."""
        self.journal.keep_finished(_rounded(index), None, seconds, layer.state_dict())
        self._offload_from(_rounded(index), layer)

    def snapshot(self, layers: Sequence[nn.Module]) -> None:
        """The journal has them."""

    def original(self, index: int) -> Mapping[str, Tensor]:
        """From the file of the layer."""
        return {name: tensor.read() for name, tensor in self.journal.tensors(self._before_steps(index)).items()}

    def restore(self, layers: Sequence[nn.Module]) -> None:
        """The layers as they were before the first step, from their files."""
        for index, layer in enumerate(layers):
            self._reload(self._before_steps(index), layer)

    def _before_steps(self, index: int) -> str:
        """What has a layer before the steps: those of weights are over when the first one is rounded."""
        return _rounded(index) if self.journal.has(_rounded(index)) else _layer(index)

    def _reload(self, name: str, layer: nn.Module, source_device: torch.device | None = None) -> None:
        """The stored weights, where the layer is in memory; an offloaded one finds them when it is used, unless it stays."""
        self._offload_from(name, layer)
        if (offloaded := offloaded_tensors(layer)) is None:
            device = source_device or next(layer.parameters()).device
            for tensor_name, tensor in self.journal.tensors(name).items():
                put_tensor(layer, tensor_name, tensor.read().to(device))
        elif is_in_memory(layer):
            offloaded.load(layer, next(layer.parameters()).device)

    def _offload_from(self, name: str, layer: nn.Module) -> None:
        """From now on an offloaded layer comes from what the journal has of it."""
        if (offloaded := offloaded_tensors(layer)) is not None:
            layer.offloaded = replace(offloaded, tensors=self.journal.tensors(name), dtypes={})  # type: ignore[assignment]


def _layer(index: int) -> str:
    return f"layer-{index:05}"


def _rounded(index: int) -> str:
    return f"rounded-{index:05}"


def _corrected(index: int, stage: str) -> str:
    return f"{stage}-{index:05}"


class _StoredMetrics(MutableMapping[Key, Tensor]):
    """Second moments of output gradients, by layer and role: in files, because those of all layers are larger than the model."""

    def __init__(self, journal: Journal) -> None:
        self.journal = journal
        self.keys_: dict[Key, None] = {}

    def __setitem__(self, key: Key, metric: Tensor) -> None:
        self.journal.keep_tensors(self._step(key), {"metric": metric})
        self.keys_[key] = None

    def __getitem__(self, key: Key) -> Tensor:
        if key not in self.keys_:
            raise KeyError(key)
        return self.journal.tensors(self._step(key))["metric"].read()

    def __delitem__(self, key: Key) -> None:
        del self.keys_[key]
        self.journal.forget_tensors(self._step(key))

    def __contains__(self, key: object) -> bool:
        return key in self.keys_  # without reading the file

    def __iter__(self) -> Iterator[Key]:
        return iter(self.keys_)

    def __len__(self) -> int:
        return len(self.keys_)

    def restore(self, keys: Sequence[Key]) -> None:
        """Know again what was written down."""
        self.keys_ = dict.fromkeys(keys)

    @staticmethod
    def _step(key: Key) -> str:
        return f"metric-{key[0]:05}-{key[1]}"


def put_projections(layer: nn.Module, stored: dict[str, StoredTensor], architecture: Architecture) -> None:
    """Give a dense layer the projections that a file has in its place, still without weights (on the meta device).

    Args:
        layer: a dense decoder layer.
        stored: its tensors in the file, by their names within the layer.
        architecture: of the model.
    """
    for path in (architecture.projections[role] for role in architecture.roles(layer)):
        inner = {
            name.removeprefix(path + "."): tensor for name, tensor in stored.items() if name.startswith(path + ".")
        }
        layer.set_submodule(path, _empty(inner, path))
    if experts := architecture.experts(layer):
        assert architecture.packed is not None
        experts.module.to("meta")
        experts.resize(stored[f"{architecture.packed.path}.{DOWN}"].shape[2])
        return
    layer.get_submodule(architecture.mlp).intermediate_size = int(  # type: ignore[assignment]
        layer.get_submodule(architecture.projections["down_proj"]).in_features  # type: ignore[arg-type]
    )


def _empty(tensors: dict[str, StoredTensor], name: str) -> nn.Module:
    """The module that these tensors of the projection ``name`` belong to, on the meta device."""
    shapes = {key: tensor.shape for key, tensor in tensors.items()}
    if RIGHT in shapes:
        dtype = tensors[RIGHT].dtype
        return LowRankLinear.empty(LowRankTensors.of_stored(shapes, name), device="meta", dtype=dtype).eval()
    out_features, in_features = shapes["weight"]
    dtype = tensors["weight"].dtype
    return nn.Linear(in_features, out_features, bias="bias" in shapes, device="meta", dtype=dtype).eval()
