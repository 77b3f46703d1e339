"""A client's ledger of all runs: what is added up, what a budget refuses, and what no accident forgets."""

import time
from dataclasses import replace

import pytest

from fedloom.errors import PolicyError, PrivacyError
from fedloom.privacy.accounting import Releases, epsilon
from fedloom.privacy.client_ledger import Budget, ChargedRun, ClientLedger, digest_of_rows
from fedloom.privacy.gaussian import delta_of

DELTA = 1e-5
ROWS = [bytes([i]) * 16 for i in range(20)]


def run(number, rows=ROWS, z=4.0, q=1.0, steps=5, **changes):
    own = ChargedRun(
        f"{number:032x}", "server:9092", ("rows.jsonl",), digest_of_rows(rows), len(rows), len(rows), 1,
        None, 1.0, z, q, steps,
    )  # fmt: skip
    return replace(own, **changes)


@pytest.fixture
def ledger(tmp_path):
    return ClientLedger(tmp_path / "privacy")


def made(ledger, charged, steps, rows=ROWS, budget=None):
    """Let a run in and have it make noisy steps."""
    own = ledger.begin(charged, rows, budget)
    for step in range(steps):
        own.spend(f"{charged.run} {step}".encode(), b"%d" % step)
    return own


def test_runs_of_all_coordinators_on_the_same_rows_are_one_composition(ledger):
    """Without sampling the closed form of Gaussian noise is the oracle: z_1, z_2 are mu^2 = sum 1 / z^2."""
    first, second = run(1), run(2, z=8.0, server="elsewhere:9092", steps=7)
    made(ledger, first, 5)
    made(ledger, second, 3)
    direct = epsilon([Releases(4.0, 1.0, 5), Releases(8.0, 1.0, 3)], DELTA).epsilon
    assert ledger.spent(second, Budget(8.0, DELTA)) == direct
    assert delta_of(direct, (5 / 16 + 3 / 64) ** 0.5) == pytest.approx(DELTA, rel=0.01)
    assert [ledger.made(own) for own in ledger.runs()] == [5, 3]


def test_rows_are_known_by_what_they_say_or_by_their_source(ledger):
    """A file that was renamed, or has grown, or is read by another template has the same rows."""
    made(ledger, run(1), 5)
    others = [bytes([100 + i]) * 16 for i in range(20)]
    renamed = run(2, [*ROWS[3:], *others], sources=("new.jsonl",))
    reworded, foreign = run(3, others), run(4, others, sources=("foreign.jsonl",))
    for own, rows, shared in (
        (renamed, [*ROWS[3:], *others], 1),
        (reworded, others, 1),
        (foreign, others, 0),
    ):
        assert len(ledger.shared(own, rows)) == shared


def test_a_run_that_would_pass_the_budget_is_refused_with_what_is_left(ledger):
    budget = Budget(3.0, DELTA)
    made(ledger, run(1), 5, budget=budget)
    before = (ledger.folder / "ledger.jsonl").read_bytes()
    with pytest.raises(PolicyError) as refused:
        ledger.begin(run(2), ROWS, budget)
    assert refused.value.refusals[0].line == "policy.privacy.max_epsilon"
    said = str(refused.value)
    spent, whole = (epsilon([Releases(4.0, 1.0, n)], DELTA).epsilon for n in (5, 10))
    fits = max(
        n for n in range(6) if epsilon([Releases(4.0, 1.0, 5 + n)], DELTA, "rdp").epsilon <= 3.0
    )
    assert f"epsilon {spent:.4g} of 3 is spent" in said and f"it would be {whole:.4g}" in said
    assert f"room for at least {fits} of its 5 noisy steps" in said
    assert (ledger.folder / "ledger.jsonl").read_bytes() == before
    foreign = [bytes([100 + i]) * 16 for i in range(20)]
    made(ledger, run(3, foreign, sources=("foreign.jsonl",)), 5, foreign, budget)  # other rows


def test_two_runs_at_once_stop_before_the_budget_is_passed(ledger):
    """Each fits by itself; together they do not, whoever is faster."""
    budget = Budget(3.0, DELTA)
    first, second = (ledger.begin(run(number), ROWS, budget) for number in (1, 2))
    count = 0

    def in_turns():
        nonlocal count
        for step in range(5):
            for own in (first, second):
                own.spend(f"{own.path} {step}".encode(), b"%d" % step)
                count += 1

    with pytest.raises(PolicyError, match="one more noisy step would pass it"):
        in_turns()
    assert epsilon([Releases(4.0, 1.0, count)], DELTA).epsilon <= 3.0
    assert epsilon([Releases(4.0, 1.0, count + 1)], DELTA).epsilon > 3.0


def test_a_run_makes_no_more_steps_than_it_was_let_in_for(ledger):
    own = made(ledger, run(1), 5)
    with pytest.raises(PrivacyError, match="5 noisy steps, as many as this run may make"):
        own.spend(b"another", b"its batch")


def test_other_terms_of_one_run_are_charged_beside_the_first(ledger):
    first = run(1)
    made(ledger, first, 2)
    for changes in (
        {"noise_multiplier": 2.0},
        {"sampling": 0.5},
        {"clip": 2.0},
        {"column": "patient"},
    ):
        other = replace(first, **changes)
        own = ledger.begin(other, ROWS, None)
        assert len(own) == 0 and first.name != other.name
    assert len(ledger.runs()) == 5
    assert len(ledger.begin(replace(first, steps=9), ROWS, None)) == 2  # the same, and longer
    assert len(ledger.runs()) == 5 and ledger.runs()[0].steps == 9


def test_a_budget_of_another_unit_counts_more_and_no_sampling(ledger):
    """A row moves its patient's clipped gradient by 2 C; a patient's 3 rows move a sum by 3 C."""
    of_patients = run(1, z=6.0, q=0.1, units=10, most=3, column="patient")
    of_rows = run(2, z=6.0, q=0.1)
    for own in (of_patients, of_rows):
        made(ledger, own, 4)
    by_row = epsilon([Releases(3.0, 1.0, 4), Releases(6.0, 0.1, 4)], DELTA).epsilon
    by_patient = epsilon([Releases(6.0, 0.1, 4), Releases(2.0, 1.0, 4)], DELTA).epsilon
    assert ledger.spent(of_rows, Budget(8.0, DELTA)) == by_row
    assert ledger.spent(of_patients, Budget(8.0, DELTA, "patient")) == by_patient


def test_what_was_lost_counts_as_all_that_was_allowed(ledger):
    charged, budget = run(1), Budget(8.0, DELTA)
    made(ledger, charged, 2)
    (ledger.folder / "steps" / f"{charged.name}.txt").unlink()
    assert ledger.made(charged) == 5
    (ledger.folder / "rows" / charged.rows).write_bytes(b"")
    foreign = [bytes([100 + i]) * 16 for i in range(20)]
    assert len(ledger.shared(run(2, foreign, sources=("foreign.jsonl",)), foreign)) == 1
    assert ledger.spent(charged, budget) == epsilon([Releases(4.0, 1.0, 5)], DELTA).epsilon


def test_a_step_that_was_not_written_whole_drew_no_noise(ledger):
    charged = run(1)
    made(ledger, charged, 3)
    path = ledger.folder / "steps" / f"{charged.name}.txt"
    path.write_bytes(path.read_bytes()[:-7])
    assert ledger.made(charged) == 2 == len(ledger.begin(charged, ROWS, None))


def test_to_look_at_a_ledger_changes_nothing_while_another_process_writes(ledger):
    made(ledger, run(1), 1)
    path = ledger.folder / "ledger.jsonl"
    with path.open("a") as file:
        file.write('{"run": "half')
    before = path.read_bytes()
    assert len(ledger.runs()) == 1 and path.read_bytes() == before
    made(ledger, run(2), 1)  # the process that writes cuts it off
    assert len(ledger.runs()) == 2


@pytest.mark.parametrize("damage", ["changed", "gone"])
def test_a_damaged_ledger_lets_nothing_in(ledger, damage):
    made(ledger, run(1), 2)
    path = ledger.folder / "ledger.jsonl"
    if damage == "gone":
        path.unlink()
    else:
        path.write_text(
            path.read_text().replace('"noise_multiplier": 4.0', '"noise_multiplier": 9.0')
        )
    with pytest.raises(PrivacyError, match="put back a copy"):
        ledger.begin(run(2), ROWS, None)


def test_a_delta_that_shows_a_row_whole_is_refused(ledger):
    with pytest.raises(PolicyError, match=r"delta = 0.1 is not below 1 / 20"):
        ledger.begin(run(1), ROWS, Budget(8.0, 0.1))


def test_only_the_client_can_read_it(ledger):
    made(ledger, run(1), 1)
    assert ledger.folder.stat().st_mode & 0o077 == 0
    for name in ("ledger.jsonl", "steps", "rows"):
        assert (ledger.folder / name).stat().st_mode & 0o077 == 0


def test_steps_whose_file_is_lost_or_changed_are_all_that_were_allowed(ledger):
    charged = run(1)
    own = made(ledger, charged, 2)
    assert ledger.made(charged) == 2 and own.path.stat().st_mode & 0o777 == 0o600
    text = own.path.read_text()
    own.path.write_text(text.partition("\n")[2])
    assert ledger.made(charged) == charged.steps
    own.path.unlink()
    assert ledger.made(charged) == charged.steps
    with pytest.raises(PrivacyError, match="is gone: what this run has spent"):
        ledger.begin(charged, ROWS, None)


def test_a_ledger_without_the_runs_of_its_steps_is_refused(ledger):
    made(ledger, run(1), 2)
    (ledger.folder / "ledger.jsonl").write_text("")
    with pytest.raises(PrivacyError, match="lacks runs whose noisy steps were made"):
        ledger.runs()


def test_rows_that_a_run_with_the_column_did_not_have_may_all_be_of_its_largest_unit(ledger):
    few = ROWS[:3]
    whole, part = run(1), run(2, few, column="patient", most=2, units=2)
    made(ledger, whole, 1)
    made(ledger, part, 1, few)
    own = ledger._release(whole, 1, "patient", [whole, part])
    assert own.noise_multiplier == 4.0 / (2 + len(ROWS) - 3) and own.sampling == 1.0


def test_a_line_that_is_nested_without_end_is_one_error(ledger):
    made(ledger, run(1), 1)
    with (ledger.folder / "ledger.jsonl").open("a") as file:
        file.write("[" * 100_000 + "\n")
    with pytest.raises(PrivacyError, match="line 2 is not what was written"):
        ledger.runs()


def test_a_delta_of_just_one_over_the_units_shows_a_row_whole(ledger):
    with pytest.raises(PolicyError, match=r"delta = 0.05 is not below 1 / 20"):
        ledger.begin(run(1), ROWS, Budget(80.0, 1 / 20))
    assert len(ledger.begin(run(1), ROWS, Budget(80.0, 0.0499))) == 0


def test_when_a_run_began_is_written_down_once(ledger):
    made(ledger, run(1, begun=12.5), 1)
    before = time.time()
    made(ledger, run(2), 1)
    first, second = ledger.runs()
    assert first.begun == 12.5 and before <= second.begun <= time.time()
    assert len(first.name) == 32 and first.name == replace(first, begun=99.0).name


def test_more_steps_than_were_made_can_be_asked_about(ledger):
    charged, budget = run(1), Budget(8.0, DELTA)
    made(ledger, charged, 2)
    assert ledger.spent(charged, budget, 5) == epsilon([Releases(4.0, 1.0, 5)], DELTA).epsilon
    assert ledger.spent(charged, budget, 0) == 0.0


def test_a_unit_has_no_more_rows_than_its_run(ledger):
    """A patient of 50 rows elsewhere has 20 of 20 here at most; without a run that tells, all may be one's."""
    whole = run(1)
    large = run(2, ROWS[:19], column="patient", most=50, units=1)
    made(ledger, whole, 1)
    assert ledger._release(whole, 1, "patient", [whole]).noise_multiplier == 4.0 / 20
    made(ledger, large, 1, ROWS[:19])
    assert ledger._release(whole, 1, "patient", [whole, large]).noise_multiplier == 4.0 / 20
    of_another = replace(large, column="ward")
    assert ledger._release(of_another, 1, "patient", [whole]).noise_multiplier == 4.0 / (2 * 19)
