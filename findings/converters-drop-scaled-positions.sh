#!/usr/bin/env bash
# CTranslate2 4.8.5 drops the scaling of rotary positions of Llama 3.1's kind, ONNX Runtime GenAI 0.18.0 that by one factor: both take
# such a Llama folder of transformers 5.24.0, and run it unscaled.
#
# Source: CTranslate2's converters/transformers.py has "llama3" among its supported types and hands over low_freq_factor and
# high_freq_factor; specs/attention_spec.py writes the factor itself for "linear" only, and the runtime (src/layers/attention_layer.cc)
# then has its default, 1. GenAI's models/builders/base.py (make_rope_init) has a branch for "linear"; its Llama builder has one of its
# own, which knows "llama3" only and takes the rest as unscaled.
# Expected: the losses of transformers (modeling_rope_utils.py), or a refusal, as CTranslate2 gives of types that it does not know.
# Seen: the losses of the same weights without scaling, and nothing is printed. Each does right what the other drops.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0
"$work/venv/bin/pip" install --quiet transformers==5.24.0 ctranslate2==4.8.5 onnxruntime-genai==0.18.0 onnxruntime==1.32.0 onnx-ir==1.1.0
cd "$work"
"$work/venv/bin/python" - <<'PYTHON' 2>/dev/null
import subprocess, sys, ctranslate2, numpy as np, onnxruntime_genai, torch
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
words = Tokenizer(models.WordLevel({f"w{index}": index for index in range(100)}, "w0"))
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="w0", eos_token="w0", unk_token="w0")
KINDS = {"plain": {"rope_type": "default"}, "linear": {"rope_type": "linear", "factor": 8.0}, "llama3": {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}}
ids = torch.randint(100, (1, 128), generator=torch.Generator().manual_seed(0))
def save(rope):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=100, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=16384, rope_parameters={"rope_theta": 500000.0} | rope, tie_word_embeddings=False)).eval()
    for weight in (weight for weight in model.parameters() if weight.ndim == 2):
        weight.data.normal_(0, 0.2)
    model.save_pretrained("model"); tokenizer.save_pretrained("model"); return model

def losses(logits):
    return torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="none")

def ctranslate2_says():
    ctranslate2.converters.TransformersConverter("model").convert("converted", force=True)
    host = ctranslate2.Generator("converted", device="cpu", compute_type="float32", intra_threads=1)
    return -torch.tensor(host.score_batch([tokenizer.convert_ids_to_tokens(ids[0].tolist())])[0].log_probs)

def genai_says():
    options = "-m onnxruntime_genai.models.builder -i model -o onnx -p fp32 -e cpu -c cache"
    subprocess.run([sys.executable, *options.split()], check=True, capture_output=True)
    host = onnxruntime_genai.Model("onnx")
    generator = onnxruntime_genai.Generator(host, onnxruntime_genai.GeneratorParams(host))
    generator.append_tokens(ids[0].numpy().astype(np.int32))
    return losses(torch.from_numpy(np.array(generator.get_output("logits"))))
with torch.no_grad():
    expected = {name: losses(save(rope)(ids).logits) for name, rope in KINDS.items()}
for host, says, dropped in (("CTranslate2", ctranslate2_says, "llama3"), ("GenAI", genai_says, "linear")):
    for name, rope in KINDS.items():
        save(rope); found = says()
        wrong, unscaled = ((found - expected[other]).abs().max().item() for other in (name, "plain"))
        print(f"{host}, {name}: a token's loss differs by {wrong:.1e} at most, and by {unscaled:.1e} from that without scaling")
        assert (unscaled < 1e-3 < 1e-1 < wrong) if name == dropped else wrong < 1e-3, "another behaviour than was seen"
PYTHON
