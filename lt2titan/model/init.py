"""Building a model: on ``meta`` first, values later, equal whatever the layout over devices."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from lt2titan.config.section import ConfigError
from lt2titan.kernels.recurrence import FLA_MAX_KEY_WIDTH
from lt2titan.model.config import ModelConfig
from lt2titan.model.layers import Linear, RMSNorm
from lt2titan.model.lt2 import LT2


def build_on_meta(config: ModelConfig, backend: str) -> LT2:
    """The model without memory: shapes and names only.

    Raises:
        ConfigError: sizes that do not fit together, or not the backend.
    """
    config.validate()
    with torch.device("meta"):
        model = LT2(config, backend)
    if backend == "fla":
        _check_key_heads(model)
    return model


def _check_key_heads(model: LT2) -> None:
    """Refuse at the start what fla's recurrences would refuse in the first step."""
    for name, block in zip(model.config.layer_mixers, model.core.blocks, strict=True):
        state = block.mixer.state_spec(1, 1, None).get("recurrent")  # (B, H, K, V)
        if state is not None and state.shape[-2] > FLA_MAX_KEY_WIDTH:
            size = "a smaller state_size" if name == "mamba2" else "narrower heads"
            reason = (
                f"fla takes key heads up to {FLA_MAX_KEY_WIDTH} wide, and those of model.mixers.{name} have "
                f'{state.shape[-2]}: give it {size}, or use kernels.backend = "reference" (slow on a GPU)'
            )
            raise ConfigError("kernels.backend", "fla", reason)


def materialise(model: nn.Module, device: torch.device, seed: int, storage: torch.device | None = None) -> None:
    """Give the parameters memory on ``device`` and their initial values (LT2, arXiv 2605.20670, appendix C).

    Each parameter is drawn whole from a generator of its own, seeded by (seed, name), and every rank keeps its
    shard: the values depend neither on the number of ranks nor on the order of the modules.

    Args:
        device: where values are drawn; the same kind of device gives the same values.
        storage: where parameters are kept, if elsewhere (the CPU, with offloading).
    """
    model.to_empty(device=storage or device)
    modules = dict(model.named_modules())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            owner, _, leaf = name.rpartition(".")
            digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
            generator = torch.Generator(device).manual_seed(int.from_bytes(digest[:7], "little"))
            whole = torch.empty(parameter.shape, device=device)
            _fill(modules[owner], leaf, whole, generator)
            if isinstance(parameter, DTensor):
                # src_data_rank=None: every rank drew the same values, nothing need be sent.
                sharded = distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)
                parameter.to_local().copy_(sharded.to_local())
            else:
                parameter.copy_(whole)


def _fill(module: nn.Module, name: str, tensor: Tensor, generator: torch.Generator) -> None:
    if isinstance(module, Linear):
        _truncated_normal(tensor, module.init_std, generator)
    elif isinstance(module, nn.Embedding):
        _truncated_normal(tensor, module.embedding_dim**-0.5, generator)
    elif isinstance(module, RMSNorm):
        tensor.fill_(1.0)
    else:
        module.init_parameter(name, tensor, generator)  # type: ignore[operator]


def _truncated_normal(tensor: Tensor, std: float, generator: torch.Generator) -> None:
    """Normal of standard deviation ``std``, cut off at three of them."""
    if std == 0:
        tensor.zero_()
    else:
        nn.init.trunc_normal_(tensor, std=std, a=-3 * std, b=3 * std, generator=generator)
