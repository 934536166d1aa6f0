"""The metrics that a run logs, gathered from the files that compute them, and how each is shown."""

import dataclasses
from fnmatch import fnmatchcase

from solo_ext.methods import METHODS
from solo_ext.methods.base import METRICS, TOTAL
from solo_ext.methods.step import Gap, Spread
from solo_ext.text import Metric
from solo_ext.training.callbacks import MONITORS
from solo_ext.training.callbacks.collapse import CollapseWatch
from solo_ext.training.callbacks.inputs import Inputs
from solo_ext.training.callbacks.throughput import Throughput

OTHER_LOSSES = tuple(Metric(f"train_*_{kind}", "Framework loss: *", section="losses") for kind in ("loss", "sim"))


def metrics() -> dict[str, Metric]:
    """Name or pattern -> metric, in the order in which they are shown; of two patterns that fit, the first counts."""
    named = {cls.loss_name: cls.loss_title for cls in METHODS.declared.values() if cls.loss_title}
    losses = [Metric(name, f"Framework loss: {title}", section="losses") for name, title in named.items()]
    monitors: tuple = (Gap, Spread, CollapseWatch, *MONITORS.values(), Throughput, Inputs)
    monitored = [metric for monitor in monitors for metric in monitor.metrics]
    return {metric.name: metric for metric in (TOTAL, *losses, *METRICS, *monitored, *OTHER_LOSSES)}


def metric_of(column: str) -> Metric:
    """The metric in that column of `metrics.csv`, with what its pattern's `*` stands for in title and label."""
    known = metrics()
    metric = known.get(column) or next((m for pattern, m in known.items() if fnmatchcase(column, pattern)), None)
    if metric is None:
        return Metric(column, "")
    before, star, after = metric.name.partition("*")
    rest = column[len(before) : len(column) - len(after)] if star else ""
    return dataclasses.replace(metric, title=metric.title.replace("*", rest), label=metric.label.replace("*", rest))
