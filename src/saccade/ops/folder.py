"""Files written whole; where saccade keeps what it found out or made for this machine, and who could write there."""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
from pathlib import Path

__all__ = ["cache_folder", "exposure", "private_folder", "settle", "write_bytes", "write_text"]


def cache_folder() -> Path:
    """$XDG_CACHE_HOME/saccade, or ~/.cache/saccade where that is not set or not absolute; not made here.

    Raises:
        OSError: if there is no home folder either.
    """
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not base.is_absolute():
        try:
            home = Path.home()
        except RuntimeError as error:
            raise OSError(str(error)) from error
        if not home.is_absolute():
            raise OSError(f"the home folder must be an absolute path, got {str(home)!r}")
        base = home / ".cache"
    return base / "saccade"


def private_folder(path: Path) -> Path:
    """Make a folder (0700) unless it is there, and see that only this user can write to it.

    Raises:
        OSError: if it cannot be made, or others could change what lies in it.
    """
    for missing in reversed([p for p in (path, *path.parents) if not p.exists()]):
        missing.mkdir(mode=0o700, exist_ok=True)
    reason = exposure(path)
    if reason is not None:
        raise PermissionError(f"{path} is not used: {reason} (XDG_CACHE_HOME may name a folder of your own)")
    info = path.stat()
    if hasattr(os, "getuid") and info.st_uid == os.getuid() and info.st_mode & 0o077:
        path.chmod(0o700)
    return path


def exposure(path: Path) -> str | None:
    """How others could change what lies at an absolute path, by any folder or link on the way; None if they cannot.

    Raises:
        OSError: if there is nothing.
    """
    if not hasattr(os, "getuid"):
        return None  # on Windows the profile's access list keeps others out
    for entry in (*reversed(path.parents), path):
        info = entry.lstat()
        if info.st_uid not in _trusted():
            return f"{entry} belongs to another user"
        if stat.S_ISLNK(info.st_mode):
            reason = exposure(entry.parent / entry.readlink())
            if reason is not None:
                return reason
        # in a folder with the sticky bit others cannot replace what is not theirs
        elif _others_write(info) and (entry == path or not info.st_mode & stat.S_ISVTX):
            return f"others can write to {entry}"
    return None


def _trusted() -> set[int]:
    """This user, root, and the owner of the root folder: root itself, by another number in a container."""
    return {0, os.getuid(), os.stat("/").st_uid}


def _others_write(info: os.stat_result) -> bool:
    return bool(info.st_mode & 0o002 or (info.st_mode & 0o020 and not _is_own_group(info.st_gid)))


def _is_own_group(number: int) -> bool:
    """The group of this user and of nobody else: where each user has one, it may write to what the user makes."""
    import grp
    import pwd

    try:
        user, group = pwd.getpwuid(os.getuid()), grp.getgrgid(number)
    except KeyError:
        return False
    return user.pw_gid == number and user.pw_name == group.gr_name and set(group.gr_mem) <= {user.pw_name}


def settle(draft: Path, target: Path) -> None:
    """Put a finished file in its place: it is on the disk before its name is, so that what has a name is whole."""
    with open(draft, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(draft, target)
    if hasattr(os, "O_DIRECTORY"):
        folder = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            with contextlib.suppress(OSError):  # some network file systems cannot
                os.fsync(folder)
        finally:
            os.close(folder)


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file whole: into a temporary file beside it, to the disk, then into its place.

    Raises:
        OSError: in one line, if the disk is full or the folder not writable; the old file is then still there.
    """
    draft = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, draft = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.chmod(draft, 0o644)
        settle(Path(draft), path)
    except OSError as error:
        if draft is not None:
            Path(draft).unlink(missing_ok=True)
        raise OSError(f"cannot write {path}: {error.strerror or error}") from error


def write_text(path: Path, text: str) -> None:
    """`write_bytes` in UTF-8."""
    write_bytes(path, text.encode("utf-8"))
