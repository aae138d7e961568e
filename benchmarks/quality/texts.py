"""The texts that recipes are calibrated on and judged by, as tokens in .cache/quality, and the model in float32.

    python benchmarks/quality/texts.py          fetches everything and prints what there is

Texts that serve as both are cut in two: the first half is for judging, the second for calibration. None of them is in the
mixture that ships with lorap, which is the calibration named ``default``.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import platform
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lorap.calibration import read_source
from lorap.checkpoint.load import find_model, load_model, load_tokenizer

sys.path.append(str(Path(__file__).resolve().parent.parent))
import assets

DEFAULT = "default"  # the mixture that ships with lorap
TEST, CALIBRATION = "test", "calibration"
# A paragraph of a reference with fewer words is a heading, a signature or an item of a list.
LEAST_WORDS = 12


@dataclass(frozen=True)
class Text:
    """One text.

    Args:
        kind: what people would call it; calibration and test of one kind are "the same domain".
        read: returns the text.
        calibration: it is long enough to be cut in two halves, for judging and for calibration.
        origin: where it comes from, for the record.
    """

    kind: str
    read: Callable[[], str]
    calibration: bool
    origin: str


@dataclass(frozen=True)
class Tokens:
    """A one-dimensional .npy file of token ids, and the sha256 of the ids."""

    path: Path
    sha256: str
    count: int


@dataclass(frozen=True)
class Material:
    """What cells are made from: the dense model, and the tokens of texts by name."""

    model: Path
    model_sha256: str
    tests: dict[str, Tokens]
    calibrations: dict[str, Tokens]


def read_children() -> str:
    """Stories, without the marks between them."""
    return "\n\n".join(story.strip() for story in assets.CHILDREN.read_text("utf-8").split("<|endoftext|>"))


def read_news() -> str:
    """One report a paragraph."""
    return "\n\n".join(line.strip() for line in assets.NEWS.read_text("utf-8").splitlines())


def read_novels() -> str:
    """Passages of many novels, each once."""
    with gzip.open(assets.NOVEL_PASSAGES, "rt", encoding="utf-8") as lines:
        requests = [json.loads(line)["request"] for line in lines]
    return "\n\n".join(dict.fromkeys(request["context"] + request["continuation"] for request in requests))


def read_python_reference() -> str:
    """The prose of the Python language reference, as the interpreter that runs this has it: no code, no grammar."""
    from pydoc_data.topics import topics

    blocks = [block for name in sorted(topics) for block in re.split(r"\n\s*\n", topics[name])]
    return "\n\n".join(dict.fromkeys(filter(None, map(prose, blocks))))


def prose(block: str) -> str:
    """A block of reStructuredText as one line without markup; empty where it is not a paragraph of prose."""
    text = re.sub(r"^[*•] ", "", " ".join(block.split()))
    text = re.sub(r"\*\*?([^*\s][^*]*?)\*\*?", r"\1", text)
    is_prose = len(text.split()) >= LEAST_WORDS and text[0].isupper() and text[-1] in ".:"
    return text if is_prose and not re.search(r"::=|>>>|\.\.\. |\| ", text) else ""


SOURCES = {
    "wiki": Text("encyclopedia", lambda: assets.WIKI.read_text("utf-8"), True, assets.TEXT_WHEEL),
    "web": Text("web pages", lambda: assets.C4.read_text("utf-8"), True, assets.TEXT_WHEEL),
    "news": Text("newswire", read_news, True, assets.NEWS_WHEEL),
    "novels": Text("fiction", read_novels, True, assets.TASK_WHEEL),
    "wells": Text("fiction", lambda: read_source("heldout"), False, "lorap, heldout"),
    "children": Text("children stories", read_children, False, assets.TEXT_WHEEL),
    "python": Text("technical", read_python_reference, True, f"Python {platform.python_version()}, pydoc_data.topics"),
}
CALIBRATIONS = (DEFAULT, *(name for name, text in SOURCES.items() if text.calibration))


def half(name: str, part: str) -> str:
    """The part of a text that is for judging (``test``) or for ``calibration``; cut at the first line end past the middle."""
    source = SOURCES[name]
    text = source.read()
    if not source.calibration:
        if part != TEST:
            raise ValueError(f"{name} is only for judging; calibrate on one of {', '.join(CALIBRATIONS)}")
        return text
    cut = text.index("\n", len(text) // 2)
    return (text[:cut] if part == TEST else text[cut:]).strip()


def tokens(name: str, part: str, tokenizer: Any) -> Tokens:
    """The tokens of one part of a text, made once per text and tokenizer."""
    text = half(name, part)
    made_from = hashlib.sha256((text + tokenizer.backend_tokenizer.to_str()).encode()).hexdigest()[:12]
    path = assets.QUALITY / "tokens" / f"{name}-{part}-{made_from}.npy"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        with partial.open("wb") as file:
            np.save(file, np.array(tokenizer(text, verbose=False)["input_ids"], dtype=np.int64))
        partial.rename(path)
    ids = np.load(path)
    return Tokens(path, hashlib.sha256(ids.tobytes()).hexdigest(), len(ids))


def default_sha256() -> str:
    """Of the texts that ship with lorap."""
    return hashlib.sha256(read_source(DEFAULT).encode()).hexdigest()


def model_folder(model: Path) -> Path:
    """A Hugging Face folder of ``model``: itself, or where it is a GGUF file its float32 copy in the cache, made once."""
    source = find_model(model)
    if not source.gguf_file:
        return Path(model)
    folder = assets.QUALITY / "models" / source.name
    if not folder.exists():
        partial = folder.with_name(folder.name + ".partial")
        load_model(source).save_pretrained(partial)
        load_tokenizer(source).save_pretrained(partial)
        partial.rename(folder)
    return folder


def model_sha256(folder: Path) -> str:
    """Of the files that decide what a model computes and how it reads text."""
    digest = hashlib.sha256()
    files = [*folder.glob("*.safetensors"), folder / "config.json", folder / "tokenizer.json"]
    for path in sorted(path for path in files if path.exists()):
        digest.update(path.name.encode())
        with path.open("rb") as file:
            while block := file.read(2**22):
                digest.update(block)
    return digest.hexdigest()


def gather(model: Path, tests: Iterable[str], calibrations: Iterable[str]) -> Material:
    """Fetch and prepare a model and texts; ``default`` needs no preparation."""
    assets.fetch(assets.FILES | assets.QUALITY_TEXTS)
    folder = model_folder(model)
    tokenizer = load_tokenizer(find_model(folder))
    return Material(
        folder,
        model_sha256(folder),
        {name: tokens(name, TEST, tokenizer) for name in tests},
        {name: tokens(name, CALIBRATION, tokenizer) for name in calibrations if name != DEFAULT},
    )


def main() -> None:
    material = gather(assets.MODEL, SOURCES, CALIBRATIONS)
    for part, found in ((TEST, material.tests), (CALIBRATION, material.calibrations)):
        for name, one in found.items():
            text = SOURCES[name]
            print(f"{name:10} {text.kind:18} {part:12} {one.count:8,} tokens  {one.sha256[:12]}  {text.origin}")


if __name__ == "__main__":
    main()
