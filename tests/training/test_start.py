"""How a run starts: what it says first, and what it has not imported by then."""

import subprocess
import sys

import pytest

SLOW = ("lightning", "torchvision", "timm", "h5py", "torch._dynamo", "matplotlib", "scipy")  # seconds, all together


@pytest.mark.parametrize("words, line", [(["max_epochs=1"], "cpu, "), (["--cfg"], "name: byol")])
def test_the_first_line_is_out_before_what_is_slow_to_import(words, line, tmp_path):
    command = ["pretrain", "fashion_mnist_mini/byol", "accelerator=cpu", f"checkpoint.dir={tmp_path}", *words]
    with subprocess.Popen(
        [sys.executable, "-X", "importtime", "-m", "solo_ext", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        imported = set()
        for output in process.stdout:
            if output.startswith("import time:"):
                imported.add(output.rpartition("|")[2].strip())
            elif line in output:
                break
        else:
            pytest.fail("there is no such line")
        process.kill()
    assert "torch" in imported and not imported & {*SLOW}
