"""The teacher: which stages it owns, what it computes, how it follows the student."""

import copy
import math

import lightning.pytorch as pl
import pytest
import torch
from conftest import fit, random_batches, tiny_config

from solo_ext.errors import ConfigError
from solo_ext.methods import METHODS
from solo_ext.momentum import IntraMomentum, MomentumConfig, Tau, Teacher
from solo_ext.networks import BackboneConfig, DINOHead, build_backbone, mlp
from solo_ext.networks.backbones import MOCO_VITS
from solo_ext.networks.stages import kept_outputs, stage_row

BLOCKS = ["conv1", "block1", "block2", "block3", "block4"]
MODULES = {  # independent of the code under test: which modules are which stage
    "conv1": ["backbone.conv1", "backbone.bn1"],
    **{f"block{i}": [f"backbone.layer{i}"] for i in range(1, 5)},
    "projector.fc1": ["projector.0", "projector.1"],
    "projector.fc2": ["projector.3", "projector.4"],
    "predictor.fc1": ["predictor.0", "predictor.1"],
    "predictor.fc2": ["predictor.3", "predictor.4"],
}
ROW = list(MODULES)
PROJECTOR, PREDICTOR = ROW[5:7], ROW[7:]
PARTS = ("backbone", "projector", "predictor")

# spec, stages with EMA and their base tau (None: momentum.base_tau); everything after the first is owned
SCOPES = [
    ("full", dict.fromkeys(ROW)),
    ("backbone", dict.fromkeys(BLOCKS)),
    ("projector", dict.fromkeys(PROJECTOR + PREDICTOR)),
    ("none", {}),
    *(([stage], {stage: None}) for stage in BLOCKS),
    ("projector.fc2", {"projector.fc2": None}),
    (["block4", "projector"], dict.fromkeys(["block4", *PROJECTOR])),
    (["conv1", "block3"], dict.fromkeys(["conv1", "block3"])),
    ({"block4": 0.5, "projector": 0.99}, {"block4": 0.5, "projector.fc1": 0.99, "projector.fc2": 0.99}),
    ({"projector": 0.8, "projector.fc2": 0.3}, {"projector.fc1": 0.8, "projector.fc2": 0.3}),
    ({"backbone": 1.0, "projector": 0.0}, {**dict.fromkeys(BLOCKS, 1.0), **dict.fromkeys(PROJECTOR, 0.0)}),
]


class Recorder(pl.Callback):
    """The student's weights and buffers after every optimizer step."""

    def __init__(self):
        self.states = []

    def on_train_batch_end(self, trainer, module, *_):
        if trainer.global_step > len(self.states):
            self.states.append(copy.deepcopy(module.state_dict()))


def build(method="byol", seed=0, **changes):
    torch.manual_seed(seed)
    return METHODS[method](tiny_config(method, **changes))


def owner(key):
    """The stage of a state_dict key, by MODULES; None for keys that belong to none."""
    key = key.removeprefix("momentum_")
    return next((s for s, paths in MODULES.items() if any(key.startswith(p + ".") for p in paths)), None)


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
@pytest.mark.parametrize("buffers", ["own", "copy", "ema"])
@pytest.mark.parametrize(("spec", "ema"), SCOPES, ids=lambda value: str(value)[:40])
def test_teacher_follows_a_hand_written_loop(spec, ema, buffers, schedule):
    """Owned keys, weights and (unless `own`) buffers after 5 steps, against plain float64 arithmetic."""
    model = build("mocov3", momentum__stages=spec, momentum__buffers=buffers, momentum__schedule=schedule,
                  gap__at="predictor", momentum__base_tau=0.7)  # fmt: skip
    start = copy.deepcopy(model.state_dict())
    first = min((ROW.index(stage) for stage in ema), default=len(ROW))
    expected = {f"momentum_{key}" for key in start if not key.startswith("momentum_") and owner(key) in ROW[first:]}
    assert {key for key in start if key.startswith("momentum_")} == expected

    recorder = Recorder()
    fit(model, random_batches(5), callbacks=[recorder])
    end = model.state_dict()
    for key in expected:
        stage, student = owner(key), key.removeprefix("momentum_")
        base = ema.get(stage, 0.0)
        base = 0.7 if base is None else base
        rising = schedule == "cosine" and stage in ema and base not in (0.0, 1.0)
        is_buffer = "running" in key or "tracked" in key
        if is_buffer and buffers == "own":
            continue
        value = start[key].double()
        for t, state in enumerate(recorder.states):
            tau = 1 - (1 - base) * (math.cos(math.pi * t / 5) + 1) / 2 if rising else base
            tau = 0.0 if is_buffer and (buffers == "copy" or "tracked" in key) else tau
            value = tau * value + (1 - tau) * state[student].double()
        torch.testing.assert_close(end[key].double(), value, rtol=1e-5, atol=1e-6, msg=key)


# The teacher alone, over every family of networks, in float64: `BY_HAND` says which tensors a stage has and what it
# computes, without the code under test.


def network(kind):
    torch.manual_seed(0)
    net = torch.nn.Module()
    if kind == "resnet":
        net.backbone = build_backbone(BackboneConfig("resnet10_w16", last_norm=True))
    else:
        kwargs = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 5, "num_heads": 2}
        own = kind == "mocov3-vit"
        kwargs |= {} if own else {"reg_tokens": 2}
        net.backbone = build_backbone(BackboneConfig("vit_tiny", kwargs), own=MOCO_VITS if own else None)
    features = net.backbone.num_features
    if kind == "dino-vit":
        net.head = DINOHead(features, 12, 6, 10, norm=True, norm_last_layer=False)
    else:
        net.projector = mlp([features, 12, 8], last_norm="affine")
        net.predictor = mlp([8, 12, 8])
    return net.double()


def tokens(b, x):
    extra = [b.cls_token] + ([] if b.reg_token is None else [b.reg_token])
    x = torch.cat([t.expand(len(x), -1, -1) for t in extra] + [b.patch_embed.proj(x).flatten(2).mT], dim=1)
    return x + b.pos_embed


def in_order(name, *modules):
    """The stage that runs these modules of a part one after the other."""

    def run(net, x):
        for module in modules:
            x = net.get_submodule(f"{name}.{module}")(x)
        return x

    return [f"{name}.{module}" for module in modules], run


def prototypes(net, x):
    g, v = net.head.last_layer.weight_g, net.head.last_layer.weight_v
    return x @ (g * v / v.norm(dim=1, keepdim=True)).T


VIT = {
    "conv1": (
        ["backbone.cls_token", "backbone.reg_token", "backbone.pos_embed", "backbone.patch_embed"],
        lambda net, x: tokens(net.backbone, x),
    ),
    "block1": in_order("backbone", "blocks.0"),
    "block2": in_order("backbone", "blocks.1"),
    "block3": in_order("backbone", "blocks.2"),
    "block4": (
        ["backbone.blocks.3", "backbone.blocks.4", "backbone.norm"],
        lambda net, x: net.backbone.norm(net.backbone.blocks[4](net.backbone.blocks[3](x)))[:, 0],
    ),
}
HEADS = {
    "projector.fc1": in_order("projector", 0, 1, 2),
    "projector.fc2": in_order("projector", 3, 4),
    "predictor.fc1": in_order("predictor", 0, 1, 2),
    "predictor.fc2": in_order("predictor", 3),
}
BY_HAND = {
    "resnet": {
        "conv1": in_order("backbone", "conv1", "bn1", "relu", "maxpool"),
        **{f"block{i}": in_order("backbone", f"layer{i}") for i in (1, 2, 3)},
        "block4": (
            ["backbone.layer4", "backbone.fc"],
            lambda net, x: net.backbone.fc(net.backbone.layer4(x).mean((2, 3))),
        ),
        **HEADS,
    },
    "mocov3-vit": {**VIT, **HEADS},
    "dino-vit": {
        **VIT,
        "projector.fc1": in_order("head.mlp", 0, 1, 2),
        "projector.fc2": in_order("head.mlp", 3, 4, 5),
        "projector.fc3": (
            ["head.mlp.6"],
            lambda net, x: net.head.mlp[6](x) / net.head.mlp[6](x).norm(dim=1, keepdim=True),
        ),
        "projector.prototypes": (["head.last_layer"], prototypes),
    },
}
PART = {stage: stage.split(".")[0] if "." in stage else "backbone" for row in BY_HAND.values() for stage in row}
ENDS = {"projector": ("projector", "predictor"), "full": ("backbone", "projector", "predictor"), "none": ()}


def scopes(kind):
    """(spec, stage -> base tau) for every single stage, the presets and some unions."""
    row = BY_HAND[kind]
    yield from (([stage], {stage: 0.7}) for stage in row)
    for preset in ("full", "backbone", "projector", "none"):
        yield preset, {stage: 0.7 for stage in row if PART[stage] in ENDS.get(preset, ("backbone",))}
    yield ["conv1", "block3"], {"conv1": 0.7, "block3": 0.7}
    yield ["block2", "projector"], {s: 0.7 for s in row if s == "block2" or PART[s] == "projector"}
    taus = {"block3": 1.0, "block4": 0.2, "projector": 0.0, "projector.fc2": 0.9}
    yield taus, {s: taus.get(s, taus.get(PART[s])) for s in row if s in taus or PART[s] in taus}


def students(net, x, teacher):
    """The student's outputs: of each part, and of the stage that the teacher continues from."""
    with kept_outputs(net, [teacher.entry] if teacher.entry else []) as kept:
        out = {"backbone": net.backbone(x)}
        out["projector"] = (net.head if hasattr(net, "head") else net.projector)(out["backbone"])
        out |= {"predictor": net.predictor(out["projector"])} if hasattr(net, "predictor") else {}
    return out | kept


def teacher_of(net, spec, buffers="own"):
    attributes = {"projector": "head"} if hasattr(net, "head") else {}
    names = {part: attributes.get(part, part) for part in ("backbone", "projector", "predictor")}
    parts = {part: getattr(net, name) for part, name in names.items() if hasattr(net, name)}
    row = stage_row(parts, attributes)
    return Teacher(net, row, MomentumConfig(base_tau=0.7, stages=spec).taus(row), buffers)


def walk(net, scale=0.1):
    """What an optimizer does to the student."""
    with torch.no_grad():
        for name, p in net.named_parameters():
            if p.requires_grad and not name.startswith("momentum_"):
                p.add_(torch.randn_like(p) * scale)


@pytest.mark.parametrize("buffers", ["own", "ema"])
@pytest.mark.parametrize(
    ("kind", "spec", "ema"),
    [pytest.param(kind, *scope, id=f"{kind}-{scope[0]}") for kind in BY_HAND for scope in scopes(kind)],
)
def test_teacher_of_any_network_equals_a_whole_one_run_by_hand(kind, spec, ema, buffers):
    """Outputs, weights and buffers of 5 updates; the copies hold the owned tensors and nothing else."""
    net, row = network(kind), BY_HAND[kind]
    names = list(row)
    first = min((names.index(stage) for stage in ema), default=len(names))
    # the student without its teacher, and a whole momentum network, of which the owned end is looked at
    student, shadow = network(kind), network(kind)
    for module in shadow.modules():
        if buffers != "own" and isinstance(module, torch.nn.BatchNorm1d | torch.nn.BatchNorm2d):
            module.momentum = 0.0
    stage_of = {
        key: next(s for s, (paths, _) in row.items() if any(key == p or key.startswith(f"{p}.") for p in paths))
        for key in net.state_dict()
    }
    owned = {key for key, stage in stage_of.items() if names.index(stage) >= first}

    teacher = teacher_of(net, spec, buffers)
    assert {key for key in net.state_dict() if key.startswith("momentum_")} == {f"momentum_{key}" for key in owned}
    copy.deepcopy([m for name, m in net.named_children() if name.startswith("momentum_")], reached := {})
    assert sum(isinstance(thing, torch.Tensor) for thing in reached.values()) == len(owned)

    for step in range(5):
        x = torch.randn(6, 3, 16, 16).double()
        student.load_state_dict({key: value for key, value in net.state_dict().items() if key in stage_of})
        h, expected = x, {}
        with torch.no_grad():
            for i, (stage, (_, run)) in enumerate(row.items()):
                h = run(student if i < first else shadow, h)
                expected[PART[stage]] = h
        seen, last = students(net, x, teacher), PART[names[-1]]
        outputs = teacher(x, seen, last)
        assert outputs.keys() == expected.keys() and not any(out.requires_grad for out in outputs.values())
        for part, out in outputs.items():
            torch.testing.assert_close(out, expected[part], rtol=1e-9, atol=1e-10, msg=part)

        walk(net)
        teacher.update(step, 5)
        new = net.state_dict()
        for key, value in shadow.state_dict().items():
            base = ema.get(stage_of[key], 0.0)
            tau = base if base in (0.0, 1.0) else 1 - (1 - base) * (math.cos(math.pi * step / 5) + 1) / 2
            is_buffer = "running" in key or "tracked" in key
            tau = 0.0 if "tracked" in key else tau
            if not is_buffer or buffers != "own":
                value.copy_(tau * value + (1 - tau) * new[key])
    end = net.state_dict()
    for key in owned:
        torch.testing.assert_close(
            end[f"momentum_{key}"],
            shadow.state_dict()[key],
            rtol=1e-9,
            atol=1e-10,
            msg=lambda m, key=key: f"{key}: {m}",
        )


@pytest.mark.parametrize("kind", BY_HAND)
def test_tau_0_gives_the_students_outputs_and_tau_1_the_first_weights(kind):
    sharing, frozen = network(kind), network(kind)
    parts = ["backbone", "projector", *(["predictor"] if kind != "dino-vit" else [])]
    follower, statue = teacher_of(sharing, dict.fromkeys(parts, 0.0)), teacher_of(frozen, dict.fromkeys(parts, 1.0))
    start = copy.deepcopy(frozen.state_dict())
    for step in range(3):
        walk(sharing)
        walk(frozen)
        follower.update(step, 3)
        statue.update(step, 3)
        x = torch.randn(6, 3, 16, 16).double()
        seen = students(sharing, x, follower)
        for part, out in follower(x, seen, parts[-1]).items():
            torch.testing.assert_close(out, seen[part].detach(), rtol=0, atol=0)
    for name, p in frozen.named_parameters():
        assert torch.equal(p, start[name]) == (name.startswith("momentum_") or not p.requires_grad), name


@pytest.mark.parametrize("kind", ["mocov3-vit", "dino-vit"])
def test_ema_on_conv1_moves_tokens_and_positions(kind):
    net = network(kind)
    teacher = teacher_of(net, ["conv1"])
    start = copy.deepcopy(net.momentum_backbone.state_dict())
    walk(net)
    teacher.update(0, 5)
    tokens = ["cls_token", "patch_embed.proj.weight", *(["pos_embed", "reg_token"] if kind == "dino-vit" else [])]
    for name in tokens:
        moved = net.momentum_backbone.get_parameter(name) - start[name]
        way = net.backbone.get_parameter(name) - start[name]
        torch.testing.assert_close(moved, 0.3 * way, rtol=1e-9, atol=1e-12)
        assert moved.abs().max() > 0
    assert torch.equal(net.momentum_backbone.pos_embed, net.backbone.pos_embed) == (kind == "mocov3-vit")


@pytest.mark.parametrize("kind", BY_HAND)
def test_copies_of_a_part_survive_what_frameworks_do_to_modules(kind):
    """Moving, casting, SyncBatchNorm conversion, state_dict round trip and deep copy of a network with half a twin."""
    net = network(kind)
    teacher = teacher_of(net, ["block3"], "ema")
    teacher.update(0, 5)  # caches its pairs
    net = torch.nn.SyncBatchNorm.convert_sync_batchnorm(net).float().double().eval()
    walk(net)
    teacher.update(1, 5)
    other = network(kind)
    teacher_of(other, ["block3"], "ema")
    other.load_state_dict(copy.deepcopy(net).state_dict(), strict=True)
    for key, value in other.state_dict().items():
        if key.startswith(("momentum_head", "momentum_projector")):  # shared from block4 on
            assert torch.equal(value, other.state_dict()[key.removeprefix("momentum_")]), key
    x = torch.randn(2, 3, 16, 16).double()
    seen = students(net, x, teacher)
    assert not torch.equal(teacher(x, seen, "projector")["projector"], seen["projector"])
    assert "BatchNorm" in repr(net) and net.train().momentum_backbone.training


def test_followers_keep_their_own_buffers_and_the_student_moves_once_per_view():
    model = build(momentum__stages=["conv1"])
    fit(model, random_batches(3))
    state = model.state_dict()
    for name in ("backbone.layer2.0.bn1", "projector.1"):
        assert state[f"{name}.num_batches_tracked"] == 6  # 3 steps, 2 views
        assert state[f"momentum_{name}.num_batches_tracked"] == 6
        torch.testing.assert_close(state[f"momentum_{name}.weight"], state[f"{name}.weight"], rtol=0, atol=0)
    assert not torch.equal(state["momentum_backbone.bn1.running_var"], state["backbone.bn1.running_var"])


@pytest.mark.parametrize(
    ("spec", "backbone_calls", "block4_calls", "copies"),
    [
        ("full", 4, 4, {"momentum_backbone", "momentum_projector"}),
        ("projector", 2, 2, {"momentum_projector"}),
        ("none", 2, 2, set()),
        (["block4", "projector"], 2, 4, {"momentum_backbone", "momentum_projector"}),
    ],
)
def test_what_a_step_costs(spec, backbone_calls, block4_calls, copies):
    """Backbone passes, layer4 passes, and the parts that exist at all."""
    model = build(momentum__stages=spec)
    calls = {"backbone": 0, "block4": 0}

    def count(name):
        def hook(*_):
            calls[name] += 1

        return hook

    for prefix in ("", "momentum_"):
        backbone = getattr(model, f"{prefix}backbone", None)
        if backbone is not None:
            backbone.register_forward_hook(count("backbone"))
            backbone.layer4.register_forward_hook(count("block4"))
    model.training_step(random_batches(1)[0], 0)
    assert calls == {"backbone": backbone_calls, "block4": block4_calls}
    assert {name for name, _ in model.named_children() if name.startswith("momentum_")} == copies


@pytest.mark.parametrize(("spec", "first"), [(["block4", "projector"], "block4"), ("projector.fc2", "projector.fc2")])
def test_teacher_starts_from_the_students_activation_of_the_same_view(spec, first):
    """The teacher's output equals running its copies by hand on the student's activation, without gradient."""
    model = build(momentum__stages=spec)
    with torch.no_grad():  # make the copies differ from the student
        for name, p in model.named_parameters():
            if name.startswith("momentum_"):
                p.add_(torch.randn_like(p) * 0.1)
    x = random_batches(1)[0][1][0]
    out = model.student(x)
    z = model.teach(x, out, "projector")["projector"]
    b, mp = model.backbone, model.momentum_projector
    if first == "block4":
        h = b.layer3(b.layer2(b.layer1(b.bn1(b.conv1(x)).relu())))
        h = model.momentum_backbone.layer4(h).mean((2, 3))
        by_hand = mp(h)
    else:
        p = model.projector
        by_hand = mp.get_submodule("3")(p[2](p[1](p[0](out["backbone"]))))
    torch.testing.assert_close(z, by_hand, rtol=1e-5, atol=1e-6)
    assert not z.requires_grad


def losses(**changes):
    """Losses of four steps; channel order and seeds equal, so equal methods give equal numbers."""
    model, seen = build(**changes), []

    class Tape(pl.Callback):
        def on_train_batch_end(self, trainer, module, outputs, *_):
            seen.append(outputs["loss"].item())

    fit(model, random_batches(4), callbacks=[Tape()])
    return seen


def test_tau_0_equals_sharing():
    shared = losses(momentum__stages="none")
    assert losses(momentum__stages={"projector": 0.0}) == pytest.approx(shared, rel=1e-6)
    assert losses(momentum__stages={"backbone": 0.0}) == pytest.approx(shared, rel=1e-5)
    assert losses(momentum__stages="full") != pytest.approx(shared, rel=1e-6)


def test_tau_1_is_a_frozen_copy_of_the_initial_weights():
    """ProjectorEMA, Table 7."""
    model = build(momentum__stages={"projector": 1.0})
    start = copy.deepcopy(model.momentum_projector.state_dict())
    fit(model, random_batches(3))
    for name, p in model.momentum_projector.named_parameters():
        assert torch.equal(p, start[name]), name
    assert not torch.equal(model.projector[0].weight, start["0.weight"])


def test_accumulation_updates_once_per_optimizer_step():
    model = build(momentum__schedule="constant")
    updates = []
    update = model.teacher.update
    model.teacher.update = lambda step, total: (updates.append((step, total)), update(step, total))
    fit(model, random_batches(6), accumulate_grad_batches=3)
    assert updates == [(0, 2), (1, 2)]


def test_monitoring_at_the_predictor_changes_nothing_but_the_predictors_copy():
    assert losses(gap__at="predictor", gap__every=1) == losses(gap__enabled=False)


def test_a_deep_copy_trains_on_its_own():
    """What feeds the teacher must belong to the copy."""
    model = build(momentum__stages="projector")
    twin = copy.deepcopy(model)
    with torch.no_grad():
        model.backbone.conv1.weight.zero_()
    batch = random_batches(1)[0]
    assert twin.training_step(batch, 0) == build(momentum__stages="projector").training_step(batch, 0)


@pytest.mark.parametrize("gap", [True, False])
def test_which_stages_there_are_does_not_depend_on_what_is_monitored(gap):
    model = build("byol", momentum__stages=["projector", "predictor"], gap__enabled=gap)
    assert list(model.teacher.taus) == PROJECTOR + PREDICTOR
    assert math.isfinite(model.training_step(random_batches(1)[0], 0))


def test_a_second_teacher_copies_the_student_and_nothing_else():
    net, x = network("resnet"), torch.randn(4, 3, 16, 16).double()
    first = teacher_of(net, "full")
    net.backbone.layer1.register_forward_hook(lambda *_: pytest.fail("a hook was copied"))
    row = stage_row({"backbone": net.backbone, "projector": net.projector, "predictor": net.predictor})
    slow = Teacher(net, row, MomentumConfig(base_tau=0.9, stages="full").taus(row), prefix="slow_")
    names = {name.split(".")[0] for name, _ in net.named_modules()} - {""}
    assert names == {f"{prefix}{part}" for prefix in ("", "momentum_", "slow_") for part in PARTS}
    walk(net)
    first.update(0, 5)
    untouched = teacher_of(network("resnet"), "full")(x, {}, "predictor")
    assert torch.equal(slow(x, {}, "predictor")["predictor"], untouched["predictor"])
    slow.update(0, 5)
    start = network("resnet").backbone.conv1.weight
    way, moved = net.backbone.conv1.weight - start, net.slow_backbone.conv1.weight - start
    torch.testing.assert_close(moved, 0.1 * way, rtol=1e-9, atol=1e-12)


def test_a_teacher_that_continues_inside_needs_the_students_outputs():
    model = build(momentum__stages=["block4", "projector"])
    with pytest.raises(KeyError, match="block3"):
        model.teach(torch.randn(2, 3, 16, 16), {}, "projector")


def test_the_loss_can_aim_at_the_teachers_predictor():
    changes = {"gap__enabled": False, "data__num_classes": 0, "momentum__target": "predictor"}
    for inter in (True, False):
        model = build("byol", momentum__inter=inter, **changes)
        batch = random_batches(1)[0]
        seen = [model.student(x) for x in batch[1]]
        aims = [model.teach(x, out, "predictor") for x, out in zip(batch[1], seen, strict=True)] if inter else seen
        pairs = [(seen[i]["predictor"].double(), aims[1 - i]["predictor"].double()) for i in (0, 1)]
        cosines = [torch.cosine_similarity(q, k).mean() for q, k in pairs]
        loss = model.training_step(batch, 0)
        assert loss.item() == pytest.approx(sum(2 - 2 * c.item() for c in cosines), rel=1e-5)


# Intra-momentum.


@pytest.mark.parametrize("stages", ["full", ["block4", "projector"], ["block2", "projector"]])
def test_the_intra_term_at_a_stage_compares_its_pooled_outputs(stages):
    changes = {"momentum__stages": stages, "gap__enabled": False, "data__num_classes": 0}
    plain, model = build(**changes), build(**changes, intra__weight=0.5, intra__target="block3")
    assert not hasattr(model, "momentum_predictor")
    with torch.no_grad():
        for net in (plain, model):
            for name, p in net.named_parameters():
                if name.startswith("momentum_"):
                    p.mul_(1.1)
    batch = random_batches(1)[0]
    inter, total = plain.training_step(batch, 0), model.training_step(batch, 0)
    expected = 0
    for x in batch[1]:
        b, t = model.backbone, getattr(model, "momentum_backbone", None)
        h = b.layer1(b.bn1(b.conv1(x)).relu())
        s = b.layer3(b.layer2(h)).mean((2, 3)).double()
        if stages == "full":
            h = t.layer1(t.bn1(t.conv1(x)).relu())
        owns = stages != ["block4", "projector"]
        m = t.layer3(t.layer2(h)).mean((2, 3)).double() if owns else s.detach()
        expected += 0.5 * (2 - 2 * torch.cosine_similarity(s, m).mean())
    assert (total - inter).item() == pytest.approx(0.5 * expected.item(), rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("target", ["predictor", "projector"])
@pytest.mark.parametrize("distance", ["cosine", "ce", "mse"])
def test_intra_term_is_added_to_the_loss(distance, target):
    """Total = inter + weight * mean over views of D(q, q_m or g_m), as printed (residual momentum, Eq. 5-9)."""
    changes = {"momentum__stages": "full", "gap__enabled": False, "data__num_classes": 0}
    plain = build("res_mocov3", **changes, intra__weight=0.0)
    model = build("res_mocov3", **changes, intra__weight=0.7, intra__distance=distance, intra__target=target)
    assert hasattr(model, "momentum_predictor") == (target == "predictor")
    batch = random_batches(1)[0]
    inter, total = plain.training_step(batch, 0), model.training_step(batch, 0)

    terms = []
    for x in batch[1]:
        out = model.student(x)
        s, t = out["predictor"].double(), model.teach(x, out, target)[target].double()
        if distance == "cosine":
            unit = (s / s.norm(dim=1, keepdim=True), t / t.norm(dim=1, keepdim=True))
            terms.append((unit[0] - unit[1]).pow(2).sum(1).mean())
        elif distance == "ce":
            terms.append(-((t / 4).softmax(1) * (s / 4).log_softmax(1)).sum(1).mean())
        else:
            terms.append(0.5 * (s.softmax(1) - t.softmax(1)).pow(2).sum(1).mean())
    assert (total - inter).item() == pytest.approx(0.7 * sum(terms).item() / 2, rel=1e-4)


def test_intra_term_switches_on_and_off():
    """Residual momentum, Fig. 12: on first."""
    term = IntraMomentum(weight=1.0, every=3)
    assert [term.active(step) for step in range(8)] == [True] * 3 + [False] * 3 + [True] * 2
    assert not IntraMomentum(weight=0.0).active(0)


def test_a_teacher_that_nothing_asks_does_not_run():
    model = build("mocov3", momentum__inter=False, gap__enabled=False)
    model.momentum_backbone.register_forward_hook(lambda *_: pytest.fail("the teacher ran"))
    model.training_step(random_batches(1)[0], 0)


def test_inter_off_takes_the_students_own_keys():
    """Residual momentum, Eq. 10: keys are the online projector's outputs with stop-gradient."""
    changes = {"gap__enabled": False, "data__num_classes": 0, "method_kwargs__loss_scale": "paper"}
    model = build("mocov3", momentum__inter=False, **changes)
    with torch.no_grad():  # a teacher that must not matter
        for p in model.momentum_projector.parameters():
            p.normal_()
    batch = random_batches(1)[0]
    loss = model.training_step(batch, 0)
    q, k = zip(*((out["q"].double(), out["z"].double()) for out in map(model, batch[1])), strict=True)
    unit = lambda v: v / v.norm(dim=1, keepdim=True)  # noqa: E731
    expected = 0
    for a, b in ((0, 1), (1, 0)):
        logits = unit(q[a]) @ unit(k[b]).T / 0.2
        expected -= 0.5 * (logits.diag() - logits.logsumexp(1)).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


# Schedule and refusals.


def test_tau_is_a_pure_function_of_the_step():
    tau = Tau(0.99, 1.0, "cosine")
    assert tau(0, 100) == pytest.approx(0.99)
    assert tau(50, 100) == pytest.approx(0.995)
    assert tau(100, 100) == pytest.approx(1.0)
    assert Tau(0.9, 1.0, "constant")(77, 100) == 0.9


def test_the_tau_that_is_logged_is_the_last_stages():
    model = build(momentum__stages={"block4": 0.5, "projector": 0.8}, momentum__schedule="constant")
    assert model.teacher.tau(3, 10) == 0.8 and build(momentum__stages="none").teacher.tau(3, 10) is None


@pytest.mark.parametrize(("tau", "halfway"), [(0.0, 0.0), (0.2, 0.35), (0.5, 0.5), (0.9, 0.9), (1.0, 1.0)])
def test_a_stage_of_its_own_tau_rises_to_the_final_one_and_never_falls(tau, halfway):
    model = build(momentum__stages={"projector": tau}, momentum__base_tau=0.4, momentum__final_tau=0.5)
    assert all(own(50, 100) == pytest.approx(halfway) for own in model.teacher.taus.values())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"momentum__stages": ["block5"]}, ["block5", "block4", "projector.fc2", "full"]),
        ({"momentum__stages": "projectr"}, ["projectr", "did you mean 'projector'"]),
        ({"momentum__stages": {"projector": 1.5}}, ["momentum.stages.projector", "1.5"]),
        ({"method": "simclr", "momentum__stages": ["predictor"]}, ["predictor"]),
        ({"method": "simclr", "momentum__target": "predictor"}, ["momentum.target", "SimCLR"]),
        ({"momentum__stages": "full", "intra__weight": 1.0, "intra__target": "block5"}, ["intra.target", "'block4'"]),
        ({"momentum__stages": ["block4"], "backbone__name": "timm/resnet10t"}, ["block4", "backbone"]),
        ({"momentum__stages": 3}, ["momentum.stages"]),
        ({"momentum__schedule": "cosin"}, ["momentum.schedule", "did you mean 'cosine'"]),
        ({"momentum__buffers": "mine"}, ["momentum.buffers", "own"]),
        ({"momentum__base_tau": float("nan")}, ["momentum.base_tau"]),
        ({"momentum__base_tau": 0.9, "momentum__final_tau": 0.5}, ["base_tau", "final_tau"]),
        ({"momentum__stages": "none", "intra__weight": 1.0}, ["intra.weight", "momentum.stages"]),
        ({"momentum__stages": "projector", "momentum__classifier": True}, ["momentum.classifier"]),
        ({"intra__distance": "cosin"}, ["intra.distance", "did you mean 'cosine'"]),
        ({"intra__every": 0}, ["intra.every"]),
        ({"gap__at": "backbone"}, ["gap.at"]),
        ({"method_kwargs__loss_scale": "big"}, ["method_kwargs.loss_scale"]),
        ({"backbone__name": "resnet81"}, ["backbone.name", "did you mean 'resnet18'"]),
        ({"backbone__kwargs": {"depth": 3}}, ["backbone.kwargs", "depth"]),
    ],
    ids=lambda value: str(value)[:50],
)
def test_what_cannot_work_is_refused_in_one_sentence(changes, words):
    with pytest.raises(ConfigError) as error:
        build(**changes)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


def test_only_the_student_drops():
    """Dropout and stochastic depth draw in the student; the teacher's targets are not drawn, but its norms train."""
    vit = {"name": "vit_tiny", "kwargs": {"img_size": 16, "patch_size": 8, "depth": 4, "embed_dim": 48}}
    vit["kwargs"] |= {"drop_path_rate": 0.5, "proj_drop_rate": 0.5, "attn_drop_rate": 0.5, "pos_drop_rate": 0.5}
    model = METHODS["byol"](tiny_config("byol", backbone=vit)).train()
    x = torch.randn(4, 3, 16, 16)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first, again = (model.teach(x, {}, "projector") for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[part], again[part]) for part in first)
    assert not torch.equal(model.student(x)["backbone"], model.student(x)["backbone"])
    assert model.momentum_projector[1].num_batches_tracked == 2
