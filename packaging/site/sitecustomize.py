"""Makes PyTorch and TensorFlow keep to FL_GPU_MEMORY_FRACTION, in a ClientApp that knows nothing of it.

supernode-agent mounts this folder into the container and puts it on PYTHONPATH. Python imports `sitecustomize` at every
start; nothing is done then but to wait for the first import of a framework, and at the import nothing but to wait until the
framework itself turns to the GPUs: what forks before that can use CUDA in its children. The limit is soft: CUDA's context
(some hundred MiB) is not counted.
"""

import os
import sys
from importlib.machinery import PathFinder

_FOLDER = os.path.dirname(os.path.abspath(__file__))


def _say(text):
    print(f"supernode-agent: {text}", file=sys.stderr, flush=True)


def _attempt(name, step, *arguments):
    """The ClientApp must run all the same, and somebody must hear of it."""
    try:
        step(*arguments)
    except Exception as error:
        _say(f"FL_GPU_MEMORY_FRACTION could not be applied to {name}: {error!r}")


def _limit_torch(torch, fraction):
    def limit():
        count = torch.cuda.device_count()
        for index in range(count):
            torch.cuda.set_per_process_memory_fraction(fraction, index)
        _say(f"PyTorch {torch.__version__} takes at most {fraction:g} of the memory of each GPU ({count} of them)")

    # Runs when CUDA is initialised, or now if it is. What it raises would keep CUDA from coming up.
    torch.cuda._lazy_call(lambda: _attempt("torch", limit))
    if not torch.backends.cuda.is_built():
        _say(f"PyTorch {torch.__version__} is a build without CUDA: it will not use the GPU")


def _limit_tensorflow(tensorflow, _fraction):
    limits = [int(part) for part in os.environ.get("FL_GPU_MEMORY_LIMITS_MIB", "").split(",") if part]
    config = tensorflow.config
    limited = []

    def limit():
        gpus = config.list_physical_devices("GPU")
        for gpu, mib in zip(gpus, limits):
            if mib > 0:
                config.set_logical_device_configuration(gpu, [config.LogicalDeviceConfiguration(memory_limit=mib)])
                limited.append(gpu)
                _say(f"TensorFlow {tensorflow.__version__} takes at most {mib} MiB of {gpu.name}")
        if not gpus:
            _say(f"TensorFlow {tensorflow.__version__} sees no GPU")

    # A GPU with a limit refuses `set_memory_growth`, which many ClientApps call. It grows all the same: the agent sets
    # TF_FORCE_GPU_ALLOW_GROWTH.
    set_memory_growth = config.experimental.set_memory_growth

    def set_memory_growth_where_free(device, enable):
        config.list_physical_devices("GPU")  # Sets the limits, if nothing has yet.
        if device not in limited:
            set_memory_growth(device, enable)

    config.experimental.set_memory_growth = set_memory_growth_where_free

    # TensorFlow lists its devices before it uses one, and that initialises CUDA.
    context = getattr(sys.modules.get("tensorflow.python.eager.context"), "Context", None)
    list_devices = getattr(context, "_initialize_physical_devices", None)
    if list_devices is None:  # A release that is made otherwise inside: better too early than never.
        limit()
        return

    def list_devices_and_limit(self, *arguments, **keywords):
        context._initialize_physical_devices = list_devices
        list_devices(self, *arguments, **keywords)
        _attempt("tensorflow", limit)

    context._initialize_physical_devices = list_devices_and_limit


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
            _attempt(module.__name__, step, module, self.fraction)

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
    spec = PathFinder.find_spec("sitecustomize", others)
    if spec is None or spec.loader is None:
        return
    import importlib.util  # A millisecond, for the few images that have one.

    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)


_start()
_run_the_next_sitecustomize()
