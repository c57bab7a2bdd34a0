"""Saving and resuming a training run: which checkpoint to start from, what goes into one, which ones stay."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch.distributed.checkpoint.state_dict import set_model_state_dict

from lt2titan.checkpoint import branch, folders, state, storage
from lt2titan.checkpoint.config import CheckpointConfig
from lt2titan.checkpoint.ranks import Ranks
from lt2titan.checkpoint.storage import HEADER_KEY, MODEL_PREFIX, CheckpointError, CheckpointWriteError
from lt2titan.version import __version__

logger = logging.getLogger("lt2titan")


@dataclass(frozen=True)
class Start:
    """Where a run begins; ``path`` is the step folder to load, None from scratch."""

    kind: Literal["resume", "warm start", "scratch"]
    path: Path | None = None
    model_only: bool = False


@dataclass(frozen=True)
class LoadedState:
    """What a checkpoint held besides model, optimizer and random states, which are already in place.

    ``step``, ``train_state`` and ``data_state`` are 0 and empty when only the model was taken.
    """

    path: Path
    config_text: str
    step: int = 0
    train_state: dict[str, int | float] = field(default_factory=dict)
    data_state: dict[str, Any] = field(default_factory=dict)


class CheckpointManager:
    """Checkpoints of one run in ``folder`` (``step-N`` in it).

    Built after the process group, if there is one. All ranks call every method but ``is_due`` together; an
    error on one is raised on all.
    """

    def __init__(self, folder: Path, config: CheckpointConfig) -> None:
        self.folder = folder
        self.config = config
        self.ranks = Ranks()
        self._went_back_to: int | None = None  # until the first save has set the old branch aside

    # --- where to start ---------------------------------------------------------------------------

    def choose_start(self) -> Start:
        """Resume if the run has a checkpoint of its own, else warm start if one is requested, else scratch.

        Logs the choice. Raises CheckpointError when a requested step or path cannot be used, or when the run
        has checkpoints and all are damaged.
        """
        initial, model_only = self.config.initial_load_path, self.config.initial_load_model_only
        own = self._own_checkpoint() if self.config.enable else None
        if own is not None:
            unused = f"; checkpoint.initial_load_path = {initial} is not used" if initial else ""
            self._log(logging.INFO, f"resuming from {own}{unused}")
            return Start("resume", own)
        if initial:
            path = self.ranks.on_first(lambda: folders.resolve_checkpoint(initial))
            if damage := self._damage(path, MODEL_PREFIX if model_only else ""):
                raise CheckpointError(f"checkpoint.initial_load_path = {initial}: {path}: {damage}")
            self._log(logging.INFO, f"warm start from {path} ({'weights only' if model_only else 'full state'})")
            return Start("warm start", path, model_only)
        why = f"no checkpoint in {self.folder}" if self.config.enable else "checkpoint.enable = false"
        self._log(logging.INFO, f"starting from scratch ({why})")
        return Start("scratch")

    def newest_valid(self) -> Path | None:
        """The newest step folder that can be loaded; logs the newer ones that cannot, with the reason.

        None when there is nothing, or nothing but interrupted saves. Raises CheckpointError when there are
        checkpoints but all are damaged.
        """
        known_bad: dict[Path, folders.Problem] = {}
        while True:
            path, passed_over = self.ranks.on_first(lambda: folders.newest_valid(self.folder, known_bad))
            damage = self._damage(path) if path is not None else ""
            if path is None or not damage:
                break
            known_bad[path] = folders.Problem(damage)
        for bad, problem in passed_over.items():
            self._log(logging.WARNING, f"passing over {bad}: {problem}")
        return path

    def _own_checkpoint(self) -> Path | None:
        step = self.config.load_step
        if step == -1:
            return self.newest_valid()
        if self.ranks.on_first(lambda: branch.read_branch(self.folder)) == step:
            marker = self.folder / branch.BRANCH_FILE
            self._log(
                logging.INFO,
                f"checkpoint.load_step = {step}: the run went back to step {step} before (as {marker} says) and "
                "continues from its newest checkpoint; remove that file to go back once more",
            )
            if newest := self.newest_valid():
                return newest
        path = self.folder / f"step-{step}"
        problem = self.ranks.on_first(lambda: str(folders.find_problem(path) or "")) or self._damage(path)
        steps = self.ranks.on_first(lambda: folders.list_steps(self.folder))
        if problem:
            valid = self.ranks.on_first(lambda: [n for n, other in steps if not folders.find_problem(other)])
            choices = ", ".join(str(n) for n in sorted(valid) if n != step) or "none"
            raise CheckpointError(
                f"checkpoint.load_step = {step}: {path} cannot be used: {problem}. Other valid steps: {choices}"
            )
        if newer := ", ".join(str(n) for n, _ in reversed(steps) if n > step):
            self._log(
                logging.WARNING,
                f"going back to step {step}: the first save will set the newer steps {newer} aside, as "
                "abandoned-step-N; until then a start without checkpoint.load_step resumes from the newest",
            )
        self._went_back_to = step
        return path

    def _damage(self, path: Path, prefix: str = "") -> str:
        """What the checksums say of the tensors starting with ``prefix``; each rank reads a share. "" if
        sound.
        """
        if not self.config.verify_checksums:
            return ""

        def check_share() -> None:
            if damage := folders.find_bad_checksum(path, prefix, self.ranks.rank, self.ranks.size):
                raise CheckpointError(damage)

        try:
            self.ranks.on_all(check_share)
        except CheckpointError as error:
            return str(error)
        return ""

    # --- loading ----------------------------------------------------------------------------------

    def restore(
        self,
        *,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        data_shard: tuple[int, int] | None = None,
    ) -> LoadedState | None:
        """``choose_start`` and ``load`` in one; None from scratch."""
        start = self.choose_start()
        if start.path is None:
            return None
        wanted = None if start.model_only else optimizer
        return self.load(start.path, model=model, optimizer=wanted, data_shard=data_shard)

    def load(
        self,
        path: Path,
        *,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        data_shard: tuple[int, int] | None = None,
    ) -> LoadedState:
        """Load the step folder ``path`` into ``model`` and ``optimizer``, whatever layout wrote it.

        Without an optimizer only the weights are taken. With it also the random states (so call this after
        everything that draws random numbers) and, in the result, counters and data position. ``data_shard``
        is (data-parallel rank, degree), needed where the position was saved per shard. Raises
        CheckpointError when the checkpoint does not fit.
        """
        rank = self.ranks.rank
        reader = storage.SafeReader(path)
        metadata = self.ranks.on_all(reader.read_metadata)
        entries = storage.stored_tensors(metadata)
        if HEADER_KEY not in entries:
            raise CheckpointError(f"{path} has no header: not written by lt2titan")
        header_tensor = {HEADER_KEY: storage.empty_stored(entries[HEADER_KEY])}
        storage.read_tensors(header_tensor, reader, self.ranks.group)
        header = storage.tensor_to_json(header_tensor[HEADER_KEY])
        if header["format"] > storage.FORMAT_VERSION:
            raise CheckpointError(f"{path} was written by lt2titan {header['lt2titan']}; this one is too old")
        if optimizer is not None and header["model_only"]:
            raise CheckpointError(
                f"{path} holds weights only, training cannot be resumed from it: use it as "
                "checkpoint.initial_load_path with checkpoint.initial_load_model_only = true"
            )

        model_tensors = state.model_tensors(model)
        remarks = state.check_model_fits(model_tensors, metadata, str(path))
        optimizer_tensors, rng_tensors, data_tensors = {}, {}, {}
        if optimizer is not None:
            optimizer_tensors = state.optimizer_template(model, optimizer, metadata)
            rng_tensors = state.rng_template(rank, metadata)
            if header["data_degree"]:
                data_key = _data_key(data_shard, header["data_degree"], path)
                data_tensors = {data_key: storage.empty_stored(entries[data_key])}
        wanted = model_tensors | optimizer_tensors | rng_tensors | data_tensors
        storage.read_tensors(wanted, reader, self.ranks.group)
        # The tensors are the model's own, but modules may have load hooks.
        set_model_state_dict(model, {key.removeprefix(MODEL_PREFIX): t for key, t in model_tensors.items()})
        if optimizer is None:
            self._log(logging.INFO, f"loaded the weights of {path}", *remarks)
            return LoadedState(path, header["config"])

        remarks += state.load_optimizer(model, optimizer, optimizer_tensors, header["optimizer_groups"])
        remarks += state.restore_rng(rank, rng_tensors)
        if self.ranks.size > header["world_size"]:
            remarks.append(
                f"random numbers: ranks from {header['world_size']} on did not exist when the checkpoint was "
                "written, they keep the state that the seed gave them"
            )
        data_state = header["data"]
        for tensor in data_tensors.values():
            data_state = storage.tensor_to_json(tensor)
        self._log(
            logging.INFO,
            f"loaded step {header['step']}, written by {header['world_size']} process(es)",
            *remarks,
        )
        return LoadedState(path, header["config"], header["step"], header["train_state"], data_state)

    # --- saving -----------------------------------------------------------------------------------

    def is_due(self, step: int, last: bool = False) -> bool:
        """Whether a checkpoint belongs after ``step`` steps; ``last`` at the end of the run."""
        return self.config.enable and (last or step % self.config.interval == 0)

    def save(
        self,
        step: int,
        *,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        train_state: Mapping[str, int | float],
        data_state: Mapping[str, Any],
        data_shard: tuple[int, int] | None = None,
        config_text: str,
    ) -> Path | None:
        """Write ``step-N``, then remove what ``keep_latest_k`` does not keep. Returns the step folder.

        None when everything was written but rank 0 does not see a valid checkpoint (nodes without a shared
        folder): that is logged as an error and nothing is removed. The first save after going back to
        ``load_step`` sets the newer steps aside before it writes.

        ``data_state`` is JSON-able; it is the same on all ranks, or this rank's own when ``data_shard`` =
        (data-parallel rank, degree) is given. Raises CheckpointWriteError when the folder cannot be
        written: the partial one is then gone and earlier ones are untouched.
        """
        path = self.folder / f"step-{step}"

        def collect() -> state.Tensors:
            tensors = state.model_tensors(model)  # first: it makes FSDP put the parameters back into shards
            tensors |= state.optimizer_tensors(model, optimizer) | state.rng_tensors(self.ranks.rank)
            if data_shard is not None:
                key = f"data.shard{data_shard[0]}"
                tensors[key] = storage.json_to_tensor(dict(data_state), "the data position")
            if self.ranks.rank == 0:
                header = {
                    "format": storage.FORMAT_VERSION,
                    "model_only": False,
                    "lt2titan": __version__,
                    "torch": str(torch.__version__),
                    "world_size": self.ranks.size,
                    "step": step,
                    "train_state": dict(train_state),
                    "data_degree": data_shard[1] if data_shard is not None else 0,
                    "data": dict(data_state) if data_shard is None else {},
                    "optimizer_groups": state.optimizer_groups(model, optimizer),
                    "config": config_text,
                }
                tensors[HEADER_KEY] = storage.json_to_tensor(header, "the state of training or data")
            return tensors

        tensors = self.ranks.on_all(collect)
        self._set_old_branch_aside()
        try:
            self.ranks.on_first(lambda: folders.prepare_step(path, config_text))
            storage.write_tensors(tensors, path, self.ranks.group)
        except CheckpointError as error:
            outcome = self.ranks.on_first(lambda: _discard(path))
            raise CheckpointWriteError(
                f"checkpoint not saved: {error}. {outcome}; earlier checkpoints are kept. Make room there, "
                "or lower checkpoint.keep_latest_k, and start again"
            ) from error
        return path if self.ranks.on_first(lambda: self._finish(path)) else None

    def _set_old_branch_aside(self) -> None:
        step = self._went_back_to
        if step is None:
            return
        try:
            moved = self.ranks.on_first(lambda: branch.start_branch(self.folder, step))
        except CheckpointError as error:
            raise CheckpointWriteError(
                f"checkpoint not saved: the steps after {step} in {self.folder} could not be set aside: {error}. "
                "Nothing was removed. Mend that and start again"
            ) from error
        self._went_back_to = None
        if moved:
            names = ", ".join(path.name for path in moved)
            self._log(logging.INFO, f"set aside in {self.folder}: {names} (not used or counted; remove at will)")

    def _finish(self, path: Path) -> bool:
        """Check what was written; if sound, remove interrupted saves and what ``keep_latest_k`` does not
        keep. Returns whether it is.
        """
        if problem := folders.find_problem(path):
            logger.error(
                "%s is not valid as rank 0 sees it (%s): do all nodes share that folder? Nothing is removed",
                path,
                problem,
            )
            return False
        logger.info("saved %s", path)
        others = [other for _, other in folders.list_steps(self.folder) if other != path]
        complete = [other for other in others if (other / storage.METADATA_FILE).exists()]
        removable = [other for other in others if other not in complete]
        if self.config.keep_latest_k > 0:
            removable += complete[self.config.keep_latest_k - 1 :]
        for other in removable:
            try:
                folders.remove_step(other)
            except OSError as error:
                logger.warning("%s could not be removed: %s", other, error)
        return True

    def _log(self, level: int, message: str, *remarks: str) -> None:
        """Log on rank 0; remarks are warnings."""
        if self.ranks.rank == 0:
            logger.log(level, message)
            for remark in remarks:
                logger.warning(remark)


def _discard(path: Path) -> str:
    """Remove a partial folder; says what became of it."""
    try:
        if path.exists():
            folders.remove_step(path)
    except OSError as error:
        return f"The partial folder could not be removed either ({error}), it will be ignored"
    return "The partial folder was removed"


def _data_key(data_shard: tuple[int, int] | None, stored_degree: int, path: Path) -> str:
    if data_shard is None or data_shard[1] != stored_degree:
        present = "is not a streaming one" if data_shard is None else f"runs at degree {data_shard[1]}"
        raise CheckpointError(
            f"{path} holds the position of a streaming data source at data-parallel degree {stored_degree}; "
            f"the present source {present}. Resume at degree {stored_degree}, or warm start in a new run folder "
            "with checkpoint.initial_load_path"
        )
    return f"data.shard{data_shard[0]}"
