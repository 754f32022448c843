"""The pages in docs/ and the README: what they link to and name exists, and is true."""

import pathlib
import re
import subprocess

import pytest

from pr1_jax import answers, defaults

ROOT = pathlib.Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_CODE = re.compile(r"`([^`\n]+)`")
_FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
_FOLDERS = "pr1_jax|configs|tests|docs|launch|notebooks"
_FILE = re.compile(
    rf"(?:{_FOLDERS})/[\w./]*\w|\w[\w/]*\.(?:py|sh|md|ipynb|html|json)\b"
)
_ENDINGS = (".py", ".md", ".ipynb", ".safetensors")  # of files, not of fields
# What a run or an export writes, not a file of the repository.
_WRITTEN = {
    "benchmarks.md",
    "config.json",
    "generation_config.json",
    "pr1_jax.json",
    "problems.jsonl",
    "run.json",
    "traces.jsonl",
}


def anchors(page: pathlib.Path) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", _FENCE.sub("", page.read_text()), re.MULTILINE)
    plain = [re.sub(r"[^\w\- ]", "", title.lower()) for title in titles]
    return {title.replace(" ", "-") for title in plain}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    broken = []
    for link in _LINK.findall(_FENCE.sub("", page.read_text())):
        if link.startswith(("https://", "http://", "mailto:")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert not broken


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_are_named_exist(page):
    """`pr1_jax/…` and such from the root; shorter names anywhere in the repository."""
    tracked = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    names = {"/" + path for path in tracked} | {
        f"/{parent}" for path in tracked for parent in pathlib.PurePath(path).parents
    }
    text = page.read_text()
    named = {name for code in _CODE.findall(text) for name in _FILE.findall(code)}
    missing = [
        name
        for name in sorted(named - _WRITTEN)
        if not name.startswith("runs/")
        and not any(path.endswith("/" + name.rstrip("/")) for path in names)
    ]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_fields_that_are_named_exist(page):
    """`rl.lr` in the text, `--config.rl.lr=…` in commands."""
    config, text = defaults.get_config(), page.read_text()
    sections = "|".join(name for name in config if hasattr(config[name], "keys"))
    named = re.findall(rf"`((?:{sections})\.[a-z_.]+)", text)
    named += re.findall(r"--config\.([a-z_.]+)=", text)
    missing = []
    for field in named:
        found = config
        for name in field.removesuffix(".").split("."):
            found = found.get(name) if hasattr(found, "keys") else None
        if found is None and not field.endswith(_ENDINGS):
            missing.append(field)
    assert not missing


def answer_pairs() -> list[tuple[str, str, str]]:
    """(answer, reference, verdict) of the table of docs/method.md, section 5."""
    text = (ROOT / "docs" / "method.md").read_text()
    table = text.split("| kind | rule | equal | not equal |\n")[1].split("\n\n")[0]
    pairs = []
    for row in table.splitlines()[1:]:
        equal, unequal = row.split(" | ")[-2:]
        for cell, verdict in ((equal, answers.CORRECT), (unequal, answers.INCORRECT)):
            for group in re.split(r";(?=[^`]*(?:`[^`]*`[^`]*)*$)", cell.rstrip(" |")):
                first, *others = reversed(_CODE.findall(group) or [""])
                found = answers.UNDECIDED if group.endswith("\\*") else verdict
                pairs += [(other, first, found) for other in others]
    return pairs


def test_answers_are_judged_as_the_table_says():
    pairs = answer_pairs()
    assert len(pairs) > 90
    responses = [f"Final Answer: {answer}" for answer, _, _ in pairs]
    found = answers.check_many(responses, [reference for _, reference, _ in pairs])
    judged = [(*pair[:2], r.verdict) for pair, r in zip(pairs, found, strict=True)]
    assert judged == pairs


def test_readme_can_be_read_to_its_end():
    text = (ROOT / "README.md").read_text()
    assert len(text.split()) <= 1200
    assert not re.search(r"`[0-9a-f]{7,40}`", text), "a commit hash"


@pytest.mark.parametrize("file", sorted((ROOT / "notebooks").rglob("*.*")), ids=str)
def test_pictures_and_notebooks_are_small(file):
    limits = {".png": 100_000, ".svg": 100_000, ".ipynb": 400_000}
    assert file.stat().st_size < limits.get(file.suffix, 400_000)
