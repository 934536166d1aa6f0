"""Where the time of a training goes."""

import json

import pytest
from tiny_runs import config

from solo_ext.analysis.report import main_report
from solo_ext.training import shares
from solo_ext.training.pretrain import pretrain


def test_a_part_does_not_count_what_is_nested_in_it(monkeypatch):
    """By a clock: 2 s of start-up, a step of 1 + 4 s around a callback of 2 s, 3 s of kNN, 5 s of a part that is none,
    and 7 s for images."""
    clock = iter([0, 2, 3, 5, 9, 9, 12, 12, 17, 17, 24])
    monkeypatch.setattr(shares.time, "perf_counter", lambda: next(clock))
    times = shares.Shares()
    with times.profile("run_training_batch"), times.profile("[Callback]CollapseWatch{'every': 3}.on_after_backward"):
        pass
    for action in ("[Callback]OnlineKNN.on_validation_epoch_end", "run_training_epoch", "[Loop].train_dataloader_next"):
        with times.profile(action):
            pass
    assert times.seconds == {"start-up": 2, "steps": 5, "CollapseWatch": 2, "OnlineKNN": 3, "waiting for images": 7}


def test_a_run_says_where_its_time_went_and_the_report_shows_it(tmp_path):
    result = pretrain(config(tmp_path, max_epochs=2))
    said = json.loads((result.dir / "result.json").read_text())
    assert said["parts"].keys() >= {"start-up", "steps", "waiting for images", "validation"}
    assert 0 < sum(said["parts"].values()) <= said["seconds"]
    pytest.importorskip("plotly")
    page = main_report([result.dir], tmp_path / "report").read_text()
    assert f"steps {said['parts']['steps'] / said['seconds']:.0%}" in page
