"""What the tests of folder checks share."""

import struct
import zlib

from domainstudio.data.check import FolderCheck, check_folder

ERROR, WARNING, NOTE = "error", "warning", "note"


def files_of(folder):
    return {
        path.relative_to(folder): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file()
    }


def checked(folder, resolution=None) -> FolderCheck:
    """The check, after making sure that it changed nothing on disk."""
    before = files_of(folder)
    result = check_folder(folder, resolution)
    assert files_of(folder) == before
    return result


def only(check: FolderCheck, name: str):
    """The single finding of the folder; it must be about `name`."""
    assert [finding.path.name for finding in check.findings] == [name]
    return check.findings[0]


def expect(check: FolderCheck, name: str, severity: str, problem: str, remedy: str):
    """The single finding is about `name`, says what and what to do, and the picture is used unless it is an error."""
    found = only(check, name)
    assert found.severity == severity
    assert problem in found.problem
    assert remedy in found.remedy
    line = next(line for line in check.render().splitlines() if name in line)
    assert line == f"{severity}: {name}: {found.problem}; {found.remedy}"
    assert check.ok == (severity != ERROR)
    return found


def png(width, height, *chunks):
    """A PNG written by hand, so that its header can claim anything."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*one) for one in [(b"IHDR", header), *chunks, (b"IEND", b"")])
