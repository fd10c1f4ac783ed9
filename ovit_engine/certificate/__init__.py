"""What is measured from the bytes of an ONNX file. Never imports torch.

What is named here loads neither onnx nor onnxruntime; `ovit_engine.certificate.verify.verify_file` does.
"""

from ovit_engine.certificate.errors import CertificateError, ExportError, VerificationError
from ovit_engine.certificate.model import Certificate, Promise, PromisedLayer

__all__ = ["Certificate", "CertificateError", "ExportError", "Promise", "PromisedLayer", "VerificationError"]
