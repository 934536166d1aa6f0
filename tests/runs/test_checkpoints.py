"""Checkpoint files: written whole, damage found, no code run."""

import json
import os
import pickle
import random
import resource

import pytest
import safetensors.torch
import torch
from tiny_runs import names

from solo_ext.errors import CheckpointError, ConfigError
from solo_ext.files import sha256
from solo_ext.runs.checkpoints import (
    CheckpointConfig,
    find_checkpoint,
    load_checkpoint,
    save_checkpoint,
    save_tensors,
)
from solo_ext.runs.run import RECORDS


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "tiny-ab-ep=3.ckpt"
    save_checkpoint({"epoch": 3, "global_step": 12, "state_dict": {"w": torch.arange(1000.0)}}, path)
    return path


def test_checkpoint_round_trip_and_record(saved):
    assert torch.equal(load_checkpoint(saved)["state_dict"]["w"], torch.arange(1000.0))
    record = json.loads((saved.parent / RECORDS).read_text())[saved.name]
    assert (record["epoch"], record["step"], record["size"]) == (3, 12, saved.stat().st_size)
    assert names(saved.parent) == [RECORDS, saved.name]


@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize("keep", [0, 1, 100, 0.5, -1])
def test_truncated_checkpoint_is_refused(saved, keep, recorded):
    content = saved.read_bytes()
    saved.write_bytes(content[: int(keep * len(content)) if isinstance(keep, float) else keep])
    if not recorded:
        (saved.parent / RECORDS).unlink()
    with pytest.raises(CheckpointError, match=saved.name):
        load_checkpoint(saved)


@pytest.mark.parametrize("lone", [False, True])
@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_any_flipped_bit_is_found(saved, lone, suffix):
    """Also in a copy that has nothing beside it."""
    if suffix == ".safetensors":
        record = json.loads((saved.parent / RECORDS).read_text())[saved.name]
        saved = saved.with_suffix(suffix)
        saved.write_bytes(save_tensors({"w": torch.arange(1000.0)}))
        (saved.parent / RECORDS).write_text(json.dumps({saved.name: record | {"sha256": sha256(saved)}}))
    assert torch.equal(load_checkpoint(saved)["state_dict"]["w"], torch.arange(1000.0))
    if lone:
        (saved.parent / RECORDS).unlink()
    content = saved.read_bytes()
    rng = random.Random(0)
    name = max(0, content.find(b'"sha256"'))  # of the sum that a .safetensors holds
    places = *rng.sample(range(len(content)), 100), *range(name, name + 10), *range(len(content) - 100, len(content), 5)
    for position in places:
        damaged = bytearray(content)
        damaged[position] ^= 1 << rng.randrange(8)
        saved.write_bytes(damaged)
        with pytest.raises(CheckpointError):
            load_checkpoint(saved)


def test_files_of_others_need_no_sum(tmp_path):
    torch.save({"state_dict": {"w": torch.ones(3)}}, tmp_path / "theirs.pth")
    safetensors.torch.save_file({"w": torch.ones(3)}, tmp_path / "theirs.safetensors")
    for file in tmp_path.iterdir():
        assert torch.equal(load_checkpoint(file)["state_dict"]["w"], torch.ones(3))


class Malicious:
    def __init__(self, sentinel):
        self.sentinel = sentinel

    def __reduce__(self):
        return os.mkdir, (str(self.sentinel),)


@pytest.mark.parametrize("write", [torch.save, lambda x, path: path.write_bytes(pickle.dumps(x))])
def test_code_in_a_checkpoint_is_not_executed(tmp_path, write):
    path, sentinel = tmp_path / "evil.ckpt", tmp_path / "executed"
    write({"state_dict": {}, "hyper_parameters": Malicious(sentinel)}, path)
    with pytest.raises(CheckpointError, match=r"code or objects \(posix.mkdir\)|not a checkpoint"):
        load_checkpoint(path)
    assert not sentinel.exists()


@pytest.mark.parametrize(
    "content, message",
    [
        (b"<!doctype html><html>404</html>", "web page"),
        (b"", "empty"),
        (b"hello", "not a checkpoint"),
        (b"PK\3\4zip", "damaged"),
    ],
)
def test_files_that_are_no_checkpoints(tmp_path, content, message):
    (tmp_path / "x.ckpt").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(tmp_path / "x.ckpt")


def test_missing_checkpoint_names_the_nearest(saved):
    with pytest.raises(CheckpointError, match=r"ep=4.ckpt does not exist; did you mean 'tiny-ab-ep=3.ckpt'"):
        find_checkpoint(saved.with_name("tiny-ab-ep=4.ckpt"))


def test_a_full_disk_leaves_the_old_checkpoint_and_nothing_else(saved):
    before = saved.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        for path in (saved, saved.with_name("tiny-ab-ep=4.ckpt")):
            with pytest.raises(CheckpointError, match=f"{path.name} cannot be written: File too large"):
                save_checkpoint({"state_dict": {"w": torch.zeros(100_000)}}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert saved.read_bytes() == before and names(saved.parent) == [RECORDS, saved.name]


def test_damaged_newest_checkpoint_gives_the_previous_with_a_warning(saved, caplog):
    newest = saved.with_name("tiny-ab-ep=10.ckpt")
    save_checkpoint({"state_dict": {"w": torch.ones(9)}}, newest)
    assert find_checkpoint(saved.parent) == newest
    newest.write_bytes(newest.read_bytes()[:-1])
    assert find_checkpoint(saved.parent) == saved
    assert "ep=10.ckpt is damaged" in caplog.text
    saved.write_bytes(b"")
    with pytest.raises(CheckpointError, match="no undamaged checkpoint"):
        find_checkpoint(saved.parent)


@pytest.mark.parametrize("values", [{"frequency": 0}, {"dir": ""}])
def test_checkpoint_config_is_checked(values):
    with pytest.raises(ConfigError, match=f"checkpoint.{next(iter(values))}"):
        CheckpointConfig(**values)
