"""What a command is: its help, its options, and a mistake in them as one sentence."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from solo_ext.errors import ConfigError
from solo_ext.text import hint, nearest


class _Parser(argparse.ArgumentParser):
    """argparse, with a mistake as our one sentence."""

    def error(self, message: str):
        raise ConfigError(f"{message} (see {self.prog} --help)")


@dataclass
class Command:
    """A command of `solo-ext`.

    name, summary, text: for the help. examples: command lines without the leading `solo-ext`.
    arguments: adds the options to a parser. run: does the work.
    own: how many of the words are the command's; the others are passed on, as `args.others`. Default: all.
    """

    name: str
    summary: str
    text: str
    examples: Sequence[str]
    arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], None]
    own: int | None = None

    def __call__(self, argv: Sequence[str]) -> None:
        """Parses and runs.

        Raises:
            SoloExtError: what the user got wrong.
        """
        parser = _Parser(
            prog=f"solo-ext {self.name}",
            description=self.text,
            epilog="examples:\n" + "\n".join(f"  solo-ext {example}" for example in self.examples),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        self.arguments(parser)
        args, unknown = parser.parse_known_intermixed_args(argv[: self.own])
        if unknown:
            options = [option for action in parser._actions for option in action.option_strings]
            hint = nearest(unknown[0], options) or f" (see {parser.prog} --help)"
            raise ConfigError(f"unknown option '{unknown[0]}'{hint}")
        args.others = argv[len(argv) if self.own is None else self.own :]
        self.run(args)


@dataclass
class Group:
    """A command whose first word names one of `commands`."""

    name: str
    summary: str
    text: str
    examples: Sequence[str]
    commands: Mapping[str, Command]

    def __call__(self, argv: Sequence[str]) -> None:
        """Runs the command that `argv` begins with, or prints which there are.

        Raises:
            SoloExtError: what the user got wrong.
        """
        if not argv or argv[0] in ("-h", "--help"):
            examples = "\n".join(f"  solo-ext {example}" for example in self.examples)
            print(f"{overview(f'solo-ext {self.name}', self.text, self.commands)}\n\nexamples:\n{examples}\n")
        else:
            dispatch(self.commands, argv, f"{self.name} ")


def overview(program: str, text: str, commands: Mapping[str, "Command | Group"]) -> str:
    """The help of `program`, which takes one of `commands`."""
    width = max(map(len, commands))
    lines = "\n".join(f"  {name:<{width}}  {command.summary}" for name, command in commands.items())
    return f"""usage: {program} <command> ...

{text}

commands:
{lines}

{program} <command> --help says what a command takes."""


def dispatch(commands: Mapping[str, "Command | Group"], argv: Sequence[str], before: str = "") -> None:
    """Runs the one of `commands` that `argv` begins with; `before`: the words before it, for the message."""
    if argv[0] not in commands:
        raise ConfigError(f"there is no command '{before}{argv[0]}'{hint(argv[0], commands)}")
    commands[argv[0]](argv[1:])
