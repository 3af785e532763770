"""Merging, exporting and averaging a real run of the embedded model, and sabotaged merges and files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from llama_server import ask_llama_cpp
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from forge_cli.errors import CheckpointError, ConfigError, MachineError, ModelError
from forge_cli.resolve.plan import resolve_mapping
from forge_cli.results import average as averaging
from forge_cli.results import export as exporting
from forge_cli.results import gguf_file, merge
from forge_cli.results.find import Run
from forge_cli.results.merge_texts import collect_texts
from forge_cli.run.execute import train_plan
from forge_cli.run.reporter import QuietReporter
from forge_cli.schema.model import QuantizationSection

TINY = Path(merge.__file__).parents[1] / "assets" / "forge-tiny"


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    settings = {
        "name": "lora",
        "model": {"name": "forge-tiny"},
        "data": {"train": "forge:quickstart/train", "eval": "forge:quickstart/heldout", "max_length": 128},
        "lora": {"r": 4, "lora_alpha": 32},
        "training": {
            "learning_rate": 3e-3,
            "max_steps": 3,
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 1,
        },
        "checkpoint": {"save_steps": 1, "save_total_limit": 3},
        "report": {"samples": 1, "max_new_tokens": 4},
        "output_dir": str(root),
    }
    train_plan(resolve_mapping(settings), reporter=QuietReporter())
    return root / "lora"


@pytest.fixture
def run(trained, tmp_path) -> Run:
    return Run(Path(shutil.copytree(trained, tmp_path / "lora", ignore=shutil.ignore_patterns("merged*"))))


@pytest.fixture(scope="module")
def merged(trained) -> dict:
    return merge.merge_run(Run(trained))


def test_the_merged_folder_is_base_and_adapter(trained, merged):
    assert merged["largest_difference"] <= 1e-4 < merged["largest_effect"]
    assert (merged["texts"], merged["texts_from"]) == (8, "8 evaluation rows")
    folder = trained / "merged"
    model = AutoModelForCausalLM.from_pretrained(folder)
    # PEFT's own way, from the adapter that the run saved.
    tuned = AutoPeftModelForCausalLM.from_pretrained(trained / "adapter").eval()
    ids = torch.tensor([AutoTokenizer.from_pretrained(folder).encode("The delobin eats")])
    with torch.inference_mode():
        torch.testing.assert_close(model(ids).logits, tuned(ids).logits, atol=1e-4, rtol=0)
    assert model.config.use_cache
    assert model.generation_config.eos_token_id == json.loads((folder / "chat.json").read_text())["end_token_ids"]
    assert not list(trained.glob("*.partial"))


def test_no_file_of_the_merged_folder_names_a_place_on_this_machine(trained, merged):
    for path in (trained / "merged").iterdir():
        if path.suffix != ".safetensors":
            text = path.read_text(encoding="utf-8")
            assert str(TINY.parent) not in text and str(trained.parent) not in text, path.name


def refuse_merge(run: Run) -> str:
    with pytest.raises(ModelError) as caught:
        merge.merge_run(run)
    assert caught.value.exit_code == 4
    assert not list(run.path.glob("merged*"))
    return str(caught.value)


def test_a_merge_that_writes_the_base_is_caught(run, monkeypatch):
    monkeypatch.setattr(merge, "merge_adapter", lambda model: model.unload())
    assert "changed nothing" in refuse_merge(run)


def test_one_wrong_weight_is_caught(run, monkeypatch):
    real = merge.merge_adapter

    def sabotage(model):
        done = real(model)
        done.model.layers[3].mlp.down_proj.weight.data[5, 7] += 0.5
        return done

    monkeypatch.setattr(merge, "merge_adapter", sabotage)
    assert "differs from base and adapter" in refuse_merge(run)


def test_half_of_an_adapter_is_caught_where_the_bound_is_wide(run, monkeypatch):
    real = merge.merge_adapter

    def sabotage(model):
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data *= 0.4
        return real(model)

    monkeypatch.setattr(merge, "merge_adapter", sabotage)
    monkeypatch.setattr(merge, "FLOAT32_BOUND", 100.0)
    assert "of what the adapter does" in refuse_merge(run)


def test_an_adapter_that_changes_nothing_is_no_merge(run):
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(TINY), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    )
    model.save_pretrained(run.path / "adapter")
    assert "the adapter changes nothing" in refuse_merge(run)


def save_adapter(run: Run, **options) -> None:
    """Puts an adapter on tied embeddings into a run; its weights are random."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(TINY)
    model = get_peft_model(base, LoraConfig(r=2, lora_alpha=4, task_type="CAUSAL_LM", **options))
    for name, parameter in model.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            parameter.data = parameter.data + 0.05 * torch.randn(parameter.shape)
    model.save_pretrained(run.path / "adapter", save_embedding_layers="lm_head" in options["target_modules"])


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj"], "use_dora": True},
    ],
)
def test_adapters_on_one_end_of_tied_embeddings_leave_the_other_end(run, options):
    save_adapter(run, **options)
    proof = merge.merge_run(run)
    assert proof["largest_difference"] <= 1e-4 and proof["effect_share"] == pytest.approx(1, abs=1e-3)
    config = json.loads((run.path / "merged" / "config.json").read_text())
    assert config["tie_word_embeddings"] is ("use_dora" in options)


def test_a_merge_that_forgets_what_is_tied_is_caught(run, monkeypatch):
    save_adapter(run, target_modules=["q_proj", "lm_head"])
    monkeypatch.setattr(merge, "merge_adapter", lambda model: model.merge_and_unload(safe_merge=True))
    assert "differs from base and adapter" in refuse_merge(run)


def test_the_distance_to_a_quantised_base_is_measured(run):
    spec = run.plan.spec.model_copy(update={"quantization": QuantizationSection(bits=4)})
    vars(run)["plan"] = run.plan._replace(spec=spec)
    proof = merge.merge_run(run)
    assert proof["largest_difference"] <= 1e-4  # against the full base: its answers are what is compared
    assert proof["quantized"]["bits"] == 4
    assert proof["quantized"]["kl_nats"] > 1e-4
    assert 0.5 < proof["quantized"]["top1_agreement_ratio"] <= 1
    assert "KL" in (run.path / "merged" / "README.md").read_text()


def test_half_precision_has_a_bound_of_its_own(run, tmp_path):
    proof = merge.merge_run(run, tmp_path / "half", dtype="float16")
    assert 1e-4 < proof["largest_difference"] <= proof["bound"] < 1
    assert {one.dtype for one in load_file(tmp_path / "half" / "model.safetensors").values()} == {torch.float16}
    with pytest.raises(ModelError, match=r"more than 1e-05"):
        merge.merge_run(run, tmp_path / "half", dtype="float16", most_difference=1e-5)
    assert (tmp_path / "half" / "model.safetensors").is_file()  # the proven one stays


def test_the_bound_grows_with_logits_and_formats():
    bounds = [merge.bound_difference(one, [torch.tensor([-8.0, 2.0])]) for one in (torch.float32, torch.float16)]
    assert bounds == [1e-4, pytest.approx(16 * 8 * 2**-10)]
    assert merge.bound_difference(torch.float32, [torch.tensor([64.0])]) == pytest.approx(40 * 64 * 2**-23)


def test_what_cannot_be_merged_says_what_to_use(run, tmp_path):
    (tmp_path / "other").mkdir()
    with pytest.raises(MachineError, match="was not written by forge merge"):
        merge.merge_run(run, tmp_path / "other")
    (run.path / "adapter").rename(run.path / "model")
    with pytest.raises(ConfigError) as caught:
        merge.merge_run(run)
    assert str(run.path / "model") in str(caught.value)


def test_texts_are_there_though_the_data_is_gone(run):
    data = run.plan.spec.data.model_copy(update={"train": "gone.jsonl", "eval": None})
    vars(run)["plan"] = run.plan._replace(spec=run.plan.spec.model_copy(update={"data": data}))
    texts = collect_texts(run, AutoTokenizer.from_pretrained(run.path / "adapter"))
    assert texts.source == "1 question of the report and 3 sentences"
    assert all(1 <= length <= len(row) for row, length in zip(texts.rows, texts.prompt_lengths, strict=True))


@pytest.mark.parametrize("form", ["f32", "q8_0"])
def test_a_gguf_file_reads_back_as_the_merged_model(trained, merged, tmp_path, form):
    result = exporting.export_run(Run(trained), form, tmp_path / "out" / "tiny.gguf")
    assert result["checked"] and result["equal"] >= result["compared"] * (1 if form == "f32" else 0.9)
    model = AutoModelForCausalLM.from_pretrained(trained / "merged")
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "out", gguf_file="tiny.gguf", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out", gguf_file="tiny.gguf")
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Where does the delobin live?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=False,
    )
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": 3, "pad_token_id": 0}
    if form == "f32":
        assert model.generate(prompt, **options).tolist() == read.generate(prompt, **options).tolist()
        names = model.state_dict()
        assert all(torch.equal(one, names[name]) for name, one in read.state_dict().items())
    else:
        assert (tmp_path / "out" / "tiny.gguf").stat().st_size < 0.3 * (
            trained / "merged/model.safetensors"
        ).stat().st_size
    assert "generation" not in tokenizer.chat_template.replace("add_generation_prompt", "")
    assert (tmp_path / "out" / "Modelfile").read_text().splitlines()[1:] == [
        "FROM ./tiny.gguf",
        'PARAMETER stop "<|im_end|>"',
    ]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["Modelfile", "tiny.gguf"]


def test_llama_cpp_answers_as_the_merged_model_does(trained, merged, tmp_path):
    pytest.importorskip("xllamacpp")
    exporting.export_run(Run(trained), "f16", tmp_path / "tiny.gguf")
    model = AutoModelForCausalLM.from_pretrained(trained / "merged")
    tokenizer = AutoTokenizer.from_pretrained(trained / "merged")
    asked, wanted = [], []
    for text in ("Where does the delobin live?", "What colour is the otter?", "12345 ünïcödé, isn't it? 😀"):
        turns = [{"role": "user", "content": text}]
        prompt = tokenizer.apply_chat_template(
            turns, add_generation_prompt=True, return_tensors="pt", return_dict=False
        )
        (row,) = model.generate(prompt, max_new_tokens=24, do_sample=False, eos_token_id=3, pad_token_id=0)
        answer = row[prompt.shape[1] :].tolist()
        wanted.append((tokenizer.decode([one for one in answer if one != 3]), prompt.shape[1], 3 in answer))
        asked.append(("chat", {"messages": turns, "max_tokens": 24}))
    found = [
        (
            one["choices"][0]["message"]["content"],
            one["usage"]["prompt_tokens"],
            one["choices"][0]["finish_reason"] == "stop",
        )
        for one in ask_llama_cpp(tmp_path / "tiny.gguf", asked)
    ]
    assert found == wanted, "its own template, tokens, weights and end"


def test_a_gguf_file_with_wrong_rows_is_caught(trained, merged, tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_file, "_turn", lambda values, name, config: values)
    with pytest.raises(ModelError, match="greedy tokens"):
        exporting.export_run(Run(trained), "f16", tmp_path / "tiny.gguf")
    assert not list(tmp_path.iterdir())


def test_a_gguf_file_with_another_template_is_caught(trained, merged, tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_file, "plain_template", lambda text: text.replace("<|im_end|>\\n", "<|im_end|>"))
    with pytest.raises(ModelError, match="renders a prompt to other tokens"):
        exporting.export_run(Run(trained), "f16", tmp_path / "tiny.gguf")


CONVERTER = """\
import argparse, pathlib
from forge_cli.results.gguf_file import write_gguf
parser = argparse.ArgumentParser()
parser.add_argument("folder", type=pathlib.Path)
parser.add_argument("--outfile", type=pathlib.Path)
parser.add_argument("--outtype")
asked = parser.parse_args()
assert "generation %" not in (asked.folder / "chat_template.jinja").read_text()
write_gguf(asked.folder, asked.outfile, asked.outtype, name="x", end_token_ids=[3])
"""


def test_a_converter_is_called_with_the_merged_folder(trained, merged, tmp_path):
    script = tmp_path / "convert_hf_to_gguf.py"
    script.write_text(CONVERTER)
    result = exporting.export_run(Run(trained), "f16", tmp_path / "out" / "x.gguf", converter=tmp_path)
    assert result["converter"] == str(script) and result["equal"] == result["compared"]
    script.write_text("raise SystemExit('no such family')")
    with pytest.raises(ModelError, match="no such family"):
        exporting.export_run(Run(trained), "f16", tmp_path / "out" / "x.gguf", converter=script)
    assert (tmp_path / "out" / "x.gguf").is_file()
    with pytest.raises(ConfigError):
        exporting.export_run(Run(trained), "f16", converter=tmp_path / "nowhere")


def test_an_average_is_the_mean_of_the_newest_checkpoints(run):
    result = averaging.average_run(run, 2)
    assert result["steps"] == [3, 2]
    files = [load_file(run.path / f"checkpoints/step-{step:08d}/weights.safetensors") for step in (2, 3)]
    saved = load_file(run.path / "adapter-average" / "adapter_model.safetensors")
    assert len(saved) == len(files[0])
    for name, one in files[0].items():
        mean = (one + files[1][name]) / 2
        torch.testing.assert_close(saved[name.replace(".default", "")], mean, atol=1e-7, rtol=1e-6)
    # The loss is weighed as the run weighs it: the last checkpoint is what the report measured.
    assert result["losses"]["last"] == pytest.approx(run.report["losses"]["eval_raw"], abs=1e-4)
    assert result["losses"]["average"] != result["losses"]["last"]
    assert f"{result['losses']['average']:.4f} of this average" in (
        run.path / "adapter-average" / "README.md"
    ).read_text(encoding="utf-8")


def test_a_broken_checkpoint_is_left_out_and_one_is_no_average(run, tmp_path):
    newest = run.path / "checkpoints/step-00000003/weights.safetensors"
    content = bytearray(newest.read_bytes())
    content[-1] ^= 1
    newest.write_bytes(content)
    said: list[str] = []
    assert [one.step for one in averaging.find_checkpoints(run, 2, said.append)] == [2, 1]
    assert "step-00000003 is left out" in said[0]
    shutil.rmtree(run.path / "checkpoints/step-00000002")
    with pytest.raises(CheckpointError, match="this run has 1"):
        averaging.average_run(run, 2)
    with pytest.raises(MachineError, match="exists already"):
        averaging.average_run(run, 2, tmp_path)
