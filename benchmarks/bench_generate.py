"""Greedy generation of 32 tokens with a model of SmolLM2-135M's size, dense and compressed, as users call it.

    pytest benchmarks/bench_generate.py --benchmark-only

``model.generate`` of transformers with random weights: its Python is part of the time, on a GPU most of it.
"""

import common
import pytest
import torch
from random_models import optimized, random_model

PROMPT_TOKENS = 16
KINDS = {  # sparsity, optimized
    "dense": (0.0, False),
    "dense, ours": (0.0, True),
    "two matmuls": (0.5, False),
    "lorap": (0.5, True),
}


@pytest.mark.parametrize("dtype", common.DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def bench_generate(benchmark, kind, dtype):
    sparsity, ours = KINDS[kind]
    name, layers, new_tokens, vocab = ("tiny", 2, 4, 64) if benchmark.disabled else ("smollm2-135m", 30, 32, 49152)
    plain = random_model(name, sparsity, common.DTYPES[dtype], layers=layers, vocab_size=vocab, tie=True)
    model = optimized(plain) if ours else plain
    ids = torch.arange(PROMPT_TOKENS, device=common.DEVICE)[None]
    options = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False, "pad_token_id": 0}
    weight_bytes = sum(parameter.nbytes for parameter in model.parameters())
    output = common.measure(
        benchmark,
        lambda: model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options),
        [()],
        group=f"generate {new_tokens} tokens, {name}, sparsity 0.5, {dtype}",
        nbytes=new_tokens * weight_bytes,
        flops=2 * (new_tokens + PROMPT_TOKENS) * sum(parameter.numel() for parameter in model.parameters()),
        graph=False,
        weight_bytes=weight_bytes,
        tokens=new_tokens,
    )
    assert output.shape == (1, PROMPT_TOKENS + new_tokens)
    common.assert_same(model(ids).logits, plain(ids).logits)
