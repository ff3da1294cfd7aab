"""Builds the notebooks in notebooks/ and training/ from notebook.md.jinja.

python notebooks/build.py

The template is Markdown: its ```python blocks become code cells, the text between them Markdown
cells. The address of the repository comes from [project.urls] in pyproject.toml.
"""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import jinja2

ROOT = Path(__file__).resolve().parents[1]
TEMPLATE = Path(__file__).with_name("notebook.md.jinja")
FOLDERS = ("notebooks", "training")
DATASETS = {"efficientvit": "Conner/openeds-precomputed", "ellipse": "Conner/sddec25-01"}
"""Network -> default data set of its notebook."""
METADATA = {
    "accelerator": "GPU",
    "colab": {"gpuType": "T4", "provenance": []},
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def build(model: str) -> str:
    """Returns the notebook of a network as JSON."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    repository = project["urls"]["Repository"]
    path = repository.removeprefix("https://github.com/")
    (other,) = [dataset for name, dataset in DATASETS.items() if name != model]
    environment = jinja2.Environment(  # noqa: S701 - Markdown is not HTML
        trim_blocks=True, undefined=jinja2.StrictUndefined
    )
    text = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        model=model,
        dataset=DATASETS[model],
        other_dataset=other,
        repository=repository,
        colab=f"https://colab.research.google.com/github/{path}/blob/main/training/"
        f"train_{model}.ipynb",
    )
    # Even parts are Markdown, odd ones code.
    parts = re.split(r"^```python\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    cells = [
        _cell(number, part.strip(), is_code=number % 2 == 1)
        for number, part in enumerate(parts)
        if part.strip()
    ]
    notebook = {"cells": cells, "metadata": METADATA, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"


def _cell(number: int, source: str, *, is_code: bool) -> dict[str, Any]:
    code = {"execution_count": None, "outputs": []} if is_code else {}
    return {
        "cell_type": "code" if is_code else "markdown",
        "id": f"cell-{number:02}",
        "metadata": {},
        **code,
        "source": source.splitlines(keepends=True),
    }


def main() -> None:
    """Writes all notebooks."""
    for model in DATASETS:
        for folder in FOLDERS:
            path = ROOT / folder / f"train_{model}.ipynb"
            path.unlink(missing_ok=True)  # earlier versions had symbolic links
            path.write_text(build(model), encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
