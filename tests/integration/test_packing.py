"""Packed rows do not see each other, and a window of micro steps is one batch: equal to rows alone, to the digit."""

from __future__ import annotations

import random

import pytest
import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen3Config,
    TrainerCallback,
    set_seed,
)

from forge_cli.backend.sft import ForgeSFTTrainer, build_trainer, build_training_args
from forge_cli.build.data import pack_data
from forge_cli.parts.labels import IGNORED
from forge_cli.parts.monitor import MonitorCallback
from forge_cli.paths import assets_root
from forge_cli.schema.runspec import RunSpec

LENGTHS = [2, 40, 7, 23, 31, 3, 16, 28, 9, 64, 12]
SHAPE = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    # Attention of weights near zero would hardly depend on what is seen.
    "initializer_range": 0.15,
    "pad_token_id": 0,
}
GEMMA3 = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2, "query_pre_attn_scalar": 16}
FAMILIES = {
    "llama": (LlamaConfig, {}),
    "mistral": (MistralConfig, {"sliding_window": 8}),
    "qwen3": (Qwen3Config, {}),
    "gemma2": (Gemma2Config, {"sliding_window": 8, "query_pre_attn_scalar": 16}),
    "gemma3": (Gemma3TextConfig, GEMMA3),
}
CELLS = [
    (name, attention) for name in FAMILIES for attention in ("sdpa", "eager") if (name, attention) != ("gemma2", "sdpa")
]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """For models of this size, threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def build_model(name: str, attention: str, **shape) -> PreTrainedModel:
    set_seed(0)
    config, own = FAMILIES[name]
    model = AutoModelForCausalLM.from_config(
        config(**{**SHAPE, **own, **shape}), dtype=torch.float32, attn_implementation=attention
    )
    assert model.config._attn_implementation == attention
    return model.eval()


def build_rows(lengths: list[int], seed: int = 0) -> Dataset:
    """Rows of random tokens, half of them trained, the first token of some among these."""
    draw = random.Random(seed)
    rows: dict[str, list] = {"input_ids": [], "labels": [], "row": [], "length": []}
    for number, length in enumerate(lengths, 1):
        ids = [draw.randrange(4, 512) for _ in range(length)]
        labels = [one if draw.random() < 0.5 else IGNORED for one in ids]
        labels[-1] = ids[-1]
        for name, value in (("input_ids", ids), ("labels", labels), ("row", number), ("length", length)):
            rows[name].append(value)
    return Dataset.from_dict(rows)


def build(model: PreTrainedModel, dataset: Dataset, folder, callbacks=(), **sections) -> ForgeSFTTrainer:
    """Builds Forge's own trainer, as a run does."""
    data = {"train": "forge:quickstart/train", **sections.pop("data", {})}
    spec = RunSpec(model={"name": "forge-tiny"}, data=data, checkpoint=None, **sections)
    return build_trainer(
        model=model,
        tokenizer=AutoTokenizer.from_pretrained(assets_root() / "forge-tiny"),
        args=build_training_args(spec, output_dir=folder, compute_dtype=torch.float32, device="cpu", has_eval=False),
        train_dataset=dataset,
        eval_dataset=None,
        monitor=MonitorCallback(),
        callbacks=callbacks,
    )


@pytest.fixture(scope="module", params=["packing", "padding_free"])
def joined(request, tmp_path_factory) -> tuple[Dataset, dict]:
    """Rows, and one batch of them as the trainer of a run with this setting collates it."""
    rows = build_rows(LENGTHS)
    trainer = build(
        build_model("llama", "sdpa"), rows, tmp_path_factory.mktemp("run"), data={request.param: True, "max_length": 64}
    )
    examples = list(pack_data(rows, 64)) if request.param == "packing" else list(rows)
    assert (len(examples) < len(rows)) == (request.param == "packing")
    batch = trainer.data_collator(examples)
    assert batch.pop("rows") == list(range(1, 12)) and batch.pop("real_tokens") == sum(LENGTHS)
    assert "attention_mask" not in batch and batch["input_ids"].shape == (1, sum(LENGTHS))
    return rows, batch


def read_log_probs(model: PreTrainedModel, **batch) -> torch.Tensor:
    """Returns the log probability of every token but the first. Shapes: ``[1, T]`` to ``[T - 1]``."""
    with torch.no_grad():
        logits = model(**batch, use_cache=False).logits[0, :-1]
    return torch.log_softmax(logits, dim=-1).gather(-1, batch["input_ids"][0, 1:, None])[:, 0]


def split_rows(rows: Dataset, batch: dict) -> list[tuple[list[int], int]]:
    """Finds the rows of a joined batch by their tokens; returns ids and start of each."""
    known = {tuple(ids) for ids in rows["input_ids"]}
    ids = batch["input_ids"][0].tolist()
    found, start = [], 0
    while start < len(ids):
        stop = next(i for i in range(start + 1, len(ids) + 1) if tuple(ids[start:i]) in known)
        found.append((ids[start:stop], start))
        start = stop
    assert sorted(one for one, _ in found) == sorted(map(list, known))
    return found


@pytest.mark.parametrize(("name", "attention"), CELLS)
def test_rows_that_share_a_sequence_do_not_see_each_other(joined, name, attention):
    rows, batch = joined
    model = build_model(name, attention)
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    together = read_log_probs(model, **inputs)
    blind = read_log_probs(model, input_ids=batch["input_ids"])
    worst, leak = 0.0, 0.0
    for ids, start in split_rows(rows, batch):
        alone = read_log_probs(model, input_ids=torch.tensor([ids]))
        part = slice(start, start + len(ids) - 1)
        worst = max(worst, (together[part] - alone).abs().max().item())
        leak = max(leak, (blind[part] - alone).abs().max().item())
    print(f"{name} {attention}: largest difference {worst:.1e}, without position ids {leak:.2f}")
    assert worst <= 1e-5
    assert leak > 0.01, "without position ids they do: the test would notice"


def test_the_same_tokens_are_trained(joined):
    """All labels of a row but its first, which nothing of the row predicts."""
    rows, batch = joined
    labels = batch["labels"][0].tolist()
    wanted = {tuple(ids): [IGNORED, *labels[1:]] for ids, labels in zip(rows["input_ids"], rows["labels"], strict=True)}
    for ids, start in split_rows(rows, batch):
        assert labels[start : start + len(ids)] == wanted[tuple(ids)]
    alone = sum(label != IGNORED for labels in rows["labels"] for label in labels[1:])
    assert (batch["labels"][:, 1:] != IGNORED).sum().item() == alone


# Gradients of a window of micro steps, through Forge's trainer.


class GradientReader(TrainerCallback):
    """Copies the gradients before every update."""

    def __init__(self) -> None:
        self.steps: list[torch.Tensor] = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps.append(torch.cat([p.grad.flatten().clone() for p in model.parameters() if p.grad is not None]))


def build_small() -> PreTrainedModel:
    """A model that adds little rounding of its own."""
    return build_model("llama", "sdpa", num_hidden_layers=2, initializer_range=0.05)


def train(
    folder, batch_size: int, accumulation: int, rows: Dataset, rate: float = 1e-12, **data
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Trains one epoch with SGD, at a rate that changes no weight; returns every step's gradients, and the weights."""
    model = build_small()
    reader = GradientReader()
    training = {
        "per_device_train_batch_size": batch_size,
        "gradient_accumulation_steps": accumulation,
        "num_train_epochs": 1,
        "optim": "sgd",
        "learning_rate": rate,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "weight_decay": 0.0,
        "max_grad_norm": 0.0,
    }
    trainer = build(model, rows, folder, [reader], training=training, data={"max_length": 128, **data}, seed=7)
    trainer.train()
    assert trainer.state.global_step == len(reader.steps)
    return reader.steps, torch.cat([p.detach().flatten() for p in model.parameters()])


def compare(a: torch.Tensor, b: torch.Tensor) -> float:
    """Returns the norm of a difference, relative to the norm."""
    return ((a.double() - b.double()).norm() / a.double().norm()).item()


def compute_by_hand(rows: Dataset, numbers: list[int]) -> torch.Tensor:
    """Computes the gradient of the mean loss over the trained tokens of these rows, each alone, in float64."""
    model = build_small().double().train()
    total = sum(label != IGNORED for i in numbers for label in rows[i]["labels"][1:])
    for i in numbers:
        logits = model(input_ids=torch.tensor([rows[i]["input_ids"]])).logits[0, :-1]
        labels = torch.tensor(rows[i]["labels"][1:])
        (torch.nn.functional.cross_entropy(logits, labels, reduction="sum", ignore_index=IGNORED) / total).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def list_windows(folder, rows: Dataset) -> list[list[int]]:
    """Lists the rows of both steps, in the trainer's own order."""
    trainer = build(build_small(), rows, folder, training={"per_device_train_batch_size": 8}, seed=7)
    set_seed(7)
    return [[number - 1 for number in batch["rows"]] for batch in trainer.get_train_dataloader()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor]:
    """Gradients of two whole batches, 8 rows and 3, the same by hand, and the weights after two large steps."""
    folder, rows = tmp_path_factory.mktemp("whole"), build_rows(LENGTHS)
    windows = list_windows(folder, rows)
    assert list(map(len, windows)) == [8, 3]
    gradients, _ = train(folder, 8, 1, rows)
    _, weights = train(folder, 8, 1, rows, rate=0.5)
    assert compare(weights, torch.cat([p.detach().flatten() for p in build_small().parameters()])) > 1e-2
    return gradients, [compute_by_hand(rows, window) for window in windows], weights


@pytest.mark.parametrize(
    ("batch_size", "accumulation", "data"),
    [(8, 1, {}), (1, 8, {}), (2, 4, {}), (8, 1, {"padding_free": True}), (2, 4, {"padding_free": True})],
)
def test_a_window_of_micro_steps_is_one_batch(tmp_path, whole, batch_size, accumulation, data):
    """11 rows of 2 to 64 tokens: the second window is short, and its last micro step shorter."""
    rows = build_rows(LENGTHS)
    gradients, _ = train(tmp_path, batch_size, accumulation, rows, **data)
    _, weights = train(tmp_path, batch_size, accumulation, rows, rate=0.5, **data)
    same, by_hand = ([compare(a, b) for a, b in zip(one, gradients, strict=True)] for one in whole[:2])
    print(f"{batch_size} x {accumulation} {data}: {same}; by hand {by_hand}; weights {compare(whole[2], weights)}")
    assert max(same) <= 1e-6 and compare(whole[2], weights) <= 1e-6
    assert max(by_hand) <= 1e-6, "although that is float64"


def test_a_packed_epoch_has_the_gradient_of_its_rows(tmp_path):
    rows = build_rows(LENGTHS)
    gradients, _ = train(tmp_path, 4, 2, pack_data(rows, 64), packing=True, max_length=64)
    assert len(gradients) == 1
    assert compare(compute_by_hand(rows, list(range(11))), gradients[0]) <= 1e-6
