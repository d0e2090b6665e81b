"""The S5 layer: a linear state-space model that trains in parallel over time and steps like an RNN.

Why Hieros wants one. A recurrent network (the GRU of Dreamer) must process a sequence one step after the
other, because each step is nonlinear in the state. Drop the nonlinearity from the recurrence, and all T steps
can be computed together in log2(T) rounds; put it *between* the layers instead, and nothing is lost. While
acting and imagining, the very same weights run one step at a time.

Papers: S5 (Smith, Warrington, Linderman 2023, arXiv 2208.04933); the reset inside a scan (Lu et al. 2023,
arXiv 2303.03982). Read this file first, then world_model.py.

Symbols (the same in every file):
    B, T             batch of sequences, time steps in a sequence
    H, P             features of a layer, size of its state; P/2 complex numbers are stored, one a pair
    u, x, y          (B,T,H) input, (B,T,P/2) complex state, (B,T,H) output
    Lambda, Delta    (P/2,) complex eigenvalues of the continuous system, (P/2,) step size
    B_tilde, C_tilde (P/2,H), (H,P/2) complex input and output matrices;  D (H,) skip connection
    *_bar            the same after discretisation
    a, b             (B,T,...) of a bare recurrence x_t = a_t x_{t-1} + b_t; in the other files a is an action
    m                (B,T,H) output of a stack of layers
"""

import contextlib
import math

import torch
import torch.nn.functional as F
from torch import nn


# ------------------------------------------------------------------------------------------------------------
# The recurrence x_t = a_t x_{t-1} + b_t, twice: slowly (to read) and in parallel (to use)
# ------------------------------------------------------------------------------------------------------------

def scan_sequential(a, b):
    """What `scan` computes, step after step: x_t = a_t x_{t-1} + b_t from a state of zeros."""
    x, states = torch.zeros_like(b[:, 0]), []
    for t in range(b.shape[1]):
        x = a[:, t] * x + b[:, t]
        states.append(x)
    return torch.stack(states, 1)


def stride_products(a):
    """What carries the state over 1, 2, 4, ... < T steps, of the factors a (B,T,...): a list of (B,T-n,...),
    one for each stride n, whose entry i is a_{i+1} ... a_{i+n}, the way from i to i + n."""
    products, n = [a[:, 1:]], 1
    while 2 * n < a.shape[1]:
        products.append(products[-1][:, n:] * products[-1][:, :-n])  # two strides of n make one of 2n
        n *= 2
    return products


def _prefix(products, x, reverse=False):
    """What `scan_sequential` computes, in ceil(log2(T)) rounds and in place: x (B,T,...) holds the inputs b_t
    and becomes the states. Two neighbouring steps compose into one,

        (a_2, b_2) o (a_1, b_1) = (a_2 a_1,  a_2 b_1 + b_2)        (S5, Section 2.2)

    so after the round of stride n, entry t holds the composition of the 2n steps that end at t. Any T works:
    an entry with fewer than 2n steps before it is already complete and is left alone. products: what
    `stride_products` returned. With reverse, time runs backwards: x_t = a_{t+1} x_{t+1} + b_t.
    """
    for a in products:
        n = x.shape[1] - a.shape[1]
        earlier, later = (x[:, n:], x[:, :-n]) if reverse else (x[:, :-n], x[:, n:])
        later.add_(a * earlier)  # the product is complete before anything is overwritten
    return x


class _Scan(torch.autograd.Function):
    """The parallel scan with its own backward: autograd would store the intermediates of every round.

    The adjoint of a linear recurrence is the same recurrence run backwards in time,
        dx_t = g_t + conj(a_{t+1}) dx_{t+1}        da_t = dx_t conj(x_{t-1})        db_t = dx_t
    and its conjugate has the a_t themselves as factors, whose products are at hand.
    """

    @staticmethod
    def forward(ctx, a, b, *products):
        x = _prefix(products, b.clone())
        ctx.save_for_backward(x, *products)
        return x

    @staticmethod
    def backward(ctx, grad):
        x, *products = ctx.saved_tensors
        conj_dx = _prefix(products, torch.conj_physical(grad), reverse=True)
        previous = F.pad(x[:, :-1], (0, 0) * (x.ndim - 2) + (1, 0))  # x_{t-1}
        return torch.conj_physical(conj_dx * previous), torch.conj_physical(conj_dx), *[None] * len(products)


def scan(a, b, products=None):
    """All states of x_t = a_t x_{t-1} + b_t from a state of zeros, in parallel over time.

    a, b: (B,T,...) of one shape and dtype, real or complex, else ValueError. products: what
    `stride_products(a)` returned, if at hand. Returns x of the shape of b.
    """
    if a.shape != b.shape:
        raise ValueError(f"scan needs a and b of one shape, got {tuple(a.shape)} and {tuple(b.shape)}")
    return _Scan.apply(a, b, *(products or stride_products(a.detach())))


# ------------------------------------------------------------------------------------------------------------
# The layer
# ------------------------------------------------------------------------------------------------------------

def hippo_n(size):
    """Eigenvalues (size/2,) and eigenvectors (size, size/2) of the normal part of HiPPO-LegS, positive half.

    HiPPO-LegS is the matrix that makes a state remember its whole input history as Legendre coefficients. Its
    normal part is -1/2 I + S with S skew-symmetric, S_nk = -1/2 sqrt((2n+1)(2k+1)) sign(n-k), so its
    eigenvalues are -1/2 + i w in conjugate pairs (S5, Appendix B). One of each pair is enough: the other's
    contribution to a real output is its complex conjugate.
    """
    n = torch.arange(size, dtype=torch.float64)
    root = torch.sqrt(2 * n + 1)
    S = -0.5 * root[:, None] * root[None, :] * torch.sign(n[:, None] - n[None, :])
    w, V = torch.linalg.eigh(-1j * S)  # -iS is Hermitian: w is real and ascending, V is unitary
    return torch.complex(torch.full_like(w, -0.5), w)[size // 2:], V[:, size // 2:]


def real_view(x):
    """(..., N) complex -> (..., 2N) real, [Re, Im] interleaved; no copy."""
    return torch.view_as_real(x).flatten(-2)


def complex_view(x):
    """The inverse of real_view: (..., 2N) real -> (..., N) complex; no copy."""
    return torch.view_as_complex(x.unflatten(-1, (-1, 2)))


def full_precision(device):
    """A context without autocast: a recurrence adds up its rounding errors, so it stays in float32."""
    known = torch.amp.is_autocast_available(device)  # on the meta device there is none to switch off
    return torch.autocast(device, enabled=False) if known else contextlib.nullcontext()


def zero_order_hold(log_decay, frequency, log_Delta, B):
    """Discretise a layer: its input is held for Delta (S5, Section 2.1).

        Lambda_bar = exp(Lambda Delta)        B_bar = Lambda^-1 (Lambda_bar - 1) B_tilde

    The parameters of an S5Layer, or of several stacked in front -> Lambda_bar (...,P/2) complex and B_bar
    (...,H,P) real, laid out as S5Layer.B.
    """
    Lambda = torch.complex(-torch.exp(log_decay), frequency)
    Lambda_bar = torch.exp(Lambda * torch.exp(log_Delta))
    scale = (Lambda_bar - 1) / Lambda
    return Lambda_bar, real_view(scale[..., None, :] * complex_view(B))


class S5Layer(nn.Module):
    """One linear state-space layer with H inputs and outputs and a diagonal state of P/2 complex numbers.

        x'(t) = Lambda x(t) + B_tilde u(t)        y(t) = 2 Re(C_tilde x(t)) + D u(t)        (S5, Section 3)

    state_size P must be a multiple of 2 * blocks; the initial Lambda is `blocks` copies of a small HiPPO-N
    matrix (J in S5, Appendix B). With decay 1/2 a state forgets over 2/Delta steps; step sizes start
    log-uniform such that this is 2 to `memory` steps.

    memory should be the length of the training sequences. Each of these begins with a state of zeros, so a
    slower state, like most of those of S5's own 20 to 2,000 steps, would be small in training and grow for as
    long as an episode lasts when acting: whatever reads it would meet numbers that it was never shown.
    """

    def __init__(self, features, state_size, memory, blocks=4):
        super().__init__()
        if state_size % (2 * blocks):
            raise ValueError(f"state_size {state_size} is not a multiple of 2 * blocks = {2 * blocks}")
        Lambda, V = hippo_n(state_size // blocks)
        Lambda, V = Lambda.repeat(blocks), torch.block_diag(*[V] * blocks)  # (P/2,), (P, P/2)
        B = torch.randn(state_size, features, dtype=torch.float64) / math.sqrt(features)
        C = torch.randn(features, state_size, dtype=torch.float64) / math.sqrt(state_size)
        # Re(Lambda) = -exp(log_decay) < 0 by construction: no optimiser step can make the recurrence explode.
        self.log_decay = nn.Parameter(torch.log(-Lambda.real).float())  # (P/2,)
        self.frequency = nn.Parameter(Lambda.imag.float())  # (P/2,)
        self.log_Delta = nn.Parameter(torch.empty(state_size // 2).uniform_(math.log(2 / memory), 0))
        # u is real, so B_tilde u is one real matmul to interleaved [Re, Im]; and since
        # Re(c x) = Re c Re x - Im c Im x, 2 Re(C_tilde x) is one real matmul back, its matrix interleaving
        # [2 Re c, -2 Im c]. That is half the work of complex matmuls, u is never cast, and the parameters are
        # real, as optimisers and file formats like them. V is unitary: V^-1 is its conjugate transpose.
        B_tilde, C_tilde = V.mH @ B.to(V.dtype), C.to(V.dtype) @ V
        # With B_tilde as in S5, white input drives the state to a standard deviation of about sqrt(Delta):
        # whatever reads the state sees almost nothing at first. Divide it out: unit variance at any Delta.
        Lambda_bar = torch.exp(Lambda * torch.exp(self.log_Delta.detach()))
        variance = ((Lambda_bar - 1) / Lambda).abs().square() / (1 - Lambda_bar.abs().square())
        B_tilde = B_tilde / variance.sqrt()[:, None]
        self.B = nn.Parameter(real_view(B_tilde.T.contiguous()).float())  # (H, P): u @ B is B_tilde u
        self.C = nn.Parameter(real_view(2 * C_tilde.conj_physical()).T.contiguous().float())  # (P, H)
        self.D = nn.Parameter(torch.randn(features))

    # Both modes get what does not depend on the input from S5Stack, which computes it for all layers at once.

    def forward(self, u, a, B_bar, products):
        """A whole sequence in parallel: u (B,T,H), the factors a (B,T,P/2), B_bar (H,P), stride_products(a).
        Returns y (B,T,H) and *all* states (B,T,P/2)."""
        x = scan(a, complex_view(u @ B_bar), products)
        return real_view(x) @ self.C + self.D * u, x

    def step(self, u, kept, B_bar):
        """One step: u (B,H), kept = Lambda_bar x_{t-1} (B,P) real, B_bar (H,P) -> y (B,H), x_t (B,P) real."""
        x = torch.addmm(kept, u, B_bar)  # x_t = Lambda_bar x_{t-1} + B_bar u_t   (S5, Eq. 2)
        return torch.addcmul(x @ self.C, self.D, u), x


class S5Block(nn.Module):
    """LayerNorm -> S5Layer -> GELU -> gate, around a residual connection (S5).

    The nonlinearity stands here, between the layers, where it does not stop the scan.
    """

    def __init__(self, features, state_size, memory):
        super().__init__()
        self.norm = nn.LayerNorm(features)
        self.s5 = S5Layer(features, state_size, memory)
        self.gate = nn.Linear(features, features)

    def _mix(self, u, y):
        y = F.gelu(y)
        return torch.addcmul(u, y, torch.sigmoid(self.gate(y)))

    def forward(self, u, *others):
        """As S5Layer.forward."""
        y, x = self.s5(self.norm(u), *others)
        return self._mix(u, y), x

    def step(self, u, *others):
        """As S5Layer.step."""
        y, x = self.s5.step(self.norm(u), *others)
        return self._mix(u, y), x


class S5Stack(nn.Module):
    """Several S5Blocks. Its state is (B, layers, P/2) complex: every layer's, from which h is read."""

    def __init__(self, features, state_size, layers, memory=64):
        super().__init__()
        self.blocks = nn.ModuleList(S5Block(features, state_size, memory) for _ in range(layers))
        self.features, self.state_shape = features, (layers, state_size // 2)

    def discretise(self):
        """Lambda_bar (layers,P/2) and B_bar (layers,H,P), which a rollout computes once and hands to every
        `step`. All layers in one go: such small tensors cost what it costs to start an operation."""
        layers = [(s5.log_decay, s5.frequency, s5.log_Delta, s5.B) for s5 in (b.s5 for b in self.blocks)]
        return zero_order_hold(*map(torch.stack, zip(*layers)))

    @torch.compiler.disable  # torch.compile knows no gradients of complex numbers
    def forward(self, u, reset):
        """A whole sequence in parallel, from a state of zeros. u: (B,T,H); reset: (B,T) bool.

        Where reset is true the state forgets everything before that step. That needs no third element in the
        scan's operator (as in Lu et al. 2023): with a_t = 0 nothing earlier reaches x_t, in values or in
        gradients. Returns m (B,T,H) and all states x (B,T,layers,P/2). Raises ValueError when the shapes do
        not fit.
        """
        B, T, H = u.shape
        if H != self.features or reset.shape != (B, T):
            raise ValueError(f"S5Stack of H={self.features} got u {tuple(u.shape)}, reset"
                             f" {tuple(reset.shape)}; expected (B,T,H), (B,T)")
        with full_precision(u.device.type):
            Lambda_bar, B_bar = self.discretise()
            a = Lambda_bar * (~reset)[..., None, None]  # (B, T, layers, P/2)
            products, u, states = stride_products(a.detach()), u.float(), []
            for i, (block, *own) in enumerate(zip(self.blocks, a.unbind(2), B_bar)):
                u, x = block(u, *own, [each[:, :, i] for each in products])
                states.append(x)
            return u, torch.stack(states, 2)

    def step(self, u, state, discretised=None):
        """One step: u (B,H), state (B,layers,P/2) -> m (B,H), x (B,layers,P/2). To forget, pass a state of
        zeros. discretised: what `discretise` returned, if at hand."""
        with full_precision(u.device.type):
            Lambda_bar, B_bar = discretised or self.discretise()
            kept, u, states = real_view(Lambda_bar * state), u.float(), []  # (B, layers, P)
            for block, *own in zip(self.blocks, kept.unbind(1), B_bar):
                u, x = block.step(u, *own)
                states.append(x)
            return u, complex_view(torch.stack(states, 1))


class GRUStack(nn.Module):
    """What S5Stack replaces, with the same interface, to compare (`--sequence gru`): layers of GRU cells.

    Each step needs the last one's result, so training walks through time. The state is as large as the
    features; it is real, and kept in complex numbers only because an S5 state is.
    """

    def __init__(self, features, _, layers, memory=None):
        super().__init__()
        self.cells = nn.ModuleList(nn.GRUCell(features, features) for _ in range(layers))
        self.state_shape = layers, features // 2

    def discretise(self):
        """Nothing to prepare: a GRU is discrete."""

    def forward(self, u, reset):
        """As S5Stack.forward."""
        state = torch.zeros(len(u), *self.state_shape, dtype=torch.cfloat, device=u.device)
        steps = []
        for u_t, forget in zip(u.unbind(1), reset.unbind(1)):
            m, state = self.step(u_t, state * ~forget[:, None, None])
            steps.append((m, state))
        return tuple(torch.stack(field, 1) for field in zip(*steps))

    def step(self, u, state, _=None):
        """As S5Stack.step."""
        with full_precision(u.device.type):
            u, states = u.float(), []
            for cell, x in zip(self.cells, real_view(state).unbind(1)):
                u = cell(u, x)
                states.append(u)
            return u, complex_view(torch.stack(states, 1))


if __name__ == "__main__":  # a demonstration: parallel = recurrent, and what length costs
    import sys
    import time

    picture = sys.argv[1] if len(sys.argv) > 1 else None  # python s5.py PICTURE.png
    if picture:
        try:
            from matplotlib.figure import Figure
        except ImportError:
            sys.exit("s5.py: pictures need matplotlib: pip install matplotlib")

    def milliseconds(work, repeats=3):
        """The median time of work(), after a first call that does not count."""
        times = []
        for _ in range(1 + repeats):
            start = time.perf_counter()
            work()
            times.append(1e3 * (time.perf_counter() - start))
        return sorted(times[1:])[repeats // 2]

    torch.manual_seed(0)
    H, stack, gru = 128, S5Stack(128, 64, 2), nn.GRU(128, 128, 2, batch_first=True)
    attention = nn.ModuleList(nn.ModuleList([nn.Linear(H, 3 * H), nn.Linear(H, H)]) for _ in range(2))
    u, state = torch.randn(4, 64, H), torch.zeros(4, *stack.state_shape, dtype=torch.cfloat)
    reset = torch.rand(4, 64) < 0.05
    y, _ = stack(u, reset)
    for t in range(64):
        y_t, state = stack.step(u[:, t], state * ~reset[:, t, None, None])
        assert torch.allclose(y_t, y[:, t], atol=1e-4)
    print(f"parallel = recurrent over 64 steps with {int(reset.sum())} resets (last difference "
          f"{(y_t - y[:, -1]).abs().max():.1e})\n")

    def attend(u, cache=None):  # causal; with a cache of keys and values, u is one new step
        for project, out in attention:
            q, k, v = project(u).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)  # (B, heads, T, H/4) each
            y = F.scaled_dot_product_attention(q, *(cache or (k, v)), is_causal=cache is None)
            u = u + out(y.transpose(1, 2).flatten(2))
        return u

    names = ["S5", "GRU", "attention"]
    print("two layers of 128 features, milliseconds: train on one sequence of T steps; one step after T\n"
          f"{'T':>7}" + "".join(f"{name + ' train':>16}" for name in names)
          + "".join(f"{name + ' step':>16}" for name in names))
    rows, discretised = [], stack.discretise()
    for T in [16 * 4 ** i for i in range(6 if picture else 4)]:  # the last two take minutes
        u, one, x = torch.randn(1, T, H), torch.randn(1, 1, H), 0 * state[:1].detach()
        no_reset = torch.zeros(1, T, dtype=torch.bool)
        train = [lambda: stack(u, no_reset)[0], lambda: gru(u)[0], lambda: attend(u)]
        cache = torch.randn(2, 1, 4, T, H // 4).unbind()
        step = [lambda: stack.step(one[:, 0], x, discretised), lambda: gru(one), lambda: attend(one, cache)]
        row = [milliseconds(lambda: f().sum().backward()) for f in train]
        with torch.no_grad():
            row += [milliseconds(f, 21) for f in step]
        rows.append([T, *row])
        print(f"{T:>7}" + "".join(f"{number:>16.2f}" for number in row))
    if picture:
        figure = Figure((9, 3.5), layout="constrained")
        titles = "training on T steps", "one step after T"
        for axis, title, first in zip(figure.subplots(1, 2), titles, (1, 4)):
            for j, name in enumerate(names):
                axis.loglog([row[0] for row in rows], [row[first + j] for row in rows], "o-", label=name)
            axis.set(title=title, xlabel="T", ylabel="milliseconds")
            axis.legend()
        figure.savefig(picture, dpi=120)
