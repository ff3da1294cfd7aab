"""Model files: checkpoints, safetensors and ONNX, their cards, and confidence calibration."""
