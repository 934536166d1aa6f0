"""kNN accuracy during pre-training."""

from collections.abc import Callable, Iterable
from functools import cache
from typing import TYPE_CHECKING, Any

from solo_ext.evaluation.features import extract_features
from solo_ext.evaluation.knn import KNNConfig, knn_accuracy
from solo_ext.text import Metric
from solo_ext.training.callbacks.monitor import MonitorCallback

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer


class OnlineKNN(MonitorCallback):
    """Logs `val_knn1` and `val_knn20` (top-1 in percent; 20 is `knn_eval.k`) every `knn_eval.every` epochs.

    solo-learn's online kNN searches the epoch's augmented views as the network saw them in train mode; here both sides
    are features of images without augmentation, in eval mode, of one and the same network. With several processes the
    first computes and the others wait.
    """

    key = "knn_eval"
    Config = KNNConfig
    metrics = (Metric("val_knn*", "Online kNN, k = * (%)", "kNN-*", "{:.2f}", "accuracies", progress=True),)

    @classmethod
    def make(cls, section: KNNConfig, cfg: Any, data: Any) -> "OnlineKNN | None":
        if data is None or data.val_set is None:  # nothing to classify
            return None
        return cls(data.probe_dataloaders, section, not cfg.performance.disable_channel_last)

    def __init__(
        self,
        loaders: Callable[[], tuple[Iterable, Iterable]],
        cfg: KNNConfig | None = None,
        channels_last: bool = True,
    ):
        """Takes loaders of labelled train and validation images, not augmented, not split over processes.

        Args:
            loaders: makes both when they are first needed; batches are `(indexes, [view], targets)`.
            cfg: the section `knn_eval`.
            channels_last: memory layout of the images.
        """
        self.loaders = cache(loaders)
        self.cfg = cfg or KNNConfig()
        self.channels_last = channels_last

    def on_validation_epoch_end(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        epoch = trainer.current_epoch + 1
        if trainer.sanity_checking or (epoch % self.cfg.every and epoch != trainer.max_epochs):
            return
        scores = self._scores(trainer, pl_module) if trainer.is_global_zero else {}
        pl_module.log_dict(trainer.strategy.broadcast(scores), sync_dist=True)

    def _scores(self, trainer: "Trainer", pl_module: "LightningModule") -> dict[str, float]:
        backbone, device = pl_module.get_submodule("backbone"), pl_module.device
        bank, bank_labels, query, labels = (
            part.to(device)
            for loader in self.loaders()
            for part in extract_features(backbone, loader, device, trainer.precision, self.channels_last)
        )
        ks = sorted({1, self.cfg.k})
        results = knn_accuracy(bank, bank_labels, query, labels, ks, self.cfg.distance_func)
        return {f"val_knn{k}": result["acc1"] for k, result in results.items()}
