"""Exceptions of this package."""


class DataError(ValueError):
    """Invalid input data; the message names the column or file, the row, and what to do."""


class OptionError(ValueError):
    """Invalid option of a call, or one that the model cannot serve; the message says what to do."""


class ModelFileError(ValueError):
    """A saved model that cannot be loaded: damaged, not a model file, or written by another version."""


class StoreError(Exception):
    """A user store that cannot be opened, read or written; the message says what to do."""


class UnknownItemWarning(UserWarning):
    """Items of a history are unknown to the model."""


class IgnoredContextWarning(UserWarning):
    """The context of a call, which the strategy does not read."""
