"""Hidden states in memory up to a budget, and in files beyond it."""

from __future__ import annotations

import itertools
import weakref
from pathlib import Path

import torch
from torch import Tensor

from lorap.checkpoint.stored_tensors import read_into
from lorap.checkpoint.write import as_bytes, write_all
from lorap.errors import CheckpointError


class OffloadedTensor:
    """One tensor of a :class:`HiddenStateStore`, in memory or in a file, which goes when nobody refers to this any more."""

    def __init__(self, tensor: Tensor | None = None, path: Path | None = None, like: Tensor | None = None) -> None:
        self._tensor, self._path = tensor, path
        if like is not None:
            self._dtype, self._shape, self._device = like.dtype, like.shape, like.device

    def get(self) -> Tensor:
        """The tensor, where it was.

        Raises:
            CheckpointError: its file cannot be read.
        """
        if self._path is None:
            assert self._tensor is not None
            return self._tensor
        size = self._dtype.itemsize * self._shape.numel()
        data = torch.empty(size, dtype=torch.uint8)
        try:
            with self._path.open("rb", buffering=0) as file:
                done = read_into(file.fileno(), data.numpy().data, 0)
        except OSError as error:
            raise CheckpointError(f"cannot read hidden states back from {self._path}: {error.strerror}") from error
        if done < size:
            raise CheckpointError(f"{self._path} holds {done:,} of {size:,} bytes of hidden states")
        return data.view(self._dtype).view(self._shape).to(self._device)


class HiddenStateStore:
    """Keeps tensors: in memory while they fit, in files beyond.

    Args:
        budget_bytes: of memory; None for no bound.
        folder: for the files; made when the first is written.
    """

    def __init__(self, *, budget_bytes: int | None = None, folder: Path | None = None) -> None:
        self.budget_bytes, self.folder = budget_bytes, folder
        self.used_bytes = 0
        self.spilled_bytes = 0  # written to files so far
        self._names = itertools.count()

    def put(self, tensor: Tensor) -> OffloadedTensor:
        """Keep ``tensor``.

        Raises:
            CheckpointError: the disk is full.
        """
        nbytes = tensor.nbytes
        if self.folder is None or self.budget_bytes is None or self.used_bytes + nbytes <= self.budget_bytes:
            held = OffloadedTensor(tensor)
            self.used_bytes += nbytes
            weakref.finalize(held, self._release, nbytes)
            return held
        path = self.folder / f"{next(self._names):06}.hidden"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with path.open("wb", buffering=0) as file:
                write_all(file.fileno(), as_bytes(tensor))
        except OSError as error:
            path.unlink(missing_ok=True)
            raise CheckpointError(
                f"cannot write hidden states to {path}: {error.strerror}; free some disk, or raise --max-memory"
            ) from error
        self.spilled_bytes += nbytes
        held = OffloadedTensor(path=path, like=tensor)
        weakref.finalize(held, path.unlink, missing_ok=True)
        return held

    def _release(self, nbytes: int) -> None:
        self.used_bytes -= nbytes


IN_MEMORY = HiddenStateStore()
