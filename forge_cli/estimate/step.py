"""Replays one training step of a setting, and finds its highest point."""

from __future__ import annotations

from forge_cli.estimate.decoder import Layer
from forge_cli.estimate.ledger import Ledger
from forge_cli.estimate.losses import fused_loss, plain_loss, score_loss
from forge_cli.estimate.operations import Formats, Operations
from forge_cli.estimate.setting import Adapters, Setting
from forge_cli.estimate.shared import (
    Reading,
    count_layer_pattern,
    embed,
    make_embedding_adapter,
    make_positions,
    make_readings,
)
from forge_cli.estimate.tape import Tape, Tensor
from forge_cli.facts.weights import layer_prefix

GRANULE_BYTES = 512
# The lowest and the highest layer are special; in between, what is alive changes by the same amount per layer, or per
# pattern of layers with and without a window.
_SHALLOW = 2
_LOSSES = {"fused": fused_loss, "plain": plain_loss, "score": score_loss}
# What is no instant of its own belongs to the one beside it.
_BELONGS = {"backward final norm": "backward loss", "backward embedding": "end of backward", "": "forward"}

Peaks = dict[str, tuple[int, dict[str, int]]]


def replay_step(setting: Setting) -> Peaks:
    """Replays a step of any depth: shallow ones are run, and every instant is carried on layer by layer.

    Returns:
        Instant to bytes and bytes by part, weights and optimizer not included.

    Units: bytes. Source: the replay; every instant is linear in the number of layers once there are three.
    """
    trained = setting.facts.num_hidden_layers - setting.num_frozen_layers
    frozen = min(setting.num_frozen_layers, 1)
    period = count_layer_pattern(setting)
    # A whole pattern has to lie between the lowest two layers and the highest two.
    few = _SHALLOW if period == 1 else 4 + period + (trained - 4) % period
    if trained <= few + period or not _has_equal_layers(setting):
        return merge_layers(run_layers(setting, frozen, trained))
    shallow, deep = run_layers(setting, frozen, few), run_layers(setting, frozen, few + period)
    if few == _SHALLOW and "backward layer/1" in deep:
        _guess_neighbours(shallow, deep)
    times = (trained - few) // period
    return merge_layers({name: _carry_on(shallow[name], deep[name], times) for name in deep})


def _has_equal_layers(setting: Setting) -> bool:
    """Whether the same is trained in every layer that autograd sees."""
    if setting.adapters and any(part.isdigit() for name in setting.adapters.targets for part in name.split(".")):
        return False
    facts, frozen_in = setting.facts, {}
    prefix = layer_prefix(facts, 0).removesuffix("0")
    for name in setting.frozen:
        if name.startswith(prefix):
            number, _, rest = name.removeprefix(prefix).partition(".")
            frozen_in.setdefault(rest, set()).add(int(number))
    layers = set(range(setting.num_frozen_layers, facts.num_hidden_layers))
    return all(layers <= one or layers.isdisjoint(one) for one in frozen_in.values())


def _guess_neighbours(shallow: Peaks, deep: Peaks) -> None:
    """Two layers have none between them: what the middle one of three would be there follows from its neighbours.

    A further layer adds to the lowest layer's instant what it adds to that of the one above, and likewise from the top.
    """
    middle = deep.pop("backward layer/1")
    for name, beside in (("1", "0"), ("-2", "-1")):
        beside = f"backward layer/{beside}"
        deep[f"backward layer/{name}"] = middle
        parts = {
            part: middle[1].get(part, 0) - deep[beside][1].get(part, 0) + shallow[beside][1].get(part, 0)
            for part in {**middle[1], **deep[beside][1]}
        }
        shallow[f"backward layer/{name}"] = sum(parts.values()), parts


def _carry_on(shallow: tuple[int, dict[str, int]], deep: tuple[int, dict[str, int]], times: int):
    parts = {}
    for part in {**shallow[1], **deep[1]}:
        low, high = shallow[1].get(part, 0), deep[1].get(part, 0)
        parts[part] = low + (high - low) * times
    return sum(parts.values()), parts


def merge_layers(peaks: Peaks) -> Peaks:
    """Joins the instants of single layers.

    Units: bytes. Source: the highest of the instants of one name.
    """
    merged: Peaks = {}
    for name, found in peaks.items():
        label = name.split("/")[0]
        label = _BELONGS.get(label, label)
        if label not in merged or found[0] > merged[label][0]:
            merged[label] = found
    return merged


def run_layers(setting: Setting, num_frozen: int, num_trained: int) -> Peaks:
    """Replays forward and backward pass with so many layers.

    Returns:
        Phase to its highest point. The backward pass of a layer is named by its place: the first two and the last
        two of the trained layers, and all others together.

    Units: bytes. Source: transformers' model code in sizes, run by autograd's rules (``tape``).
    """
    ledger = Ledger(GRANULE_BYTES if setting.cuda else 1)
    tape = Tape(ledger, has_gradients=setting.accumulation_steps > 1)
    ops = Operations(tape, Formats(setting.compute_bytes, setting.autocast, setting.cuda))
    model = _Model(ops, setting, num_frozen, num_trained)
    loss = model.forward()
    ops.drop_casts()
    if setting.reference_forward:
        ledger.enter("reference")
        with tape.no_grad():
            model.forward(phase="reference")
    if loss.node:
        tape.backward(loss)
    ledger.enter("end of backward")
    return ledger.peaks


class _Model:
    def __init__(self, ops: Operations, setting: Setting, num_frozen: int, num_trained: int) -> None:
        self.ops, self.setting = ops, (setting := setting.as_the_model_sees_it())
        facts, tape = setting.facts, ops.tape
        numel, whole = facts.vocab_size * facts.hidden_size, setting.adapters is None

        def table(trains: bool) -> Tensor:
            return tape.leaf(numel, setting.trained_bytes if whole or trains else setting.weight_bytes, trains)

        adapted = not whole and setting.adapters.embeddings
        table_trains = setting.embeddings_train and not adapted
        self.head = self.embedding = table(table_trains)
        # PEFT trains copies of embeddings and head, which are then tied no more.
        if not facts.tie_word_embeddings or (not whole and (table_trains or setting.head_trains)):
            self.head = table(setting.head_trains)
        tape.tied = self.head if self.head is self.embedding and table_trains else None
        self.embedding_adapter = make_embedding_adapter(ops, setting) if adapted else None
        if setting.loss == "score":
            tape.tied = None
            self.head = tape.leaf(facts.hidden_size, setting.trained_bytes, True)
        # Input ids, labels and mask, 8 bytes each, of all micro batches; accelerate fetches one more for a GPU.
        self.inputs = [ops.new(self.num_tokens, 8) for _ in range(3 * (setting.accumulation_steps + setting.cuda))]
        self.layers = [
            # Windows come in a pattern, so every layer has the place that it has in the whole model.
            Layer(ops, setting, setting.num_frozen_layers - num_frozen + index, frozen=index < num_frozen)
            for index in range(num_frozen + num_trained)
        ]
        self.positions = make_positions(ops, setting)
        self.num_frozen = num_frozen

    @property
    def num_tokens(self) -> int:
        return self.setting.num_sequences * self.setting.sequence_length

    def forward(self, phase: str = "") -> Tensor:
        """Runs embeddings, layers and loss; a phase of its own name holds all of it."""
        tape, setting = self.ops.tape, self.setting
        tape.ledger.part = "activations"
        tape.ledger.enter(phase or "forward")
        hidden_states, inputs_embeds = self._embed()
        readings = make_readings(self.ops, setting, hidden_states.itemsize)
        count = len(self.layers)
        for index, layer in enumerate(self.layers):
            tape.phase = f"layer/{_name_place(index - self.num_frozen, count - self.num_frozen)}"
            if index < self.num_frozen:
                with tape.no_grad():
                    hidden_states = layer(hidden_states, readings[layer.has_window])
            elif setting.activation_checkpointing:
                hidden_states = tape.checkpoint(self._rerunnable(layer, readings[layer.has_window]), hidden_states)
            else:
                hidden_states = layer(hidden_states, readings[layer.has_window])
        tape.phase = "final norm"
        hidden_states = self.layers[-1].norm("final", hidden_states)
        del inputs_embeds, readings
        tape.phase, tape.ledger.part = "loss", "loss"
        tape.ledger.enter(phase or "loss")
        return _LOSSES[setting.loss](self.ops, setting, hidden_states, self.head)

    def _embed(self) -> tuple[Tensor, tuple[Tensor, ...]]:
        self.ops.tape.phase = "embedding"
        # transformers asks for the gradient of the embeddings' output whenever layers are checkpointed.
        asks_gradient = self.setting.activation_checkpointing and not self.num_frozen
        tables = (self.embedding, self.positions, self.embedding_adapter)
        return embed(self.ops, self.setting, *tables, asks_gradient=asks_gradient)

    def _rerunnable(self, layer: Layer, reading: Reading):
        def run(x: Tensor) -> Tensor:
            try:
                return layer(x, reading)
            finally:
                if self.ops.tape.replaying:
                    self.ops.drop_casts()

        return run


def _name_place(index: int, count: int) -> str:
    """Names a layer by its place: the first two, the last two, or the middle."""
    if index < 0:
        return "frozen"
    if index == 0 or index == count - 1:
        return "0" if index == 0 else "-1"
    if index == 1 or index == count - 2:
        return "1" if index == 1 else "-2"
    return "middle"


def replay_evaluation(setting: Setting) -> dict[str, int]:
    """Replays one evaluation step: a forward pass without autograd, whose layers come one after the other.

    Units: bytes by part. Source: the replay of one layer and the loss.
    """
    smaller = setting._replace(batch_size=setting.eval_batch_size, accumulation_steps=1, adapters=_quiet(setting))
    # Training's batch may have been of one row, which nothing pads.
    padded = smaller.num_sequences > 1 and not setting.packed and setting.attention != "flash"
    smaller = smaller._replace(padded=padded)
    ledger = Ledger(GRANULE_BYTES if setting.cuda else 1)
    tape = Tape(ledger)
    tape.grad_enabled = False
    ops = Operations(tape, Formats(setting.compute_bytes, setting.autocast, setting.cuda))
    _Model(ops, smaller, 0, min(2, setting.facts.num_hidden_layers)).forward()
    return max(ledger.peaks.values(), key=lambda one: one[0])[1]


def _quiet(setting: Setting) -> Adapters | None:
    """Adapters without dropout, as in evaluation."""
    return setting.adapters._replace(dropout=0.0) if setting.adapters else None
