"""One decoder layer of every family that Forge knows, written as transformers 5.23 writes it, in sizes only.

Local variables have the names and the lifetimes of the original, because what a name still holds is memory.
"""

from __future__ import annotations

from typing import NamedTuple

from forge_cli.estimate.attention import Attention
from forge_cli.estimate.experts import Experts
from forge_cli.estimate.linear import Linear
from forge_cli.estimate.norms import layer_norm, rms_norm
from forge_cli.estimate.operations import Operations
from forge_cli.estimate.setting import Setting
from forge_cli.estimate.shared import Reading, has_window
from forge_cli.estimate.tape import Tensor
from forge_cli.facts.families import FALCON_SEQUENTIAL, FALCON_TWO_NORMS, find_family
from forge_cli.facts.parameter_count import list_linear_paths
from forge_cli.facts.weights import layer_prefix


class Block(NamedTuple):
    """How a family's layer differs from Llama's.

    Attributes:
        norm: ``llama``, ``gemma``, ``olmo`` (RMSNorm in three notations) or ``layer`` (LayerNorm).
        placement: ``before`` (a norm before each half), ``after`` (OLMo), ``both`` (Gemma 2 and 3), or the family whose
            layer is a function of its own: ``gpt2``, ``phi``, ``gpt_neox``, ``falcon``.
        gated: The feed-forward is ``down(act(gate) * up)``.
        activation: ``one`` kernel, or ``gelu_new``, which is written out in Python.
        scaled: Both halves are scaled before they are added (Granite).
    """

    norm: str = "llama"
    placement: str = "before"
    gated: bool = True
    activation: str = "one"
    scaled: bool = False


_LLAMA, _FALCON = Block(), Block(norm="layer", placement="falcon", gated=False)
_LLAMA_LIKE = ("llama", "mistral", "ministral3", "smollm3", "qwen2", "qwen3", "mixtral", "qwen3_moe", "phi3")
BLOCKS: dict[str, Block] = {
    **{name: _LLAMA for name in _LLAMA_LIKE},
    "granite": Block(scaled=True),
    "gemma": Block(norm="gemma"),
    "gemma2": Block(norm="gemma", placement="both"),
    "gemma3_text": Block(norm="gemma", placement="both"),
    "olmo2": Block(norm="olmo", placement="after"),
    "olmo3": Block(norm="olmo", placement="after"),
    "gpt_oss": Block(norm="olmo"),
    "phi": Block(norm="layer", placement="phi", gated=False, activation="gelu_new"),
    "gpt_neox": Block(norm="layer", placement="gpt_neox", gated=False),
    "gpt2": Block(norm="layer", placement="gpt2", gated=False, activation="gelu_new"),
    **{name: _FALCON for name in ("falcon", FALCON_TWO_NORMS, FALCON_SEQUENTIAL)},
}


class Layer:
    """One decoder layer.

    Args:
        ops: Operations on the tape.
        setting: The step.
        index: Place among the layers, from 0.
        frozen: Nothing in it is trained.
    """

    def __init__(self, ops: Operations, setting: Setting, index: int, *, frozen: bool) -> None:
        facts = setting.facts
        self.ops, self.setting, self.facts, self.family = ops, setting, facts, find_family(facts)
        self.block = BLOCKS[facts.layout or facts.model_type]
        self.prefix = layer_prefix(facts, index)
        self.frozen = frozen or self.prefix in setting.frozen
        self.has_window = has_window(setting, index)
        self.linear = self._make_linear()
        self.norms: dict[str, tuple[Tensor, ...]] = {}
        sinks = self.trains(f"{self.prefix}.{self.family.attention_block}")
        self.attention = Attention(ops, setting, self.linear, self.norm, trains=sinks)
        self.experts = self._make_experts() if self.family.router else None

    def trains(self, module: str) -> bool:
        """Whether the weights of a module are trained, by its dotted name in the model."""
        return self.setting.adapters is None and not self.frozen and module not in self.setting.frozen

    def _make_experts(self) -> Experts:
        block = f"{self.prefix}.{self.family.feed_forward_block}"
        router = self.trains(f"{block}.{self.family.router}")
        return Experts(self.ops, self.setting, trains=self.trains(f"{block}.experts"), router_trains=router)

    def _make_linear(self) -> dict[str, Linear]:
        family, made = self.family, {}
        count = len(family.attention)
        biases = [*[family.qkv_bias] * (count - 1), family.output_bias]
        for index, (path, inputs, outputs) in enumerate(list_linear_paths(self.facts)):
            name = path.rpartition(".")[2]
            # GPT-2 has two layers of one name.
            made[name if name not in made else f"mlp.{name}"] = Linear(
                self.ops,
                self.setting,
                f"{self.prefix}.{path}",
                inputs,
                outputs,
                frozen=self.frozen,
                bias=biases[index] if index < count else family.feed_forward_bias,
                own=family.own_linear,
            )
        return made

    def norm(self, name: str, x: Tensor, width: int = 0) -> Tensor:
        """Runs one of the layer's norms; its weights are made when it is first used."""
        width = width or self.facts.hidden_size
        if name not in self.norms:
            trains = self.trains(self._find_norm(name))
            size = self.setting.trained_bytes if trains else self.setting.weight_bytes
            parts = 2 if self.block.norm == "layer" else 1
            self.norms[name] = tuple(self.ops.tape.leaf(width, size, trains) for _ in range(parts))
        if self.block.norm == "layer":
            return layer_norm(self.ops, x, *self.norms[name], width)
        return rms_norm(self.ops, x, *self.norms[name], width, self.block.norm)

    def _find_norm(self, name: str) -> str:
        """Returns the dotted name of a norm; those of a layer's own width are first used in the model's order."""
        family = self.family
        if name == "final":
            return f"{family.body}.{family.final_norm}"
        if name in ("query", "key"):
            return f"{self.prefix}.{family.attention_block}.{name[0]}_norm"
        return f"{self.prefix}.{family.norms[len(self.norms.keys() - {'query', 'key', 'final'})]}"

    def __call__(self, hidden_states: Tensor, reading: Reading) -> Tensor:
        """Runs the layer."""
        place = self.block.placement
        own = {"gpt2": self._run_gpt2, "phi": self._run_phi, "gpt_neox": self._run_gpt_neox, "falcon": self._run_falcon}
        if place in own:
            return own[place](hidden_states, reading)
        residual = hidden_states
        if place != "after":
            hidden_states = self.norm("input", hidden_states)
        hidden_states, _ = self.attention(hidden_states, reading)
        if place != "before":
            hidden_states = self.norm("after attention", hidden_states)
        hidden_states = self._join(residual, hidden_states)
        residual = hidden_states
        if place != "after":
            hidden_states = self.norm("before feed-forward", hidden_states)
        hidden_states = self.feed_forward(hidden_states)
        if place != "before":
            hidden_states = self.norm("after feed-forward", hidden_states)
        return self._join(residual, hidden_states)

    def _join(self, residual: Tensor, hidden_states: Tensor) -> Tensor:
        return self.ops.add(residual, self.ops.scale(hidden_states) if self.block.scaled else hidden_states)

    def _run_gpt2(self, hidden_states: Tensor, reading: Reading) -> Tensor:
        residual = hidden_states
        hidden_states = self.norm("input", hidden_states)
        attn_output, _ = self.attention(hidden_states, reading)
        attn_output = self.ops.drop_tenth(attn_output)
        hidden_states = self.ops.add(attn_output, residual)
        residual = hidden_states
        hidden_states = self.norm("before feed-forward", hidden_states)
        feed_forward_hidden_states = self.ops.drop_tenth(self.feed_forward(hidden_states))
        return self.ops.add(residual, feed_forward_hidden_states)

    def _run_phi(self, hidden_states: Tensor, reading: Reading) -> Tensor:
        ops, residual = self.ops, hidden_states
        hidden_states = self.norm("input", hidden_states)
        attn_outputs, _ = self.attention(hidden_states, reading)
        feed_forward_hidden_states = self.feed_forward(hidden_states)
        return ops.add(ops.add(attn_outputs, feed_forward_hidden_states), residual)

    def _run_gpt_neox(self, hidden_states: Tensor, reading: Reading) -> Tensor:
        ops = self.ops
        attn_output, _ = self.attention(self.norm("input", hidden_states), reading)
        mlp_output = self.feed_forward(self.norm("before feed-forward", hidden_states))
        return ops.add(ops.add(mlp_output, attn_output), hidden_states)

    def _run_falcon(self, hidden_states: Tensor, reading: Reading) -> Tensor:
        ops, residual = self.ops, hidden_states
        attention_layernorm_out = mlp_layernorm_out = self.norm("input", hidden_states)
        if self.facts.layout == FALCON_TWO_NORMS:
            mlp_layernorm_out = self.norm("before feed-forward", hidden_states)
        attention_output, _ = self.attention(attention_layernorm_out, reading)
        if self.facts.layout == FALCON_SEQUENTIAL:
            residual = ops.add(residual, attention_output)
            mlp_layernorm_out = self.norm("before feed-forward", residual)
            return ops.add(residual, self.feed_forward(mlp_layernorm_out))
        mlp_output = self.feed_forward(mlp_layernorm_out)
        mlp_output = ops.add_in_place(mlp_output, attention_output)
        return ops.add(residual, mlp_output)

    def feed_forward(self, x: Tensor) -> Tensor:
        """The feed-forward half, or the experts."""
        if self.experts:
            return self.experts(x)
        ops, names = self.ops, [name.rstrip("+") for name in self.family.feed_forward]
        last = self.linear.get(f"mlp.{names[-1]}") or self.linear[names[-1]]
        if not self.block.gated:
            hidden_states = self.linear[names[0]](x)
            hidden_states = self.activate(hidden_states)
            return last(hidden_states)
        if len(names) == 2:
            up_states = self.linear[names[0]](x)
            gate, up_states = ops.split(up_states, [up_states.numel // 2] * 2)
            up_states = ops.multiply(up_states, self.activate(gate))
            return last(up_states)
        return last(ops.multiply(self.activate(self.linear[names[0]](x)), self.linear[names[1]](x)))

    def activate(self, x: Tensor) -> Tensor:
        """silu or gelu as one kernel; GPT-2's and Phi's gelu is written out in Python."""
        ops = self.ops
        if self.block.activation == "one":
            return ops.unary(x)
        half = ops.scale(x)
        return ops.multiply(half, ops.add(ops.unary(self._bend(x), saves_output=True), None))

    def _bend(self, x: Tensor) -> Tensor:
        """``sqrt(2 / pi) * (x + 0.044715 * x ** 3)``."""
        ops = self.ops
        return ops.scale(ops.add(x, ops.scale(ops.power(x))))
