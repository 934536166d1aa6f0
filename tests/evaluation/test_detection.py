"""Transfer to object detection: annotations of both layouts, the detector, its training, and its figures."""

import json
import os
import shutil
import subprocess
import sys
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_runs import config, crash
from trials import ALL

import solo_ext
from solo_ext.cli.main import main
from solo_ext.data.boxes import outlines, read_boxes
from solo_ext.data.datasets import IMAGENET_MEAN, IMAGENET_STD, MINI, DataConfig
from solo_ext.data.detection import DetectionData
from solo_ext.errors import ConfigError, DataError
from solo_ext.evaluation.detection import DetectionModel, build_detector, counted, percentages, trained_on
from solo_ext.evaluation.finetune import DetectorConfig
from solo_ext.networks import BackboneConfig
from solo_ext.networks.backbones import build_backbone
from solo_ext.runs.checkpoints import load_checkpoint
from solo_ext.runs.run import Run
from solo_ext.training.compose import to_yaml
from solo_ext.training.evaluate import detect
from solo_ext.training.pretrain import pretrain

pytest.importorskip("pycocotools")
SIDE, ITEM = 64, 28
NAMES = ("shirt", "shoe", "bag")
CLOTHES = (0, 9, 8)  # their labels in the bundled images


def scenes(count, seed=0):
    """Pictures [SIDE, SIDE, 3] with one to three clothes on gray, and (name, left, top, right, bottom) of each."""
    rng = np.random.default_rng(seed)
    with np.load(MINI) as arrays:
        images, labels = arrays["train_images"], arrays["train_labels"]
    for _ in range(count):
        picture = np.full((SIDE, SIDE, 3), 90, np.uint8)
        found = []
        for cell in rng.permutation(4)[: rng.integers(1, 4)]:
            left, top = (int(32 * n + rng.integers(0, 4)) for n in divmod(int(cell), 2))
            kind = int(rng.integers(3))
            item = images[rng.choice(np.flatnonzero(labels == CLOTHES[kind]))]
            picture[top : top + ITEM, left : left + ITEM] = item[..., None]
            found.append((NAMES[kind], left, top, left + ITEM, top + ITEM))
        yield picture, found


def write_voc(folder, count=8, difficult=()):
    for name in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (folder / name).mkdir(parents=True)
    for i, (picture, found) in enumerate(scenes(count)):
        Image.fromarray(picture).save(folder / "JPEGImages" / f"{i:03}.png")
        objects = "".join(
            f"<object><name>{name}</name><difficult>{int((i, j) in difficult)}</difficult><bndbox>"
            f"<xmin>{left + 1}</xmin><ymin>{top + 1}</ymin><xmax>{right}</xmax><ymax>{bottom}</ymax></bndbox></object>"
            for j, (name, left, top, right, bottom) in enumerate(found)
        )
        size = f"<size><width>{SIDE}</width><height>{SIDE}</height><depth>3</depth></size>"
        (folder / "Annotations" / f"{i:03}.xml").write_text(f"<annotation>{size}{objects}</annotation>")
    listed = folder / "ImageSets" / "Main" / "trainval.txt"
    listed.write_text("".join(f"{i:03}\n" for i in range(count)))
    return listed


def write_coco(folder, count=8, crowd=()):
    (folder / "annotations").mkdir(parents=True)
    (folder / "train2017").mkdir()
    images, annotations = [], []
    for i, (picture, found) in enumerate(scenes(count)):
        Image.fromarray(picture).save(folder / "train2017" / f"{i:03}.png")
        images.append({"id": 10 + i, "file_name": f"{i:03}.png", "width": SIDE, "height": SIDE})
        for j, (name, left, top, right, bottom) in enumerate(found):
            box = {"bbox": [left, top, right - left, bottom - top], "category_id": 5 * (1 + NAMES.index(name))}
            outline = [[left, top, right, top, right, bottom, left, bottom]]
            about = {"image_id": 10 + i, "iscrowd": int((i, j) in crowd), "id": len(annotations)}
            annotations.append({**box, **about, "segmentation": outline})
    categories = [{"id": 5 * (1 + n), "name": name} for n, name in enumerate(NAMES)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    file = folder / "annotations" / "instances_train2017.json"
    file.write_text(json.dumps(content))
    return file


def test_both_layouts_are_read_alike(tmp_path):
    voc = read_boxes(str(write_voc(tmp_path / "voc", difficult={(0, 0)})), "data.train_path")
    coco = read_boxes(str(write_coco(tmp_path / "coco", crowd={(0, 0)})), "data.train_path")
    assert voc.classes == tuple(sorted(NAMES)) and coco.classes == NAMES and len(voc) == len(coco) == 8
    for i, (picture, found) in enumerate(scenes(8)):
        for images in (voc, coco):
            assert np.array_equal(images.images[i].permute(1, 2, 0), picture)
            shown = images.objects[i]
            assert shown.boxes.tolist() == [[*box] for _, *box in found]
            assert [images.classes[label - 1] for label in shown.labels] == [name for name, *_ in found]
    assert voc.objects[0].difficult[0] and coco.objects[0].crowd[0]
    assert not voc.objects[0].crowd.any() and not coco.objects[0].difficult.any()
    masks = outlines(coco.objects[1], (SIDE, SIDE))
    for mask, (left, top, right, bottom) in zip(masks, coco.objects[1].boxes.astype(int), strict=True):
        assert mask[top:bottom, left:right].all() and mask.sum() == ITEM**2
    assert voc.record()["boxes"] == sum(len(found) for _, found in scenes(8)) and voc.record()["classes"] == 3


def test_two_sets_are_one(tmp_path):
    first, second = write_voc(tmp_path / "VOC2007", 3), write_voc(tmp_path / "VOC2012", 2)
    both = read_boxes(f"{first}:{second}", "data.train_path")
    assert len(both) == 5 and both.images.path(4) == str(tmp_path / "VOC2012/JPEGImages/001.png")
    assert both.fingerprint() != read_boxes(str(first), "data.train_path").fingerprint()


def test_a_part_of_the_images_keeps_its_boxes(tmp_path):
    listed = write_voc(tmp_path)
    whole = read_boxes(str(listed), "data.train_path")
    part = whole.subset(np.array([5, 2]))
    assert [x.boxes.tolist() for x in part.objects] == [whole.objects[i].boxes.tolist() for i in (5, 2)]
    data = DetectionData(DataConfig("voc", str(listed), str(listed), fraction=0.5), 2, 0, SIDE)
    assert len(data.train_set) == 4 and len(data.val_set) == 8


BOX = "<object><name>bag</name><bndbox><xmin>{}</xmin><ymin>1</ymin><xmax>{}</xmax><ymax>9</ymax></bndbox></object>"


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda f: (f / "Annotations/001.xml").write_text("<annotation>"), r"001\.xml is not an annotation of VOC's"),
        (lambda f: (f / "Annotations/001.xml").unlink(), r"001\.xml is not an annotation of VOC's: No such file"),
        (
            lambda f: (f / "JPEGImages/001.png").unlink(),
            r"names 1 images that are not in '.*JPEGImages' \(first: 001\)",
        ),
        (lambda f: shutil.rmtree(f / "JPEGImages"), "is no list in VOC's layout: there is no folder"),
        (lambda f: (f / "ImageSets/Main/trainval.txt").unlink(), "there is no file"),
        (
            lambda f: boxes(f, 50, 200),
            r"001\.xml: the box of 'bag' \(49, 0, 200, 9\) is empty or outside the image of 64 x",
        ),
        (lambda f: boxes(f, 50, 20), r"the box of 'bag' \(49, 0, 20, 9\) is empty"),
        (lambda f: boxes(f, "nan", 20), r"the box of 'bag' \(nan, 0, 20, 9\) is empty"),
        (lambda f: boxes(f, "x", 20), r"001\.xml is not an annotation of VOC's: could not convert"),
    ],
)
def test_an_annotation_that_cannot_work_is_one_sentence(tmp_path, damage, said):
    listed = write_voc(tmp_path)
    damage(tmp_path)
    with pytest.raises(DataError, match=f"^data.train_path: [^\n]*{said}[^\n]*$"):
        read_boxes(str(listed), "data.train_path")


def boxes(folder, left, right):
    size = f"<size><width>{SIDE}</width><height>{SIDE}</height></size>"
    (folder / "Annotations/001.xml").write_text(f"<annotation>{size}{BOX.format(left, right)}</annotation>")


def test_boxes_outside_may_be_left_out(tmp_path, caplog):
    listed = write_voc(tmp_path)
    boxes(tmp_path, 50, 200)
    images = read_boxes(str(listed), "data.train_path", skip=True)
    assert len(images) == 8 and len(images.objects[1].boxes) == 0
    assert "1 boxes are left out; the first: data.train_path:" in caplog.text


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: c.pop("categories"), "is not an annotation of COCO's: 'categories'"),
        (lambda c: c["annotations"][0].update(image_id=99), "names the image 99, which it does not have"),
        (lambda c: c["annotations"][0].update(category_id=77), "names the category 77, which it does not have"),
        (lambda c: c.update(images=[], annotations=[]), "' has no images"),
        (lambda c: c["images"][0].update(file_name="no.png"), "the images of .* are in none of"),
        (lambda c: c["images"][1].update(file_name="no.png"), r"names 1 images that are not in .* \(first: no.png\)"),
        (lambda c: c.update(annotations=[]), "there is no box in"),
    ],
)
def test_a_coco_file_that_cannot_work_is_one_sentence(tmp_path, change, said):
    file = write_coco(tmp_path)
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))
    with pytest.raises(DataError, match=f"^data.train_path: [^\n]*{said}[^\n]*$"):
        read_boxes(str(file), "data.train_path")


def test_mirrored_images_have_mirrored_boxes(tmp_path):
    file = str(write_coco(tmp_path))
    data = DetectionData(DataConfig("coco", file, file, num_workers=0), 8, 0, SIDE, masks=True)
    loader, mirrored = data.train_dataloader(), set()
    for epoch in range(3):
        loader.sampler.set_epoch(epoch)
        [(indexes, images, targets)] = loader
        for i, image, target in zip(indexes.tolist(), images, targets, strict=True):
            plain, shown = data.train_set.images[i], data.train_set.objects[i]
            mirror = not torch.equal(image, plain)
            mirrored.add(mirror)
            assert torch.equal(image, plain.flip(-1) if mirror else plain)
            for box, mask, old in zip(
                target["boxes"].int().tolist(), target["masks"], shown.boxes.tolist(), strict=True
            ):
                assert box == ([SIDE - old[2], old[1], SIDE - old[0], old[3]] if mirror else old)
                left, top, right, bottom = box
                assert mask[top:bottom, left:right].all() and mask.sum() == ITEM**2
    assert mirrored == {True, False}
    [(_, images, _)] = data.val_dataloader()
    assert all(torch.equal(image, data.val_set.images[i]) for i, image in enumerate(images))


def test_crowds_are_not_trained_on():
    ignored = {"difficult": torch.tensor([True, False, False]), "crowd": torch.tensor([False, True, False])}
    target = {"boxes": torch.arange(12.0).view(3, 4), "labels": torch.tensor([1, 2, 3]), **ignored}
    shown = trained_on(target)
    assert [*shown] == ["boxes", "labels"] and shown["labels"].tolist() == [1, 3]
    assert torch.equal(shown["boxes"], target["boxes"][[0, 2]])


def test_the_figures_are_pycocotools(tmp_path):
    """Of boxes beside, missed, doubled, of another class, difficult, and in a crowd."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    rng = np.random.default_rng(0)
    truths, guesses = [], []
    for i, (_, found) in enumerate(scenes(30, seed=3)):
        names = [name for name, *_ in found]
        box = torch.tensor([[*b] for _, *b in found], dtype=torch.float32)
        labels = torch.tensor([1 + NAMES.index(name) for name in names])
        ignored = torch.tensor([i % 5 == 0 and j == 0 for j in range(len(names))])
        truths.append({"boxes": box, "labels": labels, "difficult": ignored, "crowd": ignored & False})
        moved = torch.cat([box, box[:1]]) + torch.from_numpy(rng.normal(0, 2.5, (len(box) + 1, 4))).float()
        moved = moved.round()  # in whole pixels, float32 and float64 agree
        guessed = torch.cat([labels, labels[:1]])
        guessed[0] = 1 + int(rng.integers(3))
        scores = torch.from_numpy(rng.uniform(0, 1, len(moved))).float()
        guesses.append({"boxes": moved, "labels": guessed, "scores": scores})
    content = {
        "images": [{"id": i} for i in range(30)],
        "categories": [{"id": n} for n in (1, 2, 3)],
        "annotations": [],
    }
    results = []
    for i, (truth, guess) in enumerate(zip(truths, guesses, strict=True)):
        for b, label, crowd in zip(
            truth["boxes"].tolist(), truth["labels"].tolist(), truth["difficult"].tolist(), strict=True
        ):
            bbox = [b[0], b[1], b[2] - b[0], b[3] - b[1]]
            about = {"id": len(content["annotations"]) + 1, "image_id": i, "category_id": label, "iscrowd": int(crowd)}
            content["annotations"].append({**about, "bbox": bbox, "area": bbox[2] * bbox[3]})
        for b, label, score in zip(*(guess[key].tolist() for key in ("boxes", "labels", "scores")), strict=True):
            bbox = [b[0], b[1], b[2] - b[0], b[3] - b[1]]
            results.append({"image_id": i, "category_id": label, "bbox": bbox, "score": score})
    truth = COCO()
    truth.dataset = content
    truth.createIndex()
    evaluation = COCOeval(truth, truth.loadRes(results), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    score = DetectionModel(resnet(), 3, None, None, DetectorConfig(), (0.5,) * 3, (0.2,) * 3).score
    score.update(guesses, [counted(target) for target in truths])
    ours = percentages(score.compute())
    assert 20 < ours["val_ap"] < ours["val_ap50"] < 95
    assert [*ours.values()] == pytest.approx((100 * evaluation.stats[:3]).tolist(), abs=1e-4)


def resnet(name="resnet10_w16", **options):
    return build_backbone(BackboneConfig(name, **options))


@pytest.mark.parametrize(
    ("name", "head", "masks"),
    [*product(["resnet10_w16"], ["c4", "fpn"], [False, True]), ("resnet50", "c4", True), ("resnet50", "fpn", False)],
)
def test_a_detector_is_made_of_the_encoder(name, head, masks):
    backbone = resnet(name)
    weights = {k: x.data_ptr() for k, x in backbone.state_dict().items()}
    detector = build_detector(backbone, 3, DetectorConfig(head, [64], masks=masks, regions=32), (0.5,) * 3, (0.2,) * 3)
    held = {x.data_ptr() for x in detector.state_dict().values()}
    assert {*weights.values()} <= held
    image = torch.rand(3, 80, 96)
    box = {"boxes": torch.tensor([[8.0, 8.0, 40.0, 40.0]]), "labels": torch.tensor([2])}
    box |= {"masks": torch.ones(1, 80, 96, dtype=torch.bool)} if masks else {}
    losses = detector([image, image], [box, box])
    kinds = {"loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg"}
    assert losses.keys() == kinds | ({"loss_mask"} if masks else set())
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in backbone.parameters())
    detector.eval()
    [found] = detector([image])
    assert found["boxes"].shape == (len(found["labels"]), 4) and found["labels"].le(3).all()


@pytest.mark.parametrize(("name", "options"), [("vit_tiny", {}), ("resnet18", {"last_norm": True})])
def test_another_network_is_refused(name, options):
    with pytest.raises(ConfigError, match=r"^backbone\.name: a detector takes a ResNet"):
        build_detector(resnet(name, **options), 3, DetectorConfig(), (0.5,) * 3, (0.2,) * 3)


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sets")
    return {"voc": write_voc(folder / "voc"), "coco": write_coco(folder / "coco")}


def detection(folder, sets, dataset="voc", **changes):
    path = str(sets[dataset])
    changes = {
        "untrained": True,
        "backbone__stem": "small",
        "data": {"dataset": dataset, "train_path": path, "val_path": path, "num_workers": 0, "fraction": -1},
        "optimizer": {"name": "sgd", "batch_size": 4, "lr": 1.28},
        "scheduler": {"name": "warmup_step", "warmup_steps": 4, "lr_decay_steps": [200]},
        "detector": {"min_size": [SIDE], "anchors": [16, 32], "head": "c4", "regions": 32},
        "limit_val_batches": 1.0,
        "max_epochs": 2,
    } | changes
    return config(folder, "detect", **changes)


def test_a_detector_resumes_exactly(sets, tmp_path, monkeypatch):
    options = {"detector__precise_bn": 1, "detector__min_size": [48, SIDE]}
    cfg = detection(tmp_path / "cut", sets, **options)
    whole = load_checkpoint(detect(detection(tmp_path / "whole", sets, **options)).checkpoint)
    original, steps = DetectionModel.training_step, []

    def step(self, batch, i):
        steps.append(i)
        if len(steps) == 4:
            crash()
        return original(self, batch, i)

    monkeypatch.setattr(DetectionModel, "training_step", step)
    with pytest.raises(ZeroDivisionError):
        detect(cfg)
    resumed = load_checkpoint(detect(cfg).checkpoint)
    assert len(steps) == 6 and all(torch.equal(x, resumed["state_dict"][k]) for k, x in whole["state_dict"].items())


@pytest.mark.parametrize("finetune", [True, False])
def test_an_encoder_is_fine_tuned_or_stays(sets, tmp_path, finetune):
    run = pretrain(config(tmp_path, max_epochs=1))
    source = {"untrained": False, "pretrained_feature_extractor": str(run.dir)}
    cfg = detection(tmp_path, sets, finetune=finetune, max_epochs=1, detector__precise_bn=2, **source)
    result = detect(cfg)
    [row] = Run(run.dir).evaluations["detection.json"]
    assert row["ap"] == result.metrics["val_ap"] and row["protocol"]["finetune"] is finetune
    assert row["protocol"]["detector.head"] == "c4" and row["protocol"]["data.train.boxes"] > 8
    mean = row["protocol"]["data.augmentations.mean"]
    assert mean == pytest.approx([0.286] * 3), "as the encoder's images were normalised"
    before = load_checkpoint(run.checkpoint)["state_dict"]
    after = load_checkpoint(result.checkpoint)["state_dict"]
    for theirs, ours in (
        ("backbone.conv1.weight", "detector.backbone.body.conv1.weight"),
        ("backbone.layer3.0.bn1.running_mean", "detector.backbone.body.layer3.0.bn1.running_mean"),
        ("backbone.layer4.0.conv1.weight", "detector.roi_heads.box_head.0.layer4.0.conv1.weight"),
    ):
        assert torch.equal(before[theirs], after[ours]) is not finetune


@pytest.mark.slow
@pytest.mark.skipif(not ALL, reason="takes minutes; FAULTS=all")
def test_eight_images_are_learnt_by_heart(sets, tmp_path):
    options = {"max_epochs": 110, "check_val_every_n_epoch": 110, "checkpoint__frequency": 110}
    options["detector"] = {"min_size": [SIDE], "anchors": [ITEM], "head": "c4", "regions": 64, "precise_bn": 2}
    options["optimizer"] = {"name": "sgd", "batch_size": 4, "lr": 6.4, "weight_decay": 1e-4}
    options["scheduler"] = {"name": "warmup_step", "warmup_steps": 4, "lr_decay_steps": [160]}
    metrics = detect(detection(tmp_path, sets, **options, enable_progress_bar=False)).metrics
    assert metrics["val_ap"] > 90, metrics


def test_the_command(sets, tmp_path, capsys):
    words = ["voc/c4", "untrained=true", "backbone.name=resnet10_w16", "max_epochs=1", f"checkpoint.dir={tmp_path}"]
    words += [f"data.train_path={sets['voc']}", f"data.val_path={sets['voc']}", "detector.min_size=[64]"]
    words += ["optimizer.batch_size=4", "accelerator=cpu", "data.num_workers=0", "+limit_val_batches=1"]
    assert main(["detect", *words, "detector.precise_bn=0"]) == 0
    assert "val_ap " in capsys.readouterr().out
    assert main(["detect", *words, "data.dataset=fashion_mnist_mini"]) == 2
    assert "'fashion_mnist_mini' has no boxes (one of voc, coco)" in capsys.readouterr().err
    assert main(["detect", *words, "detector.heads=fpn"]) == 2
    assert "unknown key 'detector.heads'; did you mean 'detector.head'?" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_count_every_image_once(tmp_path):
    """Seven test images, whose shares differ by one."""
    listed = write_voc(tmp_path / "voc", 7)
    options = {"optimizer__batch_size": 2, "max_epochs": 1, "devices": 2, "strategy": "ddp", "checkpoint__frequency": 1}
    cfg = detection(tmp_path, {"voc": listed}, **options)
    file = tmp_path / "detect.yaml"
    file.write_text(to_yaml(cfg))
    paths = os.pathsep.join(filter(None, [str(Path(solo_ext.__file__).parents[1]), os.environ.get("PYTHONPATH")]))
    env = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "solo_ext", "detect", str(file)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    [result] = tmp_path.rglob("result.json")
    theirs = json.loads(result.read_text())
    data = DetectionData(cfg.data, 2, 5, SIDE)
    small = resnet(stem="small")
    model = DetectionModel(small, 3, cfg.optimizer, cfg.scheduler, cfg.detector, IMAGENET_MEAN, IMAGENET_STD)
    weights = load_checkpoint(theirs["checkpoint"])["state_dict"]
    model.load_state_dict(weights)
    model.eval()
    with torch.no_grad():
        for _, images, targets in data.val_dataloader():
            model.score.update(model(images), [counted(target) for target in targets])
    ours = percentages(model.score.compute())
    assert {name: theirs["metrics"][name] for name in ours} == pytest.approx(ours, abs=1e-3) and ours["val_ap50"] > 0
