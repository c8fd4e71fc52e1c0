"""Title and description in the files of exported figures, read back by other means than they are written."""

from __future__ import annotations

import re
import struct
import xml.etree.ElementTree as ElementTree
import zlib

import plotly.graph_objects as go
import pytest
from browser import require_export

import workbench as wb
from workbench.pages.picture_metadata import with_metadata

TITLE = "Losses </title><script> (a\\) \u4f60\u597d."
ALT = "Line chart of nats by layer. one from 1 at 0 to 4 at 2."
SMALL_PDF = b"%PDF-1.4\n1 0 obj\n<</Type /Catalog>>\nendobj\nxref\n0 2\n0000000000 65535 f \n0000000009 00000 n \n"
SMALL_PDF += b"trailer\n<</Size 2\n/Root 1 0 R>>\nstartxref\n43\n%%EOF"


def information(pdf: bytes) -> dict[str, str]:
    """The document information, found from the end of the file as a reader finds it."""
    place = int(re.search(rb"startxref\n(\d+)\n%%EOF\n$", pdf)[1])
    table = re.match(rb"xref\n(\d+) 1\n(\d{10}) 00000 n \ntrailer\n<<(.*?)>>", pdf[place:], re.DOTALL)
    number, offset, trailer = int(table[1]), int(table[2]), table[3]
    assert b"/Info %d 0 R" % number in trailer
    assert b"/Size %d " % (number + 1) in trailer
    previous = int(re.search(rb"/Prev (\d+)", trailer)[1])
    assert pdf[previous:].startswith(b"xref")
    root = int(re.search(rb"/Root (\d+) 0 R", trailer)[1])
    assert b"%d 0 obj\n<</Type /Catalog" % root in pdf
    entries = re.match(rb"%d 0 obj\n<<(.*?)>>\nendobj" % number, pdf[offset:], re.DOTALL)[1]
    return {
        key.decode(): bytes.fromhex(text.decode()).decode("utf-16")
        for key, text in re.findall(rb"/(\w+) <([0-9a-f]+)>", entries)
    }


def texts_of(png: bytes) -> dict[str, str]:
    texts, place = {}, 8
    while place < len(png):
        size = struct.unpack(">I", png[place : place + 4])[0]
        kind, content = png[place + 4 : place + 8], png[place + 8 : place + 8 + size]
        assert struct.unpack(">I", png[place + 8 + size : place + 12 + size])[0] == zlib.crc32(kind + content)
        if kind == b"iTXt":
            key, _, rest = content.partition(b"\0")
            texts[key.decode()] = rest[4:].decode()
        place += 12 + size
    return texts


def test_each_file_names_what_it_shows(tmp_path):
    require_export()
    figure = go.Figure(go.Scatter(x=[0, 1, 2], y=[1, 2, 4], name="one"), {"title": {"text": "Losses &lt;b&gt;"}})
    wb.export(figure, tmp_path / "losses", formats=["pdf", "svg", "png"])
    pdf, svg, png = ((tmp_path / "losses" / f"losses.{kind}").read_bytes() for kind in ("pdf", "svg", "png"))
    alt = "Line chart. one from 1 at 0 to 4 at 2."
    assert information(pdf) == {"Title": "Losses <b>.", "Subject": alt}
    root = ElementTree.fromstring(svg)
    assert [(part.tag.rpartition("}")[2], part.text) for part in root][:2] == [("title", "Losses <b>."), ("desc", alt)]
    assert texts_of(png) == {"Title": "Losses <b>.", "Description": alt, "Software": "interp-workbench"}


def test_hostile_texts_stay_texts():
    pdf = with_metadata(SMALL_PDF, "pdf", TITLE, ALT)
    assert pdf.startswith(SMALL_PDF)
    assert information(pdf) == {"Title": TITLE, "Subject": ALT}
    root = ElementTree.fromstring(with_metadata(b'<svg a="b"><g/></svg>', "svg", TITLE + "\x00\u202e", ALT))
    assert [part.text for part in root] == [TITLE + "  ", ALT, None]


@pytest.mark.parametrize("damage", [b"trailer", b"/Root", b"startxref"])
def test_a_pdf_with_another_table_of_objects_is_unchanged(damage):
    other_pdf = SMALL_PDF.replace(damage, b"/Other")
    assert with_metadata(other_pdf, "pdf", TITLE, ALT) == other_pdf
