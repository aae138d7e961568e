#!/usr/bin/env bash
# lm_eval 0.4.13 (lm-evaluation-harness), transformers 5.24.0: log-probabilities of a bfloat16 model are rounded to bfloat16, and
# choices that the model tells apart tie; of equal ones the first is taken.
#
# Source: lm_eval/models/huggingface.py, HFLM: `softmax_dtype`, "override dtype for softmax computation, which can help with
# numerical stability; if None, uses the model's default dtype"; a model in bfloat16 is the usual case (`dtype="auto"`).
# Expected: logits 1 and 1.0078125, both bfloat16, beside one of 7 give -6.0059 and -5.9981.
# Seen: -6 and -6. At -6 neighbouring bfloat16 numbers are 0.03 apart, and the sum over a continuation's tokens is rounded too.
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

words = Tokenizer(models.WordLevel({word: place for place, word in enumerate([*"abcd"])}, unk_token="d"))
words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="d")
model = LlamaForCausalLM(LlamaConfig(vocab_size=4, hidden_size=4, intermediate_size=4, num_hidden_layers=1, num_attention_heads=2, tie_word_embeddings=False, rms_norm_eps=0.0))
with torch.no_grad():  # logits after "a" are 1, 1.0078125, 7 and 0: all of them bfloat16
    model.model.layers[0].self_attn.o_proj.weight.zero_(); model.model.layers[0].mlp.down_proj.weight.zero_()
    model.model.embed_tokens.weight.copy_(torch.eye(4))
    model.lm_head.weight.zero_(); model.lm_head.weight[:, 0] = torch.tensor([1, 1.0078125, 7, 0]) / 2
model = model.to(torch.bfloat16)
asked = [Instance("loglikelihood", {}, ("a", choice), place, metadata=("t", 0, 1)) for place, choice in enumerate([" a", " b"])]
def scores(**options):
    host = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, **options)
    return [found for found, _ in host.loglikelihood(asked, disable_tqdm=True)]
with torch.no_grad():
    logits = model(torch.tensor([[0]])).logits[0, -1].tolist()
print("logits", logits, "scores", scores(), "with softmax_dtype=float32", scores(softmax_dtype="float32"))
assert logits[1] > logits[0], "another model"
low, high = scores(softmax_dtype="float32")
assert high > low and len(set(scores())) == 1, "another behaviour than was seen"
PYTHON
