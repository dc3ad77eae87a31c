"""Read tables: which cells are numbers, text or missing.

`read_foreign` reads tables that others wrote, `read_table` those that `kit.runs.write_table` wrote. Neither guesses:
`001` is text. An empty cell is missing, and so is BIDS's `n/a`, except in tables whose text the kit has quoted.
"""

from __future__ import annotations

import csv
import io
import re
import unicodedata
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pandas as pd

from kit.errors import KitError
from kit.runs import shown

NUMBER = r"[+-]?(?:0|[1-9]\d*|(?=\.\d))(?:\.\d*)?(?:[eE][+-]?\d+)?"  # 007 is a name, not a number
DECIMAL_COMMA = r"[+-]?(?:0|[1-9]\d*),\d+"
THOUSANDS = r"[+-]?[1-9]\d{0,2},\d{3}"  # 1,234 may be 1.234 or 1234
DATE = r"\d{1,4}[-./]\d{1,2}[-./]\d{1,4}(?:[ T].*)?|\d{1,2}-[A-Z][a-z]{2}(?:-\d{2,4})?|[A-Z][a-z]{2}-\d{2,4}"
MISSING = ("", "n/a")
SPREADSHEET_ERRORS = ("#N/A", "#REF!", "#VALUE!", "#NAME?", "#DIV/0!", "#NUM!", "#NULL!")
# -1, and 7, 8, 9 repeated one to four times (7, 77, ... 9999), of either sign
CODES_FOR_MISSING = frozenset(sign * int(digit * times) for sign in (1, -1) for digit in "789"
                              for times in range(1, 5)) | {-1}
WORDS_FOR_MISSING = ("na", "n/a", "nan", "none", "null", "unknown", "missing", ".", "-", "?")  # ignoring case
NO_AGES = (777, 888, 999, 7777, 8888, 9999)  # codes for a missing value, as are negative numbers
COLUMNS = ("participant", "session", "dataset", "image_path", "mask_path")  # a cohort's columns, besides labels
INVISIBLE = dict.fromkeys(map(ord, "\ufeff\u200b\u200c\u200d\u2060"))  # byte-order mark and zero-width characters


class CohortError(KitError, ValueError):
    """A cohort cannot be read; the message names the file and what to do."""


class TableError(CohortError):
    """A table cannot be read; the message names the file, what is wrong and the cure."""


def say(words: str, level: int = 5) -> None:
    """Warn about a cohort's files, at the line that called `read_cohort`.

    Args:
        level: `warnings.warn`'s stacklevel: 3 if `read_cohort` itself calls this, one more for each function between.
    """
    warnings.warn(words, stacklevel=level)


def ages(column: pd.Series) -> pd.Series:
    """Ages as numbers; nan for text such as `NA`, negative numbers and `NO_AGES`.

    Unchanged if at least as many cells hold other text, such as `60-69`, as hold numbers.
    """
    numbers = pd.to_numeric(column, errors="coerce")
    text = column[numbers.isna()].dropna()
    if numbers.notna().sum() <= sum(not looks_missing(cell) for cell in text):
        return column
    return numbers.mask((numbers < 0) | numbers.isin(NO_AGES))


def spelled(table: pd.DataFrame, name: str) -> str | None:
    """Return the heading that is `name` (lower case), else the first that differs only in case, else None."""
    return next((each for each in [name, *table] if each in table and str(each).casefold() == name), None)


def numbers_of(column: pd.Series) -> pd.Series | None:
    """Return a column's numbers, nan in cells that look like a missing value (`NA`); None if it holds other text.

    `007` is text, as a column of such codes names things; a column without any number is text, too.
    """
    if pd.api.types.is_numeric_dtype(column):
        return column
    known = column.dropna().astype(str)
    number = known.map(trimmed).str.fullmatch(NUMBER)
    if not number.any() or not known[~number].map(looks_missing).all():
        return None
    return pd.to_numeric(column.where(number.reindex(column.index, fill_value=False)))


def looks_missing(cell: object) -> bool:
    """Return whether a cell looks like a code for a missing value: `WORDS_FOR_MISSING` or `CODES_FOR_MISSING`."""
    text = trimmed(str(cell)).casefold()
    return text in WORDS_FOR_MISSING or bool(re.fullmatch(NUMBER, text)) and float(text) in CODES_FOR_MISSING


def trimmed(text: str) -> str:
    """Normalise text to Unicode NFKC, without surrounding whitespace or invisible characters."""
    return unicodedata.normalize("NFKC", text.translate(INVISIBLE)).strip()


def _trimmed_path(cell: str) -> str:
    """Return a path without surrounding whitespace or invisible characters; NFKC would name another file."""
    return cell.strip().strip("".join(map(chr, INVISIBLE))).strip()


def typed(column: pd.Series, where: str = "", semicolons: bool = False) -> pd.Series:
    """Convert text cells to numbers if every cell that is not missing is a number; otherwise keep the text.

    Args:
        column: (rows,) text.
        where: file and column, such as "a.tsv: age", for error messages. If given, decimal commas are read (`63,5`),
            unless a cell of the column has a decimal point.
        semicolons: cells were separated by semicolons, as spreadsheets do where the comma marks decimals.

    Returns:
        (rows,) int64, float64, or text; nan where a cell is missing.

    Raises:
        TableError: commas may separate thousands: three digits follow each, and a number without a comma is larger than
            one with a comma would be as a decimal (987 beside 1,234, read as 1.234), or there is none and no semicolon.
    """
    present = column[~column.isin(MISSING)]
    if where and present.str.fullmatch(f"{DECIMAL_COMMA}|{NUMBER}").all() and not present.str.contains(
            ".", regex=False).any():
        _check_commas(present, where, semicolons)
        column, present = column.str.replace(",", "."), present.str.replace(",", ".")
    if present.str.fullmatch(NUMBER).all():
        return pd.to_numeric(column.where(~column.isin(MISSING)))
    return column.where(~column.isin(MISSING))


def _check_commas(numbers: pd.Series, where: str, semicolons: bool) -> None:
    """Refuse numbers with commas that may separate thousands; see `typed`."""
    with_comma = numbers.str.contains(",", regex=False)
    written, plain = numbers[with_comma], numbers[~with_comma]
    if not len(written) or not written.str.fullmatch(THOUSANDS).all():
        return
    sizes, others = pd.to_numeric(written.str.replace(",", ".")).abs(), pd.to_numeric(plain).abs()
    if (others.max() > sizes.min()) if len(plain) else not semicolons:
        beside = f" beside {plain[others.idxmax()]!r}" if len(plain) else ""
        raise TableError(f"{where} holds {written[sizes.idxmin()]!r}{beside}: does the comma mark decimals or "
                         "thousands? Write the column with decimal points, and no mark between thousands")


def read_foreign(path: Path, headings: Callable[[list[str]], list[str]],
                 text: tuple[str, ...] | None = ()) -> pd.DataFrame:
    """Read a CSV or TSV from any source, separated by comma, semicolon or tab.

    Args:
        path: a file in UTF-8, or in UTF-16 with a byte-order mark.
        headings: turns the headings into column names.
        text: columns to keep as text, with "" for missing cells; None keeps all columns as text.

    Raises:
        TableError: not a table, two columns with one name, a row longer than the header, a spreadsheet error such as
            #REF! in a cell, or commas that may separate thousands.
    """
    lines, between = _cells(path)
    while lines and not any(map(trimmed, lines[-1])):
        lines.pop()
    if not lines or not any(map(trimmed, lines[0])):
        raise TableError(f"{shown(path)} is not a table: it has no header")
    header = headings(lines[0])
    paths = {place for place, name in enumerate(header) if name.casefold().endswith("_path")}
    rows = [(number, [(_trimmed_path if place in paths else trimmed)(cell) for place, cell in enumerate(line)])
            for number, line in enumerate(lines[1:], 2)]
    rows = [(number, row) for number, row in rows if any(row)]
    if long := [number for number, row in rows if any(row[len(header):])]:
        raise TableError(f"{shown(path)}: row {long[0]} has more cells than the header; put cells that hold "
                         f"{between!r} in quotes")
    table = pd.DataFrame([(row + [""] * len(header))[:len(header)] for _, row in rows], columns=range(len(header)),
                         dtype=str)
    if nameless := [place for place in table if not header[place] and table[place].ne("").any()]:
        raise TableError(f"{shown(path)}: column {nameless[0] + 1} has no name; give it one, or remove it")
    table = table[[place for place in table if header[place]]]
    names = [header[place] for place in table]
    if doubled := [name for name, count in Counter(names).items() if count > 1]:
        written = ", ".join(repr(lines[0][place]) for place, name in enumerate(header) if name == doubled[0])
        raise TableError(f"{shown(path)}: several columns are {doubled[0]} ({written}); keep one")
    for place, name in zip(table, names, strict=True):
        if (broken := table[place].isin(SPREADSHEET_ERRORS)).any():
            raise TableError(f"{shown(path)}: {name} holds {table[place][broken].iloc[0]}, a spreadsheet error, in "
                             f"{int(broken.sum())} rows; correct the formula, or empty the cell")
    columns = {name: table[place].where(~table[place].isin(MISSING), "") if text is None or name in text
               else typed(table[place], f"{shown(path)}: {name}" if between != "," else "", between == ";")
               for place, name in zip(table, names, strict=True)}
    return pd.DataFrame(columns, index=table.index)


def _cells(path: Path) -> tuple[list[list[str]], str]:
    """Return the cells row by row, and the separator: the most frequent in the header; the suffix decides ties."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        broken = "a link to a file that is not there" if path.is_symlink() and not path.exists() else error.strerror
        raise TableError(f"{shown(path)} cannot be read: {broken}") from None
    try:
        content = raw.decode("utf-16" if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise TableError(f"{shown(path)} is not a UTF-8 table ({error}); save it as `CSV UTF-8`") from None
    first = content.lstrip().partition("\n")[0]
    usual = "\t" if path.suffix.lower() == ".tsv" else ","
    between = max((usual, *({",", ";", "\t"} - {usual})), key=lambda mark: (first.count(mark), mark == usual))
    def rows(strict: bool) -> list[list[str]]:
        return list(csv.reader(io.StringIO(content.lstrip("\n\r"), newline=""), delimiter=between, strict=strict))

    try:
        return rows(strict=True), between
    except csv.Error as error:
        if "after" in str(error):  # text after a closing quote, as in `"left" hand`: read it literally
            found = rows(strict=False)
            if not any("\n" in cell or "\r" in cell for row in found for cell in row):  # else one cell may hold rows
                return found, between
        raise TableError(f"{shown(path)} is not a table: {error}; look for a quote that is not closed") from None


def read_table(path: str | Path, text: tuple[str, ...] = ()) -> pd.DataFrame:
    """Read a table that the kit wrote, so that text stays text even if it looks like a number.

    The kit quotes text and leaves numbers unquoted. In a table without quotes (from an older kit or another tool), a
    column is numeric if all its cells are numbers; `001` is not one.

    Args:
        path: the CSV.
        text: columns to read as text whatever the file says, with "" for empty cells.

    Returns:
        one row per row of the file: int64, float64 or text columns, nan in empty cells; a column without any filled
        cell is float64.
    """
    cells = pd.read_csv(path, dtype=str, keep_default_na=False)
    quoted = _quoted_columns(Path(path))
    for place, name in enumerate(cells):
        if name in text:
            continue
        present = cells[name].where(cells[name] != "")
        if quoted is None:
            cells[name] = typed(cells[name])
        else:
            cells[name] = present if place in quoted else pd.to_numeric(present)
    return cells


def _quoted_columns(path: Path) -> set[int] | None:
    """Return the positions of columns with quoted text; None if the file does not quote its text."""
    try:
        with open(path, encoding="utf-8", newline="") as file:
            rows = list(csv.reader(file, quoting=csv.QUOTE_NONNUMERIC))
    except ValueError:  # unquoted text
        return None
    return {place for row in rows[1:] for place, cell in enumerate(row) if isinstance(cell, str) and cell}
