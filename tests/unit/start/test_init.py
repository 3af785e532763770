"""What `forge init` proposes: a file that resolves for every model, set of rows and GPU, and that keeps the rows."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import yaml

from forge_cli.cli.json_schema import build_json_schema
from forge_cli.errors import ConfigError, DataError
from forge_cli.resolve.plan import resolve_plan
from forge_cli.run.data_stage import check_data
from forge_cli.start.look import SAMPLE_ROWS, Lengths, look_at_rows, look_at_target, measure_rows
from forge_cli.start.propose import Proposal, choose_model, list_fitting_models, propose
from forge_cli.start.settings import MOST_KEYS, Setting
from forge_cli.start.write import SCHEMA_FILE, SCHEMA_LINE, check_free, render_run_file, write_run_file, write_value
from forge_cli.units import GIB

WORDS = ["river", "stone", "quick", "lazy", "fox", "jumps", "over", "the", "brown", "dog", "and", "then"]


def say(count: int, draw: random.Random) -> str:
    return " ".join(draw.choice(WORDS) for _ in range(count))


def chat(question: str, answer: str) -> dict:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def build_rows(name: str) -> list[dict]:
    """Rows of one kind: short ones, few very long ones, many that are too long for 512 positions."""
    draw = random.Random(name)
    lengths = {"short": [4, 12], "tail": [4] * 199 + [90], "long": [6, 300]}
    kind, _, shape = name.partition("-")
    rows = []
    for number in range({"tiny": 7, "tail": 800}.get(shape, 300)):
        question = f"{say(4, draw)} {number}"
        answer = say(draw.choice(lengths.get(shape, [4, 12])), draw)
        rows.append(
            {
                "chat": chat(question, answer),
                "alpaca": {"instruction": question, "input": "", "output": answer},
                "text": {"text": f"{question} {answer}"},
                "dpo": {"prompt": question, "chosen": answer, "rejected": f"no {number}"},
                "kto": {"prompt": question, "completion": answer, "label": number % 2 == 0},
            }[kind]
        )
    return rows


def write_rows(folder: Path, rows: list[dict], *broken: str) -> Path:
    file = folder / "rows.jsonl"
    file.write_text("\n".join([*map(json.dumps, rows), *broken]) + "\n", encoding="utf-8")
    return file


def write_proposal(proposal: Proposal, folder: Path):
    return write_run_file(folder / "run.yaml", render_run_file(proposal.settings, ["Head."]), build_json_schema())


def values_of(proposal: Proposal) -> dict[str, object]:
    return {one.path: one.value for one in proposal.settings}


@pytest.mark.parametrize(
    "name", ["chat-short", "chat-tail", "chat-long", "chat-tiny", "alpaca-tiny", "text-long", "dpo-long", "kto-short"]
)
def test_the_proposed_file_keeps_the_rows(name, tmp_path, monkeypatch):
    """The proof is the data stage itself: it ends the run where more is lost than the file allows."""
    monkeypatch.chdir(tmp_path)
    rows = look_at_rows(str(write_rows(tmp_path, build_rows(name)).name))
    proposal = propose(rows, measure_rows(rows, "forge-tiny"), "forge-tiny", look_at_target("cpu"))
    plan = write_proposal(proposal, tmp_path)
    assert plan.spec == resolve_plan(tmp_path / "run.yaml").spec == proposal.plan.spec
    assert len(proposal.settings) <= MOST_KEYS
    report = check_data(plan.spec, lambda text: None)[0].report
    assert all(split.rows_kept for split in report.splits)
    assert len(report.splits) == (1 if "tiny" in name else 2)
    longest = max(split.longest_tokens for split in report.splits)
    assert plan.spec.data.max_length <= 512  # the embedded model's positions
    assert plan.spec.data.on_overlong == "error" or longest > plan.spec.data.max_length


@pytest.mark.parametrize("model", ["forge-tiny", "Qwen/Qwen3-8B", "mixtral-8x7b", "org/unknown"])
@pytest.mark.parametrize("gpu", ["cpu", "t4", "rtx-4090", "6GiB"])
@pytest.mark.parametrize("data", ["forge:quickstart/train", "forge:preference/train", "forge:preference/rated"])
def test_every_proposal_resolves_and_is_honest_about_memory(model, gpu, data, tmp_path):
    rows, target = look_at_rows(data), look_at_target(gpu)
    lengths = Lengths([20, 30, 400], rows.count, guessed="no tokenizer")
    proposal = propose(rows, lengths, model, target)
    assert write_proposal(proposal, tmp_path).spec == proposal.plan.spec
    assert len(proposal.settings) <= MOST_KEYS
    assert proposal.plan.spec.method == rows.method
    assert all(one.reason for one in proposal.settings)
    if model == "org/unknown":
        assert proposal.budget is None
    else:
        assert proposal.fits == (proposal.budget.needed_bytes <= target.device.usable_bytes)
        assert proposal.fits != any("does not fit" in note for note in proposal.notes)


def test_four_bits_are_taken_only_where_sixteen_do_not_fit():
    rows = look_at_rows("forge:quickstart/train")
    lengths = Lengths([100] * 280, 280)

    def preset(gpu: str) -> object:
        return values_of(propose(rows, lengths, "Qwen/Qwen3-8B", look_at_target(gpu)))["preset"]

    assert [preset("h100-sxm"), preset("rtx-3060")] == ["lora", "qlora"]


def test_a_run_that_fits_nothing_says_which_gpu_would_hold_it():
    rows = look_at_rows("forge:quickstart/train")
    proposal = propose(rows, Lengths([100] * 280, 280), "llama-3.3-70b", look_at_target("rtx-3060"))
    assert not proposal.fits
    (note,) = [one for one in proposal.notes if "GPUs that would hold it" in one]
    named = note.rpartition(": ")[2].split(", ")
    assert named and all(look_at_target(one).device.usable_bytes > 40 * GIB for one in named)


def test_length_covers_99_per_cent_and_says_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = look_at_rows(str(write_rows(tmp_path, build_rows("chat-short")).name))
    proposal = propose(rows, Lengths([100] * 297 + [400] * 3, 300), "forge-tiny", look_at_target("cpu"))
    chosen = {one.path: one for one in proposal.settings}
    assert chosen["data.max_length"].value == 128
    assert "99 % of your rows have at most 100 tokens" in chosen["data.max_length"].reason
    assert chosen["data.on_overlong"][1:] == ("drop", "3 rows (1.0 %) are left out")


def test_a_large_set_is_measured_on_a_sample(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    count = 2 * SAMPLE_ROWS
    rows = look_at_rows(str(write_rows(tmp_path, [{"text": f"{number}"} for number in range(count)]).name))
    lengths = measure_rows(rows, "forge-tiny")
    assert (len(lengths.tokens), lengths.num_rows, lengths.is_sample) == (SAMPLE_ROWS, count, True)


def test_without_a_tokenizer_lengths_are_characters_and_the_file_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    rows = look_at_rows("forge:quickstart/train")
    lengths = measure_rows(rows, "Qwen/Qwen3-0.6B")
    proposal = propose(rows, lengths, "Qwen/Qwen3-0.6B", look_at_target("cpu"))
    assert lengths.guessed
    assert any("characters / 4" in one for one in proposal.notes)


def test_one_bad_row_in_a_hundred_is_skipped_and_named_and_more_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = look_at_rows(str(write_rows(tmp_path, build_rows("chat-short"), '{"messages": [').name))
    proposal = propose(rows, measure_rows(rows, "forge-tiny"), "forge-tiny", look_at_target("cpu"))
    (skip,) = [one for one in proposal.settings if one.path == "data.on_bad_row"]
    assert skip.value == "skip" and "rows.jsonl:301" in skip.reason
    write_rows(tmp_path, build_rows("chat-tiny"), '{"messages": [')
    with pytest.raises(DataError, match=r"rows\.jsonl:8"):
        look_at_rows("rows.jsonl")


def test_a_preset_whose_method_does_not_take_the_rows_is_refused():
    with pytest.raises(DataError, match="method dpo needs rows with"):
        look_at_rows("forge:quickstart/train", "dpo")


def test_models_are_proposed_that_fit_the_gpu():
    small, large = look_at_target("rtx-3060"), look_at_target("h100-sxm")
    names = [[name for name, _, _ in list_fitting_models(one)] for one in (small, large)]
    assert names[0][0] == "forge-tiny" and set(names[0]) < set(names[1])
    assert choose_model(look_at_target("cpu"), "rows.jsonl") == "forge-tiny"
    assert choose_model(large, "rows.jsonl") == "Qwen/Qwen3-8B"
    assert choose_model(large, "forge:quickstart/train") == "forge-tiny"


@pytest.mark.parametrize(
    "value",
    ["plain.jsonl", "../a b.jsonl", "ü.txt", "yes", "1e-3", "a: b", "#x", "it's", 'say "no"', "*.jsonl", 0.001, 8],
)
def test_values_are_read_back_as_they_were(value):
    text = render_run_file([Setting("data.train", value, "a reason\nof two lines: # and more")], [])
    assert yaml.safe_load(text) == {"data": {"train": value}}
    assert write_value("forge:quickstart/train") == "forge:quickstart/train"


def test_a_file_that_is_there_is_not_overwritten(tmp_path):
    file = tmp_path / "run.yaml"
    check_free(file, force=False)
    file.write_text("mine")
    with pytest.raises(ConfigError, match="would be overwritten"):
        check_free(file, force=False)
    check_free(file, force=True)
    (tmp_path / SCHEMA_FILE).write_text("{}")
    with pytest.raises(ConfigError, match=SCHEMA_FILE):
        check_free(tmp_path / "other.yaml", force=False)
    (tmp_path / SCHEMA_FILE).write_text(json.dumps(build_json_schema()))
    check_free(tmp_path / "other.yaml", force=False)


def test_a_text_that_does_not_resolve_is_not_written(tmp_path):
    with pytest.raises(ConfigError):
        write_run_file(tmp_path / "run.yaml", "preset: nonsense\n", build_json_schema())
    assert list(tmp_path.iterdir()) == []


def test_the_file_begins_with_the_line_for_editors_and_the_schema_takes_it(tmp_path):
    import jsonschema

    rows = look_at_rows("forge:quickstart/train")
    write_proposal(propose(rows, Lengths([100] * 280, 280), "forge-tiny", look_at_target("cpu")), tmp_path)
    text = (tmp_path / "run.yaml").read_text()
    assert text.splitlines()[0] == SCHEMA_LINE
    jsonschema.validate(yaml.safe_load(text), json.loads((tmp_path / SCHEMA_FILE).read_text()))
