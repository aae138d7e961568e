"""Peak memory by stage, from sizes: what a process holds anyway, one decoder layer, hidden states, and the work on one layer.

GPU and CPU are not distinguished: what is counted is the memory in which layers are worked on. Small terms are left out, and a
term that is only sometimes there is counted as if it always were.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lorap.algorithms.factorization.memory import Footprint, working_bytes
from lorap.algorithms.factorization.solvers import CPU
from lorap.algorithms.moments import IN_PLACE_FROM
from lorap.algorithms.pruning import CHANNELS
from lorap.architectures import MLP, PROJECTIONS, SHARED_INPUTS
from lorap.calibration.backward import BATCH_TOKENS as BACKWARD_TOKENS
from lorap.calibration.routing import TOKENS as ROUTED_TOKENS
from lorap.calibration.self_text import BATCH_WINDOWS
from lorap.calibration.sensitivity import DIAGONAL
from lorap.calibration.sensitivity import WIDE as PRICES_WIDE
from lorap.calibration.statistics import WIDE
from lorap.calibration.stream import BATCH_TOKENS
from lorap.compression.distillation import EXACT_NUMBERS
from lorap.compression.estimate.shapes import ModelShape
from lorap.compression.estimate.sizes import Sizes
from lorap.compression.estimate.texts import Texts
from lorap.compression.shrinkage import JUDGED_OUTPUTS
from lorap.config import CompressionConfig
from lorap.requirements import (
    allocates_by_loss,
    compressed_roles,
    has_anchor,
    mixes_by_loss,
    needs_folds,
    roles_needing_gradients,
    roles_with_output_metric,
    sums_of,
)
from lorap.weights import TRELLIS, coding_of

DOUBLE = 8
# Tokenizer, texts and the model without weights, beside what a process holds with everything imported: measured with a vocabulary
# of 49,152.
TOKENIZER = 60 * 10**6
# Tensors as wide as the hidden state, and as the FFN, that a layer holds at once going forward, and keeps for going backward.
FORWARD, BACKWARD = (6, 3), (14, 6)
# Float32 copies of the logits that a loss makes, that its gradient makes besides, and that drawing the next token makes.
LOSS_COPIES, GRADIENT_COPIES, DRAW_COPIES = 2, 2, 6


def resident_bytes() -> int:
    """What this process holds, with everything imported and no model open."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 450 * 10**6  # as measured on Linux


@dataclass(frozen=True)
class Memory:
    """What one run holds at once.

    Args:
        shape, config, sizes, texts: the model, what is asked for, what will be left, and how much is read.
        base: held before a model is open.
        room: bytes that a process can have; in half of it a whole model may be, to write samples.
        budget: bytes of hidden states that stay in memory; None for no bound.
    """

    shape: ModelShape
    config: CompressionConfig
    sizes: Sizes
    texts: Texts
    base: int
    room: int
    budget: int | None = None

    def by_stage(self) -> Mapping[str, int]:
        """The fullest moment of each stage, in bytes, by the names that a report has for them."""
        held = self.base + TOKENIZER
        in_memory = (self.shape.layer_params + self.shape.resident_params) * self.shape.itemsize
        model = in_memory if self.shape.paged else self.shape.computed_bytes
        tokens = self.texts.tokens + self.texts.evaluation_tokens + self._followed
        everything = self._states(tokens + self._anchoring) + self._own_inputs(tokens)
        found = {"sample": held + self._sampling()} if self.texts.own_windows else {}
        held += model
        if tokens := self.texts.evaluation_tokens:
            found["evaluate"] = held + self._states(tokens) + self._own_inputs(tokens) + self._logits(LOSS_COPIES)
        if roles_needing_gradients(self.config):
            found["plan"] = held + self._planning()
        found["calibrate"] = held + everything + self._sums_of_inputs() + self._activations(BATCH_TOKENS, FORWARD)
        if self.sizes.layer.ranks:
            found["factorize"] = held + everything + self._factorizing()
        if self._prunes:
            found["prune"] = held + everything + self._refitting() + self._pruning_experts()
        if self.config.corrects and self._followed:
            moved = [role for role in compressed_roles(self.config) if not (self.shape.mixture and role in MLP)]
            found["correct"] = held + self._correcting(moved, self.config.correction_steps)
        if self.config.bits:
            found["round"] = held + everything + self._rounding()
        if self.config.rescales and self._followed:
            moved = [role for role in PROJECTIONS if not (self.shape.mixture and role in MLP)]
            found["rescale"] = held + self._correcting(moved, self.config.scale_steps, self.config.group)
        return found

    def disk_bytes(self) -> int:
        """Written besides the model that is read: each layer as it is finished, once more when corrected or rounded, and the
        folder; hidden states beyond the budget, or the metrics of outputs that wait for their layer.
        """
        saved = sum(self.sizes.nbytes.values())
        layers = sum(self.sizes.params.get(role, 0) for role in PROJECTIONS) * self.shape.itemsize
        tokens = self.texts.tokens + self.texts.evaluation_tokens + self._followed + self._anchoring
        spilled = tokens * self.shape.hidden_size * self.shape.itemsize - self._states(tokens)
        weighed = roles_with_output_metric(self.config)
        metrics = sum(4 * self.shape.projections[role][0] ** 2 for role in weighed if role in self.shape.projections)
        steps = self.config.corrects + self.config.rescales if self._followed else 0
        again = layers * (steps + (self.config.bits is not None))
        return 2 * saved + max(spilled, self.shape.num_layers * metrics) + again

    @property
    def _prunes(self) -> bool:
        return self.config.mlp_method == "prune" and self.sizes.layer.intermediate_size < self.shape.width

    @property
    def _folds(self) -> int:
        return 2 if needs_folds(self.config) else 1

    @property
    def _followed(self) -> int:
        """Tokens of correction steps and of what judges them, which go through the dense layers beside the others."""
        asked = [self.config.correction_steps] if self.config.corrects else []
        asked += [self.config.scale_steps] if self.config.rescales else []
        return sum((steps + 2) * tokens for steps, tokens in map(self.texts.step_tokens, asked) if steps)

    @property
    def _anchoring(self) -> int:
        """Tokens whose hidden states in the dense model are kept before a layer and behind it."""
        return 2 * self.texts.tokens if has_anchor(self.config) else 0

    def _states(self, tokens: int) -> int:
        """Hidden states, of which the budget leaves so much in memory."""
        nbytes = tokens * self.shape.hidden_size * self.shape.itemsize
        return nbytes if self.budget is None else min(nbytes, self.budget)

    def _own_inputs(self, tokens: int) -> int:
        """What layers read besides hidden states, which no budget sends to files."""
        return tokens * self.shape.own_inputs * self.shape.itemsize

    def _logits(self, copies: int) -> int:
        """A batch in the head, which comes from its file."""
        head = self.shape.head_params * self.shape.itemsize if self.shape.paged else 0
        return head + BACKWARD_TOKENS * self.shape.vocab_size * (self.shape.itemsize + 4 * copies)

    def _activations(self, tokens: int, widths: tuple[int, int]) -> int:
        hidden, inner = widths
        tokens, asked = min(tokens, self.texts.tokens), self.shape.experts_per_token
        each = (hidden + asked - 1) * self.shape.hidden_size + inner * asked * self.shape.width
        return tokens * each * self.shape.itemsize

    def _sampling(self) -> int:
        """The whole model where it fits, else both ends and a layer; keys and values of the windows that are written at once."""
        shape, windows = self.shape, min(self.texts.own_windows, BATCH_WINDOWS)
        fits = shape.computed_bytes <= self.room // 2
        layers = (shape.num_layers if fits else 1) * shape.layer_params
        model = (layers + 2 * shape.head_params) * shape.itemsize if shape.paged else shape.computed_bytes
        keys = 2 * shape.num_layers * shape.projections.get("k_proj", (0, 0))[0] * shape.itemsize
        return model + windows * (self.texts.seq_len * keys + DRAW_COPIES * shape.vocab_size * 4)

    def _planning(self) -> int:
        """Hidden states before every layer; sums of inputs and gradients of one, and a batch on its way back, or prices."""
        shape, texts = self.shape, self.texts
        roles = roles_needing_gradients(self.config)
        hidden, width = shape.projections["down_proj"]
        seen = dict(shape.projections)
        if shape.mixture:  # all experts of a layer together
            seen["down_proj"] = hidden, hidden
        features = [size for role in roles if role in seen for size in seen[role][role in DIAGONAL :]]
        out, inner = shape.projections.get("q_proj", (0, 0))
        pricing = 0
        if allocates_by_loss(self.config):
            ffn = 4 * ((1 if width >= IN_PLACE_FROM else 2) * width**2 + 3 * hidden * width)
            pricing = max(ffn, DOUBLE * (4 * out * inner + 2 * inner**2 + 3 * out**2))
            pricing += 3 * DOUBLE * width**2 if shape.mixture else 0  # the sums of one expert, in float64
        if mixes_by_loss(self.config):
            pricing = max(pricing, 5 * DOUBLE * width**2 + 2 * 4 * hidden * width)  # the moment as it is factored
        update = max((_update(size, wide=PRICES_WIDE) for size in features), default=0)
        work = sum(_sums(size, wide=PRICES_WIDE) for size in features)
        work += max(update + self._activations(BACKWARD_TOKENS, BACKWARD), pricing)
        states = self._states(texts.planning_tokens * (shape.num_layers + 2)) + self._routed(texts.planning_tokens)
        states += self._own_inputs(texts.planning_tokens)
        return states + max(work, self._logits(LOSS_COPIES + GRADIENT_COPIES))

    def _summed(self) -> list[int]:
        """Channels of the inputs whose outer products are summed up; those of experts are while they are pruned."""
        readers = {name: SHARED_INPUTS[name][0] for name in SHARED_INPUTS if sums_of(self.config, name)[1]}
        wanted = {*self.sizes.layer.ranks, *(["down_proj"] if self._prunes and not self.shape.mixture else [])}
        return [self.shape.projections[role][1] for role in readers.values() if role in wanted]

    def _sums_of_inputs(self) -> int:
        sums = [self._folds * _sums(size) for size in self._summed()]
        if has_anchor(self.config):
            sums = [own + DOUBLE * size**2 for own, size in zip(sums, self._summed(), strict=True)]
        together = sum(sums) if self.config.sequential == "layer" else max(sums, default=0)
        return together + max(map(_update, self._summed()), default=0)

    def _factorizing(self) -> int:
        """The largest factorization, one at a time: its weight in float64, its metrics, and what the solver works on."""
        most, axes = 0, {"svd": 0, "awsvd": 1}.get(self.config.attention_method, 2)
        for role, rank in self.sizes.layer.ranks.items():
            out, inner = self.shape.projections[role]
            weighed = role in roles_with_output_metric(self.config)
            method = CPU.choose(min(out, inner), rank, spectrum=False)
            footprint = Footprint(out, inner, rank, method=method, metric=axes, output_metric=weighed, converted=False)
            metrics = self._folds * _sums(inner) + 3 * DOUBLE * inner**2 if axes == 2 else 0
            metrics += DOUBLE * out**2 if weighed else 0
            metrics += 4 * DOUBLE * inner**2 if has_anchor(self.config) else 0
            storing = DOUBLE * (2 * rank * (out + inner) + 4 * out * inner)
            most = max(most, metrics + DOUBLE * out * inner + max(working_bytes([footprint]), storing))
        return most

    def _refitting(self) -> int:
        """Scores of channels piece by piece; both folds beside the refit that judges a ridge, or one sum beside the last."""
        hidden, width = self.shape.projections["down_proj"]
        kept = self.sizes.layer.intermediate_size
        scoring = 3 * DOUBLE * hidden * min(CHANNELS, width)
        if not self.config.repair:
            return scoring
        solving = (1 if kept >= IN_PLACE_FROM else 2) * kept**2  # LAPACK copies the matrix while it is small
        judging = self._folds * width**2 + solving + 4 * min(JUDGED_OUTPUTS, hidden) * width
        size = _sums(width) // width**2
        return max(self._folds * _sums(width) + scoring, size * max(judging, width**2 + solving + 4 * hidden * width))

    def _routed(self, tokens: int) -> int:
        """What the experts of a layer read, whom each token is sent to, and what it counts there."""
        if not self.shape.mixture:
            return 0
        return tokens * (self.shape.hidden_size * self.shape.itemsize + self.shape.experts_per_token * (DOUBLE + 4))

    def _pruning_experts(self) -> int:
        """What all experts of a layer read; what one reads, in float32; and the pruned ones, by themselves and packed."""
        shape = self.shape
        if not shape.mixture:
            return 0
        hidden, width = shape.projections["down_proj"]
        tokens = min(ROUTED_TOKENS, self.texts.tokens)
        one = tokens * 4 * (2 * hidden + 4 * width) + 3 * 4 * hidden * width + self._folds * DOUBLE * hidden
        if self.config.repair:
            one += _update(width)
        pruned = 2 * shape.experts * 3 * hidden * self.sizes.layer.intermediate_size * shape.itemsize
        return self._routed(self.texts.tokens) + one + pruned

    def _correcting(self, moved: Sequence[str], steps: int, group: int = 1) -> int:
        """Hidden states of a step before every layer, and the dense ones; gradients of one layer by fold; exact weights.

        Args:
            moved: the roles whose weights, or scales, move.
            steps: that are asked for.
            group: weights that move as one.
        """
        shape, (_, step_tokens) = self.shape, self.texts.step_tokens(steps)
        largest = shape.hidden_size * max(shape.hidden_size, self.sizes.layer.intermediate_size)
        params = sum(self.sizes.params[role] for role in moved) // shape.num_layers
        work = self._folds * params * (DOUBLE if largest <= EXACT_NUMBERS else 4) + 2 * 4 * largest
        work += self._activations(BACKWARD_TOKENS, BACKWARD)
        exact = 0 if shape.paged or shape.itemsize == 4 else 4 * shape.num_layers * params // group
        states = self._states(step_tokens * (shape.num_layers + 2) + self._followed)
        states += self._own_inputs(step_tokens + self._followed)
        return states + exact + max(work, self._logits(LOSS_COPIES))

    def _rounding(self) -> int:
        """Sums of all four inputs of a layer; the largest moment as it is factored, and copies of its weight.

        On a trellis there are windows, float64 copies and a system for the scales of each row besides.
        """
        readers = [each[0] for each in SHARED_INPUTS.values() if each[0] in self.shape.projections]
        inputs = [self.shape.projections[role][1] for role in readers]
        largest, rows = max(inputs), max(outputs for outputs, _ in self.shape.projections.values())
        copies, fitting = 8 * 4 * rows * largest, 0
        if coding_of(self.config.weights) is TRELLIS:
            groups = -(-largest // self.config.group)
            copies, fitting = 2 * copies, 3 * DOUBLE * rows * groups**2
        return sum(map(_sums, inputs)) + 5 * DOUBLE * largest**2 + copies + fitting


def _sums(features: int, *, wide: int = WIDE) -> int:
    """Bytes of one sum of outer products: float32 for many channels."""
    return features**2 * (4 if features > wide else DOUBLE)


def _update(features: int, *, wide: int = WIDE) -> int:
    """Working copies while products are added: in float64 beside the sums, in float32 in place."""
    return 0 if features > wide else 2 * _sums(features)
