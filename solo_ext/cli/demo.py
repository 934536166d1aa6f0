"""`solo-ext demo`: four methods on bundled images, evaluated beside the untrained encoder, and a report."""

import shlex
import time
from argparse import Namespace
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from solo_ext.cli.command import SOLO_EXT, option
from solo_ext.cli.commands import OVERRIDES, yaml_and_overrides
from solo_ext.errors import ConfigError
from solo_ext.training.recipes import find

METHODS = ("mocov3", "res_mocov3", "byol", "projector_ema_byol")


@SOLO_EXT.command(
    option("words key=value", f"for all four runs, {OVERRIDES}", nargs="*"),
    option("--out FOLDER", "output folder (default: %(default)s)", default="demo"),
)
def demo(args: Namespace) -> None:
    """Train and compare four methods on bundled images, in minutes, without a GPU.

    Trains BYOL, projector-only BYOL, MoCo v3 and Res-MoCo on 5,000 bundled Fashion-MNIST images, evaluates each
    beside the untrained encoder, prints a table and writes the report.

      solo-ext demo
      solo-ext demo --out /tmp/demo seed=1 max_epochs=5
    """
    from solo_ext.analysis.listing import print_table
    from solo_ext.analysis.report import main_report, table_rows
    from solo_ext.runs.run import Run
    from solo_ext.training.compose import compose
    from solo_ext.training.config import resolve
    from solo_ext.training.pretrain import pretrain

    file, overrides = yaml_and_overrides(args)
    if file:
        raise ConfigError(f"the demo has YAMLs of its own, and no use for '{file}'")
    began, out, folders = time.perf_counter(), Path(args.out), []
    overrides = [f"checkpoint.dir={out / 'runs'}", "auto_resume.enabled=False", *overrides]
    files = [find(f"fashion_mnist_mini/{method}") for method in METHODS]
    configs = [resolve(compose(file.parent, file.name, overrides)) for file in files]
    for number, cfg in enumerate(configs, start=1):
        print(f"\n[{number}/{len(configs)}] {cfg.method}: {cfg.max_epochs} epochs", flush=True)
        folders.append(pretrain(cfg).dir)
    print("\nkNN and linear evaluation of the frozen encoders, on features of un-augmented images", flush=True)
    for folder, method in zip(folders, METHODS, strict=True):
        print(f"{method}:", flush=True)
        _evaluate(folder)
    print("untrained:", flush=True)
    fresh = ["name=untrained", "untrained=True", "pretrained_feature_extractor=null", f"seed={configs[0].seed}"]
    folders.append(_evaluate(folders[-1], fresh))

    print_table(table_rows([Run(folder) for folder in folders]))
    if find_spec("matplotlib") is None:
        command = shlex.join(["solo-ext", "report", *map(str, folders)])
        print(f"no report: it needs pip install 'solo-ext[viz]', then {command}")
    else:
        report = main_report(folders, out / "report")
        print(f"report: {report.resolve()}   ({time.perf_counter() - began:.0f} s)")


def _evaluate(folder: Path, overrides: Sequence[str] = ()) -> Path:
    """kNN and linear evaluation of the run in `folder`, changed by `overrides`; returns an untrained one's folder."""
    from solo_ext.training.config import resolve, run_values
    from solo_ext.training.evaluate import knn, linear, untrained_folder

    knn(resolve(run_values(folder, "knn", ["knn_eval.distance_func=[cosine]", *overrides]), "knn"))
    cfg = resolve(run_values(folder, "linear", ["cache_features=True", *overrides]), "linear")
    linear(cfg)
    return untrained_folder(cfg)
