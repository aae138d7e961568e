"""Pipes are read once and kept, what a run depends on is their text, and a missing file is refused before anything is opened."""

from __future__ import annotations

import io
import os
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import run
from drawing import TEXT, draw, write
from transformers import PreTrainedTokenizerFast

import lorap
from lorap import CalibrationError
from lorap.calibration import places, read_source
from lorap.calibration.mixtures import check_sources, parse_source
from lorap.calibration.sources import source_name
from lorap.checkpoint.load import find_model
from lorap.compression.runs.fingerprints import digest, identity_of
from lorap.evaluation.comparison.cells import run_worker


@pytest.fixture(autouse=True)
def no_pipe_was_read(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_spooled", "_copies", "_copies_of_others"):
        monkeypatch.setattr(places, name, {})


def feed(text: str) -> str:
    """The name of a pipe that says a text, as a shell makes it for ``<(command)``."""
    out, into = os.pipe()
    with os.fdopen(into, "wb") as file:
        file.write(text.encode())
    return f"/dev/fd/{out}"


def pipe_into_stdin(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))


def test_a_pipe_is_read_once_and_stays(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    name, plain = feed(TEXT), write(tmp_path / "plain.txt", TEXT)
    check_sources([(name, 2.0)])
    assert digest(name) == digest(plain)
    assert torch.equal(draw(name, tokenizer).input_ids, draw(plain, tokenizer).input_ids)
    assert source_name(name) == "pipe"
    assert digest(name) == digest(plain)


def test_a_named_pipe(tmp_path: Path) -> None:
    path = tmp_path / "fifo"
    os.mkfifo(path)
    writer = threading.Thread(target=path.write_text, args=('{"body": "one"}\n{"body": "two"}\n',))
    writer.start()
    assert read_source(f"{path}:body") == read_source(f"{path}:body") == "one\n\ntwo"
    writer.join()


def test_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe_into_stdin(monkeypatch, '[{"text": "one", "b": "x"}]')
    assert read_source("-") == "one"
    assert read_source("-:b") == "x"
    assert source_name("-") == "-"
    assert parse_source("-=2") == ("-", 2.0)


def test_nothing_is_piped_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(CalibrationError, match="standard input"):
        read_source("-")
    pipe_into_stdin(monkeypatch, "")
    with pytest.raises(CalibrationError, match="- holds no text"):
        read_source("-")


def test_several_processes_cannot_share_a_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(CalibrationError, match="by one process only"):
        check_sources("-")


def test_a_run_knows_its_pipes_by_what_they_said(model_folder: Path, tmp_path: Path) -> None:
    def identity(*texts: str) -> dict[str, Any]:
        return identity_of(find_model(model_folder), {}, [feed(text) for text in texts], [feed(texts[0])])

    assert identity("one", "two") == identity("one", "two")
    assert identity("one", "two") != identity("one", "three")
    assert identity("one", "two") != identity("other", "two")


def test_files_of_one_name_are_two_texts(model_folder: Path, tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        write(tmp_path / name / "rows.txt", name)
    texts = [tmp_path / "a" / "rows.txt", tmp_path / "b" / "rows.txt"]
    before = identity_of(find_model(model_folder), {}, texts, texts)
    write(texts[0], "c")
    after = identity_of(find_model(model_folder), {}, texts, texts)
    assert before["calibration"] != after["calibration"]
    assert before["evaluation"] != after["evaluation"]


def test_a_field_and_the_files_of_a_folder_are_part_of_a_run(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", '{"text": "a", "body": "b"}')
    found = {digest(path), digest(f"{path}:text"), digest(f"{path}:body"), digest(f"{tmp_path}:::body")}
    assert len(found) == 4
    before = digest(tmp_path)
    write(path, '{"text": "c"}')
    assert digest(tmp_path) != before


MISSING = [
    "nope.txt",
    "nope.jsonl",
    "nope.JSONL.gz",
    "nope.parquet:body",
    "./nope",
    "/tmp/nope/deep",
    "a/b/c",
    "~/nope.md",
]


@pytest.mark.parametrize("name", MISSING)
def test_a_missing_file_is_refused_without_a_hub(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setattr("lorap.calibration.hub.check_hub", lambda name: pytest.fail("a hub was asked"))
    for source in (name, [(name, 2.0), "default"]):
        with pytest.raises(CalibrationError) as error:
            check_sources(source)
        assert f"there is no file {name}" in str(error.value)


def test_a_path_is_never_a_name_on_the_hub() -> None:
    with pytest.raises(CalibrationError, match="there is no file wikitext"):
        read_source(Path("wikitext"))


def test_a_hub_that_cannot_be_reached_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets")
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: pytest.fail("datasets retries for long"))
    for find in (check_sources, read_source):
        with pytest.raises(CalibrationError, match=r"owner/name:config is no file or folder here, and no hub"):
            find("owner/name:config")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    (tmp_path / "owner___kept").mkdir()
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path))
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: [{"text": "from the cache"}])
    check_sources("owner/kept:config")
    assert read_source("owner/kept:config") == "from the cache"
    with pytest.raises(CalibrationError, match="HF_HUB_OFFLINE is set"):
        check_sources("owner/name")


@pytest.mark.parametrize(
    "words",
    [
        "compress {model} {out} --calibration nope.txt",
        "compress {model} {out} --eval-text nope.jsonl:body",
        "plan {model} --calibration nope.txt",
        "plan {model} --eval-text nope.txt",
        "eval {model} --text nope.txt",
        "compare {model} {out} --text nope.txt",
        "inspect {model} {out} --calibration nope.txt --no-plots",
        "recover {model} {out} --text nope.txt",
        "recover {model} {out} --eval-text nope.txt",
    ],
)
def test_every_command_looks_for_its_texts_first(words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model is not even there; what is said is what is wrong with the text."""
    pytest.importorskip("peft")
    monkeypatch.chdir(tmp_path)
    result = run(*(word.format(model="no-model.gguf", out="out") for word in words.split()))
    assert result.exit_code == 2
    assert "there is no file nope." in result.stderr
    assert not (tmp_path / "out").exists()


def test_compress_looks_for_its_texts_first(tmp_path: Path) -> None:
    for given in ({"calibration": "nope.txt"}, {"evaluation": ["nope.txt"]}):
        with pytest.raises(CalibrationError, match=r"no file nope\.txt"):
            lorap.compress(tmp_path / "no-model", **given)


def test_eval_reads_a_pipe_and_tells_what(model_folder: Path, tmp_path: Path) -> None:
    lines = "".join(f'{{"text": "{line}"}}\n' for line in TEXT.strip().split("\n"))
    arguments = ["eval", str(model_folder), "--seq-len", "16", "--device", "cpu", "--text"]
    result = run(*arguments, "-", stdin=lines)
    assert result.exit_code == 0, result.stderr
    assert "-: 40 records, field text (JSON lines)" in result.stderr
    assert "records" not in result.stdout
    plain = run(*arguments, write(tmp_path / "a.txt", "\n\n".join(TEXT.strip().split("\n"))))
    assert result.stdout.split(",")[:3] == plain.stdout.replace("a.txt", "-").split(",")[:3]
    quiet = run(*arguments, "-", "--quiet", stdin=lines)
    assert "records" not in quiet.stderr


def test_workers_of_compare_read_the_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    name = feed("said once")
    read_source(name)
    seen: list[str] = []
    monkeypatch.setattr(
        "subprocess.run", lambda command, **_: seen.extend(command) or type("Done", (), {"returncode": 0})
    )
    run_worker({})
    import json

    monkeypatch.setattr(places, "_spooled", {})
    os.close(int(name.rpartition("/")[2]))
    places.use_copies(json.loads(seen[-1])["pipes"])
    assert read_source(name) == "said once"
    assert source_name(name) == "pipe"


def test_every_suffix_that_says_what_a_file_holds_means_a_file():
    """Else a file that is missing would be looked for on the hub."""
    for suffix in (".npy", ".feather", ".rss", ".cfg", ".rtf", ".tgz"):
        with pytest.raises(CalibrationError, match=f"no file missing{suffix}"):
            places.located(f"missing{suffix}")
