"""From a baked model to a measured ONNX file.

What is named here loads neither onnx nor onnxruntime; `ovit_engine.export.exporter.export_model` does.
"""

from ovit_engine.export.pack import load_packed as load_packed
