"""Finds pupils in images and video; needs no torch."""

from pupilseg.predict.predictor import Prediction, Predictor

__all__ = ["Prediction", "Predictor"]
