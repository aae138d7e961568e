"""The same texts in every container give the same tokens; damage is refused; large files are sampled."""

from __future__ import annotations

import bz2
import codecs
import copy
import csv
import gzip
import io
import json
import lzma
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from drawing import VOCAB, refusal, write
from transformers import PreTrainedTokenizerFast

from lorap import CalibrationError
from lorap.calibration import files, pieces, read_source
from lorap.calibration.places import Place
from lorap.calibration.records import read_file
from lorap.calibration.sources import read_tokens
from lorap.calibration.windows import consecutive_windows

TEXTS = ['First, "é"\nand more; naïve crews sang 歌.', "Second\u2028part,\twith tab", "third, 12 boats"] * 5
ROWS = [{"id": number, "text": text} for number, text in enumerate(TEXTS)]
LINES = "\n".join(map(json.dumps, ROWS))
UTF16 = codecs.BOM_UTF16_LE + LINES.encode("utf-16-le")


def table(separator: str) -> bytes:
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, ["id", "text"], delimiter=separator)
    writer.writeheader()
    writer.writerows(ROWS)
    return out.getvalue().encode()


CONTAINERS: dict[str, bytes] = {
    "rows.jsonl": LINES.encode(),
    "rows.JSONL": LINES.encode(),
    "rows.ndjson": LINES.replace("\n", "\r\n\r\n").encode(),
    "lines.json": LINES.encode(),
    "bom.json": codecs.BOM_UTF8 + LINES.encode(),
    "array.json": ("[" + LINES.replace("\n", ",\n") + "]").encode(),
    "comma.json": ("[" + LINES.replace("\n", ",") + ",]\n").encode(),
    "indented.JSON": json.dumps(ROWS, indent=1).encode(),
    "jq.json": "\n".join(json.dumps(row, indent=2) for row in ROWS).encode(),
    "strings.json": json.dumps(TEXTS).encode(),
    "array.jsonl": json.dumps(ROWS).encode(),
    "rows.txt": LINES.encode(),
    "array.txt": json.dumps(ROWS, indent=1).encode(),
    "noname": LINES.encode(),
    "rows.csv": table(","),
    "ROWS.TSV": table("\t"),
    "nameless-table": table(","),
    "rows.jsonl.gz": gzip.compress(LINES.encode()),
    "rows.json.bz2": bz2.compress(json.dumps(ROWS).encode()),
    "rows.csv.xz": lzma.compress(table(",")),
    "gzip-without-a-name": gzip.compress(LINES.encode()),
    "two-members.gz": gzip.compress(LINES[:100].encode()) + gzip.compress(LINES[100:].encode()),
    "utf16.jsonl": UTF16,
    "utf16be.txt": codecs.BOM_UTF16_BE + LINES.encode("utf-16-be"),
    "utf32.csv": codecs.BOM_UTF32_LE + table(",").decode().encode("utf-32-le"),
    "utf16.jsonl.gz": gzip.compress(UTF16),
    "nulls.jsonl": (LINES + '\n{"text": null}\n{"text": " "}\n').encode(),
    "content.jsonl": LINES.replace('"text"', '"content"').encode(),
}


@pytest.fixture(scope="module")
def prose(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same texts as a text file."""
    return write(tmp_path_factory.mktemp("prose") / "rows.txt", "\n\n".join(TEXTS))


def windows_of(source: Path | str, tokenizer: Any) -> torch.Tensor:
    return consecutive_windows(source, tokenizer, seq_len=7, max_tokens=None, vocab_size=VOCAB).input_ids


@pytest.mark.parametrize("name", CONTAINERS)
def test_every_container_gives_the_same_windows(
    name: str, tmp_path: Path, prose: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    path = write(tmp_path / name, CONTAINERS[name])
    assert torch.equal(windows_of(path, tokenizer), windows_of(prose, tokenizer))


@pytest.mark.parametrize("name", ["rows.parquet", "rows.parquet.gz", "nameless", "rows.arrow", "rows.feather"])
def test_arrow_and_parquet(name: str, tmp_path: Path, prose: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import feather, parquet

    rows = arrow.table({"id": list(range(len(TEXTS))), "text": TEXTS})
    path = tmp_path / name
    if name == "rows.arrow":  # what `datasets` writes is a stream
        with arrow.ipc.new_stream(path, rows.schema) as writer:
            writer.write_table(rows, max_chunksize=4)
    elif name == "rows.feather":
        feather.write_feather(rows, str(path), compression="uncompressed")
    else:
        parquet.write_table(rows, path, row_group_size=4)
        if name.endswith("gz"):
            write(path, gzip.compress(path.read_bytes()))
    assert torch.equal(windows_of(path, tokenizer), windows_of(prose, tokenizer))
    assert read_source(f"{path}:text") == "\n\n".join(TEXTS)


def test_chats_in_parquet_and_in_tables(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Arrow gives every message every key; templates would print its nulls."""
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    chatty = copy.deepcopy(tokenizer)
    chatty.chat_template = (
        "{% for m in messages %}{{ m.role }}{{ m.name }}: {{ m.content }}"
        "{% if m.tool_calls is defined %}!{% endif %}\n{% endfor %}"
    )
    chat = [{"role": "user", "name": "Ann", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}]
    parquet.write_table(arrow.table({"messages": [chat, chat[:1]]}), tmp_path / "chats.parquet")
    ids = chatty.apply_chat_template(chat, return_dict=True)["input_ids"]
    ids = ids + chatty.apply_chat_template(chat[:1], return_dict=True)["input_ids"]
    assert read_tokens(tmp_path / "chats.parquet", chatty, vocab_size=VOCAB)[0].tolist() == ids
    quoted = "messages\n" + "\n".join('"' + json.dumps(one).replace('"', '""') + '"' for one in (chat, chat[:1]))
    write(tmp_path / "chats.csv", quoted)
    assert read_tokens(tmp_path / "chats.csv", chatty, vocab_size=VOCAB)[0].tolist() == ids


@pytest.mark.parametrize("splits", [0, 1, 2])
def test_what_save_to_disk_wrote(splits: int, tmp_path: Path, prose: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list([{"text": "x" * 30, "id": 0}, *ROWS]).select(range(1, 1 + len(ROWS)))
    other = datasets.Dataset.from_list([{"text": "another"}])
    saved = [rows, datasets.DatasetDict(only=rows), datasets.DatasetDict(train=rows, test=other)][splits]
    saved.save_to_disk(tmp_path / "saved")
    assert torch.equal(windows_of(tmp_path / "saved", tokenizer), windows_of(prose, tokenizer))
    if splits == 2:
        assert read_source(f"{tmp_path}/saved::test") == "another"
        assert "train, test" in refusal(f"{tmp_path}/saved::dev", tokenizer)


def test_zstd(tmp_path: Path, prose: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reader is the package `zstandard`; whether it is there or not, nothing packed is taken for prose."""
    zstandard = pytest.importorskip("zstandard")
    path = write(tmp_path / "rows.jsonl.zst", zstandard.compress(LINES.encode()))
    assert torch.equal(windows_of(path, tokenizer), windows_of(prose, tokenizer))
    packed = zstandard.compress(LINES[:500].encode()) + zstandard.compress(LINES[500:].encode())
    assert read_source(write(path, packed)) == "\n\n".join(TEXTS)
    assert "ends within a frame" in refusal(write(path, packed[:-9]), tokenizer)
    assert "zstd" in refusal(write(path, packed[:20] + b"\xff" * 20), tokenizer)


@pytest.mark.parametrize("package", ["zstandard", "pyarrow", "datasets"])
def test_a_missing_package_is_named(package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    first = {"zstandard": b"\x28\xb5\x2f\xfd" + b"x" * 20, "pyarrow": b"PAR1\x15" + b"x" * 20}
    if package == "datasets":
        write(tmp_path / "a.jsonl", LINES)
        path = tmp_path
    else:
        path = write(tmp_path / "rows", first[package])
    with pytest.raises(CalibrationError, match=rf"{package}.*pip install"):
        read_source(path)


def test_plain_files_need_no_package(tmp_path: Path, prose: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("datasets", "pyarrow", "zstandard"):
        monkeypatch.setitem(sys.modules, package, None)
    for name, content in CONTAINERS.items():
        assert read_source(write(tmp_path / name, content)) == prose.read_text("utf-8")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("braces.txt", "{curly} things, and\nmore"),
        ("mixed.txt", '{"a": 1}\nis what JSON looks like.'),
        ("list.md", "[1] A reference.\n[2] Another."),
        ("section.txt", "[section]\nname = value"),
        ("commas.txt", "text, content, and more\nthan that"),
        ("gguf.txt", "GGUF is a format. ORC is another, PAR1 begins a third."),
        ("no tags.html", "What a browser showed: 1 < 2."),
        ("README.md", '<h1 align="center">A title</h1>\n\nProse.'),
        ("turns.txt", "<s>One turn</s>"),
        ("list.rst", "<xml> is how it begins."),
        ("front.md", "---\ntitle: a\n---\nProse."),
        ("code.py", '{\n  "key": [1, 2],\n}\nprint(key)'),
    ],
)
def test_prose_that_looks_like_something_else_is_prose(name: str, text: str, tmp_path: Path) -> None:
    assert read_source(write(tmp_path / name, text)) == text


def test_what_was_read_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "lorap")
    read_source(write(tmp_path / "rows.JSONL", LINES))
    read_source(write(tmp_path / "rows.csv.gz", gzip.compress(table(","))))
    read_source(write(tmp_path / "some.json", '[{"a": "x"}, {"a": null}]').as_posix() + ":a")
    read_source(write(tmp_path / "plain.txt", "only text"))
    assert [record.getMessage() for record in caplog.records] == [
        "rows.JSONL: 15 records, field text (JSON lines)",
        "rows.csv.gz: 15 records, field text (CSV, gzip)",
        "some.json:a: 2 records, field a, 1 of them blank (JSON)",
    ]


# Refusals


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.json", b"", ["no text"]),
        ("a.json", b"[]", ["no text", "0 records"]),
        ("a.csv", b"", ["no text"]),
        ("a.csv", b"id,text\n1,\n2,  \n", ["no text", "2 of them blank"]),
        ("a.json", b'[{"text": "a"}, {"text": "b"}', ["record 2", "part is missing"]),
        ("a.json", b'[{"text": "a"}, {"text": "b', ["record 2", "JSON"]),
        ("a.json", b'[{"text": "a"}] x', ["1 records"]),
        ("a.json", b'[{"text": "a"}, {"body": "b"}]', ["record 2", "no text field", "body"]),
        ("a.json", b'[{"text": "a"}, {"text": 5}]', ["record 2", "field text", "number"]),
        ("a.json", b'[{"text": "a"}, "b"]', ["record 2", "a text"]),
        ("a.json", b'["a", {"text": "b"}]', ["record 2"]),
        ("a.json", b'{"version": 1, "data": []}', ["line 1", "version, data", "FILE:FIELD"]),
        ("a.json", b'{"text": ["a", "b"]}', ["field text", "message 1"]),
        ("a.json", b"Some prose.", ["a.json", "record 1 is not JSON"]),
        ("a.json", b"[" * 100_000, ["a.json", "record 1"]),
        ("a.jsonl", b'{"text": "a"}\n{"text": "b"},\n', ["line 2 is not JSON"]),
        ("a.jsonl", b'{"text": "a"}\n' + b'{"a":' * 50_000, ["line 2 is not JSON", "deep"]),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', ["line 2 is not UTF-8"]),
        ("a.jsonl", b'{"text": "a"}\n{"te\0xt": ""}\n', ["line 2", "zero byte"]),
        ("a.csv", b"id,body\n1,a\n", ["record 1", "id, body", "FILE:FIELD"]),
        ("a.csv", b"id,text\n1,a\n2\n", ["record 2", "line 3", "1 values under 2"]),
        ("a.csv", b'id,text\n1,"a\n', ["a.csv", "line"]),
        ("a.csv", b"id,text\n1,\xff\n", ["a.csv", "not UTF-8"]),
        ("a.parquet", b"PAR1\x15" + b"\0" * 50 + b"PAR1", ["a.parquet", "damaged Parquet"]),
        ("a.parquet", b'{"text": "a"}', ["a.parquet", "no Parquet"]),
        ("a.arrow", b"\xff\xff\xff\xff" + b"\x10" * 60, ["a.arrow", "damaged Arrow"]),
        ("a.jsonl.gz", gzip.compress(LINES.encode(), mtime=0)[:-20], ["a.jsonl.gz", "damaged", "gzip"]),
        ("a.jsonl.gz", gzip.compress(LINES.encode(), mtime=0)[:30] + b"\xff" * 30, ["a.jsonl.gz", "gzip"]),
        ("a.txt.bz2", bz2.compress(LINES.encode())[:-9], ["a.txt.bz2", "bzip2"]),
        ("a.txt.xz", lzma.compress(LINES.encode())[:-9], ["a.txt.xz", "xz"]),
        ("a.gz", gzip.compress(gzip.compress(b"a", mtime=0), mtime=0), ["twice"]),
        ("a.tgz", gzip.compress(b"\0" * 257 + b"ustar\0" + b"\0" * 300, mtime=0), ["tar archive"]),
        ("a.txt", b"%PDF-1.7 ...", ["a.txt", "PDF"]),
        ("a.docx", b"PK\x03\x04...", ["a.docx", "zip"]),
        ("a.bin", b"GGUF\x03\0\0\0", ["GGUF"]),
        ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", ["Git LFS", "git lfs pull"]),
        ("a.jsonl", b"<!DOCTYPE html>\n<html>Not found</html>", ["web page"]),
        ("a.txt", b"\n<html><body>Sign in</body></html>", ["web page", "JSONL", "`text`"]),
        ("a.html", b"<div>\n<p>A page.</p></div>", ["web page", "tags"]),
        ("a.xml.gz", gzip.compress(b"<pages><page>x</page></pages>", mtime=0), ["XML"]),
        ("wiki", b"<mediawiki xmlns='x'>\n<page/></mediawiki>", ["XML"]),
        ("a.csv", codecs.BOM_UTF8 + b"<?xml version='1.0'?>\n<a>text, more</a>", ["XML"]),
        ("a.yaml", b"model: x\nsteps: 3\n", ["YAML", "settings", "JSONL"]),
        ("a.YML.bz2", bz2.compress(b"- text: x\n"), ["YML"]),
        ("a.toml", b"[section]\nname = 1\n", ["TOML"]),
        ("a.rtf", b"{\\rtf1\\ansi Text}", ["RTF", "plain text"]),
        ("a.txt", "no mark".encode("utf-16-le"), ["zero byte", "offset 1"]),
        ("a.txt", codecs.BOM_UTF16_LE + b"a\0b", ["a.txt", "utf-16"]),
    ],
    ids=lambda value: ascii(value[:20]) if isinstance(value, bytes) else value if isinstance(value, str) else "",
)
def test_damage_is_refused(
    name: str, content: bytes, words: list[str], tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    message = refusal(write(tmp_path / name, content), tokenizer)
    for word in [name, *words]:
        assert word in message
    assert "\n" not in message
    assert len(message) < 600


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("rows.jsonl:body", ["rows.jsonl", "line 1", "no field body", "id, text"]),
        ("plain.txt:text", ["plain.txt", "no fields"]),
    ],
)
def test_a_field_that_is_not_there(given: str, words: list[str], tmp_path: Path, tokenizer: Any) -> None:
    write(tmp_path / "rows.jsonl", LINES)
    write(tmp_path / "plain.txt", "only text")
    message = refusal(f"{tmp_path}/{given}", tokenizer)
    for word in words:
        assert word in message


def test_a_file_whose_name_has_a_colon(tmp_path: Path) -> None:
    assert read_source(str(write(tmp_path / "a:text", "whole"))) == "whole"


def test_halves_of_surrogate_pairs_do_no_harm(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = write(tmp_path / "a.jsonl", '{"text": "a \\ud83d b \\ud83d\\ude00"}')
    assert read_source(path) == "a ? b 😀"
    assert len(read_tokens(path, tokenizer, vocab_size=VOCAB)[0])


# Large files


@pytest.fixture
def small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """64 KB in 32 pieces stand for the real limit."""
    monkeypatch.setattr(pieces, "MAX_TEXT_BYTES", 2**16)


def records_of(path: Path) -> tuple[list[str], str]:
    found = read_file(files.look(Place(path, path.name)))
    return list(found.documents), found.told


@pytest.mark.parametrize("length", [40, 3000, 30_000], ids=lambda length: f"lines-of-{length}")
def test_long_lines_are_not_cut(length: int, small_limits: None, tmp_path: Path) -> None:
    count = 2**18 // length
    texts = [f"{number:06} " + "é" * (length // 2) for number in range(count)]
    path = write(tmp_path / "long.jsonl", "\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in texts))
    found, told = records_of(path)
    assert told == f"{len(found):,} records, field text, from pieces of it (JSON lines)"
    assert set(found) <= set(texts)
    numbers = [int(text[:6]) for text in found]
    assert numbers == sorted(set(numbers))
    assert sum(len(text.encode()) for text in found) < 2**16 + 32 * length / 8 + length
    assert numbers[0] == 0
    assert numbers[-1] >= count // 2
    assert len(found) >= 2


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.json", "a.csv", "utf16.jsonl"])
def test_files_that_are_read_once_are_sampled_all_over(name: str, small_limits: None, tmp_path: Path) -> None:
    texts = [f"{number:06} naïve" for number in range(30_000)]
    rows = [{"text": text} for text in texts]
    lines = "\n".join(map(json.dumps, rows))
    content = {
        "a.jsonl.gz": lambda: gzip.compress(lines.encode(), 1),
        "a.json": lambda: json.dumps(rows).encode(),
        "a.csv": lambda: ("text\n" + "\n".join(texts)).encode(),
        "utf16.jsonl": lambda: lines.encode("utf-16"),
    }[name]
    found, told = records_of(write(tmp_path / name, content()))
    assert f"30,000 records, field text, {len(found):,} of them used" in told
    assert set(found) <= set(texts)
    assert 2**15 < sum(map(len, found)) <= 2**16
    numbers = torch.tensor([int(text[:6]) for text in found])
    assert torch.equal(numbers, numbers.sort().values)
    per_tenth = torch.histc(numbers.float(), 10, 0, 30_000)
    assert per_tenth.min() > 0.5 * per_tenth.mean()  # runs of neighbours, so not quite even


def test_packed_prose_is_sampled_all_over(small_limits: None, tmp_path: Path) -> None:
    lines = [f"line {number:06} é" for number in range(30_000)]
    found = read_source(write(tmp_path / "a.txt.gz", gzip.compress("\n".join(lines).encode(), 1)))
    read = [line for line in found.split("\n") if line]
    assert set(read) <= set(lines)
    assert 2**15 < len(found.encode()) <= 2**16 + 2**10
    assert int(read[-1].split()[1]) > 28_000
    one = read_source(write(tmp_path / "b.txt.gz", gzip.compress(("x" + "é" * 100_000).encode(), 1)))
    assert set(one) <= {"x", "é", "\n"}


def test_a_line_that_is_no_record(small_limits: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "MAX_RECORD_BYTES", 2**17)
    path = write(tmp_path / "a.jsonl", json.dumps({"text": "a"}) + "\n" + json.dumps({"text": "b" * 2**18}))
    with pytest.raises(CalibrationError, match=r"a\.jsonl: a line is longer than"):
        read_source(path)
