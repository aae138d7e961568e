"""A watch that tells what is done in decoder layers from all else, whatever the stage."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from lorap.calibration.context import DecoderContext
from lorap.system import Stopwatch

IN_LAYER = " (layers)"


class LayerWatch(Stopwatch):
    """Seconds by stage, with those in which a decoder layer was in memory apart: under the stage's name and ``IN_LAYER``.

    Args:
        bar: shows the stage.
    """

    def __init__(self, bar: Any = None) -> None:
        super().__init__()
        self._bar = bar
        self._open: list[str] = []
        self._layers = 0

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        self._open.append(stage)
        if self._bar is not None:
            self._bar.set_postfix_str(stage, refresh=False)
            self._bar.update()
        try:
            with super().__call__(f"{stage}{IN_LAYER}" if self._layers else stage):
                yield
        finally:
            self._open.pop()

    @contextmanager
    def layer(self) -> Iterator[None]:
        """What follows is done in a layer, of whatever stage is open."""
        self._layers += 1
        try:
            with self(self._open[-1]) if self._open else nullcontext():
                yield
        finally:
            self._layers -= 1


@dataclass(frozen=True)
class TimedContext(DecoderContext):
    """A context whose layers are watched.

    Args:
        watch: takes the time of what is done while a layer is in memory.
    """

    watch: LayerWatch = field(kw_only=True)

    @contextmanager
    def on_device(self, index: int) -> Iterator[None]:
        """As that of the base class."""
        with self.watch.layer(), super().on_device(index):
            yield

    @contextmanager
    def watched_calls(self) -> Iterator[None]:
        """The model is run as a whole while this is active, and its layers are watched all the same."""
        call = ExitStack()
        with ExitStack() as hooks:
            for layer in self.layers:
                hooks.enter_context(layer.register_forward_pre_hook(lambda *_: call.enter_context(self.watch.layer())))
                hooks.enter_context(layer.register_forward_hook(lambda *_: call.close()))
            yield
