"""The operators of sparse attention alone, and the least time they could take; for scripts/benchmark_sparse.py.

A floor is the larger of bytes read and written (what is gathered: once for each query) over the memory's bandwidth, and
FLOPs over the peak. What caches hold need not come from memory again, so that a kernel may be faster than its bytes.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lt2titan.kernels.backend import resolve_backend
from lt2titan.kernels.dsa import dsa_attention, dsa_indexer_kl, dsa_select
from lt2titan.kernels.nsa import block_layout, compress, compressed_attention, select_blocks, selected_attention
from lt2titan.model.config import ModelConfig

MEMORY_BANDWIDTH, BF16_PEAK = 4.8e12, 989e12  # of an H200: bytes and dense FLOPs a second
BACKWARD_FLOPS = 2.5  # of attention's forward: five products for two

Job = tuple[Callable[[], object], float, float]
"""What runs, its bytes and its FLOPs."""


def timed(run: Callable[[], object], repeats: int, device: torch.device) -> tuple[float, float]:
    """Median milliseconds of ``run``, and the peak memory in GiB; after a run that is not counted."""
    run()
    if device.type != "cuda":
        return _timed_on_host(run, repeats), float("nan")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times)[len(times) // 2], torch.cuda.max_memory_allocated() / 2**30


def _timed_on_host(run: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(1000 * (time.perf_counter() - start))
    return sorted(times)[len(times) // 2]


def _measured(jobs: dict[str, Job], length: int, repeats: int, device: torch.device) -> list[dict[str, Any]]:
    results = []
    for name, (run, n_bytes, n_flops) in jobs.items():
        ms, gib = timed(run, repeats, device)
        floor = 1000 * max(n_bytes / MEMORY_BANDWIDTH, n_flops / BF16_PEAK)
        results.append({"operator": name, "length": length, "ms": ms, "floor_ms": floor, "gib": gib})
    return results


def nsa_operators(model: ModelConfig, length: int, repeats: int, device: torch.device) -> list[dict[str, Any]]:
    """NSA's compressed and selected branches and the choice between them, at a model's sizes, one row. (The window is
    kernels/attention.)"""
    sizes, backend = model.mixers.nsa, resolve_backend("auto", device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    n_heads, n_kv, width, block_size = sizes.n_heads, sizes.n_kv_heads, model.dim // sizes.n_heads, sizes.block_size
    layout = block_layout(1, length, block_size, None, device)

    def draw(n: int) -> Tensor:
        return torch.randn(1, length, n, width, device=device, dtype=dtype).requires_grad_()

    q, k, v = draw(n_heads), draw(n_kv), draw(n_kv)
    k_cmp, v_cmp = (compress(x, layout, block_size).detach().requires_grad_() for x in (k, v))
    options: dict[str, Any] = {"block_size": block_size, "backend": backend}

    def compressed() -> tuple[Tensor, Tensor]:
        return compressed_attention(q, k_cmp, v_cmp, layout, **options)

    o_cmp, lse = compressed()
    with torch.no_grad():
        blocks = select_blocks(q, k_cmp, lse, layout, n_blocks=sizes.n_blocks, **options)

    def selected() -> Tensor:
        return selected_attention(q, k, v, blocks, layout, **options)

    o, weights = selected(), torch.randn_like(q)
    rows = length * n_heads * width * dtype.itemsize
    n_chosen = float((blocks >= 0).sum())
    of_block = 2 * block_size * width * dtype.itemsize  # its keys and values, of one key head
    n_past = length * length / (2 * block_size)
    cmp_flops, flops = 4 * n_past * n_heads * width, 4 * n_chosen * block_size * (n_heads // n_kv) * width
    jobs: dict[str, Job] = {
        "nsa compressed": (compressed, 2 * rows, cmp_flops),
        "nsa compressed backward": (
            lambda: torch.autograd.grad(o_cmp, (q, k_cmp, v_cmp), weights, retain_graph=True),
            4 * rows,
            BACKWARD_FLOPS * cmp_flops,
        ),
        "nsa select": (
            lambda: select_blocks(q, k_cmp, lse, layout, n_blocks=sizes.n_blocks, **options),
            rows + 4 * n_chosen,
            cmp_flops / 2,
        ),
        "nsa selected": (selected, of_block * n_chosen + 2 * rows, flops),
        # Blocks are gathered for dq; for dk and dv, q and do by blocks.
        "nsa selected backward": (
            lambda: torch.autograd.grad(o, (q, k, v), weights, retain_graph=True),
            (of_block + 2 * (n_heads // n_kv) * width * dtype.itemsize) * n_chosen + 4 * rows,
            BACKWARD_FLOPS * flops,
        ),
    }
    return _measured(jobs, length, repeats, device)


def dsa_operators(model: ModelConfig, length: int, repeats: int, device: torch.device) -> list[dict[str, Any]]:
    """DSA's operators at a model's sizes, one row."""
    sizes, backend = model.mixers.dsa, resolve_backend("auto", device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    width, n_kv, J, E = model.dim // sizes.n_heads, sizes.n_kv_heads, sizes.n_index_heads, sizes.index_head_dim
    if length <= sizes.top_k:
        return []

    def draw(*shape: int) -> Tensor:
        return torch.randn(1, length, *shape, device=device, dtype=dtype).requires_grad_()

    index = (draw(J, E), draw(E), draw(J))
    q, k, v = draw(sizes.n_heads, width), draw(n_kv, width), draw(n_kv, width)

    def select() -> Tensor:
        forced_first, forced_local = sizes.forced_first, sizes.forced_local
        return dsa_select(
            *index, top_k=sizes.top_k, forced_first=forced_first, forced_local=forced_local, backend=backend
        )

    with torch.no_grad():
        indices = select()
        o, lse = dsa_attention(q, k, v, indices, backend=backend)
    n_pairs, n_seen = float((indices >= 0).sum()), length * (length + 1) / 2
    of_key = 2 * n_kv * width * dtype.itemsize  # gathered for every pair, by all heads at once
    rows = length * sizes.n_heads * width * dtype.itemsize
    flops = 4 * n_pairs * sizes.n_heads * width
    weights = torch.randn_like(o)
    out, _ = dsa_attention(q, k, v, indices, backend=backend)
    jobs: dict[str, Job] = {
        # Scores are FLOPs; the keys that are chosen are written once.
        "dsa select": (select, 4 * n_pairs, 2 * n_seen * J * E),
        "dsa attention": (lambda: dsa_attention(q, k, v, indices, backend=backend), of_key * n_pairs + 2 * rows, flops),
        # Gradients of gathered keys are added in fp32.
        "dsa attention backward": (
            lambda: torch.autograd.grad(out, (q, k, v), weights, retain_graph=True),
            (of_key + 2 * n_kv * width * 4) * n_pairs + 4 * rows,
            BACKWARD_FLOPS * flops,
        ),
        "dsa indexer KL": (
            lambda: dsa_indexer_kl(*index, q, k, indices=indices, lse=lse, backend=backend),
            (of_key / 2 + 2 * E * dtype.itemsize + E * 4) * n_pairs,
            flops / 2 + 8 * n_pairs * J * E,
        ),
    }
    if length <= 32768:  # the indexer's warm-up happens at shorter lengths
        jobs["dsa indexer KL, all keys"] = (
            lambda: dsa_indexer_kl(*index, q, k, backend=backend),
            2 * rows,
            4 * n_seen * sizes.n_heads * width + 8 * n_seen * J * E,
        )
    return _measured(jobs, length, repeats, device)
