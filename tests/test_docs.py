"""Every command, option, file and link that README*.md and docs/*.md name exists."""
import glob
import json
import os
import re
import subprocess
import sys

import lists
import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PAGES = sorted(os.path.relpath(path, ROOT) for pages in ("README*.md", "docs/*.md") for path in glob.glob(os.path.join(ROOT, pages)))
COMMAND = re.compile(r"(?:^|\b(?:python3|bash) )([\w./-]+\.(?:py|sh))(?: (.*))?$")
OPTION = re.compile(r"(?<![\w-])--?[A-Za-z][\w-]*")
FILE = re.compile(r"(?<![\w./-])(?:tools|lib|tests|docs)/[\w./-]*")
LINK = re.compile(r"\]\((?!http)([^)#\s]*)(?:#([^)\s]*))?\)")
FOREIGN_SCRIPTS = {"set_env.sh", "baseline/model/DeepMAR.py"}  # of CANN and of the open-source repository
FOREIGN_OPTIONS = {"--insert_op_conf", "--enable_small_channel", "--precision_mode_v2", "--divide_input", "--batchsize", "--pids-limit",
                   "-v7", "--upgrade", "--install", "--device"}
TAKES_ACTION = {"tools/lists.py", "tools/rehearse.py"}  # their first argument decides which options they have


def read(page):
    with open(os.path.join(ROOT, page), encoding="utf-8") as f:
        return f.read()


def blocks(page):
    return re.findall(r"^```\n(.*?)^```$", read(page), re.MULTILINE | re.DOTALL)


def inline_code(page):
    prose = re.sub(r"^```\n.*?^```$", "", read(page), flags=re.MULTILINE | re.DOTALL)
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose)]


def anchors(page):
    """Returns the anchors that GitHub gives to a page's headings."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```\n.*?^```$", "", read(page), flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def commands(page):
    """Returns [(script, arguments)] of the page's commands. Comments are removed, and continued lines are joined."""
    lines = [re.sub(r"\s#.*", "", line).rstrip() for block in blocks(page) for line in block.replace("\\\n", " ").split("\n")]
    found = [COMMAND.search(text) for text in lines + inline_code(page)]
    return [(match.group(1), match.group(2) or "") for match in found if match and match.group(1) not in FOREIGN_SCRIPTS]


def help_command(script, arguments):
    """Returns the command that prints the help for a documented command."""
    action = arguments.split()[:1] if script in TAKES_ACTION and not arguments.startswith("-") else []
    return ("bash" if script.endswith(".sh") else sys.executable, script) + tuple(action) + ("--help",)


@pytest.fixture(scope="module")
def helps():
    """{help command: the options in its output}, for all documented commands with arguments. All help commands run at once."""
    wanted = {help_command(*command) for page in PAGES for command in commands(page) if command[1]}
    started = {command: subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, universal_newlines=True)
               for command in wanted if command[1] != "tests/run.sh"}  # which gives its options to pytest
    outputs = {command: process.communicate()[0] for command, process in started.items()}
    return {command: [] if started[command].returncode else OPTION.findall(output) + ["--help"]
            for command, output in outputs.items()}


@pytest.mark.parametrize("page", PAGES)
def test_named_files_exist(page):
    names = [script for script, _ in commands(page)] + FILE.findall(read(page))
    assert not [name for name in names if not os.path.exists(os.path.join(ROOT, name.rstrip(".")))]


def test_scripts_and_their_actions_have_a_help(helps):
    assert len(helps) > 20 and not [command for command, options in helps.items() if not options]


@pytest.mark.parametrize("page", PAGES)
def test_options_are_in_the_help(helps, page):
    unknown = [(script, option) for script, arguments in commands(page) if script != "tests/run.sh"
               for option in OPTION.findall(arguments) if option not in helps[help_command(script, arguments)]]
    known = FOREIGN_OPTIONS.union(*helps.values())
    unknown += [option for code in inline_code(page) if code.startswith("-") for option in OPTION.findall(code) if option not in known]
    assert not unknown


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_a_page_and_a_heading(page):
    for target, anchor in LINK.findall(read(page)):
        path = os.path.normpath(os.path.join(os.path.dirname(page), target)) if target else page
        assert os.path.exists(os.path.join(ROOT, path)), path
        assert not anchor or anchor in anchors(path), (path, anchor)


@pytest.mark.parametrize("readme", ["README.md", "README.zh-CN.md"])
def test_readme_is_short_and_names_every_tool_and_page(readme):
    text = read(readme)
    assert text.count("\n") <= 220
    tools = [os.path.relpath(path, ROOT) for path in glob.glob(os.path.join(ROOT, "tools", "*.py"))]
    other = "docs/card.md" if "zh" in readme else "docs/card.zh-CN.md"  # the page in the other language
    assert not [name for name in tools + PAGES if name.startswith(("tools/", "docs/")) and name not in text and name != other]


@pytest.mark.parametrize("english", ["README.md", "docs/card.md"])
def test_both_languages_have_the_same_commands(english):
    assert blocks(english) and blocks(english) == blocks(english.replace(".md", ".zh-CN.md"))


def test_the_example_of_a_data_set_works(tmp_path, monkeypatch):
    code, line = [block for block in blocks("docs/data-sets.md") if "read_mine" in block]
    exec(code, vars(lists))  # into the module, as if it were written there
    monkeypatch.setattr(lists, "SETS", eval("{%s}" % line.strip(), vars(lists)))
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"attributes": ["a", "b"], "train": {"1.png": [0, 0], "2.png": [1, 2]}, "test": {"3.png": [1, 1]}}))
    lists.main(["mine", str(path), "--split", "train", "--output", str(tmp_path)])
    assert json.loads((tmp_path / "label.json").read_text()) == {"1.png": [0, 0], "2.png": [1, 0]}
