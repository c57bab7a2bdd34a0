"""Layouts as data: on how many ranks, how the model lies on them, and what is trained. To add a case is to add a line.

`test_layouts.py` runs them. Every case is compared with a plain run of the same model by one process.
"""

from __future__ import annotations

import shlex
from typing import NamedTuple

PURE = "--model.hybrid.mixer ''"
PACKED = "--training.dataset files --model.vocab_size 264 --data.document_mask --data.max_documents_per_sample 16"
FLOAT8 = f"--model.mixer full {PURE} --float8.emulate --float8.min_size 16 --float8.no_auto_filter --float8.recipe"

MIXERS = ["full", "window", "retnet", "mamba2", "gla", "hgrn2", "deltanet", "gdn", "kda", "rwkv7", "dsa", "nsa"]

# What is trained: changes to tests/assets/layouts.toml that change the numbers.
MODELS = {
    **{mixer: f"--model.mixer {mixer} {PURE}" for mixer in MIXERS},
    "full gqa": f"--model.mixer full --model.mixers.full.n_kv_heads 2 {PURE}",
    "gdn+full": "",
    "gdn+full untied": "--model.no_tie_embeddings",
    "gdn+full sampled": "--model.loop.schedule uniform",
    "gdn+full truncated": "--model.loop.schedule uniform --model.loop.backward_loops 2",
    "gdn+full windows": "--model.loop.windows -1 8 4",
    "gdn+full packed": PACKED,
    "full packed": f"--model.mixer full {PURE} {PACKED}",
    "window packed": f"--model.mixer window {PURE} {PACKED}",
    "nsa packed": f"--model.mixer nsa {PURE} {PACKED}",
    "rwkv7+full packed": f"--model.mixer rwkv7 {PACKED}",
    "mamba2+window": "--model.mixer mamba2 --model.hybrid.mixer window",
    "mamba2+window packed": f"--model.mixer mamba2 --model.hybrid.mixer window {PACKED}",
    "kda+full": "--model.mixer kda",
    "gdn+dsa reused packed": f"--model.hybrid.mixer dsa --model.mixers.dsa.reuse_every 2 {PACKED}",
    "deltanet+gla": "--model.mixer deltanet --model.hybrid.mixer gla",
    "full bf16": f"--model.mixer full {PURE} --training.mixed_precision_param bfloat16",
    # One scale serves a whole microbatch: the same four rows share it in every layout of cases with this model.
    "full tensorwise": f"{FLOAT8} tensorwise --training.local_batch_size 4",
    # With one scale per rank and part, edges are crossed in the first step already: in few casts they seldom are.
    "full tensorwise 1-layer": f"{FLOAT8} tensorwise --training.local_batch_size 4 --model.n_layers 1",
    "full rowwise": f"{FLOAT8} rowwise",
    "full rowwise_with_gw_hp": f"{FLOAT8} rowwise_with_gw_hp",
}

COMPILED = "--compile.enable --compile.error_on_recompile --compile.backend"

# How it is trained: what must not change the numbers.
LAYOUTS = {
    "plain": "",
    "fsdp": "",  # over all ranks that the other degrees leave
    "hsdp": "--parallelism.data_parallel_replicate_degree 2",
    "tp": "--parallelism.tensor_parallel_degree 2",
    "tp4": "--parallelism.tensor_parallel_degree 4",
    "whole-rows": "--parallelism.no_sequence_parallel",
    "cp": "--parallelism.context_parallel_degree 2",
    "cp4": "--parallelism.context_parallel_degree 4",
    "offload": "--parallelism.cpu_offload",
    "per_step": "--parallelism.fsdp_loop_reshard per_step",  # what auto comes to
    "per_pass": "--parallelism.fsdp_loop_reshard per_pass",
    "per_visit": "--parallelism.fsdp_loop_reshard per_visit",
    "1-row": "--training.local_batch_size 1",  # per microbatch, of 8; reductions are deferred to the last
    "2-rows": "--training.local_batch_size 2",
    "undeferred": "--parallelism.fsdp_defer_reductions off",
    "block": "--activation_checkpoint.mode block",
    "selective": "--activation_checkpoint.mode selective",
    "loop": "--activation_checkpoint.mode loop",
    "nested": "--activation_checkpoint.mode nested",
    "skip": "--activation_checkpoint.skip_last_loops 1",
    "budget": "--activation_checkpoint.mode memory_budget --activation_checkpoint.memory_budget 0.3",
    "compile": f"{COMPILED} aot_eager",
    "inductor": f"{COMPILED} inductor",
}


class Case(NamedTuple):
    """One run: ``layout`` is words of LAYOUTS, ``model`` a name of MODELS.

    losses, gradients, norms: the largest relative errors that pass, of ten losses, of each parameter's gradient in the
        first step (in norm), and of the gradient norms and loop diagnostics of all ten.
    n_parts: into which the reference divides its maps in float8, as so many tensor-parallel ranks do: what a rank casts
        has a scale of its own.
    """

    n_ranks: int
    layout: str
    model: str
    losses: float = 1e-5
    gradients: float = 1e-5
    norms: float = 1e-5
    n_parts: int = 1

    @property
    def name(self) -> str:
        parts = f" in {self.n_parts} parts" if self.n_parts > 1 else ""
        return f"{self.n_ranks} {self.layout}, {self.model}{parts}"

    @property
    def overrides(self) -> list[str]:
        return shlex.split(" ".join([MODELS[self.model], *(LAYOUTS[word] for word in self.layout.split())]))

    @property
    def reference(self) -> Case:
        return Case(1, "plain", self.model, n_parts=self.n_parts)


# Where 1e-5 is not to be had, and what was measured in place of it (losses, gradients, norms):
# bfloat16 keeps 8 bits, and sums over ranks round anew: 2.4e-4, 4.6e-3, 2.1e-3.
BF16 = (1e-3, 2e-2, 1e-2)
# A number that rounding moves across one of float8's edges moves by 6 %. The first step is exact until then; from the
# second on weights differ by rounding. Rows split over data-parallel ranks: 2e-7, 7e-7, 2.0e-4.
FLOAT8_EDGES = (1e-5, 1e-5, 2e-3)
# Over context ranks, whose attention rounds otherwise: 8.4e-4, 3e-7, 6.5e-3.
FLOAT8_CONTEXT = (5e-3, 1e-5, 3e-2)
# Over tensor-parallel ranks, whose sums round otherwise, against a reference that casts the same parts (n_parts):
# rowwise 1.6e-3, 2.2e-7, 2.3e-2, tensorwise in one layer 6e-4, 3e-7, 7e-3. A number that crosses an edge in the first
# backward pass moves gradients by 1e-2, a wrong scale of the weights by 1e-1.
FLOAT8_PARTS = (1e-2, 2e-2, 5e-2)

CASES = [
    Case(1, "2-rows block", "gdn+full"),
    Case(1, "offload nested skip", "kda+full"),
    Case(1, "compile selective", "gdn+full packed"),
    Case(1, "compile budget", "mamba2+window"),
    Case(2, "fsdp per_pass 2-rows", "hgrn2"),
    Case(2, "fsdp per_visit selective", "rwkv7"),
    Case(2, "fsdp loop skip", "retnet"),
    Case(2, "fsdp 2-rows undeferred", "gla"),
    Case(2, "fsdp compile block", "deltanet"),
    Case(2, "fsdp compile 2-rows", "gdn+full truncated"),
    Case(2, "fsdp offload 2-rows", "gdn+full untied"),
    Case(2, "fsdp nested", "gdn+full windows"),
    Case(2, "fsdp", "full bf16", *BF16),
    Case(2, "fsdp per_visit", "full tensorwise"),
    Case(2, "fsdp compile selective", "full tensorwise"),
    Case(2, "hsdp nested 2-rows", "gdn+full sampled"),
    Case(2, "hsdp per_visit offload", "window packed"),
    Case(2, "hsdp 2-rows", "full rowwise", *FLOAT8_EDGES),
    Case(2, "tp", "gdn"),
    Case(2, "tp block", "kda"),
    Case(2, "tp selective compile", "mamba2+window"),
    Case(2, "tp whole-rows loop", "rwkv7+full packed"),
    Case(2, "tp 2-rows", "full gqa"),
    Case(2, "tp", "full rowwise", *FLOAT8_PARTS, n_parts=2),
    Case(2, "tp compile block", "full rowwise", *FLOAT8_PARTS, n_parts=2),
    Case(4, "tp fsdp compile block", "full tensorwise 1-layer", *FLOAT8_PARTS, n_parts=2),
    Case(2, "fsdp offload per_visit", "full tensorwise"),
    Case(2, "cp", "gdn"),
    Case(2, "cp", "full packed"),
    Case(2, "cp block", "nsa packed"),
    Case(2, "cp selective", "mamba2+window packed"),
    Case(2, "cp nested 2-rows", "rwkv7+full packed"),
    Case(2, "cp compile", "gdn+full packed"),
    Case(2, "cp per_visit", "kda+full"),
    Case(2, "cp selective", "gdn+dsa reused packed"),
    Case(2, "cp", "full rowwise_with_gw_hp", *FLOAT8_CONTEXT),
    Case(2, "cp compile budget", "full rowwise", *FLOAT8_CONTEXT),
    Case(4, "fsdp per_visit 1-row", "gdn+full"),
    Case(4, "hsdp per_pass 1-row block", "kda+full"),
    Case(4, "hsdp offload 1-row undeferred", "mamba2"),
    Case(4, "tp fsdp", "deltanet+gla"),
    Case(4, "tp hsdp per_visit loop", "gdn+full untied"),
    Case(4, "tp fsdp 2-rows compile", "gdn+full"),
    Case(4, "tp4", "window"),
    Case(4, "cp fsdp", "gdn+full packed"),
    Case(4, "cp hsdp selective 2-rows", "full packed"),
    Case(4, "cp fsdp per_pass", "gdn+full truncated"),
    Case(4, "cp4", "mamba2"),
    Case(4, "tp cp", "gdn+full packed"),
]

# With `make test-all`: every mixer in every kind of layout, and one hybrid in every way to train it.
PER_MIXER = [
    (1, "2-rows nested"),
    (1, "compile block"),
    (2, "fsdp per_visit 2-rows"),
    (2, "tp"),
    (2, "tp whole-rows selective"),
    (2, "cp"),
    (2, "cp block 2-rows"),
    (4, "hsdp per_pass 1-row"),
    (4, "tp fsdp"),
    (4, "cp fsdp"),
    (4, "tp cp"),
]
DEGREES = ["fsdp", "hsdp", "tp", "cp"]
MODES = ["block", "selective", "loop", "nested", "nested skip"]
POLICIES = ["per_step", "per_pass", "per_visit"]


def _wide() -> list[Case]:
    cases = [Case(n_ranks, layout, mixer) for mixer in MIXERS for n_ranks, layout in PER_MIXER]
    for degree in DEGREES:
        cases += [Case(2, f"{degree} {mode}", "gdn+full packed") for mode in MODES]
        cases += [Case(2, f"{degree} compile {mode}", "gdn+full packed") for mode in [*MODES, "budget"]]
        cases += [Case(2, f"{degree} {policy} undeferred 2-rows", "gdn+full") for policy in POLICIES]
        cases += [Case(2, f"{degree} {policy} offload", "gdn+full untied") for policy in POLICIES]
        cases += [Case(2, degree, f"gdn+full {loops}") for loops in ("sampled", "truncated", "windows")]
    cases += [
        Case(2, f"{degree} {mode}", "gdn+dsa reused packed") for degree in DEGREES for mode in ("nested", "compile")
    ]
    packed = (
        "full packed",
        "window packed",
        "nsa packed",
        "rwkv7+full packed",
        "mamba2+window packed",
        "gdn+dsa reused packed",
    )
    for model in packed:
        cases += [Case(4, layout, model) for layout in ("tp cp", "cp4", "tp fsdp compile", "cp fsdp compile")]
    # Its C++ takes most of a minute; tests/unit/parallel/test_compile_training.py compiles with it in the default part.
    cases += [Case(1, "inductor", "full")]
    cases += [Case(2, f"{layout} compile nested", "full tensorwise") for layout in ("hsdp", "fsdp per_pass")]
    cases += [Case(2, f"{degree} inductor", "gdn+full") for degree in ("fsdp", "tp", "cp")]
    known = {case.name for case in CASES}
    new = [case for case in cases if case.name not in known]
    return sorted(new, key=lambda case: case.n_ranks)  # one launch at a time


WIDE = _wide()
