"""Tiny random models of every supported family, with a real tokenizer and real text."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny_models import random_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import lorap
from lorap.calibration import read_source

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

SEQ_LEN = 32
SMALL = {"num_calibration_samples": 8, "calibration_seq_len": SEQ_LEN}

# family -> (transformers' class prefix, what sets it apart)
_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-mha": ("Llama", {"num_key_value_heads": 4}),
    "llama-gqa": ("Llama", {"tie_word_embeddings": True}),
    "llama-biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-wide-heads": ("Llama", {"head_dim": 24}),
    "mistral": ("Mistral", {"sliding_window": 8}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "smollm3": ("SmolLM3", {"no_rope_layer_interval": 2, "num_hidden_layers": 3}),
}
FAMILIES = list(_FAMILIES)

# Files that take longest, in that order; the rest is short. A file that begins last and takes minutes leaves a core idle.
LONGEST = (
    "real_model",
    "runs",
    "triton_aot_low_rank",
    "docs",
    "triton_aot",
    "cuda_compile",
    "native",
    "startup",
    "stderr",
    "packaging",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {f"test_{name}": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """Bytes may hold a time, as a gzip header does; both processes of xdist must find the same names."""
    return argname if isinstance(val, bytes) else None


@pytest.fixture(scope="session", autouse=True)
def _no_drawings() -> Iterator[None]:
    """Drawing takes a second for each report.html; tests of pages do it all the same."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lorap.reports.html.charts.has_matplotlib", lambda: False)
        yield


@pytest.fixture
def drawings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Charts in report.html, as outside of tests."""
    pytest.importorskip("matplotlib")
    monkeypatch.setattr("lorap.reports.html.charts.has_matplotlib", lambda: True)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of 500 tokens, trained on the text that ships with lorap."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<eos>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([read_source("default")], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<eos>", pad_token="<pad>")


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of 500 tokens."""
    return make_tokenizer()


@pytest.fixture(scope="session")
def make_model(tokenizer: PreTrainedTokenizerFast) -> Callable[..., Any]:
    """``make_model(family, **config_overrides)``: a random model, the same on every call."""

    def make(family: str, **overrides: Any) -> Any:
        prefix, special = _FAMILIES[family]
        options = {
            "vocab_size": len(tokenizer),
            "hidden_size": 64,
            "intermediate_size": 100,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 256,
            "tie_word_embeddings": False,
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        }
        config = getattr(transformers, f"{prefix}Config")(**(options | special | overrides))
        return random_model(lambda: getattr(transformers, f"{prefix}ForCausalLM")(config))

    return make


@pytest.fixture(scope="session")
def tokens(tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """(8, 32) calibration tokens of real text."""
    ids = tokenizer(read_source("default")[:6000])["input_ids"]
    return torch.tensor(ids[: 8 * SEQ_LEN]).view(8, SEQ_LEN)


@pytest.fixture
def short_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Correction steps of two windows of 32 tokens, so that few windows are enough for several."""
    monkeypatch.setattr("lorap.algorithms.step_schedule.STEP_TOKENS", 64)


@pytest.fixture
def compress_small(tokens: torch.Tensor) -> Callable[..., Any]:
    """``compress_small(model, **config)``: lorap.compress in memory, the paper's recipe at 50 % unless told otherwise."""

    def run(model: Any, calibration: Any = None, **options: Any) -> tuple[Any, lorap.CompressionReport]:
        config = lorap.CompressionConfig(**(SMALL | {"recipe": "lorap", "sparsity": 0.5} | options))
        return lorap.compress(
            model, calibration=tokens if calibration is None else calibration, config=config, progress=False
        )

    return run


@pytest.fixture
def model_folder(make_model: Callable[..., Any], tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Path:
    """A saved llama-gqa with its tokenizer."""
    folder = tmp_path / "model"
    make_model("llama-gqa").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def small_text(tmp_path: Path) -> Path:
    """60 KB of real text."""
    path = tmp_path / "text.txt"
    path.write_text(read_source("default")[:60_000], "utf-8")
    return path
