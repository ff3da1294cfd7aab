"""Base class of errors, as in Colab."""


class Error(Exception):
    """Base class."""
