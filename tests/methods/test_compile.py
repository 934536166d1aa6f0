"""`compile`: the same training through torch.compile, whatever the teacher holds and reads."""

import shutil

import lightning.pytorch as pl
import pytest
import torch
from conftest import build, fit, random_batches
from tiny_runs import config

from solo_ext.errors import ConfigError
from solo_ext.training.pretrain import pretrain


def both(method, batches, backend, **changes):
    """(loss, state) of the plain and of the compiled training."""
    torch.compiler.reset()
    results = []
    for compiled in (False, True):
        module = build(method, momentum__base_tau=0.5, **changes)
        if compiled:
            module.compile_networks(backend=backend)
        trainer = fit(module, batches)
        results.append((float(trainer.callback_metrics["train_loss"]), module.state_dict()))
    return results


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("dino", {"data__num_small_crops": 1}),
        ("projector_ema_byol", {}),
        ("byol", {"momentum__stages": ["block4", "projector"]}),
        ("res_mocov3", {"intra__target": "projector.fc1"}),
    ],
)
def test_a_compiled_training_is_that_of_the_plain_network(method, changes):
    batches = random_batches(2)
    if "data__num_small_crops" in changes:
        batches = [(i, [*views, views[0][..., :8, :8]], targets) for i, views, targets in batches]
    plain, compiled = both(method, batches, "aot_eager", **changes)
    torch.testing.assert_close(compiled, plain, rtol=1e-4, atol=1e-6)  # with the same names in its state


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a compiler")
def test_the_usual_compiler_trains_the_same():
    plain, compiled = both("simsiam", random_batches(2), "inductor")
    torch.testing.assert_close(compiled, plain, rtol=1e-3, atol=1e-5)


def test_what_cannot_be_compiled_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"compile must be false with gradients\.enabled"):
        pretrain(config(tmp_path, compile=True, gradients__enabled=True))
    with pytest.raises(ConfigError, match="compile must be false for a module"):
        pretrain(config(tmp_path, compile=True), method=pl.LightningModule())
    assert not any(tmp_path.iterdir())
