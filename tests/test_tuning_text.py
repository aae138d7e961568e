"""The windows of a training: how many of each text, in which order, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lorap.errors import CalibrationError
from lorap.recovery.text import training_windows

OPTIONS = {"count": 21, "seq_len": 5, "seed": 3, "vocab_size": 1000}


def distinct(windows: int, first: int = 0) -> torch.Tensor:
    """Tokens whose windows of 5 start with first, first + 5, ..."""
    return torch.arange(first, first + 5 * windows)


def test_a_short_text_comes_again_only_after_all_of_it_has_come():
    found = training_windows(distinct(8), None, **OPTIONS)
    assert found.input_ids.shape == (21, 5)
    starts, counts = found.input_ids[:, 0].unique(return_counts=True)
    assert starts.tolist() == list(range(0, 40, 5))
    assert sorted(counts.tolist()) == [2, 2, 2, 3, 3, 3, 3, 3]  # 21 = 2 rounds of 8, and 5
    assert torch.equal(found.input_ids, found.input_ids[:, :1] + torch.arange(5))
    assert found.attention_mask is None


def test_sources_share_by_weight_and_are_mixed():
    found = training_windows([(distinct(30), 2.0), distinct(30, 500)], None, **OPTIONS)
    second = found.input_ids[:, 0] >= 500
    assert int(second.sum()) == 7
    assert [share.windows for share in found.shares] == [14, 7]
    assert 0 < int(second[:14].sum()) < 7  # not one source after the other
    assert len(found.input_ids[:, 0].unique()) == 21


def test_the_seed_decides_the_order():
    same = [training_windows(distinct(30), None, **OPTIONS) for _ in range(2)]
    other = training_windows(distinct(30), None, **(OPTIONS | {"seed": 4}))
    assert same[0].sha256 == same[1].sha256 != other.sha256
    assert torch.equal(same[0].input_ids, same[1].input_ids)


def test_masks_travel_with_their_windows():
    ids = distinct(6).view(6, 5)
    mask = torch.ones(6, 5, dtype=torch.bool)
    mask[2, 3:] = False
    found = training_windows([{"input_ids": ids, "attention_mask": mask}, distinct(6, 500)], None, **OPTIONS)
    assert found.attention_mask is not None
    expected = torch.ones(21, 5, dtype=torch.bool)
    expected[found.input_ids[:, 0] == 10, 3:] = False
    assert torch.equal(found.attention_mask, expected)
    assert not expected.all()


def test_own_samples_come_from_the_sampler_and_default_has_none(tokenizer):
    asked = []

    def sampler(count, seq_len, seed):
        asked.append((count, seq_len, seed))
        return torch.full((count, seq_len), 7)

    found = training_windows(["self", distinct(30)], None, sampler=sampler, **OPTIONS)
    assert asked == [(11, 5, 3)]
    assert int((found.input_ids == 7).all(-1).sum()) == 11
    default = training_windows("default", tokenizer, sampler=sampler, **OPTIONS)
    assert len(asked) == 1
    assert {share.windows for share in default.shares} == {2, 3}
    assert len(default.shares) == 9


def test_what_cannot_be_used(tmp_path):
    with pytest.raises(CalibrationError, match="less than one window of 5"):
        training_windows(torch.arange(4), None, **OPTIONS)
    with pytest.raises(CalibrationError, match="windows of 6 tokens"):
        training_windows(torch.zeros(3, 6, dtype=torch.int64), None, **OPTIONS)
    with pytest.raises(CalibrationError, match="only be drawn together with"):
        training_windows("self", object(), **OPTIONS)
    np.save(tmp_path / "tokens.npy", np.array([1, 2, 3, 4, 5, 2000]))
    with pytest.raises(CalibrationError, match="2000"):
        training_windows(tmp_path / "tokens.npy", None, **OPTIONS)
