"""llama.cpp in this process, asked by HTTP as its own server is: what it makes of a GGUF file."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path
from typing import Any

import torch
import xllamacpp


class Host:
    """One file, opened by llama.cpp.

    Args:
        file: a GGUF file.
        letter: id of a token that is a whole character, for :meth:`logprobs`: they come with no others.
        context: tokens.
        threads: that compute.
        sequences: that it can answer at once, each with ``context`` tokens.
    """

    def __init__(
        self, file: Path, *, letter: int = 0, context: int = 256, threads: int = 1, sequences: int = 1
    ) -> None:
        params = xllamacpp.CommonParams()
        params.model.path = str(file)
        params.n_ctx, params.n_parallel, params.warmup = context * sequences, sequences, False
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
        params.n_threads_http = 1
        params.fit_params, params.verbosity = False, 0
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32  # 16 bits otherwise
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self._server, self._letter = xllamacpp.Server(params), letter

    def ask(self, path: str, **request: Any) -> Any:
        """The answer of llama-server's endpoint ``path``."""
        url = f"{self._server.listening_address}/{path}"
        headers = {"Content-Type": "application/json"}
        with urllib.request.urlopen(urllib.request.Request(url, json.dumps(request).encode(), headers)) as answer:
            return json.load(answer)

    def logprobs(self, prompt: list[int], size: int) -> torch.Tensor:
        """Of each of ``size`` tokens after ``prompt``, before the bias that makes the answer a letter."""
        bias = [[self._letter, 1000.0]]
        answer = self.ask("completion", prompt=prompt, n_predict=1, n_probs=size, logit_bias=bias, cache_prompt=False)
        found = torch.full((size,), float("nan"))
        for entry in answer["completion_probabilities"][0]["top_logprobs"]:
            found[entry["id"]] = entry["logprob"]
        return found

    def losses(self, ids: list[int], first: int) -> list[float]:
        """Minus the logarithm of the probability of each of ``ids`` from place ``first`` on, after all before it."""
        found = []
        for place in range(first, len(ids)):
            bias = [[ids[place], 1000.0]]
            answer = self.ask("completion", prompt=ids[:place], n_predict=1, n_probs=1, logit_bias=bias)
            (entry,) = answer["completion_probabilities"]
            assert entry["id"] == ids[place]
            found.append(-entry["logprob"])
        return found

    def greedy(self, prompt: list[int], number: int) -> list[int]:
        """The ``number`` tokens of largest probability, one after the other."""
        answer = self.ask(
            "completion", prompt=prompt, n_predict=number, temperature=0, return_tokens=True, ignore_eos=True
        )
        return list(answer["tokens"])

    def speed(self, prompt: int, number: int) -> dict[str, float]:
        """llama.cpp's timings of ``number`` tokens after ``prompt`` arbitrary ones, none of them known to it."""
        ids = [7 + index % 90 for index in range(prompt)]
        request = {"prompt": ids, "n_predict": number, "temperature": 0, "ignore_eos": True, "cache_prompt": False}
        return dict(self.ask("completion", **request)["timings"])

    def generate(self, prompt: int, number: int, *, sequences: int) -> None:
        """``number`` tokens after each of ``sequences`` prompts, all at once, of so many tokens that it does not know."""
        ids = [[7 + (start + index) % 90 for index in range(prompt)] for start in range(sequences)]
        self.ask("completion", prompt=ids, n_predict=number, temperature=0, ignore_eos=True, cache_prompt=False)

    def tokens(self, text: str) -> list[int]:
        """Of a text, with the special ones in it, and around it where the file says so."""
        return list(self.ask("tokenize", content=text, add_special=True, parse_special=True)["tokens"])
