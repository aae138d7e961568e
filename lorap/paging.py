"""A model whose decoder layers, embedding and head stay in their files until they are used, and go again afterwards.

``open_paged`` builds the model on the meta device and gives each such module ``pages``: where its tensors lie. Whoever needs the
weights enters :func:`in_memory` (or ``on_device`` of the calibration stream), so that at most one decoder layer is in memory.

Files are read with plain reads into memory of our own. A memory map would be shorter, but a file that is cut off meanwhile kills
the process with a bus error, and its pages count as memory of the process.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from lorap.architectures import Architecture, find_architecture
from lorap.errors import CheckpointError
from lorap.folders import TensorInfo, read_header, weight_files
from lorap.loading import DTYPES, ModelSource
from lorap.resources import available_memory_bytes, release_freed_memory

# safetensors' names for what a model may hold.
STORED_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class Stamp:
    """Size and time of change of a file: another one means that somebody wrote to it."""

    size: int
    mtime_ns: int

    @classmethod
    def of(cls, file: Path | int) -> Stamp:
        found = os.stat(file)
        return cls(found.st_size, found.st_mtime_ns)


@dataclass(frozen=True)
class StoredTensor:
    """One tensor in a file.

    Args:
        path: of the file.
        name: in the file, for messages.
        info: what its header says.
        stamp: of the file when its header was read.
    """

    path: Path
    name: str
    info: TensorInfo
    stamp: Stamp

    @property
    def shape(self) -> tuple[int, ...]:
        return self.info.shape

    @property
    def dtype(self) -> torch.dtype:
        """
        Raises:
            CheckpointError: torch has no such dtype.
        """
        if self.info.dtype not in STORED_DTYPES:
            raise CheckpointError(f"{self.path}: {self.name} is stored as {self.info.dtype}, which lorap cannot read")
        return STORED_DTYPES[self.info.dtype]

    def read(self) -> Tensor:
        """The tensor, in memory of its own.

        Raises:
            CheckpointError: the file was changed, is shorter than it was, or cannot be read.
        """
        data = torch.empty(self.info.nbytes, dtype=torch.uint8)
        for start, piece in read_pieces(self):
            data[start : start + len(piece)] = piece
        return data.view(self.dtype).view(self.shape)


def read_pieces(stored: StoredTensor, *, size: int = 2**26) -> Iterator[tuple[int, Tensor]]:
    """(offset within the tensor, uint8 bytes) of one tensor, piece by piece; errors as :meth:`StoredTensor.read`."""
    try:
        with stored.path.open("rb", buffering=0) as file:
            if Stamp.of(file.fileno()) != stored.stamp:
                raise CheckpointError(f"{stored.path} was changed while it was in use; bring it back, or start again")
            for start in range(0, stored.info.nbytes, size):
                piece = torch.empty(min(size, stored.info.nbytes - start), dtype=torch.uint8)
                if read_into(file.fileno(), piece.numpy().data, stored.info.offset + start) < len(piece):
                    raise CheckpointError(
                        f"{stored.path} ends within {stored.name}: it was cut off while it was in use; copy it again"
                    )
                yield start, piece
    except OSError as error:
        raise CheckpointError(f"cannot read {stored.name} from {stored.path}: {error.strerror}") from error


def read_into(file: int, view: memoryview, offset: int) -> int:
    """Fill ``view`` from a file: how many bytes there were. A single read may return less than was asked for."""
    done = 0
    while done < len(view) and (got := os.preadv(file, [view[done:]], offset + done)):
        done += got
    return done


def stored_tensors(path: Path) -> dict[str, StoredTensor]:
    """Every tensor of one safetensors file, by name."""
    stamp = Stamp.of(path)
    return {name: StoredTensor(path, name, info, stamp) for name, info in read_header(path).items()}


@dataclass
class Pages:
    """Where the tensors of one module lie.

    Args:
        tensors: by the name that the module gives them.
        device: where the module comes into memory, unless it is asked for elsewhere.
        dtype: of its floating-point parameters there; None for the files' own.
        stay: never leave memory once there, as on a GPU that has room for all.
    """

    tensors: Mapping[str, StoredTensor]
    device: torch.device
    dtype: torch.dtype | None = None
    stay: bool = False

    def load(self, module: nn.Module, device: torch.device) -> None:
        """Put all tensors into ``module``, on ``device``."""
        for name, stored in self.tensors.items():
            tensor = stored.read()
            if self.dtype is not None and tensor.is_floating_point():
                tensor = tensor.to(self.dtype)
            put_tensor(module, name, tensor.to(device))

    def prefetch(self) -> None:
        """Let the system read ahead what will be wanted next; returns at once."""
        if not hasattr(os, "posix_fadvise"):
            return
        for path in {stored.path for stored in self.tensors.values()}:
            here = [stored.info for stored in self.tensors.values() if stored.path == path]
            with path.open("rb") as file:
                for info in here:
                    os.posix_fadvise(file.fileno(), info.offset, info.nbytes, os.POSIX_FADV_WILLNEED)


def put_tensor(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Replace a parameter or buffer of ``module`` by ``tensor``, in place of whatever it was."""
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    if leaf in owner._parameters:
        owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    else:
        owner._buffers[leaf] = tensor


def pages_of(module: nn.Module) -> Pages | None:
    """Where a module's tensors lie; None for one that simply is in memory."""
    return getattr(module, "pages", None)


def is_in_memory(module: nn.Module) -> bool:
    return not any(parameter.is_meta for parameter in module.parameters())


@contextmanager
def in_memory(module: nn.Module, device: torch.device | None = None) -> Iterator[None]:
    """The weights of a paged module are there while this is active; a module that is in memory anyway is left alone."""
    pages = pages_of(module)
    if pages is None or is_in_memory(module):
        yield
        return
    pages.load(module, device or pages.device)
    try:
        yield
    finally:
        # What became of the module meanwhile goes as well, and pages may be others by now.
        now = pages_of(module)
        if now is not None and not now.stay:
            module.to("meta")
            release_freed_memory(max((stored.info.numel for stored in pages.tensors.values()), default=0))


@contextmanager
def in_memory_throughout(model: Any, layers: Sequence[nn.Module], *, limit_bytes: int | None = None) -> Iterator[None]:
    """A paged model can be run as a whole while this is active: it is in memory where it fits; else each layer comes and goes.

    The latter reads the model once for every call, and a warning says so. ``limit_bytes`` is what may be held; by default half
    of the memory that is free.
    """
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    paged = [unit for unit in (*ends, *layers) if pages_of(unit) is not None]
    size = sum(stored.info.nbytes for unit in paged for stored in unit.pages.tensors.values())  # type: ignore[union-attr]
    if limit_bytes is None:
        on_gpu = bool(paged) and paged[0].pages.device.type == "cuda"  # type: ignore[union-attr]
        free = torch.cuda.mem_get_info(paged[0].pages.device)[0] if on_gpu else available_memory_bytes()  # type: ignore[union-attr]
        limit_bytes = free // 2
    fits = size <= limit_bytes
    if not fits:
        warnings.warn(
            f"the model holds {size / 1e9:.1f} GB and half of the free memory is {limit_bytes / 1e9:.1f}, so every token that it "
            "writes for `self` reads all weights from the disk; texts of your own do without: --calibration FILE",
            RuntimeWarning,
            stacklevel=3,
        )
    with ExitStack() as stack:
        for unit in paged:
            if fits or unit not in layers:
                stack.enter_context(in_memory(unit))
            else:
                stack.enter_context(_comes_and_goes(unit))
        yield


@contextmanager
def _comes_and_goes(layer: nn.Module) -> Iterator[None]:
    """Each call of the layer brings its weights in, and lets them go."""
    own = layer.forward

    def paged_forward(*args: Any, **kwargs: Any) -> Any:
        with in_memory(layer):
            return own(*args, **kwargs)

    layer.forward = paged_forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        del layer.forward


def open_paged(source: ModelSource, *, dtype: str, device: torch.device) -> Any | None:
    """The model of a folder with its weights left in the files; None where the files name tensors otherwise than the model.

    Args:
        source: a folder with safetensors.
        dtype: ``auto`` for what the config says, or float32, bfloat16 or float16.
        device: where modules come into memory.

    Raises:
        CheckpointError: the folder cannot be read.
        ArchitectureError: the model is of a family that is not known.
    """
    assert source.folder is not None
    files: dict[str, StoredTensor] = {}
    for path in weight_files(source.folder):
        files |= stored_tensors(path)
    try:
        config = AutoConfig.from_pretrained(source.location)
        own = getattr(config, "dtype", None) or _main_dtype(files)
        wanted = own if dtype == "auto" else DTYPES[dtype]
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=wanted).eval()
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        raise CheckpointError(f"cannot open {source.name}: {error}") from error
    architecture = find_architecture(model)
    model.config._name_or_path = source.location
    if (source.folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(source.location)
    _renew_buffers(model, device)
    if not _give_pages(model, architecture, files, wanted, device):
        return None
    return model


def _give_pages(
    model: Any, architecture: Architecture, files: Mapping[str, StoredTensor], dtype: torch.dtype, device: torch.device
) -> bool:
    """Pages for the layers, the embedding and the head; what else there is comes into memory. False where tensors are missing."""
    head = f"{_name_of(model, model.get_output_embeddings())}.weight"
    embedding = f"{_name_of(model, model.get_input_embeddings())}.weight"
    wanted = {name: stored for name, stored in files.items() if name in model.state_dict()}
    if model.config.tie_word_embeddings and embedding in wanted:
        wanted[head] = wanted[embedding]
    for name, tensor in model.state_dict().items():
        if name not in wanted or wanted[name].info.shape != tuple(tensor.shape):
            return False
    stay = _fits_for_good(device, sum(nbytes_of(stored, dtype) for stored in wanted.values()))
    units = [f"{architecture.layers}.{index}" for index in range(len(architecture.decoder_layers(model)))]
    for unit in [*units, embedding.removesuffix(".weight"), head.removesuffix(".weight")]:
        prefix = unit + "."
        tensors = {name.removeprefix(prefix): stored for name, stored in wanted.items() if name.startswith(prefix)}
        model.get_submodule(unit).pages = Pages(tensors, device, dtype, stay)
    rest = {name: s for name, s in wanted.items() if not any(pages_of(part) for part in _owners(model, name))}
    Pages(rest, device, dtype).load(model, device)
    return True


def nbytes_of(stored: StoredTensor, dtype: torch.dtype) -> int:
    """What a tensor takes in memory, in ``dtype``."""
    return torch.Size(stored.shape).numel() * dtype.itemsize


def _fits_for_good(device: torch.device, nbytes: int) -> bool:
    """Whether a GPU has room for the whole model and as much again to work in; a CPU reads a layer again from the page cache."""
    return device.type == "cuda" and nbytes <= torch.cuda.mem_get_info(device)[0] // 2


def _owners(model: nn.Module, name: str) -> Iterator[nn.Module]:
    """The modules on the way to a tensor."""
    parts = name.split(".")[:-1]
    return (model.get_submodule(".".join(parts[:end])) for end in range(1, len(parts) + 1))


def _renew_buffers(model: nn.Module, device: torch.device) -> None:
    """Buffers that no file holds, such as the frequencies of rotary embeddings, are computed by their module's constructor."""
    for name, module in list(model.named_modules()):
        if any(buffer.is_meta for buffer in module._buffers.values() if buffer is not None):
            model.set_submodule(name, type(module)(config=model.config).to(device))  # type: ignore[call-arg]


def _name_of(model: nn.Module, wanted: nn.Module) -> str:
    return next(name for name, module in model.named_modules() if module is wanted)


def _main_dtype(files: Mapping[str, StoredTensor]) -> torch.dtype:
    largest = max(files.values(), key=lambda stored: stored.info.nbytes)
    return STORED_DTYPES.get(largest.info.dtype, torch.float32)
