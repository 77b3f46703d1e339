"""A judge that is a language model in a local folder or on the Hub, asked in JudgeLM's form."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fedloom.evaluation.generate import Ask, generate, load_encoder
from fedloom.evaluation.judges.base import Case, Verdict
from fedloom.evaluation.judges.parsing import parse_judgelm
from fedloom.evaluation.judges.prompts import judgelm_prompt
from fedloom.models.consistency import require_tokens
from fedloom.models.load import context_length, load_backbone

SCALE = (1.0, 10.0)


class ModelJudge:
    """Asks a causal LM for a line of scores; what it cannot read or say is counted, not scored."""

    compares = True
    scale = SCALE

    def __init__(
        self,
        path: str,
        *,
        temperature: float = 0.2,
        max_new_tokens: int = 64,
        reparse: int = 2,
        batch_size: int = 8,
        device: torch.device | None = None,
    ) -> None:
        """Load the judge.

        Args:
            path: Folder or Hub name of a causal LM such as JudgeLM.
            temperature: Of its answers (2502.14187: 0.2).
            max_new_tokens: Only the first line is read, so little is needed.
            reparse: Times a verdict that cannot be read is asked for again, with another seed.
            batch_size: Cases asked together.
            device: Where it runs (default: CPU); on a GPU in bfloat16.

        Raises:
            ModelError: There is no such model.
        """
        self.name = path.rstrip("/").rpartition("/")[2]
        self.encoder = load_encoder(path)
        device = device or torch.device("cpu")
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        pad = self.encoder.tokenizer.pad_token_id
        self.model = load_backbone(path, pad_token_id=pad, dtype=dtype, device=device).eval()
        require_tokens(self.model, self.encoder.tokenizer, path)
        self.room = context_length(self.model) - max_new_tokens
        self.temperature, self.max_new_tokens = temperature, max_new_tokens
        self.batch_size = batch_size
        self.reparse = reparse if temperature else 0
        self.asked = 0

    def check(self) -> None:
        """It was loaded when it was made."""

    def rate(self, cases: Sequence[Case]) -> list[Verdict]:
        """Return one verdict a case; a prompt longer than the context is not asked at all."""
        prompts = [tuple(self.encoder.prompt(judgelm_prompt(case))) for case in cases]
        verdicts = [Verdict(None, "longer than the judge's context")] * len(cases)
        open_cases = [i for i, prompt in enumerate(prompts) if len(prompt) <= self.room]
        for attempt in range(self.reparse + 1):
            asks = [Ask(prompts[i], self.temperature, cases[i].seed + attempt) for i in open_cases]
            self.asked += len(asks)
            texts = generate(self.model, self.encoder, asks, self.max_new_tokens, self.batch_size)
            for i, text in zip(open_cases, texts, strict=True):
                verdicts[i] = parse_judgelm(text, len(cases[i].answers), self.scale)
            open_cases = [i for i in open_cases if verdicts[i].scores is None]
        return verdicts

    def costs(self) -> dict[str, float]:
        """Return how often it was asked."""
        return {"requests": float(self.asked)}
