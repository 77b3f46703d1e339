"""``[policy]`` of a client's file: what the server may request. Anything else is refused.

The defaults allow federations whose replies carry adapters, at sizes that the recipes stay below by
far and that keep a client's machine usable. ``policy_enforcement.py`` checks an experiment against them.
No torch here: commands that only read a client's file need none.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from fedloom.settings.schema import Settings

REVEALING = (
    "logits",
    "activations",
    "targets",
    "embeddings",
    "first_tokens",
    "expert_probes",
    "inner_products",
    "grades",
    "public_rows",
)
"""Lines that open something; each says in its docstring what it shows the server."""


OTHERS = 2
"""Fewest other clients of a sum."""


def _sound_fingerprint(text: str) -> str:
    if not re.fullmatch("SHA256:[A-Za-z0-9+/]{43}", text):
        raise ValueError(
            "must be the fingerprint of a key, SHA256: and 43 characters, as `ssh-keygen -lf NAME.pub` "
            "prints it"
        )
    return text


Fingerprint = Annotated[str, AfterValidator(_sound_fingerprint)]


class PrivacyPolicySettings(Settings):
    """``[policy.privacy]``: the privacy that a run must have, and what all runs together may spend."""

    require: Literal["row", "client"] | None = None
    """What a run must hide, by privacy.unit: "row" (this client adds the noise itself, in its own steps,
    and sends no scores on its own held-out rows), or "client" (that, or noise that the coordinator adds
    once it has seen this client's update; its word is all there is for it). Default: nothing."""
    max_epsilon: float | None = Field(default=None, gt=0)
    """epsilon that all runs on the same rows may spend together, whichever coordinator asks for them. It
    demands "row"; a run that would pass it is refused before it begins, and `fedloom client budget` says
    what has been spent."""
    delta: float | None = Field(default=None, gt=0, lt=1)
    """delta at which that is added up: below 1 / rows."""
    column: str | None = None
    """Rows with the same value in this column (a patient) are one unit, of runs and of the budget: a run
    with another privacy.column is refused. Default: each row is a unit."""

    distributed_noise: bool = False
    """With require = "client": whether noise that hides clients must be added by the clients, each a
    share before its update is masked (privacy.noise = "distributed"); runs in which the coordinator adds
    it are refused."""
    secure_aggregation: bool = False
    """Whether a run must be one of privacy.secure_aggregation, so that the server sees sums of updates
    and none of this client by itself; others are refused."""
    peers: list[Fingerprint] = []
    """Fingerprints (SHA256:..., as `fedloom keys new` and `ssh-keygen -lf NAME.pub` print them) of the
    other members' keys, had from them and not from the coordinator; its own may be among them. This
    client's update is summed with theirs alone."""
    trust_first_use: bool = False
    """Instead of peers: trust whatever key of a member the coordinator tells first, and refuse another
    one later. It protects from coordinators that follow the protocol, and from no other."""

    @property
    def demands_rows(self) -> bool:
        """Whether a run must hide rows in this client's own steps."""
        return self.require == "row" or self.max_epsilon is not None

    def contradictions(self) -> Iterator[str]:
        """Yield what in these settings contradicts itself."""
        if (self.max_epsilon is None) != (self.delta is None):
            here, there = (
                ("max_epsilon", "delta") if self.delta is None else ("delta", "max_epsilon")
            )
            yield f"policy.privacy.{here} needs policy.privacy.{there}: give both, or neither"
        if self.require == "client" and self.max_epsilon is not None:
            yield (
                'policy.privacy.require = "client" lets in runs whose noise the coordinator adds, which '
                'no budget here can count: use "row", or leave out max_epsilon and delta'
            )
        if self.distributed_noise and self.require != "client":
            yield (
                "policy.privacy.distributed_noise says who adds the noise that hides clients: it goes "
                'with policy.privacy.require = "client"'
            )
        if self.peers and self.trust_first_use:
            yield "policy.privacy: give peers or trust_first_use, not both"
        if 0 < len(set(self.peers)) < OTHERS:
            yield (
                f"policy.privacy.peers names {len(set(self.peers))} other member: a sum has "
                f"{OTHERS + 1} clients at least, so name {OTHERS} or more"
            )
        if self.secure_aggregation and not (self.peers or self.trust_first_use):
            yield (
                "policy.privacy.secure_aggregation needs policy.privacy.peers: the fingerprints of the "
                "other members' keys (or trust_first_use = true)"
            )
        if self.column is not None and not self.demands_rows:
            yield (
                f"policy.privacy.column = {self.column!r} says what the unit of row-level privacy is: it "
                'goes with require = "row" or max_epsilon'
            )


class PolicySettings(Settings):
    """``[policy]`` of a client's file."""

    objectives: list[str] | None = None
    """Objectives that may be trained (default: all there are). An objective sends nothing; it only
    says how rows are learnt from. One that is not fedloom's own is imported only if it is named here."""
    methods: list[str] | None = None
    """Methods that may be used (default: all whose replies need none of the lines below that is
    false). One that is not fedloom's own is imported only if it is named here."""

    rewards: list[str] | None = None
    """Rewards of generated answers that may be used (default: those that run no code but fedloom's:
    exact_match, number, regex:PATTERN). Only what is named here of others is used: "unit_tests" runs what
    the model writes as Python with the rights of this process's user. Its limits are no security
    boundary: whoever chooses the model (the coordinator) may do what that user may, as far as they can
    be escaped, so run the client in a container (docs/grpo.md). A function of a module is imported
    here."""

    logits: bool = False
    """The model that was trained here says how likely every answer to public rows is. From that the
    server can tell whether a row like one it has was trained on, and learn what this model learnt."""
    activations: bool = False
    """What the first layers make of every token of every row. Rows can be read back from it almost
    word by word where the cut is early."""
    targets: bool = False
    """The class, or the tokens of the completion, of every row that is trained on, as they are. Split
    learning needs them unless the experiment says method.labels = "client"."""
    embeddings: bool = False
    """Means of what the layers make of some rows, in every round; or synthetic input embeddings that
    look to the model as rows of each class do, and which classes there are. They show what rows are about
    and, of few rows, more; of means, method.embedding_noise hides single rows."""
    first_tokens: bool = False
    """The first tokens of some rows of each class, as input embeddings that can be read back word by
    word. FedDM sends them where the experiment says method.start = "rows"."""
    expert_probes: bool = False
    """How many tokens of some rows pass each expert of the model. It shows roughly what rows are
    about."""
    inner_products: bool = False
    """Second moments of what LoRA's first factor makes of the tokens of some rows, in every round: rank x
    rank numbers a layer. They show which directions rows lie in and, of few short rows, more."""
    grades: bool = False
    """How this client's rewards grade answers of the server's model to public questions, against its own
    rows' answers where it has the question, else against those of a model that was trained here; and
    which labelled public questions that model has right. By trying, the server can find out which of the
    questions this client has, and what its answers are. No answer of that model is sent."""
    public_rows: bool = False
    """Rows that all parties have are read from [public] of this file and learnt from, with what the
    server says about them. They show the server nothing; what it says about them changes this client's
    model."""

    models: list[str] = []
    """Folders and Hub names of models that may be loaded, beside "tiny" and [model] path of this file;
    a Hub name as NAME or NAME@REVISION."""
    max_rank: int = Field(default=256, ge=1)
    """Largest rank of LoRA's factors (recipes: 30 at most; above 256 whole layers cost little more)."""
    max_experts: int = Field(default=64, ge=1)
    """Most experts of a layer, each with factors of its own (recipes: 30)."""
    max_width: int = Field(default=16_384, ge=1)
    """Largest width of what else is put beside the model: heads over so many classes, bottlenecks,
    encoders, learnt prompts (recipes: 1,024)."""
    max_steps: int = Field(default=10_000, ge=1)
    """Most batches of a request (recipes: some hundred): hours on one GPU, not weeks."""
    max_batch: int = Field(default=1_024, ge=1)
    """Most examples of a batch, of generated answers all of its groups (recipes: 16, 128 answers)."""
    max_tokens: int = Field(default=8_192, ge=2)
    """Longest sequence and longest answer, in tokens (recipes: 1,024)."""
    max_rows: int = Field(default=100_000, ge=1)
    """Most rows that the experiment may have generated here or taken as public (recipes: 2,400)."""
    max_seconds: float = Field(default=43_200, gt=0)
    """Longest time that one request may be worked on, in seconds (twelve hours: as long as the server
    waits by default). What was computed until then is thrown away."""
    max_bytes: int = Field(default=4 << 30, ge=1 << 16)
    """Largest request and largest answer in bytes (4 GiB: LoRA on all layers of a 7B model takes 2.6
    GB at rank 256, of a 70B model 3.3 GB at rank 64)."""
    max_clients: int = Field(default=10_000, ge=1)
    """Most clients of an experiment; a list of them is kept in memory (recipes: 747)."""
    max_checkpoint_every: int = Field(default=100, ge=1)
    """Most rounds between checkpoints of the server: of so many and twice as many more, what this
    client keeps stays on its disk."""
    max_rounds_a_day: int = Field(default=1_000, ge=1)
    """Most rounds in a day (UTC): one every 86 seconds around the clock. Work that is asked for twice
    in a round counts twice."""
    max_runs_a_day: int = Field(default=50, ge=1)
    """Most runs that are begun in a day (UTC); each loads the model and reads all rows."""
    privacy: PrivacyPolicySettings = PrivacyPolicySettings()
    """The privacy that a run must have, and what all runs together may spend of these rows."""
    approve: bool = False
    """Whether a run waits until somebody here has looked at it: `fedloom client approve`."""

    def names(self, section: str, name: str) -> bool:
        """Return whether the file itself names a class that is not fedloom's, so that it is imported."""
        lists = {"objective": self.objectives, "method": self.methods}
        return name in (lists.get(section) or ())
