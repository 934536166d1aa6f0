"""The pages of the site that say what the code says: methods, recipes, every key, performance. A hook of MkDocs."""

import dataclasses
import inspect
import json
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

from solo_ext.methods import METHODS
from solo_ext.momentum.scope import PRESETS
from solo_ext.schema import MISSING, _arms, _hints, describe
from solo_ext.training import config as configuration
from solo_ext.training import recipes
from solo_ext.training.callbacks import MONITORS

RESULTS = Path(__file__).parent / "results"
LOSSES = {
    "byol": "(2 - 2 cos(q₁, sg z₂ᵐ)) + (2 - 2 cos(q₂, sg z₁ᵐ))",
    "dino": "-Σ softmax((z₂ᵐ - centre) / τₜ) · log softmax(z₁ / τₛ), over all pairs of different views",
    "mocov2plus": "-log exp(z₁ · z₂ᵐ / T) / (exp(z₁ · z₂ᵐ / T) + Σ exp(z₁ · k / T)), k: that view's queue; both ways",
    "mocov3": "-log exp(q₁ · z₂ᵐ / T) / Σ exp(q₁ · zᵐ / T), zᵐ: the batch; both ways",
    "ressl": "-Σ softmax(zᵐ · k / τₜ) · log softmax(z · k / τₛ), k: the queue",
    "simclr": "-log exp(z₁ · z₂ / T) / Σ exp(z₁ · z / T), z: all other views of the batch",
    "simsiam": "-cos(q₁, sg z₂) / 2 - cos(q₂, sg z₁) / 2",
}
EVALUATIONS = {
    "linear, finetune": configuration.LinearConfig,
    "detect": configuration.DetectionConfig,
    "knn": configuration.KNNRunConfig,
    "quality": configuration.QualityConfig,
}


def on_files(files: Any, config: Any) -> Any:
    pages = {"recipes.md": recipes_page(), "keys.md": keys_page(), "performance.md": performance_page()}
    pages |= {f"methods/{name}.md": method_page(name) for name in LOSSES}
    for path, lines in pages.items():
        files.append(File.generated(config, path, content="\n".join(lines)))
    return files


def table(*head: str, rows: Any) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return ["", *("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines), ""]


def prose(cls: type) -> str:
    """A docstring, in which `field: meaning` is an item of a list."""
    text = inspect.cleandoc(cls.__dict__.get("__doc__") or "")
    return "" if text.startswith(f"{cls.__name__}(") else re.sub(r"(?m)^(\w[\w, *]*): ", r"\n- `\1`: ", text)


def comments(cls: type) -> dict[str, str]:
    """Field -> the comment on its line, or above it, in the source of a dataclass and those that it extends."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        above: list[str] = []
        if base.__module__.startswith("solo_ext"):
            for line in inspect.getsource(base).splitlines():
                code, _, said = re.sub(r"# type: ignore\S*", "", line).partition("  # ")
                if comment := re.match(r"\s+# (.*)", line):
                    above.append(comment[1])
                elif field := re.match(r"    (\w+):", code):
                    found[field[1]] = " ".join([*above, said.strip("# ")])
                    above = []
                else:
                    above = []
    return found


def rows_of(cls: Any, at: str = "", but: Any = ()) -> list[tuple[str, ...]]:
    """(key, type, default, comment) of the fields that are no sections."""
    said, rows = comments(cls), []
    for field in dataclasses.fields(cls):
        if field.name in but or any(True for _ in inner(cls, field)):
            continue
        value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        shown = "required" if value in (dataclasses.MISSING, MISSING) else f"`{json.dumps(value, default=str)}`"
        rows.append((f"`{at}{field.name}`", describe(_hints(cls)[field.name]), shown, said.get(field.name, "")))
    return rows


def inner(cls: Any, field: Any) -> Any:
    """The section that a field holds, or that its list holds."""
    for arm in _arms(_hints(cls)[field.name]):
        yield from (kind for kind in (arm, *getattr(arm, "__args__", ())) if dataclasses.is_dataclass(kind))


def sections(cls: Any, at: str = "", but: Any = ()) -> Any:
    for field in dataclasses.fields(cls):
        for section in inner(cls, field) if field.name not in but else ():
            yield f"{at}{field.name}", section
            yield from sections(section, f"{at}{field.name}.")


def keys_page() -> list[str]:
    head = "key", "value", "default", ""
    cls: Any = configuration._pretraining(*MONITORS.values())  # type: ignore[arg-type]
    lines = ["# Every key", "", "A mistyped key is refused, and the message names the nearest one.", ""]
    lines += ["`method_kwargs` are on the methods' pages; what only evaluations have stands at the end.", ""]
    lines += ["## Of a pre-training", *table(*head, rows=rows_of(cls))]
    for name, section in sections(cls):
        lines += [f"## {name}", "", prose(section), *table(*head, rows=rows_of(section, f"{name}."))]
    own = {field.name for field in dataclasses.fields(cls)}
    for title, kind in EVALUATIONS.items():
        lines += [f"## Of {title}", "", prose(kind), *table(*head, rows=rows_of(kind, but=own - {"max_epochs"}))]
        for name, section in sections(kind, but=own - {"knn_eval"}):
            lines += table(*head, rows=rows_of(section, f"{name}."))
    return lines


def recipes_page() -> list[str]:
    how = "By name, from any folder: `solo-ext pretrain cifar10/res_mocov3`."
    return [
        "# Recipes",
        "",
        how,
        "`solo-ext recipes copy NAME DIR` makes one yours.",
        "",
        "```text",
        recipes.listing([]),
        "```",
    ]


def method_page(name: str) -> list[str]:
    declared = METHODS.declared
    cls = declared[name]
    lines = [f"# {cls.__name__}", "", inspect.cleandoc(cls.__doc__ or ""), "", f"    loss = {LOSSES[name]}", ""]
    lines += [
        "m: the teacher's output. q: after the predictor. sg: without gradient. `loss_scale` shifts and scales it.",
        "",
        "## Variants",
    ]
    variants = []
    for other, method in declared.items():
        if cls in method.__mro__:
            term = f"weight {method.intra.weight:g}, {method.intra.distance}" if method.intra.weight else "-"
            said = inspect.cleandoc(method.__doc__ or "").splitlines()[0] if other != name else "as in solo-learn"
            variants.append((f"`{other}`", f"`{method.teacher_stages}`", term, said))
    lines += table("name", "momentum on", "intra-momentum", "", rows=variants)
    lines += [
        "## Keys",
        "",
        prose(cls.Kwargs),
        *table("key", "value", "default", "", rows=rows_of(cls.Kwargs, "method_kwargs.")),
    ]
    lines += [
        "## What the teacher costs",
        "",
        "With a ResNet-18; passes through the backbone, for each image and view.",
        "",
    ]
    lines += table("momentum.stages", "student", "teacher", "passes", rows=[cost(name, preset) for preset in PRESETS])
    lines += ["## Recipes", "", "```text", recipes.listing([f"/{name}"]), "```", ""]
    return [*lines, "The papers' figures, and what has been run here: [Reproduction](../reproduction.md)."]


def cost(name: str, preset: str) -> tuple[str, ...]:
    module: Any = METHODS[name]({"backbone": {"name": "resnet18"}, "momentum": {"stages": preset}})
    counts = {True: 0, False: 0}
    for key, parameter in module.named_parameters():
        counts[key.startswith("momentum_")] += parameter.numel()
    sizes = [f"{counts[key] / 1e6:.1f} M" for key in (False, True)]
    return f"`{preset}`", *sizes, "2" if hasattr(module, "momentum_backbone") else "1"


def performance_page() -> list[str]:
    step, data = (json.loads((RESULTS / f"{name}.json").read_text()) for name in ("step_time", "data"))
    scopes = [
        (f"`{scope}`", f"{x['median_ms']:,.0f}", f"{x['speedup']:.2f}x", f"{x['teacher_parameters'] / 1e6:.1f} M")
        for scope, x in step["scopes"].items()
    ]
    about = (
        f"{step['hardware']}, PyTorch {step['torch']}, n = {step['n']} interleaved steps, medians; {step['command']}"
    )
    lines = ["# Performance", "", "## A step, by what the teacher copies", "", about, ""]
    lines += table("momentum.stages", "ms", "against full", "teacher's parameters", rows=scopes)
    for title, key in (("Two views of 224 px from JPEGs", "photos"), ("Two views of 32 px from memory", "cifar")):
        rows = [
            (f"`{name}`", f"{x['images/s']['median']:,.0f}", f"{x['ratio']['median']:.2f}x")
            for name, x in data[key].items()
        ]
        lines += [f"## {title}", "", f"{data['rounds']} interleaved rounds on the {data['device']}, medians", ""]
        lines += table("format", "images/s", "against Pillow", rows=rows)
    return lines
