"""The parts of `python -m ditfast.train`: config, weights and their average, parallelism, checkpoints, log, loop."""


class TrainError(Exception):
    """A user error, as one line that says what to change."""
