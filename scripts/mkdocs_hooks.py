"""What mkdocs adds to the pages under docs/: those that follow from the sources and from measured rows."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
# Pages of parts that not every checkout has: title, and what they show. A package stands for all that it makes
# public.
PARTS = {
    "api/decoding.md": ("Decoding", ("flexjax.decoding.decode", "flexjax.kv_cache.KVCache")),
    "api/paged.md": ("Paged caches", ("flexjax.paged",)),
    "api/systems.md": ("Systems", ("flexjax.systems",)),
}
OPTIONAL = ("systems.md", "masks.md")


def on_config(config: Any) -> Any:
    """Takes pages of parts that this checkout lacks out of the navigation."""
    missing = {page for page in OPTIONAL if not (ROOT / "docs" / page).exists()}
    missing |= {page for page, (_, names) in PARTS.items() if not _existing(names)}
    config.nav = _without(config.nav, missing)
    return config


def on_files(files: Files, config: Any) -> Files:
    """Adds the generated pages."""
    if str(ROOT) not in sys.path:
        sys.path.append(str(ROOT))
    from benchmarks.report import page

    performance, pictures = page()
    pages = {"performance.md": performance}
    for kind in ("masks", "scores"):
        pages[f"api/{kind}.md"] = _factories(kind)
    for name, (title, names) in PARTS.items():
        if _existing(names):
            pages[name] = _page(title, "", _existing(names))
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


def _existing(names: tuple[str, ...]) -> list[str]:
    """Those of the names that this checkout has, packages as all that they make public."""
    found: list[str] = []
    for name in names:
        if (ROOT / name.replace(".", "/") / "__init__.py").exists():
            found += _public(name)
        elif (ROOT / name.rpartition(".")[0].replace(".", "/")).with_suffix(".py").exists():
            found.append(name)
    return found


def _without(nav: Any, pages: set[str]) -> Any:
    """The navigation without entries for `pages`."""
    if isinstance(nav, list):
        return [kept for entry in nav if (kept := _without(entry, pages)) is not None]
    if isinstance(nav, dict):
        kept = {title: _without(entry, pages) for title, entry in nav.items()}
        return {t: e for t, e in kept.items() if e} or None
    return None if nav in pages else nav
