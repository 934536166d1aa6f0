"""Whether a run keeps within the bands of its recipe's reference, told while it trains."""

from dataclasses import dataclass
from typing import Any

from solo_ext.files import log
from solo_ext.runs.reference import Reference, judge, reference_for
from solo_ext.runs.run import Run
from solo_ext.schema import Config, plain
from solo_ext.training.callbacks import LightningModule, MonitorCallback, Trainer


@dataclass
class CheckConfig(Config, section="check"):
    """The YAML's `check`: after each epoch, what departs from the reference is told, once. Nothing is stopped."""

    enabled: bool = False
    reference: str | None = None  # its file; null: the zoo's for the recipe


class Check(MonitorCallback):
    """Warns of what `solo-ext check` would find."""

    key = "check"
    Config = CheckConfig

    @classmethod
    def make(cls, section: CheckConfig, cfg: Any, data: Any) -> "Check":
        return cls(reference_for(plain(cfg), section.reference))

    def __init__(self, reference: Reference):
        self.reference, self.told = reference, set[str]()

    def on_train_epoch_start(self, trainer: Trainer, module: LightningModule) -> None:
        if trainer.current_epoch:  # the epoch before it is over, with its validation
            self._tell(trainer)

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        self._tell(trainer)

    def _tell(self, trainer: Any) -> None:
        if not trainer.is_global_zero:
            return
        table = next(logger for logger in trainer.loggers if logger.name == "csv")
        table.flush()
        verdict = judge(Run(table.path.parent), self.reference)
        found = {text: text for text in verdict.asked} | {d.place: str(d) for d in verdict.departures}
        for place in [place for place in found if place not in self.told]:
            log.warning("check: %s: %s", self.reference.name, found[place])
            self.told.add(place)

    def state_dict(self) -> dict[str, Any]:
        return {"told": sorted(self.told)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.told = set(state["told"])
