"""What a method's hooks return, looked at before anything is trained."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from fedloom.accounting.traffic import ActivationTraffic, LogitTraffic, ParameterTraffic
from fedloom.federation.contract import breach, kind_of, not_finite_in, require_saveable
from fedloom.methods.contract.client import Handler
from fedloom.methods.contract.method import Method
from fedloom.tensors import State, Tensors


def sound_handlers(method: Method, reserved: Collection[str]) -> Mapping[str, Handler]:
    """Return the client side of a method.

    Args:
        method: The method.
        reserved: Actions that every method has beside its own.

    Raises:
        PluginError: It is no mapping from an action to a function, or has a reserved action.
    """
    found: object = method.handlers()
    if not isinstance(found, Mapping) or not all(callable(own) for own in found.values()):
        raise breach(
            method,
            "handlers() must return a dictionary from the name of each action to its function, such as "
            '{"train": self._train}',
        )
    if taken := sorted(found.keys() & set(reserved)):
        raise breach(
            method,
            f"handlers() names {taken[0]!r}, an action that every method has already: give it another "
            "name, or define load(client, payload), by which a client is judged",
        )
    return found


def first_state(method: Method, adapter: Tensors) -> State:
    """Return the state before the first round.

    Args:
        method: The method.
        adapter: The adapter as it is initialised.

    Raises:
        PluginError: It is none that could be saved; the global adapter in it has not the tensors of
            ``adapter``; or the closed form of traffic is none.
    """
    state = require_saveable(method, method.initial_state(dict(adapter)), "initial_state(adapter)")
    if not_finite_in(state) is not None:
        text = (
            "initial_state(adapter) holds NaN or infinity: correct it, or what adapter.start names"
        )
        raise breach(method, text)
    shared = method.shared(state)
    if shared is not None and shared is not state.tensors:
        require_adapter(method, shared, adapter)
    elif shared is not None and (lost := sorted(adapter.keys() - shared.keys())):
        raise breach(
            method,
            f"shared(state) returns the whole state, in which {lost[0]!r} is not: define shared, which "
            'returns the global adapter, such as part_of(state.tensors, "adapter")',
        )
    traffic: object = method.traffic(adapter)
    if not isinstance(traffic, ParameterTraffic | LogitTraffic | ActivationTraffic):
        raise breach(
            method,
            f"traffic(adapter) returned {kind_of(traffic)}: it must return a closed form of "
            "fedloom.accounting.traffic, such as ParameterTraffic(down, up), in bytes",
        )
    return state


def require_adapter(method: Method, shared: object, adapter: Tensors) -> None:
    """Check what a method calls the global adapter.

    Raises:
        PluginError: It has not the names and shapes of ``adapter``.
    """
    if not isinstance(shared, dict):
        raise breach(
            method, f"shared(state) returned {kind_of(shared)}: it must return tensors by name"
        )
    if lost := sorted(adapter.keys() - shared.keys()):
        raise breach(
            method,
            f"shared(state) lacks {lost[0]!r}{f' and {len(lost) - 1} more' * (len(lost) > 1)}: it must "
            "return every tensor of the adapter that initial_state was given, by the same names",
        )
    for name, tensor in adapter.items():
        if shared[name].shape != tensor.shape:
            raise breach(
                method,
                f"shared(state) has {name!r} with shape {tuple(shared[name].shape)}: the adapter's is "
                f"{tuple(tensor.shape)}",
            )
