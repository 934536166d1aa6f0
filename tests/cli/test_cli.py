"""The command line, as a user meets it: help, mistakes, `--cfg`, the scripts, and one run through all commands."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from omegaconf import OmegaConf

from solo_ext.cli.command import SOLO_EXT

COMMANDS = SOLO_EXT.commands
BYOL = ROOT / "scripts" / "pretrain" / "cifar10" / "byol.yaml"
MINI = ROOT / "scripts" / "pretrain" / "fashion_mnist_mini" / "res_mocov3.yaml"
ENV = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def python(*args, **kwargs):
    return subprocess.run([sys.executable, *args], capture_output=True, text=True, env=ENV, timeout=120, **kwargs)


# Help.


def test_help_imports_no_torch():
    code = "import sys; from solo_ext.cli.main import main; main(['--help']); print('torch' in sys.modules)"
    lines = python("-c", code).stdout.splitlines()
    assert lines[-1] == "False" and all(any(name in line for line in lines) for name in COMMANDS)


@pytest.mark.parametrize("argv", [[], ["-h"], ["--help"]])
def test_overview(run, argv):
    status, out, err = run(*argv)
    said = " ".join(out.split())
    assert status == 0 and not err and all(command.summary in said for command in COMMANDS.values())


def commands(group, *words):
    yield words, group
    for name, command in getattr(group, "commands", {}).items():
        yield from commands(command, *words, name)


ALL = dict(commands(SOLO_EXT))


@pytest.mark.parametrize("columns", [60, 80, 200])
@pytest.mark.parametrize("words", ALL, ids=" ".join)
def test_help_of_a_command(run, words, columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    status, out, err = run(*words, "--help")
    assert status == 0 and not err
    assert out.startswith(f"usage: {' '.join(['solo-ext', *words])} ")
    assert all(action.help for action in ALL[words]._actions)
    examples = out.rpartition("examples:\n")[2].replace(" \\\n     ", "").splitlines()
    assert examples == ALL[words].examples and len(examples) >= 2  # a long one can be pasted, too
    assert max(map(len, out.splitlines())) <= min(columns, 120)


# Mistakes.


@pytest.mark.parametrize(
    "argv, words",
    [
        (["pretran"], "did you mean 'pretrain'"),
        (["fly"], "one of pretrain, plan, linear"),
        (["pretrain"], "which YAML?"),
        (["pretrain", "max_epochs=3"], "which YAML?"),
        (["pretrain", BYOL, "seed"], "'seed' is not an override"),
        (["pretrain", BYOL, BYOL], "a YAML comes first"),
        (["pretrain", BYOL, "--config-pth", "x"], "did you mean '--config-path'"),
        (["pretrain", BYOL, "--multirun"], "unknown option '--multirun'"),
        (["pretrain", "--config-path"], "expected one argument"),
        (["pretrain", BYOL.parent / "byo.yaml"], "did you mean"),
        (["pretrain", "--config-path", BYOL.parent.parent / "cifar11", "--config-name", "byol"], "did you mean"),
        (["pretrain", BYOL, "method=byoll"], "did you mean 'byol'"),
        (["pretrain", BYOL, "optimizer.lrr=1"], "did you mean 'optimizer.lr'"),
        (["pretrain", BYOL, "optimizer.lr=nan"], "optimizer.lr must be a finite number, not nan"),
        (["pretrain", BYOL, "devices=0,1"], "devices=[0,1]"),
        (["pretrain", BYOL, "data.train_path=nowhere", "data.download=false"], "data.train_path"),
        (["pretrain", BYOL, "data.dataset=custom", "data.train_path=nowhere"], "nowhere"),
        (["pretrain", MINI, "accelerator=gpu"], "accelerator=cpu"),
        (["pretrain", MINI, "optimizer.batch_size=9999"], "optimizer.batch_size"),
        (["pretrain", MINI, "momentum.stages=projctor"], "projector"),
        (["pretrain", MINI, "backbone.name=timm/vit_tiny_patch16_224"], "cannot take crops of 28 px"),
        (["pretrain", MINI, "resume_from_checkpoint=nowhere.ckpt"], "nowhere.ckpt"),
        (["linear"], "which YAML?"),
        (["linear", "--run", "nowhere"], "nowhere"),
        (["linear", ROOT / "scripts/linear/fashion_mnist_mini/byol.yaml"], "pretrained_feature_extractor is missing"),
        (["knn"], "--run"),
        (["knn", "--run", "nowhere"], "nowhere"),
        (["knn", "--run", ".", BYOL], "not from a YAML"),
        (["report"], "RUN"),
        (["report", "nowhere"], "nowhere"),
    ],
    ids=lambda value: " ".join(Path(str(word)).name for word in value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line_and_leaves_nothing_behind(run, tmp_path, monkeypatch, argv, words):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    status, out, err = run(*argv)
    where = r"(\S+: cpu, (trained_models/\w+/\w{8}); follow: solo-ext runs \2 --watch 5\n)?"  # if it came to that
    assert status == 2 and re.fullmatch(where, out)
    lines = [line for line in err.splitlines() if not line.startswith("solo-ext: precision")]
    assert len(lines) == 1 and lines[0].startswith("solo-ext: error: ") and words in lines[0], err
    assert list(tmp_path.iterdir()) == []


def test_an_interruption_is_one_line(run, monkeypatch):
    def interrupt(argv):
        raise KeyboardInterrupt

    monkeypatch.setitem(COMMANDS, "demo", interrupt)
    assert run("demo") == (130, "", "solo-ext: interrupted\n")


def test_a_bug_of_ours_keeps_its_traceback(run, monkeypatch):
    def fail(argv):
        raise RuntimeError("ours")

    monkeypatch.setitem(COMMANDS, "demo", fail)
    with pytest.raises(RuntimeError, match="ours"):
        run("demo")


# The configuration that would run.


def test_cfg_needs_neither_data_nor_hardware(run, tmp_path):
    changes = ["accelerator=gpu", "devices=[0,1]", "data.train_path=/nowhere", "data.download=false"]
    status, out, err = run("pretrain", BYOL, *changes, "--cfg")
    assert status == 0 and not err
    cfg = OmegaConf.create(out)
    assert cfg.optimizer.effective_lr == 2 and cfg.data.num_classes == 10 and "hydra" not in cfg
    (tmp_path / "again.yaml").write_text(out)
    assert run("pretrain", "again.yaml", "--cfg") == (0, out, "")


@pytest.mark.parametrize(
    "argv",
    [
        ["--config-path", BYOL.parent, "--config-name", "byol.yaml", "seed=1", "--cfg"],
        ["-cn", "byol", "-cp", BYOL.parent, "--cfg", "job", "seed=1"],
        ["seed=1", "--cfg", "--config-name", "byol", "--config-path", BYOL.parent],
        ["--cfg", "job", BYOL, "++seed=1"],
        ["--config-path", BYOL.parents[1], "cifar10/byol.yaml", "seed=1", "--cfg"],
    ],
    ids=lambda argv: " ".join(Path(str(word)).name for word in argv),
)
def test_the_same_run_in_other_words(run, argv):
    assert run("pretrain", *argv) == run("pretrain", BYOL, "seed=1", "--cfg")


def test_a_relative_path_starts_at_the_current_directory(run, monkeypatch):
    absolute = run("pretrain", BYOL, "--cfg")
    monkeypatch.chdir(BYOL.parents[1])
    assert run("pretrain", "cifar10/byol.yaml", "--cfg") == absolute
    assert run("pretrain", "--config-path", "cifar10", "--config-name", "byol", "--cfg") == absolute


def test_a_script_passes_its_arguments_on_from_any_directory(tmp_path):
    if not shutil.which("bash"):
        pytest.skip("no bash")
    command = tmp_path / "solo-ext"  # what pip installs
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m solo_ext "$@"\n')
    command.chmod(0o755)
    script = BYOL.with_name("res_mocov3.sh")
    words = ["name=two words", "intra.every=8000", "--cfg"]
    env = {**ENV, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run([script, *words], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    cfg = OmegaConf.create(done.stdout)
    assert (cfg.method, cfg.name, cfg.intra.every) == ("res_mocov3", "two words", 8000)


# All commands, for real.


def test_pretrain_evaluate_report(run, tmp_path):
    small = ["data.fraction=0.1", "optimizer.batch_size=100", "max_epochs=1", "data.num_workers=0", "accelerator=cpu"]
    status, out, err = run("pretrain", MINI, *small, "enable_progress_bar=false", "precision=32")
    assert status == 0, err
    [folder] = (tmp_path / "trained_models" / "res_mocov3").iterdir()
    [checkpoint] = folder.glob("*.ckpt")
    assert folder.name in out and f"{folder.name}-ep=0.ckpt" in checkpoint.name

    cpu = ["accelerator=cpu", "data.num_workers=0"]
    status, out, err = run("knn", *cpu, "--run", folder, "--k", "1", "20", "--distance", "cosine", "seed=1")
    assert status == 0, err
    assert [line.split()[:3] for line in out.splitlines()] == [["cosine", "k", "1"], ["cosine", "k", "20"]]

    status, out, err = run(
        "linear", "--run", checkpoint, *cpu, "max_epochs=1", "limit_train_batches=2", "enable_progress_bar=false"
    )
    assert status == 0 and "val_acc1" in out, err
    yaml = ROOT / "scripts" / "linear" / "fashion_mnist_mini" / "res_mocov3.yaml"
    status, out, err = run("linear", yaml, "--run", folder, "--cfg")
    assert status == 0 and OmegaConf.create(out).pretrained_feature_extractor == str(checkpoint), err

    status, out, err = run("report", folder, "--out", "page")
    assert status == 0 and out.strip() == "page/report.html" and (tmp_path / "page" / "report.html").is_file(), err


def test_demo(run, tmp_path):
    """All of `make demo`, on two batches of images."""
    small = ["data.fraction=0.05", "max_epochs=1", "data.num_workers=0", "precision=32", "enable_progress_bar=false"]
    status, out, err = run("demo", *small, "accelerator=cpu", "--out", "first")
    assert status == 0, err
    table = out[out.index("images/s") :].splitlines()
    rows = {line.split()[0]: line.split()[1:] for line in table if len(line.split()) == 7}
    assert list(rows) == ["mocov3", "res_mocov3", "byol", "projector_ema_byol", "untrained"]
    for method, cells in rows.items():
        *figures, seconds = (cell.replace(",", "") for cell in cells)  # so short a run may take 0
        assert all(float(cell) > 0 for cell in figures[: 3 if method == "untrained" else 5]), cells
        assert method == "untrained" or float(seconds) >= 0
    assert f"report: {tmp_path / 'first' / 'report' / 'report.html'}" in out
    assert (tmp_path / "first" / "report" / "report.html").is_file()


def test_a_reader_that_has_seen_enough_is_no_error():
    words = [sys.executable, "-m", "solo_ext", "recipes"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 1
