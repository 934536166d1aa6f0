"""Checkpoints that are cut or changed on the disk: the one before is used, or the damage is named."""

import random

import pytest
from tiny_runs import config
from trials import ALL, trials

from solo_ext.errors import CheckpointError
from solo_ext.runs.checkpoints import load_checkpoint, open_checkpoint
from solo_ext.runs.run import RECORDS, Run
from solo_ext.training.pretrain import pretrain
from solo_ext.zoo.export import export

KIB = 400  # about the size of a checkpoint of the tiny run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    small = {"method_kwargs__proj_hidden_dim": 8, "backbone__kwargs": {"width": 4}, "max_epochs": 2}
    return Run(pretrain(config(tmp_path_factory.mktemp("runs"), **small)).dir)


@pytest.mark.parametrize("kib", trials(range(KIB)))
def test_of_a_checkpoint_that_is_cut_the_one_before_is_used(run, kib, caplog):
    newest, before = run.checkpoints
    content = newest.read_bytes()
    try:
        newest.write_bytes(content[: 1024 * kib])
        damaged = 1024 * kib < len(content)
        assert open_checkpoint(run.dir).path == (before if damaged else newest)
        assert (f"{newest} is damaged" in caplog.text) == damaged
    finally:
        newest.write_bytes(content)


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("kind", ["ckpt", "safetensors"])
@pytest.mark.parametrize("tenth", range(10))
def test_a_flipped_bit_is_found(run, tmp_path, tenth, kind, alone):
    """In the run folder, and in a copy of the file alone."""
    source = run.checkpoints[0]
    if kind == "safetensors":
        source = export(run.dir, "safetensors", tmp_path / "exported").folder / "model.safetensors"
    path = tmp_path / source.name
    content = source.read_bytes()
    if not alone:
        (tmp_path / RECORDS).write_bytes((source.parent / RECORDS).read_bytes())
    rng = random.Random(f"{tenth} {kind} {alone}")
    held = max(content.find(b"sha256"), 0)  # what proves the rest, and its name
    places = rng.sample(range(len(content)), 100 if ALL else 5) + rng.sample(
        range(held, min(held + 75, len(content))), 8
    )
    for position in places:
        path.write_bytes(
            content[:position] + bytes([content[position] ^ 1 << rng.randrange(8)]) + content[position + 1 :]
        )
        with pytest.raises(CheckpointError):
            load_checkpoint(path)
