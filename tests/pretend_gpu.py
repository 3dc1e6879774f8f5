"""A GPU that is not here: tensors that say they are on cuda:0 and hold their numbers on the CPU.

What runs on them takes every branch that asks for CUDA, Lightning's included; an operation on tensors of two
devices raises as it would there, and what makes the CPU wait for the GPU is counted. Kernels, streams, memory
and graphs are not pretended, and autocast is the CPU's. What torch is told here stays: one process each use.

python -m tests.pretend_gpu CARD FOLDER TEXT OPTIMIZER: trains, resumes, validates and samples; a JSON line.
"""

import json
import os
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import torch
import torch._dynamo  # else imported at the first call, by then with a pretended torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

HERE, THERE = torch.device("cpu"), torch.device("cuda", 0)
CARDS = {"t4": ("Tesla T4", (7, 5), 14.5), "h100": ("NVIDIA H100", (9, 0), 79.0)}
COPIES = ("aten::copy_", "aten::_to_copy", "aten::to.", "aten::index.Tensor")  # take tensors of two devices
LISTS = ("aten::_fused", "aten::_foreach", "aten::_amp")  # take not even a number from the CPU
WAITS = (
    "aten::_local_scalar_dense",
    "aten::is_nonzero",
    "aten::nonzero",
    "aten::equal",
    "aten::masked_select",
)
seen: Counter[str] = Counter()


class OnGpu(torch.Tensor):
    """To C++ a tensor of the CPU, which has what it takes to differentiate it; to Python one of the GPU."""

    device = property(lambda self: THERE)
    is_cuda = property(lambda self: True)
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: torch.Tensor):
        layout = {"strides": inner.stride(), "storage_offset": inner.storage_offset(), "dtype": inner.dtype}
        made = torch.Tensor._make_wrapper_subclass(cls, inner.shape, **layout)
        made.inner = inner
        return made

    def tolist(self):
        seen["waits"] += 1
        return self.inner.tolist()

    def cpu(self):
        return torch.ops.aten._to_copy(self, device=HERE)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


class Pretending(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


def run(func, args: tuple, kwargs: dict):
    name = f"{func._schema.name}.{func._schema.overload_name}"
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    there = [x for x in tensors if isinstance(x, OnGpu)]
    here = [x for x in tensors if not isinstance(x, OnGpu)]
    if there and not name.startswith(COPIES) and any(x.dim() or name.startswith(LISTS) for x in here):
        found = ", ".join(f"{tuple(x.shape)} on {x.device.type}" for x in tensors)
        raise RuntimeError(f"{name}: expected all tensors on one device, found {found}")
    device = kwargs.get("device") or next((x for x in args if isinstance(x, torch.device)), None)
    if name.startswith("aten::copy_"):
        goes_there = isinstance(args[0], OnGpu)
    elif torch._C._current_graph_task_id() >= 0:  # backward passes are C++: they take it for one of the CPU
        goes_there = bool(there)
    else:
        goes_there = device.type == "cuda" if device else bool(there)
    if there and (name.startswith(WAITS) or not goes_there):
        seen["waits"] += 1
    seen["pinned"] += bool(kwargs.pop("pin_memory", False))  # which torch refuses without a GPU

    def inner(x):
        return x.inner if isinstance(x, OnGpu) else HERE if isinstance(x, torch.device) else x

    with _disable_current_modes():
        out = func(*tree_map(inner, args), **tree_map(inner, kwargs))
    known = {id(inner(x)): x for x in tensors}
    is_view = any(a.alias_info and not a.alias_info.is_write for a in func._schema.arguments)
    keeps = is_view and not any(x.is_inference() for x in there)  # a view is what its base is

    def outer(x):
        was = known.get(id(x))
        if was is not None and isinstance(was, OnGpu) == goes_there:
            return was  # written in place
        if not goes_there:
            return x
        with torch.inference_mode(torch.is_inference_mode_enabled() and not keeps):
            return OnGpu(x.clone() if was is not None else x)  # from the CPU, where torch would not copy

    return tree_map_only(torch.Tensor, outer, out)


def pretend(card: str) -> None:
    """torch says from now on that this card is here."""
    name, capability, gib = CARDS[card]
    size = int(gib * 2**30)
    torch.__future__.set_swap_module_params_on_conversion(True)  # a tied weight stays tied, as on a GPU
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device="cuda") copies behind the mode

    class Generator(torch.Generator):
        def __new__(cls, device=HERE):
            return super().__new__(cls, HERE)

    class Autocast(torch.autocast):
        def __init__(self, device_type: str, *options, **more):
            super().__init__(HERE.type, *options, **more)

    to, group = torch.Tensor.to, torch._C._group_tensors_by_device_and_dtype
    enabled, dtype = torch.is_autocast_enabled, torch.get_autocast_dtype

    def place(x):  # C++ asks a driver which GPU "cuda" is
        return THERE if isinstance(x, str | torch.device) and str(x) == "cuda" else x

    def grouped(lists, *options):
        groups = group(lists, *options)
        return {(found[0][0][0].device, kind): found for (_, kind), found in groups.items()}

    torch.Generator, torch.autocast = Generator, Autocast
    torch.is_autocast_enabled = lambda device=None: enabled(HERE.type)
    torch.get_autocast_dtype = lambda device: dtype(HERE.type)
    torch.Tensor.to = lambda x, *a, **k: to(x, *map(place, a), **{key: place(v) for key, v in k.items()})
    torch._C._group_tensors_by_device_and_dtype = grouped
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False
    major, minor = capability
    facts = {"name": name, "total_memory": size, "major": major, "minor": minor, "multi_processor_count": 40}
    answers = {
        "is_available": True, "device_count": 1, "current_device": 0, "get_device_name": name,
        "get_device_capability": capability, "get_device_properties": SimpleNamespace(**facts),
        "mem_get_info": (size, size), "get_rng_state": torch.zeros(16, dtype=torch.uint8),
        "is_current_stream_capturing": False,
    }  # fmt: skip
    answers |= {"memory_allocated": 2**30, "max_memory_allocated": 3 * 2**30, "memory_reserved": 3 * 2**30}
    silent = ("_lazy_init", "set_device", "synchronize", "empty_cache", "set_rng_state", "manual_seed_all")
    silent += ("reset_peak_memory_stats",)
    for key, answer in (answers | dict.fromkeys(silent)).items():
        setattr(torch.cuda, key, lambda *args, _answer=answer, **kwargs: _answer)


def main(card: str, folder: str, text: str, optimizer: str) -> None:
    pretend(card)
    from smollm2 import SmolLM2
    from smollm2.device import choose_device, choose_precision
    from smollm2.plan import measure
    from smollm2.training import TrainingLoop, train
    from tests.soak import small_config

    waits, step = [], TrainingLoop.training_step

    def counted(loop, *args):
        before = seen["waits"]
        step(loop, *args)
        waits.append(seen["waits"] - before)

    TrainingLoop.training_step = counted
    settings = {
        "precision": "auto",
        "optimizer": optimizer,
        "val_every": 4,
        "sample_every": 4,
        "save_every": 3,
    }
    with Pretending():
        for steps in (6, 9):
            result = train(small_config(Path(text), Path(folder), 2, max_steps=steps, **settings))
        config = small_config(Path(text), Path(folder), 2)
        measured = measure(config, choose_device(), choose_precision("auto", choose_device()), seconds=0.0)
        model = SmolLM2.from_pretrained(result.checkpoint, torch.float16, choose_device())
        prompt = torch.zeros(2, 4, dtype=torch.long, device=choose_device())
        options = {"temperature": 0.9, "top_k": 20, "top_p": 0.8, "min_p": 0.01, "seed": 1}
        written = [model.generate(prompt, 5, **kind) for kind in ({}, options)]
    facts = {"waits": waits, "pinned": seen["pinned"], "losses": result.losses, "bits": result.bits_per_byte}
    facts |= {"written": [list(ids.shape) for ids in written], "step_seconds": measured.step}
    facts["peak_bytes"] = measured.peak_bytes
    facts["cublas"] = os.environ.get("CUBLAS_WORKSPACE_CONFIG")
    print(json.dumps(facts))


if __name__ == "__main__":
    main(*sys.argv[1:])
