"""An args.json or YAML that somebody else wrote is data: it reads no environment, calls nothing, and names no place to
write to."""

import json
import os
import shutil

import pytest
from omegaconf import OmegaConf
from tiny_runs import CANARY, config

from solo_ext.cli.main import main
from solo_ext.errors import ConfigError
from solo_ext.runs.run import Run
from solo_ext.training.compose import compose
from solo_ext.training.config import resolve, run_values
from solo_ext.training.pretrain import pretrain


@pytest.fixture
def foreign(whole, tmp_path, monkeypatch):
    """A copy of a run, in whose args.json a function puts a value under a dotted key."""
    monkeypatch.setenv("SECRET", CANARY)
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "downloads" / "some" / "run"
    shutil.copytree(whole.dir, folder, ignore=shutil.ignore_patterns("linear.json", "knn.json"))

    def change(key, value):
        args = node = Run(folder).args
        *path, last = key.split(".")
        for name in path:
            node = node[name]
        node[last] = value
        (folder / "args.json").write_text(json.dumps(args))
        return folder

    return change


CALLS = [
    "${oc.env:SECRET}",
    "a/${oc.env:SECRET}",
    "${ oc.env : SECRET }",
    "${oc.${seed}:SECRET}",
    "${oc.decode:'${x}'}",
]


@pytest.mark.parametrize("kind", ["knn", "linear"])
@pytest.mark.parametrize(
    "key", ["name", "data.train_path", "data.dataset", "backbone", "backbone.kwargs.x", "precision"]
)
@pytest.mark.parametrize("call", CALLS)
def test_an_args_json_looks_nothing_up(foreign, capsys, key, call, kind):
    folder = foreign(key, call)
    assert main([kind, "--run", str(folder), "accelerator=cpu", "--cfg"]) == 2
    out, err = capsys.readouterr()
    assert CANARY not in out + err and err.count("\n") == 1
    assert not (folder / f"{kind}.json").exists()


YAMLS = {
    "name: ${oc.env:SECRET}": "name: ${oc.env:SECRET} is not looked up",
    "data: {train_path: ['${oc.env:SECRET}']}": "data.train_path.0: ${oc.env:SECRET} is not looked up",
    "data: ${oc.env:SECRET}": "data: ${oc.env:SECRET} is not looked up",
    "defaults: ['${oc.env:SECRET}']": "oc.env",
    "defaults: [{a: '${oc.env:SECRET}'}]": "oc.env",
    "defaults: [base]": "oc.env",
}


@pytest.mark.parametrize("text", YAMLS)
def test_a_yaml_looks_nothing_up(tmp_path, monkeypatch, text):
    monkeypatch.setenv("SECRET", CANARY)
    (tmp_path / "base.yaml").write_text("defaults: ['${oc.env:SECRET}']\n")
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(ConfigError) as error:
        resolve(compose(tmp_path, "mine", ["data.num_workers=1"]))
    assert YAMLS[text] in str(error.value) and CANARY not in str(error.value)
    assert OmegaConf.create({"a": "${oc.env:SECRET}"}).a == CANARY  # elsewhere it is as it was


def test_the_content_of_an_args_json_looks_nothing_up(foreign):
    values = Run(foreign("seed", 5)).args
    with pytest.raises(ConfigError, match=r"^name: \$\{oc.env:SECRET\} is not looked up"):
        resolve(values | {"name": "${oc.env:SECRET}"})
    assert resolve(values | {"name": "${method}-of-mine"}).name == "byol-of-mine"


def test_nothing_is_written_where_an_args_json_says(foreign, tmp_path):
    there = tmp_path / "there"
    folder = foreign("checkpoint.dir", str(there))
    words = ["--run", str(folder), "data.fraction=0.01", "accelerator=cpu"]
    assert main(["linear", *words, "cache_features=true", "max_epochs=1"]) == 0
    assert main(["knn", *words, "untrained=true"]) == 0
    assert not there.exists() and Run(folder).evaluations["linear.json"]
    assert {path.name for path in (tmp_path / "trained_models").iterdir()} == {"linear", "untrained"}
    assert run_values(folder, "linear", ["checkpoint.dir=mine"]).checkpoint.dir == "mine"


def test_a_run_that_lies_where_its_args_json_says_keeps_its_place(whole, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own = str(whole.dir.parent.parent)
    assert run_values(whole.dir, "linear").checkpoint.dir == own
    os.symlink(own, tmp_path / "link")
    assert run_values(tmp_path / "link" / "byol" / whole.dir.name, "linear").checkpoint.dir == own


@pytest.mark.parametrize("key", ["train_path", "val_path"])
def test_nothing_is_downloaded_to_where_an_args_json_says(foreign, tmp_path, capsys, key):
    there = tmp_path / "there"
    foreign("data.dataset", "cifar10")
    folder = foreign(f"data.{key}", str(there))
    assert main(["knn", "--run", str(folder), "accelerator=cpu"]) == 2
    assert "data.download is false" in capsys.readouterr().err and not there.exists()
    own = run_values(folder, "knn", [f"data.{key}=mine"])
    assert own.data.get("download", True) and own.data[key] == "mine"


def test_a_cache_is_not_placed_by_an_args_json(foreign):
    assert "cache_dir" not in run_values(foreign("backbone.kwargs.cache_dir", "/there"), "knn").backbone.kwargs


def test_what_is_no_callback_is_not_called(tmp_path):
    file = tmp_path / "called"
    with pytest.raises(
        ConfigError, match=r"^callbacks.pathlib.Path.touch: not a class of Lightning callbacks but <func"
    ):
        pretrain(config(tmp_path, callbacks={"pathlib.Path.touch": {"self": str(file)}}))
    with pytest.raises(ConfigError, match=r"^callbacks.os.mkdir: not a class of Lightning callbacks"):
        pretrain(config(tmp_path, callbacks={"os.mkdir": {"path": str(file)}}))
    assert not file.exists()
