"""README.zh-CN.md says what README.md says: the same sections, commands, options, file names and figures."""
import os
import re

import pytest

from helpers import ROOT


def read(name):
    with open(os.path.join(ROOT, name), encoding="utf-8") as f:
        return f.read()


@pytest.fixture(scope="module")
def both():
    return read("README.md"), read("README.zh-CN.md")


def blocks(text):
    """The fenced blocks: commands, and what they print."""
    return re.findall(r"^```\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def prose(text):
    return re.sub(r"^```\n.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def test_the_same_commands(both):
    english, chinese = map(blocks, both)
    assert len(english) > 10 and english == chinese


def test_the_same_names_options_and_messages(both):
    english, chinese = (sorted(set(re.findall(r"`([^`]+)`", " ".join(prose(text).split())))) for text in both)
    assert len(english) > 100 and english == chinese


def test_the_same_figures(both):
    """Of three characters and more: the other ones are written as words in one language or the other, as months are."""
    english, chinese = (sorted(figure for figure in re.findall(r"\d+(?:[.,]\d+)*", re.sub(r"`[^`]+`", "", prose(text)))
                               if len(figure) > 2) for text in both)
    assert len(english) > 100 and english == chinese


def test_the_same_sections_and_tables(both):
    def shape(text):
        return [line.count("|") if line.startswith("|") else line.split(" ")[0] for line in prose(text).split("\n")
                if re.match(r"#+ |\|", line)]

    english, chinese = map(shape, both)
    assert english.count("##") > 10 and english == chinese
