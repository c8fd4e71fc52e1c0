"""Files and folders that exist as a whole or not at all, checksums, and locks of folders."""

from __future__ import annotations

import errno
import fcntl
import glob
import hashlib
import os
import re
import secrets
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from pathlib import Path, PurePath
from typing import BinaryIO, TypeVar

from workbench.io.errors import DataError, RequestError, WorkbenchError
from workbench.io.exchange import exchange

PARTIAL = ".partial"
"""Suffix of unfinished files and folders, which are never read."""

_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_ATTEMPTS = 50  # at a name that another process moves at the same time
_TAKEN = frozenset({errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR})

T = TypeVar("T")

DISK_FULL = frozenset({errno.ENOSPC, errno.EFBIG, errno.EDQUOT})
"""Error numbers of a full disk: no space, file size limit, quota."""

_DISK_FAILS = frozenset({errno.EIO, errno.EROFS, errno.ENXIO, errno.ENODEV, errno.ESTALE})


def sha256_bytes(data: bytes | memoryview) -> str:
    """Returns the hex SHA-256 of bytes in memory."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: str | os.PathLike[str]) -> str:
    """Returns the hex SHA-256 of a file, read in blocks."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fsync(path: str | os.PathLike[str]) -> None:
    """Waits until a file's bytes, or a directory's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_tree(folder: Path) -> None:
    """Waits until all files and directories of `folder`, and the folder itself, are on the disk."""
    for place, _, names in os.walk(folder, topdown=False):
        for name in names:
            if os.path.isfile(entry := os.path.join(place, name)) and not os.path.islink(entry):
                fsync(entry)
        fsync(place)


# ---- one file ---------------------------------------------------------------------------------------------


def write_file(path: Path, data: bytes | memoryview) -> None:
    """Writes a new file and waits until its bytes are on the disk. FileExistsError where it exists, even as a link."""
    with open(os.open(path, _CREATE, 0o666), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """Yields a file to write; at the end of the block it takes the name `path`, in place of a file of that name.

    At any moment, and after any crash, readers find the old bytes or the new ones, whole. An exception leaves the old
    file as it was and nothing else. Several processes may write the same name; the last one to finish wins.

    Raises:
        RequestError: A device, a pipe or a socket is there, such as /dev/null, which root could replace.
    """
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise RequestError(f"{path} is a device, a pipe or a socket, which is never replaced; choose another name")
    partial, descriptor = _create_beside(path, lambda name: os.open(name, _CREATE, 0o666))
    try:
        with open(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        remove(partial)
        raise
    fsync(path.parent)


def replace_file(path: Path, data: bytes | memoryview) -> None:
    """Replaces a file, or writes a new one: readers find the old bytes or the new ones, whole, even after a crash."""
    with new_file(path) as file:
        file.write(data)


def refuse_full(folder: Path) -> None:
    """Raises RequestError if `folder` exists and is not empty."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RequestError(f"out {str(folder)!r} exists and is not empty; choose another folder")


# ---- one folder -------------------------------------------------------------------------------------------


@contextmanager
def scratch_folder(path: Path) -> Iterator[Path]:
    """Yields a new, hidden, empty folder beside `path`, which `commit_folder` may rename.

    At the end of the block, and after an exception, it is removed where it still exists. Its random name is never one
    that another process uses.
    """
    partial, _ = _create_beside(path, os.mkdir)
    try:
        yield partial
    finally:
        remove(partial)


def commit_folder(partial: Path, path: Path) -> None:
    """Gives a finished folder its name, `path`, and waits until the name is on the disk.

    Its files must be on the disk already: written by this module, or after `fsync_tree`. Nothing is replaced:
    FileExistsError where `path` is anything but an empty folder, and then `partial` is left as it was.
    """
    fsync(partial)
    _place(partial, path)
    fsync(path.parent)


@contextmanager
def replace_folder(path: Path, replaces: Collection[str]) -> Iterator[Path]:
    """Yields an empty folder to fill; at the end of the block it takes the name `path`, in place of an older folder.

    At any moment, and after any crash, readers find the old folder or the new one, whole: the two exchange their names.
    (A file system that cannot exchange names, such as NFS, has none of them for a moment.) An exception leaves one of
    them and nothing else. Several processes may replace the same folder; the last one to finish wins.

    Args:
        path: A folder, or nothing yet. Its parents are made.
        replaces: Names of the files that folders of this kind may have, relative to `path`; `*` matches within one
            name: `("result.json", "figures/*.html")`. Other entries of the old folder are not ours: they are kept.

    Raises:
        RequestError: `path` is a file or a link, or something in the old folder is in the way of a new file.
    """
    _check_folder(path, path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with scratch_folder(path) as partial:
        yield partial
        fsync_tree(partial)
        put_in_place(partial, path, replaces)


def put_in_place(partial: Path, path: Path, replaces: Collection[str]) -> None:
    """Gives a finished folder the name `path`, in place of an older folder, as `replace_folder` describes.

    The files of `partial` must be on the disk already. Afterwards nothing has its name.
    """
    known = [PurePath(pattern).parts for pattern in replaces]
    written = [entry.relative_to(partial).parts for entry in partial.rglob("*") if not entry.is_dir()]
    known += [tuple(map(glob.escape, parts)) for parts in written]
    with suppress(FileNotFoundError):
        for entry in _foreign(path, known):
            _link(entry, partial / entry.relative_to(path))
    replaced: list[Path] = []
    try:
        _exchange(partial, path, replaced)
    finally:
        for old in filter(os.path.lexists, replaced):
            _clear(old, path, known)
    fsync(path.parent)


def _exchange(partial: Path, path: Path, replaced: list[Path]) -> None:
    """Puts `partial` in place of `path`; adds the names that the folders before it have now to `replaced`."""
    while True:
        try:
            exchanged = exchange(partial, path)
        except FileNotFoundError:  # nothing to replace
            with suppress(FileExistsError):
                return _place(partial, path)
        else:
            if not exchanged:
                return _rename_both(partial, path, replaced)
            try:
                _check_folder(partial, path)  # another process may have put anything there
            except RequestError:
                exchange(partial, path)
                raise
            return replaced.append(partial)


def _rename_both(partial: Path, path: Path, replaced: list[Path]) -> None:
    """As `_exchange`, by two renames: between them there is nothing under the name."""
    try:
        while True:  # until no other process has put its folder there in between
            replaced.append(path.with_name(f".{path.name}.{secrets.token_hex(4)}.old"))
            with suppress(FileNotFoundError):
                os.rename(path, replaced[-1])
                _check_folder(replaced[-1], path)
            with suppress(FileExistsError):
                return _place(partial, path)
    except BaseException:
        if os.path.lexists(replaced[-1]) and not os.path.lexists(path):
            os.rename(replaced[-1], path)
        raise


def _clear(old: Path, new: Path, known: list[tuple[str, ...]]) -> None:
    """Removes a replaced folder, after what others have put there in the meantime was moved to the new one."""
    try:
        for entry in _foreign(old, known):
            _merge_beside_others(entry, new / entry.relative_to(old))
    except BaseException:
        with suppress(OSError):  # or what is not ours would be removed with the rest
            os.rename(old, old.with_name(f".{new.name}.{secrets.token_hex(4)}.old"))
        raise
    remove(old)


def _foreign(folder: Path, known: list[tuple[str, ...]]) -> list[Path]:
    """Entries that no pattern of `known` matches; a folder that has none of ours is one entry."""
    entries = []
    for entry in sorted(folder.iterdir()):
        inner = [pattern[1:] for pattern in known if len(pattern) > 1 and fnmatchcase(entry.name, pattern[0])]
        is_folder = stat.S_ISDIR(entry.lstat().st_mode)  # an entry that has gone meanwhile is no file of others
        if inner and is_folder:
            entries += _foreign(entry, inner)
            continue
        is_known = any(len(pattern) == 1 and fnmatchcase(entry.name, *pattern) for pattern in known)
        if is_folder or entry.is_dir() or not is_known:
            entries.append(entry)
    return entries


def remove_known(folder: Path, known: list[tuple[str, ...]], last: str) -> list[Path]:
    """Removes the files of a folder that a pattern matches, and folders that are then empty; returns what is left.

    Args:
        folder: The folder, which goes too unless something is left.
        known: Patterns of names relative to it, as for `replace_folder`, in parts.
        last: Name of the file that is removed after all others.
    """
    foreign_entries = _foreign(folder, known)
    kept_paths = {folder / last, *foreign_entries}
    for place, folders, names in os.walk(folder, topdown=False):
        inside = Path(place)
        for name in names:
            entry = inside / name
            if not any(entry == path or path in entry.parents for path in kept_paths):
                entry.unlink()
        for name in folders:
            if not (inside / name).is_symlink() and (inside / name) not in foreign_entries:
                with suppress(OSError):  # not empty
                    os.rmdir(inside / name)
    (folder / last).unlink(missing_ok=True)
    for place in (*(folder / last).relative_to(folder).parents[:-1], Path()):
        with suppress(OSError):
            os.rmdir(folder / place)
    return foreign_entries


def _link(source: Path, target: Path) -> None:
    """Gives a file, or all files of a folder, a second name. What has no hard links is moved later, by `_merge`."""
    if os.path.lexists(target):
        raise RequestError(f"{source.name} in {source.parent} is in the way of a new file; move it elsewhere")
    target.parent.mkdir(parents=True, exist_ok=True)
    with suppress(OSError):
        if source.is_dir() and not source.is_symlink():
            shutil.copytree(source, target, symlinks=True, copy_function=_link_file)
        else:
            _link_file(source, target)


def _link_file(source: str | Path, target: str | Path, **_: object) -> None:
    os.link(source, target, follow_symlinks=False)


def _merge_beside_others(source: Path, target: Path) -> None:
    """As `_merge`, again where another process takes the folder of `target` away or puts its own there meanwhile."""
    for attempt in range(_ATTEMPTS):
        try:
            return _merge(source, target)
        except (FileNotFoundError, FileExistsError):
            if attempt == _ATTEMPTS - 1:
                raise
            time.sleep(0.001 * attempt)


def _merge(source: Path, target: Path) -> None:
    """Moves an entry, unless it lies there already under its second name."""
    if not os.path.lexists(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        os.rename(source, target)
    elif not os.path.samestat(source.lstat(), target.lstat()):
        folders = [entry.is_dir() and not entry.is_symlink() for entry in (source, target)]
        if all(folders):
            for entry in list(source.iterdir()):
                _merge(entry, target / entry.name)
        elif any(folders):
            raise RequestError(f"{source.name} in {source.parent} is in the way of a new file; move it elsewhere")
        else:
            os.replace(source, target)  # it has changed meanwhile


def _check_folder(path: Path, name: Path) -> None:
    """Refuses a file or a link under the name of a folder: it would be moved, and lost.

    One look decides, since another process may move the folder at any time.
    """
    with suppress(FileNotFoundError):
        mode = path.lstat().st_mode
        if not stat.S_ISDIR(mode):
            raise RequestError(f"{name} is a {'link' if stat.S_ISLNK(mode) else 'file'}; name a folder, or a new one")


def _place(partial: Path, path: Path) -> None:
    """Renames a folder. FileExistsError where there is anything but an empty folder."""
    try:
        os.rename(partial, path)
    except OSError as error:
        if error.errno not in _TAKEN:
            raise
        raise FileExistsError(error.errno, error.strerror, str(path)) from None


def _create_beside(path: Path, create: Callable[[Path], T]) -> tuple[Path, T]:
    """Creates, exclusively, under a hidden random name beside `path`; gives the name and what `create` returned."""
    while True:
        partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}{PARTIAL}")
        with suppress(FileExistsError):
            return partial, create(partial)


# ---- other ------------------------------------------------------------------------------------------------


def remove(path: Path) -> None:
    """Removes a file or a whole directory, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def check_writable(path: str | os.PathLike[str], name: str = "out") -> None:
    """Refuses a file or folder that cannot be written, before work is done for it.

    A folder of a random name is made and removed in the nearest parent that exists: permissions alone tell little of
    network mounts and of root.

    Raises:
        RequestError: Names the argument, `name`, and the reason.
    """
    parent = next(folder for folder in (Path(path).absolute() / "x").parents if os.path.lexists(folder))
    if parent.is_file():
        parent = parent.parent if parent == Path(path).absolute() else parent
    try:
        os.rmdir(tempfile.mkdtemp(prefix=".workbench-", dir=parent))
    except OSError as error:
        place = "" if parent == Path(path).absolute() else f" in {parent}"
        raise RequestError(f"{name}={path} cannot be written{place}: {error.strerror}; choose another {name}") from None


def check_writable_file(path: str | os.PathLike[str], name: str = "out") -> None:
    """Refuses the path of a file that is a folder or cannot be written, before work is done for it."""
    if Path(path).is_dir():
        raise RequestError(f"{name}={path} is a folder; name a file in it")
    check_writable(path, name)


def check_new_folder(folder: str | os.PathLike[str]) -> None:
    """Refuses a folder that is not empty or cannot be written, before work is done for it."""
    refuse_full(Path(folder))
    check_writable(folder)


def natural_order(name: str) -> list[int | str]:
    """Returns a key that sorts names as people do: batch-2 before batch-10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


def human_bytes(count: int) -> str:
    """Returns a number of bytes in binary units: 0 B, 1.5 KiB, 256.0 MiB."""
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


@contextmanager
def explain_full_disk(content: str, advice: str, state: str = "") -> Iterator[None]:
    """Inside, a disk that is full, read-only or failing raises DataError, with what to do about it.

    Each library has its own error for it: some without an error number, in a text of Rust's or NumPy's.

    Args:
        content: Name of the thing being written.
        advice: Step that follows once the disk can be written: "run the same command to resume".
        state: Statement of what is safe: "14 rows are committed and readable".
    """
    try:
        yield
    except WorkbenchError:
        raise
    except Exception as error:
        number = _number(error)
        if number in DISK_FULL:
            problem, remedy = "disk full", "free space"
        elif number in _DISK_FAILS:
            problem, remedy = "disk failure", "make it writable" if number == errno.EROFS else "check the disk"
        else:
            raise
        steps = "; ".join(filter(None, [state, f"{remedy} and {advice}"]))
        raise DataError(f"{problem} while writing {content} ({os.strerror(number)}): {steps}") from error


def _number(error: Exception) -> int:
    """The system's error number, 0 where there is none."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    if isinstance(error, OSError) and re.fullmatch(r"\d+ requested and \d+ written", str(error)):  # NumPy's
        return errno.ENOSPC
    numbers = re.findall(r"os error (\d+)", str(error))  # Rust's
    return int(numbers[0]) if numbers else 0


@contextmanager
def locked(path: Path, *, shared: bool = False, wait: Callable[[], None] | None = None) -> Iterator[None]:
    """Locks a directory, which is made if it does not exist. The lock is the kernel's: it ends with the process.

    Args:
        path: The directory.
        shared: Other processes may lock it at the same time, if they also share it.
        wait: Called once if another process has locked it, before waiting for that. None: RequestError instead.
    """
    while True:
        descriptor = _opened_folder(path)
        try:
            _lock(path, descriptor, fcntl.LOCK_SH if shared else fcntl.LOCK_EX, wait)
            if _is_at(path, descriptor):  # else the other process has renamed or removed it
                yield
                return
        finally:
            os.close(descriptor)


def _opened_folder(path: Path) -> int:
    try:
        path.mkdir(parents=True, exist_ok=True)
        return os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise RequestError(f"out={path} cannot be made a directory: {error.strerror}; choose another out") from None


def _lock(path: Path, descriptor: int, kind: int, wait: Callable[[], None] | None) -> None:
    try:
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            if wait is None:
                raise RequestError(
                    f"{path} is being written by another process; wait for it or choose another out"
                ) from None
            wait()
            fcntl.flock(descriptor, kind)
    except OSError as error:  # some network file systems
        raise RequestError(f"{path} cannot be locked: {error.strerror}; choose an out on a local disk") from None


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False
