"""Draws which package imports which into docs/explanation/architecture.md, from the imports themselves: `make architecture`."""

import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "explanation" / "architecture.md"
PICTURE = re.compile(r"```mermaid\n.*?```", re.DOTALL)
EVERYBODYS = {"errors", "labels", "config"}  # every package imports them: their arrows would hide the others


def package_of(file: Path) -> str:
    """`training` for heartseg/training/engine.py, `jobs` for all of jobs/."""
    top, name = file.relative_to(ROOT).parts[:2]
    return "jobs" if top == "jobs" else name


def read_imports() -> dict[str, set[str]]:
    """Package -> the other packages that its files import."""
    found: dict[str, set[str]] = {}
    for file in [*sorted((ROOT / "heartseg").glob("*/*.py")), *sorted((ROOT / "jobs").rglob("*.py"))]:
        modules = [node.module or "" for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.ImportFrom)]
        taken = {module.split(".")[1] for module in modules if module.startswith("heartseg.")}
        found.setdefault(package_of(file), set()).update(taken - EVERYBODYS - {package_of(file)})
    return {package: imported for package, imported in found.items() if package not in EVERYBODYS}


def reach(package: str, imports: dict[str, set[str]]) -> set[str]:
    """Every package that is imported by a package or by one that it imports."""
    direct = imports.get(package, set())
    return direct.union(*(reach(other, imports) for other in direct))


def draw() -> str:
    """A mermaid flowchart: an arrow from each package to those that it imports and reaches by no longer way."""
    imports = read_imports()
    lines = ["```mermaid", "flowchart TD"]
    for package, direct in imports.items():
        folder = package if package == "jobs" else f"heartseg/{package}"
        lines.append(f'    {package}["{folder}/"]')
        indirect = set().union(*(reach(other, imports) for other in direct))
        lines += [f"    {package} --> {other}" for other in sorted(direct - indirect)]
    return "\n".join([*lines, "```"])


def main() -> int:
    """Write the picture, or with --check return 1 when the one on the page is out of date."""
    page = PAGE.read_text()
    drawn = PICTURE.sub(lambda _: draw(), page, count=1)
    if "--check" in sys.argv:
        return int(drawn != page)
    PAGE.write_text(drawn)
    return 0


if __name__ == "__main__":
    sys.exit(main())
