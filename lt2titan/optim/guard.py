"""Never take a step with a gradient that is not finite."""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor


class NonFiniteError(RuntimeError):
    """Too many steps in a row had a loss or gradient that is not finite."""


class NonFiniteGuard:
    """Skips steps without asking the device: the decision stays a tensor that the fused optimizer obeys.

    Loss and gradient norm must already be those of all ranks, so that all ranks decide alike. The counts travel to the
    host while later steps run, and are looked at LAG steps later: nobody waits (but for parameters that are offloaded:
    they step on the host), and every rank stops at the same step.
    """

    LAG = 2

    def __init__(self, max_in_a_row: int, device: torch.device) -> None:
        self.max_in_a_row = max_in_a_row
        self._counts = torch.zeros(2, dtype=torch.int64, device=device)  # skipped since the start, skipped in a row
        self._on_their_way: deque[tuple[Tensor, torch.cuda.Event | None]] = deque()

    def step(self, optimizer: torch.optim.Optimizer, loss: Tensor, grad_norm: Tensor) -> None:
        """Take the optimizer's step unless ``loss`` or ``grad_norm`` (scalars) is not finite."""
        bad = ~(torch.isfinite(loss) & torch.isfinite(grad_norm))
        # The same door that torch.amp.GradScaler uses: fused optimizers leave parameters and state as they are where
        # found_inf is 1. Offloaded parameters are on the host, which has to wait for it: the optimizer itself would
        # send it there without waiting, and read what had been there before.
        device = optimizer.param_groups[0]["params"][0].device
        optimizer.found_inf = bad.float().to(device)  # type: ignore[attr-defined]
        optimizer.grad_scale = None  # type: ignore[attr-defined]
        optimizer.step()
        skipped, in_a_row = self._counts
        self._counts = torch.stack([skipped + bad, torch.where(bad, in_a_row + 1, 0)])
        self._send()

    def check(self, last: bool = False) -> None:
        """Stop a run that makes no progress: look at the counts as they were LAG steps ago, or at the ``last`` too.

        Raises:
            NonFiniteError: ``max_in_a_row`` steps in a row had been skipped.
        """
        while len(self._on_their_way) > (0 if last else self.LAG):
            counts, arrived = self._on_their_way.popleft()
            if arrived is not None:
                arrived.synchronize()
            if (in_a_row := int(counts[1])) >= self.max_in_a_row:
                raise NonFiniteError(
                    f"{in_a_row} steps in a row had a loss or gradient that is not finite; none was applied. Lower "
                    "optimizer.lr, lengthen lr_scheduler.warmup_steps, or resume from an earlier checkpoint "
                    "(checkpoint.load_step); training.max_skipped_steps sets how many are borne"
                )

    def counts(self) -> tuple[int, int]:
        """(steps skipped so far, how many of them in a row just now). Waits for the device."""
        n_skipped, in_a_row = self._counts.tolist()
        return n_skipped, in_a_row

    def restore(self, n_skipped: int, in_a_row: int) -> None:
        """Continue the counts of a checkpoint."""
        self._counts = torch.tensor([n_skipped, in_a_row], device=self._counts.device)

    def _send(self) -> None:
        if self._counts.device.type == "cpu":
            self._on_their_way.append((self._counts, None))
            return
        host = torch.empty(2, dtype=torch.int64, pin_memory=True)
        host.copy_(self._counts, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        self._on_their_way.append((host, arrived))
