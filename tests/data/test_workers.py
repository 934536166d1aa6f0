"""An error in a worker ends the run with its sentence, soon."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch.multiprocessing
from PIL import Image
from tiny_runs import config

import solo_ext
from solo_ext.data.augmentations import AugmentationConfig
from solo_ext.data.datasets import DataConfig
from solo_ext.data.modules import PretrainData
from solo_ext.errors import DataError, FailedRun
from solo_ext.training.callbacks.throughput import Throughput
from solo_ext.training.pretrain import pretrain

CODE = """if True:
    import sys, time
    from solo_ext.data.augmentations import AugmentationConfig
    from solo_ext.data.datasets import DataConfig
    from solo_ext.data.modules import PretrainData
    from solo_ext.errors import DataError
    data = DataConfig("custom", train_path=sys.argv[1], format="image_folder", num_workers=2)
    loader = PretrainData(data, [AugmentationConfig(crop_size=224, num_crops=2)], 32, 0).train_dataloader()
    began = time.time()
    try:
        batches = [batch for epoch in range(3) for batch in loader]
    except DataError as error:
        print(f"after {time.time() - began:.0f} s: {error}")
"""


MEMORY = """if True:
    import multiprocessing, re, sys
    from pathlib import Path
    if __name__ == "__main__":
        from solo_ext.data.augmentations import AugmentationConfig
        from solo_ext.data.datasets import DataConfig
        from solo_ext.data.modules import PretrainData
        multiprocessing.set_start_method(sys.argv[2])
        data = DataConfig("custom", train_path=sys.argv[1], format="image_folder", num_workers=2)
        loader = PretrainData(data, [AugmentationConfig(crop_size=32)], 32, 0).train_dataloader()
        batches = iter(loader)
        next(batches)
        for worker in loader._iterator._workers:
            own = re.search(r"Private_Dirty: +(\\d+)", Path(f"/proc/{worker.pid}/smaps_rollup").read_text())[1]
            print(int(own) // 1024)
"""


@pytest.fixture
def folder(tmp_path):
    for i in range(96):
        pixels = np.random.default_rng(i).integers(0, 256, (32, 32, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i:02d}.png")
    return tmp_path


def test_there_are_no_more_workers_than_cores(folder, monkeypatch, recwarn):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1})
    for asked, there in [(1, 1), (2, 2), (5, 2)]:
        data = DataConfig("custom", train_path=str(folder), format="image_folder", num_workers=asked)
        loader = PretrainData(data, [AugmentationConfig(crop_size=32)], 32, 0).train_dataloader()
        assert loader.num_workers == there
    assert [str(warning.message) for warning in recwarn if "worker" in str(warning.message)] == []


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="/proc has the sizes")
@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_workers_share_what_is_imported(folder, method):
    """By either start method of Linux: PyTorch alone would be 280 MB of each worker's own."""
    env = {**os.environ, "PYTHONPATH": str(Path(solo_ext.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    (folder / "memory.py").write_text(MEMORY)
    command = [sys.executable, str(folder / "memory.py"), str(folder), method]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=90)
    megabytes = [int(line) for line in done.stdout.splitlines()]
    assert len(megabytes) == 2 and max(megabytes) < 60, done


@pytest.mark.parametrize("size", ["1m", "64m"])
def test_shared_memory_that_is_full(folder, size):
    mount = f"mount -t tmpfs -o size={size} tmpfs /dev/shm"
    if subprocess.run(["unshare", "-m", "sh", "-c", mount], capture_output=True).returncode:
        pytest.skip("mounting a small /dev/shm takes root")
    root = os.path.dirname(os.path.dirname(solo_ext.__file__))
    command = ["unshare", "-m", "sh", "-c", f'{mount} && exec "$@"', "sh", sys.executable, "-c", CODE, str(folder)]
    env = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=90)
    said, _, sentence = done.stdout.partition(" s: ")
    assert done.returncode == 0 and sentence.startswith("data.num_workers: no shared memory (/dev/shm) is left"), done
    assert int(said.removeprefix("after ")) <= 10 and sentence.count("\n") == 1


@pytest.mark.parametrize("format", ["image_folder", "dali"])
@pytest.mark.parametrize("what", ["pipe", "vanished folder"])
def test_files_that_are_no_files_any_more(folder, what, format):
    if format == "dali":
        pytest.importorskip("nvidia.dali")
    data = DataConfig("custom", train_path=str(folder), format=format, num_workers=2)
    if what == "pipe":
        (folder / "50.png").unlink()
        os.mkfifo(folder / "50.png")
    loader = PretrainData(data, [AugmentationConfig(crop_size=16)], 8, 0).train_dataloader()
    if what != "pipe":
        shutil.rmtree(folder)
    began = time.time()
    with pytest.raises(
        DataError, match=rf"^(none of 96 images can be read; the last: )?{folder}/\d\d\.png: not a readable image \("
    ):
        list(loader)
    assert time.time() - began < 10


def test_workers_end_with_their_loader(folder):
    """Also where only a garbage collection ends it, as after a run, and at the end of the program."""
    code = (
        CODE.partition("loader =")[0]
        + """
    import gc
    loaders = [PretrainData(data, [AugmentationConfig(crop_size=16)], 8, 0).train_dataloader() for _ in range(2)]
    for loader in loaders:
        next(iter(loader))
    loader.itself = loader
    del loader, loaders[1]
    began = time.time()
    gc.collect()
    print(time.time() - began)
    """
    )
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, timeout=28)
    assert done.returncode == 0 and float(done.stdout) < 4 and not done.stderr.strip(), done


def test_a_worker_that_is_killed(folder, tmp_path, monkeypatch):
    """As by a system that is out of memory."""
    original = Throughput.on_train_batch_end

    def kill_one(self, trainer, *args):
        original(self, trainer, *args)
        if trainer.global_step == 2:
            os.kill(torch.multiprocessing.active_children()[0].pid, signal.SIGKILL)

    monkeypatch.setattr(Throughput, "on_train_batch_end", kill_one)
    images = {"dataset": "custom", "train_path": str(folder), "format": "image_folder", "num_workers": 2}
    cfg = config(tmp_path / "runs", data=images | {"no_labels": True, "fraction": -1}, optimizer__batch_size=2)
    began = time.time()
    with pytest.raises(FailedRun, match=r"^a process of data\.num_workers was killed[^\n]*$"):
        pretrain(cfg)
    assert time.time() - began < 60
