"""The shape of the code, as tests: which way imports point, and what exists once."""

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "knockon"
FILES = sorted(SOURCE.rglob("*.py"))
TIERS = (
    {"types", "files", "devices", "interrupt", "progress", "cluster", "limits", "jobs"},
    {"data", "dynamics", "nn"},
    {"model"},
    {"baseline"},
    {"models"},
    {"predict"},
    {"embed", "generate"},
    {"record"},
    {"run"},
    {"transfer"},
    {"checkpoint", "schedule", "validate", "watch"},
    {"train"},
    {"forecast", "uncertainty"},
    {"evaluate"},
    {"trial", "ranking"},
    {"compare"},
    {"commands"},
    {"cli", "__init__", "__main__"},
)


def tier(module: str) -> int:
    return next(i for i, names in enumerate(TIERS) if module in names)


def imports(path: Path) -> set[str]:
    """Parts of knockon that a file imports, but for what only the type checker reads."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            node.body = []
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "knockon":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("knockon."):
            found.add(node.module.split(".")[1])
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_point_one_way(path: Path) -> None:
    own = path.relative_to(SOURCE).parts[0].removesuffix(".py")
    backwards = {name for name in imports(path) if name != own and tier(name) > tier(own)}
    assert not backwards


def test_dynamics_and_networks_know_no_data() -> None:
    for path in [*(SOURCE / "dynamics").glob("*.py"), *(SOURCE / "nn").glob("*.py")]:
        assert "anndata" not in path.read_text(), path
        assert "data" not in imports(path), path


def test_the_loop_is_one() -> None:
    assert [path.name for path in FILES if ".backward(" in path.read_text()] == ["train.py"]


def test_files_stay_readable() -> None:
    assert not [path.name for path in FILES if len(path.read_text().splitlines()) > 420]
