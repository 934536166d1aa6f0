"""`solo-ext export`: a run's backbone as other libraries take it."""

import argparse

from solo_ext.cli.command import Command
from solo_ext.errors import ConfigError


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "checkpoint",
        metavar="CKPT",
        help="run folder or checkpoint, also solo-learn's; an entry of the zoo; hf://owner/name",
    )
    parser.add_argument(
        "--to", required=True, metavar="TARGET", help="torchvision, timm, detectron2, huggingface, onnx or safetensors"
    )
    parser.add_argument("--teacher", action="store_true", help="the momentum encoder in place of the student")
    parser.add_argument(
        "--dtype", metavar="TYPE", help="of the matrices: float32, float16 or bfloat16 (default: see above)"
    )
    parser.add_argument(
        "--out", metavar="FOLDER", help="the folder to make (default: exports/<name of the run>-TARGET)"
    )
    parser.add_argument("--push", metavar="OWNER/NAME", help="upload it to this repository of the Hugging Face Hub")


def _run(args: argparse.Namespace) -> None:
    if args.push and args.to != "huggingface":
        raise ConfigError(f"--push goes with --to huggingface, not --to {args.to}")
    from solo_ext.zoo.export import export

    if args.push:
        from solo_ext.zoo.export.huggingface import push
        from solo_ext.zoo.hub import check_upload

        check_upload("--push", args.push)
    report = export(args.checkpoint, args.to, args.out, args.teacher, args.dtype)
    print(report)
    if args.push:
        print(f"  {push(report.folder, args.push)}")


EXPORT = Command(
    "export",
    "write an encoder as torchvision, timm, detectron2, the Hub or ONNX take it",
    """\
Writes the backbone of a run into a folder, as TARGET loads it, and export.json, which says how. TARGET's own network
is then built and loaded from the folder, and its features of random images are compared with ours: if they differ by
more than 1e-5 of the largest (onnx: 1e-4), nothing is left behind.

  torchvision  a .pth for torchvision.models.resnet*.load_state_dict
  timm         a .safetensors for timm.create_model
  detectron2   a .pth that detectron2's detectors start from, and the YAML for it
  huggingface  a folder of the Hub, with model card, which timm.create_model("local-dir:...") loads
  onnx         a graph with weights, any number of images at once; needs pip install 'solo-ext[onnx]'
  safetensors  a run folder again, which all commands with --run take, without anything private

In float16 and bfloat16 only matrices and convolutions are rounded; how far that moves the features is printed. The
default is float16 for safetensors and float32 for the others; onnx and detectron2 have float32 only.""",
    (
        "export trained_models/res_mocov3/RUN --to torchvision --teacher --out encoder",
        "export trained_models/byol/RUN --to huggingface --push jane/byol-cifar10",
    ),
    _arguments,
    _run,
)
