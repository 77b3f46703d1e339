"""Noise that nobody can subtract: from 32 secret bytes, for one run; the same release has the same noise.

Each stream of numbers is the keystream of ChaCha20 under a key that HKDF-SHA256 (RFC 5869) derives from
the secret and from what the noise is for: run, purpose, round, party, and the hash of what is noised. The
same release asked again gets the same noise, so that asking again averages nothing away; any other gets
fresh noise. It is the one exception to randomness from the seed (``randomness.py``).

Gaussian noise on a sum is drawn on the integers, exactly: floating-point noise added to a floating-point
value lands on numbers that depend on the value (Haney et al. 2022, "Precision-based attacks and interval
refining", https://arxiv.org/abs/2207.13793).
"""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Callable, Iterable
from decimal import Context, Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedloom.errors import CheckpointError, OutputError, SettingsError

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Bools = NDArray[np.bool_]

KEY_BYTES = 32

LARGEST_SIGMA = 2.0**48
"""Largest standard deviation of discrete noise, in steps of the grid: 60 of them still fit in int64."""

CHUNK = 1 << 17
"""Candidates that are drawn at a time: their arrays stay in a core's cache."""

MARGIN = 2.0**-40
"""A coin whose uniform number is closer than this to its probability is tossed in exact arithmetic. It is
far above the error of the float64 that the probability is first computed in (below 2^-44)."""


class NoiseSource:
    """Where noise and secret coins of one run come from.

    Attributes:
        run: Id of the run; sources of two runs are independent even under one key.
    """

    def __init__(self, key: bytes, run: str) -> None:
        """Take the secret.

        Args:
            key: 32 bytes that nobody else knows.
            run: Id of the run.

        Raises:
            ValueError: The key has another length.
            SettingsError: The package ``cryptography`` is missing.
        """
        if len(key) != KEY_BYTES:
            raise ValueError(f"a noise key has {KEY_BYTES} bytes, this one has {len(key)}")
        _primitives()
        self._key, self.run = key, run

    @classmethod
    def fresh(cls, run: str) -> NoiseSource:
        """Return a source with a key of the operating system's entropy."""
        return cls(os.urandom(KEY_BYTES), run)

    @classmethod
    def seeded(cls, seed: int, run: str) -> NoiseSource:
        """Return a source whose key follows from a seed: reproducible, therefore not private."""
        return cls(hashlib.sha256(f"fedloom noise|{seed}".encode()).digest(), run)

    @classmethod
    def kept(cls, path: Path, run: str, *, create: bool) -> NoiseSource:
        """Return the source whose key is in a file that its owner alone can read (mode 0600).

        Args:
            path: The file: 64 hexadecimal digits.
            run: Id of the run.
            create: Whether a new key is drawn and written; the file must not exist then.

        Raises:
            CheckpointError: A key that was written before is missing or damaged.
            OutputError: It cannot be written.
        """
        if not create:
            try:
                return cls(bytes.fromhex(path.read_text("ascii")), run)
            except (OSError, ValueError) as error:
                raise CheckpointError(
                    f"{path}: the key of this run's noise cannot be read, and another key would draw "
                    "other noise for releases that were made: start a new run"
                ) from error
        key = os.urandom(KEY_BYTES)
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            found = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(found, "w") as file:
                file.write(key.hex())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise OutputError(f"cannot write {path}: {error.strerror}") from error
        return cls(key, run)

    def of(self, run: str) -> NoiseSource:
        """Return the source under the same secret for another id; both are independent."""
        return NoiseSource(self._key, run)

    @property
    def commitment(self) -> str:
        """SHA-256 over key and run, which may be published: it does not tell the key."""
        return hashlib.sha256(b"fedloom commitment|" + self._key + self.run.encode()).hexdigest()

    def digest(self, content: Iterable[bytes]) -> bytes:
        """Return a hash of what is noised that tells nothing of it to those without the key: 32 bytes."""
        keyed = hmac.new(self._key, b"fedloom digest|", "sha256")
        for part in content:
            keyed.update(part)
        return keyed.digest()

    def stream(self, purpose: str, round: int, party: int, digest: bytes = b"") -> NoiseStream:
        """Return the numbers for one release, from their beginning.

        Args:
            purpose: What they are for: ``"sum"``, ``"cohort"``.
            round: From 1; 0 for what happens once.
            party: Id of the client that draws, -1 for the server.
            digest: Hash of what is noised: another content gets other noise.
        """
        fields = (self.run.encode(), purpose.encode(), b"%d" % round, b"%d" % party, digest)
        info = b"".join(len(field).to_bytes(4, "big") + field for field in fields)
        return NoiseStream(lambda name: _keystream(self._key, info, name))


class NoiseStream:
    """Numbers of one release; each call goes on where the one before stopped."""

    def __init__(self, keystream: Callable[[bytes], Any]) -> None:
        """Take a function from a name to a ChaCha20 encryptor of its own."""
        self._main = keystream(b"main")
        self._exact = keystream(b"exact")

    def words(self, n: int) -> NDArray[np.uint64]:
        """Return ``n`` uniform 64-bit integers, shape ``(n,)``."""
        return np.frombuffer(self._main.update(bytes(8 * n)), "<u8").astype(np.uint64, copy=False)

    def uniform(self, n: int) -> Floats:
        """Return ``n`` uniform multiples of 2^-53 in [0, 1), shape ``(n,)``."""
        return (self.words(n) >> np.uint64(11)).astype(np.float64) * 2.0**-53

    def normal(self, n: int) -> Floats:
        """Return ``n`` standard normal numbers, shape ``(n,)``, by inversion of 52 uniform bits each.

        In floating point, so their last bits may tell what they are added to: where privacy rests on it,
        use :meth:`discrete_gaussian`.
        """
        from scipy.special import ndtri  # scipy takes half a second, and most runs add no noise

        middles = ((self.words(n) >> np.uint64(12)) + 0.5) * 2.0**-52
        return np.asarray(ndtri(middles), np.float64)

    def discrete_gaussian(self, sigma: float, n: int) -> Integers:
        """Return ``n`` draws of the discrete Gaussian, P[x] proportional to exp(-x^2 / (2 sigma^2)).

        The distribution is exact: algorithm 3 of Canonne, Kamath and Steinke 2020, "The Discrete Gaussian
        for Differential Privacy", https://arxiv.org/abs/2004.00010, with all candidates at once. The time
        that rejection takes depends on the noise alone, not on what it is added to.

        Args:
            sigma: From 0 (no noise) to 2^48. As a float it is a rational number, and taken as that.
            n: How many, shape ``(n,)``.

        Raises:
            ValueError: ``sigma`` is out of range.
        """
        if not 0 <= sigma <= LARGEST_SIGMA:
            raise ValueError(f"sigma must be from 0 to 2^48, got {sigma}")
        if sigma == 0:
            return np.zeros(n, np.int64)
        found, missing = [np.zeros(0, np.int64)], n
        while missing > 0:
            drawn = self._candidates(sigma, min(CHUNK, 2 * missing + 64))[:missing]
            found.append(drawn)
            missing -= len(drawn)
        return np.concatenate(found)

    def _candidates(self, sigma: float, n: int) -> Integers:
        """Return those of ``n`` candidates that the rejections leave: some discrete Gaussian numbers."""
        t = int(sigma) + 1
        y = self._discrete_laplace(t, n)
        distance = np.abs(y).astype(np.float64) - sigma * (sigma / t)
        exact_sigma = Fraction(sigma)

        def exponent(i: int) -> Fraction:
            return (abs(int(y[i])) - exact_sigma**2 / t) ** 2 / (2 * exact_sigma**2)

        kept: Integers = y[self._coins((distance / sigma) ** 2 / 2, exponent)]
        return kept

    def _discrete_laplace(self, t: int, n: int) -> Integers:
        """Return some of ``n`` candidates, P[y] proportional to exp(-|y| / t), for a whole ``t``."""
        u = self._below(t, n)
        u = u[self._coins(u / t, lambda i: Fraction(int(u[i]), t))]
        y = u + np.int64(t) * self._geometric(len(u))
        negative = (self.words(len(y)) & np.uint64(1)).astype(np.bool_)
        signed = np.where(negative, -y, y)
        kept: Integers = signed[~(negative & (y == 0))]  # zero has one sign, not two
        return kept

    def _below(self, bound: int, n: int) -> Integers:
        """Return some of ``n`` candidates: uniform integers from 0 to ``bound`` - 1."""
        mask = np.uint64((1 << (bound - 1).bit_length()) - 1)
        drawn = (self.words(n) & mask).astype(np.int64)
        return drawn[drawn < bound]

    def _geometric(self, n: int) -> Integers:
        """Return ``n`` numbers of successes of a coin of probability 1/e before its first failure."""
        found = np.zeros(n, np.int64)
        going = np.arange(n)
        while len(going):
            going = going[self._coins(np.ones(len(going)), lambda i: Fraction(1))]
            found[going] += 1
        return found

    def _coins(self, exponents: Floats, exact: Callable[[int], Fraction]) -> Bools:
        """Return one toss for each exponent x >= 0: true with probability exp(-x), exactly.

        A toss compares a uniform number, of which 64 bits are drawn, with the probability in float64.
        Where they are closer than :data:`MARGIN` more bits are drawn and both are compared exactly.

        Args:
            exponents: ``(n,)``; float64 near enough for exp(-x) to be right to 2^-44.
            exact: From a position to its exponent.
        """
        words = self.words(len(exponents))
        gap = np.exp(-exponents) - words * 2.0**-64
        tosses: Bools = gap > 0
        for i in np.flatnonzero(np.abs(gap) < MARGIN).tolist():
            tosses[i] = self._exact_coin(int(words[i]), exact(i))
        return tosses

    def _exact_coin(self, word: int, exponent: Fraction) -> bool:
        """Return whether a uniform number that begins with 64 bits is below exp(-exponent)."""
        if exponent == 0:
            return True
        bits = 64
        while True:
            word = word << 64 | int.from_bytes(self._exact.update(bytes(8)), "big")
            bits += 64
            context = Context(prec=bits // 3 + 30)
            minus = context.divide(Decimal(-exponent.numerator), Decimal(exponent.denominator))
            scaled = context.multiply(context.exp(minus), Decimal(1 << bits))
            error = context.multiply(scaled, context.power(Decimal(10), Decimal(-bits // 3 - 8)))
            if context.add(scaled, -error) > word + 1:
                return True
            if context.add(scaled, error) < word:
                return False


def _keystream(key: bytes, info: bytes, name: bytes) -> Any:
    """Return a ChaCha20 encryptor, whose output on zeros is the keystream."""
    hashes, hkdf, ciphers = _primitives()
    derived = hkdf.HKDF(hashes.SHA256(), KEY_BYTES, salt=None, info=info + name).derive(key)
    return ciphers.Cipher(ciphers.algorithms.ChaCha20(derived, bytes(16)), mode=None).encryptor()


def _primitives() -> tuple[Any, Any, Any]:
    """Return the modules of ``cryptography`` that are used, which is the extra ``fedloom[privacy]``."""
    try:
        from cryptography.hazmat.primitives import ciphers, hashes
        from cryptography.hazmat.primitives.kdf import hkdf
    except ModuleNotFoundError as error:
        raise SettingsError(
            ["privacy needs the package cryptography: pip install 'fedloom[privacy]'"]
        ) from error
    return hashes, hkdf, ciphers
