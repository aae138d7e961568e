"""What must hold for every damaged checkpoint and text: a LoRAPError or success, soon, and in little memory.

A target is a hypothesis test of one argument. ``test_fuzz.py`` runs each for a moment, ``run.py`` for as long as it is told, with
hypothesis's own generator or with atheris, which is guided by the branches that an input reaches.
"""

from __future__ import annotations

import json
import re
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import fuzz_gguf
import fuzz_texts
import torch
import transformers
from fuzz_inputs import (
    EXTRA,
    KINDS,
    VALUES,
    Checkpoint,
    Q,
    broken_bytes,
    broken_json,
    broken_weights,
    dump,
    edited,
    make_checkpoint,
    safetensors,
)
from hypothesis import given
from hypothesis import strategies as st
from made_reports import made_report
from safetensors import safe_open

from lorap.checkpoint.folders import INDEX, read_tensors, weight_files
from lorap.checkpoint.format import LoRAPConfig
from lorap.checkpoint.headers import read_header
from lorap.checkpoint.load import find_model, load_model, load_tokenizer
from lorap.checkpoint.stored_tensors import stored_tensors
from lorap.compression.allocation import LayerPlan
from lorap.compression.estimate.shapes import ModelShape
from lorap.compression.planning import Key
from lorap.compression.runs.journal import Journal
from lorap.compression.runs.steps import WindowsRecord
from lorap.errors import LoRAPError
from lorap.evaluation.info import describe_model, format_info
from lorap.jsonio import read_json
from lorap.reports.run import CompressionReport, ProjectionReport
from lorap.system import peak_memory_bytes

SECONDS, MEGABYTES = 5.0, 300
# Parts of messages that say the machine, not lorap, has refused.
EXHAUSTED = ("MemoryError", "can't allocate memory", "not enough memory", "bad_alloc", "Cannot allocate memory")

# (target, outcome) -> how often
outcomes: Counter[tuple[str, str]] = Counter()
# target -> beginnings of its refusals, without numbers
reasons: defaultdict[str, set[str]] = defaultdict(set)
_times = [0.0]


def slowest() -> float:
    """Seconds of the slowest input so far."""
    return max(_times)


@contextmanager
def bounded(target: str) -> Iterator[None]:
    """A LoRAPError or success, within SECONDS and MEGABYTES."""
    start, before = time.monotonic(), _peak_megabytes()
    outcome = "opened"
    try:
        yield
    except LoRAPError as error:
        outcome = "refused"
        _check_error(error)
        reasons[target].add(re.sub(r"\d+|\S*/\S*", "", str(error))[:60])
    seconds, megabytes = time.monotonic() - start, _peak_megabytes() - before
    assert seconds < SECONDS, f"{seconds:.1f} s"
    assert megabytes < MEGABYTES, f"{megabytes:.0f} MB more than before"
    outcomes[target, outcome] += 1
    _times[:] = [max(_times[0], seconds)]


def _check_error(error: LoRAPError) -> None:
    message = str(error)
    assert message, error
    assert len(message) < 2000, f"a message of {len(message)} characters"
    assert message.replace("\n", "").isprintable(), ascii(message)
    causes, cause = [message], error.__cause__
    while cause is not None:
        causes.append(f"{type(cause).__name__}: {cause}")
        cause = cause.__cause__
    assert not any(part in text for part in EXHAUSTED for text in causes), causes


def _peak_megabytes() -> float:
    return peak_memory_bytes() / 2**20


class Folders:
    """One small checkpoint of each kind, and a place to put damaged ones."""

    def __init__(self, place: Path) -> None:
        self.place = place
        transformers.utils.logging.set_verbosity(transformers.utils.logging.CRITICAL)
        transformers.utils.logging.disable_progress_bar()
        warnings.simplefilter("ignore")
        self.checkpoints = {kind: make_checkpoint(kind, place / f"valid-{kind}") for kind in KINDS}
        for kind in KINDS:  # imports and caches of the first time are nobody's fault
            load_model(find_model(place / f"valid-{kind}"))

    def target(self, name: str) -> Callable[[], None]:
        """A hypothesis test without arguments."""
        return getattr(self, name)()

    def header(self) -> Callable[[], None]:
        checkpoint = self.checkpoints["pivoted"]

        @given(broken_weights(checkpoint))
        def header(weights: bytes) -> None:
            path = self.place / "one.safetensors"
            path.write_bytes(weights)
            with bounded("header"):
                found = read_header(path)
                with safe_open(path, "pt") as file:  # what lorap accepts its readers accept
                    assert set(file.keys()) == set(found)
                    for name, info in found.items():
                        view = file.get_slice(name)
                        assert (view.get_dtype(), tuple(view.get_shape())) == (info.dtype, info.shape)

        return header

    def pickle(self) -> Callable[[], None]:
        path = self.place / "one.bin"
        tensors = {"a": torch.arange(15.0).view(3, 5), "b": torch.ones(7, dtype=torch.bfloat16)}
        torch.save(tensors | {"c": tensors["a"]}, path)

        @given(broken_bytes(path.read_bytes()))
        def pickle(data: bytes) -> None:
            path.write_bytes(data)
            with bounded("pickle"):
                found = {name: stored.read() for name, stored in stored_tensors(path).items()}
                try:
                    theirs = torch.load(path, weights_only=True)
                except RuntimeError:  # torch compares checksums, which only a reader of all numbers can
                    return
                assert all(torch.equal(found[name].view(torch.uint8), theirs[name].view(torch.uint8)) for name in found)

        return pickle

    def doors(self) -> Callable[[], None]:
        """As info, plan and compress open a folder."""

        # The other kinds are refused even when they are whole.
        @given(st.one_of(self._damaged(["dense"]), self._damaged()))
        def doors(damaged: tuple[str, bytes | None, bytes | None]) -> None:
            folder = self._write(damaged)
            with bounded("doors"):
                source = find_model(folder)
                assert describe_model(source)["bytes"] > 0
                ModelShape.read(source)
                load_model(source, paged=True)

        return doors

    def gguf(self) -> Callable[[], None]:
        """Found, described, and opened with its tokenizer."""
        path = self.place / "one.gguf"
        data = fuzz_gguf.make_gguf(path)
        open_gguf(path)

        @given(fuzz_gguf.broken_gguf(data, fuzz_gguf.places_in(path, data)))
        def gguf(damaged: bytes) -> None:
            path.write_bytes(damaged)
            with bounded("gguf"):
                open_gguf(path)

        return gguf

    def index(self) -> Callable[[], None]:
        folder = self.place / "sharded"
        document = {"metadata": {"total_size": 1}, "weight_map": _sharded(folder, self.checkpoints["factors"])}

        @given(broken_json(document))
        def index(text: bytes) -> None:
            (folder / INDEX).write_bytes(text)
            with bounded("index"):
                files = weight_files(folder)
                assert all(file.parent == folder and file.suffix == ".safetensors" for file in files)
                read_tensors(folder)

        return index

    def info(self) -> Callable[[], None]:
        @given(self._damaged())
        def info(damaged: tuple[str, bytes | None, bytes | None]) -> None:
            folder = self._write(damaged)
            with bounded("info"):
                format_info(describe_model(find_model(folder)))

        return info

    def quantization_config(self) -> Callable[[], None]:
        fields = [checkpoint.config["quantization_config"] for checkpoint in self._compressed()]
        odd = st.sampled_from([object(), 10**5000, b"x", {1: 2}, {1, 2}, 1j, torch.zeros(2), lambda: 0])

        @given(
            st.sampled_from(fields).flatmap(edited), st.dictionaries(st.sampled_from(EXTRA), VALUES | odd, max_size=1)
        )
        def quantization_config(edited_fields: Any, more: dict[str, Any]) -> None:
            if isinstance(edited_fields, list):  # Pairs: Python has no such dictionary
                return
            with bounded("quantization_config"):
                config = LoRAPConfig(**(more | (edited_fields if isinstance(edited_fields, dict) else {})))
                again = LoRAPConfig(**config.to_dict())
                assert again.to_dict() == config.to_dict()

        return quantization_config

    def reports(self) -> Callable[[], None]:
        """``lorap_report.json`` as ``lorap report`` reads it, and each kind of step of a journal."""
        path = self.place / "lorap_report.json"
        report = made_report(2).to_dict()
        CompressionReport.from_dict(report)  # imports of the first time are nobody's fault
        seconds, share = {"load": 1.5}, {"name": "x", "weight": 1.0, "windows": 3}
        window = {"name": "x", "sha256": "0", "group_names": ["x"], "shares": [share]}
        plan = [{"ranks": {Q: 3}, "intermediate_size": 5}], [[0, "q_proj"]]
        steps: list[tuple[Any, Any]] = [
            (tuple[list[WindowsRecord], bool], ([window], True)),
            (tuple[list[LayerPlan], list[Key]], plan),
            (list[ProjectionReport], report["projections"][:2]),
        ]
        documents = [(CompressionReport, report)]
        documents += [(kind, {"finished": json.loads(json.dumps([left, seconds]))}) for kind, left in steps]
        damaged = [broken_json(document).map(partial(_pair, kind)) for kind, document in documents]

        @given(st.one_of(damaged))
        def reports(damaged: tuple[Any, bytes]) -> None:
            kind, data = damaged
            path.write_bytes(data)
            with bounded("reports"):
                values = read_json(path)
                if kind is not CompressionReport:
                    (self.place / "step.json").write_bytes(data)
                    Journal(self.place).finished(kind, "step")
                    return
                found = CompressionReport.from_dict(values)
                assert found.table()
                assert CompressionReport.from_dict(found.to_dict()).to_dict().keys() == found.to_dict().keys()

        return reports

    def load(self) -> Callable[[], None]:
        @given(self._damaged())
        def load(damaged: tuple[str, bytes | None, bytes | None]) -> None:
            folder = self._write(damaged)
            with bounded("load"):
                model = load_model(find_model(folder))
                stored = sum(info.nbytes for info in read_tensors(folder).values())
                assert sum(parameter.numel() for parameter in model.parameters()) <= 8 * stored
                assert not any(tensor.is_meta for tensor in model.state_dict().values())

        return load

    def texts(self) -> Callable[[], None]:
        tokenizer = fuzz_texts.make_tokenizer()

        @given(fuzz_texts.damaged_files())
        def texts(damaged: tuple[str, bytes]) -> None:
            suffix, content = damaged
            path = self.place / f"text{suffix}"
            path.write_bytes(content)
            with bounded("texts"):
                fuzz_texts.read(path, tokenizer)

        return texts

    def _compressed(self) -> list[Checkpoint]:
        return [self.checkpoints[kind] for kind in ("factors", "pivoted", "int8", "mixed", "trellis")]

    def _damaged(self, kinds: Iterable[str] = KINDS) -> st.SearchStrategy[tuple[str, bytes | None, bytes | None]]:
        """A kind, and other bytes for config.json, for the weights, for both, or for neither."""

        def one(kind: str) -> st.SearchStrategy[tuple[str, bytes | None, bytes | None]]:
            checkpoint = self.checkpoints[kind]
            config, weights = broken_json(checkpoint.config), broken_weights(checkpoint)
            quantization = (
                checkpoint.config.get("quantization_config")
                or self.checkpoints["factors"].config["quantization_config"]
            )
            marks = edited(quantization).map(lambda value: _with_marks(checkpoint.config, value))
            return st.one_of(
                st.just((kind, None, None)),
                st.tuples(st.just(kind), config, st.none()),
                st.tuples(st.just(kind), marks, st.none()),
                st.tuples(st.just(kind), st.none(), weights),
                st.tuples(st.just(kind), config, weights),
            )

        return st.sampled_from(list(kinds)).flatmap(one)

    def _write(self, damaged: tuple[str, bytes | None, bytes | None]) -> Path:
        kind, config, weights = damaged
        return self.checkpoints[kind].write(self.place / "damaged", config, weights)


def open_gguf(path: Path) -> None:
    """As the commands do: what is found can be described and loaded, or is refused."""
    source = find_model(path)
    format_info(describe_model(source))
    load_tokenizer(source)
    model = load_model(source)
    assert sum(parameter.numel() for parameter in model.parameters()) <= path.stat().st_size


def _pair(kind: Any, data: bytes) -> tuple[Any, bytes]:
    return kind, data


def _with_marks(config: dict[str, Any], marks: Any) -> bytes:
    return dump(config | {"quantization_config": marks})


def _sharded(folder: Path, checkpoint: Checkpoint) -> dict[str, str]:
    """Write the tensors into two files; returns which holds which."""
    folder.mkdir(exist_ok=True)
    names = sorted(
        checkpoint.header.keys() - {"__metadata__"}, key=lambda name: checkpoint.header[name]["data_offsets"]
    )
    weight_map = {}
    for part, some in enumerate((names[::2], names[1::2])):
        header, data = {}, b""
        for name in some:
            begin, end = checkpoint.header[name]["data_offsets"]
            header[name] = checkpoint.header[name] | {"data_offsets": [len(data), len(data) + end - begin]}
            data += checkpoint.data[begin:end]
            weight_map[name] = f"part-{part}.safetensors"
        (folder / f"part-{part}.safetensors").write_bytes(safetensors(header, data))
    return weight_map


TARGETS = ("header", "pickle", "gguf", "index", "info", "quantization_config", "load", "doors", "texts", "reports")
