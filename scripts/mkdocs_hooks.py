"""What mkdocs adds to the pages under docs/: those that follow from the sources and from measured rows."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
# Modules of the public API that a page shows as they are.
DECODING = ("flexjax.decoding.decode", "flexjax.kv_cache.KVCache", "flexjax.paged")


def on_config(config: Any) -> Any:
    """Takes pages of parts that this checkout lacks out of the navigation."""
    have = {
        "systems.md": (ROOT / "docs/systems.md").exists(),
        "api/decoding.md": bool(_decoding()),
    }
    config.nav = _without(config.nav, {page for page, there in have.items() if not there})
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
    if _decoding():
        entries = "\n".join(f"\n::: {name}" for name in _decoding())
        pages["api/decoding.md"] = f"# Decoding\n{entries}\n"
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))
    for name, picture in pictures.items():
        files.append(File.generated(config, name, abs_src_path=str(picture)))
    return files


def _factories(kind: str) -> str:
    """A page of all that `flexjax.masks` or `flexjax.scores` makes public, in its order."""
    source = (ROOT / "flexjax" / kind / "__init__.py").read_text()
    names = re.findall(rf"from (flexjax\.{kind}\.[a-z]\w*) import (\w+) as \w+", source)
    entries = "\n".join(f"\n::: {module}.{name}" for module, name in names)
    noun = "mask_mod" if kind == "masks" else "score_mod"
    return (
        f"# {kind.capitalize()}\n\nEach factory of `flexjax.{kind}` makes a {noun}. "
        f"`python -m flexjax.{kind}.NAME` draws one.\n{entries}\n"
    )


def _decoding() -> list[str]:
    """Those of DECODING that there are."""
    found = []
    for name in DECODING:
        module = name.removesuffix("." + name.split(".")[-1]) if name.count(".") > 1 else name
        path = ROOT / module.replace(".", "/")
        if path.is_dir() or path.with_suffix(".py").exists():
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
