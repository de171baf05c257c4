from pathlib import Path

import pytest

from hsd.data.templates import TEMPLATE_FILE, load_template

COMPLETE = {
    "answer": "A {answer}",
    "peer": "[{peer}]",
    "failed": "no [{peer}]",
    "demonstration": "so [{demonstration}]",
    "closing": "Again.",
    "peer_open": "[",
    "peer_close": "]",
    "truncation_mark": "...",
    "plain": "Q {turn} A",
}


def write(path: Path, **changes: str | None) -> Path:
    texts = {key: text for key, text in (COMPLETE | changes).items() if text is not None}
    lines = ["[mine]", *(f'{key} = "{text}"' for key, text in texts.items())]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def test_a_complete_template_is_split_at_its_placeholders(tmp_path: Path) -> None:
    template = load_template("mine", write(tmp_path / "t.toml"))
    assert template.answer == ("A ", "")
    assert template.peer == ("[", "]")
    assert template.plain == ("Q ", " A")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"answer": "none"},
            r"t\.toml: mine\.answer: found \{answer\} 0 times, expected it exactl",
        ),
        ({"peer": "[{peer}{peer}]"}, r"mine\.peer: found \{peer\} 2 times"),
        ({"plain": "{question}"}, r"mine\.plain: found \{turn\} 0 times"),
        ({"closing": None}, r"mine\.closing: found None, expected a text"),
        ({"closing": " "}, r"mine\.closing: found ' ', expected a text"),
        ({"extra": "x"}, r"mine\.extra: found an unknown key"),
        ({"peer_close": "<"}, r"mine\.peer_close: found '<', expected a text of mine\.peer"),
    ],
)
def test_an_incomplete_template_is_refused(
    tmp_path: Path, changes: dict[str, str | None], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        load_template("mine", write(tmp_path / "t.toml", **changes))


def test_an_unknown_name_gets_the_close_one() -> None:
    with pytest.raises(ValueError, match=r"context\.template: found 'defualt', expected default"):
        load_template("defualt")


def test_every_shipped_template_loads() -> None:
    names = [line[1:-1] for line in TEMPLATE_FILE.read_text().splitlines() if line[:1] == "["]
    assert "default" in names
    for name in names:
        load_template(name)
