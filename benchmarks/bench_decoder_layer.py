"""One decoder layer, dense against compressed, prefill and decode: latency and bytes of weights.

    pytest benchmarks/bench_decoder_layer.py --benchmark-only

The layers are real transformers layers with random weights, given the ranks and widths of the paper's recipe.
"""

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import lorap

MODELS = {
    "smollm2-135m": {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3},
    "llama-3.2-1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
}


@pytest.mark.parametrize("sparsity", [0.0, 0.2, 0.5], ids=["dense", "0.2", "0.5"])
@pytest.mark.parametrize("tokens", [1, 128], ids=["decode", "prefill128"])
@pytest.mark.parametrize("name", MODELS)
@torch.inference_mode()
def bench_decoder_layer(benchmark, name, tokens, sparsity):
    benchmark.group = f"{name} layer, {'decode 1 token' if tokens == 1 else f'prefill {tokens} tokens'}, float32"
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=64, num_hidden_layers=1, **MODELS[name])
    model = AutoModelForCausalLM.from_config(config).eval()
    ids = torch.randint(0, 64, (2, 64))
    if sparsity:
        options = lorap.CompressionConfig(sparsity=sparsity)
        model, _ = lorap.compress(model, calibration=ids, config=options, progress=False)
    layer = model.model.layers[0]
    hidden = torch.randn(1, tokens, config.hidden_size)
    rotary = model.model.rotary_emb(hidden, torch.arange(tokens)[None])
    benchmark.extra_info["weight_bytes"] = sum(4 * parameter.numel() for parameter in layer.parameters())
    output = benchmark(lambda: layer(hidden, position_embeddings=rotary))
    output = output[0] if isinstance(output, tuple) else output
    assert torch.isfinite(output).all()
