"""What the processes of a training exchange in a step, by method, against the least that it needs.

    python -m torch.distributed.run --standalone --nproc-per-node 2 benchmarks/collectives.py

PyTorch's profiler counts all calls to gloo in three steps of a run by Lightning and DDP, without those of `gap` and of
the steps that are logged. Bytes are those that each process hands over. Writes a table, and JSON beside it.
"""

import argparse
import json
import math
import os
import tempfile
from collections import Counter
from pathlib import Path

import lightning.pytorch as pl
import torch
from torch.profiler import ProfilerActivity, profile

import solo_ext
from solo_ext.api import configured
from solo_ext.runs.environment import environment

METHODS = ("byol", "dino", "mocov2plus", "mocov3", "ressl", "simclr", "simsiam", "projector_ema_byol", "res_mocov3")
STEPS, FLOAT = 3, 4  # that are counted; bytes of a number, in precision 32
FLAGS = ["all_reduce", FLOAT], ["all_reduce", FLOAT]  # of signals, and on CPUs of bad numbers
WHAT = {
    "keys": "keys of both views, for all ranks' negatives",
    "one view": "keys of the weak view, for the queue",
    "queue": "keys of both views, for the queues",
    "center": "the mean score of each prototype",
    "queries": "queries of both views; in the backward pass the gradients of all ranks' keys",
}


NEWLINE = "\n"
BESIDES = """\
Besides, each step has two all-reduces of 4 bytes: what each process wishes (to save, to stop), and, on CPUs, whether a
number was bad, which GPUs say only in the steps that are logged. There is no barrier, and no buffer is broadcast.
Gradients are those of all weights that are trained; a teacher's are not among them. SimCLR's backward pass would be
content with a reduce-scatter of the same bytes, which moves half as many; gloo has it only in newer versions of
PyTorch. With `sync_batchnorm`, each BatchNorm adds a gather of 2 C + 1 numbers for C channels and, where it learns, an
all-reduce of all ranks' in the backward pass.
"""


def needed(method: str, batch: int, ranks: int, kwargs: dict) -> tuple[list, str]:
    """The calls for a step's loss, [kind, bytes], and what they are."""
    keys = 2 * batch * kwargs["proj_output_dim"] * FLOAT
    return {
        "dino": ([["all_reduce", kwargs.get("num_prototypes", 0) * FLOAT]], WHAT["center"]),
        "mocov2plus": ([["all_gather", keys]], WHAT["queue"]),
        "mocov3": ([["all_gather", keys]], WHAT["keys"]),
        "ressl": ([["all_gather", keys // 2]], WHAT["one view"]),
        "simclr": ([["all_gather", keys], ["all_reduce", ranks * keys]], WHAT["queries"]),
    }.get(method.split("_")[-1], ([], "-"))


class Count(pl.Callback):
    """What the steps from the third to the one before the last exchange, and the sizes of DDP's gradients."""

    calls: list[list]

    def on_train_batch_end(self, trainer, module, out, batch, i) -> None:
        if i == 1:  # DDP has arranged its gradients
            self.profiler = profile(activities=[ProfilerActivity.CPU], record_shapes=True).__enter__()
        if i == 1 + STEPS:
            self.profiler.__exit__(None, None, None)
            calls = [e for e in self.profiler.events() if e.name.startswith("gloo:")]
            self.calls = [[e.name.removeprefix("gloo:"), FLOAT * sum(map(math.prod, e.input_shapes))] for e in calls]
            data = trainer.strategy.model._get_ddp_logging_data()
            self.gradients = [int(size) for size in data["rebuilt_bucket_sizes"].split(",")]
            self.trained = FLOAT * sum(p.numel() for p in module.parameters() if p.requires_grad)


def row(method: str, batch: int, folder: str) -> dict:
    """Calls of a step, [kind, bytes]: the gradients', those that the loss needs, and all others."""
    ranks = int(os.environ["WORLD_SIZE"])
    solo_ext.pretrain(
        f"fashion_mnist_mini/{method}",
        callbacks=[count := Count()],
        **{"optimizer.batch_size": batch, "checkpoint.dir": folder, "checkpoint.enabled": False},
        **{"gap.enabled": False, "enable_progress_bar": False, "log_every_n_steps": 50, "data.no_labels": True},
        **{"devices": ranks, "accelerator": "cpu", "precision": "32", "max_epochs": 1},
        **{"limit_train_batches": STEPS + 3, "limit_val_batches": 0},
    )
    kwargs = vars(configured("pretrain", f"fashion_mnist_mini/{method}", []).method_kwargs)
    loss, what = needed(method, batch, ranks, kwargs)
    rest = Counter(map(tuple, count.calls))
    assert sum(count.gradients) == count.trained
    gradients = [["all_reduce", size] for size in count.gradients]
    found = {}
    for part, calls in {"gradients": gradients, "loss": loss, "flags": FLAGS}.items():
        found[part] = [call for call in calls if rest[tuple(call)] >= STEPS]
        rest.subtract(tuple(call) for call in found[part] for _ in range(STEPS))
    beyond = [[*call, times / STEPS] for call, times in rest.items() if times]
    return {**found, "needed": loss, "what": what, "beyond": beyond}


def table(rows: dict, about: dict) -> str:
    command = (
        f"python -m torch.distributed.run --standalone --nproc-per-node {about['ranks']} benchmarks/collectives.py"
    )
    lines = [
        f"| `{name}` | {sum(size for _, size in r['gradients']):,} in {len(r['gradients'])} | {said(r['loss'])} | "
        f"{said(r['needed'])} | {r['what']} | {r['beyond'] or 'nothing'} |"
        for name, r in rows.items()
    ]
    return f"""# What a step exchanges

`{command}`: {about["ranks"]} processes
(gloo), {about["batch"]} unlabelled images on each, the recipes of the bundled images in float32; {about["cpu"]}, Python
{about["python"]}, torch {about["packages"]["torch"]}. One count of {STEPS} steps, which do not differ; bytes that each
process hands over, in each step.

| method | gradients | for the loss | that it needs | what | beyond |
| --- | ---: | ---: | ---: | --- | --- |
{NEWLINE.join(lines)}

{BESIDES}"""


def said(calls: list) -> str:
    return " + ".join(f"{size:,} ({kind})" for kind, size in calls) or "0"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/results/collectives.md"))
    parser.add_argument("--batch", type=int, default=32, help="images on each process")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        rows = {method: row(method, args.batch, folder) for method in METHODS}
    if os.environ["RANK"] == "0":
        about = {"ranks": int(os.environ["WORLD_SIZE"]), "batch": args.batch, **environment()}
        args.out.with_suffix(".json").write_text(json.dumps({"methods": rows, "about": about}, indent=1) + "\n")
        args.out.write_text(table(rows, about), encoding="utf-8")


if __name__ == "__main__":
    main()
