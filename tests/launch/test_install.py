"""Set-up, with real environments, real uv and pip, and an index of toy packages in a folder."""

import base64
import hashlib
import os
import re
import shutil
import stat
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest
import uv
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from launch import install
from launch.install import BUILDS, CPU, CPU_CUDA_TORCH, CUDA, LOCKS, PYTHONS, ROOT, Build, Environment, SetupError
from launch.lock import requirements

VERSION = (sys.version_info[0], sys.version_info[1])
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def wheel(folder: Path, name: str, version: str, asks_for: str = "") -> None:
    """Make a package with one module that contains its version."""
    info = f"{name}-{version}.dist-info"
    asked = f"Requires-Dist: {asks_for}\n" if asks_for else ""
    files = {
        f"{name}.py": f"version = {version!r}\n",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{asked}",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    digests = {path: hashlib.sha256(text.encode()).digest() for path, text in files.items()}
    lines = [
        f"{path},sha256={base64.urlsafe_b64encode(digests[path]).rstrip(b'=').decode()},{len(text)}"
        for path, text in files.items()
    ]
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as archive:
        for path, text in {**files, f"{info}/RECORD": "\n".join([*lines, f"{info}/RECORD,,", ""])}.items():
            archive.writestr(path, text)


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only package index of pip and, through pip's settings, of uv. No test uses the network."""
    folder = tmp_path / "index"
    folder.mkdir()
    for name in [name for name in os.environ if name.startswith(("PIP_", "UV_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("UV_OFFLINE", "1")
    monkeypatch.setenv("UV_CACHE_DIR", str(tmp_path / "uv-cache"))
    # The toy index has no uv: the one that runs this test is found on the PATH.
    monkeypatch.setenv("PATH", f"{Path(uv.find_uv_bin()).parent}{os.pathsep}{os.environ['PATH']}")
    wheel(folder, "torch", "0.1")
    # If dependencies were resolved, this package would be missing.
    wheel(folder, "engine", "1.0", asks_for="nowhere==1.0")
    wheel(folder, "engine", "2.0", asks_for="nowhere==1.0")
    return folder


@pytest.fixture
def locks(tmp_path: Path) -> Path:
    folder = tmp_path / "locks"
    folder.mkdir()
    for build in BUILDS.values():
        text = f"# A lock.\ntorch==0.1\nengine==1.0\n{install.DEV_MARK}\nuv==0.0.1\n"
        # The toy index has no uv, and a missing package would fail the installation.
        install.lock_path(build, VERSION, folder).write_text(text.replace("uv==0.0.1\n", ""))
    return folder


@pytest.fixture(scope="module")
def empty_environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment made once by `python -m venv`, which takes seconds. Every test gets a copy."""
    folder = tmp_path_factory.mktemp("empty") / ".venv"
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    return folder


@pytest.fixture
def environment(tmp_path: Path, empty_environment: Path) -> Environment:
    folder = tmp_path / "clone" / ".venv"
    shutil.copytree(empty_environment, folder, symlinks=True)
    return Environment(folder)


SetUp = Callable[..., None]


BOTH_INSTALLERS = pytest.mark.parametrize("set_up", ["uv", "pip"], indirect=True)


@pytest.fixture(params=["uv"])
def set_up(
    request: pytest.FixtureRequest, environment: Environment, locks: Path, index: Path, monkeypatch: pytest.MonkeyPatch
) -> SetUp:
    """Set-up with either installer, in a clone of the test."""
    monkeypatch.setenv("INSTALLER", request.param)
    # The installer first requests the locked uv, which the toy index does not have.
    monkeypatch.setattr(install, "uv_of", lambda _: "uv==0.0.1" if request.param == "uv" else "")

    def run(engine: str = "cpu", python: tuple[int, int] | None = None) -> None:
        install.set_up(environment, engine, python, locks)

    return run


def installed(environment: Environment, module: str) -> str:
    command = [environment.python, "-c", f"import {module}; print({module}.version)"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


@BOTH_INSTALLERS
def test_the_cpu_build_of_torch_is_taken_where_the_index_has_it(set_up, environment, index, locks, capfd):
    wheel(index, "torch", "0.1+cpu")
    set_up()
    assert installed(environment, "torch") == "0.1+cpu"
    assert installed(environment, "engine") == "1.0"
    assert environment.build() is CPU
    assert install.is_ready(environment, "cpu", VERSION, locks)
    assert not install.is_ready(environment, "cuda", None, locks)
    assert not install.is_ready(environment, "cpu", (3, 10), locks)
    assert CPU.description in capfd.readouterr().out


def test_the_cuda_build_of_torch_takes_its_place_where_the_index_has_no_other(set_up, environment, capfd):
    set_up()
    assert installed(environment, "torch") == "0.1"
    assert environment.build() is CPU_CUDA_TORCH
    said = capfd.readouterr().out
    assert "torch==0.1+cpu cannot be had here" in said
    assert f"{CPU_CUDA_TORCH.disk_bytes / 1e9:.1f} GB" in said


@BOTH_INSTALLERS
def test_what_an_interrupted_installation_left_behind_is_installed_again(set_up, environment, index, locks, capfd):
    wheel(index, "torch", "0.1+cpu")
    set_up()
    (engine,) = environment.folder.glob("lib/python*/site-packages/engine.py")
    # As after a kill in the middle: recorded as installed, but incomplete.
    engine.unlink()
    (environment.folder / ".ready").rename(environment.folder / ".installing")
    assert not install.is_ready(environment, "cpu", None, locks)
    set_up()
    assert installed(environment, "engine") == "1.0"
    assert install.is_ready(environment, "cpu", None, locks)
    assert "making it anew" not in capfd.readouterr().out


def test_a_changed_lock_is_installed_into_the_same_environment(set_up, environment, index, locks):
    wheel(index, "torch", "0.1+cpu")
    set_up()
    (environment.folder / "kept").touch()
    path = install.lock_path(CPU, VERSION, locks)
    path.write_text(path.read_text().replace("engine==1.0", "engine==2.0"))
    assert not install.is_ready(environment, "cpu", None, locks)
    set_up()
    assert installed(environment, "engine") == "2.0"
    assert (environment.folder / "kept").exists()


def half_made(environment: Environment) -> None:
    shutil.rmtree(next(environment.folder.glob("lib/python*/site-packages/pip")))


def without_its_python(environment: Environment) -> None:
    environment.python.unlink()
    environment.python.symlink_to("/nowhere/python3.11")


@pytest.mark.parametrize("break_it", [half_made, without_its_python])
def test_a_broken_environment_is_made_anew(set_up, environment, index, locks, capfd, break_it):
    wheel(index, "torch", "0.1+cpu")
    set_up()
    break_it(environment)
    assert not install.is_ready(environment, "cpu", None, locks)
    set_up()
    assert installed(environment, "engine") == "1.0"
    assert "is not usable; making it anew" in capfd.readouterr().out


def test_another_engine_gets_a_fresh_environment(set_up, environment, index, capfd):
    wheel(index, "torch", "0.1+cpu")
    set_up()
    (environment.folder / "left_over").touch()
    set_up("cuda")
    assert environment.build() is CUDA
    assert installed(environment, "torch") == "0.1+cpu"
    assert not (environment.folder / "left_over").exists()
    assert "was made for ENGINE=cpu; making it anew" in capfd.readouterr().out


@BOTH_INSTALLERS
def test_a_package_that_is_missing_ends_set_up_with_one_sentence_and_can_go_on(set_up, environment, index, locks):
    wheel(index, "torch", "0.1+cpu")
    path = install.lock_path(CPU, VERSION, locks)
    path.write_text(path.read_text().replace("engine==1.0", "engine==3.0"))
    with pytest.raises(SetupError, match=r"could not install .* run the same command to go on"):
        set_up()
    assert not install.is_ready(environment, "cpu", None, locks)
    wheel(index, "engine", "3.0")
    set_up()
    assert installed(environment, "engine") == "3.0"


@pytest.mark.parametrize("installer", ["uv", "pip"])
@pytest.mark.parametrize(
    ("variable", "value", "sentence"),
    [
        ("PIP_INDEX_URL", "http://127.0.0.1:9/simple", "could not be reached .*set HTTPS_PROXY.*PIP_INDEX_URL"),
        ("HTTPS_PROXY", "http://me:secret@127.0.0.1:9", r"HTTPS_PROXY=http://\*\*\*@127.0.0.1:9; check that proxy"),
    ],
)
def test_an_index_that_cannot_be_reached_is_one_sentence(
    installer: str, variable: str, value: str, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for name in [name for name in os.environ if name.startswith(("PIP_", "UV_")) or name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    # pip prints the cause of every failed attempt but the last.
    monkeypatch.setenv("PIP_RETRIES", "1")
    monkeypatch.setenv("UV_HTTP_RETRIES", "0")
    monkeypatch.setenv("UV_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv(variable, value)
    asking = install.Installer(Path(sys.executable), "")
    if installer == "uv":
        asking._uv = [uv.find_uv_bin()]
        asking.environment |= install.uv_settings({"index-url": os.environ.get("PIP_INDEX_URL", "")}, {})
    with pytest.raises(SetupError, match=sentence) as caught:
        asking.offers("nothing-has-this-name==1.0")
    assert "secret" not in str(caught.value)


def test_pips_settings_reach_uv_and_what_the_user_set_for_uv_stays():
    listing = """:env:.find-links='/wheels /more'
global.cert='/certificates.pem'
global.extra-index-url='https://one/simple\\nhttps://two/simple'
global.index-url='https://mirror/global'
install.index-url='https://mirror/simple'
global.proxy='http://proxy:3128'
"""
    settings = install.parse_pip_settings(listing)
    assert install.uv_settings(settings, {"UV_FIND_LINKS": "/mine", "https_proxy": "http://other"}) == {
        "UV_DEFAULT_INDEX": "https://mirror/simple",
        "UV_INDEX": "https://one/simple https://two/simple",
        "UV_INDEX_STRATEGY": "unsafe-best-match",
        "SSL_CERT_FILE": "/certificates.pem",
        "HTTP_PROXY": "http://proxy:3128",
    }
    assert install.uv_settings(settings, {})["UV_FIND_LINKS"] == "/wheels,/more"


@pytest.mark.parametrize(
    ("machine", "sentence"),
    [
        (("Darwin", "arm64", ("", ""), "cpython"), "runs on Linux; this is Darwin"),
        (("Windows", "AMD64", ("", ""), "cpython"), "WSL"),
        (("Linux", "aarch64", ("glibc", "2.36"), "cpython"), "this machine is aarch64"),
        (("Linux", "x86_64", ("", ""), "cpython"), "this system has none"),
        (("Linux", "x86_64", ("glibc", "2.17"), "cpython"), "this system has glibc 2.17"),
        (("Linux", "x86_64", ("glibc", "2.36"), "pypy"), "this Python is pypy"),
    ],
)
def test_machines_without_wheels_are_refused(machine: tuple, sentence: str):
    with pytest.raises(SetupError, match=sentence):
        install.check_machine(*machine)
    install.check_machine("Linux", "x86_64", ("glibc", "2.36"), "cpython")


def test_an_engine_is_chosen_by_the_driver_and_by_name(tmp_path: Path):
    path = tmp_path / "version"
    assert install.driver_branch(path) is None
    path.write_text(
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build\nGCC version: 12"
    )
    assert install.driver_branch(path) == 580
    path.write_text("unreadable")
    assert install.driver_branch(path) == 0
    assert [install.wanted_engine("", branch) for branch in (None, 0, 580)] == ["cpu", "cuda", "cuda"]
    assert install.wanted_engine("cpu", 580) == "cpu"
    with pytest.raises(SetupError, match=r"ENGINE=rocm is unknown"):
        install.wanted_engine("rocm", None)


def test_an_old_driver_is_named(capsys):
    install.warn_of_old_driver(550)
    assert "branch 550" in capsys.readouterr().out
    install.warn_of_old_driver(580)
    install.warn_of_old_driver(0)
    assert capsys.readouterr().out == ""


def test_too_little_room_is_refused_with_both_figures(tmp_path: Path):
    with pytest.raises(SetupError, match=r"needs 1000000000\.0 GB .* GB are free"):
        install.check_disk(tmp_path, 10**18)


def test_a_python_that_cannot_make_environments_is_named(set_up, monkeypatch, environment):
    find_spec = install.importlib.util.find_spec
    monkeypatch.setattr(install.importlib.util, "find_spec", lambda n: None if n == "ensurepip" else find_spec(n))
    shutil.rmtree(environment.folder)
    with pytest.raises(SetupError, match=rf"python3\.{VERSION[1]}-venv"):
        set_up()
    assert not environment.folder.exists()


def set_up_script(tmp_path: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run setup.sh in a clone whose installer prints its interpreter and arguments."""
    launch = tmp_path / "launch"
    launch.mkdir(exist_ok=True)
    shutil.copy(ROOT / "launch" / "setup.sh", launch)
    (launch / "install.py").write_text("import sys; print(sys.version_info[:2], sys.argv[1:])")
    command = ["/bin/bash", str(launch / "setup.sh")]
    return subprocess.run(command, env=variables, capture_output=True, text=True, check=False)


def stub(folder: Path, name: str, version: str) -> Path:
    """An interpreter with an unsupported version."""
    path = folder / name
    path.write_text(f'#!/bin/sh\n[ "$1" = --version ] && echo "Python {version}"\nexit 1\n')
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def test_an_interpreter_is_found_by_name_by_path_and_in_the_environment(tmp_path: Path):
    system = "/usr/bin:/bin"
    named = set_up_script(tmp_path, PATH=system, PYTHON=sys.executable)
    assert named.stdout == f"{VERSION} ['--same-python']\n"
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "python").symlink_to(sys.executable)
    assert set_up_script(tmp_path, PATH=system).stdout == f"{VERSION} []\n"


def test_an_interpreter_that_does_not_fit_is_one_sentence(tmp_path: Path):
    old = stub(tmp_path, "old", "3.8.18")
    result = set_up_script(tmp_path, PATH="/usr/bin:/bin", PYTHON=str(old))
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == f"error: PYTHON={old} is Python 3.8.18; Slipstream needs Python 3.11, 3.12 or 3.13\n"
    result = set_up_script(tmp_path, PATH="/usr/bin:/bin", PYTHON="nonsense")
    assert result.stderr.startswith("error: PYTHON=nonsense was not found")
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("dirname", "head"):
        (tools / name).symlink_to(str(shutil.which(name)))
    stub(tools, "python3.12", "3.12.0")
    result = set_up_script(tmp_path, PATH=str(tools))
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert "no Python 3.11, 3.12 or 3.13 was found" in result.stderr


@pytest.mark.parametrize("version", PYTHONS)
@pytest.mark.parametrize("build", BUILDS.values(), ids=lambda build: build.lock)
def test_a_lock_keeps_to_the_ranges(build: Build, version: tuple[int, int]):
    lines = [Requirement(line) for line in install.locked(install.lock_path(build, version), dev=True)]
    versions = {line.name.lower().replace("_", "-"): str(line.specifier).removeprefix("==") for line in lines}
    assert len(versions) == len(lines)
    for text in requirements(build.engine, dev=True):
        wanted = Requirement(text)
        assert wanted.specifier.contains(versions[wanted.name.lower().replace("_", "-")]), text
    for_runs = install.locked(install.lock_path(build, version), dev=False)
    assert not any(line.startswith(("pytest==", "ruff==", "uv==")) for line in for_runs)
    assert any(line.startswith("vllm") for line in for_runs)
    has_cuda_libraries = any(line.startswith("nvidia-cublas") for line in for_runs)
    assert has_cuda_libraries == (build is not CPU)


def test_there_is_a_lock_for_every_python_that_the_project_names_and_no_other():
    names = {install.lock_path(build, version).name for build in BUILDS.values() for version in PYTHONS}
    assert {path.name for path in LOCKS.iterdir()} == names
    supported = SpecifierSet(PROJECT["requires-python"])
    assert [minor for minor in range(30) if supported.contains(f"3.{minor}")] == [minor for _, minor in PYTHONS]


def test_this_environment_is_the_one_that_is_locked():
    record = Environment(Path(sys.prefix)).build()
    if record is None:
        pytest.skip("this environment was not made by set-up")
    lines = install.locked(install.lock_path(record, VERSION), dev=True)
    found = {name: metadata.version(name) for name in (line.partition("==")[0] for line in lines)}
    found["torch"] = re.sub(r"\+.*", "", found["torch"])
    assert [f"{name}=={version}" for name, version in found.items()] == lines


def has_index(folder: Path) -> bool:
    """Whether a package index can be reached."""
    command = [uv.find_uv_bin(), "pip", "install", "--dry-run", "--no-deps", "--target", str(folder), "six"]
    return subprocess.run(command, capture_output=True, check=False, timeout=60).returncode == 0


@pytest.mark.parametrize("version", PYTHONS)
def test_the_cuda_packages_resolve(version: tuple[int, int], tmp_path: Path):
    if not has_index(tmp_path):
        pytest.skip("no package index can be reached")
    platform = ["--python-version", f"{version[0]}.{version[1]}", "--python-platform", "x86_64-manylinux_2_28"]
    command = [uv.find_uv_bin(), "pip", "install", "--dry-run", "--target", str(tmp_path / "target"), *platform]
    ranges = subprocess.run([*command, *requirements("cuda", dev=False)], capture_output=True, text=True, check=False)
    assert ranges.returncode == 0, ranges.stderr
    assert re.search(r"^ \+ vllm==", ranges.stderr, re.MULTILINE)
    # Checks also that no locked release was withdrawn.
    lock = ["--no-deps", "--requirement", str(install.lock_path(CUDA, version))]
    exact = subprocess.run([*command, *lock], capture_output=True, text=True, check=False)
    assert exact.returncode == 0, exact.stderr


def test_the_launcher_without_its_packages_says_where_they_are(empty_environment: Path):
    command = [empty_environment / "bin" / "python", ROOT / "launch" / "cluster.py", "algorithm=grpo"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert "has no hydra, omegaconf, rich, torch, vllm; " in result.stderr


def test_the_wheel_holds_every_package_with_its_files_and_can_install_an_engine(tmp_path: Path):
    # From tracked files and outside the tree, because a build leaves folders behind.
    source = tmp_path / "source"
    for name in subprocess.check_output(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, text=True).split():
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "--wheel-dir", str(tmp_path), str(source)], check=True)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as archive:
        archive.extractall(tmp_path / "site")
    kept = ("*.py", "*.yaml", "locks/*.txt")
    for package in ("actors", "buffer", "configs", "launch", "learner", "verifier"):
        files = {path.relative_to(source) for pattern in kept for path in (source / package).rglob(pattern)}
        assert files == {
            path.relative_to(tmp_path / "site" / "slipstream")
            for pattern in kept
            for path in (tmp_path / "site" / "slipstream" / package).rglob(pattern)
        }
    script = "import slipstream.launch.install as install; print(len(list(install.LOCKS.iterdir())))"
    environment = {"PYTHONPATH": str(tmp_path / "site"), "PATH": os.environ["PATH"]}
    found = subprocess.check_output([sys.executable, "-c", script], env=environment, text=True, cwd=tmp_path)
    assert int(found) == len(PYTHONS) * len(BUILDS)
