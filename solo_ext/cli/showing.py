"""The commands that show or hand on what was trained: reports, pictures, features, exports."""

import math
from argparse import Namespace

from solo_ext.cli.command import SOLO_EXT, option
from solo_ext.cli.commands import SOURCE, TEACHER
from solo_ext.errors import ConfigError

IMAGES_OF = "folder, list of files (.txt, .csv) or HDF5 file (default: the validation images of the run)"
IMAGES = option("--images PATH", IMAGES_OF)
WATCH = option("--watch SECONDS", "refresh it every so many seconds, until Ctrl-C", type=float)


@SOLO_EXT.command(
    option("run PATH", SOURCE),
    option("images IMAGES", IMAGES_OF, nargs="?"),
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
    from solo_ext.zoo.store import open_source

    count, width = write_features(
        open_source(args.run), args.images, args.out, args.teacher, args.half, max(0, args.workers)
    )
    print(f"{args.out}: {count:,} images x {width:,} features")


@SOLO_EXT.command(
    option("runs RUN", f"{SOURCE}; several are drawn below each other", nargs="+"),
    IMAGES,
    option(
        "--kind KIND",
        "features, gradcam, neighbours, umap or tsne",
        choices=("features", "gradcam", "neighbours", "umap", "tsne"),
        required=True,
    ),
    option("--out FILE", "where it goes: .png or .pdf (default: pictures/KIND.png in the folder of the first RUN)"),
    option("--count N", "how many images (default: 8; for maps 2000)", type=int),
    option("--bank PATH", "with neighbours: the images that are searched for them"),
    TEACHER,
)
def pictures(args: Namespace) -> None:
    """Draw what encoders see in the same images.

    features: maps of the first block (residual momentum, Fig. 9). gradcam (Fig. 10): where the linear classifier of
    each run looks, that of its newest linear evaluation, or its online probe; pip install 'solo-ext[pictures]'.
    neighbours: for each image, the nearest of --bank. umap and tsne: the features in two dimensions, coloured by class,
    and as an .html, too, in which each point says its image.

    A report shows the PNGs in a run's folder pictures/.

      solo-ext pictures trained_models/mocov3/A trained_models/res_mocov3/B --images photos --kind gradcam --out cam.png
      solo-ext pictures trained_models/byol/RUN --images query --kind neighbours --bank /data/val --out near.pdf
    """
    from solo_ext.analysis.embedding import draw_map
    from solo_ext.analysis.figures import labels
    from solo_ext.analysis.pictures import draw_pictures
    from solo_ext.analysis.report import PICTURES
    from solo_ext.runs.run import Run
    from solo_ext.zoo.store import open_source

    if args.count is not None and args.count < 1:
        raise ConfigError(f"--count must be at least 1, not {args.count}")
    opened = [open_source(run) for run in args.runs]
    sources = list(zip(labels([Run(one.path.parent) for one in opened], apart=True), opened, strict=True))
    out = args.out or sources[0][1].path.parent / PICTURES / f"{args.kind}.png"
    if args.kind in ("umap", "tsne"):
        print(*draw_map(sources, args.images, out, args.kind, args.teacher, args.count or 2000), sep="\n")
    else:
        print(draw_pictures(sources, args.images, args.kind, out, args.teacher, args.count or 8, args.bank))


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
      solo-ext trajectories trained_models/byol/A --filters 0 3 --flat --out flat.pdf
    """
    from solo_ext.analysis.trajectories import draw_trajectories
    from solo_ext.runs.run import find_runs

    runs = [run for folder in args.runs for run in find_runs(folder)]
    print(draw_trajectories(runs, args.out, args.filters, 2 if args.flat else 3))


@SOLO_EXT.command(
    option("folders FOLDER", "folders with runs below them (default: trained_models)", nargs="*"),
    WATCH,
)
def runs(args: Namespace) -> None:
    """List the runs in a folder: state, epoch, accuracies, speed.

    The run that was written to last is at the top. One that has stopped continues when its command is given again.

      solo-ext runs
      solo-ext runs studies/residual-table2 --watch 5
    """
    from solo_ext.analysis.listing import watch

    _check_watch(args.watch)
    watch(args.folders or ["trained_models"], args.watch)


@SOLO_EXT.command(
    option("runs RUN", "run folders; several are drawn into the same plots", nargs="+"),
    option("--out FOLDER", "output folder (default: %(default)s)", default="report"),
    WATCH,
)
def report(args: Namespace) -> None:
    """Draw the curves of one or several runs into a page.

    Writes one self-contained HTML page with a table to sort and curves to hover, and the curves as PNG and PDF:
    accuracies, gap between student and teacher, losses, tau, learning rate, throughput. Runs that differ in the seed
    alone are one row and one curve, with their spread; PNGs in a run's folder pictures/ are shown, too. With --watch, a
    browser that has the page open follows runs while they train.

      solo-ext report trained_models/byol/RUN
      solo-ext report trained_models/mocov3/RUN trained_models/res_mocov3/RUN --out gap
      solo-ext report trained_models --watch 30
    """
    from solo_ext.analysis.report import main_report, watch_report

    _check_watch(args.watch)
    print(main_report(args.runs, args.out, args.watch), flush=True)
    if args.watch:
        watch_report(args.runs, args.out, args.watch)


def _check_watch(seconds: float | None) -> None:
    if seconds is not None and not 0 < seconds < math.inf:
        raise ConfigError(f"--watch is a number of seconds above 0, not {seconds:g}")


@SOLO_EXT.command(
    option("run RUN", "the folder of a pre-training, finished or under way"),
    option("--reference FILE", "the reference (default: the zoo's for the run's recipe)"),
)
def check(args: Namespace) -> None:
    """Say whether a pre-training is on track: what of it departs from its recipe's reference, first ones first.

    A reference has the curves of a recipe over several seeds: loss, accuracies, gap, spread, learning rate, tau, and
    statistics of the views. What the configuration asks for otherwise, other images, and curves that leave the band of
    the seeds are named, with what they point to. The exit status is 0 on track, 1 off it. solo-ext zoo reference makes
    references; check.enabled=True, with pretrain, tells the same after each epoch.

      solo-ext check trained_models/byol/RUN
      solo-ext check trained_models/byol/RUN --reference mine/byol.json
    """
    from solo_ext.runs.reference import judge, reference_for
    from solo_ext.runs.run import find_run
    from solo_ext.text import hanging

    run = find_run(args.run)
    verdict = judge(run, reference_for(run, args.reference))
    print(hanging(str(verdict)))
    if not verdict.on_track:
        raise SystemExit(1)


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
