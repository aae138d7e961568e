"""One cell of the comparison: one compression, judged on every text, in a process of its own, written as one JSON file.

    python benchmarks/quality/cells.py '{"cell": {...}, ...}'          matrix.py and ablation.py call this

A cell that is there already, made from the same model, options, calibration and texts, is not made again.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from records import DENSE, code_sha256, read_json, with_dense, write_json
from rivals import BUILT_AS_LLAMA, RIVALS
from texts import DEFAULT, SOURCES, Material, default_sha256
from transformers import AutoModelForCausalLM

import lorap
from lorap.calibration import TokenWindows
from lorap.calibration.context import DecoderContext
from lorap.checkpoint.load import find_model, load_model, load_tokenizer
from lorap.compression.windows import read_windows
from lorap.errors import ConfigError
from lorap.evaluation.perplexity import compare_predictions, evaluate
from lorap.nn.linear import count_parameters
from lorap.system import Stopwatch, describe_environment, peak_memory_bytes

SEQ_LEN = 128
CALIBRATION_WINDOWS = 128
TOKENS = 8000
# The default mixture is what most people use, so it is judged on more text and on longer windows as well.
LONG = ((20_000, 128), (20_000, 1024))
# Predictions are compared with the dense model's on the first windows of each text: that takes both models.
COMPARED_TOKENS = 2048


@dataclass(frozen=True, kw_only=True)
class Cell:
    """What to do to the model; recipe ``dense`` is the model as it is.

    Args:
        recipe: name of the recipe, or of another method of ``RIVALS``.
        sparsity: as in :class:`lorap.CompressionConfig`.
        calibration: ``default`` or the name of a text.
        overrides: options that differ from the recipe's, or the method's.
        windows: of 128 tokens, to calibrate on.
    """

    recipe: str
    sparsity: float = 0.0
    calibration: str = DEFAULT
    overrides: dict[str, Any] = field(default_factory=dict)
    windows: int = CALIBRATION_WINDOWS

    @property
    def name(self) -> str:
        """Also the name of its file."""
        if self.recipe == DENSE:
            return DENSE
        name = f"{self.recipe_name}-{self.sparsity:g}-{self.calibration}"
        return name.replace("/", "_").replace(" ", "")

    @property
    def recipe_name(self) -> str:
        """Recipe and overrides, as they are written on the command line."""
        shown = {key: value if isinstance(value, str) else json.dumps(value) for key, value in self.overrides.items()}
        return self.recipe + "".join(f"+{key}={value}" for key, value in sorted(shown.items()))

    def config(self) -> Any:
        """Options of the library, or of the other method; None for the dense model.

        Raises:
            ConfigError: an option is wrong; of other methods a TypeError.
        """
        if self.recipe == DENSE:
            return None
        if self.recipe in RIVALS:
            return RIVALS[self.recipe](sparsity=self.sparsity, **self.overrides)
        return self._library_config(self.recipe, **self.overrides)

    def windows_config(self) -> lorap.CompressionConfig:
        """Draws the windows that recipes without correction steps are calibrated on."""
        return self._library_config("lorap")

    def _library_config(self, recipe: str, **overrides: Any) -> lorap.CompressionConfig:
        options = {"num_calibration_samples": self.windows, "calibration_seq_len": SEQ_LEN, "seed": 0}
        return lorap.CompressionConfig.from_recipe(recipe, sparsity=self.sparsity, **(options | overrides))


@dataclass(frozen=True, kw_only=True)
class Probe:
    """The first ``tokens`` tokens of a text in windows of ``seq_len``; less where the text is shorter.

    Args:
        text: its name.
        tokens: how many are asked for.
        seq_len: tokens per window.
        main: what tables compare; the others are longer looks at the same text.
        sha256: of all tokens of the text.
        path: where they are.
    """

    text: str
    tokens: int
    seq_len: int
    main: bool
    sha256: str
    path: str

    def id(self) -> list[Any]:
        """What makes two measurements the same measurement."""
        return [self.text, self.tokens, self.seq_len, self.sha256]


def specification(cell: Cell, material: Material, *, count: int = TOKENS, long_probes: bool = True) -> dict[str, Any]:
    """Everything a process needs to make a cell, and its key; every text of ``material`` is a test.

    The dense model and the default mixture get the longer probes too, if ``long_probes`` and ``count`` is as usual.
    """
    default = cell.calibration == DEFAULT
    long = LONG if long_probes and default and not cell.overrides and count == TOKENS else ()
    probes = [
        Probe(text=name, tokens=size, seq_len=length, main=main, sha256=test.sha256, path=str(test.path))
        for size, length, main in ((count, SEQ_LEN, True), *((*one, False) for one in long))
        for name, test in material.tests.items()
    ]
    calibration = None if default else material.calibrations[cell.calibration]
    config = cell.config()
    sources = {
        "config": config and _described(cell),
        "calibration": calibration.sha256 if calibration else config and default_sha256(),
        "model": material.model_sha256,
    }
    return {
        "cell": asdict(cell),
        "model": str(material.model),
        "calibration": str(calibration.path) if calibration else DEFAULT,
        "probes": [asdict(probe) for probe in probes],
        "key": hashlib.sha256(json.dumps(sources, sort_keys=True).encode()).hexdigest(),
        "sources": sources,
    }


def _described(cell: Cell) -> dict[str, Any]:
    """Options; one that came later counts only where it is used, so that older cells stay valid."""
    config = cell.config()
    if cell.recipe in RIVALS:
        return asdict(config) | {"windows": cell.windows}
    options = config.to_dict()
    unused = {"correction_steps": 0, "scale_steps": 0, "anchor": "none", "weights": "float"}
    if options["weights"] == "float":
        del options["group_size"]
    return {name: value for name, value in options.items() if name not in unused or value != unused[name]}


def is_done(path: Path, specification: dict[str, Any]) -> bool:
    """There is a cell of this key, and it has all the probes that are asked for."""
    record = read_json(path)
    if record is None or record.get("key") != specification["key"]:
        return False
    found = [[entry["text"], entry["tokens_asked"], entry["seq_len"], entry["sha256"]] for entry in record["texts"]]
    return all(Probe(**probe).id() in found for probe in specification["probes"])


def make(specification: dict[str, Any]) -> dict[str, Any]:
    """Compress, judge, and say everything about it."""
    cell = Cell(**specification["cell"])
    model, record = make_model(specification)
    start = time.perf_counter()
    entries = []
    for probe in (Probe(**entry) for entry in specification["probes"]):
        found = evaluate(model, windows(probe))
        entries.append(
            {
                "text": probe.text,
                "kind": SOURCES[probe.text].kind,
                "origin": SOURCES[probe.text].origin,
                "main": probe.main,
                "tokens_asked": probe.tokens,
                "seq_len": probe.seq_len,
                "sha256": probe.sha256,
                "tokens": found.tokens,
                "nats": found.nats,
                "dense_nats": found.nats if cell.recipe == DENSE else None,  # filled in by with_dense
            }
        )
    if cell.recipe != DENSE:
        _compare(model, specification, entries)
    record["seconds"]["evaluate"] = round(time.perf_counter() - start, 3)
    about = {"name": cell.name, "cell": asdict(cell), "key": specification["key"], "sources": specification["sources"]}
    return about | record | {"code_sha256": code_sha256(), "texts": entries}


def _compare(model: Any, specification: dict[str, Any], entries: list[dict[str, Any]]) -> None:
    """Write beside the losses how close the predictions are to the dense model's, on the first windows of each text."""
    dense, _ = _dense(specification)
    for probe, entry in zip((Probe(**one) for one in specification["probes"]), entries, strict=True):
        if probe.main:
            found = compare_predictions(
                model, dense, windows(replace(probe, tokens=min(probe.tokens, COMPARED_TOKENS)))
            )
            entry |= {"divergence": found.divergence, "same_token": found.same_token, "compared": found.predicted}


def make_model(specification: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The model of a cell, and what making it took."""
    cell = Cell(**specification["cell"])
    if cell.recipe == DENSE:
        return _dense(specification)
    return (_by_rival if cell.recipe in RIVALS else _compressed)(cell, specification)


def windows(probe: Probe) -> TokenWindows:
    """Consecutive windows without overlap."""
    ids = torch.from_numpy(np.load(probe.path)[: probe.tokens])
    count = len(ids) // probe.seq_len
    return TokenWindows(ids[: count * probe.seq_len].view(count, probe.seq_len), probe.text, probe.sha256)


def _dense(specification: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    start = time.perf_counter()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = AutoModelForCausalLM.from_pretrained(specification["model"], dtype=torch.float32).eval().to(device)
    total = sum(parameter.numel() for parameter in model.parameters())
    return model, {
        "model": Path(specification["model"]).name,
        "config": None,
        "calibration": None,
        "params_total_before": total,
        "params_saved": total,
        "param_ratio": 1.0,
        "seconds": {"load": round(time.perf_counter() - start, 3)},
        "peak_memory_bytes": peak_memory_bytes(),
        "environment": describe_environment(device, "float32"),
    }


def _calibration(specification: dict[str, Any]) -> Any:
    source = specification["calibration"]
    return source if source == DEFAULT else torch.from_numpy(np.load(source))


def _by_rival(cell: Cell, specification: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The same of another method: with the same windows, and parameters as its own shapes would save them."""
    watch = Stopwatch()
    with watch("load"):
        source = find_model(specification["model"])
        tokenizer, model = load_tokenizer(source), load_model(source, dtype="float32", device=torch.device("cpu"))
        context = DecoderContext.of(model, device=torch.device("cpu"))
    if model.config.model_type not in BUILT_AS_LLAMA:
        raise ConfigError(
            f"{source.name} is a {model.config.model_type} model, and {cell.recipe} is written for {' and '.join(BUILT_AS_LLAMA)}"
        )
    calibration = _calibration(specification)
    drawn = read_windows(context, tokenizer, cell.windows_config(), calibration, (), watch).calibration
    total = count_parameters(model)
    shapes = [shape for layer in context.layers for shape in context.architecture.shapes(layer).values()]
    before = sum(out * inner for out, inner in shapes)
    with watch("compress"):
        after = cell.config().compress(context, drawn)
    return model, {
        "model": source.name,
        "config": _described(cell),
        "calibration": drawn.describe(),
        "params_total_before": total,
        "params_saved": total - before + after,
        "param_ratio": after / before,
        "seconds": {stage: round(seconds, 3) for stage, seconds in watch.seconds.items()},
        "peak_memory_bytes": peak_memory_bytes(),
        "peak_device_memory_bytes": 0,
        "environment": describe_environment(torch.device("cpu"), "float32"),
    }


def _compressed(cell: Cell, specification: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Peak memory and seconds are those of the compression; judging comes after."""
    model, report = lorap.compress(
        specification["model"],
        calibration=_calibration(specification),
        config=cell.config(),
        evaluation=(),
        dtype="float32",
        progress=False,
    )
    found = report.to_dict()
    names = ("model", "config", "calibration", "params_total_before", "params_saved", "param_ratio")
    names += ("seconds", "peak_memory_bytes", "peak_device_memory_bytes", "environment")
    return model, {name: found[name] for name in names}


def main(arguments: Iterable[str]) -> None:
    for argument in arguments:
        given = json.loads(argument)
        out = Path(given["out"])
        write_json(out, with_dense(make(given), out.parent))


if __name__ == "__main__":
    main(sys.argv[1:])
