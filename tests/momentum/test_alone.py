"""The teacher and the intra-momentum term in training loops of others: docs/momentum.md, run as it stands."""

import copy
import re
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from solo_ext.errors import ConfigError
from solo_ext.momentum import Tau, Teacher

PAGE = Path(__file__).parents[2] / "docs" / "momentum.md"
PLAIN, LIGHTLY, TIMM = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


def mlp(width, out):
    return nn.Sequential(nn.Linear(width, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, out))


def backbone():
    return nn.Sequential(nn.Conv2d(3, 64, 5, 4), nn.BatchNorm2d(64), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def scope(**names):
    pairs = [(torch.rand(8, 3, 32, 32), torch.rand(8, 3, 32, 32)) for _ in range(4)]
    common = {"nn": nn, "F": F, "torch": torch, "OrderedDict": OrderedDict, "mlp": mlp, "backbone": backbone()}
    return {**common, "loader": pairs, "total_steps": 4, "images": pairs[0][0], **names}


@pytest.mark.parametrize("text", [PLAIN, LIGHTLY, TIMM], ids=["plain", "lightly", "timm"])
def test_an_example_is_short(text):
    assert 5 < sum(bool(line.strip()) for line in text.splitlines()) < 16


def test_projector_only_byol_is_what_a_loop_by_hand_gives():
    found = scope()
    first = copy.deepcopy({key: found[key] for key in ("backbone",)})
    torch.manual_seed(3)
    exec(PLAIN, found)
    torch.manual_seed(3)
    net = nn.ModuleDict({"backbone": first["backbone"], "projector": mlp(64, 32), "predictor": mlp(32, 32)})
    teacher = copy.deepcopy(net["projector"])
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    for a, b in found["loader"]:
        h = [net["backbone"](x) for x in (a, b)]
        # the order in which BatchNorm sees the views
        z, t = [], []
        for x in h:
            z.append(net["predictor"](net["projector"](x)))
            t.append(teacher(x.detach()).detach())
        loss = -F.cosine_similarity(z[0], t[1]).mean() - F.cosine_similarity(z[1], t[0]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for ours, theirs in zip(teacher.parameters(), net["projector"].parameters(), strict=True):
            ours.data.mul_(0.99).add_(theirs.data, alpha=0.01)
    ours = found["net"]
    assert not any(name.startswith("momentum_backbone") for name in ours.state_dict())
    for mine, theirs in (
        (ours.backbone, net["backbone"]),
        (ours.projector, net["projector"]),
        (ours.momentum_projector, teacher),
    ):
        for x, y in zip(mine.state_dict().values(), theirs.state_dict().values(), strict=True):
            torch.testing.assert_close(x, y)


def test_residual_momentum_on_lightlys_heads():
    pytest.importorskip("lightly")
    found = scope()
    exec(LIGHTLY, found)
    net, teacher = found["net"], found["teacher"]
    student, taught = teacher.both(found["images"])
    assert all(torch.equal(student[part], taught[part]) for part in student), "they begin as one"
    loss = found["training_step"](*found["loader"][0])
    loss.backward()
    assert all(p.grad is not None for name, p in net.named_parameters() if not name.startswith("momentum_"))
    assert all(p.grad is None for name, p in net.named_parameters() if name.startswith("momentum_"))
    # the intra term of equal networks is 0: the rest is lightly's own loss
    (a, _), (b, _) = teacher.both(found["loader"][0][0]), teacher.both(found["loader"][0][1])
    criterion = found["criterion"]
    own = (
        criterion(a["predictor"], b["projector"].detach()) / 2 + criterion(b["predictor"], a["projector"].detach()) / 2
    )
    torch.testing.assert_close(loss, own)
    teacher.update(0, 4)


def test_the_last_quarter_of_a_vit():
    found = scope()
    exec(TIMM, found)
    net, teacher = found["net"], found["teacher"]
    assert [stage.name for stage in teacher.stages] == ["block4", "projector.fc1", "projector.fc2"]
    names = {name for name, _ in net.momentum_backbone.named_parameters()}
    assert names and all(name.startswith(("blocks.9.", "blocks.10.", "blocks.11.", "norm.")) for name in names)
    torch.testing.assert_close(found["target"]["projector"], found["student"]["projector"])
    assert found["loss"].requires_grad and not found["target"]["projector"].requires_grad
    assert {str(tau) for tau in teacher.taus.values()} == {"0.99", "0.9"}


def test_children_by_other_names():
    net = nn.ModuleDict({"encoder": backbone(), "unused": nn.Linear(2, 2), "head": mlp(64, 8)})
    teacher = Teacher.of(net, "projector", Tau(0.9, 1.0), {"backbone": "encoder", "projector": "head"})
    student, taught = teacher.both(torch.rand(4, 3, 32, 32))
    assert student.keys() == taught.keys() == {"backbone", "projector"} and "momentum_head" in dict(
        net.named_children()
    )
    alone = nn.ModuleDict({"backbone": backbone(), "projector": mlp(64, 8)})
    assert {str(tau) for tau in Teacher.of(alone, "projector", 0.5).taus.values()} == {"0.5"}
    with pytest.raises(ConfigError, match=r"no stage 'block5' with a teacher .*valid: full, backbone, projector, none"):
        Teacher.of(net, ["block5"], parts={"backbone": "encoder", "projector": "head"})
