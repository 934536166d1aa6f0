"""The benchmarks run; what they measure is for the machine that they are run on to say."""

import json
import subprocess
import sys

import bench
import pieces
import pytest
import step_time
import torch
import yaml
from conftest import ROOT
from frameworks import FRAMEWORKS
from gpu import __main__ as kit
from gpu import work
from torch.utils.flop_counter import FlopCounterMode

from solo_ext.optim.lars import LARS
from solo_ext.studies.study import load_study
from solo_ext.text import between_marks

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
    assert cells[:2] == [f"{kept[size]['kept']:.3g}" for size in ("1000", "2000")]
    assert all(cell.startswith("~") for cell in cells[2:])
    expected = kept["1000"]["kept"] * 100_000
    assert float(cells[3].removeprefix("~").replace(",", "")) == pytest.approx(expected, rel=0.05)


def test_the_claims_about_photographs_are_about_cells_of_the_studies():
    files = (ROOT / "scripts" / "studies" / "photographs").glob("*.yaml")
    cells = {f"{file.stem}/{cell.name}" for file in files for cell in load_study(file).runs}
    claims = yaml.safe_load((ROOT / "benchmarks" / "photographs.yaml").read_text(encoding="utf-8"))["claims"]
    named = {row[side] for claim in claims for row in claim["rows"] for side in ("more", "less")}
    assert named <= cells


@pytest.mark.parametrize("scope", ["full", "projector", "none"])
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_floor_has_the_passes_of_the_step(framework, scope):
    """The operations of both are the same, but for losses, queues and the probe."""
    setting = step_time.Setting(framework, "resnet10_w16", size=16, batch=4)
    batch = [torch.arange(4), [torch.randn(4, 3, 16, 16) for _ in range(2)], torch.zeros(4, dtype=torch.long)]
    counts = []
    for step in (
        step_time.ours(setting, batch, step_time.method(setting, scope)),
        step_time.floor(setting, batch, scope),
    ):
        with FlopCounterMode(display=False) as counter:
            step()
        operations = counter.get_flop_counts()["Global"]
        counts.append(sum(n for operation, n in operations.items() if "convolution" in str(operation)))
    assert counts[0] == counts[1] > 0


def test_the_loop_that_lars_is_compared_with_is_lars():
    torch.manual_seed(0)
    ours = [torch.randn(5, 3, requires_grad=True), torch.randn(7, requires_grad=True)]
    theirs, buffers = [p.detach().clone() for p in ours], [torch.zeros_like(p) for p in ours]
    optimizer = LARS(ours, lr=0.1, momentum=0.9, weight_decay=0.01, eta=0.02)
    for _ in range(3):
        for p, other in zip(ours, theirs, strict=True):
            p.grad = other.grad = torch.randn_like(p)
        optimizer.step()
        pieces.lars_loop(theirs, buffers, lr=0.1, decay=0.01, eta=0.02)
    for p, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p.detach(), other)


@pytest.mark.parametrize("page", bench.PAGES)
def test_the_pages_have_the_figures_of_the_files(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    found = list(bench.tables(ROOT / "docs" / "results"))
    assert any(f"<!-- {mark} -->" in text for mark, *_ in found)
    for mark, _, content in found:
        assert between_marks(text, mark, content) == text, "python benchmarks/bench.py --only '' writes it anew"


# --- the kit ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_kit_in_miniature(tmp_path):
    """Every part's code runs, nothing fails, and a second call has nothing to do."""
    command = [sys.executable, ROOT / "benchmarks" / "gpu", "--device", "cpu", "--state", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0 and "all is done" in done.stdout, done.stderr
    out = tmp_path / "miniature" / "results"
    units = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert {unit["part"][0] for unit in units} == set("012345")
    assert not [unit for unit in units if unit["outcome"] not in ("passed", "measured", "skipped")]
    skipped = {unit["name"] for unit in units if unit["outcome"] == "skipped"}
    assert skipped <= {"DALI decodes"}
    again = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert "all is done" in again.stdout
    assert json.loads((out / "results.json").read_text(encoding="utf-8"))[1:4] == units[1:4]


def unit_of(error):
    def do(kit):
        raise error

    return work.Unit("1 correctness", "x", do)


@pytest.mark.parametrize(
    "error, outcome, says",
    [
        (work.Skip("there is no DALI"), "skipped", "there is no DALI"),
        (work.Failed("differs by 1"), "failed", "differs by 1"),
        (work.Unfinished("1 of 2 runs", [1]), "goes on", "1 of 2 runs"),
        (torch.OutOfMemoryError("CUDA out of memory"), "failed", "the device has not memory enough"),
        (KeyError("a"), "failed", "KeyError: 'a'"),
    ],
)
def test_what_goes_wrong_in_a_unit_is_a_sentence(tmp_path, error, outcome, says):
    result = work.Result(0, "1 correctness", "x", "", 240)
    work.do(unit_of(error), result, work.Kit("cpu", tmp_path, "", 0.0))
    assert (result.outcome, result.says) == (outcome, says)


@pytest.mark.parametrize("status, says", [(-9, "ended its process with SIGKILL"), (-14, "did not end within 240 s")])
def test_a_unit_that_takes_its_process_along_is_noted(tmp_path, status, says):
    file = tmp_path / "unit.json"
    (tmp_path / "current.json").write_text(json.dumps({"name": "x", "file": str(file), "limit": 240}))
    kit.lost(tmp_path, status)
    assert json.loads(file.read_text())["says"] == says and not (tmp_path / "current.json").exists()
    with pytest.raises(SystemExit, match="cannot work here"):
        kit.lost(tmp_path, status)


def test_without_cifar_10_a_sentence_says_how_to_name_it(tmp_path):
    with pytest.raises(work.Skip, match="make gpu CIFAR=PATH"):
        work.Kit("cuda", tmp_path, str(tmp_path / "none"), 0.0).photos()
