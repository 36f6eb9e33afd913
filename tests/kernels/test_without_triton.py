"""Where Triton is not installed (macOS, Windows) every op computes, compiles and has gradients, and nothing but speed is lost."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WITHOUT = "import sys\nsys.modules['triton'] = None  # import raises ModuleNotFoundError, find_spec finds nothing\n"


def python(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", WITHOUT + code], cwd=ROOT, capture_output=True, text=True)


def test_every_op_equals_its_reference_eager_and_compiled():
    done = python("import runpy; runpy.run_module('tests.kernels.ops_without_triton', run_name='__main__')")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr == ""
    assert done.stdout == "Triton is not installed: on this GPU the kernels run eagerly and slowly (pip install triton)\n"


def test_what_cannot_run_says_so_in_one_line():
    done = python("from bench import static_check; sys.exit(static_check.main([]))")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: Triton is not installed here (pip install triton)\n"


def test_a_broken_triton_is_not_taken_for_none(tmp_path):
    package = tmp_path / "triton"
    package.mkdir()
    (package / "__init__.py").write_text("import a_library_that_is_not_here\n")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import kernels.language"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "ModuleNotFoundError: No module named 'a_library_that_is_not_here'"
