"""Conditions that several kernels share, each answered by the reason why not, or None."""

from functools import cache
from importlib.util import find_spec

import torch

from seqloom.attention.kernels.call import Call

HALF = (torch.float16, torch.bfloat16)


def first(*reasons: str | None) -> str | None:
    """The first reason there is."""
    return next((reason for reason in reasons if reason), None)


def lacks_extras(call: Call, honours: tuple[str, ...] = ()) -> str | None:
    """Which of softcap, slopes, dropout and allowed the call asks for and the kernel does not honour."""
    asked = {
        "softcap": ("no soft cap", call.softcap is not None),
        "slopes": ("no ALiBi", call.slopes is not None),
        "dropout": ("no dropout that is the same under every plan", call.dropout > 0),
        "allowed": ("no callable mask", call.allowed is not None),
    }
    return first(*(reason for name, (reason, wanted) in asked.items() if wanted and name not in honours))


def lacks_type(dtype: torch.dtype, types: tuple[torch.dtype, ...] = HALF) -> str | None:
    """Whether the kernel computes in this type."""
    return None if dtype in types else f"only {', '.join(str(each).removeprefix('torch.') for each in types)}"


def lacks_width(width: int, most: int) -> str | None:
    """Whether a head may be that wide."""
    return None if width <= most else f"heads of width {most} at most"


@cache
def installed(module: str) -> bool:
    """Whether a module can be found, without importing it; its parent packages are imported."""
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def lacks_gpu(device: torch.device, capabilities: range | None = None) -> str | None:
    """Whether `device` is a usable NVIDIA GPU whose compute capability begins with one of these numbers."""
    if device.type != "cuda":
        return "for CUDA GPUs"
    if not torch.cuda.is_available():
        return "no CUDA GPU here"
    if capabilities is None:
        return None
    if torch.version.hip is not None:
        return "for NVIDIA GPUs"
    major, minor = torch.cuda.get_device_capability(device)
    if major in capabilities:
        return None
    return f"for compute capability {capabilities[0]} to {capabilities[-1]}; this GPU has {major}.{minor}"


def lacks_determinism() -> str | None:
    """Whether the user asked for deterministic algorithms, for a kernel whose backward adds in any order."""
    asked = torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()
    return "its backward is not deterministic" if asked else None
