"""Sparse kernels as they are launched, compiled for a Hopper GPU, which needs none: they fit into its shared memory.

The interpreter says what they compute (test_fla_interpreter.py, test_dsa_interpreter.py), not whether Triton's compiler
takes them.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import pytest
import torch

if importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("needs Triton's compiler", allow_module_level=True)

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler import compile as compile_kernel

from lt2titan.kernels import nsa
from lt2titan.kernels.dsa import triton_scores, triton_select
from lt2titan.kernels.nsa import compressed_triton, selected_triton

HOPPER = GPUTarget("cuda", 90, 32)
SHARED_MEMORY = 227 * 1024
TYPES = {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int32: "*i32", int: "i32", float: "fp32"}


class Launched:
    """Stands in for a kernel: compiles what it would be started with, and returns at once."""

    def __init__(self, kernel: Any, shared: dict[str, int]) -> None:
        self.kernel, self.shared = kernel, shared

    def __getitem__(self, grid: Any) -> Any:
        return self.compile

    def compile(self, *args: Any, num_warps: int = 4, num_stages: int = 3, **constants: Any) -> None:
        names = self.kernel.arg_names
        types = {
            n: TYPES[x.dtype if isinstance(x, torch.Tensor) else type(x)] for n, x in zip(names, args, strict=False)
        }
        signature = {name: types.get(name, "constexpr") for name in names}
        assert types.keys().isdisjoint(constants) and types.keys() | constants.keys() == set(names)
        source = ASTSource(
            fn=self.kernel,
            signature=signature,
            constexprs={(names.index(name),): value for name, value in constants.items()},
            attrs={(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name].startswith("*")},
        )
        options = {"num_warps": num_warps, "num_stages": num_stages}
        binary = compile_kernel(source, target=HOPPER, options=options)
        self.shared[f"{self.kernel.fn.__module__}{self.kernel.fn.__name__}"] = binary.metadata.shared


@pytest.mark.parametrize(
    ("dtype", "n_heads", "width", "block_size", "n_blocks"),
    [
        (torch.bfloat16, 16, 128, 64, 16),  # the 1.3B model
        (torch.float32, 16, 128, 64, 16),
        (torch.bfloat16, 3, 40, 16, 5),
        pytest.param(torch.float32, 64, 256, 128, 16, marks=pytest.mark.wide),  # as large as they come
    ],
)
def test_kernels_compile_for_hopper(
    dtype: torch.dtype, n_heads: int, width: int, block_size: int, n_blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared: dict[str, int] = {}
    for module in (compressed_triton, selected_triton):
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            monkeypatch.setattr(module, name, Launched(getattr(module, name), shared))
    q, do = torch.zeros(200, n_heads, width, dtype=dtype), torch.zeros(200, n_heads, width, dtype=dtype)
    k = torch.zeros(200, 1, width, dtype=dtype)
    layout = nsa.block_layout(1, 200, block_size, None, q.device)
    k_cmp = nsa.compress(k[None], layout, block_size)
    scale = width**-0.5
    o, lse = compressed_triton.forward(q, k_cmp, k_cmp, layout, block_size, scale)
    compressed_triton.backward(do, q, k_cmp, k_cmp, o, lse, layout, block_size, scale)
    compressed_triton.select(q, k_cmp, lse, layout, block_size, n_blocks, scale)
    blocks = torch.zeros(200, 1, n_blocks, dtype=torch.int32)
    selected_triton.forward(q, k, k, blocks, layout, block_size, scale)
    selected_triton.backward(do, q, k, k, o, lse, blocks, layout, block_size, scale)
    assert len(shared) == 8
    assert max(shared.values()) <= SHARED_MEMORY, shared


@pytest.mark.parametrize(
    ("dtype", "n_heads", "width"),
    [
        (torch.bfloat16, 8, 64),  # the 1.3B model
        (torch.float32, 8, 64),
        (torch.bfloat16, 64, 128),  # DeepSeek's
        *(pytest.param(torch.float32, *sizes, marks=pytest.mark.wide) for sizes in ((8, 256), (64, 128))),
    ],
)
def test_selection_compiles_for_hopper(
    dtype: torch.dtype, n_heads: int, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a row that is too long to be searched at once."""
    shared: dict[str, int] = {}
    for module in (triton_scores, triton_select):
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            monkeypatch.setattr(module, name, Launched(getattr(module, name), shared))
    monkeypatch.setattr(triton_select, "CHUNK_NUMBERS", 1 << 27)  # one chunk
    q, k, w = (torch.zeros(1, 9000, *sizes, dtype=dtype) for sizes in ((n_heads, width), (width,), (n_heads,)))
    triton_select.select(q, k, w, None, 2048, True, 64)
    assert len(shared) == 3
    assert max(shared.values()) <= SHARED_MEMORY, shared
