"""The study engine: what it refuses, its numbers against hand computation, and runs that are stopped and continued."""

import copy
import csv
import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest
import yaml

import solo_ext.cli.main as cli
from solo_ext.errors import ConfigError
from solo_ext.runs.locks import RunLock, held
from solo_ext.studies.pool import LocalPool
from solo_ext.studies.scores import remarks, results_of, scores, warning
from solo_ext.studies.study import load_study
from solo_ext.studies.table import short_labels, write_tables
from solo_ext.training.config import resolve
from solo_ext.training.pretrain import pretrain
from solo_ext.zoo.edit import recipe_from

ROOT = Path(__file__).parents[2]
TABLE = {
    "title": "EMA on backbone or projector",
    "source": "paper X, Table 3",
    "keys": ["Method", "backbone", "projector"],
    "values": ["Acc", "Sim"],
    "rows": [
        ["BYOL", "Y", "Y", 62.01, 99.5],
        ["BYOL", "Y", "-", 62.17, None],
        ["BYOL", "-", "Y", 59.61, None],
        ["MoCo v3", "Y", "Y", None, None],
        ["Other", "Y", "-", 8.11, None],
    ],
    "notes": ["the last row is a guess"],
}
EPOCHS = {
    "title": "Over training",
    "source": "paper X, Table 14",
    "keys": ["Method", "Epoch"],
    "values": ["Top-1"],
    "rows": [["BYOL", "100", 50.0], ["BYOL", "200", 60.0], ["MoCo v3", "100", 51.0], ["MoCo v3", "200", 61.0]],
}
STUDY = {
    "table": "X-3",
    "dataset": "cifar100",
    "overrides": ["max_epochs=200", "optimizer.lr=0.5"],
    "metrics": {"Acc": "val_acc1", "Sim": {"metric": "gap_sim", "times": 100}},
    "seeds": [5],
    "grid": {
        "Method": {"BYOL": ["recipe=byol"]},
        "backbone, projector": {
            "Y, Y": ["momentum.stages=full"],
            "Y, -": ["momentum.stages=backbone"],
            "-, Y": ["momentum.stages=projector"],
        },
    },
    "cells": [{"row": {"Method": "MoCo v3"}, "overrides": ["recipe=mocov3"]}],
    "cited": [{"Method": "Other"}],
}
READOUT = {
    "table": "X-14",
    "dataset": "cifar100",
    "overrides": ["max_epochs=200"],
    "metrics": {"Top-1": "val_acc1"},
    "readout": "Epoch",
    "curves": ["val_acc1", "gap_sim"],
    "plot": "lines",
    "grid": {"Method": {"BYOL": ["recipe=byol"], "MoCo v3": ["recipe=mocov3"]}},
}
MINI = ["dataset=fashion_mnist_mini"]
TINY = [
    *MINI,
    "limit_train_batches=2",
    "limit_val_batches=1",
    "data.fraction=0.02",
    "knn_eval.enabled=False",
    "method_kwargs.proj_hidden_dim=16",
    "accelerator=cpu",
    "precision=32-true",
]


@pytest.fixture
def file(tmp_path):
    """Writes a study beside its printed results and the repository's recipes; returns its path."""

    def write(content=STUDY, **changes):
        folder = tmp_path / "scripts" / "studies" / "x"
        folder.mkdir(parents=True, exist_ok=True)
        if not (tmp_path / "scripts" / "pretrain").exists():
            (tmp_path / "scripts" / "pretrain").symlink_to(ROOT / "scripts" / "pretrain")
        (folder.parent / "paper_results.yaml").write_text(yaml.safe_dump({"X-3": TABLE, "X-14": EPOCHS}))
        content = {key: value for key, value in {**content, **changes}.items() if value is not None}
        (folder / "table3.yaml").write_text("# Paper X, Fig. 1: a title\n" + yaml.safe_dump(content, sort_keys=False))
        return folder / "table3.yaml"

    return write


@pytest.fixture
def command(capfd, tmp_path, monkeypatch):
    """Runs `solo-ext study` in an empty folder; returns (exit status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def run(*words):
        capfd.readouterr()
        try:
            status = cli.main(["study", *map(str, words)])
        except SystemExit as end:
            status = end.code or 0
        return status, *capfd.readouterr()

    return run


def pretend(job, seconds=600.0, before=(), **metrics):
    """A finished run of `job`; metrics are {epoch counted from 1: value}, or the last epoch's value."""
    folder = job.folder / job.config["method"] / "run"
    folder.mkdir(parents=True)
    last = job.config["max_epochs"]
    metrics = {name: m if isinstance(m, dict) else {last: m} for name, m in metrics.items()}
    with open(folder / "metrics.csv", "w", newline="") as table:
        writer = csv.DictWriter(table, ["epoch", "step", *metrics])
        writer.writeheader()
        for epoch in sorted({epoch for values in metrics.values() for epoch in values}):
            row = {name: values[epoch] for name, values in metrics.items() if epoch in values}
            writer.writerow({"epoch": epoch - 1, "step": 10 * epoch - 1, **row})
    (folder / "args.json").write_text(json.dumps(job.config))
    (folder / "environment.json").write_text(json.dumps({"before": list(before)} if before else {"cpu": "a cpu"}))
    (folder / "result.json").write_text(json.dumps({"seconds": seconds}))


# The file.


def test_cells_are_the_rows_in_the_papers_order(file):
    study = load_study(file(), ["seeds=[0,1]", *MINI, "max_epochs=20"])
    assert [list(row.labels.values()) for row in study.rows] == [row[:3] for row in TABLE["rows"]]
    assert study.seeds == [0, 1] and len(study.cells) == 4 and len(study.runs) == 4
    cell = study.cells[1]
    assert cell.labels == {"Method": "BYOL", "backbone": "Y", "projector": "-"}
    assert cell.values == {"Acc": 62.17, "Sim": None}
    assert cell.recipe == file().absolute().parents[2] / "pretrain" / "fashion_mnist_mini" / "byol.yaml"
    assert cell.overrides == ["optimizer.lr=0.5", "momentum.stages=backbone", "max_epochs=20"]
    cfg = cell.config(7)
    assert (cfg.method, cfg.momentum.stages, cfg.optimizer.lr) == ("byol", "backbone", 0.5)
    assert (cfg.seed, cfg.max_epochs, cfg.data.dataset) == (7, 20, "fashion_mnist_mini")
    printed = cell.printed_config
    assert (printed.data.dataset, printed.max_epochs, printed.optimizer.lr) == ("cifar100", 200, 0.5)
    assert load_study(file(), ["data.dataset=fashion_mnist_mini"]).cells[1].recipe == cell.recipe


def test_labels_are_text_as_printed(file):
    path = file(grid={"Method": {"BYOL": ["recipe=byol"]}}, table=None, figure="X-1", cited=None, cells=None)
    path.write_text(path.read_text().replace("BYOL:", "0.90:"))
    study = load_study(path)
    assert [cell.labels for cell in study.cells] == [{"Method": "0.90"}]
    assert study.title == "Paper X, Fig. 1: a title" and study.table is None
    path.write_text(path.read_text() + "dataset: cifar10\n")
    with pytest.raises(ConfigError, match="'dataset' comes twice"):
        load_study(path)


OWN = {"metrics": {"Acc": "val_acc1"}, "curves": ["gap_sim"], "grid": {"tau": {"0.90": ["recipe=byol"]}}}


def test_a_study_of_ones_own_needs_no_paper_and_no_folder_of_ours(tmp_path):
    def write(**changes):
        (tmp_path / "mine.yaml").write_text(yaml.safe_dump({**OWN, **changes}))
        return tmp_path / "mine.yaml"

    study = load_study(write(title="Mine: taus", dataset="fashion_mnist_mini", overrides=["max_epochs=2"]))
    [cell] = study.cells
    assert cell.recipe == ROOT / "scripts" / "pretrain" / "fashion_mnist_mini" / "byol.yaml"
    assert (study.source, study.table, study.paper, cell.labels) == ("Mine", None, False, {"tau": "0.90"})
    page = write_tables(study, study.jobs(tmp_path / "out"), tmp_path).read_text()
    assert "| tau | Acc |" in (tmp_path / "study.md").read_text() and "paper" not in page

    grid = {
        "tau": {"0.90": ["recipe=cifar10/byol"], "0.99": ["recipe=byol"]}
    }  # the recipe's own dataset, or the study's
    study = load_study(write(grid=grid, dataset="cifar100"))
    assert [cell.recipe.parent.name for cell in study.cells] == ["cifar10", "cifar100"]
    study = load_study(write(grid=grid, dataset="cifar100"), ["dataset=fashion_mnist_mini"])
    assert [cell.recipe.parent.name for cell in study.cells] == ["fashion_mnist_mini"] * 2

    (tmp_path / "recipes").mkdir()  # of one's own, with a folder for each dataset or without
    text = (ROOT / "scripts" / "pretrain" / "fashion_mnist_mini" / "byol.yaml").read_text()
    (tmp_path / "recipes" / "byol.yaml").write_text(text.replace("../_shared", f"{ROOT}/scripts/pretrain/_shared"))
    assert load_study(write(recipes="recipes"), ["data.dataset=cifar10"]).cells[0].recipe.parent == tmp_path / "recipes"
    for changes, message in (
        ({"recipes": "recipe"}, "there is no folder"),
        ({"recipes": "recipes", "dataset": "cifar10"}, "no recipes for 'cifar10'"),
        ({"cited": [{"tau": "0.9"}]}, "this study names no table"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_study(write(**changes))


def test_printed_results_lie_beside_the_study_or_where_it_says(file, tmp_path):
    path = file(results="../../printed/results.yaml", table="X-3")
    (tmp_path / "scripts" / "printed").mkdir()
    (path.parents[1] / "paper_results.yaml").rename(tmp_path / "scripts" / "printed" / "results.yaml")
    assert load_study(path).table.source == "paper X, Table 3"
    (tmp_path / "scripts" / "printed" / "results.yaml").rename(path.with_name("paper_results.yaml"))
    with pytest.raises(ConfigError, match="no file of printed results"):
        load_study(path)
    path.write_text(path.read_text().replace("results: ../../printed/results.yaml", ""))
    assert load_study(path).table.source == "paper X, Table 3"


def test_short_labels_keep_what_tells_apart():
    rows = [{"Method": m, "Loss": "CL", "EMA": e, "beta": {"Y": "0.9", "-": "0"}[e]} for m in "AB" for e in "Y-"]
    assert short_labels(rows) == (["Method", "EMA"], ["A · Y", "A · -", "B · Y", "B · -"])


grid = STUDY["grid"]


@pytest.mark.parametrize(
    "changes, overrides, message",
    [
        ({"tabel": "X-3"}, [], "unknown key 'tabel'; did you mean 'table'?"),
        ({"figure": "X-Fig1"}, [], "either table or figure"),
        ({"table": "X-4"}, [], "no table 'X-4'; did you mean"),
        ({"cited": []}, [], "no cell covers the row Method Other, backbone Y, projector - of X-3"),
        (
            {"cited": [{"Method": "Other"}, {"Method": "BYOL"}]},
            [],
            "is covered by the cell Method BYOL, backbone Y, projector Y and by the cited row Method BYOL",
        ),
        ({"cited": [{"Metod": "Other"}]}, [], "no key column 'Metod'; did you mean 'Method'?"),
        ({"cells": []}, [], "no cell covers the row Method MoCo v3"),
        ({"cells": [{"row": {"Method": "MoCo v2"}}]}, [], "matches no row of X-3; did you mean 'Method MoCo v3'?"),
        ({"cells": [{"row": {"projector": "Y"}}]}, [], "matches 3 rows"),
        (
            {"cells": [*STUDY["cells"], {"row": {"Method": "BYOL", "projector": "-"}}]},
            [],
            "projector - and by the cell Method BYOL, projector -",
        ),
        ({"cells": [{"row": {"Method": "MoCo v3"}}]}, [], "Method MoCo v3 has no recipe"),
        ({"cells": [{"row": {"Method": "MoCo v3"}, "overrides": ["recipe=mocov33"]}]}, [], "did you mean 'mocov3'?"),
        ({"grid": {**grid, "Method": {"BYOLL": ["recipe=byol"]}}}, [], "BYOLL, backbone Y, projector Y"),
        ({"grid": {**grid, "backbone, projector": {"Y": []}}}, [], "'Y' has 1 parts for 2 columns"),
        ({"metrics": {"Accu": "val_acc1"}}, [], "no column 'Accu'; did you mean 'Acc'?"),
        ({"metrics": {"Acc": {"metric": "val_acc1", "time": 1}}}, [], "unknown key 'metrics.Acc.time'"),
        ({"readout": "Epoch"}, [], "no key column 'Epoch'"),
        ({"plot": "lines"}, [], "curves names no metric"),
        ({"plot": "bar"}, [], "did you mean 'bars'?"),
        ({"seeds": []}, [], "at least one"),
        ({}, ["seeds=[]"], "at least one"),
        ({}, ["seeds=[0,0]"], "different numbers"),
        ({}, ["seed=1"], "use seeds="),
        ({}, ["checkpoint.dir=/x"], "use --out"),
        ({}, ["dataset=cifar101"], "no recipes for 'cifar101'; did you mean"),
        ({}, ["momentum.stages=full"], "the axis 'backbone, projector' sets momentum.stages"),
        ({}, ["momentum={stages: full}"], "sets momentum.stages"),
        ({}, ["++method=byol"], "sets method"),
        ({"table": None, "figure": "X-1", "cited": None, "grid": {}, "cells": []}, [], "grid and cells are both empty"),
        ({"table": None, "figure": "X-1", "cited": None, "cells": STUDY["cells"] * 2}, [], "MoCo v3 comes twice"),
    ],
)
def test_refused(file, changes, overrides, message):
    with pytest.raises(ConfigError) as error:
        load_study(file(**changes), overrides)
    text = str(error.value)
    assert message in text and text.count("did you mean") <= 1 and "\n" not in text


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["momentum.stages=[block9]"], "no stage 'block9'"),
        (["momentum.stages=projector", "momentum.classifier=True"], "momentum.classifier needs"),
        (["momentum.stages=full"], "the cells byol_y_y and moco-v3_y_y are the same run"),
    ],
)
def test_refused_before_anything_runs(file, command, overrides, message):
    cells = [
        {"row": {"Method": "BYOL", "backbone": "Y", "projector": "Y"}, "overrides": ["recipe=byol"]},
        {"row": {"Method": "MoCo v3"}, "overrides": ["recipe=byol", *overrides]},
    ]
    cited = [{"Method": "Other"}, {"backbone": "-"}, {"Method": "BYOL", "projector": "-"}]
    path = file(grid=None, cells=cells, cited=cited)
    with pytest.raises(ConfigError, match="moco-v3_y_y"):
        load_study(path, MINI).check()
    status, _, err = command(path, *MINI, "--out", "out")
    assert status == 2 and message in err and not Path("out").exists()


@pytest.mark.parametrize(
    "words, message",
    [
        (["--jobs", "0"], "--jobs must be at least 1"),
        (["hydra.launcher.partition=gpu"], "--launcher"),
        (["--launcher", "slurmm"], "must be one of submitit_slurm, submitit_local"),
        (["--launcher", "slurm", "hydra.sweep.dir=x"], "parameters of its own, hydra.launcher.NAME=VALUE"),
        (["--launcher", "local", "hydra.launcher.partition=gpu"], "Unknown argument 'partition'"),
        (["--launcher", "submitit_slurm"], 'Could not detect "srun"'),
        (["optimizer.lrr=1"], "did you mean 'optimizer.lr'"),
        (["--only", "byol_y_yy"], "has no cell 'byol_y_yy'; did you mean 'byol_y_y'"),
    ],
)
def test_a_wrong_command_line_is_one_sentence(file, command, words, message):
    status, _, err = command(file(), *MINI, "--out", "out", *words)
    assert status == 2 and message in err and len(err.strip().splitlines()) == 1


# Numbers.


def test_scores_by_hand(file, tmp_path):
    study = load_study(file(), [*MINI, "seeds=[0,1,2,3]"])
    jobs = study.jobs(tmp_path / "out")
    by_name = {job.name: job for job in jobs}
    for seed, accuracy in enumerate((50.0, 52.0, 57.0)):
        pretend(by_name[f"byol_y_y-seed{seed}"], val_acc1=accuracy, gap_sim=0.99)
    pretend(by_name["byol_y_no-seed0"], val_acc1=40.0)
    stale = by_name["byol_no_y-seed0"]
    pretend(stale, val_acc1=1.0)
    args = stale.folder / "byol" / "run" / "args.json"
    args.write_text(json.dumps({**stale.config, "max_epochs": 3}))  # a run of another setting does not count

    failed = {"byol_y_y-seed3": "the loss is not finite", "byol_no_y-seed0": "no room"}
    full, backbone, projector, moco, other = (row for _, row in scores(study, results_of(study, jobs), failed))
    acc = full["Acc"]
    assert (len(acc.values), acc.failed, acc.paper) == (3, 1, 62.01)
    assert acc.mean == pytest.approx(53.0)
    assert acc.std == pytest.approx(((9 + 1 + 16) / 2) ** 0.5)
    assert acc.difference == pytest.approx(-9.01)
    assert full["Sim"].mean == pytest.approx(99.0)
    assert backbone["Acc"].texts(".2f") == ("40.00 (1)", "62.17", "-22.17")
    assert projector["Acc"].texts(".2f") == ("failed", "59.61", "-")
    assert moco["Acc"].texts(".2f") == ("-", "-", "-") and other["Acc"].texts(".2f") == ("-", "8.11", "-")

    page = write_tables(study, jobs, tmp_path / "out", failed)
    text = page.with_suffix(".md").read_text()
    assert "| BYOL | Y | Y | 53.00 ± 3.61 (3), 1 failed | 62.01 | -9.01 | 99.00 ± 0.00 (3), 1 failed | 99.50" in text
    assert "| *Other* | *Y* | *-* | - | 8.11 | - | - | - | - |" in text
    for words in ("byol_y_y-seed3 has no result: the loss is not finite", "the last row is a guess", "a cpu"):
        assert words in text and words in page.read_text()
    assert "gap_sim was not logged by byol_y_no-seed0" in text


def test_rows_are_compared_seed_by_seed(file, tmp_path):
    """The mean of the differences and its 95% interval, by hand: t of 2 degrees of freedom is 4.3027."""
    compare = [{"rows": {"Method": "BYOL"}, "against": {"backbone": "Y", "projector": "Y"}}]
    study = load_study(file(compare=compare), [*MINI, "seeds=[0,1,2,3]"])
    jobs = study.jobs(tmp_path)
    by_name = {job.name: job for job in jobs}
    for seed, (full, projector) in enumerate([(50.0, 51.0), (60.0, 62.0), (55.0, 58.0), (70.0, None)]):
        pretend(by_name[f"byol_y_y-seed{seed}"], val_acc1=full)
        if projector:
            pretend(by_name[f"byol_no_y-seed{seed}"], val_acc1=projector)
    pretend(by_name["byol_y_no-seed1"], val_acc1=40.0)
    full, backbone, projector, moco, other = (row["Acc"] for _, row in scores(study, results_of(study, jobs)))
    half = 4.302652730 * 1.0 / 3**0.5  # the differences 1, 2, 3 have the standard deviation 1
    assert projector.compared(".4f") == f"+2.0000 [{2 - half:+.4f}, {2 + half:+.4f}] (3)"
    assert backbone.compared(".2f") == "-20.00 (1)"  # the same seed; one alone has no interval
    assert [score.compared(".2f") for score in (full, moco, other)] == ["-", "-", "-"]
    (tmp_path / "out").mkdir()
    page = write_tables(study, jobs, tmp_path / "out").with_suffix(".md").read_text()
    assert "| Acc, ours | Acc, paper | ours - paper | Acc, difference |" in page
    assert "Difference: from backbone Y, projector Y, over the same seeds" in page


@pytest.mark.parametrize(
    "compare, words",
    [
        ([{"against": {"backbone": "No"}}], "compare: no cell has backbone No"),
        ([{"rows": {"Method": "BYO"}, "against": {"Method": "BYOL"}}], "compare: no cell has Method BYO"),
        ([{"rows": {"Method": "BYOL"}}], "compare.0.against is missing"),
    ],
)
def test_a_comparison_with_nothing_is_refused(file, compare, words):
    with pytest.raises(ConfigError, match=words):
        load_study(file(compare=compare))


def test_both_readings_of_a_paper_stand_side_by_side(file):
    """Each reading is a row with the paper's number and a baseline of its own; what has one reading names none."""
    grid = {**STUDY["grid"], "Reading": {"constant": ["momentum.schedule=constant"], "cosine": []}}
    study = load_study(file(grid=grid, compare=[{"against": {"backbone": "Y", "projector": "Y"}}]))
    assert [(*row.labels.values(), row.values["Acc"]) for row in study.rows] == [
        ("BYOL", "Y", "Y", "constant", 62.01),
        ("BYOL", "Y", "Y", "cosine", 62.01),
        ("BYOL", "Y", "-", "constant", 62.17),
        ("BYOL", "Y", "-", "cosine", 62.17),
        ("BYOL", "-", "Y", "constant", 59.61),
        ("BYOL", "-", "Y", "cosine", 59.61),
        ("MoCo v3", "Y", "Y", "-", None),
        ("Other", "Y", "-", "-", 8.11),
    ]
    assert len(study.runs) == 7 and study.cells[0].config(0).momentum.schedule == "constant"
    assert all(cell.labels["Reading"] == other.labels["Reading"] for cell, other in study.baselines.items())
    cells = [{"row": {"Method": "MoCo v3", "Reading": "one"}, "overrides": ["recipe=mocov3"]}] * 2
    with pytest.raises(ConfigError, match=r"comes twice|is covered by"):
        load_study(file(cells=cells))


def test_another_setting_is_said(file):
    path = file()
    assert warning(load_study(path)) == ""
    text = warning(load_study(path, [*MINI, "max_epochs=20"]))
    assert "data set fashion_mnist_mini instead of cifar100; epochs 20 instead of 200; backbone" in text
    assert "Only directions compare" in text


def test_facts_of_a_method(file, tmp_path):
    metrics = {"Acc": "forwards_per_view", "Sim": "minutes_per_epoch"}
    study = load_study(file(metrics=metrics, overrides=["max_epochs=10"]), MINI)
    jobs = {job.name: job for job in study.jobs(tmp_path)}
    pretend(jobs["byol_y_y-seed5"], seconds=1200.0, val_acc1=1.0)
    pretend(jobs["byol_no_y-seed5"], seconds=1200.0, before=[{}], val_acc1=1.0)
    full, _, projector, *_ = (row for _, row in scores(study, results_of(study, list(jobs.values()))))
    assert (full["Acc"].mean, projector["Acc"].mean) == (2, 1)
    assert full["Sim"].mean == pytest.approx(2.0)
    assert projector["Sim"].mean is None  # resumed: the seconds are those of its last part


def test_readout_at_epochs_of_one_run(file, tmp_path):
    study = load_study(file(READOUT), [*MINI, "max_epochs=20", "seeds=[0,1]"])
    assert len(study.cells) == 4 and [cell.name for cell in study.runs] == ["byol", "moco-v3"]
    jobs = study.jobs(tmp_path)
    assert len(jobs) == 4
    for job in jobs[::2]:  # 9 is the last one at or before 10, the paper's 100 of 200
        values = {5: 5.0, 9: 9.0 + job.seed, 11: 11.0, 20: 20.0 + job.seed}
        pretend(job, val_acc1=values, gap_sim={e: 1 - v / 100 for e, v in values.items()})
    column = [score["Top-1"] for _, score in scores(study, results_of(study, jobs))]
    assert [score.mean for score in column] == [9.5, 20.5, None, None]
    page = write_tables(study, jobs, tmp_path).read_text()
    assert "Epoch read out at: 100 at 10, 200 at 20" in page
    assert "MoCo v3" in page and (tmp_path / "study.pdf").read_bytes().startswith(b"%PDF")
    assert "prefers-color-scheme: dark" in page and "<svg" in page
    assert "src=" not in page and "@import" not in page and "<link" not in page
    assert {path.name for path in tmp_path.glob("study.*")} == {f"study.{s}" for s in ("md", "html", "png", "pdf")}
    assert not list(tmp_path.glob(".*tmp*"))


# Runs.


def test_dry_run(file, command, tmp_path):
    pretend(load_study(file(), MINI).jobs(tmp_path / "out")[1], val_acc1=1.0)
    status, out, err = command(file(), *MINI, "--out", "out", "--dry-run")
    lines = out.splitlines()
    assert status == 0 and not err and len(lines) == 5
    first = "byol_y_y-seed5     missing  fashion_mnist_mini/byol  max_epochs=200 optimizer.lr=0.5 momentum.stages=full"
    assert lines[0] == first and lines[1].split()[:2] == ["byol_y_no-seed5", "done"]
    assert not list((tmp_path / "out").glob("study.*"))
    status, out, _ = command(file(), *MINI, "--out", "out", "--dry-run", "--only", "byol_y_n*", "--only", "moco*")
    assert status == 0 and [line.split()[0] for line in out.splitlines()[:-1]] == [
        "byol_y_no-seed5",
        "moco-v3_y_y-seed5",
    ]


def test_one_study_in_a_folder_at_a_time(file, command, tmp_path):
    (tmp_path / "out").mkdir()
    lock = RunLock(tmp_path / "out")
    assert lock.take()
    status, _, err = command(file(), *MINI, "--out", "out")
    lock.release()
    assert status == 2 and "in use by a study" in err


CELLS = [
    {"row": {"Method": "MoCo v3"}, "overrides": ["recipe=mocov3", "optimizer.batch_size=5000"]},  # more than there are
    {"row": {"Method": "BYOL", "projector": "-"}, "overrides": ["recipe=byol", "optimizer.batch_size=16"]},
]
CITED = [{"Method": "Other"}, {"projector": "Y", "Method": "BYOL"}]


def test_the_tasks_of_a_job_array_share_the_runs(file, command, tmp_path, monkeypatch):
    """Two tasks, 3 and 5, of three runs, two of which are there already; the table has all."""
    for job in load_study(file(), MINI).jobs(tmp_path / "out")[:2]:
        pretend(job, val_acc1=1.0)
    words = [file(), *MINI, "--out", "out", "--only", "byol*", "--array"]
    status, _, err = command(*words)
    assert status == 2 and "--array: this is no task of a SLURM job array; sbatch --array=0-7" in err
    for name, value in {"MIN": 3, "STEP": 2, "COUNT": 2, "ID": 5}.items():
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", str(value))
    with held(tmp_path / "out", "", "", "", shared=True):  # by the other task
        status, out, err = command(*words)
        assert status == 0 and "4 runs: 2 done, 0 to do" in out, err
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
        started = []
        monkeypatch.setattr(LocalPool, "poll", lambda self: started.extend(self.waiting) or self.waiting.clear() or ())
        status, out, err = command(*words)
        assert [job.name for job in started] == ["byol_no_y-seed5"] and "4 runs: 2 done, 1 to do" in out, err
        assert command(*words[:-1])[0] == 2, "who would have the folder alone waits for nobody"
    assert (tmp_path / "out/study.md").is_file()


def test_stopped_runs_continue_and_failed_ones_stop_no_others(file, command, tmp_path):
    path = file(grid=None, cells=CELLS, cited=CITED, overrides=["max_epochs=20"])
    words = [path, *TINY, "--jobs", "2", "--out", "out"]
    runs = tmp_path / "out" / "runs" / "byol_y_no-seed5" / "byol"

    def terminate():  # in the middle of the run
        while not list(runs.glob("*/*-ep=*.ckpt")):
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=terminate, daemon=True)
    thread.start()
    status, out, _ = command(*words)
    assert status == 143 and "stopped byol_y_no-seed5" in out, out

    status, out, _ = command(*words)
    assert status == 1 and "done    byol_y_no-seed5   val_acc1" in out, out
    [run] = runs.iterdir()  # one run, which went on
    assert len(json.loads((run / "environment.json").read_text())["before"]) == 1
    assert "| MoCo v3 | Y | Y | failed |" in out
    log = (tmp_path / "out" / "logs" / "moco-v3_y_y-seed5.log").read_text()
    assert log.count("$ solo-ext pretrain") == 2 and log.strip().splitlines()[-1].startswith("solo-ext: error:")

    study = load_study(path, TINY)
    [job, _] = study.jobs(tmp_path / "out")
    assert job.state() == "done"
    cfg = copy.deepcopy(job.cell.config(5))
    cfg.checkpoint.dir, cfg.checkpoint.enabled, cfg.enable_progress_bar = str(tmp_path / "whole"), True, False
    whole = pretrain(resolve(cfg)).metrics
    metrics = json.loads((run / "result.json").read_text())["metrics"]
    same = ("train_loss", "val_loss", "val_acc1", "weight_distance/projector.fc1")
    assert {name: metrics[name] for name in same} == {name: whole[name] for name in same}

    [(_, row)] = [
        pair for pair in scores(study, results_of(study, [job])) if getattr(pair[0], "name", "") == "byol_y_no"
    ]
    assert row["Acc"].values == {5: metrics["val_acc1"]}


ONE = {"grid": None, "cells": CELLS[1:], "cited": [*CITED, {"Method": "MoCo v3"}]}


def test_runs_are_evaluated_and_only_once(file, command, tmp_path):
    metrics = {"Acc": "val_acc1", "Offline": {"metric": "linear.acc1", "printed": "Acc"}}
    metrics |= {"Near": {"metric": "near.acc1", "printed": "Acc"}}
    cached = ["linear", "cifar10/byol", "cache_features=true", "max_epochs=1", "scheduler.name=none"]  # of a ResNet-18
    cached += ["data.dataset=fashion_mnist_mini", "accelerator=cpu"]
    evaluate = {"linear": cached, "near": ["knn", "--k", "5", "--distance", "cosine"]}
    cited = [*CITED, {"Method": "MoCo v3"}]
    path = file(grid=None, cells=CELLS[1:], cited=cited, overrides=["max_epochs=1"], metrics=metrics, evaluate=evaluate)
    words = [path, *TINY, "--out", "out"]
    status, out, _ = command(*words)
    assert status == 0, out
    study = load_study(path, TINY)
    [job] = study.jobs(tmp_path / "out")
    run = job.result()
    assert {name: len(run.evaluations[name]) for name in ("linear.json", "knn.json")} == {
        "linear.json": 1,
        "knn.json": 1,
    }
    [(_, row)] = [pair for pair in scores(study, results_of(study, [job])) if getattr(pair[0], "name", "")]
    for column, name in (("Offline", "linear"), ("Near", "near")):
        assert row[column].values == {5: run.evaluated(name)["acc1"]} and row[column].paper == row["Acc"].paper
    before = (run.dir / "knn.json").stat().st_mtime_ns
    (run.dir / "linear.json").unlink()  # as where it was stopped between the two
    [job] = study.jobs(tmp_path / "out")
    assert job.state() == "begun"
    status, out, _ = command(*words)
    assert status == 0 and len([*job.folder.glob("byol/*")]) == 1, out
    [again] = study.jobs(tmp_path / "out")
    assert (run.dir / "knn.json").stat().st_mtime_ns == before and again.result().evaluated("linear")["acc1"] >= 0


def test_submitit_runs_the_cells(file, command, tmp_path):
    path = file(**ONE, overrides=["max_epochs=1"])
    launcher = ["--launcher", "submitit_local", "hydra.launcher.timeout_min=30"]
    status, out, err = command(path, *TINY, "--out", "out", *launcher)
    assert status == 0 and "[1/1] done    byol_y_no-seed5" in out, out + err
    [job] = load_study(path, TINY).jobs(tmp_path / "out")
    assert job.state() == "done" and len(list((tmp_path / "out" / "submitit").glob("*_result.pkl"))) == 1


def test_a_job_that_is_out_of_time_is_queued_again(file, command, tmp_path):
    path = file(**ONE, overrides=["max_epochs=20"])
    runs = tmp_path / "out" / "runs" / "byol_y_no-seed5" / "byol"

    def time_is_nearly_over():  # in the middle of the run: what submitit sends before the end of the job's time
        while not list(runs.glob("*/*-ep=*.ckpt")):
            time.sleep(0.02)
        [file] = (tmp_path / "out" / "submitit").glob("*_submitted.pkl")
        pid = file.name.partition("_")[0]
        [task] = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        for run in Path(f"/proc/{task}/task/{task}/children").read_text().split():
            os.kill(int(run), signal.SIGUSR2)  # SLURM sends it to all processes of the job
        os.kill(int(task), signal.SIGUSR2)

    threading.Thread(target=time_is_nearly_over, daemon=True).start()
    status, out, err = command(path, *TINY, "--out", "out", "--launcher", "local")
    assert status == 0 and "done    byol_y_no-seed5" in out, out + err
    [run] = runs.iterdir()  # one run, which was continued
    assert len(json.loads((run / "environment.json").read_text())["before"]) == 1
    log = (tmp_path / "out" / "logs" / "byol_y_no-seed5.log").read_text()
    assert log.count("$ solo-ext pretrain") == 2


def test_submitits_jobs_save_when_the_study_is_stopped(file, command, tmp_path):
    path = file(**ONE, overrides=["max_epochs=500"])
    runs = tmp_path / "out" / "runs" / "byol_y_no-seed5" / "byol"

    def terminate():
        while not list(runs.glob("*/*-ep=*.ckpt")):
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=terminate, daemon=True).start()
    status, out, err = command(path, *TINY, "--out", "out", "--launcher", "local")
    assert status == 143 and "stopped byol_y_no-seed5" in out, out + err
    [job] = load_study(path, TINY).jobs(tmp_path / "out")
    assert job.state() == "begun"


# Speedruns.


@pytest.mark.slow
def test_a_speedrun_takes_the_time_of_whole_processes(command, capfd, tmp_path):
    words = [*TINY[1:], "data.dataset=fashion_mnist_mini", "data.train_path=null", "data.val_path=null", "max_epochs=1"]
    words += ["check_val_every_n_epoch=1", "optimizer.batch_size=32"]
    assert cli.main(["speedrun", *words, "seeds=[3]", "--out", "fast"]) == 0
    study = load_study(ROOT / "scripts" / "studies" / "speedrun" / "cpu.yaml", [*words, "seeds=[3]"])
    [job] = study.jobs(tmp_path / "fast")
    run = job.result()
    assert run.summary["wall_seconds"] > run.summary["seconds"] > 0
    [(_, found)] = scores(study, results_of(study, [job]))
    assert found["Minutes"].values == {3: pytest.approx(run.summary["wall_seconds"] / 60)}
    accuracy = found["kNN-200"].values[3]
    for least, reached in ((accuracy, 1), (accuracy + 0.01, 0)):
        study.spec.target = {"kNN-200": least}
        assert f"kNN-200 of {least:g}: reached by {reached} of 1 runs." in remarks(study, results_of(study, [job]))
    recipe = recipe_from(run.environment["command"], ROOT)  # what zoo add says of it
    assert recipe.name == "fashion_mnist_mini/projector_ema_byol" and {"seed=3", "max_epochs=1"} <= {*recipe.overrides}
    # a part that another process does is not in the time
    (run.dir / "knn.json").unlink()
    assert cli.main(["speedrun", *words, "seeds=[3]", "--out", "fast"]) == 0
    assert job.result().summary["wall_seconds"] == run.summary["wall_seconds"]


def test_a_target_names_a_column(file):
    with pytest.raises(ConfigError, match="target: metrics has no column 'Accuracy'"):
        load_study(file(target={"Accuracy": 60}))
