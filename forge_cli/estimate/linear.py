"""A linear layer and its adapter, in sizes only: plain or quantised, LoRA or DoRA.

Local variables have the names and the lifetimes of the original, because what a name still holds is memory.
"""

from __future__ import annotations

from forge_cli.estimate.operations import FP32, Operations
from forge_cli.estimate.setting import Setting
from forge_cli.estimate.tape import Tensor

# CUDA kernels multiply by packed 4-bit weights up to about so many rows (64 on an H100, 256 on an RTX 4090); with more
# the weight is unpacked first. Source: bitsandbytes 0.50.2, ``_gemm_4bit_use_custom_cuda``.
UNPACKS_ABOVE_ROWS = 256
_BLOCK = 64


class Linear:
    """A linear layer with its adapter, if it has one.

    Args:
        ops: Operations on the tape.
        setting: The step.
        name: Dotted name in the model.
        inputs: Width of the input.
        outputs: Width of the output.
        frozen: Neither it nor an adapter is trained.
        bias: It has a bias.
        own: It is Falcon's own class: ``input @ weight.T + bias`` in two operations, never quantised.
    """

    def __init__(
        self,
        ops: Operations,
        setting: Setting,
        name: str,
        inputs: int,
        outputs: int,
        *,
        frozen: bool,
        bias: bool,
        own: bool = False,
    ) -> None:
        tape, adapters = ops.tape, setting.adapters
        self.ops, self.setting, self.inputs, self.outputs, self.own = ops, setting, inputs, outputs, own
        trained = adapters is None and not frozen and name not in setting.frozen
        size = setting.trained_bytes if trained else setting.weight_bytes
        self.weight = tape.leaf(inputs * outputs, size, trained)
        self.bias = tape.leaf(outputs, size, trained) if bias else None
        self.bits = None if own else setting.quantized_bits
        self.down = self.up = self.magnitude = None
        if adapters and not frozen and adapters.reach(name):
            self.down = self._adapt(f"{name}.lora_A.default", inputs * adapters.rank)
            self.up = self._adapt(f"{name}.lora_B.default", outputs * adapters.rank)
            if adapters.dora:
                self.magnitude = self._adapt(f"{name}.lora_magnitude_vector.default", outputs)

    def _adapt(self, name: str, numel: int) -> Tensor:
        return self.ops.tape.leaf(numel, self.setting.trained_bytes, name not in self.setting.frozen)

    def __call__(self, x: Tensor) -> Tensor:
        """Runs it. Source: PEFT 0.21, ``lora/layer.py`` and ``lora/bnb.py``."""
        ops = self.ops
        result = self._run_base(x)
        if self.down is None:
            return result
        if self.bits == 4:
            result = ops.copy(result)
        expected = result.itemsize
        # bitsandbytes' layers ask whether CUDA's autocast is on, whatever the device.
        converts = not (self.bits and ops.formats.autocast and ops.formats.cuda)
        # Under autocast Forge leaves the input as it is (``parts/adapter_inputs.py``), except for DoRA.
        if converts and (self.magnitude is not None or not ops.formats.autocast):
            x = ops.cast(x, self.down.itemsize)
        if self.magnitude is not None:
            result = self._add_dora(x, result)
            return ops.cast(result, expected) if converts else result
        dropout = self.setting.adapters.dropout
        output = ops.scale(self._raise(self._lower(ops.dropout(x, dropout))))
        if converts and self.bits:
            output = ops.cast(output, expected)
        result = ops.add(result, output)
        del output
        return ops.cast(result, expected) if converts else result

    def _lower(self, x: Tensor) -> Tensor:
        return self.ops.linear(x, self.down, None, self.inputs, self.setting.adapters.rank)

    def _raise(self, x: Tensor) -> Tensor:
        return self.ops.linear(x, self.up, None, self.setting.adapters.rank, self.outputs)

    def _run_base(self, x: Tensor) -> Tensor:
        ops = self.ops
        if self.bits:
            return self._run_4bit(x) if self.bits == 4 else self._run_8bit(x)
        if not self.own:
            return ops.linear(x, self.weight, self.bias, self.inputs, self.outputs)
        hidden_states = ops.linear(x, self.weight, None, self.inputs, self.outputs, view=True)
        return hidden_states if self.bias is None else ops.add(hidden_states, self.bias)

    # Quantised ---------------------------------------------------------------------------------------------------

    def _run_4bit(self, x: Tensor) -> Tensor:
        """Keeps nothing; the weight is unpacked forwards and again backwards.

        Source: bitsandbytes 0.50.2, ``Linear4bit``, ``MatMul4Bit`` and ``_dequant_linear_fallback``.
        """
        ops, before = self.ops, x.itemsize
        x = ops.cast(x, ops.formats.compute_bytes)
        tokens, size = x.numel // self.inputs, x.itemsize

        def backward(g):
            scales = self._unpack_scales(1)
            unpacked = self._unpack(self.setting.weight_bytes)
            del scales
            unpacked = ops.cast(unpacked, size)
            return [ops.new(tokens * self.inputs, size)]

        if tokens > UNPACKS_ABOVE_ROWS or not ops.formats.cuda:
            scales, unpacked = self._unpack_scales(2 if ops.formats.cuda else 1), self._unpack(size)
            (y,) = ops.tape.apply((x,), [(tokens * self.outputs, size)], backward)
            del scales, unpacked
        else:
            (y,) = ops.tape.apply((x,), [(tokens * self.outputs, size)], backward)
        return ops.cast(y, before)

    def _run_8bit(self, x: Tensor) -> Tensor:
        """Keeps its input, and as an attribute: not even checkpointing frees it before the graph ends.

        Source: bitsandbytes 0.50.2, ``MatMul8bitFp`` (CPU) and ``MatMul8bitLt`` (CUDA), outliers left out.
        """
        ops, size, wide = self.ops, x.itemsize, self.inputs * self.outputs
        numel, tokens, cuda = x.numel, x.numel // self.inputs, ops.formats.cuda
        compute = ops.formats.compute_bytes if ops.formats.autocast and not cuda else size

        def backward(g):
            unpacked = ops.new(wide, size)
            of_x = ops.new(numel, compute)
            del unpacked
            return [ops.cast(of_x, size)]

        if cuda:
            # The input in 8 bit, the product in 32 bit and then in fp16.
            held = [ops.new(numel, 1), ops.new(tokens * self.outputs, FP32), ops.new(tokens * self.outputs, 2)]
        else:
            held = [ops.new(wide, size)]
            held += [ops.new(numel, compute), ops.new(wide, compute)] if compute != size else []
        (y,) = ops.tape.apply((x,), [(tokens * self.outputs, compute)], backward)
        del held
        ops.tape.keep(y, x)
        return y

    def _unpack_scales(self, copies: int) -> list[Tensor]:
        """Scales that are quantised themselves, in fp32; CUDA's forward pass keeps them before and after a shift."""
        numel = -(-self.inputs * self.outputs // _BLOCK)
        return [self.ops.new(numel, FP32) for _ in range(copies if self.setting.double_quant else 0)]

    def _unpack(self, itemsize: int) -> Tensor:
        return self.ops.new(self.inputs * self.outputs, itemsize)

    # DoRA ----------------------------------------------------------------------------------------------------------

    def _add_dora(self, x: Tensor, result: Tensor) -> Tensor:
        """Adds what DoRA adds. Source: PEFT 0.21, ``lora/variants.py`` and ``lora/dora.py``."""
        ops, dropout = self.ops, self.setting.adapters.dropout
        base_result = result
        if dropout:
            x, base_result = ops.dropout(x, dropout), None
        return ops.add(result, self._run_dora(x, base_result))

    def _run_dora(self, x: Tensor, base_result: Tensor | None) -> Tensor:
        ops, wide = self.ops, self.inputs * self.outputs
        # The product of the adapters' matrices is made by sending all unit vectors through them.
        lora_weight = self._raise(self._lower(ops.new(self.inputs**2, self.down.itemsize)))
        lora_weight = ops.cast(lora_weight, x.itemsize)
        weight = self._unpack(self.setting.weight_bytes) if self.bits else self.weight
        weight = ops.cast(weight, x.itemsize)
        with ops.tape.no_grad():
            total = ops.new(wide, x.itemsize)  # scaling * lora_weight
            total = ops.new(wide, x.itemsize)
            del total
        mag_norm_scale = ops.multiply(self.magnitude, ops.new(self.outputs, x.itemsize))
        lora_result = self._raise(self._lower(x))
        if base_result is None:
            base_result = ops.linear(x, weight, None, self.inputs, self.outputs)
        elif self.bias is not None:
            base_result = ops.add(base_result, self.bias)
        first = ops.multiply(ops.add(mag_norm_scale, None), base_result)
        return ops.add(first, ops.scale(ops.multiply(mag_norm_scale, lora_result)))
