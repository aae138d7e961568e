"""Calibration: sources to token windows (sources, mixtures, data), one decoder layer at a time (stream), sums (statistics)."""

from lorap.calibration.data import TokenWindows, draw_windows, fold_of
from lorap.calibration.sources import read_source
from lorap.calibration.statistics import ActivationStats
from lorap.calibration.stream import CalibrationStream

__all__ = ["ActivationStats", "CalibrationStream", "TokenWindows", "draw_windows", "fold_of", "read_source"]
