"""Observers that keep what they are told."""

from fedloom.progress import Silent


class Heard(Silent):
    """Keeps the stages and warnings of a run."""

    def __init__(self):
        self.stages, self.warnings = [], []

    def stage(self, text):
        self.stages.append(text)

    def warning(self, text):
        self.warnings.append(text)
