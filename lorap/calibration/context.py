"""What every stage needs to know of the model that is worked on, in one object that is made once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lorap.architectures import Architecture, find_architecture
from lorap.calibration.offload import IN_MEMORY, HiddenStateStore
from lorap.checkpoint.paging import in_memory, offloaded_tensors
from lorap.distributed import SINGLE_PROCESS, Processes
from lorap.nn.linear import embedding_weight

if TYPE_CHECKING:
    from transformers import PreTrainedModel

T = TypeVar("T")


@dataclass(frozen=True)
class DecoderContext:
    """A model as its decoder layers, and how they are worked on.

    Args:
        model: in evaluation mode; in memory, or offloaded (:mod:`lorap.checkpoint.paging`).
        architecture: where its layers and their projections are.
        layers: its decoder layers, in order.
        device: where they are worked on, one after the other.
        store: takes the hidden states between two layers.
        processes: who share the windows and the work.
        progress: show progress bars on stderr.
    """

    model: PreTrainedModel
    architecture: Architecture
    layers: tuple[nn.Module, ...]
    device: torch.device
    store: HiddenStateStore = IN_MEMORY
    processes: Processes = SINGLE_PROCESS
    progress: bool = False

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        *,
        device: torch.device,
        store: HiddenStateStore = IN_MEMORY,
        processes: Processes = SINGLE_PROCESS,
        progress: bool = False,
    ) -> DecoderContext:
        """The context of a model.

        Args:
            model: in evaluation mode; in memory, or offloaded.
            device: where its layers are worked on.
            store: takes the hidden states between two layers.
            processes: who share the windows and the work.
            progress: show progress bars on stderr.

        Raises:
            ArchitectureError: lorap does not know its family.
        """
        architecture = find_architecture(model)
        layers = tuple(architecture.decoder_layers(model))
        return cls(model, architecture, layers, device, store, processes, progress)

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding, which may be more than the tokenizer has tokens."""
        return len(self._embedding)

    @property
    def embedding_device(self) -> torch.device:
        """Where the embedding looks up token ids."""
        return self._embedding.device

    @property
    def _embedding(self) -> Tensor:
        return embedding_weight(self.model)

    def on_device(self, index: int) -> AbstractContextManager[None]:
        """Layer ``index`` is in memory on :attr:`device` while this is active, and afterwards where it was."""
        return on_device(self.layers[index], self.device)

    @contextmanager
    def head_in_memory(self) -> Iterator[None]:
        """What makes logits of hidden states is in memory while this is active."""
        with ExitStack() as stack:
            stack.enter_context(in_memory(self.model.get_output_embeddings()))
            if self.architecture.embeds_at_head:
                stack.enter_context(in_memory(self.model.get_input_embeddings()))
            yield

    def bar(self, items: Iterable[T], *, desc: str) -> Iterable[T]:
        """A progress bar around the layers, of the process that talks."""
        hidden = not self.progress or not self.processes.is_main_process
        return tqdm(items, desc=desc, unit="layer", total=len(self.layers), disable=hidden)


@contextmanager
def on_device(layer: nn.Module, device: torch.device) -> Iterator[None]:
    """``layer`` is in memory on ``device`` while this is active, and afterwards where it was."""
    if offloaded_tensors(layer) is not None:
        with in_memory(layer, device):
            yield
        return
    source_device = next(layer.parameters()).device
    layer.to(device)
    try:
        yield
    finally:
        layer.to(source_device)
