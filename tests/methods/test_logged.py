"""Every number that a pre-training logs, against the same number made by hand from its networks."""

import math

import formulas
import lightning.pytorch as pl
import pytest
import torch
from conftest import build, fit, random_batches
from torch import nn

WATCHED = {"momentum__classifier": True, "gap__every": 2, "optimizer__lr": 0.3}


def half_taught(method="byol", **changes):
    """A method whose teacher, of other weights than its student, differs in every output, and whose probes do too."""
    model = build(method, **{**WATCHED, **changes})
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.startswith("momentum_") or "classifier" in name:
                p.add_(0.3 * torch.randn(p.shape, generator=generator))
    return model


def logged(model, batch):
    """What one training step logs, by name."""
    values = {}
    model.log_dict = lambda metrics, **how: values.update(metrics)
    model.training_step(batch, 0)
    return {name: value.item() for name, value in values.items()}


def outputs(model, x, prefix="", upto="projector"):
    """A branch's backbone features and its output at `upto`, in float64."""
    with torch.no_grad():
        features = h = getattr(model, f"{prefix}backbone")(x)
        for part in ("projector", "predictor")[: 1 + (upto == "predictor")]:
            h = getattr(model, prefix + part)(h)
    return features.double(), h.double()


def top(scores, labels, k):
    ranks = [(row > row[label]).sum() for row, label in zip(scores, labels, strict=True)]
    return 100 * sum(bool(rank < k) for rank in ranks) / len(ranks)


@pytest.mark.parametrize("at", ["projector", "predictor"])
def test_the_gap_is_of_the_same_view_at_the_named_part(at):
    model = half_taught(gap__at=at)
    _, views, _ = batch = random_batches(1)[0]
    ours = [outputs(model, x, upto=at) for x in views]
    theirs = [outputs(model, x, "momentum_", at) for x in views]
    row = logged(model, batch)
    for i, name in enumerate(["gap_sim_feats", "gap_sim"]):
        per_view = [-float(formulas.negative_cosine(s[i], t[i])) for s, t in zip(ours, theirs, strict=True)]
        assert abs(per_view[0] - per_view[1]) > 1e-4, "or the views could not be told apart"
        assert row[name] == pytest.approx(sum(per_view) / 2, rel=1e-5)
    assert abs(row["gap_sim"] - row["gap_sim_feats"]) > 1e-3


def test_the_gap_of_ressl_is_of_the_weak_view_with_the_term_and_without():
    """The only one that the baseline's teacher sees (residual momentum, Fig. 11)."""
    _, views, _ = batch = random_batches(1)[0]
    rows = {}
    for method in ("ressl", "res_ressl"):
        model = half_taught(method, momentum__classifier=False)
        weak = views[model.target_views[0]]
        ours, theirs = (outputs(model, weak, prefix)[1] for prefix in ("", "momentum_"))
        rows[method] = logged(model, batch)["gap_sim"]
        assert rows[method] == pytest.approx(-float(formulas.negative_cosine(ours, theirs)), rel=1e-5)
    assert rows["ressl"] == pytest.approx(rows["res_ressl"], rel=1e-5)


def test_the_gap_is_read_every_so_many_steps():
    model, seen = half_taught(), []
    model.log_dict = lambda metrics, **how: seen.append("gap_sim" in metrics)
    per_step = []
    for number in range(5):
        seen.clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(model), "global_step", number)
            model.training_step(random_batches(1)[0], 0)
        per_step.append(any(seen))
    assert per_step == [True, False, True, False, True]


def test_the_intra_term_is_on_and_off_by_turns():
    """Off, it decides neither the loss nor which views the networks run."""
    model = build("ressl", intra__weight=2.0, intra__every=2, gap__enabled=False)
    batch, names, views = random_batches(1)[0], [], []
    for number in range(5):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(model), "global_step", number)
            passes = model.look(batch).passes
            views.append((passes.learning, passes.teacher))
            names.append("train_intra_loss" in logged(model, batch))
    assert names == [True, True, False, False, True]
    assert views == [((0, 1), (0, 1)) if on else ((0,), (1,)) for on in names]


def test_the_spread_is_of_unit_outputs_over_the_batch_of_each_large_view():
    model = build("byol", data__num_large_crops=2, data__num_small_crops=1)
    _, views, _ = batch = random_batches(1, views=3)[0]
    spreads = []
    for x in views[:2]:
        unit = torch.stack([torch.stack(formulas.unit(row)) for row in outputs(model, x)[1]])
        spreads.append(((unit - unit.mean(0)) ** 2).sum(0).div(len(unit) - 1).sqrt().mean())
    assert logged(model, batch)["train_z_std"] == pytest.approx(float(sum(spreads) / 2), rel=1e-5)


def test_each_probe_is_judged_by_its_own_branch_and_by_both_large_views():
    model = half_taught(data__num_small_crops=1)
    _, views, labels = batch = random_batches(1, views=3)[0]
    row = logged(model, batch)
    for prefix, probe in (("", model.classifier), ("momentum_", model.momentum_classifier)):
        with torch.no_grad():
            scores = [probe(outputs(model, x, prefix)[0].float()).double() for x in views[:2]]
        for k in (1, 5):
            expected = sum(top(x, labels, k) for x in scores) / 2
            assert row[f"train_{prefix}acc{k}"] == pytest.approx(expected)
        losses = [
            formulas.mean(-torch.log(formulas.probabilities(x)[y]) for x, y in zip(s, labels, strict=True))
            for s in scores
        ]
        assert row[f"train_{prefix}class_loss"] == pytest.approx(float(sum(losses) / 2), rel=1e-5)


class Distance(pl.Callback):
    """||student - teacher|| / ||student|| at the end of an epoch, over the parameters of a stage."""

    def on_train_epoch_end(self, trainer, module):
        ours, theirs = (module.get_submodule(f"{prefix}backbone.layer4").parameters() for prefix in ("", "momentum_"))
        differences, sizes = 0.0, 0.0
        for a, b in zip(ours, theirs, strict=True):
            differences += ((a.double() - b.double()) ** 2).sum().item()
            sizes += (a.double() ** 2).sum().item()
        self.of_block4 = (differences / sizes) ** 0.5


def test_the_metrics_of_an_epoch():
    """Mean over batches of unequal size in validation; the tau and the weights of the last update."""
    model = half_taught(momentum__base_tau=0.5)
    val = [(torch.arange(n), [torch.randn(n, 3, 16, 16)], torch.arange(n) % 10) for n in (8, 3)]
    trainer = fit(model, random_batches(3), callbacks=[distance := Distance()], val=val)
    row = {name: float(value) for name, value in trainer.callback_metrics.items()}
    model.eval()
    images, labels = torch.cat([b[1][0] for b in val]), torch.cat([b[2] for b in val])
    for prefix, name, probe in (
        ("", "val_", model.classifier),
        ("momentum_", "momentum_val_", model.momentum_classifier),
    ):
        with torch.no_grad():
            scores = probe(outputs(model, images, prefix)[0].float()).double()
        assert row[f"{name}acc1"] == pytest.approx(top(scores, labels, 1), abs=1e-4)
        assert row[f"{name}acc5"] == pytest.approx(top(scores, labels, 5), abs=1e-4)
        assert row[f"{name}loss"] == pytest.approx(float(nn.functional.cross_entropy(scores, labels)), rel=1e-4)
    assert row["tau"] == pytest.approx(1 - 0.5 * (1 + math.cos(math.pi * 2 / 3)) / 2, rel=1e-6), (
        "of the last update, of 3"
    )
    assert row["weight_distance/block4"] == pytest.approx(distance.of_block4, rel=1e-4)


@pytest.mark.parametrize(
    ("effective", "lr", "probe_lr"),
    [({}, 0.06, 0.9), ({"optimizer__effective_lr": 0.7, "optimizer__effective_classifier_lr": 0.4}, 0.7, 0.4)],
    ids=["scaled by the accumulated batches", "as the run has resolved them"],
)
def test_the_rates_and_weight_decays_of_the_groups(effective, lr, probe_lr):
    """Also how the schedule starts and ends, which grows with accumulation too; the probes have no weight decay."""
    model = half_taught(
        **{"optimizer__lr": 0.02, "optimizer__classifier_lr": 0.3, "optimizer__weight_decay": 0.5},
        **{"accumulate_grad_batches": 3, "scheduler__min_lr": 0.001, "scheduler__warmup_start_lr": 0.002},
        **effective,
    )
    seen = []

    class Rates(pl.Callback):
        def on_train_batch_start(self, trainer, module, batch, i):
            groups = trainer.optimizers[0].param_groups
            seen.append({group["name"]: (group["lr"], group["initial_lr"], group["weight_decay"]) for group in groups})

        def on_train_end(self, trainer, module):
            self.last = [group["lr"] for group in trainer.optimizers[0].param_groups]

    fit(model, random_batches(6), max_epochs=3, callbacks=[rates := Rates()], accumulate_grad_batches=3)
    probes = {"classifier", "momentum_classifier"}
    assert seen[0].keys() == {"backbone", "projector", "predictor", *probes}
    for name, (first, base, decay) in seen[0].items():
        assert base == pytest.approx(probe_lr if name in probes else lr), name
        assert decay == (0 if name in probes else 0.5), name
        assert first == pytest.approx(0.006), "the warm-up starts everywhere at the same"
    assert rates.last == pytest.approx([0.003] * 5)
