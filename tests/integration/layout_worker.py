"""One rank of many training runs, one after another: starting processes takes longer than what they do.

python -m torch.distributed.run --nproc-per-node N layout_worker.py FOLDER NAME... runs the named cases and leaves in
FOLDER/NAME the run's folder, gradients.npz (of the first step, as the optimizer is given them), and "finished"; or
"failed" with a traceback, and leaves: the other ranks may be waiting for this one.
"""

from __future__ import annotations

import gc
import os
import sys
import time
import traceback
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch._dynamo
import torch._inductor.config
import torch.distributed as dist
from layout_cases import CASES, WIDE, Case
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from lt2titan.config.loader import load_config
from lt2titan.model.shares import local
from lt2titan.parallel.float8 import update_scales
from lt2titan.trainer import Trainer

CONFIG = Path(__file__).parents[1] / "assets" / "layouts.toml"


def unsettle(model: torch.nn.Module) -> None:
    """Move parameters that start neutral (rho, gates, low-rank maps), and so are no test of anything, in any layout
    alike."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        noise = 0.05 * torch.randn(parameter.shape, generator=generator)
        local = parameter.detach()
        if isinstance(parameter, DTensor):
            noise = distribute_tensor(noise, parameter.device_mesh, parameter.placements, src_data_rank=None).to_local()
            local = parameter.detach().to_local()
        local.add_(noise)


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def cast_in_parts(model: torch.nn.Module, n_parts: int) -> None:
    """Let each map in float8 compute as ``n_parts`` tensor-parallel ranks do: outputs (of o_proj and down_proj: inputs)
    and their gradients are cast part by part. A weight that is gathered in float8 keeps its one scale."""
    from torchao.float8.float8_linear import matmul_with_hp_or_float8_args

    from lt2titan.parallel.float8_linear import Float8Linear

    def forward(linear: Any, splits_input: bool, x: Tensor) -> Tensor:
        weights = local(linear.weight).chunk(n_parts, int(splits_input))
        inputs = x.chunk(n_parts, -1) if splits_input else [x] * n_parts
        parts = [
            matmul_with_hp_or_float8_args.apply(x, w.t(), linear.linear_mm_config, linear.config)
            for x, w in zip(inputs, weights, strict=True)
        ]
        return torch.stack(parts).sum(0) if splits_input else torch.cat(parts, -1)

    for name, module in model.named_modules():
        if isinstance(module, Float8Linear):
            splits_input = name.endswith(("o_proj", "down_proj"))
            module.forward = partial(forward, module, splits_input)  # type: ignore[method-assign]


def train(case: Case, folder: Path) -> None:
    overrides = ["--job.dump_folder", str(folder), "--data.cache_folder", str(folder.parent / "tokens")]
    if "--training.dataset" in case.overrides:
        overrides += ["--training.dataset_path", str(folder.parent / "documents.jsonl")]
    config = load_config(CONFIG, [*case.overrides, *overrides], dist.get_world_size())
    first: dict[str, np.ndarray[Any, Any]] = {}

    def keep(*_: Any) -> None:
        if not first:
            for name, parameter in trainer.model.named_parameters():
                if parameter.grad is not None:
                    first[name] = whole(parameter.grad).detach().float().numpy().copy()

    with Trainer(config, torch.device("cpu")) as trainer:
        unsettle(trainer.model)
        if case == case.reference and case.n_parts > 1:
            cast_in_parts(trainer.model, case.n_parts)
        if config.float8.recipe == "tensorwise":
            update_scales(trainer.model, trainer.layout.loop_reshard)
        trainer.optimizer.register_step_pre_hook(keep)
        trainer.train()
    if dist.get_rank() == 0:
        np.savez(folder / "gradients.npz", **first)  # type: ignore[arg-type]


def clean_up() -> None:
    """What a run leaves in its process for the next. Process groups stay: DTensor's caches name meshes by them."""
    torch._dynamo.reset()
    torch._C._dynamo.eval_frame._set_lru_cache(True)  # type: ignore[attr-defined]
    torch._inductor.config.emulate_precision_casts = False
    gc.collect()


def main(folder: Path, names: list[str]) -> None:
    torch.set_num_threads(1)
    cases = {case.name: case for own in [*CASES, *WIDE] for case in (own, own.reference)}
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    for name in names:
        own, start = folder / name, time.perf_counter()
        own.mkdir(exist_ok=True)
        try:
            train(cases[name], own)
            dist.barrier()
            clean_up()
        except BaseException:  # whatever it was: this case has failed, and a new launch goes on with the next
            (own / f"failed-{rank}").write_text(traceback.format_exc())
            os._exit(1)
        if rank == 0:
            (own / "finished").write_text(f"{time.perf_counter() - start:.1f}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
    os._exit(0)  # as lt2titan.train leaves: tearing down races with gloo's threads
