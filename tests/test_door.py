"""One way to open a model: every command accepts or refuses a folder with the same sentence, and stored tensors decide."""

from __future__ import annotations

import ast
import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from commands import run
from families import tiny
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import lorap
from lorap.checkpoint.finite import count_not_finite
from lorap.checkpoint.folders import INDEX, WEIGHTS
from lorap.checkpoint.load import dtype_name, find_model, load_model, load_tokenizer
from lorap.checkpoint.pickled import read_pickled_header
from lorap.checkpoint.stored_tensors import stored_tensors
from lorap.compression.estimate.shapes import ModelShape
from lorap.compression.runs.run import RunOptions, compress_to_folder
from lorap.errors import CheckpointError, ConfigError
from lorap.evaluation.info import describe_model

Q = "model.layers.1.self_attn.q_proj"
INV_FREQ = "model.layers.0.self_attn.rotary_emb.inv_freq"
# Nothing is changed: logits must come out to the bit.
NOTHING = lorap.CompressionConfig.from_recipe(
    "best", sparsity=0.0, correction_steps=0, num_calibration_samples=4, calibration_seq_len=16
)
TOKENS = torch.arange(2, 130) % 300


@pytest.fixture(scope="module")
def dense(make_model: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with a head of its own."""
    folder = tmp_path_factory.mktemp("door") / "dense"
    make_model("llama-gqa", tie_word_embeddings=False).save_pretrained(folder)
    return folder


@pytest.fixture
def copied(dense: Path, tmp_path: Path) -> Path:
    return shutil.copytree(dense, tmp_path / "model")


def edit(folder: Path, file: str = "config.json", **change: Any) -> None:
    path = folder / file
    known = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(known | change))


def store(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any], *, into: str = WEIGHTS) -> None:
    """Change the tensors of a folder, and put them into one file, two with an index, ``pytorch_model.bin``, or two of that."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    (folder / WEIGHTS).unlink()
    write = torch.save if ".bin" in into else lambda some, path: save_file(some, path, metadata={"format": "pt"})
    if not into.endswith(".index.json"):
        write(tensors, folder / into)
        return
    names, suffix = sorted(tensors), ".bin" if ".bin" in into else ".safetensors"
    files = {f"part-{part}{suffix}": names[part::2] for part in (0, 1)}
    for file, some in files.items():
        write({name: tensors[name] for name in some}, folder / file)
    (folder / into).write_text(
        json.dumps({"metadata": {}, "weight_map": {name: file for file, some in files.items() for name in some}})
    )


CONTAINERS = (WEIGHTS, INDEX, "pytorch_model.bin", "pytorch_model.bin.index.json")


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as error:
        find_model(folder)
    return str(error.value)


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(TOKENS[None, :32]).logits


# ----------------------------------------------------------------------------------------------------------------------
# One door


def int8(tensors: dict[str, torch.Tensor], scale: str) -> None:
    for name in [name for name in tensors if "_proj" in name]:
        tensors[name.replace("weight", scale)] = tensors[name].abs().amax(1, keepdim=True) / 127
        tensors[name] = (tensors[name] * 100).round().to(torch.int8)


def quantized(folder: Path, method: str, scale: str) -> None:
    store(folder, lambda tensors: int8(tensors, scale))
    edit(folder, quantization_config={"quant_method": method})


def damaged_pickle(folder: Path) -> None:
    store(folder, len, into="pytorch_model.bin")
    (folder / "pytorch_model.bin").write_bytes(b"PK" + bytes(99))


# What is wrong -> what is done to a good folder, and what every command must name.
BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "code": (lambda f: edit(f, model_type="own", auto_map={"AutoConfig": "own.C"}), "model type own needs code"),
    "fewer": (lambda f: edit(f, num_hidden_layers=1), "num_hidden_layers is 1, but the files hold 2 layers"),
    "adapter file": (lambda f: edit(f, "adapter_config.json", r=4), "holds an adapter (adapter_config.json)"),
    "endless epsilon": (lambda f: edit(f, rms_norm_eps=float("inf")), "rms_norm_eps is inf"),
    "elsewhere": (lambda f: edit(f, transformers_weights="other.safetensors"), "transformers_weights names other files"),
    "left over": (lambda f: edit(f, quantization_config={"quant_method": "gptq", "bits": 4}), "quantized (gptq), but they are"),
    "int8": (lambda f: quantized(f, "compressed-tensors", "weight_scale"), "the model is quantized (compressed-tensors)"),
    "bitsandbytes": (lambda f: quantized(f, "bitsandbytes", "SCB"), "the model is quantized (bitsandbytes)"),
    "int8 without marks": (lambda f: store(f, lambda t: int8(t, "weight_scale")), "is stored as I8; floating point is needed"),
    "bias": (lambda f: store(f, lambda t: t.update({f"{Q}.bias": torch.ones(64)})), f"no place for {Q}.bias"),
    "generation": (lambda f: edit(f, "generation_config.json", num_return_sequences=4), "generation_config.json: "),
    "padding": (lambda f: edit(f, pad_token_id=500), "pad_token_id is 500, but there are 500 embeddings"),
    "index": (lambda f: (store(f, len, into=INDEX), edit(f, INDEX, metadata=None)), "index.json has no metadata"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "is incomplete: it has no model.safetensors"),
    "damaged pickle": (damaged_pickle, "pytorch_model.bin is truncated or corrupt"),
}  # fmt: skip
COMMANDS = {
    "info": ["MODEL"],
    "plan": ["MODEL"],
    "compress": ["MODEL", "OUT"],
    "eval": ["MODEL"],
    "eval --tasks": ["MODEL", "--tasks", "piqa"],
    "generate": ["MODEL", "--prompt", "x"],
    "inspect": ["MODEL", "OUT"],
    "export": ["MODEL", "OUT"],
    "recover": ["MODEL", "OUT"],
    "profile": ["MODEL"],
    "compare": ["GOOD", "MODEL"],
}


# A case of each kind of check in every command always; all of them where there is time.
OFTEN = ("code", "left over", "bias", "damaged pickle")


@pytest.mark.parametrize("cases", [OFTEN, pytest.param(tuple(BAD), marks=pytest.mark.slow)], ids=["often", "all"])
def test_every_command_refuses_a_bad_folder_with_the_same_sentence(
    cases: tuple[str, ...], dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorap.cli.tasks.open_source", lambda *_, **__: None)  # it would ask the hub for questions
    differ = {}
    for case, (damage, message) in BAD.items():
        folder = shutil.copytree(dense, tmp_path / case.replace(" ", "-"))
        damage(folder)
        expected = f"lorap: {refusal(folder)}"
        assert message in expected, case
        if case not in cases:
            continue
        with pytest.raises(CheckpointError) as error:
            lorap.compress(folder, calibration=TOKENS)
        assert f"lorap: {error.value}" == expected
        places = {"MODEL": str(folder), "GOOD": str(dense), "OUT": str(tmp_path / "out")}
        for command, arguments in COMMANDS.items():
            words = [command.split()[0], *(places.get(word, word) for word in arguments)]
            found = run(*words, stdin="y\n")
            if found.exit_code != 2 or found.stderr.strip() != expected:
                differ[case, command] = (found.exit_code, found.output[-500:], found.exception)
    assert not differ
    assert not (tmp_path / "out").exists()


def test_models_are_looked_at_before_questions_are_fetched(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask(*_: Any, **__: Any) -> Any:
        raise AssertionError("the hub was asked first")

    monkeypatch.setattr("lorap.cli.tasks.open_source", ask)
    monkeypatch.setattr("lorap.cli.compare.open_source", ask)
    folder, absent = str(dense), str(tmp_path / "absent")
    for words in (["eval", absent], ["eval", folder, "--baseline", absent], ["compare", folder, absent]):
        found = run(*words, "--tasks", "piqa")
        assert (found.exit_code, found.stderr.strip()) == (2, f"lorap: no model folder {absent}"), words


# The commands that read weights; `compare` opens models in processes of their own (tests/test_comparison.py).
READERS = [name for name in COMMANDS if name not in ("info", "plan", "recover", "compare")]


def test_every_command_refuses_weights_that_are_no_numbers(
    copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorap.cli.tasks.open_source", lambda *_, **__: None)
    store(copied, lambda t: t["model.norm.weight"][2:5].copy_(torch.tensor([torch.nan, torch.inf, -torch.inf])))
    expected = "lorap: model.norm.weight contains 3 values that are NaN or infinite; the checkpoint is damaged"
    places, differ = {"MODEL": str(copied), "OUT": str(tmp_path / "out")}, {}
    for command in READERS:
        words = [command.split()[0], *(places.get(word, word) for word in COMMANDS[command]), "--quiet"]
        words = [word for word in words if word != "--quiet" or command not in ("generate", "profile")]
        found = run(*words)
        if found.exit_code != 2 or found.stderr.strip() != expected:
            differ[command] = (found.exit_code, found.output[-500:], found.exception)
    assert not differ
    assert not (tmp_path / "out").exists()
    with pytest.raises(CheckpointError, match=r"norm\.weight contains 3 values"):
        lorap.compress(AutoModelForCausalLM.from_pretrained(copied), calibration=TOKENS, device="cpu")


def test_numbers_that_do_not_fit_a_dtype_are_refused_in_it(copied: Path, tmp_path: Path) -> None:
    """65,520 is the first number that float16 rounds to infinity; layers that stay in their files are looked at too."""
    store(copied, lambda t: t[f"{Q}.weight"].view(-1)[:3].copy_(torch.tensor([65519.0, 65520.0, 7e4])))
    load_model(find_model(copied), dtype="bfloat16")
    said = rf"{Q}.weight contains 2 values .* too large for float16: try --dtype float32"
    with pytest.raises(CheckpointError, match=said):
        load_model(find_model(copied), dtype="float16")
    with pytest.raises(CheckpointError, match=said):
        compress_to_folder(
            copied, tmp_path / "out", NOTHING, RunOptions(calibration=TOKENS, dtype="float16", progress=False)
        )


def test_what_the_model_does_not_use_may_be_anything(copied: Path, tmp_path: Path) -> None:
    """Masks of old versions hold -inf; every way in passes over them."""
    mask = torch.full((1, 1, 4, 4), -torch.inf)
    store(copied, lambda t: t.update({"model.layers.0.attn.bias": mask}))
    load_model(find_model(copied))
    compress_to_folder(copied, tmp_path / "out", NOTHING, RunOptions(calibration=TOKENS, progress=False))


def test_every_dtype_can_be_asked_for_nan() -> None:
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2):
        for bad in (torch.nan, torch.inf, -torch.inf)[: 1 if dtype == torch.float8_e4m3fn else 3]:  # it has no infinity
            tensor = torch.tensor([1.0, bad, -2.0]).to(dtype)
            assert count_not_finite(tensor) == 1, (dtype, bad)
            assert count_not_finite(tensor[::2]) == 0, dtype
    for tensor in (torch.arange(3), torch.empty(3, device="meta"), torch.empty(0, 5), torch.full((3, 2), 3e38)):
        assert count_not_finite(tensor) == 0


def test_no_other_file_asks_transformers_for_a_model() -> None:
    """Nor does any of them forget to say that code of a checkpoint is never run."""
    allowed = {"checkpoint/validate.py": {"AutoConfig.from_pretrained", "model_class(config).from_config"}}
    allowed["checkpoint/load.py"] = {"model_class(folder.config).from_pretrained", "AutoTokenizer.from_pretrained"}
    root, found = Path(lorap.__file__).parent, {}
    for path in root.rglob("*.py"):
        for call in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute):
                name = ast.unparse(call.func)
                if call.func.attr in ("from_pretrained", "from_config") and name.startswith(("Auto", "model_class")):
                    found.setdefault(str(path.relative_to(root)), set()).add(name)
                    trusts = [word for word in call.keywords if word.arg == "trust_remote_code"]
                    assert [ast.unparse(word.value) for word in trusts] == ["False"], (path, name)
    assert found == allowed


# ----------------------------------------------------------------------------------------------------------------------
# A head of its own


@pytest.mark.parametrize("into", CONTAINERS)
def test_a_stored_head_is_believed(into: str, copied: Path, tmp_path: Path) -> None:
    expected = logits(AutoModelForCausalLM.from_pretrained(copied))
    store(copied, len, into=into)
    edit(copied, tie_word_embeddings=True)
    assert torch.equal(logits(load_model(find_model(copied))), expected)
    assert not ModelShape.read(find_model(copied)).tied
    out = tmp_path / "out"
    compress_to_folder(copied, out, NOTHING, RunOptions(calibration=TOKENS, progress=False))
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(out)), expected)
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
    lorap.export_stock(load_model(find_model(copied)), tmp_path / "stock")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "stock")), expected)
    assert json.loads((tmp_path / "stock/config.json").read_text())["tie_word_embeddings"] is False


def test_a_head_that_is_believed_is_there_in_memory_and_before(copied: Path, tmp_path: Path) -> None:
    """Of a path, and of a model that transformers has opened; the dense losses are those of the right head."""
    options = {"calibration": TOKENS, "config": NOTHING, "evaluation": [TOKENS], "progress": False}
    right, report = lorap.compress(copied, **options)
    expected, loss = logits(right), report.evaluations[0]["before"]["nats"]
    edit(copied, tie_word_embeddings=True)
    for given in (copied, AutoModelForCausalLM.from_pretrained(copied)):
        model, report = lorap.compress(given, **options)
        assert torch.equal(logits(model), expected)
        assert report.evaluations[0]["before"]["nats"] == pytest.approx(loss, rel=1e-6)
        lorap.save(model, tmp_path / type(given).__name__, report=report)
        assert torch.equal(logits(load_model(find_model(tmp_path / type(given).__name__))), expected)


def test_a_compressed_checkpoint_keeps_its_own_head(make_model: Any, compress_small: Any, tmp_path: Path) -> None:
    model, report = compress_small(make_model("llama-gqa", tie_word_embeddings=False))
    lorap.save(model, tmp_path / "small", report=report)
    edit(tmp_path / "small", tie_word_embeddings=True)
    assert torch.equal(logits(load_model(find_model(tmp_path / "small"))), logits(model))


@pytest.mark.parametrize("into", CONTAINERS)
def test_a_head_that_is_stored_twice_stays_tied(into: str, copied: Path, tmp_path: Path) -> None:
    store(copied, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}), into=into)
    edit(copied, tie_word_embeddings=True)
    assert ModelShape.read(find_model(copied)).tied
    compress_to_folder(copied, tmp_path / "out", NOTHING, RunOptions(calibration=TOKENS, progress=False))
    assert "lm_head.weight" not in load_file(tmp_path / "out" / WEIGHTS)
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is True


# ----------------------------------------------------------------------------------------------------------------------
# Tensors that the class has no place for

UNUSED: dict[str, tuple[dict[str, tuple[int, ...]], str]] = {
    "adapter": ({f"{Q}.lora_A.default.weight": (4, 64), f"{Q}.lora_B.default.weight": (64, 4)}, "merge it into the model first"),
    "embedding adapter": ({"model.embed_tokens.lora_embedding_A.default": (4, 500)}, "merge it into the model first"),
    "reward": ({"score.weight": (1, 64)}, "classifier or reward model"),
    "value head": ({"v_head.summary.weight": (1, 64)}, "classifier or reward model"),
    "fp8 scales": ({f"{Q}.weight_scale_inv": (1, 1), f"{Q}.input_scale": (1,)}, "quantized weights"),
    "bitsandbytes": ({f"{Q}.SCB": (64,)}, "quantized weights"),
    "norms": ({"model.layers.1.self_attn.q_norm.weight": (16,)}, "changes the model"),
    "biases": ({f"{Q}.bias": (64,), "model.layers.0.mlp.up_proj.bias": (100,)}, "attention_bias, mlp_bias"),
    "next tokens": ({"model.mtp.0.proj.weight": (64, 64)}, "changes the model"),
}  # fmt: skip


@pytest.mark.parametrize("into", CONTAINERS)
def test_tensors_without_a_place_are_refused(into: str, dense: Path, tmp_path: Path) -> None:
    for case, (shapes, way_out) in UNUSED.items():
        folder = shutil.copytree(dense, tmp_path / case)
        store(folder, lambda t, s=shapes: t.update({name: torch.ones(shape) for name, shape in s.items()}), into=into)
        message = refusal(folder)
        assert f"no place for {min(shapes)}" in message
        assert way_out in message, case
        assert (f"and {len(shapes) - 1} more" in message) == (len(shapes) > 1)


def test_what_is_there_in_place_of_the_head_is_named(copied: Path) -> None:
    store(copied, lambda t: t.update({"score.weight": t.pop("lm_head.weight")[:1].clone()}))
    message = refusal(copied)
    assert "missing, first lm_head.weight; it holds score.weight, which is the head of a classifier" in message


@pytest.mark.parametrize("into", [WEIGHTS, "pytorch_model.bin"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_buffers_that_mean_nothing_pass(dtype: torch.dtype, into: str, copied: Path) -> None:
    harmless = {
        INV_FREQ: (10000.0 ** -(torch.arange(8) / 8)).to(dtype),
        "model.layers.0.attn.bias": torch.ones(1, 1, 9, 9, dtype=torch.bool),
        "model.layers.0.attn.masked_bias": torch.tensor(-1e4),
        "model.embed_positions.position_ids": torch.arange(9),
        f"{Q}.bias": torch.zeros(64),
    }
    expected = logits(AutoModelForCausalLM.from_pretrained(copied))
    store(copied, lambda t: t.update(harmless), into=into)
    for paged in (False, True):
        model = load_model(find_model(copied), paged=paged)
        assert model.state_dict().keys().isdisjoint(harmless)
    assert torch.equal(logits(load_model(find_model(copied))), expected)


def test_frequencies_that_config_does_not_give_are_refused(copied: Path) -> None:
    """A base or a scaling that the config has lost changes every layer; positions that were scaled do not show in them."""
    stretched = 500000.0 ** -(torch.arange(8) / 8)
    store(copied, lambda t: t.update({INV_FREQ: stretched}))
    assert f"{INV_FREQ} has 8 frequencies from 1 to 1.03" in refusal(copied)
    edit(copied, rope_parameters={"rope_type": "default", "rope_theta": 500000.0})
    find_model(copied)
    edit(copied, rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 500000.0})
    find_model(copied)
    edit(copied, rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0})
    assert "it lost rope_theta or rope_scaling" in refusal(copied)


def test_numbers_of_eight_bits_are_refused(copied: Path) -> None:
    """Without scales they mean nothing, and transformers would take them as they are."""
    store(copied, lambda t: t.update({f"{Q}.weight": t[f"{Q}.weight"].to(torch.float8_e4m3fn)}))
    assert f"{Q}.weight is stored as F8_E4M3" in refusal(copied)


# ----------------------------------------------------------------------------------------------------------------------
# Containers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool], ids=str)
def test_a_pickled_tensor_lies_where_its_header_says(dtype: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(0)
    whole = (torch.randn(7, 5) * 10).to(dtype)
    part = whole[2:5]
    nothing = torch.empty(0, 3, dtype=dtype)
    torch.save(
        {"whole": whole, "part": part, "again": whole, "none": whole[:0], "nothing": nothing}, tmp_path / "m.bin"
    )
    found = stored_tensors(tmp_path / "m.bin")
    assert torch.equal(found["whole"].read(), whole)
    assert torch.equal(found["part"].read(), part)
    assert found["again"].info == found["whole"].info
    assert found["none"].shape == (0, 5)
    assert found["nothing"].read().shape == (0, 3)


def test_an_archive_whose_parts_disagree_is_refused(tmp_path: Path) -> None:
    """A flipped bit in the header of one tensor would move the next one; the checksum of a pickle is of all of it."""
    path = tmp_path / "m.bin"
    torch.save({"a": torch.arange(15.0).view(3, 5), "b": torch.ones(7)}, path)
    saved = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        (begin,) = (entry.header_offset for entry in archive.infolist() if entry.filename.endswith("data/0"))
    header = bytearray(saved)
    header[begin + 28 : begin + 30] = b"\0\0"  # how long what pads it is
    listed = bytearray(saved)
    listed[saved.rindex(b"m/data/0") - 46 + 38] |= 0x10  # in the list of entries, the mark of a folder
    for damaged in (bytes(header), bytes(listed), saved.replace(b"cpu", b"cpv", 1)):
        assert damaged != saved
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="truncated or corrupt"):
            read_pickled_header(path)


class Evil:
    def __reduce__(self) -> Any:
        return (print, ("CODE RAN",))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"a": Evil()}, "holds more than tensors, which lorap never unpickles"),
        ([torch.zeros(2)], "it holds a list, not a state dict"),
        ({"state_dict": {"a": torch.zeros(2)}}, "not a tensor"),
        ({"a": torch.zeros(3, 2).t()}, "a is not stored row by row"),
        ({"a\n": torch.zeros(2)}, "a tensor is called"),
        ({"a": torch.zeros(2, dtype=torch.complex64)}, "a has the unknown dtype torch.complex64"),
    ],
    ids=["code", "list", "nested", "columns", "name", "complex"],
)
def test_a_pickle_that_is_no_state_dict_is_refused(content: Any, message: str, tmp_path: Path, capsys: Any) -> None:
    torch.save(content, tmp_path / "m.bin")
    with pytest.raises(CheckpointError) as error:
        read_pickled_header(tmp_path / "m.bin")
    assert message in str(error.value)
    assert "CODE RAN" not in capsys.readouterr().out


def test_a_pickle_of_another_kind_or_cut_short_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.bin"
    torch.save({"a": torch.zeros(300)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match="is no archive"):
        read_pickled_header(path)
    torch.save({"a": torch.zeros(300)}, path)
    path.write_bytes(path.read_bytes()[:-700])
    with pytest.raises(CheckpointError, match="truncated or corrupt"):
        read_pickled_header(path)


def test_safetensors_go_before_pickles(copied: Path) -> None:
    torch.save({"a": Evil()}, copied / "pytorch_model.bin")
    load_model(find_model(copied))


def test_pickled_weights_are_checked_and_watched(copied: Path, tmp_path: Path) -> None:
    """NaN is found before any work; a file that changes in a run is noticed by its hash."""
    store(copied, lambda t: t[f"{Q}.weight"].fill_(float("nan")), into="pytorch_model.bin")
    with pytest.raises(CheckpointError, match=rf"{Q}.weight contains 4,096 values that are NaN"):
        compress_to_folder(copied, tmp_path / "out", NOTHING, RunOptions(calibration=TOKENS, progress=False))


def test_an_index_may_name_what_no_file_holds_but_the_model_needs_its_own(copied: Path) -> None:
    store(copied, len, into=INDEX)
    index = json.loads((copied / INDEX).read_text())
    index["weight_map"][INV_FREQ] = "part-0.safetensors"
    (copied / INDEX).write_text(json.dumps(index))
    load_model(find_model(copied))
    part = load_file(copied / "part-1.safetensors")
    del part["model.layers.0.self_attn.k_proj.weight"]
    save_file(part, copied / "part-1.safetensors")
    assert "1 tensors are missing, first model.layers.0.self_attn.k_proj.weight" in refusal(copied)


def test_code_that_is_not_needed_is_neither_run_nor_named_again(copied: Path, tmp_path: Path) -> None:
    edit(copied, auto_map={"AutoModelForCausalLM": "modeling_own.M"})
    (copied / "modeling_own.py").write_text("raise SystemExit('the code ran')")
    with pytest.warns(RuntimeWarning, match=r"names code of its own \(auto_map\), which lorap never runs"):
        model = load_model(find_model(copied))
    model.save_pretrained(tmp_path / "saved")
    assert "auto_map" not in json.loads((tmp_path / "saved/config.json").read_text())


def test_a_tokenizer_of_the_folders_own_code_is_refused(copied: Path) -> None:
    edit(copied, "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "own.T"]}, tokenizer_class="OwnTokenizer")
    assert "tokenizer_class OwnTokenizer needs code from its own folder" in refusal(copied)
    edit(copied, "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    find_model(copied)


def test_a_name_on_the_hub_is_a_folder_in_its_cache(dense: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for name, into in (("good", WEIGHTS), ("pickled", "pytorch_model.bin"), ("bad", WEIGHTS)):
        repository = tmp_path / f"models--some--{name}"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs/main").write_text("a" * 40)
        store(shutil.copytree(dense, repository / "snapshots" / ("a" * 40)), len, into=into)
    edit(repository / "snapshots" / ("a" * 40), num_hidden_layers=1)
    expected = logits(load_model(find_model(dense)))
    for name in ("good", "pickled"):
        source = find_model(f"some/{name}")
        assert source.name == f"some/{name}"
        assert torch.equal(logits(load_model(source)), expected)
        load_model(source, paged=True)
    with pytest.raises(CheckpointError, match="num_hidden_layers is 1, but the files hold 2 layers"):
        find_model("some/bad")
    with pytest.raises(CheckpointError, match="cannot fetch some/other, which is no local folder either"):
        find_model("some/other")
    assert find_model("some/other", fetch=False).folder is None


def test_a_snapshot_of_the_hub_is_called_by_its_repository(dense: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--some--model--v1/snapshots" / ("a" * 40)
    shutil.copytree(dense, snapshot)
    assert find_model(snapshot).name == "some/model--v1"
    assert describe_model(find_model(snapshot))["model"] == "some/model--v1"
    assert find_model(shutil.copytree(dense, tmp_path / "snapshots/mine")).name == "mine"


@pytest.mark.parametrize(
    ("given", "name"),
    [("bf16", "bfloat16"), ("FP16", "float16"), ("half", "float16"), ("fp32", "float32"), ("auto", "auto")],
)
def test_a_dtype_may_be_spelled_in_many_ways(given: str, name: str, dense: Path) -> None:
    assert dtype_name(given) == name
    if name != "auto":
        assert load_model(find_model(dense), dtype=given).dtype == getattr(torch, name)
        assert ModelShape.read(find_model(dense), dtype=given).dtype == name


@pytest.mark.parametrize("paged", [False, True])
def test_a_dtype_is_of_one_opening_alone(paged: bool, dense: Path) -> None:
    found = find_model(dense)
    dtypes = [load_model(found, dtype=dtype, paged=paged).dtype for dtype in ("bfloat16", "auto")]
    assert dtypes == [torch.bfloat16, torch.float32]


def test_a_dtype_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigError, match="unknown dtype 'int8'; choose from auto, float32, bfloat16, float16"):
        dtype_name("int8")


# ----------------------------------------------------------------------------------------------------------------------
# Tokenizers under other names


def test_a_tokenizer_may_be_two_files(tokenizer: Any, copied: Path) -> None:
    """vocab.json and merges.txt, as the first releases of Qwen2 have them."""
    content = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    (copied / "vocab.json").write_text(json.dumps(content["vocab"]))
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in content["merges"]]
    (copied / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges))
    edit(copied, "tokenizer_config.json", tokenizer_class="GPT2Tokenizer")
    found = load_tokenizer(find_model(copied))
    text = "The cat sat on the mat."
    assert found.convert_ids_to_tokens(found(text, add_special_tokens=False)["input_ids"])
    assert found.decode(found(text, add_special_tokens=False)["input_ids"]) == text


@pytest.mark.parametrize(("first", "packages"), [(b"\n", "sentencepiece protobuf"), (b"IQ== 0", "tiktoken")])
def test_what_a_tokenizer_model_needs_is_named(first: bytes, packages: str, copied: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("lorap.checkpoint.load.find_spec", lambda name: None)
    (copied / "tokenizer.model").write_bytes(first + b"x")
    with pytest.raises(CheckpointError, match=f"tokenizer.model alone.*: pip install {packages}$"):
        load_tokenizer(find_model(copied))


def test_a_tekken_file_is_a_tokenizer(copied: Path, monkeypatch: Any) -> None:
    """One that cannot be read is an error, not a model without a tokenizer."""
    monkeypatch.setattr("lorap.checkpoint.load.find_spec", lambda name: None)
    (copied / "tekken.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"pip install mistral-common|holds no vocabulary"):
        load_tokenizer(find_model(copied))


def test_a_weight_under_an_older_name_is_looked_at_as_well(tmp_path: Path) -> None:
    tiny("qwen2_vl").save_pretrained(tmp_path / "model")  # transformers keeps the names that the family had before
    name = "model.layers.1.self_attn.q_proj.weight"
    store(tmp_path / "model", lambda tensors: tensors[name].view(-1)[7].fill_(float("nan")))
    with pytest.raises(CheckpointError, match=rf"{name} contains 1 values that are NaN"):
        compress_to_folder(
            tmp_path / "model", tmp_path / "out", NOTHING, RunOptions(calibration=TOKENS, progress=False)
        )
