"""Every method's losses are still those of tests/methods/golden/; see recapture_golden.py."""

import json
import math

import pytest
from frameworks import FRAMEWORKS, GOLDEN, METHODS_TESTED, framework_of
from recapture_golden import STEPS, golden_losses


def golden(framework):
    """name -> losses."""
    file = GOLDEN / f"{framework}.json"
    if not file.is_file():
        pytest.fail(f"there is no {file}: write it by python tests/recapture_golden.py {framework}")
    return json.loads(file.read_text())


def assert_golden(method, losses):
    for step, (loss, expected) in enumerate(zip(losses, golden(framework_of(method))[method], strict=False)):
        if not math.isclose(loss, expected, rel_tol=1e-6):
            pytest.fail(
                f"{method} differs from its golden losses first at step {step}: {loss:.10g}, not {expected:.10g}"
            )


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_every_method_has_its_losses(framework):
    rows = golden(framework)
    assert list(rows) == [name for name in METHODS_TESTED if framework_of(name) == framework]
    assert all(len(losses) == STEPS for losses in rows.values())


@pytest.mark.parametrize("method", METHODS_TESTED)
def test_losses_are_the_golden_ones(method):
    assert_golden(method, golden_losses(method, gap__enabled=False))


@pytest.mark.parametrize("method", METHODS_TESTED)
def test_measuring_the_gap_changes_no_loss(method):
    assert_golden(method, golden_losses(method, stop_after=4, gap__every=1, gap__at="predictor"))
