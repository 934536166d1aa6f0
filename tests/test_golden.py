"""Every method's losses are still those of tests/golden.json; see recapture_golden.py."""

import json
import math

import pytest
from recapture_golden import GOLDEN, NAMES, STEPS, golden_losses

EXPECTED = json.loads(GOLDEN.read_text())


def assert_golden(method, losses):
    for step, (loss, expected) in enumerate(zip(losses, EXPECTED[method], strict=False)):
        if not math.isclose(loss, expected, rel_tol=1e-6):
            pytest.fail(f"{method} differs from golden.json first at step {step}: {loss:.10g}, not {expected:.10g}")


def test_every_method_has_its_losses():
    assert list(EXPECTED) == NAMES
    assert all(len(losses) == STEPS for losses in EXPECTED.values())


@pytest.mark.parametrize("method", NAMES)
def test_losses_are_the_golden_ones(method):
    assert_golden(method, golden_losses(method, gap__enabled=False))


@pytest.mark.parametrize("method", NAMES)
def test_measuring_the_gap_changes_no_loss(method):
    assert_golden(method, golden_losses(method, stop_after=4, gap__every=1, gap__at="predictor"))
