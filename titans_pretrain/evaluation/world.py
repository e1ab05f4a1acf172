"""Where is everybody, and who has what? A world of people, places and objects that moves on by one fact after another.

The kinds of story are those of the bAbI tasks 1 to 3 (arXiv 1502.05698); the stories are our own. Every answer is read off the
world's state, never off its text, and can be known from the facts told so far.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import NamedTuple

PEOPLE = ("Mary", "John", "Daniel", "Sandra")
PLACES = ("kitchen", "bathroom", "bedroom", "garden", "hallway", "office")
OBJECTS = ("apple", "football", "milk")
GO = ("went to", "moved to", "travelled to", "journeyed to", "went back to")
TAKE = ("picked up the {}.", "took the {}.", "grabbed the {} there.", "got the {} there.")
DROP = ("dropped the {}.", "put down the {}.", "left the {} there.", "discarded the {}.")


class Stay(NamedTuple):
    """An object's time at one place."""

    place: str
    facts: tuple[int, ...]
    """Numbers of the facts that tell of it: who took it, and the carrier's move to the place."""


@dataclass
class World:
    """The state. Where an object lies before anybody took it is decided but not told."""

    draw: random.Random
    facts: list[str] = field(default_factory=list)
    place_of: dict[str, str] = field(default_factory=dict)
    """Of each person who has moved."""
    moved_at: dict[str, int] = field(default_factory=dict)
    """Number of the fact that tells of each person's last move."""
    carrier_of: dict[str, str] = field(default_factory=dict)
    taken_at: dict[str, int] = field(default_factory=dict)
    stays: dict[str, list[Stay]] = field(default_factory=dict)
    """Of each object that was taken, the places it has been at since, in order."""

    def __post_init__(self) -> None:
        self._lies = {thing: self.draw.choice(PLACES) for thing in OBJECTS}

    def go(self) -> None:
        """Somebody moves."""
        person = self.draw.choice(PEOPLE)
        place = self.draw.choice([p for p in PLACES if p != self.place_of.get(person)])
        self.place_of[person] = place
        self.moved_at[person] = len(self.facts)
        for thing, carrier in self.carrier_of.items():
            if carrier == person:
                self.stays[thing].append(Stay(place, (self.taken_at[thing], len(self.facts))))
        self.facts.append(f"{person} {self.draw.choice(GO)} the {place}.")

    def take(self) -> bool:
        """Somebody takes what lies where they are; False: nobody can."""
        able = [
            (person, thing)
            for person, place in self.place_of.items()
            for thing in OBJECTS
            if thing not in self.carrier_of and self._lies[thing] == place
        ]
        if not able:
            return False
        person, thing = self.draw.choice(able)
        self.carrier_of[thing] = person
        self.taken_at[thing] = len(self.facts)
        stays = self.stays.setdefault(thing, [])
        if not stays:  # else it has not moved since it was put down
            stays.append(Stay(self.place_of[person], (self.moved_at[person], len(self.facts))))
        self.facts.append(f"{person} {self.draw.choice(TAKE).format(thing)}")
        return True

    def drop(self) -> bool:
        """Somebody puts down what they carry; False: nobody carries anything."""
        if not self.carrier_of:
            return False
        thing = self.draw.choice(list(self.carrier_of))
        person = self.carrier_of.pop(thing)
        self._lies[thing] = self.place_of[person]
        self.facts.append(f"{person} {self.draw.choice(DROP).format(thing)}")
        return True


class Story(NamedTuple):
    """Facts in order, and a question about them."""

    facts: tuple[str, ...]
    question: str
    beginning: str
    """Of the answering sentence, whose next word is the answer."""
    answer: str
    """One of PLACES."""
    supporting: tuple[int, ...]
    """Numbers of the facts that the answer follows from."""


FACTS = {"qa1": (4, 10), "qa2": (6, 14), "qa3": (8, 18)}
"""Fewest and most facts of a story."""


def tell(task: str, draw: random.Random) -> Story:
    """A story of "qa1" (where is a person: one supporting fact), "qa2" (where is an object: two) or "qa3" (where was an object
    before it was at a place: three)."""
    least, most = FACTS[task]
    while True:  # a story in which nothing can be asked is told anew
        world = World(draw)
        wanted = draw.randint(least, most)
        while len(world.facts) < wanted:
            kind = 1.0 if task == "qa1" else draw.random()
            if not ((kind < 0.4 and world.take()) or (0.4 <= kind < 0.5 and world.drop())):
                world.go()
        if found := _question(task, world):
            return found


def _question(task: str, world: World) -> Story | None:
    facts, draw = tuple(world.facts), world.draw
    if task == "qa1":
        person = draw.choice(list(world.place_of))
        beginning = f"The most recent location of {person} is the"
        return Story(facts, f"Where is {person}?", beginning, world.place_of[person], (world.moved_at[person],))
    if not world.stays:
        return None
    thing = draw.choice(list(world.stays))
    stays = world.stays[thing]
    if task == "qa2":
        place, supporting = stays[-1]
        return Story(facts, f"Where is the {thing}?", f"The {thing} is in the", place, tuple(sorted(supporting)))
    places = [stay.place for stay in stays]
    # Of a place it came to twice, "before" would mean two things.
    moves = [(stays[i - 1], stays[i]) for i in range(1, len(stays)) if places.count(places[i]) == 1]
    moves = [(before, after) for before, after in moves if len({*before.facts, *after.facts}) == 3]
    if not moves:
        return None
    before, after = draw.choice(moves)
    question = f"Where was the {thing} before the {after.place}?"
    beginning = f"Before the {after.place} the {thing} was in the"
    return Story(facts, question, beginning, before.place, tuple(sorted({*before.facts, *after.facts})))
