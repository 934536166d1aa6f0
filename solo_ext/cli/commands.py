"""The commands of `solo-ext`: what each takes, says about itself, and calls. Torch is imported when one runs."""

import json
import os
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from solo_ext.api import configured, evaluation, start
from solo_ext.cli.command import SOLO_EXT, option
from solo_ext.errors import ConfigError, reason
from solo_ext.text import hanging
from solo_ext.training import recipes

SOURCE = "run folder or checkpoint, also solo-learn's; an entry of the zoo; hf://owner/name"
OVERRIDES = """\
overrides in Hydra's syntax: key=value or ++key=value sets a key, ~key removes it; a list is 'key=[1,2]', a mapping
'key={a:1}', nothing is null; a mistyped key is refused, with the nearest one that exists"""
CFG = option("--cfg", "print the configuration that would run, and stop")
TEACHER = option("--teacher", "the momentum encoder in place of the student")
RESULTS = option("--out FOLDER", "folder that gets the results, where not the run's own")
YAML_WORDS = (
    option("words [RECIPE] key=value", f"<dataset>/<recipe> or FILE.yaml, and {OVERRIDES}", nargs="*"),
    option("-cp --config-path FOLDER", "folder of the YAML, relative to the current directory"),
    option("-cn --config-name NAME", "name of the YAML; FILE.yaml is a shorter way to give both"),
)


def yaml_and_overrides(args: Namespace, kind: str | None = None) -> tuple[Path | None, list[str]]:
    """The YAML that the command line names, if any, and the overrides; `kind`: of the recipes that have names."""
    options = vars(args)
    words = [word for word in args.words if not (options.get("cfg") and word == "job")]  # Hydra's `--cfg job`
    folder, name = options.get("config_path"), options.get("config_name")
    file = Path(folder or ".") / name if name else None
    if not name and words and "=" not in words[0]:
        if words[0].endswith((".yaml", ".yml")):
            file = Path(folder or ".") / words.pop(0)
        elif kind and not folder and "/" in words[0]:
            file = recipes.find(words.pop(0), kind)
    for word in words:
        if "=" not in word and not word.startswith("~"):
            raise ConfigError(f"'{word}' is not an override such as key=value; a YAML comes first")
    return file, words


def _only_overrides(args: Namespace, command: str) -> list[str]:
    """Those of a command that takes no YAML."""
    file, overrides = yaml_and_overrides(args)
    if file:
        raise ConfigError(f"{command} takes its data from --run, not from a YAML such as '{file}'")
    return overrides


def _start(cfg: Any, args: Namespace, command: str, **options: Any) -> Any:
    """Prints `cfg` if the command line asks for that, else runs it, with `options`, and returns what came out."""
    if args.cfg:
        from solo_ext.training.compose import to_yaml

        return print(to_yaml(cfg), end="")
    return start(command, cfg, **options)


def _evaluate(
    args: Namespace, command: str, file: Path | None, overrides: list[str], preset: Sequence[str] = ()
) -> None:
    """Evaluates `args.run`, as `file` says or else as the run's own configuration does; `preset`: overrides besides."""
    overrides = [*preset, *overrides, *(["teacher=true"] if args.teacher else [])]
    cfg, options = evaluation(command, args.run, file, overrides, args.out)
    _start(cfg, args, command, **options)


@SOLO_EXT.command(*YAML_WORDS, CFG)
def pretrain(args: Namespace) -> None:
    """Train an encoder without labels, by a recipe.

    A recipe is a YAML: one of those that solo-ext recipes lists, or your own. Checkpoints, metrics and configuration go
    to <checkpoint.dir>/<method>/<run id>/, by default below trained_models; the same command again continues an
    interrupted run (auto_resume).

      solo-ext pretrain cifar10/res_mocov3 data.train_path=/data seed=1
      solo-ext pretrain --config-path scripts/pretrain/cifar10 --config-name byol.yaml max_epochs=100 --cfg
    """
    result = _start(configured("pretrain", *yaml_and_overrides(args, "pretrain")), args, "pretrain")
    from solo_ext.training.start import is_first

    if result and is_first():
        print(
            *(f"next: solo-ext {command} {result.dir}" for command in ("knn --run", "linear --run", "report")), sep="\n"
        )


@SOLO_EXT.command(
    option("--detect", "plan a detector: its recipe and overrides are those of solo-ext detect"),
    option("--run PATH", f"with --detect, the encoder: {SOURCE}"),
    *YAML_WORDS,
    option("--no-measure", "leave out time and memory, which take a minute"),
    option("--json", "print JSON, with the name of every tensor"),
)
def plan(args: Namespace) -> None:
    """Show what a pre-training, or a detector, will cost and do, before it starts.

    Prints what the YAML's pre-training consists of: parameters, the teacher's tensors and their tau, passes through
    the backbone, steps, learning rate; time and memory of a step, measured on synthetic images on this machine's
    device; and warnings. It needs neither the data nor the hardware that the YAML names, and writes nothing. With
    --detect, the same of a detector, on synthetic images with boxes; on a CPU, one of usual size takes minutes.

      solo-ext plan cifar10/byol momentum.stages=[block4,projector]
      solo-ext plan --detect voc/c4 --run trained_models/res_mocov3/RUN devices=8 optimizer.batch_size=2
    """
    from solo_ext.planning.plan import describe, plan
    from solo_ext.zoo.store import open_source

    if args.run and not args.detect:
        raise ConfigError("--run names the encoder of a detector, so it goes with --detect")
    kind, encoder = "detect" if args.detect else "pretrain", open_source(args.run).path if args.run else None
    cost = plan(configured(kind, *yaml_and_overrides(args, kind), encoder), measure=not args.no_measure)
    print(json.dumps(cost, indent=1) if args.json else hanging(describe(cost)))


@SOLO_EXT.command(option("--run PATH", SOURCE), *YAML_WORDS, TEACHER, RESULTS, CFG)
def linear(args: Namespace) -> None:
    """Train a linear classifier on a frozen encoder.

    --run PATH alone takes the data from that run, and optimizer, schedule and epochs from its method's linear recipe
    for its dataset, or else for ImageNet-100 (solo-learn's), and says which. With a YAML, the YAML gives both, and
    --run PATH stands for pretrained_feature_extractor=PATH.

    linear.json in the run folder keeps every result with its whole protocol: fine-tuned, with fewer labels, ...
    lr_grid=[0.1,0.3,1] and weight_decay_grid=[0,1e-4] train a classifier for each pair in one pass, each with a result
    of its own; data.val_fraction=0.1 tests them on a part of the training images.
    data.dataset and data.train_path of another set transfer the encoder to it.

      solo-ext linear --run trained_models/byol/RUN lr_grid=[0.1,0.3,1] data.dataset=cifar100 data.train_path=/data
      solo-ext linear cifar10/byol --run trained_models/byol/RUN optimizer.lr=0.1
    """
    _evaluate(args, "linear", *yaml_and_overrides(args, "linear"))


@SOLO_EXT.command(option("--run PATH", SOURCE), *YAML_WORDS, TEACHER, RESULTS, CFG)
def finetune(args: Namespace) -> None:
    """Train an encoder further, with a classifier on it, on labels.

    linear with finetune=true. --run PATH alone takes SimCLR's settings for few labels: SGD with Nesterov momentum, lr
    0.05 per 256 images, no weight decay, 30 epochs. data.fraction=0.1 takes a tenth of the training images, always the
    same; data.subset=simclr_1percent or simclr_10percent takes SimCLR's parts of ImageNet, data.subset=FILE those that
    a file names. linear.json keeps the results.

      solo-ext finetune --run trained_models/byol/RUN data.fraction=0.1
      solo-ext finetune --run trained_models/byol/RUN data.subset=simclr_1percent max_epochs=60
      solo-ext finetune --run trained_models/byol/RUN data.dataset=cifar100 optimizer.lr=0.02
    """
    _evaluate(args, "linear", *yaml_and_overrides(args, "linear"), preset=["finetune=true"])


@SOLO_EXT.command(option("--run PATH", SOURCE), *YAML_WORDS, TEACHER, RESULTS, CFG)
def detect(args: Namespace) -> None:
    """Fine-tune an object detector from an encoder.

    torchvision's Faster R-CNN, or Mask R-CNN for masks, which begins with a run's ResNet, an entry of the zoo or any
    program's weights (backbone.name then says which network). Recipes: voc/c4 and coco/c4 (MoCo's transfer), voc/fpn.
    data.train_path and data.val_path name annotations, in VOC's layout or COCO's; several are joined by a colon.

    detection.json in the run folder keeps every result (AP, AP50, AP75 by pycocotools) with its whole protocol.

      solo-ext detect voc/c4 --run trained_models/res_mocov3/RUN data.train_path=VOC2007/ImageSets/Main/trainval.txt
      solo-ext detect coco/c4 untrained=true devices=8 optimizer.batch_size=2
    """
    _evaluate(args, "detect", *yaml_and_overrides(args, "detect"))


@SOLO_EXT.command(
    option("--run PATH", SOURCE, required=True),
    option("words key=value", OVERRIDES, nargs="*"),
    option("--k K", "numbers of neighbours (default: 1 20)", nargs="+", default=[]),
    option("--distance NAME", "cosine, euclidean (default: both)", nargs="+", default=[]),
    option("--temperature T", "of the cosine votes (default: 0.07)", nargs="+", default=[]),
    TEACHER,
    RESULTS,
    CFG,
)
def knn(args: Namespace) -> None:
    """Classify by the nearest neighbours among an encoder's features.

    Offline kNN evaluation: test images are classified by their nearest training images, by the features of the
    frozen encoder in eval mode, without augmentation. knn.json in the run folder keeps every result with its protocol.

      solo-ext knn --run trained_models/byol/RUN
      solo-ext knn --run model.ckpt --k 1 20 200 --distance cosine --temperature 0.07 0.2
    """
    overrides = _only_overrides(args, "knn")
    for words, key in ((args.k, "k"), (args.distance, "distance_func"), (args.temperature, "T")):
        # an option takes all the words that follow it, overrides included
        values = [word for word in words if "=" not in word]
        overrides += [word for word in words if "=" in word]
        if values:
            overrides.append(f"knn_eval.{key}=[{','.join(values)}]")
    _evaluate(args, "knn", None, overrides)


@SOLO_EXT.command(
    option("--run PATH", SOURCE, required=True),
    option("words key=value", OVERRIDES, nargs="*"),
    TEACHER,
    RESULTS,
    CFG,
)
def quality(args: Namespace) -> None:
    """Measure an encoder's features without labels.

    rankme (directions that the features fill), lidar (those that tell images apart), alignment of views, uniformity and
    spread: of 1,000 training images of the run (images=N) in 10 views each (views=N) of its first augmentation.
    quality.json in the run folder keeps every result with its protocol.

      solo-ext quality --run trained_models/byol/RUN
      solo-ext quality --run trained_models/byol/RUN images=5000 views=4 --teacher
    """
    _evaluate(args, "quality", None, _only_overrides(args, "quality"))


@SOLO_EXT.command(
    option("words STUDY key=value", f"<paper>/<table> or FILE.yaml, and, for all runs, {OVERRIDES}", nargs="*"),
    option("--out FOLDER", "output folder (default: studies/<folder>-<name of the study>)"),
    option("--jobs N", "local processes at a time (default: %(default)s)", type=int, default=1),
    option("--only CELL", "run only these cells, such as 'byol*'; repeatable", action="append", default=[]),
    option("--launcher NAME", "run through submitit: submitit_slurm or submitit_local"),
    option("--array", "run the share of this task of a SLURM job array", action="store_true"),
    option("--dry-run", "print the runs and their state, and stop"),
)
def study(args: Namespace) -> None:
    """Run a table or figure of a paper, or a grid of your own.

    Runs what is still missing: each cell and seed is a run of its own in <out>/runs, with its output in <out>/logs.
    After each, <out>/study.md, .html, .png and .pdf show our results (mean, standard deviation, number of runs) beside
    the paper's, if it has any. Ctrl-C or SIGTERM lets the runs save; the same command continues them.

    seeds=[0,1,2] runs each cell with each seed; dataset=NAME (or data.dataset=NAME) takes that dataset's recipes, with
    the study's own overrides. Overrides on the command line go over both, but not over what a cell varies.

    With --launcher submitit_slurm, submitit hands all runs to SLURM; hydra.launcher.* are its parameters. Runs that
    run out of time are queued again. With --array, each task of a job array runs its share; the tables show all.

      solo-ext study projector_ema/table3 dataset=fashion_mnist_mini seeds=[0,1,2] --jobs 2
      solo-ext study residual/table2 --launcher submitit_slurm hydra.launcher.partition=gpu
    """
    file, words = yaml_and_overrides(args, "studies")
    settings = [word for word in words if word.lstrip("+~").startswith("hydra.")]
    if file is None:
        raise ConfigError("which study? name it, as in solo-ext study residual/table2; solo-ext recipes lists them")
    if args.jobs < 1:
        raise ConfigError(f"--jobs must be at least 1, not {args.jobs}")
    for word in settings:
        if not (args.launcher and word.lstrip("+").startswith("hydra.launcher.")):
            raise ConfigError(f"'{word}': a --launcher has parameters of its own, hydra.launcher.NAME=VALUE")
    from solo_ext.studies.run import dry_run, run_study
    from solo_ext.studies.study import load_study

    study = load_study(file, [word for word in words if word not in settings])
    out = Path(args.out or f"studies/{file.absolute().parent.name}-{file.stem}")
    if args.dry_run:
        dry_run(study, out, args.only)
    elif run_study(study, out, args.jobs, args.launcher, settings, args.only, _array() if args.array else (0, 1)):
        raise SystemExit(1)


@SOLO_EXT.command(
    option(
        "words [RECORD] key=value", f"a study in speedrun/ (default: cpu), and, for all runs, {OVERRIDES}", nargs="*"
    ),
    option("--out FOLDER", "output folder (default: studies/speedrun-RECORD)"),
    option("--only CELL", "run only these cells, such as 'record'; repeatable", action="append", default=[]),
)
def speedrun(args: Namespace) -> None:
    """Time from random weights to an accuracy.

    A study whose runs have the machine to themselves, one after the other, with all its cores: the time of each is that
    of its process, from its start over the loading of images and the training to its last evaluation. The page in
    <out> says how many runs reach the target, in what time, on which machine, with which versions.

    The first cell is the record; each of the others lacks one of its means.

      solo-ext speedrun cpu --only record
      solo-ext speedrun cpu seeds=[0,1,2,3,4]
    """
    named = bool(args.words) and "=" not in args.words[0]
    only = [word for cell in args.only for word in ("--only", cell)]
    out = ["--out", args.out] if args.out else []
    study([f"speedrun/{args.words[0] if named else 'cpu'}", *args.words[named:], *out, *only])


def _array() -> tuple[int, int]:
    """Which task of a SLURM job array this is, from 0, and of how many."""
    try:
        number, first, step, count = (int(os.environ[f"SLURM_ARRAY_TASK_{x}"]) for x in ("ID", "MIN", "STEP", "COUNT"))
    except (KeyError, ValueError):
        way = "sbatch --array=0-7 scripts/slurm/study.sbatch starts one"
        raise ConfigError(f"--array: this is no task of a SLURM job array; {way}") from None
    return (number - first) // step, count


@SOLO_EXT.command(option("words [WORD...] | copy NAME DIR", "only names with all these WORDs", nargs="*"))
def _recipes(args: Namespace) -> None:
    """List the recipes, or copy one to edit it.

    pretrain and plan take recipes by name, study takes studies. A derived recipe is a framework's with a variant's
    settings over it, which no paper prints. linear has a recipe of the same name for each, except ViTs and custom.

    copy writes the recipe, and the YAMLs that it is composed of, below DIR; pretrain takes the copy by its path. copy
    linear/NAME DIR copies a recipe of linear.

      solo-ext recipes cifar100 res_
      solo-ext recipes copy cifar10/res_dino my_recipes
    """
    if args.words[:1] != ["copy"]:
        print(hanging(recipes.listing(args.words)))
    elif len(args.words) == 3:
        print(recipes.copy(args.words[1], Path(args.words[2])))
    else:
        raise ConfigError("solo-ext recipes copy takes a recipe's name and a folder, as in copy cifar10/byol mine")


@SOLO_EXT.command()
def doctor(args: Namespace) -> None:
    """Say what works on this machine, and how to get what does not.

    Tries out each precision and data format, and looks for the device, shared memory and the packages of each extra. A
    line with a dash says what is missing, and the command that brings it.

      solo-ext doctor
      solo-ext doctor | grep '^-'
    """
    try:
        from solo_ext.planning.doctor import describe
    except (ImportError, OSError, RuntimeError) as error:  # such as a torchvision that was built for another torch
        advice = "reinstall it; torch and torchvision together, in one command"
        raise ConfigError(f"a package cannot be imported here ({reason(error)}): {advice}") from error
    for line in describe():
        print(hanging(line), flush=True)


@SOLO_EXT.command(
    option("path PATH", "folder of a checkout of solo-learn"),
    option("script SCRIPT ARGS...", "main_pretrain.py, main_linear.py, main_knn.py or main_umap.py"),
    own=2,
)
def with_solo_learn(args: Namespace) -> None:
    """Run a script of a solo-learn checkout with the methods of this package.

    Runs the script unchanged, with our methods and backbones beside its own, and says which repairs it needs to run on
    the installed libraries and on this machine. Its evaluation scripts read our run folders, and our commands its.

    ARGS are passed on unchanged. As in solo-learn itself, a relative --config-path is looked up in the checkout, and
    data, checkpoints and trained_models in the current folder.

      solo-ext with-solo-learn . main_pretrain.py --config-path scripts/pretrain/cifar -cn byol method=res_byol
      solo-ext with-solo-learn ~/solo-learn main_knn.py --pretrained_checkpoint_dir trained_models/byol/RUN ...
    """
    from solo_ext.compat.solo_learn import run_script

    run_script(args.path, args.script, args.others)
