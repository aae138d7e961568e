"""GGUF files with a tiny model, and damage to the numbers, types and names of their headers."""

from __future__ import annotations

import struct
from pathlib import Path

import fuzz_texts
import torch
import transformers
from fuzz_inputs import broken_bytes
from hypothesis import strategies as st

from lorap.checkpoint.gguf.header import read_gguf
from lorap.checkpoint.gguf.writing import write_gguf

# What a size, an offset, a type, a count or a float may be instead.
NUMBERS = st.sampled_from([0, 1, 2, 3, 7, 8, 9, 10, 12, 30, 32, 33, 256, 2**16, 2**31 - 1, 2**31, 2**32 - 1])
NUMBERS |= st.integers(0, 2**32 - 1)
LONG = NUMBERS | st.sampled_from([2**32, 2**61, 2**63 - 1, 2**63, 2**64 - 32, 2**64 - 1])


def make_gguf(path: Path) -> bytes:
    """The bytes of a valid file; its weights have no part in the damage."""
    torch.manual_seed(0)
    tokenizer = fuzz_texts.make_tokenizer()
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=None,
    )
    write_gguf(transformers.LlamaForCausalLM(config), path, tokenizer=tokenizer, name="tiny")
    return path.read_bytes()


def places_in(path: Path, data: bytes) -> list[int]:
    """Where the names of keys and tensors end: types, counts, values, shapes and offsets follow."""
    header = read_gguf(path)
    spelled = [struct.pack("<Q", len(name)) + name.encode() for name in (*header.values, *header.tensors)]
    return [4, 8, 16, *(data.index(name) + len(name) for name in spelled)]


@st.composite
def broken_gguf(draw: st.DrawFn, original: bytes, places: list[int]) -> bytes:
    """Mostly other numbers right behind a name, sometimes a renamed key, broken bytes, or no damage."""
    if not draw(st.integers(0, 5)):
        return draw(broken_bytes(original))
    data = bytearray(original)
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.sampled_from(places)) + draw(st.sampled_from([-1, 0, 0, 4, 4, 8, 12, 20, 24]))
        format, number = draw(st.tuples(st.just("<I"), NUMBERS) | st.tuples(st.just("<Q"), LONG))
        struct.pack_into(format, data, at, number)
    return bytes(data[: draw(st.integers(1, len(data)))] if not draw(st.integers(0, 19)) else data)
