"""kNN accuracy during pre-training."""

from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

from solo_ext.evaluation.features import features_of_sets
from solo_ext.evaluation.knn import KNNConfig, knn_accuracy
from solo_ext.text import Metric
from solo_ext.training.callbacks import LightningModule, MonitorCallback, Trainer


class OnlineKNN(MonitorCallback):
    """Logs `val_knn1` and `val_knn20` (top-1 in percent; 20 is `knn_eval.k`) every `knn_eval.every` epochs.

    Unlike solo-learn's, its bank and queries are features of images without augmentation, in eval mode. `loaders` makes
    the loaders of this process's share of labelled train and validation images, with as many of the latter in every
    process; batches are `(indexes, [view], targets)`.
    """

    key = "knn_eval"
    Config = KNNConfig
    metrics = (Metric("val_knn*", "Online kNN, k = * (%)", "kNN-*", "{:.2f}", "accuracies", progress=True),)

    @classmethod
    def make(cls, section: KNNConfig, cfg: Any, data: Any) -> "OnlineKNN | None":
        if data is None or data.val_set is None:  # nothing to classify
            return None
        return cls(data.probe_dataloaders, section, not cfg.performance.disable_channel_last)

    def __init__(self, loaders: Callable[[], tuple[Iterable, Iterable]], cfg: KNNConfig, channels_last: bool = True):
        self.loaders, self.cfg, self.channels_last = cache(loaders), cfg, channels_last

    def on_validation_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        epoch = trainer.current_epoch + 1
        if trainer.sanity_checking or (epoch % self.cfg.every and epoch != trainer.max_epochs):
            return
        backbone = module.get_submodule("backbone")
        sets = features_of_sets(backbone, self.loaders(), module.device, trainer.precision, self.channels_last)
        results = knn_accuracy(*sets, [*{1, self.cfg.k}], self.cfg.distance_func, shared=True)
        module.log_dict({f"val_knn{k}": result["acc1"] for k, result in results.items()}, sync_dist=True)
