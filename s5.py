"""The S5 layer: a linear state-space model that trains in parallel over time and steps like an RNN.

Why Hieros uses it. Dreamer's GRU must process a sequence one step after the other, because each step is
nonlinear in the state. S5's recurrence is linear, so all T steps are computed together, in log2(T) rounds.
The nonlinearity stands between the layers instead. Acting and imagining run the same weights step by step.

Papers: S5 (Smith, Warrington, Linderman 2023, arXiv 2208.04933); the reset inside a scan (Lu et al. 2023,
arXiv 2303.03982). Hieros (arXiv 2310.05167, Section 3.2) builds its world model from both. Read this file
first, then world_model.py.

Symbols (the same in every file):
    B, T             batch of sequences, time steps in a sequence
    H, P             features of a layer, size of its state; P/2 complex numbers are stored, one a pair
    u, x, y          (B,T,H) input, (B,T,P/2) complex state, (B,T,H) output of a layer
    Lambda, Delta    (P/2,) complex eigenvalues of the continuous system, (P/2,) step sizes
    B_tilde, C_tilde (P/2,H), (H,P/2) complex input and output matrices;  D (H,) skip connection
    *_bar            the same after discretisation
    m                (B,T,H) output of a stack of layers
"""

import math

import torch
import torch.nn.functional as F
from torch import nn


# ------------------------------------------------------------------------------------------------------------
# The recurrence x_t = factor_t x_{t-1} + input_t, twice: slowly (to read) and in parallel (to use)
# ------------------------------------------------------------------------------------------------------------

def scan_sequential(factor, inputs):
    """The plain form of `scan`: x_t = factor_t x_{t-1} + input_t, step after step from a state of zeros."""
    x, states = torch.zeros_like(inputs[:, 0]), []
    for t in range(inputs.shape[1]):
        x = factor[:, t] * x + inputs[:, t]
        states.append(x)
    return torch.stack(states, 1)


def _prefix(factor, inputs):
    """The result of `scan_sequential` in ceil(log2(T)) rounds. Two neighbouring steps compose into one,

        (a_2, b_2) o (a_1, b_1) = (a_2 a_1,  a_2 b_1 + b_2)        (S5, Section 2.2; a: factor, b: input)

    This is the scan of Hillis and Steele (1986). The round of stride n composes entry t with entry t - n.
    Then entry t stands for the 2n steps that end at t, or for all steps up to t where there are fewer, so T
    may be any number. The work is O(T log T); a tree needs O(T), but twice as many rounds.
    """
    x, stride = inputs.clone(), 1
    factor = factor[:, 1:]  # entry t: the product that carries the state from step t to step t + stride
    while stride < x.shape[1]:
        x[:, stride:].add_(factor * x[:, :-stride])  # the product is complete before x is overwritten
        factor = factor[:, stride:] * factor[:, :-stride]
        stride *= 2
    return x


class _Scan(torch.autograd.Function):
    """The parallel scan with its own backward pass: autograd would store the results of every round."""

    @staticmethod
    def forward(ctx, factor, inputs):
        x = _prefix(factor, inputs)
        ctx.save_for_backward(factor, x)
        return x

    @staticmethod
    def backward(ctx, grad):
        # The adjoint of a linear recurrence is the same recurrence, run backwards in time:
        #     dx_t = grad_t + conj(factor_{t+1}) dx_{t+1}    dfactor_t = dx_t conj(x_{t-1})    dinput_t = dx_t
        factor, x = ctx.saved_tensors
        factor_next = factor.roll(-1, 1)  # its last entry is never read: nothing comes after step T
        x_previous = F.pad(x[:, :-1], (0, 0, 1, 0))  # zeros come before the first step
        dx = _prefix(factor_next.conj().flip(1), grad.flip(1)).flip(1)
        return dx * x_previous.conj(), dx


def scan(factor, inputs):
    """All states of x_t = factor_t x_{t-1} + input_t from a state of zeros, in parallel over time.

    factor, inputs: (B,T,n) of one shape and dtype, real or complex, else ValueError. Returns x (B,T,n). Where
    factor_t is zero the state forgets: nothing from before t reaches t, in values or in gradients.
    """
    if factor.shape != inputs.shape:
        raise ValueError("scan needs factor and inputs of one shape,"
                         f" got {tuple(factor.shape)} and {tuple(inputs.shape)}")
    return _Scan.apply(factor, inputs)


# ------------------------------------------------------------------------------------------------------------
# The layer
# ------------------------------------------------------------------------------------------------------------

def hippo_n(size):
    """Eigenvalues (size/2,) and eigenvectors (size, size/2) of the normal part of HiPPO-LegS, positive half.

    HiPPO-LegS is the matrix that makes a state remember its whole input history as Legendre coefficients. Its
    normal part is -1/2 I + S with S_nk = -1/2 sqrt((2n+1)(2k+1)) sign(n-k). S is skew-symmetric, so the
    eigenvalues are -1/2 + i w in conjugate pairs (S5, Appendix B). One of each pair is enough: the other adds
    the complex conjugate to the output, which is real.
    """
    n = torch.arange(size, dtype=torch.float64)
    root = torch.sqrt(2 * n + 1)
    S = -0.5 * root[:, None] * root[None, :] * torch.sign(n[:, None] - n[None, :])
    w, V = torch.linalg.eigh(-1j * S)  # -iS is Hermitian: w is real and ascending, V is unitary
    return torch.complex(torch.full_like(w, -0.5), w)[size // 2:], V[:, size // 2:]


def real_view(x):
    """(..., n) complex -> (..., 2n) real, [Re, Im] interleaved; no copy."""
    return torch.view_as_real(x).flatten(-2)


def complex_view(x):
    """The inverse of real_view: (..., 2n) real -> (..., n) complex; no copy."""
    return torch.view_as_complex(x.unflatten(-1, (-1, 2)))


class S5Layer(nn.Module):
    """One linear state-space layer with H inputs and outputs and a diagonal state of P/2 complex numbers.

        x'(t) = Lambda x(t) + B_tilde u(t)        y(t) = 2 Re(C_tilde x(t)) + D u(t)        (S5, Section 3)

    state_size P must be a multiple of 2 * blocks, else ValueError. The initial Lambda is `blocks` copies of
    the eigenvalues of a small HiPPO-N matrix (J in S5, Appendix B), all with decay 1/2.

    T: steps in a training sequence. A state with decay 1/2 forgets over 2/Delta steps. Delta starts
    log-uniform in [2/T, 1], which makes them 2 to T steps; S5's own Delta makes them 20 to 2,000.
    A training sequence begins with a state of zeros, and states slower than the sequence remain small in it.
    While acting they would go on growing with the episode, to numbers that the next layer never saw.

    The price is aliasing: at preset `paper` 43% of the states turn by more than half a circle a step, which
    looks like a slower turn. A start without such states imagines no better (results/README.md).
    """

    def __init__(self, features, state_size, T, blocks=4):
        super().__init__()
        if state_size % (2 * blocks):
            raise ValueError(f"state_size {state_size} is not a multiple of 2 * blocks = {2 * blocks}")
        Lambda, V = hippo_n(state_size // blocks)
        Lambda, V = Lambda.repeat(blocks), torch.block_diag(*[V] * blocks)  # (P/2,), (P,P/2)
        B = torch.randn(state_size, features, dtype=torch.float64) / math.sqrt(features)  # (P,H)
        C = torch.randn(features, state_size, dtype=torch.float64) / math.sqrt(state_size)  # (H,P)
        # Re(Lambda) = -exp(log_decay) < 0 by construction: no optimiser step can make the recurrence explode.
        self.log_decay = nn.Parameter(torch.log(-Lambda.real).float())  # (P/2,)
        self.frequency = nn.Parameter(Lambda.imag.float())  # (P/2,)
        self.log_Delta = nn.Parameter(torch.empty(state_size // 2).uniform_(math.log(2 / T), 0))
        B_tilde, C_tilde = V.mH @ B.to(V.dtype), C.to(V.dtype) @ V  # V.mH: these rows of V^-1
        # White input drives a state of S5 to a deviation of about sqrt(Delta), so slow states would hardly be
        # noticed at first. Divided by the exact deviation, every state has unit variance at any Delta.
        Lambda_bar = torch.exp(Lambda * torch.exp(self.log_Delta.detach()))
        variance = ((Lambda_bar - 1) / Lambda).abs().square() / (1 - Lambda_bar.abs().square())
        B_tilde = B_tilde / variance.sqrt()[:, None]  # (P/2,H)
        # u is real, so B_tilde u is one real matmul to interleaved [Re, Im]. And 2 Re(c x) = 2 Re c Re x -
        # 2 Im c Im x, so 2 Re(C_tilde x) is one real matmul back, by a matrix whose rows alternate 2 Re c and
        # -2 Im c. That is half the work of complex matmuls, and the parameters are real.
        self.B_tilde = nn.Parameter(real_view(B_tilde.T.contiguous()).float())  # (H, P)
        self.C_tilde = nn.Parameter(real_view(2 * C_tilde.conj_physical()).T.contiguous().float())  # (P, H)
        self.D = nn.Parameter(torch.randn(features))

    def discretise(self):
        """Zero-order hold: the input is held for Delta (S5, Section 2.1).

            Lambda_bar = exp(Lambda Delta)        B_bar = Lambda^-1 (Lambda_bar - 1) B_tilde

        Returns Lambda_bar (P/2,) complex and B_bar (H,P) real, laid out as B_tilde. Both depend only on the
        weights, so a rollout computes them once and hands them to every `step`.
        """
        Lambda = torch.complex(-torch.exp(self.log_decay), self.frequency)
        Lambda_bar = torch.exp(Lambda * torch.exp(self.log_Delta))
        return Lambda_bar, real_view((Lambda_bar - 1) / Lambda * complex_view(self.B_tilde))

    def output(self, x, u):
        """y_t = 2 Re(C_tilde x_t) + D u_t, for states (...,P/2) and inputs (...,H)."""
        return real_view(x) @ self.C_tilde + self.D * u

    def forward(self, u, reset):
        """A whole sequence in parallel: u (B,T,H), reset (B,T) -> y (B,T,H) and all states x (B,T,P/2)."""
        Lambda_bar, B_bar = self.discretise()
        x = scan(Lambda_bar * ~reset[..., None], complex_view(u @ B_bar))  # (B,T,P/2)
        return self.output(x, u), x

    def step(self, u, x, discretised):
        """One step: u_t (B,H), x_{t-1} (B,P/2), what `discretise` returned -> y_t (B,H), x_t (B,P/2)."""
        Lambda_bar, B_bar = discretised
        x = Lambda_bar * x + complex_view(u @ B_bar)  # x_t = Lambda_bar x_{t-1} + B_bar u_t   (S5, Eq. 2)
        return self.output(x, u), x


class S5Block(nn.Module):
    """u + y sigmoid(W y), y = GELU(S5Layer(LayerNorm(u))) (S5). The nonlinearity stands outside the scan."""

    def __init__(self, features, state_size, T):
        super().__init__()
        self.norm = nn.LayerNorm(features)
        self.s5 = S5Layer(features, state_size, T)
        self.gate = nn.Linear(features, features)

    def _gated(self, u, y):
        y = F.gelu(y)
        return u + y * torch.sigmoid(self.gate(y))

    def forward(self, u, reset):
        """As S5Layer.forward."""
        y, x = self.s5(self.norm(u), reset)
        return self._gated(u, y), x

    def step(self, u, x, discretised):
        """As S5Layer.step."""
        y, x = self.s5.step(self.norm(u), x, discretised)
        return self._gated(u, y), x


class S5Stack(nn.Module):
    """Several S5Blocks. Its state (B,layers,P/2) holds every layer's; the world model reads h from it."""

    def __init__(self, features, state_size, layers, T):
        super().__init__()
        self.blocks = nn.ModuleList(S5Block(features, state_size, T) for _ in range(layers))
        self.features, self.state_shape = features, (layers, state_size // 2)

    def discretise(self):
        """[(Lambda_bar, B_bar) of each layer] for `step`, valid until the weights change."""
        return [block.s5.discretise() for block in self.blocks]

    def forward(self, u, reset):
        """A whole sequence in parallel, from a state of zeros. u: (B,T,H); reset: (B,T) bool.

        Where reset is true, the state forgets everything before that step: the step's factor is zero. (Lu et
        al. 2023 carry a third element through the scan for it.) Returns m (B,T,H) and all states x
        (B,T,layers,P/2). Raises ValueError when the shapes do not fit.
        """
        if u.shape[2:] != (self.features,) or reset.shape != u.shape[:2]:
            raise ValueError(f"S5Stack of H={self.features} got u {tuple(u.shape)}, reset"
                             f" {tuple(reset.shape)}; expected (B,T,H), (B,T)")
        states = []
        for block in self.blocks:
            u, x = block(u, reset)
            states.append(x)
        return u, torch.stack(states, 2)

    def step(self, u, state, discretised):
        """One step: u (B,H), state (B,layers,P/2), what `discretise` returned -> m (B,H) and the next state.
        To forget, pass a state of zeros."""
        states = []
        for block, x, each in zip(self.blocks, state.unbind(1), discretised):
            u, x = block.step(u, x, each)
            states.append(x)
        return u, torch.stack(states, 1)


if __name__ == "__main__":  # a demonstration: parallel = recurrent, and what length costs
    from time import perf_counter

    torch.manual_seed(0)
    H, stack, gru = 128, S5Stack(128, 64, 2, T=64), nn.GRU(128, 128, 2, batch_first=True)
    attention = nn.TransformerEncoder(nn.TransformerEncoderLayer(H, 4, H, dropout=0, batch_first=True), 2)
    u, reset = torch.randn(4, 64, H), torch.rand(4, 64) < 0.05
    m, x = stack(u, reset)[0], torch.zeros(4, *stack.state_shape, dtype=torch.cfloat)
    for t in range(64):
        m_t, x = stack.step(u[:, t], x * ~reset[:, t, None, None], stack.discretise())
        assert torch.allclose(m_t, m[:, t], atol=1e-4)
    print(f"parallel = recurrent over 64 steps with {int(reset.sum())} resets\n\n"
          "milliseconds to train on one sequence of T steps: two layers each of S5, GRU and attention")
    for T in (16, 64, 256, 1024):
        u, no_reset = torch.randn(1, T, H), torch.zeros(1, T, dtype=torch.bool)
        for name, model in (("S5", lambda: stack(u, no_reset)[0]), ("GRU", lambda: gru(u)[0]),
                            ("attention", lambda: attention(u))):
            model().sum().backward()  # the first call warms up
            start = perf_counter()
            model().sum().backward()
            print(f"T {T:5d}  {name:9}  {1e3 * (perf_counter() - start):8.1f}")
