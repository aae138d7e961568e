"""Loss over bytes: the dense model and `best` with weights in 16, 8 and 4 bits.

    python benchmarks/quality/bits.py                        makes the cells that are missing
    python benchmarks/quality/bits.py --cells dense-int4     one of them
    python benchmarks/quality/bits.py --tables-only          writes the table into docs/results.md

A cell is a JSON file in benchmarks/results/quality/bits; what is there is not made again. SmolLM2-135M comes as 4-bit numbers in
groups of 32, so groups are of 64 here, or 4 bits would cost the dense model nothing. Everything is calibrated on 16 windows of
128 tokens of web pages; int8 and float8 are rounded to the nearest. A number of bits is that for each weight, mixed of int4 and
int8 as a budget of `best` does it. Computed in float32 with scales as bfloat16 has them; bytes are of a bfloat16 checkpoint.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from cells import SEQ_LEN
from documents import insert, markdown
from few_windows import losses, test_windows, tokens_of
from records import code_sha256, read_json, write_json
from texts import CALIBRATION, assets

import lorap
from lorap.algorithms.rounding import round_weight
from lorap.architectures import PROJECTIONS, find_architecture
from lorap.calibration import TokenWindows
from lorap.calibration.context import DecoderContext
from lorap.calibration.stream import CalibrationStream
from lorap.checkpoint.load import find_model, load_model, load_tokenizer
from lorap.compression.byte_budget import resolve_budget
from lorap.compression.pipeline import Run
from lorap.compression.quantization import input_moments
from lorap.compression.stored_bytes import DenseModel
from lorap.nn.quantized import QuantizedLinear
from lorap.system import Stopwatch

TESTS, GROUP, WINDOWS = ("wiki", "wells"), 64, 16
KINDS = {"": "plain factors, bfloat16", "-int8": "plain factors, int8", "-int4": "plain factors, int4"}
# What each cell is called in the table.
CELLS = {
    "dense": "dense, bfloat16",
    "dense-int8": "dense, int8",
    "dense-float8": "dense, float8 (e4m3), scales for groups",
    "dense-float8-rows": "dense, float8 (e4m3), a scale a row",
    "dense-int4": "dense, int4",
    **{f"dense-{bits}": f"dense, int4 and int8, {bits} bits" for bits in ("4.5", "5", "6")},
    "dense-int4-nearest": "dense, int4, rounded to the nearest",
    "dense-int3": "dense, 3 bits",
    **{
        f"best-{sparsity}{kind}": f"`best` {sparsity}, {title}"
        for sparsity in ("0.2", "0.5")
        for kind, title in KINDS.items()
    },
}
OUT = assets.CACHE.parent / "benchmarks" / "results" / "quality" / "bits"
RESULTS_PAGE = assets.CACHE.parent / "docs" / "results.md"


class Watched(Run):
    """Shows the model before it is rounded."""

    show: Callable[[Any], None]

    def _round_layers(self, *args: Any) -> None:
        self.show(self.context.model)
        super()._round_layers(*args)


def decoder_bytes(model: Any, bits: int | None = None, group: int = GROUP) -> int:
    """Of the decoder layers in a bfloat16 checkpoint; ``bits`` where weights only have the values of so few, in groups."""
    total = 0
    for name, tensor in model.model.layers.state_dict().items():
        if bits and tensor.dim() == 2:
            total += tensor.numel() * bits // 8 + 2 * len(tensor) * -(-tensor.shape[1] // group)
        elif not name.endswith("_shape"):
            total += tensor.numel() * (2 if tensor.is_floating_point() else tensor.itemsize)
    return total


def by_gptq(model: Any, windows: TokenWindows, bits: int) -> None:
    """Every matrix with the values of ``bits``, of which lorap's format holds those of 4 and 8."""
    context = DecoderContext(model, find_architecture(model), tuple(model.model.layers), torch.device("cpu"))
    stream = CalibrationStream.from_windows(context, windows)
    for index, layer in enumerate(context.layers):
        moments = input_moments(context, index, stream)
        for role in PROJECTIONS:
            linear = context.architecture.linears(layer)[role]
            found = round_weight(linear.weight.data, moments[role], bits=bits, group=GROUP, scale_dtype=torch.bfloat16)
            linear.weight.data = found.weight(torch.float32)
        stream.advance(index, layer)


@torch.no_grad()
def as_float8(model: Any, group: int) -> None:
    """Every matrix with the nearest values of float8 (e4m3), the largest weight of each group on the largest of them."""
    kind = torch.float8_e4m3fn
    for layer in model.model.layers:
        for name, weight in layer.named_parameters():
            if name.endswith("proj.weight"):
                for part in weight.split(group, dim=1):
                    scale = (part.abs().amax(1, keepdim=True) / torch.finfo(kind).max).bfloat16().float()
                    part.copy_((part / scale).to(kind).float() * scale)


def store_scales(model: Any) -> None:
    """Scales as a bfloat16 checkpoint holds them."""
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            module.weight_scale = module.weight_scale.bfloat16().float()


def make(name: str, dense: Any, tokenizer: Any, out: Path, test_count: int) -> None:
    """One cell, or the three of one run of `best`."""
    tests = [test_windows(test, test_count, tokenizer) for test in TESTS]
    ids = tokens_of("web", CALIBRATION, tokenizer)
    windows = TokenWindows(ids[: WINDOWS * SEQ_LEN].view(WINDOWS, SEQ_LEN), "web", "")

    def keep(cell: str, model: Any, bits: int | None = None, group: int = GROUP, **more: Any) -> None:
        store_scales(model)
        found = {"losses": losses(model, tests), "decoder_bytes": decoder_bytes(model, bits, group)}
        write_json(out / f"{cell}.json", {"cell": cell, **found, **more, "code_sha256": code_sha256()})
        print(cell, [round(entry["nats"], 4) for entry in found["losses"]], flush=True)

    kind, *rest = name.split("-")
    if kind == "dense":
        model = copy.deepcopy(dense)
        if name == "dense-int3":
            by_gptq(model, windows, 3)
        elif rest[:1] == ["float8"]:
            group = model.config.intermediate_size if rest[1:] else GROUP  # a group as long as the longest row is a row
            as_float8(model, group)
            keep(name, model, 8, group)
            return
        elif rest and rest[0][0].isdigit():
            keep(name, mixed(float(rest[0]), model, tokenizer, ids))
            return
        elif rest:
            nearest = rest[-1] != "int4"
            lorap.quantize(model, rest[0], group_size=GROUP, calibration=None if nearest else windows.input_ids)
        keep(name, model, 3 if name == "dense-int3" else None)
        return
    make_best(rest[0], dense, tokenizer, ids, keep)


def mixed(bits: float, model: Any, tokenizer: Any, ids: torch.Tensor) -> Any:
    """Rounded to 4 and 8 bits under a budget."""
    windows = {"num_calibration_samples": WINDOWS, "calibration_seq_len": SEQ_LEN}
    # Scales count as the float32 numbers that they are computed with, 16 bits more for each group than those that are stored.
    config = lorap.CompressionConfig(bits_per_weight=bits + 16 / GROUP, group_size=GROUP, **windows)
    context = DecoderContext.of(model, device=torch.device("cpu"))
    config = resolve_budget(DenseModel.of(model, context.architecture), config)
    Run(context, "model", tokenizer, config, Stopwatch()).compress(ids, ())
    return model


def make_best(sparsity: str, dense: Any, tokenizer: Any, ids: torch.Tensor, keep: Callable[..., None]) -> None:
    """The three cells of one run: before it is rounded, rounded to 8 bits, and to 4."""
    windows = {"num_calibration_samples": WINDOWS, "calibration_seq_len": SEQ_LEN}
    config = lorap.CompressionConfig(sparsity=float(sparsity), weights="int4", group_size=GROUP, **windows)
    context = DecoderContext.of(copy.deepcopy(dense), device=torch.device("cpu"))
    run = Watched(context, "model", tokenizer, config, Stopwatch())

    def show(model: Any) -> None:
        keep(f"best-{sparsity}", model)
        rounded = copy.deepcopy(model)
        keep(f"best-{sparsity}-int8", lorap.quantize(rounded, "int8", group_size=GROUP))

    run.show = show
    report = run.compress(ids, ())
    keep(f"best-{sparsity}-int4", context.model, seconds=report.seconds)


def table(cells: dict[str, dict[str, Any]]) -> str:
    """Bytes, and the increase over the dense model in nats per token on each text."""
    dense = [entry["nats"] for entry in cells["dense"]["losses"]]
    rows = []
    for name, title in CELLS.items():
        if name in cells:
            cell = cells[name]
            nats = [f"{entry['nats'] - base:+.3f}" for entry, base in zip(cell["losses"], dense, strict=True)]
            rows.append([title, f"{cell['decoder_bytes'] / 1e6:.1f}", *nats])
    return markdown(["decoder layers", "MB", "encyclopedia", "fiction"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", nargs="+", choices=CELLS, default=list(CELLS))
    parser.add_argument("--test-windows", type=int, default=16, help="of each text")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--tables-only", action="store_true", help="make no cells")
    arguments = parser.parse_args()
    if not arguments.tables_only and any(not (arguments.out / f"{name}.json").exists() for name in arguments.cells):
        assets.fetch(assets.FILES)
        found = find_model(assets.MODEL)
        tokenizer, dense = load_tokenizer(found), load_model(found, dtype="float32").eval()
        for name in arguments.cells:
            if not (arguments.out / f"{name}.json").exists():
                make(name, dense, tokenizer, arguments.out, arguments.test_windows)
    cells = {record["cell"]: record for path in arguments.out.glob("*.json") if (record := read_json(path))}
    if "dense" in cells:
        insert(RESULTS_PAGE, "bits", table(cells))


if __name__ == "__main__":
    main()
