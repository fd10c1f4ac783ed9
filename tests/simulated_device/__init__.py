"""An accelerator in the CPU's memory that is as strict as a GPU: finds tensors that lie on the wrong device.

`register()` builds it (g++, some 15 s, once for each version of torch and of device.cpp) and makes it known to torch as
device "sim", for as long as the process lives: so nothing but a process of its own may call it. Not simulated: speed,
asynchronous kernels, several devices, pinned memory, fused attention, and CUDA's own names (`torch.cuda`, "nccl").
"""
