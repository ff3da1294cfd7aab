"""Evaluation of model files: scores, confidence calibration, plots and a report."""
