"""The two-line swap, in a plain PyTorch script as users have it: nothing else changes."""

from __future__ import annotations

import math
import subprocess
import sys
import textwrap

SCRIPT = """
import torch
import torch.nn as nn
{imports}

torch.manual_seed(0)

class Model(nn.Module):
    def __init__(self, vocabulary=97, width=48):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.lstm = nn.LSTM(width, width, num_layers=2, batch_first=True)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens):
        hidden, _ = self.lstm(self.embedding(tokens))
        return self.head(hidden)

text = torch.tensor([(7 * i * i + 3 * i) % 97 for i in range(4000)])
model = Model()
criterion = {criterion}
optimizer = optim.Adam(model.parameters(), lr=5e-3, weight_decay=1e-5)
scheduler = optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.99)

for step in range(60):
    start = torch.randint(0, len(text) - 33, (8,))
    batch = torch.stack([text[i:i + 33] for i in start])
    optimizer.zero_grad()
    logits = model(batch[:, :-1])
    loss = criterion(logits.reshape(-1, 97), batch[:, 1:].reshape(-1))
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    scheduler.step()
    print(loss.item())
"""

STOCK = SCRIPT.format(imports="import torch.optim as optim", criterion="nn.CrossEntropyLoss()")
FUSED = SCRIPT.format(imports="import fusedopt\nfrom fusedopt import optim", criterion="fusedopt.nn.CrossEntropyLoss()")


def losses(script: str) -> list[float]:
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stderr
    return [float(line) for line in run.stdout.split()]


def test_a_plain_lstm_script_needs_two_edits():
    differing = [
        pair
        for pair in zip(STOCK.splitlines(), FUSED.replace("import fusedopt\n", "").splitlines(), strict=True)
        if pair[0] != pair[1]
    ]
    assert len(differing) == 2
    stock, fused = losses(STOCK), losses(FUSED)
    assert len(stock) == len(fused) == 60
    assert stock[-1] < 0.8 * stock[0]
    # the same run to float32's rounding, which training amplifies with every step
    for step, (a, b) in enumerate(zip(stock, fused, strict=True)):
        assert math.isclose(a, b, rel_tol=1e-5 if step < 10 else 2e-3), (step, a, b)
