"""Single filters over training, step by step: how momentum moves the weights (ProjectorEMA, Sec. 3.2, Fig. 2)."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from solo_ext.errors import ConfigError, must_have
from solo_ext.runs.metrics import read_table, write_table
from solo_ext.runs.run import FILTERS
from solo_ext.schema import Config, Count
from solo_ext.training.callbacks import LightningModule, MonitorCallback, Trainer, is_logging_step, our_method


@dataclass
class FiltersConfig(Config, section="filters"):
    enabled: bool = False
    stage: str = "projector.fc2"  # a layer, whose weight has a row for each filter
    count: Count = 16  # of its filters, the first ones
    every: Count = 1  # optimizer steps


class FilterTrace(MonitorCallback):
    """Writes `filters.csv` beside metrics.csv: a row for each `every`-th step, with `student/<filter>/<weight>` and,
    where the stage has momentum, `teacher/<filter>/<weight>`, after that step."""

    key = "filters"
    Config = FiltersConfig

    def __init__(self, cfg: FiltersConfig):
        self.cfg = cfg
        self.waiting: list[tuple[int, Tensor]] = []  # step, and the filters [owners, count, width], on the device

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        from solo_ext.training.loggers import CSVMetrics

        method = our_method(module, self.key)
        stages = {stage.name: stage for stage in method.row}
        must_have(self.cfg.stage, stages, "filters.stage: the network has no stage")
        stage = stages[self.cfg.stage]
        parts = {"student": method.get_submodule(stage.attribute)}
        if stage in method.teacher.stages:
            parts["teacher"] = method.teacher.pair(stage)[0]
        matrices = {owner: [p for p in stage.parameters(part) if p.ndim == 2] for owner, part in parts.items()}
        if any(len(found) != 1 for found in matrices.values()):
            raise ConfigError(f"filters.stage: {self.cfg.stage} is not one linear layer, such as projector.fc2")
        self.weights = [found[0] for found in matrices.values()]
        count, width = min(self.cfg.count, len(self.weights[0])), self.weights[0].shape[1]
        names = [f"{owner}/{i}/{j}" for owner in matrices for i in range(count) for j in range(width)]
        self.columns = ["step", *names]
        [folder] = [Path(logger.path).parent for logger in trainer.loggers if isinstance(logger, CSVMetrics)]
        self.path = folder / FILTERS
        if trainer.is_global_zero:  # what a run that was killed had written ahead is written again
            rows = [row for row in read_table(self.path)[1] if int(row["step"]) < trainer.global_step]
            write_table(self.path, self.columns, rows)

    @torch.no_grad()
    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, out: Any, batch: Any, i: int) -> None:
        step = trainer.global_step - 1
        if trainer.is_global_zero and step % self.cfg.every == 0 and not trainer.fit_loop._should_accumulate():
            self.waiting.append((step, torch.stack([x[: self.cfg.count].float() for x in self.weights])))
        if is_logging_step(trainer):
            self.flush(trainer, module)

    def flush(self, trainer: Any, module: Any) -> None:
        if self.waiting:
            numbers = torch.stack([x for _, x in self.waiting]).flatten(1).tolist()
            steps = [step for step, _ in self.waiting]
            rows = [dict(zip(self.columns, (step, *x), strict=True)) for step, x in zip(steps, numbers, strict=True)]
            write_table(self.path, self.columns, rows, append=True)
            self.waiting = []
