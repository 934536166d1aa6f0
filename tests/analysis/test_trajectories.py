"""Filters over training: what is recorded, also over a resume, and the pictures."""

import numpy as np
import pytest
import torch
from tiny_runs import config, interrupted

from solo_ext.analysis import trajectories
from solo_ext.cli.main import main
from solo_ext.errors import ConfigError
from solo_ext.runs.checkpoints import load_checkpoint
from solo_ext.runs.metrics import read_table
from solo_ext.training.pretrain import pretrain

FILTERS = {"filters__enabled": True, "filters__count": 3, "momentum__stages": ["projector.fc2"]}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return pretrain(config(tmp_path_factory.mktemp("filters"), checkpoint__keep_prev=True, **FILTERS))


def recorded(folder):
    columns, rows = read_table(folder / "filters.csv")
    steps = [(int(row["step"]), [float(row[name]) for name in columns[1:]]) for row in rows]
    assert len(dict(steps)) == len(steps)  # each once
    return columns, dict(steps)


def test_every_step_is_recorded_with_the_weights_after_it(run):
    columns, steps = recorded(run.dir)
    assert list(steps) == [*range(9)] and len(columns) == 1 + 2 * 3 * 8
    assert columns[1] == "student/0/0" and columns[-1] == "teacher/2/7"
    for epoch in range(3):
        state = load_checkpoint(run.dir / f"tiny-{run.dir.name}-ep={epoch}.ckpt")["state_dict"]
        both = [state[f"{prefix}projector.3.weight"][:3] for prefix in ("", "momentum_")]
        assert steps[3 * epoch + 2] == pytest.approx(torch.stack(both).flatten().tolist(), rel=1e-6)
    assert steps[2] != steps[3]


def test_a_resumed_run_records_the_same(run, tmp_path, monkeypatch):
    cfg = config(tmp_path, checkpoint__keep_prev=True, **FILTERS)
    folder, _ = interrupted(cfg, monkeypatch, step=5)
    columns, steps = recorded(folder)
    with (folder / "filters.csv").open("a") as file:  # a row after the last checkpoint, and one that a kill cut
        file.write(",".join(["5", *["0.5"] * (len(columns) - 1)]) + "\n7,1.0")
    assert list(steps) == [*range(5)]
    pretrain(cfg)
    assert recorded(folder) == recorded(run.dir)


def test_every_few_steps_and_without_a_teacher(tmp_path):
    options = FILTERS | {"filters__every": 4, "momentum__stages": "none", "accumulate_grad_batches": 2}
    columns, steps = recorded(pretrain(config(tmp_path, **options)).dir)
    assert list(steps) == [0, 4] and len(columns) == 1 + 3 * 8


@pytest.mark.parametrize(
    ("stage", "said"),
    [("projector.fc3", "filters.stage: the network has no stage 'projector.fc3'"), ("block1", "not one linear layer")],
)
def test_a_stage_that_has_no_filters(tmp_path, stage, said):
    with pytest.raises(ConfigError, match=said):
        pretrain(config(tmp_path, **FILTERS, filters__stage=stage))


@pytest.mark.parametrize("suffix", [".png", ".pdf"])
@pytest.mark.parametrize("flat", [[], ["--flat"]])
def test_the_picture(run, tmp_path, suffix, flat, monkeypatch):
    drawn = []
    original = trajectories.trajectories
    monkeypatch.setattr(trajectories, "trajectories", lambda *args: drawn.append(original(*args)) or drawn[0])
    out = tmp_path / f"filters{suffix}"
    assert main(["trajectories", str(run.dir), "--out", str(out), "--filters", "0", "2", *flat]) == 0
    assert out.read_bytes()[:4] in (b"\x89PNG", b"%PDF")
    _, steps = recorded(run.dir)
    line = drawn[0].axes[1].lines[0]  # filter 2 of the student
    xs = line.get_data_3d() if not flat else line.get_data()
    values = np.array([steps[step] for step in range(9)])
    assert np.asarray(xs[-2]) == pytest.approx(values[:, 16]) and np.asarray(xs[-1]) == pytest.approx(values[:, 17])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--filters", "3"], "--filters: 3 is not recorded"),
        (["--out", "a.svg"], "must end in .png or .pdf"),
    ],
)
def test_mistakes(run, tmp_path, words, said, capsys):
    assert main(["trajectories", str(run.dir), "--out", str(tmp_path / "a.png"), "--filters", "0", *words]) == 2
    assert said in capsys.readouterr().err and not [*tmp_path.iterdir()]


def test_a_run_that_recorded_none(tmp_path, capsys):
    other = pretrain(config(tmp_path, max_epochs=1)).dir
    assert main(["trajectories", str(other), "--out", str(tmp_path / "a.png")]) == 2
    assert "has no filters.csv: filters.enabled=true records them" in capsys.readouterr().err
