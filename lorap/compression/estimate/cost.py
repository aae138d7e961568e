"""The stages of ``lorap compress``: seconds and peak memory of each, with the formula that they come from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from lorap.architectures import MLP, PROJECTIONS, SHARED_INPUTS
from lorap.calibration.backward import BATCH_TOKENS as BACKWARD_TOKENS
from lorap.calibration.stream import BATCH_TOKENS
from lorap.compression.estimate import work
from lorap.compression.estimate.cost_terms import CostTerm, CostTerms
from lorap.compression.estimate.passes import LOSS_PASSES, Passes
from lorap.evaluation.perplexity import BATCH_TOKENS as EVALUATION_BATCH
from lorap.requirements import (
    allocates_by_loss,
    compressed_roles,
    roles_needing_gradients,
    roles_with_output_metric,
    sums_of,
)

# Float32 passes that it takes as long as to draw the next token from logits, random numbers aside.
DRAW_PASSES = 60
# Opening the tokenizer, building the model without weights, tokenizing texts: seconds, whatever the model's size.
SETUP = 1.5
# A GGUF file's header is checked and its tokenizer built (1.2 s), texts are tokenized (0.7 s), and weights are dequantized with
# numpy on one core: seconds, and parameters/s (3.3 to 4.1 s in three turns), of processor time with SmolLM2-135M (Q4_1).
GGUF_SETUP = 2.0
GGUF_RATE = 35e6


@dataclass(frozen=True)
class Stage:
    """One stage of a run: its parts, and the bytes that are held at its fullest moment."""

    name: str
    parts: Sequence[CostTerm]
    memory_bytes: int

    @property
    def seconds(self) -> float:
        """Of all parts."""
        return sum(part.seconds for part in self.parts)


def stages(run: Passes) -> Iterator[Stage]:
    """In the order of the run; those that nothing is done in are left out. Stages from calibrate to keep alternate, by layer."""
    memory = run.memory
    found: list[tuple[str, CostTerms, int]] = [
        ("read and check", _read(run), memory.read()),
        ("sample", _sample(run), memory.sample(run.texts, whole=run.fits)),
        ("evaluate before", _evaluate(run, run.before, paged=True), memory.evaluate(run.texts.evaluation_tokens)),
        ("plan", _plan(run), memory.plan()),
        ("calibrate", _calibrate(run), memory.calibrate()),
        ("factorize", _factorize(run), memory.factorize()),
        ("prune and repair", _prune(run), memory.prune()),
        ("keep layers", _keep(run), memory.held),
        ("correct", _correct(run), memory.correct(sum(run.after[role] for role in compressed_roles(run.config)))),
        ("evaluate after", _evaluate(run, run.after, paged=False), memory.evaluate(run.texts.evaluation_tokens)),
        ("write", _write(run), memory.held),
    ]
    return (Stage(name, terms.parts, peak) for name, terms, peak in found if terms.parts)


def _read(run: Passes) -> CostTerms:
    terms, shape = run.terms(), run.shape
    stored = sum(shape.stored_bytes.values())
    terms.fixed("tokenizer, texts", SETUP if shape.paged else GGUF_SETUP, "whatever the size")
    terms.read_once("weights", stored, f"{stored:,} B in the files")
    if not shape.paged:
        count = sum(shape.params.values())
        terms.fixed("dequantize", count / GGUF_RATE, f"{count:,} parameters at {GGUF_RATE:,.0f} a second")
    terms.moved("look for NaN", 2 * shape.computed_bytes, f"2 x {shape.computed_bytes:,} B")
    return terms


def _sample(run: Passes) -> CostTerms:
    """Every process writes the same words, so that nothing is shared."""
    texts, shape, terms = run.texts, run.shape, run.terms()
    if not texts.own_windows:
        return terms
    rounds = -(-texts.own_windows // texts.sample_windows)
    steps, tokens = rounds * texts.seq_len, texts.own_windows * texts.seq_len
    params = shape.num_layers * shape.layer_params + shape.head_params
    terms.products("words", 2 * params * tokens, shape.dtype, f"2 x {params:,} parameters x {tokens:,} tokens")
    weights = params * shape.itemsize
    terms.moved("every weight at every step", steps * weights, f"{steps:,} steps x {weights:,} B")
    keys = shape.num_layers * 2 * shape.projections["k_proj"][0] * shape.itemsize
    formula = f"3 x {tokens:,} tokens x {texts.seq_len / 2:g} before each x {keys:,} B"
    terms.moved("keys and values", 3 * tokens * texts.seq_len / 2 * keys, formula)
    drawn = DRAW_PASSES * tokens * shape.vocab_size * 4
    terms.moved("drawing", drawn, f"{DRAW_PASSES} x {tokens:,} tokens x {shape.vocab_size:,} words x 4 B")
    words = tokens * shape.vocab_size
    terms.drawn("random numbers", words, f"{tokens:,} tokens x {shape.vocab_size:,} words")
    terms.calls("calls", steps * shape.num_layers, f"{steps:,} steps x {shape.num_layers} layers")
    run.page(terms, run.before, passes=1 if run.fits else steps)
    return terms


def _evaluate(run: Passes, params: dict[str, int], *, paged: bool) -> CostTerms:
    """Afterwards each layer is in memory anyway."""
    terms, tokens = run.terms(shared=True), run.texts.evaluation_tokens
    if not tokens:
        return terms
    if paged:
        alone = run.terms()
        run.page(alone, params)
        terms.include(alone)
    layers = run.terms(shared=True, each_layer=True)
    run.run(layers, tokens, sum(params.values()), batch=EVALUATION_BATCH, what="decoder layers")
    terms.include(layers)
    run.loss(terms, tokens)
    return terms


def _plan(run: Passes) -> CostTerms:
    config, shape, terms = run.config, run.shape, run.terms(shared=True)
    paging, layers = run.terms(), run.terms(shared=True, each_layer=True)
    dense = sum(run.before.values())
    if config.allocation == "flap" and config.sparsity > 0:
        run.page(paging, run.before)
        run.run(layers, run.texts.tokens, 2 * dense, batch=BATCH_TOKENS, what="observe and advance")
        terms.include(paging)
        terms.include(layers)
        return terms
    if not (roles := roles_needing_gradients(config)):
        return terms
    run.page(paging, run.before, passes=2)
    tokens = run.texts.planning_tokens
    what = "forward, forward again, backward"
    run.run(layers, tokens, 3 * dense, batch=BACKWARD_TOKENS, what=what, attention=4)
    for role in roles:
        for side, size in zip(("outputs", "inputs"), shape.projections[role], strict=True):
            run.second_moment(layers, tokens, size, f"{role} {side}", batch=BACKWARD_TOKENS, prices=True)
    terms.include(paging)
    terms.include(layers)
    run.loss(terms, tokens, heads=2, passes=2 * LOSS_PASSES)
    if allocates_by_loss(config):
        run.distribute(terms, [partial(_price, run, role) for role in roles])
    if nbytes := metric_bytes(run):
        kept = run.terms()
        kept.transferred("metrics of outputs", nbytes, "written", f"{nbytes:,} B")
        terms.include(kept)
    return terms


def _price(run: Passes, role: str, terms: CostTerms) -> None:
    work.price(terms, run.shape, role)


def metric_bytes(run: Passes) -> int:
    """Metrics of the outputs of all layers, float32, which wait on the disk until their layer is compressed."""
    return run.shape.num_layers * sum(
        4 * run.shape.projections[role][0] ** 2 for role in roles_with_output_metric(run.config)
    )


def _calibrate(run: Passes) -> CostTerms:
    shape, tokens = run.shape, run.texts.tokens
    terms, layers = run.terms(), run.terms(shared=True, each_layer=True)
    run.page(terms, run.before, what="dense weights")
    run.page(terms, run.after, what="compressed weights")
    for inputs, params in observations(run):
        if params:
            run.run(layers, tokens, params, batch=BATCH_TOKENS, what=f"observe {inputs[-1].replace('_', ' ')}")
        for name in inputs:
            mean, moments = sums_of(run.config, name)
            if moments:
                size, told = shape.projections[SHARED_INPUTS[name][0]][1], name.replace("_", " ")
                run.second_moment(layers, tokens, size, told, batch=BATCH_TOKENS, mean=mean)
    run.run(layers, tokens, sum(run.after.values()), batch=BATCH_TOKENS, what="advance")
    terms.include(layers)
    hidden = run.memory.hidden_bytes
    spilled = (hidden - run.memory.in_memory(hidden)) * shape.num_layers
    passes = 1 + sum(1 for _ in observations(run))
    terms.transferred("hidden states", spilled, "written", f"{shape.num_layers} x what is over the budget")
    terms.transferred(
        "hidden states", passes * spilled, "cache", f"{passes} x {shape.num_layers} x what is over the budget"
    )
    return terms


def observations(run: Passes) -> Iterator[tuple[tuple[str, ...], int]]:
    """Inputs of one layer that are observed together, in order, and the parameters that a token passes on the way to the last."""
    ranks, prunes = run.layer.ranks, run.prunes
    needed = [
        name
        for name, readers in SHARED_INPUTS.items()
        if set(readers) & set(ranks) or (prunes and name.startswith("mlp"))
    ]
    if not needed:
        return
    steps: list[tuple[str, ...]] = [tuple(needed)]
    if run.config.sequential == "sublayer":
        steps = [(name,) for name in needed if not (prunes and name.startswith("mlp"))]
        steps += [("mlp_input", "mlp_inner")] if prunes else []
    order: Mapping[str, int] = {name: place for place, name in enumerate(SHARED_INPUTS)}
    for step in steps:
        passed = [role for name in SHARED_INPUTS if order[name] < order[step[-1]] for role in SHARED_INPUTS[name]]
        # Behind what has changed; the FFN is observed before it is pruned.
        behind = run.before if run.config.sequential == "layer" else run.after
        yield step, sum((run.before if role in MLP and prunes else behind)[role] for role in passed)


def _factorize(run: Passes) -> CostTerms:
    terms = run.terms()
    for group in SHARED_INPUTS.values() if run.config.sequential == "sublayer" else (PROJECTIONS,):
        jobs: list[Callable[[CostTerms], None]] = [
            partial(_factorize_one, run, role) for role in group if role in run.layer.ranks
        ]
        run.distribute(terms, jobs)
    return terms


def _factorize_one(run: Passes, role: str, terms: CostTerms) -> None:
    work.factorize(terms, run.shape, run.config, run.layer, role)


def _prune(run: Passes) -> CostTerms:
    terms = run.terms(each_layer=True)
    if run.prunes and run.config.mlp_method == "prune":
        work.prune(terms, run.shape, run.config, run.layer)
    return terms


def _keep(run: Passes) -> CostTerms:
    """Each finished layer, so that an interrupted run goes on behind it."""
    terms = run.terms()
    nbytes = sum(run.sizes.nbytes[role] for role in PROJECTIONS)
    terms.transferred("finished layers", nbytes, "written", f"{nbytes:,} B")
    return terms


def _correct(run: Passes) -> CostTerms:
    """Forward through the dense layers; later forward, forward again, and backward to inputs and weights.

    What judges goes forward through the dense layers, and through the compressed ones before and after.
    """
    terms = run.terms(shared=True)
    steps, step_tokens = run.texts.step_tokens(run.config.correction_steps)
    if not run.config.corrects or not steps:
        return terms
    paging, layers = run.terms(), run.terms(shared=True, each_layer=True)
    run.page(paging, run.before, what="dense weights")
    run.page(paging, run.after, passes=2 * steps + 1)
    tokens, judging, params = steps * step_tokens, step_tokens, sum(run.after.values())
    run.run(layers, tokens + judging, sum(run.before.values()), batch=BACKWARD_TOKENS, what="forward, dense")
    what = "forward, forward again, backward, weights"
    run.run(layers, tokens, 4 * params, batch=BACKWARD_TOKENS, what=what, attention=4)
    run.run(layers, judging, 2 * params, batch=BACKWARD_TOKENS, what="forward, to judge by", attention=2)
    terms.include(paging)
    terms.include(layers)
    run.loss(terms, tokens, heads=3)
    run.loss(terms, judging, heads=4)
    kept = run.terms()
    nbytes, times = corrected_bytes(run), 1 if run.memory.resident else steps
    kept.transferred("corrected layers", times * nbytes, "written", f"{times:,} x {nbytes:,} B")
    terms.include(kept)
    return terms


def corrected_bytes(run: Passes) -> int:
    """Layers that are kept once more when they are corrected."""
    return sum(run.sizes.nbytes[role] for role in PROJECTIONS) if run.config.corrects and run.memory.steps else 0


def _write(run: Passes) -> CostTerms:
    terms, nbytes = run.terms(), sum(run.sizes.nbytes.values())
    terms.transferred("the folder", nbytes, "written", f"{nbytes:,} B")
    return terms
