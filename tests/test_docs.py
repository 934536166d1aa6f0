"""The site: built strictly, with every link checked, of pages that fetch nothing; and its notebook, run."""

import html.parser
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from solo_ext.methods import METHODS

ROOT = Path(__file__).parents[1]
ENV = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT), "JUPYTER_PLATFORM_DIRS": "1"}


@pytest.fixture
def site(tmp_path):
    for package in ("mkdocs", "mkdocs_jupyter", "mkdocstrings", "material"):
        pytest.importorskip(package)
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    built = subprocess.run(command, cwd=ROOT, env=ENV, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return tmp_path


class Fetched(html.parser.HTMLParser):
    """What a page loads by itself."""

    def __init__(self, text):
        super().__init__()
        self.places = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        loads = tag in ("script", "img", "iframe", "source") or given.get("rel") in ("stylesheet", "icon", "preload")
        self.places += [given.get("src") or given.get("href") or ""] if loads else []


def test_the_site(site):
    """Every page is there, loads nothing from elsewhere, and says what the code says."""
    nav = re.findall(r"[\w/]+\.(?:md|ipynb)", str(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]))
    assert len(nav) > 25
    for name in nav:
        page = site / Path(name).with_suffix("") / "index.html" if name != "index.md" else site / "index.html"
        text = page.read_text(encoding="utf-8")
        assert len(re.sub(r"<[^>]*>", "", text)) > 500, name
        assert not [place for place in Fetched(text).places if place.startswith(("http", "//"))], name
    keys = (site / "keys" / "index.html").read_text(encoding="utf-8")
    for key in (
        "max_epochs",
        "momentum.stages",
        "intra.weight",
        "val_gap.enabled",
        "lr_grid",
        "detector.min_size",
        "knn_eval.k",
    ):
        assert f"<code>{key}</code>" in keys, key
    assert "of the training set, stratified by class" in keys, "the comment in the source"
    dino = (site / "methods" / "dino" / "index.html").read_text(encoding="utf-8")
    assert "<td>BatchNorm in the head</td>" in dino, "one field of several in a docstring's line"
    assert "loss_scale" not in dino, "which has no effect there"
    written = "".join(page.read_text(encoding="utf-8") for page in (site / "methods").glob("*/index.html"))
    assert all(f"<code>{name}</code>" in written for name in METHODS)
    assert "full_key" not in keys and "Trains an encoder without labels" in (site / "api" / "index.html").read_text()


@pytest.mark.slow
def test_the_notebook_runs(tmp_path, monkeypatch):
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    notebook = nbformat.read(ROOT / "docs" / "start.ipynb", 4)
    for cell in notebook.cells:
        cell.source = cell.source.replace("max_epochs=8", "max_epochs=2").replace(
            '"warmup_epochs": 2', '"warmup_epochs": 1'
        )
    client = nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}})
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    client.execute()
    printed = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))
    assert re.search(r"trained [\d.]+, untrained [\d.]+", printed)
    pictures = [o for c in notebook.cells for o in c.get("outputs", []) if "image/png" in o.get("data", {})]
    assert len(pictures) == 2
