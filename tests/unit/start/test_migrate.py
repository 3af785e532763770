"""Files of other tools become run files that validate, and no key goes without an account."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from forge_cli.errors import ConfigError, ForgeError
from forge_cli.resolve.plan import resolve_plan
from forge_cli.resolve.yaml_reader import read_yaml_text
from forge_cli.start.migrate import migrate
from forge_cli.start.migrate_draft import CARRIED, KINDS, UNKNOWN
from forge_cli.start.migrate_source import TOOLS, read_source, show_key

FIXTURES = Path(__file__).parents[2] / "fixtures" / "migrate"
FILES = sorted(path for tool in TOOLS for path in (FIXTURES / tool).glob("*.y*ml"))
COMMANDS = {"trl/orpo.yaml": "orpo"}


def label(path: Path) -> str:
    return f"{path.parent.name}/{path.name}"


@pytest.fixture
def there(tmp_path, monkeypatch):
    """A copy of the files, to stand in as the folder a user works in."""
    shutil.copytree(FIXTURES, tmp_path / "files")
    return lambda path: monkeypatch.chdir(tmp_path / "files" / path.parent.name) or Path(path.name)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Migrates a text and returns the account and what the run file says."""
    monkeypatch.chdir(tmp_path)

    def migrate_text(text, tool=None, method=None):
        Path("other.yaml").write_text(text, encoding="utf-8")
        found = migrate(Path("other.yaml"), tool, method)
        return found, read_yaml_text(found.text, "run.yaml").data

    return migrate_text


def test_there_are_ten_files_of_each_tool():
    assert all(sum(path.parent.name == tool for path in FILES) >= 10 for tool in TOOLS)


@pytest.mark.parametrize("path", FILES, ids=label)
def test_a_file_becomes_a_valid_run_file_and_every_key_is_accounted_for(path, there):
    name = there(path)
    found = migrate(name, method=COMMANDS.get(label(path)))
    assert found.problems == ()
    assert found.tool.lower() == path.parent.name
    Path("run.yaml").write_text(found.text, encoding="utf-8")
    assert resolve_plan(Path("run.yaml")).spec.model.name
    keys = [show_key(key) for key in read_source(name).leaves]
    assert [one.key for one in found.lines] == keys
    for line in found.lines:
        assert line.kind in KINDS and line.where.startswith(f"{name}:")
        assert bool(line.to) == (line.kind == CARRIED) == (not line.text)
    for one in (line for line in found.lines if line.kind == CARRIED):
        assert one.key.rpartition(".")[2].rpartition("]")[2] in found.text, one  # the comment names it
    # Where a fixture has a key that nobody knows, it is there on purpose.
    unknown = {line.key for line in found.lines if line.kind == UNKNOWN}
    assert unknown <= {"no_remove_unused_columns"}
    # And each setting that is written comes from a key or is noted.
    carried = {to for line in found.lines for to in line.to}
    noted = {to for line in found.notes for to in line.to}
    for section, value in read_yaml_text(found.text, "run.yaml").data.items():
        for inner in value if isinstance(value, dict) and value else [""]:
            setting = f"{section}.{inner}" if inner else section
            silent = {"data.format", "data.train_on", "quantization.bits", "data.streaming", "data.on_overlong"}
            silent |= {"lora", "preference.cpo_alpha", "data.eval"}
            assert setting in carried | noted | silent, setting


EXPECTED = {
    "axolotl/lora-8bit-llama2.yaml": {
        "model.name": "meta-llama/Llama-2-7b-hf",
        "quantization.bits": 8,
        "data.train": "mhenrichsen/alpaca_2k_test",
        "data.eval_fraction": 0.05,
        "data.max_length": 4096,
        "data.on_overlong": "drop",
        "data.packing": True,
        "lora.r": 32,
        "lora.lora_alpha": 16,
        "lora.lora_dropout": 0.05,
        "lora.target_modules": "all-linear",
        "training.learning_rate": 2e-4,
        "training.num_train_epochs": 4,
        "training.per_device_train_batch_size": 2,
        "training.gradient_accumulation_steps": 4,
        "training.optim": "adamw_bnb_8bit",
        "training.lr_scheduler_type": "cosine",
        "training.warmup_steps": 0.1,
        "evaluation.eval_steps": "epoch",
    },
    "axolotl/qlora-mistral.yml": {
        "name": "first-try",
        "quantization.bits": 4,
        "quantization.bnb_4bit_quant_type": "fp4",
        "quantization.bnb_4bit_use_double_quant": False,
        "lora.target_modules": ["gate_proj", "down_proj", "up_proj", "q_proj", "v_proj", "k_proj", "o_proj"],
        "training.learning_rate": 1e-4,
        "training.gradient_accumulation_steps": 8,
        "training.precision": "bf16",
        "training.activation_checkpointing": True,
        "training.max_grad_norm": 0.3,
        "evaluation.eval_steps": 50,
        "evaluation.per_device_eval_batch_size": 2,
        "checkpoint.save_steps": 100,
        "logging.report_to": ["wandb"],
    },
    "axolotl/completion-local.yaml": {
        "data.format": "text",
        "data.max_length": 512,
        "training.per_device_train_batch_size": 8,
        "training.gradient_accumulation_steps": 4,
        "training.optim": "lion_8bit",
        "training.precision": "fp16",
        "lora.target_modules": ["query_key_value"],
        "training.warmup_steps": None,
        "training.activation_checkpointing": False,
    },
    "axolotl/kto-qlora.yaml": {
        "method": "kto",
        "data.format": "unpaired_preference",
        "preference.desirable_weight": 0.2,
        "training.per_device_train_batch_size": 2,
        "training.gradient_accumulation_steps": 2,
    },
    "axolotl/simpo-with-anchors.yaml": {
        "method": "cpo",
        "preference.loss_type": "simpo",
        "preference.beta": 2,
        "preference.cpo_alpha": 0.05,
        "training.num_train_epochs": 2,
        "training.learning_rate": 5e-6,
    },
    "axolotl/pretrain-streamed.yaml": {
        "data.train": "hf://allenai/c4/en",
        "data.streaming": True,
        "data.on_overlong": "split",
        "training.max_steps": 2000,
        "checkpoint": None,
        "model.dtype": "bfloat16",
    },
    "llama-factory/defaults-only.yaml": {
        "data.train": "data/alpaca.json",
        "data.format": "instruction",
        "data.max_length": 2048,
        "data.on_overlong": "truncate",
        "lora.r": 8,
        "lora.lora_alpha": 16,
        "lora.target_modules": "all-linear",
        "training.learning_rate": 5e-5,
        "training.num_train_epochs": 3,
        "training.per_device_train_batch_size": 8,
        "training.gradient_accumulation_steps": 1,
        "training.lr_scheduler_type": "linear",
        "training.warmup_steps": 0,
    },
    "llama-factory/qlora-4bit.yaml": {
        "quantization.bits": 4,
        "quantization.bnb_4bit_use_double_quant": False,
        "data.train": "data/chats.json",
        "data.format": "messages",
        "data.max_length": 4096,
        "data.packing": True,
        "data.eval_fraction": 0.1,
        "lora.r": 16,
        "lora.lora_dropout": 0.05,
        "lora.target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
        "training.warmup_steps": 20,
        "training.optim": "paged_adamw_8bit",
        "evaluation.per_device_eval_batch_size": 1,
        "evaluation.eval_steps": 500,
        "logging.report_to": ["wandb"],
    },
    "llama-factory/freeze.yaml": {"freeze.first": 28, "model.dtype": "bfloat16", "lora.r": None},
    "llama-factory/simpo.yaml": {
        "method": "cpo",
        "preference.loss_type": "simpo",
        "preference.beta": 2,
        "preference.cpo_alpha": 0,
        "lora.modules_to_save": ["embed_tokens", "lm_head"],
        "training.precision": "fp16",
    },
    "llama-factory/dpo.yaml": {
        "method": "dpo",
        "data.train": {
            "path": "data/pairs.json",
            "columns": {"prompt": "question", "chosen": "good", "rejected": "bad"},
        },
        "training.learning_rate": 5e-6,
    },
    "llama-factory/pretrain.yaml": {"data.format": "text", "data.on_overlong": "split", "data.packing": True},
    "llama-factory/hub-mask-history.yaml": {
        "data.train": {"path": "hf://someone/talk/clean", "split": "validation"},
        "data.train_on": "last_assistant",
        "quantization.bits": 8,
        "lora.use_dora": True,
    },
    "trl/sft-qlora.yaml": {
        "model.dtype": "bfloat16",
        "quantization.bits": 4,
        "data.train": {"path": "HuggingFaceH4/ultrachat_200k", "split": "train_sft"},
        "data.eval": {"path": "HuggingFaceH4/ultrachat_200k", "split": "test_sft"},
        "data.train_on": "assistant",
        "lora.lora_alpha": 16,
        "lora.lora_dropout": 0.1,
        "training.per_device_train_batch_size": 8,
        "training.warmup_steps": 0.1,
        "checkpoint.save_steps": 200,
    },
    "trl/sft-lora.yaml": {
        "data.max_length": 1024,
        "data.train_on": "all",
        "lora.target_modules": ["q_proj", "v_proj"],
        "lora.lora_dropout": 0.05,
        "training.lr_scheduler_type": "linear",
        "training.warmup_steps": 0,
        "training.gradient_accumulation_steps": 8,
        "evaluation.eval_steps": 100,
    },
    "trl/dpo-full-ipo.yaml": {
        "method": "dpo",
        "preference.loss_type": "ipo",
        "training.learning_rate": 1e-6,
        "training.optim": "adamw_bnb_8bit",
    },
    "trl/reward.yaml": {
        "method": "reward",
        "preference.center_rewards_coefficient": 0.01,
        "training.precision": "fp16",
    },
    "torchtune/llama31-qlora.yaml": {
        "model.name": "meta-llama/Meta-Llama-3.1-8B-Instruct",
        "quantization.bits": 4,
        "data.train": "yahma/alpaca-cleaned",
        "data.train_on": "all",
        "lora.target_modules": ["q_proj", "v_proj", "k_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        "lora.r": 8,
        "training.learning_rate": 3e-4,
        "training.gradient_accumulation_steps": 16,
        "training.warmup_steps": 100,
        "training.weight_decay": 0.01,
        "training.max_grad_norm": 0,
        "seed": None,
    },
    "torchtune/llama32-lora.yaml": {
        "data.train": {"path": "data/train.jsonl", "columns": {"prompt": "input", "completion": "output"}},
        "data.max_length": 1024,
        "data.on_overlong": "truncate",
        "data.packing": True,
        "lora.lora_alpha": 128,
        "training.weight_decay": 0.01,
        "training.activation_checkpointing": False,
        "logging.report_to": ["wandb"],
        "seed": 11,
    },
    "torchtune/llama3-full-single.yaml": {
        "model.dtype": "bfloat16",
        "training.max_steps": 600,
        "training.num_train_epochs": None,
        "training.lr_scheduler_type": "constant",
        "training.optim": "paged_adamw_8bit",
    },
    "torchtune/qwen3-preference.yaml": {
        "model.name": "Qwen/Qwen3-0.6B",
        "method": "dpo",
        "preference.loss_type": "hinge",
        "preference.beta": 0.2,
    },
}


@pytest.mark.parametrize("name", EXPECTED)
def test_values_are_carried_as_worked_out_by_hand(name, there):
    path = FIXTURES / name
    data = read_yaml_text(migrate(there(path), method=COMMANDS.get(name)).text, "run.yaml").data
    for setting, wanted in EXPECTED[name].items():
        section, _, key = setting.rpartition(".")
        assert (data.get(section) or {} if section else data).get(key) == wanted, setting


AXOLOTL = """
base_model: forge-tiny
datasets: [{path: "forge:quickstart/train", type: chat_template}]
sequence_len: 128
micro_batch_size: 2
learning_rate: 1e-3
"""


@pytest.mark.parametrize(
    ("line", "kind", "said"),
    [
        ("optimizer: muon", "not supported", "muon"),
        ("lr_scheduler: exotic", "not supported", "training.lr_scheduler_type stays"),
        ("fsdp_config: {offload: true, plan: {a: 1}}", "not supported", "several devices"),
        ("pad_to_sequence_len: true", "not needed", "longest row"),
        ("deepspeed:", "not needed", "null"),
        ("trust_remote_code: yes", "Forge decides", "never run"),
        ("loss_watchdog_threshold: 5", "differs", "monitor.spike_ratio"),
        ("max_seq_length: 12", "unknown key", "data.max_length"),
        ("sequence_lenn: 12", "unknown key", "no key"),
        ("hub_token: hf_abcdefghijklmnopqrstuvwxyz", "not supported", "HF_TOKEN"),
    ],
)
def test_what_cannot_be_carried_is_said_with_its_reason(line, kind, said, run):
    found, _ = run(AXOLOTL + line)
    assert not found.problems
    last = [one for one in found.lines if one.key.startswith(line.partition(":")[0])]
    assert last and all(one.kind == kind and said in one.text for one in last)
    assert "hf_abcdefghijklmnopqrstuvwxyz" not in found.text


def test_yaml_1_1_is_read_as_its_tools_read_it(run):
    found, data = run(AXOLOTL + 'bf16: yes\nfp16: off\nlora_model_dir:\nweight_decay: "1e-2"\nwarmup_ratio: .1\n')
    assert not found.problems
    assert data["training"]["precision"] == "bf16"
    assert data["training"]["weight_decay"] == 0.01
    assert data["training"]["warmup_steps"] == 0.1


@pytest.mark.parametrize(
    "text",
    [
        "a: &a [x]\nb: *a\nb: *a\nbase_model: x",  # a key twice
        "base_model: !!python/object:os.system x\n",
        "a: &a {b: *a}",
        "<<: {base_model: x}",
        "- base_model",
        "",
        "base_model: [",
        "x: " + "[" * 60,
        "a: &a [1,2,3,4,5,6,7,8,9,0]\nb: &b [*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b]\nd: [" + "*c," * 40 + "1]",
        "rl: grpo\n" + AXOLOTL,
        "adapter: llama-adapter\n" + AXOLOTL,
        "something: 1",
        "model_name_or_path: x\nlearning_rate: 1",
        "base_model: x\nmicro_batch_size: 1\nsequence_len: 3",  # no rows
        "base_model: x\ncutoff_len: 3",  # of two tools
        "model: {name: x}\ndata: {train: y}",
    ],
)
def test_what_nobody_should_guess_at_is_refused(text, run):
    with pytest.raises(ConfigError) as caught:
        run(text)
    assert all(problem.where for problem in caught.value.problems)


def test_the_tool_is_told_by_its_keys_and_can_be_named(run):
    found, _ = run(AXOLOTL)
    assert found.tool == "Axolotl" and "micro_batch_size" in found.told_by
    with pytest.raises(ConfigError, match="--from"):
        run("seed: 3\n")
    text = "model_name_or_path: forge-tiny\ndataset_name: forge:quickstart/train\nseed: 4\n"
    found, data = run(text, "trl")
    assert found.told_by == "--from" and data["seed"] == 4


def test_a_plan_that_does_not_validate_is_placed_in_the_other_file(run):
    found, _ = run(AXOLOTL + "lora_r: 8\nlora_alpha: 8\nadapter: lora\nlora_target_modules: [nowhere]\n")
    (problem,) = found.problems
    assert problem.where == "other.yaml:10:1"
    assert "lora_target_modules" in problem.what


def test_trl_says_when_the_command_cannot_be_told(run):
    text = "model_name_or_path: forge-tiny\ndataset_name: someone/pairs\nbeta: 0.1\nmax_length: 128\n"
    with pytest.raises(ConfigError, match="--method"):
        run(text)
    _, data = run(text, method="kto")
    assert data["method"] == "kto" and data["training"]["learning_rate"] == 1e-6


def test_a_dataset_that_is_not_told_says_what_to_write(run):
    found, _ = run("stage: sft\nmodel_name_or_path: forge-tiny\ntemplate: x\ndataset: mine\nmax_samples: 5\n")
    assert "dataset_info.json does not tell" in " ".join(one.text for one in found.notes)
    assert "data/mine.json" in found.problems[0].what


def test_samples_are_capped_only_where_there_are_more(there):
    text = migrate(there(FIXTURES / "llama-factory" / "lora-sft.yaml")).text
    assert "rows" not in text.replace("the kind of rows", "")


def test_references_between_values_are_filled_in(run):
    text = (FIXTURES / "torchtune" / "llama31-qlora.yaml").read_text(encoding="utf-8")
    found, data = run(text.replace("checkpoint_dir: /tmp/", "checkpoint_dir: ${output_dir}/"))
    assert not found.problems
    assert data["model"]["name"] == "meta-llama/Meta-Llama-3.1-8B-Instruct"


_LETTERS = "ab:/\n\u00e9*[{\x1b '\""
_VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-5, 10**12),
    st.floats(),
    st.text(_LETTERS, max_size=8),
    st.sampled_from(["auto", "no", "1e-5", "steps", "epoch", "lora", "all", "dpo", "train[:10%]", "../x", "*"]),
    st.lists(st.one_of(st.text(_LETTERS, max_size=3), st.integers(), st.none()), max_size=3),
    st.dictionaries(
        st.sampled_from(["path", "type", "a"]), st.one_of(st.text(_LETTERS, max_size=3), st.none()), max_size=2
    ),
)


@pytest.mark.parametrize("tool", TOOLS)
@settings(max_examples=400, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
@given(st.data())
def test_odd_values_never_end_in_another_error_and_are_accounted_for(tool, tmp_path_factory, data):
    from forge_cli.resolve.plan_text import write_value

    path = data.draw(st.sampled_from([one for one in FILES if one.parent.name == tool]))
    tree = read_source(path).data
    for _ in range(data.draw(st.integers(1, 4))):
        owner = tree
        while True:
            key = data.draw(st.sampled_from(sorted(owner)))
            inner = owner[key][0] if isinstance(owner[key], list) and owner[key] else owner[key]
            if not isinstance(inner, dict) or not inner or data.draw(st.booleans()):
                break
            owner = inner
        owner[key] = data.draw(_VALUES)
    file = tmp_path_factory.mktemp("odd") / "other.yaml"
    file.write_text("\n".join(f"{key}: {write_value(value)}" for key, value in tree.items()), encoding="utf-8")
    try:
        found = migrate(file, tool)
    except ForgeError:
        return
    assert [one.key for one in found.lines] == [show_key(key) for key in read_source(file).leaves]
    assert found.problems or read_yaml_text(found.text, "run.yaml").data
