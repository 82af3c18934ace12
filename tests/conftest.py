"""What the tests share: the project's folders on the import path, and a way to run a script as a user would."""
import os
import subprocess
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.join(ROOT, "tools"), os.path.join(ROOT, "tests")]


def script(name, *arguments, cwd=None):
    """Runs ROOT/name with this Python; returns the finished process, its output as text."""
    return subprocess.run([sys.executable, os.path.join(ROOT, name)] + [str(argument) for argument in arguments],
                          cwd=str(cwd) if cwd else None, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          universal_newlines=True)


def check_error(process, *texts, code=1):
    """A failed script ends with its exit code and one line 'SCRIPT: error: ...' that holds the texts; no traceback."""
    assert process.returncode == code, (process.returncode, process.stdout, process.stderr)
    assert "Traceback" not in process.stderr, process.stderr
    lines = process.stderr.strip().split("\n")
    assert ": error: " in lines[-1], process.stderr
    if code == 1:
        assert len(lines) == 1, process.stderr
    for text in texts:
        assert text in process.stderr, process.stderr
