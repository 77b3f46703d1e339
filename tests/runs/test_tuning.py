"""Tuning by hand-made timings, and once by real ones: what is better, by how much, and what is written."""

import tomllib
from dataclasses import dataclass, field

import pytest

from fedloom.commands import tune as command
from fedloom.errors import ModelError, SettingsError
from fedloom.experiment.experiment import Experiment
from fedloom.runs import tuning
from fedloom.runs.assembly import assemble
from fedloom.runs.cohort_tuning import cohort_bench, cohort_candidates
from fedloom.runs.partitioning import partition_data
from fedloom.runs.tuning import Candidate, Trial, Tuning, tune
from fedloom.training.settings import TrainingSettings


@dataclass
class Bench:
    """Steps that take what is said, for each number of tokens: the same again and again, or in turn."""

    seconds: dict
    losses: dict = field(default_factory=dict)
    training: TrainingSettings = field(default_factory=TrainingSettings)
    steps: int = 1
    order: list = field(default_factory=list)

    def run(self, settings):
        tokens = settings.tokens_per_pass
        self.order.append(tokens)
        own = self.seconds[tokens]
        if isinstance(own, Exception):
            raise own
        turn = self.order.count(tokens)
        return (own[turn % len(own)] if isinstance(own, list) else own), 0.5, 100

    def loss(self, settings):
        return self.losses.get(settings.tokens_per_pass, 0.5)


def tried(bench, *values):
    return tuning._try(bench, "tokens_per_pass", values, 1000.0)


def test_all_values_are_timed_there_and_back_and_the_fastest_is_found():
    bench = Bench({8: 1.0, 16: 0.5, 32: 0.8})
    found = tried(bench, 8, 16, 32)
    assert bench.order[6:12] == [8, 16, 32, 32, 16, 8]  # after two of each to begin with
    assert [own.ratio for own in found.candidates] == pytest.approx([1, 2, 1.25])
    assert [own.speed for own in found.candidates] == pytest.approx([100, 200, 125])
    assert found.best.value == 16 and found.noise == tuning.LEAST_GAIN


@pytest.mark.parametrize(
    ("seconds", "why"),
    [
        ({8: 1.0, 16: 0.99}, "less than is worth a line"),
        ({8: [0.8, 1.2], 16: [0.7, 1.1]}, "two timings of one differ by 0.4"),
        ({8: 1.0, 16: [0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 1.6]}, "faster, but not every time"),
        ({8: 1.0, 16: 1.5}, "slower"),
    ],
)
def test_a_gain_within_what_timings_differ_by_is_none(seconds, why):
    assert tried(Bench(seconds), 8, 16).best is None, why


def test_a_value_that_changes_the_loss_or_does_not_fit_is_left_out():
    bench = Bench({8: 1.0, 16: 0.1, 32: MemoryError(), 64: 0.5}, losses={16: 0.6})
    found = tried(bench, 8, 16, 32, 64)
    assert [own.problem for own in found.candidates] == [
        "",
        "its loss is 0.6, not 0.5",
        "does not fit into memory",
        "",
    ]
    assert found.best.value == 64 and not found.candidates[1].seconds


def test_where_the_present_value_does_not_fit_there_is_nothing_to_compare_with():
    with pytest.raises(
        ModelError, match="tokens_per_pass = 8 does not fit into memory: set a smaller"
    ):
        tried(Bench({8: MemoryError(), 16: 1.0}), 8, 16)


def test_too_little_time_is_told_with_what_would_do():
    with pytest.raises(SettingsError, match=r"one optimizer step takes 2e\+09 s.*give about"):
        tried(Bench({8: 2e9, 16: 1.0}), 8, 16)


def test_examples_counted_in_a_pass_leave_nothing_to_tune(experiment):
    with pytest.raises(SettingsError, match=r"training.micro_batch_size = 2 says .* take it out"):
        tune(experiment(training={"micro_batch_size": 2}), 10.0)


FILE = """# ours
[training]     # how
learning_rate = 0.001
tokens_per_pass = "auto"  # by width
"""


def outcome(ratio, *, better):
    first = Candidate("tokens_per_pass", 512, 100, [1.0, 1.0], ratios=[1.0, 1.0])
    other = Candidate("tokens_per_pass", 256, 100, [0.9, 0.9], ratios=[ratio, ratio])
    trial = Trial((first, other), 0.03, other if better else None)
    return Tuning("", (trial,), {"training.tokens_per_pass": 256} if better else {})


def test_the_number_is_written_and_all_else_in_the_file_stays(tmp_path):
    path, link = tmp_path / "x.toml", tmp_path / "link.toml"
    path.write_text(FILE)
    path.chmod(0o640)
    link.symlink_to(path)
    (said,) = command._outcome(link, outcome(1.25, better=True), dry_run=False)
    assert path.read_text() == FILE.replace('"auto"', "256")
    assert link.is_symlink() and path.stat().st_mode & 0o777 == 0o640
    assert said == (
        "training.tokens_per_pass: 256 is 1.25 times as fast as 512 (1.25 to 1.25; two timings of one value "
        f"differ by 3.0%); written into {link}"
    )


@pytest.mark.parametrize(("better", "dry_run"), [(True, True), (False, False)])
def test_a_dry_run_and_a_gain_within_the_noise_write_nothing(tmp_path, better, dry_run):
    path = tmp_path / "x.toml"
    path.write_text(FILE)
    (said,) = command._outcome(path, outcome(1.02, better=better), dry_run=dry_run)
    assert path.read_text() == FILE and "not written" in said


def test_the_command_times_an_experiment_and_its_file_stays_sound(
    experiment, tmp_path, call, monkeypatch
):
    monkeypatch.setattr(
        tuning, "available_cores", lambda: 1
    )  # threads of others are not to be timed here
    monkeypatch.setattr(tuning, "LONGEST", 0.02)
    monkeypatch.setattr(tuning, "LEAST_GAIN", -1.0)  # whatever comes out is worth it
    path = tmp_path / "x.toml"
    text = "# a comment\n" + experiment().to_toml()
    path.write_text(text)
    code, said = call("tune", str(path), "--limit", "300")
    assert code == 0, said
    assert "DPO on client" in said and "tokens/s" in said and "training.tokens_per_pass:" in said
    assert "simulation.cohort: " in said
    before, after = tomllib.loads(text), tomllib.loads(path.read_text())
    own = Experiment.from_toml(path)
    for section, key in (("training", "tokens_per_pass"), ("simulation", "cohort")):
        found = after[section].pop(key, None)
        before[section].pop(key, None)
        assert found is None or getattr(getattr(own, section), key) == found
    assert after == before and path.read_text().startswith("# a comment\n")


def test_clients_that_cannot_be_trained_together_are_not_timed_and_it_is_said_why(
    experiment, tmp_path
):
    """Bottlenecks have no factors that can be stacked."""
    own = experiment(adapter={"kind": "ia3", "rank": 8})
    why = cohort_bench(own, assemble(own, partition_data(own)))
    assert why.startswith("clients are trained one by one: more is trained than LoRA's two factors")
    path = tmp_path / "x.toml"
    path.write_text(FILE)
    told = Tuning("", outcome(1.0, better=False).trials, {}, {"simulation.cohort": why})
    assert command._outcome(path, told, dry_run=False)[-1] == f"simulation.cohort: {why}; not timed"


def test_cohorts_are_timed_over_the_same_clients_and_steps(experiment):
    own = experiment(
        objective={"name": "sft"},
        data={"source": "builtin:instructions"},
        training={"batch_size": 1},
    )
    parts = assemble(own, partition_data(own))
    bench, sizes = cohort_bench(own, parts), cohort_candidates(own, parts)
    bench.steps = 2
    assert sizes[0] == 1 and 2 in sizes and max(sizes) <= 3
    runs = [bench.run(bench.training.model_copy(update={"cohort": size})) for size in sizes]
    assert len({tokens for _, _, tokens in runs}) == 1
    assert all(loss == pytest.approx(runs[0][1], rel=1e-3) for _, loss, _ in runs)
    assert all(seconds > 0 for seconds, _, _ in runs)


def cohorts_of(experiment, **sections):
    return experiment(
        objective={"name": "sft"},
        data={"source": "builtin:instructions", "builtin_rows": 24},
        training={"batch_size": 1},
        **sections,
    )


def test_of_an_asynchronous_method_as_many_clients_are_timed_as_its_buffer_holds(experiment):
    method, sizes = {"name": "fedbuff"}, {"clients": 3, "clients_per_round": 2}
    own = cohorts_of(experiment, method=method, federation=sizes)
    bench = cohort_bench(own, assemble(own, partition_data(own)))
    assert sorted(bench.exchange.requests) == [0, 1] and bench.exchange.buffered is None


def test_clients_that_fail_are_not_timed_and_it_is_said_why(experiment):
    def broken(client, payload):
        raise ModelError("no such layer")

    own = cohorts_of(experiment)
    parts = assemble(own, partition_data(own))
    parts.local.handlers = {**parts.local.handlers, "train": broken}
    assert cohort_bench(own, parts) == "client 0 cannot be timed: no such layer"


def test_where_clients_fail_only_together_what_was_found_of_other_settings_stays(
    experiment, monkeypatch
):
    def fail(bench, setting, values, seconds):
        if setting == "cohort":
            raise ModelError("client 0 cannot be timed: no such layer")
        return outcome(1.25, better=True).trials[0]

    monkeypatch.setattr(tuning, "_try", fail)
    monkeypatch.setattr(tuning, "cohort_bench", lambda *_: Bench({}))
    found = tune(cohorts_of(experiment), 10.0)
    assert found.changes == {"training.tokens_per_pass": 256}
    assert found.untried == {"simulation.cohort": "client 0 cannot be timed: no such layer"}


def test_a_file_that_lines_cannot_be_put_into_is_refused_before_anything_is_timed(tmp_path):
    path = tmp_path / "x.toml"
    path.write_text("training = { learning_rate = 0.001 }\n")
    with pytest.raises(SettingsError, match=r"no line of \[training\] can be set"):
        command._check(path, None, dry_run=False)
    command._check(path, None, dry_run=True)


@pytest.mark.parametrize("limit", ["nan", "inf", "0"])
def test_a_limit_is_a_number_of_seconds(call, limit):
    code, said = call("tune", "x.toml", "--limit", limit)
    assert code == 2 and "--limit" in said
