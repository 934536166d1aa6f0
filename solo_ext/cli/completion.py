"""What a shell completes: commands, options, recipes and paths."""

import argparse
import os
from argparse import Namespace
from typing import Any

from solo_ext.cli.command import SOLO_EXT, Command, Group, option
from solo_ext.training import recipes

SHELLS = ("bash", "zsh", "fish")
KINDS = {"pretrain": "pretrain", "plan": "pretrain", "linear": "linear", "finetune": "linear", "study": "studies"}


@SOLO_EXT.command(option("shell SHELL", " or ".join(SHELLS), choices=SHELLS))
def completion(args: Namespace) -> None:
    """Print what makes a shell complete solo-ext's commands, options, recipes and paths.

    In a file that your shell reads when it starts, as below, it serves every new shell; eval "$(solo-ext completion
    bash)" serves this one.

      solo-ext completion bash >> ~/.bashrc
      solo-ext completion zsh >> ~/.zshrc
      solo-ext completion fish > ~/.config/fish/completions/solo-ext.fish
    """
    import argcomplete

    print(argcomplete.shellcode([SOLO_EXT.prog], shell=args.shell))  # type: ignore[no-untyped-call]


def complete() -> None:
    """Answers a shell that asks what can come next, and ends the process; does nothing if none asks."""
    if "_ARGCOMPLETE" in os.environ:
        import argcomplete

        argcomplete.autocomplete(_parser(SOLO_EXT))


def _parser(group: Group) -> argparse.ArgumentParser:
    """A parser with all commands of `group`, none of which it runs."""
    root = argparse.ArgumentParser(group.prog)
    commands = root.add_subparsers()
    for name, command in group.commands.items():
        if isinstance(command, Command):
            own = commands.add_parser(name, help=command.summary, parents=[command], add_help=False)
            for action in own._actions:
                if action.dest == "words" and name in KINDS:
                    action.completer = _recipes(KINDS[name])  # type: ignore[attr-defined]  # argcomplete's own
        else:
            commands._name_parser_map[name] = _parser(command)  # an inner group
            commands._choices_actions.append(commands._ChoicesPseudoAction(name, (), command.summary))
    return root


def _recipes(kind: str) -> Any:
    return lambda prefix, **_: sorted(name for name in recipes.named(kind) if name.startswith(prefix))
