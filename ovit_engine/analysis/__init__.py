"""Benchmarks, diagnosis and 2:4 readiness of ONNX files."""
