"""The examples of the README run as they stand."""

import re
from pathlib import Path

import pytest

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
NORMS = ["layer_norm", "rms_norm", "group_norm", "instance_norm", "batch_norm"]


@pytest.fixture(scope="module")
def blocks():
    return re.findall(r"^```python\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)


@pytest.mark.usefixtures("threads", "pool")  # some examples turn the controls; the fixtures turn them back
def test_examples_run(blocks):
    """In order and in one namespace, as a reader types them."""
    namespace = {}
    for number, block in enumerate(blocks):
        exec(compile(block, f"README.md, example {number + 1}", "exec"), namespace)


@pytest.mark.parametrize("norm", NORMS)
def test_every_norm_has_an_example_of_at_most_five_lines(blocks, norm):
    examples = [block for block in blocks if f"nf.{norm}(" in block and f"nf.{norm}_backward(" in block]
    assert examples
    assert all(block.count("\n") <= 5 for block in examples)


def test_links_lead_somewhere():
    targets = re.findall(r"\]\((?!https?://)([^)#]+)", README)
    assert targets
    missing = [target for target in targets if not (Path(__file__).parents[1] / target).exists()]
    assert missing == []
