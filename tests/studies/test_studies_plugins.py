"""A study of what a module of the user's own registers: its jobs import the module too."""

import re

import pytest
import yaml
from test_plugins import MODULE, YAML, solo_ext

STUDY = {
    "title": "Mine: two scales",
    "recipes": ".",
    "metrics": {"Norm": "feature_norm"},
    "curves": ["feature_norm"],
    "grid": {"Scale": {"ten": ["recipe=mine"], "one": ["recipe=mine", "feature_norm.scale=1"]}},
}


@pytest.mark.slow
def test_the_jobs_of_a_study_know_the_imported_module(tmp_path):
    (tmp_path / "my_module.py").write_text(MODULE)
    (tmp_path / "mine.yaml").write_text(YAML)
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(STUDY, sort_keys=False))
    status, out, err = solo_ext(tmp_path, "--import", "my_module", "study", "s.yaml", "--jobs", "2", "--out", "out")
    assert status == 0, out + err
    norms = {}
    for name in ("ten", "one"):
        assert f"done    {name}-seed5" in out, out
        assert "heard HalfBYOL" in (tmp_path / "out" / "logs" / f"{name}-seed5.log").read_text()
        row = re.search(rf"^\| {name} \| ([\d.]+) \(1\) \|$", (tmp_path / "out" / "study.md").read_text(), re.M)
        norms[name] = float(row[1])
    assert norms["ten"] == pytest.approx(10 * norms["one"], rel=1e-2)
    page = (tmp_path / "out" / "study.html").read_text()
    assert "Norm of the classifier" in page and "noise" in page
