"""What a method must yield and return, and what can be kept of it: each fault is one error that names it.

Everything else of a method is checked where it is used: names, shapes and ranges of what travels in
``wire/``, what its hooks return before the first round in ``methods/contract/soundness.py``.
"""

from __future__ import annotations

from collections.abc import Generator

from torch import Tensor

from fedloom.errors import PluginError, RoundFailed
from fedloom.federation.protocol import Cohort, Method, Round
from fedloom.tensors import OnDemand, State, is_finite
from fedloom.wire.messages import Exchange


def begin(method: Method, state: State, cohort: Cohort) -> tuple[Round, Exchange]:
    """Begin a round and return it with its first exchange.

    Raises:
        PluginError: The method's ``round`` is no generator, or yields no exchange.
    """
    steps: object = method.round(state, cohort)
    if not isinstance(steps, Generator):
        raise breach(
            method,
            f"round(state, cohort) returned {kind_of(steps)}: it must be a generator, which yields what "
            "is asked of clients (replies = yield training_exchange(...)) and returns the next state",
        )
    try:
        return steps, require_exchange(method, next(steps))
    except StopIteration:
        raise breach(
            method, "round(state, cohort) asked no client: it must yield an Exchange"
        ) from None


def require_exchange(method: Method, found: object) -> Exchange:
    """Return what a round yielded.

    Raises:
        PluginError: It is no exchange.
    """
    if not isinstance(found, Exchange):
        raise breach(
            method,
            f"round(state, cohort) yielded {kind_of(found)}: it must yield an Exchange, such as "
            "training_exchange(cohort, adapter)",
        )
    return found


def require_state(method: Method, found: object, origin: str) -> State:
    """Return the state that a method made of a round; see :func:`require_saveable`.

    Raises:
        PluginError: It is none, or none that could be saved.
        RoundFailed: It holds NaN or infinity.
    """
    state = require_saveable(method, found, origin)
    if name := not_finite_in(state):
        raise RoundFailed(
            f"{type(method).__name__}: {origin} made NaN or infinity of the answers, which were "
            f"finite, in {name!r} of the state: lower training.learning_rate or the method's own "
            "settings, or correct the method; the rounds before are saved"
        )
    return state


def require_saveable(method: Method, found: object, origin: str) -> State:
    """Return a state that a method made.

    Args:
        method: The method.
        found: What it returned.
        origin: What of it returned that: ``round(state, cohort)``.

    Raises:
        PluginError: It is none, or none that could be saved.
    """
    if not isinstance(found, State):
        raise breach(
            method,
            f"{origin} returned {kind_of(found)}: it must return State(tensors), with "
            "fedloom.tensors.join_parts where there are several sets of tensors",
        )
    if fault := fault_of(found.tensors):
        raise breach(method, f"in the State that {origin} returned, {fault}")
    for key, number in found.numbers.items():
        if isinstance(number, bool) or not isinstance(number, int | float):
            raise breach(
                method,
                f"in the State that {origin} returned, the number {key!r} is {kind_of(number)}",
            )
    return found


def not_finite_in(state: State) -> str | None:
    """Return the name of a tensor that holds NaN or infinity; those read on demand are not looked at."""
    if isinstance(state.tensors, OnDemand):
        return None
    for name, tensor in state.tensors.items():
        if tensor.is_floating_point() and not is_finite(tensor):
            return name
    return None


def fault_of(tensors: object) -> str:
    """Return what keeps something from being named tensors that can be saved, empty if nothing does."""
    if not isinstance(tensors, dict):
        return f"there is {kind_of(tensors)} where there must be a dictionary of tensors by name"
    if isinstance(tensors, OnDemand):
        return ""
    for name, tensor in tensors.items():
        if not isinstance(name, str):
            return f"{name!r} is no name of a tensor: it must be text"
        if isinstance(tensor, dict):
            return f"{name!r} is a dictionary: put sets of tensors together with tensors.join_parts"
        if not isinstance(tensor, Tensor):
            return f"{name!r} is {kind_of(tensor)}: it must be a tensor; torch.tensor({tensor!r}) is one"
        if tensor.device.type != "cpu" or tensor.requires_grad:
            return (
                f"{name!r} is on {tensor.device}{' with gradients' * tensor.requires_grad}: keep "
                "tensor.detach().cpu()"
            )
    return ""


def kind_of(found: object) -> str:
    """Return what something is, with its article."""
    name = type(found).__name__
    return "nothing" if found is None else f"{'an' if name[0] in 'AEIOUaeiou' else 'a'} {name}"


def breach(method: object, text: str) -> PluginError:
    """Return the error of a method that does not keep its contract."""
    return PluginError(f"method {type(method).__module__}:{type(method).__name__}: {text}")
