"""Attention over sequences whose lengths change from call to call, as in decoding and sampling."""

from contextlib import AbstractContextManager

from torch.nn.attention import SDPBackend, sdpa_kernel

# All but cuDNN's. torch prefers that one on sm_90, and it builds a plan for each new shape (0.4 s): worth it
# for the one shape of training, not for a context that grows with every token.
WITHOUT_PLANS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def for_changing_lengths() -> AbstractContextManager[None]:
    """A block in which torch chooses among the attention kernels that need no plan for each shape.

    The choice is the process's, not the thread's. It takes 10 us: once around a step, not in each layer.
    """
    return sdpa_kernel(WITHOUT_PLANS)
