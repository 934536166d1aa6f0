"""The commands of `solo-ext`: what each takes, says about itself, and calls. Torch is imported when one runs."""

import json
import re
from argparse import Namespace
from importlib import import_module
from pathlib import Path
from typing import Any

from solo_ext.cli.command import SOLO_EXT, option
from solo_ext.errors import ConfigError
from solo_ext.training import recipes

SOURCE = "run folder or checkpoint, also solo-learn's; an entry of the zoo; hf://owner/name"
OVERRIDES = """\
overrides in Hydra's syntax: key=value or ++key=value sets a key, ~key removes it; a list is [1,2], nothing is null; a
mistyped key is refused, with the nearest one that exists"""
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


def _configured(command: str, file: Path | None, overrides: list[str], run: Path | None = None) -> Any:
    """What the YAML `file` says or, without one, the configuration of `run`, whose encoder a command evaluates."""
    from solo_ext.training.compose import assign, compose
    from solo_ext.training.config import resolve, run_values
    from solo_ext.training.unread import warn_of_idle, without_derived

    if file:
        own = overrides if command == "pretrain" else without_derived(overrides)
        source = [assign("pretrained_feature_extractor", run)] if run else []
        raw = compose(file.parent, file.name, [*own, *source])
    elif run:
        raw = run_values(run, command, overrides)
    else:
        raise ConfigError("which YAML? name it, as in solo-ext pretrain cifar10/byol; solo-ext recipes lists them")
    cfg = resolve(raw, command)
    warn_of_idle(cfg, overrides)
    return cfg


def _start(cfg: Any, args: Namespace, command: str, **options: Any) -> None:
    """Prints `cfg` if the command line asks for that, else runs it, with `options`."""
    if args.cfg:
        from solo_ext.training.config import to_yaml

        print(to_yaml(cfg), end="")
    else:
        # one of them alone: pretrain's first line is out before Lightning is imported, and evaluate's is not
        module = import_module(f"solo_ext.training.{'pretrain' if command == 'pretrain' else 'evaluate'}")
        getattr(module, command)(cfg, **options)


def _evaluate(args: Namespace, command: str, file: Path | None, overrides: list[str]) -> None:
    """Evaluates `args.run`, as `file` says or else as the run's own configuration does."""
    from solo_ext.training.start import runs_folder
    from solo_ext.zoo.model import open_source

    overrides += ["teacher=true"] if args.teacher else []
    encoder = open_source(args.run) if args.run else None
    cfg, results = _configured(command, file, overrides, encoder.path if encoder else None), None
    if args.out:
        results = Path(args.out).expanduser()
    elif encoder and not Path(args.run).expanduser().exists():  # results do not belong in a package or the Hub's cache
        results = runs_folder(cfg) / "zoo" / re.sub(r"[^\w.-]+", "-", args.run.removeprefix("hf://"))
    _start(cfg, args, command, encoder=encoder, results=results)


@SOLO_EXT.command(*YAML_WORDS, CFG)
def pretrain(args: Namespace) -> None:
    """Train an encoder without labels, as a YAML says.

    The YAML is a recipe (solo-ext recipes lists them) or your own. Checkpoints, metrics and configuration go to
    <checkpoint.dir>/<method>/<run id>/; the same command again continues an interrupted run (auto_resume).

      solo-ext pretrain cifar10/res_mocov3 data.train_path=/data seed=1
      solo-ext pretrain --config-path scripts/pretrain/cifar10 --config-name byol.yaml max_epochs=100 --cfg
    """
    _start(_configured("pretrain", *yaml_and_overrides(args, "pretrain")), args, "pretrain")


@SOLO_EXT.command(
    *YAML_WORDS,
    option("--no-measure", "leave out time and memory, which take a minute"),
    option("--json", "print JSON, with the name of every tensor"),
)
def plan(args: Namespace) -> None:
    """Show what a pre-training run will cost and do, before it starts.

    Prints what the YAML's pre-training consists of: parameters, the teacher's tensors and their tau, passes through
    the backbone, steps, learning rate; time and memory of a step, measured on synthetic images on this machine's
    device; and warnings. It needs neither the data nor the hardware that the YAML names, and writes nothing.

      solo-ext plan cifar10/byol momentum.stages=[block4,projector]
      solo-ext plan my.yaml --no-measure --json
    """
    from solo_ext.planning.plan import describe, plan

    cost = plan(_configured("pretrain", *yaml_and_overrides(args, "pretrain")), measure=not args.no_measure)
    print(json.dumps(cost, indent=1) if args.json else describe(cost))


@SOLO_EXT.command(option("--run PATH", SOURCE), *YAML_WORDS, TEACHER, RESULTS, CFG)
def linear(args: Namespace) -> None:
    """Train a linear classifier on a frozen encoder.

    --run PATH alone takes the data from that run, and optimizer, schedule and epochs from its method's linear recipe
    for its dataset, or else for ImageNet-100 (solo-learn's), and says which. With a YAML, the YAML gives both, and
    --run PATH stands for pretrained_feature_extractor=PATH.

    linear.json in the run folder keeps every result with its whole protocol: fine-tuned, with fewer labels, ...

      solo-ext linear --run trained_models/byol/RUN data.num_workers=8
      solo-ext linear cifar10/byol --run trained_models/byol/RUN optimizer.lr=0.1
    """
    _evaluate(args, "linear", *yaml_and_overrides(args, "linear"))


@SOLO_EXT.command(option("--run PATH", SOURCE), *YAML_WORDS, TEACHER, RESULTS, CFG)
def detect(args: Namespace) -> None:
    """Fine-tune an object detector from an encoder.

    Faster R-CNN of torchvision, with masks Mask R-CNN, that begins with a run's ResNet, an entry of the zoo, or any
    program's weights (backbone.name says which network then). Recipes: voc/c4 and coco/c4 (MoCo's transfer), voc/fpn.
    data.train_path and data.val_path name annotations, in VOC's layout or COCO's; several are joined by a colon.

    detection.json in the run folder keeps every result (AP, AP50, AP75 by pycocotools) with its whole protocol.

      solo-ext detect voc/c4 --run trained_models/res_mocov3/RUN data.train_path=VOC2007/ImageSets/Main/trainval.txt
      solo-ext detect coco/c4 untrained=true backbone.name=resnet50 devices=8
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
    file, overrides = yaml_and_overrides(args)
    if file:
        raise ConfigError(f"knn takes its data from --run, not from a YAML such as '{file}'")
    for words, key in ((args.k, "k"), (args.distance, "distance_func"), (args.temperature, "T")):
        # an option takes all the words that follow it, overrides included
        values = [word for word in words if "=" not in word]
        overrides += [word for word in words if "=" in word]
        if values:
            overrides.append(f"knn_eval.{key}=[{','.join(values)}]")
    _evaluate(args, "knn", None, overrides)


@SOLO_EXT.command(
    option("run PATH", SOURCE),
    option("images IMAGES", "folder, list of files (.txt) or HDF5 file"),
    option("--out FILE", "where they go: .npz, .parquet or .h5", required=True),
    TEACHER,
    option("--half", "in float16"),
    option("--workers N", "processes that read images (default: %(default)s)", type=int, default=4),
)
def features(args: Namespace) -> None:
    """Write an encoder's features of any images to a file.

    One row for each image: features, name (its path below IMAGES) and label (the number of its class folder, or -1).
    Images are cropped and normalised as the run's evaluations do it, and not augmented. A .parquet needs
    pip install 'solo-ext[features]', an .h5 'solo-ext[h5]'.

      solo-ext features trained_models/res_mocov3/RUN /data/photos --out photos.parquet
      solo-ext features res_mocov3-fashion_mnist_mini-r10w16 images.txt --out features.npz --teacher --half
    """
    from solo_ext.analysis.features import write_features
    from solo_ext.zoo.model import open_source

    count, width = write_features(
        open_source(args.run), args.images, args.out, args.teacher, args.half, max(0, args.workers)
    )
    print(f"{args.out}: {count:,} images x {width:,} features")


@SOLO_EXT.command(
    option("runs RUN", f"{SOURCE}; several are drawn below each other", nargs="+"),
    option("--images PATH", "folder, list of files (.txt) or HDF5 file, of which the first are drawn", required=True),
    option(
        "--kind KIND", "features, gradcam or neighbours", choices=("features", "gradcam", "neighbours"), required=True
    ),
    option("--out FILE", "where it goes: .png or .pdf", required=True),
    option("--count N", "how many images (default: %(default)s)", type=int, default=8),
    option("--bank PATH", "the images among which the neighbours are"),
    TEACHER,
)
def pictures(args: Namespace) -> None:
    """Draw what encoders see in the same images.

    features: maps of the first block (residual momentum, Fig. 9). gradcam (Fig. 10): where the linear classifier of
    each run looks, that of its newest linear evaluation, or its online probe; pip install 'solo-ext[pictures]'.
    neighbours: for each image, the nearest of --bank.

      solo-ext pictures trained_models/mocov3/A trained_models/res_mocov3/B --images photos --kind gradcam --out cam.png
      solo-ext pictures trained_models/byol/RUN --images query --kind neighbours --bank /data/val --out near.pdf
    """
    from solo_ext.analysis.pictures import draw_pictures
    from solo_ext.zoo.model import open_source

    if args.count < 1:
        raise ConfigError(f"--count must be at least 1, not {args.count}")
    sources = [(Path(run).name, open_source(run)) for run in args.runs]
    print(draw_pictures(sources, args.images, args.kind, args.out, args.teacher, args.count, args.bank))


@SOLO_EXT.command(
    option("runs RUN", "run folders; several are drawn into the same panels", nargs="+"),
    option("--out FILE", "where it goes: .png or .pdf", required=True),
    option("--filters N", "which of the recorded ones (default: 0 to 3)", nargs="+", type=int, default=[0, 1, 2, 3]),
    option("--flat", "in two dimensions, without the steps"),
)
def trajectories(args: Namespace) -> None:
    """Draw the paths of single filters over training.

    A run with filters.enabled=true records the rows of a layer's weight, the student's and the teacher's, in each step.
    Drawn are two weights of each filter over the steps, or --flat against each other (ProjectorEMA, Fig. 2, App. E).

      solo-ext trajectories trained_models/byol/A trained_models/byol/B --out filters.png
      solo-ext trajectories trained_models/byol/A --filters 0 133 --flat --out flat.pdf
    """
    from solo_ext.analysis.trajectories import draw_trajectories
    from solo_ext.runs.run import find_runs

    runs = [run for folder in args.runs for run in find_runs(folder)]
    print(draw_trajectories(runs, args.out, args.filters, 2 if args.flat else 3))


@SOLO_EXT.command(
    option("runs RUN", "run folders; several are drawn into the same plots", nargs="+"),
    option("--out FOLDER", "output folder (default: %(default)s)", default="report"),
)
def report(args: Namespace) -> None:
    """Draw the curves of one or several runs into a page.

    Writes one self-contained HTML page, and its plots as PNG: losses, accuracies, gap between student and teacher,
    tau, learning rate, throughput.

      solo-ext report trained_models/byol/RUN
      solo-ext report trained_models/mocov3/RUN trained_models/res_mocov3/RUN --out gap
    """
    from solo_ext.analysis.report import main_report

    print(main_report(args.runs, args.out))


@SOLO_EXT.command(
    option("words STUDY key=value", f"<paper>/<table> or FILE.yaml, and, for all runs, {OVERRIDES}", nargs="*"),
    option("--out FOLDER", "output folder (default: studies/<folder>-<name of the study>)"),
    option("--jobs N", "local processes at a time (default: %(default)s)", type=int, default=1),
    option("--only CELL", "run only these cells, such as 'byol*'; repeatable", action="append", default=[]),
    option("--launcher NAME", "run through submitit: submitit_slurm or submitit_local"),
    option("--dry-run", "print the runs and their state, and stop"),
)
def study(args: Namespace) -> None:
    """Run a table or figure of a paper, or a grid of your own.

    Runs what is still missing: each cell and seed is a run of its own in <out>/runs, with its output in <out>/logs.
    After each, <out>/study.md, study.html and study.png show our results (mean, standard deviation, number of runs)
    beside the paper's, if it has any. Ctrl-C or SIGTERM lets the runs save; the same command continues them.

    seeds=[0,1,2] runs each cell with each seed; dataset=NAME (or data.dataset=NAME) takes that dataset's recipes, with
    the study's own overrides. Overrides on the command line go over both, but not over what a cell varies.

    With --launcher submitit_slurm, submitit hands all runs to SLURM; hydra.launcher.* are its parameters. Runs that
    run out of time are queued again.

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
    elif run_study(study, out, args.jobs, args.launcher, settings, args.only):
        raise SystemExit(1)


@SOLO_EXT.command(option("words [WORD...] | copy NAME DIR", "only names with all these WORDs", nargs="*"))
def _recipes(args: Namespace) -> None:
    """List the recipes, or copy one to edit it.

    pretrain and plan take recipes by name, study takes studies. A recipe without a file is a framework's recipe with a
    variant over it, which no paper prints. linear has a recipe of the same name for each, except ViTs and custom.

    copy writes the recipe, and the YAMLs that it is composed of, below DIR; pretrain takes the copy by its path. copy
    linear/NAME DIR copies a recipe of linear.

      solo-ext recipes cifar100 res_
      solo-ext recipes copy cifar10/res_dino my_recipes
    """
    if args.words[:1] != ["copy"]:
        print(recipes.listing(args.words))
    elif len(args.words) == 3:
        print(recipes.copy(args.words[1], Path(args.words[2])))
    else:
        raise ConfigError("solo-ext recipes copy takes a recipe's name and a folder, as in copy cifar10/byol mine")


@SOLO_EXT.command(
    option("path PATH", "folder of a checkout of solo-learn"),
    option("script SCRIPT ARGS...", "main_pretrain.py, main_linear.py, main_knn.py or main_umap.py"),
    own=2,
)
def with_solo_learn(args: Namespace) -> None:
    """Run a script of a solo-learn checkout with the methods of this package.

    Runs the script unchanged, with our methods and backbones beside its own, and says which repairs it needs to run on
    the installed libraries. Its evaluation scripts read our run folders, and our commands read its run folders.

    ARGS are passed on unchanged. As without us, a relative --config-path is looked up in the checkout, and data,
    checkpoints and trained_models in the current folder.

      solo-ext with-solo-learn . main_pretrain.py --config-path scripts/pretrain/cifar -cn byol method=res_byol
      solo-ext with-solo-learn ~/solo-learn main_knn.py --pretrained_checkpoint_dir trained_models/res_mocov3/RUN ...
    """
    from solo_ext.compat.solo_learn import run_script

    run_script(args.path, args.script, args.others)


@SOLO_EXT.command(
    option("checkpoint CKPT", SOURCE),
    option("--to TARGET", "torchvision, timm, detectron2, huggingface, onnx or safetensors", required=True),
    TEACHER,
    option("--dtype TYPE", "of the matrices: float32, float16 or bfloat16 (default: see above)"),
    option("--out FOLDER", "the folder to make (default: exports/<name of the run>-TARGET)"),
    option("--push OWNER/NAME", "upload it to this repository of the Hugging Face Hub"),
)
def export(args: Namespace) -> None:
    """Write an encoder in the format of torchvision, timm, detectron2, the Hugging Face Hub or ONNX.

    export.json in the output folder says how to load it. TARGET's own network is loaded from the folder, and its
    features of random images are compared with ours: if they differ by more than 1e-5 of the largest (onnx: 1e-4),
    nothing is left behind.

      torchvision  a .pth for torchvision.models.resnet*.load_state_dict
      timm         a .safetensors for timm.create_model
      detectron2   a .pth that detectron2's detectors start from, and the YAML for it
      huggingface  a folder of the Hub, with model card, which timm.create_model("local-dir:...") loads
      onnx         a graph with weights, for any batch size; needs pip install 'solo-ext[onnx]'
      safetensors  a run folder again, which all commands with --run take, without anything private

    In float16 and bfloat16 only matrices and convolutions are rounded; how far that moves the features is printed.
    The default is float16 for safetensors and float32 for the others; onnx and detectron2 have float32 only.

      solo-ext export trained_models/res_mocov3/RUN --to torchvision --teacher --out encoder
      solo-ext export trained_models/byol/RUN --to huggingface --push jane/byol-cifar10
    """
    if args.push and args.to != "huggingface":
        raise ConfigError(f"--push goes with --to huggingface, not --to {args.to}")
    from solo_ext.zoo.export import export

    if args.push:
        from solo_ext.zoo.export.huggingface import push
        from solo_ext.zoo.store import check_upload

        check_upload("--push", args.push)
    report = export(args.checkpoint, args.to, args.out, args.teacher, args.dtype)
    print(report)
    if args.push:
        print(f"  {push(report.folder, args.push)}")
