"""HTML pages from jinja2 templates: one style sheet, everything escaped, no script, nothing from a network."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def render_html(template: Path, **facts: Any) -> str:
    """Return the page that a template makes of `facts`; it may extend `base.html` and import `parts.html`."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    loader = FileSystemLoader([Path(__file__).parent, template.parent])
    environment = Environment(
        loader=loader,
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(template.name).render(facts)
