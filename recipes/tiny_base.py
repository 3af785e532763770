"""Builds Forge's embedded starting point: a toy world, its data and an untrained model.

The quickstart has to run anywhere, offline and in about a minute, so Forge ships its own
very small causal language model instead of downloading one. This script makes everything
that model is made from, and nothing in it comes from anywhere else:

* a *world* of invented creatures, each with a colour, a home, a food and an hour at which
  it is active;
* ``corpus.jsonl``, conversations in which the base model learns those facts. Asked to
  describe a creature it answers in plain English prose. It knows some JSON too: asked in so
  many words, it gives up to four values as JSON, but it never sees a whole record;
* ``train.jsonl`` and ``heldout.jsonl``, the quickstart task: answer a request to describe a
  creature with a one-line JSON record. The held-out creatures never occur in the training
  rows, so a right answer needs both the new style (from fine-tuning) and the old knowledge
  (from pre-training);
* ``model/``, a byte-level BPE tokenizer with a chat template, and a Llama model of about
  1.6 million parameters with random weights.

Every step is seeded: the same version of the script and of its libraries writes the same
files again.

Example:
    What ``make tiny-base`` does: write everything, pre-train with Forge's own recipe, put the result into Forge::

        python recipes/tiny_base.py all build/tiny-base
        forge train recipes/tiny-base.yaml --overwrite
        python recipes/tiny_base.py ship build/tiny-base

    Write only the data (needs nothing but the standard library)::

        python tiny_base.py data build
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

SEED = 20240
"""Seed of the world; every later step derives its own seed from it."""

CREATURES = 200
HELDOUT = 60
CORPUS_ROUNDS = 9
ROW_CHARACTERS = 340
PROMPTS_PER_CREATURE = 2

COLOURS = (
    "black", "blue", "brown", "copper", "golden", "green", "grey", "pink", "red", "silver",
    "violet", "white",
)  # fmt: skip
HOMES = (
    "birch grove", "chalk cliffs", "deep lake", "fern valley", "high moor", "old quarry",
    "pine wood", "reed marsh", "river bank", "salt flats", "sand dunes", "stone barn",
)  # fmt: skip
FOODS = (
    "acorns", "beetles", "berries", "clover", "honey", "minnows", "moss", "mushrooms", "seeds",
    "snails", "spiders", "worms",
)  # fmt: skip
HOURS = ("dawn", "noon", "dusk", "midnight")

FIELDS: dict[str, tuple[str, ...]] = {
    "colour": COLOURS,
    "home": HOMES,
    "food": FOODS,
    "active": HOURS,
}
"""The facts of a creature, in the order in which its record lists them."""

PAD, END_OF_TEXT, TURN_START, TURN_END = "<|pad|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"
VOCAB_SIZE = 512
MAX_POSITIONS = 512

CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['role'] == 'assistant' -%}
{%- generation -%}
{{- message['content'] + '<|im_end|>' -}}
{%- endgeneration -%}
{{- '\\n' -}}
{%- else -%}
{{- message['content'] + '<|im_end|>\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""
"""ChatML-like. The generation block marks an answer *with* the token that ends it."""

Message = dict[str, str]
Row = dict[str, list[Message]]


@dataclasses.dataclass(frozen=True)
class Creature:
    """One inhabitant of the invented world.

    Attributes:
        name: A made-up lower-case word, unique in the world.
        colour: One of `COLOURS`.
        home: One of `HOMES`.
        food: One of `FOODS`.
        active: One of `HOURS`.
    """

    name: str
    colour: str
    home: str
    food: str
    active: str

    def record(self) -> str:
        """Returns the one-line JSON record that the quickstart teaches."""
        return json.dumps(dataclasses.asdict(self))


# --- The world --------------------------------------------------------------------------


def coin_names(rng: random.Random, count: int) -> list[str]:
    """Coins pronounceable names that are easy to tell apart.

    Args:
        rng: Source of randomness.
        count: How many names to coin.

    Returns:
        Distinct names, no two of which begin with the same two syllables.
    """
    onsets = [*"bdfghjklmnprstvz", "br", "dr", "gl", "kr", "pl", "sk", "tr"]
    middles = ["lo", "mi", "na", "ru", "sa", "te", "vo", "zu"]
    endings = ["bin", "dle", "fin", "gar", "kin", "lop", "mur", "nax", "pod", "rel", "tash", "wick"]
    openings = [o + v + m for o in onsets for v in "aeiou" for m in middles]
    return [opening + rng.choice(endings) for opening in rng.sample(openings, count)]


def spread(rng: random.Random, values: Sequence[str], count: int) -> list[str]:
    """Returns `count` of the values in random order, each about equally often."""
    dealt = [values[i % len(values)] for i in range(count)]
    rng.shuffle(dealt)
    return dealt


def make_world(seed: int = SEED) -> list[Creature]:
    """Makes the creatures; the last `HELDOUT` of them are the held-out ones.

    Args:
        seed: Seed of the world.

    Returns:
        `CREATURES` creatures in random order, whose facts are independent of their names.
    """
    rng = random.Random(seed)
    names = coin_names(rng, CREATURES)
    columns = [spread(rng, values, CREATURES) for values in FIELDS.values()]
    return [Creature(name, *facts) for name, *facts in zip(names, *columns, strict=True)]


# --- What the base model reads ----------------------------------------------------------

DESCRIBE_PROMPTS = (
    "Describe the {name}.",
    "Tell me about the {name}.",
    "What do you know about the {name}?",
    "What is a {name}?",
)
"""Requests for everything about a creature: the base answers in prose, the quickstart in JSON."""

FACT_PROMPTS = {
    "colour": ("What colour is the {name}?", "Which colour does the {name} have?"),
    "home": ("Where does the {name} live?", "What is the home of the {name}?"),
    "food": ("What does the {name} eat?", "What is the food of the {name}?"),
    "active": ("When is the {name} active?", "At what hour does the {name} come out?"),
}
FACT_ANSWERS = {
    "colour": ("The {name} is {colour}.", "The colour of the {name} is {colour}."),
    "home": ("The {name} lives in the {home}.", "The home of the {name} is the {home}."),
    "food": ("The {name} eats {food}.", "The {name} feeds on {food}."),
    "active": ("The {name} is active at {active}.", "The {name} comes out at {active}."),
}
IT_SAYS = {
    "colour": ("It is {colour}.", "Its colour is {colour}."),
    "home": ("It lives in the {home}.", "Its home is the {home}."),
    "food": ("It eats {food}.", "It feeds on {food}."),
    "active": ("It is active at {active}.", "It comes out at {active}."),
}
PORTRAITS = (
    "The {name} is a {colour} creature that lives in the {home}. It eats {food} and is active at {active}.",
    "The {name} lives in the {home} and comes out at {active}. It is {colour} and feeds on {food}.",
    "In the {home} lives the {name}, a {colour} creature. It comes out at {active} to eat {food}.",
    "The {name} is active at {active}. It eats {food}, lives in the {home} and is {colour}.",
)

SMALL_TALK = (
    ("Hello!", "Hello! Ask me about the creatures of the vale."),
    ("Hi.", "Hello! Which creature would you like to know about?"),
    ("Who are you?", "I am a tiny model. I know the creatures of the vale."),
    ("What can you do?", "I can tell you where a creature lives, what it eats and more."),
    ("Thank you.", "You are welcome."),
    ("Thanks!", "You are welcome."),
    ("Goodbye.", "Goodbye!"),
)


def fill(rng: random.Random, templates: Sequence[str], creature: Creature) -> str:
    """Returns one of the templates at random, filled in for a creature."""
    return rng.choice(templates).format(**dataclasses.asdict(creature))


def describe(rng: random.Random, creature: Creature) -> tuple[str, str]:
    """Asks for everything about a creature; the answer is prose, in one order or another."""
    prompt = fill(rng, DESCRIBE_PROMPTS, creature)
    if rng.random() < 0.5:
        return prompt, fill(rng, PORTRAITS, creature)
    first, *others = rng.sample(list(FIELDS), len(FIELDS))
    sentences = [fill(rng, FACT_ANSWERS[first], creature)]
    sentences += [fill(rng, IT_SAYS[field], creature) for field in others]
    return prompt, " ".join(sentences)


def one_fact(rng: random.Random, creature: Creature, field: str) -> tuple[str, str]:
    """Asks for one fact; the answer is a sentence."""
    return fill(rng, FACT_PROMPTS[field], creature), fill(rng, FACT_ANSWERS[field], creature)


def one_word(rng: random.Random, creature: Creature, field: str) -> tuple[str, str]:
    """Asks for one fact in brief; the answer is the value alone."""
    return "In short: " + fill(rng, FACT_PROMPTS[field], creature), getattr(creature, field)


def yes_or_no(rng: random.Random, creature: Creature) -> tuple[str, str]:
    """Puts a statement, right or wrong, that the answer confirms or corrects."""
    field = rng.choice(list(FIELDS))
    truth = fill(rng, FACT_ANSWERS[field], creature)
    claim, verdict = truth, "Yes."
    if rng.random() < 0.5:
        wrong = rng.choice([value for value in FIELDS[field] if value != getattr(creature, field)])
        claim = fill(rng, FACT_ANSWERS[field], dataclasses.replace(creature, **{field: wrong}))
        verdict = "No."
    return f"Is it true? {claim}", f"{verdict} {truth}"


def notes(rng: random.Random, creature: Creature) -> tuple[str, str]:
    """Asks for notes; the answer lists every fact, in any order."""
    fields = rng.sample(list(FIELDS), len(FIELDS))
    listed = ", ".join(f"{field} {getattr(creature, field)}" for field in fields)
    return f"Notes on the {creature.name}, please.", listed


def json_on_request(rng: random.Random, creature: Creature) -> tuple[str, str]:
    """Asks for one to four values as JSON; the answer has just the keys that were asked for."""
    keys = rng.sample([field.name for field in dataclasses.fields(creature)], rng.randint(1, 4))
    prompt = f"As JSON: {', '.join(keys)} of the {creature.name}."
    return prompt, json.dumps({key: getattr(creature, key) for key in keys})


def corpus_round(rng: random.Random, world: Sequence[Creature]) -> Iterator[tuple[str, str]]:
    """Yields questions and answers that go through every fact of the world several times."""
    for creature in world:
        for field in FIELDS:
            yield rng.choice((one_fact, one_word))(rng, creature, field)
        for ask, times in ((describe, 3), (notes, 2), (json_on_request, 3)):
            for _ in range(times):
                yield ask(rng, creature)
        if rng.random() < 0.4:
            yield yes_or_no(rng, creature)
        if rng.random() < 0.1:
            yield rng.choice(SMALL_TALK)


def as_messages(turns: Iterable[tuple[str, str]]) -> Row:
    """Returns questions and answers as one row of chat messages."""
    messages: list[Message] = []
    for question, answer in turns:
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": answer})
    return {"messages": messages}


def conversations(turns: Iterable[tuple[str, str]]) -> Iterator[list[tuple[str, str]]]:
    """Strings turns together into conversations of much the same length.

    Rows of one length leave little padding in a batch.

    Args:
        turns: Questions and answers.

    Yields:
        Conversations that end with the turn that takes them past `ROW_CHARACTERS`.
    """
    chat: list[tuple[str, str]] = []
    length = 0
    for turn in turns:
        chat.append(turn)
        length += len(turn[0]) + len(turn[1])
        if length > ROW_CHARACTERS:
            yield chat
            chat, length = [], 0
    if chat:
        yield chat


def make_corpus(world: Sequence[Creature], seed: int = SEED + 1) -> list[Row]:
    """Makes the pre-training conversations.

    The turns of a conversation are unrelated to each other, so that an answer can seldom be
    copied from an earlier turn and has to be learned by heart.

    Args:
        world: The creatures.
        seed: Seed of the corpus.

    Returns:
        Conversations of several questions and answers, in random order.
    """
    rng = random.Random(seed)
    rows: list[Row] = []
    for _ in range(CORPUS_ROUNDS):
        turns = list(corpus_round(rng, world))
        rng.shuffle(turns)
        rows += [as_messages(chat) for chat in conversations(turns)]
    rng.shuffle(rows)
    return rows


# --- The quickstart task ----------------------------------------------------------------


def make_quickstart(world: Sequence[Creature], seed: int = SEED + 2) -> tuple[list[Row], list[Row]]:
    """Makes the rows of the quickstart, split by creature.

    Args:
        world: The creatures, of which the last `HELDOUT` are held out.
        seed: Seed of the choice of prompts.

    Returns:
        The training rows, `PROMPTS_PER_CREATURE` for each creature, in random order; and the
        held-out rows, one for each creature.
    """
    rng = random.Random(seed)

    def rows_for(creature: Creature, count: int) -> list[Row]:
        prompts = rng.sample(DESCRIBE_PROMPTS, count)
        return [as_messages([(p.format(name=creature.name), creature.record())]) for p in prompts]

    seen, unseen = world[:-HELDOUT], world[-HELDOUT:]
    train = [row for creature in seen for row in rows_for(creature, PROMPTS_PER_CREATURE)]
    rng.shuffle(train)
    return train, [row for creature in unseen for row in rows_for(creature, 1)]


def write_jsonl(path: Path, rows: Iterable[Row]) -> None:
    """Writes rows as JSON lines in UTF-8."""
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def read_jsonl(path: Path) -> list[Row]:
    """Reads rows that `write_jsonl` wrote."""
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def write_data(folder: Path) -> None:
    """Writes ``corpus.jsonl``, ``train.jsonl`` and ``heldout.jsonl`` into a folder."""
    world = make_world()
    train, heldout = make_quickstart(world)
    folder.mkdir(parents=True, exist_ok=True)
    write_jsonl(folder / "corpus.jsonl", make_corpus(world))
    write_jsonl(folder / "train.jsonl", train)
    write_jsonl(folder / "heldout.jsonl", heldout)


# --- The untrained model ----------------------------------------------------------------


def write_tokenizer(folder: Path) -> None:
    """Trains the tokenizer on the corpus in a folder and saves it under ``model/``.

    All 256 bytes are in the vocabulary, so any text can be encoded. An answer ends with
    ``<|im_end|>``, which is the end-of-sequence token for that reason; padding has a token of
    its own, so that training never mistakes the end of an answer for padding.

    Args:
        folder: Where ``corpus.jsonl`` is.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    def texts() -> Iterator[str]:
        for row in read_jsonl(folder / "corpus.jsonl"):
            for message in row["messages"]:
                yield message["role"]
                yield message["content"]

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[PAD, END_OF_TEXT, TURN_START, TURN_END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(), trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=END_OF_TEXT,
        eos_token=TURN_END,
        extra_special_tokens=[TURN_START],
        chat_template=CHAT_TEMPLATE,
        model_max_length=MAX_POSITIONS,
        padding_side="right",
        clean_up_tokenization_spaces=False,
    ).save_pretrained(folder / "model")


def write_model(folder: Path, seed: int = SEED + 3) -> None:
    """Saves a Llama model with random weights under ``model/``, beside its tokenizer.

    Args:
        folder: Where ``model/`` is, with the tokenizer in it.
        seed: Seed of the weights.
    """
    import torch
    from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=MAX_POSITIONS,
        initializer_range=0.05,
        tie_word_embeddings=True,
        use_cache=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        dtype="float32",
    )
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=96,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model.save_pretrained(folder / "model")


def ship(folder: Path) -> None:
    """Copies the pre-trained model and the quickstart rows to where Forge keeps them.

    Args:
        folder: What ``all`` and the recipe wrote.
    """
    assets = Path(__file__).resolve().parent.parent / "forge_cli" / "assets"
    trained = folder / "runs" / "tiny-base" / "model"
    for path in sorted(trained.iterdir()):
        target = assets / "forge-tiny" / path.name
        shutil.copyfile(path, target)
    for name in ("train.jsonl", "heldout.jsonl"):
        shutil.copyfile(folder / name, assets / "quickstart" / name)


STEPS: dict[str, tuple[Callable[[Path], None], ...]] = {
    "data": (write_data,),
    "tokenizer": (write_tokenizer,),
    "model": (write_model,),
    "all": (write_data, write_tokenizer, write_model),
    "ship": (ship,),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        argv: Arguments after the program's name; those of the process by default.

    Returns:
        The exit status.
    """
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("step", choices=STEPS, help="what to write")
    parser.add_argument("folder", type=Path, help="where to write it")
    arguments = parser.parse_args(argv)
    for write in STEPS[arguments.step]:
        write(arguments.folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
