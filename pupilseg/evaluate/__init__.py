"""Evaluates model files: scores, confidence calibration, plots and a report."""
