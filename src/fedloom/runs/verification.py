"""Checks that the saved folders hold the models that were trained; see ``models/verify.py``.

What a model says is asked when it is saved. When all is written, each folder is loaded as its card says
onto a base that is loaded afresh, once for all folders of it, and freed afterwards.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fedloom.accounting.quantities import human_bytes
from fedloom.data.token_set import TokenSet
from fedloom.errors import ModelError, VerificationError, first_line
from fedloom.experiment.experiment import Experiment
from fedloom.models.adapters import AdapterModel
from fedloom.models.saved import FolderKind, kind_of, put_on
from fedloom.models.verify import (
    NEXT,
    ROWS,
    Outputs,
    affordable,
    compare,
    distance,
    fresh_base,
    fresh_copy,
    load_whole,
    outputs,
    shortened,
)
from fedloom.randomness import generator
from fedloom.runs.assembly import RunComponents
from fedloom.runs.model_building import client_base, model_folder, of_server

DRAWN_TOKENS = 32
"""Length of a row of drawn tokens, where there are no others."""

BY: dict[FolderKind, str] = {
    "model": "transformers",
    "peft": "transformers and PEFT",
    "own parts": "fedloom's loader",
    "experts": "fedloom's loader",
}
"""What a folder is loaded by."""


@dataclass(frozen=True)
class Rows:
    """Rows that models are compared on.

    Attributes:
        name: What they are.
        ids: Their tokens.
        places: What each is called.
    """

    name: str
    ids: tuple[list[int], ...]
    places: tuple[str, ...]


@dataclass(frozen=True)
class Saved:
    """A folder, and what the model said that was saved in it.

    Attributes:
        folder: Where.
        base: Its base, as the experiment names it.
        client: Whose it is, if not everybody's.
        model: That was saved; it may hold another adapter by now.
        rows: What it was asked.
        said: What it answered.
        moved: Nats by which the adapter moves log-probs, where that was asked.
    """

    folder: Path
    base: str
    client: int | None
    model: AdapterModel
    rows: Rows
    said: Outputs
    moved: float | None


@dataclass
class Verifier:
    """Compares what is saved in a run with what was trained.

    Attributes:
        experiment: The run's settings.
        parts: What it was built of.
        folders: How many will be noted; the more, the shorter are the rows that each is asked.
    """

    experiment: Experiment
    parts: RunComponents
    folders: int = 1
    saved: list[Saved] = field(default_factory=list)
    seconds: float = 0.0

    def note(self, folder: Path, model: AdapterModel, client: int | None = None) -> None:
        """Ask a model that has just been saved what it says of some rows.

        Args:
            folder: Where it was saved.
            model: With the adapter that was saved.
            client: Whose it is, if not everybody's.
        """
        if not self.experiment.output.verify:
            return
        start = time.perf_counter()
        rows = self._rows(client, model)
        said = _asked(model, rows)
        moved = None
        if client is None or all(one.client is None for one in self.saved):  # one of each is enough
            with model.reference():
                moved = distance(said, _asked(model, rows))
        base = of_server(self.experiment).model.path
        if client is not None:
            base = client_base(self.experiment, client)
        self.saved.append(Saved(folder, base, client, model, rows, said, moved))
        self.seconds += time.perf_counter() - start

    def verify(self) -> dict[str, Any]:
        """Load all that was saved afresh and compare it; return the outcome for ``summary.json``.

        Raises:
            VerificationError: A folder does not load, or is not what was trained.
        """
        if not self.experiment.output.verify:
            return {"left_out": "output.verify = false"}
        if not self.saved:
            return {"left_out": "nothing was saved"}
        start = time.perf_counter()
        worst, most, by = 0.0, 0.0, []
        with torch.random.fork_rng(devices=[]):  # PEFT draws factors before it reads them
            for path in dict.fromkeys(own.base for own in self.saved):
                own = [one for one in self.saved if one.base == path]
                lack = lacking(own[0].model)
                if lack:
                    return {"left_out": lack}
                for difference, bound, loader in self._of_base(path, own):
                    worst, most = max(worst, difference), max(most, bound)
                    by.append(loader)
        self.seconds += time.perf_counter() - start
        return {
            "folders": len(self.saved),
            "loaded_by": list(dict.fromkeys(by)),
            "rows": len(self.saved[0].rows.ids),
            "rows_are": self.saved[0].rows.name,
            "difference": worst,
            "allowed": most,
            "moved": max(one.moved for one in self.saved if one.moved is not None),
            "seconds": self.seconds,
        }

    def _of_base(self, path: str, saved: list[Saved]) -> Iterator[tuple[float, float, str]]:
        """Compare the folders of one base; yield difference, what is allowed, and the loader."""
        model, settings = saved[0].model, self.experiment.model
        kinds = [kind_of(one.folder) for one in saved]
        base = None
        if any(kind != "model" for kind in kinds):
            base = fresh_base(
                model_folder(path),
                revision=settings.revision,
                dtype=backbone_dtype(self.experiment),
                quantization=settings.quantization,
                device=model.device,
                classifier=saved[0].folder if self.parts.division.classes else None,
            )
        for one, kind in zip(saved, kinds, strict=True):
            for way in _ways(kind, one.client):
                if way == "model" or base is None:
                    dtype = backbone_dtype(self.experiment)
                    loaded = load_whole(one.folder, dtype=dtype, device=model.device)
                else:
                    try:
                        loaded = put_on(fresh_copy(base), one.folder, way)
                    except (
                        ModelError,
                        ValueError,
                        KeyError,
                        TypeError,
                        RuntimeError,
                        OSError,
                    ) as error:
                        raise VerificationError(
                            f"{one.folder} does not load: {first_line(error)}. {NEXT}"
                        ) from error
                found = outputs(loaded, one.rows.ids, device=model.device, autocast=model.autocast)
                compared = compare(
                    one.said,
                    found,
                    dtype=model.autocast or torch.float32,
                    name=str(one.folder),
                    places=one.rows.places,
                )
                del loaded
                yield compared.difference, compared.allowed, BY[way]

    def _rows(self, client: int | None, model: AdapterModel) -> Rows:
        """Return rows as a model reads them: held-out ones, or else what there is."""
        classes = bool(self.parts.division.classes)
        length = affordable(model.shape, model.flops, self.folders)
        for name, tokens in self._sets(client):
            rows = _first(tokens, 1 if classes else 2)
            if rows:
                places = tuple(f"{name} row {tokens.rows[i]}" for i in rows)
                whole = (tokens.sequence(i * tokens.width)[0].tolist() for i in rows)
                ids = tuple(shortened(row, length) for row in whole)
                return Rows(f"{name} rows", ids, places)
        return drawn_rows(model, self.experiment.federation.seed)

    def _sets(self, client: int | None) -> Iterator[tuple[str, TokenSet]]:
        """Yield the sets of rows that a model of a client, or the server's, can be asked about."""
        evaluator, local = self.parts.evaluator, self.parts.local
        common = evaluator.common.get(client) if client is not None else None
        if common is not None:
            yield "held-out", common.share.tokens
        if client is None or not evaluator.common:
            yield "held-out", evaluator.held_out.share.tokens
        asked = client if client is not None else min(local.resources, default=None)
        if asked is None or (client is None and evaluator.common):
            return
        privacy = self.experiment.privacy  # an outcome would tell of rows without noise
        hidden = privacy.unit == "row" or privacy.amplification
        if asked in evaluator.client_held_out and not hidden:
            yield "the client's held-out", evaluator.client_held_out[asked].share.tokens
        public = local.resources[asked].public
        if public is not None:
            yield "public", public.share.tokens
        if asked in local.shares and not hidden:
            yield "training", local.shares[asked].tokens


def _ways(kind: FolderKind, client: int | None) -> list[FolderKind]:
    """Return as what a folder is loaded: a global one with fresh own parts by PEFT alone, too."""
    return ["peft", kind] if kind == "own parts" and client is None else [kind]


def _asked(model: AdapterModel, rows: Rows) -> Outputs:
    return outputs(model.model, rows.ids, device=model.device, autocast=model.autocast)


def _first(tokens: TokenSet, least: int) -> list[int]:
    """Return the first examples whose first sequence has so many tokens."""
    found: list[int] = []
    for number in range(len(tokens)):
        if len(found) == ROWS:
            break
        if len(tokens.sequence(number * tokens.width)[0]) >= least:
            found.append(number)
    return found


def drawn_rows(model: AdapterModel, seed: int) -> Rows:
    """Return rows of drawn tokens, where there are no others."""
    inner: Any = model.model
    vocabulary = len(inner.get_input_embeddings().weight)
    rng = generator(seed, "verify")
    ids = rng.integers(vocabulary, size=(ROWS, DRAWN_TOKENS)).tolist()
    places = tuple(f"drawn row {number}" for number in range(ROWS))
    return Rows("rows of drawn tokens", tuple(ids), places)


def backbone_dtype(experiment: Experiment) -> torch.dtype:
    """Return the dtype that a backbone is loaded in."""
    return torch.bfloat16 if experiment.training.precision == "bf16" else torch.float32


@dataclass
class ExportCheck:
    """Compares an export with the model that was merged, on rows of drawn tokens: no data is needed.

    Attributes:
        experiment: Of the run that the model is from.
        model: With its adapter; not merged yet.
        reward: Whether its reward head is exported.
    """

    experiment: Experiment
    model: AdapterModel
    reward: bool = False

    def __post_init__(self) -> None:
        """Ask the model before it is merged."""
        self.device, self.autocast = self.model.device, self.model.autocast
        self.rows = drawn_rows(self.model, self.experiment.federation.seed)
        self.lack = lacking(self.model)
        self.said = _asked(self.model, self.rows)
        with self.model.reference():
            self.moved = distance(self.said, _asked(self.model, self.rows))
        if self.reward:
            self.said = Outputs(self.said.rewards, (), self.said.largest)

    def verify(self, folder: Path, *, sequence: bool) -> dict[str, Any]:
        """Load an export by ``transformers`` alone and compare it.

        Args:
            folder: The export.
            sequence: Whether it is a model for sequence classification.

        Raises:
            VerificationError: It does not load, or says something else.
        """
        if self.lack:
            return {"left_out": self.lack}
        start = time.perf_counter()
        dtype = backbone_dtype(self.experiment)
        loaded = load_whole(folder, dtype=dtype, device=self.device, sequence=sequence)
        found = outputs(loaded, self.rows.ids, device=self.device, autocast=self.autocast)
        compared = compare(
            self.said,
            found,
            dtype=self.autocast or torch.float32,
            name=str(folder),
            places=self.rows.places,
        )
        return {
            "folders": 1,
            "loaded_by": ["transformers"],
            "rows": len(self.rows.ids),
            "rows_are": self.rows.name,
            "difference": compared.difference,
            "allowed": compared.allowed,
            "moved": self.moved,
            "seconds": time.perf_counter() - start,
        }


def lacking(model: AdapterModel) -> str | None:
    """Return why a second copy of a model cannot be held beside it, if it cannot."""
    needed = sum(p.numel() * p.element_size() for p in model.model.parameters())
    free = _free_bytes(model.device)
    if needed <= free:
        return None
    return (
        f"a second copy of the model takes {human_bytes(needed)}, and {human_bytes(free)} of memory are "
        f"free on {model.device}"
    )


def _free_bytes(device: torch.device) -> int:
    """Return the memory that is free on a device."""
    import psutil

    if device.type == "cuda":
        torch.cuda.empty_cache()
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)
