"""Seconds by stage: what runs inside a stage is counted once."""

import time

import pytest

from lorap.resources import Stopwatch


def test_a_stage_inside_another_is_not_counted_in_it() -> None:
    watch = Stopwatch()
    with watch("outer"):
        time.sleep(0.05)
        for _ in range(2):
            with watch("inner"):
                time.sleep(0.1)
    with watch("outer"):
        time.sleep(0.05)
    assert list(watch.seconds) == ["inner", "outer"]
    assert 0.2 <= watch.seconds["inner"] < 0.4
    assert 0.1 <= watch.seconds["outer"] < 0.19


def test_a_stage_that_raises_is_counted_and_closed() -> None:
    watch = Stopwatch()
    with pytest.raises(ValueError, match="stop"), watch("outer"), watch("inner"):
        time.sleep(0.05)
        raise ValueError("stop")
    with watch("outer"):
        pass
    assert watch.seconds["inner"] >= 0.05
    assert 0 <= watch.seconds["outer"] < 0.04
