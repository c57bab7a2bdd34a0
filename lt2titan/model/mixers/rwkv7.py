"""RWKV-7."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lt2titan.kernels.dplr_delta_rule import LOWEST_LOG_DECAY, dplr_delta_rule
from lt2titan.model.context import Carry, Context
from lt2titan.model.layers import Linear
from lt2titan.model.mixers.base import Common, Mixer, State, StateSpec
from lt2titan.model.mixers.config import RWKV7Config
from lt2titan.model.mixers.pieces import CHUNK, l2_norm, recur, recurrent_spec
from lt2titan.model.mixers.token_shift import token_shift
from lt2titan.model.precision import precise
from lt2titan.model.shares import local
from lt2titan.model.stretch import tokens_before

FIRST_VALUE = "rwkv7_first_value"
"""Name in the carry of the first RWKV-7 layer's values (B, L, dim)."""


class RWKV7(Mixer):
    """S <- (Diag(w) - k' (a k')^T) S + k v^T, read by r: RWKV-7's time mixing (arXiv 2503.14456, section 4).

    Each of r, w, k, v, a, g is computed from its own mix of the token with the one before. w = exp(-e^-0.5 sigmoid(..))
    and a = sigmoid(..) per channel, from low-rank maps; k' is k * k_k, L2-normed per head; k is scaled by
    1 + (a - 1) k_a. The output is group-normed per head, gets the bonus (r . k * r_k) v, and is gated.

    Values move towards those of the first RWKV-7 layer, by sigmoid(..) per channel. That layer writes them into the
    carry anew in every loop, so the layers of a loop read this loop's: nothing crosses loops.
    """

    def __init__(self, config: RWKV7Config, common: Common) -> None:
        super().__init__()
        dim = common.dim
        self.head_dim, self.n_heads = config.head_dim, dim // config.head_dim
        self.is_first, self.backend = common.is_first, common.backend
        self.group_norm_eps = config.head_dim * common.norm_eps  # the mean square that is normed grows with the head
        self.x_r = nn.Parameter(torch.empty(dim))
        self.x_w = nn.Parameter(torch.empty(dim))
        self.x_k = nn.Parameter(torch.empty(dim))
        self.x_v = nn.Parameter(torch.empty(dim))
        self.x_a = nn.Parameter(torch.empty(dim))
        self.x_g = nn.Parameter(torch.empty(dim))
        self.w_bias = nn.Parameter(torch.empty(dim))
        self.a_bias = nn.Parameter(torch.empty(dim))
        self.k_k = nn.Parameter(torch.empty(dim))
        self.k_a = nn.Parameter(torch.empty(dim))
        self.r_k = nn.Parameter(torch.empty(dim))
        self.r_proj = Linear(dim, dim, init_std=dim**-0.5)
        self.k_proj = Linear(dim, dim, init_std=0.1 * dim**-0.5)
        self.v_proj = Linear(dim, dim, init_std=dim**-0.5)
        self.o_proj = Linear(dim, dim, init_std=dim**-0.5)
        self.w_lora = LowRank(dim, config.rank("decay_rank", dim))
        self.a_lora = LowRank(dim, config.rank("a_rank", dim))
        self.gate_lora = LowRank(dim, config.rank("gate_rank", dim))
        if not self.is_first:
            self.v_lora = LowRank(dim, config.rank("v_rank", dim))
            self.v_bias = nn.Parameter(torch.empty(dim))
        self.o_norm = nn.Parameter(torch.empty(dim))
        self.o_norm_bias = nn.Parameter(torch.empty(dim))

    def forward(self, x: Tensor, context: Context, carry: Carry, state: State | None = None) -> tuple[Tensor, Carry]:
        shift = None if state is None else state["shift"]
        if context.stretch is not None:
            shift = tokens_before([x], 1, context.stretch, context.cu_seqlens)[0][:, 0]
        before, last = token_shift(x, shift, context.cu_seqlens)
        delta = before - x
        r = self.r_proj(x + delta * local(self.x_r))
        k = self.k_proj(x + delta * local(self.x_k))
        x_v = x + delta * local(self.x_v)
        v = self.v_proj(x_v)
        if self.is_first:
            carry = {**carry, FIRST_VALUE: v}
        else:
            v = torch.lerp(v, carry[FIRST_VALUE], torch.sigmoid(self.v_lora(x_v) + local(self.v_bias)))
        w = precise(self.w_lora(x + delta * local(self.x_w), torch.tanh)) + precise(local(self.w_bias))
        log_decay = LOWEST_LOG_DECAY * torch.sigmoid(w)
        a = torch.sigmoid(self.a_lora(x + delta * local(self.x_a)) + local(self.a_bias))
        gate = self.gate_lora(x + delta * local(self.x_g), torch.sigmoid)

        erase_key = l2_norm(self._heads(k * local(self.k_k)))
        k = self._heads(k * (1 + (a - 1) * local(self.k_a)))
        r, v = self._heads(r), self._heads(v)
        y = recur(
            dplr_delta_rule,
            r,
            k,
            v,
            -erase_key,
            erase_key * self._heads(a),
            self._heads(log_decay),
            scale=1.0,
            context=context,
            state=state,
            backend=self.backend,
        )
        if state is not None:
            state["shift"].copy_(last)
        y, n_heads = y.flatten(-2), y.shape[-2]
        o_norm, o_norm_bias = local(self.o_norm), local(self.o_norm_bias)
        y = F.group_norm(y.flatten(0, -2), n_heads, o_norm, o_norm_bias, self.group_norm_eps).view(y.shape)
        bonus = (r * k * self._heads(local(self.r_k))).sum(dim=-1, keepdim=True) * v
        return self.o_proj((y + bonus.flatten(-2)) * gate), carry

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim))

    def split_parameters(self, n_ranks: int) -> dict[str, int]:
        names = ["r_proj", "k_proj", "v_proj", "w_lora.up_proj", "a_lora.up_proj", "gate_lora.up_proj"]
        own = ["w_bias", "a_bias", "k_k", "k_a", "r_k", "o_norm", "o_norm_bias"]
        if not self.is_first:
            names.append("v_lora.up_proj")
            own.append("v_bias")
        return {**dict.fromkeys([*(f"{name}.weight" for name in names), *own], 0), "o_proj.weight": 1}

    def initial_carry(self, x: Tensor, context: Context) -> Carry:
        if not self.is_first:
            return {}
        # Of the shape and with x's requires_grad, like what replaces it: otherwise a compiled block would need a second
        # graph. x may have some of the tokens only.
        shape = (*context.positions.shape, self.n_heads * self.head_dim // self.share.n_ranks)
        return {FIRST_VALUE: x.new_zeros(shape, requires_grad=x.requires_grad)}

    def state_spec(self, batch_size: int, max_length: int, window: int | None) -> dict[str, StateSpec]:
        recurrent = recurrent_spec(batch_size, self.n_heads, self.head_dim, self.head_dim)
        return recurrent | {"shift": StateSpec((batch_size, self.n_heads * self.head_dim))}

    def recurrence_flops(self) -> float:
        """Per head and token of a chunk of C: r and a with k and b, and the inverse's product with a (2CK each), A_ak
        and the inverse with v, and the two scores with u and v (2CV each), four products with the state (2KV each)."""
        return self.n_heads * (18 * CHUNK * self.head_dim + 8 * self.head_dim**2)

    def init_parameter(self, name: str, tensor: Tensor, generator: torch.Generator) -> None:
        """RWKV-7's initial values (appendix), which vary over channels and heads, at those of the middle of a stack:
        layers that are visited in every loop have no one depth."""
        dim = tensor.numel()
        position = torch.arange(dim, device=tensor.device, dtype=torch.float64) / max(dim - 1, 1)  # 0 to 1
        in_head = torch.arange(dim, device=tensor.device, dtype=torch.float64) % self.head_dim
        zigzag = 2 * in_head / max(self.head_dim - 1, 1) - 1  # -1 to 1 over each head
        zigzag = zigzag * zigzag.abs()
        if name in _SHIFT_POWERS:
            values = 1 - (position * (dim - 1) / dim) ** (_SHIFT_POWERS[name] * 0.5)
        elif name == "w_bias":
            values = -5.5 + 6 * position ** (1 + 0.5**0.3) + 2.5 * zigzag
        elif name == "a_bias":
            values = -0.19 + 0.3 * zigzag + 0.4 * (position - 0.5)
        elif name == "v_bias":
            values = 0.73 - 0.4 * (position - 0.5)
        elif name == "k_k":
            values = 0.71 - 0.1 * (position - 0.5)
        else:
            values = torch.full_like(position, _CONSTANTS[name])
        tensor.copy_(values)


_SHIFT_POWERS = {"x_r": 0.2, "x_w": 0.9, "x_k": 0.7, "x_v": 0.7, "x_a": 0.9, "x_g": 0.2}
_CONSTANTS = {"k_a": 1.02, "r_k": -0.04, "o_norm": 1.0, "o_norm_bias": 0.0}


class LowRank(nn.Module):
    """W_up f(W_down x) from dim to dim; W_down starts at 0."""

    def __init__(self, dim: int, rank: int) -> None:
        super().__init__()
        self.down_proj = Linear(dim, rank, init_std=0.0)
        self.up_proj = Linear(rank, dim, init_std=0.1 * dim**-0.5)

    def forward(self, x: Tensor, activation: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        hidden = self.down_proj(x)
        return self.up_proj(hidden if activation is None else activation(hidden))
