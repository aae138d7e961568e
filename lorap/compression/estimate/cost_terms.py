"""What a stage is made of: amounts of work, each with the formula that it comes from and the rate that it is done at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lorap.compression.estimate.rates import Machine


@dataclass(frozen=True)
class CostTerm:
    """One kind of work in a stage.

    Args:
        what: in a few words.
        formula: how the amount follows from sizes, in words and numbers.
        amount: of all layers and processes together, in ``unit``.
        unit: ``FLOP``, ``B`` or ``calls``; ``s`` for eigenproblems, whose time is known by size.
        rate: what does it and how fast, in words.
        seconds: with what several processes share taken into account.
    """

    what: str
    formula: str
    amount: float
    unit: str
    rate: str
    seconds: float


class CostTerms:
    """Collects parts at the rates of one machine.

    Args:
        machine: whose rates.
        times: how often everything that is entered happens, such as once per layer.
        processes: among how many it is shared; alone each would take as long as one.
    """

    def __init__(self, machine: Machine, *, times: int = 1, processes: float = 1.0) -> None:
        self.machine, self.times, self.processes = machine, times, processes
        self.parts: list[CostTerm] = []

    @property
    def seconds(self) -> float:
        """Of all parts, once for each time, with what processes share taken into account."""
        return sum(part.seconds for part in self.parts)

    def products(self, what: str, flop: float, dtype: str, formula: str) -> None:
        """Matrix products.

        Args:
            what: is done, in a few words.
            flop: multiplications and additions.
            dtype: whose rate counts.
            formula: how the amount follows from sizes, in words and numbers.
        """
        rate = self.machine.products[dtype]
        self._add(what, formula, flop, "FLOP", f"{quantity(rate, 'FLOP/s')} in {dtype}", flop / rate)

    def cholesky(self, what: str, size: int, dtype: str, *, count: int = 1) -> None:
        """Cholesky factorizations of (size, size).

        Args:
            what: is done, in a few words.
            size: of the matrices.
            dtype: whose rate counts.
            count: how many.
        """
        flop, rate = count * size**3 / 3, self.machine.cholesky[dtype]
        formula = f"{size:,}^3 / 3" if count == 1 else f"{count} x {size:,}^3 / 3"
        self._add(what, formula, flop, "FLOP", f"{quantity(rate, 'FLOP/s')} in {dtype} (Cholesky)", flop / rate)

    def eigen(self, what: str, size: int, wanted: str) -> None:
        """One eigenproblem.

        Args:
            what: is done, in a few words.
            size: of the matrix.
            wanted: ``float64``, ``float32``, or float64 ``values`` alone.
        """
        seconds = self.machine.eigen_seconds(size, wanted)
        self._add(what, f"one of {size:,}", seconds, "s", f"{duration(seconds)} each", seconds)

    def moved(self, what: str, nbytes: float, formula: str) -> None:
        """Bytes through working memory.

        Args:
            what: is done, in a few words.
            nbytes: read or written.
            formula: how the amount follows from sizes, in words and numbers.
        """
        rate = self.machine.moved
        self._add(what, formula, nbytes, "B", f"{quantity(rate, 'B/s')} in memory", nbytes / rate)

    def transferred(self, what: str, nbytes: float, source: str, formula: str) -> None:
        """Bytes from files, and over the link to a GPU, or to the disk.

        Args:
            what: is done, in a few words.
            nbytes: read or written.
            source: ``disk``, the system's ``cache`` of it, or ``written`` to the disk.
            formula: how the amount follows from sizes, in words and numbers.
        """
        machine = self.machine
        rates = {"disk": machine.disk_read, "cache": machine.cached_read, "written": machine.disk_write}
        names = {"disk": "from the disk", "cache": "from files in memory", "written": "to the disk"}
        per_byte, told = 1 / rates[source], f"{quantity(rates[source], 'B/s')} {names[source]}"
        if machine.link is not None:
            per_byte += 1 / machine.link
            told += f", then {quantity(machine.link, 'B/s')} over PCIe" if source != "written" else ""
        self._add(what, formula, nbytes, "B", told, nbytes * per_byte)

    def read_once(self, what: str, nbytes: float, formula: str) -> None:
        """Bytes from the disk that are hashed on the way, by one thread.

        Args:
            what: is done, in a few words.
            nbytes: read.
            formula: how the amount follows from sizes, in words and numbers.
        """
        machine = self.machine
        per_byte = 1 / machine.disk_read + 1 / machine.hashed
        told = (
            f"{quantity(machine.disk_read, 'B/s')} from the disk, then {quantity(machine.hashed, 'B/s')} through sha256"
        )
        self._add(what, formula, nbytes, "B", told, nbytes * per_byte)

    def fixed(self, what: str, seconds: float, formula: str) -> None:
        """Seconds that no rate of the machine explains.

        Args:
            what: is done, in a few words.
            seconds: that it takes.
            formula: how the amount follows from sizes, in words and numbers.
        """
        self._add(what, formula, seconds, "s", f"{duration(seconds)} as seen elsewhere", seconds)

    def drawn(self, what: str, count: float, formula: str) -> None:
        """Random numbers.

        Args:
            what: is done, in a few words.
            count: how many.
            formula: how the amount follows from sizes, in words and numbers.
        """
        rate = self.machine.drawn
        self._add(what, formula, count, "numbers", f"{quantity(rate, '/s')}", count / rate)

    def calls(self, what: str, count: float, formula: str) -> None:
        """Calls of a decoder layer, for what each takes besides computing.

        Args:
            what: is done, in a few words.
            count: how many.
            formula: how the amount follows from sizes, in words and numbers.
        """
        each = self.machine.layer_call
        self._add(what, formula, count, "calls", f"{duration(each)} each", count * each)

    def include(self, other: CostTerms) -> None:
        """Everything of another terms, once for each of its times; parts of the same kind become one."""
        self.parts = merged([*self.parts, *other.parts])

    def _add(self, what: str, formula: str, amount: float, unit: str, rate: str, seconds: float) -> None:
        if amount <= 0:
            return
        formula = f"{self.times} x ({formula})" if self.times > 1 else formula
        if self.processes > 1:
            rate += f", {self.processes:.3g} at once"
        self.parts.append(
            CostTerm(what, formula, self.times * amount, unit, rate, self.times * seconds / self.processes)
        )


def merged(parts: Sequence[CostTerm]) -> list[CostTerm]:
    """Parts of one kind and formula, such as equal factorizations, as one."""
    found: dict[tuple[str, str, str, str], CostTerm] = {}
    for part in parts:
        key = (part.what, part.formula, part.unit, part.rate)
        if key in found:
            before = found[key]
            part = CostTerm(*key[:2], before.amount + part.amount, *key[2:], before.seconds + part.seconds)
        found[key] = part
    return list(found.values())


def quantity(value: float, unit: str) -> str:
    """Three digits and a prefix: 1.23 TFLOP."""
    for prefix, size in (("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{_three(value / size)} {prefix}{unit}"
    return f"{_three(value)} {unit}"


def duration(seconds: float) -> str:
    """With a unit that suits it; two digits are more than an estimate has."""
    for unit, size in (("d", 86400.0), ("h", 3600.0), ("min", 60.0), ("s", 1.0)):
        if seconds >= 2 * size or (unit == "s" and seconds >= 1):
            return f"{_two(seconds / size)} {unit}"
    return f"{_two(seconds * 1e3)} ms" if seconds >= 1e-3 else f"{_two(seconds * 1e6)} us"


def _two(value: float) -> str:
    return f"{value:.0f}" if value >= 9.95 else f"{value:.1f}"


def _three(value: float) -> str:
    return f"{value:.0f}" if value >= 99.95 else f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"
