"""Reference curves of a recipe, with bands over seeds, and what of a run departs from them. Imports no torch."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np

from solo_ext.errors import CheckpointError, ConfigError, naming
from solo_ext.files import json_text, read_json
from solo_ext.runs.comparison import IGNORED, differences, flatten, within
from solo_ext.runs.run import Run
from solo_ext.runs.zoos import folders
from solo_ext.schema import build
from solo_ext.text import nearest

FOLDER = "references"  # of a zoo
# without these in common, curves cannot be compared
IDENTITY = ("method", "backbone.name", "data.dataset", "max_epochs")
# what may be otherwise: names and places, what is only watched, and how it is computed
FREE = (
    *("name", "seed", "data.train_path", "data.val_path", "data.format", "data.download", "optimizer.effective_lr"),
    *("knn_eval", "val_gap", "gap", "filters", "gradients", "check", "momentum.classifier", "max_steps", "max_time"),
    *("accelerator", "strategy", "sync_batchnorm", "performance", "callbacks", "skip_non_finite"),
    *("limit_val_batches", "check_val_every_n_epoch", "num_sanity_val_steps", "optimizer.effective_classifier_lr"),
)
NOTED = "precision: "  # what may be otherwise, and is said
IMAGES = {"images": "number", "fingerprint": "names or labels", "bytes": "contents"}
POINTS = 13  # epochs at which a curve is held, beside the first ones
LEAST = 2  # epochs, before which curves say nothing
AT_ENDS = ("images_per_s", "bn_images", "train_z_std")  # logged when an epoch is over
RISK = 1e-4  # of a value of an honest run above its band, and as much below
FLOOR = 1e-3  # of a curve's largest value, where all seeds agree

# Curve -> what its departure points to. Those of an `INPUT` come first in time: the others follow from them.
INPUTS = {
    "steps": "another number of images, or of images in a batch",
    "lr": "another learning rate",  # `_rate` says more
    "1 - tau": "another momentum of the teacher, or another schedule of it",
    "bn_images": "BatchNorm of another batch: optimizer.batch_size, or sync_batchnorm on several devices",
    "view_mean": "the views are normalised, solarized or cropped otherwise",
    "view_std": "the views are normalised otherwise, or have another contrast",
    "view_brightness": "another brightness of the views: jitter, solarization or crops",
    "view_detail": "the views are blurred, cropped or resized otherwise",
    "view_colour": "other colours in the views: jitter, grayscale, or their normalisation",
}
EFFECTS = {
    "weight_distance": "the teacher follows, or the student's weights move, otherwise: update, stages, optimizer",
    "gap_sim*": "the teacher follows otherwise: its update or its stages",
    "train_z_std": "the outputs spread otherwise; towards 0 they collapse",
    "train_rankme": "the outputs fill another number of directions; towards 1 they collapse",
    "*class_loss": "the labels do not belong to the images, or the online classifier learns otherwise",
    "*acc1": "the labels do not belong to the images, or other features",
    "val_knn*": "other features, or other validation images",
    "val_*": "other validation images, or shown otherwise",
    "train_*": "another loss (scale, temperature, queue, heads), other views, or the optimizer (weight decay)",
}
UNHELD = ("images_per_s", "*acc5", "train_loss", "train_momentum*", "momentum_val*", "val_gap*", "lr-*", "intra_on")


@dataclass
class Reference:
    """A recipe's curves over several seeds. `curves`: name -> [means, half widths of the band] at `epochs`, None where
    nothing was logged. `config`: full key -> value, without `FREE`; `data`: split -> number of images, fingerprint."""

    name: str
    config: dict[str, Any]
    data: dict[str, dict[str, Any]]
    packages: dict[str, str]
    seeds: list[int]
    epochs: list[int]
    curves: dict[str, list[list[float | None]]]

    def __post_init__(self) -> None:
        for name, parts in self.curves.items():
            if [len(part) for part in parts] != [len(self.epochs)] * 2:
                raise ConfigError(f"curves.{name} is not two lists of {len(self.epochs)} numbers")

    @classmethod
    def of(cls, name: str, runs: Sequence[Run]) -> "Reference":
        """Of finished runs that differ in the seed alone; ConfigError if there are fewer than three, or they do not."""
        seeds = sorted({int(run.args.get("seed", -1)) for run in runs})
        if len(seeds) < 3 or len(seeds) < len(runs):
            raise ConfigError(f"a reference needs at least 3 runs, each with another seed, not seeds {seeds}")
        first = runs[0]
        for run in runs:
            if not run.finished:
                raise ConfigError(f"{run.dir} has not ended")
            if other := [*differences(compared(first), compared(run)), *_data_changed(_data(first), run)]:
                raise ConfigError(f"{run.dir} differs from {first.dir} in more than the seed: {other[0]}")
        epochs = _points(first.args["max_epochs"])
        curves = {}
        for curve in dict.fromkeys(name for run in runs for name in _curves(run)):
            values = np.array([_values(run, curve, epochs) for run in runs])
            if np.isfinite(values).all(0).any():
                mean, band = _band(values)
                curves[curve] = [_rounded(mean, 6), _rounded(band, 3)]
        packages = first.environment.get("packages", {})
        return cls(name, compared(first), _data(first), packages, seeds, epochs, curves)

    @classmethod
    def read(cls, path: Path) -> "Reference":
        """From a file that `text` made; CheckpointError for another."""
        content = read_json(path)
        if content is None:
            raise CheckpointError(f"there is no reference '{path}'")
        with naming(f"{path} is not a reference", TypeError, ConfigError, error=CheckpointError):
            return build(cls, content)

    @property
    def text(self) -> str:
        """The content of its file."""
        # a list of numbers in one line
        return re.sub(r"\[\s+((?:[-\d.e]+|null),?\s+)+\]", lambda m: " ".join(m[0].split()), json_text(asdict(self)))


@dataclass(frozen=True)
class Departure:
    """A curve that leaves its band at `epoch`."""

    curve: str
    epoch: int
    value: float
    mean: float
    band: float
    cause: str

    @property
    def excess(self) -> float:
        return abs(self.value - self.mean) / max(self.band, 1e-12) if math.isfinite(self.value) else math.inf

    @property
    def order(self) -> tuple:
        return self.epoch, self.curve not in INPUTS, self.curve.startswith("val_"), -self.excess

    @property
    def place(self) -> str:
        return f"{self.curve} from epoch {self.epoch}"

    def __str__(self) -> str:
        return f"{self.place}: {self.value:.4g} instead of {self.mean:.4g} ± {self.band:.2g}; {self.cause}"


@dataclass(frozen=True)
class Verdict:
    """What of a run departs from a reference: `asked` by its configuration or its data, and the curves, first ones
    first."""

    reference: Reference
    asked: list[str]
    departures: list[Departure]
    epochs: int  # of the run, which were looked at
    remarks: list[str]

    @property
    def on_track(self) -> bool:
        return not self.asked and not self.departures

    def __str__(self) -> str:
        r, n = self.reference, len(self.reference.curves)
        lines = [f"against {r.name} ({len(r.seeds)} seeds, {r.epochs[-1]} epochs), up to epoch {self.epochs}:"]
        lines += [f"  configured otherwise: {text}" for text in self.asked]
        lines += [f"  {'then' if i else 'first'}: {text}" for i, text in enumerate(map(str, self.departures))]
        lines += [f"  {text}" for text in self.remarks]
        return "\n".join([*lines, *([f"  on track: {n} curves keep within their bands"] if self.on_track else [])])


def judge(run: Run, reference: Reference) -> Verdict:
    """Compares a run, finished or under way, with the reference of its recipe; ConfigError if it is another's."""
    mine = compared(run)
    for key, theirs, ours in ((key, reference.config.get(key), mine.get(key)) for key in IDENTITY):
        if theirs != ours:
            problem = f"has {key} {ours}, but the reference {reference.name} {theirs}"
            raise ConfigError(f"{run.dir} {problem}: their curves cannot be compared")
    done = round(max(run.series(name)[1].max(initial=0) for name in AT_ENDS))
    epochs = [epoch for epoch in reference.epochs if epoch <= done]
    departures = []
    for curve, (means, bands) in reference.curves.items():
        values = _values(run, curve, epochs)
        if found := _first_outside(curve, epochs, values, means, bands, done >= LEAST):
            departures.append(found)
    changes = differences(reference.config, mine)
    remarks = [change for change in changes if change.startswith(NOTED)]
    if done < LEAST:
        few = f"{done} epoch{'s' * (done != 1)}"
        remarks.append(
            f"too short to judge the curves, but for what goes in: it has {few} of the {LEAST} that it takes"
        )
    for package in ("solo-ext", "torch"):
        theirs, ours = (facts.get(package) for facts in (reference.packages, run.environment.get("packages", {})))
        if str(theirs).split(".")[:2] != str(ours).split(".")[:2]:
            remarks.append(f"the reference is of {package} {theirs}, the run of {ours or 'an unknown version'}")
    asked = [change for change in changes if not change.startswith(NOTED)] + _data_changed(reference.data, run)
    return Verdict(reference, asked, sorted(departures, key=lambda d: d.order), done, remarks)


def reference_for(run: Run | Mapping[str, Any], file: str | None) -> Reference:
    """The one in `file`, or else the zoo's for a run or a configuration; CheckpointError or ConfigError without one."""
    return Reference.read(Path(file)) if file else find_reference(compared(run), folders())


def find_reference(config: Mapping[str, Any], zoos: Iterable[Path]) -> Reference:
    """The one in these zoos for a run's configuration, as `compared` has it: of those of its method, backbone, data and
    epochs, the one that has most of it; ConfigError if there is none."""
    known = [Reference.read(path) for zoo in zoos for path in sorted((zoo / FOLDER).rglob("*.json"))]
    fitting = [r for r in known if all(r.config.get(key) == config.get(key) for key in IDENTITY)]
    if not fitting:
        *what, epochs = (str(config.get(key)) for key in IDENTITY)
        others = {" ".join(str(r.config.get(key)) for key in IDENTITY[:3]): r.config["max_epochs"] for r in known}
        name = " ".join(what)
        near = f": that one has {others[name]}" if name in others else nearest(name, others)
        advice = near or "; solo-ext zoo reference makes one of three runs"
        raise ConfigError(f"there is no reference of {name} over {epochs} epochs{advice}")
    return min(fitting, key=lambda r: (len(differences(r.config, config)), -len(r.seeds)))


def compared(run: Run | Mapping[str, Any]) -> dict[str, Any]:
    """What the curves of a run, or of a configuration, depend on: full key -> value. Its batch is all devices'."""
    values = run.config if isinstance(run, Run) else run
    if not values or "method" not in values:
        raise CheckpointError(f"{run.dir if isinstance(run, Run) else run} has no args.json of a pre-training")
    flat = {key: value for key, value in flatten(values).items() if not within(key, (*IGNORED, *FREE))}
    devices = values.get("devices", 1)  # "auto" and -1 do not say how many
    count = max(1, devices) if isinstance(devices, int) else len(devices) if isinstance(devices, list) else 1
    older = flat["optimizer.batch_size"] * count * values.get("num_nodes", 1)  # whose joint batch is not recorded
    return flat | {"optimizer.batch_size": values["optimizer"].get("joint_batch") or older}


def _data(run: Run) -> dict[str, dict[str, Any]]:
    sets = run.environment.get("data")
    sets = sets if isinstance(sets, dict) else {}
    return {split: {key: (sets.get(split) or {}).get(key) for key in IMAGES} for split in ("train", "val")}


def _data_changed(theirs: dict[str, dict[str, Any]], run: Run) -> list[str]:
    """How the images differ: in number, or else in names or labels, or else in content."""
    changes = []
    for split, now in _data(run).items():
        before = theirs.get(split, {})
        pairs = ((what, before.get(key), now[key]) for key, what in IMAGES.items())
        if change := next(((what, a, b) for what, a, b in pairs if None not in (a, b) and a != b), None):
            changes.append(f"{split} images: {change[0]} {str(change[1])[:12]} -> {str(change[2])[:12]}")
    return changes


def _points(epochs: int) -> list[int]:
    """The first five epochs, at most `POINTS` more, multiples of 1, 2, 5, 10, ..., at which kNN is, and the last."""
    strides = (unit * 10**power for power in range(9) for unit in (1, 2, 5))
    stride = next(stride for stride in strides if epochs <= POINTS * stride)
    return sorted({*range(1, min(5, epochs) + 1), *range(stride, epochs + 1, stride), epochs})


def _curves(run: Run) -> list[str]:
    """The names of what is held of a run's curves."""
    renamed = {"tau": "1 - tau"}  # whose digits count
    names = dict.fromkeys(renamed.get(name, re.sub("(?<=weight_distance)/.*", "", name)) for name in run.columns)
    return ["steps", *(name for name in names if not any(fnmatchcase(name, pattern) for pattern in UNHELD))]


def _values(run: Run, curve: str, epochs: Sequence[int]) -> np.ndarray:
    """The mean of what was logged in each of `epochs`, NaN where nothing was."""
    if curve == "steps":
        ends = run.metrics.epoch_ends
        return np.array([ends.get(epoch - 1, math.nan) + 1 for epoch in epochs], dtype=float)
    if curve == "1 - tau":
        return 1 - _values(run, "tau", epochs)
    return run.means([name for name in run.columns if name == curve or name.startswith(f"{curve}/")], epochs)


def _band(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean, and half the width of the band that a further seed's value leaves with a chance of 2 `RISK`, of values
    [seeds, epochs]: Student's t, with the geometric mean of the variances of five neighbouring points (times what makes
    it unbiased for independent ones), counted as two."""
    from scipy.special import digamma
    from scipy.stats import t

    n, means = len(values), values.mean(0)
    known = np.flatnonzero(np.isfinite(means))
    variance = np.full_like(means, np.nan)
    logs = np.log(np.maximum(values[:, known].var(0, ddof=1), 1e-30))
    pooled = [logs[max(0, i - 2) : i + 3].mean() for i in range(len(known))]
    variance[known] = np.exp(np.array(pooled) + np.log((n - 1) / 2) - digamma((n - 1) / 2))
    wide = t.ppf(1 - RISK, 2 * (n - 1)) * np.sqrt(variance * (1 + 1 / n))
    return means, wide + FLOOR * np.nanmax(np.abs(means))


def _rounded(values: np.ndarray, digits: int) -> list[float | None]:
    return [float(f"{value:.{digits}g}") if math.isfinite(value) else None for value in values]


def _first_outside(
    curve: str, epochs: Sequence[int], values: np.ndarray, means: Sequence, bands: Sequence, effects: bool
) -> Departure | None:
    """Where it leaves its band for two points, or once by far; `effects`: whether it is late enough to judge those."""
    cause = INPUTS.get(curve) or next((text for pattern, text in EFFECTS.items() if fnmatchcase(curve, pattern)), "")
    if curve not in INPUTS and not effects:
        return None
    cause = _rate(values, means) if curve == "lr" else cause
    points = [p for p in zip(epochs, values, means, bands, strict=False) if None not in p and not math.isnan(p[1])]
    found = [Departure(curve, epoch, float(value), mean, band, cause) for epoch, value, mean, band in points]
    for i, here in enumerate(found):
        later = found[i + 1].excess if i + 1 < len(found) else 0
        if here.excess > 1 and (later > 1 or here.excess > 3):
            return here
    return None


def _rate(values: np.ndarray, means: Sequence) -> str:
    """How a learning rate departs: by a factor, in its warm-up or in its schedule."""
    pairs = np.array([(value, mean) for value, mean in zip(values, means, strict=False) if mean and value == value])
    ratios = pairs[:, 0] / pairs[:, 1] if len(pairs) else np.ones(1)
    if ratios.max() <= 1.02 * ratios.min():
        warm = " so far, or another warm-up" if len(ratios) == 1 else ""
        return f"{ratios.mean():.3g} times the recipe's after scaling{warm}"
    return "another warm-up" if abs(ratios[-1] - 1) < 0.02 else "another schedule"
