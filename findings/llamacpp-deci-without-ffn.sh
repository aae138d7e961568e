#!/usr/bin/env bash
# xllamacpp 2026.10.11549 (llama.cpp in a Python package): in a file of architecture `deci`, a layer whose FFN was left out
# (feed_forward_length 0) loses its attention as well.
#
# Source: llama.cpp's src/models/deci.cpp loads the attention of such a layer (heads and FFN are arrays, each may be 0 by itself), and
# then goes on at `if (n_ff == 0) continue;` before the output of attention is added to the stream. Its converter (conversion/deci.py)
# writes such files from `block_configs` whose ffn_mult is null; vLLM's nemotron_nas.py and mlx-lm's nemotron-nas.py do add it.
# Expected: x + attention(norm(x)), or a refusal of the file.
# Seen: the file loads, its attention tensors are read, and other values in them change no probability at all; in the layer with an
# FFN they do.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet xllamacpp==2026.10.11549 gguf==0.19.0
cd "$work"
"$work/venv/bin/python" - <<'PYTHON' 2>/dev/null
import numpy as np, xllamacpp
from gguf import GGUFWriter, TokenType

tokens = [chr(code) for code in range(33, 127)] + ["<end>"]
hidden, widths = 64, [96, 0, 96]

def write(file, changed_layer):
    random = np.random.default_rng(0)
    w = GGUFWriter(file, "deci")
    w.add_block_count(3); w.add_context_length(256); w.add_vocab_size(len(tokens)); w.add_embedding_length(hidden)
    w.add_feed_forward_length(widths); w.add_head_count([4, 4, 4]); w.add_head_count_kv([4, 4, 4]); w.add_rope_dimension_count(16)
    w.add_layer_norm_rms_eps(1e-6)
    w.add_tokenizer_model("gpt2"); w.add_tokenizer_pre("gpt-2"); w.add_token_list(tokens); w.add_token_merges(["a b"])
    w.add_token_types([TokenType.NORMAL] * 94 + [TokenType.CONTROL]); w.add_eos_token_id(94); w.add_bos_token_id(94)
    def add(name, *shape, scale=1.0):
        value = random.normal(0, 0.1, shape) * scale if len(shape) > 1 else np.ones(shape)
        w.add_tensor(name, value.astype(np.float32))
    add("token_embd.weight", len(tokens), hidden); add("output_norm.weight", hidden)
    for layer, width in enumerate(widths):
        add(f"blk.{layer}.attn_norm.weight", hidden)
        for name in ("q", "k", "v", "output"):
            add(f"blk.{layer}.attn_{name}.weight", hidden, hidden, scale=3.0 if layer == changed_layer else 1.0)
        if width:
            add(f"blk.{layer}.ffn_norm.weight", hidden)
            for name, shape in (("gate", (width, hidden)), ("up", (width, hidden)), ("down", (hidden, width))):
                add(f"blk.{layer}.ffn_{name}.weight", *shape)
    w.write_header_to_file(); w.write_kv_data_to_file(); w.write_tensors_to_file(); w.close()

def probabilities(changed_layer):
    write("model.gguf", changed_layer)
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel, params.warmup, params.cpuparams.n_threads = "model.gguf", 256, 1, False, 1
    server = xllamacpp.Server(params)
    answer = server.handle_completions({"prompt": [3, 14, 15, 92, 65], "n_predict": 1, "n_probs": len(tokens)})
    top = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    return np.array([entry["logprob"] for entry in sorted(top, key=lambda entry: entry["id"])])

plain = probabilities(None)
with_ffn, without = (float(np.abs(probabilities(layer) - plain).max()) for layer in (0, 1))
print(f"attention three times as large: in a layer with FFN probabilities change by {with_ffn:.4f}, in one without by {without:.4f}")
assert with_ffn > 0.01 and without == 0, "another behaviour than was seen"
PYTHON
