"""What a shell is offered, asked as it asks."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from solo_ext.cli.main import main

ROOT = Path(__file__).parents[2]


def offered(line, folder):
    out = folder / "offered"
    asked = {"_ARGCOMPLETE": "1", "_ARGCOMPLETE_IFS": "\n", "_ARGCOMPLETE_STDOUT_FILENAME": str(out)}
    env = {**os.environ, **asked, "COMP_LINE": line, "COMP_POINT": str(len(line)), "PYTHONPATH": str(ROOT)}
    code = "import sys; sys.argv[0] = 'solo-ext'; from solo_ext.cli.main import main; main([])"
    subprocess.run([sys.executable, "-c", code], env=env, cwd=folder, check=False, timeout=60)
    return {word.strip() for word in out.read_text().split("\n") if word.strip()}


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("solo-ext pre", {"pretrain"}),
        ("solo-ext pretrain cifar10/res_m", {"cifar10/res_mocov3", "cifar10/res_moco", "cifar10/res_mocov2plus"}),
        ("solo-ext study residual/table1", {f"residual/table{n}" for n in (1, 13, 14, 15, 16)}),
        ("solo-ext knn --dis", {"--distance"}),
        ("solo-ext zoo pub", {"publish"}),
        ("solo-ext pictures RUN --kind gr", {"gradcam"}),
        ("solo-ext completion ", {"bash", "zsh", "fish", "-h", "--help"}),
    ],
)
def test_a_shell_is_offered(line, expected, tmp_path):
    assert expected >= offered(line, tmp_path) > set() and offered(line, tmp_path) & expected


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_what_a_shell_reads(shell, capsys):
    assert main(["completion", shell]) == 0
    assert "_ARGCOMPLETE" in capsys.readouterr().out


def test_bash_itself_completes(tmp_path):
    code = "import sys; sys.argv[0] = 'solo-ext'; from solo_ext.cli.main import main; raise SystemExit(main())"
    command = tmp_path / "solo-ext"
    command.write_text(f"#!{sys.executable}\n{code}\n")
    command.chmod(0o755)
    script = 'eval "$(solo-ext completion bash)"; COMP_LINE="solo-ext tra" COMP_POINT=12 COMP_TYPE=9; '
    script += (
        'COMP_WORDS=(solo-ext tra) COMP_CWORD=1; _python_argcomplete solo-ext tra solo-ext; echo "${COMPREPLY[@]}"'
    )
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(["bash", "-c", script], env=env, capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["trajectories"], done.stderr
