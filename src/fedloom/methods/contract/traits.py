"""What a method's class says of itself that an experiment must go with."""

from __future__ import annotations

from typing import Any


class MethodTraits:
    """Base of :class:`~fedloom.methods.contract.method.Method`: what experiments are checked by.

    Attributes:
        pools_data: Whether the rows of all clients are put together in client 0 (centralised).
        own_models: Whether each client keeps an adapter of its own and is judged by it.
        personal: Whether a client judges and uses what the server sends together with what it keeps.
        needs_public: Whether all parties must have public rows.
        mixed_ranks: Whether clients that share parameters may have LoRA factors of different ranks.
        mixed_models: Whether its clients may have different models and adapters of any rank.
        shares_parameters: Whether what travels is parameters of the adapter, all of them or some.
        two_factors: Whether it treats the two factors of LoRA apart.
        submixtures: Whether each client can keep a model of its own, of experts that the backbone has.
        whole_at_clients: Whether a client has the whole model, and can be judged by it.
        changes_backbone: Whether weights that are frozen while training change between rounds.
        by_rows: Whether clients weigh by their rows in means of adapters, or all alike.
        averages: Whether it takes means of adapters by ``Method.averaged``, which other rules replace.
        takes_merged_products: Whether what it averages may come back as other factors of LoRA with the
            merged products, so that rules of products can replace the mean.
        trainings: How often a client goes over a round's work at most in one request.
        repeats: Optimizer steps on each batch.
        asynchronous: Whether a round takes answers that arrive one by one, by the simulated clock.
        no_start: Why it cannot start from an adapter that exists, and what can be done, where it cannot.
    """

    pools_data = False
    own_models = False
    personal = False
    needs_public = False
    mixed_ranks = False
    mixed_models = False
    shares_parameters = True
    two_factors = False
    submixtures = False
    whole_at_clients = True
    changes_backbone = False
    averages = False
    takes_merged_products = False
    by_rows = True
    trainings = 1
    repeats = 1
    asynchronous = False
    no_start = ""

    def __init__(self, settings: Any) -> None:
        """Take the settings of ``[method]``; each method keeps what it needs of them."""

    @classmethod
    def public_rows_needed(cls, settings: Any) -> bool:
        """Return whether all parties must have public rows, by the settings of ``[method]``."""
        return cls.needs_public

    def trainings_of(self, round: int, rounds: int) -> int:
        """Return how many trainings a client makes in a round (from 1) of so many, in all requests."""
        return 1
