#!/usr/bin/env python3
"""Writes the bundled reviews: short invented opinions whose label follows from how a sentence is built.

    python scripts/make_reviews.py --out reft_cli/bundled/reviews     the four splits that ship with the package

Every row comes from a form, a sentence with slots. A slot ending in + is filled with an opinion that agrees with the
label, one ending in - with its opposite, so no form and no opinion word gives the label away by itself:

    {A+} the acting is superb   {q+} superb, fitting the last {asp}   {P+} my sister loved it     {thing+} a superb film
    {W+} I loved it             {Q+} superb, fitting the thing        {f+} delighted              {part+} the superb acting

Held out of training, in this order: some forms of each family (`test`), some pairs of an opinion word and a family
(`test`, in forms that training has), and some opinion words altogether (`hard`).
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

Label = Literal["positive", "negative"]
Pool = dict[str, dict[Label, list[str]]]
LABELS: tuple[Label, Label] = ("positive", "negative")
SEED = 20
HELD_OUT_PAIRS = 0.25  # of the pairs of an opinion word and a family
FILLERS_BEFORE, FILLERS_AFTER = 0.2, 0.1  # share of rows with a sentence that has no opinion


def words(positive: str, negative: str) -> dict[Label, list[str]]:
    """Two comma-separated lists as a pool entry."""
    return {"positive": positive.split(", "), "negative": negative.split(", ")}


# Opinion words by what they can describe; "any" goes with every thing and every aspect.
KNOWN: Pool = {
    "any": words("good, great, wonderful, excellent, superb, impressive", "bad, poor, terrible, awful, dreadful, disappointing"),
    "film": words("gripping, moving, funny, clever, exciting, original", "dull, boring, predictable, silly, confusing, tedious"),
    "acting": words("warm, convincing, natural, lively, charming", "wooden, stiff, clumsy, flat, lifeless"),
    "picture": words("lovely, elegant, stunning, striking", "ugly, sloppy, cheap, careless"),
    "product": words("sturdy, solid, reliable, handy, practical", "flimsy, useless, fragile, ugly, shoddy"),
    "use": words("clear, simple, sensible, helpful", "confusing, clumsy, awkward, useless"),
    "help": words("friendly, helpful, polite, patient", "rude, slow, careless, unfriendly"),
    "restaurant": words("charming, cosy, friendly, lovely", "gloomy, dirty, noisy, shabby"),
    "food": words("tasty, delicious, fresh, lovely", "bland, greasy, tasteless, disgusting"),
    "room": words("cosy, clean, cheerful, pretty", "dirty, noisy, gloomy, shabby"),
    "feel": words("happy, pleased, delighted, impressed", "annoyed, disappointed, unhappy, upset"),
    "verb": words("loved, enjoyed, adored, liked", "hated, disliked, loathed, detested"),
}  # fmt: skip
NEW: Pool = {
    "any": words("fantastic, perfect, amazing, delightful, splendid", "horrible, nasty, hideous, miserable, lousy"),
    "film": words("thrilling, heartfelt, beautiful", "pointless, dreary, shallow"),
    "acting": words("graceful, brilliant", "unconvincing, hollow"),
    "picture": words("beautiful, brilliant", "crude, dreary"),
    "product": words("robust, durable", "worthless, faulty"),
    "use": words("easy, neat", "hopeless, tiresome"),
    "help": words("kind, generous", "hostile, arrogant"),
    "restaurant": words("welcoming, snug", "filthy, dreary"),
    "food": words("juicy, mouthwatering", "stale, foul"),
    "room": words("comfortable, snug", "filthy, cramped"),
    "feel": words("thrilled, satisfied, glad", "furious, frustrated, angry"),
    "verb": words("admired, treasured", "despised, resented"),
}


@dataclass(frozen=True)
class Domain:
    """What reviews of one kind speak about."""

    name: str
    past: bool
    things: list[str]
    aspects: dict[str, list[str]]  # tag of KNOWN and NEW -> nouns; a ! marks a plural
    rivals: list[str]
    people: list[str]  # a ! marks a plural
    fillers: list[str]


DOMAINS = [
    Domain(
        "film",
        False,
        ["film", "movie", "drama", "comedy", "sequel"],
        {"film": ["plot", "script", "story", "ending", "dialogue", "first half"],
         "acting": ["acting", "cast!", "lead actor", "villain"],
         "picture": ["camera work", "editing", "music", "costumes!"]},
        ["the first film", "the old version", "his last film", "the other one"],
        ["my brother", "my sister", "the critics!", "my friends!", "my father", "the man next to me"],
        ["I saw it on a Tuesday night.", "We watched it at home.", "It runs for two hours.", "It is set in Lisbon.",
         "The cinema was half full.", "It came out last spring.", "I watched it with my cousin.", "It is based on a novel."],
    ),
    Domain(
        "product",
        False,
        ["kettle", "lamp", "backpack", "tent", "camera", "toaster", "headset", "drill"],
        {"product": ["design", "handle", "case", "stand", "strap"],
         "use": ["manual", "setup", "instructions!", "controls!"],
         "help": ["customer service", "support team", "man on the phone"]},
        ["my old one", "the previous model", "the one at work", "the cheaper model"],
        ["my neighbour", "my sister", "my husband", "my friends!", "my father", "my colleague"],
        ["I bought it in March.", "It came in a brown box.", "I use it at work.", "It was a gift from my aunt.",
         "I ordered the blue one.", "We have had it for a month.", "I keep it in the kitchen.", "It arrived on a Friday."],
    ),
    Domain(
        "restaurant",
        True,
        ["restaurant", "café", "bistro", "diner", "pizzeria"],
        {"food": ["soup", "fish", "pasta", "curry", "dessert", "chicken", "starters!"],
         "help": ["service", "waiter", "waitress", "owner"],
         "room": ["dining room", "terrace", "bar"]},
        ["the place next door", "the old one", "the one across the road", "our usual place"],
        ["my brother", "my wife", "the food critic", "my friends!", "my mother", "the couple beside us!"],
        ["We went on a Sunday.", "There were four of us.", "We sat near the window.", "It is next to the station.",
         "We had booked a table for eight.", "I ordered the fish.", "It was raining outside.", "It opened last year."],
    ),
]  # fmt: skip

# Family -> (forms of training, forms held out for the test split).
FORMS: dict[str, tuple[list[str], list[str]]] = {
    "plain": (
        ["{A+}.", "{A+} and {A+}.", "{A+}, {A+}, and {W+}.", "This {be} {thing+}, and {A+}.", "{W+}: {A+}.",
         "{asp} {is} so {q+} that {V+}.", "{A+}. {W+}.", "{T} {be} {Q+}, and {A+}.", "From start to finish, {T} {be} {Q+}.",
         "I have rarely come across such {thing+}."],
        ["What {thing+}! {W+}.", "{V+} because {A+}.", "Everything about {T} {be} {Q+}."],
    ),
    "negation": (
        ["{asp} {is} not {q-} at all.", "{asp} {is} never {q-}.", "{asp} {is} far from {q-}.", "There {be} {nothing-}.",
         "I would not call {asp} {q-}.", "{I} {was} never once {f-}.", "{T} {be} hardly {Q-}.",
         "{asp} {is} not {q-}, and neither {asp2is}.", "Nobody could call {T} {Q-}.", "{asp} {is} anything but {q-}."],
        ["{asp} {is} not in the least {q-}.", "{T} {be} not what I would call {Q-}.", "{I} {was} not {f-} for one minute.",
         "I cannot say that {asp} {is} {q-}."],
    ),
    "contrast": (
        ["{A-}, but {W+}.", "{A-} and {A-}, but {W+}.", "{A-}. Still, {W+}.", "{A-}, yet {W+}.", "{A-}, but {asp} {is} so {q+} that {V+}.",
         "At first {V-}, but in the end {V+}.", "{A-}. However, {W+}."],
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
        ["I was ready for {thing-}. What I got was {one+}.", "They promised us {thing-}, and it {be} {one+}."],
    ),
    "comparison": (
        ["{R} was {Q-}; this one {be} {Q+}.", "Unlike {R}, which was {Q-}, this one {be} {Q+}.", "{T} {be} far less {g-} than {R}.",
         "This one {be} {Q+}, unlike {R}, which was {Q-}."],
        ["{T} {be} not nearly as {g-} as {R}.", "Compared with {R}, which was {Q-}, this one {be} {Q+}."],
    ),
    "others": (
        ["{P-}, but {W+}.", "{P-}. {W+}.", "{P-}; {W+}.", "{W+}, although {P-}."],
        ["{P-}. Not me: {W+}.", "{P-}, whereas {W+}."],
    ),
}  # fmt: skip
SHARES = {"plain": 0.30, "negation": 0.22, "contrast": 0.18, "concession": 0.12, "expectation": 0.07, "comparison": 0.05, "others": 0.06}
TEST_SHARES = {"plain": 0.14, "negation": 0.24, "contrast": 0.22, "concession": 0.16, "expectation": 0.08, "comparison": 0.08, "others": 0.08}


@dataclass
class Writer:
    """Fills the slots of one form for one label; remembers which opinion words it used."""

    rng: random.Random
    domain: Domain
    label: Label
    pool: Pool
    allowed: set[str]
    used: list[str] = field(default_factory=list)
    nouns: list[str] = field(default_factory=list)
    tag: str = ""
    plural: bool = False
    named: bool = False

    def __post_init__(self) -> None:
        self.thing = self.rng.choice(self.domain.things)
        self.past = self.domain.past
        self.rival = self.rng.choice(self.domain.rivals)
        self.me = self.rng.choice(["I", "I", "we"])

    def write(self, form: str) -> str:
        """One review, or ValueError when a slot has no allowed word left."""
        text = re.sub(r"\{(\w+?)([+-]?)\}", lambda m: self._slot(m[1], m[2]), form)
        return re.sub(r"(^|[.!?] )(\w)", lambda m: m[1] + m[2].upper(), text)

    def _slot(self, name: str, sign: str) -> str:
        if sign:
            other = LABELS[self.label == "positive"]
            return getattr(self, f"_{name}")(self.label if sign == "+" else other)
        return getattr(self, f"_{name}")()

    def _pick(self, tags: tuple[str, ...], label: Label) -> str:
        choices = [w for tag in tags for w in self.pool[tag][label] if w in self.allowed and w not in self.used]
        if not choices:
            raise ValueError(f"no {label} word left for {tags}")
        self.used.append(self.rng.choice(sorted(set(choices))))
        return self.used[-1]

    # slots without an opinion
    def _asp(self) -> str:
        nouns = [(tag, noun) for tag, group in self.domain.aspects.items() for noun in group if noun not in self.nouns]
        self.tag, noun = self.rng.choice(nouns)
        self.nouns.append(noun)
        self.plural = noun.endswith("!")
        return "the " + noun.rstrip("!")

    def _asp2is(self) -> str:
        nouns = [noun for noun in self.domain.aspects[self.tag] if noun not in self.nouns]
        noun = self.rng.choice(nouns)
        self.plural = noun.endswith("!")
        return f"{self._is()} the " + noun.rstrip("!")

    def _is(self) -> str:
        return {(False, False): "is", (False, True): "are", (True, False): "was", (True, True): "were"}[self.past, self.plural]

    def _be(self) -> str:
        return "was" if self.past else "is"

    def _it(self) -> str:
        return "it" if self.named else self._T()

    def _T(self) -> str:
        self.named = True
        return self.rng.choice(["the ", "this "]) + self.thing

    def _I(self) -> str:
        return self.me

    def _was(self) -> str:
        return "were" if self.me == "we" else "was"

    def _R(self) -> str:
        return self.rival

    # slots with one
    def _q(self, label: Label) -> str:
        return self._pick(("any", self.tag), label)

    def _Q(self, label: Label) -> str:
        return self._pick(("any", self.domain.name), label)

    def _g(self, label: Label) -> str:
        return self._pick((self.domain.name,), label)

    def _f(self, label: Label) -> str:
        return self._pick(("feel",), label)

    def _A(self, label: Label) -> str:
        asp = self._asp()
        return f"{asp} {self._is()} {self.rng.choice(['', '', '', 'really ', 'truly '])}{self._q(label)}"

    def _nothing(self, label: Label) -> str:
        asp = self._asp()
        return f"nothing {self._q(label)} about {asp}"

    def _part(self, label: Label) -> str:
        noun = self._asp().removeprefix("the ")
        return f"the {self._q(label)} {noun}"

    def _V(self, label: Label) -> str:
        if self.rng.random() < 0.5:
            return f"{self.me} {self._pick(('verb',), label)} {self._it()}"
        return f"{self.me} {self._was()} {self._f(label)}"

    def _W(self, label: Label) -> str:
        kind = self.rng.choice(["verdict", "verdict", "verdict", "found", "thing"])
        if kind == "verdict":
            return self._V(label)
        if kind == "found":
            return f"{self.me} found {self._it()} {self._Q(label)}"
        return f"{self._T()} {self._be()} {self._Q(label)}"

    def _P(self, label: Label) -> str:
        who = self.rng.choice(self.domain.people)
        be = "were" if who.endswith("!") else "was"
        who = who.rstrip("!")
        kind = self.rng.choice(["verb", "feel", "found"])
        if kind == "verb":
            return f"{who} {self._pick(('verb',), label)} {self._it()}"
        return f"{who} {be} {self._f(label)}" if kind == "feel" else f"{who} found {self._it()} {self._Q(label)}"

    def _thing(self, label: Label) -> str:
        self.named = True
        return article(f"{self._Q(label)} {self.thing}")

    def _one(self, label: Label) -> str:
        return article(f"{self._Q(label)} one")


def article(noun_phrase: str) -> str:
    """The phrase with a or an before it."""
    return ("an " if noun_phrase[0] in "aeiou" else "a ") + noun_phrase


def held_out_pairs(rng: random.Random) -> dict[str, set[str]]:
    """Family -> the opinion words that training does not use in it; plain statements keep all of theirs."""
    held = {}
    for family in FORMS:
        out = set()
        for tag, by_label in KNOWN.items():
            for label in LABELS:
                group = by_label[label]
                out |= set(rng.sample(group, max(1, round(HELD_OUT_PAIRS * len(group)))))
        held[family] = out if family != "plain" else set()
    return held


Row = dict[str, str]


def make_row(rng, label, family, number, form, pool, allowed):
    while True:
        domain = rng.choice(DOMAINS)
        writer = Writer(rng, domain, label, pool, allowed)
        try:
            text = writer.write(form)
        except ValueError:
            continue
        if rng.random() < FILLERS_BEFORE:
            text = rng.choice(domain.fillers) + " " + text
        if rng.random() < FILLERS_AFTER:
            text = text + " " + rng.choice(domain.fillers)
        return {"text": text, "label": label, "domain": domain.name, "family": family, "form": f"{family}-{number}"}


def make_split(rng, size, seen, *, forms, allowed, pool, families=None, SHARES=SHARES):
    """`size` rows, half of each label in every family."""
    rows = []
    shares = {f: s for f, s in SHARES.items() if families is None or f in families}
    total = sum(shares.values())
    fams = list(shares)
    counts = {f: 2 * int(size * shares[f] / total / 2) for f in fams}
    i = 0
    while sum(counts.values()) < size:
        counts[fams[i % len(fams)]] += 2
        i += 1
    for family in fams:
        for k in range(counts[family]):
            choices = forms(family)
            number, form = choices[(k // 2) % len(choices)]
            while True:
                row = make_row(rng, LABELS[k % 2], family, number, form, pool, allowed(family))
                if row["text"] not in seen:
                    break
            seen.add(row["text"])
            rows.append(row)
    rng.shuffle(rows)
    return rows


def make_reviews(seed=SEED):
    rng = random.Random(seed)
    held = held_out_pairs(rng)
    old = {w for t in KNOWN.values() for g in t.values() for w in g}
    new = {w for t in NEW.values() for g in t.values() for w in g}
    assert not old & new, old & new
    trained = lambda family: list(enumerate(FORMS[family][0], 1))
    unseen = lambda family: list(enumerate(FORMS[family][1], len(FORMS[family][0]) + 1))
    seen = set()
    keep = lambda family: old - held[family]
    out = {
        "train": make_split(rng, 1200, seen, forms=trained, allowed=keep, pool=KNOWN),
        "validation": make_split(rng, 200, seen, forms=trained, allowed=keep, pool=KNOWN),
        "test": make_split(rng, 200, seen, forms=unseen, allowed=lambda f: old, pool=KNOWN, SHARES=TEST_SHARES)
        + make_split(rng, 200, seen, forms=trained, allowed=lambda f: held[f], pool=KNOWN, families=[f for f in FORMS if f != "plain"], SHARES=TEST_SHARES),
        "hard": make_split(rng, 200, seen, forms=trained, allowed=lambda f: new, pool=NEW),
    }
    return out


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    for split, rows in make_reviews().items():
        (args.out / f"{split}.jsonl").write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")
        print(split, len(rows), Counter(r["label"] for r in rows), Counter(r["family"] for r in rows))


if __name__ == "__main__":
    main()
