"""Data files that nobody meant to write: sound ones of every kind and layout, changed in many ways.

A file is made from its number alone, so that one that fails can be made again:
``python tests/strange_files.py SEED NUMBER FOLDER``.
"""

import csv
import gc
import gzip
import io
import json
import random
import resource
import signal
import sys
import time
import traceback
import warnings
from decimal import Decimal
from pathlib import Path

ENDINGS = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".csv", ".csv.gz", ".parquet")
SECONDS, MEGABYTES = 10, 1000

RAW = (
    r'"\ud800"',
    r'"\udc00\ud800 ok"',
    r'"\u0000"',
    r'"\u001b[2J\u001b]0;title\u0007"',
    r'"\u202egnp.exe\u2066"',
    '"[/nope] [red]"',
    r'"$\\frac{0$"',
    '"_hidden"',
    '"\u2028\u2029"',
    "NaN",
    "-Infinity",
    "1e999",
    "-1e-999",
    "1" * 4000,
    "1" * 101,
    "1" * 5000,
    '{"a": 1, "a": 2}',
    '{"a": {"b": 1, "b": "x"}}',
    "[" * 99 + "]" * 99,
    "[" * 200 + "]" * 200,
    "[" * 10_000 + "]" * 10_000,
    '{"a":' * 500 + "1" + "}" * 500,
    "[" * 3000,
    '"' + "x" * 300_000 + '"',
    "[" + "[]," * 3000 + "0]",
    "null",
    "true",
    "[]",
    "{}",
    "3.5",
    "-0",
    '""',
    '" "',
    "[null, 1, {}]",
    '[{"role": "user"}]',
    '[{"role": "assistant", "content": null}]',
    '[{"from": ["x"], "value": 3}]',
    '[{"role": {}, "content": "a"}]',
)
"""JSON, or nearly, that stands in place of a value."""

TEXTS = (
    "\x00",
    "\x1b[31m",
    "\u202e",
    "[/nope]",
    "$\\frac{0$",
    "_x",
    "\r",
    "\n",
    "a\r\nb",
    "\u2028",
    '"',
    '""',
    ",",
    "x" * 200_000,
    "",
    "\ufeff",
    "é",
    "\U0001f600",
    "NaN",
    "9" * 4000,
)

KINDS = ("instruction", "preference", "feedback", "labelled")


def words(rng):
    return " ".join(
        rng.choice(("so", "what", "is", "é", "7", "\U0001f600", "ja")) for _ in range(6)
    )


def sound_row(rng, kind):
    """A row of one of the layouts of a kind."""
    turns = [{"role": "user", "content": words(rng)}, {"role": "assistant", "content": words(rng)}]
    said = [{"from": "human", "value": words(rng)}, {"from": "gpt", "value": words(rng)}]
    return {
        "instruction": (
            {"prompt": words(rng), "completion": words(rng)},
            {"messages": turns},
            {"conversations": said},
            {"text": words(rng)},
        ),
        "preference": (
            {"prompt": words(rng), "chosen": words(rng) + " a", "rejected": words(rng) + " b"},
            {"chosen": turns, "rejected": [turns[0], {"role": "assistant", "content": "no"}]},
            {
                "instruction": words(rng),
                "output_1": "a",
                "output_2": "b",
                "label": rng.choice((1, 2)),
            },
        ),
        "feedback": (
            {"prompt": words(rng), "completion": words(rng), "label": rng.random() < 0.5},
            {"messages": turns, "label": rng.choice((0, 1))},
        ),
        "labelled": ({"text": words(rng), "label": rng.choice(("yes", "no", "may be"))},),
    }[kind]


def sound_rows(rng, kind, *, flat):
    layouts = sound_row(rng, kind)
    fit = [
        n
        for n, own in enumerate(layouts)
        if not flat or not any(isinstance(v, list) for v in own.values())
    ]
    layout = rng.choice(fit)
    count = rng.choice((0, 1, 8, 20, 60, 60, 60, 60, 60))
    return [
        {**sound_row(rng, kind)[layout], "site": rng.choice("ABC"), "n": number}
        for number in range(count)
    ]


def lines_of(rng, rows):
    """Lines of JSON, in some of which a value, a key or all is something strange."""
    lines = [json.dumps(row, ensure_ascii=rng.random() < 0.5) for row in rows]
    for _ in range(rng.choice((0, 1, 1, 2, 8))):
        if not rows:
            break
        place = rng.randrange(len(rows))
        row, raw = rows[place], rng.choice(RAW)
        match rng.randrange(7):
            case 0:
                lines[place] = raw
            case 1 | 2 | 3:
                key = rng.choice(list(row))
                hole = json.dumps({**row, key: "HOLE"})
                lines[place] = hole.replace('"HOLE"', raw)
            case 4:
                lines[place] = json.dumps(
                    {**row, rng.choice(TEXTS)[: rng.choice((5, 300_000))]: rng.choice(TEXTS)}
                )
            case 5:
                gone = rng.choice(list(row))
                lines[place] = json.dumps({k: v for k, v in row.items() if k != gone})
            case 6:
                lines.insert(place, rng.choice(("", " ", "\t", "{", "}", "\x00", lines[place] * 2)))
    return lines


def json_lines(rng, rows):
    text = rng.choice(("\n", "\n", "\n", "\r\n", "\r", "\n\n")).join(lines_of(rng, rows))
    return encoded(rng, text + "\n" * rng.randrange(3))


def json_whole(rng, rows):
    lines = lines_of(rng, rows)
    text = rng.choice((", ", ",\n")).join(line for line in lines if line.strip())
    shape = rng.choice(
        ("[%s]",) * 6 + ('{"a": [%s]}', '{"a": [%s], "a": []}', "%s", "[%s", '{"a": {"b": [%s]}}')
    )
    return encoded(rng, shape % text if "%s" in shape else text)


def csv_text(rng, rows):
    out = io.StringIO()
    names = list(rows[0]) if rows else ["text", "label"]
    match rng.randrange(12):
        case 0:
            names = [*names, names[0]]
        case 1:
            names = ["", *names]
        case 2:
            names = [rng.choice(TEXTS), *names[1:]]
    writer = csv.writer(
        out,
        delimiter=rng.choice(",,,,,,,,;\t"),
        lineterminator=rng.choice(("\r\n", "\n", "\n", "\r")),
        quoting=rng.choice((csv.QUOTE_MINIMAL, csv.QUOTE_ALL)),
    )
    if rng.random() < 0.95:
        writer.writerow(names)
    for row in rows:
        values = [row.get(name, "") for name in names]
        match rng.randrange(40):
            case 0:
                values.append(rng.choice(TEXTS))
            case 1:
                values.pop()
            case 2:
                values[rng.randrange(len(values))] = rng.choice(TEXTS)
        writer.writerow(values)
    text = out.getvalue()
    if text and rng.random() < 0.2:
        place = rng.randrange(len(text))
        text = text[:place] + rng.choice(('"', '""', '"\n', ",", "\x00", "\r")) + text[place:]
    return encoded(rng, text)


def encoded(rng, text):
    name = rng.choice(
        ("utf-8",) * 30 + ("utf-8-sig", "utf-16", "utf-16-le", "latin-1", "utf-32", "utf-8-sig")
    )
    return text.encode(name, errors="surrogatepass" if name.startswith("utf") else "replace")


def parquet(rng, rows):
    """A Parquet file with columns of any type beside, or in place of, its own."""
    import pyarrow as pa
    import pyarrow.parquet

    count = len(rows)
    table = pa.Table.from_pylist(rows) if rows else pa.table({"text": pa.array([], pa.string())})
    for _ in range(rng.choice((0, 1, 1, 3))):
        strange = (
            lambda: pa.array([b"\xff\x00"] * count, pa.binary()),
            lambda: pa.array([Decimal("1.5")] * count, pa.decimal128(10, 2)),
            lambda: pa.array([2**62] * count, pa.timestamp("ms")),
            lambda: pa.array([2**62 + 1] * count, pa.timestamp("ns", "Nowhere/City")),
            lambda: pa.array([-(2**62)] * count, pa.duration("us")),
            lambda: pa.array([2**31 - 1] * count, pa.date32()),
            lambda: pa.array([[("k", 1), ("k", 2)]] * count, pa.map_(pa.string(), pa.int64())),
            lambda: pa.array([{"a": {"b": [1]}}] * count),
            lambda: pa.array([[[["x"]]], None, []] * count)[:count],
            lambda: pa.array([float("nan"), float("inf"), None] * count, pa.float64())[:count],
            lambda: pa.nulls(count),
            lambda: pa.array([rng.choice(TEXTS) for _ in range(count)]).dictionary_encode(),
            lambda: pa.array([rng.choice(TEXTS) for _ in range(count)], pa.large_string()),
            lambda: pa.array([b"ab\xff" for _ in range(count)]).cast(pa.binary()).view(pa.string()),
            lambda: pa.array([b"12345678"] * count, pa.binary(8)),
            lambda: pa.array([True, None] * count)[:count],
            lambda: pa.array([1, 2] * count, pa.uint64())[:count],
        )
        column = rng.choice(strange)()
        name = rng.choice((*table.column_names, "extra", "label", rng.choice(TEXTS)[:500]))
        if name in table.column_names and rng.random() < 0.8:
            table = table.set_column(table.column_names.index(name), name, column)
        else:
            table = table.append_column(name, column)
    out = io.BytesIO()
    pyarrow.parquet.write_table(
        table,
        out,
        compression=rng.choice(("none", "snappy", "gzip", "zstd", "brotli", "lz4")),
        row_group_size=rng.choice((1, 7, 1000)),
        use_dictionary=rng.random() < 0.7,
        version="2.6",
        data_page_version=rng.choice(("1.0", "2.0")),
    )
    return out.getvalue()


def changed(rng, data):
    """Some bytes changed, cut out, doubled, put in or exchanged."""
    found = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5, 30))):
        start = rng.randrange(len(found) + 1)
        end = min(len(found), start + rng.choice((1, 1, 4, 50, 1000)))
        match rng.randrange(7):
            case 0 | 1:
                found[start:end] = bytes(
                    rng.choice((0, 255, rng.randrange(256))) for _ in found[start:end]
                )
            case 2:
                del found[start:end]
            case 3:
                del found[start:]
            case 4:
                found[start:start] = rng.randbytes(rng.choice((1, 4, 40)))
            case 5:
                found[start:start] = found[start:end] * rng.choice((1, 3))
            case 6:
                if found:
                    found[start % len(found)] ^= 1 << rng.randrange(8)
    return bytes(found)


def make_file(seed, number, folder):
    """Write a file from its number; return its path, its kind and the generator to go on with."""
    rng = random.Random(f"{seed} {number}")
    kind, ending = rng.choice(KINDS), ENDINGS[number % len(ENDINGS)]
    rows = sound_rows(rng, kind, flat=".csv" in ending)
    inner = ending.removesuffix(".gz")
    make = {".jsonl": json_lines, ".json": json_whole, ".csv": csv_text, ".parquet": parquet}[inner]
    data = make(rng, rows)
    if rng.random() < 0.2:
        data = changed(rng, data)
    if ending.endswith(".gz"):
        match rng.randrange(8):
            case 0:
                half = len(data) // 2
                data = gzip.compress(data[:half], 1) + gzip.compress(data[half:], 1)
            case 1:
                data = gzip.compress(gzip.compress(data, 1), 1)
            case 2:
                data = gzip.compress(data, 1) + rng.choice(
                    (b"\x00" * 9, b"more", rng.randbytes(30))
                )
            case 3:
                pass
            case _:
                data = gzip.compress(data, 1)
        if rng.random() < 0.2:
            data = changed(rng, data)
    if rng.random() < 0.01:
        data = b""
    path = Path(folder) / f"{number}{ending}"
    path.write_bytes(data)
    return path, kind, rng


class TooSlowError(Exception):
    """A file took more of a core than it may."""


def _stop(*_):
    raise TooSlowError(f"more than {SECONDS} s of a core")


def read(path, kind, rng):
    """Read a file as an experiment would, and show what is in it; return what came of it."""
    import numpy as np

    from fedloom.data.loading import load_examples
    from fedloom.data.sources import DataSettings
    from fedloom.display.untrusted_text import HIDDEN, message
    from fedloom.errors import FedloomError

    settings = DataSettings(
        source=str(path), kind=kind, max_bad_share=rng.choice((0.05, 1.0, 1.0)), test_fraction=0.3
    )
    try:
        loaded = load_examples(settings, np.random.default_rng(0))
    except FedloomError as error:
        shown = message(str(error))
        lines = shown.splitlines()
        assert shown.strip() and "Traceback" not in shown, shown
        assert len(lines) <= 20 and max(map(len, lines)) <= 12_000, shown
        assert path.name in shown and not HIDDEN.search(shown), shown
        return "refused"
    rows = [*loaded.train, *loaded.test]
    assert rows and all(0 < len(str(bad)) < 500 for bad in loaded.bad_rows), loaded.bad_rows
    repr(rows).encode()
    json.dumps([row.columns for row in rows]).encode()
    for row in rows:
        for value in vars(row).values():
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            text.encode()
    if rng.random() < 0.1:
        show(loaded, kind, rng)
    return "rows left out" if loaded.bad_rows else "rows"


def show(loaded, kind, rng):
    """Divide rows, and show who holds what on a terminal and in a figure."""
    import numpy as np
    from rich.table import Table

    from fedloom.commands.terminal import PlainConsole
    from fedloom.data.partition import PartitionSettings, partition, shares
    from fedloom.display.untrusted_text import HIDDEN
    from fedloom.errors import DataError
    from fedloom.reports.figures import partition_svg

    names = sorted(set.intersection(*(set(row.columns) for row in loaded.train)))
    column = "label" if kind == "labelled" else rng.choice([*names, "site"])
    settings = PartitionSettings(kind="column", column=column)
    try:
        held = partition(loaded.train, settings, 2, np.random.default_rng(0))
        found = shares([[loaded.train[i] for i in own] for own in held], settings)
    except DataError:
        return
    clients = [{"counts": dict(zip(found.values, own, strict=True))} for own in found.counts]
    record = {"column": found.column, "values": found.values, "clients": clients}
    partition_svg(record, standalone=True).encode()
    out = io.StringIO()
    table = Table(*found.values[:50], title=found.column)
    PlainConsole(file=out, width=200).print(table, *found.values[:50])
    assert not HIDDEN.search(out.getvalue().replace("\n", ""))


def peak():
    """Megabytes of memory that this process has had at most since they were last counted anew."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) // 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def try_files(seed, numbers, folder):
    """Make and read files; return how often what came of them, and what should not have."""
    warnings.simplefilter("error")
    bound = 3 * 2**30  # of address space, so that a bomb ends this process and not the machine
    resource.setrlimit(resource.RLIMIT_AS, (bound, resource.getrlimit(resource.RLIMIT_AS)[1]))
    signal.signal(signal.SIGPROF, _stop)
    counts, wrong, slowest, largest = {}, [], 0.0, 0
    for number in numbers:
        path, kind, rng = make_file(seed, number, folder)
        Path("/proc/self/clear_refs").write_text("5")
        started = time.process_time()
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        try:
            came = read(path, kind, rng)
        except BaseException:
            came = "wrong"
            wrong.append(f"{seed} {path.name}: {traceback.format_exc(limit=-6)}")
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
        taken, used = time.process_time() - started, peak()
        if taken > SECONDS or used > MEGABYTES:
            wrong.append(f"{seed} {path.name}: {taken:.1f} s, {used} MB")
        if came != "wrong":
            path.unlink()
        slowest, largest = max(slowest, taken), max(largest, used)
        key = f"{path.name.partition('.')[2]} {came}"
        counts[key] = counts.get(key, 0) + 1
    gc.collect()
    return counts, wrong, slowest, largest


if __name__ == "__main__":
    PATH, KIND, RNG = make_file(sys.argv[1], int(sys.argv[2]), sys.argv[3])
    print(PATH, read(PATH, KIND, RNG))
