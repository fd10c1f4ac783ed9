"""Notes on a measurement: a code and its numbers, from which the sentence for people is rendered."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

NoteCode = Literal[
    "no_vnni",
    "float_kernels",
    "first_output",
    "random_inputs",
    "few_images",
    "other_numbers",
    "macs_unknown",
    "tokens_unknown",
    "partly_measured",
    "other_kernels",
    "latency_not_measured",
    "no_zstandard",
]

_TEXTS: dict[NoteCode, str] = {
    "no_vnni": "this CPU lacks VNNI: its int8 kernels add pairs of products in 16 bits, which can saturate; "
    "parity was measured here and shows whether it does",
    "float_kernels": "ONNX Runtime computes {count} of {total} int8 weights in float: {listed}",
    "first_output": "parity compares {listed!r}, the first of {total} outputs",
    "random_inputs": "parity was measured on random inputs: no data was given",
    "few_images": "parity was measured on all {count} images given; {total} are recommended",
    "other_numbers": "the file stores {count:,} numbers in addition to {total:,} weights of products: not measured",
    "macs_unknown": "multiply-adds are not counted: {reason}",
    "tokens_unknown": "tokens are not counted: {reason}",
    "partly_measured": "parity and accuracy were measured again on {count} of {total} images; what the certificate "
    "says of all {total} is taken on trust: --data measures them all",
    "other_kernels": "the certificate states the kernels of {listed}; the kernels above are those of this machine",
    "latency_not_measured": "latency was not measured again: it is that of {listed}; ovit bench measures it here",
    "no_zstandard": "zstd_bytes {count} was not measured again: the package zstandard is not installed",
}

_LISTED = 3


class Note(BaseModel):
    """What a reader should know before trusting a number. `str` gives the sentence; code reads `code` and numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    code: NoteCode
    count: Annotated[int, Field(ge=0)] | None = None
    total: Annotated[int, Field(ge=0)] | None = None
    names: tuple[str, ...] = ()
    # why something can't be measured, for people
    reason: str = ""

    def __str__(self) -> str:
        listed = ", ".join(self.names[:_LISTED]) + (", ..." if len(self.names) > _LISTED else "")
        return _TEXTS[self.code].format(count=self.count, total=self.total, reason=self.reason, listed=listed)
