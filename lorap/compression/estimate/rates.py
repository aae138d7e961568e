"""How fast a machine does what a compression is made of: this one, by trying for a few seconds."""

from __future__ import annotations

import hashlib
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers

from lorap.algorithms.factorization.solvers import CPU, Rule
from lorap.checkpoint.load import DTYPES
from lorap.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Sizes that are tried. Larger ones follow from their operations.
PRODUCT = (512, 1024, 1024)  # tokens, in, out
EIGEN_SIZES = (64, 256, 1024)
CHOLESKY_SIZE = 1024
MOVED_BYTES = 2**28
FILE_BYTES = 2**27
HASHED_BYTES = 2**24
DRAWN = 2**20
TRIES = 3


@dataclass(frozen=True)
class Machine:
    """Rates of one machine, per process, and its memory.

    Args:
        name: of the machine.
        kind: ``measured`` or ``published``; see ``assumptions`` for what else went in.
        assumptions: sentences on what nobody measured.
        products: FLOP/s of matrix products by dtype.
        cholesky: FLOP/s of Cholesky factorizations by dtype, which take n^3 / 3.
        eigen: seconds of an eigenproblem by what is wanted (``float64`` and ``float32`` with vectors, ``values`` float64
            eigenvalues alone) and by size.
        moved: bytes/s in working memory, reads and writes together.
        layer_call: seconds of a decoder layer's call that has next to nothing to compute.
        memory_bytes: working memory: that of the GPU where there is one.
        base_bytes: held before any model is open.
        host_bytes: memory in which the system can keep files that were read.
        link: bytes/s from host to working memory; None where they are the same.
        disk_read, disk_write: bytes/s.
        cached_read: bytes/s of files that the system still holds in memory.
        hashed: bytes/s through sha256.
        drawn: random numbers/s.
        rule: which method factorizes what.
        parallel: how many processes run at full speed beside each other.
    """

    name: str
    kind: str
    assumptions: tuple[str, ...]
    products: Mapping[str, float]
    cholesky: Mapping[str, float]
    eigen: Mapping[str, Mapping[int, float]]
    moved: float
    layer_call: float
    memory_bytes: int
    base_bytes: int
    host_bytes: int
    link: float | None
    disk_read: float
    disk_write: float
    cached_read: float
    hashed: float
    drawn: float
    rule: Rule = CPU
    parallel: int = 1

    def eigen_seconds(self, size: int, wanted: str) -> float:
        """Of one eigenproblem: between sizes that are known on a straight line in logarithms, beyond them as the cube."""
        known = sorted(self.eigen[wanted].items())
        if size >= known[-1][0]:
            return known[-1][1] * (size / known[-1][0]) ** 3
        if size <= known[0][0]:
            return known[0][1]
        above = next(index for index, (n, _) in enumerate(known) if n >= size)
        (low, fast), (high, slow) = known[above - 1], known[above]
        way = math.log(size / low) / math.log(high / low)
        return fast ** (1 - way) * slow**way

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), "assumptions": list(self.assumptions)}


def this_machine(folder: Path, *, dtype: str) -> Machine:
    """Rates of the CPU with the threads that torch has been given, and of the disk that holds ``folder``.

    Args:
        folder: where OUT would be; a file of 128 MB is written there, read, and removed.
        dtype: of the model.

    Raises:
        CheckpointError: the folder cannot be written.
    """
    base = _resident_bytes()
    threads, cores = torch.get_num_threads(), len(_cores())
    write, read, cached = _disk(folder)
    return Machine(
        name=f"this machine ({threads} of {cores} cores)",
        kind="measured",
        assumptions=(),
        products={name: _product_rate(name) for name in dict.fromkeys((dtype, "float32", "float64"))},
        cholesky={name: _cholesky_rate(name) for name in ("float32", "float64")},
        eigen={wanted: {size: _eigen_seconds(size, wanted) for size in EIGEN_SIZES} for wanted in _EIGEN},
        moved=_moved_rate(),
        layer_call=_layer_call(),
        memory_bytes=_memory_bytes(),
        base_bytes=base,
        host_bytes=_memory_bytes(),
        link=None,
        disk_read=read,
        disk_write=write,
        cached_read=cached,
        hashed=_hash_rate(),
        drawn=_draw_rate(),
        parallel=max(1, cores // threads),
    )


def _best(call: Callable[[], object], tries: int = TRIES) -> float:
    """Seconds of the fastest of a few calls, after one to warm up."""
    call()
    seconds = []
    for _ in range(tries):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def _product_rate(dtype: str) -> float:
    tokens, inner, outer = PRODUCT
    x, weight = (torch.randn(rows, inner).to(DTYPES.get(dtype, torch.float64)) for rows in (tokens, outer))
    return 2 * tokens * inner * outer / _best(lambda: torch.nn.functional.linear(x, weight))


def _positive(size: int, dtype: torch.dtype) -> torch.Tensor:
    x = torch.randn(size, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return (x @ x.T / size + torch.eye(size)).to(dtype)


def _cholesky_rate(dtype: str) -> float:
    x = _positive(CHOLESKY_SIZE, getattr(torch, dtype))
    return CHOLESKY_SIZE**3 / 3 / _best(lambda: torch.linalg.cholesky_ex(x))


_EIGEN: Mapping[str, tuple[torch.dtype, Callable[[torch.Tensor], object]]] = {
    "float64": (torch.float64, torch.linalg.eigh),
    "float32": (torch.float32, torch.linalg.eigh),
    "values": (torch.float64, torch.linalg.eigvalsh),
}


def _eigen_seconds(size: int, wanted: str) -> float:
    dtype, solve = _EIGEN[wanted]
    x = _positive(size, dtype).mT
    return _best(lambda: solve(x), tries=1 if size > 500 else TRIES)


def _moved_rate() -> float:
    source = torch.zeros(MOVED_BYTES // 4)
    target = torch.zeros_like(source)
    return 2 * MOVED_BYTES / _best(lambda: target.copy_(source))


def _layer_call() -> float:
    """Eight tiny decoder layers, one token."""
    config = transformers.LlamaConfig(
        vocab_size=8,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=8,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        model: PreTrainedModel = transformers.LlamaForCausalLM(config).eval()
        ids = torch.zeros(1, 1, dtype=torch.int64)
        return _best(lambda: model(input_ids=ids, use_cache=True)) / config.num_hidden_layers


def _disk(folder: Path) -> tuple[float, float, float]:
    """Bytes/s written, read from the disk, and read from the system's memory of it."""
    data = memoryview(os.urandom(2**20))
    try:
        free = shutil.disk_usage(folder).free
        size = min(FILE_BYTES, free // 2) // len(data) * len(data)
        with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
            start = time.perf_counter()
            for _ in range(size // len(data)):
                file.write(data)
            os.fsync(file.fileno())
            write = size / (time.perf_counter() - start)
            cached = _read_rate(file, size)
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            return write, _read_rate(file, size), cached
    except OSError as error:
        raise CheckpointError(f"cannot try the disk of {folder}: {error.strerror}; choose another --out") from error


def _read_rate(file: Any, size: int) -> float:
    buffer = bytearray(2**22)
    file.seek(0)
    start = time.perf_counter()
    while file.readinto(buffer):
        pass
    return size / (time.perf_counter() - start)


def _hash_rate() -> float:
    data = bytes(HASHED_BYTES)
    return HASHED_BYTES / _best(lambda: hashlib.sha256(data).digest())


def _draw_rate() -> float:
    """As torch.multinomial draws: one number for each word."""
    generator, numbers = torch.Generator().manual_seed(0), torch.empty(DRAWN)
    return DRAWN / _best(lambda: numbers.exponential_(generator=generator))


def _cores() -> set[int]:
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0


def _resident_bytes() -> int:
    """What this process holds with everything imported and no model open."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 450 * 10**6  # as measured on Linux
