"""The mutation check of tests/conftest.py, tried on tests that check, and that do not."""

from __future__ import annotations

from pathlib import Path

pytest_plugins = ["pytester"]

TESTS = """
import pytest, torch
from hsd_kernels import fused_hsd_loss, parity

@pytest.fixture
def arguments():
    torch.manual_seed(0)
    return torch.randn(3, 4), torch.randn(3, 4), torch.randn(5, 4)

def gradient(arguments, **options):
    student, teacher, weight = arguments
    student = student.detach().requires_grad_()
    fused_hsd_loss(student, teacher, weight, **options).loss.backward()
    return student.grad

@pytest.mark.gradient
def test_compares_with_the_truth(arguments):
    expected = gradient(arguments, backend="reference")
    torch.testing.assert_close(gradient(arguments), expected)

@pytest.mark.gradient
def test_compares_directions_only(arguments):
    found, expected = gradient(arguments), gradient(arguments, backend="reference")
    assert torch.cosine_similarity(found.flatten(), expected.flatten(), dim=0) > 0.99

@pytest.mark.gradient
def test_compares_directions_of_parity(arguments):
    student, teacher, weight = arguments
    leaf = student.detach().requires_grad_()
    parity.full_divergence(leaf, teacher, weight).sum().backward()
    expected = gradient(arguments, backend="reference")
    assert torch.cosine_similarity(leaf.grad.flatten(), expected.flatten(), dim=0) > 0.99

@pytest.mark.gradient
def test_never_uses_the_op(arguments):
    assert gradient(arguments, backend="reference").isfinite().all()
"""


def test_mutations_are_counted_and_a_test_that_misses_one_fails_and_names_it(pytester):
    pytester.makeconftest((Path(__file__).parents[1] / "conftest.py").read_text())
    pytester.makepyfile(TESTS)
    # In a process of its own: torch does not survive that pytester unloads it.
    result = pytester.runpytest_subprocess("--strict-markers", "-p", "no:cacheprovider", "-v")
    result.stdout.fnmatch_lines(
        [
            "*::test_compares_with_the_truth PASSED*",
            "*::test_compares_directions_only FAILED*",
            "*::test_compares_directions_of_parity FAILED*",
            "*::test_never_uses_the_op PASSED*",
            "passes on a wrong gradient: student_grad x 1.05",
            "gradient mutations caught: 7 / 9",
        ]
    )
