"""Rewrites tests/methods/golden/: 20 training losses of every registered method, one file per framework. Run it after
a change that is meant to change them, and say in the commit why: `python tests/recapture_golden.py [framework ...]`."""

import json
import sys
import zlib

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from conftest import build, fit, random_batches
from frameworks import FRAMEWORKS, GOLDEN, METHODS_TESTED, framework_of

STEPS, EPOCHS = 20, 2


@torch.no_grad()
def fill(model):
    """Weights drawn by their names, so that neither order nor way of their initialisation matters."""
    for name, tensor in model.state_dict().items():
        generator = torch.Generator().manual_seed(zlib.crc32(name.removeprefix("momentum_").encode()))
        if name == "queue":
            numbers = torch.randn(tensor.shape, dtype=tensor.dtype, generator=generator)  # whatever its layout
            tensor.copy_(F.normalize(numbers, dim=1))
        elif name.endswith("bias"):
            tensor.zero_()
        elif tensor.dim() > 1 and name.endswith(("weight", "weight_v")):
            tensor.normal_(std=(2 / tensor[0].numel()) ** 0.5, generator=generator)


class Tape(pl.Callback):
    def __init__(self, stop_after: int):
        self.losses, self.stop_after = [], stop_after

    def on_train_batch_end(self, trainer, module, outputs, *_):
        self.losses.append(outputs["loss"].item())
        trainer.should_stop = len(self.losses) >= self.stop_after


def golden_losses(method: str, stop_after: int = STEPS, **changes) -> list[float]:
    """Losses of the first `stop_after` steps of a run of 20, in float64 and one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        model = build(method, optimizer__lr=0.01, optimizer__classifier_lr=0.01, **changes).double()
        fill(model)
        batches = random_batches(STEPS // EPOCHS, dtype=torch.float64)
        fit(model, batches, max_epochs=EPOCHS, callbacks=[tape := Tape(stop_after)])
    finally:
        torch.set_num_threads(threads)
    return tape.losses


def recapture(framework: str) -> None:
    names = [name for name in METHODS_TESTED if framework_of(name) == framework]
    rows = [f'"{name}": [{", ".join(f"{loss:.10g}" for loss in golden_losses(name))}]' for name in names]
    file = GOLDEN / f"{framework}.json"
    file.write_text("{\n" + ",\n".join(rows) + "\n}\n")
    print(f"{len(json.loads(file.read_text()))} methods in {file}")


if __name__ == "__main__":
    for name in sys.argv[1:] or FRAMEWORKS:
        recapture(name)
