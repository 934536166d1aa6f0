"""The GPU's kernels: against the renderer of CPUs, in Triton's interpreter, and whether they compile for GPUs."""

import importlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_render import EVERYTHING, LEVELS, crops, numbers
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from solo_ext.data import render
from solo_ext.data.augmentations import ProbConfig
from solo_ext.data.transforms import Transform
from solo_ext.data.views import JITTER_ORDERS, draw_views

pytest.importorskip("triton")
import triton

from solo_ext.data import fused

VIEWS = draw_views(EVERYTHING, numbers(24))._replace(
    equalize=np.zeros(24, bool)
)  # it enlarges what is rounded otherwise


@pytest.fixture
def interpreted(monkeypatch):
    """Lets the renderer use the kernels, here."""
    with monkeypatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        importlib.reload(fused)
        patch.setattr(render, "kernels", lambda device: fused)
        patch.setattr(render, "CHUNK", 2**40)
        yield
    importlib.reload(fused)


def finish(x, views=VIEWS):
    return render.finish(x, views, *map(torch.tensor, LEVELS))


@pytest.mark.parametrize("size", [1, 9, 33])  # the last of more than a block
@pytest.mark.parametrize("orders", [VIEWS.order, np.arange(len(JITTER_ORDERS))], ids=["drawn", "all"])
def test_kernels_make_the_same_views(request, size, orders):
    x, views = crops(24, size), VIEWS._replace(order=orders)
    expected = finish(x, views)
    request.getfixturevalue("interpreted")
    torch.testing.assert_close(finish(x, views), expected, rtol=0, atol=1e-3)


def test_both_axes_are_blurred(interpreted):
    x, taps = torch.rand(3, 3, 5, 9), torch.from_numpy(render._blur_taps(np.array([0.3, 1.0, 2.0]))).float()
    torch.testing.assert_close(fused.blur(x, taps), render._blur(x, taps))


class Launches(TorchDispatchMode):
    """Counts what a GPU would be given to do by PyTorch: no views and no empty tensors, but copies to it."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += not (function.is_view or function.name().startswith("aten::empty"))
        return function(*args, **kwargs or {})


class Transfers(TorchFunctionMode):
    count = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.Tensor.to
        return function(*args, **kwargs or {})


def test_a_view_of_a_batch_takes_at_most_40_launches(interpreted, monkeypatch):
    kernels, executor = [], triton.runtime.interpreter.GridExecutor
    call = executor.__call__

    def counted(*args, **options):
        kernels.append(args[0])
        with _disable_current_modes():  # the interpreter's own
            call(*args, **options)

    monkeypatch.setattr(executor, "__call__", counted)
    x = crops(24, 4).to(torch.uint8)
    with Transfers() as transfers, Launches() as launches:
        finish(x)
    assert len(kernels) == 4 and 10 < launches.count + transfers.count + len(kernels) <= 40


@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_compile_for_gpus(monkeypatch, tmp_path, capability):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    target = triton.backends.compiler.GPUTarget("cuda", capability, 32)
    for kernel in (fused._grays, fused._colours, fused._filter):
        integers = ("radius", "size", "pixels", "step")
        types = {name: "i32" if name in integers else "*fp32" for name in kernel.arg_names} | {"BLOCK": "constexpr"}
        source = triton.compiler.ASTSource(fn=kernel, signature=types, constexprs={"BLOCK": fused.BLOCK})
        assert triton.compile(source, target=target).asm["cubin"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_makes_the_same_views():
    x, u = crops(40, 224), numbers(40)
    transform = Transform.random(replace(EVERYTHING, equalization=ProbConfig()), *LEVELS)
    assert render.kernels(torch.device("cuda", 0)) is fused
    torch.testing.assert_close(transform.finish(x.cuda(), u).cpu(), transform.finish(x, u), rtol=0, atol=0.01)
