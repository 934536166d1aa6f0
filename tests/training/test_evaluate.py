"""Linear and kNN evaluation of a run."""

import json
import re
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_runs import config, names

from solo_ext.cli.main import main
from solo_ext.data import modules
from solo_ext.data.datasets import DataConfig, load_dataset
from solo_ext.errors import CheckpointError, ConfigError
from solo_ext.files import sha256
from solo_ext.methods import backbone_of
from solo_ext.runs.checkpoints import load_checkpoint, save_checkpoint
from solo_ext.runs.encoder import bare_backbone, load_encoder, weights_sum
from solo_ext.runs.run import KNN, LINEAR, Run, RunResult
from solo_ext.schema import plain
from solo_ext.training import evaluate
from solo_ext.training.config import recipe_taken, resolve, run_values
from solo_ext.training.evaluate import knn, linear
from solo_ext.training.pretrain import pretrain
from solo_ext.training.trainer_config import TrainerConfig
from solo_ext.zoo.export import export
from solo_ext.zoo.model import load_backbone


@pytest.mark.parametrize("cached", [False, True])
def test_linear_evaluation_of_a_run(whole, tmp_path, cached, caplog):
    options = {
        "pretrained_feature_extractor": str(whole.dir),
        "cache_features": cached,
        "scheduler__name": "none",
    }
    result = linear(config(tmp_path, "linear", max_epochs=2, **options))
    assert result.dir.parent == tmp_path / "linear" and "args.json" in names(result.dir)
    written = json.loads((whole.dir / "linear.json").read_text())["results"][-1]
    protocol = written["protocol"]
    assert written["acc1"] == result.metrics["val_acc1"] and protocol["augmented"] is not cached
    assert protocol["checkpoint"] == whole.checkpoint.name and protocol["max_epochs"] == 2
    assert protocol["sha256"] == sha256(whole.checkpoint) and protocol["branch"] == "student"
    assert (protocol["finetune"], protocol["data.fraction"], protocol["data.train.images"]) == (False, 0.01, 50)
    assert protocol["data.val.fingerprint"] == load_dataset(DataConfig("fashion_mnist_mini"), "test").fingerprint()
    assert (protocol["data.augmentations.crop_size"], protocol["other_view"]) == (28, True)
    assert (protocol["devices"], protocol["processes"]) == ("cpu", 1)
    assert protocol.get("limit_val_batches") == (None if cached else 1)  # which has no batches
    assert not any("/" in value for value in protocol.values() if isinstance(value, str))  # no paths
    assert protocol["recipe"] is None  # a configuration of its own
    assert "the encoder was trained with crop_size 12, not 28" in caplog.text  # where nothing else is said
    network = json.loads((result.dir / "args.json").read_text())
    assert (network["backbone"]["stem"], network["pretrain_method"]) == ("small", "byol")  # whatever is evaluated next
    backbone = load_encoder(whole.dir)[0].state_dict()
    if not cached:  # the encoder, its batch statistics included, has not moved
        after = load_checkpoint(result.checkpoint)["state_dict"]
        assert all(torch.equal(after[f"backbone.{k}"], x) for k, x in backbone.items())


def test_the_untrained_encoder_is_the_one_that_the_pretraining_started_from(tmp_path):
    cfg = config(tmp_path, optimizer__lr=0.0, scheduler__name="none", limit_train_batches=1, max_epochs=1)
    pretrained = pretrain(cfg)
    start = load_checkpoint(pretrained.checkpoint)["state_dict"]
    cfg = config(tmp_path, "linear", untrained=True, max_epochs=1)
    after = load_checkpoint(linear(cfg).checkpoint)["state_dict"]
    weights = [name for name in after if name.startswith("backbone.") and name.endswith("weight")]
    assert weights and all(torch.equal(after[name], start[name]) for name in weights)


def test_knn_evaluation_of_a_run(whole, capsys, caplog):
    raw = {
        "pretrained_feature_extractor": str(whole.dir),
        "data": {"dataset": "fashion_mnist_mini", "fraction": 0.01},
    }
    results = knn(resolve({**raw, "accelerator": "cpu", "precision": 16, "knn_eval": {"k": [1, 20]}}, "knn"))
    assert caplog.text.count("instead of 16") == 1
    written = json.loads((whole.dir / "knn.json").read_text())["results"]
    assert [{key: (row | row["protocol"])[key] for key in results[0]} for row in written] == results
    assert {(r["distance"], r["k"]) for r in results} >= {("cosine", 1), ("cosine", 20)}
    assert all(0 <= r["acc1"] <= r["acc5"] <= 100 for r in results) and "acc@1" in capsys.readouterr().out


PAIRS = {  # one key, for linear and for kNN, that makes another evaluation
    "linear": [
        *("finetune=true", "data.fraction=0.02", "data.val_fraction=0.3", "data.augmentations.crop_size=14"),
        *("data.augmentations.mean=[0.2,0.2,0.2]", "data.corrupt=skip", "max_epochs=2", "seed=6", "optimizer.lr=0.1"),
        *("optimizer.weight_decay=0.1", "optimizer.batch_size=10", "scheduler.name=none", "label_smoothing=0.1"),
        *("mixup=0.5", "cutmix=0.5", "limit_train_batches=1", "limit_val_batches=2", "precision=bf16-mixed"),
        *("accumulate_grad_batches=2", "gradient_clip_val=1.0", "backbone.kwargs.zero_init_residual=true"),
    ],
    "knn": [
        *("data.fraction=0.02", "data.val_fraction=0.3", "data.augmentations.crop_size=14", "knn_eval.k=[3]"),
        *("knn_eval.T=[0.2]", "knn_eval.distance_func=[euclidean]", "precision=bf16-mixed"),
    ],
}


@pytest.mark.parametrize(("kind", "change"), [(kind, change) for kind, changes in PAIRS.items() for change in changes])
def test_evaluations_that_differ_in_one_key_stand_side_by_side(whole, tmp_path, monkeypatch, kind, change):
    """Without training: what is recorded is at stake."""
    run, figures = copy_of(whole, tmp_path), {"acc1": 1.0, "acc5": 2.0}
    monkeypatch.setattr(evaluate, "_features", lambda *args: ())
    monkeypatch.setattr(evaluate, "knn_accuracy", lambda *args, k, **_: dict.fromkeys(k, figures))
    result = RunResult(tmp_path / "linear", None, {"val_acc1": 1.0, "val_acc5": 2.0}, 0.0, None)
    monkeypatch.setattr(evaluate, "fit", lambda *args: result)
    few = ["data.fraction=0.01", "accelerator=cpu", *(["knn_eval.k=[1]"] if kind == "knn" else ["max_epochs=3"])]
    few += ["optimizer.batch_size=16"] * (kind == "linear") + ["knn_eval.distance_func=[cosine]"] * (kind == "knn")
    command = {"linear": linear, "knn": knn}[kind]
    for overrides in (few, [*few, change], few):
        command(resolve(run_values(run.dir, kind, overrides), kind))
    first, second = json.loads((run.dir / f"{kind}.json").read_text())["results"]
    assert first["protocol"] != second["protocol"]
    assert [row["protocol"]["sha256"] for row in (first, second)] == [sha256(whole.checkpoint)] * 2


def copy_of(whole, folder):
    shutil.copytree(whole.dir, folder / "byol" / "run", ignore=shutil.ignore_patterns("linear.json", "knn.json"))
    return Run(folder / "byol" / "run")


def test_the_same_checkpoint_name_with_other_weights_is_another_encoder(whole, tmp_path):
    run = copy_of(whole, tmp_path)
    for _ in range(2):
        knn(resolve(run_values(run.dir, "knn", ["data.fraction=0.01", "knn_eval.k=[1]", "accelerator=cpu"]), "knn"))
        content = load_checkpoint(run.checkpoints[0])
        content["state_dict"]["backbone.conv1.weight"] += 0.01
        save_checkpoint(content, run.checkpoints[0])
    protocols = [result["protocol"] for result in Run(run.dir).evaluations["knn.json"]]
    assert len({protocol["sha256"] for protocol in protocols}) == 2 and len(protocols) == 4
    assert len({protocol["checkpoint"] for protocol in protocols}) == 1


def test_which_result_stands_for_a_run(whole, tmp_path):
    """The newest checkpoint's; by the method's own recipe, then with augmentation, then the latest; never another's."""
    folder, name = copy_of(whole, tmp_path).dir, whole.checkpoint.name
    own = {"data.dataset": "fashion_mnist_mini", "data.fraction": -1.0, "sha256": "a", "checkpoint": name}
    ladder = [
        {"checkpoint": name.replace("ep=2", "ep=1"), "augmented": True, "recipe": "linear/x/byol"},
        {"augmented": False},
        {"augmented": False, "seed": 6},
        {"augmented": True},
        {"augmented": True, "recipe": "linear/x/byol"},
    ]
    for number, change in enumerate(ladder):
        Run(folder).add_results("linear.json", [{"protocol": own | change, "acc1": float(number)}])
        assert Run(folder).standard("linear.json")["acc1"] == number
    for change in reversed(ladder[:-1]):
        Run(folder).add_results("linear.json", [{"protocol": own | change, "acc1": 50.0}])
    assert Run(folder).standard("linear.json")["acc1"] == len(ladder) - 1
    for change in ({"finetune": True}, {"data.fraction": 0.1}, {"data.dataset": "cifar10"}, {"a_later_key": 1}):
        Run(folder).add_results("linear.json", [{"protocol": own | ladder[-1] | change, "acc1": 99.0}])
    assert Run(folder).standard("linear.json")["acc1"] == len(ladder) - 1
    assert len(Run(folder).evaluations["linear.json"]) == len(ladder) + 4


def test_another_folder_of_the_same_kind_is_other_data(tmp_path):
    """The name `custom` does not say which images."""
    record = {"data": {"val": {"fingerprint": "ours"}}}
    for name, content in (("args", {"method": "byol", "data": {"dataset": "custom"}}), ("environment", record)):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    for images in ("ours", "theirs"):
        protocol = {"data.dataset": "custom", "data.val.fingerprint": images}
        Run(tmp_path).add_results("linear.json", [{"protocol": protocol, "acc1": 1.0 if images == "ours" else 9.0}])
    assert Run(tmp_path).standard("linear.json")["acc1"] == 1.0


def test_evaluations_at_the_same_time_lose_nothing(tmp_path):
    (tmp_path / "args.json").write_text("{}")

    def add(number):
        Run(tmp_path).add_results("linear.json", [{"protocol": {"seed": number}, "acc1": 1.0}])

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(add, range(40)))
    assert {x["protocol"]["seed"] for x in Run(tmp_path).evaluations["linear.json"]} == {*range(40)}


@pytest.mark.parametrize("kind", ["knn", "linear"])
def test_where_nothing_can_be_written_the_result_is_printed_and_can_go_elsewhere(whole, tmp_path, capsys, kind):
    run = copy_of(whole, tmp_path)
    (run.dir / f".{kind}.json.tmp").mkdir()  # in the way of every user, root included
    words = [kind, "--run", str(run.dir), "data.fraction=0.01", "accelerator=cpu"]
    words += ["cache_features=true", "max_epochs=2", f"checkpoint.dir={tmp_path}"] if kind == "linear" else []
    before = names(run.dir)
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert ("acc@1" if kind == "knn" else "val_acc1") in out
    assert f"{kind}.json cannot be written: Is a directory; --out takes the results to another folder" in err
    assert names(run.dir) == before
    assert main([*words, "--out", str(tmp_path / "a" / "b")]) == 0
    kept = Run(tmp_path / "a" / "b")
    assert kept.args == run.args and kept.evaluations[f"{kind}.json"] and names(run.dir) == before
    assert main([*words, "--out", str(tmp_path / "a" / "b")]) == 0
    other = run.args | {"seed": 77}
    (tmp_path / "a" / "b" / "args.json").write_text(json.dumps(other))
    capsys.readouterr()
    assert main([*words, "--out", str(tmp_path / "a" / "b")]) == 2
    assert "b has the args.json of another run; name another folder" in capsys.readouterr().err
    assert Run(kept.dir).args == other


def test_untrained_networks_have_folders_of_their_own(tmp_path):
    folders = set()
    for change in ({}, {"backbone__stem": "imagenet"}, {"seed": 1}, {"backbone__last_norm": True}):
        for kind in ("linear", "knn"):
            values = plain(config(tmp_path, "linear", untrained=True, **change))
            keys = ("backbone", "data", "seed", "checkpoint", "untrained", "pretrain_method")
            cfg = resolve(values if kind == "linear" else {key: values[key] for key in keys}, kind)
            folders.add(evaluate.untrained_folder(cfg))
    small = evaluate.untrained_folder(config(tmp_path, "linear", untrained=True, backbone__stem="small"))
    assert len(folders) == 4 and small in folders  # auto is that here


@pytest.mark.parametrize(
    ("overrides", "taken"),
    [
        ([], True),
        (["optimizer.lr=0.1"], False),
        (["scheduler.lr_decay_steps=[50]"], False),
        (["max_epochs=50"], False),
        (["optimizer.kwargs.momentum=0.8"], False),
        (["data.num_workers=0", "seed=3"], True),
        (["cache_features=true"], False),
    ],
)
def test_a_recipe_counts_as_taken_if_nothing_in_it_was_changed(whole, overrides, taken):
    cfg = resolve(run_values(whole.dir, "linear", overrides), "linear")
    assert recipe_taken(cfg) == ("linear/fashion_mnist_mini/byol" if taken else None)


def test_without_an_encoder_there_is_nothing_to_evaluate(tmp_path):
    with pytest.raises(ConfigError, match="pretrained_feature_extractor is missing"):
        linear(config(tmp_path, "linear"))


class Caught(Exception):
    """The arguments of what would have trained or counted."""

    def __init__(self, *args, **kwargs):
        self.args, self.kwargs = args, kwargs


def caught(monkeypatch, name, command, cfg):
    def catch(*args, **kwargs):
        raise Caught(*args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(evaluate, name, catch)
        with pytest.raises(Caught) as error:
            command(cfg)
    return error.value


def test_the_protocol_of_linear(whole, tmp_path, monkeypatch):
    """Random crops, another one each time, of shuffled images; the encoder in eval mode; the rest as configured."""
    options = {"pretrained_feature_extractor": str(whole.dir), "optimizer__weight_decay": 0.25}
    schedule = {"scheduler__name": "step", "scheduler__lr_decay_steps": [1, 2], "accumulate_grad_batches": 3}
    cfg = config(tmp_path, "linear", **options, **schedule, devices="2", label_smoothing=0.1, seed=7)
    fitted, model, data, _ = caught(monkeypatch, "fit", linear, cfg).args
    assert data.seed == 7
    assert (fitted.max_epochs, data.batch_size, fitted.optimizer.effective_lr) == (3, 16, 0.5 * 16 * 2 / 256)
    assert model.optimizer_cfg == fitted.optimizer and model.optimizer_cfg.weight_decay == 0.25
    assert model.scheduler_cfg.lr_decay_steps == [1, 2] and model.options.label_smoothing == 0.1
    assert not any(module.training for module in model.train().backbone.modules())
    views, orders = [], []
    loader = data.train_dataloader()
    for epoch in range(2):
        loader.sampler.set_epoch(epoch)
        batches = list(loader)
        indexes = torch.cat([index for index, *_ in batches])
        views.append(torch.cat([view for _, (view,), _ in batches])[indexes.argsort()])
        orders.append(indexes.tolist())
    assert orders[0] != orders[1] and orders[0] != sorted(orders[0])
    assert all(not torch.equal(a, b) for a, b in zip(*views, strict=False))


def test_the_protocol_of_cached_linear(whole, tmp_path, monkeypatch):
    options = {"pretrained_feature_extractor": str(whole.dir), "cache_features": True, "seed": 7}
    options["data__augmentations"] = {"crop_size": 12}
    call = caught(monkeypatch, "fit_cached_linear", linear, config(tmp_path, "linear", **options))
    [optimizer] = call.kwargs["optimizers"]
    assert (optimizer.batch_size, optimizer.rates()[0]) == (16, 0.5 * 16 / 256)
    assert (call.kwargs["epochs"], call.kwargs["seed"], call.kwargs["scheduler"].name) == (3, 7, "warmup_cosine")
    assert_features_of_whole_images(call.args, whole)


def test_the_protocol_of_knn(whole, monkeypatch):
    options = ["data.fraction=0.01", "knn_eval.k=[3,5]", "knn_eval.distance_func=[cosine]", "knn_eval.T=[0.2]"]
    call = caught(monkeypatch, "knn_accuracy", knn, resolve(run_values(whole.dir, "knn", options), "knn"))
    assert call.kwargs == {"k": [3, 5], "distance": "cosine", "temperature": 0.2}
    assert_features_of_whole_images(call.args, whole)


def assert_features_of_whole_images(features, run):
    """Bank: of the training images; queries: of all test images; un-augmented, by the encoder in eval mode."""
    backbone = load_backbone(run.dir)
    for split, (found, labels) in (("train", features[:2]), ("test", features[2:])):
        images = load_dataset(DataConfig("fashion_mnist_mini", fraction=0.01), split)
        assert labels.tolist() == images.targets.tolist()
        chosen = range(0, len(images), 10)
        pixels = torch.stack([backbone.transform(Image.fromarray(np.asarray(images.images[i])[0])) for i in chosen])
        with torch.no_grad():
            torch.testing.assert_close(found[::10], backbone(pixels), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["knn", "linear"])
def test_the_images_are_read_for_the_device_that_evaluates_them(whole, tmp_path, monkeypatch, kind):
    """`cpu:0` works as `cpu` does, and yet is another device: it stands for a GPU."""
    devices, make_loader = [], modules.make_loader

    def noted(data, views, device, **batching):
        devices.append(device)
        return make_loader(data, views, device, **batching)

    monkeypatch.setattr(modules, "make_loader", noted)
    monkeypatch.setattr(TrainerConfig, "first_device", torch.device("cpu", 0))
    options = {"pretrained_feature_extractor": str(whole.dir)}
    if kind == "knn":
        data = {"dataset": "fashion_mnist_mini", "fraction": 0.01}
        knn(resolve({**options, "data": data, "accelerator": "cpu", "knn_eval": {"k": [1]}}, "knn"))
    else:
        linear(config(tmp_path, "linear", max_epochs=1, cache_features=True, scheduler__name="none", **options))
    assert devices and {*devices} == {torch.device("cpu", 0)}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_reads_the_images_that_it_evaluates(whole):
    data = {"dataset": "fashion_mnist_mini", "fraction": 0.01}
    raw = {"pretrained_feature_extractor": str(whole.dir), "data": data, "knn_eval": {"k": [1]}}
    on_gpu, on_cpu = (knn(resolve({**raw, "accelerator": accelerator}, "knn")) for accelerator in ("gpu", "cpu"))
    assert [row["acc1"] for row in on_gpu] == pytest.approx([row["acc1"] for row in on_cpu], abs=1)


def test_what_is_named_twice_counts_once(whole, capsys):
    raw = {"pretrained_feature_extractor": str(whole.dir), "data": {"dataset": "fashion_mnist_mini", "fraction": 0.01}}
    twice = {"k": [20, 1, 20], "distance_func": ["cosine", "cosine"], "T": [0.07, 0.1, 0.07]}
    rows = knn(resolve({**raw, "accelerator": "cpu", "knn_eval": twice}, "knn"))
    assert [(row["k"], row["T"]) for row in rows] == [(20, 0.07), (1, 0.07), (20, 0.1), (1, 0.1)]
    assert all(row["acc1"] <= row["acc5"] <= 100 for row in rows)


def test_the_encoder_of_a_linear_run_keeps_its_view(whole, tmp_path):
    """Crop size, mean and std go with it to the next evaluation and to other code."""
    view = {"crop_size": 20, "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    options = {"pretrained_feature_extractor": str(whole.dir), "pretrain_method": "byol", "data__augmentations": view}
    run = linear(config(tmp_path, "linear", max_epochs=1, scheduler__name="none", **options)).dir
    cfg = resolve(run_values(run, "knn"), "knn")
    assert plain(cfg.data.augmentations) == view and cfg.pretrain_method == "byol"
    transform = load_backbone(run).transform
    assert transform.size == 20 and transform.mean.tolist() == pytest.approx(view["mean"])
    assert transform.std.tolist() == pytest.approx(view["std"])


def further(checkpoint, epoch):
    """A later checkpoint beside `checkpoint`, of the same network with other weights."""
    content = load_checkpoint(checkpoint)
    content["state_dict"] = {key: x * 1.5 if x.ndim > 1 else x for key, x in content["state_dict"].items()}
    path = checkpoint.with_name(re.sub(r"ep=\d+", f"ep={epoch}", checkpoint.name))
    save_checkpoint({**content, "epoch": epoch}, path)
    return path


def test_an_interrupted_evaluation_does_not_continue_with_another_encoder(whole, tmp_path):
    """Its checkpoint has the encoder that it began with, which has been trained further in the meantime."""
    encoder = tmp_path / "encoder"
    shutil.copytree(whole.dir, encoder)
    options = {"pretrained_feature_extractor": str(encoder), "scheduler__name": "none", "max_epochs": 2}
    first = linear(config(tmp_path, "linear", checkpoint__keep_prev=True, **options)).dir
    (first / "result.json").unlink()
    [last] = first.glob("*ep=1.ckpt")
    last.unlink()
    later = further(next(encoder.glob("*ep=2.ckpt")), 3)
    with pytest.raises(CheckpointError, match=r"was trained with another encoder: [0-9a-f]{64} -> [0-9a-f]{64}"):
        linear(config(tmp_path, "linear", resume_from_checkpoint=str(first), **options))
    second = linear(config(tmp_path, "linear", **options))
    evaluated, trained = (load_checkpoint(file)["state_dict"] for file in (second.checkpoint, later))
    assert torch.equal(evaluated["backbone.conv1.weight"], trained["backbone.conv1.weight"])
    assert second.dir != first
    later.unlink()
    assert linear(config(tmp_path, "linear", **options)).dir == first  # which goes on where the encoder is back


def vit_run(folder, method="byol", **kwargs):
    """The folder of a pre-training of a small ViT whose weights are those of the initialisation."""
    vit = {"img_size": 28, "patch_size": 14, "depth": 1, **kwargs}
    cfg = config(folder, method=method, backbone__name="vit_tiny", backbone__kwargs=vit)
    folder.mkdir()
    (folder / "args.json").write_text(json.dumps(plain(cfg) | {"method": method}))
    state = {f"backbone.{key}": x for key, x in bare_backbone(plain(cfg)).state_dict().items()}
    save_checkpoint({"state_dict": state}, folder / "x-ep=0.ckpt")
    return folder


@pytest.mark.parametrize("kind", ["knn", "linear"])
def test_a_crop_that_the_encoder_cannot_take_is_refused(tmp_path, kind):
    overrides = ["data.augmentations.crop_size=24", "data.fraction=0.1", f"checkpoint.dir={tmp_path}"]
    cfg = resolve(run_values(vit_run(tmp_path / "vit"), kind, overrides), kind)
    with pytest.raises(
        ConfigError, match=r"backbone.name: vit_tiny cannot take crops of 24 px \(data.+=28 suits it\): Inp"
    ):
        {"knn": knn, "linear": linear}[kind](cfg)
    assert names(tmp_path) == ["vit"] and names(tmp_path / "vit") == ["args.json", "checkpoints.json", "x-ep=0.ckpt"]


@pytest.mark.parametrize("run", ["small stem", "twelve heads"])
def test_the_untrained_encoder_of_a_run_is_its_network_whatever_the_images(whole, tmp_path, run):
    folder = whole.dir if run == "small stem" else vit_run(tmp_path / "vit", "mocov3")
    overrides = ["untrained=true", "data.dataset=custom", "data.train_path=a", "data.val_path=b"]
    cfg = resolve(run_values(folder, "knn", overrides), "knn")
    trained, untrained = (str(backbone) for backbone in (load_encoder(folder)[0], backbone_of(cfg).eval()))
    assert untrained == trained and cfg.backbone.kwargs.get("num_heads", 12) == 12


def test_a_mistyped_method_gives_no_untrained_encoder_other_heads(tmp_path):
    options = {"untrained": True, "backbone__name": "vit_tiny", "pretrain_method": "moco_v3"}
    with pytest.raises(CheckpointError, match=r"vit_tiny has other heads by .*not 'moco_v3'; did you mean 'mocov3'"):
        linear(config(tmp_path, "linear", **options))


def test_another_method_than_the_encoders_is_said(whole, tmp_path, caplog):
    options = {"pretrained_feature_extractor": str(whole.dir), "cache_features": True, "scheduler__name": "none"}
    linear(config(tmp_path, "linear", pretrain_method="dino", max_epochs=1, **options))
    assert "pretrain_method is dino, but the encoder's is byol" in caplog.text


def test_the_teacher_is_evaluated_beside_the_student(whole, tmp_path):
    """By knn and linear, and the standard figure of the run stays the student's."""
    run = Run(shutil.copytree(whole.dir, tmp_path / "run"))
    short = ["cache_features=true", "max_epochs=1", f"checkpoint.dir={tmp_path}"]
    for teacher in (False, True):
        knn(resolve(run_values(run.dir, "knn", [f"teacher={teacher}"]), "knn"))
        linear(resolve(run_values(run.dir, "linear", [f"teacher={teacher}", *short]), "linear"))
    run = Run(run.dir)
    for name in (KNN, LINEAR):
        sums = {}
        for result in run.evaluations[name]:
            sums.setdefault(result["protocol"]["branch"], set()).add(result["protocol"]["encoder"])
        encoders = [weights_sum(load_encoder(run.dir, teacher=teacher)[0]) for teacher in (False, True)]
        assert sums == {"student": {encoders[0]}, "teacher": {encoders[1]}} and encoders[0] != encoders[1]
        assert run.standard(name)["protocol"]["branch"] == "student"
    alone = export(run.dir, "safetensors", tmp_path / "student").folder
    with pytest.raises(CheckpointError, match="holds no backbone of a teacher"):
        knn(resolve(run_values(alone, "knn", ["teacher=true"]), "knn"))


def test_the_encoder_of_a_linear_run_is_the_teachers_where_it_was(whole, tmp_path):
    exported = export(whole.dir, "safetensors", tmp_path / "exported", teacher=True).folder
    options = {"pretrained_feature_extractor": str(exported), "scheduler__name": "none", "max_epochs": 1}
    run = linear(config(tmp_path, "linear", **options)).dir
    assert export(run, "safetensors", tmp_path / "again").record["teacher"] is True
