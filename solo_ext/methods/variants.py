"""The two ideas as variants of every framework, `projector_ema_<framework>` and `res_<framework>`.

A framework to which a paper gives more than its idea has a class of its own in `residual.py`.
"""

from typing import Any

from solo_ext.momentum import IntraMomentum


class ProjectorEMA:
    """Projector-only momentum: the second backbone pass is saved (arXiv 2208.05744, Sec. 2.2, Alg. 1).

    The paper has BYOL, DINO, MoCo v2+ and ReSSL (Tables 3, 5 and 6); the other frameworks go beyond it. All of DINO's
    head, prototypes included, is averaged. ReSSL's student runs the weak view for the teacher, without gradient.
    """

    teacher_stages = "projector"


class Res:
    """Residual momentum: the student is also pulled to the teacher on the same view (arXiv 2211.09861, Sec. 3.3, 3.4).

    The paper has MoCo v3, BYOL, ReSSL and SimSiam (Tables 1 to 5 and 16); the other frameworks go beyond it. Those
    without a predictor compare the projectors' outputs. A framework without a teacher gets a whole one, whose outputs
    are also its targets, unless `momentum.inter` is false.
    """

    intra = IntraMomentum(weight=1.0)


IDEAS: dict[str, type] = {"projector_ema": ProjectorEMA, "res": Res}


def variants(framework: Any, name: str) -> dict[str, Any]:
    """Name -> class of the variants of the `framework` that is registered as `name`."""
    classes = {}
    for prefix, idea in IDEAS.items():
        own = {"__module__": __name__, "__doc__": idea.__doc__}
        if idea is Res and framework.teacher_stages == "none":
            own["teacher_stages"] = "full"
        classes[f"{prefix}_{name}"] = type(f"{idea.__name__}{framework.__name__}", (idea, framework), own)
    return classes
