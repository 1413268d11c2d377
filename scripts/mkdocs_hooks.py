"""What mkdocs adds to the pages under docs/: those that follow from the sources and from measured rows."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent


def on_files(files: Files, config: Any) -> Files:
    """Adds the generated pages."""
    if str(ROOT) not in sys.path:
        sys.path.append(str(ROOT))
    from benchmarks.report import page

    performance, pictures = page()
    pages = {"performance.md": performance}
    for kind in ("masks", "scores"):
        pages[f"api/{kind}.md"] = _factories(kind)
    for package, title in (("paged", "Paged caches"), ("systems", "Systems")):
        pages[f"api/{package}.md"] = _page(title, "", _public(f"flexjax.{package}"))
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))
    for name, picture in pictures.items():
        files.append(File.generated(config, name, abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Turns links to what is no page, which work in a checkout alone, into the names of the files."""

    def named(link: re.Match[str]) -> str:
        text, target = link.groups()
        outside = not target.endswith(".md") and (ROOT / "docs" / target).exists()
        return f"{text} (`{target.removeprefix('../')}`)" if outside else link[0]

    return re.sub(r"\[([^]]+)\]\((\.\./[^)]+)\)", named, markdown)


def _factories(kind: str) -> str:
    """A page of all that `flexjax.masks` or `flexjax.scores` makes public, in its order."""
    noun = "mask_mod" if kind == "masks" else "score_mod"
    text = f"Each factory of `flexjax.{kind}` makes a {noun}. `python -m flexjax.{kind}.NAME` draws one.\n"
    return _page(kind.capitalize(), text, _public(f"flexjax.{kind}"))


def _page(title: str, text: str, names: list[str]) -> str:
    return f"# {title}\n\n{text}" + "".join(f"\n::: {name}\n" for name in names)


def _public(package: str) -> list[str]:
    """What a package makes public, in its order: lines such as `from flexjax.a.b import c as c`."""
    source = (ROOT / package.replace(".", "/") / "__init__.py").read_text()
    found = re.findall(r"^from (flexjax\.\S+) import (\w+) as \2$", source, re.MULTILINE)
    # Types of arguments live in modules that begin with an underscore.
    return [f"{module}.{name}" for module, name in found if "._" not in module]
