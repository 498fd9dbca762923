"""Set-up: installs the packages of a lock into `.venv` at the root, or into the environment of this interpreter.

    python launch/install.py                      make or complete .venv (`make` calls this through launch/setup.sh)
    python -m slipstream.launch.install --here    install the tested packages and vLLM into this environment

Uses the standard library only, because it runs before any package is installed. A lock in `launch/locks/` lists every
package with the tested version, so no versions are resolved. There is one lock per Python version and build:

* `cpu`: vLLM for CPUs and torch's CPU build, from the user's package index or, through uv, from PyTorch's own.
* `cpu-cuda-torch`: vLLM for CPUs and torch's CUDA build, if no index offers the CPU build. It runs on the CPU.
* `cuda`: vLLM for CUDA.

Safe to repeat and to interrupt. Exit status: 0; 2 with one sentence on a problem the user can solve; 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import fcntl
import hashlib
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCKS = Path(__file__).resolve().parent / "locks"
PYTHONS = ((3, 11), (3, 12), (3, 13))
DEV_MARK = "# Tests, lint and docs only:"
"""Line of a lock above the packages that a run does not need."""
PROBE_SECONDS = 20.0
"""How long to wait for PyTorch's own index when asking it for the CPU build."""
MIN_CUDA_DRIVER = 580
"""First driver branch for CUDA 13, with which the locked torch and vLLM are built."""


class SetupError(Exception):
    """A problem that the user can solve. The message is one sentence: what is wrong, and the way out."""


@dataclass(frozen=True)
class Build:
    """A set of packages that were tested together."""

    lock: str
    """Beginning of the names of its locks."""
    engine: str
    """cpu | cuda: the vLLM engine."""
    torch: str
    """Suffix of torch's version; empty: the build that the index offers without a suffix."""
    disk_bytes: int
    """Installed size, measured with Python 3.12."""
    description: str


CPU = Build("cpu", "cpu", "+cpu", 3_400_000_000, "vLLM for CPUs and torch's CPU build")
CPU_CUDA_TORCH = Build("cpu-cuda-torch", "cpu", "", 6_900_000_000, "vLLM for CPUs and torch's CUDA build")
CUDA = Build("cuda", "cuda", "", 8_900_000_000, "vLLM and torch for CUDA")
BUILDS = {build.lock: build for build in (CPU, CPU_CUDA_TORCH, CUDA)}


def lock_path(build: Build, version: Sequence[int], folder: Path = LOCKS) -> Path:
    """The lock of `build` for a Python version, of which the first two numbers are used."""
    return folder / f"{build.lock}-{version[0]}.{version[1]}.txt"


def locked(path: Path, *, dev: bool) -> list[str]:
    """The requirements in a lock, `name==version` each. `dev` includes those for tests, lint and docs."""
    run, _, dev_only = path.read_text(encoding="utf-8").partition(DEV_MARK)
    lines = (run + dev_only if dev else run).splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def check_machine(system: str, machine: str, libc: tuple[str, str], python: str) -> None:
    """Check that the locked packages exist for this machine and interpreter.

    Args:
        system: from `platform.system`.
        machine: from `platform.machine`.
        libc: from `platform.libc_ver`.
        python: from `interpreter_kind`.

    Raises:
        SetupError: they do not exist.
    """
    if system != "Linux":
        raise SetupError(
            f"Slipstream runs on Linux; this is {system}, for which vLLM has no wheels: use a Linux machine, a"
            " container, or WSL on Windows"
        )
    if machine != "x86_64":
        raise SetupError(
            f"set-up was tested on x86-64 only and this machine is {machine}; on aarch64 wheels of all packages exist"
            " but are untested with Slipstream: to try them, run `pip install '.[cuda]'` in an environment of your own"
        )
    if python != "cpython":
        raise SetupError(f"this Python is {python}, for which torch and vLLM have no wheels; use the standard CPython")
    name, version = libc
    if name != "glibc" or tuple(map(int, version.split(".")[:2])) < (2, 28):
        raise SetupError(
            f"torch and vLLM need glibc 2.28 or newer and this system has {f'{name} {version}'.strip() or 'none'};"
            " use a newer distribution or container (Debian 10, Ubuntu 20.04, RHEL 8 and later have it)"
        )


def interpreter_kind() -> str:
    """`cpython`, or the kind of interpreter for which there are no wheels."""
    if sysconfig.get_config_var("Py_GIL_DISABLED"):
        return "free-threaded CPython"
    return sys.implementation.name


def driver_branch(path: Path = Path("/proc/driver/nvidia/version")) -> int | None:
    """The branch of the loaded NVIDIA driver, such as 580 of 580.65.06; 0 if unknown; None without a driver."""
    if not path.exists():
        return None
    match = re.search(r"\b(\d{3,})\.\d+", path.read_text(encoding="utf-8", errors="replace"))
    return int(match[1]) if match else 0


def wanted_engine(asked: str, branch: int | None) -> str:
    """`cpu` or `cuda`.

    Args:
        asked: `cpu`, `cuda`, or empty: `cuda` if a driver is loaded.
        branch: from `driver_branch`.

    Raises:
        SetupError: `asked` is another name.
    """
    if asked not in ("", "cpu", "cuda"):
        raise SetupError(f"ENGINE={asked} is unknown; use ENGINE=cpu or ENGINE=cuda")
    return asked or ("cpu" if branch is None else "cuda")


def uv_settings(pip_settings: Mapping[str, str], environment: Mapping[str, str]) -> dict[str, str]:
    """Environment variables that make uv use the same indexes as pip, whose settings uv does not read.

    Args:
        pip_settings: values by name, as in pip's configuration (`index-url`).
        environment: variables that are set already; they are not overridden.
    """
    words = {name: value.split() for name, value in pip_settings.items()}
    first = {name: values[0] for name, values in words.items() if values}
    wanted = {
        "UV_DEFAULT_INDEX": first.get("index-url"),
        "UV_INDEX": " ".join(words.get("extra-index-url", [])),
        "UV_FIND_LINKS": ",".join(words.get("find-links", [])),
        "UV_INSECURE_HOST": " ".join(words.get("trusted-host", [])),
        "UV_NO_INDEX": "1" if first.get("no-index", "").lower() in ("1", "true", "yes", "on") else None,
        "SSL_CERT_FILE": first.get("cert"),
        "SSL_CLIENT_CERT": first.get("client-cert"),
        "HTTPS_PROXY": first.get("proxy"),
        "HTTP_PROXY": first.get("proxy"),
        # pip takes the best version of all indexes. uv by default stops at the first index that has the package.
        "UV_INDEX_STRATEGY": "unsafe-best-match" if words.get("extra-index-url") else None,
    }
    return {
        name: value
        for name, value in wanted.items()
        if value and name not in environment and name.lower() not in environment
    }


def parse_pip_settings(listing: str) -> dict[str, str]:
    """The settings in the output of `pip config list`. Environment overrides the section install, and that global."""
    found: dict[str, str] = {}
    for section in ("global", "install", ":env:"):
        for line in listing.splitlines():
            name, separator, value = line.partition("=")
            if separator and name.startswith(f"{section}."):
                found[name.removeprefix(f"{section}.")] = str(ast.literal_eval(value))
    return found


NETWORK_ERRORS = re.compile(
    r"(dns error|failed to lookup|Name or service not known|name resolution|Temporary failure|Connection refused"
    r"|Connection reset|Network is unreachable|timed out|error sending request|client error \(Connect\)"
    r"|Failed to establish a new connection|Max retries exceeded|ProxyError|Cannot connect to proxy|tunnel"
    r"|CERTIFICATE_VERIFY_FAILED|invalid peer certificate)",
    re.IGNORECASE,
)


def explain(output: str, environment: Mapping[str, str]) -> str:
    """One sentence on a network error in the output of pip or uv; empty if there is none."""
    found = NETWORK_ERRORS.search(output)
    if not found:
        return ""
    if "certificate" in found[1].lower():
        return (
            f"the package index's certificate was not accepted ({found[1]}); behind a proxy that replaces"
            " certificates set SSL_CERT_FILE and PIP_CERT to the proxy's own"
        )
    proxies = {name.upper(): environment[name] for name in environment if name.lower() in ("https_proxy", "all_proxy")}
    through = ", ".join(f"{name}={without_password(value)}" for name, value in proxies.items() if value)
    way_out = (
        f"it was asked through {through}; check that proxy"
        if through
        else "check the network; behind a proxy set HTTPS_PROXY, for a mirror set PIP_INDEX_URL"
    )
    return f"the package index could not be reached ({found[1]}); {way_out}"


def without_password(url: str) -> str:
    """A URL without its user name and password."""
    return re.sub(r"//[^/@]*@", "//***@", url)


def say(text: str) -> None:
    """Print a line of progress."""
    print(f"setup: {text}", flush=True)


class Installer:
    """Installs packages into one environment, with uv or, if uv is not available, with pip.

    Args:
        python: the environment's interpreter.
        uv_requirement: the version of uv to install there; empty: use pip.

    Raises:
        SetupError: neither is available.
    """

    def __init__(self, python: Path, uv_requirement: str) -> None:
        self.python = python
        # With PIP_USER=1, pip refuses to install into an environment.
        self.environment = {**os.environ, "PIP_USER": "0", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
        self._pip = [str(python), "-m", "pip"]
        has_pip = subprocess.run([*self._pip, "--version"], capture_output=True, check=False).returncode == 0
        self._uv = self._find_uv(uv_requirement, has_pip) if uv_requirement else []
        if not self._uv and not has_pip:
            raise SetupError(f"{python} has neither pip nor uv; add one: {python} -m ensurepip")
        if self._uv and has_pip:
            listing = self._captured([*self._pip, "config", "list"]).stdout
            self.environment |= uv_settings(parse_pip_settings(listing), self.environment)

    @property
    def is_uv(self) -> bool:
        """Whether this is uv. Only uv knows the address of PyTorch's own index."""
        return bool(self._uv)

    def _find_uv(self, requirement: str, has_pip: bool) -> list[str]:
        if has_pip:
            result = self._captured([*self._pip, "install", "--quiet", requirement])
            if result.returncode == 0:
                return [str(self.python), "-m", "uv"]
            if sentence := explain(result.stderr, self.environment):
                raise SetupError(sentence)
        found = shutil.which("uv")
        return [found] if found else []

    def _captured(
        self, command: Sequence[str], *, more: Mapping[str, str] | None = None, timeout: float | None = None
    ) -> subprocess.CompletedProcess[str]:
        environment = self.environment | dict(more or {})
        return subprocess.run(
            command, env=environment, capture_output=True, text=True, errors="replace", timeout=timeout, check=False
        )

    def offers(self, requirement: str) -> bool:
        """Whether the user's package index has `requirement` for this interpreter.

        Raises:
            SetupError: the index could not be reached.
        """
        options = ["install", "--dry-run", "--no-deps", requirement]
        if self._uv:
            result = self._captured([*self._uv, "pip", *options, "--python", str(self.python)])
        else:
            result = self._captured([*self._pip, *options])
        if result.returncode and (sentence := explain(result.stderr, self.environment)):
            raise SetupError(sentence)
        return result.returncode == 0

    def torch_index_offers(self, requirement: str) -> bool:
        """Whether PyTorch's own index can be reached and has `requirement`."""
        command = [*self._uv, "pip", "install", "--dry-run", "--no-deps", "--torch-backend=cpu", requirement]
        quick = {"UV_HTTP_TIMEOUT": "5", "UV_HTTP_RETRIES": "0"}
        try:
            result = self._captured([*command, "--python", str(self.python)], more=quick, timeout=PROBE_SECONDS)
        except subprocess.TimeoutExpired:
            return False
        return result.returncode == 0

    def install(self, requirements: Sequence[str], *, from_torch_index: bool = False, again: bool = False) -> None:
        """Install exactly these packages, without their dependencies. Shows the installer's progress.

        Args:
            requirements: `name==version` each.
            from_torch_index: whether torch comes from PyTorch's own index.
            again: reinstall packages that seem to be there; an interrupted installation can leave half a package.

        Raises:
            SetupError: something could not be installed.
        """
        with tempfile.NamedTemporaryFile("w", suffix=".txt", encoding="utf-8") as file:
            file.write("\n".join(requirements) + "\n")
            file.flush()
            options = ["install", "--no-deps", "--requirement", file.name]
            if self._uv:
                command = [*self._uv, "pip", *options, "--python", str(self.python)]
                command += ["--reinstall"] if again else []
                command += ["--torch-backend=cpu"] if from_torch_index else []
            else:
                command = [*self._pip, *options, *(["--force-reinstall"] if again else [])]
            status = subprocess.run(command, env=self.environment, check=False).returncode
        if status:
            raise SetupError(self._failure())

    def _failure(self) -> str:
        free = shutil.disk_usage(self.python.parent).free
        name = "uv" if self._uv else "pip"
        if free < 500_000_000:
            return f"the disk is full: {free / 1e6:.0f} MB are left where {self.python.parent.parent} lies; free some"
        return f"{name} could not install the packages (see its message above); run the same command to go on"


def choose_build(engine: str, installer: Installer, torch_version: str) -> tuple[Build, bool]:
    """The build to install, and whether torch comes from PyTorch's own index. Prints why a larger build is taken."""
    if engine == "cuda":
        return CUDA, False
    cpu_torch = f"torch=={torch_version}{CPU.torch}"
    if installer.offers(cpu_torch):
        return CPU, False
    if installer.is_uv:
        say(f"the package index has no {cpu_torch} for this Python; asking PyTorch's own")
        if installer.torch_index_offers(cpu_torch):
            return CPU, True
    say(
        f"{cpu_torch} cannot be had here, so torch's CUDA build takes its place: it runs on the CPU too, but is"
        f" {(CPU_CUDA_TORCH.disk_bytes - CPU.disk_bytes) / 1e9:.1f} GB larger; with PyTorch's CPU index in"
        " PIP_EXTRA_INDEX_URL set-up takes the small one"
    )
    return CPU_CUDA_TORCH, False


def check_disk(folder: Path, wanted_bytes: int) -> None:
    """Check that the disk of `folder` has room.

    Raises:
        SetupError: it has too little.
    """
    free = shutil.disk_usage(folder).free
    if free < wanted_bytes:
        raise SetupError(
            f"set-up needs {wanted_bytes / 1e9:.1f} GB on the disk of {folder} and {free / 1e9:.1f} GB are free; free"
            " some, or clone to another disk"
        )


@dataclass(frozen=True)
class Environment:
    """The folder `.venv`, with set-up's record of what is installed there."""

    folder: Path

    @property
    def python(self) -> Path:
        """The environment's interpreter."""
        return self.folder / "bin" / "python"

    @property
    def _ready(self) -> Path:
        """Record of a complete installation."""
        return self.folder / ".ready"

    @property
    def _installing(self) -> Path:
        """Record of an installation under way; renamed to `.ready` at its end."""
        return self.folder / ".installing"

    def version(self) -> tuple[int, int] | None:
        """The version of its Python; None if it cannot run: half made, or its base interpreter is gone."""
        if not self.python.exists():
            return None
        command = [str(self.python), "-c", "import sys, pip; print(*sys.version_info[:2])"]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            return None
        major, minor = result.stdout.split()
        return int(major), int(minor)

    def built_from(self) -> str:
        """Digest of the installed lock; empty if no installation is complete."""
        return _record(self._ready).get("digest", "")

    def build(self) -> Build | None:
        """The build that is installed, or whose installation was interrupted; None if there is neither."""
        record = _record(self._ready) or _record(self._installing)
        return BUILDS.get(record.get("build", ""))

    @contextlib.contextmanager
    def installing(self, build: Build, digest: str) -> Iterator[bool]:
        """Context of an installation: records its begin and its end. Yields whether an earlier one was interrupted."""
        interrupted = self._installing.exists()
        self._ready.unlink(missing_ok=True)
        self._installing.write_text(json.dumps({"build": build.lock, "digest": digest}), encoding="utf-8")
        yield interrupted
        self._installing.rename(self._ready)


def _record(path: Path) -> dict[str, str]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def digest_of(path: Path) -> str:
    """SHA-256 of a lock."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def is_ready(environment: Environment, engine: str, python: tuple[int, int] | None, locks: Path) -> bool:
    """Whether the environment is complete and fits.

    Args:
        environment: may not exist yet.
        engine: cpu or cuda.
        python: the version that the user has named; None: any.
        locks: folder of the locks.
    """
    build = environment.build()
    if build is None or build.engine != engine or not environment.built_from():
        return False
    version = environment.version()
    if version is None or (python or version) != version:
        return False
    path = lock_path(build, version, locks)
    return path.exists() and environment.built_from() == digest_of(path)


def why_unfit(environment: Environment, engine: str, python: tuple[int, int] | None) -> str:
    """Why the environment must be made anew; empty if it can be completed."""
    version, build = environment.version(), environment.build()
    if version is None:
        return "is not usable"
    if version not in PYTHONS or (python or version) != version:
        return f"has Python {version[0]}.{version[1]}"
    # The builds for CPU and CUDA install the same package `vllm`, and neither removes the other's files.
    return "" if build is None or build.engine == engine else f"was made for ENGINE={build.engine}"


def make_environment(environment: Environment, engine: str, python: tuple[int, int] | None) -> None:
    """Make the environment, or make it anew if it is half made, has another Python or is for another engine.

    Raises:
        SetupError: this Python cannot make environments.
    """
    why = why_unfit(environment, engine, python)
    if not why:
        return
    if environment.folder.exists():
        say(f"{environment.folder} {why}; making it anew")
    if importlib.util.find_spec("venv") is None or importlib.util.find_spec("ensurepip") is None:
        raise SetupError(
            f"{sys.executable} cannot make environments: its module venv or ensurepip is missing; on Debian and Ubuntu"
            f" install python3.{sys.version_info[1]}-venv, or name another Python: make PYTHON=/path/to/python3.12"
        )
    # If this interpreter lies in an environment, take the one that environment was made with.
    base = getattr(sys, "_base_executable", None) or sys.executable
    say(f"environment {environment.folder.name} with {base} ({platform.python_version()})")
    command = [base, "-m", "venv", "--clear", str(environment.folder)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        last = (result.stderr or result.stdout).strip().splitlines()[-1:]
        raise SetupError(f"`{' '.join(command)}` failed: {' '.join(last) or result.returncode}")


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Lock `folder`. Waits for: another set-up there. Unblocked by: its end. Gives up after: never."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("waiting for another set-up in this folder")
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def uv_of(requirements: Sequence[str]) -> str:
    """The locked requirement of uv; empty with `INSTALLER=pip`."""
    if os.environ.get("INSTALLER", "uv") == "pip":
        return ""
    return next((line for line in requirements if line.startswith("uv==")), "")


def torch_version(requirements: Sequence[str]) -> str:
    """The locked version of torch."""
    return next(line.removeprefix("torch==") for line in requirements if line.startswith("torch=="))


def set_up(environment: Environment, engine: str, python: tuple[int, int] | None, locks: Path) -> None:
    """Make the environment and fill it from the lock.

    Raises:
        SetupError: the environment cannot be made, or a package cannot be installed.
    """
    started = time.monotonic()
    if environment.build() is None:
        check_disk(environment.folder.parent, (CUDA if engine == "cuda" else CPU).disk_bytes)
    make_environment(environment, engine, python)
    version = environment.version()
    if version is None:
        raise SetupError(f"{environment.folder} cannot be used after it was made; remove it and try again")
    fill(environment, engine, version, locks)
    say(f"done in {time.monotonic() - started:.0f} s")


def fill(environment: Environment, engine: str, version: tuple[int, int], locks: Path) -> None:
    """Install the packages of the lock for this engine and Python."""
    requirements = locked(lock_path(CPU, version, locks), dev=True)
    installer = Installer(environment.python, uv_of(requirements))
    build, from_torch_index = choose_build(engine, installer, torch_version(requirements))
    path = lock_path(build, version, locks)
    if environment.build() is None:
        check_disk(environment.folder, build.disk_bytes)
    say(f"installing {build.description}, {build.disk_bytes / 1e9:.1f} GB, with {'uv' if installer.is_uv else 'pip'}")
    with environment.installing(build, digest_of(path)) as interrupted:
        install_build(installer, build, locked(path, dev=True), from_torch_index, again=interrupted)


def install_build(
    installer: Installer, build: Build, requirements: Sequence[str], from_torch_index: bool, *, again: bool
) -> None:
    """Install torch, then the rest, because only torch may come from another index."""
    wanted = f"torch=={torch_version(requirements)}"
    installer.install([wanted + build.torch], from_torch_index=from_torch_index, again=again)
    installer.install([line for line in requirements if line != wanted], again=again)


def install_here(engine: str, locks: Path) -> None:
    """Install the packages that a run needs into the environment of this interpreter.

    Raises:
        SetupError: something could not be installed.
    """
    requirements = locked(lock_path(CPU, sys.version_info[:2], locks), dev=True)
    installer = Installer(Path(sys.executable), uv_of(requirements))
    build, from_torch_index = choose_build(engine, installer, torch_version(requirements))
    check_disk(Path(sys.prefix), build.disk_bytes)
    say(f"installing {build.description} into {sys.prefix}, {build.disk_bytes / 1e9:.1f} GB")
    chosen = locked(lock_path(build, sys.version_info[:2], locks), dev=False)
    install_build(installer, build, chosen, from_torch_index, again=False)


def missing_packages_message() -> str:
    """One sentence on the packages that this environment lacks and how to install them; empty if it lacks none."""
    absent = [
        name for name in ("hydra", "omegaconf", "rich", "torch", "vllm") if importlib.util.find_spec(name) is None
    ]
    if not absent:
        return ""
    if (ROOT / ".venv" / ".ready").exists():
        way_out = "use the environment that set-up made: .venv/bin/python launch/cluster.py, or make train"
    elif (ROOT / "Makefile").exists():
        way_out = "make train sets everything up; in an environment of your own: python launch/install.py --here"
    else:
        way_out = f"run {sys.executable} -m slipstream.launch.install --here"
    return f"{sys.executable} has no {', '.join(absent)}; {way_out}"


def warn_of_old_driver(branch: int | None) -> None:
    """Print a warning if the loaded NVIDIA driver is older than the installed packages need."""
    if branch and branch < MIN_CUDA_DRIVER:
        say(
            f"the NVIDIA driver is of branch {branch}, and CUDA 13, which torch and vLLM are built with, needs"
            f" {MIN_CUDA_DRIVER} or newer: update it, or install NVIDIA's cuda-compat package on data-center GPUs"
        )


def main(arguments: Sequence[str]) -> int:
    """Set up the environment. Returns the exit status."""
    parser = argparse.ArgumentParser(description="Make the environment that Slipstream runs in.")
    parser.add_argument("--here", action="store_true", help="install into the environment of this interpreter")
    parser.add_argument("--same-python", action="store_true", help="make .venv anew if it has another Python than this")
    options = parser.parse_args(arguments)
    try:
        if sys.version_info[:2] not in PYTHONS:
            raise SetupError(f"Python {platform.python_version()} is not supported; use 3.11, 3.12 or 3.13")
        check_machine(platform.system(), platform.machine(), platform.libc_ver(), interpreter_kind())
        branch = driver_branch()
        engine = wanted_engine(os.environ.get("ENGINE", ""), branch)
        if options.here:
            install_here(engine, LOCKS)
        else:
            python = (sys.version_info[0], sys.version_info[1]) if options.same_python else None
            environment = Environment(ROOT / ".venv")
            with alone(ROOT):
                if is_ready(environment, engine, python, LOCKS):
                    return 0
                set_up(environment, engine, python, LOCKS)
        if engine == "cuda":
            warn_of_old_driver(branch)
    except SetupError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; run the same command to go on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
