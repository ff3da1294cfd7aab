"""Stands in for the package of Colab's runtime: what the notebooks use of it, seen on the disk."""
