"""tables.py: the tables are made from the results."""

import re

import pytest

from tests.conftest import ROOT, load_module

TEXTS = ("README.md", "experiments/README.md")


@pytest.fixture(scope="module")
def tables_py():
    return load_module(ROOT / "experiments" / "tables.py")


def test_tables_are_those_of_the_results(tables_py):
    assert tables_py.main(["--check"]) == 0


def test_every_table_has_its_markers_once(tables_py):
    texts = "".join((ROOT / name).read_text() for name in TEXTS)
    for name in tables_py.tables():
        assert texts.count(f"<!-- {name} -->") == texts.count(f"<!-- end {name} -->") == 1, name


def test_the_documentation_includes_tables_that_exist():
    texts = "".join((ROOT / name).read_text() for name in TEXTS)
    for path in sorted((ROOT / "docs").glob("*.md")):
        for marker in re.findall(r'(?:start-after|end-before): "(<!-- .* -->)"', path.read_text()):
            assert texts.count(marker) == 1, f"{path.name}: {marker}"


def test_a_changed_number_is_found_and_restored(tables_py, tmp_path, monkeypatch, capsys):
    (tmp_path / "experiments").mkdir()
    for name in TEXTS:
        (tmp_path / name).write_text((ROOT / name).read_text())
    (tmp_path / "experiments" / "results").symlink_to(ROOT / "experiments" / "results")
    monkeypatch.setattr(tables_py, "ROOT", tmp_path)
    changed = tmp_path / "experiments" / "README.md"
    text = changed.read_text()
    assert text.count("92.15, 91.97, 91.83") == 1
    changed.write_text(text.replace("92.15, 91.97, 91.83", "92.16, 91.97, 91.83"))
    assert tables_py.main(["--check"]) == 1
    assert "experiments/README.md differs" in capsys.readouterr().out
    assert tables_py.main([]) == 0
    assert changed.read_text() == text
    assert tables_py.main(["--check"]) == 0
