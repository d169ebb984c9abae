"""Text data sets are described cheaply, and what is wrong with them is named."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import os
import re
import subprocess
import sys
import uuid
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from text_makers import source_of, texts, write_lines, write_parquet

from cache_store.errors import ConfigError, DataError
from workers.data.text.inspect import inspect_text
from workers.data.text.tokens.tokenizers import BYTE_EOS
from workers.specs.language import TextSpec

ROOT = Path(__file__).resolve().parents[4]
CHATS = [{"messages": [{"role": "user", "content": t}, {"role": "assistant", "content": "yes"}]} for t in texts(9)]


def text(path: object, **settings: Any) -> TextSpec:
    return TextSpec(name="text", path=str(path), **{"validation": 1, "test": 1, **settings})


def documents_of(data: TextSpec) -> list[str]:
    """All documents of all splits, in no order, as the store holds them."""
    found = []
    for split in ("train", "validation", "test"):
        source = source_of(TextSpec(**{**vars(data), "pack": False, "sequence_length": 4000}), split=split)
        for row in range(source.rows):
            ids = source.batch(source.offsets[[0]] * 0 + row).ids[0].tolist()
            assert ids[-1] == BYTE_EOS
            found.append(bytes(ids[:-1]).decode())
    return sorted(found)


def test_inspecting_loads_neither_torch_nor_transformers_nor_ray(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", {"text": texts(10)})
    code = (
        "import sys; from workers.data.text.inspect import inspect_text; from workers.specs.language import TextSpec\n"
        f"inspect_text(TextSpec(name='text', path={str(tmp_path)!r}, validation=1, test=1))\n"
        "inspect_text(TextSpec(name='stdlib'))\n"
        "print([n for n in ('torch', 'transformers', 'ray', 'datasets') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


def test_every_format_gives_the_same_documents(tmp_path: Path) -> None:
    contents = texts(12)
    lines = write_lines(tmp_path / "lines" / "a.jsonl", [{"text": t, "other": 1} for t in contents])
    lines.write_text("\n" + lines.read_text().replace("\n", "\n\n") + "  \n")  # blank lines are no documents
    (tmp_path / "array").mkdir()
    (tmp_path / "array" / "a.json").write_text(json.dumps([{"text": t} for t in contents], indent=1))
    (tmp_path / "zip").mkdir()
    (tmp_path / "zip" / "a.jsonl.gz").write_bytes(gzip.compress(lines.read_bytes()))
    (tmp_path / "bz").mkdir()
    (tmp_path / "bz" / "a.jsonl.bz2").write_bytes(bz2.compress(lines.read_bytes()))
    write_parquet(tmp_path / "parquet" / "a.parquet", {"n": list(range(7)), "text": contents[:7]})
    write_parquet(tmp_path / "parquet" / "b.parquet", {"text": contents[7:]})
    (tmp_path / "plain" / "deep").mkdir(parents=True)
    for number, content in enumerate(contents):
        (tmp_path / "plain" / ("deep" if number % 2 else "") / f"{number}.txt").write_bytes(
            (b"\xef\xbb\xbf" if number == 3 else b"") + content.encode()
        )
    (tmp_path / "zst").mkdir()
    (tmp_path / "zst" / "a.jsonl.zst").write_bytes(pa.compress(lines.read_bytes(), codec="zstd", asbytes=True))
    (tmp_path / "csv").mkdir()
    write_csv(tmp_path / "csv" / "a.csv", contents[:5], ",", mark="\ufeff")
    write_csv(tmp_path / "csv" / "b.tsv", contents[5:], "\t")
    (tmp_path / "arrow").mkdir()
    table = pa.table({"n": list(range(12)), "text": contents})
    for name, rows, make in (("a.arrow", table[:5], pa.ipc.new_stream), ("b.feather", table[5:], pa.ipc.new_file)):
        with pa.OSFile(str(tmp_path / "arrow" / name), "wb") as sink, make(sink, table.schema) as writer:
            writer.write_table(rows, max_chunksize=2)
    (tmp_path / "arrow" / "dataset_info.json").write_text("{}")  # as `datasets` saves a set
    for name in ("lines", "array", "zip", "bz", "zst", "csv", "arrow", "parquet", "plain"):
        data = text(tmp_path / name)
        outline = inspect_text(data)
        assert outline.documents == {"train": 10, "validation": 1, "test": 1}, name
        assert documents_of(data) == sorted(contents), name


def write_csv(path: Path, contents: list[str], separator: str, mark: str = "") -> None:
    with path.open("w", newline="", encoding="utf-8") as stream:
        stream.write(mark)
        csv.writer(stream, delimiter=separator).writerows([["n", "text"], *([7, content] for content in contents)])


def test_quoted_fields_keep_separators_quotes_and_line_breaks(tmp_path: Path) -> None:
    contents = [f'{t}, "quoted"\n\nand\tmore\r\n' for t in texts(9)]
    for name, separator in (("a.csv", ","), ("a.tsv", "\t")):
        write_csv(tmp_path / name, contents, separator)
        assert documents_of(text(tmp_path / name)) == sorted(contents)
    for name, packed in (("b.csv.gz", gzip.compress), ("b.csv.zst", partial(pa.compress, codec="zstd", asbytes=True))):
        (tmp_path / name).write_bytes(packed((tmp_path / "a.csv").read_bytes()))
        assert documents_of(text(tmp_path / name)) == sorted(contents)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('text,n\n"a",1\nb\nc,2,3\n', r"row 1 of .*a\.csv: 1 fields instead of the 2.*\n.*row 2 of .*: 3 fields"),
        ('text\na\n"b\nc\n', r"a\.csv cannot be read behind line 4: unexpected end of data"),
        ("txt\na\n", r"a\.csv has no 'text'; did you mean 'txt'\?"),
        ("", "no documents for train"),
    ],
)
def test_a_csv_that_is_none_is_named(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "a.csv").write_text(content)
    with pytest.raises(DataError, match=message):
        inspect_text(text(tmp_path))


def test_rows_that_cannot_be_used_are_named_together_or_skipped(tmp_path: Path) -> None:
    lines = [json.dumps({"text": t}) for t in texts(20)]
    for row in (3, 7, 11, 12, 13, 14, 15):
        lines[row] = lines[row][:-3]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    with pytest.raises(DataError) as caught:
        inspect_text(text(tmp_path))
    named = caught.value.details["problems"]
    assert [re.match(r"row (\d+) of .*a\.jsonl: not JSON in line (\d+):", line).groups() for line in named] == [  # type: ignore[union-attr]
        (str(row), str(row + 1)) for row in (3, 7, 11, 12, 13)
    ]
    assert named[-1].endswith("(and 2 more rows of this file); data.bad: skip leaves such rows out")
    outline = inspect_text(text(tmp_path, bad="skip"))
    assert outline.documents == {"train": 18, "validation": 1, "test": 1}
    assert re.match(r"7 of 20 rows cannot be used and are skipped \(row 3 of .*not JSON in line 4", outline.notes[0])
    expected = sorted(t for row, t in enumerate(texts(20)) if row not in (3, 7, 11, 12, 13, 14, 15))
    assert documents_of(text(tmp_path, bad="skip", validation=3, test=3)) == expected


@pytest.mark.parametrize("head", ["", "\n "])
def test_a_byte_order_mark_changes_nothing(tmp_path: Path, head: str) -> None:
    rows = [{"text": t} for t in texts(9)]
    (tmp_path / "array.json").write_bytes(b"\xef\xbb\xbf" + (head + json.dumps(rows)).encode())
    (tmp_path / "lines.jsonl").write_bytes(b"\xef\xbb\xbf" + (head + "\n".join(map(json.dumps, rows))).encode())
    for name in ("array.json", "lines.jsonl"):
        assert documents_of(text(tmp_path / name)) == sorted(texts(9))


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int8(), pa.string())]
)
def test_every_type_of_text_that_parquet_knows_is_read(tmp_path: Path, kind: pa.DataType) -> None:
    write_parquet(tmp_path / "a.parquet", {"text": pa.array(texts(9)).cast(kind)})
    assert pq.read_schema(tmp_path / "a.parquet").field("text").type == kind
    assert documents_of(text(tmp_path)) == sorted(texts(9))


def test_text_in_parquet_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    raw = pa.array([*[t.encode() for t in texts(8)], b"a\xff"])
    broken = pa.Array.from_buffers(pa.string(), len(raw), raw.buffers())
    write_parquet(tmp_path / "a.parquet", {"text": broken})
    with pytest.raises(DataError, match=r"row 8 of .*a\.parquet: cannot be read: .*can't decode byte 0xff"):
        inspect_text(text(tmp_path))


def test_links_are_followed_and_one_that_leads_nowhere_is_named(tmp_path: Path) -> None:
    for number, content in enumerate(texts(9)):
        place = tmp_path / ("elsewhere" if number % 2 else "other") / f"{number}.txt"
        place.parent.mkdir(exist_ok=True)
        place.write_text(content)
    data = tmp_path / "data"
    data.mkdir()
    (data / "folder").symlink_to(tmp_path / "elsewhere")
    for number in range(0, 9, 2):
        (data / f"{number}.txt").symlink_to(tmp_path / "other" / f"{number}.txt")
    assert documents_of(text(data)) == sorted(texts(9))
    before = inspect_text(text(data)).fingerprint
    behind = tmp_path / "elsewhere" / "1.txt"
    content = behind.read_text()
    os.utime(behind, ns=(5, 5))
    assert inspect_text(text(data)).fingerprint == before, "content decides, not times"
    behind.write_text("another document")
    assert inspect_text(text(data)).fingerprint != before
    behind.write_text(content)
    # What lies above is not gone into again, and what is not asked for may lead anywhere.
    (tmp_path / "elsewhere" / "up").symlink_to(tmp_path / "elsewhere")
    (data / "all").symlink_to(data)
    (data / "lost.log").symlink_to(tmp_path / "nowhere")
    assert documents_of(text(data)) == sorted(texts(9))
    (data / "lost.txt").symlink_to(tmp_path / "nowhere")
    (data / "gone.md").symlink_to("no file")
    with pytest.raises(DataError) as caught:
        inspect_text(text(data))
    assert sorted(caught.value.details["problems"]) == [
        f"data.path: {data}/gone.md is a link to no file, which does not exist",
        f"data.path: {data}/lost.txt is a link to {tmp_path}/nowhere, which does not exist",
    ]


def test_a_folder_on_any_file_system_is_read() -> None:
    root = f"memory://{uuid.uuid4().hex}"
    with fsspec.open(f"{root}/a.jsonl", "wb") as stream:
        stream.write("".join(json.dumps({"text": t}) + "\n" for t in texts(9)).encode())
    assert documents_of(text(root)) == sorted(texts(9))
    assert documents_of(text(f"{root}/a.jsonl")) == sorted(texts(9))


def test_include_takes_names_and_paths_and_hidden_files_are_left_out(tmp_path: Path) -> None:
    for name in ("a.txt", "b.log", "sub/c.txt", ".hidden.txt", ".git/d.txt", "__pycache__/e.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    count = {
        ("*.txt",): 2,
        ("*.txt", "*.log"): 3,
        ("sub/*.txt",): 1,
    }
    for include, expected in count.items():
        data = text(tmp_path, include=include, validation=1, test=1)
        if expected < 3:
            with pytest.raises(ConfigError, match=f"of {expected} documents|leave none"):
                inspect_text(data)
        else:
            assert inspect_text(data).documents == {"train": 1, "validation": 1, "test": 1}


def test_files_named_after_splits_are_those_splits_and_others_beside_them_no_data(tmp_path: Path) -> None:
    write_lines(tmp_path / "train-00000-of-00002.jsonl", [{"text": t} for t in texts(20)])
    write_lines(tmp_path / "train" / "more.jsonl", [{"text": t} for t in texts(5)])
    write_lines(tmp_path / "test.jsonl", [{"text": t} for t in texts(3)])
    (tmp_path / "README.md").write_text("about this data")
    outline = inspect_text(text(tmp_path, validation=4, pack=False))
    assert outline.documents == {"train": 21, "validation": 4, "test": 3}
    write_lines(tmp_path / "dev.jsonl", [{"text": t} for t in texts(2)])
    assert inspect_text(text(tmp_path, validation=4, pack=False)).documents == {"train": 25, "validation": 2, "test": 3}


def test_a_module_called_test_something_is_no_test_split(tmp_path: Path) -> None:
    for name in ("train.py", "test_train.py", "a.py"):
        (tmp_path / name).write_text(name)
    (tmp_path / "train.py").unlink()
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "b.py").write_text("b")
    assert inspect_text(text(tmp_path)).documents == {"train": 1, "validation": 1, "test": 1}


def test_packed_rows_are_estimated_from_bytes_and_others_counted(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"text": "x" * 400} for _ in range(100)])
    packed = inspect_text(text(path, sequence_length=50, validation=10, test=10))
    assert packed.documents == {"train": 80, "validation": 10, "test": 10}
    assert packed.bytes == path.stat().st_size
    assert packed.rows["train"] == round(0.8 * path.stat().st_size / 4 / 50)
    assert inspect_text(text(path, sequence_length=50, train_limit=9)).rows["train"] == 9
    assert inspect_text(text(path, pack=False, train_limit=9)).rows == {"train": 9, "validation": 1, "test": 1}


def test_the_fingerprint_changes_with_contents_names_and_column_not_with_times(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"text": t, "b": t} for t in texts(9)])
    first = inspect_text(text(tmp_path)).fingerprint
    seen = {first, inspect_text(text(tmp_path, column="b")).fingerprint}
    assert inspect_text(text(tmp_path, sequence_length=7)).fingerprint == first
    os.utime(path, ns=(5, 5))
    assert inspect_text(text(tmp_path)).fingerprint == first
    content = path.read_text()
    path.write_text(content[:-4] + "#" + content[-3:])
    os.utime(path, ns=(5, 5))
    seen.add(inspect_text(text(tmp_path)).fingerprint)
    path.write_text(content)
    path.rename(tmp_path / "b.jsonl")
    seen.add(inspect_text(text(tmp_path)).fingerprint)
    assert len(seen) == 4


def test_a_missing_column_is_named_with_the_nearest_one(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", [{"texts": "x", "id": 1}])
    write_parquet(tmp_path / "b.parquet", {"Text": ["x"], "id": [1]})
    with pytest.raises(DataError) as caught:
        inspect_text(text(tmp_path))
    first, second = caught.value.details["problems"]
    assert "a.jsonl has no 'text'; did you mean 'texts'? (it has texts, id)" in first
    assert "b.parquet has no 'text'; did you mean 'Text'?" in second
    with pytest.raises(DataError, match="has no 'messages'"):
        inspect_text(TextSpec(name="chat", path=str(tmp_path / "a.jsonl")))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda root: None, "no files of plain text"),
        (lambda root: (root / "a.bin").write_bytes(b"x"), r"data\.include allows: \*\.txt"),
        (lambda root: (root / "a.jsonl").write_text("\n \n"), "no documents for train"),
        (lambda root: (root / "a.jsonl").write_text("{nonsense\n"), r"row 0 of .*a\.jsonl: not JSON"),
        (lambda root: (root / "a.jsonl").write_text("[1, 2]\n"), "a int instead of a JSON object"),
        (lambda root: (root / "a.json").write_text("[{"), r"a\.json is not JSON"),
        (lambda root: (root / "a.json").write_text("[" * 100_000), r"a\.json is not JSON"),
        (lambda root: (root / "a.parquet").write_bytes(b"PAR1 no"), r"a\.parquet is no readable Parquet file"),
        (lambda root: (root / "a.parquet").write_bytes(b""), "no readable Parquet file"),
        (lambda root: write_lines(root / "train.jsonl", [{"text": "x"}]) and write_lines(root / "test.jsonl", []),
         "no documents for test"),
    ],
)  # fmt: skip
def test_empty_and_unreadable_data_is_named(tmp_path: Path, make: Any, message: str) -> None:
    make(tmp_path)
    with pytest.raises(DataError, match=message):
        inspect_text(text(tmp_path))


@pytest.mark.parametrize(
    ("name", "rows", "broken", "message"),
    [
        (
            "text",
            [{"text": t} for t in texts(9)],
            '{"text": "cut of',
            r"row 9 of .*: not JSON in line 11: Unterminated",
        ),
        ("text", [{"text": t} for t in texts(9)], '{"txet": "x"}', r"row 9 of .*has no 'text'; did you mean 'txet'\?"),
        ("text", [{"text": t} for t in texts(9)], '{"text": 7}', r"row 9 of .*: int instead of a text"),
        ("chat", CHATS, '{"messages": []}', r"row 9 of .*: an empty list instead of a list of messages"),
        (
            "chat",
            CHATS,
            json.dumps({"messages": CHATS[0]["messages"][:1]}),
            r"row 9 of .*: no message of the assistant",
        ),
    ],
)
def test_one_record_among_others_that_is_none_is_named_before_anything_is_planned(
    tmp_path: Path, name: Any, rows: Any, broken: str, message: str
) -> None:
    path = write_lines(tmp_path / "a.jsonl", rows)
    path.write_text(path.read_text() + "\n" + broken)  # a blank line is no row, but a line
    with pytest.raises(DataError, match=message):
        inspect_text(TextSpec(name=name, path=str(path), validation=1, test=1))


def test_chats_in_parquet_are_looked_at_before_anything_is_planned(tmp_path: Path) -> None:
    messages = [row["messages"] for row in CHATS]
    write_parquet(tmp_path / "a.parquet", {"messages": messages})
    assert inspect_text(TextSpec(name="chat", path=str(tmp_path), validation=1, test=1)).documents["train"] == 7
    write_parquet(tmp_path / "a.parquet", {"messages": [*messages, messages[0][:1]]})
    with pytest.raises(DataError, match=r"row 9 of .*a\.parquet: no message of the assistant to learn from"):
        inspect_text(TextSpec(name="chat", path=str(tmp_path), validation=1, test=1))


def test_a_damaged_compressed_file_is_named(tmp_path: Path) -> None:
    whole = gzip.compress(b'{"text": "x"}\n' * 5000)
    (tmp_path / "a.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"a\.jsonl\.gz cannot be read"):
        inspect_text(text(tmp_path / "a.jsonl.gz"))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (TextSpec(name="text", path="/no/such/folder"), "/no/such/folder does not exist; allowed: a file or folder of"),
        (TextSpec(name="chat", path="/no/such/folder"), "does not exist; allowed: a file or folder of JSON lines"),
        (TextSpec(name="text"), "none given for text"),
        (TextSpec(name="mmlu"), "none given for mmlu; allowed: a folder holding auxiliary_train/"),
        (TextSpec(name="winogrande", path="/no/such/folder"), "allowed: a folder holding train_<size>.jsonl"),
        (TextSpec(name="text", path="nosuch://x/y"), "cannot open 'nosuch://x/y'"),
        (TextSpec(name="stdlib", path="/x"), "stdlib takes none"),
    ],
)
def test_a_path_that_holds_nothing_is_named_with_what_is_allowed(data: TextSpec, message: str) -> None:
    with pytest.raises(DataError, match=message):
        inspect_text(data)


def test_chat_takes_no_plain_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    for path in (tmp_path, tmp_path / "a.txt"):
        with pytest.raises(DataError, match="no files of JSON lines, CSV, TSV, Parquet or Arrow"):
            inspect_text(TextSpec(name="chat", path=str(path)))


def test_the_standard_library_is_its_modules_without_tests_and_packages() -> None:
    outline = inspect_text(TextSpec(name="stdlib", sequence_length=512))
    assert sum(outline.documents.values()) > 300
    assert outline.bytes > 5_000_000
    assert outline.fingerprint == inspect_text(TextSpec(name="stdlib", validation=3)).fingerprint
