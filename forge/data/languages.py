"""Which language a text is in, by its script and, for the Latin one, by its commonest words: a glance, not a classifier.

It tells nine languages in Latin letters apart and names other scripts as such. It cannot see a language without a list here
(it is `unknown`, or taken for a near relative: Norwegian for Danish), several languages in one text (the commonest wins), or
anything in a text of a few words; source code is `unknown`, or the language of its comments.
"""

from __future__ import annotations

from collections import Counter
import re
import unicodedata

#: Words that are frequent in one language and rare or absent in the others of the list.
_WORDS = {
    "English": "the and of to that was with for which from this have are not",
    "German": "der und die das nicht ist von mit sich auch ein eine werden dem",
    "French": "le les et des une est dans pour que qui pas sur avec sont",
    "Spanish": "el los y las una por del que con es para como pero más",
    "Italian": "il che di della per è una non sono gli con nel anche alla",
    "Portuguese": "o que de não uma os do da em para com mais são pela",
    "Dutch": "het een van en niet zijn met voor op dat ook worden bij naar",
    "Danish": "og det er til af ikke en der med på som har blev efter",
    "Polish": "i w nie na się że jest do z jak po ale przez od",
}
_SETS = {language: frozenset(words.split()) for language, words in _WORDS.items()}
_WORD = re.compile(r"[^\W\d_]+")
#: Characters that are looked at; the share of letters that makes a script the text's; of words that makes a language it.
CHARACTERS, SCRIPT_SHARE, WORD_SHARE = 4_000, 0.5, 0.05
#: A text with fewer words says nothing.
FEWEST_WORDS = 8
UNKNOWN = "unknown"


def language_of(text: str) -> str:
    """A language, a script such as `Cyrillic script`, or `unknown`."""
    letters = [letter for letter in text[:CHARACTERS] if letter.isalpha()]
    if not letters:
        return UNKNOWN
    scripts = Counter(unicodedata.name(letter, UNKNOWN).split()[0] for letter in letters)
    script, count = scripts.most_common(1)[0]
    if count < SCRIPT_SHARE * len(letters):
        return UNKNOWN
    if script != "LATIN":
        return f"{script.capitalize()} script" if script.isalpha() else UNKNOWN
    words = _WORD.findall(text[:CHARACTERS].lower())
    shares = {language: sum(word in its for word in words) / max(1, len(words)) for language, its in _SETS.items()}
    best = max(shares, key=shares.__getitem__)
    return best if len(words) >= FEWEST_WORDS and shares[best] >= WORD_SHARE else UNKNOWN
