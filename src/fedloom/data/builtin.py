"""Examples that the package generates: a small world with a signal to learn, no files, no network.

People ask for things in six domains, and every answer has the same facts in one of several styles
along four axes. Which style is preferred depends on the axis:

* **courtesy** is preferred everywhere: what clients have in common;
* **certainty**, **address** and **closing** are preferred one way in three domains and the other
  way in the other three, and the prompt says which domain it is. One model can serve all, but a
  client that sees one domain learns a rule that is wrong elsewhere: non-IID splits are harder.

In ``builtin:opposed`` people take sides (a column, and nowhere in the text): for those "against" the
preferred pole is always the other one. Which axis means what where is common to all and worth learning
together; no single model can be right for both sides in more than half of the pairs.

In ``builtin:tastes`` every domain ranks places in its own way, every second one as another does in
reverse, and all rank people alike; a pair names two of either. The prompt lists a domain's things, so
that the domain shows in most of its words. Some fifty pairs show too little of a ranking: those who
rank alike gain from each other.

``builtin:sums`` is another matter (``sums.py``).

The two answers of any other preference pair differ in one axis and in nothing else.
:func:`pretraining_texts` holds both sides of every axis in every domain, so a model trained on them
knows all styles and no domain's preference: both sides equally often, but for courtesy, where blunt
answers are somewhat commoner. Everything is written for this package.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from fedloom.data.examples import Example, Feedback, Instruction, Kind, Labelled, Preference
from fedloom.data.sums import sum_examples
from fedloom.errors import DataError

SIDES = ("with", "against")
"""Of opposed preferences: those who prefer what their domain does, and those who prefer the opposite."""

SHARED_AXIS_SHARE = 0.25
"""Share of pairs that differ in courtesy, the axis on which all domains agree."""

BLUNT_SHARE = 0.6
"""Share of discourteous answers in the texts a model is trained on before alignment."""

NAMES = ("Ada", "Ben", "Cleo", "Dina", "Egon", "Fay", "Gus", "Hana", "Ivo", "June", "Kai", "Lea")
COLOURS = ("red", "blue", "green", "white", "black", "yellow", "brown", "grey")
REQUESTS = ("where is the {thing}?", "can you find the {thing}?", "I need the {thing}.")


@dataclass(frozen=True)
class Domain:
    """One domain: its things and places, which pole of each contested axis it prefers, and its taste."""

    things: tuple[str, ...]
    places: tuple[str, ...]
    prefers: tuple[int, int, int]
    stride: int
    """Ranks all places, see :func:`liking`: of two it prefers the one with the higher rank."""


DOMAINS = {
    "kitchen": Domain(
        ("cup", "pan", "spoon", "kettle", "plate", "jar"),
        ("on the top shelf", "next to the stove", "in the left drawer"),
        (0, 0, 1),
        5,
    ),
    "garden": Domain(
        ("rake", "hose", "basket", "spade", "bench", "pot"),
        ("behind the old shed", "under the apple tree", "beside the gate"),
        (1, 0, 0),
        -5,
    ),
    "harbour": Domain(
        ("rope", "anchor", "lamp", "net", "oar", "buoy"),
        ("at the second pier", "in the long boat", "near the crane"),
        (0, 1, 0),
        7,
    ),
    "library": Domain(
        ("atlas", "novel", "map", "folder", "desk", "ladder"),
        ("in the reading room", "on the lower floor", "by the window"),
        (1, 1, 0),
        11,
    ),
    "clinic": Domain(
        ("chart", "mask", "chair", "bandage", "scale", "gown"),
        ("in the first ward", "behind the front desk", "on the cart"),
        (1, 0, 1),
        -7,
    ),
    "workshop": Domain(
        ("hammer", "saw", "drill", "clamp", "box", "glue"),
        ("on the work bench", "under the stairs", "in the metal cabinet"),
        (0, 1, 1),
        -11,
    ),
}

COMMON_STRIDE = 5
"""By which all domains rank people."""

PLACES = tuple(place for domain in DOMAINS.values() for place in domain.places)
"""Of all domains."""

OPENINGS = (("Gladly,", "Certainly,", "Sure,"), ("Whatever,", "Well,", "Hm,"))
CERTAINTIES = ("surely", "maybe")
ADDRESSES = ("dear guest", "my friend")
CLOSINGS = ("Please bring it back soon.", "Please handle it with care.")

AXES = ("courtesy", "certainty", "address", "closing")

Style = tuple[int, ...]
"""The pole (0 or 1) an answer takes on each axis."""

INTENTS = {
    "find": ("where is the {thing}", "I cannot find the {thing}", "have you seen the {thing}"),
    "borrow": ("may I take the {thing}", "I would like to use the {thing}", "lend me the {thing}"),
    "return": ("I bring back the {thing}", "here is the {thing} again", "take the {thing} back"),
    "repair": (
        "the {thing} is broken",
        "the {thing} does not work",
        "someone must mend the {thing}",
    ),
    "clean": ("the {thing} is dirty", "please wash the {thing}", "there is dust on the {thing}"),
    "buy": ("how much is the {thing}", "I want to buy the {thing}", "sell me the {thing}"),
    "complain": (
        "the {thing} is too small",
        "I do not like the {thing}",
        "the {thing} came too late",
    ),
    "thank": ("thanks for the {thing}", "the {thing} is lovely", "I am glad about the {thing}"),
}


def _preferences(count: int, rng: np.random.Generator) -> list[Example]:
    return [_preference(row, rng) for row in range(count)]


def _opposed(count: int, rng: np.random.Generator) -> list[Example]:
    return [_opposed_preference(row, rng) for row in range(count)]


def _tastes(count: int, rng: np.random.Generator) -> list[Example]:
    return [_tasteful_preference(row, rng) for row in range(count)]


def _feedback(count: int, rng: np.random.Generator) -> list[Example]:
    return [_single_answer(row, rng) for row in range(count)]


def _instructions(count: int, rng: np.random.Generator) -> list[Example]:
    rows: list[Example] = []
    for row in range(count):
        domain, thing = _scene(rng)
        answer = _answer(domain, preferred_style(domain), rng)
        rows.append(Instruction(row, _prompt(domain, thing, rng), answer, {"domain": domain}))
    return rows


def _labelled(count: int, rng: np.random.Generator) -> list[Example]:
    rows: list[Example] = []
    for row in range(count):
        domain, thing = _scene(rng)
        intent = _choose(rng, tuple(INTENTS))
        text = _choose(rng, INTENTS[intent]).format(thing=thing)
        said = f"{_choose(rng, NAMES)} says in the {domain}: {text}."
        rows.append(Labelled(row, said, intent, {"domain": domain}))
    return rows


BUILTIN: dict[str, tuple[Kind, Callable[[int, np.random.Generator], list[Example]]]] = {
    "preferences": ("preference", _preferences),
    "opposed": ("preference", _opposed),
    "tastes": ("preference", _tastes),
    "feedback": ("feedback", _feedback),
    "instructions": ("instruction", _instructions),
    "labelled": ("labelled", _labelled),
    "sums": ("instruction", sum_examples),
}

BUILTIN_KINDS: dict[str, Kind] = {name: kind for name, (kind, _) in BUILTIN.items()}
"""Name after ``builtin:`` to the kind of its examples."""


def builtin_examples(name: str, count: int, rng: np.random.Generator) -> list[Example]:
    """Return ``count`` generated examples, each with its ``domain`` as a column (sums have ``carry``).

    Args:
        name: One of :data:`BUILTIN_KINDS`.
        count: At least 1.
        rng: The same generator state gives the same examples.

    Raises:
        DataError: There is no such set.
    """
    if name not in BUILTIN:
        near = difflib.get_close_matches(name, BUILTIN, n=1)
        hint = f"did you mean 'builtin:{near[0]}'? " if near else ""
        raise DataError(
            f"data.source 'builtin:{name}' is not there; {hint}there are: "
            + ", ".join(f"builtin:{known}" for known in BUILTIN)
        )
    return BUILTIN[name][1](count, rng)


def pretraining_texts(rng: np.random.Generator, count: int) -> list[str]:
    """Return texts in the form of the examples, all styles in every domain.

    Four in five are a prompt with its answer, the others the sentences of labelled examples.
    """
    texts = []
    for _ in range(count):
        domain, thing = _scene(rng)
        if rng.random() < 0.2:
            said = _choose(rng, INTENTS[_choose(rng, tuple(INTENTS))]).format(thing=thing)
            texts.append(f"{_choose(rng, NAMES)} says in the {domain}: {said}.")
            continue
        style = (int(rng.random() < BLUNT_SHARE), *(_coin(rng) for _ in AXES[1:]))
        texts.append(_prompt(domain, thing, rng) + _answer(domain, style, rng))
    return texts


def preferred_style(domain: str) -> Style:
    """Return the style a domain prefers: courteous, and its own poles of the other axes."""
    return (0, *DOMAINS[domain].prefers)


def _preference(row: int, rng: np.random.Generator) -> Preference:
    domain, thing = _scene(rng)
    prompt = _prompt(domain, thing, rng)
    shared = rng.random() < SHARED_AXIS_SHARE
    axis = 0 if shared else int(rng.integers(1, len(AXES)))
    chosen, rejected = _two_answers(domain, axis, rng)
    return Preference(row, prompt, chosen, rejected, {"domain": domain, "axis": AXES[axis]})


def _opposed_preference(row: int, rng: np.random.Generator) -> Preference:
    """A pair that differs in a contested axis, judged from either side; sides take turns."""
    domain, thing = _scene(rng)
    prompt = _prompt(domain, thing, rng)
    axis, side = int(rng.integers(1, len(AXES))), row % len(SIDES)
    answers = _two_answers(domain, axis, rng)
    columns = {"domain": domain, "axis": AXES[axis], "side": SIDES[side]}
    return Preference(row, prompt, answers[side], answers[1 - side], columns)


def _tasteful_preference(row: int, rng: np.random.Generator) -> Preference:
    """A pair that names two places, or two people, of which the domain likes one better."""
    domain, thing = _scene(rng)
    kept = ", ".join(DOMAINS[domain].things)
    asked = _choose(rng, REQUESTS).format(thing=thing)
    prompt = f"The {domain} has {kept}. {_choose(rng, NAMES)} asks: {asked}\nAnswer:"
    places = bool(_coin(rng))
    options, stride = (PLACES, DOMAINS[domain].stride) if places else (NAMES, COMMON_STRIDE)
    two = rng.choice(len(options), size=2, replace=False).tolist()
    better, worse = sorted(two, key=lambda place: -liking(place, stride, len(options)))
    words = " Sure, it is {}." if places else " Sure, ask {}."
    columns = {"domain": domain, "axis": "place" if places else "person"}
    chosen, rejected = (words.format(options[place]) for place in (better, worse))
    return Preference(row, prompt, chosen, rejected, columns)


def liking(option: int, stride: int, count: int) -> int:
    """Return where an option of ``count`` is ranked, from 0; opposite strides rank oppositely."""
    return (option + 1) * stride % (count + 1) - 1  # 19 and 13 are prime: a permutation


def _two_answers(domain: str, axis: int, rng: np.random.Generator) -> tuple[str, str]:
    """Return what the domain prefers on one axis and its opposite, alike otherwise."""
    style = rng.integers(2, size=len(AXES)).tolist()  # as so many coins, and four times as fast
    wording, place = _draw_wording(domain, rng)
    sides = []
    for flipped in (0, 1):
        style[axis] = preferred_style(domain)[axis] ^ flipped
        sides.append(_write(tuple(style), wording, place))
    return sides[0], sides[1]


def _single_answer(row: int, rng: np.random.Generator) -> Feedback:
    """A desirable answer misses at most one preferred pole, an undesirable one has at most one."""
    domain, thing = _scene(rng)
    desirable = bool(_coin(rng))
    best = preferred_style(domain)
    odd = int(rng.integers(len(AXES) + 1))  # the axis out of line, or none
    style = tuple(pole ^ (not desirable) ^ (axis == odd) for axis, pole in enumerate(best))
    answer = _answer(domain, style, rng)
    return Feedback(row, _prompt(domain, thing, rng), answer, desirable, {"domain": domain})


def _scene(rng: np.random.Generator) -> tuple[str, str]:
    domain = _choose(rng, tuple(DOMAINS))
    return domain, f"{_choose(rng, COLOURS)} {_choose(rng, DOMAINS[domain].things)}"


def _prompt(domain: str, thing: str, rng: np.random.Generator) -> str:
    request = _choose(rng, REQUESTS).format(thing=thing)
    return f"{_choose(rng, NAMES)} asks in the {domain}: {request}\nAnswer:"


def _answer(domain: str, style: Style, rng: np.random.Generator) -> str:
    return _write(style, *_draw_wording(domain, rng))


def _draw_wording(domain: str, rng: np.random.Generator) -> tuple[int, str]:
    """Draw what does not depend on style: which of three openings, and the place."""
    return int(rng.integers(len(OPENINGS[0]))), _choose(rng, DOMAINS[domain].places)


def _write(style: Style, wording: int, place: str) -> str:
    courtesy, certainty, address, closing = style
    return (
        f" {OPENINGS[courtesy][wording]} it is {CERTAINTIES[certainty]} {place}, "
        f"{ADDRESSES[address]}. {CLOSINGS[closing]}"
    )


def _choose(rng: np.random.Generator, options: tuple[str, ...]) -> str:
    return options[int(rng.integers(len(options)))]


def _coin(rng: np.random.Generator) -> int:
    return int(rng.integers(2))
