"""Observers that keep what they are told."""

from fedloom.runs.observers import Silent


class Heard(Silent):
    """Keeps the stages and warnings of a run."""

    def __init__(self):
        self.stages, self.warnings = [], []

    def stage(self, text):
        self.stages.append(text)

    def warning(self, text):
        self.warnings.append(text)


class HeardOfComparison(Heard):
    """Keeps the stages and warnings of a comparison, and how far it was at its begin and after each run."""

    def __init__(self):
        super().__init__()
        self.far, self.how_far = [], None

    def begin(self, comparison, waiting, workers, far):
        self.how_far = far if waiting else None
        self.far += [far()] if waiting else []

    def run_done(self, name, metric, value, done, of):
        self.far.append(self.how_far())
