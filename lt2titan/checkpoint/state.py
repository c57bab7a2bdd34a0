"""What a checkpoint holds besides counters, as flat names and tensors: model, optimizer and random states.

Names follow the parameters (``optimizer.<parameter>.<field>``), not their order, so that parameter groups and
the layout over devices may change between save and load.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.tensor import DTensor

from lt2titan.checkpoint.storage import (
    MODEL_PREFIX,
    CheckpointError,
    empty_stored,
    json_to_tensor,
    stored_tensors,
    tensor_to_json,
)

OPTIMIZER_PREFIX = "optimizer."
Tensors = dict[str, torch.Tensor]


# --- model ----------------------------------------------------------------------------------------


def model_tensors(model: torch.nn.Module) -> Tensors:
    """``model.<name>`` -> parameter or persistent buffer (the model's own memory: loading into it loads
    it).
    """
    tensors: Tensors = {}
    for name, value in get_model_state_dict(model).items():
        if not isinstance(value, torch.Tensor):
            raise ValueError(f"{name} of the model is a {type(value).__name__}: only tensors can be stored")
        tensors[MODEL_PREFIX + name] = _plain(value)
    return tensors


def _plain(value: torch.Tensor) -> torch.Tensor:
    """The same memory without torchao's wrapper of shards that FSDP2 gathers in float8: a checkpoint does not depend
    on how products are computed."""
    value = value.detach()
    if isinstance(value, DTensor) and hasattr(value.to_local(), "fsdp_pre_all_gather"):
        shard = value.to_local()._tensor  # type: ignore[attr-defined]
        return DTensor.from_local(
            shard, value.device_mesh, value.placements, run_check=False, shape=value.shape, stride=value.stride()
        )
    return value


def check_model_fits(tensors: Tensors, metadata: Metadata, where: str) -> list[str]:
    """Raise CheckpointError unless the checkpoint has exactly the model's ``tensors``, in their shapes.

    Returns remarks for the log, on dtypes that loading converts.
    """
    stored = stored_tensors(metadata, MODEL_PREFIX)
    problems = [f"{key} is missing" for key in sorted(tensors.keys() - stored.keys())]
    problems += [f"the model has no {key}" for key in sorted(stored.keys() - tensors.keys())]
    conversions: set[str] = set()
    for key in sorted(tensors.keys() & stored.keys()):
        size, dtype = stored[key].size, stored[key].properties.dtype
        if size != tensors[key].shape:
            problems.append(f"{key} is {tuple(size)} there and {tuple(tensors[key].shape)} in the model")
        if dtype != tensors[key].dtype:
            conversions.add(f"weights stored in {dtype} are converted to {tensors[key].dtype}")
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise CheckpointError(
            f"{where} does not fit the model: {'; '.join(problems[:5])}{more}. Use the [model] section of "
            "the run that wrote it (its config.toml), or choose another job.dump_folder to train this model"
        )
    return sorted(conversions)


def parameter_names(model: torch.nn.Module) -> dict[torch.Tensor, str]:
    """Name of each parameter; a parameter with two names (tied weights) has the first."""
    return {parameter: name for name, parameter in model.named_parameters()}


# --- optimizer ------------------------------------------------------------------------------------


def optimizer_tensors(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> Tensors:
    """``optimizer.<parameter>.<field>`` -> tensor; parameters that were never stepped have none."""
    names = parameter_names(model)
    tensors: Tensors = {}
    for parameter, fields in optimizer.state.items():
        if parameter not in names:
            raise ValueError(f"the optimizer has a parameter of shape {tuple(parameter.shape)}, the model not")
        for field, value in fields.items():
            key = f"{OPTIMIZER_PREFIX}{names[parameter]}.{field}"
            if not isinstance(value, torch.Tensor):
                raise ValueError(f"{key} is a {type(value).__name__}: only tensors can be stored")
            if isinstance(parameter, DTensor) and not isinstance(value, DTensor) and value.numel() > 1:
                raise ValueError(f"{key} may differ from rank to rank but is no DTensor: it cannot be stored")
            tensors[key] = value
    return tensors


def optimizer_template(model: torch.nn.Module, optimizer: torch.optim.Optimizer, metadata: Metadata) -> Tensors:
    """Empty tensors for the stored state of the optimizer's parameters, laid out as the parameters are."""
    names = parameter_names(model)
    owned = {names[p]: p for group in optimizer.param_groups for p in group["params"]}
    template: Tensors = {}
    for key, entry in stored_tensors(metadata, OPTIMIZER_PREFIX).items():
        name, field = key.removeprefix(OPTIMIZER_PREFIX).rsplit(".", 1)
        if name not in owned:
            continue
        if field != "step" and owned[name].shape == entry.size:
            template[key] = torch.empty_like(_plain(owned[name]), dtype=entry.properties.dtype)
        else:
            template[key] = empty_stored(entry)
    return template


def load_optimizer(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, tensors: Tensors, groups: list[dict[str, Any]]
) -> list[str]:
    """Give ``optimizer`` (stepped or not) the state in ``tensors``. Returns remarks for the log.

    The learning rate, which a schedule moves, is taken from the stored ``groups``; other settings stay as the
    present configuration has them, and a difference is remarked. A parameter without a stored state (it never
    had a gradient) begins without one.
    """
    names = parameter_names(model)
    fields_by_name: dict[str, Tensors] = {}
    for key, tensor in tensors.items():
        name, field = key.removeprefix(OPTIMIZER_PREFIX).rsplit(".", 1)
        fields_by_name.setdefault(name, {})[field] = tensor
    settings_by_name = {name: group["settings"] for group in groups for name in group["parameters"]}

    remarks: set[str] = set()
    packed = optimizer.state_dict()
    packed["state"] = {}
    for packed_group, group in zip(packed["param_groups"], optimizer.param_groups, strict=True):
        present = _settings(group)
        for index, parameter in zip(packed_group["params"], group["params"], strict=True):
            name = names[parameter]
            stored = settings_by_name.get(name, {})
            if name in fields_by_name:
                packed["state"][index] = fields_by_name[name]
            elif tensors:
                remarks.add(f"optimizer: no stored state for {name}, it begins without one")
            for setting in stored.keys() & present.keys() - {"lr"}:
                if stored[setting] != present[setting]:
                    remarks.add(
                        f"optimizer: {setting} was {stored[setting]} in the checkpoint; the configuration's "
                        f"{present[setting]} is used"
                    )
            if "lr" in stored:
                is_tensor = isinstance(group["lr"], torch.Tensor)
                packed_group["lr"] = torch.full_like(group["lr"], stored["lr"]) if is_tensor else stored["lr"]
    optimizer.load_state_dict(packed)
    return sorted(remarks)


def optimizer_groups(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """The parameter groups as JSON: names of the parameters, and settings (learning rate, betas, ...)."""
    names = parameter_names(model)
    return [
        {"parameters": [names[parameter] for parameter in group["params"]], "settings": _settings(group)}
        for group in optimizer.param_groups
    ]


def _settings(group: dict[str, Any]) -> dict[str, Any]:
    """What JSON can hold of a parameter group; betas become a list, a tensor learning rate a float."""
    settings: dict[str, Any] = {}
    for key, value in group.items():
        if isinstance(value, torch.Tensor) and value.numel() == 1:
            settings[key] = value.item()
        elif isinstance(value, tuple):
            settings[key] = list(value)
        elif value is None or isinstance(value, (bool, int, float, str)):
            settings[key] = value
    return settings


# --- random states --------------------------------------------------------------------------------


def rng_tensors(rank: int) -> Tensors:
    """Random states of this rank: torch on CPU, the current CUDA device if in use, Python and numpy."""
    numpy_state: dict[str, Any] = dict(np.random.get_state(legacy=False))
    numpy_state["state"] = {"key": numpy_state["state"]["key"].tolist(), "pos": numpy_state["state"]["pos"]}
    version, words, gauss = random.getstate()
    host = {"python": [version, list(words), gauss], "numpy": numpy_state}
    tensors = {
        f"rng.rank{rank}.torch": torch.get_rng_state(),
        f"rng.rank{rank}.host": json_to_tensor(host, "random states"),
    }
    if torch.cuda.is_initialized():
        tensors[f"rng.rank{rank}.cuda"] = torch.cuda.get_rng_state()
    return tensors


def rng_template(rank: int, metadata: Metadata) -> Tensors:
    """Empty tensors for this rank's stored random states; none if the rank did not exist at save time."""
    return {key: empty_stored(entry) for key, entry in stored_tensors(metadata, f"rng.rank{rank}.").items()}


def restore_rng(rank: int, tensors: Tensors) -> list[str]:
    """Set this rank's random states to those in ``tensors``; what is missing there keeps what the seed gave
    it.

    Returns remarks for the log.
    """
    if f"rng.rank{rank}.torch" not in tensors:
        return []
    torch.set_rng_state(tensors[f"rng.rank{rank}.torch"])
    host = tensor_to_json(tensors[f"rng.rank{rank}.host"])
    version, words, gauss = host["python"]
    random.setstate((version, tuple(words), gauss))
    numpy_state = host["numpy"]
    numpy_state["state"]["key"] = np.array(numpy_state["state"]["key"], dtype=np.uint32)
    np.random.set_state(numpy_state)
    cuda = tensors.get(f"rng.rank{rank}.cuda")
    if cuda is not None and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(cuda)
    elif (cuda is not None) != torch.cuda.is_initialized():
        return ["random numbers: written on another kind of device; the device keeps the seed's state"]
    return []
