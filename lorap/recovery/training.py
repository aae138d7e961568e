"""Training adapters on a frozen model.

The model stays as it is; what is trained are low-rank adapters (LoRA, arXiv 2106.09685) that PEFT puts on its linear layers.
The loop is our own because of what must hold: a state that is on disk whole or not at all, without pickles; after a kill the
same final weights as without one; and a learning rate that ends at 0 also where time, not steps, is the limit.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from lorap.calibration.losses import IGNORED, next_tokens
from lorap.calibration.windows import TokenWindows
from lorap.errors import CalibrationError, ConfigError
from lorap.recovery.config import TuningConfig
from lorap.recovery.state import Progress, read_state, write_state

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Tokens that run through the model at once; larger batches are summed up from such pieces.
PIECE_TOKENS = 1024
# The learning rate rises over so many steps, or a tenth of them where that is less, and then falls to 0 in a straight line.
WARM_UP_STEPS = 8
BETAS = (0.9, 0.95)
LARGEST_GRADIENT = 1.0
# A state is written so often; what a kill costs at most.
SAVE_SECONDS = 60.0


def add_adapters(model: nn.Module, names: Sequence[str], *, rank: int, seed: int) -> Any:
    """A LoRA adapter on each of some linear layers, all else frozen; the model computes the same at first.

    Args:
        model: compressed.
        names: full names of linear layers.
        rank: of the adapters.
        seed: of their first values.

    Returns:
        A ``peft.PeftModel`` around ``model``.

    Raises:
        ConfigError: the package ``peft`` is not installed.
    """
    require_peft()
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(names))
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())), warnings.catch_warnings():
        # peft 0.21 asks transformers 5.24 for it by the old name.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        torch.manual_seed(seed)
        return get_peft_model(model, config)  # type: ignore[arg-type]


def hold_weights(model: nn.Module, names: Sequence[str], dtype: torch.dtype) -> None:
    """Keep the frozen weights of some linear layers in what autocast multiplies them in.

    Results are the same, without a conversion of every weight at every step: with AMX 0.78 of the processor time.

    Args:
        model: with or without adapters.
        names: full names of linear layers.
        dtype: that autocast multiplies in.
    """
    for name in names:
        layer: Any = model.get_submodule(name)
        weight = getattr(layer, "base_layer", layer).weight
        weight.data = weight.data.to(dtype)


def require_peft() -> None:
    """Refuse to start work that would end in an ImportError.

    Raises:
        ConfigError: the package ``peft`` is not installed.
    """
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"tuning needs the package `peft` ({error}): pip install 'lorap[recover]'") from None


def train(
    model: PreTrainedModel,
    windows: TokenWindows,
    config: TuningConfig,
    *,
    teacher: Any = None,
    state: Path | None = None,
    save_seconds: float = SAVE_SECONDS,
    progress: bool = False,
) -> Progress:
    """Train what requires gradients in ``model`` until the steps or the minutes are used up.

    No dropout is active, so nothing is drawn at random and a resumed run repeats what an uninterrupted one does.

    Args:
        model: predicts the next token; with a few parameters that require gradients, as after :func:`add_adapters`.
        windows: in the order of training: step i takes ``batch_size`` of them from i * batch_size on; after the last comes the
            first.
        config: how.
        teacher: a model of the same vocabulary. The loss is then the divergence of the model's predictions from the teacher's.
        state: a file to go on from where it exists, and to write the state into from time to time.
        save_seconds: between two states.
        progress: show a bar on stderr.

    Raises:
        CalibrationError: the loss is not finite.
        CheckpointError: the state is damaged or belongs to another model.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(parameters.values(), lr=0.0, betas=BETAS, weight_decay=0.0)
    done = read_state(state, parameters, optimizer) if state is not None and state.exists() else Progress([])
    device = next(iter(parameters.values())).device
    dtype = autocast_dtype(config.precision, device)
    model.eval()
    saved_at = time.perf_counter()
    started = saved_at - done.seconds
    with tqdm(total=config.steps, initial=done.steps, desc="Tuning", unit="step", disable=not progress) as bar:
        while (used := _used(config, done)) < 1:
            rows = _rows(config, done.steps, len(windows.input_ids))
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate * _warm_up(config, done.steps) * (1 - used)
            with torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None):
                loss = _accumulate(model, windows, rows, device, teacher)
            if not torch.isfinite(loss):
                raise CalibrationError(f"the loss is {float(loss)} at step {done.steps + 1}; lower the learning rate")
            torch.nn.utils.clip_grad_norm_(parameters.values(), LARGEST_GRADIENT)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            done.losses.append(float(loss))
            now = time.perf_counter()
            done.seconds = now - started
            if state is not None and now - saved_at >= save_seconds:
                write_state(state, parameters, optimizer, done)
                saved_at = now
            bar.set_postfix_str(f"loss {done.losses[-1]:.3f}", refresh=False)
            bar.update()
    if state is not None:
        write_state(state, parameters, optimizer, done)
    return done


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """What matmuls run in under autocast; None for the model's own dtype.

    ``auto`` is bfloat16 where the hardware multiplies it: with AMX 1.3 times as many tokens in the same processor time.
    """
    if precision == "float32":
        return None
    if precision == "bfloat16":
        return torch.bfloat16
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else None
    return torch.bfloat16 if device.type == "cpu" and _cpu_multiplies_bfloat16() else None


def _cpu_multiplies_bfloat16() -> bool:
    checks = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return any(bool(getattr(torch.cpu, check, bool)()) for check in checks)


def _used(config: TuningConfig, done: Progress) -> float:
    """Share of the steps or the minutes that is used up, whichever is more."""
    by_time = 0.0 if config.minutes is None else done.seconds / (60 * config.minutes)
    return max(done.steps / config.steps, by_time)


def _warm_up(config: TuningConfig, step: int) -> float:
    return min(1.0, (step + 1) / max(1, min(WARM_UP_STEPS, config.steps // 10)))


# ----------------------------------------------------------------------------------------------------------------------
# One step


def _rows(config: TuningConfig, step: int, available: int) -> Tensor:
    return torch.arange(step * config.batch_size, (step + 1) * config.batch_size) % available


def _accumulate(
    model: PreTrainedModel, windows: TokenWindows, rows: Tensor, device: torch.device, teacher: Any
) -> Tensor:
    """Gradients of the mean loss over the windows ``rows``, piece by piece; returns that loss."""
    ids = windows.input_ids[rows].to(device)
    mask = None if windows.attention_mask is None else windows.attention_mask[rows].to(device)
    counted = next_tokens(ids, mask) != IGNORED
    total = torch.zeros((), device=device)
    for piece in _pieces(len(ids), max(1, PIECE_TOKENS // ids.shape[1])):
        piece_mask = None if mask is None else mask[piece]
        loss = _summed_loss(model, ids[piece], piece_mask, counted[piece], teacher) / counted.sum().clamp(min=1)
        loss.backward()
        total += loss.detach()
    return total


def _pieces(count: int, size: int) -> Iterator[slice]:
    for first in range(0, count, size):
        yield slice(first, first + size)


def _summed_loss(model: PreTrainedModel, ids: Tensor, mask: Tensor | None, counted: Tensor, teacher: Any) -> Tensor:
    log_p = _log_probabilities(model, ids, mask, counted)
    if teacher is None:
        return F.nll_loss(log_p, ids[:, 1:][counted], reduction="sum")
    with torch.no_grad():
        wanted = _log_probabilities(teacher, ids, mask, counted)
    return F.kl_div(log_p, wanted, log_target=True, reduction="sum")


def _log_probabilities(model: PreTrainedModel, ids: Tensor, mask: Tensor | None, counted: Tensor) -> Tensor:
    """(predictions that count, vocabulary) float32."""
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
    # Where all count, without the copy that a mask makes.
    wanted = logits.flatten(0, 1) if mask is None else logits[counted]
    return F.log_softmax(wanted.float(), dim=-1)
