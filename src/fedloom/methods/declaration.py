"""What a method declares of itself: plain facts for documentation, records and checks, with reasons."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Framework = Literal["FedLLM", "KD-FedLLM", "Split-FedLLM"]
"""What travels, after arXiv 2501.04436: parameters, logits or activations."""

Fidelity = Literal["exact", "adapted", "reconstructed", "own"]
"""exact: the paper's algorithm. adapted: the same on adapters or with other optimizers. reconstructed:
after a description that leaves steps open. own: of no paper."""


@dataclass(frozen=True)
class Claim:
    """Whether a method works under something, and why.

    Attributes:
        holds: Whether it does.
        why: The reason, in words that go on after "yes: " or "no: ".
    """

    holds: bool
    why: str

    def __str__(self) -> str:
        """Return it as a cell of a table."""
        return f"{'yes' if self.holds else 'no'}: {self.why}"


UNDECLARED = Claim(False, "its declaration does not say that it does")


@dataclass(frozen=True)
class Absence:
    """What becomes of a client that is not there.

    Attributes:
        away: It is away in a round, or its answer is late.
        back: It comes for the first time in a later round, or comes back.
        left: It left for good.
        tolerated: Whether a run goes on rightly without it.
    """

    away: str
    back: str
    left: str
    tolerated: bool = True


@dataclass(frozen=True)
class Declaration:
    """What a method is.

    Attributes:
        title: Its name in text.
        paper: Where it is published, "" if nowhere.
        fidelity: How far it is the paper's.
        difference: Where it is not, "" where it is.
        framework: What travels, in one of three words.
        travels: What travels, in words.
        keeps: What a client keeps between rounds.
        secure_aggregation: Whether the server could work with sums of answers alone.
        client_privacy: Whether clipping whole answers and noise on their sum is enough to hide a client.
        row_privacy: Whether clipping and noise in a client's own steps is enough to hide a row.
        asynchronous: Whether answers may be taken one by one, to a state that has moved on.
        absence: What becomes of a client that is not there.
        compression: Whether what travels may be coded with a loss, as ``[wire]`` asks.
        compression_bits: Bits that a coded number has at least, before the entropy stage.
        message_parts: The parts of a client's answer, where it has several: names of their tensors begin
            with "PART/". Each can have a codec of its own.
        role: baseline: what other methods are weighed against; it is no way to train a federation.
        reference: Whether methods with personal models are weighed against it.
        problem: The problem that it is for, beside those that the traits of its class show
            (``docs/reference.py``); "" for none.
    """

    title: str
    paper: str
    fidelity: Fidelity
    difference: str
    framework: Framework
    travels: str
    keeps: str
    secure_aggregation: Claim
    client_privacy: Claim
    row_privacy: Claim
    asynchronous: Claim
    absence: Absence
    role: Literal["method", "baseline"] = "method"
    reference: bool = False
    compression: Claim = UNDECLARED
    compression_bits: int = 0
    problem: str = ""
    message_parts: tuple[str, ...] = ()


def yes(why: str) -> Claim:
    """Return that it works, and why."""
    return Claim(True, why)


def no(why: str) -> Claim:
    """Return that it does not, and why."""
    return Claim(False, why)


SUMMED = yes("the server uses a weighted sum of answers alone")
"""Of methods whose server takes a mean."""

EACH_ANSWER = no("the server reads each answer by itself")

CLIPPED = yes(
    "an answer is one change of parameters, which can be clipped, and their sum gets the noise"
)

PRODUCTS_UNBOUNDED = no("the factors are multiplied, which noise on a sum does not bound")
"""Of methods whose server multiplies LoRA's factors."""

SEVERAL_PARTS = no("an answer has parts that clipping one whole would bend apart")

OWN_STEPS = yes("a client's steps are plain gradient steps on its rows")

OTHER_STEPS = no("a client's answer holds more of its rows than its gradient steps")

CODED_CHANGES = yes(
    "an answer is a change of parameters of which the server takes a mean, in which errors average out"
)

CODED_PRODUCTS = yes("with 8 bits a number at least, as products of factors make errors larger")

PARTLY_HELD = no("each client is sent other experts, and a codec's errors decide who gets which")

PRODUCT_BITS = 8
"""Of methods that multiply what was coded, which makes errors larger."""

ONE_BY_ONE = yes("an answer is a change of the shared adapter, which a later adapter can take")

TOGETHER = no("a round's answers are put together at once, from one state")

AVERAGED = Absence("the mean is over those that answered", "gets what all get", "is in no mean")
"""Of methods that average what comes back."""


KEEPS_ADAPTER = Absence(
    "as FedAvg; its own adapter stays as it is",
    "goes on with the adapter that it kept",
    "is in no mean",
)
"""Of methods whose clients train an adapter of their own beside the shared one."""

KEEPS_PARTS = Absence(
    "as FedAvg; what it keeps stays as it is",
    "trains the parts that it kept (fresh ones at first) with today's shared ones",
    "is in no mean",
)
"""Of methods that average all but some parts of what is trained."""

ADDS_TO_BACKBONE = Absence(
    "adds nothing; the round's factors and residual are of those that answered",
    "before it trains, in the same round, it is sent the additions to the backbone that it lacks, or "
    "their sum if that is smaller",
    "is sent nothing; if it is allowed again, it gets the sum",
)
"""Of methods that put what was learnt into the backbone."""

DRIFT = "clients' rows differ, so that their adapters drift apart in a round"
"""Problem of methods that correct it."""

SERVER_STEPS = "the mean of changes is a noisy step, which a server's optimizer smooths or scales"
"""Problem of methods whose server has an optimizer."""


def averaging(
    title: str,
    paper: str,
    fidelity: Fidelity,
    difference: str,
    *,
    travels: str = "the adapter, down and up",
    keeps: str = "nothing",
    client_privacy: Claim = CLIPPED,
    row_privacy: Claim = OWN_STEPS,
    asynchronous: Claim = ONE_BY_ONE,
    absence: Absence = AVERAGED,
    reference: bool = False,
    compression: Claim = CODED_CHANGES,
    problem: str = "",
) -> Declaration:
    """Return what a method is whose server needs a mean of parameters alone, trained by plain steps."""
    return Declaration(
        title,
        paper,
        fidelity,
        difference,
        "FedLLM",
        travels,
        keeps,
        secure_aggregation=SUMMED,
        client_privacy=client_privacy,
        row_privacy=row_privacy,
        asynchronous=asynchronous,
        absence=absence,
        reference=reference,
        compression=compression,
        problem=problem,
    )


def adding_to_backbone(
    title: str, paper: str, fidelity: Fidelity, difference: str, *, travels: str
) -> Declaration:
    """Return what a method is whose clients add what was learnt to their backbones."""
    return Declaration(
        title,
        paper,
        fidelity,
        difference,
        "FedLLM",
        travels,
        "the sum of all additions to the backbone",
        secure_aggregation=EACH_ANSWER,
        client_privacy=PRODUCTS_UNBOUNDED,
        row_privacy=OWN_STEPS,
        asynchronous=no("additions to the backbone are numbered by rounds"),
        compression=CODED_PRODUCTS,
        compression_bits=PRODUCT_BITS,
        absence=ADDS_TO_BACKBONE,
    )
