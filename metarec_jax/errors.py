"""The errors of this package that callers may want to tell apart from others."""


class DataError(ValueError):
    """Input data that cannot be used; the message names the column or file, the row, and what to do."""


class ModelFileError(ValueError):
    """A saved model that cannot be loaded: damaged, foreign, or written by another version."""


class StoreError(Exception):
    """A store of users cannot be opened, read or written; the message says what to do."""
