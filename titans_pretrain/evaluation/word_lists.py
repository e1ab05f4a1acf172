"""Which words make a needle's key? An adjective and a noun: 8,556 keys, so that distractors seldom collide."""

from __future__ import annotations

_ADJECTIVES = (
    "able amber ancient angry bitter blue bold brave brief bright broad broken brown calm careful cheap clean clear clever "
    "cold common cool crisp cruel curious damp dark dear deep dry dull eager early easy empty equal exact faint fair false "
    "famous fast fierce fine firm flat foreign free fresh gentle glad golden grand grave gray great green grim happy hard "
    "heavy high hollow honest huge humble idle jolly keen kind large late lazy lean light little lonely long loose loud low "
    "loyal lucky mad merry mild modern narrow neat noble odd old"
)
_NOUNS = (
    "acorn anchor apple arrow autumn badge banner barrel basket beacon bell blanket boat bottle branch bridge brook brush "
    "bucket button cabin candle canyon carpet castle cellar chain chapel cherry circle cliff clock cloud coach coast copper "
    "corner cottage cradle crown curtain desert diamond dinner doctor donkey dragon drum eagle engine farmer feather fence "
    "field finger flag flame flower forest fountain garden ghost glass glove hammer harbor helmet hill horse island ivory "
    "jacket jewel kettle kingdom ladder lantern leaf lemon letter lion market meadow mirror mountain needle ocean orchard "
    "palace pepper pillow pirate planet"
)
ADJECTIVES, NOUNS = tuple(_ADJECTIVES.split()), tuple(_NOUNS.split())
