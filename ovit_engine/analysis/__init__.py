"""Speed and accuracy of ONNX files: bench, diagnose, 2:4 against dense. Only `sparse_bench`, on a GPU, needs torch."""

from ovit_engine.analysis.bench_report import BenchReport, BenchRow, read_bench, write_bench
from ovit_engine.analysis.certified_latency import add_latency
from ovit_engine.analysis.diagnose import diagnose_file
from ovit_engine.analysis.diagnosis import Diagnosis
from ovit_engine.analysis.file_bench import bench_files
from ovit_engine.analysis.sparse_table import ProductRow, SparseTable, read_table, write_table
from ovit_engine.certificate.ratio import Ratio

__all__ = [
    "BenchReport",
    "BenchRow",
    "Diagnosis",
    "ProductRow",
    "Ratio",
    "SparseTable",
    "add_latency",
    "bench_files",
    "diagnose_file",
    "read_bench",
    "read_table",
    "write_bench",
    "write_table",
]
