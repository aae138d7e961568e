"""What a GGUF file says is what the model computes: its Hugging Face twin's logits, or one sentence that names what is lost."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from commands import run
from gguf_files import write_file
from tokenizers import AddedToken, Tokenizer, decoders, models
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast

import lorap
from lorap.calibration import read_source
from lorap.checkpoint.load import find_model, load_model, load_tokenizer
from lorap.errors import LoRAPError

gguf = pytest.importorskip("gguf")

LONG = torch.arange(240).reshape(1, -1) % 497
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LINEAR = {"rope_type": "linear", "factor": 2.5}
YARN_KEYS = {
    "rope.scaling.type": "yarn",
    "rope.scaling.factor": 4.0,
    "rope.scaling.original_context_length": 64,
}


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(LONG).logits.float()


def opened(path: Path) -> Any:
    return load_model(find_model(path))


def refusal(path: Path, open_: Any = opened) -> str:
    with pytest.raises(LoRAPError) as caught:
        open_(path)
    return str(caught.value)


def converter_factors(factor: float, low: float, high: float, old: int, dim: int = 16) -> np.ndarray:
    """What llama.cpp's converter writes for Llama 3.1, from its own description of the scaling."""
    found = []
    for frequency in 1 / 10000.0 ** (np.arange(0, dim, 2) / dim):
        wave = 2 * math.pi / frequency
        smooth = (old / wave - low) / (high - low)
        between = 1 / ((1 - smooth) / factor + smooth)
        found.append(1.0 if wave < old / high else factor if wave > old / low else between)
    return np.array(found, np.float32)


@pytest.mark.parametrize(
    ("rope", "values", "tensors"),
    [
        (LINEAR, {"rope.scaling.type": "linear", "rope.scaling.factor": 2.5}, {}),
        (LINEAR, {"rope.scaling.factor": 2.5}, {}),  # linear is what no type means
        (LINEAR, {"rope.scale_linear": 2.5}, {}),
        ({}, {"rope.scaling.type": "none", "rope.scaling.factor": 2.5}, {}),
        (YARN, YARN_KEYS | {"rope.scaling.yarn_beta_fast": 32.0, "rope.scaling.finetuned": True}, {}),
        (YARN | {"attention_factor": 1.5 * (0.1 * math.log(4) + 1)}, YARN_KEYS | {"rope.scaling.attn_factor": 1.5}, {}),
        (LLAMA3, {}, {"rope_freqs.weight": converter_factors(32, 1, 4, 64)}),
        (LLAMA3 | {"factor": 8.0}, {}, {"rope_freqs.weight": converter_factors(8, 1, 4, 64)}),
        (
            LLAMA3 | {"factor": 5.5, "low_freq_factor": 2.0, "high_freq_factor": 6.0},
            {},
            {"rope_freqs.weight": converter_factors(5.5, 2, 6, 64)},
        ),
        ({}, {}, {"rope_freqs.weight": np.ones(8, np.float32)}),
        (
            {
                "rope_type": "longrope",
                "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.75],
                "long_factor": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0],
                "original_max_position_embeddings": 100,
                "attention_factor": 1.25,
            },
            {
                "rope.scaling.type": "longrope",
                "rope.scaling.original_context_length": 100,
                "rope.scaling.attn_factor": 1.25,
            },
            {
                "rope_factors_short.weight": np.array([1, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.75], np.float32),
                "rope_factors_long.weight": np.arange(1, 9).astype(np.float32),
            },
        ),
    ],
)
def test_scaled_rotary_positions(rope, values, tensors, make_model, tokenizer, tmp_path) -> None:
    twin = make_model("llama-gqa", rope_parameters={"rope_theta": 10000.0, "rope_type": "default"} | rope)
    file = write_file(tmp_path / "m.gguf", twin, tokenizer, values=values, tensors=tensors)
    assert (logits(opened(file)) - logits(twin)).abs().max() <= (2e-4 if rope.get("factor") == 5.5 else 0)
    if rope:
        assert (logits(twin) - logits(make_model("llama-gqa"))).abs().max() > 0.05


def test_published_llama3_parameters_are_found_again(make_model, tokenizer, tmp_path) -> None:
    """Heads of 128, base 500,000: the same four numbers as in Meta's config."""
    model = make_model("llama-gqa", head_dim=128, max_position_embeddings=131072)
    rope = LLAMA3 | {"factor": 8.0, "original_max_position_embeddings": 8192, "rope_theta": 500000.0}
    model.config.rope_parameters = rope
    out = lorap.export_gguf(model, tmp_path / "out", tokenizer=tokenizer)
    assert opened(out).config.rope_parameters == rope
    for factor, low, high, old in ((32.0, 1.0, 4.0, 8192), (4.0, 3.0, 6.0, 8192)):
        changed = rope | {"factor": factor, "low_freq_factor": low, "high_freq_factor": high}
        model.config.rope_parameters = changed | {"original_max_position_embeddings": old}
        found = opened(lorap.export_gguf(model, tmp_path / str(factor), tokenizer=tokenizer)).config.rope_parameters
        assert found == model.config.rope_parameters


@pytest.mark.parametrize(
    ("values", "tensors", "words"),
    [
        ({"rope.scaling.type": "ntk", "rope.scaling.factor": 2.0}, {}, ["rope.scaling.type", "ntk", "yarn"]),
        ({"rope.dimension_count": 8}, {}, ["rope.dimension_count", "8 of 16"]),
        (YARN_KEYS | {"rope.scaling.yarn_beta_slow": 2.0}, {}, ["yarn_beta_slow", "2.0"]),
        (YARN_KEYS | {"rope.scaling.yarn_ext_factor": 0.5}, {}, ["yarn_ext_factor", "0.5"]),
        ({"rope.dimension_sections": [4, 4, 0, 0]}, {}, ["rope.dimension_sections"]),
        ({}, {"rope_freqs.weight": np.linspace(1, 9, 8).astype(np.float32)}, ["rope_freqs.weight", "9"]),
        ({}, {"rope_freqs.weight": np.ones(4, np.float32)}, ["rope_freqs.weight", "(4,)", "8"]),
        (
            {"rope.scaling.factor": 2.0},
            {"rope_freqs.weight": converter_factors(32, 1, 4, 64)},
            ["rope_freqs.weight", "2.0"],
        ),
        ({"rope.scaling.type": "longrope"}, {}, ["longrope", "rope_factors_long.weight"]),
        ({}, {"rope_factors_long.weight": np.arange(1, 9).astype(np.float32)}, ["rope_factors_long.weight", "linear"]),
        ({"attention.scale": 0.3}, {}, ["attention.scale", "0.3"]),
        ({"logit_scale": 0.5}, {}, ["logit_scale", "0.5"]),
        ({"final_logit_softcapping": 30.0}, {}, ["final_logit_softcapping", "30"]),
        ({"attention.sliding_window": 64}, {}, ["attention.sliding_window", "64"]),
        ({"attention.causal": False}, {}, ["attention.causal", "False"]),
        ({"attention.key_length": 16, "attention.value_length": 8}, {}, ["16", "8", "values"]),
        ({"feed_forward_length": [100, 90]}, {}, ["feed_forward_length", "90", "100"]),
        ({"attention.head_count_kv": [2, 1]}, {}, ["head_count_kv", "by layer"]),
        ({"expert_count": 8}, {}, ["expert_count", "8"]),
        ({"something.new": 3}, {}, ["something.new", "3"]),
        ({}, {"blk.1.attn_q_norm.weight": np.ones(16, np.float32)}, ["blk.1.attn_q_norm.weight", "Llama"]),
        ({}, {"blk.0.ffn_gate_exps.weight": np.ones((2, 3, 4), np.float32)}, ["blk.0.ffn_gate_exps.weight"]),
        ({}, {"blk.0.attn_q.scale": np.ones(1, np.float32)}, ["blk.0.attn_q.scale"]),
        ({}, {"blk.0.ffn_up.weight": np.ones((99, 64), np.float32)}, ["blk.0.ffn_up.weight", "(99, 64)", "(100, 64)"]),
        ({"general.type": "adapter"}, {}, ["adapter"]),
        ({"split.count": 3}, {}, ["one of 3 parts", "llama-gguf-split --merge"]),
    ],
)
def test_what_would_be_lost_is_named(values, tensors, words, make_model, tokenizer, tmp_path) -> None:
    file = write_file(tmp_path / "m.gguf", make_model("llama-gqa"), tokenizer, values=values, tensors=tensors)
    found = refusal(file)
    assert all(word in found for word in words), found


def test_missing_tensors_and_other_architectures_are_named(make_model, tokenizer, tmp_path) -> None:
    model = make_model("llama-gqa")
    file = write_file(tmp_path / "m.gguf", model, tokenizer, leave_out=("blk.1.attn_v.weight",))
    assert "incomplete: 1 tensors are missing, first blk.1.attn_v.weight" in refusal(file)
    file = write_file(tmp_path / "n.gguf", model, tokenizer, architecture="gemma2")
    assert "gemma2" in refusal(file)
    assert "llama, qwen2, qwen3" in refusal(file)


def test_weights_that_are_no_numbers_are_named(make_model, tokenizer, tmp_path) -> None:
    norm = np.array([np.nan, np.inf, *[1.0] * 62], np.float32)
    file = write_file(tmp_path / "m.gguf", make_model("llama-gqa"), tokenizer, tensors={"blk.1.ffn_norm.weight": norm})
    assert "model.layers.1.post_attention_layernorm.weight contains 2 values that are NaN" in refusal(file)


def test_what_changes_nothing_is_let_through(make_model, tokenizer, tmp_path) -> None:
    twin = make_model("llama-gqa")
    values = {
        "attention.scale": 0.25,
        "attention.causal": True,
        "expert_count": 0,
        "logit_scale": 1.0,
        "feed_forward_length": [100, 100],
        "tensor_data_layout": "Meta AI original pth",
        "attention.sliding_window": 256,
        "attention.key_length": 16,
    }
    table = np.ones(8, np.float32)
    file = write_file(
        tmp_path / "m.gguf", twin, tokenizer, values=values, tensors={"blk.0.attn_rot_embd.weight": table}
    )
    assert torch.equal(logits(opened(file)), logits(twin))


def test_biases_heads_of_any_size_and_an_own_head_are_read(make_model, tokenizer, tmp_path) -> None:
    twin = make_model("llama-biases")
    assert torch.equal(logits(opened(write_file(tmp_path / "a.gguf", twin, tokenizer))), logits(twin))
    with torch.no_grad():  # a file may have some of them: the rest is zero
        for layer in twin.model.layers:
            layer.self_attn.o_proj.bias.zero_()
    names = tuple(f"blk.{index}.attn_output.bias" for index in range(2))
    assert torch.equal(logits(opened(write_file(tmp_path / "b.gguf", twin, tokenizer, leave_out=names))), logits(twin))
    wide = make_model("llama-wide-heads")
    values = {"attention.key_length": 24, "attention.value_length": 24}
    assert torch.equal(logits(opened(write_file(tmp_path / "c.gguf", wide, tokenizer, values=values))), logits(wide))
    qwen = make_model("qwen3")  # heads of 16, not transformers' 128
    values = {"attention.key_length": 16, "attention.value_length": 16, "general.name": "mistral"}
    file = write_file(tmp_path / "d.gguf", qwen, tokenizer, values=values, architecture="qwen3")
    assert torch.equal(logits(opened(file)), logits(qwen))
    untied = make_model("llama-gqa", tie_word_embeddings=False)
    file = write_file(
        tmp_path / "e.gguf", untied, tokenizer, values={"general.name": "mistral"}
    )  # no window follows from a name
    assert torch.equal(logits(opened(file)), logits(untied))
    assert opened(file).config.tie_word_embeddings is False


def test_a_run_that_removes_nothing_changes_nothing(make_model, tokenizer, small_text, tmp_path) -> None:
    """The whole way, from a file with scaled positions to a folder."""
    twin = make_model("llama-gqa", rope_parameters=LLAMA3 | {"rope_theta": 10000.0})
    factors = {"rope_freqs.weight": converter_factors(32, 1, 4, 64)}
    (tmp_path / "files").mkdir()
    file = write_file(tmp_path / "files" / "m.gguf", twin, tokenizer, tensors=factors)
    options = ["--calibration", str(small_text), "--eval-text", "none", "--num-calibration-samples", "4"]
    options += [
        "--calibration-seq-len",
        "32",
        "--device",
        "cpu",
        "--quiet",
        "--sparsity",
        "0",
        "--correction-steps",
        "0",
    ]
    result = run("compress", str(file), str(tmp_path / "out"), *options)
    assert result.exit_code == 0, result.output
    assert torch.equal(logits(opened(tmp_path / "out")), logits(twin))


# ----------------------------------------------------------------------------------------------------------------------
# Which file


def test_a_file_beside_a_config_is_taken_and_parts_are_called_parts(make_model, tokenizer, tmp_path) -> None:
    twin = make_model("llama-gqa")
    folder = tmp_path / "beside"
    folder.mkdir()
    file = write_file(folder / "m.gguf", twin, tokenizer)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    assert torch.equal(logits(opened(folder)), logits(twin))
    parts = tmp_path / "parts"
    parts.mkdir()
    for number in (1, 2, 3):
        (parts / f"m-Q4_K_M-0000{number}-of-00003.gguf").write_bytes(file.read_bytes())
    for path in (parts, parts / "m-Q4_K_M-00002-of-00003.gguf"):
        for arguments in (["info", path], ["plan", path], ["eval", path], ["compress", path, tmp_path / "out"]):
            result = run(*arguments)
            found = " ".join((result.output + str(result.stderr)).split())
            assert result.exit_code == 2, found
            assert "one of 3 parts" in found
            assert "llama-gguf-split --merge m-Q4_K_M-00001-of-00003.gguf m-Q4_K_M.gguf" in found


def test_info_and_plan_refuse_what_opening_refuses(make_model, tokenizer, tmp_path) -> None:
    values = {"attention.sliding_window": 64}
    file = write_file(tmp_path / "m.gguf", make_model("llama-gqa"), tokenizer, values=values)
    for command in ("info", "plan", "eval"):
        result = run(command, str(file))
        assert result.exit_code == 2
        assert "attention.sliding_window is 64" in " ".join(result.stderr.split())


FULL = b"\xff" * 8


@pytest.mark.parametrize(("at", "data"), [(0, b"x"), (4, b"\0\0\0\x03"), (8, FULL), (16, FULL), (40, FULL)])
def test_damaged_headers_are_refused(at, data, make_model, tokenizer, tmp_path) -> None:
    whole = write_file(tmp_path / "m.gguf", make_model("llama-gqa"), tokenizer).read_bytes()
    (tmp_path / "m.gguf").write_bytes(whole[:at] + data + whole[at + len(data) :])
    assert "m.gguf is no GGUF file, or a damaged one" in refusal(tmp_path / "m.gguf")
    (tmp_path / "m.gguf").write_bytes(whole[:-7])
    assert "ends after the file's" in refusal(tmp_path / "m.gguf")


# ----------------------------------------------------------------------------------------------------------------------
# The tokenizer


@pytest.fixture
def text() -> str:
    return read_source("default/news")[:2000] + " naïve café 12345 <|eot_id|>x  DON'T they'll <eos>"


def test_only_ids_that_the_file_has(make_model, tokenizer, text, tmp_path) -> None:
    """Tokens that transformers would add are not there; controls and user's tokens are found whole, whatever their letters."""
    own = transformers.PreTrainedTokenizerFast.from_pretrained(_saved(tokenizer, tmp_path))
    own.add_special_tokens({"bos_token": "<▁begin▁of▁text▁>", "additional_special_tokens": ["<|eot_id|>"]})
    own.add_tokens([AddedToken("DON'T", special=False, normalized=False)])
    twin = make_model("llama-gqa", vocab_size=len(own))
    kinds = [1] * len(own)
    kinds[0] = kinds[1] = 3
    kinds[-3:] = [3, 3, 4]
    names = own.convert_ids_to_tokens(range(len(own) - 3, len(own)))
    assert names == ["<▁begin▁of▁text▁>", "<|eot_id|>", "DON'T"]
    values = {"tokenizer.ggml.token_type": kinds, "tokenizer.ggml.bos_token_id": len(own) - 3}
    file = write_file(tmp_path / "m.gguf", twin, own, values=values | {"tokenizer.ggml.add_bos_token": True})
    found = load_tokenizer(find_model(file))
    assert len(found) == len(own)
    assert found(text)["input_ids"] == [len(own) - 3, *own(text)["input_ids"]]
    assert found.decode(found(text)["input_ids"]) == "<▁begin▁of▁text▁>" + text
    lorap.checkpoint.load.check_tokenizer(found, len(own))


def test_ends_follow_the_file_and_its_family(make_model, tokenizer, tmp_path) -> None:
    model = make_model("llama-gqa")
    bos = {"tokenizer.ggml.bos_token_id": 1}
    for number, (values, first, last) in enumerate(
        [
            ({}, False, False),
            (bos, False, False),
            (bos | {"tokenizer.ggml.pre": "llama-bpe"}, True, False),  # llama.cpp's own choice where the file is silent
            (bos | {"tokenizer.ggml.pre": "llama-bpe", "tokenizer.ggml.add_bos_token": False}, False, False),
            (bos | {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": True}, True, True),
        ]
    ):
        file = write_file(tmp_path / f"{number}.gguf", model, tokenizer, values=values)
        ids = load_tokenizer(find_model(file))("A word")["input_ids"]
        assert (ids[0] == 1, ids[-1] == 0) == (first, last)


@pytest.mark.parametrize(
    ("pre", "digits", "ending"),
    [("llama-bpe", [3, 2], "'ll"), ("qwen2", [1] * 5, "'ll"), ("smollm", [1] * 5, "'ll"), ("tekken", [1] * 5, "'ll")],
)
def test_text_is_split_by_the_name(pre, digits, ending, make_model, tokenizer, tmp_path) -> None:
    file = write_file(tmp_path / "m.gguf", make_model("llama-gqa"), tokenizer, values={"tokenizer.ggml.pre": pre})
    backend = load_tokenizer(find_model(file)).backend_tokenizer
    assert [len(part) for part, _ in backend.pre_tokenizer.pre_tokenize_str("12345")] == digits


def test_a_tokenizer_of_single_bytes_needs_no_merges(make_model, tokenizer, tmp_path) -> None:
    """Its list of merges is empty, which writers leave out; where it is lost, that is told."""
    bytes_alone = Tokenizer(
        models.BPE(vocab={sign: i for i, sign in enumerate(sorted(ByteLevel.alphabet()))}, merges=[])
    )
    bytes_alone.pre_tokenizer, bytes_alone.decoder = ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    ours = PreTrainedTokenizerFast(tokenizer_object=bytes_alone)
    out = lorap.export_gguf(make_model("llama-gqa"), tmp_path / "out", tokenizer=ours)
    text = "Three bytes: €."
    found = load_tokenizer(find_model(out))
    assert found(text).input_ids == ours(text).input_ids
    assert len(found(text).input_ids) == len(text.encode())
    lost = write_file(tmp_path / "m.gguf", make_model("llama-gqa"), tokenizer, values={"tokenizer.ggml.merges": []})
    assert "it has no merges, but tokens such as" in refusal(lost, lambda path: load_tokenizer(find_model(path)))


def test_unknown_tokenizers_are_named(make_model, tokenizer, tmp_path) -> None:
    model = make_model("llama-gqa")
    for key, value in (("pre", "deepseek-llm"), ("model", "rwkv")):
        file = write_file(tmp_path / "m.gguf", model, tokenizer, values={f"tokenizer.ggml.{key}": value})
        found = refusal(file, lambda path: load_tokenizer(find_model(path)))
        assert value in found
        assert "Hugging Face folder" in found
    file = write_file(tmp_path / "m.gguf", model, tokenizer, values={"tokenizer.ggml.model": "none"})
    assert load_tokenizer(find_model(file)) is None


def test_all_chat_templates_go_there_and_come_back(make_model, tokenizer, tmp_path) -> None:
    own = transformers.PreTrainedTokenizerFast.from_pretrained(_saved(tokenizer, tmp_path))
    own.chat_template = {"default": "{{ messages[0]['content'] }}", "tool_use": "T{{ messages[0]['content'] }}"}
    out = lorap.export_gguf(make_model("qwen2"), tmp_path / "small", tokenizer=own)
    reader = gguf.GGUFReader(next(out.glob("*.gguf")))
    assert reader.get_field("tokenizer.chat_template").contents() == "{{ messages[0]['content'] }}"
    assert reader.get_field("tokenizer.chat_template.tool_use").contents() == "T{{ messages[0]['content'] }}"
    assert load_tokenizer(find_model(out)).chat_template == own.chat_template


def _saved(tokenizer: Any, tmp_path: Path) -> Path:
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


@pytest.mark.parametrize("options", [{"sparsity": 0.3}, {"sparsity": 0.3, "weights": "int8", "group_size": 32}])
def test_a_file_that_transformers_opened_is_saved_for_stock_hosts(
    options, make_model, tokenizer, tokens, tmp_path
) -> None:
    write_file(tmp_path / "model.gguf", make_model("llama-gqa"), tokenizer)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    config = lorap.CompressionConfig(target="stock", **options)
    model, _ = lorap.compress(model, calibration=tokens, config=config, progress=False)
    model.save_pretrained(tmp_path / "small")
    again = load_model(find_model(tmp_path / "small"))
    assert torch.allclose(logits(again), logits(model), atol=1e-5)
