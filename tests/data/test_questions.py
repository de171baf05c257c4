import json
from pathlib import Path

import pytest

from hsd.data.questions import Question, load_jsonl


def write(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_reads_every_field_and_names_questions_by_line(tmp_path: Path) -> None:
    path = write(
        tmp_path / "sums.jsonl",
        '{"prompt": "1 + 1?", "answer": 2}',
        "",
        '{"prompt": "Größe?", "answer": "3.50", "solution": "so", "id": "q"}\r',
        '{"prompt": "line\\u2028separator \u2028", "answer": 3.50}',
    )
    assert load_jsonl(path) == [
        Question(id="sums:1", prompt="1 + 1?", answer="2"),
        Question(id="q", prompt="Größe?", answer="3.50", solution="so"),
        Question(id="sums:4", prompt="line\u2028separator \u2028", answer="3.50"),
    ]


def test_number_answers_keep_their_digits(tmp_path: Path) -> None:
    digits = "7" * 5000
    path = write(
        tmp_path / "n.jsonl",
        f'{{"prompt": "a", "answer": {digits}}}',
        '{"prompt": "b", "answer": -1e400}',
    )
    assert [question.answer for question in load_jsonl(path)] == [digits, "-1e400"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a", "answer": ', "no valid JSON"),
        ('["a", "b"]', "found a list, expected a JSON object"),
        ("7", "found the number 7, expected a JSON object"),
        ('{"prompt": "a"}', "found no 'answer'"),
        ('{"answer": "a"}', "found no 'prompt'"),
        ('{"prompt": "a", "answer": "b", "anser": 1}', "unknown key 'anser'"),
        ('{"prompt": 3, "answer": "b"}', "prompt: found the number 3, expected a string"),
        ('{"prompt": "a", "answer": true}', "answer: found a boolean, expected a string or a num"),
        ('{"prompt": "a", "answer": null}', "answer: found null"),
        ('{"prompt": "a", "answer": ["b"]}', "answer: found a list"),
        ('{"prompt": "a", "answer": NaN}', "NaN is no JSON number"),
        ('{"prompt": " ", "answer": "b"}', "prompt: found only white space"),
        ('{"prompt": "a", "answer": "b", "id": 4}', "id: found the number 4, expected a string"),
        ('{"prompt": "a", "answer": "b", "solution": {}}', "solution: found an object"),
        ('{"prompt": "a", "prompt": "b", "answer": "c"}', "occurs twice"),
        ('{"prompt": "a\\ud800", "answer": "b"}', "lone surrogate at character 1"),
        ('{"prompt": "z", "answer": "b", "id": "first"}', "found id 'first' of line 1"),
        ("[" * 100_000, "no valid JSON"),
    ],
)
def test_a_bad_line_is_one_error_with_path_and_line(
    tmp_path: Path, line: str, message: str
) -> None:
    path = write(tmp_path / "q.jsonl", '{"prompt": "p", "answer": "a", "id": "first"}', line)
    with pytest.raises(ValueError) as caught:
        load_jsonl(path)
    text = str(caught.value)
    assert text.startswith(f"{path}:2: ")
    assert message in text
    assert "\n" not in text


def test_bytes_that_are_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "latin.jsonl"
    path.write_bytes('{"prompt": "Größe", "answer": 1}'.encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin\.jsonl:1: found bytes that are not UTF-8"):
        load_jsonl(path)


def test_missing_and_empty_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.jsonl: found no such file"):
        load_jsonl(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match=r"empty\.jsonl: found no question"):
        load_jsonl(write(tmp_path / "empty.jsonl", "", "  "))


def test_the_generators_record_is_no_part_of_equality() -> None:
    first = Question(id="a", prompt="p", answer="1", entry={"answer": "1"})
    assert first == Question(id="a", prompt="p", answer="1")
    assert json.dumps(first.prompt_key) == '"p"'
