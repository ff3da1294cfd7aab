"""As in Colab: base of the errors of its services."""


class Error(Exception):
    """Base class."""
