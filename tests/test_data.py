"""The seed alone draws windows, windows know their group, and folds keep groups whole."""

from pathlib import Path

import numpy as np
import pytest
import torch
from drawing import TEXT, draw, refusal, write
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from lorap import CalibrationError
from lorap.calibration import TokenWindows, fold_of, read_source
from lorap.calibration.sources import shipped_texts
from lorap.calibration.windows import consecutive_windows
from lorap.reports.records import Share

# Windows


def as_set(windows: TokenWindows) -> set[tuple[int, ...]]:
    return {tuple(row) for row in windows.input_ids.tolist()}


def test_windows_do_not_overlap_and_all_can_be_drawn() -> None:
    tokens = torch.arange(100)
    windows = draw(tokens, samples=14)
    assert windows.input_ids.shape == (14, 7)
    assert as_set(windows) == {tuple(range(7 * i, 7 * i + 7)) for i in range(14)}
    assert as_set(draw(tokens, samples=5)) < as_set(windows)
    assert len(as_set(draw(tokens, samples=5))) == 5


def test_seed_draws_the_windows(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = write(tmp_path / "text.txt", read_source("default")[:5000])
    first, again, other = draw(path, tokenizer), draw(path, tokenizer), draw(path, tokenizer, seed=1)
    assert torch.equal(first.input_ids, again.input_ids)
    assert first.sha256 == again.sha256
    assert len(first.sha256) == 64
    assert as_set(first) != as_set(other)
    assert first.sha256 != other.sha256


def test_seed_does_not_touch_the_global_generator() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    draw(torch.arange(100))
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(("max_tokens", "count"), [(None, 14), (50, 7), (7, 1), (1000, 14)])
def test_consecutive_windows(max_tokens: int | None, count: int) -> None:
    windows = consecutive_windows(torch.arange(100), None, seq_len=7, max_tokens=max_tokens, vocab_size=100)
    assert torch.equal(windows.input_ids, torch.arange(7 * count).reshape(count, 7))
    assert windows.tokens == 7 * count


def test_consecutive_windows_refuses_a_short_text() -> None:
    with pytest.raises(CalibrationError, match="tokens has 6 tokens, less than one window of 7"):
        consecutive_windows(torch.arange(6), None, seq_len=7, max_tokens=None, vocab_size=100)


def test_windows_in_memory_are_used_as_they_are() -> None:
    ids = torch.arange(15, dtype=torch.int32).reshape(3, 5)
    windows = draw(ids, samples=100, seq_len=2)
    assert torch.equal(windows.input_ids, ids.long())
    assert (windows.name, windows.tokens, windows.attention_mask) == ("tokens", 15, None)
    mask = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]])
    masked = draw({"input_ids": ids, "attention_mask": mask})
    assert torch.equal(masked.input_ids, ids.long())
    assert torch.equal(masked.attention_mask, mask)
    assert masked.tokens == 8
    assert draw({"input_ids": ids}).attention_mask is None


def test_short_text_names_its_numbers(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = write(tmp_path / "text.txt", TEXT)
    count = len(tokenizer(TEXT)["input_ids"])
    message = refusal(path, tokenizer, samples=1000, seq_len=63)
    assert f"text.txt has {count:,} tokens, which is {count // 63} windows of 63; 1000 were asked for" in message


@pytest.mark.parametrize(
    ("seed", "sha256"),
    [
        (0, "09ba1cf0488eef919daf1ccd1bd9bf82f72ce9f163a6e12b6bee014d0019f05a"),
        (1, "8051fd20ee2e288b713b9d0e2fbf68c5f494bf06402daedf9f66ea9904ec2ce4"),
        (2, "8eb736656e0da3ed4ccf7da92c1aa9588f685261c0a455a36a51764d5779958a"),
    ],
)
def test_draws_of_one_source_never_change(seed: int, sha256: str) -> None:
    """Published results name a seed; it must draw the same windows in every version."""
    for source in (torch.arange(1000), [torch.arange(1000)], [(torch.arange(1000), 3.5)]):
        assert draw(source, samples=9, seq_len=63, seed=seed, vocab=1000).sha256 == sha256


# Groups


def test_windows_of_one_text_are_grouped_by_stretch(tmp_path: Path) -> None:
    np.save(tmp_path / "my.npy", np.arange(100))
    windows = draw(tmp_path / "my.npy", samples=14)
    assert windows.group_names == ("my.npy [1/4]", "my.npy [2/4]", "my.npy [3/4]", "my.npy [4/4]")
    assert windows.groups.dtype == torch.int64
    position = windows.input_ids[:, 0] // 7
    assert windows.groups.tolist() == (position * 4 // 14).tolist()
    # 14 windows in 4 equal stretches of 3.5: windows 0-3, 4-6, 7-10, 11-13.
    assert torch.bincount(windows.groups).tolist() == [4, 3, 4, 3]
    few = draw(tmp_path / "my.npy", samples=3)
    assert few.groups.tolist() == (few.input_ids[:, 0] // 7 * 4 // 14).tolist()
    assert few.group_names == windows.group_names
    assert few.shares == (Share("my.npy", 1.0, 3),)


def test_consecutive_windows_are_grouped_by_stretch_of_what_was_read() -> None:
    windows = consecutive_windows(torch.arange(100), None, seq_len=7, max_tokens=63, vocab_size=100)
    assert windows.groups.tolist() == [0, 0, 0, 1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize(
    ("rows", "groups"),
    [(1, [0]), (2, [0, 1]), (3, [0, 1, 2]), (4, [0, 1, 2, 3]), (6, [0, 0, 1, 2, 2, 3]), (8, [0, 0, 1, 1, 2, 2, 3, 3])],
)
def test_rows_of_a_token_matrix_are_grouped_in_their_order(rows: int, groups: list[int]) -> None:
    windows = draw(torch.zeros(rows, 63, dtype=torch.long))
    assert windows.groups.tolist() == groups
    count = groups[-1] + 1
    names = [f"tokens [{index}/{count}]" for index in range(1, count + 1)] if count > 1 else ["tokens"]
    assert list(windows.group_names) == names


# Folds


def grouped(groups: list[int]) -> TokenWindows:
    ids = torch.zeros(len(groups), 1, dtype=torch.long)
    return TokenWindows(ids, "made up", "", groups=torch.tensor(groups), group_names=("a", "b", "c", "d"))


@pytest.mark.parametrize(
    ("sizes", "second"),
    [
        ([5], []),
        ([3, 3], [1]),
        ([2, 3], [0]),
        ([1, 1, 1, 1], [1, 3]),
        ([5, 4, 3, 2], [1, 2]),  # 5 | 4, then 5 | 4 + 3, then 5 + 2 | 7
        ([1, 0, 1], [2]),
        ([0, 4, 0], []),
    ],
    ids=str,
)
def test_folds_get_the_largest_group_first(sizes: list[int], second: list[int]) -> None:
    groups = [group for group, size in enumerate(sizes) for _ in range(size)]
    fold = fold_of(grouped(groups))
    assert fold.dtype == torch.bool
    assert fold.tolist() == [group in second for group in groups]


@given(st.lists(st.integers(0, 6), min_size=1, max_size=100))
def test_folds_keep_groups_whole_and_are_nearly_equal(groups: list[int]) -> None:
    fold = fold_of(grouped(groups))
    sides = {(group, side) for group, side in zip(groups, fold.tolist(), strict=True)}
    assert len(sides) == len(set(groups))
    second = int(fold.sum())
    largest = max(groups.count(group) for group in groups)
    assert abs(len(groups) - 2 * second) <= largest
    if len(set(groups)) > 1:
        assert 0 < second < len(groups)
    assert torch.equal(fold, fold_of(grouped(groups)))


def test_windows_without_groups_are_one_fold() -> None:
    assert fold_of(TokenWindows(torch.zeros(3, 2, dtype=torch.long), "made up", "")).tolist() == [False] * 3


def test_folds_of_the_default_texts(tokenizer: PreTrainedTokenizerFast) -> None:
    """10 windows of each text: one half of the texts against the other, and an odd one among the first."""
    texts = len(shipped_texts())
    windows = draw("default", tokenizer, samples=10 * texts)
    fold = fold_of(windows)
    assert int(fold.sum()) == 10 * (texts // 2)
    assert not set(windows.groups[fold].tolist()) & set(windows.groups[~fold].tolist())
