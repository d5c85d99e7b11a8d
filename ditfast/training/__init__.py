"""The parts of `python -m ditfast.train`: config, weights and their average, parallelism, checkpoints, log, loop."""


class TrainError(Exception):
    """What the user has to change, in one line."""
