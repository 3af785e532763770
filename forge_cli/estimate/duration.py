"""How long a step and a run take on a GPU, and what they cost: a roofline with stated efficiencies.

Nothing here is fitted. Matrix products run at a measured share of the data sheet's peak, everything else at a measured
share of its bandwidth, and the two do not overlap, as PyTorch runs one kernel after the other. The band around the
result is where published measurements lie.
"""

from __future__ import annotations

from typing import NamedTuple

from forge_cli.estimate.flops import count_model_flops, count_step_flops
from forge_cli.estimate.traffic import MicroStepTraffic, count_micro_step_traffic
from forge_cli.estimate.work import StepFlops, Work
from forge_cli.facts.gpus import Gpu

# A bf16 product of 8192 x 8192 matrices: 798 of 989 TFLOP/s, and a copy: 3.0 of 3.35 TB/s, both on an H100.
MATMUL_EFFICIENCY = 0.80
COPY_EFFICIENCY = 0.90
# FlashAttention 2 reaches 35 % of the peak on an H100 (arXiv 2407.08608) and up to 73 % on an A100 (2307.08691).
ATTENTION_EFFICIENCY = 0.50
# Attention written out is bound by memory; a tenth of the peak is a guess.
EAGER_ATTENTION_EFFICIENCY = 0.10
# What Python and PyTorch take to launch one kernel: 5 to 6 microseconds, an assumption that no measurement backs.
LAUNCH_SECONDS = 5.5e-6
# Published runs without compilation reach 0.77 to 1.10 times the expected speed, compiled ones up to 1.35 times
# (tests/unit/estimate/test_duration.py lists them).
SLOW_RATIO, FAST_RATIO = 0.75, 1.20
# Optimizer states, read and written: bytes per trained fp32 weight.
_STATE_BYTES = {"adamw_bnb_8bit": 2.03, "paged_adamw_8bit": 2.03, "adafactor": 0.0, "sgd": 0.0}


class StepTime(NamedTuple):
    """One optimizer step on a GPU.

    Attributes:
        flops: Its operations.
        matmul_seconds: Matrix products, attention apart.
        attention_seconds: Scores and values.
        traffic_seconds: Norms, activations, adapters, the loss.
        weights_seconds: Unpacking or casting weights.
        optimizer_seconds: The update, clipping and averaging.
        launch_seconds: What the host needs to launch all kernels; a floor for all of the above but the optimizer.
        num_tokens: Tokens of the step, padding included.
        model_flops_ratio: Share of the peak that useful operations get (MFU, 0 to 1).
        assumptions: What was assumed, in words.
    """

    flops: StepFlops
    matmul_seconds: float
    attention_seconds: float
    traffic_seconds: float
    weights_seconds: float
    optimizer_seconds: float
    launch_seconds: float
    num_tokens: int
    model_flops_ratio: float
    assumptions: tuple[str, ...]

    @property
    def seconds(self) -> float:
        """The expected time."""
        device = self.matmul_seconds + self.attention_seconds + self.traffic_seconds + self.weights_seconds
        return max(device, self.launch_seconds) + self.optimizer_seconds

    @property
    def slow_seconds(self) -> float:
        """The upper end of the band."""
        return self.seconds / SLOW_RATIO

    @property
    def fast_seconds(self) -> float:
        """The lower end of the band."""
        return self.seconds / FAST_RATIO

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second, padding included."""
        return self.num_tokens / self.seconds

    @property
    def bound_by(self) -> str:
        """What takes the most of the time."""
        computing = self.matmul_seconds + self.attention_seconds
        moving = self.traffic_seconds + self.weights_seconds
        if self.launch_seconds > computing + moving:
            return "kernel launches"
        return "matrix products" if computing >= moving else "memory traffic"


class RunTime(NamedTuple):
    """A whole run.

    Attributes:
        num_steps: Optimizer steps.
        seconds: Expected duration of the training steps.
        fast_seconds: Lower end of the band.
        slow_seconds: Upper end.
        tokens_per_second: Tokens per second that are no padding.
        cost: Price of the expected duration; None without a price.
        fast_cost: Price of the lower end.
        slow_cost: Price of the upper end.
    """

    num_steps: int
    seconds: float
    fast_seconds: float
    slow_seconds: float
    tokens_per_second: float
    cost: float | None
    fast_cost: float | None
    slow_cost: float | None


def estimate_step_time(
    work: Work,
    gpu: Gpu,
    *,
    num_trained_parameters: int,
    trained_bytes: int = 4,
    optim: str = "adamw_torch_fused",
    ema: bool = False,
) -> StepTime | None:
    """Estimates one optimizer step under 16-bit computation; None for an architecture that Forge does not know.

    Args:
        work: What is computed.
        gpu: Where.
        num_trained_parameters: Weights that are trained.
        trained_bytes: Bytes per trained weight.
        optim: A value of ``training.optim``.
        ema: An average of the trained weights is kept on the device.

    Units: seconds. Source: operations / (peak x efficiency) + bytes / (bandwidth x efficiency), with the operations of
    ``count_step_flops`` (causal) and the bytes of ``count_micro_step_traffic``; matrix products take at least the time
    to read their weights, and all kernels together at least the time to launch them.
    """
    flops, traffic = count_step_flops(work), count_micro_step_traffic(work, trained_bytes)
    useful = count_model_flops(work)
    if flops is None or traffic is None or useful is None:
        return None
    steps, copy = work.micro_steps, gpu.bandwidth_bytes * COPY_EFFICIENCY
    of_attention = EAGER_ATTENTION_EFFICIENCY if work.attention == "eager" else ATTENTION_EFFICIENCY
    products = (flops.total - flops.attention) / (gpu.peak_flops * MATMUL_EFFICIENCY)
    time = StepTime(
        flops=flops,
        matmul_seconds=max(products, steps * traffic.reads_bytes / copy),
        attention_seconds=flops.attention / (gpu.peak_flops * of_attention),
        traffic_seconds=steps * (traffic.activations_bytes + traffic.loss_bytes) / copy,
        weights_seconds=steps * traffic.weights_bytes / copy,
        optimizer_seconds=_update_bytes(num_trained_parameters, trained_bytes, optim, ema, steps) / copy,
        launch_seconds=steps * traffic.kernels * LAUNCH_SECONDS,
        num_tokens=steps * work.num_tokens,
        model_flops_ratio=0.0,
        assumptions=_list_assumptions(work, gpu, traffic),
    )
    return time._replace(model_flops_ratio=useful / (time.seconds * gpu.peak_flops))


def estimate_run_time(
    step: StepTime, num_steps: int, *, num_real_tokens: float | None = None, price_per_hour: float | None = None
) -> RunTime:
    """Estimates a run from its steps; evaluation, checkpoints, loading and answers for the report come on top.

    Args:
        step: One step.
        num_steps: Optimizer steps of the run.
        num_real_tokens: Tokens of the run that are no padding; None takes them all for real.
        price_per_hour: Price of the GPU, in any currency.

    Units: seconds, tokens per second, and the currency of the price. Source: steps x time, time x price.
    """
    ends = [num_steps * seconds for seconds in (step.seconds, step.fast_seconds, step.slow_seconds)]
    tokens = num_steps * step.num_tokens if num_real_tokens is None else num_real_tokens
    costs = [None if price_per_hour is None else seconds / 3600 * price_per_hour for seconds in ends]
    return RunTime(num_steps, *ends, tokens / ends[0] if ends[0] else 0.0, *costs)


def _update_bytes(num_trained: int, trained_bytes: int, optim: str, ema: bool, micro_steps: int) -> float:
    """Counts the bytes of one update.

    Units: bytes. Source: weight read and written, gradient and both states likewise; clipping reads the gradient twice
    and writes it; each further micro step adds to the gradient (two reads, a write); an fp32 average is read and
    written beside a read weight.
    """
    states = _STATE_BYTES.get(optim, 2.0 * trained_bytes)
    per_weight = 3 * trained_bytes + 2 * states + 3 * trained_bytes + 3 * trained_bytes * (micro_steps - 1)
    return num_trained * (per_weight + (8 + trained_bytes if ema else 0))


def _list_assumptions(work: Work, gpu: Gpu, traffic: MicroStepTraffic) -> tuple[str, ...]:
    kind = "bf16" if gpu.has_bf16 else "fp16"
    length = f"{work.sequence_length} tokens" + (" (padding counts)" if work.masked else "")
    return (
        f"{gpu.name}: {gpu.peak_flops / 1e12:.0f} TFLOP/s in {kind} and {gpu.bandwidth_bytes / 1e9:.0f} GB/s by its "
        f"data sheet; matrix products reach {MATMUL_EFFICIENCY:.0%}, copies {COPY_EFFICIENCY:.0%}, measured on an H100",
        f"attention: {work.attention}, at "
        f"{EAGER_ATTENTION_EFFICIENCY if work.attention == 'eager' else ATTENTION_EFFICIENCY:.0%} of the peak",
        f"every sequence has {length}; no compilation; kernels do not overlap",
        f"{traffic.kernels:.0f} kernels a micro step at {LAUNCH_SECONDS * 1e6:.1f} microseconds to launch",
        f"band: {SLOW_RATIO:.2f} to {FAST_RATIO:.2f} times the expected speed, where published runs lie",
        "training steps only: evaluation, checkpoints, loading and answers come on top",
    )
