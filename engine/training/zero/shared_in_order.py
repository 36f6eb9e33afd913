"""DeepSpeed's ZeRO-2 for rows that differ in what they run: gradients are shared in the parameters' order.

DeepSpeed packs gradients into one buffer as the backward pass comes to them, and adds the buffers of all processes. Where a process
has a mask, a region or an image and another has none, they come in another order, and gradients of different weights are added.
Here the pass ends first. That costs the overlap of sharing with computing, and the gradients of one micro-batch whole.
"""

from typing import Any


def share_in_order(optimizer: Any) -> None:
    """`optimizer`: DeepSpeed's of stage 2."""
    for hook in optimizer._grad_acc_hooks:
        hook.remove()
    optimizer._grad_acc_hooks.clear()
    finish = optimizer.overlapping_partition_gradients_reduce_epilogue

    def share_and_finish() -> None:
        for number, group in enumerate(optimizer.bit16_groups):
            for parameter in group:
                if optimizer.get_gradient_for_reduction(parameter) is not None:
                    optimizer.process_gradients(parameter, number)
        finish()

    optimizer.overlapping_partition_gradients_reduce_epilogue = share_and_finish
