"""`solo-ext with-solo-learn`: runs a script of a solo-learn checkout."""

import argparse

from solo_ext.cli.command import Command


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="PATH", help="folder of a checkout of solo-learn")
    parser.add_argument(
        "script", metavar="SCRIPT ARGS...", help="main_pretrain.py, main_linear.py, main_knn.py or main_umap.py"
    )


def _run(args: argparse.Namespace) -> None:
    from solo_ext.compat.solo_learn import run_script

    run_script(args.path, args.script, args.others)


WITH_SOLO_LEARN = Command(
    "with-solo-learn",
    "run a script of a solo-learn checkout with the methods of this package",
    """\
Runs a script of the solo-learn checkout at PATH, unchanged, with our methods and backbones beside its own, and says
which repairs it needs to run on the installed libraries. Our run folders are read by its main_linear.py, main_knn.py
and main_umap.py, and its run folders by our commands.

ARGS go to the script as they are. As if it were run by itself, a relative --config-path is taken from the checkout,
and data, checkpoints and trained_models from the current folder.""",
    (
        "with-solo-learn . main_pretrain.py --config-path scripts/pretrain/cifar --config-name byol method=res_byol",
        "with-solo-learn ~/solo-learn main_knn.py --pretrained_checkpoint_dir trained_models/res_mocov3/RUN ...",
    ),
    _arguments,
    _run,
    own=2,
)
