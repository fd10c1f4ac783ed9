"""A certificate as one self-contained page: no script, nothing from a network."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape

from ovit_engine.certificate.model import Certificate
from ovit_engine.certificate.render import LAYER_COLUMNS, fact_rows, layer_rows
from ovit_engine.certificate.sparse_cores import READINESS_COLUMNS, from_facts, has_2_4, matrices, readiness_row

_STYLE = """
:root { color-scheme: light dark; --line: #8884; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem;
  background: Canvas; color: CanvasText; }
h1 { font-size: 1.5rem; overflow-wrap: anywhere; } h2 { font-size: 1.15rem; margin-top: 2rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; vertical-align: top; padding: .3rem .8rem .3rem 0; border-bottom: 1px solid var(--line); }
.facts th { white-space: nowrap; } .facts td { overflow-wrap: anywhere; }
.layers td { white-space: nowrap; font-variant-numeric: tabular-nums; }
.layers .number { text-align: right; padding-right: 1.6rem; }
.note { border-left: .25rem solid #c80; padding-left: .8rem; }
code { overflow-wrap: anywhere; }
"""

_NUMBER = re.compile(r"[\d,.]+%?")


def to_html(certificate: Certificate) -> str:
    """The whole page, UTF-8 text. It shows the certificate; only ``ovit verify`` checks it."""
    title = f"Certificate of {certificate.file}"
    parts = [
        f"<h1>{escape(title)}</h1>",
        "<p>Measured from the bytes of the file when it was written. "
        f"<code>ovit verify {escape(certificate.file)}</code> measures all of it again"
        f"{' but latency, which is of this machine' if certificate.latency else ''}.</p>",
        *(f'<p class="note">{escape(str(note))}</p>' for note in certificate.notes),
        '<table class="facts">',
        *(
            f"<tr><th scope=row>{escape(name)}</th><td>{escape(value)}</td></tr>"
            for name, value in fact_rows(certificate)
        ),
        "</table>",
        f"<h2>Weights ({len(certificate.layers)})</h2>",
        _table(LAYER_COLUMNS, layer_rows(certificate)),
        *_readiness(certificate),
        "<h2>Operators</h2>",
        _table(("operator", "in the file", "as the runtime runs it"), _operators(certificate)),
        "<h2>Hashes</h2>",
        _table(
            ("of", "SHA-256"),
            [
                ("file", certificate.sha256),
                ("recipe", certificate.recipe_sha256),
                (f"{certificate.reference}'s outputs", certificate.reference_sha256),
            ],
        ),
    ]
    return _document(title, "\n".join(parts))


def _readiness(certificate: Certificate) -> list[str]:
    if not has_2_4(certificate):
        return []
    return [
        "<h2>2:4 on sparse tensor cores</h2>",
        "<p>Rules of shape, type and pattern. Whether a layer is faster for it only a measurement on a GPU says.</p>",
        _table(READINESS_COLUMNS, [readiness_row(from_facts(layer)) for layer in matrices(certificate)]),
    ]


def _operators(certificate: Certificate) -> list[tuple[str, ...]]:
    names = dict.fromkeys([*certificate.ops, *certificate.runtime_ops])
    return [(name, str(certificate.ops.get(name, 0)), str(certificate.runtime_ops.get(name, 0))) for name in names]


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    numbers = [all(_NUMBER.fullmatch(row[i]) for row in rows) for i in range(len(columns))]
    head = "".join(_cell("th scope=col", text, right) for text, right in zip(columns, numbers, strict=True))
    body = "\n".join(
        f"<tr>{''.join(_cell('td', text, right) for text, right in zip(row, numbers, strict=True))}</tr>"
        for row in rows
    )
    return (
        f'<div class="wide"><table class="layers"><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>'
    )


def _cell(tag: str, text: str, is_number: bool) -> str:
    return f"<{tag}{' class=number' if is_number else ''}>{escape(text)}</{tag.split()[0]}>"


def _document(title: str, body: str) -> str:
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )
