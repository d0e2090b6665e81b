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
"""

import math

import torch
import torch.nn.functional as F
from torch import nn


# ------------------------------------------------------------------------------------------------------------
# The recurrence x_t = a_t x_{t-1} + b_t, twice: slowly (to read) and in parallel (to use)
# ------------------------------------------------------------------------------------------------------------

def scan_sequential(a, b):
    """What `scan` computes, step after step: x_t = a_t x_{t-1} + b_t with x_{-1} = 0. All (B,T,...)."""
    x, states = torch.zeros_like(b[:, 0]), []
    for t in range(b.shape[1]):
        x = a[:, t] * x + b[:, t]
        states.append(x)
    return torch.stack(states, 1)


def _prefix(a, b, reverse=False):
    """The same in ceil(log2(T)) rounds. Two neighbouring steps compose into one step of the same form,

        (a_2, b_2) o (a_1, b_1) = (a_2 a_1,  a_2 b_1 + b_2)        (S5, Section 2.2)

    so after the round with offset n, entry t holds the composition of the 2n steps that end at t. Any T
    works: an entry with fewer than 2n steps before it is already complete and is left alone.
    """
    a, b = a.clone(), b.clone()
    T, offset = b.shape[1], 1
    while offset < T:
        earlier, later = slice(None, -offset), slice(offset, None)
        if reverse:  # time runs backwards: what is "earlier" stands behind
            earlier, later = later, earlier
        b[:, later] += a[:, later] * b[:, earlier]  # the product is complete before anything is overwritten
        if 2 * offset < T:
            a[:, later] = a[:, later] * a[:, earlier]
        offset *= 2
    return b


class _Scan(torch.autograd.Function):
    """The parallel scan with its own backward: autograd would store the intermediates of every round.

    The adjoint of a linear recurrence is the same recurrence run backwards in time:
        dx_t = g_t + conj(a_{t+1}) dx_{t+1}        da_t = dx_t conj(x_{t-1})        db_t = dx_t
    """

    @staticmethod
    def forward(ctx, a, b):
        x = _prefix(a, b)
        ctx.save_for_backward(a, x)
        return x

    @staticmethod
    def backward(ctx, grad):
        a, x = ctx.saved_tensors
        zero = torch.zeros_like(x[:, :1])
        a_next = torch.cat([a[:, 1:].conj(), zero], 1)
        x_previous = torch.cat([zero, x[:, :-1]], 1)
        dx = _prefix(a_next, grad, reverse=True)
        return dx * x_previous.conj(), dx


def scan(a, b):
    """All states of x_t = a_t x_{t-1} + b_t with x_{-1} = 0, in parallel over time.

    a, b: (B,T,...) of one shape and dtype, real or complex, else ValueError. Returns x of that shape.
    """
    if a.shape != b.shape:
        raise ValueError(f"scan needs a and b of one shape, got {tuple(a.shape)} and {tuple(b.shape)}")
    return _Scan.apply(a, b)


# ------------------------------------------------------------------------------------------------------------
# The layer
# ------------------------------------------------------------------------------------------------------------

def hippo_n(size):
    """Eigenvalues (size/2,) and eigenvectors (size, size/2) of the normal part of HiPPO-LegS, positive half.

    HiPPO-LegS is the matrix that makes a state remember its whole input history as Legendre coefficients. Its
    normal part is -1/2 I + S with S skew-symmetric, S_nk = -1/2 sqrt((2n+1)(2k+1)) sign(n-k), so its
    eigenvalues are -1/2 + i w in conjugate pairs (S5, Appendix B). One of each pair is
    enough: the other's contribution to a real output is its complex conjugate.
    """
    n = torch.arange(size, dtype=torch.float64)
    root = torch.sqrt(2 * n + 1)
    S = -0.5 * root[:, None] * root[None, :] * torch.sign(n[:, None] - n[None, :])
    w, V = torch.linalg.eigh(-1j * S)  # -iS is Hermitian: w is real and ascending, V is unitary
    return torch.complex(torch.full_like(w, -0.5), w)[size // 2:], V[:, size // 2:]


def real_view(x):
    """(..., N) complex -> (..., 2N) real, [Re, Im] interleaved; no copy."""
    return torch.view_as_real(x).flatten(-2)


class S5Layer(nn.Module):
    """One linear state-space layer with H inputs and outputs and a diagonal state of P/2 complex numbers.

        x'(t) = Lambda x(t) + B_tilde u(t)        y(t) = 2 Re(C_tilde x(t)) + D u(t)        (S5, Section 3)

    state_size P must be a multiple of 2 * blocks; the initial Lambda is `blocks` copies of a small HiPPO-N
    matrix (J in S5, Appendix B). Step sizes start log-uniform in [dt_min, dt_max]: with decay 1/2 the state
    forgets over 2/Delta steps, here 20 to 2,000.
    """

    def __init__(self, features, state_size, blocks=4, dt_min=1e-3, dt_max=1e-1):
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
        log_min, log_max = math.log(dt_min), math.log(dt_max)
        self.log_Delta = nn.Parameter(torch.empty(state_size // 2).uniform_(log_min, log_max))
        # u is real, so B_tilde u is one real matmul to interleaved [Re, Im]; and since
        # Re(c x) = Re c Re x - Im c Im x, 2 Re(C_tilde x) is one real matmul back, its matrix interleaving
        # [2 Re c, -2 Im c]. That is half the work of complex matmuls, u is never cast, and the parameters are
        # real, as optimisers and file formats like them. V is unitary: V^-1 is its conjugate transpose.
        B_tilde, C_tilde = V.mH @ B.to(V.dtype), C.to(V.dtype) @ V
        # With B_tilde as in S5, white input drives the state to a standard deviation of sqrt(Delta), 0.03 to
        # 0.3, and whatever reads the state sees almost nothing at first. Divide that out: unit variance at
        # any step size.
        B_tilde = B_tilde * torch.exp(-0.5 * self.log_Delta.detach())[:, None]
        self.B = nn.Parameter(torch.view_as_real(B_tilde).transpose(1, 2).flatten(0, 1).float())  # (P, H)
        self.C = nn.Parameter(real_view(2 * C_tilde.conj_physical()).float())  # (H, P)
        self.D = nn.Parameter(torch.randn(features))

    def discretise(self):
        """Zero-order hold: the input is held for Delta (S5, Section 2.1).

            Lambda_bar = exp(Lambda Delta)        B_bar = scale B_tilde, scale = Lambda^-1 (Lambda_bar - 1)

        Returns (Lambda_bar, scale), both (P/2,) complex: B_bar u = scale * (B_tilde u), so the matrix itself
        is never rebuilt. A rollout calls this once and hands the result to every `step`.
        """
        Lambda = torch.complex(-torch.exp(self.log_decay), self.frequency)
        Lambda_bar = torch.exp(Lambda * torch.exp(self.log_Delta))
        return Lambda_bar, (Lambda_bar - 1) / Lambda

    def _drive(self, u, scale):
        """B_bar u, (..., H) -> (..., P/2) complex. The state stays float32 under bfloat16 autocast."""
        return scale * torch.view_as_complex(F.linear(u, self.B).float().unflatten(-1, (-1, 2)))

    def _read(self, x, u):
        """y = 2 Re(C_tilde x) + D u."""
        return F.linear(real_view(x), self.C) + self.D * u

    def forward(self, u, state, reset):
        """A whole sequence in parallel. u: (B,T,H); state before it: (B,P/2) complex; reset: (B,T) bool.

        Where reset is true the state forgets everything before that step. That needs no third element in the
        scan's operator (as in Lu et al. 2023): with a_t = 0 nothing earlier reaches x_t, in values or in
        gradients. Returns y (B,T,H) and *all* states (B,T,P/2). Raises ValueError when the shapes do not fit.
        """
        B, T, H = u.shape
        if H != len(self.D) or state.shape != (B, len(self.log_decay)) or reset.shape != (B, T):
            raise ValueError(f"S5Layer of H={len(self.D)}, P/2={len(self.log_decay)} got u {tuple(u.shape)}, "
                             f"state {tuple(state.shape)}, reset {tuple(reset.shape)}; "
                             "expected (B,T,H), (B,P/2), (B,T)")
        Lambda_bar, scale = self.discretise()
        a = Lambda_bar * (~reset)[..., None]  # (B, T, P/2)
        b = self._drive(u, scale)
        # The state before the sequence enters as part of the first input.
        b = torch.cat([b[:, :1] + a[:, :1] * state[:, None], b[:, 1:]], 1)
        x = scan(a, b)
        return self._read(x, u), x

    def step(self, u, state, discretised=None):
        """One step. u: (B,H); state: (B,P/2) complex; discretised: what `discretise` returned, if at hand.

        Returns y (B,H) and the next state (B,P/2). To forget, pass a state of zeros.
        """
        Lambda_bar, scale = discretised or self.discretise()
        x = Lambda_bar * state + self._drive(u, scale)  # x_t = Lambda_bar x_{t-1} + B_bar u_t   (S5, Eq. 2)
        return self._read(x, u), x


class S5Block(nn.Module):
    """LayerNorm -> S5Layer -> GELU -> gate, around a residual connection (S5).

    The nonlinearity stands here, between the layers, where it does not stop the scan.
    """

    def __init__(self, features, state_size):
        super().__init__()
        self.norm = nn.LayerNorm(features)
        self.s5 = S5Layer(features, state_size)
        self.gate = nn.Linear(features, features)

    def _mix(self, u, y):
        y = F.gelu(y)
        return u + y * torch.sigmoid(self.gate(y))

    def forward(self, u, state, reset):
        """As S5Layer.forward: (B,T,H), (B,P/2), (B,T) -> (B,T,H), (B,T,P/2)."""
        y, states = self.s5(self.norm(u), state, reset)
        return self._mix(u, y), states

    def step(self, u, state, discretised=None):
        """As S5Layer.step: (B,H), (B,P/2) -> (B,H), (B,P/2)."""
        y, state = self.s5.step(self.norm(u), state, discretised)
        return self._mix(u, y), state


class S5Stack(nn.Module):
    """Several S5Blocks. Its state is (B, layers, P/2) complex: every layer's, from which h is read."""

    def __init__(self, features, state_size, layers):
        super().__init__()
        self.blocks = nn.ModuleList(S5Block(features, state_size) for _ in range(layers))
        self.state_shape = (layers, state_size // 2)

    def discretise(self):
        """Every layer's discretised parameters, to be computed once a rollout and handed to each `step`."""
        return [block.s5.discretise() for block in self.blocks]

    def forward(self, u, state, reset):
        """(B,T,H), (B,layers,P/2), (B,T) -> m (B,T,H), x (B,T,layers,P/2)."""
        states = []
        for i, block in enumerate(self.blocks):
            u, x = block(u, state[:, i], reset)
            states.append(x)
        return u, torch.stack(states, 2)

    def step(self, u, state, discretised=None):
        """(B,H), (B,layers,P/2) -> m (B,H), x (B,layers,P/2)."""
        states = []
        for i, block in enumerate(self.blocks):
            u, x = block.step(u, state[:, i], discretised and discretised[i])
            states.append(x)
        return u, torch.stack(states, 1)


if __name__ == "__main__":  # a demonstration: parallel = recurrent, and what length costs
    import time

    def milliseconds(work, repeats=5):
        work()
        start = time.perf_counter()
        for _ in range(repeats):
            work()
        return 1e3 * (time.perf_counter() - start) / repeats

    torch.manual_seed(0)
    stack, u = S5Stack(128, 64, 2), torch.randn(4, 64, 128)
    state, reset = torch.zeros(4, *stack.state_shape, dtype=torch.cfloat), torch.rand(4, 64) < 0.05
    y, _ = stack(u, state, reset)
    for t in range(64):
        state = state * ~reset[:, t, None, None]
        y_t, state = stack.step(u[:, t], state)
        assert torch.allclose(y_t, y[:, t], atol=1e-4)
    print(f"parallel = recurrent over 64 steps with {int(reset.sum())} resets (last difference "
          f"{(y_t - y[:, -1]).abs().max():.1e})")
    print("\nforward + backward, one sequence, 128 features, milliseconds:")
    print(f"{'T':>6} {'S5, 2 layers':>14} {'GRU, 2 layers':>14} {'attention, 2 layers':>20}")
    gru = nn.GRU(128, 128, 2, batch_first=True)
    attention = nn.ModuleList(nn.MultiheadAttention(128, 4, batch_first=True) for _ in range(2))

    def attend(u):
        mask = nn.Transformer.generate_square_subsequent_mask(u.shape[1])
        for layer in attention:
            u = u + layer(u, u, u, attn_mask=mask, need_weights=False)[0]
        return u

    for T in (64, 256, 1024, 4096):
        u, state = torch.randn(1, T, 128), torch.zeros(1, *stack.state_shape, dtype=torch.cfloat)
        reset = torch.zeros(1, T, dtype=torch.bool)
        row = [milliseconds(lambda: model().sum().backward(), 2) for model in
               (lambda: stack(u, state, reset)[0], lambda: gru(u)[0], lambda: attend(u))]
        print(f"{T:>6} {row[0]:>14.1f} {row[1]:>14.1f} {row[2]:>20.1f}")
