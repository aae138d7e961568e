"""The state of a training on disk: each parameter with both of its moments, and the losses so far, in one safetensors file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from lorap.errors import CheckpointError
from lorap.files import replacing


@dataclass
class Progress:
    """How far the training is.

    Args:
        losses: mean loss of each finished step, in nats per token.
        seconds: spent on them, in all runs together.
    """

    losses: list[float]
    seconds: float = 0.0

    @property
    def steps(self) -> int:
        """Finished steps."""
        return len(self.losses)


def write_state(path: Path, parameters: dict[str, nn.Parameter], optimizer: Any, done: Progress) -> None:
    """Write the state of a training in one step, in place of an older one.

    Args:
        path: of the file.
        parameters: that are trained, by name.
        optimizer: AdamW, after a step.
        done: losses and seconds so far.

    Raises:
        CheckpointError: it cannot be written; an earlier state is left as it was.
    """
    tensors = {"losses": torch.tensor(done.losses, dtype=torch.float64)}
    for name, parameter in parameters.items():
        moments = optimizer.state[parameter]
        tensors[f"weight/{name}"] = parameter.detach().contiguous()
        tensors[f"first/{name}"], tensors[f"second/{name}"] = moments["exp_avg"], moments["exp_avg_sq"]
    try:
        with replacing(path) as draft:
            save_file(tensors, draft, metadata={"seconds": repr(done.seconds)})
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"could not write the state of the training to {path.parent}: {error}") from error


def read_state(path: Path, parameters: dict[str, nn.Parameter], optimizer: Any) -> Progress:
    """Set parameters and moments as they were when the state was written.

    Args:
        path: of the file.
        parameters: that are trained, by name; changed in place.
        optimizer: AdamW; its moments are set.

    Raises:
        CheckpointError: the file is damaged, or belongs to other parameters.
    """
    try:
        with safe_open(path, "pt") as file:
            losses = file.get_tensor("losses").tolist()
            for name, parameter in parameters.items():
                parameter.data.copy_(file.get_tensor(f"weight/{name}"))
                optimizer.state[parameter] = {
                    "step": torch.tensor(float(len(losses))),
                    "exp_avg": file.get_tensor(f"first/{name}").to(parameter.device),
                    "exp_avg_sq": file.get_tensor(f"second/{name}").to(parameter.device),
                }
            return Progress(losses, float(file.metadata()["seconds"]))
    except (OSError, SafetensorError, RuntimeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is no state of this training: {error}; begin anew with --restart") from error
