"""A model whose decoder layers, embedding and head are offloaded: they stay in their files and are in memory only while used.

``paged_model`` builds the model on the meta device and gives each such module ``offloaded``: where its tensors lie. Whoever needs
the weights enters :func:`in_memory` (or ``on_device`` of the calibration stream), so that at most one decoder layer is in memory.
It is a way of holding weights: what may be opened at all is decided before (lorap/checkpoint/validate.py).
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from lorap.architectures import Architecture, find_architecture
from lorap.checkpoint.stored_tensors import STORED_DTYPES, StoredTensor
from lorap.checkpoint.validate import CheckedFolder, empty_model, module_name
from lorap.system import free_memory_bytes, release_freed_memory


@dataclass
class OffloadedTensors:
    """Where the tensors of one module lie.

    Args:
        tensors: by the name that the module gives them.
        device: where the module comes into memory, unless it is asked for elsewhere.
        dtypes: there, by the same name, of those that may have another one in the files.
        resident: never leave memory once there, as on a GPU that has room for all.
    """

    tensors: Mapping[str, StoredTensor]
    device: torch.device
    dtypes: Mapping[str, torch.dtype] = field(default_factory=dict)
    resident: bool = False

    def load(self, module: nn.Module, device: torch.device) -> None:
        """Put all tensors into ``module``, on ``device``."""
        for name, stored in self.tensors.items():
            tensor = stored.read()
            put_tensor(module, name, tensor.to(self.dtypes.get(name, tensor.dtype)).to(device))
        for owner, name, buffer in computed_buffers(module):
            owner._buffers[name] = buffer.to(device)

    @property
    def nbytes(self) -> int:
        """What they take in memory."""
        return sum(nbytes_of(stored, self.dtypes.get(name, stored.dtype)) for name, stored in self.tensors.items())

    def prefetch(self) -> None:
        """Let the system read ahead what will be wanted next; returns at once."""
        if not hasattr(os, "posix_fadvise"):
            return
        parts = [part for stored in self.tensors.values() for part in stored.parts]
        for path in {part.path for part in parts}:
            here = [part.info for part in parts if part.path == path]
            with path.open("rb") as file:
                for info in here:
                    os.posix_fadvise(file.fileno(), info.offset, info.nbytes, os.POSIX_FADV_WILLNEED)


def put_tensor(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Replace a parameter or buffer of ``module`` by ``tensor``, in place of whatever it was.

    Args:
        module: a module.
        name: of a parameter or buffer in it, with dots.
        tensor: the new one.
    """
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    if leaf in owner._parameters:
        owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    else:
        owner._buffers[leaf] = tensor


def computed_buffers(module: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    """Buffers that no file holds, such as the scale of an embedding: (the module that owns it, its name there, the buffer)."""
    for owner in module.modules():
        for name in owner._non_persistent_buffers_set:
            if (buffer := owner._buffers[name]) is not None:
                yield owner, name, buffer


def offloaded_tensors(module: nn.Module) -> OffloadedTensors | None:
    """Where a module's tensors lie; None for one that simply is in memory."""
    return getattr(module, "offloaded", None)


def is_in_memory(module: nn.Module) -> bool:
    """Whether every parameter has its numbers."""
    return not any(parameter.is_meta for parameter in module.parameters())


@contextmanager
def in_memory(module: nn.Module, device: torch.device | None = None) -> Iterator[None]:
    """The weights of an offloaded module are there while this is active; a module that is in memory anyway is left alone."""
    offloaded = offloaded_tensors(module)
    if offloaded is None or is_in_memory(module):
        yield
        return
    offloaded.load(module, device or offloaded.device)
    try:
        yield
    finally:
        # What became of the module meanwhile goes as well, and its stored tensors may be others by now.
        now = offloaded_tensors(module)
        if now is not None and not now.resident:
            computed = list(computed_buffers(module))
            module.to("meta")
            for owner, name, buffer in computed:
                owner._buffers[name] = buffer
            release_freed_memory(max((stored.info.numel for stored in offloaded.tensors.values()), default=0))


@contextmanager
def in_memory_throughout(
    model: PreTrainedModel, layers: Sequence[nn.Module], *, limit_bytes: int | None = None
) -> Iterator[None]:
    """An offloaded model can be run as a whole while this is active: in memory where it fits, else each layer loads on
    forward.

    The latter reads the model once for every call, and a warning says so.

    Args:
        model: of transformers, offloaded or not.
        layers: its decoder layers.
        limit_bytes: that may be in memory; None for half of the memory that is free.
    """
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    paged = [unit for unit in (*ends, *layers) if offloaded_tensors(unit) is not None]
    size = sum(unit.offloaded.nbytes for unit in paged)  # type: ignore[union-attr,misc]
    if limit_bytes is None:
        device = paged[0].offloaded.device if paged else torch.device("cpu")  # type: ignore[union-attr]
        limit_bytes = free_memory_bytes(device) // 2
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
                stack.enter_context(_load_on_forward(unit))
        yield


@contextmanager
def _load_on_forward(layer: nn.Module) -> Iterator[None]:
    """Each call of the layer brings its weights in, and lets them go."""
    own = layer.forward

    def load_and_forward(*args: Any, **kwargs: Any) -> Any:
        with in_memory(layer):
            return own(*args, **kwargs)

    layer.forward = load_and_forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        del layer.forward


def paged_model(checked: CheckedFolder, *, dtype: torch.dtype | None, device: torch.device) -> Any | None:
    """The model of a folder with its weights left in the files; None where that cannot be done.

    It cannot where files lack tensors that the model has, or where a class does not tell what is in a buffer that no file holds.

    Args:
        checked: the folder, whatever files its weights are in.
        dtype: of the weights in memory; None for what the config says.
        device: where modules come into memory.

    Raises:
        CheckpointError: a file cannot be read.
        ArchitectureError: the model is of a family that is not known.
    """
    wanted = dtype or getattr(checked.config, "dtype", None) or main_dtype(checked.tensors)
    model = empty_model(checked.config, wanted).eval()
    architecture = find_architecture(model)
    model.config._name_or_path = str(checked.folder)
    if (checked.folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(str(checked.folder))
    if not renew_buffers(model, device):
        return None
    return model if _offload_layers(model, architecture, checked.tensors, device) else None


def _offload_layers(
    model: PreTrainedModel,
    architecture: Architecture,
    files: Mapping[str, StoredTensor],
    device: torch.device,
) -> bool:
    """Offload the layers, the embedding and the head; the rest comes into memory. False where tensors are missing."""
    head = f"{module_name(model, model.get_output_embeddings())}.weight"
    embedding = f"{module_name(model, model.get_input_embeddings())}.weight"
    state = model.state_dict()
    wanted = {name: stored for name, stored in files.items() if name in state}
    if model.config.tie_word_embeddings and embedding in wanted:
        wanted[head] = wanted[embedding]
    if any(name not in wanted for name in state):
        return False
    dtypes = {name: state[name].dtype for name, stored in wanted.items() if stored.dtype.is_floating_point}
    resident = _fits_as_resident(device, OffloadedTensors(wanted, device, dtypes).nbytes)
    units = [f"{architecture.layers}.{index}" for index in range(len(architecture.decoder_layers(model)))]
    for unit in [*units, embedding.removesuffix(".weight"), head.removesuffix(".weight")]:
        prefix = unit + "."
        tensors = {name.removeprefix(prefix): stored for name, stored in wanted.items() if name.startswith(prefix)}
        own = {name: dtypes[prefix + name] for name in tensors if prefix + name in dtypes}
        model.get_submodule(unit).offloaded = OffloadedTensors(tensors, device, own, resident)  # type: ignore[assignment]
    rest = {name: s for name, s in wanted.items() if not any(offloaded_tensors(part) for part in _owners(model, name))}
    OffloadedTensors(rest, device, dtypes).load(model, device)
    return True


def nbytes_of(stored: StoredTensor, dtype: torch.dtype) -> int:
    """What a tensor takes in memory, in ``dtype``."""
    return torch.Size(stored.shape).numel() * dtype.itemsize


def _fits_as_resident(device: torch.device, nbytes: int) -> bool:
    """Whether a GPU has room for the whole model and as much again to work in; a CPU reads a layer again from the page cache."""
    return device.type == "cuda" and nbytes <= torch.cuda.mem_get_info(device)[0] // 2


def _owners(model: nn.Module, name: str) -> Iterator[nn.Module]:
    """The modules on the way to a tensor."""
    parts = name.split(".")[:-1]
    return (model.get_submodule(".".join(parts[:end])) for end in range(1, len(parts) + 1))


def renew_buffers(model: PreTrainedModel, device: torch.device) -> bool:
    """Buffers that no file holds, such as the frequencies of rotary embeddings, are filled as ``from_pretrained`` fills them.

    Returns:
        False where the classes of ``model`` do not tell what is in one of them.
    """
    told = True
    owners = {id(owner): owner for owner, _, buffer in computed_buffers(model) if buffer.is_meta}
    parts = {name: part for name, part in model.named_modules() if isinstance(part, PreTrainedModel)}
    for path, owner in model.named_modules():
        if id(owner) not in owners:
            continue
        own = {name: buffer for name, buffer in owner._buffers.items() if name in owner._non_persistent_buffers_set}
        for name, buffer in own.items():
            if buffer is not None:
                unknown = float("nan") if buffer.is_floating_point() else -1
                owner._buffers[name] = torch.full_like(buffer, unknown, device=device)
        # The innermost model that it is a part of: vision and language are models of their own.
        inner = max((name for name in parts if not name or f"{path}.".startswith(f"{name}.")), key=len)
        with torch.no_grad():
            parts[inner]._init_weights(owner)
        filled = [owner._buffers[name] for name, buffer in own.items() if buffer is not None]
        told &= not any(bool((one != one).any() or (one == -1).all()) for one in filled if one is not None)
    return told


def main_dtype(files: Mapping[str, StoredTensor]) -> torch.dtype:
    """That of the largest tensor: what a model is computed in whose config does not say."""
    largest = max(files.values(), key=lambda stored: stored.info.nbytes)
    return largest.dtype if largest.info.dtype in STORED_DTYPES else torch.float32
