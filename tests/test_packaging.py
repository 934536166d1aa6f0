"""What is declared is what is imported, what sdist and wheel hold, and the paths that the guides name."""

import ast
import re
import runpy
import shutil
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

import solo_ext
from solo_ext.training import recipes

if sys.version_info < (3, 11):
    tomllib = pytest.importorskip("tomli")
else:
    import tomllib

ROOT = Path(solo_ext.__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
ELSEWHERE = {
    "solo": "a checkout of solo-learn",
    "detectron2": "has no release on PyPI",
    "tomli": "pytest's own",
    "triton": "comes with a PyTorch for GPUs",
}
OURS = {path for folder in ("tests", "benchmarks") for path in (ROOT / folder).rglob("*")}
OWN = {"solo_ext", "recipes", *(path.stem for path in OURS if path.suffix in (".py", ""))}
DISTRIBUTIONS = packages_distributions()  # which takes a second
TOOLS = {"check-wheel-contents", "lightly", "mypy", "pre-commit", "pytest-xdist", "ruff", "setuptools", "twine"}
INDIRECT = {
    "tensorboard": "lightning's TensorBoardLogger",
    "onnx": "imported by name in zoo/export/onnx.py",
    "onnxruntime": "likewise",
    "onnxscript": "torch.onnx",
}


def imported(folder: str) -> set[str]:
    """The top-level modules of others that the files of a folder import, inside functions, too."""
    names = set()
    trees = (ast.parse(file.read_text(encoding="utf-8")) for file in (ROOT / folder).rglob("*.py"))
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(node.module)
    return {name.partition(".")[0] for name in names} - OWN - set(sys.stdlib_module_names) - ELSEWHERE.keys()


def package(requirement: str) -> str:
    return re.match(r"[\w.-]+", requirement)[0].lower().replace("_", "-")


def declared(*groups: list[str]) -> set[str]:
    return {package(requirement) for group in groups for requirement in group} - {"solo-ext"}


def providers(module: str) -> set[str]:
    """The packages of which one has to be declared for `import module`."""
    return {name.lower().replace("_", "-") for name in DISTRIBUTIONS.get(module, [module])}


def test_every_import_of_the_package_is_declared_and_nothing_else_is():
    runtime = declared(
        PROJECT["dependencies"], *(group for extra, group in EXTRAS.items() if extra not in ("dev", "docs"))
    )
    modules = imported("solo_ext")
    assert {module for module in modules if not providers(module) & runtime} == set()
    used = set().union(*map(providers, modules)) | INDIRECT.keys()
    assert {name for name in runtime if name not in used and not name.startswith("nvidia-dali")} == set()


def test_the_dev_extra_is_what_tests_and_benchmarks_need():
    every = declared(PROJECT["dependencies"], *EXTRAS.values())
    modules = imported("tests") | imported("benchmarks")
    assert {module for module in modules if not providers(module) & every} == set()
    [own] = [requirement for requirement in EXTRAS["dev"] if requirement.startswith("solo-ext[")]
    assert {*own.partition("[")[2].strip("]").split(",")} == EXTRAS.keys() - {"dev", "dali-cuda13"}
    used = set().union(*map(providers, modules))
    assert declared(EXTRAS["dev"]) - TOOLS - used == set()


def test_torch_hub_asks_for_core_dependencies_only():
    modules = runpy.run_path(str(ROOT / "hubconf.py"))["dependencies"]
    assert {module for module in modules if not providers(module) & declared(PROJECT["dependencies"])} == set()


def test_the_version_stands_once():
    assert "version" in PROJECT["dynamic"] and re.fullmatch(r"\d+\.\d+\.\d+\S*", solo_ext.__version__)
    assert f"## [{solo_ext.__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_every_place_names_the_same_pythons():
    minors = [c.rpartition(".")[2] for c in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", c)]
    first, last = f"3.{minors[0]}", f"3.{minors[-1]}"
    assert PROJECT["requires-python"] == f">={first}" and minors == [str(i) for i in range(int(minors[0]), 15)]
    assert f"Python {first} to {last}" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"Python {first} to {last}" in (ROOT / "Makefile").read_text(encoding="utf-8")
    workflow = (ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8")
    assert all(f'"3.{minor}"' in workflow for minor in minors)


GUIDES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *ROOT.glob("zoo/*.md"), *ROOT.glob("scripts/*/*.md")]
PATH = re.compile(r"(?<![\w/<.-])(?:scripts|solo_ext|tests|benchmarks|docs|zoo)/[\w./-]*\w")
LINK = re.compile(r"\]\(([^)#:]+)\)")
RECIPE = re.compile(r"solo-ext (plan|pretrain|linear|study) ([\w-]+/[\w-]+)(?![\w./-])")
SOLO_LEARNS = {"scripts/pretrain/cifar"}  # of a checkout of solo-learn


@pytest.mark.parametrize("guide", GUIDES, ids=lambda file: str(file.relative_to(ROOT)))
def test_no_guide_has_a_dead_path(guide):
    text = guide.read_text(encoding="utf-8")
    assert {path for path in PATH.findall(text) if not (ROOT / path).exists()} <= SOLO_LEARNS
    assert [link for link in LINK.findall(text) if not (guide.parent / link).exists()] == []
    for command, name in RECIPE.findall(text):
        assert recipes.find(name, {"linear": "linear", "study": "studies"}.get(command, "pretrain"))


def test_contributing_names_files_that_are_there():
    """In a row, a file without a folder lies beside the one before it."""
    for line in (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").splitlines():
        folder = ROOT
        for path in re.findall(r"`([\w./-]+\.(?:py|ya?ml))`", line):
            there = [place / path for place in (ROOT, ROOT / "solo_ext", folder) if (place / path).exists()]
            assert there, (path, line)
            folder = there[0].parent


def build(kind: str, folder: Path) -> Path:
    code = f"from setuptools.build_meta import build_{kind}; print(build_{kind}('.'))"
    made = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=300)
    assert made.returncode == 0, made.stderr
    return folder / made.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The sdist, the wheel that is made of it, and the folder with the wheel's files; from what the Dockerfile sees."""
    folder = tmp_path_factory.mktemp("built")
    source = folder / "source"
    source.mkdir()
    for name in re.findall(r"(?m)^!(\S+)$", (ROOT / ".dockerignore").read_text(encoding="utf-8")):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    sdist = build("sdist", source)
    shutil.unpack_archive(sdist, folder / "unpacked", "gztar")
    wheel = build("wheel", next((folder / "unpacked").iterdir()))
    shutil.unpack_archive(wheel, folder / "wheel", "zip")
    return sdist, wheel, folder / "wheel"


@pytest.mark.slow
def test_sdist_and_wheel_are_what_pypi_takes(built):
    sdist, wheel, inside = built
    for check in (["twine", "check", "--strict", sdist, wheel], ["check_wheel_contents", wheel]):
        done = subprocess.run([sys.executable, "-m", *check], cwd=ROOT, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr
    [metadata] = inside.glob("*.dist-info/METADATA")
    page = metadata.read_text(encoding="utf-8").partition("\n\n")[2]
    assert "# solo_ext" in page and LINK.findall(page) == []  # to files, which are not there


@pytest.mark.slow
def test_a_wheel_has_the_recipes_and_the_zoo(built, tmp_path):
    wheel = built[-1]
    inside = wheel / "solo_ext"
    for tree, target in (("scripts", "scripts"), ("zoo", "zoo/files")):
        there = {path.relative_to(ROOT / tree) for path in (ROOT / tree).rglob("*") if path.is_file()}
        assert {p.relative_to(inside / target) for p in (inside / target).rglob("*") if p.is_file()} >= {
            path for path in there if "__pycache__" not in path.parts and not path.name.startswith(".")
        }
    assert (inside / "py.typed").is_file() and list((inside / "data" / "assets").iterdir())

    command = "from solo_ext.cli.main import main; raise SystemExit(main())"
    said = subprocess.run(
        [sys.executable, "-c", command, "pretrain", "cifar10/res_dino", "--cfg"],
        cwd=tmp_path, env={"PYTHONPATH": str(wheel), "PATH": "/usr/bin"},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert said.returncode == 0 and "method: res_dino" in said.stdout, said.stderr
