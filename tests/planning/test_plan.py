"""`solo-ext plan`: numbers against hand-computed ones, every warning, and that it writes nothing."""

import copy
import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import ROOT, method_config, random_batches, tiny_config
from frameworks import METHODS_TESTED

import solo_ext.cli.main as cli
from solo_ext.methods import METHODS
from solo_ext.planning import measure
from solo_ext.planning.measure import measure_steps, synthetic_batch
from solo_ext.planning.plan import anatomy, describe, plan
from solo_ext.training import recipes
from solo_ext.training.compose import compose
from solo_ext.training.config import resolve
from solo_ext.training.pretrain import pretrain

PRETRAIN = ROOT / "scripts" / "pretrain"
BYOL = PRETRAIN / "cifar10" / "byol.yaml"
MINI = PRETRAIN / "fashion_mnist_mini" / "byol.yaml"
TINY = ["optimizer.batch_size=20", "precision=32", "accelerator=cpu", "data.num_workers=0"]
SLIM = ["backbone.name=resnet10_w16", "method_kwargs.proj_hidden_dim=8", "method_kwargs.proj_output_dim=8"]
TINY += [*SLIM, "method_kwargs.pred_hidden_dim=8"]


def configured(file: Path, *overrides: str):
    return resolve(compose(file.parent, file.name, overrides))


# What the network consists of.

CONVOLUTION, NORM = 9, 2  # weights of a 3x3 convolution per pair of channels, of a BatchNorm per channel
LAYER1 = 4 * (CONVOLUTION * 64 * 64 + NORM * 64)


def block(width: int) -> int:
    """Four convolutions, the first from half as many channels, and a shortcut of 1x1."""
    convolutions = CONVOLUTION * (width // 2 * width + 3 * width * width) + width // 2 * width
    return convolutions + 5 * NORM * width


RESNET18 = CONVOLUTION * 3 * 64 + NORM * 64 + LAYER1 + block(128) + block(256) + block(512)


def two_layers(width_in: int, hidden: int, out: int) -> int:
    return (width_in + 1) * hidden + NORM * hidden + (hidden + 1) * out


PROJECTOR, PREDICTOR = two_layers(512, 16, 8), two_layers(8, 16, 8)
HEADS = ["projector.fc1", "projector.fc2"]


BLOCKS = ["block1", "block2", "block3", "block4"]
VIEWS = [{"crop_size": 8, "num_crops": 2}]


@pytest.mark.parametrize(
    "stages, parameters, layers, backbones, forwards, averaged, shared",
    [
        ("full", RESNET18 + PROJECTOR, 20, 2 * RESNET18, 2, ["conv1", *BLOCKS, *HEADS], []),
        ("projector", PROJECTOR, 2, RESNET18, 1, HEADS, []),
        ("projector.fc2", 17 * 8, 1, RESNET18, 1, HEADS[1:], []),
        ("block4", block(512) + PROJECTOR, 4, RESNET18 + block(512), 1.2, ["block4"], HEADS),
        (["block4", "projector"], block(512) + PROJECTOR, 6, RESNET18 + block(512), 1.2, ["block4", *HEADS], []),
        ("conv1", RESNET18 + PROJECTOR, 1, 2 * RESNET18, 2, ["conv1"], [*BLOCKS, *HEADS]),
        ("none", 0, 0, RESNET18, 1, [], []),
    ],
    ids=lambda value: "",
)
def test_anatomy_of_byol_by_hand(stages, parameters, layers, backbones, forwards, averaged, shared):
    found = anatomy(METHODS["byol"](method_config("byol", momentum__stages=stages, augmentations=VIEWS)))
    assert found["student_parameters"] == RESNET18 + PROJECTOR + PREDICTOR
    assert found["teacher_parameters"] == parameters
    assert found["teacher_layers"] == layers
    assert found["parameters_millions"] == pytest.approx(backbones / 1e6)
    assert found["forwards_per_view"] == pytest.approx(forwards) and found["student_forwards"] == 1
    assert found["teacher_tau"] == {**dict.fromkeys(averaged, "0.9 to 1, cosine"), **dict.fromkeys(shared, "0")}
    assert list(found["teacher_tensors"]) == [*averaged, *shared]


@pytest.mark.parametrize(
    "method, layers, millions, forwards", [("dino", 53, 47.0, 2), ("projector_ema_dino", 3, 23.5, 1)]
)
def test_table_4_of_projector_ema(method, layers, millions, forwards):
    changes = {"backbone__name": "resnet50", "backbone__stem": "small", "augmentations": VIEWS}
    kwargs = {"proj_hidden_dim": 16, "proj_output_dim": 8, "num_prototypes": 32}
    found = anatomy(METHODS[method](method_config(method, method_kwargs=kwargs, **changes)))
    assert found["teacher_layers"] == layers
    assert round(found["parameters_millions"], 1) == millions
    assert found["forwards_per_view"] == forwards


@pytest.mark.parametrize("probe, student", [(True, 1), (False, 0.5)])
def test_ressl_runs_each_view_once_or_less(probe, student):
    found = anatomy(METHODS["ressl"](tiny_config("ressl", method_kwargs__weak_probe=probe, augmentations=VIEWS)))
    assert (found["student_forwards"], found["teacher_forwards"]) == (student, 0.5)


@pytest.mark.parametrize("method", METHODS_TESTED)
def test_anatomy_of_every_method_leaves_it_alone(method):
    model = METHODS[method](tiny_config(method, augmentations=VIEWS))
    before, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    found = anatomy(model)
    assert torch.equal(torch.get_rng_state(), random)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    tensors = [name for names in found["teacher_tensors"].values() for name in names]
    named = {name for name, _ in model.named_parameters() if name.startswith("momentum_")}
    assert len(tensors) == len(set(tensors)) and set(tensors) == named
    scope = model.teacher_stages
    assert bool(tensors) == (scope != "none")
    assert found["teacher_backbone_stages"] == (found["backbone_stages"] if scope == "full" else [])
    assert found["student_forwards"] <= 1 and found["teacher_forwards"] <= (scope == "full")


@pytest.mark.parametrize("stages", [None, "block4", "none"])
@pytest.mark.parametrize("method", METHODS)
def test_a_step_makes_as_many_passes(method, stages):
    changes = {"momentum__stages": stages} if stages and not METHODS[method].intra.weight else {}
    model, images = (
        METHODS[method](method_config(method, augmentations=VIEWS, gap__enabled=False, **changes)),
        Counter(),
    )
    found = anatomy(model)
    for who in ("backbone", "momentum_backbone"):
        if hasattr(model, who):
            layer = getattr(model, who).layer4
            layer.register_forward_pre_hook(lambda _, inputs, who=who: images.update({who: len(inputs[0])}))
    model.training_step(random_batches(1, batch=4)[0], 0)
    share = len(found["teacher_backbone_stages"]) / len(found["backbone_stages"])
    assert found["student_forwards"] == pytest.approx(images["backbone"] / 8)
    assert found["teacher_forwards"] == pytest.approx(share * images["momentum_backbone"] / 8)


def test_a_tau_of_ones_own():
    class Steps:
        def __call__(self, step, total_steps):
            return 0.9 if step < 10 else 1.0

        def always(self, value):
            return False

        def __str__(self):
            return "0.9, then 1"

    model = METHODS["byol"](method_config("byol", augmentations=VIEWS))
    model.teacher.taus |= {"conv1": Steps()}
    found = anatomy(model)
    assert found["teacher_tau"]["conv1"] == "0.9, then 1" and json.dumps(found) and found["teacher_layers"] > 5


# How long it is.


@pytest.mark.parametrize(
    "overrides, per_epoch, steps, lr",
    [
        ([], 195, 39_000, 1.0),
        (["max_epochs=1000"], 195, 195_000, 1.0),
        (["devices=2", "accelerator=gpu"], 97, 19_400, 2.0),
        (["devices=2", "num_nodes=2", "accelerator=gpu"], 48, 9_600, 4.0),
        (["accumulate_grad_batches=4"], 49, 9_800, 4.0),
        (["data.fraction=0.1"], 19, 3_800, 1.0),
        (["limit_train_batches=0.5"], 97, 19_400, 1.0),
        (["limit_train_batches=10", "optimizer.batch_size=512"], 10, 2_000, 2.0),
        (["max_steps=100"], 195, 100, 1.0),
        (["data.dataset=imagenet100", "data.train_path=nowhere"], 494, 98_800, 1.0),
        (["data.dataset=custom", "data.train_path=nowhere"], None, None, 1.0),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_steps_and_learning_rate(overrides, per_epoch, steps, lr):
    found = plan(configured(BYOL, *SLIM, *overrides), measure=False)
    names = ("steps_per_epoch", "steps", "effective_lr", "lr", "measured", "seconds")
    assert [found[name] for name in names] == [per_epoch, steps, lr, 1.0, None, None]
    assert found["warmup_steps"] == (steps and pytest.approx(10 * steps / found["epochs"]))
    assert ("there is no folder 'nowhere'" in describe(found)) == (steps is None)


def test_a_folder_is_counted(tmp_path):
    from PIL import Image

    for i in range(41):
        (tmp_path / str(i % 2)).mkdir(exist_ok=True)
        Image.new("RGB", (4, 4)).save(tmp_path / str(i % 2) / f"{i}.png")
    changes = [*TINY, "data.dataset=custom", f"data.train_path={tmp_path}"]
    found = plan(configured(MINI, *changes), measure=False)
    assert (found["images"], found["steps_per_epoch"]) == (41, 2)


def test_a_real_run_has_as_many_steps(tmp_path):
    changes = ["data.fraction=0.01", "max_epochs=2", "accumulate_grad_batches=2", "enable_progress_bar=false"]
    cfg = configured(
        MINI, *TINY, *changes, "optimizer.batch_size=10", "limit_val_batches=0", f"checkpoint.dir={tmp_path}"
    )
    expected = plan(cfg, measure=False)
    result = pretrain(cfg)
    records = json.loads((result.dir / "checkpoints.json").read_text()).values()
    assert (expected["steps"], expected["steps_per_epoch"]) == (max(record["step"] for record in records), 3)


# Warnings.


@pytest.mark.parametrize("folder", sorted(place.name for place in PRETRAIN.glob("[!_]*")))
def test_the_recipes_have_none(folder):
    """Not a single one on ImageNet; elsewhere a variant has its framework's values."""
    names = recipes.names(PRETRAIN / folder)
    for name in names if folder == "imagenet" else [n for n in names if not n.startswith(("projector_ema_", "res_"))]:
        slim = SLIM if "vit" not in name else ["backbone.name=vit_tiny", *SLIM[1:]]
        found = plan(configured(PRETRAIN / folder / f"{name}.yaml", "backbone.kwargs={}", *slim), measure=False)
        assert found["warnings"] == [], name


@pytest.mark.parametrize(
    "recipe, fires, silent",
    [
        ("byol", ["momentum.base_tau=1"], ["momentum.base_tau=0.9999"]),
        ("byol", ["momentum.base_tau=1", "momentum.schedule=cosine"], ["momentum.schedule=cosine"]),
        ("byol", ["momentum.stages={projector: 1.0}"], ["momentum.stages={projector: 0.999}"]),
        ("dino", ["momentum.stages=backbone"], ["momentum.stages=projector"]),
        ("mocov2plus", ["momentum.stages={block4: 0.99}"], ["momentum.stages={block4: 0.99, projector: 0.99}"]),
        ("dino", ["momentum.stages=[block4]"], ["momentum.stages=[block4,projector]"]),
        ("byol", ["optimizer.batch_size=50001"], ["optimizer.batch_size=50000"]),
        ("byol", ["limit_train_batches=0"], ["limit_train_batches=1"]),
        ("byol", ["max_epochs=10"], ["max_epochs=11"]),
        ("byol", ["optimizer.kwargs.eta=0.001"], ["optimizer.kwargs.eta=0.02"]),
        ("byol", ["~optimizer.kwargs.eta"], ["~optimizer.kwargs.eta", "data.dataset=imagenet", "data.train_path=x"]),
        ("byol", ["data.dataset=imagenet", "data.train_path=x"], ["data.dataset=imagenet100", "data.train_path=x"]),
        ("byol", ["accelerator=gpu", "devices=2"], ["accelerator=gpu", "devices=2", "sync_batchnorm=true"]),
        ("mocov2plus", ["method_kwargs.queue_size=1000"], ["method_kwargs.queue_size=1024"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else value,
)
def test_warnings(recipe, fires, silent):
    file = PRETRAIN / "cifar10" / f"{recipe}.yaml"
    key = fires[0].lstrip("~").partition("=")[0]
    key = {
        "momentum.base_tau": "momentum",
        "momentum.stages": "momentum" if recipe == "byol" else "momentum.stages",
        "max_epochs": "scheduler.warmup_epochs",
        "data.dataset": "optimizer.kwargs.eta",
        "accelerator": "sync_batchnorm",
    }.get(key, key)
    [warning] = plan(configured(file, *SLIM, *fires), measure=False)["warnings"]
    assert warning.startswith(f"{key}: ") and "\n" not in warning
    assert plan(configured(file, *SLIM, *silent), measure=False)["warnings"] == []


def test_memory_that_is_not_there_is_a_warning(monkeypatch):
    cfg = configured(MINI, *TINY)
    assert plan(cfg)["warnings"] == []
    monkeypatch.setattr(measure, "free_memory", lambda device: 2**20)
    found = plan(cfg)
    assert not found["measured"]["fits"] and "optimizer.batch_size" in found["warnings"][0]


def test_a_large_batch_is_measured_with_fewer_images():
    small, large = (plan(configured(MINI, *TINY, f"optimizer.batch_size={n}"))["measured"] for n in (50, 5000))
    assert small["images"] == 50 and large["images"] == measure.CPU_PIXELS // (2 * 28**2)
    assert 20 < large["seconds"] / small["seconds"] < 300
    found = plan(configured(MINI, *TINY, "optimizer.batch_size=5000"))
    assert f"measured with {large['images']} images and scaled to 5000" in describe(found)


# Time and memory.


def test_a_measured_step_is_a_real_one(monkeypatch):
    monkeypatch.setattr(measure, "SECONDS", 0)
    method = METHODS["byol"](configured(MINI, *TINY))
    before = copy.deepcopy(method.state_dict())
    measured = measure_steps(method.cfg, method)
    assert measured["steps"] == measure.LEAST and measured["seconds"] > 0
    moved = {name for name, tensor in method.state_dict().items() if not torch.equal(tensor, before[name])}
    assert {"backbone.conv1.weight", "predictor.0.weight", "classifier.weight"} <= moved  # optimizer
    assert {"momentum_backbone.conv1.weight", "momentum_projector.0.weight"} <= moved  # teacher


@pytest.mark.parametrize("images", [20, 500])
def test_memory_holds_weights_optimizer_and_what_backward_needs(images):
    cfg = configured(MINI, *TINY, f"optimizer.batch_size={images}")
    method, saved = METHODS["byol"](cfg), {}
    measured = measure_steps(cfg, copy.deepcopy(method))
    tensors = method.state_dict().values()

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    batch = synthetic_batch(cfg, images, torch.device("cpu"))
    method.log = method.log_dict = lambda *_, **__: None
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = method.training_step(batch, 0)  # keeps what was saved
    activations = sum(saved.values()) - sum(saved.get(tensor.data_ptr(), 0) for tensor in tensors)
    # AdamW: weights, their gradients, two moments and a step count; the teacher and all buffers only once
    learnt = [p for p in method.parameters() if p.requires_grad]
    weights = sum(tensor.nbytes for tensor in tensors) + sum(12 * p.numel() + 4 for p in learnt)
    assert loss.requires_grad and measured["memory"] == pytest.approx(weights + activations, rel=0.01)


def test_an_accumulated_step_takes_the_time_of_all_its_batches():
    changes = [*TINY, "optimizer.batch_size=8"]
    plain, accumulated = (plan(configured(MINI, *changes, f"accumulate_grad_batches={n}"))["measured"] for n in (1, 9))
    assert accumulated["seconds"] > 2 * plain["seconds"]  # 9 times, on a machine that has nothing else to do
    low, high = accumulated["quartiles"]
    assert 0 < low <= accumulated["seconds"] <= high and measure.LEAST <= accumulated["steps"] <= measure.STEPS


# The command.


@pytest.fixture
def run(capsys, tmp_path, monkeypatch):
    """Runs `solo-ext plan` in an empty folder, which stays empty; returns (exit status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(*argv):
        status = cli.main(["plan", *map(str, argv)])
        assert list(tmp_path.iterdir()) == []
        return status, *capsys.readouterr()

    return run


def test_one_layer_is_said_so(run):
    _, out, _ = run(MINI, *TINY, "momentum.stages=projector.fc2", "--no-measure")
    assert " parameters, 1 weight layer with EMA" in out


def test_text(run):
    changes = ["momentum.stages=[block4,projector]", "max_epochs=2", "optimizer.batch_size=8"]
    status, out, err = run(MINI, *TINY, *changes)
    assert status == 0 and not err
    for words in (
        "resnet10_w16 on fashion_mnist_mini, views: 2 of 28 px",
        "momentum_backbone.layer4",
        "1.2 through the backbone per view: student 1, teacher 0.2 (1 of 5 stages: block4)",
        "5,000 images",
        "8 images each (batch size 8, devices 1, accumulated batches 1); 625 an epoch, 1,250 in 2 epochs",
        "0.00025 (configured: 0.008 per 256 images); warm-up 1 epochs = 625 steps",
        "(median of ",
        "GiB at the peak",
        "without loading images; validation and kNN ",
    ):
        assert words in out, out


def test_json_says_the_same(run):
    status, out, err = run(MINI, *TINY, "--json", "--no-measure")
    found = json.loads(out)
    assert status == 0 and not err
    assert found["images"] == 5000 and found["steps"] == 6250 and found["measured"] is None and found["warnings"] == []
    assert found["anatomy"]["teacher_tensors"]["projector.fc2"] == [
        f"momentum_projector.3.{t}" for t in ("weight", "bias")
    ]
    assert found["anatomy"]["teacher_tau"]["conv1"] == "0.95 to 1, cosine"


def test_run_time_is_steps_times_step_time(run):
    found = json.loads(run(MINI, *TINY, "--json", "max_steps=70", "optimizer.batch_size=8")[1])
    assert found["seconds"] == pytest.approx(70 * found["measured"]["seconds"])


def test_evaluations_take_a_forward_pass_of_each_image(run):
    """Of 10 epochs, three end with a validation of the 1,000 test images, two of them with kNN among the 5,000."""
    words = ["max_epochs=10", "check_val_every_n_epoch=3", "knn_eval.every=6", "knn_eval.enabled=true"]
    found = json.loads(run(MINI, *TINY, "--json", *words)[1])
    images = 3 * 1000 + 2 * (1000 + 5000)
    assert found["measured"]["forward"] > 0
    assert found["evaluating"] == pytest.approx(images * found["measured"]["forward"])
    assert json.loads(run(MINI, *TINY, "--json", "data.dataset=stl10")[1])["evaluating"] is None


@pytest.mark.parametrize(
    "argv, words",
    [
        ([], "which YAML?"),
        ([MINI, "momentum.stages=blok4"], "block4"),
        ([MINI, "momentum.base_taw=1"], "did you mean 'momentum.base_tau'"),
        ([MINI, "backbone.name=timm/vit_tiny_patch16_224"], "cannot take crops of 28 px"),
        (
            [MINI.with_name("dino.yaml"), "method_kwargs.warmup_teacher_temperature_epochs=99"],
            "must be at most max_epochs",
        ),
        ([MINI, "--jsn"], "did you mean '--json'"),
        ([MINI.with_name("nothing.yaml")], "there is no file"),
    ],
    ids=lambda value: " ".join(Path(str(word)).name for word in value) if isinstance(value, list) else "",
)
def test_mistakes(run, argv, words):
    status, out, err = run(*argv)
    assert status == 2 and not out and err.startswith("solo-ext: error: ") and err.count("\n") == 1 and words in err, (
        err
    )
