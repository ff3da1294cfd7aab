"""Scores a model on a split, calibrates its confidence and writes the report."""
