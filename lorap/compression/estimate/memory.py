"""Peak memory by stage, in bytes, from sizes alone: one decoder layer at a time, whatever their number.

GPU and CPU are not distinguished: what is counted is the memory in which layers are worked on.
"""

from __future__ import annotations

from dataclasses import dataclass

from lorap.algorithms.factorization.memory import Footprint, working_bytes
from lorap.algorithms.moments import IN_PLACE_FROM
from lorap.algorithms.pruning import CHANNELS
from lorap.calibration.backward import BATCH_TOKENS as BACKWARD_TOKENS
from lorap.calibration.stream import BATCH_TOKENS
from lorap.compression.allocation import LayerPlan
from lorap.compression.distillation import EXACT_NUMBERS
from lorap.compression.estimate.rates import Machine
from lorap.compression.estimate.shapes import ModelShape
from lorap.compression.estimate.texts import Texts
from lorap.compression.estimate.work import metric_axes, sums_dtype
from lorap.compression.shrinkage import JUDGED_OUTPUTS
from lorap.config import CompressionConfig
from lorap.evaluation.perplexity import BATCH_TOKENS as EVALUATION_BATCH
from lorap.kernels.reference import CHUNK_TOKENS
from lorap.requirements import roles_with_output_metric

DOUBLE = 8
# Float32 copies of the logits of a batch that the loss makes, and that a backward pass makes besides.
LOGIT_COPIES, LOGIT_GRADIENTS = 2, 2
# The same of one token of each window, to draw the next.
DRAW_COPIES = 6
# Tokenizer, texts and the model without weights, beside what a process holds with everything imported: measured with a vocabulary
# of 49,152.
TOKENIZER = 60 * 10**6
# Tensors as wide as the hidden state, and as the FFN, that a layer holds at once going forward, and keeps for going backward.
FORWARD_HIDDEN, FORWARD_INNER = 6, 3
BACKWARD_HIDDEN, BACKWARD_INNER = 14, 6


@dataclass(frozen=True)
class Memory:
    """What the stages hold at once.

    Args:
        shape, config, layer: the model, and what becomes of its layers.
        machine: gives the memory that is taken before any model is open.
        tokens: of calibration, on one process.
        evaluation_tokens: that go through the layers beside them, on one process.
        planning_tokens: of the backward pass.
        steps, step_tokens: of the correction, on one process.
        folds: halves of the calibration text whose sums are kept apart.
        budget: bytes of hidden states that stay in memory; the rest is on the disk. None for no bound.
        resident: the whole model is in memory, instead of a layer at a time.
    """

    shape: ModelShape
    config: CompressionConfig
    layer: LayerPlan
    machine: Machine
    tokens: int
    evaluation_tokens: int
    planning_tokens: int
    steps: int
    step_tokens: int
    folds: int
    budget: int | None
    resident: bool

    @property
    def layer_bytes(self) -> int:
        """The largest module that is in memory as a whole: a decoder layer, the embedding or the head."""
        return max(self.shape.layer_params, self.shape.head_params) * self.shape.itemsize

    @property
    def base(self) -> int:
        """Before a weight is read."""
        return self.machine.base_bytes + TOKENIZER

    @property
    def held(self) -> int:
        """In every stage."""
        model = self.shape.computed_bytes if self.resident else self.shape.layer_params * self.shape.itemsize
        return self.base + model

    @property
    def followed_tokens(self) -> int:
        """What correction steps read, behind the dense model, and what judges them, behind the dense and the compressed one."""
        return (self.steps + 2) * self.step_tokens if self.config.corrects and self.steps else 0

    @property
    def hidden_bytes(self) -> int:
        """Hidden states of all windows between two layers; those of the dense model beside them where it is followed."""
        return (
            (self.tokens + self.followed_tokens + self.evaluation_tokens) * self.shape.hidden_size * self.shape.itemsize
        )

    def in_memory(self, hidden: int) -> int:
        """What the budget leaves there of that many bytes of hidden states."""
        return hidden if self.budget is None else min(hidden, self.budget)

    def read(self) -> int:
        """A file is looked through in pieces; the embedding or a layer may be there as a whole."""
        return max(self.held, self.base + self.layer_bytes) + self.shape.head_params

    def sample(self, texts: Texts, *, whole: bool) -> int:
        """Windows written at once, with their keys and values; the whole model where it fits, else a layer and both ends."""
        shape, windows = self.shape, min(texts.own_windows, texts.sample_windows)
        cache = windows * texts.seq_len * shape.num_layers * 2 * shape.projections["k_proj"][0] * shape.itemsize
        # Embedding and head come from the files one by one, also where they are tied.
        ends = 2 * shape.head_params * shape.itemsize
        layers = shape.num_layers if whole else 1
        model = shape.computed_bytes if self.resident else ends + layers * shape.layer_params * shape.itemsize
        return self.base + model + cache + DRAW_COPIES * windows * shape.vocab_size * 4

    def evaluate(self, text_tokens: int) -> int:
        """The head with the logits of one batch, beside the hidden states of the text."""
        shape = self.shape
        batch = min(EVALUATION_BATCH, text_tokens)
        loss = self._head(batch, shape.itemsize + 4 * LOGIT_COPIES)
        hidden = self.in_memory(text_tokens * shape.hidden_size * shape.itemsize)
        return self.held + hidden + max(loss, self._forward(batch))

    def plan(self) -> int:
        """The hidden states before every layer, and the sums and spectra of one; metrics of outputs are on the disk."""
        shape, config = self.shape, self.config
        if config.allocation == "flap":
            return self.held + self.in_memory(self.hidden_bytes) + self._forward(min(BATCH_TOKENS, self.tokens))
        batch = min(BACKWARD_TOKENS, self.planning_tokens)
        states, backward = self._backward(self.planning_tokens)
        loss = self._head(batch, shape.itemsize + 4 * (LOGIT_COPIES + LOGIT_GRADIENTS))
        roles = ["down_proj"] if config.target == "stock" else ["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"]
        sizes = [size for role in roles for size in shape.projections[role]]
        sums = sum(self._sums(size, prices=True) for size in sizes)
        update = max(self._updating(size, batch, prices=True) for size in sizes)
        pricing = 0 if config.allocation != "loss" or config.target == "stock" else self._pricing()
        return self.held + self.in_memory(states) + max(sums + max(backward + update, pricing), loss)

    def calibrate(self) -> int:
        """Hidden states, a batch on its way through a layer, and the sums of its inputs."""
        batch = min(BATCH_TOKENS, self.tokens)
        inputs = self._summed_inputs()
        sums = [self.folds * self._sums(size) for size in inputs]
        together = sum(sums) if self.config.sequential == "layer" else max(sums, default=0)
        updating = max((self._updating(size, batch) for size in inputs), default=0)
        return self.held + self.in_memory(self.hidden_bytes) + together + self._forward(batch) + updating

    def factorize(self) -> int:
        """One problem at a time, with its weight in float64 and the metric that it is judged on."""
        shape, config = self.shape, self.config
        most = 0
        for role, rank in self.layer.ranks.items():
            out, inner = shape.projections[role]
            weighed = role in roles_with_output_metric(config)
            print_of = Footprint(
                out,
                inner,
                rank,
                method=self.machine.rule.choose(min(out, inner), rank, spectrum=False),
                metric=metric_axes(config),
                output_metric=weighed,
                converted=False,
            )
            metric = self.folds * self._sums(inner) + 3 * DOUBLE * inner**2 if metric_axes(config) == 2 else 0
            metric += DOUBLE * out**2 if weighed else 0
            together = 3 if role in ("q_proj", "k_proj", "v_proj") else 1
            weights = together * DOUBLE * out * inner
            after = 2 * DOUBLE * rank * (out + inner) + 4 * DOUBLE * out * inner
            most = max(most, metric + weights + max(working_bytes([print_of]), after))
        others = self._other_sums()
        return self.held + self.in_memory(self.hidden_bytes) + most + others

    def prune(self) -> int:
        """Scores piece by piece; ridges judged on a sample of outputs beside both folds; the refit beside their sum.

        Refits are solved in place; LAPACK copies the matrix while it is small.
        """
        hidden, width = self.shape.projections["down_proj"]
        kept = self.layer.intermediate_size
        size = 4 if sums_dtype(width) == "float32" else DOUBLE
        held = self.held + self.in_memory(self.hidden_bytes) + self._other_sums()
        scoring = 3 * DOUBLE * hidden * min(CHANNELS, width)
        if not self.config.repair:
            return held + scoring
        solving = (1 if kept >= IN_PLACE_FROM else 2) * kept**2
        judging = self.folds * width**2 + solving + 4 * min(JUDGED_OUTPUTS, hidden) * width
        refitting = width**2 + solving + 4 * hidden * width
        return held + max(self.folds * width**2 * size + scoring, max(judging, refitting) * size)

    def correct(self, layer_params: int) -> int:
        """The hidden states of one step before every layer, those of the dense model, the gradients of one layer by fold, and a
        batch on its way back.

        Args:
            layer_params: of one compressed layer, that move.
        """
        shape, tokens = self.shape, self.step_tokens
        states, backward = self._backward(tokens)
        states += self.followed_tokens * shape.hidden_size * shape.itemsize
        loss = self._head(min(BACKWARD_TOKENS, tokens), 2 * (shape.itemsize + 4))
        largest = shape.hidden_size * max(shape.hidden_size, self.layer.intermediate_size)
        gradients = self.folds * layer_params * (DOUBLE if largest <= EXACT_NUMBERS else 4)
        copies = 4 * shape.num_layers * layer_params if self.resident and shape.itemsize < 4 else 0
        layer = gradients + backward + 2 * 4 * largest  # a product, or signs, beside an exact weight
        return self.held + copies + self.in_memory(states) + max(layer, loss)

    def _head(self, tokens: int, word_bytes: int) -> int:
        """A batch in the head, with so many bytes for each word of each token."""
        head = 0 if self.resident else self.shape.head_params * self.shape.itemsize
        return head + tokens * self.shape.vocab_size * word_bytes

    def _backward(self, tokens: int) -> tuple[int, int]:
        """Hidden states before every layer, and a batch on its way back through one."""
        shape, batch = self.shape, min(BACKWARD_TOKENS, tokens)
        states = tokens * shape.hidden_size * shape.itemsize * (shape.num_layers + 2)
        layer = batch * (BACKWARD_HIDDEN * shape.hidden_size + BACKWARD_INNER * shape.width) * shape.itemsize
        return states, layer

    def _forward(self, tokens: int) -> int:
        wide = FORWARD_HIDDEN * self.shape.hidden_size + FORWARD_INNER * self.shape.width
        return tokens * wide * self.shape.itemsize

    def _sums(self, features: int, *, prices: bool = False) -> int:
        return features**2 * (4 if sums_dtype(features, prices=prices) == "float32" else DOUBLE)

    def _updating(self, features: int, tokens: int, *, prices: bool = False) -> int:
        """Products in float64 are made beside the sums, those in float32 in place; tokens are converted in chunks."""
        wide = sums_dtype(features, prices=prices) == "float32"
        chunk = min(CHUNK_TOKENS, tokens) * features * (4 if wide else DOUBLE)
        return tokens * features * 4 + chunk + (0 if wide else 2 * self._sums(features))

    def _summed_inputs(self) -> list[int]:
        """Channels of the inputs whose outer products are summed up, all of a layer."""
        config, projections = self.config, self.shape.projections
        found = []
        if metric_axes(config) == 2:
            roles = ("q_proj", "o_proj", "gate_proj", "down_proj")
            found += [projections[role][1] for role in roles if role in self.layer.ranks]
        if config.repair and config.mlp_method == "prune" and self.layer.intermediate_size < self.shape.width:
            found.append(self.shape.width)
        return found

    def _other_sums(self) -> int:
        """Of inputs whose turn comes later, where all are observed at once; those of a pruned FFN, the largest, go first."""
        if self.config.sequential != "layer":
            return 0
        inputs = self._summed_inputs()
        if self.config.mlp_method == "prune" and self.layer.intermediate_size < self.shape.width and self.config.repair:
            inputs.remove(self.shape.width)
        return sum(self.folds * self._sums(size) for size in inputs)

    def _pricing(self) -> int:
        """The larger of a spectrum and of the FFN's Cholesky factor."""
        hidden, width = self.shape.projections["down_proj"]
        ffn = (1 if width >= IN_PLACE_FROM else 2) * width**2 * 4 + 3 * hidden * width * 4
        out, inner = self.shape.projections["q_proj"]
        spectrum = DOUBLE * (4 * out * inner + 2 * inner**2 + 3 * out**2)
        return max(ffn, spectrum)
