"""Every kind of bad row and bad file, with the words that say so."""

import csv
import gzip
import json
import os
import socket
import zlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from fedloom.data import json_rows, safe_open
from fedloom.data.files import read_file
from fedloom.data.json_rows import is_deep
from fedloom.data.loading import load_examples
from fedloom.data.rows import RowError
from fedloom.data.sources import DataSettings
from fedloom.errors import DataError

LATE = "has white space before a quoted field; take it out, or quote the whole field"
TURN = {"role": "user", "content": "q"}
GOOD = b'{"text": "a", "label": "x"}'
PARQUET = pa.table({"text": ["a", "b"], "label": ["x", "y"]})


def rows_of(path):
    """The rows of a file, with the reason in place of a row that is none."""
    return [str(row) if isinstance(row, RowError) else row for _, row in read_file(path)]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (
            rb'{"a": "\ud800"}',
            r"'a': holds \ud800, half of a pair of surrogates, which is not a character",
        ),
        (
            rb'{"a": [{"b\udfff": 1}]}',
            r"'a': holds \udfff, half of a pair of surrogates, which is no",
        ),
        (b'{"a": ' + b"[" * 10_000 + b"]" * 10_000 + b"}", "nested deeper than 100 brackets"),
        (b"[" * 101 + b"]" * 101, "nested deeper than 100 brackets"),
        (b"[" * 100_000, "nested deeper than 100 brackets"),
        (b'{"a": "\xff"}', "not UTF-8 (byte 0xff after 7 characters); save the file as UTF-8"),
        (b'{"a": NaN}', "holds NaN, which is not a number in JSON; write null, or a number"),
        (
            b'{"a": [-Infinity]}',
            "holds -Infinity, which is not a number in JSON; write null, or a number",
        ),
        (b'{"a": 1e999}', "holds the number 1e999, which is too large"),
        (
            b'{"a": ' + b"7" * 4000 + b"}",
            "holds a whole number of 4\u202f000 digits; at most 100 are read",
        ),
        (b'{"a": 1, "b": 2, "a": 3}', "the key 'a' stands twice in an object"),
        (b'{"a": {"x": 1, "x": 1}}', "the key 'x' stands twice in an object"),
        (b'{"a": "\x00"}', "not JSON (Invalid control character at: line 1 column 8 (char 7))"),
        (b'{"a": 1', "not JSON (Expecting ',' delimiter: line 1 column 8 (char 7))"),
        ('{"a": 1}\u2028'.encode(), "not JSON (Extra data: line 1 column 9 (char 8))"),
        (b'{"a": "' + b"x" * safe_open.LONGEST_ROW + b'"}', "longer than 16 Mi characters"),
    ],
)
def test_a_line_that_is_no_row_is_told_and_reading_goes_on(tmp_path, line, reason):
    path = tmp_path / "x.jsonl"
    path.write_bytes(GOOD + b"\n" + line + b"\n\n" + GOOD)
    found = list(read_file(path))
    assert [number for number, _ in found] == [1, 2, 4]
    assert str(found[1][1]).startswith(reason) and isinstance(found[1][1], RowError)
    assert found[0][1] == found[2][1] == {"text": "a", "label": "x"}


@pytest.mark.parametrize(
    ("line", "row"),
    [
        (rb'{"a": "\ud83d\ude00"}', {"a": "\U0001f600"}),
        (rb'{"a": "\u0000\u001b[2J"}', {"a": "\x00\x1b[2J"}),  # data may be about terminals
        ('{"a": "\u2028\u202e"}'.encode(), {"a": "\u2028\u202e"}),
        (b'{"a": ' + b"7" * 100 + b"}", {"a": int("7" * 100)}),
        (b"[" * 100 + b"]" * 100, json.loads("[" * 100 + "]" * 100)),
        (b'{"a": "' + b"[" * 500 + b'"}', {"a": "[" * 500}),
        (rb'{"a": "\\\"[' + b"{" * 200 + b'"}', {"a": '\\"[' + "{" * 200}),
        (b'{"a": 1e308}', {"a": 1e308}),
    ],
)
def test_what_only_looks_strange_is_a_row(tmp_path, line, row):
    (tmp_path / "x.jsonl").write_bytes(line)
    (tmp_path / "x.json").write_bytes(b"[" + line + b"]" if line[:1] == b"{" else line)
    assert rows_of(tmp_path / "x.jsonl") == [row]
    assert rows_of(tmp_path / "x.json") == ([row] if isinstance(row, dict) else row)


def test_depth_is_of_brackets_that_are_no_part_of_a_text():
    assert not is_deep("[]" * 5000) and not is_deep('"' + "[" * 5000)
    assert not is_deep("[" * 100) and is_deep("[" * 101) and is_deep('{"a":' * 101)
    assert is_deep(r'"\"' + '",' + "[" * 101)


def test_a_bad_row_of_a_whole_file_is_told_of_that_row(tmp_path):
    rows = [GOOD, b'{"a": NaN}', b'{"a": 1, "a": 2}', rb'{"a": "\ud800"}', b'{"a": "\xe9"}', b"7"]
    (tmp_path / "x.json").write_bytes(b"[" + b",".join(rows) + b"]")
    assert rows_of(tmp_path / "x.json") == [
        {"text": "a", "label": "x"},
        "'a': holds NaN, which is not a number in JSON; write null, or a number",
        "the key 'a' stands twice in an object",
        r"'a': holds \ud800, half of a pair of surrogates, which is not a character",
        "'a': not UTF-8 (byte 0xe9); save the file as UTF-8",
        7,
    ]


@pytest.mark.parametrize("ends", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_lines_end_as_any_system_ends_them(tmp_path, ends, mark):
    (tmp_path / "x.jsonl").write_bytes(mark + ends.join(['{"a": 1}', "", '{"a": 2}']).encode())
    (tmp_path / "x.csv").write_bytes(mark + ends.join(["a", "1", "", '"2', '"']).encode())
    assert list(read_file(tmp_path / "x.jsonl")) == [(1, {"a": 1}), (3, {"a": 2})]
    assert list(read_file(tmp_path / "x.csv")) == [(1, {"a": "1"}), (2, {"a": f"2{ends}"})]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (b"1", "has 1 field, the header names 2 (is a comma or a quote missing?)"),
        (b"1,2,3", "has 3 fields, the header names 2 (is a comma or a quote missing?)"),
        (b'"1"x,2', "not CSV (',' expected after '\"')"),
        (b'1, "2"', LATE),
        (b' "1",2', LATE),
        (b'"1, ""a""",\t"2"', LATE),
        ('1,\u00a0"2"'.encode(), LATE),
        (b'1, ""', LATE),
        (b"\xff,2", "not UTF-8 (byte 0xff after 0 characters); save the file as UTF-8"),
    ],
)
def test_a_csv_row_that_breaks_the_rules_is_told(tmp_path, row, reason):
    (tmp_path / "x.csv").write_bytes(b"a,b\n1,2\n" + row + b"\n3,4\n")
    assert rows_of(tmp_path / "x.csv") == [{"a": "1", "b": "2"}, reason, {"a": "3", "b": "4"}]


@pytest.mark.parametrize(
    ("row", "fields"),
    [
        (b'1," ""2"""', ["1", ' "2"']),
        (b'" ""1"",  ""1""", 2', [' "1",  "1"', " 2"]),
        (b'"\n""1""",5" or 6"', ['\n"1"', '5" or 6"']),
    ],
)
def test_what_only_looks_like_a_late_quote_is_a_row(tmp_path, row, fields):
    (tmp_path / "x.csv").write_bytes(b"a,b\n" + row + b"\n")
    assert rows_of(tmp_path / "x.csv") == [dict(zip("ab", fields, strict=True))]


def test_a_header_with_white_space_before_a_quote_is_refused(tmp_path):
    (tmp_path / "x.csv").write_bytes(b'a, "b"\n1,2\n')
    with pytest.raises(
        DataError, match="has a header that cannot be read: has white space before a"
    ):
        rows_of(tmp_path / "x.csv")


@pytest.mark.parametrize(
    ("whole", "rows"),
    [
        ({"messages": [TURN, TURN]}, [{"messages": [TURN, TURN]}]),
        (
            {"conversations": [{"from": "gpt", "value": "a"}], "tools": [{"name": "f"}]},
            [{"conversations": [{"from": "gpt", "value": "a"}], "tools": [{"name": "f"}]}],
        ),
        (
            {"ann": [{"text": "t"}, 7], "bob": [{"role": "r", "text": "u"}], "eve": []},
            [{"client": "ann", "text": "t"}, 7, {"client": "bob", "role": "r", "text": "u"}],
        ),
        ({"text": "t", "tags": ["a", "b"]}, [{"text": "t", "tags": ["a", "b"]}]),
    ],
)
def test_a_list_is_a_clients_where_it_holds_rows(tmp_path, whole, rows):
    (tmp_path / "x.json").write_text(json.dumps(whole))
    assert rows_of(tmp_path / "x.json") == rows


@pytest.mark.parametrize(
    "columns",
    [
        {"prompt": {"0": "a", "1": "b"}, "completion": {"0": "c", "1": "d"}},
        {"prompt": ["a", "b"], "completion": ["c", "d"]},
    ],
)
def test_columns_in_place_of_rows_are_told(tmp_path, columns):
    (tmp_path / "x.json").write_text(json.dumps(columns))
    with pytest.raises(DataError) as caught:
        rows_of(tmp_path / "x.json")
    assert str(caught.value).endswith(
        "x.json holds columns, as pandas writes them, and no rows; write rows: "
        'df.to_json("FILE.jsonl", orient="records", lines=True)'
    )


def test_csv_fields_may_be_long_and_columns_without_a_name_are_left_out(tmp_path):
    long = "x" * (csv.field_size_limit() + 1) if csv.field_size_limit() < 2**20 else "x" * 2**20
    (tmp_path / "x.csv").write_text(f',text,\n0,"{long}\0",9\n')
    assert rows_of(tmp_path / "x.csv") == [{"text": f"{long}\0"}]


def made(name, content):
    """A maker of a file with bytes in it."""
    return name, lambda path: path.write_bytes(content)


def table(name, *columns, **settings):
    """A maker of a Parquet file with columns, each a name and values."""

    def make(path):
        names, values = zip(*columns, strict=True)
        pyarrow.parquet.write_table(pa.table(list(values), names=list(names)), path, **settings)

    return name, make


def cut(content, end):
    return gzip.compress(content)[:end]


def broken_sum(content):
    packed = bytearray(gzip.compress(content))
    packed[-6] ^= 1
    return bytes(packed)


def socket_at(path):
    os.chdir(path.parent)  # a socket's path is short
    with socket.socket(socket.AF_UNIX) as own:
        own.bind(path.name)


SHARED = pa.DictionaryArray.from_arrays(pa.array([0] * 20_000, pa.int32()), ["x" * 2**20])
NESTED = pa.ListArray.from_arrays(pa.array([0, 20_000], pa.int32()), SHARED)
BOMB = "unpacks to more than 100 times its size, as no rows do; "


@pytest.mark.parametrize(
    ("file", "words"),
    [
        (
            ("x.jsonl", os.mkdir),
            "is a folder, not a file; name the files in it, such as {path}/*.jsonl",
        ),
        (
            ("x.jsonl", os.mkfifo),
            "is a named pipe (FIFO), not a file; write its rows to a file and name",
        ),
        (
            ("x.jsonl", lambda p: p.symlink_to("/dev/zero")),
            "is a device, not a file; write its rows to a",
        ),
        (
            ("x.txt", lambda p: p.symlink_to("/dev/null")),
            "is a device, not a file; write its rows to a",
        ),
        (
            ("x.jsonl", socket_at),
            "is a socket or a device, not a file; write its rows to a file and name",
        ),
        (
            ("x.csv", lambda p: p.symlink_to("x.csv")),
            "is a symbolic link that leads back to itself; name the file",
        ),
        (
            made("x.txt", GOOD),
            "has an unknown ending; there are: .jsonl, .jsonl.gz, .json, .json.gz, ",
        ),
        (
            made("x.jsonl", gzip.compress(GOOD)),
            "is compressed with gzip, and its name does not say so;",
        ),
        (made("x.jsonl", b"PAR1..."), "is a Parquet file; name it .parquet"),
        (
            made("x.csv", b"PK\x03\x04..."),
            "is a ZIP archive (or a spreadsheet); unpack it, or save it as",
        ),
        (
            made("x.jsonl", GOOD.decode().encode("utf-16")),
            "is UTF-16 text, and rows are read as UTF-8: ",
        ),
        (
            made("x.json", GOOD.decode().encode("utf-32")),
            "is UTF-32 text, and rows are read as UTF-8; ",
        ),
        (
            made("x.jsonl.gz", GOOD),
            "is not compressed with gzip, whatever its name says; name it without",
        ),
        (
            made("x.jsonl.gz", b""),
            "is not compressed with gzip, whatever its name says; name it without",
        ),
        (
            made("x.csv.gz", gzip.compress(gzip.compress(GOOD))),
            "is compressed with gzip twice; unpack it",
        ),
        (
            made("x.jsonl.gz", cut(GOOD, 20)),
            "ends in the middle of its gzip data: it was cut off, or is still written; copy it again",
        ),
        (made("x.jsonl.gz", broken_sum(GOOD)), "holds damaged gzip data (CRC check failed 0x"),
        (
            made("x.jsonl.gz", b"\x1f\x8b\x08\0\0\0\0\0\0\0" + b"\xff" * 20),
            "holds damaged gzip data (Error -3 while decompressing data: invalid block type); copy it",
        ),
        (
            made("x.jsonl.gz", gzip.compress(GOOD) + b"more"),
            "holds damaged gzip data (Not a gzipped file",
        ),
        (
            made("x.jsonl.gz", gzip.compress((b"7" * 2**20 + b"\n") * 40)),
            BOMB + "unpack it and look at it",
        ),
        (made("x.csv.gz", gzip.compress(bytes(2**25))), BOMB + "unpack it and look at it"),
        (made("x.json.gz", gzip.compress(b" " * 2**25)), BOMB + "unpack it and look at it"),
        (
            made("x.json", b"{" + b" " * 2**20),
            "is not JSON (Expecting property name enclosed in double",
        ),
        (made("x.json", b"[" * 10_000), "is nested deeper than 100 brackets; no row needs that"),
        (
            made("x.json", b"[" + b"0," * 4_000_001 + b"0]"),
            "holds more than 4\u202f000\u202f000 values, and a .json file is read whole; write its rows as JSON lines",
        ),
        (
            made("x.csv", b'a,b\n1,2\n3,"4\n5,6\n'),
            "opens a quote in row 2 (line 3) that is never closed; close it, or double a quote that is part",
        ),
        (
            made("x.csv", b'a,b\n"' + (b"x" * 999 + b"\n") * 2**15),
            "holds row 1 (line 2) of more than 16 Mi characters; is a quote in it never closed?",
        ),
        (
            made("x.csv", b"a,b,a\n1,2,3\n"),
            "names the column 'a' twice; give every column a name of its",
        ),
        (
            made("x.csv", b"\xff,b\n1,2\n"),
            "has a header that cannot be read: not UTF-8 (byte 0xff after",
        ),
        (made("x.parquet", b""), "is empty, and a Parquet file never is; copy it again"),
        (
            made("x.parquet", b"PAR1" + b"x" * 40 + b"PAR1"),
            "is not a Parquet file that can be read (",
        ),
        (
            made("x.parquet", b"PARE" + b"x" * 40 + b"PARE"),
            "is an encrypted Parquet file; decrypt it ",
        ),
        (
            table("x.parquet", ("a", [1]), ("a", [2])),
            "names the column 'a' twice; give every column a ",
        ),
        (
            table("x.parquet", ("a", ["z" * 2**20] * 40), compression="zstd", use_dictionary=False),
            BOMB,
        ),
        (table("x.parquet", ("a", SHARED)), BOMB + "look at it with another program"),
        (table("x.parquet", ("a", NESTED)), BOMB + "look at it with another program"),
        (table("x.parquet", ("a", pa.nulls(2_000_000, pa.int32()))), BOMB),
        (
            table("x.parquet", *((f"c{i}", [1]) for i in range(10_001))),
            "has 10\u202f001 columns; at most 10\u202f000 are read",
        ),
    ],
)
def test_a_file_that_is_not_what_it_claims_is_one_error(tmp_path, monkeypatch, file, words):
    monkeypatch.chdir(tmp_path)
    name, make = file
    path = tmp_path / name
    make(path)
    with pytest.raises(DataError) as error:
        rows_of(path)
    assert str(error.value).startswith(f"{path} {words.format(path=path)}")
    assert "\n" not in str(error.value)


def test_a_gzip_file_of_several_members_or_padding_is_read_whole(tmp_path):
    one = gzip.compress(GOOD + b"\n")
    (tmp_path / "x.jsonl.gz").write_bytes(one + one + bytes(512))
    assert len(rows_of(tmp_path / "x.jsonl.gz")) == 2


@pytest.mark.parametrize("ending", ["jsonl", "json", "csv"])
def test_a_line_of_300_mb_takes_no_memory(tmp_path, ending):
    path = tmp_path / f"x.{ending}"
    path.write_bytes(b'[{"text": "' if ending != "csv" else b"text\n")
    os.truncate(path, 300 * 2**20)
    if ending == "jsonl":
        assert rows_of(path) == ["longer than 16 Mi characters"]
    words = {
        "json": "is larger than 128 MiB, and a .json file is read whole",
        "csv": "of more than 16 Mi",
    }
    with pytest.raises(DataError, match=words.get(ending, "1 of 1 rows of x.jsonl are malformed")):
        load_examples(DataSettings(source=str(path), kind="labelled"), np.random.default_rng(0))


def test_a_line_without_end_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(json_rows, "SKIPPED", 2**24)
    path = tmp_path / "x.jsonl"
    path.touch()
    os.truncate(path, 2**40)
    with pytest.raises(DataError, match="line 1 goes on beyond 16 Mi characters"):
        rows_of(path)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (
            pa.array([b"ok", b"\xff"]).cast(pa.binary()).view(pa.string()),
            "holds a value that cannot be had ('utf-8' codec can't decode byte 0xff",
        ),
        (pa.array([0, 2**62], pa.timestamp("ms")), "holds a value that cannot be had ("),
        (pa.array(["ok", "x" * (safe_open.LONGEST_ROW + 1)]), "larger than 16 MiB"),
    ],
)
def test_a_parquet_row_that_python_cannot_hold_is_told(tmp_path, values, reason):
    pyarrow.parquet.write_table(pa.table({"a": values}), tmp_path / "x.parquet", compression="none")
    found = rows_of(tmp_path / "x.parquet")
    assert isinstance(found[0], dict) and found[1].startswith(reason)


def test_nested_parquet_columns_are_values_like_any(tmp_path):
    pairs = pa.array([[("k", 1)]], pa.map_(pa.string(), pa.int64()))
    columns = {"m": pairs, "l": [[["x"], []]], "b": [b"\0"], "s": [{"a": None}], "n": pa.nulls(1)}
    pyarrow.parquet.write_table(pa.table(columns), tmp_path / "x.parquet")
    assert rows_of(tmp_path / "x.parquet") == [
        {"m": [("k", 1)], "l": [["x"], []], "b": b"\0", "s": {"a": None}, "n": None}
    ]


def test_what_is_not_there_says_why(tmp_path):
    (tmp_path / "link.jsonl").symlink_to("gone.jsonl")
    (tmp_path / "rows.jsonl").write_bytes(GOOD)
    for name, words in (
        ("link.jsonl", "; it is a symbolic link to gone.jsonl, which is not there"),
        ("row.jsonl", f"; did you mean {tmp_path}/rows.jsonl?"),
        ("no/rows.jsonl", f"; there is no folder {tmp_path}/no"),
        ("rows.jsonl/x.csv", f"; there is no folder {tmp_path}/rows.jsonl"),
    ):
        with pytest.raises(DataError) as error:
            rows_of(tmp_path / name)
        assert str(error.value) == f"data file not found: {tmp_path / name}{words}"
    with pytest.raises(
        DataError, match=r"x\\x00\.jsonl is not a name of a file: embedded null byte"
    ):
        rows_of(tmp_path / "x\0.jsonl")
    with pytest.raises(DataError, match="cannot be read: File name too long"):
        rows_of(tmp_path / ("x" * 300 + ".jsonl"))


def test_a_file_that_may_not_be_read(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(safe_open.os, "open", refuse)
    with pytest.raises(
        DataError, match="may not be read by this user; change its permissions, or copy"
    ):
        rows_of(tmp_path / "x.jsonl")


def test_a_disk_that_fails_half_way_is_one_error(tmp_path, monkeypatch):
    path = tmp_path / "x.jsonl.gz"
    path.write_bytes(gzip.compress(GOOD))

    def fail(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(safe_open.gzip.GzipFile, "read", fail)
    with pytest.raises(DataError, match="cannot be read: Input/output error; look at the disk"):
        rows_of(path)


def test_a_sound_file_packs_to_less_than_a_hundredth(tmp_path):
    rows = "".join(
        json.dumps({"text": f"the same words again, {i}", "label": "x"}) + "\n"
        for i in range(40_000)
    )
    assert len(rows) / len(zlib.compress(rows.encode(), 9)) < safe_open.RATIO / 2
