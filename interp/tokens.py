"""Tokens as text that a reader can tell apart: every space, line break and invisible character is shown.

A tokenizer's vocabulary holds " the" and "the", tabs, control characters, zero-width joiners, characters that reverse
the text around them, and pieces that are no valid Unicode at all. `visible` shows each as something printable, and two
different tokens never look the same: a character that we use as a sign is itself escaped where a token holds it.
"""

import html
import re
import unicodedata

_SIGNS = {" ": "␣", "\n": "↵", "\t": "⇥"}
_CIRCLE = "◌"  # carries an accent that has no letter before it, as Unicode's own charts do
# Printable by Unicode's categories, but drawn as nothing: joiners, fillers, variation selectors, empty braille.
_BLANK = re.compile("[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]")
_OURS = frozenset([*_SIGNS.values(), _CIRCLE])
_PLAIN = re.compile(r"[!-\[\]-~]*")  # ASCII without space and backslash: nothing to do


def visible(token: str, *, inner: bool = True) -> str:
    r"""Shows a token, or any text, with its spaces and invisible characters.

    Spaces become ␣, line breaks ↵, tabs ⇥; control, format, bidirectional, unassigned and private characters, halves of
    surrogate pairs and the replacement character become \x00, \u202e or \U000e0001. Different tokens stay different.

    Args:
        token: any string.
        inner: whether single spaces between other characters are shown too; without it prose stays readable.

    Returns:
        Printable text in one line.

    Example:
        >>> visible(" the\n"), visible("a\u202eb"), visible(" two words ", inner=False)
        ('␣the↵', 'a\\u202eb', '␣two words␣')
    """
    if _PLAIN.fullmatch(token):
        return token
    shown = [_show(token, index) for index in range(len(token))]
    if not inner:
        for index in range(1, len(token) - 1):
            if token[index] == " " and not (token[index - 1].isspace() or token[index + 1].isspace()):
                shown[index] = " "
    if unicodedata.category(token[0]).startswith("M") and shown[0] == token[0]:
        shown[0] = _CIRCLE + shown[0]
    return "".join(shown)


def for_plotly(token: str, *, inner: bool = True) -> str:
    """Text for a plotly label, hover or title, which would read `<b>`, `&amp;` and `$…$` as markup.

    Args:
        token: any string.
        inner: as in `visible`; False for prose.

    Example:
        >>> for_plotly(" <b>")
        '␣&lt;b&gt;'
    """
    return html.escape(visible(token, inner=inner), quote=False).replace("$", "&#36;")


def _show(token: str, index: int) -> str:
    """One character as it is shown."""
    character = token[index]
    if character in _SIGNS:
        return _SIGNS[character]
    if character == "\\":
        # Only where the text would read as one of our escapes, so that code keeps its backslashes.
        return r"\x5c" if token[index + 1 : index + 2] in ("x", "u", "U") else character
    if character in _OURS or character == "\ufffd" or not character.isprintable() or _BLANK.match(character):
        return _escape(ord(character))
    return character


def _escape(code: int) -> str:
    if code < 0x100:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
