"""Where the finished steps of a run are kept, as the pipeline sees it."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from typing import TypeAlias, TypeVar

from torch import Tensor, nn

from lorap.compression.planning import Key, Plan
from lorap.compression.windows import RunWindows
from lorap.reports.records import Evaluation
from lorap.reports.run import CorrectionReport, ProjectionReport
from lorap.weights import Coding

T = TypeVar("T")

# What correction steps move: all weights, and scales once the weights are rounded.
CORRECTED, RESCALED = "corrected", "rescaled"

# A step's result, and the seconds that its stages took.
Finished: TypeAlias = tuple[T, Mapping[str, float]]


class RunStore:
    """The steps of a run that are done. This one keeps none of them: that is ``compress()``, all in memory.

    What ``load_*`` returns, None where a step is not done yet, was once handed to ``save_*``. The one that keeps them in files is
    :class:`lorap.compression.runs.steps.JournalStore`.
    """

    def __init__(self) -> None:
        self._snapshot: list[dict[str, Tensor]] = []

    def load_windows(self) -> Finished[RunWindows] | None:
        """Windows to calibrate on, and those to judge by."""
        return None

    def save_windows(self, windows: RunWindows, seconds: Mapping[str, float]) -> None:
        """Windows to calibrate on, those to judge by, and the seconds of each stage."""

    def load_losses(self) -> Finished[list[Evaluation]] | None:
        """Of the dense model, on each text to judge by."""
        return None

    def save_losses(self, losses: Sequence[Evaluation], seconds: Mapping[str, float]) -> None:
        """Of the dense model, on each text, and the seconds of each stage."""

    def output_metrics(self) -> MutableMapping[Key, Tensor]:
        """What takes the metrics of the outputs, which of all layers together are larger than the model."""
        return {}

    def load_plan(self, metrics: MutableMapping[Key, Tensor]) -> Finished[Plan] | None:
        """The plan, with the ``metrics`` that it came with."""
        return None

    def save_plan(self, plan: Plan, seconds: Mapping[str, float]) -> None:
        """The plan, whose metrics are in :meth:`output_metrics`, and the seconds of each stage."""

    def load_layer(self, index: int, layer: nn.Module) -> Finished[list[ProjectionReport]] | None:
        """Put the compressed projections into a dense ``layer``."""
        return None

    def save_layer(
        self, index: int, layer: nn.Module, projections: Sequence[ProjectionReport], seconds: Mapping[str, float]
    ) -> None:
        """One compressed layer.

        Args:
            index: of the decoder layer.
            layer: compressed.
            projections: what its projections became.
            seconds: of each stage.
        """

    def is_over(self, stage: str) -> bool:
        """Whether the steps of ``CORRECTED`` or ``RESCALED`` are over, taken or not."""
        return False

    def load_correction(self, layers: Sequence[nn.Module], stage: str) -> Finished[CorrectionReport] | None:
        """Give the compressed ``layers`` the weights that the steps of ``CORRECTED`` or ``RESCALED`` made of them."""
        return None

    def save_correction(self, correction: CorrectionReport, seconds: Mapping[str, float], stage: str) -> None:
        """What the steps of ``CORRECTED`` or ``RESCALED`` did, taken or not, and the seconds of each stage."""

    def save_corrected(self, index: int, layer: nn.Module, *, stage: str, is_last_step: bool) -> None:
        """Called after each step, before an offloaded layer may leave memory.

        Args:
            index: of the decoder layer.
            layer: after the step.
            stage: ``CORRECTED`` or ``RESCALED``.
            is_last_step: whether no other step follows.
        """

    def load_rounded(
        self, index: int, layer: nn.Module, *, bits: Mapping[str, int], coding: Coding, group_size: int
    ) -> Mapping[str, float] | None:
        """Give a compressed layer its rounded weights; returns the seconds that rounding took, by stage.

        Args:
            index: of the decoder layer.
            layer: with floating-point weights.
            bits: of the rounded ones, by role.
            coding: what their numbers stand for.
            group_size: numbers of a row that share a scale.
        """
        return None

    def save_rounded(self, index: int, layer: nn.Module, seconds: Mapping[str, float]) -> None:
        """One layer with rounded weights, and the seconds of each stage."""

    def snapshot(self, layers: Sequence[nn.Module]) -> None:
        """Remember the layers as they are before the first step of a stage."""
        self._snapshot = [
            {name: tensor.to("cpu", copy=True) for name, tensor in layer.state_dict().items()} for layer in layers
        ]

    def original(self, index: int) -> Mapping[str, Tensor]:
        """Tensors of a layer, by name within it, as they were before the first step of this stage."""
        return self._snapshot[index]

    def restore(self, layers: Sequence[nn.Module]) -> None:
        """To the bit what they were."""
        for layer, tensors in zip(layers, self._snapshot, strict=True):
            layer.load_state_dict(tensors)

    def drop_snapshot(self) -> None:
        """Nothing will be restored any more."""
        self._snapshot = []
