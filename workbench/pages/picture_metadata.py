"""Title and description inside of PDF, SVG and PNG files, where viewers, screen readers and search find them."""

from __future__ import annotations

import html
import re
import struct
import zlib

_MAKER = "interp-workbench"


def with_metadata(picture: bytes, kind: str, title: str, description: str) -> bytes:
    """Returns a picture with its title and description. The same texts give the same bytes.

    Args:
        picture: File as Chrome writes it.
        kind: pdf (document information, in an update behind the file), svg (title and desc elements) or png (text
            chunks).
        title: One line.
        description: The alternative text.
    """
    title, description = (_without_controls(text) for text in (title, description))
    return {"pdf": _pdf, "svg": _svg, "png": _png}[kind](picture, title, description)


def _without_controls(text: str) -> str:
    return "".join(char if char.isprintable() else " " for char in text).encode("utf-8", "replace").decode()


def _pdf(picture: bytes, title: str, description: str) -> bytes:
    """An incremental update (ISO 32000-1, 7.5.6) with another information dictionary."""
    trailer = re.search(rb"trailer\s*<<(.*?)>>\s*startxref\s+(\d+)\s+%%EOF\s*$", picture, re.DOTALL)
    size, root = (
        re.search(pattern, trailer[1]) if trailer else None for pattern in (rb"/Size (\d+)", rb"/Root [^/]+R")
    )
    if trailer is None or size is None or root is None:
        return picture  # of a Chrome that writes another table of objects
    number, dates = int(size[1]), b"/CreationDate (D:19700101000000+00'00')"
    texts = (b"/%s <%s>" % (key, _utf_16(text)) for key, text in ((b"Title", title), (b"Subject", description)))
    entries = [*texts, b"/Creator (%s)" % _MAKER.encode(), dates]
    file = picture if picture.endswith(b"\n") else picture + b"\n"
    information = b"%d 0 obj\n<<%s>>\nendobj\n" % (number, b" ".join(entries))
    table = b"xref\n%d 1\n%010d 00000 n \n" % (number, len(file))
    last = b"trailer\n<</Size %d %s /Info %d 0 R /Prev %s>>\n" % (number + 1, root[0], number, trailer[2])
    return file + information + table + last + b"startxref\n%d\n%%%%EOF\n" % (len(file) + len(information))


def _utf_16(text: str) -> bytes:
    return ("feff" + text.encode("utf-16-be").hex()).encode()


def _svg(picture: bytes, title: str, description: str) -> bytes:
    texts = "".join(f"<{tag}>{html.escape(text)}</{tag}>" for tag, text in (("title", title), ("desc", description)))
    return re.sub(rb"<svg\b[^>]*>", lambda start: start[0] + texts.encode(), picture, count=1)


def _png(picture: bytes, title: str, description: str) -> bytes:
    """Chunks of international text (PNG 3, 11.3.3.4) behind the header."""
    end = 8 + 12 + struct.unpack(">I", picture[8:12])[0]
    chunks = [
        _chunk(b"iTXt", b"%s\0\0\0\0\0%s" % (key, text.encode()))
        for key, text in ((b"Title", title), (b"Description", description), (b"Software", _MAKER))
    ]
    return picture[:end] + b"".join(chunks) + picture[end:]


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
