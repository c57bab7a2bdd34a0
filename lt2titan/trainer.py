"""The Trainer: build, loop, step, validate."""

from __future__ import annotations

import gc
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from lt2titan.build import build_model
from lt2titan.checkpoint.manager import CheckpointManager
from lt2titan.config.job import JobConfig
from lt2titan.config.provenance import resolved_toml
from lt2titan.data.device import model_inputs
from lt2titan.data.loader import Batch, ValidationText, batch_layout, build_loaders
from lt2titan.evaluation.loop_diagnostics import SLICE_ROWS, validation_diagnostics
from lt2titan.evaluation.validate import Evaluation, evaluate
from lt2titan.metrics.hardware import peak_flops, peak_memory_gib
from lt2titan.metrics.loop_statistics import LoopStatistics
from lt2titan.metrics.metrics_logger import METRICS_FILE, MetricsLogger
from lt2titan.metrics.profile_ranges import phase
from lt2titan.metrics.profiler import maybe_profile
from lt2titan.metrics.record import TrainingRecord, ValidationRecord
from lt2titan.metrics.throughput import Throughput
from lt2titan.model.flops import count_parameters, training_flops_per_token
from lt2titan.model.head import IGNORE_INDEX
from lt2titan.model.indexer_schedule import IndexerSchedule
from lt2titan.model.loop_schedule import LoopSchedule
from lt2titan.model.mixers.dsa import INDEXER_KL
from lt2titan.optim.clip import GradNorms, clip_grad_norm
from lt2titan.optim.guard import NonFiniteGuard
from lt2titan.optim.optimizer import build_optimizer
from lt2titan.optim.schedule import learning_rate_factor
from lt2titan.parallel.compile import RecompileWatch
from lt2titan.parallel.float8 import update_scales
from lt2titan.parallel.fsdp import kept_gathered, reshard, set_gradient_sync
from lt2titan.parallel.mesh import ParallelDims

logger = logging.getLogger("lt2titan")

CONFIG_FILE = "config.toml"


class StepResult(NamedTuple):
    """Of one optimizer step, on the device."""

    loss: Tensor  # mean over the valid tokens of all ranks
    indexer_kl: Tensor  # mean over tokens, layers and loops with gradients; 0 without indexers
    grad_norms: GradNorms
    loops: LoopStatistics | None  # where this step is diagnosed


class Trainer:
    """One process's share of a training run; a context manager, because metrics must be closed."""

    def __init__(self, config: JobConfig, device: torch.device) -> None:
        self.config, self.device = config, device
        self.is_main = dist.get_rank() == 0
        self.folder = Path(config.job.dump_folder)
        self.config_text = resolved_toml(config)
        torch.manual_seed(config.debug.seed)
        torch.use_deterministic_algorithms(config.debug.deterministic)

        self.dims = ParallelDims.build(config.parallelism, device.type)
        self.local_batch_size, self.n_microbatches = config.training.microbatches(self.dims.dp_size)
        self.model, self.layout = build_model(config, self.dims, device)
        self.optimizer = build_optimizer(self.model, config.optimizer)
        self.loop_schedule = LoopSchedule(config.model.loop, config.model.n_loops, config.debug.seed)
        self.indexers = IndexerSchedule(config.model)
        self.guard = NonFiniteGuard(config.training.max_skipped_steps, device)
        for warning in config.warnings() if self.is_main else []:
            logger.warning(warning)
        self._build_data()
        self.step = self.tokens_seen = 0
        self.last_loss: float | None = None
        self.last_evaluation: Evaluation | None = None
        self.last_checkpoint: Path | None = None
        self.checkpoints = CheckpointManager(self.folder / config.checkpoint.folder, config.checkpoint)
        self._restore()
        self._update_float8_scales()
        self.recompiles = self._compile()
        self._open_metrics()

    def _build_data(self) -> None:
        training, validation = self.config.training, self.config.validation
        text = ValidationText(
            enable=validation.enable,
            dataset=validation.dataset,
            dataset_path=validation.dataset_path,
            seq_len=validation.seq_len or training.seq_len,
            local_batch_size=validation.local_batch_size or self.local_batch_size,
            steps=validation.steps,
        )
        self.train_loader, self.validation_loader = build_loaders(
            self.config.data,
            dataset=training.dataset,
            dataset_path=training.dataset_path,
            seq_len=training.seq_len,
            local_batch_size=self.local_batch_size,
            dp_rank=self.dims.dp_rank,
            dp_size=self.dims.dp_size,
            vocab_size=self.config.model.vocab_size,
            validation=text,
            stretch=self.dims.context_rank,
            n_stretches=self.dims.context,
            pin_memory=self.device.type == "cuda",
        )

    @property
    def _data_shard(self) -> tuple[int, int] | None:
        """Whose data position this rank's is: a stream has one per data-parallel rank, everything else one for all."""
        return (self.dims.dp_rank, self.dims.dp_size) if self.config.data.streaming else None

    def _restore(self) -> None:
        """Continue from the run folder's checkpoint, start from another's weights, or from scratch; logs which."""
        loaded = self.checkpoints.restore(model=self.model, optimizer=self.optimizer, data_shard=self._data_shard)
        if loaded is None or not loaded.step:
            return
        self.step = loaded.step
        self.tokens_seen = int(loaded.train_state["tokens_seen"])
        self.guard.restore(int(loaded.train_state["skipped_steps"]), int(loaded.train_state["skipped_in_a_row"]))
        self.train_loader.load_state_dict(loaded.data_state)

    def _compile(self) -> RecompileWatch | None:
        """Compile everything that training and validation run, if compilation is asked for: on batches without a
        single target, which leave nothing behind."""
        config, validation = self.config, self.config.validation
        if not config.compile.enable:
            return None
        sizes = [(config.training.seq_len, self.local_batch_size)]
        if validation.enable:
            sizes.append((validation.seq_len or sizes[0][0], validation.local_batch_size or sizes[0][1]))
        stretch = self.dims.context_rank, self.dims.context
        layouts = [(batch_layout(config.data, seq_len, *stretch), n_rows) for seq_len, n_rows in sizes]
        batches = [model_inputs(layout.assemble([[]] * n_rows), self.device) for layout, n_rows in layouts]
        watch = RecompileWatch(config.compile.error_on_recompile)
        watch.warm_up(
            self.model,
            batches[0],
            batches[1] if validation.enable else None,
            [(n, self.loop_schedule.backward_loops(n)) for n in self.loop_schedule.shares(config.training.steps)],
            self.indexers.phases(self.step + 1, config.training.steps),
        )
        return watch

    def save(self) -> None:
        """Write a full checkpoint of the current step."""
        n_skipped, in_a_row = self.guard.counts()
        self.last_checkpoint = self.checkpoints.save(
            self.step,
            model=self.model,
            optimizer=self.optimizer,
            train_state={
                "tokens_seen": self.tokens_seen,
                "skipped_steps": n_skipped,
                "skipped_in_a_row": in_a_row,
            },
            data_state=self.train_loader.state_dict(),
            data_shard=self._data_shard,
            config_text=self.config_text,
        )

    def _open_metrics(self) -> None:
        training, loops = self.config.training, self.loop_schedule
        self.flops_per_token = {
            (n, sees_all): training_flops_per_token(
                self.model, training.seq_len, n, loops.backward_loops(n), sees_all
            ).model
            for n in range(1, self.config.model.n_loops + 1)
            for sees_all in (False, True)
        }
        if self.is_main:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / CONFIG_FILE).write_text(self.config_text, encoding="utf-8")
            parameters = count_parameters(self.model)
            logger.info(
                "%.1f M parameters (%.1f M in the core, applied %d times), %.3g training FLOPs per token",
                parameters.total / 1e6,
                parameters.core / 1e6,
                self.config.model.n_loops,
                self.flops_per_token[self.config.model.n_loops, False],
            )
            _, horizon = self.config.schedule
            logger.info("%s", loops.describe(horizon))
            if self.indexers.is_needed:
                logger.info("%s", self.indexers.describe())
            if self.config.job.print_config:
                logger.info("resolved configuration:\n%s", self.config_text)
        self.metrics = MetricsLogger(
            self.config.metrics,
            self.folder,
            steps=training.steps,
            resume_step=self.step,
            is_main=self.is_main,
            run_config=asdict(self.config),
        )
        self.throughput = Throughput(dist.get_world_size(), peak_flops(self.device), self.device)

    def train(self) -> None:
        """Step until training.steps; log, validate and save on the way and at the end."""
        config = self.config
        if self.step >= config.training.steps:
            logger.warning(
                "nothing to do: %s has reached step %d already; raise training.steps to go on, or choose another "
                "job.dump_folder to start anew",
                self.folder,
                self.step,
            )
        batches = iter(self.train_loader)
        with (
            _no_automatic_collection(),
            maybe_profile(
                config.profiling,
                self.folder,
                rank=dist.get_rank(),
                start_step=self.step,
                model=self.model,
                device=self.device,
                paused=self.throughput.paused,
            ) as profiler,
            self.recompiles.watching() if self.recompiles else nullcontext(),
        ):
            while self.step < config.training.steps:
                with self.throughput.data_wait(), phase("data"):
                    microbatches = [next(batches) for _ in range(self.n_microbatches)]
                result = self.train_step(microbatches)
                if self.metrics.should_log(self.step):
                    with phase("log"):
                        self._log(result)
                is_last = self.step == config.training.steps
                with phase("guard"):
                    self.guard.check(last=is_last)
                if config.validation.enable and (is_last or self.step % config.validation.freq == 0):
                    with self.throughput.paused(), phase("validation"):
                        self.validate()
                if self.checkpoints.is_due(self.step, last=is_last):
                    with self.throughput.paused(), phase("checkpoint"):
                        self.save()
                if self.recompiles:
                    self.recompiles.check(self.step)
                if self.step % config.training.gc_freq == 0:
                    with phase("garbage collection"):
                        gc.collect()
                profiler.step()
        self._summarise()

    def _summarise(self) -> None:
        """The end of the log: where the run stands and where its results lie."""
        if not self.is_main:
            return
        logger.info("finished at step %d, %s tokens seen", self.step, f"{self.tokens_seen:,}")
        if self.last_loss is not None:
            logger.info("training:   loss %.4f", self.last_loss)
        if self.last_evaluation:
            logger.info(
                "validation: loss %.4f, %.3f bits per byte",
                self.last_evaluation.loss,
                self.last_evaluation.bits_per_byte,
            )
        logger.info("metrics:    %s", self.folder / METRICS_FILE)
        if self.last_checkpoint:
            logger.info("checkpoint: %s", self.last_checkpoint)

    def train_step(self, microbatches: list[Batch]) -> StepResult:
        """One optimizer step over ``microbatches``. Nothing here waits for the device."""
        self.step += 1
        n_loops = self.loop_schedule.loops(self.step)
        n_backward_loops = self.loop_schedule.backward_loops(n_loops)
        sees_all = self.indexers.sees_all(self.step)
        with phase("count"):
            n_valid = torch.stack([(batch.targets != IGNORE_INDEX).sum() for batch in microbatches]).sum()
            n_valid = n_valid.to(self.device, non_blocking=True)
            dist.all_reduce(n_valid, group=self.dims.loss_group)
        n_tokens = sum(batch.tokens.numel() for batch in microbatches) * self.dims.dp_size * self.dims.context
        total, indexer_kl = totals = torch.zeros(2, device=self.device)
        is_diagnosed = self.config.metrics.loop_diagnostics and self.metrics.should_log(self.step)
        loops = LoopStatistics(self.config.model.n_loops, self.device) if is_diagnosed else None
        for i, batch in enumerate(microbatches, start=1):
            if self.layout.defers_reductions:
                set_gradient_sync(self.model, i == len(microbatches))
            with phase("forward"), self.model.core.observed_by(loops):
                loss, auxiliary = self.model(
                    **model_inputs(batch, self.device),
                    n_loops=n_loops,
                    n_backward_loops=n_backward_loops,
                    sees_all=sees_all,
                    with_auxiliary=True,
                )
                loss = loss / n_valid.clamp(min=1)
                objective = loss
                if (kl := auxiliary.get(INDEXER_KL)) is not None:
                    # A loss of the indexers' own: no other parameter gets a gradient from it, nor they from the loss.
                    objective = loss + self.indexers.objective(kl, n_tokens)
                    indexer_kl += kl.detach() / n_tokens
            with phase("backward"):
                objective.backward()
            total += loss.detach()
        with phase("clip"):
            reshard(self.model)
            dist.all_reduce(totals, group=self.dims.loss_group)
            indexer_kl /= max(self.indexers.n_visits(n_loops, n_backward_loops), 1)
            grad_norms = clip_grad_norm(self.model, self.config.training.max_norm)
        learning_rate = self.learning_rate()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        with phase("optimizer"):
            self.guard.step(self.optimizer, totals.sum(), grad_norms.total + grad_norms.apart)
            self.optimizer.zero_grad()
            self._update_float8_scales()

        self.tokens_seen += n_tokens
        self.throughput.add_step(n_tokens, self.flops_per_token[n_loops, sees_all])
        return StepResult(total, indexer_kl, grad_norms, loops)

    def _update_float8_scales(self) -> None:
        if self.config.float8.recipe == "tensorwise":
            update_scales(self.model, self.layout.loop_reshard)

    def learning_rate(self) -> float:
        """The learning rate of the current step (counted from 1)."""
        warmup_steps, total_steps = self.config.schedule
        scheduler = self.config.lr_scheduler
        return self.config.optimizer.lr * learning_rate_factor(
            self.step,
            warmup_steps=warmup_steps,
            total_steps=total_steps,
            decay_type=scheduler.decay_type,
            min_lr_factor=scheduler.min_lr_factor,
        )

    def _log(self, result: StepResult) -> None:
        n_skipped, _ = self.guard.counts()
        self.last_loss = result.loss.item()
        grad_norm, core, rest, apart = torch.stack(result.grad_norms).tolist()
        extra = {}
        if self.indexers.is_needed:
            extra = {"indexer_kl": result.indexer_kl.item(), "grad_norm/indexer": apart}
        if result.loops is not None:
            extra |= {"grad_norm/core": core, "grad_norm/rest": rest, **result.loops.figures()}
        sample = self.throughput.measure()
        self.metrics.log(
            TrainingRecord(
                step=self.step,
                loss=self.last_loss,
                grad_norm=grad_norm,
                lr=self.learning_rate(),
                loops=self.loop_schedule.loops(self.step),
                tokens_per_second=sample.tokens_per_second,
                tokens_seen=self.tokens_seen,
                mfu=sample.mfu,
                tflops=sample.tflops,
                memory_gib=peak_memory_gib(self.device),
                data_wait_fraction=sample.data_wait_fraction,
                skipped_steps=n_skipped,
                extra=extra,
            )
        )

    def validate(self) -> Evaluation:
        """Loss and bits per byte of the held-out text, and what each loop makes of its first rows, into the metrics."""
        assert self.validation_loader is not None  # only called when validation.enable
        sees_all = self.indexers.sees_all(self.step)
        evaluation = evaluate(
            self.model,
            self.validation_loader,
            self.device,
            self.config.validation.loops,
            self.dims.loss_group,
            sees_all,
        )
        extra = {f"validation_loss/loops_{n}": loss for n, loss in evaluation.loss_at.items()}
        if self.config.metrics.loop_diagnostics:
            rows = (self.config.validation.local_batch_size or self.local_batch_size) * self.dims.dp_size
            first_batches = islice(self.validation_loader, math.ceil(SLICE_ROWS / rows))
            with kept_gathered(self.model, self.layout.loop_reshard):
                extra |= validation_diagnostics(self.model, first_batches, self.device, sees_all)
        reshard(self.model)
        self.last_evaluation = evaluation
        self.metrics.log(
            ValidationRecord(
                step=self.step,
                validation_loss=evaluation.loss,
                bits_per_byte=evaluation.bits_per_byte,
                extra=extra,
            )
        )
        return evaluation

    def close(self, failed: bool = False) -> None:
        self.metrics.close(failed)

    def __enter__(self) -> Trainer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(failed=kind is not None)


@contextmanager
def _no_automatic_collection() -> Iterator[None]:
    """Garbage collections at different times on different ranks would make all of them wait."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
