"""DPO against arithmetic by hand: its losses, its reference, its first step, and what it teaches."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from preference_pairs import TARGETS, Listener, encode_pairs, load_base, one_step, run, sum_log_probs, write_marked
from torch.nn.functional import logsigmoid
from transformers import set_seed

BETA, STEPS, RATE = 0.1, 10, 1e-3


def read_steps(folder) -> list[dict]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if record.get("grad_norm") is not None]


def test_dpo_teaches_what_the_pairs_say(pair_settings):
    """The base finds both answers about equally likely; the trained model prefers the better one on unseen pairs."""
    training = {**one_step(16), "learning_rate": RATE, "max_steps": 20}
    result = run(pair_settings(lora={"r": 8, "lora_alpha": 16}, training=training))
    base, trained = load_base(), AutoPeftModelForCausalLM.from_pretrained(result.weights).eval()
    wins, margins = {"base": 0, "trained": 0, "over the base": 0}, []
    with torch.no_grad():
        for prompt, better, worse in encode_pairs("heldout"):
            had, has = ([sum_log_probs(m, prompt, answer) for answer in (better, worse)] for m in (base, trained))
            wins["base"] += bool(had[0] > had[1])
            wins["trained"] += bool(has[0] > has[1])
            wins["over the base"] += bool(has[0] - had[0] > has[1] - had[1])
            margins.append(BETA * float((has[0] - had[0]) - (has[1] - had[1])))
    print(", ".join(f"better answer preferred, {who}: {100 * count / 60:.1f} %" for who, count in wins.items()))
    assert 0.35 < wins["base"] / 60 < 0.65
    assert wins["trained"] / 60 > 0.9
    # The saved adapter is the one that was evaluated, and the report's figures are means over its pairs.
    last = result.report["preferences"][-1]
    assert last["of"] == "held out"
    assert last["accuracies"] == pytest.approx(wins["over the base"] / 60, abs=1e-6)
    assert last["margins"] == pytest.approx(sum(margins) / 60, abs=1e-4)
    assert result.report["losses"]["eval_raw"] == pytest.approx(
        sum(math.log1p(math.exp(-margin)) for margin in margins) / 60, abs=1e-4
    )
    text = (result.folder / "report.md").read_text()
    assert "## Preferences" in text
    # The model starts as its reference: all are ties. The rate of the first step is 0, so the second's are as well.
    shares = [record.get("rewards/accuracies") for record in read_steps(result.folder)]
    assert shares[:2] == [None, None] and all(0 <= share <= 1 for share in shares[2:])
    starts = [entry for entry in result.report["preferences"] if entry["step"] <= 1]
    assert [(entry["margins"], entry["accuracies"]) for entry in starts] == [(0.0, None)] * 2
    assert " 0.0 %" not in text


def test_losses_and_weights_equal_a_loop_by_hand(pair_settings, trainers, tiny_batch):
    result = run(pair_settings(training={"max_steps": STEPS, "learning_rate": RATE, "max_grad_norm": 0.4}))
    batches = list(trainers[0].get_train_dataloader())  # the order of rows is a function of the seed
    assert sorted(row for batch in batches for row in batch["rows"]) == list(range(1, 281))

    pairs = encode_pairs("train")
    base = load_base()
    set_seed(42)
    model = get_peft_model(load_base(), LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE, weight_decay=0)
    losses = []
    for step in range(STEPS):
        rows = [row for batch in batches[2 * step : 2 * step + 2] for row in batch["rows"]]
        assert len(rows) == 4
        loss = torch.zeros(())
        for row in rows:
            prompt, better, worse = pairs[row - 1]
            with torch.no_grad():
                had = sum_log_probs(base, prompt, better) - sum_log_probs(base, prompt, worse)
            has = sum_log_probs(model, prompt, better) - sum_log_probs(model, prompt, worse)
            loss = loss - logsigmoid(BETA * (has - had)) / len(rows)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.4)
        # Cosine to zero, after one step of warm-up (3 % of 10 steps, rounded up).
        optimizer.param_groups[0]["lr"] = RATE * (0 if step == 0 else 0.5 * (1 + math.cos(math.pi * (step - 1) / 9)))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert losses[-1] < losses[0] - 0.005
    assert [record["loss"] for record in read_steps(result.folder)] == pytest.approx(losses, abs=1e-5)
    saved = PeftModel.from_pretrained(load_base(), result.weights).eval()
    with torch.no_grad():
        ours, by_hand = (m(input_ids=tiny_batch["input_ids"]).logits for m in (saved, model.eval()))
    # Adam divides a gradient by its own size: rounding in a gradient near zero becomes a step of full length.
    assert torch.allclose(ours, by_hand, atol=2e-2), (ours - by_hand).abs().max()


def find_first_pairs(trainer) -> list:
    """Returns the pairs of a run's first batch."""
    pairs = encode_pairs("train")
    return [pairs[row - 1] for row in next(iter(trainer.get_train_dataloader()))["rows"]]


def test_ipo_by_hand(pair_settings, trainers, adapter):
    """IPO's margin is of means per token. The adapter differs from its reference, the base, so it is not 0."""
    preference = {"loss_type": "ipo", "beta": 0.3, "reference": "base"}
    settings = pair_settings(model={"adapter": str(adapter)}, preference=preference, training=one_step())
    [record] = read_steps(run(settings).folder)
    base, start = load_base(), PeftModel.from_pretrained(load_base(), adapter).eval()
    expected = []
    with torch.no_grad():
        for prompt, better, worse in find_first_pairs(trainers[0]):
            gains = [
                (sum_log_probs(start, prompt, answer) - sum_log_probs(base, prompt, answer)) / len(answer)
                for answer in (better, worse)
            ]
            expected.append(float((gains[0] - gains[1] - 1 / (2 * 0.3)) ** 2))
    assert record["loss"] == pytest.approx(sum(expected) / len(expected), abs=1e-5)
    assert abs(record["loss"] - (1 / 0.6) ** 2) > 1e-3, "the margin has to matter"


def test_kto_by_hand(pair_settings, trainers, adapter, tmp_path):
    data = {"train": write_marked(tmp_path / "marked.jsonl", "train"), "eval": None}
    preference = {"reference": "base", "desirable_weight": 1.5, "undesirable_weight": 0.5}
    settings = pair_settings(
        "kto", data=data, model={"adapter": str(adapter)}, preference=preference, training=one_step(6)
    )
    [record] = read_steps(run(settings).folder)
    encoded = encode_pairs("train")
    answers = [(prompt, answer, good) for prompt, *two in encoded for answer, good in zip(two, (1, 0), strict=True)]
    batch = [answers[row - 1] for row in trainers[0].train_dataset[:6]["row"]]
    assert 0 < sum(good for *_, good in batch) < 6
    base, start = load_base(), PeftModel.from_pretrained(load_base(), adapter).eval()

    def gain(prompt, answer) -> float:
        return float(sum_log_probs(start, prompt, answer) - sum_log_probs(base, prompt, answer))

    with torch.no_grad():
        mismatched = [gain(batch[i][0], batch[i - 1][1]) for i in range(6)]
        divergence = max(0.0, sum(mismatched) / 6)
        losses = []
        for prompt, answer, good in batch:
            reward = gain(prompt, answer) - divergence
            weight, sign = (1.5, 1) if good else (0.5, -1)
            losses.append(weight * (1 - 1 / (1 + math.exp(-sign * BETA * reward))))
    assert record["loss"] == pytest.approx(sum(losses) / 6, abs=1e-5)


def test_a_kto_row_alone_in_its_batch(pair_settings, trainers, adapter, tmp_path):
    """Five rows in batches of two: the last has no neighbour whose answer it could be compared with."""
    data = {name: write_marked(tmp_path / name, split) for name, split in (("train", "train"), ("eval", "heldout"))}
    lines = Path(data["eval"]).read_text().splitlines(keepends=True)
    Path(data["eval"]).write_text("".join(lines[:5]))
    settings = pair_settings(
        "kto",
        data=data,
        model={"adapter": str(adapter)},
        preference={"reference": "base"},
        training=one_step(6),
        evaluation={"per_device_eval_batch_size": 2},
    )
    result = run(settings)
    trained, held = (
        [
            (prompt, answer, good)
            for prompt, *two in encode_pairs(split)
            for answer, good in zip(two, (1, 0), strict=True)
        ]
        for split in ("train", "heldout")
    )
    other = trained[trainers[0].train_dataset[0]["row"] - 1][1]
    held = [held[row - 1] for row in trainers[0].eval_dataset["row"]]
    base, start = load_base(), PeftModel.from_pretrained(load_base(), adapter).eval()

    def gain(prompt, answer) -> float:
        with torch.no_grad():
            return float(sum_log_probs(start, prompt, answer) - sum_log_probs(base, prompt, answer))

    def mean_loss(stand_in: list[int]) -> float:
        losses = []
        for batch in (held[:2], held[2:4], held[4:]):
            others = [batch[-1][1], batch[0][1]] if len(batch) > 1 else [stand_in]
            gains = [gain(prompt, answer) for (prompt, *_), answer in zip(batch, others, strict=True)]
            divergence = max(0.0, sum(gains) / len(batch))
            for prompt, answer, good in batch:
                reward = BETA * (gain(prompt, answer) - divergence)
                losses.append(1 - 1 / (1 + math.exp(-reward if good else reward)))
        return sum(losses) / len(losses)

    found = result.report["losses"]["eval_before"]
    assert found == pytest.approx(mean_loss(other), abs=1e-5)
    assert abs(found - mean_loss(held[-1][1])) > 1e-4, "its own answer has to make a difference"


def test_held_out_figures_of_methods_without_reference_by_hand(pair_settings):
    """ORPO's plain loss is a mean over tokens, prompt included, its odds one over pairs; SimPO is all over pairs."""
    base = load_base()
    plain_sum = plain_count = 0.0
    odds, simpo, wins = [], [], 0
    with torch.no_grad():
        for prompt, better, worse in encode_pairs("heldout"):
            chosen, rejected = (sum_log_probs(base, prompt, a) / len(a) for a in (better, worse))
            simpo.append(-float(logsigmoid(2.0 * (chosen - rejected) - 1.0)))
            ratio = (chosen - rejected) - (torch.log1p(-chosen.exp()) - torch.log1p(-rejected.exp()))
            odds.append(-float(logsigmoid(ratio)))
            wins += bool(chosen > rejected)
            plain_sum -= float(sum_log_probs(base, prompt[:1], prompt[1:] + better))
            plain_count += len(prompt) + len(better) - 1
    expected = {"orpo": plain_sum / plain_count + 0.2 * sum(odds) / 60, "cpo": sum(simpo) / 60}
    sections = {"orpo": {"beta": 0.2}, "cpo": {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 1.0, "cpo_alpha": 0.0}}
    for method, section in sections.items():
        evaluation = {"per_device_eval_batch_size": 7}  # 60 pairs: the last batch is smaller
        result = run(pair_settings(method, preference=section, training=one_step(), evaluation=evaluation))
        assert result.report["reference"] is None
        assert result.report["losses"]["eval_before"] == pytest.approx(expected[method], abs=1e-4)
        first = next(entry for entry in result.report["preferences"] if entry["of"] == "held out")
        assert first["accuracies"] == pytest.approx(wins / 60, abs=1e-6)


def test_held_out_figures_do_not_depend_on_the_batch_size(pair_settings, adapter):
    found = []
    for rows in (7, 60):
        settings = pair_settings(
            model={"adapter": str(adapter)},
            preference={"reference": "base"},
            training=one_step(),
            evaluation={"per_device_eval_batch_size": rows},
        )
        report = run(settings).report
        held_out = [entry for entry in report["preferences"] if entry["of"] == "held out"]
        found.append([report["losses"]["eval_before"], *(v for k, v in held_out[0].items() if k != "of")])
    assert found[0] == pytest.approx(found[1], abs=1e-5)
    assert 0 < found[0][-1] < 1


def test_the_run_says_what_its_reference_is(pair_settings, adapter):
    told = {}
    cases = {
        "fresh": {},
        "full": {"lora": None},
        "continued": {"model": {"adapter": str(adapter)}},
        "base": {"model": {"adapter": str(adapter)}, "preference": {"reference": "base"}},
        "folder": {"preference": {"reference": str(adapter)}},
    }
    for name, changes in cases.items():
        listener = Listener()
        result = run(pair_settings(training=one_step(), **changes), listener)
        told[name] = [one for one in listener.said if one.startswith(("reference:", "model and", "before the first"))]
        kept = result.report["reference"]
        assert told[name] == [f"reference: {kept['text']}", kept["start"]]
        assert f"{kept['start_margin']:.4f}" in kept["start"] and math.isfinite(kept["start_loss"])
        assert f"Reference: {kept['text']}; {kept['start']}.\n" in (result.folder / "report.md").read_text()
    agreed = "model and reference agree at the start: loss 0.6931, reward margin 0.0000"
    assert told["fresh"] == ["reference: forge-tiny without adapters", agreed]
    assert told["full"] == ["reference: a frozen copy of forge-tiny", agreed]
    assert told["continued"] == [f"reference: the adapter {adapter} as it is now", agreed]
    assert told["base"][0] == "reference: forge-tiny without adapters"
    assert told["folder"][0] == f"reference: forge-tiny with the adapter {adapter}"
    # The same two models, the one's margin over the other and back.
    margins = [float(told[name][1].split(" is ")[1].split()[0]) for name in ("base", "folder")]
    assert margins[0] == pytest.approx(-margins[1], abs=2e-4) and abs(margins[0]) > 1e-3
