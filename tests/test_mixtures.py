"""Several sources: whose windows are drawn, how many by weight, and what is refused."""

from fractions import Fraction
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from lorap import CalibrationError
from lorap.calibration import TokenWindows, draw_windows, read_source
from lorap.calibration.mixtures import parse_source, split_by_weight, weighted_sources
from lorap.calibration.sources import shipped_texts
from lorap.reports.records import Share

SHIPPED = list(shipped_texts())
EACH = 1 / len(SHIPPED)
LOW, HIGH = torch.arange(100), torch.arange(100, 500)


def draw(sources, tokenizer=None, *, samples: int = 10, seq_len: int = 7, seed: int = 0) -> TokenWindows:
    return draw_windows(sources, tokenizer, num_samples=samples, seq_len=seq_len, seed=seed, vocab_size=500)


def refusal(sources, **options) -> str:
    with pytest.raises(CalibrationError) as error:
        draw(sources, **options)
    return str(error.value)


# Shares


@pytest.mark.parametrize(
    ("total", "weights", "shares"),
    [
        (10, [1], [10]),
        (128, [1, 1, 1, 1, 1], [26, 26, 26, 25, 25]),
        (128, [2, 1], [85, 43]),
        (100, [1, 63], [2, 98]),  # 1.5625 and 98.4375: the larger remainder wins
        (10, [0.5, 0.25, 0.25], [5, 3, 2]),
        (3, [100, 1, 1], [1, 1, 1]),
        (63, [1000, 1, 1], [61, 1, 1]),
        (10, [1000, 30, 1], [8, 1, 1]),
        (4, [1, 2, 3, 4, 5], [0, 1, 1, 1, 1]),
        (1, [1, 1, 1], [1, 0, 0]),
        (2, [1, 5, 5], [0, 1, 1]),
    ],
)
def test_split_by_weight(total: int, weights: list[float], shares: list[int]) -> None:
    assert split_by_weight(total, weights) == shares


@given(st.integers(1, 300), st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=8))
def test_shares_add_up_and_follow_the_weights(total: int, weights: list[float]) -> None:
    shares = split_by_weight(total, weights)
    assert sum(shares) == total
    if total >= len(weights):
        assert min(shares) >= 1
        quotas = [total * Fraction(weight) / sum(map(Fraction, weights)) for weight in weights]
        if (
            min(quotas) >= 1
        ):  # nobody had to be lifted: the plain largest remainder, within one window of the exact quota
            assert all(abs(share - quota) < 1 for share, quota in zip(shares, quotas, strict=True))
    else:
        assert max(shares) == 1
    for left, left_share in zip(weights, shares, strict=True):
        for right, right_share in zip(weights, shares, strict=True):
            assert left <= right or left_share >= right_share
    assert split_by_weight(total, [4 * weight for weight in weights]) == shares


def test_half_of_the_default_is_the_models_own_where_there_is_one() -> None:
    assert weighted_sources("default") == [(name, pytest.approx(EACH)) for name in SHIPPED]
    half = [*((name, pytest.approx(EACH / 2)) for name in SHIPPED), ("self", pytest.approx(0.5))]
    assert weighted_sources("default", own_samples=True) == half
    # Only `default` is divided: what was asked for by name stays as it was.
    assert weighted_sources(["default/news", LOW], own_samples=True) == [("default/news", 1.0), (LOW, 1.0)]
    found = dict(weighted_sources([("self", 2), ("default", 4)], own_samples=True))
    assert found == {"self": pytest.approx(4.0)} | dict.fromkeys(SHIPPED, pytest.approx(2 * EACH))
    assert dict(weighted_sources([("self", 2), "default/news"])) == {"self": 2.0, "default/news": 1.0}


# Windows of several sources


def test_each_source_gives_its_share_as_it_would_alone() -> None:
    windows = draw([(LOW, 1.0), (HIGH, 4)], seed=3)
    assert windows.input_ids.shape == (10, 7)
    assert torch.equal(windows.input_ids[:2], draw(LOW, samples=2, seed=3).input_ids)
    assert torch.equal(windows.input_ids[2:], draw(HIGH, samples=8, seed=3).input_ids)
    assert windows.groups.tolist() == [0] * 2 + [1] * 8
    assert windows.group_names == ("tokens", "tokens")
    assert windows.shares == (Share("tokens", 1.0, 2), Share("tokens", 4.0, 8))
    assert windows.attention_mask is None
    assert windows.sha256 != draw([(LOW, 1.0), (HIGH, 4)], seed=4).sha256
    assert windows.sha256 == draw(((LOW, 1.0), (HIGH, 4)), seed=3).sha256


def test_names(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = tmp_path / "my.txt"
    path.write_text(read_source("heldout")[:5000], "utf-8")
    windows = draw([(str(path), 2), "default/news"], tokenizer, samples=9)
    assert windows.name == "my.txt, default/news"
    assert windows.group_names == ("my.txt", "default/news")
    assert [share.windows for share in windows.shares] == [6, 3]


def test_fewer_windows_than_sources_are_told_of(caplog: pytest.LogCaptureFixture) -> None:
    sources = [(LOW, 1.0), (HIGH, 4.0), (torch.arange(50), 2.0)]
    with caplog.at_level("WARNING", logger="lorap"):
        assert [share.windows for share in draw(sources, samples=2).shares] == [0, 1, 1]
        (record,) = caplog.records
        assert "2 calibration windows are too few for 3 sources: none is from tokens," in record.getMessage()
        assert "ask for 3 windows or more" in record.getMessage()
        caplog.clear()
        draw(sources, samples=3)
    assert not caplog.records


def test_a_token_matrix_among_others_gives_its_share() -> None:
    matrix = torch.arange(70).reshape(10, 7)
    mask = torch.ones_like(matrix)
    mask[:, 5:] = 0
    windows = draw([{"input_ids": matrix, "attention_mask": mask}, HIGH], samples=6)
    rows = windows.input_ids[:3]
    assert {tuple(row) for row in rows.tolist()} < {tuple(row) for row in matrix.tolist()}
    assert len({int(row[0]) for row in rows}) == 3
    assert windows.attention_mask.tolist() == [[True] * 5 + [False] * 2] * 3 + [[True] * 7] * 3
    assert windows.tokens == 3 * 5 + 3 * 7
    two = draw([matrix, matrix + 70], samples=4, seq_len=100)  # matrices bring their own length
    assert two.input_ids.shape == (4, 7)


def test_default_is_its_texts_in_equal_parts(tokenizer: PreTrainedTokenizerFast) -> None:
    samples = 2 * len(SHIPPED) + 2
    windows = draw("default", tokenizer, samples=samples)
    assert windows.name == "default"
    assert list(windows.group_names) == SHIPPED
    assert [share.windows for share in windows.shares] == [3, 3, *[2] * (len(SHIPPED) - 2)]
    for index, name in enumerate(SHIPPED):
        alone = draw(name, tokenizer, samples=samples)
        assert alone.name == name
        part = windows.input_ids[windows.groups == index]
        assert torch.equal(part, alone.input_ids[: len(part)])
    assert draw("default", tokenizer, samples=1).groups.tolist() == [0]


def test_a_source_that_is_named_twice_is_one_group() -> None:
    weights = dict(weighted_sources(["default", ("default/novel", 2.0), ("a.txt", 1), (Path("a.txt"), 2)]))
    assert weights["default/novel"] == pytest.approx(2 + EACH)
    assert list(weights) == [*SHIPPED, "a.txt"]
    assert weights["a.txt"] == 3
    twice = draw([LOW, (LOW, 5.0)])
    assert twice.sha256 == draw(LOW).sha256
    assert len(twice.group_names) == 4


# Command line


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("wiki.txt", "wiki.txt"),
        ("wiki.txt=2", ("wiki.txt", 2.0)),
        ("a=b=0.5", ("a=b", 0.5)),
        ("a=b", "a=b"),
        ("rows:config=x", "rows:config=x"),
        ("=2", "=2"),
        ("wiki.txt=", "wiki.txt="),
        ("wiki.txt=-1", ("wiki.txt", -1.0)),
        ("x" * 300 + "=1", ("x" * 300, 1.0)),
    ],
)
def test_parse_source(text: str, parsed: str | tuple[str, float]) -> None:
    assert parse_source(text) == parsed


def test_a_file_called_like_a_weighted_source_is_that_file(tmp_path: Path) -> None:
    path = tmp_path / "run=2"
    assert parse_source(str(path)) == (str(tmp_path / "run"), 2.0)
    path.write_text("text")
    assert parse_source(str(path)) == str(path)


# Refusals


@pytest.mark.parametrize("weight", [0, -1.0, float("nan"), float("inf"), "2", None, True], ids=repr)
def test_refuses_weights(weight: object) -> None:
    message = refusal([(LOW, 1), (HIGH, weight)])
    assert f"the weight of tokens is {weight!r}; it must be a number above 0" in message


@pytest.mark.parametrize(
    ("sources", "word"),
    [
        ([], "the list of calibration sources is empty"),
        (None, "None is no calibration source"),
        (("wiki.txt", 2.0), "2.0 is no calibration source"),
        ([3, 4, 5], "3 is no calibration source"),
        ([("a.txt", 1, 2)], "('a.txt', 1, 2) is no calibration source"),
        ([["a.txt", 1]], "['a.txt', 1] is no calibration source"),
    ],
    ids=str,
)
def test_refuses_what_is_no_source(sources: object, word: str) -> None:
    assert word in refusal(sources)


def test_a_source_too_short_for_its_share_says_how_many_would_do(tmp_path: Path) -> None:
    message = refusal([(LOW, 3), HIGH], samples=63)
    assert "tokens has 100 tokens, which is 14 windows of 7; its share of 63 is 47 (weight 3 of 4)" in message
    assert "or ask for 19 samples" in message
    draw([(LOW, 3), HIGH], samples=19)  # 14 and 5
    refusal([(LOW, 3), HIGH], samples=20)
    message = refusal([LOW[:6], HIGH])
    assert "0 windows of 7; its share of 10 is 5" in message
    assert message.endswith("Give a longer text or shorter windows, give it less weight, or leave it out")


def test_refuses_windows_of_different_lengths() -> None:
    message = refusal([LOW.reshape(20, 5), HIGH])
    assert "windows of different lengths (tokens 5, tokens 7 tokens)" in message
    refusal([LOW.reshape(20, 5), LOW.reshape(10, 10)])
