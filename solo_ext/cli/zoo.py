"""List, download, verify, add and publish trained encoders.

solo-ext zoo list
solo-ext zoo download res_mocov3-fashion_mnist_mini-r10w16
"""

import json
import sys
import textwrap
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from solo_ext.cli.command import SOLO_EXT, option
from solo_ext.errors import CheckpointError, ConfigError
from solo_ext.text import line_width, nearest

if TYPE_CHECKING:
    from solo_ext.zoo.index import Entry

ZOO = SOLO_EXT.group("zoo", __doc__)
NAMES = option("names NAME", "entries, as solo-ext zoo list shows them", nargs="*")
EVERY = option("--all", "all entries with weights")
INTO = option("--zoo FOLDER", "the zoo that gets it (default: the one of this checkout)", type=Path)


def _selection(args: Namespace, command: str, known: Mapping[str, "Entry"]) -> list["Entry"]:
    """The entries of `known` that the command line asks for."""
    from solo_ext.zoo import store

    dataset = vars(args).get("dataset")
    if args.names and (args.all or dataset):
        every = "--all" if args.all else "--dataset"
        raise ConfigError(f"'{args.names[0]}' and {every} are two ways to say it")
    if args.names:
        return [store.find(name, known) for name in args.names]
    if not args.all and not dataset:
        raise ConfigError(f"which entry? name one of solo-ext zoo list, as in solo-ext zoo {command} NAME")
    entries = [entry for entry in known.values() if dataset in (None, entry.dataset)]
    weights = [entry for entry in entries if entry.files]
    if not weights:
        close = nearest(dataset, {entry.dataset for entry in known.values()})
        recipes = f", only {len(entries)} recipes (solo-ext zoo list): neither paper published any"
        of = f" of {dataset}" if dataset else ""
        raise CheckpointError(f"the zoo has no weights{of}{recipes if entries else close}")
    return weights


def _table(entries: Sequence["Entry"]) -> str:
    """Columns about entries that all have weights, or all have none. A name that is too long for the terminal goes on
    below."""
    from solo_ext.zoo import index

    rows = [index.cells(entry) for entry in entries]
    shown = ("epochs", "linear top-1", "kNN-20", "MB") if entries[0].files else ("epochs", "printed")
    columns = [[name.removesuffix(" top-1"), *(row[name] for row in rows)] for name in shown]
    aligned = [[cell.rjust(max(map(len, column))) for cell in column] for column in columns]
    numbers = ["  ".join(cells) for cells in zip(*aligned, strict=True)]
    names = ["name", *(row["name"] for row in rows)]
    room = max(20, min(max(map(len, names)), line_width() - 2 - len(numbers[0])))
    lines = []
    for name, cells in zip(names, numbers, strict=True):
        first, *rest = textwrap.wrap(name, room, subsequent_indent="  ")
        lines += [f"{first:<{room}}  {cells}", *rest]
    return "\n".join(lines)


@ZOO.command(
    option("words WORD", "only entries with all of these words in their name", nargs="*"),
    option("--weights", "leave out the recipes without weights"),
    option("--json", "print JSON, with everything that is known"),
    option("--markdown", "print the tables of the README files"),
)
def _list(args: Namespace) -> None:
    """List the entries: those with weights, and the papers' recipes, for which neither paper published any.

    Figures are top-1 in percent, `printed` those of the papers; solo-ext zoo show NAME says by which protocol.

      solo-ext zoo list
      solo-ext zoo list res_ cifar100
      solo-ext zoo list --weights --json
    """
    from solo_ext.zoo import index, store

    known = store.entries()
    selected = [e for e in known.values() if all(w in e.name for w in args.words) and (e.files or not args.weights)]
    if not selected:
        close = nearest(args.words[0], known) if len(args.words) == 1 else ""
        raise CheckpointError(f"the zoo has no entry with '{' '.join(args.words)}' in its name{close}")
    if args.json:
        print(json.dumps([asdict(entry) for entry in selected], indent=1))
    elif args.markdown:
        tables = [index.markdown(selected, weights) for weights in ([True] if args.weights else [True, False])]
        print("\n".join(tables), end="")
    else:
        halves = [[entry for entry in selected if bool(entry.files) == weights] for weights in (True, False)]
        print("\n\n".join(_table(entries) for entries in halves if entries))


@ZOO.command(option("name NAME", "an entry, as solo-ext zoo list shows it"))
def show(args: Namespace) -> None:
    """Show one entry: recipe, figures with their protocol, licence, and its files with size and SHA-256.

    solo-ext zoo show res_mocov3-fashion_mnist_mini-r10w16
    solo-ext zoo show mocov3-cifar100-r18
    """
    import yaml

    from solo_ext.zoo import store

    entry = store.find(args.name)
    print(yaml.safe_dump(asdict(entry), sort_keys=False, width=min(120, line_width() - 12)), end="")
    if entry.files:
        states = {state for _, state in store.verify(entry)}
        print(f"# on this machine: {'yes' if states == {'ok'} else 'damaged' if 'damaged' in states else 'no'}")


@ZOO.command(NAMES, EVERY, option("--dataset NAME", "all entries with weights that were trained on it"))
def download(args: Namespace) -> None:
    """Make sure that weights are on this machine.

    Prints the folders of entries, which are run folders. What the zoo of the checkout or the package holds is used
    where it is; the rest is fetched from the Hugging Face Hub into its cache (HF_HOME, HF_ENDPOINT, HF_TOKEN and
    HF_HUB_OFFLINE are obeyed). Size and SHA-256 of all files are checked. $SOLO_EXT_ZOO, the folder of a zoo of your
    own, takes precedence over both.

      solo-ext zoo download res_mocov3-fashion_mnist_mini-r10w16
      solo-ext zoo download --dataset fashion_mnist
    """
    from solo_ext.zoo import store

    for entry in _selection(args, "download", store.entries()):
        print(store.fetch(entry)[0].parent)


@ZOO.command(NAMES, option("--all", "all that are on this machine"))
def verify(args: Namespace) -> None:
    """Compare size and SHA-256 of entries' files with the index; status 2 if one differs.

    solo-ext zoo verify res_mocov3-fashion_mnist_mini-r10w16
    solo-ext zoo verify --all
    """
    from solo_ext.zoo import store

    rows = []
    for entry in _selection(args, "verify", store.entries()):
        states = [(entry, path, state) for path, state in store.verify(entry)]
        if not args.all or any(state != "missing" for _, _, state in states):  # else never downloaded
            rows += states
    for _, path, state in rows:
        print(f"{state:<8} {path}")
    if bad := [row for row in rows if row[2] != "ok"]:
        entry, path, state = bad[0]
        remedy = f"; solo-ext zoo download {entry.name} fetches them" if entry.repository else ""
        first = f"(first: {path} is {state})"
        raise CheckpointError(f"{len(bad)} of {len(rows)} files are not as the index says {first}{remedy}")
    if not rows:
        print("nothing of the zoo is on this machine", file=sys.stderr)


@ZOO.command(
    option("run RUN", "run folder or checkpoint of a pre-training, or an export of one"),
    option("--name NAME", "of the entry (default: <method>-<dataset>-<backbone>)"),
    INTO,
    option("--licence NAME", "of the weights (default: %(default)s)", default="MIT"),
)
def add(args: Namespace) -> None:
    """Put a run of your own into a zoo.

    Copies the student's backbone (float16), configuration, log and results of a run into the folder of a zoo,
    without paths and names of this machine, and enters them into its index. The run must have been evaluated by
    solo-ext knn or linear. --zoo FOLDER adds it to a zoo of your own: others set SOLO_EXT_ZOO to that folder.

      solo-ext zoo add trained_models/byol/RUN
      solo-ext zoo add trained_models/byol/RUN --zoo /data/zoo --name byol-ours-r50
    """
    from solo_ext.runs import zoos
    from solo_ext.zoo import edit

    zoo = args.zoo or zoos.installed()
    entry = edit.add(args.run, zoo, args.name, args.licence)
    size = sum(file.size for file in entry.files) / 1e6
    print(f"{zoo / entry.folder}: {len(entry.files)} files, {size:.1f} MB")


@ZOO.command(
    option("runs RUN", "finished runs of one recipe, each with another seed", nargs="+"),
    option("--name NAME", "of the reference (default: the recipe's)"),
    INTO,
)
def reference(args: Namespace) -> None:
    """Make the reference of a recipe, with which solo-ext check compares runs.

    Holds the curves of three runs or more that differ in the seed alone, with the band that one value in 5,000 of a
    further seed leaves. A few kB, in <zoo>/references/<recipe>.json; one that is there is replaced.

      solo-ext zoo reference trained_models/byol/*
      solo-ext zoo reference runs/*/byol/* --name lab/byol-r50 --zoo /data/zoo
    """
    from solo_ext.runs import zoos
    from solo_ext.zoo import edit

    print(edit.add_reference(args.runs, args.zoo or zoos.installed(), args.name))


@ZOO.command(
    NAMES,
    EVERY,
    option("--repo OWNER/NAME", "the repository on the Hugging Face Hub", required=True),
    option("--zoo FOLDER", "the zoo that has them (default: the one of this checkout)", type=Path),
)
def publish(args: Namespace) -> None:
    """Upload entries to the Hugging Face Hub.

    Each entry is a folder; all go up in one commit, and the repository and the commit are entered into the index of
    the zoo: whoever has that index can then download them. It needs a token (hf auth login, or HF_TOKEN).

      solo-ext zoo publish --repo jane/solo-ext-zoo --all
      solo-ext zoo publish byol-ours-r50 --repo jane/zoo --zoo /data/zoo
    """
    from solo_ext.runs import zoos
    from solo_ext.zoo import edit, index

    zoo = args.zoo or zoos.installed()
    print(edit.publish(zoo, args.repo, [entry.name for entry in _selection(args, "publish", index.read_index(zoo))]))
