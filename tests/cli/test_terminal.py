"""What a terminal of 60 or 80 columns shows: whole words and numbers, and no message lost to the progress bar."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios

import pytest
from conftest import ROOT

from solo_ext.text import hanging
from solo_ext.zoo.index import read_index

ENTRIES = read_index(ROOT / "zoo")


def on_terminal(columns, folder, *words):
    """What a command writes to a terminal, line by line."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    env = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "LINES", "NO_COLOR")}
    env |= {"PYTHONPATH": os.pathsep.join([str(ROOT), str(folder)]), "TERM": "xterm-256color", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "solo_ext", *words]
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, cwd=folder, env=env) as process:
        os.close(theirs)
        said = b""
        try:
            while part := os.read(ours, 65536):
                said += part
        except OSError:  # its end
            pass
    os.close(ours)
    assert process.returncode == 0, said.decode()
    return re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", said.decode()).replace("\r\n", "\n").replace("\r", "\n").splitlines()


@pytest.mark.parametrize("columns", [60, 80])
@pytest.mark.parametrize("words", ["zoo list", "recipes", "runs trained_models"])
def test_no_line_is_longer_than_the_terminal(words, columns, tmp_path):
    if "runs" in words:
        run = tmp_path / "trained_models" / "projector_ema_mocov2plus" / "1f2e3d4c"
        run.mkdir(parents=True)
        (run / "args.json").write_text('{"max_epochs": 1000}')
        row = "0,9,1234.5,65.5,67.1,35.6,0.8,1.5"
        (run / "metrics.csv").write_text(
            f"epoch,step,images_per_s,val_knn1,val_knn20,val_acc1,gap_sim,train_loss\n{row}\n"
        )
    lines = on_terminal(columns, tmp_path, *words.split())
    assert max(map(len, lines)) <= columns
    text = "\n".join(lines)
    if words == "zoo list":
        whole = re.sub(r"^(\S+)( .*)\n  (\S+)$", r"\1\3\2", text, flags=re.MULTILINE)  # names in two parts
        rows = {line.split()[0]: line.split()[1:] for line in whole.splitlines() if line}
        for entry in ENTRIES.values():
            figures = {f"{score.value:.2f}" for score in entry.figures if score.metric != "kNN-1"}
            assert figures <= {*rows[entry.name]}
    elif words == "recipes":
        assert "residual momentum, Table 1 (93.71), settings of Table 10." in " ".join(text.split())
    else:
        assert "projector_ema_mocov2plus/1f2e3d4c" in text and "…" not in text


def test_the_rest_of_a_line_stands_below_its_last_column():
    line = "byol-seed5   missing  fashion_mnist_mini/byol  max_epochs=200 momentum.stages=full"
    assert hanging(line, 48).splitlines() == [
        "byol-seed5   missing  fashion_mnist_mini/byol",
        "                      max_epochs=200",
        "                      momentum.stages=full",
    ]
    assert hanging("  a word that\xa0stays whole", 12) == "  a word\n  that stays\n  whole"
    assert hanging(line) == line  # there is no terminal here


def test_the_bar_has_room_for_all_numbers_and_lets_messages_pass(tmp_path):
    (tmp_path / "talking.py").write_text(
        "import lightning.pytorch as pl\nfrom solo_ext.files import log\n"
        "class Talking(pl.Callback):\n"
        "    def on_train_batch_end(self, trainer, *args):\n"
        "        log.warning('step %s is over', trainer.global_step)\n"
    )
    small = ["data.fraction=0.02", "optimizer.batch_size=50", "max_epochs=2", "accelerator=cpu", "knn_eval.every=1"]
    words = ["pretrain", "fashion_mnist_mini/byol", *small, "++callbacks={talking.Talking: {}}"]
    lines = on_terminal(60, tmp_path, *words)
    assert [f"solo-ext: step {step} is over" for step in (1, 2, 3, 4)] == [x for x in lines if "is over" in x]
    start, end = (
        [i for i, line in enumerate(lines) if re.match(r"epoch 2/2 .* 100% ETA 0:00:00$", line)][-1:],
        len(lines),
    )
    last = lines[start[0] : end]
    assert max(map(len, last)) <= 60
    metrics = " ".join(" ".join(last).split())
    for label in ("loss", "val acc", "kNN-1", "kNN-20", "similarity to teacher", "images/s"):
        assert re.search(rf"\b{label} [\d.,]+ ", metrics), (label, metrics)
    assert [line.split(" trained")[0] for line in last if line.startswith("next")] == [
        "next: solo-ext knn --run",
        "next: solo-ext linear --run",
        "next: solo-ext report",
    ]
