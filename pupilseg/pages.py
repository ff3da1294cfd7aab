"""Self-contained HTML pages: Jinja templates, escaped values, a strict Content-Security-Policy.

A template is an .html file beside the module that fills it in:

    render_page(Path(__file__).with_name("report.html"), title="...", pictures=[...])

Its head has to contain the policy, which `render_page` computes:

    <meta http-equiv="Content-Security-Policy" content="{{ policy }}">

Values are escaped (`autoescape`), and a misspelled name is an error. Data for a script goes into a
data block: `<script id="data" type="application/json">{{ data | tojson }}</script>`.

A page may show `data:` images and run the template's own `<style>` and `<script>` elements, which
the policy lists by their SHA-256 hashes. Browsers block everything else: network requests, `style`
and `on...` attributes, and any script injected through a value. The hashes are computed from
the template's text, so these elements cannot contain Jinja expressions.
"""

from __future__ import annotations

import base64
import hashlib
import re
from typing import TYPE_CHECKING, Any

import jinja2

if TYPE_CHECKING:
    from pathlib import Path

_INLINE = re.compile(r"<(style|script)>(.*?)</\1>", re.DOTALL)


def render_page(template: Path, **values: Any) -> str:
    """Renders a template and returns the page as text.

    Args:
        template: a Jinja template.
        values: the variables of the template, except `policy`.

    Raises:
        jinja2.TemplateError: the template is invalid, or uses a variable that has no value.
        ValueError: data for a script contains NaN or infinity.
    """
    source = template.read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    # Jinja sorts keys by default, but the order of files and columns matters here.
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    return environment.from_string(source).render(values, policy=content_security_policy(source))


def content_security_policy(source: str) -> str:
    """Returns the policy for a template's text (https://www.w3.org/TR/CSP3/)."""
    hashes: dict[str, list[str]] = {"style": [], "script": []}
    for kind, text in _INLINE.findall(source):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        hashes[kind].append(f"'sha256-{digest}'")
    allowed = [f"{kind}-src {' '.join(found)}" for kind, found in hashes.items() if found]
    return "; ".join(
        ["default-src 'none'", "img-src data:", "base-uri 'none'", "form-action 'none'", *allowed]
    )


def data_uri(encoded: bytes, kind: str) -> str:
    """Returns an image file's bytes as a `data:` URI; `kind` is "png" or "jpeg"."""
    return f"data:image/{kind};base64,{base64.b64encode(encoded).decode()}"
