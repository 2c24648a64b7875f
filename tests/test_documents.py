import re
import shlex

import pytest

from provq.recipe import load, shipped

PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "docs/architecture.md",
    "docs/bitstreams.md",
    "docs/choosing.md",
    "docs/clusters.md",
    "docs/diagnostics.md",
    "docs/export.md",
    "docs/generation.md",
    "docs/images.md",
    "docs/measuring_generation.md",
    "docs/method.md",
    "docs/proteins.md",
    "docs/quantizers.md",
    "docs/results.md",
    "docs/tokens.md",
]


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", page, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page, root):
    path = root / page
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", path.read_text()):
        if not target.startswith("http"):
            assert (path.parent / target).exists(), f"{page} links to {target}"


@pytest.mark.parametrize("page", PAGES)
def test_python_on_pages_runs(page, root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for block in blocks((root / page).read_text(), "python"):
        exec(compile(block, page, "exec"), {})


@pytest.mark.parametrize("page", PAGES)
def test_commands_on_pages_parse(page, root):
    """Every command of a shell block is one that exists, with options that it has."""
    import typer

    from provq.cli import app

    group = typer.main.get_command(app)
    for block in blocks((root / page).read_text(), "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line.partition("#")[0])
            if words[:1] != ["provq"]:
                continue
            command, rest = group, words[1:]
            while hasattr(command, "commands"):
                command, rest = command.commands[rest[0]], rest[1:]
            command.make_context(command.name, list(rest), resilient_parsing=False)


def test_every_recipe_opens_with_what_it_is_and_how_to_run_it(root):
    for name in shipped():
        text = (root / "src" / "provq" / "recipes" / f"{name}.yaml").read_text()
        assert re.match(rf"# .+\n#   provq train {re.escape(name)} ", text), name
        load(name)


def test_the_make_targets_of_the_readme_exist(root):
    makefile = (root / "Makefile").read_text()
    named = re.findall(r"(?:`|^    )make ([a-z-]+)", (root / "README.md").read_text(), re.MULTILINE)
    assert {"demo", "test", "help"} <= set(named)
    for target in named:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
