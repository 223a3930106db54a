"""Tokens are shown printable, in one line, and different ones differently."""

import html
import re
import unicodedata

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from interp.tokens import for_plotly, visible

TEXT = st.text(st.characters() | st.sampled_from(" \\xuU\n\t␣↵⇥◌\ufffd\u202e\u0301\ud800\u200d0aA"), max_size=8)


def undo(shown: str) -> str:
    """The inverse of `visible`, written independently."""
    signs = {"␣": " ", "↵": "\n", "⇥": "\t", "◌": ""}
    pattern = r"\\x([0-9a-f]{2})|\\u([0-9a-f]{4})|\\U([0-9a-f]{8})|([␣↵⇥◌])"
    return re.sub(pattern, lambda m: signs[m[4]] if m[4] else chr(int(m[1] or m[2] or m[3], 16)), shown)


@given(TEXT)
@example("\\x00")
@example("\\\\x00\x00")
@example("\u0301a")
def test_nothing_is_lost_and_everything_is_printable(token: str) -> None:
    assert undo(visible(token)) == token
    assert visible(token).isprintable()
    assert undo(visible(token, inner=False)) == token
    assert visible(token, inner=False).isprintable()


@pytest.mark.parametrize(
    ("token", "expected"),
    [
        (" the", "␣the"),
        ("a b ", "a␣b␣"),
        ("\n\t\r", "↵⇥\\x0d"),
        ("\x00\x7f\x9f", "\\x00\\x7f\\x9f"),
        ("\u202eabc\u2066", "\\u202eabc\\u2066"),
        ("\ud83d", "\\ud83d"),
        ("\ufffd", "\\ufffd"),
        ("\u00a0\u3000\u200b\ufeff", "\\xa0\\u3000\\u200b\\ufeff"),
        ("\U000e0041", "\\U000e0041"),
        ("a\ufe0f", "a\\ufe0f"),
        ("\u2800\u3164", "\\u2800\\u3164"),
        ("\u0301", "◌\u0301"),
        ("␣", "\\u2423"),
        ("\\n", "\\n"),
        ("\\x00", "\\x5cx00"),
        ("日本é😀", "日本é😀"),
        ("", ""),
    ],
)
def test_examples(token: str, expected: str) -> None:
    assert visible(token) == expected


def test_prose_keeps_its_inner_spaces() -> None:
    assert visible(" a b  c\n d ", inner=False) == "␣a b␣␣c↵␣d␣"


def test_no_bidirectional_control_survives() -> None:
    for code in range(0x110000):
        if unicodedata.bidirectional(chr(code)) in {
            "LRE",
            "RLE",
            "LRO",
            "RLO",
            "PDF",
            "LRI",
            "RLI",
            "FSI",
            "PDI",
            "BN",
        }:
            assert visible(chr(code)).isascii()


@given(TEXT)
def test_plotly_labels_hold_no_markup(token: str) -> None:
    label = for_plotly(token)
    assert not set("<>$") & set(label)
    assert html.unescape(label) == visible(token)


def test_plotly_entities() -> None:
    assert for_plotly("<b>&amp; $x$") == "&lt;b&gt;&amp;amp;␣&#36;x&#36;"
    assert for_plotly("a b", inner=False) == "a b"
