"""Writes examples/notebooks as Jupyter notebooks: python scripts/to_ipynb.py FOLDER"""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path

import jupytext

ROOT = Path(__file__).resolve().parent.parent
BADGE = "https://colab.research.google.com/assets/colab-badge.svg"


def colab(name: str) -> str | None:
    """Markdown of a badge that opens the notebook in Colab; None if no GitHub repository is known."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    repository = project.get("urls", {}).get("Repository", "").removesuffix("/")
    if not repository.startswith("https://github.com/"):
        return None
    path = repository.removeprefix("https://github.com/")
    link = f"https://colab.research.google.com/github/{path}/blob/main/examples/notebooks/{name}"
    return f"[![Open in Colab]({BADGE})]({link})"


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for source in sorted((ROOT / "examples" / "notebooks").glob("*.py")):
        notebook = jupytext.read(source)
        name = source.with_suffix(".ipynb").name
        badge = colab(name)
        if badge is not None:
            notebook.cells[0].source += f"\n\n{badge}"
        jupytext.write(notebook, folder / name)
        print(folder / name)


if __name__ == "__main__":
    main()
