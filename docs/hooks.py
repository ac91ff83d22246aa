"""Adds the API reference to the website: one page for each package of evosweep, made when the site is built."""

from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
FOLDER = "reference"


def modules_by_package() -> dict[str, list[str]]:
    """Return package -> dotted names of its public modules; ``evosweep`` itself holds those in no package."""
    packages: dict[str, list[str]] = {}
    for path in sorted((ROOT / "evosweep").rglob("*.py")):
        names = list(path.relative_to(ROOT).with_suffix("").parts)
        if "conf" in names or names[-1] == "__main__":
            continue
        package = ".".join(names[:2]) if len(names) > 2 else names[0]
        names = names[:-1] if names[-1] == "__init__" else names
        if not any(name.startswith("_") for name in names):
            packages.setdefault(package, []).append(".".join(names))
    return packages


def page(package: str, modules: list[str]) -> str:
    """Return the Markdown of one package's page."""
    return f"# {package}\n\n" + "".join(
        f"## {name}\n\n::: {name}\n    options: {{show_root_heading: false, show_root_toc_entry: false}}\n\n"
        for name in modules
    )


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the pages into the navigation."""
    pages: list[Any] = [{package: f"{FOLDER}/{package}.md"} for package in modules_by_package()]
    config.nav = [{"API reference": pages} if "API reference" in entry else entry for entry in config.nav or []]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages themselves."""
    for package, modules in modules_by_package().items():
        files.append(File.generated(config, f"{FOLDER}/{package}.md", content=page(package, modules)))
    return files
