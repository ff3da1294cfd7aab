"""Colab setup, and what the notebooks show."""
