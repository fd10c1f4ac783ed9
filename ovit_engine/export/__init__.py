"""From a baked model to a measured ONNX file: `exporter.export_model`.

Importing this package loads neither onnx nor onnxruntime.
"""
