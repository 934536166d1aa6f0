"""The report reads run folders as they are, however incomplete, and writes one page that needs nothing else."""

import base64
import builtins
import copy
import csv
import gzip
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("plotly")

from matplotlib.figure import Figure
from rich.console import Console

from solo_ext.analysis import figures, pages
from solo_ext.analysis.listing import print_table
from solo_ext.analysis.report import cell, main_report, table_rows
from solo_ext.errors import CheckpointError, ConfigError
from solo_ext.runs.comparison import compare, flatten
from solo_ext.runs.locks import RunLock
from solo_ext.runs.run import Run, find_runs
from solo_ext.text import Metric
from solo_ext.training.loggers import CSVMetrics
from solo_ext.training.metrics import metric_of

ARGS = {
    "name": "tiny",
    "method": "byol",
    "backbone": {"name": "resnet10_w16", "kwargs": {}},
    "method_kwargs": {"loss_scale": "solo"},
    "data": {"dataset": "fashion_mnist_mini", "train_path": None},
    "optimizer": {"name": "adamw", "lr": 0.002, "kwargs": {"betas": [0.9, 0.999]}},
    "augmentations": [
        {"rrc": {"crop_min_scale": 0.3}, "num_crops": 1},
        {"rrc": {"crop_min_scale": 0.3}, "num_crops": 1},
    ],
    "gap": {"at": "predictor"},
    "knn_eval": {"enabled": True, "k": 20, "distance_func": "cosine"},
    "max_epochs": 3,
}


def results(acc1, **protocol):
    """An evaluation as its file has it."""
    protocol = {"augmented": False, "checkpoint": "a.ckpt", **protocol}
    return [{"protocol": protocol, "acc1": acc1, "acc5": 99.0}]


def votes(features, distance, k, T, acc1):
    return results(acc1, features=features, distance=distance, k=k, T=T)


LINEAR = {"results": results(84.25, seed=5, max_epochs=20)}
KNN = {
    "results": [
        *votes("backbone", "euclidean", 1, None, 11.0),
        *votes("projector", "cosine", 1, 0.07, 12.0),
        *votes("backbone", "cosine", 20, 0.5, 13.0),
        *votes("backbone", "cosine", 1, 0.07, 78.5),
        *votes("backbone", "cosine", 20, 0.07, 79.5),
    ]
}
ENVIRONMENT = {
    "command": ["solo-ext", "pretrain", "name=a b"],
    "packages": {"torch": "2.14.0"},
    "commit": {"hash": "0123456789abcdef", "dirty": True},
    "gpus": [],
}


def step_rows(epochs=3, steps=4, loss="train_neg_cos_sim", **more):
    """Rows as a training writes them: some metrics at each second step, the others once an epoch."""
    rows = []
    for step in range(epochs * steps):
        row = {"epoch": step // steps, "step": step}
        if step % 2:
            row |= {"train_loss_step": 2 - 0.1 * step, "gap_sim_step": 0.9, "lr": 0.01 * step, "tau": 0.99}
        if step % steps == steps - 1:
            row |= {"train_loss_epoch": 2 - 0.1 * step, loss: -0.1 * step, "gap_sim_epoch": 0.8 + 0.01 * step}
            row |= {"train_class_loss": 1.0, "val_acc1": 50.0 + step, "val_knn1": 60.0 + step, "val_knn20": 61.0 + step}
            row |= {"images_per_s": 100.0 + step, "weight_distance/conv1": 0.1, "weight_distance/projector.fc1": 0.2}
            row |= {name: value(step) for name, value in more.items()}
        rows.append(row)
    return rows


def write_metrics(folder: Path, rows) -> None:
    columns = ["epoch", "step", *sorted({name for row in rows for name in row} - {"epoch", "step"})]
    with open(folder / "metrics.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows(rows)


def write_run(folder: Path, rows=None, changes=(), **files) -> Path:
    """A run folder with args.json, metrics.csv and `<name>.json` for each of `files`."""
    folder.mkdir(parents=True)
    args = copy.deepcopy(ARGS) | {"method": folder.parent.name}
    for key, value in dict(changes).items():
        *path, last = key.split(".")
        node = args
        for name in path:
            node = node[name]
        node[last] = value
    for name, content in {"args": args, **files}.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    if rows is not None:
        write_metrics(folder, rows)
    return folder


@pytest.fixture
def runs(tmp_path):
    """Two trained runs, one of them without offline evaluation, an untrained encoder, and a linear run."""
    root = tmp_path / "trained_models"
    write_run(
        root / "res_mocov3" / "b2",
        step_rows(loss="train_contrastive_loss", train_intra_loss=lambda step: 0.5),
        {"optimizer.lr": 0.004, "method_kwargs.loss_scale": "paper"},
        environment=ENVIRONMENT,
    )
    result = {"seconds": 1234.4, "images_per_s": 987.6}
    write_run(root / "byol" / "a1", step_rows(), linear=LINEAR, knn=KNN, environment=ENVIRONMENT, result=result)
    write_run(root / "untrained" / "u0", linear={"results": results(70.0, seed=5, max_epochs=20)}, knn=KNN)
    write_run(root / "linear" / "l0", [{"epoch": 0, "step": 0, "train_loss": 1.0}])
    return root


class Page(HTMLParser):
    """The page's tags, checked for balance, and its text."""

    VOID = ("meta", "wbr", "br", "link", "img", "path", "use")

    def __init__(self, page: str):
        super().__init__()
        self.tags, self.open, self.text, self.rows = [], [], "", []
        self.feed(page)
        self.close()
        packed = re.search(r'id="kept">(.*?)</script>', page)
        self.kept = json.loads(gzip.decompress(base64.b64decode(packed[1]))) if packed else []
        self.text += "\n".join(item for item in self.kept if isinstance(item, str))
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th") and self.rows:
            self.rows[-1].append("")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if "td" in self.open or "th" in self.open:
            self.rows[-1][-1] += data


# Reading.


def test_series_are_placed_by_epochs_done(tmp_path):
    run = Run(write_run(tmp_path / "byol" / "a", step_rows(epochs=3, steps=4)))
    steps, epochs, values = run.series("val_acc1")
    assert steps.tolist() == [3, 7, 11] and epochs.tolist() == [1, 2, 3] and values.tolist() == [53, 57, 61]
    assert run.series("tau")[1].tolist() == [0.5, 1, 1.5, 2, 2.5, 3]
    assert run.series("gap_sim")[2].tolist() == pytest.approx([0.83, 0.87, 0.91]), "the epoch's before the step's"
    assert run.last("gap_sim") == pytest.approx(0.91)
    assert run.last("nothing") is None and run.series("nothing")[0].shape == (0,)


def test_series_of_an_untidy_table(tmp_path):
    folder = write_run(tmp_path / "byol" / "a", [])
    (folder / "metrics.csv").write_text(
        "epoch,step,loss_step,tau\n"
        "0,0,1.0,\n"
        "1,3,nan,\n"
        ",1,,0.5\n"  # no epoch, as a learning-rate monitor writes
        "0,1,3.0,\n"
        "1,2,4.0,oops\n"
        "1,2,5.0,\n"  # logged again after a resumption
        "1,4,0.0\0,\n"
        "1,5\n"  # cut short, as the last one may be
        "1,6,7.0,0.5"
    )
    run = Run(folder)
    steps, epochs, values = run.series("loss")
    assert steps.tolist() == [0, 1, 2, 3, 4]
    np.testing.assert_array_equal(values, [1, 3, 5, np.nan, 0])
    np.testing.assert_allclose(epochs, [0.5, 1, 4 / 3, 5 / 3, 2])
    assert run.series("tau")[1].tolist() == [1.0]


def test_reads_what_the_training_writes(tmp_path):
    folder = write_run(tmp_path / "byol" / "a")
    logger = CSVMetrics(folder)
    for epoch in range(2):
        for step in (2 * epoch, 2 * epoch + 1):
            logger.log_metrics({"train_loss_step": step / 10, "epoch": epoch}, step=step)
            logger.log_metrics({"lr": 0.1}, step=step)
        logger.log_metrics({"train_loss_epoch": float(epoch), "epoch": epoch}, step=2 * epoch + 1)
    logger.finalize("success")
    run = Run(folder)
    assert [x.tolist() for x in run.series("train_loss")] == [[1, 3], [1, 2], [0, 1]]
    assert run.series("lr")[1].tolist() == [0.5, 1, 1.5, 2]
    assert set(run.columns) == {"train_loss", "lr"}


def test_a_parent_means_the_runs_below_it(runs):
    def found(path):
        return [run.dir for run in find_runs(path)]

    assert [run.id for run in find_runs(runs)] == ["a1", "b2", "u0"], "without the linear classifier's"
    assert found(runs / "byol" / "a1") == [runs / "byol" / "a1"]
    assert found(runs / "linear" / "l0") == [runs / "linear" / "l0"], "unless it is asked for"


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("byol/a2", "byol/a2 does not exist; did you mean '{root}/byol/a1'?"),
        ("byol/a1/metrics.csv", "is a file, not a run folder; did you mean '{root}/byol/a1'?"),
        ("empty", "empty holds no run folder"),
    ],
)
def test_no_run_names_the_nearest(runs, path, message):
    (runs / "empty" / "folder").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=re.escape(message.format(root=runs))) as error:
        find_runs(runs / path)
    assert str(runs / "byol" / "a1") in str(error.value)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("args.json", '{"name": '),
        ("args.json", "[1]"),
        ("environment.json", b"\xff\xfe\x00"),
        ("knn.json", '{"results": {"k": 1}}'),
        ("knn.json", '{"results": [1]}'),
        ("linear.json", '{"results": [{"protocol": []}]}'),
        ("linear.json", '{"protocol": "cached"}'),
    ],
)
def test_a_damaged_file_is_named(runs, tmp_path, name, content):
    path = runs / "byol" / "a1" / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(CheckpointError, match=f"{re.escape(str(path))} is damaged: [^\n]*$"):
        main_report([path.parent], tmp_path / "report")
    assert not (tmp_path / "report").exists()
    text = Page(main_report([runs], tmp_path / "report").read_text(encoding="utf-8")).text
    assert f"{path} is damaged" in text and "res_mocov3" in text and "78.50" in text, "the others are shown"


# Tables.


def test_rows_prefer_offline_results_and_say_where_they_do_not(runs):
    trained, online, untrained = table_rows([Run(runs / p) for p in ("untrained/u0", "byol/a1", "res_mocov3/b2")])
    assert trained == {
        "label": "byol",
        "method": "byol",
        "name": "tiny",
        "id": "a1",
        "knn1": 78.5,
        "knn20": 79.5,
        "linear": 84.25,
        "similarity": pytest.approx(0.91),
        "images_per_s": 987.6,
        "seconds": 1234.4,
        "online": [],
    }
    assert [online[key] for key in ("knn1", "knn20", "linear")] == [71.0, 72.0, 61.0]
    assert online["online"] == ["knn1", "knn20", "linear"]
    assert online["images_per_s"] == 107.0, "the median over epochs"
    assert online["seconds"] is None
    assert untrained["method"] == "untrained" and untrained["similarity"] is None
    assert [cell(online, key) for key in ("knn1", "linear", "similarity")] == ["71.00*", "61.00*", "0.9100"]
    assert cell(trained, "seconds") == "1,234"


def test_table_in_the_terminal(runs):
    out = io.StringIO()
    print_table(table_rows(find_runs(runs)), Console(file=out, width=80))
    lines = [line.split() for line in out.getvalue().splitlines()]
    assert ["byol", "78.50", "79.50", "84.25", "0.9100", "988", "1,234"] in lines
    assert ["res_mocov3", "71.00*", "72.00*", "61.00*", "0.9100", "107", "-"] in lines
    assert ["untrained", "78.50", "79.50", "70.00", "-", "-", "-"] in lines


def test_compare_flattens_and_tells_missing_from_null():
    one = {"a": {"b": 1, "c": [1, 2]}, "d": [{"e": None}, {"e": True}], "same": "x", "empty": {}}
    two = {"a": {"b": 1.5, "c": [1, 2]}, "d": [{"e": None}], "same": "x", "empty": {}}
    same, differing = compare([one, two])
    assert same == {"a.c": "[1, 2]", "d.0.e": "null", "same": "x", "empty": "{}"}
    assert differing == {"a.b": ["1", "1.5"], "d.1.e": ["true", "-"]}
    assert flatten({}) == {} and compare([]) == ({}, {})


def test_labels_are_what_differs(tmp_path):
    def made(method, **changes):
        folder = tmp_path / method / f"{len(list(tmp_path.glob('*/*'))):x}"
        return Run(write_run(folder, changes={key.replace("__", "."): value for key, value in changes.items()}))

    def labels(*runs, **options):
        return figures.labels(runs, **options)

    byol, other = made("byol"), made("mocov3", optimizer__lr=1.0)
    assert labels(byol, other) == ["byol", "mocov3"], "the method is enough"
    fast, wide = made("byol", optimizer__lr=0.4), made("byol", backbone__name="resnet18", name="mine")
    assert labels(byol, fast, other) == ["byol · lr 0.002", "byol · lr 0.4", "mocov3"]
    assert labels(byol, wide) == ["byol · backbone.name resnet10_w16", "byol · backbone.name resnet18"]
    assert labels(byol, fast, wide) == [
        "byol · backbone.name resnet10_w16 · lr 0.002",
        "byol · backbone.name resnet10_w16 · lr 0.4",
        "byol · backbone.name resnet18 · lr 0.002",
    ]
    both = made("byol", optimizer__lr=0.4, max_epochs=9)
    assert labels(byol, both) == ["byol · lr 0.002", "byol · lr 0.4"], "no more than tells them apart"
    seeds = [made("byol", seed=seed) for seed in (5, 6, 6)]
    assert labels(*seeds) == ["byol"] * 3
    assert labels(*seeds[:2], apart=True) == ["byol · seed 5", "byol · seed 6"]
    assert labels(*seeds[1:], apart=True) == [f"byol · {run.id}" for run in seeds[1:]]
    long = made("byol", data__dataset="x" * 40)
    assert labels(byol, long)[1] == f"byol · dataset {'x' * 24}"
    for name in ("a", "b"):
        write_run(tmp_path / "dino" / name)
        (tmp_path / "dino" / name / "args.json").unlink()
    bare = [Run(tmp_path / "dino" / name) for name in ("a", "b")]
    assert labels(*bare) == ["dino · id a", "dino · id b"], "nothing says that these are one"


@pytest.fixture
def seeds(tmp_path):
    """BYOL with three seeds, the last of which has stopped after its second epoch, and DINO with one."""
    for seed, best in ((5, 70.0), (6, 74.0)):
        rows = step_rows(val_acc1=lambda step, best=best: best + step)
        knn = {"results": votes("backbone", "cosine", 1, 0.07, best)}
        write_run(tmp_path / "runs" / "byol" / f"s{seed}", rows, {"seed": seed}, knn=knn, result={"seconds": 10.0})
    write_run(tmp_path / "runs" / "byol" / "s7", step_rows(epochs=2, val_acc1=lambda step: 0.0), {"seed": 7})
    write_run(tmp_path / "runs" / "dino" / "d", step_rows(val_acc1=lambda step: 80.0), result={"seconds": 20.0})
    return tmp_path / "runs"


def test_seeds_are_one_row_and_one_curve(seeds):
    shown = figures.styled(find_runs(seeds))
    [_, accuracies, *_] = sections = [None, *figures.sections(shown)]
    panel = next(panel for panel in accuracies.panels if panel.metric == "val_acc1")
    byol, dino = panel.curves
    assert byol.values.tolist() == [75.0, 79.0, 83.0], "the mean of those that have ended"
    np.testing.assert_allclose(byol.band, np.sqrt(8.0))
    assert dino.band is None and len(sections[1].legend) == 2


def test_rows_of_seeds(seeds, tmp_path):
    parsed = Page(main_report([seeds], tmp_path / "report").read_text(encoding="utf-8"))
    rows = {row[0]: row[1:] for row in reversed(parsed.rows) if row}
    mean = next(cells for head, cells in rows.items() if head.startswith("byol"))
    assert mean[0] == "72.00\u00a0±\u00a02.83" and mean[2] == "83.00\u00a0±\u00a02.83online"
    assert mean[5] == "10\u00a0±\u00a00"
    assert any(head.startswith("byol2 runs, 1 unfinished not counted") for head in rows)
    assert rows["seed 7stopped, epoch 2 of 3"][:3] == ["67.00online", "68.00online", "0.00online"]
    assert rows["seed 6"][0] == "74.00"
    best = [attrs["data-label"] for tag, attrs in parsed.tags if attrs.get("class") == "best"]
    assert best == ["kNN-1", "kNN-20", "linear top-1", "images/s", "seconds", "kNN-20", "images/s"]


def test_a_collapse_is_told(tmp_path):
    rows = step_rows(train_rankme=lambda step: 3.0 if step < 6 else 1.1)
    folders = [write_run(tmp_path / "dino" / "a", rows), write_run(tmp_path / "byol" / "b", step_rows())]
    text = main_report(folders, tmp_path / "out").read_text()
    assert "the outputs hardly told images apart in dino after epoch 2 (effective rank 1.10)." in text
    assert "hardly told" not in main_report(folders[1:], tmp_path / "out").read_text()


def test_a_run_that_is_still_being_written_is_shown_as_far_as_it_is(tmp_path, caplog):
    folder = write_run(tmp_path / "byol" / "a", step_rows(epochs=2))
    with open(folder / "metrics.csv", "a") as file:
        file.write("2,8,0.5")
    lock = RunLock(folder)
    assert lock.take()
    text = main_report([folder], tmp_path / "out").read_text()
    lock.file.close()
    assert "still training, epoch 2 of 3" in text and "67.00" in text
    assert "metrics.csv: 1 of 9 rows were cut" in caplog.text


# Figures.


def test_panels_hold_the_logged_values(runs):
    shown = figures.styled([Run(runs / "byol/a1"), Run(runs / "res_mocov3/b2")])
    made = {section.title: section for section in figures.sections(shown, [Run(runs / "untrained/u0")])}
    assert [*made][:3] == ["Accuracies", "Student-teacher gap", "Losses"], "what matters first"
    panels = {panel.metric: panel for section in made.values() for panel in section.panels}

    assert [curve.values.tolist() for curve in panels["val_knn1"].curves] == [[63, 67, 71]] * 2
    assert panels["val_knn1"].floor == [(78.5, figures.FLOOR)] and panels["val_knn20"].floor == [(79.5, figures.FLOOR)]
    assert panels["val_knn1"].ylim == panels["val_knn20"].ylim
    assert panels["val_knn1"].same == "the same in both runs" and panels["train_intra_loss"].same == ""
    assert [c.style.label for c in panels["train_contrastive_loss"].curves] == ["res_mocov3"]
    assert len(panels["train_loss"].curves[0].steps[0]) == 6
    for panel in panels.values():
        for curve in panel.curves:
            assert panel.run or dict(zip(("byol", "res_mocov3"), figures.PALETTE, strict=False))[curve.style.label] == (
                curve.style.light,
                curve.style.dark,
            )
    distance = made["Weight distance per stage"]
    assert [look.label for look in distance.legend] == ["conv1", "projector.fc1"]
    assert [panel.title for panel in distance.panels] == ["byol", "res_mocov3"]
    assert made["Losses"].facts["missing"] == {"byol": ["train_intra_loss"]}
    assert made["Losses"].facts["scales"] == {"solo": ["byol"], "paper": ["res_mocov3"]}
    assert "Other metrics" not in made


def test_line_of_reference_is_measured_like_the_curves(runs, tmp_path):
    untrained = [Run(runs / "untrained/u0")]
    for distance, floor in (("euclidean", [11.0]), ("cosine", [78.5]), ("manhattan", [])):
        run = Run(write_run(tmp_path / distance / "a", step_rows(), {"knn_eval.distance_func": distance}))
        panels = figures.sections(figures.styled([run]), untrained)[0].panels
        drawn = {panel.metric: panel.floor for panel in panels}["val_knn1"]
        assert [value for value, _ in drawn] == floor


def test_new_columns_are_drawn_too(tmp_path):
    rows = step_rows(train_dino_loss=lambda step: 3.0, train_z_std=lambda step: 0.1, val_knn200=lambda step: 9.0)
    shown = figures.styled([Run(write_run(tmp_path / "dino" / "a", rows))])
    where = {panel.metric: section.title for section in figures.sections(shown) for panel in section.panels}
    assert where["train_dino_loss"] == "Losses"
    assert where["val_knn200"] == "Accuracies"
    assert where["train_z_std"] == "Other metrics"


def test_stages_are_in_the_order_in_which_they_were_logged(tmp_path):
    def distances(method, *stages):
        rows = [{"epoch": 0, "step": 0, **{f"weight_distance/{stage}": 0.1 for stage in stages}}]
        folder = write_run(tmp_path / method / "a", [])
        (folder / "metrics.csv").write_text(
            "".join(",".join(map(str, row)) + "\n" for row in (rows[0], rows[0].values()))
        )
        return Run(folder)

    runs = [
        distances("projector_ema_byol", "projector.fc1", "projector.fc2", "predictor.fc1"),
        distances("byol", "stem", "late", "early", "projector.fc1", "projector.fc2", "predictor.fc1"),
        distances("dino", "stem", "late", "early", "projector.fc1", "projector.fc2", "projector.prototypes"),
    ]
    sections = {section.title: section for section in figures.sections(figures.styled(runs))}
    legend = sections["Weight distance per stage"].legend
    heads = ["projector.fc1", "projector.fc2", "projector.prototypes", "predictor.fc1"]
    assert [look.label for look in legend] == ["stem", "late", "early", *heads]
    assert [len({look.dash for look in some}) for some in (legend[:3], legend[3:6], legend)] == [1, 1, 3]


def test_metrics_are_described_once():
    assert [metric_of(name).title for name in ("train_loss", "val_knn5", "train_vicreg_loss", "train_vicreg_sim")] == [
        "Total loss",
        "Online kNN, k = 5 (%)",
        "Framework loss: vicreg",
        "Framework loss: vicreg",
    ]
    assert metric_of("val_knn20").label == "kNN-20" and metric_of("val_loss").section == "other"
    assert metric_of("mine") == Metric("mine", "")


def test_gap_axis_is_two_minus_two_cosines(runs):
    shown = figures.styled([Run(runs / "byol/a1")])
    panel = next(panel for section in figures.sections(shown) for panel in section.panels if panel.metric == "gap_sim")
    figure = Figure()
    ax = figure.subplots()
    pages._draw(ax, panel, 3)
    figure.savefig(io.BytesIO())
    for similarity in (0.85, 0.9):
        height = ax.transData.transform((0, similarity))[1]
        assert ax.child_axes[0].transData.transform((0, 2 - 2 * similarity))[1] == pytest.approx(height)


def test_many_runs_stay_apart():
    styles = figures.styles([f"m{i}" for i in range(24)])
    assert len({(style.light, style.dash) for style in styles}) == 24
    assert len({style.light for style in styles[:6]}) == 6


def test_long_series_are_thinned_to_means():
    x = np.arange(1000.0)
    epochs, values = figures.thin(400, x, 2 * x)
    assert len(epochs) == 400 and epochs[0] == x[:3].mean() and values[-1] == 2 * x[-2:].mean()


def test_more_curves_of_fewer_points_make_a_small_page(tmp_path):
    """Each of them ends where its run does, and is told from its neighbours to a thousandth of its height."""
    noise = np.random.default_rng(0).normal(0, 0.0001, (40, 500))
    for n in range(40):
        rows = [{"epoch": i, "step": i, "gap_sim": 0.999 + noise[n, i]} for i in range(500)]
        write_run(tmp_path / "byol" / f"{n:02d}", rows, {"optimizer.lr": 0.001 * (n + 1)})
    source = main_report([tmp_path], tmp_path / "report").read_text(encoding="utf-8")
    assert len(source) - len(pages.plotly()) < 40_000 + 40 * 2500
    [curves] = [item["data"] for item in Page(source).kept if isinstance(item, dict)]
    assert len(curves) == 40
    for curve, values in zip(curves, noise + 0.999, strict=True):
        assert len(curve["x"]) == 80 and 495 < curve["x"][-1] <= 500
        means = np.array([part.mean() for part in np.array_split(values, 80)])
        assert np.abs(np.array(curve["y"]) - means).max() < np.ptp(means) / 1000


# The page.


@pytest.fixture
def page(runs, tmp_path):
    path = main_report([runs], tmp_path / "report")
    assert path == tmp_path / "report" / "report.html"
    return path


def test_page(page):
    source = page.read_text(encoding="utf-8")
    parsed = Page(source)
    rows = {row[0].replace("tiny", "").strip(): row[1:] for row in reversed(parsed.rows) if row}
    assert rows["byol"][:4] == ["78.50", "79.50", "84.25", "0.9100"]
    assert rows["res_mocov3"][:3] == ["71.00online", "72.00online", "61.00online"]
    assert rows["untrained"] == ["78.50", "79.50", "70.00", "-", "-", "-"]
    assert rows["optimizer.lr"] == ["0.002", "0.004"] and "max_epochs" not in rows
    for text in (
        "solo-ext pretrain 'name=a b'",
        "0123456789ab, with local changes",
        "2.14.0",
        "knn.json, linear.json: res_mocov3",
        "val_knn1 and val_knn20 of the last epoch, distance cosine; there is no offline evaluation",
        "k 1 and 20, features backbone, distance cosine, T 0.07, images not augmented",
        "features cached, epochs 20, seed 5, images not augmented",
        "6 evaluations by another protocol or of another checkpoint",
        '"crop_min_scale": 0.3',
        "Not logged: train_intra_loss by byol.",
        "Loss scales differ (method_kwargs.loss_scale): solo: byol; paper: res_mocov3.",
    ):
        assert text in parsed.text

    names = {*figures.FILES} - {"other"}
    assert {file.name for file in page.parent.iterdir()} == {
        "report.html",
        *(f"{name}.{kind}" for name in names for kind in ("png", "pdf")),
    }
    assert all((page.parent / f"{name}.png").read_bytes().startswith(b"\x89PNG") for name in names)
    assert all((page.parent / f"{name}.pdf").read_bytes().startswith(b"%PDF") for name in names)

    # self-contained: nothing is loaded from anywhere, and every colour has a light and a dark value
    for tag, attrs in parsed.tags:
        assert tag not in ("link", "iframe", "object", "image")
        for name, value in attrs.items():
            assert name not in ("src", "srcset") and (not name.endswith("href") or value.startswith("#")), (tag, name)
    assert not re.search(r"url\((?!#)|@import|https?://", source)  # the library is packed, and loads nothing by itself
    light, dark = (set(re.findall(r"--(\w+):", rule)) for rule in re.findall(r":root \{(.*?)\}", source))
    assert light == dark and set(re.findall(r"var\(--(\w+)\)", source)) <= light
    ids = [attrs["id"] for _, attrs in parsed.tags if "id" in attrs]
    targets = {attrs["href"][1:] for tag, attrs in parsed.tags if tag == "a"}
    assert targets <= set(ids)
    assert [attrs["data-plot"] for _, attrs in parsed.tags if "data-plot" in attrs] == [str(i) for i in range(14)]
    order = [parsed.text.index(f"\n{title}") for title in ("Results", "Accuracies", "Configuration", "Environment")]
    assert order == sorted(order)


@pytest.mark.parametrize(
    ("places", "said"),
    [
        (("projector", "projector"), "Measured at: projector."),
        (("projector", "predictor"), "Measured at different places, not comparable: "),
        ((None, None), "Measured at: predictor."),  # older runs: what was configured
    ],
)
def test_the_gap_was_measured_where_the_network_has_a_place_for_it(tmp_path, places, said):
    """Not where `gap.at` would have it: a framework may have no predictor."""
    folders = [
        write_run(tmp_path / f"{i}", step_rows(), {"seed": i} | ({"gap.place": place} if place else {}))
        for i, place in enumerate(places)
    ]
    text = Page(main_report(folders, tmp_path / "report").read_text(encoding="utf-8")).text
    assert said in " ".join(text.split())


def test_nothing_from_a_file_becomes_markup(tmp_path):
    evil = '"><img src=x onerror=alert(1)><script>alert(2)</script>$x^{$&amp;'
    files = {
        "environment": {evil: evil, "packages": {evil: evil}},
        "linear": {evil: evil, "results": results(evil, **{evil: evil})},
        "knn": {"results": votes(evil, evil, 1, evil, evil)},
    }
    changes = {"name": evil, "method": evil, "gap.at": evil, "knn_eval.distance_func": evil, "data.dataset": evil}
    rows = step_rows(**{f"weight_distance/{evil}": lambda step: 1.0, f"train_{evil}_loss": lambda step: 1.0})
    folders = [
        write_run(tmp_path / evil.replace("/", "") / str(i), rows, changes | {"max_epochs": i}, **files)
        for i in range(2)
    ]
    parsed = Page(main_report(folders, tmp_path / "report").read_text(encoding="utf-8"))
    assert "img" not in {tag for tag, _ in parsed.tags} and [tag for tag, _ in parsed.tags].count("script") == 4
    assert not [name for _, attrs in parsed.tags for name in attrs if name.startswith("on")]
    assert parsed.text.count(evil) > 10


@pytest.mark.parametrize(
    "spoil",
    [
        lambda folder: [(folder / "metrics.csv").unlink()],
        lambda folder: [(folder / "args.json").unlink()],
        lambda folder: [(folder / "metrics.csv").write_text("")],
        lambda folder: [(folder / "metrics.csv").write_text("epoch,step,train_loss\n")],
        lambda folder: [(folder / "metrics.csv").write_text("train_loss,val_knn1\n1.0,50\n0.5,60\n")],
        lambda folder: [write_metrics(folder, step_rows(epochs=1, steps=1))],
        lambda folder: [write_metrics(folder, [{"epoch": e, "step": e, "train_loss": "nan"} for e in range(3)])],
        lambda folder: [write_metrics(folder, [{"epoch": e, "step": e, "val_acc1": "inf"} for e in range(3)])],
        lambda folder: [(folder / "args.json").write_text('{"gap": null, "knn_eval": 3, "method": null}')],
    ],
    ids=["no metrics", "no args", "empty", "header", "no epochs", "one step", "nan", "inf", "odd args"],
)
def test_an_incomplete_run_is_reported_as_it_is(tmp_path, spoil):
    folder = write_run(tmp_path / "byol" / "a", [{"epoch": 0, "step": 0, "train_loss": 1.0}])
    spoil(folder)
    parsed = Page(main_report([folder], tmp_path / "report").read_text(encoding="utf-8"))
    assert "linear.json" in parsed.text and "byol" in parsed.text


def test_a_report_replaces_an_earlier_one_only(page, runs):
    (page.parent / "notes.txt").write_text("mine")
    (page.parent / "other.pdf").write_text("of an earlier report")
    main_report([runs / "byol" / "a1", runs / "byol"], page.parent)
    left = {file.name for file in page.parent.iterdir()}
    assert "notes.txt" in left and "other.pdf" not in left and "losses.png" in left
    assert "res_mocov3" not in page.read_text() and "1 run " in page.read_text(), (
        "a run that is named twice counts once"
    )
    assert not list(page.parent.parent.glob(".*"))


def test_nothing_is_left_of_a_report_that_fails(runs, tmp_path, monkeypatch):
    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pages, "figure_of", fail)
    monkeypatch.setattr(pages, "save", lambda figure, path: path.write_bytes(b""))
    with pytest.raises(ConfigError, match=r"--out: .*report cannot be written: No space left on device"):
        main_report([runs], tmp_path / "report")
    assert [path.name for path in tmp_path.iterdir()] == ["trained_models"]


def test_out_is_a_folder(runs, tmp_path):
    (tmp_path / "file").write_text("")
    for out in ("file", "page.html"):
        with pytest.raises(ConfigError, match="--out is a folder"):
            main_report([runs], tmp_path / out)
    with pytest.raises(ConfigError, match=r"--out: .* cannot be written"):
        main_report([runs], tmp_path / "file" / "report")
    with pytest.raises(ConfigError, match="at least one run"):
        main_report([], tmp_path / "report")


def test_without_matplotlib_the_extra_is_named(runs, tmp_path, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.split(".")[0] == "matplotlib":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match=re.escape("pip install 'solo-ext[viz]'")):
        main_report([runs], tmp_path / "report")
    assert table_rows([Run(runs / "byol" / "a1")])[0]["knn1"] == 78.5, "the table needs none"
