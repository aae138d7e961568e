"""`lorap generate`: in which form a model reads a prompt, and what of a published generation_config.json is obeyed.

Proved here: answers equal those of transformers for what is obeyed and for what is left out; nothing that a generation config
can hold ends in a traceback; BOS stands at the beginning once; a chat template is used where there is one.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import run as command
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast

from lorap.errors import ConfigError
from lorap.evaluation.generation import continue_prompt, use_settings

PROMPT = "The capital of"
TEMPLATE = "{{ bos_token }}[user]{{ messages[0]['content'] }}{% if add_generation_prompt %}[bot]{% endif %}"
BOS = "<bos>"


def run(*arguments: Any, stdin: str | bytes | None = None) -> Any:
    return command("generate", *arguments, "--device", "cpu", stdin=stdin)


def results(*arguments: Any, stdin: str | bytes | None = None) -> list[dict[str, Any]]:
    result = run(*arguments, "--json", stdin=stdin)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)["results"]


def publish(folder: Path, **fields: Any) -> None:
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.fixture
def with_bos(tokenizer) -> PreTrainedTokenizerFast:
    """The tokenizer, with token 0 as BOS before every text, and EOS behind it."""
    from tokenizers import processors

    backend = copy.deepcopy(tokenizer.backend_tokenizer)
    backend.add_special_tokens([BOS])
    ends = [(BOS, backend.token_to_id(BOS)), ("<eos>", 0)]
    backend.post_processor = processors.TemplateProcessing(single=f"{BOS} $A <eos>", special_tokens=ends)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=BOS, eos_token="<eos>", pad_token="<pad>")


@pytest.fixture
def chat_folder(make_model, with_bos, tmp_path) -> Path:
    with_bos.chat_template = TEMPLATE
    make_model("llama-gqa", vocab_size=len(with_bos), bos_token_id=with_bos.bos_token_id).save_pretrained(
        tmp_path / "m"
    )
    with_bos.save_pretrained(tmp_path / "m")
    return tmp_path / "m"


# ----------------------------------------------------------------------------------------------------------------------
# Fields of a published generation_config.json

# Fields, how transformers is asked for the same, and those that are told to be left out.
PUBLISHED: dict[str, tuple[dict[str, Any], dict[str, Any], list[str]]] = {
    "sampling without do_sample": ({"temperature": 0.9, "top_p": 0.6, "top_k": 4}, {}, []),
    "sampling": ({"do_sample": True, "temperature": 0.9}, {}, []),
    "beams": ({"num_beams": 3, "length_penalty": 2.0}, {"num_beams": 3, "length_penalty": 2.0}, []),
    "several sequences": ({"num_beams": 3, "num_return_sequences": 2}, {"num_beams": 3}, []),
    "penalties": ({"no_repeat_ngram_size": 1}, {"no_repeat_ngram_size": 1}, []),
    "suppressed": ({"suppress_tokens": [7, 8, 9]}, {"suppress_tokens": [7, 8, 9]}, []),
    "prompt lookup": ({"prompt_lookup_num_tokens": 3, "num_assistant_tokens": 5}, {}, []),
    "early exit": ({"assistant_early_exit": 1}, {}, []),
    "outputs": ({"return_dict_in_generate": True, "output_scores": True}, {}, []),
    "cache": ({"cache_implementation": "static", "use_cache": False}, {}, []),
    "lengths that contradict": ({"min_length": 500, "max_length": 3}, {"min_length": 12}, []),
    "contrastive": ({"penalty_alpha": 0.6, "top_k": 4}, {}, ["penalty_alpha"]),
    "layers": ({"dola_layers": "low"}, {}, ["dola_layers"]),
    "constraints": ({"force_words_ids": [[5]], "num_beams": 2}, {"num_beams": 2}, ["force_words_ids"]),
    "groups": (
        {"num_beam_groups": 2, "num_beams": 4, "diversity_penalty": 0.5},
        {"num_beams": 4},
        ["num_beam_groups", "diversity_penalty"],
    ),
    "healing": ({"token_healing": True}, {}, ["token_healing"]),
    "nothing asked for": ({"num_beam_groups": 1, "penalty_alpha": 0.0, "token_healing": False}, {}, []),
}


@pytest.mark.parametrize("case", PUBLISHED)
def test_answers_are_those_of_transformers(case, make_model, tokenizer, capsys):
    fields, same, left_out = PUBLISHED[case]
    model = make_model("llama-gqa")
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    expected = model.generate(ids, max_new_tokens=9, do_sample=False, **same)[0, ids.shape[1] :]
    model.generation_config = GenerationConfig(**(model.generation_config.to_dict() | fields))
    assert use_settings(model, name="m", max_new_tokens=9, temperature=0) == left_out
    result = continue_prompt(model, tokenizer, PROMPT, name="m")
    assert result.continuation == tokenizer.decode(expected, skip_special_tokens=True)
    assert (result.new_tokens, result.prompt_tokens) == (len(expected), ids.shape[1])
    assert not capsys.readouterr().out


def test_stop_strings_end_the_answer(make_model, tokenizer):
    model = make_model("llama-gqa")
    use_settings(model, name="m", max_new_tokens=12, temperature=0)
    whole = continue_prompt(model, tokenizer, PROMPT, name="m")
    assert not whole.finished
    new = tokenizer(whole.continuation)["input_ids"]
    stop = tokenizer.decode(new[3:5]).strip()
    model.generation_config.stop_strings = [stop]
    assert use_settings(model, name="m", max_new_tokens=12, temperature=0) == []
    cut = continue_prompt(model, tokenizer, PROMPT, name="m")
    assert cut.finished
    assert cut.new_tokens < whole.new_tokens
    assert whole.continuation.startswith(cut.continuation)
    assert stop in cut.continuation


def test_sampling_takes_the_published_top_k_and_the_seed(make_model, tokenizer):
    model = make_model("llama-gqa")
    model.generation_config.top_k = 1  # so that sampling has no choice
    use_settings(model, name="m", max_new_tokens=9, temperature=0)
    likeliest = continue_prompt(model, tokenizer, PROMPT, name="m").continuation
    model.generation_config.top_k = 1
    use_settings(model, name="m", max_new_tokens=9, temperature=5.0)
    assert continue_prompt(model, tokenizer, PROMPT, name="m", seed=4).continuation == likeliest
    model.generation_config.top_k = 0
    use_settings(model, name="m", max_new_tokens=9, temperature=5.0)
    first, again, other = (continue_prompt(model, tokenizer, PROMPT, name="m", seed=seed) for seed in (4, 4, 5))
    assert first.continuation == again.continuation
    assert len({first.continuation, other.continuation, likeliest}) == 3


def test_what_transformers_refuses_is_one_sentence(model_folder):
    publish(model_folder, sequence_bias=[[[99999], 1.0]], stop_strings=["<|stop|>"])
    result = run(model_folder, "--prompt", PROMPT)
    assert result.exit_code == 2
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("lorap: ")
    assert "generation_config.json" in line
    assert "99999" in line


# ----------------------------------------------------------------------------------------------------------------------
# What the model reads


def test_a_chat_template_is_used_where_there_is_one(chat_folder, with_bos):
    (chat,) = results(chat_folder, "--prompt", PROMPT)
    assert chat["chat"]
    assert chat["model_input"] == f"{BOS}[user]{PROMPT}[bot]"
    ids = with_bos(chat["model_input"], add_special_tokens=False)["input_ids"]
    assert chat["prompt_tokens"] == len(ids)
    assert ids.count(with_bos.bos_token_id) == 1
    model = AutoModelForCausalLM.from_pretrained(chat_folder)
    new = model.generate(torch.tensor([ids]), max_new_tokens=64, do_sample=False)[0, len(ids) :]
    assert chat["continuation"] == with_bos.decode(new, skip_special_tokens=True)
    assert results(chat_folder, "--chat", "--prompt", PROMPT)[0]["model_input"] == chat["model_input"]
    (raw,) = results(chat_folder, "--raw", "--prompt", PROMPT)
    assert (raw["chat"], raw["model_input"]) == (False, PROMPT)
    assert raw["continuation"] != chat["continuation"]
    shown = run(chat_folder, "--prompt", PROMPT).stdout
    assert "--raw" in shown
    assert f"{PROMPT}\n\nanswer:\n{chat['continuation']}\n" in shown


def test_a_base_model_continues(model_folder):
    (result,) = results(model_folder, "--prompt", PROMPT, "--max-new-tokens", 3)
    assert (result["chat"], result["model_input"], result["finished"]) == (False, PROMPT, False)
    refused = run(model_folder, "--chat", "--prompt", PROMPT)
    assert refused.exit_code == 2
    assert "has no chat template; leave out --chat" in refused.stderr


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ({"default": TEMPLATE, "tool_use": "T"}, None),
        ({"rag": "R", "tool_use": "T"}, ["rag, tool_use", "none called default", "--raw"]),
        ("{{ raise_exception('a system message is needed') }}", ["a system message is needed", "--raw"]),
        ("{% if x %}", ["the chat template of m fails", "--raw"]),
    ],
    ids=["several", "no default", "raises", "no program"],
)
def test_templates(template, words, make_model, with_bos):
    model = make_model("llama-gqa", vocab_size=len(with_bos))
    use_settings(model, name="m", max_new_tokens=2, temperature=0)
    with_bos.chat_template = template
    if words is None:
        assert continue_prompt(model, with_bos, PROMPT, name="m").model_input == f"{BOS}[user]{PROMPT}[bot]"
        return
    with pytest.raises(ConfigError) as refused:
        continue_prompt(model, with_bos, PROMPT, name="m")
    for word in words:
        assert word in str(refused.value)
    assert not continue_prompt(model, with_bos, PROMPT, name="m", chat=False).chat


@pytest.mark.parametrize(
    ("prompt", "text"),
    [("", []), (BOS, []), ("x", ["x"]), (f"{BOS}x", ["x"]), ("x<eos>", ["x", "<eos>"])],
    ids=["empty", "bos", "word", "bos before", "eos behind"],
)
def test_bos_stands_once_and_no_eos_behind_the_prompt(prompt, text, make_model, with_bos, monkeypatch):
    model = make_model("llama-gqa", vocab_size=len(with_bos))
    use_settings(model, name="m", max_new_tokens=3, temperature=0)
    seen = []
    generate = model.generate
    monkeypatch.setattr(
        model, "generate", lambda **options: (seen.append(options["input_ids"]), generate(**options))[1]
    )
    continue_prompt(model, with_bos, prompt, name="m")
    (ids,) = seen
    assert ids.tolist() == [[with_bos.bos_token_id, *with_bos.convert_tokens_to_ids(text)]]


def test_an_empty_prompt_of_a_chat_model_begins_from_bos(chat_folder):
    (result,) = results(chat_folder, "--prompt", "", "--max-new-tokens", 3)
    assert (result["chat"], result["prompt_tokens"]) == (False, 1)


def test_an_empty_prompt_without_bos(make_model, tokenizer):
    model = make_model("llama-gqa")
    use_settings(model, name="m", max_new_tokens=3, temperature=0)
    with pytest.raises(ConfigError, match="the prompt is empty, and m has no BOS token to begin from"):
        continue_prompt(model, tokenizer, "", name="m")
    model.config.bos_token_id = 17
    assert continue_prompt(model, tokenizer, "", name="m").prompt_tokens == 1
    model.config.bos_token_id = len(tokenizer)  # no such embedding
    with pytest.raises(ConfigError, match="no BOS token"):
        continue_prompt(model, tokenizer, "", name="m")


def test_prompts_come_through_pipes(model_folder):
    short = ["--max-new-tokens", 2]
    assert [one["prompt"] for one in results(model_folder, *short, stdin="hi there\n")] == ["hi there"]
    both = results(model_folder, "--prompt", "a", "--prompt", "-", *short, stdin="b\r\n\n")
    assert [one["prompt"] for one in both] == ["a", "b\r\n"]
    for stdin, words in ((b"", "nothing to continue; give --prompt"), (b"a\xff", "no UTF-8 text: byte 1 is 0xff")):
        refused = run(model_folder, *short, stdin=stdin)
        assert refused.exit_code == 2
        assert words in refused.stderr


def test_more_than_the_model_was_made_for_is_told(make_model, tokenizer, tmp_path):
    make_model("llama-gqa", max_position_embeddings=8, eos_token_id=None).save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    result = run(tmp_path / "m", "--prompt", "x", "--max-new-tokens", 9)
    assert "10 tokens, but the model is made for 8" in result.stderr
    assert "tokens, but" not in run(tmp_path / "m", "--prompt", "x", "--max-new-tokens", 7).stderr
