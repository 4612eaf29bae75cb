"""CPU tensors that pretend to lie on cuda:0 or cuda:1: what a GPU would refuse or wait for shows up without one.

```python
with PretendCuda() as gpu:
    model = on_cuda(tiny_model().to(torch.bfloat16))      # or over_two(model): accelerate's own hooks
    text = tiny_text(768).to("cuda")
    gpu.forget()
    model(text)
    assert gpu.syncs.total() <= 2                          # gpu.syncs, gpu.launches: Counters by place
```

The numbers are real: every operation runs on the CPU. Tensors of different devices that meet raise `MixedDevicesError`;
everything that makes the host wait for the device is counted by the line that did it, and so is every kernel launched.

Seen are all operations that reach a kernel, also those inside torch's own C++ functions and in backward passes. Not seen:
what torch would do otherwise because a tensor is on CUDA (other kernels, several launches of one operation), and how long
anything takes.
"""

from tests.pretend_cuda.mode import PretendCuda
from tests.pretend_cuda.models import on_cuda, over_two
from tests.pretend_cuda.tensor import MixedDevicesError

__all__ = ["MixedDevicesError", "PretendCuda", "on_cuda", "over_two"]
