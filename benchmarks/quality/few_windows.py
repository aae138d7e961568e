"""What recipes make of few calibration windows: `lorap`, `best` before its correction steps, and `best`.

    python benchmarks/quality/few_windows.py --windows 1 4 16 --sources web chats     makes the cells that are missing
    python benchmarks/quality/few_windows.py --tables-only                            writes the table into docs/recipes.md

A cell is one source, number of windows and sparsity, a JSON file in benchmarks/results/quality/few_windows; what is there is
not made again. Both columns of `best` are of one run. Windows have 128 tokens. Nothing is fetched but what `assets.py` gets.
"""

from __future__ import annotations

import argparse
import copy
import itertools
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from cells import SEQ_LEN
from documents import insert, markdown
from records import code_sha256, read_json, write_json
from texts import CALIBRATION, TEST, assets, half

import lorap
from lorap.calibration import TokenWindows, read_source
from lorap.calibration.context import DecoderContext
from lorap.checkpoint.load import find_model, load_model, load_tokenizer
from lorap.compression.pipeline import Run
from lorap.evaluation.perplexity import evaluate
from lorap.system import Stopwatch

SOURCES = ("web", "wiki", "chats", "python")
# Judged on two texts of other sources.
TESTS = {source: ("wells", "web" if source == "wiki" else "wiki") for source in SOURCES}
RECIPES = ("lorap", "uncorrected", "best")
# More characters than the largest cell reads.
CHARACTERS = 200_000
CHAT_TEXTS = ("articles", "guides", "textbook", "technical", "news", "stories")
REQUESTS = ("Tell me about this: {}", "Please write on: {}", "What happened? {}", "Explain: {}", "Go on: {}")
OUT = assets.CACHE.parent / "benchmarks" / "results" / "quality" / "few_windows"
RECIPES_PAGE = assets.CACHE.parent / "docs" / "recipes.md"


class Watched(Run):
    """Notes the losses of the model before its correction steps."""

    uncorrected: list[dict[str, Any]]
    tests: Sequence[TokenWindows]

    def _correct(self, *args: Any) -> Any:
        self.uncorrected = losses(self.context.model, self.tests)
        return super()._correct(*args)


def losses(model: Any, tests: Sequence[TokenWindows]) -> list[dict[str, Any]]:
    return [{"text": test.name, "nats": evaluate(model, test).nats, "tokens": test.tokens} for test in tests]


def chats(tokenizer: Any) -> list[int]:
    """Questions and answers in the model's own chat template, from texts that ship with lorap: first sentences ask."""
    ids: list[int] = []
    for name in CHAT_TEXTS:
        paragraphs = [" ".join(block.split()) for block in read_source(f"default/{name}").split("\n\n")]
        told = [text for text in paragraphs if 40 < len(text.split()) < 160 and ". " in text]
        for text, request in zip(told, itertools.cycle(REQUESTS), strict=False):
            first, rest = text.split(". ", 1)
            turns = [{"role": "user", "content": request.format(f"{first}.")}, {"role": "assistant", "content": rest}]
            ids += tokenizer(tokenizer.apply_chat_template(turns, tokenize=False), add_special_tokens=False)[
                "input_ids"
            ]
    return ids


def tokens_of(name: str, part: str, tokenizer: Any) -> torch.Tensor:
    if name == "chats":
        return torch.tensor(chats(tokenizer))
    return torch.tensor(tokenizer(half(name, part)[:CHARACTERS], verbose=False)["input_ids"])


def test_windows(name: str, count: int, tokenizer: Any) -> TokenWindows:
    ids = tokens_of(name, TEST, tokenizer)[: count * SEQ_LEN]
    return TokenWindows(ids.view(count, SEQ_LEN), name, "")


def make(dense: Any, tokenizer: Any, source: str, windows: int, sparsity: float, test_count: int) -> dict[str, Any]:
    """One cell: every recipe from the same windows."""
    tests = [test_windows(name, test_count, tokenizer) for name in TESTS[source]]
    calibration = tokens_of(source, CALIBRATION, tokenizer)
    record: dict[str, Any] = {"source": source, "windows": windows, "sparsity": sparsity, "code_sha256": code_sha256()}
    record["losses"] = {"dense": losses(dense, tests)}
    for recipe in ("lorap", "best"):
        options = {"num_calibration_samples": windows, "calibration_seq_len": SEQ_LEN, "sparsity": sparsity}
        config = lorap.CompressionConfig.from_recipe(recipe, **options)
        model = copy.deepcopy(dense)
        context = DecoderContext.of(model, device=torch.device("cpu"))
        run = Watched(context, "model", tokenizer, config, Stopwatch())
        run.tests = tests
        report = run.compress(calibration, ())
        record["losses"][recipe] = losses(model, tests)
        record.setdefault("seconds", {})[recipe] = sum(report.seconds.values())
        if report.correction:
            record["losses"]["uncorrected"] = run.uncorrected
            record["correction"] = asdict(report.correction)
    return record


def few_windows_table(cells: Sequence[dict[str, Any]]) -> str:
    """Increase over the dense model in nats per token, on each of the two texts."""
    rows = []
    for cell in sorted(cells, key=lambda cell: (cell["sparsity"], SOURCES.index(cell["source"]), cell["windows"])):
        dense = [entry["nats"] for entry in cell["losses"]["dense"]]
        found = [
            " / ".join(f"{entry['nats'] - base:+.3f}" for entry, base in zip(cell["losses"][name], dense, strict=True))
            for name in RECIPES
        ]
        correction = cell["correction"]
        steps = f"{correction['taken']} of {correction['asked']}"
        way = f"{correction['fraction']:.0%}"
        rows.append([cell["source"], f"{cell['sparsity']:g}", str(cell["windows"]), *found, steps, way])
    return markdown(
        [
            "calibrated on",
            "sparsity",
            "windows",
            "`lorap`",
            "`best` before its steps",
            "`best`",
            "steps",
            "of their way",
        ],
        rows,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sources", nargs="+", choices=SOURCES, default=SOURCES)
    parser.add_argument("--windows", nargs="+", type=int, default=(1, 4, 8, 16, 32, 64))
    parser.add_argument("--sparsities", nargs="+", type=float, default=(0.3,))
    parser.add_argument("--test-windows", type=int, default=32, help="of each text")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--tables-only", action="store_true", help="make no cells")
    arguments = parser.parse_args()
    grid = itertools.product(arguments.sparsities, arguments.sources, arguments.windows)
    missing = [
        (source, windows, sparsity, path)
        for sparsity, source, windows in grid
        if not (path := arguments.out / f"{source}-{windows}-{sparsity:g}.json").exists()
    ]
    if missing and not arguments.tables_only:
        assets.fetch(assets.FILES)
        found = find_model(assets.MODEL)
        tokenizer, dense = load_tokenizer(found), load_model(found, dtype="float32").eval()
        for source, windows, sparsity, path in missing:
            write_json(path, make(dense, tokenizer, source, windows, sparsity, arguments.test_windows))
            print(path.name)
    cells = [record for path in arguments.out.glob("*.json") if (record := read_json(path))]
    if cells:
        insert(RECIPES_PAGE, "few windows", few_windows_table(cells))


if __name__ == "__main__":
    main()
