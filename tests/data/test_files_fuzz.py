"""Files of any content: each ends in rows or in one clear error, within bounds of time and memory."""

import multiprocessing
from collections import Counter
from concurrent.futures import ProcessPoolExecutor

import pytest

from sampling import drawn, tries
from strange_files import MEGABYTES, SECONDS, try_files

PROCESSES, CHUNK = 2, 25


def fuzzed(seed, count, folder):
    """Try so many files in warm processes; return a line on each kind of outcome."""
    counts, wrong, slowest, largest = Counter(), [], 0.0, 0
    chunks = [range(start, min(count, start + CHUNK)) for start in range(0, count, CHUNK)]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(PROCESSES, mp_context=context) as pool:
        asked = [pool.submit(try_files, seed, chunk, str(folder)) for chunk in chunks]
        for chunk, answer in zip(chunks, asked, strict=True):
            try:
                own, problems, seconds, megabytes = answer.result(timeout=5 * CHUNK * SECONDS)
            except Exception as error:  # a process that died takes the pool with it
                wrong.append(f"{seed} {chunk}: {error!r}")
                break
            counts.update(own)
            wrong += problems
            slowest, largest = max(slowest, seconds), max(largest, megabytes)
    assert not wrong, f"{len(wrong)} of {count}:\n" + "\n".join(wrong[:5])
    assert counts.total() == count
    return [
        *(f"{n:6} {what}" for what, n in sorted(counts.items())),
        f"{slowest:.2f} s, {largest} MB",
    ]


def test_a_hundred_files_end_in_rows_or_in_one_error(tmp_path):
    lines = fuzzed("files", 100, tmp_path)
    came = {line.split(maxsplit=2)[2] for line in lines[:-1]}
    assert came == {"rows", "rows left out", "refused"}


@pytest.mark.parametrize("count", tries(2_000, 20_000))
def test_thousands_of_files_end_in_rows_or_in_one_error(count, tmp_path):
    seed = f"files {drawn('files').getrandbits(32)}"
    print(f"{count} files from {seed!r}, at most {SECONDS} s and {MEGABYTES} MB each:")
    print("\n".join(fuzzed(seed, count, tmp_path)))
