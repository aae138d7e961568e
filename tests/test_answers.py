"""Agreement with a model's answers: against a loop without cache or padding, and through the command."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from commands import run
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from lorap.errors import CalibrationError, ConfigError
from lorap.evaluation.answers import Answer, answer_agreement, answer_greedily, read_instructions

VOCAB, END = 61, 7
LENGTHS = (1, 5, 17, 63, 2, 9, 30, 4, 8, 1, 3, 12, 6, 21, 40, 11, 7)  # more than one batch


def llama(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        eos_token_id=END,
        bos_token_id=1,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return llama(0)


@pytest.fixture(scope="module")
def prompts() -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    return [torch.randint(8, VOCAB, (length,), generator=draw) for length in LENGTHS]


@torch.no_grad()
def one_by_one(model: LlamaForCausalLM, prompt: torch.Tensor, steps: int) -> list[int]:
    ids = prompt.tolist()
    for _ in range(steps):
        ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        if ids[-1] == END:
            break
    return ids[len(prompt) :]


def test_answers_are_those_of_a_greedy_loop(model: LlamaForCausalLM, prompts: list[torch.Tensor]) -> None:
    answers = answer_greedily(model, prompts, max_new_tokens=11)
    expected = [one_by_one(model, prompt, 11) for prompt in prompts]
    assert [one.answer.tolist() for one in answers] == expected
    assert any(answer[-1] == END for answer in expected)  # both kinds of ending are seen
    assert any(len(answer) == 11 for answer in expected)
    assert all(torch.equal(one.prompt, prompt) for one, prompt in zip(answers, prompts, strict=True))


def test_a_models_own_settings_change_no_answer(model: LlamaForCausalLM, prompts: list[torch.Tensor]) -> None:
    plain = answer_greedily(model, prompts, max_new_tokens=9)
    own = llama(0)
    own.generation_config.update(do_sample=True, temperature=2.0, repetition_penalty=5.0, max_length=3)
    before = own.generation_config
    found = answer_greedily(own, prompts, max_new_tokens=9)
    assert [one.answer.tolist() for one in found] == [one.answer.tolist() for one in plain]
    assert own.generation_config is before


def test_a_model_agrees_with_itself(model: LlamaForCausalLM, prompts: list[torch.Tensor]) -> None:
    answers = answer_greedily(model, prompts, max_new_tokens=11)
    found = answer_agreement(model, answers)
    assert found.share.mean == 1.0
    assert found.share.error == 0.0
    assert found.whole == found.answers == len(prompts)
    assert found.tokens == sum(len(one.answer) for one in answers)


@torch.no_grad()
def test_share_and_error_equal_a_loop_without_padding(model: LlamaForCausalLM, prompts: list[torch.Tensor]) -> None:
    other = llama(0)
    draw = torch.Generator().manual_seed(2)
    for weight in other.parameters():
        weight += 0.03 * torch.randn(weight.shape, generator=draw)
    answers = answer_greedily(model, prompts, max_new_tokens=11)
    found = answer_agreement(other, answers)
    hits, tokens = [], []
    for one in answers:
        ids = torch.cat([one.prompt, one.answer])[None]
        logits = other(input_ids=ids, use_cache=False).logits[0]
        said = [int(logits[len(one.prompt) - 1 + i].argmax()) for i in range(len(one.answer))]
        hits.append(sum(a == b for a, b in zip(said, one.answer.tolist(), strict=True)))
        tokens.append(len(one.answer))
    share, count = sum(hits) / sum(tokens), len(tokens)
    assert 0.2 < share < 0.95
    assert found.share.mean == pytest.approx(share, abs=1e-12)
    spread = sum((h - share * t) ** 2 for h, t in zip(hits, tokens, strict=True)) / (count - 1)
    assert found.share.error == pytest.approx(math.sqrt(spread / count) / (sum(tokens) / count), rel=1e-9)
    assert found.whole == sum(h == t for h, t in zip(hits, tokens, strict=True))


def test_one_answer_has_no_error(model: LlamaForCausalLM, prompts: list[torch.Tensor]) -> None:
    assert math.isnan(answer_agreement(model, answer_greedily(model, prompts[:1], max_new_tokens=3)).share.error)


def test_predictions_that_are_not_finite_are_refused(prompts: list[torch.Tensor]) -> None:
    broken = llama(0)
    broken.lm_head.weight.data[3] = torch.nan
    with pytest.raises(CalibrationError, match="not finite"):
        answer_agreement(broken, [Answer(prompts[0], torch.tensor([5]))])


def test_a_token_that_the_model_lacks_is_refused(model: LlamaForCausalLM, prompts: list[torch.Tensor]) -> None:
    with pytest.raises(ConfigError, match="hold token 61, but the model that reads them has 61 tokens"):
        answer_agreement(model, [Answer(prompts[0], torch.tensor([60])), Answer(prompts[1], torch.tensor([5, VOCAB]))])


@pytest.mark.parametrize("ends", ["x", 1.5, [END, None]])
def test_an_end_that_is_no_token_is_one_sentence(prompts: list[torch.Tensor], ends: object) -> None:
    odd = llama(0)
    odd.generation_config.eos_token_id = ends
    with pytest.raises(ConfigError, match="token ids are whole numbers"):
        answer_greedily(odd, prompts[:1], max_new_tokens=2)


def test_an_answer_may_end_at_once(model: LlamaForCausalLM, prompts: list[torch.Tensor]) -> None:
    mute = llama(0)
    first = answer_greedily(model, prompts[:1], max_new_tokens=1)[0].answer
    mute.generation_config.eos_token_id = first.tolist()
    assert answer_greedily(mute, prompts[:1], max_new_tokens=5)[0].answer.tolist() == first.tolist()
    assert answer_agreement(model, [Answer(prompts[0], first)]).whole == 1


def test_instructions_are_lines_none_twice() -> None:
    every = read_instructions(200)
    assert len(set(every)) == 200
    assert all(line.strip() == line and 10 < len(line) < 100 for line in every)
    with pytest.raises(ConfigError, match="200 instructions"):
        read_instructions(201)


TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}{% if add_generation_prompt %} {% endif %}"


def with_template(folder: Path, out: Path, template: str) -> Path:
    shutil.copytree(folder, out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(out)
    return out


@pytest.fixture
def chat_folder(model_folder: Path, tmp_path: Path) -> Path:
    return with_template(model_folder, tmp_path / "chat", TEMPLATE)


def test_the_command_agrees_with_itself_and_says_so(chat_folder) -> None:
    result = run("eval", chat_folder, "--baseline", chat_folder, "--answers", 3, "--json", "--dtype", "float32")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)["answers"]
    assert found["share"] == 1.0
    assert found["whole"] == found["answers"] == 3
    assert 3 <= found["tokens"] <= 3 * 48


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--answers", 3], "--baseline"),
        (["--answers", 3, "--baseline", "MODEL", "--tasks", "piqa"], "one after the other"),
        (["--answers", 201, "--baseline", "MODEL"], "200 instructions"),
    ],
)
def test_what_cannot_be_answered_is_one_sentence(chat_folder, options, message) -> None:
    result = run("eval", chat_folder, *[chat_folder if one == "MODEL" else one for one in options])
    assert result.exit_code != 0
    assert message in result.output.replace("\n", " ")


def test_a_model_without_a_chat_template_is_refused(model_folder) -> None:
    result = run("eval", model_folder, "--baseline", model_folder, "--answers", 2)
    assert result.exit_code != 0
    assert "no chat template" in result.output.replace("\n", " ")


def test_a_template_that_fails_names_a_way_out_of_this_command(model_folder, tmp_path) -> None:
    broken = with_template(model_folder, tmp_path / "broken", "{{ raise_exception('no system role') }}")
    result = run("eval", broken, "--baseline", broken, "--answers", 2)
    assert result.exit_code == 2
    assert "fails: no system role; --text and --tasks measure it" in result.output.replace("\n", " ")


def test_another_template_is_refused(chat_folder, model_folder, tmp_path) -> None:
    other = with_template(model_folder, tmp_path / "other", "x" + TEMPLATE)
    result = run("eval", other, "--baseline", chat_folder, "--answers", 2)
    assert result.exit_code != 0
    assert "other tokens" in result.output.replace("\n", " ")
