"""`solo-ext zoo`: what it takes, says about itself, and calls."""

import argparse
import sys
from pathlib import Path

from solo_ext.cli.command import Command, Group
from solo_ext.errors import CheckpointError, ConfigError
from solo_ext.text import nearest


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


def _score(entry, metric: str) -> str:
    value = entry.figure(metric)
    return "-" if value is None else f"{value:.2f}" if entry.files else f"paper {value:.2f}"


def _size(entry) -> str:
    return f"{entry.size / 1e6:.1f}" if entry.files else "recipe"


def _names_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="an entry, as solo-ext zoo list has it")


def _show(args: argparse.Namespace) -> None:
    import dataclasses

    import yaml

    from solo_ext.zoo.store import find, verify

    entry = find(args.name)
    print(yaml.safe_dump(dataclasses.asdict(entry), sort_keys=False, width=120), end="")
    if entry.files:
        states = {state.state for state in verify(entry)}
        print(f"# in the cache: {'yes' if states == {'ok'} else 'damaged' if 'damaged' in states else 'no'}")


def _download_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("names", nargs="*", metavar="NAME", help="entries, as solo-ext zoo list has them")
    parser.add_argument("--dataset", metavar="NAME", help="all entries with weights that were trained on it")
    parser.add_argument("--all", action="store_true", help="all entries with weights")


def _download(args: argparse.Namespace) -> None:
    from solo_ext.zoo.store import fetch

    for name in _chosen(args, "download"):
        print(fetch(name))


def _chosen(args: argparse.Namespace, command: str) -> list[str]:
    """The names that the command line asks for."""
    from solo_ext.zoo.store import entries

    dataset = getattr(args, "dataset", None)
    if args.names or not (args.all or dataset):
        if not args.names:
            raise ConfigError(f"which entry? name one of solo-ext zoo list, as in solo-ext zoo {command} NAME")
        if args.all or dataset:
            raise ConfigError(f"'{args.names[0]}' and {'--all' if args.all else '--dataset'} are two ways to say it")
        return args.names
    known = entries().values()
    found = [entry for entry in known if dataset in (None, entry.dataset)]
    if not found:
        raise CheckpointError(f"the zoo has nothing of '{dataset}'{nearest(dataset, {e.dataset for e in known})}")
    if not any(entry.files for entry in found):
        raise CheckpointError(
            f"the zoo has no weights of {dataset}, only {len(found)} recipes, such as solo-ext pretrain "
            f"{found[0].recipe and found[0].recipe.path}: neither paper published any"
        )
    return [entry.name for entry in found if entry.files]


def _verify_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("names", nargs="*", metavar="NAME", help="entries, as solo-ext zoo list has them")
    parser.add_argument("--all", action="store_true", help="all that were downloaded")


def _verify(args: argparse.Namespace) -> None:
    from solo_ext.zoo.store import cache, find, verify

    bad, seen = [], 0
    for name in _chosen(args, "verify"):
        states = verify(find(name))
        if args.all and all(state.state == "missing" for state in states):
            continue  # never downloaded
        if not states:
            raise CheckpointError(f"'{name}' is a recipe without weights: there is nothing to verify")
        for state in states:
            print(f"{state.state:<8} {state.path}")
        seen += len(states)
        bad += [(name, state) for state in states if state.state != "ok"]
    if bad:
        name, state = bad[0]
        raise CheckpointError(
            f"{len(bad)} of {seen} files are not as the index says (first: {state.path} is {state.state}); "
            f"solo-ext zoo download {name} fetches them"
        )
    if not seen:
        print(f"nothing has been downloaded to {cache()}", file=sys.stderr)


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="run folder or checkpoint of a pre-training, or an export of one")
    parser.add_argument("--name", metavar="NAME", help="of the entry (default: <method>-<dataset>-<backbone>)")
    parser.add_argument("--zoo", metavar="FOLDER", help="the zoo that gets it (default: the one of this checkout)")
    parser.add_argument("--licence", metavar="NAME", default="MIT", help="of the weights (default: %(default)s)")


def _add(args: argparse.Namespace) -> None:
    from solo_ext.zoo.add import add
    from solo_ext.zoo.store import installed

    zoo = Path(args.zoo) if args.zoo else installed()
    entry = add(args.run, zoo, args.name, args.licence)
    print(f"{zoo / entry.folder}: {len(entry.files)} files, {entry.size / 1e6:.1f} MB")


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
        _names_argument,
        _show,
    ),
    Command(
        "download",
        "fetch weights into the cache",
        """\
Fetches entries into $SOLO_EXT_HOME/zoo (default ~/.cache/solo_ext/zoo) and prints their folders, which are run
folders. A download that was cut goes on where it was. Size and SHA-256 are checked before a file gets its
name. $SOLO_EXT_ZOO_URL, a URL or a folder, takes the place of where the files come from.""",
        (
            "zoo download res_mocov3-fashion_mnist_mini-r10w16",
            "zoo download --dataset fashion_mnist",
        ),
        _download_arguments,
        _download,
    ),
    Command(
        "verify",
        "hash what is in the cache",
        "Compares size and SHA-256 of the files in the cache with the index, and ends with status 2 if one differs.",
        ("zoo verify res_mocov3-fashion_mnist_mini-r10w16", "zoo verify --all"),
        _verify_arguments,
        _verify,
    ),
    Command(
        "add",
        "put a run of one's own into a zoo",
        """\
Copies the student's backbone (float16), configuration, log and results of a run into the folder of a zoo,
without paths and names of this machine, and enters them into its index. The run has to have been evaluated by
solo-ext knn or linear. With --zoo FOLDER it is a zoo of one's own: others set SOLO_EXT_ZOO_URL to it.""",
        ("zoo add trained_models/byol/RUN", "zoo add trained_models/byol/RUN --zoo /data/zoo --name byol-ours-r50"),
        _add_arguments,
        _add,
    ),
)
ZOO = Group(
    "zoo",
    "weights: list, download, verify, add",
    "Trained encoders, and what they were trained with.",
    ("zoo list", "zoo download res_mocov3-fashion_mnist_mini-r10w16"),
    {command.name: command for command in _COMMANDS},
)
