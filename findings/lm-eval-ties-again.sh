#!/usr/bin/env bash
# lm_eval 0.4.13 (lm-evaluation-harness), transformers 5.24.0: a checkpoint with an output head of its own, whose config.json says
# tie_word_embeddings, is one model for from_pretrained and another for the harness, which changes a model in memory too.
#
# Source: transformers' modeling_utils.py, tie_weights: where both tensors are in the checkpoint and differ, "we will NOT tie them",
# with a warning. lm_eval/models/huggingface.py, HFLM.__init__: `self.model.tie_weights()` on whatever it is given.
# Expected: the harness scores the model that from_pretrained gives, and leaves one that it is handed as it is.
# Seen: called again, tie_weights goes by the config alone: the head becomes the embedding matrix, and all scores are those of
# another model, by path and in memory.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile torch==2.13.0
"$work/venv/bin/pip" install --quiet --no-compile transformers==5.24.0 accelerate==1.15.0 datasets==5.2.0 lm_eval==0.4.13
cd "$work"
OMP_NUM_THREADS=1 "$work/venv/bin/python" - <<'PYTHON' 2>/dev/null
import torch
from lm_eval.models.huggingface import HFLM
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from safetensors.torch import load_file, save_file

config = LlamaConfig(vocab_size=4, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, tie_word_embeddings=True)
torch.manual_seed(0)
LlamaForCausalLM(config).save_pretrained("model")
PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({word: place for place, word in enumerate("abcd")}, unk_token="d")), eos_token="d").save_pretrained("model")
tensors = load_file("model/model.safetensors")
tensors["lm_head.weight"] = torch.randn(4, 8)  # a head of its own: transformers keeps it, whatever the config says
save_file(tensors, "model/model.safetensors", metadata={"format": "pt"})
ids = torch.tensor([[0, 1, 2]])
with torch.no_grad():
    model = AutoModelForCausalLM.from_pretrained("model")
    loaded = model(ids).logits
    scored = HFLM(pretrained="model", device="cpu")._model_call(ids)
    HFLM(pretrained=model, tokenizer="model")
    afterwards = model(ids).logits
print("transformers", loaded[0, -1].tolist(), "harness", scored[0, -1].tolist())
assert torch.equal(model.get_output_embeddings().weight, model.get_input_embeddings().weight)
assert not torch.allclose(loaded, scored, atol=0.01) and torch.equal(scored, afterwards), "another behaviour than was seen"
PYTHON
