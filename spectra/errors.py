"""What a user can do wrong. Every such error is a `SpectraError` whose text is one sentence with its remedy."""


class SpectraError(Exception):
    """Bad input or an impossible request: the message says what is wrong, where, and what to do."""
