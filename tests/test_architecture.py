"""Imports run one way."""

import ast
from pathlib import Path

import pytest

import solo_ext

ROOT = Path(solo_ext.__file__).parent
LAYERS = {  # package -> what it may import from this project, besides itself, errors and schema
    "losses": set(),
    "networks": set(),
    "optim": set(),
    "momentum": {"losses", "networks", "optim"},
    "data": set(),
    "evaluation": {"networks", "optim", "losses"},
    "methods": {"losses", "networks", "optim", "momentum", "data", "evaluation"},
    "analysis": {"losses", "networks", "optim", "momentum", "data", "evaluation", "methods"},
    "zoo": {"losses", "networks", "optim", "momentum", "data", "evaluation", "methods"},
    "runtime": {
        "losses",
        "networks",
        "optim",
        "momentum",
        "data",
        "evaluation",
        "methods",
        "analysis",
        "zoo",
    },
    "studies": {
        "losses",
        "networks",
        "optim",
        "momentum",
        "data",
        "evaluation",
        "methods",
        "analysis",
        "zoo",
        "runtime",
    },
}


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
    return {name.split(".")[1] for name in names if name.startswith("solo_ext.")}


@pytest.mark.parametrize("package", LAYERS)
def test_imports_run_one_way(package):
    files = list((ROOT / package).rglob("*.py"))
    assert files
    for file in files:
        forbidden = imported(file) - LAYERS[package] - {package, "errors", "schema"}
        assert not forbidden, f"{file.relative_to(ROOT)} imports {sorted(forbidden)}"


def test_one_loader_of_pickles_and_one_lightning():
    for file in ROOT.rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        assert "import pytorch_lightning" not in text, file
        assert "torch.load(" not in text or file.name == "checkpoint.py", file
