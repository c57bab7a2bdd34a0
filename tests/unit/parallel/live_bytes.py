"""Memory as a run takes it."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Live(TorchDispatchMode):
    """Bytes of the tensors that operators make and that are still alive, now and at most; ``given`` do not count."""

    def __init__(self, given: list[Tensor]) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known: dict[int, Any] = {t.untyped_storage()._cdata: None for t in given}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._see(tensor.untyped_storage())
        return out

    def _see(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known[key] = weakref.finalize(storage, self._forget, key, size)
            self.now += size
            self.most = max(self.most, self.now)

    def _forget(self, key: int, size: int) -> None:
        del self._known[key]
        self.now -= size
