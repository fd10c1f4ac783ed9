"""What is measured from the bytes of an ONNX file. Never imports torch.

What is named here loads neither onnx nor onnxruntime; `ovit_engine.certificate.verify.verify_file` does.
"""

from ovit_engine.certificate.errors import CertificateError as CertificateError
from ovit_engine.certificate.errors import ExportError as ExportError
from ovit_engine.certificate.errors import VerificationError as VerificationError
from ovit_engine.certificate.model import Certificate as Certificate
from ovit_engine.certificate.model import Promise as Promise
from ovit_engine.certificate.model import PromisedLayer as PromisedLayer
