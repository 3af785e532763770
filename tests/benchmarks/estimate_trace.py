"""The replay beside a trace of the real trainer, for every family, method, length and depth.

    python tests/benchmarks/estimate_trace.py [FAMILY,...]

Traces Forge's own trainer on fake tensors in CUDA's formats: one to three seconds each, about half an hour for all. A
trace cannot see cuBLAS's workspace, so it is left out on both sides. Forge trains adapters in float32 only.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterator
from itertools import product

from forge_cli.estimate.memory import CUBLAS_BYTES, estimate_memory
from forge_cli.estimate.plan_memory import setting_from_plan
from forge_cli.facts.parameter_count import count_parameters
from forge_cli.facts.shape import ModelFacts
from forge_cli.resolve.plan import Plan, resolve_mapping
from forge_cli.run.trace import run_requests

FAMILIES = (
    "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3", "phi", "gpt_neox", "gpt2", "olmo2",
    "smollm3", "falcon", "mixtral", "qwen3_moe", "gpt_oss",
)  # fmt: skip
ALL_HEADS = ("gpt2", "gpt_neox", "phi")
EXPERTS = ("mixtral", "qwen3_moe", "gpt_oss")
WINDOWS = ("gemma2", "gemma3_text", "gpt_oss")
LIMIT = 0.01


def make_facts(family: str, num_layers: int, tied: bool) -> ModelFacts:
    """Makes a model of real width."""
    facts = ModelFacts(
        name="wide",
        hub_id="nobody/wide",
        path=None,
        model_type=family,
        hidden_size=2048,
        num_hidden_layers=num_layers,
        num_attention_heads=16,
        num_key_value_heads=16 if family in ALL_HEADS else 1 if family == "falcon" else 4,
        head_dim=128,
        intermediate_size=8192 if family in (*ALL_HEADS, "falcon") else 5632,
        vocab_size=40_000,
        tie_word_embeddings=tied,
        max_position_embeddings=8192,
        sliding_window=1024 if family in WINDOWS else None,
    )
    if family in EXPERTS:
        facts = facts._replace(num_local_experts=8, num_experts_per_tok=2)
    if family == "qwen3_moe":  # the others have experts as wide as intermediate_size
        facts = facts._replace(moe_intermediate_size=1408)
    return facts._replace(num_parameters=count_parameters(facts))


def make_plan(method: str, length: int, checkpointing: bool, facts: ModelFacts) -> Plan:
    """Resolves one cell's settings."""
    values = {
        "model": {"name": "forge-tiny"},
        "data": {"train": "forge:quickstart/train", "max_length": 512},
        "training": {
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": 2,
            "activation_checkpointing": checkpointing,
        },
        "lora": {"r": 16} if method != "full" else None,
        "quantization": {"bits": 4} if method == "qlora" else None,
    }
    plan = resolve_mapping(values)
    data = plan.spec.data.model_copy(update={"max_length": length})
    return plan._replace(spec=plan.spec.model_copy(update={"data": data}), facts=facts)


def list_cells(families: list[str]) -> Iterator[tuple[str, Plan]]:
    """Yields every cell: its label and its plan."""
    grid = product(("full", "lora", "qlora"), (True, False), (512, 4096), (False, True), (2, 3))
    for family, (method, checkpointing, length, tied, num_layers) in product(families, grid):
        facts = make_facts(family, num_layers, tied)
        label = f"{family} {method} {'ckpt' if checkpointing else 'plain'} {length} {'tied' if tied else 'untied'}"
        yield f"{label} {num_layers} layers", make_plan(method, length, checkpointing, facts)


def compare(cells: list[tuple[str, Plan]]) -> list[float]:
    """Traces the cells of one family in one process, prints them and returns their errors."""
    requests = [
        {
            "spec": plan.spec.model_dump(mode="json"),
            "facts": plan.facts._asdict(),
            "num_layers": plan.facts.num_hidden_layers,
            "device": "cuda",
        }
        for _, plan in cells
    ]
    errors = []
    for (label, plan), answer in zip(cells, run_requests(requests), strict=True):
        traced = max(answer["phases"].values())
        errors.append((estimate_memory(setting_from_plan(plan)).total_bytes - CUBLAS_BYTES) / traced - 1)
        mark = "  <<<" if abs(errors[-1]) > LIMIT else ""
        print(f"{label:52} {traced / 2**20:9.1f} MiB {100 * errors[-1]:+6.2f} %{mark}", flush=True)
    return errors


def main() -> None:
    """Compares the cells of the families that are named, or all."""
    families = sys.argv[1].split(",") if len(sys.argv) > 1 else list(FAMILIES)
    errors = [error for family in families for error in compare(list(list_cells([family])))]
    inside = sum(abs(one) <= LIMIT for one in errors)
    worst = max(map(abs, errors))
    median = statistics.median(map(abs, errors))
    print(f"{inside} of {len(errors)} cells within {100 * LIMIT:.0f} %")
    print(f"median {100 * median:.2f} %, worst {100 * worst:.2f} %")


if __name__ == "__main__":
    main()
