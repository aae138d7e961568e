"""Every kind of source becomes tokens, and bad sources are refused with numbers."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from drawing import TEXT, VOCAB, draw, refusal, write
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerFast

from lorap import CalibrationError
from lorap.calibration import read_source
from lorap.calibration.sources import read_tokens, shipped_texts, source_name
from lorap.calibration.windows import consecutive_windows

SHIPPED = [
    f"default/{name}"
    for name in ("articles", "encyclopedic", "essays", "guides", "news", "novel", "stories", "technical", "textbook")
]


# Sources


@pytest.mark.parametrize("suffix", [".txt", ".md", ""])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"], ids=["plain", "bom"])
def test_text_file(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, suffix: str, bom: bytes) -> None:
    path = write(tmp_path / f"text{suffix}", bom + TEXT.encode())
    assert read_source(path) == read_source(str(path)) == TEXT
    ids, mask = read_tokens(path, tokenizer, vocab_size=VOCAB)
    assert ids.tolist() == tokenizer(TEXT)["input_ids"]
    assert tokenizer.decode(ids) == TEXT
    assert ids.dtype == torch.int64
    assert mask is None


def test_folder_of_jsonl_is_a_data_set(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    folder = tmp_path / "rows"
    folder.mkdir()
    write(folder / "part.jsonl", '{"text": "one two"}\n{"text": "three"}\n')
    assert read_source(str(folder)) == "one two\n\nthree"
    assert source_name(folder) == "rows"


def test_large_file_is_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorap.calibration.pieces.MAX_TEXT_BYTES", 32 * 100)
    lines = [f"line {number} é" for number in range(2000)]
    text = read_source(write(tmp_path / "large.txt", "\n".join(lines)))
    read = [line for line in text.split("\n") if line]
    assert set(read) <= set(lines)
    assert len(text.encode()) <= 32 * 101
    numbers = [int(line.split()[1]) for line in read]
    assert numbers == sorted(set(numbers))
    assert numbers[0] == 0
    assert numbers[-1] > 1900


def test_large_file_of_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorap.calibration.pieces.MAX_TEXT_BYTES", 32 * 100)
    text = read_source(write(tmp_path / "large.txt", "x" + "é" * 5000))
    assert set(text) <= {"x", "é", "\n"}
    assert text.count("é") > 1000


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64])
@pytest.mark.parametrize("shape", [(63,), (9, 7)], ids=str)
def test_npy(tmp_path: Path, shape: tuple[int, ...], dtype: type) -> None:
    tokens = np.arange(63, dtype=dtype).reshape(shape)
    np.save(tmp_path / "tokens.npy", tokens)
    ids, mask = read_tokens(tmp_path / "tokens.npy", None, vocab_size=63)
    assert ids.dtype == torch.int64
    assert ids.tolist() == tokens.tolist()
    assert mask is None


def test_safetensors(tmp_path: Path) -> None:
    ids = torch.arange(63).reshape(9, 7)
    mask = (ids % 7 < 5).long()
    save_file({"input_ids": ids, "attention_mask": mask}, tmp_path / "tokens.safetensors")
    windows = draw(tmp_path / "tokens.safetensors")
    assert torch.equal(windows.input_ids, ids)
    assert torch.equal(windows.attention_mask, mask)
    assert windows.tokens == 45
    assert windows.name == "tokens.safetensors"
    save_file({"input_ids": ids.flatten().int()}, tmp_path / "flat.safetensors")
    assert draw(tmp_path / "flat.safetensors", samples=9).input_ids.shape == (9, 7)


# Packaged texts


@pytest.mark.parametrize("name", ["default", "heldout"])
def test_packaged_texts(name: str, tokenizer: PreTrainedTokenizerFast) -> None:
    text = read_source(name)
    assert len(text) > 10_000
    assert "\0" not in text
    assert "\ufffd" not in text
    windows = draw(name, tokenizer, samples=16, seq_len=128)
    assert windows.input_ids.shape == (16, 128)
    assert windows.name == name


def test_every_packaged_file_has_its_source_told() -> None:
    folder = Path(__file__).parents[1] / "lorap" / "calibration" / "texts"
    rows = re.findall(r"^\| `(.+?)` \|", (folder / "SOURCES.md").read_text("utf-8"), re.MULTILINE)
    assert sorted(rows) == sorted(path.name for path in folder.glob("*.txt"))


@pytest.mark.parametrize("name", SHIPPED)
def test_single_shipped_texts(name: str, tokenizer: PreTrainedTokenizerFast) -> None:
    folder = Path(__file__).parents[1] / "lorap" / "calibration" / "texts"
    assert read_source(name) == (folder / f"{name.removeprefix('default/')}.txt").read_text("utf-8")
    assert consecutive_windows(name, tokenizer, seq_len=63, max_tokens=1000, vocab_size=VOCAB).name == name


def test_the_mixture_is_all_shipped_texts() -> None:
    assert list(shipped_texts()) == SHIPPED
    assert read_source("default") == "\n\n".join(read_source(name) for name in SHIPPED)


@pytest.mark.parametrize("name", ["default/poem", "default/heldout", "default/", "default/novel.txt"])
def test_unknown_shipped_text_names_the_known_ones(name: str) -> None:
    with pytest.raises(CalibrationError) as error:
        read_source(name)
    assert f"no text {name} ships with lorap; there are {', '.join(SHIPPED)} and heldout" in str(error.value)


def test_files_called_like_shipped_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shipped texts have the name; a dot and a slash say that the file is meant."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "default").mkdir()
    write(tmp_path / "default" / "novel", "mine")
    assert read_source("default/novel") != "mine"
    assert source_name("default/novel") == "default/novel"
    assert read_source("./default/novel") == "mine"
    assert source_name("./default/novel") == "novel"


def test_self_is_no_text_but_a_file_of_that_name_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "self", TEXT)
    assert source_name("self") == "self"
    with pytest.raises(CalibrationError, match=r"self stands for text that a model writes.* \./self"):
        read_source("self")
    assert read_source("./self") == TEXT


def test_heldout_text_is_not_calibrated_on() -> None:
    default = set(read_source("default").splitlines())
    heldout = [line for line in read_source("heldout").splitlines() if len(line) > 40]
    assert heldout
    assert not [line for line in heldout if line in default]


# Refusals


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("empty.txt", b"", ["empty.txt", "no text"]),
        ("blank.txt", b" \n\t\n", ["blank.txt", "no text"]),
        ("binary.txt", b"abc\0def", ["binary.txt", "zero byte at offset 3"]),
        ("latin1.txt", b"caf\xe9 au lait", ["latin1.txt", "not UTF-8", "offset 3"]),
        ("field.jsonl", b'{"text": "a"}\n{"content": "b"}\n', ["field.jsonl", "line 2 has no text field"]),
        ("bad.safetensors", b"xx", ["cannot read tokens from", "bad.safetensors"]),
        ("bad.npy", b"not numpy", ["cannot read tokens from", "bad.npy"]),
        pytest.param(
            "empty.npy",
            b"",
            ["cannot read tokens from", "empty.npy"],
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refuses_bad_files(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, file: str, content: bytes, words: list[str]
) -> None:
    message = refusal(write(tmp_path / file, content), tokenizer)
    for word in words:
        assert word in message


@pytest.mark.parametrize("name", ["nope.txt", "nope.npy", "nope.safetensors"])
def test_refuses_missing_files(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert str(tmp_path / name) in refusal(tmp_path / name, tokenizer)


def test_refuses_an_empty_folder(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    assert "empty folder" in refusal(tmp_path, tokenizer)


def test_refuses_a_data_set_without_text(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    write(tmp_path / "part.jsonl", '{"body": "one"}\n')
    with pytest.raises(CalibrationError, match=r"record 1 has no text field: it has body; .*FILE:FIELD"):
        read_source(str(tmp_path))
    assert read_source(f"{tmp_path}:::body") == "one"


def test_a_text_instead_of_its_name_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    refusal("once upon a time " * 100, tokenizer)


@pytest.mark.parametrize(
    ("source", "options", "words"),
    [
        (
            torch.arange(20),
            {"samples": 3},
            ["tokens has 20 tokens", "2 windows of 7", "3 were asked", "ask for 2 samples"],
        ),
        (torch.arange(6), {}, ["6 tokens", "0 windows of 7", "shorter windows"]),
        (torch.arange(64), {"vocab": 63}, ["token 63", "63 embeddings"]),
        (torch.tensor([[1, -5]]), {}, ["token -5", "500 embeddings"]),
        (torch.rand(63), {}, ["whole numbers", "float32 of shape (63,)"]),
        (torch.zeros(2, 3, 4, dtype=torch.long), {}, ["int64 of shape (2, 3, 4)"]),
        (torch.tensor(3), {}, ["int64 of shape ()"]),
        (torch.zeros(0, dtype=torch.long), {}, ["int64 of shape (0,)"]),
        (
            {"input_ids": torch.ones(2, 7, dtype=torch.long), "attention_mask": torch.ones(2, 6)},
            {},
            ["attention_mask is float32 of shape (2, 6)", "input_ids are int64 of shape (2, 7)"],
        ),
        pytest.param(
            {"ids": torch.ones(2, 7, dtype=torch.long)},
            {},
            ["no tensor `input_ids`"],
        ),
    ],
    ids=[
        "few-windows",
        "short",
        "too-high",
        "negative",
        "float",
        "3-d",
        "0-d",
        "no-tokens",
        "mask-shape",
        "no-input-ids",
    ],
)
def test_refuses_bad_tokens(source, options: dict, words: list[str]) -> None:
    message = refusal(source, **options)
    for word in words:
        assert word in message


def test_mask_of_a_token_stream_is_not_forgotten() -> None:
    ids, mask = torch.arange(14), (torch.arange(14) < 10).long()
    try:
        windows = draw({"input_ids": ids, "attention_mask": mask}, samples=2)
    except CalibrationError:
        return  # refusing is as good
    assert windows.tokens == 10


def test_refuses_a_file_without_input_ids(tmp_path: Path) -> None:
    save_file({"labels": torch.arange(3)}, tmp_path / "tokens.safetensors")
    message = refusal(tmp_path / "tokens.safetensors")
    assert "tokens.safetensors has no tensor `input_ids`, only labels" in message


def test_refuses_text_without_a_tokenizer(tmp_path: Path) -> None:
    message = refusal(write(tmp_path / "text.txt", TEXT))
    assert "no tokenizer" in message
    assert "text.txt" in message


def test_refuses_the_tokenizer_of_another_model(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = write(tmp_path / "text.txt", TEXT)
    top = max(tokenizer(TEXT)["input_ids"])
    message = refusal(path, tokenizer, vocab=top)
    assert f"text.txt gives token {top}, but the model has {top} embeddings" in message
    assert draw(path, tokenizer, vocab=top + 1).input_ids.shape == (3, 7)
