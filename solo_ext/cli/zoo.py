"""`solo-ext zoo`: what it takes, says about itself, and calls."""

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from solo_ext.cli.command import Command, Group
from solo_ext.errors import CheckpointError, ConfigError
from solo_ext.text import nearest

if TYPE_CHECKING:
    from solo_ext.zoo.index import Entry


def _list_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("words", nargs="*", metavar="WORD", help="only entries whose name has all of these in it")
    parser.add_argument("--weights", action="store_true", help="leave out the recipes without weights")
    parser.add_argument("--json", action="store_true", help="print JSON, with everything that is known")
    parser.add_argument("--markdown", action="store_true", help="print the tables of the README files")


def _list(args: argparse.Namespace) -> None:
    import dataclasses
    import json

    from solo_ext.zoo.index import markdown
    from solo_ext.zoo.store import entries

    known = entries()
    found = [e for e in known.values() if all(w in e.name for w in args.words) and (e.files or not args.weights)]
    if not found:
        close = nearest(args.words[0], known) if len(args.words) == 1 else ""
        raise CheckpointError(f"the zoo has no entry with '{' '.join(args.words)}' in its name{close}")
    if args.json:
        print(json.dumps([dataclasses.asdict(entry) for entry in found], indent=1))
    elif args.markdown:
        print("\n".join(markdown(found, weights) for weights in ([True] if args.weights else [True, False])), end="")
    else:
        rows = [("name", "epochs", "linear top-1", "kNN-20", "MB")]
        rows += [(e.name, str(e.epochs), _score(e, "linear top-1"), _score(e, "kNN-20"), _size(e)) for e in found]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for name, *cells in rows:
            print("  ".join([name.ljust(widths[0]), *map(str.rjust, cells, widths[1:])]))


def _score(entry: "Entry", metric: str) -> str:
    from solo_ext.zoo.index import percent

    value = entry.score(metric)
    return percent(value) if value is None or entry.files else f"paper {percent(value)}"


def _size(entry: "Entry") -> str:
    return f"{entry.size / 1e6:.1f}" if entry.files else "recipe"


def _show_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="an entry, as solo-ext zoo list has it")


def _show(args: argparse.Namespace) -> None:
    import dataclasses

    import yaml

    from solo_ext.zoo.store import find, verify

    entry = find(args.name)
    print(yaml.safe_dump(dataclasses.asdict(entry), sort_keys=False, width=120), end="")
    if entry.files:
        states = {state for _, state in verify(entry)}
        print(f"# on this machine: {'yes' if states == {'ok'} else 'damaged' if 'damaged' in states else 'no'}")


def _names_arguments(parser: argparse.ArgumentParser, every: str) -> None:
    parser.add_argument("names", nargs="*", metavar="NAME", help="entries, as solo-ext zoo list has them")
    parser.add_argument("--all", action="store_true", help=every)


def _download_arguments(parser: argparse.ArgumentParser) -> None:
    _names_arguments(parser, "all entries with weights")
    parser.add_argument("--dataset", metavar="NAME", help="all entries with weights that were trained on it")


def _download(args: argparse.Namespace) -> None:
    from solo_ext.zoo.store import entries, fetch

    for entry in _chosen(args, "download", entries()):
        print(fetch(entry)[0].parent)


def _chosen(args: argparse.Namespace, command: str, known: Mapping[str, "Entry"]) -> list["Entry"]:
    """The entries of `known` that the command line asks for."""
    from solo_ext.zoo.store import find

    dataset = getattr(args, "dataset", None)
    every = "--all" if args.all else "--dataset" if dataset else ""
    if not args.names and not every:
        raise ConfigError(f"which entry? name one of solo-ext zoo list, as in solo-ext zoo {command} NAME")
    if args.names:
        if every:
            raise ConfigError(f"'{args.names[0]}' and {every} are two ways to say it")
        return [find(name, known) for name in args.names]
    of = f" of {dataset}" if dataset else ""
    rows = [entry for entry in known.values() if dataset in (None, entry.dataset)]
    if not rows:
        raise CheckpointError(f"the zoo has nothing{of}{nearest(dataset, {e.dataset for e in known.values()})}")
    if not any(entry.files for entry in rows):
        raise CheckpointError(
            f"the zoo has no weights{of}, only {len(rows)} recipes, such as solo-ext pretrain "
            f"{rows[0].recipe and rows[0].recipe.path}: neither paper published any"
        )
    return [entry for entry in rows if entry.files]


def _verify(args: argparse.Namespace) -> None:
    from solo_ext.zoo.store import entries, verify

    bad, seen = [], 0
    for entry in _chosen(args, "verify", entries()):
        states = verify(entry)
        if not states:
            raise CheckpointError(f"'{entry.name}' is a recipe without weights: there is nothing to verify")
        if args.all and all(state == "missing" for _, state in states):
            continue  # never downloaded
        for path, state in states:
            print(f"{state:<8} {path}")
        seen += len(states)
        bad += [(entry, path, state) for path, state in states if state != "ok"]
    if bad:
        entry, path, state = bad[0]
        mend = f"; solo-ext zoo download {entry.name} fetches them" if entry.repository else ""
        raise CheckpointError(f"{len(bad)} of {seen} files are not as the index says (first: {path} is {state}){mend}")
    if not seen:
        print("nothing of the zoo is on this machine", file=sys.stderr)


def _zoo_argument(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument("--zoo", type=Path, metavar="FOLDER", help=f"{what} (default: the one of this checkout)")


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="run folder or checkpoint of a pre-training, or an export of one")
    parser.add_argument("--name", metavar="NAME", help="of the entry (default: <method>-<dataset>-<backbone>)")
    _zoo_argument(parser, "the zoo that gets it")
    parser.add_argument("--licence", metavar="NAME", default="MIT", help="of the weights (default: %(default)s)")


def _add(args: argparse.Namespace) -> None:
    from solo_ext.zoo.edit import add
    from solo_ext.zoo.store import installed

    zoo = args.zoo or installed()
    entry = add(args.run, zoo, args.name, args.licence)
    print(f"{zoo / entry.folder}: {len(entry.files)} files, {entry.size / 1e6:.1f} MB")


def _publish_arguments(parser: argparse.ArgumentParser) -> None:
    _names_arguments(parser, "all entries with weights")
    parser.add_argument("--repo", required=True, metavar="OWNER/NAME", help="the repository on the Hugging Face Hub")
    _zoo_argument(parser, "the zoo that has them")


def _publish(args: argparse.Namespace) -> None:
    from solo_ext.zoo.edit import publish
    from solo_ext.zoo.index import read_index
    from solo_ext.zoo.store import installed

    zoo = args.zoo or installed()
    print(publish(zoo, args.repo, [entry.name for entry in _chosen(args, "publish", read_index(zoo))]))


_COMMANDS = (
    Command(
        "list",
        "say what there is",
        """\
Lists the entries: those with weights, and the papers' recipes, for which neither paper published any. Figures
are top-1 in percent; solo-ext zoo show NAME says by which protocol.""",
        ("zoo list", "zoo list res_ cifar100", "zoo list --weights --json"),
        _list_arguments,
        _list,
    ),
    Command(
        "show",
        "say all about one entry",
        "Prints an entry: recipe, figures with their protocol, licence, and its files with size and SHA-256.",
        ("zoo show res_mocov3-fashion_mnist_mini-r10w16",),
        _show_arguments,
        _show,
    ),
    Command(
        "download",
        "make sure that weights are on this machine",
        """\
Prints the folders of entries, which are run folders. What the zoo of the checkout or the package holds is used
where it is; the rest is fetched from the Hugging Face Hub into its cache (HF_HOME, HF_ENDPOINT, HF_TOKEN and
HF_HUB_OFFLINE are obeyed). Size and SHA-256 of all files are checked. $SOLO_EXT_ZOO, the folder of a zoo of one's
own, goes before both.""",
        (
            "zoo download res_mocov3-fashion_mnist_mini-r10w16",
            "zoo download --dataset fashion_mnist",
        ),
        _download_arguments,
        _download,
    ),
    Command(
        "verify",
        "hash what is on this machine",
        "Compares size and SHA-256 of an entry's files with the index, and ends with status 2 if one differs.",
        ("zoo verify res_mocov3-fashion_mnist_mini-r10w16", "zoo verify --all"),
        lambda parser: _names_arguments(parser, "all that are on this machine"),
        _verify,
    ),
    Command(
        "add",
        "put a run of one's own into a zoo",
        """\
Copies the student's backbone (float16), configuration, log and results of a run into the folder of a zoo,
without paths and names of this machine, and enters them into its index. The run has to have been evaluated by
solo-ext knn or linear. With --zoo FOLDER it is a zoo of one's own: others set SOLO_EXT_ZOO to it.""",
        ("zoo add trained_models/byol/RUN", "zoo add trained_models/byol/RUN --zoo /data/zoo --name byol-ours-r50"),
        _add_arguments,
        _add,
    ),
    Command(
        "publish",
        "upload entries to the Hugging Face Hub",
        """\
Uploads entries, a folder each, in one commit, and enters the repository and the commit into the index of the zoo:
whoever has that index can then download them. It needs a token (hf auth login, or HF_TOKEN).""",
        ("zoo publish --repo jane/solo-ext-zoo --all", "zoo publish byol-ours-r50 --repo jane/zoo --zoo /data/zoo"),
        _publish_arguments,
        _publish,
    ),
)
ZOO = Group(
    "zoo",
    "weights: list, download, verify, add, publish",
    "Trained encoders, and what they were trained with.",
    ("zoo list", "zoo download res_mocov3-fashion_mnist_mini-r10w16"),
    {command.name: command for command in _COMMANDS},
)
