#!/usr/bin/env python3
"""Writes the bundled reviews: short invented opinions whose label follows from how the sentence is built.

    python scripts/make_reviews.py --out reft_cli/bundled/reviews     the four splits that ship with the package

Every row comes from a form, a sentence with slots. A slot that ends in + takes an opinion that agrees with the label,
one that ends in - takes the opposite, and every form is filled as often for one label as for the other:

    {A+} the acting is superb   {q+} superb, fitting the last {asp}     {thing+} a superb film      {V+} I loved it
    {W+} I found it superb      {Q+} superb, fitting the thing          {one+} a superb one         {f+} delighted
    {P+} my sister loved it     {g+} gripping, fit for "less ... than"  {part+} the superb acting

Training never sees: some forms of every family (half of `test`), some pairs of an opinion word and a family (the other
half, in forms that training has), and the opinion words of NEW (`hard`).
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

Label = Literal["positive", "negative"]
Pool = dict[str, dict[Label, list[str]]]
Row = dict[str, str]
LABELS: tuple[Label, Label] = ("positive", "negative")
SEED = 20
HELD_OUT_PAIRS = 0.25  # of the opinion words of each tag, in each family
FILLED_BEFORE, FILLED_AFTER = 0.25, 0.1  # share of the short rows that get a sentence without an opinion
SHORT = 10  # words


def words(positive: str, negative: str) -> dict[Label, list[str]]:
    """Two comma-separated lists as an entry of a pool."""
    return {"positive": positive.split(", "), "negative": negative.split(", ")}


# Opinion words by what they can describe; "any" goes with every thing and every aspect.
KNOWN: Pool = {
    "any": words(
        "good, great, wonderful, excellent, superb, impressive", "bad, poor, terrible, awful, dreadful, disappointing"
    ),
    "film": words(
        "gripping, moving, funny, clever, exciting, original", "dull, boring, predictable, silly, confusing, tedious"
    ),
    "acting": words("warm, convincing, natural, lively, charming", "wooden, stiff, clumsy, flat, lifeless"),
    "picture": words("lovely, elegant, stunning, striking", "ugly, sloppy, messy, careless"),
    "product": words("sturdy, solid, reliable, handy, practical", "flimsy, useless, fragile, ugly, shoddy"),
    "use": words("clear, simple, sensible, helpful", "confusing, clumsy, awkward, useless"),
    "help": words("friendly, helpful, polite, patient", "rude, slow, careless, unfriendly"),
    "restaurant": words("charming, cosy, friendly, lovely", "gloomy, dirty, noisy, shabby"),
    "food": words("tasty, delicious, fresh, lovely", "bland, greasy, tasteless, disgusting"),
    "room": words("cosy, clean, cheerful, pretty", "dirty, noisy, gloomy, shabby"),
    "feel": words("happy, pleased, delighted, impressed", "annoyed, disappointed, unhappy, upset"),
    "verb": words("loved, enjoyed, adored, liked", "hated, disliked, loathed, detested"),
}
NEW: Pool = {
    "any": words("fantastic, perfect, amazing, delightful, splendid", "horrible, nasty, dismal, lousy, appalling"),
    "film": words("thrilling, heartfelt, beautiful", "pointless, dreary, shallow"),
    "acting": words("graceful, brilliant", "unconvincing, hollow"),
    "picture": words("beautiful, brilliant", "crude, dreary"),
    "product": words("robust, durable", "worthless, faulty"),
    "use": words("easy, straightforward", "hopeless, baffling"),
    "help": words("kind, generous", "hostile, arrogant"),
    "restaurant": words("welcoming, snug", "filthy, dreary"),
    "food": words("juicy, mouthwatering", "stale, foul"),
    "room": words("comfortable, snug", "filthy, cramped"),
    "feel": words("thrilled, satisfied, glad", "furious, frustrated, angry"),
    "verb": words("admired, appreciated", "despised, resented"),
}


@dataclass(frozen=True)
class Domain:
    """What reviews of one kind speak about; a final ! marks a plural."""

    name: str
    past: bool
    things: list[str]
    aspects: dict[str, list[str]]
    """Tag of the words that fit -> nouns."""
    rivals: list[str]
    people: list[str]
    fillers: list[str]


DOMAINS = [
    Domain(
        name="film",
        past=False,
        things=["film", "movie", "drama", "comedy", "sequel"],
        aspects={
            "film": ["plot", "script", "story", "ending", "dialogue", "first half"],
            "acting": ["acting", "cast", "lead actor", "heroine"],
            "picture": ["camera work", "editing", "music", "costumes!"],
        },
        rivals=["the first film", "the old version", "his last film", "the other one"],
        people=["my brother", "my sister", "the critics!", "my friends!", "my father", "the man next to me"],
        fillers=[
            "I saw it on a Tuesday.", "We watched it at home.", "It runs for two hours.", "It is set in Lisbon.",
            "The cinema was half full.", "It came out last spring.", "I took my cousin along.", "A friend chose it.",
        ],
    ),
    Domain(
        name="product",
        past=False,
        things=["kettle", "lamp", "backpack", "tent", "camera", "toaster", "headset", "drill"],
        aspects={
            "product": ["design", "handle", "case", "stand", "strap"],
            "use": ["manual", "setup", "instructions!", "controls!"],
            "help": ["customer service", "support team", "man on the phone"],
        },
        rivals=["my old one", "the previous model", "the one at work", "the cheaper model"],
        people=["my neighbour", "my sister", "my husband", "my friends!", "my father", "my colleague"],
        fillers=[
            "I bought it in March.", "It came in a brown box.", "I use it at work.", "It was a gift from my aunt.",
            "I ordered the blue one.", "We bought it a month ago.", "I keep it in the hall.", "It arrived on a Friday.",
        ],
    ),
    Domain(
        name="restaurant",
        past=True,
        things=["restaurant", "café", "bistro", "diner", "pizzeria"],
        aspects={
            "food": ["soup", "fish", "pasta", "curry", "dessert", "chicken", "starters!"],
            "help": ["service", "waiter", "waitress", "owner"],
            "room": ["dining room", "terrace", "bar"],
        },
        rivals=["the place next door", "the old one", "the one across the road", "our usual place"],
        people=["my brother", "my wife", "the food critic", "my friends!", "my mother", "the couple beside us!"],
        fillers=[
            "We went on a Sunday.", "There were four of us.", "We sat near the window.", "It is next to the station.",
            "We had booked for eight.", "My cousin came along.", "It was raining outside.", "It opened last year.",
        ],
    ),
]  # fmt: skip

# Family -> (forms of training, forms held out for the test split).
FORMS: dict[str, tuple[list[str], list[str]]] = {
    "plain": (
        ["{A+}.", "{A+} and {A+}.", "{A+}, {A+}, and {W+}.", "This {be} {thing+}, and {A+}.", "{W+}: {A+}.",
         "{asp} {is} so {q+} that {V+}.", "{A+}. {W+}.", "{T} {be} {Q+}, and {A+}.",
         "In every way, {T} {be} {Q+}.", "I have rarely come across such {thing+}."],
        ["What {thing+}! {W+}.", "{V+} because {A+}.", "Everything about {T} {be} {Q+}."],
    ),
    "negation": (
        ["{asp} {is} not {q-} at all.", "I never found {asp} {q-}.", "{asp} {is} far from {q-}.",
         "There {be} {nothing-}.", "I would not call {asp} {q-}.", "{I} {was} never once {f-}.",
         "{T} {be} hardly {Q-}.", "Nobody could call {T} {Q-}.", "{asp} {is} anything but {q-}."],
        ["{asp} {is} not in the least {q-}.", "{T} {be} not what I would call {Q-}.",
         "{I} {was} not {f-} for one minute.", "I did not find {asp} {q-}."],
    ),
    "contrast": (
        ["{A-}, but {W+}.", "{A-} and {A-}, but {W+}.", "{A-}. Still, {W+}.", "{A-}, yet {W+}.",
         "{A-}, but {asp} {is} so {q+} that {V+}.", "At first {V-}, but in the end {V+}.", "{A-}. However, {W+}."],
        ["{A-}; even so, {W+}.", "{A-}, and yet {W+}.", "True, {A-}. But {W+}.", "{A-} and {A-}, and still {W+}."],
    ),
    "concession": (
        ["Although {A-}, {W+}.", "{W+}, although {A-}.", "Despite {part-}, {W+}.", "{W+} despite {part-}.",
         "Even though {A-}, {W+}.", "{W+}, even if {A-}."],
        ["{W+}, even though {A-}.", "While {A-}, {W+}.", "In spite of {part-}, {W+}.", "{W+} in spite of {part-}."],
    ),
    "expectation": (
        ["I expected {thing-} and got {one+}.", "I had been told that {T} would be {Q-}, but {W+}.",
         "What sounded like {thing-} turned out to be {one+}.", "I thought {T} would be {Q-}. Instead {W+}."],
        ["I was ready for {thing-}. What I got was {one+}.", "I was promised {thing-} but was given {one+}."],
    ),
    "comparison": (
        ["{R} was {Q-}; this one {be} {Q+}.", "Unlike {R}, which was {Q-}, this one {be} {Q+}.",
         "{T} {be} far less {g-} than {R}.", "This one {be} {Q+}, unlike {R}, which was {Q-}."],
        ["{T} {be} not nearly as {g-} as {R}.", "Compared with {R}, which was {Q-}, this one {be} {Q+}."],
    ),
    "others": (
        ["{P-}, but {W+}.", "{P-}. {W+}.", "{P-}; {W+}.", "{W+}, although {P-}."],
        ["{P-}. Not me: {W+}.", "{P-}, whereas {W+}."],
    ),
}  # fmt: skip
# Family -> share of the rows; the second row of figures is that of `test`, which has less that is plain.
SHARES = dict(zip(FORMS, (0.28, 0.21, 0.18, 0.13, 0.07, 0.07, 0.06), strict=True))
TEST_SHARES = dict(zip(FORMS, (0.14, 0.20, 0.24, 0.18, 0.08, 0.08, 0.08), strict=True))


class NoWord(Exception):
    """No opinion word fits a slot; another domain or aspect may have one."""


@dataclass
class Writer:
    """Fills the slots of one form for one label."""

    rng: random.Random
    domain: Domain
    label: Label
    pool: Pool
    allowed: set[str]
    used: list[str] = field(default_factory=list)
    """Opinion words and nouns that the text has."""
    tag: str = ""
    """Tag of the last aspect."""
    plural: bool = False
    named: bool = False
    """Whether the text has named the thing, so that `it` is clear."""

    def __post_init__(self) -> None:
        self.thing = self.rng.choice(self.domain.things)
        self.me = self.rng.choice(["I", "I", "we"])

    def write(self, form: str) -> str:
        """The form with its slots filled and its sentences capitalised."""
        text = re.sub(r"\{(\w+?)([+-]?)\}", lambda slot: self._fill(slot[1], slot[2]), form)
        return re.sub(r"(^|[.!?] )(\w)", lambda start: start[1] + start[2].upper(), text)

    def _fill(self, name: str, sign: str) -> str:
        method = getattr(self, f"_{name}")
        if not sign:
            return method()
        opposite = LABELS[self.label == "positive"]
        return method(self.label if sign == "+" else opposite)

    def _opinion(self, label: Label, *tags: str) -> str:
        fitting = {word for tag in tags for word in self.pool[tag][label]} & self.allowed - set(self.used)
        if not fitting:
            raise NoWord
        self.used.append(self.rng.choice(sorted(fitting)))
        return self.used[-1]

    def _noun(self, tags: list[str]) -> str:
        nouns = [(tag, noun) for tag in tags for noun in self.domain.aspects[tag] if noun.rstrip("!") not in self.used]
        self.tag, noun = self.rng.choice(nouns)
        self.plural = noun.endswith("!")
        self.used.append(noun.rstrip("!"))
        return self.used[-1]

    # Slots without an opinion
    def _asp(self) -> str:
        return "the " + self._noun(list(self.domain.aspects))

    def _is(self) -> str:
        return ("were" if self.plural else "was") if self.domain.past else ("are" if self.plural else "is")

    def _be(self) -> str:
        return "was" if self.domain.past else "is"

    def _T(self) -> str:
        self.named = True
        return f"{self.rng.choice(['the', 'this'])} {self.thing}"

    def _it(self) -> str:
        return "it" if self.named else self._T()

    def _I(self) -> str:
        return self.me

    def _was(self) -> str:
        return "were" if self.me == "we" else "was"

    def _R(self) -> str:
        return self.rng.choice(self.domain.rivals)

    # Slots with one
    def _q(self, label: Label) -> str:
        return self._opinion(label, "any", self.tag)

    def _Q(self, label: Label) -> str:
        return self._opinion(label, "any", self.domain.name)

    def _g(self, label: Label) -> str:
        return self._opinion(label, self.domain.name)

    def _f(self, label: Label) -> str:
        return self._opinion(label, "feel")

    def _A(self, label: Label) -> str:
        aspect = self._asp()
        return f"{aspect} {self._is()} {self.rng.choice(['', '', '', 'really ', 'truly '])}{self._q(label)}"

    def _part(self, label: Label) -> str:
        noun = self._noun(list(self.domain.aspects))
        return f"the {self._q(label)} {noun}"

    def _nothing(self, label: Label) -> str:
        aspect = self._asp()
        return f"nothing {self._q(label)} about {aspect}"

    def _thing(self, label: Label) -> str:
        self.named = True
        return with_article(f"{self._Q(label)} {self.thing}")

    def _one(self, label: Label) -> str:
        return with_article(f"{self._Q(label)} one")

    def _V(self, label: Label) -> str:
        return self._verdict(self.me, self._was(), label, kinds=("verb", "feel"))

    def _W(self, label: Label) -> str:
        return self._verdict(self.me, self._was(), label, kinds=("verb", "verb", "feel", "found", "thing"))

    def _P(self, label: Label) -> str:
        who = self.rng.choice(self.domain.people)
        was = "were" if who.endswith("!") else "was"
        return self._verdict(who.rstrip("!"), was, label, kinds=("verb", "feel", "found"))

    def _verdict(self, who: str, was: str, label: Label, *, kinds: tuple[str, ...]) -> str:
        kind = self.rng.choice(kinds)
        if kind == "verb":
            return f"{who} {self._opinion(label, 'verb')} {self._it()}"
        if kind == "feel":
            return f"{who} {was} {self._f(label)}"
        if kind == "found":
            return f"{who} found {self._it()} {self._Q(label)}"
        return f"{self._it()} {self._be()} {self._Q(label)}"


def with_article(noun_phrase: str) -> str:
    """The phrase with `a` or `an` before it, by its sound."""
    vowel = noun_phrase[0] in "aeiou" and not noun_phrase.startswith("useless")
    return ("an " if vowel else "a ") + noun_phrase


def vocabulary(pool: Pool) -> set[str]:
    """Every opinion word of a pool."""
    return {word for by_label in pool.values() for group in by_label.values() for word in group}


def held_out_words(rng: random.Random) -> dict[str, set[str]]:
    """Family -> the opinion words that training does not use in it; plain statements keep all of theirs."""
    held: dict[str, set[str]] = {}
    for family in FORMS:
        groups = [group for by_label in KNOWN.values() for group in by_label.values()]
        held[family] = {
            word for group in groups for word in rng.sample(group, max(1, round(HELD_OUT_PAIRS * len(group))))
        }
    return held | {"plain": set()}


@dataclass
class Split:
    """Where the rows of one split may come from."""

    size: int
    shares: dict[str, float]
    unseen_forms: bool = False
    pool: Pool = field(default_factory=lambda: KNOWN)
    allowed: Callable[[str], set[str]] = lambda family: vocabulary(KNOWN)

    def forms(self, family: str) -> list[tuple[str, str]]:
        """(name, form) of all forms of a family that this split uses."""
        trained, unseen = FORMS[family]
        first = 1 + len(trained) * self.unseen_forms
        return [(f"{family}-{i}", form) for i, form in enumerate(unseen if self.unseen_forms else trained, first)]

    def counts(self) -> dict[str, int]:
        """Rows of each family: even, in proportion to the shares, and `size` in all."""
        total = sum(self.shares.values())
        counts = {family: 2 * int(self.size * share / total / 2) for family, share in self.shares.items()}
        for family in list(counts)[: (self.size - sum(counts.values())) // 2]:
            counts[family] += 2
        return counts


def write_row(rng: random.Random, *, form: str, label: Label, pool: Pool, allowed: set[str]) -> tuple[str, str]:
    """(text, domain) of one row."""
    while True:
        domain = rng.choice(DOMAINS)
        try:
            text = Writer(rng, domain, label, pool, allowed).write(form)
        except NoWord:
            continue
        if len(text.split()) <= SHORT:
            before, after = rng.sample(domain.fillers, 2)
            text = f"{before} {text}" if rng.random() < FILLED_BEFORE else text
            text = f"{text} {after}" if rng.random() < FILLED_AFTER else text
        return text, domain.name


def write_split(rng: random.Random, split: Split, *, seen: set[str]) -> list[Row]:
    """The rows of a split in random order; each form has as many rows of one label as of the other."""
    rows = []
    for family, count in split.counts().items():
        forms = split.forms(family)
        for number in range(count):
            name, form = forms[number // 2 % len(forms)]
            label = LABELS[number % 2]
            for _ in range(10_000):
                text, domain = write_row(rng, form=form, label=label, pool=split.pool, allowed=split.allowed(family))
                if text not in seen:
                    break
            assert text not in seen, f"{name} has no more rows to give"
            seen.add(text)
            rows.append({"text": text, "label": label, "domain": domain, "family": family, "form": name})
    rng.shuffle(rows)
    return rows


def make_reviews(seed: int = SEED) -> dict[str, list[Row]]:
    """All splits; no text is in two of them, or twice in one."""
    rng = random.Random(seed)
    held, known, new = held_out_words(rng), vocabulary(KNOWN), vocabulary(NEW)
    assert not known & new, known & new
    combined = {family: share for family, share in TEST_SHARES.items() if held[family]}
    plan = {
        "train": [Split(1200, SHARES, allowed=lambda family: known - held[family])],
        "validation": [Split(200, SHARES, allowed=lambda family: known - held[family])],
        "test": [Split(200, TEST_SHARES, unseen_forms=True), Split(200, combined, allowed=lambda family: held[family])],
        "hard": [Split(200, SHARES, pool=NEW, allowed=lambda family: new)],
    }
    seen: set[str] = set()
    reviews = {
        name: [row for split in splits for row in write_split(rng, split, seen=seen)] for name, splits in plan.items()
    }
    rng.shuffle(reviews["test"])
    return reviews


def main() -> None:
    """Write one .jsonl file a split."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the .jsonl files")
    parser.add_argument(
        "--seed", type=int, default=SEED, help="of all random choices; %(default)s made the bundled files"
    )
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for name, rows in make_reviews(args.seed).items():
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (args.out / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
