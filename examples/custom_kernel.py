"""A kernel of your own: a gated activation in C++, with its backward, checked against its reference and then used."""

import torch
from torch import Tensor

from twofold.kernels import op
from twofold.kernels.custom import Entry, Float, In, Int, Out, check, cpp


@op
def swish_gate(gate_TF: Tensor, up_TF: Tensor, beta: float) -> Tensor:
    """gate · sigmoid(beta · gate) · up: the definition, the oracle, and what serves where nothing can be compiled."""
    return gate_TF * torch.sigmoid(beta * gate_TF) * up_TF


SOURCE = """
#include <cmath>
static float sigmoid(float x) { return 1.0f / (1.0f + std::exp(-x)); }

void swish_gate(const float* gate, const float* up, double beta, float* y, int64_t T, int64_t F) {
    for (int64_t i = 0; i < T * F; ++i) y[i] = gate[i] * sigmoid(float(beta) * gate[i]) * up[i];
}

void swish_gate_back(const float* gate, const float* up, const float* grad, double beta,
                     float* grad_gate, float* grad_up, int64_t T, int64_t F) {
    for (int64_t i = 0; i < T * F; ++i) {
        const float b = float(beta), s = sigmoid(b * gate[i]);
        grad_up[i] = grad[i] * gate[i] * s;
        grad_gate[i] = grad[i] * up[i] * s * (1.0f + b * gate[i] * (1.0f - s));
    }
}
"""

GATE, UP, SIZE = In("gate_TF"), In("up_TF"), (Int("T"), Int("F"))
GRADS = Out("grad_gate_TF"), Out("grad_up_TF")
cpp(
    swish_gate,
    source=SOURCE,
    forward=Entry("swish_gate", GATE, UP, Float("beta"), Out("y_TF"), *SIZE),
    backward=Entry("swish_gate_back", GATE, UP, In("grad_y_TF"), Float("beta"), *GRADS, *SIZE),
    why="one pass over memory instead of four",
)


def main() -> None:
    print(check(swish_gate, values={"beta": 1.5}, rows="T"))
    layer = torch.nn.Linear(64, 2 * 64)
    x_TD, goal_TF = torch.randn(256, 64), torch.randn(256, 64)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=3e-2)
    for step in range(30):
        loss = (swish_gate(*layer(x_TD).chunk(2, -1), 1.5) - goal_TF).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 29 == 0:
            print(f"step {step}: loss {loss.item():.3f}, served by '{swish_gate.serving()[0]}'")


if __name__ == "__main__":
    main()
