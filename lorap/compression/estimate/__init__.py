"""What ``lorap compress`` would do to a model, and what it would take.

config.json and headers ──> ModelShape ──> Sizes           ranks, widths, parameters, bytes: exact where shapes decide
                                │      └──> Memory         by stage, in a few terms
a few of its layers ──> the run of compress ──> Trial      seconds by stage, multiplied out
"""

from lorap.compression.estimate.estimate import Estimate, estimate
from lorap.compression.estimate.shapes import ModelShape
from lorap.compression.estimate.texts import Texts
from lorap.compression.estimate.trial import Trial, try_layers

__all__ = ["Estimate", "ModelShape", "Texts", "Trial", "estimate", "try_layers"]
