import os

import pytest

from fedloom.accounting import cores


@pytest.mark.parametrize(
    ("quota", "found"),
    [
        ("max 100000", 8),
        ("200000 100000", 2),
        ("150000 100000", 1),
        ("50000 100000", 1),  # half a core is still one thread
        ("1600000 100000", 8),
        ("", 8),
        ("100000 0", 8),
        (None, 8),
    ],
)
def test_the_quota_of_a_container_counts(monkeypatch, tmp_path, quota, found):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)), raising=False)
    monkeypatch.setattr(cores, "CONTROL_GROUP", tmp_path)
    if quota is not None:
        (tmp_path / "cpu.max").write_text(quota + "\n")
    assert cores.available_cores() == found


def test_cores_that_a_process_is_bound_to_count(monkeypatch, tmp_path):
    monkeypatch.setattr(cores, "CONTROL_GROUP", tmp_path)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {3, 5}, raising=False)
    assert cores.available_cores() == 2
    monkeypatch.delattr(os, "sched_getaffinity")
    assert cores.available_cores() == 64
