#!/usr/bin/env bash
# xllamacpp 2026.10.11549 (llama.cpp's server in a Python package): a completion that asks for probabilities (n_probs) gets none at
# all for a token that is only a part of a character, although the token is generated and counted.
#
# Source: llama.cpp's tools/server/README.md: with n_probs above 0 the response contains the probabilities of the top tokens for
# each generated token; OpenAI's API, whose form the answer has, gives an entry (with `bytes`) for such tokens too.
# Expected: one entry per generated token, whatever its bytes are.
# Seen: the same prompt, made to answer by a logit bias: "a" comes with its 5 candidates; the first byte of a two-byte character is
# generated (1 token is counted), and `logprobs` is missing. Who adds up losses by the server's answers drops such tokens.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet xllamacpp==2026.10.11549 gguf==0.19.0
cd "$work"
"$work/venv/bin/python" - <<'PYTHON' 2>/dev/null
import numpy as np, xllamacpp
from gguf import GGUFWriter, TokenType

# The byte alphabet of GPT-2's tokenizers: printable bytes are themselves, the others follow from 256 on.
shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
others = [byte for byte in range(256) if byte not in shown]
alphabet = {byte: chr(byte if byte in shown else 256 + others.index(byte)) for byte in range(256)}
tokens = [alphabet[byte] for byte in range(256)] + ["<end>"]
hidden, inner, vocabulary = 64, 96, len(tokens)
random = np.random.default_rng(0)
w = GGUFWriter("model.gguf", "llama")
w.add_block_count(1); w.add_context_length(256); w.add_vocab_size(vocabulary); w.add_embedding_length(hidden)
w.add_feed_forward_length(inner); w.add_head_count(4); w.add_head_count_kv(4); w.add_rope_dimension_count(16)
w.add_layer_norm_rms_eps(1e-6)
w.add_tokenizer_model("gpt2"); w.add_tokenizer_pre("gpt-2"); w.add_token_list(tokens); w.add_token_merges(["a b"])
w.add_token_types([TokenType.NORMAL] * 256 + [TokenType.CONTROL]); w.add_eos_token_id(256); w.add_bos_token_id(256)
def add(name, *shape):
    w.add_tensor(name, random.normal(0, 0.1, shape).astype(np.float32) if len(shape) > 1 else np.ones(shape, np.float32))
add("token_embd.weight", vocabulary, hidden); add("output.weight", vocabulary, hidden); add("output_norm.weight", hidden)
for name in ("attn_norm", "ffn_norm"):
    add(f"blk.0.{name}.weight", hidden)
for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
    add(f"blk.0.{name}.weight", hidden, hidden)
for name, shape in (("ffn_gate", (inner, hidden)), ("ffn_up", (inner, hidden)), ("ffn_down", (hidden, inner))):
    add(f"blk.0.{name}.weight", *shape)
w.write_header_to_file(); w.write_kv_data_to_file(); w.write_tensors_to_file(); w.close()

params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.n_parallel, params.warmup, params.cpuparams.n_threads = "model.gguf", 256, 1, False, 1
server = xllamacpp.Server(params)
def ask(byte):
    request = {"prompt": [97, 98, 99], "n_predict": 1, "n_probs": 5, "logit_bias": [[byte, 1000.0]]}
    answer = server.handle_completions(request)
    return answer["usage"]["completion_tokens"], answer["choices"][0].get("logprobs")
whole, half = ask(ord("a")), ask(0xC3)
print(f"a: {whole[0]} token, {len(whole[1]['content'][0]['top_logprobs'])} candidates; half a character: {half[0]} token, logprobs {half[1]}")
assert whole[0] == half[0] == 1 and len(whole[1]["content"][0]["top_logprobs"]) == 5 and not half[1], "another behaviour than was seen"
PYTHON
