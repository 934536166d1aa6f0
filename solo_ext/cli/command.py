"""What a command is: a function whose docstring is its help, with options; a mistake in them is one sentence."""

import argparse
import inspect
import re
import shutil
import textwrap
from argparse import Namespace
from collections.abc import Callable, Sequence
from typing import Any

from solo_ext.errors import ConfigError
from solo_ext.text import hanging, hint, nearest

Option = Callable[[argparse.ArgumentParser], Any]  # adds itself to a parser


def option(usage: str, help: str, **settings: Any) -> Option:
    """`--flag`, `-s --long METAVAR`, or the name and METAVAR of a word, with settings of argparse's `add_argument`."""
    words = usage.split()
    names = [word for word in words if word.startswith("-")] or words[:1]
    if metavar := " ".join(words[len(names) :]):
        settings["metavar"] = metavar
    else:
        settings["action"] = "store_true"
    return lambda parser: parser.add_argument(*names, help=help, **settings)


class Layout(argparse.RawDescriptionHelpFormatter):
    """Help as wide as the terminal: paragraphs are filled, an indented line stays one, a long example goes on after a
    backslash."""

    def __init__(self, prog: str):
        super().__init__(prog, width=min(shutil.get_terminal_size().columns, 120) - 2)

    def _fill_text(self, text: str, width: int, indent: str = "") -> str:
        lines = re.sub(r"(?<=\S)\n(?=\S)", " ", text).splitlines()
        return "\n".join((_example if line.startswith("  solo-ext ") else hanging)(line, width) for line in lines)

    def filled(self, text: str) -> str:
        return self._fill_text(text, self._width)


def _example(line: str, width: int) -> str:
    together = re.sub(r"( -\S+) (?=[^-])", "\\1\0", line)  # an option and its value
    wrapper = textwrap.TextWrapper(width - 2, "", " " * 6, break_long_words=False, break_on_hyphens=False)
    return " \\\n".join(wrapper.wrap(together)).replace("\0", " ")


class Help(argparse.ArgumentParser):
    """A parser whose help is a docstring: a summary in one line, paragraphs and, as the last of them, examples."""

    def __init__(self, program: str, docstring: str | None):
        text, _, examples = inspect.cleandoc(docstring or "").rpartition("\n\n")
        self.examples = [f"  {line.strip()}" for line in examples.splitlines()]
        self.summary = text[:1].lower() + text[1:].partition("\n")[0].rstrip(".")
        epilog = "\n".join(["examples:", *self.examples])
        super().__init__(program, None, text, epilog, formatter_class=Layout, allow_abbrev=False)

    def error(self, message: str):
        raise ConfigError(f"{message} (see {self.prog} --help)")


class Command(Help):
    """A command, as `Group.command` makes it; called with its words, it raises SoloExtError for a user's mistake."""

    def __init__(self, program: str, run: Callable[[Namespace], None], options: Sequence[Option], own: int | None):
        super().__init__(program, run.__doc__)
        self.run, self.own = run, own
        for add in options:
            add(self)

    def __call__(self, argv: Sequence[str]) -> None:
        args, unknown = self.parse_known_intermixed_args(argv[: self.own])
        if unknown:
            close = nearest(unknown[0], self._option_string_actions) or f" (see {self.prog} --help)"
            raise ConfigError(f"unknown option '{unknown[0]}'{close}")
        args.others = [] if self.own is None else argv[self.own :]
        self.run(args)


class Group(Help):
    """A command whose first word names one of `commands`."""

    def __init__(self, program: str, docstring: str | None):
        super().__init__(program, docstring)
        self.commands: dict[str, Command | Group] = {}

    def group(self, name: str, docstring: str | None) -> "Group":
        """A new group inside this one."""
        self.commands[name] = group = Group(f"{self.prog} {name}", docstring)
        return group

    def command(self, *options: Option, own: int | None = None) -> Callable[[Callable[[Namespace], None]], Command]:
        """Makes a function a command of this group; words after the first `own` are passed on as `args.others`."""

        def register(run: Callable[[Namespace], None]) -> Command:
            name = run.__name__.strip("_").replace("_", "-")
            self.commands[name] = command = Command(f"{self.prog} {name}", run, options, own)
            return command

        return register

    def __call__(self, argv: Sequence[str]) -> None:
        if not argv or argv[0] in ("-h", "--help"):
            width = max(map(len, self.commands))
            rows = "\n".join(f"  {name:<{width}}  {command.summary}" for name, command in self.commands.items())
            about = f"usage: {self.prog} <command> ...\n\n{self.description}\n\ncommands:\n{rows}"
            more = f"{self.prog} <command> --help says what a command takes.\n\n{self.epilog}"
            print(Layout(self.prog).filled(f"{about}\n\n{more}"))
        elif argv[0] in self.commands:
            self.commands[argv[0]](argv[1:])
        else:
            words = f"{self.prog} {argv[0]}".removeprefix("solo-ext ")
            raise ConfigError(f"there is no command '{words}'{hint(argv[0], self.commands)}")


SOLO_EXT = Group(
    "solo-ext",
    """Train image encoders without labels, with projector-only and residual momentum.

    solo-ext --version prints the version. --import MODULE, with any command, registers methods, backbones, datasets
    and monitors of your own.

      solo-ext demo
      solo-ext pretrain cifar10/res_mocov3 data.train_path=/data
    """,
)
