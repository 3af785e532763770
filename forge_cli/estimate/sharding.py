"""The memory of one rank when a run is spread over several devices."""

from __future__ import annotations

from typing import NamedTuple

from forge_cli.errors import ConfigError
from forge_cli.estimate.memory import Instant, MemoryEstimate
from forge_cli.facts.parameter_count import count_embedding_parameters, count_layer_parameters

STRATEGIES = ("ddp", "zero1", "zero2", "zero3", "fsdp2")
# What is divided by the number of ranks.
_SHARDED = {
    "ddp": (),
    "zero1": ("optimizer", "EMA"),
    "zero2": ("optimizer", "EMA", "gradients"),
    "zero3": ("optimizer", "EMA", "gradients", "weights", "adapters", "reference", "autocast copies"),
    "fsdp2": ("optimizer", "EMA", "gradients", "weights", "adapters", "reference", "autocast copies"),
}
_OFFLOADED = {
    "zero1": ("optimizer",),
    "zero2": ("optimizer", "gradients"),
    "zero3": ("optimizer", "gradients", "weights", "adapters"),
    "fsdp2": ("optimizer", "gradients", "weights", "adapters"),
}


class Sharding(NamedTuple):
    """How a run is spread.

    Attributes:
        strategy: One of ``STRATEGIES``.
        num_ranks: Devices.
        cpu_offload: What is sharded lies in host memory.
    """

    strategy: str
    num_ranks: int
    cpu_offload: bool = False


def read_sharding(written: str) -> Sharding:
    """Reads ``fsdp2:8`` or ``zero3:8:offload``.

    Raises:
        ConfigError: It says something else.
    """
    name, _, rest = written.partition(":")
    count, _, offload = rest.partition(":")
    if name not in STRATEGIES or not count.isdigit() or int(count) < 1 or offload not in ("", "offload"):
        raise ConfigError(
            f"--sharding {written} is not known",
            fix=f"write STRATEGY:RANKS with {', '.join(STRATEGIES)}, such as fsdp2:8 or zero3:8:offload",
        )
    if offload and name == "ddp":
        raise ConfigError("ddp offloads nothing", fix="write --sharding zero2:N:offload or fsdp2:N:offload")
    return Sharding(name, int(count), bool(offload))


def shard(estimate: MemoryEstimate, sharding: Sharding) -> MemoryEstimate:
    """Returns the estimate of one rank; batch and length stay those of each rank.

    DDP holds buckets of the size of all gradients. FSDP2 and ZeRO-3 gather two layers at a time (the present one and
    the next), the gradients of one, and hold embeddings and output layer whole between forward and backward pass.

    Units: bytes. Source: torch 2.13 (``DistributedDataParallel`` without bucket views, ``fully_shard``), DeepSpeed's
    documentation of stages 1 to 3; not measured by us.
    """
    instants = tuple(_shard_instant(one, estimate, sharding) for one in estimate.instants)
    return estimate._replace(instants=instants)


def _shard_instant(instant: Instant, estimate: MemoryEstimate, sharding: Sharding) -> Instant:
    parts = dict(instant.parts)
    offloaded = _OFFLOADED.get(sharding.strategy, ()) if sharding.cpu_offload else ()
    for name in _SHARDED[sharding.strategy]:
        if name in parts:
            parts[name] = 0 if name in offloaded else -(-parts[name] // sharding.num_ranks)
    parts["communication"] = 0 if instant.name == "load" else _communication_bytes(estimate, sharding)
    return Instant(instant.name, dict(sorted(((k, v) for k, v in parts.items() if v), key=lambda one: -one[1])))


def _communication_bytes(estimate: MemoryEstimate, sharding: Sharding) -> int:
    setting = estimate.setting
    gradients = setting.trained_bytes * sum(size * times for size, times in setting.trained.items())
    if sharding.num_ranks == 1:
        return 0
    if sharding.strategy in ("ddp", "zero1"):
        return gradients
    layer = count_layer_parameters(setting.facts) or 0
    layer_gradients = gradients // max(setting.facts.num_hidden_layers, 1)
    if sharding.strategy == "zero2":
        return layer_gradients
    embeddings = count_embedding_parameters(setting.facts) * (1 if setting.facts.tie_word_embeddings else 2)
    return setting.compute_bytes * (2 * layer + embeddings) + layer_gradients
