"""The configuration: what is composed, what is refused and with which words, and what follows from it."""

import ast
import copy
import functools
import json
import pickle
import random
import re
from pathlib import Path

import pytest
import torch
from conftest import ROOT, value_at
from frameworks import spec_of
from omegaconf import OmegaConf

from solo_ext.data.augmentations import AugmentationConfig
from solo_ext.errors import ConfigError
from solo_ext.methods import METHODS
from solo_ext.methods.variants import variants
from solo_ext.schema import keys, plain
from solo_ext.training import recipes
from solo_ext.training.compose import assign, compose, overlay, to_yaml
from solo_ext.training.config import resolve, run_values

SCRIPTS = ROOT / "scripts"
PLACES = sorted(place for kind in ("pretrain", "linear") for place in SCRIPTS.glob(f"{kind}/[!_]*"))
SHIPPED = [place / f"{name}.yaml" for place in PLACES for name in recipes.names(place)]  # some without a file
CIFAR = SCRIPTS / "pretrain" / "cifar10"


@functools.cache
def composed(file: Path) -> dict:
    return OmegaConf.to_container(compose(file.parent, file.name))


def shipped(file: Path, *overrides: str):
    raw = compose(file.parent, file.name, overrides) if overrides else composed(file)
    return resolve(raw, file.parts[-3])


def cifar(name: str, *overrides: str):
    return shipped(CIFAR / f"{name}.yaml", *overrides)


def refused(*overrides: str, file: Path = CIFAR / "byol.yaml") -> str:
    with pytest.raises(ConfigError) as error:
        shipped(file, *overrides)
    message = str(error.value)
    assert message and "\n" not in message
    return message


def leaves(node, at: str = "") -> dict:
    """{full key: value} of nested mappings and lists of mappings."""
    items = node.items() if isinstance(node, dict) else enumerate(node)
    found = {}
    for name, value in items:
        key = f"{at}.{name}" if at else str(name)
        nested = isinstance(value, dict) or (isinstance(value, list) and value and isinstance(value[0], dict))
        found |= leaves(value, key) if nested else {key: value}
    return found


# What is shipped.

FRAMEWORKS = ("byol", "dino", "mocov2plus", "mocov3", "ressl", "simclr", "simsiam")  # of the papers and solo-learn
WITHOUT_TEACHER = [name for name in FRAMEWORKS if not spec_of(name).teacher]
FOLDERS = ("fashion_mnist_mini", "cifar10", "cifar100", "imagenet-100", "imagenet")


@functools.cache
def recipe(kind: str, folder: str, name: str) -> dict:
    """{full key: value} of a shipped YAML, resolved."""
    return leaves(plain(shipped(SCRIPTS / kind / folder / f"{name}.yaml")))


def differing(one: dict, other: dict) -> set[str]:
    return {key for key in one.keys() | other.keys() if one.get(key) != other.get(key)}


PRINTED = """
    cifar10: projector_ema_byol res_mocov3
    cifar100: projector_ema_byol projector_ema_dino projector_ema_mocov2plus projector_ema_ressl
    cifar100: res_byol res_mocov3 res_ressl res_simsiam
    imagenet-100: projector_ema_byol projector_ema_dino projector_ema_mocov2plus projector_ema_ressl
    imagenet-100: res_byol res_mocov3
    imagenet: projector_ema_dino res_mocov3
"""


def test_what_the_papers_print_has_a_file_and_a_script():
    printed = [line.strip().partition(": ") for line in PRINTED.strip().splitlines()]
    names = [(folder, name) for folder, _, names in printed for name in names.split()]
    names += [(folder, name) for folder in FOLDERS for name in FRAMEWORKS]
    files = [SCRIPTS / kind / folder / f"{name}.yaml" for kind in ("pretrain", "linear") for folder, name in names]
    files += [SCRIPTS / "pretrain" / "custom" / f"{name}.yaml" for name in FRAMEWORKS]
    files += [SCRIPTS / "pretrain" / "imagenet-100" / f"{name}_vit.yaml" for name in ("mocov3", "res_mocov3", "dino")]
    files += [SCRIPTS / "pretrain" / "fashion_mnist_mini" / "mocov3_vit.yaml"]
    assert [file for file in files if not (file.is_file() and file.with_suffix(".sh").is_file())] == []


def test_every_script_has_its_file():
    files = {file for place in PLACES for file in place.iterdir()}
    assert {file.suffix for file in files} == {".sh", ".yaml"}
    assert {file.with_suffix(".yaml") for file in files} == {file for file in files if file.suffix == ".yaml"}


@pytest.mark.parametrize("file", SHIPPED, ids=lambda f: "/".join(f.parts[-3:]))
def test_shipped_yaml_resolves_to_what_its_path_says(file):
    kind, folder = file.parts[-3:-1]
    cfg = recipe(kind, folder, file.stem)
    assert cfg["data.dataset"] == folder.replace("-", "").removesuffix("_small")
    assert file.stem.removesuffix("_vit") == cfg["method" if kind == "pretrain" else "pretrain_method"]
    assert cfg["accelerator"] == "auto" and not cfg["wandb.enabled"]
    several = kind == "pretrain" and folder.startswith("imagenet")
    assert (cfg["devices"] > 1, cfg["strategy"] == "ddp", cfg["sync_batchnorm"]) == (several,) * 3

    if file.with_suffix(".sh").is_file():
        script = file.with_suffix(".sh").read_text().splitlines()
        assert len(script) == 2 and f"solo-ext {kind} " in script[1] and script[1].endswith(f'{file.name} "$@"')


@pytest.mark.parametrize(
    "file", [file for file in SHIPPED if file.parts[-2] == "imagenet-100"], ids=lambda f: "/".join(f.parts[-3:])
)
def test_parsing_again_changes_nothing(file):
    kind, cfg = file.parts[-3], shipped(file)
    values = plain(cfg)
    args_json = json.loads(json.dumps(values))
    assert args_json == values
    assert plain(resolve(args_json, kind)) == values
    assert plain(resolve(OmegaConf.create(to_yaml(cfg)), kind)) == values


def table(text: str) -> dict[str, dict]:
    """{column: {full key: value}} of a table; `-`: the key is not there."""
    head, *rows = [line.split() for line in text.strip().splitlines()]
    columns = {name: {} for name in head}
    for key, *cells in rows:
        for name, cell in zip(head, cells, strict=True):
            number = cell[0].isdigit() or cell in ("True", "False")
            columns[name][key] = None if cell == "-" else ast.literal_eval(cell) if number else cell
    return columns


# Values of the papers and, where they are silent, of solo-learn's scripts of September 2022.
CIFAR_VALUES = table("""
                                         byol  dino  mocov2plus  mocov3  ressl  simclr  simsiam
    optimizer.name                       lars  lars  sgd         lars    sgd    lars    sgd
    optimizer.lr                         1.0   0.3   0.3         0.3     0.05   0.4     0.5
    optimizer.classifier_lr              0.1   0.1   0.3         0.3     0.1    0.1     0.1
    optimizer.weight_decay               1e-5  1e-6  1e-4        1e-6    1e-4   1e-5    1e-5
    optimizer.kwargs.eta                 0.02  0.02  -           0.02    -      0.02    -
    optimizer.kwargs.clip_lr             True  True  -           False   -      True    -
    optimizer.kwargs.exclude_bias_n_norm True  True  -           True    -      True    -
    method_kwargs.proj_hidden_dim        4096  2048  2048        4096    4096   2048    2048
    method_kwargs.proj_output_dim        256   256   128         256     256    256     2048
    method_kwargs.pred_hidden_dim        4096  -     -           4096    -      -       512
    method_kwargs.temperature            -     -     0.2         0.2     -      0.2     -
    method_kwargs.temperature_q          -     -     -           -       0.1    -       -
    method_kwargs.temperature_k          -     -     -           -       0.04   -       -
    method_kwargs.queue_size             -     -     32768       -       65536  -       -
    method_kwargs.num_prototypes         -     4096  -           -       -      -       -
    method_kwargs.loss_scale             solo  -     -           paper   -      -       -
    backbone.name    resnet18 resnet18 resnet18 resnet18 resnet18 resnet18 resnet18
    backbone.kwargs.zero_init_residual   -     -     -           -       -      -       True
    optimizer.batch_size                 256   256   256         256     256    256     256
    devices                              1     1     1           1       1      1       1
    accumulate_grad_batches              1     1     1           1       1      1       1
""")
IMAGENET100_CHANGES = table("""
                                         byol  dino  mocov2plus  mocov3  ressl  simclr  simsiam
    optimizer.lr                         0.5   0.3   0.3         0.3     0.3    0.3     0.5
    optimizer.classifier_lr              0.1   0.1   0.3         0.3     0.1    0.3     0.1
    optimizer.weight_decay               1e-5  1e-6  1e-4        1e-6    1e-4   1e-4    1e-5
    method_kwargs.proj_output_dim        256   256   128         256     256    128     2048
    method_kwargs.pred_hidden_dim        8192  -     -           4096    -      -       512
    method_kwargs.queue_size             -     -     65536       -       65536  -       -
    optimizer.batch_size                 128   128   128         128     128    128     128
    devices                              2     2     2           2       2      2       2
""")
IMAGENET_CHANGES = table("""
                                         byol  dino  mocov2plus  mocov3  ressl  simclr  simsiam
    optimizer.lr                         0.45  0.3   0.3         0.45    0.3    0.3     0.5
    optimizer.classifier_lr              0.2   0.1   0.4         0.3     0.1    0.3     0.1
    optimizer.weight_decay               1e-6  1e-6  3e-5        1.5e-6  1e-4   1e-6    1e-5
    optimizer.kwargs.eta                 0.001 0.02  -           0.002   -      0.001   -
    optimizer.kwargs.clip_lr             False True  -           False   -      False   -
    method_kwargs.pred_hidden_dim        4096  -     -           4096    -      -       512
    method_kwargs.temperature            -     -     0.1         0.2     -      0.2     -
    backbone.name    resnet50 resnet50 resnet50 resnet50 resnet50 resnet50 resnet50
    optimizer.batch_size                 128   128   128         256     128    128     128
    devices                              2     2     2           4       2      2       2
    accumulate_grad_batches              16    1     1           1       1      1       1
""")


def values_of(folder: str, framework: str) -> dict:
    values = dict(CIFAR_VALUES[framework])
    if folder.startswith("imagenet"):
        values |= IMAGENET100_CHANGES[framework]
    if folder == "imagenet":
        values |= IMAGENET_CHANGES[framework]
    return values


SCHEDULE = {
    "scheduler.name": "warmup_cosine",
    "scheduler.warmup_epochs": 10,
    "scheduler.warmup_start_lr": 3e-5,
    "scheduler.min_lr": 0,
    "optimizer.exclude_bias_n_norm_wd": False,
    "momentum.classifier": False,
    "momentum.buffers": "own",
    "momentum.inter": True,
    "precision": "16-mixed",
    "seed": 5,
}
DINO = {
    "method_kwargs.student_temperature": 0.1,
    "method_kwargs.teacher_temperature": 0.07,
    "method_kwargs.warmup_teacher_temperature": 0.04,
    "method_kwargs.warmup_teacher_temperature_epochs": 50,
    "method_kwargs.freeze_last_layer": 1,
    "method_kwargs.norm_last_layer": True,
    "method_kwargs.use_bn_in_head": False,
    "method_kwargs.clip_grad": 0,
}
RESIDUAL = {"intra.weight": 1, "intra.distance": "cosine", "intra.target": "predictor", "intra.every": None}


def teacher(epochs: int, schedule: str, base: float, final: float | None = None) -> dict:
    values = {"max_epochs": epochs, "momentum.schedule": schedule, "momentum.base_tau": base}
    return values if final is None else values | {"momentum.final_tau": final}


PAPER_A = teacher(200, "constant", 0.99)
PAPER_B = teacher(1000, "cosine", 0.996, 1)
PAPER_B_IMAGENET = teacher(200, "cosine", 0.99, 1)


def epochs_and_tau(folder: str, framework: str, residual: bool) -> dict:
    if residual or framework == "mocov3":
        return PAPER_B_IMAGENET if folder == "imagenet" else PAPER_B
    if folder == "imagenet" and framework in ("byol", "mocov2plus"):  # solo-learn's own
        return teacher(100, "cosine", 0.99, 1 if framework == "byol" else 0.999)
    return PAPER_A


# preset -> per view: least crop, (brightness, contrast, saturation, hue), probability of jitter, blur, solarization
MILD, WEAK, STRONG = (0.4, 0.4, 0.2, 0.1), (0.4, 0.4, 0.4, 0.1), (0.8, 0.8, 0.8, 0.2)
VIEWS = {
    "C-asym": [(0.08, MILD, 0.8, 0, 0), (0.08, MILD, 0.8, 0, 0.2)],
    "C-table8": [(0.2, MILD, 0.8, 1, 0), (0.2, MILD, 0.8, 0.1, 0.2)],
    "C-weak": [(0.08, WEAK, 0.8, 0, 0)] * 2,
    "C-sym": [(0.08, STRONG, 0.8, 0, 0)] * 2,
    "C-ressl": [(0.08, MILD, 0.8, 0, 0), (0.08, None, 0, 0, 0)],
    "I-asym": [(0.08, MILD, 0.8, 1, 0), (0.08, MILD, 0.8, 0.1, 0.2)],
    "I-table9": [(0.2, MILD, 0.8, 1, 0), (0.2, MILD, 0.8, 0.1, 0.2)],
    "I-weak": [(0.08, WEAK, 0.8, 0.5, 0)] * 2,
    "I-sym": [(0.08, STRONG, 0.8, 0.5, 0)] * 2,
    "I-ressl": [(0.08, WEAK, 0.8, 0.5, 0), (0.08, None, 0, 0, 0)],
}
PRESETS = {"byol": "asym", "dino": "asym", "mocov2plus": "weak", "ressl": "ressl", "simclr": "sym", "simsiam": "weak"}


def preset(folder: str, framework: str) -> str:
    if framework == "mocov3":
        return "C-table8" if folder.startswith("cifar") else "I-table9"
    if (folder, framework) == ("imagenet", "mocov2plus"):
        return "I-asym"
    return ("C-" if folder.startswith("cifar") else "I-") + PRESETS[framework]


def assert_views(cfg: dict, name: str) -> None:
    found = []
    for i in range(2):
        at = f"augmentations.{i}."
        if at + "num_crops" not in cfg:
            break
        parts = {key.removeprefix(at): value for key, value in cfg.items() if key.startswith(at)}
        jitter = tuple(parts[f"color_jitter.{part}"] for part in ("brightness", "contrast", "saturation", "hue"))
        blur, solarize = parts["gaussian_blur.prob"], parts["solarization.prob"]
        prob = parts["color_jitter.prob"]
        found += [(parts["rrc.crop_min_scale"], jitter if prob else None, prob, blur, solarize)] * parts["num_crops"]
        size = 32 if name.startswith("C-") else 224
        assert (parts["rrc.crop_max_scale"], parts["crop_size"], parts["rrc.enabled"]) == (1, size, True)
        assert (parts["horizontal_flip.prob"], parts["grayscale.prob"], parts["equalization.prob"]) == (0.5, 0.2, 0)
    assert found == VIEWS[name]


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("folder", ["cifar10", "cifar100", "imagenet-100", "imagenet"])
def test_values_of_the_papers(folder, framework):
    values = values_of(folder, framework) | SCHEDULE
    images = values["optimizer.batch_size"] * values["devices"] * values["accumulate_grad_batches"]
    values["optimizer.effective_lr"] = pytest.approx(values["optimizer.lr"] * images / 256)
    values["data.num_classes"] = {"cifar10": 10, "imagenet": 1000}.get(folder, 100)
    values |= DINO if framework == "dino" else {}
    whole = "none" if framework in WITHOUT_TEACHER else "full"
    for name, own in {
        framework: {"momentum.stages": whole, "intra.weight": 0},
        f"projector_ema_{framework}": {"momentum.stages": "projector", "intra.weight": 0},
        f"res_{framework}": {"momentum.stages": "full", **RESIDUAL},
    }.items():
        cfg = recipe("pretrain", folder, name)
        want = values | epochs_and_tau(folder, framework, name.startswith("res_")) | own
        if name.startswith("res_"):
            want["method_kwargs.loss_scale"] = values["method_kwargs.loss_scale"] and "paper"
        assert {key: cfg.get(key) for key in want} == want, name
        assert_views(cfg, preset(folder, framework))


def test_values_of_the_vits():
    vits = table("""
                             mocov3_vit  res_mocov3_vit  dino_vit
    backbone.name            vit_small   vit_small       vit_tiny
    optimizer.name           adamw       adamw           adamw
    optimizer.effective_lr   3e-4        3e-4            2.5e-3
    optimizer.classifier_lr  3e-4        3e-4            3e-3
    optimizer.weight_decay   0.1         0.1             1e-4
    optimizer.batch_size     128         128             64
    devices                  2           2               2
    scheduler.warmup_epochs  40          40              10
    scheduler.warmup_start_lr 3e-5       3e-5            1e-6
    momentum.base_tau        0.996       0.996           0.9995
    momentum.schedule        cosine      cosine          cosine
    max_epochs               1000        1000            400
    method_kwargs.proj_hidden_dim 4096   4096            2048
    method_kwargs.num_prototypes  -      -               65536
    method_kwargs.norm_last_layer -      -               False
    """)
    for name, want in vits.items():
        cfg = recipe("pretrain", "imagenet-100", name)
        assert {key: cfg.get(key) for key in want} == want, name
        assert_views(cfg, "I-asym")


TEACHER = {"max_epochs", "momentum.base_tau", "momentum.final_tau", "momentum.schedule", "method_kwargs.loss_scale"}


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("folder", [*FOLDERS, "custom"])
def test_a_variant_differs_from_its_baseline_by_its_idea_only(folder, framework):
    baseline = recipe("pretrain", folder, framework)
    projector = differing(baseline, recipe("pretrain", folder, f"projector_ema_{framework}"))
    assert projector == {"name", "method", "momentum.stages"}
    residual = differing(baseline, recipe("pretrain", folder, f"res_{framework}"))
    idea = {"name", "method", "intra.weight"}
    if framework in WITHOUT_TEACHER:
        idea.add("momentum.stages")
    may = set() if framework == "mocov3" else TEACHER
    assert idea <= residual <= idea | may
    if folder in ("fashion_mnist_mini", "custom"):
        assert residual - idea <= {"method_kwargs.loss_scale"}


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_both_cifar_sets_have_the_same_values(framework):
    for kind in ("pretrain", "linear"):
        differs = differing(recipe(kind, "cifar10", framework), recipe(kind, "cifar100", framework))
        assert differs == {"name", "data.dataset", "data.num_classes", "data.info.mean", "data.info.std"}


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_mini_recipes_compare(framework):
    """One optimizer, teacher and image distribution for all, so that methods compare; queues hold whole batches."""
    byol, cfg = recipe("pretrain", "fashion_mnist_mini", "byol"), recipe("pretrain", "fashion_mnist_mini", framework)
    apart = {key for key in differing(byol, cfg) if not key.startswith(("method_kwargs.", "augmentations."))}
    assert apart <= {"name", "method", "momentum.stages"}
    assert cfg.get("method_kwargs.queue_size", 0) % cfg["optimizer.batch_size"] == 0
    if framework == "ressl":
        parts = [name for name, part in vars(AugmentationConfig()).items() if hasattr(part, "prob")]
        assert len(parts) == 6 and {cfg[f"augmentations.1.{part}.prob"] for part in parts} == {0, 0.5}
        assert cfg["augmentations.1.horizontal_flip.prob"] == 0.5
    else:
        assert not any(key.startswith("augmentations.") for key in differing(byol, cfg))


LINEAR_LR = {"byol": 0.3, "dino": 0.3, "mocov2plus": 3, "mocov3": 0.3, "ressl": 3, "simclr": 1, "simsiam": 30}


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("folder", [folder for folder in FOLDERS if folder != "fashion_mnist_mini"])
def test_linear_recipe_is_solo_learns(folder, framework):
    want = {
        "optimizer.name": "sgd",
        "optimizer.effective_lr": 0.1 if (folder, framework) == ("imagenet", "byol") else LINEAR_LR[framework],
        "optimizer.weight_decay": 0,
        "max_epochs": 100,
        "scheduler.name": "step",
        "scheduler.lr_decay_steps": [60, 80],
        "backbone.name": "resnet50" if folder == "imagenet" else "resnet18",
    }
    for variant in ("", "projector_ema_", "res_"):
        cfg = recipe("linear", folder, variant + framework)
        assert {key: cfg[key] for key in want} == want


# Composing.


@pytest.mark.parametrize(
    "override, key, value",
    [
        ("optimizer.lr=0.5", "optimizer.lr", 0.5),
        ("optimizer.weight_decay=1e-4", "optimizer.weight_decay", 1e-4),
        ("gap.every=3", "gap.every", 3),  # neither the section nor the key is in the YAML
        ("++gap.every=3", "gap.every", 3),
        ("limit_train_batches=0.5", "limit_train_batches", 0.5),
        ("momentum.stages=[block4,projector]", "momentum.stages", ["block4", "projector"]),
        ("momentum.stages={projector.fc2: 0.9}", "momentum.stages", {"projector.fc2": 0.9}),
        ("augmentations.1.crop_size=32", "augmentations.1.crop_size", 32),
        ("~optimizer.kwargs.eta", "optimizer.kwargs", {"exclude_bias_n_norm": True, "clip_lr": True}),
        ("name=x-${seed}", "name", "x-5"),
        ("wandb.entity=None", "wandb.entity", None),
        ("name=1e5", "name", "1e5"),
        ("name=007", "name", "007"),
        ("++name=true", "name", "true"),
        ("wandb.project=1.10", "wandb.project", "1.10"),
        ("data.train_path=2_000", "data.train_path", "2_000"),
        ("optimizer.lr=.50", "optimizer.lr", 0.5),
        ("resume_from_checkpoint=a/byol-x-ep=9.ckpt", "resume_from_checkpoint", "a/byol-x-ep=9.ckpt"),
        ("strategy=null", "strategy", "auto"),
        ("precision=32", "precision", 32),
        ("hydra.run.dir=/tmp", "name", "byol-cifar10"),
    ],
)
def test_overrides(override, key, value):
    assert value_at(cifar("byol", override), key) == value


@pytest.mark.parametrize("text", ["a, (b) [c] {d: e}", "it's", r"C:\x\new", "x=1", "ends\\", "\\'", "null", "5", " a "])
def test_assign_sets_any_text(text):
    assert overlay({"name": "x"}, [assign("name", text)]).name == text


def test_a_key_that_names_a_group_of_files_selects_one(tmp_path):
    (tmp_path / "seeds").mkdir()
    (tmp_path / "seeds" / "one.yaml").write_text("# @package _global_\nseed: 1\n")
    (tmp_path / "seeds" / "two.yaml").write_text("# @package _global_\nseed: 2\n")
    (tmp_path / "run.yaml").write_text("defaults: [_self_, {seeds: one}]\nname: x\n")
    assert compose(tmp_path, "run").seed == 1
    assert compose(tmp_path, "run.yaml", ["seeds=two", "name=y"]) == {"name": "y", "seed": 2}


@pytest.mark.parametrize(
    "folder, name, words",
    [
        (CIFAR.with_name("cifr10"), "byol", ["no folder", f"did you mean '{CIFAR}'"]),
        (SCRIPTS / "pretran" / "cifar10", "byol", ["no folder", f"did you mean '{CIFAR}'"]),
        (CIFAR, "byo", ["no file", f"did you mean '{CIFAR / 'byol.yaml'}'"]),
        (CIFAR, "swav.yaml", ["no file", "swav.yaml"]),
    ],
)
def test_missing_file(folder, name, words):
    with pytest.raises(ConfigError) as error:
        compose(folder, name)
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize(
    "text", ["a: [1", "a: 1\n  b: 2", "defaults: [{x: y}]", "defaults: 5", "\tx: 1", "- 1", "a: ${nowhere}", "\x00"]
)
def test_broken_yaml_is_one_sentence(tmp_path, text):
    (tmp_path / "broken.yaml").write_text(text)
    with pytest.raises(ConfigError) as error:
        resolve(compose(tmp_path, "broken"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "override, words",
    [
        ("devices=0,1", "devices=[0,1]"),
        ("seed", "not an override such as key=value"),
        ("a={b:1", "not an override such as key=value"),
        ("~nothere", "'nothere' does not exist"),
        ("+seed=1", "++seed=1"),
        ("augmentations.7.crop_size=3", "augmentations.7.crop_size=3"),
    ],
)
def test_bad_override(override, words):
    overrides = [override] if override != "+seed=1" else ["seed=1", "+seed=1"]
    assert words in refused(*overrides)


# Refusing.


@pytest.mark.parametrize(
    "overrides, words",
    [
        (["method=byl"], ["there is no method 'byl'", "did you mean 'byol'"]),
        (["method=supervised"], ["projector_ema_byol", "res_mocov3"]),
        (["method=null"], ["method is missing"]),
        (["~max_epochs"], ["max_epochs is missing"]),
        (["~backbone"], ["backbone.name is missing"]),
        (["optimizer.lr=???"], ["optimizer.lr is missing"]),
        (["optimizer.lr=fast"], ["optimizer.lr must be a number, not 'fast'"]),
        (["optimizer.lr=nan"], ["optimizer.lr must be a finite number"]),
        (["optimizer.lr=-0.1"], ["optimizer.lr"]),
        (["optimizer.batch_size=2.5"], ["optimizer.batch_size must be a whole number"]),
        (["optimizer.classifier_lr=null"], ["optimizer.classifier_lr is null"]),
        (["lr=0.1"], ["unknown key 'lr'", "'optimizer.lr'"]),
        (["data.num_worker=1"], ["'data.num_worker'", "'data.num_workers'"]),
        (["momentum.warmup_epochs=1"], ["'scheduler.warmup_epochs'"]),
        (["method_kwargs.queue=1"], ["proj_hidden_dim"]),
        (["momentum=0.9"], ["momentum must be a mapping with the keys base_tau"]),
        (["momentum.base_tau=1.5"], ["momentum.base_tau"]),
        (["augmentations=[]"], ["augmentations"]),
        (["augmentations=3"], ["augmentations must be a list"]),
        (["augmentations.1.rrc.crop_min_scale=2"], ["augmentations.1.rrc.crop_min_scale"]),
        (["augmentations.1.crop_size=64"], ["augmentations.1.crop_size", "the largest come first"]),
        (["augmentations.1.crop_size=16"], ["two need the same crop_size"]),
        (["augmentations.0.crop_size=24", "augmentations.1.crop_size=32"], ["augmentations.1.crop_size: 32 px after"]),
        (["augmentations.0.num_crops=2", "augmentations.1.num_crops=0"], ["augmentations.1.num_crops"]),
        (["name=a/b"], ["name must be a name for files", "without slashes"]),
        (["name=''"], ["name must be a name for files"]),
        ([f"name={'x' * 181}"], ["name must be a name for files", "at most 180 bytes"]),
        (["devices=0"], ["devices must be", "not 0"]),
        (["devices=all"], ["devices must be", "'all'"]),
        (["devices=[0,0]"], ["devices must be"]),
        (["devices=[]"], ["devices must be"]),
        (["accelerator=gup"], ["did you mean 'gpu'"]),
        (["strategy=dpp"], ["did you mean 'ddp'"]),
        (["precision=bf16-mix"], ["precision must be", "did you mean 'bf16-mixed'"]),
        (["accumulate_grad_batches=0"], ["accumulate_grad_batches must be a whole number of at least 1"]),
        (["limit_train_batches=1.5"], ["limit_train_batches"]),
        (["gradient_clip_algorithm=nrm"], ["did you mean 'norm'"]),
        (["seed=-1"], ["seed"]),
        (["logger=true"], ["logger is set by solo-ext itself", "wandb.enabled"]),
        (["callbacks=[]"], ["callbacks"]),
        (["enable_checkpointing=true"], ["checkpoint.enabled"]),
        (["default_root_dir=x"], ["checkpoint.dir"]),
        (["name=${nam}"], ["nam"]),
    ],
)
def test_refused(overrides, words):
    message = refused(*overrides)
    assert all(word in message for word in words), message


TYPO_LETTERS = "abcdefghijklmnopqrstuvwxyz_"
OUT_OF_RANGE = {
    "optimizer.lr": [-1.0, float("nan"), float("inf")],
    "optimizer.weight_decay": [-1e-4],
    "optimizer.batch_size": [0, -8],
    "optimizer.name": ["lasr"],
    "scheduler.name": ["cosin"],
    "scheduler.warmup_epochs": [-1],
    "momentum.base_tau": [-0.1, 1.1, float("nan")],
    "momentum.schedule": ["linear"],
    "momentum.buffers": ["copied"],
    "intra.weight": [-1.0],
    "intra.distance": ["cosinus"],
    "intra.every": [0],
    "gap.every": [0],
    "data.num_workers": [-1],
    "data.fraction": [0.0, 2.0],
    "data.dataset": ["cifar"],
    "data.format": ["image_folders"],
    "augmentations.0.color_jitter.prob": [1.5],
    "augmentations.0.color_jitter.hue": [0.7],
    "augmentations.0.rrc.crop_max_scale": [0.0],
    "augmentations.0.crop_size": [0],
    "augmentations.0.progressive": [[[5]], [[5, 999]], [[5, 8], [3, 8]], [[0, 8]]],
    "augmentations.0.num_crops": [-1],
    "checkpoint.frequency": [0],
    "knn_eval.k": [0],
    "max_epochs": [0, -5],
    "num_nodes": [0],
    "devices": [0, -2],
    "backbone.name": ["resnet19"],
    "seed": [-3],
}


def misspelled(word: str, rng: random.Random) -> str:
    """One letter dropped, doubled, swapped, replaced or added, or the case changed."""
    i = rng.randrange(len(word))
    edits = [
        word[:i] + word[i + 1 :],
        word[: i + 1] + word[i:],
        word[:i] + word[i + 1 : i + 2] + word[i : i + 1] + word[i + 2 :],
        word[:i] + rng.choice(TYPO_LETTERS) + word[i + 1 :],
        word[:i] + rng.choice(TYPO_LETTERS) + word[i:],
        word.capitalize(),
    ]
    return rng.choice([edit for edit in edits if edit and edit != word])


def mutate(cfg: dict, rng: random.Random) -> tuple[str, str | None]:
    """Damages `cfg` in place. Returns the full key that has to be named, and the one to be suggested, if any."""
    kind = rng.choice(["key", "key", "type", "range"])
    if kind == "range":
        key = rng.choice(sorted(OUT_OF_RANGE))
        change(cfg, key, rng.choice(OUT_OF_RANGE[key]))
        return key, None
    # any type will do for the stages; what is derived is computed anew
    free = (
        "momentum.stages",
        "optimizer.effective",
        "backbone.kwargs",
        "data.num_c",
        "data.num_l",
        "data.num_s",
        "data.info",
    )
    found = {key: value for key, value in leaves(cfg).items() if value is not None and not key.startswith(free)}
    key = rng.choice(sorted(found))
    if kind == "type":
        wrong = {
            bool: [5, "maybe", [True], {"on": True}],
            int: ["fast", [[1]], {"value": 1}],
            float: ["fast", True, [0.1], {"value": 1}],
            str: [{"a": 1}, [1, 2], True],
            list: [5.5, "word"],
        }
        change(cfg, key, rng.choice(wrong[type(found[key])]))
        return key, None
    path = key.split(".")
    depth = rng.choice([i for i, part in enumerate(path) if not part.isdigit()])
    node, right = node_at(cfg, path[:depth]), path[depth]
    wrong = misspelled(right, rng)
    if wrong in node:
        return mutate(cfg, rng)
    node[wrong] = node.pop(right)
    return ".".join([*path[:depth], wrong]), ".".join([*path[:depth], right])


def node_at(cfg: dict, path: list[str]):
    for part in path:
        cfg = cfg[int(part)] if part.isdigit() else cfg[part]
    return cfg


def change(cfg: dict, key: str, value) -> None:
    *path, last = key.split(".")
    node_at(cfg, path)[last] = value


def test_mutated_configurations_are_refused_by_name_and_the_nearest_key_is_right():
    rng = random.Random(0)
    originals = [plain(shipped(f)) for f in rng.sample([f for f in SHIPPED if "pretrain" in f.parts], 5)]
    suggested = right = 0
    for _ in range(250):
        cfg = copy.deepcopy(rng.choice(originals))
        key, meant = mutate(cfg, rng)
        with pytest.raises(ConfigError) as error:
            resolve(cfg)
            pytest.fail(f"accepted after changing {key}")
        message = str(error.value)
        assert key in message and "\n" not in message, (key, message)
        if meant:
            suggested += 1
            # optimizer.kwargs, whose keys depend on the optimizer, are suggested without the section
            right += f"did you mean '{meant}'" in message or f"did you mean '{meant.split('.')[-1]}'" in message
    assert suggested > 100
    assert right >= 0.95 * suggested, f"{right} of {suggested}"


# What follows.


@pytest.mark.parametrize(
    "overrides, images",
    [
        ([], 256),
        (["optimizer.batch_size=64"], 64),
        (["devices=[0,1]", "optimizer.batch_size=128"], 256),
        (["devices=4", "num_nodes=2"], 2048),
        (["devices='0,2,3'", "accumulate_grad_batches=5"], 256 * 15),
        (["devices='2'", "optimizer.batch_size=100"], 200),
    ],
)
def test_effective_lr_is_per_256_images_of_an_optimizer_step(overrides, images):
    cfg = cifar("byol", *overrides)
    assert cfg.optimizer.lr == 1.0 and cfg.optimizer.classifier_lr == 0.1
    assert cfg.optimizer.effective_lr == pytest.approx(images / 256)
    assert cfg.optimizer.effective_classifier_lr == pytest.approx(0.1 * images / 256)
    assert resolve(plain(cfg)) == cfg


def test_linear_lr_leaves_the_accumulation_out():
    file = SCRIPTS / "linear" / "cifar10" / "byol.yaml"
    cfg = shipped(file, "optimizer.batch_size=512", "accumulate_grad_batches=4")
    assert cfg.optimizer.effective_lr == pytest.approx(0.6)


@pytest.mark.parametrize("cached, processes", [(True, 1), (False, 2)])
def test_a_cached_linear_evaluation_has_one_process_whatever_the_devices(cached, processes):
    file = SCRIPTS / "linear" / "cifar10" / "byol.yaml"
    cfg = shipped(file, "optimizer.batch_size=256", "devices=2", f"cache_features={cached}")
    assert cfg.optimizer.effective_lr == pytest.approx(0.3 * processes)


@pytest.mark.parametrize("method", METHODS)
def test_what_the_method_declares_is_in_the_configuration(method):
    cls = METHODS[method]
    cfg = cifar("mocov3", f"method={method}", "~method_kwargs")
    assert cfg.momentum.stages == cls.teacher_stages
    assert cfg.intra == cls.intra
    assert cfg.method_kwargs.loss_scale == cls.loss_scale
    own = cifar("mocov3", f"method={method}", "~method_kwargs", "momentum.stages=none", "intra.weight=0.5")
    assert own.momentum.stages == "none" and own.intra.weight == 0.5 and own.intra.distance == cls.intra.distance
    kwargs = {key.partition(".")[2] for key in keys(cls.Kwargs, "method_kwargs")}
    assert set(vars(own.method_kwargs)) - {"_section"} == kwargs


def test_a_resolved_configuration_can_be_pickled():
    cfg = cifar("res_byol", "momentum.stages={block4:0.5}")
    again = pickle.loads(pickle.dumps(cfg))
    assert type(again) is type(cfg) and again == cfg and again.optimizer is not cfg.optimizer


def test_custom_data_counts_its_folders_or_waits_for_them(tmp_path):
    for name in ("cat", "dog", "owl"):
        (tmp_path / "train" / name).mkdir(parents=True)
    custom = ["data.dataset=custom", "data.val_path=null"]
    cfg = cifar("byol", *custom, f"data.train_path={tmp_path / 'train'}")
    assert cfg.data.num_classes == 3
    assert cifar("byol", *custom, f"data.train_path={tmp_path / 'train'}", "data.no_labels=true").data.num_classes == 0
    assert cifar("byol", *custom, "data.train_path=/nowhere").data.num_classes is None
    moved = plain(cfg) | {"data": plain(cfg.data) | {"train_path": "/nowhere"}}
    assert resolve(moved).data.num_classes == 3


def test_solo_learns_unused_keys_are_accepted_with_a_line(caplog, monkeypatch):
    monkeypatch.setattr(METHODS.declared["byol"], "unused_kwargs", ("temperature",), raising=False)
    unused = ["auto_umap.enabled=false", "debug_augmentations=true", "dali.device=gpu", "method_kwargs.temperature=1"]
    cfg = cifar("byol", *unused)
    values = plain(cfg)
    assert not {"auto_umap", "debug_augmentations", "dali"} & set(values)
    assert "temperature" not in values["method_kwargs"]
    said = [record.getMessage() for record in caplog.records]
    assert [line.split()[0] for line in said] == [
        "auto_umap",
        "dali",
        "debug_augmentations",
        "method_kwargs.temperature",
    ]


# Evaluating a run.


@pytest.mark.parametrize("kind", ["linear", "knn"])
def test_an_evaluation_takes_encoder_and_data_from_the_run(tmp_path, kind):
    run = cifar(
        "byol",
        "data.train_path=/images",
        "data.val_path=/images",
        "data.fraction=0.1",
        "data.no_labels=true",
        "precision=bf16-mixed",
    )
    args = plain(run) | {"accelerator": "gpu", "devices": [0, 1]}
    args["data"]["format"] = "dali"  # as solo-learn's own runs may have
    (tmp_path / "args.json").write_text(json.dumps(args))
    torch.save({"state_dict": {"backbone.conv1.weight": torch.zeros(1)}, "epoch": 3}, tmp_path / "byol-x-ep=3.ckpt")
    cfg = resolve(run_values(tmp_path, kind, ["data.num_workers=0"]), kind)
    assert cfg.pretrained_feature_extractor == str(tmp_path / "byol-x-ep=3.ckpt")
    assert (cfg.pretrain_method, cfg.backbone.name, cfg.precision) == ("byol", "resnet18", "bf16-mixed")
    assert (cfg.data.train_path, cfg.data.format, cfg.data.num_workers) == ("/images", "auto", 0)
    seen = {
        "crop_size": 32,
        "mean": [0.4914, 0.4822, 0.4465],
        "std": [0.247, 0.243, 0.261],
    }  # solo-learn's, of both sets
    assert plain(cfg.data.augmentations) == seen
    assert (cfg.data.fraction, cfg.data.no_labels, cfg.data.num_classes) == (-1, False, 10)  # all labels
    assert (cfg.accelerator, cfg.devices) == ("auto", 1)  # this machine, not the run's
    assert resolve(cfg, kind) == cfg
    other = run_values(tmp_path, kind, ["data.dataset='cifar100'", "data.train_path=/others"]).data
    assert (other.train_path, other.val_path) == ("/others", None), "not the run's, which are of another dataset"


@pytest.mark.parametrize(
    "dataset, method, overrides, recipe, lr",
    [
        ("cifar10", "byol", [], "linear/cifar10/byol", 0.3),
        ("cifar10", "res_simsiam", [], "linear/cifar10/res_simsiam", 30.0),
        ("cifar100", "projector_ema_mocov2plus", [], "linear/cifar100/projector_ema_mocov2plus", 3.0),
        ("imagenet100", "ressl", [], "linear/imagenet100/ressl", 3.0),
        ("stl10", "simclr", [], "linear/imagenet100/simclr", 1.0),
        ("cifar10", "simsiam", ["optimizer.lr=7"], "linear/cifar10/simsiam", 7.0),
        ("cifar10", "simsiam", ["cache_features=True"], None, 0.3),
        ("cifar10", "vicreg", [], None, 0.3),
        ("stl10", "res_moco", [], "linear/imagenet100/res_mocov3", 0.3),
        ("cifar10", "res_moco", [], "linear/cifar10/res_mocov3", 0.3),
        ("cifar10", "their_simsiam", [], "linear/cifar10/simsiam", 30.0),
        ("cifar10", "res_their_simsiam", [], "linear/cifar10/simsiam", 30.0),
    ],
)
def test_a_linear_evaluation_takes_its_methods_recipe(
    tmp_path, caplog, monkeypatch, dataset, method, overrides, recipe, lr
):
    theirs = type("TheirSimSiam", (METHODS.declared["simsiam"],), {})
    for name, declared in {"their_simsiam": theirs, **variants(theirs, "their_simsiam")}.items():
        monkeypatch.setitem(METHODS.declared, name, declared)
    values = plain(cifar("byol")) | {"method": method}
    values["data"] |= {"dataset": dataset, "train_path": None}
    (tmp_path / "args.json").write_text(json.dumps(values))
    torch.save({"state_dict": {"backbone.conv1.weight": torch.zeros(1)}, "epoch": 3}, tmp_path / "x-ep=3.ckpt")
    with caplog.at_level("INFO", "solo_ext"):
        cfg = resolve(run_values(tmp_path, "linear", overrides), "linear")
    assert (cfg.recipe, cfg.optimizer.lr, cfg.optimizer.weight_decay, cfg.max_epochs) == (recipe, lr, 0, 100)
    assert (cfg.scheduler.name, cfg.scheduler.lr_decay_steps, cfg.optimizer.batch_size) == ("step", [60, 80], 256)
    said = f"linear recipe: {recipe.removeprefix('linear/') if recipe else 'none of '}"
    assert caplog.text.count(said) == (not cfg.cache_features)


def test_an_evaluation_of_a_bare_checkpoint_needs_words(tmp_path):
    file = tmp_path / "weights.ckpt"
    torch.save({"state_dict": {"backbone.conv1.weight": torch.zeros(1)}}, file)
    with pytest.raises(ConfigError, match=re.escape("data.dataset")):
        resolve(run_values(file, "knn"), "knn")
    cfg = resolve(run_values(file, "knn", ["data.dataset=cifar10", "backbone.name=resnet18"]), "knn")
    assert cfg.backbone.name == "resnet18" and list(cfg.knn_eval.k) == [1, 20]


@pytest.mark.parametrize(
    "sizes, refused", [([32, 24, 24, 24, 32], 4), ([24, 32, 32], 1), ([24, 24, 32], 2), ([32, 32, 24], None)]
)
def test_large_crops_come_first(sizes, refused):
    """The teacher sees the first `num_large_crops` views, so that no small one may stand among them."""
    values = plain(resolve(compose(ROOT / "scripts/pretrain/cifar10", "byol")))
    values["augmentations"] = [{**values["augmentations"][0], "crop_size": size, "num_crops": 1} for size in sizes]
    if refused is None:
        assert resolve(values).data.num_large_crops == 2
    else:
        with pytest.raises(ConfigError, match=rf"^augmentations.{refused}.crop_size: 32 px"):
            resolve(values)


@pytest.mark.parametrize("method", ["byol", "simclr"])
def test_a_batch_of_one_image_is_refused(method):
    with pytest.raises(ConfigError, match=r"^optimizer.batch_size: one image is too few for BatchNorm and for a contr"):
        cifar(method, "optimizer.batch_size=1")
    with pytest.raises(ConfigError, match="one image"):  # which each device normalises by itself
        cifar(method, "optimizer.batch_size=1", "devices=2")
    assert cifar(method, "optimizer.batch_size=1", "devices=2", "sync_batchnorm=true").optimizer.batch_size == 1
    assert cifar(method, "optimizer.batch_size=2").optimizer.batch_size == 2
