"""Calibration: sources to token windows (sources, mixtures, windows), one decoder layer at a time (stream), sums (statistics)."""

from lorap.calibration.sources import read_source
from lorap.calibration.statistics import ActivationStats
from lorap.calibration.stream import CalibrationStream
from lorap.calibration.windows import TokenWindows, draw_windows, fold_of

__all__ = ["ActivationStats", "CalibrationStream", "TokenWindows", "draw_windows", "fold_of", "read_source"]
