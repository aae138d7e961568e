"""transformers' Trainer as tuning needs it: a teacher, a clock, a state without pickles, and nothing printed or left behind.

The Trainer's own checkpoints are folders written in place, with pickles in them, which a kill leaves half written; and its
learning rate follows steps, not a time limit.
"""

from __future__ import annotations

import math
import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import PrinterCallback, Trainer, TrainingArguments

from lorap.calibration.losses import IGNORED, next_tokens
from lorap.calibration.windows import TokenWindows
from lorap.distributed import SINGLE_PROCESS, Processes
from lorap.errors import CalibrationError, ConfigError
from lorap.recovery.config import SAVE_SECONDS, TuningConfig
from lorap.recovery.state import Progress, read_state, write_state
from lorap.recovery.training import autocast_dtype

# Tokens that run through the model at once, in each process; larger batches are summed up from such pieces.
PIECE_TOKENS = 1024
BETAS = (0.9, 0.95)
# What launchers set, whether for this process or for one that it was started from.
LEFT_BY_OTHERS = ("LOCAL_RANK", "WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


def train(
    model: Any,
    windows: TokenWindows,
    config: TuningConfig,
    *,
    state: Path,
    teacher: Any = None,
    save_seconds: float = SAVE_SECONDS,
    progress: bool = False,
    processes: Processes = SINGLE_PROCESS,
) -> Progress:
    """Train what requires gradients in ``model`` until the steps or the minutes are used up.

    No dropout is active, so nothing is drawn at random and a resumed run repeats what an uninterrupted one does.

    Args:
        model: from :func:`add_adapters`, on its device.
        windows: in the order of training: step i takes ``batch_size`` of them from i * batch_size on; after the last comes the
            first.
        config: how.
        state: a file to go on from where it exists, and to write the state into from time to time.
        teacher: a model of the same vocabulary. The loss is then the divergence of the model's predictions from the teacher's.
        save_seconds: between two states.
        progress: show a bar on stderr.
        processes: who share each step; the first one writes and its clock counts.

    Returns:
        How it went.

    Raises:
        ConfigError: the windows of a step cannot be shared by the processes.
        CalibrationError: the loss is not finite.
        CheckpointError: the state is damaged or belongs to another model.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(parameters.values(), lr=config.learning_rate, betas=BETAS, weight_decay=0.0)
    done = read_state(state, parameters, optimizer) if state.exists() else Progress([])
    if config.used_up(done.steps, done.seconds) >= 1:
        return done

    def save() -> None:
        if processes.is_main_process:
            write_state(state, parameters, optimizer, done)

    with (
        _shielded(processes),
        tqdm(total=config.steps, initial=done.steps, desc="Tuning", unit="step", disable=not progress) as bar,
    ):
        arguments = _arguments(config, done, state.parent, next(iter(parameters.values())).device, processes)
        trainer = AdapterTrainer(model, arguments, optimizer, config, done, processes)
        trainer.rows, trainer.teacher, trainer.bar = _rows(windows, config, done), teacher, bar
        trainer.save, trainer.save_seconds = save, save_seconds
        trainer.train()
    return done


class AdapterTrainer(Trainer):
    """A Trainer that may learn from a teacher, ends by the clock where it has to, and says when its state is to be kept."""

    rows: Any  # from _rows()
    teacher: Any
    bar: Any
    save: Callable[[], None]
    save_seconds: float

    def __init__(
        self,
        model: Any,
        args: TrainingArguments,
        optimizer: torch.optim.Optimizer,
        config: TuningConfig,
        done: Progress,
        processes: Processes,
    ) -> None:
        # Set aside until accelerate has placed the optimizer, for it would place the count of steps too.
        self.moments = dict(optimizer.state)
        optimizer.state.clear()
        super().__init__(model, args, optimizers=(optimizer, None))  # type: ignore[arg-type]
        self.remove_callback(PrinterCallback)  # it prints every loss to stdout
        # The loss is divided by the tokens of the whole step, which the Trainer counts then.
        self.model_accepts_loss_kwargs = True
        self.tuning, self.done, self.processes = config, done, processes
        self.first, self.saved_at, self.started = done.steps, done.seconds, 0.0

    def get_train_dataloader(self) -> DataLoader:
        """The rows in their order, which the Trainer's own would shuffle."""
        return self.accelerator.prepare(DataLoader(self.rows, batch_size=self.args.per_device_train_batch_size))

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> LambdaLR:
        """The last that the Trainer makes before the first step: everything has its place, and goes on from where it was."""
        placed: Any = optimizer or self.optimizer
        placed.state.update(self.moments)
        self.started = time.perf_counter() - self.done.seconds
        self.lr_scheduler = LambdaLR(placed, self.share_of_rate)
        return self.lr_scheduler

    def share_of_rate(self, passed: int) -> float:
        """Of the highest learning rate, for the step after the ``passed`` ones; asked for once before each."""
        if passed:
            self.done.seconds = self.processes.broadcast(time.perf_counter() - self.started)
        return self.tuning.share_of_rate(self.first + passed, self.done.seconds)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """This piece's part of the mean over the predictions of the step: of their negative log-likelihood, or of the divergence
        from the teacher's, in nats."""
        model.eval()  # the Trainer has just switched dropout on
        labels = inputs.pop("labels")[:, 1:]
        counted = labels != IGNORED
        log_p = _log_probabilities(model, inputs, counted)
        if self.teacher is None:
            loss = F.nll_loss(log_p, labels[counted], reduction="sum")
        else:
            with torch.no_grad(), self.accelerator.autocast():
                wanted = _log_probabilities(self.teacher, inputs, counted)
            loss = F.kl_div(log_p, wanted, log_target=True, reduction="sum")
        # Gradients become their mean over the processes.
        return loss / num_items_in_batch.clamp(min=1) * self.accelerator.num_processes

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """After every step, with its loss, and once at the end without."""
        loss = logs.get("loss")
        if loss is None:
            return
        if not math.isfinite(loss):
            raise CalibrationError(f"the loss is {loss} at step {self.done.steps + 1}; lower the learning rate")
        self.done.losses.append(loss)
        self.bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
        self.bar.update()
        self.control.should_training_stop = self.tuning.used_up(self.done.steps, self.done.seconds) >= 1
        if self.control.should_training_stop or self.done.seconds - self.saved_at >= self.save_seconds:
            self.saved_at = self.done.seconds
            self.save()

    def floating_point_ops(self, inputs: Any) -> int:
        """Not counted: the Trainer would go through all parameters at every piece."""
        return 0


def _arguments(
    config: TuningConfig, done: Progress, folder: Path, device: torch.device, processes: Processes
) -> TrainingArguments:
    """For the rest of the training; everything that the Trainer would print, write or draw at random is switched off."""
    share, rest = divmod(config.batch_size, processes.count)
    if rest:
        raise ConfigError(
            f"batch_size is {config.batch_size}, and {processes.count} processes share the windows of a step; choose a multiple "
            f"of {processes.count}"
        )
    piece = max(n for n in range(1, share + 1) if share % n == 0 and (n == 1 or n * config.seq_len <= PIECE_TOKENS))
    bfloat16 = autocast_dtype(config.precision, device) is not None
    try:
        arguments = TrainingArguments(
            output_dir=str(folder),
            max_steps=config.steps - done.steps,
            per_device_train_batch_size=piece,
            gradient_accumulation_steps=share // piece,
            learning_rate=config.learning_rate,
            max_grad_norm=1.0,
            bf16=bfloat16,
            seed=config.seed % 2**32,  # numpy takes no more; nothing is drawn from it
            use_cpu=device.type == "cpu",
            logging_steps=1,
            logging_nan_inf_filter=False,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
            dataloader_pin_memory=False,
            average_tokens_across_devices=True,
            ddp_find_unused_parameters=False,
        )
    except (ImportError, ValueError) as error:  # an old accelerate; bfloat16 on a device that has none
        raise ConfigError(f"the Trainer of transformers cannot run this: {error}") from error
    arguments._n_gpu = min(arguments.n_gpu, 1)  # else one process copies the model to every GPU that it sees
    return arguments


def _rows(windows: TokenWindows, config: TuningConfig, done: Progress) -> list[dict[str, Tensor]]:
    """The windows that are left, in their order. The first token of one is predicted from nothing."""
    ids, mask = windows.input_ids, windows.attention_mask
    labels = F.pad(next_tokens(ids, mask), (1, 0), value=IGNORED)
    order = [i % len(ids) for i in range(done.steps * config.batch_size, config.steps * config.batch_size)]
    masks = [{} if mask is None else {"attention_mask": row} for row in (ids if mask is None else mask)]
    return [{"input_ids": ids[i], "labels": labels[i], **masks[i]} for i in order]


def _log_probabilities(model: Any, inputs: Any, counted: Tensor) -> Tensor:
    """(predictions that count, vocabulary) float32."""
    logits = model(**inputs, use_cache=False).logits[:, :-1]
    # Where all count, without the copy that a mask makes.
    wanted = logits[counted] if "attention_mask" in inputs else logits.flatten(0, 1)
    return F.log_softmax(wanted.float(), dim=-1)


@contextmanager
def _shielded(processes: Processes) -> Iterator[None]:
    """The Trainer takes settings and other processes from variables that something else may have left, and would wait for these;
    and it seeds three generators of the whole process. Neither reaches beyond it."""
    python, arrays, environment = random.getstate(), numpy.random.get_state(), dict(os.environ)
    for name in environment:
        if name.startswith("ACCELERATE_") or (processes.count == 1 and name in LEFT_BY_OTHERS):
            del os.environ[name]
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            yield
    finally:
        random.setstate(python)
        numpy.random.set_state(arrays)
        os.environ.update(environment)
