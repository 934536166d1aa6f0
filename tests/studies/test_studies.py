"""The studies and the papers' results: the numbers agree with themselves, and each run is what its labels say."""

import json
import re
import subprocess
import sys
from collections import defaultdict
from decimal import Decimal
from functools import cache
from pathlib import Path

import pytest
import torch
from conftest import fit, random_batches, value_at
from omegaconf import OmegaConf

from solo_ext.methods import METHODS
from solo_ext.schema import plain
from solo_ext.studies.rows import load_table, read_text_yaml
from solo_ext.studies.study import load_study
from solo_ext.training.compose import compose
from solo_ext.training.config import resolve

STUDIES = Path(__file__).parents[2] / "scripts" / "studies"
RESULTS = STUDIES / "paper_results.yaml"
FILES = sorted(file for paper in ("projector_ema", "residual") for file in STUDIES.glob(f"{paper}/*.yaml"))
TABLES = list(read_text_yaml(RESULTS))

every_study = pytest.mark.parametrize("file", FILES, ids=lambda f: f"{f.parent.name}/{f.stem}")
every_table = pytest.mark.parametrize("table", TABLES)

TOGETHER = {
    "A": "table1 table2 table3 table4 table5 table6 table7 tableC8 tableD9 "
    "figure2 figure3 figure4 figure5 figure6 figureC7 figureC8",
    "B": "table1 table2 table3 table4 table5 table6 table7 table13 table14 table15 table16 "
    "figure2 figure4 figure6_cifar10 figure6_cifar100 figure7_imagenet figure7_imagenet100 figure8 figure11 figure12 "
    "section33",
}
FOLDER = {"A": "projector_ema", "B": "residual"}


@cache
def study(file: Path):
    return load_study(file)


@cache
def item(file: Path) -> str:
    """The table or figure that a study names."""
    content = read_text_yaml(file)
    return content.get("table") or content["figure"]


@cache
def recipe(file: Path):
    cfg = compose(file.parent, file.name)
    OmegaConf.set_struct(cfg, False)
    return cfg


@cache
def resolved(file: Path, *overrides: str):
    """The configuration of a recipe with plain overrides: what `Cell.config` gives, for a fraction of Hydra's time."""
    return resolve(OmegaConf.merge(recipe(file), OmegaConf.from_dotlist(list(overrides))))


def printed(cell):
    """The configuration of the paper's setting."""
    file, overrides = cell.as_printed
    return resolved(file, *overrides)


def of(table: str) -> Path:
    [file] = [file for file in FILES if item(file) == table]
    return file


# The papers' numbers.


def numbers(table) -> list[tuple[dict, dict]]:
    """(labels, {column: the number exactly as printed}) of each row that prints something."""
    n = len(table.keys)
    return [
        (
            dict(zip(table.keys, row[:n], strict=True)),
            {column: Decimal(text) for column, text in zip(table.values, row[n:], strict=True) if text is not None},
        )
        for row in table.rows
    ]


@every_table
def test_rows_are_complete_different_and_possible(table):
    table = load_table(RESULTS, table)
    assert all(len(row) == len(table.keys) + len(table.values) for row in table.rows)
    assert len({tuple(row[: len(table.keys)]) for row in table.rows}) == len(table.rows)
    for labels, values in numbers(table):
        assert all(0 <= value <= 100 for value in values.values()), labels
        for one, other in (("Top-1", "Top-5"), ("VOC AP", "VOC AP50"), ("COCO AP", "COCO AP50")):
            if {one, other} <= values.keys():
                assert values[one] < values[other], labels


# runs that two tables print differently, and the paper's own words for it
DIFFER = {
    ("B-16 SimSiam, -, -", "B-2 SimSiam, -, -"): {"Top-1": ("66.50", "66.04"), "KNN-1": ("59.00", "59.01")},
    ("B-16 ReSSL, Y, -", "B-2 ReSSL, Y, -"): {"Top-1": ("66.00", "65.92")},
}
SHARED = [  # which tables print the same run
    {"A-1", "A-3", "A-7", "A-C.8", "A-Fig4", "A-Fig6"},  # BYOL
    {"A-1", "A-C.8", "A-Fig4"},  # without momentum
    {"A-3", "A-C.8", "A-Fig4", "A-Fig6"},  # with the projector's
    {"A-3", "A-Fig4"},  # with the backbone's
    *[{"A-1", "A-3", "A-Fig6"}] * 3,  # DINO, ReSSL, MoCo v2
    *[{"A-3", "A-Fig6"}] * 3,  # with the projector's
    *[{"B-2", "B-16"}] * 4,  # BYOL, Res-BYOL, ReSSL, SimSiam
    *[{"B-2", "B-7"}] * 2,  # MoCo v3, Res-MoCo
    *[{"B-3", "B-5", "B-15"}] * 2,
    *[{"B-5", "B-13", "B-14"}] * 2,  # with a ResNet-50
    *[{"B-4", "B-6"}] * 2,
]


def run_of(cfg) -> str:
    """What is trained, without what is only watched."""
    values = plain(cfg)
    values["momentum"].pop("classifier")
    if values["method"] == "res_byol" and not values["intra"]["weight"]:
        values["intra"] = None
    watched = ("name", "gap", "gradients", "knn_eval")
    return json.dumps({key: value for key, value in values.items() if key not in watched}, sort_keys=True)


def test_one_run_has_one_result_in_all_tables():
    runs = defaultdict(dict)
    for name in TABLES:
        rows = {tuple(labels.values()): values for labels, values in numbers(load_table(RESULTS, name))}
        for cell in study(of(name)).cells:
            if cell.epoch in (None, printed(cell).max_epochs):
                labels = tuple(text for column, text in cell.labels.items() if column != "Reading")
                runs[run_of(printed(cell))][name] = labels, rows[labels]
    shared = [sorted(tables) for tables in runs.values() if len(tables) > 1]
    assert sorted(shared) == sorted(map(sorted, SHARED))
    differ = defaultdict(dict)
    for tables in runs.values():
        alike = {"Acc": "Top-1"}
        sides = [
            (f"{name} {', '.join(labels)}", {alike.get(k, k): v for k, v in values.items()})
            for name, (labels, values) in sorted(tables.items())
        ]
        for one, ours in sides:
            for other, theirs in sides:
                for column in ours.keys() & theirs.keys():
                    if one < other and ours[column] != theirs[column]:
                        differ[one, other][column] = str(ours[column]), str(theirs[column])
    assert differ == DIFFER


# The files.


def test_every_table_and_figure_has_a_study():
    assert {(f.parent.name, f.stem) for f in FILES} == {
        (FOLDER[paper], stem) for paper, stems in TOGETHER.items() for stem in stems.split()
    }
    assert sorted(item(file) for file in FILES if study(file).table) == sorted(TABLES)


LETTERS = {"ProjectorEMA": "A", "Residual momentum": "B"}


def introduction(file: Path) -> tuple[str, str, str]:
    """Paper, table or figure, and what it shows: the first line of a study."""
    first = file.read_text().splitlines()[0]
    return re.fullmatch(
        r"# (ProjectorEMA|Residual momentum), ((?:Table|Fig\.|Sec\.) [\w.]+)(?: and Fig\. 5)?: (.+)\.", first
    ).groups()


@every_study
def test_name_id_and_first_line_agree(file):
    paper, what, _ = introduction(file)
    kind, number = what.split()
    assert FOLDER[LETTERS[paper]] == file.parent.name
    names, ids = {"Table": "table", "Fig.": "figure", "Sec.": "section"}, {"Table": "", "Fig.": "Fig", "Sec.": "Sec"}
    assert file.stem.split("_")[0] == names[kind] + number.replace(".", "")
    assert item(file) == f"{LETTERS[paper]}-{ids[kind]}{number}"
    if study(file).table:
        assert study(file).table.source.startswith(f"{paper}, {what}")


def test_the_index_lists_the_studies():
    lines = re.findall(r"^\| \[(.+)\]\((.+)\) \| (.+), (.+) \| (.+) \|$", (STUDIES / "README.md").read_text(), re.M)
    expected = set()
    for file in FILES:
        path = f"{file.parent.name}/{file.name}"
        paper, what, shows = introduction(file)
        expected.add((path, path, paper, what, shows[0].upper() + shows[1:]))
    assert len(lines) == len(expected) and set(lines) == expected


def test_the_page_of_all_items_is_that_of_the_studies():
    root = STUDIES.parents[1]
    done = subprocess.run([sys.executable, root / "benchmarks" / "reproduction.py", "--check"], timeout=300)
    assert done.returncode == 0, "python benchmarks/reproduction.py writes it anew"


# The runs.

PAPERS = {
    "A": {"dataset": "cifar100", "backbone": "resnet18", "epochs": 200, "schedule": "constant", "tau": 0.99},
    "B": {"dataset": "cifar100", "backbone": "resnet18", "epochs": 1000, "schedule": "cosine", "tau": 0.996},
}
IMAGENET = {"dataset": "imagenet", "backbone": "resnet50", "epochs": 200, "tau": 0.99}
RESNET50 = {"dataset": "imagenet100", "backbone": "resnet50"}
SETTINGS = {
    "projector_ema/table4": IMAGENET | {"framework": "dino"},
    "projector_ema/figureC7": IMAGENET | {"framework": "dino"},
    "projector_ema/table5": {"backbone": "resnet50"},
    "projector_ema/table6": {"dataset": "imagenet100"},
    "projector_ema/tableD9": {"dataset": "cifar10"},
    "residual/table1": {"dataset": "cifar10"},
    "residual/table3": {"dataset": "imagenet100"},
    "residual/table4": IMAGENET,
    "residual/table5": {"dataset": "imagenet100"},
    "residual/table6": IMAGENET,
    "residual/table13": RESNET50,
    "residual/table14": RESNET50,
    "residual/table15": {"dataset": "imagenet100"},
    "residual/figure2": {"dataset": "imagenet100"},
    "residual/figure6_cifar10": {"dataset": "cifar10"},
    "residual/figure7_imagenet": IMAGENET,
    "residual/figure7_imagenet100": {"dataset": "imagenet100"},
    "residual/figure8": {"dataset": "imagenet100"},
}
FRAMEWORKS = {
    "BYOL": "byol",
    "DINO": "dino",
    "MoCo v2": "mocov2plus",
    "MoCo-v2": "mocov2plus",
    "MoCo-v3": "mocov3",
    "MoCo": "mocov3",
    "ReSSL": "ressl",
    "SimCLR": "simclr",
    "SimSiam": "simsiam",
}
BACKBONES = {"ResNet-18": "resnet18", "ResNet-34": "resnet34", "ResNet-50": "resnet50", "ViT-S": "vit_small"}
MARK = {"Y": True, "-": False}
SCOPES = {(True, True): "full", (True, False): "backbone", (False, True): "projector", (False, False): "none"}
STAGES = {  # what a label of ProjectorEMA says of the stages with EMA
    "nothing": "none",
    "Conv1": ["conv1"],
    "Block1": ["block1"],
    "Block2": ["block2"],
    "Block3": ["block3"],
    "Block4": ["block4"],
    "Projector": "projector",
    "Block4 + Projector": ["block4", "projector"],
    "Conv1 + Block1-4": "backbone",
    "Whole encoder": "full",
    "whole": "full",
    "projector": "projector",
    "Fixed g(.)": {"projector": 1.0},
    "Fixed random encoder": "none",
    "no momentum": "none",
    "w/ momentum, beta 0.9": ["projector.fc2"],
    "w/ momentum, beta 0.99": ["projector.fc2"],
    "momentum 0.9": ["projector.fc2"],
    "momentum 0.99": ["projector.fc2"],
}


def labelled_config(file: Path, labels: dict[str, str]) -> dict:
    """What the labels of a cell say of its configuration, given its study's settings."""
    paper = LETTERS[introduction(file)[0]]
    settings = {"framework": "byol"} | PAPERS[paper] | SETTINGS.get(f"{file.parent.name}/{file.stem}", {})
    method = labels.get("Method", labels.get("Setup", labels.get("EMA on", "")))
    bare = re.sub(r"^Res-| (\+|w/|w/o) .*|, .*", "", method)
    cfg = {
        "method": FRAMEWORKS.get(bare, settings["framework"]),
        "data.dataset": settings["dataset"],
        "backbone.name": BACKBONES.get(labels.get("Arch", labels.get("Architecture")), settings["backbone"]),
        "max_epochs": settings["epochs"],
        "momentum.schedule": {"cosine": "cosine"}.get(labels.get("Reading"), settings["schedule"]),
        "momentum.final_tau": 1.0,
        "momentum.base_tau": settings["tau"],
        "momentum.buffers": "own",
        "method_kwargs.loss_scale": {"solo-learn": "solo"}.get(
            labels.get("Reading"), {"A": "solo", "B": "paper"}[paper]
        ),
        "scheduler.warmup_epochs": 40 if labels.get("Arch") == "ViT-S" else 10,
    }
    taus = {label: label for label in ("0.9", "0.90", "0.99", "0.9995", "0.996")}
    taus |= {label: label.split()[-1] for label in STAGES if label.endswith(("0.9", "0.99"))}
    for label in (labels.get("beta"), labels.get("Setup")):
        if label in taus:
            cfg["momentum.base_tau"] = float(taus[label])
    if paper == "A":
        places = [key for key in labels if re.match(r"EMA (backbone|projector)|.* momentum", key)]
        if places:
            cfg["momentum.stages"] = SCOPES[tuple(MARK[labels[key]] for key in places)]
        elif labels.get("EMA") in MARK:
            cfg["momentum.stages"] = "full" if MARK[labels["EMA"]] else "none"
        else:
            scope = "none" if "w/o" in method else "projector" if "EMA projector" in method else "full"
            cfg["momentum.stages"] = STAGES.get(labels.get("EMA"), STAGES.get(method, scope))
        cfg |= {
            "momentum.inter": True,
            "momentum.classifier": False,
            "intra.weight": 0.0,
            "backbone.last_norm": "BN1" in method or method.endswith("+ BN"),
        }
        if cfg["method"] == "byol":
            cfg["method_kwargs.proj_last_norm"] = "BN2" in method or method.endswith("+ BN")
            cfg["method_kwargs.proj_hidden_dim"] = 2 if "Setup" in labels else 4096
        lr = {"byol": 1.0 if settings["dataset"] != "imagenet100" else 0.5}.get(cfg["method"])
        lr = 0.0 if "random" in method else float(labels["lr"]) if "lr" in labels else lr
        if lr is not None:
            cfg |= {"optimizer.lr": lr, "optimizer.classifier_lr": 0.1}
    else:
        own = bool(re.search(r"^Res-|\+ Intra", method))
        intra = MARK[labels["Intra-M"]] if "Intra-M" in labels else own
        without = cfg["method"] in ("simclr", "simsiam") or "w/o" in method
        inter = MARK[labels["Inter-M"]] if "Inter-M" in labels else not without
        stages = "full" if inter or intra or "w/o EMA" in method else "none"
        cfg |= {
            "intra.weight": float(intra),
            "momentum.inter": inter or stages == "none",
            "momentum.stages": stages,
            "momentum.classifier": file.stem == "figure4",
            "intra.distance": ("mse" if "MSE" in method else "ce" if "CE" in method else "cosine")
            + {"mean": "_mean", "as printed": "_printed"}.get(labels.get("Reading"), ""),
            "intra.target": "projector" if "asymmetric" in method else "predictor",
            "intra.every": 8000 if "on and off" in method else None,
        }
        cfg["method"] = f"res_{cfg['method']}" if intra or cfg["method"] == "byol" else cfg["method"]
        if file.stem != "table6":
            cfg["gap.at"] = "predictor"
        if "mocov3" in cfg["method"]:
            cfg["method_kwargs.temperature"] = float(labels.get("temperature", 0.2))
    if not cfg["method"].endswith(("byol", "mocov3")):
        cfg["method_kwargs.loss_scale"] = None  # solo-learn's and the papers' are one
    return cfg


@every_study
def test_each_run_is_what_its_labels_say(file):
    for cell in study(file).cells:
        expected = labelled_config(file, cell.labels)
        cfg = printed(cell)
        assert {key: value_at(cfg, key) for key in expected} == expected, cell.labels
        cfg = plain(cfg)
        metrics = {metric.metric for metric in study(file).metrics.values()} | set(study(file).curves)
        assert cfg["knn_eval"]["enabled"] or not any("knn" in metric for metric in metrics)
        assert cfg["gradients"]["enabled"] == any("grad_linf" in metric for metric in metrics)
        if study(file).readout:
            assert cell.epoch == int(cell.labels["Epoch"]) and cell.epoch % cfg["knn_eval"]["every"] == 0
        elif "Epoch" in cell.labels:
            assert cfg["max_epochs"] == int(cell.labels["Epoch"])
    assert cell.printed_config == printed(cell)


TERM = ("method", "name", "intra", "momentum.inter", "momentum.stages")


@pytest.mark.parametrize("file", [f for f in FILES if f.parent.name == "residual"], ids=lambda f: f.stem)
def test_a_baseline_and_its_residual_twin_differ_in_the_term_only(file):
    runs = defaultdict(list)
    for cell in study(file).cells:
        cfg = plain(printed(cell))
        rest = tuple(v for k, v in cell.labels.items() if k not in ("Method", "Inter-M", "Intra-M"))
        loss = METHODS[cfg["method"]].loss, getattr(METHODS[cfg["method"]], "paper_distance", None)
        for key in TERM:
            section, _, name = key.rpartition(".")
            (cfg[section] if section else cfg).pop(name)
        runs[printed(cell).method.removeprefix("res_"), rest].append((cell.labels, loss, cfg))
    twins = [cells for cells in runs.values() if len(cells) > 1]
    assert twins
    for (_, *first), *others in twins:
        for labels, *other in others:
            assert other == first, labels


MINI = ["data.dataset=fashion_mnist_mini", "max_epochs=2"]


@every_study
def test_every_study_resolves_on_the_bundled_images(file):
    for cell in load_study(file, MINI).runs:
        cfg = resolved(cell.recipe, *cell.overrides, "seed=1")
        assert cell.recipe.parent.name == cfg.data.dataset == "fashion_mnist_mini"
        assert (cfg.max_epochs, cfg.seed) == (2, 1)
    assert cell.config(seed=1) == cfg


# What the labels of Table 2 of ProjectorEMA mean in a network.


def bottleneck(setup: str):
    """Its BYOL, slimmed, for random images."""
    small = ["backbone.name=resnet10_w16", "precision=32-true", "accelerator=cpu", "optimizer.batch_size=8"]
    cells = {cell.labels["Setup"]: cell for cell in load_study(of("A-2"), small).cells}
    torch.manual_seed(0)
    return METHODS["byol"](cells[setup].config(seed=5))


def test_ema_on_fc2_is_a_teacher_of_256_filters_of_two_weights():
    model = bottleneck("w/ momentum, beta 0.9")
    assert [name for name, tau in model.teacher.taus.items() if tau.base] == ["projector.fc2"]
    assert [(name, tuple(p.shape)) for name, p in model.named_parameters() if name.startswith("momentum_")] == [
        ("momentum_projector.3.weight", (256, 2)),
        ("momentum_projector.3.bias", (256,)),
    ]


def test_a_fixed_random_encoder_trains_its_classifier_alone():
    model = bottleneck("Fixed random encoder")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    fit(model, random_batches(4))
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"classifier.weight", "classifier.bias"}
    assert all(torch.isfinite(p).all() for p in model.parameters())


@pytest.mark.parametrize("file", sorted(STUDIES.glob("photographs/*.yaml")), ids=lambda f: f.stem)
def test_the_studies_on_photographs_have_one_setting(file):
    """But for what they vary, so that cells of different ones compare."""
    ours = load_study(file)
    ours.check()
    assert ours.seeds == [0, 1, 2]
    for cell in ours.runs:
        cfg = plain(cell.config(0))
        assert cell.recipe.parent.name == "cifar10_small" and cfg["data"]["dataset"] == "custom"
        setting = [cfg["backbone"]["name"], cfg["max_epochs"], cfg["optimizer"]["batch_size"], cfg["data"]["fraction"]]
        assert setting == ["resnet10_w16", 50, 256, 0.4]
