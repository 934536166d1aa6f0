"""Runs of two CPU processes, started by Lightning, torchrun and SLURM's variables, against one with the joint batch."""

import csv
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import tiny_runs
import torch
from frameworks import SPECS
from lightning.fabric.plugins.environments import LightningEnvironment, SLURMEnvironment, TorchElasticEnvironment
from tiny_runs import forks

import solo_ext
from solo_ext.cli.main import main
from solo_ext.errors import ConfigError, FailedRun
from solo_ext.runs.checkpoints import find_checkpoint, load_checkpoint
from solo_ext.training.compose import compose
from solo_ext.training.config import resolve
from solo_ext.training.pretrain import pretrain
from solo_ext.training.recipes import find
from solo_ext.training.resume import ExactResume
from solo_ext.training.start import cluster_environment, die_with
from solo_ext.training.trainer import explained
from solo_ext.training.trainer_config import TrainerConfig

ROOT = Path(solo_ext.__file__).parents[1]
YAMLS = ROOT / "scripts/pretrain/fashion_mnist_mini"
BATCH = 32  # joint

# the logged values that are not those of the joint batch: a time, and a spread over each rank's images
OWN = {"images_per_s", "train_rankme", "train_z_std", "view_std", "view_brightness"}

# The steps are those of the papers' optimizer: in float32, AdamW and SGD make of one ReLU that opens in one order of
# summation and not in another more than 1e-5 within five steps, in one process too.
FLOAT32 = ("res_mocov3", "precision=32", "optimizer.name=lars", "optimizer.lr=1")
FLOAT64 = ("byol", "precision=64-true")  # as the recipe is, with AdamW


def words(folder, processes, recipe):
    """Five steps of a recipe: YAML and overrides."""
    method, *changes = recipe
    parallel = ["devices=2", "strategy=ddp", "sync_batchnorm=true"] if processes == 2 else []
    return [
        str(YAMLS / f"{method}.yaml"),
        *changes,
        *parallel,
        f"optimizer.batch_size={BATCH // processes}",
        f"checkpoint.dir={folder}",
        "accelerator=cpu",
        "max_epochs=1",
        "knn_eval.enabled=false",
        "performance.disable_channel_last=true",  # whose statistics PyTorch sums in float32
        "++limit_train_batches=5",
        "++log_every_n_steps=1",
        "++enable_progress_bar=false",
    ]


def launch(*command):
    """Status and output of a Python command that starts the two processes."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "default"}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    done = subprocess.run([sys.executable, *command], env=env, cwd=ROOT, timeout=120, **streams)
    return done.returncode, done.stdout


def slurm(*command, stop=None, processes=2, target=None):
    """Statuses and outputs of the processes of a command, as srun starts them; `stop` = (rank, step, signal). target:
    in place of `one_process`.

    When the first has failed, the others are ended, as by srun --kill-on-bad-exit.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        job = {"MASTER_PORT": str(free.getsockname()[1]), "SLURM_NODELIST": "127.0.0.1", "SLURM_JOB_ID": "4711"}
    job |= {"SLURM_JOB_NAME": "solo-ext", "SLURM_STEP_ID": "0", "SLURM_NODEID": "0", "SLURM_NNODES": "1"}
    job |= {"SLURM_NTASKS": str(processes), "SLURM_NTASKS_PER_NODE": str(processes)}
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder, str(rank)) for rank in range(processes)]
        for log in logs:
            log.touch()  # the second may be ended before it has written
        ranks = [
            forks.Process(target=target or one_process, args=(rank, job, command, log, stop))
            for rank, log in enumerate(logs)
        ]
        for rank in ranks:
            rank.start()
        ranks[0].join(120)
        for rank in ranks[1:]:
            if ranks[0].exitcode not in (0, 143):
                rank.kill()
            rank.join(30)
        for rank in ranks:
            rank.kill()
        return [(rank.exitcode, log.read_text()) for rank, log in zip(ranks, logs, strict=True)]


def one_process(rank, job, command, log, stop):
    os.environ.update(job, SLURM_PROCID=str(rank), SLURM_LOCALID=str(rank))
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    torch.set_num_threads(1)
    start = ExactResume.on_train_batch_start

    def stopped(self, trainer, module, batch, i):
        start(self, trainer, module, batch, i)
        if stop and stop[:2] == (rank, trainer.global_step):
            os.kill(os.getpid(), stop[2])

    ExactResume.on_train_batch_start = stopped
    sys.exit(main(command))


def alone(folder, recipe, *more):
    yaml, *overrides = words(folder, 1, recipe)
    return pretrain(resolve(compose(YAMLS, Path(yaml).name, [*overrides, *more]))).dir


def state(folder):
    return load_checkpoint(find_checkpoint(folder))["state_dict"]


def rows(folder):
    with open(folder / "metrics.csv", newline="") as file:
        return [{k: float(v) for k, v in row.items() if v and k not in OWN} for row in csv.DictReader(file)]


def only_run(folder, method):
    """The run's folder; there is one, written once."""
    [run] = (folder / method).iterdir()
    names = ["args.json", "checkpoints.json", "environment.json", "metrics.csv", "result.json"]
    assert sorted(path.name for path in run.iterdir() if path.suffix != ".ckpt") == names
    assert 1 <= len(list(run.glob("*.ckpt"))) <= 2
    return run


def assert_same_run(two, one, rtol, atol):
    """All weights, teachers, running statistics and logged values; the learning rate that the batch gives."""
    rates = [json.loads((run / "args.json").read_text())["optimizer"]["effective_lr"] for run in (two, one)]
    assert rates[0] == rates[1] > 0
    actual, expected = state(two), state(one)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            actual[name], value, rtol=rtol, atol=atol, msg=lambda text, name=name: f"{name}: {text}"
        )
    assert len(rows(two)) == len(rows(one))
    for mine, theirs in zip(rows(two), rows(one), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4, abs=1e-5)


@pytest.fixture(scope="module")
def joint(tmp_path_factory):
    """The run of one process, in float32."""
    return alone(tmp_path_factory.mktemp("joint"), FLOAT32)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """The run of two, which Lightning starts, in float32."""
    folder = tmp_path_factory.mktemp("pair")
    code, output = launch("-m", "solo_ext", "pretrain", *words(folder, 2, FLOAT32))
    assert code == 0, output
    run = only_run(folder, FLOAT32[0])
    # nothing but where it goes, the choice of format, the result and what comes next, each once
    first, *rest = output.splitlines()
    assert f": 2 processes on the cpu, {run}; follow: solo-ext runs " in first
    assert [line.split(":")[0] for line in rest] == ["solo-ext", str(run), *["next"] * 3], output
    return run


@pytest.mark.slow
def test_lightning_starts_two_processes(pair, joint):
    assert_same_run(pair, joint, rtol=1e-5, atol=1e-5)
    initial = alone(pair.parent / "initial", FLOAT32, "optimizer.lr=1e-9", "optimizer.classifier_lr=1e-9")
    moved = {
        name: (value - state(initial)[name]).abs().max() for name, value in state(joint).items() if "weight" in name
    }
    assert max(moved.values()) > 1e-3


@pytest.mark.slow
def test_torchrun_starts_two_processes_float64(tmp_path, monkeypatch):
    """Also from a process that has trained on several devices itself."""
    monkeypatch.setenv("SOLO_EXT_START", '[["elsewhere", null], 1]')
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "solo_ext")
    code, output = launch(*torchrun, "pretrain", *words(tmp_path / "two", 2, FLOAT64))
    assert code == 0, output
    assert "destroy_process_group" not in output
    two = only_run(tmp_path / "two", FLOAT64[0])
    assert_same_run(two, alone(tmp_path / "one", FLOAT64), rtol=1e-9, atol=1e-9)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """The folder of the runs, after one of its two processes was told to stop."""
    folder = tmp_path_factory.mktemp("stopped")
    (code, output), (other, more) = slurm("pretrain", *words(folder, 2, FLOAT32), stop=(1, 1, signal.SIGTERM))
    assert (code, other) == (143, 0), output + more
    assert output.count("stopped by SIGTERM") == 1 and "SIGTERM" not in more
    [run] = (folder / FLOAT32[0]).iterdir()
    # told in step 1, agreed on after it, known after step 2
    assert [path.name.split("-ep=")[1] for path in run.glob("*.ckpt")] == ["0-step=3.ckpt"]
    return folder


def copied(folder, target):
    subprocess.run(["cp", "-r", folder, target], check=True)
    [run] = (target / FLOAT32[0]).iterdir()
    return run


@pytest.mark.slow
def test_two_processes_resume_exactly(stopped, pair, tmp_path):
    run = copied(stopped, tmp_path / "two")
    for code, output in slurm("pretrain", *words(tmp_path / "two", 2, FLOAT32)):
        assert code == 0, output
    assert only_run(tmp_path / "two", FLOAT32[0]) == run
    torch.testing.assert_close(state(run), state(pair), rtol=0, atol=0)


def test_one_process_resumes_what_two_began(stopped, joint, tmp_path):
    """With twice the batch: the images come in the same global order."""
    run = copied(stopped, tmp_path / "one")
    assert alone(tmp_path / "one", FLOAT32, f"resume_from_checkpoint={run}") == run
    torch.testing.assert_close(state(run), state(joint), rtol=1e-5, atol=1e-5)


def test_a_mistake_is_said_once(tmp_path):
    (code, output), (_, more) = slurm("pretrain", *words(tmp_path, 1, FLOAT32))  # for one device
    assert code == 2 and "started 2 processes, but devices=1 and num_nodes=1 need 1" in output
    assert len(output.splitlines()) == 2 and not more  # where the run would have gone, and why it does not
    assert not any(tmp_path.iterdir())


TORCHRUN = {"TORCHELASTIC_RUN_ID": "1", "RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
BATCH_STEP = {"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2", "SLURM_PROCID": "0", "SLURM_JOB_NAME": "solo-ext"}
SRUN = BATCH_STEP | {"SLURM_STEP_ID": "0"}


@pytest.mark.parametrize(
    "variables, expected",
    [
        ({}, None),
        (TORCHRUN, TorchElasticEnvironment),
        (SRUN, SLURMEnvironment),
        (SRUN | TORCHRUN, TorchElasticEnvironment),  # srun started torchrun
        (BATCH_STEP, LightningEnvironment),  # a job's script without srun: the other tasks do not run
    ],
)
def test_who_starts_the_processes(variables, expected, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    found = cluster_environment(TrainerConfig(devices=2))
    assert type(found) is (expected or type(None))
    assert not getattr(found, "auto_requeue", False)
    if expected in (TorchElasticEnvironment, SLURMEnvironment):
        with pytest.raises(ConfigError, match="started 2 processes, but devices=2 and num_nodes=4 need 8"):
            cluster_environment(TrainerConfig(devices=2, num_nodes=4))


def test_a_process_that_hangs_ends_the_run(tmp_path):
    command = ["pretrain", *words(tmp_path, 2, FLOAT64), "collective_timeout=0.25"]
    (code, output), _ = slurm(*command, stop=(1, 2, signal.SIGSTOP))
    assert code == 1, output
    assert "solo-ext: stopped: another process ended or let collective_timeout pass (" in output


@pytest.mark.parametrize(
    "said",
    [
        "[../third_party/gloo/gloo/transport/tcp/pair.cc:538] Connection closed by peer [127.0.0.1]:5121",
        "Application timeout caused pair closure",  # of the operation after the one that waited
    ],
)
def test_what_is_said_of_a_lost_process(said):
    with pytest.raises(FailedRun, match="another process ended or let collective_timeout pass"), explained():
        raise RuntimeError(said)


@pytest.mark.parametrize("script", sorted((ROOT / "scripts/slurm").glob("*.s*")), ids=lambda path: path.name)
def test_slurm_scripts_parse(script):
    subprocess.run(["bash", "-n", script], check=True)


@pytest.mark.parametrize(
    ("script", "words", "said"),
    [
        (
            "evaluate",
            "linear cifar10/byol --run R a=1",
            "linear cifar10/byol data.num_workers=4 * devices=2 num_nodes=1 --run R a=1",
        ),
        ("evaluate", "finetune --run R", "finetune data.num_workers=4 * devices=2 num_nodes=1 --run R"),
        ("evaluate", "knn --run R --k 5", "knn data.num_workers=4 --run R --k 5"),
        ("study", "residual/table2 seeds=[0,1]", "study residual/table2 --array data.num_workers=4 seeds=[0,1]"),
    ],
)
def test_what_slurm_runs(script, words, said, tmp_path):
    """With `srun` and `solo-ext` that say what they are given."""
    for name, text in {"srun": 'shift\nexec "$@"', "solo-ext": 'echo "$@"'}.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "scripts").symlink_to(ROOT / "scripts")  # a folder without a .venv, whose solo-ext would come first
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_CPUS_PER_TASK": "4"}
    env |= {"SLURM_NTASKS_PER_NODE": "2", "SLURM_NNODES": "1", "SLURM_STEP_ID": "0"}
    command = ["bash", ROOT / f"scripts/slurm/{script}.sbatch", *words.split()]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    common = "strategy=ddp sync_batchnorm=true checkpoint.enabled=true auto_resume.enabled=true"
    assert done.stdout.strip() == said.replace("*", common)


def start_another(pipe):
    starter = os.getpid()
    if not os.fork():
        die_with(starter)
        pipe.send("started")
    time.sleep(60)


def test_a_process_ends_with_the_one_that_started_it():
    ours, theirs = forks.Pipe()
    starter = forks.Process(target=start_another, args=(theirs,))
    starter.start()
    theirs.close()
    assert ours.recv() == "started"
    starter.kill()
    assert ours.poll(10)
    with pytest.raises(EOFError):  # nobody holds the other end any more
        ours.recv()


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["lightning", "torchrun"])
def test_two_ranks_share_one_run(tmp_path, launcher):
    script = tmp_path / "main.py"
    script.write_text(
        f"import sys; sys.path[:0] = [{str(Path(__file__).parents[1])!r}]\n"
        "from tiny_runs import config, pretrain\n"
        "two = dict(devices=2, strategy='ddp', optimizer__batch_size=8)\n"
        f"first = pretrain(config({str(tmp_path / 'runs')!r}, max_epochs=1, **two))\n"
        "again = {'max_epochs': 2, 'resume_from_checkpoint': str(first.dir)}\n"
        f"assert pretrain(config({str(tmp_path / 'runs')!r}, **again, **two)).dir == first.dir\n"
    )
    torchrun = [
        "-m",
        "torch.distributed.run",
        "--nproc-per-node=2",
        f"--master-port={29500 + os.getpid() % 1000}",
    ]
    command = [sys.executable, *(torchrun if launcher == "torchrun" else []), str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    [folder] = (tmp_path / "runs" / "byol").iterdir()
    assert tiny_runs.rows(folder)[-1]["step"] == "5" and len(list(folder.glob("*.ckpt"))) == 2


@pytest.mark.parametrize("processes", [2, 3])
def test_a_validation_of_an_uneven_number_of_images_is_that_of_one_process(tmp_path, processes):
    """101 test images, whose shares differ by one."""
    file = find("fashion_mnist_mini/byol", "linear")
    words = [str(file), "untrained=true", "backbone.name=resnet10_w16", "data.val_fraction=0.0202", "max_epochs=1"]
    words += ["accelerator=cpu", "precision=64-true", "optimizer.lr=1e-9", "enable_progress_bar=false"]
    figures = []
    for devices in (1, processes):
        folder = tmp_path / str(devices)
        code, output = launch("-m", "solo_ext", "linear", *words, f"devices={devices}", f"checkpoint.dir={folder}")
        assert code == 0, output
        [result] = folder.rglob("result.json")
        metrics = json.loads(result.read_text())["metrics"]
        figures.append([round(metrics[name], 3) for name in ("val_acc1", "val_acc5", "val_loss")])
    assert figures[0] == figures[1] and figures[0][0] > 0


@pytest.mark.slow
def test_an_online_knn_of_two_processes_is_that_of_one(tmp_path):
    """On 3,999 and 1,001 images, whose shares differ by one."""
    more = ["data.val_fraction=0.2002", "knn_eval.enabled=true", "optimizer.lr=1e-9", "++limit_train_batches=1"]
    changes = ["knn_eval.enabled=false", "++limit_train_batches=5"]
    code, output = launch(
        "-m", "solo_ext", "pretrain", *[w for w in words(tmp_path, 2, FLOAT64) if w not in changes], *more
    )
    assert code == 0, output
    one = alone(tmp_path / "one", FLOAT64, *more)
    [two] = (tmp_path / "byol").iterdir()
    scores = [{name: row[name] for row in rows(run) for name in row if "knn" in name} for run in (one, two)]
    assert scores[0].keys() == {"val_knn1", "val_knn20"} and scores[0] == pytest.approx(scores[1], abs=1e-3)


@pytest.mark.slow
def test_a_step_joins_the_ranks_for_its_loss_alone(tmp_path):
    """Besides DDP's gradients, a flag for signals and, on CPUs, one for bad numbers: no barrier, no buffers. A queue is
    alike on all ranks, and BatchNorm reads no statistics while it trains."""
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    out = tmp_path / "collectives.md"
    code, output = launch(*torchrun, "benchmarks/collectives.py", "--batch", "8", "--out", str(out))
    assert code == 0, output
    methods = json.loads(out.with_suffix(".json").read_text())["methods"]
    assert {*SPECS} < {*methods}
    for name, row in methods.items():
        assert row["loss"] == row["needed"] and row["gradients"] and not row["beyond"], name
