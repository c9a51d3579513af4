"""A small convolutional network for 8 × 8 handwritten digits.

``dagh trace examples/cnn_digits.py --data digits --norms`` shows its Hessian at the initial parameters;
``python examples/cnn_digits.py weights.pt`` trains it for a few seconds first and saves the parameters for
``dagh trace ... --weights weights.pt``.
"""

from __future__ import annotations

import sys

import torch
from torch import nn

INPUT_SHAPE = (1, 8, 8)


def build(seed: int = 0) -> nn.Sequential:
    """The network: two 3 × 3 convolutions with six channels and a linear layer, 1360 parameters."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 6, 3),
            nn.ReLU(),
            nn.Conv2d(6, 6, 3),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(96, 10),
        )


model = build()


def main() -> None:
    from dagh.experiments import load_digits

    path = sys.argv[1] if len(sys.argv) > 1 else "weights.pt"
    images, labels = load_digits()
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for epoch in range(10):
        for batch in torch.randperm(len(labels), generator=generator).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
        with torch.no_grad():
            output = model(images)
        loss = nn.functional.cross_entropy(output, labels).item()
        accuracy = (output.argmax(1) == labels).float().mean().item()
        print(f"epoch {epoch + 1:2d}: loss {loss:.4f}, accuracy {accuracy:.1%}")
    torch.save(model.state_dict(), path)
    print(f"parameters saved to {path}")


if __name__ == "__main__":
    main()
