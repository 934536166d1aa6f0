"""Recipes by name: found from anywhere, derived where no paper prints them, listed, copied."""

import shutil

import pytest
import yaml
from omegaconf import OmegaConf

from solo_ext.errors import ConfigError
from solo_ext.training import recipes
from solo_ext.training.compose import compose

PRETRAIN = recipes.scripts() / "pretrain"


def content(file, *overrides: str) -> dict:
    return OmegaConf.to_container(compose(file.parent, file.name, overrides))


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["pretrain", "cifar10/res_mocov3", "seed=7", "--cfg"], "seed: 7"),
        (["pretrain", "cifar10/res_dino", "--cfg"], "method: res_dino"),
        (["pretrain", "imagenet100/byol", "--cfg"], "dataset: imagenet100"),
        (["pretrain", PRETRAIN / "custom" / "res_dino.yaml", "--cfg"], "method: res_dino"),
        (["pretrain", "-cp", PRETRAIN / "cifar10", "-cn", "res_dino", "--cfg"], "method: res_dino"),
        (["linear", "cifar10/projector_ema_simclr", "pretrained_feature_extractor=x", "--cfg"], "projector_ema_simclr"),
        (["study", "projector_ema/table3", "dataset=fashion_mnist_mini", "--dry-run"], "byol_y_y_constant-seed5"),
    ],
)
def test_commands_take_a_name_from_any_folder(run, elsewhere, words, said):
    status, out, err = run(*words)
    assert status == 0 and said in out, err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["pretrain", "cifar10/res_dinoo"], "there is no recipe 'cifar10/res_dinoo'; did you mean 'cifar10/res_dino'?"),
        (["plan", "cifar11/byol"], "there is no recipe 'cifar11/byol'; did you mean 'cifar10/byol'?"),
        (["linear", "cifar10/biol"], "did you mean 'cifar10/byol'?"),
        (["linear", "x/y"], "there is no recipe 'x/y'; solo-ext recipes lists them"),
        (["study", "residual/tabel2"], "did you mean 'residual/table2'?"),
        (["pretrain", "cifar10/"], "did you mean 'cifar10/"),
        (["pretrain", PRETRAIN / "cifar10" / "res_dinoo.yaml"], "res_dino.yaml'?"),
        (["pretrain", "-cp", PRETRAIN / "cifar10", "cifar10/byol"], "'cifar10/byol' is not an override"),
        (["recipes", "cifar10/biol"], "no recipe has 'cifar10/biol' in its name; did you mean 'cifar10/byol'?"),
        (["recipes", "copy", "cifar10/byol"], "takes a recipe's name and a folder"),
        (["recipes", "copy", "cifar10/biol", "x"], "did you mean 'cifar10/byol'?"),
    ],
)
def test_mistyped_names_are_refused(run, elsewhere, words, said):
    status, out, err = run(*words)
    assert status == 2 and said in err and err.count("\n") == 1 and not out
    assert not list(elsewhere.iterdir())


def test_the_file_of_a_printed_variant_counts():
    assert not recipes.derived(PRETRAIN / "cifar10" / "res_mocov3.yaml")
    assert recipes.derived(PRETRAIN / "cifar10" / "res_moco.yaml") is None
    assert recipes.derived(PRETRAIN / "cifar10" / "res_projector_ema_byol.yaml") is None


def test_a_framework_is_one_file_per_dataset(tmp_path):
    """A framework that nobody has seen, in the folders of a user: its variants are there at once."""
    shutil.copytree(PRETRAIN / "_shared", tmp_path / "_shared")
    (tmp_path / "cifar10").mkdir()
    (tmp_path / "cifar10" / "fresh.yaml").write_text("method: fresh\nmax_epochs: 3\nseed: 1\n")
    assert recipes.names(tmp_path / "cifar10") == ["fresh", "projector_ema_fresh", "res_fresh"]
    residual = content(tmp_path / "cifar10" / "res_fresh.yaml", "seed=2")
    assert (residual["method"], residual["max_epochs"], residual["seed"]) == ("res_fresh", 1000, 2)
    assert residual["intra"]["weight"] == 1
    assert content(tmp_path / "cifar10" / "res_fresh.yaml", "method=mine")["method"] == "mine"

    (tmp_path / "cifar10" / "fresh.yaml").write_text("method: [unclosed\n")
    with pytest.raises(ConfigError, match=r"fresh.yaml cannot be read as YAML"):
        compose(tmp_path / "cifar10", "res_fresh")


def test_the_list_has_every_recipe_and_study(run):
    status, out, _ = run("recipes")
    rows = {words[0]: " ".join(words[1:]) for line in out.splitlines() if (words := line.split()) and line[0] == " "}
    places = [p for kind in ("pretrain", "studies") for p in (recipes.scripts() / kind).glob("[!_]*") if p.is_dir()]
    assert status == 0 and rows.keys() == {f"{p.name}/{name}" for p in places for name in recipes.names(p)}
    assert "residual momentum, Table 1 (93.71)" in rows["cifar10/res_mocov3"] and "derived" in rows["cifar10/res_dino"]
    assert all(rows.values())

    status, some, _ = run("recipes", "cifar100", "res_")
    assert status == 0 and "cifar100/res_byol" in some and "dino_vit" not in some and "cifar10/" not in some


@pytest.mark.parametrize("name", ["cifar100/res_mocov3", "imagenet/projector_ema_simclr", "linear/cifar100/res_dino"])
def test_a_copy_composes_by_itself(run, elsewhere, name):
    status, out, err = run("recipes", "copy", name, "mine")
    assert status == 0, err
    copied = elsewhere / out.strip()
    kind = "linear" if name.startswith("linear/") else "pretrain"
    assert content(copied) == content(recipes.find(name.removeprefix("linear/"), kind))
    assert copied.read_text().startswith("# ") and not recipes.derived(copied)

    assert run("recipes", "copy", name, "mine")[0] == 0  # the same files
    values = yaml.safe_load(copied.read_text())
    copied.write_text(yaml.safe_dump(values | {"seed": 9}))
    status, _, err = run("recipes", "copy", name, "mine")
    assert status == 2 and "exists, with other values" in err and content(copied)["seed"] == 9
    status, _, err = run("recipes", "copy", name, copied)
    assert status == 2 and "cannot be written" in err
