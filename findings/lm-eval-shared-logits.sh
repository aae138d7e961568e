#!/usr/bin/env bash
# lm_eval 0.4.13 (lm-evaluation-harness), transformers 5.24.0: the same request has another score when a longer continuation of the
# same words stands in the same task.
#
# Source: lm_eval/models/huggingface.py, HFLM: `logits_cache` (on by default) reuses "logits across requests that share the same
# context"; a comment in `_loglikelihood_tokens` says that continuations "can be sliced at diff points".
# Expected: the score of ("a b c d", " f") is log p(f | a b c d), whatever else is asked.
# Seen: requests are grouped by the tokens of context and continuation without the last one. ("a b", " c d e") is in the same group,
# and the logits of its continuation are taken from their beginning for all: the score of (..., " f") is log p(f | a b).
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile torch==2.13.0
"$work/venv/bin/pip" install --quiet --no-compile transformers==5.24.0 accelerate==1.15.0 datasets==5.2.0 lm_eval==0.4.13
cd "$work"
OMP_NUM_THREADS=1 "$work/venv/bin/python" - <<'PYTHON' 2>/dev/null
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

words = Tokenizer(models.WordLevel({word: place for place, word in enumerate(["?", *"abcdef"])}, unk_token="?"))
words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="?")
torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(vocab_size=7, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, initializer_range=1.0))
pairs = [("a b", " c d e"), ("a b c d", " f")]
def scores(pairs, **options):
    asked = [Instance("loglikelihood", {}, pair, place, metadata=("t", place, 1)) for place, pair in enumerate(pairs)]
    host = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, **options)
    return [round(found, 4) for found, _ in host.loglikelihood(asked, disable_tqdm=True)]
alone, together, uncached = scores(pairs[1:])[0], scores(pairs)[1], scores(pairs, logits_cache=False)[1]
with torch.no_grad():
    logits = model(torch.tensor([[1, 2]])).logits[0, -1].log_softmax(-1)
print(f"alone {alone}, without the cache {uncached}, with it {together}; after 'a b': {logits[6]:.4f}")
assert alone == uncached != together == round(float(logits[6]), 4), "another behaviour than was seen"
PYTHON
