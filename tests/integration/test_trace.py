"""The trace of a training step: against runs on real tensors, counts of weights, and formulas found elsewhere."""

from __future__ import annotations

import importlib.util
import tempfile
from pathlib import Path

import pytest

from forge_cli.errors import ModelError
from forge_cli.facts.parameter_count import count_parameters
from forge_cli.facts.shape import ModelFacts
from forge_cli.resolve.plan import Plan, resolve_mapping
from forge_cli.run.trace import run_requests, trace_plan

FAMILIES = [
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma",
    "gemma2",
    "gemma3_text",
    "phi3",
    "phi",
    "gpt_neox",
    "gpt2",
    "olmo2",
    "smollm3",
    "falcon",
    "mixtral",
    "qwen3_moe",
    "gpt_oss",
]
UNLIKE_LLAMA = ("gpt2", "phi3", "falcon", "qwen3_moe", "gpt_oss")
pytestmark = pytest.mark.slow


def make_facts(model_type: str) -> ModelFacts:
    key_heads = {"falcon": 1, "gpt2": 8, "gpt_neox": 8, "phi": 8}.get(model_type, 2)
    facts = ModelFacts(
        name="small",
        hub_id="nobody/small",
        path=None,
        model_type=model_type,
        hidden_size=256,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=key_heads,
        head_dim=32,
        intermediate_size=512,
        vocab_size=1000,
        tie_word_embeddings=model_type in ("gemma", "gemma2", "gemma3_text", "gpt2", "falcon", "smollm3"),
        max_position_embeddings=1024,
        sliding_window=64 if model_type in ("gemma2", "gemma3_text", "gpt_oss") else None,
    )
    if model_type in ("mixtral", "qwen3_moe", "gpt_oss"):
        facts = facts._replace(num_local_experts=4, num_experts_per_tok=2)
    if model_type == "qwen3_moe":
        facts = facts._replace(moe_intermediate_size=128)
    return facts


def make_plan(method: str = "full", length: int = 128, checkpointing: bool = False, **sections: dict) -> Plan:
    settings = {
        "model": {"name": "forge-tiny"},
        "data": {"train": "forge:quickstart/train", "max_length": length},
        "training": {"per_device_train_batch_size": 2, "activation_checkpointing": checkpointing},
        "lora": {"r": 8} if method != "full" else None,
        "quantization": {"bits": 4} if method == "qlora" else None,
    }
    for name, fields in sections.items():
        settings[name] = {**(settings.get(name) or {}), **fields}
    return resolve_mapping(settings)


def ask(plan: Plan, facts: ModelFacts | None = None, num_layers: int = 2, device: str = "cuda", **more) -> dict:
    facts = facts or make_facts("llama")
    spec = plan.spec.model_dump(mode="json")
    return {"spec": spec, "facts": facts._asdict(), "num_layers": num_layers, "device": device, **more}


@pytest.fixture(scope="module")
def families():
    """A trace of each family trained whole, and of those whose layers are unlike Llama's with a 4-bit base."""
    whole, quantized = make_plan(), make_plan("qlora", checkpointing=True)
    requests = [ask(whole, make_facts(name)) for name in FAMILIES]
    requests += [ask(quantized, make_facts(name)) for name in UNLIKE_LLAMA]
    return dict(zip([*FAMILIES, *(f"{name} qlora" for name in UNLIKE_LLAMA)], run_requests(requests), strict=True))


def test_every_family_is_traced(families):
    for name, answer in families.items():
        phases = answer["phases"]
        assert phases["load"] < phases["step"] < phases["backward/last layer"] < max(phases.values()), name
        assert {"forward", "loss", "backward/loss", "backward/first layer"} <= set(phases), name


@pytest.mark.parametrize("name", FAMILIES)
def test_the_model_is_built_from_its_shape(families, name):
    weights = 4 * count_parameters(make_facts(name))
    # Beside the weights there are only the frequencies of the rotation; small weights fill a block of 512 bytes.
    assert weights <= families[name]["phases"]["load"] <= weights + 8192


def test_what_a_layer_saves_per_token_is_what_was_counted_before():
    """Formulas of tensors that autograd keeps, counted with other tools; Llama, no checkpointing.

    Source: the table in ``forge_cli/estimate/memory.py`` before the replay. h hidden, a and b all query and key
    heads, i feed-forward, n heads, r rank; bytes.
    """
    h, a, b, i, n, r = 256, 256, 64, 512, 8, 8
    shared = 4 * a + 4 * b + 8 * i + 4 * n + 8
    cases = {
        "master weights under autocast": (make_plan, {}, 26 * h + shared),
        "4-bit weights": (lambda **o: make_plan("qlora", **o), {}, 12 * h + shared + 14 * r),
    }
    requests = []
    for make, sections, _ in cases.values():
        for length in (128, 256):
            one_row = {"per_device_train_batch_size": 1}
            plan = make(length=length, training=one_row, **sections)
            requests += [ask(plan, num_layers=layers) for layers in (2, 3)]
    answers = [answer["phases"]["loss"] for answer in run_requests(requests)]
    for number, (name, (_, _, expected)) in enumerate(cases.items()):
        few, more, few_long, more_long = answers[4 * number : 4 * number + 4]
        assert ((more_long - few_long) - (more - few)) / 128 == expected, name


def test_packed_4bit_weights_and_paged_states_have_their_sizes():
    quantized, plain = make_plan("qlora"), make_plan("lora")
    paged = make_plan(training={"optim": "paged_adamw_8bit"})
    request = ask(quantized, list="load")
    answers = run_requests([request, ask(plain), ask(paged, list="step")])
    # Seven linear layers in each of two, 256 x 256, 256 x 64 (twice), 256 x 256 and 256 x 512 (three times).
    elements = [65536, 16384, 16384, 65536, *[131072] * 3] * 2
    # Two to a byte, a byte for 64, and in blocks of 512: the code, the code of the scales (1024), the scales' own
    # scales (4 bytes for 64 x 256) and an offset.
    packed = sum(n // 2 + max(n // 64, 512) + 512 + 1024 + 512 + 512 for n in elements)
    assert answers[1]["phases"]["load"] - answers[0]["phases"]["load"] == 2 * sum(elements) - packed
    sizes = [one["num_bytes"] for one in answers[0]["storages"]]
    assert sizes.count(131072 // 2) == 6
    # States of matrices from 100,000 elements on are in memory that torch does not count.
    states = [one for one in answers[2]["storages"] if "uint8" in one["shape"]]
    assert len(states) == 2 * 2 * 4, "queries, keys, values and outputs, two states each, in two layers"


def test_phases_lie_on_a_line_over_frozen_and_trained_layers():
    plan = make_plan("lora", checkpointing=True, freeze={"first": "50%"})
    trace = trace_plan(plan, "cpu")
    (whole,) = run_requests([ask(plan, plan.facts, 8, "cpu", num_frozen=4)])
    assert {"load", "forward", "loss", "backward/loss", "backward/last layer", "step"} <= set(trace.phases)
    assert trace.phases == {name: whole["phases"][name] for name in trace.phases}
    assert trace.peak_bytes == max(whole["phases"].values())


@pytest.mark.parametrize(("method", "checkpointing"), [("full", True), ("lora", False)])
def test_fake_tensors_count_as_real_ones(method, checkpointing):
    """The same trainer with numbers in it: what is held at each point is the same to the byte."""
    from forge_cli.build.adapter import prepare_trainable
    from forge_cli.build.fake_model import build_fake_model, list_held
    from forge_cli.parts.memory_trace import LiveBytes
    from forge_cli.run import trace_step

    plan = make_plan(method, checkpointing=checkpointing, ema={"decay": 0.9})
    (fake,) = run_requests([ask(plan, device="cpu")])
    scene = trace_step.Scene(plan.spec, make_facts("llama"), 2, device="cpu")
    spec, formats = trace_step.shrink(scene), trace_step.choose_traced_compute(plan.spec, on_gpu=False)
    model, _ = prepare_trainable(build_fake_model(spec, scene.facts, formats, 2), spec)
    live = LiveBytes(granule=1)
    live.mark("load")
    live.register(list_held(model), "weight")
    live.mark("set-up")
    with tempfile.TemporaryDirectory() as folder:
        trainer = trace_step._build_trainer(spec, model, formats, Path(folder), live)
        with live:
            trainer.train()
    assert live.peaks == fake["phases"]


def test_what_cannot_be_traced_is_refused():
    preference = {"model": {"name": "forge-tiny"}, "preset": "dpo"}
    preference["data"] = {"train": "forge:preference/train", "max_length": 256}
    with pytest.raises(ModelError, match="dpo is not traced"):
        trace_plan(resolve_mapping(preference))
    unknown = {"model": {"name": "nobody/unknown"}, "data": {"train": "forge:quickstart/train"}}
    with pytest.raises(ModelError, match="is not known"):
        trace_plan(resolve_mapping(unknown))


def test_replay_and_trace_agree():
    """Part of the matrix of ``tests/benchmarks/estimate_trace.py``: real widths, both methods of a GPU's formats."""
    file = Path(__file__).parents[1] / "benchmarks" / "estimate_trace.py"
    spec = importlib.util.spec_from_file_location("estimate_trace", file)
    matrix = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(matrix)
    wanted = ("full ckpt 4096 tied 2", "lora plain 512 untied 3", "qlora ckpt 4096 untied 2")
    cells = [
        cell
        for family in ("llama", "gemma2")
        for cell in matrix.list_cells([family])
        if any(part in cell[0] for part in wanted)
    ]
    errors = matrix.compare(cells)
    assert len(errors) == 8 and max(map(abs, errors)) < 0.01
