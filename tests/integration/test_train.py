"""Whole runs of the embedded model through the same door as `forge train`."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from forge_cli.backend import sft
from forge_cli.backend.sft import EMA_PREFIX, ForgeSFTTrainer
from forge_cli.errors import ConfigError, DataError, DivergedError, MachineError, Stopped
from forge_cli.parts.layers import find_decoder_layers
from forge_cli.resolve.plan import resolve_mapping, resolve_plan
from forge_cli.run.execute import train, train_plan
from forge_cli.run.reporter import QuietReporter

TINY = Path(__file__).parents[2] / "forge_cli" / "assets" / "forge-tiny"
LORA = {"r": 4, "lora_alpha": 8}
EVAL = {"eval": "forge:quickstart/heldout"}


def run(settings: dict):
    return train_plan(resolve_mapping(settings), reporter=QuietReporter())


def read_metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def list_tensors(folder: Path) -> list[tuple[str, torch.Tensor]]:
    """Reads every tensor of every file in a run folder."""
    found = []
    for path in folder.rglob("*"):
        if path.suffix == ".safetensors":
            found += [(f"{path}:{name}", tensor) for name, tensor in load_file(path).items()]
        elif path.suffix in (".pt", ".bin", ".pth"):
            content = torch.load(path, weights_only=False)
            stack = [content]
            while stack:
                item = stack.pop()
                if isinstance(item, torch.Tensor):
                    found.append((str(path), item))
                elif isinstance(item, dict):
                    stack.extend(item.values())
                elif isinstance(item, (list, tuple)):
                    stack.extend(item)
    return found


def test_a_run_leaves_everything_it_promises(tiny_settings):
    result = run(
        tiny_settings(
            data=EVAL,
            lora=LORA,
            ema={"decay": 0.5},
            evaluation={"eval_steps": 2},
            report={"samples": 2, "max_new_tokens": 8, "prompts": ["Hello"]},
            checkpoint={"save_steps": 1},
            name="whole",
        )
    )
    files = {path.name for path in result.folder.iterdir()}
    assert files == {
        "adapter", "adapter-raw", "checkpoints", "logs", "metrics.jsonl", "plan.yaml", "report.json", "report.md",
        "report.html", "run.json", ".lock",
    }  # fmt: skip
    assert not list(result.folder.rglob("*.partial"))
    assert {"chat_template.jinja", "tokenizer.json"} <= {p.name for p in result.weights.iterdir()}

    saved = json.loads((result.weights / "tokenizer.json").read_text())
    assert saved["padding"] is None and saved["truncation"] is None

    records = read_metrics(result.folder)
    assert [r["step"] for r in records if r.get("loss") is not None] == [1, 2, 3]
    assert [r["step"] for r in records if "eval_loss" in r] == [0, 2, 3]
    report = json.loads((result.folder / "report.json").read_text())
    assert report == json.loads(json.dumps(result.report))
    assert report["steps"] == 3 and report["tokens"] == sum(r["tokens"] for r in records if "tokens" in r)
    assert report["losses"]["eval_before"] == records[0]["eval_loss"]
    assert report["losses"]["eval_ema"] not in (None, report["losses"]["eval_raw"])
    assert [s["shown"] for s in report["samples"]][-1] == "Hello" and len(report["samples"]) == 3
    assert report["exact_match_ratio"] == {"before": None, "after": None}
    assert report["plan"]["lora.r"] == {"value": 4, "from": "settings"} or report["plan"]["lora.r"]["value"] == 4
    assert "held-out loss" in (result.folder / "report.md").read_text()

    again = resolve_plan(result.folder / "plan.yaml")
    assert again.digest == report["digest"]


def test_the_adapter_holds_the_average_and_the_raw_weights_lie_beside_it(tiny_settings):
    result = run(tiny_settings(lora=LORA, ema={"decay": 0.5}, checkpoint={"save_steps": 3}, name="ema"))
    averaged = load_file(result.folder / "adapter" / "adapter_model.safetensors")
    raw = load_file(result.folder / "adapter-raw" / "adapter_model.safetensors")
    checkpoint = result.folder / "checkpoints" / "step-00000003"
    saved_raw = load_file(checkpoint / "weights.safetensors")
    saved_average = load_file(checkpoint / "ema.safetensors")
    assert averaged.keys() == raw.keys() and len(raw) == len(saved_raw) == len(saved_average)
    for name in raw:
        key = name.replace("lora_A.weight", "lora_A.default.weight").replace("lora_B.weight", "lora_B.default.weight")
        assert torch.equal(raw[name], saved_raw[key])
        assert torch.equal(averaged[name], saved_average[f"averages/{key}"])
    assert any(not torch.equal(averaged[name], raw[name]) for name in raw)


def test_ema_weights_leave_the_model_when_evaluation_fails(tiny_settings, monkeypatch):
    seen = []

    def fail(self, dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        seen.append((metric_key_prefix, self.ema.average.is_applied if self.ema.average else None, self))
        if metric_key_prefix == EMA_PREFIX:
            raise RuntimeError("evaluation failed")
        return {"eval_loss": 1.0}

    monkeypatch.setattr(ForgeSFTTrainer.__bases__[-1], "evaluate", fail)
    with pytest.raises(RuntimeError, match="evaluation failed"):
        run(tiny_settings(data=EVAL, lora=LORA, ema={"decay": 0.5}, evaluation={"eval_steps": 1}))
    assert [entry[:2] for entry in seen] == [("eval", None), ("eval", False), (EMA_PREFIX, True)]
    assert not seen[-1][2].ema.average.is_applied


def poison(monkeypatch, *steps: int) -> None:
    """Makes the second of the two micro steps of some optimizer steps bad."""
    compute_loss = ForgeSFTTrainer.compute_loss

    def poisoned(self, model, inputs, *args, **kwargs):
        loss = compute_loss(self, model, inputs, *args, **kwargs)
        bad = model.training and self.state.global_step + 1 in steps and self.accelerator.sync_gradients
        return loss * float("nan") if bad else loss

    monkeypatch.setattr(ForgeSFTTrainer, "compute_loss", poisoned)


@pytest.mark.parametrize("step", [1, 3])
def test_a_bad_step_changes_no_weight_and_the_run_goes_on(tiny_settings, monkeypatch, step):
    poison(monkeypatch, step)
    checkpoint = {"save_steps": 1, "save_total_limit": 9}
    training = {"max_steps": 4, "lr_scheduler_type": "constant"}
    result = run(tiny_settings(lora=LORA, ema={"decay": 0.5}, checkpoint=checkpoint, training=training, name="nan"))
    (alarm,) = result.report["alarms"]
    assert alarm["alarm"] == "skipped" and alarm["step"] == step and len(alarm["rows"]) == 4
    assert result.report["steps"] == 4
    folders = {n: result.folder / "checkpoints" / f"step-{n:08d}" for n in (1, 2, 3, 4)}
    for name in ("weights", "ema"):
        states = {n: load_file(folders[n] / f"{name}.safetensors") for n in folders}
        changed = {n: any(not torch.equal(states[n][k], states[n - 1][k]) for k in states[n]) for n in (2, 3, 4)}
        assert changed == {n: n != step for n in (2, 3, 4)}, name
    tensors = list_tensors(result.folder)
    assert tensors and not [name for name, t in tensors if t.is_floating_point() and not torch.isfinite(t).all()]


def test_bad_steps_without_end_go_back_twice_and_then_stop_with_code_10(tiny_settings, monkeypatch):
    poison(monkeypatch, *range(2, 30))
    settings = tiny_settings(lora=LORA, checkpoint={"save_steps": 1}, training={"max_steps": 30}, name="nan")
    said = []
    monkeypatch.setattr(QuietReporter, "say", lambda self, text: said.append(text))
    with pytest.raises(DivergedError) as error:
        run(settings)
    assert error.value.exit_code == 10 and "last good checkpoint" in str(error.value)
    assert sum("back to step-" in text for text in said) == 2
    folder = Path(settings["output_dir"]) / "nan"
    last = read_metrics(folder)[-1]
    assert last["diverged"] and len(last["rows"]) == 4
    tensors = list_tensors(folder)
    assert tensors and not [name for name, t in tensors if t.is_floating_point() and not torch.isfinite(t).all()]
    assert not (folder / "adapter").exists()


def test_packing_trains_the_same_tokens_as_padding(tiny_settings, tmp_path):
    """Rows as one batch: the loss over all trained tokens does not depend on how they are laid out."""
    rows = (TINY.parent / "quickstart" / "train.jsonl").read_text().splitlines()[:24]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    losses, tokens = [], []
    for packing in (False, True):
        settings = tiny_settings(lora=LORA, data={"train": f"{tmp_path}/rows.jsonl", "packing": packing})
        batch = {"per_device_train_batch_size": 24, "gradient_accumulation_steps": 1, "max_steps": 1}
        result = run({**settings, "training": {**settings["training"], **batch}})
        record = read_metrics(result.folder)[0]
        losses.append(record["loss"])
        tokens.append(record["tokens"])
    assert tokens[0] == tokens[1]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_accumulation_equals_a_large_batch(tiny_settings):
    losses = []
    for batch, accumulation in ((8, 1), (1, 8)):
        settings = tiny_settings(lora=LORA)
        sizes = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
        result = run({**settings, "training": {**settings["training"], **sizes}})
        losses.append([r["loss"] for r in read_metrics(result.folder)])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_evaluating_a_4_bit_model_does_not_change_its_training(tiny_settings):
    """bitsandbytes repacks weights at the first evaluation on some CPUs; gradients are wrong from then on."""
    losses = []
    for changes in ({}, {"data": EVAL, "report": {"samples": 2, "max_new_tokens": 4}}):
        result = run(tiny_settings(lora=LORA, quantization={"bits": 4}, **changes))
        losses.append([(r["loss"], r["grad_norm"]) for r in read_metrics(result.folder) if r.get("loss") is not None])
    assert losses[0] == losses[1]


def test_full_training_of_half_the_layers(tiny_settings, load_tiny):
    result = run(tiny_settings(freeze={"first": 4}))
    saved, base = load_file(result.weights / "model.safetensors"), dict(load_tiny().named_parameters())
    same = {name for name, tensor in saved.items() if torch.equal(tensor, base[name])}
    frozen = {n for n in saved if "embed" in n or any(f"layers.{i}." in n for i in range(4))}
    assert same == frozen


def test_a_named_run_is_never_overwritten_unasked(tiny_settings):
    settings = tiny_settings(lora=LORA, name="mine")
    first = run(settings)
    before = (first.folder / "report.json").read_bytes()
    with pytest.raises(MachineError, match="exists already"):
        run(settings)
    assert (first.folder / "report.json").read_bytes() == before
    broken = resolve_mapping({**settings, "data": {**settings["data"], "max_length": 16}})
    with pytest.raises(DataError):
        train_plan(broken, overwrite=True, reporter=QuietReporter())
    assert (first.folder / "report.json").read_bytes() == before
    train_plan(resolve_mapping(settings), overwrite=True, reporter=QuietReporter())
    assert (first.folder / "report.json").read_bytes() != before
    assert [path.name for path in first.folder.parent.iterdir()] == ["mine"]


def test_data_is_checked_before_weights_are_read(tiny_settings, tmp_path, monkeypatch):
    rows = tmp_path / "bad.jsonl"
    rows.write_text('{"messages": [{"role": "user", "content": "Hi"}]}\n')
    monkeypatch.setattr("forge_cli.build.model.load_model", lambda *args: pytest.fail("weights were read"))
    with pytest.raises(DataError, match="no assistant turn"):
        run(tiny_settings(data={"train": str(rows)}))


def test_ctrl_c_ends_with_130_and_a_whole_folder(tiny_settings, monkeypatch):
    def interrupt(self, *args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(ForgeSFTTrainer, "training_step", interrupt)
    settings = tiny_settings(lora=LORA, name="stopped")
    with pytest.raises(Stopped) as error:
        run(settings)
    assert error.value.exit_code == 130
    assert not list((Path(settings["output_dir"]) / "stopped").rglob("*.partial"))


def test_train_takes_a_file_and_overrides(tiny_settings, tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text(json.dumps(tiny_settings(lora=LORA)))
    result = train(path, ["training.max_steps=1", "name=from-file"], reporter=QuietReporter())
    assert result.folder.name == "from-file" and result.report["steps"] == 1
    with pytest.raises(ConfigError):
        train(path, ["training.max_step=1"])


@pytest.mark.parametrize("checkpointing", [True, False])
def test_frozen_layers_are_skipped_in_a_whole_run(tiny_settings, monkeypatch, checkpointing):
    """The proof by counts, through TRL, PEFT, the Trainer and its checkpointing switch."""
    forwards, backwards = Counter(), Counter()
    build_trainer = sft.build_trainer

    def build_counted(**parts):
        trainer = build_trainer(**parts)
        for index, layer in enumerate(find_decoder_layers(trainer.model)):
            layer.self_attn.register_forward_pre_hook(
                lambda module, args, kwargs, index=index: forwards.update([index]), with_kwargs=True
            )
            layer.mlp.register_full_backward_hook(lambda module, grads, out, index=index: backwards.update([index]))
        return trainer

    monkeypatch.setattr(sft, "build_trainer", build_counted)
    settings = tiny_settings(lora=LORA, freeze={"first": "50%"})
    run({**settings, "training": {**settings["training"], "activation_checkpointing": checkpointing}})
    micro_steps = 3 * 2
    assert [forwards[i] for i in range(8)] == [micro_steps] * 4 + [micro_steps * (1 + checkpointing)] * 4
    assert [backwards[i] for i in range(8)] == [0] * 4 + [micro_steps] * 4


@pytest.mark.parametrize(
    "changes",
    [
        {"lora": LORA, "quantization": {"bits": 8}},
        {"lora": {**LORA, "use_dora": True, "use_rslora": True}},
        {"lora": {**LORA, "target_modules": ["q_proj", "v_proj"], "modules_to_save": ["lm_head"]}},
        {"lora": LORA, "quantization": {"bits": 4, "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": False}},
        {"training": {"optim": "paged_adamw_8bit"}, "lora": LORA},
        {"training": {"max_grad_norm": 0.0}, "lora": LORA},
        {"model": {"dtype": "bfloat16"}, "monitor": None},
        {"preset": "memory_efficient", "evaluation": {"eval_steps": 1}, "data": EVAL},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_combinations_train_and_save(tiny_settings, changes):
    result = run(tiny_settings(**changes))
    assert result.report["steps"] == 3
    assert result.report["alarms"] == []
    first, *_, last = [r for r in read_metrics(result.folder) if r.get("loss") is not None]
    assert first["grad_norm"] > 0 and last["loss"] != first["loss"]


@pytest.mark.parametrize(
    "changes",
    [{"freeze": {"first": 2}}, {"lora": LORA}, {"lora": LORA, "quantization": {"bits": 4}}],
    ids=["sft", "lora", "qlora"],
)
def test_bf16_is_mixed_precision_with_float32_weights(tiny_settings, monkeypatch, changes):
    """On GPUs bf16 is the default; the CPU can do it too, and nothing else would notice a wrong mapping."""
    trainers = []
    build = sft.build_trainer
    monkeypatch.setattr(sft, "build_trainer", lambda **parts: trainers.append(build(**parts)) or trainers[-1])
    settings = tiny_settings(data=EVAL, ema={"decay": 0.5}, report={"samples": 1, "max_new_tokens": 4}, **changes)
    result = run({**settings, "training": {**settings["training"], "precision": "bf16"}})
    assert trainers[0].args.bf16 and not trainers[0].args.fp16
    assert {p.dtype for p in trainers[0].model.parameters() if p.requires_grad} == {torch.float32}
    assert result.report["compute"]["dtype"] == "bfloat16"
    fp32 = run(settings)
    losses = [[r["loss"] for r in read_metrics(x.folder) if r.get("loss") is not None] for x in (result, fp32)]
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], rel=0.03)


def use_gradient_scaler(monkeypatch, scale: float) -> None:
    """Gives the run a real gradient scaler, as fp16 has on a GPU; the CPU has one too."""
    from accelerate.state import AcceleratorState

    plain_init = ForgeSFTTrainer.__init__

    def init(self, *args, **kwargs):
        plain_init(self, *args, **kwargs)
        self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        self.accelerator.native_amp = True
        monkeypatch.setitem(AcceleratorState._shared_state, "_mixed_precision", "fp16")

    monkeypatch.setattr(ForgeSFTTrainer, "__init__", init)
    # The CPU has the scaler but no fp16 arithmetic worth the name: computed is in float32.
    context = "accelerate.accelerator.get_mixed_precision_context_manager"
    monkeypatch.setattr(context, lambda *args, **kwargs: torch.autocast("cpu", enabled=False))


@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0])
def test_a_gradient_scaler_changes_no_figure(tiny_settings, monkeypatch, max_grad_norm):
    figures = []
    for scale in (None, 2.0**10):
        if scale:
            use_gradient_scaler(monkeypatch, scale)
        settings = tiny_settings(lora=LORA)
        result = run({**settings, "training": {**settings["training"], "max_grad_norm": max_grad_norm}})
        figures.append([(r["loss"], r["grad_norm"]) for r in read_metrics(result.folder)])
    assert torch.tensor(figures[0]).allclose(torch.tensor(figures[1]), rtol=1e-4)


def test_steps_that_overflow_are_skipped_seen_and_not_averaged(tiny_settings, monkeypatch):
    averages = []
    build = sft.build_trainer
    monkeypatch.setattr(sft, "build_trainer", lambda **parts: averages.append(parts["ema"]) or build(**parts))
    use_gradient_scaler(monkeypatch, 1.9 * 2.0**127)  # just below the end of float32: the first steps overflow
    settings = tiny_settings(lora=LORA, ema={"decay": 0.5})
    result = run({**settings, "training": {**settings["training"], "max_steps": 12}})
    skipped = [bool(r.get("skipped")) for r in read_metrics(result.folder)]
    assert skipped[0] and not skipped[-1]
    assert averages[0].average.num_updates == skipped.count(False)


def test_overflow_without_end_stops_the_run(tiny_settings, monkeypatch):
    use_gradient_scaler(monkeypatch, 2.0**20)
    measure = ForgeSFTTrainer._clip_grad_norm

    def overflow(self, model):
        next(p for p in model.parameters() if p.grad is not None).grad[0] = float("inf")
        return measure(self, model)

    monkeypatch.setattr(ForgeSFTTrainer, "_clip_grad_norm", overflow)
    settings = tiny_settings(lora=LORA)
    with pytest.raises(DivergedError, match="step 21"):
        run({**settings, "training": {**settings["training"], "max_steps": 40}})


def test_held_out_loss_is_a_mean_over_tokens(tiny_settings):
    losses = []
    for rows in (1, 7, 60):
        result = run(tiny_settings(data=EVAL, lora=LORA, evaluation={"per_device_eval_batch_size": rows}))
        losses.append(result.report["losses"]["eval_raw"])
    assert losses == pytest.approx([losses[0]] * 3, abs=1e-6)


def test_a_run_that_never_began_frees_its_name(tiny_settings):
    settings = tiny_settings(lora=LORA, name="retry")
    with pytest.raises(DataError, match="longer than"):
        run({**settings, "data": {**settings["data"], "max_length": 16}})
    assert run(settings).folder.name == "retry"


def test_a_run_of_warm_up_alone_raises_an_alarm(tiny_settings):
    settings = tiny_settings(lora=LORA)
    result = run({**settings, "training": {**settings["training"], "max_steps": 1}})
    assert [alarm["alarm"] for alarm in result.report["alarms"]] == ["zero_rate"]


def test_a_run_that_ends_worse_raises_an_alarm(tiny_settings):
    settings = tiny_settings(data=EVAL)
    wild = {"learning_rate": 1.0, "max_grad_norm": 0.0, "warmup_steps": 0, "max_steps": 6}
    result = run({**settings, "training": {**settings["training"], **wild}})
    assert "worse" in [alarm["alarm"] for alarm in result.report["alarms"]]


def test_embeddings_that_are_saved_whole_are_trained_above_frozen_layers(tiny_settings, load_tiny):
    result = run(tiny_settings(lora={**LORA, "modules_to_save": ["embed_tokens"]}, freeze={"first": 4}))
    saved = load_file(result.weights / "adapter_model.safetensors")
    [name] = [key for key in saved if "embed_tokens" in key]
    assert not torch.equal(saved[name], load_tiny().get_input_embeddings().weight)
    assert result.report["trainable"]["freeze"]["blocked_by"]


@pytest.mark.parametrize("field", ["target_modules", "modules_to_save"])
def test_names_that_match_nothing_are_refused(tiny_settings, field):
    with pytest.raises(ConfigError, match=f"lora.{field}: nothing matches no module"):
        run(tiny_settings(lora={**LORA, field: ["nothing"]}))


def test_an_architecture_without_sdpa_takes_its_own_attention(tiny_settings, tmp_path):
    from transformers import AutoTokenizer, Gemma2Config, Gemma2ForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(TINY)
    config = Gemma2Config(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, max_position_embeddings=256, pad_token_id=0, eos_token_id=3, bos_token_id=1,
    )  # fmt: skip
    Gemma2ForCausalLM(config).save_pretrained(tmp_path / "gemma2")
    tokenizer.save_pretrained(tmp_path / "gemma2")
    model = {"name": str(tmp_path / "gemma2")}
    result = run(tiny_settings(model=model, lora=LORA, freeze={"first": 1}, ema={"decay": 0.5}))
    assert result.report["steps"] == 3 and result.report["alarms"] == []
