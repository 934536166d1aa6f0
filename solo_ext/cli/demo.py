"""`solo-ext demo`: four methods on bundled images, evaluated beside the untrained encoder, and a report."""

import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from solo_ext.analysis.report import main_report, print_table, table_rows
from solo_ext.runs.run import Run
from solo_ext.training.compose import compose, overlay
from solo_ext.training.config import LinearConfig, resolve, run_values
from solo_ext.training.evaluate import knn, linear, untrained_folder
from solo_ext.training.pretrain import pretrain
from solo_ext.training.recipes import find

METHODS = ("mocov3", "res_mocov3", "byol", "projector_ema_byol")


def demo(overrides: Sequence[str], out: str) -> None:
    """Trains and evaluates into `<out>/runs`, prints the table and, if matplotlib is installed, writes `<out>/report`.

    overrides: Hydra's, for all four configurations.
    """
    began = time.perf_counter()
    fixed = [f"checkpoint.dir={Path(out) / 'runs'}", "auto_resume.enabled=False"]
    files = [find(f"fashion_mnist_mini/{method}") for method in METHODS]
    configs = [resolve(compose(file.parent, file.name, [*fixed, *overrides])) for file in files]
    folders = []
    for number, cfg in enumerate(configs, start=1):
        print(f"\n[{number}/{len(configs)}] {cfg.method}: {cfg.max_epochs} epochs", flush=True)
        folders.append(pretrain(cfg).dir)
    print("\nkNN and linear evaluation of the frozen encoders, on features of un-augmented images", flush=True)
    for folder, method in zip(folders, METHODS, strict=True):
        print(f"{method}:", flush=True)
        _evaluate(folder)
    print("untrained:", flush=True)
    fresh = ["name=untrained", "untrained=True", "pretrained_feature_extractor=null", f"seed={configs[0].seed}"]
    folders.append(untrained_folder(_evaluate(folders[-1], fresh)))

    print_table(table_rows([Run(folder) for folder in folders]))
    if find_spec("matplotlib") is None:
        print(f"no report: it needs pip install 'solo-ext[viz]', then solo-ext report {' '.join(map(str, folders))}")
    else:
        report = main_report(folders, Path(out) / "report")
        print(f"report: {report.resolve()}   ({time.perf_counter() - began:.0f} s)")


def _evaluate(folder: Path, overrides: Sequence[str] = ()) -> LinearConfig:
    """kNN and linear evaluation of the run in `folder`, or of what `overrides` make of it; returns the latter's."""
    values = overlay(run_values(folder, "knn"), ["knn_eval.distance_func=[cosine]", *overrides])
    knn(resolve(values, "knn"))
    cfg = resolve(overlay(run_values(folder, "linear"), ["cache_features=True", *overrides]), "linear")
    linear(cfg)
    return cfg
