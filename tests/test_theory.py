"""Tests of experiments/theory.py: the radius and the paths against plain geometry and plain loops,
then which statements hold, and which do not, on a few dozen instances.

    pytest tests/test_theory.py
"""

import itertools
import math
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import call, printed_by

from experiments import theory
from experiments.theory import DROPPED, STATED, C, T, boundaries, certified, holds, meets, radius

SCRIPT = Path(theory.__file__)
# Scores x_0, x_1 and -x_0. From (3, 1) class 1 draws level at (2, 2), class 2 at (0, 1).
HAND = torch.tensor([[1.0, 0, -1], [0, 1, 0]]).double()
X = torch.tensor([3.0, 1]).double()


@pytest.fixture(scope="module")
def results() -> dict[str, list[float]]:
    torch.manual_seed(0)
    return theory.check(60)


def test_radius_by_hand():
    r, v = boundaries(HAND, X, 0)
    torch.testing.assert_close(r, torch.tensor([math.sqrt(2), 3]).double())
    torch.testing.assert_close(X + r[:, None] * v, torch.tensor([[2.0, 2], [0, 1]]).double())
    assert radius(HAND, X, 1) == pytest.approx(-math.sqrt(2))  # class 0 is ahead of class 1


def test_radius_is_where_a_circle_first_meets_another_class():
    """In the plane a fine circle is a search that knows nothing of the closed form."""
    torch.manual_seed(0)
    angle = torch.linspace(0, 2 * math.pi, 10_001).double()
    circle = torch.stack([angle.cos(), angle.sin()], -1)
    for _ in range(20):
        W, x = theory.randn(2, 5), theory.randn(2)
        y = int((x @ W).argmax())
        r = radius(W, x, y)
        assert (((x + 0.999 * r * circle) @ W).argmax(-1) == y).all()
        assert (((x + 1.001 * r * circle) @ W).argmax(-1) != y).any()


@pytest.mark.parametrize("bonus, expected", [(0, True), (0.1, False), (-0.1, False)])
def test_certified_notices_a_radius_too_large_or_too_small(bonus, expected):
    """Class 1 gets a bonus that the matrix does not know of."""
    shift = torch.tensor([0, bonus, 0])
    assert certified(lambda x: x @ HAND + shift, HAND, X, 0) == expected


def test_assumptions():
    turned = HAND + torch.tensor([[0, 0, 0], [1.0, 0, 2]])
    assert meets(torch.stack([HAND, turned]), X, 0)
    assert not meets(torch.stack([HAND, turned]), X, 1)  # x is of class 0
    assert not meets(torch.stack([HAND, 2 * HAND + 1]), X, 0)  # colinear for both other classes
    for i in (1, 2):  # and for one of them
        half = turned.clone()
        half[:, i] = half[:, 0] - 2 * (HAND[:, 0] - HAND[:, i])
        assert not meets(torch.stack([HAND, half]), X, 0)


def test_paths_in_plain_loops():
    """Every way through the slots, composed one layer at a time. The gate takes slot 1's own layer
    there, so that two kinds of path coincide."""
    torch.manual_seed(0)
    A, x, route, alpha = theory.randn(T, C, C), theory.randn(C), (2, 1, 0), 0.75
    expected = []
    for path in itertools.product(range(3), repeat=T):
        weight, z = 1.0, x
        for t, step in enumerate(path):
            weight *= (1, alpha, 1 - alpha)[step]
            z = (z, A[t] @ z, A[route[t]] @ z)[step]
        expected.append([weight, *z.tolist()])
    c, f = theory.unroll([partial(F.linear, weight=a) for a in A], route, alpha, x)
    found = torch.cat([c[:, None], f], -1).tolist()
    assert len(found) == 3**T and sum(c) == pytest.approx(2**T)
    torch.testing.assert_close(torch.tensor(sorted(found)), torch.tensor(sorted(expected)))


def test_what_holds_always(results):
    assert set(results) == set(STATED) | set(DROPPED)
    for row in set(STATED) - {"cor2 title"}:
        assert results[row] and all(holds(row, v) for v in results[row]), row


def test_what_does_not(results):
    fails = {row: sum(not holds(row, v) for v in v_s) / len(v_s) for row, v_s in results.items()}
    for row in ("eq5 no skips", "eq5 bias", "eq5 tanh", "thm1 colinear"):
        assert fails[row] == 1, row
    for row in ("cor2 title", "cor2 gate", "thm1 one bad", "thm1 negative"):
        assert 0 < fails[row] < 1, row
    # colinear members: the triangle inequality is an equality, and there is no gain at all
    assert max(map(abs, results["thm1 colinear"])) < 1e-12
    for title, proved in zip(results["cor2 title"], results["cor2"], strict=True):
        assert title <= proved + 1e-12  # f_[0:t] is not the weakest path, or it is


def test_table():
    lines = printed_by(theory, "--instances", 2, "--seed", 3)
    assert len(lines) == 2 + len(STATED) + len(DROPPED)
    row = next(line for line in lines if line.startswith(STATED["cor2"]))
    assert row.removeprefix(STATED["cor2"]).split()[:4] == ["all", "2", "2", "gain"]
    row = next(line for line in lines if line.startswith(DROPPED["eq5 bias"]))
    assert row.removeprefix(DROPPED["eq5 bias"]).split()[:4] == ["-", "0", "2", "error"]


def test_bad_input(tmp_path, failure):
    command = [sys.executable, SCRIPT, "--instances", "0"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "error: argument --instances: 0 is less than 1\n"
    assert "invalid integer value: 'many'" in failure(call, theory, "--instances", "many")
    assert f"{10**20} is more than" in failure(call, theory, "--seed", 10**20)
