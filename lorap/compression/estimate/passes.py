"""What it takes to bring weights in, and to send tokens through a layer, the head, and the sums of a second moment."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from lorap.algorithms.symmetric import LOWER
from lorap.architectures import PROJECTIONS
from lorap.compression.allocation import LayerPlan
from lorap.compression.estimate.cost_terms import CostTerms
from lorap.compression.estimate.memory import Memory
from lorap.compression.estimate.rates import Machine
from lorap.compression.estimate.shapes import ModelShape
from lorap.compression.estimate.sizes import Sizes, matrix_params
from lorap.compression.estimate.texts import Texts
from lorap.compression.estimate.work import sums_dtype
from lorap.config import CompressionConfig

# Numbers that a layer reads or writes besides its matrix products, per token: of the hidden state's width, and of the FFN's.
HIDDEN_PASSES, INNER_PASSES = 30, 6
# Float32 passes over logits that a loss takes as long as: exponentials, and fresh memory from the system, are the most of them.
# The two softmaxes whose difference is the gradient of a divergence take as many.
LOSS_PASSES = 28
# Share of the memory that files may take, so that the system does not drop them before they are wanted again.
FILE_ROOM = 0.8
# Share of the memory in which a whole model may be, as in lorap.checkpoint.paging.in_memory_throughout.
MODEL_ROOM = 0.5


class Passes:
    """One run on one machine.

    Args:
        shape, config, sizes: the model, what is asked for, and what will be left.
        texts: how much is read.
        machine: rates of one process.
        memory: what is held.
        processes: among how many windows and factorizations are shared.
    """

    def __init__(
        self,
        shape: ModelShape,
        config: CompressionConfig,
        sizes: Sizes,
        texts: Texts,
        machine: Machine,
        memory: Memory,
        *,
        processes: int = 1,
    ) -> None:
        self.shape, self.config, self.sizes = shape, config, sizes
        self.texts, self.machine, self.memory = texts, machine, memory
        # Processes beyond what the machine has room for take each other's time.
        self.speedup = min(processes, machine.parallel)
        self.before = {role: math.prod(sides) for role, sides in shape.projections.items()}
        self.after = {role: matrix_params(shape, config, sizes.layer, role) for role in PROJECTIONS}

    @property
    def layer(self) -> LayerPlan:
        """What becomes of a decoder layer."""
        return self.sizes.layer

    @property
    def prunes(self) -> bool:
        """Whether FFN channels go."""
        return self.layer.intermediate_size < self.shape.width

    @property
    def fits(self) -> bool:
        """Whether the whole model can be in memory while it writes."""
        return self.memory.resident or self.shape.computed_bytes <= MODEL_ROOM * self.machine.memory_bytes

    def terms(self, *, shared: bool = False, each_layer: bool = False) -> CostTerms:
        """An empty one: for the whole model or once for each layer, alone or with the windows shared among processes."""
        times = self.shape.num_layers if each_layer else 1
        return CostTerms(self.machine, times=times, processes=self.speedup if shared else 1)

    def page(self, terms: CostTerms, params: dict[str, int], *, passes: int = 1, what: str = "weights") -> None:
        """Layers come from their files into memory, every process on its own.

        Args:
            terms: take the work.
            params: of one layer, by role.
            passes: how often all layers are read.
            what: is read, in a few words.
        """
        if self.memory.resident:
            return
        nbytes = self.shape.num_layers * sum(params.values()) * self.shape.itemsize
        source = "cache" if nbytes <= FILE_ROOM * self.machine.host_bytes else "disk"
        terms.transferred(what, passes * nbytes, source, f"{passes:,} x {nbytes:,} B")

    def run(self, terms: CostTerms, tokens: int, params: int, *, batch: int, what: str, attention: int = 1) -> None:
        """Tokens through one layer.

        Args:
            terms: take the work.
            tokens: of all windows.
            params: of the matrices of one layer that tokens pass.
            batch: tokens at once.
            what: is done, in a few words.
            attention: how many attentions; a backward pass is two.
        """
        dtype, seq_len = self.shape.dtype, self.texts.seq_len
        across = 4 * attention * seq_len * self.shape.projections["q_proj"][0]
        told = f"{tokens:,} tokens x (2 x {params:,} parameters + {across:,} of attention)"
        terms.products(what, tokens * (2 * params + across), dtype, told)
        wide = HIDDEN_PASSES * self.shape.hidden_size + INNER_PASSES * self.shape.width
        nbytes = tokens * wide * self.shape.itemsize
        terms.moved(f"{what}, between products", nbytes, f"{tokens:,} tokens x {wide:,} x {self.shape.itemsize} B")
        batches = -(-tokens // batch)
        terms.calls(f"{what}, calls", batches, f"{batches:,} batches of {batch:,} tokens")

    def loss(self, terms: CostTerms, tokens: int, *, heads: int = 1, passes: int = LOSS_PASSES) -> None:
        """The head and the loss.

        Args:
            terms: take the work.
            tokens: of all windows.
            heads: how often the head is computed, a backward pass being as much again.
            passes: over float32 logits; by default those of cross entropy.
        """
        head = self.shape.head_params
        terms.products(
            "head", 2 * heads * head * tokens, self.shape.dtype, f"{2 * heads} x {head:,} x {tokens:,} tokens"
        )
        nbytes = passes * tokens * self.shape.vocab_size * 4
        terms.moved("loss", nbytes, f"{passes} x {tokens:,} tokens x {self.shape.vocab_size:,} words x 4 B")

    def second_moment(
        self,
        terms: CostTerms,
        tokens: int,
        size: int,
        input_name: str,
        *,
        batch: int,
        prices: bool = False,
        mean: bool = False,
    ) -> None:
        """Sums of outer products of one input.

        Args:
            terms: take the work.
            tokens: of all windows.
            size: channels of the input.
            input_name: what is summed up, in a few words.
            batch: tokens at once.
            prices: whether sizes are priced by it, which decides on the dtype of the sums.
            mean: whether a mean will be subtracted: then the products are exact.
        """
        sums = sums_dtype(size, prices=prices)
        what = f"second moment of {input_name}"
        formula = f"{2 * LOWER:.3g} x {tokens:,} tokens x {size:,}^2"
        terms.products(what, 2 * LOWER * tokens * size**2, sums if mean else "float32", formula)
        passes, width = (8, 8) if sums == "float64" else (4, 4)
        batches = -(-tokens // batch)
        passed = f"{batches:,} batches x {passes} passes over {size:,}^2 x {width} B"
        terms.moved(what + ", sums", batches * passes * width * size**2, passed)

    def distribute(self, terms: CostTerms, jobs: Sequence[Callable[[CostTerms], None]]) -> None:
        """Work of one layer that is distributed whole: as many jobs at once as there are processes and evenly large pieces."""
        alone = [self.terms() for _ in jobs]
        for part, job in zip(alone, jobs, strict=True):
            job(part)
        seconds = sorted((part.seconds for part in alone), reverse=True)
        loads = [0.0] * self.speedup
        for each in seconds:
            loads[loads.index(min(loads))] += each
        at_once = sum(seconds) / max(loads) if sum(seconds) else 1.0
        for job in jobs:
            part = CostTerms(self.machine, times=self.shape.num_layers, processes=at_once)
            job(part)
            terms.include(part)
