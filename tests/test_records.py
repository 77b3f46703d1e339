"""What a run says of itself at its end."""

from pathlib import Path

import pytest

from fedloom.evaluation.metrics import HEADLINES
from fedloom.records import summary_text

TOTALS = {"bytes_down": 2_000_000, "bytes_up": 1_000_000, "flops": 3e9, "seconds": 4.0}


@pytest.mark.parametrize(
    ("before", "after", "shown"),
    [
        (0.25, 0.75, "before 0.2500  after 0.7500  (+0.5000)"),
        (None, 0.75, "before not measured  after 0.7500"),
        (None, None, "before not measured  after not measured"),
    ],
)
def test_a_change_is_shown_where_both_ends_were_measured(before, after, shown):
    values = {"before": before, "after": after, "before_metrics": {}, "after_metrics": {}}
    values |= {"judged_on": "global"}
    text = summary_text(values | {"totals": TOTALS}, HEADLINES["preference"], Path("run"))
    assert text.splitlines()[0] == f"held-out {HEADLINES['preference'].name} {shown}"
    assert "2 MB down, 1 MB up (measured)" in text
