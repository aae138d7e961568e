"""What ``lorap compress`` would do to a model, and what it would take, before a weight is read.

config.json and headers ──> ModelShape ──> Sizes        ranks, widths, parameters, bytes
                                │            │
Machine (tried, or published) ──┴────────────┴──> stages: seconds, memory, and the formula of each
"""

from lorap.compression.estimate.estimate import Estimate, estimate
from lorap.compression.estimate.gpus import GPUS, find_gpu
from lorap.compression.estimate.rates import Machine, this_machine
from lorap.compression.estimate.shapes import ModelShape

__all__ = ["GPUS", "Estimate", "Machine", "ModelShape", "estimate", "find_gpu", "this_machine"]
