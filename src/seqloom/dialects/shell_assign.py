"""Assignments of a shell script: NAME=value, NAME[INDEX]=value and NAME=( words )."""

import re

from seqloom.dialects.shell_values import Values
from seqloom.dialects.shell_words import Piece, Token, Word

_ASSIGNMENT = re.compile(r"([A-Za-z_]\w*(?:\[[^]\[]*\])?)(\+?)=")
_ELEMENT = re.compile(r"\[([^]\[]*)\]=")


def assigned(word: Word) -> str | None:
    """The name in NAME=value or NAME[INDEX]=value, if that is what the word is."""
    if not word or word[0].kind != "text" or word[0].quoted:
        return None
    if found := _ASSIGNMENT.match(word[0].text):
        return found[1]
    open_index = re.match(r"([A-Za-z_]\w*)\[", word[0].text)
    written = open_index and any(re.match(r"[^]]*\]\+?=", piece.text) for piece in word[1:] if not piece.quoted)
    return open_index[1] if open_index and written else None


def assign_word(values: Values, word: Word, name: str) -> None:
    """Take NAME=value or NAME[INDEX]=value."""
    found = _ASSIGNMENT.match(word[0].text)
    if found is None:
        values.cast_doubt(name, f"an element of {name} is set whose place is not read")
        return
    rest = Piece("text", word[0].text[found.end() :], False)
    values.assigning = name
    value = values.expand((rest, *word[1:]) if rest.text else word[1:], split=False)
    values.assigning = ""
    array, _, index = name.rstrip("]").partition("[")
    elements = list(values.variables.get(array, ()))
    if "[" in name and index.isdecimal() and len(index) < 6 and int(index) <= len(elements) and not found[2]:
        elements[int(index) : int(index) + 1] = ["".join(value)]
        values.assign(array, elements)
        return
    if "[" in name and array in values.variables:
        values.cast_doubt(array, f"an element of {array} is set whose place is not read")
    values.assign(name, ["".join(value)], bool(found[2]))


def assign_array(values: Values, token: Token) -> None:
    """Take NAME=( words ), or NAME=( [KEY]=word ... )."""
    name, append = _ASSIGNMENT.match(token.text).groups()  # type: ignore[union-attr]
    plain: list[str] = []
    for word in token.words:
        key = _ELEMENT.match(word[0].text) if word and word[0].kind == "text" and not word[0].quoted else None
        if key is None:
            plain.extend(values.expand(word))
            continue
        rest = Piece("text", word[0].text[key.end() :], False)
        value = values.expand((rest, *word[1:]) if rest.text else word[1:], split=False)
        values.assign(f"{name}[{key[1]}]", ["".join(value)])
    if plain or not any(one.startswith(f"{name}[") for one in values.variables):
        values.assign(name, plain, bool(append), array=True)
