"""What people do with a compressed model besides generating: train it, cast it, open it without its head, cut it up."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch.utils.data import Dataset
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, Trainer, TrainingArguments

import lorap
from lorap.checkpoint.build import keep_whole


@pytest.fixture(scope="module")
def folder(make_model, tokens, tmp_path_factory) -> Any:
    """Low-rank attention, pivoted where that is smaller, and FFNs of two widths."""
    config = lorap.CompressionConfig(sparsity=0.4, num_calibration_samples=8, calibration_seq_len=32)
    model, report = lorap.compress(make_model("llama-gqa"), calibration=tokens, config=config, progress=False)
    return lorap.save(model, tmp_path_factory.mktemp("options") / "small", report=report)


@torch.no_grad()
def logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    return model.eval()(tokens).logits


class Rows(Dataset):
    def __init__(self, tokens: torch.Tensor) -> None:
        self.tokens = tokens

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.tokens[index], "labels": self.tokens[index]}


def train(model: Any, tokens: torch.Tensor, out: Any) -> Any:
    arguments = TrainingArguments(
        str(out),
        max_steps=2,
        learning_rate=1e-2,
        per_device_train_batch_size=4,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
    )
    trainer = Trainer(model, arguments, train_dataset=Rows(tokens))
    trainer.train()
    trainer.save_model(str(out))
    return trainer


def test_trainer_trains_all_weights_and_saves_what_it_trained(folder, tokens, tmp_path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    train(model, tokens, tmp_path / "out")
    after = model.state_dict()
    names = [name for name in after if name.endswith(("right.weight", "left.weight", "down_proj.weight"))]
    assert all((after[name] != before[name]).any() for name in names)
    assert len(names) >= 10
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert again.state_dict().keys() == before.keys()
    assert torch.equal(logits(again, tokens), logits(model, tokens))


@pytest.mark.parametrize("cast", ["half", "float", "bfloat16", "to"])
def test_casts(cast, folder, tokens) -> None:
    dtype = {"half": torch.float16, "float": torch.float32}.get(cast, torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32 if cast != "float" else torch.bfloat16)
    model = model.to(dtype) if cast == "to" else getattr(model, cast)()
    stored = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32 if cast != "float" else torch.bfloat16)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, stored.get_parameter(name).to(dtype)), name
    assert logits(model, tokens).dtype == dtype
    assert logits(model, tokens).isfinite().all()


def test_int8_is_neither_cast_nor_trained_whole(folder, tokens, tmp_path) -> None:
    model = lorap.quantize(AutoModelForCausalLM.from_pretrained(folder), "int8")
    model.save_pretrained(tmp_path / "int8")
    for quantized in (model, AutoModelForCausalLM.from_pretrained(tmp_path / "int8")):
        with pytest.raises(ValueError, match="not supported for quantized model"):
            quantized.half()
        with pytest.raises(ValueError, match="fine-tuning on purely quantized models"):
            train(quantized, tokens, tmp_path / "out")


def test_opened_without_its_head(folder, tokens, tmp_path) -> None:
    whole = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        expected = whole.model(tokens).last_hidden_state
        base, info = AutoModel.from_pretrained(folder, output_loading_info=True)
        assert not info["missing_keys"]
        assert torch.equal(base(tokens).last_hidden_state, expected)
        classifier, info = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
        assert info["missing_keys"] == {"score.weight"}
        assert torch.equal(classifier.model(tokens).last_hidden_state, expected)
        base.save_pretrained(tmp_path / "base")  # names without "model." before them
        for again in (
            AutoModel.from_pretrained(tmp_path / "base"),
            AutoModelForCausalLM.from_pretrained(tmp_path / "base").model,
        ):
            assert torch.equal(again(tokens).last_hidden_state, expected)


def test_peft_is_told_where_adapters_go(folder) -> None:
    with pytest.raises(ValueError, match="target_modules='all-linear', or right and left"):
        get_peft_model(AutoModelForCausalLM.from_pretrained(folder), LoraConfig(target_modules=["q_proj"]))
    for targets in ("all-linear", ["q_proj.right", "q_proj.left"]):
        adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), LoraConfig(target_modules=targets))
        assert len([name for name, _ in adapted.named_parameters() if "q_proj.left.lora_A" in name]) == 2


TENSOR_PARALLEL = """
import sys, torch, lorap
from transformers import AutoModelForCausalLM
torch.distributed.init_process_group("gloo")
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], tp_plan="auto").eval()
tokens, expected = torch.load(sys.argv[2])
with torch.no_grad():
    found = model(tokens).logits
found = found.full_tensor() if hasattr(found, "full_tensor") else found
difference = float((found - expected).abs().max() / expected.abs().max())
sys.stdout.write(f"difference {difference}\\n")  # in one piece, unlike print() without a buffer: lines of two would mix
sys.stdout.flush()
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_tensor_parallelism(workers, folder, tokens, tmp_path) -> None:
    torch.save((tokens, logits(AutoModelForCausalLM.from_pretrained(folder), tokens)), tmp_path / "expected.pt")
    (tmp_path / "run.py").write_text(TENSOR_PARALLEL)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={workers}"]
    run = subprocess.run(
        [*command, "run.py", str(folder), "expected.pt"], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    differences = [float(line.split()[1]) for line in run.stdout.splitlines() if line.startswith("difference")]
    assert len(differences) == workers, run.stderr[-3000:]
    assert max(differences) < 1e-5


def test_the_plan_of_tensor_parallelism_keeps_low_rank_layers_whole(folder) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert not [name for name in model.tp_plan if ".self_attn." in name or ".mlp." in name]
    config = transformers.LlamaConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=4, vocab_size=50)
    dense = transformers.LlamaForCausalLM(config)
    before = dict(dense.tp_plan)
    keep_whole(dense, lorap.checkpoint.format.LoRAPConfig())
    assert dense.tp_plan == before
    keep_whole(dense, lorap.checkpoint.format.LoRAPConfig(ranks={"model.layers.0.self_attn.k_proj": 2}))
    assert sorted(before.keys() - dense.tp_plan.keys()) == sorted(name for name in before if ".self_attn." in name)
    for group_size in (None, 64):
        quantized = transformers.LlamaForCausalLM(config)
        keep_whole(quantized, lorap.checkpoint.format.LoRAPConfig(weights="int8", group_size=group_size))
        assert quantized.tp_plan == {name: how for name, how in before.items() if ".layers." not in name}
