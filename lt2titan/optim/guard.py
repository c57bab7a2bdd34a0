"""Never take a step with a gradient that is not finite."""

from __future__ import annotations

import torch
from torch import Tensor


class NonFiniteError(RuntimeError):
    """Too many steps in a row had a loss or gradient that is not finite."""


class NonFiniteGuard:
    """Skips steps without asking the device: the decision stays a tensor that the fused optimizer obeys.

    Loss and gradient norm must already be those of all ranks, so that all ranks decide alike.
    """

    def __init__(self, max_in_a_row: int, device: torch.device) -> None:
        self.max_in_a_row = max_in_a_row
        self._skipped = torch.zeros((), dtype=torch.int64, device=device)
        self._in_a_row = torch.zeros((), dtype=torch.int64, device=device)
        self._longest = torch.zeros((), dtype=torch.int64, device=device)

    def step(self, optimizer: torch.optim.Optimizer, loss: Tensor, grad_norm: Tensor) -> None:
        """Take the optimizer's step unless ``loss`` or ``grad_norm`` (scalars) is not finite."""
        bad = ~(torch.isfinite(loss) & torch.isfinite(grad_norm))
        # The same door that torch.amp.GradScaler uses: fused optimizers leave parameters and state as they are where
        # found_inf is 1.
        optimizer.found_inf = bad.float()  # type: ignore[attr-defined]
        optimizer.grad_scale = None  # type: ignore[attr-defined]
        optimizer.step()
        self._skipped += bad
        self._in_a_row = torch.where(bad, self._in_a_row + 1, 0)
        self._longest = torch.maximum(self._longest, self._in_a_row)

    def check(self) -> int:
        """Steps skipped so far. Waits for the device: call it where the loop waits anyway.

        Raises:
            NonFiniteError: ``max_in_a_row`` steps or more in a row were skipped.
        """
        if (longest := int(self._longest)) >= self.max_in_a_row:
            raise NonFiniteError(
                f"{longest} steps in a row had a loss or gradient that is not finite; none was applied. Lower "
                "optimizer.lr, lengthen lr_scheduler.warmup_steps, or resume from an earlier checkpoint "
                "(checkpoint.load_step); training.max_skipped_steps sets how many are borne"
            )
        return int(self._skipped)

    def restore(self, n_skipped: int) -> None:
        """Continue the count of a checkpoint."""
        self._skipped.fill_(n_skipped)
