"""kNN against scikit-learn, a loop and solo-learn; the frozen backbone; probes that leave training alone."""

import contextlib
import math
import resource
import signal
import sys

import lightning.pytorch as pl
import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import fit, random_batches
from memory import memory_of_evaluations
from sklearn.datasets import make_classification
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from timm.data.mixup import Mixup
from timm.optim import param_groups_layer_decay
from tiny_runs import forks
from torch import nn

from solo_ext.errors import ConfigError, DataError, SoloExtError
from solo_ext.evaluation.features import extract_features
from solo_ext.evaluation.finetune import LinearOptions, backbone_groups
from solo_ext.evaluation.knn import KNNConfig, knn_accuracy
from solo_ext.evaluation.linear import LinearModel, accuracy_at_k, fit_cached_linear
from solo_ext.networks.backbones import MOCO_VITS
from solo_ext.optim import OptimizerConfig, SchedulerConfig
from solo_ext.training.callbacks.knn import OnlineKNN


class Backbone(nn.Sequential):
    """All that behaves differently in train mode: BatchNorm and dropout."""

    num_features = 6

    def __init__(self):
        super().__init__(nn.Conv2d(3, 6, 3, stride=2), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.5))
        self.append(nn.AdaptiveAvgPool2d(1)).append(nn.Flatten())

    def group_matcher(self, coarse: bool) -> dict:
        """timm's way of naming layers."""
        return {"stem": r"^0", "blocks": r"^(\d)"}


# Accuracy.


@pytest.mark.parametrize("classes", [3, 5, 12])
def test_accuracy_at_k_against_a_loop(classes):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(40, classes, generator=generator)
    targets = torch.randint(-1, classes, (40,), generator=generator)
    for k, value in zip((1, 2, 5), accuracy_at_k(logits, targets, (1, 2, 5)), strict=True):
        labelled = [i for i in range(40) if targets[i] != -1]
        hits = [sum(logits[i] > logits[i, targets[i]]) < k for i in labelled]
        assert value.shape == ()
        assert value.item() == pytest.approx(100 * sum(hits) / len(labelled))


def test_accuracy_without_labels_is_zero():
    assert [a.item() for a in accuracy_at_k(torch.randn(4, 3), torch.full((4,), -1))] == [0, 0]


# Features.


@pytest.mark.parametrize(
    "precision, kept", [("32", "float32"), ("32-true", "file"), ("bf16-mixed", "float32"), ("32", "float16")]
)
def test_extract_features(precision, kept):
    backbone = Backbone().train()
    backbone[1].eval()
    batches = random_batches(3, views=1)
    modes = [m.training for m in backbone.modules()]
    buffers = {k: v.clone() for k, v in backbone.state_dict().items()}
    state = torch.get_rng_state()
    loader = torch.utils.data.DataLoader(batches, batch_size=None)
    features, labels = extract_features(backbone, loader, "cpu", precision, kept=kept)
    assert [m.training for m in backbone.modules()] == modes
    assert all(torch.equal(v, buffers[k]) for k, v in backbone.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(labels, torch.cat([targets for *_, targets in batches]))
    expected = torch.cat([backbone.eval()(view) for _, [view], _ in batches]).detach()
    assert features.dtype == getattr(torch, kept, torch.float32) and not features.requires_grad
    tolerance = 2e-2 if "16" in precision else 1e-3 if kept == "float16" else 1e-6
    torch.testing.assert_close(features.float(), expected, rtol=tolerance, atol=tolerance)


def test_extract_features_of_a_backbone_in_double_precision():
    batches, backbone = random_batches(2, views=1), Backbone().double().eval()
    expected = torch.cat([backbone(view.double()) for _, [view], _ in batches]).float()
    features, _ = extract_features(backbone, torch.utils.data.DataLoader(batches, batch_size=None), "cpu", "64-true")
    torch.testing.assert_close(features, expected.detach(), rtol=0, atol=0)


def test_extract_features_refuses():
    with pytest.raises(DataError):
        extract_features(Backbone(), [])
    broken = Backbone()
    nn.init.constant_(broken[0].weight, math.nan)
    with pytest.raises(SoloExtError, match="not finite"):
        extract_features(broken, random_batches(1, views=1))
    with pytest.raises(DataError, match=r"temporary file \(TMPDIR\): File too large"), small_files():
        extract_features(Backbone(), random_batches(3, views=1), kept="file")


@contextlib.contextmanager
def small_files():
    """Where a file of 100 bytes is as large as one can be."""
    limits, action = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, action)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="others count memory otherwise")
def test_the_memory_of_features_is_little_more_than_their_size():
    ours, theirs = forks.Pipe()
    forks.Process(target=memory_of_evaluations, args=(theirs,)).start()
    theirs.close()  # so that an error there is an end here
    half, whole, linear = ours.recv()
    assert 0.4 < half < 0.6 and 0.9 < whole <= linear < 1.2, (half, whole, linear)
    assert ours.recv() and ours.recv() == "refused"


# kNN.


def neighbours_problem(classes=7):
    x, y = make_classification(
        500, 10, n_informative=8, n_classes=classes, n_clusters_per_class=1, class_sep=0.7, random_state=0
    )
    x, y = torch.tensor(x, dtype=torch.float32), torch.tensor(y)
    return x[:300], y[:300], x[300:], y[300:]


def knn_by_hand(bank, bank_labels, query, labels, k, weight):
    top1 = top5 = 0
    for q, label in zip(query, labels, strict=True):
        distances = np.array([weight(q, b) for b in bank])
        votes = {}
        for i in np.argsort(-distances, kind="stable")[:k]:
            votes[int(bank_labels[i])] = votes.get(int(bank_labels[i]), 0.0) + distances[i]
        ranked = sorted(set(range(7)), key=lambda c: (-votes.get(c, 0.0), c))
        top1 += ranked[0] == int(label)
        top5 += int(label) in ranked[: min(5, k)]
    return {"acc1": 100 * top1 / len(labels), "acc5": 100 * top5 / len(labels)}


WEIGHTS = {
    "cosine": lambda q, b: math.exp(float(F.cosine_similarity(q, b, dim=0)) / 0.07),
    "euclidean": lambda q, b: 1 / (math.dist(q.tolist(), b.tolist()) + 1e-5),
}


@pytest.mark.parametrize("distance", ["cosine", "euclidean"])
def test_knn_against_a_loop(distance):
    bank, bank_labels, query, labels = neighbours_problem()
    bank, bank_labels, query, labels = bank[:60], bank_labels[:60], query[:30], labels[:30]
    found = knn_accuracy(bank, bank_labels, query, labels, [1, 4, 20], distance)
    for k in (1, 4, 20):
        assert found[k] == knn_by_hand(bank, bank_labels, query, labels, k, WEIGHTS[distance])


@pytest.mark.parametrize("k", [1, 5, 20, 1000])
@pytest.mark.parametrize(
    ("distance", "weights"),
    [("cosine", lambda d: np.exp((1 - d) / 0.1)), ("euclidean", lambda d: 1 / (d + 1e-5))],
)
def test_knn_against_scikit_learn(monkeypatch, distance, weights, k):
    bank, bank_labels, query, labels = neighbours_problem()
    monkeypatch.setattr("solo_ext.evaluation.knn.ROWS", 7)  # several blocks, the last ones shorter
    monkeypatch.setattr("solo_ext.evaluation.knn.COLUMNS", 11)
    found = knn_accuracy(bank, bank_labels, query, labels, k, distance, temperature=0.1)[k]
    reference = KNeighborsClassifier(min(k, len(bank)), weights=weights, metric=distance).fit(bank, bank_labels)
    assert found["acc1"] == pytest.approx(100 * reference.score(query, labels))
    ranked = np.argsort(-reference.predict_proba(query), axis=1, kind="stable")[:, : min(5, k)]
    assert found["acc5"] == pytest.approx(100 * (ranked == labels.numpy()[:, None]).any(1).mean())


@pytest.mark.parametrize("distance", ["cosine", "euclidean"])
def test_knn_against_solo_learn(solo_learn, monkeypatch, distance):
    from solo.utils.knn import WeightedKNNClassifier
    from torchmetrics import Metric

    init = Metric.__init__  # torchmetrics has dropped an argument that solo-learn passes
    monkeypatch.setattr(Metric, "__init__", lambda self, compute_on_step=None, **kwargs: init(self, **kwargs))
    bank, bank_labels, query, labels = neighbours_problem()
    for k in (1, 20):
        theirs = WeightedKNNClassifier(k=k, distance_fx=distance)
        theirs.update(bank, bank_labels, query, labels)
        found = knn_accuracy(bank, bank_labels, query, labels, k, distance)[k]
        assert (found["acc1"], found["acc5"]) == pytest.approx(theirs.compute())


@pytest.mark.parametrize("distance", ["cosine", "euclidean"])
def test_knn_leaves_out_what_has_no_label(distance):
    bank, bank_labels, query, labels = neighbours_problem()
    expected = knn_accuracy(bank[100:], bank_labels[100:], query[50:], labels[50:], [1, 20, 1000], distance)
    bank_labels[:100], labels[:50] = -1, -1
    assert knn_accuracy(bank, bank_labels, query, labels, [1, 20, 1000], distance) == expected


@pytest.mark.parametrize("distance", ["cosine", "euclidean"])
def test_knn_of_halved_features_is_that_of_their_values(distance):
    bank, bank_labels, query, labels = neighbours_problem()
    whole = knn_accuracy(bank.half().float(), bank_labels, query.half().float(), labels, [1, 20], distance)
    assert knn_accuracy(bank.half(), bank_labels, query.half(), labels, [1, 20], distance) == whole


def test_knn_at_a_low_temperature_is_the_nearest_neighbour():
    problem = neighbours_problem()
    found = knn_accuracy(*problem, [1, 50], "cosine", temperature=1e-4)
    assert found[50]["acc1"] == pytest.approx(found[1]["acc1"])


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"distance": "euclidian"}, ConfigError),
        ({"k": 0}, ConfigError),
        ({"temperature": math.nan}, ConfigError),
        ({"bank_labels": torch.full((300,), -1)}, DataError),
        ({"labels": torch.full((200,), -1)}, DataError),
    ],
)
def test_knn_refuses(change, error):
    problem = dict(zip(("bank", "bank_labels", "query", "labels"), neighbours_problem(), strict=True))
    with pytest.raises(error):
        knn_accuracy(**{**problem, **change})


@pytest.mark.parametrize("change", [{"k": 0}, {"distance_func": "euclid"}, {"every": 0}])
def test_knn_config_refuses(change):
    with pytest.raises(ConfigError, match=f"knn_eval.{next(iter(change))}"):
        KNNConfig(**change)


def test_a_class_that_the_bank_lacks_is_never_found():
    bank, labels = torch.eye(4), torch.tensor([0, 1, 2, 0])
    assert knn_accuracy(bank, labels, bank, torch.tensor([0, 1, 7, 0]), 1) == {1: {"acc1": 75.0, "acc5": 75.0}}


# Linear.


def linear_model(finetune=False, label_smoothing=0.0, mixup=0.0, cutmix=0.0, **optimizer):
    """On a tiny backbone of ten classes; `optimizer`: changes of that section."""
    values = {"name": "sgd", "batch_size": 8, "lr": 0.1, "weight_decay": 0, **optimizer}
    options = LinearOptions(finetune, label_smoothing, mixup, cutmix)
    schedule = SchedulerConfig("step", lr_decay_steps=[60, 80])
    return LinearModel(Backbone(), 10, OptimizerConfig(**values), schedule, options)


def test_linear_model_leaves_the_backbone_alone():
    model = linear_model()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    assert {key.split(".")[0] for key in before} == {"backbone", "classifier"}
    val = [*random_batches(2, seed=1), *random_batches(1, batch=3, seed=2)]
    trainer = fit(model, random_batches(3), max_epochs=2, val=val)
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {"classifier.weight", "classifier.bias"}
    model.train()
    assert model.training and not any(m.training for m in model.backbone.modules())

    logged = {k: v.item() for k, v in trainer.callback_metrics.items()}
    names = {f"{split}_{metric}" for split in ("train", "val") for metric in ("loss", "acc1", "acc5")}
    assert set(logged) == names
    model.eval()
    logits = torch.cat([model(views[0])["logits"] for _, views, _ in val])
    targets = torch.cat([t for *_, t in val])
    acc1, acc5 = accuracy_at_k(logits, targets)
    expected = {"val_loss": F.cross_entropy(logits, targets), "val_acc1": acc1, "val_acc5": acc5}
    for name, value in expected.items():  # weighted by the size of the batches
        assert logged[name] == pytest.approx(value.item(), rel=1e-5)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_linear_model_takes_the_effective_lr(accumulate):
    for model, lr in ((linear_model(), 0.1), (linear_model(effective_lr=0.4), 0.4)):
        trainer = fit(model, random_batches(2), accumulate_grad_batches=accumulate)
        [group] = trainer.optimizers[0].param_groups
        assert (group["initial_lr"], group["momentum"], group["weight_decay"]) == (lr, 0.9, 0)


@pytest.mark.parametrize("layer_decay", [0.0, 0.5])
def test_finetune_trains_the_backbone(layer_decay):
    torch.manual_seed(0)
    model = linear_model(finetune=True, layer_decay=layer_decay)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    trainer = fit(model, random_batches(2))
    assert not any(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    groups = trainer.optimizers[0].param_groups
    assert sum(len(g["params"]) for g in groups) == len(list(model.parameters()))
    assert groups[-1]["name"] == "classifier" and groups[-1]["lr"] == 0.1
    # from the last layer to the first: the whole rate is the classifier's
    rates = sorted({g["lr"] for g in groups[:-1]}, reverse=True)
    assert rates == pytest.approx([0.1 * layer_decay ** (i + 1) for i in range(len(rates))] if layer_decay else [0.1])
    assert len(rates) == 1 + (layer_decay > 0)
    model.eval()
    with torch.no_grad():
        assert not model(torch.randn(2, 3, 16, 16))["logits"].requires_grad


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [("test_vit", {}), ("test_vit", {"global_pool": "avg"}), ("test_convnext", {}), ("test_efficientnet", {})],
)
def test_layers_decay_as_in_timms_whole_network(name, kwargs):
    """A norm that a backbone keeps after its last block (ConvNeXt's, a pooling ViT's) has the classifier's rate."""
    whole = timm.create_model(name, num_classes=10, **kwargs)
    undecayed = getattr(whole, "no_weight_decay", set)()
    theirs = param_groups_layer_decay(whole, 0.05, undecayed, layer_decay=0.5)
    scales = {id(p): (group["lr_scale"], group["weight_decay"]) for group in theirs for p in group["params"]}
    expected = {name: scales[id(p)] for name, p in whole.named_parameters()}
    backbone = timm.create_model(name, num_classes=0, **kwargs)
    cfg = OptimizerConfig(name="sgd", layer_decay=0.5, lr=0.1, batch_size=8, weight_decay=0.05)
    groups = backbone_groups(backbone, cfg, 0.1)
    ours = {id(p): (group["lr"] / 0.1, group["weight_decay"]) for group in groups for p in group["params"]}
    for name, p in backbone.named_parameters():
        assert ours[id(p)] == pytest.approx(expected[name]), name
    assert {decay for _, decay in ours.values()} == {0, 0.05}


def test_finetuning_leaves_what_the_backbone_has_fixed():
    options = {"img_size": 16, "patch_size": 8, "depth": 1, "embed_dim": 12, "num_heads": 2, "stop_grad_conv1": True}
    backbone = MOCO_VITS["vit_tiny"](**options)
    model = LinearModel(
        backbone, 3, OptimizerConfig(name="sgd", lr=0.1, batch_size=8), SchedulerConfig(), LinearOptions(finetune=True)
    )
    fixed = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert fixed == {"backbone.pos_embed", "backbone.patch_embed.proj.weight", "backbone.patch_embed.proj.bias"}


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (SchedulerConfig("step", lr_decay_steps=[2, 3]), [0.1, 0.1, 0.1, 0.1, 0.01, 0.01, 0.001, 0.001]),
        (SchedulerConfig("none"), [0.1] * 8),
        (
            SchedulerConfig("warmup_cosine", warmup_epochs=1, warmup_start_lr=0.02, min_lr=0.004),
            [0.02, 0.1, *(0.004 + 0.096 * (1 + math.cos(math.pi * i / 6)) / 2 for i in range(6))],
        ),
    ],
    ids=["step", "none", "warmup_cosine"],
)
def test_the_schedule_of_a_linear_evaluation(schedule, expected):
    """4 epochs of 2 steps of 3 batches; its start and end are the configured ones, however many batches make a step."""
    seen = []

    class Rates(pl.Callback):
        def on_train_batch_start(self, trainer, module, batch, i):
            if i % 3 == 0:
                seen.append(trainer.optimizers[0].param_groups[0]["lr"])

    model = linear_model()
    model.scheduler_cfg = schedule
    fit(model, random_batches(6), max_epochs=4, callbacks=[Rates()], accumulate_grad_batches=3)
    assert seen == pytest.approx(expected)


def test_images_without_a_label_do_not_count_in_a_linear_evaluation():
    model, images = linear_model(), torch.randn(6, 3, 16, 16)
    targets = torch.tensor([0, -1, 2, -1, 1, 0])
    whole, labelled = (
        model.training_step((torch.arange(6), [images[rows]], targets[rows]), 0)
        for rows in (targets > -2, targets >= 0)
    )
    assert whole.item() == pytest.approx(labelled.item(), rel=1e-6)


def test_label_smoothing_and_mixup():
    images, targets = torch.randn(8, 3, 16, 16), torch.arange(8)
    batch = (torch.arange(8), [images], targets)
    losses = {}
    for name, changes in {
        "plain": {},
        "smooth": {"label_smoothing": 0.2},
        "mixup": {"mixup": 0.8, "cutmix": 1.0, "label_smoothing": 0.1},
    }.items():
        torch.manual_seed(0)
        np.random.seed(0)
        model = linear_model(**changes)
        model.log_dict = lambda *_, **__: None
        losses[name] = model.training_step(batch, 0)
        logits = model(images)["logits"]
        log_p = F.log_softmax(logits, 1)
        if name == "smooth":
            expected = -(0.8 * log_p.gather(1, targets[:, None])[:, 0] + 0.2 * log_p.mean(1)).mean()
            torch.testing.assert_close(losses[name], expected)
    assert len({loss.item() for loss in losses.values()}) == 3
    assert torch.equal(targets, torch.arange(8))


@pytest.mark.parametrize("options", [{"mixup": 0.8}, {"cutmix": 0.3}, {"mixup": 0.8, "cutmix": 0.3}])
def test_mixing_is_timms(options):
    x, y = torch.randn(8, 3, 16, 16), torch.arange(8)
    alphas = {f"{name}_alpha": options.get(name, 0.0) for name in ("mixup", "cutmix")}
    mixed = []
    for mixing in (
        LinearOptions(label_smoothing=0.1, **options).mixing(8, 10),
        Mixup(label_smoothing=0.1, num_classes=10, **alphas),
    ):
        np.random.seed(0)
        mixed.append(mixing(x.clone(), y))
    assert all(map(torch.equal, *mixed))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_decay": 0.5}, "layer_decay needs finetune"),
        ({"mixup": 0.5, "batch_size": 7}, "optimizer.batch_size must be even"),
        ({"label_smoothing": 1.5}, "label_smoothing"),
        ({"mixup": math.nan}, "mixup"),
        ({"finetune": "perhaps"}, "finetune"),
        ({"lr": math.nan}, "optimizer.lr"),
    ],
)
def test_linear_model_refuses(changes, message):
    with pytest.raises(ConfigError, match=message):
        linear_model(**changes)


def test_linear_options_default_to_solo_learns():
    assert LinearOptions() == LinearOptions(finetune=False, label_smoothing=0, mixup=0, cutmix=0)


SGD = {"optimizers": [OptimizerConfig("sgd", batch_size=256, lr=0.03)], "epochs": 50}
SGD["scheduler"] = SchedulerConfig("step", lr_decay_steps=[30, 40])


@pytest.mark.parametrize(
    "schedule",
    [
        SchedulerConfig("step", lr_decay_steps=[1, 2]),
        SchedulerConfig("warmup_cosine", warmup_epochs=1, warmup_start_lr=0.1),
        SchedulerConfig("warmup_cosine", warmup_epochs=1, warmup_start_lr=0.1, interval="epoch"),
    ],
    ids=["step", "warmup_cosine", "per epoch"],
)
def test_cached_linear_by_hand(schedule):
    """SGD with momentum on standardised features, image by image in the order of the seed, and its five figures."""
    generator = torch.Generator().manual_seed(2)
    train_x, val_x = (torch.randn(n, 5, generator=generator) * 3 + 1 for n in (22, 9))
    train_y, val_y = (torch.randint(0, 7, (n,), generator=generator) for n in (22, 9))
    [ours] = fit_cached_linear(
        *(train_x, train_y, val_x, val_y),
        optimizers=[OptimizerConfig("sgd", batch_size=8, lr=0.5, weight_decay=0.01)],
        **{"scheduler": schedule, "epochs": 3, "seed": 4},
    )
    mean, std = train_x.mean(0), train_x.std(0, correction=0)
    train_x, val_x = (train_x - mean) / std, (val_x - mean) / std
    W, b = torch.zeros(7, 5), torch.zeros(7)
    velocities, order_of = [torch.zeros_like(W), torch.zeros_like(b)], torch.Generator().manual_seed(4)
    cosine = [0.1, 0.5, *(0.5 * (1 + math.cos(math.pi * i / 4)) / 2 for i in range(4))]
    rates = {
        "step": [0.5, 0.5, 0.05, 0.05, 0.005, 0.005],
        "warmup_cosine": cosine,
        # the warm-up of one epoch starts and ends with it
        "per epoch": [0.1, 0.1, 0.5, 0.5, 0.25, 0.25],
    }["per epoch" if schedule.interval == "epoch" else schedule.name]
    for epoch in range(3):
        order = torch.randperm(22, generator=order_of)[:16]
        for step, rows in enumerate(order.split(8)):
            x, y = train_x[rows], train_y[rows]
            error = (x @ W.T + b).softmax(1) - F.one_hot(y, 7)
            gradients = error.T @ x / 8 + 0.01 * W, error.mean(0) + 0.01 * b
            for w, v, g in zip((W, b), velocities, gradients, strict=True):
                v.mul_(0.9).add_(g)
                w.sub_(rates[2 * epoch + step] * v)
    train, val = train_x @ W.T + b, val_x @ W.T + b
    expected = {
        "val_acc1": 100 * (val.argmax(1) == val_y).float().mean(),
        "val_acc5": 100 * (val.topk(5).indices == val_y[:, None]).any(1).float().mean(),
        "train_acc1": 100 * (train.argmax(1) == train_y).float().mean(),
        "train_acc5": 100 * (train.topk(5).indices == train_y[:, None]).any(1).float().mean(),
        "val_loss": F.cross_entropy(val, val_y),
        "train_loss": F.cross_entropy(train, train_y),
    }
    assert ours == pytest.approx({name: value.item() for name, value in expected.items()}, rel=1e-5)
    assert len({round(value, 3) for value in ours.values()}) == 6


def test_cached_linear_reaches_logistic_regression():
    x, y = make_classification(2000, 32, n_informative=16, n_classes=8, n_clusters_per_class=1, random_state=1)
    reference = 100 * LogisticRegression(max_iter=1000).fit(x[:1500], y[:1500]).score(x[1500:], y[1500:])
    problem = torch.tensor(x[:1500]), torch.tensor(y[:1500]), torch.tensor(x[1500:]), torch.tensor(y[1500:])
    state = torch.get_rng_state()
    [found] = fit_cached_linear(*problem, **SGD)
    assert reference > 60 and abs(found["val_acc1"] - reference) < 3
    assert found["val_acc5"] >= found["val_acc1"] and found["train_acc1"] > reference - 5
    assert fit_cached_linear(*problem, **SGD) == [found]
    assert torch.equal(torch.get_rng_state(), state)


def test_cached_linear_is_plain_sgd_on_standardised_features():
    """300 images make 18 batches of 16; the rate is the effective one and falls after epochs 2 and 4 of 5."""
    x, y, val_x, val_y = neighbours_problem()
    options = OptimizerConfig("sgd", batch_size=16, lr=9.0, weight_decay=0.01)
    options.effective_lr = 0.2
    schedule = SchedulerConfig("step", lr_decay_steps=[2, 4])
    [found] = fit_cached_linear(x, y, val_x, val_y, optimizers=[options], scheduler=schedule, epochs=5, seed=3)

    mean, std = x.mean(0), x.std(0, unbiased=False)
    weight, bias = (torch.zeros(7, 10, requires_grad=True), torch.zeros(7, requires_grad=True))
    sgd = torch.optim.SGD([weight, bias], lr=0.2, momentum=0.9, weight_decay=0.01)
    order = torch.Generator().manual_seed(3)
    for epoch in range(5):
        sgd.param_groups[0]["lr"] = 0.2 * (1, 1, 0.1, 0.1, 0.01)[epoch]
        shuffled = torch.randperm(300, generator=order)
        for i in range(18):
            chosen = shuffled[16 * i : 16 * (i + 1)]
            sgd.zero_grad()
            F.cross_entropy((x[chosen] - mean) / std @ weight.T + bias, y[chosen]).backward()
            sgd.step()
    logits = (val_x - mean) / std @ weight.T + bias
    assert found["val_loss"] == pytest.approx(F.cross_entropy(logits, val_y).item(), rel=1e-4)
    assert found["val_acc1"] == pytest.approx(100 * (logits.argmax(1) == val_y).float().mean().item(), abs=0.51)


def test_cached_linear_takes_optimizer_and_schedule():
    x, y, val_x, val_y = neighbours_problem()
    optimizer = OptimizerConfig("lars", batch_size=1000, lr=0.0)
    constant = SchedulerConfig("none")
    [untrained] = fit_cached_linear(x, y, val_x, val_y, optimizers=[optimizer], scheduler=constant, epochs=2)
    assert untrained["val_loss"] == pytest.approx(math.log(7))
    optimizer.effective_lr = 1.0
    for schedule in (SchedulerConfig(warmup_epochs=0), constant):
        [trained] = fit_cached_linear(x, y, val_x, val_y, optimizers=[optimizer], scheduler=schedule, epochs=2)
        assert trained["val_loss"] < math.log(7)


def test_cached_linear_refuses():
    x, y, val_x, val_y = neighbours_problem()
    with pytest.raises(DataError, match="no labelled image"):
        fit_cached_linear(x, torch.full_like(y, -1), val_x, val_y, **SGD)
    with pytest.raises(DataError, match="not finite"):
        fit_cached_linear(x, y, val_x * math.inf, val_y, **SGD)


# Online.


class Trainee(LinearModel):
    """Trains its backbone, and looks at it in validation."""

    def __init__(self):
        torch.manual_seed(0)
        optimizer = OptimizerConfig("sgd", batch_size=8, lr=0.1)
        schedule = SchedulerConfig("step", lr_decay_steps=[60, 80])
        super().__init__(Backbone(), 10, optimizer, schedule, LinearOptions(finetune=True))


def train_and_look(every=1, look=True, distance="euclidean"):
    bank, val = random_batches(6, views=1, seed=1), random_batches(3, views=1, seed=2)
    # a DataLoader draws a random number whenever it is iterated
    loaders = [torch.utils.data.DataLoader(batches, batch_size=None) for batches in (bank, val)]
    callback = OnlineKNN(lambda: loaders, KNNConfig(k=20, every=every, distance_func=distance))
    model, seen = Trainee(), []
    log_dict = model.log_dict

    def spy(metrics, **kwargs):
        seen.extend((model.current_epoch, name) for name in metrics if "knn" in name)
        log_dict(metrics, **kwargs)

    model.log_dict = spy
    torch.manual_seed(1)
    trainer = fit(model, random_batches(2), 3, [callback] if look else [], val=val)
    return model, trainer, bank, val, seen


@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
def test_online_knn(distance):
    model, trainer, bank, val, seen = train_and_look(distance=distance)
    assert sorted(seen) == [(epoch, f"val_knn{k}") for epoch in range(3) for k in (1, 20)]
    assert all(m.training for m in model.modules())
    sides = [*extract_features(model.backbone, bank), *extract_features(model.backbone, val)]
    for k, expected in knn_accuracy(*sides, [1, 20], distance).items():
        assert trainer.callback_metrics[f"val_knn{k}"].item() == pytest.approx(expected["acc1"])


def test_online_knn_every_other_epoch_and_the_last():
    *_, seen = train_and_look(every=2)
    assert sorted({epoch for epoch, _ in seen}) == [1, 2]


def test_online_knn_does_not_change_the_training():
    with_knn, without = train_and_look()[0], train_and_look(look=False)[0]
    for key, value in with_knn.state_dict().items():
        assert torch.equal(value, without.state_dict()[key]), key
