"""Functions whose backward is exact once, and is not itself differentiable."""

import torch


def refuse_graph(of: str) -> None:
    """Called in such a backward: raises RuntimeError where its result is to be differentiated again.

    Without it the second derivative would lack what went through this function, and nobody would be told. Local.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"{of} has no second derivative here (backward was asked for a graph, create_graph=True): write that part "
            "of the loss with torch's own operations"
        )
