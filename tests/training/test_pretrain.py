"""Pre-training with a method, data and callbacks of one's own, and what a user can get wrong."""

import json
import platform
import resource
import subprocess
import sys

import lightning.pytorch as pl
import pytest
import torch
from conftest import random_batches, tiny_config
from tiny_runs import config

from solo_ext.errors import ConfigError, SoloExtError
from solo_ext.methods import METHODS
from solo_ext.methods.mocov3 import MoCoV3
from solo_ext.runs.comparison import differences
from solo_ext.runs.encoder import load_encoder
from solo_ext.training import trainer
from solo_ext.training.pretrain import pretrain


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"optimizer__batch_size": 51}, "optimizer.batch_size"),
        ({"backbone__kwargs": {"nonsense": 1}}, "backbone.kwargs"),
        ({"data__dataset": "custom", "data__train_path": "nowhere"}, "data.train_path"),
        ({"resume_from_checkpoint": "nowhere"}, "nowhere does not exist"),
        ({"val_check_interval": 1000}, "val_check_interval"),
        ({"limit_train_batches": 0}, "no step to train"),
        ({"profiler": "nonsense"}, "profiler"),
    ],
)
def test_a_mistake_is_one_sentence_and_leaves_nothing_behind(tmp_path, changes, message):
    folder = tmp_path / "runs"
    with pytest.raises(SoloExtError, match=message) as error:
        pretrain(config(folder, **changes))
    assert "\n" not in str(error.value) and not folder.exists()


def test_an_unwritable_folder_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"checkpoint.dir"):
        pretrain(config(tmp_path / "file"))


class Counter(pl.Callback):
    steps = 0

    def on_train_batch_end(self, *args):
        self.steps += 1


class MyBYOL(METHODS["byol"]):
    pass


class Views(pl.LightningDataModule):
    """Two batches of random views."""

    def train_dataloader(self):
        return torch.utils.data.DataLoader(random_batches(2, size=12), batch_size=None, collate_fn=lambda batch: batch)


@pytest.mark.parametrize(
    "method, name",
    [
        ("projector_ema_byol", "projector_ema_byol"),
        (METHODS["res_byol"], "res_byol"),
        (MyBYOL, "MyBYOL"),
        (MyBYOL(tiny_config("byol")), "MyBYOL"),
    ],
    ids=["name", "class", "own class", "built"],
)
def test_a_method_data_and_callbacks_of_the_callers_own(tmp_path, capsys, method, name):
    cfg, counter = config(tmp_path, max_epochs=1), Counter()
    run = pretrain(cfg, method=method, data=Views(), callbacks=[counter])
    assert counter.steps == 2 and run.dir.parent == tmp_path / name
    assert json.loads((run.dir / "args.json").read_text())["method"] == name and cfg.method == "byol"
    assert json.loads((run.dir / "environment.json").read_text())["data"] == "Views"
    assert capsys.readouterr().out.splitlines()[0].startswith(f"tiny: cpu, {run.dir}; ")


def test_a_name_that_is_no_method_is_refused_before_anything_else(tmp_path, capsys):
    with pytest.raises(ConfigError, match="there is no method 'byoll'; did you mean 'byol'"):
        pretrain(config(tmp_path), method="byoll")
    assert not capsys.readouterr().out and not any(tmp_path.iterdir())


class Start(pl.Callback):
    def on_train_start(self, trainer, module):
        self.weights = torch.nn.utils.parameters_to_vector(module.parameters()).detach().clone()


def test_the_seed_decides_the_initial_weights(tmp_path):
    def weights(seed, name):
        torch.rand(3)  # which the caller's own random numbers do not
        pretrain(config(tmp_path / name, seed=seed, max_epochs=1, limit_train_batches=1), callbacks=[start := Start()])
        return start.weights

    first, again, other = weights(5, "first"), weights(5, "again"), weights(6, "other")
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_a_run_begins_in_train_mode(tmp_path):
    """After the check of the sizes, which is made in eval mode: else its norms would never see a batch."""

    class Modes(pl.Callback):
        def on_train_start(self, trainer, module):
            self.evaluating = [name for name, part in module.named_modules() if not part.training]

    pretrain(config(tmp_path, max_epochs=1), callbacks=[modes := Modes()])
    assert modes.evaluating == []


FAULTS = """if True:
    import itertools, resource, statistics, sys
    import torch
    from solo_ext.training.trainer import keep_freed_memory
    if sys.argv[1:]:
        keep_freed_memory()
    faults = []
    for i in range(21):
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
        torch.ones(2**24).mul(2)
    # a heap that grows once more does not count
    print(10 * statistics.median(b - a for a, b in itertools.pairwise(faults[10:])))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc")
def test_a_training_on_cpus_keeps_its_memory(tmp_path, monkeypatch):
    """By the pages that the kernel hands out for tensors of 64 MiB which come and go."""
    without, kept = (float(subprocess.check_output([sys.executable, "-c", FAULTS, *words])) for words in ([], ["keep"]))
    assert without > 10 * 2 * 2**26 / resource.getpagesize() / 2 and kept < without / 50
    calls: list[int] = []
    monkeypatch.setattr(trainer, "keep_freed_memory", lambda: calls.append(1))
    pretrain(config(tmp_path, max_epochs=1, limit_train_batches=1))
    assert calls == [1]


class MyMoCo(MoCoV3):
    """Of a module that whoever reads the run does not have."""


@pytest.mark.parametrize("method", [MyMoCo, "mocov3"])
def test_the_heads_that_a_methods_vit_has_are_recorded(tmp_path, method):
    vit = {"img_size": 12, "patch_size": 6, "depth": 1}
    kwargs = MoCoV3.Kwargs(proj_hidden_dim=8, pred_hidden_dim=8)
    cfg = config(tmp_path, backbone__name="vit_tiny", backbone__kwargs=vit, max_epochs=1, limit_train_batches=1)
    cfg.method_kwargs = kwargs
    run = pretrain(cfg, method=method).dir
    args = json.loads((run / "args.json").read_text())
    (run / "args.json").write_text(json.dumps(args | {"method": "of_somebody_else"}))
    assert load_encoder(run)[0].blocks[0].attn.num_heads == 12


@pytest.mark.parametrize(
    ("method", "at", "place"),
    [
        ("byol", "auto", "projector"),
        ("byol", "predictor", "predictor"),
        ("res_byol", "auto", "predictor"),
        ("simclr", "predictor", "projector"),
    ],
)
def test_where_the_gap_is_measured_is_recorded(tmp_path, method, at, place):
    short = {"max_epochs": 1, "limit_train_batches": 1, "gap__at": at, "momentum__stages": "full"}
    cfg = config(tmp_path, **short)
    cfg.method_kwargs = METHODS.declared[method].Kwargs(proj_hidden_dim=8, proj_output_dim=4)
    cfg.intra = METHODS.declared[method].intra
    run = pretrain(cfg, method=method)
    assert json.loads((run.dir / "args.json").read_text())["gap"] == {
        "enabled": True,
        "at": at,
        "every": 10,
        "place": place,
    }
    cfg.method = method
    assert not differences(json.loads((run.dir / "args.json").read_text()), cfg)  # and the run may be continued
