"""Measures of features without labels, against formulas written out, on cases whose answer is known, and of runs."""

import math

import numpy as np
import pytest
import torch
from tiny_runs import config, whole  # noqa: F401, a fixture

from solo_ext.cli.main import main
from solo_ext.evaluation import quality
from solo_ext.runs.run import Run
from solo_ext.schema import plain
from solo_ext.training import evaluate
from solo_ext.training.config import resolve, run_values


def features(n=40, views=4, width=6, noise=0.3):
    generator = torch.Generator().manual_seed(0)
    objects = torch.randn(n, 1, width, generator=generator) * torch.linspace(0.2, 2, width)
    return objects + noise * torch.randn(n, views, width, generator=generator)


def entropy_rank(values):
    shares = [v / sum(values) for v in values]
    return math.exp(-sum(p * math.log(p) for p in shares if p > 0))


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def test_against_formulas():
    z = features().double().numpy()
    first, (n, views, width) = z[:, 0], z.shape
    found = quality.quality(torch.from_numpy(z).float())
    assert found["rankme"] == pytest.approx(entropy_rank(np.linalg.svd(first, compute_uv=False)), rel=1e-4)
    u = unit(first)
    distances = [((u[i] - u[j]) ** 2).sum() for i in range(n) for j in range(i)]
    assert found["uniformity"] == pytest.approx(math.log(np.mean(np.exp(-2 * np.array(distances)))), rel=1e-4)
    assert found["spread"] == pytest.approx(u.std(0, ddof=1).mean() * width**0.5, rel=1e-4)
    pairs = [((unit(z[i, a]) - unit(z[i, b])) ** 2).sum() for i in range(n) for a in range(views) for b in range(a)]
    assert found["alignment"] == pytest.approx(np.mean(pairs), rel=1e-4)
    centres = z.mean(1)
    within = sum(np.outer(x - c, x - c) for xs, c in zip(z, centres, strict=True) for x in xs) / (n * views)
    between = sum(np.outer(c - centres.mean(0), c - centres.mean(0)) for c in centres) / n
    values = np.linalg.eigvals(np.linalg.inv(within + 1e-4 * np.eye(width)) @ between).real
    assert found["lidar"] == pytest.approx(entropy_rank(values + 1e-7), rel=1e-3)


def test_known_cases():
    line = torch.randn(50, 1, generator=torch.Generator().manual_seed(1)) * torch.ones(1, 8)
    assert quality.rankme(line) == pytest.approx(1, abs=1e-6)
    assert quality.rankme(torch.eye(8)) == pytest.approx(8, abs=1e-6)
    point = torch.ones(20, 3, 8)
    assert quality.alignment(point) == pytest.approx(0, abs=1e-9) and quality.uniformity(point[:, 0]) == 0
    assert quality.spread(point[:, 0]) == pytest.approx(0, abs=1e-9)
    sphere = torch.randn(2000, 64, generator=torch.Generator().manual_seed(2))
    assert quality.spread(sphere) == pytest.approx(1, abs=0.02)
    noise = torch.randn(200, 8, 16, generator=torch.Generator().manual_seed(3))
    told = torch.randn(200, 1, 16, generator=torch.Generator().manual_seed(4)) + 0.01 * noise
    assert quality.lidar(told) > quality.lidar(told * torch.tensor([1.0] * 2 + [1e-3] * 14)) > 1


def test_of_a_run(whole, capsys):  # noqa: F811
    words = ["quality", "--run", str(whole.dir), "images=30", "views=3"]
    assert main(words) == main([*words, "--teacher"]) == 0
    said = capsys.readouterr().out
    student, teacher = Run(whole.dir).evaluations["quality.json"]
    assert student["protocol"]["branch"] == "student" and teacher["protocol"]["branch"] == "teacher"
    assert (student["protocol"]["images"], student["protocol"]["views"]) == (30, 3)
    assert f"rankme {student['rankme']:.4g}" in said and 1 <= student["rankme"] <= 30
    assert main(["quality", "--run", str(whole.dir), "view=3"]) == 2
    assert "unknown key 'view'; did you mean 'views'?" in capsys.readouterr().err
    assert main(["quality", "--run", str(whole.dir), "views=1"]) == 2
    assert "views must be a whole number of at least 2, not 1" in capsys.readouterr().err


def test_views_are_of_their_image(whole, monkeypatch):  # noqa: F811
    """In the order that the measures expect: all views of the first image, then of the second."""
    seen = []
    monkeypatch.setattr(evaluate, "measured", lambda features: seen.append(features) or quality.quality(features))
    values = plain(run_values(whole.dir, "quality", ["images=7", "views=3"]))
    still = {"rrc": {"enabled": False}, "horizontal_flip": {"prob": 0}}
    values["augmentations"] = [view | still for view in values["augmentations"]]
    cfg = resolve(values, "quality")
    evaluate.quality(cfg)
    [z] = seen
    assert z.shape[:2] == (7, 3)
    assert torch.allclose(z[:, 0], z[:, 1]) and not torch.allclose(z[0, 0], z[1, 0])
