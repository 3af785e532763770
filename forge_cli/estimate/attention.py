"""Self-attention of every family, from the projections to the output projection, in sizes only.

Local variables have the names and the lifetimes of the original, because what a name still holds is memory.
"""

from __future__ import annotations

from collections.abc import Callable

from forge_cli.estimate.eager import run_eager, run_falcon_eager
from forge_cli.estimate.kernels import Heads, run_flash, run_sdpa
from forge_cli.estimate.linear import Linear
from forge_cli.estimate.operations import Operations
from forge_cli.estimate.setting import Setting
from forge_cli.estimate.shared import ROTARY_SHARES, Reading
from forge_cli.estimate.tape import Tensor
from forge_cli.facts.families import FALCON_SEQUENTIAL, FALCON_TWO_NORMS, find_family

Norm = Callable[[str, Tensor, int], Tensor]
# Rotated and other channels of a head are joined into a new tensor, head by head.
_JOINED = ("phi", "phi3", "gpt_neox", "gpt_oss")
_EAGER_STYLES = ("gemma2", "gpt_oss", "gpt2")


class Attention:
    """Self-attention of one layer.

    Args:
        ops: Operations on the tape.
        setting: The step.
        linear: Linear layers by name.
        norm: Runs a norm: its name, the input and the width.
        trains: Its own weights (gpt-oss's sinks) are trained.
    """

    def __init__(
        self, ops: Operations, setting: Setting, linear: dict[str, Linear], norm: Norm, *, trains: bool
    ) -> None:
        facts = setting.facts
        self.ops, self.setting, self.facts, self.linear, self.norm = ops, setting, facts, linear, norm
        self.family, self.type = find_family(facts), facts.model_type
        self.names = [name.rstrip("+") for name in self.family.attention]
        self.heads = Heads(
            setting.num_sequences,
            setting.sequence_length,
            facts.num_attention_heads,
            facts.num_key_value_heads,
            facts.head_dim,
        )
        self.num_tokens = self.heads.batch * self.heads.length
        self.sinks = None
        if self.type == "gpt_oss":
            size = setting.trained_bytes if trains else setting.weight_bytes
            self.sinks = ops.tape.leaf(facts.num_attention_heads, size, trains)

    def __call__(self, hidden_states: Tensor, reading: Reading) -> tuple[Tensor, Tensor | None]:
        """Runs it. Returns the output, and the attention weights if they were ever made (eager)."""
        query, key, value, *_fused_qkv = self._project(hidden_states)
        if self.type == "gemma3_text":
            query, key = self._norm_heads("query", query), self._norm_heads("key", key)
        if reading.rotary and self.facts.layout != FALCON_SEQUENTIAL:
            (query, *_query_parts), (key, *_key_parts) = (self._rotate(one, *reading.rotary) for one in (query, key))
        if self.type == "ministral3":
            query = self.ops.scale(query)
        output, weights = self._attend(query, key, value, reading.mask)
        return self.linear[self.names[-1]](output), weights

    def _norm_heads(self, name: str, x: Tensor) -> Tensor:
        """The norm on queries or keys: one weight per channel of a head, or of all heads."""
        width = self.facts.head_dim if self.family.qk_norm == "head" else x.numel // self.num_tokens
        return self.norm(name, x, width)

    def _project(self, hidden_states: Tensor) -> tuple[Tensor, ...]:
        ops, names = self.ops, self.names
        if len(names) == 4 and self.family.qk_norm and self.type != "gemma3_text":
            query = self._norm_heads("query", self.linear[names[0]](hidden_states))
            key = self._norm_heads("key", self.linear[names[1]](hidden_states))
            return query, key, self.linear[names[2]](hidden_states)
        if len(names) == 4:
            query, key, value = (self.linear[name](hidden_states) for name in names[:3])
            return query, key, value
        qkv, width = self.linear[names[0]](hidden_states), self.facts.head_dim * self.num_tokens
        queries, keys = self.heads.queries * width, self.heads.keys * width
        if self.type == "falcon":
            return *self._split_falcon(qkv, queries, keys), qkv
        if self.type == "phi3":
            return ops.slice(qkv, queries), ops.slice(qkv, keys), ops.slice(qkv, keys)
        query, key, value = ops.split(qkv, [queries, keys, keys])
        return query, key, value

    def _split_falcon(self, fused_qkv: Tensor, queries: int, keys: int) -> tuple[Tensor, Tensor, Tensor]:
        """Source: transformers 5.23, ``FalconAttention._split_heads``."""
        ops, heads = self.ops, self.heads
        query = ops.slice(fused_qkv, queries)
        if heads.keys == heads.queries:
            return query, ops.slice(fused_qkv, keys), ops.slice(fused_qkv, keys)
        key, value = ops.gather(fused_qkv, keys), ops.gather(fused_qkv, keys)
        if heads.keys == 1 and self.facts.layout != FALCON_TWO_NORMS:
            return query, key, value
        # The newer layout gives every query head its own keys, and makes all three anew.
        return ops.copy(query), ops.gather(key, queries), ops.gather(value, queries)

    def _rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        """Rotates queries or keys. Returns them, and what the caller has a name for until it returns."""
        ops = self.ops
        if self.type == "gpt_oss":
            first_half, second_half = ops.split(x, [x.numel // 2] * 2)
            first_ = ops.add(ops.multiply(first_half, cos), ops.multiply(second_half, sin))
            second_ = ops.add(ops.multiply(second_half, cos), ops.multiply(first_half, sin))
            return (ops.join([first_, second_]),)
        if self.type not in _JOINED:
            turned = self._turn(x, cos, sin)
            return (ops.cast(turned, x.itemsize) if self.type in ("olmo2", "olmo3") else turned,)
        part = round(x.numel * ROTARY_SHARES.get(self.type, 1.0))
        rot, rest = ops.slice(x, part), ops.slice(x, x.numel - part)
        rot = self._turn(rot, cos, sin)
        return (ops.join([rot, rest]), rot, rest) if self.type == "phi" else (ops.join([rot, rest]),)

    def _turn(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """``x * cos + rotate_half(x) * sin``."""
        ops = self.ops
        return ops.add(ops.multiply(x, cos), ops.multiply(self._rotate_half(x), sin))

    def _rotate_half(self, x: Tensor) -> Tensor:
        x1, x2 = self.ops.slice(x, x.numel // 2), self.ops.slice(x, x.numel // 2)
        return self.ops.join([self.ops.scale(x2), x1])

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        heads, ordered = self.heads, self.type in _JOINED
        if self.type == "falcon" and self.facts.layout == FALCON_TWO_NORMS:
            heads = heads._replace(keys=heads.queries)
        if self.setting.attention == "flash":
            return run_flash(self.ops, query, key, value, heads), None
        if self.setting.attention == "eager":
            if self.type == "falcon":
                has_alibi = self.facts.layout == FALCON_SEQUENTIAL
                return run_falcon_eager(self.ops, query, key, value, mask, heads, has_alibi=has_alibi)
            style = self.type if self.type in _EAGER_STYLES else "llama"
            return run_eager(self.ops, query, key, value, mask, heads, style=style, sinks=self.sinks, ordered=ordered)
        repeats = self.type != "falcon"
        return run_sdpa(self.ops, query, key, value, mask, heads, repeats=repeats, ordered=ordered), None
