"""Recipes that collapse are told within three epochs, and honest ones never are."""

import itertools

import pytest
from conftest import ROOT
from trials import trials

from solo_ext.errors import CollapseError
from solo_ext.training.compose import compose
from solo_ext.training.config import resolve
from solo_ext.training.pretrain import pretrain

DEMO = ROOT / "scripts" / "pretrain" / "fashion_mnist_mini"
SCOPES = [
    ["momentum.stages=backbone"],
    ["momentum.stages=backbone", "momentum.schedule=constant"],
    ["momentum.stages=none"],
]
COLLAPSING = [
    *itertools.product(("dino", "mocov2plus", "ressl"), SCOPES),
    ("dino", ["momentum.stages=backbone", "intra.weight=1"]),
]
FRAMEWORKS = ["byol", "dino", "mocov2plus", "mocov3", "ressl", "simclr", "simsiam"]
VARIANTS = [
    *((framework, [f"method=projector_ema_{framework}", "momentum.stages=projector"]) for framework in FRAMEWORKS[:5]),
    *((framework, [f"method=res_{framework}", "intra.weight=1"]) for framework in ("byol", "mocov3")),
]
HONEST = [*((f, [f"seed={seed}"]) for f in FRAMEWORKS for seed in (1, 2)), *VARIANTS]


def run(folder, framework, overrides, **options):
    short = ["max_epochs=3", "scheduler.warmup_epochs=1", "data.num_workers=0", "knn_eval.enabled=false"]
    quiet = [f"checkpoint.dir={folder}", "checkpoint.enabled=false", "enable_progress_bar=false", "accelerator=cpu"]
    return pretrain(resolve(compose(DEMO, framework, [*short, *quiet, *overrides])), **options)


@pytest.mark.parametrize("framework, overrides", trials(COLLAPSING))
def test_a_collapse_is_told_within_three_epochs(tmp_path, framework, overrides):
    with pytest.raises(CollapseError, match=r"^the outputs have collapsed by the end of epoch [012]: "):
        run(tmp_path, framework, [*overrides, "collapse=stop"])


@pytest.mark.parametrize("framework, overrides", trials(HONEST))
def test_an_honest_run_is_not_called_collapsed(tmp_path, framework, overrides):
    run(tmp_path, framework, [*overrides, "collapse=stop"])
