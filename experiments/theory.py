"""The theory of MoLEx, section 2.3 and appendix A, checked on random linear models.

The paper proves and gives no numbers: its column says "all". Here random instances meet each
statement, as it stands and with an assumption dropped. What follows is what came out.

    python experiments/theory.py                      # 200 instances, about ten seconds
    python experiments/theory.py --instances 5000     # in full, some minutes

Certified radius. f(x) = W^T x + b, W (d, C), puts x in class y. For another class i let
m_i = (e_y - e_i)^T f(x), the margin, and w_i = W (e_y - e_i). At x + delta the margin is
m_i + w_i^T delta. In a ball of radius r that is at least m_i - r |w_i| (Cauchy-Schwarz), and it is
just that at delta = -r w_i / |w_i|. So y is ahead in the whole ball if and only if r is below

    R = min_i m_i / |w_i|,   and at x - R w_i / |w_i| the nearest class i has drawn level.

Eq. 5 holds. With u_j(z) = A_j z and the choices i_t of the gate held fixed, slot t multiplies z by
I + alpha A_t + (1 - alpha) A_{i_t}. Multiplied out, that is 3^(t+1) paths f_j: each slot is skipped
(weight 1), or takes its own layer (alpha) or the chosen one (1 - alpha), and c_j is the product.
The index set as printed has no skips, and then it is false; so it is for a u with a bias. The c_j
sum to 2^(t+1), so z is not in the simplex if its members are; no proof needs that.

Theorem 1 holds, with c_j >= 0 (true in Eq. 5) and "not colinear" read as: for every i, the w_ji of
the members j with c_j > 0 do not all point the same way. By the triangle inequality, for every i,

    R_i = sum_j c_j m_ji / |sum_j c_j w_ji| > sum_j c_j m_ji / sum_j c_j |w_ji| >= eps,

for the middle is a mean of the r_ji = m_ji / |w_ji| >= eps, with weights c_j |w_ji|. The largest
such eps is the radius of the weakest member. That one is beaten, and all if they share one radius;
a stronger one need not be.

Corollary 1 holds in the open ball. In the closed one of Definition 1 it needs ties to go to y.

Corollary 2 holds as proved, R(z) > eps. As titled, R(z) > R(f_[0:t]), it is only sure where
f_[0:t] is the weakest path. (Definition 1 hides this: "f is eps'-robust, g eps-robust, eps' > eps"
is true of any robust f and g = f.) Three more things. Every path, the identity and each layer alone
among them, must by itself get x right. f_[0:t] = u_t o ... o u_0 is not the sequential model of
Eq. 3, (I + A_t) ... (I + A_0). And a gate that reads z may choose otherwise within the ball.
Of 5,000 instances R(z) > R(f_[0:t]) in 66%, and in 7% a search finds a flip within eps once the
gate reads z.
"""

import sys
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from model import Context
from molex import MoLEx, MoLExConfig
from support.cli import Parser, at_least, command_line, progress_bar

T, C, D, M = 3, 4, 8, 5  # slots; classes, which is MoLEx's width; Theorem 1's width and members
TOL = 1e-9  # in float64 a gain below it is none, and an error above it is one
STATED = {
    "eq5": "Eq. 5: the 3^T paths add up to what molex.py computes",
    "cor1": "Corollary 1: no flip found at 0.999 R, and one at 1.001 R",
    "cor1 molex": "  the same of MoLEx, run by molex.py",
    "thm1": "Theorem 1: R > eps",
    "thm1 equal": "  members of equal radius: R > each of them",
    "cor2": "Corollary 2 as proved: R(z) > eps",
    "cor2 title": "Corollary 2 as titled: R(z) > R(f_[0:t])",
}
DROPPED = {
    "eq5 no skips": "Eq. 5 without the paths that skip a slot",
    "eq5 bias": "Eq. 5, layers with a bias",
    "eq5 tanh": "Eq. 5, layers with a tanh",
    "thm1 one bad": "Theorem 1, a member gets x wrong: R > eps of the rest",
    "thm1 colinear": "Theorem 1, all w_ji colinear: R > eps",
    "thm1 negative": "Theorem 1, one c_j < 0: R > eps",
    "cor2 gate": "Corollary 2, the gate reads z: no flip found at 0.999 eps",
}
Layer = Callable[[Tensor], Tensor]
randn = partial(torch.randn, dtype=torch.float64)
combine = partial(torch.tensordot, dims=1)  # c (n,), f (n, ...) -> sum_j c_j f_j (...)


def boundaries(W: Tensor, x: Tensor, y: int) -> tuple[Tensor, Tensor]:
    """For f(x) = W^T x, W (..., d, C), x (d,): how far it is to where each other class draws level
    with y, (..., C - 1), negative if it is ahead; and which way, unit vectors (..., C - 1, d)."""
    e = torch.eye(W.shape[-1], dtype=W.dtype)
    e = e[:, [y]] - e[:, torch.arange(len(e)) != y]  # columns e_y - e_i
    w, m = (W @ e).mT, x @ W @ e
    return m / w.norm(dim=-1), -F.normalize(w, dim=-1)


def radius(W: Tensor, x: Tensor, y: int) -> Tensor:
    """R, (...), see above; negative if x is not in class y."""
    return boundaries(W, x, y)[0].amin(-1)


def meets(W: Tensor, x: Tensor, y: int) -> bool:
    """Whether members W (n, d, C) meet Theorem 1's assumptions 1, for some eps > 0, and 2."""
    r, v = boundaries(W, x, y)
    return bool(r.min() > 0 and ((v * v[0]).sum(-1).amin(0) < 1 - TOL).all())


def unroll(u: list[Layer], route: tuple[int, ...], alpha: float, x: Tensor) -> tuple[Tensor, ...]:
    """Eq. 5: c_j (3^T,) and f_j(x) (3^T, ...). With the unit vectors for x, the W_j of the paths:
    row k of W_j is f_j(e_k), and f_j(x) = W_j^T x."""
    c, f = torch.ones(1, dtype=x.dtype), x[None]
    for t, i in enumerate(route):
        c, f = torch.cat([c, alpha * c, (1 - alpha) * c]), torch.cat([f, u[t](f), u[i](f)])
    return c, f


class Block(nn.Module):
    """A layer as molex.py expects it, residual included."""

    def __init__(self, u: Layer) -> None:
        super().__init__()
        self.u = u

    def forward(self, z: Tensor, ctx: Context, key: tuple) -> Tensor:
        return z + self.u(z)


def make_molex(u: list[Layer], route: tuple[int, ...], alpha: float) -> MoLEx:
    """molex.py's MoLEx with gates that choose layer route[t] in slot t, whatever z is."""
    config = MoLExConfig(individual_gates=True, alpha=alpha)
    stack = MoLEx(nn.ModuleList(Block(f) for f in u), C, config).double().requires_grad_(False)
    for gate, j in zip(stack.gates, route, strict=True):
        gate.weight.zero_()
        gate.bias.copy_(F.one_hot(torch.tensor(j), T))
    return stack.eval()


def run(stack: MoLEx, x: Tensor) -> Tensor:
    """(B, C) -> (B, C): every input a sequence of one token."""
    real = torch.ones(len(x), 1, dtype=torch.bool)
    return stack(x[:, None], Context(real, real, None, False, None))[:, 0]


def certified(f: Layer, W: Tensor, x: Tensor, y: int) -> bool:
    """Whether f, supposedly W^T x, stays in class y at 0.999 R (500 random directions, and those of
    the boundaries) and leaves it at 1.001 R, towards the closest point of the boundary."""
    r, v = boundaries(W, x, y)
    inside = x + 0.999 * r.min() * torch.cat([v, F.normalize(randn(500, len(x)), dim=-1)])
    outside = x + 1.001 * r.min() * v[r.argmin(), None]
    return bool((f(inside).argmax(-1) == y).all() and (f(outside).argmax(-1) != y).all())


def check_ensemble() -> dict[str, float]:
    """A random instance of Theorem 1 and Corollary 1. Returns gains R / eps - 1, and booleans."""
    out, y = {}, int(torch.randint(C, ()))
    while True:  # draw members that lean towards y until they meet the assumptions
        x, W, c = randn(D), randn(M, D, C), torch.rand(M, dtype=torch.float64)
        lean = 2 * torch.rand(M, 1, 1) * x[:, None] * F.one_hot(torch.tensor(y), C)
        W, away = W + lean, W[:1] - lean[:1]
        if meets(W, x, y) and radius(away, x, y) < 0:
            break
    gain = lambda c, W, eps: float(radius(combine(c, W), x, y) / eps - 1)  # noqa: E731
    r = radius(W, x, y)
    out["cor1"] = certified(lambda x: x @ W[0], W[0], x, y)
    out["thm1"] = gain(c, W, r.min())
    v = randn(M, D)  # mirrors that leave x where it is, so that W[0] keeps its margins and norms
    v = F.normalize(v - (v @ x / (x @ x))[:, None] * x, dim=-1)[..., None]
    mirrored = W[0] - 2 * v @ (v.mT @ W[0])
    out["thm1 equal"] = gain(c, mirrored, radius(mirrored, x, y).max())
    out["thm1 one bad"] = gain(c, torch.cat([away, W[1:]]), r[1:].min())
    scale = torch.rand(M, 1, 1) + 0.1
    out["thm1 colinear"] = gain(c, scale * W[0] + randn(M, D, 1), r[0])
    out["thm1 negative"] = gain(torch.cat([-c[:1], c[1:]]), W, r.min())
    return out


def check_molex() -> dict[str, float]:
    """A random MoLEx of T linear layers. Returns relative errors (Eq. 5), gains and booleans."""
    out, one = {}, torch.eye(C, dtype=torch.float64)
    while True:  # draw layers around multiples of the identity until all paths meet the assumptions
        A = (0.3 + 4 * torch.rand(T, 1, 1)) * (one + 0.5 * randn(T, C, C))
        u, x, alpha = [partial(F.linear, weight=a) for a in A], randn(C), float(torch.rand(()))
        route, y = tuple(torch.randint(T, (T,)).tolist()), int(x.argmax())
        c, W = unroll(u, route, alpha, one)
        if meets(W, x, y):
            break

    def error(u: list[Layer], z: Tensor) -> float:
        real = run(make_molex(u, route, alpha), x[None])[0]
        return float((z - real).norm() / real.norm())

    out["eq5"] = error(u, combine(*unroll(u, route, alpha, x)))
    biased = [partial(F.linear, weight=a, bias=randn(C)) for a in A]
    out["eq5 bias"] = error(biased, combine(*unroll(biased, route, alpha, x)))
    curved = [lambda z, a=a: torch.tanh(z @ a.T) for a in A]
    out["eq5 tanh"] = error(curved, combine(*unroll(curved, route, alpha, x)))

    stack = make_molex(u, route, alpha)
    out["cor1 molex"] = certified(partial(run, stack), combine(c, W), x, y)
    stack.config = replace(stack.config, route="sequence")  # each perturbed x has its own
    z, no_skips, own = x, x, one
    for t, (gate, j) in enumerate(zip(stack.gates, route, strict=True)):
        # from here on the gate reads z; at x it chooses as before, by a hair
        gate.weight.normal_()
        gate.bias.copy_(1e-3 * F.one_hot(torch.tensor(j), T) - gate.weight @ z)
        z = z + alpha * u[t](z) + (1 - alpha) * u[j](z)
        no_skips = alpha * u[t](no_skips) + (1 - alpha) * u[j](no_skips)
        own = u[t](own)
    out["eq5 no skips"] = error(u, x + no_skips)

    R, eps = radius(combine(c, W), x, y), radius(W, x, y).min()
    out["cor2"], out["cor2 title"] = float(R / eps - 1), float(R / radius(own, x, y) - 1)
    around = x + 0.999 * eps * F.normalize(randn(500, C), dim=-1)
    out["cor2 gate"] = bool((run(stack, around).argmax(-1) == y).all())
    return out


def check(instances: int) -> dict[str, list[float]]:
    """What the instances gave for each row."""
    results = defaultdict(list)
    for _ in progress_bar(range(instances), "instances", leave=False):
        for row, value in (check_ensemble() | check_molex()).items():
            results[row].append(value)
    return results


def holds(row: str, value: float) -> bool:
    """Whether an instance agrees with the row's statement."""
    return value < TOL if row.startswith("eq5") else value > TOL


def main() -> None:
    parser = Parser(description="Check section 2.3 and appendix A on random linear models")
    parser.add_argument("--instances", type=at_least(1), default=200, help="how many (default 200)")
    parser.add_argument("--seed", type=at_least(0), default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    results = check(args.instances)
    for title, paper, rows in (("As stated", "all", STATED), ("Assumption dropped", "-", DROPPED)):
        print(f"{title:60}{'paper':>6}{'holds':>7}{'of':>7}   worst case")
        for row, statement in rows.items():
            values = results[row]
            line = f"{statement:60}{paper:>6}{sum(holds(row, v) for v in values):7}{len(values):7}"
            if row.startswith("eq5"):
                line += f"   error {max(values):.1e}"
            elif not isinstance(values[0], bool):
                worst = min(values)
                line += f"   gain {worst:+.1%}" if worst > -1 else "   x itself is wrong"
            print(line)


if __name__ == "__main__":
    command_line(main)
