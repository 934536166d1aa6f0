"""The metrics that a run logs, and how each is shown: in figures, tables, and on the progress line."""

import dataclasses
from fnmatch import fnmatchcase

from solo_ext.text import Metric

# in the order in which they are shown; of two patterns that fit a column, the first counts
METRICS = (
    Metric("train_loss", "Total loss", "loss", "{:.4f}", "losses", progress=True),
    Metric("dino_loss", "Framework loss: DINO", section="losses"),
    Metric("train_nce_loss", "Framework loss: InfoNCE", section="losses"),
    Metric("train_ressl_loss", "Framework loss: ReSSL", section="losses"),
    Metric("train_*_loss", "Framework loss: *", section="losses"),
    Metric("train_*_sim", "Framework loss: *", section="losses"),
    Metric("train_neg_cos_sim", "Framework loss: negative cosine", section="losses"),
    Metric("train_contrastive_loss", "Framework loss: contrastive", section="losses"),
    Metric("train_intra_loss", "Intra-momentum loss, unweighted", section="losses"),
    Metric("train_class_loss", "Online classifier, cross-entropy", section="losses"),
    Metric("val_acc1", "Online classifier, top-1 (%)", "val acc", "{:.2f}", "accuracies", progress=True),
    Metric("momentum_val_acc1", "Teacher's online classifier, top-1 (%)", form="{:.2f}", section="accuracies"),
    Metric("val_knn*", "Online kNN, k = * (%)", "kNN-*", "{:.2f}", "accuracies", progress=True),
    Metric("gap_sim", "Outputs, cosine similarity", "similarity to teacher", "{:.4f}", "gap", progress=True),
    Metric("gap_sim_feats", "Backbone features, cosine similarity", form="{:.4f}", section="gap"),
    Metric("weight_distance/*", "Weight distance, *", section="weight distance"),
    Metric("tau", "EMA coefficient of the teacher", section="schedules"),
    Metric("lr", "Learning rate of the backbone", section="schedules"),
    Metric("lr-*", "Learning rate, *", section="schedules"),  # as Lightning's LearningRateMonitor names it
    Metric("images_per_s", "Training throughput (images/s)", "images/s", "{:,.0f}", "schedules", progress=True),
    Metric("grad_linf/*", "Largest gradient at *"),
    Metric("train_acc1", "Online classifier, top-1 in training (%)", form="{:.2f}"),
    Metric("train_acc5", "Online classifier, top-5 in training (%)", form="{:.2f}"),
    Metric("train_momentum_acc1", "Teacher's online classifier, top-1 in training (%)", form="{:.2f}"),
    Metric("train_momentum_acc5", "Teacher's online classifier, top-5 in training (%)", form="{:.2f}"),
    Metric("train_momentum_class_loss", "Teacher's online classifier, cross-entropy"),
    Metric("train_z_std", "Spread of the projector's outputs"),
    Metric("val_acc5", "Online classifier, top-5 (%)", form="{:.2f}"),
    Metric("momentum_val_acc5", "Teacher's online classifier, top-5 (%)", form="{:.2f}"),
    Metric("val_loss", "Online classifier, cross-entropy in validation"),
    Metric("momentum_val_loss", "Teacher's online classifier, cross-entropy in validation"),
)


def metrics() -> dict[str, Metric]:
    """Name or pattern -> metric, in the order in which they are shown."""
    return {metric.name: metric for metric in METRICS}


def metric_of(column: str) -> Metric:
    """The metric that the column of `metrics.csv` holds, with what its pattern's `*` stands for in title and label.

    Its name remains the pattern. A column that nobody has declared belongs to the section `other`, without a title.
    """
    known = metrics()
    metric = known.get(column) or next((m for pattern, m in known.items() if fnmatchcase(column, pattern)), None)
    if metric is None:
        return Metric(column, "")
    before, star, after = metric.name.partition("*")
    rest = column[len(before) : len(column) - len(after)] if star else ""
    return dataclasses.replace(metric, title=metric.title.replace("*", rest), label=metric.label.replace("*", rest))
