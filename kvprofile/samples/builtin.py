"""The default text, which needs no download: prose and code that ship with Python, and our own encyclopedia.

*Prose* is the language reference that `help()` reads and long docstrings of standard modules; *code* is the source of
other standard modules, so that no docstring occurs in both. The files are found without importing them. Their wording
depends on the Python version, so another Python gives other token ids; the digest of the samples tells.
"""

from __future__ import annotations

import ast
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from kvprofile.errors import KVProfileError
from kvprofile.samples.documents import Document
from kvprofile.samples.encyclopedia import entries

SHARES = {"prose": 3, "code": 3, "encyclopedia": 2}
"""Samples of each kind out of every eight."""

ENTRIES = 1200
"""Encyclopedia entries: about as much text as there is prose."""

MIN_CHARACTERS = 100_000
"""Less of a kind than this means that Python was installed without its sources."""

MIN_PARAGRAPH = 40
"""Characters from which a paragraph that occurs a second time is left out; shorter ones repeat by their nature."""

MIN_DOCSTRING = 300
"""Characters from which a docstring is prose rather than a remark."""

PROSE_MODULES = """
_threading_local bdb calendar cmd codecs configparser contextlib copy difflib email/charset email/header
email/headerregistry email/message email/policy email/_policybase fileinput fractions ftplib functools getopt
gettext graphlib heapq http/cookiejar http/server imaplib importlib/metadata ipaddress json json/decoder
json/encoder locale lzma mimetypes optparse os pkgutil plistlib poplib queue random re shelve shutil smtplib
socketserver ssl statistics string tempfile textwrap threading timeit trace traceback unittest uuid wave
wsgiref/validate xml/sax/handler xml/sax/xmlreader xmlrpc/client xmlrpc/server zoneinfo
"""

CODE_MODULES = """
_pydecimal _pydatetime _pyio argparse ast asyncio/base_events asyncio/events asyncio/streams asyncio/tasks base64
collections compileall concurrent/futures/process cProfile csv dataclasses datetime doctest
email/_header_value_parser enum glob hmac html/parser http/client http/cookies inspect logging logging/handlers
mailbox multiprocessing/managers multiprocessing/pool ntpath nturl2path pathlib pdb pickle pickletools platform
posixpath pprint pstats pydoc reprlib sched selectors site socket sqlite3/dump subprocess symtable tarfile tokenize
typing unittest/case unittest/mock urllib/parse urllib/request urllib/robotparser venv weakref webbrowser
xml/dom/minidom xml/etree/ElementTree zipfile
"""


def builtin_documents(seed: int) -> list[Document]:
    """The built-in documents of all three kinds; the seed picks the encyclopedia's entries.

    Raises:
        KVProfileError: this Python lacks the sources of its own library.
    """
    library = Path(sysconfig.get_path("stdlib"))
    documents = [*_prose(library), *_code(library)]
    for kind in ("prose", "code"):
        found = sum(len(document.text) for document in documents if document.kind == kind)
        if found < MIN_CHARACTERS:
            raise KVProfileError(
                f"the built-in {kind} has {found:,} characters, expected at least {MIN_CHARACTERS:,}: this Python "
                f"comes without the sources of its standard library in {library}; give your own text with --data"
            )
    documents += (Document(entry.text, "encyclopedia", entry.title) for entry in entries(seed, ENTRIES))
    return documents


def _prose(library: Path) -> Iterator[Document]:
    """Topics and docstrings, each paragraph once: the topics quote one another at length, and so do some docstrings."""
    seen: set[str] = set()
    texts = [*_topics()]
    texts += ((name, "\n\n\n".join(_docstrings(source))) for name, source in _sources(library, PROSE_MODULES))
    for name, text in texts:
        fresh = []
        for paragraph in text.split("\n\n"):
            words = " ".join(paragraph.split())
            if len(words) < MIN_PARAGRAPH or words not in seen:
                fresh.append(paragraph)
                seen.add(words)
        if len("".join(fresh)) >= MIN_DOCSTRING:
            yield Document("\n\n".join(fresh).strip(), "prose", name)


def _code(library: Path) -> Iterator[Document]:
    for name, source in _sources(library, CODE_MODULES):
        if source.strip():
            yield Document(source, "code", f"{name}.py")


def _sources(library: Path, modules: str) -> Iterator[tuple[str, str]]:
    """Name and source of the modules there are; some became packages or went away between Python versions."""
    for module in modules.split():
        for path in (library / f"{module}.py", library / module / "__init__.py"):
            if path.is_file():
                yield module, path.read_text(encoding="utf-8", errors="replace")
                break


def _topics() -> Iterator[tuple[str, str]]:
    """The chapters of the language reference, in an order that does not depend on the Python version."""
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions package it apart; whether enough is left is checked later
        return
    yield from ((f"reference on {name}", topics[name]) for name in sorted(topics))


def _docstrings(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text and len(text) >= MIN_DOCSTRING:
                yield text
