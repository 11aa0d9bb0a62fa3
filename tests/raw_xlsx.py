"""Writes .xlsx files part by part, for what no library writes."""

import zipfile

MAIN = "http://schemas.openxmlformats.org/spreadsheetml/2006/main"
OFFICE = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"
PACKAGE = "http://schemas.openxmlformats.org/package/2006/relationships"


def relations(*pairs, kind=OFFICE):
    """A part of relationships from (kind, target) pairs, with ids r1, r2, …"""
    found = "".join(
        f'<Relationship Id="r{i}" Type="{kind}/{name}" Target="{target}"/>'
        for i, (name, target) in enumerate(pairs, start=1)
    )
    return f'<Relationships xmlns="{PACKAGE}">{found}</Relationships>'


def sheet(rows, around="", before=""):
    """A worksheet from the XML of its rows."""
    return f'<worksheet xmlns="{MAIN}">{before}<sheetData>{rows}</sheetData>{around}</worksheet>'


def write(path, sheets, strings="", styles="", states=None, more=None):
    """Sheet title -> XML; `strings` and `styles` are the XML inside of those parts."""
    states = states or {}
    targets = [("worksheet", f"worksheets/s{i}.xml") for i, _ in enumerate(sheets, start=1)]
    listed = "".join(
        f'<sheet name="{title}" sheetId="{i}" r:id="r{i}" state="{states.get(title, "visible")}"/>'
        for i, title in enumerate(sheets, start=1)
    )
    parts = {
        "_rels/.rels": relations(("officeDocument", "xl/workbook.xml")),
        "xl/workbook.xml": f'<workbook xmlns="{MAIN}" xmlns:r="{OFFICE}">'
        f"<sheets>{listed}</sheets></workbook>",
        "xl/_rels/workbook.xml.rels": relations(
            *targets, ("sharedStrings", "/xl/strings.xml"), ("styles", "styles.xml")
        ),
        "xl/strings.xml": f'<sst xmlns="{MAIN}">{strings}</sst>',
        "xl/styles.xml": f'<styleSheet xmlns="{MAIN}">{styles}</styleSheet>',
    }
    for i, text in enumerate(sheets.values(), start=1):
        parts[f"xl/worksheets/s{i}.xml"] = text
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, text in (parts | (more or {})).items():
            file.writestr(name, text)
    return path


def texts(*cells):
    """A row of texts, without the places of row and cells, which are optional."""
    return "<row>" + "".join(f'<c t="inlineStr"><is><t>{c}</t></is></c>' for c in cells) + "</row>"
