"""What ``lorap compress`` would do to a model, and what it would take, before a weight is read.

config.json and headers ──> ModelShape ──> Sizes        ranks, widths, parameters, bytes
                                │            │
Machine (tried, or published) ──┴────────────┴──> stages: seconds, memory, and the formula of each
"""

from lorap.scaling.estimate import Estimate, estimate
from lorap.scaling.gpus import GPUS, find_gpu
from lorap.scaling.rates import Machine, this_machine
from lorap.scaling.shapes import ModelShape

__all__ = ["GPUS", "Estimate", "Machine", "ModelShape", "estimate", "find_gpu", "this_machine"]
