"""Collapse: outputs that hardly tell images apart any more, told while the run can still be stopped."""

from typing import Any, Literal

from solo_ext.errors import CollapseError
from solo_ext.files import log
from solo_ext.methods.step import Rank
from solo_ext.training.callbacks import LightningModule, MonitorCallback, Trainer

Action = Literal["warn", "stop", "off"]
LEAST_RANK = 1.3  # mean of an epoch; tests/faults/test_collapsing.py holds that runs that learn stay above it


class CollapseWatch(MonitorCallback):
    """Says once, at the end of an epoch, that the projector's outputs have collapsed; `stop` ends the run with it."""

    metrics = Rank.metrics

    def __init__(self, action: Action = "warn"):
        self.action, self.told = action, False

    def on_fit_start(self, trainer: Trainer, module: Any) -> None:
        if hasattr(module, "monitors"):  # of our methods
            module.monitors.append(Rank())

    def on_train_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        means = trainer.callback_metrics
        if self.told or not means.get("train_rankme", LEAST_RANK) < LEAST_RANK:
            return
        text = f"the outputs have collapsed by the end of epoch {trainer.current_epoch}: their effective rank (RankMe)"
        text += f" is {means['train_rankme']:.2f}, below {LEAST_RANK}"
        others = {"train_z_std": "their spread", "gap_sim": "similarity to the teacher"}
        text += "".join(f"; {name} {means[key]:.4f}" for key, name in others.items() if key in means)
        if self.action == "stop":
            raise CollapseError(f"{text}; collapse=warn goes on")
        self.told = True
        if trainer.is_global_zero:
            log.warning("%s; collapse=stop would end the run here", text)

    def state_dict(self) -> dict[str, Any]:
        return {"told": self.told}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.told = bool(state["told"])
