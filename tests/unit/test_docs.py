"""What the documentation says can be done can be done: links lead somewhere, flags and names exist."""

import inspect
import re
import shlex
from pathlib import Path

import click
import pytest

import kvprofile
from kvprofile.cli import main
from tests.unit.conftest import run

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
API = (ROOT / "docs" / "python.md").read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_inside_the_repository_leads_somewhere(page):
    text = page.read_text()
    for target in LINK.findall(text):
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = target.partition("#")
        there = page if not name else (page.parent / name).resolve()
        assert there.exists(), f"{page.name} links {target}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", there.read_text(), flags=re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


def _commands(page):
    """The lines of code blocks that call the command line, continued lines joined."""
    for block in re.findall(r"```(?:console|bash|sh)?\n(.*?)```", page.read_text(), flags=re.DOTALL):
        for line in re.findall(
            r"^(?:\$ )?(?:\w+=\S+ )?kvprofile (\w.*)$", block.replace("\\\n", " "), flags=re.MULTILINE
        ):
            yield shlex.split(line, comments=True)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_shown_has_its_flags(page):
    for name, *words in _commands(page):
        assert name in main.commands, f"{page.name} shows kvprofile {name}"
        flags = {flag for parameter in main.commands[name].params for flag in parameter.opts} | {"-h", "--help"}
        unknown = [
            word for word in words if word.startswith("-") and word.partition("=")[0] not in flags and word != "-"
        ]
        assert not unknown, f"{page.name} shows kvprofile {name} {unknown}"


def test_every_page_is_in_the_index():
    index = (ROOT / "docs" / "README.md").read_text()
    for page in PAGES:
        assert page.name in index, page


def _section(name):
    return API.partition(f"\n## `{name}`\n")[2].partition("\n## ")[0]


@pytest.mark.parametrize("name", kvprofile.__all__)
def test_every_public_name_is_explained_with_its_parameters(name):
    section = _section(name)
    assert section.strip(), f"docs/python.md has no section ## `{name}`"
    value = getattr(kvprofile, name)
    if inspect.isclass(value):
        known = {part for part, member in vars(value).items() if part[0] != "_" and callable(member)}
        known |= {part for part, member in vars(value).items() if part[0] != "_" and isinstance(member, classmethod)}
        for method in known - {"model_post_init"}:  # pydantic's
            assert f"{method}(" in section, f"{name}.{method}"
    else:
        shown = re.search(rf"`{name}\(([^`]*)\)`", section)
        assert shown, f"docs/python.md does not show how to call {name}"
        names = [part.partition("=")[0].strip() for part in shown[1].split(",")]
        assert [part for part in names if part != "*"] == _parameters(value)


def _parameters(function):
    """Names of what a function takes, those of a `**settings: Unpack[TypedDict]` one by one."""
    names = []
    for name, parameter in inspect.signature(function).parameters.items():
        unpacked = getattr(parameter.annotation, "__args__", ()) if parameter.kind is parameter.VAR_KEYWORD else ()
        names += list(unpacked[0].__annotations__) if unpacked else [name]
    return names


def test_nothing_is_explained_that_is_not_public():
    assert set(re.findall(r"^## `(\w+)`$", API, flags=re.MULTILINE)) == set(kvprofile.__all__)


def test_every_array_beside_a_profile_is_in_the_format(tiny_profile):
    text = (ROOT / "docs" / "profile-format.md").read_text()
    for name in kvprofile.load_arrays(kvprofile.load_profile(tiny_profile), tiny_profile):
        assert f"`{re.sub('[.](chain|anchor|complete)$', '.RULE', name)}`" in text, name


def test_the_python_examples_run(tiny_profile, tmp_path, monkeypatch):
    """The second example, which needs no model; the first is the first notebook."""
    example = [block for block in re.findall(r"```python\n(.*?)```", API, flags=re.DOTALL) if "replan" in block]
    monkeypatch.chdir(tmp_path)
    profile = kvprofile.load_profile(tiny_profile)
    kvprofile.save_profile(profile, kvprofile.load_arrays(profile, tiny_profile), "profile.json")
    exec(example[0], {})
    assert kvprofile.load_profile("quarter.json").plan.budget == 0.25


@pytest.mark.parametrize("name", main.commands)
def test_help_explains_every_flag_and_gives_an_example(name):
    command = main.commands[name]
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert parameter.help, f"{name} {parameter.opts}"
            assert parameter.help.endswith((".", "]")), f"{name} {parameter.opts}"
    text = run(name, "--help").stdout
    assert "Example" in text or not any(isinstance(parameter, click.Argument) for parameter in command.params)
    assert max(map(len, text.splitlines())) <= 128


def test_the_list_of_commands_cuts_no_sentence():
    assert "..." not in run("--help").stdout.partition("Commands:")[2]
