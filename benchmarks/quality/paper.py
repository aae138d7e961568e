"""The studies of the LoRAP paper (arXiv 2404.09695) on a model of your choice: the paper's recipe, one choice changed at a time.

    python benchmarks/quality/paper.py                                  SmolLM2-135M, an hour on a core; may be interrupted
    python benchmarks/quality/paper.py --quick                          three studies on little text, in minutes
    python benchmarks/quality/paper.py --studies attention ratio --sparsity 0.5 --out FOLDER
    python benchmarks/quality/paper.py --tasks piqa boolq --limit 100   zero-shot tasks too
    python benchmarks/quality/paper.py --write-docs                     put the tables into docs/paper.md as well
    python benchmarks/quality/paper.py --tables                         no new cells, only tables and picture
    python benchmarks/quality/paper.py --model huggyllama/llama-7b --tokens 1000000 \\
        --texts wikitext2=Salesforce/wikitext:wikitext-2-raw-v1:test ptb=ptb.valid.txt

The last one needs a GPU and the hub. A text is one of those in texts.py, or NAME=SOURCE with any source that `lorap eval --text`
takes. Published perplexities are those on WikiText-2 and PTB of LLaMA-7B: they stand beside ours where the model is that one
and the texts go by the names wikitext2 and ptb. Each cell is one JSON file in OUT/cells and is not made twice; paper.md and
paper.svg in OUT are made from them.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cells as cell_files
import paper_report
from cells import CALIBRATION_WINDOWS, SEQ_LEN, Cell, is_done, specification
from documents import insert
from jobs import Job, finish, run
from matrix import add_common
from paper_report import Results, Study
from records import DENSE, add_dense, read_cells, read_json
from tasks import LIMIT, request
from texts import DEFAULT, SOURCES, Material, Text, assets, gather

from lorap.calibration import read_source
from lorap.evaluation.tasks import TASKS

HERE = Path(__file__).resolve().parent
OUT = HERE.parent / "results" / "paper"
DOCUMENT = HERE.parent.parent / "docs" / "paper.md"

LONG = 2048
STUDIES: Mapping[str, Study] = {
    "attention": Study(
        "Attention: svd, afm or awsvd",
        {"svd": {"attention_method": "svd"}, "afm": {"attention_method": "afm"}, "awsvd": {}},
        chosen="awsvd",
    ),
    "ratio": Study(
        "Parameters of {v, o} for one of {q, k}",
        {"1": {"vo_to_qk_ratio": 1.0}, "2": {"vo_to_qk_ratio": 2.0}, "3": {}, "4": {"vo_to_qk_ratio": 4.0}},
        chosen="3",
    ),
    # At 20 % {v, o} stay dense from 2 on, and what is left goes to {q, k}: one and the same model.
    "ratio-50": Study(
        "The same at a sparsity of 50 %",
        {
            f"{ratio}": {"sparsity": 0.5} | ({} if ratio == 3 else {"vo_to_qk_ratio": float(ratio)})
            for ratio in (1, 2, 3, 4)
        },
        chosen="3",
    ),
    "least": Study(
        "Least important channels kept",
        {
            "0 %": {"least_important_kept": 0.0},
            "0.5 %": {"least_important_kept": 0.005},
            "1 %": {},
            "2 %": {"least_important_kept": 0.02},
        },
        chosen="1 %",
    ),
    "ffn": Study(
        "FFN: pruned or factorized", {"pruned": {}, "factorized": {"mlp_method": "factorize"}}, chosen="pruned"
    ),
    "sparsity": Study("Sparsity", {"20 %": {"sparsity": 0.2}, "30 %": {"sparsity": 0.3}, "50 %": {"sparsity": 0.5}}),
    "calibration": Study(
        "Calibration text", {name: {"calibration": name} for name in ("web", "novels", "wiki", DEFAULT)}
    ),
    "size": Study(
        "Calibration windows",
        {"32": {"num_calibration_samples": 32}, "128": {}, "256": {"num_calibration_samples": 256}},
    ),
    "windows": Study(
        "Tokens per calibration window",
        {"128 x 128": {}, "8 x 2048": {"num_calibration_samples": 8, "calibration_seq_len": LONG}},
        lengths=(SEQ_LEN, LONG),
    ),
}
# The authors' program calibrates on C4, which is what this text is from.
CALIBRATION = "web"
TEXTS, TOKENS = ("wiki", "news"), 4096
QUICK = {
    "studies": ["attention", "ffn", "sparsity"],
    "tokens": 1024,
    "windows": 16,
    "out": assets.QUALITY / "paper-quick",
}

# LLaMA-7B in windows of 128, without tuning; by the labels of STUDIES["sparsity"].
PUBLISHED_MODEL = re.compile(r"(^|/)llama-7b(-hf)?$", re.IGNORECASE)
PUBLISHED = {
    DENSE: {"wikitext2": 12.62, "ptb": 22.14},
    "20 %": {"wikitext2": 15.69, "ptb": 25.86},
    "50 %": {"wikitext2": 56.96, "ptb": 87.71},
}


def study_cells(arguments: argparse.Namespace) -> dict[str, dict[str, Cell]]:
    """The cells of each study by label."""
    usual = {"sparsity": arguments.sparsity, "calibration": CALIBRATION}
    return {name: STUDIES[name].cells(usual, windows=arguments.windows) for name in arguments.studies}


def wanted(arguments: argparse.Namespace) -> dict[str, tuple[Cell, tuple[int, ...]]]:
    """Cells by name, each once, with the window lengths they are judged at; the dense model first."""
    lengths = {name: STUDIES[name].lengths[: 1 if arguments.no_long else None] for name in arguments.studies}
    found = {DENSE: (Cell(recipe=DENSE), max(lengths.values(), key=len))}
    for name, cells in study_cells(arguments).items():
        for cell in cells.values():
            cell.config()  # a bad option is refused before any work
            before = found.get(cell.name, (cell, ()))[1]
            found[cell.name] = cell, max(before, lengths[name], key=len)
    return found


def jobs_for(arguments: argparse.Namespace, material: Material) -> list[Job]:
    """What is not there yet."""
    jobs = []
    for name, (cell, lengths) in wanted(arguments).items():
        given = specification(cell, material, count=arguments.tokens, long_probes=False)
        probes = [one | {"seq_len": length, "main": length == SEQ_LEN} for length in lengths for one in given["probes"]]
        given |= {"probes": probes}
        path = arguments.out / "cells" / f"{name}.json"
        if (arguments.force and name != DENSE) or not is_done(path, given):
            # The other process has to know the texts that this command line brings.
            one = json.dumps(given | {"out": str(path), "given_texts": arguments.texts})
            jobs.append(Job(name, [sys.executable, str(HERE / "paper.py"), "--one", one]))
        if arguments.tasks:
            asked = request(cell, material, limit=arguments.limit, tasks=arguments.tasks) | {"name": name}
            path = arguments.out / "tasks" / f"{name}.json"
            if (read_json(path) or {}).get("key") != asked["key"]:
                one = json.dumps(asked | {"probes": [], "out": str(path)})
                jobs.append(Job(f"{name}, tasks", [sys.executable, str(HERE / "tasks.py"), "--one", one]))
    return jobs


def add_texts(given: Sequence[str]) -> list[str]:
    """Names of texts; those given as NAME=SOURCE are made known under their names."""
    names = []
    for text in given:
        name, equals, source = text.partition("=")
        if equals:
            SOURCES[name] = Text("given", lambda source=source: read_source(source), False, source)
        elif name not in SOURCES:
            raise SystemExit(f"no text {name}; give one of {', '.join(SOURCES)}, or NAME=SOURCE")
        names.append(name)
    return names


def local_model(model: Path) -> Path:
    """The folder of a model, fetched from the hub where it is no local one."""
    if model.exists():
        return model
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(str(model), allow_patterns=["*.safetensors", "*.json", "tokenizer*"]))


def report(arguments: argparse.Namespace, names: Sequence[str]) -> str:
    """paper.md and paper.svg in OUT; returns the text."""
    cells = study_cells(arguments)
    results = Results(
        records={record["name"]: record for record in read_cells(arguments.out / "cells")},
        tasks={record["name"]: record for record in read_cells(arguments.out / "tasks")} if arguments.tasks else {},
        texts=names,
        tokens=arguments.tokens,
        published=PUBLISHED if PUBLISHED_MODEL.search(str(arguments.model)) else {},
    )
    studies = {name: STUDIES[name] for name in arguments.studies}
    text = paper_report.render(studies, cells, results)
    (arguments.out / "paper.md").write_text(f"# The paper's studies on {arguments.model.name}\n\n{text}\n", "utf-8")
    paper_report.draw(studies, cells, results, arguments.out / "paper.svg")
    return text


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=f"{', '.join(QUICK['studies'])}, on little text")
    parser.add_argument("--studies", nargs="+", choices=tuple(STUDIES))
    parser.add_argument("--sparsity", type=float, default=0.2, help="of all studies but that of sparsity")
    parser.add_argument("--texts", nargs="+", default=TEXTS, help=f"names ({', '.join(SOURCES)}) or NAME=SOURCE")
    parser.add_argument("--tokens", type=int, help=f"of each text (default: {TOKENS})")
    parser.add_argument(
        "--windows", type=int, help=f"of {SEQ_LEN} tokens to calibrate on (default: {CALIBRATION_WINDOWS})"
    )
    parser.add_argument("--tasks", nargs="+", choices=tuple(TASKS), default=())
    parser.add_argument("--limit", type=int, default=LIMIT, help="documents of each task")
    parser.add_argument(
        "--tables", action="store_true", help="make no cell: tables and picture from those that are there"
    )
    parser.add_argument("--write-docs", action="store_true", help="put the tables into docs/paper.md too")
    parser.add_argument("--document", type=Path, default=DOCUMENT, help="another document than that")
    add_common(parser)
    arguments = parser.parse_args(argv)
    out = OUT if arguments.model == assets.MODEL else OUT / arguments.model.name
    usual = {"studies": list(STUDIES), "tokens": TOKENS, "windows": CALIBRATION_WINDOWS, "out": out}
    for name, value in (usual | (QUICK if arguments.quick else {})).items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    return arguments


def make_missing(arguments: argparse.Namespace, names: Sequence[str]) -> list[str]:
    """Make what is not there yet; returns the names of those that failed."""
    cells = wanted(arguments)
    if arguments.tasks:
        assets.fetch(assets.TASKS)
    calibrations = {cell.calibration for cell, _ in cells.values()}
    jobs = jobs_for(arguments, gather(local_model(arguments.model), names, calibrations))
    print(f"{len(cells)} models, {len(jobs)} measurements to make", file=sys.stderr)
    try:
        return run(jobs, processes=arguments.processes, threads=arguments.threads)
    finally:  # cells that were ready before the dense one do not know it yet
        add_dense(arguments.out / "cells")


def main() -> list[str]:
    arguments = parse()
    names = add_texts(arguments.texts)
    failed = [] if arguments.tables else make_missing(arguments, names)
    text = report(arguments, names)
    if arguments.write_docs:
        insert(arguments.document, "paper", text)
    print(text)
    return failed


def make_one(argument: str) -> None:
    """The other process: one cell."""
    given: dict[str, Any] = json.loads(argument)
    add_texts(given.pop("given_texts"))
    cell_files.main([json.dumps(given)])


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        make_one(sys.argv[2])
    else:
        finish(main)
