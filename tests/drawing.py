"""Draw windows in tests, with short windows and the vocabulary of the tokenizer in conftest.py."""

from pathlib import Path

import pytest

from lorap import CalibrationError
from lorap.calibration import draw_windows

VOCAB = 500  # of the tokenizer in conftest.py
TEXT = "Über the river, 12 boats; naïve crews sang 歌.\n" * 40


def draw(source, tokenizer=None, *, samples: int = 3, seq_len: int = 7, seed: int = 0, vocab: int = VOCAB):
    return draw_windows(source, tokenizer, num_samples=samples, seq_len=seq_len, seed=seed, vocab_size=vocab)


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def refusal(source, tokenizer=None, **options) -> str:
    with pytest.raises(CalibrationError) as error:
        draw(source, tokenizer, **options)
    return str(error.value)
