"""Calibration: text to token windows (data), one decoder layer at a time (stream), sums over tokens (statistics)."""

from lorap.calibration.data import TokenWindows, draw_windows, read_source
from lorap.calibration.statistics import ActivationStats
from lorap.calibration.stream import CalibrationStream

__all__ = ["ActivationStats", "CalibrationStream", "TokenWindows", "draw_windows", "read_source"]
