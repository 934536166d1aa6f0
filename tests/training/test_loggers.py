"""metrics.csv over resumes, and wandb without a key or a network."""

import csv
import os
import pty
import re
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import lightning.pytorch as pl
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


def bytes_written():
    """By this thread, as the kernel counts them."""
    return int(re.search(r"^wchar: (\d+)", Path("/proc/thread-self/io").read_text(), re.MULTILINE)[1])


@pytest.mark.skipif(sys.platform != "linux", reason="/proc counts the bytes")
def test_the_thousandth_row_costs_what_the_first_did(tmp_path):
    """In bytes written and in rows held, whole and resumed, where a late column rewrites the file once."""
    costs = []
    for first in (0, 1000):
        log = CSVMetrics(tmp_path, resume_at=first)
        for step in range(first, first + 1000):
            before = bytes_written()
            late = {"late": 0.25} if first and step >= 1500 else {}
            log.log_metrics({"loss": 0.125, "tau": 0.996, "epoch": 0, **late}, step=step)
            log.save()
            if step % 10 == 0:
                log.flush()
            costs.append(bytes_written() - before)
            assert len(log.rows) + len(log.last) <= 2
        log.finalize("stopped")
    rewritten = [step for step, cost in enumerate(costs) if cost > 100]
    assert rewritten == [1000, 1500] and sum(costs) > (tmp_path / "metrics.csv").stat().st_size
    assert [row["step"] for row in read_table(tmp_path / "metrics.csv")[1]] == [*map(str, range(2000))]


def test_checkpoints_inside_epochs_do_not_rewrite_the_file(tmp_path):
    """Though the epoch's means come to the row of its last step, which such a checkpoint has saved."""

    class FromTheSecondEpochOn(pl.Callback):
        file = None

        def on_train_epoch_start(self, trainer, module):
            if trainer.current_epoch == 1:  # all columns are there
                self.file = open(trainer.logger.path)  # noqa: SIM115

    watch = FromTheSecondEpochOn()
    pretrain(config(tmp_path, checkpoint__every_n_steps=1, log_every_n_steps=1), callbacks=[watch])
    with watch.file as file:
        assert os.fstat(file.fileno()).st_nlink == 1, "it is still the one that the second epoch began with"
        assert [row["step"] for row in csv.DictReader(file)] == [*map(str, range(9))]


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
