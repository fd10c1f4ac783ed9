"""From a baked model to a measured ONNX file.

What is named here loads neither onnx nor onnxruntime. The functions that do are imported from their modules:
``exporter.export_model``, ``verify.verify_file``, ``bench.bench``.
"""

from ovit_engine.export.certificate import Certificate as Certificate
from ovit_engine.export.errors import CertificateError as CertificateError
from ovit_engine.export.errors import ExportError as ExportError
from ovit_engine.export.errors import VerificationError as VerificationError
from ovit_engine.export.pack import load_packed as load_packed
from ovit_engine.export.promise import Promise as Promise
from ovit_engine.export.promise import PromisedLayer as PromisedLayer
