"""The table of runs: what it says of finished, stopped and damaged ones, and of one that is running."""

import io
import shutil

import pytest
from rich.console import Console
from tiny_runs import config, interrupted, whole  # noqa: F401, a fixture

from solo_ext.analysis import listing
from solo_ext.cli.main import main
from solo_ext.runs.locks import RunLock
from solo_ext.runs.run import Run
from solo_ext.training.pretrain import pretrain


def lines(capsys, *words):
    assert main(["runs", *map(str, words)]) == 0
    return capsys.readouterr().out


def test_states(tmp_path, monkeypatch, capsys):
    folder, _ = interrupted(config(tmp_path), monkeypatch)
    assert (Run(folder).state, Run(folder).progress) == ("stopped", 2) and "2/3" in lines(capsys, tmp_path)
    lock = RunLock(folder)
    assert lock.take()
    assert Run(folder).state == "running"
    lock.release()
    said = lines(capsys, tmp_path)
    assert f"byol/{folder.name}" in said and "stopped" in said and "2/3" in said
    pretrain(config(tmp_path))
    assert Run(folder).state == "finished" and "3/3" in lines(capsys, tmp_path)


def test_a_damaged_run_is_named_and_the_others_are_shown(whole, tmp_path, capsys):  # noqa: F811
    for name in "ab":
        shutil.copytree(whole.dir, tmp_path / "byol" / name)
    (tmp_path / "byol" / "a" / "linear.json").write_text("[")
    said = lines(capsys, tmp_path)
    assert "byol/b" in said and "byol/a " not in said
    assert "linear.jsonisdamaged" in "".join(said.split())  # which is wrapped


def test_it_fits_every_terminal(whole, tmp_path, monkeypatch):  # noqa: F811
    """Whole words only, of the columns that there is room for."""
    shutil.copytree(whole.dir, tmp_path / "byol" / "a")
    shutil.copytree(whole.dir, tmp_path / "untrained" / "resnet10_w16-seed5-0123abcd")
    monkeypatch.setattr(listing.time, "time", lambda: 1e10)

    def words(width):
        out = io.StringIO()
        Console(file=out, width=width).print(listing.listing([tmp_path], width))
        return {*out.getvalue().replace("─", "").split()}

    whole_words = words(300)
    assert {"similarity", "seconds", "finished"} <= whole_words and "began" not in whole_words
    assert {width: cut for width in range(45, 160) if (cut := words(width) - whole_words)} == {}


def test_it_is_shown_anew(whole, monkeypatch, capsys):  # noqa: F811
    pauses = []

    def pause(seconds):
        pauses.append(seconds)
        if len(pauses) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(listing.time, "sleep", pause)
    assert main(["runs", str(whole.dir), "--watch", "2"]) == 130
    assert pauses == [2, 2, 2] and whole.dir.name in capsys.readouterr().out


def test_it_waits_for_a_run_that_is_about_to_begin(whole, tmp_path, monkeypatch, capsys):  # noqa: F811
    folder = tmp_path / "byol" / "a"

    def pause(seconds):
        if folder.exists():
            raise KeyboardInterrupt
        shutil.copytree(whole.dir, folder)

    monkeypatch.setattr(listing.time, "sleep", pause)
    assert main(["runs", str(folder), "--watch", "2"]) == 130
    first, _, second = " ".join(capsys.readouterr().out.split()).partition(" run ")
    assert "does not exist" in first and "byol/a finished" in second


@pytest.mark.parametrize(
    ("words", "said"),
    [(["nowhere"], "nowhere does not exist"), ([".", "--watch", "0"], "--watch is a number of seconds above 0, not 0")],
)
def test_mistakes(words, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["runs", *words]) == 2
    assert said in capsys.readouterr().err
