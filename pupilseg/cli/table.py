"""Prints tables of headings and values."""

from __future__ import annotations

from typing import Any


def print_table(lines: dict[str, Any]) -> None:
    """Prints one heading and value per line; a dictionary as a value gets one line per entry."""
    width = max(len(heading) for heading in lines) + 2
    for heading, value in lines.items():
        texts = [value]
        if isinstance(value, dict):
            texts = [f"{k}: {_short(v)}" for k, v in value.items()] or ["not recorded"]
        for number, text in enumerate(texts):
            print(f"{'' if number else heading:<{width}}{text}")


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
