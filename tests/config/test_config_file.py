"""Whatever lies at a path, it is a config or a `Step35ConfigError` that names the file."""

import json
import os
import socket

import pytest
from support.config_samples import tiny

from step35_patch.config import Step35Config, Step35ConfigError


def test_a_file_or_the_folder_with_it(tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(tiny()))
    expected = Step35Config.from_dict(tiny())
    for path in (file, str(file), tmp_path, str(tmp_path)):
        assert Step35Config.from_pretrained(path) == expected
    file.write_text("\ufeff" + json.dumps(tiny()), encoding="utf-8")
    assert Step35Config.from_pretrained(file) == expected


def test_problems_of_a_file_name_the_file(tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(tiny(hidden_size=0, vocab_size="64")))
    with pytest.raises(Step35ConfigError) as caught:
        Step35Config.from_pretrained(tmp_path)
    assert str(caught.value).splitlines() == [
        f"{file}: 2 problems",
        "  hidden_size: expected a positive integer, found 0",
        '  vocab_size: expected a positive integer, found "64"',
    ]


TEXT = json.dumps(tiny())
NO_CONFIGS = {
    "empty": (b"", "an empty file"),
    "blank": (b" \n\t", "an empty file"),
    "truncated": (TEXT[: len(TEXT) // 2].encode(), "is the file complete?"),
    "text": (b"hidden_size: 24", "expected valid JSON"),
    "trailing": (TEXT.encode() + b"}", "expected valid JSON"),
    "binary": (bytes(range(256)), "expected UTF-8 text"),
    "utf16": (TEXT.encode("utf-16"), "expected UTF-8 text"),
    "latin1": (b'{"note": "\xe9"}', "found byte 0xe9 at offset 10"),
    "list": (b"[1, 2]", "expected a JSON object"),
    "null": (b"null", "expected a JSON object"),
    "number": (b"48", "expected a JSON object"),
    "deep_lists": (b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "levels of nesting"),
    "deeper_objects": (b'{"a":' * 900 + b"1" + b"}" * 900, "levels of nesting"),
    "deep_objects": (b'{"a":' * 300 + b"1" + b"}" * 300, "levels of nesting"),
    "long_integer": (b'{"hidden_size": ' + b"9" * 5000 + b"}", "expected valid JSON"),
    "large": (b" " * (2**24 + 1) + TEXT.encode(), "16777216 bytes"),
}


@pytest.mark.parametrize("name", NO_CONFIGS)
def test_a_file_that_holds_no_config(tmp_path, name):
    content, reason = NO_CONFIGS[name]
    file = tmp_path / "config.json"
    file.write_bytes(content)
    for path in (file, tmp_path):
        with pytest.raises(Step35ConfigError) as caught:
            Step35Config.from_pretrained(path)
        assert str(caught.value).startswith(f"{file}: ")
        assert reason in str(caught.value)


def test_numbers_that_are_none(tmp_path):
    file = tmp_path / "config.json"
    for literal in ("NaN", "Infinity", "-Infinity", "1e999"):
        file.write_text(TEXT.replace("1e-05", literal))
        with pytest.raises(Step35ConfigError, match="rms_norm_eps: expected a finite number"):
            Step35Config.from_pretrained(file)


def test_keys_given_twice_are_reported_with_everything_else(tmp_path):
    file = tmp_path / "config.json"
    text = TEXT.replace('"head_dim": 8', '"head_dim": 8, "head_dim": 16, "sink": true')
    file.write_text(text.replace('"factor": 2.0', '"factor": 2.0, "factor": 2.0'))
    with pytest.raises(Step35ConfigError) as caught:
        Step35Config.from_pretrained(file)
    found = {problem.field: problem.found for problem in caught.value.problems}
    assert found == {"head_dim": "8 and 16", "factor": "2.0 and 2.0", "sink": "true"}


def test_a_key_that_is_no_name_stays_on_one_line(tmp_path):
    file = tmp_path / "config.json"
    file.write_text('{"a\\n\\ud800": 1, "a\\n\\ud800": 2}')
    with pytest.raises(Step35ConfigError) as caught:
        Step35Config.from_pretrained(file)
    assert caught.value.problems[0].field == '"a\\n\\ud800"'
    assert len(str(caught.value).splitlines()) == 1 + len(caught.value.problems)


def test_an_empty_path_is_not_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text(TEXT)
    monkeypatch.chdir(tmp_path)
    assert Step35Config.from_pretrained(".")
    with pytest.raises(Step35ConfigError, match="no such file"):
        Step35Config.from_pretrained("")


def test_a_path_without_a_config(tmp_path):
    for path in (tmp_path, tmp_path / "no" / "config.json", "", "org/model", "nul\0byte"):
        with pytest.raises(Step35ConfigError) as caught:
            Step35Config.from_pretrained(path)
        assert str(path) in str(caught.value)
        assert "expected a config.json or a folder with one" in str(caught.value)


def test_what_has_no_end_or_no_beginning(tmp_path, monkeypatch):
    """A FIFO that nobody writes into, a device, a socket, and links that go round."""
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "config.json")
    with socket.socket(socket.AF_UNIX) as listener:
        monkeypatch.chdir(tmp_path)  # the path of a socket must be short
        listener.bind("socket")
        for path, found in (
            (tmp_path, "no regular file"),
            (tmp_path / "config.json", "no regular file"),
            ("/dev/zero", "no regular file"),
            (tmp_path / "socket", "found"),
            (tmp_path / "loop", "Too many levels of symbolic links"),
        ):
            with pytest.raises(Step35ConfigError, match=found) as caught:
                Step35Config.from_pretrained(path)
            assert "expected a config.json or a folder with one" in str(caught.value)


def test_a_file_that_cannot_be_opened(tmp_path):
    file = tmp_path / "config.json"
    file.write_text(TEXT)
    with pytest.raises(Step35ConfigError, match="found Not a directory"):
        Step35Config.from_pretrained(file / "config.json")
