"""The mutation run (_mutation.py) can be trusted: it finds what it should change, and changes nothing else."""

from __future__ import annotations

import pytest

from _mutation import FILES, ROOT, RULES, mutations_of, sample_of, write

CODE = """
#define TWICE(x) ((x) + (x))
// if (a < b) nothing
template <int N> struct Some {};
int f(int a, int b) {
  if (a < b && !good(a)) return a + b;
  for (int i = 0; i < n; ++i) x[i] = "a < b";
  close_group(t, true);
  constexpr int c = a + b;
  return a == 1 ? a * b : 0;
}
"""


def test_what_is_changed():
    found = {(m.rule, m.original, m.becomes) for m in mutations_of("f.cpp", CODE)}
    assert found == {
        ("true", "a < b && !good(a)", "true"),
        ("false", "a < b && !good(a)", "false"),
        ("comparison", "a < b", "a <= b"),
        ("arithmetic", "a + b", "a - b"),
        ("comparison", "i < n", "i <= n"),
        ("statement", "close_group(t, true)", "nothing"),
        ("comparison", "a == 1", "a != 1"),
        ("arithmetic", "a * b", "a + b"),
    }


def test_places_are_those_of_the_text():
    for file in FILES:
        text = (ROOT / file).read_text()
        for m in mutations_of(file, text):
            assert text[m.start : m.end].rstrip(";") == m.original
            assert text.count("\n", 0, m.start) + 1 == m.line


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_finds_places(rule):
    assert sum(m.rule == rule for file in FILES for m in mutations_of(file, (ROOT / file).read_text())) > 20


def test_one_build_holds_a_sample(tmp_path):
    """Every number stands in the sources once, and no line has moved."""
    sample, found = sample_of(300, seed=2)
    assert len(sample) == 300 < found
    numbered = dict(enumerate(sample, start=1))
    for file in FILES:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    write(tmp_path, numbered)
    texts = {file: (tmp_path / file).read_text() for file in FILES}
    for number, m in numbered.items():
        here = [
            file
            for file, text in texts.items()
            if f"nf_mutant == {number} " in text or f"nf_mutant != {number})" in text
        ]
        assert [str(file) for file in here] == [m.file]
        assert f"{number}" in texts[here[0]].splitlines()[m.line - 1]
    for file in FILES:
        assert texts[file].count("\n") == (ROOT / file).read_text().count("\n")
