"""Every error a user can meet, as one tree.

::

    FedloomError
    ├── SettingsError       the experiment file: unknown key, wrong type, contradiction (all listed)
    ├── DataError           the data: missing file, absent column, malformed rows, empty client
    ├── ModelError          the model folder or the adapter: no weights, no tokenizer, no such target
    │   └── VerificationError   a saved folder is not the model that was trained
    ├── PolicyError         what a client's own file does not allow (all reasons listed)
    ├── MessageError        a message that is not what it must be: form, schema, range, sender
    ├── TrainingError       local training on one client failed; the round goes on without it
    │   └── NonFiniteLoss   the loss became NaN or infinite: which client, step and examples
    ├── JudgeError          a judge that cannot be used: a refused key, no server, a wrong address
    ├── PluginError         a method, objective, source or judge of somebody else's fails, or breaks its
    │                       contract
    ├── RoundFailed         fewer clients answered than the quorum asks for
    ├── CheckpointError     a checkpoint that is damaged or belongs to another experiment
    ├── AuditError          an audit log that is damaged
    ├── PrivacyError        a privacy budget that is spent, or a ledger of it that is damaged
    ├── IdentityError       a key or certificate that is missing, expired, or not allowed
    ├── ConnectionFailed    another machine, or a process of our own, cannot be reached (now)
    ├── OutputError         the run folder cannot be written or read
    └── Interrupted         the user stopped the run; it can be resumed

A message says what was wrong, the value, and what to do. The command line prints it without a
traceback and exits with the class's ``exit_code``. Service managers (``deploy/systemd``) do not restart a
server or client that ended with an error whose ``restart_helps`` is false.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

ViolationKind = Literal[
    "forged",
    "replayed",
    "malformed",
    "oversized",
    "out_of_range",
    "not_finite",
    "too_many_names",
    "forbidden",
]
"""Kinds of protocol violations of an admitted client; ``federation/violations.py`` explains each kind."""


def first_line(error: BaseException) -> str:
    """Return the first line of what an error says; of one that says nothing, its class.

    A line that ends in a colon says nothing without the next one. Of the system's errors it is what
    happened, without the number and the path, which stands in the message already.
    """
    if isinstance(error, OSError) and error.strerror:
        return str(error.strerror)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    first, *others = lines or [type(error).__name__]
    return f"{first} {others[0]}" if first.endswith(":") and others else first


class FedloomError(Exception):
    """Base of every error that fedloom raises on purpose."""

    exit_code = 1
    restart_helps = True


class SettingsError(FedloomError):
    """The experiment file is wrong; ``problems`` lists every mistake found in it."""

    exit_code = 2
    restart_helps = False

    def __init__(self, problems: Sequence[str], source: str = "the experiment") -> None:
        """Keep ``problems`` (one line each) and name the ``source`` they were found in."""
        self.problems = tuple(problems)
        count = len(self.problems)
        title = f"{source} has {count} mistake{'s' if count != 1 else ''}:"
        super().__init__("\n".join([title, *(f"  - {problem}" for problem in self.problems)]))


class DataError(FedloomError):
    """The data cannot be used as the experiment asks."""

    exit_code = 3


class ModelError(FedloomError):
    """The model or its adapter cannot be loaded as the experiment asks."""

    exit_code = 3


class VerificationError(ModelError):
    """What was saved and loaded again is not the model that was trained."""

    exit_code = 7


@dataclass(frozen=True)
class Refusal:
    """One thing that a client's own file does not allow.

    Attributes:
        line: The line of the file that decides: ``policy.max_rank``. It is all that the server is told.
        reason: What was asked and what is allowed, in words for this machine's log alone.
    """

    line: str
    reason: str


class PolicyError(FedloomError):
    """A client's own file does not allow what is asked; ``refusals`` has every reason."""

    def __init__(self, *refusals: Refusal) -> None:
        """Keep the reasons, at least one."""
        self.refusals = refusals
        super().__init__("; ".join(f"{one.line}: {one.reason}" for one in refusals))


class MessageError(FedloomError):
    """What came from another machine is not what it must be.

    Attributes:
        kind: What kind of violation that is, if a client is proven to have sent it.
    """

    def __init__(self, text: str, kind: ViolationKind = "malformed") -> None:
        """Say what is wrong, and of what kind that is."""
        super().__init__(text)
        self.kind: ViolationKind = kind


class OutOfStepError(MessageError):
    """What a client sent goes on from another state than is known here, as after a loss: no violation."""


class SumRefused(MessageError):
    """A client refuses a stage of secure aggregation; the text names clients and stages alone."""


class TrainingError(FedloomError):
    """Local training failed on one client."""


class NonFiniteLoss(TrainingError):
    """The training loss is NaN or infinite."""

    def __init__(self, client: int, step: int, example_ids: Sequence[int], value: float) -> None:
        """Name the ``client``, its optimizer ``step`` (from 1) and the rows of that batch."""
        self.client, self.step, self.example_ids = client, step, tuple(example_ids)
        shown = ", ".join(map(str, self.example_ids[:16])) + (
            ", ..." if len(self.example_ids) > 16 else ""
        )
        super().__init__(
            f"client {client}: the loss is {value} at local step {step} on rows {shown}; "
            "lower training.learning_rate, set training.max_grad_norm, or look at these rows"
        )


class JudgeError(FedloomError):
    """A judge cannot work at all; a single verdict that is missing or unreadable is counted instead."""


class PluginError(FedloomError):
    """A class that is not fedloom's own fails, or returns what it must not; no restart mends that."""

    exit_code = 8
    restart_helps = False


class RoundFailed(FedloomError):
    """A round does not count: too few usable answers, or what was made of them is not finite."""


class CheckpointError(FedloomError):
    """A checkpoint is damaged, or belongs to another experiment."""


class AuditError(FedloomError):
    """An audit log was changed, or is none; no restart mends that."""

    exit_code = 6
    restart_helps = False


class PrivacyError(FedloomError):
    """A privacy budget would be passed, or what was spent of it is not known; no restart mends that."""

    exit_code = 6
    restart_helps = False


class IdentityError(FedloomError):
    """A key or certificate is missing, has expired, or is not allowed; a restart does not help."""

    exit_code = 5
    restart_helps = False


class ConnectionFailed(FedloomError):
    """Another machine, or a process of our own, cannot be reached; it may be, later."""

    exit_code = 4


class OutputError(FedloomError):
    """The run folder cannot be written or read."""


class Interrupted(FedloomError):
    """The run was stopped by its user after its state had been saved."""

    exit_code = 130
