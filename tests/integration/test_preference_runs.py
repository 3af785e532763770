"""Whole runs of every preference method: what they save, what they keep frozen, and what they refuse."""

from __future__ import annotations

import json
import sys

import pytest
import torch
import trl
from peft import AutoPeftModelForCausalLM, AutoPeftModelForSequenceClassification
from preference_pairs import (
    LORA,
    PAIRS,
    Listener,
    encode_pairs,
    load_base,
    one_step,
    read_pairs,
    run,
    sum_log_probs,
    write_marked,
)
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from forge_cli.build import reference_cache
from forge_cli.errors import ConfigError, MachineError, ModelError
from forge_cli.resolve.plan import resolve_mapping

CHECKPOINTED = {"activation_checkpointing": True}
SIMPO = {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 1.0, "cpo_alpha": 0.0}


def read_records(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("dpo", {"quantization": {"bits": 4}, "training": CHECKPOINTED, "ema": {"decay": 0.5}}),
        ("dpo", {"freeze": {"first": "50%"}, "training": CHECKPOINTED, "checkpoint": {"save_steps": 2}}),
        ("dpo", {"lora": {**LORA, "modules_to_save": ["lm_head"]}, "training": {"precision": "bf16"}}),
        ("dpo", {"preference": {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]}}),
        ("kto", {"ema": {"decay": 0.5}, "training": CHECKPOINTED}),
        ("kto", {"preference": {"loss_type": "apo_zero_unpaired"}, "lora": {**LORA, "use_dora": True}}),
        ("orpo", {"quantization": {"bits": 4}, "training": CHECKPOINTED, "ema": {"decay": 0.5}}),
        ("cpo", {"preference": SIMPO, "freeze": {"first": 2}, "training": {"precision": "bf16"}}),
    ],
    ids=["qlora-dpo", "frozen-dpo", "bf16-dpo", "sigmoid+sft", "kto", "apo-dora", "qlora-orpo", "simpo"],
)
def test_methods_train_and_save_adapters(pair_settings, tmp_path, method, changes):
    if method == "kto":
        rows = {split: write_marked(tmp_path / name, name) for split, name in (("train", "train"), ("eval", "heldout"))}
        training = {"per_device_train_batch_size": 8, **changes.get("training", {})}
        changes = {**changes, "data": {**PAIRS, **rows}, "training": training}
    result = run(pair_settings(method, **changes))
    assert result.report["steps"] == 3
    assert result.report["alarms"] == []
    records = read_records(result.folder)
    steps = [record for record in records if record.get("grad_norm") is not None]
    assert all(record["grad_norm"] > 0 and record["rewards/margins"] is not None for record in steps)
    assert steps[0]["loss"] != steps[-1]["loss"]
    assert records[-1]["eval_rewards/margins"] != 0
    if "ema" in changes:
        assert records[-1]["eval_ema_rewards/margins"] not in (0, records[-1]["eval_rewards/margins"])
        assert (result.folder / "adapter-raw").is_dir()
    # One adapter, without the reference's, that plain PEFT loads and that changes what the base says.
    assert [path.name for path in result.folder.rglob("ref")] == []
    prompt, better, _ = encode_pairs("heldout")[0]
    with torch.no_grad():
        reloaded = sum_log_probs(AutoPeftModelForCausalLM.from_pretrained(result.weights).eval(), prompt, better)
        assert torch.isfinite(reloaded)
        assert abs(reloaded - sum_log_probs(load_base(), prompt, better)) > 1e-4


def test_the_whole_model_is_trained_against_a_frozen_copy_or_kept_log_probabilities(pair_settings):
    """The copy and the log probabilities that were computed before say the same about every step."""
    losses = []
    for precompute in (False, True):
        result = run(pair_settings(lora=None, preference={"precompute_ref_log_probs": precompute}))
        losses.append([record["loss"] for record in read_records(result.folder) if record.get("loss") is not None])
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    assert losses[0][-1] < losses[0][0] - 1e-3
    saved = AutoModelForCausalLM.from_pretrained(result.weights, dtype=torch.float32)
    assert not torch.equal(saved.model.layers[0].mlp.up_proj.weight, load_base().model.layers[0].mlp.up_proj.weight)


def score_held_out(model) -> float:
    """Returns the share of held-out pairs whose better answer has the higher score."""
    wins = 0
    with torch.no_grad():
        for prompt, *answers in encode_pairs("heldout"):
            better, worse = (model(input_ids=torch.tensor([prompt + answer])).logits.item() for answer in answers)
            wins += better > worse
    return wins / 60


@pytest.mark.parametrize(
    "changes",
    [{"freeze": {"first": 2}, "ema": {"decay": 0.5}, "quantization": {"bits": 4}}, {"lora": None}],
    ids=["qlora", "full"],
)
def test_a_reward_model_saves_the_head_that_was_trained(pair_settings, changes):
    result = run(pair_settings("reward", preference={"center_rewards_coefficient": 0.01}, **changes))
    assert result.report["alarms"] == []
    last = result.report["preferences"][-1]
    if "lora" in changes:
        model = AutoModelForSequenceClassification.from_pretrained(result.weights, num_labels=1)
        assert last["accuracies"] == pytest.approx(score_held_out(model.eval()), abs=1e-6)
        return
    model = AutoPeftModelForSequenceClassification.from_pretrained(result.weights, num_labels=1).eval()
    files = [result.folder / name / "adapter_model.safetensors" for name in ("adapter", "adapter-raw")]
    heads = [next(tensor for name, tensor in load_file(file).items() if "score" in name) for file in files]
    assert torch.equal(model.base_model.model.score.modules_to_save["default"].weight, heads[0])
    assert not torch.equal(*heads)
    assert heads[0].dtype is torch.float32 and heads[0].shape == (1, 128)
    # The 4-bit base rounds, so a pair or two may fall on the other side without it.
    assert last["accuracies"] == pytest.approx(score_held_out(model), abs=0.1)


def test_what_is_frozen_of_an_adapter_stays_frozen_beside_its_reference(pair_settings, trainers, adapter):
    """PEFT makes a whole adapter trainable whenever it switches to the reference and back."""
    settings = pair_settings(
        model={"adapter": str(adapter)},
        freeze={"first": 4, "patterns": ["*.layers.7.*"]},
        training={**CHECKPOINTED, "max_steps": 4},
    )
    result = run(settings)
    had, has = (load_file(f / "adapter_model.safetensors") for f in (adapter, result.weights))
    changed = {int(name.split("layers.")[1].split(".")[0]) for name in had if not torch.equal(had[name], has[name])}
    assert had.keys() == has.keys()
    assert changed == {4, 5, 6}
    trained = [name for name, p in trainers[0].model.named_parameters() if p.requires_grad]
    assert trained and all(".default." in name for name in trained)
    assert not any(f"layers.{i}." in name for name in trained for i in (0, 1, 2, 3, 7))
    # TRL switches checkpointing off and on in every batch, and each time transformers would add a hook.
    assert len(trainers[0].model.get_input_embeddings()._forward_hooks) <= 2


def test_an_sft_run_goes_on_with_an_adapter(tiny_settings, adapter):
    settings = tiny_settings(model={"adapter": str(adapter)}, lora=LORA, data={"eval": "forge:quickstart/heldout"})
    first = run(settings)
    again = run({**settings, "lora": {}, "model": {"name": "forge-tiny", "adapter": str(first.weights)}})
    losses = [result.report["losses"] for result in (first, again)]
    assert losses[1]["eval_before"] == pytest.approx(losses[0]["eval_raw"], abs=1e-5)
    assert losses[1]["eval_raw"] < losses[1]["eval_before"]


def test_an_adapter_whose_weights_are_not_what_its_file_says_is_refused(pair_settings, adapter, tmp_path):
    config = json.loads((adapter / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"r": 2}))
    (tmp_path / "adapter_model.safetensors").write_bytes((adapter / "adapter_model.safetensors").read_bytes())
    settings = pair_settings(model={"adapter": str(tmp_path)})
    with pytest.raises(ModelError, match=r"has rank 4 in adapter_model\.safetensors and r is 2") as error:
        run({**settings, "lora": {}})
    assert error.value.exit_code == 4


def test_an_adapter_with_missing_weights_is_refused(pair_settings, adapter, tmp_path):
    tensors = load_file(adapter / "adapter_model.safetensors")
    name = next(name for name in tensors if "layers.3." in name)
    save_file({k: v for k, v in tensors.items() if k != name}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_bytes((adapter / "adapter_config.json").read_bytes())
    with pytest.raises(ModelError, match="lacks 1 tensors"):
        run(pair_settings(model={"adapter": str(tmp_path)}))


def run_precomputed(pair_settings, **changes) -> tuple[list[str], float]:
    """Returns whether train and eval rows were computed or taken, and the last loss."""
    listener = Listener()
    settings = pair_settings(preference={"precompute_ref_log_probs": True}, **changes)
    result = run(settings, listener)
    said = [line for line in listener.said if line.startswith("reference log probabilities")]
    words = ["taken" if "taken from an earlier run" in line else "computed" for line in said]
    return words, result.report["losses"]["train_last"]


def test_kept_log_probabilities_are_used_again_and_never_for_something_else(pair_settings, adapter, tmp_path):
    plain = run(pair_settings()).report["losses"]["train_last"]
    first, loss = run_precomputed(pair_settings)
    assert first == ["computed", "computed"]
    assert loss == pytest.approx(plain, abs=1e-6)
    # The base is the reference of adapters of any rank; the rows and the reference's weights are not to change.
    assert run_precomputed(pair_settings) == (["taken", "taken"], loss)
    assert run_precomputed(pair_settings, lora={"r": 2})[0] == ["taken", "taken"]
    assert run_precomputed(pair_settings, model={"adapter": str(adapter)})[0] == ["computed", "computed"]
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in reversed(read_pairs("train"))))
    assert run_precomputed(pair_settings, data={**PAIRS, "train": str(rows)})[0] == ["computed", "taken"]


def test_a_damaged_cache_file_is_made_again(pair_settings):
    _, loss = run_precomputed(pair_settings)
    for path in reference_cache.cache_folder().iterdir():
        path.write_bytes(path.read_bytes()[:-9])
    assert run_precomputed(pair_settings) == (["computed", "computed"], loss)


def test_a_reference_that_is_not_the_start_stops_the_run_before_the_first_update(pair_settings):
    """Log probabilities of another model under this one's key: whole, and wrong."""
    run_precomputed(pair_settings)
    for path in reference_cache.cache_folder().iterdir():
        columns = {name: column + 5 * ("chosen" in name) for name, column in load_file(path).items()}
        reference_cache.store_cached(path.stem, columns)
    with pytest.raises(ModelError) as error:
        run_precomputed(pair_settings)
    assert error.value.exit_code == 4
    # 0.1 x 5 nats, and -log sigmoid(-0.5)
    assert "rewards/chosen is -0.5000, not 0.0000" in str(error.value)
    assert "loss is 0.9741, not 0.6931" in str(error.value)


def test_a_trl_without_an_experimental_method_is_said(pair_settings, monkeypatch):
    monkeypatch.setitem(sys.modules, "trl.experimental.orpo", None)
    with pytest.raises(MachineError) as error:
        run(pair_settings("orpo"))
    assert error.value.exit_code == 5
    assert f"TRL {trl.__version__}" in str(error.value) and "ORPO" in str(error.value)


def test_kto_with_one_row_a_batch_is_refused(pair_settings):
    with pytest.raises(ConfigError, match="at least 2 rows"):
        resolve_mapping(pair_settings("kto", training=one_step(1)))
