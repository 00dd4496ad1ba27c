"""How settings are said back to their author."""

from collections.abc import Iterable
from difflib import get_close_matches


def kind(value: object) -> str:
    """What YAML calls the type of a value, with its article."""
    names = {
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        str: "a string",
        list: "a list",
        dict: "a section",
    }
    return "nothing" if value is None else names.get(type(value), f"a {type(value).__name__}")


def shown(value: object) -> str:
    """A value as its author wrote it, with its type where that is not plain to see."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = repr(value)
    text = text if len(text) <= 60 else text[:57] + "..."
    return f"{text} ({kind(value)})" if isinstance(value, (str, list, dict)) else text


def did_you_mean(name: str, known: Iterable[str], prefix: str) -> str:
    """A question that names the closest of the known names, or nothing."""
    close = get_close_matches(name, known, 1)
    return f" (did you mean '{prefix}{close[0]}'?)" if close else ""
