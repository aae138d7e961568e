#!/bin/sh
# zstandard 0.25.0 (PyPI): ZstdDecompressor.stream_reader, which zstandard.open() is made of, takes a frame that was cut off for
# the end of the data: read() returns b"" and raises nothing. Source: its docs, "ZstdDecompressor.stream_reader", and
# zstandard/backend_cffi.py, ZstdDecompressionReader.read. decompressobj() is the interface that tells, by its attribute `eof`.
# Expected: an error, as gzip, bz2 and lzma raise EOFError on a file that was cut off, and as `zstd -d` does.
# Seen: a .jsonl.zst that was downloaded in part reads as a shorter file, or as an empty one.
set -e
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet zstandard==0.25.0
"$place/venv/bin/python" - <<'PYTHON'
import bz2, gzip, io, lzma, random, zstandard

random.seed(0)
lines = b"".join(b'{"text": "%d"}\n' % random.getrandbits(64) for _ in range(100_000))
for name, library in (("gzip", gzip), ("bz2", bz2), ("lzma", lzma)):
    packed = library.compress(lines)
    opened = {"gzip": gzip.GzipFile, "bz2": bz2.BZ2File, "lzma": lzma.LZMAFile}[name]
    reader = opened(fileobj=io.BytesIO(packed[: len(packed) // 2])) if name == "gzip" else opened(io.BytesIO(packed[: len(packed) // 2]))
    try:
        reader.read()
    except EOFError as error:
        print(f"{name}: EOFError: {error}")
    else:
        raise SystemExit(f"{name} raised nothing")

packed = zstandard.compress(lines)
cut = packed[: len(packed) // 2]
read = zstandard.ZstdDecompressor().stream_reader(io.BytesIO(cut)).read()
with zstandard.open(io.BytesIO(cut), "rb") as file:
    assert file.read() == read
print(f"zstandard: {len(read):,} of {len(lines):,} bytes, no error")
assert read == lines[: len(read)] and 0 < len(read) < len(lines)
whole = zstandard.ZstdDecompressor().decompressobj()
whole.decompress(cut)
assert not whole.eof
PYTHON
