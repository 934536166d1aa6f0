"""Time of a training step by teacher scope, above its floor, and beside solo-learn's and lightly's.

    python benchmarks/step_time.py --backbone resnet18 --batch 64 --steps 7 --threads 2
    SOLO_LEARN=~/solo-learn python benchmarks/step_time.py --method mocov3 --bf16

One step = forward of two views, backward, SGD, EMA update, of the framework as its recipe has it, without loading and
Trainer. A floor is the same with what cannot be left out alone: passes of bare copies of the networks, and SGD; no
loss, EMA, probe, or metric. Contenders take turns step by step, so that a busy machine slows all of them alike; the
figures are medians, and ratios within a round. Writes JSON next to the table.
"""

import argparse
import copy
import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from timing import Figures, allocated, in_turn, origin, ratios, shown, spread
from torch import Tensor, nn

from solo_ext.methods import METHODS
from solo_ext.methods.module import LightningMethod
from solo_ext.planning.plan import anatomy
from solo_ext.runs.environment import environment
from solo_ext.schema import plain
from solo_ext.training.compose import compose
from solo_ext.training.config import resolve

RECIPES = Path(__file__).resolve().parents[1] / "scripts" / "pretrain"
LIGHTLY = {"byol": "BYOL", "simclr": "SimCLR", "simsiam": "SimSiam"}
SCOPES = ("full", "block4", "projector", "none")
BEGINS = {"full": 0, "projector": 1}  # the part from which on a teacher has copies


@dataclass
class Setting:
    """backbone, size (of an image in pixels), batch, dataset: whose recipe, which decides the stem."""

    method: str = "byol"
    backbone: str = "resnet18"
    dataset: str = "cifar10"
    size: int = 32
    batch: int = 64
    device: str = "cpu"
    bf16: bool = False
    scopes: tuple[str, ...] = SCOPES

    def config(self, scope: str) -> Any:
        own = [f"backbone.name={self.backbone}", f"momentum.stages={scope}", f"optimizer.batch_size={self.batch}"]
        cfg = compose(RECIPES / self.dataset, self.method, [*own, "gap.enabled=False"])
        if self.backbone.startswith("vit"):
            OmegaConf.update(cfg, "backbone.kwargs", {}, merge=False, force_add=True)  # the recipe's are a ResNet's
        return resolve(cfg)

    def step(self, module: nn.Module, loss: Callable[[], Tensor], after: Callable[[], Any] = lambda: None) -> Callable:
        optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.03, momentum=0.9)

        def run() -> None:
            with torch.autocast(self.device, torch.bfloat16, enabled=self.bf16):
                value = loss()
            value.backward()
            optimizer.step()
            optimizer.zero_grad()
            after()

        return run

    def on_device(self, module: nn.Module) -> Any:
        return module.to(self.device, memory_format=torch.channels_last).train()


def method(setting: Setting, scope: str) -> LightningMethod:
    torch.manual_seed(0)
    model = setting.on_device(METHODS[setting.method](setting.config(scope)))
    model.log = model.log_dict = lambda *_, **__: None
    return model


def ours(setting: Setting, batch: list, model: LightningMethod) -> Callable:
    def after() -> None:
        model.on_after_backward()
        model.teacher.update(0, 100)

    return setting.step(model, lambda: model.training_step(batch, 0), after)


def floor(setting: Setting, batch: list, scope: str) -> Callable:
    """The passes that `scope` needs, of bare copies of the networks."""
    model, views = method(setting, scope), batch[1]
    parts = list(model.parts)
    passes = model.passes(len(views))
    student = nn.ModuleList(copy.deepcopy(model.part(part)) for part in parts)
    first = BEGINS.get(scope, len(parts))
    copies = [copy.deepcopy(model.part(part)) for part in parts[first : parts.index(passes.upto) + 1]]
    teacher = nn.Sequential(*copies).requires_grad_(False)

    def loss() -> Tensor:
        features, total = {}, torch.zeros((), device=setting.device)
        for i in passes.student:
            with torch.set_grad_enabled(i in passes.learning):
                x = features[i] = student[0](views[i])
                for part in student[1:]:
                    x = part(x)
            total = total + x.float().square().mean() if i in passes.learning else total
        with torch.no_grad():
            for i in passes.teacher if copies else ():
                teacher(features[i] if first else views[i])
        return total

    return setting.step(setting.on_device(student), loss)


def solo_learn(setting: Setting, batch: list, scope: str) -> Callable:
    """solo-learn's step, with the teacher that it has."""
    sys.path.append(os.environ["SOLO_LEARN"])
    from solo.methods import METHODS as THEIRS

    cfg = OmegaConf.create(plain(setting.config("full")))
    cfg.knn_eval.enabled = False  # its metric passes an argument that torchmetrics has dropped
    model = setting.on_device(THEIRS[setting.method](cfg))
    model.log = model.log_dict = lambda *_, **__: None

    def after() -> None:
        for pair in getattr(model, "momentum_pairs", ()):
            model.momentum_updater.update(*pair)

    return setting.step(model, lambda: model.training_step(batch, 0), after)


def lightly(setting: Setting, batch: list, scope: str) -> Callable:
    """A loop as lightly's documentation writes it, of its modules, around our backbone."""
    from lightly.loss import NegativeCosineSimilarity, NTXentLoss
    from lightly.models import modules
    from lightly.models.utils import deactivate_requires_grad, update_momentum

    model, (_, views, _) = method(setting, scope), batch
    k, name = model.kwargs, LIGHTLY[setting.method]
    head = getattr(modules, f"{name}ProjectionHead")
    head = head(model.backbone.num_features, k.proj_hidden_dim, k.proj_output_dim)
    student = setting.on_device(nn.Sequential(model.backbone, head))
    predictor, teacher = nn.Identity(), copy.deepcopy(student)
    if name != "SimCLR":
        predict = getattr(modules, f"{name}PredictionHead")
        predictor = setting.on_device(predict(k.proj_output_dim, k.pred_hidden_dim, k.proj_output_dim))
    deactivate_requires_grad(teacher)
    near, contrast = NegativeCosineSimilarity(), NTXentLoss()

    def loss() -> Tensor:
        z = [student(view) for view in views]
        if name == "SimCLR":
            return contrast(*z)
        with torch.no_grad():
            targets = [teacher(view) for view in views] if name == "BYOL" else [x.detach() for x in z]
        return (near(predictor(z[0]), targets[1]) + near(predictor(z[1]), targets[0])) / 2

    def after() -> None:
        if name == "BYOL":
            update_momentum(student, teacher, 0.99)

    return setting.step(nn.ModuleList([student, predictor]), loss, after)


def measure(setting: Setting, rounds: int) -> dict[str, Figures]:
    """Name -> ms of a step, `speedup` over the first scope, `over_floor`, `memory` in bytes on a GPU: at most in a
    step, with weights, gradients and optimizer state."""
    shape = setting.batch, 3, setting.size, setting.size
    views = [torch.randn(shape, device=setting.device).to(memory_format=torch.channels_last) for _ in range(2)]
    labels = torch.randint(0, 10, (setting.batch,), device=setting.device)
    batch = [torch.arange(setting.batch, device=setting.device), views, labels]
    parameters: dict[str, int] = {}

    def build(scope: str) -> Callable:
        model = method(setting, scope)
        parameters[scope] = anatomy(model)["teacher_parameters"]
        return ours(setting, batch, model)

    makers: dict[str, Callable[[], Callable]] = {}
    for scope in setting.scopes:
        makers[scope] = lambda scope=scope: build(scope)
        if scope in (*BEGINS, "none"):
            makers[f"floor of {scope}"] = lambda scope=scope: floor(setting, batch, scope)
    if os.environ.get("SOLO_LEARN") and not setting.backbone.startswith("resnet10"):  # which solo-learn lacks
        makers["solo-learn"] = lambda: solo_learn(setting, batch, "full")
    if setting.method in LIGHTLY and find_spec("lightly"):
        makers["lightly"] = lambda: lightly(setting, batch, "full")

    contenders, memory = {}, {}
    for name, make in makers.items():
        before = allocated(setting.device)
        contenders[name] = make()
        contenders[name]()  # which makes the optimizer's state
        if setting.device == "cuda":
            allocated(setting.device)
            contenders[name]()
        memory[name] = allocated(setting.device, peak=True) - before
    seconds = in_turn(contenders, rounds, setting.device, warm_up=0)
    rows: dict[str, Figures] = {}
    for name, times in seconds.items():
        rows[name] = {"ms": spread(times, 1000), "speedup": ratios(seconds[setting.scopes[0]], times)}
        if f"floor of {name}" in seconds:
            rows[name]["over_floor"] = ratios(times, seconds[f"floor of {name}"])
        if name in parameters:
            rows[name]["teacher_parameters"] = parameters[name]
        if memory[name]:
            rows[name]["memory"] = memory[name]
    return rows


def cells(rows: dict[str, Figures]) -> list[list[str]]:
    """Of a table: step, ms, against the first, against its floor, the teacher's parameters, MiB."""
    return [
        [
            name,
            shown(row["ms"], 1 if row["ms"]["median"] < 100 else 0),
            shown(row["speedup"], 2, "x"),
            shown(row["over_floor"], 3, "x") if "over_floor" in row else "",
            f"{row['teacher_parameters'] / 1e6:.1f} M" if "teacher_parameters" in row else "",
            f"{row['memory'] / 2**20:,.0f}" if "memory" in row else "",
        ]
        for name, row in rows.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Setting()
    for name in ("method", "backbone", "dataset", "size", "batch", "device"):
        value = getattr(default, name)
        parser.add_argument(f"--{name}", type=type(value), default=value)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--scopes", type=lambda text: tuple(text.split(",")), default=SCOPES)
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=Path("step_time.json"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    setting = Setting(**{name: getattr(args, name) for name in asdict(default)})
    report = {"setting": asdict(setting), "n": args.steps, "rows": measure(setting, args.steps)}
    report["environment"] = environment()
    args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    for row in [["step", "ms", "against full", "floor", "copied", "MiB"], *cells(report["rows"])]:
        print("{:<20} {:>22} {:>20} {:>22} {:>8} {:>8}".format(*row))
    print(f"{origin()}, n = {args.steps}")


if __name__ == "__main__":
    main()
