"""Choosing the implementation of the operators: once, when the model is built, then passed on as a string."""

from __future__ import annotations

import importlib.util
import logging
from importlib import metadata

import torch

from lt2titan.config.section import ConfigError

logger = logging.getLogger("lt2titan")

FLA_VERSION = "0.6"  # the inner functions that the wrappers call moved before and may move again
_INSTALL = "pip install 'flash-linear-attention==0.6.0' 'triton>=3.7.1'"
_OR_REFERENCE = "or set kernels.backend=reference (plain PyTorch, slow on a GPU)"


def resolve_backend(requested: str, device: torch.device) -> str:
    """Return the backend to run on `device`, 'reference' or 'fla', for `kernels.backend = requested`.

    'auto' is 'fla' on CUDA and 'reference' elsewhere. A GPU without usable kernels is an error, not a slow run.

    Raises:
        ConfigError: unknown name, 'fla' without CUDA, or fla and Triton missing, too old or known to compute wrong
            gradients on this GPU. The message says what to install.
    """
    if requested not in ("auto", "reference", "fla"):
        raise ConfigError("kernels.backend", requested, "must be one of auto, reference, fla")
    if requested == "reference" or (requested == "auto" and device.type != "cuda"):
        backend = "reference"
    elif device.type != "cuda":
        reason = f"needs a CUDA device, and this run is on {device.type}: use kernels.backend=auto or reference"
        raise ConfigError("kernels.backend", requested, reason)
    else:
        reason = fla_problem(torch.cuda.get_device_capability(device))
        if reason:
            raise ConfigError("kernels.backend", requested, reason)
        backend = "fla"
    versions = ", ".join(f"{name} {version}" for name, version in backend_versions().items())
    logger.info("kernels: %s on %s (requested %s; %s)", backend, device.type, requested, versions)
    return backend


def backend_versions() -> dict[str, str]:
    """Versions of what the backends are made of; 'missing' for a package that is not installed."""
    return {
        "torch": torch.__version__,
        "triton": _version("triton") or "missing",
        "fla": _version("fla-core") or _version("flash-linear-attention") or "missing",
    }


def fla_problem(capability: tuple[int, int]) -> str:
    """Why fla's kernels cannot be used on a GPU of this compute capability, with the way out; '' if they can.

    With Triton 3.4.0 up to 3.7.0 the gated backward gives wrong gradients on Hopper (flash-linear-attention issue
    640), unless fla runs that kernel through TileLang.
    """
    fla, triton = (_version("fla-core") or _version("flash-linear-attention")), _version("triton")
    missing = [name for name, version in (("flash-linear-attention", fla), ("triton", triton)) if version is None]
    if missing:
        return f"{' and '.join(missing)} not installed: {_INSTALL}, {_OR_REFERENCE}"
    assert fla is not None and triton is not None  # for the type checker
    if not fla.startswith(f"{FLA_VERSION}."):
        return f"flash-linear-attention {fla} is not supported (tested: {FLA_VERSION}.x): {_INSTALL}, {_OR_REFERENCE}"
    unsafe = capability[0] == 9 and (3, 4, 0) <= _numbers(triton) < (3, 7, 1)
    if unsafe and not _tilelang_takes_over():
        return (
            f"Triton {triton} computes wrong gated-delta-rule gradients on Hopper GPUs (all of 3.4.0 to 3.7.0 do): "
            f"pip install 'triton>=3.7.1' or tilelang, {_OR_REFERENCE}"
        )
    return ""


def _tilelang_takes_over() -> bool:
    """Whether fla will run the unsafe kernel with TileLang. fla itself raises if TileLang then refuses the shapes."""
    if importlib.util.find_spec("tilelang") is None:
        return False
    from fla.backends import TileLangBackend

    return TileLangBackend.can_use()


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, ...]:
    """'3.7.1+cu130' or '3.7.0.post1' -> (3, 7, 1), (3, 7, 0)."""
    numbers: list[int] = []
    for part in version.split("+")[0].split(".")[:3]:
        digits = "".join(c for c in part if c.isdigit())
        numbers.append(int(digits) if digits else 0)
    return tuple(numbers)
