"""Notes of all noise that a process draws, in a file that no kill shortens: what was really released.

Each line is a release and the hash of its noise. A release is named by what it is for (purpose, round,
party, and the hash of what is noised) and by which of its tensors it is.
"""

import hashlib
import os

from fedloom.privacy import noise
from fedloom.privacy.secure_aggregation.server import ServerSession

SUM, SERVER = "unmasked sum", -1


def note(path, release, content):
    """Write a line at once, so that what follows it can be killed."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(file, f"{release} {hashlib.sha256(content).hexdigest()}\n".encode())
    os.close(file)


def note_into(path):
    """Have this process note each noise before it is used, and each sum of clients' when it is read."""
    stream, gaussian = noise.NoiseSource.stream, noise.NoiseStream.discrete_gaussian
    unmasked = ServerSession.unmasked

    def named(self, purpose, round, party, digest=b""):
        found = stream(self, purpose, round, party, digest)
        found.release, found.part = f"{purpose}|{round}|{party}|{digest.hex()}", 0
        return found

    def noted(self, sigma, count):
        found = gaussian(self, sigma, count)
        self.part += 1  # a tensor
        note(path, f"{self.release}|{self.part}", found.tobytes())
        return found

    def read(self, digest):
        found = unmasked(self, digest)
        release = f"{SUM}|{self.context.round}|{SERVER}|{self.context.run} {digest.hex()}|1"
        note(path, release, found.tobytes())
        return found

    noise.NoiseSource.stream, noise.NoiseStream.discrete_gaussian = named, noted
    ServerSession.unmasked = read


def releases(path):
    """The noise of each release that was drawn; the same release must have had the same."""
    found = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        release, noise = line.rsplit(" ", 1)
        assert found.setdefault(release, noise) == noise, "one release, two noises"
    assert len(set(found.values())) == len(found), "two releases, one noise"
    return found
