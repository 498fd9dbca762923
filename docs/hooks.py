"""Pages of the site that are made while it is built: the files at the root, and one API page per folder of modules.

mkdocs calls the functions `on_...` at the moments that its documentation of hooks names; mkdocs.yml names this file.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("learner", "actors", "buffer", "verifier", "launch")
AT_THE_ROOT = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the API pages into the navigation, which names their folder."""
    for section in config.nav or []:
        for pages in section.values():
            pages[:] = [
                {"API": [{package: _pages_of(package)} for package in PACKAGES]} if page == {"API": "api/"} else page
                for page in pages
            ]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are not in docs/."""
    for name, page in AT_THE_ROOT.items():
        text = (ROOT / name).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=_from_root(text)))
    for package in PACKAGES:
        for folder in _folders(package):
            modules = "\n".join(f"::: {_dotted(path)}\n" for path in _modules(folder))
            text = f"# `{folder.relative_to(ROOT).as_posix()}/`\n\n{modules}"
            files.append(File.generated(config, _page(folder), content=text))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Links to files at the root lead to their pages."""
    for name, page in AT_THE_ROOT.items():
        markdown = markdown.replace(f"](../{name}", f"]({page}")
    return markdown


def _from_root(text: str) -> str:
    """A page of the root as one of docs/."""
    text = re.sub(r"\]\(docs/", "](", text)
    for name, page in AT_THE_ROOT.items():
        text = text.replace(f"]({name}", f"]({page}")
    return re.sub(r"\[([^]]*)\]\(LICENSE\)", r"\1", text)


def _folders(package: str) -> list[Path]:
    """The package and its folders that hold modules, in the order of their names."""
    return sorted({path.parent for path in (ROOT / package).rglob("*.py") if _modules(path.parent)})


def _modules(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.py") if not path.stem.startswith("__"))


def _dotted(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def _page(folder: Path) -> str:
    return f"api/{'-'.join(folder.relative_to(ROOT).parts)}.md"


def _pages_of(package: str) -> list[dict[str, str]]:
    return [{f"{folder.relative_to(ROOT).as_posix()}/": _page(folder)} for folder in _folders(package)]
