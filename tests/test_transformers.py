"""Compressed models are ordinary transformers models.

Proved here: what is saved loads again with bit-identical logits (every family, any dtype, sharded, re-saved, with a
device map); generation and pipelines work; the factors are the optimum on the statistics that the paper prescribes;
runs repeat byte for byte; and a host that does not know lorap fails instead of running a broken model.
"""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import FAMILIES
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GenerationConfig, pipeline

import lorap
from lorap.algorithms.pivoting import pivot
from lorap.checkpoint.build import check_pivot_rows
from lorap.checkpoint.format import LoRAPConfig
from lorap.checkpoint.hf_quantizer import attach_quantization_config, get_quantization_config, register

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@torch.no_grad()
def logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    return model(tokens.to(model.device)).logits.cpu()


def cast(model: Any, dtype: torch.dtype) -> Any:
    """Parameters to ``dtype``; ``.to`` would also round the rotary frequencies, which stay float32 when loaded."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


@torch.no_grad()
def input_sq_norm(model: Any, module: str, tokens: torch.Tensor) -> torch.Tensor:
    """Sum over tokens of the squared inputs of a linear layer, gathered by an ordinary forward pass."""
    seen = []
    hook = model.get_submodule(module).register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    model(tokens)
    hook.remove()
    return seen[0].reshape(-1, seen[0].shape[-1]).double().square().sum(0)


def low_rank(model: Any) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, lorap.LowRankLinear)]


def with_pivoted_storage(model: Any, report: Any) -> tuple[Any, Any]:
    """The same compressed model with every low-rank layer pivoted."""
    for name in low_rank(model):
        old = model.get_submodule(name)
        stored = pivot(old.left.weight.data, old.right.weight.data, name=name)
        factors = stored.left.to(old.left.weight.dtype), stored.right.to(old.right.weight.dtype)
        bias = None if old.bias is None else old.bias.data
        model.set_submodule(name, lorap.LowRankLinear.from_factors(*factors, bias, stored.pivot_rows))
    fields = model.config.quantization_config.to_dict()
    fields["format_version"] = None
    attach_quantization_config(model, LoRAPConfig(**fields, storage="pivoted"))
    report.params_saved = sum(parameter.numel() for parameter in model.parameters())
    return model, report


@pytest.fixture
def small(make_model, compress_small, tmp_path):
    """(model in memory, report, folder) of a compressed llama-gqa."""
    model, report = compress_small(make_model("llama-gqa"))
    return model, report, lorap.save(model, tmp_path / "small", report=report)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_saved_and_loaded_logits_are_bit_identical(family, dtype, make_model, compress_small, tokens, tmp_path):
    dense = make_model(family)
    before = logits(dense, tokens)
    model, report = compress_small(dense)
    assert len(low_rank(model)) == 4 * len(model.model.layers)
    assert report.param_ratio == pytest.approx(0.5, abs=0.03)
    out = lorap.save(model, tmp_path / "out", report=report)
    expected = logits(cast(model, DTYPES[dtype]), tokens)
    loaded = AutoModelForCausalLM.from_pretrained(out, dtype=DTYPES[dtype])
    assert loaded.dtype == DTYPES[dtype]
    assert low_rank(loaded) == low_rank(model)
    assert torch.equal(logits(loaded, tokens), expected)
    assert expected.isfinite().all()
    assert not torch.allclose(expected.float(), before, atol=1e-2)


@pytest.mark.parametrize("kind", ["small", "flap"])
def test_sharded_checkpoint_loads_and_saves_again(kind, tokens, tmp_path, request):
    model, report, _ = request.getfixturevalue(kind)
    sharded = lorap.save(model, tmp_path / "sharded", report=report, max_shard_size="50KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    loaded = AutoModelForCausalLM.from_pretrained(sharded)
    assert torch.equal(logits(loaded, tokens), logits(model, tokens))
    loaded.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(logits(again, tokens), logits(model, tokens))
    configs = [json.loads((folder / "config.json").read_text()) for folder in (sharded, tmp_path / "again")]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]


@pytest.mark.parametrize("device_map", ["cpu", "auto"])
def test_device_map(device_map, small, tokens):
    model, _, folder = small
    loaded = AutoModelForCausalLM.from_pretrained(folder, device_map=device_map)
    assert low_rank(loaded) == low_rank(model)
    if loaded.device.type == "cpu":
        assert torch.equal(logits(loaded, tokens), logits(model, tokens))
    else:
        torch.testing.assert_close(logits(loaded, tokens), logits(model, tokens), rtol=1e-3, atol=1e-3)


def test_generate_and_pipeline_give_the_same_greedy_tokens(small, tokens, tokenizer):
    model, _, folder = small
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    options = {"max_new_tokens": 12, "do_sample": False}
    expected = model.generate(tokens[:1, :8], **options)
    assert torch.equal(loaded.generate(tokens[:1, :8], **options), expected)
    prompt = tokenizer.decode(tokens[0, :8])
    generator = pipeline("text-generation", model=loaded, tokenizer=tokenizer, device="cpu")
    text = generator(prompt, return_full_text=True, **options)[0]["generated_text"]
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    assert text == tokenizer.decode(model.generate(ids, **options)[0], skip_special_tokens=True)


@pytest.mark.parametrize(
    "prepare", [lorap.optimize_for_inference, lambda model: lorap.quantize(model, "int4"), lambda model: model]
)
def test_continuous_batches_give_the_same_greedy_tokens(prepare, small, tokens):
    """generate_batch, which puts several sequences and prompts in one step."""
    model = prepare(AutoModelForCausalLM.from_pretrained(small[2]))
    prompts = [tokens[0, :length].tolist() for length in (1, 5, 12)]
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    alone = [model.generate(torch.tensor([each]), **options)[0, len(each) :].tolist() for each in prompts]
    room = transformers.ContinuousBatchingConfig(
        num_blocks=4, page_size=32, max_batch_tokens=64
    )  # else all memory that is free
    batch = {"generation_config": GenerationConfig(**options), "continuous_batching_config": room}
    found = model.generate_batch(inputs=prompts, **batch)
    assert [each.generated_tokens for each in found.values()] == alone


def test_sparsity_0_changes_nothing(make_model, compress_small, tokens, tmp_path):
    dense = make_model("llama-gqa")
    before = logits(dense, tokens)
    model, report = compress_small(dense, sparsity=0.0)
    assert report.param_ratio == 1.0
    assert torch.equal(logits(model, tokens), before)
    out = lorap.save(model, tmp_path / "out", report=report)
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(out), tokens), before)


ATTENTION, FFN = ["q_proj", "k_proj", "v_proj", "o_proj"], ["gate_proj", "up_proj", "down_proj"]


@pytest.mark.parametrize(
    ("options", "roles", "width"),
    [
        pytest.param({"sublayers": ("mlp",)}, [], 50, id="mlp-only"),
        pytest.param({"sublayers": ("self_attn",)}, ATTENTION, 100, id="attention-only"),
        pytest.param({"attention_method": "svd"}, ATTENTION, 50, id="svd"),
        pytest.param({"attention_method": "afm"}, ATTENTION, 50, id="afm"),
        pytest.param({"mlp_method": "factorize"}, ATTENTION + FFN, 100, id="ffn-factorized"),
        pytest.param(
            {"mlp_method": "factorize", "sublayers": ("mlp",), "attention_method": "afm"}, FFN, 100, id="ffn-afm"
        ),
    ],
)
def test_options_choose_what_becomes_low_rank(options, roles, width, make_model, compress_small, tokens, tmp_path):
    model, report = compress_small(make_model("llama-biases"), **options)
    assert [name.rsplit(".")[-1] for name in low_rank(model)] == roles * 2
    assert model.model.layers[1].mlp.down_proj.in_features == width
    out = lorap.save(model, tmp_path / "out", report=report)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(out), tokens), logits(model, tokens))


def test_attention_is_the_optimum_on_the_paper_s_statistics(make_model, compress_small, tokens):
    """P holds the top eigenvectors of W C W^T, C the diagonal of squared channel norms; W' = P P^T W."""
    dense = make_model("llama-mha")
    model, _ = compress_small(copy.deepcopy(dense))
    for role in ATTENTION:
        name = f"model.layers.0.self_attn.{role}"
        weight = dense.get_submodule(name).weight.detach()
        found = model.get_submodule(name)
        sq_norm = input_sq_norm(dense, name, tokens)
        w = weight.double()
        top = torch.linalg.eigh(w @ sq_norm.diag() @ w.T).eigenvectors[:, -found.rank :]
        torch.testing.assert_close(found.reconstruct().double(), top @ top.T @ w, rtol=1e-4, atol=1e-5)
        factors = lorap.factorize(weight, found.rank, sq_norm)
        torch.testing.assert_close(found.reconstruct(), factors.left @ factors.right, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["llama-gqa", "mistral", "smollm3"])
def test_statistics_of_layer_1_come_from_the_compressed_layer_0(family, make_model, compress_small, tokens):
    dense = make_model(family)
    model, _ = compress_small(copy.deepcopy(dense))
    half = copy.deepcopy(dense)
    half.model.layers[0] = copy.deepcopy(model.model.layers[0])
    for role in ATTENTION:
        name = f"model.layers.1.self_attn.{role}"
        weight, rank = dense.get_submodule(name).weight.detach(), model.get_submodule(name).rank
        found = model.get_submodule(name).reconstruct()
        right = lorap.factorize(weight, rank, input_sq_norm(half, name, tokens))
        wrong = lorap.factorize(weight, rank, input_sq_norm(dense, name, tokens))
        torch.testing.assert_close(found, right.left @ right.right, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(found, wrong.left @ wrong.right, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["llama-gqa", "mistral"])
def test_padding_never_counts(family, make_model, compress_small, tokens, tokenizer):
    unpadded = tokens[:, :24]
    pad = torch.full((len(tokens), 8), tokenizer.pad_token_id)
    mask = torch.cat([torch.ones_like(unpadded), torch.zeros_like(pad)], dim=1)
    padded = {"input_ids": torch.cat([unpadded, pad], dim=1), "attention_mask": mask}
    expected, _ = compress_small(make_model(family), unpadded)
    model, report = compress_small(make_model(family), padded)
    assert report.calibration["tokens"] == unpadded.numel()
    for name in low_rank(expected):
        left, right = (found.get_submodule(name).reconstruct() for found in (model, expected))
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-5)
    for layer, reference in zip(model.model.layers, expected.model.layers, strict=True):
        assert torch.equal(layer.mlp.down_proj.weight, reference.mlp.down_proj.weight)


def test_two_runs_write_the_same_bytes(make_model, compress_small, tmp_path):
    written = []
    for name in ("one", "two"):
        model, report = compress_small(make_model("llama-gqa"))
        written.append((lorap.save(model, tmp_path / name, report=report) / "model.safetensors").read_bytes())
    assert written[0] == written[1]


# ----------------------------------------------------------------------------------------------------------------------
# Hosts and checkpoints that do not fit

# No option of the host may wave all guards through: neither that which its own message suggests, nor another activation.
WITHOUT_LORAP = """
import sys
from transformers import AutoModel, AutoModelForCausalLM, LlamaForCausalLM
ways = {}, {"ignore_mismatched_sizes": True}, {"device_map": "cpu"}, {"low_cpu_mem_usage": False}, {"hidden_act": "silu"}
for folder in sys.argv[1:]:
    for loader in (AutoModelForCausalLM, LlamaForCausalLM, AutoModel):
        for options in ways:
            try:
                loader.from_pretrained(folder, **options)
                print("opened", folder, loader.__name__, options)
            except Exception as error:
                if "hidden_act" not in options and "needs_import_lorap" not in str(error):
                    print("no words", folder, loader.__name__, options, error)
print("done" if "lorap" not in sys.modules else "lorap was imported")
"""


def assert_refused_without_lorap(*folders):
    run = subprocess.run(
        [sys.executable, "-c", WITHOUT_LORAP, *map(str, folders)], capture_output=True, text=True, check=False
    )
    assert run.stdout == "done\n", run.stdout + run.stderr


def test_opened_without_lorap_it_is_refused(make_model, compress_small, pivoted, tmp_path):
    """Otherwise the host would run random attention weights, or leave biases out, and only print a warning."""
    kinds = [
        {},
        {"sublayers": ("self_attn",)},
        {"recipe": "best", "sparsity": 0.4},
        {"sublayers": ("mlp",), "allocation": "even", "bias_compensation": True},
    ]
    folders = [pivoted[2]]
    for index, options in enumerate(kinds):
        model, report = compress_small(make_model("llama-gqa"), **options)
        folders.append(lorap.save(model, tmp_path / str(index), report=report))
    assert_refused_without_lorap(*folders)


def test_no_weight_and_no_result_hangs_on_the_guards(small, tokens, tmp_path):
    model, report, folder = small
    config = json.loads((folder / "config.json").read_text())
    assert config["hidden_act"] == "silu_needs_import_lorap"
    stored = load_file(folder / "model.safetensors")
    assert sorted(name for name in stored if "needs_import_lorap" in name) == sorted(
        f"{n}.needs_import_lorap" for n in low_rank(model)
    )
    assert report.params_saved == sum(tensor.numel() for tensor in stored.values() if tensor.shape != (1,))
    lorap.reconstruct(model).save_pretrained(tmp_path / "plain")
    assert json.loads((tmp_path / "plain" / "config.json").read_text())["hidden_act"] == "silu"
    assert not [name for name in load_file(tmp_path / "plain" / "model.safetensors") if "needs" in name]


@pytest.mark.parametrize(("storage", "version"), [("factors", 1), ("factors", 2), ("pivoted", 2), ("pivoted", 3)])
def test_checkpoints_of_older_formats_open(storage, version, make_model, compress_small, tokens, tmp_path):
    """They have one guard, in the shapes, and are saved again as they were."""
    model, report = compress_small(make_model("llama-gqa"), storage=storage)
    fields = model.config.quantization_config.to_dict()
    attach_quantization_config(model, LoRAPConfig(**fields | {"format_version": version}))
    out = lorap.save(model, tmp_path / "old", report=report)
    assert json.loads((out / "config.json").read_text())["hidden_act"] == "silu"
    assert not [name for name in load_file(out / "model.safetensors") if "needs" in name]
    loaded, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info.values()), info
    assert torch.equal(logits(loaded, tokens), logits(model, tokens))
    loaded.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again/model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()
    assert get_quantization_config(loaded).format_version == version


def test_pruned_to_one_width_it_is_an_ordinary_dense_checkpoint(make_model, compress_small, tokens, tmp_path):
    """No low-rank layer, so nothing that another host could get wrong: it loads the very same weights."""
    model, report = compress_small(make_model("llama-gqa"), sublayers=("mlp",))
    out = lorap.save(model, tmp_path / "out", report=report)
    torch.save(tokens, tmp_path / "tokens.pt")
    code = (
        "import sys, torch, transformers\n"
        "model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()\n"
        "torch.save(model(torch.load('tokens.pt')).logits.detach(), 'logits.pt')\n"
        "assert 'lorap' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code, str(out)], cwd=tmp_path, check=True, capture_output=True)
    with torch.no_grad():
        assert torch.equal(torch.load(tmp_path / "logits.pt"), model(tokens).logits)


Q = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"ranks": {Q: 0}}, f"ranks.{Q} should be greater than or equal to 1 and is 0", id="rank-0"),
        pytest.param({"ranks": {Q: 64}}, f"rank 64 of {Q} does not fit its shape (64, 64)", id="rank-too-high"),
        pytest.param({"ranks": {"model.nowhere": 4}}, "model.nowhere, but the model has no such", id="unknown-module"),
        pytest.param({"ranks": {"model.norm": 4}}, "not a linear layer", id="not-linear"),
    ],
)
def test_damaged_quantization_config_is_refused(change, message, small):
    folder: Path = small[2]
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= change
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(lorap.CheckpointError) as error:
        AutoModelForCausalLM.from_pretrained(folder)
    assert message in str(error.value)


def test_an_incomplete_low_rank_layer_is_refused(small):
    """transformers itself would fill it with random numbers and only print a warning."""
    edit_weights(small[2], lambda tensors: tensors.pop(f"{Q}.left.weight"))
    with pytest.raises(
        lorap.CheckpointError, match=rf"1 tensors of compressed layers are missing, first {Q}\.left\.weight"
    ):
        AutoModelForCausalLM.from_pretrained(small[2])


# ----------------------------------------------------------------------------------------------------------------------
# Pivoted storage


@pytest.fixture
def pivoted(make_model, compress_small, tmp_path):
    """(model in memory, report, folder) of a compressed llama with biases, pivoted."""
    model, report = with_pivoted_storage(*compress_small(make_model("llama-biases")))
    return model, report, lorap.save(model, tmp_path / "pivoted", report=report)


def edit_weights(folder: Path, change: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def edit_config(folder: Path, **change: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= change
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", ["llama-biases", "llama-gqa", "qwen3"])
def test_pivoted_saved_and_loaded_logits_are_bit_identical(family, dtype, make_model, compress_small, tokens, tmp_path):
    model, report = compress_small(make_model(family))
    by_factors = logits(model, tokens)
    model, report = with_pivoted_storage(model, report)
    torch.testing.assert_close(logits(model, tokens), by_factors, rtol=1e-3, atol=1e-3)
    out = lorap.save(model, tmp_path / "out", report=report)
    expected = logits(cast(model, DTYPES[dtype]), tokens)
    loaded = AutoModelForCausalLM.from_pretrained(out, dtype=DTYPES[dtype])
    assert low_rank(loaded) == low_rank(model)
    assert torch.equal(logits(loaded, tokens), expected)
    for name in low_rank(model):
        rows = loaded.get_submodule(name).pivot_rows
        assert rows.dtype == torch.int64
        assert torch.equal(rows, model.get_submodule(name).pivot_rows)


def test_pivoted_layers_survive_everything_a_model_goes_through(pivoted, tokens, tmp_path):
    model, report, folder = pivoted
    expected = logits(model, tokens)
    sharded = lorap.save(model, tmp_path / "sharded", report=report, max_shard_size="50KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    loaded = AutoModelForCausalLM.from_pretrained(sharded, device_map="cpu")
    assert torch.equal(logits(loaded, tokens), expected)
    loaded.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(logits(again, tokens), expected)
    configs = [json.loads((path / "config.json").read_text()) for path in (folder, tmp_path / "again")]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]
    back = copy.deepcopy(again).to(torch.bfloat16).to(torch.float32)
    assert torch.equal(back.get_submodule(Q).pivot_rows, model.get_submodule(Q).pivot_rows)
    torch.testing.assert_close(logits(back, tokens), expected, rtol=0.2, atol=0.2)
    options = {"max_new_tokens": 12, "do_sample": False}
    assert torch.equal(again.generate(tokens[:1, :8], **options), model.generate(tokens[:1, :8], **options))


def test_pivoted_layers_offloaded_to_disk(pivoted, tokens, tmp_path):
    model, _, folder = pivoted
    where = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    where |= {"model.layers.0": "disk", "model.layers.1": "cpu"}
    loaded = AutoModelForCausalLM.from_pretrained(folder, device_map=where, offload_folder=tmp_path / "offloaded")
    assert torch.equal(logits(loaded, tokens), logits(model, tokens))


def test_checkpoints_say_their_version_and_storage(small, pivoted):
    plain, newer = (
        json.loads((folder / "config.json").read_text())["quantization_config"] for folder in (small[2], pivoted[2])
    )
    assert plain["format_version"] == 4
    assert "storage" not in plain
    assert (newer["format_version"], newer["storage"]) == (4, "pivoted")


def test_versions_and_storages():
    assert LoRAPConfig().format_version == 1
    assert LoRAPConfig(storage="pivoted").format_version == 2
    assert (
        LoRAPConfig(ranks={Q: 3}).format_version
        == LoRAPConfig(intermediate_sizes={"model.layers.0.mlp": 9}).format_version
        == 4
    )
    assert LoRAPConfig(format_version=2).storage == "factors"
    for config in (LoRAPConfig(format_version=2), LoRAPConfig(storage="pivoted"), LoRAPConfig()):
        assert LoRAPConfig(**config.to_dict()).__dict__ == config.__dict__


def test_pivoted_storage_needs_a_version_that_has_it(pivoted):
    edit_config(pivoted[2], format_version=1)
    with pytest.raises(lorap.CheckpointError, match=r"pivoted storage and format version 1, .* it must be 2"):
        AutoModelForCausalLM.from_pretrained(pivoted[2])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(lambda rows: rows.flip(0), "must ascend, but", id="descending"),
        pytest.param(lambda rows: rows[0].repeat(len(rows)), "must ascend, but", id="repeated"),
        pytest.param(lambda rows: rows * 0, "must ascend, but 0 follows 0", id="zero"),
        pytest.param(lambda rows: rows + 64, "but the layer has rows 0 to 63", id="beyond"),
        pytest.param(lambda rows: rows - 64, "but the layer has rows 0 to 63", id="negative"),
        pytest.param(lambda rows: rows << 40, "but the layer has rows 0 to 63", id="huge"),
        pytest.param(
            lambda _rows: None, f"1 tensors of compressed layers are missing, first {Q}.pivot_rows", id="missing"
        ),
    ],
)
def test_damaged_pivot_rows_are_refused(change, message, pivoted):
    def damage(tensors: dict[str, torch.Tensor]) -> None:
        rows = change(tensors.pop(f"{Q}.pivot_rows"))
        if rows is not None:
            tensors[f"{Q}.pivot_rows"] = rows.contiguous()

    edit_weights(pivoted[2], damage)
    with pytest.raises(lorap.CheckpointError) as error:
        AutoModelForCausalLM.from_pretrained(pivoted[2])
    assert Q in str(error.value)
    assert message in str(error.value)


# ----------------------------------------------------------------------------------------------------------------------
# Biases that the model's own config does not have

DOWN = "model.layers.0.mlp.down_proj"


@pytest.fixture
def flap(make_model, compress_small, tmp_path):
    """(model in memory, report, folder) of a llama whose down projections have gained biases."""
    model, report = compress_small(make_model("llama-gqa"), recipe="flap", sparsity=0.3)
    return model, report, lorap.save(model, tmp_path / "flap", report=report)


@pytest.mark.parametrize("dtype", DTYPES)
def test_added_biases_load_with_identical_logits(dtype, flap, tokens):
    model, _, folder = flap
    settings = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert settings["biases"] == [DOWN, DOWN.replace("0", "1")]
    assert (settings["format_version"], settings["ranks"]) == (4, {})
    assert "storage" not in settings
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[dtype])
    expected = logits(cast(copy.deepcopy(model), DTYPES[dtype]), tokens)
    assert torch.equal(logits(loaded, tokens), expected)
    for name in settings["biases"]:
        bias = loaded.get_submodule(name).bias
        assert bias.abs().max() > 0
        assert torch.equal(bias, model.get_submodule(name).bias.to(DTYPES[dtype]))
    assert loaded.model.layers[0].mlp.gate_proj.bias is None


def test_a_model_that_has_biases_gains_none(make_model, compress_small, tokens, tmp_path):
    model, report = compress_small(make_model("llama-biases"), recipe="flap", sparsity=0.3)
    out = lorap.save(model, tmp_path / "out", report=report)
    settings = json.loads((out / "config.json").read_text())["quantization_config"]
    assert "biases" not in settings
    assert settings["format_version"] == 1
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(out), tokens), logits(model, tokens))


def test_versions_of_added_biases():
    assert LoRAPConfig(biases=[DOWN]).format_version == 4
    assert LoRAPConfig(biases=[DOWN], format_version=2).biases == [DOWN]
    assert LoRAPConfig(biases=[]).format_version == 1
    again = LoRAPConfig(**LoRAPConfig(biases=[DOWN]).to_dict())
    assert again.__dict__ == LoRAPConfig(biases=[DOWN]).__dict__


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 1}, "added biases and format version 1, which has none; it must be 2"),
        ({"biases": ["model.layers.9.mlp.down_proj"]}, "model.layers.9.mlp.down_proj, but the model has no such layer"),
        ({"biases": ["model.norm"]}, "model.norm, which is a LlamaRMSNorm, not a linear layer"),
        ({"biases": [DOWN, Q]}, f"1 tensors of compressed layers are missing, first {Q}.bias"),
    ],
    ids=["old-format", "unknown-module", "not-linear", "not-stored"],
)
def test_contradictory_biases_are_refused(change, message, flap):
    edit_config(flap[2], **change)
    with pytest.raises(lorap.CheckpointError) as error:
        AutoModelForCausalLM.from_pretrained(flap[2])
    assert message in str(error.value)


def test_pivot_rows_of_the_wrong_kind_are_refused():
    for rows in (torch.tensor([0.0, 1]), torch.tensor([0, 1, 2])):
        layer = lorap.LowRankLinear(5, 7, 2, pivoted=True)
        layer.pivot_rows = rows
        with pytest.raises(lorap.CheckpointError, match=r"q\.pivot_rows is torch.* int64 of shape \(2,\) is needed"):
            check_pivot_rows(layer, "q")


def test_registering_twice_is_harmless():
    register()
    register()
