"""Errors that a client reports to the server: lines of its policy and a fixed set of sentences.

The texts of errors may quote rows, paths, columns or settings, and the kind of an error may reveal
whether a file exists. So every error that a worker sends goes through :func:`text_for_server`; the
details are in the client's own log.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum

from fedloom.deployment.policy import PolicySettings
from fedloom.deployment.worker_socket import LOG as WORKER_LOG
from fedloom.display.untrusted_text import message
from fedloom.errors import (
    AuditError,
    DataError,
    FedloomError,
    MessageError,
    NonFiniteLoss,
    PolicyError,
    PrivacyError,
    SumRefused,
    VerificationError,
)
from fedloom.wire.envelope import LACKS_START

LOG = logging.getLogger("fedloom.worker")

WHY = f"; {WORKER_LOG} on its machine says why"

MORE = "the experiment asks for more than this client allows"
CLOSED = "the experiment asks for what this client does not allow"
OTHER = "the experiment's setting differs from this client's"

LINES = {
    f"policy.{name}": MORE if name.startswith("max_") else CLOSED
    for name in PolicySettings.model_fields
}
LINES |= dict.fromkeys(
    ("data.kind", "data.choices", "data.source", "data.train_on", "data.template_date"), OTHER
)
LINES |= {
    "data": "this client offers no rows",
    "experiment": "this client cannot take part in it",
    "policy.privacy.require": "the experiment hides less of this client's rows than this client demands",
    "policy.privacy.distributed_noise": "the server would see this client's update before it adds noise",
    "policy.privacy.column": "the experiment's unit of privacy is another than this client demands",
    "policy.privacy.secure_aggregation": "the server would see this client's update by itself",
    "policy.privacy.peers": "this client's file does not trust the keys of all clients of the sum",
    "policy.privacy.trust_first_use": "a client of the sum has another key than at its first use",
    "policy.privacy.max_epsilon": "this client's rows have no such privacy budget left",
}
"""Lines of a client's file that can refuse, with the text that is sent."""


class Sentence(StrEnum):
    """All other texts that are sent to the server."""

    WAITS = "waits for a person's approval (policy.approve)"
    READING = "its rows cannot be used as the experiment asks" + WHY
    LOADING = "its model cannot be loaded" + WHY
    HIDING = "its rows cannot be hidden as [privacy] asks" + WHY
    SPENT = "it makes no more noisy steps in this run, or its privacy ledger is damaged" + WHY
    WORKING = "its work failed" + WHY
    NOT_FINITE = "its loss became NaN or infinite" + WHY
    MEMORY = "not even one example at a time fits into its memory"
    UNVERIFIED = "its own model, saved and loaded again, is not the one that was trained" + WHY
    AUDIT = "its own audit log is damaged" + WHY
    UNFIT = "what was sent does not match the description of the run that this client has" + WHY
    FOREIGN = "the message is for another client"
    RESUMED = "the run has been resumed since this was sent"
    START = LACKS_START
    ANEW = "this client was restarted and must be sent the run's description again"


class ReportedError(MessageError):
    """An error that is reported to the server as one of the sentences."""

    def __init__(self, sentence: Sentence) -> None:
        """Keep the sentence."""
        super().__init__(sentence.value)
        self.sentence = sentence


@contextmanager
def failing_as(sentence: Sentence) -> Iterator[None]:
    """Report any error inside as one sentence, or as an error in the rows.

    Raises:
        ReportedError: An error occurred; details are in the client's log.
        PolicyError: The policy refuses it.
    """
    try:
        yield
    except (PolicyError, ReportedError):
        raise
    except DataError as error:
        raise ReportedError(Sentence.READING) from error
    except Exception as error:
        raise ReportedError(sentence) from error


def text_for_server(error: Exception) -> str:
    """Return the text about an error for the server, and write the details to the local log."""
    cause = error.__cause__ if isinstance(error, ReportedError) and error.__cause__ else error
    trace = None if isinstance(cause, FedloomError) else cause
    LOG.warning("%s", message(str(cause) or type(cause).__name__), exc_info=trace)
    if isinstance(error, PolicyError):
        lines = dict.fromkeys(one.line for one in error.refusals if one.line in LINES)
        return "; ".join(f"{line}: {LINES[line]}" for line in lines) or Sentence.WORKING.value
    if isinstance(error, SumRefused):
        return f"secure aggregation: {error}"
    return _sentence(error).value


def _sentence(error: Exception) -> Sentence:
    match error:
        case ReportedError(sentence=sentence):
            return sentence
        case NonFiniteLoss():
            return Sentence.NOT_FINITE
        case VerificationError():
            return Sentence.UNVERIFIED
        case PrivacyError():
            return Sentence.SPENT
        case MemoryError():
            return Sentence.MEMORY
        case AuditError():
            return Sentence.AUDIT
        case MessageError():
            return Sentence.UNFIT
    return Sentence.WORKING
