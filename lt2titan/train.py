"""Entry point of every training process: ``python -m torch.distributed.run ... -m lt2titan.train [overrides]``.

`./run_train.sh` calls it after `python -m lt2titan.config` has refused what cannot work.
"""

from __future__ import annotations

import os
import sys
import time

import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record

from lt2titan.checkpoint.storage import CheckpointError
from lt2titan.config.loader import parse_arguments, world_size_from_environment
from lt2titan.config.section import ConfigError
from lt2titan.data.errors import DataError
from lt2titan.dry_run import show_dry_run
from lt2titan.metrics.jsonl import MetricsWriteError
from lt2titan.metrics.logging import init_logging
from lt2titan.optim.guard import NonFiniteError
from lt2titan.out_of_memory import DeviceMemoryError, explained
from lt2titan.parallel.compile import RecompileError
from lt2titan.parallel.distributed import process_group
from lt2titan.trainer import Trainer

MENDABLE = (
    CheckpointError,
    ConfigError,
    DataError,
    DeviceMemoryError,
    MetricsWriteError,
    NonFiniteError,
    RecompileError,
)


@record
def main() -> None:
    started = os.environ.get("WORLD_SIZE")  # by torchrun
    config = parse_arguments(sys.argv[1:], int(started) if started else world_size_from_environment())
    rank = int(os.environ.get("RANK", "0"))
    logger = init_logging()
    if config.debug.deterministic:  # cuBLAS reads it once, when CUDA starts
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    try:
        if config.comm.mode == "fake_backend":
            show_dry_run(config, world_size_from_environment())
            return
        with process_group() as device, explained(config, dist.get_world_size()), Trainer(config, device) as trainer:
            trainer.train()
    except MENDABLE as error:
        if rank != 0:  # torchrun's summary is the only place where the user sees what other ranks say
            if isinstance(error, ConfigError):  # rank 0 says the same in one line, and torchrun ends this wait
                time.sleep(10)
            raise
        # What the user can mend needs no traceback; everything else keeps its own.
        logger.error("%s", error)
        sys.exit(1)


if __name__ == "__main__":
    main()
    # Everything is saved and closed. Leave without tearing the interpreter down: a gloo thread that still runs aborts
    # the process ("terminate called without an active exception"; torch 2.13, one in ten two-rank processes on a busy
    # machine), and torchrun would report a finished run as failed.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
