"""Renders a page from its template: one HTML file that needs nothing else and asks no server.

The style and the script are inside the page. Its content security policy forbids every request and
every script but that one, so a file or class name cannot run anything, even if escaping failed.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from arrowhead import fileio

TEMPLATES = Path(__file__).parent / "templates"


def render(template: str, content: Mapping[str, Any]) -> str:
    """Fill a template of TEMPLATES; all text is escaped, except what a template marks as safe."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    script = (TEMPLATES / "script.js").read_text("utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    style = (TEMPLATES / "style.css").read_text("utf-8")
    return environment.get_template(template).render(
        content, style=style, script=script, script_hash=digest
    )


def write(path: Path, template: str, content: Mapping[str, Any]) -> Path:
    """Render a page into a file, complete or not at all; returns its path."""
    with fileio.atomic_write(path) as draft:
        draft.write_text(render(template, content), "utf-8", errors="backslashreplace")
    return path
