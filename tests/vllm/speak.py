"""Runs compressed models in vLLM, several in one process, because importing vLLM takes as long as a test.

Reads jobs from standard input, [{"folder": ..., "prompts": [[token, ...], ...], "options": {...}}, ...], and writes one line of
JSON: for each job the greedy tokens of every prompt, or {"error": ...}; with "score" {"tokens": ..., "scores": ...}, where scores
are the log-probabilities of a prompt's own tokens from the second on. A process of its own, because vLLM changes threads and
environment.
"""

import contextlib
import gc
import json
import os
import sys
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

from vllm import LLM, SamplingParams

# Little memory, because others may want some; float32, because in 16 bits two hosts may rightly disagree.
OPTIONS = {"dtype": "float32", "enforce_eager": True, "max_model_len": 256, "gpu_memory_utilization": 0.2, "seed": 0}


def speak(job: dict[str, Any]) -> Any:
    """Tokens of one job, or what stopped it."""
    try:
        return answer(job)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


def answer(job: dict[str, Any]) -> Any:
    """Tokens of one job, and scores where it wants them."""
    options = OPTIONS | {"distributed_executor_backend": "uni"} | job.get("options", {})
    llm = LLM(job["folder"], skip_tokenizer_init=True, **options)
    prompts = [{"prompt_token_ids": tokens} for tokens in job["prompts"]]
    greedy = SamplingParams(temperature=0, max_tokens=job.get("max_tokens", 16), detokenize=False)
    tokens = [list(output.outputs[0].token_ids) for output in llm.generate(prompts, greedy, use_tqdm=False)]
    if not job.get("score"):
        return tokens
    score = SamplingParams(temperature=0, max_tokens=1, detokenize=False, prompt_logprobs=0)
    outputs = llm.generate(prompts, score, use_tqdm=False)
    return {"tokens": tokens, "scores": [own_scores(output) for output in outputs]}


def own_scores(output: Any) -> list[float]:
    """Log-probabilities of a prompt's tokens, the first left out."""
    ids, found = output.prompt_token_ids[1:], output.prompt_logprobs[1:]
    return [float(at[token].logprob) for token, at in zip(ids, found, strict=True)]


if __name__ == "__main__":
    jobs = json.load(sys.stdin)
    answers = []
    with contextlib.redirect_stdout(sys.stderr):
        for one in jobs:
            answers.append(speak(one))
            gc.collect()
    print(json.dumps(answers), flush=True)
    os._exit(0)  # vLLM's threads may outlive it
