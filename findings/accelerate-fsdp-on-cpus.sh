#!/usr/bin/env bash
# accelerate 1.15.0 (state.py, AcceleratorState.__init__) takes FSDP only where processes are on accelerators, so transformers'
# Trainer 5.24.0 with `fsdp` on two CPU processes trains replicas, as without it.
#
# Source: transformers documents `fsdp` of TrainingArguments as what enables FSDP, and accelerate its plugin, with no word on devices;
# torch's fully_shard itself runs on CPUs by gloo.
# Expected: each process holds half of every parameter (DTensor), or the request is refused.
# Seen: two whole copies under DistributedDataParallel, and no word about it.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0
"$work/venv/bin/pip" install --quiet transformers==5.24.0 accelerate==1.15.0
cat > "$work/run.py" <<'PYTHON'
import torch
from torch.distributed import device_mesh, tensor
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

def tiny():
    return LlamaForCausalLM(LlamaConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, vocab_size=32))

rows = [{"input_ids": torch.arange(8), "labels": torch.arange(8)}] * 8
arguments = TrainingArguments("out", use_cpu=True, fsdp=True, fsdp_config={"version": 2}, max_steps=1, report_to="none",
                              save_strategy="no", per_device_train_batch_size=1)
trainer = Trainer(tiny(), arguments, train_dataset=rows)
trainer.train()
sharded = fully_shard(tiny(), mesh=device_mesh.init_device_mesh("cpu", (2,)))
kinds = [any(isinstance(p.data, tensor.DTensor) for p in model.parameters()) for model in (trainer.model, sharded)]
print("processes:", arguments.world_size, trainer.accelerator.distributed_type, "sharded by the Trainer, by torch:", kinds)
assert arguments.world_size == 2 and kinds == [False, True], "another behaviour than was seen"
PYTHON
cd "$work" && OMP_NUM_THREADS=1 "$work/venv/bin/torchrun" --standalone --nproc-per-node 2 run.py
