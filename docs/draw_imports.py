"""Draw which folders of the orchestrator import which, as a Mermaid graph, into docs/architecture.md.

    python docs/draw_imports.py [--check]

An arrow that a longer path already shows is left out. `--check` writes nothing: exit status 1 where the page is out of date.
"""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

HERE = Path(__file__).parent
PAGE = HERE / "architecture.md"
PACKAGE = HERE.parent / "orchestrator" / "labctl_orchestrator"
BEGIN, END = "<!-- drawn by docs/draw_imports.py -->\n", "<!-- end -->\n"


def imported_folders() -> dict[str, set[str]]:
    """By folder, `api` (the modules beside the folders) among them: the other folders that its modules import."""
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    found: dict[str, set[str]] = {folder: set() for folder in sorted(folders)} | {"api": set()}
    for file in PACKAGE.rglob("*.py"):
        own = file.parent.name if file.parent.name in folders else "api"
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("labctl_orchestrator"):
                names = [node.module] if "." in node.module else [f"{node.module}.{alias.name}" for alias in node.names]
                found[own] |= {name.split(".")[1] for name in names} & (folders - {own})
    return found


def drawing(imports: dict[str, set[str]]) -> str:
    """The graph in Mermaid's language. Raises ValueError for a circle."""
    reached: dict[str, set[str]] = {}

    def reach(folder: str, path: tuple[str, ...] = ()) -> set[str]:
        if folder in path:
            raise ValueError(f"a circle: {' -> '.join([*path, folder])}")
        if folder not in reached:
            reached[folder] = imports[folder].union(*(reach(other, (*path, folder)) for other in imports[folder]))
        return reached[folder]

    lines = ["```mermaid", "graph TD"]
    for folder in sorted(imports, key=lambda name: (-len(reach(name)), name)):
        direct = [other for other in sorted(imports[folder]) if not any(other in reach(via) for via in imports[folder])]
        lines += [f"    {folder} --> {other}" for other in direct]
    return "\n".join([*lines, "```", ""])


def main() -> int:
    old = PAGE.read_text(encoding="utf-8")
    new = re.sub(f"{BEGIN}.*?{END}", lambda _: BEGIN + drawing(imported_folders()) + END, old, flags=re.DOTALL)
    if "--check" in sys.argv[1:]:
        return int(new != old)
    PAGE.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
