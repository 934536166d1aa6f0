"""The pages of the site that say what the code says: methods, recipes, every key. A hook of MkDocs."""

import dataclasses
import fnmatch
import inspect
import itertools
import json
import re
import textwrap
from typing import Any

from mkdocs.structure.files import File

from solo_ext.methods import METHODS
from solo_ext.momentum.scope import PRESETS
from solo_ext.schema import MISSING, _arms, _hints, describe
from solo_ext.training import config as configuration
from solo_ext.training import recipes
from solo_ext.training.callbacks import MONITORS

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
    "`linear` and `finetune`": configuration.LinearConfig,
    "`detect`": configuration.DetectionConfig,
    "`knn`": configuration.KNNRunConfig,
    "`quality`": configuration.QualityConfig,
}


def on_files(files: Any, config: Any) -> Any:
    pages = {"recipes.md": recipes_page(), "keys.md": keys_page()}
    pages |= {f"methods/{name}.md": method_page(name) for name in LOSSES}
    for path, lines in pages.items():
        files.append(File.generated(config, path, content="\n".join(lines)))
    return files


def table(*head: str, rows: Any) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return ["", *("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines), ""]


def prose(cls: Any) -> tuple[str, dict[str, str]]:
    """A docstring up to its first `field: meaning`, and these meanings; `a, b: ` and `*_a: ` are of several fields."""
    text = inspect.cleandoc(cls.__dict__.get("__doc__") or "")
    if text.startswith(f"{cls.__name__}(") or not dataclasses.is_dataclass(cls):
        return "", {}
    names, found = [field.name for field in dataclasses.fields(cls)], []
    for said in re.finditer(r"(?m)(?:^|(?<=[.;] ))([\w*]+(?:, [\w*]+)*): ", text):
        fields = [fnmatch.filter(names, part) for part in said[1].split(", ")]
        found += [(said, [*itertools.chain(*fields)])] if all(fields) else []
    ends = [said.start() for said, _ in found] + [len(text)]
    spans = [(fields, text[said.end() : end]) for (said, fields), end in zip(found, ends[1:], strict=True)]
    return text[: ends[0]], {field: " ".join(span.split()).rstrip(".;") for fields, span in spans for field in fields}


def comments(cls: type) -> dict[str, str]:
    """Field -> what the docstring says of it, or the comment on its line, or above it, in the source of a dataclass and
    those that it extends."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        found |= prose(base)[1]
        above: list[str] = []
        if base.__module__.startswith("solo_ext"):
            for line in textwrap.dedent(inspect.getsource(base)).splitlines():
                code, _, said = re.sub(r"# type: ignore\S*", "", line).partition("  # ")
                if comment := re.match(r"\s+# (.*)", line):
                    above.append(comment[1])
                elif field := re.match(r"    (\w+):", code):
                    found[field[1]] = " ".join([*above, said.strip("# ")]).strip() or found.get(field[1], "")
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
    head = "key", "value", "default", "meaning"
    cls: Any = configuration._pretraining(*MONITORS.values())  # type: ignore[arg-type]
    lines = [
        "# Every key",
        "",
        "`method_kwargs` are on the methods' pages, and keys that only evaluations have at the end.",
    ]
    lines += ["A key without a meaning here is an argument of Lightning's Trainer, or what its name says.", ""]
    lines += ["## At the top level", *table(*head, rows=rows_of(cls))]
    for name, section in sections(cls):
        lines += [f"## {name}", "", prose(section)[0], *table(*head, rows=rows_of(section, f"{name}."))]
    own = {field.name for field in dataclasses.fields(cls)}
    for title, kind in EVALUATIONS.items():
        lines += [
            f"## Only in {title}",
            "",
            prose(kind)[0],
            *table(*head, rows=rows_of(kind, but=own - {"max_epochs"})),
        ]
        for name, section in sections(kind, but=own - {"knn_eval"}):
            lines += table(*head, rows=rows_of(section, f"{name}."))
    return lines


def recipes_page() -> list[str]:
    how = (
        "By name, from any folder: `solo-ext pretrain cifar10/res_mocov3`. `solo-ext recipes copy NAME DIR` copies one."
    )
    return ["# Recipes", "", how, "", "```text", recipes.listing([]), "```"]


def method_page(name: str) -> list[str]:
    declared = METHODS.declared
    cls = declared[name]
    lines = [f"# {cls.__name__}", "", inspect.cleandoc(cls.__doc__ or ""), "", f"    loss = {LOSSES[name]}", ""]
    symbols = "q, z: outputs of predictor and projector; 1, 2: the views; m: of the teacher; sg: without gradient."
    scale = (
        " As solo-learn codes it; `method_kwargs.loss_scale=paper` takes the printed form." if cls.loss_scale else ""
    )
    lines += [symbols + scale, "", "## Variants"]
    variants, unread = [], () if cls.loss_scale else ("loss_scale",)
    for other, method in declared.items():
        if cls in method.__mro__:
            term = f"weight {method.intra.weight:g}, {method.intra.distance}" if method.intra.weight else "-"
            said = inspect.cleandoc(method.__doc__ or "").splitlines()[0] if other != name else "as in solo-learn"
            variants.append((f"`{other}`", f"`{method.teacher_stages}`", term, said))
    lines += table("name", "momentum on", "intra-momentum", "", rows=variants)
    lines += [
        "## Keys",
        "",
        prose(cls.Kwargs)[0],
        *table("key", "value", "default", "meaning", rows=rows_of(cls.Kwargs, "method_kwargs.", unread)),
    ]
    lines += [
        "## What the teacher costs",
        "",
        "Parameters with a ResNet-18, and passes of a view through the backbone.",
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
