"""The commands of ``python -m cmlib``: what they say when they cannot go on, when they install again, what they need to start."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import nbformat
import pytest

from cmlib import house
from cmlib.__main__ import version_error
from cmlib.house import install, process, server
from cmlib.house.process import HouseError
from cmlib.house.tally import Tally, duration

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def no_interpreter_of_the_users(monkeypatch):
    monkeypatch.delenv("CMLIB_PYTHON", raising=False)


# What starts before anything is installed


def test_an_old_python_gets_a_sentence():
    said = version_error((3, 9), "/usr/bin/python3")
    assert "3.11 or newer" in said and "/usr/bin/python3 is 3.9" in said and "make lab PYTHON=" in said
    assert version_error((3, 11), "python") is None


def test_main_is_written_for_any_python_3():
    import ast

    ast.parse((ROOT / "cmlib/__main__.py").read_text(), feature_version=(3, 4))


def test_commands_import_the_standard_library_alone():
    code = "import sys, cmlib.__main__, cmlib.house; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    isolated = [sys.executable, "-S", "-c", code]
    found = subprocess.run(isolated, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    strange = set(found) - set(sys.stdlib_module_names) - {"cmlib", "__main__"}
    assert not strange


def test_without_a_command_help_is_shown(capsys):
    assert house.main([]) == 0
    shown = capsys.readouterr().out
    assert all(f"  {name} " in shown for name in house.COMMANDS)


@pytest.mark.parametrize(("args", "said"), [(["lap"], "no command 'lap'; there are setup, lab"), (["setup", "now"], "takes no arguments")])
def test_a_wrong_command_is_one_line(args, said, capsys):
    assert house.main(args) == 2
    shown = capsys.readouterr().err
    assert said in shown and shown.count("\n") == 1


def test_makefile_calls_the_commands():
    makefile = (ROOT / "Makefile").read_text()
    named = re.search(r"^COMMANDS = (.*)$", makefile, re.M).group(1).split()
    assert set(named) == set(house.COMMANDS) - {"voila"}
    assert "@$(PYTHON) -m cmlib $@ $(ARGS)" in makefile


def test_requirements_agree_with_each_other():
    def names(lines):
        return {re.match(r"[\w-]+", line).group().lower() for line in lines if line and not line.startswith("#")}

    wanted = (ROOT / "requirements.txt").read_text().splitlines()
    runtime = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    tested = (ROOT / "constraints.txt").read_text().splitlines()
    assert set(runtime) <= set(wanted)
    assert names(wanted) <= names(tested)
    assert not any(re.match(r"nvidia|cuda|triton", line) or "+" in line.partition(";")[0] for line in tested if not line.startswith("#"))


# The environment: installed once, again only where something has changed


class Pip:
    """Stands for venv and pip: notes the commands, makes the folder that venv would, fails where told to."""

    def __init__(self):
        self.calls, self.failing = [], ""

    def __call__(self, command):
        words = " ".join(map(str, command))
        self.calls.append(words)
        if "-m venv" in words:
            python = install.interpreter(Path(command[-1]))
            python.parent.mkdir(parents=True)
            python.touch()
        return 1 if self.failing and self.failing in words else 0


@pytest.fixture
def project(tmp_path):
    for name in install.REQUIRED:
        (tmp_path / name).write_text(name)
    pip = Pip()

    def setup(version="3.11.2"):
        pip.calls.clear()
        python = install.environment(tmp_path, call=pip, probe=lambda python: version if python.exists() else "")
        assert python == install.interpreter(tmp_path / ".venv")
        return pip.calls

    setup.pip, setup.root, setup.stamp = pip, tmp_path, tmp_path / ".venv/cmlib.stamp"
    return setup


def test_a_second_setup_does_nothing(project):
    made, requirements, itself, _ = project()
    assert "-m venv" in made
    assert f"-r {project.root / 'requirements.txt'} -c {project.root / 'constraints.txt'}" in requirements
    assert itself.endswith(f"-e {project.root}")
    assert project() == []


@pytest.mark.parametrize("name", install.REQUIRED)
def test_a_changed_file_installs_again_into_the_same_environment(project, name):
    project()
    (project.root / name).write_text("changed")
    again = project()
    assert again and not any("-m venv" in call for call in again)
    assert project() == []


def test_another_python_installs_again(project):
    project()
    assert project(version="3.12.1") and project(version="3.12.1") == []


def test_a_failed_installation_leaves_no_stamp(project):
    project()
    (project.root / "requirements.txt").write_text("changed")
    project.pip.failing = "-r "
    with pytest.raises(HouseError, match=r"exit status 1.*run 'python3 -m cmlib setup' again"):
        project()
    assert not project.stamp.exists()
    project.pip.failing = ""
    assert project() and project.stamp.exists()


def test_a_python_without_venv_says_what_to_install(project, monkeypatch):
    monkeypatch.setattr(install, "find_spec", lambda name: None if name == "ensurepip" else name)
    with pytest.raises(HouseError, match="apt install python3-venv"):
        project()


def test_a_broken_interpreter_is_no_interpreter(tmp_path):
    (tmp_path / "python").symlink_to(tmp_path / "gone")
    assert install.probe(tmp_path / "python") == ""
    assert install.ask(sys.executable, "print('here')") == "here"


def test_the_users_own_interpreter_is_checked_and_left_alone(monkeypatch):
    pip = Pip()
    monkeypatch.setenv("CMLIB_PYTHON", sys.executable)
    monkeypatch.setattr(install, "IMPORTS", ("json", "no_such_module"))
    with pytest.raises(HouseError, match="lacks no_such_module; install there"):
        install.environment(call=pip)
    monkeypatch.setattr(install, "IMPORTS", ("json",))
    assert install.environment(call=pip) == Path(sys.executable) and not pip.calls
    monkeypatch.setenv("CMLIB_PYTHON", "/no/such/python")
    with pytest.raises(HouseError, match="no such Python"):
        install.environment(call=pip)


# Servers and child processes


@pytest.fixture
def taken():
    """A port that somebody listens on."""
    with socket.socket() as listener:
        listener.bind((server.LOOPBACK, 0))
        listener.listen()
        yield listener.getsockname()[1]


def test_a_port_in_use_is_named_with_the_way_out(taken, monkeypatch, capsys):
    monkeypatch.setattr(house, "environment", lambda: Path("python"))
    assert house.main(["lab", "--port", str(taken)]) == 2
    said = capsys.readouterr().err
    assert f"port {taken} is in use; choose another with --port" in said and said.count("\n") == 1


def test_without_a_wish_the_next_free_port_is_taken(taken):
    assert taken < server.choose_port(None, taken) < 65536


@pytest.mark.parametrize("port", ["0", "65536", "-1", "lab"])
def test_no_port_is_refused(port, capsys):
    with pytest.raises(SystemExit):
        house.main(["lab", f"--port={port}"])
    assert "1 to 65535" in capsys.readouterr().err


def test_a_server_that_ends_while_starting_is_told(capfd):
    with pytest.raises(HouseError, match=r"Lab ended while starting \(exit status 3\)"):
        server.serve("Lab", [sys.executable, "-c", "raise SystemExit(3)"], 1, "/", browser=True)


def test_a_child_does_not_outlive_its_block():
    with process.running([sys.executable, "-c", "import time; time.sleep(60)"]) as child:
        assert child.poll() is None
    assert child.poll() is not None


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ties a child to a parent that is killed")
def test_a_child_does_not_outlive_a_killed_parent():
    code = """
import sys
from cmlib.house.process import running
with running([sys.executable, "-c", "import time; time.sleep(60)"]) as child:
    print(child.pid, flush=True)
    child.wait()
"""
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True) as parent:
        child = int(parent.stdout.readline())
        parent.send_signal(signal.SIGKILL)
    end = time.monotonic() + 10
    while alive(child) and time.monotonic() < end:
        time.sleep(0.05)
    assert not alive(child)


def alive(pid: int) -> bool:
    """Whether the process runs; one that has ended and waits to be collected does not."""
    stat = Path(f"/proc/{pid}/stat")
    try:
        return stat.read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


# Counting and running


def test_runs_are_counted_together(tmp_path):
    tally = Tally()
    for name, numbers in (("one", (10, 1, 1, 2)), ("two", (5, 0, 0, 1))):
        tests, failures, errors, skipped = numbers
        report = tmp_path / f"{name}.xml"
        counts = f'tests="{tests}" failures="{failures}" errors="{errors}" skipped="{skipped}"'
        report.write_text(f"<testsuites><testsuite {counts}/></testsuites>")
        tally.add(name, int(failures > 0), report)
    assert tally.summary(372) == "cmlib test: 10 passed, 3 skipped, 2 failed in 6 min 12 s"
    assert tally.status == 1


def test_a_run_that_breaks_off_fails_the_whole(tmp_path):
    tally = Tally()
    tally.add("notebooks", 4, tmp_path / "none.xml")
    assert tally.status == 4
    assert tally.summary(3.2) == "cmlib test: 0 passed, 0 skipped, 0 failed, broken off: notebooks (exit status 4) in 3 s"


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """The runs of pytest that ``test`` would make in a project with one test of each sort."""
    for name in ("notebooks/a.ipynb", "tests/browser/test_a.py"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).touch()
    made = []
    monkeypatch.setattr(house, "ROOT", tmp_path)
    monkeypatch.setattr(house, "environment", lambda: Path("python"))
    monkeypatch.setattr(Tally, "pytest", lambda self, python, name, *args, **env: made.append((name, " ".join(args))))
    return made


def test_all_tests_are_three_runs(runs, monkeypatch, capsys):
    monkeypatch.setattr(house, "chromium", lambda python: "chromium")
    assert house.main(["test"]) == 0
    workers = "-n 2 --dist loadfile"
    assert runs == [
        ("tests", f"-p no:nbval --ignore=tests/browser {workers}"),
        ("notebooks", f"--nbval-lax --nbval-cell-timeout=120 {workers} notebooks"),
        ("browser", f"{workers} tests/browser"),
    ]
    assert capsys.readouterr().out == "cmlib test: 0 passed, 0 skipped, 0 failed in 0 s\n"


def test_without_chromium_one_line_says_what_is_left_out(runs, monkeypatch, capsys):
    monkeypatch.setattr(house, "chromium", lambda python: "")
    house.main(["test"])
    left_out, last = capsys.readouterr().out.splitlines()
    assert "left out: tests/browser" in left_out and "apt install chromium" in left_out and last.startswith("cmlib test:")
    assert [name for name, _ in runs] == ["tests", "notebooks"]


def test_arguments_go_to_pytest_alone(runs):
    house.main(["test", "tests/test_house.py", "-x"])
    assert runs == [("tests", "-n 2 --dist loadfile tests/test_house.py -x")]


def test_chromium_is_looked_for(monkeypatch):
    monkeypatch.delenv("CMLIB_CHROMIUM", raising=False)
    monkeypatch.setattr(install.shutil, "which", lambda name: "/bin/found" if name == "google-chrome" else None)
    assert install.chromium(Path("python")) == "/bin/found"
    monkeypatch.setenv("CMLIB_CHROMIUM", "/no/such/browser")
    with pytest.raises(HouseError, match="CMLIB_CHROMIUM=/no/such/browser: no such program"):
        install.chromium(Path("python"))


def test_durations_read_well():
    assert [duration(s) for s in (0.4, 59.6, 61)] == ["0 s", "1 min 0 s", "1 min 1 s"]


def test_a_failing_cell_is_named_and_the_notebook_stays(tmp_path):
    from cmlib.house.execute import CellError, execute

    def notebook(*cells):
        path = tmp_path / "small.ipynb"
        nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells]), path)
        return path

    path = notebook("a = 1", "a / 0")
    before = path.read_bytes()
    with pytest.raises(CellError, match=r"small.ipynb, cell 2 \(a / 0\): ZeroDivisionError"):
        execute(path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["small.ipynb"]
    execute(notebook("6 * 7"))
    assert nbformat.read(path, as_version=4).cells[0].outputs[0].data["text/plain"] == "42"


# The data's papers


def test_the_data_page_names_the_files_that_the_loader_accepts():
    from cmlib.lab.data import DATASETS, IDX_SHA256

    page = (DATASETS / "README.md").read_text()
    rows = {name: (int(size.replace(",", "")), sha) for name, size, sha in re.findall(r"\| `(\S+\.gz)` \| ([\d,]+) \| `(\w{64})` \|", page)}
    assert {name: sha for name, (_, sha) in rows.items()} == IDX_SHA256
    assert all((DATASETS / name).stat().st_size == size for name, (size, _) in rows.items())
