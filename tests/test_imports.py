"""Who imports whom: stages and tools import lib, lib imports lib, and nothing imports a stage or a tool."""
import ast
import glob
import os
import subprocess
import sys

from helpers import ROOT

FILES = [os.path.relpath(path, ROOT) for folder in ("", "lib", "lib/gallery", "tools", "tools/run")
         for path in sorted(glob.glob(os.path.join(ROOT, folder, "*.py")))]
SCRIPTS = [path for path in FILES if not path.startswith("lib/")]
OURS = {"lib", "tools", "tests"} | {os.path.basename(path)[:-len(".py")] for path in SCRIPTS}


def tree_of(path):
    with open(os.path.join(ROOT, path), encoding="utf-8") as f:
        return ast.parse(f.read())


def imports_of(path):
    """Returns the first parts of all modules that a file imports anywhere; "." for a relative import."""
    names = set()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add("." if node.level else node.module.partition(".")[0])
    return names


def test_stages_tools_and_lib_import_only_lib():
    exceptions = {"DeepMAR.py": set(), "export_onnx.py": {"DeepMAR"}, "tools/sample.py": {"lib", "DeepMAR"}}
    for path in FILES:
        ours = imports_of(path) & (OURS | {"."})
        assert ours <= exceptions.get(path, {"lib"}), path
    assert os.path.exists(os.path.join(ROOT, "lib/__init__.py")) and os.path.exists(os.path.join(ROOT, "lib/gallery/__init__.py"))


def test_the_checkout_is_put_on_the_path_in_one_line_of_each_script():
    for path in FILES:
        nodes = [node for node in ast.walk(tree_of(path)) if isinstance(node, ast.Attribute) and node.attr == "path"
                 and getattr(node.value, "id", "") == "sys"]
        with open(os.path.join(ROOT, path), encoding="utf-8") as f:
            lines = f.read().split("\n")
        if path in SCRIPTS and "lib" in imports_of(path):
            folder = "os.path.realpath(__file__)"
            for _ in path.split("/"):
                folder = "os.path.dirname(%s)" % folder
            assert [lines[node.lineno - 1] for node in nodes] == ["sys.path.insert(0, %s)" % folder], path
        else:
            assert len(nodes) == (1 if path == "export_onnx.py" else 0), path  # it looks for DeepMAR.py in two layouts


def test_scripts_without_a_network_import_large_libraries_where_they_use_them():
    """--help then answers at once."""
    large = {"torch", "torchvision", "onnx", "onnxruntime", "PIL", "scipy", "ray", "pyarrow"}
    for path in set(FILES) - {"DeepMAR.py"}:
        for node in tree_of(path).body:
            names = {alias.name for alias in node.names} if isinstance(node, ast.Import) else {getattr(node, "module", None)}
            assert not {str(name).partition(".")[0] for name in names} & large, path


def test_scripts_are_found_through_links_from_any_folder(tmp_path):
    """Also where Python may not look for modules in the script's folder."""
    for path in [path for path in SCRIPTS if path != "DeepMAR.py"]:
        link = tmp_path / ("a_" + os.path.basename(path))
        link.symlink_to(os.path.join(ROOT, path))
        process = subprocess.run([sys.executable, str(link), "--help"], cwd=str(tmp_path), env=dict(os.environ, PYTHONSAFEPATH="1"),
                                 stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True)
        assert process.returncode == 0 and process.stdout.startswith("usage: ") and not process.stderr, (path, process.stderr)
