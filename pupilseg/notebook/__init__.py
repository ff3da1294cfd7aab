"""Colab setup, and output of the notebooks."""
