"""Encoders for other code: `load_backbone`, timm, the Hugging Face Hub (its client, a server of ours), torch.hub."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from hub_server import TOKEN
from PIL import Image

import solo_ext
from solo_ext.data.modules import ClassificationData
from solo_ext.data.transforms import Transform
from solo_ext.errors import CheckpointError, ConfigError
from solo_ext.files import sha256
from solo_ext.methods import backbone_of
from solo_ext.runs.run import Run
from solo_ext.training.config import resolve, run_values
from solo_ext.zoo.export import export
from solo_ext.zoo.export.huggingface import preprocessing
from solo_ext.zoo.index import Entry, ZooFile, write_index
from solo_ext.zoo.model import load_backbone

ROOT = Path(solo_ext.__file__).parents[1]
R10 = {"name": "resnet10_w16"}


def make_run(folder: Path, backbone=R10, dataset="cifar10", method="byol", size=32, **config) -> Path:
    """A run folder with a student and another teacher, of random weights and statistics."""
    view = {"crop_size": size, "mean": None, "std": None}
    args = {"name": "tiny", "method": method, "max_epochs": 3, "backbone": backbone, "augmentations": [view], **config}
    args["data"] = {"dataset": dataset, "train_path": "/home/jane/secret", **config.get("data", {})}
    torch.manual_seed(0)
    state = {}
    for part in ("backbone", "momentum_backbone"):
        network = backbone_of(args)
        for module in network.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
        state |= {f"{part}.{name}": x for name, x in network.state_dict().items()}
    folder.mkdir(parents=True)
    torch.save({"state_dict": state, "epoch": 3, "global_step": 9}, folder / "tiny-ep=3.ckpt")
    (folder / "args.json").write_text(json.dumps(args))
    return folder


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture(scope="module")
def exported(run_folder):
    """What `--to huggingface` makes of it."""
    return export(run_folder, "huggingface", out=run_folder.parent / "exported").folder


def features(network, size=32, seed=1):
    with torch.no_grad():
        return network(torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(seed)))


# load_backbone


def photo(mode: str, size=(50, 37), seed=0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 4), dtype=np.uint8)
    return Image.fromarray(pixels, "RGBA").convert("RGB").convert(mode) if mode != "RGBA" else Image.fromarray(pixels)


FILES = {"a.jpg": "RGB", "b.jpg": "L", "c.jpg": "CMYK", "d.png": "RGBA", "e.png": "P", "f.png": "LA", "g.png": "1"}


@pytest.mark.parametrize("dataset, size", [("fashion_mnist_mini", 28), ("fashion_mnist_mini", 20), ("custom", 24)])
def test_the_transform_is_what_the_evaluations_feed(dataset, size, tmp_path):
    data = {}
    if dataset == "custom":
        (tmp_path / "images" / "x").mkdir(parents=True)
        for i, (name, mode) in enumerate(FILES.items()):
            photo(mode, (30 + 7 * i, 45), seed=i).save(tmp_path / "images" / "x" / name)
        data = {"train_path": str(tmp_path / "images"), "val_path": str(tmp_path / "images"), "num_workers": 0}
    run = make_run(tmp_path / "run", dataset=dataset, size=size, data=data)
    cfg = resolve(run_values(run, "knn"), "knn")
    _, [batch], _ = next(iter(ClassificationData(cfg.data, 7, 0, augment=False).train_dataloader()))

    if dataset == "custom":
        images = [Image.open(tmp_path / "images" / "x" / name) for name in FILES]
    else:
        pixels = np.load(Path(solo_ext.__file__).parent / "data" / "assets" / "fashion_mnist_mini.npz")
        images = [Image.fromarray(x) for x in pixels["train_images"][:7]]
    transform, before = load_backbone(run).transform, torch.get_rng_state()
    assert torch.equal(torch.stack([transform(image) for image in images]), batch)
    assert torch.equal(torch.get_rng_state(), before)


def test_student_and_teacher_in_eval_mode(run_folder):
    student, teacher = load_backbone(run_folder), load_backbone(str(run_folder / "tiny-ep=3.ckpt"), teacher=True)
    state = torch.load(run_folder / "tiny-ep=3.ckpt", weights_only=True)["state_dict"]
    for network, part in ((student, "backbone"), (teacher, "momentum_backbone")):
        assert not network.training and network.config["method"] == "byol"
        assert features(network).shape == (4, network.num_features)
        assert all(torch.equal(x, state[f"{part}.{name}"]) for name, x in network.state_dict().items())


@pytest.fixture
def own(tmp_path, monkeypatch, run_folder):
    """A zoo of one's own with the entry `byol-cifar10-r10w16`."""
    folder = export(run_folder, "safetensors", out=tmp_path / "own" / "cifar10" / "byol-cifar10-r10w16").folder
    (folder / "export.json").unlink()
    files = [
        ZooFile(file.stat().st_size, sha256(file), f"cifar10/{folder.name}/{file.name}") for file in folder.iterdir()
    ]
    entry = Entry(folder.name, "byol", "resnet10_w16", "cifar10", 3, files=files)
    write_index(tmp_path / "own" / "index.yaml", [entry])
    monkeypatch.setenv("SOLO_EXT_ZOO", str(tmp_path / "own"))
    monkeypatch.chdir(tmp_path)
    return entry.name


def test_a_name_of_the_zoo(own, run_folder, tmp_path):
    exact = load_backbone(run_folder).state_dict()
    rounded = {name: x.half().float() if x.ndim > 1 else x for name, x in exact.items()}
    state = solo_ext.load_backbone(own).state_dict()
    assert state.keys() == rounded.keys() and all(torch.equal(state[name], x) for name, x in rounded.items())
    with pytest.raises(CheckpointError, match=r"no 'byol-cifar10-r10w61', .*; did you mean 'byol-cifar10-r10w16'\?"):
        load_backbone("byol-cifar10-r10w61")
    with pytest.raises(CheckpointError, match="holds no backbone of a teacher"):
        load_backbone(own, teacher=True)
    make_run(tmp_path / own, {"name": "resnet10_w16", "last_norm": True})  # a folder of that name goes first
    assert "fc.weight" in load_backbone(own).state_dict()


@pytest.mark.parametrize("change", [{"backbone": 3}, {"augmentations": {"0": 1}}, {"data": {"dataset": []}}])
def test_a_mutated_configuration_is_one_sentence(change, exported, tmp_path):
    for file in exported.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "args.json").write_text(json.dumps({**json.loads((exported / "args.json").read_text()), **change}))
    with pytest.raises((CheckpointError, ConfigError)) as error:
        load_backbone(tmp_path)
    assert "\n" not in str(error.value)


def test_a_configuration_cannot_fetch_other_weights(tmp_path):
    kwargs = {"checkpoint_path": str(tmp_path / "evil.pth"), "pretrained_cfg": {"file": "evil.pth"}, "pretrained": True}
    run = make_run(tmp_path / "run", {"name": "timm/test_resnet"}, "imagenet", size=64)
    args = json.loads((run / "args.json").read_text())
    args["backbone"]["kwargs"] = kwargs
    (run / "args.json").write_text(json.dumps(args))
    assert load_backbone(run).num_features
    with pytest.raises(RuntimeError, match="No pretrained weights exist"):  # of timm, and not the file's
        timm.create_model("solo_ext_backbone", pretrained=True, config={"backbone": {**R10, "kwargs": kwargs}})


# --to huggingface


@pytest.mark.parametrize(
    "backbone, dataset, size, teacher, architecture",
    [
        (R10, "cifar10", 32, True, "solo_ext_backbone"),
        ({"name": "resnet10_w16", "stem": "imagenet", "last_norm": True}, "imagenet", 40, False, "solo_ext_backbone"),
        ({"name": "resnet18"}, "imagenet", 64, False, "resnet18"),
        ({"name": "vit_tiny", "kwargs": {"depth": 4, "img_size": 32, "stop_grad_conv1": True}}, "imagenet100", 32,
         False, "vit_tiny_patch16_224"),
        ({"name": "timm/test_vit.r160_in1k", "kwargs": {"img_size": 64}}, "stl10", 64, False, "test_vit"),
    ],
)  # fmt: skip
def test_timm_loads_the_folder(backbone, dataset, size, teacher, architecture, tmp_path):
    run = make_run(tmp_path / "run", backbone, dataset, "mocov3", size)
    report = export(run, "huggingface", teacher=teacher, out=tmp_path / "out")
    config = json.loads((report.folder / "config.json").read_text())
    assert config["architecture"] == architecture and config["num_classes"] == 0 and not report.record["unexpected"]

    ours, theirs = load_backbone(run, teacher), timm.create_model(f"local-dir:{report.folder}", pretrained=True).eval()
    assert config["num_features"] == ours.num_features
    torch.testing.assert_close(features(theirs, size), features(ours, size), atol=1e-5, rtol=0)
    torch.testing.assert_close(features(load_backbone(report.folder), size), features(ours, size), atol=0, rtol=0)

    resolved = timm.data.resolve_model_data_config(theirs)
    assert tuple(resolved["input_size"]) == (3, size, size) and resolved["interpolation"] == "bilinear"
    torch.testing.assert_close(torch.tensor(resolved["mean"]), ours.transform.mean)
    torch.testing.assert_close(torch.tensor(resolved["std"]), ours.transform.std)
    image = photo("RGB", (90, 70))
    views = [timm.data.create_transform(**resolved)(image), ours.transform(image)]
    difference = (views[0] - views[1]).abs() * ours.transform.std[:, None, None] * 255
    assert difference.max() < 1.01  # both round to 8 bits once more


def test_timm_resizes_to_the_same_side():
    for size in range(8, 640):
        shorter = round(size * 256 / 224)
        arguments = preprocessing(Transform(size, shorter, [0.4914] * 3, [0.1] * 3))
        assert math.floor(size / arguments["crop_pct"]) == shorter and arguments["mean"] == (0.4914,) * 3


def test_the_card(run_folder, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    for file in run_folder.iterdir():
        (run / file.name).write_bytes(file.read_bytes())
    vote = {"features": "backbone", "distance": "cosine", "k": 20, "T": 0.07, "augmented": False}
    digest = Run(run).sha256("tiny-ep=3.ckpt")
    for number, (content, shown) in enumerate(((digest, True), ("0" * 64, False))):
        protocol = vote | {"sha256": content, "data.val_fraction": 0.0}
        (run / "knn.json").write_text(json.dumps({"results": [{"protocol": protocol, "acc1": 71.234, "acc5": 90.0}]}))
        folder = export(run, "huggingface", dtype="float16", out=tmp_path / str(number)).folder
        card = (folder / "README.md").read_text()
        assert ("| kNN-20 | 71.23 |" in card) == shown and ("It has not been evaluated." in card) != shown
    _, front, text = card.split("---\n", 2)
    front = yaml.safe_load(front)
    assert (front["library_name"], front["license"], front["datasets"]) == ("timm", "mit", ["uoft-cs/cifar10"])
    for words in (
        "import solo_ext.zoo.model\nimport timm",
        "`byol`",
        "`cifar10`",
        "float16",
        "2208.05744",
        "2211.09861",
    ):
        assert words in text
    assert not any(b"/home/jane" in file.read_bytes() for file in folder.iterdir())


@pytest.mark.parametrize("finetune", [True, False])
def test_the_card_of_a_linear_runs_encoder(run_folder, tmp_path, finetune):
    """What its labels did to it, and nothing of the classifier's own data and epochs."""
    run = tmp_path / "run"
    shutil.copytree(run_folder, run)
    args = json.loads((run / "args.json").read_text())
    args |= {"pretrain_method": args.pop("method"), "finetune": finetune, "max_epochs": 77}
    (run / "args.json").write_text(json.dumps(args))
    card = (export(run, "huggingface", out=tmp_path / "out").folder / "README.md").read_text()
    assert "# resnet10_w16 by byol" in card and "| trained on |" not in card
    for words in (
        "datasets: [uoft-cs/cifar10]",
        "then fine-tuned with them",
        "fine-tuned with the labels of | `cifar10`",
        "| epochs | 77 |",
    ):
        assert (words in card) == finetune


def test_a_classifier_on_what_timm_lacks(exported, tmp_path):
    model = timm.create_model(f"local-dir:{exported}", pretrained=True, num_classes=10).eval()
    assert features(model).shape == (4, 10)
    model.fc = torch.nn.Identity()
    assert torch.equal(features(model), features(load_backbone(exported)))
    with pytest.raises(ConfigError, match="in_chans"):
        timm.create_model("solo_ext_backbone", in_chans=1, config={"backbone": R10})
    with pytest.raises(ConfigError, match="num_classes=0"):
        timm.create_model("solo_ext_backbone", num_classes=9, config={"backbone": {**R10, "last_norm": True}})


# The Hub.


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_hf_fetches_once_and_works_offline(hub, exported, run_folder):
    pickles = {"pytorch_model.bin": b"\x80\x04evil", "tiny-ep=9.ckpt": b"\x80\x04evil", "hubconf.py": b"1 / 0"}
    hub.repos["jane/byol"] = {**contents(exported), **pickles}
    sha = hub.commit("jane/byol")
    expected = features(load_backbone(run_folder))
    for source in ("hf://jane/byol", f"hf://jane/byol@{sha}", "hf://jane/byol@main"):
        assert torch.equal(features(solo_ext.load_backbone(source)), expected)
    downloads = [path.rpartition("/")[2] for _, path, _ in hub.seen if "/resolve/" in path]
    assert {*downloads} == {"model.safetensors", "args.json", "checkpoints.json", "config.json"}
    timms = timm.create_model("hf-hub:jane/byol", pretrained=True).eval()
    assert torch.equal(features(timms), expected)

    hub.close()
    for source in ("hf://jane/byol", f"hf://jane/byol@{sha}"):
        assert torch.equal(features(load_backbone(source)), expected)
    with pytest.raises(CheckpointError, match=r"hf://jane/other is not in the cache \(.*hub\), and http.* cannot be"):
        load_backbone("hf://jane/other")


def spoiled(exported: Path, **changes: bytes | None) -> dict[str, bytes]:
    """Its files with `changes`, `_` for the dot; None removes one."""
    files = contents(exported) | {name.replace("_", ".", 1): content for name, content in changes.items()}
    return {name: content for name, content in files.items() if content is not None}


@pytest.mark.parametrize(
    "source, refusal, message",
    [
        (
            "hf://jane/none",
            None,
            r"hf://jane/none is not on the Hugging Face Hub, or is private and needs hf auth login",
        ),
        ("hf://jane/net", (403, "GatedRepo"), "hf://jane/net wants its terms to be accepted"),
        ("hf://jane/net", (500, ""), r"hf://jane/net is not in the cache .* cannot be reached"),
        ("hf://jane/net@v9", None, "hf://jane/net@v9 has no such revision"),
        ("hf://jane", None, "'hf://jane' is not of the form hf://owner/name"),
        ("hf://jane/../net", None, "not of the form"),
        ("hf://jane/net@../../main", None, "not of the form"),
    ],
)
def test_what_the_hub_does_not_give(hub, exported, monkeypatch, source, refusal, message):
    hub.repos["jane/net"] = contents(exported)
    hub.refusals = {"jane/net": refusal} if refusal else {}
    with pytest.raises(CheckpointError, match=message) as error:
        load_backbone(source)
    assert "\n" not in str(error.value)


def test_what_is_not_ours_or_damaged(hub, exported):
    weights = (exported / "model.safetensors").read_bytes()
    flipped = weights[:-5] + bytes([weights[-5] ^ 1]) + weights[-4:]
    repos = {
        "timms": (
            {"config_json": b'{"architecture": "resnet18"}', "args_json": None},
            r"no args.json; timm.create_model\('hf-hub:jane/timms'",
        ),
        "pickled": ({"model_safetensors": None, "pytorch_model.bin": b"evil"}, "has no model.safetensors"),
        "unsigned": (
            {"checkpoints_json": b'{"model.safetensors": {"sha256": null}}'},
            "no SHA-256 of model.safetensors",
        ),
        "flipped": ({"model_safetensors": flipped}, "damaged: it differs from its SHA-256 in checkpoints.json"),
        "cut": ({"model_safetensors": weights[:-9]}, "damaged: it differs from its SHA-256 in checkpoints.json"),
        "mixed": ({"args_json": b'{"backbone": {"name": "resnet18"}, "data": {}}'}, "does not hold the resnet18"),
        "garbled": ({"args_json": b"{"}, "args.json is damaged: it is not JSON"),
    }
    for name, (changes, message) in repos.items():
        hub.repos[f"jane/{name}"] = spoiled(exported, **changes)
        with pytest.raises(CheckpointError, match=message) as error:
            load_backbone(f"hf://jane/{name}")
        assert "\n" not in str(error.value)


def test_push(hub, run_folder, run, monkeypatch, tmp_path, caplog):
    words = ("export", run_folder, "--to", "huggingface", "--push", "jane/pushed", "--out", "out")
    status, _, err = run(*words)
    assert status == 2 and "--push needs a token" in err and not Path("out").exists() and not hub.seen
    monkeypatch.setenv("HF_TOKEN", TOKEN + "x")
    status, _, err = run(*words)
    assert status == 2 and "out is not pushed: jane/pushed is refused by http" in err and "status 401" in err
    assert TOKEN not in err and "Traceback" not in err and Path("out").exists()

    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.repos["jane/pushed"] = {"old.txt": b"stays"}
    status, out, err = run(*words[:-1], "again")
    assert status == 0 and out.splitlines()[-1].strip() == f"{hub.url}/jane/pushed"
    assert TOKEN not in out + err + caplog.text
    pushed, written = hub.repos["jane/pushed"], contents(Path("again"))
    assert not any(TOKEN.encode() in content for content in (*pushed.values(), *written.values()))
    assert pushed.keys() == (written.keys() | {"old.txt"}) - {"export.json"}
    assert all(pushed[name] == written[name] for name in pushed.keys() - {"README.md", "old.txt"})
    assert b"hf-hub:jane/pushed" in pushed["README.md"] and b"OWNER/NAME" not in pushed["README.md"]
    assert torch.equal(features(load_backbone("hf://jane/pushed")), features(load_backbone(run_folder)))

    status, _, err = run(*words[:4], "--push", "jane", "--out", "third")
    assert status == 2 and "--push takes OWNER/NAME" in err and not Path("third").exists()


# A process of its own, as users have it


def script(code: str, folder: Path, **environment: str) -> str:
    env = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "SOLO_EXT_", "PYTHONPATH"))}
    env |= {"OMP_NUM_THREADS": "1", "HOME": str(folder), **environment}
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_torch_hub(own, hub, exported, tmp_path):
    hub.repos["jane/byol"] = contents(exported)
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "jane_solo-ext_main").symlink_to(ROOT)  # as if downloaded from GitHub before
    code = f"""
import json, sys, torch
assert not any(name.startswith("solo_ext") for name in sys.modules)
torch.hub.set_dir("cache")
repository = {{"github": "jane/solo-ext:main", "skip_validation": True, "trust_repo": True}}
names, text = torch.hub.list(**repository), torch.hub.help(model={own!r}, **repository)
one = torch.hub.load("jane/solo-ext:main", "backbone", {own!r}, skip_validation=True, trust_repo=True)
two = torch.hub.load({str(ROOT)!r}, {own!r}, source="local")
torch.hub.load({str(ROOT)!r}, "backbone", "hf://jane/byol", source="local")
assert all(torch.equal(x, y) for x, y in zip(one.state_dict().values(), two.state_dict().values(), strict=True))
print(json.dumps([names, text, one.training, one.num_features]))
"""
    environment = {
        "SOLO_EXT_ZOO": os.environ["SOLO_EXT_ZOO"],
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "hf"),
        "HF_TOKEN": TOKEN,
    }
    names, text, training, width = json.loads(script(code, tmp_path, **environment))
    assert {"backbone", own} <= {*names} and not {"Path", "partial", "dependencies"} & {*names}
    assert (training, width) == (False, 128) and "cifar10" in text
    assert list((tmp_path / "hf").rglob("snapshots/*/model.safetensors"))
    assert {token for _, path, token in hub.seen if "jane" in path} == {f"Bearer {TOKEN}"}
