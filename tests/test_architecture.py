"""Imports run one way."""

import ast
from pathlib import Path

import pytest

import solo_ext

ROOT = Path(solo_ext.__file__).parent
CORE = {"losses", "networks", "optim"}
METHODS = CORE | {"momentum", "data", "evaluation", "methods"}
RUNTIME = METHODS | {"analysis", "runtime"}
LAYERS = {  # package -> what it may import from this project, besides itself, errors, files and schema
    "losses": set(),
    "networks": set(),
    "optim": set(),
    "data": set(),
    "momentum": CORE,
    "evaluation": CORE,
    "methods": METHODS,
    "analysis": METHODS,
    "runtime": RUNTIME,
    "zoo": RUNTIME,
    "studies": RUNTIME,
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
        forbidden = imported(file) - LAYERS[package] - {package, "errors", "files", "schema"}
        assert not forbidden, f"{file.relative_to(ROOT)} imports {sorted(forbidden)}"


def calls(path: Path) -> set[str]:
    """Dotted names of the functions that the file calls."""
    return {
        ast.unparse(node.func) for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.Call)
    }


def test_one_loader_of_pickles_and_one_lightning():
    for file in ROOT.rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        assert "import pytorch_lightning" not in text, file
        unpickling = calls(file) & {"torch.load", "torch.jit.load", "pickle.load", "pickle.loads", "np.load"}
        assert not unpickling or file.name == "weights.py" or "allow_pickle=False" in text, (file, unpickling)
