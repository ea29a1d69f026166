"""mkdocs' hook: the files that pages link to beside docs/ are copied into the site, beside its pages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

_LINKED = ("examples/*.py", "examples/notices.txt", "src/kvembed/lancedb_function.py")


def on_files(files: Files, config: Any) -> Files:
    """Add them."""
    root = Path(config["config_file_path"]).parent
    for path in sorted(found for pattern in _LINKED for found in root.glob(pattern)):
        name = path.relative_to(root).as_posix()
        files.append(File(name, str(root), config["site_dir"], use_directory_urls=False))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """In the repository they are a folder above the pages."""
    return markdown.replace("](../examples/", "](examples/").replace("](../src/", "](src/")
