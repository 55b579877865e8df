"""Makes PyTorch and TensorFlow keep to FL_GPU_MEMORY_FRACTION, in a ClientApp that knows nothing of it.

supernode-agent mounts this folder into the container and puts it on PYTHONPATH. Python imports `sitecustomize` at every
start; nothing is done then but to wait for the first import of a framework. The limit is applied without creating a CUDA
context, and is soft: the context itself (some hundred MiB) is not counted.
"""

import importlib.machinery
import importlib.util
import os
import sys

_FOLDER = os.path.dirname(os.path.abspath(__file__))


def _say(text):
    print(f"supernode-agent: {text}", file=sys.stderr, flush=True)


def _limit_torch(torch, fraction):
    def limit():
        # Runs when CUDA is initialised, or now if it is: devices can be counted then.
        for index in range(torch.cuda.device_count()):
            torch.cuda.set_per_process_memory_fraction(fraction, index)

    torch.cuda._lazy_call(limit)
    _say(f"PyTorch {torch.__version__} will take at most {fraction:g} of the memory of each GPU")


def _limit_tensorflow(tensorflow, _fraction):
    limits = [int(part) for part in os.environ.get("FL_GPU_MEMORY_LIMITS_MIB", "").split(",") if part]
    gpus = tensorflow.config.list_physical_devices("GPU")
    for gpu, limit in zip(gpus, limits):
        if limit > 0:
            part = tensorflow.config.LogicalDeviceConfiguration(memory_limit=limit)
            tensorflow.config.set_logical_device_configuration(gpu, [part])
            _say(f"TensorFlow {tensorflow.__version__} will take at most {limit} MiB of {gpu.name}")


class _Watcher:
    """A finder that finds nothing by itself: it lets the others find a framework and adds a step after its import."""

    steps = {"torch": _limit_torch, "tensorflow": _limit_tensorflow}

    def __init__(self, fraction):
        self.fraction = fraction

    def find_spec(self, name, path=None, target=None):
        step = self.steps.get(name)
        if step is None or path is not None:
            return None
        for finder in sys.meta_path:
            find = getattr(finder, "find_spec", None)
            spec = None if finder is self or find is None else find(name, path, target)
            if spec is not None:
                break
        else:
            return None
        if spec.loader is not None and hasattr(spec.loader, "exec_module"):
            self._extend(spec.loader, step)
        return spec

    def _extend(self, loader, step):
        execute = loader.exec_module

        def execute_and_limit(module):
            execute(module)
            try:
                step(module, self.fraction)
            except Exception as error:  # The ClientApp must run all the same, and somebody must hear of it.
                _say(f"FL_GPU_MEMORY_FRACTION could not be applied to {module.__name__}: {error!r}")

        loader.exec_module = execute_and_limit


def _start():
    text = os.environ.get("FL_GPU_MEMORY_FRACTION", "")
    try:
        fraction = float(text)
    except ValueError:
        return
    if 0 < fraction <= 1:
        sys.meta_path.insert(0, _Watcher(fraction))


def _run_the_next_sitecustomize():
    """The image's own sitecustomize, which ours hides, runs as if ours were not there."""
    others = [entry for entry in sys.path if os.path.abspath(entry or os.curdir) != _FOLDER]
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize", others)
    if spec is None or spec.loader is None:
        return
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)


_start()
_run_the_next_sitecustomize()
