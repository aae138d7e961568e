"""The paper's seven zero-shot tasks, for the dense model and for recipes calibrated on the default mixture.

    python benchmarks/quality/tasks.py                                     all recipes at 0.2 and 0.5, 200 documents a task
    python benchmarks/quality/tasks.py --recipes dense lorap --limit 50
    python benchmarks/quality/tasks.py --model FOLDER --recipes dense      any folder, compressed ones too
    python benchmarks/quality/tasks.py --against dense flap-0.5-default    differences from other results

One JSON file per model in OUT/tasks; those that are there already are not made again. Prompts are the ones of the packaged
requests, so compare these numbers with each other, not with published ones.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cells import Cell, make_model, specification
from documents import markdown
from jobs import Job, finish, run
from matrix import OUT, SPARSITIES, WANTED, add_common, parse_recipe
from records import DENSE, code_sha256, read_cells, read_json, write_json
from texts import assets, gather

import lorap  # noqa: F401 - teaches transformers to open compressed folders
from lorap.checkpoint.load import find_model, load_tokenizer
from lorap.config import RECIPES
from lorap.evaluation.tasks import TASKS, Estimate, open_source
from lorap.evaluation.tasks.results import average, estimate, paired

# Names of lorap's metrics in the result files, which are older.
RECORDED = {"acc": "acc", "acc_norm": "acc_per_char"}
LIMIT = 200
# The model before compression, and the paper's recipe.
AGAINST = (DENSE, "lorap-0.2-default", "lorap-0.5-default")
TASK_FILES = assets.QUALITY / "tasks"


def request(cell: Cell, material: Any, *, limit: int, tasks: Sequence[str]) -> dict[str, Any]:
    """What a process needs to score one model, and its key."""
    given = specification(cell, material)
    about = {"limit": limit, "tasks": {task: assets.TASK_SHA256[task] for task in tasks}}
    key = hashlib.sha256(json.dumps([given["key"], about], sort_keys=True).encode()).hexdigest()
    return given | about | {"key": key}


def score(given: dict[str, Any]) -> dict[str, Any]:
    """Make the model, score it on every task, and say everything about it."""
    model, record = make_model(given)
    tokenizer = load_tokenizer(find_model(given["model"]))
    start = time.perf_counter()
    source = open_source(list(given["tasks"]), data=str(TASK_FILES), limit=given["limit"])
    tasks = {
        task: {
            "documents": result.questions,
            "metric": RECORDED[result.metric],
            **{name: result.accuracy(metric).mean for metric, name in RECORDED.items()},
            "correct": result.to_dict()["correct"],
            "sha256": given["tasks"][task],
        }
        for task, result in source.run(model, tokenizer).items()
    }
    record["seconds"]["tasks"] = round(time.perf_counter() - start, 3)
    about = {"name": given["name"], "cell": given["cell"], "key": given["key"], "limit": given["limit"]}
    return about | record | {"code_sha256": code_sha256(), "tasks": tasks}


def answers(record: dict[str, Any], task: str) -> list[int] | None:
    """1 for each document that was answered right, 0 for the others; None where the task was not run."""
    found = record["tasks"].get(task)
    return None if found is None else [int(right) for right in found["correct"]]


def difference(record: dict[str, Any], other: dict[str, Any], task: str) -> Estimate | None:
    """Accuracy over that of ``other``, and its standard error over the same documents; None where they are not the same."""
    ours, theirs = answers(record, task), answers(other, task)
    if ours is None or theirs is None or len(ours) != len(theirs):
        return None
    if record["tasks"][task]["sha256"] != other["tasks"][task]["sha256"]:
        return None
    return paired([a - b for a, b in zip(ours, theirs, strict=True)]).estimate


def percent(found: Estimate | None, form: str = ".1f") -> str:
    return "-" if found is None else f"{100 * found.mean:{form}} ± {100 * found.error:.1f}"


def render(records: Sequence[dict[str, Any]], against: Sequence[str]) -> str:
    """Accuracies, and below them the differences from each of the results that are named."""
    rows = []
    for record in records:
        found = [None if (right := answers(record, task)) is None else estimate(right) for task in TASKS]
        rows.append([record["name"], *map(percent, found), percent(average_of(found))])
    header = ["model", *TASKS, "average"]
    limits = sorted({record["limit"] for record in records})
    parts = [
        "# Zero-shot tasks",
        "Written by `benchmarks/quality/tasks.py`. Accuracy in percent ± standard error, "
        f"{' or '.join(map(str, limits))} documents a task, evenly spread; the likelier choice, per character for "
        f"{', '.join(name for name, task in TASKS.items() if task.metric == 'acc_norm')}.",
        markdown(header, rows),
    ]
    for other in [record for record in records if record["name"] in against]:
        differences = []
        for record in records:
            if record is not other:
                paired = [difference(record, other, task) for task in TASKS]
                shown = [percent(one, "+.1f") for one in [*paired, average_of(paired)]]
                differences.append([record["name"], *shown])
        if differences:
            parts += [f"Difference from `{other['name']}` on the same documents.", markdown(header, differences)]
    return "\n\n".join(parts) + "\n"


def average_of(found: Sequence[Estimate | None]) -> Estimate | None:
    """None where a task is missing: an average over other tasks is another number."""
    known = [one for one in found if one is not None]
    return average(known) if len(known) == len(found) else None


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    usual = [DENSE, *(name for name in WANTED if name in RECIPES)]
    parser.add_argument("--recipes", nargs="+", default=usual, help=f"or {DENSE}: the model as it is")
    parser.add_argument("--sparsities", nargs="+", type=float, default=SPARSITIES)
    parser.add_argument("--tasks", nargs="+", choices=tuple(TASKS), default=tuple(TASKS))
    parser.add_argument("--limit", type=int, default=LIMIT, help="documents of each task")
    parser.add_argument(
        "--against",
        nargs="+",
        default=AGAINST,
        help=f"results that differences are from (default: {' '.join(AGAINST)})",
    )
    add_common(parser)
    return parser.parse_args(argv)


def main() -> list[str]:
    arguments = parse()
    assets.fetch(assets.TASKS)
    material = gather(arguments.model, (), ())
    folder = (arguments.out or OUT) / "tasks"
    cells = []
    for name, overrides in map(parse_recipe, arguments.recipes):
        sparsities = (0.0,) if name == DENSE else arguments.sparsities
        cells += [Cell(recipe=name, sparsity=sparsity, overrides=overrides) for sparsity in sparsities]
    jobs = []
    for cell in cells:
        given = request(cell, material, limit=arguments.limit, tasks=arguments.tasks)
        given["name"] = cell.name if arguments.model == assets.MODEL else f"{arguments.model.name}-{cell.name}"
        path = folder / f"{given['name']}.json"
        if arguments.force or (read_json(path) or {}).get("key") != given["key"]:
            command = [sys.executable, str(Path(__file__)), "--one", json.dumps(given | {"out": str(path)})]
            jobs.append(Job(given["name"], command))
    print(f"{len(cells)} models, {len(jobs)} to score", file=sys.stderr)
    failed = run(jobs, processes=arguments.processes, threads=arguments.threads)
    text = render(read_cells(folder), arguments.against)
    (folder.parent / "tasks.md").write_text(text, "utf-8")
    print(text)
    return failed


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        one = json.loads(sys.argv[2])
        write_json(Path(one["out"]), score(one))
    else:
        finish(main)
