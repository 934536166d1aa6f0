"""`solo-ext plan --detect`: numbers against those of the detector that detect builds and trains."""

import copy
import json

import pytest
import torch
from PIL import Image
from tiny_runs import config

import solo_ext.cli.main as cli
from solo_ext.evaluation.detection import DetectionModel
from solo_ext.methods import backbone_of
from solo_ext.planning.measure import synthetic_batch
from solo_ext.planning.plan import plan
from solo_ext.training.config import resolve
from solo_ext.training.pretrain import pretrain

pytest.importorskip("pycocotools")
SIDE = 64
TINY = ["backbone.name=resnet10_w16", "accelerator=cpu", "detector.min_size=[48,64]", "detector.regions=16"]
VOC = """<annotation><size><width>8</width><height>8</height></size><object><name>{}</name><bndbox>
<xmin>1</xmin><ymin>1</ymin><xmax>4</xmax><ymax>4</ymax></bndbox></object></annotation>"""


def detector(dataset="voc", head="c4", masks=False, **changes):
    options = {"head": head, "min_size": [48, SIDE], "anchors": [8, 16, 32, 64, 128], "masks": masks, "regions": 16}
    data = {"dataset": dataset, "train_path": "nowhere.json", "fraction": -1, "num_workers": 0}
    optimizer = {"name": "sgd", "batch_size": 1, "lr": 0.32}
    changes = {"detector": options, "data": data, "optimizer": optimizer, "untrained": True} | changes
    return config("nowhere", "detect", **changes)


def built(cfg, classes):
    view = (0.5,) * 3, (0.2,) * 3
    options = classes, cfg.optimizer, cfg.scheduler, cfg.detector, *view, cfg.finetune
    return DetectionModel(backbone_of(cfg), *options)


@pytest.mark.parametrize("finetune", [True, False])
@pytest.mark.parametrize(("dataset", "head", "masks", "classes"), [("voc", "c4", False, 20), ("coco", "fpn", True, 80)])
def test_a_detector_has_as_many_parameters(dataset, head, masks, classes, finetune):
    cfg = detector(dataset, head, masks, finetune=finetune)
    model, found = built(cfg, classes), plan(cfg, measure=False)
    assert found["parameters"] == sum(p.numel() for p in model.parameters())
    assert found["trained_parameters"] == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert found["encoder_parameters"] == sum(p.numel() for p in backbone_of(cfg).parameters())
    rest = found["parameters"] - found["trained_parameters"]
    assert rest == (0 if finetune else found["encoder_parameters"])
    assert (found["classes"], found["images"], found["steps"]) == (classes, None, None)
    assert "nowhere.json" in found["images_unknown"] and json.dumps(found)


@pytest.mark.parametrize(("head", "masks"), [("c4", True), ("fpn", False)])
@pytest.mark.parametrize("batch", [1, 4])
def test_a_step_is_measured_with_one_image_and_scaled(head, masks, batch):
    """On a CPU: weights, gradients and momentum once, for each image what the backward pass keeps."""
    cfg = detector(head=head, masks=masks, **{"optimizer__batch_size": batch})
    torch.manual_seed(0)
    found, saved = plan(cfg), {}
    cfg.detector.min_size = [SIDE]  # as a plan has it
    torch.manual_seed(0)
    model = built(cfg, 20)

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    model.log_dict = lambda *_, **__: None
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model.training_step(synthetic_batch(cfg, 1, torch.device("cpu")), 0)
    weights = list(model.state_dict().values())
    activations = sum(saved.values()) - sum(saved.get(tensor.data_ptr(), 0) for tensor in weights)
    stay = sum(x.nbytes for x in weights) + 2 * sum(p.nbytes for p in model.parameters())
    measured = found["measured"]
    assert loss.requires_grad and found["measured_size"] == (SIDE, 85) and measured["images"] == 1
    assert measured["memory"] == pytest.approx(stay + batch * activations, rel=0.25)  # regions are drawn
    assert measured["steps"] >= 2 and 0 < measured["quartiles"][0] <= measured["seconds"]
    assert found["warnings"] == (
        ["optimizer.batch_size: 1, so that each BatchNorm sees one image; take 2, or sync_batchnorm with devices"]
        if batch == 1
        else []
    )


def test_a_measured_step_trains_what_detect_trains():
    before, cfg = {}, detector(finetune=False)
    trained = DetectionModel.configure_optimizers

    def remember(self):
        before.update(model=self, state=copy.deepcopy(self.state_dict()))
        return trained(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DetectionModel, "configure_optimizers", remember)
        plan(cfg)
    moved = {k for k, x in before["model"].state_dict().items() if not torch.equal(x, before["state"][k])}
    assert (
        "detector.rpn.head.cls_logits.weight" in moved and "detector.roi_heads.box_predictor.cls_score.weight" in moved
    )
    assert "detector.roi_heads.box_head.0.norm.running_mean" in moved
    assert not any(".body." in k or ".layer4." in k for k in moved)


@pytest.fixture
def run(capsys, tmp_path, monkeypatch):
    """Runs `solo-ext plan --detect` in an empty folder; returns (exit status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    return lambda *argv: (cli.main(["plan", *map(str, argv)]), *capsys.readouterr())


def test_text_of_a_measured_one(run):
    status, out, err = run("--detect", "voc/c4", *TINY, "optimizer.batch_size=2", "devices=8", "accelerator=cpu")
    assert status == 0 and not err
    for words in (
        "Faster R-CNN, C4, 20 classes assumed, on voc",
        "resnet10_w16, with random weights: 309,456 of these parameters, trained",
        "shorter side 48 to 64 px, 64 in a test; longer side 1333 px at most",
        "unknown number of images: data.train_path: there is no file",
        "16 images each (batch size 2, devices 8, accumulated batches 1); 24,000 at most",
        "0.02 (configured: 0.32 per 256 images); warm-up 100 steps, a tenth from step 18,000, again from 22,000",
        "measured with 1 images and scaled to 2; images of 64 x 85 px",
        "on one device alone",
        "at most, without loading images and tests",
    ):
        assert words in out, out


def test_steps_of_images_that_are_there(run, tmp_path):
    for name in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (tmp_path / name).mkdir(parents=True)
    for i in range(10):
        Image.new("RGB", (8, 8)).save(tmp_path / "JPEGImages" / f"{i}.png")
        (tmp_path / "Annotations" / f"{i}.xml").write_text(VOC.format("cat" if i else "dog"))
    listed = tmp_path / "ImageSets" / "Main" / "trainval.txt"
    listed.write_text("".join(f"{i}\n" for i in range(10)))
    words = ["--detect", "voc/c4", *TINY, f"data.train_path={listed}", "optimizer.batch_size=4", "--no-measure"]
    found = json.loads(run(*words, "--json")[1])
    assert (found["images"], found["classes"], found["steps_per_epoch"], found["steps"]) == (10, 2, 2, 48)
    assert found["effective_lr"] == 0.32 * 4 / 256 and found["decay_steps"] == [18000, 22000]
    assert found["warnings"] == ["scheduler.lr_decay_steps: 22,000 is not reached in 48 steps"]
    found = json.loads(run(*words, "--json", "max_steps=7", "scheduler.lr_decay_steps=[5]")[1])
    assert found["steps"] == 7 and found["warnings"] == []
    assert "2 an epoch, 48 in 24 epochs" in run(*words)[1]
    found = json.loads(run(*words, "--json", "optimizer.batch_size=11")[1])
    assert found["warnings"][0].startswith("optimizer.batch_size: the 10 images on each device do not fill a batch")


def test_the_encoder_of_a_run(run, tmp_path, capsys):
    source = pretrain(config(tmp_path, max_epochs=1)).dir
    capsys.readouterr()
    words = ["--detect", "voc/c4", "--no-measure", "--json", "--run", source]
    found = json.loads(run(*words, *TINY)[1])
    assert str(source) in found["encoder"] and found["encoder_parameters"] == 307_536  # its stem is of small images
    status, _, err = run(*words)
    assert status == 2 and "holds a resnet10_w16" in err and "backbone.name is resnet50" in err


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["voc/c4", "backbone.name=vit_tiny"], "a detector takes a ResNet"),
        (["voc/c4", "data.dataset=cifar10"], "'cifar10' has no boxes (one of voc, coco)"),
        (["voc/c4", "detector.heads=fpn"], "did you mean 'detector.head'?"),
        (["voc/c5"], "did you mean 'voc/c4'"),
        (["voc/c4", "--run", "nothing"], "there is no 'nothing'"),
        ([], "which YAML?"),
    ],
)
def test_mistakes_are_one_sentence(run, argv, words):
    status, out, err = run("--detect", *argv, "--no-measure")
    assert status == 2 and not out and err.count("\n") == 1 and words in err, err


def test_only_a_detector_has_a_run(run):
    status, _, err = run("cifar10/byol", "--run", "x")
    assert status == 2 and "goes with --detect" in err


def test_every_recipe_can_be_planned():
    from conftest import ROOT

    from solo_ext.training.compose import compose

    for file in sorted((ROOT / "scripts" / "detect").glob("[!_]*/*.yaml")):
        small = ["backbone.name=resnet10_w16", "devices=8", "optimizer.batch_size=2", "accelerator=gpu"]
        found = plan(resolve(compose(file.parent, file.name, small), "detect"), measure=False)
        assert found["warnings"] == [] and found["effective_lr"] == pytest.approx(0.02), file
