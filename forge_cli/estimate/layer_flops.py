"""The matrix products of one decoder layer, forward and backward.

A gradient is computed only where something below needs it, as autograd does: in the first layer whose weights or
adapters are trained, the gradient of the layer's own input is often not.
"""

from __future__ import annotations

from typing import NamedTuple

from forge_cli.estimate.work import StepFlops, Work
from forge_cli.facts.families import Family
from forge_cli.facts.weights import attention_widths


class LayerFlops(NamedTuple):
    """One decoder layer under one step's settings.

    Attributes:
        work: The step.
        family: Of the model.
        linear: Its linear layers as (name, inputs, outputs), in order of use.
        trains: Weights or adapters of this layer are trained.
        has_window: Its attention has a window, if the model has any.
        causal: Attention kernels skip what the causal mask hides, where they can.
    """

    work: Work
    family: Family
    linear: tuple[tuple[str, int, int], ...]
    trains: bool
    has_window: bool
    causal: bool

    def count_forward(self, *, adapters: bool) -> StepFlops:
        """Counts the forward pass. Units: operations. Source: 2 x tokens x inputs x outputs per matrix."""
        work, tokens = self.work, self.work.num_tokens
        own = sum(2 * tokens * i * o for _, i, o in self.linear) + self._experts()
        rank, extra = work.lora_rank or 0, 0
        for path, inputs, outputs in self.linear if adapters else ():
            if self.work.has_adapter(path):
                extra += 2 * tokens * rank * (inputs + outputs)
                # DoRA multiplies its adapter with a unit matrix to get the norm of the sum.
                extra += 2 * inputs * rank * (inputs + outputs) * work.dora
        return StepFlops(forward=own, adapters=extra, attention=2 * self._attention_product())

    def count_stopped_early(self) -> int:
        """Counts what a second forward pass leaves out: it stops once the last saved tensor is there again.

        Units: operations. Source: torch's non-reentrant checkpointing (``early_stop``): the last product of a layer
        after which nothing is saved. A norm, a sum over experts, dropout or DoRA's magnitude after it saves
        something, and bitsandbytes saves after it has multiplied.
        """
        family, work = self.family, self.work
        ends_in_norm = family.norms[-1].startswith("post_feedforward")
        if family.router or ends_in_norm or family.transposed:
            return 0
        path, inputs, outputs = self.linear[-1]
        if self.work.has_adapter(path):
            return 0 if work.dora else 2 * work.num_tokens * (work.lora_rank or 0) * outputs
        return 0 if work.quantized_bits else 2 * work.num_tokens * inputs * outputs

    def count_backward(self, input_needs: bool) -> tuple[StepFlops, bool]:
        """Counts the backward pass.

        Args:
            input_needs: Whether the layer's input needs a gradient.

        Returns:
            The operations, and whether the layer's output needs a gradient.

        Units: operations. Source: per matrix one product for its input's gradient and one for its own; attention
        backward is five products in a fused kernel, which computes the scores again, and up to four written out.
        """
        family, whole = self.family, self.trains and self.work.lora_rank is None
        entries = len(family.attention) - 1
        # A trained norm needs a gradient even where its input does not; OLMo has none before its matrices.
        norm_first = not family.norms[0].startswith("post_")
        entry_needs = input_needs or (whole and norm_first)
        step, outputs_need = StepFlops(), []
        for path, inputs, outputs in self.linear[:entries]:
            one, needs = self._count_linear(path, inputs, outputs, entry_needs)
            step, outputs_need = step.plus(one), [*outputs_need, needs]
        step = step.plus(StepFlops(attention=self._attention_backward(outputs_need)))
        path, inputs, outputs = self.linear[entries]
        one, needs = self._count_linear(path, inputs, outputs, any(outputs_need))
        after_attention = needs or input_needs
        step = step.plus(one)
        needs = (input_needs if family.parallel else after_attention) or (whole and norm_first)
        rising, falling = self.linear[entries + 1 : -1], self.linear[-1:]
        if family.router:
            experts = self._experts()
            step = step.plus(StepFlops(input_gradients=experts * needs, weight_gradients=experts * whole))
            return step, needs or after_attention or whole
        results = [self._count_linear(*module, needs) for module in rising]
        results.append(self._count_linear(*falling[0], any(one[1] for one in results)))
        for one, _ in results:
            step = step.plus(one)
        return step, after_attention or results[-1][1]

    def _count_linear(self, path: str, inputs: int, outputs: int, needs: bool) -> tuple[StepFlops, bool]:
        whole = self.trains and self.work.lora_rank is None
        product = 2 * self.work.num_tokens * inputs * outputs
        adapter = 0
        if self.trains and self.work.has_adapter(path):
            narrow = 2 * self.work.num_tokens * (self.work.lora_rank or 0)
            # B and its input, A, and A's input if that needs it
            adapter = narrow * (2 * outputs + inputs + inputs * needs)
        step = StepFlops(input_gradients=product * needs, weight_gradients=product * whole, adapters=adapter)
        return step, needs or whole or adapter > 0

    def _experts(self) -> int:
        """Counts router and visited experts of one pass: every token goes through ``num_experts_per_tok`` of them."""
        if not self.family.router:
            return 0
        facts, tokens = self.work.facts, self.work.num_tokens
        width = facts.moe_intermediate_size or facts.intermediate_size
        visits = tokens * (facts.num_experts_per_tok or 1)
        return 2 * tokens * facts.hidden_size * (facts.num_local_experts or 0) + 6 * visits * facts.hidden_size * width

    def _attention_product(self) -> int:
        """Counts one of attention's products: 2 x pairs x width of all heads, over all sequences.

        Kernels work in blocks along the diagonal, so what they skip is a little less than half.
        """
        work, length = self.work, self.work.sequence_length
        window = (self.has_window and work.facts.sliding_window) or length
        pairs = length * length
        if self.causal and work.attention == "flash":
            shown = min(window, length)
            pairs = shown * (shown + 1) // 2 + (length - shown) * shown
        elif self.causal and not self._is_written_out() and not work.masked and window >= length:
            pairs = length * (length + 1) // 2
        return 2 * work.batch_size * pairs * attention_widths(work.facts)[0]

    def _is_written_out(self) -> bool:
        """Whether attention is plain products; torch has no fused kernel for Falcon-7B's one head of keys."""
        facts = self.work.facts
        one_head = facts.model_type == "falcon" and facts.num_key_value_heads == 1 and self.work.attention == "sdpa"
        return self.work.attention == "eager" or one_head

    def _attention_backward(self, needs: list[bool]) -> int:
        if not any(needs):
            return 0
        if not self._is_written_out():
            return 5 * self._attention_product()
        query, key, value = needs if len(needs) == 3 else needs * 3
        return ((query or key) + query + key + value) * self._attention_product()
