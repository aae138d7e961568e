"""GGUF files hold the same model: two readers, lorap's and transformers', give the same logits, and text the same tokens."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from commands import run
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

import lorap
from lorap.calibration import read_source
from lorap.checkpoint.gguf.vocabulary import pre_tokenizer_name
from lorap.checkpoint.load import find_model, load_model, load_tokenizer

gguf = pytest.importorskip("gguf")

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# A Mistral without a window, as later versions of it are; transformers' reader knows one head size of Qwen3 only.
FAMILIES = {
    "llama-mha": {},
    "llama-gqa": {},
    "qwen2": {},
    "qwen3": {"head_dim": 128},
    "mistral": {"sliding_window": None},
}


@torch.no_grad()
def logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    return model(tokens).logits.float()


def cast(model: Any, dtype: torch.dtype) -> Any:
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def read(folder: Path) -> Any:
    return load_model(find_model(folder))


def read_without_lorap(folder: Path) -> Any:
    """transformers' own reader, which undoes the order of rotary pairs by its own code."""
    file = next(folder.glob("*.gguf")).name
    options = {"quantization_config": transformers.GgufConfig()} if hasattr(transformers, "GgufConfig") else {}
    return transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_read_back_it_has_the_same_weights(
    family, dtype, make_model, compress_small, tokenizer, tokens, tmp_path
) -> None:
    model, _ = compress_small(make_model(family, **FAMILIES[family]), storage="pivoted")
    lorap.reconstruct(cast(model, DTYPES[dtype]))
    out = lorap.export_gguf(model, tmp_path / "small", tokenizer=tokenizer)
    kind = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}[dtype]
    assert [path.name for path in sorted(out.iterdir())] == ["README.md", f"small-{kind}.gguf"]
    expected = model.state_dict()
    for found in (read(out), read_without_lorap(out)):
        assert found.config.intermediate_size == 50
        assert all(torch.equal(tensor, expected[name].float()) for name, tensor in found.state_dict().items())
        assert torch.equal(logits(found, tokens), logits(model.float(), tokens))


SCALED = [
    {"rope_type": "linear", "factor": 2.5},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "attention_factor": 1.25},
    {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
]


@pytest.mark.parametrize("rope", SCALED, ids=lambda rope: rope["rope_type"])
def test_scaled_positions_are_written(rope, make_model, tokenizer, tokens, tmp_path) -> None:
    model = make_model("llama-gqa", rope_parameters=rope | {"rope_theta": 10000.0})
    expected = logits(model, tokens)
    found = read(lorap.export_gguf(model, tmp_path / "small", tokenizer=tokenizer))
    torch.testing.assert_close(logits(found, tokens), expected, rtol=0, atol=2e-5)
    assert (logits(make_model("llama-gqa"), tokens) - expected).abs().max() > 0.01


def test_a_head_of_its_own_is_kept_whatever_the_config_says(make_model, tokenizer, tokens, tmp_path) -> None:
    model = make_model("llama-gqa", tie_word_embeddings=False)
    expected = logits(model, tokens)
    model.config.tie_word_embeddings = True
    found = read(lorap.export_gguf(model, tmp_path / "small", tokenizer=tokenizer))
    assert torch.equal(logits(found, tokens), expected)
    assert found.config.tie_word_embeddings is False


def test_a_text_ends_as_the_tokenizer_ends_it(make_model, tokenizer, tmp_path) -> None:
    own = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()), eos_token="<eos>"
    )
    own.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <eos>", special_tokens=[("<eos>", 0)]
    )
    found = load_tokenizer(find_model(lorap.export_gguf(make_model("qwen2"), tmp_path / "small", tokenizer=own)))
    assert found("A word")["input_ids"] == own("A word")["input_ids"]
    own.backend_tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(lorap.ArchitectureError, match="changes text by Lowercase before it splits it"):
        lorap.export_gguf(make_model("qwen2"), tmp_path / "lower", tokenizer=own)


def test_types_in_the_file(make_model, tokenizer, tmp_path) -> None:
    """Matrices as the model, vectors in float32, tied embeddings once."""
    model = cast(make_model("llama-gqa"), torch.bfloat16)
    file = lorap.export_gguf(model, tmp_path / "small", tokenizer=tokenizer) / "small-BF16.gguf"
    found = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(file).tensors}
    assert found["blk.1.ffn_down.weight"] == found["token_embd.weight"] == "BF16"
    assert found["blk.0.attn_norm.weight"] == "F32"
    assert "output.weight" not in found
    assert len(found) == 2 + 2 * 9


def test_compressed_by_the_command_and_read_by_the_command(model_folder, small_text, tokens, tmp_path) -> None:
    options = ["--calibration", small_text, "--eval-text", "none", "--num-calibration-samples", 8]
    options += ["--calibration-seq-len", 32, "--device", "cpu", "--quiet"]
    commands = [["compress", model_folder, tmp_path / "small", "--recipe", "lorap", *options]]
    commands += [
        ["export", tmp_path / "small", tmp_path / "file", "--format", "gguf", "--quiet"],
        ["info", tmp_path / "file"],
    ]
    for words in commands:
        assert run(*words).exit_code == 0, words
    small = read(tmp_path / "small")
    torch.testing.assert_close(logits(read(tmp_path / "file"), tokens), logits(small, tokens), rtol=1e-4, atol=1e-4)
    card = (tmp_path / "file/README.md").read_text("utf-8")
    assert "llama-cli -m file-F32.gguf" in card
    assert "import lorap" not in card
    assert "Recipe: **lorap**" in card


def test_the_tokenizer_reads_text_the_same(make_model, tokenizer, tmp_path) -> None:
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    out = lorap.export_gguf(make_model("qwen2"), tmp_path / "small", tokenizer=tokenizer)
    found = load_tokenizer(find_model(out))
    text = read_source("default/news")[:3000] + " naïve café 12345 <eos> x"
    assert found(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert (found.eos_token_id, found.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert found.chat_template == tokenizer.chat_template
    tokenizer.chat_template = None


@pytest.mark.parametrize("space_first", [True, False])
def test_sentencepiece_tokenizers_read_text_the_same(space_first, make_model, tmp_path) -> None:
    """As Llama 2 and Mistral have: spaces are a letter, and what has no token becomes bytes."""
    scheme = "first" if space_first else "never"
    bpe = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=["<unk>", "<s>", "</s>", *byte_tokens], show_progress=False, max_token_length=8
    )
    words = Tokenizer(models.BPE(unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)  # split, or training would merge across words
    words.train_from_iterator([read_source("default/news")[:50_000]], trainer)
    learned = json.loads(words.to_str())
    bpe_state = json.loads(bpe.to_str())
    bpe_state["model"] |= {key: learned["model"][key] for key in ("vocab", "merges")}
    bpe_state["added_tokens"] = [token for token in learned["added_tokens"] if not token["content"].startswith("<0x")]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(bpe_state)), unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    model = make_model("llama-mha", vocab_size=len(tokenizer))
    out = lorap.export_gguf(model, tmp_path / "small", tokenizer=tokenizer)
    reader = gguf.GGUFReader(next(out.glob("*.gguf")))
    types = reader.get_field("tokenizer.ggml.token_type").contents()
    assert types[:3] == [gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL]
    assert types[3:259] == [gguf.TokenType.BYTE] * 256
    assert set(types[259:]) == {gguf.TokenType.NORMAL}
    assert reader.get_field("tokenizer.ggml.add_space_prefix").contents() == space_first
    found = load_tokenizer(find_model(out))
    text = read_source("default/essays")[:2000] + " naïve ☃ 123"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert found(text, add_special_tokens=False)["input_ids"] == ids
    assert found.decode(ids) == text
    assert tokenizer.convert_tokens_to_ids("<0xE2>") in ids


def test_embeddings_beyond_the_tokenizer_are_unused_tokens(make_model, tokenizer, tmp_path) -> None:
    model = make_model("llama-mha", vocab_size=len(tokenizer) + 5)
    file = lorap.export_gguf(model, tmp_path / "small", tokenizer=tokenizer) / "small-F32.gguf"
    reader = gguf.GGUFReader(file)
    assert reader.get_field("tokenizer.ggml.tokens").contents()[-1] == f"[PAD{len(tokenizer) + 4}]"
    types = reader.get_field("tokenizer.ggml.token_type").contents()
    assert types[-5:] == [gguf.TokenType.UNUSED] * 5
    assert types[:3] == [gguf.TokenType.CONTROL, gguf.TokenType.CONTROL, gguf.TokenType.NORMAL]


LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def split(pattern: str, *, use_regex: bool = False, add_prefix_space: bool = False) -> list[Any]:
    return [
        pre_tokenizers.Split(Regex(pattern), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space, use_regex=use_regex),
    ]


@pytest.mark.parametrize(
    ("steps", "name"),
    [
        ([pre_tokenizers.ByteLevel(add_prefix_space=False)], "gpt-2"),
        ([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)], "smollm"),
        (split(LLAMA3), "llama-bpe"),
        (split(LLAMA3.replace("{1,3}", "")), "qwen2"),
        # Almost Llama 3's: words part where letters become large, and numbers in threes from the left.
        (split(LLAMA3.replace(r"\p{L}+|", r"\p{Lu}*\p{Ll}+|")), None),
        (split(LLAMA3, use_regex=True), None),
        (split(LLAMA3, add_prefix_space=True), None),
        ([pre_tokenizers.ByteLevel(add_prefix_space=True)], None),
        ([pre_tokenizers.Whitespace()], None),
        ([pre_tokenizers.Digits(individual_digits=False), pre_tokenizers.ByteLevel()], None),
    ],
)
def test_names_of_pre_tokenizers(steps, name) -> None:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps) if len(steps) > 1 else steps[0]
    state = json.loads(backend.to_str())["pre_tokenizer"]
    if name is None:
        with pytest.raises(
            lorap.ArchitectureError, match=r"has no name in llama\.cpp that is known here; use --format stock"
        ):
            pre_tokenizer_name(state)
    else:
        assert pre_tokenizer_name(state) == name


DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
MSCALE = {
    "rope_type": "yarn",
    "factor": 2.0,
    "rope_theta": 10000.0,
    "original_max_position_embeddings": 128,
    "mscale": 0.7,
}


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("smollm3", {}, "no GGUF for model type 'smollm3'; possible: llama, mistral, qwen2, qwen3"),
        ("mistral", {}, "the attention window of 8 tokens has no place"),
        (
            "llama-gqa",
            {"rope_parameters": DYNAMIC},
            "rotary positions of type 'dynamic' .*factor 2.0.* are not written",
        ),
        ("llama-gqa", {"rope_parameters": MSCALE}, "rotary positions of type 'yarn' .*mscale 0.7.* are not written"),
        ("llama-gqa", {"hidden_act": "gelu"}, "silu, and this model's hidden_act is 'gelu'"),
    ],
)
def test_what_has_no_place_is_refused_before_work(family, options, message, make_model, tokenizer, tmp_path) -> None:
    with pytest.raises(lorap.ArchitectureError, match=message):
        lorap.export_gguf(make_model(family, **options), tmp_path / "small", tokenizer=tokenizer)
    assert not (tmp_path / "small").exists()


def test_other_tokenizers_are_refused_and_nothing_is_left(make_model, tmp_path) -> None:
    words = Tokenizer(models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>"))
    for tokenizer, message in (
        (
            PreTrainedTokenizerFast(tokenizer_object=words),
            "only BPE tokenizers are written to GGUF, and this one is WordLevel",
        ),
        (None, "GGUF holds the tokenizer as well, and this model has none"),
    ):
        with pytest.raises(lorap.ArchitectureError, match=message):
            lorap.export_gguf(make_model("qwen2"), tmp_path / "small", tokenizer=tokenizer)
        assert not list(tmp_path.iterdir())


def changed(tokenizer: Any, **model: Any) -> Any:
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["model"] |= model
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)), eos_token="<eos>")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"merges": []}, "this tokenizer has no merges"),
        ({"end_of_word_suffix": "e"}, "has end_of_word_suffix, 'e'"),
        ({"dropout": 0.5}, "has dropout, 0.5"),
    ],
)
def test_merging_that_gguf_cannot_say_is_refused(fields, message, make_model, tokenizer, tmp_path) -> None:
    with pytest.raises(lorap.ArchitectureError, match=message):
        lorap.export_gguf(make_model("qwen2"), tmp_path / "small", tokenizer=changed(tokenizer, **fields))


def test_words_that_are_tokens_are_split_as_by_the_tokenizer_or_refused(make_model, tokenizer, tmp_path) -> None:
    """Without the merge that makes it, a token is found by ``ignore_merges`` alone, which ``gpt-2`` does not stand for."""
    lorap.export_gguf(make_model("qwen2"), tmp_path / "same", tokenizer=changed(tokenizer, ignore_merges=True))
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    *others, last = [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]
    unmade = changed(tokenizer, ignore_merges=True, merges=others)
    word = last.replace(" ", "")
    message = rf"ignore_merges is True, llama.cpp merges as if it were False, and then splits 1 tokens, {word!r}"
    with pytest.raises(lorap.ArchitectureError, match=message):
        lorap.export_gguf(make_model("qwen2"), tmp_path / "other", tokenizer=unmade)


@pytest.mark.real_model
def test_smollm2_s_tokenizer_survives(tmp_path) -> None:
    """Read from one GGUF file, written to another: numbers are split into digits by both."""
    root = Path(__file__).resolve().parent.parent
    subprocess.run([sys.executable, str(root / "benchmarks/assets.py")], check=True, stdout=subprocess.DEVNULL)
    tokenizer = load_tokenizer(find_model(root / ".cache" / "SmolLM2-135M-Instruct"))
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=40, num_hidden_layers=1, num_attention_heads=2
    )
    model = transformers.LlamaForCausalLM(config)
    out = lorap.export_gguf(model, tmp_path / "small", tokenizer=tokenizer)
    found = load_tokenizer(find_model(out))
    text = (root / ".cache" / "wiki.txt").read_text("utf-8")[:5000] + " 1234 <|im_start|>"
    assert found(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert found.chat_template == tokenizer.chat_template
