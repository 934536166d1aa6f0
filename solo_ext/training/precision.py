"""The precision that was asked for, or the nearest that the hardware has."""

import logging

import torch

log = logging.getLogger("solo_ext")


def cpu_has_bf16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware (AVX-512 BF16 or AMX), so that bf16 is faster than float32."""
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # private, hence guarded
    return any(getattr(torch.cpu, check, bool)() for check in checks)


def pick_precision(requested: str | int, accelerator: str) -> str:
    """Lightning's precision string for `requested`; says so in one line where the hardware asks for another one.

    Args:
        requested: a Lightning precision; solo-learn's 16 means 16-mixed.
        accelerator: cpu, gpu, cuda, mps or auto.

    Returns:
        `requested`, but: mixed precision on a CPU is bf16-mixed if it has bfloat16 instructions, else 32; bf16-mixed on
        a GPU without bfloat16 is 16-mixed.
    """
    asked = {"16": "16-mixed", "bf16": "bf16-mixed"}.get(str(requested), str(requested))
    picked, why = asked, ""
    gpu_there = torch.cuda.is_available() or torch.backends.mps.is_available()
    if accelerator == "cpu" or (accelerator == "auto" and not gpu_there):
        if asked in ("16-mixed", "bf16-mixed"):
            picked = "bf16-mixed" if cpu_has_bf16() else "32"
            why = "this CPU has bfloat16, not float16" if cpu_has_bf16() else "this CPU has no 16-bit instructions"
    elif asked == "bf16-mixed" and torch.cuda.is_available() and not torch.cuda.is_bf16_supported(False):
        picked, why = "16-mixed", "this GPU has no bfloat16"
    if picked != asked:
        log.warning("precision %s instead of %s: %s", picked, requested, why)
    return picked
