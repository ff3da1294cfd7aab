"""Prediction on images and video with ONNX Runtime, without torch."""

from pupilseg.predict.predictor import Prediction, Predictor

__all__ = ["Prediction", "Predictor"]
