"""HTML pages escape values, and their policy allows only code from the template."""

import base64
import hashlib
import html
import json
import re

import jinja2
import pytest

from pupilseg.pages import content_security_policy, data_uri, render_page
from tests.helpers.paths import ROOT

TEMPLATES = sorted((ROOT / "pupilseg").rglob("*.html"))
PAGE = """<html><head><meta http-equiv="Content-Security-Policy" content="{{ policy }}">
<style>p { color: red; }</style></head><body>
{% for name in names %}
<p title="{{ name }}">{{ name }}</p>
{% endfor %}
<script id="data" type="application/json">{{ data | tojson }}</script>
<script>
"use strict";
</script></body></html>
"""
NASTY = "</script><script>alert('x')</script>\"&"


@pytest.fixture
def template(tmp_path):
    path = tmp_path / "page.html"
    path.write_text(PAGE)
    return path


def test_values_are_escaped(template):
    data = {"z": NASTY, "a": [1, None]}
    page = render_page(template, names=[NASTY, "eye"], data=data)
    assert page.count("<script") == page.count("</script") == 2
    assert html.unescape(re.search('<p title="(.*?)">', page)[1]) == NASTY
    assert '<p title="eye">eye</p>\n<script id' in page
    (block,) = re.findall('<script id="data" type="application/json">(.*?)</script>', page)
    assert list(json.loads(block).items()) == list(data.items())


def test_policy_lists_the_templates_own_code(template):
    page = render_page(template, names=[], data={})
    policy = html.unescape(re.search('Policy" content="(.*?)"', page)[1])
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    assert rules["default-src"] == rules["base-uri"] == rules["form-action"] == "'none'"
    assert rules["img-src"] == "data:"
    for kind, text in (("style", "p { color: red; }"), ("script", '\n"use strict";\n')):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert rules[f"{kind}-src"] == f"'sha256-{digest}'"
    assert "script-src" not in content_security_policy("<p>no script</p>")


def test_mistakes_in_templates_are_errors(template):
    with pytest.raises(jinja2.UndefinedError, match="names"):
        render_page(template, data={})
    with pytest.raises(ValueError, match="JSON"):
        render_page(template, names=[], data=float("nan"))


def test_data_uri():
    assert data_uri(b"\x89PNG", "png") == "data:image/png;base64,iVBORw=="


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.name)
def test_templates_follow_the_policy(path):
    """Browsers block code in attributes, and code that differs from that in the template."""
    text = path.read_text(encoding="utf-8")
    assert '<meta http-equiv="Content-Security-Policy" content="{{ policy }}">' in text
    assert not re.search(r'<[a-z][^>]*\s(style|on[a-z]+)="', text)
    for kind, code in re.findall(r"<(style|script)>(.*?)</\1>", text, re.DOTALL):
        assert not re.search(r"\{\{|\{%|\{#", code), kind
