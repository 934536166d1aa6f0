"""metrics.csv over resumes, and wandb without a key or a network."""

import os
import pty
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import torch
from conftest import ROOT
from tiny_runs import CANARY, config

from solo_ext.errors import ConfigError
from solo_ext.runs.metrics import read_table
from solo_ext.runs.run import Run
from solo_ext.training.loggers import CSVMetrics, reachable
from solo_ext.training.pretrain import pretrain
from solo_ext.training.trainer_config import TensorboardConfig


def test_metrics_csv_has_all_columns_and_continues(tmp_path, caplog):
    csv_file = tmp_path / "metrics.csv"
    log = CSVMetrics(tmp_path)
    log.log_metrics({"loss": torch.tensor(1.5), "epoch": 0}, step=0)
    log.flush()
    log.log_metrics({"loss": 1.25, "epoch": 0}, step=1)
    log.save()
    assert csv_file.read_text() == "epoch,step,loss\n0,0,1.5\n", "the newest row may get more"
    log.log_metrics({"val_acc1": 50.0}, step=1)
    log.finalize("failed")
    assert csv_file.read_text() == "epoch,step,loss,val_acc1\n0,0,1.5,\n0,1,1.25,50.0\n"
    resumed = CSVMetrics(tmp_path, resume_at=1)  # row 1 is made again
    resumed.log_metrics({"tau": 0.9}, step=1)
    resumed.flush()
    assert csv_file.read_text() == "epoch,step,loss,val_acc1,tau\n0,0,1.5,,\n,1,,,0.9\n"
    before = csv_file.stat()
    resumed.log_metrics({"tau": 0.9}, step=1)
    resumed.flush()
    assert csv_file.stat().st_mtime_ns == before.st_mtime_ns, "which it has already"
    resumed.log_metrics({"tau": 0.8}, step=2)
    resumed.flush()
    assert csv_file.stat().st_ino == before.st_ino, "it is appended"
    resumed.log_metrics({"loss": 1.0}, step=1)
    resumed.finalize("success")
    assert csv_file.read_text() == "epoch,step,loss,val_acc1,tau\n0,0,1.5,,\n,1,1.0,,0.9\n,2,,,0.8\n"
    with open(csv_file, "a") as file:
        file.write("0,3,1.2")
    assert [row["step"] for row in read_table(csv_file)[1]] == ["0", "1", "2"] and "1 of 4 rows were cut" in caplog.text
    CSVMetrics(tmp_path).finalize("success")  # nothing logged: nothing touched
    assert "tau" in csv_file.read_text()


def test_wandb_without_key_or_network_goes_offline_in_one_line(tmp_path):
    """For real, at a terminal: it neither asks nor hangs, and no file holds the key."""
    script = """if True:
        import os, threading, wandb
        from http.server import BaseHTTPRequestHandler, HTTPServer
        from pathlib import Path
        from solo_ext.training.loggers import WandbConfig, close, wandb_logger

        BaseHTTPRequestHandler.log_message = lambda *_: None
        with HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            url = f"http://127.0.0.1:{server.server_port}"
            for name, env in (("no-key", {}), ("no-net", {"WANDB_API_KEY": os.environ["CANARY"]})):
                os.environ |= {"WANDB_BASE_URL": url, **env}
                logger = wandb_logger(WandbConfig(enabled=True), "x", Path(name))
                logger.log_metrics({"loss": 1.0}, step=3)
                assert logger.experiment.id == name and logger.experiment.offline
                close([logger])
                wandb.teardown()
                server.shutdown()
                server.server_close()
    """
    env = {k: v for k, v in os.environ.items() if not k.startswith("WANDB") and "proxy" not in k.lower()}
    env |= {"HOME": str(tmp_path), "PYTHONPATH": str(ROOT), "CANARY": CANARY}
    master, terminal = pty.openpty()
    for name in ("no-key", "no-net"):
        (tmp_path / name).mkdir()
    ends = {"stdin": terminal, "stdout": terminal, "stderr": terminal}
    done = subprocess.run([sys.executable, "-c", script], env=env, cwd=tmp_path, timeout=120, **ends)
    os.close(terminal)
    said = os.read(master, 10_000).decode().splitlines()
    assert done.returncode == 0, said
    assert len(said) == 2 and all("; logging offline to no-" in line for line in said), said
    assert said[0].startswith("wandb: No API key") and said[1].startswith("wandb: 127.0.0.1 cannot be reached")
    assert len(list(tmp_path.glob("no-*/wandb/offline-run-*/run-no-*.wandb"))) == 2
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not any(CANARY.encode() in path.read_bytes() for path in files)


def test_a_server_that_never_answers_is_not_waited_for():
    with HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        assert reachable(url)  # whatever its answer is
        server.shutdown()
    assert not reachable(url)
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        mute.listen()
        began = time.monotonic()
        assert not reachable(f"http://127.0.0.1:{mute.getsockname()[1]}", 0.2)
        assert not reachable("http://no-such-host.invalid", 0.2)
        assert time.monotonic() - began < 2


def test_tensorboard_not_installed_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(ConfigError, match=r"pip install 'solo-ext\[viz\]'"):
        TensorboardConfig(enabled=True)


@pytest.mark.slow
def test_tensorboard_and_wandb_group_the_same_metrics(tmp_path):
    """What a run logs, as both have it: the names of metrics.csv, below the report's sections."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    cfg = config(tmp_path, tensorboard__enabled=True, wandb__enabled=True, wandb__offline=True)
    run = Run(pretrain(cfg).dir)
    events = EventAccumulator(str(run.dir / "tensorboard"))
    events.Reload()
    board = {tag for tag in events.Tags()["scalars"] if tag not in ("epoch", "hp_metric")}
    [file] = run.dir.glob("wandb/offline-run-*/*.wandb")
    online = file.read_bytes()
    assert all(name.encode() in online for name in board)
    logged = set(run.metrics) - {"epoch", "step"}
    assert {name if name in logged else name.partition("/")[2] for name in board} == logged
    assert {"accuracies/val_acc1", "losses/train_loss", "gap/gap_sim_step", "schedules/tau"} <= board
