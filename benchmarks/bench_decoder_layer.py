"""One decoder layer, dense and compressed, with torch's matmuls and with ours: decoding and prefill in bfloat16.

    pytest benchmarks/bench_decoder_layer.py --benchmark-only

Real transformers layers with random weights and the ranks and widths of the paper's recipe. Decoding adds one token to each
of 1, 4 or 16 sequences of 128; prefill reads 512 tokens. ``dense, ours`` shows what the kernels do without compression.
"""

import common
import pytest
import torch
from random_models import SIZES, decoder_layers, optimized, random_model

WORK = {"decode-1": (1, 1), "decode-4": (4, 1), "decode-16": (16, 1), "prefill-512": (1, 512)}  # batch, tokens of each
KINDS = {  # compressed, optimized
    "dense": (False, False),
    "dense, ours": (False, True),
    "two matmuls": (True, False),
    "lorap": (True, True),
}
CACHE_LENGTH = 128


class FixedCache:
    """Keys and values of 128 tokens and a place for one more, so that every step does the same work."""

    def __init__(self, config, layers, batch):
        shape = (batch, config.num_key_value_heads, CACHE_LENGTH + 1, config.head_dim)
        self.pairs = [[common.random(*shape, dtype=torch.bfloat16) for _ in range(2)] for _ in range(layers)]

    def update(self, key, value, layer_idx, *_, **__):
        """Write the last position of a layer and return all of it, as transformers' caches do."""
        for kept, new in zip(self.pairs[layer_idx], (key, value), strict=True):
            kept[:, :, -1:] = new
        return self.pairs[layer_idx]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("work", WORK)
@pytest.mark.parametrize("sparsity", [0.2, 0.5])
@pytest.mark.parametrize("name", SIZES)
@torch.inference_mode()
def bench_decoder_layer(benchmark, name, sparsity, work, kind):
    compressed, ours = KINDS[kind]
    batch, tokens = WORK[work][0], common.tokens_of(benchmark, WORK[work][1])
    model, layers = _model(benchmark, name, sparsity if compressed else 0.0)
    weight_bytes = sum(parameter.nbytes for parameter in layers[0].parameters())
    common.skip_if_slow(benchmark, torch.bfloat16, batch * tokens * weight_bytes)
    plain, layers = layers[0], decoder_layers(optimized(model)) if ours else layers
    cache = FixedCache(model.config, len(layers), batch) if tokens == 1 else None
    hidden = common.random(batch, tokens, model.config.hidden_size, dtype=torch.bfloat16)
    first = CACHE_LENGTH if cache else 0
    rotary = model.model.rotary_emb(hidden, torch.arange(first, first + tokens, device=common.DEVICE)[None])

    def call(layer):
        y = layer(hidden, position_embeddings=rotary, past_key_values=cache)
        return y[0] if isinstance(y, tuple) else y

    y = common.measure(
        benchmark,
        call,
        [(layer,) for layer in layers],
        group=f"{name} layer, sparsity {sparsity}, bfloat16, {work}",
        nbytes=weight_bytes + (sum(t.nbytes for t in common.tensors(cache.pairs[0])) if cache else 0),
        flops=batch * tokens * weight_bytes,  # two for each weight of two bytes
        weight_bytes=weight_bytes,
        tokens=batch * tokens,
    )
    common.assert_same(y, call(plain))


def _model(benchmark, name, sparsity):
    if benchmark.disabled:
        name = "tiny"
    layers = 1
    if name == "smollm2-135m":  # 7 MB a layer, or less; the others are larger than any cache
        layers = common.copies_needed(common.DTYPES["bfloat16"].itemsize * int((1 - sparsity) * 3.5e6))
    model = random_model(name, sparsity, torch.bfloat16, layers=layers)
    return model, decoder_layers(model)
