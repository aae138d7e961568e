"""What the model writes itself: repeatable, as long as asked, half of the default mixture, and never ended."""

import pytest
import torch

import lorap
from lorap.calibration.self_text import BATCH_WINDOWS, sample_windows, start_token
from lorap.calibration.sources import shipped_texts
from lorap.calibration.windows import draw_windows, fold_of
from lorap.errors import CalibrationError


@pytest.fixture(scope="module")
def model(make_model):
    return make_model("llama-gqa")


@pytest.mark.parametrize(("count", "seq_len"), [(0, 5), (1, 1), (3, 17), (BATCH_WINDOWS + 1, 5)])
def test_as_many_tokens_as_asked(model, tokenizer, count, seq_len):
    windows = sample_windows(model, tokenizer, count, seq_len)
    assert windows.shape == (count, seq_len)
    assert windows.dtype == torch.int64
    assert ((windows >= 0) & (windows < len(tokenizer))).all()
    assert not (windows == tokenizer.eos_token_id).any()


def test_the_seed_decides_and_the_global_state_is_left_alone(model, tokenizer):
    torch.manual_seed(7)
    before = torch.get_rng_state()
    first = sample_windows(model, tokenizer, 4, 20, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(8)
    assert torch.equal(sample_windows(model, tokenizer, 4, 20, seed=1), first)
    assert not torch.equal(sample_windows(model, tokenizer, 4, 20, seed=2), first)


def test_samples_follow_the_model(make_model, tokenizer):
    # The end of the document is likeliest and must not be drawn; of the others one word is far ahead.
    model = make_model("llama-gqa", tie_word_embeddings=False)
    end, word = tokenizer.eos_token_id, 123
    model.model.norm.register_forward_hook(lambda _module, _args, output: torch.ones_like(output))
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.weight[end] = 2.0
        model.lm_head.weight[word] = 1.0
    assert (sample_windows(model, tokenizer, 5, 30) == word).all()


def test_a_model_that_overflows_is_told(make_model, tokenizer):
    model = make_model("llama-gqa")
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(CalibrationError, match="not finite"):
        sample_windows(model, tokenizer, 2, 4)


def test_documents_start_as_the_tokenizer_says(model, tokenizer):
    class Vocabulary:
        bos_token, eos_token = "<s>", "</s>"

        def __init__(self, **ids: int) -> None:
            self.ids = {f"<{name}>": number for name, number in ids.items()}
            self.ids["<|endoftext|>"] = self.ids.pop("<endoftext>", None)

        def get_vocab(self) -> dict:
            return {token: number for token, number in self.ids.items() if number is not None}

    assert start_token(model, Vocabulary(s=3, endoftext=5)) == 5
    assert start_token(model, Vocabulary(s=3)) == 3
    assert start_token(model, tokenizer) == tokenizer.eos_token_id
    assert start_token(model, None) == model.config.eos_token_id


@pytest.mark.parametrize(
    ("ids", "start"), [((7, 8), 7), ((None, 8), 8), ((None, [8, 9]), 8), ((None, None), 0), ((0, 8), 0)], ids=str
)
def test_without_a_tokenizer_the_config_says_how_documents_start(make_model, ids, start):
    model = make_model("llama-gqa")
    model.config.bos_token_id, model.config.eos_token_id = ids
    assert start_token(model, None) == start


def test_half_of_the_default_is_written_by_the_model(tokenizer):
    texts = len(shipped_texts())
    asked = []

    def sampler(count: int, seq_len: int, seed: int) -> torch.Tensor:
        asked.append((count, seq_len, seed))
        return torch.full((count, seq_len), 9)

    windows = draw_windows(
        "default", tokenizer, num_samples=4 * texts, seq_len=16, seed=3, vocab_size=len(tokenizer), sampler=sampler
    )
    assert asked == [(2 * texts, 16, 3)]
    assert int((windows.input_ids == 9).all(1).sum()) == 2 * texts
    assert windows.shares[-1].name == "self"
    assert [share.windows for share in windows.shares] == [*[2] * texts, 2 * texts]
    # The folds are equally large, and no source is in both.
    assert int(fold_of(windows).sum()) == 2 * texts
    without = draw_windows("default", tokenizer, num_samples=4 * texts, seq_len=16, seed=3, vocab_size=len(tokenizer))
    assert [share.windows for share in without.shares] == [4] * texts


def test_own_samples_alone_and_among_others(tokenizer):
    def sampler(count: int, seq_len: int, seed: int) -> torch.Tensor:
        return torch.arange(count * seq_len).view(count, seq_len) % 100 + 300

    def draw(sources, samples: int):
        return draw_windows(
            sources, tokenizer, num_samples=samples, seq_len=7, seed=3, vocab_size=len(tokenizer), sampler=sampler
        )

    alone = draw("self", 9)
    assert sorted(alone.input_ids.tolist()) == sorted(sampler(9, 7, 0).tolist())
    assert alone.name == "self"
    assert [(share.name, share.windows) for share in alone.shares] == [("self", 9)]
    assert abs(2 * int(fold_of(alone).sum()) - 9) <= 3  # stretches, so that one half can be judged on the other
    both = draw([("self", 1), (torch.arange(100), 2)], 9)
    assert both.groups.tolist() == [0] * 3 + [1] * 6
    assert both.group_names[0] == "self"
    assert int(both.input_ids[:3].min()) >= 300 > int(both.input_ids[3:].max())
    # Too few windows for everybody: the model writes nothing.
    one = draw([("self", 1), (torch.arange(100), 2)], 1)
    assert [share.windows for share in one.shares] == [0, 1]


def test_own_samples_need_a_model(tokenizer):
    with pytest.raises(CalibrationError, match="self stands for text that a model writes"):
        draw_windows("self", tokenizer, num_samples=2, seq_len=8, seed=0, vocab_size=len(tokenizer))


def test_compress_on_what_the_model_writes(model_folder):
    config = lorap.CompressionConfig(num_calibration_samples=8, calibration_seq_len=16, sparsity=0.5)
    _, report = lorap.compress(str(model_folder), calibration="self", config=config, progress=False)
    assert report.calibration["sources"] == [{"name": "self", "weight": 1.0, "windows": 8}]
    assert report.seconds["sample"] > 0


def test_the_generation_settings_of_a_chat_model_are_not_used(make_model, tokenizer):
    model = make_model("llama-gqa")
    free = sample_windows(model, tokenizer, 3, 25)
    for name, value in {
        "temperature": 0.01,
        "top_k": 1,
        "top_p": 0.1,
        "repetition_penalty": 9.0,
        "num_beams": 3,
    }.items():
        setattr(model.generation_config, name, value)
    assert torch.equal(sample_windows(model, tokenizer, 3, 25), free)
    assert model.generation_config.top_k == 1, "and they are still there"
