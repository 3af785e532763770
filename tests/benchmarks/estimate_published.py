"""The estimate beside peaks that other projects measured and published, row by row.

    python tests/benchmarks/estimate_published.py PEAKS.json

The file is a list of rows with model, method, micro_batch, seq, value, unit and tier; tier A (allocated memory, all
settings known) is used. Nothing is fitted to the rows. They run LitGPT's code, not transformers': what is known to
differ is set here (16-bit adapters, all logits in 16 bit in chunks of 128 tokens), the rest is part of the error.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path

from forge_cli.estimate import step
from forge_cli.estimate.ledger import Ledger
from forge_cli.estimate.memory import estimate_memory
from forge_cli.estimate.operations import Formats, Operations
from forge_cli.estimate.setting import Adapters, Setting
from forge_cli.estimate.tape import Tape
from forge_cli.estimate.weights import weigh_model
from forge_cli.facts.model_facts import find_model_facts
from forge_cli.facts.parameter_count import linear_modules
from forge_cli.facts.shape import ModelFacts

UNITS = {"GB": 1e9, "GiB": 2**30, "MiB": 2**20}
# Source: LitGPT's config.py; it rounds vocabularies up to multiples of 512 for this family.
STABLELM = ModelFacts(
    "stablelm-alpha-3b",
    None,
    None,
    "gpt_neox",
    4096,
    16,
    32,
    32,
    128,
    16384,
    50688,
    False,
    num_parameters=3_637_321_728,
)
# Source: LitGPT's config_hub: rank, what has adapters, dropout, micro steps per step.
LORA = {
    "gemma2-2b": (8, "all", 0.1, 3),
    "llama-3-8b": (32, "qv", 0.05, 8),
    "mistral-7b-v0.1": (32, "qv", 0.05, 4),
    "falcon-7b": (32, "qv", 0.05, 8),
    "stablelm-alpha-3b": (32, "qv", 0.05, 8),
}
NAMES = {"gemma2-2b": "gemma-2-2b", "mistral-7b-v0.1": "mistral-7b"}


def chunked_loss(ops, setting, hidden, head):
    """LitGPT's loss: logits of 128 tokens at a time, all kept in 16 bit, and their log-softmax."""
    vocabulary, width = setting.facts.vocab_size, setting.facts.hidden_size
    tokens = setting.num_sequences * setting.sequence_length
    capped, losses = setting.facts.model_type == "gemma2", []
    parts = ops.split(hidden, [128 * width] * (tokens // 128)) if tokens > 128 else [hidden]
    logits = [ops.linear(part, head, None, width, vocabulary) for part in parts]
    if capped:  # 30 * tanh(logits / 30)
        logits = [ops.scale(ops.unary(ops.scale(one), saves_output=True)) for one in logits]
    for one in logits:
        losses.append(ops.unary(one, saves_output=True))
    numel, size = losses[0].numel, losses[0].itemsize
    (loss,) = ops.tape.apply(losses, [(1, 4)], lambda g, _: [ops.new(numel, size) for _ in losses])
    return loss


def predict_training(row: dict) -> int:
    """Predicts a LoRA row."""
    name = row["model"]
    facts = STABLELM if name == STABLELM.name else find_model_facts(NAMES.get(name, name))
    facts = facts._replace(tie_word_embeddings=False)  # LitGPT holds the output layer apart
    rank, kind, dropout, micro_steps = LORA[name]
    modules = linear_modules(facts)
    targets = [n for n, _, _ in modules if kind == "all" or n in ("q_proj", "v_proj", "query_key_value")]
    trained: dict[int, int] = {}
    for target, inputs, outputs in modules:
        if target in targets:
            for size in (rank * inputs, rank * outputs):
                trained[size] = trained.get(size, 0) + facts.num_hidden_layers
    step._LOSSES["chunked"] = chunked_loss
    setting = Setting(
        facts=facts,
        batch_size=row["micro_batch"],
        sequence_length=row["seq"],
        weights_bytes=weigh_model(facts, 2),
        trained=trained,
        adapters=Adapters(rank, tuple(targets), dropout),
        trained_bytes=2,
        autocast=False,
        activation_checkpointing=False,
        accumulation_steps=micro_steps,
        optim="adamw_torch",
        attention="eager" if facts.model_type == "gemma2" else "sdpa",
        loss="chunked",
    )
    return estimate_memory(setting).total_bytes


def predict_difference(rows: list[dict], row: dict) -> tuple[float, float] | None:
    """Predicts what double quantisation saves: inference holds more than weights, the difference does not."""
    if not row["method"].endswith("nf4-dq"):
        return None
    other = next(
        r for r in rows if r["model"] == row["model"] and r["method"] == "weights/inference nf4" and r["tier"] == "A"
    )
    facts = find_model_facts(row["model"])
    single, double = (weigh_model(facts, 2, quantized_bits=4, double_quant=dq) for dq in (False, True))
    return single - double, (other["value"] - row["value"]) * UNITS[row["unit"]]


def predict_geglu(row: dict) -> int:
    """Predicts a feed-forward block of transformers; the benchmark keeps the graph, and gradients between rounds."""
    shape = json.loads(row["cfg"])
    tokens, width, inner = (
        shape["bsz"] * int(row["x"].removeprefix("T=")),
        shape["hidden_size"],
        shape["intermediate_size"],
    )
    ledger = Ledger(512)
    tape = Tape(ledger, has_gradients=True)
    ops = Operations(tape, Formats(2, autocast=False, cuda=True))
    held = [tape.new(width * inner, 2) for _ in range(3)]
    gate, up, down = (tape.leaf(width * inner, 2, True) for _ in range(3))
    x = tape.new(tokens * width, 2)
    x.needs_grad, x.grad = True, tape.new(tokens * width, 2)
    wide = ops.linear(x, gate, None, width, inner)
    active, rising = ops.unary(wide), ops.linear(x, up, None, width, inner)
    product = ops.multiply(active, rising)
    y = ops.linear(product, down, None, inner, width)
    kept = [wide, active, rising, product]  # retain_graph=True
    gradient = tape.new(tokens * width, 2)
    ledger.enter("backward")
    tape.backward(y)
    del held, kept, gradient
    return max(size for size, _ in ledger.peaks.values()) + 8_519_680 * 2


def main() -> None:
    """Prints every row and the summary."""
    rows = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    errors = []
    for row in rows:
        measured = row["value"] * UNITS[row["unit"]]
        if row["tier"] != "A":
            continue
        if row["model"] == "op:geglu":
            if row["method"] != "huggingface":
                continue
            predicted = predict_geglu(row)
        elif row["method"] == "lora":
            predicted = predict_training(row)
        elif row["method"] == "weights/inference bf16":
            predicted = weigh_model(find_model_facts(row["model"]), 2)
        elif (pair := predict_difference(rows, row)) is not None:
            predicted, measured = pair
        else:
            continue
        error = predicted / measured - 1
        errors.append(abs(error))
        label = f"{row['model']} {row['method']} {row.get('micro_batch', '')} x {row.get('seq') or row.get('x', '')}"
        print(
            f"{label:52} measured {measured / 1e9:6.2f} GB  predicted {predicted / 1e9:6.2f} GB  {100 * error:+6.1f} %"
        )
    median = statistics.median(errors)
    print(f"{len(errors)} rows, median error {100 * median:.1f} %, largest {100 * max(errors):.1f} %")


if __name__ == "__main__":
    main()
