"""A trained network for other programs: StableHLO, ONNX, safetensors."""
