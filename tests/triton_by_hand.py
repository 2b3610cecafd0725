"""A step of the Triton backend without the engine: an optimizer's tensors, laid out by hand."""

import torch

from fusedopt.backends import triton as backend

CHUNK = 16384


def dense(grad, param):
    """The gradient in the parameter's memory order, which is the engine's work."""
    return grad if grad.stride() == param.stride() else torch.empty_like(param, dtype=grad.dtype).copy_(grad)


def chunk_map(numels):
    """(first chunk of each row, row of each chunk)"""
    counts = [-(-n // CHUNK) for n in numels]
    first = [sum(counts[:i]) for i in range(len(counts))]
    return first, torch.tensor([row for row, n in enumerate(counts) for _ in range(n)], dtype=torch.int32)


def words(*values):
    """Float64 bits."""
    return torch.tensor(values, dtype=torch.float64).view(torch.int64).tolist()


class ByHand:
    """What the engine does of a step, for tensors that fuse: optimizers of one rule become the groups of one launch."""

    def __init__(self, *optimizers):
        self.optimizers = optimizers
        self.param_groups = [group for o in optimizers for group in o.param_groups]
        self.state = {}
        self.counters = {}
        (self.rule,) = {o._rule(group) for o in optimizers for group in o.param_groups}
        for o in optimizers:
            for group in o.param_groups:
                for p in group["params"]:
                    stock_state = o.state.get(p, {})
                    state = self.state[p] = {}
                    counter = torch.zeros(())
                    if group.keys() & {"alpha", "betas", "lr_decay"} and "Lion" not in type(o).__name__:
                        state["step"] = counter
                    self.counters[p] = counter
                    for key in o._states(group):
                        state[key] = stock_state.get(key, torch.zeros_like(p, memory_format=torch.preserve_format))
        self.table = backend.new_table(torch.device("cpu"))
        self.found_inf = self.grad_scale = None
        self.changed = True
        self.launched = 0

    def group_words(self):
        out = []
        for o in self.optimizers:
            for group in o.param_groups:
                hyper = o._hyper(group)
                lr = group["lr"]
                pointer = [lr.data_ptr(), int(lr.dtype == torch.float64)] if isinstance(lr, torch.Tensor) else [0, 0]
                factor = -1.0 if group["maximize"] else 1.0
                if pointer[0]:
                    hyper[0] = torch.nan  # must not be read
                out.append(words(*hyper, *[0.0] * (8 - len(hyper)), factor) + pointer)
        return torch.tensor(out)

    def step(self):
        rows, grads, held, numels = [], [], [], []
        first, chunks = chunk_map([p.numel() for group in self.param_groups for p in group["params"]])
        for g, group in enumerate(self.param_groups):
            for p in group["params"]:
                grad = dense(p.grad, p)
                held.append(grad)
                states = [t.data_ptr() for key, t in self.state[p].items() if key != "step"]
                pointers = [p.data_ptr(), *states, *[0] * (3 - len(states)), self.counters[p].data_ptr()]
                rows.append([*pointers, p.numel(), first[len(rows)], g, *[0] * 6])
                grads.append(grad.data_ptr() or 1)  # null would be: has no gradient
                numels.append(p.numel())
        some = self.param_groups[0]["params"][0]
        launch = backend.Launch(
            self.rule,
            some.dtype,
            held[0].dtype,
            some.dtype,
            torch.tensor(rows).view(-1, 14),
            torch.tensor(grads),
            chunks,
            self.changed,
        )
        self.launched = self.table.step([launch], self.group_words(), self.found_inf, self.grad_scale)


def filled(numel, seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(numel, generator=generator) + 0.25).to(dtype)


def all_tensors(by_hand):
    params = [p.detach() for group in by_hand.param_groups for p in group["params"]]
    return params + [t for state in by_hand.state.values() for t in state.values()]
