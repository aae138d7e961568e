"""Whole models for gpu_check.sh: a random LLaMA-7B, dense and compressed, plain and pivoted; one layer calibrated and factorized.

Milliseconds of a token from one CUDA graph of the decode step, tokens/s of ``generate``, milliseconds of a prefill, peak memory,
and how far the logits of two ways through the same weights are apart. In a dry run everything is tiny and eager, and host syncs
in the decode step, which a capture could not survive, are counted instead. Never run on a GPU.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from gpu_timings import Item, Row
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

BATCHES = (1, 8, 16)
CONTENDERS = {  # name -> (sparsity, pivoted, optimized, backend); those of the same sparsity and storage have the same weights
    "0.5, torch": (0.5, False, False, "reference"),
    "0.5, lorap": (0.5, False, True, "auto"),
    "0.5 pivoted, lorap": (0.5, True, True, "auto"),
    "dense, torch": (0.0, False, False, "reference"),
    "dense, lorap": (0.0, False, True, "auto"),
    "0.2, torch": (0.2, False, False, "reference"),
    "0.2, lorap": (0.2, False, True, "auto"),
}


class HostSyncs(TorchDispatchMode):
    """Counts what waits for the GPU."""

    found = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found += any(name in str(func) for name in ("_local_scalar_dense", "nonzero"))
        return func(*args, **(kwargs or {}))


def model_rows(device: torch.device, scale: int) -> Iterator[Item]:
    """A row for each contender and number of sequences, and one for its prefill and ``generate``."""
    from random_models import optimized, random_model

    from lorap.nn import dispatch

    gpu = device.type == "cuda"
    size, layers, batches = ("llama-7b", 32, BATCHES) if scale == 1 else ("tiny", 2, BATCHES[:2])
    first: dict[tuple[Any, ...], Tensor] = {}
    for name, (sparsity, pivoted, ours, backend) in CONTENDERS.items():
        random_model.cache_clear()  # one model at a time
        torch.manual_seed(0)
        plain = random_model(size, sparsity, torch.bfloat16, layers=layers, vocab_size=32000 if gpu else 64)
        plain = _pivoted(plain) if pivoted else plain
        with dispatch.use(backend):
            model = optimized(plain) if ours else plain
        for batch in batches:

            def decode(model=model, batch=batch, key=(sparsity, pivoted, batch), backend=backend) -> Row:
                with dispatch.use(backend):
                    found, logits = _decode(model, batch)
                reference = first.setdefault(key, logits)
                return found | {"difference": float((logits - reference).norm() / reference.norm())}

            yield {"model": name, "batch": batch}, decode

        def rest(model=model, backend=backend) -> Row:
            with dispatch.use(backend):
                prefill = _seconds(lambda: model.model(input_ids=_ids(model, 1, 2048 // scale), use_cache=False), 3)
                rate = _generate(model, 32 if gpu else 4)
            memory = {"peak_gb": torch.cuda.max_memory_allocated() / 1e9} if gpu else {}
            weights = sum(parameter.nbytes for parameter in model.parameters()) / 1e9
            return {"prefill_ms": 1e3 * prefill, "generate_per_s": rate, "weights_gb": weights} | memory

        if gpu:
            torch.cuda.reset_peak_memory_stats()
        yield {"model": name, "prefill": 2048 // scale}, rest
        del plain, model


def _pivoted(model: Any) -> Any:
    """The same sizes in pivoted storage, with values of their own: no rows are picked, as random ones would do."""
    from lorap import LowRankLinear

    for layer in model.model.layers:
        for name, old in list(layer.self_attn.named_children()):
            if isinstance(old, LowRankLinear):
                rows = torch.arange(old.rank, device=old.weight.device) * old.out_features // old.rank
                left = old.left.weight.data[: old.out_features - old.rank].contiguous()
                new = LowRankLinear.from_factors(left, old.right.weight.data, None, rows)
                setattr(layer.self_attn, name, new)
    return model.eval()


def _ids(model: Any, batch: int, length: int) -> Tensor:
    ids = torch.arange(length, device=model.device)[None].repeat(batch, 1)
    return ids % model.config.vocab_size


@torch.inference_mode()
def _decode(model: Any, batch: int) -> tuple[Row, Tensor]:
    """Milliseconds of a step, and the logits after the prompt."""
    from transformers import StaticCache

    import lorap

    gpu = model.device.type == "cuda"
    prompt, steps = (128, 20) if gpu else (8, 2)
    cache = StaticCache(config=model.config, max_cache_len=prompt + 8 * steps + 32)
    logits = model(input_ids=_ids(model, batch, prompt), past_key_values=cache, use_cache=True).logits[:, -1:]
    ids = logits.argmax(-1)

    def step() -> None:
        ids.copy_(model(input_ids=ids, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1))

    if not gpu:
        with HostSyncs() as syncs:
            step()
        return {"ms": 1e3 * _seconds(step, steps), "host_syncs": syncs.found}, logits
    lorap.warm_up(model, tokens=batch)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    graph.replay()
    return {"ms": 1e3 * statistics.median(_seconds(graph.replay, steps) for _ in range(3))}, logits


@torch.inference_mode()
def _generate(model: Any, new_tokens: int) -> float:
    """Tokens a second of transformers' own loop, which runs eagerly."""
    ids = _ids(model, 1, 16)
    options = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False, "pad_token_id": 0}
    return new_tokens / _seconds(lambda: model.generate(ids, attention_mask=torch.ones_like(ids), **options), 1)


@torch.inference_mode()
def _seconds(call: Callable[[], Any], repeats: int) -> float:
    """Of one of ``repeats`` calls, after one that is not counted."""
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / repeats


def layer_rows(device: torch.device, scale: int) -> Iterator[Item]:
    """A 4096-wide layer's second moment over 32,768 tokens, and what factorizing with it takes."""
    from lorap import factorize
    from lorap.nn import ops

    width, tokens = 4096 // scale, 32768 // scale
    x = torch.randn(tokens, width, device=device, dtype=torch.bfloat16)
    weight = torch.randn(width, width, device=device)

    def moment() -> Row:
        seconds = _seconds(lambda: ops.second_moment(x), 1)
        exact = x[:4096].double().T @ x[:4096].double()
        found = ops.second_moment(x[:4096])[0]
        return {"seconds": seconds, "error": float((found - exact).norm() / exact.norm())}

    def factors() -> Row:
        metric = ops.second_moment(x)[0]
        return {"seconds": _seconds(lambda: factorize(weight, width // 4, metric), 1)}

    yield {"kind": f"second moment of {tokens} x {width}"}, moment
    yield {"kind": f"factorize {width} x {width} with it"}, factors
