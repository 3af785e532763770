"""Caps, weights and what is held back: drawn by the seed, counted, never a surprise."""

from __future__ import annotations

from collections import Counter

import pytest
from row_files import chat, list_chats, prepare_rows, read_split, write_rows
from transformers import AutoTokenizer

from forge_cli.data.bad_rows import BadRows
from forge_cli.data.choosing import HELD_BACK, choose_rows
from forge_cli.data.scan import Scan
from forge_cli.errors import DataError
from forge_cli.paths import assets_root
from forge_cli.schema.data import DataSection, list_sources


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FORGE_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(assets_root() / "forge-tiny")


def choose(counts: list[int], sources: list[dict], seed: int = 0, name: str = "train", **data) -> list[int]:
    section = DataSection(train=[{"path": f"{i}.jsonl", **one} for i, one in enumerate(sources)], **data)
    scan = Scan(name, list_sources(section.train), BadRows(section), counts=counts)
    return list(choose_rows(scan, section, seed))


def test_every_row_once_unless_said_otherwise():
    assert choose([3, 2], [{}, {}]) == [1] * 5


@pytest.mark.parametrize(
    ("weight", "wanted"),
    [(1, {1: 10}), (2, {2: 10}), (0.5, {0: 5, 1: 5}), (2.5, {2: 5, 3: 5}), (0.3, {0: 7, 1: 3}), (1000, {1000: 10})],
)
def test_a_weight_is_how_often_a_row_is_seen(weight, wanted):
    assert Counter(choose([10], [{"weight": weight}])) == wanted


def test_a_cap_draws_rows_and_a_weight_repeats_them():
    assert Counter(choose([100], [{"rows": 10}])) == {0: 90, 1: 10}
    assert Counter(choose([100], [{"rows": 10, "weight": 3}])) == {0: 90, 3: 10}
    assert Counter(choose([100], [{"rows": 10, "weight": 0.5}])) == {0: 95, 1: 5}
    assert choose([4], [{"rows": 4}]) == [1] * 4


def test_draws_depend_on_the_seed_alone():
    source = [{"rows": 20}]
    first = choose([100], source, seed=1)
    assert choose([100], source, seed=1) == first != choose([100], source, seed=2)
    # A source is drawn alike, whatever its neighbours are.
    assert choose([100, 7], [*source, {"weight": 2}], seed=1)[:100] == first


def test_rows_that_are_not_first_are_drawn_as_well():
    """Over many seeds, every row has the same chance: 200 draws of 5 from 10 hit each about 100 times."""
    hits = [sum(one) for one in zip(*(choose([10], [{"rows": 5}], seed=seed) for seed in range(200)), strict=True)]
    assert sum(hits) == 1000 and min(hits) > 70 and max(hits) < 130


@pytest.mark.parametrize("data", [{"eval_rows": 2}, {"eval_fraction": 0.4}])
def test_every_choice_is_equally_likely(data):
    """All 10 pairs of 5 rows come up, each in about a tenth of 2000 draws; 3.5 standard deviations are 47."""
    pairs = Counter(
        tuple(i for i, one in enumerate(choose([5], [{}], seed=seed, **data)) if one == HELD_BACK)
        for seed in range(2000)
    )
    assert len(pairs) == 10 and all(len(pair) == 2 for pair in pairs)
    assert min(pairs.values()) > 153 and max(pairs.values()) < 247


def test_sources_are_drawn_for_themselves():
    copies = choose([10, 10, 10], [{"rows": 3}, {"weight": 2}, {}])
    assert Counter(copies[:10]) == {0: 7, 1: 3} and copies[10:] == [2] * 10 + [1] * 10


def test_a_cap_above_what_is_there_is_an_error():
    with pytest.raises(DataError, match=r"1.jsonl: rows: 6 are wanted, and there are 5; write rows: 5 or less"):
        choose([9, 5], [{}, {"rows": 6}])


def test_a_weight_that_draws_nothing_is_an_error():
    with pytest.raises(DataError, match=r"1.jsonl: weight: 0.1 of 3 rows draws none"):
        choose([9, 3], [{}, {"weight": 0.1}])


@pytest.mark.parametrize(
    ("data", "held"), [({"eval_rows": 7}, 7), ({"eval_fraction": 0.25}, 10), ({"eval_fraction": 0.001}, 1)]
)
def test_rows_are_held_back(data, held):
    copies = choose([40], [{}], **data)
    assert Counter(copies) == {1: 40 - held, HELD_BACK: held}
    assert choose([40], [{}], **data) == copies != choose([40], [{}], seed=1, **data)


def test_what_is_left_out_is_not_held_back():
    copies = choose([100], [{"rows": 20, "weight": 2}], eval_rows=5)
    assert Counter(copies) == {0: 80, 2: 15, HELD_BACK: 5}
    assert Counter(choose([100], [{"rows": 20}], eval_fraction=0.25)) == {0: 80, 1: 15, HELD_BACK: 5}


@pytest.mark.parametrize("data", [{"eval_rows": 5}, {"eval_rows": 9}, {"eval_fraction": 0.95}])
def test_something_has_to_be_left_to_train_on(data):
    with pytest.raises(DataError, match=r"data.eval_\w+ [\d.]+ of 5 rows leaves nothing to train on"):
        choose([5], [{}], **data)


# Through files.


def test_repeats_are_counted_and_their_rows_named(tokenizer, tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", list_chats(10))
    tokens = prepare_rows(tokenizer, train={"path": path, "weight": 2.5})
    rows = read_split(tokens)
    report = tokens.report.splits[0]
    assert Counter(Counter(row["row"] for row in rows).values()) == {2: 5, 3: 5}
    assert (report.rows_read, report.rows_used, report.rows_kept, report.rows_duplicate) == (10, 10, 25, 0)
    assert report.tokens == sum(len(row["input_ids"]) for row in rows)
    assert report.trained_tokens == sum(label != -100 for row in rows for label in row["labels"])
    assert sum(count for _, count in report.histogram) == 10, "of the rows as they stand in the file"


def test_held_back_rows_are_in_one_split_only(tokenizer, tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", list_chats(30))
    splits = {}
    for seed in (0, 1):
        tokens = prepare_rows(tokenizer, train={"path": path, "rows": 20}, eval_rows=6, seed=seed)
        train, held = ({row["row"] for row in read_split(tokens, name)} for name in ("train", "eval"))
        assert (len(train), len(held), train & held) == (14, 6, set())
        first, second = tokens.report.splits
        assert (first.rows_read, first.rows_unused, first.rows_kept) == (30, 16, 14)
        assert (second.rows_read, second.rows_unused, second.rows_kept) == (6, 0, 6)
        assert len(tokens.questions) == 6
        splits[seed] = train, held
    assert splits[0] != splits[1]


def test_evaluation_sources_have_caps_and_weights_too(tokenizer, tmp_path):
    train, held = (write_rows(tmp_path / f"{name}.jsonl", list_chats(20, name)) for name in ("train", "held"))
    tokens = prepare_rows(tokenizer, train=train, eval={"path": held, "rows": 4})
    assert len({row["row"] for row in read_split(tokens, "eval")}) == len(read_split(tokens, "eval")) == 4
    report = tokens.report.splits[1]
    assert (report.rows_read, report.rows_unused, report.rows_kept) == (20, 16, 4)
    with pytest.raises(DataError, match="rows: 21 are wanted"):
        prepare_rows(tokenizer, train=train, eval={"path": held, "rows": 21})


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("source", [{}, {"weight": 2}, {"rows": 30, "weight": 1.5}])
@pytest.mark.parametrize("on_overlong", ["truncate", "drop"])
def test_every_row_is_accounted_for(tokenizer, tmp_path, seed, source, on_overlong):
    """Read = bad + left out + kept + too long, in both splits; a bad row that was held back is bad and not lost."""
    rows = list_chats(40)
    rows[3] = rows[17] = {"messages": [{"role": "boss", "content": "a"}, {"role": "assistant", "content": "b"}]}
    rows[5] = {"messages": []}
    rows[8] = {"messages": 5}
    for i in (10, 20, 30):
        rows[i] = chat(f"question {i}", "word " * 200)
    rows[11] = chat("word " * 200, "never reached")
    path = write_rows(tmp_path / "rows.jsonl", rows)
    tokens = prepare_rows(
        tokenizer,
        train={"path": path, **source},
        eval_fraction=0.4,
        on_bad_row="skip",
        max_bad_ratio=0.5,
        on_overlong=on_overlong,
        max_lost_ratio=1.0,
        max_length=128,
        seed=seed,
    )
    train, held = tokens.report.splits
    assert train.rows_read == 40 and train.rows_bad + held.rows_bad >= 1
    for split in (train, held):
        found = read_split(tokens, split.name)
        numbers = {row["row"] for row in found}
        assert split.rows_read == split.rows_bad + split.rows_unused + split.rows_used
        assert split.rows_used == len(numbers) + split.rows_dropped
        assert split.rows_kept == len(found)
        assert split.rows_used == sum(count for _, count in split.histogram), "dropped and cut rows have a length too"
        assert split.tokens == sum(len(row["input_ids"]) for row in found)
    # The first pass refuses one row: 39 are left, or the 30 of the cap, and 0.4 of them are held back.
    assert (held.rows_read, train.rows_unused) == ((12, 9 + 12) if "rows" in source else (16, 16))
    if on_overlong == "truncate":
        cut = [row for row in read_split(tokens) if row["row"] in (11, 21, 31)]
        assert all(len(row["input_ids"]) == 128 and tokenizer.eos_token_id != row["labels"][-1] for row in cut)
