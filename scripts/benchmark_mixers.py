"""What each token mixer costs: parameters, decode state, training speed and memory, and how exactly it decodes.

python scripts/benchmark_mixers.py [--mixers gdn kda] [--scale 0.6b] [--json FILE]

Every mixer trains its own recipe (train_configs/ablations/pure_<mixer>_<scale>.toml) on random tokens for a few steps;
then its freshly initialised model decodes token by token, which is compared with its full forward pass. One device.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
import tyro
from estimate import estimate
from rich import box
from rich.console import Console
from rich.table import Table

from lt2titan.config.job import JobConfig
from lt2titan.config.loader import ConfigFileError, load_config
from lt2titan.kernels.backend import backend_versions, resolve_backend
from lt2titan.metrics.logging import init_logging
from lt2titan.metrics.metrics_logger import METRICS_FILE
from lt2titan.model.config import ModelConfig
from lt2titan.model.init import build_on_meta, materialise
from lt2titan.model.lt2 import LT2
from lt2titan.model.mixers.config import MixersConfig
from lt2titan.model.state import allocate
from lt2titan.parallel.distributed import process_group
from lt2titan.trainer import Trainer

RECIPES = Path(__file__).resolve().parents[1] / "train_configs" / "ablations"


@dataclass(kw_only=True)
class Arguments:
    """Compare token mixers on this device."""

    mixers: list[str] = field(default_factory=MixersConfig.names)
    """Only these."""
    scale: str = "0.6b"
    """Recipes pure_<mixer>_<scale>.toml."""
    recipes: Path = RECIPES
    """Folder of the recipes."""
    steps: int = 10
    """Training steps; the first three are not counted."""
    seq_len: int = 4096
    """Tokens per training sequence."""
    batch_size: int = 4
    """Sequences per training step."""
    prompt: int = 224
    """Tokens read in one pass before decoding."""
    decode: int = 32
    """Tokens decoded one by one; 0 leaves the comparison out."""
    json: Path | None = None
    """Also write the results to this file."""


def configuration(mixer: str, arguments: Arguments, folder: str) -> JobConfig:
    options = {
        "training.dataset": "synthetic",
        "training.dataset_path": "",
        "training.steps": arguments.steps,
        "training.seq_len": arguments.seq_len,
        "training.local_batch_size": arguments.batch_size,
        "training.global_batch_size": arguments.batch_size,
        "lr_scheduler.warmup_steps": arguments.steps,
        "metrics.log_freq": 1,
        "job.dump_folder": folder,
    }
    switches = ["data.no_streaming", "checkpoint.no_enable", "validation.no_enable", "metrics.no_enable_tensorboard"]
    overrides = [text for key, value in options.items() for text in (f"--{key}", str(value))]
    recipe = arguments.recipes / f"pure_{mixer}_{arguments.scale}.toml"
    return load_config(recipe, [*overrides, *(f"--{name}" for name in switches)])


def train(config: JobConfig, device: torch.device) -> dict[str, float]:
    """Median tokens/s after the third step, the last step's MFU, peak memory, and the losses at both ends."""
    with Trainer(config, device) as trainer:
        trainer.train()
    lines = (Path(config.job.dump_folder) / METRICS_FILE).read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return {
        "tokens_per_second": median(record["tokens_per_second"] for record in records[3:]),
        "mfu": records[-1]["mfu"],
        "peak_memory_gib": max(record["memory_gib"] for record in records),
        "first_loss": records[0]["loss"],
        "last_loss": records[-1]["loss"],
    }


@torch.no_grad()
def decode_errors(config: ModelConfig, device: torch.device, n_prompt: int, n_decode: int) -> dict[str, float]:
    """Relative errors of the logits of decoded tokens, in the dtype that inference uses on this device.

    decode_error: prefill and token-by-token decoding against the full forward pass of the same model.
    forward_error: what the dtype and the kernels cost by themselves, for comparison: that full forward pass against
    the plain references in fp32.
    """
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = build_on_meta(config, resolve_backend("auto", device))
    materialise(model, device, seed=0)
    model.to(dtype)
    tokens = torch.randint(0, config.vocab_size, (1, n_prompt + n_decode), generator=torch.Generator().manual_seed(0))
    tokens = tokens.to(device)
    full = model(tokens)[:, n_prompt:].float()
    state = allocate(model, 1, tokens.shape[1], dtype, device)
    model(tokens[:, :n_prompt], state=state)
    decoded = torch.cat([model(tokens[:, t : t + 1], state=state) for t in range(n_prompt, tokens.shape[1])], dim=1)
    plain = reference_of(model, config)
    return {
        "decode_error": relative(decoded.float(), full),
        "forward_error": relative(full, plain(tokens)[:, n_prompt:]),
    }


def reference_of(model: LT2, config: ModelConfig) -> LT2:
    """The same weights in fp32 on the plain references."""
    plain = build_on_meta(config, "reference")
    plain.load_state_dict({name: value.float() for name, value in model.state_dict().items()}, assign=True)
    return plain


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got - want).norm() / want.norm())


def measure(mixer: str, arguments: Arguments, device: torch.device) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        config = configuration(mixer, arguments, folder)
        result: dict[str, Any] = {"mixer": mixer, **train(config, device)}
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    costs = estimate(config)
    result |= {"parameters": costs["parameters"]["total"], "decode_state_bytes": costs["decode_state_bytes"]}
    if arguments.decode:
        result |= decode_errors(config.model, device, arguments.prompt, arguments.decode)
    gc.collect()
    return result


def show(results: list[dict[str, Any]]) -> None:
    table = Table(
        "mixer",
        "parameters",
        "state, constant",
        "state per token",
        "tokens/s",
        "MFU",
        "peak GiB",
        "decode error",
        "forward error",
        box=box.SIMPLE_HEAD,
    )
    for row in results:
        state = row["decode_state_bytes"]
        table.add_row(
            row["mixer"],
            f"{row['parameters'] / 1e6:.0f} M",
            f"{state['constant']:,}",
            f"{state['per_token']:,}",
            f"{row['tokens_per_second']:,.0f}",
            "-" if row["mfu"] is None else f"{row['mfu']:.1%}",
            f"{row['peak_memory_gib']:.1f}",
            f"{row['decode_error']:.1e}" if "decode_error" in row else "-",
            f"{row['forward_error']:.1e}" if "forward_error" in row else "-",
        )
    Console(width=max(130, Console().width)).print(table)


def join_a_group_of_one() -> dist.TCPStore:
    """What torchrun would set for a single process. Keep what is returned, which holds the port until the process group
    shares it: a port that is free now may be taken by then.

    Raises:
        SystemExit: torchrun has started several processes.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        sys.exit(f"{Path(sys.argv[0]).stem}: measures one process; start it without torchrun")
    store = dist.TCPStore("localhost", 0, is_master=True, multi_tenant=True)
    alone = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "localhost", "MASTER_PORT": store.port}
    os.environ.update({name: str(value) for name, value in alone.items()})
    return store


def main() -> None:
    arguments = tyro.cli(Arguments, description=__doc__)
    unknown = sorted(set(arguments.mixers) - set(MixersConfig.names()))
    if unknown or arguments.steps <= 3:
        reason = f"--mixers {' '.join(unknown)}: there are {', '.join(MixersConfig.names())}" if unknown else ""
        sys.exit(f"benchmark_mixers: {reason or '--steps must be more than 3: the first three are not counted'}")
    init_logging()
    _store = join_a_group_of_one()
    results = []
    with process_group() as device:
        for mixer in arguments.mixers:
            try:
                results.append(measure(mixer, arguments, device))
            except ConfigFileError as error:
                sys.exit(f"benchmark_mixers: {error}")
            show(results[-1:])
        hardware = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"{hardware}, {backend_versions()}, {arguments.batch_size} x {arguments.seq_len} tokens a step")
    show(results)
    if arguments.json:
        report = {"device": hardware, "versions": backend_versions(), "results": results}
        arguments.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
