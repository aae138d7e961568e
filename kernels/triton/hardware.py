"""An H200 in numbers, for lorap.kernels.cost and for launch settings. No number here was measured by us."""

from __future__ import annotations

NUM_SMS = 132
MEMORY_BANDWIDTH = 4.3e12  # bytes per second; 4.8e12 on paper
SM_BANDWIDTH = 64e9  # that one SM can take of it; half of what its port to L2 could
L2_BANDWIDTH = 5.5e12
MEMORY_LATENCY = 0.8e-6  # seconds, under load
FMA_RATE = 33e12  # multiply-adds of float32 a second outside of tensor cores
LAUNCH = 1.3e-6  # one more kernel in a graph
RAMP = 0.4e-6  # until a kernel of ours reads at full speed
CLUSTER_BARRIER = 0.2e-6  # between blocks that run side by side, and reading what the others have
DEPENDENT_LAUNCH = 0.2e-6  # of a kernel whose start does not wait for the end of the one before


def read_seconds(nbytes: float, programs: int, ahead: float, *, num_sms: int = NUM_SMS, per_sm: int = 2) -> float:
    """Seconds to read ``nbytes`` once, by ``programs`` that keep ``ahead`` bytes each in flight, ``per_sm`` of them on an SM."""
    resident = min(per_sm, -(-programs // num_sms))
    one_sm = min(SM_BANDWIDTH, resident * ahead / MEMORY_LATENCY)
    return nbytes / max(1.0, min(MEMORY_BANDWIDTH, min(programs, num_sms) * one_sm))
