"""The steps of a run as they are kept in its journal, and brought back from there: windows, losses, the plan, finished layers."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from lorap.architectures import Architecture
from lorap.calibration.windows import TokenWindows
from lorap.checkpoint.paging import put_tensor
from lorap.checkpoint.stored_tensors import StoredTensor
from lorap.compression.allocation import LayerPlan
from lorap.compression.planning import Key
from lorap.compression.runs.journal import Journal
from lorap.jsonio import read_as
from lorap.nn.linear import LowRankLinear
from lorap.reports.records import Share
from lorap.reports.run import ProjectionReport


def keep_windows(journal: Journal, step: str, windows: Sequence[TokenWindows], **more: Any) -> None:
    """Token windows: those to calibrate on and those of each text to judge by."""
    tensors, described = {}, []
    for index, each in enumerate(windows):
        for name in ("input_ids", "attention_mask", "groups"):
            if (tensor := getattr(each, name)) is not None:
                tensors[f"{index}.{name}"] = tensor
        names = {"name": each.name, "sha256": each.sha256, "group_names": each.group_names}
        described.append({**names, "shares": [asdict(share) for share in each.shares]})
    journal.keep(step, {"windows": described, **more}, tensors)


def kept_windows(journal: Journal, step: str) -> list[TokenWindows]:
    stored = journal.tensors(step)

    def tensor(index: int, name: str) -> Any:
        found = stored.get(f"{index}.{name}")
        return None if found is None else found.read()

    return [
        TokenWindows(
            tensor(index, "input_ids"),
            each["name"],
            each["sha256"],
            tensor(index, "attention_mask"),
            tensor(index, "groups"),
            tuple(each["group_names"]),
            tuple(Share(**share) for share in each["shares"]),
        )
        for index, each in enumerate(journal.read(step)["windows"])
    ]


class KeptMetrics(MutableMapping[Key, Tensor]):
    """How errors of outputs are weighed, by layer and role: in files, because those of all layers are larger than the model."""

    def __init__(self, journal: Journal) -> None:
        self.journal = journal
        self.keys_: dict[Key, None] = {}

    def __setitem__(self, key: Key, metric: Tensor) -> None:
        self.journal.keep_tensors(self._step(key), {"metric": metric})
        self.keys_[key] = None

    def __getitem__(self, key: Key) -> Tensor:
        if key not in self.keys_:
            raise KeyError(key)
        return self.journal.tensors(self._step(key))["metric"].read()

    def __delitem__(self, key: Key) -> None:
        del self.keys_[key]
        self.journal.forget_tensors(self._step(key))

    def __contains__(self, key: object) -> bool:
        return key in self.keys_  # without reading the file

    def __iter__(self) -> Iterator[Key]:
        return iter(self.keys_)

    def __len__(self) -> int:
        return len(self.keys_)

    def restore(self, keys: Sequence[Key]) -> None:
        """Know again what was written down."""
        self.keys_ = dict.fromkeys(keys)

    @staticmethod
    def _step(key: Key) -> str:
        return f"metric-{key[0]:05}-{key[1]}"


def keep_plan(
    journal: Journal, step: str, layers: Sequence[LayerPlan], metrics: MutableMapping[Key, Tensor], **more: Any
) -> None:
    journal.keep(step, {"layers": [asdict(layer) for layer in layers], "metrics": list(metrics), **more})


def kept_plan(journal: Journal, step: str, metrics: KeptMetrics) -> list[LayerPlan]:
    found = journal.read(step)
    metrics.restore([(index, role) for index, role in found["metrics"]])
    return [LayerPlan(**layer) for layer in found["layers"]]


def keep_layer(journal: Journal, step: str, layer: nn.Module, reports: Sequence[ProjectionReport], **more: Any) -> None:
    journal.keep(step, {"projections": [asdict(report) for report in reports], **more}, layer.state_dict())


def kept_reports(found: dict[str, Any], step: str) -> list[ProjectionReport]:
    """The projections of a kept layer."""
    reports: list[ProjectionReport] = read_as(list[ProjectionReport], found.get("projections"), step)
    return reports


def adopt(layer: nn.Module, stored: dict[str, StoredTensor], architecture: Architecture) -> None:
    """Give a dense layer the projections that a file has in its place, still without weights (on the meta device)."""
    for path in architecture.projections.values():
        inner = {
            name.removeprefix(path + "."): tensor for name, tensor in stored.items() if name.startswith(path + ".")
        }
        layer.set_submodule(path, _empty(inner))
    layer.get_submodule(architecture.mlp).intermediate_size = int(  # type: ignore[assignment]
        layer.get_submodule(architecture.projections["down_proj"]).in_features  # type: ignore[arg-type]
    )


def _empty(tensors: dict[str, StoredTensor]) -> nn.Module:
    """The module that these tensors belong to, on the meta device."""
    if "right.weight" not in tensors:
        out_features, in_features = tensors["weight"].shape
        linear = nn.Linear(
            in_features, out_features, bias="bias" in tensors, device="meta", dtype=tensors["weight"].dtype
        )
        return linear.eval()
    rank, in_features = tensors["right.weight"].shape
    pivoted = "pivot_rows" in tensors
    out_features = tensors["left.weight"].shape[0] + (rank if pivoted else 0)
    bias = "output_bias" in tensors or "left.bias" in tensors
    dtype = tensors["right.weight"].dtype
    return LowRankLinear(in_features, out_features, rank, bias, "meta", dtype, pivoted).eval()


def load_kept(layer: nn.Module, stored: dict[str, StoredTensor], device: torch.device) -> None:
    """Fill an adopted layer that stays in memory."""
    for name, tensor in stored.items():
        put_tensor(layer, name, tensor.read().to(device))
