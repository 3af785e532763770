"""What a run trained is asked and measured as the run itself did."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from forge_cli.data.prepare import prepare_tokens
from forge_cli.errors import DataError
from forge_cli.parts.turns import RowError
from forge_cli.results.ask import Asker, Style
from forge_cli.results.chat import Chat
from forge_cli.results.evaluate import load_rows, measure
from forge_cli.results.find import Run
from forge_cli.results.prompts import answer_prompts, read_prompts
from forge_cli.run.answers import generate_answers
from forge_cli.run.execute import train

RUN = {
    "model": {"name": "forge-tiny"},
    "data": {"train": "forge:quickstart/train", "eval": "forge:quickstart/heldout", "max_length": 128},
    "training": {
        "learning_rate": 1e-2,
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 1,
    },
    "checkpoint": None,
    "report": None,
}
QUESTION = "Tell me about the luzudle."
PAIR = {"role": "user", "content": "hello"}, {"role": "assistant", "content": "hello"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Runs of two steps: ``adapter`` with EMA, and ``whole`` without rows to evaluate on."""
    root = tmp_path_factory.mktemp("runs")
    whole = {**RUN, "name": "whole", "data": {**RUN["data"], "eval": None}}
    adapter = {**RUN, "name": "adapter", "lora": {"r": 4}, "ema": {"decay": 0.5, "decay_warmup": False}}
    for settings in (adapter, whole):
        file = root / f"{settings['name']}.yaml"
        file.write_text(yaml.safe_dump({**settings, "output_dir": str(root)}))
        train(file)
    return root


@pytest.fixture(scope="module")
def asker(runs) -> Asker:
    return Asker(Run(runs / "adapter"))


@pytest.fixture
def talk(asker, monkeypatch):
    """A conversation of short answers; its notes and its answers are kept as lists."""
    monkeypatch.setattr(asker, "system", None)
    said: list[str] = []
    notes: list[str] = []
    chat = Chat(asker, Style(max_new_tokens=48), said.append, notes.append)
    chat.said, chat.notes = said, notes
    return chat


def write_jsonl(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def loss_of(asker: Asker, data: Path | None, **options) -> float:
    return measure(asker, load_rows(asker, data, None, False, lambda text: None), **options)["loss"]


def test_the_loss_is_the_trainers(asker):
    losses = asker.run.report["losses"]
    rows = load_rows(asker, None, None, False, lambda text: None)
    try:
        assert measure(asker, rows)["loss"] == pytest.approx(losses["eval_ema"], abs=1e-5)
        asker.load("raw")
        assert measure(asker, rows)["loss"] == pytest.approx(losses["eval_raw"], abs=1e-5)
        assert measure(asker, rows, base=True)["loss"] == pytest.approx(losses["eval_before"], abs=1e-5)
    finally:
        asker.load("ema")
    figures = [losses[one] for one in ("eval_ema", "eval_raw", "eval_before")]
    assert min(abs(a - b) for a, b in zip(figures, figures[1:] + figures[:1], strict=True)) > 1e-3


def test_rows_of_other_files_and_shapes(asker, tmp_path):
    turns = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": "a blue creature"}]
    other = [*turns[:1], {"role": "assistant", "content": "no idea"}]
    plain = loss_of(asker, write_jsonl(tmp_path / "sft.jsonl", [{"messages": turns}]))
    pairs = write_jsonl(tmp_path / "pairs.jsonl", [{"prompt": turns[:1], "chosen": turns[1:], "rejected": other[1:]}])
    assert loss_of(asker, pairs) == pytest.approx(plain, abs=1e-5)
    single = [{"prompt": turns[:1], "completion": turns[1:], "label": True}]
    single.append({"prompt": turns[:1], "completion": other[1:], "label": False})
    assert loss_of(asker, write_jsonl(tmp_path / "kto.jsonl", single)) == pytest.approx(plain, abs=1e-5)


def test_exact_match_counts_answers_to_the_letter(asker, tmp_path):
    ids = asker.encode(QUESTION)
    (answer,) = generate_answers(asker.loaded.model, asker.tokenizer, [ids], 64)
    rows = [
        {"messages": [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": text}]}
        for text in (answer, answer + "!")
    ]
    data = load_rows(asker, write_jsonl(tmp_path / "rows.jsonl", rows), None, True, lambda text: None)
    assert measure(asker, data)["exact_match_ratio"] == 0.5
    assert len(load_rows(asker, tmp_path / "rows.jsonl", 1, True, lambda text: None).questions) == 1


def test_a_whole_model_has_its_base_beside_it_and_says_that_it_has_no_rows(runs, tmp_path, asker):
    whole = Asker(Run(runs / "whole"))
    with pytest.raises(DataError, match="no evaluation rows"):
        load_rows(whole, None, None, False, lambda text: None)
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"messages": list(PAIR)}])
    trained, base = loss_of(whole, rows), loss_of(whole, rows, base=True)
    assert base == pytest.approx(loss_of(asker, rows, base=True), abs=1e-5) and abs(base - trained) > 1e-3
    notes: list[str] = []
    Chat(whole, Style(), notes.append, notes.append).take("/ema raw")
    assert notes == ["this run had no EMA: there is one set of weights"] and whole.which == "ema"


def test_a_streamed_answer_is_the_evaluated_one(asker, talk):
    talk.take(f"  {QUESTION}\n")
    (answer,) = generate_answers(asker.loaded.model, asker.tokenizer, [asker.encode(QUESTION)], 48)
    assert "".join(talk.said) == answer + "\n" and len(talk.said) > 3
    assert [turn["content"] for turn in talk.turns] == [QUESTION, answer]
    assert not talk.take("/exit") and talk.take("  /exit")


def test_conversations_are_rows_to_train_on(asker, talk, tmp_path):
    file = tmp_path / "talk.jsonl"
    talk.take(f"/save {file}")
    assert not file.exists() and "no whole answer" in talk.notes[-1]
    talk.take("/system Be kind.")
    talk.take("Who are you?")
    talk.style = Style(max_new_tokens=2)
    talk.take(QUESTION)
    assert "cut after 2 tokens" in talk.notes[-1]
    talk.take(f"/save {file}")
    turns = json.loads(file.read_text())["messages"]
    assert [turn["role"] for turn in turns] == ["system", "user", "assistant", "user", "assistant"]
    assert [turn.get("weight", 1) for turn in turns] == [1, 1, 1, 1, 0]
    spec = asker.run.plan.spec
    data = spec.data.model_copy(update={"train": str(file), "eval": None})
    report = prepare_tokens(spec.model_copy(update={"data": data}), asker.tokenizer).report
    assert report.system_prompt == "Be kind." and report.splits[0].rows_kept == 1
    before = file.read_text()
    Chat(asker, Style(), print, talk.notes.append)._save(str(file))
    assert file.read_text() == before


def test_comparing_answers_both_and_keeps_the_chosen_one(talk):
    talk.take("/compare")
    talk.take("Who are you?")
    text = "".join(talk.said)
    assert text.startswith("base:\n") and text.count("\ntrained:\n") == 1 and len(talk.turns) == 2
    assert text.endswith(talk.turns[1]["content"] + "\n")
    talk.take("/base")
    assert talk.is_base and not talk.compares


def test_a_stopped_answer_is_kept_but_not_trained(asker, talk, monkeypatch):
    def stop(text: str) -> None:
        talk.said.append(text)
        if len(talk.said) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(talk, "write", stop)
    talk.is_base = True
    with pytest.raises(KeyboardInterrupt):
        talk.take(QUESTION)
    talk.said.clear()
    talk.is_stoppable = True
    talk.take(QUESTION)
    assert talk.notes[-1].startswith("stopped") and talk.whole == [False]
    with asker.choosing(False) as model:  # the adapter is on again
        assert not any(getattr(module, "disable_adapters", None) is True for module in model.modules())


def test_old_turns_go_first_and_the_system_prompt_stays(asker, talk):
    asker.system = "Be kind."
    turns = [*PAIR * 60, {"role": "user", "content": QUESTION}]
    fitted = asker.fit(turns, 100)
    assert fitted.num_dropped > 0 and fitted.num_dropped % 2 == 0
    assert len(fitted.ids) + 100 <= asker.positions and fitted.num_free >= 100
    assert fitted.ids == asker.encode(turns[fitted.num_dropped :])
    assert asker.fit(turns[fitted.num_dropped - 2 :], 100).num_dropped == 2
    assert "Be kind." in asker.tokenizer.decode(fitted.ids)
    talk.turns, talk.whole = turns[:-1], [True] * 60
    talk.take("Who are you?")
    assert "from now on old turns are left out" in talk.notes[0] and len(talk.turns) == 122
    with pytest.raises(RowError, match="512 positions"):
        asker.fit("word " * 600, 100)
    talk.take("word " * 600)
    assert talk.num_unanswered == 1 and len(talk.turns) == 122


def test_without_a_chat_template_text_is_continued(runs, tmp_path):
    folder = shutil.copytree(runs / "adapter", tmp_path / "plain")
    (folder / "adapter" / "chat_template.jinja").unlink()
    asker = Asker(Run(folder))
    said, notes = [], []
    talk = Chat(asker, Style(max_new_tokens=64), said.append, notes.append)
    talk.take("/system Be kind.")
    assert asker.is_plain and "not set" in notes[0]
    assert asker.encode("The luzudle") == asker.tokenizer("The luzudle")["input_ids"]
    talk.take("The luzudle")
    talk.whole = [True]
    assert talk.list_rows() == [{"prompt": "The luzudle", "completion": "".join(said).strip()}]


def test_prompts_of_a_file_are_answered_in_order(asker, tmp_path):
    names = ["luzudle", "delobin", "dezuwick"]
    rows = [{"id": n, "prompt": f"Tell me about the {name}." + " Please!" * n} for n, name in enumerate(names)]
    rows.append({"messages": [*PAIR, {"role": "user", "content": "Who are you?"}, PAIR[1]]})
    prompts = read_prompts(write_jsonl(tmp_path / "rows.jsonl", rows), asker, 32)
    assert [one.has_answer for one in prompts] == [False, False, False, True]
    found = list(answer_prompts(asker, prompts, max_new_tokens=32, batch_rows=2))
    alone = [generate_answers(asker.loaded.model, asker.tokenizer, [one.ids], 32)[0] for one in prompts]
    assert [one["answer"] for one in found] == alone
    assert [{k: v for k, v in one.items() if k != "answer"} for one in found] == rows
    lines = tmp_path / "lines.txt"
    lines.write_text("\ufeffWho are you?\n\n  hi\n", encoding="utf-8")
    assert [one.row for one in read_prompts(lines, asker, 32)] == [{"prompt": "Who are you?"}, {"prompt": "hi"}]


def test_rows_that_ask_nothing_are_named(asker, tmp_path):
    file = tmp_path / "rows.jsonl"
    bad = ['{"prompt": 3}', '{"question": "a"}', "{bad", '{"messages": []}', '{"prompt": "%s"}' % ("word " * 600)]
    file.write_text("\n".join(['{"prompt": "fine"}', *bad]) + "\n")
    with pytest.raises(DataError) as failure:
        read_prompts(file, asker, 16)
    places = [problem.where.removeprefix(f"{file}:") for problem in failure.value.problems]
    assert [one.partition(":")[0] for one in places] == ["2", "3", "4", "5", "6"]
    assert failure.value.exit_code == 3 and "512 positions" in failure.value.problems[-1].what


def test_drawing_follows_the_seed(asker):
    from forge_cli.results.ask import seed_drawing

    def draw(seed: int, style: Style) -> str:
        seed_drawing(seed)
        said: list[str] = []
        asker.answer(asker.fit("hi", 16), style, said.append)
        return "".join(said)

    hot = Style(16, temperature=30.0)
    assert draw(1, hot) == draw(1, hot) != draw(2, hot)
    assert draw(2, Style(16, temperature=30.0, top_p=1e-6)) == draw(0, Style(16))
    assert torch.is_grad_enabled()
