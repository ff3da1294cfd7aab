"""ONNX export and the release of weights."""
