"""The zoo: its index, commands, and the entries that are in the repository."""

import functools
import hashlib
import json
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
import yaml
from conftest import build
from hub_server import TOKEN

import solo_ext
from solo_ext.errors import CheckpointError, SoloExtError
from solo_ext.runs import zoos
from solo_ext.runs.encoder import load_encoder
from solo_ext.runs.run import Run
from solo_ext.training.config import resolve, run_values
from solo_ext.training.recipes import find as find_recipe
from solo_ext.zoo import edit, store
from solo_ext.zoo.index import Entry, markdown, read_index, short, write_index

ROOT = Path(solo_ext.__file__).parents[1]
ZOO = ROOT / "zoo"
ENTRIES = read_index(ZOO)
WEIGHTS = [name for name, entry in ENTRIES.items() if entry.files]
RECIPES = [name for name, entry in ENTRIES.items() if not entry.files]
SAMPLE = WEIGHTS[0]


@pytest.fixture(autouse=True)
def installed_zoo(monkeypatch):
    """No zoo of one's own."""
    monkeypatch.delenv(zoos.ZOO, raising=False)


@pytest.fixture
def parse(tmp_path):
    """A function: the text of an index -> its entries."""

    def parse(text: str | bytes) -> dict[str, Entry]:
        (tmp_path / "index.yaml").write_bytes(text.encode() if isinstance(text, str) else text)
        return read_index(tmp_path)

    return parse


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A zoo of one's own, with a copy of the entry SAMPLE."""
    folder = tmp_path / "a b"
    shutil.copytree(ZOO / ENTRIES[SAMPLE].folder, folder / ENTRIES[SAMPLE].folder)
    write_index(folder / "index.yaml", [ENTRIES[SAMPLE]])
    monkeypatch.setenv(zoos.ZOO, str(folder))
    return folder


@pytest.fixture
def run_folder(tmp_path):
    """A run folder as `pretrain` leaves it, of a network with random weights, evaluated."""
    folder = tmp_path / "runs" / "byol" / "abcd1234"
    folder.mkdir(parents=True)
    method = build("byol")
    config = {
        "name": "tiny",
        "method": "byol",
        "backbone": {"name": "resnet10_w16", "kwargs": {}},
        "data": {"dataset": "cifar10", "train_path": "/home/someone/data", "val_path": None},
        "wandb": {"enabled": False, "entity": "someone", "project": "secret"},
        "checkpoint": {"dir": "/home/someone/runs"},
        "max_epochs": 3,
    }
    (folder / "args.json").write_text(json.dumps(config))
    torch.save({"state_dict": method.state_dict(), "epoch": 2}, folder / "tiny-abcd1234-ep=2.ckpt")
    (folder / "metrics.csv").write_text("epoch,train_loss\n0,1.5\n")
    command = ["/home/someone/bin/solo-ext", "pretrain", "scripts/pretrain/cifar10/byol.yaml", "max_epochs=3"]
    environment = {"command": [*command, "data.train_path=/home/someone/data"], "packages": {"torch": "2.14.1"}}
    (folder / "environment.json").write_text(json.dumps(environment))
    protocol = {"features": "backbone", "distance": "cosine", "k": 20, "T": 0.07}
    evaluated(folder, "knn.json", "tiny-abcd1234-ep=2.ckpt", 41.5, **protocol)
    return folder


def evaluated(folder, name, checkpoint, acc1, **protocol):
    """Adds a result of the very file `checkpoint`."""
    file = {"checkpoint": checkpoint, "sha256": hashlib.sha256((folder / checkpoint).read_bytes()).hexdigest()}
    data = {"data.dataset": "cifar10", "data.fraction": -1.0, "data.val_fraction": 0.0, "augmented": False}
    Run(folder).add_results(name, [{"protocol": {**file, **data, **protocol}, "acc1": acc1, "acc5": 80.0}])


# What is in the repository.


@pytest.mark.parametrize("name", WEIGHTS)
def test_files_in_the_repository_are_as_the_index_says(name):
    entry = ENTRIES[name]
    assert {file.name for file in entry.files} >= {"model.safetensors", "args.json", entry.log, entry.environment}
    for file in entry.files:
        data = (ZOO / file.path).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (file.size, file.sha256), file.path
        if not file.name.endswith(".safetensors"):
            assert not any(word in data.decode() for word in ("/tmp/", "/work/", "/root/", "/home/")), file.path
    assert {path.name for path in (ZOO / entry.folder).iterdir()} == {file.name for file in entry.files}
    assert entry.figures and entry.licence and entry.fingerprint
    recipe = entry.recipe.path.removeprefix("scripts/pretrain/").removesuffix(".yaml")
    assert find_recipe(recipe) == ROOT / entry.recipe.path
    config = json.loads((ZOO / entry.folder / "args.json").read_text())
    assert (config["method"], config["backbone"]["name"]) == (entry.method, entry.backbone)
    assert (config["data"]["dataset"], config["max_epochs"]) == (entry.dataset, entry.epochs)
    assert {figure.metric for figure in entry.figures} == {"linear top-1", "kNN-1", "kNN-20"}


def test_no_stray_files_in_the_zoo():
    folders = {path.relative_to(ZOO).as_posix() for path in ZOO.glob("*/*") if path.is_dir()}
    assert {folder for folder in folders if not folder.startswith("references/")} == {
        ENTRIES[name].folder for name in WEIGHTS
    }


@pytest.mark.parametrize("name", RECIPES[::9])
def test_what_trains_a_recipe_is_a_command_that_works_in_any_folder(name, run):
    """The folder of `run` is no checkout."""
    with pytest.raises(CheckpointError) as error:
        ENTRIES[name].check_weights()
    command = re.search(r"; solo-ext (pretrain .*) trains it", str(error.value))[1]
    status, out, _ = run(*shlex.split(command), "--cfg")
    assert status == 0 and all(word.partition("=")[2] in out for word in ENTRIES[name].recipe.overrides)


@pytest.mark.parametrize("readme", [ROOT / "README.md", ZOO / "README.md"])
def test_tables_are_the_index(readme):
    text = readme.read_text(encoding="utf-8")
    between = text.partition("<!-- zoo -->\n")[2].partition("<!-- /zoo -->")[0]
    assert between == markdown(ENTRIES.values(), weights=readme.parent == ROOT), "run: python zoo/recipes.py"


def test_recipes_are_those_of_the_papers():
    """The recipes' entries are what zoo/recipes.py writes today, and each value is in the table that it names."""
    sys.path.insert(0, str(ZOO))
    try:
        import recipes
    finally:
        sys.path.remove(str(ZOO))
    assert {e.name: e for e in recipes.recipes() if e.name not in WEIGHTS} == {name: ENTRIES[name] for name in RECIPES}
    tables = yaml.safe_load((ROOT / "scripts/studies/paper_results.yaml").read_text())
    for name in RECIPES:
        [figure] = ENTRIES[name].figures
        paper, numbers = figure.protocol.removeprefix("printed: ").split(", Table")
        letter = {"ProjectorEMA": "A", "residual momentum": "B"}[paper]
        keys = [f"{letter}-{number}" for number in numbers.removeprefix("s").strip().split(" and ")]
        assert all(any(figure.value in row for row in tables[key]["rows"]) for key in keys), name


@pytest.mark.parametrize("name", [name for name in WEIGHTS if "mini" in name][:2])
def test_figures_come_out_again(name, run):
    """kNN of the shipped weights on the bundled images."""
    status, out, err = run("knn", "--run", name, "--k", "1", "20", "--distance", "cosine", "data.num_workers=0")
    assert status == 0, err
    accuracies = {f"kNN-{line.split()[2]}": float(line.split("acc@1")[1].split()[0]) for line in out.splitlines()}
    figures = {score.metric: score.value for score in ENTRIES[name].figures}
    # another CPU's bfloat16 may turn a few of 1,000 images
    assert accuracies == {metric: pytest.approx(figures[metric], abs=0.5) for metric in ("kNN-1", "kNN-20")}


# Names and tables.


@pytest.mark.parametrize(
    ("backbone", "name"),
    [
        ("resnet18", "r18"),
        ("resnet10_w16", "r10w16"),
        ("vit_small", "vit-s"),
        ("timm/convnext_tiny", "timm-convnext-tiny"),
    ],
)
def test_short_names(backbone, name):
    assert short(backbone) == name


def test_an_index_is_read_as_it_was_written(tmp_path):
    write_index(tmp_path / "index.yaml", ENTRIES.values())
    assert read_index(tmp_path) == ENTRIES
    assert (tmp_path / "index.yaml").read_bytes() == (ZOO / "index.yaml").read_bytes()


# An index that cannot be right.

GOOD = {
    "name": "byol-a-r18",
    "method": "byol",
    "backbone": "resnet18",
    "dataset": "a",
    "epochs": 1,
    "files": [{"path": "a/byol-a-r18/model.safetensors", "size": 3, "sha256": "0" * 64}],
}


def changed(**changes):
    file = {**GOOD["files"][0], **{key[5:]: value for key, value in changes.items() if key.startswith("file_")}}
    file = {key: value for key, value in file.items() if value is not None}
    entry = {**GOOD, "files": [file], **{key: value for key, value in changes.items() if not key.startswith("file_")}}
    return yaml.safe_dump({"entries": [entry]})


def test_the_good_index_is_good(parse):
    [entry] = parse(changed()).values()
    assert entry.folder == "a/byol-a-r18" and entry.files[0].name == "model.safetensors"
    [entry] = parse(changed(repository="jane/zoo", revision="0" * 40)).values()
    assert (entry.repository, entry.revision) == ("jane/zoo", "0" * 40)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"file_path": "../../etc/passwd"}, "files.path must be 'a/byol-a-r18/<name>'"),
        ({"file_path": "a/byol-a-r18/../model.safetensors"}, "files.path must be"),
        ({"file_path": "/etc/model.safetensors"}, "files.path must be"),
        ({"file_path": "a/byol-a-r18/.."}, "files.path must be 'a/byol-a-r18/<name>', the name of letters"),
        ({"file_path": "a/byol-a-r18/"}, "files.path must be 'a/byol-a-r18/<name>', the name of letters"),
        ({"file_path": "a/byol-a-r18/a\\b"}, "files.path must be 'a/byol-a-r18/<name>', the name of letters"),
        ({"file_path": "a/byol-a-r18/.hidden"}, "files.path must be 'a/byol-a-r18/<name>', the name of letters"),
        ({"file_path": "a/byol-a-r18/x"}, "has no model.safetensors"),
        ({"file_path": None}, "path is missing"),
        ({"file_url": "https://example.org/model.safetensors"}, "unknown key"),
        ({"repository": "jane/zoo"}, "needs both repository and revision"),
        ({"revision": "0" * 40}, "needs both repository and revision"),
        ({"repository": "jane/../zoo", "revision": "0" * 40}, "repository must be owner/name"),
        ({"repository": "https://x.org/a", "revision": "0" * 40}, "repository must be owner/name"),
        ({"repository": "jane/zoo", "revision": "main"}, "revision must be 40 hexadecimal digits"),
        ({"file_size": -1}, "files.0.size must be a whole number of at least 0"),
        ({"file_size": "many"}, "size must be a whole number"),
        ({"file_sha256": "0" * 63}, "64 hexadecimal digits"),
        ({"file_sha256": "../" * 20}, "64 hexadecimal digits"),
        ({"name": ".."}, "name must be letters"),
        ({"name": "a/b"}, "name must be letters"),
        ({"name": "x" * 200}, "name must be letters"),
        ({"dataset": "../a"}, "dataset must be letters"),
        ({"epoch": 3}, "unknown key"),
        ({"log": "../log"}, "is none of the files"),
        ({"recipe": {"path": "x", "sha256": "1"}}, "64 hexadecimal digits"),
        ({"files": "x"}, "files must be a list"),
    ],
)
def test_a_bad_entry_is_refused(changes, message, parse):
    with pytest.raises(CheckpointError, match=r"/index\.yaml is not an index of a zoo") as error:
        parse(changed(**changes))
    assert message in str(error.value)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "entries",
        "entries: {}",
        "entries: [1]",
        "\x00",
        "<html>no index</html>",
        "a: &a [1]\nentries: [*a]",
        "entries: !!python/object/apply:os.system [true]",
        "[" * 5000,
        "entries: [" + ",".join([changed()[11:].replace("\n", " ")] * 0) + "]]",
        " " * (11 << 20),
    ],
)
def test_what_is_no_index_is_refused(text, parse):
    with pytest.raises(CheckpointError, match="is not an index of a zoo"):
        parse(text)


def test_a_name_twice_is_refused(parse):
    with pytest.raises(CheckpointError, match="has 'byol-a-r18' twice"):
        parse(changed() + changed().removeprefix("entries:\n"))


def test_mutated_indexes_are_read_or_refused(parse):
    """1,000 of ours with bytes changed, cut or doubled: a dictionary of entries, or our error."""
    text = yaml.safe_dump({"entries": yaml.safe_load((ZOO / "index.yaml").read_text())["entries"][:2]}).encode()
    draw, refused = random.Random(0), 0
    for _ in range(1000):
        mutated = bytearray(text)
        for _ in range(draw.randint(1, 4)):
            at = draw.randrange(len(mutated))
            kind = draw.randrange(4)
            if kind == 0:
                mutated[at] = draw.randrange(256)
            elif kind == 1:
                del mutated[at : at + draw.randint(1, 40)]
            elif kind == 2:
                mutated[at:at] = mutated[at : at + draw.randint(1, 40)]
            else:
                mutated[at:at] = draw.choice([b"../", b"\n", b": ", b"- ", b"'", b"null", b"1e999", b"{", b"\xff"])
        try:
            for entry in parse(bytes(mutated)).values():
                assert isinstance(entry, Entry) and ".." not in entry.folder.split("/")
        except CheckpointError:
            refused += 1
    assert 300 < refused < 1000


# Where entries lie.


def test_an_entry_is_used_where_it_lies(monkeypatch):
    monkeypatch.setattr(store, "hf", None)  # nobody is asked
    path, content = store.fetch(store.find(SAMPLE))
    assert path == ZOO / ENTRIES[SAMPLE].folder / "model.safetensors" and content == path.read_bytes()
    assert {state for _, state in store.verify(ENTRIES[SAMPLE])} == {"ok"}


def test_weights_are_read_once(monkeypatch):
    """Hashed and loaded are the very same bytes."""
    reads, read_bytes = [], Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: [reads.append(path.name), read_bytes(path)][1])
    solo_ext.load_backbone(SAMPLE)
    assert reads.count("model.safetensors") == 1


def test_weights_are_hashed_when_they_are_loaded(own):
    folder = own / ENTRIES[SAMPLE].folder
    before = solo_ext.load_backbone(SAMPLE).state_dict()
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    safetensors.torch.save_file({name: x * 2 for name, x in tensors.items()}, folder / "model.safetensors")
    assert [path for path, state in store.verify(ENTRIES[SAMPLE]) if state != "ok"] == [folder / "model.safetensors"]
    with pytest.raises(
        CheckpointError, match=r"model\.safetensors is missing or damaged: it is not what the index says"
    ):
        solo_ext.load_backbone(SAMPLE)
    with pytest.raises(CheckpointError, match="differs from its SHA-256"):
        load_encoder(folder)
    os.environ.pop(zoos.ZOO)
    after = solo_ext.load_backbone(SAMPLE).state_dict()
    assert all(torch.equal(x, after[name]) for name, x in before.items())


def test_a_zoo_of_ones_own_goes_first(run_folder, tmp_path, own, monkeypatch):
    """Also where it has weights for what is only a recipe here."""
    added = edit.add(run_folder, own, name=next(name for name in RECIPES if name.endswith("cifar10-r18")))
    assert not ENTRIES[added.name].files
    assert store.entries().keys() == ENTRIES.keys() and store.find(added.name) == added
    for name, zoo in ((SAMPLE, own), (WEIGHTS[1], ZOO)):
        assert store.fetch(store.find(name))[0].is_relative_to(zoo)
    assert load_encoder(store.fetch(store.find(added.name))[0])[1]["method"] == "byol"


@pytest.mark.parametrize("value", ["nowhere", "https://x.org/zoo", "{tmp}"])
def test_a_zoo_that_is_none_is_refused(value, monkeypatch, run, tmp_path):
    value = value.format(tmp=tmp_path)
    monkeypatch.setenv(zoos.ZOO, value)
    status, out, err = run("zoo", "download", SAMPLE)
    assert (status, out) == (2, "") and f"SOLO_EXT_ZOO: '{value}' is not the folder of a zoo: it has no index" in err
    (tmp_path / "index.yaml").write_text("<html><body>Not found</body></html>")
    monkeypatch.setenv(zoos.ZOO, str(tmp_path))
    status, _, err = run("zoo", "list")
    assert status == 2 and f"{tmp_path / 'index.yaml'} is not an index of a zoo" in err


def test_evaluations_are_kept_where_the_user_is(run, tmp_path, own):
    words = ("--k", "1", "--distance", "cosine", "data.num_workers=0", "data.dataset=fashion_mnist_mini")
    assert run("knn", "--run", SAMPLE, *words)[0] == 0
    folder = tmp_path / "trained_models" / "zoo" / SAMPLE
    assert Run(folder).evaluations["knn.json"][0]["protocol"]["checkpoint"] == "model.safetensors"
    assert json.loads((folder / "args.json").read_text())["method"] == ENTRIES[SAMPLE].method
    assert {path.name for path in (own / ENTRIES[SAMPLE].folder).iterdir()} == {f.name for f in ENTRIES[SAMPLE].files}
    assert run("knn", "--run", SAMPLE, *words, "checkpoint.dir=elsewhere")[0] == 0
    assert (tmp_path / "elsewhere" / "zoo" / SAMPLE / "knn.json").is_file()


def test_a_mutated_args_json_is_read_or_refused(own):
    """What an entry's configuration says goes into networks, data and paths: 60 with values of other types."""
    folder = own / ENTRIES[SAMPLE].folder
    args, draw, refused = json.loads((folder / "args.json").read_text()), random.Random(0), 0

    def places(node, at=()):
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            yield (*at, key)
            if isinstance(value, dict | list):
                yield from places(value, (*at, key))

    every = [place for place in places(args) if place[0] in ("backbone", "data", "augmentations", "checkpoint")]
    for _ in range(60):
        mutated = json.loads(json.dumps(args))
        *above, last = draw.choice(every)
        node = functools.reduce(lambda value, key: value[key], above, mutated)
        if draw.random() < 0.2:
            del node[last]
        else:
            node[last] = draw.choice([None, 1, -1, 1e9, "", "x", [], {}, [1], {"a": 1}, True, "???", "${oops}"])
        (folder / "args.json").write_text(json.dumps(mutated))
        try:
            load_encoder(folder)
            resolve(run_values(folder, "knn"), "knn")
        except SoloExtError as error:
            assert "\n" not in str(error)
            refused += 1
    assert 10 < refused < 60


# Adding.


def test_a_run_becomes_an_entry(run_folder, tmp_path, run):
    zoo = tmp_path / "own" / "zoo"
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "README.md").write_text("before\n<!-- zoo -->\n<!-- /zoo -->\nafter\n")
    shutil.copytree(ROOT / "scripts/pretrain/cifar10", tmp_path / "own/scripts/pretrain/cifar10")
    shutil.copytree(ROOT / "scripts/pretrain/_shared", tmp_path / "own/scripts/pretrain/_shared")
    status, _, err = run("zoo", "add", run_folder, "--zoo", zoo)
    assert status == 0, err
    [entry] = read_index(zoo).values()
    assert entry.name == "byol-cifar10-r10w16" and entry.epochs == 3 and entry.licence == "MIT"
    [figure] = entry.figures
    assert (figure.metric, figure.value) == ("kNN-20", 41.5) and "before its weights were rounded" in figure.protocol
    assert entry.recipe.path == "scripts/pretrain/cifar10/byol.yaml" and entry.recipe.overrides == ["max_epochs=3"]
    by_name = edit.recipe_from(["solo-ext", "pretrain", "cifar10/res_byol", "seed=1"], tmp_path / "own")
    assert (by_name.path, by_name.overrides) == ("scripts/pretrain/cifar10/res_byol.yaml", ["seed=1"])
    assert "byol-cifar10-r10w16" in (tmp_path / "own" / "README.md").read_text()
    folder = zoo / entry.folder
    assert {path.name for path in folder.iterdir()} == {file.name for file in entry.files}
    for path in folder.iterdir():
        assert path.suffix == ".safetensors" or "someone" not in path.read_text(), path
    ours, stored = load_encoder(run_folder)[0].state_dict(), load_encoder(folder)[0].state_dict()
    for name, x in ours.items():
        torch.testing.assert_close(stored[name], x, rtol=1e-3, atol=1e-6)

    status, _, err = run("zoo", "add", run_folder, "--zoo", zoo)
    assert status == 2 and "has 'byol-cifar10-r10w16' already" in err
    status, _, err = run("zoo", "add", run_folder, "--zoo", run_folder / "metrics.csv" / "zoo")
    assert status == 2 and "metrics.csv/zoo cannot be written: Not a directory" in err and err.count("\n") == 1
    before = (zoo / "index.yaml").read_bytes()
    status, _, err = run("zoo", "add", run_folder, "--zoo", zoo, "--name", SAMPLE)
    assert status == 2 and f"the zoo in {ZOO} has '{SAMPLE}' already; give another --name" in err  # it is shipped
    (run_folder / "knn.json").unlink()
    status, _, err = run("zoo", "add", run_folder, "--zoo", zoo, "--name", "other")
    assert status == 2 and f"has not been evaluated: solo-ext knn --run {run_folder} does it" in err
    shutil.copytree(run_folder, tmp_path / "a b")
    status, _, err = run("zoo", "add", tmp_path / "a b", "--zoo", zoo, "--name", "other")
    assert status == 2 and f"solo-ext knn --run '{tmp_path}/a b' does it" in err
    vote = {"features": "backbone", "distance": "cosine", "k": 20, "T": 0.07}
    evaluated(folder, "knn.json", "model.safetensors", 41.5, **vote)
    status, _, err = run("zoo", "add", folder, "--zoo", zoo, "--name", "../other")
    assert status == 2 and "name must be letters" in err
    assert (zoo / "index.yaml").read_bytes() == before and [p.name for p in zoo.glob("*/*")] == [entry.name]
    assert run("zoo", "add", folder, "--zoo", zoo, "--name", "other")[0] == 0  # an export is one, too
    assert "rounded" not in read_index(zoo)["other"].figures[0].protocol
    assert (zoo / "cifar10" / "other" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


LINEAR = {"max_epochs": 100, "optimizer.name": "sgd", "optimizer.lr": 0.3, "seed": 5}
OTHER = [
    {"finetune": True},
    {"data.fraction": 0.1},
    {"data.val_fraction": 0.2},
    {"data.dataset": "cifar100"},
    {"mixup": 0.8},
    {"cutmix": 1.0},
    {"label_smoothing": 0.1},
    {"limit_train_batches": 10},
    {"limit_val_batches": 1},
    {"max_steps": 10},
    {"other_view": True},
    {"callbacks.my.Own": None, "callbacks.my.Other.every": 3},
    {"sha256": "0" * 64},
]


@pytest.mark.parametrize("change", OTHER, ids=lambda change: next(iter(change)))
@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
def test_only_a_linear_evaluation_is_published_as_one(run_folder, tmp_path, change, before):
    """Frozen, on all labels of its own data, of the very file; whatever else was evaluated before or after it."""
    file = "tiny-abcd1234-ep=2.ckpt"
    (run_folder / "knn.json").unlink()
    evaluated(run_folder, "linear.json", file, 99.0, **LINEAR | change)
    with pytest.raises(CheckpointError, match="has not been evaluated by the standard protocol"):
        edit.add(run_folder, tmp_path / "zoo")
    assert not list((tmp_path / "zoo").glob("**/*.safetensors"))
    if before:
        (run_folder / "linear.json").unlink()
    evaluated(run_folder, "linear.json", file, 60.0, **LINEAR)
    if before:
        evaluated(run_folder, "linear.json", file, 99.0, **LINEAR | change)
    [figure] = edit.add(run_folder, tmp_path / "zoo").figures
    assert (figure.metric, figure.value) == ("linear top-1", 60.0) and "100 epochs, sgd, lr 0.3" in figure.protocol


# The commands.


def test_list_and_download_import_no_torch(tmp_path):
    """They run where it takes long to load, such as the first node of a cluster."""
    code = f"import sys; from solo_ext.cli.main import main; main(['zoo', 'download', {SAMPLE!r}]); "
    code += "main(['zoo', 'list']); main(['zoo', 'verify', '--all']); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "False", done.stderr


def test_list_and_show(run):
    status, out, _ = run("zoo", "list")
    assert status == 0 and all(name in out for name in ENTRIES)
    status, out, _ = run("zoo", "list", "res_", "--weights", "--json")
    assert status == 0 and [e["name"] for e in json.loads(out)] == [name for name in WEIGHTS if "res_" in name]
    status, out, _ = run("zoo", "list", "--markdown", "--weights")
    assert status == 0 and out == markdown(ENTRIES.values())
    status, out, _ = run("zoo", "show", SAMPLE)
    assert status == 0 and yaml.safe_load(out)["files"] and "# on this machine: yes" in out


def test_download_and_verify(run, own, hub, monkeypatch):
    folder = own / ENTRIES[SAMPLE].folder
    status, out, _ = run("zoo", "download", SAMPLE)
    assert status == 0 and out.strip() == str(folder)
    status, out, _ = run("zoo", "verify", "--all")
    assert status == 0 and {line.split()[0] for line in out.splitlines()} == {"ok"}
    (folder / "args.json").write_text("{}")
    status, out, err = run("zoo", "verify", SAMPLE)
    assert status == 2 and "damaged" in out and "args.json is damaged)" in err and "fetches" not in err


def test_publish_and_download(run, own, hub, monkeypatch, tmp_path, caplog):
    words = ("zoo", "publish", SAMPLE, "--repo", "jane/zoo", "--zoo", own)
    before = (own / "index.yaml").read_bytes()
    status, _, err = run(*words)
    assert status == 2 and "--repo needs a token of the Hugging Face Hub" in err and not hub.seen
    monkeypatch.setenv("HF_TOKEN", TOKEN + "x")
    status, _, err = run(*words)
    assert status == 2 and "nothing is published: jane/zoo is refused by http" in err and "status 401" in err
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    for changes, message in (
        ((), "which entry? name one"),
        ((SAMPLE, "--all"), "two ways to say it"),
        ((SAMPLE[:-1],), f"did you mean '{SAMPLE}'?"),
        ((SAMPLE, "--repo", "zoo"), "--repo takes OWNER/NAME"),
        ((SAMPLE, "--zoo", tmp_path / "none"), "index.yaml cannot be read: No such file"),
    ):
        status, _, err = run("zoo", "publish", "--repo", "jane/zoo", "--zoo", own, *changes)
        assert status == 2 and message in err and len(err.splitlines()) == 1
    (own / ENTRIES[SAMPLE].folder / "metrics.csv").write_text("x")
    status, _, err = run(*words)
    assert status == 2 and "metrics.csv is missing or damaged, so nothing is published" in err
    shutil.copy(ZOO / ENTRIES[SAMPLE].folder / "metrics.csv", own / ENTRIES[SAMPLE].folder)
    assert (own / "index.yaml").read_bytes() == before and not hub.repos.get("jane/zoo")

    hub.repos["jane/zoo"] = {"README.md": b"stays"}
    status, out, err = run(*words)
    assert status == 0, err
    entry = read_index(own)[SAMPLE]
    assert (entry.repository, entry.revision) == ("jane/zoo", hub.commit("jane/zoo"))
    assert out.strip() == f"{hub.url}/jane/zoo/tree/{entry.revision}"
    assert hub.repos["jane/zoo"].keys() == {"README.md", *(file.path for file in entry.files)}
    assert TOKEN not in out + err + caplog.text

    expected = solo_ext.load_backbone(SAMPLE).state_dict()
    shutil.rmtree(own / entry.dataset)
    write_index(own / "index.yaml", [entry])
    monkeypatch.setattr(zoos, "installed", lambda: own)  # a machine that has no more than the index
    status, out, err = run("zoo", "verify", "--all")
    assert (status, out) == (0, "") and "nothing of the zoo is on this machine" in err
    assert "# on this machine: no" in run("zoo", "show", SAMPLE)[1]
    status, out, _ = run("zoo", "download", "--all")
    folder = Path(out.strip())
    assert status == 0 and folder.is_relative_to(tmp_path / "hub") and folder.name == SAMPLE
    assert "# on this machine: yes" in run("zoo", "show", SAMPLE)[1]
    loaded = solo_ext.load_backbone(SAMPLE).state_dict()
    assert all(torch.equal(x, loaded[name]) for name, x in expected.items())
    (folder / "args.json").unlink()
    (folder / "args.json").write_text("{}")
    status, out, err = run("zoo", "verify", SAMPLE)
    assert status == 2 and "damaged" in out and f"solo-ext zoo download {SAMPLE} fetches them" in err
    assert run("zoo", "download", SAMPLE)[0] == run("zoo", "verify", SAMPLE)[0] == 0


def test_an_entry_that_is_nowhere(own, run):
    (own / "index.yaml").write_text(changed())
    status, _, err = run("zoo", "download", GOOD["name"])
    assert status == 2 and f"the files of 'byol-a-r18' are not in {own} or {ZOO}" in err
    assert run("zoo", "verify", GOOD["name"])[1].split() == ["missing", GOOD["files"][0]["path"]]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("show", SAMPLE[:-1]), f"did you mean '{SAMPLE}'?"),
        (("download",), "which entry?"),
        (("download", SAMPLE, "--all"), "two ways to say it"),
        (("download", "--dataset", "cifar_10"), "the zoo has no weights of cifar_10; did you mean 'cifar10'?"),
        (("download", "--dataset", "cifar10"), "no weights of cifar10, only"),
        (("download", RECIPES[0]), "is a recipe without weights: the paper published none; solo-ext pretrain c"),
        (("publish", RECIPES[0], "--repo", "a/b"), "is a recipe without weights"),
        (("verify", RECIPES[0]), "is a recipe without weights"),
        (("list", "byool"), "no entry with 'byool' in its name"),
        (("downlaod", SAMPLE), "did you mean 'download'?"),
        (("add", "nowhere"), "nowhere does not exist"),
    ],
)
def test_mistakes(words, message, run, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    status, out, err = run("zoo", *words)
    assert (status, out) == (2, "") and message in err and len(err.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_the_bash_script(tmp_path):
    """It calls the command: a `solo-ext` on the path that runs this checkout."""
    solo_ext_script = tmp_path / "solo-ext"
    solo_ext_script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m solo_ext "$@"\n')
    solo_ext_script.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    words = ["bash", ZOO / "download.sh", "--dataset", "fashion_mnist"]
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    folders = [str(ZOO / ENTRIES[name].folder) for name in WEIGHTS if ENTRIES[name].dataset == "fashion_mnist"]
    assert (done.returncode, done.stdout.splitlines()) == (0, folders), done.stderr


def test_a_wheel_has_the_zoo(tmp_path):
    words = ["-q", "egg_info", "--egg-base", tmp_path, "build_py", "--build-lib", tmp_path / "lib"]
    subprocess.run([sys.executable, "setup.py", *map(str, words)], cwd=ROOT, check=True, capture_output=True)
    code = "from solo_ext.runs import zoos; from solo_ext.zoo import store; print(zoos.installed())"
    code += f"; store.fetch(store.find({SAMPLE!r}))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(tmp_path / "lib")},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == str(tmp_path / "lib" / "solo_ext" / "zoo" / "files"), done.stderr
