"""The commands: what each takes, says about itself, and calls."""

import argparse
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from solo_ext.cli.command import Command
from solo_ext.cli.data import DATA
from solo_ext.cli.export import EXPORT
from solo_ext.cli.solo_learn import WITH_SOLO_LEARN
from solo_ext.cli.zoo import ZOO
from solo_ext.errors import ConfigError
from solo_ext.training import recipes

YAML = (".yaml", ".yml")
OVERRIDES = """\
Overrides are Hydra's: key=value and ++key=value set a key, ~key removes it; a list is [1,2], nothing is null.
A mistyped key is refused, with the nearest one that exists."""


def _yaml_arguments(parser: argparse.ArgumentParser) -> None:
    _yaml_words(parser)
    _cfg_argument(parser)


def _yaml_words(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "words", nargs="*", metavar="[RECIPE] key=value", help="<dataset>/<recipe> or FILE.yaml, and what to change"
    )
    parser.add_argument("-cp", "--config-path", metavar="FOLDER", help="folder of the YAML, from the current directory")
    parser.add_argument("-cn", "--config-name", metavar="NAME", help="its name; FILE.yaml is a shorter way to say both")


def _cfg_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cfg", action="store_true", help="print the configuration that would run, and stop")


def _run_argument(parser: argparse.ArgumentParser, required: bool) -> None:
    parser.add_argument(
        "--run",
        required=required,
        metavar="PATH",
        help="run folder or checkpoint of a pre-training, also solo-learn's; an entry of the zoo; hf://owner/name",
    )


def _yaml_and_overrides(args: argparse.Namespace, kind: str | None = None) -> tuple[Path | None, list[str]]:
    """The YAML that the command line names, if any, and the overrides; `kind`: of the recipes that have a name."""
    words = [word for word in args.words if not (getattr(args, "cfg", False) and word == "job")]  # Hydra's `--cfg job`
    folder, name = getattr(args, "config_path", None), getattr(args, "config_name", None)
    recipe = None
    if name is None and words and "=" not in words[0]:
        if words[0].endswith(YAML):
            name = words.pop(0)
        elif kind and folder is None and "/" in words[0]:
            recipe = recipes.find(words.pop(0), kind)
    for word in words:
        if "=" not in word and not word.startswith("~"):
            raise ConfigError(f"'{word}' is not an override such as key=value; a YAML comes first")
    return recipe or (Path(folder or ".") / name if name else None), words


def _composed(file: Path | None, overrides: Sequence[str]):
    from solo_ext.training.compose import compose

    if file is None:
        raise ConfigError("which YAML? name it, as in solo-ext pretrain cifar10/byol; solo-ext recipes lists them")
    return compose(file.parent, file.name, overrides)


def _start(cfg, args: argparse.Namespace, run: str, **options) -> None:
    """Prints `cfg` or runs it, with `options`."""
    if args.cfg:
        from solo_ext.training.config import to_yaml

        print(to_yaml(cfg), end="")
    else:
        # one of them alone: pretrain's first line is out before Lightning is imported, and evaluate's is not
        module = import_module(f"solo_ext.training.{'pretrain' if run == 'pretrain' else 'evaluate'}")
        getattr(module, run)(cfg, **options)


def _pretrain(args: argparse.Namespace) -> None:
    from solo_ext.training.config import resolve

    _start(resolve(_composed(*_yaml_and_overrides(args, "pretrain"))), args, "pretrain")


def _plan_arguments(parser: argparse.ArgumentParser) -> None:
    _yaml_words(parser)
    parser.add_argument("--no-measure", action="store_true", help="leave out time and memory, which take a minute")
    parser.add_argument("--json", action="store_true", help="print JSON, with the name of every tensor")


def _plan(args: argparse.Namespace) -> None:
    import json

    from solo_ext.planning.plan import describe, plan
    from solo_ext.training.config import resolve

    made = plan(resolve(_composed(*_yaml_and_overrides(args, "pretrain"))), measure=not args.no_measure)
    print(json.dumps(made, indent=1) if args.json else describe(made))


def _linear_arguments(parser: argparse.ArgumentParser) -> None:
    _run_argument(parser, required=False)
    _yaml_arguments(parser)


def _linear(args: argparse.Namespace) -> None:
    from solo_ext.training.compose import assign, overlay
    from solo_ext.training.config import resolve, run_values
    from solo_ext.zoo.model import open_source, results_folder

    file, overrides = _yaml_and_overrides(args, "linear")
    encoder = open_source(args.run) if args.run else None
    if encoder and file:
        overrides.append(assign("pretrained_feature_extractor", encoder.path))
    raw = overlay(run_values(encoder.path, "linear"), overrides) if encoder and not file else _composed(file, overrides)
    results = args.run and results_folder(args.run)
    _start(resolve(raw, "linear"), args, "linear", encoder=encoder, results=results)


def _knn_arguments(parser: argparse.ArgumentParser) -> None:
    _run_argument(parser, required=True)
    parser.add_argument("words", nargs="*", metavar="key=value", help="what to change of the run's data")
    parser.add_argument("--k", nargs="+", default=[], help="numbers of neighbours (default: 1 20)")
    parser.add_argument("--distance", nargs="+", default=[], metavar="NAME", help="cosine, euclidean (default: both)")
    parser.add_argument("--temperature", nargs="+", default=[], metavar="T", help="of the cosine votes (default: 0.07)")
    _cfg_argument(parser)


def _knn(args: argparse.Namespace) -> None:
    from solo_ext.training.compose import overlay
    from solo_ext.training.config import resolve, run_values
    from solo_ext.zoo.model import open_source, results_folder

    file, overrides = _yaml_and_overrides(args)
    if file:
        raise ConfigError(f"knn takes its data from --run, not from a YAML such as '{file}'")
    for option, key in (("k", "k"), ("distance", "distance_func"), ("temperature", "T")):
        # an option takes all the words that follow it, overrides included
        values = [word for word in getattr(args, option) if "=" not in word]
        overrides += [word for word in getattr(args, option) if "=" in word]
        if values:
            overrides.append(f"knn_eval.{key}=[{','.join(values)}]")
    encoder = open_source(args.run)
    cfg = resolve(overlay(run_values(encoder.path, "knn"), overrides), "knn")
    _start(cfg, args, "knn", encoder=encoder, results=results_folder(args.run))


def _report_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders; several are drawn into the same plots")
    parser.add_argument("--out", default="report", metavar="FOLDER", help="where it goes (default: %(default)s)")


def _report(args: argparse.Namespace) -> None:
    from solo_ext.analysis.report import main_report

    print(main_report(args.runs, args.out))


def _demo_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("words", nargs="*", metavar="key=value", help="what to change, such as seed=1 or max_epochs=5")
    parser.add_argument("--out", default="demo", metavar="FOLDER", help="where all goes (default: %(default)s)")


def _demo(args: argparse.Namespace) -> None:
    from solo_ext.cli.demo import demo

    file, overrides = _yaml_and_overrides(args)
    if file:
        raise ConfigError(f"the demo has YAMLs of its own, and no use for '{file}'")
    demo(overrides, args.out)


def _study_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "words",
        nargs="*",
        metavar="STUDY key=value",
        help="<paper>/<table> or FILE.yaml, and what to change in all runs",
    )
    parser.add_argument(
        "--out", metavar="FOLDER", help="where all goes (default: studies/<folder>-<name of the study>)"
    )
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="local processes at a time (default: 1)")
    parser.add_argument(
        "--only", action="append", default=[], metavar="CELL", help="run these cells only, such as 'byol*'; repeatable"
    )
    parser.add_argument("--launcher", metavar="NAME", help="submitit_slurm or submitit_local: submitit runs it")
    parser.add_argument("--dry-run", action="store_true", help="print the runs and their state, and stop")


def _study(args: argparse.Namespace) -> None:
    file, words = _yaml_and_overrides(args, "studies")
    settings = [word for word in words if word.lstrip("+~").startswith("hydra.")]
    if file is None:
        raise ConfigError(
            "which study? name it, as in solo-ext study projector_ema/table3; solo-ext recipes lists them"
        )
    if args.jobs < 1:
        raise ConfigError(f"--jobs must be at least 1, not {args.jobs}")
    if settings and not args.launcher:
        raise ConfigError(f"'{settings[0]}' is a launcher's; say which with --launcher submitit_slurm")
    for word in settings:
        if not word.lstrip("+").startswith("hydra.launcher."):
            raise ConfigError(f"'{word}': submitit has only parameters of its own, hydra.launcher.NAME=VALUE")
    from solo_ext.studies.run import dry_run, run_study
    from solo_ext.studies.study import load_study

    study = load_study(file, [word for word in words if word not in settings])
    out = args.out or Path("studies") / f"{file.absolute().parent.name}-{file.stem}"
    if args.dry_run:
        dry_run(study, out, args.only)
    elif run_study(study, out, args.jobs, args.launcher, settings, args.only):
        raise SystemExit(1)


def _recipes_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("words", nargs="*", metavar="[WORD...] | copy NAME DIR", help="only names with all these WORDs")


def _recipes(args: argparse.Namespace) -> None:
    if args.words[:1] != ["copy"]:
        print(recipes.listing(args.words))
    elif len(args.words) != 3:
        raise ConfigError(
            "solo-ext recipes copy takes a recipe's name and a folder, as in copy cifar10/byol my_recipes"
        )
    else:
        print(recipes.copy(args.words[1], Path(args.words[2])))


_COMMANDS = (
    Command(
        "pretrain",
        "train an encoder without labels, as a YAML says",
        f"""\
Trains an encoder without labels, by a recipe (solo-ext recipes lists them) or a YAML of one's own.
Checkpoints, metrics and configuration go to <checkpoint.dir>/<method>/<run id>/; the same command again continues an
interrupted run (auto_resume).

{OVERRIDES}""",
        (
            "pretrain cifar10/res_mocov3 data.train_path=/data seed=1",
            "pretrain --config-path scripts/pretrain/cifar10 --config-name byol.yaml max_epochs=100 --cfg",
        ),
        _yaml_arguments,
        _pretrain,
    ),
    Command(
        "plan",
        "say what a pre-training will cost and do, before it runs",
        f"""\
Prints what the YAML's pre-training consists of: parameters, the teacher's tensors and their tau, passes through
the backbone, steps, learning rate; time and memory of a step, measured on synthetic images on the device at
hand; and warnings. It needs neither the data nor the hardware that the YAML names, and writes nothing.

{OVERRIDES}""",
        (
            "plan cifar10/byol momentum.stages=[block4,projector]",
            "plan my.yaml --no-measure --json",
        ),
        _plan_arguments,
        _plan,
    ),
    Command(
        "linear",
        "train a linear classifier on a frozen encoder",
        f"""\
Offline linear evaluation: the pre-trained encoder is frozen and a linear classifier trained on its features.
--run PATH alone takes the data from that run and the rest from solo-learn's recipe; with a YAML, the YAML
says both, and --run PATH stands for pretrained_feature_extractor=PATH.

{OVERRIDES}""",
        (
            "linear --run trained_models/byol/RUN data.num_workers=8",
            "linear cifar10/byol --run trained_models/byol/RUN optimizer.lr=0.1",
        ),
        _linear_arguments,
        _linear,
    ),
    Command(
        "knn",
        "classify by the nearest neighbours among an encoder's features",
        """\
Offline kNN evaluation: test images are classified by their nearest training images, by the features of the
frozen encoder in eval mode, without augmentation.""",
        (
            "knn --run trained_models/byol/RUN",
            "knn --run model.ckpt --k 1 20 200 --distance cosine --temperature 0.07 0.2",
        ),
        _knn_arguments,
        _knn,
    ),
    Command(
        "report",
        "draw the curves of one or several runs into a page",
        """\
Writes one self-contained HTML page, and its plots as PNG: losses, accuracies, gap between student and
teacher, tau, learning rate, throughput.""",
        (
            "report trained_models/byol/RUN",
            "report trained_models/mocov3/RUN trained_models/res_mocov3/RUN --out gap",
        ),
        _report_arguments,
        _report,
    ),
    Command(
        "study",
        "run a table or figure of a paper, or a grid of your own",
        f"""\
Runs what a study still lacks: each cell and seed is a run of its own in <out>/runs, with its output in
<out>/logs. After each, <out>/study.md, study.html and study.png set ours (mean, standard deviation, number of
runs) beside the paper's, if there is one. Ctrl-C or SIGTERM lets the runs save; the same command continues them.

seeds=[0,1,2] runs each cell with each seed; dataset=NAME (or data.dataset=NAME) takes that data set's recipes,
to which the study's own overrides still apply, unless others follow on the command line. What a cell varies
cannot be overridden.

With --launcher submitit_slurm, submitit hands all runs to SLURM; hydra.launcher.* are its parameters. Runs that are
out of time are queued again.

{OVERRIDES}""",
        (
            "study projector_ema/table3 dataset=fashion_mnist_mini seeds=[0,1,2] --jobs 2",
            "study residual/table2 --launcher submitit_slurm hydra.launcher.partition=gpu",
        ),
        _study_arguments,
        _study,
    ),
    Command(
        "recipes",
        "list the recipes, or copy one to change it",
        """\
Lists the recipes that pretrain and plan take by name, and the studies. Those without a file are a framework's recipe
with a variant over it, which no paper prints. linear has a recipe of the same name for each, except ViTs and custom.

copy writes the recipe, and the YAMLs that it is made of, below DIR: a file to change, which pretrain takes by its
path. copy linear/NAME DIR does so for linear's.""",
        ("recipes cifar100 res_", "recipes copy cifar10/res_dino my_recipes"),
        _recipes_arguments,
        _recipes,
    ),
    DATA,
    ZOO,
    WITH_SOLO_LEARN,
    EXPORT,
    Command(
        "demo",
        "train and compare four methods on bundled images, in minutes, without a GPU",
        """\
Trains BYOL, projector-only BYOL, MoCo v3 and Res-MoCo on 5,000 bundled Fashion-MNIST images, evaluates each
beside the untrained encoder, prints a table and writes the report.""",
        ("demo", "demo --out /tmp/demo seed=1 max_epochs=5"),
        _demo_arguments,
        _demo,
    ),
)
COMMANDS = {command.name: command for command in _COMMANDS}
