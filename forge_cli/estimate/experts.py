"""Mixtures of experts, in sizes only: the router, and all experts as two three-dimensional weights.

Every token visits the same number of experts, and the product over sorted tokens (``grouped_mm``) takes the same memory
however they are spread; transformers uses it on the CPU and on CUDA alike.

Local variables have the names and the lifetimes of the original, because what a name still holds is memory.
"""

from __future__ import annotations

from forge_cli.estimate.operations import FP32, Operations
from forge_cli.estimate.setting import Setting
from forge_cli.estimate.tape import Tensor

_INDEX = 8


class Experts:
    """Router and experts of one layer.

    Args:
        ops: Operations on the tape.
        setting: The step.
        trains: The experts are trained.
        router_trains: The router is.

    Source: transformers 5.23, ``integrations/moe.py`` (``grouped_mm_experts_forward``), and the models' routers.
    """

    def __init__(self, ops: Operations, setting: Setting, *, trains: bool, router_trains: bool) -> None:
        facts = setting.facts
        self.ops, self.type, self.hidden = ops, facts.model_type, facts.hidden_size
        self.count, self.per_token = facts.num_local_experts, facts.num_experts_per_tok
        self.width = facts.moe_intermediate_size or facts.intermediate_size
        self.has_bias = facts.model_type == "gpt_oss"

        def leaf(numel: int, trains: bool = trains) -> Tensor:
            return ops.tape.leaf(numel, setting.trained_bytes if trains else setting.weight_bytes, trains)

        self.router = leaf(self.count * self.hidden, router_trains)
        self.gate_up_proj = leaf(self.count * 2 * self.width * self.hidden)
        self.down_proj = leaf(self.count * self.width * self.hidden)
        self.biases: list[Tensor | None] = [None] * 3
        if self.has_bias:
            sizes = (self.count * 2 * self.width, self.count * self.hidden)
            self.biases = [leaf(self.count, router_trains), *(leaf(size) for size in sizes)]

    def __call__(self, hidden_states: Tensor) -> Tensor:
        """Runs router and experts."""
        _router_logits, top_k_weights, top_k_index = self._route(hidden_states)
        return self._run(hidden_states, top_k_weights, top_k_index)

    # The router ----------------------------------------------------------------------------------------------------

    def _route(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ops, tokens = self.ops, hidden_states.numel // self.hidden
        router_logits = ops.linear(hidden_states, self.router, self.biases[0], self.hidden, self.count)
        if self.type == "gpt_oss":
            router_top_value, router_indices = self._choose(router_logits, tokens)
            return router_logits, ops.unary(router_top_value, saves_output=True), router_indices
        router_probs = ops.unary(ops.cast(router_logits, FP32), saves_output=True)
        router_top_value, router_indices = self._choose(router_probs, tokens)
        router_top_value = self._normalize(router_top_value, tokens)
        if self.type == "qwen3_moe":
            router_top_value = ops.cast(router_top_value, router_logits.itemsize)
        return router_logits, router_top_value, router_indices

    def _choose(self, x: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
        """``torch.topk``."""
        ops, numel, size = self.ops, x.numel, x.itemsize
        indices = ops.new(tokens * self.per_token, _INDEX)
        (values,) = ops.tape.apply((x,), [(indices.numel, size)], lambda g: [ops.new(numel, size)], (indices,))
        return values, indices

    def _normalize(self, x: Tensor, tokens: int) -> Tensor:
        """``x /= x.sum(-1)``: what is divided in place is copied for the gradient."""
        ops, numel, size = self.ops, x.numel, x.itemsize
        total = ops.mean_last(x, self.per_token)
        kept = [ops.new(numel, size)] if x.needs_grad and ops.tape.grad_enabled else []

        def backward(g):
            found = [ops.new(numel, size), ops.new(numel, size)]
            found[1] = ops.new(tokens, size)
            return found

        (y,) = ops.tape.apply((x, total), [(numel, size)], backward, (*kept, total), view_of=x)
        return y

    # The experts -----------------------------------------------------------------------------------------------------

    def _run(self, hidden_states: Tensor, top_k_weights: Tensor, top_k_index: Tensor) -> Tensor:
        ops, before = self.ops, hidden_states.itemsize
        rows = top_k_index.numel
        expert_ids_g, perm = ops.new(rows, _INDEX), ops.new(rows, _INDEX)
        selected_hidden_states_g = self._gather(hidden_states, rows * self.hidden, ops.new(rows, _INDEX))
        sample_weights_g = self._gather(top_k_weights, rows, perm)
        proj_out, selected_biases = self._multiply(
            selected_hidden_states_g, self.gate_up_proj, self.biases[1], expert_ids_g, 2 * self.width
        )
        proj_out = self._apply_gate(proj_out)
        proj_out, selected_biases = self._multiply(proj_out, self.down_proj, self.biases[2], expert_ids_g, self.hidden)
        weighted_out = ops.multiply(proj_out, sample_weights_g)
        inv_perm = ops.new(rows, _INDEX)
        weighted_out = self._gather(weighted_out, weighted_out.numel, inv_perm)
        del selected_biases
        return ops.cast(self._sum(weighted_out, hidden_states.numel), before)

    def _gather(self, x: Tensor, numel: int, indices: Tensor) -> Tensor:
        """``x[indices]``: keeps the indices."""
        ops, whole, size = self.ops, x.numel, x.itemsize
        (y,) = ops.tape.apply((x,), [(numel, size)], lambda g: [ops.new(whole, size)], (indices,))
        return y

    def _multiply(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, expert_ids: Tensor, outputs: int
    ) -> tuple[Tensor, Tensor | None]:
        """A grouped linear layer; autocast does not reach it, so it computes in the weights' format."""
        ops, rows = self.ops, expert_ids.numel
        biases = self._gather(bias, rows * outputs, expert_ids) if bias else None
        x = ops.cast(x, weight.itemsize)
        out = ops.matmul(x, weight, rows * outputs)
        return (out, None) if biases is None else (ops.add_in_place(out, biases), biases)

    def _apply_gate(self, gate_up_out: Tensor) -> Tensor:
        ops, half = self.ops, gate_up_out.numel // 2
        if not self.has_bias:
            gate, up = ops.split(gate_up_out, [half, half])
            return ops.multiply(ops.unary(gate), up)
        gate, up = ops.slice(gate_up_out, half), ops.slice(gate_up_out, half)
        gate, up = ops.unary(gate), ops.unary(up)
        glu = ops.multiply(gate, ops.unary(ops.scale(gate), saves_output=True))
        return ops.multiply(ops.add(up, None), glu)

    def _sum(self, x: Tensor, numel: int) -> Tensor:
        """Sums what the experts made of a token; CUDA's autocast does so in fp32."""
        ops, whole, size = self.ops, x.numel, x.itemsize
        wide = FP32 if ops.formats.autocast and ops.formats.cuda else size
        (y,) = ops.tape.apply((x,), [(numel, wide)], lambda g: [ops.new(whole, size)])
        return y
