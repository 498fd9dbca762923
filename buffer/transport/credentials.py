"""The credentials of a run: its id and its CURVE keys, made once per run, in files that only their owner can read.

Every role (`buffer/transport/roles.py`) has a file in `RUN_DIR/keys`, which is all that a process of that role needs to
connect. The buffer also reads `server.json`; the learner's weight store and every relay read `weights.json`. So neither
they nor an actor can act as the buffer. A process on another host reads its copies of the files it needs, in a folder
that the environment variable `SLIPSTREAM_KEYS` names. Keys never appear in a command line, in a log or in config.yaml.
"""

from __future__ import annotations

import json
import logging
import os
import re
import secrets
import shutil
import stat
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import zmq

from buffer.transport.roles import ROLES

log = logging.getLogger(__name__)

FOLDER = "keys"
FOLDER_VARIABLE = "SLIPSTREAM_KEYS"
LOCAL_ADDRESSES = ("tcp://127.", "tcp://[::1]:", "ipc://", "inproc://")
MAX_FILE_BYTES = 4096
BUFFER, WEIGHTS = "server", "weights"
"""The two kinds of servers, and the names of their files."""
_OLD_CLIENT_FILE = "client.json"
"""Of an older release, which had one key pair for all roles."""
_RUN_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")


@dataclass(frozen=True, slots=True)
class Credentials:
    """A run's id, and the keys of one process (Z85, 40 characters each).

    With empty keys connections are unencrypted and local only.

    Raises:
        ValueError: when the run id or a key is malformed, or some keys are missing.
    """

    run_id: str
    server_public: bytes = b""
    """Of the server to connect to, or of this server."""
    public: bytes = b""
    secret: bytes = field(default=b"", repr=False)
    """The process's own key pair."""
    weights_public: bytes = b""
    """In a client: the public key of the weight store and the relays."""
    roles: Mapping[bytes, str] = field(default_factory=dict)
    """In a server: the role of each public key."""

    def __post_init__(self) -> None:
        if not _RUN_ID.fullmatch(self.run_id):
            raise ValueError(f"the run id {self.run_id[:80]!r} is not made of 1 to 64 letters, digits, - and _")
        needed = [self.server_public, self.public, self.secret]
        given = [key for key in (*needed, self.weights_public, *self.roles) if key]
        if any(len(key) != 40 for key in given) or (given and not all(needed)):
            raise ValueError(f"the keys of run {self.run_id} are incomplete; copy the files of {FOLDER} as a whole")

    @classmethod
    def plain(cls, run_id: str) -> Credentials:
        """Make credentials without keys: no encryption, no authentication and no roles."""
        return cls(run_id)

    @property
    def encrypted(self) -> bool:
        """Whether sockets with these credentials use CURVE."""
        return bool(self.server_public)

    def for_weights(self) -> Credentials:
        """Return a client's credentials for the weight store and the relays, instead of the buffer."""
        return replace(self, server_public=self.weights_public)

    def check_address(self, address: str) -> None:
        """Refuse unencrypted connections to other machines.

        Raises:
            ValueError: when `address` is not local and there are no keys.
        """
        if not self.encrypted and not address.startswith(LOCAL_ADDRESSES):
            raise ValueError(
                f"{address} is not local to this machine and cluster.encryption is none; set"
                " cluster.encryption=curve or use tcp://127.0.0.1:PORT or ipc://PATH"
            )


@dataclass(frozen=True, slots=True)
class RunKeys:
    """All credentials of a run. Only the process that makes them has this; every other one reads its own files."""

    buffer: Credentials
    weights: Credentials
    clients: Mapping[str, Credentials]
    """By role."""

    @classmethod
    def new(cls, run_id: str, *, encrypted: bool = True) -> RunKeys:
        """Make new keys for both kinds of servers and for every role; without `encrypted`, credentials without keys."""
        if not encrypted:
            plain = Credentials.plain(run_id)
            return cls(plain, plain, dict.fromkeys(ROLES, plain))
        buffer, weights = zmq.curve_keypair(), zmq.curve_keypair()
        pairs = {role: zmq.curve_keypair() for role in ROLES}
        roles = {public: role for role, (public, _) in pairs.items()}
        return cls(
            Credentials(run_id, buffer[0], *buffer, roles=roles),
            Credentials(run_id, weights[0], *weights, roles=roles),
            {role: Credentials(run_id, buffer[0], *pair, weights_public=weights[0]) for role, pair in pairs.items()},
        )


def ensure_credentials(run_dir: Path | str, *, encrypted: bool = True) -> None:
    """Make the credentials of the run in `run_dir` if there are none.

    Several processes may call this at once.

    Raises:
        ValueError: when the files cannot be written or read, other users can read them, or they have keys and
            `encrypted` is False, or the reverse.
    """
    folder = Path(run_dir) / FOLDER
    if (folder / _OLD_CLIENT_FILE).exists():
        _replace_old(folder)
    if not folder.is_dir():
        try:
            _write_folder(folder, RunKeys.new(uuid.uuid4().hex, encrypted=encrypted))
        except OSError as error:
            raise ValueError(f"{folder} cannot be written: {error.strerror}; choose another run_dir") from error
    found = _read(folder, BUFFER)
    if found.encrypted != encrypted:
        made = "curve" if found.encrypted else "none"
        raise ValueError(
            f"{folder} was made for cluster.encryption={made}; set that, or remove the folder for new keys"
        )


def server_credentials(run_dir: Path | str, kind: str = BUFFER) -> Credentials:
    """Load the credentials of a server: of the buffer, or with `WEIGHTS` of a weight store or relay.

    The buffer's are in `run_dir`/keys; the others' also in the folder that `SLIPSTREAM_KEYS` names, if it names one.
    In `run_dir` they are created, with encryption, if absent.

    Raises:
        ValueError: when the files cannot be written or read, or other users can read them.
    """
    own = Path(run_dir) / FOLDER
    folder = own if kind == BUFFER else _folder(run_dir)
    if folder == own and not folder.is_dir():
        ensure_credentials(run_dir)
    return _read(folder, kind)


def client_credentials(run_dir: Path | str, role: str) -> Credentials:
    """Load the credentials of a role, from the folder that `SLIPSTREAM_KEYS` names, else from `run_dir`/keys.

    Raises:
        ValueError: when the file cannot be read, or other users can read it.
    """
    return _read(_folder(run_dir), role)


def _folder(run_dir: Path | str) -> Path:
    return Path(os.environ.get(FOLDER_VARIABLE) or Path(run_dir) / FOLDER)


def _replace_old(folder: Path) -> None:
    """Make new keys, one pair per role, for a run of an older release, which had one pair for all."""
    content = _read_file(folder / _OLD_CLIENT_FILE)
    keys = RunKeys.new(content.get("run_id", ""), encrypted=bool(content.get("server_public")))
    log.warning("%s is from an older release: new keys are made; copy them again to other machines", folder)
    old = folder.with_name(f"{folder.name}.{secrets.token_hex(4)}.old")
    folder.rename(old)
    _write_folder(folder, keys)
    shutil.rmtree(old, ignore_errors=True)


def _write_folder(folder: Path, keys: RunKeys) -> None:
    """Write the folder under a temporary name, then rename it, so that it is complete or absent.

    When another process has created the folder meanwhile, that one stays.
    """
    partial = folder.with_name(f"{folder.name}.{secrets.token_hex(4)}.partial")
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial.mkdir(mode=0o700)
    try:
        for name, credentials in {BUFFER: keys.buffer, WEIGHTS: keys.weights, **keys.clients}.items():
            _write_file(partial / f"{name}.json", credentials)
        try:
            partial.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_file(path: Path, credentials: Credentials) -> None:
    content = {
        "run_id": credentials.run_id,
        "server_public": credentials.server_public.decode(),
        "public": credentials.public.decode(),
        "secret": credentials.secret.decode(),
        "weights_public": credentials.weights_public.decode(),
    } | {f"{role}_public": key.decode() for key, role in credentials.roles.items()}
    # Created with mode 600, so that other users cannot open the file at any moment.
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        json.dump(content, file)
        file.flush()
        os.fsync(file.fileno())


def _read(folder: Path, name: str) -> Credentials:
    content = _read_file(folder / f"{name}.json")
    run_id = content.pop("run_id", "")
    roles = {content.pop(f"{role}_public", "").encode(): role for role in ROLES}
    try:
        keys = {key: value.encode() for key, value in content.items()}
        return Credentials(run_id, **keys, roles={key: role for key, role in roles.items() if key})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{folder} holds no usable keys ({error}); restore it, or remove it for new ones") from error


def _read_file(path: Path) -> dict[str, str]:
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            if mode & (stat.S_IRWXG | stat.S_IRWXO):
                raise ValueError(f"{path} has mode {mode & 0o777:03o}, so others can read it; chmod 600 {path}")
            content = json.loads(file.read(MAX_FILE_BYTES))
    except OSError as error:
        raise ValueError(
            f"{path} cannot be read: {error.strerror}; give the directory of a run that was started, or name the folder"
            f" of its keys in {FOLDER_VARIABLE}"
        ) from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON; restore the folder, or remove it for new keys") from error
    if not isinstance(content, dict) or not all(isinstance(value, str) for value in content.values()):
        raise ValueError(f"{path} does not map names to strings; restore the folder, or remove it for new keys")
    return content
