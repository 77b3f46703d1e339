"""What every metric means: name, formula, unit, range, and what it is a mean over. Pure data.

``docs/metrics.md`` is written from this file (``python -m fedloom.reports.glossary > docs/metrics.md``),
and pages hold the entries of the metrics that they show. A name has one definition wherever it is used;
where a formula depends on the kind of rows, the entry says so.

Symbols: y+ and y- are the chosen and the rejected answer to a prompt x; log pi(y|x) is the sum of the
log-probabilities of the answer's tokens under the trained model, log pi0(y|x) under the model before
training; r2 is an explicit reward head's value.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

REWARD = "r = beta (log pi(y|x) - log pi0(y|x)), plus gamma r2(x, y) where there is a reward head"


@dataclass(frozen=True)
class Metric:
    """One definition.

    Attributes:
        name: As it stands in records and on pages.
        formula: What is computed.
        unit: Of its values; 1 for a plain number.
        lowest: Least value, ``None`` where there is none.
        highest: Largest value, likewise.
        over: What it is a mean (or a share, or a least value) over.
        used: Where it stands: held-out, training, clients, judges, cost.
    """

    name: str
    formula: str
    unit: str
    lowest: float | None
    highest: float | None
    over: str
    used: str

    @property
    def counted(self) -> bool:
        """Whether it is the share of rows (or pairs) that are won, so that their number says how sure."""
        return (self.lowest, self.highest) == (0, 1) and self.over in ("rows", "pairs")

    @property
    def bounds(self) -> tuple[float, float]:
        """The range as numbers, infinite where there is no end."""
        return (
            -math.inf if self.lowest is None else self.lowest,
            math.inf if self.highest is None else self.highest,
        )

    @property
    def range(self) -> str:
        """The range in words."""
        if self.lowest is None:
            return "any" if self.highest is None else f"at most {self.highest:g}"
        if self.highest is None:
            return f"{self.lowest:g} or more"
        return f"{self.lowest:g} to {self.highest:g}"


def _share(name: str, formula: str, over: str, used: str) -> Metric:
    return Metric(name, formula, "1", 0, 1, over, used)


HELD_OUT = (
    Metric(
        "loss",
        "instructions: -log p of a completion token given what precedes it; pairs: -log "
        "sigmoid(r(y+) - r(y-)) "
        "(DPO's loss at the objective's beta, 0.1 where it has none); labelled texts: "
        "cross-entropy of the "
        "class; choices: mean -log p per token of the right one",
        "nats",
        0,
        None,
        "completion tokens; pairs; texts; rows",
        "held-out",
    ),
    Metric("perplexity", "exp(loss)", "1", 1, None, "completion tokens", "held-out"),
    _share(
        "token_accuracy",
        "the most probable token is the one in the data",
        "completion tokens",
        "held-out, training",
    ),
    _share(
        "accuracy",
        "labelled texts: the most probable class is the right one; choices: the right one has "
        "the lowest mean loss per token",
        "rows",
        "held-out, training",
    ),
    _share("preference_accuracy", "r(y+) > r(y-), ties count half", "pairs", "held-out"),
    _share(
        "implicit_accuracy",
        "the implicit reward beta (log pi - log pi0) alone is higher for y+, ties count half",
        "pairs",
        "held-out, training",
    ),
    _share(
        "explicit_accuracy",
        "the reward head's r2 alone is higher for y+, ties count half",
        "pairs",
        "held-out, training",
    ),
    _share(
        "likelihood_accuracy", "log pi(y+|x) > log pi(y-|x), ties count half", "pairs", "held-out"
    ),
    _share(
        "normalised_accuracy",
        "mean log-probability per token under pi is higher for y+, ties count half",
        "pairs",
        "held-out",
    ),
    _share(
        "longer_accuracy",
        "y+ has more tokens, ties count half: what the rule 'the longer answer is the chosen one' "
        "reaches",
        "pairs",
        "held-out",
    ),
    _share(
        "selection_accuracy",
        "the selector says that y+ is better: held-out, by the sum of its margins in both orders; in "
        "training, of each order; ties count half",
        "pairs",
        "held-out, training",
    ),
    _share(
        "single_order_accuracy",
        "the selector says that y+ is better, asked in one order; ties count half",
        "questions, two a pair",
        "held-out",
    ),
    _share(
        "first_chosen",
        "the selector says that the answer that comes first is better; 0.5 where positions do not matter",
        "questions, two a pair",
        "held-out",
    ),
    _share(
        "feedback_auc",
        "r of a desirable answer > r of an undesirable one, ties count half; 0.5 where one class is "
        "missing",
        "pairs of a desirable and an undesirable answer",
        "held-out",
    ),
    _share(
        "implicit_auc", "feedback_auc by the implicit reward alone", "as feedback_auc", "held-out"
    ),
    _share("explicit_auc", "feedback_auc by the reward head alone", "as feedback_auc", "held-out"),
    _share(
        "rouge_l",
        "ROUGE-L (F1) of the model's greedy answer and the most similar accepted one",
        "answers",
        "held-out",
    ),
    _share(
        "exact_match",
        "the model's greedy answer is an accepted one, but for white space around them",
        "answers",
        "held-out",
    ),
    Metric(
        "reward_margin", f"r(y+) - r(y-), {REWARD}", "1", None, None, "pairs", "held-out, training"
    ),
    Metric("reward_desirable", REWARD, "1", None, None, "desirable answers", "held-out, training"),
    Metric(
        "reward_undesirable", REWARD, "1", None, None, "undesirable answers", "held-out, training"
    ),
)

TRAINING = (
    Metric(
        "training loss",
        "the objective's own loss, with all of its terms",
        "nats, or as the objective has it",
        None,
        None,
        "the examples of a round",
        "training",
    ),
    Metric(
        "reward",
        "GRPO: the weighted sum of the rewards of a generated answer; rejection sampling: its mean "
        "over all answers that were drawn, also to prompts of which none was trained on",
        "1",
        None,
        None,
        "generated answers",
        "training",
    ),
    Metric(
        "winner_reward",
        "rejection sampling: the reward of an answer that was trained on, the best of its prompt's",
        "1",
        None,
        None,
        "best answers",
        "training",
    ),
    Metric(
        "reward_spread",
        "GRPO, rejection sampling: sample standard deviation of the rewards of the answers to one prompt",
        "1",
        0.0,
        None,
        "generated answers",
        "training",
    ),
    _share(
        "clipped",
        "GRPO: the ratio to the policy that generated is outside of the clip, so that nothing is learnt",
        "tokens of generated answers",
        "training",
    ),
    Metric(
        "answer_tokens",
        "GRPO, rejection sampling: tokens of a generated answer that is trained on, with the one that "
        "ends it",
        "tokens",
        0.0,
        None,
        "generated answers",
        "training",
    ),
    Metric("reward_chosen", f"r(y+), {REWARD}", "1", None, None, "pairs", "training"),
    Metric("reward_rejected", f"r(y-), {REWARD}", "1", None, None, "pairs", "training"),
    _share(
        "reward_accuracy",
        "r(y+) > r(y-); a tie counts as lost in training (as in TRL), half on held-out pairs, where it "
        "is a reward model's",
        "pairs",
        "held-out, training",
    ),
    Metric(
        "token_reward_chosen",
        "beta times the mean over y+'s tokens of log pi - log pi0 (IPO), or of log pi (SimPO, "
        "ORPO)",
        "1",
        None,
        None,
        "pairs",
        "training",
    ),
    Metric("token_reward_rejected", "the same of y-", "1", None, None, "pairs", "training"),
    Metric(
        "token_reward_margin",
        "token_reward_chosen - token_reward_rejected",
        "1",
        None,
        None,
        "pairs",
        "training",
    ),
    _share(
        "token_reward_accuracy",
        "the token reward of y+ is higher, a tie counts as lost",
        "pairs",
        "training",
    ),
    _share(
        "sided_accuracy",
        "BCO: r of a desirable answer is above the shift, of an undesirable one below",
        "answers",
        "training",
    ),
    Metric(
        "reward_shift",
        "BCO: half the sum of the two classes' mean r",
        "1",
        None,
        None,
        "optimizer steps",
        "training",
    ),
    _share(
        "explicit_sided_accuracy",
        "PKTO: r2 of a desirable answer is above 0, of an undesirable one below",
        "answers",
        "training",
    ),
    Metric(
        "kl",
        "KTO: its reference point z0, the mean log pi - log pi0 of mismatched answers, at least 0; "
        "GRPO: exp(d) - d - 1 with d = log pi_ref - log pi, the mean over tokens of generated answers",
        "nats",
        0,
        None,
        "answers",
        "training",
    ),
    _share("desirable_share", "the answer is desirable", "answers", "training"),
    _share("single_class", "the client has answers of one class only", "answers", "training"),
    _share("without_kl", "z0 is 0, as the client has a single row", "answers", "training"),
    Metric(
        "chosen_cross_entropy",
        "mean -log pi per token of y+ (with sft_weight); RPO: over all tokens of all y+",
        "nats",
        0,
        None,
        "pairs",
        "training",
    ),
    Metric(
        "log_odds_ratio",
        "ORPO: the log of odds(y+) / odds(y-), odds of the mean probability per token",
        "1",
        None,
        None,
        "pairs",
        "training",
    ),
    Metric(
        "divergence",
        "KL from the teacher's distribution to the model's, times the temperature squared",
        "nats",
        None,
        None,
        "positions",
        "training",
    ),
    _share("agreement", "teacher and model have the same likeliest token", "positions", "training"),
    Metric(
        "balance",
        "the loss term for an equal use of the experts of a layer",
        "1",
        0,
        None,
        "layers and tokens",
        "training",
    ),
    Metric(
        "skipped_steps",
        "optimizer batches without a token that is trained on; no step was made on them",
        "steps",
        0,
        None,
        "optimizer batches",
        "training",
    ),
    Metric(
        "staleness",
        "mean number of server updates between a client's request and the arrival of its answer "
        "(asynchronous methods)",
        "server updates",
        0,
        None,
        "answers",
        "training",
    ),
    Metric(
        "aggregation_error",
        "distance of the product of averaged LoRA factors to the average of products, over the "
        "latter's norm",
        "1",
        0,
        None,
        "adapted matrices",
        "training",
    ),
    Metric(
        "rank_error",
        "distance of the adapter, at its rank, to the products that a rule of model merging made, over "
        "their norm",
        "1",
        0,
        None,
        "adapted matrices",
        "training",
    ),
    Metric(
        "weight_entropy",
        "entropy of the clients' learnt weights in the mean: the logarithm of the number of clients "
        "where all weigh alike, 0 where one counts alone",
        "nats",
        0,
        None,
        "clients of the round",
        "training",
    ),
    Metric(
        "cut_off",
        "share of the numbers of updates that were beyond privacy.sum_bound and were cut to it (secure "
        "aggregation)",
        "1",
        0,
        1,
        "numbers of updates",
        "training",
    ),
    Metric(
        "coding_error",
        "||x - y||^2 / ||x||^2 of the changes x that a client coded and y that the server reads, with "
        "what error feedback added to x; 2^(-2R) at least for Gaussian numbers in R bits each",
        "1",
        0,
        None,
        "clients, by their rows",
        "training",
    ),
)

CLIENTS = (
    Metric(
        "mean",
        "mean of the metric; every client has the same weight",
        "as the metric",
        None,
        None,
        "clients",
        "clients",
    ),
    Metric(
        "worst",
        "the metric of the worst client",
        "as the metric",
        None,
        None,
        "one client's rows",
        "clients",
    ),
    Metric(
        "worst_decile",
        "mean of the worst tenth of clients, at least one",
        "as the metric",
        None,
        None,
        "clients",
        "clients",
    ),
    Metric(
        "spread",
        "standard deviation over these clients (divided by n, not by n - 1)",
        "as the metric",
        0,
        None,
        "clients",
        "clients",
    ),
    _share(
        "fairness",
        "Jain's index (sum m)^2 / (n sum m^2); 1 if all clients have the same value",
        "clients",
        "clients",
    ),
)

JUDGES = (
    Metric(
        "score",
        "mean over the positions at which an answer was shown",
        "the judge's scale",
        None,
        None,
        "questions judged at every position",
        "judges",
    ),
    _share(
        "consistent",
        "the best answer is the same in every order; ties are not",
        "questions",
        "judges",
    ),
    _share(
        "tied",
        "share of the orders in which all answers get the same score",
        "questions",
        "judges",
    ),
    _share(
        "first_preferred",
        "the answer shown earlier gets the higher of two scores, ties left out",
        "questions",
        "judges",
    ),
    _share(
        "longer_preferred",
        "the longer answer gets the higher of two scores, ties left out",
        "questions",
        "judges",
    ),
    Metric(
        "alpha",
        "Krippendorff's alpha of the judges' scores, interval scale",
        "1",
        None,
        1,
        "answers that two judges scored",
        "judges",
    ),
)

COSTS = (
    Metric(
        "bytes",
        "encoded payloads, measured; without those of evaluation",
        "bytes",
        0,
        None,
        "a sum",
        "cost",
    ),
    Metric(
        "flops",
        "floating-point operations, derived from shapes and padded tokens",
        "FLOP",
        0,
        None,
        "a sum",
        "cost",
    ),
    Metric("seconds", "wall-clock time, measured", "s", 0, None, "a sum", "cost"),
    Metric(
        "peak_memory",
        "the most memory that the process used, measured",
        "bytes",
        0,
        None,
        "a maximum",
        "cost",
    ),
)

GLOSSARY = {own.name: own for own in (*HELD_OUT, *TRAINING, *CLIENTS, *JUDGES, *COSTS)}
"""Every definition, by name."""

PREFIXES = {
    "clients_": "mean over clients of what their own models reach on the global held-out set",
    "distil_": "of distillation on public rows at the clients",
    "after.": "of an unseen client, after steps on its own rows",
}
"""What a prefix adds to a name."""

INTERVALS = (
    (
        "these trained models",
        "held-out rows",
        "Would other rows give the same result for these models? Shares: Wilson. Differences and "
        "other means in [0, 1]: Student's t, with one row added at either bound (Agresti and Coull; "
        "Bonett and Price). Losses: the linearised error of a ratio; a row is one unit, however many "
        "tokens it has. Areas under the ROC curve: DeLong. For any number of seeds; a row is one "
        "unit, however many models were evaluated on it.",
    ),
    (
        "the method",
        "seeds",
        "Would another training give the same result? Student's t over seeds, paired where two "
        "configurations have the same seeds; for the same held-out rows, where all seeds have the "
        "same. Not estimable with fewer than five seeds, or where all differ by the same amount.",
    ),
    (
        "clients",
        "clients",
        "Would other clients have the same result? Student's t over clients. Not estimable with "
        "fewer than five.",
    ),
    (
        "judges' scores",
        "questions",
        "Would other questions give the same result? Bootstrap over questions, with one question "
        "added at either end of the judge's scale; shares: Wilson.",
    ),
)
"""The intervals: what they are about, their units, and how they are made."""


def entries(names: Iterable[str]) -> list[Metric]:
    """Return the definitions of names, each once, in the glossary's order, whatever their prefixes."""
    wanted = {_bare(name) for name in names}
    return [own for name, own in GLOSSARY.items() if name in wanted]


def entry(name: str) -> Metric | None:
    """Return the definition of a name, whatever its prefix, or ``None`` where there is none."""
    return GLOSSARY.get(_bare(name))


def markdown() -> str:
    """Return the content of ``docs/metrics.md``."""
    lines = [
        "# What every figure means",
        "",
        "This page is generated from `src/fedloom/reports/glossary.py` by",
        "`python -m fedloom.reports.glossary`. The pages of runs and comparisons contain the entries",
        "of the figures that they show.",
        "",
        "y+ and y- are the chosen and the rejected answer to a prompt x. log pi(y|x) is the sum of "
        "the log-probabilities of",
        "the answer's tokens under the trained model, log pi0(y|x) under the model before "
        "training. The reward of an answer",
        f"is {REWARD}. It has the same scale in training and in",
        "evaluation.",
    ]
    for title, own in (
        ("Held-out rows", HELD_OUT),
        ("Training", TRAINING),
        ("Over clients", CLIENTS),
        ("Judges", JUDGES),
        ("Costs", COSTS),
    ):
        lines += [
            "",
            f"## {title}",
            "",
            "| name | formula | unit | range | over |",
            "| --- | --- | --- | --- | --- |",
        ]
        lines += [
            f"| `{one.name}` | {_cell(one.formula)} | {one.unit} | {one.range} | {one.over} |"
            for one in own
        ]
    lines += ["", "Prefixes of names:", ""]
    lines += [f"- `{prefix}`: {text}" for prefix, text in PREFIXES.items()]
    lines += [
        "",
        "## Intervals",
        "",
        "Every interval is a 95 % interval, and its unit is named beside it. Where there are too few "
        "units, there",
        "is no interval, and the text in its place says how many are needed. p values of one table "
        "are adjusted for their",
        "number (Holm 1979). [intervals.md](intervals.md) has coverage and power of the intervals in "
        "simulated comparisons.",
        "",
        "| about | units | how |",
        "| --- | --- | --- |",
    ]
    lines += [f"| {about} | {units} | {how} |" for about, units, how in INTERVALS]
    return "\n".join(lines) + "\n"


def _bare(name: str) -> str:
    for prefix in PREFIXES:
        name = name.removeprefix(prefix)
    return name


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    print(markdown(), end="")
