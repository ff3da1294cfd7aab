"""Model files: checkpoints, safetensors and ONNX, and what they say of themselves."""
