"""Loss over bytes: a dense model quantized as people do it, beside lorap under budgets of bits per weight.

    python benchmarks/quality/budgets.py                            makes the cells that are missing, the tables and the picture
    python benchmarks/quality/budgets.py --cells lorap-4.5 gptq-4   some of them
    python benchmarks/quality/budgets.py --tables-only              writes the tables into docs/results.md, and the picture

A cell is a JSON file in benchmarks/results/quality/budgets, made again when model, texts or calibration are others. All are
calibrated on windows of one source, by default those of a usual run, and judged on the first tokens of the same texts.
Only the matrices of the decoder layers change. Losses are of the stored numbers, computed with in float32. Bits are bytes on disk
of all that belongs to these matrices, scales in 16 bits and row numbers included, for each weight of the dense ones.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import budgets_report
import ggml
import numpy as np
import torch
from bits import GROUP, by_gptq, store_scales
from cells import CALIBRATION_WINDOWS, SEQ_LEN, Probe, windows
from records import code_sha256, read_cells, read_json, write_json
from texts import CALIBRATIONS, DEFAULT, SOURCES, Material, assets, default_sha256, gather
from transformers import AutoModelForCausalLM

import lorap
from lorap.architectures import SHARED_INPUTS
from lorap.calibration.context import DecoderContext
from lorap.calibration.statistics import merged
from lorap.calibration.stream import CalibrationStream
from lorap.calibration.stream import Probe as InputProbe
from lorap.checkpoint.load import find_model, load_tokenizer
from lorap.compression.byte_budget import resolve_budget
from lorap.compression.pipeline import Run
from lorap.compression.store import RunStore
from lorap.compression.stored_bytes import DenseModel
from lorap.compression.windows import RunWindows, read_windows
from lorap.evaluation.perplexity import evaluate_windows
from lorap.system import Stopwatch

TEXTS = ("wiki", "web", "news", "wells", "python")
TOKENS = 4096
# The most telling first.
CELLS = (
    *("dense", "gptq-3", "gptq-4", "lorap-3.5", "ggml-IQ4_NL", "lorap-4.5", "shuffled-Q3_K_M", "shuffled-Q4_K_M"),
    *("lorap-4", "lorap-3", "lorap-2.5", "codes-2.5", "lorap-5", "lorap-6", "lorap-8", "int4-3.5"),
    *("mixed-4.5", "mixed-5", "mixed-6"),
    *("across-IQ3_S", "across-Q3_K_M", "shuffled-Q5_K_M", "ggml-Q6_K"),
    *("ggml-Q4_K_M", "ggml-Q3_K_M", "ggml-Q4_0", "ggml-IQ4_XS", "ggml-Q3_K_S", "across-Q3_K_S", "across-Q4_K_M"),
    *("ggml-Q5_K_M", "ggml-Q8_0", "across-Q2_K"),
)
OUT = assets.CACHE.parent / "benchmarks" / "results" / "quality" / "budgets"


@dataclass(frozen=True)
class Made:
    """A model with other matrices: itself, the bytes of these matrices, and what else there is to say."""

    model: Any
    stored: int
    about: Mapping[str, Any]


class Given(RunStore):
    """A run that is given its windows."""

    def __init__(self, found: RunWindows) -> None:
        super().__init__()
        self._windows = found

    def load_windows(self) -> tuple[RunWindows, Mapping[str, float]]:
        return self._windows, {}


class Maker:
    """Makes cells from one model.

    Args:
        material: the model, and the texts.
        cache: a folder for what several cells need.
        count: windows to calibrate on, of the text of ``material`` that is for it; without one, of the default mixture.
    """

    def __init__(self, material: Material, cache: Path, count: int) -> None:
        self.material, self.cache, self.count = material, cache, count
        self.dense = AutoModelForCausalLM.from_pretrained(material.model, dtype=torch.float32).eval()
        self.tokenizer = load_tokenizer(find_model(material.model))
        # Those of every run, with others beside them for runs that have correction steps.
        self.windows: RunWindows = self._kept("windows", self._read_windows)

    def make(self, name: str) -> Made:
        kind, _, which = name.partition("-")
        makers: dict[str, Callable[[str], Made]] = {
            "gptq": lambda bits: self._gptq(int(bits)),
            "ggml": self._ggml,
            "shuffled": lambda mixture: self._ggml(mixture, shuffled=True),
            "across": lambda mixture: self._ggml(mixture, shuffled=True, across=True),
            "lorap": lambda bits: self._lorap(float(bits), weights="auto"),
            "codes": lambda bits: self._lorap(float(bits), weights="tcq"),
            "mixed": lambda bits: self._lorap(float(bits), weights="mixed"),
            "int4": lambda bits: self._lorap(float(bits), weights="int4", group_size=GROUP),
        }
        return makers[kind](which) if which else Made(self.dense, 2 * self._weights(), {})

    def _weights(self) -> int:
        return sum(weight.numel() for weight in self._matrices(self.dense))

    def _gptq(self, bits: int) -> Made:
        model = copy.deepcopy(self.dense)
        by_gptq(model, self.windows.calibration, bits)
        stored = sum(w.numel() * bits // 8 + 2 * len(w) * -(-w.shape[1] // GROUP) for w in self._matrices(model))
        return Made(model, stored, self._moved(model))

    def _ggml(self, mixture: str, *, shuffled: bool = False, across: bool = False) -> Made:
        model = copy.deepcopy(self.dense)
        context = self._context(model)
        config, layers, stored = model.config, len(context.layers), 0
        importance = self._kept("importance", self._importance)
        kinds: dict[str, int] = {}
        for index, layer in enumerate(context.layers):
            for role, linear in context.architecture.linears(layer).items():
                place = ggml.Place(role, index, layers, config.num_attention_heads // config.num_key_value_heads)
                columns = linear.in_features
                kind = ggml.across_rows(mixture, place) if across else ggml.chosen_type(mixture, place, columns)
                kind = "Q4_0" if kind == "Q4_1" else kind  # the grid that the model comes in
                order = torch.arange(columns)
                if shuffled:
                    order = channel_order(config, index, role)
                weight, counts = linear.weight.data[:, order], importance[index, role][order]
                linear.weight.data[:, order] = ggml.round_trip(weight, kind, counts, across=across)
                stored += ggml.stored_bytes(kind, linear.weight.numel())
                kinds[kind] = kinds.get(kind, 0) + linear.weight.numel()
        total = sum(kinds.values())
        return Made(model, stored, {"types": {k: n / total for k, n in kinds.items()}} | self._moved(model))

    def _lorap(self, bits: float, **options: Any) -> Made:
        model = copy.deepcopy(self.dense)
        with as_bfloat16():
            context = self._context(model)
            config = lorap.CompressionConfig(bits_per_weight=bits, num_calibration_samples=self.count, **options)
            config = resolve_budget(DenseModel.of(model, context.architecture), config)
            run = Run(context, "model", self.tokenizer, config, Stopwatch(), Given(self.windows))
            report = run.compress(DEFAULT, ())
        store_scales(model)
        stored = projection_bytes(model)
        assert stored <= bits * self._weights() / 8, f"{stored:,} bytes are more than {bits} bits for each weight"
        about = {"weights": config.weights, "sparsity": config.sparsity, "params_saved": report.params_saved}
        return Made(model, stored, about | {"stages": report.seconds})

    @torch.no_grad()
    def _moved(self, model: Any) -> dict[str, float]:
        """Size of what is wrong with the matrices, relative to theirs."""
        wrong = size = 0.0
        for before, after in zip(self._matrices(self.dense), self._matrices(model), strict=True):
            wrong += float((after - before).double().square().sum())
            size += float(before.double().square().sum())
        return {"weight_error": (wrong / size) ** 0.5}

    def _importance(self) -> dict[tuple[int, str], torch.Tensor]:
        """Mean square of each input, in the dense model: what `llama-imatrix` gathers."""
        context = self._context(self.dense)
        stream, found = CalibrationStream.from_windows(context, self.windows.calibration), {}
        for index, layer in enumerate(context.layers):
            linears = context.architecture.linears(layer)
            probes = {name: InputProbe(linears[roles[0]]) for name, roles in SHARED_INPUTS.items()}
            for name, folds in stream.observe(index, layer, probes).items():
                sums = merged(folds)
                found |= {(index, role): sums.sq_sum / sums.tokens for role in SHARED_INPUTS[name]}
            stream.advance(index, layer)
        return found

    def _read_windows(self) -> RunWindows:
        config = lorap.CompressionConfig(num_calibration_samples=self.count, calibration_seq_len=SEQ_LEN)
        tokens = [torch.from_numpy(np.load(text.path)) for text in self.material.calibrations.values()]
        return read_windows(self._context(self.dense), self.tokenizer, config, *(tokens or [DEFAULT]), (), Stopwatch())

    def _kept(self, name: str, make: Callable[[], Any]) -> Any:
        """What was made before from the same model, texts and number of windows, in a file of one's own."""
        digest = hashlib.sha256(json.dumps(origin(self.material, self.count)).encode()).hexdigest()[:16]
        path = self.cache / f"{name}-{digest}.pt"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(make(), path.with_suffix(".partial"))
            path.with_suffix(".partial").rename(path)
        return torch.load(path, weights_only=False)

    def _matrices(self, model: Any) -> list[torch.Tensor]:
        """The weights of all projections of a dense model."""
        context = self._context(model)
        return [each.weight for layer in context.layers for each in context.architecture.linears(layer).values()]

    @staticmethod
    def _context(model: Any) -> DecoderContext:
        return DecoderContext.of(model, device=torch.device("cpu"))


def channel_order(config: Any, layer: int, role: str) -> torch.Tensor:
    """A random order of the inputs of a matrix, such that the same model can be written down with its channels in it.

    The residual stream has one order, an FFN its own, and the values of all heads of a layer one within each head. The groups of
    32 that the model was rounded in before it came here are no groups then.
    """
    size = {"o_proj": config.head_dim, "down_proj": config.intermediate_size}.get(role, config.hidden_size)
    seed = {"o_proj": 2 * layer + 1, "down_proj": 2 * layer + 2}.get(role, 0)
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
    heads = config.num_attention_heads if role == "o_proj" else 1
    return torch.cat([order + head * size for head in range(heads)])


def as_bfloat16() -> AbstractContextManager[Any]:
    """Bytes are counted as those of a bfloat16 checkpoint, whatever is computed with."""
    of = DenseModel.of
    return mock.patch.object(DenseModel, "of", lambda *args: replace(of(*args), itemsize=2))


def projection_bytes(model: Any) -> int:
    """Of all that a bfloat16 checkpoint holds in the place of the projections."""
    tensors = model.model.layers.state_dict().items()
    found = [tensor for name, tensor in tensors if "norm" not in name]
    return sum(tensor.numel() * (2 if tensor.is_floating_point() else tensor.itemsize) for tensor in found)


def origin(material: Material, count: int) -> dict[str, Any]:
    """Of what calibration is made."""
    texts = {name: text.sha256 for name, text in material.calibrations.items()} or {DEFAULT: default_sha256()}
    return {"model": material.model_sha256, "calibration": texts, "windows": count}


def sources(material: Material, tokens: int, count: int) -> dict[str, Any]:
    """What a cell is made from."""
    texts = {name: text.sha256 for name, text in material.tests.items()}
    return origin(material, count) | {"texts": texts, "tokens": tokens}


def cell(name: str, maker: Maker, tokens: int, given: Mapping[str, Any]) -> dict[str, Any]:
    """One model made and judged."""
    start = time.perf_counter()
    made = maker.make(name)
    seconds = {"make": time.perf_counter() - start}
    losses, by_window = {}, {}
    for text, found in maker.material.tests.items():
        probe = Probe(text=text, tokens=tokens, seq_len=SEQ_LEN, main=True, sha256=found.sha256, path=str(found.path))
        judged, each = evaluate_windows(made.model, windows(probe))
        losses[text], by_window[text] = judged.nats, [round(float(loss), 4) for loss in each.losses / each.predicted]
    seconds["evaluate"] = time.perf_counter() - start - seconds["make"]
    bits = 8 * made.stored / maker._weights()
    record = {
        "cell": name,
        "bits": bits,
        "decoder_bytes": made.stored,
        "losses": losses,
        "by_window": by_window,
        **made.about,
    }
    return record | {"seconds": seconds, "sources": given, "code_sha256": code_sha256()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", nargs="+", choices=CELLS, default=list(CELLS))
    parser.add_argument("--texts", nargs="+", choices=SOURCES, default=list(TEXTS), help="to judge by")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="of each text")
    parser.add_argument("--calibration", choices=CALIBRATIONS, default=DEFAULT)
    parser.add_argument("--windows", type=int, default=CALIBRATION_WINDOWS, help="to calibrate on")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--tables-only", action="store_true", help="make no cells")
    arguments = parser.parse_args()
    if not arguments.tables_only:
        material = gather(assets.MODEL, arguments.texts, [arguments.calibration])
        given, maker = sources(material, arguments.tokens, arguments.windows), None
        for name in arguments.cells:
            path = arguments.out / f"{name}.json"
            if (read_json(path) or {}).get("sources") != given:
                maker = maker or Maker(material, assets.QUALITY / "budgets", arguments.windows)
                record = cell(name, maker, arguments.tokens, given)
                write_json(path, record)
                print(name, round(record["bits"], 3), {k: round(v, 4) for k, v in record["losses"].items()}, flush=True)
    budgets_report.write({record["cell"]: record for record in read_cells(arguments.out)}, arguments.out)


if __name__ == "__main__":
    main()
