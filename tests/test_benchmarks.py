"""The benchmarks run; what they measure is for the machine that they are run on to say."""

import json
import subprocess
import sys

import pytest
import yaml
from conftest import ROOT

from solo_ext.studies.study import load_study

TINY = "--rounds 2 --seconds 0.01 --workers 1 --threads 1 --files 4 --small 16 --batch 4"


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> dict:
    out = tmp_path_factory.mktemp("benchmark") / "data.json"
    command = [sys.executable, ROOT / "benchmarks" / "data.py", *TINY.split(), "--out", out]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "n = 2" in done.stdout
    return json.loads(out.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "kind, names", [("photos", {"image_folder", "image_folder, crop + flip"}), ("cifar", {"tensor", "image_folder"})]
)
def test_formats_are_compared_with_pillow(report, kind, names):
    rows = report[kind]
    assert {"pillow", *names} <= rows.keys()
    for name, row in rows.items():
        base = rows["pillow, crop + flip" if "crop" in name else "pillow"]
        ours, theirs = row["images/s"]["rounds"], base["images/s"]["rounds"]
        assert row["ratio"]["rounds"] == pytest.approx([a / b for a, b in zip(ours, theirs, strict=True)])
        low, high = row["ratio"]["quartiles"]
        assert 0 < low <= row["ratio"]["median"] <= high


def test_a_batch_is_a_part_of_the_step(report):
    for row in report["step"].values():
        for batch, step, share in zip(*(row[key]["rounds"] for key in ("batch ms", "step ms", "share %")), strict=True):
            assert 0 < batch < step and share == pytest.approx(100 * batch / step)


def test_the_report_says_where_it_comes_from(report):
    assert report["environment"]["cpu"] and report["rounds"] == 2 and report["device"] == "cpu"


def test_larger_sets_are_read_off_a_line_and_marked(tmp_path):
    sizes = ["--images", "1000", "2000", "--orders", "1000", "2000", "--rounds", "1"]
    command = [sys.executable, ROOT / "benchmarks" / "scale.py", "--folder", tmp_path / "files", *sizes]
    done = subprocess.run([*command, "--out", tmp_path / "scale"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and not (tmp_path / "files").exists(), done.stderr
    kept = json.loads((tmp_path / "scale.json").read_text())["parts"]["folder"]
    assert kept["2000"]["kept"] == 2 * kept["1000"]["kept"] > 0
    [row] = [row for row in (tmp_path / "scale.md").read_text().splitlines() if row.startswith("| folder: index, MB")]
    cells = [cell.strip() for cell in row.split("|")[2:-1]]
    assert cells[0] == f"{kept['2000']['kept']:.3g}" and all(cell.startswith("~") for cell in cells[1:])
    expected = kept["1000"]["kept"] * 100_000
    assert float(cells[2].removeprefix("~").replace(",", "")) == pytest.approx(expected, rel=0.05)


def test_the_claims_about_photographs_are_about_cells_of_the_studies():
    files = (ROOT / "scripts" / "studies" / "photographs").glob("*.yaml")
    cells = {f"{file.stem}/{cell.name}" for file in files for cell in load_study(file).runs}
    claims = yaml.safe_load((ROOT / "benchmarks" / "photographs.yaml").read_text(encoding="utf-8"))["claims"]
    named = {row[side] for claim in claims for row in claim["rows"] for side in ("more", "less")}
    assert named <= cells
