"""Where a storage's URL leads: the one answer for the engine, the lock and the messages."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qsl, unquote, urlsplit

from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, NoSuchModuleError

from evomerge.errors import InputError
from evomerge.masking import masked_url

FORMS = "Write a file, or sqlite:///FILE, or postgresql+psycopg://USER@HOST:PORT/DATABASE."
# a driver's module -> the package that has it
PACKAGES = {
    "psycopg": "psycopg[binary]",
    "psycopg2": "psycopg2-binary",
    "MySQLdb": "mysqlclient",
    "mysql": "mysql-connector-python",
    "oracledb": "oracledb",
}
# what SQLAlchemy takes from the URL of an SQLite file
OPTIONS = {"uri", "timeout", "isolation_level", "detect_types", "check_same_thread"}
OPTIONS |= {"cached_statements"}


@dataclass(frozen=True)
class StoragePlace:
    """A storage: `file` is the database that SQLite opens, None for a server's."""

    url: str
    parsed: URL
    file: Path | None

    @property
    def shown(self) -> str:
        """The file, or the URL without its secrets."""
        return masked_url(self.url) if self.file is None else str(self.file)

    @property
    def optuna_url(self) -> str:
        """The URL as Optuna wants it, which fills in {…}."""
        return self.url.replace("{", "{{").replace("}", "}}")

    @property
    def plain_sqlite(self) -> bool:
        """Whether Python's own sqlite3 reads the file."""
        driver = self.parsed.get_driver_name()
        return self.file is not None and driver in ("pysqlite", "pysqlite_numeric")


def storage_place(url: str) -> StoragePlace:
    """The place of a storage's URL, or of an SQLite file's path.

    Raises InputError for what is no storage's URL, has no driver here, or is only in memory.
    """
    if "://" not in url:
        url = file_url(Path(url))
    try:
        parsed = make_url(url)
        dialect = parsed.get_dialect()
    except (ArgumentError, NoSuchModuleError, ValueError) as error:
        raise InputError(
            f"not a storage's URL: {_reason(error)}",
            where="--storage",
            found=masked_url(url),
            remedy=FORMS,
        ) from error
    if "@" in (parsed.host or ""):
        raise InputError(
            "the user or password contains an @ that is not encoded",
            where="--storage",
            found=masked_url(url),
            remedy="Write %40 for it.",
        )
    _check_driver(url, parsed)
    if dialect.name != "sqlite":
        return StoragePlace(url, parsed, None)
    _check_sqlite(url, parsed)
    file = _sqlite_file(parsed)
    if file is None:
        raise InputError(
            "an SQLite database in memory is lost when the command ends",
            where="--storage",
            found=masked_url(url),
            remedy="Name a file: sqlite:///FILE.",
        )
    if file.exists() and not file.is_file():
        raise InputError(
            "an SQLite storage is a regular file",
            where="--storage",
            found=str(file),
            remedy="Name a file: sqlite:///FILE.",
        )
    return StoragePlace(url, parsed, file)


def file_url(path: Path) -> str:
    """The URL of an SQLite file, whatever characters its path has. Raises InputError."""
    for url in (
        f"sqlite:///{path}",
        URL.create("sqlite", database=str(path)).render_as_string(hide_password=False),
    ):
        parsed = make_url(url)
        if parsed.database == str(path) and not parsed.query:
            return url
    raise InputError(
        "the path contains a character that a storage's URL cannot have",
        where="--storage",
        found=str(path),
        remedy="Rename it.",
    )


def _check_sqlite(url: str, parsed: URL) -> None:
    """Raise InputError where another file would be opened than the one that is meant."""
    if parsed.host or parsed.port:
        raise InputError(
            "an SQLite file has no host",
            where="--storage",
            found=masked_url(url),
            remedy="Write three slashes: sqlite:///FILE.",
        )
    options = {key for key, _ in parse_qsl(url.partition("?")[2], keep_blank_values=True)}
    if parsed.get_driver_name() != "pysqlcipher" and not _is_uri(parsed) and options - OPTIONS:
        raise InputError(
            "everything after a ? is an option, and SQLite has none of this name",
            where="--storage",
            found=masked_url(url),
            remedy="Name the file without sqlite:///, or write %3F for a ? in its name.",
        )


def _is_uri(parsed: URL) -> bool:
    return str(parsed.query.get("uri", "")).lower() in ("true", "1", "yes", "on", "y", "t")


def _sqlite_file(parsed: URL) -> Path | None:
    """The file that SQLite opens; None where the database is in memory, or a temporary file."""
    database, query = parsed.database or "", parsed.query
    if _is_uri(parsed) and database.startswith("file:"):
        database = unquote(urlsplit(database).path)
    if database in ("", ":memory:") or query.get("mode") == "memory":
        return None
    if query.get("vfs") == "memdb":
        return None
    return Path(database)


def _check_driver(url: str, parsed: URL) -> None:
    """Raise InputError where the driver is not installed, or cannot be used by Optuna."""
    dialect = parsed.get_dialect()
    if getattr(dialect, "is_async", False):
        raise InputError(
            f"the driver {parsed.get_driver_name()} is asynchronous, which Optuna cannot use",
            where=masked_url(url),
            remedy=FORMS,
        )
    try:
        dialect.import_dbapi()
    except ImportError as error:
        module = (error.name or parsed.get_driver_name()).partition(".")[0]
        package = PACKAGES.get(module, module)
        raise InputError(
            f"the storage needs the driver {module}, which is not installed",
            where=masked_url(url),
            remedy=f"Run pip install '{package}'.",
        ) from error


def _reason(error: Exception) -> str:
    if isinstance(error, NoSuchModuleError):
        return "no database of this kind is known"
    if isinstance(error, ArgumentError):
        return "it cannot be read"
    return "its port is not a number"
